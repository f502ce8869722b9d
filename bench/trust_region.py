"""What trust-region steps are worth: their gain on trajectories they were not made of.

    python -m bench.trust_region [--experiment cheetah-dir] [--held-out 4]
        [--checkpoint RUN/last.pt]

A step raises the surrogate of the trajectories that gave its gradient, the more the
further conjugate gradients go, noise included. Other trajectories of the same tasks and
policies tell what is left of that: each row is a number of products and whether
Kronecker factors precondition them; steps have the same length by the quadratic model.
A fresh policy unless a checkpoint is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Sequence

from bench.rl import Bench
from fastmaml.recipes import recipe
from fastmaml.rl.objective import MetaObjective
from fastmaml.rl.trpo import conjugate_gradients
from fastmaml.train.checkpoint import load_checkpoint

ROWS = [
    (False, 1),
    (False, 3),
    (False, 5),
    (False, 10),
    (True, 1),
    (True, 2),
    (True, 3),
]


def gains(
    own: MetaObjective,
    held_out: Sequence[MetaObjective],
    iterations: int,
    *,
    preconditioned: bool,
    max_kl: float,
    damping: float,
) -> tuple[float, list[float]]:
    """How much a step lowers the surrogate of its own, and of other trajectories.

    Args:
        own: what the step is made of.
        held_out: other trajectories of the same parameters.
        iterations: of the conjugate gradients.
        preconditioned: by Kronecker factors.
        max_kl: divergence of the step, by the quadratic model.
        damping: added to the diagonal of J' F J.
    """
    gradient = own.gradient()
    direction, curvature = conjugate_gradients(
        lambda v: own.fisher_product(v) + damping * v,
        gradient,
        iterations,
        precondition=own.precondition if preconditioned else None,
    )
    theta = own.theta - math.sqrt(2 * max_kl / curvature) * direction
    found = [o.loss - o.evaluate(theta)[0] for o in (own, *held_out)]
    return found[0], found[1:]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.trust_region", description=__doc__
    )
    add = parser.add_argument
    add("--experiment", default="cheetah-dir")
    add("--tasks", type=int, default=40)
    add("--episodes", type=int, default=20)
    add("--horizon", type=int)
    add("--held-out", type=int, default=4, help="collections of trajectories")
    add("--checkpoint", help="of a run of the experiment with the same network")
    add("--stride", type=int, default=4, help="every which sample products are made of")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the measurement from the command line."""
    options = parse(sys.argv[1:] if argv is None else argv)
    experiment = dataclasses.replace(
        recipe(options.experiment).from_preset("paper"),
        meta_batch=options.tasks,
        episodes=options.episodes,
        horizon=options.horizon,
    )
    bench = Bench(experiment, 1)
    if options.checkpoint:
        state = load_checkpoint(options.checkpoint).learner
        bench.learner.load_state_dict({"model": state})
    own, *held_out = (
        bench.objective(options.stride, seed) for seed in range(1 + options.held_out)
    )
    limits = {"max_kl": bench.trpo.max_kl / 2, "damping": bench.trpo.damping}
    for preconditioned, iterations in ROWS:
        here, there = gains(
            own, held_out, iterations, preconditioned=preconditioned, **limits
        )
        mean = sum(there) / len(there)
        spread = math.sqrt(sum((g - mean) ** 2 for g in there)) / len(there)
        name = "preconditioned" if preconditioned else "plain"
        print(
            f"{name}, {iterations} products: gain {here:.5f}, on other trajectories "
            f"{mean:.5f} ± {spread:.5f}",
            flush=True,
        )
    bench.envs.close()


if __name__ == "__main__":
    main()
