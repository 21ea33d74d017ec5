#!/usr/bin/env bash
# Whether the scripts of sbin/ prepare a bare machine: a step of sbin/test.sh.
#
# In a bare Debian (bare-root.sh) the functions with which quickstart.sh and test.sh install what
# they need are called as those scripts call them; then every crate is built whose build script runs
# a compiler or protoc, and what the tests start is started. As a user who may install nothing, one
# sentence has to name what to install.
# Inputs: --prove takes each package out of the functions in turn and expects the check to fail: a
#         check that cannot fail proves nothing. FRESH_CACHE, FRESH_SUITE: as for bare-root.sh.
# Takes about two minutes, some more the first time. Ends with 77 where no bare root can be made.
set -euo pipefail

here="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=sbin/common.sh
source "$here/../../sbin/common.sh"

# Lines of what was said, kept until it is known whether they are needed.
log="$(mktemp)"
trap 'rm -f -- "$log"' EXIT

# Runs inside.sh in a root of its own.
inside() {
    local status=0
    "$here/bare-root.sh" "$@" >"$log" 2>&1 </dev/null || status=$?
    [ "$status" -ne 77 ] || {
        cat -- "$log" >&2
        exit 77
    }
    return "$status"
}

failed() {
    tail -n 60 -- "$log" >&2
    die "$*"
}

case "${1:-}" in
"")
    inside ./tests/fresh/inside.sh || failed "a bare machine is not prepared by the scripts' functions"
    tail -n 1 -- "$log" >&2

    if inside --unprivileged bash -c 'source sbin/common.sh && need_build_tools'; then
        failed "a user who may install nothing on a bare machine was told nothing"
    fi
    advice='apt-get install protobuf-compiler libprotobuf-dev build-essential'
    if [ "$(wc -l <"$log")" -ne 1 ] || ! grep -q "$advice" "$log"; then
        failed "a user who may install nothing was not told what to install in one sentence"
    fi
    ;;
--prove)
    for package in protobuf-compiler libprotobuf-dev build-essential etcd-server etcd-client; do
        if inside ./tests/fresh/inside.sh --without "$package"; then
            failed "without $package the check passes"
        fi
        say "without $package: $(tail -n 1 -- "$log")"
    done
    # The build has to notice by itself too, should the scripts ever look less closely.
    for package in libprotobuf-dev build-essential; do
        if inside ./tests/fresh/inside.sh --without "$package" --unseen; then
            failed "without $package, and the scripts not looking, the build passes"
        fi
        say "without $package, unseen: $(grep -m 1 -i 'not found\|No such file' "$log" || tail -n 1 -- "$log")"
    done
    ;;
-h | --help) sed -n '2,/^set /{s/^# \{0,1\}//;/^set /!p}' "${BASH_SOURCE[0]}" ;;
*) die "unknown argument $1; expected --prove" ;;
esac
