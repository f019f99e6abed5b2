"""The command `shadowcore`. Results on standard output; errors and progress on standard error.

Exit status: 0 done, 1 an audit found violations, points of a sweep failed or a diff is too much, 2 an error (one line
says which), 130 interrupted.
"""

from __future__ import annotations

import difflib
import errno
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn

import click

from .._version import __version__
from ..errors import GuestOutOfMemory, ShadowcoreError
from . import about as cli_about
from . import check as cli_check
from . import costs as cli_costs
from . import designs as cli_designs
from . import diff as cli_diff
from . import evolution as cli_evolution
from . import explain as cli_explain
from . import guests as cli_guests
from . import pool as cli_pool
from . import recording as cli_recording
from . import replay as cli_replay
from . import reproduce as cli_reproduce
from . import show as cli_show
from . import study as cli_study
from . import sweep as cli_sweep
from . import workload as cli_workload


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
            _fail(_said(error) + hint, 2)
        except GuestOutOfMemory as error:
            _fail(f"{error}; --set memory=SIZE gives it more", 2)
        except (ShadowcoreError, MemoryError) as error:
            _fail(str(error) or type(error).__name__, 2)
        except OSError as error:
            _fail(_cause(error), 2)
        _finish(status if isinstance(status, int) else 0)


def _said(error: click.ClickException) -> str:
    """Its message; of an option that there is not, with the nearest."""
    if not isinstance(error, click.NoSuchOption):
        return error.format_message().rstrip(".")
    near = difflib.get_close_matches(error.option_name, error.possibilities or (), 1)
    return f"No such option: {error.option_name}" + (f"; did you mean {near[0]}?" if near else "")


def _cause(error: OSError) -> str:
    return f"{error.filename or 'standard output'}: {error.strerror or error}"


def _fail(message: str, status: int) -> NoReturn:
    with suppress(OSError):
        click.echo(f"shadowcore: {' '.join(message.split())}", err=True)
    _finish(status, told=True)


def _finish(status: int, told: bool = False) -> NoReturn:
    """End the process. What standard output still holds back is written here, where a failure can be told, in one line.

    told: a line has been printed. A pipe that nobody reads any more is the reader's wish, and no error.
    """
    try:
        if sys.stdout is not None:  # closed by the caller
            sys.stdout.flush()
    except OSError as error:
        with open(os.devnull, "w") as nowhere:  # or the interpreter tries once more at its end, and complains
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if error.errno == errno.EPIPE:
            status = status or 1
        elif not told:
            _fail(_cause(error), 2)
    sys.exit(status)


@click.group(
    cls=Commands,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="shadowcore", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """What x86 memory virtualization costs: a shadow paging engine, run on workloads and recordings of guests."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


for _module in (
    cli_study,
    cli_sweep,
    cli_diff,
    cli_workload,
    cli_recording,
    cli_explain,
    cli_guests,
    cli_replay,
    cli_check,
    cli_reproduce,
    cli_show,
    cli_costs,
    cli_designs,
    cli_evolution,
    cli_pool,
    cli_about,
):
    for _command in _module.COMMANDS:
        main.add_command(_command)
