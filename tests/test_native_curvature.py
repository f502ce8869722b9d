"""Products with many vectors at one point have the bits of the engine's products."""

from __future__ import annotations

import gc

import pytest
import torch
from chunked_problems import CHUNKED
from native_cases import (
    DTYPES,
    Case,
    Guards,
    assert_same_bits,
    case,
    cast,
    native,
    threads,
)
from problems import Problem
from torch import nn

from fastmaml import _native
from fastmaml.engines import native_curvature
from fastmaml.engines.native import NativeEngine
from fastmaml.models import gaussian_policy_mlp

PRODUCTS = ("hvp", "gauss_newton_product")
NORM_FIRST = Problem(
    "norm-first",
    lambda: nn.Sequential(
        nn.LayerNorm(6), nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 2)
    ),
    (6,),
    2,
)
"""Its second layer's input moves, so that pass hands down an adjoint all the same."""
CASES = [
    NORM_FIRST,
    "omniglot-conv",
    "omniglot-fc",
    "layer-norm-space",
    "batch-norm-pool-2x2-of-17",
    *CHUNKED,
    Problem(
        "categorical",
        lambda: gaussian_policy_mlp(4, 1, (330,), activation="tanh")[:-1],
        (4,),
        1,
        samples=150,
    ),
]
every_case = pytest.mark.parametrize("problem", CASES, ids=str)
every_product = pytest.mark.parametrize("product", PRODUCTS)


def vectors(c: Case, dtype: torch.dtype, count: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    return [
        {
            n: torch.randn(p.shape, generator=generator, dtype=dtype)
            for n, p in c.own.items()
        }
        for _ in range(count)
    ]


def where(c: Case, dtype: torch.dtype = torch.float64) -> tuple:
    tasks = c.tasks.to(dtype=dtype)
    return cast(c.own, dtype), tasks.support_x, tasks.support_y


@pytest.mark.parametrize("backend", ["cpu", "cpu_lockstep"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@every_case
def test_kept_and_recomputed_passes_give_the_same_bits(problem, dtype, backend):
    c = case(problem)
    engine, plain = (
        NativeEngine(native(c)._program, c.model, backend=backend) for _ in range(2)
    )
    at = where(c, dtype)
    curvature = engine.curvature(*at)
    # both products at one point take turns: neither may read what the other left
    order = [PRODUCTS[i] for i in (0, 0, 0, 1, 1, 1, 0, 0, 1)]
    kept = []
    for i, product in enumerate(order):
        v = vectors(c, dtype)[i % 4]
        got = getattr(curvature, product)(v)
        assert_same_bits(got, getattr(plain, product)(*at, v))
        kept.append(curvature.kept_bytes > 0)
    assert kept == [False] + [True] * 8


@every_product
def test_announced_products_share_from_the_first_on(product, monkeypatch):
    c = case("policy")
    engine, at = native(c), where(c)
    calls = []
    plain = engine._curvature

    def spied(*arguments):
        calls.append(arguments[-1] if len(arguments) == 6 else (0, False))
        return plain(*arguments)

    monkeypatch.setattr(engine, "_curvature", spied)
    curvature = engine.curvature(*at, many=True)
    for v in vectors(c, torch.float64, 3):
        got = getattr(curvature, product)(v)
        assert_same_bits(got, getattr(native(c), product)(*at, v))
        assert curvature.kept_bytes > 0
    assert [filled for _, filled in calls] == [False, True, True]
    assert len({address for address, _ in calls}) == 1 and calls[0][0]


@every_product
def test_what_is_kept_is_read_and_nothing_else(product, monkeypatch):
    c = case("policy")
    engine, at = native(c), where(c)
    guards = Guards()
    curvature = engine.curvature(*at)
    v, other = vectors(c, torch.float64, 2)
    getattr(curvature, product)(other)
    with monkeypatch.context() as m:
        m.setattr(engine, "_workspace", torch.empty(0, dtype=torch.uint8))
        m.setattr(torch, "empty", guards.empty)
        first = getattr(curvature, product)(v)
    guards.check()
    assert curvature.kept_bytes in guards.sizes()
    assert_same_bits(getattr(curvature, product)(v), first)
    curvature._tape.fill_(255)  # NaN
    assert any(t.isnan().any() for t in getattr(curvature, product)(v).values())


@every_product
@every_case
def test_a_kept_product_has_the_same_bits_on_any_threads(problem, product):
    c = case(problem)
    found = []
    for count in (1, 2, 5):
        with threads(count):
            curvature = native(c).curvature(*where(c))
            many = [getattr(curvature, product)(v) for v in vectors(c, torch.float64)]
        found.append(many)
    for many in found[1:]:
        for got, want in zip(many, found[0], strict=True):
            assert_same_bits(got, want)


def test_memory_serves_one_point_after_the_other():
    c = case("policy")
    engine, at = native(c), where(c)
    (v,) = vectors(c, torch.float64, 1)

    def two(x_scale: float) -> tuple[int, dict]:
        params, x, y = at
        curvature = engine.curvature(params, x * x_scale, y)
        curvature.hvp(v)
        want = engine.hvp(params, x * x_scale, y, v)
        assert_same_bits(curvature.hvp(v), want)
        assert_same_bits(curvature.hvp(v), want)
        return curvature._tape.data_ptr(), want

    first, before = two(1.0)
    gc.collect()
    second, after = two(2.0)
    assert first == second
    assert not torch.equal(before[next(iter(before))], after[next(iter(after))])
    # two points at once have a tape each
    here, there = engine.curvature(*at), engine.curvature(*at)
    for curvature in (here, here, there, there):
        curvature.hvp(v)
    assert here._tape.data_ptr() != there._tape.data_ptr()


@pytest.mark.parametrize(
    ("memory", "limit", "keeps"),
    [
        ("auto", 1 << 30, True),
        ("auto", 100, False),
        ("recompute", 1 << 30, False),
        ("keep", 100, True),
    ],
)
def test_what_is_kept_obeys_the_engines_setting(memory, limit, keeps):
    c = case("policy")
    engine, at = native(c, memory=memory), where(c)

    class Core:
        KEEP_BYTES = limit

        def __getattr__(self, name: str):
            return getattr(_native.core(), name)

    assert _native.core().KEEP_BYTES == 512 << 20
    engine._core = Core()
    curvature = engine.curvature(*at)
    (v,) = vectors(c, torch.float64, 1)
    for _ in range(3):
        assert_same_bits(curvature.hvp(v), engine.hvp(*at, v))
    assert (curvature.kept_bytes > 0) == keeps


def test_tapes_that_are_too_small_are_forgotten():
    tapes = [torch.empty(n, dtype=torch.uint8) for n in (30, 10, 20)]
    assert native_curvature._smallest(tapes, 15).numel() == 20
    assert [t.numel() for t in tapes] == [30, 10]
    assert native_curvature._smallest(tapes, 31) is None and not tapes


def test_samples_beyond_the_first_chunk_take_no_more_workspace():
    """What a product's passes leave for each other is a chunk's alone."""
    problem = next(p for p in CHUNKED if p.name == "policy")
    sizes = []
    for samples in (150, 600):
        c = case(problem)
        params, x, y = where(c)
        x, y = x.repeat(1, samples // 150, 1), y.repeat(1, samples // 150, 1)
        for product in PRODUCTS:
            engine = native(c)
            getattr(engine, product)(params, x, y, vectors(c, torch.float64, 1)[0])
            sizes.append(engine.plan.slot)
        engine = native(c)
        engine.forward(params, x)
        sizes.append(engine.plan.slot)
    assert sizes[:3] == sizes[3:]
