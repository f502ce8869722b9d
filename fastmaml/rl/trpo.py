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
Quadratic = Callable[[Tensor], float]


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
    quadratic: Quadratic | None = None,
) -> tuple[Tensor, float]:
    """Solves B x = b for a positive definite B by its products with vectors.

    Args:
        product: v [P] -> B v [P].
        b: [P].
        iterations: at most.
        tolerance: stops where the squared residual falls below it.
        precondition: v [P] -> M^-1 v [P], M positive definite and close to B.
        quadratic: v [P] -> v'B v, all that the last iteration needs; without it, there
            is a product there, too.

    Returns:
        x [P] and x'B x. A direction without curvature, as rounding and noise may make
        it, ends the search with what has been found.
    """
    x, r, square = torch.zeros_like(b), b.clone(), 0.0
    z = r if precondition is None else precondition(r)
    p, rz = z.clone(), float(r.dot(z))
    for i in range(iterations):
        if not r.dot(r) > tolerance:
            break
        ending = i + 1 == iterations
        if ending and quadratic is not None:
            curvature = quadratic(p)
        else:
            bp = product(p)
            curvature = float(p.dot(bp))
        if not (curvature > 0 and math.isfinite(curvature)):
            break
        alpha = rz / curvature
        # (x + alpha p)'B (x + alpha p), where B x = b - r
        square += alpha * (2 * float(p.dot(b - r)) + alpha * curvature)
        x = x + alpha * p
        if ending:
            break
        r = r - alpha * bp
        z = r if precondition is None else precondition(r)
        before, rz = rz, float(r.dot(z))
        p = z + (rz / before) * p
    return x, square


def trust_region_step(
    theta: Tensor,
    gradient: Tensor,
    product: Product,
    evaluate: Callable[[Tensor], tuple[float, float]],
    loss_before: float,
    settings: Trpo,
    precondition: Product | None = None,
    quadratic: Quadratic | None = None,
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
        quadratic: v [P] -> v'J' F J v, without damping, where that is less work than a
            product.

    Returns:
        The new parameters, which are ``theta`` itself where no step lowered the loss
        within the allowed divergence, and what happened.
    """
    refused = StepReport(False, loss_before, loss_before, 0.0, 0)
    if not bool(torch.isfinite(gradient).all()):
        return theta, refused

    def damped(v: Tensor) -> Tensor:
        return product(v) + settings.damping * v

    def damped_square(v: Tensor) -> float:
        assert quadratic is not None
        return quadratic(v) + settings.damping * float(v.dot(v))

    direction, curvature = conjugate_gradients(
        damped,
        gradient,
        settings.cg_iterations,
        precondition=precondition,
        quadratic=None if quadratic is None else damped_square,
    )
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
