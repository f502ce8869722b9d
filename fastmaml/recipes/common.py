"""What all experiments share: settings, building the parts, a run from end to end."""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler

from fastmaml.engines.placement import backend_for, check_device, missing
from fastmaml.learners import MAML
from fastmaml.optim import Adam
from fastmaml.tasks.batch import TaskBatch
from fastmaml.tasks.sampler import TaskSampler, check_count
from fastmaml.train.checkpoint import (
    LAST,
    checkpoint_path,
    fitting,
    load_checkpoint,
    seed_everything,
    write_text_atomically,
)
from fastmaml.train.logging import clock
from fastmaml.train.loop import DivergenceError, FitResult, fit
from fastmaml.train.watch import set_threads

SETTINGS = "settings.json"
Preset = Literal["paper", "code"]
Subset = Literal["train", "val", "test"]
E = TypeVar("E", bound="Experiment")


class UserError(Exception):
    """Something the user can put right; the command line prints it as one line."""


@dataclass(frozen=True)
class Experiment(abc.ABC):
    """Settings every experiment has; the subclasses add theirs and build the parts."""

    preset: Preset = "paper"
    """settings of the paper, or of its reference code where the two differ"""
    iterations: int = 60_000
    """meta-steps"""
    meta_batch: int = 32
    """tasks in a meta-step"""
    inner_lr: float = 0.4
    """learning rate of the inner loop"""
    inner_steps: int = 1
    """inner steps in training"""
    test_steps: int = 3
    """inner steps in validation and test"""
    first_order: bool = False
    """leave the second derivatives out (FOMAML)"""
    learn_rates: bool = False
    """train the inner learning rates too"""
    rates: Literal["scalar", "per_tensor", "per_parameter"] = "scalar"
    """how many inner learning rates there are"""
    meta_lr: float = 1e-3
    """learning rate of Adam, the outer optimizer"""
    meta_lr_decay: Literal["none", "cosine"] = "none"
    """lower that rate over the iterations: not at all, or to zero along a cosine"""
    clip_gradient: float | None = None
    """hold each element of the meta-gradient within this, plus or minus"""
    engine: Literal["auto", "native", "functional"] = "auto"
    """what computes the meta-gradient"""
    device: str = "cpu"
    """where to train: cpu, cuda, cuda:1"""
    threads: int | None = None
    """CPU threads; all cores unless told"""
    seed: int = 0
    """seed of the parameters and of the training tasks"""
    validate_every: int = 1000
    """meta-steps between validations"""
    validation_tasks: int = 200
    """fixed tasks to validate on"""
    test_tasks: int = 600
    """tasks of the evaluation that ends a run; 0 leaves it out"""
    checkpoint_every: int = 1000
    """meta-steps between checkpoints"""
    log_every: int = 100
    """meta-steps a row of metrics is the mean of"""
    out: str | None = None
    """folder of the run; runs/NAME-DATE-TIME unless told"""
    resume: str | None = None
    """folder of a run to go on with, its settings included"""
    tensorboard: bool = True
    """write TensorBoard files, where it is installed"""
    progress: bool = True
    """show a progress bar, or lines where there is no terminal"""
    plots: bool = True
    """write PNGs at the end"""

    name: ClassVar[str]
    presets: ClassVar[tuple[str, ...]] = ("paper", "code")
    selectors: ClassVar[dict[str, type]] = {}
    """settings, besides preset, that others of a preset depend on"""
    evaluation_chunk: ClassVar[int] = 100
    """tasks evaluated together"""
    published: ClassVar[str] = "Finn et al. 2017"

    @classmethod
    @abc.abstractmethod
    def from_preset(cls: type[E], preset: Preset, **selected: Any) -> E:
        """Settings of a preset, for the values of the selectors."""

    @abc.abstractmethod
    def make_model(self) -> nn.Module:
        """The network, freshly initialised by torch's global generator."""

    @abc.abstractmethod
    def make_tasks(
        self,
        subset: Subset = "train",
        *,
        shots: int | None = None,
        queries: int | None = None,
        seed: int = 0,
    ) -> TaskSampler:
        """Tasks of a subset; shots and queries as in the settings unless told."""

    @abc.abstractmethod
    def make_learner(self, model: nn.Module) -> MAML:
        """The learner of this experiment around ``model``."""

    def learner_options(self) -> dict[str, Any]:
        """Arguments of the learner that every experiment sets the same way."""
        return {
            "inner_lr": self.inner_lr,
            "inner_steps": self.inner_steps,
            "first_order": self.first_order,
            "rates": self.rates,
            "learn_rates": self.learn_rates,
            "engine": self.engine,
        }

    def validation(self) -> TaskBatch:
        """The fixed tasks of the validation."""
        return self.make_tasks("val").fixed(self.validation_tasks)

    def train(self) -> int:
        """Runs the experiment; see :func:`train`."""
        return train(self)

    def check(self) -> None:
        """Refuses counts and devices that make no sense, before a run begins."""
        check_device(self.device)
        for name in ("iterations", "validation_tasks", "test_tasks"):
            check_count(name, getattr(self, name), least=0)
        for name in ("meta_batch", "validate_every", "checkpoint_every", "log_every"):
            check_count(name, getattr(self, name))

    def build(self) -> MAML:
        """Seeds all generators, makes the model and its learner on the device."""
        set_threads(self.threads)
        seed_everything(self.seed)
        learner = self.make_learner(self.make_model().to(self.device))
        if learner.report.engine == "native":
            # torch has little to do; its workers would spin on the engine's cores
            torch.set_num_threads(1)
        return learner


