"""How fast locomotion is simulated: rows of tasks against MuJoCo alone and gymnasium.

    python -m bench.rl_envs --out bench/results/NAME-rl-envs.json [--resume]

For each robot and preset, the contenders step random actions in one process, in
interleaved rounds (``bench.timing``):

* ``fastmaml``: `step` of the rows, with observations, rewards, masks, and a reset each
  time the preset's horizon is over.
* ``mujoco.batch``: the same number of rows and threads, controls written and nothing
  read; states are put back to the beginning as often.
* ``mujoco.batch, fields read``: the same with the model and the stages that this
  robot's observations and rewards need, where those differ: the least that any
  program has to compute which returns them.
* gymnasium's own environment of the robot, with as many physics steps, in a plain
  loop, in `SyncVectorEnv`, and in `AsyncVectorEnv` with a process each.

Episodes of ants don't terminate here, so that everybody simulates all rows. Figures are
environment steps per second; ``of mujoco.batch`` is the ratio within rounds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import mujoco
import mujoco.batch
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from bench import facts, timing
from fastmaml.rl.envs.robot import PHYSICS, compiled, load
from fastmaml.rl.vector import make_rows

ROBOTS = {
    "cheetah": ("HalfCheetahDir", "HalfCheetah-v5", "half_cheetah.xml"),
    "ant": ("AntDir", "Ant-v5", "ant.xml"),
}
CASES = tuple(f"{robot}-{preset}" for robot in ROBOTS for preset in PHYSICS)
OURS, ALONE, READ = "fastmaml", "mujoco.batch", "mujoco.batch, fields read"
LOOPED = 16  # environments of a plain loop and of SyncVectorEnv
PROCESSES = 4
DRAWN = 64  # different actions

Call = Callable[[], object]


class Contenders:
    """The contenders of one case, and how many environment steps a call of each is.

    Args:
        case: robot and preset.
        rows: of fastmaml and of mujoco.batch.
        threads: of fastmaml and of mujoco.batch.
    """

    def __init__(self, case: str, rows: int, threads: int) -> None:
        robot, preset = case.split("-")
        self.name, self.theirs, self.file = ROBOTS[robot]
        self.preset, self.rows, self.threads = preset, rows, threads
        self.physics = PHYSICS[preset]
        self.calls: dict[str, Call] = {}
        self.steps: dict[str, int] = {}
        self._closing: list[Callable[[], None]] = []
        self._ours()
        self._loops()

    def close(self) -> None:
        """Ends threads and processes."""
        self.calls.clear()
        for close in self._closing:
            close()

    def _add(
        self,
        name: str,
        steps: int,
        actions: int,
        step: Callable[..., object],
        restart: Callable[[], object],
    ) -> None:
        """A contender: ``step`` with actions in turn, ``restart`` at each horizon."""
        drawn = np.random.default_rng(0).uniform(-1, 1, (DRAWN, steps, actions))
        drawn = drawn.astype(np.float32)
        state = {"t": 0}

        def call() -> None:
            if state["t"] % self.physics.horizon == 0:
                restart()
            step(drawn[state["t"] % DRAWN])
            state["t"] += 1

        self.calls[name] = call
        self.steps[name] = steps

    def _ours(self) -> None:
        envs: Any = make_rows(
            f"fastmaml/{self.name}-v0",
            self.rows,
            preset=self.preset,
            threads=self.threads,
        )
        robot = envs.robot
        robot.mortal = False
        actions = robot.model.nu
        scale = np.float32(self.physics.action_range)
        envs.set_tasks([1.0, -1.0])
        self._closing.append(envs.close)
        self._add(
            OURS,
            self.rows,
            actions,
            lambda drawn: envs.step(drawn * scale if scale != 1 else drawn),
            lambda: envs.reset(seed=0),
        )
        plain = compiled(load(self.file))
        plain.opt.timestep = robot.model.opt.timestep
        plain.geom_solimp[:] = robot.model.geom_solimp
        qpos, qvel = robot.start(np.arange(self.rows))
        self._batch(ALONE, plain, 0, (), qpos, qvel)
        if robot.fields:
            stage = mujoco.mjtStage.mjSTAGE_VEL.value if robot.kinematics else 0
            self._batch(READ, robot.model, stage, robot.fields, qpos, qvel)

    def _batch(
        self,
        name: str,
        model: Any,
        stage: int,
        fields: Sequence[str],
        qpos: Any,
        qvel: Any,
    ) -> None:
        batch = mujoco.batch.Batch(model, self.rows, self.threads)
        for field in fields:
            batch.bind(field)
        batch.bind("qpos")[:], batch.bind("qvel")[:] = qpos, qvel
        batch.forward()
        begin, control = batch.state.copy(), batch.bind("ctrl")
        skip = self.physics.frame_skip

        def step(drawn: Any) -> None:
            control[:] = drawn
            batch.step(None, skip, stage)

        def restart() -> None:
            batch.state[:] = begin

        self._add(name, self.rows, model.nu, step, restart)

    def _loops(self) -> None:
        theirs, skip = self.theirs, self.physics.frame_skip
        paper_ant = theirs == "Ant-v5" and self.preset == "finn2017"

        def make() -> Any:
            env: Any = gymnasium.make(
                theirs, frame_skip=skip, disable_env_checker=True
            ).unwrapped
            if paper_ant:
                env.model.opt.timestep = 0.02
                env.model.geom_solimp[:, :3] = 0.8, 0.8, 0.01
            if theirs == "Ant-v5":
                env._terminate_when_unhealthy = False
            return env

        single = [make() for _ in range(LOOPED)]
        actions = single[0].action_space.shape[0]

        def loop(drawn: Any) -> None:
            for env, action in zip(single, drawn, strict=True):
                env.step(action)

        def restart() -> None:
            for env in single:
                env.reset(seed=0)

        self._add("gymnasium loop", LOOPED, actions, loop, restart)
        sync = SyncVectorEnv([make] * LOOPED)
        many = AsyncVectorEnv([make] * PROCESSES)
        for name, envs in (("SyncVectorEnv", sync), ("AsyncVectorEnv", many)):
            self._closing.append(envs.close)
            reset = lambda envs=envs: envs.reset(seed=0)  # noqa: E731
            self._add(name, envs.num_envs, actions, envs.step, reset)


def measure(case: str, rows: int, threads: int, plan: timing.Plan) -> dict[str, Any]:
    """Times a case; steps per second, and ratios to mujoco.batch, of each contender."""
    contenders = Contenders(case, rows, threads)
    try:
        times = timing.interleave(contenders.calls, plan)
    finally:
        contenders.close()
    found = {}
    for name, samples in times.items():
        speeds = {r: contenders.steps[name] / s for r, s in samples.items()}
        summary = timing.summarize(list(speeds.values()))
        entry = {"rows": contenders.steps[name], "steps_per_second": vars(summary)}
        for other in (ALONE, READ):
            if name == OURS and other in times:
                theirs = {
                    r: contenders.steps[other] / s for r, s in times[other].items()
                }
                entry[f"of {other}"] = vars(timing.ratio(speeds, theirs))
        found[name] = entry
    return found


def table(cases: dict[str, Any]) -> str:
    """The cases as a table of environment steps per second."""
    lines = []
    for case, found in cases.items():
        lines.append(case)
        for name, entry in found.items():
            speed = entry["steps_per_second"]
            line = f"  {name:28}{speed['median']:12,.0f} env-steps/s"
            for other in (ALONE, READ):
                if ratio := entry.get(f"of {other}"):
                    line += f"   {ratio['median']:.1%} of {other}"
            lines.append(line)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the cases and writes them."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m bench.rl_envs")
    add = parser.add_argument
    add("--out", type=Path, help="the result file")
    add("--cases", nargs="+", choices=CASES, default=CASES)
    add("--rows", type=int, default=800)
    add("--threads", type=int, default=2)
    add("--rounds", type=int, default=11)
    add("--min-sample", type=float, default=0.12, help="seconds")
    add("--resume", action="store_true", help="keep the cases already in --out")
    options = parser.parse_args(arguments)
    plan = timing.Plan(
        rounds=options.rounds, budget=60.0, min_sample=options.min_sample, pause=0.01
    )
    known: dict[str, Any] = {}
    if options.resume and options.out and options.out.is_file():
        known = json.loads(options.out.read_text())["cases"]
    for case in options.cases:
        known[case] = measure(case, options.rows, options.threads, plan)
        print(table({case: known[case]}), flush=True)
    if options.out:
        result = {
            "schema": 1,
            "kind": "rl-envs",
            "command": shlex.join(["python", "-m", "bench.rl_envs", *arguments]),
            **facts.collect(),
            "plan": vars(plan),
            "threads": options.threads,
            "cases": {case: known[case] for case in CASES if case in known},
        }
        for package in ("mujoco", "gymnasium"):
            result["versions"][package] = importlib.metadata.version(package)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
