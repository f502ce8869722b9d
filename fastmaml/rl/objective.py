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
        query: samples of the post-update policies, whose outputs are the old ones.
        stride: every which sample products with J' F J are made of, of supports and
            query alike; the gradient and the surrogate always see all.
        first: the first of them.
        checked: :attr:`loss` and :meth:`evaluate` look at so many tasks, the first of
            all; at all of them unless told.
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
        checked: int | None = None,
    ) -> None:
        self.policy = policy
        self.flat = Flat(params)
        self.supports, self.query = list(supports), query
        self.theta = self.flat.join(params)
        self._tasks = query.x.shape[0]
        self._checked = self._tasks if checked is None else checked
        self._adaptation = self._curvature = adaptation
        self._preconditioner: KroneckerPreconditioner | None = None
        fisher = query
        if stride > 1:
            thin = [s.every(stride, first) for s in self.supports]
            fisher = query.every(stride, first)
            self._curvature = adaptation.on(thin)
        target = policy.divergence_target(fisher, fisher.outputs)
        where = adaptation.adapted, fisher.x, target
        self._fisher = policy.divergence.curvature(*where, many=True)

    @property
    def loss(self) -> float:
        """The surrogate at the old parameters, where all ratios are one."""
        advantages = self.query.advantages[: self._checked]
        return -float(advantages.mean(dtype=torch.float64))

    def gradient(self) -> Tensor:
        """Gradient of the surrogate at the old parameters, [P] float64."""
        return self._pulled_back(self._adaptation, self.query.advantages)

    def fisher_product(self, v: Tensor) -> Tensor:
        """Mean over tasks of J' F J v, [P] float64, at the old parameters.

        F is the Fisher information of the post-update policies on the query samples.
        """
        product = self._fisher.gauss_newton_product(self._tangent(v))
        return self.flat.mean(self._curvature.adjoint(product))

    def fisher_square(self, v: Tensor) -> float:
        """Mean over tasks of v'J' F J v, without going back through the adaptation."""
        tangent = self._tangent(v)
        product = self._fisher.gauss_newton_product(tangent)
        squares = {n: t * product[n] for n, t in tangent.items()}
        return float(self.flat.mean(squares).sum())

    def precondition(self, v: Tensor) -> Tensor:
        """M^-1 v [P] float64, M near the mean of J' F J by Kronecker factors."""
        if self._preconditioner is None:
            params, query = self.flat.split(self.theta), self.query
            where = self.policy, params, query.x, query.weights
            self._preconditioner = KroneckerPreconditioner(*where)
        return self._preconditioner(v)

    def evaluate(self, theta: Tensor) -> tuple[float, float]:
        """Surrogate and mean KL(old || new) of other parameters [P]."""
        outputs = self._outputs(self._adapt(theta, self._checked))
        advantages = self.query.advantages[: self._checked]
        loss = -(self._ratio(outputs) * advantages).mean(dtype=torch.float64)
        return float(loss), self._divergence(outputs)

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
        adaptation = self._adapt(theta, self._tasks)
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

    def _tangent(self, v: Tensor) -> Named:
        direction = for_each_task(self.flat.split(v), self._tasks)
        return self._curvature.tangent(direction)

    # what follows looks at the first tasks, as many as are asked for or have outputs

    def _adapt(self, theta: Tensor, tasks: int) -> Adaptation:
        rates = self._adaptation.rates or [0.0]
        supports = [s.of_tasks(tasks) for s in self.supports]
        return adapt(self.policy, self.flat.split(theta), supports, rates, tasks)

    def _outputs(self, adaptation: Adaptation) -> Tensor:
        tasks = len(next(iter(adaptation.adapted.values())))
        return self.policy.outputs(adaptation.adapted, self.query.x[:tasks])

    def _ratio(self, outputs: Tensor) -> Tensor:
        query = self.query.of_tasks(len(outputs))
        new, old = (
            self.policy.log_probability(z, query.actions)
            for z in (outputs, query.outputs)
        )
        # steps that were not taken have no outputs to compare with
        return torch.exp(torch.where(query.weights > 0, new - old, 0))

    def _divergence(self, outputs: Tensor) -> float:
        query = self.query.of_tasks(len(outputs))
        kl = self.policy.distribution.divergence(outputs, query.outputs)
        return float((kl * query.weights).mean(dtype=torch.float64))

    def _pulled_back(
        self, adaptation: Adaptation, scores: Tensor, kl_weight: float = 0.0
    ) -> Tensor:
        """Gradient [P] of -mean(scores log pi) + w KL through the adaptation."""
        policy, query = self.policy, self.query
        target = policy.score_target(query, scores)
        _, g = policy.score.value_and_grad(adaptation.adapted, query.x, target)
        if kl_weight:
            target = policy.divergence_target(query, query.outputs)
            where = adaptation.adapted, query.x, target
            _, more = policy.divergence.value_and_grad(*where)
            g = {n: torch.add(g[n], more[n], alpha=kl_weight) for n in g}
        return self.flat.mean(adaptation.adjoint(_plain(g)))


def _plain(values: Params) -> Named:
    return dict(values)
