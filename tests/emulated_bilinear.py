"""One bilinear layer on the emulated CUDA backend, called from C, and its oracle.

A driver (tests/emulation/bilinear.cpp) is compiled with the kernels as plain C++. Every
array lies in NaN, so that what is read outside of it shows, and writes are found.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from emulated_build import ROOT, compile_driver
from emulated_signs import packed_signs, unpacked_signs
from torch import Tensor
from torch.nn import functional, grad

PASSES = ("forward", "backward", "tangent_forward", "tangent_backward")
OUTPUTS = (("y",), ("dx", "dw"), ("ty",), ("tdx", "tdw"))
ARITHMETIC = ("scalar", "split_tf32", "tf32", "bfloat16")
PRECISIONS = ("float32", "tf32", "bfloat16")
TILES = ((128, 32), (64, 64), (32, 32), (16, 64), (128, 8))

_INPUTS = ("x", "w", "dy", "tx", "tw", "tdy")
_RESULTS = ("y", "dx", "dw", "ty", "tdx", "tdw")
_INTEGERS = (
    *("pass", "double_precision", "precision", "arithmetic", "tile", "seed"),
    *("tasks", "samples"),
    *("in_height", "in_width", "in_channels"),
    *("out_height", "out_width", "out_channels"),
    *("kernel_y", "kernel_x", "stride_y", "stride_x", "padding_y", "padding_x"),
    *("has_bias", "relu", "relu_input", "bias_offset", "param_count"),
    *("w_stride", "tw_stride", "dw_stride", "dw_base_stride"),
)


class _Call(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _INTEGERS),
        *((name, ctypes.c_void_p) for name in (*_INPUTS, *_RESULTS, "dw_base")),
        *((name, ctypes.c_double) for name in ("weight_scale", "bias_scale")),
        *((n, ctypes.c_void_p) for n in ("weight_rate", "bias_rate", "scratch")),
        *((n, ctypes.c_void_p) for n in ("saved", "saved_below")),
    )


def build(folder: Path, *flags: str, source: Path = ROOT / "csrc") -> ctypes.CDLL:
    """The driver of bilinear layers, with the kernels in ``source``."""
    kernels = sorted((source / "cuda").glob("bilinear*.cu"))
    return compile_driver("bilinear", kernels, folder, *flags, source=source)


# -- memory ----------------------------------------------------------------------------


class Memory:
    """Arrays in the midst of NaN, ``offset`` elements off a boundary of 64 bytes."""

    ROOM = 64

    def __init__(self, dtype: torch.dtype, offset: int = 0) -> None:
        self.dtype, self.offset = dtype, offset
        self._kept: list[tuple[Tensor, Tensor]] = []

    def empty(self, count: int) -> Tensor:
        room = torch.full((count + 3 * self.ROOM,), float("nan"), dtype=self.dtype)
        first = -room.data_ptr() // room.element_size() % 16 + 16 + self.offset
        inside = room[first : first + count]
        self._kept.append((room, inside))
        return inside

    def put(self, values: Tensor) -> Tensor:
        inside = self.empty(values.numel())
        inside.copy_(values.flatten())
        return inside.view(values.shape)

    def check(self) -> None:
        """Raises if something around one of the arrays was written."""
        for room, inside in self._kept:
            first = inside.storage_offset()
            around = room[:first], room[first + inside.numel() :]
            assert all(part.isnan().all() for part in around), "wrote outside an array"


# -- layers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A Linear (height, width and kernel of one) or Conv2d layer and its batch."""

    into: int
    out: int
    samples: int = 3
    tasks: int = 2
    height: int = 1
    width: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    bias: bool = True
    relu: bool = False
    relu_input: bool = False
    shared: bool = False  # one weight for all tasks

    @property
    def out_size(self) -> tuple[int, int]:
        sizes = zip(
            (self.height, self.width),
            self.kernel,
            self.stride,
            self.padding,
            strict=True,
        )
        h, w = ((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
        return h, w

    @property
    def weights(self) -> int:
        return self.kernel[0] * self.kernel[1] * self.into * self.out

    @property
    def bias_offset(self) -> int:
        return -(-self.weights // 16) * 16

    @property
    def param_count(self) -> int:
        return self.bias_offset + (-(-self.out // 16) * 16 if self.bias else 0)

    def __str__(self) -> str:
        size = f"{self.height}x{self.width}-" if self.height * self.width > 1 else ""
        window = "".join(
            f"-{n}{a}x{b}"
            for n, (a, b), plain in (
                ("k", self.kernel, (1, 1)),
                ("s", self.stride, (1, 1)),
                ("p", self.padding, (0, 0)),
            )
            if (a, b) != plain
        )
        flags = "".join(
            f"-{n}" for n in ("relu", "relu_input", "shared") if getattr(self, n)
        )
        return (
            f"{self.tasks}x{self.samples}-{size}{self.into}to{self.out}{window}"
            f"{'' if self.bias else '-no-bias'}{flags}"
        )


Named = dict[str, Tensor]


def values_of(layer: Layer) -> Named:
    """Inputs that float32 can hold, in torch's layouts with tasks first, in float64.

    Returns:
        x, tx [T, N, in, H, W]; dy, tdy [T, N, out, OH, OW]; w, tw, base [T, out, in,
        KH, KW] and b, tb, base_b [T, out], of which all tasks have the same if shared.
    """
    random = torch.Generator().manual_seed(layer.into * 1000 + layer.out)
    batch = layer.tasks, layer.samples
    x = (*batch, layer.into, layer.height, layer.width)
    y = (*batch, layer.out, *layer.out_size)
    w = (layer.tasks, layer.out, layer.into, *layer.kernel)
    b = layer.tasks, layer.out
    shapes = {"x": x, "tx": x, "dy": y, "tdy": y, "w": w, "tw": w, "b": b, "tb": b}
    shapes |= {"base": w, "base_b": b}
    named = {n: torch.randn(s, generator=random).double() for n, s in shapes.items()}
    if layer.shared:
        named |= {n: named[n][:1].expand_as(named[n]) for n in ("w", "b")}
    return named


def wanted(layer: Layer, v: Mapping[str, Tensor], without: Iterable[str] = ()) -> Named:
    """What the passes give, in float64, tasks one after the other.

    ``ty`` is without the mask of a ReLU, which hangs on the signs of the engine's y.

    ``without``: inputs that are left out, of x, w, dy, tx, tw, tdy.
    """
    v = {n: torch.zeros_like(t) if n in without else t for n, t in v.items()}
    if "tw" in without:
        v["tb"] = torch.zeros_like(v["tb"])
    options = layer.stride, layer.padding
    rows: dict[str, list[Tensor]] = {n: [] for n in (*_RESULTS, "db", "tdb")}
    for t in range(layer.tasks):
        x, tx, dy, tdy, w, tw = (v[n][t] for n in ("x", "tx", "dy", "tdy", "w", "tw"))
        b, tb = v["b"][t] * layer.bias, v["tb"][t] * layer.bias
        y = functional.conv2d(x, w, b, *options)
        ty = functional.conv2d(x, tw, tb, *options)
        ty = ty + functional.conv2d(tx, w, None, *options)
        if layer.relu:
            y = y.relu()
        mask = (x > 0) if layer.relu_input else 1

        def into(w, dy, mask=mask, shape=x.shape):
            return grad.conv2d_input(shape, w, dy, *options) * mask

        def weight(x, dy, shape=w.shape):
            return grad.conv2d_weight(x, shape, dy, *options)

        rows["y"].append(y)
        rows["ty"].append(ty)
        rows["dx"].append(into(w, dy))
        rows["dw"].append(weight(x, dy))
        rows["db"].append(dy.sum((0, 2, 3)))
        rows["tdx"].append(into(w, tdy) + into(tw, dy))
        rows["tdw"].append(weight(x, tdy) + weight(tx, dy))
        rows["tdb"].append(tdy.sum((0, 2, 3)))
    return {n: torch.stack(r) for n, r in rows.items()}


# -- the engine's layouts --------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 1, 3, 4, 2).contiguous()


def parameters(layer: Layer, w: Tensor, b: Tensor) -> Tensor:
    """[T, P]: the weight as [kernel pixels, in, out], padding of NaN, the bias."""
    rows = torch.full((len(w), layer.param_count), float("nan"), dtype=w.dtype)
    rows[:, : layer.weights] = w.permute(0, 3, 4, 2, 1).flatten(1)
    if layer.bias:
        rows[:, layer.bias_offset : layer.bias_offset + layer.out] = b
    return rows


@dataclass
class Options:
    """How a pass is called.

    Attributes:
        arithmetic, tile: by name and index; None as the engine chooses.
        precision: of the engine.
        without: inputs that are null, and outputs.
        base: "none", "other" (an array of its own), "same" (that of the result) or
            "direction" (none, and tdw goes where tw is).
        scales: of the weight and the bias.
        rates: likewise in backend memory, or None.
        offset: elements by which arrays are off a boundary of 64 bytes.
        seed: of the order of threads; 0 is in order.
    """

    arithmetic: str | None = None
    tile: int | None = None
    precision: str = "float32"
    without: tuple[str, ...] = ()
    base: str = "none"
    scales: tuple[float, float] = (1.0, 1.0)
    rates: tuple[float, float] | None = None
    offset: int = 0
    seed: int = 0
    dtype: torch.dtype = torch.float64
    passes: tuple[str, ...] = field(default=PASSES)


def _call(layer: Layer, o: Options) -> _Call:
    """All but the pointers."""
    settings = {
        "double_precision": o.dtype == torch.float64,
        "precision": PRECISIONS.index(o.precision),
        "arithmetic": -1 if o.arithmetic is None else ARITHMETIC.index(o.arithmetic),
        "tile": -1 if o.tile is None else o.tile,
        "seed": o.seed,
        "tasks": layer.tasks,
        "samples": layer.samples,
        "in_height": layer.height,
        "in_width": layer.width,
        "in_channels": layer.into,
        "out_height": layer.out_size[0],
        "out_width": layer.out_size[1],
        "out_channels": layer.out,
        "has_bias": layer.bias,
        "relu": layer.relu,
        "relu_input": layer.relu_input,
        "bias_offset": layer.bias_offset if layer.bias else 0,
        "param_count": layer.param_count,
        "w_stride": 0 if layer.shared else layer.param_count,
        "tw_stride": layer.param_count,
        "dw_stride": layer.param_count,
        "dw_base_stride": layer.param_count,
        "weight_scale": o.scales[0],
        "bias_scale": o.scales[1],
    }
    for name in ("kernel", "stride", "padding"):
        y, x = getattr(layer, name)
        settings |= {f"{name}_y": y, f"{name}_x": x}
    call = _Call()
    for name, value in settings.items():
        setattr(call, name, value)
    return call


def parts(library: ctypes.CDLL, layer: Layer) -> int:
    """Parts that the layer's weight gradient is summed in."""
    library.parts.restype = ctypes.c_int64
    return library.parts(ctypes.byref(_call(layer, Options())))


def run(library: ctypes.CDLL, layer: Layer, v: Named, o: Options) -> Named:
    """All passes.

    Returns:
        y, ty [T, N, OH, OW, out] and dx, tdx [T, N, H, W, in], channels last; dw, tdw
        [T, KH, KW, in, out], db, tdb [T, out].
    """
    memory = Memory(o.dtype, o.offset)
    size = 1 if layer.shared else layer.tasks
    inputs = {n: memory.put(channels_last(v[n])) for n in ("x", "tx", "dy", "tdy")}
    inputs["w"] = memory.put(parameters(layer, v["w"][:size], v["b"][:size]))
    inputs["tw"] = memory.put(parameters(layer, v["tw"], v["tb"]))
    base = parameters(layer, v["base"], v["base_b"])
    out = {n: memory.empty(inputs[m].numel()) for n, m in _like()}
    for name in ("dw", "tdw"):
        out[name] = memory.put(base if o.base == "same" else base * float("nan"))
    if o.base == "direction":
        out["tdw"] = inputs["tw"]
    call = _call(layer, o)
    library.scratch_elements.restype = ctypes.c_int64
    scratch = memory.empty(layer.tasks * library.scratch_elements(ctypes.byref(call)))
    call.scratch = scratch.data_ptr()
    library.saved_elements.restype = ctypes.c_int64
    count = library.saved_elements(ctypes.byref(call))
    saved = memory.empty(layer.tasks * count).view(layer.tasks, -1)
    call.saved = saved.data_ptr() if count else None
    if layer.relu_input:
        below = memory.put(packed_signs(inputs["x"].flatten(1, -2), o.dtype))
        call.saved_below = below.data_ptr()
    if o.rates:
        held = [memory.put(torch.tensor([r], dtype=o.dtype)) for r in o.rates]
        call.weight_rate, call.bias_rate = (h.data_ptr() for h in held)
    for name, tensor in inputs.items():
        setattr(call, name, None if name in o.without else tensor.data_ptr())
    apart = memory.put(base) if o.base == "other" else None
    message = ctypes.create_string_buffer(1000)
    for name, results in zip(PASSES, OUTPUTS, strict=True):
        if name not in o.passes:
            continue
        setattr(call, "pass", PASSES.index(name))
        for result in _RESULTS:
            read = result == "y" and name.startswith("tangent")
            used = (result in results and result not in o.without) or read
            setattr(call, result, out[result].data_ptr() if used else None)
        target = results[-1]
        call.dw_base = None
        if target in ("dw", "tdw") and o.base not in ("none", "direction"):
            call.dw_base = (out[target] if apart is None else apart).data_ptr()
        if library.run_pass(ctypes.byref(call), message, len(message)):
            raise RuntimeError(message.value.decode())
    memory.check()
    result = _unpacked(layer, out)
    if layer.relu and "forward" in o.passes:
        rows = result["y"].flatten(1, -2)
        signs = unpacked_signs(saved, rows.shape[1], layer.out)
        assert torch.equal(signs, rows > 0), "signs of a ReLU's outputs"
    return result


def _like() -> list[tuple[str, str]]:
    return [("y", "dy"), ("ty", "dy"), ("dx", "x"), ("tdx", "x")]


def _unpacked(layer: Layer, out: Named) -> Named:
    batch = layer.tasks, layer.samples
    shapes = {
        "x": (*batch, layer.height, layer.width, layer.into),
        "y": (*batch, *layer.out_size, layer.out),
    }
    result = {n: out[n].view(shapes[n[-1]]) for n in ("y", "ty", "dx", "tdx")}
    for n in ("dw", "tdw"):
        rows = out[n].view(layer.tasks, layer.param_count)
        shape = layer.tasks, *layer.kernel, layer.into, layer.out
        result[n] = rows[:, : layer.weights].reshape(shape)
        if layer.bias:
            at = layer.bias_offset
            result[n[:-1] + "b"] = rows[:, at : at + layer.out].clone()
    return result


def in_engine_layout(layer: Layer, named: Named, y: Tensor) -> Named:
    """The oracle's answers as :func:`run` returns them, ``y`` among them."""
    result = {n: channels_last(named[n]) for n in ("y", "ty", "dx", "tdx")}
    if layer.relu:
        result["ty"] = result["ty"] * (y > 0)
    result |= {n: named[n].permute(0, 3, 4, 2, 1) for n in ("dw", "tdw")}
    if layer.bias:
        result |= {n: named[n] for n in ("db", "tdb")}
    return result
