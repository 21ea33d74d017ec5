#!/usr/bin/env bash
# Stops what start-stoa.sh started: the workers, then the coordinator. The cache stays in shared
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
failed=0

# Stops one daemon of this host by name.
stop() {
    local name="$1" file="$run/$1.pid" pid waited=0
    if [ ! -f "$file" ]; then
        return 0
    fi
    pid="$(cat -- "$file")"
    # Process ids are reused: only a stoa is ours to stop.
    if ! kill -0 "$pid" 2>/dev/null || ! grep -aq stoa "/proc/$pid/cmdline" 2>/dev/null; then
        rm -f -- "$file"
        return 0
    fi
    kill -TERM "$pid"
    while kill -0 "$pid" 2>/dev/null; do
        if [ "$waited" -ge "$((patience * 5))" ]; then
            say "error: $name (process $pid) has not ended after $patience s"
            failed=1
            return 0
        fi
        sleep 0.2
        waited=$((waited + 1))
    done
    rm -f -- "$file"
    say "$name stopped"
}

if [ "${STOA_ONLY_WORKER:-}" != "" ]; then
    stop "$STOA_ONLY_WORKER"
    exit "$failed"
fi

number=0
while IFS= read -r line <&3; do
    number=$((number + 1))
    read -r host home <<<"${line%% -- *}"
    if is_local "$host"; then
        stop "worker-$number"
    else
        remote="${home:-$STOA_ROOT}"
        command="STOA_HOME=$(printf %q "$remote") STOA_ONLY_WORKER=worker-$number"
        command+=" $(printf %q "$remote/sbin/stop-stoa.sh")"
        # shellcheck disable=SC2086,SC2029 # options are words; the command is quoted for there
        ssh ${STOA_SSH_OPTS:-} -o BatchMode=yes "$host" "$command" </dev/null || {
            say "error: the worker on $host was not stopped"
            failed=1
        }
    fi
done 3< <(grep -Ev '^[[:space:]]*(#|$)' -- "$workers" || true)

stop coordinator
exit "$failed"
