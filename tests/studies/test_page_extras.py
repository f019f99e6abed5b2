"""Pages of studies: no colour means two things, headings can be linked to, bars say what they are, tables sort."""

import re
from importlib.resources import files

import pytest

import shadowcore as sc
from shadowcore.html import write

CSS = (files("shadowcore.report") / "data" / "report.css").read_text("utf-8")
GROUPS = {"part": r"part-\d", "design": r"design-\d", "reason": "fill|write|emulate|guest|mmio|cr0|cr3|cr4|efer|invlpg"}


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_a_colour_means_one_thing(scheme):
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", CSS[: CSS.index("@media")]))
    where = {"dark": "prefers-color-scheme: dark", "print": "@media print"}
    if scheme != "light":
        after = CSS[CSS.index(where[scheme]) :]
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", after[: after.index("}")]))
    used = {}
    for group, names in GROUPS.items():
        for name, colour in colours.items():
            if re.fullmatch(names, name):
                used.setdefault(colour, []).append((group, name))
    assert not {colour: names for colour, names in used.items() if len(names) > 1}
    assert len(used) == 10 + 8 + 10


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "a.html"
    write(sc.study("pingpong", ["native", "cached"], operations=3000), path)
    return path


def test_bars_and_headings(page):
    text = page.read_text("utf-8")
    assert re.search(r'<g id="cost-bar-part-0-1"><title>cached, [a-z ]+: [\d,]+</title>', text)
    headings = re.findall(r'<h2 id="([\w-]+)"><a href="#([\w-]+)">', text)
    assert len(headings) == text.count("<h2") > 5
    assert all(key == link for key, link in headings)
    assert len({key for key, _ in headings}) == len(headings)
    assert all(text.count(f'id="{key}"') == 1 for key, _ in headings)
