"""Arguments at a learner's door: named, with what was got and what is expected."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from fastmaml import FOMAML, MAML, TaskBatch
from fastmaml.engines import MetaGradient
from fastmaml.learners import selection


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batch(y=None, x=None):
    x = torch.randn(2, 5, 3) if x is None else x
    y = torch.randn(2, 5, 2) if y is None else y
    return TaskBatch(x, y, x, y)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss": "hinge"}, ValueError, "loss='hinge'.*cross_entropy"),
        ({"loss": 3}, TypeError, "loss: .*callable"),
        ({"reduction": "sum"}, ValueError, "reduction='sum'"),
        ({"reduction": "sum_over_ways"}, ValueError, "belongs to loss='cross_entropy'"),
        ({"inner_lr": 0.0}, ValueError, "inner_lr=0.0: expected a positive"),
        ({"inner_lr": float("inf")}, ValueError, "inner_lr=inf"),
        ({"inner_lr": "fast"}, TypeError, "inner_lr: expected a number"),
        ({"inner_steps": -1}, ValueError, "inner_steps=-1"),
        ({"inner_steps": 1.5}, TypeError, "inner_steps: expected an integer"),
        (
            {"loss_weights": [1.0]},
            ValueError,
            "loss_weights: got 1 weights, expected 2",
        ),
        ({"loss_weights": [0.0, 0.0]}, ValueError, "not all zero"),
        ({"loss_weights": [0.0, float("nan")]}, ValueError, "finite"),
        ({"rates": "each"}, ValueError, "rates='each': expected one of 'scalar'"),
        ({"per_step_rates": True, "inner_steps": 0}, ValueError, "per_step_rates"),
        ({"batch_norm": "running"}, ValueError, "batch_norm='running'"),
        ({"engine": "cuda"}, ValueError, "engine='cuda'"),
        ({"memory": "less"}, ValueError, "memory='less'"),
        ({"chunk_size": 0, "engine": "functional"}, ValueError, "chunk_size=0"),
        ({"adapted": ["0.wieght"]}, ValueError, "no parameter '0.wieght'.*'0.weight'"),
        ({"adapted": "0.weight"}, TypeError, "adapted: expected a collection"),
        ({"adapted": []}, ValueError, "adapted: names no parameter"),
        ({"adapted": lambda name: False}, ValueError, "names no parameter"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        MAML(mlp(), **options)


def test_bad_models():
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module"):
        MAML(lambda x: x)
    with pytest.raises(ValueError, match="no trainable parameters"):
        MAML(nn.Tanh())
    model = mlp()
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="'0.weight' frozen"):
        MAML(model, adapted=["0.weight"])
    with pytest.raises(ValueError, match="that is MAML"):
        FOMAML(mlp(), first_order=False)


def test_adapted_by_predicate_is_a_list_of_names():
    learner = MAML(mlp(), adapted=lambda name: name.startswith("2."))
    assert learner.settings.adapted == ("2.bias", "2.weight")
    assert MAML(mlp(), adapted=lambda name: True).settings.adapted is None


def classes(low=0, high=2):
    y = torch.zeros(2, 5, dtype=torch.int64)
    y[0, 0], y[1, 1] = low, high - 1
    return y


@pytest.mark.parametrize(
    ("loss", "tasks", "message"),
    [
        (
            "mse",
            batch().to(dtype=torch.float64),
            "support_x is torch.float64, the model",
        ),
        ("mse", batch(classes()), "mse expects floating targets"),
        ("mse", batch(torch.randn(2, 5, 1)), r"mse expects the shape.*\[5, 2\]"),
        ("cross_entropy", batch(), "cross_entropy expects int64 classes"),
        ("cross_entropy", batch(classes(high=3)), "from 0 to 2.*expected 0 to 1"),
        ("cross_entropy", batch(classes(low=-1)), "from -1 to 1"),
        ("policy_gradient", batch(torch.randn(2, 5, 3)), r"\[N, A\+1\] = \[5, 2\]"),
    ],
)
def test_tasks_that_do_not_fit(loss, tasks, message):
    learner = MAML(mlp(), loss=loss)
    with pytest.raises(ValueError, match=message):
        learner.meta_loss(tasks)
    with pytest.raises(ValueError, match=message):
        learner.evaluate(tasks)
    with pytest.raises(ValueError, match=message):
        learner.adapt(tasks.support_x, tasks.support_y)


def test_classes_are_checked_at_every_call():
    learner = MAML(mlp(), loss="cross_entropy")
    learner.meta_loss(batch(classes()))
    with pytest.raises(ValueError, match="support_y: classes run"):
        learner.meta_loss(batch(classes(high=9)))
    x, good, bad = torch.randn(2, 5, 3), classes(), classes(high=9)
    with pytest.raises(ValueError, match="query_y: classes run"):
        learner.meta_loss(TaskBatch(x, good, x, bad))


def test_predictions_are_checked():
    learner, x = MAML(mlp()), torch.randn(2, 5, 3)
    adapted = learner.adapt(x, x[..., :2])
    with pytest.raises(ValueError, match="got 3 tasks, adapted has 2"):
        learner.predict(adapted, torch.randn(3, 5, 3))
    with pytest.raises(ValueError, match="lacks.*0.bias"):
        learner.predict({"0.weight": adapted["0.weight"]}, x)
    with pytest.raises(ValueError, match=r"_x is torch.float64"):
        learner.predict(adapted, x.double())
    with pytest.raises(ValueError, match="steps=-2"):
        learner.adapt(x, x[..., :2], steps=-2)


def test_models_that_return_something_else():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ValueError, match="returned tuple, expected one tensor"):
        MAML(Pair(3, 2)).meta_loss(batch())


class Instant:
    """An engine that takes no time."""

    name = "instant"

    def __init__(self, answer):
        self.answer = answer

    def meta_gradient(self, *args, **options):
        return self.answer


def test_little_time_passes_outside_the_engine():
    """The best of many calls; a bound far above the aim, so that load can't fail it."""
    model, tasks = nn.Sequential(*mlp(), nn.Linear(2, 2)), batch()
    learner = MAML(model)
    learner.meta_loss(tasks)
    gradients = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    learner._engine = Instant(MetaGradient(torch.zeros(()), gradients))
    best = float("inf")
    for _ in range(300):
        start = time.perf_counter()
        learner.meta_loss(tasks)
        best = min(best, time.perf_counter() - start)
    assert best < 200e-6


