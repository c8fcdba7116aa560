"""Models: decoders as data, and the families that fill them in."""
