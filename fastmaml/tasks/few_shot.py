"""Few-shot classification out of an array of images in memory.

Of the random words of a task (`fastmaml.tasks.philox`), the first ``ways`` select its
classes; then follow, class after class, shots + queries words that select drawings,
those of the support first (`fastmaml.tasks.philox.distinct`). Images are gathered as
rows of a block that lies as the batch will.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastmaml import _native
from fastmaml.tasks.batch import TaskBatch, batch_of
from fastmaml.tasks.device import DeviceStream
from fastmaml.tasks.philox import TaskStream, distinct
from fastmaml.tasks.sampler import TaskSampler, check_count, native_core


class FewShotImages(TaskSampler):
    """Tasks of telling apart a few classes of images.

    A class is a pair (character, rotation): with ``rotations=(0, 90, 180, 270)`` every
    character is four classes, and one task may hold two rotations of one character, as
    in the paper's code. Classes of a task are distinct; the shots + queries images of a
    class are distinct, so support and query are disjoint. Labels are 0 .. ways - 1,
    samples are ordered class by class: the support is shots images of class 0, then of
    class 1, and so on, S = ways * shots and Q = ways * queries.

    Images are kept on ``device`` as uint8 and become floating numbers in [0, 1] as they
    are gathered: on the CPU there is a copy for every rotation, kernels on a GPU turn
    them.

    Args:
        images: [classes, n, C, H, W] uint8.
        ways: classes of a task.
        shots: support images of a class.
        queries: query images of a class.
        rotations: multiples of 90 degrees, counter-clockwise like ``PIL.Image.rotate``.
        invert: whether to turn v into 255 - v (ink black on white to white on black).
        seed: which stream, below 2^64.
        device: where images are kept and batches are made.
        dtype: floating dtype of the batches.
        channels_last: whether the memory of a batch is [T, S, H, W, C]; its logical
            shape stays [T, S, C, H, W].

    Raises:
        TypeError: ``images`` is no uint8 array.
        ValueError: shapes, rotations or counts do not fit; the message says which.

    Source:
        Section 5.2; rotations as classes: Santoro et al. 2016.
    """

    def __init__(
        self,
        images: Tensor | np.ndarray,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 1,
        rotations: Sequence[int] = (0,),
        invert: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        super().__init__(seed=seed, device=device, dtype=dtype)
        self.ways = check_count("ways", ways, least=2)
        self.shots = check_count("shots", shots)
        self.queries = check_count("queries", queries)
        images = _check_images(images).to(self.device)
        self.rotations = _check_rotations(rotations, images)
        self.characters, self.drawings = images.shape[:2]
        self.classes = self.characters * len(self.rotations)
        self._check_counts()
        self.input_shape = tuple(images.shape[2:])
        self.outputs = ways
        self.channels_last = channels_last
        self._invert = invert
        self._labels = torch.arange(ways, device=self.device)
        self._drawer = self._make_drawer()
        self._draw_by_kernels()
        if self._place is None:
            self._rows = _rows(images, self.rotations, invert, channels_last)
        else:
            self._rows = images.contiguous()

    def draw(self, tasks: int, stream: TaskStream) -> TaskBatch:
        """Returns the next ``tasks`` tasks of ``stream``."""
        if self._drawer is None and self._place is None:
            return self._restated(tasks, stream)
        support, query = self.ways * self.shots, self.ways * self.queries
        pixels = math.prod(self.input_shape)
        x: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        y: dict[str, Any] = {"dtype": torch.int64, "device": self.device}
        support_x = torch.empty((tasks, support, pixels), **x)
        query_x = torch.empty((tasks, query, pixels), **x)
        support_y = torch.empty((tasks, support), **y)
        query_y = torch.empty((tasks, query), **y)
        made = (support_x, support_y, query_x, query_y)
        if self._place is not None:
            self._launch(tasks, stream, made)
        else:
            assert self._drawer is not None
            places = _native.addresses((self._rows, *made))
            sizes = (self.classes, self.drawings, self.ways, self.shots, self.queries)
            first = stream.take(tasks)
            self._drawer(stream.key, first, tasks, (*sizes, pixels), *places)
        return batch_of(
            self._images(support_x, tasks),
            support_y,
            self._images(query_x, tasks),
            query_y,
        )

    def _make_drawer(self) -> Any:
        if (core := native_core(self.device, self.dtype)) is None:
            return None
        single = self.dtype == torch.float32
        return core.few_shot_float32 if single else core.few_shot_float64

    def _launch(self, tasks: int, stream: TaskStream, made: tuple[Tensor, ...]) -> None:
        """By kernels, for which nobody waits."""
        assert self._place is not None
        single = self.dtype == torch.float32
        core = _native.core()
        draw = core.device_few_shot_float32 if single else core.device_few_shot_float64
        there = DeviceStream.of(stream, self.device)
        count = tasks * self.ways * (self.shots + self.queries)
        rows = torch.empty(count, dtype=torch.int64, device=self.device)
        with self._place.guard():
            draw(
                self._place.launch(),
                there.address(),
                tasks,
                (self.ways, self.shots, self.queries),
                _native.own_address(self._rows),
                (self.characters, self.drawings, *self.input_shape),
                [angle // 90 for angle in self.rotations],
                self._invert,
                self.channels_last,
                _native.addresses((*made, rows)),
            )
        if there is not stream:
            stream.take(tasks)

    def _restated(self, tasks: int, stream: TaskStream) -> TaskBatch:
        """The same tasks where the extension can't be used."""
        support, query = self._select(tasks, stream)
        rows = torch.cat([support.flatten(), query.flatten()]).to(self.device)
        x = self._rows.index_select(0, rows).to(self.dtype).div_(255)
        cut = support.numel()
        return TaskBatch(
            self._images(x[:cut], tasks),
            self._targets(tasks, self.shots),
            self._images(x[cut:], tasks),
            self._targets(tasks, self.queries),
        )

    def _select(self, tasks: int, stream: TaskStream) -> tuple[Tensor, Tensor]:
        """Rows of the flattened images: [T, ways, shots] and [T, ways, queries]."""
        each = self.shots + self.queries
        words = stream.words(tasks, self.ways * (1 + each))
        classes = distinct(words[:, : self.ways], self.classes)
        drawings = distinct(words[:, self.ways :].reshape(-1, each), self.drawings)
        rows = classes[:, :, None] * self.drawings + drawings.reshape(tasks, -1, each)
        support, query = torch.from_numpy(rows).split((self.shots, self.queries), 2)
        return support, query

    def _images(self, x: Tensor, tasks: int) -> Tensor:
        channels, height, width = self.input_shape
        if self.channels_last:
            return x.view(tasks, -1, height, width, channels).permute(0, 1, 4, 2, 3)
        return x.view(tasks, -1, channels, height, width)

    def _targets(self, tasks: int, each: int) -> Tensor:
        return self._labels.repeat_interleave(each).repeat(tasks, 1)

    def _check_counts(self) -> None:
        if self.ways > self.classes:
            raise ValueError(
                f"ways must be at most the {self.classes} classes there are "
                f"({self.characters} in images, {len(self.rotations)} rotations), got "
                f"{self.ways}; pass more classes or fewer ways"
            )
        if self.shots + self.queries > self.drawings:
            raise ValueError(
                f"shots + queries must be at most the {self.drawings} images of a "
                f"class, got {self.shots} + {self.queries}; pass more images a class, "
                "fewer shots or fewer queries"
            )


