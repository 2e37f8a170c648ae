"""Conversion of recordings into shards, in units that any number of processes or machines can do in any order.

listing    the episodes of a source in a fixed order, in pieces that are listed where they are read
plan       the units, a function of the source and the options alone, and what tells a plan from another
unit       reads, encodes and writes one unit aside
staging    the hidden folder of finished units, its locks, and how they become sets
local      runs units in this process or in several
on_ray     runs them on a Ray cluster
"""
