"""Counters by name, as attributes and items; differences, copies, and what a block counted."""

import copy
import pickle

import numpy as np
import pytest

import shadowcore as sc


@pytest.fixture
def vm():
    vm = sc.VM("4MiB", "unsync")
    tables = sc.PageTables(vm.memory, "64")
    tables.map(0x400000, 0x10000, 0x8000, "rwu")
    tables.activate(vm.vcpus[0])
    return vm


def test_every_name(vm):
    vm.vcpus[0].read(0x400000)
    plain = vm.stats.as_dict()
    assert plain["exits_fill"] == 1
    for name, count in plain.items():
        assert vm.stats[name] == getattr(vm.stats, name) == count
        assert name in dir(vm.stats)
    assert sum(vm.stats[f"exits_{reason}"] for reason in vm.stats.exits) == vm.stats["exits_total"]


def test_unknown_names(vm):
    with pytest.raises(AttributeError, match="did you mean 'exits_fill'"):
        _ = vm.stats.exit_fill
    with pytest.raises(KeyError, match="did you mean 'pf_fixed'"):
        _ = vm.stats["pf_fixd"]
    with pytest.raises(KeyError, match="counters are"):
        _ = vm.stats[3]
    with pytest.raises(TypeError):
        _ = vm.stats - 1
    with pytest.raises(AttributeError):
        vm.stats.exits_fill = 0


def test_difference(vm):
    before = vm.stats.copy()
    assert before.as_dict() == vm.stats.as_dict()
    for page in range(4):
        vm.vcpus[0].read(0x400000 + 0x1000 * page)
    grown = vm.stats - before
    assert grown.accesses == 4
    assert grown.exits_total == vm.stats.exits_total - before.exits_total
    assert grown.pages_4k == vm.stats.pages_4k > 0  # a gauge: what there is now
    assert pickle.loads(pickle.dumps(grown)).as_dict() == copy.deepcopy(grown).as_dict() == grown.as_dict()


def test_measure(vm):
    ops = np.zeros(5, sc.OP_DTYPE)
    ops["addr"], ops["size"] = 0x400000, 8
    with vm.measure() as counted:
        assert counted.accesses == 0
        result = vm.vcpus[0].run(ops)
    assert counted.as_dict() == result.stats.as_dict()
    with vm.measure() as inner:
        pass
    assert not inner.exits_total
    assert counted.accesses == 5  # a block that has ended counts no further
    with pytest.raises(sc.PageFault), vm.measure() as failed:
        vm.vcpus[0].read(0x999000)
    assert failed.exits_guest == 1


@pytest.mark.parametrize(("text", "size"), [("16M", 16 << 20), ("1GB", 1 << 30), ("64k", 64 << 10), ("2MiB", 2 << 20)])
def test_sizes(text, size):
    assert sc.VM(text).memory.bytes.size == size
