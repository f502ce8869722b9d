"""A robot: its MuJoCo model, how an episode begins, what is observed and earned.

The methods work on rows, ``[R, ...]``, so a single environment (R = 1, on an `MjData`)
and a batch (on `mujoco.batch.Batch`) share them. A state is a mapping from the names
of MjData's fields to arrays [R, ...].

Two families of presets, never to be compared with each other:

* ``finn2017``: the paper's environments. One physics step per action, horizon 200, the
  velocity of the whole body's centre of mass after the step.
* ``gym``: those of later work. Five physics steps per action, horizon 100, the
  velocity of the torso by finite difference, and the policy's action divided by 10.

Actions are clipped to [-1, 1], after the division, and so is what they cost.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium.envs.mujoco
import mujoco
import numpy as np
from numpy.typing import NDArray

from fastmaml.rl.envs.draws import normals, reset_uniforms
from fastmaml.rl.envs.tasks import Objective

PRESETS = ("finn2017", "gym")
State = Mapping[str, NDArray[Any]]

_ASSETS = Path(gymnasium.envs.mujoco.__file__).parent / "assets"


@dataclass(frozen=True)
class Physics:
    """What the two families of presets differ in for every robot.

    Attributes:
        frame_skip: physics steps of one environment step.
        horizon: environment steps of an episode.
        action_range: the policy's actions are divided by it.
        normal_start: positions start with normal noise of 0.01; otherwise with uniform
            noise in [-0.1, 0.1]. Velocities start with normal noise of 0.1 in both.
    """

    frame_skip: int
    horizon: int
    action_range: float
    normal_start: bool


PHYSICS = {
    "finn2017": Physics(1, 200, 1.0, True),
    "gym": Physics(5, 100, 10.0, False),
}


def load(name: str) -> mujoco.MjSpec:
    """The specification of a model that gymnasium ships, to be changed and compiled."""
    return mujoco.MjSpec.from_file(str(_ASSETS / name))


def compiled(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """Compiles a model; scales its mass as MuJoCo advises instead of ``settotalmass``.

    The result is the same, bit for bit, without the warning.
    """
    total = spec.compiler.settotalmass
    spec.compiler.settotalmass = -1.0
    model = spec.compile()
    if total > 0:
        mujoco.mj_setTotalmass(model, total)
        mujoco.mj_setConst(model, mujoco.MjData(model))
    return model


class Robot(abc.ABC):
    """A robot under a preset with an objective.

    Attributes:
        model: the compiled model.
        fields: MjData's fields that it reads beyond qpos, qvel and ctrl.
        kinematics: positions and velocities of bodies are read after the step; where
            false, they are those of the last physics step's beginning, as MuJoCo leaves
            them.
        observation_size: O.

    Args:
        preset: ``finn2017`` or ``gym``.
        objective: what the robot shall do.
    """

    model: mujoco.MjModel
    fields: tuple[str, ...] = ()
    kinematics = False
    observation_size: int

    def __init__(self, preset: str, objective: Objective) -> None:
        self.preset = preset
        self.physics = PHYSICS[preset]
        self.objective = objective
        self.pose = np.zeros(0)

    @property
    def dt(self) -> float:
        """Seconds of one environment step."""
        return float(self.model.opt.timestep) * self.physics.frame_skip

    def start(self, seeds: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Positions [R, nq] and velocities [R, nv] at the begin of seeds' episodes."""
        nq, nv = self.model.nq, self.model.nv
        even = nv + nv % 2
        if self.physics.normal_start:
            drawn = normals(reset_uniforms(seeds, nq + nq % 2 + even))
            return self.pose + 0.01 * drawn[:, :nq], 0.1 * drawn[:, nq : nq + nv]
        drawn = reset_uniforms(seeds, nq + even)
        position = self.pose + 0.2 * (drawn[:, :nq] - 0.5)
        return position, 0.1 * normals(drawn[:, nq:])[:, :nv]

    def control(self, actions: NDArray[Any], out: NDArray[Any]) -> None:
        """Writes the controls [R, A] of a policy's actions [R, A]."""
        if self.physics.action_range != 1.0:
            largest = self.physics.action_range
            actions = np.divide(actions, largest, dtype=np.float64)
        np.clip(actions, -1.0, 1.0, out=out)

    def before(self, state: State) -> NDArray[Any] | None:
        """What the velocity needs of the state before a step, [R]; a copy."""
        return None

    @abc.abstractmethod
    def observe(self, state: State) -> NDArray[Any]:
        """Observations [R, O], float32, at an episode's begin."""

    @abc.abstractmethod
    def measure(
        self, state: State, before: NDArray[Any] | None, task: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]:
        """Observations [R, O], rewards [R] and terminated [R] or None after a step."""


class PlanarChain:
    """The centre of mass of a robot that moves in the plane of x and z, in closed form.

    Body b is turned by ``A_b``, the sum of the angles from the root to b. With R(A) the
    rotation about y, m_b masses, p_b a body's origin in its parent, i_b its centre of
    mass in itself, M_b the mass of all that hangs at b, and c the children of b,

        M com = M root + sum_b R(A_b) w_b,     w_b = m_b i_b + sum_c M_c p_c

    and its velocity is the derivative. Saves MuJoCo's kinematics of the new state, a
    third of the time of a physics step. All sums have one order whatever R is.

    Args:
        model: joints are slides along x and z and a hinge about y at the root, then
            one hinge about y at the origin of every body, in the order of bodies.
    """

    def __init__(self, model: mujoco.MjModel) -> None:
        slide, hinge = mujoco.mjtJoint.mjJNT_SLIDE, mujoco.mjtJoint.mjJNT_HINGE
        kinds = [slide, slide] + [hinge] * (model.nbody - 1)
        axes = [[1, 0, 0], [0, 0, 1]] + [[0, 1, 0]] * (model.nbody - 1)
        if list(model.jnt_type) != kinds or model.jnt_axis.tolist() != axes:
            raise ValueError("model: its joints are not those of a planar chain")
        mass = model.body_mass
        weight = mass[1:, None] * model.body_ipos[1:]
        for body in range(2, model.nbody):
            whole = model.body_subtreemass[body]
            weight[model.body_parentid[body] - 1] += whole * model.body_pos[body]
        weight /= model.body_subtreemass[1]
        self.parents = [int(parent) - 1 for parent in model.body_parentid[1:]]
        self.wx, self.wz = weight[:, 0, None].copy(), weight[:, 2, None].copy()
        self.height = float(model.body_pos[1, 2])

    def __call__(
        self, qpos: NDArray[Any], qvel: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """The x and z of the centre of mass and its velocity along x, each [R]."""
        q, v = qpos.T.copy(), qvel.T.copy()  # C order
        angle, rate = q[2:], v[2:]  # turned in place from joints' to bodies'
        for body, parent in enumerate(self.parents):
            if parent >= 0:
                angle[body] += angle[parent]
                rate[body] += rate[parent]
        sine, cosine = np.sin(angle), np.cos(angle)
        forward = self.wx * cosine + self.wz * sine
        upward = self.wz * cosine - self.wx * sine
        rate *= upward  # d forward / d angle
        x = _total(forward) + q[0]
        z = _total(upward) + (q[1] + self.height)
        return x, z, _total(rate) + v[0]


def _total(terms: NDArray[Any]) -> NDArray[Any]:
    """Sums [B, R] over B, one after the other."""
    total: NDArray[Any] = terms[0] + terms[1]
    for term in terms[2:]:
        total += term
    return total
