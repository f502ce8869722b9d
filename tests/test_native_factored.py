"""Large dense layers with few samples: updates stay factored, results don't change."""

from __future__ import annotations

import dataclasses

import oracles
import pytest
import torch
from close import assert_close
from engines import rates_of
from native_cases import DTYPES, assert_same_bits, case, cast, native, row, threads
from problems import Problem
from torch import nn

from fastmaml import models


def _fc(ways: int, norm: bool = True, bias: bool = True) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in ((144, 96), (96, 64), (64, 65)):
        layers.append(nn.Linear(inputs, outputs, bias=bias))
        if norm:
            layers.append(nn.BatchNorm1d(outputs, track_running_stats=False))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(65, ways))


def _problem(name: str, ways: int, **options) -> Problem:
    return Problem(
        name,
        lambda: _fc(ways, **options),
        (1, 12, 12),
        ways,
        loss="cross_entropy",
        not_adapted=models.batch_norm_parameters,
        inner_lr=0.02,
    )


FC = _problem("fc", 5)
PROBLEMS = [
    FC,
    _problem("fc-plain", 5, norm=False),
    _problem("fc-no-bias", 5, bias=False),
    _problem("fc-20-way", 20),
]
both_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)


def check(c, rates, steps, dtype=torch.float64, factored=3, **options):
    engine = native(c)
    got = engine.meta_gradient(
        cast(c.params, dtype), rates, c.tasks.to(dtype=dtype), steps=steps, **options
    )
    want = oracles.meta_gradient(
        c.model, c.loss, c.params, rates, c.tasks, steps, **options
    )
    assert engine.plan.factored == factored
    name = c.problem.name
    assert_close(got.loss, want.loss, row(dtype, "chain"), name)
    assert_close(got.gradients, want.gradients, row(dtype, "chain"), name)


@both_dtypes
@pytest.mark.parametrize("steps", [0, 1, 3, 5])
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_gradients(problem, steps, dtype):
    c = case(problem, tasks=3)
    check(c, c.rates, steps, dtype)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("layout", ["scalar", "per_tensor"])
@pytest.mark.parametrize(
    "weights", [[0.0, 0.0, 0.0, 1.0], [0.1, 0.0, 0.7, 0.4], [0.3, 0.2, 0.1, 0.0]]
)
@pytest.mark.parametrize("problem", PROBLEMS[:2], ids=str)
def test_driver_options(problem, weights, layout, first_order):
    c = case(problem, tasks=3)
    rates = rates_of(problem, c.model, layout, True, steps=2)
    check(c, rates, 3, first_order=first_order, loss_weights=weights)


@pytest.mark.parametrize("still", [["weight"], ["bias"], ["weight", "bias"]], ids=str)
@pytest.mark.parametrize("layout", ["scalar", "per_tensor"])
@pytest.mark.parametrize("layer", ["1.", "3."])
def test_parameters_that_stand_still(layer, layout, still):
    problem = PROBLEMS[1]
    c = case(problem, tasks=2)
    rates = rates_of(problem, c.model, layout, False, steps=1)
    adapted = frozenset(c.params) - {layer + s for s in still}
    check(c, dataclasses.replace(rates, adapted=adapted), 3)


@both_dtypes
@pytest.mark.parametrize("memory", ["keep", "recompute"])
def test_threads_lockstep_and_memory_change_no_bit(memory, dtype):
    c = case(FC, tasks=5)
    call = cast(c.params, dtype), c.rates, c.tasks.to(dtype=dtype)
    lockstep = native(c, backend="cpu_lockstep")
    want = lockstep.meta_gradient(*call, steps=3)
    assert lockstep.plan.factored == 3
    for count in (1, 2, 4):
        with threads(count):
            got = native(c, memory=memory).meta_gradient(*call, steps=3)
        assert_same_bits(got.gradients, want.gradients)


def test_what_is_not_factored():
    c = case(FC, tasks=2)
    rates = rates_of(FC, c.model, "per_parameter", False, steps=1)
    check(c, rates, 1, factored=0)
    check(case(FC, tasks=2, samples=60), c.rates, 5, factored=0)


def test_a_step_more_takes_no_copy_of_factored_weights():
    c = case(FC, tasks=2)
    engine, slots = native(c, memory="recompute"), []
    for steps in (1, 2):
        engine.meta_gradient(c.params, c.rates, c.tasks, steps=steps)
        slots.append(engine.plan.slot)
    copy = 8 * sum(p.numel() for p in c.params.values())
    assert slots[1] - slots[0] < copy / 4
