"""Tests of two sizes: a sample runs by default, the whole with `-m slow`."""

import pytest
from hypothesis import settings


def sampled(name, whole, part=5):
    """A parameter `name`: how many; the `part`-th part of `whole` by default."""
    return _sizes(name, max(whole // part, 1), whole)


def sampled_examples(share=1, part=5):
    """A parameter `examples` for `settings(max_examples=examples)`: of the profile's number, 1 / `share`."""
    return sampled("examples", settings().max_examples // share, part)


def strided(stride):
    """A parameter `stride`: each such case by default, each one in the whole."""
    return _sizes("stride", stride, 1)


def _sizes(name, sample, whole):
    sizes = [sample, pytest.param(whole, marks=pytest.mark.slow)]
    return pytest.mark.parametrize(name, sizes, ids=["sample", "whole"])
