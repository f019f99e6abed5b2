"""The command `completion` of `shadowcore`."""

from __future__ import annotations

import json

import click
from click.shell_completion import get_completion_class

from .options import JSON, Name, command

SHELLS = ("bash", "zsh", "fish")


@command()
@click.argument("shell", metavar="SHELL", type=Name(SHELLS))
@JSON
@click.pass_context
def completion(context: click.Context, shell: str, as_json: bool) -> None:
    """Print what makes SHELL (bash, zsh or fish) complete commands, options, designs and workloads.

    \b
    Example, for bash:
      eval "$(shadowcore completion bash)"
    """
    made = get_completion_class(shell)
    assert made is not None
    script = made(context.find_root().command, {}, "shadowcore", "_SHADOWCORE_COMPLETE").source()
    click.echo(json.dumps({"shell": shell, "script": script}) if as_json else script)


COMMANDS = (completion,)
