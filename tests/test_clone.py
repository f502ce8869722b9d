"""The one-task idiom: clone, adapt, backward."""

from __future__ import annotations

import oracles
import pytest
import torch
import torch.nn.functional as F
from close import assert_close
from engines import detached, loss_of, rates_of, scalar_rates
from problems import BY_NAME
from torch import nn

from fastmaml import MAML


def learner_for(problem, model, **options):
    return MAML(
        model,
        loss=problem.loss,
        reduction=problem.reduction,
        inner_lr=problem.inner_lr,
        inner_steps=3,
        adapted=problem.adapted(model),
        engine="functional",
        **options,
    )


def loop(learner, tasks, loss, steps):
    """The loop as users of one-task libraries type it."""
    for t in range(len(tasks)):
        task = learner.clone()
        for _ in range(steps):
            task.adapt(loss(task(tasks.support_x[t]), tasks.support_y[t]))
        query = loss(task(tasks.query_x[t]), tasks.query_y[t])
        (query / len(tasks)).backward()


def gradients_of(model):
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("first_order", [False, True], ids=["maml", "fomaml"])
@pytest.mark.parametrize("name", ["linear-9to15", "omniglot-fc", "policy"])
def test_the_loop_gives_the_meta_gradient(name, first_order):
    problem = BY_NAME[name]
    model, tasks = problem.build(), problem.tasks(tasks=3)
    loss = loss_of(problem).function
    learner = learner_for(problem, model, first_order=first_order)
    loop(learner, tasks, loss, steps=3)
    want = oracles.meta_gradient(
        model,
        loss,
        detached(model),
        scalar_rates(problem, model),
        tasks,
        3,
        first_order=first_order,
    )
    assert_close(gradients_of(model), want.gradients, "float64 chain", name)


def test_the_loop_agrees_with_meta_loss():
    problem = BY_NAME["linear-9to15"]
    model, tasks = problem.build(), problem.tasks(tasks=3)
    learner = learner_for(problem, model)
    loop(learner, tasks, F.mse_loss, steps=3)
    one_by_one = gradients_of(model)
    model.zero_grad()
    learner.meta_loss(tasks).backward()
    assert_close(one_by_one, gradients_of(model), "float64 chain", problem.name)


@pytest.mark.parametrize("layout", ["scalar", "per_tensor", "per_parameter"])
def test_gradients_reach_learned_rates(layout):
    problem = BY_NAME["linear-9to15"]
    model, tasks = problem.build(), problem.tasks()
    learner = learner_for(
        problem, model, rates=layout, per_step_rates=True, learn_rates=True
    )
    rates = rates_of(problem, model, layout, True, steps=3)
    with torch.no_grad():
        learner.rates.copy_(rates.values)
    loop(learner, tasks, F.mse_loss, steps=3)
    want = oracles.meta_gradient(model, F.mse_loss, detached(model), rates, tasks, 3)
    assert_close(learner.rates.grad, want.rate_gradient, "float64 chain", layout)


def test_adapting_changes_the_task_alone():
    problem = BY_NAME["linear-9to15"]
    model, tasks = problem.build(), problem.tasks()
    before = {n: p.clone() for n, p in model.named_parameters()}
    task = learner_for(problem, model).clone()
    start = task(tasks.query_x[0])
    assert torch.equal(start, model(tasks.query_x[0]))
    task.adapt(F.mse_loss(task(tasks.support_x[0]), tasks.support_y[0]))
    assert not torch.equal(task(tasks.query_x[0]), start)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert [p.shape for p in task.parameters()] == [p.shape for p in model.parameters()]


def test_a_function_of_the_task_is_a_loss_too():
    problem = BY_NAME["linear-9to15"]
    model, tasks = problem.build(), problem.tasks()
    x, y = tasks.support_x[0], tasks.support_y[0]
    one, two = (learner_for(problem, model).clone() for _ in range(2))
    one.adapt(F.mse_loss(one(x), y))
    two.adapt(lambda task: F.mse_loss(task(x), y))
    assert_close(two.named_parameters(), one.named_parameters(), "exact", problem.name)


def test_only_adapted_names_move():
    problem = BY_NAME["batch-norm-not-adapted"]
    model, tasks = problem.build(), problem.tasks()
    task = learner_for(problem, model).clone()
    task.adapt(F.mse_loss(task(tasks.support_x[0]), tasks.support_y[0]))
    own = dict(model.named_parameters())
    moved = {n for n, p in task.named_parameters().items() if p is not own[n]}
    assert moved == problem.adapted(model)


def test_running_buffers_are_left_alone():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    task = MAML(model, batch_norm="batch").clone()
    x = torch.randn(5, 3)
    task.adapt(task(x).square().mean())
    assert torch.all(model[1].running_mean == 0)
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda task, model: torch.ones(()), "doesn't depend"),
        (lambda task, model: model(torch.ones(2, 9)).sum().detach(), "doesn't depend"),
        (lambda task, model: task(torch.ones(2, 9)), r"a scalar, got shape \[2, 2\]"),
    ],
)
def test_losses_that_cannot_adapt(loss, message):
    problem = BY_NAME["linear-9to15"]
    model = problem.build(torch.float32)
    task = learner_for(problem, model).clone()
    with pytest.raises(ValueError, match=message):
        task.adapt(loss(task, model))
