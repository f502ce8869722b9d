"""Layers of the CUDA backend store updates, not gradients that are applied afterwards.

The chain of lambda goes to and fro between two places where tensors share a rate, and
takes an odd number of steps here: it must end where the mean looks for it. Batches here
are large enough that a norm's blocks are those of several launches.
"""

from __future__ import annotations

from dataclasses import replace

import backends
import pytest
import torch
from close import assert_close
from engines import engine_for, rates_of, scalar_rates
from problem import Problem
from torch import nn

from fastmaml import _native
from fastmaml.models import batch_norm_parameters

pytestmark = pytest.mark.parametrize("backend", backends.usable(["cuda_emulated"]))


def norm(channels: int) -> nn.Module:
    layer = nn.BatchNorm2d(channels, track_running_stats=False)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.uniform_(layer.bias, -0.5, 0.5)
    return layer


def layer_norm(features: int) -> nn.Module:
    layer = nn.LayerNorm(features)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    return layer


# 64 samples of 5 x 5 pixels are 1600 rows of batch norm: two launches of several blocks
PROBLEMS = [
    Problem(
        "norm",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 5, 3, padding=1), norm(5), nn.Conv2d(5, 2, 3, padding=1)),
            *(norm(2), nn.ReLU(), nn.Flatten(), nn.Linear(50, 2)),
        ),
        (1, 5, 5),
        2,
    ),
    Problem(
        "pool",
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(16, 2)),
        ),
        (1, 5, 5),
        2,
    ),
    Problem(
        "layer-norm",
        lambda: nn.Sequential(
            *(nn.Linear(3, 9), layer_norm(9), nn.Tanh(), nn.Linear(9, 2)),
        ),
        (3,),
        2,
    ),
]
STILL = replace(PROBLEMS[0], name="still norm", not_adapted=batch_norm_parameters)
PROBLEMS.append(STILL)


def found(problem: Problem, name: str, rates: str, queries: int = 5, **options):
    model = problem.build()
    engine = engine_for(name, problem, model)
    params = {n: p.detach() for n, p in model.named_parameters()}
    tasks = problem.tasks(2, 64, queries)
    if rates == "one":
        own = scalar_rates(problem, model)
    else:
        own = rates_of(problem, model, rates, False, 3)
    return engine.meta_gradient(params, own, tasks, steps=3, **options)


@pytest.mark.parametrize("rates", ["one", "per_tensor"])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_they_are_those_of_the_cpu(problem, rates, backend):
    options = {"loss_weights": [0.1, 0.0, 0.3, 0.6]}
    got = found(problem, backend, rates, **options)
    want = found(problem, "native", rates, **options)
    assert_close(got.loss, want.loss, "float64 chain", problem.name)
    assert_close(got.gradients, want.gradients, "float64 chain", problem.name)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_nothing_is_updated_in_a_launch_of_its_own(problem, backend):
    core = _native.core()
    core.begin_recording(run=True)
    found(problem, backend, "one")
    names = backends.recorded_kernels()
    assert len(names) > 20
    assert not elementwise(names), names
    # a gradient for the rates needs those of the inner steps, which are applied then
    core.begin_recording(run=True)
    found(problem, backend, "one", rate_gradient=True)
    assert elementwise(backends.recorded_kernels())


def elementwise(names: list[str]) -> list[str]:
    """Launches over vectors of parameters (csrc/cuda/vector_ops.cu)."""
    return [n for n in names if "map_kernel" in n or "rates_kernel" in n]


def test_adam_is_one_launch(backend):
    from fastmaml import optim

    parameters = [nn.Parameter(torch.randn(n)) for n in (3, 5000, 1, *([7] * 40))]
    optimizer = optim.Adam(parameters)
    optimizer._backend = backend
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    core = _native.core()
    core.begin_recording(run=True)
    optimizer.step()
    assert backends.recorded_kernels() == ["adam_kernel<S>"]
    assert all(s["step"] == 2 for s in optimizer.state.values())


@pytest.mark.parametrize("problem", [PROBLEMS[0], STILL], ids=str)
@pytest.mark.parametrize("rates", ["one", "per_tensor"])
def test_a_launch_before_the_layers_and_one_behind_them(problem, rates, backend):
    """Parameters in, gradients and loss out; and rates, unless they are one number."""
    core = _native.core()
    core.begin_recording(run=True)
    got = found(problem, backend, rates)
    names = [k.lstrip("(").partition("<")[0] for _, k, *_ in core.end_recording()[1]]
    assert torch.isfinite(got.loss)
    parts = ("move", "rate_table", "mean_rows")
    places = {i: n for i, n in enumerate(names) if n.startswith(parts)}
    first = [] if rates == "one" else ["rate_table_kernel"]
    assert list(places.values()) == [*first, "move_kernel", "mean_rows_kernel"]
    assert list(places) == [*range(len(first) + 1), len(names) - 1]
