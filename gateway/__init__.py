"""A gRPC gateway in front of NVIDIA Triton. `python -m gateway` is the command; docs/architecture.md is the map."""
