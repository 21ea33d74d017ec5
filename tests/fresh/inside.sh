#!/usr/bin/env bash
# What run.sh does in the bare root; not meant to be run elsewhere, since it installs packages.
#
# Inputs: --without PACKAGE leaves a package out of what the functions install;
#         --unseen makes the functions look no closer than whether there is a protoc.
set -euo pipefail

# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../../sbin/common.sh"
cd -- "$STOA_ROOT"

without=
while [ "$#" -gt 0 ]; do
    case "$1" in
    --without) without="$2" && shift ;;
    --unseen)
        try_protoc() { command -v protoc; }
        try_cc() { [ "$without" = build-essential ] || command -v cc; }
        ;;
    *) die "unknown argument $1" ;;
    esac
    shift
done
if [ -n "$without" ]; then
    # A package that another one brings along would otherwise hide that it is missing from the list.
    eval "$(declare -f install_packages | sed '1s/install_packages/install_all_packages/')"
    install_packages() {
        local package packages=()
        for package in "$@"; do [ "$package" = "$without" ] || packages+=("$package"); done
        [ "${#packages[@]}" -eq 0 ] || install_all_packages "${packages[@]}"
    }
fi

need_build_tools
need_test_tools
etcd --version
etcdctl version

# Crates of which the build script uses a crate that runs a tool.
crates=()
for tool in cc cmake pkg-config bindgen prost-build tonic-prost-build; do
    found="$(cargo tree --workspace --locked -e normal,build -i "$tool" --depth 1 --prefix none 2>/dev/null || true)"
    while read -r name version _; do
        case "$version" in v[0-9]*) ;; *) continue ;; esac
        case "$name" in cc | cmake | pkg-config | bindgen | prost-build | tonic-prost-build) continue ;; esac
        crates+=("$name@${version#v}")
    done <<<"$found"
done
mapfile -t crates < <(printf '%s\n' "${crates[@]}" | sort -u)
case "${crates[*]}" in
*etcd-client@*stoa-control@*zstd-sys@*) ;;
*) die "the crates whose build scripts run tools were not found, only: ${crates[*]}" ;;
esac

# Cargo runs a build script once for a target directory that outlives the root: those that take
# seconds are made to run again.
again=()
for crate in "${crates[@]}"; do
    case "$crate" in aws-lc-sys@*) ;; *) again+=(-p "${crate%@*}") ;; esac
done
cargo clean --locked "${again[@]}"
# Apart: with a member of the workspace named, cargo knows the dependencies of that one only.
members=() others=()
for crate in "${crates[@]}"; do
    case "$crate" in stoa-*) members+=(-p "$crate") ;; *) others+=(-p "$crate") ;; esac
done
cargo build --locked "${others[@]}"
cargo build --locked "${members[@]}"
echo "built on a bare machine: ${crates[*]}"
