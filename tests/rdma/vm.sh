# Small virtual machines with a soft-RoCE device; source it, do not run it.
#
# Soft-RoCE (the kernel's `rdma_rxe`) gives verbs over an ordinary network device, but few machines
# may load a kernel module, so it runs in guests of their own: Debian's kernel and user space,
# downloaded with apt-get and only unpacked, never installed, started by QEMU under software
# emulation. No root, no KVM and no RDMA device are needed. What comes out proves that transfers are
# right, never that they are fast.
#
# Provides: vm_prepare, vm_run, vm_run_pair.
# Inputs: STOA_RDMA_CACHE    where downloads are kept (${XDG_CACHE_HOME:-~/.cache}/stoa/rdma)
#         STOA_RDMA_KERNEL   Debian's package of the kernel (linux-image-6.12-amd64)
#         STOA_RDMA_TIMEOUT  seconds that a guest may take (600)
#         STOA_RDMA_MEMORY   MiB of a guest (1024)
#         STOA_RDMA_KEEP     if not empty, consoles and images of guests are kept in the cache
# shellcheck shell=bash

VM_SOURCE="$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
VM_CACHE="${STOA_RDMA_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/stoa/rdma}"
VM_TIMEOUT="${STOA_RDMA_TIMEOUT:-600}"

# A kernel that has soft-RoCE: the one for clouds (-cloud-amd64) does not. linux-image-amd64 is 6.1,
# which registers memory in another way.
VM_KERNEL="${STOA_RDMA_KERNEL:-linux-image-6.12-amd64}"
VM_PACKAGES=(
    busybox-static iproute2 libc6 libgcc-s1
    libibverbs1 ibverbs-providers librdmacm1 libnl-3-200 libnl-route-3-200
    libbpf1 libbsd0 libcap2 libelf1 libmd0 libmnl0 libxtables12 zlib1g
)
VM_MODULES=(crc32_generic rdma_rxe rdma_ucm ib_uverbs dummy sch_netem virtio_pci virtio_net)
VM_LIBRARIES=usr/lib/x86_64-linux-gnu

# Downloads and unpacks what guests are made of, once for each version of the kernel, and leaves the
# path of the result in VM_BASE. Needs apt-get with Debian 12's package lists, dpkg-deb and QEMU.
vm_prepare() {
    [ "$(uname -m)" = x86_64 ] || die "the guests run x86-64 programs, and this host is $(uname -m)"
    if ! command -v qemu-system-x86_64 >/dev/null 2>&1; then
        install_packages qemu-system-x86 ||
            die "QEMU is missing; install it (apt-get install qemu-system-x86)"
    fi
    local image version
    image="$(vm_kernel_package)"
    if [ -z "$image" ]; then
        # The package lists of a fresh image are empty.
        as_root apt-get update </dev/null >&2 || true
        image="$(vm_kernel_package)"
    fi
    [ -n "$image" ] || die "the package $VM_KERNEL is not known here; it is one of Debian 12 \
(bookworm): run this on such a host or in such a container"

    # Another kernel or another way of building makes another base.
    version="$(sha256sum "$VM_SOURCE/vm.sh" "$VM_SOURCE/guest/init" "$VM_SOURCE/guest/rxe-up" |
        sha256sum | cut -c 1-12)"
    VM_BASE="$VM_CACHE/$image-$version"
    [ -e "$VM_BASE/complete" ] && return 0

    say "downloading $image and making a guest of it, once, below $VM_CACHE"
    rm -rf -- "$VM_BASE"
    mkdir -p -- "$VM_BASE/kernel" "$VM_BASE/tools" "$VM_CACHE/packages-$image"
    (
        cd -- "$VM_CACHE/packages-$image" || exit
        apt-get -o APT::Sandbox::User=root download "$image" "${VM_PACKAGES[@]}" >/dev/null
    )
    local package
    for package in "$VM_CACHE/packages-$image"/*.deb; do
        case "${package##*/}" in
        linux-image-*) dpkg-deb -x "$package" "$VM_BASE/kernel" ;;
        *) dpkg-deb -x "$package" "$VM_BASE/tools" ;;
        esac
    done
    vm_unpack_kernel "$VM_BASE"/kernel/boot/vmlinuz-* "$VM_BASE/vmlinux"
    vm_make_root "$VM_BASE/root"
    (
        cd -- "$VM_BASE/root" || exit
        # Not compressed: the guest is slow, the host's page cache is not.
        find . | "$VM_BASE/tools/bin/busybox" cpio -o -H newc 2>/dev/null >"$VM_BASE/root.cpio"
    )
    rm -rf -- "$VM_BASE/kernel"
    : >"$VM_BASE/complete"
}

# The package with the kernel that VM_KERNEL stands for at present.
vm_kernel_package() {
    apt-cache depends "$VM_KERNEL" 2>/dev/null | awk '/Depends:/ { print $2; exit }'
}

