"""Studies: workloads and recordings under several designs, with windows."""

import csv
import sys

import numpy as np
import pytest

import shadowcore as sc
from shadowcore import notebook, workload
from shadowcore.recording import replay as trace


@pytest.fixture(scope="module")
def short():
    return trace.load().head(60_000)


@pytest.fixture(scope="module")
def forks():
    return sc.study("fork-storm", operations=60_000, seed=3, pages=64, children=4, written=8, pool=48)


def sums(design):
    """Windows add up to the counters."""
    for name in ("exits_fill", "exits_emulate", "exits_total", "accesses", "walk_references", "mmu_shadow_zapped"):
        assert int(design.windows[name].sum()) == design.counters[name], name
    lengths = {len(column) for column in design.windows.values()}
    assert len(lengths) == 1
    assert {column.dtype for column in design.windows.values()} == {np.dtype(np.uint64)}
    assert design.windows["operation"][-1] == design.operations
    assert np.all(np.diff(design.windows["operation"].astype(np.int64)) > 0)
    assert int(design.windows["pages_max"].max()) == design.pages_max
    assert np.all(design.windows["pages_mean"] <= design.windows["pages_max"])
    assert int(design.windows["cycles"].sum()) == pytest.approx(design.cost.total, rel=1e-3)
    assert int(design.windows["guest_cr3_loads"].sum()) == design.counters["guest_cr3_loads"]


def test_recording(short):
    study = sc.study(short, windows=7_000)
    assert list(study.designs) == ["native", "flush", "cached", "unsync"]
    assert (study.workload, study.kind, study.operations, study.window) == (short.name, "recording", 60_000, 7_000)
    for name, design in study.designs.items():
        direct = trace.replay(short, name)
        assert design.counters.items() >= direct.whole.counters.items()
        assert (design.pages_mean, design.pages_max) == (direct.pages_mean, direct.pages_max)
        assert (design.gpa_mismatches, design.history, design.history_equal) == (0, None, None)
        assert design.windows["operation"].tolist() == [*range(7_000, 60_000, 7_000), 60_000]
        assert int(design.windows["instructions"].sum()) == short.instructions
        sums(design)
        assert design.cost == sc.Costs.modern().of(design.counters, study.designs["native"].counters)
        plain = study.as_dict()["designs"][name]
        assert plain.items() >= (direct.as_dict() | {"seconds": plain["seconds"]}).items()
        assert plain["cycles"] == design.cost.total
    assert study.designs["native"].cost.slow_down == 1
    assert study.designs["flush"].cost.slow_down > 1


def test_recordings_in_blocks_give_the_same(short, tmp_path):
    path = tmp_path / "a.screc"
    short.save(path)
    whole, blocks = sc.study(short, ["cached"], windows=10_000), sc.study(str(path), ["cached"], windows=10_000)
    for name, column in whole.designs["cached"].windows.items():
        assert np.array_equal(column, blocks.designs["cached"].windows[name]), name
    assert whole.designs["cached"].counters == blocks.designs["cached"].counters
    assert str(path) in blocks.command


def test_windows_do_not_change_a_replay(short):
    plain, cut = trace.replay(short, "cached"), trace.replay(short, "cached", window=999)
    assert plain.windows is None
    assert cut.whole == plain.whole
    assert (cut.pages_mean, cut.pages_max, cut.cr3_loads) == (plain.pages_mean, plain.pages_max, plain.cr3_loads)
    assert cut.cr3_loads == int((short.kind == trace.LOAD_CR3).sum())


def test_a_part_of_a_recording(short):
    study = sc.study(short, ["cached"], operations=5_000)
    assert study.designs["cached"].operations == 5_000
    assert study.designs["cached"].cost.slow_down > 1
    with_tlb = sc.study(short, ["native"], tlb=64, windows=0)
    assert with_tlb.designs["native"].counters["tlb_hits"] > 0
    assert with_tlb.designs["native"].windows == {}


