"""Each public class and function has an example in its docstring, and it prints what stands there."""

import doctest
import inspect

import numpy as np
import pytest

import shadowcore as sc

PUBLIC = [name for name in sc.__all__ if inspect.isclass(getattr(sc, name)) or inspect.isroutine(getattr(sc, name))]
METHODS = ["VM.on_event"]
"""Methods that have one, too."""


def found(name):
    value = sc
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_the_example_of(name):
    """`sc` is shadowcore and `np` numpy, as everywhere in the documentation."""
    text = inspect.cleandoc(found(name).__doc__)
    example = doctest.DocTestParser().get_doctest(text, {"sc": sc, "np": np}, name, None, 0)
    assert example.examples, f"sc.{name} has no example"
    said = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    runner.run(example, out=said.append)
    assert not runner.failures, "".join(said)
