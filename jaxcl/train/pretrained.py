"""A config that names weights gets from them what they decide: the architecture and how images are prepared.

`resolve` writes it into the config, and what it was told into `config.pretrained`, so that config.json of a run needs
neither the weights nor a network when the run is continued, evaluated or exported:

    pretrained.model: word, weights (with the hash of its commit), licence, sha256, architecture, preprocessing, ...

What the user then sets is compared with it by `settle`.
"""

import copy
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from jaxcl import config as configs
from jaxcl.data import keeps_size
from jaxcl.errors import UserError
from jaxcl.models import weights
from jaxcl.models.backbone import FREE_OPTIONS, architecture, architecture_defaults, model_of
from jaxcl.models.model import make_model
from jaxcl.models.preprocessing import Preprocessing
from jaxcl.models.registry import MODELS
from jaxcl.runtime import storage
from jaxcl.runtime.options import quoted
from jaxcl.runtime.registry import make_part

# Options of training that an encoder of another kind keeps if it has them.
_KEPT = ("norm_sets", "norm_set_momentum", "branches", "branch_embeds", "head_embeds", "head_embed_features")
_SEEN = 7  # pixels a side of the map that GradCAM explains, at least: those of the last stage at 224 pixels


class Facts(NamedTuple):
    """What a checkpoint tells, as `config.pretrained` has it.

    Attributes:
      word: the text in the config that names the weights.
      weights: the same, with the hash of its commit if it is on the hub.
      licence: "" if nobody tells.
      sha256: the hash and the name of each file.
      architecture: the encoder's options, with its kind; {} of tensors by jaxcl's names without a description.
      assumed: those of them that are only usual.
      preprocessing: fields of `Preprocessing`; {} if it is not known.
      usual: whether the preprocessing is only what such weights usually have.
    """

    word: str
    weights: str
    licence: str
    sha256: tuple[str, ...]
    architecture: dict[str, Any]
    assumed: tuple[str, ...]
    preprocessing: dict[str, Any]
    usual: bool


def encoders(config: ConfigDict) -> Iterator[tuple[str, str, ConfigDict]]:
    """(its config key, its key in `config.pretrained`, its node) of each encoder with weights."""
    named = {"model": config.model, **{f"encoders.{n}": node for n, node in config.encoders.items()}}
    for where, node in named.items():
        if word := node.get("weights"):
            if not isinstance(word, str):
                raise UserError(f"{where}.weights is {quoted(word)}; expected a text, or '' for none")
            yield where, where.replace(".", "/"), node


def facts_of(config: ConfigDict, key: str, word: str) -> Facts | None:
    """What `config.pretrained` tells of the weights of that word; None if it does not."""
    return _facts(configs.to_dict(config).get("pretrained"), key, word)


def _facts(known: Any, key: str, word: str) -> Facts | None:
    known = known.get(key) if isinstance(known, Mapping) else None
    if not isinstance(known, Mapping) or known.keys() != set(Facts._fields) or known["word"] != word:
        return None
    return Facts(**{k: _tuples(v) for k, v in known.items()})


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def _read(where: str, word: str, kind: str) -> Facts:
    try:
        found = weights.read(word, kind=kind)
        options = weights.architecture(found) if found.kind or "architecture" in found.about else {}
        if options:
            # An export of an older version lacks the option.
            options = options if found.kind else {"input_size": 0, **options}
            model_of(options)
        known, origin = found.preprocessing, found.origin
        return Facts(
            word=word,
            weights=origin["weights"],
            licence=origin.get("licence", ""),
            sha256=tuple(origin["sha256"]),
            architecture=_tuples(options),
            assumed=tuple(sorted(weights.assumed(found))),
            preprocessing=known._asdict() if known else {},
            usual=found.usual,
        )
    except UserError as error:
        raise UserError(f"{where}.weights: {error}") from error


def resolved(config: ConfigDict, workdir: str | os.PathLike) -> ConfigDict:
    """A config with what its weights decide: `config` itself without weights, a copy after `resolve` and `settle` else.

    Raises:
      UserError: as those do.
    """
    if any(encoders(config)):
        config = copy.deepcopy(config)
        settle(config, resolve(config, workdir))
    return config


# ---- before the user's own options


def resolve(config: ConfigDict, workdir: str | os.PathLike = "") -> dict[str, bool]:
    """Give the encoders of a config what their weights decide, in place; those that have it already are left.

    Args:
      config: with `model.weights` or `encoders.NAME.weights`.
      workdir: a run folder; if it holds a run that began with the same weights, these are not looked for again.

    Returns:
      {config key of an encoder that this wrote to: whether it had another architecture}, for `settle`.

    Raises:
      UserError: weights that cannot be read, or encoders whose weights need different preprocessing.
    """
    new, record, named = {}, None, list(encoders(config))
    with config.unlocked():
        for key in set(config.pretrained) - {key for _, key, _ in named}:
            del config.pretrained[key]
    for where, key, node in named:
        if facts_of(config, key, node.weights):
            continue
        record = _record(workdir) if record is None else record
        facts = _facts(record.get("pretrained"), key, node.weights) or _read(where, node.weights, node.kind)
        new[where] = _decide(config, where, facts)
        with config.unlocked(), config.ignore_type():
            config.pretrained[key] = facts._asdict()
    if new:
        _decide_moments(config)
    return new


