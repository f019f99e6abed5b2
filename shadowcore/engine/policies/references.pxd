"""A policy by itself, on a string of references: for Python."""
