"""What a problem is: a small seeded model, its samples, and the loss on them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastmaml.losses import POLICY_TARGETS
from fastmaml.tasks.batch import TaskBatch

Builder = Callable[[], nn.Module]


@dataclass(frozen=True)
class Problem:
    """A model, what its samples look like, and the loss on them.

    Attributes:
        name: appears in test ids and messages.
        builder: makes the module; call `build`.
        input_shape: of a sample, (F,) or (C, H, W).
        outputs: of the model for a sample.
        loss: a built-in loss.
        reduction: of the loss.
        samples: N to use unless a test has its own.
        not_adapted: says which parameters the inner loop leaves alone.
        inner_lr: a rate at which five steps stay calm.
        seed: of the parameters.
    """

    name: str
    builder: Builder
    input_shape: tuple[int, ...]
    outputs: int
    loss: str = "mse"
    reduction: str = "mean"
    samples: int = 5
    not_adapted: Callable[[nn.Module], set[str]] | None = None
    inner_lr: float = 0.05
    seed: int = 0

    def __str__(self) -> str:
        return self.name

    def build(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The module with seeded parameters."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = self.builder().double()
        generator = torch.Generator().manual_seed(1000 + self.seed)
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                _fill(module, name, p, generator)
        return model.to(dtype)

    def adapted(self, model: nn.Module) -> frozenset[str] | None:
        """Names the inner loop changes; ``None`` means all."""
        if self.not_adapted is None:
            return None
        names = {n for n, _ in model.named_parameters()}
        return frozenset(names - self.not_adapted(model))

    def make(
        self, tasks: int, samples: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Inputs [T, N, ...] and targets of the loss, float64."""
        shape = (tasks, samples)
        x = torch.randn(
            *shape, *self.input_shape, generator=generator, dtype=torch.float64
        )
        if self.loss == "cross_entropy":
            return x, torch.randint(self.outputs, shape, generator=generator)
        size, _ = POLICY_TARGETS.get(self.loss, (lambda outputs: outputs, ""))
        width = size(self.outputs)
        y = torch.randn(*shape, width, generator=generator, dtype=torch.float64)
        if self.loss.startswith("categorical") and self.loss != "categorical_kl":
            y[..., 0] = torch.randint(self.outputs, shape, generator=generator)
        if self.loss == "likelihood_ratio":
            y[..., -1] -= self.outputs  # about what log densities are
        return x, y

    def tasks(
        self, tasks: int = 2, support: int = 0, query: int = 0, seed: int = 0
    ) -> TaskBatch:
        """A meta-batch; support and query sizes differ unless told."""
        generator = torch.Generator().manual_seed(seed)
        support_x, support_y = self.make(tasks, support or self.samples, generator)
        query_x, query_y = self.make(tasks, query or self.samples + 1, generator)
        return TaskBatch(support_x, support_y, query_x, query_y)


def per_task(model: nn.Module, tasks: int, seed: int = 0) -> dict[str, Tensor]:
    """Parameters of every task, [T, ...], each a little off the model's."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, p in model.named_parameters():
        noise = torch.randn(tasks, *p.shape, generator=generator, dtype=torch.float64)
        out[name] = p.detach() + 0.05 * noise.to(p.dtype)
    return out


def direction(model: nn.Module, tasks: int, seed: int = 0) -> dict[str, Tensor]:
    """A random vector of every task, [T, ...], to multiply Hessians with."""
    generator = torch.Generator().manual_seed(7000 + seed)
    return {
        name: torch.randn(tasks, *p.shape, generator=generator, dtype=torch.float64).to(
            p.dtype
        )
        for name, p in model.named_parameters()
    }


@torch.no_grad()
def _fill(module: nn.Module, name: str, p: Tensor, generator: torch.Generator) -> None:
    noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
    norm = isinstance(module, nn.LayerNorm | nn.BatchNorm1d | nn.BatchNorm2d)
    if norm and name == "weight":
        p.copy_(1 + 0.3 * noise)
    elif p.ndim > 1:
        p.copy_(1.2 * noise / math.sqrt(p[0].numel()))
    else:
        p.copy_(0.3 * noise)
