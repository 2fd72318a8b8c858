"""Slot 3: forward passes, which turn views into embeddings by an encoder, and heads on top of them.

B batch, S side of a view, D features, E embedding.

Views are stacked image by image rather than batch after batch, so that a pass over several views of a sharded batch
moves no image between devices.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxcl.method import grad_cache
from jaxcl.method.recipe import ForwardPass, Recipe
from jaxcl.method.terms import Embedding
from jaxcl.method.terms.base import embedding_name
from jaxcl.method.views import View
from jaxcl.models import Model
from jaxcl.models.heads import aug_param_numbers
from jaxcl.models.trees import ENCODERS, HEADS, TARGETS

Array = jax.Array

# Params and batch statistics hold the main encoder at the top level, and other encoders and heads by name under these
# keys. Moving averages are kept in memory and join them, under TARGETS, only within an update.
_BESIDE = (ENCODERS, HEADS, TARGETS)


def set_in(tree: dict, place: str, name: str, value: dict) -> dict:
    return {**tree, place: {**tree.get(place, {}), name: value}}


def of_encoder(tree: dict, name: str) -> dict:
    """The subtree of params (or batch statistics) of one encoder; "" is the main one."""
    return tree[_place(tree, name)][name] if name else {k: v for k, v in tree.items() if k not in _BESIDE}


def _with_encoder(tree: dict, name: str, value: dict) -> dict:
    return set_in(tree, _place(tree, name), name, value) if name else {**tree, **value}


def _place(tree: dict, name: str) -> str:
    return TARGETS if name in tree.get(TARGETS, {}) else ENCODERS


def with_targets(recipe: Recipe, tree: dict, memory: dict, key: str) -> dict:
    """Adds the moving averages' params (key "params") or batch statistics ("batch_stats") to the trained encoders'."""
    return {**tree, TARGETS: {n: memory[n][key] for n in recipe.targets}} if recipe.targets else tree


def represent(
    recipe: Recipe, params: dict, stats: dict, images: Array, main: Array | None = None
) -> tuple[Array, Array]:
    """Normalised images [N,S,S,C] -> (h [N,D], z [N,E]) of the representation's encoders, in inference mode.

    main: the main encoder's features, if they are known already.
    """
    h, z = [], []
    for name in recipe.representation:
        model, own = recipe.encoder(name), of_encoder(params, name)
        known = main is not None and not name
        h.append(main if known else model.encode(own, of_encoder(stats, name), images, train=False)[0])
        z.append(model.project(own, of_encoder(stats, name), h[-1]))
    return (h[0], z[0]) if len(h) == 1 else (jnp.concatenate(h, -1), jnp.concatenate(z, -1))


def run_pass(
    recipe: Recipe,
    params,
    stats,
    views: dict[str, View],
    spec: ForwardPass,
    mesh: Mesh | None = None,
    key: Array | None = None,
) -> tuple[dict[str, Embedding], dict]:
    """Encode the views of one pass together, as one batch of the batch norm. -> (embeddings by name, new statistics).

    key: for dropout, in encoders that have it; None: nothing is dropped.
    """
    names = [n for n in spec.views if n in views]
    if not names:  # the stage that makes them has not begun
        return {}, stats
    model, encoder_params = recipe.encoder(spec.encoder), of_encoder(params, spec.encoder)
    batches = [views[n] for n in names]
    rows, where, sizes, groups = _together(batches, always=bool(recipe.grad_cache.micro_batch))
    if chunks := recipe.grad_cache.chunks(recipe.batch_size):
        encode = functools.partial(grad_cache.encode, model, chunks=chunks, groups=groups, mesh=mesh)
    else:
        encode = functools.partial(model.encode, train=True, depth=spec.depth)
    if spec.bn_groups > 1:
        encode = functools.partial(_by_groups, encode, spec)
    h, new = encode(encoder_params, of_encoder(stats, spec.encoder), rows, where=where, norm_set=spec.norm_set, key=key)
    mode = dict(train=True, where=where, norm_set=spec.norm_set, depth=spec.depth)
    z, new = model.embed(encoder_params, new, h, aug_params=_aug_params(model, batches, groups), **mode)
    return {
        embedding_name(spec.encoder, n): Embedding(hh, zz, views[n].where)
        for n, hh, zz in zip(names, _split(h, sizes, groups), _split(z, sizes, groups), strict=True)
    }, _with_encoder(stats, spec.encoder, new)


def _aug_params(model: Model, batches: list[View], groups: int) -> dict[str, Array]:
    """The augmentation parameters that the heads are conditioned on, stacked as `_together` stacks the rows."""
    params = {}
    for name in model.head.embeds:
        each = [aug_param_numbers(name, view.params, len(view.image)) for view in batches]
        params[name] = _merge(each, groups)
    return params


def _by_groups(encode, spec: ForwardPass, params, stats, rows, *, where, norm_set, key):
    """`encode` on equal groups of rows, each normalised by itself as if on its own device. -> as `encode`.

    Running statistics become the mean of the groups' new ones.
    """
    order = jax.random.permutation(jax.random.fold_in(key, 1), len(rows)) if spec.shuffle else None
    keys = None if key is None else jax.random.split(jax.random.fold_in(key, 2), spec.bn_groups)

    def grouped(x: Array) -> Array:
        x = x if order is None else x[order]
        return x.reshape(spec.bn_groups, -1, *x.shape[1:])

    def one(x: Array, exists: Array | None, own: Array | None) -> tuple[Array, dict]:
        return encode(params, stats, x, where=exists, norm_set=norm_set, key=own)

    h, new = jax.vmap(one)(grouped(rows), None if where is None else grouped(where), keys)
    h = h.reshape(-1, *h.shape[2:])
    return h if order is None else h[jnp.argsort(order)], jax.tree.map(lambda x: x.mean(0), new)


def _together(batches: list, *, always: bool = False) -> tuple[Array, Array | None, list[int], int]:
    """Join batches, each with .image and .where. -> (rows, where, sizes, groups), the latter two for `_split`."""
    images, wheres = [b.image for b in batches], [b.where for b in batches]
    sizes = [len(x) for x in images]
    # Equal views: row r of each, side by side, so that rows stay on their device. Unequal views: batch after batch,
    # or in groups for GradCache, since each micro-batch would otherwise get rows of one view only.
    groups = math.gcd(*sizes) if always or len(set(sizes)) == 1 else 1
    where = None
    if any(w is not None for w in wheres):
        wheres = [jnp.ones(len(x), bool) if w is None else w for w, x in zip(wheres, images, strict=True)]
        where = _merge(wheres, groups)
    return _merge(images, groups), where, sizes, groups


def run_heads(
    recipe: Recipe, params, stats, embeddings: dict[str, Embedding], views: dict[str, tuple[str, ...]]
) -> tuple[dict[str, Embedding], dict]:
    """Apply each head to its views. -> (embeddings with the outputs, new statistics).

    An output is stored with the embedding by the head's first encoder.
    """
    embeddings = dict(embeddings)
    for name, of in views.items():
        head, sizes_of_head = recipe.heads[name], recipe.head_input(name)
        inputs = []
        for view in of:
            e = [embeddings[embedding_name(encoder, view)] for encoder in head.encoders]
            inputs.append(View(jnp.concatenate([getattr(x, head.reads) for x in e], -1), {}, e[0].where))
        for begin in range(0, len(of), len(of) if head.together else 1):
            span = slice(begin, len(of) if head.together else begin + 1)
            rows, where, sizes, groups = _together(inputs[span])
            head_stats = stats.get(HEADS, {}).get(name, {})
            out, new = head.apply(sizes_of_head, params[HEADS][name], head_stats, rows, train=True, where=where)
            stats = set_in(stats, HEADS, name, new)
            for view, y in zip(of[span], _split(out, sizes, groups), strict=True):
                to = embedding_name(head.encoders[0], view)
                embeddings[to] = embeddings[to]._replace(out={**embeddings[to].out, name: y})
    return embeddings, stats


def _merge(arrays: list[Array], groups: int) -> Array:
    """Rows of all views, in groups that each hold an equal share of every view."""
    parts = [a.reshape(groups, len(a) // groups, *a.shape[1:]) for a in arrays]
    return jnp.concatenate(parts, axis=1).reshape(-1, *arrays[0].shape[1:])


def _split(array: Array, sizes: list[int], groups: int) -> list[Array]:
    """The inverse of `_merge`: the rows of each view, in order."""
    array = array.reshape(groups, len(array) // groups, *array.shape[1:])
    if array.shape[1] == len(sizes):
        return [array[:, i] for i in range(len(sizes))]
    ends = [sum(sizes[: i + 1]) // groups for i in range(len(sizes) - 1)]
    return [a.reshape(-1, *array.shape[2:]) for a in jnp.split(array, ends, axis=1)]
