#!/usr/bin/env bash
# Tests transfers over RDMA without a device: in virtual machines with soft-RoCE, under emulation.
#
# One guest runs the conformance suite and every fault with one device for both ends; then one of two
# guests reads the other one's memory over two wires. The guests take about two minutes, building one
# crate before two more; 120 MB are downloaded the first time. Needs no root where QEMU, Rust and the
# headers of libibverbs and librdmacm are installed; what is missing of these is installed where
# that is possible without asking.
# Inputs: nothing runs everything; `suite` or `pair` one of the two; `guest SCRIPT FILE...` and
#         `guests SCRIPT FILE...` a script of one's own in one guest or two. CARGO_TARGET_DIR moves
#         the build. vm.sh names the variables of the guests.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=sbin/common.sh
source "$here/../../sbin/common.sh"
# shellcheck source=tests/rdma/vm.sh
source "$here/vm.sh"

# Builds the crate's tests with RDMA and leaves the program's path in TESTS.
build_tests() {
    need_build_tools
    local missing=()
    [ -e /usr/include/infiniband/verbs.h ] || missing+=(libibverbs-dev)
    [ -e /usr/include/rdma/rdma_cma.h ] || missing+=(librdmacm-dev)
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null || missing+=(libclang-dev)
    command -v pkg-config >/dev/null 2>&1 || missing+=(pkg-config)
    if [ "${#missing[@]}" -gt 0 ]; then
        install_packages "${missing[@]}" ||
            die "building with RDMA needs ${missing[*]}; install it (apt-get install ${missing[*]})"
    fi
    local program
    # Nothing else compiles this feature.
    say "linting and building transfers with RDMA"
    (cd -- "$STOA_ROOT" && cargo clippy -p stoa-transfer --features rdma --all-targets --locked -- \
        -D warnings </dev/null)
    program="$(cd -- "$STOA_ROOT" && cargo test -p stoa-transfer --features rdma --lib --no-run \
        --locked --message-format json </dev/null |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)"
    [ -n "$program" ] || die "the tests of stoa-transfer were not built"
    mkdir -p -- "$VM_CACHE"
    TESTS="$VM_CACHE/transfer-tests"
    # Debug information would only make the guests larger.
    strip -o "$TESTS" "$program"
    # What needs no device.
    (cd -- "$STOA_ROOT/transfer" && "$program" rdma::)
}

suite() {
    say "== one guest, one device"
    vm_run "$here/guest/suite.sh" "$TESTS"
}

pair() {
    say "== two guests"
    vm_run_pair "$here/guest/pair.sh" "$TESTS"
}

case "${1:-}" in
"") build_tests; vm_prepare; suite; pair; say "RDMA: all passed in $SECONDS s" ;;
suite | pair) build_tests; vm_prepare; "$1" ;;
guest) vm_prepare; shift; vm_run "$@" ;;
guests) vm_prepare; shift; vm_run_pair "$@" ;;
*) die "unknown argument $1; expected nothing, suite, pair, guest or guests" ;;
esac
