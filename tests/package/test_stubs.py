"""The stubs of the compiled modules say what the modules are."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import DATA

import shadowcore
from shadowcore.engine.counters import COUNTERS, EXIT_REASONS

# Where mypy is missing, as in a plain test environment, stubtest is skipped; this mark selects it once more.
pytestmark = pytest.mark.packaging

PACKAGE = Path(shadowcore.__file__).parent
MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.glob("**/*.pyi"))
ALLOWLIST = DATA / "stubtest_allowlist.txt"


@pytest.mark.slow
def test_stubs_agree_with_the_modules(tmp_path):
    """Names, signatures, defaults and kinds of attributes, as stubtest compares them."""
    pytest.importorskip("mypy", reason="stubtest comes with mypy, which is not installed")
    names = [f"shadowcore.{name}" for name in MODULES]
    command = [sys.executable, "-m", "mypy.stubtest", "--allowlist", ALLOWLIST, *names]
    path = os.pathsep.join(filter(None, [str(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_counter_is_in_the_stub():
    """Counters are looked up when they are asked for, so that stubtest cannot see them."""
    tree = ast.parse((PACKAGE / "engine" / "counters.pyi").read_text("utf-8"))
    (stats,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Stats")
    annotated = [node for node in stats.body if isinstance(node, ast.AnnAssign)]
    assert [node.target.id for node in annotated] == [*(f"exits_{name}" for name in EXIT_REASONS), *COUNTERS]
    assert {ast.unparse(node.annotation) for node in annotated} == {"Final[int]"}
