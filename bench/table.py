"""The table of goals, measured: `python -m bench.table`, in the root of the repository. See README.md."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

BENCH = Path(__file__).parent
WIDTH = 150
"""Columns where the output is no terminal."""


def measure(quick: bool, slow: bool, select: str | None) -> list[dict[str, Any]]:
    """Run the benchmarks; what each of them stored."""
    with tempfile.TemporaryDirectory(prefix="shadowcore-bench-") as directory:
        output = Path(directory) / "results.json"
        command = [
            sys.executable,
            "-P",
            "-m",
            "pytest",
            str(BENCH),
            "-q",
            "-rfEs",
            f"--benchmark-json={output}",
        ]
        command += ["--benchmark-columns=median", "--benchmark-quiet"]
        command += ["--benchmark-min-rounds=1", "--benchmark-max-time=0.05"] if quick else []
        command += ["-m", "slow or not slow"] if slow else []
        command += ["-k", select] if select else []
        done = subprocess.run(command, cwd=BENCH.parent, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode or "skipped" in done.stdout.rpartition("\n\n")[2]:
            click.echo(done.stdout, err=True)
        if not output.exists() or output.stat().st_size == 0:
            raise click.ClickException("no benchmark ran")
        return read(output)


def read(path: Path) -> list[dict[str, Any]]:
    """The `extra_info` of every benchmark in a file that pytest-benchmark wrote."""
    found = json.loads(path.read_text("utf-8"))["benchmarks"]
    return [benchmark["extra_info"] for benchmark in found if "row" in benchmark["extra_info"]]


def number(value: float | None) -> str:
    """Two decimals where they say something, three below a tenth."""
    if value is None:
        return ""
    if 0 < abs(value) < 0.1:
        return f"{value:.3f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def verdict(ratio: float | None, goal: float | None) -> str:
    if ratio is None or goal is None:
        return ""
    return "[green]yes[/]" if ratio <= goal else "[red]no[/]"


def ours(result: dict[str, Any]) -> str:
    """What was measured, with its unit unless that is nanoseconds."""
    return number(result["ours_ns"]) if "unit" not in result else f"{number(result['ours'])} {result['unit']}"


def order(result: dict[str, Any]) -> tuple[bool, int, str]:
    """Numbered rows first."""
    row = result["row"]
    return (False, row, "") if isinstance(row, int) else (True, 0, row)


def table(results: list[dict[str, Any]]) -> Table:
    shown = Table(title="Times of one operation, side by side")
    shown.add_column("row", justify="right")
    shown.add_column("what")
    shown.add_column("against")
    for name in ("ours ns", "yardstick ns", "ratio", "goal", "met", "exit alone"):
        shown.add_column(name, justify="right")
    before = None
    for result in sorted(results, key=order):
        if before not in (None, result["row"]):
            shown.add_section()
        before = result["row"]
        goal, ratio = result["goal"], result.get("ratio")
        shown.add_row(
            str(result["row"]),
            result["what"],
            result["yardstick"],
            ours(result),
            number(result.get("yardstick_ns")),
            number(ratio),
            number(goal),
            verdict(ratio, goal),
            number(result.get("exit_ratio")),
        )
    return shown


@click.command()
@click.argument("results", type=click.Path(exists=True, dir_okay=False, path_type=Path), required=False)
@click.option("--quick", is_flag=True, help="Take each side once: shows that all works, not how fast it is.")
@click.option("--slow", is_flag=True, help="Large guests as well.")
@click.option("-k", "select", metavar="EXPRESSION", help="Only the benchmarks that pytest -k selects.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(results: Path | None, quick: bool, slow: bool, select: str | None, as_json: bool) -> None:
    """Run the benchmarks, or read RESULTS of a run with --benchmark-json, and print the table of goals."""
    found = read(results) if results else measure(quick, slow, select)
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    console.print(table(found))
    judged = [result for result in found if result["goal"] is not None and "ratio" in result]
    met = sum(result["ratio"] <= result["goal"] for result in judged)
    console.print(f"{met} of {len(judged)} goals met", highlight=False)


if __name__ == "__main__":
    main()
