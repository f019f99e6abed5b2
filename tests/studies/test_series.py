"""Values that settings take one after the other, as they are written, and conditions on them."""

import pytest

import shadowcore as sc
from shadowcore.studies.series import Condition, values


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (7, (7,)),
        (None, (None,)),
        ("none", (None,)),
        ("true,false", (True, False)),
        ([1, 3, "none"], (1, 3, None)),
        ("1,3,none", (1, 3, None)),
        ("1..5", (1, 2, 3, 4, 5)),
        ("5..5", (5,)),
        ("0..100 +25", (0, 25, 50, 75, 100)),
        ("0..99 +25", (0, 25, 50, 75)),
        ("16..4096 x2", (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)),
        ("16 .. 300  *4", (16, 64, 256)),
        ("16..300x4", None),
        ("0x10..0x40 x2", (16, 32, 64)),
        ("16MiB..64MiB x2", ("16MiB", "32MiB", "64MiB")),
        ("4KiB..16384 x2", ("4KiB", "8KiB", "16KiB")),
        ("8,16..64 x2,8", (8, 16, 32, 64)),
        (["1..3", 10], (1, 2, 3, 10)),
        (range(3), (0, 1, 2)),
        ([1, True, 1], (1, True)),
        ("page", ("page",)),
        ("6.12", ("6.12",)),
    ],
)
def test_values(given, expected):
    if expected is None:
        with pytest.raises(sc.ConfigError, match=r"x: '16\.\.300x4'"):
            values(given, "x")
        return
    found = values(given, "x")
    assert found == expected
    assert [type(value) for value in found] == [type(value) for value in expected]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("5..1", r"^pool: '5\.\.1' leads nowhere"),
        ("1..5 +0", "leads nowhere"),
        ("1..5 x1", "leads nowhere"),
        ("0..8 x2", "leads nowhere"),
        ("1..", r"is not FIRST\.\.LAST"),
        ("..5", "is not FIRST"),
        ("1...5", "is not FIRST"),
        ("a..b", "'a' is no whole number and no size"),
        ("1..1000000", "100,000 values are allowed"),
        ("1,,2", "a value is missing"),
        ("", "a value is missing"),
        ([], "at least one value"),
        ([[1]], "numbers, texts and truth values"),
        ([{"a": 1}], "numbers, texts and truth values"),
    ],
)
def test_values_that_are_none(given, message):
    with pytest.raises(sc.ConfigError, match=message):
        values(given, "pool")


LABELS = {"pool": 64, "design": "cached", "memory": "64MiB", "flood_threshold": None, "pcid": True, "fault": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pool >= 64", True),
        ("pool > 64", False),
        ("pool >= 64 and design != 'flush'", True),
        ("pool < 64 or design == 'cached'", True),
        ("not pool < 64", True),
        ("design in ['flush', 'cached']", True),
        ("design not in ('flush', 'cached')", False),
        ("32 < pool <= 64", True),
        ("memory == '65536KiB'", True),
        ("memory > 1000000", True),
        ("flood_threshold == none", True),
        ("flood_threshold > 3", False),
        ("not flood_threshold > 3", True),
        ("pcid == true", True),
        ("pool == fault * 32", True),
        ("pool // 0 == 1", False),
        ("design > 3", False),
        ("-pool == -64", True),
        ("pool", True),
    ],
)
def test_conditions(text, expected):
    assert Condition(text)(LABELS) is expected


@pytest.mark.parametrize(
    "text",
    ["", "pool >=", "__import__('os')", "pool.real", "[x for x in pool]", "pool ** 2 > 3", "lambda: 1", "pool is 1", 3],
)
def test_what_is_no_condition(text):
    with pytest.raises(sc.ConfigError, match=r"^when: "):
        Condition(text)


def test_a_condition_does_not_grow_texts():
    assert Condition("design * 1000000000 == 'x'")(LABELS) is False


def test_a_name_that_there_is_not():
    with pytest.raises(sc.ConfigError, match=r"no setting is called 'pol'; did you mean 'pool'\?"):
        Condition("pol > 3").check(LABELS)
