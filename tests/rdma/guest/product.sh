# In each of two guests with a wire between them: the product. Guest 1 has etcd, the object store, a
# coordinator and a worker; guest 2 has a worker with the other share, and asks. The programs stoa,
# stoa-s3 and etcd are in PATH, beside product.tar: Parquet files, certificates, queries, and the
# answers that stock DataFusion gives over the files.
# shellcheck shell=dash disable=SC2015,SC2153,SC2317 # conditions in rows, functions called by name

one=10.9.0.1
here="10.9.0.$NODE"
work=/tmp/product
log=/tmp/log
status=0

now() { cut -d . -f 1 /proc/uptime; }
say() { echo "product: $*"; }
wrong() {
    say "WRONG: $*"
    status=1
}
# Tells guest 1 that this is over, and ends.
finish() {
    [ "$NODE" = 1 ] || echo over | nc -w 10 "$one" 9999 || true
    exit "$1"
}
die() {
    say "$*"
    for file in "$log"/*; do
        echo "-- ${file##*/}"
        tail -n 20 "$file"
    done
    finish 1
}
# within SECONDS WHAT COMMAND...: tries until it succeeds.
within() {
    local limit=$(($(now) + $1)) what="$2"
    shift 2
    until "$@"; do
        [ "$(now)" -lt "$limit" ] || die "not in time: $what"
        sleep 1
    done
}
daemon() {
    local name="$1"
    shift
    "$@" >>"$log/$name" 2>&1 </dev/null &
}
# get HOST PORT PATH: what is there over HTTP, once it answers. The guests' wget crashes for want of a
# name service.
get() {
    local tries=0
    while [ "$tries" -lt 10 ]; do
        tries=$((tries + 1))
        # Servers forget who closes his end before they have answered.
        { printf 'GET %s HTTP/1.0\r\nHost: %s\r\n\r\n' "$3" "$1"; sleep 2; } |
            nc -w 10 "$1" "$2" 2>/dev/null | tr -d '\r' | sed '1,/^$/d' >/tmp/got
        [ -s /tmp/got ] && cat /tmp/got && return
    done
    return 1
}
answers() { get "$@" >/dev/null; }

rxe-up 0 || exit 1
mkdir -p "$work" "$log"
tar -xf /test/product.tar -C "$work" || exit 1
rm /test/product.tar
cat >/tmp/stoa.toml <<TOML
cache.location = "/dev/shm/stoa"
cache.size = "64MiB"
cache.freshness = "snapshot"
cache.remote.deadline = "60s"
state.location = "/tmp/state"
worker.id = "guest-$NODE"
worker.host = "$here"
etcd.hosts = "$one:2379"
etcd.timeout = "60s"
heartbeat.lease.ttl.seconds = 60
coordinator.grace.seconds = 600
control.address = "$here:7410"
control.insecure = true
http.address = "$here:7430"
transfer.address = "$here:7420"
transfer.deadline = "60s"
transfer.tls.ca = "$work/ca.pem"
transfer.tls.cert = "$work/guest-$NODE.pem"
transfer.tls.key = "$work/guest-$NODE.key"
transfer.rdma.enabled = true

[store."s3://tpch"]
endpoint = "http://$one:9000"
region = "us-east-1"
allow_http = true
TOML
export STOA_CONFIG=/tmp/stoa.toml AWS_ACCESS_KEY_ID=stoa-test AWS_SECRET_ACCESS_KEY=stoa-test-secret

if [ "$NODE" = 1 ]; then
    daemon etcd etcd --data-dir /tmp/etcd --unsafe-no-fsync --log-level error \
        --heartbeat-interval 1000 --election-timeout 20000 \
        --listen-client-urls "http://$one:2379" --advertise-client-urls "http://$one:2379" \
        --listen-peer-urls http://127.0.0.1:2380
    daemon store stoa-s3 --root "$work/s3" --host "$one" --port 9000
    within 120 "etcd answers" answers "$one" 2379 /health
    # Both are daemons of one host: its addresses are the worker's.
    daemon coordinator stoa coordinator --set "control.address=$one:7411" \
        --set "http.address=$one:7431"
    daemon worker stoa worker
    # Until the other guest is done with it.
    nc -l -p 9999 </dev/null >/dev/null
    grep -h -E 'WARN|ERROR|RDMA' "$log/worker"
    exit 0
