"""Sweeps on what other packages run tasks on. Each test says which package it is for, and is skipped without it."""

import copyreg
import os
import shutil
import subprocess
import sys

import pytest
from commands import ENVIRONMENT, refused, run

import shadowcore as sc
from shadowcore.recording import replay as trace
from shadowcore.studies.executors import named

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def pickling():
    """Dask changes how exceptions are pickled, for the whole process: it is put back."""
    before = dict(copyreg.dispatch_table)
    yield
    copyreg.dispatch_table.clear()
    copyreg.dispatch_table.update(before)


@pytest.fixture
def spec(tmp_path):
    trace.load().head(3000).save(tmp_path / "small.screc")
    return {"sources": str(tmp_path / "small.screc"), "designs": ["native", "cached"], "operations": "300..500 +20"}


def told(found):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in found.rows()]


def fault():
    raise sc.PageFault(0x1230, 4)


@pytest.fixture
def cluster():
    distributed = pytest.importorskip("distributed", reason="Dask comes with the extra dask")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, worker_dashboard_address=None
    ) as made:
        yield made


def test_dask(spec, cluster, tmp_path):
    """A cluster of two workers, by its Client; results are written by them; a recording in arrays is mapped."""
    with cluster.get_client() as client:
        found = sc.sweep(spec, executor=client, store=tmp_path / "s")
        assert told(found) == told(sc.sweep(spec, jobs=1))
        assert sc.sweep(spec, executor=client, store=tmp_path / "s", resume=True).there == 22
        arrays = dict(spec, sources=trace.load().head(3000))
        assert told(sc.sweep(arrays, executor=client)) == told(sc.sweep(arrays, jobs=1))
        failing = sc.sweep(sources="fork-storm", designs="cached", operations=300, memory="2MiB", executor=client)
        assert failing.errors()[0]["error"].startswith("GuestOutOfMemory")
        with pytest.raises(sc.PageFault) as caught:
            client.submit(fault).result()
        assert (caught.value.address, caught.value.error_code) == (0x1230, 4)
        # A worker that dies is started again, and what it was at is done there.
        (pid, *_) = client.run(os.getpid).values()
        killed = client.submit(os.kill, pid, 9, pure=False)
        assert told(sc.sweep(spec, executor=client)) == told(found)
        killed.cancel()
    with named(f"dask:{cluster.scheduler_address}", str(tmp_path)) as client:
        assert told(sc.sweep(spec, executor=client, jobs=3)) == told(found)


def test_an_address_where_no_dask_is():
    pytest.importorskip("distributed", reason="Dask comes with the extra dask")
    with pytest.raises(sc.ConfigError, match="executor: dask: nonsense://x: "), named("dask:nonsense://x", "."):
        pass


def test_slurm_by_its_local_executor(spec, tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="submitit comes with the extra slurm")
    executor = submitit.AutoExecutor(folder=tmp_path / "logs", cluster="local")
    executor.update_parameters(timeout_min=5)
    found = sc.sweep(spec, executor=executor, store=tmp_path / "s", jobs=2, together=11)
    assert told(found) == told(sc.sweep(spec, jobs=1))
    assert len(list((tmp_path / "logs").glob("*_submitted.pkl"))) == 2
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text('sources = "small.screc"\ndesigns = "cached"\noperations = 500\n')
    output = run("sweep", "a.toml", "--executor", "slurm:cluster=local,timeout_min=5", "--jobs", 1, "--together", 2)
    assert "a: 1 points: 1 done" in output
    assert "executor: slurm: 'x' is not NAME=VALUE" in refused("sweep", "a.toml", "--resume", "--executor", "slurm:x")


@pytest.mark.skipif(shutil.which("mpiexec") is None, reason="there is no mpiexec")
def test_mpi(spec, tmp_path):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed")
    (tmp_path / "a.toml").write_text(
        'sources = "small.screc"\ndesigns = ["native", "cached"]\noperations = "300..500 +20"\n'
    )
    (tmp_path / "command.py").write_text("from shadowcore.cli import main\nif __name__ == '__main__':\n    main()\n")
    command = ["mpiexec", "-n", "3", sys.executable, "-m", "mpi4py.futures", "command.py"]
    environment = ENVIRONMENT | {
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_rmaps_base_oversubscribe": "1"
    }  # fmt: skip
    done = subprocess.run(
        [*command, "sweep", "a.toml", "--executor", "mpi"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a: 22 points: 22 done" in done.stdout
    assert told(sc.collect(tmp_path / "a.results")) == told(sc.sweep(spec, jobs=1))
