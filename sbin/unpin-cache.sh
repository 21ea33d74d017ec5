#!/usr/bin/env bash
# Undoes pin-cache.sh.
#
# Inputs: workers by id or host, else all; flags as in `stoa unpin --help`.
# Falls back: a worker that does not run is told at its next start.
set -euo pipefail
# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
run_stoa unpin "$@"
