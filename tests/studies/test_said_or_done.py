"""A command that ends with status 0 has done what was asked; what it cannot do, or not in whole, it says."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from commands import COMMAND, ENVIRONMENT, refused, run
from places import DATA

import shadowcore as sc
from shadowcore.cli import main
from shadowcore.recording import importers
from shadowcore.recording import replay as trace
from shadowcore.recording.format import INCOMPLETE
from shadowcore.recordings import GUEST, Reader, Writer

FILES = DATA / "odd-files"
SCALARS = ("cr0", "cr4", "efer", "nframes")
SHORT = ("--operations", 2000)


@pytest.fixture(scope="module")
def guest(tmp_path_factory):
    path = tmp_path_factory.mktemp("guest") / "guest.npz"
    trace.load().head(3000).save(path)
    return path


# -- options -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "pingpong", *SHORT, "--over", "pool=16,32", "--over", "pool=64"),
        ("compare", "pingpong", *SHORT, "--seed", 1, "--seed", 2),
        ("compare", "pingpong", *SHORT, "--pool", 16, "--pool", 32),
        ("compare", "pingpong", *SHORT, "--csv", "a.csv", "--csv", "b.csv"),
        ("run", "pingpong", *SHORT, "--operations", 3),
        ("programs", "x.screc", "--mode", "32", "--mode", "64"),
        ("audit", "--mmu", "cached", "--mmu", "native"),
        ("calibration", "--spaces", 1, "--spaces", 2),
        ("import", "x", "-o", "a.screc", "--output", "b.screc"),
        ("walk", "x", 0, "--cr3", 1, "--cr3", 2),
    ],
    ids=lambda a: f"{a[0]} {a[-2]}",
)
def test_options_of_one_value_are_given_once(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "one is allowed" in refused(*arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (("compare", "GUEST", "--seed", 3), "seed"),
        (("compare", "GUEST", "--over", "seed=1,2"), "seed"),
        (("compare", "pingpong", "--skip-boot"), "skip_boot"),
        (("compare", "GUEST", "--skip-boot"), "user-mode"),
        (("compare", "pingpong", "--windows", 100), "--windows"),
        (("compare", "pingpong", "--mmu", "native", "--pool", 16), "pool"),
        (("compare", "pingpong", "--mmu", "native", "--mmu", "flush", "--set", "flood_threshold=1"), "flood_threshold"),
        (("compare", "pingpong", "--mmu", "flush", "--set", "refill=30"), "refill"),
        (("compare", "pingpong", "--seed", 3, "--over", "seed=1,2"), "seed"),
        (("compare", "pingpong", "--operations", 3000, "--over", "operations=1000,2000"), "operations"),
        (("compare", "pingpong", "--over", "pool=16,,32"), "NAME=VALUE"),
        (("audit", "GUEST", "--mmu", "native", "--pool", 16), "pool"),
        (("run", "pingpong", "--mmu", "native", "--pool", 16), "pool"),
    ],
    ids=lambda a: " ".join(map(str, a[2:])) if isinstance(a, tuple) else "",
)
def test_options_that_would_do_nothing_are_refused(arguments, why, guest):
    assert why in refused(*(guest if a == "GUEST" else a for a in arguments))


def test_settings_that_one_of_the_designs_has_are_taken():
    run("compare", "pingpong", *SHORT, "--pool", 32, "--set", "refill=30")


@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "pingpong", *SHORT, "--html", "x", "--csv", "x"),
        ("compare", "pingpong", *SHORT, "--timeline", "x", "--html", "./x"),
        ("compare", "guest.npz", "--csv", "guest.npz"),
        ("compare", "guest.npz", "--csv", "link"),
        ("import", "guest.npz.partial", "-o", "guest.npz"),
        ("reproduce", "--write", "page", "--check", "page"),
    ],
    ids=lambda a: " ".join(map(str, a[-4:])),
)
def test_no_file_is_written_over_another_of_the_same_command(arguments, guest, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("guest.npz", "guest.npz.partial"):
        Path(name).write_bytes(guest.read_bytes())
    Path("link").symlink_to("guest.npz")
    assert "another file" in refused(*arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["guest.npz", "guest.npz.partial", "link"]
    assert Path("guest.npz").read_bytes() == guest.read_bytes()


@pytest.mark.parametrize("name", ["-", ""])
@pytest.mark.parametrize(
    "arguments",
    [
        ("compare", "pingpong", "--csv"),
        ("compare", "pingpong", "--html"),
        ("compare", "pingpong", "--timeline"),
        ("report", "pingpong", "--html"),
        ("reproduce", "--write"),
        ("import", "x", "-o"),
        ("record", "-o"),
    ],
    ids=lambda a: f"{a[0]} {a[-1]}",
)
def test_a_dash_is_no_file(arguments, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = ("--", "true") if arguments[0] == "record" else ()
    assert "name of a file" in refused(*arguments, name, *more)
    assert not list(tmp_path.iterdir())


# -- recordings that ended before their time ----------------------------------------------------------------


@pytest.fixture(scope="module", params=["npz", "screc"])
def incomplete(request, guest, tmp_path_factory):
    path = tmp_path_factory.mktemp("incomplete") / "cut.screc"
    loaded = trace.load(guest)
    with Writer(path, GUEST, guest={name: getattr(loaded, name) for name in SCALARS}) as writer:
        writer.write(**loaded.arrays)
        writer.close(complete=False)
    if request.param == "npz":
        trace.load(path).save(path.with_suffix(".npz"))
    return path.with_suffix(f".{request.param}")


def test_figures_of_an_incomplete_recording_say_so(incomplete, tmp_path):
    page, rows, line = (tmp_path / name for name in ("page.html", "rows.csv", "line.json"))
    outputs = ("--html", page, "--csv", rows, "--timeline", line)
    text = " ".join(run("compare", incomplete, *outputs).split())
    assert f"{INCOMPLETE}." in text
    assert f"<strong>{INCOMPLETE}.</strong>" in page.read_text()
    assert "recording_complete" in rows.read_text().split("\n")[0]
    assert ",False," in rows.read_text().split("\n")[1]
    assert json.loads(line.read_text())["otherData"]["recording_complete"] is False
    assert json.loads(run("compare", incomplete, "--json"))["recording_complete"] is False
    swept = ("compare", incomplete, "--over", "pool=16,32")
    assert f"{INCOMPLETE}." in " ".join(run(*swept).split())
    assert [study["recording_complete"] for study in json.loads(run(*swept, "--json"))["studies"]] == [False, False]
    assert f"{INCOMPLETE}." in run("audit", incomplete)
    assert json.loads(run("audit", incomplete, "--json"))["recording_complete"] is False
    assert json.loads(run("info", incomplete, "--json"))["complete"] is False


def test_figures_of_a_whole_recording_do_not(guest, tmp_path):
    page = tmp_path / "page.html"
    whole = run("compare", guest, "--html", page)
    assert "incomplete" not in whole
    assert "Incomplete" not in page.read_text()
    assert INCOMPLETE not in page.read_text()
    assert json.loads(run("compare", guest, "--json"))["recording_complete"] is True


def test_what_is_made_of_an_incomplete_recording_is_incomplete(incomplete, tmp_path):
    loaded = trace.load(incomplete)
    assert not loaded.complete
    assert not loaded.head(1000).complete
    for name in ("again.npz", "again.screc"):
        loaded.save(tmp_path / name)
        assert not trace.load(tmp_path / name).complete
    run("import", incomplete, "-o", tmp_path / "imported.screc")
    with Reader(tmp_path / "imported.screc") as reader:
        assert not reader.complete


def test_programs_of_an_incomplete_recording_say_so(tmp_path):
    (tmp_path / "text").write_text("I  00401000,3\n S 0042f000,8\nnonsense\n")
    refused("import", tmp_path / "text", "-o", tmp_path / "cut.screc")
    assert INCOMPLETE in run("programs", tmp_path / "cut.screc")
    assert json.loads(run("programs", tmp_path / "cut.screc", "--json"))["recording_complete"] is False
    (tmp_path / "text").write_text("I  00401000,3\n S 0042f000,8\n")
    run("import", tmp_path / "text", "-o", tmp_path / "all.screc")
    assert INCOMPLETE not in run("programs", tmp_path / "all.screc")


# -- files that are something else ---------------------------------------------------------------------------


ODD = {
    "bom.csv": 1,
    "champsim-10.bz2": 13,
    "cloudsuite-20-instructions.bin": 31,
    "crlf.txt": 2,
    "drmemtrace-allasm.trace.zip": 133,
    "kvmtrace.txt": "trace events of KVM",
    "lackey-exec-without-trace-children.txt": 399,
    "lackey-time-stamp.txt": 14,
    "lime.bin": "a memory image (LiME), no trace",
    "mixed_stdout.txt": "line 6: a line of lackey's with --trace-mem=yes expected, not 'hello from the traced program'",
    "oct.csv": "line 5: a number addr from 0 to 0xffffffffffffffff expected, not '010': decimal is written 10",
    "pandas_index.csv": 2,
    "pinatrace.out": 4,
    "quoted.csv": 1,
    "sb.txt": 3,
    "v.txt": 1,
}
"""Of each file the records that an import makes of it, or why there are none."""


@pytest.mark.parametrize("name", sorted(path.name for path in FILES.iterdir()))
def test_odd_files_are_read_or_refused(name, tmp_path):
    path = FILES / name
    for command in (("info", path), ("compare", path), ("programs", path), ("walk", path, 0)):
        assert name in refused(*command)
    if isinstance(ODD[name], int):
        assert json.loads(run("import", path, "-o", tmp_path / "out.screc", "--json"))["records"] == ODD[name]
        run("programs", tmp_path / "out.screc")
        return
    said = refused("import", path, "-o", tmp_path / "out.screc")
    assert name in said
    assert ODD[name] in said
    if (tmp_path / "out.screc").exists():
        with Reader(tmp_path / "out.screc") as reader:
            assert not reader.complete


@pytest.mark.parametrize("name", ["cloudsuite-20-instructions.bin", "lime.bin"])
def test_other_layouts_are_no_champsim_even_where_that_is_asked_for(name, tmp_path):
    assert "an instruction of 64 bytes" in refused(
        "import", FILES / name, "-o", tmp_path / "out.screc", "--format", "champsim"
    )


@pytest.mark.parametrize(
    "data",
    [
        bytes(6400),
        b"0" * 6400,
        b"0\n" * 3200,
        b"0 " * 3200,
        np.arange(800, dtype="<u8").tobytes(),
        np.ones(800, "<u8").tobytes(),
        np.array([0x401000, *[0] * 799], "<u8").tobytes(),
    ],
    ids=["NUL", "zeros", "lines", "words", "numbers", "ones", "one address"],
)
def test_zeros_and_small_numbers_are_no_champsim(data, tmp_path):
    (tmp_path / "file").write_bytes(data)
    assert "looks like none" in refused("import", tmp_path / "file", "-o", tmp_path / "out.screc")
    if data != np.ones(800, "<u8").tobytes():  # which could be instructions, if somebody says so
        refused("import", tmp_path / "file", "-o", tmp_path / "out.screc", "--format", "champsim")


def test_inputs_without_anything_in_them_are_refused(tmp_path):
    (tmp_path / "memcheck").write_text("==5== Memcheck, a memory error detector\n==5== Command: ls\n==5== \n")
    (tmp_path / "head.csv").write_text("kind,addr\n")
    (tmp_path / "blank.csv").write_text("kind,addr\n\n\n")
    assert "--trace-mem=yes" in refused("import", tmp_path / "memcheck", "-o", tmp_path / "out.screc")
    for name in ("head.csv", "blank.csv"):
        assert "line 2" in refused("import", tmp_path / name, "-o", tmp_path / "out2.screc")
        assert not (tmp_path / "out2.screc").exists()
    with pytest.raises(sc.ConfigError, match="paths"):
        importers.convert(tmp_path / "head.csv", tmp_path / "out3.screc")


# -- a full disk behind standard output ----------------------------------------------------------------------

SLOW = ("reproduce", "calibration", "report", "audit", "info", "import", "completion", "programs", "evolution")
SLOW += ("designs",)
COMMANDS = {
    "--help": (),
    "--version": (),
    "compare": ("pingpong", *SHORT),
    "report": ("pingpong", *SHORT, "--html", "page.html"),
    "run": ("pingpong", *SHORT, "--json"),
    "workloads": (),
    "programs": (DATA / "programs" / "true.screc", "--operations", 500),
    "info": (DATA / "programs" / "true.screc", "--check"),
    "import": (DATA / "lackey" / "parent.txt", "-o", "out.screc"),
    "walk": (DATA / "linux-pagetables" / "linux_4lvl.npz", "0x1000"),
    "audit": ("GUEST",),
    "explain": ("--user",),
    "check": ("pingpong", *SHORT, "--trace", FILES / "kvmtrace.txt"),
    "completion": ("bash",),
    "calibration": (),
    "evolution": ("--operations", 1),
    "reproduce": (),
    "costs": (),
    "designs": ("pingpong", "--operations", 1000),
    "pool": ("demand", "--operations", 1000),
    "show": ("demand-paging",),
    "sweep": ("SPEC", "--jobs", 1),
    "collect": ("RESULTS",),
    "diff": ("RESULTS", "RESULTS"),
}


def test_every_command_is_among_those_whose_output_fails():
    assert set(main.commands) - set(COMMANDS) == {"record", "record-guest"}  # they print to standard error


def full(command, arguments, tmp_path):
    with open("/dev/full", "w") as disk:
        words = [*COMMAND, command, *map(str, arguments)]
        return subprocess.run(
            words, cwd=tmp_path, env=ENVIRONMENT, stdout=disk, stderr=subprocess.PIPE, text=True, check=False
        )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in COMMANDS]
)
def test_a_full_disk_is_one_line(command, guest, tmp_path):
    spec, results = tmp_path / "spec.toml", tmp_path / "results"
    spec.write_text(f"sources = '{guest}'\ndesigns = 'cached'\noperations = 500\n")
    if "RESULTS" in COMMANDS[command]:
        sc.sweep(spec, store=results, jobs=1)
    placed = {"GUEST": guest, "SPEC": spec, "RESULTS": results}
    done = full(command, (placed.get(a, a) for a in COMMANDS[command]), tmp_path)
    assert done.returncode == 2
    assert done.stderr == "shadowcore: standard output: No space left on device\n"
