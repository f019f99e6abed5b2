"""A new importer is a file, and a line: the command line, its help and `guess` know it; the documentation names it."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from places import ROOT

import shadowcore
from shadowcore import recordings
from shadowcore.cli import main
from shadowcore.recording import importers, inputs

NEW = '''"""Letters, an address each."""

from ..writer import Writer
from .processes import Processes
from .source import sources

def matches(head):
    return head.startswith(b"LETTERS")


def read(paths, writer: Writer, progress=None):
    processes = Processes(writer)
    for source in sources(paths, progress):
        with source:
            processes.run(processes.new(None))
            writer.write(op=0, size=1, addr=list(source.read()[7:].strip()))
'''
SHARED = {"__init__", "processes", "source"}


def copy(package, target, changed):
    """The package in `target`: links, but for the folder of importers, which is made."""
    target.mkdir()
    for path in package.iterdir():
        if path == changed:
            target.joinpath(path.name).mkdir()
            for module in path.glob("[!_]*.*"):
                target.joinpath(path.name, module.name).symlink_to(module)
        elif path in changed.parents:
            copy(path, target / path.name, changed)
        elif path.name != "__pycache__":
            target.joinpath(path.name).symlink_to(path)
    return target.joinpath(*changed.relative_to(package).parts)


@pytest.fixture
def extended(tmp_path):
    """Runs `shadowcore` of a copy of the package that has the new importer: a file and a line."""
    package = Path(shadowcore.__file__).parent
    folder = copy(package, tmp_path / "shadowcore", package / "recording" / "importers")
    (folder / "letters.py").write_text(NEW)
    (folder / "__init__.py").symlink_to(importers.__file__)
    list_of = folder.parent / "inputs.py"
    text = Path(inputs.__file__).read_text("utf-8")
    line = '    "letters": "Letters, an address each.",\n'
    made = text.replace("INPUTS = {\n", "INPUTS = {\n" + line)
    assert len(made) == len(text) + len(line)
    list_of.unlink()
    list_of.write_text(made)
    command = [sys.executable, "-c", "from shadowcore.cli import main; main()"]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
        "COLUMNS": "200",
    }

    def run(*arguments):
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_new_importer_is_a_file_and_a_line(extended, tmp_path):
    said = " ".join(extended("import", "--help").split())
    assert "[auto|letters|linux|" in said
    assert "letters: Letters, an address each." in said
    (tmp_path / "text").write_text("LETTERS abc\n")
    extended("import", "text", "-o", "out.screc")
    with recordings.Reader(tmp_path / "out.screc") as reader:
        assert reader.source["format"] == "letters"
        assert [block.columns["addr"].tolist() for block in reader] == [[*b"abc"]]


def test_every_module_beside_the_registry_is_in_it():
    folder = Path(importers.__file__).parent
    names = {path.stem for path in folder.glob("*.py")} - SHARED
    assert set(importers.IMPORTERS) == set(inputs.INPUTS) == names


@pytest.mark.parametrize("importer", importers.IMPORTERS.values(), ids=importers.FORMATS)
def test_an_importer_is_complete(importer):
    assert list(inspect.signature(importer.matches).parameters) == ["head"]
    assert list(inspect.signature(importer.read).parameters) == [
        "paths",
        "writer",
        "progress",
        *(["lenient"] if getattr(importer, "LENIENT", False) else []),
    ]
    assert importer.matches(b"") is False
    assert importer.matches(bytes(1 << 16)) is False
    assert importlib.import_module(importer.__name__) is importer


def test_help_and_documentation_name_every_format():
    said = " ".join(CliRunner().invoke(main, ["import", "--help"], terminal_width=200).output.split())
    assert f"[auto|{'|'.join(importers.FORMATS)}]" in said
    page = (ROOT / "docs" / "recordings.md").read_text("utf-8")
    section = page.split("### What becomes of what\n", 1)[1].split("\n## ", 1)[0]
    for name, importer in importers.IMPORTERS.items():
        assert f"{name}: {inputs.INPUTS[name]}" in said
        assert importer.__doc__.splitlines()[0] == inputs.INPUTS[name]
        assert re.search(rf"^- \*\*{name}\*\*", section, re.M)
