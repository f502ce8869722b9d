"""Anybody's environments as rows, run by gymnasium's own vector environments.

gymnasium's vector environments refuse to step an episode that has ended unless they
reset it themselves. Here an ended row shall rest, so every environment is wrapped:
it tells its flags through ``info``, and once ended repeats its last observation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from fastmaml.rl.envs.base import TaskVectorEnv


class Resting(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Repeats the last observation once an episode has ended.

    ``step`` returns false flags always; the true ones are ``info["ended"]``, a number
    so that vector environments make an array of it: 1 terminated, 2 truncated.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        super().__init__(env)
        self._ended = 0
        self._observation: Any = None

    @property
    def row_task(self) -> Any:
        """The row's task; ``None`` before one was set."""
        return getattr(self, "_row_task", None)

    @row_task.setter
    def row_task(self, task: Any) -> None:
        self._row_task = task
        self.get_wrapper_attr("set_task")(task)

    def draw_tasks(self, n: int, seed: int) -> NDArray[Any]:
        """What the environment's own ``sample_tasks`` draws, as an array [n, ...]."""
        return np.asarray(self.get_wrapper_attr("sample_tasks")(n, seed))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Starts an episode; the environment's ``info`` is left out."""
        self._ended = 0
        self._observation, _ = self.env.reset(seed=seed, options=options)
        return self._observation, {}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Takes a step, or none where the episode has ended."""
        reward: Any = 0.0
        if not self._ended:
            step = self.env.step(action)
            self._observation, reward = step[:2]
            self._ended = 1 if step[2] else 2 if step[3] else 0
        return self._observation, reward, False, False, {"ended": self._ended}


class AnyTask:
    """The tasks of an environment, which draws them itself."""

    def __init__(self, draw: Callable[[int, int], NDArray[Any]]) -> None:
        self._draw = draw
        self.shape = draw(1, 0).shape[1:]

    def sample(self, n: int, seed: int) -> NDArray[Any]:
        """Draws n tasks [n, ...]."""
        return self._draw(n, seed)

    def check(self, tasks: NDArray[Any]) -> None:
        """The environment checks them."""


class UserRows(TaskVectorEnv):
    """Rows of environments that have no batched form.

    Args:
        make: makes one environment, with ``sample_tasks(n, seed) -> [n, ...]`` and
            ``set_task(task)``; its observations and actions are arrays.
        num_envs: rows, R.
        horizon: steps after which an episode is truncated, if not earlier by itself.
        workers: 0 steps rows one after the other here; otherwise each row has a
            process of its own.

    Raises:
        ValueError: the environment has no tasks, or its spaces are no arrays.
    """

    def __init__(
        self,
        make: Callable[[], gymnasium.Env[Any, Any]],
        num_envs: int,
        *,
        horizon: int,
        workers: int = 0,
    ) -> None:
        self._first = Resting(make())
        for name in ("sample_tasks", "set_task"):
            if not self._first.has_wrapper_attr(name):
                self._first.close()
                raise ValueError(f"make: the environment has no {name}(); give it one")
        spaces = self._first.observation_space, self._first.action_space
        for space in spaces:
            if not isinstance(space, (gymnasium.spaces.Box, gymnasium.spaces.Discrete)):
                self._first.close()
                raise ValueError(f"make: spaces must be Box or Discrete, got {space}")
        self._cut: NDArray[Any] | None = None
        tasks = AnyTask(self._first.draw_tasks)
        super().__init__(num_envs, tasks, horizon, *spaces)
        makers = [lambda: Resting(make())] * num_envs
        mode = AutoresetMode.DISABLED
        self._envs: Any
        if workers:
            self._envs = AsyncVectorEnv(makers, autoreset_mode=mode)
        else:
            self._envs = SyncVectorEnv(makers, autoreset_mode=mode)

    def set_tasks(self, tasks: Any) -> None:
        """Gives every row its task; see `fastmaml.rl.vector.RowsEnv`."""
        super().set_tasks(tasks)
        self._envs.set_attr("row_task", list(self._task))

    def _start(self, seeds: NDArray[Any]) -> NDArray[Any]:
        observation, _ = self._envs.reset(seed=[int(seed) for seed in seeds])
        return np.asarray(observation)

    def _advance(
        self, actions: NDArray[Any], running: NDArray[Any] | None
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]:
        observation, reward, _, _, info = self._envs.step(actions)
        ended = info["ended"]
        self._cut = ended == 2
        finite = np.isfinite(reward)
        if observation.dtype.kind == "f":
            finite &= np.isfinite(observation.reshape(self.num_envs, -1)).all(1)
        return observation, reward, ended == 1, finite

    def _cut_short(self) -> NDArray[Any] | None:
        return self._cut

    def close_extras(self, **kwargs: Any) -> None:
        """Closes every environment; ends the processes."""
        self._envs.close(**kwargs)
        self._first.close()
