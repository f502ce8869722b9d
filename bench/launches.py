"""What one meta-gradient launches on a GPU: bytes and operations of each launch.

The launches are recorded, not guessed: an extension built with
``FASTMAML_CUDA=EMULATED`` goes through the whole call at its true size and notes every
kernel with its grid, block and shared memory instead of running it. Bytes and
operations are counted from the layer's shapes, per launch:

    bytes        every tensor that the kernel reads or writes, once; what a block reads
                 again from a cache, and the zeros of padded tiles, are not counted
    operations   those of matrix products, two a multiply-add, as in ``bench.cost``;
                 everything else is bound by memory

A pass of a product becomes up to three launches: inputs (dx), weights (dw), and a sum
over the parts that a long weight gradient is cut into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bench import contenders, cost
from bench.workloads import Workload
from fastmaml import _native
from fastmaml.engines.placement import missing
from fastmaml.optim import Adam

BACKEND = "cuda_emulated"
FLOAT = 4  # bytes
SCALAR, SPLIT_TF32 = "fp32", "3xtf32"  # units that multiply
LEAST = 4  # of columns and depth: narrower products are not for tensor cores
RESIDENT = "resident_task_kernel"  # does whole tasks, and another means over them
ADJOINTS = "bilinear_adjoints_kernel"  # dw and dx of a layer, by one launch
TOGETHER = ("weights", "inputs")
MEAN = "resident_mean_kernel"

Facts = dict[str, int]
Operation = tuple[str, str, Facts]  # what, pass, facts
Recorded = tuple[int, str, tuple[int, int, int], int, int]


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: name, without template arguments.
        form: of a product: ``outputs``, ``inputs``, ``weights``, or the last two
            together, ``adjoints``; else empty.
        operation: what asked for it: "bilinear backward".
        blocks: of the grid.
        block: threads.
        shared: dynamic shared memory of a block, bytes.
        bytes: read and written.
        flops: of matrix products.
        unit: that multiplies: ``fp32`` or ``3xtf32``.
        loads: packs that a thread asks memory for before it needs the first.
        early: behind another launch of ours, so that a GPU of compute capability 9.0
            or later begins it early (csrc/cuda/early_launch.h).
    """

    kernel: str
    form: str
    operation: str
    blocks: int
    block: int
    shared: int
    bytes: int
    flops: int
    unit: str = SCALAR
    loads: int = 1
    early: bool = False


@dataclass(frozen=True)
class Share:
    """What one launch of an operation does: form, bytes, operations, unit."""

    form: str
    elements: int
    flops: int = 0
    unit: str = SCALAR


def _unit(columns: int, depth: int) -> str:
    return SPLIT_TF32 if min(columns, depth) >= LEAST else SCALAR


