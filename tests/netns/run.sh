#!/usr/bin/env bash
# Three workers in three network namespaces with mutual TLS: TPC-H from any of them out of the
# memory of all, then the same under partitions, deaths and slow links.
#
# Inputs: root, ip (iproute2), tc, etcd, openssl, curl, python3.
#         STOA_BIN  the directory with the binaries stoa and stoa-s3; else target/debug, built here.
#         STOA_DATA a directory with a directory of Parquet files for each table of TPC-H, as
#                   `stoa demo` writes them; else scale STOA_SCALE (0.1) is generated.
#         STOA_SECONDS how long each fault lasts (10).
# All traffic stays inside the namespaces, which are removed at the end with everything that was
# started. Exits with 1 if any answer differs from stock DataFusion's, any query fails, the object
# store saw a request while all was in memory, or latency did not come back.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
root="$(cd -- "$here/../.." && pwd)"
bin="${STOA_BIN:-}"
seconds="${STOA_SECONDS:-10}"
tag="stoa$$"
work="$(mktemp -d /tmp/stoa-netns-XXXXXX)"
shm="$(mktemp -d /dev/shm/stoa-netns-XXXXXX)"
pids=()
failed=0
# Inherited settings would name other clusters.
unset STOA_CONFIG AWS_ENDPOINT_URL 2>/dev/null || true

say() { printf '%s\n' "$*" >&2; }
die() {
    say "netns: $*"
    exit 1
}
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

for program in ip etcd openssl curl python3; do
    command -v "$program" >/dev/null || die "$program is not installed"
done
[ "$(id -u)" = 0 ] || die "network namespaces need root"
if [ -z "$bin" ]; then
    (cd "$root" && cargo build --workspace --bin stoa --bin stoa-s3)
    bin="${CARGO_TARGET_DIR:-$root/target}/debug"
fi
stoa="$bin/stoa"
[ -x "$stoa" ] && [ -x "$bin/stoa-s3" ] || die "no binaries stoa and stoa-s3 in $bin"

data="${STOA_DATA:-}"
if [ -z "$data" ]; then
    say "generating TPC-H"
    "$stoa" demo --scale "${STOA_SCALE:-0.1}" --data "$work/tpch" --queries 6 --iterations 1 \
        --set cache.location="$shm/demo" --set state.location="$work/demo" >/dev/null
    data="$(dirname "$(find "$work/tpch" -type d -name lineitem | head -n 1)")"
fi

