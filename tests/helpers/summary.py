"""Where tests leave the lines that end the report of a test run."""

from __future__ import annotations

import pytest

SUMMARY = pytest.StashKey[list[str]]()
