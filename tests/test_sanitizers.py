"""The misuse that the interfaces for embedders refuse, once more in a build with the compiler's sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TESTS = ["test_capi.py", "test_embed.py"]


def library(name):
    """Where the C compiler has a library of the sanitizers."""
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"gcc has no {name}")
    return str(path)


@pytest.mark.slow
@pytest.mark.packaging
def test_embedding_under_sanitizers(tmp_path):
    """In a copy of the tree: sanitizers halt at the first thing that is undefined or out of bounds."""
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    if sys.platform != "linux" or not shutil.which("gcc"):
        pytest.skip("needs gcc on Linux")
    preload = f"{library('libasan.so')} {library('libubsan.so')}"
    ignored = shutil.ignore_patterns(".git", ".venv", "dist", "build", "*.so", "__pycache__", ".*_cache", "*.egg-info")
    tree = tmp_path / "tree"
    shutil.copytree(ROOT, tree, ignore=ignored)
    flavour = {"SHADOWCORE_SANITIZE": "address,undefined", "CFLAGS": "-O1 -fno-sanitize-recover=all"}
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
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--deselect"]
    command += ["tests/test_capi.py::test_a_plugin_without_python", *(f"tests/{name}" for name in TESTS)]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
