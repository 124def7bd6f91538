"""Shared fixtures: real material where it is at hand, small synthetic audio everywhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("PATCHBANK_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real audio, weights and goldens; tests that need it skip without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs real audio and weights: no folder {SHARED} (set PATCHBANK_SHARED)")
    return SHARED
