"""What every test gets: threads that sleep while they wait, and random numbers that are the same in every run."""

from __future__ import annotations

import os

# Before anything loads libgomp: threads that spin at a barrier hold the cores that others need on a busy machine
# (minutes became half an hour).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every run tests the same numbers: what fails, fails again."""
    torch.manual_seed(0)