def save_settings(experiment: Any, run_dir: Path) -> None:
    """Writes ``settings.json``, from which a run is resumed and evaluated."""
    import fastmaml

    run_dir.mkdir(parents=True, exist_ok=True)
    settings = dataclasses.asdict(experiment) | {"out": str(run_dir), "resume": None}
    record = {
        "experiment": experiment.name,
        "settings": settings,
        "fastmaml": getattr(fastmaml, "__version__", "unknown"),
        "torch": torch.__version__,
    }
    write_text_atomically(run_dir / SETTINGS, json.dumps(record, indent=2) + "\n")


def load_experiment(run_dir: str | Path) -> Any:
    """Reads the settings of a run.

    Raises:
        UserError: there is no run in this folder, or its settings can't be read.
    """
    from fastmaml.recipes import recipe

    path = Path(run_dir) / SETTINGS
    if not path.is_file():
        raise UserError(f"no run in {run_dir}: it has no {SETTINGS}")
    try:
        record = json.loads(path.read_text())
        kind, stored = recipe(record["experiment"]), record["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} can't be read as settings: {error}") from error
    unknown = set(stored) - {f.name for f in dataclasses.fields(kind)}
    if unknown:
        raise UserError(f"{path} has unknown settings: {', '.join(sorted(unknown))}")
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()
    }
    return kind(**values)


def load_run(
    run_dir: str | Path, checkpoint: str = "best"
) -> tuple[Experiment, MAML, Path, int]:
    """Rebuilds the learner of a run.

    Args:
        run_dir: the run's folder.
        checkpoint: ``best`` or ``last``; ``best`` falls back to ``last`` in runs that
            never validated.

    Returns:
        Settings, learner, the checkpoint's path, and its iteration.

    Raises:
        UserError: there is no run, or no checkpoint that can be read.
    """
    experiment = load_experiment(run_dir)
    path = checkpoint_path(run_dir, checkpoint)
    with user_errors():
        state = load_checkpoint(path, experiment.device)
        learner = experiment.build()
        with fitting(path):
            learner.load_state_dict(state.learner)
    return experiment, learner, path, state.iteration


@contextmanager
def user_errors() -> Iterator[None]:
    """Turns errors of values, paths and missing packages into :class:`UserError`."""
    try:
        yield
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        raise UserError(str(error)) from error


