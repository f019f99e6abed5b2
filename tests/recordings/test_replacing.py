"""Files that are replaced as a whole: recordings, saved machines, reports. Until then what was there stays."""

import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from commands import COMMAND

import shadowcore as sc
from shadowcore import files
from shadowcore.files import Replacement, replace
from shadowcore.recording import replay as trace
from shadowcore.recordings import OPERATIONS, Reader, Writer
from shadowcore.studies.results import write_csv

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(Path(sc.__file__).parents[1]), str(Path(__file__).parent)])
}


def child(program, directory, *, status=0):
    """Run a program in a directory; what it printed on standard error."""
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, env=ENVIRONMENT, cwd=directory, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    return done.stderr


def names(directory):
    return sorted(os.listdir(directory))


# What makes a file, by the name of the file; each in a process that has `limited`, after which files stay small.
MAKERS = {
    "vm": "sc.VM('1MiB', tlb=sc.TLB()).save('out')",
    "npz": "sc.trace.load().head(2000).save('out.npz')",
    "screc": "sc.trace.load().head(2000).save('out.screc')",
    "page": "sc.files.replace('out', bytes(100_000))",
    "csv": "write_csv('out', [{'a': 'x' * 50_000}])",
}
FILES = {"vm": "out", "npz": "out.npz", "screc": "out.screc", "page": "out", "csv": "out"}
BEGIN = """
    import os, resource, signal
    import shadowcore as sc
    import shadowcore.files
    from shadowcore.studies.results import write_csv
"""


def test_a_full_disk_leaves_the_older_file_and_says_so(tmp_path):
    """In a process whose files cannot grow beyond a limit."""
    program = f"""{BEGIN}
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
    for what, make in {MAKERS!r}.items():
        name = {FILES!r}[what]
        os.mkdir(what)
        os.chdir(what)
        with open(name, "w") as file:
            file.write("older")
        try:
            exec(make)
        except (OSError, sc.TraceError) as error:
            assert "File too large" in str(error), error
            assert name in str(error), error
            assert error.__cause__ is None
        else:
            raise SystemExit(f"{{what}} was written")
        assert os.listdir() == [name], os.listdir()
        with open(name) as file:
            assert file.read() == "older"
        os.chdir("..")
    """
    child(program, tmp_path)
    assert names(tmp_path) == sorted(MAKERS)


def test_what_a_killed_process_left_is_gone_after_the_next(tmp_path):
    """Killed at the moment when all is written and nothing renamed."""
    program = f"""{BEGIN}
    for what, make in {MAKERS!r}.items():
        name = {FILES!r}[what]
        os.mkdir(what)
        os.chdir(what)
        with open(name, "w") as file:
            file.write("older")
        with open(f".{{name}}.notes.partial", "w") as file:
            file.write("not ours")
        pid = os.fork()
        if not pid:
            os.replace = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
            exec(make)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
        with open(name) as file:
            assert file.read() == "older"
        assert len(os.listdir()) == 3, os.listdir()
        exec(make)
        assert sorted(os.listdir()) == sorted([name, f".{{name}}.notes.partial"]), os.listdir()
        assert os.stat(name).st_size > 5
        os.chdir("..")
    """
    child(program, tmp_path)


@pytest.mark.parametrize("what", MAKERS)
def test_what_is_renamed_is_on_the_disk(tmp_path, what, monkeypatch):
    done = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda f: (done.append("dir" if stat.S_ISDIR(os.fstat(f).st_mode) else "file"), sync(f))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    monkeypatch.chdir(tmp_path)
    exec(MAKERS[what], {"sc": sc, "write_csv": write_csv})
    assert done == ["file", "rename", "dir"]
    assert names(tmp_path) == [FILES[what]]


def test_a_link_is_followed_and_rights_stay(tmp_path):
    real = tmp_path / "real"
    real.write_text("older")
    real.chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    sc.VM("64KiB").save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert sc.VM.load(real).memory.bytes.size == 64 << 10
    (tmp_path / "to nothing").symlink_to("new")
    before = os.umask(0o027)
    try:
        replace(tmp_path / "to nothing", b"x")
        with Writer(tmp_path / "recorded.screc", OPERATIONS):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "to nothing").is_symlink()
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "recorded.screc").stat().st_mode) == 0o640


