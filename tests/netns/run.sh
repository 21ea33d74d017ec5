#!/usr/bin/env bash
# Three workers in three network namespaces with mutual TLS: TPC-H from any of them out of the
# memory of all, then the same under new certificates, partitions, deaths and slow links.
#
# Inputs: root; ip and tc (iproute2), etcd, openssl, curl, python3, which are installed where that is
#         possible without asking.
#         STOA_BIN  the directory with the binaries stoa and stoa-s3; else target/debug, built here.
#         STOA_DATA a directory with a directory of Parquet files for each table of TPC-H, as
#                   `stoa demo` writes them; else scale STOA_SCALE (0.1) is generated.
#         STOA_SECONDS how long each fault lasts, and the time before and after it (10).
#         STOA_CACHE_SIZE what each worker may take of /dev/shm (3GiB).
# Takes five minutes at scale 0.1 in the dev profile. For scale 1, with binaries of a release:
#   STOA_BIN=target/release STOA_DATA=target/bench-data/tpch-sf1 STOA_SECONDS=30 tests/netns/run.sh
# Prints where the chunks of all tables came from, node by node, and the latency before, during and
# after each fault. All traffic stays inside the namespaces, which are removed at the end with
# everything that was started. Exits with 1 if any answer differs from stock DataFusion's, any query
# fails, chunks do not add up, the object store saw a request while all was in memory, or latency
# did not come back.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=sbin/common.sh
source "$here/../../sbin/common.sh"
root="$STOA_ROOT"
bin="${STOA_BIN:-}"
seconds="${STOA_SECONDS:-10}"
tag="stoa$$"
work="$(mktemp -d /tmp/stoa-netns-XXXXXX)"
shm="$(mktemp -d /dev/shm/stoa-netns-XXXXXX)"
pids=()
failed=0
# Inherited settings would name other clusters.
unset STOA_CONFIG AWS_ENDPOINT_URL 2>/dev/null || true

wrong() {
    say "WRONG: $*"
    failed=1
}

