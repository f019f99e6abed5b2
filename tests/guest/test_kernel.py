"""The guest kernel: what its processes see, what becomes of its frames, and that no design changes any of it."""

import random
import signal
import threading
import time

import numpy as np
import pytest
from kernel_model import PAGE, Files, Model, disk

import shadowcore as sc
from shadowcore import Prot

MODES = ("32", "pae", "64", "la57")
RW = Prot.READ | Prot.WRITE
EXACT_FLUSH = sc.Shadow.flush(quirks=sc.Quirk.NONE)
DESIGNS = {"native": "native", "flush": EXACT_FLUSH, "series": "flush", "cached": "cached", "small": None}
OPTIONS = {
    "plain": {},
    "4k": {"direct_map": "4k", "global_": False, "fault_around": 1, "atomic_bytes": 4, "flush_ceiling": 0},
    "isolation": {"isolation": True},
    "pcid": {"pcid": True},
    "both": {"isolation": True, "pcid": True, "atomic_bytes": 8},
}


def possible(mode, options):
    return not (mode == "32" and options.get("isolation")) and not (mode in ("32", "pae") and options.get("pcid"))


CASES = [(mode, name) for mode in MODES for name, options in OPTIONS.items() if possible(mode, options)]


def boot(mmu="cached", memory="32MiB", tlb=None, **options):
    mmu = sc.Shadow.cached(pool_pages=12, flood_threshold=1) if mmu is None else mmu
    return sc.Kernel(sc.VM(memory, mmu=mmu, tlb=tlb), sc.KernelOptions(**options))


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


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_random_programs_against_the_model(mode, name):
    """Random calls of several processes: each load sees what the model says, each refusal is the model's."""
    for seed, mmu in enumerate(("native", EXACT_FLUSH, "cached", None, "cached")):
        random_program(mode, OPTIONS[name], random.Random(f"{mode} {name} {seed}"), mmu, None)
        random_program(mode, OPTIONS[name], random.Random(f"{mode} {name} {seed} TLB"), mmu, sc.TLB())


