"""Refuses what cannot work in a recipe, in one plain line, before anything compiles."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax.errors import FlaxError

from jaxcl.errors import UserError
from jaxcl.method.recipe import ForwardPass, Recipe
from jaxcl.method.terms.base import embedding_name, split_name
from jaxcl.models import Model
from jaxcl.models.trees import BRANCHES, ENCODER, ENCODERS, HEAD, HEADS
from jaxcl.runtime.options import suggestion


def check_paths(where: str, paths: Iterable[str], heads: Iterable[str], encoders: Iterable[str]) -> None:
    """Errors: UserError for a path at which no parameters are."""
    known = [ENCODER, HEAD, BRANCHES, *(f"{HEADS}/{n}" for n in heads), *(f"{ENCODERS}/{n}" for n in encoders)]
    for path in paths:
        if not any(f"{path}/".startswith(f"{k}/") for k in known):
            raise UserError(f"{where} holds {path!r}, which has no parameters{suggestion(path, known)}")


def check(recipe: Recipe, *, num_devices: int) -> None:
    """Check that every name a part reads exists, and that every part's needs are met. Errors: UserError."""
    for model in (recipe.model, *recipe.encoders.values()):
        recipe.grad_cache.check(model, recipe.batch_size, num_devices)
    for n, part in recipe.memory.items():
        part.check(f"memory.{n}", recipe)
    _check_eval_size(recipe)
    for name in set(recipe.encoders) & set(recipe.targets):
        raise UserError(f"encoders.{name} and memory.{name} are two encoders of one name; rename one")
    for name in (*recipe.views, *recipe.encoders, *recipe.targets):
        if "/" in name:
            raise UserError(f"{name!r} may not contain '/', which joins an encoder's name and a view's")
    for name in recipe.representation:
        _known_encoder(recipe, "representation", name, trained=True)
    if not recipe.representation:
        raise UserError("representation names no encoder; expected ('',) for the main one")
    made = set(recipe.views) | {n for s in recipe.stages for n in s.writes}

    def exists(name: str, where: str, known: set[str]) -> None:
        if name not in known:
            raise UserError(f"{where} names view {name!r}, which does not exist{suggestion(name, sorted(known))}")

    available = set(recipe.views)
    for i, stage in enumerate(recipe.stages):
        for name in stage.reads:
            exists(name, f"stages[{i}]", available)
        for name in stage.creates:
            if name in available:
                raise UserError(f"stages[{i}] makes view {name!r}, which is a view already; choose a new name")
        available |= set(stage.writes)
        stage.check(f"stages[{i}]", recipe, num_devices)
    if not recipe.passes or not recipe.terms:
        raise UserError("a recipe needs at least one pass and one term; see configs/supcon.py")
    encoded: set[str] = set()
    shallow: set[str] = set()  # embeddings by the first stages of a network only
    for i, p in enumerate(recipe.passes):
        _known_encoder(recipe, f"passes[{i}].encoder", p.encoder)
        recipe.encoder(p.encoder).check_norm_set(f"passes[{i}].norm_set", p.norm_set)
        recipe.encoder(p.encoder).check_depth(f"passes[{i}].depth", p.depth)
        if p.depth and recipe.grad_cache.micro_batch:
            raise UserError(
                f"passes[{i}].depth with grad_cache.micro_batch: GradCache encodes whole networks only; use one of them"
            )
        _check_groups(recipe, f"passes[{i}]", p)
        for name, embedding in zip(p.views, p.embeddings, strict=True):
            exists(name, f"passes[{i}]", made)
            if embedding in encoded:
                raise UserError(f"passes[{i}] encodes view {embedding!r} a second time; name it once")
            encoded.add(embedding)
            if p.depth:
                shallow.add(embedding)
    for name, part in recipe.heads.items():
        for encoder in part.encoders:
            _known_encoder(recipe, f"heads.{name}.encoders", encoder, trained=True)
        if not part.encoders:
            raise UserError(f"heads.{name}.encoders is empty; expected ('',) for the main one")
        part.check(f"heads.{name}", recipe.head_input(name))
    for n, term in recipe.terms.items():
        for name in (*term.reads, *term.optional):
            exists(name, f"terms.{n}", encoded)
        for embedding, head in term.heads:
            _check_head(recipe, n, embedding, head, encoded)
    recipe.accumulate.check(recipe, num_devices)
    used = recipe.head_views(tuple(recipe.terms))
    for name in recipe.heads:
        if name not in used:
            raise UserError(f"heads.{name} is read by no term; remove it, or name it as the head of a term")
    for n, term in recipe.terms.items():
        for name in term.memories:
            if name not in recipe.memory:
                raise UserError(f"terms.{n} reads memory.{name}, which the config lacks; add it to memory")
    for n, part in recipe.memory.items():
        for name in part.reads:
            exists(name, f"memory.{n}", encoded)
        for name in part.represented:
            for encoder in recipe.representation:
                exists(embedding_name(encoder, name), f"memory.{n}", encoded)
                if embedding_name(encoder, name) in shallow:
                    raise UserError(f"memory.{n} reads view {name!r}, which ends at a stage; name one that does not")
            exists(name, f"memory.{n}", set(recipe.views))
        if part.own_view:
            exists(part.own_view, f"memory.{n}", set(recipe.views))
    needs = [f"terms.{n}" for n, t in recipe.terms.items() if t.needs_labels]
    needs += [f"memory.{n}" for n, part in recipe.memory.items() if part.needs_labels]
    if needs and not recipe.labelled:
        raise UserError(
            f"{needs[0]} needs a label on every training image, which the data lacks; give labels, or use a "
            "config without labels, such as configs/simclr.py:unlabelled"
        )


