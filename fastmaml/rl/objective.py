"""The meta-objective on fixed trajectories: its value, gradient and Fisher products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmaml.engines.base import Params
from fastmaml.rl.adaptation import Adaptation, Flat, Named, adapt, for_each_task
from fastmaml.rl.kronecker import KroneckerPreconditioner
from fastmaml.rl.policies import Policy
from fastmaml.rl.trajectories import Samples


class MetaObjective:
    """The surrogate of post-update policies, on trajectories collected at ``params``.

        L(theta) = mean over tasks of -mean(pi / old A),  pi of theta_K(theta)

    Args:
        policy: as collected with.
        params: theta at which the trajectories were collected, name -> [...].
        adaptation: of ``params``, on ``supports``.
        supports: samples of each inner step.
        query: samples of the post-update policies.
        stride: every which sample products with J' F J are made of, of supports and
            query alike; the gradient and the surrogate always see all.
        first: the first of them.
    """

    def __init__(
        self,
        policy: Policy,
        params: Params,
        adaptation: Adaptation,
        supports: Sequence[Samples],
        query: Samples,
        *,
        stride: int = 1,
        first: int = 0,
    ) -> None:
        self.policy = policy
        self.flat = Flat(params)
        self.supports, self.query = list(supports), query
        self.theta = self.flat.join(params)
        self._tasks = query.x.shape[0]
        self._adaptation = adaptation
        self._old = policy.outputs(adaptation.adapted, query.x)
        self._old_log = policy.log_probability(self._old, query.actions)
        self._curvature = adaptation
        self._preconditioner: KroneckerPreconditioner | None = None
        fisher, outputs = query, self._old
        if stride > 1:
            thin = [s.every(stride, first) for s in self.supports]
            fisher = query.every(stride, first)
            outputs = self._old[:, first::stride].contiguous()
            self._curvature = adaptation.on(thin)
        target = policy.divergence_target(fisher, outputs)
        where = adaptation.adapted, fisher.x, target
        self._fisher = policy.divergence.curvature(*where, many=True)

    @property
    def loss(self) -> float:
        """The surrogate at the old parameters."""
        return self._surrogate(self._old)[0]

    def gradient(self) -> Tensor:
        """Gradient of the surrogate at the old parameters, [P] float64."""
        return self._pulled_back(self._adaptation, self.query.advantages)

    def fisher_product(self, v: Tensor) -> Tensor:
        """Mean over tasks of J' F J v, [P] float64, at the old parameters.

        F is the Fisher information of the post-update policies on the query samples.
        """
        direction = for_each_task(self.flat.split(v), self._tasks)
        tangent = self._curvature.tangent(direction)
        product = self._fisher.gauss_newton_product(tangent)
        return self.flat.mean(self._curvature.adjoint(product))

    def precondition(self, v: Tensor) -> Tensor:
        """M^-1 v [P] float64, M near the mean of J' F J by Kronecker factors."""
        if self._preconditioner is None:
            params, query = self.flat.split(self.theta), self.query
            where = self.policy, params, query.x, query.weights
            self._preconditioner = KroneckerPreconditioner(*where)
        return self._preconditioner(v)

    def evaluate(self, theta: Tensor) -> tuple[float, float]:
        """Surrogate and mean KL(old || new) of other parameters [P]."""
        return self._surrogate(self._outputs(self._adapt(theta)))

    def clipped(
        self, theta: Tensor, clip: float, kl_weight: float
    ) -> tuple[float, float, Tensor]:
        """The clipped surrogate with a penalty, and its gradient at ``theta``.

            mean over tasks of -mean(min(r A, clip(r, 1 ± c) A)) + w KL(old || pi)

        Args:
            theta: [P].
            clip: c.
            kl_weight: w.

        Returns:
            Its value, the mean divergence, and the gradient [P] float64 through the
            adaptation.
        """
        adaptation = self._adapt(theta)
        outputs = self._outputs(adaptation)
        ratio = self._ratio(outputs)
        advantages = self.query.advantages
        bounded = ratio.clamp(1 - clip, 1 + clip) * advantages
        unclipped = ratio * advantages <= bounded
        loss = -torch.minimum(ratio * advantages, bounded).mean(dtype=torch.float64)
        kl = self._divergence(outputs)
        # d(r A) = r A d(log pi), where the minimum is not the clipped one
        scores = torch.where(unclipped, ratio * advantages, 0)
        gradient = self._pulled_back(adaptation, scores, kl_weight)
        return float(loss) + kl_weight * kl, kl, gradient

    def _adapt(self, theta: Tensor) -> Adaptation:
        rates = self._adaptation.rates or [0.0]
        params = self.flat.split(theta)
        return adapt(self.policy, params, self.supports, rates, self._tasks)

    def _outputs(self, adaptation: Adaptation) -> Tensor:
        return self.policy.outputs(adaptation.adapted, self.query.x)

    def _ratio(self, outputs: Tensor) -> Tensor:
        log = self.policy.log_probability(outputs, self.query.actions)
        return torch.exp(log - self._old_log)

    def _divergence(self, outputs: Tensor) -> float:
        kl = self.policy.distribution.divergence(outputs, self._old)
        return float((kl * self.query.weights).mean(dtype=torch.float64))

    def _surrogate(self, outputs: Tensor) -> tuple[float, float]:
        ratio = self._ratio(outputs)
        loss = -(ratio * self.query.advantages).mean(dtype=torch.float64)
        return float(loss), self._divergence(outputs)

    def _pulled_back(
        self, adaptation: Adaptation, scores: Tensor, kl_weight: float = 0.0
    ) -> Tensor:
        """Gradient [P] of -mean(scores log pi) + w KL through the adaptation."""
        policy, query = self.policy, self.query
        target = policy.score_target(query, scores)
        _, g = policy.score.value_and_grad(adaptation.adapted, query.x, target)
        if kl_weight:
            target = policy.divergence_target(query, self._old)
            where = adaptation.adapted, query.x, target
            _, more = policy.divergence.value_and_grad(*where)
            g = {n: torch.add(g[n], more[n], alpha=kl_weight) for n in g}
        return self.flat.mean(adaptation.adjoint(_plain(g)))


def _plain(values: Params) -> Named:
    return dict(values)
