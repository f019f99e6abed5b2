"""Recorded programs on the guest kernel: what is counted, who runs when, and that no design changes any of it."""

import json
import re

import numpy as np
import pytest
from commands import run
from program_model import Model
from program_recordings import (
    ANON,
    AT,
    DESIGNS,
    EXACT,
    EXACT_OPTIONS,
    FAMILY,
    LACKEY,
    MODES,
    PAGE,
    RW,
    TRUE,
    made,
    options,
)

import shadowcore as sc
from shadowcore import programs
from shadowcore.recordings import Event, Reader

# -- against a model of our own ----------------------------------------------------------------------------


def modelled(path, found):
    images = [found.regions[image] for image in sorted(found.regions) if image[2] > 0 or image[1] > 0]
    order = {}
    with Reader(path) as reader:
        seen = {}
        for block in reader:
            for part in block.segments():
                if not isinstance(part, tuple) and part["kind"] == Event.EXEC:
                    number = int(part["process"])
                    forked = number != 0
                    seen[number] = seen.get(number, -1 if forked else 0) + 1
                    order[len(order)] = found.regions[0, number, seen[number]]
        assert len(images) == len(order)
        return Model(reader, order.values()).run()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", [FAMILY, TRUE], ids=["family", "true"])
def test_every_fault_is_one_that_a_model_expects(path, mode):
    """Demand zero, file, copy-on-write by a copy or by reuse, growth of the stack: each as often as the model says,
    and as many pages touched by each process."""
    found = programs.survey(path)
    model = modelled(path, found)
    result = programs.run(found, "native", options=options(mode, **EXACT_OPTIONS), fold=mode in ("32", "pae"))
    assert {name: result.counters[name] for name in EXACT} == {name: model.n[name] for name in EXACT}
    assert result.refused == model.refused == 0
    assert result.accesses == model.accesses == found.records
    assert {key[1]: n for key, n in found.touched.items()} == model.touched
    assert {entry["number"]: entry["pages"] for entry in result.processes} == model.touched


def test_the_model_expects_what_is_worth_expecting():
    model = modelled(FAMILY, programs.survey(FAMILY))
    assert min(model.n[name] for name in EXACT if name not in ("stack_growth",)) > 0
    assert len(model.touched) == 4


@pytest.mark.parametrize("path", [FAMILY, TRUE], ids=["family", "true"])
def test_demand_faults_with_fault_around_are_between_bounds(path):
    """Pages come in by faults or by being around one: together at least those that were touched first."""
    found = programs.survey(path)
    counters = programs.run(found, "cached").counters
    made = sum(counters[f"faults_{name}"] for name in ("zero", "zero_page", "file", "around", "copied", "reused"))
    assert counters["faults_spurious"] == counters["faults_segv"] == 0
    assert made >= max(found.touched.values())
    assert counters["faults"] <= sum(found.touched.values()) + counters["faults_copied"] + counters["faults_reused"]


# -- no design changes anything ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", ["family", "lackey"])
def test_no_design_changes_the_history(path, mode, lackey):
    found = programs.survey(FAMILY if path == "family" else lackey)
    fold = mode in ("32", "pae")
    results = [
        programs.run(found, mmu, options=options(mode), seed=3, fold=fold, audit_every=1000)
        for mmu in (*DESIGNS, sc.Shadow.cached(pool_pages=16, flood_threshold=1))
    ]
    assert len({result.history for result in results}) == 1
    for result in results:
        assert result.counters == results[0].counters
        frames = result.frames
        assert frames["free"] + frames["boot"] == frames["total"]
        assert frames["anonymous"] == frames["cache"] == frames["tables"] == frames["kernel"] == 0
    assert results[2].stats["exits_total"] > results[0].stats["exits_total"] == 0


@pytest.mark.parametrize("more", [{"isolation": True}, {"pcid": True}, {"direct_map": "4k", "global_": False}])
def test_settings_of_the_kernel_are_kept(more):
    result = programs.run(FAMILY, "cached", options=options(**more), audit_every=2000)
    assert result.counters["forks"] == 3
    assert result.refused == 0
    plain = programs.run(FAMILY, "cached")
    assert (result.history == plain.history) == ("pcid" in more)