def _known_encoder(recipe: Recipe, where: str, name: str, trained: bool = False) -> None:
    names = ("", *recipe.encoders, *(() if trained else recipe.targets))
    if name not in names:
        known = ", ".join(map(repr, names))
        raise UserError(f"{where} names encoder {name!r}; expected one of {known} ('' is the main one)")


def _check_eval_size(recipe: Recipe) -> None:
    side, (size, _, channels) = recipe.eval_size, recipe.image_shape
    if side == size:
        return

    def features(model: Model, image: jax.Array) -> jax.Array:
        params, stats = model.init(jax.random.key(0), recipe.image_shape)
        return model.encode(params, stats, image, train=False)[0]

    for model in (recipe.model, *recipe.encoders.values()):
        image = jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
        try:
            jax.eval_shape(lambda x, model=model: features(model, x), image)
        except (FlaxError, TypeError, ValueError) as error:
            raise UserError(
                f"eval.size is {side}, but an encoder that is trained on {size} pixels takes no others; leave it out"
            ) from error


def _check_groups(recipe: Recipe, where: str, p: ForwardPass) -> None:
    if p.bn_groups == 1:
        return
    if recipe.encoder(p.encoder).encoder.norm != "batch":
        raise UserError(f"{where}.bn_groups is {p.bn_groups}, but its encoder has no batch norm; use 1")
    if recipe.grad_cache.micro_batch:
        raise UserError(f"{where}.bn_groups with grad_cache.micro_batch: both divide the batch norm; use one of them")
    if recipe.batch_size % p.bn_groups:
        raise UserError(
            f"{where}.bn_groups {p.bn_groups} does not divide batch_size {recipe.batch_size}; use a divisor"
        )


def _check_head(recipe: Recipe, term: str, embedding: str, head: str, encoded: set[str]) -> None:
    if head not in recipe.heads:
        raise UserError(f"terms.{term}.head is {head!r}, which the config lacks{suggestion(head, recipe.heads)}")
    part, (encoder, view) = recipe.heads[head], split_name(embedding)
    if encoder != part.encoders[0]:
        expected = embedding_name(part.encoders[0], view)
        raise UserError(f"terms.{term} reads heads.{head} of {embedding!r}; that head is of {expected!r}")
    for other in part.encoders:
        if embedding_name(other, view) not in encoded:
            raise UserError(f"heads.{head} reads {embedding_name(other, view)!r}, which no pass encodes")
