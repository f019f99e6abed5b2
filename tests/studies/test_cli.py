"""The command line: what it prints, what it refuses, and with which exit status it ends."""

import json
import subprocess

import numpy as np
import pytest
import streams
from commands import COMMAND, refused, run
from places import LINUX_FORK

import shadowcore as sc
from shadowcore.engine.reported import UNSYNC
from shadowcore.recording import replay as trace

IMAGE = str(streams.DATA / "linux-pagetables" / "linux_4lvl.npz")
DEFAULT = ["native", "flush", "cached", "unsync"]


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """The first 60,000 records of a recorded Linux guest, as a file."""
    path = tmp_path_factory.mktemp("recordings") / "boot.npz"
    trace.load(LINUX_FORK).head(60_000).save(path)
    return str(path)


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    """So much that there is a user-mode workload in it."""
    path = tmp_path_factory.mktemp("recordings") / "workload.npz"
    trace.load(LINUX_FORK).head(560_000).save(path)
    return str(path)


# -- compare ---------------------------------------------------------------------------------------------


AGILE = ("to_nested", "to_shadow", "nested_walks")
NOT_HERE = ("prev_root_hits", "npf_violation", "npf_misconfig", "pf_fast", *AGILE)
"""Of these there are none so far into the recording, or only under nested paging."""


def test_compare_prints_a_table(recording):
    output = run("compare", recording)
    lines = output.splitlines()
    assert max(map(len, lines)) <= 100
    header = next(line for line in lines if "native" in line)
    assert [word for word in header.split() if word.isalpha()] == DEFAULT
    for row in (
        "page fault: shadow entry missing",
        "page fault: permission",
        "page fault: store to a guest table",
        "CR3 load",
        "INVLPG",
        "VM exits, all",
        "per million guest instructions",
        "emulated stores",
        "shadow pages zapped",
        "by floods of stores, or misaligned ones",
        *(label for counter, label in UNSYNC.items() if counter not in NOT_HERE),
        "shadow pages in use, mean",
        "shadow pages in use, most",
        "entries read by the processor's walks",
        "the guest did the same",
        "seconds",
    ):
        assert sum(row in line for line in lines) == 1, row
    assert "boot: 60,000 records" in output
    assert "Not in the cycles, as no price is published" in output
    old = run("compare", recording, "--mmu", "flush", "--mmu", "cached")
    assert not any(row in old for row in (*UNSYNC.values(), "no price is published"))


def test_compare_json(recording):
    plain = json.loads(run("compare", recording, "--json"))
    assert (plain["workload"], plain["operations"]) == ("boot", 60_000)
    assert list(plain["designs"]) == DEFAULT
    instructions = trace.load(recording).instructions
    for name, design in plain["designs"].items():
        assert design["exits_total"] == sum(design["exits"].values())
        assert set(design["exits"]) == {
            *("fill", "write", "emulate", "guest", "mmio"),
            *("cr0", "cr3", "cr4", "efer", "invlpg"),
        }
        for field in ("unsync_made", "synced", "prefetched", "spurious"):
            assert (design[field] > 0) == (name == "unsync")
        assert design["prev_root_hits"] == 0
        assert set(design["cycles_unpriced"]) == ({"synced", "prefetched"} if name == "unsync" else set())
        for field in ("emulated", "zapped", "flooded", "recycled", "pages_max", "walk_references"):
            assert isinstance(design[field], int)
        assert isinstance(design["pages_mean"], float)
        assert design["seconds"] > 0
        assert design["gpa_mismatches"] == 0
        assert design["instructions"] == instructions
        assert (design["exits_total"] == 0) == (name == "native")


def test_compare_of_chosen_designs_and_pool(recording):
    arguments = ("compare", recording, "--mmu", "cached", "--mmu", "kvm-2007", "--mmu", "cached", "--json")
    designs = json.loads(run(*arguments))["designs"]
    assert list(designs) == ["cached", "kvm-2007"]
    small = json.loads(run(*arguments, "--pool", 16))["designs"]
    assert small["cached"]["recycled"] > designs["cached"]["recycled"] == 0
    assert small["cached"]["pages_max"] <= 16