def test_workload(forks):
    assert (forks.kind, forks.workload, forks.operations) == ("workload", "fork-storm", 60_000)
    assert len({design.history for design in forks.designs.values()}) == 1
    for design in forks.designs.values():
        assert design.history_equal
        assert design.gpa_mismatches == 0
        assert design.operations == design.result.operations >= 60_000
        assert design.counters["tlb_hits"] > 0
        sums(design)
    assert forks.designs["cached"].design.pool_pages == forks.designs["flush"].design.pool_pages == 48
    assert forks.settings["pages"] == 64
    assert forks.settings["pool"] == 48
    assert forks.command.startswith(
        "shadowcore compare fork-storm --mmu native --mmu flush --mmu cached --mmu unsync --set pages=64"
    )
    assert "--seed 3" in forks.command
    slow = {name: design.cost.slow_down for name, design in forks.designs.items()}
    assert slow["native"] == 1 < slow["flush"]


@pytest.mark.parametrize("name", ["pingpong", "analytics", "shell"])
def test_windows_do_not_change_a_workload(name):
    plain, cut = (workload.run(name, "cached", operations=50_000, seed=5, window=w) for w in (0, 1_000))
    assert plain.windows is None
    assert (cut.history, cut.stats, cut.counters) == (plain.history, plain.stats, plain.counters)
    assert int(cut.windows["exits_total"].sum()) == cut.stats["exits_total"]
    assert int(cut.windows["faults"].sum()) == cut.counters["faults"]


def test_every_workload():
    for name in workload.WORKLOADS:
        study = sc.study(name, ("native", "cached"), operations=5_000, windows=1_000)
        assert study.designs["cached"].history_equal, name
        assert study.designs["cached"].cost.total > 0, name


def test_design_objects_and_settings():
    mine = sc.Shadow.cached(name="mine", flood_threshold=None)
    study = sc.study("pingpong", [mine, "kvm-2007"], operations=5_000, settings={"min_free": 4, "mode": 32})
    assert list(study.designs) == ["mine", "kvm-2007"]
    assert study.designs["mine"].design == sc.Shadow.cached(name="mine", flood_threshold=None, min_free=4)
    assert study.designs["mine"].cost.slow_down > 1  # native ran, unseen
    shell = sc.study("shell", ["native"], operations=1_000, settings={"windows": 3}, windows=0)
    assert shell.settings["windows"] == 3
    own = sc.Costs.modern().replace(name="mine", dispatch=0)
    assert sc.study("idle", ["cached"], operations=1_000, costs=own).designs["cached"].cost.components["dispatch"] == 0


@pytest.mark.parametrize(
    ("arguments", "settings", "what"),
    [
        (("pingpng",), {}, "did you mean 'pingpong'"),
        (("none/here.npz",), {}, "No such file"),
        ((7,), {}, "a name, a path or a recording"),
        (("pingpong", []), {}, "at least one"),
        (("pingpong", ["fast"]), {}, "'fast' is not one of"),
        (("pingpong", [sc.Shadow(), sc.Shadow(pool_pages=9)]), {}, "two are called 'cached'"),
        (("pingpong",), {"page": 3}, "did you mean 'pages'"),
        (("pingpong",), {"pages": 0}, "pingpong: pages"),
        (("pingpong",), {"pool": 1}, "pool: 1 is not"),
        (("pingpong",), {"flood_reset": 1}, "flood_reset"),
        (("pingpong",), {"pcid": 1}, "pcid: true or false"),
        (("pingpong",), {"mode": 16}, "mode"),
        (("pingpong",), {"memory": "1 apple"}, "memory"),
        (("pingpong",), {"tlb": -1}, "tlb"),
        (("pingpong",), {"operations": 0}, "operations"),
        (("pingpong",), {"windows": -1}, "windows"),
        (("pingpong",), {"seed": -1}, "seed"),
        (("pingpong",), {"skip_boot": True}, "skip_boot"),
        (("pingpong",), {"costs": "gold"}, "costs"),
        ((None,), {"pages": 3}, "a recording: there is no setting 'pages'"),
    ],
)
def test_refused(arguments, settings, what):
    with pytest.raises((sc.ConfigError, sc.TraceError), match=what):
        sc.study(*arguments, **settings)


def test_interrupted(short, monkeypatch):
    replay = trace.replay

    def interrupted(recording, made, **options):
        if made.name == "cached":
            raise KeyboardInterrupt
        return replay(recording, made, **options)

    monkeypatch.setattr(trace, "replay", interrupted)
    with pytest.raises(sc.StudyInterrupted) as caught:
        sc.study(short)
    assert list(caught.value.study.designs) == ["native", "flush"]
    assert not caught.value.study.complete