clean_up() {
    local status=$? namespace pid cache
    for pid in "${pids[@]}"; do kill -9 "$pid" 2>/dev/null || true; done
    wait 2>/dev/null || true
    # The counters of a cache lie beside its directory, under a name that only stoa knows.
    for cache in "$shm"/*/; do
        "${stoa:-true}" --set cache.location="${cache%/}" --set state.location="$work/reset" \
            reset --files --yes 2>/dev/null || true
    done
    for namespace in hub n1 n2 n3; do ip netns del "$tag-$namespace" 2>/dev/null || true; done
    if [ "$status" != 0 ] && [ -d "$work" ]; then
        mkdir -p /tmp/stoa-netns-logs && cp "$work"/*.log /tmp/stoa-netns-logs/ 2>/dev/null || true
        say "logs: /tmp/stoa-netns-logs"
    fi
    rm -rf -- "$work" "$shm"
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

[ "$(id -u)" = 0 ] || die "network namespaces need root"
missing=()
for needed in ip:iproute2 etcd:etcd-server openssl:openssl curl:curl python3:python3; do
    command -v "${needed%%:*}" >/dev/null 2>&1 || missing+=("${needed#*:}")
done
if [ "${#missing[@]}" -gt 0 ]; then
    install_packages "${missing[@]}" || die "install ${missing[*]} (apt-get install ${missing[*]})"
fi
if [ -z "$bin" ]; then
    need_build_tools
    (cd -- "$root" && cargo build --workspace --bin stoa --bin stoa-s3 --locked </dev/null)
    bin="${CARGO_TARGET_DIR:-$root/target}/debug"
fi
# Other scripts take the binary itself for STOA_BIN.
if [ -f "$bin" ]; then bin="$(dirname -- "$bin")"; fi
bin="$(cd -- "$bin" && pwd)"
stoa="$bin/stoa"
[ -x "$stoa" ] && [ -x "$bin/stoa-s3" ] || die "no binaries stoa and stoa-s3 in $bin"

data="${STOA_DATA:-}"
if [ -z "$data" ]; then
    say "generating TPC-H"
    demo=(--set cache.location="$shm/demo" --set state.location="$work/demo")
    "$stoa" demo --scale "${STOA_SCALE:-0.1}" --data "$work/tpch" --queries 6 --iterations 1 \
        "${demo[@]}" >/dev/null
    "$stoa" "${demo[@]}" reset --files --yes >/dev/null
    data="$(dirname "$(find "$work/tpch" -type d -name lineitem | head -n 1)")"
fi
data="$(cd -- "$data" && pwd)"
# Decoded and not packed the tables take five times what their files do.
needed_kib=$(($(du -sk -- "$data" | cut -f 1) * 5))
free_kib="$(df -k --output=avail -- "$shm" | tail -n 1)"
[ "$free_kib" -ge "$needed_kib" ] ||
    die "/dev/shm has $((free_kib / 1024)) MiB free, expected $((needed_kib / 1024)) MiB at least"

in_namespace() { ip netns exec "$tag-$1" "${@:2}"; }

# Waits for a command to succeed: what for, how many seconds at most, the command.
wait_until() {
    local what="$1" until=$((SECONDS + $2))
    shift 2
    until "$@" >/dev/null 2>&1; do
        [ "$SECONDS" -lt "$until" ] || die "$what: not there in time"
        sleep 0.2
    done
}

# A command in a namespace, in the background, with a log; its process id is last in pids.
start() {
    local namespace="$1" log="$2"
    shift 2
    ip netns exec "$tag-$namespace" "$@" >>"$work/$log.log" 2>&1 </dev/null &
    pids+=("$!")
}

### The network: a bridge in a namespace of its own, three nodes on it.

ip netns add "$tag-hub"
in_namespace hub ip link set lo up
in_namespace hub ip link add bridge type bridge
in_namespace hub ip addr add 10.213.0.1/24 dev bridge
in_namespace hub ip link set bridge up
for node in 1 2 3; do
    ip netns add "$tag-n$node"
    in_namespace hub ip link add "port$node" type veth peer name eth0 netns "$tag-n$node"
    in_namespace hub ip link set "port$node" master bridge up
    in_namespace "n$node" ip link set lo up
    in_namespace "n$node" ip addr add "10.213.0.1$node/24" dev eth0
    in_namespace "n$node" ip link set eth0 up
done

### Certificates: one authority, one certificate a node with its role and its address.

authority() {
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj "/CN=$1" \
        -keyout "$work/$1.key" -out "$work/$1.pem" 2>/dev/null
}
certificate() {
    local name="$1" address="$2" by="$3"
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=$name" \
        -keyout "$work/$name.key" -out "$work/$name.csr" 2>/dev/null
    printf 'subjectAltName=IP:%s,URI:stoa://role/node\nextendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=CA:FALSE\n' \
        "$address" >"$work/$name.ext"
    openssl x509 -req -in "$work/$name.csr" -CA "$work/$by.pem" -CAkey "$work/$by.key" -days 2 \
        -CAcreateserial -extfile "$work/$name.ext" -out "$work/$name.pem" 2>/dev/null
}
authority ca
for node in 1 2 3; do certificate "n$node" "10.213.0.1$node" ca; done

### etcd, the object store, a coordinator; a worker on each node.

export AWS_ACCESS_KEY_ID=stoa-test AWS_SECRET_ACCESS_KEY=stoa-test-secret
mkdir -p "$work/s3"
ln -s -- "$data" "$work/s3/tpch"
start hub etcd etcd --data-dir "$work/etcd" --listen-client-urls http://10.213.0.1:2379 \
    --advertise-client-urls http://10.213.0.1:2379 --listen-peer-urls http://127.0.0.1:2380 \
    --log-level error
start hub s3 "$bin/stoa-s3" --root "$work/s3" --host 10.213.0.1 --port 9000

shared() {
    cat <<TOML
etcd.hosts = "10.213.0.1:2379"
cache.freshness = "snapshot"
heartbeat.lease.ttl.seconds = 3
heartbeat.period.seconds = 1
coordinator.grace.seconds = 600
TOML
}
store() {
    cat <<TOML

[store."s3://tpch"]
endpoint = "http://10.213.0.1:9000"
region = "us-east-1"
allow_http = true
TOML
}
for node in 1 2 3; do
    {
        shared
        cat <<TOML
cache.location = "$shm/n$node"
cache.size = "${STOA_CACHE_SIZE:-3GiB}"
state.location = "$work/state$node"
worker.id = "n$node"
worker.host = "10.213.0.1$node"
transfer.address = "10.213.0.1$node:7420"
transfer.tls.ca = "$work/ca.pem"
transfer.tls.cert = "$work/n$node.pem"
transfer.tls.key = "$work/n$node.key"
TOML
        store
    } >"$work/n$node.toml"
done
{
    shared
    printf 'cache.location = "%s/none"\nstate.location = "%s/state0"\n' "$shm" "$work"
    store
} >"$work/hub.toml"

wait_until "etcd" 20 in_namespace hub curl -sf http://10.213.0.1:2379/health
wait_until "the object store" 20 in_namespace hub curl -sf http://10.213.0.1:9000/_stoa/counts
start hub coordinator "$stoa" coordinator --config "$work/hub.toml"
declare -A worker_pid
for node in 1 2 3; do
    start "n$node" "worker$node" "$stoa" worker --config "$work/n$node.toml"
    worker_pid[$node]="${pids[-1]}"
done
registered() {
    in_namespace hub "$stoa" --config "$work/hub.toml" status --json |
        python3 -c 'import json, sys; sys.exit(len(json.load(sys.stdin)["workers"]) != 3)'
}
wait_until "three workers" 60 registered

tables=(customer lineitem nation orders part partsupp region supplier)
for table in "${tables[@]}"; do
    in_namespace hub "$stoa" --config "$work/hub.toml" layout create "tpch.$table" \
        --location "s3://tpch/$table/" >/dev/null
done
for table in "${tables[@]}"; do
    in_namespace hub timeout 600 "$stoa" --config "$work/hub.toml" load "tpch.$table:1" >/dev/null 2>&1 ||
        die "tpch.$table is not loaded: $(in_namespace hub "$stoa" --config "$work/hub.toml" status)"
done
in_namespace hub "$stoa" --config "$work/hub.toml" status >&2
### Where chunks come from: all of all tables, from each node.

# The sources of the chunks that a statement reads on a node: local, remote, origin, and those that
# were to come from a worker and did not.
chunks() {
    local node="$1" statement="$2"
    # Undivided, because a chunk counts in each share of its row group.
    printf '%s;\n' "$use_tpch" 'set datafusion.optimizer.repartition_file_scans = false' \
        "explain analyze $statement" >"$work/explain-$node.sql"
    in_namespace "n$node" timeout 300 "$stoa" --config "$work/n$node.toml" sql -q --format csv \
        -f "$work/explain-$node.sql" 2>>"$work/sql$node.log" | python3 -c '
import re, sys
text = sys.stdin.read()
def count(name):
    values = re.findall(r"\bstoa_%s_chunks=([^,\]]+)" % name, text)
    if not all(value.isdigit() for value in values):
        sys.exit(f"rounded: {values}; choose a smaller scale")
    return sum(map(int, values))
remote = count("remote_tcp") + count("remote_rdma")
print(count("shared_memory"), remote, count("origin"), count("remote_failed"))' 2>>"$work/chunks.log"
}

# Reads all columns of all tables on a node, and leaves a line a table in chunks-NODE.txt: its name,
# how many chunks it has, how many of them are here, and the sources. Fails while any chunk comes
# from the origin.
read_all() {
    local node="$1" table of sources
    printf '%s;\n' 'select "table", chunks, cached_chunks from stoa_tables()' >"$work/tables-$node.sql"
    in_namespace "n$node" "$stoa" --config "$work/n$node.toml" sql -q --format csv \
        -f "$work/tables-$node.sql" >"$work/tables-$node.csv" 2>>"$work/sql$node.log" || return 1
    : >"$work/chunks-$node.txt"
    for table in "${tables[@]}"; do
        of="$(grep "^$table," "$work/tables-$node.csv")" || return 1
        sources="$(chunks "$node" "select * from $table")" || return 1
        printf '%s %s\n' "${of//,/ }" "$sources" >>"$work/chunks-$node.txt"
    done
    awk '{ origin += $6 } END { exit origin > 0 }' "$work/chunks-$node.txt"
}

use_tpch="set datafusion.catalog.default_schema = 'tpch'"
# The directories follow what was published within seconds.
for node in 1 2 3; do wait_until "all chunks in memory, as n$node knows" 300 read_all "$node"; done
python3 - "$work"/chunks-[123].txt <<'PYTHON' || failed=1
import sys
bad = False
print(f"{'chunks':8} {'asked':>7} {'local':>7} {'remote':>7} {'origin':>7} {'failed':>7}")
for node, path in enumerate(sys.argv[1:], 1):
    rows = [(line.split()[0], *map(int, line.split()[1:])) for line in open(path)]
    for table, asked, here, local, remote, origin, failed in rows:
        if local + remote + origin != asked or local != here or origin or failed:
            print(f"n{node}, {table}: {asked} chunks, {here} of them here; read {local} local, "
                  f"{remote} remote, {origin} from the origin, {failed} failed")
            bad = True
    asked, _, local, remote, origin, failed = map(sum, list(zip(*rows))[1:])
    print(f"n{node:<7} {asked:7} {local:7} {remote:7} {origin:7} {failed:7}")
sys.exit(bad)
PYTHON

### Answers: stock once, then every node.

query_file() { printf '%s/cli/queries/q%02d.sql' "$root" "$1"; }

# The answer of a query, its rows sorted: sums in another order differ in no digit of a decimal.
answer() {
    local node="$1" number="$2"
    shift 2
    printf '%s;\n%s;\n' "$use_tpch" "$(cat "$(query_file "$number")")" >"$work/query-$node.sql"
    in_namespace "n$node" timeout 120 "$stoa" --config "$work/n$node.toml" "$@" sql -q --format csv \
        -f "$work/query-$node.sql" 2>>"$work/sql$node.log" | LC_ALL=C sort
}

requests() { in_namespace hub curl -sf "$@" http://10.213.0.1:9000/_stoa/counts; }

mkdir -p "$work/stock"
say "stock"
for number in $(seq 22); do
    answer 1 "$number" --set cache.enabled=false >"$work/stock/$number" ||
        die "query $number fails without a cache"
    [ -s "$work/stock/$number" ] || die "query $number answers nothing without a cache"
done
requests -X DELETE >/dev/null
before="$(requests)"
for node in 1 2 3; do
    for number in $(seq 22); do
        answer "$node" "$number" >"$work/answer" || wrong "query $number fails on n$node"
        cmp -s "$work/answer" "$work/stock/$number" || wrong "query $number differs on n$node"
    done
    say "n$node: 22 queries"
done
after="$(requests)"
if [ "$before" = "$after" ]; then
    say "the object store saw no request"
else
    wrong "the object store was asked: $after"
fi

### Faults under a running loop of queries on n1.

# Runs q6 and q3 over and over; a line each: name of the phase, query, milliseconds, outcome. Then
# once more, for the sources of their chunks.
loop() {
    local phase="$1" until=$((SECONDS + seconds)) number begun took outcome sources
    while [ "$SECONDS" -lt "$until" ]; do
        for number in 6 3; do
            begun="$(date +%s%N)"
            outcome=equal
            answer 1 "$number" >"$work/loop" || outcome=failed
            took=$((($(date +%s%N) - begun) / 1000000))
            cmp -s "$work/loop" "$work/stock/$number" || outcome="${outcome/equal/different}"
            printf '%s q%s %s %s\n' "$phase" "$number" "$took" "$outcome" >>"$work/loop.txt"
        done
    done
    for number in 6 3; do
        sources="$(chunks 1 "$(cat "$(query_file "$number")")")" || sources="0 0 0 0"
        printf '%s q%s %s\n' "$phase" "$number" "$sources" >>"$work/sources.txt"
    done
}

loop usual
say "every node gets a new certificate"
(for node in 1 2 3; do
    sleep "$((seconds / 5 + 1))"
    certificate "n$node" "10.213.0.1$node" ca
done) &
rotation=$!
loop rotated
wait "$rotation"
say "n2 is partitioned away"
in_namespace hub ip link set port2 down
loop partitioned
in_namespace hub ip link set port2 up
sleep 3
loop healed
# A thin line to n3 (tbf is in kernels that lack netem): a thousandth of what it usually carries.
thin() { in_namespace "$1" tc qdisc add dev "$2" root tbf rate 4mbit burst 32k latency 2s 2>/dev/null; }
wide() { in_namespace "$1" tc qdisc del dev "$2" root 2>/dev/null || true; }
if thin hub port3 && thin n3 eth0; then
    say "the line to n3 carries 4 Mbit/s"
    loop slow
    wide hub port3
    wide n3 eth0
    sleep 3
    loop quick
else
    wide hub port3
    say "a slow line is left out: this kernel has no tbf"
fi
say "n3 hangs"
kill -STOP "${worker_pid[3]}"
loop hanging
kill -CONT "${worker_pid[3]}"
sleep 3
loop awake
say "n3 is killed"
kill -9 "${worker_pid[3]}"
wait "${worker_pid[3]}" 2>/dev/null || true
loop killed
start n3 worker3 "$stoa" worker --config "$work/n3.toml"
sleep 6
loop restarted

python3 - "$work/loop.txt" "$work/sources.txt" <<'PYTHON' || failed=1
import statistics, sys
times, bad_answers, sources = {}, {}, {}
for line in open(sys.argv[1]):
    phase, query, took, outcome = line.split()
    times.setdefault((phase, query), []).append(int(took))
    bad_answers.setdefault(phase, []).append(outcome)
for line in open(sys.argv[2]):
    phase, query, *counts = line.split()
    sources[phase, query] = "/".join(counts)
bad = False
faults = [("partitioned", "healed"), ("slow", "quick"), ("hanging", "awake"), ("killed", "restarted")]
def shown(phase, query):
    found = times[phase, query]
    return f"{statistics.median(found):.0f} ({max(found)})"
print("ms as median (most); chunks as local/remote/origin/failed")
print(f"{'fault':12} {'query':5} {'before':>14} {'first':>7} {'during':>14} {'after':>14}  "
      f"{'chunks before':>16} {'during':>16} {'after':>16}")
for query in ("q6", "q3"):
    local, remote, origin, failed = map(int, sources["rotated", query].split("/"))
    if not remote or origin or failed:
        print(f"{query}, new certificates: chunks {sources['rotated', query]}, expected local and remote ones only")
        bad = True
before = "usual"
for fault, after in faults:
    if (fault, "q6") not in times:
        continue
    for query in ("q6", "q3"):
        print(f"{fault:12} {query:5} {shown(before, query):>14} {times[fault, query][0]:7} "
              f"{shown(fault, query):>14} {shown(after, query):>14}  {sources[before, query]:>16} "
              f"{sources[fault, query]:>16} {sources[after, query]:>16}")
        usual = statistics.median(times["usual", query])
        if statistics.median(times[after, query]) > 2 * usual + 100:
            print(f"{query}, {after}: latency did not come back")
            bad = True
    before = after
for phase, outcomes in bad_answers.items():
    failed, different = outcomes.count("failed"), outcomes.count("different")
    if failed or different:
        print(f"{phase}: of {len(outcomes)} queries {failed} failed, {different} answered otherwise")
        bad = True
print(f"{sum(map(len, bad_answers.values()))} queries under faults and between them")
sys.exit(bad)
PYTHON

[ "$failed" = 0 ] && say "all is well"
exit "$failed"
