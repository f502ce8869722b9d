"""How much of the inner gradient is noise: do independent batches of a task agree?

    python -m bench.gradient_noise [--experiment cheetah-dir] [--episodes 20 80]
        [--checkpoint RUN/last.pt]

Every task is tried twice by the same policy, under different seeds. The cosine of the
two inner gradients is 1 without noise; the share of the signal in a gradient's squared
length is about the cosine. Means over tasks, with the standard error. A fresh policy
unless a checkpoint is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from fastmaml.recipes import recipe
from fastmaml.recipes.reinforcement import prepare_threads
from fastmaml.rl.adaptation import Named, for_each_task
from fastmaml.rl.learner import MetaRL, processed
from fastmaml.rl.noise import collection_seed
from fastmaml.rl.rollout import collect
from fastmaml.train.checkpoint import load_checkpoint


def inner_gradients(learner: MetaRL, tasks: Tensor, seed: int) -> Named:
    """Gradients of the inner loss on new trajectories, name -> [T, ...]."""
    policy = learner.policy
    params = for_each_task(policy.parameters(), len(tasks))
    found = collect(policy, params, learner.envs, tasks, seed=seed)
    samples = processed(found, learner.gamma, learner.lam)
    target = policy.inner_target(samples)
    return policy.inner.value_and_grad(params, samples.x, target)[1]


def cosines(one: Named, other: Named) -> Tensor:
    """[T], of two sets of gradients name -> [T, ...]."""
    flat = [torch.cat([g.flatten(1) for g in m.values()], 1) for m in (one, other)]
    return torch.cosine_similarity(flat[0], flat[1], 1)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gradient_noise", description=__doc__
    )
    add = parser.add_argument
    add("--experiment", default="cheetah-dir")
    add("--tasks", type=int, default=40)
    add("--episodes", type=int, nargs="+", default=[20, 80])
    add("--horizon", type=int)
    add("--checkpoint", help="of a run of the experiment with the same network")
    add("--seed", type=int, default=0)
    return parser.parse_args(argv)


def measure(options: argparse.Namespace, episodes: int) -> Tensor:
    """Cosines [T] of gradients of so many episodes."""
    experiment = dataclasses.replace(
        recipe(options.experiment).from_preset("paper"),
        meta_batch=options.tasks,
        episodes=episodes,
        horizon=options.horizon,
        seed=options.seed,
    )
    envs = experiment.make_rows(options.tasks)
    try:
        learner = experiment.make_learner(envs)
        prepare_threads(experiment, learner.policy)
        if options.checkpoint:
            state = load_checkpoint(options.checkpoint).learner
            learner.load_state_dict({"model": state})
        tasks = envs.sample_tasks(options.tasks, collection_seed(options.seed, 0))
        seeds = [collection_seed(options.seed, k) for k in (1, 2)]
        return cosines(*(inner_gradients(learner, tasks, seed) for seed in seeds))
    finally:
        envs.close()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the measurement from the command line."""
    options = parse(sys.argv[1:] if argv is None else argv)
    for episodes in options.episodes:
        found = measure(options, episodes)
        error = float(found.std()) / len(found) ** 0.5
        print(
            f"{options.experiment}, {episodes} episodes a task: cosine "
            f"{float(found.mean()):.2f} ± {error:.2f}"
        )


if __name__ == "__main__":
    main()
