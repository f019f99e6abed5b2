"""Page-fault exits of every recorded stream, by engine and design: `python -m bench.exits_table`.

Runs the streams of tests/data under `flush`, `cached` and `cached` with flood_reset, puts their exits beside those
recorded of the real code, and writes the table into docs/series.md between its markers. Run it in the root of the
repository after a change of what exits are taken; --check only says whether the page is up to date.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

import shadowcore as sc

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "series.md"
STREAMS = ROOT / "tests" / "data" / "kvm-2007"
BEGIN = "<!-- exits table: written by python -m bench.exits_table -->"
END = "<!-- end of exits table -->"

RECORDED = ("before", "after", "rel21")
DESIGNS = {
    "flush": sc.Shadow.flush(),
    "cached": sc.Shadow.cached(),
    "cached, flood_reset": sc.Shadow.cached(flood_reset=True),
}

Row = tuple[str, int, dict[str, int], dict[str, int]]
"""Name, operations, exits by engine or design, operation at which an engine stopped."""


def exits(stream: dict[str, Any], design: sc.Shadow) -> int:
    """Page-fault exits that a design takes on a stream, whose loads of CR0 and CR3 are refused as they were then."""
    strict = dataclasses.replace(design, quirks=design.quirks | sc.Quirk.IGNORED_BITS_REFUSED)
    vm = sc.VM(memory=int(stream["nframes"]) * 4096, mmu=strict)
    vm.memory.bytes.reshape(-1, 4096)[stream["mem_gfn"]] = stream["mem_page"]
    return int(vm.vcpus[0].run(stream["ops"]).exits.sum())


def row(path: Path) -> Row:
    with np.load(path) as file:
        stream = {key: file[key] for key in file.files if not key.endswith(("_sptes", "_mem"))}
    taken = {engine: int(stream[f"{engine}_res"]["exits"].sum()) for engine in RECORDED}
    taken |= {name: exits(stream, design) for name, design in DESIGNS.items()}
    stops = {engine: int(stream[f"{engine}_stop"][1]) for engine in RECORDED if stream[f"{engine}_stop"][0]}
    return path.stem, len(stream["ops"]), taken, stops


def rows() -> list[Row]:
    """One for each stream, by name."""
    return [row(path) for path in sorted(STREAMS.glob("*.npz"))]


def table(found: list[Row]) -> list[str]:
    """The lines of the table, in Markdown."""
    columns = [*RECORDED, *DESIGNS]
    lines = [
        "| stream | operations | " + " | ".join(columns) + " |",
        "|---|--:|" + "--:|" * len(columns),
    ]
    for name, operations, taken, stops in found:
        cells = [f"{taken[key]}, stopped at {stops[key]}" if key in stops else str(taken[key]) for key in columns]
        lines.append(f"| {name} | {operations} | " + " | ".join(cells) + " |")
    whole = [(operations, taken) for _, operations, taken, stops in found if not stops]
    sums = [str(sum(taken[key] for _, taken in whole)) for key in columns]
    operations = sum(operations for operations, _ in whole)
    lines.append(f"| **the {len(whole)} where nothing stopped** | {operations} | " + " | ".join(sums) + " |")
    return lines


def written(text: str, lines: list[str]) -> str:
    """`text` with the lines between the markers; ValueError unless it has both, once."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end or BEGIN in tail or END in tail:
        raise ValueError(f"{PAGE}: the markers of the table are not there, or not once")
    return "\n".join([head + BEGIN, *lines, END + tail])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.exits_table", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if the page differs")
    check = parser.parse_args().check
    text = PAGE.read_text(encoding="utf-8")
    lines = table(rows())
    new = written(text, lines)
    print("\n".join(lines))
    if check:
        sys.exit(0 if new == text else f"{PAGE} is not up to date: run python -m bench.exits_table")
    PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
