"""I/O: Triton endpoints: connections, pools, health."""
