"""The timeline of a study keeps the rules of the trace-event format, and has the study's numbers."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from places import LINUX_FORK

import shadowcore as sc
from shadowcore.recording import replay as trace
from shadowcore.recording.kinds import LOAD_CR3
from shadowcore.report import timeline
from shadowcore.report.document import EXITS

DESIGNS = ("native", "flush", "cached")


def written(study, path, **options):
    timeline.write(study, path, **options)

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    return json.loads(path.read_text("utf-8"), parse_constant=refuse)


def check_format(trace):
    """What the format asks of counters ("C") and metadata ("M"), and what viewers need besides."""
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    last = -math.inf
    pids, named = set(), {}
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert event["name"]
        assert type(event["pid"]) is int
        assert type(event["tid"]) is int
        assert isinstance(event["args"], dict)
        if event["ph"] == "M":
            assert "ts" not in event
            assert last == -math.inf, "names come first"
            if event["name"] == "process_name":
                assert set(event["args"]) == {"name"}
                named[event["pid"]] = event["args"]["name"]
            else:
                kinds = {"process_sort_index": int, "process_labels": str, "thread_name": str}
                (value,) = event["args"].values()
                assert type(value) is kinds[event["name"]]
            continue
        more = {"C": set(), "X": {"dur"}, "i": {"s"}}[event["ph"]]
        assert set(event) == {"name", "ph", "pid", "tid", "ts", "args"} | more
        if event["ph"] == "X":
            assert event["dur"] > 0
        assert isinstance(event["ts"], (int, float))
        assert event["ts"] >= 0
        assert event["ts"] >= last, "sorted by time"
        last = event["ts"]
        assert event["args"]
        assert all(
            isinstance(key, str) and (type(n) is str or (type(n) in (int, float) and math.isfinite(n)))
            for key, n in event["args"].items()
        )
        pids.add(event["pid"])
    assert pids
    assert pids <= set(named)
    tracks = {}
    for event in trace["traceEvents"]:
        if event["ph"] == "C":
            track = tracks.setdefault((named[event["pid"]], event["name"]), [])
            assert not track or set(track[-1]["args"]) == set(event["args"]), "a track has the same series throughout"
            assert not track or event["ts"] >= track[-1]["ts"]
            track.append(event)
    return tracks


@pytest.mark.parametrize("time", timeline.TIMES)
def test_the_format_and_the_numbers(tmp_path, study, time):
    trace = written(study, tmp_path / "out.json", time=time)
    tracks = check_format(trace)
    assert trace["otherData"]["command"] == study.command
    assert json.loads(trace["otherData"]["settings"]) == study.settings
    for name, result in study.designs.items():
        label = f"{name} ({study.workload})"
        windows = result.windows
        exits = tracks.get((label, "VM exits"), [])
        assert bool(exits) == (name != "native")
        for i, event in enumerate(exits[:-1]):
            for kind, count in event["args"].items():
                (reason,) = (reason for reason, known in EXITS.items() if known == kind)
                assert count == windows[f"exits_{reason}"][i]
            assert sum(event["args"].values()) == windows["exits_total"][i]
        if exits:
            assert set(exits[-1]["args"].values()) == {0}
            assert len(exits) == len(windows["operation"]) + 1
            begins = [event["ts"] for event in exits]
            if time == "operations":
                assert begins == [0, *windows["operation"].tolist()]
            else:
                assert begins[-1] == pytest.approx(result.cost.microseconds, abs=1e-3)
            pages = tracks[label, "shadow pages"]
            assert [event["args"]["max"] for event in pages[:-1]] == windows["pages_max"].tolist()
            assert [event["args"]["mean"] for event in pages[:-1]] == windows["pages_mean"].tolist()
        walks = tracks[label, "entries read by walks"]
        assert sum(event["args"]["in the window"] for event in walks) == result.counters["walk_references"] > 0


def test_microseconds_follow_the_cycles_of_windows(study):
    result = SimpleNamespace(**vars(study.designs["cached"]))
    cycles = np.zeros(len(result.windows["operation"]))
    cycles[:2] = 30, 10
    result.windows = result.windows | {"cycles": cycles}
    result.cost = SimpleNamespace(microseconds=8.0)
    changed = SimpleNamespace(**vars(study) | {"designs": {"cached": result}})
    exits = [e for e in timeline.events(changed, "microseconds")["traceEvents"] if e["name"] == "VM exits"]
    assert [event["ts"] for event in exits[:4]] == [0, 6, 8, 8]


def test_refusals_are_one_line_and_write_nothing(tmp_path, study):
    bare = SimpleNamespace(**vars(study.designs["cached"]) | {"windows": {}})
    costless = SimpleNamespace(**vars(study.designs["cached"]) | {"cost": None})
    for designs, options, words in (
        ({"cached": bare}, {}, "no windows"),
        ({"cached": costless}, {"time": "microseconds"}, "cached has no cost"),
        (study.designs, {"time": "hours"}, "operations, microseconds expected, not 'hours'"),
    ):
        with pytest.raises(sc.ConfigError, match=words) as caught:
            timeline.write(SimpleNamespace(**vars(study) | {"designs": designs}), tmp_path / "out.json", **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        timeline.write(study, tmp_path / "missing" / "out.json")
    assert not list(tmp_path.iterdir())


def test_a_study_of_the_package(tmp_path):
    module = pytest.importorskip("shadowcore.studies.study", reason="there is no shadowcore.studies.study yet")
    made = module.study("pingpong", DESIGNS, operations=200_000)
    tracks = check_format(written(made, tmp_path / "out.json"))
    assert tracks[f"cached ({made.workload})", "VM exits"]


@pytest.fixture(scope="module")
def guest():
    return sc.study(LINUX_FORK, ["native", "cached"], windows=10_000)


def test_slices_of_address_spaces_and_phases(tmp_path, guest):
    trace_ = written(guest, tmp_path / "out.json")
    check_format(trace_)
    slices = [event for event in trace_["traceEvents"] if event["ph"] == "X" and event["pid"] == 2]
    spaces = [event for event in slices if event["name"].startswith("root ")]
    recording = trace.load(LINUX_FORK)
    loads = np.flatnonzero(recording.kind == LOAD_CR3)
    roots = recording.addr[loads] & np.uint64(0x000F_FFFF_FFFF_F000)
    assert {event["name"] for event in spaces} == {f"root {int(root):#x}" for root in roots}
    assert spaces[0]["ts"] == loads[0]
    for event, after in itertools.pairwise(spaces):
        assert event["ts"] + event["dur"] == after["ts"]  # one is loaded at any time
        assert event["name"] != after["name"]
        at = int(np.searchsorted(loads, event["ts"], side="right")) - 1
        assert event["name"] == f"root {int(roots[at]):#x}"
    assert spaces[-1]["ts"] + spaces[-1]["dur"] == guest.designs["cached"].operations
    boot, *_ = (event for event in slices if event["name"] == "boot")
    assert (boot["ts"], boot["dur"]) == (0, guest.recording.phases["boot"])


@pytest.mark.parametrize("source", ["fork-storm", "guest"])
def test_instants_of_a_log_of_exits(source, tmp_path):
    """Each at the operation of its exit, which lies in the window that counts it."""
    of = sc.trace.load().head(9000) if source == "guest" else source
    study = sc.study(of, ["cached", "unsync"], operations=8000, windows=500, warm_up=1000, log_exits=True)
    trace_ = written(study, tmp_path / "out.json")
    found = 0
    for pid, design in enumerate(study.designs.values(), 1):
        ends = design.windows["operation"]
        for name, counter in (("zap", "mmu_shadow_zapped"), ("sync", "synced")):
            told = [e for e in trace_["traceEvents"] if e["ph"] == "i" and e["name"] == name and e["pid"] == pid]
            in_window = np.zeros(len(ends), np.int64)
            for event in told:
                assert event["ts"] == event["args"]["operation"] - 1000
                in_window[np.searchsorted(ends, event["ts"], "right")] += event["args"]["pages"]
            assert in_window.sum() == design.windows[counter].sum()
            if source == "guest":
                assert in_window.tolist() == design.windows[counter].tolist()
            found += len(told)
    assert found > 10


def test_instants_are_what_windows_count(tmp_path, guest):
    trace_ = written(guest, tmp_path / "out.json")
    windows = guest.designs["cached"].windows
    for name, counter in (("zap", "mmu_shadow_zapped"), ("flood", "mmu_flooded"), ("recycle", "mmu_recycled")):
        told = [e for e in trace_["traceEvents"] if e["ph"] == "i" and e["name"] == name and e["pid"] == 2]
        values = windows[counter]
        assert [event["args"]["in the window"] for event in told] == values[values > 0].tolist()
        begins = np.concatenate(([0], windows["operation"][:-1]))[values > 0]
        assert [event["ts"] for event in told] == begins.tolist()
    assert any(event["ph"] == "i" for event in trace_["traceEvents"])
