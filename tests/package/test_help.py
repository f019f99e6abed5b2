"""What `--help` says: an example of each command that can be typed, quickly, and without numpy."""

import re
import shlex
import subprocess
import sys

import click
import pytest
from commands import run

from shadowcore.cli import main

NAMES = sorted(main.commands)
QUIET = """
import contextlib, io, sys
from shadowcore.cli import main
for name in {names}:
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main([*name.split(), "--help"])
    assert "Usage: shadowcore" in said.getvalue() or "Usage:" in said.getvalue(), name
heavy = [name for name in ("numpy", "rich", "matplotlib", "shadowcore.engine.machine") if name in sys.modules]
assert not heavy, heavy
"""


def examples(name):
    """Lines below Example: or Examples:, without a comment."""
    found = re.search(r"\n  Examples?[^:\n]*:\n((?:    .+\n)+)", run(name, "--help") + "\n")
    return [line.split("#")[0].strip() for line in found[1].splitlines()] if found else []


@pytest.mark.parametrize("name", NAMES)
def test_each_command_has_an_example_that_can_be_typed(name):
    found = examples(name)
    assert found, f"`shadowcore {name} --help` has no example"
    for line in found:
        if line.startswith("eval "):
            line = re.search(r"\$\((.*)\)", line)[1]
        words = shlex.split(line)
        assert words[:2] == ["shadowcore", name]
        command = main.commands[name]
        with click.Context(command, info_name=name) as context:
            command.parse_args(context, words[2:])


def test_help_needs_no_numpy():
    subprocess.run([sys.executable, "-c", QUIET.format(names=["", *NAMES])], check=True)


@pytest.mark.parametrize("words", [(), ("compare",), ("record",)])
def test_a_short_form(words):
    assert run(*words, "-h") == run(*words, "--help")


@pytest.mark.parametrize("name", NAMES)
def test_the_same_option_is_described_the_same(name):
    """Options that several commands have are those of cli.options, but for what the command says of its own."""
    words = {"as_json": "Print JSON instead of text.  [default: text]"}
    for option in main.commands[name].params:
        if option.name in words:
            assert option.help == words[option.name]
