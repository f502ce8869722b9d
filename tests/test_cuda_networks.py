"""Whole networks on the emulated CUDA backend, where the extension under test holds it.

Such an extension is built with FASTMAML_CUDA=EMULATED and named by FASTMAML_CORE_PATH.
Problems, answers and tolerances are those of the CPU's tests. Here is what those that
run on every backend have not: fused layers, updates stored in place of gradients, and
the same bits from any memory, batch and repetition.
"""

from __future__ import annotations

from dataclasses import replace

import backends
import fused_problems
import oracles
import pytest
import torch
from chunked_problems import CHUNKED
from close import assert_close
from native_cases import (
    DTYPES,
    adapt_wanted,
    assert_same_bits,
    case,
    cast,
    chain_wanted,
    embedded_case,
    everything,
    native,
    passes_wanted,
    row,
)
from problems import PROBLEMS

from fastmaml.engines.placement import missing

BACKEND = "cuda_emulated"
pytestmark = pytest.mark.skipif(
    missing(BACKEND) is not None, reason=str(missing(BACKEND))
)

SLOW = ("omniglot-conv", "omniglot-fc", *backends.SLOW)
FUSED = fused_problems.FUSED
QUICK = [p for p in [*PROBLEMS, *FUSED] if p.name not in SLOW]
both_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)
every_problem = pytest.mark.parametrize("problem", QUICK, ids=str)
SOME = [
    *("linear-9to15", "batch-norm-space-33", "batch-norm-pool-2x2-of-17"),
    *("batch-norm-mean-8", "batch-norm-mean-many", "conv-norm-pool-even-1to40"),
    *("layer-norm-space", "max-pool-3-s2-p1-overlap", "activation-gelu"),
    *("append-parameter", "cross-entropy-5-n5-sum_over_ways", "policy"),
]
LONGER = "conv-norm-pool-even-many"  # sums in parts
some_problems = pytest.mark.parametrize("problem", SOME)


@both_dtypes
@pytest.mark.parametrize("problem", FUSED, ids=str)
def test_passes_and_adaptation(problem, dtype):
    c, want = case(problem), passes_wanted(problem)
    engine, own = native(c, backend=BACKEND), cast(c.own, dtype)
    tasks = c.tasks.to(dtype=dtype)
    support = tasks.support_x, tasks.support_y
    got = engine.forward(own, support[0])
    assert_close(got, want["forward"], row(dtype, "pass"), problem.name)
    value, gradient = engine.value_and_grad(own, *support)
    assert_close(value, want["value"], row(dtype, "pass"), problem.name)
    assert_close(gradient, want["gradient"], row(dtype, "pass"), problem.name)
    for product in ("hvp", "gauss_newton_product"):
        got = getattr(engine, product)(own, *support, cast(c.vector, dtype))
        assert_close(got, want[product], row(dtype, "product"), problem.name)
    got = engine.adapt(cast(c.params, dtype), c.rates, *support, steps=2)
    want = adapt_wanted(c, c.rates, 2, own=False)
    assert_close(got, want, row(dtype, "chain"), problem.name)


@both_dtypes
@every_problem
def test_meta_gradient(problem, dtype):
    c = case(problem)
    engine, shared = native(c, backend=BACKEND), cast(c.params, dtype)
    tasks = c.tasks.to(dtype=dtype)
    got = engine.meta_gradient(shared, c.rates, tasks, steps=2).gradients
    assert_close(got, chain_wanted(problem), row(dtype, "chain"), problem.name)


@both_dtypes
@some_problems
def test_misaligned_tensors_give_the_same_bits(problem, dtype):
    c = case(problem)
    want = everything(native(c, backend=BACKEND), c, dtype)
    odd = embedded_case(c)
    assert_same_bits(everything(native(odd, backend=BACKEND), odd, dtype), want)


@some_problems
def test_the_same_call_gives_the_same_bits(problem):
    c = case(problem, tasks=3)
    engine = native(c, backend=BACKEND)
    want = everything(engine, c, torch.float32)
    assert_same_bits(everything(engine, c, torch.float32), want)
    again = native(c, backend=BACKEND)
    assert_same_bits(everything(again, c, torch.float32), want)


@pytest.mark.parametrize("problem", [*SOME, LONGER])
def test_a_task_gives_the_same_bits_alone(problem):
    c = case(problem, tasks=3)
    engine = native(c, backend=BACKEND)
    want = everything(engine, c, torch.float32)
    for t in range(3):
        own, vector = (
            {n: v[t : t + 1].contiguous() for n, v in values.items()}
            for values in (c.own, c.vector)
        )
        one = replace(c, own=own, vector=vector, tasks=c.tasks[t : t + 1])
        got = everything(native(one, backend=BACKEND), one, torch.float32)
        assert_same_bits(
            {n: g for n, g in got.items() if not n.startswith("mean")},
            {n: w[t : t + 1] for n, w in want.items() if not n.startswith("mean")},
        )


@pytest.mark.parametrize("problem", CHUNKED, ids=str)
def test_chunked_networks(problem):
    c = case(problem)
    engine = native(c, backend=BACKEND)
    x, y = c.tasks.support_x, c.tasks.support_y
    want = passes_wanted(problem)
    got = engine.value_and_grad(c.own, x, y)[1]
    assert_close(got, want["gradient"], "float64 pass", problem.name)
    got = engine.hvp(c.own, x, y, c.vector)
    assert_close(got, want["hvp"], "float64 product", problem.name)


@both_dtypes
def test_the_first_of_equal_pixels_wins(dtype):
    """Of whole numbers, exact on both sides; many windows hold a value twice."""
    c = case("conv-norm-pool-even-stride-2")
    with torch.no_grad():
        own = dict(c.own)
        own["0.weight"] = (3 * own["0.weight"]).round().clamp(-1, 1)
        x = c.tasks.support_x.round().clamp(-1, 1)
    y = c.tasks.support_y
    want = oracles.value_and_grad(c.model, c.loss, own, x, y)[1]
    got = native(c, backend=BACKEND).value_and_grad(
        cast(own, dtype), x.to(dtype), y.to(dtype)
    )[1]
    assert_close(got, want, row(dtype, "pass"), "equal pixels")


@both_dtypes
def test_labels_out_of_range_make_the_loss_nan(dtype):
    c = case("cross-entropy-5-n5-mean")
    labels = c.tasks.support_y.clone()
    labels[1, 2] = 5
    engine, tasks = native(c, backend=BACKEND), c.tasks.to(dtype=dtype)
    try:
        value, _ = engine.value_and_grad(cast(c.own, dtype), tasks.support_x, labels)
    except ValueError as error:  # where memory is the host's, labels are looked at
        assert "got 5 for sample 2 of task 1" in str(error)
    else:
        assert value.isnan().tolist() == [False, True]
