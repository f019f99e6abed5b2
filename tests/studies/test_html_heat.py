"""Heat on the page of a study: what a recording or a workload says, counted by another way."""

from types import SimpleNamespace

import numpy as np
import pytest
import studies

import shadowcore as sc
from shadowcore import workload
from shadowcore.recording import replay as trace
from shadowcore.report import document
from shadowcore.studies.heat import heat, of_workload

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'shadowcore[report]'")

from html_pages import Parsed, embedded

from shadowcore.report import page

DESIGNS = ("native", "flush", "cached")


def test_heat_counts_what_the_recording_says():
    recording = trace.load().head(120_000)
    warm = heat(recording, DESIGNS, bins=50, rows=32)
    frames, processes = warm["frames"], warm["processes"]
    stores = (recording.kind == trace.STORE) & ~recording.snapshot
    accesses = recording.kind == trace.ACCESS
    gfn = (np.where(stores, recording.addr, recording.value) >> np.uint64(12)).astype(np.int64)
    busy = accesses | stores
    assert frames["counts"].shape[1] == 50
    assert 16 < len(frames["counts"]) <= 32
    assert frames["counts"][-1].any()
    assert frames["counts"].sum() == (busy & (gfn < recording.nframes)).sum() > 10_000
    # One cell, counted one by one.
    row, column = np.unravel_index(frames["counts"].argmax(), frames["counts"].shape)
    begin, end = ([0, *frames["operation"].tolist()][column + k] for k in (0, 1))
    first = int(frames["first_frame"][row])
    inside = [n for n in range(begin, end) if busy[n] and first <= gfn[n] < first + frames["frames_per_row"]]
    assert frames["counts"][row, column] == len(inside) > 0
    # Address spaces, followed record by record.
    loaded, found = "before the first CR3 load", {}
    for kind, addr, is_busy in zip(recording.kind.tolist(), recording.addr.tolist(), busy.tolist(), strict=True):
        if kind == trace.LOAD_CR3:
            loaded = f"CR3 {addr & 0xFFFFFFFFFF000:#x}"
        found[loaded] = found.get(loaded, 0) + is_busy
    assert dict(zip(processes["names"], processes["counts"].sum(axis=1).tolist(), strict=True)) == {
        name: count for name, count in found.items() if count
    }
    assert len(processes["names"]) >= 2
    for name in DESIGNS:
        assert processes["exits"][name].sum() == trace.replay(recording, name).whole.exits_total
    assert processes["exits"]["cached"].sum() > 0


@pytest.mark.parametrize(("start", "stop"), [(0, 60_000), (30_000, 60_000), (59_999, 60_000), (30_000, None)])
def test_heat_of_a_part(start, stop):
    recording = trace.load().head(120_000)
    warm = heat(recording, ("flush", "cached"), start=start, stop=stop)
    for name in ("flush", "cached"):
        replayed = trace.replay(recording, name, start=start, stop=stop)
        assert warm["processes"]["exits"].get(name, np.zeros(1)).sum() == replayed.whole.exits_total
    last = 120_000 if stop is None else stop
    busy = (recording.kind == trace.ACCESS) | ((recording.kind == trace.STORE) & ~recording.snapshot)
    assert warm["processes"]["counts"].sum() == busy[start:last].sum()
    assert warm["frames"]["operation"][-1] == last - start


def test_heat_given_beside_the_study(tmp_path, study):
    cold = SimpleNamespace(**vars(study))
    del cold.frames, cold.processes
    assert document.document(cold)["frames"] is None
    warm = {"frames": study.frames, "processes": study.processes}
    page.write(cold, tmp_path / "out.html", heat=warm)
    plain = embedded(Parsed((tmp_path / "out.html").read_text("utf-8")))
    assert plain["frames"]["counts"] == study.frames["counts"].tolist()
    assert plain["processes"]["names"] == study.processes["names"]


def test_heat_of_the_recording_that_a_study_has(tmp_path):
    cold = studies.study(60_000, ("flush", "cached"), 20, settings={"start": 10_000, "operations": 40_000})
    warm = {part: getattr(cold, part) for part in ("frames", "processes")}
    del cold.frames, cold.processes
    cold.recording = trace.load().head(60_000)
    page.write(cold, tmp_path / "out.html")
    plain = embedded(Parsed((tmp_path / "out.html").read_text("utf-8")))
    expected = heat(cold.recording, ("flush", "cached"), start=10_000, stop=50_000)
    assert plain["frames"]["counts"] == expected["frames"]["counts"].tolist() != warm["frames"]["counts"].tolist()
    exits = {name: matrix.tolist() for name, matrix in expected["processes"]["exits"].items()}
    assert plain["processes"]["exits"] == exits


