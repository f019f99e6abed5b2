"""VM.save and VM.load in the middle of what KVM did: the rest of the stream is that KVM's as well, in every field."""

import pathlib

import numpy as np
import pytest
from kvm_files import load
from kvm_streams import Replay

import shadowcore as sc

DATA = pathlib.Path(__file__).parents[1] / "data"
FILES = sorted(DATA.glob("kvm-6.1/*.npz"))
SMALL = (
    "demand_64",
    "unsync_pae",
    "largeH_32",
    "modeswitch",
    "pressure64_32",
    "rights_wp0_64",
    "fuzzH_64",
    "pingpong_n4_64",
)


def reloaded(made, path):
    """The machine of a replay, saved and loaded."""
    before = made.vm
    before.save(path)
    made.vm = sc.VM.load(path)
    assert made.vm.stats.as_dict() == before.stats.as_dict()
    assert np.array_equal(made.vm.mmu.pages, before.mmu.pages)
    assert [cpu.export_state() for cpu in made.vm.vcpus] == [cpu.export_state() for cpu in before.vcpus]
    assert made.vm.memory.slots == before.memory.slots
    for name, array in made.vm.mmu.arrays.items():
        assert np.array_equal(array, before.mmu.arrays[name]), name
    made.cpu = made.vm.vcpus[made.cpu.number]
    made.vm.mmu.record(1 << 16)


def goes_on(path, tmp_path, release, parts):
    base = DATA / "kvm-6.1" / path.name
    made = Replay(load(DATA / release / path.name, None if release == "kvm-6.1" else base), release)
    at = {len(made.ops) * part // parts for part in range(1, parts)}
    for k in range(len(made.ops)):
        if k in at:
            reloaded(made, tmp_path / "vm")
        assert made.step(k) == [], (path.name, k, made.ops[k])


@pytest.mark.parametrize("name", SMALL)
def test_a_loaded_machine_goes_on_as_the_real_one(name, tmp_path):
    (path,) = [path for path in FILES if path.name.startswith(name)]
    goes_on(path, tmp_path, "kvm-6.1", 2)


@pytest.mark.parametrize("name", ["unsync_64", "largeH_64"])
def test_so_does_one_of_a_later_release(name, tmp_path):
    (path,) = [path for path in FILES if path.name.startswith(name)]
    goes_on(path, tmp_path, "kvm-6.12", 3)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_every_stream_goes_on(path, tmp_path):
    goes_on(path, tmp_path, "kvm-6.1", 5)


def test_what_is_saved_while_roots_go(tmp_path):
    """Requests, and pages that were zapped and are roots still, are part of the state."""
    path = next(path for path in FILES if path.name.startswith("unsync_64"))
    made = Replay(load(path), "kvm-6.1")
    for k in range(len(made.ops) // 2):
        made.step(k)
    made.vm.mmu.zap_all()
    made.vm.mmu.recorded()
    assert made.vm.mmu.export_state()["n_dying"] > 0
    twin = sc.VM.load(saved(made.vm, tmp_path / "twin"))
    for vm in (made.vm, twin):
        vm.audit(strict=True)
        root = vm.vcpus[0].cr3
        vm.vcpus[0].cr3 = root
        vm.audit(strict=True)
        assert vm.mmu.export_state()["n_dying"] == 0
    assert twin.vcpus[0].export_state() == made.vm.vcpus[0].export_state()
    assert twin.mmu.export_state() == made.vm.mmu.export_state()


def saved(vm, path):
    vm.save(path)
    return path
