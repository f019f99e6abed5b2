"""I13: leaves against the host below and read-only slots, broken by hand."""

import numpy as np
import pytest
from broken import HOST_ABSENT, HOST_READ_ONLY, LEAF
from changing_slots import DESIGNS, HERE, LOW, LOW_SIZE, MIB, PAGE, THERE, VA_HERE, VA_LARGE, VA_LOW, Machine
from forged import parts, written

import shadowcore as sc

ABSENT, ZERO, LARGE, TABLE = 0, 2, 2, 1


def changed(vm, frame=None, state=None, block=None, how=None):
    """The host has other pages than it had, and nobody was told."""
    frames, blocks = (array.copy() for array in vm.memory.backing_arrays())
    if frame is not None:
        frames[frame] = state
    if block is not None:
        blocks[block] = how
    vm.memory.import_backing((frames, blocks))


def found(vm):
    return {(v.invariant, v.what) for v in vm.audit().violations}


@pytest.mark.parametrize("design", [name for name in DESIGNS if "few" not in name])
def test_leaves_map_what_the_host_has(design):
    m = Machine(DESIGNS[design])
    m.vm.memory.back()
    m.write(VA_LOW, 1)
    m.read(VA_LOW + PAGE)
    changed(m.vm, LOW >> 12, ABSENT)
    assert found(m.vm) == {("I13", HOST_ABSENT), ("I13", HOST_READ_ONLY)}
    changed(m.vm, LOW >> 12, ZERO)
    assert found(m.vm) == {("I13", HOST_READ_ONLY)}
    changed(m.vm, LOW >> 12, 3)
    assert m.vm.audit().ok


def test_large_leaves_map_large_pages():
    m = Machine("unsync")
    m.vm.host_collapse(0)
    m.read(VA_LARGE)
    assert m.vm.stats.pages_2m == 1
    changed(m.vm, block=0, how=TABLE)
    assert found(m.vm) == {("I13", HOST_ABSENT)}


def rewritten(path, change):
    state, arrays = parts(path)
    change(state, arrays)
    written(path, state, arrays)
    return path


@pytest.mark.parametrize("design", ["cached", "unsync"])
def test_forged_hosts_and_slots_are_refused(design, tmp_path):
    """A saved machine whose leaves lead where they must not is not loaded; nor is one with slots that cannot be."""
    m = Machine(DESIGNS[design])
    m.vm.memory.back()
    m.vm.add_slot(THERE, MIB)
    m.write(VA_LOW, 1)
    m.write(VA_HERE, 1)
    path = tmp_path / "vm"
    row = [HERE, MIB, PAGE, LOW_SIZE, False]

    def frames(state, arrays):
        arrays["host_frames"] = np.full_like(arrays["host_frames"], ABSENT)

    def slots(number, value):
        return lambda state, arrays: state["slots"].__setitem__(number, value)

    for change, what in (
        (frames, HOST_ABSENT),
        (lambda state, arrays: arrays.update(host_frames=arrays["host_frames"] + 2), HOST_ABSENT),
        (lambda state, arrays: arrays.update(host_frames=arrays["host_frames"] + 16), "an outer host of all frames"),
        (lambda state, arrays: arrays.update(host_blocks=arrays["host_blocks"] | 3), "a host can have"),
        (lambda state, arrays: arrays.update(host_blocks=arrays["host_blocks"][1:]), "host_blocks"),
        (lambda state, arrays: state.update(backing=False), "arrays"),
        (lambda state, arrays: state.update(backing=1), "backing"),
        (slots(1, None), LEAF),
        (slots(1, [*row[:3], LOW_SIZE + 2 * MIB, False]), None),
        (slots(1, [*row[:3], LOW_SIZE + MIB, False]), "two of them"),
        (slots(1, [*row[:3], 1 << 51, False]), None),
        (slots(1, [*row[:3], -PAGE, False]), "offset"),
        (slots(1, [*row[:4], 7]), "read_only"),
        (slots(1, [*row[:4], True]), HOST_READ_ONLY),
        (slots(1, [0, *row[1:]]), "overlap"),
        (lambda state, arrays: state.update(slots=[]), None),
        (lambda state, arrays: state.update(slots=[None] * 40), "1 to 32"),
        (lambda state, arrays: state.update(memory=state["memory"] * 2), None),
        (lambda state, arrays: state.update(memory=4096), "memory"),
    ):
        m.vm.save(path)
        with pytest.raises(sc.SnapshotError, match=what):
            sc.VM.load(rewritten(path, change))
    m.vm.save(path)
    assert sc.VM.load(path).audit().ok
