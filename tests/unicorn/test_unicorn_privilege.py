"""For whom a guest in Unicorn makes its accesses: user code, the supervisor, or the processor itself, which reads the
IDT, GDT, LDT and TSS as the supervisor at any CPL, and not by leave of EFLAGS.AC (SDM vol. 3, 4.6.1)."""

import struct

import pytest

import shadowcore as sc

pytest.importorskip("unicorn", minversion="2.1", reason="the extra 'unicorn' is not installed")
from unicorn_smap import (
    CALLED,
    FAULTED,
    FRESH,
    HANDLED,
    OTHER,
    PAGES,
    USER_CODE,
    USER_STACK,
    descriptor,
    gate,
    load_flags,
    outcome,
    start,
)

from shadowcore import unicorn as su

AC = 1 << 18
UD2 = b"\x0f\x0b"
TRIPLE = "triple fault"
END = bytes.fromhex("b033 e6f4 f4")  # 0x33 to the port
GDT, LDT, TSS = PAGES["gdt"], PAGES["ldt"], PAGES["tss"]
everywhere = pytest.mark.parametrize(
    ("mmu", "way", "record"),
    [
        (mmu, way, way == "fills+")
        for mmu in ("native", "flush", "cached", "unsync")
        for way in ("walker", "fills", "fills+")
    ],
)


def run(code, mmu, way, record, **settings):
    """With way "fills+" every fill is served by Python, for all of them are recorded."""
    return outcome(start(code, mmu, way.rstrip("+"), record=record, **settings))


def flag(cpl, on):
    """AC the other way while a page is touched for the first time, so that the MMU learns of it; then as asked."""
    if cpl:
        return load_flags(0x3002 | AC * (not on)) + bytes.fromhex("8b1d 00304000") + load_flags(0x3002 | AC * on)
    clac, stac = bytes.fromhex("0f01ca"), bytes.fromhex("0f01cb")
    this, other = (stac, clac) if on else (clac, stac)
    return other + b"\xa1" + struct.pack("<I", FRESH) + this


@everywhere
@pytest.mark.parametrize("ac", [0, 1])
@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("place", [None, "idt", "gdt", "tss", "stack"])
def test_an_exception_with_smap_and_a_user_page_on_its_way(place, cpl, ac, mmu, way, record):
    user_pages = [] if place is None else [place]
    expected = HANDLED if place is None or (place == "stack" and ac) or (place == "tss" and not cpl) else TRIPLE
    assert run(flag(cpl, ac) + UD2, mmu, way, record, cpl=cpl, user_pages=user_pages) == expected
    assert run(flag(cpl, ac) + UD2, mmu, way, record, cpl=cpl, user_pages=user_pages, smap=False) == HANDLED


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("mmu", ["native", "flush", "cached", "unsync"])
def test_a_replay_makes_the_same_implicit_accesses(mmu, way):
    code = bytes.fromhex("0f20e0 0d00002000 0f22e0")  # SMAP on
    machine = start(code + flag(0, 1) + UD2, mmu, way, user_pages=["stack"], smap=False, record=True)
    assert outcome(machine) == HANDLED
    other = sc.VM("16MiB", mmu, features=machine.vm.features)
    machine.recording.replay(other)
    assert other.stats.as_dict() == machine.vm.stats.as_dict()
    assert other.vcpus[0].ac
    assert machine.cpu.ac


LOAD_FS = b"\x66\xb8%c\x00\x8e\xe0" + END  # mov ax, selector; mov fs, ax


