"""Run the guests of this directory on the MMU, under every design and both ways; or build them again from source.

python examples/unicorn/guest.py            run kernel.elf, print what it computed and what it cost
python examples/unicorn/guest.py --build    assemble and link kernel.S and corners.S (GNU binutils)
python examples/unicorn/guest.py --check    ... into a temporary directory, and compare with the committed files
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
GUESTS = ("kernel", "corners")
TOOLS = ("as", "ld", "objcopy")
PAGES, ROUNDS, USER_CODE, USER_DATA, STACK_TOP = 48, 3, 0x40000000, 0x40010000, 0x40081000
MASK = (1 << 64) - 1


def build(name: str, target: Path) -> None:
    """Assemble and link one guest: 64-bit objects, in a 32-bit ELF file as multiboot loaders want it."""
    with tempfile.TemporaryDirectory() as work:
        made, linked = Path(work) / "guest.o", Path(work) / "guest.elf"
        subprocess.run(["as", "--64", HERE / f"{name}.S", "-o", made], check=True)
        subprocess.run(
            ["ld", "-m", "elf_x86_64", "-T", HERE / "kernel.ld", "-s", made, "-o", linked],
            check=True,
            stderr=subprocess.DEVNULL,
        )
        subprocess.run(["objcopy", "-I", "elf64-x86-64", "-O", "elf32-i386", linked, target], check=True)


def loaded(path: Path) -> list[tuple[int, int, bytes]]:
    """What a loader puts into memory: (address, bytes of memory, bytes of the file) of each segment."""
    image = path.read_bytes()
    table = int.from_bytes(image[28:32], "little")
    segments = []
    for i in range(int.from_bytes(image[44:46], "little")):
        words = [int.from_bytes(image[at : at + 4], "little") for at in range(table + 32 * i, table + 32 * i + 32, 4)]
        if words[0] == 1:
            segments.append((words[3], words[5], image[words[1] : words[1] + words[4]]))
    return segments


def check(name: str) -> bool:
    """The committed file holds what its source gives."""
    with tempfile.TemporaryDirectory() as work:
        target = Path(work) / "guest.elf"
        build(name, target)
        return loaded(target) == loaded(HERE / f"{name}.elf")


def guest_model() -> str:
    """What kernel.elf prints, computed by the same arithmetic without any MMU: pages are lists, tables are dicts."""
    frames: list[list[int]] = []  # bytes of a frame, as 4096 numbers
    owners: list[int] = []
    faults = 0

    def fault(address: int, code: int) -> None:
        nonlocal faults
        faults = (faults * 33 + address + code) & MASK

    def store(space: dict[int, int], address: int, value: int, add: bool = False) -> None:
        page = address >> 12
        entry = space.get(page)
        if entry is None:
            fault(address, 6)
            frames.append([0] * 4096)
            owners.append(1)
            space[page] = len(frames) - 1
        elif page in readonly[id(space)]:
            # Read-modify-write instructions are loads to a page that is there, and stores that fault.
            fault(address, 7)
            if owners[entry] > 1:
                owners[entry] -= 1
                frames.append(list(frames[entry]))
                owners.append(1)
                space[page] = len(frames) - 1
            readonly[id(space)].discard(page)
        at = address & 0xFFF
        content = frames[space[page]]
        if add:
            value += int.from_bytes(bytes(content[at : at + 8]), "little")
        content[at : at + 8] = list((value & MASK).to_bytes(8, "little"))

    parent: dict[int, int] = {}
    child: dict[int, int] = {}
    readonly: dict[int, set[int]] = {id(parent): set(), id(child): set()}
    for i in range(PAGES):
        store(parent, USER_DATA + (i << 12) + 8 * i + 1, 8 * i + 5)
    store(parent, STACK_TOP - 8, USER_DATA)
    for page, frame in parent.items():
        child[page] = frame
        owners[frame] = 2
    readonly[id(parent)] = set(parent)
    readonly[id(child)] = set(parent)
    for left in range(ROUNDS, 0, -1):
        for who, space in enumerate((parent, child)):
            for i in range(left + who, PAGES, 3):
                store(space, USER_DATA + (i << 12) + 64, i + 4 * who + 7, add=True)
    sums = []
    for space in (parent, child):
        total = 0
        for i in range(PAGES):
            content = bytes(frames[space[(USER_DATA >> 12) + i]])
            for at in range(0, 4096, 8):
                total = (total * 31 + int.from_bytes(content[at : at + 8], "little")) & MASK
        sums.append(total)
    return f"{((sums[0] * 31 + sums[1]) ^ faults) & MASK:016x}"


def main(arguments: list[str]) -> int:
    if arguments in (["--build"], ["--check"]):
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        if missing:
            print(f"guest.py: {', '.join(missing)} not found (GNU binutils)", file=sys.stderr)
            return 2
        if arguments == ["--build"]:
            for name in GUESTS:
                build(name, HERE / f"{name}.elf")
            return 0
        different = [name for name in GUESTS if not check(name)]
        print("different from their sources: " + ", ".join(different) if different else "both as their sources give")
        return 1 if different else 0

    from shadowcore import unicorn

    expected = guest_model()
    wrong = 0
    print(f"{'design':10}{'way':8}{'printed':18}{'exits':>7}{'faults':>8}{'stores':>8}{'ms':>8}")
    for design in ("native", "flush", "cached", "kvm-2007"):
        for way in unicorn.WAYS:
            machine = unicorn.boot(HERE / "kernel.elf", mmu=design, way=way)
            start = time.perf_counter()
            machine.run(seconds=60)
            spent = time.perf_counter() - start
            printed = machine.serial.decode().strip()
            wrong += printed != expected
            stats = machine.vm.stats
            exits = sum(stats.exits.values())
            row = f"{exits:7}{stats.pf_guest:8}{stats.pf_emulate:8}{1000 * spent:8.1f}"
            print(f"{design:10}{way:8}{printed:18}{row}{'' if printed == expected else '  WRONG'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