fi

within 240 "etcd answers" answers "$one" 2379 /health
within 240 "the object store answers" answers "$one" 9000 /_stoa/counts
daemon worker stoa worker
both() {
    stoa status --json >/tmp/status 2>>"$log/status" && grep -q guest-1 /tmp/status &&
        grep -q guest-2 /tmp/status
}
within 300 "both workers are registered" both
say "both workers run after $(now) s"

for table in lineitem orders customer; do
    stoa layout create "tpch.$table" --location "s3://tpch/$table/" >>"$log/layout" 2>&1 ||
        die "no layout of $table"
done
timeout 900 stoa load tpch.lineitem:1 tpch.orders:1 tpch.customer:1 >>"$log/load" 2>&1 ||
    die "the tables are not loaded"
say "the tables are loaded after $(now) s"

# A copy of what one of them has, on both: each takes what it lacks from the other one.
peer_bytes() {
    get "10.9.0.$1" 7430 /metrics |
        sed -n "s/^stoa_worker_peer_fetched_bytes_total{transport=\"$2\"} \([0-9]*\).*/\1/p"
}
stoa layout create tpch.customer --location s3://tpch/customer/ --replicas all \
    >>"$log/layout" 2>&1 || die "no second layout of customer"
timeout 900 stoa load tpch.customer:2 >>"$log/load" 2>&1 || die "there are no copies"
for node in 1 2; do
    over_rdma="$(peer_bytes "$node" rdma)" over_tcp="$(peer_bytes "$node" tcp)"
    say "guest $node took $over_rdma bytes of copies over RDMA, $over_tcp over TCP"
    [ "${over_rdma:-0}" -gt 0 ] && [ "$over_tcp" = 0 ] || wrong "copies did not come over RDMA"
done

# sum COUNTER FILE: of all scans of an analysed plan.
sum() { grep -o "stoa_$1=[0-9]*" "$2" | awk -F= '{ all += $2 } END { print all + 0 }'; }
# script NUMBER: the query, a line to know its end by, and how its chunks came.
script() {
    local query
    query="$(cat "$work/queries/q$1.sql")"
    printf '%s;\nselect 1 as end_of_answer;\nexplain analyze %s;\nselect 1 as end_of_plan;\n' \
        "$query" "$query"
}
# judge NUMBER FILE: takes the answer and the plan out of what was printed. Sets memory, rdma, tcp,
# origin.
judge() {
    sed '/^end_of_answer/,$d' "$2" | LC_ALL=C sort >/tmp/answer
    cmp -s /tmp/answer "$work/answers/q$1" || {
        wrong "query $1 differs: $(diff /tmp/answer "$work/answers/q$1" | head -n 10)"
        tail -n 5 "$log/sql"
    }
    memory="$(sum shared_memory_chunks "$2")" origin="$(sum origin_chunks "$2")"
    rdma="$(sum remote_rdma_chunks "$2")" tcp="$(sum remote_tcp_chunks "$2")"
    counts="$memory chunks from memory, $rdma over RDMA, $tcp over TCP, $origin from the origin"
}
in_schema="set datafusion.catalog.default_schema = 'tpch';"
ask() {
    { echo "$in_schema"; script "$1"; } >/tmp/query
    stoa sql -q --format csv -f /tmp/query >/tmp/asked 2>>"$log/sql" || {
        tail -n 20 "$log/sql"
        wrong "query $1 fails"
    }
    judge "$1" /tmp/asked
}
queries="$(cd "$work/queries" && echo q*.sql | sed 's/q\([0-9]*\)\.sql/\1/g')"