def _product(kind: str, f: Facts) -> list[Share]:
    """The launches of one pass of Linear or Conv2d, in their order."""
    tasks, samples = f["tasks"], f["samples"]
    x, y = (tasks * samples * f[side] for side in ("in", "out"))
    own = tasks * f["parameters"]
    w = own if f["own_w"] else f["parameters"]
    flops = 2 * tasks * samples * f["multiply_adds"]
    depth = f["multiply_adds"] // max(1, f["out"])  # taps times channels
    forward = _unit(f["channels_out"], depth)
    signs = tasks * f["saved"]  # a ReLU's own, a bit an output
    if kind == "forward":
        return [Share("outputs", x + w + y + signs, flops, forward)]
    if kind == "tangent_forward":
        second = (x + w) * f["tx"]
        pairs = f["tx"] + f["tw"]
        read = (x + own) * f["tw"] + second + signs
        return [Share("outputs", read + y, pairs * flops, forward)]
    tangent = kind == "tangent_backward"
    dx, dw = (f["tdx"], f["tdw"]) if tangent else (f["dx"], f["dw"])
    shares = []
    if dx:
        second = tangent and f["tw"]
        below = x // f["channels_in"] * -(-f["channels_in"] // 32)
        read = y + w + (y + own if second else 0) + below * f["relu_input"]
        unit = _unit(f["channels_in"], LEAST * f["channels_out"])
        shares.append(Share("inputs", read + x, (1 + second) * flops, unit))
    if dw:
        second = tangent and f["tx"]
        # a norm's adjoint mapped here: from y, the windows' winners and their adjoints
        read = (x + y) * (1 + second) + 2 * tasks * samples * f["pooled"]
        unit = _unit(f["channels_out"], samples * f["out"] // f["channels_out"])
        out = own * (f["parts"] if f["parts"] > 1 else 1 + f["base"])
        shares.append(Share("weights", read + out, (1 + second) * flops, unit))
        if f["parts"] > 1:
            shares.append(Share("", own * (f["parts"] + 1 + f["base"])))
    return shares


# tensors of x's and of y's size that a pass reads or writes
_PASSES = {
    "forward": (1, 1),
    "backward": (2, 1),
    "tangent_forward": (2, 1),
    "tangent_backward": (3, 2),
}
_BY_INDEX = {kind: (1, 1) for kind in _PASSES}
_COPIES = ("max_pool", "average_pool", "append_parameter")  # read one, write the other
_BY_MASK = {**_PASSES, "tangent_backward": (2, 1)}  # ReLU's second derivative is zero


def _plain(what: str, kind: str, f: Facts) -> int:
    """Elements that a pass of any other layer moves."""
    x, y = (f["tasks"] * f["samples"] * f[side] for side in ("in", "out"))
    table = {"relu": _BY_MASK, **dict.fromkeys(_COPIES, _BY_INDEX)}
    if what == "batch_norm_pool" and kind == "backward" and not f["dx"]:
        return 2 * y + f["tasks"] * f["parameters"]  # sums over the winners alone
    if what == "batch_norm":  # a mean over images above it
        y = f["tasks"] * f["samples"] * (f["pooled"] or f["out"])
    of_x, of_y = table.get(what, _PASSES)[kind]
    if kind == "backward" and not f["dx"]:
        of_x -= 1
    if kind == "tangent_backward" and not f["tdx"]:
        of_x -= 1
    return of_x * x + of_y * y + f["tasks"] * (f["saved"] + f["parameters"])


_BY_ADAM = 4  # packs of parameter, gradient, both moments: AdamElement, optimizer.cu

# Packs of a row (RowSweep::at, norm.cuh) or a pixel (CellSweep, batch_norm_pool.cu).
_LOADS = {
    "batch_norm": (1, 2, 2, 4),
    "batch_norm_pool": (1, 1, 2, 2),
}


def loads(operation: Operation) -> int:
    """``Launch.loads`` of an operation's kernels."""
    what, kind, _ = operation
    if (what, kind) == ("optimizer", "adam"):
        return _BY_ADAM
    return dict(zip(_PASSES, _LOADS[what], strict=True))[kind] if what in _LOADS else 1


def shares(operation: Operation) -> list[Share]:
    """What the launches of an operation do, in their order."""
    what, kind, f = operation
    if what == "bilinear":
        return _product(kind, f)
    if what in ("vector", "optimizer"):
        return [Share("", f["elements"])]
    if what == "loss":  # outputs, targets and gradient, or outputs and two tangents
        return [Share("", 3 * f["tasks"] * f["samples"] * f["out"])]
    return [Share("", _plain(what, kind, f))]


def _name(kernel: str) -> str:
    return kernel.lstrip("(").partition("<")[0].partition("(")[0]


def _spread(found: Sequence[Share], kernels: Sequence[Recorded]) -> list[Share]:
    """A share for every launch; what has fewer shares is done by the largest launch."""
    if kernels and _name(kernels[0][1]) == ADJOINTS:
        weights, inputs = (next(s for s in found if s.form == f) for f in TOGETHER)
        elements, flops = (
            weights.elements + inputs.elements,
            weights.flops + inputs.flops,
        )
        both = Share("adjoints", elements, flops, weights.unit)
        found = [both, *(s for s in found if not s.form)]
    if len(found) == len(kernels):
        return list(found)
    if len(found) == len(kernels) + 1 and not found[-1].form:
        return list(found[:-1])  # one part after all: nothing to add up
    if len(found) != 1:
        names = [_name(k[1]) for k in kernels]
        raise ValueError(f"launches {names}: expected {len(found)}, got {len(kernels)}")
    largest = max(range(len(kernels)), key=lambda i: kernels[i][2][0])
    return [found[0] if i == largest else Share("", 0) for i in range(len(kernels))]


def counted(
    operations: Sequence[Operation], recorded: Sequence[Recorded], whole: cost.Cost
) -> list[Launch]:
    """Counts what a recording's launches move and multiply.

    Args:
        operations: of the recording.
        recorded: launches: (operation, kernel, grid, block, shared bytes).
        whole: what the whole meta-gradient takes, for kernels that do all of it.

    Raises:
        ValueError: if an operation has become other launches than are known.
    """
    launches = []
    groups: dict[int, list[Recorded]] = {}
    for one in recorded:
        resident = _name(one[1]) in (RESIDENT, MEAN)
        groups.setdefault(-2 if resident else one[0], []).append(one)
    for index, kernels in groups.items():
        if index < 0:
            label = "whole tasks"
            nothing, all_of_it = (
                Share("", 0),
                Share("", whole.bytes // FLOAT, whole.flops),
            )
            parts = [all_of_it if _name(k[1]) == RESIDENT else nothing for k in kernels]
            packs = 1
        else:
            label = " ".join(operations[index][:2])
            parts = _spread(shares(operations[index]), kernels)
            packs = loads(operations[index])
        for (_, kernel, grid, block, shared), share in zip(kernels, parts, strict=True):
            launches.append(
                Launch(
                    kernel=_name(kernel),
                    form=share.form,
                    operation=label,
                    blocks=grid[0] * grid[1] * grid[2],
                    block=block,
                    shared=shared,
                    bytes=FLOAT * share.elements,
                    flops=share.flops,
                    unit=share.unit,
                    loads=packs,
                    early=bool(launches),
                )
            )
    return launches


def record(workload: Workload, memory: str = "auto") -> list[Launch]:
    """Launches of one meta-gradient followed by Adam, which is the last operation.

    Args:
        workload: at the size that counts.
        memory: of the learner; ``keep`` goes from layer to layer even where whole tasks
            could be done in one launch.

    Raises:
        RuntimeError: if the extension has no emulated CUDA to record with.
    """
    if reason := missing(BACKEND):
        raise RuntimeError(f"{reason}; build it with FASTMAML_CUDA=EMULATED")
    core = _native.core()
    model = workload.model()
    learner = contenders.make_learner(workload, BACKEND, model, memory=memory)
    optimizer = Adam(model.parameters(), lr=contenders.OUTER_RATE)
    optimizer._backend = BACKEND
    tasks = workload.batch()
    core.begin_recording()
    try:
        learner.backward(tasks, accumulate=False)
        optimizer.step()
    finally:
        operations, recorded = core.end_recording()
    return counted(operations, recorded, cost.cost(workload))
