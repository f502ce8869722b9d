"""Ant tasks: run forwards or backwards, run at a velocity, go to a place.

    reward = objective - c |a|^2 - 0.0005 sum clip(f, -1, 1)^2 + alive
    an episode terminates where the torso's height leaves [0.2, 1.0]

with a clipped to [-1, 1], f the 84 contact forces and torques on bodies, c = 0.005 and
alive = 0.05 except below. Presets:

* ``finn2017``: gymnasium's model with the time step (0.02 s), contact impedance and
  pose (low, ankles bent) of the paper's. Observations are qpos, qvel, clipped f, the
  torso's orientation matrix, the whole body's centre of mass [125].
* ``gym``: gymnasium's model. qpos without x and y, qvel, clipped f but the world's
  [105], as gymnasium's Ant.

Tasks:

* `AntDir`: ``d v``.
* `AntVel`: ``1 - |v - v*|``, v* uniform in [0, 3] m/s.
* `AntGoal`, ``finn2017``: 4 less the 1-norm of what is missing from the centre of mass
  to the goal, goals uniform in the square [-3, 3]^2 m (AntEnvRandGoal of the authors'
  maml_rl). ``gym``: the same from the torso without the 4, goals uniform in a disc of
  radius 3 m, c = 0.1, alive = 0, no episode terminates, and qpos is observed
  with x and y [107] (AntRandGoalEnv of ProMP, Rothfuss et al. 2019).

Contact forces are those at the beginning of the last physics step, of which the others
here are the outcome; gymnasium's Ant looks at the last stage of Runge and Kutta's
method instead. MuJoCo 4 turns free joints differently within that method than its
predecessors did, so trajectories of older versions can't be had from it.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from fastmaml.rl.envs.locomotion import LocomotionEnv, LocomotionVectorEnv
from fastmaml.rl.envs.robot import Robot, State, compiled, load
from fastmaml.rl.envs.tasks import Direction, Goal, Objective, Velocity

_CONTACT_COST = 0.0005
_HEIGHTS = 0.2, 1.0
_TORSO = 1
_FORCES = 84  # 14 bodies, the world first, of 6 each


class Ant(Robot):
    """The ant; see the module.

    Args:
        preset: ``finn2017`` or ``gym``.
        objective: what it shall do.
        cost: of squared actions.
        alive: bonus of every step.
        mortal: episodes terminate.
        place: x and y are observed under ``gym``.
    """

    def __init__(
        self,
        preset: str,
        objective: Objective,
        cost: float = 0.005,
        alive: float = 0.05,
        mortal: bool = True,
        place: bool = False,
    ) -> None:
        super().__init__(preset, objective)
        self.cost, self.alive, self.mortal = cost, alive, mortal
        self.kinematics = preset == "finn2017"
        self.model = _model(self.kinematics)
        self.pose = self.model.qpos0.copy()
        if self.kinematics:
            self.pose = self.model.numeric("init_qpos").data.copy()
            self.fields = "cfrc_ext", "xmat", "sensordata"
            self._skipped, self._bodies = 0, 0
            self.observation_size = 29 + _FORCES + 9 + 3
        else:
            self.fields = "cfrc_ext", "xpos"
            self._skipped, self._bodies = 0 if place else 2, 1
            self.observation_size = 29 - self._skipped + _FORCES - 6

    def before(self, state: State) -> NDArray[Any] | None:
        """The torso's x, where velocity is a difference."""
        return None if self.kinematics else state["xpos"][:, _TORSO, 0].copy()

    def observe(self, state: State) -> NDArray[Any]:
        """Observations [R, O]."""
        return self._look(state)[0]

    def measure(
        self, state: State, before: NDArray[Any] | None, task: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Observations [R, O], rewards [R] and terminated [R] or None."""
        observation, forces = self._look(state)
        if self.kinematics:
            place, velocity = state["sensordata"][:, :2], state["sensordata"][:, 3]
        else:
            place = state["xpos"][:, _TORSO, :2]
            velocity = (place[:, 0] - before) / self.dt
        reward = self.objective.reward(task, velocity, place)
        reward -= self.cost * np.square(state["ctrl"]).sum(-1)
        reward -= _CONTACT_COST * np.square(forces).sum(-1)
        reward += self.alive
        if not self.mortal:
            return observation, reward, None
        height = state["qpos"][:, 2]
        return observation, reward, (height < _HEIGHTS[0]) | (height > _HEIGHTS[1])

    def _look(self, state: State) -> tuple[NDArray[Any], NDArray[Any]]:
        """Observations [R, O], and clipped contact forces [R, 84]."""
        rows = len(state["qpos"])
        forces = np.clip(state["cfrc_ext"].reshape(rows, _FORCES), -1.0, 1.0)
        parts = [state["qpos"][:, self._skipped :], state["qvel"]]
        parts.append(forces[:, 6 * self._bodies :])
        if self.kinematics:
            parts.append(state["xmat"][:, _TORSO])
            parts.append(state["sensordata"][:, :3])
        observation = np.empty((rows, self.observation_size), dtype=np.float32)
        return np.concatenate(parts, axis=1, out=observation), forces


def _model(paper: bool) -> mujoco.MjModel:
    """The ant, with a sensor that makes MuJoCo compute contact forces.

    Args:
        paper: with the paper's time step and contacts, and with sensors of the
            centre of mass [3] and its velocity [3].
    """
    spec = load("ant.xml")
    kinds, of = mujoco.mjtSensor, mujoco.mjtObj
    if paper:
        spec.option.timestep = 0.02
        for geom in spec.geoms:
            geom.solimp[:3] = 0.8, 0.8, 0.01
        for kind in (kinds.mjSENS_SUBTREECOM, kinds.mjSENS_SUBTREELINVEL):
            spec.add_sensor(type=kind, objtype=of.mjOBJ_BODY, objname="torso")
    spec.body("torso").add_site(name="centre")
    force = kinds.mjSENS_FORCE
    spec.add_sensor(type=force, objtype=of.mjOBJ_SITE, objname="centre")
    return compiled(spec)


def _direction(preset: str) -> Robot:
    return Ant(preset, Direction())


def _velocity(preset: str) -> Robot:
    return Ant(preset, Velocity(3.0, bonus=1.0))


def _goal(preset: str) -> Robot:
    if preset == "finn2017":
        return Ant(preset, Goal(disc=False, bonus=4.0))
    goal = Goal(disc=True, bonus=0.0)
    return Ant(preset, goal, cost=0.1, alive=0.0, mortal=False, place=True)


class AntDir(LocomotionEnv):
    """Run forwards (task 1) or backwards (task -1)."""

    make_robot = staticmethod(_direction)
    first_task = 1.0


class AntDirVector(LocomotionVectorEnv):
    """Run forwards (task 1) or backwards (task -1), all rows at once."""

    make_robot = staticmethod(_direction)
    first_task = 1.0


class AntVel(LocomotionEnv):
    """Run at a velocity, the task, in metres per second."""

    make_robot = staticmethod(_velocity)
    first_task = 1.0


class AntVelVector(LocomotionVectorEnv):
    """Run at a velocity, the task, in metres per second, all rows at once."""

    make_robot = staticmethod(_velocity)
    first_task = 1.0


class AntGoal(LocomotionEnv):
    """Go to a place, the task [2], in metres from the start."""

    make_robot = staticmethod(_goal)
    first_task = (1.0, 0.0)


class AntGoalVector(LocomotionVectorEnv):
    """Go to a place, the task [2], in metres from the start, all rows at once."""

    make_robot = staticmethod(_goal)
    first_task = (1.0, 0.0)
