"""forwarding: the use-case. One inference request in, one answer out: decided, attempted, merged, reported."""
