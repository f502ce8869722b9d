"""Tasks of large networks come in waves, so that no sum waits for rows in memory.

The backend `cpu_lockstep`, which takes all tasks at once, says what the bits must be.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from close import assert_close
from engines import rates_of
from native_cases import assert_same_bits, case, everything, native, threads
from problems import Problem
from torch import nn

LARGE = Problem(
    "large",
    lambda: nn.Sequential(nn.Linear(501, 303), nn.Tanh(), nn.Linear(303, 5)),
    (501,),
    5,
    loss="cross_entropy",
)
# more than a few waves, with one, two or three tasks in the last
TASKS = (22, 23, 24)


def large(tasks: int, factored: bool):
    """40 samples are enough rows of factors; rates of parameters rule factors out."""
    c = case(LARGE, tasks=tasks, samples=40 if factored else 0)
    if factored:
        return c
    rates = rates_of(LARGE, c.model, "per_parameter", per_step=False, steps=1)
    return dataclasses.replace(c, rates=rates)


def gradients(engine, c, dtype):
    """Everything but the mean of the losses, which lockstep leaves to torch."""
    results = everything(engine, c, dtype, steps=1)
    del results["mean.loss"]
    return results


@pytest.mark.parametrize(
    ("tasks", "dtype"),
    [*((tasks, torch.float32) for tasks in TASKS), (TASKS[1], torch.float64)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("factored", [False, True], ids=["direct", "factored"])
def test_waves_of_any_number_of_threads_change_no_bit(tasks, dtype, factored):
    c = large(tasks, factored)
    together = native(c, backend="cpu_lockstep", memory="keep")
    want = gradients(together, c, dtype)
    engine = native(c, backend="cpu", memory="keep")
    for count in (1, 2, 3, 5):
        with threads(count):
            assert_same_bits(gradients(engine, c, dtype), want)


def test_waves_of_factored_layers_add_up():
    """Without a gradient of the rates, which would rule factors out."""
    c = large(22, factored=True)
    found = {}
    for backend in ("cpu", "cpu_lockstep"):
        engine = native(c, backend=backend, memory="keep")
        result = engine.meta_gradient(c.params, c.rates, c.tasks, steps=1)
        found[backend] = {n: g.clone() for n, g in result.gradients.items()}
        assert engine.plan.factored
    assert_close(found["cpu"], found["cpu_lockstep"], "float64 chain", "factored waves")


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("factored", [False, True], ids=["direct", "factored"])
def test_more_tasks_take_no_more_memory(count, factored):
    """A row of lambda for every task would be 0.6 MB each."""
    shared = {}
    with threads(count):
        for tasks in (24, 48):
            c = large(tasks, factored)
            engine = native(c, backend="cpu")
            params = {n: p.float() for n, p in c.params.items()}
            of = c.tasks.to(dtype=torch.float32)
            engine.meta_gradient(params, c.rates, of, steps=1)
            assert not engine.plan.resident
            assert engine.plan.factored == factored
            shared[tasks] = engine.plan.shared
    assert shared[48] == shared[24]
