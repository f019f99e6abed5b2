"""Results in a folder: kept as they come, gone on with, and never another sweep's."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from commands import COMMAND, ENVIRONMENT, refused, run

import shadowcore as sc
from shadowcore.recording import replay as trace
from shadowcore.studies import store as stores
from shadowcore.studies import work
from shadowcore.studies.store import Damaged, packed, unpacked


@pytest.fixture(scope="module")
def recording():
    return trace.load().head(2000)


@pytest.fixture
def spec(recording):
    return {"sources": recording, "designs": ["native", "cached"], "operations": "300..500 +20"}


@pytest.fixture
def full(spec, tmp_path):
    """A folder with all of the results."""
    sc.sweep(spec, store=tmp_path / "s", jobs=1)
    return tmp_path / "s"


def files(folder):
    return sorted(path for path in folder.glob("??/*.json"))


def same(one, other):
    keep = [{name: value for name, value in row.items() if name != "seconds"} for row in one.rows()]
    return keep == [{name: value for name, value in row.items() if name != "seconds"} for row in other.rows()]


def test_a_file_a_run(spec, full):
    assert len(files(full)) == 22
    found = sc.collect(full)
    assert found.counts() == {"done": 22, "failed": 0, "missing": 0}
    assert same(found, sc.sweep(spec, jobs=1))
    for file in files(full):
        result = unpacked(file.read_bytes())
        assert result["run"] == file.stem
        assert result["results"] == stores.RESULTS
        assert result["counters"]["operations"] > 0
    assert not list(full.glob("**/*.partial"))


def test_what_is_there_is_not_run_again(spec, full):
    before = {file: file.stat().st_mtime_ns for file in files(full)}
    gone = files(full)[3]
    gone.unlink()
    found = sc.sweep(spec, store=full, resume=True, jobs=1)
    assert found.there == 21
    assert found.counts()["done"] == 22
    assert {file for file in files(full) if file.stat().st_mtime_ns != before[file]} == {gone}


def test_a_result_that_is_cut_short(spec, full):
    whole = sc.collect(full)
    whole.rows()
    for place, file in enumerate(files(full)[:5]):
        data = file.read_bytes()
        changed = data.replace(b'"operations":', b'"operatoins":')
        file.write_bytes([b"", data[:-1], data[: len(data) // 2], changed, b"{}\n"][place])
    found = sc.collect(full)
    assert found.damaged == 5
    assert found.counts()["missing"] == 5
    assert "5 results are cut short" in run("collect", full)
    again = sc.sweep(spec, store=full, resume=True, jobs=1)
    assert again.there == 17
    assert again.damaged == 0
    assert same(again, whole)


def test_a_result_in_the_place_of_another(spec, full):
    one, other = files(full)[:2]
    shutil.copy(one, other)
    assert sc.collect(full).counts()["missing"] == 1
    assert sc.sweep(spec, store=full, resume=True, jobs=1).there == 21


def test_two_sweeps_into_one_folder(spec, full):
    before = sorted((path, path.read_bytes()) for path in full.glob("**/*.json"))
    with pytest.raises(sc.ConfigError, match="it holds a sweep, with 22 runs done; --resume goes on with it"):
        sc.sweep(spec, store=full)
    other = dict(spec, designs=["native", "unsync"])
    for resume in (False, True):
        with pytest.raises(sc.ConfigError, match="it is another sweep's: 11 of its 22 points are not in this one"):
            sc.sweep(other, store=full, resume=resume)
    assert sorted((path, path.read_bytes()) for path in full.glob("**/*.json")) == before
    more = sc.sweep(dict(spec, designs=["native", "cached", "unsync"]), store=full, resume=True)
    assert more.there == 22
    assert more.counts()["done"] == 33


def test_results_of_another_version(spec, full):
    manifest = json.loads((full / "sweep.json").read_text())
    manifest["results"] = 0
    (full / "sweep.json").write_text(json.dumps(manifest))
    with pytest.raises(sc.ConfigError, match="its results are of version 0, these would be of"):
        sc.sweep(spec, store=full, resume=True)


def test_a_folder_of_something_else(spec, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(sc.ConfigError, match="there are other files in it"):
        sc.sweep(spec, store=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(sc.ConfigError, match="it is no directory"):
        sc.sweep(spec, store=tmp_path / "mine.txt")
    with pytest.raises(sc.ConfigError, match="no sweep is there"):
        sc.collect(tmp_path)
    (tmp_path / "sweep.json").write_text('{"points": [')
    with pytest.raises(sc.ConfigError, match="does not say what sweep this is"):
        sc.collect(tmp_path)


def test_two_processes_at_one_sweep(spec, full):
    held = stores.lock(full / "sweep.lock")
    with pytest.raises(sc.ConfigError, match="another process is at work on it"):
        sc.sweep(spec, store=full, resume=True)
    held.close()
    assert sc.sweep(spec, store=full, resume=True).there == 22


def test_shards(spec, tmp_path):
    whole = sc.sweep(spec, jobs=1)
    for number in (2, 1, 3):
        found = sc.sweep(spec, store=tmp_path / "s", shard=(number, 3), jobs=1)
    assert found.counts()["missing"] == 0
    assert same(found, whole)
    with pytest.raises(sc.ConfigError, match="it holds a sweep"):
        sc.sweep(spec, store=tmp_path / "s")
    for number in (1, 2):  # machines that have no folder in common
        sc.sweep(spec, store=tmp_path / f"part-{number}", shard=(number, 2), jobs=1)
    assert sc.collect(tmp_path / "part-1").counts()["missing"] == 11
    assert same(sc.collect(tmp_path / "part-1", tmp_path / "part-2"), whole)
    sc.sweep(dict(spec, designs="cached"), store=tmp_path / "other", jobs=1)
    with pytest.raises(sc.ConfigError, match="another sweep than"):
        sc.collect(tmp_path / "part-1", tmp_path / "other")


def test_a_machine_that_does_not_see_the_folder(spec, tmp_path, monkeypatch):
    class Elsewhere:
        def __init__(self, *parts):
            pass

        def exists(self):
            return False

    monkeypatch.setattr(work, "Path", Elsewhere)
    sc.sweep(spec, store=tmp_path / "s", jobs=1)
    assert sc.collect(tmp_path / "s").counts()["done"] == 22


@pytest.mark.parametrize("data", [b"", b"{}", b'{"run":"a"}\n', b'{"a":1,"digest":"0"}\n', packed({"a": 1})[1:]])
def test_what_is_no_result(data):
    with pytest.raises(Damaged):
        unpacked(data)


# ----------------------------------------------------------------------------------------------- processes that end


@pytest.fixture
def file(tmp_path, recording):
    """A specification that takes long."""
    recording.save(tmp_path / "small.screc")
    (tmp_path / "long.toml").write_text(
        'sources = "small.screc"\ndesigns = ["native", "cached"]\noperations = "300..900"\n'
    )
    return tmp_path / "long.toml"


def started(file, *more):
    command = [*COMMAND, "sweep", str(file), "--store", str(file.parent / "s"), "--jobs", "2", *more]
    return subprocess.Popen(
        command, env=ENVIRONMENT, cwd=file.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def some_results(folder, process, count=20):
    while process.poll() is None and len(files(folder)) < count:
        time.sleep(0.01)


def children(process):
    try:
        with open(f"/proc/{process.pid}/task/{process.pid}/children") as listed:
            return [int(word) for word in listed.read().split()]
    except OSError:
        return []


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_sweep_that_is_killed_loses_only_what_ran(file):
    process = started(file)
    some_results(file.parent / "s", process)
    workers = children(process)
    process.kill()
    process.communicate()
    found = sc.collect(file.parent / "s")
    done = found.counts()["done"]
    assert done >= 18
    assert found.damaged == 0
    for _ in range(500):  # processes that it has left behind end by themselves
        if not any(alive(pid) for pid in workers):
            break
        time.sleep(0.01)
    assert not any(alive(pid) for pid in workers)
    again = started(file, "--resume")
    some_results(file.parent / "s", again, done + 20)
    again.send_signal(signal.SIGINT)
    again.communicate()
    assert sc.collect(file.parent / "s").counts()["done"] >= done + 15


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c(file, times):
    process = started(file)
    some_results(file.parent / "s", process)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "shadowcore: interrupted\n"
    if times == 1:
        assert "missing" in output
    found = sc.collect(file.parent / "s")
    assert found.counts()["done"] >= 18
    assert found.damaged == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there are no limits")
@pytest.mark.parametrize(("unpacked", "what"), [(0, "it cannot be written"), (1 << 20, "arrays of")])
def test_a_disk_that_is_full(file, unpacked, what):
    """A limit of the size of files stands for it: writes fail as they do then."""
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100));"
        f"from shadowcore.studies import shared, store; shared.UNPACKED = {unpacked};"
        "store.replace = lambda path, data: None;"
        "from shadowcore.cli import main; main()"
    )
    (file.parent / "s").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", limited, "sweep", str(file), "--store", "s", "--jobs", "2"],
        env=ENVIRONMENT, cwd=file.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert what in done.stderr
    assert done.stderr.endswith("cannot be written: File too large\n")
    assert not files(file.parent / "s")
    assert not list((file.parent / "s").glob("**/*.partial"))
    assert multiprocessing.active_children() == []


# ---------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def short(file, monkeypatch):
    text = file.read_text().replace("300..900", "300..500 +20")
    (file.parent / "short.toml").write_text(text)
    monkeypatch.chdir(file.parent)
    return "short.toml"


def test_the_commands(short, tmp_path):
    assert run("sweep", short, "--dry-run") == "short: 22 points over design, operations; 22 runs.\n"
    assert not (tmp_path / "short.results").exists()
    output = run("sweep", short, "--jobs", 1, "--csv", "a.csv")
    assert "short: 22 points: 22 done" in output
    assert output.rstrip().endswith("Results are in short.results.")
    assert "it holds a sweep" in refused("sweep", short)
    assert "22 runs were there before" in run("sweep", short, "--resume")
    plain = json.loads(run("collect", "short.results", "--json"))
    assert plain["points"] == {"done": 22, "failed": 0, "missing": 0, "damaged": 0}
    assert plain["axes"] == ["design", "operations"]
    run("collect", "short.results", "--csv", "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_points_that_fail_are_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text(
        'sources = "fork-storm"\ndesigns = "cached"\noperations = 500\n[settings]\nmemory = ["2MiB", "16MiB"]\n'
    )
    output = run("sweep", "a.toml", "--jobs", 1, status=1)
    assert "a: 2 points: 1 done, 1 failed" in output
    assert "Failed: design=cached, memory=2MiB: GuestOutOfMemory: " in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch.toml"], "nosuch.toml: it cannot be read"),
        (["short.toml", "--shard", "5/4"], "'5/4' is not I/N"),
        (["short.toml", "--retry"], "--retry: it is for a sweep that goes on"),
        (["short.toml", "--executor", "dusk"], "executor: there is no 'dusk'; did you mean 'dask'?"),
        (["short.toml", "--executor", "mpi:x"], "executor: mpi takes nothing more"),
        (["short.toml", "--csv", "a.csv", "--html", "a.csv"], "--html: another file than a.csv"),
        (["short.toml", "--csv", "nosuch/a.csv"], "there is no directory nosuch"),
    ],
)
def test_commands_that_cannot_be(short, arguments, message):
    assert message in refused("sweep", *arguments)
    assert not os.path.exists("short.results")


def test_a_misspelt_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text('sourcse = "shell"\n')
    assert "spec: there is no 'sourcse'; did you mean 'sources'?" in refused("sweep", "a.toml")
