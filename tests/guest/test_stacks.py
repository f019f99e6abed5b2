"""Kernel stacks in an area of their own: where they are mapped, which are kept, and when their addresses come back."""

import itertools

import pytest
from kernels import DESIGNS, EXACT_FLUSH, boot, check_frames

import shadowcore as sc

AREA = {"64": 0xFFFFC90000000000, "la57": 0xFFA0000000000000}
STEP = 8 * 4096
MAPPED = {"vmap_stacks": True}


def mapped(kernel, places=64):
    """The places of the area at which a stack is mapped, each with its four gfns."""
    cpu, base = kernel.vm.vcpus[0], AREA[kernel.options.mode]
    found = {}
    for number in range(places):
        gfns = []
        for page in range(8):
            try:
                gfns.append(cpu.translate(base + number * STEP + page * 4096).gpa >> 12)
            except sc.PageFault:
                break
        if gfns:
            found[number] = gfns
            assert len(gfns) == 4  # and a page behind them that is none
    return found


@pytest.mark.parametrize("mode", ["64", "la57"])
@pytest.mark.parametrize("mmu", DESIGNS)
def test_each_process_has_a_stack_of_four_pages(mode, mmu):
    kernel = boot(DESIGNS[mmu], mode=mode, grouped=True, **MAPPED)
    shell = kernel.spawn()
    children = [shell.fork() for _ in range(3)]
    for child in children:
        child.switch()
    found = mapped(kernel)
    assert list(found) == [0, 1, 2, 3]
    assert len(set(itertools.chain(*found.values()))) == 16
    assert kernel.frames["kernel"] == 16 + (3 if mode == "la57" else 2)  # and the tables below the top one
    assert kernel.counters["stacks_mapped"] == 4
    found = kernel.vm.vcpus[0].translate(AREA[mode], access="w")
    assert found.writable
    assert not found.user
    assert not found.executable
    check_frames(kernel)
    assert kernel.vm.audit().ok


def test_two_are_kept_and_serve_again():
    """Three children die: two stacks are kept, the third is unmapped, but for its address. The next three find them."""
    kernel = boot("unsync", **MAPPED)
    shell = kernel.spawn()
    for last in (1, 2, 3):
        children = [shell.fork() for _ in range(3)]
        for child in children:
            child.sweep(0x7FFFFFFFE000, 1, write=True)
            child.exit()
        shell.switch()
        assert kernel.counters["stacks_mapped"] == 3 + last
        assert kernel.counters["stacks_unmapped"] == last
        assert len(mapped(kernel)) == 3
        assert kernel.frames["kernel"] == 12 + 2
    assert list(mapped(kernel)) == [0, 1, 2]  # the third and those after it, each at a new address, are gone
    shell.fork().exit()
    assert kernel.counters["stacks_mapped"] == 6


def test_a_stack_is_left_before_it_is_given_up():
    """A process that has ended is on its stack until another one runs."""
    kernel = boot("cached", **MAPPED)
    first, second, third, fourth = (kernel.spawn() for _ in range(4))
    for process in (first, second, third):
        process.exit()
    assert kernel.counters["stacks_unmapped"] == 0
    fourth.switch()
    assert kernel.counters["stacks_unmapped"] == 1


def test_addresses_come_back_after_a_flush_of_everything(tmp_path):
    """8,192 pages of addresses, five a stack, are lost before; then CR4.PGE changes twice. A recording has that."""
    kernel = boot("unsync", "32MiB", sc.TLB(), max_processes=8, **MAPPED)
    shell = kernel.spawn()
    lost = 8192 // 5

    def three_die():
        for child in [shell.fork() for _ in range(3)]:
            child.exit()
        shell.switch()

    for _ in range(lost):
        three_die()
    assert kernel.counters["stacks_unmapped"] == lost
    assert list(mapped(kernel, lost + 8)) == [0, 1, 2]
    kernel.vm.save(tmp_path / "before")
    flushes = kernel.counters["full_flushes"]
    kernel.record()
    three_die()
    children = [shell.fork() for _ in range(3)]
    assert list(mapped(kernel, lost + 8)) == [0, 1, 2, 3]
    assert kernel.counters["full_flushes"] == flushes + 1 + 3  # one, and those of three exits
    ops = kernel.recording
    loads = ops[ops["op"] == sc.Op.CR4]["value"]
    assert int(loads[0]) ^ int(loads[1]) == 1 << 7
    again = sc.VM.load(tmp_path / "before")
    assert not again.vcpus[0].run(ops).outcome.any()
    assert (again.memory.bytes == kernel.vm.memory.bytes).all()
    assert all(child.alive for child in children)
    assert kernel.vm.audit().ok


