"""Trust-region policy optimisation of the meta-parameters.

With theta_K the adapted parameters of a task, the step maximises the surrogate of
post-update policies within a mean divergence from what they were:

    minimise L(theta)  = mean over tasks of -mean(pi / old A)      at theta_K(theta)
    subject to             mean over tasks of KL(old || pi) <= max_kl

by d = B^-1 g, B = mean J' F J + damping I, from conjugate gradients, and backtracking
from the step sqrt(2 max_kl / d'B d) d until loss and divergence are both met.

Source:
    Schulman et al. 2015, "Trust region policy optimization"; appendix A.2 of Finn et
    al. 2017.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Trpo:
    """Settings of the step.

    Attributes:
        max_kl: the mean divergence a step may reach, in nats.
        cg_iterations: of the conjugate gradients.
        damping: added to the diagonal of J' F J.
        backtrack: factor between the steps that are tried.
        max_backtracks: steps that are tried.
        preconditioner: of the conjugate gradients: ``none``, as in the paper, or
            ``kronecker``, with which one or two iterations come further than ten
            without (`fastmaml.rl.kronecker`).
    """

    max_kl: float = 0.01
    cg_iterations: int = 10
    damping: float = 1e-5
    backtrack: float = 0.8
    max_backtracks: int = 15
    preconditioner: Literal["none", "kronecker"] = "none"


@dataclass(frozen=True)
class StepReport:
    """What became of a step.

    Attributes:
        accepted: whether the parameters were changed.
        loss_before: the surrogate at the old parameters.
        loss: at the new ones (at the old ones if the step was refused).
        kl: the mean divergence at the new ones, likewise.
        backtracks: steps refused before the one that was accepted, or all.
    """

    accepted: bool
    loss_before: float
    loss: float
    kl: float
    backtracks: int


def conjugate_gradients(
    product: Product,
    b: Tensor,
    iterations: int,
    tolerance: float = 1e-10,
    precondition: Product | None = None,
) -> tuple[Tensor, Tensor]:
    """Solves B x = b for a positive definite B by its products with vectors.

    Args:
        product: v [P] -> B v [P].
        b: [P].
        iterations: at most.
        tolerance: stops where the squared residual falls below it.
        precondition: v [P] -> M^-1 v [P], M positive definite and close to B.

    Returns:
        x [P] and the residual b - B x [P]. A direction without curvature, as rounding
        and noise may make it, ends the search with what has been found.
    """
    x, r = torch.zeros_like(b), b.clone()
    z = r if precondition is None else precondition(r)
    p, rz = z.clone(), r.dot(z)
    for _ in range(iterations):
        if not r.dot(r) > tolerance:
            break
        bp = product(p)
        curvature = p.dot(bp)
        if not (curvature > 0 and math.isfinite(curvature)):
            break
        alpha = rz / curvature
        x = x + alpha * p
        r = r - alpha * bp
        z = r if precondition is None else precondition(r)
        rz, before = r.dot(z), rz
        p = z + (rz / before) * p
    return x, r


def trust_region_step(
    theta: Tensor,
    gradient: Tensor,
    product: Product,
    evaluate: Callable[[Tensor], tuple[float, float]],
    loss_before: float,
    settings: Trpo,
    precondition: Product | None = None,
) -> tuple[Tensor, StepReport]:
    """One step of trust-region optimisation.

    Args:
        theta: [P] float64.
        gradient: [P] of the loss at ``theta``.
        product: v [P] -> J' F J v [P], without damping.
        evaluate: theta [P] -> (loss, divergence from the old policies).
        loss_before: the loss at ``theta``.
        settings: of the step.
        precondition: of the conjugate gradients; not called for a gradient that is
            not finite.

    Returns:
        The new parameters, which are ``theta`` itself where no step lowered the loss
        within the allowed divergence, and what happened.
    """
    refused = StepReport(False, loss_before, loss_before, 0.0, 0)
    if not bool(torch.isfinite(gradient).all()):
        return theta, refused

    def damped(v: Tensor) -> Tensor:
        return product(v) + settings.damping * v

    direction, residual = conjugate_gradients(
        damped, gradient, settings.cg_iterations, precondition=precondition
    )
    curvature = float(direction.dot(gradient - residual))  # d' B d, at no product
    size = math.sqrt(2 * settings.max_kl / curvature) if curvature > 0 else math.nan
    if not math.isfinite(size):
        return theta, refused
    for k in range(settings.max_backtracks):
        candidate = theta - size * settings.backtrack**k * direction
        loss, kl = evaluate(candidate)
        # written so that NaN is refused
        if math.isfinite(loss) and loss < loss_before and kl <= settings.max_kl:
            return candidate, StepReport(True, loss_before, loss, kl, k)
    count = settings.max_backtracks
    return theta, StepReport(False, loss_before, loss_before, 0.0, count)
