"""docs/series.md says of every patch and quirk where it is and what shows it: that all of this is there."""

import re
from pathlib import Path

import exits_table
import pytest
from places import ROOT

import shadowcore
from shadowcore import Quirk

PAGE = (ROOT / "docs" / "series.md").read_text(encoding="utf-8")
FILES = [f"test_series_{part}.py" for part in ("structure", "stores", "floods", "pool")]
NO_BEHAVIOUR = {8, 19, 21}


def section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title):
    """Cells of each row of the table of a section, without its two head lines."""
    lines = [line for line in section(title).splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names_in(*files):
    names = set()
    for file in files:
        (path,) = (ROOT / "tests").glob(f"*/{file}")
        text = path.read_text(encoding="utf-8")
        names |= set(re.findall(r"^def (test_\w+)\(", text, re.MULTILINE))
    return names


def named(text):
    return re.findall(r"`(test_\w+)`", text)


def test_there_is_a_row_for_every_patch():
    assert [int(row[0]) for row in rows("The 33 patches")] == list(range(1, 34))


@pytest.mark.parametrize("row", rows("The 33 patches"), ids=lambda row: row[0])
def test_row(row):
    """A patch has a test, or is one that changed no behaviour and says so; its functions are in their files."""
    number, title, change, where, shown = row
    assert title
    assert change
    assert (int(number) in NO_BEHAVIOUR) == ("no behaviour" in change) == (not named(shown))
    assert set(named(shown)) <= names_in(*FILES)
    places = re.findall(r"`([\w/]+\.\w+)`: ((?:`\w+`(?:, )?)+)", where)
    assert places or int(number) in NO_BEHAVIOUR
    for file, functions in places:
        # Headers are those of the package under test, which may be an installed one.
        home = Path(shadowcore.__file__).parent.parent if file.startswith("shadowcore/") else ROOT
        text = (home / file).read_text(encoding="utf-8")
        for function in re.findall(r"`(\w+)`", functions):
            assert re.search(rf"^(?:cdef|cpdef|def|class)\b.*\b{function}\b", text, re.MULTILINE), (file, function)


def test_every_test_of_a_patch_is_in_the_table():
    assert {name for row in rows("The 33 patches") for name in named(row[4])} == names_in(*FILES)


def test_there_is_a_row_for_every_quirk():
    found = rows("The quirks")
    assert [row[0] for row in found] == [f"`{quirk.name}`" for quirk in Quirk]
    existing = names_in("test_series_quirks.py")
    for quirk, _, shown in found:
        shows = named(shown)
        assert shows
        assert set(shows) <= existing
        assert all(name.startswith(f"test_{quirk.strip('`').lower()}_") for name in shows)


def test_other_tests_that_the_page_names_exist():
    elsewhere = names_in(*(path.name for path in (ROOT / "tests").glob("*/test_*.py")))
    assert set(named(PAGE)) <= elsewhere


def test_the_table_of_exits_is_up_to_date():
    """Else: python -m bench.exits_table."""
    assert exits_table.written(PAGE, exits_table.table(exits_table.rows())) == PAGE


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="markers"):
        exits_table.written(PAGE.replace(exits_table.END, ""), [])
    with pytest.raises(ValueError, match="markers"):
        exits_table.written(PAGE + exits_table.BEGIN, [])
