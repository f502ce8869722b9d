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

LOG_STD_FLOOR = math.log(1e-6)
"""Logs of standard deviations of a policy count as this where they are below it."""

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


def gaussian_parameters(output: Tensor) -> tuple[Tensor, Tensor]:
    """Means and logs of the standard deviations, the latter floored.

    Args:
        output: [..., 2A], means and then logs of the standard deviations.

    Returns:
        Two tensors [..., A].
    """
    mean, log_std = output.chunk(2, dim=-1)
    return mean, log_std.clamp_min(LOG_STD_FLOOR)


def gaussian_log_probability(output: Tensor, actions: Tensor) -> Tensor:
    """Log density of actions under a diagonal Gaussian.

    Args:
        output: [..., 2A], means and then logs of the standard deviations.
        actions: [..., A].

    Returns:
        [...] log densities.
    """
    mean, log_std = gaussian_parameters(output)
    z = (actions - mean) * torch.exp(-log_std)
    return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def categorical_log_probability(output: Tensor, actions: Tensor) -> Tensor:
    """Log probability of actions under a softmax of scores.

    Args:
        output: [..., O] scores.
        actions: [..., 1] whole numbers below O, of any dtype.

    Returns:
        [...] log probabilities.
    """
    return F.log_softmax(output, -1).gather(-1, actions.long()).squeeze(-1)


def gaussian_divergence(output: Tensor, old: Tensor) -> Tensor:
    """KL(old || new) of diagonal Gaussians.

    Args:
        output: [..., 2A], the new means and logs of the standard deviations.
        old: [..., 2A], the old ones.

    Returns:
        [...] in nats.
    """
    (mean, log_std), (mean0, log_std0) = map(gaussian_parameters, (output, old))
    ratio = torch.exp(2 * (log_std0 - log_std))
    error = (mean - mean0) * torch.exp(-log_std)
    return (log_std - log_std0 + 0.5 * (ratio + error.square() - 1)).sum(-1)


def categorical_divergence(output: Tensor, old: Tensor) -> Tensor:
    """KL(old || new) of softmax distributions.

    Args:
        output: [..., O] the new scores.
        old: [..., O] the old ones.

    Returns:
        [...] in nats.
    """
    log_p, log_p0 = F.log_softmax(output, -1), F.log_softmax(old, -1)
    return (log_p0.exp() * (log_p0 - log_p)).sum(-1)


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


def likelihood_ratio(output: Tensor, target: Tensor) -> Tensor:
    """Negative mean of the ratio of new to old density times the advantage.

    Args:
        output: [N, 2A], means and then logs of the standard deviations.
        target: [N, A + 2], actions, the advantage, and the log density of the action
            when it was sampled.

    Returns:
        [] loss.
    """
    log_probability = gaussian_log_probability(output, target[..., :-2])
    return -(torch.exp(log_probability - target[..., -1]) * target[..., -2]).mean()


def gaussian_kl(output: Tensor, target: Tensor) -> Tensor:
    """Mean of KL(old || new) times a weight.

    Where both are the same, its Hessian in the outputs is the Fisher information.

    Args:
        output: [N, 2A], means and then logs of the standard deviations.
        target: [N, 2A + 1], the old outputs and then the weight.

    Returns:
        [] loss.
    """
    return (gaussian_divergence(output, target[..., :-1]) * target[..., -1]).mean()


def categorical_policy_gradient(output: Tensor, target: Tensor) -> Tensor:
    """As :func:`policy_gradient`, for scores [N, O] and a target [N, 2]."""
    log_probability = categorical_log_probability(output, target[..., :1])
    return -(log_probability * target[..., -1]).mean()


def categorical_likelihood_ratio(output: Tensor, target: Tensor) -> Tensor:
    """As :func:`likelihood_ratio`, for scores [N, O] and a target [N, 3]."""
    log_probability = categorical_log_probability(output, target[..., :1])
    return -(torch.exp(log_probability - target[..., -1]) * target[..., -2]).mean()


def categorical_kl(output: Tensor, target: Tensor) -> Tensor:
    """As :func:`gaussian_kl`, for scores [N, O] and a target [N, O + 1]."""
    return (categorical_divergence(output, target[..., :-1]) * target[..., -1]).mean()


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
        name: of a built-in loss (`BUILT_IN`) or of the user's callable.
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
    "likelihood_ratio": likelihood_ratio,
    "gaussian_kl": gaussian_kl,
    "categorical_policy_gradient": categorical_policy_gradient,
    "categorical_likelihood_ratio": categorical_likelihood_ratio,
    "categorical_kl": categorical_kl,
}

POLICY_TARGETS: dict[str, tuple[Callable[[int], int], str]] = {
    "policy_gradient": (lambda o: o // 2 + 1, "[N, A+1]: actions and the advantage"),
    "likelihood_ratio": (
        lambda o: o // 2 + 2,
        "[N, A+2]: actions, the advantage and the old log density",
    ),
    "gaussian_kl": (lambda o: o + 1, "[N, 2A+1]: the old outputs and a weight"),
    "categorical_policy_gradient": (
        lambda o: 2,
        "[N, 2]: the action and the advantage",
    ),
    "categorical_likelihood_ratio": (
        lambda o: 3,
        "[N, 3]: the action, the advantage and the old log probability",
    ),
    "categorical_kl": (lambda o: o + 1, "[N, O+1]: the old scores and a weight"),
}
"""For each policy loss, outputs -> numbers of a target, and what they are."""


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
