"""Convolution problems: kernels, strides, paddings, channels around vector widths."""

from __future__ import annotations

from problem import Builder, Problem
from torch import nn

# in, out, kernel, stride, padding, height, width, bias
_CONVOLUTIONS = [
    (1, 1, (1, 1), (1, 1), (0, 0), 3, 4, True),
    (3, 5, (3, 3), (1, 1), (1, 1), 5, 6, True),
    (5, 16, (3, 3), (2, 2), (1, 1), 7, 7, True),
    (16, 16, (3, 3), (2, 2), (1, 1), 4, 4, False),
    (17, 33, (3, 3), (2, 1), (1, 2), 4, 3, True),
    (5, 32, (5, 3), (1, 2), (2, 0), 7, 6, True),
    (3, 64, (2, 2), (1, 1), (0, 0), 4, 4, True),
    (16, 5, (2, 2), (3, 2), (0, 1), 6, 5, False),
    (1, 17, (3, 3), (3, 3), (2, 2), 6, 8, True),
    (3, 1, (5, 3), (1, 1), (0, 1), 6, 4, True),
    (16, 33, (1, 1), (2, 2), (0, 0), 5, 5, True),
    (64, 16, (3, 3), (1, 1), (1, 0), 4, 4, True),
    (3, 5, (4, 4), (1, 1), (0, 0), 4, 4, True),
]


# By Winograd's filtering: odd sizes leave half tiles at the far edges, channels lie
# around vector widths and tiles of a product; without padding dx stays direct.
_WINOGRAD = [
    (16, 16, (3, 3), (1, 1), (1, 1), 6, 6, True),
    (16, 33, (3, 3), (1, 1), (0, 0), 8, 7, False),
    (17, 16, (3, 3), (1, 1), (1, 1), 9, 11, True),
    (32, 20, (3, 3), (1, 1), (1, 0), 9, 8, True),
    (48, 32, (3, 3), (1, 1), (0, 1), 7, 7, True),
    (64, 65, (3, 3), (1, 1), (1, 1), 6, 5, True),
    (32, 64, (3, 3), (1, 1), (2, 2), 8, 9, False),
    (33, 48, (3, 3), (1, 1), (0, 0), 6, 6, True),
]


def _conv_size(row: tuple) -> int:
    _, out, kernel, stride, padding, height, width, _ = row
    h = (height + 2 * padding[0] - kernel[0]) // stride[0] + 1
    w = (width + 2 * padding[1] - kernel[1]) // stride[1] + 1
    return out * h * w


def _conv(row: tuple, first: bool) -> Builder:
    before, out, kernel, stride, padding, _, _, bias = row

    def build() -> nn.Module:
        lead = [] if first else [nn.Conv2d(2, before, 1), nn.Tanh()]
        conv = nn.Conv2d(before, out, kernel, stride, padding, bias=bias)
        return nn.Sequential(
            *lead, conv, nn.Tanh(), nn.Flatten(), nn.Linear(_conv_size(row), 2)
        )

    return build


def _conv_problem(row: tuple, first: bool, samples: int = 3) -> Problem:
    before, out, kernel, stride, padding, height, width, bias = row
    name = (
        f"conv{'-first' if first else ''}-{before}to{out}-k{kernel[0]}x{kernel[1]}"
        f"-s{stride[0]}x{stride[1]}-p{padding[0]}x{padding[1]}"
        f"{'' if bias else '-no-bias'}"
    )
    shape = (before if first else 2, height, width)
    name += "" if samples == 3 else f"-n{samples}"
    return Problem(name, _conv(row, first), shape, 2, samples=samples)


CONVOLUTION = [
    *(_conv_problem(row, first=False) for row in _CONVOLUTIONS),
    *(_conv_problem(row, first=True) for row in _CONVOLUTIONS[:9]),
    *(_conv_problem(row, first=False) for row in _WINOGRAD),
    _conv_problem(_WINOGRAD[2], first=False, samples=1),
    _conv_problem(_WINOGRAD[0], first=True),
]
