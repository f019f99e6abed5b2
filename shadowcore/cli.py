"""The command `shadowcore`. Results on standard output; errors and progress on standard error.

Exit status: 0 done, 1 an audit found violations, 2 an error (one line says which), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from . import cli_about, cli_programs, cli_recording, cli_replay, cli_reproduce, cli_study, cli_workload
from ._version import __version__
from .errors import ShadowcoreError


class Commands(click.Group):
    """A group whose errors are one line each."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _fail("interrupted", 130)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            status = super().main(*args, **{**kwargs, "standalone_mode": False})
            sys.stdout.flush()
        except click.Abort:
            _fail("interrupted", 130)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            hint = f" (see {context.command_path} --help)" if context else ""
            _fail(error.format_message().rstrip(".") + hint, 2)
        except (ShadowcoreError, MemoryError) as error:
            _fail(str(error) or type(error).__name__, 2)
        except OSError as error:
            # Files have errors of their own: this is standard output, which is not tried again when Python ends.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            if isinstance(error, BrokenPipeError):
                sys.exit(1)  # who read it has seen enough
            _fail(f"{error.filename or 'standard output'}: it cannot be written: {error.strerror or error}", 2)
        sys.exit(status if isinstance(status, int) else 0)


def _fail(message: str, status: int) -> None:
    click.echo(f"shadowcore: {' '.join(message.split())}", err=True)
    sys.exit(status)


@click.group(cls=Commands, no_args_is_help=False, invoke_without_command=True)
@click.version_option(__version__, prog_name="shadowcore", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """What x86 memory virtualization costs: a shadow paging engine, run on workloads and recordings of guests."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _module in (cli_study, cli_workload, cli_programs, cli_recording, cli_replay, cli_reproduce, cli_about):
    for _command in _module.COMMANDS:
        main.add_command(_command)
