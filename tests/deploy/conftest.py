"""Fixtures for the tests of deploy/."""

from deployment_files import composed

__all__ = ["composed"]
