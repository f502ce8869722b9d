"""Problems around batch norm with what the engine fuses behind it: ReLU, pooling, mean.

Sizes leave remainders that no window reaches, and channels lie around vector widths and
the groups of vectors that reductions take. Windows that are not fused stand beside.
"""

from __future__ import annotations

from problem import Builder, Problem
from torch import nn

_ORDERS = {
    "": ("norm", "relu", "pool"),
    "-relu-last": ("norm", "pool", "relu"),
    "-no-relu": ("norm", "pool"),
    "-relu-twice": ("norm", "relu", "pool", "relu"),
    "-pool-twice": ("norm", "relu", "pool", "pool"),
    "-mean": ("norm", "relu", "mean"),
    "-mean-no-relu": ("norm", "mean"),
}


def pooled_norm(
    channels: int,
    window: tuple,
    size: tuple[int, int],
    *,
    order: str = "",
    scale: bool = True,
    shift: bool = True,
    lead: bool = True,
    conv: tuple = (2, 1),
    bias: bool = True,
) -> Builder:
    """A convolution, the layers in question, and a linear layer.

    Args:
        channels: of the batch norm.
        window: arguments of the max pooling.
        size: of the images [H, W].
        order: a key of ``_ORDERS``.
        scale: whether the batch norm has one.
        shift: whether the batch norm has one.
        lead: whether the convolution is there; else the batch norm comes first.
        conv: its input channels, kernel, stride and padding; the last three as in
            PyTorch and the last two optional.
        bias: whether the convolution has one.
    """

    def build() -> nn.Module:
        norm = nn.BatchNorm2d(channels, track_running_stats=False)
        if not scale:
            norm.register_parameter("weight", None)
        if not shift:
            norm.register_parameter("bias", None)
        made = {
            "norm": norm,
            "relu": nn.ReLU(),
            "pool": nn.MaxPool2d(*window),
            "mean": nn.AdaptiveAvgPool2d(1),
        }
        body = nn.Sequential(*(made[key] for key in _ORDERS[order]))
        height, width = size
        kernel, stride, padding = (*conv[1:], 1, 0)[:3]
        if lead:
            height, width = _after((height, width), kernel, stride, padding)
        for key in _ORDERS[order]:
            if key == "pool":
                height, width = _after((height, width), *_filled(window))
            elif key == "mean":
                height = width = 1
        first = []
        if lead:
            first = [nn.Conv2d(conv[0], channels, *conv[1:], bias=bias)]
        return nn.Sequential(
            *first, *body, nn.Flatten(), nn.Linear(channels * height * width, 2)
        )

    return build


def _after(size: tuple[int, int], *window: int | tuple[int, int]) -> tuple[int, ...]:
    """The size behind a window of a kernel, stride and padding."""
    return tuple(
        (n + 2 * p - k) // s + 1
        for n, k, s, p in zip(size, *map(_pair, window), strict=True)
    )


def _filled(window: tuple) -> tuple:
    kernel, stride, padding = (*window, None, None)[:3]
    return kernel, stride or kernel, padding or 0


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


