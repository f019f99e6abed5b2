"""Settings of `unsync` change its cost, never what a guest sees that flushes as it must."""

import itertools

import pytest

import shadowcore as sc
from shadowcore.workload import run

WORKLOADS = ("shell", "kbuild-like", "ageing", "parallel-fault")
OPERATIONS = 30_000
SETTINGS = {
    "usual": {},
    "no previous roots": {"prev_roots": 0},
    "every previous root": {"prev_roots": 16},
    "no prefetch": {"prefetch": 0},
    "prefetch 32": {"prefetch": 32},
    "small pool": {"pool_pages": 32},
    "smallest pool": {"pool_pages": 16, "min_free": 0, "refill": 4},
    "large pool": {"pool_pages": 4096},
    "flood at once": {"flood_threshold": 1},
    "no flood": {"flood_threshold": None},
    "6.12": {"release": "6.12"},
    "quirks": {"quirks": sc.Quirk.KVM_6_1},
}
MODES = ("64", "pae", "32")


def outcome(name, mmu, mode, **settings):
    return run(name, mmu, operations=OPERATIONS, options=sc.KernelOptions(mode=mode), **settings)


@pytest.fixture(scope="module")
def native():
    return {(name, mode): outcome(name, "native", mode).history for name in WORKLOADS for mode in MODES}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("name", "mode"), [*itertools.product(WORKLOADS, MODES)])
def test_settings_do_not_show(name, mode, settings, native):
    found = outcome(name, sc.Shadow.unsync(**SETTINGS[settings]), mode, audit_every=OPERATIONS)
    assert found.history == native[name, mode]


@pytest.mark.parametrize("name", ["analytics", "parallel-fault"])
@pytest.mark.parametrize("size", ["2MiB", "1GiB"])
def test_pages_of_the_host_do_not_show(name, size):
    memory = "2GiB" if size == "1GiB" else "512MiB"
    seen = outcome(name, sc.VM(memory, "native"), "64").history
    vm = sc.VM(memory, sc.Shadow.unsync(), host_page_size=size)
    assert outcome(name, vm, "64", audit_every=OPERATIONS).history == seen
    assert vm.stats.pages_2m or vm.stats.pages_1g


def test_settings_do_matter_for_the_cost():
    """Were the settings ignored, the comparison above would compare nothing."""
    usual = outcome("shell", sc.Shadow.unsync(), "64").stats
    for settings in ("no previous roots", "no prefetch", "small pool", "flood at once", "6.12"):
        assert outcome("shell", sc.Shadow.unsync(**SETTINGS[settings]), "64").stats != usual, settings
