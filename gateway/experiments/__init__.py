"""Experiments: what one plans, what was seen, and what follows from it. Pure: records and a plan in, a verdict out."""
