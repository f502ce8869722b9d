"""Policies: a network, the distribution that its outputs stand for, and their losses.

Losses, gradients and products with Hessians come from an engine, one per loss, all on
the same network. Outputs become densities, divergences and actions here, without a
graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fastmaml import losses
from fastmaml.engines.base import Engine, Params
from fastmaml.learners.selection import EngineChoice, select_engine
from fastmaml.losses import resolve_loss
from fastmaml.rl.dice import log_slopes, trajectory_credits
from fastmaml.rl.trajectories import Samples

Kind = Literal["gaussian", "categorical"]
Product = Callable[[Params], dict[str, Tensor]]  # of a matrix with a vector
InnerLoss = Literal["reinforce", "likelihood_ratio", "dice"]
INNER_LOSSES = ("reinforce", "likelihood_ratio", "dice")


@dataclass(frozen=True)
class Distribution:
    """What the outputs of a policy mean.

    Attributes:
        losses: names of its policy-gradient, likelihood-ratio and KL losses.
        log_probability: (outputs [..., Z], actions [..., A]) -> [...].
        divergence: KL(old || new) of (new outputs, old outputs) -> [...].
        fisher_roots: outputs [N, Z] -> [R, N, Z], whose outer products add up to the
            Fisher information of the outputs.
        sample: (outputs [..., Z], noise [..., A]) -> actions [..., A].
        normal: whether that noise is normal, else uniform in [0, 1).
    """

    losses: tuple[str, str, str]
    log_probability: Callable[[Tensor, Tensor], Tensor]
    divergence: Callable[[Tensor, Tensor], Tensor]
    fisher_roots: Callable[[Tensor], Tensor]
    sample: Callable[[Tensor, Tensor], Tensor]
    normal: bool


def _gaussian(outputs: Tensor, noise: Tensor) -> Tensor:
    mean, log_std = losses.gaussian_parameters(outputs)
    return torch.addcmul(mean, log_std.exp(), noise)


def _categorical(outputs: Tensor, noise: Tensor) -> Tensor:
    below = outputs.softmax(-1).cumsum(-1) <= noise
    number = below.sum(-1, keepdim=True).clamp_max(outputs.shape[-1] - 1)
    return number.to(outputs.dtype)


def _gaussian_roots(outputs: Tensor) -> Tensor:
    _, log_std = losses.gaussian_parameters(outputs)
    moves = log_std == outputs.chunk(2, -1)[1]  # the floor does not
    root = math.sqrt(2) * moves.to(outputs.dtype)
    scales = torch.cat([torch.exp(-log_std), root], -1)
    return torch.diag_embed(scales).movedim(-2, 0)


def _categorical_roots(outputs: Tensor) -> Tensor:
    p = outputs.softmax(-1)
    eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    return (p.sqrt().unsqueeze(-1) * (eye - p.unsqueeze(-2))).movedim(-2, 0)


DISTRIBUTIONS: dict[Kind, Distribution] = {
    "gaussian": Distribution(
        ("policy_gradient", "likelihood_ratio", "gaussian_kl"),
        losses.gaussian_log_probability,
        losses.gaussian_divergence,
        _gaussian_roots,
        _gaussian,
        True,
    ),
    "categorical": Distribution(
        (
            "categorical_policy_gradient",
            "categorical_likelihood_ratio",
            "categorical_kl",
        ),
        losses.categorical_log_probability,
        losses.categorical_divergence,
        _categorical_roots,
        _categorical,
        False,
    ),
}


class Policy:
    """A network that acts, and what can be differentiated about it.

    Args:
        model: observations [N, O] to outputs [N, Z]: means and logs of the standard
            deviations (``gaussian``), or scores (``categorical``). Its parameters are
            what is meta-learned; all of them are adapted.
        kind: of distribution.
        inner_loss: ``reinforce``, -mean(log pi A); or ``likelihood_ratio``,
            -mean(pi / old A), of the same gradient and another Hessian, with which the
            meta-gradient also credits what is sampled before adapting; or ``dice``,
            whose Hessian credits each step for all of its trajectory, without the
            ratio's bias and with more variance (`fastmaml.rl.dice`).
        engine: ``auto``, ``native`` or ``functional``.

    Raises:
        ValueError: for an unknown ``kind`` or ``inner_loss``, or a model the asked-for
            engine can't run.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: Kind = "gaussian",
        *,
        inner_loss: InnerLoss = "reinforce",
        engine: str = "auto",
    ) -> None:
        if kind not in DISTRIBUTIONS:
            raise ValueError(f"kind={kind!r}: expected 'gaussian' or 'categorical'")
        if inner_loss not in INNER_LOSSES:
            raise ValueError(
                f"inner_loss={inner_loss!r}: expected one of {', '.join(INNER_LOSSES)}"
            )
        self.model = model
        self.kind: Kind = kind
        self.inner_loss: InnerLoss = inner_loss
        self.distribution = DISTRIBUTIONS[kind]
        gradient, ratio, divergence = self.distribution.losses
        inner = ratio if inner_loss == "likelihood_ratio" else gradient
        self.inner, self.report = _engine(model, inner, engine)
        self.score = self.inner
        if inner != gradient:
            self.score, _ = _engine(model, gradient, engine)
        self.divergence, _ = _engine(model, divergence, engine)

    def parameters(self) -> dict[str, Tensor]:
        """The network's own, name -> [...], without a graph."""
        return {n: p.detach() for n, p in self.model.named_parameters()}

    def outputs(self, params: Params, x: Tensor) -> Tensor:
        """Outputs [T, N, Z] for observations [T, N, O]."""
        return self.inner.forward(params, x)

    def log_probability(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """Log density [T, N] of actions [T, N, A] under outputs [T, N, Z]."""
        return self.distribution.log_probability(outputs, actions)

    def inner_target(self, samples: Samples) -> Tensor:
        """Targets [T, N, .] of the inner loss."""
        parts = [samples.actions, samples.advantages.unsqueeze(-1)]
        if self.inner_loss == "likelihood_ratio":
            old = self.log_probability(samples.outputs, samples.actions)
            parts.append(old.unsqueeze(-1))
        return torch.cat(parts, -1)

    def inner_hessian(
        self, params: Params, samples: Samples, target: Tensor, *, many: bool = False
    ) -> Product:
        """The Hessian of the inner loss, for products with many vectors.

        Args:
            params: name -> [T, ...]; they must not change between products.
            samples: of the inner loss.
            target: of :meth:`inner_target` for them.
            many: there will be more than one product.

        Returns:
            The map from v, name -> [T, ...], to the Hessian times v.
        """
        hvp = self.inner.curvature(params, samples.x, target, many=many).hvp
        if self.inner_loss != "dice":
            return hvp

        def product(v: Params) -> dict[str, Tensor]:
            slopes = log_slopes(self.model, self.log_probability, params, samples, v)
            credits = trajectory_credits(samples.advantages, slopes, samples.length)
            score = self.score_target(samples, credits)
            _, more = self.score.value_and_grad(params, samples.x, score)
            return {n: h + more[n] for n, h in hvp(v).items()}

        return product

    def score_target(self, samples: Samples, advantages: Tensor) -> Tensor:
        """Targets [T, N, A + 1] of -mean(log pi A) for these advantages [T, N]."""
        return torch.cat([samples.actions, advantages.unsqueeze(-1)], -1)

    def divergence_target(self, samples: Samples, outputs: Tensor) -> Tensor:
        """Targets [T, N, Z + 1] of the mean of KL(outputs || pi)."""
        return torch.cat([outputs, samples.weights.unsqueeze(-1)], -1)


def _engine(model: nn.Module, loss: str, engine: str) -> tuple[Engine, object]:
    return select_engine(model, resolve_loss(loss), EngineChoice(engine=engine))
