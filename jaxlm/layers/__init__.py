"""Layers: frozen values that declare their parameters and apply them."""