@pytest.mark.parametrize("options", [{}, {"isolation": True}, {"pcid": True}, {"global_": False, "direct_map": "4k"}])
def test_no_design_changes_what_the_guest_sees(options):
    def history(mmu, **machine):
        kernel = boot(mmu, regions=True, heap_gap=600, **MAPPED, **options, **machine)
        shell = kernel.spawn(kernel.program(text=20, data=4))
        for number in range(4):
            children = [shell.fork() for _ in range(3)]
            for child in children:
                if number & 1:
                    child.exec(kernel.program(text=20, data=4))
                child.sweep(0x400000, 24)
                child.exit()
        shell.switch()
        assert kernel.vm.audit().ok
        check_frames(kernel)
        return kernel.history

    machines = [(mmu, tlb) for mmu in ("native", EXACT_FLUSH, "cached", "unsync", None) for tlb in (None, sc.TLB())]
    assert len({history(mmu, tlb=tlb) for mmu, tlb in machines}) == 1


def test_on_several_processors():
    """Each keeps two."""
    kernel = boot("unsync", vcpus=2, **MAPPED)
    shell = kernel.spawn()
    shell.switch()
    children = [shell.fork() for _ in range(6)]
    for processor in range(2):
        kernel.call(sc.Call.CPU, value=processor)
        for child in children[3 * processor : 3 * processor + 3]:
            child.sweep(0x7FFFFFFFE000, 1, write=True)
            child.exit()
        shell.switch()
    assert kernel.counters["stacks_unmapped"] == 2
    assert len(mapped(kernel)) == 5
    assert kernel.vm.audit().ok


def test_no_memory_for_a_stack():
    """What was taken for it is given back, and the kernel goes on."""
    kernel = boot("cached", "2MiB", **MAPPED, max_processes=256, kernel_data=4)
    processes = []
    while kernel.frames["free"] >= 12:
        processes.append(kernel.spawn())
    while kernel.frames["free"]:
        try:
            processes.append(kernel.spawn())
        except sc.GuestOutOfMemory:
            break
    check_frames(kernel)
    free = kernel.frames["free"]
    with pytest.raises(sc.GuestOutOfMemory):
        kernel.spawn()
    assert kernel.frames["free"] == free
    for process in processes:
        process.exit()
    assert len(mapped(kernel, 256)) == 2
    kernel.spawn()
    assert kernel.vm.audit().ok


@pytest.mark.parametrize("heap_gap", [0, 1, 600, 8191])
def test_a_heap_apart(heap_gap):
    kernel = boot("unsync", heap_gap=heap_gap)
    process = kernel.spawn(kernel.program(text=3, data=2, bss=1))
    start, end = process.heap
    assert start == end == 0x400000 + (3 + 2 + 1 + 1 + heap_gap) * 4096
    process.sweep(0x400000, 1)
    tables = process.tables
    process.brk(start + 4096)
    process.sweep(start, 1, write=True)
    assert process.tables - tables == (heap_gap >= 600)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"vmap_stacks": True, "mode": "pae"}, "vmap_stacks: mode '64' or 'la57' is needed, not 'pae'"),
        ({"vmap_stacks": "no"}, "vmap_stacks"),
        ({"heap_gap": 8192}, "heap_gap"),
        ({"heap_gap": -1}, "heap_gap"),
    ],
)
def test_bad_options(bad, message):
    with pytest.raises(sc.ConfigError, match=message):
        sc.KernelOptions(**bad)
