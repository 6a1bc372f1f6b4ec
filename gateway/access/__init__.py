"""access (pure): who calls, and what he may. The reading of files and the fetching of keys are done elsewhere."""

from __future__ import annotations
