"""The tests once more in a build with the compiler's sanitizers, which halt at what is undefined or out of bounds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

EMBEDDING = [f"tests/embedding/test_{part}.py" for part in ("capi", "capi_misuse", "capi_prices", "capi_vms", "embed")]
EMBEDDING += ["tests/engine/test_threads.py"]
# A plug-in without Python is a program that would need the sanitizers as well.
NEVER = ["tests/embedding/test_capi_vms.py::test_a_plugin_without_python"]
# Random programs, of which the default suite runs a sample.
RANDOM = [f"tests/{name}.py" for name in ("arch/test_model_random", "tlb/test_tlb_lazy", "engine/test_vcpus_random")]
# These measure or limit memory, time or allocations, of which sanitizers have their own, and end or hang where there is
# no more to be had; or start programs under Valgrind.
MEASURED = [
    "tests/studies/test_cli_study.py::test_the_main_job_is_quick",
    "tests/engine/test_footprint.py",
    "tests/engine/test_signals.py::test_a_batch_out_of_memory_keeps_its_result",
    "tests/recordings/test_importers.py::test_record",
    "tests/series/test_series_pool.py::test_faults_and_stores_allocate_nothing",
]


def library(name):
    """Where the C compiler has a library of the sanitizers."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"gcc has no {name}")
    return str(path)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Runs pytest in a copy of the tree that is built with the sanitizers, on the arguments given."""
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    if sys.platform != "linux" or not shutil.which("gcc"):
        pytest.skip("needs gcc on Linux")
    preload = f"{library('libasan.so')} {library('libubsan.so')}"
    ignored = shutil.ignore_patterns(".git", ".venv", "dist", "build", "*.so", "__pycache__", ".*_cache", "*.egg-info")
    tree = tmp_path_factory.mktemp("sanitized") / "tree"
    shutil.copytree(ROOT, tree, ignore=ignored)
    flavour = {"SHADOWCORE_SANITIZE": "address,undefined", "CFLAGS": "-fno-sanitize-recover=all"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tree, env=os.environ | flavour, check=True
    )
    env = os.environ | {
        "PYTHONPATH": str(tree),
        "LD_PRELOAD": preload,
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }

    def run(*arguments):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
        done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]

    return run


def without(tests):
    return [word for test in tests for word in ("--deselect", test)]


@pytest.mark.slow
@pytest.mark.packaging
def test_embedding_under_sanitizers(sanitized):
    """The interfaces for embedders, and all misuse that they refuse."""
    sanitized("-x", *without(NEVER), *EMBEDDING)


@pytest.mark.nightly
def test_everything_under_sanitizers(sanitized):
    """Half an hour."""
    sanitized(*without(NEVER + MEASURED))
    sanitized("-m", "slow", *RANDOM)
