"""No forged file of a saved machine crashes or hangs the loader: it is refused, or it is a machine that works."""

import os
import subprocess
import sys
import time
from pathlib import Path

import forged
import numpy as np
import pytest

import shadowcore as sc
from shadowcore.engine import snapshot

PROGRAM = Path(forged.__file__)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(sc.__file__).parents[1])}


def loads(name, first, step):
    """Load every `step`-th forgery of a machine from number `first` on, in a process of its own."""
    command = [sys.executable, str(PROGRAM), name, str(first), str(step)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1800)
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    assert "without its file" not in lines[-1]
    assert lines[-1].startswith("done "), f"{lines[-1]}: status {done.returncode}, {done.stderr[-2000:]}"
    return lines


@pytest.mark.parametrize("name", forged.MACHINES)
def test_a_sample_of_forged_files(name):
    lines = loads(name, 5, 151)
    assert len(lines) > 30
    assert "SnapshotError" in lines[-1]
    assert "loaded" in lines[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", forged.MACHINES)
def test_every_forged_file(name):
    loads(name, 0, 1)


# -- what costs, and who is to blame -------------------------------------------------------------------------


def saved(tmp_path, vm, change=lambda state, arrays: None):
    vm.save(tmp_path / "vm")
    state, arrays = forged.parts(tmp_path / "vm")
    change(state, arrays)
    forged.written(tmp_path / "vm", state, arrays)
    return tmp_path / "vm"


def declared(size):
    return lambda state, arrays: state.update(memory=size, slots=[[0, size]])


def test_memory_that_is_not_used_costs_nothing(tmp_path):
    """1 TiB of RAM, under `native`, that nobody has written to."""
    vm = sc.VM("1MiB", "native")
    vm.vcpus[0].write(0x5000, 7)
    began = time.process_time()
    loaded = sc.VM.load(saved(tmp_path, vm, declared(1 << 40)))
    assert loaded.memory.bytes.size == 1 << 40
    assert loaded.vcpus[0].read(0x5000) == 7
    assert time.process_time() - began < 2


@pytest.mark.parametrize("size", [1 << 21, 1 << 40, 1 << 46])
def test_what_the_arrays_do_not_bear_out_is_refused_at_once(tmp_path, size):
    with pytest.raises(sc.SnapshotError, match="mmu_frames"):
        sc.VM.load(saved(tmp_path, sc.VM("1MiB"), declared(size)))


def test_a_small_file_unpacks_to_little(tmp_path):
    """What is declared to be larger than its bytes can hold is not unpacked."""
    path = saved(tmp_path, sc.VM("64KiB", "native"))
    path.write_bytes(
        path.read_bytes().replace(b"\x80\x00\x00\x00\x80\x00\x00\x00", b"\x80\x00\x00\x00\x00\x00\x00\x7f")
    )
    with pytest.raises(sc.SnapshotError, match="cannot hold 2130706432 bytes"):
        sc.VM.load(path)


def test_a_host_without_room_is_not_the_fault_of_the_file(tmp_path, monkeypatch):
    path = saved(tmp_path, sc.VM("64KiB", "native"))

    def none(*_):
        raise MemoryError("no room")

    monkeypatch.setattr(snapshot, "_digest", none)
    with pytest.raises(MemoryError, match="no room"):
        sc.VM.load(path)


def test_an_array_that_does_not_fit_is_not_the_fault_of_the_file(tmp_path):
    path = saved(tmp_path, sc.VM("64KiB"))
    for memory in (np.zeros(4096, np.uint8), np.zeros(1 << 16, np.uint16), np.zeros(1 << 17, np.uint8)[::2], [1]):
        with pytest.raises(sc.ConfigError):
            sc.VM.load(path, memory)
    assert sc.VM.load(path, np.ones(1 << 16, np.uint8)).memory.bytes.any() == 0


def test_a_machine_that_was_not_sound_is_saved_and_loaded_as_it_is(tmp_path):
    """Its guest's tables were changed behind the engine's back: to look at what came of it is what saving is for."""
    vm = forged.MACHINES["cached-pae"]()
    vm.memory.words[20 * 512 : 50 * 512] = 0
    count = vm.audit().count
    assert count
    vm.save(tmp_path / "vm")
    assert sc.VM.load(tmp_path / "vm").audit().count == count


# -- import_state --------------------------------------------------------------------------------------------

NONE = 0xFFFFFFFF
VCPU_ODD = {
    "roots": ([], [NONE] * 3, [NONE] * 5, [0] * 4, [16] + [NONE] * 3, [NONE - 1] * 4, [-1] * 4, None, 5, ["x"] * 4),
    "pdptes": ([], [0] * 3, [0] * 5, [7, 0, 0, 0], [1 << 64] * 4, [-1] * 4, None, [1 | 1 << 60, 0, 0, 0]),
    "cr0": (-1, 1 << 64, None, 1 << 31, 0x80000001 | 1 << 6, 0x60000010 | 1 << 40, 0xA0000011, "x", 0.5),
    "cr3": (-1, 1 << 64, None, 1 << 46, 1 << 63),
    "cr4": (-1, 1 << 64, None, 1 << 30, 1 << 17),
    "efer": (-1, 1 << 64, None, 1 << 8, 1 << 10, 1 << 20),
    "pkru": (-1, 1 << 32, None),
    "cpl": (-1, 1, 2, 4, None),
    "ac": (None, 2, "x"),
    "cr2": (-1, 1 << 64, None),
    "flood_gfn": (-1, 1 << 64, None),
    "flood_count": (-1, 1 << 32, None),
}
MMU_ODD = {
    "counters": ([], [1], [0] * 1000, None, 5),
    **dict.fromkeys(("n_free", "n_active", "n_pte4", "n_pte8"), (-1, 17, NONE, 1 << 40, None, 0.5)),
    **dict.fromkeys(("free_head", "young", "old"), (-1, 16, NONE - 1, 1 << 40, None)),
    **dict.fromkeys(("flush_epoch", "spte_base"), (-1, 1 << 64, None)),
}


LAGGING_VCPU_ODD = {
    "requests": (-1, 64, 1 << 32, None, "x"),
    **dict.fromkeys(("loaded", "restarts", "retried", "odd_stores"), (2, None, "x", -1)),
    **dict.fromkeys(
        ("root_cr3", "rip", "retried_rip", "retried_va", "device_va", "device_gfn"), (-1, 1 << 64, None, "x", 0.5)
    ),
    "device_rights": (-1, 1, 3, 7, 8, None),
    "previous": ([], [[0, NONE]] * 2, [[0, NONE]] * 4, [[0, 16]] * 3, [[0, NONE + 1]] * 3, [0] * 3, None, [[0, 0]] * 3),
}
LAGGING_MMU_ODD = {"n_dying": (-1, 17, NONE, 1 << 40, None, 0.5)}


@pytest.mark.parametrize("name", forged.MACHINES)
def test_import_state_refuses_what_cannot_be(name):
    vm = forged.MACHINES[name]()
    lagging = name.startswith(("unsync", "adaptive"))
    histories = {"loads": (-1, 1 << 32, None, 0.5)} if name.startswith("adaptive") else {}
    for target, odd in (
        (vm.vcpus[0], VCPU_ODD | (LAGGING_VCPU_ODD if lagging else {})),
        (vm.mmu, MMU_ODD | (LAGGING_MMU_ODD if lagging else {}) | histories),
    ):
        before = target.export_state()
        for field, values in odd.items():
            for value in values:
                if value == before[field] or (field in ("cr0", "cr4", "efer") and name == "cached-off"):
                    continue
                with pytest.raises(sc.ConfigError):
                    target.import_state(before | {field: value})
            with pytest.raises(sc.ConfigError):
                target.import_state({key: value for key, value in before.items() if key != field})
        assert target.export_state() == before
        target.import_state(before)
        assert target.export_state() == before
    vm.audit(strict=True)
    forged.use_up(vm)


def test_a_root_belongs_to_one_set_of_registers():
    """Another vcpu's root that is held once cannot be held twice; nor the root of other registers."""
    vm = forged.MACHINES["cached-64-tlb"]()
    one, other = vm.vcpus
    with pytest.raises(sc.ConfigError, match="roots"):
        one.import_state(one.export_state() | {"cr3": one.cr3 + 4096})
    state = one.export_state()
    root = state["roots"][0]
    with pytest.raises(sc.ConfigError, match="held"):
        one.import_state(state | {"roots": [root, root, NONE, NONE]})
    vm.vcpus[1].cr3 = 0
    with pytest.raises(sc.ConfigError, match="not the root"):
        other.import_state(other.export_state() | {"roots": state["roots"]})
