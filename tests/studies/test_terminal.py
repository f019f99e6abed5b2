"""Tables on terminals of several widths: no number is cut, no row that says nothing is there."""

import io
import re
from types import SimpleNamespace

import pytest
from commands import run
from rich.table import Table
from rich.text import Text

import shadowcore as sc
from shadowcore.engine.counters import PF_REASONS
from shadowcore.report import exits, terminal
from shadowcore.report.fit import Fitting, console
from shadowcore.report.terminal import comparison, points, sweep
from shadowcore.studies.reproduction import Figure

WIDTHS = (60, 80, 100, 200)


@pytest.fixture(scope="module")
def study():
    return sc.study("fork-storm", operations=20_000, windows=0)


@pytest.fixture(scope="module")
def swept():
    over = {"flood_threshold": (1, 3, None), "pool": (16, 256)}
    return sc.compare("fork-storm", ["cached", "unsync"], operations=3_000, over=over)


def shown(table, width, terminal=True, **options):
    file = io.StringIO()
    Fitting(file=file, width=width, force_terminal=terminal, color_system=None, highlight=False).print(table, **options)
    return file.getvalue()


def numbers(table):
    cells = [cell for column in table.columns for cell in column.cells]
    return {number for cell in cells for number in re.findall(r"\d[\d,.]*\d|\d", Text.from_markup(str(cell)).plain)}


def whole(table, output):
    """Each number of the table is in the output."""
    printed = set(re.findall(r"\d[\d,.]*\d|\d", output))
    assert numbers(table)
    assert numbers(table) <= printed
    assert "…" not in output


@pytest.mark.parametrize("width", WIDTHS)
def test_no_number_is_cut(study, swept, width):
    for table, labels in ((comparison(study, every=True), 1), (exits.exits(study), 1), (sweep(swept), 3)):
        output = shown(table, width, labels=labels)
        whole(table, output)
        assert max(map(len, output.splitlines())) <= width


@pytest.mark.parametrize("width", WIDTHS)
def test_any_table(width):
    """Many wide columns, long words, and labels that are numbers."""
    table = Table(title="[bold]a title[/]", caption="and what is below it")
    table.add_column("")
    for number in range(14):
        table.add_column(f"column {number}", justify="right")
    for row in range(3):
        table.add_row("some words that wrap " * 3, *(f"{10 ** (column % 10):,}{row}" for column in range(14)))
    output = shown(table, width)
    whole(table, output)
    assert max(map(len, output.splitlines())) <= width
    assert output.startswith("a title\n")
    assert output.endswith("and what is below it\n")


def test_each_part_has_all_labels(monkeypatch):
    """Of the figures of 2007: test and column, wherever a row is."""
    figures = [
        Figure("hackbench 5, s", "no caching", 9.4, 10.0, 10.7, False, 9.45),
        Figure("hackbench 5, s", "caching", 2.8, 1.3, 2.0, False, 1.05),
    ]
    found = SimpleNamespace(costs=sc.Costs.modern(), figures=figures, pools={"hackbench 5, s": {2048: (2.0, 0.0)}})
    file = io.StringIO()
    made = Fitting(file=file, width=60, force_terminal=True, color_system=None)
    monkeypatch.setattr(terminal, "_console", lambda: made)
    terminal.print_reproduction(found)
    rows = [line for line in file.getvalue().splitlines() if line.startswith("hackbench 5, s") and "caching" in line]
    assert len(rows) == 4  # two rows in each of two parts
    for number in ("9.4", "10.00", "9.45", "1.30"):
        assert number in file.getvalue()


def test_what_is_wider_than_the_terminal_is_printed_as_wide_as_it_is():
    table = Table()
    table.add_column("")
    table.add_column("n", justify="right")
    table.add_row("label", "1" * 90)
    assert "1" * 90 in shown(table, 60)


def test_a_pipe_gets_a_line_a_row(swept):
    table = sweep(swept)
    lines = shown(table, 100, terminal=False, labels=3).splitlines()
    rows = [line for line in lines if line.startswith(("cached", "unsync"))]
    assert len(rows) == table.row_count
    assert len({len(line) for line in rows}) == 1


