"""Collecting trajectories: all rows step together, all tasks act in one pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmaml.engines.base import Params
from fastmaml.rl.noise import action_noise
from fastmaml.rl.policies import Policy
from fastmaml.rl.trajectories import Trajectories
from fastmaml.rl.vector import RowsEnv, row_seeds


def collect(
    policy: Policy, params: Params, envs: RowsEnv, tasks: Any, *, seed: int
) -> Trajectories:
    """One episode in every row.

    Args:
        policy: which acts.
        params: name -> [...] shared by the tasks, or [T, ...].
        envs: R rows, R / T episodes of each task.
        tasks: [T, ...] as of ``envs.sample_tasks``.
        seed: of this collection. An episode depends on it, the parameters, and the
            numbers of its task and of itself, not on the rest of the batch.

    Returns:
        Trajectories of ``envs.horizon`` steps.

    Raises:
        ValueError: the number of tasks doesn't divide the number of rows.
    """
    count = len(tasks)
    envs.set_tasks(tasks)
    episodes = envs.num_envs // count
    observation, _ = envs.reset(seed=row_seeds(seed, count, episodes))
    discrete = not envs.single_action_space.shape
    size = 1 if discrete else int(np.prod(envs.single_action_space.shape))
    dtype = next(iter(params.values())).dtype
    horizon = envs.horizon
    distribution = policy.distribution
    noise = action_noise(
        seed, count, episodes, horizon * size, normal=distribution.normal
    ).view(count, episodes, horizon, size)
    if dtype != noise.dtype:
        noise = noise.to(dtype)
    memory = _Memory(count, episodes, horizon, dtype)
    nonfinite = np.zeros(envs.num_envs, dtype=bool)
    for t in range(horizon):
        x = torch.from_numpy(observation).to(dtype).view(count, episodes, -1)
        outputs = policy.outputs(params, x)
        actions = distribution.sample(outputs, noise[:, :, t])
        drawn = actions.view(envs.num_envs, size).numpy()
        if discrete:
            drawn = drawn[:, 0].astype(np.int64)
        observation, reward, _, _, info = envs.step(drawn)
        active = info["active"]
        nonfinite = info["nonfinite"]
        memory.write(t, x, actions, reward, active, outputs)
        if not active.all() and not active.any():
            break
    return memory.trajectories(int(nonfinite.sum()))


class _Memory:
    """The arrays of trajectories, made at the first step, which has their sizes."""

    def __init__(
        self, tasks: int, episodes: int, horizon: int, dtype: torch.dtype
    ) -> None:
        self._shape = (tasks, episodes, horizon)
        self._dtype = dtype
        self._rewards = torch.zeros(self._shape, dtype=dtype)
        self._mask = torch.zeros(self._shape, dtype=torch.bool)
        self._arrays: list[Tensor] = []
        self._all_active = True

    def write(
        self,
        t: int,
        x: Tensor,
        actions: Tensor,
        reward: Any,
        active: Any,
        outputs: Tensor,
    ) -> None:
        """Notes a step of all rows."""
        parts = [x, actions, outputs]
        if not self._arrays:
            self._arrays = [
                torch.zeros((*self._shape, p.shape[-1]), dtype=self._dtype)
                for p in parts
            ]
        running = torch.from_numpy(active).view(self._shape[:2])
        self._mask[:, :, t] = running
        self._rewards[:, :, t] = torch.from_numpy(reward).view(self._shape[:2])
        self._all_active = self._all_active and bool(active.all())
        for array, part in zip(self._arrays, parts, strict=True):
            if self._all_active:
                array[:, :, t] = part
            else:
                array[:, :, t] = torch.where(running.unsqueeze(-1), part, 0)

    def trajectories(self, failures: int) -> Trajectories:
        """What was noted."""
        observations, actions, outputs = self._arrays
        return Trajectories(
            observations, actions, self._rewards, self._mask, outputs, failures
        )
