"""I12 after a sync: nothing below the roots of the vcpu is unsync.

Python comes by no array between a sync and the audit after it, so a C function stands before that audit and spoils it.
"""

import os
import subprocess
import sys
from pathlib import Path

import broken
import pytest

import shadowcore

SPOIL = """
# cython: language_level=3
from shadowcore.engine.hooks cimport POINT_POST_SYNC
from shadowcore.engine.marks cimport marks_set
from shadowcore.engine.state cimport sc_audit_hook, sc_mmu
from shadowcore.engine.types cimport u32
from shadowcore.engine.vcpu cimport mmu_struct

cdef sc_audit_hook _audit = NULL

cdef void _leave_a_mark(sc_mmu *mmu, u32 point) noexcept nogil:
    if point == POINT_POST_SYNC:
        marks_set(mmu, mmu.vcpus[mmu.synced].roots[0] * 512)
    _audit(mmu, point)

def spoil(vm):
    global _audit
    _audit = mmu_struct(vm).audit
    mmu_struct(vm).audit = _leave_a_mark
"""
SETUP = """
from Cython.Build import cythonize
from setuptools import Extension, setup
setup(name="spoil", ext_modules=cythonize([Extension("spoil", ["spoil.pyx"])]))
"""
USE = """
import sys
import shadowcore as sc
vm = sc.VM("8MiB", "unsync")
tables = sc.PageTables(vm.memory, "64", allocate=range(1024, 2048))
tables.map(0, 0, 8 << 20, "rw", 4096, accessed=True, dirty=True)
tables.activate(vm.vcpus[0])
leaf = tables.root
for _ in range(3):
    leaf = int(vm.memory.words[leaf // 8]) & 0xFFFFFFFFFF000
vm.vcpus[0].read(0)
vm.vcpus[0].write(leaf, int(vm.memory.words[leaf // 8]))
assert vm.stats.mmu_unsync
vm.audit_points = ("post-sync",)
if sys.argv[1:]:
    import spoil
    spoil.spoil(vm)
try:
    vm.vcpus[0].cr3 = tables.cr3
except sc.AuditError as error:
    print(error)
"""


@pytest.mark.packaging
def test_a_sync_that_leaves_something_unsync(tmp_path):
    pytest.importorskip("Cython")
    pytest.importorskip("setuptools")
    for name, text in (("spoil.pyx", SPOIL), ("setup.py", SETUP), ("use.py", USE)):
        (tmp_path / name).write_text(text, "utf-8")
    place = os.pathsep.join([str(Path(shadowcore.__file__).parents[1]), "."])
    env = {**os.environ, "PYTHONPATH": place, "CFLAGS": "-O0 -g0"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=tmp_path, env=env, check=True)
    said = [
        subprocess.run(
            [sys.executable, "use.py", *arguments], cwd=tmp_path, env=env, check=True, capture_output=True, text=True
        ).stdout
        for arguments in ((), ("spoil",))
    ]
    assert said[0] == ""
    assert broken.LAGS in said[1]
    assert "I12" in said[1]
