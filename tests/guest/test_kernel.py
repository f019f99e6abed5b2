"""The guest kernel: what its processes see, what becomes of its frames, and that no design changes any of it."""

import random

import numpy as np
import pytest
from kernel_model import PAGE, Files, Model, disk
from kernels import CASES, DESIGNS, EXACT_FLUSH, MODES, OPTIONS, RW, all_free, boot, check_frames, life

import shadowcore as sc
from shadowcore import Prot


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_random_programs_against_the_model(mode, name):
    """Random calls of several processes: each load sees what the model says, each refusal is the model's."""
    for seed, mmu in enumerate(("native", EXACT_FLUSH, "cached", None, "cached")):
        random_program(mode, OPTIONS[name], random.Random(f"{mode} {name} {seed}"), mmu, None)
        random_program(mode, OPTIONS[name], random.Random(f"{mode} {name} {seed} TLB"), mmu, sc.TLB())


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_random_programs_on_several_processors(mode, name):
    """Every step on any of three processors, each with a TLB: whoever changes an entry flushes it everywhere."""
    for mmu in ("native", EXACT_FLUSH, "cached", None):
        random_program(mode, OPTIONS[name], random.Random(f"{mode} {name} {mmu}"), mmu, sc.TLB(), vcpus=3)


def random_program(mode, options, rng, mmu, tlb, vcpus=1):
    kernel = boot(mmu, "24MiB", tlb, vcpus, mode=mode, swap_pages=256, seed=7, **options)
    files = Files()
    on_disk = [kernel.file(40), kernel.file(9)]
    shared = kernel.file(24, zero=True)
    pipe = kernel.pipe()
    first = process = kernel.spawn()
    models = {first: Model(files)}
    spaces = {first: []}
    for step in range(500):
        if vcpus > 1 and rng.random() < 0.4:
            kernel.call(sc.Call.CPU, value=rng.randrange(vcpus))
        if vcpus == 1 or process not in models or rng.random() < 0.1:
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
@pytest.mark.parametrize("mmu", ["native", "flush", "cached", "unsync"])
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


@pytest.mark.parametrize("mode", MODES)
def test_a_recording_repeats_itself(mode):
    kernel = boot("native", "16MiB", mode=mode, swap_pages=128)
    kernel.record()
    life(kernel)
    ops = kernel.recording
    assert ops.dtype == sc.OP_DTYPE
    for mmu in ("native", "cached", "unsync"):
        again = boot(mmu, "16MiB", mode=mode, swap_pages=128)
        result = again.vm.vcpus[0].run(ops)
        assert (again.vm.memory.bytes & 0x9F == kernel.vm.memory.bytes & 0x9F).all()
        assert np.count_nonzero(result.outcome) == kernel.counters["faults"]
        again.vm.audit(strict=True)


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
