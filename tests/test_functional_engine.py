"""The functional engine against plain autograd through the unrolled loop."""

from __future__ import annotations

import weakref

import oracles
import pytest
import torch
from close import assert_close
from engines import detached, functional, loss_of, rates_of, scalar_rates
from problems import BY_NAME, MODEL, PROBLEMS, direction, per_task
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastmaml.engines import FunctionalEngine, Rates
from fastmaml.losses import mse
from fastmaml.tasks import TaskBatch

SMALL = ["linear-9to15", "cross-entropy-5-n5-mean", "batch-norm-not-adapted"]
by_id = {"ids": str}


@pytest.mark.parametrize("problem", PROBLEMS, **by_id)
def test_meta_gradient_is_that_of_the_unrolled_loop(problem):
    model = problem.build()
    rates, tasks = scalar_rates(problem, model), problem.tasks()
    got = functional(problem, model).meta_gradient(
        detached(model), rates, tasks, steps=2, rate_gradient=True
    )
    want = oracles.meta_gradient(
        model, loss_of(problem).function, detached(model), rates, tasks, 2
    )
    assert_close(got.loss, want.loss, "float64 pass", problem.name)
    assert_close(got.gradients, want.gradients, "float64 chain", problem.name)
    assert_close(got.rate_gradient, want.rate_gradient, "float64 chain", problem.name)


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("problem", MODEL, **by_id)
def test_models_at_other_step_counts(problem, steps):
    model = problem.build()
    rates, tasks = scalar_rates(problem, model), problem.tasks()
    got = functional(problem, model).meta_gradient(
        detached(model), rates, tasks, steps=steps
    )
    want = oracles.meta_gradient(
        model, loss_of(problem).function, detached(model), rates, tasks, steps
    )
    assert_close(got.gradients, want.gradients, "float64 chain", problem.name)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("per_step", [False, True], ids=["shared", "per-step"])
@pytest.mark.parametrize("layout", ["scalar", "per_tensor", "per_parameter"])
@pytest.mark.parametrize("name", SMALL)
def test_rate_layouts_orders_and_step_weights(name, layout, per_step, first_order):
    problem = BY_NAME[name]
    model, tasks = problem.build(), problem.tasks(tasks=3)
    rates = rates_of(problem, model, layout, per_step, steps=3)
    options = {"first_order": first_order, "loss_weights": [0.1, 0.0, 0.7, 0.4]}
    got = functional(problem, model, chunk_size=2).meta_gradient(
        detached(model), rates, tasks, steps=3, rate_gradient=True, **options
    )
    want = oracles.meta_gradient(
        model, loss_of(problem).function, detached(model), rates, tasks, 3, **options
    )
    assert_close(got.loss, want.loss, "float64 pass", name)
    assert_close(got.gradients, want.gradients, "float64 chain", name)
    assert_close(got.rate_gradient, want.rate_gradient, "float64 chain", name)


def test_last_step_without_weight():
    problem = BY_NAME["linear-9to15"]
    model, tasks = problem.build(), problem.tasks()
    rates = rates_of(problem, model, "scalar", True, steps=2)
    got = functional(problem, model).meta_gradient(
        detached(model),
        rates,
        tasks,
        steps=2,
        loss_weights=[0, 1, 0],
        rate_gradient=True,
    )
    want = oracles.meta_gradient(
        model,
        loss_of(problem).function,
        detached(model),
        rates,
        tasks,
        2,
        loss_weights=[0, 1, 0],
    )
    assert_close(got.gradients, want.gradients, "float64 chain", problem.name)
    assert_close(got.rate_gradient, want.rate_gradient, "float64 chain", problem.name)
    assert got.query_loss.isnan().tolist() == [[True, False, True]] * 2


@pytest.mark.parametrize("problem", PROBLEMS, **by_id)
def test_products_of_per_task_parameters(problem):
    model, (x, y) = problem.build(), _samples(problem)
    engine, loss = functional(problem, model), loss_of(problem).function
    params, vector = per_task(model, 2), direction(model, 2)
    value, gradient = engine.value_and_grad(params, x, y)
    want_value, want = oracles.value_and_grad(model, loss, params, x, y)
    assert_close(value, want_value, "float64 pass", problem.name)
    assert_close(gradient, want, "float64 pass", problem.name)
    want = oracles.hvp(model, loss, params, x, y, vector)
    got = engine.hvp(params, x, y, vector)
    assert_close(got, want, "float64 product", problem.name)
    want = oracles.gauss_newton_product(model, loss, params, x, y, vector)
    got = engine.gauss_newton_product(params, x, y, vector)
    assert_close(got, want, "float64 product", problem.name)


