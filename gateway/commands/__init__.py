"""commands (I/O): what `inference-gateway` can do, one module for each group of commands.

`add` of a module declares its commands to the parser. What runs one imports what it needs there, so that `--help` and
`check` load no gRPC server. `cli` has the list of the groups, and turns errors into messages and exit codes.
"""
