"""What a shell is told after TAB: settings and their values, files where a file stands."""

import subprocess
import sys

import pytest
from commands import ENVIRONMENT

from shadowcore.config import POLICIES


def completed(*words):
    """What bash is given for the last word."""
    more = {"COMP_WORDS": " ".join(("shadowcore", *words)), "COMP_CWORD": str(len(words))}
    environment = ENVIRONMENT | more | {"_SHADOWCORE_COMPLETE": "bash_complete"}
    called = [sys.executable, "-c", "from shadowcore.cli import main; main(prog_name='shadowcore')"]
    done = subprocess.run(called, env=environment, capture_output=True, text=True, check=False)
    assert not done.stderr
    return [line.partition(",")[::2] for line in done.stdout.splitlines() if line]


def test_settings():
    found = [name for _, name in completed("compare", "--set", "f")]
    assert {"flood_threshold=", "flood_pages=", "fault_around="} <= set(found)
    assert [name for _, name in completed("compare", "pingpong", "--set", "pag")] == ["pages="]
    assert [name for _, name in completed("compare", "--set", "pag")] == []
    assert [name for _, name in completed("compare", "--over", "operat")] == ["operations="]


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("policy=", POLICIES),
        ("flood_pages=", ("true", "false")),
        ("isolation=t", ("true",)),
        ("mode=", ("32", "pae", "64", "la57")),
        ("pool=", ()),
        ("nosuch=", ()),
    ],
)
def test_values(word, values):
    name = word.partition("=")[0]
    assert [found for _, found in completed("compare", "--set", word)] == [f"{name}={value}" for value in values]


def test_the_second_of_a_list():
    assert completed("compare", "--over", "policy=fifo,cl") == [("plain", "policy=fifo,clock")]


def test_a_program_is_a_file():
    assert completed("record", "--", "l") == [("file", "l")]
