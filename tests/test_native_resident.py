"""Small networks, whose tasks are done in one piece, against both other ways."""

from __future__ import annotations

import backends
import oracles
import pytest
import torch
from close import assert_close
from engines import rates_of
from native_cases import (
    DTYPES,
    Case,
    Forgetful,
    assert_same_bits,
    case,
    cast,
    instruction_set,
    native,
    row,
    threads,
)
from problem import Problem
from resident_problems import (
    CLASSES,
    LOW_RANK,
    NOT,
    ONE_OUTPUT_FIRST,
    RESIDENT,
    SINUSOID,
)

from fastmaml import _native
from fastmaml.engines import Rates
from fastmaml.tasks import TaskBatch

both_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)

every = pytest.mark.parametrize("problem", RESIDENT, ids=str)
few = pytest.mark.parametrize("problem", [SINUSOID, CLASSES], ids=str)


@pytest.fixture(
    scope="module",
    autouse=True,
    params=backends.usable(["cpu", "cuda_emulated", "cuda"]),
)
def backend(request):
    yield from backends.turn_of(request.param)


def needs_room(problem: Problem, steps: int, dtype: torch.dtype) -> None:
    """Skips what is too large for a block's shared memory."""
    large = problem.name == "whole-vectors" and dtype == torch.float64 and steps > 1
    if large and backends.current() != "cpu":
        pytest.skip("more than a block's shared memory")


def run(
    c: Case, dtype=torch.float64, *, tasks=None, rates=None, memory="auto", **options
):
    """The meta-gradient, and whether tasks were done in one piece."""
    engine = native(c, memory=memory)
    options = {"steps": 2, **options}
    batch = (c.tasks if tasks is None else tasks).to(dtype=dtype)
    got = engine.meta_gradient(
        cast(c.params, dtype), rates or c.rates, batch, **options
    )
    assert engine.plan is not None
    return got, engine.plan.resident


def check(c: Case, dtype=torch.float64, rates: Rates | None = None, **options) -> None:
    """Against the unrolled loop, and against layer after layer."""
    rates = rates or c.rates
    got, resident = run(c, dtype, rates=rates, **options)
    assert resident
    options = {"steps": 2, **options}
    want = oracles.meta_gradient(c.model, c.loss, c.params, rates, c.tasks, **options)
    layers, resident = run(c, dtype, rates=rates, memory="keep", **options)
    assert not resident
    kind, name = row(dtype, "chain"), c.problem.name
    for other in (want, layers):
        assert_close(got.loss, other.loss.double(), kind, name)
        gradients = {n: g.double() for n, g in other.gradients.items()}
        assert_close(got.gradients, gradients, kind, name)
    torch.testing.assert_close(
        got.query_loss, layers.query_loss, equal_nan=True, rtol=1e-5, atol=1e-6
    )
    if layers.query_accuracy is not None:
        assert torch.equal(got.query_accuracy.isnan(), layers.query_accuracy.isnan())
        assert torch.equal(
            got.query_accuracy.nan_to_num(), layers.query_accuracy.nan_to_num()
        )


@both_dtypes
@pytest.mark.parametrize("steps", [0, 1, 3])
@every
def test_agrees_with_the_unrolled_loop_and_with_layers(problem, steps, dtype):
    needs_room(problem, steps, dtype)
    check(case(problem, 3), dtype, steps=steps)


@pytest.mark.parametrize("isa", _native.core().build_info()["isas"])
@both_dtypes
@every
def test_on_every_instruction_set(problem, dtype, isa):
    backends.cpu_alone()
    with instruction_set(isa):
        check(case(problem, 3), dtype)


@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("per_step", [False, True], ids=["shared", "per-step"])
@pytest.mark.parametrize("layout", ["scalar", "per_tensor"])
@few
def test_rates_with_step_weights(problem, layout, per_step, first_order):
    c = case(problem, 3)
    rates = rates_of(problem, c.model, layout, per_step=per_step, steps=3)
    weights = [0.5, 0.0, 0.3, 0.2]
    check(c, rates=rates, steps=3, loss_weights=weights, first_order=first_order)