@everywhere
@pytest.mark.parametrize("smap", [False, True])
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        pytest.param(LOAD_FS % 0x3B, 0x33, id="descriptor that is not accessed so far"),
        pytest.param(LOAD_FS % 0x0F, 0x33, id="LDT"),
        pytest.param(b"\x66\xb9\x3b\0\x0f\x02\xc1" + END, 0x33, id="LAR"),
        pytest.param(b"\xa1" + struct.pack("<I", GDT) + END, FAULTED + 5, id="load from the GDT"),
        pytest.param(b"\x90\xa3" + struct.pack("<I", GDT) + END, FAULTED + 7, id="store to the GDT"),
        pytest.param(b"\xa1" + struct.pack("<I", LDT) + END, FAULTED + 5, id="load from the LDT"),
        pytest.param(b"\xa1" + struct.pack("<I", TSS) + END, FAULTED + 5, id="load from the TSS"),
        pytest.param(b"\xa1" + struct.pack("<I", OTHER) + END, FAULTED + 5, id="load from another page"),
        pytest.param(bytes.fromhex("9a 00000000 4300"), CALLED, id="call gate"),
    ],
)
def test_user_code_and_what_the_processor_does_for_it(code, expected, smap, mmu, way, record):
    assert run(code, mmu, way, record, cpl=3, smap=smap) == expected


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("mmu", ["native", "flush", "cached", "unsync"])
def test_a_far_return_of_user_code_from_a_stack_of_the_kernel(mmu, record):
    """By Unicorn's walker it would pass."""
    machine = start(b"\xbc" + struct.pack("<I", OTHER + 8) + b"\xcf", mmu, "fills", cpl=3, record=record)
    assert outcome(machine) == FAULTED + 5
    assert machine.cpu.cr2 == OTHER + 8


@everywhere
@pytest.mark.parametrize("before", [b"", b"\xa1" + struct.pack("<I", LDT)], ids=["alone", "after a load of its own"])
def test_smap_refuses_descriptors_in_a_user_page(before, mmu, way, record):
    code = load_flags(0x3002 | AC) + before + LOAD_FS % 0x0F
    for smap, expected in ((True, FAULTED + 1), (False, 0x33)):
        assert run(code, mmu, way, record, cpl=3, user_pages=["ldt"], smap=smap) == expected


@everywhere
def test_user_code_returns_to_itself_with_smap(mmu, way, record):
    """Unicorn pops the frame as the supervisor."""
    frame = b"".join(b"\x68" + struct.pack("<I", word) for word in (0x23, USER_STACK, 0x3002, 0x1B, USER_CODE + 0x40))
    code = (frame + b"\xcf").ljust(0x40 - 4, b"\xcc") + END
    assert run(code, mmu, way, record, cpl=3) == 0x33
    far_call = b"\x9a" + struct.pack("<IH", USER_CODE + 0x40, 0x1B)
    assert run(far_call.ljust(0x40 - 4, b"\xcc") + END, mmu, way, record, cpl=3) == 0x33


@everywhere
def test_int_n_in_user_code_with_smep(mmu, way, record):
    """The instruction is read as user code, not as the supervisor, whom SMEP forbids its page."""
    machine = start(b"\xcd\x06", mmu, way.rstrip("+"), cpl=3, record=record)
    machine.cpu.cr4 |= 1 << 20
    assert outcome(machine) == HANDLED


@everywhere
@pytest.mark.parametrize(("stack", "expected"), [(USER_STACK, 0x33), (OTHER + 0x1000, FAULTED + 7)])
def test_a_frame_for_user_code_is_stored_as_user_code_does(stack, expected, mmu, way, record):
    machine = start(b"\xbc" + struct.pack("<I", stack) + UD2, mmu, way.rstrip("+"), cpl=3, record=record)
    user_gate = bytearray(gate(USER_CODE + 0x100))
    user_gate[2] = 0x1B
    machine.vm.write_physical(PAGES["idt"] + 8 * 6, bytes(user_gate))
    machine.vm.write_physical(0x20100, END)
    assert outcome(machine) == expected


@everywhere
def test_the_code_segment_of_a_handler_is_read_from_the_gdt_each_time(mmu, way, record):
    """Also if CS has the same selector."""
    machine = start(UD2, mmu, way.rstrip("+"), record=record)
    machine.vm.write_physical(GDT + 8, descriptor(kind=0x1A))  # no longer present
    assert outcome(machine) == TRIPLE


@pytest.mark.parametrize("way", su.WAYS)
@pytest.mark.parametrize("cpl", [0, 3])
def test_after_a_run_the_vcpu_has_the_privilege_level_and_the_flag(cpl, way):
    for on in (False, True):
        machine = start(flag(cpl, on) + END, "cached", way, cpl=cpl)
        assert outcome(machine) == 0x33
        assert (machine.cpu.cpl, machine.cpu.ac) == (cpl, on)
