"""Every instruction set that was built and runs here gives the oracle's answers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from close import assert_close
from engines import native_unavailable
from native_cases import (
    DTYPES,
    assert_same_bits,
    case,
    cast,
    chain_wanted,
    everything,
    instruction_set,
    native,
    passes_wanted,
    row,
    threads,
)

from fastmaml import _native

ISAS = [] if native_unavailable() else _native.core().build_info()["isas"]

# sizes around, below and off the width of every vector
NAMES = [
    "linear-alone-no-bias",
    "linear-1to3",
    "linear-7to8",
    "linear-15to16",
    "linear-17to33",
    "linear-65to1-no-bias",
    "linear-many-samples",
    "conv-17to33-k3x3-s2x1-p1x2",
    "conv-first-3to5-k3x3-s1x1-p1x1",
    "conv-3to64-k2x2-s1x1-p0x0",
    "batch-norm-flat-17",
    "batch-norm-space-16",
    "layer-norm",
    "max-pool-3x2-s1x2",
    "batch-norm-pool-2x2-of-33",
    "batch-norm-pool-3x3-of-5",
    "conv-norm-pool-3x3-of-3to16",
    "conv-norm-pool-3x3-of-1to5",
    "conv-norm-pool-3x3-of-3to32",
    "avg-pool-2-s2-remainder",
    "global-pool-9",
    "cross-entropy-17-n7-mean",
    "policy-gradient-9",
    "omniglot-conv",
    "activation-relu",
    "activation-tanh",
    "activation-sigmoid",
    "activation-gelu",
    "activation-gelu-tanh",
    "activation-silu",
    "activation-leaky-relu-0.3",
    "activation-elu",
    "activation-softplus",
]
every_isa = pytest.mark.parametrize("isa", ISAS)
both_dtypes = pytest.mark.parametrize(
    "dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch.")
)


@both_dtypes
@pytest.mark.parametrize("name", NAMES)
@every_isa
def test_instruction_set_is_right(isa, name, dtype):
    c, want = case(name), passes_wanted(name)
    tasks, own = c.tasks.to(dtype=dtype), cast(c.own, dtype)
    support = tasks.support_x, tasks.support_y
    with instruction_set(isa):
        engine = native(c)
        value, gradient = engine.value_and_grad(own, *support)
        hvp = engine.hvp(own, *support, cast(c.vector, dtype))
        meta = engine.meta_gradient(cast(c.params, dtype), c.rates, tasks, steps=2)
    assert_close(value, want["value"], row(dtype, "pass"), name)
    assert_close(gradient, want["gradient"], row(dtype, "pass"), name)
    assert_close(hvp, want["hvp"], row(dtype, "product"), name)
    assert_close(meta.gradients, chain_wanted(name), row(dtype, "chain"), name)


@pytest.mark.parametrize("name", ["omniglot-conv", "policy", "layer-norm-space"])
@every_isa
def test_threads_change_no_bit_on_any_instruction_set(isa, name):
    c = case(name)
    engine = native(c)
    with instruction_set(isa):
        with threads(1):
            want = everything(engine, c, torch.float32)
        for count in (2, 3):
            with threads(count):
                assert_same_bits(everything(engine, c, torch.float32), want)


@every_isa
def test_instruction_set_is_the_one_asked_for(isa):
    before = _native.core().build_info()["isa"]
    with instruction_set(isa):
        assert _native.core().build_info()["isa"] == isa
    assert _native.core().build_info()["isa"] == before


def test_the_plainest_instruction_set_is_always_there():
    assert ISAS[0] == "baseline"
    assert _native.core().build_info()["isa"] in ISAS


# -- denormals -------------------------------------------------------------------------

TINY = {torch.float32: 1e-40, torch.float64: 1e-310}


def flushes(dtype: torch.dtype) -> bool:
    """Whether this thread takes denormal results for zero."""
    return (torch.full((1,), TINY[dtype], dtype=dtype) * 0.5).item() == 0


@pytest.mark.parametrize("count", [1, 2, 3])
@both_dtypes
@pytest.mark.parametrize("name", ["omniglot-conv", "policy", "linear-9to15"])
def test_denormals_do_no_harm_and_the_callers_mode_stays(name, dtype, count):
    c = case(name)
    tiny = dataclasses.replace(
        c.tasks,
        support_x=c.tasks.support_x * TINY[dtype],
        query_x=c.tasks.query_x * TINY[dtype],
    )
    denormal = dataclasses.replace(c, tasks=tiny.to(dtype=dtype))
    assert (denormal.tasks.support_x != 0).any()
    engine = native(c)
    assert not flushes(dtype)
    with threads(count):
        results = everything(engine, denormal, dtype)
    assert not flushes(dtype)
    for key, result in results.items():
        if "query" not in key:  # NaN where a step has no weight
            assert result.isfinite().all(), key
    zero = dataclasses.replace(
        tiny, support_x=tiny.support_x * 0, query_x=tiny.query_x * 0
    )
    want = engine.forward(c.params, zero.support_x)
    got = engine.forward(c.params, tiny.support_x)
    assert_close(got, want, "float64 pass", name)


@both_dtypes
def test_a_caller_that_flushes_denormals_goes_on_flushing(dtype):
    c = case("linear-9to15")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush denormals")
    try:
        assert flushes(dtype)
        everything(native(c), c, dtype)
        assert flushes(dtype)
    finally:
        torch.set_flush_denormal(False)
    assert not flushes(dtype)
