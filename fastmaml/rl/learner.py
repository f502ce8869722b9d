"""One meta-iteration: collect, adapt, collect again, and move the meta-parameters."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fastmaml.optim import Adam
from fastmaml.rl.adaptation import Adaptation, Flat
from fastmaml.rl.advantages import (
    discounted_sums,
    generalised_advantages,
    standardised,
)
from fastmaml.rl.baseline import fit_values
from fastmaml.rl.kronecker import factored_layers
from fastmaml.rl.noise import collection_seed
from fastmaml.rl.objective import MetaObjective
from fastmaml.rl.policies import Policy
from fastmaml.rl.rollout import collect
from fastmaml.rl.trajectories import Samples, Trajectories
from fastmaml.rl.trpo import StepReport, Trpo, trust_region_step
from fastmaml.rl.vector import RowsEnv

Outer = Literal["trpo", "ppo", "vpg"]


@dataclass(frozen=True)
class Update:
    """How the meta-parameters are moved.

    Attributes:
        outer: ``trpo``; ``ppo``, several Adam steps on the clipped surrogate (with one
            inner step and a KL penalty it is ProMP's); ``vpg``, one Adam step along
            the policy gradient.
        trpo: settings of the trust region.
        meta_lr: of Adam.
        ppo_epochs: Adam steps on the same trajectories.
        ppo_clip: how far a ratio may leave 1.
        ppo_kl: weight of KL(old || new) of the post-update policies.
        fisher_subsample: share of the samples that products with J' F J are made of.
        search_subsample: share of the tasks on which the steps of the trust region's
            line search are tried, with all of their samples.
    """

    outer: Outer = "trpo"
    trpo: Trpo = field(default_factory=Trpo)
    meta_lr: float = 1e-3
    ppo_epochs: int = 5
    ppo_clip: float = 0.3
    ppo_kl: float = 5e-4
    fisher_subsample: float = 1.0
    search_subsample: float = 1.0

    @property
    def stride(self) -> int:
        """Every which sample products with J' F J are made of."""
        return max(1, round(1 / self.fisher_subsample))

    def checked(self, tasks: int) -> int:
        """How many of the tasks a step is tried on."""
        trpo = self.outer == "trpo"
        return math.ceil(tasks * self.search_subsample) if trpo else tasks


@dataclass(frozen=True)
class Iteration:
    """What a meta-iteration tells.

    Attributes:
        returns: mean return after 0..K inner steps, over tasks and episodes.
        step: what became of the meta-update, on the tasks that it was tried on.
        environment_steps: taken in all.
        failures: episodes whose simulator was no longer finite.
        seconds: of ``sampling``, ``processing`` and ``update``.
    """

    returns: list[float]
    step: StepReport
    environment_steps: int
    failures: int
    seconds: dict[str, float]


class MetaRL:
    """Meta-reinforcement learning of a policy.

    Args:
        policy: whose network's parameters are meta-learned.
        envs: R rows; a meta-batch of T tasks has R / T episodes of each.
        rates: a_k of the inner steps, whose number they are.
        gamma: discount.
        lam: of the generalised advantage estimates.
        update: how the meta-parameters are moved.
        seed: of all that is drawn: iteration i collects under seeds made of it and i.
    """

    def __init__(
        self,
        policy: Policy,
        envs: RowsEnv,
        *,
        rates: Sequence[float] = (0.1,),
        gamma: float = 0.99,
        lam: float = 1.0,
        update: Update | None = None,
        seed: int = 0,
    ) -> None:
        self.policy, self.envs = policy, envs
        self.rates, self.gamma, self.lam = tuple(rates), gamma, lam
        self.update = Update() if update is None else update
        self.seed = seed
        for name in ("fisher_subsample", "search_subsample"):
            share = getattr(self.update, name)
            if not 0 < share <= 1:
                raise ValueError(f"{name} must be in (0, 1], got {share}")
        share = self.update.fisher_subsample
        if share < 1 and policy.inner_loss == "dice":
            raise ValueError(
                f"fisher_subsample must be 1 with inner_loss='dice', got {share}: its "
                "curvature joins the steps of whole trajectories"
            )
        if self.update.trpo.preconditioner == "kronecker":
            factored_layers(policy.model)  # refuses what has none
        self.optimizer: torch.optim.Optimizer | None = None
        if self.update.outer != "trpo":
            self.optimizer = _adam(policy, self.update.meta_lr)

    def iterate(self, tasks: Any, iteration: int) -> Iteration:
        """One meta-iteration on a meta-batch of tasks [T, ...].

        Args:
            tasks: as of ``envs.sample_tasks``.
            iteration: its number, which with the seed decides all that is drawn.
        """
        clock = _Clock()
        adaptation, found, samples = self._collect(tasks, iteration, clock)
        params = self.policy.parameters()
        stride = self.update.stride
        objective = MetaObjective(
            self.policy,
            params,
            adaptation,
            samples[:-1],
            samples[-1],
            stride=stride,
            first=iteration % stride,
            checked=self.update.checked(len(tasks)),
        )
        report = self._move(objective)
        clock.note("update")
        return Iteration(
            returns=[float(t.returns().mean()) for t in found],
            step=report,
            environment_steps=sum(t.steps for t in found),
            failures=sum(t.failures for t in found),
            seconds=clock.seconds,
        )

    def adapted_returns(
        self, tasks: Any, rates: Sequence[float], *, seed: int
    ) -> tuple[Tensor, list[Trajectories]]:
        """Returns of tasks before and after each of several inner steps.

        Args:
            tasks: [T, ...].
            rates: of the inner steps.
            seed: of what is drawn.

        Returns:
            [T, K + 1] mean undiscounted returns, and the trajectories of each.
        """
        adaptation = Adaptation(self.policy, self.policy.parameters(), len(tasks))
        found = []
        for k in range(len(rates) + 1):
            own = collection_seed(seed, k)
            found.append(
                collect(self.policy, adaptation.adapted, self.envs, tasks, seed=own)
            )
            if k < len(rates):
                samples = processed(found[-1], self.gamma, self.lam)
                adaptation.step(samples, rates[k])
        return torch.stack([t.returns() for t in found], 1), found

    def _collect(
        self, tasks: Any, iteration: int, clock: _Clock
    ) -> tuple[Adaptation, list[Trajectories], list[Samples]]:
        # products with J' F J are then made of these samples, as the gradient is
        many = self.update.outer == "trpo" and self.update.stride == 1
        params = self.policy.parameters()
        adaptation = Adaptation(self.policy, params, len(tasks), many=many)
        found, samples = [], []
        for k in range(len(self.rates) + 1):
            seed = collection_seed(self.seed, iteration, k)
            found.append(
                collect(self.policy, adaptation.adapted, self.envs, tasks, seed=seed)
            )
            clock.note("sampling")
            samples.append(processed(found[-1], self.gamma, self.lam))
            clock.note("processing")
            if k < len(self.rates):
                adaptation.step(samples[-1], self.rates[k])
                clock.note("update")
        return adaptation, found, samples

    def _move(self, objective: MetaObjective) -> StepReport:
        if self.optimizer is None:
            kronecker = self.update.trpo.preconditioner == "kronecker"
            theta, report = trust_region_step(
                objective.theta,
                objective.gradient(),
                objective.fisher_product,
                objective.evaluate,
                objective.loss,
                self.update.trpo,
                objective.precondition if kronecker else None,
                objective.fisher_square,
            )
            if report.accepted:
                self._set(objective.flat, theta)
            return report
        before = objective.loss
        if self.update.outer == "vpg":
            self._descend(objective.flat, objective.gradient())
        else:
            for _ in range(self.update.ppo_epochs):
                theta = objective.flat.join(self.policy.parameters())
                clip, weight = self.update.ppo_clip, self.update.ppo_kl
                self._descend(objective.flat, objective.clipped(theta, clip, weight)[2])
        loss, kl = objective.evaluate(objective.flat.join(self.policy.parameters()))
        return StepReport(True, before, loss, kl, 0)

    def _descend(self, flat: Flat, gradient: Tensor) -> None:
        assert self.optimizer is not None
        split = flat.split(gradient)
        for name, p in self.policy.model.named_parameters():
            p.grad = split[name].clone()
        self.optimizer.step()

    @torch.no_grad()
    def _set(self, flat: Flat, theta: Tensor) -> None:
        split = flat.split(theta)
        for name, p in self.policy.model.named_parameters():
            p.copy_(split[name])

    def state_dict(self) -> dict[str, Any]:
        """The network's parameters and the optimizer's state."""
        state: dict[str, Any] = {"model": self.policy.model.state_dict()}
        if self.optimizer is not None:
            state["optimizer"] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state_dict` returned."""
        self.policy.model.load_state_dict(state["model"])
        if self.optimizer is not None and "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])


def processed(trajectories: Trajectories, gamma: float, lam: float) -> Samples:
    """Samples with advantages against the baseline fitted to the same trajectories.

    Args:
        trajectories: of all tasks.
        gamma: discount.
        lam: of the generalised advantage estimates.
    """
    mask = trajectories.mask
    rewards = trajectories.rewards.double()
    returns = discounted_sums(rewards, gamma)
    values = fit_values(trajectories.observations, returns, mask)
    advantages = generalised_advantages(rewards, values, mask, gamma, lam)
    return Samples.of(trajectories, standardised(advantages, mask))


def _adam(policy: Policy, rate: float) -> torch.optim.Optimizer:
    parameters = list(policy.model.parameters())
    if policy.inner.name == "native":
        return Adam(parameters, rate)
    return torch.optim.Adam(parameters, rate)


class _Clock:
    """Seconds spent on each of several things that take turns."""

    def __init__(self) -> None:
        self.seconds = {"sampling": 0.0, "processing": 0.0, "update": 0.0}
        self._last = time.perf_counter()

    def note(self, what: str) -> None:
        """Counts the time since the last note for ``what``."""
        now = time.perf_counter()
        self.seconds[what] += now - self._last
        self._last = now