# Takes the ELF file out of a bzImage: QEMU can enter it directly, and the guest does not have to
# decompress itself under emulation. Boots the bzImage as it is where that does not succeed.
#
# The boot protocol's header gives the sectors of the setup code (offset 0x1f1) and where the
# compressed kernel begins behind it (0x248) and how long it is (0x24c). Its last four bytes are the
# length of the ELF file.
vm_unpack_kernel() {
    local image="$1" target="$2" sectors offset length
    sectors="$(od -An -tu1 -j $((0x1f1)) -N 1 "$image" | tr -d ' ')"
    offset="$(od -An -tu4 -j $((0x248)) -N 4 "$image" | tr -d ' ')"
    length="$(od -An -tu4 -j $((0x24c)) -N 4 "$image" | tr -d ' ')"
    tail -c "+$(((sectors + 1) * 512 + offset + 1))" "$image" 2>/dev/null |
        head -c $((length - 4)) >"$target.packed" || true
    zstd -dc "$target.packed" >"$target" 2>/dev/null ||
        xz -dc --single-stream "$target.packed" >"$target" 2>/dev/null || true
    rm -f -- "$target.packed"
    if [ "$(head -c 4 "$target" | tail -c 3)" != ELF ]; then
        cp -- "$image" "$target"
    fi
}

# The root of a guest: busybox, the tools that make a device, their libraries, the kernel's modules.
vm_make_root() {
    local root="$1" tools="$VM_BASE/tools" busybox="$VM_BASE/tools/bin/busybox"
    mkdir -p -- "$root"/{bin,dev,etc,lib64,modules,proc,run,sys,tmp,test/lib,usr/bin} \
        "$root/$VM_LIBRARIES/libibverbs"
    ln -s usr/lib "$root/lib"
    cp -- "$busybox" "$root/bin/"
    cp -L -- "$tools/bin/ip" "$tools/sbin/tc" "$(find "$tools" -path '*bin/rdma' | head -n 1)" \
        "$root/usr/bin/"
    # Providers are found by name at run time: no program needs them in the linker's sense.
    cp -- "$tools/$VM_LIBRARIES"/libibverbs/librxe-*.so "$root/$VM_LIBRARIES/libibverbs/"
    mkdir -p -- "$root/etc/libibverbs.d"
    cp -- "$tools/etc/libibverbs.d/rxe.driver" "$root/etc/libibverbs.d/"
    printf '%s\n' 'root:x:0:0::/:/bin/sh' 'nobody:x:65534:65534::/tmp:/bin/sh' >"$root/etc/passwd"
    cp -L -- "$tools/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" "$root/lib64/"
    vm_copy_libraries "$root" "$root"/usr/bin/* "$root/$VM_LIBRARIES"/libibverbs/*
    # What the programs under test need.
    vm_copy_named "$root" libc.so.6 libgcc_s.so.1 libm.so.6 libibverbs.so.1 librdmacm.so.1

    local modules line module
    modules="$(basename -- "$VM_BASE"/kernel/lib/modules/*)"
    find "$VM_BASE/kernel" -name '*.ko.xz' -exec xz -d {} +
    "$busybox" depmod -b "$VM_BASE/kernel" "$modules"
    : >"$root/modules/order"
    for module in "${VM_MODULES[@]}"; do
        grep -q "/$module\.ko\$" "$VM_BASE/kernel/lib/modules/$modules/modules.builtin" && continue
        # A line names a module and what it needs, the most basic last.
        line="$(tr _ - <"$VM_BASE/kernel/lib/modules/$modules/modules.dep" |
            grep -E "(^|/)${module//_/-}\.ko:" || true)"
        [ -n "$line" ] || die "module $module is not in $VM_KERNEL"
        vm_copy_modules "$root" "$modules" "$line"
    done
    cp -- "$VM_SOURCE/guest/init" "$root/init"
    cp -- "$VM_SOURCE/guest/rxe-up" "$root/usr/bin/rxe-up"
    chmod 755 "$root/init" "$root/usr/bin/rxe-up"
}

# Copies the modules of one line of modules.dep, and appends their names in the order of loading.
vm_copy_modules() {
    local root="$1" modules="$2" line="$3" path name file
    for path in $(printf '%s\n' "${line/:/}" | tr ' ' '\n' | tac); do
        name="$(basename -- "$path")"
        grep -qx -- "$name" "$root/modules/order" && continue
        # File names use dashes and underscores at will.
        file="$(find "$VM_BASE/kernel/lib/modules/$modules" -name '*.ko' | grep -E \
            "/${name//-/[-_]}\$" | head -n 1)"
        cp -- "$file" "$root/modules/$name"
        printf '%s\n' "$name" >>"$root/modules/order"
    done
}

# Copies libraries by name from the unpacked packages, with what they need.
vm_copy_named() {
    local root="$1" name path
    shift
    for name in "$@"; do
        [ -e "$root/$VM_LIBRARIES/$name" ] && continue
        path="$(find "$VM_BASE/tools" -name "$name" | head -n 1)"
        [ -n "$path" ] || die "library $name is in none of the packages ${VM_PACKAGES[*]}"
        cp -L -- "$path" "$root/$VM_LIBRARIES/$name"
        vm_copy_libraries "$root" "$root/$VM_LIBRARIES/$name"
    done
}

# Copies what the given files need in the linker's sense.
vm_copy_libraries() {
    local root="$1" file names
    shift
    for file in "$@"; do
        names="$(LC_ALL=C objdump -p "$file" 2>/dev/null | awk '/NEEDED/ { print $2 }')"
        # shellcheck disable=SC2086 # names of libraries have no spaces
        vm_copy_named "$root" $names
    done
}

# vm_image TARGET SCRIPT FILE...: an initial root with SCRIPT, which the guest runs, and FILEs, which
# it finds in its PATH. Libraries that the guest has are left to it.
vm_image() {
    local target="$1" script="$2" overlay file library
    shift 2
    overlay="$(mktemp -d "$VM_CACHE/overlay.XXXXXX")"
    mkdir -p -- "$overlay/test/lib"
    cp -- "$script" "$overlay/test/script"
    for file in "$@"; do
        cp -L -- "$file" "$overlay/test/"
        for library in $(ldd "$file" 2>/dev/null | awk '$3 ~ /^\// { print $3 }'); do
            [ -e "$VM_BASE/root/$VM_LIBRARIES/$(basename -- "$library")" ] ||
                cp -L -- "$library" "$overlay/test/lib/"
        done
    done
    (
        cd -- "$overlay" || exit
        # Several archives after each other are one root to the kernel.
        cat "$VM_BASE/root.cpio"
        find test | "$VM_BASE/tools/bin/busybox" cpio -o -H newc 2>/dev/null
    ) >"$target"
    rm -rf -- "$overlay"
}

# vm_boot NODE IMAGE LOG CPUS ARGUMENT...: one guest in the foreground, its console in LOG.
vm_boot() {
    local node="$1" image="$2" log="$3" cpus="$4"
    shift 4
    timeout -k 5 "$VM_TIMEOUT" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp "$cpus" \
        -m "${STOA_RDMA_MEMORY:-1024}" -nodefaults -no-user-config -nographic -no-reboot \
        -serial stdio -kernel "$VM_BASE/vmlinux" -initrd "$image" "$@" \
        -append "console=ttyS0 quiet loglevel=3 panic=-1 reboot=t no_timer_check mitigations=off \
nokaslr random.trust_cpu=on stoa.node=$node" </dev/null >"$log" 2>&1 || true
    sed -i 's/\r//g' "$log"
}

# vm_result LOG: prints what the guest printed; returns the status of its script.
vm_result() {
    local log="$1" status
    sed -n '/^guest: /,$p' "$log" | grep -v -E '^@@status|reboot: ' || true
    status="$(sed -n 's/^@@status=\([0-9]*\)@@.*/\1/p' "$log" | tail -n 1)"
    if [ -z "$status" ]; then
        say "no result from the guest: it crashed, or took longer than $VM_TIMEOUT s; its console:"
        tail -n 40 "$log" >&2
        return 124
    fi
    return "$status"
}

