"""process: what any process of the gateway has, whatever it does: memory, an event loop, a folder of its own, an end.

Its modules depend on nothing else of the package, and are imported one by one.
"""
