"""Rollouts, returns, advantages and the baseline, against loops and other layouts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from close import assert_close

from fastmaml.models import gaussian_policy_mlp
from fastmaml.rl.advantages import (
    discounted_sums,
    generalised_advantages,
    standardised,
)
from fastmaml.rl.baseline import fit_values
from fastmaml.rl.learner import processed
from fastmaml.rl.noise import action_noise, collection_seed
from fastmaml.rl.policies import Policy
from fastmaml.rl.trajectories import Samples, Trajectories

gymnasium = pytest.importorskip("gymnasium")
from fastmaml.rl.rollout import collect  # noqa: E402
from fastmaml.rl.vector import make_rows  # noqa: E402

T, E, H = 2, 3, 7


def _normal(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _mask() -> torch.Tensor:
    """Episodes of several lengths, one of a single step."""
    lengths = torch.tensor([[7, 1, 4], [7, 7, 3]])
    return torch.arange(H) < lengths[..., None]


def test_returns_and_advantages_are_those_of_loops():
    mask = _mask()
    rewards, values = _normal(T, E, H) * mask, _normal(T, E, H) + 1
    gamma, lam = 0.9, 0.7
    returns = discounted_sums(rewards, gamma)
    got = generalised_advantages(rewards, values, mask, gamma, lam)
    want_returns, want = torch.zeros(T, E, H).double(), torch.zeros(T, E, H).double()
    for i in range(T):
        for e in range(E):
            length = int(mask[i, e].sum())
            for t in range(length):
                for s in range(t, length):
                    after = values[i, e, s + 1] if s + 1 < length else 0.0
                    delta = rewards[i, e, s] + gamma * after - values[i, e, s]
                    want[i, e, t] += (gamma * lam) ** (s - t) * delta
                    want_returns[i, e, t] += gamma ** (s - t) * rewards[i, e, s]
    assert_close(returns * mask, want_returns, "float64 pass", "returns")
    assert_close(got, want, "float64 pass", "advantages")
    for i, row in enumerate(standardised(got, mask)):
        taken = got[i][mask[i]]
        plain = (taken - taken.mean()) / (taken.std(unbiased=False) + 1e-8)
        assert_close(row[mask[i]], plain, "float64 product", "standardised")
        assert not row[~mask[i]].any()


def test_baseline_is_each_tasks_ridge_regression():
    mask = _mask()
    observations = 8 * _normal(T, E, H, 2)  # some are clipped
    returns = _normal(T, E, H)
    got = fit_values(observations, returns, mask)
    for i in range(T):
        rows, target = [], []
        for e in range(E):
            for t in range(int(mask[i, e].sum())):
                o = np.clip(observations[i, e, t].numpy(), -10, 10)
                time = t / 100
                rows.append([*o, *(o**2), time, time**2, time**3, 1.0])
                target.append(float(returns[i, e, t]))
        f, g = np.array(rows), np.array(target)
        w = np.linalg.solve(f.T @ f + 1e-5 * np.eye(f.shape[1]), f.T @ g)
        assert np.allclose(got[i][mask[i]].numpy(), f @ w, atol=1e-7)
        assert not got[i][~mask[i]].any()


def test_baseline_survives_features_that_are_all_the_same():
    observations = torch.full((1, 2, 5, 2), 3.0)
    values = fit_values(observations, torch.ones(1, 2, 5), torch.ones(1, 2, 5).bool())
    assert_close(values, torch.ones(1, 2, 5).double(), "differences", "constant")


def test_samples_weigh_the_steps_that_were_taken():
    mask = _mask()
    zeros = torch.zeros(T, E, H, 1)
    trajectories = Trajectories(zeros, zeros, mask.float(), mask, zeros)
    samples = Samples.of(trajectories, _normal(T, E, H))
    assert_close(samples.weights.mean(1), torch.ones(T), "float32 pass", "mean weight")
    assert torch.equal(samples.weights > 0, mask.flatten(1))
    assert not samples.advantages[~mask.flatten(1)].any()
    # the mean over all N is the mean over the steps taken
    thin = samples.every(2, 1)
    assert thin.x.shape[1] == E * H // 2
    assert_close(thin.weights.mean(1), torch.ones(T), "float32 pass", "thinned")
    assert trajectories.steps == int(mask.sum())


@pytest.mark.parametrize("normal", [True, False])
def test_noise_is_that_of_its_distribution_and_of_its_episode(normal: bool):
    whole = action_noise(5, 6, 7, 301, normal=normal)
    part = action_noise(5, 2, 3, 100, normal=normal)
    assert torch.equal(part, whole[:2, :3, :100])
    assert not torch.equal(action_noise(6, 2, 3, 100, normal=normal), part)
    flat = whole.flatten().double()
    mean, variance = (0, 1) if normal else (0.5, 1 / 12)
    assert abs(flat.mean() - mean) < 4 * math.sqrt(variance / len(flat))
    assert flat.var() == pytest.approx(variance, rel=0.04)
    assert len(flat.unique()) > 0.99 * len(flat)
    if not normal:
        assert 0 <= flat.min() and flat.max() < 1


def test_seeds_of_collections_differ():
    seeds = [collection_seed(s, i, k) for s in (0, 1) for i in range(9) for k in (0, 1)]
    assert len({*seeds, collection_seed(0)}) == len(seeds)  # (0, 0, 0) twice
    with pytest.raises(ValueError, match="seed must be"):
        collection_seed(-1)


def _policy(dtype: torch.dtype = torch.float32) -> Policy:
    torch.manual_seed(0)
    return Policy(gaussian_policy_mlp(2, 2, (16, 9), log_std=-2.0).to(dtype))


def _rows(tasks: int, episodes: int) -> Any:
    return make_rows("fastmaml/Navigation2D-v0", tasks * episodes, horizon=30)


def _each_task(policy: Policy, tasks: int) -> dict[str, torch.Tensor]:
    """Parameters of every task, of which few tasks have the first."""
    out = {}
    for n, p in policy.parameters().items():
        scale = torch.linspace(0.5, 1.5, 8)[:tasks].view(-1, *[1] * p.ndim)
        out[n] = (p * scale).contiguous()
    return out


def test_an_episode_is_the_same_in_any_batch():
    policy, envs = _policy(), _rows(8, 6)
    goals = envs.sample_tasks(8, 3)
    goals[0] = 0.0  # so near that episodes end
    whole = collect(policy, _each_task(policy, 8), envs, goals, seed=9)
    assert not whole.mask.all() and whole.failures == 0
    for tasks, episodes in ((2, 6), (8, 3), (1, 1)):
        some = _each_task(policy, tasks)
        part = collect(policy, some, _rows(tasks, episodes), goals[:tasks], seed=9)
        for name in ("observations", "actions", "rewards", "mask", "outputs"):
            want = getattr(whole, name)[:tasks, :episodes]
            assert torch.equal(getattr(part, name), want), (name, tasks, episodes)


def test_rollouts_say_what_happened():
    policy, envs = _policy(torch.float64), _rows(2, 3)
    goals = np.array([[0.0, 0.0], [0.4, 0.4]])
    params = _each_task(policy, 2)
    found = collect(policy, params, envs, goals, seed=1)
    outputs = policy.outputs(params, found.observations.flatten(1, 2))
    mask = found.mask.flatten(1)
    assert_close(found.outputs.flatten(1, 2)[mask], outputs[mask], "exact", "outputs")
    noise = action_noise(1, 2, 3, 60).view(2, 3, 30, 2).double()
    mean, log_std = found.outputs.chunk(2, -1)
    want = (mean + log_std.exp() * noise) * found.mask[..., None]
    assert_close(found.actions, want, "float64 pass", "actions")
    moved = found.observations[:, :, :-1] + (0.1 * found.actions[:, :, :-1]).clamp(
        -0.1, 0.1
    )
    seen = found.mask[:, :, 1:]
    assert torch.allclose(moved[seen], found.observations[:, :, 1:][seen], atol=1e-6)
    assert not found.rewards[~found.mask].any() and not found.actions[~found.mask].any()
    assert found.steps < 2 * 3 * 30
    samples = processed(found, 0.99, 1.0)
    assert torch.isfinite(samples.advantages).all()


class _Tilting(gymnasium.Env):
    """Two actions; the task says which is right; after a while it breaks."""

    observation_space = gymnasium.spaces.Box(-10, 10, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def sample_tasks(self, n: int, seed: int) -> Any:
        return np.random.default_rng(seed).integers(2, size=n).astype(float)

    def set_task(self, task: Any) -> None:
        self.right = int(task)

    def reset(self, *, seed: Any = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        assert action in (0, 1)
        broken = self.t == 4 and self.right == 1
        observation = np.array([math.nan if broken else self.t / 4], np.float32)
        return observation, float(action == self.right), False, False, {}


def test_categorical_policies_and_a_simulator_that_breaks():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    )
    policy = Policy(model, "categorical")
    envs = make_rows(_Tilting, 8, horizon=6)
    tasks = np.array([0.0, 1.0])
    found = collect(policy, policy.parameters(), envs, tasks, seed=2)
    envs.close()
    assert set(found.actions.unique().tolist()) == {0.0, 1.0}
    assert found.failures == 4 and found.mask[1].sum(1).sum() == 4 * 4
    assert found.mask[0].all() and torch.isfinite(found.observations).all()
    right = found.actions[..., 0] == torch.tensor([0.0, 1.0]).view(2, 1, 1)
    alive = found.mask.clone()
    alive[1, :, 3] = False  # the step that broke pays nothing
    assert torch.equal(found.rewards > 0, right & alive)
