#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Fetch Debian's kernels and static busyboxes into a folder, without installing them: what the tests boot.
#
#     recorder/fetch.sh [FOLDER]          # build/guests
#
# Needs apt-get and dpkg. The 32-bit kernels and busybox need the architecture: dpkg --add-architecture i386; apt-get update
set -eu
folder=${1:-build/guests}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

kernel() {      # name of the metapackage, name in the folder
    package=$(apt-cache depends "$1" | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
    apt-get download -qq "$package"
    dpkg -x linux-image-*.deb "$2"
    cp "$2"/boot/vmlinuz-* "$folder/vmlinuz-$2"
    rm -rf linux-image-*.deb "$2"
}

busybox() {     # package, name in the folder
    apt-get download -qq "$1"
    dpkg -x busybox-static_*.deb "$2"
    cp "$2/bin/busybox" "$folder/busybox-$2"
    rm -rf busybox-static_*.deb "$2"
}

kernel linux-image-amd64 amd64
busybox busybox-static:amd64 amd64
if dpkg --print-foreign-architectures | grep -q '^i386$'; then
    kernel linux-image-686-pae:i386 686-pae
    kernel linux-image-686:i386 686
    busybox busybox-static:i386 i386
else
    echo "without the architecture i386: no 32-bit guests" >&2
fi
ls -l "$folder"
