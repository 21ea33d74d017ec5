#!/usr/bin/env bash
# Mounts a tmpfs of its own for the cache, with huge pages: a first scan has fewer faults.
#
# Needs root. Inputs: the directory and the size, such as
#         sudo sbin/mount-cache.sh /mnt/stoa 64G [owner[:group]]
# The owner (else whoever called sudo) gets the directory with mode 0750: its group may read the
# cache. Then set cache.location to it, cache.size (whose default follows /dev/shm), and
# cache.group.enabled for readers of the group.
# Falls back: to normal pages where the kernel has none; an existing tmpfs there is resized.
set -euo pipefail

# shellcheck source=sbin/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

if [ "$#" -lt 2 ] || [ "$#" -gt 3 ]; then
    die "usage: $0 DIRECTORY SIZE [OWNER[:GROUP]]"
fi
directory="$1"
size="$2"
owner="${3:-${SUDO_USER:-$(id -un)}}"
case "$directory" in
/*) ;;
*) die "$directory is not absolute" ;;
esac
[[ "$size" =~ ^[0-9]+[kKmMgG%]?$ ]] || die "$size is not a size; expected such as 64G or 50%"
[ "$(id -u)" -eq 0 ] || die "mounting needs root: sudo $0 $*"
[ ! -L "$directory" ] || die "$directory is a symbolic link"

mkdir -p -- "$directory"
if mountpoint -q -- "$directory"; then
    [ "$(stat -f -c %T -- "$directory")" = tmpfs ] || die "$directory is a mount of another kind"
    mount -o "remount,size=$size" -- "$directory"
    say "$directory is resized to $size"
else
    options="size=$size,mode=0750,nosuid,nodev,noexec"
    if ! mount -t tmpfs -o "$options,huge=always" stoa "$directory" 2>/dev/null; then
        say "the kernel has no huge pages for tmpfs; mounting with normal ones"
        mount -t tmpfs -o "$options" stoa "$directory"
    fi
    chown -- "$owner" "$directory"
    say "$directory is a tmpfs of $size, owned by $owner"
fi
say "use it with cache.location = \"$directory\" in stoa.toml"
