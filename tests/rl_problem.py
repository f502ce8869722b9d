"""Fixed trajectories of small policies, and the meta-objective restated with autograd.

The restatement knows nothing of products: it unrolls the adaptation of each task in
float64 with a graph, and differentiates what comes out, once or twice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.func import functional_call

from fastmaml.models import gaussian_policy_mlp
from fastmaml.rl.adaptation import Flat, adapt
from fastmaml.rl.objective import MetaObjective
from fastmaml.rl.policies import Policy
from fastmaml.rl.trajectories import Samples
from fastmaml.rl.trpo import Trpo

OBSERVATIONS, ACTIONS = 3, 2
TASKS, SAMPLES, LENGTH = 3, 24, 6
Named = dict[str, Tensor]


@dataclass
class RLProblem:
    """A policy, samples of each inner step, and those after the last.

    Attributes:
        policy: in float64.
        params: its parameters.
        rates: of the inner steps.
        batches: samples of steps 0 ... K; a fifth of the weights is zero.
    """

    policy: Policy
    params: Named
    rates: list[float]
    batches: list[Samples]

    def objective(self, stride: int = 1, checked: int | None = None) -> MetaObjective:
        """What is tested."""
        adaptation = adapt(
            self.policy, self.params, self.batches[:-1], self.rates, TASKS
        )
        return MetaObjective(
            self.policy,
            self.params,
            adaptation,
            self.batches[:-1],
            self.batches[-1],
            stride=stride,
            checked=checked,
        )


def problem(
    kind: str = "gaussian",
    inner_loss: str = "reinforce",
    steps: int = 1,
    engine: str = "native",
) -> RLProblem:
    """A seeded problem, its actions drawn by the policies that are adapted."""
    generator = torch.Generator().manual_seed(steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(steps)
        model: nn.Module = gaussian_policy_mlp(
            OBSERVATIONS, ACTIONS, (4, 3), activation="tanh", log_std=-0.3
        )
        if kind == "categorical":
            model = nn.Sequential(
                nn.Linear(OBSERVATIONS, 5), nn.Tanh(), nn.Linear(5, 4)
            )
    model = model.double()
    policy = Policy(model, kind, inner_loss=inner_loss, engine=engine)  # type: ignore[arg-type]
    params = policy.parameters()
    rates = [0.3, 0.2, 0.1][:steps]
    batches: list[Samples] = []
    for _ in range(steps + 1):
        adaptation = adapt(policy, params, batches, rates or [0.0], TASKS)
        batches.append(_samples(policy, adaptation.adapted, generator))
    return RLProblem(policy, params, rates, batches)


def _samples(policy: Policy, theta: Named, generator: torch.Generator) -> Samples:
    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(TASKS, SAMPLES, OBSERVATIONS)
    outputs = policy.outputs(theta, x)
    if policy.kind == "gaussian":
        noise = normal(TASKS, SAMPLES, ACTIONS)
    else:
        noise = torch.rand(TASKS, SAMPLES, 1, generator=generator).double()
    taken = torch.rand(TASKS, SAMPLES, generator=generator) > 0.2
    weights = taken.double() * SAMPLES / taken.sum(1, keepdim=True)
    actions = policy.distribution.sample(outputs, noise)
    return Samples(
        x, actions, normal(TASKS, SAMPLES) * weights, weights, outputs, LENGTH
    )


# -- the restatement -------------------------------------------------------------------


def _distribution(problem: RLProblem, outputs: Tensor) -> Normal | Categorical:
    if problem.policy.kind == "categorical":
        return Categorical(logits=outputs)
    mean, log_std = outputs.chunk(2, -1)
    return Normal(mean, log_std.exp())


def _log(problem: RLProblem, outputs: Tensor, actions: Tensor) -> Tensor:
    distribution = _distribution(problem, outputs)
    if isinstance(distribution, Categorical):
        return distribution.log_prob(actions[..., 0])
    return distribution.log_prob(actions).sum(-1)


def _box(x: Tensor) -> Tensor:
    """One, with all derivatives of what leads to x (Foerster et al. 2018)."""
    return torch.exp(x - x.detach())


def adapted_outputs(problem: RLProblem, theta: Named, task: int) -> Tensor:
    """Outputs on the last samples of a task after its inner steps, with their graph."""
    model = problem.policy.model
    for samples, rate in zip(problem.batches[:-1], problem.rates, strict=True):
        outputs = functional_call(model, theta, (samples.x[task],))
        log = _log(problem, outputs, samples.actions[task])
        if problem.policy.inner_loss == "likelihood_ratio":
            old = _log(problem, samples.outputs[task], samples.actions[task])
            log = torch.exp(log - old)
        if problem.policy.inner_loss == "dice":
            sums = log.view(-1, LENGTH).cumsum(1).flatten()
            log = _box(sums) - _box(sums - log)
        loss = -(log * samples.advantages[task]).mean()
        gradients = torch.autograd.grad(loss, [*theta.values()], create_graph=True)
        theta = {
            n: p - rate * g for (n, p), g in zip(theta.items(), gradients, strict=True)
        }
    return functional_call(model, theta, (problem.batches[-1].x[task],))


def restated(
    problem: RLProblem, flat: Tensor, tasks: int = TASKS
) -> tuple[Tensor, Tensor]:
    """Surrogate and mean divergence at parameters [P], with their graph."""
    split = Flat(problem.params).split
    query = problem.batches[-1]
    losses, divergences = [], []
    start = {n: p.detach().requires_grad_() for n, p in problem.params.items()}
    theta = split(flat if flat.requires_grad else flat.clone().requires_grad_())
    for task in range(tasks):
        new = adapted_outputs(problem, theta, task)
        old = adapted_outputs(problem, start, task).detach()
        log, log_old = (_log(problem, z, query.actions[task]) for z in (new, old))
        losses.append(-(torch.exp(log - log_old) * query.advantages[task]).mean())
        kl = kl_divergence(_distribution(problem, old), _distribution(problem, new))
        if problem.policy.kind == "gaussian":
            kl = kl.sum(-1)
        divergences.append((kl * query.weights[task]).mean())
    return torch.stack(losses).mean(), torch.stack(divergences).mean()


def restated_gradient(problem: RLProblem, flat: Tensor) -> Tensor:
    """Gradient of the surrogate, [P]."""
    leaf = flat.clone().requires_grad_()
    return torch.autograd.grad(restated(problem, leaf)[0], leaf)[0]


def restated_fisher_product(problem: RLProblem, flat: Tensor, v: Tensor) -> Tensor:
    """Hessian of the mean divergence at the old parameters times v, [P]."""
    leaf = flat.clone().requires_grad_()
    (slope,) = torch.autograd.grad(restated(problem, leaf)[1], leaf, create_graph=True)
    return torch.autograd.grad(slope @ v, leaf)[0]


def restated_fisher(problem: RLProblem, flat: Tensor) -> Tensor:
    """Hessian of the mean divergence at the old parameters, [P, P]."""
    leaf = flat.clone().requires_grad_()
    (slope,) = torch.autograd.grad(restated(problem, leaf)[1], leaf, create_graph=True)
    rows = [torch.autograd.grad(s, leaf, retain_graph=True)[0] for s in slope]
    return torch.stack(rows)


def restated_clipped(
    problem: RLProblem, flat: Tensor, clip: float, weight: float
) -> Tensor:
    """As `restated`, the clipped surrogate with a penalty on the divergence."""
    query, total = problem.batches[-1], torch.zeros((), dtype=torch.float64)
    start = {n: v.detach().requires_grad_() for n, v in problem.params.items()}
    for task in range(TASKS):
        new = adapted_outputs(problem, Flat(problem.params).split(flat), task)
        old = adapted_outputs(problem, start, task).detach()
        logs = [_log(problem, z, query.actions[task]) for z in (new, old)]
        ratio, a = torch.exp(logs[0] - logs[1]), query.advantages[task]
        total = total - torch.min(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a).mean()
    return total / TASKS + weight * restated(problem, flat)[1]


def restated_step(
    problem: RLProblem, theta: Tensor, o: Trpo, inverse: Tensor | None = None
) -> tuple[Tensor, int]:
    """The step with the whole matrix and its Krylov space in place of products.

    Args:
        problem: whose step it is.
        theta: [P], before it.
        o: its settings.
        inverse: of the preconditioner, [P, P].

    Returns:
        The parameters after it, and how many steps were tried before.
    """
    eye = torch.eye(theta.numel(), dtype=torch.float64)
    inverse = eye if inverse is None else inverse
    b = restated_fisher(problem, theta) + o.damping * eye
    g = restated_gradient(problem, theta)
    # conjugate gradients minimise the energy over span(M g, M B M g, (M B)^2 M g, ...)
    basis: list[Tensor] = []
    v = inverse @ g
    for _ in range(o.cg_iterations):
        for q in (*basis, *basis):
            v = v - (q @ v) * q
        basis.append(v / v.norm())
        v = inverse @ b @ basis[-1]
    q = torch.stack(basis, 1)
    direction = q @ torch.linalg.solve(q.T @ b @ q, q.T @ g)
    size = math.sqrt(2 * o.max_kl / float(direction @ b @ direction))
    before = float(restated(problem, theta)[0].detach())
    for k in range(o.max_backtracks):
        there = theta - size * o.backtrack**k * direction
        loss, kl = (float(value.detach()) for value in restated(problem, there))
        if loss < before and kl <= o.max_kl:
            return there, k
    raise AssertionError("no step was good")
