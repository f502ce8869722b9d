"""Few-shot classification out of an array of images in memory.

A meta-batch is two small draws of distinct integers (classes of a task, drawings of a
class) and one gather over the flattened images; support rows come first, then query
rows, so that both halves of the gathered block are contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastmaml.tasks.batch import TaskBatch
from fastmaml.tasks.sampler import TaskSampler, check_count


class FewShotImages(TaskSampler):
    """Tasks of telling apart a few classes of images.

    A class is a pair (character, rotation): with ``rotations=(0, 90, 180, 270)`` every
    character is four classes, and one task may hold two rotations of one character, as
    in the paper's code. Classes of a task are distinct; the shots + queries images of a
    class are distinct, so support and query are disjoint. Labels are 0 .. ways - 1,
    samples are ordered class by class: the support is shots images of class 0, then of
    class 1, and so on, S = ways * shots and Q = ways * queries.

    Images are kept on ``device`` as uint8, once per rotation, and become floating
    numbers in [0, 1] as they are gathered.

    Args:
        images: [classes, n, C, H, W] uint8.
        ways: classes of a task.
        shots: support images of a class.
        queries: query images of a class.
        rotations: multiples of 90 degrees, counter-clockwise like ``PIL.Image.rotate``.
        invert: whether to turn v into 255 - v (ink black on white to white on black).
        seed: start of the stream.
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
        self._rows = _rows(images, self.rotations, invert, channels_last)
        self._labels = torch.arange(ways, device=self.device)

    def draw(self, tasks: int, generator: torch.Generator) -> TaskBatch:
        """Returns ``tasks`` tasks made of random numbers of ``generator`` alone."""
        support, query = self._draw_rows(tasks, generator)
        rows = torch.cat([support.flatten(), query.flatten()])
        x = self._rows.index_select(0, rows).to(self.dtype).div_(255)
        cut = support.numel()
        return TaskBatch(
            self._images(x[:cut], tasks),
            self._targets(tasks, self.shots),
            self._images(x[cut:], tasks),
            self._targets(tasks, self.queries),
        )

    def _draw_rows(
        self, tasks: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Rows of the flattened images: [T, ways, shots] and [T, ways, queries]."""
        each = self.shots + self.queries
        classes = _draw_distinct(tasks, self.classes, self.ways, generator)
        drawings = _draw_distinct(tasks * self.ways, self.drawings, each, generator)
        rows = classes.unsqueeze(2) * self.drawings + drawings.view(tasks, -1, each)
        support, query = rows.split((self.shots, self.queries), 2)
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


def _draw_distinct(
    rows: int, choices: int, count: int, generator: torch.Generator
) -> Tensor:
    """Draws ``count`` distinct integers below ``choices`` in every row, [rows, count].

    All ordered selections are equally likely.
    """
    # On a GPU a kernel launch costs more than random keys for all the choices.
    method = _by_floyd if generator.device.type == "cpu" else _by_keys
    return method(rows, choices, count, generator)


def _by_floyd(
    rows: int, choices: int, count: int, generator: torch.Generator
) -> Tensor:
    """Floyd's method, with ``count`` random numbers a row.

    Step i draws t below m + 1 with m = choices - count + i and takes t, or m if t is
    taken. Every set is equally likely then, but not every order, hence the shuffle.
    """
    device = generator.device
    numbers = torch.rand(
        (2, count, rows), generator=generator, device=device, dtype=torch.float64
    )
    above = torch.arange(choices - count + 1, choices + 1, device=device).unsqueeze(1)
    picks = (numbers[0] * above).long()  # [count, rows]
    for i in range(1, count):
        taken = (picks[:i] == picks[i]).any(0)
        picks[i].masked_fill_(taken, choices - count + i)
    return picks.gather(0, numbers[1].argsort(0)).t()


def _by_keys(rows: int, choices: int, count: int, generator: torch.Generator) -> Tensor:
    """The places of the largest of ``choices`` random keys a row."""
    keys = torch.rand((rows, choices), generator=generator, device=generator.device)
    return keys.topk(count, dim=1).indices
