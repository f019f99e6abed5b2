"""Writes docs/commands.md from the command line itself: python docs/make_commands.py"""

from __future__ import annotations

import os
from pathlib import Path

import click

os.environ["COLUMNS"] = "100"

HEAD = """# All commands

What `--help` prints, made by `docs/make_commands.py`. Results go to standard output, errors and progress to standard
error. Exit status: 0 done, 1 an audit found violations, 2 an error (one line says which), 130 interrupted.
"""


def text() -> str:
    """The page."""
    from shadowcore.cli import main

    parts = [HEAD]
    for name in sorted(main.commands):
        command = main.commands[name]
        with click.Context(
            command, info_name=f"shadowcore {name}", max_content_width=100, terminal_width=100
        ) as context:
            help_ = command.get_help(context)
        parts.append(f"## {name}\n\n```text\n{help_.rstrip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("commands.md").write_text(text(), encoding="utf-8")
