"""A host that is a guest itself: its outer host finds the pages that it touches, once."""

import numpy as np
import pytest
from changing_slots import DESIGNS, same

import shadowcore as sc

EVERY = {"native": "native", **DESIGNS}


def counts(vm):
    return vm.stats.host_faults, vm.stats.host_faults_large, vm.stats.outer_faults, vm.stats.outer_faults_large


@pytest.mark.parametrize("design", EVERY)
@pytest.mark.parametrize(
    ("backing", "outer", "found"),
    [
        ("cold", "warm", (600, 0, 0, 0)),
        ("cold", "cold", (600, 0, 600, 0)),
        ("cold", "thp", (600, 0, 2, 2)),
        ("thp", "warm", (2, 2, 0, 0)),
        ("thp", "cold", (2, 2, 1024, 0)),
        ("thp", "thp", (2, 2, 2, 2)),
    ],
)
def test_each_page_is_found_once(design, backing, outer, found):
    vm = sc.VM("8MiB", EVERY[design], backing=backing, outer_backing=outer)
    vm.host_touch(0, 600)
    assert counts(vm) == found
    vm.host_touch(0, 600)
    assert counts(vm) == found
    vm.host_unmap(0, 1024, discard=True)
    vm.host_touch(0, 600)  # other pages for the guest, the same ones of the host
    assert counts(vm)[0] == 2 * found[0]
    assert counts(vm)[2:] == found[2:]


def test_the_zero_page_is_nobodys():
    vm = sc.VM("8MiB", "unsync", backing="cold", outer_backing="cold")
    vm.host_touch(5, write=False)
    assert counts(vm) == (1, 0, 0, 0)
    vm.host_touch(5)
    assert counts(vm) == (2, 0, 1, 0)


def test_a_block_that_memory_cuts_off_is_found_in_small_pages():
    vm = sc.VM((512 + 3) * 4096, "native", backing="cold", outer_backing="thp")
    vm.host_touch(510, 5)
    assert counts(vm) == (5, 0, 4, 1)


def test_slots_that_are_warm_are_warm_below():
    slots = [sc.MemorySlot(0, "1MiB", backing="warm"), sc.MemorySlot(1 << 20, "1MiB")]
    vm = sc.VM("4MiB", "unsync", slots=slots, backing="cold", outer_backing="cold")
    vm.host_unmap(0, 256, discard=True)
    vm.host_touch(0, 256)
    assert counts(vm) == (256, 0, 0, 0)
    vm.host_touch(256, 256)
    assert counts(vm) == (512, 0, 256, 0)
    vm.add_slot(2 << 20, "1MiB", backing="warm")
    vm.host_unmap(512, 256, discard=True)
    vm.host_touch(512, 256)
    assert counts(vm)[2] == 256


def test_what_the_caller_brings_is_read_in():
    ram = np.zeros(4 << 20, dtype=np.uint8)
    ram[5 << 12] = 1
    vm = sc.VM(ram, "native", backing="cold", outer_backing="cold")
    assert vm.read_physical(5 << 12, 1) == b"\1"
    assert counts(vm) == (1, 0, 0, 0)  # it has been touched before: whoever brought it did


@pytest.mark.parametrize("backing", ["cold", "thp"])
@pytest.mark.parametrize("outer", ["cold", "thp"])
def test_a_saved_machine_goes_on(tmp_path, backing, outer):
    vm = sc.VM("8MiB", "unsync", backing=backing, outer_backing=outer)
    vm.host_touch(3, 700)
    vm.save(tmp_path / "a")
    twin = sc.VM.load(tmp_path / "a")
    for array, other in zip(vm.memory.backing_arrays(), twin.memory.backing_arrays(), strict=True):
        assert (array == other).all()
    for machine in (vm, twin):
        machine.host_touch(0, 1200)
    assert vm.stats.as_dict() == twin.stats.as_dict()
    twin.audit(strict=True)


@pytest.mark.parametrize("design", ["cached", "unsync"])
def test_guests_see_nothing_of_it(design):
    for seed in range(2):
        made, _ = same(design, "64", seed, host=True, backing="cold", outer_backing="thp")
        assert made.vm.stats.outer_faults > 0


def test_what_cannot_be():
    for backing, outer in (("warm", "cold"), ("warm", "thp")):
        with pytest.raises(sc.ConfigError, match=r"outer_backing: .* contradicts backing: 'warm'"):
            sc.VM("4MiB", backing=backing, outer_backing=outer)
    with pytest.raises(sc.ConfigError, match="outer_backing: 'frozen' is not one of"):
        sc.VM("4MiB", backing="cold", outer_backing="frozen")
    vm = sc.VM("4MiB", "unsync", backing="cold", outer_backing="cold")
    vm.host_touch(0, 3)
    frames, blocks = (array.copy() for array in vm.memory.backing_arrays())
    before = [array.copy() for array in vm.memory.backing_arrays()]
    for frame, block in ((4, 0), (12, 0), (64, 0), (0, 8), (8, 0)):
        bad = frames.copy(), blocks.copy()
        bad[0][0] ^= frame
        bad[1][0] ^= block
        with pytest.raises(sc.ConfigError, match=r"outer host|that a host can have"):
            vm.memory.import_backing(bad)
        assert all((array == kept).all() for array, kept in zip(vm.memory.backing_arrays(), before, strict=True))
