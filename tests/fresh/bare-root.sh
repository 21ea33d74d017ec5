#!/usr/bin/env bash
# Runs a command in a bare Debian 12, as a new user's machine is, over this working tree.
#
#   tests/fresh/bare-root.sh [--unprivileged] [--without-apt] COMMAND…
#   tests/fresh/bare-root.sh ./sbin/quickstart.sh --scale 0.1
#
# The root is made once by mmdebstrap (about a minute, 180 MB) and kept in $FRESH_CACHE (default:
# fresh/ in the build directory); it is unpacked anew for every run, so that nothing is there that an
# earlier run installed. Beside Debian's smallest set and ca-certificates it has only Rust: this
# machine's toolchain, mounted read-only, since the README asks the user to have it. The working tree
# is mounted read-only at /stoa; the build directory is $FRESH_CACHE/target, so that what was built
# once is there the next time; downloads of cargo and apt are kept beside it.
# Inputs: --unprivileged runs the command as a user that may install nothing;
#         --without-apt hides apt-get, as on a machine of another kind;
#         FRESH_SUITE (default bookworm).
# Ends with the command's status, or with 77 where no root can be made (the reason is said): not
# root, no namespaces, no mmdebstrap and none to be had, no network, or Rust that lies in /usr.
# Leaves no mount and no process behind.
set -euo pipefail

# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../sbin/common.sh"

skip() {
    say "no bare root: $*"
    exit 77
}

user=0
hide_apt=
while [ "$#" -gt 0 ]; do
    case "$1" in
    --unprivileged) user=65534 ;;
    --without-apt) hide_apt=yes ;;
    -h | --help)
        sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "${BASH_SOURCE[0]}"
        exit 0
        ;;
    *) break ;;
    esac
    shift
done
[ "$#" -gt 0 ] || die "name the command to run; see --help"

[ "$(id -u)" -eq 0 ] || skip "only root can make one"
rust="$(cd / && rustc --print sysroot)" || skip "rustc does not run"
if [ ! -x "$rust/bin/cargo" ] || [ "$rust" = /usr ]; then
    skip "Rust lies in $rust, in no folder of its own; install it by rustup"
fi
unshare --mount --propagation private --pid --fork --kill-child --mount-proc true 2>/dev/null ||
    skip "namespaces for mounts and processes are needed, and this machine (a container?) has none"
cache="${FRESH_CACHE:-${CARGO_TARGET_DIR:-$STOA_ROOT/target}/fresh}"
mkdir -p -- "$cache/target" "$cache/apt"
cache="$(cd -- "$cache" && pwd)"
suite="${FRESH_SUITE:-bookworm}"

archive="$cache/$suite.tar"
if [ ! -e "$archive" ]; then
    command -v mmdebstrap >/dev/null 2>&1 || install_packages mmdebstrap ||
        skip "mmdebstrap is missing and cannot be installed"
    say "making a bare Debian ($suite), once"
    mmdebstrap --quiet --variant=minbase --format=tar --include=ca-certificates "$suite" \
        "$archive.part" >&2 || {
        rm -f -- "$archive.part"
        skip "mmdebstrap failed; is the network there?"
    }
    mv -- "$archive.part" "$archive"
fi

root="$(mktemp -d "$cache/root.XXXXXX")"
trap 'rm -rf --one-file-system -- "$root"' EXIT
tar -C "$root" -xf "$archive"
# How this machine reaches its package archives and registries: sources, proxies, certificates.
for file in /etc/apt/sources.list.d/debian.sources /etc/apt/apt.conf.d /etc/ssl/certs \
    /usr/local/share/ca-certificates /etc/resolv.conf /etc/hosts; do
    [ -e "$file" ] || continue
    rm -rf -- "${root:?}$file"
    mkdir -p -- "$root$(dirname -- "$file")"
    cp -aL -- "$file" "$root$file"
done
[ ! -e "$root/etc/apt/sources.list.d/debian.sources" ] || rm -f -- "$root/etc/apt/sources.list"
# Downloads stay for the next run; apt's own hook, meant for images, would delete them.
rm -f -- "$root/etc/apt/apt.conf.d/docker-clean"
[ -z "$hide_apt" ] || rm -f -- "$root/usr/bin/apt-get"
mkdir -p -- "$root/stoa" "$root/opt/rust" "$root/opt/cargo" "$root/opt/target" "$root/opt/home"
chmod 1777 "$root/opt/home"
cargo_home="${CARGO_HOME:-$HOME/.cargo}"
mkdir -p -- "$cargo_home/registry" "$root/opt/cargo/registry"

# A mount namespace of its own: every mount ends with the last process in it, and that is the
# command's last, since they share a process namespace too.
# shellcheck disable=SC2016
unshare --mount --propagation private --pid --fork --kill-child --mount-proc bash -euc '
    root="$1" tree="$2" rust="$3" registry="$4" cache="$5" user="$6"; shift 6
    mount -t proc proc "$root/proc"
    mount --rbind /dev "$root/dev"
    mount --bind "$tree" "$root/stoa"
    mount -o remount,ro,bind "$root/stoa"
    mount --bind "$rust" "$root/opt/rust"
    mount -o remount,ro,bind "$root/opt/rust"
    mount --bind "$registry" "$root/opt/cargo/registry"
    mount --bind "$cache/target" "$root/opt/target"
    mount --bind "$cache/apt" "$root/var/cache/apt/archives"
    mkdir -p "$root/var/cache/apt/archives/partial"
    exec chroot --userspec="$user:$user" "$root" /usr/bin/env -i HOME=/opt/home TERM=dumb CI="${CI:-}" \
        CARGO_HOME=/opt/cargo CARGO_TARGET_DIR=/opt/target \
        SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt \
        CARGO_HTTP_CAINFO=/etc/ssl/certs/ca-certificates.crt \
        PATH=/opt/rust/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        bash -euc "cd /stoa && exec \"\$@\"" bash "$@"
' bash "$root" "$STOA_ROOT" "$rust" "$cargo_home/registry" "$cache" "$user" "$@"
