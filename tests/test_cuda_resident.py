"""Small networks, whose tasks a block of the CUDA backend does in one piece: emulated.

The kernels are compiled as C++ with a driver of their own. Whole calls, from an engine
down, are those of test_native_resident.py, which runs on every backend.
"""

from __future__ import annotations

import shutil

import emulated_resident as emulated
import oracles
import pytest
import torch
from close import assert_close
from engines import rates_of
from native_cases import DTYPES, assert_same_bits, case, row
from problem import Problem
from resident_problems import (
    CLASSES,
    NOT,
    ONE_OUTPUT_FIRST,
    POLICY,
    RESIDENT,
    SINUSOID,
    chain,
    classes,
    regression,
)

from fastmaml.engines import Rates
from fastmaml.tasks import TaskBatch

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

both_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)
SEED = 20261124
ALL = [
    *RESIDENT,
    ONE_OUTPUT_FIRST,
    POLICY,
    regression("wide-tail", 5, 70, 3, samples=6),
    classes("many-classes", 6, 10, 37, samples=35),
]
every = pytest.mark.parametrize("problem", ALL, ids=str)
few = pytest.mark.parametrize("problem", [SINUSOID, CLASSES, POLICY], ids=str)


@pytest.fixture(scope="module")
def driver(compiled):
    return emulated.build(compiled)


def check(driver, c, dtype=torch.float64, rates=None, steps=2, **options):
    """Against the unrolled loop."""
    rates = rates or c.rates
    network = emulated.Network(driver, c)
    got = network.meta_gradient(dtype, rates=rates, steps=steps, **options)
    options.pop("seed", None)
    want = oracles.meta_gradient(
        c.model, c.loss, c.params, rates, c.tasks, steps=steps, **options
    )
    kind, name = row(dtype, "chain"), c.problem.name
    gradients = {n: g.double() for n, g in got.gradients.items()}
    assert_close(gradients, want.gradients, kind, name)
    weights = options.get("loss_weights") or [0.0] * steps + [1.0]
    total = got.loss.nan_to_num() @ torch.tensor(weights, dtype=torch.float64)
    assert_close(total.mean(), want.loss.double(), kind, name)
    for k, weight in enumerate(weights):
        assert got.loss[:, k].isnan().all() == (weight == 0)
        silent = weight == 0 or c.problem.loss != "cross_entropy"
        assert got.accuracy[:, k].isnan().all() == silent
    return got


@both_dtypes
@pytest.mark.parametrize("steps", [0, 1, 3])
@every
def test_agrees_with_the_unrolled_loop(driver, problem, steps, dtype):
    if (problem.name, steps, dtype) == ("whole-vectors", 3, torch.float64):
        network = emulated.Network(driver, case(problem, 3))
        assert not network.takes(dtype, steps=3)  # 32 KB a step
        return
    check(driver, case(problem, 3), dtype, steps=steps)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("per_step", [False, True], ids=["shared", "per-step"])
@pytest.mark.parametrize("layout", ["scalar", "per_tensor"])
@few
def test_rates_with_step_weights(driver, problem, layout, per_step, first_order):
    c = case(problem, 3)
    rates = rates_of(problem, c.model, layout, per_step=per_step, steps=3)
    weights = [0.5, 0.0, 0.3, 0.2]
    options = {"steps": 3, "loss_weights": weights, "first_order": first_order}
    check(driver, c, rates=rates, **options)


@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [0.2, 0.8, 0.0]], ids=str)
@few
def test_last_step_without_weight(driver, problem, weights):
    check(driver, case(problem, 3), loss_weights=weights)


@pytest.mark.parametrize(
    "adapted",
    [{"4.weight", "4.bias"}, {"0.weight", "0.bias"}, {"2.weight"}, set()],
    ids=lambda names: "+".join(sorted(names)) or "none",
)
def test_subsets_of_tensors_adapt(driver, adapted):
    c = case(SINUSOID, 3)
    rates = Rates(c.rates.values, adapted=frozenset(adapted))
    check(driver, c, rates=rates, steps=3)


def test_accuracy_is_the_share_of_hits(driver):
    c = case(CLASSES, 3)
    got = check(driver, c, steps=0)
    scores = c.model(c.tasks.query_x)
    want = (scores.argmax(-1) == c.tasks.query_y).double().mean(-1)
    torch.testing.assert_close(got.accuracy[:, 0], want)


@both_dtypes
@every
def test_any_order_of_threads_gives_the_same_bits(driver, problem, dtype):
    network = emulated.Network(driver, case(problem, 2))
    steps = 1 if problem.name == "whole-vectors" else 2
    want = network.meta_gradient(dtype, steps=steps).all
    got = network.meta_gradient(dtype, steps=steps, seed=SEED).all
    assert_same_bits(got, want)


@few
def test_tasks_keep_their_bits_in_any_company(driver, problem):
    c = case(problem, 5)
    network = emulated.Network(driver, c)
    order = torch.tensor([3, 0, 4, 1, 2])
    plain = network.meta_gradient(torch.float32)
    mixed = network.meta_gradient(torch.float32, tasks=c.tasks[order])
    assert_same_bits({"loss": mixed.loss}, {"loss": plain.loss[order]})
    parts = [
        network.meta_gradient(torch.float32, tasks=c.tasks[t : t + 1]).gradients
        for t in range(5)
    ]
    mean = {n: (sum(p[n].double() for p in parts) / 5).float() for n in plain.gradients}
    assert_same_bits(plain.gradients, mean)


def test_a_label_out_of_range_is_a_loss_that_is_no_number(driver):
    c = case(CLASSES, 2)
    labels = c.tasks.query_y.clone()
    labels[1, 2] = 3
    t = c.tasks
    bad = TaskBatch(t.support_x, t.support_y, t.query_x, labels)
    got = emulated.Network(driver, c).meta_gradient(torch.float64, tasks=bad)
    assert got.loss[:, -1].isnan().tolist() == [False, True]


@pytest.mark.parametrize("problem", NOT[:3], ids=str)
def test_other_networks_are_not_taken(driver, problem):
    assert not emulated.Network(driver, case(problem)).takes()


def test_what_shared_memory_does_not_hold_is_not_taken(driver):
    network = emulated.Network(driver, case(SINUSOID))
    taken = [network.takes(torch.float64, steps=k) for k in range(33)]
    assert taken[1] and not taken[32]
    most = taken.index(False) - 1
    assert taken == [k <= most for k in range(33)]
    assert network.takes(torch.float32, steps=most + 1)
    network.meta_gradient(torch.float64, steps=most)


def test_as_many_steps_as_there_are(driver):
    small = Problem("small", chain(1, 5, 1), (1,), 1, samples=3)
    network = emulated.Network(driver, case(small))
    assert network.takes(steps=32) and not network.takes(steps=33)
    check(driver, case(small), steps=32)
