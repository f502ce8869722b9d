"""The training loop: sample, meta-gradient, outer step; log, validate, save.

Meta-steps of small networks take some hundred microseconds, so the loop adds little:
it reads the loss and a clock, and leaves all else to iterations where it is due. On a
GPU it reads not even the loss (`fastmaml.train.step`). Gradients are written straight
into ``.grad``; no autograd graph is made.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fastmaml.learners.base import Evaluation
from fastmaml.tasks.batch import TaskBatch
from fastmaml.tasks.sampler import TaskSampler, check_count
from fastmaml.train.checkpoint import (
    BEST,
    LAST,
    Checkpoint,
    CheckpointError,
    fitting,
    non_finite,
    open_run,
    plain_settings,
    random_state,
    save_checkpoint,
    set_random_state,
)
from fastmaml.train.evaluate import (
    evaluate_tasks,
    figures,
    headline,
    is_better,
    sentence,
)
from fastmaml.train.logging import MetricsLog, Progress
from fastmaml.train.step import DeviceStep, HostStep, Parts, make_step
from fastmaml.train.watch import DivergenceError, LossWatch, StopSignals

__all__ = ["DivergenceError", "FitResult", "fit"]


@dataclass(frozen=True)
class FitResult:
    """What a call of :func:`fit` leaves behind.

    Attributes:
        iteration: meta-steps done in all.
        finished: whether that is as many as were asked for.
        interrupted: whether Ctrl-C or SIGTERM ended it early; the state is saved.
        best: best validation metric: highest accuracy after the last inner step, or
            else lowest mean of the losses after 1..K steps; ``None`` without one.
        best_iteration: when it was reached.
        validation: the latest validation.
        seconds: spent in the loop, earlier parts of a resumed run included.
        history: rows as in ``metrics.jsonl``.
        run_dir: the run's folder, ``None`` if nothing was written.
        how: the way the meta-steps ran: on a GPU what was captured in a CUDA graph, or
            why nothing was.
    """

    iteration: int
    finished: bool
    interrupted: bool
    best: float | None
    best_iteration: int | None
    validation: Evaluation | None
    seconds: float
    history: list[dict[str, Any]] = field(repr=False)
    run_dir: Path | None
    how: str


def fit(
    learner: Any,
    tasks: TaskSampler,
    optimizer: Optimizer,
    *,
    iterations: int,
    meta_batch: int,
    validation: TaskBatch | None = None,
    validate_every: int = 1000,
    validation_steps: int | None = None,
    validation_chunk: int = 100,
    run_dir: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 1000,
    log_every: int = 100,
    clip_gradient: float | None = None,
    schedule: LRScheduler | None = None,
    resume: bool = False,
    progress: bool = True,
    tensorboard: bool | None = None,
    settings: Any = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
    divergence_factor: float = 1000.0,
) -> FitResult:
    """Trains a learner.

    A run that was killed at any moment and resumed ends in the same bits as one that
    was not: parameters, inner rates, optimizer, sampler and random generators come
    back from ``last.pt``, and rows of ``metrics.jsonl`` written after it are dropped,
    to be written again.

    On a GPU the native engine's meta-steps are captured in a CUDA graph together with
    the optimizer, if that is one of `fastmaml.optim`, and with sampling, if `tasks`
    draw there. The loss is then read where a row of metrics or a checkpoint is due, and
    not before; what is not captured is said in the progress and in the result.

    Args:
        learner: ``backward(tasks, accumulate=False)``, ``evaluate``, ``state_dict`` and
            so on.
        tasks: draws the meta-batches.
        optimizer: over ``learner.parameters()``.
        iterations: meta-steps in all, those before a resume included.
        meta_batch: tasks in a meta-step (T).
        validation: fixed tasks; the best parameters on them are kept in ``best.pt``.
        validate_every: iterations between validations; one more follows the last.
        validation_steps: inner steps of the validation (K); the learner's unless told.
        validation_chunk: tasks validated together.
        run_dir: folder of checkpoints and logs; ``None`` writes nothing.
        checkpoint_every: iterations between writings of ``last.pt``.
        log_every: iterations a row of metrics is the mean of.
        clip_gradient: each element of the meta-gradient is held within this, ±.
        schedule: learning-rate schedule of ``optimizer``, stepped once an iteration.
        resume: go on from ``run_dir/last.pt``; begins anew if there is none yet.
        progress: show a bar (a terminal) or plain lines (else) on standard error.
        tensorboard: write event files; ``None`` does where TensorBoard is installed.
        settings: dataclass or mapping of plain types to store in checkpoints.
        on_log: called with every row of metrics.
        divergence_factor: training stops when the running mean of the loss exceeds
            this times its mean over the first 20 iterations.

    Returns:
        Counts, metrics and the run's folder. Ctrl-C (SIGINT) and SIGTERM end the
        loop after the running iteration with ``interrupted`` set; a second Ctrl-C
        raises KeyboardInterrupt at once.

    Raises:
        DivergenceError: the loss or a parameter became NaN or infinite, or the loss
            grew by ``divergence_factor``; names the last good checkpoint.
        CheckpointError: ``last.pt`` can't be read.
        ValueError: a count is not positive, ``run_dir`` already holds a run and
            ``resume`` is false, or the run is past ``iterations``.
    """
    every = {
        "log_every": log_every,
        "validate_every": validate_every,
        "checkpoint_every": checkpoint_every,
    }
    for name, value in {"meta_batch": meta_batch, **every}.items():
        check_count(name, value)
    check_count("iterations", iterations, least=0)
    if clip_gradient is not None and not clip_gradient > 0:
        raise ValueError(f"clip_gradient must be positive or None, got {clip_gradient}")
    trainer = _Trainer(learner, tasks, optimizer, schedule, run_dir)
    trainer.settings = {} if settings is None else plain_settings(settings)
    trainer.validation, trainer.validation_steps = validation, validation_steps
    trainer.validation_chunk = validation_chunk
    trainer.clip_gradient, trainer.on_log = clip_gradient, on_log
    trainer.watch = LossWatch(divergence_factor)
    trainer.every = every
    return trainer.fit(iterations, meta_batch, resume, progress, tensorboard)


class _Trainer:
    """The state of one call of :func:`fit`, which sets the public attributes."""

    settings: dict[str, Any]
    validation: TaskBatch | None
    validation_steps: int | None
    validation_chunk: int
    clip_gradient: float | None
    on_log: Callable[[dict[str, Any]], None] | None
    watch: LossWatch
    every: dict[str, int]

    def __init__(
        self,
        learner: Any,
        tasks: TaskSampler,
        optimizer: Optimizer,
        schedule: LRScheduler | None,
        run_dir: str | os.PathLike[str] | None,
    ) -> None:
        self.learner, self.tasks, self.optimizer = learner, tasks, optimizer
        self.schedule = schedule
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.parameters = [p for g in optimizer.param_groups for p in g["params"]]
        self.iteration = 0
        self.best: float | None = None
        self.best_iteration: int | None = None
        self.last_validation: Evaluation | None = None
        self.seconds_before = 0.0
        self.began = self.logged_at = time.perf_counter()
        self.logged_iteration = 0
        self.saved = 0
        self.how = ""

    def fit(
        self,
        iterations: int,
        meta_batch: int,
        resume: bool,
        progress: bool,
        tensorboard: bool | None,
    ) -> FitResult:
        self._begin(resume, iterations)
        self.log = MetricsLog(
            self.run_dir, iteration=self.iteration, tensorboard=tensorboard
        )
        self.progress = Progress(iterations, self.iteration, enabled=progress)
        try:
            with StopSignals() as stop:
                if not self.iteration:
                    self._save()
                self._run(iterations, meta_batch, stop)
        finally:
            self.progress.close()
            self.log.close()
        return self._result(iterations, stop.requested)

    def _begin(self, resume: bool, iterations: int) -> None:
        found = open_run(self.run_dir, resume, iterations, self.parameters[0].device)
        if found is not None and self.run_dir is not None:
            with fitting(self.run_dir / LAST):
                self._restore(found)

    def _run(self, iterations: int, meta_batch: int, stop: StopSignals) -> None:
        # the learner overwrites gradients of its own parameters; others get none
        for parameter in self.parameters:
            parameter.grad = None
        parts = Parts(
            self.learner,
            self.tasks,
            meta_batch,
            self.optimizer,
            self.clip_gradient,
            self.watch,
            self.progress.say,
        )
        step = make_step(parts)
        try:
            self._iterate(step, iterations, stop)
        finally:
            self.how = step.how
            step.close()

    def _iterate(
        self, step: HostStep | DeviceStep, iterations: int, stop: StopSignals
    ) -> None:
        schedule, progress = self.schedule, self.progress
        log, validate = self.every["log_every"], self.every["validate_every"]
        save, now = self.every["checkpoint_every"], time.perf_counter
        self.began = self.logged_at = now()
        self.logged_iteration = self.iteration
        for iteration in range(self.iteration + 1, iterations + 1):
            if not step():
                raise self._diverged(iteration)
            if schedule is not None:
                schedule.step()
            self.iteration = iteration
            ending = iteration == iterations
            if iteration % log == 0 or ending:
                self._log()
            if iteration % validate == 0 or ending:
                self._validate()
            if iteration % save == 0 or ending or stop.requested:
                self._save()
            if now() >= progress.due or ending:
                progress.show(iteration, *self.watch.recent())
            if stop.requested:
                break

    def _log(self) -> None:
        loss, accuracy = self.watch.take()  # waits for a device, so the clock is later
        now = time.perf_counter()
        if not math.isfinite(loss):
            raise self._diverged(self.iteration)
        row: dict[str, Any] = {"kind": "train", "iteration": self.iteration}
        row["loss"] = loss
        if accuracy is not None:
            row["accuracy"] = accuracy
        row["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        steps, seconds = self.iteration - self.logged_iteration, now - self.logged_at
        row["meta_steps_per_second"] = steps / max(seconds, 1e-9)
        self.logged_at, self.logged_iteration = now, self.iteration
        self._write(row)

    def _validate(self) -> None:
        if self.validation is None:
            return
        found = evaluate_tasks(
            self.learner,
            self.validation,
            steps=self.validation_steps,
            chunk=self.validation_chunk,
        )
        self.last_validation = found
        metric = headline(found)
        better = is_better(found, metric, self.best)
        if better:
            self.best, self.best_iteration = metric, self.iteration
        row = {"kind": "validation", "iteration": self.iteration, **figures(found)}
        row["best"] = self.best
        self._write(row)
        self.progress.say(f"iteration {self.iteration:,}: {sentence(found)}")
        if better:
            self._save(BEST)
        self.logged_at = time.perf_counter()
        self.logged_iteration = self.iteration

    def _write(self, row: dict[str, Any]) -> None:
        row["seconds"] = self._seconds()
        self.log.write(row)
        if self.on_log is not None:
            self.on_log(row)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    def _save(self, name: str = LAST) -> None:
        if self.run_dir is None:
            if non_finite(self.learner.state_dict()):
                raise self._diverged(self.iteration, "a parameter is not finite")
            return
        self.log.sync()
        try:
            save_checkpoint(self.run_dir / name, self._checkpoint())
        except CheckpointError as error:
            raise self._diverged(self.iteration, "a parameter is not finite") from error
        if name == LAST:
            self.saved = self.iteration

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            iteration=self.iteration,
            learner=self.learner.state_dict(),
            optimizer=self.optimizer.state_dict(),
            sampler=self.tasks.state_dict(),
            schedule=None if self.schedule is None else self.schedule.state_dict(),
            random=random_state(),
            progress={
                "best": self.best,
                "best_iteration": self.best_iteration,
                "seconds": self._seconds(),
                "watch": self.watch.state_dict(),
            },
            settings=self.settings,
        )

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.learner.load_state_dict(checkpoint.learner)
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.tasks.load_state_dict(checkpoint.sampler)
        if self.schedule is not None and checkpoint.schedule is not None:
            self.schedule.load_state_dict(checkpoint.schedule)
        set_random_state(checkpoint.random)
        self.iteration = self.saved = checkpoint.iteration
        self.best = checkpoint.progress["best"]
        self.best_iteration = checkpoint.progress["best_iteration"]
        self.seconds_before = checkpoint.progress["seconds"]
        self.watch.load_state_dict(checkpoint.progress["watch"])

    def _diverged(self, iteration: int, what: str | None = None) -> DivergenceError:
        what = what or self.watch.complaint()
        good = "no checkpoint was written (run_dir=None)"
        if self.run_dir is not None:
            last = f"{self.run_dir / LAST} (iteration {self.saved})"
            good = f"the last good checkpoint is {last}"
        return DivergenceError(
            f"training diverged at iteration {iteration}: {what}; {good}. Lower the "
            "outer or inner learning rate, or clip the gradient"
        )

    def _result(self, iterations: int, stopped: bool) -> FitResult:
        finished = self.iteration >= iterations
        return FitResult(
            iteration=self.iteration,
            finished=finished,
            interrupted=stopped and not finished,
            best=self.best,
            best_iteration=self.best_iteration,
            validation=self.last_validation,
            seconds=self._seconds(),
            history=self.log.rows,
            run_dir=self.run_dir,
            how=self.how,
        )
