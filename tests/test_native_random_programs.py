"""Random straight-line models of random sizes against the oracle."""

from __future__ import annotations

import math

import oracles
from backends import on_every_backend
from close import assert_close
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from native_cases import Case, Named, case, native, single
from problems import Problem, direction
from torch import nn

from fastmaml.models import AppendParameter

pytestmark = on_every_backend

SIZES = st.integers(1, 33)
SMOOTH = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}
# Only behind a layer with a bias: without one, padding alone gives exact zeros.
KINKED = {
    "relu": nn.ReLU,
    "leaky": lambda: nn.LeakyReLU(0.2),
    "elu": lambda: nn.ELU(1.3),
}
EPSILON = 1e-3  # so that a channel without spread is no division by nearly zero

many = settings(derandomize=True, deadline=None, max_examples=40, database=None)


def activation(draw, biased: bool) -> nn.Module:
    choices = SMOOTH | KINKED if biased else SMOOTH
    return choices[draw(st.sampled_from(sorted(choices)))]()


def norm(draw, features: int, space: tuple[int, int] | None) -> nn.Module:
    shape = (features, *space) if space else (features,)
    kinds = ["batch", "layer"] if math.prod(shape) > 1 else ["batch"]
    if draw(st.sampled_from(kinds)) == "layer":
        layer: nn.Module = nn.LayerNorm(shape, eps=EPSILON)
    else:
        batch = nn.BatchNorm2d if space else nn.BatchNorm1d
        layer = batch(features, eps=EPSILON, track_running_stats=False)
    for name in ("weight", "bias"):
        if draw(st.booleans()):
            layer.register_parameter(name, None)
    return layer


def dense(draw, features: int, depth: int) -> tuple[list, int]:
    """Linear layers with what may follow them; and the features."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        width, bias = draw(SIZES), draw(st.booleans())
        layers.append(nn.Linear(features, width, bias=bias))
        normed = draw(st.booleans())
        if normed:
            layers.append(norm(draw, width, None))
        layers.append(activation(draw, bias and not normed))
        features = width
    return layers, features


def extent(size: int, kernel: int, stride: int, padding: int) -> int:
    return (size + 2 * padding - kernel) // stride + 1


def window(draw, space: tuple[int, int], pool: bool) -> tuple:
    """Kernel, stride and padding that fit, and the extents that remain."""
    rows = []
    for size in space:
        kernel = draw(st.integers(1, min(4, size)))
        stride = draw(st.integers(1, 3))
        # a window of nothing but padding is constant, and its batch norm all rounding
        padding = draw(st.integers(0, kernel // 2 if pool else min(2, kernel - 1)))
        rows.append((kernel, stride, padding, extent(size, kernel, stride, padding)))
    return tuple(zip(*rows, strict=True))


def spatial(draw, shape: tuple[int, int, int], depth: int) -> tuple[list, int]:
    """Convolutions with what may follow them, flattened; and the features."""
    channels, *space = shape
    layers: list[nn.Module] = []
    for _ in range(depth):
        width, bias = draw(SIZES), draw(st.booleans())
        kernel, stride, padding, space = window(draw, space, pool=False)
        layers.append(nn.Conv2d(channels, width, kernel, stride, padding, bias=bias))
        normed = draw(st.booleans())
        if normed:
            layers.append(norm(draw, width, space))
        layers.append(activation(draw, bias and not normed))
        pool = draw(st.sampled_from([None, nn.MaxPool2d, nn.AvgPool2d]))
        if pool:
            kernel, stride, padding, space = window(draw, space, pool=True)
            layers.append(pool(kernel, stride, padding))
        channels = width
    if draw(st.booleans()):
        layers.append(nn.AdaptiveAvgPool2d(1))
        space = (1, 1)
    layers.append(nn.Flatten())
    return layers, channels * space[0] * space[1]


@st.composite
def problems(draw) -> tuple[Problem, int, int]:
    """A random problem with numbers of tasks and samples."""
    if draw(st.booleans()):
        shape: tuple[int, ...] = (draw(SIZES),)
        layers, features = [], shape[0]
    else:
        shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)))
        layers, features = spatial(draw, shape, draw(st.integers(1, 2)))
    hidden, features = dense(draw, features, draw(st.integers(0, 2)))
    loss = draw(st.sampled_from(["mse", "cross_entropy", "policy_gradient"]))
    outputs = draw(SIZES)
    head: list[nn.Module] = [nn.Linear(features, outputs, bias=draw(st.booleans()))]
    if loss == "policy_gradient":  # with spreads that stay away from zero
        head.append(AppendParameter(outputs))
        outputs *= 2
    model = nn.Sequential(*layers, *hidden, *head)
    seed = draw(st.integers(0, 99))
    problem = Problem(
        f"random {model}", lambda: model, shape, outputs, loss, inner_lr=0.01, seed=seed
    )
    return problem, draw(st.integers(1, 4)), draw(st.integers(4, 9))


def make(drawn: tuple[Problem, int, int]) -> Case:
    return case.__wrapped__(*drawn)


def alive(answer: Named) -> bool:
    """Not all saturated away, which would leave rounding to compare."""
    return max(t.abs().max() for t in answer.values()) > 1e-3


@many
@given(problems())
def test_hvp_of_random_programs(drawn):
    c = make(drawn)
    x, y = c.tasks.support_x, c.tasks.support_y
    vector = {n: single(v) for n, v in direction(c.model, len(x), seed=2).items()}
    got = native(c).hvp(c.own, x, y, vector)
    want = oracles.hvp(c.model, c.loss, c.own, x, y, vector)
    assume(alive(want))
    assert_close(got, want, "float64 product", c.problem.name)


@many
@given(problems())
def test_meta_gradient_of_random_programs(drawn):
    c = make(drawn)
    got = native(c).meta_gradient(
        c.params, c.rates, c.tasks, steps=2, rate_gradient=True
    )
    want = oracles.meta_gradient(c.model, c.loss, c.params, c.rates, c.tasks, 2)
    assert want.loss.isfinite()
    assume(alive(want.gradients))
    assert_close(got.gradients, want.gradients, "float64 chain", c.problem.name)
    assert_close(got.rate_gradient, want.rate_gradient, "float64 chain", "rates")
