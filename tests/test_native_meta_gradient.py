"""The driver against autograd through the unrolled inner loop."""

from __future__ import annotations

import dataclasses

import oracles
import pytest
import torch
from backends import on_every_backend, quick_alone
from close import assert_close
from engines import rates_of
from native_cases import DTYPES, Case, case, cast, native, row
from problems import BY_NAME, LAYER, MODEL, Problem, per_task
from torch import nn

from fastmaml.engines import Rates

pytestmark = on_every_backend

by_id = {"ids": str}
both_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)

# conv-3to5 ends in Flatten and Linear: weights in another order inside the engine
SMALL = [
    "linear-9to15",
    "cross-entropy-5-n5-mean",
    "batch-norm-not-adapted",
    "conv-3to5-k3x3-s1x1-p1x1",
    "append-parameter",
]


class Backwards(nn.Module):
    """Registers its layers, and the weight of one of them, in the reverse of their use.

    Sizes differ throughout, so that any mistaken order shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(24, 2)
        self.flatten = nn.Flatten()
        self.squash = nn.Tanh()
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.first = nn.Conv2d(3, 4, 2)
        weight = self.last.weight
        del self.last.weight
        self.last.weight = weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.flatten(self.squash(self.norm(self.first(x)))))


BACKWARDS = Problem("backwards", Backwards, (3, 4, 3), 2, samples=4)

# Five steps at 0.05 end in infinity for the policy (its loss has no lower bound), and
# amplify float32's rounding a thousandfold where a batch norm sees five samples.
CALM = [dataclasses.replace(p, inner_lr=min(p.inner_lr, 0.02)) for p in MODEL]


def check(c: Case, rates: Rates, steps: int, dtype=torch.float64, **options) -> None:
    """Loss, gradients and rate gradient against the unrolled loop."""
    tasks = c.tasks.to(dtype=dtype)
    got = native(c).meta_gradient(
        cast(c.params, dtype), rates, tasks, steps=steps, rate_gradient=True, **options
    )
    want = oracles.meta_gradient(
        c.model, c.loss, c.params, rates, c.tasks, steps, **options
    )
    name = c.problem.name
    assert want.loss.isfinite(), f"{name} diverges, so nothing would be compared"
    assert got.loss.dtype == dtype
    assert_close(got.loss, want.loss, row(dtype, "chain"), name)
    assert_close(got.gradients, want.gradients, row(dtype, "chain"), name)
    assert_close(got.rate_gradient, want.rate_gradient, row(dtype, "chain"), name)


@both_dtypes
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("problem", CALM, **by_id)
def test_models_of_the_paper(problem, steps, dtype):
    if steps != 1:
        quick_alone(problem.name)
    c = case(problem)
    check(c, c.rates, steps, dtype)


@pytest.mark.parametrize("problem", LAYER, **by_id)
def test_every_layer(problem):
    c = case(problem)
    check(c, c.rates, 2)


@pytest.mark.parametrize("problem", CALM, **by_id)
def test_first_order_leaves_the_products_out(problem):
    quick_alone(problem.name)
    c = case(problem)
    check(c, c.rates, 2, first_order=True)
    second, first = (
        native(c).meta_gradient(c.params, c.rates, c.tasks, steps=2, first_order=order)
        for order in (False, True)
    )
    assert torch.equal(first.loss, second.loss)
    assert any(
        not torch.allclose(first.gradients[n], second.gradients[n]) for n in c.params
    )


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("per_step", [False, True], ids=["shared", "per-step"])
@pytest.mark.parametrize("layout", ["scalar", "per_tensor", "per_parameter"])
@pytest.mark.parametrize("problem", [*(BY_NAME[n] for n in SMALL), BACKWARDS], **by_id)
def test_rate_layouts_with_step_weights(problem, layout, per_step, first_order):
    c = case(problem, tasks=3)
    rates = rates_of(problem, c.model, layout, per_step, steps=3)
    weights = [0.1, 0.0, 0.7, 0.4]
    check(c, rates, 3, first_order=first_order, loss_weights=weights)


@both_dtypes
@pytest.mark.parametrize("layout", ["scalar", "per_tensor", "per_parameter"])
def test_later_steps_reuse_the_last_row_of_rates(layout, dtype):
    c = case("conv-3to5-k3x3-s1x1-p1x1")
    check(c, rates_of(c.problem, c.model, layout, True, steps=2), 4, dtype)


def test_parameters_come_back_in_the_order_of_the_model():
    c = case(BACKWARDS)
    names = [n for n, _ in c.model.named_parameters()]
    assert names[0].startswith("last.") and names[-1].startswith("first.")
    used = native(c)._program.parameters
    assert list(used) != names and set(used) == set(names)


@pytest.mark.parametrize("layout", ["scalar", "per_tensor", "per_parameter"])
def test_tensors_that_are_not_adapted_stay_and_have_no_rate(layout):
    c = case(BACKWARDS)
    full = rates_of(BACKWARDS, c.model, layout, True, steps=2)
    rates = dataclasses.replace(full, adapted=frozenset({"last.bias", "first.weight"}))
    check(c, rates, 2)
    support = c.tasks.support_x, c.tasks.support_y
    adapted = native(c).adapt(c.params, rates, *support, steps=2)
    for name, p in c.params.items():
        moved = not torch.equal(adapted[name], p.expand_as(adapted[name]))
        assert moved == (name in rates.adapted), name
    got = native(c).meta_gradient(c.params, rates, c.tasks, steps=2, rate_gradient=True)
    if layout == "per_tensor":
        still = [n not in rates.adapted for n in c.params]
        assert (got.rate_gradient[:, still] == 0).all()
        assert (got.rate_gradient[:, [not s for s in still]] != 0).all()


@pytest.mark.parametrize("problem", [BY_NAME["sinusoid"], BACKWARDS], **by_id)
def test_nothing_adapted_is_plain_training(problem):
    c = case(problem)
    rates = dataclasses.replace(c.rates, adapted=frozenset())
    got = native(c).meta_gradient(c.params, rates, c.tasks, steps=2)
    value, gradient = native(c).value_and_grad(
        c.params, c.tasks.query_x, c.tasks.query_y
    )
    assert_close(got.loss, value.mean(), "float64 pass", problem.name)
    mean = {n: g.mean(0) for n, g in gradient.items()}
    assert_close(got.gradients, mean, "float64 pass", problem.name)


@both_dtypes
@pytest.mark.parametrize("problem", [BY_NAME["policy"], BACKWARDS], **by_id)
def test_parameters_of_every_task(problem, dtype):
    c = case(problem, tasks=3)
    rates = rates_of(problem, c.model, "per_parameter", True, steps=2)
    got = native(c).meta_gradient(
        cast(c.own, dtype),
        rates,
        c.tasks.to(dtype=dtype),
        steps=2,
        rate_gradient=True,
    )
    answers = [
        oracles.meta_gradient(
            c.model,
            c.loss,
            {n: p[t] for n, p in c.own.items()},
            rates,
            c.tasks[t : t + 1],
            2,
        )
        for t in range(3)
    ]
    gradients = {
        n: torch.stack([a.gradients[n] for a in answers]).mean(0) for n in c.own
    }
    slopes = torch.stack([a.rate_gradient for a in answers]).mean(0)
    assert_close(got.gradients, gradients, row(dtype, "chain"), problem.name)
    assert_close(got.rate_gradient, slopes, row(dtype, "chain"), problem.name)


@pytest.mark.parametrize("weights", [[0, 1, 0], [1, 0, 0], [0.5, -0.25, 2]], ids=str)
def test_query_losses_of_the_steps_that_weigh(weights):
    """Equal but for rounding: one call does whole tasks, the other layer by layer."""
    c = case("cross-entropy-17-n7-mean", tasks=3)
    check(c, c.rates, 2, loss_weights=weights)
    engine = native(c)
    got = engine.meta_gradient(
        c.params, c.rates, c.tasks, steps=2, loss_weights=weights
    )
    metrics = engine.evaluate(c.params, c.rates, c.tasks, steps=2)
    for k, w in enumerate(weights):
        if w:
            torch.testing.assert_close(
                got.query_loss[:, k], metrics.loss[:, k], rtol=1e-13, atol=0
            )
            assert torch.equal(got.query_accuracy[:, k], metrics.accuracy[:, k])
        else:
            assert got.query_loss[:, k].isnan().all()
            assert got.query_accuracy[:, k].isnan().all()


def test_no_weights_no_gradient():
    c = case("cross-entropy-17-n7-mean", tasks=3)
    got = native(c).meta_gradient(
        c.params, c.rates, c.tasks, steps=2, loss_weights=[0, 0, 0], rate_gradient=True
    )
    assert got.loss == 0 and got.rate_gradient == 0
    assert all((g == 0).all() for g in got.gradients.values())
    assert got.query_loss.isnan().all()


def test_meta_gradient_of_a_nudged_model_moves():
    """The engine reads parameters at each call, it keeps none of its own."""
    c = case("linear-9to15")
    engine = native(c)
    before = engine.meta_gradient(c.params, c.rates, c.tasks, steps=1)
    nudged = {n: p[0] for n, p in per_task(c.model, 1).items()}
    after = engine.meta_gradient(nudged, c.rates, c.tasks, steps=1)
    want = oracles.meta_gradient(c.model, c.loss, nudged, c.rates, c.tasks, 1)
    assert not torch.equal(before.loss, after.loss)
    assert_close(after.gradients, want.gradients, "float64 chain", "nudged")
