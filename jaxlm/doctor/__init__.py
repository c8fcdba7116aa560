"""Finds what is wrong with a model or its training, by named checks."""
