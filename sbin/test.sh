#!/usr/bin/env bash
# Everything that has to pass: formatting, lints, all tests, doctests, documentation.
#
# Installs what the tests need and lack, where that is possible without asking: protobuf-compiler,
# libprotobuf-dev and build-essential to build, etcd-server and etcd-client for the tests of clusters.
# At the end a bare Debian is made, and the functions with which this script and quickstart.sh install
# what they need are tried in it (tests/fresh/run.sh); where none can be made, that is said.
# Inputs: --quick leaves out documentation, doctests, the bare Debian and the slow tests (those named
#         `slow_…`).
#         --rdma runs the tests of transfers and of the product over RDMA instead of everything
#         else: in virtual machines, with builds of their own (tests/rdma/run.sh).
#         --netns runs, instead of everything else, three workers in network namespaces through
#         partitions, deaths and slow links (tests/netns/run.sh, which names its inputs). Needs root.
#         --miri runs, instead of everything else, the tests of the packed container that are small
#         enough in Miri, which sees what `unsafe` blocks do. Needs a nightly toolchain with it.
#         Neither this script without them nor CI runs these three.
#         CARGO_TARGET_DIR moves the build. STOA_TEST_ARGS goes to the test runner.
# Falls back: to `cargo test` where cargo-nextest is missing; spelling and licences are checked
# where `typos` and `cargo-deny` are installed, the feature rdma is linted where libibverbs-dev,
# librdmacm-dev and libclang-dev are.
set -euo pipefail

# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
cd -- "$STOA_ROOT"

quick=false
for argument in "$@"; do
    case "$argument" in
    --quick) quick=true ;;
    --rdma) exec "$STOA_ROOT/tests/rdma/run.sh" ;;
    --netns) exec "$STOA_ROOT/tests/netns/run.sh" ;;
    --miri)
        MIRIFLAGS=-Zmiri-disable-isolation exec cargo +nightly miri nextest run -p stoa-forms --lib \
            -E 'test(every_width) + test(mode_follows) + test(rare_wide) + test(views_of_a_dictionary)
                + test(text_of_every_encoding)'
        ;;
    -h | --help)
        sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) die "unknown argument $argument; expected --quick, --rdma, --netns or --miri" ;;
    esac
done

# Steps that cannot run on this machine.
skipped=()

step() {
    say ""
    say "== $* ($((SECONDS / 60)) min) =="
}

# Every step below builds the whole workspace in the dev profile: one selection of features, so
# that DataFusion is compiled once.
if [ "${CI:-}" = true ]; then
    # Nothing is built twice there, so bookkeeping for it only costs time and space.
    export CARGO_INCREMENTAL="${CARGO_INCREMENTAL:-0}"
fi

need_build_tools
need_test_tools
for component in rustfmt clippy; do
    if ! cargo "${component/rustfmt/fmt}" --version >/dev/null 2>&1; then
        rustup component add "$component" </dev/null >&2 ||
            die "$component is missing; install it (rustup component add $component)"
    fi
done

step "formatting"
cargo fmt --all --check

if command -v typos >/dev/null 2>&1; then
    step "spelling"
    typos
fi
if command -v cargo-deny >/dev/null 2>&1; then
    step "licences and advisories"
    cargo deny check bans licenses sources
fi

step "lints"
cargo clippy --workspace --all-targets --locked -- -D warnings </dev/null

if ! "$quick" && [ -e /usr/include/infiniband/verbs.h ] && [ -e /usr/include/rdma/rdma_cma.h ] &&
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null; then
    # Otherwise nothing would compile it but --rdma.
    step "lints with RDMA"
    cargo clippy --workspace --all-targets --features stoa-cli/rdma --locked -- -D warnings \
        </dev/null
fi

step "building the programs"
# Tests start them as separate processes. Benchmarks are only linted: linking each with DataFusion
# takes minutes.
cargo build --workspace --bins --locked </dev/null

step "tests"
# Words of the runner's arguments are meant to be split.
# shellcheck disable=SC2206
extra=(${STOA_TEST_ARGS:-})
if cargo nextest --version >/dev/null 2>&1; then
    arguments=(--workspace --locked --no-fail-fast)
    if "$quick"; then
        arguments+=(-E 'not test(/slow_/)')
    fi
    cargo nextest run "${arguments[@]}" "${extra[@]}" </dev/null
else
    arguments=(--workspace --locked --no-fail-fast --lib --bins --tests)
    if "$quick"; then
        cargo test "${arguments[@]}" "${extra[@]}" -- --skip slow_ </dev/null
    else
        cargo test "${arguments[@]}" "${extra[@]}" </dev/null
    fi
fi

step "tests that mount a tmpfs"
probe="$(mktemp -d)"
if mount -t tmpfs -o size=64k,mode=0700 stoa-test "$probe" 2>/dev/null; then
    umount "$probe"
    if cargo nextest --version >/dev/null 2>&1; then
        cargo nextest run --workspace --locked --no-fail-fast --run-ignored ignored-only \
            -E 'test(/mounted_/)' </dev/null
    else
        cargo test --workspace --locked --no-fail-fast --lib --tests mounted_ -- --ignored </dev/null
    fi
else
    say "SKIPPED: this user may not mount a tmpfs; root in a container of its own may"
fi
rmdir "$probe"

step "mutants of the shared memory"
# A build of its own: the deliberate faults must not be compiled into anything else.
cargo test -p stoa-tests-shm --features mutants --locked </dev/null

if ! "$quick"; then
    step "doctests"
    cargo test --workspace --doc --locked </dev/null

    step "documentation"
    RUSTDOCFLAGS="${RUSTDOCFLAGS:-} -D warnings" cargo doc --workspace --no-deps --locked </dev/null

    step "a bare machine"
    # 77: no bare root can be made here.
    status=0
    tests/fresh/run.sh || status=$?
    case "$status" in
    0) ;;
    77) skipped+=("a bare machine") ;;
    *) die "the scripts do not prepare a bare machine" ;;
    esac
fi

if [ "${#skipped[@]}" -gt 0 ]; then
    step "all passed but ${skipped[*]}, which was skipped"
else
    step "all passed"
fi