def test_a_run_repeats_itself_operation_by_operation():
    found = programs.survey(FAMILY)
    result = programs.run(found, "native", memory="16MiB", record=True)
    vm = sc.VM("16MiB", mmu="cached")
    sc.Kernel(vm, programs._options(found, sc.KernelOptions(), 0))
    again = vm.vcpus[0].run(result.recording)
    assert np.count_nonzero(again.outcome) == result.counters["faults"]
    vm.audit(strict=True)


# -- who runs when ---------------------------------------------------------------------------------------------


def test_processes_of_several_files_take_turns(lackey, tmp_path):
    """A child waits until it was made, whichever file comes first; turns are counted in accesses."""
    switches = {}
    for turn in (5, 100_000):
        result = programs.run(lackey, "native", turn=turn)
        assert result.counters["forks"] == 1
        assert result.accesses == 111
        switches[turn] = result.counters["switches"]
    assert switches[5] > switches[100_000]
    other = tmp_path / "other.screc"
    sc.importers.convert(LACKEY[::-1], other)
    result = programs.run(other, "native")
    assert result.counters["exits"] == 2
    assert result.accesses == 111


def test_several_recordings_run_side_by_side(lackey):
    alone = [programs.run(path, "native", options=options(**EXACT_OPTIONS)) for path in (FAMILY, lackey)]
    for mmu in DESIGNS:
        both = programs.run([FAMILY, lackey], mmu, turn=500, options=options(**EXACT_OPTIONS), audit_every=4000)
        assert both.accesses == sum(result.accesses for result in alone)
        for name in ("forks", "exits", "faults_zero", "faults_zero_page", "faults_file"):
            assert both.counters[name] == sum(result.counters[name] for result in alone)
        assert both.counters["switches"] > sum(result.counters["switches"] for result in alone)
    assert [entry["number"] for entry in both.processes] == [0, 1, 2, 3, 0, 1]
    # The same program twice: its code is in the page cache once, and mapped by both.
    found = programs.survey([FAMILY, FAMILY])
    assert list(found.image_files.items()) == [("./family", 1)]
    twice = programs.run(found, "native", options=options(**EXACT_OPTIONS))
    once = programs.run(FAMILY, "native", options=options(**EXACT_OPTIONS))
    assert twice.counters["faults_file"] == 2 * once.counters["faults_file"]


def test_a_part_of_a_recording(tmp_path):
    done = []
    result = programs.run(TRUE, "native", operations=10_001, windows=1000, progress=lambda *at: done.append(at))
    assert result.accesses == 10_001
    assert done[-1] == (10_001, 10_001)
    assert sorted(done) == done
    rows = result.windows
    assert rows["start"].tolist() == list(range(0, 10_001, 1000))
    assert rows["end"].tolist() == [*range(1000, 10_001, 1000), 10_001]
    assert rows["kernel.faults"].sum() == result.counters["faults"]
    assert rows["kernel.faults"][0] > rows["kernel.faults"][5]
    assert programs.run(TRUE, "native", operations=0).accesses == 0
    assert result.as_dict()["windows"]["end"][-1] == 10_001


# -- what cannot be ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["32", "pae"])
def test_addresses_that_a_mode_has_not(mode):
    with pytest.raises(sc.TraceError, match=r"true\.screc: process 0: addresses below 0xc0000000 expected in mode"):
        programs.run(TRUE, options=options(mode))


def test_a_guest_that_is_too_small_says_what_is_needed(tmp_path):
    steps = [(Event.MMAP, 0, {"addr": AT, "size": 8000 * PAGE, "prot": RW, "flags": ANON}),
             (0, 1, 8, AT + np.arange(6000) * PAGE)]  # fmt: skip
    path = made(tmp_path / "large.screc", steps)
    with pytest.raises(
        sc.GuestOutOfMemory, match=r"large touches 23\.4 MiB .* the guest has 16 MiB, 64 MiB are enough"
    ):
        programs.run(path, memory="16MiB")
    assert programs.run(path, memory="64MiB").counters["faults_zero"] == 6000
    assert programs.run(path).counters["faults_zero"] == 6000


