r"""What a recorded guest touches, and what its MMU is asked for: the source of `shadowcore.workload.live.PAGES`.

    recorder/fetch.sh                   # busybox; the kernel is that of Debian's linux-image-cloud-amd64
    cc -nostdlib -static -o mark recorder/guests/mark.S
    python recorder/initramfs.py --busybox build/guests/busybox-amd64 --init recorder/guests/pipelines.sh \
        -o live.gz bin/mark=mark
    shadowcore record-guest -o live.screc -- qemu-system-x86_64 -m 128 -nodefaults -display none -no-reboot \
        -cpu max,la57=off -kernel vmlinuz-cloud -initrd live.gz -append "quiet panic=-1 nokaslr mitigations=off"
    python -m bench.live_guest live.screc DATA CONSTANTS

DATA, CONSTANTS: first pages of the program's data and of its constants (`readelf -lW busybox`: 5db and 585). Prints
what a pipeline between marks 1 and 2 counts when the recording is replayed under `kvm-6.1`, with pages of 2 MiB in the
host, and the pages that a process touches: a child of the shell, up to its exec, and a new program, up to its end.
"""

import sys
from collections import Counter, defaultdict

import numpy as np

import shadowcore as sc
from shadowcore.recording import replay
from shadowcore.recording.guest import open_recording
from shadowcore.recording.kinds import ACCESS, FETCH, LOAD_CR3, MARK, TABLE, WRITE
from shadowcore.workload import live

PIPELINES = 60
TOP = 0x7FFC00000000
"""Stacks, and what lies beside them, are above."""


def counted(recording):
    """Counters of a pipeline under kvm-6.1."""
    made = sc.config.design("kvm-6.1")
    shape = {"memory": recording.memory_size, "vcpus": recording.vcpus, "features": sc.Features(maxphyaddr=52)}
    position = recording.first_cr3
    start = replay._machine(recording, made, position)
    vm = sc.VM(mmu=made, host_page_size=live.HOST, **shape)
    vm.memory.words[:] = start.memory.words
    here, there = start.vcpus[0], vm.vcpus[0]
    there.ac = True
    replay.set_registers(vm, there, cr0=here.cr0, cr3=here.cr3, cr4=here.cr4, efer=here.efer)
    found = []
    for base, piece in recording.pieces():
        arrays = piece.arrays | {"flags": replay._piece_flags(piece, recording.first_user, base)}
        for stop in [*(np.flatnonzero(piece.kind == MARK) + base), base + piece.operations]:
            if position < stop:
                replay.replay_records(vm, arrays, position - base, stop - base, recording.direct_map)
                position = stop
            if stop < base + piece.operations and piece.addr[stop - base] in (1, 2):
                found.append(vm.stats.as_dict())
    return {
        name: (found[1][name] - found[0][name]) / PIPELINES for name in (*live.COUNTERS, "unsync_made", "exits_cr3")
    }


def lives(recording):
    """For each root that begins between the marks, the pages of user addresses that are read, written and fetched."""
    made, alive, root, inside = [], {}, 0, False
    for _, piece in recording.pieces():
        for kind, addr, flags in zip(piece.kind.tolist(), piece.addr.tolist(), piece.flags.tolist(), strict=True):
            if kind == MARK and addr in (1, 2):
                inside = addr == 1
            elif kind == LOAD_CR3:
                root = addr & ~0xFFF
            elif kind == TABLE and flags & 16 and inside:
                alive[addr] = defaultdict(set)
                made.append(alive[addr])
            elif kind == ACCESS and inside and root in alive and addr < 1 << 47:
                name = "fetched" if flags & FETCH else "written" if flags & WRITE else "read"
                alive[root][name].add(addr >> 12)
    return made


def pages(life, data, constants):
    """Counts of the pages of a process, by what they are."""
    written, fetched = life["written"], life["fetched"]
    read = life["read"] - written
    fixed = {page for page in read if constants <= page < data}
    stretches = {page >> 4 for page in fetched}
    found = {
        "pages of code": len(fetched),
        "stretches of 16 of them": len(stretches),
        "halves of these": len({page >> 3 for page in fetched}),
        "constants read": len(fixed),
        "stretches of these": len({page >> 4 for page in fixed} - stretches),
    }
    counts = Counter(found)
    for name, which in (("read", read), ("written", written)):
        for page in which:
            if page >= data:
                where = (
                    "data" if page < data + 32 else "stack" if page >= TOP >> 12 else "mapped" if page >> 35 else "heap"
                )
                counts[f"{where} {name}"] += 1
    return counts


def main():
    path, data, constants = sys.argv[1], int(sys.argv[2], 16), int(sys.argv[3], 16)
    recording = open_recording(path)
    for name, value in counted(recording).items():
        print(f"{name:20}{value:10.2f}")
    found = lives(recording)
    stacks = Counter(page >> 8 for life in found for page in life["written"] if page >= TOP >> 12)
    shell = stacks.most_common(1)[0][0]  # its children have its stack
    groups = defaultdict(list)
    for life in found:
        groups[any(page >> 8 == shell for page in life["written"])].append(pages(life, data, constants))
    for is_child, each in sorted(groups.items(), reverse=True):
        print(f"\n{'a child of the shell' if is_child else 'a new program'}, mean of {len(each)}")
        for name, count in sum(each, Counter()).items():
            print(f"{name:25}{count / len(each):7.2f}")


if __name__ == "__main__":
    main()
