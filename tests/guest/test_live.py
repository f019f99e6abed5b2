"""What Linux's shadow MMU counted under a live guest, and what the model comes to."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from commands import refused, run
from places import ROOT

import shadowcore as sc
from shadowcore.workload import live

TABLE = ROOT / "tests" / "data" / "kvm-6.1" / "workload.tsv"
RUNS = {"6.1": ("61_1", "61_2", "61_3"), "6.12": ("612_1", "612_2")}


@pytest.fixture(scope="module")
def found():
    return {release: {row.counter: row for row in live.rows(release)} for release in RUNS}


@pytest.mark.parametrize("release", RUNS)
def test_what_was_measured_is_what_the_table_says(release):
    with open(TABLE, encoding="utf-8") as file:
        counted = {row["counter"]: row for row in csv.DictReader(file, delimiter="\t")}
    for name, value in zip(live.COUNTERS, live.MEASURED[release], strict=True):
        runs = [int(counted[name][f"{which}_pipelines60"]) / 60 for which in RUNS[release]]
        assert value == pytest.approx(np.mean(runs), abs=0.006)


@pytest.mark.parametrize("release", RUNS)
def test_the_model_is_within_15_percent(release, found):
    """In all that was counted; nothing of it was used to set the model."""
    rows = found[release]
    for name in live.COUNTERS:
        assert name == "mmu_flooded" or 0.85 < rows[name].ratio < 1.15, rows[name]
    assert rows["mmu_flooded"].model == 0


def test_where_the_exits_are():
    """Six address spaces a pipeline: each root meets its stack; three tables of each leave sync, twice where their
    process goes on after another one has run."""
    here = live.model()
    plain = live.model(kernel=dataclasses.replace(live.KERNEL, vmap_stacks=False))
    near = live.model(kernel=dataclasses.replace(live.KERNEL, heap_gap=0))
    assert here["pf_fixed"] - plain["pf_fixed"] == pytest.approx(10.8, abs=0.1)
    assert here["unsync_made"] - near["unsync_made"] == pytest.approx(9.0, abs=0.1)
    assert here["unsync_made"] == pytest.approx(36.9, abs=0.1)


def test_a_new_root_has_two_spurious_faults(found):
    """Six address spaces a pipeline: the kernel's text and the gates of each are linked to tables that are right."""
    assert found["6.1"]["pf_spurious"].model == 12


def test_the_command_and_the_page(found):
    text = run("calibration", "--live")
    assert run("calibration") == text
    assert "live guest under Linux 6.12, per pipeline" in text
    plain = json.loads(run("calibration", "--live", "--json"))
    assert [row["counter"] for row in plain["6.1"]] == list(live.COUNTERS)
    page = (ROOT / "docs" / "workloads.md").read_text("utf-8")
    for name, row in found["6.1"].items():
        other = found["6.12"][name]
        cells = " | ".join(
            f"{each.linux:.2f} | {each.model:.2f} | {f'{each.ratio:.2f}' if each.linux > 0.5 else ''}"
            for each in (row, other)
        )
        assert f"| {row.what} (`{name}`) | {cells} |" in page
    assert "--live" in refused("calibration", "--live", "x.npz")
    with pytest.raises(sc.ConfigError, match="release"):
        live.rows("6.2")
    with pytest.raises(sc.ConfigError, match="pipelines"):
        live.rows(pipelines=0)


def test_clearing_a_frame_that_was_a_table_is_no_flood():
    """It is cleared by a string instruction: what shadows the frame is zapped at the first store, of which the table's
    emulator gets one."""
    parameters = {"work": 100}
    counted = sc.workload.run("shell", "kvm-6.1", operations=50_000, **parameters).stats
    assert counted["mmu_unprotect"] > 10
    assert counted["mmu_flooded"] < counted["mmu_unprotect"] / 5
    assert counted["pf_emulate"] - counted["mmu_pte_write"] >= counted["mmu_unprotect"]
    cached = sc.workload.run("shell", "cached", operations=50_000, **parameters).stats
    assert cached["mmu_flooded"] > counted["mmu_unprotect"]


@pytest.mark.parametrize("mode", ["64", "la57"])
@pytest.mark.parametrize("mmu", ["native", "cached", "unsync"])
def test_regions(mode, mmu):
    """The kernel's other mappings lead where they should, under every design, and are none of user code's."""
    vm = sc.VM("16MiB", mmu)
    kernel = sc.Kernel(vm, sc.KernelOptions(mode=mode, regions=True))
    process = kernel.spawn(kernel.program(text=16))
    at = process.mmap(8 * 4096)
    process.sweep(at, 8, write=True)
    child = process.fork()
    child.sweep(at, 8, write=True)
    cpu = vm.vcpus[0]
    structs = 0xFFFFEA0000000000 if mode == "64" else 0xFFD4000000000000
    assert not cpu.translate(0xFFFFFFFF81000000, access="x").writable
    assert not cpu.translate(0xFFFFFE0000000000).writable
    for va in (0xFFFFFFFF82000000, 0xFFFFFE0000001000, structs, structs + (16 << 8) * 64 - 8):
        found = cpu.translate(va, access="w")
        assert found.writable
        assert not found.user
    with pytest.raises(sc.PageFault):
        cpu.translate(structs + 64 * 4096 + 4096)
    assert vm.audit().ok


def test_regions_need_room_in_the_address_space():
    with pytest.raises(sc.ConfigError, match="regions: mode '64' or 'la57' is needed, not 'pae'"):
        sc.KernelOptions(mode="pae", regions=True)
