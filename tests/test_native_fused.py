"""Batch norm with ReLU and max pooling in one layer: ties, signs, NaN, and memory."""

from __future__ import annotations

import pytest
import torch
from backends import on_every_backend
from fused_problems import pooled_norm
from native_cases import DTYPES, Case, case, native
from pooled_checks import SIZE, both_dtypes, changed, check, every_isa
from problems import Problem
from torch import nn

pytestmark = on_every_backend

every_window = pytest.mark.parametrize("window", [2, 3])


def fused(window: int, channels: int = 19, order: str = "") -> Case:
    name = f"fused {window} {channels} {order}"
    builder = pooled_norm(channels, (window,), SIZE, order=order)
    return case(Problem(name, builder, (2, *SIZE), 2, samples=3))


@both_dtypes
@every_window
@every_isa
def test_scales_of_any_sign_pick_the_right_winner(isa, window, dtype):
    """A negative scale makes the smallest win; a zero one makes all alike."""
    c = fused(window)
    scale = c.own["1.weight"].clone()
    scale[:, 0::3] *= -1
    scale[:, 1::3] = 0
    check(changed(c, **{"1.weight": scale}), isa, dtype)


@both_dtypes
@every_window
@pytest.mark.parametrize("order", ["", "-no-relu", "-relu-last"])
@every_isa
def test_the_first_of_equal_values_wins(isa, order, window, dtype):
    """Pixels of three values: most windows hold their largest more than once."""
    c = fused(window, order=order)
    gradient = check(changed(c, c.tasks.support_x.sign().clamp(max=0)), isa, dtype)
    assert gradient["0.weight"].abs().max() > 1e-3
    three = c.tasks.support_x.mul(0.8).round().clamp(-1, 1)
    check(changed(c, three), isa, dtype)


@both_dtypes
@every_window
@every_isa
def test_constant_images_tie_everywhere(isa, window, dtype):
    c = fused(window, order="-no-relu")
    constant = c.tasks.support_x[..., :1, :1].expand_as(c.tasks.support_x).contiguous()
    check(changed(c, constant), isa, dtype)


@both_dtypes
@every_window
@every_isa
def test_a_dead_relu_passes_nothing(isa, window, dtype):
    """Far below zero everywhere in some channels; others are as they were."""
    c = fused(window)
    shift = c.own["1.bias"].clone()
    shift[:, ::2] = -100
    gradient = check(changed(c, **{"1.bias": shift}), isa, dtype)
    assert not gradient["1.weight"][:, ::2].any()
    assert not gradient["1.bias"][:, ::2].any()
    assert gradient["1.bias"][:, 1::2].any()


@both_dtypes
@pytest.mark.parametrize("order", ["", "-no-relu", "-relu-last"])
@pytest.mark.parametrize("place", [(0, 0), (6, 7)], ids=["window", "remainder"])
@every_isa
def test_nan_reaches_everything_it_reaches_in_torch(isa, place, order, dtype):
    """The remainder's pixels win nothing, but the statistics count them."""
    c = fused(3, order=order)
    x = c.tasks.support_x.clone()
    x[0, 1, 0, place[0], place[1]] = torch.nan
    gradient = check(changed(c, x), isa, dtype)
    assert gradient["1.bias"][0].isnan().all()
    assert gradient["1.bias"][1].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["float32"])
@every_isa
def test_nan_passes_a_relu_that_has_no_pooling(isa, dtype):
    builder = pooled_norm(19, (2, 1), SIZE)
    c = case(Problem("overlapping", builder, (2, *SIZE), 2, samples=3))
    x = c.tasks.support_x.clone()
    x[0, 1, 0, 2, 2] = torch.nan
    gradient = check(changed(c, x), isa, dtype)
    assert gradient["1.bias"][0].isnan().all()


@both_dtypes
@every_window
@every_isa
def test_a_mean_far_from_zero_costs_no_accuracy_but_its_own(isa, window, dtype):
    """Activations 16 spreads off zero: four bits less, as for any algorithm."""
    c = fused(window)
    bias = c.own["0.bias"] + 16
    check(changed(c, **{"0.bias": bias}), isa, dtype)


def test_the_normalised_image_takes_no_memory():
    """Against the same function with a ReLU that is not fused."""
    samples, channels, size = 4, 16, (20, 20)
    tapes = []
    for relu in (nn.ReLU(), nn.LeakyReLU(0.0)):

        def build(relu: nn.Module = relu) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(2, channels, 1),
                nn.BatchNorm2d(channels, track_running_stats=False),
                relu,
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(channels * 100, 2),
            )

        c = case(Problem(f"memory {relu}", build, (2, *size), 2, samples=samples))
        engine = native(c)
        engine.meta_gradient(c.params, c.rates, c.tasks, steps=1)
        tapes.append(engine.plan.tape)
    image = 8 * samples * channels * size[0] * size[1]
    # y and dx of two layers of the full size, less the tangents of the winners
    assert tapes[1] - tapes[0] >= 3.7 * image
