"""Every block of code in README.md and docs/*.md runs as it stands there.

The blocks of a page run in order, in one temporary directory: Python (```python) in one namespace, commands (```sh,
```bash) by bash. A comment directly above a block, `<!-- not run: REASON -->`, keeps it from being run;
`<!-- needs NAME -->` does where there is neither a module nor a program of that name. Both appear as skipped tests with
their reasons.
"""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from places import ROOT

import shadowcore
from shadowcore.cli import main

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON, SHELL = ("python",), ("sh", "bash")
LANGUAGES = (*PYTHON, *SHELL, "", "text", "json", "toml", "cython", "c", "cpp", "{include}", "{toctree}")
COMMANDS = ("shadowcore", "python -m", "printf", "cat", "unzip")
"""How lines of a block of commands may begin: nothing that installs, deletes, or goes elsewhere is run unmarked."""


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    code: str
    marks: tuple[str, ...]

    @property
    def name(self):
        return f"{self.page}:{self.line}"

    @property
    def reason(self):
        """Why it is not run, or None."""
        for mark in self.marks:
            kind, _, rest = mark.partition(" ")
            if mark.startswith("not run: "):
                return rest.removeprefix("run: ")
            if kind == "needs" and not available(rest):
                return f"there is no {rest}"
        return None


def available(name):
    if shutil.which(name):
        return True
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def blocks(text, page):
    """All fenced blocks of a page, indented ones as well."""
    found, lines = [], text.split("\n")
    number = 0
    while number < len(lines):
        fence = re.fullmatch(r"( *)```(\S*)(?: \S+)?\s*", lines[number])  # a directive may have an argument
        if fence is None:
            number += 1
            continue
        end = next((n for n in range(number + 1, len(lines)) if lines[n].strip() == "```"), None)
        assert end is not None, f"{page}:{number + 1}: the block does not end"
        marks, above = [], number - 1
        while above >= 0 and (mark := re.fullmatch(r" *<!-- *(not run: .+?|needs \S+) *-->", lines[above])):
            marks.append(mark[1])
            above -= 1
        code = textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n"
        found.append(Block(page, number + 2, fence[2], code, tuple(marks)))
        number = end + 1
    return found


BLOCKS = {path.name: blocks(path.read_text("utf-8"), str(path.relative_to(ROOT))) for path in PAGES}
RUN = {page: [b for b in found if b.language in PYTHON + SHELL] for page, found in BLOCKS.items()}
LEFT_OUT = [block for found in RUN.values() for block in found if block.reason]

DRIVER = """
import json, subprocess, sys
namespace = {"__name__": "__main__"}
for kind, name, line, code in json.load(open(sys.argv[1])):
    print(f"--- {name}", flush=True)
    print(f"--- {name}", file=sys.stderr, flush=True)
    if kind == "python":
        # Line numbers of a traceback are those of the page.
        exec(compile("\\n" * (line - 1) + code, name.rpartition(":")[0], "exec"), namespace)
    else:
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True)
    sys.stdout.flush()
"""


