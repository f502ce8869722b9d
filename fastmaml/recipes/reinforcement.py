"""What experiments of reinforcement learning share: settings, parts, a whole run."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch

from fastmaml import models
from fastmaml.recipes.common import (
    UserError,
    announce,
    load_experiment,
    save_settings,
    user_errors,
)
from fastmaml.recipes.folder import check_folder, run_folder
from fastmaml.recipes.rl_settings import VALIDATION_SEED, check_settings
from fastmaml.rl.learner import MetaRL, Update
from fastmaml.rl.loop import Validation, fit_rl, restore
from fastmaml.rl.oracle import OracleRows
from fastmaml.rl.policies import Policy
from fastmaml.rl.trpo import Trpo
from fastmaml.rl.vector import RowsEnv, make_rows
from fastmaml.train.checkpoint import (
    LAST,
    checkpoint_path,
    fitting,
    load_checkpoint,
    seed_everything,
)
from fastmaml.train.logging import clock
from fastmaml.train.watch import DivergenceError, set_threads

Preset = Literal["paper", "code", "fast", "gym"]
Method = Literal["maml", "pretrained", "oracle", "random"]
R = TypeVar("R", bound="RLExperiment")

TEST_SEED = 2 * VALIDATION_SEED  # apart from the seeds of runs and of validation


META_LR = {"ppo": 1e-3, "vpg": 1e-2}
"""Of Adam. It moves by about its rate a step, and vpg takes one where ppo takes five;
0.001 leaves vpg on 2D navigation at a return of -35 after 40 meta-iterations, where
0.01 gets to -13."""


@dataclass(frozen=True)
class RLExperiment(abc.ABC):
    """Settings every experiment of reinforcement learning has."""

    preset: Preset = "paper"
    """paper, its code, paper with a cheaper meta-update, or later gym-style tasks"""
    method: Method = "maml"
    """maml, or one of the baselines: pretrained on all tasks, oracle, random start"""
    iterations: int = 500
    """meta-iterations"""
    meta_batch: int = 40
    """tasks in a meta-iteration"""
    episodes: int = 20
    """trajectories of a task before, and after, each inner step"""
    horizon: int | None = None
    """steps of an episode; as the environment's preset says unless told"""
    inner_lr: float = 0.1
    """learning rate of the inner loop"""
    inner_steps: int = 1
    """inner steps in training"""
    inner_loss: Literal["reinforce", "likelihood_ratio", "dice"] = "reinforce"
    """loss of the inner loop; ratio and dice also credit what was sampled before"""
    test_rates: tuple[float, ...] = (0.1, 0.05, 0.05)
    """learning rates of the inner steps in validation and test"""
    test_episodes: int | None = None
    """trajectories of a task in the test; as in training unless told"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 1.0
    """of the generalised advantage estimates"""
    outer: Literal["trpo", "ppo", "vpg"] = "trpo"
    """the meta-update: trust region, clipped surrogate, or plain gradient"""
    max_kl: float = 0.01
    """mean divergence of post-update policies that a trust-region step may reach"""
    cg_iterations: int = 10
    """conjugate-gradient iterations of a trust-region step"""
    preconditioner: Literal["none", "kronecker"] = "none"
    """of those iterations; with kronecker two or three do what ten do without"""
    damping: float = 1e-5
    """added to the diagonal of the Fisher matrix"""
    fisher_subsample: float = 1.0
    """share of the samples that Fisher products are made of"""
    search_subsample: float = 1.0
    """share of the tasks that the steps of a line search are tried on"""
    meta_lr: float | None = None
    """learning rate of Adam; 0.001 for ppo, 0.01 for vpg unless told"""
    ppo_epochs: int = 5
    """Adam steps on the same trajectories, for ppo"""
    hidden: tuple[int, ...] = (100, 100)
    """widths of the policy's hidden layers"""
    activation: Literal["relu", "tanh"] = "relu"
    """between the policy's layers"""
    engine: Literal["auto", "native", "functional"] = "auto"
    """what computes gradients and products"""
    threads: int | None = None
    """CPU threads of engine and simulator; all cores unless told"""
    seed: int = 0
    """seed of the parameters, tasks and trajectories of training"""
    validate_every: int = 20
    """meta-iterations between validations"""
    validation_tasks: int = 20
    """fixed tasks to validate on; 0 leaves it out"""
    test_tasks: int = 40
    """held-out tasks of the evaluation that ends a run; 0 leaves it out"""
    checkpoint_every: int = 10
    """meta-iterations between checkpoints"""
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
    presets: ClassVar[tuple[str, ...]] = ("paper", "code", "fast", "gym")
    selectors: ClassVar[dict[str, type]] = {}
    environment: ClassVar[str]
    """id of the environment"""
    published: ClassVar[dict[str, tuple[float, ...]]] = {}
    """who -> returns after 0, 1, ... steps, for comparison"""

    @classmethod
    @abc.abstractmethod
    def from_preset(cls: type[R], preset: Preset, **selected: Any) -> R:
        """Settings of a preset."""

    @abc.abstractmethod
    def environment_settings(self) -> dict[str, Any]:
        """Arguments of the environment, its preset among them."""

    def comparable(self) -> bool:
        """Whether returns are in the units of the published ones."""
        return self.preset != "gym" and self.horizon is None

    def train(self) -> int:
        """Runs the experiment from end to end; returns the command's exit code."""
        return train(self)

    def make_rows(self, tasks: int, episodes: int | None = None) -> RowsEnv:
        """Environments for so many tasks."""
        rows = tasks * (self.episodes if episodes is None else episodes)
        made = make_rows(
            self.environment, rows, horizon=self.horizon, **self.environment_settings()
        )
        return OracleRows(made) if self.method == "oracle" else made

    def make_policy(self, envs: RowsEnv) -> Policy:
        """A fresh policy, initialised by torch's global generator."""
        model = models.gaussian_policy_mlp(
            envs.single_observation_space.shape[0],
            envs.single_action_space.shape[0],
            self.hidden,
            activation=self.activation,
        )
        return Policy(model, inner_loss=self.inner_loss, engine=self.engine)

    def make_learner(self, envs: RowsEnv, policy: Policy | None = None) -> MetaRL:
        """The learner on these environments; baselines take no inner steps."""
        if policy is None:
            seed_everything(self.seed)
            policy = self.make_policy(envs)
        steps = self.inner_steps if self.method == "maml" else 0
        return MetaRL(
            policy,
            envs,
            rates=(self.inner_lr,) * steps,
            gamma=self.gamma,
            lam=self.gae_lambda,
            seed=self.seed,
            update=Update(
                outer=self.outer,
                trpo=Trpo(
                    self.max_kl,
                    self.cg_iterations,
                    self.damping,
                    preconditioner=self.preconditioner,
                ),
                meta_lr=self.adam_rate(),
                ppo_epochs=self.ppo_epochs,
                fisher_subsample=self.fisher_subsample,
                search_subsample=self.search_subsample,
            ),
        )

    def adam_rate(self) -> float:
        """Of the meta-update; a trust region has none."""
        return META_LR.get(self.outer, 0.0) if self.meta_lr is None else self.meta_lr

    def rates_at_test(self) -> tuple[float, ...]:
        """Of the inner steps in validation and test; an oracle takes none."""
        return () if self.method == "oracle" else self.test_rates

    def check(self) -> None:
        """Refuses settings that make no sense, before a run begins.

        Raises:
            ValueError: naming the setting, what it is and what it may be.
        """
        check_settings(self)


