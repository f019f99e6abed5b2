#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Record Debian's kernel, from the moment that paging is on through the phases of recorder/guests/mix.sh, with and without
# page-table isolation: OUT/linux-mix.screc and OUT/linux-mix-pti.screc. The same input gives the same instructions but
# for what the clock does to them.
#
#     recorder/fetch.sh && recorder/make-recording.sh [OUT]      # build/recordings; needs gcc and a QEMU, see README.md
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-build/recordings}
guests=${GUESTS:-build/guests}
mkdir -p "$out"

${CC:-cc} -nostdlib -static -o "$out/mark" "$here/guests/mark.S"
python3 "$here/initramfs.py" --busybox "$guests/busybox-amd64" --init "$here/guests/mix.sh" -o "$out/mix.gz" \
    "bin/mark=$out/mark"

# The kernel comes unpacked: to unpack itself would be most of its boot.
record() {      # name, more of the kernel's command line
    shadowcore record-guest -o "$out/$1.screc" --name "$1" --filter "${FILTER:-2048}" \
        --mark 1=pipelines --mark 2=interpreter --mark 3=files --mark 4=server --mark 5=end -- \
        "${QEMU:-qemu-system-x86_64}" -m 128 -nodefaults -display none -no-reboot -icount shift=0,sleep=off \
        -cpu max,la57=off -kernel "$guests/vmlinux-amd64" -initrd "$out/mix.gz" \
        -append "quiet panic=-1 nokaslr random.trust_cpu=off $2"
}

record linux-mix pti=off
record linux-mix-pti pti=on     # each system call loads CR3 twice and so empties the filter
ls -l "$out"/*.screc