# vm_run SCRIPT FILE...: one guest; returns the status of SCRIPT in it.
vm_run() {
    local work status=0
    work="$(mktemp -d "$VM_CACHE/run.XXXXXX")"
    vm_image "$work/image" "$@"
    vm_boot 1 "$work/image" "$work/log" 2
    vm_result "$work/log" || status=$?
    [ -n "${STOA_RDMA_KEEP:-}" ] || rm -rf -- "$work"
    return "$status"
}

# vm_run_pair SCRIPT FILE...: two guests joined by two virtual wires; SCRIPT runs in both, with NODE 1
# and 2. Returns the larger of the two statuses.
vm_run_pair() {
    local work node peer wire one status=0 guests=() devices
    work="$(mktemp -d "$VM_CACHE/run.XXXXXX")"
    vm_image "$work/image" "$@"
    for node in 1 2; do
        peer=$((3 - node))
        devices=()
        for wire in 0 1; do
            devices+=(
                -netdev "dgram,id=wire$wire,local.type=unix,local.path=$work/$wire-$node,\
remote.type=unix,remote.path=$work/$wire-$peer"
                -device "virtio-net-pci,netdev=wire$wire,romfile=,mac=52:54:00:00:0$wire:0$node"
            )
        done
        vm_boot "$node" "$work/image" "$work/log$node" 1 "${devices[@]}" &
        guests+=($!)
    done
    wait "${guests[@]}" || true
    for node in 1 2; do
        say "-- guest $node"
        one=0
        vm_result "$work/log$node" || one=$?
        [ "$one" -le "$status" ] || status="$one"
    done
    [ -n "${STOA_RDMA_KEEP:-}" ] || rm -rf -- "$work"
    return "$status"
}
