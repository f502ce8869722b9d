"""Procedurally drawn characters: image meta-learning without any files.

A class is a recipe of 1 to 4 pen strokes. A stroke is the path of a pen whose heading
changes along the way, by a steady turn (line, arc, loop), a wave (S, hook) and a kink
(corner); all but the first start at some point of an earlier stroke or near it. A
drawing repeats the recipe with an unsteady hand: every number of it is perturbed, and
the whole is turned, sheared, scaled, shifted and drawn with a pen of another width.

Rendering: the sum of Gaussians along a path, weighted by the length between points, is
at distance d of a straight stroke ``exp(-d^2 / 2 sigma^2)`` times a constant. So one
batched matrix product of row and column factors gives every pixel its distance to the
ink, and a pixel's value is the part of it within half a pen width.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastmaml.tasks.datasets.cache import cache_root, load_or_build
from fastmaml.tasks.sampler import check_count

_VERSION = 1  # of the recipe; part of the name of a cached file
_STROKES = 4
_POINTS = 49  # of a stroke: denser than the pen is wide, or strokes look dotted
_GENES = 12  # uniform numbers a stroke's recipe is read from
_TREMBLE = 10  # normal numbers that perturb one stroke of one drawing
_POSE = 8  # normal numbers of a drawing as a whole
_CHUNK = 500  # drawings rendered at once, bounds the memory


def glyphs(
    classes: int = 1200,
    drawings: int = 20,
    size: int = 28,
    seed: int = 0,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Draws characters, white ink on black.

    Takes seconds for the default size, once per process. The first classes and drawings
    of a larger set are those of a smaller one with the same seed and size. The same
    arguments give the same pixels on one machine; another machine's mathematics library
    may round a pixel differently.

    Args:
        classes: number of characters.
        drawings: drawings of every character.
        size: height and width in pixels, at least 8.
        seed: which alphabet.
        cache_dir: folder to keep the images in for other processes; ``None`` keeps them
            in this process alone, ``""`` uses the default cache directory.

    Returns:
        [classes, drawings, 1, size, size] uint8.

    Raises:
        ValueError: a number is too small.
    """
    check_count("classes", classes)
    check_count("drawings", drawings)
    check_count("size", size, least=8)
    check_count("seed", seed, least=0)
    folder = None if cache_dir is None else str(cache_root(cache_dir))
    return torch.from_numpy(_build(classes, drawings, size, seed, folder).copy())


def glyph_splits(classes: int = 1200) -> dict[str, slice]:
    """Returns which classes are for training, validation and test.

    Two thirds, a twelfth and a quarter of the classes: 800, 100 and 300 of 1200. Use as
    ``glyphs()[glyph_splits()["train"]]``.

    Args:
        classes: number of characters, at least 12.
    """
    check_count("classes", classes, least=12)
    train, val = classes * 2 // 3, classes // 12
    return {
        "train": slice(0, train),
        "val": slice(train, train + val),
        "test": slice(train + val, classes),
    }


@dataclass(frozen=True)
class _Recipe:
    """Strokes of many characters or drawings; all arrays [n, strokes]."""

    present: np.ndarray  # 1 where the character has this stroke, else 0
    heading: np.ndarray  # at the start, radians
    turn: np.ndarray  # of the heading from start to end, radians
    wave: np.ndarray  # amplitude of the heading's sine wave, radians
    kink: np.ndarray  # jump of the heading, radians
    kink_at: np.ndarray  # where on the stroke, 0 to 1
    length: np.ndarray  # of the stroke; the first's is about 1
    parent_at: np.ndarray  # where on the earlier stroke this one is attached, 0 to 1
    own_at: np.ndarray  # which point of this stroke is attached there, 0 to 1
    gap: np.ndarray  # complex offset from the attachment
    parent: np.ndarray  # number of the earlier stroke


@functools.lru_cache(maxsize=4)
def _build(
    classes: int, drawings: int, size: int, seed: int, folder: str | None
) -> np.ndarray:
    def draw() -> tuple[np.ndarray, dict[str, str]]:
        return _draw_all(classes, drawings, size, seed), {}

    if folder is None:
        return draw()[0]
    name = f"glyphs-v{_VERSION}-{classes}x{drawings}x{size}-seed{seed}"
    return load_or_build(cache_root(folder), name, draw)[0]


