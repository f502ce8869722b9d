"""Curvature of the DiCE inner loss, against autograd of the objective as published."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from close import assert_close
from rl_problem import LENGTH, SAMPLES, TASKS, RLProblem, problem
from torch.distributions import Categorical, Normal
from torch.func import functional_call

from fastmaml.rl.adaptation import Flat, for_each_task
from fastmaml.rl.advantages import discounted_sums
from fastmaml.rl.dice import trajectory_credits
from fastmaml.rl.learner import MetaRL, Update
from fastmaml.rl.trajectories import Samples, Trajectories

GAMMA = 0.9


def _with_rewards(p: RLProblem) -> tuple[Samples, torch.Tensor]:
    """Samples whose advantages are discounted rewards to come, and r_t gamma^t."""
    generator = torch.Generator().manual_seed(9)
    shape = TASKS, SAMPLES // LENGTH, LENGTH
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    rewards *= GAMMA ** torch.arange(LENGTH)
    to_come = discounted_sums(rewards, 1.0).flatten(1)
    return dataclasses.replace(p.batches[0], advantages=to_come), rewards


def _published(
    p: RLProblem, samples: Samples, rewards: torch.Tensor, task: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Value, gradient [P] and Hessian [P, P] of -sum of box(W_t) gamma^t r_t."""
    flat = Flat(p.params)
    leaf = flat.join(p.params).requires_grad_()
    outputs = functional_call(p.policy.model, flat.split(leaf), (samples.x[task],))
    actions = samples.actions[task]
    if p.policy.kind == "categorical":
        log = Categorical(logits=outputs).log_prob(actions[:, 0])
    else:
        mean, log_std = outputs.chunk(2, -1)
        log = Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    sums = log.view(-1, LENGTH).cumsum(1)
    box = torch.exp(sums - sums.detach())
    loss = -(box * rewards[task]).sum() / SAMPLES
    (slope,) = torch.autograd.grad(loss, leaf, create_graph=True)
    rows = [torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in slope]
    return loss.detach(), slope.detach(), torch.stack(rows)


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
def test_curvature_is_that_of_the_published_objective(kind: str) -> None:
    p = problem(kind, "dice", 1)
    samples, rewards = _with_rewards(p)
    theta = for_each_task(p.params, TASKS)
    flat = Flat(p.params)
    generator = torch.Generator().manual_seed(3)
    size = flat.join(p.params).numel()
    v = torch.randn(TASKS, size, generator=generator, dtype=torch.float64)
    parts = [flat.split(row) for row in v]
    direction = {n: torch.stack([part[n] for part in parts]) for n in p.params}
    target = p.policy.inner_target(samples)
    _, g = p.policy.inner.value_and_grad(theta, samples.x, target)
    h = p.policy.inner_hessian(theta, samples, target)(direction)
    ratio = problem(kind, "likelihood_ratio", 1).policy
    step_by_step = ratio.inner.hvp(
        theta, samples.x, ratio.inner_target(samples), direction
    )
    for task in range(TASKS):
        _, slope, hessian = _published(p, samples, rewards, task)
        got = flat.join({n: value[task] for n, value in g.items()})
        assert_close(got, slope, "float64 chain", "gradient")
        got = flat.join({n: value[task] for n, value in h.items()})
        assert_close(got, hessian @ v[task], "float64 chain", "Hessian's product")
        other = flat.join({n: value[task] for n, value in step_by_step.items()})
        assert (other - got).norm() > 0.05 * got.norm(), "the ratio has other terms"


def test_trajectories_of_one_step_are_the_likelihood_ratios() -> None:
    dice, ratio = (
        problem("gaussian", loss, 1) for loss in ("dice", "likelihood_ratio")
    )
    single = dataclasses.replace(dice.batches[0], length=1)
    theta = for_each_task(dice.params, TASKS)
    v = {n: torch.ones_like(value) for n, value in theta.items()}
    found = [
        p.policy.inner_hessian(theta, single, p.policy.inner_target(single))(v)
        for p in (dice, ratio)
    ]
    assert_close(found[0], found[1], "float64 chain", "product")


def test_credits_of_a_hand_counted_trajectory() -> None:
    a = torch.tensor([[1.0, 2.0, 3.0, 10.0, 0.0, 0.0]])
    d = torch.tensor([[1.0, 10.0, 100.0, 7.0, 9.0, 9.0]])
    want = [1 + 20 + 300, 2 * 11 + 300, 3 * 111, 70, 0, 0]
    assert trajectory_credits(a, d, 3).tolist() == [want]
    with pytest.raises(ValueError, match="whole trajectories of 4 steps, got 6"):
        trajectory_credits(a, d, 4)


def test_samples_know_their_trajectories() -> None:
    shape = 2, 3, 5
    found = Trajectories(
        torch.zeros(*shape, 4),
        torch.zeros(*shape, 1),
        torch.zeros(shape),
        torch.ones(shape, dtype=torch.bool),
        torch.zeros(*shape, 2),
    )
    samples = Samples.of(found, torch.zeros(shape))
    assert samples.length == samples.double().length == 5
    assert samples.every(3).length == 1


def test_products_of_some_samples_are_refused() -> None:
    p, nowhere = problem("gaussian", "dice", 1), None
    rows: Any = nowhere
    with pytest.raises(ValueError, match="fisher_subsample must be 1 with inner_loss"):
        MetaRL(p.policy, rows, update=Update(fisher_subsample=0.5))
