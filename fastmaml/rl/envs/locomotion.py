"""Robots as environments: one on an `MjData`, or all rows on a `mujoco.batch.Batch`.

A batch keeps each row's whole state, the solver's warm start included, and steps all
rows in one call on its own threads; every row gets the bits that it would get alone.

MuJoCo resets a simulation whose numbers overflow and goes on, with a warning. Here the
warning ends the episode (`nonfinite`), before anybody sees the state after the reset.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mujoco
import numpy as np

try:
    import mujoco.batch
except ImportError as error:
    raise ImportError(
        f"locomotion needs mujoco 3.17 or newer, got {mujoco.__version__}: "
        "pip install -U mujoco"
    ) from error
from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer
from gymnasium.spaces import Box
from numpy.typing import ArrayLike, NDArray

from fastmaml.rl.envs.base import TaskEnv, TaskVectorEnv, check_preset
from fastmaml.rl.envs.robot import PRESETS, Robot
from fastmaml.threads import get_num_threads

_WARNINGS = [
    int(mujoco.mjtWarning.mjWARN_BADQPOS),
    int(mujoco.mjtWarning.mjWARN_BADQVEL),
    int(mujoco.mjtWarning.mjWARN_BADQACC),
    int(mujoco.mjtWarning.mjWARN_BADCTRL),
]
_BAD = slice(min(_WARNINGS), max(_WARNINGS) + 1)
_STATE = ("qpos", "qvel", "ctrl")
_PIXELS = 480  # of a side of a drawn frame


def _spaces(robot: Robot) -> tuple[Box, Box]:
    return (
        Box(-np.inf, np.inf, (robot.observation_size,), np.float32),
        Box(-1.0, 1.0, (robot.model.nu,), np.float32),
    )


class LocomotionEnv(TaskEnv):
    """A robot, one episode at a time.

    Args:
        preset: ``finn2017`` or ``gym``; see `fastmaml.rl.envs.robot`.
        task: the task to begin with; without one, the subclass's ``first_task``.
        horizon: steps of an episode; without one, the preset's.
        render_mode: ``rgb_array`` [480, 480, 3], ``depth_array``, ``rgbd_tuple`` or
            ``human``; without a screen, they need MUJOCO_GL=egl or osmesa.
    """

    metadata = {"render_modes": ["human", "rgb_array", "depth_array", "rgbd_tuple"]}
    make_robot: Callable[[str], Robot]
    first_task: ArrayLike

    def __init__(
        self,
        preset: str = "finn2017",
        task: ArrayLike | None = None,
        horizon: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        check_preset(preset, PRESETS)
        self.preset = preset
        self.robot = self.make_robot(preset)
        self.metadata = {**self.metadata, "render_fps": round(1.0 / self.robot.dt)}
        self.render_mode = render_mode
        self.observation_space, self.action_space = _spaces(self.robot)
        super().__init__(
            self.robot.objective,
            self.first_task if task is None else task,
            self.robot.physics.horizon if horizon is None else horizon,
        )
        self.data = mujoco.MjData(self.robot.model)
        fields = (*_STATE, *self.robot.fields)
        self._state = {name: getattr(self.data, name)[None] for name in fields}
        self._renderer: MujocoRenderer | None = None

    def _start(self, seeds: NDArray[Any]) -> NDArray[Any]:
        mujoco.mj_resetData(self.robot.model, self.data)
        self._state["qpos"][:], self._state["qvel"][:] = self.robot.start(seeds)
        mujoco.mj_forward(self.robot.model, self.data)
        return self.robot.observe(self._state)[0]

    def _advance(
        self, action: NDArray[Any]
    ) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        robot = self.robot
        robot.control(np.asarray(action)[None], out=self._state["ctrl"])
        before = robot.before(self._state)
        mujoco.mj_step(robot.model, self.data, nstep=robot.physics.frame_skip)
        if robot.kinematics:
            mujoco.mj_step1(robot.model, self.data)
        observation, reward, terminated = robot.measure(self._state, before, self._task)
        warned = any(self.data.warning[kind].number for kind in _WARNINGS)
        finite = not warned and np.isfinite(observation).all() and np.isfinite(reward)
        ended = terminated is not None and bool(terminated[0])
        return observation[0], float(reward[0]), ended, bool(finite), {}

    def render(self) -> Any:
        """Draws the robot as ``render_mode`` says."""
        if self._renderer is None:
            self._renderer = MujocoRenderer(
                self.robot.model,
                self.data,
                {"distance": 4.0},
                width=_PIXELS,
                height=_PIXELS,
            )
        return self._renderer.render(self.render_mode)

    def close(self) -> None:
        """Closes the window, if there is one."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


class LocomotionVectorEnv(TaskVectorEnv):
    """A robot in every row, all stepped in one call.

    Args:
        num_envs: rows, R.
        preset: ``finn2017`` or ``gym``; see `fastmaml.rl.envs.robot`.
        horizon: steps of an episode; without one, the preset's.
        threads: that simulate, the caller's included; without a number,
            `fastmaml.get_num_threads`. Results don't depend on it.
    """

    make_robot: Callable[[str], Robot]
    first_task: ArrayLike

    def __init__(
        self,
        num_envs: int,
        preset: str = "finn2017",
        horizon: int | None = None,
        threads: int | None = None,
    ) -> None:
        check_preset(preset, PRESETS)
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self.preset = preset
        self.robot = robot = self.make_robot(preset)
        horizon = robot.physics.horizon if horizon is None else horizon
        super().__init__(num_envs, robot.objective, horizon, *_spaces(robot))
        self.set_tasks(np.asarray(self.first_task)[None])
        self.threads = threads or get_num_threads()
        self._batch = mujoco.batch.Batch(robot.model, num_envs, self.threads)
        self._batch.reset(stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        self._fresh = self._batch.state[0].copy()
        fields = (*_STATE, *robot.fields)
        self._state = {name: self._batch.bind(name) for name in fields}
        none, velocity = mujoco.mjtStage.mjSTAGE_NONE, mujoco.mjtStage.mjSTAGE_VEL
        self._stage = (velocity if robot.kinematics else none).value

    def _start(self, seeds: NDArray[Any]) -> NDArray[Any]:
        self._batch.state[:] = self._fresh
        self._batch.warning[:] = 0
        self._state["qpos"][:], self._state["qvel"][:] = self.robot.start(seeds)
        self._batch.forward()
        return self.robot.observe(self._state)

    def _advance(
        self, actions: NDArray[Any], running: NDArray[Any] | None
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None, NDArray[Any] | None]:
        robot, batch = self.robot, self._batch
        robot.control(actions, out=self._state["ctrl"])
        before = robot.before(self._state)
        failed: NDArray[Any] | None = None
        try:
            batch.step(running, robot.physics.frame_skip, self._stage)
        except mujoco.batch.SimulationError as error:
            failed = error.ids
        observation, reward, terminated = robot.measure(self._state, before, self._task)
        if (
            failed is None
            and not batch.warning[:, _BAD, 1].any()
            and np.isfinite(observation).all()
            and np.isfinite(reward).all()
        ):
            return observation, reward, terminated, None
        finite = np.isfinite(observation).all(1) & np.isfinite(reward)
        finite &= ~batch.warning[:, _WARNINGS, 1].any(1)
        if failed is not None:
            finite[failed] = False
        return observation, reward, terminated, finite

    def close_extras(self, **kwargs: Any) -> None:
        """Ends the threads, which live as long as any view of the batch."""
        del self._batch, self._state
