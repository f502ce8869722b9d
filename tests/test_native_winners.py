"""A first convolution below batch norm and 2 x 2 pooling: winners and moments.

Its passes are checked as any layer's over the rows of ``fused_problems``; here are
ties, signs, NaN, images far from zero, and sums in parts.
"""

from __future__ import annotations

import pytest
import torch
from fused_problems import pooled_norm
from native_cases import (
    Case,
    assert_same_bits,
    case,
    everything,
    native,
    threads,
)
from pooled_checks import SIZE, both_dtypes, changed, check, every_isa
from problems import Problem

every_depth = pytest.mark.parametrize("channels", [1, 3])


def winners(channels: int, size: tuple[int, int] = SIZE, outputs: int = 32) -> Case:
    name = f"winners {channels} {size} {outputs}"
    builder = pooled_norm(outputs, (2,), size, conv=(channels, 3, 1, 1))
    return case(Problem(name, builder, (channels, *size), 2, samples=3))


@both_dtypes
@every_depth
@every_isa
def test_scales_of_any_sign_pick_the_right_winner(isa, channels, dtype):
    c = winners(channels)
    scale = c.own["1.weight"].clone()
    scale[:, 0::3] *= -1
    scale[:, 1::3] = 0
    check(changed(c, **{"1.weight": scale}), isa, dtype)


@both_dtypes
@every_depth
@every_isa
def test_the_first_of_equal_values_wins(isa, channels, dtype):
    """Small integers, exact sums: weights of the middle pixel alone and no bias."""
    c = winners(channels)
    weight = torch.zeros_like(c.own["0.weight"])
    weight[..., 1, 1] = c.own["0.weight"][..., 1, 1].sign()
    x = c.tasks.support_x.mul(0.8).round().clamp(-1, 1)
    bias = torch.zeros_like(c.own["0.bias"])
    check(changed(c, x, **{"0.weight": weight, "0.bias": bias}), isa, dtype)


@both_dtypes
@every_depth
@every_isa
def test_constant_images(isa, channels, dtype):
    """Unlike its border, the inside of every image ties everywhere."""
    c = winners(channels)
    x = c.tasks.support_x[..., :1, :1].expand_as(c.tasks.support_x).contiguous()
    check(changed(c, x), isa, dtype)


@both_dtypes
@every_depth
@every_isa
def test_images_far_from_zero(isa, channels, dtype):
    c = winners(channels)
    check(changed(c, c.tasks.support_x + 8), isa, dtype)


@both_dtypes
@every_depth
@pytest.mark.parametrize("place", [(0, 0), (6, 7)], ids=["window", "remainder"])
@every_isa
def test_nan_reaches_its_task_alone(isa, place, channels, dtype):
    c = winners(channels)
    x = c.tasks.support_x.clone()
    x[0, 1, 0, place[0], place[1]] = torch.nan
    gradient = check(changed(c, x), isa, dtype)
    for name in ("0.weight", "0.bias", "1.bias"):
        assert gradient[name][0].isnan().all()
        assert gradient[name][1].isfinite().all()


@both_dtypes
@every_depth
def test_parts_and_threads_change_no_bit(channels, dtype):
    c = winners(channels, (42, 41), 64)
    with threads(1):
        alone = everything(native(c), c, dtype)
    with threads(3):
        assert_same_bits(everything(native(c), c, dtype), alone)


@both_dtypes
@every_depth
@every_isa
def test_many_parts_agree_with_the_oracle(isa, channels, dtype):
    check(winners(channels, (42, 41), 48), isa, dtype)
