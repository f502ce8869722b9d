"""The meta-update against a restatement that differentiates unrolled adaptations."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from close import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from rl_problem import (
    RLProblem,
    problem,
    restated,
    restated_clipped,
    restated_fisher_product,
    restated_gradient,
    restated_step,
)

from fastmaml.rl.trpo import Trpo, conjugate_gradients, trust_region_step

KINDS = ["gaussian", "categorical"]
LOSSES = ["reinforce", "likelihood_ratio", "dice"]
CASES = [
    *(
        (kind, loss, steps, "native")
        for kind in KINDS
        for loss in LOSSES
        for steps in (0, 1, 2)
    ),
    ("gaussian", "reinforce", 1, "functional"),
    ("categorical", "likelihood_ratio", 1, "functional"),
    ("gaussian", "dice", 2, "functional"),
]


def _direction(p: RLProblem) -> torch.Tensor:
    size = p.objective().theta.numel()
    generator = torch.Generator().manual_seed(5)
    return torch.randn(size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("kind", "loss", "steps", "engine"), CASES)
def test_gradient_goes_through_every_step(kind, loss, steps, engine):
    p = problem(kind, loss, steps, engine)
    objective = p.objective()
    want = restated_gradient(p, objective.theta)
    assert_close(objective.gradient(), want, "float64 chain", "meta-gradient")


@pytest.mark.parametrize(("kind", "loss", "steps", "engine"), CASES)
def test_fisher_product_is_the_divergences_second_derivative(kind, loss, steps, engine):
    p = problem(kind, loss, steps, engine)
    objective, v = p.objective(), _direction(p)
    want = restated_fisher_product(p, objective.theta, v)
    assert_close(objective.fisher_product(v), want, "float64 chain", "J'FJ v")


@pytest.mark.parametrize(("kind", "loss", "steps", "engine"), CASES)
def test_fisher_square_is_the_directions_with_its_product(kind, loss, steps, engine):
    p = problem(kind, loss, steps, engine)
    objective, v = p.objective(), _direction(p)
    want = float(v.dot(restated_fisher_product(p, objective.theta, v)))
    assert objective.fisher_square(v) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_surrogate_and_divergence_elsewhere(kind, loss):
    p = problem(kind, loss, 2)
    objective = p.objective()
    there = objective.theta + 0.05 * _direction(p)
    loss_, kl = restated(p, there)
    want = torch.stack([loss_, kl]).detach()
    got = torch.tensor(objective.evaluate(there), dtype=torch.float64)
    assert_close(got, want, "float64 chain", "surrogate and divergence")
    assert kl > 1e-3 and abs(objective.loss - loss_) > 1e-5


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_may_be_tried_on_the_first_tasks_alone(loss):
    p = problem("gaussian", loss, 2)
    whole, first = p.objective(), p.objective(checked=2)
    there = whole.theta + 0.05 * _direction(p)
    alone = dataclasses.replace(p, batches=[s.of_tasks(2) for s in p.batches])
    want = torch.stack(restated(alone, there, tasks=2)).detach()
    got = torch.tensor(first.evaluate(there), dtype=torch.float64)
    assert_close(got, want, "float64 chain", "surrogate and divergence of two")
    assert_close(
        torch.tensor(first.loss, dtype=torch.float64),
        restated(alone, whole.theta, tasks=2)[0].detach(),
        "float64 chain",
        "surrogate before",
    )
    assert whole.evaluate(there) != first.evaluate(there)
    assert torch.equal(whole.gradient(), first.gradient())
    v = _direction(p)
    assert torch.equal(whole.fisher_product(v), first.fisher_product(v))


def test_steps_that_were_not_taken_compare_nothing():
    p = problem()
    query = p.batches[-1]
    # as rollouts leave them: zeros, far from any policy of such small spreads
    taken = (query.weights > 0).unsqueeze(-1)
    query.outputs.copy_(torch.where(taken, query.outputs, -13.8))
    query.actions.copy_(torch.where(taken, query.actions, 1e3))
    objective = p.objective()
    loss, kl = objective.evaluate(objective.theta)
    assert loss == pytest.approx(objective.loss, abs=1e-12)
    assert kl == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_clipped_surrogate_and_its_gradient(kind):
    p = problem(kind, "reinforce", 1)
    objective = p.objective()
    there = objective.theta + 0.1 * _direction(p)
    clip, weight = 0.05, 0.7
    leaf = there.clone().requires_grad_()
    want = restated_clipped(p, leaf, clip, weight)
    (slope,) = torch.autograd.grad(want, leaf)
    value, kl, gradient = objective.clipped(there, clip, weight)
    assert_close(
        torch.tensor(value, dtype=torch.float64),
        want.detach(),
        "float64 chain",
        "value",
    )
    assert_close(gradient, slope, "float64 chain", "gradient")
    assert kl == pytest.approx(float(restated(p, there)[1].detach()), rel=1e-9)
    # the case clips some ratios and not others
    free = objective.clipped(there, 1e9, weight)[0]
    assert value > free + 1e-4


@pytest.mark.parametrize(("kind", "steps"), [("gaussian", 1), ("categorical", 2)])
def test_trust_region_step_is_the_restated_one(kind, steps):
    p = problem(kind, "reinforce", steps)
    objective = p.objective()
    options = Trpo(max_kl=0.02, cg_iterations=8, damping=1e-3)
    got, report = trust_region_step(
        objective.theta,
        objective.gradient(),
        objective.fisher_product,
        objective.evaluate,
        objective.loss,
        options,
    )
    want, tried = restated_step(p, objective.theta, options)
    assert report.accepted and report.backtracks == tried
    assert 0 < report.kl <= options.max_kl and report.loss < report.loss_before
    assert (got - want).abs().max() <= 1e-8 * want.abs().max()
    assert (got - objective.theta).norm() > 1e-3


def test_products_of_some_samples_estimate_those_of_all():
    p = problem("gaussian", "reinforce", 1)
    v = _direction(p)
    thin = p.objective(stride=2).fisher_product(v)
    whole = p.objective().fisher_product(v)
    assert not torch.allclose(thin, whole)
    assert torch.cosine_similarity(thin, whole, 0) > 0.7
    few = [s.every(2) for s in p.batches]
    # the parameters are those after all samples, the derivatives of every second
    adapted = p.objective()._adaptation
    from fastmaml.rl.objective import MetaObjective

    same = MetaObjective(p.policy, p.params, adapted.on(few[:-1]), few[:-1], few[-1])
    assert_close(thin, same.fisher_product(v), "float64 chain", "every second sample")
    assert torch.equal(p.objective(stride=2).gradient(), p.objective().gradient())


# -- the step alone --------------------------------------------------------------------

B = torch.diag(torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64))
THETA = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)


def _square(v):
    return float(v.dot(B @ v))


@pytest.mark.parametrize("quadratic", [None, _square])
def test_conjugate_gradients_solve_in_as_many_steps_as_there_are_curvatures(quadratic):
    products = []

    def product(v):
        products.append(v)
        return B @ v

    x, square = conjugate_gradients(product, THETA, 3, quadratic=quadratic)
    assert_close(B @ x, THETA, "float64 product", "solution")
    assert square == pytest.approx(_square(x), rel=1e-12)
    # the last iteration needs no product where there are squares
    assert len(products) == (3 if quadratic is None else 2)
    early, square = conjugate_gradients(lambda v: B @ v, THETA, 2, quadratic=quadratic)
    assert (THETA - B @ early).norm() > 1e-3
    assert square == pytest.approx(_square(early), rel=1e-12)


@pytest.mark.parametrize("quadratic", [None, _square])
def test_the_square_is_right_where_directions_are_not_conjugate(quadratic):
    scales = iter([(1.0, 1.0, 1.0), (1.0, 3.0, 0.2), (5.0, 1.0, 2.0)])

    def other_each_time(v):  # as rounding makes it, only more so
        return v * torch.tensor(next(scales), dtype=torch.float64)

    x, square = conjugate_gradients(
        lambda v: B @ v, THETA, 2, precondition=other_each_time, quadratic=quadratic
    )
    assert square == pytest.approx(_square(x), rel=1e-12)


@pytest.mark.parametrize("curvature", [-1.0, 0.0, math.nan])
def test_conjugate_gradients_end_without_curvature(curvature):
    x, square = conjugate_gradients(lambda v: curvature * v, THETA, 5)
    assert square == 0
    assert torch.equal(x, torch.zeros(3, dtype=torch.float64))
    x, square = conjugate_gradients(
        lambda v: B @ v, THETA, 2, quadratic=lambda v: curvature
    )
    assert square == pytest.approx(_square(x)) and square > 0


OUTCOME = st.sampled_from([-1.0, -1e-9, 0.0, 1e-9, 1.0, math.nan, math.inf, -math.inf])


@settings(deadline=None, max_examples=300)
@given(
    losses=st.lists(OUTCOME, min_size=4, max_size=4),
    kls=st.lists(
        st.sampled_from([0.0, 0.05, 0.1, 0.1 + 1e-12, 5.0, math.nan, math.inf]),
        min_size=4,
        max_size=4,
    ),
)
def test_the_line_search_never_accepts_a_bad_step(losses, kls):
    tried = []

    def evaluate(theta: torch.Tensor) -> tuple[float, float]:
        tried.append(theta)
        return losses[len(tried) - 1], kls[len(tried) - 1]

    options = Trpo(max_kl=0.1, max_backtracks=4)
    new, report = trust_region_step(
        THETA, THETA, lambda v: B @ v, evaluate, 0.0, options
    )
    pairs = zip(losses, kls, strict=True)
    good = [loss < 0 and kl <= 0.1 and math.isfinite(loss) for loss, kl in pairs]
    if not any(good):
        assert not report.accepted and new is THETA and report.kl == 0.0
        return
    first = good.index(True)
    assert report.accepted and report.backtracks == first == len(tried) - 1
    assert torch.equal(new, tried[first])
    assert (report.loss, report.kl) == (losses[first], kls[first])
    lengths = [float((theta - THETA).norm()) for theta in tried]
    ratios = [b / a for a, b in zip(lengths, lengths[1:], strict=False)]
    assert ratios == pytest.approx([0.8] * first)


@pytest.mark.parametrize("broken", ["gradient", "product"])
def test_what_is_not_finite_moves_nothing(broken):
    gradient = THETA * (math.nan if broken == "gradient" else 1)
    scale = math.nan if broken == "product" else 1
    new, report = trust_region_step(
        THETA, gradient, lambda v: scale * v, lambda t: (-1.0, 0.0), 0.0, Trpo()
    )
    assert new is THETA and not report.accepted


@pytest.mark.parametrize("name", ["policy_gradient", "likelihood_ratio", "gaussian_kl"])
def test_the_native_losses_floor_spreads_as_the_others_do(name):
    from oracles import hvp, value_and_grad

    from fastmaml.compile import compile_module
    from fastmaml.engines.native import NativeEngine
    from fastmaml.losses import BUILT_IN, LOG_STD_FLOOR, POLICY_TARGETS
    from fastmaml.models import gaussian_policy_mlp

    model = gaussian_policy_mlp(3, 2, (4,)).double()
    with torch.no_grad():
        model[-1].value.copy_(torch.tensor([LOG_STD_FLOOR - 3, -0.5]))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 3, generator=generator, dtype=torch.float64)
    size = POLICY_TARGETS[name][0](4)
    y = torch.randn(1, 4, size, generator=generator, dtype=torch.float64)
    y[..., 0] = model(x[0])[None, :, 0].detach() + 1e-7 * y[..., 0]  # near the mean
    if name == "likelihood_ratio":
        y[..., -1] += 12  # about the log density there
    elif name == "gaussian_kl":
        y[..., 2] = LOG_STD_FLOOR - 1  # floored too
    params = {n: p.detach()[None] for n, p in model.named_parameters()}
    engine = NativeEngine(compile_module(model, name).program, model)
    loss, slopes = engine.value_and_grad(params, x, y)
    want_loss, want = value_and_grad(model, BUILT_IN[name], params, x, y)
    # a - m loses six digits where the spread is 1e-6
    assert_close(loss, want_loss, "differences", "loss")
    assert_close(slopes, want, "differences", "gradient")
    last = [*params][-1]
    assert slopes[last][0, 0] == 0 and slopes[last][0, 1] != 0
    v = {n: torch.ones_like(p) for n, p in params.items()}
    product = engine.hvp(params, x, y, v)
    assert_close(
        product, hvp(model, BUILT_IN[name], params, x, y, v), "differences", ""
    )
    assert product[last][0, 0] == 0
