"""Fixtures of the losses' tests."""

import jax
import pytest

from jaxcl.losses import limits


@pytest.fixture(autouse=True)
def small_tiles():
    """Small tiles, because these tests use small batches: the engine must visit tiles off the diagonal and padding."""
    with limits(tile=5):
        yield


@pytest.fixture
def wide():
    """Float64 for one test."""
    with jax.enable_x64(True):
        yield
