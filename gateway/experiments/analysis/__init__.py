"""Statistics that may be read at any time: every interval here holds at all looks at once, so that none must be chosen.

The module of a kind of outcome names the sources of its formulas. NumPy and SciPy, and nothing of the gateway but plans
and what was seen, as values.
"""
