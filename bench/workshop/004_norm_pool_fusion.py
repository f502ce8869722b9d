"""Batch norm, ReLU and max pooling as one layer.

Question:
how much of the time between convolutions is memory traffic that one layer
instead of two would not cause?

Counted, for one image stack of X bytes behind a convolution and its pooled one of X/4
(a write costs twice, since the line is read first):

    forward, two layers    sums X, map X + 2X, pool X + 2 (X/4 + X/4)             6 X
    forward, one           sums and winners X + 2X/4, map X/4 + 2X/4, y        2.25 X
    backward, two layers   clear 2X, scatter 2X + X/2, sums 2X, map 2X + 2X    10.5 X
    backward, one          sums X/2, map X + X/2 + 2X                             4 X

The first layer of MiniImagenet's queries has X = 68 MB: 16.5 X = 1.1 GB a task against
6.25 X = 0.43 GB; four tasks at 32 GB/s: 140 ms against 53 ms on two threads.

Prediction:
the two passes of this layer take 0.4 of the time.

Outcome:
(AMD EPYC, 2 cores, AVX-512, 2026-11-24) This file's network, value and gradient, 5
and 75 images: 0.58 and 0.49 of the time on one thread, 0.45 and 0.55 on two. These
hold the convolution and the linear layer too, so the layer's own ratio is lower, but it
was not measured alone. The MiniImagenet meta-gradient went from 1755 to 1341 ms on one
thread and from 916 to 656 on two, the Omniglot one (which has no pooling: the grouped
reductions alone) from 127 to 104 and from 62.5 to 54.8. Omniglot of linear layers:
inconclusive, runs differed by a quarter.

Decision:
one layer, wherever windows neither overlap nor leave gaps nor are padded.

The code times value and gradient of a network of a cheap convolution and the layers in
question, fused, and with a ReLU written as LeakyReLU(0): the same function, which
nothing joins (one sweep more than the two layers counted above).

    python -m bench.workshop.004_norm_pool_fusion
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

import fastmaml
from fastmaml.compile import compile_module
from fastmaml.engines.native import NativeEngine

CHANNELS, SIZE = 32, 84


def network(relu: nn.Module) -> nn.Module:
    """One block of the MiniImagenet network; the rest is a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, CHANNELS, 1),
        nn.BatchNorm2d(CHANNELS, track_running_stats=False),
        relu,
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(CHANNELS * (SIZE // 2) ** 2, 2),
    )


def seconds(relu: nn.Module, samples: int, tries: int) -> float:
    """Median time of value and gradient of four tasks."""
    model = network(relu)
    program = compile_module(model, "mse", "mean").program
    assert program is not None
    engine = NativeEngine(program, model)
    params = {n: p.detach() for n, p in model.named_parameters()}
    x, y = torch.randn(4, samples, 1, SIZE, SIZE), torch.randn(4, samples, 2)
    times = []
    for _ in range(tries + 1):
        start = time.perf_counter()
        engine.value_and_grad(params, x, y)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def main() -> None:
    """Prints milliseconds of both, for a support and a query set."""
    torch.manual_seed(0)
    for threads in (1, 2):
        fastmaml.set_num_threads(threads)
        for samples, tries in ((5, 21), (75, 3)):
            apart = seconds(nn.LeakyReLU(0.0), samples, tries) * 1e3
            fused = seconds(nn.ReLU(), samples, tries) * 1e3
            print(
                f"{threads} threads, {samples} images: "
                f"apart {apart:.1f} ms, fused {fused:.1f} ms ({fused / apart:.2f})"
            )


if __name__ == "__main__":
    main()
