"""Losses of one task, and the accuracy that goes with classification.

Each takes the outputs and targets of one task and returns a scalar; engines put the
task axis around it. The native engine implements the same formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

LossCallable = Callable[[Tensor, Tensor], Tensor]
Reduction = Literal["mean", "sum_over_ways"]


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean-squared error.

    Args:
        output: [N, O].
        target: [N, O].

    Returns:
        [] mean over samples and outputs.
    """
    return (output - target).square().mean()


def cross_entropy(
    output: Tensor, target: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """Cross-entropy of class scores.

    Args:
        output: [N, ways] scores before the softmax.
        target: [N] int64 classes.
        reduction: ``mean`` over samples, or ``sum_over_ways``, which is ``ways``
            times the mean: what the reference code of MAML minimises, so that its
            inner rate of 0.4 on 5 ways equals 2.0 on a mean.

    Returns:
        [] loss.
    """
    log_probability = F.log_softmax(output, dim=-1)
    mean = -log_probability.gather(-1, target.unsqueeze(-1)).mean()
    return mean * output.shape[-1] if reduction == "sum_over_ways" else mean


def gaussian_log_probability(output: Tensor, actions: Tensor) -> Tensor:
    """Log density of actions under a diagonal Gaussian.

    Args:
        output: [N, 2A], means and then logs of the standard deviations.
        actions: [N, A].

    Returns:
        [N] log densities.
    """
    mean, log_std = output.chunk(2, dim=-1)
    z = (actions - mean) * torch.exp(-log_std)
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def policy_gradient(output: Tensor, target: Tensor) -> Tensor:
    """Negative mean of the log density of actions times their advantage.

    Args:
        output: [N, 2A], means and then logs of the standard deviations.
        target: [N, A + 1], actions and then the advantage.

    Returns:
        [] loss; its gradient is the policy gradient with a minus sign.
    """
    log_probability = gaussian_log_probability(output, target[..., :-1])
    return -(log_probability * target[..., -1]).mean()


def accuracy(output: Tensor, target: Tensor) -> Tensor:
    """Share of samples whose highest score is the target class.

    Args:
        output: [N, ways].
        target: [N] int64 classes.

    Returns:
        [] in [0, 1], of the outputs' dtype.
    """
    return (output.argmax(-1) == target).to(output.dtype).mean()


@dataclass(frozen=True)
class Loss:
    """A loss as learners and engines hand it around.

    Attributes:
        name: ``mse``, ``cross_entropy``, ``policy_gradient``, or the name of the
            user's callable.
        reduction: as asked for.
        function: (output [N, ...], target [N, ...]) -> [].
        accuracy: likewise, for classification; else ``None``.
        native: whether the name means a built-in loss.
    """

    name: str
    reduction: Reduction
    function: LossCallable
    accuracy: LossCallable | None = None
    native: bool = True


def _cross_entropy_over_ways(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target, "sum_over_ways")


BUILT_IN: dict[str, LossCallable] = {
    "mse": mse,
    "cross_entropy": cross_entropy,
    "policy_gradient": policy_gradient,
}


def resolve_loss(loss: str | LossCallable, reduction: str = "mean") -> Loss:
    """Looks up a loss by name, or wraps a callable.

    Raises:
        ValueError: for an unknown name or a reduction the loss doesn't have.
        TypeError: if ``loss`` is neither a name nor callable.
    """
    if reduction not in ("mean", "sum_over_ways"):
        raise ValueError(f"reduction={reduction!r}: expected 'mean' or 'sum_over_ways'")
    if reduction == "sum_over_ways" and loss != "cross_entropy":
        raise ValueError(
            "reduction='sum_over_ways' belongs to loss='cross_entropy', got "
            f"loss={loss!r}; use reduction='mean', or scale inside your own callable"
        )
    if isinstance(loss, str):
        return _built_in(loss, reduction)
    if not callable(loss):
        raise TypeError(
            f"loss: expected one of {sorted(BUILT_IN)} or a callable "
            f"(output [N, ...], target [N, ...]) -> scalar, got {type(loss).__name__}"
        )
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    return Loss(name, "mean", loss, native=False)


def _built_in(name: str, reduction: str) -> Loss:
    if name not in BUILT_IN:
        raise ValueError(
            f"loss={name!r}: expected one of {sorted(BUILT_IN)} or a callable "
            "(output [N, ...], target [N, ...]) -> scalar"
        )
    if reduction == "sum_over_ways":
        return Loss(name, "sum_over_ways", _cross_entropy_over_ways, accuracy)
    scored = accuracy if name == "cross_entropy" else None
    return Loss(name, "mean", BUILT_IN[name], scored)
