#!/usr/bin/env bash
# Stops what start-stoa.sh started: the workers, all at once, then the coordinator. The cache stays in shared
# memory and is reused at the next start.
#
# Inputs: STOA_WORKERS, STOA_SSH_OPTS and STOA_RUN as for start-stoa.sh.
#         STOA_STOP_SECONDS is how long a daemon may take to end (30).
# Falls back: what does not run is passed over; what does not end in time is named, not killed.
set -euo pipefail

# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

workers="${STOA_WORKERS:-$STOA_SBIN/workers}"
run="$(run_directory)"
patience="${STOA_STOP_SECONDS:-30}"

# Stops one daemon of this host by name; fails when it does not end in time.
stop() {
    local name="$1" file="$run/$1.pid" pid waited=0
    if [ ! -f "$file" ]; then
        return 0
    fi
    pid="$(cat -- "$file")"
    # Process ids are reused: only a stoa is ours to stop.
    if ! runs "$pid" || ! grep -aq stoa "/proc/$pid/cmdline" 2>/dev/null; then
        rm -f -- "$file"
        return 0
    fi
    kill -TERM "$pid"
    while runs "$pid"; do
        if [ "$waited" -ge "$((patience * 20))" ]; then
            die "$name (process $pid) has not ended after $patience s"
        fi
        sleep 0.05
        waited=$((waited + 1))
    done
    rm -f -- "$file"
    say "$name stopped"
}

if [ "${STOA_ONLY_WORKER:-}" != "" ]; then
    stop "$STOA_ONLY_WORKER"
    exit 0
fi

number=0
stopping=()
while IFS= read -r line <&3; do
    number=$((number + 1))
    read -r host home <<<"${line%% -- *}"
    if is_local "$host"; then
        stop "worker-$number" 3<&- &
    else
        remote="${home:-$STOA_ROOT}"
        command="STOA_HOME=$(printf %q "$remote") STOA_ONLY_WORKER=worker-$number"
        command+=" $(printf %q "$remote/sbin/stop-stoa.sh")"
        # shellcheck disable=SC2086,SC2029 # options are words; the command is quoted for there
        ssh ${STOA_SSH_OPTS:-} -o BatchMode=yes "$host" "$command" </dev/null 3<&- ||
            die "the worker on $host was not stopped" &
    fi
    stopping+=("$!")
done 3< <(grep -Ev '^[[:space:]]*(#|$)' -- "$workers" || true)

failed=0
for job in ${stopping[@]+"${stopping[@]}"}; do
    wait "$job" || failed=1
done
stop coordinator
exit "$failed"
