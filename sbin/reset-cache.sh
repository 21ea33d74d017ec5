#!/usr/bin/env bash
# Forgets layouts, plans, requests and pins; with --files, frees this host's shared memory too.
# Stop the workers first (stop-stoa.sh). No Parquet file is touched.
#
# Inputs: --files; --yes does not ask; flags as in `stoa reset --help`.
# Falls back: without etcd it resets the embedded state.
set -euo pipefail
# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
run_stoa reset "$@"
