"""Training a policy for many meta-iterations: log, validate, save, go on.

All that is drawn in an iteration comes from the run's seed and the iteration's number,
so a checkpoint holds parameters, the optimizer and that number, and a run that was
killed and resumed ends in the same bits as one that was not.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmaml.rl.learner import Iteration, MetaRL
from fastmaml.rl.noise import collection_seed
from fastmaml.train.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    CheckpointError,
    fitting,
    open_run,
    plain_settings,
    save_checkpoint,
)
from fastmaml.train.logging import MetricsLog, Progress
from fastmaml.train.watch import DivergenceError, StopSignals

_TASKS = 1 << 20  # where an iteration's draws of tasks are apart from its collections


@dataclass(frozen=True)
class RLResult:
    """What a call of :func:`fit_rl` leaves behind.

    Attributes:
        iteration: meta-iterations done in all.
        interrupted: whether Ctrl-C or SIGTERM ended it early; the state is saved.
        best: best mean return of a validation, ``None`` without one.
        seconds: spent in the loop, earlier parts of a resumed run included.
        environment_steps: taken in training, likewise.
        history: rows as in ``metrics.jsonl``.
    """

    iteration: int
    interrupted: bool
    best: float | None
    seconds: float
    environment_steps: int
    history: list[dict[str, Any]] = field(repr=False)


@dataclass(frozen=True)
class Validation:
    """Held-out tasks that are tried from time to time.

    Attributes:
        learner: the policy on the rows of the validation.
        tasks: [T, ...], the same every time.
        rates: of the inner steps.
        every: meta-iterations between validations; one more follows the last.
        seed: of what is drawn, the same every time.
    """

    learner: MetaRL
    tasks: Any
    rates: tuple[float, ...]
    every: int
    seed: int


def fit_rl(
    learner: MetaRL,
    *,
    iterations: int,
    meta_batch: int,
    run_dir: str | Path | None = None,
    validation: Validation | None = None,
    checkpoint_every: int = 10,
    resume: bool = False,
    progress: bool = True,
    tensorboard: bool | None = None,
    settings: Any = None,
) -> RLResult:
    """Trains a policy.

    Args:
        learner: policy, environments and meta-update.
        iterations: meta-iterations in all, those before a resume included.
        meta_batch: tasks of each, T.
        run_dir: folder of checkpoints and logs; ``None`` writes nothing.
        validation: keeps the best policy on held-out tasks in ``best.pt``.
        checkpoint_every: iterations between writings of ``last.pt``.
        resume: go on from ``run_dir/last.pt``; begins anew if there is none yet.
        progress: show a bar (a terminal) or plain lines (else) on standard error.
        tensorboard: write event files; ``None`` does where TensorBoard is installed.
        settings: dataclass or mapping of plain types to store in checkpoints.

    Returns:
        Counts and metrics. Ctrl-C (SIGINT) and SIGTERM end the loop after the running
        iteration with ``interrupted`` set.

    Raises:
        DivergenceError: returns or parameters are no longer finite.
        CheckpointError: ``last.pt`` can't be read.
        ValueError: ``run_dir`` already holds a run and ``resume`` is false, or the run
            is past ``iterations``.
    """
    run = _Run(learner, None if run_dir is None else Path(run_dir), validation)
    run.settings = {} if settings is None else plain_settings(settings)
    run.begin(resume, iterations)
    run.log = MetricsLog(run.run_dir, iteration=run.iteration, tensorboard=tensorboard)
    run.progress = Progress(iterations, run.iteration, enabled=progress)
    try:
        with StopSignals() as stop:
            if not run.iteration:
                run.save()
            run.loop(iterations, meta_batch, checkpoint_every, stop)
    finally:
        run.progress.close()
        run.log.close()
    return RLResult(
        iteration=run.iteration,
        interrupted=stop.requested and run.iteration < iterations,
        best=run.best,
        seconds=run.seconds(),
        environment_steps=run.environment_steps,
        history=run.log.rows,
    )


class _Run:
    """The state of a run."""

    log: MetricsLog
    progress: Progress
    settings: dict[str, Any]

    def __init__(
        self, learner: MetaRL, run_dir: Path | None, validation: Validation | None
    ) -> None:
        self.learner, self.run_dir, self.validation = learner, run_dir, validation
        self.iteration = 0
        self.environment_steps = 0
        self.best: float | None = None
        self.seconds_before = 0.0
        self.began = time.perf_counter()

    def begin(self, resume: bool, iterations: int) -> None:
        """Goes on where the run in the folder has stopped, if asked to."""
        found = open_run(self.run_dir, resume, iterations)
        if found is not None and self.run_dir is not None:
            with fitting(self.run_dir / LAST):
                self._restore(found)

    def loop(
        self, iterations: int, meta_batch: int, save_every: int, stop: StopSignals
    ) -> None:
        """Meta-iterations until all are done or somebody stops them."""
        learner, envs = self.learner, self.learner.envs
        self.began = time.perf_counter()
        for iteration in range(self.iteration + 1, iterations + 1):
            seed = collection_seed(learner.seed, iteration, _TASKS)
            found = learner.iterate(envs.sample_tasks(meta_batch, seed), iteration)
            self.iteration = iteration
            self.environment_steps += found.environment_steps
            self._log(found)
            ending = iteration == iterations
            v = self.validation
            if v is not None and (iteration % v.every == 0 or ending):
                self._validate(v)
            if iteration % save_every == 0 or ending or stop.requested:
                self.save()
            if time.perf_counter() >= self.progress.due or ending:
                figures = ", ".join(f"{x:.2f}" for x in found.returns)
                self.progress.tell(iteration, f"returns {figures}")
            if stop.requested:
                break

    def _log(self, found: Iteration) -> None:
        if not all(map(math.isfinite, found.returns)):
            raise self._diverged("a return is not finite")
        step = found.step
        row: dict[str, Any] = {
            "kind": "train",
            "iteration": self.iteration,
            "returns": found.returns,
            "loss": step.loss_before,
            "improvement": step.loss_before - step.loss,
            "kl": step.kl,
            "accepted": float(step.accepted),
            "backtracks": step.backtracks,
            "environment_steps": found.environment_steps,
            "nonfinite_episodes": found.failures,
        }
        row |= {f"{what}_seconds": spent for what, spent in found.seconds.items()}
        self._write(row)

    def _validate(self, v: Validation) -> None:
        returns, _ = v.learner.adapted_returns(v.tasks, v.rates, seed=v.seed)
        means = returns.mean(0).tolist()
        metric = sum(means[1:]) / max(1, len(means) - 1) if v.rates else means[0]
        better = math.isfinite(metric) and (self.best is None or metric > self.best)
        if better:
            self.best = metric
        row = {"kind": "validation", "iteration": self.iteration, "returns": means}
        if len(v.tasks) > 1:
            spread = 1.96 * returns.std(0) / len(v.tasks) ** 0.5
            row["interval"] = spread.tolist()
        self._write({**row, "best": self.best})
        figures = ", ".join(f"{x:.2f}" for x in means)
        self.progress.say(
            f"iteration {self.iteration:,}: validation returns {figures} after "
            f"0..{len(v.rates)} steps, {len(v.tasks)} tasks"
        )
        if better:
            self.save(BEST)

    def _write(self, row: dict[str, Any]) -> None:
        row["seconds"] = self.seconds()
        self.log.write({name: _finite(value) for name, value in row.items()})

    def seconds(self) -> float:
        """In the loop, earlier parts of a resumed run included."""
        return self.seconds_before + time.perf_counter() - self.began

    def save(self, name: str = LAST) -> None:
        """Writes a checkpoint, if there is a folder for it."""
        if self.run_dir is None:
            return
        self.log.sync()
        state = self.learner.state_dict()
        checkpoint = Checkpoint(
            iteration=self.iteration,
            learner=state["model"],
            optimizer=state.get("optimizer", {}),
            progress={
                "best": self.best,
                "seconds": self.seconds(),
                "environment_steps": self.environment_steps,
            },
            settings=self.settings,
        )
        try:
            save_checkpoint(self.run_dir / name, checkpoint)
        except CheckpointError as error:
            raise self._diverged("a parameter is not finite") from error

    def _restore(self, checkpoint: Checkpoint) -> None:
        restore(self.learner, checkpoint)
        self.iteration = checkpoint.iteration
        self.best = checkpoint.progress["best"]
        self.seconds_before = checkpoint.progress["seconds"]
        self.environment_steps = checkpoint.progress["environment_steps"]

    def _diverged(self, what: str) -> DivergenceError:
        good = "no checkpoint was written (run_dir=None)"
        if self.run_dir is not None:
            good = f"the last good checkpoint is {self.run_dir / LAST}"
        return DivergenceError(
            f"training diverged at iteration {self.iteration}: {what}; {good}"
        )


def _finite(value: Any) -> Any:
    """The value, ``None`` in place of numbers that JSON has no words for."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def restore(learner: MetaRL, checkpoint: Checkpoint) -> None:
    """Gives a learner the state of a checkpoint."""
    state: dict[str, Any] = {"model": checkpoint.learner}
    if checkpoint.optimizer:
        state["optimizer"] = checkpoint.optimizer
    learner.load_state_dict(state)
