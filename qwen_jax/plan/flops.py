"""Floating-point operations of a traced function, recomputation included."""

import math
from typing import Any

from jax.extend import core

# Products that splash's kernels make of queries and keys. The backward pass makes 5 in one kernel
# or, for long rows, 4 and 3 in two.
_SPLASH_PRODUCTS = {"fwd": 2, "dkv": 4, "dq": 3}


def count(jaxpr: Any, open_turns: float = 1.0) -> tuple[float, float]:
    """(FLOPs of matrix products, FLOPs of fused attention) of a whole program over all devices.

    Loops count as often as they turn, those whose end depends on the data `open_turns` times.
    Causal kernels count half of the square.
    """
    jaxpr = _inner(jaxpr)
    products, attention = 0.0, 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "dot_general":
            products += _dot(eqn)
        elif name == "pallas_call":
            attention += _pallas(eqn)
        elif name.startswith("dot_product_attention"):
            attention += _cudnn(eqn)
        else:
            times = open_turns if name == "while" else _times(eqn)
            for inner in core.jaxprs_in_params(eqn.params):
                more = count(inner, open_turns)
                products, attention = products + times * more[0], attention + times * more[1]
    return products, attention


def open_loops(jaxpr: Any) -> int:
    """How many loops end when their data say so."""
    found = 0
    for eqn in _inner(jaxpr).eqns:
        found += eqn.primitive.name == "while"
        found += sum(open_loops(inner) for inner in core.jaxprs_in_params(eqn.params))
    return found


def _inner(jaxpr: Any) -> Any:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _times(eqn) -> float:
    """How often what is inside an equation runs, over all devices."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "shard_map":
        return math.prod(eqn.params["mesh"].shape.values())  # ours are over the whole mesh
    return 1


def _dot(eqn) -> float:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)


def _square(shape: tuple[int, ...], length_axis: int) -> float:
    """FLOPs of one causal product of queries of this shape with keys of the same length."""
    return 2.0 * math.prod(shape) * shape[length_axis] / 2


def _pallas(eqn) -> float:
    kernel = str(eqn.params["name"])
    kinds = [kind for kind in _SPLASH_PRODUCTS if f"_{kind}" in kernel]
    if "splash" not in kernel or not kinds:
        raise ValueError(f"pallas kernel {kernel!r}: its work is not known here")
    queries = next(v.aval for v in eqn.invars if v.aval.ndim >= 3 and v.aval.dtype.kind != "i")
    products = _SPLASH_PRODUCTS[kinds[0]]
    if kinds[0] == "dkv" and len(eqn.outvars) > 2:  # the gradient of the queries as well
        products = 5
    return products * _square(queries.shape, -2)


def _cudnn(eqn) -> float:
    queries = eqn.invars[0].aval  # [B, L, N, H]
    products = 5 if "bwd" in eqn.primitive.name else 2
    return products * _square(queries.shape, -3)
