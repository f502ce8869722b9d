"""`Learner.backward` is ``meta_loss(tasks).backward()`` without the graph."""

from __future__ import annotations

import copy
import dataclasses

import engines
import pytest
import torch
from close import assert_close
from engines import learner_for
from problems import BY_NAME
from torch import nn

import fastmaml
from fastmaml import MAML, TaskBatch

CASES = ["linear-9to15", "omniglot-fc", "omniglot-conv", "policy"]
DTYPES = [torch.float32, torch.float64]
FIELDS = ("support_x", "support_y", "query_x", "query_y")


@pytest.fixture(params=engines.NAMES)
def engine(request):
    return request.param


def built(name, engine, dtype=torch.float64, **options):
    """A learner and tasks of a problem."""
    problem = BY_NAME[name]
    model = problem.build().to(dtype)
    learner = learner_for(problem, engine, model, **options)
    return learner, problem.tasks(tasks=3).to(dtype=dtype)


def gradients(learner):
    return [None if p.grad is None else p.grad.clone() for p in learner.parameters()]


def forget(learner):
    for p in learner.parameters():
        p.grad = None


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


def by_autograd(learner, tasks):
    forget(learner)
    loss = learner.meta_loss(tasks)
    loss.backward()
    want = loss.detach(), gradients(learner), learner.last
    forget(learner)
    return want


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_loss_gradients_and_details_are_those_of_meta_loss(name, dtype, engine):
    learner, tasks = built(name, engine, dtype, learn_rates=True)
    loss, found, details = by_autograd(learner, tasks)
    for accumulate in (True, False, False):
        if accumulate:
            forget(learner)
        got = learner.backward(tasks, accumulate=accumulate)
        assert not got.requires_grad and got.grad_fn is None
        assert_same([got, *gradients(learner)], [loss, *found])
        assert_same([learner.last.loss], [loss])
        torch.testing.assert_close(
            learner.last.query_loss,
            details.query_loss,
            rtol=0,
            atol=0,
            equal_nan=True,
        )
        if details.query_accuracy is None:
            assert learner.last.query_accuracy is learner.last.mean_accuracy is None
        else:
            last = details.query_accuracy[:, -1].mean().item()
            assert learner.last.mean_accuracy == pytest.approx(last, rel=1e-6)


def test_gradients_accumulate_where_there_are_some(engine):
    learner, tasks = built("linear-9to15", engine)
    _, once, _ = by_autograd(learner, tasks)
    first = next(learner.parameters())
    for p in learner.parameters():
        p.grad = None if p is first else torch.ones_like(p)
    kept = [p.grad for p in learner.parameters()]
    for _ in range(2):
        learner.backward(tasks)
    want = [2 * g if i == 0 else 2 * g + 1 for i, g in enumerate(once)]
    for got, value in zip(gradients(learner), want, strict=True):
        assert_close(got, value, "float64 pass", "accumulated")
    now = [p.grad for p in learner.parameters()]
    assert all(a is b for a, b in zip(now[1:], kept[1:], strict=True))


def test_overwriting_keeps_the_tensors_that_are_there(engine):
    learner, tasks = built("linear-9to15", engine)
    _, want, _ = by_autograd(learner, tasks)
    for p in learner.parameters():
        p.grad = torch.full_like(p, torch.nan)
    kept = [p.grad for p in learner.parameters()]
    for _ in range(3):
        learner.backward(tasks, accumulate=False)
        assert_same(gradients(learner), want)
    now = [p.grad for p in learner.parameters()]
    assert all(a is b for a, b in zip(now, kept, strict=True))


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_of_other_strides_are_reached(engine, accumulate):
    learner, tasks = built("linear-9to15", engine)
    _, want, _ = by_autograd(learner, tasks)
    for p in learner.parameters():
        p.grad = torch.zeros(*p.shape, 2, dtype=p.dtype)[..., 0]
    for _ in range(2):
        for p in learner.parameters():
            p.grad.zero_()
        learner.backward(tasks, accumulate=accumulate)
        assert_same(gradients(learner), want)


