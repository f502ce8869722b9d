"""Preconditioned trust-region steps against dense matrices, and what has no factors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from close import assert_close
from rl_problem import RLProblem, problem, restated_step
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from fastmaml.rl import kronecker
from fastmaml.rl.adaptation import Flat
from fastmaml.rl.kronecker import KroneckerPreconditioner, factored_layers
from fastmaml.rl.learner import MetaRL, Update
from fastmaml.rl.policies import Policy
from fastmaml.rl.trpo import Trpo, conjugate_gradients, trust_region_step

KINDS = ["gaussian", "categorical"]


def _fisher_of_outputs(p: RLProblem, z: Tensor) -> Tensor:
    """Hessian of the divergence at the old outputs [N, Z], [N, Z, Z]."""

    def divergence(new: Tensor, old: Tensor) -> Tensor:
        return p.policy.distribution.divergence(new, old)

    return vmap(torch.func.hessian(divergence))(z, z)


def _dense(p: RLProblem) -> Tensor:
    """M [P, P] by the definition, from Jacobians and Kronecker products."""
    query, model = p.batches[-1], p.policy.model
    x, weights = query.x.flatten(0, 1), query.weights.flatten()
    fisher = _fisher_of_outputs(p, p.policy.outputs(_each(p), query.x).flatten(0, 1))
    blocks = []
    inputs = x
    for name, layer in model.named_children():
        if name in factored_layers(model):
            one = torch.ones(len(x), 1, dtype=x.dtype)
            linear = isinstance(layer, nn.Linear)
            a = torch.cat([inputs, one], 1) if linear else one
            bias = f"{name}.bias" if linear else f"{name}.value"

            # moving a bias moves what the layer puts out by as much
            def output(b: Tensor, x: Tensor, bias: str = bias) -> Tensor:
                return functional_call(model, {**p.params, bias: b}, (x[None],))[0]

            slope = vmap(jacrev(output), (None, 0))(p.params[bias], x)  # [N, Z, out]
            own = slope.mT @ fisher @ slope
            left = (weights[:, None, None] * own).sum(0) / weights.sum()
            right = torch.einsum("n,ni,nj->ij", weights / weights.sum(), a, a)
            blocks.append(torch.kron(_damped(left), _damped(right)))
            rows = len(left) * a.shape[1]
            blocks[-1] = _parameters_order(blocks[-1], len(left), a.shape[1])
            assert blocks[-1].shape == (rows, rows)
        inputs = layer(inputs).detach()
    return torch.block_diag(*blocks)


def _each(p: RLProblem) -> dict[str, Tensor]:
    tasks = p.batches[0].x.shape[0]
    return {n: v.expand(tasks, *v.shape).contiguous() for n, v in p.params.items()}


def _damped(factor: Tensor) -> Tensor:
    share = kronecker.RELATIVE_DAMPING * factor.trace() / len(factor)
    return factor + share * torch.eye(len(factor), dtype=factor.dtype)


def _parameters_order(block: Tensor, out: int, columns: int) -> Tensor:
    """From rows (out, in + 1) to the weights' and then the biases'."""
    index = torch.arange(out * columns).view(out, columns)
    order = torch.cat([index[:, :-1].flatten(), index[:, -1]])
    return block[order][:, order]


def _preconditioner(p: RLProblem, most: int = kronecker.SAMPLES) -> Any:
    query = p.batches[-1]
    return KroneckerPreconditioner(
        p.policy, p.params, query.x, query.weights, most=most
    )


@pytest.mark.parametrize("kind", KINDS)
def test_it_solves_with_the_kronecker_product_of_the_factors(kind: str) -> None:
    p = problem(kind)
    v = torch.randn(
        Flat(p.params).join(p.params).numel(),
        generator=torch.Generator().manual_seed(2),
        dtype=torch.float64,
    )
    want = torch.linalg.solve(_dense(p), v)
    assert_close(_preconditioner(p)(v), want, "float64 chain", "M^-1 v")


@pytest.mark.parametrize("kind", KINDS)
def test_roots_of_the_outputs_fisher_information(kind: str) -> None:
    p = problem(kind)
    z = p.policy.outputs(_each(p), p.batches[-1].x)[0]
    if kind == "gaussian":
        z[:, -1] = -20.0  # below the floor, where it moves nothing
    roots = p.policy.distribution.fisher_roots(z)
    got = torch.einsum("rno,rnp->nop", roots, roots)
    assert_close(got, _fisher_of_outputs(p, z), "float64 chain", "Fisher information")


@pytest.mark.parametrize(("kind", "steps"), [("gaussian", 1), ("categorical", 2)])
def test_a_preconditioned_step_is_the_restated_one(kind: str, steps: int) -> None:
    p = problem(kind, "reinforce", steps)
    objective = p.objective()
    options = Trpo(0.02, 3, 1e-3, preconditioner="kronecker")
    got, report = trust_region_step(
        objective.theta,
        objective.gradient(),
        objective.fisher_product,
        objective.evaluate,
        objective.loss,
        options,
        objective.precondition,
    )
    inverse = torch.linalg.inv(_dense(p))
    want, tried = restated_step(p, objective.theta, options, inverse)
    assert report.accepted and report.backtracks == tried
    assert (got - want).abs().max() <= 1e-8 * want.abs().max()
    plain, _ = restated_step(p, objective.theta, options)
    assert (got - plain).abs().max() > 1e-3 * want.abs().max()


def test_the_learner_asks_for_it() -> None:
    nowhere: Any = None  # trajectories are there already
    moved = []
    for name in ("none", "kronecker"):
        p = problem()
        options = Trpo(0.02, 2, 1e-3, preconditioner=name)  # type: ignore[arg-type]
        learner = MetaRL(p.policy, nowhere, rates=p.rates, update=Update(trpo=options))
        objective = p.objective()
        assert learner._move(objective).accepted
        moved.append(objective.flat.join(p.policy.parameters()))
        precondition = objective.precondition if name == "kronecker" else None
        want, _ = trust_region_step(
            objective.theta,
            objective.gradient(),
            objective.fisher_product,
            objective.evaluate,
            objective.loss,
            options,
            precondition,
            objective.fisher_square,
        )
        assert torch.equal(moved[-1], want)
    assert not torch.equal(*moved)


def test_few_iterations_come_further_than_without() -> None:
    scales = torch.logspace(0, 4, 30, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    b = torch.diag(scales) + noise @ noise.T / 30
    target = torch.ones(30, dtype=torch.float64)

    def product(v: Tensor) -> Tensor:
        return b @ v

    plain, _ = conjugate_gradients(product, target, 8)
    x, square = conjugate_gradients(
        product, target, 2, precondition=lambda v: v / b.diagonal()
    )
    assert square == pytest.approx(float(x @ b @ x), rel=1e-9)
    gains = [float(target.dot(v) - v.dot(b @ v) / 2) for v in (plain, x)]
    assert gains[1] > gains[0]
    exact, square = conjugate_gradients(
        product, target, 30, precondition=lambda v: torch.linalg.solve(b, v)
    )
    assert (target - b @ exact).norm() < 1e-6 and math.isfinite(square)


def test_samples_are_spread_over_all_tasks() -> None:
    p = problem()
    query = p.batches[-1]
    stride = 4
    few = query.x.flatten(0, 1)[::stride], query.weights.flatten()[::stride]
    alone = KroneckerPreconditioner(p.policy, p.params, few[0][None], few[1][None])
    v = Flat(p.params).join(p.params)
    most = query.weights.numel() // stride
    assert torch.equal(_preconditioner(p, most)(v), alone(v))
    assert not torch.equal(_preconditioner(p)(v), alone(v))


def test_what_has_no_factors_is_refused() -> None:
    norm = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    update = Update(trpo=Trpo(preconditioner="kronecker"))
    nowhere: Any = None
    with pytest.raises(ValueError, match=r"1 is a LayerNorm.*preconditioner='none'"):
        MetaRL(Policy(norm), nowhere, update=update)
    MetaRL(Policy(norm), nowhere, update=dataclasses.replace(update, trpo=Trpo()))
    layer = nn.Linear(4, 4)
    twice = nn.Sequential(layer, nn.ReLU(), layer)
    policy = Policy(twice, engine="functional")
    x, weights = torch.randn(1, 5, 4), torch.ones(1, 5)
    with pytest.raises(ValueError, match="is called twice"):
        KroneckerPreconditioner(policy, policy.parameters(), x, weights)


def test_factors_of_zeros_are_left_alone() -> None:
    p = problem()
    last = [n for n in p.params if n.endswith("weight")][-1]
    p.params[last].zero_()  # nothing below moves the outputs
    out = _preconditioner(p)(torch.ones(Flat(p.params).join(p.params).numel()).double())
    assert out.isfinite().all() and (out != 0).all()


def test_a_factor_that_is_not_finite_moves_nothing() -> None:
    p = problem()
    objective = p.objective()
    objective.query.x.fill_(math.nan)
    theta, report = trust_region_step(
        objective.theta,
        torch.ones_like(objective.theta),
        lambda v: v,
        lambda t: (-1.0, 0.0),
        0.0,
        Trpo(),
        objective.precondition,
    )
    assert theta is objective.theta and not report.accepted
