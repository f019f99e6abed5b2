"""What other packages are compiled against: it may grow, and must not change.

`python tests/package/test_binary_interface.py` writes tests/golden anew; the difference is then to be looked at: lines
that are added are fine, lines that change or go break whoever was built against them.
"""

import ctypes
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
GOLDEN = TESTS / "golden"
ENGINE = "shadowcore.engine"
PUBLISHED = ("access", "batch", "emulate", "invariants", "memory", "mmu", "registers", "tlb", "vcpu", "walker")
"""Modules whose functions are for others as well, see docs/embedding.md. What the rest offers is between us."""
NAME = re.compile(r"__pyx_\w+?_10shadowcore_6engine_\d+([a-z_]+?)_(sc_\w+|u\d+|i\d+|[A-Z]\w+)")
CLASS = re.compile(r"(PyObject|\b[a-z_]+\.[A-Z]\w+) \*\(|struct [a-z_]+\.[A-Z]\w+ \*")


def signatures():
    """Each published function, with its C signature: functions of plain structures; classes stay between us."""
    name_of = ctypes.pythonapi.PyCapsule_GetName
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    found = []
    for module in PUBLISHED:
        for name, capsule in getattr(importlib.import_module(f"{ENGINE}.{module}"), "__pyx_capi__", {}).items():
            signature = name_of(capsule).decode()
            # shadowcore.engine.state.sc_mmu, as Cython spells it: __pyx_t_10shadowcore_6engine_5state_sc_mmu.
            signature = NAME.sub(r"\1.\2", signature)
            if not CLASS.search(signature):
                found.append(f"{module}.{name}: {signature}")
    return sorted(found)


def table():
    """Each structure and function of shadowcore.h, field by field, with offsets."""
    import capi

    found = []
    for name in capi.STRUCTS:
        of = capi.structure(name)
        for field, kind in of._fields_:
            found.append(f"{name}.{field}: {kind.__name__} at {getattr(of, field).offset}")
    for field, *_ in capi.Table._fields_:
        prototype = re.search(rf"\(\*{field}\)\((.*?)\);", capi.TEXT)
        what = f"({prototype[1]}) " if prototype else ""
        found.append(f"sc_api.{field}: {what}at {getattr(capi.Table, field).offset}")
    found += [f"{name} = {value}" for name, value in capi.C.items() if name not in ("SC_EXITS", "SC_EVENTS")]
    return found


LISTS = {"cython.txt": signatures, "c.txt": table}


@pytest.mark.parametrize("name", LISTS)
def test_nothing_that_was_there_changed(name):
    wanted = (GOLDEN / name).read_text("utf-8").splitlines()
    missing = [line for line in wanted if line not in set(LISTS[name]())]
    assert not missing, f"changed or gone; see {Path(__file__).name}"


def test_the_table_only_grows_at_its_end():
    golden = [line for line in (GOLDEN / "c.txt").read_text("utf-8").splitlines() if line.startswith("sc_api.")]
    assert [line for line in table() if line.startswith("sc_api.")][: len(golden)] == golden


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS / "makers"))
    GOLDEN.mkdir(exist_ok=True)
    for file, lines in LISTS.items():
        (GOLDEN / file).write_text("\n".join(lines()) + "\n", "utf-8")
    subprocess.run(["git", "diff", "--stat", "--", str(GOLDEN)], check=False)
