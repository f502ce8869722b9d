"""2D navigation: a point shall reach a goal it doesn't see (Finn et al. 2017, 5.3.1).

The point starts at the origin, observes its position and moves by
``clip(0.1 a, -0.1, 0.1)``; an episode has 100 steps. Two presets:

* ``code``, the authors' program: the reward is ``-|s - g|``, and an episode terminates
  where both ``|dx|`` and ``|dy|`` are below 0.01. The published returns fit this one.
* ``paper``, the text: ``-|s - g|^2``, and ``|s - g| < 0.01``.

Returns of the two are in different units and can't be compared.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from gymnasium.spaces import Box
from numpy.typing import ArrayLike, NDArray

from fastmaml.rl.envs.base import TaskEnv, TaskVectorEnv, check_preset
from fastmaml.rl.envs.draws import task_uniforms

PRESETS = ("code", "paper")
HORIZON = 100
_SPEED = 0.1  # longest move along an axis
_NEAR = 0.01  # of the goal


class Goals:
    """Goals, uniform in the square [-0.5, 0.5]^2."""

    shape: tuple[int, ...] = (2,)

    def sample(self, n: int, seed: int) -> NDArray[Any]:
        """Draws n goals [n, 2]."""
        return task_uniforms(seed, n, 2) - 0.5

    def check(self, tasks: NDArray[Any]) -> None:
        """Any point may be a goal."""


def _spaces() -> tuple[Box, Box]:
    unbounded = Box(-np.inf, np.inf, (2,), np.float32)
    return unbounded, Box(-1.0, 1.0, (2,), np.float32)


def _move(
    position: NDArray[Any], action: NDArray[Any], goal: NDArray[Any], preset: str
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """New positions [..., 2], rewards [...], terminated [...], finite [...]."""
    move = np.clip(_SPEED * np.asarray(action, np.float64), -_SPEED, _SPEED)
    position = position + move
    apart = position - goal
    squared = apart[..., 0] ** 2 + apart[..., 1] ** 2
    finite = np.isfinite(squared)
    if preset == "paper":
        return position, -squared, squared < _NEAR**2, finite
    near = (np.abs(apart) < _NEAR).all(-1)
    return position, -np.sqrt(squared), near, finite


class Navigation2D(TaskEnv):
    """The point, one episode at a time; see the module for the presets.

    Args:
        preset: ``code`` or ``paper``.
        task: the goal [2].
        horizon: steps of an episode.
    """

    def __init__(
        self,
        preset: str = "code",
        task: ArrayLike = (0.0, 0.0),
        horizon: int = HORIZON,
    ) -> None:
        check_preset(preset, PRESETS)
        super().__init__(Goals(), task, horizon)
        self.preset = preset
        self.observation_space, self.action_space = _spaces()
        self._position = np.zeros(2)

    def _start(self, seeds: NDArray[Any]) -> NDArray[Any]:
        self._position = np.zeros(2)
        return self._position.astype(np.float32)

    def _advance(
        self, action: NDArray[Any]
    ) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        self._position, reward, near, finite = _move(
            self._position, action, self._task[0], self.preset
        )
        observation = self._position.astype(np.float32)
        return observation, float(reward), bool(near), bool(finite), {}


class Navigation2DVector(TaskVectorEnv):
    """The point in all rows at once.

    Args:
        num_envs: rows, R.
        preset: ``code`` or ``paper``.
        horizon: steps of an episode.
    """

    def __init__(
        self, num_envs: int, preset: str = "code", horizon: int = HORIZON
    ) -> None:
        check_preset(preset, PRESETS)
        super().__init__(num_envs, Goals(), horizon, *_spaces())
        self.preset = preset
        self._position = np.zeros((num_envs, 2))

    def _start(self, seeds: NDArray[Any]) -> NDArray[Any]:
        self._position = np.zeros((self.num_envs, 2))
        return self._position.astype(np.float32)

    def _advance(
        self, actions: NDArray[Any], running: NDArray[Any] | None
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]:
        self._position, reward, near, finite = _move(
            self._position, actions, self._task, self.preset
        )
        return self._position.astype(np.float32), reward, near, finite
