#!/usr/bin/env bash
# Tests transfers and the product over RDMA without a device: in virtual machines with soft-RoCE, under emulation.
#
# One guest runs the conformance suite and every fault with one device for both ends; then one of two
# guests reads the other one's memory over two wires; then the product runs in two guests: workers
# that hold a share each, and queries whose chunks come over RDMA until a device is removed, and over
# TCP from then on. 120 MB are downloaded the first time. Needs no root where QEMU, Rust and the
# headers of libibverbs and librdmacm are installed; what is missing of these is installed where
# that is possible without asking. The product needs etcd and openssl as well.
# Inputs: nothing runs everything; `suite`, `pair` or `product` one of the three; `guest SCRIPT
#         FILE...` and `guests SCRIPT FILE...` a script of one's own in one guest or two.
#         CARGO_TARGET_DIR moves the build. vm.sh names the variables of the guests.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=sbin/common.sh
source "$here/../../sbin/common.sh"
# shellcheck source=tests/rdma/vm.sh
source "$here/vm.sh"

# What building with the feature takes.
need_rdma_headers() {
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
    mkdir -p -- "$VM_CACHE"
}

# Builds the crate's tests with RDMA and leaves the program's path in TESTS.
build_tests() {
    local program
    need_rdma_headers
    # Nothing else compiles this feature.
    say "linting and building transfers with RDMA"
    (cd -- "$STOA_ROOT" && cargo clippy -p stoa-transfer --features rdma --all-targets --locked -- \
        -D warnings </dev/null)
    program="$(cd -- "$STOA_ROOT" && cargo test -p stoa-transfer --features rdma --lib --no-run \
        --locked --message-format json </dev/null |
        sed -n 's/.*"executable":"\([^"]*\)".*/\1/p' | tail -n 1)"
    [ -n "$program" ] || die "the tests of stoa-transfer were not built"
    TESTS="$VM_CACHE/transfer-tests"
    # Debug information would only make the guests larger.
    strip -o "$TESTS" "$program"
    # What needs no device.
    (cd -- "$STOA_ROOT/transfer" && "$program" rdma::)
}

# Builds the product with RDMA, and leaves the paths of what its guests need in PRODUCT.
build_product() {
    local target="${CARGO_TARGET_DIR:-$STOA_ROOT/target}/debug" missing=() place="$VM_CACHE/product"
    need_rdma_headers
    command -v etcd >/dev/null 2>&1 || missing+=(etcd-server)
    command -v openssl >/dev/null 2>&1 || missing+=(openssl)
    if [ "${#missing[@]}" -gt 0 ]; then
        install_packages "${missing[@]}" ||
            die "the product in two guests needs ${missing[*]}; install it (apt-get install \
${missing[*]})"
    fi
    say "linting and building the product with RDMA"
    (cd -- "$STOA_ROOT" &&
        cargo clippy --workspace --all-targets --features stoa-cli/rdma --locked -- -D warnings \
            </dev/null &&
        cargo build --workspace --bin stoa --bin stoa-s3 --features stoa-cli/rdma --locked \
            </dev/null)
    rm -rf -- "$place"
    mkdir -p -- "$place/guest"/{s3/tpch,queries,answers}
    strip -o "$place/stoa" "$target/stoa"
    strip -o "$place/stoa-s3" "$target/stoa-s3"
    product_data "$place" || die "the data of the product's guests could not be made"
    product_certificates "$place/guest"
    tar -cf "$place/product.tar" -C "$place/guest" .
    PRODUCT=("$place/stoa" "$place/stoa-s3" "$(command -v etcd)" "$place/product.tar")
}

# product_data PLACE: a little TPC-H, some of its queries, and what stock DataFusion answers, the
# rows sorted. Every query reads lineitem.
product_data() (
    place="$1" memory="$(mktemp -d /dev/shm/stoa-rdma.XXXXXX)"
    # The counters of a cache lie beside its directory, under a name that only stoa knows.
    trap '"${alone[@]}" reset --files --yes >/dev/null 2>&1; rm -rf -- "$memory"' EXIT
    unset STOA_CONFIG
    alone=("$place/stoa" --set "cache.location=$memory/cache" --set "state.location=$place/state")
    "${alone[@]}" demo --scale 0.002 --data "$place/tpch" --queries 6 --iterations 1 >/dev/null ||
        return
    for table in lineitem orders customer; do
        cp -r -- "$place"/tpch/*/"$table" "$place/guest/s3/tpch/" || return
    done
    for number in 01 03 06 12; do
        # Without the last semicolon: it becomes a part of other statements.
        sed '$s/;$//' "$STOA_ROOT/cli/queries/q$number.sql" >"$place/guest/queries/q$number.sql"
        {
            for table in lineitem orders customer; do
                printf "create external table %s stored as parquet location '%s/';\n" "$table" \
                    "$place/guest/s3/tpch/$table"
            done
            cat "$place/guest/queries/q$number.sql"
            printf ';\n'
        } >"$place/stock.sql"
        "${alone[@]}" --set cache.enabled=false sql -q --format csv -f "$place/stock.sql" |
            LC_ALL=C sort >"$place/guest/answers/q$number" || return
    done
)

# product_certificates PLACE: one authority, and a certificate of a node for each guest.
product_certificates() (
    cd -- "$1" || exit
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=authority \
        -keyout ca.key -out ca.pem 2>/dev/null
    for node in 1 2; do
        openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj "/CN=guest-$node" \
            -keyout "guest-$node.key" -out guest.csr 2>/dev/null
        printf '%s\n' "subjectAltName=IP:10.9.0.$node,URI:stoa://role/node" \
            extendedKeyUsage=serverAuth,clientAuth basicConstraints=CA:FALSE >guest.ext
        openssl x509 -req -in guest.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 \
            -extfile guest.ext -out "guest-$node.pem" 2>/dev/null
    done
    rm -f -- ca.key guest.csr guest.ext
)

suite() {
    say "== one guest, one device"
    vm_run "$here/guest/suite.sh" "$TESTS"
}

pair() {
    say "== two guests"
    vm_run_pair "$here/guest/pair.sh" "$TESTS"
}

# Programs without optimisation, under emulation: they are given room and time.
product() {
    say "== the product in two guests"
    STOA_RDMA_MEMORY="${STOA_RDMA_MEMORY:-2048}"
    VM_TIMEOUT="${STOA_RDMA_TIMEOUT:-2400}"
    vm_run_pair "$here/guest/product.sh" "${PRODUCT[@]}"
}

case "${1:-}" in
"")
    build_tests
    build_product
    vm_prepare
    suite
    pair
    product
    say "RDMA: all passed in $SECONDS s"
    ;;
suite | pair) build_tests; vm_prepare; "$1" ;;
product) build_product; vm_prepare; product ;;
guest) vm_prepare; shift; vm_run "$@" ;;
guests) vm_prepare; shift; vm_run_pair "$@" ;;
*) die "unknown argument $1; expected nothing, suite, pair, product, guest or guests" ;;
esac