@pytest.mark.parametrize("name", SMALL)
def test_shared_parameters_equal_the_same_per_task(name):
    problem = BY_NAME[name]
    model, (x, y) = problem.build(), _samples(problem)
    engine, shared = functional(problem, model), detached(problem.build())
    copied = {n: p.expand(2, *p.shape).clone() for n, p in shared.items()}
    vector = {n: v[0] for n, v in direction(model, 2).items()}
    both = {n: v.expand(2, *v.shape).clone() for n, v in vector.items()}
    for got, want in (
        (
            engine.value_and_grad(shared, x, y)[1],
            engine.value_and_grad(copied, x, y)[1],
        ),
        (engine.hvp(shared, x, y, vector), engine.hvp(copied, x, y, both)),
        (
            engine.gauss_newton_product(shared, x, y, vector),
            engine.gauss_newton_product(copied, x, y, both),
        ),
        ({"x": engine.forward(shared, x)}, {"x": engine.forward(copied, x)}),
    ):
        assert_close(got, want, "float64 product", name)


@pytest.mark.parametrize("name", [*SMALL, "omniglot-fc"])
def test_adapt_and_evaluate(name):
    problem = BY_NAME[name]
    model, tasks = problem.build(), problem.tasks(tasks=3)
    loss, rates = loss_of(problem), rates_of(problem, model, "per_tensor", True, 2)
    engine = functional(problem, model, chunk_size=2)
    support = tasks.support_x, tasks.support_y
    metrics = engine.evaluate(detached(model), rates, tasks, steps=3)
    for k in range(4):
        want = oracles.adapt(model, loss.function, detached(model), rates, *support, k)
        got = engine.adapt(detached(model), rates, *support, steps=k)
        assert_close(got, want, "float64 chain", name)
        value, _ = oracles.value_and_grad(
            model, loss.function, want, tasks.query_x, tasks.query_y
        )
        assert_close(metrics.loss[:, k], value, "float64 chain", name)
    if loss.accuracy:
        outputs = engine.forward(want, tasks.query_x)
        right = (outputs.argmax(-1) == tasks.query_y).double().mean(1)
        assert torch.equal(metrics.accuracy[:, 3], right)
    else:
        assert metrics.accuracy is None


def test_adapted_parameters_are_copies():
    problem = BY_NAME["batch-norm-not-adapted"]
    model, tasks = problem.build(), problem.tasks()
    engine, rates = functional(problem, model), scalar_rates(problem, problem.build())
    got = engine.adapt(
        detached(model), rates, tasks.support_x, tasks.support_y, steps=0
    )
    before = {n: p.clone() for n, p in got.items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    assert all(torch.equal(got[n], before[n]) for n in got)


def test_inductive_evaluation_never_mixes_queries():
    problem = BY_NAME["omniglot-fc"]
    model, tasks = problem.build(), problem.tasks(tasks=2, query=3)
    loss, rates = loss_of(problem).function, scalar_rates(problem, model)
    engine = functional(problem, model)
    got = engine.evaluate(detached(model), rates, tasks, steps=1, inductive=True)
    support = tasks.support_x, tasks.support_y
    thetas = oracles.adapt(model, loss, detached(model), rates, *support, 1)
    for t in range(2):
        theta = {n: p[t] for n, p in thetas.items()}
        want = oracles.inductive_losses(model, loss, theta, tasks, t).mean()
        assert_close(got.loss[t, 1], want, "float64 chain", problem.name)
    mixed = engine.evaluate(detached(model), rates, tasks, steps=1)
    assert not torch.allclose(mixed.loss, got.loss)


@pytest.mark.parametrize("name", ["linear-9to15", "omniglot-fc"])
def test_one_by_one_equals_vectorized(name):
    problem = BY_NAME[name]
    model, tasks = problem.build(), problem.tasks(tasks=3)
    rates = scalar_rates(problem, model)
    both = [
        functional(problem, model, vectorize=v).meta_gradient(
            detached(model), rates, tasks, steps=2
        )
        for v in (True, False)
    ]
    assert_close(both[0].gradients, both[1].gradients, "float64 chain", name)
    assert_close(both[0].query_loss, both[1].query_loss, "float64 pass", name)


def test_float32_stays_near_float64():
    problem = BY_NAME["sinusoid"]
    tasks, rates = problem.tasks(), scalar_rates(problem, problem.build())
    want = functional(problem, problem.build()).meta_gradient(
        detached(problem.build()), rates, tasks, steps=5
    )
    model = problem.build(torch.float32)
    single = Rates(rates.values.float(), adapted=rates.adapted)
    got = functional(problem, model).meta_gradient(
        detached(model), single, tasks.to(dtype=torch.float32), steps=5
    )
    assert got.gradients["0.weight"].dtype == torch.float32
    assert_close(got.gradients, want.gradients, "float32 chain", problem.name)


class Census(TorchDispatchMode):
    """Knows the most activations that were alive at once: they have a sample axis."""

    def __init__(self, samples):
        super().__init__()
        self.samples, self.alive, self.most = samples, set(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor) and self.samples in tensor.shape:
                key = object()
                self.alive.add(key)
                weakref.finalize(tensor, self.alive.discard, key)
        self.most = max(self.most, len(self.alive))
        return out


def _most_activations(run):
    with Census(samples=501) as census:
        run()
    return census.most


def test_activations_alive_do_not_grow_with_steps():
    problem = BY_NAME["linear-five-deep"]
    model, tasks = problem.build(), problem.tasks(tasks=2, support=501, query=7)
    rates, engine = scalar_rates(problem, model), functional(problem, model)
    loss, params = loss_of(problem).function, detached(model)
    chain = [
        _most_activations(
            lambda k=k: engine.meta_gradient(params, rates, tasks, steps=k)
        )
        for k in (1, 2, 8)
    ]
    unrolled = [
        _most_activations(
            lambda k=k: oracles.meta_gradient(model, loss, params, rates, tasks, k)
        )
        for k in (2, 8)
    ]
    assert 0 < chain[0] and chain[1] == chain[2] <= chain[0] + 2
    assert unrolled[1] > 3 * unrolled[0], "the census counts graphs"


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        y = self.layer(x)
        return y * 2 if x.sum() > 0 else y


def _branching_tasks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 3, generator=generator)
    return TaskBatch(x, x[..., :2], x, x[..., :2])


