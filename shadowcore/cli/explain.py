"""The commands `walk` and `explain` of `shadowcore`: a look at tables, and at one access in full."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from ..config import DESIGNS
from ..guest.options import MODES
from .options import JSON, Address, Command, Count, Name, Output, apart, command
from .outputs import to_file

if TYPE_CHECKING:
    from ..studies.explain import Access

DEFAULT_VA = 0x401000
"""Of the image in the package: code of a program."""

_SHARED = (
    click.argument("words", nargs=-1, metavar="[IMAGE] [VA]"),
    click.option("--cr3", type=Address(), metavar="X", help="Root to walk from.  [default: CR3 of the image]"),
    click.option(
        "--mode",
        type=Name(MODES),
        metavar="NAME",
        help=f"Paging mode, where IMAGE does not tell it: {', '.join(MODES)}.  [default: as IMAGE tells]",
    ),
    click.option(
        "--record",
        type=Count(0),
        metavar="N",
        help="Of a recording: stand before its record number N.  [default: at its end]",
    ),
    click.option("--write", is_flag=True, help="Walk for a write.  [default: for a read]"),
    click.option("--fetch", is_flag=True, help="Walk for an instruction fetch.  [default: for a read]"),
    click.option("--user", is_flag=True, help="Walk for a user-mode access.  [default: supervisor]"),
)


def _shared(function: Command) -> Command:
    for decorate in reversed(_SHARED):
        function = decorate(function)
    return function


def _target(words: tuple[str, ...]) -> tuple[str | None, int]:
    """IMAGE and VA, of which either may be missing: a file that is there is an IMAGE, a number is a VA."""
    if len(words) > 2:
        raise click.UsageError(f"an IMAGE and a VA are needed, not {len(words)} arguments")
    if not words:
        return None, DEFAULT_VA
    if len(words) == 1 and (os.path.exists(words[0]) or not words[0][:1].isdigit()):
        raise click.UsageError("Missing argument 'VA'", click.get_current_context())
    return (words[0] if len(words) == 2 else None), Address().convert(words[-1], None, None)


def _access(write: bool, fetch: bool) -> Access:
    if write and fetch:
        raise click.UsageError("--write and --fetch exclude each other")
    return "w" if write else "x" if fetch else "r"


@command()
@_shared
@JSON
def walk(words: tuple[str, ...], write: bool, fetch: bool, user: bool, as_json: bool, **options: Any) -> None:
    """Walk the guest page tables of IMAGE for the linear address VA and explain each level in words.

    IMAGE is an ELF core (QEMU's dump-guest-memory), a raw memory image (pmemsave) or LiME's, for which --cr3 and --mode
    are needed, a saved VM, a recording, or an .npz dump of page tables (docs/images.md); without it, one that comes
    with the package. Addresses are in bytes, hexadecimal with 0x. EFLAGS.AC is clear and PKRU is 0 unless IMAGE says.

    \b
    Examples:
      shadowcore walk 0x401000
      shadowcore walk guest.elf 0x7f00dead0000 --write --user
    """
    from ..studies import explain, images

    access, (image, gva) = _access(write, fetch), _target(words)
    explanation = explain.explain(images.machine(image, gva=gva, **options), gva, access, user)
    _show(explanation, as_json)


@command()
@_shared
@click.option(
    "--mmu",
    "design",
    type=Name(tuple(DESIGNS)),
    metavar="NAME",
    help=f"The design: {', '.join(DESIGNS)}.  [default: unsync; a saved VM has its own]",
)
@click.option(
    "--html", type=Output(), metavar="FILE", help="Write the two walks as a page to FILE.  [default: no file]"
)
@JSON
def explain(
    words: tuple[str, ...],
    write: bool,
    fetch: bool,
    user: bool,
    design: str | None,
    html: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Explain one access to VA in full: the guest's walk and the shadow's, hit or exit, what the MMU would change.

    IMAGE and VA are those of `shadowcore walk`. The shadow is new, but of a recording, which is replayed up to --record
    N, and of a saved VM, which has its own.

    \b
    Example:
      shadowcore explain guest.screc 0x401000 --record 5000 --mmu cached
    """
    from ..files import replace
    from ..studies import access as accesses
    from ..studies import images

    access, (image, gva) = _access(write, fetch), _target(words)
    apart([("--html", html)], [image])
    vm = images.machine(image, design or _default(image), gva=gva, **options)
    explanation = accesses.explain(vm, gva, access, user)
    if html is not None:
        to_file(html, lambda file: replace(file, explanation.page().encode()))
    _show(explanation, as_json)


def _default(image: str | None) -> str | None:
    from ..studies.images import kind

    return None if image is not None and kind(image) == "vm" else "unsync"


def _show(explanation: Any, as_json: bool) -> None:
    click.echo(json.dumps(explanation.as_dict()) if as_json else "\n".join(explanation.lines()))


COMMANDS = (walk, explain)
