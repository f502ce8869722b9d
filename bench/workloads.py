"""The seven workloads: what one meta-gradient has to do.

Sizes are those of the paper's experiments (Finn et al. 2017, section 5 and appendix
A); inner rates too. Data are random but shaped and scaled like the real ones, so that
a benchmark needs no files: timings depend on shapes, not on what the images show.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmaml import models
from fastmaml.tasks import FewShotImages, Sinusoid
from fastmaml.tasks.batch import TaskBatch
from fastmaml.tasks.sampler import TaskSampler

WAYS = 5
OBSERVATIONS, ACTIONS = 20, 6
CLASSES, DRAWINGS = 100, 20  # of the images that whole training steps draw from

Loss = Literal["mse", "cross_entropy", "policy_gradient"]
Samples = Callable[[torch.Generator, int, int, int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Workload:
    """One row of the benchmark.

    Attributes:
        name: short name for the command line and the result files.
        title: the network, as the table names it.
        build: makes the network.
        samples: (generator, tasks, support, query) -> support_x, support_y, query_x,
            query_y.
        loss: name of the loss, for support and query.
        tasks: T.
        support: S, samples of a task's inner loop.
        query: Q.
        steps: K.
        inner_lr: rate of the inner steps.
        source: (support, query) -> the sampler that training would draw from; ``None``
            where tasks come from elsewhere, such as an environment.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    samples: Samples
    loss: Loss
    tasks: int
    support: int
    query: int
    steps: int
    inner_lr: float
    source: Callable[[int, int], TaskSampler] | None = None

    def model(self, seed: int = 0) -> nn.Module:
        """Makes the network from a seed, leaving torch's own generator alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.build()

    def batch(self, seed: int = 0) -> TaskBatch:
        """Makes one meta-batch of random tasks."""
        generator = torch.Generator().manual_seed(seed)
        return TaskBatch(*self.samples(generator, self.tasks, self.support, self.query))

    def resized(self, **sizes: int) -> Workload:
        """Returns the workload with other ``tasks``, ``support``, ``query``, ..."""
        return dataclasses.replace(self, **sizes)  # type: ignore[arg-type]

    @property
    def work(self) -> str:
        """T × (S, Q), K as the table prints it."""
        steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        return f"{self.tasks} × ({self.support}, {self.query}), {steps}"


def _sinusoid(
    generator: torch.Generator, tasks: int, support: int, query: int
) -> tuple[Tensor, ...]:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    amplitude = 0.1 + 4.9 * uniform(tasks, 1, 1)
    phase = math.pi * uniform(tasks, 1, 1)
    x = 10 * uniform(tasks, support + query, 1) - 5
    y = amplitude * torch.sin(x - phase)
    return (x[:, :support].contiguous(), y[:, :support].contiguous()) + (
        x[:, support:].contiguous(),
        y[:, support:].contiguous(),
    )


def _images(channels: int, size: int) -> Samples:
    """Blobs around one prototype per class under pixel noise, in [0, 1]."""

    def sample(
        generator: torch.Generator, tasks: int, support: int, query: int
    ) -> tuple[Tensor, ...]:
        coarse = size // 7
        prototype = torch.rand(
            (tasks, WAYS, 1, channels, coarse, coarse), generator=generator
        )

        def draw(samples: int) -> tuple[Tensor, Tensor]:
            per_class = samples // WAYS
            shape = (tasks, WAYS, per_class, channels, coarse, coarse)
            noise = torch.rand(shape, generator=generator)
            blobs = (0.7 * prototype + 0.3 * noise).flatten(0, 2)
            smooth = F.interpolate(blobs, size=(size, size), mode="bilinear")
            x = 0.6 * smooth + 0.4 * torch.rand(smooth.shape, generator=generator)
            y = torch.arange(WAYS).repeat_interleave(per_class)
            x = x.reshape(tasks, samples, channels, size, size)
            return x, y.expand(tasks, samples).contiguous()

        return (*draw(support), *draw(query))

    return sample


def _few_shot(channels: int, size: int) -> Callable[[int, int], TaskSampler]:
    """Makes a sampler over images of noise."""

    def source(support: int, query: int) -> TaskSampler:
        generator = torch.Generator().manual_seed(0)
        shape = (CLASSES, DRAWINGS, channels, size, size)
        images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        return FewShotImages(
            images, ways=WAYS, shots=support // WAYS, queries=query // WAYS
        )

    return source


def _trajectories(
    generator: torch.Generator, tasks: int, support: int, query: int
) -> tuple[Tensor, ...]:
    """Observations, and per sample the actions taken with their advantage."""

    def draw(samples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn((tasks, samples, OBSERVATIONS), generator=generator)
        y = torch.randn((tasks, samples, ACTIONS + 1), generator=generator)
        return x, y

    return (*draw(support), *draw(query))


_SINUSOID = Workload(
    name="sinusoid-1",
    title="sinusoid MLP 1-40-40-1",
    build=models.sinusoid_mlp,
    samples=_sinusoid,
    loss="mse",
    tasks=25,
    support=10,
    query=10,
    steps=1,
    inner_lr=0.01,
    source=Sinusoid,
)
_OMNIGLOT = Workload(
    name="omniglot-conv-1",
    title="Omniglot conv 64, strided, BN, 5-way 1-shot",
    build=lambda: models.omniglot_conv(WAYS),
    samples=_images(1, 28),
    loss="cross_entropy",
    tasks=32,
    support=5,
    query=5,
    steps=1,
    inner_lr=0.4,
    source=_few_shot(1, 28),
)

WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        _SINUSOID,
        dataclasses.replace(_SINUSOID, name="sinusoid-5", steps=5),
        _OMNIGLOT,
        dataclasses.replace(_OMNIGLOT, name="omniglot-conv-5", steps=5),
        dataclasses.replace(
            _OMNIGLOT,
            name="omniglot-fc",
            title="Omniglot FC 256-128-64-64, BN, 5-way 1-shot",
            build=lambda: models.omniglot_fc(WAYS),
        ),
        Workload(
            name="mini-imagenet",
            title="MiniImagenet conv 32, max pool, BN, 5-way 1-shot",
            build=lambda: models.mini_imagenet_conv(WAYS),
            samples=_images(3, 84),
            loss="cross_entropy",
            tasks=4,
            support=5,
            query=75,
            steps=5,
            inner_lr=0.01,
            source=_few_shot(3, 84),
        ),
        Workload(
            name="policy",
            title="policy MLP 20-100-100-6, policy gradient",
            build=lambda: models.gaussian_policy_mlp(OBSERVATIONS, ACTIONS),
            samples=_trajectories,
            loss="policy_gradient",
            tasks=40,
            support=4000,
            query=4000,
            steps=1,
            inner_lr=0.1,
        ),
    )
}
