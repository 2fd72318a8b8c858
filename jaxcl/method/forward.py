"""Forward passes: views -> embeddings by an encoder, and heads on top of them, with the batch statistics they move.

B batch, S side of a view, D features, E embedding.

Views are stacked image by image rather than one batch after the other, so that a pass over several views of a sharded
batch moves no image.
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

Array = jax.Array

# Parameters and batch statistics: the main encoder's own at the top, those of the others and of heads by their names
# in these places beside it. Those of moving averages are in memory; they join the others only within an update.
_BESIDE = ("encoders", "heads", "targets")


def set_in(tree: dict, place: str, name: str, value: dict) -> dict:
    return {**tree, place: {**tree.get(place, {}), name: value}}


def of_encoder(tree: dict, name: str) -> dict:
    """The part of the parameters or statistics that belongs to one encoder."""
    return tree[_place(tree, name)][name] if name else {k: v for k, v in tree.items() if k not in _BESIDE}


def _with_encoder(tree: dict, name: str, value: dict) -> dict:
    return set_in(tree, _place(tree, name), name, value) if name else {**tree, **value}


def _place(tree: dict, name: str) -> str:
    return "targets" if name in tree.get("targets", {}) else "encoders"


def with_targets(recipe: Recipe, tree: dict, memory: dict, part: str) -> dict:
    """Parameters or statistics of the trained encoders and, of the moving averages, what memory holds."""
    return {**tree, "targets": {n: memory[n][part] for n in recipe.targets}} if recipe.targets else tree


def represent(
    recipe: Recipe, params: dict, stats: dict, images: Array, main: Array | None = None
) -> tuple[Array, Array]:
    """Normalised images [N,S,S,C] -> (h [N,D], z [N,E]) in inference mode: the encoders of the representation, joined.

    main: the features of the main encoder, where they are known already.
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
    """Encode some views together, as one batch of the batch norm. -> (embeddings by name, new statistics).

    key: of what is dropped at random, in encoders that do so; None: nothing is.
    """
    names = [n for n in spec.views if n in views]
    if not names:  # a stage that makes them has not begun
        return {}, stats
    model, own = recipe.encoder(spec.encoder), of_encoder(params, spec.encoder)
    parts = [views[n] for n in names]
    rows, where, sizes, groups = _together(parts, always=bool(recipe.grad_cache.micro_batch))
    if chunks := recipe.grad_cache.chunks(recipe.batch_size):
        encode = functools.partial(grad_cache.encode, model, chunks=chunks, groups=groups, mesh=mesh)
    else:
        encode = functools.partial(model.encode, train=True, depth=spec.depth)
    if spec.bn_groups > 1:
        encode = functools.partial(_by_groups, encode, spec)
    h, new = encode(own, of_encoder(stats, spec.encoder), rows, where=where, norm_set=spec.norm_set, key=key)
    mode = dict(train=True, where=where, norm_set=spec.norm_set, depth=spec.depth)
    z, new = model.embed(own, new, h, aug_params=_aug_params(model, parts, groups), **mode)
    return {
        embedding_name(spec.encoder, n): Embedding(hh, zz, views[n].where)
        for n, hh, zz in zip(names, _split(h, sizes, groups), _split(z, sizes, groups), strict=True)
    }, _with_encoder(stats, spec.encoder, new)


def _aug_params(model: Model, parts: list[View], groups: int) -> dict[str, Array]:
    """What the heads are told of several views' rows, stacked as `_together` stacks the rows themselves."""
    told = {}
    for name in model.head.embeds:
        each = [aug_param_numbers(name, view.params, len(view.image)) for view in parts]
        told[name] = _merge(each, groups)
    return told


def _by_groups(encode, spec: ForwardPass, params, stats, rows, *, where, norm_set, key):
    """`encode` on equal parts of the rows, each with batch norms of its own, as so many devices would; -> the same.

    Running statistics move to the mean of what the parts make of them.
    """
    order = jax.random.permutation(jax.random.fold_in(key, 1), len(rows)) if spec.shuffle else None

    def parts(x: Array) -> Array:
        x = x if order is None else x[order]
        return x.reshape(spec.bn_groups, -1, *x.shape[1:])

    def one(x: Array, exists: Array | None) -> tuple[Array, dict]:
        return encode(params, stats, x, where=exists, norm_set=norm_set, key=key)

    h, new = jax.vmap(one)(parts(rows), None if where is None else parts(where))
    h = h.reshape(-1, *h.shape[2:])
    return h if order is None else h[jnp.argsort(order)], jax.tree.map(lambda x: x.mean(0), new)


def _together(parts: list, *, always: bool = False) -> tuple[Array, Array | None, list[int], int]:
    """Several batches, each with .image and .where, as one -> (rows, which exist, sizes, groups for `_split`)."""
    images, wheres = [p.image for p in parts], [p.where for p in parts]
    sizes = [len(x) for x in images]
    # Equal views: row r of each side by side, so that rows stay on the device that holds them. Unequal views: one
    # after the other, or each micro-batch would get rows of one view only; then in as many parts as all fall into.
    groups = math.gcd(*sizes) if always or len(set(sizes)) == 1 else 1
    where = None
    if any(w is not None for w in wheres):
        wheres = [jnp.ones(len(x), bool) if w is None else w for w, x in zip(wheres, images, strict=True)]
        where = _merge(wheres, groups)
    return _merge(images, groups), where, sizes, groups


def run_heads(
    recipe: Recipe, params, stats, embeddings: dict[str, Embedding], views: dict[str, tuple[str, ...]]
) -> tuple[dict[str, Embedding], dict]:
    """Apply heads, each to the views named for it. -> (embeddings with the outputs, new statistics).

    An output goes with the embedding by the first of the head's encoders.
    """
    embeddings = dict(embeddings)
    for name, of in views.items():
        head, facts = recipe.heads[name], recipe.head_input(name)
        inputs = []
        for view in of:
            e = [embeddings[embedding_name(encoder, view)] for encoder in head.encoders]
            inputs.append(View(jnp.concatenate([getattr(x, head.reads) for x in e], -1), {}, e[0].where))
        for begin in range(0, len(of), len(of) if head.together else 1):
            part = slice(begin, len(of) if head.together else begin + 1)
            rows, where, sizes, groups = _together(inputs[part])
            own = stats.get("heads", {}).get(name, {})
            out, new = head.apply(facts, params["heads"][name], own, rows, train=True, where=where)
            stats = set_in(stats, "heads", name, new)
            for view, y in zip(of[part], _split(out, sizes, groups), strict=True):
                to = embedding_name(head.encoders[0], view)
                embeddings[to] = embeddings[to]._replace(out={**embeddings[to].out, name: y})
    return embeddings, stats


def _merge(arrays: list[Array], groups: int) -> Array:
    """Rows of all views, in groups that each hold an equal part of every view."""
    parts = [a.reshape(groups, len(a) // groups, *a.shape[1:]) for a in arrays]
    return jnp.concatenate(parts, axis=1).reshape(-1, *arrays[0].shape[1:])


def _split(array: Array, sizes: list[int], groups: int) -> list[Array]:
    """The rows of each view again, in their order."""
    array = array.reshape(groups, len(array) // groups, *array.shape[1:])
    if array.shape[1] == len(sizes):
        return [array[:, i] for i in range(len(sizes))]
    ends = [sum(sizes[: i + 1]) // groups for i in range(len(sizes) - 1)]
    return [a.reshape(-1, *array.shape[2:]) for a in jnp.split(array, ends, axis=1)]
