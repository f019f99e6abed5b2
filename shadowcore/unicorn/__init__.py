"""Guests of machine code, in Unicorn."""

from .machine import *  # noqa: F403
