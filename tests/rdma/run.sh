#!/usr/bin/env bash
# Runs the tests of transfers over RDMA in virtual machines with a soft-RoCE device.
#
# Inputs: nothing, or `guest SCRIPT FILE...` and `pair SCRIPT FILE...` to run a script of one's own
#         in one guest or in two. vm.sh names the variables that matter.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=sbin/common.sh
source "$here/../../sbin/common.sh"
# shellcheck source=tests/rdma/vm.sh
source "$here/vm.sh"

case "${1:-}" in
guest) vm_prepare; shift; vm_run "$@"; exit ;;
pair) vm_prepare; shift; vm_run_pair "$@"; exit ;;
esac
