"""Print the records of a guest's recording, a line each: vcpu kind flags insns addr value, in hexadecimal.

    python screc.py guest.screc

Reads versions 1 and 2 of the format of docs/recordings.md with the standard library alone; `zipfile` checks every
CRC-32 of a member, and the index says which members there have to be.
"""

from __future__ import annotations

import array
import json
import re
import sys
import zipfile
import zlib
from collections.abc import Iterator

COLUMNS = ("vcpu", "kind", "flags", "insns", "addr", "value")
TYPES = {"u1": "B", "u2": "H", "u4": "I", "u8": "Q"}

Record = tuple[int, ...]


def numbers(npy: bytes) -> array.array[int]:
    """An array in the .npy format, version 1.0: unsigned integers, little endian, of one dimension."""
    if npy[:8] != b"\x93NUMPY\x01\x00":
        raise ValueError("an array in the .npy format 1.0 expected")
    begin = 10 + int.from_bytes(npy[8:10], "little")
    found = re.search(rb"'descr': '[<|](u[1248])'", npy[10:begin])
    if found is None:
        raise ValueError("unsigned integers expected")
    values: array.array[int] = array.array(TYPES[found[1].decode()])
    values.frombytes(npy[begin:])
    if sys.byteorder == "big":
        values.byteswap()
    return values


def spread(values: array.array[int], records: int) -> array.array[int]:
    """One element that all records have, as one for each."""
    return values * records if len(values) == 1 else values


def column(members: dict[str, array.array[int]], name: str, records: int) -> list[int]:
    """A column of a block, in one of the forms that it can have there."""
    if f"{name}.pages" in members:
        pages = members[f"{name}.pages"]
        places = spread(members[f"{name}.index"], records)
        offsets = spread(members[f"{name}.offset"], records)
        found = [(pages[at] * 4096 + offset) % 2**64 for at, offset in zip(places, offsets, strict=True)]
    else:
        found = list(spread(members.get(name, array.array("B", [0])), records))
    if len(found) != records:
        raise ValueError(f"{name}: {records} elements expected")
    return found


def read(path: str) -> Iterator[Record]:
    """The records of a guest's recording, as numbers in the order of COLUMNS. ValueError if it is none."""
    with zipfile.ZipFile(path) as archive:
        if archive.namelist()[0] != "recording.json":
            raise ValueError("a recording expected")
        header = json.loads(archive.read("recording.json"))
        if header["format"] != "shadowcore recording" or header["version"] not in (1, 2):
            raise ValueError("version 1 or 2 of the format expected")
        if header["stream"] != "guest":
            raise ValueError("a recording of a guest expected")
        index = json.loads(archive.read("index.json"))
        sums = {info.filename: info.CRC for info in archive.infolist() if info.filename != "index.json"}
        if "checksums" in index and index["checksums"] != sums:
            raise ValueError("the members that the index names expected")
        for number, block in enumerate(index["blocks"]):
            records = block["records"]
            folder = f"blocks/{number:06}-{records}"
            members = {name: numbers(archive.read(f"{folder}/{name}.npy")) for name in block["arrays"]}
            yield from zip(*(column(members, name, records) for name in COLUMNS), strict=True)


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit("screc.py: the name of a recording is needed")
    try:
        for record in read(sys.argv[1]):
            print(*(f"{number:x}" for number in record))
    except (ValueError, LookupError, EOFError, zlib.error, zipfile.BadZipFile) as error:  # cut short, or damaged
        sys.exit(f"screc.py: {sys.argv[1]}: a whole recording expected: {error}")
    except OSError as error:
        sys.exit(f"screc.py: {sys.argv[1]}: {error.strerror or error}")


if __name__ == "__main__":
    main()
