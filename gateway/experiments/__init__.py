"""experiments (pure): what one plans, what was seen, and what follows from it. May use numpy and scipy."""
