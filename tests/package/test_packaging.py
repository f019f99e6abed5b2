"""What is shipped, and when it is rebuilt."""

import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from places import ROOT

import shadowcore

# Where setuptools and Cython are missing, as in a plain test environment, some of these are skipped; .ci/run
# selects them by this mark once more when it has installed the dev extra.
pytestmark = pytest.mark.packaging

INSTALLED = Path(shadowcore.__file__).parent
MODULES = sorted(path.relative_to(ROOT / "pyx").with_suffix("").as_posix() for path in ROOT.glob("pyx/**/*.pyx"))
PACKAGE_FILES = sorted(
    path.relative_to(ROOT / "shadowcore").as_posix()
    for pattern in (
        "*.pxd",
        "*.pyi",
        "py.typed",
        "include/*.h",
        *(f"data/*.{kind}" for kind in ("npz", "screc", "css", "js")),
    )
    for path in ROOT.glob(f"shadowcore/**/{pattern}")
)
VISIBLE = re.compile(r"^(?:def|class|cdef class|cpdef)\b", re.M)


@pytest.fixture(scope="module")
def build():
    """The functions of setup.py."""
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    spec = importlib.util.spec_from_file_location("shadowcore_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_version_is_that_of_the_metadata():
    assert shadowcore.__version__ == importlib.metadata.version("shadowcore")


@pytest.mark.parametrize("name", MODULES)
def test_every_source_is_a_compiled_module(name):
    module = importlib.import_module(f"shadowcore.{name.replace('/', '.')}")
    assert module.__file__.endswith(tuple(importlib.machinery.EXTENSION_SUFFIXES))


@pytest.mark.parametrize("name", MODULES)
def test_every_visible_module_has_a_stub(name):
    if VISIBLE.search((ROOT / "pyx" / f"{name}.pyx").read_text("utf-8")):
        assert (ROOT / "shadowcore" / f"{name}.pyi").is_file()


@pytest.mark.parametrize("name", PACKAGE_FILES)
def test_every_package_file_is_installed(name):
    assert (INSTALLED / name).is_file()


def test_cimports_are_found_in_every_form(build):
    text = """
from libc.string cimport memset
from shadowcore.a cimport (
    x, y,
)
from shadowcore cimport b, \\
    c as d  # e
cimport shadowcore.f as g
from .h cimport z
from . cimport i
    from shadowcore.j cimport w
import shadowcore.k
"""
    found = {name.removeprefix("shadowcore.") for name in build.cimports(text)}
    assert found & set("abcefghijk") == set("abcfhij")
    assert build.cimports("from .h cimport z", "shadowcore.engine") == {"shadowcore.engine.h", "shadowcore.engine.h.z"}


@pytest.fixture
def tree(tmp_path):
    """Three modules: `near` uses the header `low`, `far` uses it by way of `near`, `alone` does not."""
    header = "from shadowcore.deep cimport low\ncdef inline int twice(int x):\n    return low.FACTOR * x\n"
    for folder in ("pyx/deep", "shadowcore/deep"):
        (tmp_path / folder).mkdir(parents=True)
    for name, text in {
        "pyx/deep/near.pyx": "",
        "pyx/far.pyx": "from shadowcore.deep.near cimport twice\ndef four():\n    return twice(2)\n",
        "pyx/alone.pyx": "def one():\n    return 1\n",
        "shadowcore/deep/near.pxd": header,
        "shadowcore/deep/low.pxd": "cdef enum:\n    FACTOR = 2\n",
        "shadowcore/deep/__init__.py": "",
        "shadowcore/__init__.py": "",
    }.items():
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


NEAR, FAR, ALONE = "shadowcore.deep.near", "shadowcore.far", "shadowcore.alone"


def changed(before, after):
    return {name for name in after if before.get(name) != after[name]}


def test_fingerprint_follows_headers_and_settings(build, tree):
    before = build.fingerprints(tree, ["settings"])
    assert build.fingerprints(tree, ["settings"]) == before
    assert changed(before, build.fingerprints(tree, ["other settings"])) == {NEAR, FAR, ALONE}
    with (tree / "shadowcore" / "deep" / "low.pxd").open("a") as header:
        header.write("    MORE = 3\n")
    assert changed(before, build.fingerprints(tree, ["settings"])) == {NEAR, FAR}


def test_a_module_whose_c_file_is_gone_is_not_remembered(build, tree):
    c_files = tree / "build" / "cython" / "pyx" / "deep"
    c_files.mkdir(parents=True)
    (c_files / "near.c").touch()
    build.remember(tree / "build", {NEAR: "1", FAR: "2"})
    assert build.remembered(tree / "build") == {NEAR: "1"}


@pytest.mark.parametrize(
    ("variables", "flags"),
    [
        ({}, {"-O3", "-g0"}),
        ({"SHADOWCORE_DEBUG": "0"}, {"-O3", "-g0"}),
        ({"SHADOWCORE_DEBUG": "1"}, {"-O1", "-g", "-UNDEBUG"}),
        ({"SHADOWCORE_NATIVE": "1"}, {"-O3", "-g0", "-march=native"}),
        ({"SHADOWCORE_SANITIZE": "address,undefined"}, {"-O1", "-g", "-fsanitize=address,undefined"}),
        ({"SHADOWCORE_ABI3": "1"}, {"-O3", "-g0"}),
    ],
)
def test_flavours(build, variables, flags):
    directives, arguments = build.flavour(variables)
    assert flags <= set(arguments["extra_compile_args"])
    debug = variables.get("SHADOWCORE_DEBUG") == "1"
    assert directives["boundscheck"] is debug
    macros = dict(arguments["define_macros"])
    assert ("SC_DEBUG" in macros) is debug
    assert ("CYTHON_INLINE" in macros) is ("-O3" in flags)
    assert ("Py_LIMITED_API" in macros) is ("SHADOWCORE_ABI3" in variables)
    assert ("-march=native" in arguments["extra_compile_args"]) is ("SHADOWCORE_NATIVE" in variables)
    assert bool(arguments["extra_link_args"]) is ("SHADOWCORE_SANITIZE" in variables)


@pytest.mark.parametrize(("maxsize", "byteorder"), [(2**31 - 1, "little"), (2**63 - 1, "big")])
def test_hosts_that_cannot_work_are_refused(build, maxsize, byteorder):
    with pytest.raises(SystemExit, match="64-bit little-endian"):
        build.check_host(maxsize, byteorder)


def test_the_stable_abi_wants_a_python_that_has_it(build):
    build.check_host(version=(3, 11), abi3=False)
    build.check_host(version=(3, 12), abi3=True)
    with pytest.raises(SystemExit, match=r"needs Python 3\.12 or newer; this is 3\.11"):
        build.check_host(version=(3, 11), abi3=True)


@pytest.mark.parametrize(
    ("platform", "archs", "tags"),
    [
        ("linux", "x86_64,aarch64", {"manylinux_x86_64", "manylinux_aarch64"}),
        ("macos", "x86_64,arm64", {"macosx_x86_64", "macosx_arm64"}),
        ("windows", "AMD64", {"win_amd64"}),
    ],
)
def test_wheels_that_are_published(platform, archs, tags):
    """What cibuildwheel makes of its table in pyproject.toml: CPython 3.11 to 3.14 on each platform."""
    pytest.importorskip("cibuildwheel", reason="cibuildwheel comes with the dev extra, which is not installed")
    command = [sys.executable, "-m", "cibuildwheel", "--print-build-identifiers"]
    command += ["--platform", platform, "--archs", archs]
    env = {name: value for name, value in os.environ.items() if not name.startswith("CIBW_")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {f"cp3{minor}-{tag}" for minor in range(11, 15) for tag in tags}


@pytest.mark.slow
def test_rebuilds_what_it_must_and_no_more(build, tree):
    """The same with a real compiler: what is relinked after each change, first to last."""
    shutil.copy(ROOT / "setup.py", tree)

    def linked():
        return {path.name.partition(".")[0]: path.stat().st_mtime_ns for path in tree.glob("shadowcore/**/*.so")}

    def rebuilt(**variables):
        before = linked()
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        subprocess.run(command, cwd=tree, env=os.environ | variables, check=True)
        return changed(before, linked())

    everything = {"near", "far", "alone"}
    header = tree / "shadowcore" / "deep" / "low.pxd"
    assert rebuilt() == everything
    assert rebuilt() == set()
    header.write_text(header.read_text("utf-8").replace("2", "3"), "utf-8")
    os.utime(header, (0, 0))  # a date that goes backwards, as after a checkout
    assert rebuilt() == {"near", "far"}
    assert rebuilt(SHADOWCORE_DEBUG="1") == everything
    assert rebuilt(SHADOWCORE_DEBUG="1") == set()
    assert rebuilt() == everything


@pytest.mark.slow
def test_archives_are_complete():
    """The sdist and the wheel in the directory that SHADOWCORE_DIST names."""
    if "SHADOWCORE_DIST" not in os.environ:
        pytest.skip("SHADOWCORE_DIST names no directory of built archives")
    (sdist,) = Path(os.environ["SHADOWCORE_DIST"]).glob("*.tar.gz")
    (wheel,) = Path(os.environ["SHADOWCORE_DIST"]).glob("*.whl")

    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {f"pyx/{name}.pyx" for name in MODULES} | {f"shadowcore/{name}" for name in PACKAGE_FILES}
    wanted |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "CONTRIBUTING.md", "tests/models/oracle.py"}
    assert wanted - in_sdist == set()
    assert not [name for name in in_sdist if name.endswith((".so", ".pyc"))]

    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    assert {f"shadowcore/{name}" for name in PACKAGE_FILES} - in_wheel == set()
    compiled = {name.split(".")[0] for name in in_wheel if name.endswith((".so", ".pyd"))}
    assert compiled == {f"shadowcore/{name}" for name in MODULES}
    assert not [name for name in in_wheel if name.endswith((".pyx", ".c"))]


CONSUMER = """
# cython: language_level=3
from shadowcore.engine.access cimport OP_READ, sc_op, sc_result, vcpu_access
from shadowcore.engine.state cimport sc_mmu, sc_vcpu
from shadowcore.engine.vcpu cimport mmu_struct, vcpu_struct
from shadowcore.engine.walker cimport probe_walk, sc_walk
from libc.string cimport memset

cdef extern from "shadowcore.h":
    enum:
        SC_ABI_VERSION

def first(vm, unsigned long long gva):
    cdef sc_op op
    cdef sc_result result
    memset(&op, 0, sizeof(op))
    op.op, op.size, op.addr = OP_READ, 8, gva
    assert vcpu_access(mmu_struct(vm), vcpu_struct(vm, 0), &op, True, &result) == 0
    return result.gpa, result.exits, SC_ABI_VERSION
"""
SETUP = """
from Cython.Build import cythonize
from setuptools import Extension, setup
import shadowcore
setup(name="consumer", ext_modules=cythonize(
    [Extension("consumer", ["consumer.pyx"], include_dirs=[shadowcore.get_include()])]))
"""
USE = """
import shadowcore as sc, consumer, os
assert consumer.first(sc.VM("1MiB"), 0x1008) == (0x1008, 1, 1)
for wrong in (None, object(), 5):
    try:
        consumer.first(wrong, 0)
    except (TypeError, AttributeError):
        pass
    else:
        raise AssertionError(wrong)
assert os.path.isfile(os.path.join(sc.get_include(), "shadowcore.h"))
print(sc.__file__)
"""


def consume(python, work, **variables):
    """Build a package that cimports ours with `python`, and use it; where it found ours."""
    work.mkdir()
    for name, text in (("consumer.pyx", CONSUMER), ("setup.py", SETUP), ("use.py", USE)):
        (work / name).write_text(text, "utf-8")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    env["CFLAGS"] = "-O0 -g0"  # it is built to see that it can be, and called four times
    subprocess.run([python, "setup.py", "-q", "build_ext", "--inplace"], cwd=work, env=env, check=True)
    done = subprocess.run([python, "use.py"], cwd=work, env=env, check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def test_another_package_cimports_ours(tmp_path):
    """Against the installation under test."""
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    path = os.pathsep.join([str(INSTALLED.parent), ".", os.environ.get("PYTHONPATH", "")])
    assert consume(sys.executable, tmp_path / "consumer", PYTHONPATH=path) == INSTALLED / "__init__.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "plain", "editable"])
def test_another_package_cimports_ours_from_each_kind_of_install(tmp_path, kind):
    """A wheel (that in SHADOWCORE_DIST, if there is one), `pip install .`, `pip install -e .`."""
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    tree = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "dist", "build", "*.so", "__pycache__", ".*_cache", "*.egg-info")
    shutil.copytree(ROOT, tree, ignore=ignored)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    # The tools of this environment, but not our own package, which may be installed there.
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    tools = [path for path in sys.path if path.endswith("site-packages")]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PYTHONPATH"] = os.pathsep.join(tools)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--no-deps", "--no-build-isolation"]
    pip += ["--ignore-installed", "--prefix", tmp_path / "venv"]
    if kind == "wheel":
        wheels = list(Path(os.environ.get("SHADOWCORE_DIST", tmp_path)).glob("*.whl"))
        if not wheels:
            command = [*pip[:5], "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path / "dist", tree]
            subprocess.run([word for word in command if word != "install"], env=env, check=True)
            wheels = list((tmp_path / "dist").glob("*.whl"))
        subprocess.run([*pip, *wheels], env=env, check=True)
    else:
        subprocess.run([*pip, *(["-e"] if kind == "editable" else []), tree], env=env, check=True)
    if kind != "editable":
        shutil.rmtree(tree)
    # Ours before what the tools' directory may hold. An editable install is found by its .pth, which Python reads in
    # its own site-packages.
    found = consume(python, tmp_path / "consumer", PYTHONPATH=os.pathsep.join([".", str(site), *tools]))
    assert found == (tree if kind == "editable" else site) / "shadowcore" / "__init__.py"
