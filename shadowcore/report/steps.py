"""A run to step through as one HTML file: guest tables, shadow tables, reverse map and TLB side by side, forwards and
back, what changed marked. Nothing is fetched from anywhere.

The first step of each design and every sentence stand in the file as text; a script moves through the states.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from importlib.resources import files

from .._version import __version__
from ..errors import ConfigError
from ..files import replace
from ..studies.steps import Steps

__all__ = ["LARGEST", "page", "write"]

LARGEST = 20_000_000
"""Bytes that a file has at most."""


def page(runs: Sequence[Steps], title: str, about: str, command: str, exercise: bool = False) -> str:
    """The page of `runs`: the same operations under one design each. about: a paragraph. command: that makes it again.

    exercise: begin with the answers hidden. ConfigError where it would have more than LARGEST bytes.
    """
    data = files("shadowcore.report").joinpath("data")
    style, script = (data.joinpath(name).read_text(encoding="utf-8") for name in ("steps.css", "steps.js"))
    plain = {"title": title, "exercise": exercise, "runs": [run.as_dict() for run in runs], "version": __version__}
    # Nothing in a script element may look like its end.
    packed = json.dumps(plain, separators=(",", ":")).replace("<", "\\u003c")
    text = "\n".join(
        (
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{html.escape(title)}: shadowcore show</title>",
            f"<style>{style}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            f"<p>{html.escape(about)}</p>" if about else "",
            '<main id="stage" hidden></main>',
            "<h2>All steps</h2>",
            *(_listing(run, number == 0) for number, run in enumerate(runs)),
            "<h2>To make it again</h2>",
            f'<pre id="command">{html.escape(command)}</pre>',
            _LEGEND,
            f'<script type="application/json" id="steps">{packed}</script>',
            f"<script>{script}</script>",
            "</body></html>",
            "",
        )
    )
    if len(text.encode()) > LARGEST:
        raise ConfigError(f"steps: the page would have more than {LARGEST:,} bytes; show fewer steps")
    return text


def write(path: str | os.PathLike[str], text: str) -> None:
    """Write a page; ConfigError where that cannot be, and nothing is left behind then."""
    try:
        replace(path, text.encode())
    except OSError as error:
        raise ConfigError(f"{os.fspath(path)}: it cannot be written: {error.strerror or error}") from None


_LEGEND = """<h2>How to read it</h2>
<ul class="legend">
<li><b>Guest tables</b>: entries that the guest wrote, by gfn of their table. W writable, U user, A accessed, D dirty,
G global, NX not executable.</li>
<li><b>Shadow tables</b>: what the processor walks. A shadow page stands for a guest table (or, direct, for none); its
entries are real entries of the host, their rights no wider than the guest's.</li>
<li><b>Reverse map</b>: for a gfn, the entries that map it, page.entry; with the designs of 2007 the writable ones.</li>
<li>A mark at the edge: changed by this step; the value before is under the pointer. An arrow: the guest's walk of this
step went through it. Entries that no step meets are folded away; click on the name of a table to see them.</li>
</ul>"""


def _listing(run: Steps, opened: bool) -> str:
    items = []
    for step in run.steps:
        why = f" <span>{html.escape(step.note)}</span>" if step.note else ""
        said = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in step.happened)
        items.append(f"<li><b>{html.escape(step.title)}</b>{why}<ul>{said}</ul></li>")
    exits = sum(len(step.exits) for step in run.steps)
    summary = f"{html.escape(run.design)}: {len(run.steps):,} steps, {exits:,} VM exits"
    return (
        f'<details class="listing"{" open" * opened}><summary>{summary}</summary>'
        f"<ol start={run.first}>{''.join(items)}</ol></details>"
    )
