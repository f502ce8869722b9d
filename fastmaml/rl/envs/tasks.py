"""The tasks of locomotion: directions, velocities and goals, and the reward for each.

An objective says how tasks are drawn and what a row earns for where its robot is and
how fast it moves; costs and bonuses belong to the robot.
"""

from __future__ import annotations

import abc
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaml.rl.envs.draws import task_uniforms


class Objective(abc.ABC):
    """Tasks, and the part of the reward that depends on them.

    Attributes:
        shape: of one task; () is a number.
    """

    shape: tuple[int, ...] = ()

    @abc.abstractmethod
    def sample(self, n: int, seed: int) -> NDArray[Any]:
        """Draws n tasks [n, *shape]; task i depends on the seed and on i alone."""

    def check(self, tasks: NDArray[Any]) -> None:  # noqa: B027 - any number will do
        """Raises ValueError if some of the tasks [n, *shape] are none."""

    @abc.abstractmethod
    def reward(
        self, task: NDArray[Any], velocity: NDArray[Any], place: NDArray[Any] | None
    ) -> NDArray[Any]:
        """Rewards [R] of velocities [R] along x and places [R, 2]."""


class Direction(Objective):
    """Forwards (1) or backwards (-1), each with probability one half: ``d v``."""

    def sample(self, n: int, seed: int) -> NDArray[Any]:
        """Draws n directions [n]."""
        return np.where(task_uniforms(seed, n, 1)[:, 0] < 0.5, -1.0, 1.0)

    def check(self, tasks: NDArray[Any]) -> None:
        """Directions are 1 or -1."""
        wrong = np.abs(tasks) != 1
        if wrong.any():
            raise ValueError(
                f"tasks: a direction is 1 (forwards) or -1, got {tasks[wrong][0]}"
            )

    def reward(
        self, task: NDArray[Any], velocity: NDArray[Any], place: NDArray[Any] | None
    ) -> NDArray[Any]:
        """``d v``, [R]."""
        return task * velocity


class Velocity(Objective):
    """A velocity v* along x, uniform in [0, fastest]: ``bonus - |v - v*|``."""

    def __init__(self, fastest: float, bonus: float = 0.0) -> None:
        self.fastest = fastest
        self.bonus = bonus

    def sample(self, n: int, seed: int) -> NDArray[Any]:
        """Draws n velocities [n] in metres per second."""
        return self.fastest * task_uniforms(seed, n, 1)[:, 0]

    def reward(
        self, task: NDArray[Any], velocity: NDArray[Any], place: NDArray[Any] | None
    ) -> NDArray[Any]:
        """``bonus - |v - v*|``, [R]."""
        return self.bonus - np.abs(velocity - task)


class Goal(Objective):
    """A place to go to: ``bonus - (|x - g_x| + |y - g_y|)``.

    Args:
        disc: goals are uniform in a disc of radius 3 around the start, otherwise in
            the square [-3, 3]^2.
        bonus: added at every step.
    """

    shape = (2,)
    RADIUS = 3.0

    def __init__(self, disc: bool, bonus: float) -> None:
        self.disc = disc
        self.bonus = bonus

    def sample(self, n: int, seed: int) -> NDArray[Any]:
        """Draws n goals [n, 2] in metres."""
        drawn = task_uniforms(seed, n, 2)
        if not self.disc:
            return self.RADIUS * (2.0 * drawn - 1.0)
        angle, radius = 2 * math.pi * drawn[:, 0], self.RADIUS * np.sqrt(drawn[:, 1])
        return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)

    def reward(
        self, task: NDArray[Any], velocity: NDArray[Any], place: NDArray[Any] | None
    ) -> NDArray[Any]:
        """``bonus`` less the distance in the 1-norm, [R]."""
        assert place is not None, "robots of goal tasks tell their place"
        apart = np.abs(place - task)
        return self.bonus - (apart[:, 0] + apart[:, 1])
