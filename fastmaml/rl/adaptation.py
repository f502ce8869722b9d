"""Adaptation of all tasks, each step on trajectories of its own, and its derivative.

    theta_0 = theta            theta_{k+1} = theta_k - a_k g_k(theta_k)
    J v  :  t_0 = v            t_{k+1} = t_k - a_k H_k t_k                  per task
    J' u :  l_K = u            l_k = l_{k+1} - a_k H_k l_{k+1}              per task

g_k and H_k are the gradient and Hessian of the inner loss on the samples of step k, at
theta_k. All tasks go through the engine in one call a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmaml.engines.base import Rates
from fastmaml.rl.policies import Policy, Product
from fastmaml.rl.trajectories import Samples

Named = dict[str, Tensor]


class Adaptation:
    """The inner loop of a batch of tasks, step by step.

    Args:
        policy: what is adapted.
        params: theta, name -> [...], shared by all tasks.
        tasks: T.
        many: there will be more than one product with its derivative.

    Attributes:
        rates: a_k of the steps so far.
        thetas: theta_0 ... theta_K, each name -> [T, ...].
    """

    def __init__(
        self,
        policy: Policy,
        params: Mapping[str, Tensor],
        tasks: int,
        *,
        many: bool = False,
    ) -> None:
        self.policy = policy
        self._many = many
        self.rates: list[float] = []
        self.thetas = [for_each_task(params, tasks)]
        self._hessians: list[Product] = []

    @property
    def adapted(self) -> Named:
        """theta_K, name -> [T, ...]."""
        return self.thetas[-1]

    def step(self, samples: Samples, rate: float) -> Named:
        """One more inner step on new samples; returns the new parameters."""
        x, y = samples.x, self.policy.inner_target(samples)
        values = torch.tensor(rate, dtype=x.dtype)
        inner = self.policy.inner
        where = self.adapted, samples, y
        self._hessians.append(self.policy.inner_hessian(*where, many=self._many))
        self.thetas.append(inner.adapt(self.adapted, Rates(values), x, y, steps=1))
        self.rates.append(rate)
        return self.adapted

    def tangent(self, v: Named) -> Named:
        """J v for directions name -> [T, ...]."""
        for k in range(len(self.rates)):
            v = self._curved(k, v)
        return v

    def adjoint(self, u: Named) -> Named:
        """J' u for name -> [T, ...]."""
        for k in reversed(range(len(self.rates))):
            u = self._curved(k, u)
        return u

    def on(self, supports: Sequence[Samples]) -> Adaptation:
        """The same parameters, with products of other samples of each step."""
        other = Adaptation.__new__(Adaptation)
        other.policy, other.rates, other.thetas = self.policy, self.rates, self.thetas
        other._many = True
        hessian, target = self.policy.inner_hessian, self.policy.inner_target
        pairs = zip(self.thetas, supports, strict=False)
        other._hessians = [hessian(p, s, target(s), many=True) for p, s in pairs]
        return other

    def _curved(self, k: int, v: Named) -> Named:
        """(I - a_k H_k) v."""
        h = self._hessians[k](v)
        return {n: torch.sub(v[n], h[n], alpha=self.rates[k]) for n in v}


def adapt(
    policy: Policy,
    params: Mapping[str, Tensor],
    supports: Sequence[Samples],
    rates: Sequence[float],
    tasks: int,
) -> Adaptation:
    """All inner steps, on samples that are there already.

    Args:
        policy: what is adapted.
        params: theta, name -> [...].
        supports: samples of each step.
        rates: a_k; the last one serves further steps.
        tasks: T.
    """
    adaptation = Adaptation(policy, params, tasks)
    for k, samples in enumerate(supports):
        adaptation.step(samples, rates[min(k, len(rates) - 1)])
    return adaptation


def for_each_task(params: Mapping[str, Tensor], tasks: int) -> Named:
    """Shared parameters as one set for each task."""
    own = torch.contiguous_format  # a copy even of one task's: theta moves in place
    return {
        n: p.expand(tasks, *p.shape).clone(memory_format=own) for n, p in params.items()
    }


class Flat:
    """Parameters as one vector of float64, in the model's order, and back.

    Args:
        params: name -> [...], giving shapes and dtypes.
    """

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._like = {n: (p.shape, p.numel(), p.dtype) for n, p in params.items()}

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """[P] float64."""
        return torch.cat([values[n].reshape(-1).double() for n in self._like])

    def mean(self, values: Mapping[str, Tensor]) -> Tensor:
        """[P] float64, the mean over tasks of name -> [T, ...]."""
        means = [values[n].mean(0, dtype=torch.float64) for n in self._like]
        return torch.cat([m.reshape(-1) for m in means])

    def split(self, flat: Tensor) -> Named:
        """Name -> [...] of the parameters' dtype."""
        out, start = {}, 0
        for name, (shape, size, dtype) in self._like.items():
            out[name] = flat[start : start + size].view(shape).to(dtype)
            start += size
        return out
