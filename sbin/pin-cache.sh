#!/usr/bin/env bash
# Locks the workers' caches in memory (mlock by the worker itself), so that they are never swapped.
#
# Inputs: workers by id or host, else all; flags as in `stoa pin --help`. The workers need the
#         right to lock that much (ulimit -l, or LimitMEMLOCK= of systemd).
# Falls back: a worker that does not run is told at its next start.
set -euo pipefail
# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
run_stoa pin "$@"
