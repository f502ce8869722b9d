"""Shapes of one sample through a program, before any engine sees it."""

from __future__ import annotations

import math

from fastmaml.compile.program import LayerSpec, LoweredProgram

Shape = tuple[int, ...]


def infer_shapes(program: LoweredProgram, input_shape: Shape) -> list[Shape]:
    """Shapes of a sample before the first and after every layer.

    Args:
        program: as compiled.
        input_shape: of one sample, such as (1, 28, 28).

    Raises:
        ValueError: where a layer can't take what it gets, naming it.
    """
    shapes = [tuple(input_shape)]
    for layer in program.layers:
        shapes.append(_after(layer, shapes[-1]))
    if _is_flattened_image(program, shapes):
        raise ValueError(
            "the outputs are a flattened image, whose order the native engine does not "
            "keep; end the model with a Linear layer"
        )
    if len(shapes[-1]) != 1:
        raise ValueError(
            f"loss {program.loss.kind} got outputs {list(shapes[-1])} for a sample, "
            "expected a flat [O]"
        )
    return shapes


def _is_flattened_image(program: LoweredProgram, shapes: list[Shape]) -> bool:
    """Whether the pixels of an image reach the end with no Linear layer between."""
    image = False
    for layer, shape in zip(program.layers, shapes, strict=False):
        if layer.kind == "flatten":
            image = image or (len(shape) == 3 and math.prod(shape[1:]) > 1)
        elif layer.kind == "linear":
            image = False
    return image


def _after(layer: LayerSpec, shape: Shape) -> Shape:
    a = layer.attributes
    if layer.kind == "linear":
        _expect(layer, shape, shape == (a["in_features"],), f"[{a['in_features']}]")
        return (int(a["out_features"]),)  # type: ignore[arg-type]
    if layer.kind in ("conv2d", "max_pool2d", "avg_pool2d"):
        return _window(layer, shape)
    if layer.kind == "batch_norm":
        fits = len(shape) in (1, 3) and shape[0] == a["features"]
        wanted = f"[{a['features']}] or [{a['features']}, H, W]"
        _expect(layer, shape, fits, wanted)
    elif layer.kind == "layer_norm":
        wanted = f"{list(a['shape'])}: all features of a sample"  # type: ignore[arg-type]
        _expect(layer, shape, shape == a["shape"], wanted)
    elif layer.kind == "global_avg_pool":
        _expect(layer, shape, len(shape) == 3, "[C, H, W]")
        return (shape[0], 1, 1)
    elif layer.kind == "flatten":
        return (math.prod(shape),)
    elif layer.kind == "append_parameter":
        _expect(layer, shape, len(shape) == 1, "[F]")
        return (shape[0] + int(a["size"]),)  # type: ignore[arg-type]
    return shape


def _window(layer: LayerSpec, shape: Shape) -> Shape:
    channels = layer.attributes.get("in_channels")
    fits = len(shape) == 3 and channels in (None, shape[0])
    _expect(layer, shape, fits, f"[{channels or 'C'}, H, W]")
    kernel, stride, padding = (_pair(layer, k) for k in ("kernel", "stride", "padding"))
    size = tuple(
        (extent + 2 * p - k) // s + 1
        for extent, k, s, p in zip(shape[1:], kernel, stride, padding, strict=True)
    )
    _expect(layer, shape, min(size) > 0, f"at least {list(kernel)} pixels with padding")
    return (int(layer.attributes.get("out_channels", shape[0])), *size)  # type: ignore[arg-type]


def _pair(layer: LayerSpec, name: str) -> tuple[int, int]:
    return layer.attributes[name]  # type: ignore[return-value]


def _expect(layer: LayerSpec, got: Shape, fits: bool, wanted: str) -> None:
    if not fits:
        raise ValueError(
            f"layer {layer.name} ({layer.kind}) got samples of shape {list(got)}, "
            f"expected {wanted}"
        )
