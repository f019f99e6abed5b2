"""The page of a study, read: its tables, tags and texts, and its tables against its embedded JSON."""

import json
from html.parser import HTMLParser

import pytest

from shadowcore.report import page


class Parsed(HTMLParser):
    """Tables by id, as lists of rows of text; all tags with their attributes; text of scripts and of `pre`, by id."""

    VOID = ("meta", "br", "line")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tables, self.tags, self.texts, self.open = {}, [], {}, []
        self._table = self._cell = self._text = None
        self.feed(text)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = self.tables.setdefault(attributes["id"], [])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag in ("script", "pre"):
            self._text = self.texts.setdefault(attributes.get("id", tag), [])

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag in ("td", "th"):
            self._table[-1].append("".join(self._cell))
            self._cell = None
        elif tag in ("script", "pre"):
            self._text = None

    def handle_data(self, data):
        for place in (self._cell, self._text):
            if place is not None:
                place.append(data)


def by_row(table):
    """{label: [values of the designs]} of a table of numbers."""
    made = {}
    for label, *cells in table[1:]:
        assert label not in made
        made[label] = [float(cell.replace(",", "")) if cell else None for cell in cells]
    return made


def check_against_json(tables, plain):
    """Every table of the page against the embedded study: values, to the digits shown, and nothing is missing."""
    designs = plain["designs"]
    summary = by_row(tables["summary"])
    assert tables["summary"][0] == ["", *designs]
    keys = {label: key for key, label, _ in page._COUNTERS}
    counters = 0
    for label, values in summary.items():
        if label in keys:
            counters += 1
            assert values == [result["counters"][keys[label]] for result in designs.values()], label
    left_out = [key for key, label, _ in page._COUNTERS if label not in summary]
    assert not any(result["counters"][key] for key in left_out for result in designs.values())
    assert counters >= 10
    assert summary["cycles, estimated"] == pytest.approx(
        [result["cost"]["total"] for result in designs.values()], abs=0.5
    )
    assert summary["slow-down against native, estimated"] == pytest.approx(
        [result["cost"]["slow_down"] for result in designs.values()], abs=5e-4
    )
    assert summary["shadow pages in use, most"] == [result["pages_max"] for result in designs.values()]
    cost = by_row(tables["cost"])
    parts = {part for result in designs.values() for part, cycles in result["cost"]["cycles"].items() if cycles}
    assert {part.replace("_", " ") for part in parts} == set(cost) - {"cycles, estimated", "", "cycles, all"}
    for part in parts:
        assert cost[part.replace("_", " ")] == pytest.approx(
            [result["cost"]["cycles"][part] for result in designs.values()], abs=0.5
        )
    assert cost["cycles, all"] == pytest.approx(
        [sum(result["cost"]["cycles"].values()) for result in designs.values()], abs=0.5
    )
    for place, result in enumerate(designs.values()):
        windows = result["windows"]
        if f"windows-{place}" not in tables:
            assert not any(windows["exits_total"])
            continue
        head, *rows = tables[f"windows-{place}"]
        reasons = {label: reason for reason, label in page.EXITS.items()}
        assert [row[0].replace(",", "") for row in rows] == [str(end) for end in windows["operation"]]
        for column, label in enumerate(head[1:], 1):
            shown = [int(row[column].replace(",", "")) for row in rows]
            assert shown == windows[f"exits_{reasons[label]}"]
        assert [sum(int(cell.replace(",", "")) for cell in row[1:]) for row in rows] == windows["exits_total"]
    processes = by_row(tables["processes"])
    heated = plain["processes"]
    for place, name in enumerate(heated["names"]):
        matrices = [heated["counts"], *heated["exits"].values()]
        assert processes[name] == [sum(matrix[place]) for matrix in matrices]
    regions = by_row(tables["frames"])
    frames = plain["frames"]
    busy = {name: [sum(row)] for name, row in zip(frames["names"], frames["counts"], strict=True) if any(row)}
    assert regions == busy


def embedded(parsed):
    return json.loads("".join(parsed.texts["study"]))