def test_what_cannot_be_written_is_named(tmp_path):
    vm = sc.VM("64KiB")
    (tmp_path / "ring").symlink_to("ring")
    for path, kind in (
        (tmp_path, IsADirectoryError),
        (f"{tmp_path}/", IsADirectoryError),
        (tmp_path / "none" / "vm", FileNotFoundError),
        (tmp_path / "ring", OSError),
        ("/dev/full", OSError),
        (tmp_path / ("x" * 300), OSError),
    ):
        with pytest.raises(kind) as caught:
            vm.save(path)
        assert caught.value.filename == str(path)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["ring"]
    with pytest.raises(sc.ConfigError, match="a path is needed"):
        vm.save(1)


def test_long_names_have_room(tmp_path):
    for name in ("x" * 255, "\N{CYRILLIC SMALL LETTER ZHE}" * 127):
        replace(tmp_path / name, b"1")
        replace(tmp_path / name, b"2")
        assert (tmp_path / name).read_bytes() == b"2"
    assert len(names(tmp_path)) == 2


def test_those_who_write_at_the_same_time_do_not_meet(tmp_path):
    with Replacement(tmp_path / "out") as one:
        one.write(b"one")
        with Replacement(tmp_path / "out") as other:
            other.write(b"other")
        assert (tmp_path / "out").read_bytes() == b"other"
        one.write(b" and the rest")
    assert (tmp_path / "out").read_bytes() == b"one and the rest"
    with Writer(tmp_path / "a.screc", OPERATIONS) as writer:
        writer.write(addr=np.arange(3))
        with pytest.raises(sc.TraceError, match=r"somebody else is writing a\.screc\.partial"):
            Writer(tmp_path / "a.screc", OPERATIONS)
    assert names(tmp_path) == ["a.screc", "out"]


def test_the_cause_is_the_message_whatever_follows_it(tmp_path, monkeypatch):
    """numpy and zipfile close what they cannot write to, and fail again."""
    real = os.fsync

    def full(file):
        if not stat.S_ISDIR(os.fstat(file).st_mode):
            raise OSError(28, "No space left on device")
        real(file)

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "vm").write_text("older")
    with pytest.raises(OSError, match="No space left on device") as caught:
        sc.VM("64KiB").save(tmp_path / "vm")
    assert caught.value.filename == str(tmp_path / "vm")
    assert (tmp_path / "vm").read_text() == "older"
    with pytest.raises(sc.TraceError, match="No space left on device"):
        trace.load().head(100).save(tmp_path / "a.screc")
    assert names(tmp_path) == ["vm"]


def test_a_recording_without_room_says_so_each_time(tmp_path):
    """An importer that is told so writes what it still has, and is told again: not that the recording is closed."""
    rows = "kind,addr\n" + "".join(f"read,{address * 0x9E3779B97F4A7C15 % (1 << 47):#x}\n" for address in range(20_000))
    (tmp_path / "in.csv").write_text(rows)
    program = """
    import resource
    import shadowcore as sc
    from shadowcore.recording import importers
    from shadowcore.recordings import Writer
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        with Writer("out.screc", "program", block=500) as writer:
            importers.csv.read(["in.csv"], writer)
    except sc.TraceError as error:
        assert error.file == "out.screc", error
        assert "room for the recording expected: File too large" in str(error), error
    else:
        raise SystemExit("it was written")
    """
    child(program, tmp_path)
    assert names(tmp_path) == ["in.csv", "out.screc"]
    with Reader(tmp_path / "out.screc") as reader:
        assert not reader.complete
        assert reader.records % 500 == 0
        assert 0 < reader.records < 10_000


@pytest.mark.parametrize(
    "arguments",
    [
        ["workloads"],
        ["--help"],
        ["compare", "pingpong", "--operations", "2000"],
        ["compare", "pingpong", "--operations", "2000", "--json"],
    ],
)
def test_commands_whose_output_cannot_be_written(arguments):
    command = [*COMMAND, *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "shadowcore: standard output: No space left on device\n"


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [*COMMAND, "workloads"]
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(command, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_without_locks_nothing_is_taken_for_left_behind(tmp_path, monkeypatch):
    """On a file system that has none it cannot be known."""

    class Locks:
        LOCK_EX = LOCK_NB = 0

        @staticmethod
        def flock(*_):
            raise OSError(95, "Operation not supported")

    (tmp_path / f".out.{'0' * 16}.partial").write_text("somebody's, perhaps")
    monkeypatch.setattr(files, "fcntl", Locks)
    replace(tmp_path / "out", b"x")
    assert len(names(tmp_path)) == 2
    monkeypatch.undo()
    replace(tmp_path / "out", b"x")
    assert names(tmp_path) == ["out"]