def test_compare_tells_boot_from_workload(workload):
    output = run("compare", workload)
    assert "in the boot" in output
    assert "in the workload, per million" in output
    assert "Boot ends at record 542,801" in " ".join(output.split())
    plain = json.loads(run("compare", workload, "--json", "--skip-boot"))
    for design in plain["designs"].values():
        assert design["boot"] is None
        assert design["records"] == 560_000 - 542_801
        assert design["gpa_mismatches"] == 0


def test_the_main_job():
    """All default designs on the whole bundled recording; no progress in pipes."""
    done = subprocess.run([*COMMAND, "compare", "--json"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    plain = json.loads(done.stdout)
    assert plain["workload"] == trace.BUNDLED
    assert plain["operations"] == trace.load().operations
    for name in DEFAULT:
        assert plain["designs"][name]["gpa_mismatches"] == 0


def interrupting(monkeypatch, after):
    """Ctrl-C in the replay that comes after so many."""
    replay, calls = trace.replay, []

    def interrupted(*args, **kwargs):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        return replay(*args, **kwargs)

    monkeypatch.setattr(trace, "replay", interrupted)


def test_compare_interrupted_keeps_what_is_done(recording, monkeypatch):
    interrupting(monkeypatch, 2)
    output = run("compare", recording, status=130)
    assert output.splitlines()[-1] == "shadowcore: interrupted"
    assert "flush" in output
    assert "cached" not in output


def test_compare_interrupted_at_once(recording, monkeypatch):
    interrupting(monkeypatch, 0)
    assert run("compare", recording, status=130) == "shadowcore: interrupted\n"


def test_compare_refuses(recording, tmp_path):
    assert "No such file" in refused("compare", tmp_path / "none.npz")
    assert "'fast' is not one of native, flush, cached" in refused("compare", recording, "--mmu", "fast")
    assert "--pool" in refused("compare", recording, "--pool", "3")
    assert "--pool" in refused("compare", recording, "--pool", "many")
    assert "array 'kind' expected" in refused("compare", IMAGE)
    assert "recordings of programs run side by side, nothing else; boot is a recording of guest" in refused(
        "compare", recording, "another"
    )
    broken = tmp_path / "broken.npz"
    with np.load(recording) as file:
        arrays = dict(file.items())
    arrays["kind"] = arrays["kind"].copy()
    arrays["kind"][7] = 11
    np.savez(broken, **arrays)
    assert "broken.npz, record 7: a kind from 1 to 10 expected, not kind 0xb" in refused("compare", broken)


def test_errors_of_the_engine_are_one_line_too(recording, monkeypatch):
    for error in (sc.PoolExhausted(5, 4, (1, 2)), sc.EngineError("on\ntwo lines"), MemoryError()):

        def fails(*args, error=error, **kwargs):
            raise error

        monkeypatch.setattr(trace, "replay", fails)
        refused("compare", recording)
        refused("audit", recording)


# -- walk ------------------------------------------------------------------------------------------------


def test_walk_in_words():
    """A large page of the kernel."""
    tables = streams.linux("linux_4lvl")
    root = tables["root"].tolist().index(int(tables["cr3"]))
    row = np.flatnonzero((tables["leaf_root"] == root) & (tables["leaf_bits"] & 0x80 != 0))[0]
    va, pa = int(tables["leaf_va"][row]), int(tables["leaf_pa"][row])
    output = run("walk", IMAGE, hex(va + 0x1234))
    assert output.startswith(f"gva {va + 0x1234:#x}: supervisor read, 4-level paging, CR3 {tables['cr3']:#x}\n")
    for level, name in ((4, f"PML4E {va >> 39 & 511}"), (2, f"PDE {va >> 21 & 511}")):
        assert f"level {level}  {name} at gpa 0x" in output
    assert "level 1" not in output
    assert output.splitlines()[-1].startswith(f"gpa {pa + 0x1234:#x}, in a page of 2 MiB: ")


def test_walk_json_and_faults():
    for arguments, code in (((), 0), (("--write",), 2), (("--fetch",), 16), (("--user", "--write"), 6)):
        plain = json.loads(run("walk", IMAGE, "0xdead0000", "--json", *arguments))
        assert (plain["fault"], plain["error_code"], plain["gpa"]) == ("#PF", code, None)
        assert plain["levels"][-1]["bits"] == ["not present"]
    assert "is not canonical" in run("walk", IMAGE, "0x1000000000000000")


@pytest.mark.parametrize("name", streams.LINUX)
def test_walk_from_every_root(name):
    tables = streams.linux(name)
    path = streams.DATA / "linux-pagetables" / f"{name}.npz"
    for number, root in enumerate(tables["root"].tolist()):
        row = np.flatnonzero(tables["leaf_root"] == number)[-1]
        va, pa = int(tables["leaf_va"][row]), int(tables["leaf_pa"][row])
        plain = json.loads(run("walk", path, hex(va), "--cr3", root, "--json"))
        assert (plain["gpa"], plain["cr3"]) == (pa, root)


def test_walk_refuses(tmp_path, recording):
    assert "not present" in run("walk", recording, "0")
    assert "No such file" in refused("walk", tmp_path / "none.npz", "0")
    assert "is not a number" in refused("walk", IMAGE, "zero")
    assert "is not within 64 bits" in refused("walk", IMAGE, 1 << 64)
    assert "holds no table at 0x1000" in refused("walk", IMAGE, "0", "--cr3", "0x1000")
    assert "exclude each other" in refused("walk", IMAGE, "0", "--write", "--fetch")
    assert "Missing argument 'VA'" in refused("walk", IMAGE)
    image32 = streams.DATA / "linux-pagetables" / "linux_2lvl.npz"
    assert "32 bits" in refused("walk", image32, "0x100000000")


# -- audit -----------------------------------------------------------------------------------------------


def test_audit(recording):
    output = run("audit", recording, "--every", 9_000)
    assert output == "cached on boot: 60,000 records, 7 audits, no violations\n"
    plain = json.loads(run("audit", recording, "--every", 25_000, "--mmu", "flush", "--pool", 32, "--json"))
    assert (plain["design"], plain["every"], plain["audits"], plain["violations"]) == ("flush", 25_000, 3, [])
    assert plain["records"] == 60_000


def test_audit_with_violations(recording, monkeypatch):
    audit = sc.VM.audit

    def fails(vm):
        report = audit(vm)
        return type(report)(("I3: as asked (page 1)", "I9: too"), 2, report.sptes)

    monkeypatch.setattr(sc.VM, "audit", fails)
    lines = run("audit", recording, "--every", 20_000, status=1).splitlines()
    assert lines == [
        "after record 20,000: I3: as asked (page 1)",
        "after record 20,000: I9: too",
        "cached on boot: 20,000 records, 1 audits, 2 violation(s)",
    ]
    plain = json.loads(run("audit", recording, "--every", 20_000, "--json", status=1))
    assert [v["record"] for v in plain["violations"]] == [20_000, 20_000]


def test_audit_refuses(recording):
    assert "--every" in refused("audit", recording, "--every", 0)
    assert "--mmu" in refused("audit", recording, "--mmu", "fast")


# -- the group -------------------------------------------------------------------------------------------


def test_help_and_version():
    assert run("--version") == f"shadowcore {sc.__version__}\n"
    assert run() == run("--help")
    for command in ("compare", "walk", "audit"):
        assert command in run("--help")
        text = " ".join(run(command, "--help").split())
        options = text.split("Options:")[1].split(" --help")[0]
        for option in options.split(" --")[1:]:
            assert "default: " in option, option
    assert "No such command 'frobnicate'" in refused("frobnicate")
    assert "No such option" in refused("compare", "--fast")


def test_interrupted_anywhere(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trace, "open_recording", interrupted)
    assert run("audit", status=130) == "shadowcore: interrupted\n"
