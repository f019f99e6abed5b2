"""Guests with a kernel: how they are booted, what their frames are used for, and a life to its end."""

import numpy as np
from kernel_model import PAGE

import shadowcore as sc
from shadowcore import Prot

MODES = ("32", "pae", "64", "la57")
RW = Prot.READ | Prot.WRITE
EXACT_FLUSH = sc.Shadow.flush(quirks=sc.Quirk.NONE)
DESIGNS = {
    "native": "native",
    "flush": EXACT_FLUSH,
    "series": "flush",
    "cached": "cached",
    "small": None,
    "nested": "nested",
    "agile": "agile",
    "agile, at the first store": sc.Shadow.agile(nested_writes=1, nested_interval=200),
}
OPTIONS = {
    "plain": {},
    "4k": {"direct_map": "4k", "global_": False, "fault_around": 1, "atomic_bytes": 4, "flush_ceiling": 0},
    "isolation": {"isolation": True},
    "pcid": {"pcid": True},
    "both": {"isolation": True, "pcid": True, "atomic_bytes": 8, "grouped": True, "flush_gather": 40},
}


def possible(mode, options):
    return not (mode == "32" and options.get("isolation")) and not (mode in ("32", "pae") and options.get("pcid"))


CASES = [(mode, name) for mode in MODES for name, options in OPTIONS.items() if possible(mode, options)]


def boot(mmu="cached", memory="32MiB", tlb=None, vcpus=1, **options):
    mmu = sc.Shadow.cached(pool_pages=12, flood_threshold=1) if mmu is None else mmu
    return sc.Kernel(sc.VM(memory, mmu=mmu, vcpus=vcpus, tlb=tlb), sc.KernelOptions(**options))


def leaf_frames(kernel, process):
    """gfns of the leaves in the user half, by a walk of our own; and the gfns of its tables."""
    mode, memory = kernel.options.mode, kernel.vm.memory.bytes
    levels = {"32": 2, "pae": 3, "64": 4, "la57": 5}[mode]
    bits, dtype = (10, np.uint32) if mode == "32" else (9, np.uint64)
    leaves, tables = [], [process.root >> 12]

    def walk(table, level, base):
        entries = memory[table : table + 4096].view(dtype).astype(np.uint64)
        for index in np.flatnonzero(entries).tolist():
            va = base + (index << 12 + bits * (level - 1))
            entry = int(entries[index])
            if va >= kernel.task_size or (level == 3 and mode == "pae" and index > 3):
                continue
            frame = (entry & 0xFFFFFFFFFF000) >> 12
            if level == 1 or entry & 0x80:
                if entry & 0x101:
                    leaves.append(frame)
            elif entry & 1:
                tables.append(frame)
                walk(frame << 12, level - 1, va)

    walk(process.root, levels, 0)
    if process.user_root != process.root:
        tables.append(process.user_root >> 12)
    return leaves, tables


def check_frames(kernel, files=()):
    """Every frame is counted as often as it is used, by tables in guest memory and the page cache."""
    counted = kernel.references().astype(np.int64)
    boot_end = kernel.frames["boot"]
    uses = np.zeros(len(counted), dtype=np.int64)
    for process in kernel.processes:
        leaves, tables = leaf_frames(kernel, process)
        assert len(tables) == process.tables
        assert len(leaves) == process.resident
        assert len(tables) == len(set(tables))
        np.add.at(uses, leaves, 1)
        np.add.at(uses, tables, 1)
    frames = kernel.frames
    named = sum(frames[name] for name in ("tables", "anonymous", "cache", "kernel", "boot", "free"))
    assert named == frames["total"]
    difference = (counted - uses)[boot_end:]
    # What is left: one for each cached page and each kernel stack or buffer, and the roots of an ended process.
    assert (difference >= 0).all()
    extra = frames["cache"] + frames["kernel"] + (frames["large"] - frames["large_free"])
    assert extra <= difference.sum() <= extra + 8
    assert np.count_nonzero(counted[boot_end : frames["total"]]) == frames["total"] - frames["free"] - boot_end


def all_free(kernel, files):
    for process in kernel.processes:
        process.exit()
    for file in files:
        kernel.discard(file)
    frames = kernel.frames
    return frames["free"] + frames["boot"] == frames["total"] and frames["large"] == frames["large_free"]


def life(kernel):
    """A bit of everything, to the end of every process."""
    library = kernel.program(text=40, data=3)
    program = kernel.program(text=33, data=5, bss=4, library=library)
    parent = kernel.spawn(program)
    base = parent.mmap(64 * PAGE)
    parent.sweep(base, 64, write=True)
    children = [parent.fork() for _ in range(3)]
    for number, child in enumerate(children):
        child.scatter(base, 64 * PAGE, 50, write=True)
        if number:
            child.exec(program)
            assert child.execute(0x400000 if kernel.options.mode in ("64", "la57") else 0x8048000, 33) == 0
    parent.mprotect(base, 32 * PAGE, Prot.READ)
    assert parent.sweep(base, 64, write=True) == 32
    parent.mprotect(base, 32 * PAGE, RW)
    assert parent.sweep(base, 64, write=True) == 0
    parent.munmap(base + 8 * PAGE, 40 * PAGE)
    assert parent.sweep(base, 64) == 40
    parent.swap_out()
    parent.swap_out()
    children[0].sweep(base, 64)
    pipe = kernel.pipe()
    children[0].send(pipe, base, 512)
    children[1].receive(pipe, kernel.task_size - 0x3000)
    kernel.switch(None)
    parent.exit()
    for child in children:
        child.exit()
    files = [sc.File(number, 0) for number in range(2)]
    assert all_free(kernel, files)
    return kernel.history
