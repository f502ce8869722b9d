"""Tasks as a batch axis: vmap, or one task after another, and errors that explain.

A function of one task becomes a function of all: ``mapped(fn, axes)`` where ``axes``
follows the arguments' structure with 0 for a task axis and ``None`` for shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.func import vjp, vmap
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_EXPLANATIONS = {
    "data-dependent control flow": (
        "the model or the loss branches on the values of a tensor, which differ from "
        "task to task, so tasks can't run as one batch. Write the branch with "
        "torch.where, or pass vectorize=False to run one task after another"
    ),
    ".item() on a Tensor": (
        "the model or the loss calls .item(), whose value differs from task to task, "
        "so tasks can't run as one batch. Keep it a tensor, or pass vectorize=False to "
        "run one task after another"
    ),
    "random operation": (
        "the model or the loss draws random numbers, so the inner loop has no gradient "
        "of its own. Make the forward pass deterministic (p=0 or model.eval())"
    ),
    "inplace": (
        "the model or the loss writes in place into a tensor all tasks share, such as "
        "a buffer. Buffers are read-only inside an inner loop: write out of place"
    ),
}


def vectorized(fn: Callable[..., Any], axes: tuple[Any, ...]) -> Callable[..., Any]:
    """All tasks at once."""
    return vmap(fn, in_dims=axes)


def one_by_one(fn: Callable[..., Any], axes: tuple[Any, ...]) -> Callable[..., Any]:
    """One task after another, for functions that vmap can't batch."""

    def mapped(*arguments: Any) -> Any:
        flat, structure = tree_flatten(arguments)
        flat_axes, _ = tree_flatten(_like(axes, arguments))
        tasks = next(
            leaf.shape[0]
            for leaf, axis in zip(flat, flat_axes, strict=True)
            if axis >= 0
        )
        results = []
        for t in range(tasks):
            one = [
                leaf[t] if axis >= 0 else leaf
                for leaf, axis in zip(flat, flat_axes, strict=True)
            ]
            results.append(tree_flatten(fn(*tree_unflatten(one, structure))))
        leaves = [
            torch.stack(column) for column in zip(*(r[0] for r in results), strict=True)
        ]
        return tree_unflatten(leaves, results[0][1])

    return mapped


def _like(axes: Any, arguments: Any) -> Any:
    """The axes in the arguments' structure, with -1 for shared (None is no leaf)."""
    if isinstance(axes, dict):
        return {name: _like(axes[name], arguments[name]) for name in arguments}
    if isinstance(axes, tuple):
        return tuple(_like(a, b) for a, b in zip(axes, arguments, strict=True))
    return tree_map(lambda _: -1 if axes is None else axes, arguments)


def pullback(fn: Callable[[Any], Any], primal: Any) -> tuple[Any, Callable[[Any], Any]]:
    """``fn(primal)`` and its vector-Jacobian product, v -> J' v in primal's form."""
    value, pull = vjp(fn, primal)[:2]
    return value, lambda cotangent: pull(cotangent)[0]


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Adds to the errors of vmap what about the user's model causes them.

    Raises:
        RuntimeError: in place of the error, which becomes its cause.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        text = str(error)
        for sign, explanation in _EXPLANATIONS.items():
            if "vmap" in text and sign in text:
                raise RuntimeError(f"{what}: {explanation}") from error
        raise
