"""The commands compare, report, run, reproduce and completion."""

import csv
import json
import os
import pty
import signal
import subprocess
import sys
import types

import pytest
from commands import COMMAND, refused, run, wait_for_work

import shadowcore as sc
from shadowcore import workload
from shadowcore.recording import replay as trace

SHORT = ("--operations", 20_000)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("recordings") / "boot.npz"
    trace.load().head(20_000).save(path)
    return str(path)


# -- compare ---------------------------------------------------------------------------------------------


def test_a_workload():
    output = run("compare", "pingpong", *SHORT)
    for row in ("VM exits, all", "slow-down against native", "the guest did the same", "TLB misses", "CR3 load"):
        assert row in output
    plain = json.loads(run("compare", "pingpong", *SHORT, "--json"))
    assert (plain["workload"], plain["operations"], plain["kind"]) == ("pingpong", 20_000, "workload")
    for name, design in plain["designs"].items():
        assert design["exits_total"] == sum(design["exits"].values())
        assert design["gpa_mismatches"] == 0
        assert design["history_equal"]
        assert {"emulated", "zapped", "flooded", "recycled", "pages_mean", "pages_max", "walk_references"} <= set(
            design
        )
        assert design["cycles"] == pytest.approx(sum(design["cycles_by_component"].values()))
        assert (design["slow_down"] == 1) == (name == "native")


def test_the_command_repeats_the_study(tmp_path):
    arguments = ("pingpong", "--mmu", "cached", "--set", "pages=40", "--pool", 99, "--seed", 7, *SHORT, "--json")
    first = json.loads(run("compare", *arguments, "--costs", "pvm"))
    again = json.loads(run(*first["command"].split()[1:], "--json"))
    for plain in (first, again):
        del plain["designs"]["cached"]["seconds"], plain["designs"]["cached"]["operations_per_second"]
    assert first == again
    assert first["settings"]["pool"] == 99
    assert first["settings"]["pages"] == 40
    assert first["costs"]["name"] == "pvm-2026-13900hk"  # what the alias stands for


def test_costs_of_a_recording(recording):
    slow = {}
    for costs in ("modern", "core2007"):
        plain = json.loads(run("compare", recording, "--costs", costs, "--json"))
        slow[costs] = plain["designs"]["cached"]["slow_down"]
        assert plain["designs"]["cached"]["costs"] == getattr(sc.Costs, costs)().name
    assert 1 < slow["modern"] != slow["core2007"] > 1


def test_over(recording, tmp_path):
    file = tmp_path / "a.csv"
    arguments = ("compare", recording, "--over", "pool=16,64,256", "--mmu", "cached")
    lines = run(*arguments, "--csv", file).splitlines()
    assert sum(line.split()[:1] == ["cached"] for line in lines) == 3
    plain = json.loads(run(*arguments, "--json"))
    assert (plain["over"], plain["values"]) == ("pool", [16, 64, 256])
    recycled = [study["designs"]["cached"]["recycled"] for study in plain["studies"]]
    assert recycled[0] > recycled[2] == 0
    with open(file, encoding="utf-8") as rows:
        found = list(csv.DictReader(rows))
    assert [(row["pool"], row["design"], int(row["recycled"])) for row in found] == [
        (str(pool), "cached", count) for pool, count in zip((16, 64, 256), recycled, strict=True)
    ]


@pytest.mark.parametrize(
    "over", ["flood_threshold=1,3,none", "tlb=16,none", "pages=4,64", "seed=1,2", "pcid=true,false"]
)
def test_over_other_settings(over):
    plain = json.loads(run("compare", "pingpong", "--over", over, "--operations", 5_000, "--json"))
    assert len(plain["studies"]) == len(plain["values"]) == over.count(",") + 1
    assert plain["values"][-1] in (None, 3, 64, 2, False)


def test_refusals(recording, tmp_path):
    assert "did you mean 'hackbench'" in refused("compare", "hackbnch")
    assert "did you mean 'hackbench'" in refused("run", "hackbnch")
    assert "did you mean 'groups'" in refused("compare", "hackbench", "--set", "group=2")
    assert "is not NAME=VALUE" in refused("compare", "hackbench", "--set", "groups")
    assert "set twice" in refused("compare", "hackbench", "--set", "groups=1", "--set", "groups=2")
    assert "pool is set to one value as well" in refused("compare", "--pool", 9, "--over", "pool=8,9")
    assert "is not NAME=VALUE,VALUE" in refused("compare", "--over", "pool")
    assert "pool: an integer is needed, not 'many'" in refused("compare", recording, "--over", "pool=16,many")
    assert "cannot be written" in refused("compare", "idle", *SHORT, "--csv", tmp_path / "none" / "a.csv")
    assert "'gold' is not one of" in refused("compare", "--costs", "gold")
    assert "groups: 90 is not within 1 to 20" in refused("run", "hackbench", "--set", "groups=90")
    assert "there is no directory nosuch" in refused("compare", "--over", "pool=8,9", "--html", "nosuch/a")


