"""``fastmaml render``: an animation of an agent on a new task.

Robots are drawn by MuJoCo, which needs OpenGL: on a screen, or without one through EGL
or OSMesa. Which of them works is found out in processes of their own, because a broken
one may not be left again.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray

from fastmaml.recipes.common import UserError, load_experiment
from fastmaml.recipes.locomotion import Locomotion
from fastmaml.recipes.reinforcement import TEST_SEED, load_rl_run
from fastmaml.rl.adaptation import Adaptation
from fastmaml.rl.learner import MetaRL, processed
from fastmaml.rl.noise import action_noise, collection_seed
from fastmaml.rl.rollout import collect

_PROBE = "import mujoco; mujoco.GLContext(8, 8).free()"
_PACE = 30.0  # most frames a second


@dataclass(frozen=True)
class Render:
    """Animate an agent on a task it has not seen, as a GIF or mp4."""

    run: Annotated[str, tyro.conf.Positional]
    """folder of the run"""
    steps: int = 1
    """inner steps to adapt by; 0 shows the agent before"""
    task: int = 0
    """number of the held-out task"""
    out: str | None = None
    """file to write, .mp4 or .gif; RUN/plots/agent.mp4 unless told, .gif without
    ffmpeg"""
    checkpoint: Literal["best", "last"] = "best"
    """the best on the validation tasks, or the last"""
    seed: int = 0
    """which held-out tasks"""


def render(options: Render) -> Path:
    """Writes the animation of a run.

    Args:
        options: what to show.

    Returns:
        The file.

    Raises:
        UserError: there is no such run, its environment has no picture, or there is
            no OpenGL.
    """
    path = _file(options)
    for name in ("steps", "task", "seed"):
        if getattr(options, name) < 0:
            raise UserError(
                f"--{name} must be at least 0, got {getattr(options, name)}"
            )
    load_experiment(options.run)  # says so where there is no run
    _use_opengl()
    experiment, learner, _, _ = load_rl_run(options.run, options.checkpoint, 1)
    try:
        if not isinstance(experiment, Locomotion):
            raise UserError(
                f"{experiment.name} has no robot to draw; fastmaml plot {options.run} "
                "draws its paths"
            )
        rates = experiment.rates_at_test()
        rates = (rates + rates[-1:] * options.steps)[: options.steps]
        seed = TEST_SEED + options.seed
        task = learner.envs.sample_tasks(options.task + 1, seed)[-1:]
        adapted = _adapted(learner, task, rates, seed)
    finally:
        learner.envs.close()
    settings = {"preset": experiment.environment_settings()["preset"]}
    frames, pace = _frames(experiment, settings, learner, adapted, task, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, frames, pace)
    return path


def _adapted(
    learner: MetaRL, task: Any, rates: tuple[float, ...], seed: int
) -> dict[str, torch.Tensor]:
    adaptation = Adaptation(learner.policy, learner.policy.parameters(), 1)
    for k, rate in enumerate(rates):
        found = collect(
            learner.policy,
            adaptation.adapted,
            learner.envs,
            task,
            seed=collection_seed(seed, k),
        )
        adaptation.step(processed(found, learner.gamma, learner.lam), rate)
    return adaptation.adapted


def _frames(
    experiment: Locomotion,
    settings: dict[str, Any],
    learner: MetaRL,
    params: dict[str, torch.Tensor],
    task: NDArray[Any],
    seed: int,
) -> tuple[list[NDArray[Any]], float]:
    """Pictures of an episode, and how many a second."""
    import gymnasium

    env: Any = gymnasium.make(
        experiment.environment, render_mode="rgb_array", **settings
    ).unwrapped
    env.set_task(task[0])
    observation, _ = env.reset(seed=seed % 2**32)
    size = env.action_space.shape[0]
    horizon = experiment.horizon or env.horizon
    noise = action_noise(seed, 1, 1, horizon * size).view(1, 1, horizon, size)
    pace = float(env.metadata["render_fps"])
    every = max(1, round(pace / _PACE))
    frames = []
    shown = np.asarray(task, dtype=np.float32).reshape(-1)
    for t in range(horizon):
        if t % every == 0:
            frames.append(env.render())
        seen = observation
        if experiment.method == "oracle":
            seen = np.concatenate([observation, shown], dtype=np.float32)
        outputs = learner.policy.outputs(params, torch.from_numpy(seen).view(1, 1, -1))
        action = learner.policy.distribution.sample(outputs, noise[:, :, t])
        observation, _, terminated, _, _ = env.step(action.view(-1).numpy())
        if terminated:
            break
    env.close()
    return frames, pace / every


def _use_opengl() -> None:
    """Chooses what draws, before MuJoCo is imported.

    Raises:
        UserError: nothing can.
    """
    asked = os.environ.get("MUJOCO_GL")
    tried = []
    for library in [asked] if asked else ["egl", "osmesa", "glfw"]:
        environment = {**os.environ, "MUJOCO_GL": library}
        done = subprocess.run(
            [sys.executable, "-c", _PROBE],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode == 0:
            os.environ["MUJOCO_GL"] = library
            return
        lines = done.stderr.strip().splitlines()
        tried.append(f"{library}: {lines[-1] if lines else 'it crashed'}")
    raise UserError(
        f"nothing to draw with ({'; '.join(tried)}); install EGL or OSMesa, such as "
        "libegl1 or libosmesa6, or set MUJOCO_GL"
    )


def _file(options: Render) -> Path:
    """Where the animation goes."""
    if options.out is None:
        suffix = ".gif" if _ffmpeg() is None else ".mp4"
        return Path(options.run) / "plots" / f"agent{suffix}"
    path = Path(options.out)
    if path.suffix not in (".gif", ".mp4"):
        raise UserError(f"--out {path}: expected a .gif or .mp4 file")
    if path.suffix == ".mp4" and _ffmpeg() is None:
        raise UserError(
            f"--out {path}: an mp4 needs ffmpeg; pip install imageio-ffmpeg, install "
            "ffmpeg, or choose a .gif"
        )
    return path


def _ffmpeg() -> str | None:
    """The program that writes mp4 files: imageio-ffmpeg's, or the system's."""
    try:
        import imageio_ffmpeg

        found: str = imageio_ffmpeg.get_ffmpeg_exe()
        return found
    except (ImportError, RuntimeError):
        return shutil.which("ffmpeg")


def _write(path: Path, frames: list[NDArray[Any]], pace: float) -> None:
    """Writes frames [H, W, 3] of bytes, ``pace`` a second."""
    if path.suffix == ".mp4":
        _write_mp4(path, frames, pace)
        return
    from PIL import Image

    images = [Image.fromarray(frame).quantize(64) for frame in frames]
    images[0].save(
        path,
        save_all=True,
        append_images=images[1:],
        duration=round(1000 / pace),
        loop=0,
    )


def _write_mp4(path: Path, frames: list[NDArray[Any]], pace: float) -> None:
    height, width, _ = frames[0].shape
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    # players know no other layout of colours, which needs even sizes
    coded = ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p"]
    done = subprocess.run(
        [
            *(str(_ffmpeg()), "-y", "-loglevel", "error"),
            *(*raw, "-r", f"{pace:g}", "-i", "-", *coded, str(path)),
        ],
        input=np.stack(frames).tobytes(),
        capture_output=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else "it gave no reason"
        raise UserError(f"ffmpeg could not write {path}: {reason}; choose a .gif")
