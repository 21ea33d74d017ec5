#!/usr/bin/env bash
# Builds the benchmarks in release and runs one: what benches/all.sh calls for most tables of the
# README and of docs/performance.md.
#
#   benches/run.sh --suite tpch --scale 1 \
#       --modes parquet,parquet-pushdown,memtable,stoa-arrow,stoa-packed,stoa-auto -o out.json
#
# Inputs: arguments go to `stoa-bench run` (`benches/run.sh --help` lists them). The data are kept
#         below target/bench-data unless --path says otherwise.
#         --huge puts the caches on a tmpfs with huge pages, in a mount namespace that ends with the
#         run. Needs root.
#         --into FILE[,FILE], relative to the repository, fills the tables between the markers of
#         these files afterwards, --plot FILE writes the SVG of time against memory; both need -o.
# Falls back: to a binary that was built before in $STOA_BENCH.
set -euo pipefail

# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../sbin/common.sh"
# Paths that are given are relative to where the script was called.
here="$PWD"
absolute() {
    case "$1" in
    /*) printf '%s\n' "$1" ;;
    *) printf '%s/%s\n' "$here" "$1" ;;
    esac
}

huge=false
into=""
plot=""
output=""
arguments=()
while [ "$#" -gt 0 ]; do
    case "$1" in
    --huge) huge=true ;;
    --into | --plot | -o | --output)
        [ "$#" -gt 1 ] || die "$1 needs a value"
        case "$1" in
        --into) into="$2" ;;
        --plot) plot="$(absolute "$2")" ;;
        *)
            output="$(absolute "$2")"
            arguments+=(-o "$output")
            ;;
        esac
        shift
        ;;
    *) arguments+=("$1") ;;
    esac
    shift
done
if { [ -n "$into" ] || [ -n "$plot" ]; } && [ -z "$output" ]; then
    die "--into and --plot are made of what is written: give -o FILE"
fi

cd -- "$STOA_ROOT"
bench="${STOA_BENCH:-}"
if [ -z "$bench" ]; then
    need_build_tools
    # The selection of the whole workspace, so that DataFusion is compiled once for all of it.
    cargo build --release --workspace --bin stoa-bench --locked </dev/null
    bench="${CARGO_TARGET_DIR:-target}/release/stoa-bench"
fi

if "$huge"; then
    [ "$(id -u)" -eq 0 ] || die "--huge mounts a tmpfs, which needs root"
    place="$(mktemp -d)"
    # Nobody else sees the mount, and it ends with the last process in it.
    # shellcheck disable=SC2016
    unshare --mount --propagation private bash -euc '
        mount -t tmpfs -o huge=always,mode=0700,nosuid,nodev stoa-bench "$1"
        place="$1"
        shift
        "$@" --cache-root "$place"
    ' bash "$place" "$bench" run "${arguments[@]}"
    rmdir -- "$place"
else
    "$bench" run "${arguments[@]}"
fi

if [ -n "$into" ]; then
    "$bench" tables "$output" --markdown --into "$into"
fi
if [ -n "$plot" ]; then
    "$bench" plot "$output" -o "$plot"
fi
