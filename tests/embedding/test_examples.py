"""Every example is built as its page says, with warnings as errors, and run."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from places import ROOT

import shadowcore as sc

EXAMPLES = ROOT / "examples"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-I", sc.get_include()]
SETTINGS = sysconfig.get_config_vars()


def environment():
    """Programs that embed Python find the packages of this one, and those built beside them."""
    return os.environ | {"PYTHONPATH": os.pathsep.join([".", *filter(None, sys.path)])}


def run(command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment(), timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def compiler(name):
    found = shutil.which(os.environ.get("CC" if name == "cc" else "CXX", name))
    if found is None:
        pytest.skip(f"no {name}")
    return found


def embedding():
    """Arguments that link a program with Python, or a skip."""
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        pytest.skip("no Python.h")
    library = SETTINGS.get("LIBDIR") if SETTINGS.get("Py_ENABLE_SHARED") else SETTINGS.get("LIBPL")
    if not library or not list(Path(library).glob(f"libpython{SETTINGS['LDVERSION']}.*")):
        pytest.skip("no libpython to link with")
    flags = [f"-L{library}", f"-Wl,-rpath,{library}", f"-lpython{SETTINGS['LDVERSION']}"]
    return flags + shlex.split(" ".join(SETTINGS.get(name) or "" for name in ("LIBS", "SYSLIBS", "LINKFORSHARED")))


def python_h():
    return ["-isystem", sysconfig.get_paths()["include"]]


def test_python(tmp_path):
    out = run([sys.executable, EXAMPLES / "python" / "simulate.py"], tmp_path)
    misses = re.findall(r"^(\w+) +(\d+) cache misses, 0 guest faults, (\d+) page-fault exits", out, re.M)
    assert [name for name, _, _ in misses] == ["native", "flush", "cached"]
    assert len({n for _, n, _ in misses}) == 1
    assert int(misses[0][2]) == 0 < int(misses[2][2]) < int(misses[1][2])


@pytest.mark.packaging
def test_cython(tmp_path):
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    work = tmp_path / "cython"
    shutil.copytree(EXAMPLES / "cython", work)
    run([sys.executable, "setup.py", "build_ext", "--inplace"], work)
    out = run([sys.executable, "run.py"], work)
    assert out.splitlines() == [
        "cold: 512 links, 512 exits, ended at 0x0, outcome 0",
        "warm: 512 links, 0 exits, ended at 0x0, outcome 0",
    ]


def test_c(tmp_path):
    command = [compiler("cc"), "-std=c11", *WARNINGS, *python_h(), EXAMPLES / "c" / "host.c", "-o", tmp_path / "host"]
    subprocess.run([*command, *embedding()], check=True)
    out = run([tmp_path / "host", tmp_path / "state.npz"], tmp_path)
    assert "store to a table: emulated 1\npage fault, error code 0x4\n" in out
    assert "back in the first address space: 0 exits\naudit: 0 violations" in out
    assert out.endswith("loaded again: 42, 0 exits\n")


def test_cpp(tmp_path):
    source = EXAMPLES / "cpp"
    cc = [compiler("cc"), "-std=c11", *WARNINGS, *python_h(), "-c", source / "main.c", "-o", tmp_path / "main.o"]
    subprocess.run(cc, check=True)
    cxx = [compiler("c++"), "-std=c++17", *WARNINGS, source / "simulator.cpp", tmp_path / "main.o", *embedding()]
    subprocess.run([*cxx, "-o", tmp_path / "simulator"], check=True)
    out = run([tmp_path / "simulator"], tmp_path)
    per_access = dict(re.findall(r"^(\w+): ([\d.]+) cycles per access$", out, re.M))
    assert list(per_access) == ["native", "flush", "cached"]
    assert float(per_access["native"]) < float(per_access["cached"]) < float(per_access["flush"])
    assert out.count(" 0 violations") == 3


@pytest.mark.parametrize("name", ["python", "cython", "c", "cpp"])
def test_every_example_has_a_page(name):
    page = (EXAMPLES / name / "README.md").read_text("utf-8")
    for path in (EXAMPLES / name).iterdir():
        assert path.name in page or path.name == "README.md", path
