"""The cost of a program, counted from its jaxpr: matrix products and convolutions, and the memory it needs.

Nothing is compiled, so a network for a pod is counted in seconds. The model of memory follows compilers: results of
products, convolutions, reductions, gathers and loops are written to memory, and so are the inputs of products and
convolutions; everything else is recomputed where it is read, as in a fusion. An array is kept until its last reader.
"""

import math
from typing import Any, NamedTuple

from jax.extend import core as jex

PRODUCTS = ("dot_general", "conv_general_dilated")
# Element-wise and layout operations: they are fused into the operations around them.
VIRTUAL = {
    *(
        "abs",
        "add",
        "add_any",
        "and",
        "broadcast_in_dim",
        "ceil",
        "clamp",
        "convert_element_type",
        "copy",
        "cos",
        "div",
    ),
    *("eq", "erf", "erf_inv", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "iota", "is_finite", "le"),
    *("log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pad", "pow", "random_bits"),
    *("random_fold_in", "random_unwrap", "random_wrap", "real", "rem", "reshape", "rev", "round", "rsqrt", "select_n"),
    *("shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "slice", "sqrt", "square"),
    *("squeeze", "stop_gradient", "sub", "symbolic_zeros", "tan", "tanh", "threefry2x32", "transpose", "xor"),
    *("optimization_barrier", "pvary", "reduce_precision", "sharding_constraint", "expand_dims", "split", "copy_p"),
}


class Cost(NamedTuple):
    """flops: a product and a sum count as two. temporaries: the most bytes held at once, without inputs."""

    flops: float
    temporaries: float
    moved: float  # bytes of memory traffic, at least: each array once written, and each time it is read


def cost(jaxpr: Any) -> Cost:
    """The cost of a jaxpr from `jax.make_jaxpr(f)(...)`. A `while` counts as one iteration: the number is unknown."""
    walk = _Walk()
    peak = walk.run(getattr(jaxpr, "jaxpr", jaxpr))
    return Cost(walk.flops, peak, walk.moved)


def size(aval: Any) -> int:
    """Bytes of an array."""
    return math.prod(getattr(aval, "shape", ())) * getattr(getattr(aval, "dtype", None), "itemsize", 4)


class _Walk:
    def __init__(self):
        self.flops = self.moved = 0.0
        self.times = 1.0

    def run(self, jaxpr: Any) -> float:
        """Peak bytes of one program."""
        eqns = _flat(jaxpr)
        # 1. Which written arrays each value is computed from, and when each of these is last read.
        made: dict[Any, frozenset] = {}
        written: dict[Any, int] = {}  # array -> bytes
        begins: dict[Any, int] = {}
        ends: dict[Any, int] = {}

        def roots(v: Any) -> frozenset:
            return frozenset() if isinstance(v, jex.Literal) else made.get(v, frozenset())

        def write(v: Any, at: int) -> None:
            if v not in written and size(v.aval):
                written[v], begins[v], ends[v] = size(v.aval), at, at
                made[v] = frozenset([v])
                self.moved += self.times * size(v.aval)

        inner: dict[int, float] = {}
        for at, eqn in enumerate(eqns):
            name = eqn.primitive.name
            inputs = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
            if name in PRODUCTS:
                self.flops += self.times * _product(eqn)
                for v in inputs:
                    if v in made and v not in written and made[v]:
                        for r in made[v]:
                            ends[r] = at
                        write(v, at)
            for v in inputs:
                for r in roots(v):
                    ends[r] = at
                    if name not in VIRTUAL:
                        self.moved += self.times * written[r]
            if name in VIRTUAL:
                own = frozenset().union(*(roots(v) for v in inputs)) if inputs else frozenset()
                for v in eqn.outvars:
                    made[v] = own
                continue
            inner[at] = self._inside(eqn, name)
            for v in eqn.outvars:
                write(v, at)
        for v in jaxpr.outvars:
            for r in roots(v):
                ends[r] = len(eqns)
        # 2. The largest number of bytes held at once.
        change = [0.0] * (len(eqns) + 2)
        for v, n in written.items():
            change[begins[v]] += n
            change[ends[v] + 1] -= n
        held = peak = 0.0
        for at in range(len(eqns)):
            held += change[at]
            peak = max(peak, held + inner.get(at, 0.0))
        return peak

    def _inside(self, eqn: Any, name: str) -> float:
        """Peak bytes of the programs inside an instruction that is not inlined."""
        before = self.times
        if name == "scan":
            self.times *= eqn.params["length"]
        bodies = [b for p in eqn.params.values() for b in (p if isinstance(p, (list, tuple)) else (p,)) if _is(b)]
        flops, most, peak = self.flops, 0.0, 0.0
        for body in bodies:
            if name == "cond":
                self.flops = flops
            peak = max(peak, self.run(getattr(body, "jaxpr", body)))
            most = max(most, self.flops)
        if name == "cond":
            self.flops = max(most, flops)
        self.times = before
        return peak


def _is(x: Any) -> bool:
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


INLINED = (
    "pjit",
    "jit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat",
    "remat2",
    "checkpoint",
)


class _Inlined(NamedTuple):
    primitive: Any
    invars: list
    outvars: list
    params: dict


def _flat(jaxpr: Any) -> list[Any]:
    """The instructions with calls inlined: arguments and results of a call are the caller's arrays."""
    out: list[Any] = []

    def visit(jaxpr: Any, names: dict[Any, Any]) -> None:
        def here(v: Any) -> Any:
            return v if isinstance(v, jex.Literal) else names.get(v, v)

        for eqn in jaxpr.eqns:
            invars = [here(v) for v in eqn.invars]
            body = next((eqn.params[k] for k in ("jaxpr", "call_jaxpr", "fun_jaxpr") if k in eqn.params), None)
            if eqn.primitive.name not in INLINED or body is None:
                outvars = [_Fresh(v.aval) for v in eqn.outvars]
                names.update(zip(eqn.outvars, outvars, strict=True))
                out.append(_Inlined(eqn.primitive, invars, outvars, eqn.params))
                continue
            body = getattr(body, "jaxpr", body)
            # A body may be called several times, each time with new arrays.
            own = dict(zip(body.invars, invars, strict=True))
            visit(body, own)
            for v, w in zip(eqn.outvars, body.outvars, strict=True):
                names[v] = w if isinstance(w, jex.Literal) else own.get(w, w)

    names: dict[Any, Any] = {}
    visit(jaxpr, names)
    out.append(_Inlined(_End, [v if isinstance(v, jex.Literal) else names.get(v, v) for v in jaxpr.outvars], [], {}))
    return out


class _Fresh:
    """An array in one call."""

    def __init__(self, aval: Any):
        self.aval = aval


class _End:
    name = "end"


def _product(eqn: Any) -> float:
    out = eqn.outvars[0].aval.shape
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        left = eqn.invars[0].aval.shape
        return 2.0 * math.prod(out) * math.prod(left[i] for i in contracted)
    kernel, spec = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
    # Each output value is a sum over the kernel's window and its input channels. Zeros between the pixels of a dilated
    # input cost nothing.
    window = math.prod(kernel[i] for i in spec[2:]) * kernel[spec[1]]
    return 2.0 * math.prod(out) * window / math.prod(eqn.params["lhs_dilation"])
