"""Families: one file each, functions that return decoders."""
