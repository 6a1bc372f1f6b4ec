"""experiments (pure): which variant is better? May use v2's values and numpy."""