@pytest.mark.parametrize(("option", "module"), [("--html", "page"), ("--timeline", "timeline")])
def test_pages_are_written_by_their_modules(recording, tmp_path, option, module, monkeypatch):
    written = []
    page = types.ModuleType(f"shadowcore.report.{module}")
    page.write = lambda study, path: written.append((study, path))
    monkeypatch.setitem(sys.modules, f"shadowcore.report.{module}", page)
    for command in ["compare", "report"] if option == "--html" else ["compare"]:
        run(command, recording, option, tmp_path / "a")
        study, path = written.pop()
        assert path == str(tmp_path / "a")
        assert isinstance(study, sc.Study)
        assert study.window == 100
        assert study.designs["cached"].windows["operation"][-1] == 20_000
    monkeypatch.setitem(sys.modules, f"shadowcore.report.{module}", None)
    assert f"{option}: " in refused("compare", recording, option, tmp_path / "a")


def test_report_needs_a_file():
    assert "--html" in refused("report")


# -- run -------------------------------------------------------------------------------------------------


def test_run():
    output = run("run", "demand", "--set", "pages=64", *SHORT)
    for word in ("faults_zero", "exits_emulate", "operations a second", "history"):
        assert word in output
    plain = json.loads(run("run", "demand", "--mmu", "native", "--mmu", "flush", *SHORT, "--json"))
    assert list(plain["designs"]) == ["native", "flush"]
    direct = workload.run("demand", "native", operations=20_000, tlb=sc.Costs.modern().tlb)
    assert plain["designs"]["native"]["kernel"] == direct.counters
    assert int(plain["designs"]["flush"]["history"], 16) == direct.history


# -- the rest --------------------------------------------------------------------------------------------


def test_every_option_says_its_default():
    for command in ("compare", "report", "run", "reproduce", "workloads", "calibration"):
        text = " ".join(run(command, "--help").split())
        for option in text.split("Options:")[1].split(" --help")[0].split(" --")[1:]:
            assert "default: " in option or "[required]" in option, option


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete -"), ("zsh", "#compdef"), ("fish", "complete --")])
def test_completion(shell, word):
    script = run("completion", shell)
    assert word in script
    assert "_SHADOWCORE_COMPLETE" in script
    assert json.loads(run("completion", shell, "--json"))["script"] + "\n" == script
    assert "'ksh' is not one of bash, zsh, fish" in refused("completion", "ksh")


@pytest.mark.parametrize(
    ("words", "expected"),
    [("comp", "compare"), ("compare ping", "pingpong"), ("run hack", "hackbench"), ("compare --mmu fl", "flush")],
)
def test_what_is_completed(words, expected):
    *_, last = words.split()
    variables = {
        "_SHADOWCORE_COMPLETE": "bash_complete",
        "COMP_WORDS": f"shadowcore {words}",
        "COMP_CWORD": str(len(words.split())),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    program = "from shadowcore.cli import main; main(prog_name='shadowcore')"
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert f"plain,{expected}" in done.stdout.splitlines(), (last, done.stderr)


def test_ctrl_c_prints_what_was_done():
    """The first designs of a workload that never ends are done; the signal comes in the next one."""
    arguments = ["compare", "pingpong", "--over", "operations=1000,1000000000000", "--mmu", "native", "--json"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        COMMAND + arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        wait_for_work(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert err == "shadowcore: interrupted\n"
    assert list(json.loads(out)["studies"][0]["designs"]) == ["native"]


def test_progress_on_a_terminal_only():
    """With rate; a pipe stays empty."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "TERM": "xterm",
        "COLUMNS": "120",
    }
    command = [*COMMAND, "compare", "database", "--mmu", "cached", "--operations", "3000000", "--json"]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    assert process.stdout is not None
    seen = b""
    while True:
        try:
            piece = os.read(ours, 4096)
        except OSError:
            break
        if not piece:
            break
        seen += piece
    process.stdout.read()
    assert process.wait() == 0
    os.close(ours)
    assert b"operations" in seen
    assert b"/s" in seen
    quiet = subprocess.run([*command[:-2], "1000"], capture_output=True, env=environment, check=True)
    assert quiet.stderr == b""
