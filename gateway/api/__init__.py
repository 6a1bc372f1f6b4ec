"""I/O: the servicers (V2, gateway.v1, health) and the listening sides that carry them."""