@pytest.mark.parametrize("engine", ["auto", "native"])
def test_kernels_that_no_gpu_has_run_are_taken_on_request_alone(monkeypatch, engine):
    class OnGpu:
        device = torch.device("cuda")

    class Model:
        @staticmethod
        def parameters():
            return iter([OnGpu])

    class Native:
        native = True

    monkeypatch.setattr(selection, "missing", lambda backend: None)
    found = selection._obstacle(Model, selection.EngineChoice(engine), Native)
    assert found == (selection.UNPROVEN if engine == "auto" else None)


@pytest.mark.parametrize("call", ["meta_loss", "backward", "evaluate"])
@pytest.mark.parametrize("tasks", [None, tuple(torch.randn(4, 2, 5, 3))])
@pytest.mark.parametrize("engine", ["auto", "functional"])
def test_tasks_come_as_a_batch(call, tasks, engine):
    learner = MAML(mlp(), engine=engine)
    with pytest.raises(TypeError, match="tasks: expected a TaskBatch, got"):
        getattr(learner, call)(tasks)


@pytest.mark.parametrize("call", ["meta_loss", "backward", "evaluate"])
def test_samples_that_the_model_cannot_take_are_named(call):
    tasks = batch(x=torch.randn(2, 5, 4))
    words = r"support_x: the model can't take the samples \[5, 4\].*5x4 and 3x4"
    with pytest.raises(ValueError, match=words):
        getattr(MAML(mlp()), call)(tasks)


def test_a_missing_axis_of_targets_is_told():
    model, x = nn.Sequential(nn.Linear(3, 1)), torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match=r"unsqueeze\(-1\)"):
        MAML(model).adapt(x, torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"unsqueeze\(-1\) for one output"):
        TaskBatch(x, torch.randn(2, 5), x, torch.randn(2, 5))


@pytest.mark.parametrize("loss", [nn.functional.mse_loss, nn.MSELoss()])
def test_a_callable_that_is_built_in_is_told(loss):
    report = str(MAML(mlp(), loss=loss).report)
    assert "loss='mse' is the same" in report
    assert "is the same" not in str(MAML(mlp(), loss=lambda a, b: (a - b).sum()).report)
