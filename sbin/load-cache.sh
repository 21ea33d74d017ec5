#!/usr/bin/env bash
# Loads layout versions into the cache, and waits with progress until they are there.
#
# Inputs: tables, with or without a version (tpch.lineitem:1); `--no-wait` returns at once; all
#         other flags as in `stoa load --help` (--etcd, --config, --timeout, …).
# Falls back: without etcd this process does the loading itself.
set -euo pipefail
# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
run_stoa load "$@"
