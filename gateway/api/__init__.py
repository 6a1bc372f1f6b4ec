"""api (I/O): the services: V2, `gateway.v1`, health, reflection, and the listener that carries them."""