def test_every_table_goes_through_it(monkeypatch):
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert isinstance(console(), Fitting)
    assert terminal._console is console


def test_rows_of_nothing_are_left_out():
    short = ("compare", "pingpong", "--operations", 2_000)
    output, everything = run(*short), run(*short, "--all")
    for row in ("device access", "recycled for room", "INVLPG", "emulated stores"):
        assert row not in output
        assert row in everything
    assert "VM exits, all" in output
    assert "emulated" not in run(*short, "--over", "pages=8,16")
    assert "emulated" in run(*short, "--over", "pages=8,16", "--all")
    assert "exits_invlpg" not in run("run", *short[1:])
    assert "exits_invlpg" in run("run", *short[1:], "--all")


def test_a_swept_parameter_is_not_called_as_a_figure():
    output = run("compare", "pingpong", "--operations", 2_000, "--over", "pages=8,16")
    head = next(line for line in output.splitlines() if "design" in line and "pages" in line)
    assert head.split().count("pages") == 2  # the parameter, and "shadow pages"
    assert "shadow" in output


# -- exits by reason ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prices", ["modern", "pvm", "nested", "core2007", "pvm-2026-13900hk"])
@pytest.mark.parametrize("design", ["flush", "cached", "unsync", "nested"])
def test_cycles_by_reason_are_those_of_the_components(prices, design):
    costs = sc.Costs.preset(prices)
    made = sc.study("fork-storm", ["native", design], operations=10_000, windows=0, costs=costs).designs[design]
    cycles = made.cost.exits
    parts = ("switches", "outer", "dispatch", "faults", "backing", "emulation", "registers", "pages")
    assert sum(cycles.values()) == pytest.approx(sum(made.cost.components[part] for part in parts))
    assert all(value >= -1e-6 for value in cycles.values())
    assert set(cycles) == {*PF_REASONS, "cr3", "cr0", "cr4", "efer", "invlpg", "rest"}
    assert all((cycles[reason] > 0) == (made.exits[reason] > 0) for reason in made.exits)


def test_the_form_of_perf_kvm_stat(study):
    output = shown(exits.exits(study), 100)
    assert re.search(r"exits +share +each +Mcycles +share", output)
    for design in ("flush", "cached", "unsync"):
        made = study.designs[design]
        begin = output.index(f"\n{design} ")
        assert output[begin:].split()[1] == f"{made.exits_total:,}"
    assert "native" not in output  # it has no exits
    cycles = study.designs["cached"].cost.exits
    share = cycles["emulate"] / sum(cycles.values())
    cached = output[output.index("\ncached ") : output.index("\nunsync ")]
    line = next(line for line in cached.splitlines() if "store to a guest table" in line)
    assert line.split()[-1] == f"{share:.1%}"
    order = [float(line.split()[-1].rstrip("%")) for line in cached.strip().splitlines()[1:] if "%" in line]
    assert order[:-1] == sorted(order[:-1], reverse=True)  # by cycles; the last is what no reason has
    assert exits.exits(sc.study("pingpong", ["native"], operations=500, windows=0)) is None


def test_where_exits_are_printed():
    short = ("pingpong", "--operations", 2_000)
    assert "exits by reason" not in run("compare", *short)
    assert "exits by reason" in run("compare", *short, "--exits")
    assert "exits by reason" in run("run", *short)
    output = run("compare", *short, "--exits", "--over", "pages=8,16")
    assert output.count("exits by reason") == 2
    assert "pages=16: VM exits by reason" in output


# -- points of a sweep -------------------------------------------------------------------------------------------------


def test_points_on_a_narrow_terminal():
    made = sc.sweep({"sources": ["pingpong"], "operations": 500, "designs": ["cached"], "settings": {"pool": [16, 32]}})
    table = points(made)
    output = shown(table, 60, labels=len(dict.fromkeys(("design", *made.axes))))
    whole(table, output)
