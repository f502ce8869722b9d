"""Environments that show the policy its task, for the oracle that needs no learning."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmaml.rl.vector import RowsEnv, repeat_tasks


class OracleRows:
    """Rows whose observations have the row's task behind them.

    Args:
        rows: the environments.
    """

    def __init__(self, rows: RowsEnv) -> None:
        from gymnasium.spaces import Box

        self._rows = rows
        self.num_envs, self.horizon = rows.num_envs, rows.horizon
        self.single_action_space = rows.single_action_space
        self._size = int(np.prod(rows.sample_tasks(1, 0).shape[1:], dtype=int))
        seen = rows.single_observation_space.shape[0] + self._size
        self.single_observation_space = Box(-np.inf, np.inf, (seen,), np.float32)
        self._shown = np.zeros((rows.num_envs, self._size), dtype=np.float32)

    def sample_tasks(self, n: int, seed: int) -> NDArray[Any]:
        """See `fastmaml.rl.vector.RowsEnv`."""
        return self._rows.sample_tasks(n, seed)

    def set_tasks(self, tasks: ArrayLike) -> None:
        """See `fastmaml.rl.vector.RowsEnv`."""
        self._rows.set_tasks(tasks)
        given = np.asarray(tasks, dtype=np.float32)
        given = given.reshape(len(given), self._size)
        self._shown = repeat_tasks(given, self.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """See `fastmaml.rl.vector.RowsEnv`."""
        observation, info = self._rows.reset(seed=seed, options=options)
        return self._with_task(observation), info

    def step(self, actions: NDArray[Any]) -> Any:
        """See `fastmaml.rl.vector.RowsEnv`."""
        observation, *rest = self._rows.step(actions)
        return self._with_task(observation), *rest

    def close(self) -> None:
        """See `fastmaml.rl.vector.RowsEnv`."""
        self._rows.close()

    def _with_task(self, observation: NDArray[Any]) -> NDArray[Any]:
        return np.concatenate([observation, self._shown], axis=1, dtype=np.float32)
