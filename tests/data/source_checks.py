"""A helper of the data tests: a source that must be refused."""

import pytest

from jaxcl.data import make_source
from jaxcl.errors import UserError


def fails(match, spec, **options):
    """make_source ends with a UserError of one line that contains the pattern."""
    with pytest.raises(UserError, match=match) as caught:
        make_source(spec, **options)
    assert "\n" not in str(caught.value)