def _draw_all(classes: int, drawings: int, size: int, seed: int) -> np.ndarray:
    genes = np.empty((classes, 1 + _STROKES * _GENES))
    noise = np.empty((classes, drawings, _STROKES * _TREMBLE + _POSE))
    for c in range(classes):  # one generator a class: sets are prefixes of larger ones
        generator = np.random.default_rng([seed, c])
        genes[c] = generator.random(genes.shape[1])
        noise[c] = generator.standard_normal(noise.shape[1:])
    genes = np.repeat(genes, drawings, axis=0)
    hands = noise.reshape(len(genes), -1)
    images = np.empty((len(genes), size, size), np.uint8)
    for start in range(0, len(genes), _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw_chunk(genes[part], hands[part], size)
    return images.reshape(classes, drawings, 1, size, size)


def _draw_chunk(genes: np.ndarray, noise: np.ndarray, size: int) -> np.ndarray:
    tremble, pose = np.split(noise, [_STROKES * _TREMBLE], axis=1)
    recipe = _recipe(genes)
    drawn = _unsteady(recipe, tremble.reshape(len(genes), _STROKES, _TREMBLE))
    path = _pose(_path(drawn), recipe.present, pose)
    width = np.clip(1.7 + 0.3 * pose[:, 6], 1.0, 2.6)
    return _render(path, recipe.present, width, size)


def _recipe(genes: np.ndarray) -> _Recipe:
    """Reads strokes from uniform numbers [n, 1 + strokes * genes]."""
    count = 1 + np.searchsorted([0.1, 0.45, 0.8], genes[:, 0])  # 1 to 4 strokes
    g = np.moveaxis(genes[:, 1:].reshape(-1, _STROKES, _GENES), 2, 0)
    order = np.arange(_STROKES)
    alone = (count == 1)[:, None]  # a single straight line would be no character
    kind = np.searchsorted(
        [0.3, 0.6, 0.7, 0.84], np.where(alone, 0.6 + 0.4 * g[0], g[0])
    )
    line, arc, loop, wave, corner = (kind == k for k in range(5))
    sign = np.where(g[1] < 0.5, -1.0, 1.0)
    # Most strokes of real scripts run along the axes or the diagonals.
    # A stroke heads away from the one before it, else the two would blot together.
    eighths = np.where(order == 0, np.floor(g[2] * 8), 1 + np.floor(g[2] * 3))
    heading = eighths.cumsum(1) * (np.pi / 4) + (g[3] - 0.5) * 0.5
    turn = arc * (0.8 + 2.6 * g[4]) + loop * (4.6 + 1.9 * g[4]) + line * 0.3 * g[4]
    ends = np.floor(g[5] * 3) / 2  # attached by its start, middle or end
    along = np.where(g[6] < 0.6, np.floor(g[7] * 3) / 2, g[7])
    apart = np.where(g[8] < 0.25, 0.25 + 0.35 * g[9], 0.0)
    return _Recipe(
        present=(order < count[:, None]).astype(float),
        heading=heading,
        turn=sign * turn,
        wave=sign * wave * (0.7 + 0.8 * g[4]),
        kink=sign * corner * (1.2 + 1.3 * g[4]),
        kink_at=0.3 + 0.4 * g[9],
        length=np.where(order == 0, 1.0, 0.5 + 0.7 * g[10]) * (1 + 0.5 * (turn > 2)),
        parent_at=along,
        own_at=ends,
        gap=apart * np.exp(2j * np.pi * g[11]),
        parent=np.floor(g[11] * order).astype(int),
    )


def _unsteady(recipe: _Recipe, noise: np.ndarray) -> _Recipe:
    """Perturbs every stroke; ``noise`` is [n, strokes, tremble] of normal numbers."""
    z = np.moveaxis(noise, 2, 0)
    return _Recipe(
        present=recipe.present,
        heading=recipe.heading + 0.12 * z[0],
        turn=recipe.turn * (1 + 0.14 * z[1]) + 0.16 * z[2],
        wave=recipe.wave * (1 + 0.2 * z[3]) + 0.08 * z[4],
        kink=recipe.kink * (1 + 0.12 * z[5]),
        kink_at=np.clip(recipe.kink_at + 0.05 * z[6], 0.1, 0.9),
        length=recipe.length * np.exp(0.14 * z[7]),
        parent_at=np.clip(recipe.parent_at + 0.06 * z[8], 0, 1),
        own_at=np.clip(recipe.own_at + 0.05 * z[9], 0, 1),
        gap=recipe.gap + 0.035 * (z[1] + 1j * z[5]),
        parent=recipe.parent,
    )


def _path(recipe: _Recipe) -> np.ndarray:
    """Walks the strokes: complex positions [n, strokes, points]."""
    s = (np.arange(_POINTS - 1) + 0.5) / (_POINTS - 1)

    def along(value: np.ndarray) -> np.ndarray:
        return value[:, :, None]

    heading = along(recipe.heading) + along(recipe.turn) * (s - 0.5)
    heading = heading + along(recipe.wave) * np.sin(2 * np.pi * s)
    heading = heading + along(recipe.kink) * (s > along(recipe.kink_at))
    step = along(recipe.length) / (_POINTS - 1) * np.exp(1j * heading)
    path = np.concatenate([np.zeros((*step.shape[:2], 1)), step.cumsum(2)], axis=2)
    rows = np.arange(len(path))
    last = _POINTS - 1
    for stroke in range(1, _STROKES):
        at = np.rint(recipe.parent_at[:, stroke] * last).astype(int)
        own = np.rint(recipe.own_at[:, stroke] * last).astype(int)
        target = path[rows, recipe.parent[:, stroke], at] + recipe.gap[:, stroke]
        path[:, stroke] += (target - path[rows, stroke, own])[:, None]
    return path


def _pose(path: np.ndarray, present: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Fits drawings to the unit square as a hand would: [n, strokes, points, 2]."""
    z = noise.T[:, :, None, None]
    path = path * np.exp(0.11j * z[0])
    slanted = path.real + 0.12 * z[1] * path.imag
    x, width = _centred(slanted, present)
    y, height = _centred(path.imag, present)
    extent = np.maximum(np.maximum(width, height), 0.3)
    fit = 0.76 * np.clip(np.exp(0.09 * z[2]), 0.8, 1.15) / extent
    fitted = []
    for axis, span, stretch, shift in (
        (x, width, z[3], z[4]),
        (y, height, -z[3], z[5]),
    ):
        # Flat characters are drawn somewhat fuller, as if between two guide lines.
        fuller = np.minimum((np.maximum(span, 1e-3) / extent) ** -0.35, 1.6)
        scale = fit * fuller * np.exp(0.07 * stretch)
        room = np.maximum(0.46 - span / 2 * scale, 0.0)
        fitted.append(0.5 + axis * scale + np.clip(0.04 * shift, -room, room))
    return np.stack(fitted, axis=3)


def _centred(axis: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centres the strokes that are there; returns their extent [n, 1, 1] too."""
    there = np.broadcast_to(present[:, :, None] > 0, axis.shape)
    low = axis.min((1, 2), where=there, initial=np.inf)[:, None, None]
    high = axis.max((1, 2), where=there, initial=-np.inf)[:, None, None]
    return axis - (low + high) / 2, high - low


def _render(
    path: np.ndarray, present: np.ndarray, width: np.ndarray, size: int
) -> np.ndarray:
    """Inks paths in the unit square: [n, size, size] uint8; width in 28ths of it."""
    n = len(path)
    points = (path * size).astype(np.float32)
    step = np.hypot(*np.moveaxis(np.diff(points, axis=2), 3, 0))
    weight = np.zeros(points.shape[:3], np.float32)
    weight[:, :, 1:] += step / 2
    weight[:, :, :-1] += step / 2
    weight *= present[:, :, None]
    sigma = np.float32(size / 28)
    centres = np.arange(size, dtype=np.float32) + np.float32(0.5)
    points = points.reshape(n, -1, 2, 1)
    bumps = np.exp(-0.5 * ((points - centres) / sigma) ** 2)  # [n, points, 2, size]
    across = bumps[:, :, 0] * weight.reshape(n, -1, 1)
    ink = bumps[:, :, 1].transpose(0, 2, 1) @ across
    ink /= sigma * np.float32(np.sqrt(2 * np.pi))
    distance = sigma * np.sqrt(-2 * np.log(np.clip(ink, 1e-6, 1.0)))
    radius = (width * size / 56).astype(np.float32)[:, None, None]
    return np.rint(np.clip(radius + 0.5 - distance, 0, 1) * 255).astype(np.uint8)
