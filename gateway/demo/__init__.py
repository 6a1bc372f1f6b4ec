"""demo (I/O): `inference-gateway demo`: what the gateway does, shown on real models behind a local Triton."""