# name, channels, window, image
_SHAPES: list[tuple[str, int, tuple, tuple[int, int]]] = [
    ("2x2-of-1", 1, (2,), (4, 4)),
    ("2x2-of-8", 8, (2,), (2, 6)),
    ("2x2-of-17", 17, (2,), (5, 7)),
    ("2x2-of-33", 33, (2,), (5, 4)),
    ("2x2-of-65", 65, (2,), (3, 5)),
    ("3x3-of-5", 5, (3,), (7, 8)),
    ("2x3-of-16", 16, ((2, 3),), (5, 7)),
    ("3x1-of-9", 9, ((3, 1),), (4, 3)),
    ("1x1-of-3", 3, (1,), (3, 2)),
    ("whole-of-15", 15, ((3, 4),), (3, 4)),
    ("many-blocks", 2, (2,), (33, 31)),
    ("overlap", 5, (3, 2), (7, 6)),
    ("gaps", 5, (2, 3), (7, 6)),
    ("padded", 5, (2, 2, 1), (5, 6)),
]
# Convolutions whose output is swept in strips, and some beside them that are not.
# name, outputs, pooling window, image, convolution, further arguments
_STRIPS: list[tuple[str, int, tuple, tuple[int, int], tuple, dict]] = [
    ("3x3-of-3to16", 16, (2,), (4, 30), (3, 3, 1, 1), {}),
    ("3x3-of-1to5", 5, (2,), (7, 9), (1, 3, 1, 1), {}),
    ("3x3-of-3to33-unpadded", 33, (3,), (10, 9), (3, 3), {}),
    ("3x3-of-3to35-no-bias", 35, (2,), (5, 23), (3, 3, 1, 1), {"bias": False}),
    ("5x3-of-2to17", 17, ((2, 1),), (6, 7), (2, (5, 3), 1, (2, 0)), {}),
    ("1x3-of-7to1", 1, (2,), (3, 5), (7, (1, 3), 1, (0, 2)), {}),
    ("4x4-of-4to8", 8, (2,), (5, 6), (4, 4, 1, 3), {}),
    ("2x2-of-3to9-plain", 9, (2,), (4, 16), (3, 2), {"scale": False, "shift": False}),
    # in whole vectors, where winners and moments of patches are enough
    ("3x3-of-3to32", 32, (2,), (9, 11), (3, 3, 1, 1), {}),
    ("3x3-of-1to16-unpadded", 16, (2,), (7, 8), (1, 3), {}),
    ("3x3-of-3to48-wide-border", 48, (2,), (4, 3), (3, 3, 1, 2), {"bias": False}),
    ("3x3-of-1to32-tiny", 32, (2,), (2, 2), (1, 3, 1, 1), {}),
    (
        "3x3-of-3to16-plain",
        16,
        (2,),
        (6, 7),
        (3, 3, 1, 1),
        {"scale": False, "shift": False},
    ),
    ("3x3-of-3to16-no-relu", 16, (2,), (5, 4), (3, 3, 1, 1), {"order": "-no-relu"}),
    ("3x3-of-3to16-many-strips", 16, (2,), (41, 6), (3, 3, 1, 1), {}),
    ("many-strips", 3, (2,), (41, 6), (2, 3, 1, 1), {}),
    ("whole-image", 6, ((3, 4),), (3, 4), (3, 3, 1, 1), {"order": "-relu-last"}),
    ("many-inputs", 4, (2,), (5, 4), (8, 3, 1, 1), {}),
    ("stride-2", 4, (2,), (9, 8), (3, 3, 2, 1), {}),
]
# Where the first seed leaves an input of a ReLU too close to zero.
_SEEDS = {
    "3x3-of-3to32": 1,
    "3x3-of-3to48-wide-border": 1,
    "3x3-of-3to16-plain": 1,
    "3x3-of-3to16-many-strips": 1,
}
# Windows of 2 x 2 that leave no border, below which a convolution folds the norm's
# adjoint: two tiles of channels, sums in parts, strides, a product per pixel, too many
# inputs.
_FOLDS: list[tuple[str, int, tuple, tuple[int, int], tuple, dict]] = [
    ("even-1to40", 40, (2,), (4, 6), (1, 3, 1, 1), {}),
    ("even-many", 5, (2,), (24, 22), (3, 3, 1, 1), {}),
    ("even-stride-2", 8, (2,), (8, 12), (3, 3, 2, 1), {"bias": False}),
    ("even-1x1", 12, (2,), (6, 4), (5, 1), {"order": "-no-relu", "scale": False}),
    ("even-many-inputs", 4, (2,), (4, 4), (4, 3, 1, 1), {"order": "-relu-last"}),
]
# Means over images, which a backend may do in the norm below: of whole packs of
# channels and others, and of as many rows as are summed in parts.
# name, channels, image, order, further arguments
_MEANS: list[tuple[str, int, tuple[int, int], str, dict]] = [
    ("8", 8, (3, 3), "-mean", {"scale": False}),
    ("5-no-relu", 5, (4, 3), "-mean-no-relu", {}),
    ("first", 2, (3, 4), "-mean", {"lead": False}),
    ("many", 4, (22, 23), "-mean", {}),
]
_AFFINE = {
    "-no-scale": (False, True),
    "-no-shift": (True, False),
    "-plain": (False, False),
}

FUSED = [
    *(
        Problem(f"batch-norm-pool-{name}", pooled_norm(c, w, s), (2, *s), 2, samples=3)
        for name, c, w, s in _SHAPES
    ),
    *(
        Problem(
            f"batch-norm-pool{key}",
            pooled_norm(9, (2,), (5, 4), order=key),
            (2, 5, 4),
            2,
            samples=3,
        )
        for key in ("-relu-last", "-no-relu", "-relu-twice", "-pool-twice")
    ),
    *(
        Problem(
            f"batch-norm-pool{key}",
            pooled_norm(5, (2,), (5, 4), scale=scale, shift=shift),
            (2, 5, 4),
            2,
            samples=4,
        )
        for key, (scale, shift) in _AFFINE.items()
    ),
    *(
        Problem(
            f"conv-norm-pool-{name}",
            pooled_norm(outputs, window, size, conv=conv, **more),
            (conv[0], *size),
            2,
            samples=3,
            seed=_SEEDS.get(name, 0),
        )
        for name, outputs, window, size, conv, more in [*_STRIPS, *_FOLDS]
    ),
    *(
        Problem(
            f"batch-norm-mean-{name}",
            pooled_norm(c, (1,), size, order=order, **more),
            (2, *size),
            2,
            samples=3,
        )
        for name, c, size, order, more in _MEANS
    ),
    Problem(
        "batch-norm-pool-first",
        pooled_norm(3, (2,), (5, 4), lead=False),
        (3, 5, 4),
        2,
        samples=4,
    ),
]
