"""What all environments share: tasks, seeds, time limits, and masks of ended rows.

`TaskEnv` is one ordinary environment, `TaskVectorEnv` all rows of a batch at once; the
latter keeps the promises of `fastmaml.rl.vector.RowsEnv`. Both count the horizon
themselves, since it belongs to the preset. A family of environments says how its tasks
are drawn in a `TaskSpace`.
"""

from __future__ import annotations

import abc
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from fastmaml.rl.vector import repeat_tasks

Step = tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]


class TaskSpace(Protocol):
    """The tasks of a family: their distribution, and what counts as one.

    Attributes:
        shape: of one task; () is a number.
    """

    shape: tuple[int, ...]

    def sample(self, n: int, seed: int) -> NDArray[Any]:
        """Draws n tasks [n, *shape]; task i depends on the seed and on i alone."""
        ...

    def check(self, tasks: NDArray[Any]) -> None:
        """Raises ValueError if some of the tasks [n, *shape] are none."""
        ...


def as_tasks(space: TaskSpace, tasks: ArrayLike, name: str = "tasks") -> NDArray[Any]:
    """Returns tasks as a float64 array [n, *shape] after checking them.

    Raises:
        ValueError: the shape is wrong, or a task is not finite or none of the space's.
    """
    array = np.array(tasks, dtype=np.float64)
    if array.shape[1:] != space.shape or array.ndim != 1 + len(space.shape):
        raise ValueError(
            f"{name}: expected shape [n, {', '.join(map(str, space.shape))}], got "
            f"{list(array.shape)}; pass what sample_tasks returned"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {array[~np.isfinite(array)][0]}")
    space.check(array)
    return array


def check_preset(preset: str, presets: Any) -> None:
    """Raises ValueError if a preset is not one of those there are."""
    if preset not in presets:
        raise ValueError(f"preset must be one of {', '.join(presets)}, got {preset!r}")


def check_horizon(horizon: int) -> int:
    """Returns a horizon of at least one step.

    Raises:
        ValueError: it is shorter.
    """
    if int(horizon) < 1:
        raise ValueError(f"horizon must be at least 1 step, got {horizon}")
    return int(horizon)


class TaskEnv(gymnasium.Env[NDArray[Any], NDArray[Any]]):
    """One environment with a task; a subclass writes ``_start`` and ``_advance``.

    Args:
        tasks: the family's tasks.
        task: the task to begin with.
        horizon: steps after which an episode is truncated.
    """

    def __init__(self, tasks: TaskSpace, task: ArrayLike, horizon: int) -> None:
        self.horizon = check_horizon(horizon)
        self._tasks = tasks
        self._elapsed = 0
        self._last: NDArray[Any] = np.zeros(0, dtype=np.float32)
        self.set_task(task)

    @abc.abstractmethod
    def _start(self, seeds: NDArray[Any]) -> NDArray[Any]:
        """Starts the episode of a seed [1]; returns the observation [O]."""

    @abc.abstractmethod
    def _advance(
        self, action: NDArray[Any]
    ) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """One step: observation [O], reward, terminated, finite, info."""

    @property
    def task(self) -> NDArray[Any]:
        """The task, of the shape of one."""
        return self._task[0].copy()

    def sample_tasks(self, n: int, seed: int) -> NDArray[Any]:
        """Draws n tasks, [n, ...]; task i depends on the seed and on i alone."""
        return self._tasks.sample(n, seed)

    def set_task(self, task: ArrayLike) -> None:
        """Changes the task, from the next step on.

        Raises:
            ValueError: it is none of the family's.
        """
        self._task = as_tasks(self._tasks, np.asarray(task)[None], "task")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Starts an episode; the same seed starts the same one.

        Args:
            seed: of the episode; without one, the environment's generator draws it.
            options: ``task`` sets the task first.
        """
        super().reset(seed=seed)
        if options and "task" in options:
            self.set_task(options["task"])
        drawn = self.np_random.integers(2**63) if seed is None else seed
        self._elapsed = 0
        self._last = self._start(np.array([drawn], dtype=np.uint64))
        return self._last.copy(), {}

    def step(
        self, action: NDArray[Any]
    ) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        """Takes a step; ``info["nonfinite"]`` says if the simulator left the numbers.

        Such a step ends the episode, with reward 0 and the observation before it.
        """
        if not self._last.size:
            raise gymnasium.error.ResetNeeded("step() was called before reset()")
        observation, reward, terminated, finite, info = self._advance(action)
        self._elapsed += 1
        if not finite:
            observation, reward, terminated = self._last, 0.0, True
        self._last = observation
        truncated = self._elapsed >= self.horizon and not terminated
        info["nonfinite"] = not finite
        return observation.copy(), float(reward), bool(terminated), truncated, info


class TaskVectorEnv(VectorEnv[NDArray[Any], NDArray[Any], NDArray[Any]], abc.ABC):
    """All rows at once; a subclass writes ``_start`` and ``_advance``.

    Args:
        num_envs: rows, R.
        tasks: the family's tasks.
        horizon: steps after which an episode is truncated.
        observation_space: of one row.
        action_space: of one row.
    """

    def __init__(
        self,
        num_envs: int,
        tasks: TaskSpace,
        horizon: int,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.metadata = {"autoreset_mode": AutoresetMode.DISABLED}
        self.num_envs = num_envs
        self.horizon = check_horizon(horizon)
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self._tasks = tasks
        self._task = np.zeros((num_envs, *tasks.shape))
        self._elapsed = -1  # no episode yet
        self._running = np.ones(num_envs, dtype=bool)
        self._all_running = True
        self._terminated = np.zeros(num_envs, dtype=bool)
        self._truncated = np.zeros(num_envs, dtype=bool)
        self._nonfinite = np.zeros(num_envs, dtype=bool)
        self._last: NDArray[Any] = np.zeros(0)

    @abc.abstractmethod
    def _start(self, seeds: NDArray[Any]) -> NDArray[Any]:
        """Starts the episodes of seeds [R] uint64; returns observations [R, O]."""

    @abc.abstractmethod
    def _advance(
        self, actions: NDArray[Any], running: NDArray[Any] | None
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]:
        """One step of the running rows; what others get is not looked at.

        Args:
            actions: [R, A].
            running: [R], or ``None`` for all.

        Returns:
            Fresh observations [R, O], rewards [R], terminated [R] or ``None`` for
            nowhere, and finite [R] or ``None`` for everywhere.
        """

    def _cut_short(self) -> NDArray[Any] | None:
        """Rows [R] that truncated themselves in the last step, before the horizon."""
        return None

    @property
    def tasks(self) -> NDArray[Any]:
        """The task of every row, [R, ...]."""
        return self._task.copy()

    def sample_tasks(self, n: int, seed: int) -> NDArray[Any]:
        """Draws n tasks, [n, ...]; task i depends on the seed and on i alone."""
        return self._tasks.sample(n, seed)

    def set_tasks(self, tasks: ArrayLike) -> None:
        """Gives every row its task, from the next step on.

        Args:
            tasks: [T, ...] where T divides the number of rows; row r belongs to task
                ``r div (R / T)``.

        Raises:
            ValueError: a task is none of the family's, or T doesn't divide R.
        """
        self._task = repeat_tasks(as_tasks(self._tasks, tasks), self.num_envs)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Starts an episode in every row.

        Args:
            seed: [R], one for each row; a number s for ``s, s + 1, ...``; or ``None``,
                then the environment's generator draws them.
            options: none are known; rows can't be reset apart from others.

        Raises:
            ValueError: there is not one seed for each row, or an option.
        """
        self._check_open()
        if options:
            raise ValueError(f"options: none are known, got {sorted(options)}")
        if seed is None:
            seeds = self.np_random.integers(2**63, size=self.num_envs, dtype=np.uint64)
        elif np.ndim(seed) == 0:
            super().reset(seed=int(seed))
            seeds = np.arange(self.num_envs, dtype=np.uint64) + np.uint64(seed)
        else:
            seeds = np.asarray(seed).astype(np.uint64)
            if seeds.shape != (self.num_envs,):
                raise ValueError(
                    f"seed: expected one for each of {self.num_envs} rows, got shape "
                    f"{list(seeds.shape)}"
                )
        self._elapsed = 0
        self._all_running = True
        self._running[:] = True
        for flags in (self._terminated, self._truncated, self._nonfinite):
            flags[:] = False
        self._last = self._start(seeds)
        return self._last.copy(), {}

    def step(self, actions: NDArray[Any]) -> Step:
        """Takes a step in every row that runs; see `fastmaml.rl.vector.RowsEnv`.

        Raises:
            ValueError: the actions' shape is not [R, A].
            gymnasium.error.ResetNeeded: there is no episode.
        """
        self._check_open()
        if self._elapsed < 0:
            raise gymnasium.error.ResetNeeded("step() was called before reset()")
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(
                f"actions: expected shape {list(self.action_space.shape or ())}, got "
                f"{list(actions.shape)}"
            )
        active = self._running.copy()
        running = None if self._all_running else active
        observation, reward, terminated, finite = self._advance(actions, running)
        self._elapsed += 1
        stopped = False
        if finite is not None and not finite.all():
            self._nonfinite |= active & ~finite
            terminated = ~finite if terminated is None else terminated | ~finite
            stopped = True
        if terminated is not None and terminated.any():
            self._terminated |= active & terminated
            self._running &= ~self._terminated
            self._all_running = False
        if not self._all_running:
            held = ~active | self._nonfinite if stopped else ~active
            observation[held] = self._last[held]
            reward[held] = 0.0
        cut = self._cut_short()
        if self._elapsed >= self.horizon:
            cut = self._running
        if cut is not None and cut.any():
            self._truncated |= self._running & cut
            self._running &= ~self._truncated
            self._all_running = False
        self._last = observation
        info = {"active": active, "nonfinite": self._nonfinite.copy()}
        flags = self._terminated.copy(), self._truncated.copy()
        return observation.copy(), reward, *flags, info

    def _check_open(self) -> None:
        if self.closed:
            raise gymnasium.error.ClosedEnvironmentError("the environment is closed")
