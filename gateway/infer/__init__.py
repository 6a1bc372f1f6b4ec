"""The use-case: one inference request in, one answer out. Knows routing, stages, wire's peek and upstream's Protocols."""