def _check_images(images: Tensor | np.ndarray) -> Tensor:
    if isinstance(images, np.ndarray):
        images = torch.from_numpy(images if images.flags.writeable else images.copy())
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        got = getattr(images, "dtype", type(images).__name__)
        raise TypeError(
            f"images must be a uint8 tensor or array with values 0 to 255, got {got}"
        )
    if images.ndim != 5 or 0 in images.shape:
        raise ValueError(
            "images must be [classes, images of a class, channels, height, width], got "
            f"shape {tuple(images.shape)}"
        )
    return images


def _check_rotations(rotations: Sequence[int], images: Tensor) -> tuple[int, ...]:
    allowed = (0, 90, 180, 270)
    if not rotations or any(angle not in allowed for angle in rotations):
        raise ValueError(f"rotations must be some of {allowed}, got {rotations!r}")
    if len(set(rotations)) != len(rotations):
        raise ValueError(f"rotations must not repeat, got {rotations!r}")
    if images.shape[3] != images.shape[4] and {90, 270} & set(rotations):
        raise ValueError(
            f"rotations by 90 or 270 need square images, got "
            f"{images.shape[3]} x {images.shape[4]}; use rotations=(0, 180) or (0,)"
        )
    return tuple(rotations)


def _rows(
    images: Tensor, rotations: Sequence[int], invert: bool, channels_last: bool
) -> Tensor:
    """One row per image, [rotations * classes * n, C * H * W], in gathering order."""
    turned = [images.rot90(angle // 90, (-2, -1)) for angle in rotations]
    stack = torch.cat(turned) if len(turned) > 1 else turned[0]
    if channels_last:
        stack = stack.permute(0, 1, 3, 4, 2)
    rows = stack.flatten(0, 1).flatten(1)
    return (255 - rows if invert else rows).contiguous()
