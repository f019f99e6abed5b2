"""Row 13: the engine as the function that Unicorn calls where its TLB misses, against a function that does nothing."""

import ctypes
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guests import MIB, PAGE, Guest
from yardsticks import NoCompiler, build

import shadowcore as sc
from shadowcore import embed

unicorn = pytest.importorskip("unicorn")

PAGES = 4096
"""That the loop loads from, one after the other: far more than Unicorn's TLB holds."""
LOOP = bytes.fromhex("488b07 4881c700100000 48ffc9 75f1")
"""mov rax, [rdi]; add rdi, 4096; dec rcx; jnz: a load and a miss each time."""
SOURCE = Path(__file__).with_name("fill.c")


class Machine(ctypes.Structure):
    _fields_ = (
        ("api", ctypes.c_void_p),
        ("vm", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("fills", ctypes.c_uint64),
    )


@pytest.fixture(scope="module")
def fills() -> Iterator[ctypes.CDLL]:
    with tempfile.TemporaryDirectory(prefix="shadowcore-fill-") as directory:
        try:
            built = build(SOURCE, directory, "-I", sc.get_include())
        except NoCompiler as error:
            pytest.skip(str(error))
        yield built


def runner(guest: Guest, function: Any, machine: Machine) -> Callable[[], int]:
    """Runs the loop over all pages; returns the calls that it made."""
    from unicorn import x86_const as x86
    from unicorn.unicorn_py3.unicorn import uclib

    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
    memory = guest.vm.memory.bytes
    uc.mem_map_ptr(0, memory.nbytes, unicorn.UC_PROT_ALL, memory.ctypes.data)
    hook = ctypes.c_size_t()
    pointer = ctypes.cast(function, ctypes.c_void_p)
    status = uclib.uc_hook_add(
        uc._uch,
        ctypes.byref(hook),
        unicorn.UC_HOOK_TLB_FILL,
        pointer,
        ctypes.cast(ctypes.pointer(machine), ctypes.c_void_p),
        ctypes.c_uint64(1),
        ctypes.c_uint64(0),
    )
    assert status == 0
    code = PAGES * PAGE

    def run() -> int:
        before = machine.fills
        uc.reg_write(x86.UC_X86_REG_RDI, 0)
        uc.reg_write(x86.UC_X86_REG_RCX, PAGES)
        uc.emu_start(code, code + len(LOOP))
        return machine.fills - before

    return run


@pytest.mark.benchmark(group="fill")
@pytest.mark.parametrize("design", ["native", "cached"])
def test_fill(side_by_side, fills, design):
    guest = Guest("64", 32 * MIB, design)
    guest.map().start()
    at = guest.table_room + PAGES * PAGE
    guest.vm.memory.bytes[at : at + len(LOOP)] = list(LOOP)
    number = embed.handle(guest.vm)
    ours = Machine(embed.table_address(), number, 0, 0)
    bare = Machine(None, 0, guest.table_room, 0)
    run, empty = runner(guest, fills.engine, ours), runner(guest, fills.nothing, bare)
    run()

    def check(calls: int) -> None:
        assert PAGES <= calls <= PAGES + 2

    check(empty())
    before = guest.vm.stats.accesses
    check(run())
    assert guest.vm.stats.accesses - before >= PAGES
    side_by_side(
        row=13,
        what=f"a miss of Unicorn's TLB, filled by the engine, {design}",
        goal=1.2,
        ours=run,
        operations=PAGES,
        yardstick=empty,
        units=PAGES,
        named="a C function that does nothing",
        check=check,
        counters=lambda _: {"accesses": PAGES},
    )
    embed.release(number)
