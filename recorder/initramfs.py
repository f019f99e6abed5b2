# SPDX-License-Identifier: GPL-2.0-or-later
"""Make the initial RAM disk of a small Linux guest: busybox, an init script, and other files.

python recorder/initramfs.py --busybox /bin/busybox --init INIT -o initrd.gz [NAME=FILE]...
"""

from __future__ import annotations

import argparse
import gzip
import stat
from collections.abc import Mapping
from pathlib import Path

FOLDERS = ("bin", "dev", "proc", "sys", "tmp", "root", "etc")


def _member(number: int, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    """A member of a cpio archive in the format newc: numbers of 8 hexadecimal digits, parts at multiples of 4."""
    path = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    fields = (number, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(path), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + path
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


def initramfs(busybox: bytes, init: str, files: Mapping[str, bytes] | None = None) -> bytes:
    """A compressed archive that Linux unpacks at boot: `init` is a script for busybox's shell."""
    members = [(folder, stat.S_IFDIR | 0o755, b"", (0, 0)) for folder in FOLDERS]
    members += [
        ("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1)),
        ("dev/null", stat.S_IFCHR | 0o666, b"", (1, 3)),
        ("bin/busybox", stat.S_IFREG | 0o755, busybox, (0, 0)),
        ("bin/sh", stat.S_IFLNK | 0o777, b"busybox", (0, 0)),
        ("init", stat.S_IFREG | 0o755, init.encode(), (0, 0)),
    ]
    members += [(name, stat.S_IFREG | 0o755, data, (0, 0)) for name, data in (files or {}).items()]
    archive = b"".join(_member(n, *member) for n, member in enumerate(members, 1)) + _member(0, "TRAILER!!!", 0)
    return gzip.compress(archive, 9, mtime=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--busybox", type=Path, default=Path("/bin/busybox"), help="a static busybox")
    parser.add_argument("--init", type=Path, required=True, help="the script that is the first process")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("files", nargs="*", metavar="NAME=FILE", help="more files")
    given = parser.parse_args()
    pairs = [file.partition("=")[::2] for file in given.files]
    files = {name: Path(file).read_bytes() for name, file in pairs}
    given.output.write_bytes(initramfs(given.busybox.read_bytes(), given.init.read_text(), files))


if __name__ == "__main__":
    main()
