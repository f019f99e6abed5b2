"""Recordings: of guests, of operations, of programs.

format: streams, columns, events. packing: a column as arrays. archive: the zip file. writer, reader: recordings by
blocks. npz: arrays of other files. guest: what a guest did. replay: that again on a machine. importers, valgrind: where
recordings come from. pages, records (compiled): pages and offsets of addresses; the records of a guest, one by one.
"""
