#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-or-later
# Fetch Debian's kernels and static busyboxes into a folder, without installing them: what the tests boot.
#
#     recorder/fetch.sh [FOLDER [amd64]]          # build/guests; amd64: none but the 64-bit ones
#
# Needs apt-get, dpkg and python3. The 32-bit kernels and busybox need the architecture: dpkg --add-architecture i386;
# apt-get update
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-build/guests}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$scratch"

kernel() {      # name of the metapackage, name in the folder
    package=$(apt-cache depends "$1" | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
    apt-get download -qq "$package"
    dpkg --fsys-tarfile linux-image-*.deb | tar -xO --wildcards './boot/vmlinuz-*' >"$folder/vmlinuz-$2"
    rm linux-image-*.deb
}

busybox() {     # package, name in the folder
    apt-get download -qq "$1"
    dpkg --fsys-tarfile busybox-static_*.deb | tar -xO ./bin/busybox >"$folder/busybox-$2"
    chmod +x "$folder/busybox-$2"
    rm busybox-static_*.deb
}

kernel linux-image-amd64 amd64
python3 "$here/vmlinux.py" "$folder/vmlinuz-amd64" -o "$folder/vmlinux-amd64"
busybox busybox-static:amd64 amd64
if [ "${2:-}" = amd64 ]; then
    :
elif dpkg --print-foreign-architectures | grep -q '^i386$'; then
    kernel linux-image-686-pae:i386 686-pae
    kernel linux-image-686:i386 686
    busybox busybox-static:i386 i386
else
    echo "without the architecture i386: no 32-bit guests" >&2
fi
ls -l "$folder"
