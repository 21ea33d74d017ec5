#!/usr/bin/env bash
# Starts a coordinator on this host and a worker on every host of the workers file, all at once.
#
# Inputs: arguments go to every daemon (--etcd node1,node2, --config stoa.toml, --set …).
#         STOA_WORKERS names the workers file; else sbin/workers. Its lines are
#             host [STOA_HOME] [-- further arguments of this worker]
#         Local hosts are started directly, others by ssh (STOA_SSH_OPTS goes to it), where
#         STOA_HOME is the directory of the installation, with sbin/ and bin/stoa.
#         STOA_RUN is where process ids and logs lie; else $XDG_STATE_HOME/stoa/run.
# Falls back: what runs already is left running; what does not start is named, and the others are
# started all the same (exit code 1). Without etcd (neither --etcd nor the
# configuration) use `stoa worker` instead, which is everything in one process.
set -euo pipefail

# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

workers="${STOA_WORKERS:-$STOA_SBIN/workers}"
run="$(run_directory)"
binary="$(stoa_binary)"

# Starts one daemon in the background: name, then its command line.
start() {
    local name="$1" pid
    shift
    if [ -f "$run/$name.pid" ] && runs "$(cat -- "$run/$name.pid")"; then
        say "$name runs already (process $(cat -- "$run/$name.pid"))"
        return 0
    fi
    # A session of its own, so that it outlives this shell and its terminal.
    setsid "$@" </dev/null >>"$run/$name.log" 2>&1 &
    pid=$!
    printf '%s\n' "$pid" >"$run/$name.pid"
    sleep 0.5
    if ! runs "$pid"; then
        rm -f -- "$run/$name.pid"
        tail -n 5 -- "$run/$name.log" >&2
        die "$name ended at once; its log is $run/$name.log"
    fi
    say "$name started (process $pid, log $run/$name.log)"
}

# What a worker's host is asked to run: this script again, for its worker alone.
if [ "${STOA_ONLY_WORKER:-}" != "" ]; then
    start "$STOA_ONLY_WORKER" "$binary" worker "$@"
    exit 0
fi

start coordinator "$binary" coordinator "$@" &
starting=("$!")

number=0
while IFS= read -r line <&3; do
    number=$((number + 1))
    further=()
    if [[ "$line" == *" -- "* ]]; then
        # shellcheck disable=SC2206 # words are meant to be split
        further=(${line#* -- })
        line="${line%% -- *}"
    fi
    read -r host home <<<"$line"
    if is_local "$host"; then
        start "worker-$number" "$binary" worker "$@" "${further[@]}" 3<&- &
    else
        remote="${home:-$STOA_ROOT}"
        command="STOA_HOME=$(printf %q "$remote") STOA_ONLY_WORKER=worker-$number"
        command+=" $(printf %q "$remote/sbin/start-stoa.sh")"
        for argument in "$@" "${further[@]}"; do
            command+=" $(printf %q "$argument")"
        done
        # shellcheck disable=SC2086,SC2029 # options are words; the command is quoted for there
        ssh ${STOA_SSH_OPTS:-} -o BatchMode=yes "$host" "$command" </dev/null 3<&- ||
            die "the worker on $host did not start" &
    fi
    starting+=("$!")
done 3< <(grep -Ev '^[[:space:]]*(#|$)' -- "$workers" || die "no hosts in $workers")

failed=0
for job in "${starting[@]}"; do
    wait "$job" || failed=1
done
"$binary" status "$@" || true
exit "$failed"
