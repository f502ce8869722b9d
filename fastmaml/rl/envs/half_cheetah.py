"""Half-cheetah tasks: run forwards or backwards, run at a velocity.

    reward = objective - 0.05 |a|^2,   a clipped to [-1, 1];   no episode terminates

* ``finn2017``: observations are qpos without x, qvel, centre of mass [20].
* ``gym``: qpos without x, qvel [17], as gymnasium's HalfCheetah.

Velocities to run at are uniform in [0, 2] m/s (Finn et al. 2017, section 5.3.2).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmaml.rl.envs.locomotion import LocomotionEnv, LocomotionVectorEnv
from fastmaml.rl.envs.robot import PlanarChain, Robot, State, compiled, load
from fastmaml.rl.envs.tasks import Direction, Objective, Velocity

_COST = 0.05  # of squared actions


class HalfCheetah(Robot):
    """The cheetah; see the module."""

    def __init__(self, preset: str, objective: Objective) -> None:
        super().__init__(preset, objective)
        self.model = compiled(load("half_cheetah.xml"))
        self.pose = self.model.qpos0.copy()
        self._centre = PlanarChain(self.model) if preset == "finn2017" else None
        self.observation_size = 20 if preset == "finn2017" else 17

    def before(self, state: State) -> NDArray[Any] | None:
        """The torso's x, where velocity is a difference."""
        return None if self._centre else state["qpos"][:, 0].copy()

    def observe(self, state: State) -> NDArray[Any]:
        """Observations [R, O]."""
        return self._look(state)[0]

    def measure(
        self, state: State, before: NDArray[Any] | None, task: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Observations [R, O] and rewards [R]; nothing terminates."""
        observation, velocity = self._look(state)
        if velocity is None:
            velocity = (state["qpos"][:, 0] - before) / self.dt
        reward = self.objective.reward(task, velocity, None)
        reward -= _COST * np.square(state["ctrl"]).sum(-1)
        return observation, reward, None

    def _look(self, state: State) -> tuple[NDArray[Any], NDArray[Any] | None]:
        qpos, qvel = state["qpos"], state["qvel"]
        observation = np.empty((len(qpos), self.observation_size), dtype=np.float32)
        observation[:, :8] = qpos[:, 1:]
        observation[:, 8:17] = qvel
        if self._centre is None:
            return observation, None
        x, z, velocity = self._centre(qpos, qvel)
        observation[:, 17] = x
        observation[:, 18] = 0.0
        observation[:, 19] = z
        return observation, velocity


def _direction(preset: str) -> Robot:
    return HalfCheetah(preset, Direction())


def _velocity(preset: str) -> Robot:
    return HalfCheetah(preset, Velocity(2.0))


class HalfCheetahDir(LocomotionEnv):
    """Run forwards (task 1) or backwards (task -1)."""

    make_robot = staticmethod(_direction)
    first_task = 1.0


class HalfCheetahDirVector(LocomotionVectorEnv):
    """Run forwards (task 1) or backwards (task -1), all rows at once."""

    make_robot = staticmethod(_direction)
    first_task = 1.0


class HalfCheetahVel(LocomotionEnv):
    """Run at a velocity, the task, in metres per second."""

    make_robot = staticmethod(_velocity)
    first_task = 1.0


class HalfCheetahVelVector(LocomotionVectorEnv):
    """Run at a velocity, the task, in metres per second, all rows at once."""

    make_robot = staticmethod(_velocity)
    first_task = 1.0
