"""`import shadowcore` loads settings and errors; the rest comes when it is named."""

import subprocess
import sys

import pytest

import shadowcore as sc


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_what_is_loaded():
    loaded = python("import sys, shadowcore; print(*sys.modules)")
    ours = {name for name in loaded if name.startswith("shadowcore.")}
    assert ours == {f"shadowcore.{name}" for name in ("_version", "config", "errors", "plugins")}
    assert not {"numpy", "importlib.metadata"} & set(loaded)
    loaded = python("import sys, shadowcore; shadowcore.VM; print(*sys.modules)")
    above = {"cli", "embed", "guest", "heat", "importers", "programs", "recording", "report", "studies", "workload"}
    assert "shadowcore.engine.machine" in loaded
    assert not [name for name in loaded if name.startswith("shadowcore.") and name.split(".")[1] in above]


@pytest.mark.parametrize("name", sorted(sc._LATER))
def test_what_comes_later_is_what_it_should_be(name):
    found = getattr(sc, name)
    assert name in sc.__all__
    assert vars(sc)[name] is found  # the second time it is there
    where = f"shadowcore{sc._LATER[name]}" if sc._LATER[name] else f"shadowcore.{name}"
    module = sys.modules[where]
    assert found is (getattr(module, name) if sc._LATER[name] else module)


def test_all_names_at_once():
    names = python("from shadowcore import *; print(*(name for name in dir() if not name.startswith('__')))")
    assert set(names) >= {name for name in sc.__all__ if not name.startswith("__")}


def test_a_name_that_there_is_not():
    with pytest.raises(AttributeError, match="module 'shadowcore' has no attribute 'nothing_such'") as caught:
        _ = sc.nothing_such
    assert caught.value.name == "nothing_such"
    assert caught.value.obj is sc
