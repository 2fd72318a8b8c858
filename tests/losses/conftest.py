"""Small tiles, since the batches of these tests are small: the engine must meet tiles off the diagonal, and padding."""

import pytest

from jaxcl.losses import limits


@pytest.fixture(autouse=True)
def small_tiles():
    with limits(tile=5):
        yield
