"""docs/performance.md from what is measured: `python -m bench.report`, in the root of the repository. See README.md.

Measures the table of goals, the curves and the instructions, keeps the figures as JSON in docs/performance/, draws the
pictures, and writes the tables of the page between its markers. --page writes the page from the figures that are there.
"""

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).parent))

import table as goals

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "performance.md"
FIGURES = ROOT / "docs" / "performance"


def machine() -> dict[str, str]:
    """What the times were taken on."""
    model = platform.processor()
    cpus = Path("/proc/cpuinfo")
    if cpus.exists():
        found = re.search(r"^model name\s*:\s*(.*)$", cpus.read_text("utf-8"), re.M)
        model = found[1] if found else model
    import numpy

    return {"processor": model, "Python": platform.python_version(), "numpy": numpy.__version__}


def kept(name: str) -> Any:
    return json.loads((FIGURES / f"{name}.json").read_text("utf-8"))


def keep(name: str, value: Any) -> None:
    FIGURES.mkdir(exist_ok=True)
    (FIGURES / f"{name}.json").write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def cells(*values: str) -> str:
    return "| " + " | ".join(values) + " |"


def with_unit(result: dict[str, Any]) -> str:
    return goals.ours(result) if "unit" in result else f"{goals.number(result['ours_ns'])} ns"


def met(result: dict[str, Any]) -> str:
    if result["goal"] is None or "ratio" not in result:
        return ""
    return "yes" if result["ratio"] <= result["goal"] else "**no**"


def rows(results: list[dict[str, Any]]) -> list[str]:
    """The lines of a table of results."""
    lines = [cells("row", "what", "ours", "against", "", "ratio", "goal", "met"), "|--:|---|--:|---|--:|--:|--:|---|"]
    for result in sorted(results, key=goals.order):
        theirs = f"{goals.number(result['yardstick_ns'])} ns" if "yardstick_ns" in result else ""
        ratio, goal = goals.number(result.get("ratio")), goals.number(result["goal"])
        shown = (str(result["row"]), result["what"], with_unit(result), result["yardstick"], theirs, ratio, goal)
        lines.append(cells(*shown, met(result)))
    return lines


def is_rival(result: dict[str, Any]) -> bool:
    return result["row"] == 11


def table_section() -> list[str]:
    found = kept("table")
    on = ", ".join(f"{name} {value}" for name, value in found["machine"].items() if name != "processor")
    judged = [result for result in found["results"] if met(result)]
    reached = sum(met(result) == "yes" for result in judged)
    lines = [f"{found['machine']['processor']}; {on}. {reached} of {len(judged)} goals met.", ""]
    return lines + rows([result for result in found["results"] if not is_rival(result)])


def rivals_section() -> list[str]:
    return rows([result for result in kept("table")["results"] if is_rival(result)])


def growth_section() -> list[str]:
    found = kept("growth")
    lines = [cells("curve", "operation", "from", "instructions", "to", "instructions"), "|---|---|--:|--:|--:|--:|"]
    for curve, operations in found["instructions"].items():
        small, large = found["points"][curve]
        for name, (before, after) in operations.items():
            lines.append(cells(curve, name, f"{small:,}", f"{before:,.0f}", f"{large:,}", f"{after:,.0f}"))
    return lines


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "table of goals": table_section,
    "table of rivals": rivals_section,
    "table of growth": growth_section,
}


def written(text: str) -> str:
    """The page with each section put between its markers; ValueError unless it has both of each, once."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- {name}: written by python -m bench.report -->", f"<!-- end of {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"{PAGE.name}: the markers of the {name} are not there, or not once")
        head, _, rest = text.partition(begin)
        text = "\n".join([head + begin, "", *section(), "", end + rest.partition(end)[2]])
    return text


def measure(slow: bool) -> None:
    """All of it, the longest last."""
    subprocess.run([sys.executable, "-m", "bench.growth"], cwd=ROOT, check=True)
    keep("table", {"machine": machine(), "results": [plain(result) for result in goals.measure(False, slow, None)]})
    subprocess.run([sys.executable, "-m", "bench.curves"], cwd=ROOT, check=True)


def plain(result: dict[str, Any]) -> dict[str, Any]:
    """A result with no more digits than it has."""
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in result.items()}


@click.command()
@click.option("--page", "page_only", is_flag=True, help="Measure nothing: write the page from the figures kept.")
@click.option("--table", "table_only", is_flag=True, help="Measure the table of goals only.")
@click.option("--check", is_flag=True, help="Write nothing; exit status 1 if the page is not that of the figures.")
@click.option("--slow/--no-slow", default=True, help="Guests of 8 and 16 GiB as well (default).")
def main(page_only: bool, table_only: bool, check: bool, slow: bool) -> None:
    """Measure, and write docs/performance.md."""
    text = PAGE.read_text("utf-8")
    if check:
        if written(text) != text:
            raise click.ClickException(f"{PAGE.name} is not up to date: run python -m bench.report --page")
        return
    if table_only:
        keep("table", {"machine": machine(), "results": [plain(result) for result in goals.measure(False, slow, None)]})
    elif not page_only:
        measure(slow)
    PAGE.write_text(written(text), "utf-8")


if __name__ == "__main__":
    main()
