"""The quick table of ``fastmaml bench``: this machine, the native engine, torch.func.

One second-order meta-gradient on three of the paper's problems with random data,
against ``torch.func`` in its usual form, grad of the mean over vmapped tasks. The two
take turns, and the table shows medians. The full benchmark, with more peers, lives in
``bench/`` of a checkout.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from fastmaml import _native, models
from fastmaml.learners import MAML
from fastmaml.losses import resolve_loss
from fastmaml.tasks import TaskBatch

_MIN_SAMPLE = 0.02  # seconds that one sample lasts at least
_PAUSE = 0.01  # seconds for the other's idle threads to fall asleep

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        title: as in the table.
        build: makes the network.
        loss: its name.
        shape: of one sample.
        tasks: T.
        samples: S and Q.
        steps: K.
        inner_lr: rate of the inner steps.
    """

    title: str
    build: Callable[[], nn.Module]
    loss: str
    shape: tuple[int, ...]
    tasks: int
    samples: int
    steps: int
    inner_lr: float


CASES = (
    Case("sinusoid MLP, 1 step", models.sinusoid_mlp, "mse", (1,), 25, 10, 1, 0.01),
    Case("sinusoid MLP, 5 steps", models.sinusoid_mlp, "mse", (1,), 25, 10, 5, 0.01),
    Case(
        "Omniglot conv, 1 step",
        lambda: models.omniglot_conv(5),
        "cross_entropy",
        (1, 28, 28),
        32,
        5,
        1,
        0.4,
    ),
)


@dataclass(frozen=True)
class Row:
    """Medians of one case.

    Attributes:
        title: of the case.
        native: milliseconds, or ``None`` without the native engine.
        torch_func: milliseconds.
    """

    title: str
    native: float | None
    torch_func: float


def _batch(case: Case) -> TaskBatch:
    generator = torch.Generator().manual_seed(0)

    def draw() -> tuple[Tensor, Tensor]:
        x = torch.rand((case.tasks, case.samples, *case.shape), generator=generator)
        if case.loss == "mse":
            return x, torch.sin(x)
        return x, torch.arange(case.samples).repeat(case.tasks, 1)

    return TaskBatch(*draw(), *draw())


def _native_call(case: Case, model: nn.Module, tasks: TaskBatch) -> Call:
    kept = models.batch_norm_parameters(model)
    learner = MAML(
        model,
        loss=case.loss,
        inner_lr=case.inner_lr,
        inner_steps=case.steps,
        adapted=lambda name: name not in kept,
        engine="native",
    )

    def call() -> None:
        model.zero_grad()
        learner.meta_loss(tasks).backward()

    return call


def _torch_func_call(case: Case, model: nn.Module, tasks: TaskBatch) -> Call:
    kept = models.batch_norm_parameters(model)
    params = {n: p.detach() for n, p in model.named_parameters()}
    loss_fn = resolve_loss(case.loss).function

    def task_loss(theta: dict, rest: dict, x: Tensor, y: Tensor) -> Tensor:
        return loss_fn(functional_call(model, {**rest, **theta}, (x,)), y)

    def mean_loss(params: dict) -> Tensor:
        def one(sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
            theta = {n: p for n, p in params.items() if n not in kept}
            for _ in range(case.steps):
                g = grad(task_loss)(theta, params, sx, sy)
                theta = {n: p - case.inner_lr * g[n] for n, p in theta.items()}
            return task_loss(theta, params, qx, qy)

        batch = (tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y)
        return torch.vmap(one)(*batch).mean()

    return lambda: grad(mean_loss)(params)


def _seconds(call: Call, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def _medians(calls: Sequence[Call], rounds: int) -> list[float]:
    """Median seconds of each call, taking turns."""
    for call in calls:
        call()
    repeats = [max(1, round(_MIN_SAMPLE / _seconds(call))) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, taken in zip(calls, repeats, samples, strict=True):
            time.sleep(_PAUSE)
            call()
            taken.append(_seconds(call, count))
    return [statistics.median(taken) for taken in samples]


def measure(case: Case, rounds: int = 10) -> Row:
    """Times one case.

    Args:
        case: of ``CASES``, or one's own.
        rounds: samples of each contender.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = case.build()
    tasks = _batch(case)
    calls = [_torch_func_call(case, model, tasks)]
    if _native.unavailable() is None:
        calls.append(_native_call(case, model, tasks))
    milliseconds = [1e3 * seconds for seconds in _medians(calls, rounds)]
    native = milliseconds[1] if len(milliseconds) > 1 else None
    return Row(case.title, native, milliseconds[0])


def table(rows: Sequence[Row]) -> str:
    """Returns the rows as text, a line each."""
    lines = [f"{'one meta-gradient':<24}{'native':>12}{'torch.func':>12}{'ratio':>9}"]
    for row in rows:
        native = "-" if row.native is None else f"{row.native:.3f} ms"
        ratio = "-" if row.native is None else f"{row.torch_func / row.native:.1f}x"
        lines.append(
            f"{row.title:<24}{native:>12}{f'{row.torch_func:.3f} ms':>12}{ratio:>9}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs ``fastmaml bench``.

    Returns:
        The exit code: 0, or 1 if the native engine is missing.
    """
    parser = argparse.ArgumentParser(
        prog="fastmaml bench", description="A quick table of speeds on this machine."
    )
    parser.add_argument(
        "--rounds", type=int, default=10, help="samples of each (default 10)"
    )
    rounds = parser.parse_args(arguments).rounds
    if rounds < 1:
        parser.error(f"--rounds {rounds}: expected at least 1")
    reason = _native.unavailable()
    print(table([measure(case, rounds) for case in CASES]))
    print(
        f"medians of {rounds} turns, float32, second order, "
        f"{torch.get_num_threads()} threads"
    )
    if reason is not None:
        print(reason)
    return int(reason is not None)
