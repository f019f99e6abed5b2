"""Every example is built as its page says, with warnings as errors, and run."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import streams
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


def loaded(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.packaging
def test_a_compiled_plug_in(tmp_path):
    """It recycles what the same policy in Python recycles; saved and loaded it goes on; and it is found by its name."""
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    work = tmp_path / "compiled"
    shutil.copytree(EXAMPLES / "compiled", work)
    run([sys.executable, "setup.py", "build_ext", "--inplace"], work)
    (built,) = work.glob("shadowcore_example_compiled*.so")
    compiled = loaded(built, "shadowcore_example_compiled")
    type("Compiled", (sc.Policy,), {"compiled": compiled.policy}, name="test-lfu-compiled")
    python = loaded(EXAMPLES / "plugins" / "shadowcore_example_plugins.py", "shadowcore_example_plugins")
    type("Python", (python.LeastFrequentlyUsed,), {}, name="test-lfu")
    pool = {"pool_pages": 16, "min_free": 5, "refill": 8}
    for stream, make, more in (
        ("pressure_64_s1", sc.Shadow.cached, {}),
        ("fuzz_32_s6", sc.Shadow.cached, {"recycle_children": True}),
        ("pressure_64_s1", sc.Shadow.unsync, {}),
    ):
        data, found = streams.stream(stream), []
        for policy in ("test-lfu", "test-lfu-compiled"):
            vm = streams.machine(data, make(**pool, policy=policy, **more))
            zapped = []
            vm.on_event(lambda event, zapped=zapped: zapped.append((event.detail, event.address)), ["zap"])
            result = vm.vcpus[0].run(data["ops"])
            assert vm.audit().ok
            found.append((vm.stats.as_dict(), result.exits.tolist(), zapped))
        assert found[0] == found[1]
        assert vm.stats.mmu_recycled or stream != "pressure_64_s1"
    for policy in ("test-lfu", "test-lfu-compiled"):
        mmu = sc.Shadow.cached(**pool, policy=policy)
        vm, other = streams.saved_half_way("pressure_64_s1", mmu, tmp_path / "vm")
        kept = vm.mmu.export_plugins()["policy"]
        assert other.mmu.export_plugins()["policy"] == kept
        for forged in (b"", kept[:-1], kept + b"0", b"\0" * len(kept), b"\xff" * len(kept)):
            with pytest.raises(sc.PluginError, match=f"{policy}: restore: "):
                other.mmu.import_plugins({"policy": forged})
        assert other.audit().ok
    info = work / "shadowcore_example_compiled-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: shadowcore-example-compiled\nVersion: 1.0\n")
    point = tomllib.loads((work / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"][
        "shadowcore.policies"
    ]
    (info / "entry_points.txt").write_text(
        "[shadowcore.policies]\n" + "".join(f"{k} = {v}\n" for k, v in point.items())
    )
    command = "compare demand --operations 1000 --mmu cached --pool 16 --set policy=lfu-compiled"
    code = "import sys; from shadowcore.cli import main; main(sys.argv[1:])"
    assert "cached" in run([sys.executable, "-c", code, *command.split()], work)


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


@pytest.mark.parametrize("name", ["python", "cython", "c", "cpp", "compiled"])
def test_every_example_has_a_page(name):
    page = (EXAMPLES / name / "README.md").read_text("utf-8")
    for path in (EXAMPLES / name).iterdir():
        assert path.name in page or path.name == "README.md", path
