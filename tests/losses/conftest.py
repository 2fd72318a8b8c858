"""Small tiles: the batches of these tests are small, and the engine must meet tiles off the diagonal and padded ones."""

import pytest

from jaxcl.losses import limits


@pytest.fixture(autouse=True)
def small_tiles():
    with limits(tile=5):
        yield
