"""Learners on every engine: meta-loss, adaptation, evaluation, state, refusals."""

from __future__ import annotations

import copy
import json
import pickle

import engines
import oracles
import pytest
import torch
from close import assert_close
from engines import detached, learner_for, loss_of, rates_of, scalar_rates
from problems import BY_NAME
from torch import nn

from fastmaml import FOMAML, MAML, Sinusoid, TaskBatch
from fastmaml.learners import Evaluation

CASES = ["linear-9to15", "omniglot-fc", "policy", "conv-3to5-k3x3-s1x1-p1x1"]


@pytest.fixture(params=engines.NAMES)
def engine(request):
    return request.param


def gradients_of(model):
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("first_order", [False, True], ids=["maml", "fomaml"])
@pytest.mark.parametrize("name", CASES)
def test_backward_gives_the_meta_gradient(name, first_order, engine):
    problem = BY_NAME[name]
    model, tasks = problem.build(), problem.tasks(tasks=3)
    learner = learner_for(problem, engine, model, kind=FOMAML if first_order else MAML)
    loss = learner.meta_loss(tasks)
    loss.backward()
    want = oracles.meta_gradient(
        model,
        loss_of(problem).function,
        detached(model),
        scalar_rates(problem, model),
        tasks,
        2,
        first_order=first_order,
    )
    assert learner.report.engine == engines.reported(engine)
    assert_close(loss, want.loss, "float64 pass", name)
    assert_close(gradients_of(model), want.gradients, "float64 chain", name)


@pytest.mark.parametrize("per_step", [False, True], ids=["shared", "per-step"])
@pytest.mark.parametrize("layout", ["scalar", "per_tensor", "per_parameter"])
def test_learned_rates(layout, per_step, engine):
    problem = BY_NAME["linear-9to15"]
    model, tasks = problem.build(), problem.tasks()
    learner = learner_for(
        problem,
        engine,
        model,
        rates=layout,
        per_step_rates=per_step,
        learn_rates=True,
        loss_weights=[0.0, 0.5, 1.0],
    )
    rates = rates_of(problem, model, layout, per_step, steps=2)
    with torch.no_grad():
        learner.rates.copy_(rates.values)
    (2 * learner.meta_loss(tasks)).backward()
    want = oracles.meta_gradient(
        model,
        loss_of(problem).function,
        detached(model),
        rates,
        tasks,
        2,
        loss_weights=[0.0, 0.5, 1.0],
    )
    assert_close(learner.rates.grad, 2 * want.rate_gradient, "float64 chain", layout)
    doubled = {n: 2 * g for n, g in want.gradients.items()}
    assert_close(gradients_of(model), doubled, "float64 chain", layout)
    assert list(learner.parameters())[-1] is learner.rates
    assert dict(learner.named_parameters())["inner_lr"] is learner.rates


def test_losses_add_up_and_gradients_accumulate(engine):
    problem = BY_NAME["linear-9to15"]
    learner = learner_for(problem, engine)
    first, second = problem.tasks(seed=1), problem.tasks(seed=2)
    (learner.meta_loss(first) + 3 * learner.meta_loss(second)).backward()
    both = gradients_of(learner.model)
    sums = {}
    for tasks, scale in ((first, 1), (second, 3)):
        learner.model.zero_grad()
        learner.meta_loss(tasks).backward()
        for n, g in gradients_of(learner.model).items():
            sums[n] = sums.get(n, 0) + scale * g
    assert_close(both, sums, "float64 chain", problem.name)


def test_gradients_are_tensors_of_their_own(engine):
    problem = BY_NAME["linear-9to15"]
    learner = learner_for(problem, engine)
    loss = learner.meta_loss(problem.tasks())
    loss.backward(retain_graph=True)
    once = {n: g.clone() for n, g in gradients_of(learner.model).items()}
    loss.backward()
    twice = {n: 2 * g for n, g in once.items()}
    assert_close(gradients_of(learner.model), twice, "float64 pass", problem.name)


def test_without_gradients_the_loss_is_the_same(engine):
    problem = BY_NAME["cross-entropy-5-n5-mean"]
    learner, tasks = learner_for(problem, engine), problem.tasks()
    options = {"loss_weights": [0.2, 0.0, 1.0]}
    learner = learner_for(problem, engine, **options)
    with_graph = learner.meta_loss(tasks)
    details = learner.last
    with torch.no_grad():
        without = learner.meta_loss(tasks)
    assert with_graph.requires_grad and not without.requires_grad
    assert_close(without, with_graph, "float64 pass", problem.name)
    assert_close(learner.last.query_loss, details.query_loss, "float64 pass", "last")
    assert learner.last.query_loss.isnan()[0].tolist() == [False, True, False]
    assert torch.equal(
        learner.last.query_accuracy.isnan(), details.query_accuracy.isnan()
    )


