"""What a meta-gradient costs at least, and what the machine can do at most.

Arithmetic counts matrix products and convolutions, 2 operations a multiply-add, with
the padding's taps included; everything else in these networks is a percent of it.
With F the multiply-adds of a forward pass over one sample and F1 those of its first
layer:

    gradient                 3F - F1    forward, dw, and dx of all layers but the first
    Hessian-vector product   6F - 4F1   every product has two operands that carry
                                        tangents; inputs carry none, so the first
                                        layer has one product less in the tangent of
                                        the forward pass and in tdw, and no tdx
    meta-gradient            T (K S (gradient + product) + Q gradient)

The gradient of step k is counted once: the product reuses its activations.

Traffic counts passes over arrays of the parameters' size, each read or written once in
a pass. With P bytes of parameters, R those behind the first product:

    inner step        3P         forward reads theta; backward too, and writes the next
    query gradient    2P + R     forward reads theta; backward reads R of it for the
                                 adjoints of inputs and writes lambda
    chain step        3P + 2R    both tangent passes read lambda and R of theta; the
                                 second writes lambda
    mean              P          reads lambda
    meta-gradient     T (K (6P + 2R) + 3P + R)

Between two passes over an array a thread sees its K + 1 thetas and lambda. Where these
are more than a cache keeps, the next level has to deliver them.

Both are counts of the direct method, the same yardstick for all contenders. fastmaml's
engine does less on the CPU where it can: Winograd's filtering takes 16 multiply-adds of
a 3 x 3 convolution's 36 (csrc/cpu/winograd.inl.h), and layers with factored updates
(csrc/meta/factored.h) move no theta or lambda of a task at all. More than 100% of
either bound is possible then.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench.roofline import Ceilings
from bench.timing import finishing, time_call
from bench.workloads import Workload

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Forward:
    """Multiply-adds of one sample's forward pass.

    Attributes:
        total: F, all layers.
        first: F1, the first layer.
    """

    total: int
    first: int


@dataclass(frozen=True)
class Cost:
    """The least a meta-gradient takes, in float32.

    Attributes:
        flops: operations, a multiply-add counting two.
        data_bytes: support and query samples with their targets.
        parameter_bytes: one copy of the parameters.
        copies_bytes: a copy for each of T tasks and K inner steps.
        traffic_bytes: read and written by all passes over parameters.
        resident_bytes: of one task in work, which passes go over again and again.
    """

    flops: int
    data_bytes: int
    parameter_bytes: int
    copies_bytes: int
    traffic_bytes: int = 0
    resident_bytes: int = 0

    @property
    def bytes(self) -> int:
        """Least traffic: data and parameters read once, the gradient written."""
        return self.data_bytes + 2 * self.parameter_bytes


@contextmanager
def _observed(model: nn.Module, counts: list[int]) -> Iterator[None]:
    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(module, nn.Linear):
            counts.append(output[0].numel() * module.in_features)
        elif isinstance(module, nn.Conv2d):
            taps = math.prod(module.kernel_size) * module.in_channels
            counts.append(output[0].numel() * taps // module.groups)

    handles = [m.register_forward_hook(count) for m in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def forward_cost(model: nn.Module, x: Tensor) -> Forward:
    """Counts the multiply-adds of a model on one sample.

    Args:
        model: with ``nn.Linear`` and ``nn.Conv2d`` for its products.
        x: [N, ...] samples, N of at least 1.
    """
    counts: list[int] = []
    with _observed(model, counts), torch.no_grad():
        model(x)
    return Forward(sum(counts), counts[0] if counts else 0)


def meta_gradient_macs(
    forward: Forward, *, tasks: int, support: int, query: int, steps: int
) -> int:
    """Multiply-adds of a second-order meta-gradient (formula at the file's top)."""
    gradient = 3 * forward.total - forward.first
    product = 6 * forward.total - 4 * forward.first
    return tasks * (steps * support * (gradient + product) + query * gradient)


def traffic(parameters: int, first: int, *, tasks: int, steps: int) -> int:
    """Bytes that a meta-gradient's passes move (formula at the file's top).

    Args:
        parameters: P, bytes.
        first: those of the first product's weights.
        tasks: T.
        steps: K.
    """
    rest = parameters - first
    return tasks * (steps * (6 * parameters + 2 * rest) + 3 * parameters + rest)


@dataclass(frozen=True)
class MemoryBound:
    """The least time that memory allows.

    Attributes:
        level: L2, L3 or memory, which has to deliver the parameters.
        seconds: of one meta-gradient.
        binds: whether arithmetic alone would take less.
    """

    level: str
    seconds: float
    binds: bool


def memory_bound(spent: Cost, ceilings: Ceilings, threads: int) -> MemoryBound:
    """Relates traffic and arithmetic to what all threads reach together.

    Args:
        spent: of one meta-gradient.
        ceilings: of one core.
        threads: at work, each on a core of its own.
    """
    level = "memory"
    for name, capacity in ceilings.capacity.items():
        sharers = 1 if name == "L2" else threads
        if name != "L1" and spent.resident_bytes * sharers <= capacity:
            level = name
            break
    seconds = spent.traffic_bytes / (threads * ceilings.bandwidth[level])
    arithmetic = spent.flops / (threads * ceilings.operations)
    return MemoryBound(level, seconds, seconds > arithmetic)


def _first_weights(model: nn.Module) -> int:
    """Elements of the first product's weights."""
    products = (m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d))
    return next(products).weight.numel()


