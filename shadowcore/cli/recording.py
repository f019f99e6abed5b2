"""The commands `record`, `import` and `info` of `shadowcore`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ..errors import ConfigError
from ..guest.options import MODES
from ..recording.holdings import told
from ..recording.inputs import INPUTS
from .options import JSON, Address, Name, Output, Source, apart, command
from .outputs import to_file
from .progress import progress as _progress

if TYPE_CHECKING:
    from ..recording.reader import Reader
    from ..recording.writer import Writer

_NAME = click.option("--name", metavar="NAME", help="What reports call the recording.  [default: as the first file]")


@command("import")
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@click.option("-o", "--output", "out", type=Output(), required=True, metavar="OUT", help="The recording to write.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", *INPUTS]),
    default="auto",
    show_default=True,
    help="What the files are; auto looks into the first. " + " ".join(f"{n}: {what}" for n, what in INPUTS.items()),
)
@click.option(
    "--lenient",
    is_flag=True,
    help="Skip and count lines of others in a text, such as what a program printed.  [default: the first is an error]",
)
@click.option("--cr3", type=Address(), metavar="X", help="Of a memory image: the root of the tables.  [default: CR3]")
@click.option(
    "--mode",
    type=Name(MODES),
    metavar="NAME",
    help=f"Of a memory image: {', '.join(MODES)}.  [default: as it tells]",
)
@_NAME
@JSON
def import_(
    files: tuple[str, ...],
    out: str,
    form: str,
    lenient: bool,
    cr3: int | None,
    mode: str | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Convert FILEs of other tools into one recording. Of programs' files, each becomes a process. - is standard input.

    Files may be compressed (.gz, .bz2, .xz, .lzma, .zst). Where one cannot be read to its end, what comes before is
    kept in OUT, marked as incomplete.

    Of a memory image (see `shadowcore walk`) OUT, which ends in .npz, gets the page tables.

    \b
    Example:
      shadowcore import trace.0 trace.1 -o program.screc
    """
    from ..recording import importers
    from ..studies import images

    tables = cr3 is not None or mode is not None
    if out.endswith(".npz") and (tables or images.has_mark(files[0])):
        if len(files) > 1 or lenient or form != "auto" or name is not None:
            raise ConfigError("OUT: of an image, one FILE and --cr3 and --mode are all that there is")
        _image(files[0], out, cr3, mode, as_json)
        return
    if tables:
        raise ConfigError("--cr3, --mode: they are for memory images, which become an .npz; give OUT that ending")
    with _progress(Path(files[0]).name, "B") as progress:
        writer = importers.convert(files, out, form, name=name, lenient=lenient, progress=progress)
    written(writer, as_json)


def _image(file: str, out: str, cr3: int | None, mode: str | None, as_json: bool) -> None:
    from ..studies import images

    apart([("OUT", out)], [file])
    image = images.open_dump(file).image(cr3, mode)
    to_file(out, lambda file: images.save_image(image, file))
    found = {"file": out, "mode": image.mode, "cr3": image.cr3, "frames": len(image.frames)}
    if as_json:
        click.echo(json.dumps(found))
    else:
        click.echo(f"{out}: {len(image.frames):,} frames of page tables, mode {image.mode}, CR3 {image.cr3:#x}")


@command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument(
    "command",
    nargs=-1,
    required=True,
    type=click.UNPROCESSED,
    metavar="-- PROGRAM [ARGUMENT]...",
    shell_complete=lambda _context, _argument, incomplete: [CompletionItem(incomplete, type="file")],
)
@click.option(
    "-o", "--output", "out", type=Output(), metavar="OUT", help="The recording to write.  [default: PROGRAM.screc]"
)
@click.option("--valgrind", default="valgrind", show_default=True, metavar="PATH", help="The Valgrind to run.")
@_NAME
@JSON
def record(command: tuple[str, ...], out: str | None, valgrind: str, name: str | None, as_json: bool) -> None:
    """Run PROGRAM under Valgrind and record each access of its processes, and how they change their memory.

    The program runs some hundred times slower: about a million accesses a second. Ctrl-C ends it; what was recorded
    by then is kept, marked as incomplete.

    \b
    Example:
      shadowcore record -o ls.screc -- ls -l /
    """
    from ..recording import valgrind as tool
    from ..recording.format import SUFFIX

    target = f"{Path(command[0]).name}{SUFFIX}" if out is None else out
    try:
        with _progress(Path(command[0]).name, "B") as progress:
            writer = tool.record(command, target, valgrind=valgrind, name=name, progress=progress)
    except KeyboardInterrupt:
        if Path(target).is_file():
            click.echo(f"{target}: what was recorded until then, marked as incomplete", err=True)
        raise
    written(writer, as_json, err=not as_json)
    if not as_json:
        go_on(writer)


def go_on(writer: Writer) -> None:
    """Say, after a recording, what to do with it."""
    if writer.records:
        click.echo(f"next: shadowcore compare {shlex.quote(str(writer.path))}", err=True)


