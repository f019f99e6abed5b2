"""Modules of other packages that were compiled with structures of other sizes: they are told, and touch nothing."""

import ctypes
import os
import re
import shutil
import subprocess
import sys

import pytest
from bench_capi import pointer
from places import ROOT

import shadowcore as sc
from shadowcore.engine import vcpu

HEADERS = ROOT / "shadowcore"
PUBLISHED = [path.stem for path in HEADERS.glob("*.pxd") if path.stem != "__init__"]
"""Short names of what docs/embedding.md publishes."""
COMPARED = re.findall(r'"(sc_\w+)", sizeof\(\1\)', (HEADERS / "engine" / "vcpu.pxd").read_text("utf-8"))


class Shared(ctypes.Structure):
    """sc_shared."""

    _fields_ = (("name", ctypes.c_char_p), ("size", ctypes.c_size_t))


def check(sizes):
    """What a module with structures of these sizes is told, and nothing if they are ours."""
    function = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.POINTER(Shared), ctypes.c_uint32)(pointer(vcpu, "shared_check"))
    array = (Shared * len(sizes))(*[(name.encode(), size) for name, size in sizes.items()])
    function(array, len(sizes))


@pytest.fixture(scope="module")
def ours():
    """Sizes, as what is told says them."""
    found = {}
    for name in COMPARED:
        with pytest.raises(ImportError) as told:
            check(found | {name: 0})
        text = rf"{name}: 0 bytes in the module that asks, (\d+) in shadowcore"
        found[name] = int(re.match(text, str(told.value))[1])
    return found


def test_every_published_structure_is_compared():
    texts = [(HEADERS / f"{name}.pxd").read_text("utf-8") for name in PUBLISHED]
    modules = {name for text in texts for name in re.findall(r"shadowcore\.engine\.(\w+) cimport", text)}
    found = set()
    for name in modules:
        text = (HEADERS / "engine" / f"{name}.pxd").read_text("utf-8")
        found.update(re.findall(r"^cdef struct (sc_\w+):", text, re.M))
    assert set(COMPARED) | {"sc_shared"} == found
    assert len(COMPARED) == len(set(COMPARED))


def test_sizes_that_fit_are_taken(ours):
    check(ours)
    check({})
    check(dict(list(ours.items())[:5]))  # of a version that compared fewer


@pytest.mark.parametrize("by", [-8, 8])
@pytest.mark.parametrize("name", COMPARED)
def test_another_size_is_told_with_both(ours, name, by):
    size = ours[name]
    with pytest.raises(ImportError, match=rf"^{name}: {size + by} bytes in .*, {size} in shadowcore {sc.__version__}"):
        check(ours | {name: size + by})


def test_a_structure_that_we_do_not_have(ours):
    with pytest.raises(ImportError, match=r"^sc_new: 16 bytes in the module that asks, 0 in shadowcore"):
        check(ours | {"sc_new": 16})


def test_modules_that_were_compiled_before_sizes_were_compared_still_run():
    for old, new in (("mmu_struct", "vm_mmu"), ("vcpu_struct", "vm_vcpu")):
        assert pointer(vcpu, old) == pointer(vcpu, new)


CONSUMER = """
# cython: language_level=3
from shadowcore.engine.vcpu cimport mmu_struct, vcpu_struct

def ask(vm):
    return mmu_struct(vm) != NULL and vcpu_struct(vm, 0) != NULL
"""
BUILD_AND_USE = """
import shadowcore as sc
from Cython.Build import cythonize
from setuptools import Extension, setup

consumer = Extension("consumer", ["consumer.pyx"], include_dirs=[sc.get_include()], extra_compile_args=["-O0", "-g0"])
setup(name="consumer", ext_modules=cythonize([consumer], include_path=["headers"], quiet=True))

import consumer
for vm in (sc.VM("1MiB"), None):
    try:
        consumer.ask(vm)
    except ImportError as error:
        print(error)
"""


@pytest.mark.packaging
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED[:5])
def test_a_module_compiled_with_other_headers(ours, tmp_path, name):
    """All the way: the structure has a field more in the headers that the module is compiled with."""
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    keep = shutil.ignore_patterns("*.so", "*.pyd", "*.py", "*.pyi", "*.npz", "data", "include", "__pycache__")
    headers = tmp_path / "headers" / "shadowcore"
    shutil.copytree(HEADERS, headers, ignore=keep)
    for folder in ("", "engine"):
        (headers / folder / "__init__.py").touch()
    (header,) = (path for path in headers.glob("engine/*.pxd") if f"cdef struct {name}:" in path.read_text("utf-8"))
    text = re.sub(rf"(cdef struct {name}:.*\n)", r"\1    double doctored[2]\n", header.read_text("utf-8"))
    header.write_text(text, "utf-8")
    (tmp_path / "consumer.pyx").write_text(CONSUMER, "utf-8")
    (tmp_path / "setup.py").write_text(BUILD_AND_USE, "utf-8")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), ".", os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True)
    told = f"{name}: {ours[name] + 16} bytes in the module that asks, {ours[name]} in shadowcore {sc.__version__}"
    lines = [line for line in done.stdout.splitlines() if line.startswith("sc_")]
    assert len(lines) == 2  # before it is looked whether what is asked about is a VM
    assert all(line.startswith(told) for line in lines)
