# SPDX-License-Identifier: GPL-2.0-or-later
"""Take the kernel out of a compressed image of Linux (bzImage, packed with xz, gzip or bzip2).

python recorder/vmlinux.py /boot/vmlinuz -o vmlinux

QEMU's -kernel starts it by way of PVH, as small hypervisors start kernels: without the four thousand million
instructions that a 64-bit image takes to unpack itself, with paging on.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import lzma
import struct
from pathlib import Path

UNPACK = {b"\xfd7zXZ": lzma.LZMADecompressor, b"BZh": bz2.BZ2Decompressor}
ELF = b"\x7fELF"


def vmlinux(image: bytes) -> bytes:
    """The kernel as an ELF file. The boot protocol of Linux, 2.08 and later, tells where it is packed."""
    if image[0x202:0x206] != b"HdrS":
        raise SystemExit("an image of Linux for x86 (bzImage) is needed")
    begin, length = struct.unpack_from("<II", image, 0x248)
    packed = image[((image[0x1F1] or 4) + 1) * 512 + begin :][: length - 4]  # the size unpacked is at its end
    if packed.startswith(b"\x1f\x8b"):
        kernel = gzip.decompress(packed)
    else:
        made = next((made for magic, made in UNPACK.items() if packed.startswith(magic)), None)
        if made is None:
            raise SystemExit(f"packed in a way that is not known here: it begins with {packed[:6].hex()}")
        kernel = made().decompress(packed)
    if not kernel.startswith(ELF):
        raise SystemExit("what is packed in the image is no ELF file")
    return kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.write_bytes(vmlinux(given.image.read_bytes()))


if __name__ == "__main__":
    main()
