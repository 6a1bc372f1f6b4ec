"""Load tests: the gateway side by side with what a user would put in front of Triton instead. `python -m perf --help`.

Not part of the package: it starts the gateway as a user does and measures it from outside. README.md tells the method.
"""
