"""What embedding costs: a call through the table of C functions, and batches of plain arrays, against the engine's own
paths on the same accesses."""

import ctypes
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from guests import PAGE, Guest, accesses
from yardsticks import NoCompiler, build

import shadowcore as sc
from shadowcore import embed
from shadowcore.engine import access

OPERATIONS = 100_000
SOURCE = Path(__file__).with_name("capi_loop.c")
SIZES = {"hot": 1024, "walks": 1 << 16}
"""Pages that are accessed: as many as the memo of an MMU holds, and many more."""


@pytest.fixture(scope="module")
def loops() -> Iterator[ctypes.CDLL]:
    with tempfile.TemporaryDirectory(prefix="shadowcore-capi-") as directory:
        try:
            built = build(SOURCE, directory, "-I", sc.get_include())
        except NoCompiler as error:
            pytest.skip(str(error))
        yield built


def warm_guest(design: str, pages: int) -> tuple[Guest, np.ndarray]:
    guest = Guest("64", pages * PAGE, design if design == "native" else sc.Shadow.cached(pool_pages=2048))
    guest.map().start()
    rng = np.random.default_rng(3)
    gva = (rng.integers(0, pages, OPERATIONS) * PAGE + rng.integers(0, 512, OPERATIONS) * 8).astype(np.uint64)
    embed.access_many(guest.cpu, np.arange(pages, dtype=np.uint64) * np.uint64(PAGE), user=True)
    return guest, gva


def pointer(module: Any, name: str) -> int:
    """Address of a function that the module offers to Cython code."""
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    capsule = module.__pyx_capi__[name]
    return int(api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule)))


def structs(vm: sc.VM) -> tuple[int, int]:
    """Addresses of the structures behind a VM and its first vcpu."""
    from shadowcore.engine import vcpu

    mmu = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(pointer(vcpu, "mmu_struct"))(vm)
    first = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_uint32)(pointer(vcpu, "vcpu_struct"))(vm, 0)
    return int(mmu), int(first)


@pytest.mark.benchmark(group="capi")
@pytest.mark.parametrize("what", ["all", "brief", "priced"])
@pytest.mark.parametrize("pages", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("design", ["cached", "native"])
def test_access(side_by_side, loops, design, pages, what):
    """One access through the table, against vcpu_access called from the same C loop."""
    guest, gva = warm_guest(design, pages)
    number = embed.handle(guest.vm)
    api, vm = ctypes.c_void_p(embed.table_address()), ctypes.c_uint64(number)
    gpa, own = np.zeros_like(gva), np.zeros_like(gva)
    at = [ctypes.c_void_p(array.ctypes.data) for array in (gva, gpa, own)]
    n = ctypes.c_uint64(OPERATIONS)
    function = ctypes.c_void_p(pointer(access, "vcpu_access"))
    mmu, cpu = map(ctypes.c_void_p, structs(guest.vm))
    flags = 0 if what == "all" else 2
    if what == "priced":
        assert loops.price(api, vm) == 0

    def check(rc: int) -> None:
        assert rc == 0
        assert (gpa == own).all()

    side_by_side(
        row="C",
        what=f"access through the table, {design}, {pages} pages, {what}",
        goal=None,
        ours=lambda: loops.table_loop(api, vm, at[0], n, flags, at[1]),
        operations=OPERATIONS,
        yardstick=lambda: loops.engine_loop(function, mmu, cpu, at[0], n, at[2]),
        units=OPERATIONS,
        named="vcpu_access from C",
        check=check,
    )
    embed.release(number)


@pytest.mark.benchmark(group="capi")
@pytest.mark.parametrize("pages", SIZES.values(), ids=SIZES)
def test_access_many_in_c(side_by_side, loops, pages):
    guest, gva = warm_guest("cached", pages)
    number = embed.handle(guest.vm)
    api, vm = ctypes.c_void_p(embed.table_address()), ctypes.c_uint64(number)
    gpa = np.zeros_like(gva)
    at = [ctypes.c_void_p(array.ctypes.data) for array in (gva, gpa)]
    ops = accesses(gva, sc.Op.READ)
    side_by_side(
        row="C",
        what=f"access_many through the table, {pages} pages",
        goal=1.2,
        ours=lambda: loops.many(api, vm, at[0], ctypes.c_uint64(OPERATIONS), at[1]),
        operations=OPERATIONS,
        yardstick=lambda: guest.run(ops),
        units=OPERATIONS,
        named="cpu.run",
    )
    assert (gpa == guest.run(ops).gpa).all()
    embed.release(number)


@pytest.mark.benchmark(group="capi")
@pytest.mark.parametrize("columns", ["addresses", "kinds", "values"])
@pytest.mark.parametrize("pages", SIZES.values(), ids=SIZES)
def test_access_many(side_by_side, pages, columns):
    guest, gva = warm_guest("cached", pages)
    rng = np.random.default_rng(4)
    kind = rng.choice([0, 0, 0, 1], OPERATIONS).astype(np.uint8)
    ops = accesses(gva, 0 if columns == "addresses" else kind)
    value = np.ascontiguousarray(ops["value"])
    arguments: dict[str, Any] = {"user": True}
    if columns != "addresses":
        arguments["kind"] = kind
    if columns == "values":
        arguments["value"] = value
    data = columns == "values"
    side_by_side(
        row="C",
        what=f"embed.access_many, {columns}, {pages} pages",
        goal=1.2,
        ours=lambda: embed.access_many(guest.cpu, gva, **arguments),
        operations=OPERATIONS,
        yardstick=lambda: guest.run(ops, data=data),
        units=OPERATIONS,
        named="cpu.run",
    )
