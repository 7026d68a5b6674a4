"""Planning (floor 6): compile for a machine that is not here, and say whether it fits and how fast it can be."""
