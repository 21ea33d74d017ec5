# What the scripts beside this one share; source it, do not run it.
#
# Where the `stoa` binary is found, the first that exists: $STOA_BIN; $STOA_HOME/bin/stoa;
# bin/stoa beside sbin/ (an installed tree); the release build in $CARGO_TARGET_DIR or target/;
# `stoa` in PATH.
# shellcheck shell=bash

STOA_SBIN="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
STOA_ROOT="$(dirname -- "$STOA_SBIN")"

say() {
    printf '%s\n' "$*" >&2
}

die() {
    say "error: $*"
    exit 1
}

# Prints the path of the stoa binary.
stoa_binary() {
    local candidate
    for candidate in \
        "${STOA_BIN:-}" \
        "${STOA_HOME:+$STOA_HOME/bin/stoa}" \
        "$STOA_ROOT/bin/stoa" \
        "${CARGO_TARGET_DIR:+$CARGO_TARGET_DIR/release/stoa}" \
        "$STOA_ROOT/target/release/stoa"; do
        if [ -n "$candidate" ] && [ -x "$candidate" ]; then
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    command -v stoa || die "no stoa binary found; build it with sbin/quickstart.sh, or set STOA_BIN"
}

# Runs stoa in place of this script.
run_stoa() {
    local binary
    binary="$(stoa_binary)"
    exec "$binary" "$@"
}

# Runs a command as root: directly, or through sudo when that asks for no password.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

# Installs Debian packages if that is possible without asking; otherwise fails.
install_packages() {
    command -v apt-get >/dev/null 2>&1 || return 1
    say "installing $*"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" \
        </dev/null >&2 && return 0
    # The package lists of a fresh image are empty.
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update </dev/null >&2 &&
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y --no-install-recommends "$@" </dev/null >&2
}

# Makes sure that the build's tools are there: protoc (etcd-client and our own control protocol),
# a C compiler and linker (zstd, mimalloc), and Rust.
need_build_tools() {
    if ! command -v protoc >/dev/null 2>&1; then
        install_packages protobuf-compiler ||
            die "protoc is missing; install it (Debian, Ubuntu: apt-get install protobuf-compiler)"
    fi
    if ! command -v cc >/dev/null 2>&1; then
        install_packages build-essential ||
            die "a C compiler is missing; install it (Debian, Ubuntu: apt-get install build-essential)"
    fi
    if ! command -v cargo >/dev/null 2>&1; then
        if [ -x "$HOME/.cargo/bin/cargo" ]; then
            PATH="$HOME/.cargo/bin:$PATH"
        else
            die "Rust is missing; install it from https://rustup.rs (1.94 or newer)"
        fi
    fi
}

# Whether a host of the workers file is this one.
is_local() {
    case "$1" in
    localhost | 127.0.0.1 | ::1 | "$(hostname 2>/dev/null || cat /proc/sys/kernel/hostname)") return 0 ;;
    esac
    return 1
}

# Where daemons keep their process ids and logs on this host.
run_directory() {
    local directory="${STOA_RUN:-${XDG_STATE_HOME:-${HOME:-/var/tmp}/.local/state}/stoa/run}"
    mkdir -p -- "$directory"
    printf '%s\n' "$directory"
}
