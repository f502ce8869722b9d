"""Shapes of samples through a program."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmaml import models
from fastmaml.compile import compile_module, infer_shapes


@pytest.mark.parametrize(
    ("model", "shape", "message"),
    [
        (nn.Linear(3, 2), (4,), r"linear\) got samples of shape \[4\], expected \[3\]"),
        (nn.Linear(3, 2), (5, 3), "linear"),
        (nn.Conv2d(3, 2, 3), (1, 8, 8), r"expected \[3, H, W\]"),
        (nn.Sequential(nn.Conv2d(1, 2, 5), nn.Flatten()), (1, 4, 8), "5 pixels|5, 5"),
        (nn.Sequential(nn.LayerNorm(3)), (2, 3), "all features of a sample"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 8, 8), "expected a flat"),
    ],
)
def test_shapes_that_do_not_fit(model, shape, message):
    program = compile_module(model).program
    with pytest.raises(ValueError, match=message):
        infer_shapes(program, shape)


def test_shapes_follow_the_model():
    model = models.mini_imagenet_conv(5, channels=4)
    program = compile_module(model, "cross_entropy").program
    shapes = infer_shapes(program, (3, 84, 84))
    x = torch.randn(2, 3, 84, 84)
    for layer, shape in zip(model, shapes[1:], strict=True):
        x = layer(x)
        assert tuple(x.shape[1:]) == shape
