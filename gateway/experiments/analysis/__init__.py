"""Statistics that may be read at any time: every interval here holds at all looks at once, so that none must be chosen.

Each module is one kind of outcome, and names the source of its formulas. NumPy and SciPy, and nothing of the gateway.
"""
