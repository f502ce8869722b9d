"""Layers and operations of the emulated CUDA backend, called from C, and their oracle.

A driver (tests/emulation/layers.cpp) is compiled with the kernels as plain C++. Every
array lies in NaN, so that what is read outside of it shows, and writes are found.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from emulated_bilinear import PASSES
from emulated_bilinear import Memory as NanMemory
from emulated_build import ROOT, compile_driver
from torch import Tensor

KERNELS = ("elementwise", "batch_norm", "batch_norm_pool", "layer_norm", "pool")
KERNELS += ("append", "loss", "vector_ops", "optimizer", "sampling")
KINDS = (
    *("bilinear", "batch_norm", "batch_norm_pool", "layer_norm", "relu", "leaky_relu"),
    *("tanh", "sigmoid", "silu", "gelu", "gelu_tanh", "elu", "softplus", "max_pool"),
    *("average_pool", "append_parameter"),
)
INPUTS = ("x", "w", "dy", "tx", "tw", "tdy")
RESULTS = (("y",), ("dx", "dw"), ("ty",), ("tdx", "tdw"))

Pair = tuple[int, int]


class _Layer(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_int64 * 3) for name in ("into", "out")),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "padding")),
        *((n, ctypes.c_int64) for n in ("has_weight", "has_bias", "relu")),
        *((n, ctypes.c_int64) for n in ("bias_offset", "param_count")),
        *((n, ctypes.c_double) for n in ("eps", "alpha")),
    )


_COUNTS = ("double_precision", "tasks", "samples", "w_stride", "tw_stride", "dw_stride")
_POINTERS = (*INPUTS, "y", "dx", "dw", "ty", "tdx", "tdw", "saved", "scratch")


class _Buffers(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


class Memory(NanMemory):
    """Results lie among other NaN than inputs do, so that a NaN written there shows."""

    def empty(self, count: int) -> Tensor:
        """Room for a result."""
        inside = super().empty(count)
        self._bits(self._kept[-1][0]).fill_(-1)
        return inside

    def put(self, values: Tensor) -> Tensor:
        """A copy of an input."""
        inside = super().empty(values.numel())
        inside.copy_(values.flatten())
        return inside.view(values.shape)

    def check(self) -> None:
        """Raises if something around one of the arrays was written."""
        for room, inside in self._kept:
            first = inside.storage_offset()
            around = (room[:first], room[first + inside.numel() :])
            bits = self._bits(torch.cat(around))
            assert (bits == bits[0]).all(), "wrote outside an array"

    @staticmethod
    def _bits(values: Tensor) -> Tensor:
        whole = {torch.float32: torch.int32, torch.float64: torch.int64}
        return values.view(whole[values.dtype])


# -- the driver ------------------------------------------------------------------------


class Driver:
    """The compiled driver; tensors become pointers, and failures errors."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        library.last_error.restype = ctypes.c_char_p
        for name in ("saved", "scratch", "loss_scratch"):
            getattr(library, f"{name}_elements").restype = ctypes.c_int64

    def call(self, name: str, *arguments: Any) -> None:
        if getattr(self.library, name)(*map(_argument, arguments)):
            raise RuntimeError(self.library.last_error().decode())


def _argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool | int):
        return ctypes.c_uint64(value) if value >= 1 << 63 else ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):
        return pointers(value)
    return value


def pointers(tensors: list[Tensor | None]) -> Any:
    """An array of addresses."""
    addresses = [None if t is None else t.data_ptr() for t in tensors]
    return (ctypes.c_void_p * len(tensors))(*addresses)


def build(folder: Path, *flags: str, source: Path = ROOT / "csrc") -> Driver:
    """The driver of layers and operations, with the kernels in ``source``."""
    kernels = [source / "cuda" / f"{name}.cu" for name in KERNELS]
    library = compile_driver("layers", kernels, folder, *flags, source=source)
    library.shuffle(ctypes.c_int64(0))  # whoever had it before may have left an order
    return Driver(library)


# -- layers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer, its batch, and the same in torch.

    Attributes:
        kind: one of ``KINDS``.
        shape: height, width, channels of a sample.
        function: from x [N, H, W, C], scale or parameter, and shift (or ``None``) to
            the output of one task.
        weight, bias: how many elements of each.
    """

    kind: str
    shape: tuple[int, int, int]
    function: Callable[[Tensor, Tensor | None, Tensor | None], Tensor]
    out: tuple[int, int, int]
    weight: int = 0
    bias: int = 0
    samples: int = 3
    tasks: int = 2
    kernel: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    relu: bool = False
    eps: float = 0.0
    alpha: float = 0.0
    shared: bool = False
    name: str = ""

    def __str__(self) -> str:
        size = "x".join(map(str, self.shape))
        return "-".join(filter(None, (self.kind, self.name, size, str(self.samples))))

    @property
    def bias_offset(self) -> int:
        return -(-self.weight // 16) * 16

    @property
    def param_count(self) -> int:
        return self.bias_offset + -(-self.bias // 16) * 16

    def parameters(self, w: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias out of parameters [P]."""
        first = self.bias_offset
        weight = w[: self.weight] if self.weight else None
        return weight, w[first : first + self.bias] if self.bias else None


