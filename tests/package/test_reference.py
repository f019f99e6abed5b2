"""The reference of the API, made from docstrings: everything public is in it and says what it is."""

import importlib
import inspect
import subprocess
import sys
import zlib

import pytest
from places import ROOT

import shadowcore

MODULES = (
    "embed",
    "errors",
    "heat",
    "html",
    "importers",
    "programs",
    "recordings",
    "steps",
    "timeline",
    "trace",
    "workload",
)
IN_CLASSES = {
    # Attributes of compiled classes cannot have texts of their own: the docstring of the class names them.
    "Memory": {"bytes", "words", "slots", "on_log", "on_slots", "on_backing"},
    "Mmu": {"memory", "stats", "design"},
    "VCpu": {"mmu"},
}


def public(module):
    """Classes and functions that a module offers, by name."""
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]
    found = {name: getattr(module, name) for name in names}
    return {name: value for name, value in found.items() if inspect.isclass(value) or inspect.isroutine(value)}


def described(what):
    return bool((getattr(what, "__doc__", None) or "").strip())


@pytest.mark.parametrize("name", ["", *MODULES])
def test_everything_public_has_a_docstring(name):
    module = importlib.import_module(f"shadowcore.{name}") if name else shadowcore
    assert described(module)
    missing = []
    for title, value in public(module).items():
        if not described(value):
            missing.append(title)
        if not inspect.isclass(value):
            continue
        for member, attribute in vars(value).items():
            if member.startswith("_") or member in IN_CLASSES.get(title, ()):
                continue
            function = attribute.__func__ if isinstance(attribute, (classmethod, staticmethod)) else attribute
            if inspect.isroutine(function) or isinstance(function, property) or inspect.isgetsetdescriptor(function):
                missing += [] if described(function) else [f"{title}.{member}"]
    assert missing == []


@pytest.mark.slow
@pytest.mark.packaging
def test_the_site_is_built_without_a_warning(tmp_path):
    """By Sphinx, warnings as errors, from docs/; the inventory of the site has every public name."""
    pytest.importorskip("sphinx", reason="Sphinx comes with the extra docs, which is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    inventory = (tmp_path / "objects.inv").read_bytes().split(b"\n", 4)[4]
    known = {line.split(" ", 1)[0] for line in zlib.decompress(inventory).decode().splitlines()}
    entries = {name.rpartition(".")[2] for name in known}
    assert set(public(shadowcore)) - entries == set()
    for module in ("embed", "errors", "programs", "trace", "workload"):
        assert set(public(importlib.import_module(f"shadowcore.{module}"))) - entries == set()
