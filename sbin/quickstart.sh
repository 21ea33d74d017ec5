#!/usr/bin/env bash
# From a fresh clone to a table of cached queries: build, then `stoa demo`.
#
# Needs: Rust 1.94 or newer, a C compiler, protoc with Google's .proto files. What is missing of the
# last two is installed with apt-get where that is possible without asking; otherwise the script says
# what to install, before it builds anything.
# No root, no etcd and no mount are needed to run.
# Inputs: arguments go to `stoa demo` (--scale 0.1, --json, --data DIR, …).
#         CARGO_TARGET_DIR moves the build (it takes about 3 GB).
# Falls back: to what an earlier run built and generated.
set -euo pipefail

# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"
cd -- "$STOA_ROOT"

need_build_tools

binary="${CARGO_TARGET_DIR:-$STOA_ROOT/target}/release/stoa"
if [ ! -x "$binary" ]; then
    cores="$(nproc)"
    # DataFusion in release is about 90 CPU-minutes, most of which spreads over cores.
    minutes=$(((90 + cores - 1) / cores))
    [ "$minutes" -ge 6 ] || minutes=6
    say "building the release binary: about $minutes minutes on $cores cores, once"
fi
# The selection of the whole workspace: another one would unify features differently and compile
# DataFusion again.
cargo build --release --workspace --bin stoa </dev/null >&2

say ""
exec "$binary" demo "$@"