def _record(workdir: str | os.PathLike) -> dict[str, Any]:
    """The config of the run in a folder; {} without one."""
    if not workdir:
        return {}
    storage.need_library(workdir)
    path = storage.expanded(workdir) / "config.json"
    return storage.read_json(path) if path.exists() else {}


def _decide(config: ConfigDict, where: str, facts: Facts) -> bool:
    """-> whether the encoder had another architecture."""
    if not facts.architecture:
        return False
    old = _node(config, where)
    kind, usual = facts.architecture["kind"], configs.default().model.kind
    if old.kind not in (usual, kind):
        raise _contradiction(where, "kind", old.kind, facts)
    before = architecture(old)
    configs.with_kind(config, where, kind)
    node = _node(config, where)
    with config.unlocked(), config.ignore_type():
        for option in _KEPT:
            if option in old and option in node:
                node[option] = old[option]
        for option, value in architecture_defaults(kind).items():
            node[option] = facts.architecture.get(option, value)
        if not node.input_size and not config.eval.size:  # a config that sets both sizes gives encoders what they see
            node.input_size, node.input_interpolation = _input(facts)
    after = architecture(node)
    return any(before.get(k) != v for k, v in after.items() if k not in FREE_OPTIONS)


def _node(config: ConfigDict, where: str) -> ConfigDict:
    slot, _, name = where.partition(".")
    return config[slot][name] if name else config[slot]


def _input(facts: Facts) -> tuple[int, str]:
    """The side to which an encoder's images are resized, 0 for none, and how."""
    if "input_size" in facts.architecture:  # an export of jaxcl, which goes on as its run did
        size = facts.architecture["input_size"]
        return size, facts.architecture.get("input_interpolation", "bilinear")
    known = facts.preprocessing
    cubic = known.get("interpolation") in ("bicubic", "lanczos")  # there is no other one on the device
    return known.get("image_size", 0), "bicubic" if cubic else "bilinear"


def _decide_moments(config: ConfigDict) -> None:
    found = {}
    for where, key, node in encoders(config):
        facts = facts_of(config, key, node.weights)
        if facts and facts.preprocessing:
            found[where] = facts.preprocessing["mean"], facts.preprocessing["std"]
    if len(set(found.values())) > 1:
        (a, x), (b, y) = next(((a, x), (b, y)) for a, x in found.items() for b, y in found.items() if x != y)
        raise UserError(
            f"{b}.weights need images normalised by mean, std {y}, {a}.weights by {x}; use weights that agree"
        )
    for mean, std in set(found.values()):
        with config.unlocked(), config.ignore_type():
            config.data.mean, config.data.std = mean, std


# ---- after them


def settle(config: ConfigDict, new: Mapping[str, bool], stated: Collection[str] = ()) -> None:
    """Refuse what contradicts the weights, and fit other keys to them.

    Args:
      config: after `resolve` and the user's own options.
      new: from `resolve`.
      stated: the keys of the user's own options, which stay as they are.

    Raises:
      UserError: an option of the architecture, or a moment, that the weights do not have.
    """
    for where, key, node in encoders(config):
        facts = facts_of(config, key, node.weights)
        if facts is None:
            continue
        for option, value in facts.architecture.items():
            free = option in (*FREE_OPTIONS, *facts.assumed) or option not in node
            if not free and _tuples(node[option]) != value:
                raise _contradiction(where, option, node[option], facts)
        known = Preprocessing(**facts.preprocessing) if facts.preprocessing else None
        for option in ("mean", "std") if known and not facts.usual else ():
            if _tuples(config.data[option]) != getattr(known, option):
                raise UserError(
                    f"data.{option} is {_tuples(config.data[option])}, but {where}.weights {facts.word} need "
                    f"{getattr(known, option)}; leave it out"
                )
        if known and where == "model" and where in new and "data.files.image_size" not in stated:
            _decode_at(config, config.eval.size or node.input_size or known.image_size)
    if new.get("model"):
        _choose_taps(config, stated)


def _decode_at(config: ConfigDict, size: int) -> None:
    """Decode photos at the size that the encoder sees; smaller ones would be enlarged again, and blurred."""
    if not config.data.files.image_size and keeps_size(config.data.source):
        config.data.files.image_size = size


def _contradiction(where: str, option: str, value: Any, facts: Facts) -> UserError:
    theirs = facts.architecture[option]
    return UserError(
        f"{where}.{option} is {quoted(_tuples(value))}, but {where}.weights {facts.word} are of {option}="
        f"{quoted(theirs)}; leave it out, or name other weights"
    )


def _choose_taps(config: ConfigDict, stated: Collection[str]) -> None:
    """GradCAM explains the deepest layer whose map is not too small for it."""
    stages = [(f"stages[{i}].tap", stage) for i, stage in enumerate(config.stages) if "tap" in stage]
    places = [(key, node) for key, node in (("eval.tap", config.eval), *stages) if key not in stated]
    model = make_model(make_part("model", config.model, MODELS))
    if not places or not model.encoder.taps:
        return
    size = config.model.input_size or config.size or 64
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)

    def side(tap: str) -> int:
        init = lambda x: model.encoder.init_with_output(jax.random.key(0), x, tap, method="to_tap")  # noqa: E731
        (activations, _), _ = jax.eval_shape(init, image)
        return min(activations.shape[1:3]) if activations.ndim == 4 else _SEEN

    tap = next((tap for tap in reversed(model.encoder.taps) if side(tap) >= _SEEN), model.encoder.taps[-1])
    for _, node in places:
        node.tap = tap
