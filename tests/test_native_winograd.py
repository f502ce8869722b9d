"""Winograd's filtering rounds in float32 about as little as the direct sums do."""

from __future__ import annotations

import pytest
import torch
from close import assert_close
from native_cases import case as case_of
from native_cases import native, threads
from problem import Problem
from torch import nn

# Relative error of dw in float32's eps; see the figures in csrc/cpu/winograd.inl.h.
MOST_EPS = 16


def _network(channels: int, size: int):
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.Flatten(),
            nn.Linear(channels * size * size, 1),
        )

    return build


@pytest.mark.parametrize("size", [42, 21, 10])
def test_float32_errors_stay_within_a_few_roundings(size):
    """The layers of MiniImagenet's network: the gradient against float64."""
    problem = Problem(f"winograd-{size}", _network(32, size), (32, size, size), 1)
    c = case_of(problem, tasks=1, samples=5)
    engine = native(c)
    results = {}
    for dtype in (torch.float32, torch.float64):
        params = {n: p.to(dtype) for n, p in c.params.items()}
        x, y = c.tasks.support_x.to(dtype), c.tasks.support_y.to(dtype)
        results[dtype] = engine.value_and_grad(params, x, y)[1]["0.weight"].double()
    got, want = results[torch.float32], results[torch.float64]
    error = (got - want).norm() / want.norm()
    assert 0 < error < MOST_EPS * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("count", [1, 2])
def test_a_gradient_summed_in_parts_lacks_none(count):
    """Each part is of 256 tiles or more, here the last one of a layer of odd sizes."""
    problem = Problem("winograd-parts", _strip, (16, 33, 31), 1)
    c = case_of(problem, tasks=1, samples=4)
    with threads(count):
        x, y = c.tasks.support_x, c.tasks.support_y
        got = native(c).value_and_grad(c.params, x, y)[1]["0.weight"][0]
    loss = nn.functional.mse_loss(c.model(x[0]), y[0])
    (want,) = torch.autograd.grad(loss, [c.model[0].weight])
    assert_close(got, want, "float64 pass", problem.name)


def _strip() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 33 * 31, 1)
    )