def test_wrong_input(tmp_path, lackey):
    guest = tmp_path / "guest.screc"
    sc.trace.load().head(100).save(guest)
    with pytest.raises(
        sc.TraceError, match=r"guest\.screc: a recording of a program expected, not of the stream 'guest'"
    ):
        programs.run(guest)
    with pytest.raises(sc.TraceError, match=r"none\.screc: a readable recording expected"):
        programs.run([lackey, tmp_path / "none.screc"])
    for bad in ({"operations": -1}, {"windows": -1}, {"audit_every": -2}, {"seed": -1}, {"turn": 0}, {"options": 5}):
        with pytest.raises(sc.ConfigError):
            programs.run(lackey, **bad)
    with pytest.raises(sc.ConfigError, match="paths"):
        programs.run([])
    far = made(tmp_path / "far.screc", [(Event.MMAP, 0, {"addr": (1 << 64) - PAGE, "size": 2 * PAGE, "prot": 3})])
    with pytest.raises(sc.TraceError, match=r"far\.screc: process 0: mmap: a range of addresses expected"):
        programs.run(far)
    beyond = made(tmp_path / "beyond.screc", [(0, 0, 8, [0xFFFF800000001000])])
    with pytest.raises(sc.TraceError, match="addresses below 0x7ffffffff000 expected"):
        programs.run(beyond)
    assert programs.run(beyond, fold=True).accesses == 1
    wide = made(
        tmp_path / "wide.screc", [(Event.MMAP, 0, {"addr": 1 << 40, "size": 4 << 30, "prot": 0, "flags": ANON})]
    )
    with pytest.raises(sc.ConfigError, match="4096 MiB of addresses above 0xc0000000 do not fit"):
        programs.run(wide, options=options("pae"), fold=True)
    overlap = {"addr": AT, "size": 2 * PAGE, "other": AT + PAGE, "offset": 2 * PAGE}
    steps = [(Event.MMAP, 0, {"addr": AT, "size": 8 * PAGE, "prot": 3, "flags": ANON}), (Event.MREMAP, 0, overlap)]
    with pytest.raises(sc.TraceError, match="mremap: another range"):
        programs.run(made(tmp_path / "overlap.screc", steps))


def test_traces_without_events_run(tmp_path):
    """All that such a trace has is outside of every mapping: image, heap and stack are put together from it."""
    rows = np.zeros(3000, dtype=sc.importers.CHAMPSIM_DTYPE)
    rows["ip"] = 0x400000 + 4 * np.arange(3000)
    rows["source_memory"][:, 0] = 0x600000 + 64 * (np.arange(3000) * 7 % 3000)
    rows["destination_memory"][:, 0] = 0x7FFFFFFE0000 - 64 * (np.arange(3000) % 500)
    trace = tmp_path / "trace.champsim"
    trace.write_bytes(rows.tobytes())
    out = tmp_path / "trace.screc"
    sc.importers.convert([trace], out, "champsim")
    results = [programs.run(out, mmu, audit_every=3000) for mmu in DESIGNS]
    assert len({result.history for result in results}) == 1
    assert results[0].refused == 0
    assert results[0].accesses == 9000
    assert results[0].counters["faults"] >= 3 + 47 // 16


# -- comparisons ---------------------------------------------------------------------------------------------------


def test_the_command_prints_a_table_or_json():
    lines = run("programs", FAMILY, "--mmu", "native", "--mmu", "cached").splitlines()
    assert lines[0].strip() == "family: 10,470 accesses"
    assert any(line.startswith("10,470 accesses of 4 processes, ") for line in lines)
    cached = programs.run(FAMILY, "cached", tlb=sc.Costs.modern().tlb)
    exits = next(line for line in lines if "VM exits, all" in line)
    assert re.findall(r"[\d,]+\d|\d", exits) == ["0", f"{cached.stats['exits_total']:,}"]
    arguments = [FAMILY, "--json", "--mode", "pae", "--fold", "--operations", 5000, "--memory", "32MiB"]
    plain = json.loads(run("programs", *arguments))
    entries = plain["designs"].values()
    assert list(plain["designs"]) == ["native", "flush", "cached", "unsync"]
    assert {entry["operations"] for entry in entries} == {5000}
    assert {entry["frames"]["total"] for entry in entries} == {8192}
    assert len({entry["history"] for entry in entries}) == 1


def test_guests_that_did_not_do_the_same_are_no_comparison():
    """A kernel that forgets to flush, under `flush`, where that shows."""
    sloppy = options(sloppy=("fork", "munmap", "cow"))
    with pytest.raises(sc.EngineError, match="family: the guest did not do the same under native, flush"):
        programs.compare(FAMILY, ("native", "flush"), options=sloppy)