def random_program(mode, options, rng, mmu, tlb):
    kernel = boot(mmu, "24MiB", tlb, mode=mode, swap_pages=256, seed=7, **options)
    files = Files()
    on_disk = [kernel.file(40), kernel.file(9)]
    shared = kernel.file(24, zero=True)
    pipe = kernel.pipe()
    first = kernel.spawn()
    models = {first: Model(files)}
    spaces = {first: []}
    for step in range(500):
        process = rng.choice(list(models))
        model, areas = models[process], spaces[process]
        act = rng.random()
        if act < 0.10 and len(areas) < 12:
            file = rng.choice([None, None, *on_disk, shared])
            pages = rng.choice([1, 3, 17, 40])
            prot = rng.choice([RW, RW, RW, Prot.READ, Prot.NONE, Prot.READ | Prot.EXEC])
            is_shared = file is shared or (file is not None and rng.random() < 0.3)
            page = rng.randrange(4) if file else 0
            addr = process.mmap(pages * PAGE, prot, file=file, page=page, shared=is_shared)
            assert not any(addr // PAGE + i in model.maps for i in range(pages))
            model.map(addr, pages * PAGE, prot, file, page, is_shared)
            areas.append((addr, pages))
        elif act < 0.14 and areas:
            addr, pages = rng.choice(areas)
            start = rng.randrange(pages)
            length = rng.randrange(1, pages + 2) * PAGE
            process.munmap(addr + start * PAGE, length)
            model.unmap(addr + start * PAGE, length)
        elif act < 0.20 and areas:
            addr, pages = rng.choice(areas)
            start = rng.randrange(pages)
            length = rng.randrange(1, pages - start + 1) * PAGE
            prot = rng.choice([RW, RW, Prot.READ, Prot.NONE])
            if model.mapped(addr + start * PAGE, length):
                process.mprotect(addr + start * PAGE, length, prot)
                model.protect(addr + start * PAGE, length, prot)
            else:
                with pytest.raises(sc.ConfigError, match="mprotect"):
                    process.mprotect(addr + start * PAGE, length, prot)
        elif act < 0.24:
            pages = rng.randrange(1, 30)
            start, end = process.heap
            if end - start > 20 * PAGE:
                process.sbrk(-pages if end - start >= pages * PAGE else 0)
                model.unmap(process.heap[1], end - process.heap[1])
            else:
                process.sbrk(pages)
                model.map(end, pages * PAGE, RW)
                areas.append((end, pages))
        elif act < 0.29 and len(models) < 6:
            child = process.fork()
            models[child], spaces[child] = model.fork(), list(areas)
        elif act < 0.31 and len(models) > 1:
            process.exit()
            assert not process.alive
            del models[process], spaces[process]
        elif act < 0.33:
            process.exec()
            models[process], spaces[process] = Model(files), []
        elif act < 0.37:
            process.swap_out(rng.choice([16, 1000]))
        elif act < 0.40:
            process.age(rng.choice([16, 1000]))
        elif act < 0.43 and areas:
            addr, _ = rng.choice(areas)
            if model.load(addr) is not None:
                process.send(pipe, addr, 8)
                at = kernel.task_size - 0x3000  # the stack
                process.receive(pipe, at)
                assert process.read(at) == model.load(addr)
        elif areas:
            addr, pages = rng.choice(areas)
            at = addr + rng.randrange(pages * PAGE // 8) // 64 * 64 * 8 % (pages * PAGE)
            write = rng.random() < 0.5
            value = rng.getrandbits(64)
            expected = model.store(at, value) if write else model.load(at)
            outcome, loaded, _ = process.access([at], write, [value])
            if write:
                assert bool(outcome[0]) != expected, (step, hex(at))
            else:
                assert (None if outcome[0] else int(loaded[0])) == expected, (step, hex(at))
        if step % 100 == 99:
            kernel.vm.audit(strict=True)
            check_frames(kernel)
    for process, model in models.items():
        for addr, pages in spaces[process]:
            for i in range(pages):
                at = addr + i * PAGE + rng.randrange(0, 512, 64) * 8
                outcome, loaded, _ = process.access([at])
                assert (None if outcome[0] else int(loaded[0])) == model.load(at)
    assert all_free(kernel, [*on_disk, shared])
    assert kernel.swap_used == 0
    kernel.vm.audit(strict=True)


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


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_histories_are_the_same_under_every_design(mode, name):
    histories = {}
    for design, mmu in DESIGNS.items():
        kernel = boot(mmu, "16MiB", mode=mode, swap_pages=128, **OPTIONS[name])
        histories[design] = life(kernel)
        kernel.vm.audit(strict=True)
    assert len(set(histories.values())) == 1, histories
    assert boot("native", "16MiB", mode=mode, swap_pages=128, seed=1, **OPTIONS[name]).history not in histories.values()


@pytest.mark.parametrize("options", [{}, {"pcid": True}, {"isolation": True, "pcid": True}])
@pytest.mark.parametrize("mmu", ["native", "flush", "cached"])
def test_a_tlb_shows_nothing_that_a_careful_kernel_flushed(mmu, options):
    without = life(boot("native", "16MiB", swap_pages=128, **options))
    kernel = boot(mmu, "16MiB", tlb=sc.TLB(), swap_pages=128, **options)
    assert life(kernel) == without
    kernel.vm.audit(strict=True)


def test_fork_shares_until_a_store():
    kernel = boot()
    parent = kernel.spawn()
    base = parent.mmap(10 * PAGE)
    parent.sweep(base, 10, write=True)
    before = kernel.frames["anonymous"]
    child = parent.fork()
    assert kernel.frames["anonymous"] == before
    _, values, gpas = parent.access(base + np.arange(10) * PAGE)
    _, child_values, child_gpas = child.access(base + np.arange(10) * PAGE)
    assert (values == child_values).all()
    assert (gpas == child_gpas).all()
    child.write(base, 1)
    parent.write(base + PAGE, 2)
    assert kernel.frames["anonymous"] == before + 2
    assert parent.read(base) == values[0]
    assert child.read(base + PAGE) == values[1]
    counters = kernel.counters
    parent.write(base, 3)  # the child has its own copy: the frame is kept
    assert kernel.counters["faults_reused"] == counters["faults_reused"] + 1
    assert kernel.counters["faults_copied"] == counters["faults_copied"]


def test_files_hold_what_they_say():
    kernel = boot()
    file = kernel.file(20)
    process = kernel.spawn()
    private = process.mmap(20 * PAGE, RW, file=file)
    shared = process.mmap(20 * PAGE, RW, file=file, shared=True)
    assert process.read(private + 3 * PAGE + 80) == disk(0, 3, 10)
    process.write(private + 3 * PAGE + 80, 5)
    assert process.read(shared + 3 * PAGE + 80) == disk(0, 3, 10)
    process.write(shared + 4 * PAGE, 6)
    assert process.read(private + 4 * PAGE) == 6
    with pytest.raises(sc.PageFault):
        process.read(process.mmap(2 * PAGE, file=file, page=19) + PAGE)
    process.exit()
    cached = kernel.frames["cache"]
    assert kernel.discard(file) == cached > 0
    assert kernel.frames["cache"] == 0


def test_stacks_grow_to_their_limit():
    kernel = boot()
    process = kernel.spawn()
    top = int(process.mappings["end"][-1])
    process.write(top - 100 * PAGE, 1)
    assert process.read(top - 100 * PAGE) == 1
    assert kernel.counters["stack_growth"] > 0
    with pytest.raises(sc.PageFault):
        process.write(top - (8 << 20) - PAGE, 1)


def test_dead_tables_become_data_and_meet_a_flood():
    kernel = boot("cached")
    process = kernel.spawn()
    parent = process.mmap(600 * PAGE)
    process.sweep(parent, 600, write=True)
    process.sweep(parent, 600)
    child = process.fork()
    child.sweep(parent, 600)
    child.exit()
    process.sweep(process.mmap(300 * PAGE), 300, write=True)
    assert kernel.counters["tables_reused"] > 0
    assert kernel.vm.stats.mmu_flooded > 0
    kernel.vm.audit(strict=True)


@pytest.mark.parametrize("mode", MODES)
def test_large_pages(mode):
    kernel = boot("cached", "64MiB", mode=mode, large_pages=4)
    span = 4 << 20 if mode == "32" else 2 << 20
    file = kernel.file(2 * span // PAGE, large=True)
    process = kernel.spawn()
    base = process.mmap(2 * span, file=file)
    assert base % span == 0
    process.sweep(base, 2 * span // PAGE, write=True)
    child = process.fork()
    process.write(base + span + 24, 77)
    assert child.read(base + span + 24) == 77
    translation = kernel.vm.vcpus[0].translate(base + span, user=True)
    assert translation.page_size == span
    assert kernel.frames["large_free"] == 2
    with pytest.raises(sc.ConfigError, match="munmap"):
        process.munmap(base + PAGE, PAGE)
    with pytest.raises(sc.ConfigError, match="mprotect"):
        process.mprotect(base, span, Prot.READ)
    process.munmap(base, span)
    with pytest.raises(sc.PageFault):
        process.read(base)
    check_frames(kernel)
    assert all_free(kernel, [file])


@pytest.mark.parametrize("mode", MODES)
def test_swap(mode):
    kernel = boot("cached", "16MiB", mode=mode, swap_pages=2000)
    process = kernel.spawn()
    base = process.mmap(7000 * PAGE)  # more than there is
    values = np.arange(4500, dtype=np.uint64) * 3 + 1
    addresses = base + np.arange(4500) * PAGE
    assert process.touch(addresses, True, values) == 0
    assert process.swapped > 0
    assert (process.access(addresses)[1] == values).all()
    with pytest.raises(sc.GuestOutOfMemory):
        process.sweep(base + 4500 * PAGE, 2500, write=True)
    with pytest.raises(sc.GuestOutOfMemory):  # a page that comes back needs a frame as well
        process.access(addresses)
    process.munmap(base + 4500 * PAGE, 2500 * PAGE)
    assert (process.access(addresses)[1] == values).all()
    check_frames(kernel)
    assert all_free(kernel, [])
    assert kernel.swap_used == 0


def test_out_of_memory_leaves_a_guest_that_goes_on():
    kernel = boot("cached", "8MiB")
    parent = kernel.spawn()
    base = parent.mmap(4000 * PAGE)
    with pytest.raises(sc.GuestOutOfMemory, match="no free frame"):
        parent.sweep(base, 4000, write=True)
    with pytest.raises(sc.GuestOutOfMemory):
        parent.fork()
    with pytest.raises(sc.GuestOutOfMemory):
        parent.exec()
    with pytest.raises(sc.GuestOutOfMemory):
        kernel.spawn()
    assert [process.number for process in kernel.processes] == [parent.number]
    check_frames(kernel)
    parent.munmap(base, 2000 * PAGE)
    child = parent.fork()
    child.write(base + 2000 * PAGE, 1)
    kernel.vm.audit(strict=True)
    assert all_free(kernel, [])
    with pytest.raises(sc.GuestOutOfMemory, match="does not hold"):
        boot(memory="128KiB")


# What a sloppy kernel forgets, and where its processes then may see what is no longer so.


def stale(sloppy, mmu, tlb, act):
    kernel = boot(mmu, tlb=tlb, sloppy=sloppy)
    process = kernel.spawn()
    base = process.mmap(8 * PAGE)
    process.touch(base + np.arange(8) * PAGE, True, np.arange(8))
    process.access(base + np.arange(8) * PAGE)
    return act(kernel, process, base)


def unmap(kernel, process, base):
    process.munmap(base, 4 * PAGE)
    return tuple(process.access(base + np.arange(8) * PAGE)[0])


def protect(kernel, process, base):
    process.mprotect(base, 4 * PAGE, Prot.READ)
    return tuple(process.access(base + np.arange(8) * PAGE, True, 9)[0])


def fork(kernel, process, base):
    child = process.fork()
    process.touch(base + np.arange(4) * PAGE, True, 99)
    return tuple(child.access(base + np.arange(8) * PAGE)[1])


@pytest.mark.parametrize(
    ("name", "act", "right"),
    [
        ("munmap", unmap, (1, 1, 1, 1, 0, 0, 0, 0)),
        ("mprotect", protect, (1, 1, 1, 1, 0, 0, 0, 0)),
        ("fork", fork, (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_a_forgotten_flush_shows_only_where_hardware_may(name, act, right):
    """Without a TLB `native` and `cached` are exact whatever the guest forgets. With one, and in `flush`, which works
    like one, the pages whose flush was forgotten, and no others, may be as they were."""
    for mmu, tlb in (("native", None), ("cached", None), ("native", sc.TLB()), ("cached", sc.TLB()), ("flush", None)):
        assert stale((), mmu, tlb, act) == right
    assert stale((name,), "native", None, act) == right
    assert stale((name,), "cached", None, act) == right
    for mmu, tlb in (("native", sc.TLB()), ("flush", None)):
        seen = stale((name,), mmu, tlb, act)
        assert seen != right
        assert seen[4:] == right[4:]
    # An exit of the shadow MMU may have flushed, so that with `cached` and a TLB either is allowed, page by page.
    assert stale((name,), "cached", sc.TLB(), act)[4:] == right[4:]


def test_a_sloppy_kernel_may_destroy_its_guest_but_nothing_else():
    """Frames that are freed while a TLB knows them: tables are overwritten. What comes of it is a panic, a refusal,
    or nothing, and never more."""
    panics = 0
    for seed in range(6):
        kernel = boot("flush", "8MiB", sloppy=("munmap", "fork", "cow"), seed=seed)
        rng = random.Random(seed)
        process = kernel.spawn()
        try:
            for _ in range(60):
                base = process.mmap(40 * PAGE)
                process.scatter(base, 40 * PAGE, 100, write=True)
                process.munmap(base, 40 * PAGE)
                other = process.mmap(1 << 20, addr=0x60000000 + rng.randrange(64) * (4 << 20))
                process.sweep(other, 4, write=True)
                process.scatter(base, 40 * PAGE, 100, write=True)
                process.munmap(other, 1 << 20)
        except (sc.GuestPanic, sc.GuestOutOfMemory):
            panics += 1
            if kernel.vm.audit().ok:
                continue
    assert panics


def test_broken_tables_are_a_panic():
    kernel = boot("native")
    process = kernel.spawn()
    base = process.mmap(PAGE)
    process.write(base, 1)
    tables = kernel.vm.memory.bytes[process.root : process.root + 4096].view(np.uint64)
    tables[:256] |= np.uint64(0xFFFF_FFFF_F000)
    with pytest.raises(sc.GuestPanic):
        process.munmap(base, PAGE)
    with pytest.raises(sc.GuestPanic, match="has stopped"):
        kernel.spawn()


@pytest.mark.parametrize("mode", MODES)
def test_a_recording_repeats_itself(mode):
    kernel = boot("native", "16MiB", mode=mode, swap_pages=128)
    kernel.record()
    life(kernel)
    ops = kernel.recording
    assert ops.dtype == sc.OP_DTYPE
    for mmu in ("native", "cached"):
        again = boot(mmu, "16MiB", mode=mode, swap_pages=128)
        result = again.vm.vcpus[0].run(ops)
        assert (again.vm.memory.bytes & 0x9F == kernel.vm.memory.bytes & 0x9F).all()
        assert np.count_nonzero(result.outcome) == kernel.counters["faults"]
        again.vm.audit(strict=True)


def test_switches_load_cr3_once_and_pcids_keep():
    for pcid in (False, True):
        kernel = boot("native", tlb=sc.TLB(), pcid=pcid)
        pair = [kernel.spawn(), kernel.spawn()]
        for process in pair:
            process.sweep(process.mmap(4 * PAGE, addr=0x50000000), 4, write=True)
        before = kernel.counters
        kernel.vm.stats.reset()
        for _ in range(10):
            for process in pair:
                process.sweep(0x50000000, 4)
        assert kernel.counters["cr3_loads"] - before["cr3_loads"] == 20
        kernel.switch(None)
        pair[1].sweep(0x50000000, 4)  # still loaded
        assert kernel.counters["cr3_loads"] - before["cr3_loads"] == 20
        assert (kernel.vm.stats.tlb_misses < 20) is pcid


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"mode": "16"}, "mode"),
        ({"direct_map": "big"}, "direct_map"),
        ({"direct_map": "huge", "mode": "pae"}, "direct_map"),
        ({"isolation": True, "mode": "32"}, "isolation"),
        ({"pcid": True, "mode": "pae"}, "pcid"),
        ({"sloppy": ("everything",)}, "sloppy"),
        ({"sloppy": "munmap"}, "sloppy"),
        ({"atomic_bytes": 2}, "atomic_bytes"),
        ({"fault_around": 3}, "fault_around"),
        ({"fault_around": 0}, "fault_around"),
        ({"swap_pages": -1}, "swap_pages"),
        ({"swap_pages": 1 << 20}, "swap_pages"),
        ({"max_processes": 0}, "max_processes"),
        ({"seed": 1.5}, "seed"),
        ({"kernel_work": 1 << 30}, "kernel_work"),
    ],
)
def test_bad_options(options, field):
    with pytest.raises(sc.ConfigError, match=f"^{field}"):
        sc.KernelOptions(**options)


def test_bad_machines():
    def refused(match, vm, **options):
        with pytest.raises(sc.ConfigError, match=match):
            sc.Kernel(vm, sc.KernelOptions(**options))

    refused("at most 939524096", sc.VM("1GiB"), mode="32")
    refused("at most 939524096", sc.VM("900MiB"), mode="pae")
    refused("from 0", sc.VM([sc.MemorySlot(1 << 20, "16MiB")]))
    refused("features.la57", sc.VM(features=sc.Features(la57=False)), mode="la57")
    refused("features.pcid", sc.VM(features=sc.Features(pcid=False)), pcid=True)
    refused("features.gbpages", sc.VM("2GiB", features=sc.Features(gbpages=False)), direct_map="huge")
    refused("vcpus", sc.VM(vcpus=2))
    refused("large_pages", sc.VM("16MiB"), large_pages=5)
    vm = sc.VM("16MiB")
    sc.Kernel(vm)
    refused("paging on", vm)
    with pytest.raises(sc.ConfigError, match="vm"):
        sc.Kernel("cached")
    with pytest.raises(sc.ConfigError, match="options"):
        sc.Kernel(sc.VM("16MiB"), {"mode": "64"})
    assert sc.Kernel(sc.VM("2GiB", mmu="native"), sc.KernelOptions(direct_map="huge")).spawn().read(0x7FFFFFFFEFF8) == 0


def test_bad_calls():
    kernel = boot("native")
    process = kernel.spawn()
    base = process.mmap(4 * PAGE)
    for match, call in [
        ("addr", lambda: process.munmap(base + 8, PAGE)),
        ("length", lambda: process.mmap(0)),
        ("length", lambda: process.mmap(1 << 60)),
        ("prot", lambda: process.mmap(PAGE, 8)),
        ("file", lambda: process.mmap(PAGE, shared=True)),
        ("file", lambda: process.mmap(PAGE, file=sc.File(7, 1))),
        ("program", lambda: kernel.spawn("sh")),
        ("program", lambda: process.exec(sc.Program(5, 1, 1, 1))),
        ("size", lambda: process.touch([base], size=16)),
        ("addresses", lambda: process.touch([[base]])),
        ("addresses", lambda: process.touch([-1])),
        ("addresses", lambda: process.touch([0.5])),
        ("write", lambda: process.touch([base, base], np.array([True]))),
        ("values", lambda: process.touch([base, base], True, [1])),
        ("no such pipe", lambda: process.send(0, base, 8)),
        ("count", lambda: process.scatter(base, 4, 1)),
        ("calls", lambda: kernel.run([1, 2])),
        ("no such number", lambda: kernel.call(sc.Call.SWITCH, 1 << 20)),
        ("ended", lambda: kernel.call(sc.Call.SWITCH, 5)),
        (r"\(op 99\)", lambda: kernel.call(99)),
        ("flags", lambda: kernel.call(sc.Call.TOUCH, 0, base, 1, 8, flags=3)),
        ("mprotect", lambda: process.mprotect(base, 5 * PAGE, Prot.READ)),
        ("pages", lambda: kernel.file(0)),
        ("process", lambda: kernel.switch(3)),
    ]:
        with pytest.raises(sc.ConfigError, match=match):
            call()
    pipe = kernel.pipe()
    for length in (0, 7, 4104):
        with pytest.raises(sc.ConfigError, match="addr, count"):
            process.send(pipe, base, length)
    with pytest.raises(sc.ConfigError, match="rights"):
        process.send(pipe, 0x10000, 8)
    with pytest.raises(sc.GuestOutOfMemory, match="no room"):
        process.mmap(PAGE, addr=base)
    with pytest.raises(sc.GuestOutOfMemory, match="no room"):
        process.brk(PAGE)
    for addr in (0, kernel.task_size, kernel.direct_map, 1 << 63):
        with pytest.raises(sc.PageFault):
            process.read(addr)
    ended = process.fork()
    ended.exit()
    with pytest.raises(sc.ConfigError, match="has ended"):
        ended.read(base)
    assert process.fork() != ended
    calls = np.zeros(3, dtype=sc.CALL_DTYPE)
    calls["op"] = (sc.Call.SYSCALL, sc.Call.SYSCALL, 77)
    before = kernel.counters
    with pytest.raises(sc.ConfigError, match=r"calls\[2\]"):
        kernel.run(calls)
    assert kernel.counters == before


def test_room_in_its_tables():
    kernel = boot("native", max_processes=2, max_mappings=8, max_files=3, max_programs=1, max_pipes=1)
    kernel.pipe()
    with pytest.raises(sc.ConfigError, match="max_pipes"):
        kernel.pipe()
    kernel.program()
    with pytest.raises(sc.ConfigError, match="max_programs"):
        kernel.program()
    kernel.file(1)
    kernel.file(1)
    with pytest.raises(sc.ConfigError, match="max_files"):
        kernel.file(1)
    process = kernel.spawn()
    kernel.spawn()
    with pytest.raises(sc.GuestOutOfMemory, match="max_processes"):
        process.fork()
    for i in range(6):
        process.mmap(PAGE, addr=0x50000000 + 2 * i * PAGE)
    with pytest.raises(sc.GuestOutOfMemory, match="max_mappings"):
        process.mmap(PAGE, addr=0x60000000)
    assert len(process.mappings) == 7


def test_a_pool_that_is_too_small_is_said():
    with pytest.raises(sc.PoolExhausted):
        boot(sc.Shadow.cached(pool_pages=4), mode="la57").spawn().write(0x7FFFFFFFE000, 1)


def test_pipes_carry_what_was_written():
    kernel = boot()
    pipe = kernel.pipe()
    writer, reader = kernel.spawn(), kernel.spawn()
    base = writer.mmap(2 * PAGE)
    into = reader.mmap(PAGE)
    words = np.arange(512, dtype=np.uint64) * 7 + 1
    writer.touch(base + 8 * np.arange(512), True, words)
    for length in (8, 104, 4096):
        writer.send(pipe, base, length)
    writer.touch(base + 8 * np.arange(512), True, words + 1)  # the pipe has a copy
    for length in (8, 104, 4096):
        reader.munmap(into, PAGE)
        reader.mmap(PAGE, addr=into)
        reader.receive(pipe, into)
        expected = np.where(np.arange(512) * 8 < length, words, 0)
        assert (reader.access(into + 8 * np.arange(512))[1] == expected).all()
    before = kernel.counters["pipe_blocked"]
    reader.receive(pipe, into)
    for _ in range(17):
        writer.send(pipe, base, 8)
    assert kernel.counters["pipe_blocked"] == before + 2
    with pytest.raises(sc.ConfigError, match="rights"):
        reader.receive(pipe, 0x1000)
    assert all_free(kernel, []) is False  # 16 buffers wait in the pipe
    assert kernel.frames["kernel"] == 16


def test_ctrl_c_leaves_a_guest_that_goes_on():
    kernel = boot("native")
    process = kernel.spawn()
    base = process.mmap(64 * PAGE)
    process.sweep(base, 64, write=True)
    timer = threading.Timer(0.2, signal.raise_signal, [signal.SIGINT])
    timer.start()
    with pytest.raises(sc.Interrupted):
        process.scatter(base, 64 * PAGE, 1 << 40)
    timer.join()
    assert process.sweep(base, 64) == 0
    assert all_free(kernel, [])


def test_one_user_at_a_time():
    kernel = boot("native")
    process = kernel.spawn()
    base = process.mmap(64 * PAGE)
    seen = []

    def disturb():
        time.sleep(0.1)
        for call in (kernel.spawn, lambda: process.read(base), lambda: kernel.file(1), lambda: kernel.vm.audit()):
            try:
                call()
            except sc.EngineError as error:
                seen.append(error)
        signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=disturb)
    thread.start()
    with pytest.raises(sc.Interrupted):
        process.scatter(base, 64 * PAGE, 1 << 40)
    thread.join()
    assert len(seen) == 4


@pytest.mark.parametrize("isolation", [False, True])
def test_a_process_that_does_not_run_is_flushed_when_it_does(isolation):
    """With PCIDs its translations are still in the TLB when its pages are taken and given to another process."""
    kernel = boot("native", "8MiB", tlb=sc.TLB(), pcid=True, isolation=isolation, swap_pages=64)
    victim, thief = kernel.spawn(), kernel.spawn()
    base = victim.mmap(20 * PAGE)
    victim.touch(base + np.arange(20) * PAGE, True, np.arange(20))
    thief.switch()
    victim.swap_out()
    assert victim.swap_out() > 0
    other = thief.mmap(40 * PAGE)
    thief.touch(other + np.arange(40) * PAGE, True, 12345)
    assert (victim.access(base + np.arange(20) * PAGE)[1] == np.arange(20)).all()


def test_entries_of_two_halves_appear_and_go_as_one():
    """PAE: what has P is stored last when an entry is made, and first when it is cleared."""
    kernel = boot("native", mode="pae")
    process = kernel.spawn()
    base = process.mmap(PAGE, addr=0x50000000)
    process.mmap(PAGE, addr=base + PAGE)
    process.write(base + PAGE, 1)  # so that the table is there, and stays
    kernel.record()
    process.write(base, 1)
    leaf = kernel.vm.vcpus[0].walk_levels(base)[-1][1] + kernel.direct_map
    process.munmap(base, PAGE)
    ops = kernel.recording
    stores = [op for op in ops.tolist() if op[3] & ~7 == leaf and op[0] in (sc.Op.WRITE, sc.Op.XCHG) and op[2] == 4]
    assert [(op[3] - leaf, op[4] & 1) for op in stores] == [(4, 0), (0, 1), (0, 0), (4, 0)]


@pytest.mark.parametrize("options", [{}, {"pcid": True}, {"isolation": True}, {"isolation": True, "pcid": True}])
@pytest.mark.parametrize("count", [1, 33, 34])
def test_flushes_reach_the_root_that_user_code_runs_on(options, count):
    """Under isolation with PCIDs, INVLPG in the kernel does not: the next load of the user's root flushes."""
    kernel = boot("native", tlb=sc.TLB(small_entries=256), **options)
    process = kernel.spawn()
    base = process.mmap(40 * PAGE)
    pages = base + np.arange(40) * PAGE
    process.touch(pages, True)
    process.access(pages)
    before = kernel.counters
    kernel.record()
    process.munmap(base, count * PAGE)
    process.read(base + 39 * PAGE)
    process.syscall()
    process.read(base + 39 * PAGE)
    loads = [op for op in kernel.recording.tolist() if op[0] == sc.Op.CR3 and op[4] & 0x800]
    if len(options) == 2:  # of the user's root: one that flushes, and one that need not
        assert [op[4] >> 63 for op in loads] == [0, 1]
    kernel.record(False)
    assert kernel.counters["invlpg"] - before["invlpg"] == (count if count <= 33 else 0)
    assert (process.access(pages)[0] == (np.arange(40) < count)).all()
    process.mprotect(base + 39 * PAGE, PAGE, Prot.READ)
    assert process.access(pages[-1:], True)[0] == [1]
