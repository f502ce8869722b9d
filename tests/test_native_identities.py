"""Identities of products that need no reference, and differences of the gradient."""

from __future__ import annotations

import pytest
import torch
from backends import on_every_backend, quick_alone
from close import assert_close
from native_cases import Case, case, native
from problems import PROBLEMS, direction

pytestmark = on_every_backend

# one of every kind of layer and loss
NAMES = [
    "sinusoid",
    "omniglot-conv",
    "omniglot-fc",
    "mini-imagenet-conv",
    "policy",
    "conv-5to32-k5x3-s1x2-p2x0",
    "batch-norm-space-no-scale",
    "batch-norm-flat-no-shift",
    "layer-norm-space",
    "avg-pool-3-s2-p1-overlap",
    "max-pool-3-s2-p1-overlap",
    "global-pool-9",
    "append-parameter-inside",
    *(p.name for p in PROBLEMS if p.name.startswith("activation-")),
]
CONVEX = [n for n in NAMES if n != "policy"]  # in the outputs, as Gauss-Newton asks

every_name = pytest.mark.parametrize("name", NAMES)


def dot(u: dict, v: dict) -> torch.Tensor:
    """<u, v> of every task, [T]."""
    return sum((u[n] * v[n]).flatten(1).sum(1) for n in u)


def products(c: Case, name: str, *vectors: dict) -> list[dict]:
    quick_alone(c.problem.name)
    call = getattr(native(c), name)
    return [call(c.own, c.tasks.support_x, c.tasks.support_y, v) for v in vectors]


def two_directions(c: Case) -> tuple[dict, dict]:
    return c.vector, direction(c.model, len(c.tasks), seed=1)


@pytest.mark.parametrize("product", ["hvp", "gauss_newton_product"])
@every_name
def test_products_are_symmetric(name, product):
    c = case(name)
    u, v = two_directions(c)
    hu, hv = products(c, product, u, v)
    scale = (dot(u, u) * dot(hv, hv)).sqrt()
    assert (scale > 0).all()
    assert ((dot(u, hv) - dot(v, hu)).abs() <= 1e-12 * scale).all()


@pytest.mark.parametrize("product", ["hvp", "gauss_newton_product"])
@every_name
def test_products_are_linear(name, product):
    c = case(name)
    u, v = two_directions(c)
    both = {n: 2 * u[n] - 3 * v[n] for n in u}
    hu, hv, got = products(c, product, u, v, both)
    want = {n: 2 * hu[n] - 3 * hv[n] for n in u}
    assert_close(got, want, "float64 product", name)


@pytest.mark.parametrize("product", ["hvp", "gauss_newton_product"])
@every_name
def test_products_with_nothing_are_nothing(name, product):
    c = case(name)
    zeros = {n: torch.zeros_like(v) for n, v in c.vector.items()}
    (got,) = products(c, product, zeros)
    assert all((g == 0).all() for g in got.values())


@pytest.mark.parametrize("name", CONVEX)
def test_gauss_newton_is_positive_semidefinite(name):
    c = case(name)
    for u in two_directions(c):
        (gu,) = products(c, "gauss_newton_product", u)
        assert (dot(u, gu) > 0).all()


@pytest.mark.parametrize("name", ["linear-alone", "linear-9to15", "layer-norm-space"])
def test_hessian_is_gauss_newton_within_the_last_linear_layer(name):
    c = case(name)
    last = list(c.vector)[-2:]
    v = {n: u if n in last else torch.zeros_like(u) for n, u in c.vector.items()}
    h, g = (products(c, product, v)[0] for product in ("hvp", "gauss_newton_product"))
    assert_close({n: h[n] for n in last}, {n: g[n] for n in last}, "exact", name)


@pytest.mark.parametrize(
    "name", ["linear-five-deep", "layer-norm", "batch-norm-space", "activation-silu"]
)
def test_hvp_is_the_slope_of_the_gradient(name):
    """Central differences, extrapolated: their error is of order h^4."""
    c = case(name)
    engine, samples = native(c), (c.tasks.support_x, c.tasks.support_y)

    def slope(h: float) -> dict:
        ahead, behind = (
            engine.value_and_grad(
                {n: p + s * h * c.vector[n] for n, p in c.own.items()}, *samples
            )[1]
            for s in (1, -1)
        )
        return {n: (ahead[n] - behind[n]) / (2 * h) for n in ahead}

    coarse, fine = slope(2e-4), slope(1e-4)
    want = {n: (4 * fine[n] - coarse[n]) / 3 for n in fine}
    (got,) = products(c, "hvp", c.vector)
    assert_close(got, want, "differences", name)


@pytest.mark.parametrize("name", ["linear-five-deep", "cross-entropy-17-n7-mean"])
def test_gradient_is_the_slope_of_the_loss(name):
    c = case(name)
    engine, samples = native(c), (c.tasks.support_x, c.tasks.support_y)

    def slope(h: float) -> torch.Tensor:
        ahead, behind = (
            engine.value_and_grad(
                {n: p + s * h * c.vector[n] for n, p in c.own.items()}, *samples
            )[0]
            for s in (1, -1)
        )
        return (ahead - behind) / (2 * h)

    want = (4 * slope(1e-4) - slope(2e-4)) / 3
    _, gradient = engine.value_and_grad(c.own, *samples)
    assert_close(dot(gradient, c.vector), want, "differences", name)