def cost(workload: Workload) -> Cost:
    """Counts what one meta-gradient of a workload takes at least."""
    model = workload.model()
    one = workload.resized(tasks=1).batch()
    parameters = sum(p.numel() for p in model.parameters()) * FLOAT_BYTES
    tensors = (one.support_x, one.support_y, one.query_x, one.query_y)
    data = sum(t.numel() * t.element_size() for t in tensors)
    macs = meta_gradient_macs(
        forward_cost(model, one.support_x[0]),
        tasks=workload.tasks,
        support=workload.support,
        query=workload.query,
        steps=workload.steps,
    )
    return Cost(
        flops=2 * macs,
        data_bytes=workload.tasks * data,
        parameter_bytes=parameters,
        copies_bytes=workload.tasks * workload.steps * parameters,
        traffic_bytes=traffic(
            parameters,
            FLOAT_BYTES * _first_weights(model),
            tasks=workload.tasks,
            steps=workload.steps,
        ),
        resident_bytes=(workload.steps + 2) * parameters,
    )


def waits(device: str) -> Callable[[object], object] | None:
    """Returns what waits for a device's work, ``None`` where calls return when done."""
    return None if device == "cpu" else lambda _: torch.cuda.synchronize(device)


def matrix_peak(
    size: int = 2048, repeats: int = 8, threads: int | None = None, device: str = "cpu"
) -> float:
    """Measures the best float32 matrix product, in operations a second.

    Torch's own product of two square matrices: what a library reaches here, not what
    the data sheet says.

    Args:
        size: of the matrices.
        repeats: of which the best counts.
        threads: of torch, by default as many as it has.
        device: of the matrices; on a GPU, TF32 is as torch is told.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        a, b, out = (torch.rand(size, size, device=device) for _ in range(3))
        call = finishing(lambda: torch.mm(a, b, out=out), waits(device))
        time_call(call, 1)
        best = min(time_call(call, 1) for _ in range(repeats))
    finally:
        torch.set_num_threads(before)
    return 2 * size**3 / best


def copy_bandwidth(
    megabytes: int = 256, repeats: int = 5, device: str = "cpu"
) -> float:
    """Measures the best copy in memory, bytes read plus written a second."""
    source = torch.rand(megabytes * 2**20 // FLOAT_BYTES, device=device)
    target = torch.empty_like(source)
    call = finishing(lambda: target.copy_(source), waits(device))
    time_call(call, 1)
    best = min(time_call(call, 1) for _ in range(repeats))
    return 2 * source.numel() * FLOAT_BYTES / best


def percent_of_peak(flops: int, seconds: float, peak: float) -> float:
    """Share of the measured matrix-product peak, in percent."""
    return 100 * flops / (seconds * peak)