def adam(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Adam in its fastest form that works for these parameters."""
    parameters = list(parameters)
    if all(missing(backend_for(p.device)) is None for p in parameters):
        return Adam(parameters, lr)
    try:
        return torch.optim.Adam(parameters, lr, fused=True)
    except RuntimeError:
        return torch.optim.Adam(parameters, lr, foreach=True)


def train(experiment: Experiment) -> int:
    """Runs an experiment from end to end: train, evaluate, plot.

    Returns:
        The exit code of the command: 0, or 130 after Ctrl-C.

    Raises:
        UserError: a setting, path or package is at fault, or training diverged.
    """
    from fastmaml.recipes.evaluation import Evaluate, evaluate
    from fastmaml.recipes.folder import check_folder, run_folder

    check_folder(experiment)
    with user_errors():
        experiment.check()
        learner = experiment.build()
        tasks = experiment.make_tasks("train", seed=experiment.seed)
        validation = experiment.validation() if experiment.validation_tasks else None
        optimizer = adam(learner.parameters(), experiment.meta_lr)
        run_dir = run_folder(experiment)
        save_settings(experiment, run_dir)
    announce(experiment, learner.report, run_dir)
    result = _fit(experiment, learner, tasks, optimizer, validation, run_dir)
    if result.interrupted:
        print(
            f"stopped after iteration {result.iteration:,}; saved {run_dir / LAST}\n"
            f"resume with: fastmaml train {experiment.name} --resume {run_dir}"
        )
        return 130
    print(f"trained {result.iteration:,} meta-steps in {clock(result.seconds)}")
    if experiment.test_tasks:
        evaluate(Evaluate(run=str(run_dir), tasks=experiment.test_tasks))
    if experiment.plots:
        from fastmaml.plot import plot_run

        for path in plot_run(run_dir):
            print(f"wrote {path}")
    return 0


def _schedule(
    experiment: Experiment, optimizer: torch.optim.Optimizer
) -> LRScheduler | None:
    if experiment.meta_lr_decay == "none":
        return None
    return CosineAnnealingLR(optimizer, max(1, experiment.iterations))


def _fit(
    experiment: Experiment,
    learner: MAML,
    tasks: TaskSampler,
    optimizer: torch.optim.Optimizer,
    validation: TaskBatch | None,
    run_dir: Path,
) -> FitResult:
    try:
        return fit(
            learner,
            tasks,
            optimizer,
            iterations=experiment.iterations,
            meta_batch=experiment.meta_batch,
            validation=validation,
            validate_every=experiment.validate_every,
            validation_steps=experiment.test_steps,
            validation_chunk=experiment.evaluation_chunk,
            run_dir=run_dir,
            checkpoint_every=experiment.checkpoint_every,
            log_every=experiment.log_every,
            clip_gradient=experiment.clip_gradient,
            schedule=_schedule(experiment, optimizer),
            resume=experiment.resume is not None,
            progress=experiment.progress,
            tensorboard=None if experiment.tensorboard else False,
            settings=experiment,
        )
    except (DivergenceError, ValueError) as error:
        raise UserError(str(error)) from error


def announce(experiment: Any, report: Any, run_dir: Path) -> None:
    """Prints the settings of a run before it begins."""
    hidden = {"out", "resume", "preset", "progress", "plots", "tensorboard"}
    shown = [
        f"{f.name} {getattr(experiment, f.name)}"
        for f in dataclasses.fields(experiment)
        if f.name not in hidden and getattr(experiment, f.name) is not None
    ]
    lines, line = [], ""
    for item in shown:
        if len(line) + len(item) > 86:
            lines.append(line)
            line = ""
        line += ("  " if not line else ", ") + item
    print(f"fastmaml train {experiment.name}, preset {experiment.preset}")
    print("\n".join([*lines, line]))
    print(report)
    print(f"run: {run_dir}", flush=True)
