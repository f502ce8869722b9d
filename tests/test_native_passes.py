"""Every pass of every problem is what the oracle says, in both dtypes."""

from __future__ import annotations

import pytest
import torch
from backends import current, on_every_backend, quick_alone
from close import assert_close
from native_cases import (
    DTYPES,
    adapt_wanted,
    case,
    cast,
    native,
    passes_wanted,
    row,
)
from problems import PROBLEMS, Problem
from torch import nn

pytestmark = on_every_backend

BEYOND = Problem(
    "padding-beyond-the-kernel",
    lambda: nn.Sequential(
        nn.Conv2d(2, 3, (1, 2), stride=(1, 3), padding=(2, 3)),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(63, 2),
    ),
    (2, 3, 2),
    2,
)
FEW = ("linear-9", "conv-3to5")
every_problem = pytest.mark.parametrize("problem", [*PROBLEMS, BEYOND], ids=str)
both_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)


@both_dtypes
@every_problem
def test_forward(problem, dtype):
    c = case(problem)
    x = c.tasks.support_x.to(dtype)
    got = native(c).forward(cast(c.own, dtype), x)
    assert got.dtype == dtype
    want = passes_wanted(problem)["forward"]
    assert_close(got, want, row(dtype, "pass"), problem.name)


@both_dtypes
@every_problem
def test_value_and_gradient(problem, dtype):
    c = case(problem)
    tasks = c.tasks.to(dtype=dtype)
    value, gradient = native(c).value_and_grad(
        cast(c.own, dtype), tasks.support_x, tasks.support_y
    )
    want = passes_wanted(problem)
    assert_close(value, want["value"], row(dtype, "pass"), problem.name)
    assert_close(gradient, want["gradient"], row(dtype, "pass"), problem.name)


@pytest.mark.parametrize("product", ["hvp", "gauss_newton_product"])
@both_dtypes
@every_problem
def test_curvature_product(problem, dtype, product):
    c = case(problem)
    tasks = c.tasks.to(dtype=dtype)
    got = getattr(native(c), product)(
        cast(c.own, dtype), tasks.support_x, tasks.support_y, cast(c.vector, dtype)
    )
    want = passes_wanted(problem)[product]
    assert_close(got, want, row(dtype, "product"), problem.name)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "per-task"])
@both_dtypes
@every_problem
def test_adapt(problem, dtype, own):
    quick_alone(problem.name)
    c = case(problem)
    tasks = c.tasks.to(dtype=dtype)
    params = cast(c.own if own else c.params, dtype)
    got = native(c).adapt(params, c.rates, tasks.support_x, tasks.support_y, steps=2)
    want = adapt_wanted(c, c.rates, 2, own)
    assert_close(got, want, row(dtype, "chain"), problem.name)


@both_dtypes
@pytest.mark.parametrize("product", ["hvp", "gauss_newton_product", "value_and_grad"])
@pytest.mark.parametrize(
    "problem",
    [p for p in PROBLEMS if p.name.startswith(FEW)],
    ids=str,
)
def test_shared_parameters_are_the_same_for_every_task(problem, product, dtype):
    c = case(problem)
    tasks = c.tasks.to(dtype=dtype)
    shared = cast(c.params, dtype)
    copied = {n: p.expand(2, *p.shape).contiguous() for n, p in shared.items()}
    one = {n: v[0].contiguous().to(dtype) for n, v in c.vector.items()}
    both = {n: v.expand(2, *v.shape).contiguous() for n, v in one.items()}
    call = getattr(native(c), product)
    vectors = ((), ()) if product == "value_and_grad" else ((one,), (both,))
    got = call(shared, tasks.support_x, tasks.support_y, *vectors[0])
    want = call(copied, tasks.support_x, tasks.support_y, *vectors[1])
    if product == "value_and_grad":
        assert torch.equal(got[0], want[0])
        got, want = got[1], want[1]
    assert_close(got, want, "exact", problem.name)


@both_dtypes
@every_problem
def test_evaluation_after_every_step(problem, dtype):
    quick_alone(problem.name)
    layers_alone = problem.loss == "mse" and not problem.name.startswith(FEW)
    if layers_alone and current() == "cuda_emulated":
        pytest.skip("slow, and not about layers, which are tested above")
    c = case(problem)
    engine, tasks = native(c), c.tasks.to(dtype=dtype)
    params = cast(c.params, dtype)
    metrics = engine.evaluate(params, c.rates, tasks, steps=2)
    query = tasks.query_x, tasks.query_y
    for k in range(3):
        theta = engine.adapt(params, c.rates, tasks.support_x, tasks.support_y, steps=k)
        value, _ = engine.value_and_grad(theta, *query)
        assert torch.equal(metrics.loss[:, k], value)
        if problem.loss == "cross_entropy":
            hits = engine.forward(theta, query[0]).argmax(-1) == query[1]
            assert torch.equal(metrics.accuracy[:, k], hits.to(dtype).mean(1))
    assert (metrics.accuracy is None) == (problem.loss != "cross_entropy")