@contextmanager
def closed_on_error(envs: RowsEnv) -> Iterator[RowsEnv]:
    """Ends the threads of environments if what is done with them fails."""
    try:
        yield envs
    except BaseException:
        envs.close()
        raise


def prepare_threads(experiment: RLExperiment, policy: Policy) -> None:
    """Gives all cores to the engine and the simulator where torch has little to do."""
    set_threads(experiment.threads)
    if policy.inner.name == "native":
        torch.set_num_threads(1)


def train(experiment: RLExperiment) -> int:
    """Runs an experiment from end to end: train, evaluate, plot.

    Returns:
        The exit code of the command: 0, or 130 after Ctrl-C.

    Raises:
        UserError: a setting, path or package is at fault, or training diverged.
    """
    from fastmaml.recipes.rl_evaluation import evaluate_rl

    check_folder(experiment)
    with user_errors():
        experiment.check()
        with closed_on_error(experiment.make_rows(experiment.meta_batch)) as envs:
            learner = experiment.make_learner(envs)
            prepare_threads(experiment, learner.policy)
            validation = _validation(experiment, learner)
            run_dir = run_folder(experiment)
            save_settings(experiment, run_dir)
    announce(experiment, learner.policy.report, run_dir)
    try:
        result = fit_rl(
            learner,
            iterations=0 if experiment.method == "random" else experiment.iterations,
            meta_batch=experiment.meta_batch,
            run_dir=run_dir,
            validation=validation,
            checkpoint_every=experiment.checkpoint_every,
            resume=experiment.resume is not None,
            progress=experiment.progress,
            tensorboard=None if experiment.tensorboard else False,
            settings=experiment,
        )
    except (DivergenceError, ValueError) as error:
        raise UserError(str(error)) from error
    finally:
        envs.close()
        if validation is not None:
            validation.learner.envs.close()
    if result.interrupted:
        print(
            f"stopped after iteration {result.iteration:,}; saved {run_dir / LAST}\n"
            f"resume with: fastmaml train {experiment.name} --resume {run_dir}"
        )
        return 130
    print(
        f"trained {result.iteration:,} meta-iterations, "
        f"{result.environment_steps:,} environment steps in {clock(result.seconds)}"
    )
    if experiment.test_tasks:
        evaluate_rl(run_dir, tasks=experiment.test_tasks)
    if experiment.plots:
        from fastmaml.plot import plot_run

        for path in plot_run(run_dir):
            print(f"wrote {path}")
    return 0


