"""Fixtures for every test."""

from triton_fixture import triton, triton_factory, triton_repository

__all__ = ["triton", "triton_factory", "triton_repository"]