def test_csv(forks, tmp_path):
    forks.to_csv(tmp_path / "a.csv")
    with open(tmp_path / "a.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["design"] for row in rows] == list(forks.designs)
    for row in rows:
        design = forks.designs[row["design"]]
        assert int(row["exits_total"]) == design.exits_total
        assert int(row["exits_fill"]) == design.exits["fill"]
        assert float(row["cycles"]) == design.cost.total


def test_notebooks(forks):
    assert "<caption>fork-storm: 60,000 operations</caption>" in forks._repr_html_()
    vm = sc.VM("16MiB", sc.Shadow.cached(name="<b>"), tlb=sc.TLB())
    tables = sc.PageTables(vm.memory, mode="64", allocate=range(256, 512))
    tables.map(0x400000, 0x200000, 0x10000, "rw")
    cpu = vm.vcpus[0]
    for name, value in tables.registers.items():
        setattr(cpu, name, value)
    ops = np.zeros(3, dtype=sc.OP_DTYPE)
    ops["addr"], ops["size"] = [0x400000, 0x401000, 0x999000], 8
    result = cpu.run(ops)
    assert "RunResult: 3 operations" in result._repr_html_()
    assert "guest page faults" in result._repr_html_()
    assert "exits_fill" in vm.stats._repr_html_()
    assert "exits: fill" in vm._repr_html_()
    assert "&lt;b&gt;" in vm._repr_html_()
    assert "<td" in notebook.counters("none", {})
    assert "0x400000 to 0x40ffff" in tables._repr_html_()
    assert repr(tables.walk(0x400000)[-1]).startswith("Entry(level=1, gpa=0x")
    assert "0x200000" in cpu.translate(0x400000)._repr_html_()
    assert "audit clean" in vm.audit()._repr_html_()
    shadow = vm.mmu._repr_html_()
    assert shadow.startswith("<p><b>&lt;b&gt;: ")
    assert shadow.count("<ul>") == shadow.count("</ul>") >= 4
    for page in vm.mmu.pages["page"].tolist():
        assert f"page {page}: " in shadow
    cached = forks.designs["cached"]
    assert f"{cached.counters['exits_fill']:,}" in cached._repr_html_()
    assert "fork-storm under cached" in cached.result._repr_html_()
    assert "cycles, estimated" in cached.cost._repr_html_()
    assert "windows=" not in repr(cached)
    assert len(repr(cached)) < 7_000  # its counters, no arrays


def test_a_large_tree_is_a_screen():
    below = {node: [2 * node + 1, 2 * node + 2] if node < 500 else [] for node in range(1001)}
    text = notebook.tree("t", {node: f"n{node}" for node in below}, below, [0])
    assert text.count("<li>") == 40
    assert "and 961 more" in text
    shared = notebook.tree("t", {0: "a", 1: "b", 2: "c", 3: "d"}, {0: [1, 2], 1: [3], 2: [1], 3: []}, [0])
    assert shared.count("b (above)") == 1
    assert shared.count("<li>d") == 1


def test_pandas(forks):
    pandas = pytest.importorskip("pandas")
    frame = forks.to_pandas()
    assert frame.loc["cached", "exits_total"] == forks.designs["cached"].exits_total
    windows = forks.windows_to_pandas()
    assert windows.loc["cached"]["exits_total"].sum() == forks.designs["cached"].exits_total
    cpu = sc.VM("1MiB", "native").vcpus[0]
    ops = np.zeros(3, dtype=sc.OP_DTYPE)
    ops["size"], ops["addr"] = 8, [0, 8, 1 << 30]
    result = cpu.run(ops)
    frame = result.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame["gpa"].tolist() == result.gpa.tolist()
    assert frame["outcome"].tolist() == result.outcome.tolist()


def test_without_pandas(forks, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    result = sc.VM("1MiB", "native").vcpus[0].run(np.zeros(0, dtype=sc.OP_DTYPE))
    for call in (forks.to_pandas, forks.windows_to_pandas, result.to_pandas):
        with pytest.raises(sc.ConfigError, match="pip install pandas"):
            call()