def test_branch_on_values_is_explained_and_runs_one_by_one():
    model, tasks = Branching(), _branching_tasks()
    rates = Rates(torch.tensor(0.1))
    with pytest.raises(RuntimeError, match=r"Branching.*branches.*vectorize=False"):
        FunctionalEngine(model, mse).meta_gradient(
            detached(model), rates, tasks, steps=1
        )
    engine = FunctionalEngine(model, mse, vectorize=False)
    got = engine.meta_gradient(detached(model), rates, tasks, steps=1)
    want = oracles.meta_gradient(model, mse, detached(model), rates, tasks, 1)
    assert_close(got.gradients, want.gradients, "float32 product", "branching")


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x + torch.randn_like(x))


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return self.layer(x) + 0 * self.seen


class Averaging(Counting):
    def forward(self, x):
        self.seen.mul_(x.detach().mean())
        return self.layer(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [(Noisy(), "draws random numbers"), (Averaging(), "writes in place")],
    ids=["noise", "in-place"],
)
def test_other_refusals_of_vmap_are_explained(model, message):
    with pytest.raises(RuntimeError, match=message):
        FunctionalEngine(model, mse).meta_gradient(
            detached(model), Rates(torch.tensor(0.1)), _branching_tasks(), steps=1
        )


def test_other_errors_pass_unchanged():
    model = nn.Linear(4, 2)
    with pytest.raises(RuntimeError, match="shapes"):
        FunctionalEngine(model, mse).meta_gradient(
            detached(model), Rates(torch.tensor(0.1)), _branching_tasks(), steps=1
        )


def test_buffers_of_the_model_are_not_written():
    model = Counting()
    FunctionalEngine(model, mse).meta_gradient(
        detached(model), Rates(torch.tensor(0.1)), _branching_tasks(), steps=2
    )
    assert model.seen.item() == 0


def test_evaluating_batch_norm_uses_running_statistics_as_constants():
    norm = nn.BatchNorm1d(3)
    norm.running_mean.fill_(0.7)
    model = nn.Sequential(norm, nn.Linear(3, 2)).eval()
    got = FunctionalEngine(model, mse).forward(
        detached(model), _branching_tasks().support_x
    )
    with torch.no_grad():
        want = torch.stack([model(x) for x in _branching_tasks().support_x])
    assert_close(got, want, "float32 pass", "running statistics")
    assert torch.all(norm.running_mean == 0.7)


def test_frozen_parameters_are_constants():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].requires_grad_(False)
    tasks = _branching_tasks().to(dtype=torch.float64)
    rates = Rates(torch.full((2,), 0.1, dtype=torch.float64), "per_tensor")
    got = FunctionalEngine(model, mse).meta_gradient(
        detached(model), rates, tasks, steps=2, rate_gradient=True
    )
    want = oracles.meta_gradient(model, mse, detached(model), rates, tasks, 2)
    assert set(got.gradients) == {"2.weight", "2.bias"}
    assert_close(got.gradients, want.gradients, "float64 chain", "frozen")
    assert_close(got.rate_gradient, want.rate_gradient, "float64 chain", "frozen")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weights": [1.0]}, r"1 weights.*3 in all"),
        ({"steps": -1}, "steps=-1"),
    ],
)
def test_bad_options_are_named(options, message):
    problem = BY_NAME["linear-alone"]
    model = problem.build()
    arguments = {"steps": 2, **options}
    with pytest.raises(ValueError, match=message):
        functional(problem, model).meta_gradient(
            detached(model), scalar_rates(problem, model), problem.tasks(), **arguments
        )


def _samples(problem):
    return problem.make(2, problem.samples, torch.Generator().manual_seed(3))