def random_inputs(layer: Layer) -> dict[str, Tensor]:
    """Inputs of all passes, float64 that float32 can hold, NaN between parameters."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).double()

    batch = layer.tasks, layer.samples
    rows = 1 if layer.shared else layer.tasks
    values = {name: draw(*batch, *layer.shape) for name in ("x", "tx")}
    values |= {name: draw(*batch, *layer.out) for name in ("dy", "tdy")}
    for name in ("w", "tw"):
        w = torch.full((rows, layer.param_count), float("nan"), dtype=torch.float64)
        for part in layer.parameters(w[0]):
            if part is not None:
                first = part.storage_offset()
                w[:, first : first + part.numel()] = draw(rows, part.numel())
        values[name] = w
    return values


def oracle(layer: Layer, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """All results in float64, by torch's forward over reverse differentiation."""
    rows = []
    for t in range(layer.tasks):
        r = 0 if layer.shared else t
        x, dy, tx, tdy = (values[n][t] for n in ("x", "dy", "tx", "tdy"))
        w, tw = (
            tuple(p for p in layer.parameters(values[n][r]) if p is not None)
            for n in ("w", "tw")
        )

        def run(x: Tensor, *w: Tensor) -> Tensor:
            parts = list(w)
            weight = parts.pop(0) if layer.weight else None
            return layer.function(x, weight, parts.pop(0) if layer.bias else None)

        def reverse(x: Tensor, dy: Tensor, *w: Tensor) -> tuple[Tensor, ...]:
            return torch.func.vjp(run, x, *w)[1](dy)

        y, ty = torch.func.jvp(run, (x, *w), (tx, *tw))
        adjoint, tangent = torch.func.jvp(reverse, (x, dy, *w), (tx, tdy, *tw))
        rows.append((y, ty, adjoint, tangent))
    results = {
        "y": torch.stack([r[0] for r in rows]),
        "ty": torch.stack([r[1] for r in rows]),
        "dx": torch.stack([r[2][0] for r in rows]),
        "tdx": torch.stack([r[3][0] for r in rows]),
    }
    if layer.param_count:
        results["dw"] = torch.stack([torch.cat(r[2][1:]) for r in rows])
        results["tdw"] = torch.stack([torch.cat(r[3][1:]) for r in rows])
    return results


def run(
    driver: Driver,
    layer: Layer,
    values: dict[str, Tensor],
    dtype: torch.dtype,
    *,
    offset: int = 0,
    seed: int = 0,
    without: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """All four passes, in order.

    Args:
        driver: the compiled kernels.
        layer: which.
        values: of ``random_inputs``.
        dtype: float64 or float32.
        offset: elements that every array lies off a boundary of 64 bytes.
        seed: shuffles the order of blocks and threads; 0 keeps it.
        without: inputs or outputs that are null.
    """
    c = _Layer(
        kind=KINDS.index(layer.kind),
        into=layer.shape,
        out=layer.out,
        kernel=layer.kernel,
        stride=layer.stride,
        padding=layer.padding,
        has_weight=layer.weight > 0,
        has_bias=layer.bias > 0,
        relu=layer.relu,
        bias_offset=layer.bias_offset,
        param_count=layer.param_count,
        eps=layer.eps,
        alpha=layer.alpha,
    )
    memory, aligned = Memory(dtype, offset), Memory(dtype)
    P, batch = layer.param_count, (layer.tasks, layer.samples)
    shapes = {"y": (*batch, *layer.out), "dx": (*batch, *layer.shape)}
    shapes |= {"ty": shapes["y"], "tdx": shapes["dx"]}
    shapes |= {name: (layer.tasks, P) for name in ("dw", "tdw") if P}
    arrays = {n: memory.put(v.to(dtype)) for n, v in values.items() if v.numel()}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        arrays[name] = memory.empty(count).view(shape)
    for name, owner in (("saved", memory), ("scratch", aligned)):
        count = getattr(driver.library, f"{name}_elements")(
            ctypes.byref(c), ctypes.c_int64(layer.samples)
        )
        if count:
            arrays[name] = owner.empty(layer.tasks * count)
    before = {name: arrays[name].clone() for name in INPUTS if name in arrays}
    b = _Buffers(
        double_precision=dtype == torch.float64,
        tasks=layer.tasks,
        samples=layer.samples,
        dw_stride=P,
        **{name: 0 if layer.shared else P for name in ("w_stride", "tw_stride")},
        **{n: a.data_ptr() for n, a in arrays.items() if n not in without},
    )
    driver.library.shuffle(ctypes.c_int64(seed))
    for index in range(len(PASSES)):
        driver.call("layer_pass", ctypes.byref(c), ctypes.byref(b), index)
    memory.check()
    aligned.check()
    for name, value in before.items():
        assert torch.equal(value.nan_to_num(), arrays[name].nan_to_num()), name
    results = {n: arrays[n] for names in RESULTS for n in names if n in arrays}
    for name in ("dw", "tdw"):
        if name in results:
            parts = [
                layer.parameters(row) for row in results[name].view(layer.tasks, P)
            ]
            results[name] = torch.stack(
                [torch.cat([p for p in pair if p is not None]) for pair in parts]
            )
    return {n: r for n, r in results.items() if n not in without}
