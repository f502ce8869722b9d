"""Layers that don't fit each other are refused by name, with both sizes."""

from __future__ import annotations

import oracles
import pytest
import torch
from close import assert_close
from native_cases import case, says
from problems import Problem
from torch import nn

from fastmaml import MAML
from fastmaml.compile import compile_module, infer_shapes
from fastmaml.engines import Rates
from fastmaml.engines.native import NativeEngine
from fastmaml.models import AppendParameter


def bn(features: int, space: bool = False) -> nn.Module:
    kind = nn.BatchNorm2d if space else nn.BatchNorm1d
    return kind(features, track_running_stats=False)


# layers, input, what the message says
MISFITS = {
    "linear": ([nn.Linear(3, 7), nn.Tanh(), nn.Linear(8, 2)], (3,), "2", "8", "7"),
    "input": ([nn.Linear(3, 2)], (4,), "0", "3", "4"),
    "channels": ([nn.Conv2d(2, 5, 2), nn.Conv2d(4, 2, 1)], (2, 4, 4), "1", "4", "5"),
    "vector to convolution": (
        [nn.Linear(3, 7), nn.Conv2d(7, 2, 1)],
        (3,),
        "1",
        "image [channels, height, width]",
        "vector [7]",
    ),
    "vector to pooling": (
        [nn.Linear(3, 7), nn.MaxPool2d(1)],
        (3,),
        "1",
        "image [channels, height, width]",
        "vector [7]",
    ),
    "kernel": ([nn.Conv2d(2, 5, (5, 3))], (2, 4, 4), "0", "5x3", "[2, 4, 4]"),
    "window": ([nn.Conv2d(2, 5, 2), nn.AvgPool2d(4)], (2, 4, 4), "1", "4x4", "[5, 3,"),
    "batch norm": ([nn.Linear(3, 7), bn(8)], (3,), "1", "8", "7"),
    "batch norm 2d": ([nn.Conv2d(2, 5, 2), bn(4, True)], (2, 4, 4), "1", "4", "5"),
    "layer norm": ([nn.Linear(3, 7), nn.LayerNorm(6)], (3,), "1", "7", "6"),
    "layer norm 2d": (
        [nn.Conv2d(2, 5, 2), nn.LayerNorm((5, 2, 2))],
        (2, 4, 4),
        "1",
        "[5, 3, 3]",
        "[5, 2, 2]",
    ),
    "no flatten": (
        [nn.Conv2d(2, 5, 2), nn.Linear(45, 2)],
        (2, 4, 4),
        "1",
        "vector of features",
        "[5, 3, 3]; put a Flatten before it",
    ),
    "no flatten behind the mean": (
        [nn.Conv2d(2, 5, 2), nn.AdaptiveAvgPool2d(1), nn.Linear(5, 2)],
        (2, 4, 4),
        "2",
        "vector of features",
        "put a Flatten before it",
    ),
    "appended to an image": (
        [nn.Conv2d(2, 5, 2), AppendParameter(2)],
        (2, 4, 4),
        "1",
        "vector",
        "[5, 3, 3]",
    ),
}


def forward(layers: list[nn.Module], shape: tuple[int, ...], loss: str = "mse"):
    model = nn.Sequential(*layers)
    program = compile_module(model, loss).program
    assert program is not None
    params = {n: p.detach() for n, p in model.named_parameters()}
    return NativeEngine(program, model).forward(params, torch.zeros(2, 3, *shape))


@pytest.mark.parametrize("what", MISFITS)
def test_layers_that_do_not_fit_are_named_with_both_sizes(what):
    layers, shape, where, *sizes = MISFITS[what]
    with pytest.raises(ValueError, match=says("layer", f"'{where}'", ":")) as error:
        forward(layers, shape)
    message = str(error.value).split(":", 1)[1]
    assert all(size in message for size in sizes), message


def test_outputs_that_do_not_fit_the_loss():
    with pytest.raises(ValueError, match=says("output must be a vector, got [5, 3, 3")):
        forward([nn.Conv2d(2, 5, 2)], (2, 4, 4))
    with pytest.raises(ValueError, match=says("policy_gradient", "even size, got 5")):
        forward([nn.Linear(3, 5)], (3,), "policy_gradient")


@pytest.mark.parametrize("dims", [0, 2, 4])
def test_samples_of_other_dimensions(dims):
    with pytest.raises(ValueError, match=says("input shape: expected", f"got {dims}")):
        forward([nn.Linear(3, 2)], (3,) * dims)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(2, 3, 2), nn.Flatten()],
        [nn.Conv2d(2, 3, 2), nn.Flatten(), nn.Tanh()],
        [nn.Conv2d(2, 3, 2), nn.Flatten(), AppendParameter(2)],
    ],
    ids=["last", "then tanh", "then a parameter"],
)
def test_a_flattened_image_as_output_runs_on_the_functional_engine(layers):
    """The native engine keeps images channels last, and would mix up the outputs."""
    outputs = 29 if isinstance(layers[-1], AppendParameter) else 27
    problem = Problem("flattened", lambda: nn.Sequential(*layers), (2, 4, 4), outputs)
    c = case(problem)
    program = compile_module(c.model, "mse").program
    with pytest.raises(ValueError, match="flattened image"):
        infer_shapes(program, (2, 4, 4))
    learner = MAML(c.model, loss="mse", inner_lr=0.05)
    learner.meta_loss(c.tasks).backward()
    assert learner.report.engine == "functional"
    assert "flattened image" in str(learner.report)
    rates = Rates(torch.tensor(0.05, dtype=torch.float64))
    own = oracles.parameters(c.model)
    want = oracles.meta_gradient(c.model, c.loss, own, rates, c.tasks, 1)
    got = {n: p.grad for n, p in c.model.named_parameters()}
    assert_close(got, want.gradients, "float64 chain", "flattened")