in_namespace() { ip netns exec "$tag-$1" "${@:2}"; }

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
mkdir -p "$work/s3/tpch"
cp -r -- "$data"/* "$work/s3/tpch/"
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

for _ in $(seq 100); do
    in_namespace hub curl -sf http://10.213.0.1:2379/health >/dev/null && break
    sleep 0.1
done
start hub coordinator "$stoa" coordinator --config "$work/hub.toml"
declare -A worker_pid
for node in 1 2 3; do
    start "n$node" "worker$node" "$stoa" worker --config "$work/n$node.toml"
    worker_pid[$node]="${pids[-1]}"
done
sleep 3

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
# Until the directories say what the others hold.
sleep 4

### Answers: stock once, then every node.

query_file() { printf '%s/cli/queries/q%02d.sql' "$root" "$1"; }

# The answer of a query, its rows sorted: sums in another order differ in no digit of a decimal.
answer() {
    local node="$1" number="$2"
    shift 2
    { printf 'set datafusion.catalog.default_schema = '"'tpch'"';\n'; cat "$(query_file "$number")"; printf ';\n'; } \
        >"$work/query-$node.sql"
    in_namespace "n$node" timeout 120 "$stoa" --config "$work/n$node.toml" "$@" sql -q --format csv \
        -f "$work/query-$node.sql" 2>>"$work/sql$node.log" | LC_ALL=C sort
}

mkdir -p "$work/stock"
say "stock"
for number in $(seq 22); do
    answer 1 "$number" --set cache.enabled=false >"$work/stock/$number" ||
        die "query $number fails without a cache"
done
in_namespace hub curl -sf -X DELETE http://10.213.0.1:9000/_stoa/counts >/dev/null
before="$(in_namespace hub curl -sf http://10.213.0.1:9000/_stoa/counts)"
for node in 1 2 3; do
    for number in $(seq 22); do
        answer "$node" "$number" >"$work/answer" || wrong "query $number fails on n$node"
        cmp -s "$work/answer" "$work/stock/$number" || wrong "query $number differs on n$node"
    done
    say "n$node: 22 queries"
done
after="$(in_namespace hub curl -sf http://10.213.0.1:9000/_stoa/counts)"
if [ "$before" = "$after" ]; then
    say "the object store saw no request"
else
    wrong "the object store was asked: $after"
fi

### Faults under a running loop of queries on n1.

# Runs q6 and q3 over and over; a line each: name of the phase, milliseconds, outcome.
loop() {
    local phase="$1" until=$((SECONDS + $2)) number begun took outcome
    while [ "$SECONDS" -lt "$until" ]; do
        for number in 6 3; do
            begun="$(date +%s%N)"
            outcome=equal
            answer 1 "$number" >"$work/loop" || outcome=failed
            cmp -s "$work/loop" "$work/stock/$number" || outcome="${outcome/equal/different}"
            took=$((($(date +%s%N) - begun) / 1000000))
            printf '%s q%s %s %s\n' "$phase" "$number" "$took" "$outcome" >>"$work/loop.txt"
        done
    done
}

loop usual "$seconds"
say "n2 is partitioned away"
in_namespace hub ip link set port2 down
loop partitioned "$seconds"
in_namespace hub ip link set port2 up
sleep 3
loop healed "$seconds"
# A thin line to n3 (tbf is in kernels that lack netem): a thousandth of what it usually carries.
if in_namespace hub tc qdisc add dev port3 root tbf rate 4mbit burst 32k latency 2s 2>/dev/null &&
    in_namespace n3 tc qdisc add dev eth0 root tbf rate 4mbit burst 32k latency 2s; then
    say "the line to n3 carries 4 Mbit/s"
    loop slow "$seconds"
    in_namespace hub tc qdisc del dev port3 root
    in_namespace n3 tc qdisc del dev eth0 root
    sleep 3
    loop quick "$seconds"
fi
say "n3 hangs"
kill -STOP "${worker_pid[3]}"
loop hanging "$seconds"
kill -CONT "${worker_pid[3]}"
sleep 3
loop awake "$seconds"
say "n3 is killed"
kill -9 "${worker_pid[3]}"
loop killed "$seconds"
start n3 worker3 "$stoa" worker --config "$work/n3.toml"
sleep 6
loop restarted "$seconds"

python3 - "$work/loop.txt" <<'PYTHON' || failed=1
import statistics, sys
phases = {}
for line in open(sys.argv[1]):
    phase, query, took, outcome = line.split()
    phases.setdefault(phase, []).append((int(took), outcome, query))
bad = False
usual = statistics.median(took for took, _, _ in phases["usual"])
print(f"{'phase':12} queries failed different  median ms     max ms")
for phase, rows in phases.items():
    times = [took for took, _, _ in rows]
    failed = sum(outcome == "failed" for _, outcome, _ in rows)
    different = sum(outcome == "different" for _, outcome, _ in rows)
    print(f"{phase:12} {len(rows):7} {failed:6} {different:9} {statistics.median(times):10.0f} {max(times):10}")
    bad |= bool(failed or different)
    if phase in ("healed", "quick", "awake", "restarted") and statistics.median(times) > 2 * usual + 100:
        print(f"{phase}: latency did not come back")
        bad = True
sys.exit(bad)
PYTHON

[ "$failed" = 0 ] && say "all is well"
exit "$failed"
