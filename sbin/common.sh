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
    as_root true || return 1
    say "installing $*"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@" \
        </dev/null >&2 && return 0
    # The package lists of a fresh image are empty.
    as_root env DEBIAN_FRONTEND=noninteractive apt-get update </dev/null >&2 &&
        as_root env DEBIAN_FRONTEND=noninteractive \
            apt-get install -y --no-install-recommends "$@" </dev/null >&2
}

# Whether the protoc that build scripts will run (they heed PROTOC and PROTOC_INCLUDE) compiles what
# they compile: it finds Google's own .proto files, which Debian packs apart from it. What it said
# otherwise is printed.
try_protoc() {
    local probe
    probe="$(mktemp -d)"
    printf '%s\n' 'syntax = "proto3"; import "google/protobuf/descriptor.proto";' \
        'message Probe { optional google.protobuf.FileDescriptorSet files = 1; }' >"$probe/probe.proto"
    local result=0
    "${PROTOC:-protoc}" --include_imports -o "$probe/probe.bin" -I "$probe" \
        ${PROTOC_INCLUDE:+-I "$PROTOC_INCLUDE"} "$probe/probe.proto" 2>&1 || result=1
    rm -rf -- "$probe"
    return "$result"
}

# Whether a C program compiles and links, and an archive can be made of it, as build scripts and
# rustc do. A compiler may be there without the headers and start files of the C library. What was
# said otherwise is printed.
try_cc() {
    local probe result=0
    probe="$(mktemp -d)"
    printf '%s\n' '#include <stdlib.h>' '#include <pthread.h>' \
        'int main(void) { return EXIT_SUCCESS; }' >"$probe/probe.c"
    {
        "${CC:-cc}" -c -o "$probe/probe.o" "$probe/probe.c" &&
            cc -o "$probe/probe" "$probe/probe.o" -lm -lpthread &&
            "${AR:-ar}" rc "$probe/probe.a" "$probe/probe.o"
    } 2>&1 || result=1
    rm -rf -- "$probe"
    return "$result"
}

# Makes sure that the build's tools are there, before minutes are spent on compiling: protoc with
# Google's .proto files (etcd-client and our own control protocol), a C compiler that links (zstd,
# mimalloc, aws-lc, and every Rust program), and Rust. No build script that we depend on runs cmake,
# pkg-config or perl where those are missing.
need_build_tools() {
    local packages=() lacks=()
    if ! try_protoc >/dev/null; then
        packages+=(protobuf-compiler libprotobuf-dev)
        lacks+=("protoc with google/protobuf/descriptor.proto")
    fi
    if ! try_cc >/dev/null; then
        packages+=(build-essential)
        lacks+=("a C compiler that links")
    fi
    if [ "${#packages[@]}" -gt 0 ]; then
        local list
        printf -v list '%s and ' "${lacks[@]}"
        install_packages "${packages[@]}" ||
            die "the build needs ${list% and }; install it (Debian, Ubuntu: apt-get install ${packages[*]})"
        local said
        said="$(try_protoc)" ||
            die "${PROTOC:-protoc} does not compile what imports google/protobuf/descriptor.proto:" \
                "${said:-it says nothing}; set PROTOC to one that does, or PROTOC_INCLUDE to the folder that" \
                "google/ lies in (/usr/include with Debian's libprotobuf-dev)"
        said="$(try_cc)" ||
            die "${CC:-cc} does not compile and link a C program: ${said:-it says nothing};" \
                "set CC and AR to ones that work"
    fi
    if ! command -v cargo >/dev/null 2>&1 && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
        PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
    fi
    local needed found
    needed="$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$STOA_ROOT/Cargo.toml")"
    command -v cargo >/dev/null 2>&1 ||
        die "Rust is missing; install it from https://rustup.rs ($needed or newer)"
    found="$(cargo --version 2>&1)" ||
        die "cargo does not run ($found); install Rust $needed or newer (rustup default stable)"
    found="$(rustc --version 2>&1)" ||
        die "rustc does not run ($found); install Rust $needed or newer (rustup default stable)"
    # "rustc 1.95.0 (59807616e 2026-04-14)"
    found="${found#rustc }"
    found="${found%%[ -]*}"
    [ "$(printf '%s\n%s\n' "$needed" "$found" | sort -V | head -n 1)" = "$needed" ] ||
        die "Rust $found is too old, $needed or newer is needed; bring it up to date (rustup update stable)"
}

# Makes sure that what the tests need beside the build's tools is there: etcd and its client.
need_test_tools() {
    local packages=()
    command -v etcd >/dev/null 2>&1 || packages+=(etcd-server)
    command -v etcdctl >/dev/null 2>&1 || packages+=(etcd-client)
    # Debian starts an etcd of its own when the package is installed; the tests do not need it.
    [ "${#packages[@]}" -eq 0 ] || install_packages "${packages[@]}" ||
        die "the tests need etcd; install it (Debian, Ubuntu: apt-get install ${packages[*]})"
}

# Whether a process runs; one that has ended counts as gone, also while nobody has asked for its
# exit code (the init of a container may be slow to).
runs() {
    kill -0 "$1" 2>/dev/null && ! grep -q '^State:[[:space:]]*Z' "/proc/$1/status" 2>/dev/null
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