@pytest.fixture
def place(tmp_path):
    """A directory with what pages refer to, and an environment in which `shadowcore` is this one."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "shadowcore").symlink_to(Path(shadowcore.__file__).parent)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "shadowcore"
    command.write_text(f"#!{sys.executable}\nfrom shadowcore.cli import main\nmain()\n")
    command.chmod(0o755)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    path = [str(Path(shadowcore.__file__).parent.parent), *filter(None, sys.path)]
    return tmp_path, os.environ | {
        "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path),
    }


@pytest.mark.parametrize("page", [page for page, found in RUN.items() if any(not b.reason for b in found)])
def test_page(page, place):
    directory, environment = place
    chosen = [block for block in RUN[page] if not block.reason]
    (directory / "driver.py").write_text(DRIVER)
    plain = [("python" if b.language in PYTHON else "sh", b.name, b.line, b.code) for b in chosen]
    (directory / "blocks.json").write_text(json.dumps(plain))
    command = [sys.executable, "driver.py", "blocks.json"]
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    output = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert done.returncode == 0, output
    assert "Traceback" not in done.stderr, output
    # Each block shows something: one that does not is either no example, or did not run.
    parts = re.split(r"^--- (.*)\n", done.stdout, flags=re.M)[1:]
    shown = dict(zip(parts[::2], parts[1::2], strict=True))
    assert list(shown) == [block.name for block in chosen]
    assert not [name for name, text in shown.items() if not text.strip()], output


@pytest.mark.parametrize("block", LEFT_OUT, ids=[block.name for block in LEFT_OUT])
def test_block_that_is_not_run(block):
    if block.language in PYTHON:
        compile(block.code, block.name, "exec")
    else:
        checked = subprocess.run(["bash", "-n", "-c", block.code], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, checked.stderr
    pytest.skip(f"{block.name}: {block.reason}")


def test_commands_are_ours_or_marked():
    for found in RUN.values():
        for block in found:
            if block.language in SHELL and not any(mark.startswith("not run: ") for mark in block.marks):
                joined = block.code.replace("\\\n", " ")
                for line in filter(None, joined.split("\n")):
                    assert line.startswith(COMMANDS), f"{block.name}: {line}"


def test_blocks_are_found_and_have_a_language_that_is_known():
    assert {"README.md", "guide.md", "recordings.md", "workloads.md"} <= {page for page, found in RUN.items() if found}
    for page, found in BLOCKS.items():
        for block in found:
            assert block.language in LANGUAGES, f"{page}: {block.language}"
            if block.language == "":
                assert not re.search(r"^\s*(import |shadowcore |python )", block.code, re.M), (
                    f"{block.name}: no language"
                )


def test_the_reader_of_blocks():
    text = "a\n```python\nx = 1\n```\n\n<!-- not run: it installs -->\n```sh\npip install x\n```\n"
    text += "1. b\n   <!-- needs no.such.module -->\n   ```python\n   if x:\n       y = 2\n   ```\n"
    first, second, third = blocks(text, "p.md")
    assert (first.language, first.code, first.line, first.reason) == ("python", "x = 1\n", 3, None)
    assert second.reason == "it installs"
    assert third.code == "if x:\n    y = 2\n"
    assert third.reason == "there is no no.such.module"
    with pytest.raises(AssertionError, match="does not end"):
        blocks("```sh\nx", "p.md")


def test_links_lead_somewhere():
    """Files that pages refer to are there, and headings as well."""
    links = 0
    for path in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text("utf-8")):
            if target.startswith(("http://", "https://")):
                continue
            file, _, heading = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            assert there.exists(), f"{path.name}: {target}"
            if heading and there.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", there.read_text("utf-8"), re.M)
                slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert heading in slugs, f"{path.name}: {target}"
            links += 1
    assert links > 20


def test_rows_of_the_guide_are_rows_of_the_table(place):
    """docs/guide.md explains rows that `shadowcore compare` prints, under the names that it prints."""
    text = (ROOT / "docs" / "guide.md").read_text("utf-8")
    table = text[text.index("## Reading the table") : text.index("## Reading the page")]
    rows = re.findall(r"^\| `([^`]+)` \|", table, re.M)
    assert len(rows) > 12
    directory, environment = place
    done = subprocess.run(
        ["shadowcore", "compare", "--all"], cwd=directory, env=environment, capture_output=True, text=True, check=True
    )
    printed = {re.split(r" {3,}", line.strip())[0] for line in done.stdout.split("\n")}
    assert set(rows) <= printed, set(rows) - printed


def script(name):
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_its_script_draws():
    assert (ROOT / "docs" / "images" / "concepts.svg").read_text("utf-8") == script("make_concepts").draw()


def test_the_pictures_of_the_tutorial_are_runs_of_today():
    module = script("make_tutorial")
    for name, what in module.PICTURES.items():
        assert (ROOT / "docs" / "images" / f"{name}.svg").read_text("utf-8") == module.picture(*what), name


def test_all_commands_and_options_are_on_their_page():
    """docs/commands.md, by name: how click breaks lines is its own affair."""
    found = {}
    for part in (ROOT / "docs" / "commands.md").read_text("utf-8").split("\n## ")[1:]:
        found[part.split("\n")[0]] = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", part, re.M))
    made = {}
    for part in script("make_commands").text().split("\n## ")[1:]:
        made[part.split("\n")[0]] = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", part, re.M))
    assert found == made, "python docs/make_commands.py"
    assert set(found) == set(main.commands)