def _validation(experiment: RLExperiment, learner: MetaRL) -> Validation | None:
    count = experiment.validation_tasks
    if not count:
        return None
    envs = experiment.make_rows(count)
    return Validation(
        learner=experiment.make_learner(envs, learner.policy),
        tasks=envs.sample_tasks(count, VALIDATION_SEED),
        rates=experiment.rates_at_test(),
        every=experiment.validate_every,
        seed=VALIDATION_SEED,
    )


def load_rl_run(
    run_dir: str | Path,
    checkpoint: str,
    tasks: int,
    *,
    episodes: int | None = None,
    **changes: Any,
) -> tuple[RLExperiment, MetaRL, Path, int]:
    """Rebuilds the learner of a run on new environments.

    Args:
        run_dir: the run's folder.
        checkpoint: ``best`` or ``last``; ``best`` falls back to ``last`` in runs that
            never validated.
        tasks: there will be room for.
        episodes: of each task; as in the settings unless told.
        changes: of the settings.

    Returns:
        Settings, learner, the checkpoint's path, and its iteration. Close the
        learner's environments in the end.

    Raises:
        UserError: there is no run, or no checkpoint that can be read.
    """
    experiment = load_experiment(run_dir)
    if not isinstance(experiment, RLExperiment):
        raise UserError(f"{run_dir} is a run of {experiment.name}, which has no agent")
    experiment = dataclasses.replace(experiment, **changes)
    path = checkpoint_path(run_dir, checkpoint)
    with user_errors():
        state = load_checkpoint(path)
        with closed_on_error(experiment.make_rows(tasks, episodes)) as envs:
            learner = experiment.make_learner(envs)
            prepare_threads(experiment, learner.policy)
            with fitting(path):
                restore(learner, state)
    return experiment, learner, path, state.iteration
