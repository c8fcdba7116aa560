"""Fast forms of single operations, each tested against its reference twin."""
