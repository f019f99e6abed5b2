"""What a study runs: each kind of source under each option, in each command, with one shape of result."""

import csv
import json

import numpy as np
import pytest
import sources
from commands import refused, run
from places import LINUX_FORK
from program_recordings import FAMILY, TRUE

import shadowcore as sc
from shadowcore.recording import operations as replayed
from shadowcore.recording.format import INCOMPLETE
from shadowcore.recordings import PROGRAM, Event, Reader, Writer
from shadowcore.studies.results import Swept
from shadowcore.studies.source import find

UNITS = {"workload": "operations", "guest": "records", "operations": "operations", "program": "accesses"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sources")


@pytest.fixture(scope="module", params=sources.KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def words(kind, folder):
    """The source on the command line, cut short."""
    return [sources.made(kind, folder), "--operations", "4K"]


@pytest.fixture(scope="module")
def shapes(folder):
    """Names in the JSON of each kind."""
    found = {}
    for each in sources.KINDS:
        plain = json.loads(
            run("compare", sources.made(each, folder), "--operations", "4K", "--mmu", "cached", "--json")
        )
        found[each] = plain
    return found


def test_one_shape_of_json(shapes):
    first = shapes["workload"]
    for kind, plain in shapes.items():
        assert set(plain) == set(first)
        assert set(plain["designs"]["cached"]) == set(first["designs"]["cached"])
        assert plain["stream"] == (None if kind == "workload" else kind)
        assert plain["kind"] == ("workload" if kind == "workload" else "recording")
        assert plain["unit"] == UNITS[kind]
        assert plain["recording_complete"] is True
        assert (plain["holdings"] is None) == (kind == "workload")
        design = plain["designs"]["cached"]
        assert design["operations"] >= 4000
        assert design["exits_total"] == sum(design["exits"].values()) > 0
        assert design["gpa_mismatches"] == 0
        assert 0 < design["pages_mean"] <= design["pages_max"]
        assert design["slow_down"] > 1
        assert design["slow_down_against"] == "native"


def test_the_table(kind, words):
    text = " ".join(run("compare", *words, "--mmu", "native", "--mmu", "unsync").split())
    for row in ("VM exits, all", "shadow pages in use, mean", "slow-down against native", "seconds"):
        assert row in text
    per = "guest instructions" if kind == "guest" else UNITS[kind]
    assert f"per million {per}" in text
    assert "accesses that reached another gpa" not in text  # none did
    assert "the guest did the same yes yes" in text
    assert ("The recording has" in text) == (kind != "workload")


def test_every_output_at_once(kind, words, tmp_path):
    page, rows, line = (tmp_path / name for name in ("page.html", "rows.csv", "line.json"))
    more = (
        "--mmu",
        "native",
        "--mmu",
        "cached",
        "--costs",
        "pvm",
        "--set",
        "min_free=6",
        "--pool",
        64,
        "--warm-up",
        1000,
    )
    outputs = ("--html", page, "--csv", rows, "--timeline", line, "--windows", 500)
    plain = json.loads(run("compare", *words, *more, *outputs, "--json"))
    design = plain["designs"]["cached"]
    assert plain["costs"]["name"].startswith("pvm")
    assert plain["settings"]["pool"] == 64
    assert plain["warm_up"] == 1000
    assert json.loads(run(*plain["command"].split()[1:], "--json"))["designs"]["cached"]["exits"] == design["exits"]
    with open(rows, encoding="utf-8") as file:
        found = {row["design"]: row for row in csv.DictReader(file)}
    assert int(found["cached"]["exits_total"]) == design["exits_total"]
    assert int(found["cached"]["warm_up"]) == design["warm_up"] >= 1000
    timeline = json.loads(line.read_text())
    assert timeline["otherData"]["warm_up"] == 1000
    ends = max(event["ts"] for event in timeline["traceEvents"] if event["ph"] == "C")
    assert ends == design["operations"]
    text = page.read_text()
    assert f"{UNITS[kind]}, counted from 1,000 on," in text
    assert ("The recording has" in text) == (kind != "workload")


def test_over(kind, words, tmp_path):
    rows = tmp_path / "rows.csv"
    arguments = ("compare", *words, "--mmu", "cached", "--over", "pool=8,64,none")[:-1]
    plain = json.loads(run(*arguments, "pool=16,64", "--json", "--csv", rows))
    assert (plain["over"], plain["values"], plain["base"]) == ("pool", [16, 64], None)
    assert [study["settings"]["pool"] for study in plain["studies"]] == [16, 64]
    with open(rows, encoding="utf-8") as file:
        assert [row["pool"] for row in csv.DictReader(file)] == ["16", "64"]
    assert "over pool" in run(*arguments, "pool=16,64")


def test_run(kind, words):
    text = run("run", *words, "--mmu", "cached")
    for word in ("the guest", "the engine", "exits_total", f"{UNITS[kind]} a second"):
        assert word in text
    plain = json.loads(run("run", *words, "--mmu", "cached", "--json"))
    design = plain["designs"]["cached"]
    assert design["counters"]["exits_total"] == design["exits_total"]


def test_audit(kind, words):
    text = run("audit", *words, "--every", "1K", "--mmu", "unsync", "--set", "prev_roots=1")
    assert "no violations" in text
    assert f" {UNITS[kind]}, " in text
    plain = json.loads(run("audit", *words, "--every", 1000, "--json"))
    assert plain["audits"] >= 2
    assert plain["violations"] == []
    assert plain["exits_total"] > 0
    short = (words[0], "--operations", 400)
    assert "no violations" in run("audit", *short, "--at", "post-fault")


def test_audit_that_finds_something(kind, words, monkeypatch):
    audit = sc.VM.audit

    def fails(vm, strict=False):
        report = audit(vm)
        made = type(report)(("I3: as asked (page 1)", "I9: too"), 2, report.sptes)
        if strict:
            raise sc.AuditError(made.violations)
        return made

    monkeypatch.setattr(sc.VM, "audit", fails)
    lines = run("audit", *words, "--every", 2000, status=1).splitlines()
    assert lines[0].startswith("after ")
    assert lines[0].endswith(": I3: as asked (page 1)")
    assert "1 audits, 2 violation(s)" in lines[2]
    plain = json.loads(run("audit", *words, "--every", 2000, "--json", status=1))
    assert plain["audits"] == 1
    assert [v["violation"] for v in plain["violations"]] == ["I3: as asked (page 1)", "I9: too"]
    assert plain["violations"][0]["record"] >= 2000
    assert plain["workload"]


def test_info(kind, words):
    text = run("info", words[0])
    assert ("parameters" if kind == "workload" else kind) in text
    plain = json.loads(run("info", words[0], "--json"))
    assert plain["stream"] == (None if kind == "workload" else kind)


def test_python_takes_the_same(kind, words):
    study = sc.compare(words[0], ["native", "cached"], operations=4000, warm_up=1000, pool=64)
    assert isinstance(study, sc.Study)
    assert (study.unit, study.warm_up) == (UNITS[kind], 1000)
    assert study.designs["cached"].cost.slow_down > 1
    swept = sc.compare(words[0], ["cached"], over={"pool": [16, 64]}, operations=4000)
    assert isinstance(swept, Swept)
    assert [value for value, _ in swept.points] == [16, 64]
    assert study.designs["cached"].windows["operation"][-1] == study.designs["cached"].operations


# -- recordings of operations, and of programs -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def operations(folder):
    return sources.operations(folder / "ops.screc")


def test_operations_are_those_of_cpu_run(operations):
    for design in ("native", "flush", "cached", "unsync"):
        with Reader(operations) as reader:
            vm = sc.trace.machine(reader, design)
            results = [vm.vcpus[0].run(part) for part in reader.operations()]
        found = replayed.run(operations, design, window=700)
        assert found.stats == vm.stats.as_dict()
        outcome = np.concatenate([result.outcome for result in results])
        assert found.counts["guest_faults"] == int((outcome == 1).sum() + (outcome == 2).sum()) > 0
        assert found.counts["cr3"] == 79
        assert found.windows["operation"].tolist() == [*range(700, 4000, 700), 4000]
        assert int(found.windows["exits_total"].sum()) == found.stats["exits_total"]
        assert int(found.windows["faults"].sum()) == found.counts["guest_faults"]
        assert found.as_dict()["history"] == found.history
    assert len({replayed.run(operations, design).history for design in ("native", "cached", "kvm-2007")}) == 1


def test_a_guest_that_sees_something_else_is_told(tmp_path):
    """`flush` and `unsync` are late to see a table's change that no INVLPG follows."""
    vm = sc.VM(memory="1MiB", mmu="native")
    tables = sc.PageTables(vm.memory, mode="64", allocate=range(128, 200))
    tables.map(0x400000, 0x10000, 0x2000, "rw")
    tables.map(0x800000, 128 << 12, 0x40000, "rw")
    tables.activate(vm.vcpus[0])
    entry = tables.walk(0x400000)[-1]
    ops = np.zeros(3, sc.OP_DTYPE)
    ops["op"], ops["size"] = [sc.Op.READ, sc.Op.WRITE, sc.Op.READ], 8
    ops["addr"] = [0x400000, 0x800000 + entry.gpa - (128 << 12), 0x400000]
    ops["value"] = entry.value + 0x1000
    with Writer(tmp_path / "late.screc", "operations", vm=vm) as writer:
        writer.write(ops)
    plain = json.loads(run("compare", tmp_path / "late.screc", "--json"))["designs"]
    same = {name: design["history_equal"] for name, design in plain.items()}
    assert same == {"native": True, "flush": False, "cached": True, "unsync": False}
    assert plain["flush"]["gpa_mismatches"] is None
    assert "no" in run("compare", tmp_path / "late.screc", "--mmu", "native", "--mmu", "flush").split("did the same")[1]


def test_operations_without_a_machine_are_refused(tmp_path):
    with Writer(tmp_path / "bare.screc", "operations") as writer:
        writer.write(np.zeros(5, sc.OP_DTYPE))
    for command in ("compare", "run", "audit"):
        assert "with the machine that they start on" in refused(command, tmp_path / "bare.screc")


def test_programs_side_by_side():
    plain = json.loads(run("compare", FAMILY, TRUE, "--mmu", "cached", "--set", "turn=1K", "--json"))
    direct = sc.programs.run([FAMILY, TRUE], "cached", turn=1000, tlb=sc.Costs.modern().tlb)
    assert plain["workload"] == "family+true"
    assert plain["designs"]["cached"]["exits_total"] == direct.stats["exits_total"]
    assert int(plain["designs"]["cached"]["history"], 16) == direct.history
    assert plain["holdings"]["order"] is False
    assert plain["holdings"]["processes"] == len(direct.processes)
    assert "family.screc" in plain["command"]
    assert "true.screc" in plain["command"]


def test_programs_is_a_name_for_it():
    arguments = (FAMILY, "--mmu", "cached", "--operations", 3000, "--json")
    plain, other = (json.loads(run(name, *arguments)) for name in ("compare", "programs"))
    for each in (plain, other):
        del each["designs"]["cached"]["seconds"], each["designs"]["cached"]["operations_per_second"]
    assert plain == other
    long = json.loads(run("programs", *arguments, "--mode", "pae", "--fold", "--isolation", "--turn", "2K"))
    settings = {"mode": "pae", "fold": True, "isolation": True, "turn": 2000}
    assert long["settings"].items() >= settings.items()


def test_guest_settings_of_programs():
    small = json.loads(run("compare", FAMILY, "--mmu", "cached", "--set", "isolation=true", "--json"))
    assert small["designs"]["cached"]["cr3_loads"] > 100
    assert "did you mean 'isolation'" in refused("compare", FAMILY, "--set", "isolaton=true")
    assert "fold: True or False is needed" in refused("compare", FAMILY, "--set", "fold=7")
    assert "does not hold its kernel" in refused("compare", FAMILY, "--set", "memory=256K")


# -- what they have and lack, and where they end ---------------------------------------------------------------------


def test_what_a_recording_has_and_lacks(folder):
    path, _ = sources.marked(folder / "marked.screc")
    text = " ".join(run("compare", path, "--mmu", "cached").split())
    has, lacks = text.split("The recording has ")[1].split("It lacks ")
    assert has == "instruction fetches, sizes of accesses, CPL, large pages (2 MiB), 3 marks. "
    assert lacks.startswith("EFER loads, PCIDs, INVPCID, more than one vCPU.")
    found = sc.trace.open_recording(path).holdings
    assert found["large_pages"] == ["2 MiB"]
    assert (found["fetches"], found["cpl"], found["vcpus"], found["marks"]) == (True, True, 1, 3)
    old = sc.trace.load(LINUX_FORK).head(3000).holdings
    assert (old["fetches"], old["sizes"], old["cpl"]) == (False, False, False)
    assert "exits for code pages are missing" in " ".join(
        run("compare", LINUX_FORK, "--mmu", "native", "--operations", 1000).split()
    )


def test_a_survey_of_pieces_finds_the_same(folder):
    """Of a file in blocks, which is looked at piece by piece."""
    path = folder / "pieces.screc"
    recording = sc.trace.load(LINUX_FORK).head(70_000)
    recording.save(path)
    assert sc.trace.open_recording(path).holdings == recording.holdings
    assert recording.holdings["large_pages"] == ["2 MiB"]


@pytest.fixture(scope="module", params=["guest", "operations", "program"])
def incomplete(request, folder):
    path = folder / f"cut-{request.param}.screc"
    if request.param == "operations":
        return sources.operations(path, complete=False)
    if request.param == "program":
        with Writer(path, PROGRAM) as writer:
            writer.processes.append({"number": 0})
            writer.event(Event.RUN, 0)
            writer.write(op=np.zeros(64, "u1"), size=8, addr=np.arange(64, dtype=np.uint64) << 12)
            writer.close(complete=False)
        return path
    whole = sources.guest(folder / "whole.screc", 3000)
    loaded = sc.trace.load(whole)
    registers = {name: getattr(loaded, name) for name in ("cr0", "cr4", "efer", "nframes")}
    with Writer(path, "guest", guest=registers) as writer:
        writer.write(**loaded.arrays)
        writer.close(complete=False)
    return path


def test_incomplete_recordings_say_so_everywhere(incomplete, tmp_path):
    page, rows, line = (tmp_path / name for name in ("page.html", "rows.csv", "line.json"))
    outputs = ("--html", page, "--csv", rows, "--timeline", line, "--mmu", "native")
    assert f"{INCOMPLETE}." in " ".join(run("compare", incomplete, *outputs).split())
    assert f"<strong>{INCOMPLETE}.</strong>" in page.read_text()
    with open(rows, encoding="utf-8") as file:
        assert [row["recording_complete"] for row in csv.DictReader(file)] == ["False"]
    assert json.loads(line.read_text())["otherData"]["recording_complete"] is False
    swept = ("compare", incomplete, "--over", "tlb=16,none", "--mmu", "native")
    for command in (("compare", incomplete), ("run", incomplete), swept, ("audit", incomplete)):
        assert f"{INCOMPLETE}." in " ".join(run(*command).split())
    assert json.loads(run("compare", incomplete, "--json"))["recording_complete"] is False
    assert json.loads(run("audit", incomplete, "--json"))["recording_complete"] is False
    assert all(not study["recording_complete"] for study in json.loads(run(*swept, "--json"))["studies"])
    assert json.loads(run("info", incomplete, "--json"))["complete"] is False
    assert INCOMPLETE in sc.compare(str(incomplete), ["native"])._repr_html_()


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("GUEST", "FAMILY"), "recordings of programs run side by side"),
        (("pingpong", "hackbench"), "recordings of programs run side by side"),
        (("GUEST", "--seed", 1), "seed"),
        (("OPERATIONS", "--seed", 1), "seed"),
        (("OPERATIONS", "--skip-boot"), "has no boot"),
        (("FAMILY", "--skip-boot"), "has no boot"),
        (("OPERATIONS", "--set", "isolation=true"), "a recording of operations: there is no setting 'isolation'"),
        (("GUEST", "--set", "turn=5"), "a recording: there is no setting 'turn'"),
        (("FAMILY", "--set", "vcpus=2"), "a recording of programs: there is no setting 'vcpus'"),
        (("FAMILY", "--set", "groups=2"), "a recording of programs: there is no setting 'groups'"),
        (("GUEST", "--over", "memory=1M,2M"), "a recording: there is no setting 'memory'"),
        (("GUEST", "--over", "isolation=false,true", "--base", "true"), "base"),
        (("GUEST", "--base", "true"), "base"),
        (("pingpong", "--over", "isolation=false,true", "--base", "maybe"), "base: one of the values of isolation"),
        (("pingpong", "--over", "pool=8,16", "--base", "8"), "base: it is for a setting of the guest kernel"),
        (("pingpong", "--operations", "1.5"), "'1.5' is not a count"),
        (("pingpong", "--operations", "many"), "'many' is not a count"),
        (("pingpong", "--operations", "0"), "0 is not at least 1"),
        (("pingpong", "--pool", "16M"), "16,000,000 is not at most"),
        (("pingpong", "--over", "operations=1K,few"), "operations"),
        (("pingpong", "--over", "seed=1,x"), "seed"),
        (("pingpong", "--over", "warm_up=0,boot"), "warm_up"),
    ],
    ids=lambda a: " ".join(map(str, a)) if isinstance(a, tuple) else "",
)
def test_refused(arguments, why, folder, operations, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"GUEST": folder / "guest.screc", "FAMILY": FAMILY, "OPERATIONS": operations}
    if not names["GUEST"].exists():
        sources.guest(names["GUEST"])
    assert why in refused("compare", *(names.get(a, a) for a in arguments), "--csv", "rows.csv")
    assert not list(tmp_path.iterdir())


def test_find_takes_what_a_study_takes(operations):
    assert [find(each).kind for each in (None, "idle", operations)] == ["recording", "workload", "recording"]
    assert find(find("idle")).name == "idle"
    assert find([FAMILY]).words == (str(FAMILY),)
    assert "idle" in repr(find("idle"))
    with pytest.raises(sc.ConfigError, match="at least one"):
        find([])
    assert [find(each).frames() for each in ("idle", operations)] == [find("idle").frames(), 256]
    assert find(str(FAMILY)).frames() >= 4096
