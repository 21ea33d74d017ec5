#!/usr/bin/env bash
# Measures all that the tables of the README and of docs/performance.md show, and fills them. Takes
# long: LiquidCache is built with a DataFusion of its own.
#
#   benches/all.sh                       # everything
#   benches/all.sh tpch fill lookup      # these parts; the other tables stay as they are
#
# Parts: tpch clickbench clickbench-10m tpch-10 first-touch cold processes fill lookup remote duckdb
#        liquid-cache
# Inputs: $STOA_RESULTS, where the documents go (target/bench-results); $STOA_BENCH_DATA, where the
#         data are kept or generated (target/bench-data); $STOA_BENCH, a binary that was built
#         before; $PYTHON, which has the module duckdb (python3).
# Skips, and says so: huge pages without root, DuckDB without its module.
set -euo pipefail

# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sbin/common.sh"
cd -- "$STOA_ROOT"
target="${CARGO_TARGET_DIR:-target}"
data="${STOA_BENCH_DATA:-target/bench-data}"
results="${STOA_RESULTS:-target/bench-results}"
python="${PYTHON:-python3}"
parts=("$@")
[ "$#" -gt 0 ] || parts=(tpch clickbench clickbench-10m tpch-10 first-touch cold processes fill lookup
    remote duckdb liquid-cache)
mkdir -p -- "$results"
if [ -z "${STOA_BENCH:-}" ]; then
    need_build_tools
    cargo build --release --workspace --bin stoa-bench --locked </dev/null
    export STOA_BENCH="$target/release/stoa-bench"
fi

# measure NAME ARGUMENT…: a run, and its document below the results.
measure() {
    local name="$1"
    shift
    say "== $name"
    benches/run.sh "$@" --path "$data" -o "$results/$name.json"
}

# As measure, on huge pages.
huge() {
    if [ "$(id -u)" -ne 0 ]; then
        say "== $1: left out, huge pages are mounted by root"
        return
    fi
    measure "$@" --huge
}

lookups() {
    (cd benches/micro && cargo bench --locked -p stoa-micro </dev/null)
    "$STOA_BENCH" lookup --criterion "$target/criterion" --pages "$1" -o "$2"
}

part() {
    case "$1" in
    tpch)
        measure tpch --scale 1 --iterations 15 --modes "parquet,parquet-pushdown,memtable,$forms,$budgets"
        "$STOA_BENCH" plot "$results/tpch.json" -o docs/frontier.svg
        ;;
    # Half of the rows: a MemTable of all of them does not fit into 24 GB.
    clickbench)
        measure clickbench --suite clickbench --scale 0.5 --iterations 15 \
            --modes parquet,memtable,stoa-packed,stoa-auto@1
        ;;
    clickbench-10m)
        measure clickbench-10m --suite clickbench --scale 1 --iterations 15 \
            --modes parquet,stoa-packed,stoa-auto@1
        ;;
    tpch-10)
        measure tpch-10 --scale 10 --one-at-a-time --iterations 15 --modes parquet,stoa-packed
        ;;
    first-touch)
        measure first-touch --states first-touch --iterations 15 --modes parquet,stoa-arrow,stoa-packed
        huge first-touch-huge --states first-touch --iterations 15 --modes stoa-arrow,stoa-packed
        ;;
    cold)
        measure cold --states cold --iterations 15 --modes parquet,stoa-packed,stoa-auto
        ;;
    processes)
        for count in 2 4; do
            measure "processes-$count" --states processes --concurrency "$count" --iterations 15 \
                --modes parquet,stoa-arrow,stoa-packed
        done
        ;;
    fill)
        measure fill --states fill --iterations 15 --modes stoa-arrow,stoa-packed,stoa-parquet
        huge fill-huge --states fill --iterations 15 --modes stoa-arrow,stoa-packed,stoa-parquet
        ;;
    lookup)
        say "== lookup"
        lookups "4 KiB" "$results/lookup.json"
        if [ "$(id -u)" -eq 0 ]; then
            # The caches of that benchmark lie on /dev/shm: here, on another one that nobody else sees.
            export -f lookups
            export target results
            # shellcheck disable=SC2016
            unshare --mount --propagation private bash -euc '
                mount -t tmpfs -o huge=always,size=6g,mode=1777,nosuid,nodev stoa-bench /dev/shm
                lookups huge "$results/lookup-huge.json"
            '
        else
            say "== lookup-huge: left out, huge pages are mounted by root"
        fi
        ;;
    remote)
        measure remote --states remote --iterations 15 --modes parquet,stoa-arrow,stoa-packed
        ;;
    duckdb)
        if ! "$python" -c 'import duckdb' 2>/dev/null; then
            say "== duckdb: left out, $python has no module duckdb; see benches/peers/duckdb/run.py"
            return
        fi
        say "== duckdb"
        "$python" benches/peers/duckdb/run.py --scale 1 --path "$data" --threads 2 --iterations 15 \
            -o "$results/duckdb.json"
        ;;
    liquid-cache)
        say "== liquid-cache"
        cargo run --release --locked --manifest-path benches/peers/liquid-cache/Cargo.toml -- \
            --path "$data" --iterations 15 -o "$results/liquid-cache.json" </dev/null
        ;;
    *) die "unknown part $1; see the head of benches/all.sh" ;;
    esac
}

forms=stoa-arrow,stoa-packed,stoa-auto
budgets=stoa-auto@0.5,stoa-auto@1,stoa-auto@2
for name in "${parts[@]}"; do
    part "$name"
    # After each, so that what was measured is not lost with what fails later.
    documents=()
    for known in tpch clickbench clickbench-10m tpch-10 first-touch first-touch-huge cold processes-2 \
        processes-4 fill fill-huge lookup lookup-huge remote duckdb liquid-cache; do
        [ ! -f "$results/$known.json" ] || documents+=("$results/$known.json")
    done
    "$STOA_BENCH" tables "${documents[@]}" --markdown --into README.md,docs/performance.md
done
