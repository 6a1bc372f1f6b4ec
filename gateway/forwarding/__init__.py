"""The use-case: one inference request in, one answer out. Knows routing, stages, a peek at messages, pools."""
