"""The arrays that pass between the parts of a program: their size, and whether they are finite.

A program is traced, and every array is named by the scope (`jaxcl.method.scopes`) and the layer that made it. Arrays
that only the code of that layer reads, in the forward or the backward pass, are left out: a masked logit of -inf is no
fault as long as it stays inside a loss. Nothing has to be written for it in the parts, so it works with anybody's.

K watched arrays.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from jaxcl.method.scopes import MARK

Tree = Any
_AROUND = re.compile(r"^(?:\w+\()+|\)+$")  # transformations around a name, as in vmap(jvp(name))
_BODIES = ("jaxpr", "call_jaxpr", "body_jaxpr")  # parameters of operations that contain others


@dataclasses.dataclass(frozen=True)
class Watched:
    """One array of a program.

    Attributes:
      name: "SCOPE: LAYER" of the code that made it, such as "encode view1: ResNet/stages_0_0/conv1"; of an input or an
        output, its path in their tree.
      backward: made by the backward pass.
      operation: of JAX, that made it, such as "dot_general"; "" of an input.
      shape: of the array.
    """

    name: str
    backward: bool
    operation: str
    shape: tuple[int, ...]


def watched(function: Callable[..., dict[str, Tree]]) -> tuple[Callable[..., Any], list[Watched]]:
    """A function that also measures the arrays inside of another one; use it under one `jax.jit`.

    Args:
      function: takes dictionaries of trees by keyword and returns one. The keywords and keys begin the names of inputs
        and outputs: "state: params/encoder/conv1/kernel".

    Returns:
      The function, which returns (what `function` returns, largest finite magnitude float32 [K], entries that are not
      finite int32 [K]), and a list that is filled when it is traced: the K arrays in the order in which the program
      makes them, its inputs first.
    """
    found: list[Watched] = []

    def run(**inputs: Tree) -> tuple[dict[str, Tree], jax.Array, jax.Array]:
        closed, shapes = jax.make_jaxpr(lambda given: function(**given), return_shape=True)(inputs)
        chosen = _chosen(closed.jaxpr, _paths(inputs), _paths(shapes))
        found[:] = [watch for watch, _ in chosen]
        outvars = [*closed.jaxpr.outvars, *(var for _, var in chosen)]
        jaxpr = closed.jaxpr.replace(outvars=outvars, debug_info=closed.jaxpr.debug_info._replace(result_paths=None))
        values = jaxpr_as_fun(ClosedJaxpr(jaxpr, closed.consts))(*jax.tree.leaves(inputs))
        count = len(closed.jaxpr.outvars)
        largest, faults = zip(*map(_measured, values[count:]), strict=True)
        return jax.tree.unflatten(jax.tree.structure(shapes), values[:count]), jnp.stack(largest), jnp.stack(faults)

    return run, found


def _measured(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    finite = jnp.isfinite(x)
    size = jnp.where(finite, jnp.abs(x), 0).astype(jnp.float32)
    return jnp.max(size, initial=0.0), jnp.sum(~finite, dtype=jnp.int32)


def _paths(tree: dict[str, Tree]) -> list[str]:
    """The name of each leaf: "state: params/encoder/conv1/kernel"."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [": ".join(filter(None, _path(path).partition("/")[::2])) for path, _ in leaves]


def _path(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _chosen(jaxpr: Any, inputs: list[str], outputs: list[str]) -> list[tuple[Watched, Any]]:
    """The variables to watch, in order."""
    chosen = [(Watched(n, False, "", v.aval.shape), v) for n, v in zip(inputs, jaxpr.invars, strict=True) if _real(v)]
    place_of = [_place(str(eqn.source_info.name_stack)) for eqn in jaxpr.eqns]
    readers: dict[Any, set[Any]] = {}
    for eqn, place in zip(jaxpr.eqns, place_of, strict=True):
        for var in eqn.invars:
            if _variable(var):
                readers.setdefault(var, set()).add(place)
    output_of = {var: name for var, name in zip(jaxpr.outvars, outputs, strict=True) if _variable(var)}
    for eqn, place in zip(jaxpr.eqns, place_of, strict=True):
        for i, var in enumerate(eqn.outvars):
            if _real(var) and (var in output_of or readers.get(var, set()) - {place}):
                stack = _stack(eqn, i)
                name = ": ".join(filter(None, _place(stack)))
                if output := output_of.get(var):
                    name = f"{name} -> {output}" if name else output
                operation = eqn.params.get("name") if eqn.primitive.name in ("jit", "pjit") else None
                operation = operation or eqn.primitive.name
                chosen.append((Watched(name or operation, "transpose(" in stack, operation, var.aval.shape), var))
    return chosen


def _variable(var: Any) -> bool:
    return not hasattr(var, "val")  # a literal


def _real(var: Any) -> bool:
    dtype = getattr(var.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _stack(eqn: Any, output: int) -> str:
    """The names around an operation; of one that contains others, those around the one that made this output."""
    stack = str(eqn.source_info.name_stack)
    body = next((eqn.params[key] for key in _BODIES if key in eqn.params), None)
    if body is None:
        return stack
    body = getattr(body, "jaxpr", body)
    if output < len(body.outvars):
        for inner in body.eqns:
            if body.outvars[output] in inner.outvars:
                return f"{stack}/{_stack(inner, inner.outvars.index(body.outvars[output]))}"
    return stack


def _place(stack: str) -> tuple[str, str]:
    """(scope, layer) of names such as "transpose(jvp(scope:encode view1))/ResNet/ResNet.maps/conv1"."""
    names = [_AROUND.sub("", name) for name in stack.split("/")]
    scopes = [name.removeprefix(MARK) for name in names if name.startswith(MARK)]
    # Flax also names methods ("ResNet.maps"), and NumPy's functions name themselves ("nsh,nhw->nsw").
    layers = [name for name in names if name and not name.startswith(MARK) and not re.search(r"[.>]", name)]
    return (scopes[0] if scopes else ""), "/".join(layers)