def written(writer: Writer, as_json: bool, err: bool = False) -> None:
    from ..recording.format import INCOMPLETE

    size = writer.path.stat().st_size if writer.path.is_file() else 0
    found = {
        "file": str(writer.path),
        "stream": writer.stream,
        "records": writer.records,
        "processes": len(writer.processes),
        "bytes": size,
        "complete": writer.complete,
        "skipped": writer.skipped,
    }
    if as_json:
        click.echo(json.dumps(found))
    else:
        each = f" ({size / writer.records:,.1f} for each)" if writer.records else ""
        what = {"guest": "a guest", "program": "a program"}.get(writer.stream, writer.stream)
        click.echo(f"{writer.path}: {writer.records:,} records of {what}, {size:,} bytes{each}", err=err)
        if writer.skipped:
            skipped = ", ".join(f"{what}: {number:,}" for what, number in writer.skipped.items())
            click.echo(f"skipped: {skipped}", err=err)
        if not writer.complete:
            click.echo(f"{INCOMPLETE}.", err=err)


@command()
@click.argument("source", required=False, metavar="[WORKLOAD|RECORDING]", type=Source())
@click.option("--check", is_flag=True, help="Read every block, verify checksums and records, and count.  [default: no]")
@JSON
def info(source: str | None, check: bool, as_json: bool) -> None:
    """Say what RECORDING holds: its stream, records, processes, and where it comes from; of a WORKLOAD, its parameters.

    Without either, of the recording that comes with the package.

    \b
    Example:
      shadowcore info ls.screc --check
    """
    from ..recording.reader import Reader, is_recording
    from ..workload import WORKLOADS

    if source in WORKLOADS:
        if check:
            raise ConfigError(f"--check: it is for recordings, {source} is a workload")
        found = _workload(str(source))
    elif source is not None and is_recording(source):
        with Reader(source) as reader:
            found = _about(reader) | (_counts(reader) if check else {})
    elif source is None:
        from ..recording.guest import bundled

        with bundled() as path, Reader(path) as reader:
            found = _about(reader) | _counts(reader) | {"file": None}
    else:
        from ..recording import replay as trace

        loaded = trace.load(source)
        found = {
            "file": source,
            "format": "npz",
            "stream": "guest",
            "name": loaded.name,
            "records": loaded.operations,
            "complete": loaded.complete,
            "bytes": None if source is None else Path(source).stat().st_size,
            "guest": {key: getattr(loaded, key) for key in ("cr0", "cr4", "efer", "nframes")},
            "counts": loaded.counts,
            "phases": loaded.phases,
            "holds": told(loaded.holdings),
        }
    if as_json:
        click.echo(json.dumps(found))
    else:
        _print(found)


def _workload(name: str) -> dict[str, Any]:
    from ..workload import find

    found = find(name)
    return {
        "name": name,
        "stream": None,
        "summary": found.summary,
        "memory": found.memory,
        "parameters": {key: f"{p.help}; {p.low} to {p.high}, {p.default}" for key, p in found.parameters.items()},
    }


def _about(reader: Reader) -> dict[str, Any]:
    found: dict[str, Any] = {
        "file": str(reader.path),
        "format": reader.header["format"],
        "version": reader.header["version"],
        "stream": reader.stream,
        "name": reader.name,
        "records": reader.records,
        "blocks": reader.block_count,
        "complete": reader.complete,
        "bytes": reader.path.stat().st_size,
        "created_by": reader.header.get("created_by"),
        "source": reader.source,
    }
    for key in ("guest", "machine"):
        if key in reader.header:
            found[key] = reader.header[key]
    if reader.stream == "program":
        found |= {"processes": reader.processes, "files": len(reader.files)}
    return found


def _counts(reader: Reader) -> dict[str, Any]:
    """Records and events by kind; of a guest, after the checks of a replay."""
    import numpy as np

    from .. import config
    from ..recording import format as recordings
    from ..recording import replay as trace

    if reader.stream == recordings.GUEST:
        total: dict[str, int] = {}
        recording = trace.RecordingFile(reader.path)
        for _, piece in recording.pieces():
            for key, number in piece.counts.items():
                total[key] = total.get(key, 0) + number
        return {"counts": total, "phases": recording.phases, "holds": told(recording.holdings)}
    ops = np.zeros(256, dtype=np.int64)
    events = np.zeros(256, dtype=np.int64)
    for block in reader:
        ops += np.bincount(block.columns["op"], minlength=256)
        if block.events is not None:
            events += np.bincount(block.events["kind"], minlength=256)
    if reader.stream == recordings.OPERATIONS:
        if "machine" in reader.header:
            trace.machine(reader, "native")
        names = {int(op): op.name.lower() for op in config.Op}
        return {"counts": {names.get(int(op), str(op)): int(ops[op]) for op in np.flatnonzero(ops)}}
    found = dict(zip(("read", "write", "fetch", "modify"), ops[:4].tolist(), strict=True))
    found |= {event.name.lower(): int(events[event]) for event in recordings.Event if event is not recordings.Event.RUN}
    return {"counts": found}


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(str(found["name"])), title_style="bold", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")

    def show(value: Any) -> str:
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return shlex.join(value)
        return f"{value:,}" if isinstance(value, int) else str(value)

    for key, value in found.items():
        if key == "name" or value is None:
            continue
        if isinstance(value, dict):
            registers = key in ("guest", "machine")
            rows = [f"{name} {value[name]:#x}" if registers else f"{name}: {show(value[name])}" for name in value]
        elif isinstance(value, list):
            rows = [" ".join(str(row.get(name, "")) for name in ("number", "command", "text")).strip() for row in value]
        else:
            rows = [show(value)]
        table.add_row(escape(key.replace("_", " ")), escape("\n".join(rows)))
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=100)).print(table)


COMMANDS = (record, import_, info)
