"""References of walks, as C is told of them: those that Python records."""

import ctypes
import itertools

import numpy as np
import pytest
from capi import API, DATA, OK, REFERENCES, Access, C, Guest, Outcome, made

import shadowcore as sc
from shadowcore.engine.mmu import DIMENSIONS, REFERENCE_DTYPE


def listener(walks):
    """A callback that keeps each walk as rows of REFERENCE_DTYPE."""

    @REFERENCES
    def told(context, references, count):
        assert context == 0x1234
        rows = [references[i] for i in range(count)]
        walks.append([tuple(getattr(row, name) for name in REFERENCE_DTYPE.names) for row in rows])

    return told


def test_codes_are_the_engines():
    assert [C[f"SC_DIMENSION_{name.upper()}"] for name in DIMENSIONS] == list(range(len(DIMENSIONS)))


@pytest.mark.parametrize("design", ["native", "flush", "cached", "unsync", "nested"])
def test_c_is_told_what_python_records(design):
    guest = Guest(design, "64")
    walks = []
    told = listener(walks)
    guest.twin.record_walks(1000)
    assert API.on_references(guest.vm, told, 0x1234) == OK
    counted = 0
    for i, kind in itertools.product((0, 1, 0, 5), ("SC_READ", "SC_WRITE", "SC_FETCH")):
        code, out = guest.access(C[kind], DATA + (i << 12), data=False)
        counted += out.references
        op = np.array([(C[kind], 0, 8, DATA + (i << 12), 0)], sc.OP_DTYPE)
        result = guest.cpu.run(op, data=False)
        assert code == result.outcome[0] == OK
    found = guest.twin.walks()
    assert [row for walk in walks for row in walk] == found.tolist()
    assert len(found) == counted > 0
    assert [len({row[2] for row in walk}) for walk in walks] == [1] * len(walks)
    assert API.on_references(guest.vm, REFERENCES(0), None) == OK
    n = len(walks)
    guest.access(C["SC_READ"], DATA)
    assert len(walks) == n
    guest.close()


@pytest.mark.parametrize(("mode", "wanted"), [("64", 24), ("la57", 29), ("pae", 19), ("32", 14)])
def test_walks_in_two_dimensions(mode, wanted):
    guest = Guest("nested", mode)
    guest.access(C["SC_READ"], DATA)
    walks = []
    told = listener(walks)
    assert API.on_references(guest.vm, told, 0x1234) == OK
    guest.access(C["SC_READ"], DATA)
    assert [len(walk) for walk in walks] == [wanted]
    guest.close()


def test_its_vm_may_not_be_used_and_outlives_the_handle():
    vm = sc.VM("1MiB", "nested")
    number = ctypes.c_uint64()
    assert API.vm_adopt(vm, number) == OK
    by_python = False
    codes, counts = [], []

    @REFERENCES
    def told(_context, _references, count):
        counts.append(count)
        if not by_python:
            codes.append(API.access(number, made(Access, gva=0, size=8), made(Outcome)))

    assert API.on_references(number.value + (1 << 16), told, None) == C["SC_E_HANDLE"]
    assert API.access(number, made(Access, gva=0x1000, size=8), made(Outcome)) == OK
    assert API.on_references(number, told, None) == OK
    assert API.access(number, made(Access, gva=0x1000, size=8), made(Outcome)) == OK
    assert codes == [C["SC_E_BUSY"]]
    by_python = True
    vm.vcpus[0].read(0x1000)
    assert counts == [4, 4]
    assert API.vm_destroy(number) == OK
    vm.vcpus[0].read(0x1000)  # nobody is called any more
    assert counts == [4, 4]
    assert vm.mmu.is_fast()