def test_training_lowers_the_loss(engine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    learner = MAML(model, inner_lr=0.05, engine=engine)
    tasks = Sinusoid(10, 10, seed=3).sample(50)
    optimizer = torch.optim.Adam(learner.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = learner.meta_loss(tasks)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", CASES)
def test_adapt_predict_and_evaluate_agree(name, engine):
    problem = BY_NAME[name]
    model, tasks = problem.build(), problem.tasks(tasks=3)
    learner, loss = learner_for(problem, engine, model), loss_of(problem)
    adapted = learner.adapt(tasks.support_x, tasks.support_y, steps=3)
    want = oracles.adapt(
        model,
        loss.function,
        detached(model),
        scalar_rates(problem, model),
        tasks.support_x,
        tasks.support_y,
        3,
    )
    assert_close(adapted, want, "float64 chain", name)
    outputs = learner.predict(adapted, tasks.query_x)
    values = torch.stack(
        [loss.function(o, y) for o, y in zip(outputs, tasks.query_y, strict=True)]
    )
    found = learner.evaluate(tasks, steps=3)
    assert_close(found.per_task_loss[:, 3], values, "float64 chain", name)
    assert (found.accuracy is None) == (problem.loss != "cross_entropy")
    assert found.tasks == 3 and found.queries == tasks.query_size
    assert found.transductive
    assert len(learner.evaluate(tasks).loss) == 3


def test_inductive_evaluation(engine):
    problem = BY_NAME["omniglot-fc"]
    model, tasks = problem.build(), problem.tasks(tasks=2, query=3)
    learner = learner_for(problem, engine, model)
    found = learner.evaluate(tasks, inductive=True)
    assert not found.transductive
    loss = loss_of(problem).function
    support = tasks.support_x, tasks.support_y
    thetas = oracles.adapt(
        model, loss, detached(model), scalar_rates(problem, model), *support, 2
    )
    want = [
        oracles.inductive_losses(
            model, loss, {n: p[t] for n, p in thetas.items()}, tasks, t
        ).mean()
        for t in range(2)
    ]
    assert_close(
        found.per_task_loss[:, 2], torch.stack(want), "float64 chain", problem.name
    )


def test_evaluation_means_intervals_and_table():
    problem = BY_NAME["cross-entropy-5-n5-mean"]
    found = learner_for(problem, "functional").evaluate(problem.tasks(tasks=4))
    per_task = found.per_task_accuracy
    assert torch.allclose(found.accuracy, per_task.mean(0))
    deviation = (per_task - per_task.mean(0)).square().mean(0).sqrt()
    assert torch.allclose(found.accuracy_interval, 1.96 * deviation / 2)
    text = str(found)
    assert text.startswith("4 tasks, 6 queries each, transductive")
    assert len(text.splitlines()) == 2 + 3 and "%" in text
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["tasks"] == 4 and len(plain["per_task_loss"]) == 4
    assert Evaluation(**{**vars(found)}).loss is found.loss


def test_parameters_are_the_models_own():
    problem = BY_NAME["linear-9to15"]
    model = problem.build()
    learner = learner_for(problem, "functional", model)
    ours, theirs = list(learner.parameters()), list(model.parameters())
    assert all(a is b for a, b in zip(ours, theirs, strict=True))


def test_callable_losses_and_odd_modules_run_functionally():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return x + torch.sin(self.layer(x))

    def absolute(output, target):
        return (output - target).abs().pow(1.5).mean()

    model = Residual().double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    tasks = TaskBatch(x, x.cos(), -x, x.sin())
    learner = MAML(model, loss=absolute, inner_lr=0.1)
    assert learner.report.engine == "functional"
    assert "callable" in str(learner.report)
    learner.meta_loss(tasks).backward()
    rates = engines.Rates(torch.tensor(0.1, dtype=torch.float64))
    want = oracles.meta_gradient(model, absolute, detached(model), rates, tasks, 1)
    assert_close(gradients_of(model), want.gradients, "float64 chain", "residual")


# -- state -----------------------------------------------------------------------------


def test_state_round_trip(tmp_path, engine):
    problem = BY_NAME["linear-9to15"]
    options = {"learn_rates": True, "rates": "per_tensor", "adapted": ["0.weight"]}
    one = learner_for(problem, engine, **options)
    with torch.no_grad():
        for p in one.parameters():
            p.add_(torch.randn_like(p))
    torch.save(one.state_dict(), tmp_path / "state.pt")
    two = learner_for(problem, engine, **options)
    assert not torch.equal(one.rates, two.rates)
    two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(one.meta_loss(problem.tasks()), two.meta_loss(problem.tasks()))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
def test_a_copy_is_a_learner_of_its_own(copied, engine):
    problem = BY_NAME["linear-9to15"]
    one = learner_for(problem, engine, learn_rates=True, rates="per_tensor")
    tasks = problem.tasks()
    before = one.backward(tasks)
    two = copied(one)
    assert torch.equal(two.backward(tasks, accumulate=False), before)
    assert two.report.engine == one.report.engine
    with torch.no_grad():
        for p in two.parameters():
            p.add_(1)
    assert not torch.equal(two.backward(tasks), before)
    assert torch.equal(one.backward(tasks), before)


def test_state_of_other_settings_is_refused():
    problem = BY_NAME["linear-9to15"]
    one = learner_for(problem, "functional", inner_steps=3)
    two = learner_for(problem, "functional", inner_steps=2)
    with pytest.raises(
        ValueError, match="inner_steps=3, this learner has inner_steps=2"
    ):
        two.load_state_dict(one.state_dict())
    two.load_state_dict(one.state_dict(), strict=False)
    with pytest.raises(ValueError, match="lacks"):
        two.load_state_dict(one.model.state_dict())
    three = learner_for(problem, "functional", rates="per_tensor")
    with pytest.raises(ValueError, match="rates have shape"):
        three.load_state_dict(two.state_dict(), strict=False)