# The directories follow what was published within seconds.
hot() {
    for number in $queries; do
        ask "$number"
        [ "$origin" = 0 ] || return 1
    done
}
within 300 "nothing comes from the origin" hot
before="$(get "$one" 9000 /_stoa/counts)"
for number in $queries; do
    began="$(now)"
    ask "$number"
    say "query $number in a process of its own, $(($(now) - began)) s: $counts"
    [ "$memory" -gt 0 ] || wrong "this worker has no share"
    [ "$rdma" -gt 0 ] && [ "$tcp" = 0 ] && [ "$origin" = 0 ] || wrong "not over RDMA"
done
after="$(get "$one" 9000 /_stoa/counts)"
[ "$before" = "$after" ] || wrong "the object store was asked: $before, then $after"
stoa peers

# One process from before the device is gone until after it.
mkfifo /tmp/prompt
stoa sql -q --format csv -f /tmp/prompt >/tmp/said 2>>"$log/sql" &
process=$!
exec 3>/tmp/prompt
echo "$in_schema" >&3
said() { [ "$(grep -c '^end_of_plan' /tmp/said)" -ge "$asked" ] || ! kill -0 "$process"; }
ended() { ! kill -0 "$1" 2>/dev/null; }
asked=0
ask_process() {
    asked=$((asked + 1))
    from="$(wc -c </tmp/said)"
    script "$1" >&3
    within 300 "the process answers query $1" said
    tail -c "+$((from + 1))" /tmp/said >/tmp/asked
    judge "$1" /tmp/asked
}
# The first query's number; all have it.
first="${queries%% *}"
ask_process "$first"
say "query $first in the process: $counts"
[ "$rdma" -gt 0 ] && [ "$tcp" = 0 ] && [ "$origin" = 0 ] || wrong "not over RDMA"

# The kernel may wait for those who have the device open, so nobody waits for it.
rdma link delete rxe0 3>&- &
deletion=$!
began="$(now)"
over_tcp() {
    ask_process "$first"
    say "query $first, $(($(now) - began)) s after the device went: $counts"
    [ "$rdma" = 0 ] && [ "$tcp" -gt 0 ] && [ "$origin" = 0 ]
}
within 120 "queries go on over TCP" over_tcp
for number in $queries; do
    ask_process "$number"
    say "query $number in the process, without the device: $counts"
    [ "$rdma" = 0 ] && [ "$tcp" -gt 0 ] && [ "$origin" = 0 ] || wrong "not over TCP"
done
exec 3>&-
within 60 "the process of queries ends" ended "$process"
wait "$process" || wrong "the process of queries ended with $?"
ask "$first"
say "query $first in a new process, without the device: $counts"
[ "$rdma" = 0 ] && [ "$tcp" -gt 0 ] && [ "$origin" = 0 ] || wrong "not over TCP"

# The device is back on the same wire: the worker serves through it, and queries use it. Its name
# and its wire are free once the worker has closed the old one, which it can beside another device.
rxe-up 1 || wrong "no device on the other wire"
within 60 "the removal is over" ended "$deletion"
rdma link add rxe0 type rxe netdev eth0 || wrong "the device does not come back"
over_rdma() {
    ask "$first"
    say "query $first in a new process, the device being back: $counts"
    [ "$rdma" -gt 0 ] && [ "$tcp" = 0 ] && [ "$origin" = 0 ]
}
within 120 "queries take the device that is back" over_rdma
serves_again() { grep -q 'segments can be read over RDMA again' "$log/worker"; }
within 60 "the worker serves through the device that is back" serves_again
grep -h -E 'WARN|ERROR|RDMA' "$log/worker" "$log/sql" | sort | uniq -c | sort -rn | head -n 20
[ "$status" = 0 ] || die "not all was right"
finish 0
