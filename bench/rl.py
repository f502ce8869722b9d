"""How fast meta-reinforcement learning is: sampling, meta-update, whole iterations.

    python -m bench.rl --out bench/results/NAME-rl.json [--tasks 40] [--rounds 3]

An iteration of an experiment with the paper's sizes: a policy in every task collects
trajectories, adapts, and collects again; then a trust-region step. The meta-update is
timed on the same trajectories for

* ``fastmaml``: products of the engine, one call for all tasks;
* ``fastmaml, a tenth``: the same with ``fisher_subsample`` 0.1;
* ``fastmaml, fast``: the settings of the preset ``fast``: three products of every
  twentieth sample, preconditioned, and a line search on a quarter of the tasks;
* ``torch.func``: the same update with the adaptation under ``vmap`` and a graph:
  the divergence's gradient is differentiated once, and each product with the Fisher
  matrix is one backward pass through that graph.

Both must have the same gradient and Fisher products up to rounding; the difference is
in the result.
Locomotion is also simulated without a policy, by fastmaml's rows, MuJoCo alone and
gymnasium's loops, as in ``bench.rl_envs``: `sampling_of_mujoco` is sampling's rate
with the policy by that of ``mujoco.batch``, and `update_share` the meta-update's share
of an iteration.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from bench import facts, rl_envs, rl_report, timing
from fastmaml.losses import (
    gaussian_divergence,
    gaussian_log_probability,
    policy_gradient,
)
from fastmaml.recipes import recipe
from fastmaml.recipes.reinforcement import RLExperiment, prepare_threads
from fastmaml.recipes.rl_settings import FAST
from fastmaml.rl.adaptation import Adaptation
from fastmaml.rl.learner import MetaRL, processed
from fastmaml.rl.noise import collection_seed
from fastmaml.rl.objective import MetaObjective
from fastmaml.rl.rollout import collect
from fastmaml.rl.trpo import Trpo, trust_region_step


class Peer:
    """The meta-objective on torch.func; one inner step.

    Args:
        objective: whose policy and trajectories are used.
        rate: of the inner step.
    """

    def __init__(self, objective: MetaObjective, rate: float) -> None:
        self.model = objective.policy.model
        self.flat, self.theta = objective.flat, objective.theta
        (support,), query = objective.supports, objective.query
        target = objective.policy.inner_target(support)
        self.rate, self.support, self.query = rate, (support.x, target), query
        self.old = self.outputs(self._leaf()).detach()
        self.old_log = gaussian_log_probability(self.old, query.actions)
        self._slope: tuple[Tensor, Tensor] | None = None

    def _leaf(self) -> Tensor:
        return self.theta.float().requires_grad_()

    def outputs(self, flat: Tensor) -> Tensor:
        """Outputs [T, N, Z] of the adapted policies on the query samples."""
        theta = self.flat.split(flat)

        def adapted(x: Tensor, y: Tensor, query: Tensor) -> Tensor:
            def loss(p: dict[str, Tensor]) -> Tensor:
                return policy_gradient(functional_call(self.model, p, (x,)), y)

            slopes = grad(loss)(theta)
            new = {n: p - self.rate * slopes[n] for n, p in theta.items()}
            return functional_call(self.model, new, (query,))

        return vmap(adapted)(*self.support, self.query.x)

    def _surrogate(self, outputs: Tensor) -> Tensor:
        log = gaussian_log_probability(outputs, self.query.actions)
        return -(torch.exp(log - self.old_log) * self.query.advantages).mean()

    def _divergence(self, outputs: Tensor) -> Tensor:
        return (gaussian_divergence(outputs, self.old) * self.query.weights).mean()

    def gradient(self) -> Tensor:
        """As `MetaObjective.gradient`."""
        leaf = self._leaf()
        loss = self._surrogate(self.outputs(leaf))
        return torch.autograd.grad(loss, leaf)[0].double()

    def fisher_product(self, v: Tensor) -> Tensor:
        """As `MetaObjective.fisher_product`; the graph is made at the first call."""
        if self._slope is None:
            leaf = self._leaf()
            kl = self._divergence(self.outputs(leaf))
            (slope,) = torch.autograd.grad(kl, leaf, create_graph=True)
            self._slope = leaf, slope
        leaf, slope = self._slope
        product = torch.autograd.grad(slope @ v.float(), leaf, retain_graph=True)[0]
        return product.double()

    def evaluate(self, theta: Tensor) -> tuple[float, float]:
        """As `MetaObjective.evaluate`."""
        outputs = self.outputs(theta.float()).detach()
        return float(self._surrogate(outputs)), float(self._divergence(outputs))


def step_of(objective: Any, loss: float, settings: Trpo) -> Tensor:
    """The parameters after a trust-region step."""
    theta, _ = trust_region_step(
        objective.theta,
        objective.gradient(),
        objective.fisher_product,
        objective.evaluate,
        loss,
        settings,
        None if settings.preconditioner == "none" else objective.precondition,
        getattr(objective, "fisher_square", None),
    )
    return theta


def difference(ours: MetaObjective, theirs: Peer) -> float:
    """Of gradients, or of the Fisher products of one, whichever is larger; relative.

    Steps are no measure: conjugate gradients multiply rounding by the condition number.
    """
    g, other = ours.gradient(), theirs.gradient()
    product = ours.fisher_product(g)
    pairs = (other - g, g), (theirs.fisher_product(g) - product, product)
    return max(float(error.norm() / value.norm()) for error, value in pairs)


def timed(call: Callable[[], Any], rounds: int) -> tuple[list[float], Any]:
    """Seconds of several calls, and what the last returned."""
    seconds, result = [], None
    for _ in range(rounds):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return seconds, result


class Bench:
    """One experiment at the sizes asked for.

    Args:
        experiment: its settings.
        rounds: iterations and updates that are timed.
    """

    def __init__(self, experiment: RLExperiment, rounds: int) -> None:
        self.experiment, self.rounds = experiment, rounds
        self.envs = experiment.make_rows(experiment.meta_batch)
        self.learner = experiment.make_learner(self.envs)
        exact = self.learner.update
        self.trpo = exact.trpo
        fast = dataclasses.replace(experiment, **FAST).make_learner(
            self.envs, self.learner.policy
        )
        self.variants = {
            "fastmaml": exact,
            "fastmaml, a tenth": dataclasses.replace(exact, fisher_subsample=0.1),
            rl_report.FAST: fast.update,
        }
        prepare_threads(experiment, self.learner.policy)
        self.tasks = self.envs.sample_tasks(experiment.meta_batch, 1)

    def iterations(self) -> dict[str, Any]:
        """Whole iterations of all variants, in turns, and where their time goes."""
        learners = {
            name: MetaRL(
                self.learner.policy, self.envs, rates=self.learner.rates, update=update
            )
            for name, update in self.variants.items()
        }
        rows: dict[str, list[dict[str, Any]]] = {name: [] for name in learners}
        for i in range(self.rounds + 1):
            for name, learner in learners.items():
                start = time.perf_counter()
                found = learner.iterate(self.tasks, i)
                row = {"seconds": time.perf_counter() - start, **found.seconds}
                row["steps"] = found.environment_steps
                row["backtracks"] = found.step.backtracks
                rows[name].append(row)
        # the first warms up
        return {name: _medians(found[1:]) for name, found in rows.items()}

    def updates(self, *, peer: bool = True) -> dict[str, Any]:
        """The meta-update alone, on the same trajectories.

        Args:
            peer: whether that of torch.func is timed, too.
        """
        found: dict[str, Any] = {}
        for name, update in self.variants.items():
            checked = update.checked(len(self.tasks))
            own = self.objective(update.stride, checked=checked)

            def step(own: MetaObjective = own, trpo: Trpo = update.trpo) -> Tensor:
                own._preconditioner = None  # its factors are part of the time
                return step_of(own, own.loss, trpo)

            found[name], _ = timed(step, self.rounds)
        if not peer:
            return found
        objective, rate = self.objective(1), self.learner.rates[0]
        loss = objective.loss
        threads = torch.get_num_threads()
        torch.set_num_threads(self.experiment.threads or _cores())
        peer_times, _ = timed(
            lambda: step_of(Peer(objective, rate), loss, self.trpo),
            max(1, self.rounds // 2),
        )
        torch.set_num_threads(threads)
        found["torch.func"] = peer_times
        found["difference"] = difference(objective, Peer(objective, rate))
        found["ratio"] = min(peer_times) / min(found["fastmaml"])
        return found

    def objective(
        self, stride: int, seed: int = 7, checked: int | None = None
    ) -> MetaObjective:
        """The meta-objective on trajectories that the seed decides."""
        learner, policy = self.learner, self.learner.policy
        count, many = len(self.tasks), stride == 1
        adaptation = Adaptation(policy, policy.parameters(), count, many=many)
        samples = []
        for k in range(2):
            own = collection_seed(seed, 0, k)
            found = collect(policy, adaptation.adapted, self.envs, self.tasks, seed=own)
            samples.append(processed(found, learner.gamma, learner.lam))
            if k == 0:
                adaptation.step(samples[0], learner.rates[0])
        return MetaObjective(
            policy,
            policy.parameters(),
            adaptation,
            samples[:1],
            samples[1],
            stride=stride,
            checked=checked,
        )


def _medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    median = {k: sorted(r[k] for r in rows)[len(rows) // 2] for k in rows[0]}
    rate = median["steps"] / median["sampling"]
    return {**median, "sampled_steps_per_second": rate, "rounds": rows}


def simulation(experiment: RLExperiment, rows: int, rounds: int) -> dict[str, Any]:
    """Environment steps without a policy; empty where ``bench.rl_envs`` has no case.

    Args:
        experiment: whose robot, preset and threads are used.
        rows: of fastmaml and of mujoco.batch.
        rounds: of all contenders.
    """
    preset = experiment.environment_settings().get("preset")
    for case in rl_envs.CASES:
        robot, known = case.split("-")
        family = rl_envs.ROBOTS[robot][0].removesuffix("Dir")
        if family in experiment.environment and known == preset:
            plan = timing.Plan(rounds=rounds, min_sample=0.12, pause=0.01)
            return rl_envs.measure(case, rows, experiment.threads or _cores(), plan)
    return {}


def shares(iterations: dict[str, Any], simulated: dict[str, Any]) -> None:
    """Adds to iterations what their parts are of the whole, and of MuJoCo's rate."""
    for row in iterations.values():
        row["update_share"] = row["update"] / row["seconds"]
        if simulated:
            alone = simulated[rl_envs.ALONE]["steps_per_second"]["median"]
            row["sampling_of_mujoco"] = row["sampled_steps_per_second"] / alone


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.rl", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, help="JSON to write; printed without one")
    add("--experiment", default="cheetah-dir")
    add("--tasks", type=int, default=40)
    add("--episodes", type=int, default=20)
    add("--horizon", type=int)
    add("--rounds", type=int, default=3)
    add("--threads", type=int)
    add("--no-peer", action="store_true", help="leave out torch.func")
    options = parser.parse_args(argv)
    options.argv = list(argv)
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Everything, as JSON can hold it."""
    experiment = dataclasses.replace(
        recipe(options.experiment).from_preset("paper"),
        meta_batch=options.tasks,
        episodes=options.episodes,
        horizon=options.horizon,
        threads=options.threads,
    )
    bench = Bench(experiment, options.rounds)
    command = shlex.join(["python", "-m", "bench.rl", *options.argv])
    rows = options.tasks * options.episodes
    simulated = simulation(experiment, rows, 2 * options.rounds + 1)
    iterations = bench.iterations()
    shares(iterations, simulated)
    result = {
        "schema": 1,
        "kind": "rl",
        "quick": options.rounds < 2,
        "command": facts.without_paths(command),
        **facts.collect(),
        "experiment": experiment.name,
        "tasks": options.tasks,
        "episodes": options.episodes,
        "horizon": bench.envs.horizon,
        "updates": bench.updates(peer=not options.no_peer),
        "iterations": iterations,
        "simulation": simulated,
    }
    bench.envs.close()
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    options = parse(sys.argv[1:] if argv is None else argv)
    result = run(options)
    text = json.dumps(result, indent=2) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)
    updates = result["updates"]
    assert options.no_peer or math.isfinite(updates["difference"])
    for name in [*result["iterations"], *([] if options.no_peer else ["torch.func"])]:
        print(f"meta-update, {name}: {min(updates[name]):.3f} s", file=sys.stderr)
    for name, row in result["iterations"].items():
        print(
            f"iteration, {name}: {row['seconds']:.2f} s, sampling "
            f"{row['sampled_steps_per_second']:,.0f} steps/s, update "
            f"{row['update_share']:.0%}",
            file=sys.stderr,
        )
    print(rl_envs.table({"simulation": result["simulation"]}), file=sys.stderr)


if __name__ == "__main__":
    main()
