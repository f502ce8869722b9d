"""Learners follow their model: modes, batch norm, dropout, changes, engines."""

from __future__ import annotations

import engines
import oracles
import pytest
import torch
from close import assert_close
from engines import detached, learner_for
from problems import BY_NAME
from torch import nn

from fastmaml import MAML, TaskBatch
from fastmaml.losses import mse


@pytest.fixture(params=engines.NAMES)
def engine(request):
    return request.param


def gradients_of(model):
    return {n: p.grad for n, p in model.named_parameters()}


# -- batch norm and dropout ------------------------------------------------------------


def _running(width=4):
    return nn.Sequential(
        nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 2)
    ).double()


def _tasks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    return TaskBatch(x, x[..., :2], x + 1, x[..., :2])


def test_running_statistics_in_training_mode_are_refused():
    with pytest.raises(
        ValueError, match=r"1 \(BatchNorm1d\).*batch_norm='batch'.*eval"
    ):
        MAML(_running())


def test_batch_statistics_leave_the_model_untouched(engine):
    model = _running()
    plain = nn.Sequential(*model)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    learner = MAML(model, batch_norm="batch", inner_lr=0.1, engine=engine)
    learner.meta_loss(_tasks()).backward()
    rates = engines.Rates(torch.tensor(0.1, dtype=torch.float64))
    want = oracles.meta_gradient(
        plain,
        mse,
        detached(plain),
        rates,
        _tasks(),
        1,
    )
    assert_close(gradients_of(model), want.gradients, "float64 chain", "batch norm")
    assert all(torch.equal(b, buffers[n]) for n, b in model.named_buffers())
    assert model[1].track_running_stats and model[1].running_mean is not None


def test_batch_statistics_follow_frozen_parameters():
    model = _running()
    model[0].requires_grad_(False)
    learner = MAML(model, batch_norm="batch", inner_lr=0.1)
    before = learner.meta_loss(_tasks())
    with torch.no_grad():
        model[0].weight.mul_(torch.randn_like(model[0].weight))
    after = learner.meta_loss(_tasks())
    fresh = MAML(model, batch_norm="batch", inner_lr=0.1).meta_loss(_tasks())
    assert torch.equal(after, fresh) and not torch.equal(after, before)


def test_evaluating_model_uses_running_statistics():
    model = _running().eval()
    model[1].running_mean.fill_(0.5)
    learner = MAML(model, inner_lr=0.1)
    assert "running statistics" in str(learner.report)
    outputs = learner.predict(
        learner.adapt(_tasks().support_x, _tasks().support_y, steps=0), _tasks().query_x
    )
    assert torch.allclose(outputs[0], model(_tasks().query_x[0]).detach())


def test_dropout_is_refused_by_path_and_modes_are_followed():
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match=r"1 \(Dropout, p=0.3\).*p=0 or call"):
        MAML(model)
    learner = MAML(model.eval(), inner_lr=0.1)
    learner.meta_loss(_tasks())
    model.train()
    with pytest.raises(ValueError, match="Dropout"):
        learner.meta_loss(_tasks())


# -- following the model ---------------------------------------------------------------


def test_changes_of_the_model_are_followed(engine):
    problem = BY_NAME["linear-9to15"]
    model = problem.build()
    learner = learner_for(problem, engine, model, learn_rates=True)
    rate = learner.rates
    model.to(torch.float32)
    learner.meta_loss(problem.tasks().to(dtype=torch.float32)).backward()
    assert model[0].weight.grad.dtype == torch.float32
    assert learner.rates is rate and rate.dtype == torch.float32
    model[0].weight = nn.Parameter(torch.zeros_like(model[0].weight))
    loss = learner.meta_loss(problem.tasks().to(dtype=torch.float32))
    loss.backward()
    assert model[0].weight.grad is not None


def test_freezing_moves_to_the_functional_engine():
    problem = BY_NAME["linear-9to15"]
    learner = learner_for(problem, "auto")
    learner.model[0].bias.requires_grad_(False)
    learner.meta_loss(problem.tasks()).backward()
    assert learner.report.engine == "functional"
    assert "0.bias is frozen" in str(learner.report)
    assert learner.model[0].bias.grad is None
    assert learner.model[0].weight.grad is not None


def test_report_says_which_engine_where_and_why(engine):
    learner = learner_for(BY_NAME["linear-9to15"], engine)
    text = str(learner.report)
    name = engines.reported(engine)
    assert text.startswith(f"{name} engine on cpu, float64: ")


def test_auto_without_the_extension_says_so(monkeypatch):
    from fastmaml.engines import native

    monkeypatch.setattr(native, "unavailable", lambda: "it was never built")
    learner = learner_for(BY_NAME["linear-9to15"], "auto")
    assert learner.report.engine == "functional"
    assert "it was never built" in str(learner.report)
    with pytest.raises(ValueError, match="it was never built"):
        learner_for(BY_NAME["linear-9to15"], "native")


def test_asking_for_native_makes_the_report_an_error():
    with pytest.raises(ValueError, match="GRUCell.*no native layer"):
        MAML(nn.Sequential(nn.GRUCell(2, 2)), engine="native")


def test_sample_shapes_a_program_cannot_take_run_functionally():
    model = nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Linear(28, 2)).double()
    x = torch.randn(2, 5, 7, 3, dtype=torch.float64)
    tasks = TaskBatch(x, x[:, :, 0, :2], x, x[:, :, 1, :2])
    learner = MAML(model, inner_lr=0.1)
    learner.meta_loss(tasks).backward()
    assert learner.report.engine == "functional"
    assert model[0].weight.grad.abs().sum() > 0