@pytest.mark.parametrize("isa", _native.core().build_info()["isas"])
@pytest.mark.parametrize("first_order", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("layout", ["scalar", "per_tensor"])
@pytest.mark.parametrize("problem", LOW_RANK, ids=str)
def test_last_steps_of_low_rank(problem, layout, first_order, isa):
    backends.cpu_alone()
    c = case(problem, 3)
    with instruction_set(isa):
        for dtype in DTYPES:
            for weights in ([0.0, 1.0], [0.4, 0.0, 0.3], [0.0, 0.0, -0.5]):
                steps = len(weights) - 1
                rates = rates_of(problem, c.model, layout, per_step=True, steps=steps)
                options = {"loss_weights": weights, "first_order": first_order}
                check(c, dtype, rates=rates, steps=steps, **options)


@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [0.2, 0.8, 0.0]], ids=str)
@few
def test_last_step_without_weight(problem, weights):
    check(case(problem, 3), loss_weights=weights)


@pytest.mark.parametrize(
    "adapted",
    [{"4.weight", "4.bias"}, {"0.weight", "0.bias"}, {"2.weight"}, set()],
    ids=lambda names: "+".join(sorted(names)) or "none",
)
def test_subsets_of_tensors_adapt(adapted):
    c = case(SINUSOID, 3)
    check(c, rates=Rates(c.rates.values, adapted=frozenset(adapted)), steps=3)


@both_dtypes
@few
def test_same_bits_on_any_threads(problem, dtype):
    backends.cpu_alone()
    c = case(problem, 13)
    results = []
    for count in (1, 2, 3, 4, 2):
        with threads(count):
            got, resident = run(c, dtype)
            assert resident
            results.append({**got.gradients, "loss": got.query_loss})
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("tasks", range(1, 10))
def test_any_number_of_tasks_adds_up(tasks):
    c = case(SINUSOID, 9)
    parts = [run(c, tasks=c.tasks[t : t + 1])[0].gradients for t in range(tasks)]
    whole = run(c, tasks=c.tasks[:tasks])[0].gradients
    mean = {n: sum(p[n] for p in parts) / tasks for n in whole}
    assert_close(whole, mean, row(torch.float64, "chain"), f"{tasks} tasks")


@few
def test_tasks_keep_their_bits_in_any_order(problem):
    c = case(problem, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    plain, mixed = run(c)[0], run(c, tasks=c.tasks[order])[0]
    assert torch.equal(
        plain.query_loss[order].nan_to_num(), mixed.query_loss.nan_to_num()
    )
    assert_close(mixed.gradients, plain.gradients, row(torch.float64, "chain"), "order")


@both_dtypes
@every
def test_reads_nothing_from_the_workspace(problem, dtype, monkeypatch):
    needs_room(problem, 2, dtype)
    c = case(problem, 3)
    results = []
    for byte in (0, 255):  # 255 makes NaN
        engine = native(c, Forgetful)
        empty = torch.empty

        def filled(*shape, _byte=byte, _empty=empty, **kind):
            made = _empty(*shape, **kind)
            made.view(torch.uint8).fill_(_byte) if made.numel() else None
            return made

        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", filled)
            got = engine.meta_gradient(
                cast(c.params, dtype), c.rates, c.tasks.to(dtype=dtype), steps=2
            )
        assert engine.plan.resident
        results.append(got.gradients)
    assert all(g.isfinite().all() for g in results[1].values())
    assert_same_bits(results[1], results[0])


@pytest.mark.parametrize("problem", NOT, ids=str)
def test_other_networks_go_layer_by_layer(problem):
    assert not run(case(problem))[1]


def test_one_output_first_is_not_for_the_cpu():
    assert run(case(ONE_OUTPUT_FIRST))[1] == (backends.current() != "cpu")


@pytest.mark.parametrize(
    "options",
    [{"memory": "keep"}, {"memory": "recompute"}, {"rate_gradient": True}],
    ids=str,
)
def test_other_calls_go_layer_by_layer(options):
    assert not run(case(SINUSOID), **options)[1]


def test_rates_and_parameters_of_their_own_go_layer_by_layer():
    c = case(SINUSOID)
    rates = rates_of(SINUSOID, c.model, "per_parameter", per_step=False, steps=2)
    assert not run(c, rates=rates)[1]
    engine = native(c)
    engine.meta_gradient(c.own, c.rates, c.tasks, steps=2)
    assert not engine.plan.resident


def test_labels_out_of_range_are_refused():
    backends.cpu_alone()
    c = case(CLASSES)
    t = c.tasks
    bad = TaskBatch(t.support_x, t.support_y + 3, t.query_x, t.query_y)
    with pytest.raises(ValueError, match="support_y: expected labels from 0 to 2"):
        run(c, tasks=bad)