def test_rates():
    windows = {
        "operation": np.array([10, 20, 30]),
        "accesses": np.array([8, 10, 0]),
        "exits_fill": np.array([2, 5, 0]),
        "exits_write": np.array([2, 0, 0]),
        "spte_removed": np.array([0, 4, 0]),
        "mmu_cache_hit": np.array([0, 3, 0]),
        "mmu_cache_miss": np.array([2, 1, 0]),
        "tlb_hits": np.array([4, 9, 0]),
        "tlb_misses": np.array([4, 1, 0]),
    }
    rates = document._rates(windows)
    assert rates["hits"].tolist() == [0.5, 0.5, 1]
    assert rates["found"].tolist() == [0, 0.75, 0]
    assert rates["refaults"].tolist() == [0, 400, 0]
    assert rates["tlb"].tolist() == [0.5, 0.9, 0]


@pytest.mark.parametrize("name", ["pingpong", "demand", "shell"])
def test_heat_of_a_workload(name):
    small = {"shell": {"work": 2000}, "demand": {"pages": 256}}.get(name, {})
    warm = of_workload(name, DESIGNS, operations=20_000, seed=5, bins=40, rows=16, **small)
    ran = {d: workload.run(name, d, seed=5, operations=20_000, **small).stats for d in DESIGNS}
    processes = warm["processes"]
    assert processes["counts"].sum() >= 20_000  # a string instruction is one operation, and many accesses
    assert warm["frames"]["counts"].sum() == processes["counts"].sum()
    assert processes["counts"].shape == (len(processes["names"]), 40)
    assert len(processes["names"]) >= (1 if name == "demand" else 2)
    assert 8 <= len(warm["frames"]["counts"]) <= 16
    assert warm["frames"]["counts"][-1].any()
    for design in DESIGNS:
        assert processes["exits"][design].sum() == ran[design]["exits_total"]
    assert processes["exits"]["cached"].sum() > 0 == processes["exits"]["native"].sum()
    if name == "pingpong":
        halves = processes["counts"].sum(axis=1) / processes["counts"].sum()
        assert (abs(halves - 0.5) < 0.02).sum() == 2  # two processes take turns


def test_heat_of_a_workload_says_what_its_axis_counts(tmp_path, small):
    warmed = SimpleNamespace(**vars(small) | of_workload("pingpong", ("cached",), operations=5000))
    page.write(warmed, tmp_path / "out.html")
    text = (tmp_path / "out.html").read_text("utf-8")
    assert text.count(">operations, string instructions store by store<") == 3
    assert "axis" not in small.frames


def test_heat_of_a_workload_refuses_what_cannot_be():
    for arguments, words in (
        (("pingpnog",), "pingpong"),
        (("pingpong", ()), "at least one"),
    ):
        with pytest.raises(sc.ConfigError, match=words):
            of_workload(*arguments)
    with pytest.raises(sc.ConfigError, match="bins"):
        of_workload("pingpong", bins=0, operations=1000)


def test_heat_of_a_file_is_that_of_the_recording_in_memory(tmp_path):
    recording = trace.load().head(60_000)
    recording.save(tmp_path / "head.screc")
    ours = heat(recording, ("cached",))
    theirs = heat(trace.open_recording(str(tmp_path / "head.screc")), ("cached",))
    for part in ("frames", "processes"):
        assert (ours[part]["counts"] == theirs[part]["counts"]).all()
    assert (ours["processes"]["exits"]["cached"] == theirs["processes"]["exits"]["cached"]).all()


def test_the_page_of_a_workload_has_maps_of_heat(tmp_path):
    made = sc.study(
        "shell", ["native", "cached"], operations=5_000, windows=500, settings={"mode": "pae", "children": 3}
    )
    page.write(made, tmp_path / "out.html")
    shown = embedded(Parsed((tmp_path / "out.html").read_text("utf-8")))
    expected = of_workload(
        "shell", ["cached"], operations=5_000, children=3, options=sc.KernelOptions(mode="pae"), memory="64MiB"
    )
    assert np.array_equal(shown["frames"]["counts"], expected["frames"]["counts"])
    assert np.array_equal(shown["processes"]["exits"]["cached"], expected["processes"]["exits"]["cached"])
    several = sc.study("shell", ["native"], operations=2_000, windows=500, settings={"vcpus": 2})
    page.write(several, tmp_path / "out.html")
    assert embedded(Parsed((tmp_path / "out.html").read_text("utf-8")))["frames"] is None  # of one processor alone