@pytest.mark.parametrize("layout", ["scalar", "per_tensor", "per_parameter"])
@pytest.mark.parametrize("per_step", [False, True])
def test_learned_rates(layout, per_step, engine):
    options = {"rates": layout, "per_step_rates": per_step, "learn_rates": True}
    weights = [0.25, 0.0, 1.0]
    learner, tasks = built("linear-9to15", engine, loss_weights=weights, **options)
    for scale in (1.0, 0.5):  # the second time the rates have other values
        with torch.no_grad():
            learner.rates.mul_(scale)
        loss, want, _ = by_autograd(learner, tasks)
        for _ in range(2):
            got = learner.backward(tasks, accumulate=False)
            assert_same([got, *gradients(learner)], [loss, *want])
        assert learner.rates.grad.abs().sum() > 0


class Swapped(nn.Module):
    """Parameters in another order than the layers run in."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(5, 2)
        self.first = nn.Linear(3, 5)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("layout", ["scalar", "per_tensor", "per_parameter"])
def test_models_whose_parameters_come_in_another_order(layout, engine):
    model = Swapped().double()
    x, y = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 2).double()
    tasks = TaskBatch(x, y, x + 1, y)
    learner = MAML(model, rates=layout, learn_rates=True, engine=engine)
    for scale in (1.0, 3.0):
        with torch.no_grad():
            learner.rates.mul_(scale)
        loss, want, _ = by_autograd(learner, tasks)
        for _ in range(2):
            got = learner.backward(tasks, accumulate=False)
            assert_same([got, *gradients(learner)], [loss, *want])


def changes():
    def moved(model):
        for p in model.parameters():
            p.data = p.data.clone() * 1.5

    def replaced(model):
        model[0].weight = nn.Parameter(model[0].weight.detach() * 2)

    def turned(model):
        weight = model[0].weight
        weight.data = (weight.data * 2).t().contiguous().t()

    def in_place(model):
        with torch.no_grad():
            model[0].bias.add_(1)

    def frozen(model):
        model[0].bias.requires_grad_(False)

    return [moved, replaced, turned, in_place, frozen]


@pytest.mark.parametrize("change", changes(), ids=lambda c: c.__name__)
def test_changed_parameters_are_noticed(change, engine):
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 2).double()
    tasks = TaskBatch(x, y, x + 1, y)
    if engine != "functional" and change.__name__ == "frozen":
        engine = "auto"  # which leaves the native engine for such a model
    learner = MAML(model, engine=engine)
    before = learner.backward(tasks)
    for _ in range(2):
        learner.backward(tasks, accumulate=False)
    change(model)
    forget(learner)
    got = learner.backward(tasks)
    found = gradients(learner)
    fresh = MAML(copy.deepcopy(model), engine=engine)
    loss, want, _ = by_autograd(fresh, tasks)
    assert_same([got, *found], [loss, *want])
    assert change.__name__ == "frozen" or not torch.equal(got, before)


def test_moved_rates_are_noticed(engine):
    options = {"rates": "per_tensor", "per_step_rates": True, "learn_rates": True}
    learner, tasks = built("linear-9to15", engine, **options)
    rates = learner.rates
    spread = torch.linspace(0.02, 0.3, rates.numel()).double().view(rates.shape)
    for values in (spread, spread.t().contiguous().t(), spread / 2, rates.data * 1.5):
        rates.data = values
        rates.grad = None
        for k in range(2):
            rates.data.mul_(1 + 0.5 * k)
            learner.backward(tasks, accumulate=False)
            found = [learner.last.loss, *gradients(learner)]
            loss, want, _ = by_autograd(learner, tasks)
            plain, by_plain = learner._gradients._plainly(tasks)
            assert_same(found, [loss, *want])
            assert_same(found[1:], by_plain)
            assert_close(plain, found[0], "float64 pass", "rates")  # torch's mean there


def test_other_settings_are_noticed(engine):
    learner, tasks = built("linear-9to15", engine)
    learner.backward(tasks)
    learner.settings = dataclasses.replace(learner.settings, first_order=True)
    learner.backward(tasks, accumulate=False)
    other, _ = built("linear-9to15", engine, first_order=True)
    other.model.load_state_dict(learner.model.state_dict())
    assert_same(gradients(learner), by_autograd(other, tasks)[1])


def test_tasks_of_changing_shapes_strides_and_dtypes(engine):
    problem = BY_NAME["omniglot-conv"]
    learner = learner_for(problem, engine, problem.build())
    small, large = problem.tasks(tasks=2), problem.tasks(tasks=4, seed=9)
    last = TaskBatch(
        *(
            x.flatten(0, 1)
            .to(memory_format=torch.channels_last)
            .unflatten(0, x.shape[:2])
            if x.dim() == 5
            else x
            for x in (getattr(small, f) for f in FIELDS)
        )
    )
    strided = TaskBatch(
        *(torch.stack([getattr(large, f)] * 2, -1)[..., 0] for f in FIELDS)
    )
    for tasks in (small, large, small, last, strided, small):
        loss, want, _ = by_autograd(learner, tasks)
        for _ in range(2):
            got = learner.backward(tasks, accumulate=False)
            assert_same([got, *gradients(learner)], [loss, *want])
    with pytest.raises(ValueError, match="support_x is torch.float32, the model"):
        learner.backward(small.to(dtype=torch.float32))


def test_bad_tasks_are_refused_in_the_learners_words_and_change_nothing(engine):
    learner, tasks = built("omniglot-fc", engine)
    learner.backward(tasks)
    kept = gradients(learner)
    if engine in engines.TEST_ENGINES:
        pytest.skip("labels on a device are not looked at; the loss is NaN")
    bad = tasks.query_y.clone()
    bad[1, 2] = 99
    wrong = TaskBatch(tasks.support_x, tasks.support_y, tasks.query_x, bad)
    for _ in range(2):
        with pytest.raises(ValueError, match="query_y: classes run from 0 to 99"):
            learner.backward(wrong)
    assert_same(gradients(learner), kept)


def test_hooks_on_parameters_run(engine):
    learner, tasks = built("linear-9to15", engine)
    _, want, _ = by_autograd(learner, tasks)
    first, second, *_ = learner.parameters()
    seen = []
    handles = [
        first.register_hook(lambda g: 2 * g),
        second.register_post_accumulate_grad_hook(lambda p: seen.append(p)),
    ]
    learner.backward(tasks, accumulate=False)
    assert_same(gradients(learner), [2 * want[0], *want[1:]])
    assert len(seen) == 1 and seen[0] is second
    for handle in handles:
        handle.remove()
    learner.backward(tasks, accumulate=False)
    assert_same(gradients(learner), want)


def test_graphs_of_several_losses_keep_their_own_gradients(engine):
    learner, tasks = built("linear-9to15", engine)
    other = BY_NAME["linear-9to15"].tasks(tasks=3, seed=4)
    _, one, _ = by_autograd(learner, tasks)
    _, two, _ = by_autograd(learner, other)
    first, second = learner.meta_loss(tasks), learner.meta_loss(other)
    learner.backward(tasks)
    forget(learner)
    first.backward()
    assert_same(gradients(learner), one)
    forget(learner)
    second.backward()
    assert_same(gradients(learner), two)


def test_details_are_those_of_their_own_call(engine):
    learner, tasks = built("omniglot-fc", engine)
    learner.backward(tasks)
    first = learner.last
    value = learner.evaluate(tasks).per_task_loss[:, -1]
    learner.backward(BY_NAME["omniglot-fc"].tasks(tasks=3, seed=8))
    assert_close(first.query_loss[:, -1], value, "float64 pass", "details")


@pytest.mark.skipif("native" not in engines.NAMES, reason="the engine is not built")
def test_more_threads_than_before_are_planned_for():
    learner, tasks = built("omniglot-fc", "native")
    before = fastmaml.get_num_threads()
    try:
        fastmaml.set_num_threads(1)
        learner.backward(tasks)
        want, small = gradients(learner), learner._engine.plan.total
        fastmaml.set_num_threads(3)
        learner.backward(tasks, accumulate=False)
        assert_same(gradients(learner), want)
        assert learner._engine.plan.total > small
    finally:
        fastmaml.set_num_threads(before)


def test_training_by_backward_is_training_by_autograd(engine):
    models = []
    for direct in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        learner = MAML(model, engine=engine)
        optimizer = torch.optim.Adam(learner.parameters(), 1e-2)
        sampler = fastmaml.Sinusoid(seed=1)
        for _ in range(5):
            if direct:
                learner.backward(sampler.sample(4), accumulate=False)
            else:
                optimizer.zero_grad()
                learner.meta_loss(sampler.sample(4)).backward()
            optimizer.step()
        models.append(model)
    assert_same(*(list(m.parameters()) for m in models))
