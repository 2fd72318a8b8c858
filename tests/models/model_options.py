"""Options of encoders as a config gives them, and how impossible ones are refused."""

import pytest

from jaxcl.errors import UserError
from jaxcl.models import make_model
from jaxcl.models.registry import MODELS
from jaxcl.runtime.registry import make_part


def model_of(kind, **options):
    return make_model(make_part("model", {"kind": kind, **options}, MODELS))


def refused(key, kind, *words, **options):
    """The error is one line that begins with the config key and holds the words."""
    with pytest.raises(UserError) as error:
        model_of(kind, **options)
    text = str(error.value)
    assert text.startswith(f"model.{key} ") and "\n" not in text, text
    assert all(word in text for word in words), text
