"""Recordings: of guests, of operations, of programs; the file format, importers, replay."""
