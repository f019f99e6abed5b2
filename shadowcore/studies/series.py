"""Values that a setting takes one after the other, as they are written: lists, ranges, and which combinations count."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..config import parse_size
from ..errors import ConfigError
from .settings import near, parse

LONGEST = 100_000
"""Values that a series has at most."""
_RANGE = re.compile(
    r"\s*(?P<first>[^\s.][^.]*?)\s*\.\.\s*(?P<last>[^\s.][^.]*?)(?:\s+(?P<way>[x*+])\s*(?P<step>\S+))?\s*"
)
_NEEDED = "FIRST..LAST, FIRST..LAST +STEP or FIRST..LAST xFACTOR"


def values(given: Any, name: str) -> tuple[Any, ...]:
    """The values of a series, each once, in order.

    given: one value; several, in a list or tuple or as text between commas; each may be a text as on the command line,
        or a range: "1..5", "0..100 +25", "16..4096 x2", "16MiB..256MiB x2". Both ends belong to it, the last one if the
        steps lead there. name: of the setting, for messages.

    ConfigError.
    """
    if isinstance(given, str):
        given = given.split(",")
    elif not isinstance(given, (list, tuple, range)):
        given = (given,)
    found: list[Any] = []
    for each in given:
        if isinstance(each, (list, dict)):
            raise ConfigError(f"{name}: numbers, texts and truth values are needed, not {each!r:.60}")
        if isinstance(each, str) and not each.strip():
            raise ConfigError(f"{name}: a value is missing")
        found += _one(each, name) if isinstance(each, str) else [each]
        if len(found) > LONGEST:
            raise ConfigError(f"{name}: {LONGEST:,} values are allowed")
    if not found:
        raise ConfigError(f"{name}: at least one value is needed")
    kept: dict[tuple[type, Any], Any] = {}
    for each in found:
        kept.setdefault((type(each), each), each)
    return tuple(kept.values())


def _one(text: str, name: str) -> list[Any]:
    if ".." not in text:
        return [parse(text)]
    found = _RANGE.fullmatch(text)
    if found is None:
        raise ConfigError(f"{name}: {text.strip()!r} is not {_NEEDED}")
    first, last = (_end(found[key], text, name) for key in ("first", "last"))
    sized = isinstance(first[1], str) or isinstance(last[1], str)
    low, high = first[0], last[0]
    step = 1 if found["step"] is None else _end(found["step"], text, name)[0]
    times = found["way"] in ("x", "*")
    if high < low or step < (2 if times else 1) or (times and low < 1):
        raise ConfigError(f"{name}: {text.strip()!r} leads nowhere; {_NEEDED} is needed, with the smaller end first")
    made = [low]
    while (following := made[-1] * step if times else made[-1] + step) <= high:
        made.append(following)
        if len(made) > LONGEST:
            raise ConfigError(f"{name}: {LONGEST:,} values are allowed, {text.strip()!r} has more")
    return [size(number) for number in made] if sized else made


def _end(text: str, whole: str, name: str) -> tuple[int, Any]:
    """A number, with what was written: a size has a unit."""
    value = parse(text)
    if type(value) is int:
        return value, value
    try:
        return parse_size(value, name), value
    except ConfigError:
        raise ConfigError(f"{name}: {whole.strip()!r}: {text!r} is no whole number and no size such as 64MiB") from None


def size(number: int) -> str:
    """A number of bytes as it is written."""
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >> shift and not number % (1 << shift):
            return f"{number >> shift}{unit}"
    return str(number)


# ----------------------------------------------------------------------------------------------------------- conditions

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,  # codespell:ignore notin
}
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}


class Condition:
    """Which combinations count: settings compared as Python writes it, such as "pool >= 64 or design == 'flush'".

    There are names of settings, numbers, texts, lists, none, true and false, arithmetic, comparisons, `in`, `and`, `or`
    and `not`. Sizes ("64MiB") compare as numbers of bytes. A comparison by size with a setting that a point has not, or
    that is none, is false.
    """

    def __init__(self, text: object) -> None:
        if not isinstance(text, str):
            raise ConfigError(f"when: a text is needed, not {text!r:.60}")
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise ConfigError(
                f"when: {text!r} is not a condition such as \"pool >= 64 and design != 'flush'\""
            ) from None
        self.names = {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)} - set(_WORDS)
        self._evaluate(dict.fromkeys(self.names), checked=True)

    def check(self, known: Iterable[str]) -> None:
        """ConfigError for a name that there is not, with the nearest."""
        there = list(known)
        for name in sorted(self.names - set(there)):
            raise ConfigError(f"when: {self.text!r}: no setting is called {name!r}; {near(name, there)}")

    def __call__(self, labels: Mapping[str, Any]) -> bool:
        return bool(self._evaluate(labels))

    def _evaluate(self, labels: Mapping[str, Any], checked: bool = False) -> Any:
        def value(node: ast.expr) -> Any:
            match node:
                case ast.Constant(value=int() | float() | str() | bool() | None as constant):
                    return _comparable(constant)
                case ast.Name(id=name):
                    return _WORDS[name] if name in _WORDS else _comparable(labels.get(name))
                case ast.List(elts=parts) | ast.Tuple(elts=parts):
                    return [value(part) for part in parts]
                case ast.BoolOp(op=ast.And(), values=parts):
                    return all([value(part) for part in parts]) if checked else all(value(part) for part in parts)
                case ast.BoolOp(values=parts):
                    return any([value(part) for part in parts]) if checked else any(value(part) for part in parts)
                case ast.UnaryOp(op=ast.Not(), operand=part):
                    return not value(part)
                case ast.UnaryOp(op=ast.USub(), operand=part):
                    return _reckon(operator.neg, _number(value(part)))
                case ast.BinOp(left=left, op=how, right=right) if type(how) in _BINARY:
                    return _reckon(_BINARY[type(how)], _number(value(left)), _number(value(right)))
                case ast.Compare(left=left, ops=ops, comparators=others):
                    parts = [value(part) for part in (left, *others)]
                    if any(type(how) not in _COMPARE for how in ops):
                        raise self._refused(node)
                    pairs = zip(ops, parts, parts[1:], strict=False)
                    return all(_reckon(_COMPARE[type(how)], one, other) is True for how, one, other in pairs)
            raise self._refused(node)

        return value(self._tree)

    def _refused(self, node: ast.AST) -> ConfigError:
        return ConfigError(f"when: {self.text!r}: {ast.unparse(node)!r:.60} is none of what conditions are made of")


_WORDS = {"none": None, "true": True, "false": False}


def _comparable(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"\d+ ?[KMGT]i?B", value):
        return parse_size(value, "when")
    return value


def _number(value: Any) -> Any:
    return value if isinstance(value, (int, float)) else None


def _reckon(function: Callable[..., Any], *arguments: Any) -> Any:
    """None where the arguments have no such relation."""
    try:
        return function(*arguments)
    except (TypeError, ZeroDivisionError, OverflowError):
        return None
