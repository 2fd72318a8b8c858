"""Parts by name: `kind="supcon"` is a part of ours, `kind="my_package.my_module:MyTerm"` is anybody's.

A slot has one `Registry`, the only place where its built-in parts are named. Modules are imported when a part of them
is asked for. The kind is what config.json of a run holds, so another process finds the same part again, provided that
Python can import its package there.
"""

import difflib
import importlib
import inspect
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from jaxcl.errors import UserError
from jaxcl.runtime.options import construct, quoted, suggestion


class Registry(Mapping[str, str]):
    """The parts of one slot: kind -> "module:Name" of a class that fulfils the slot's contract, or of its factory.

    Args:
      slot: what a part of it is called in messages, such as "term".
      contract: "module:Name" of the class that every part must be a subclass of (a factory function must be annotated
        to return one). Nothing else is ever called: a config cannot name an arbitrary function.
      parts: the built-in ones.
    """

    def __init__(self, slot: str, contract: str, parts: Mapping[str, str]):
        self.slot, self._contract, self._parts = slot, contract, dict(parts)

    def __getitem__(self, kind: str) -> str:
        return self._parts[kind]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def contract(self) -> type:
        """The class that parts are subclasses of."""
        return _load(self._contract)

    def resolve(self, kind: Any, where: str = "") -> Any:
        """The class or factory of a kind. where: the config key that names it, for messages.

        Errors: UserError for an unknown kind, a module that cannot be imported, or an object that is no such part.
        """
        where = where or f"the kind of {self.slot}"
        if isinstance(kind, str) and kind in self._parts:
            return _load(self._parts[kind])
        if not isinstance(kind, str) or ":" not in kind:
            raise UserError(f"{where} is {quoted(kind)}{suggestion(kind, self._parts)}")
        module, _, name = kind.partition(":")
        try:
            part = _load(kind)
        except ModuleNotFoundError as error:
            if error.name and (module == error.name or module.startswith(f"{error.name}.")):
                raise UserError(
                    f"{where} is {kind!r}, but there is no module {error.name}; run from the folder that holds it, or "
                    "add that folder to PYTHONPATH"
                ) from None
            raise UserError(f"{where} is {kind!r}, which cannot be imported: {quoted(error)}") from error
        except AttributeError:
            raise UserError(f"{where} is {kind!r}, but {module} has no {name}") from None
        except UserError as error:
            raise UserError(f"{where} is {kind!r}, which cannot be imported: {error}") from error
        except Exception as error:  # noqa: BLE001 - a module is the user's own code and may raise anything
            raise UserError(f"{where} is {kind!r}, which cannot be imported: {quoted(error)}") from error
        if not self._fulfils(part):
            base = self._contract.replace(":", ".")
            raise UserError(f"{where} is {kind!r}, which is no {self.slot}; expected a subclass of {base}")
        return part

    def _fulfils(self, part: Any) -> bool:
        if inspect.isfunction(part):
            try:
                part = typing.get_type_hints(part).get("return")
            except NameError:
                return False
        return isinstance(part, type) and issubclass(part, self.contract)


def make_part(name: str, node: Mapping[str, Any], parts: Registry, **supplied: Any) -> Any:
    """The part that a config node describes: `kind` chooses it, the other keys are its options.

    Args:
      name: the config key of the node, for messages.
      node: the options, and `kind`; an `optimizer` is ignored, since it is not an option of the part.
      parts: the registry of the slot.
      **supplied: arguments that are not options.

    Errors: UserError, as `Registry.resolve` and `construct`.
    """
    part = parts.resolve(node.get("kind"), f"{name}.kind")
    return construct(name, part, {k: v for k, v in node.items() if k not in ("kind", "optimizer")}, **supplied)


def _load(path: str) -> Any:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for attribute in name.split("."):
        found = getattr(found, attribute)
    return found


class Contract:
    """Base of the classes that define what a part is: a subclass with a misspelt attribute is refused at once.

    An attribute, property or method that resembles one of the contract's but is none would be ignored silently.
    Options (annotated fields) are exempt, and so are names with a leading underscore.

    Errors: UserError when the subclass is defined.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = {n for base in cls.__mro__[1:] if issubclass(base, Contract) for n in vars(base)}
        known = {n for n in known if not n.startswith("_")}
        annotations = inspect.get_annotations(cls)
        options = {n for n, hint in annotations.items() if "ClassVar" not in str(hint)}
        for name in {*vars(cls), *annotations} - options - known:
            close = [] if name.startswith("_") else difflib.get_close_matches(name, known, n=1, cutoff=0.8)
            if close:
                raise UserError(f"{cls.__module__}.{cls.__qualname__} has {name!r}; did you mean {close[0]!r}?")
