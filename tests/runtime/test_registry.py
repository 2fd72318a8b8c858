"""The registry: parts by name, ours and anybody's, and what is refused."""

import pytest

from jaxcl.augment import Pipeline
from jaxcl.data.registry import SOURCES
from jaxcl.errors import UserError
from jaxcl.evaluate.registry import EVALUATORS
from jaxcl.method import registry
from jaxcl.method.terms.base import Term
from jaxcl.models.registry import MODELS
from jaxcl.runtime.registry import Contract

ALL = (registry.VIEWS, registry.STAGES, registry.TERMS, registry.MEMORY, registry.HEADS, MODELS, SOURCES, EVALUATORS)


@pytest.mark.parametrize("slot", ALL, ids=lambda r: r.slot)
def test_every_built_in_part_is_there_and_fulfils_its_contract(slot):
    for kind in slot:
        part = slot.resolve(kind)
        assert slot.resolve(slot[kind]) is part  # by its full name it passes the same check as anybody's


def test_a_module_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "own_module.py").write_text(
        "from jaxcl.augment import Pipeline, standard_view\n"
        "from jaxcl.method.terms.base import Term\n"
        "class Mine(Term):\n    pass\n"
        "def view(size, mean, std) -> Pipeline:\n    return standard_view(size, mean, std)\n"
        "def untyped(size, mean, std):\n    return None\n"
    )
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "needs_more.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert issubclass(registry.TERMS.resolve("own_module:Mine"), Term)
    assert isinstance(registry.VIEWS.resolve("own_module:view")(8, (0.5,) * 3, (0.2,) * 3), Pipeline)
    for slot, kind, words in (
        (registry.VIEWS, "own_module:untyped", "which is no view"),
        (registry.STAGES, "own_module:Mine", "which is no stage"),
        (registry.TERMS, "own_module:Missing", "own_module has no Missing"),
        (registry.TERMS, "no_module_here:X", "there is no module no_module_here"),
        (registry.TERMS, "broken_module:X", "cannot be imported"),
        (registry.TERMS, "needs_more:X", "cannot be imported"),
        (registry.TERMS, "os:system", "which is no term"),
        (registry.MEMORY, "subprocess:Popen", "which is no memory part"),
        (registry.TERMS, "supcom", "did you mean 'supcon'"),
        (registry.TERMS, None, "terms.x.kind is None"),
        (registry.TERMS, 3, "terms.x.kind is 3"),
    ):
        with pytest.raises(UserError) as error:
            slot.resolve(kind, "terms.x.kind")
        assert words in str(error.value) and "terms.x.kind" in str(error.value) and "\n" not in str(error.value)


def test_a_misspelt_attribute_is_refused_where_the_class_is_defined():
    class Kind(Contract):
        needs_labels = False

        @property
        def reads(self):
            return ()

    class Right(Kind):
        needs_labels = True
        helper = 3
        _redas = 1  # private names are nobody's business

    assert Right.needs_labels
    for name in ("need_labels", "needs_label", "raeds"):
        with pytest.raises(UserError, match=name):
            type("Wrong", (Kind,), {name: True})
