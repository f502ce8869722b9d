"""What one core can do at most, and what a pass of a layer needs at least.

Ceilings are measured by loops in the extension: multiply-adds on registers alone, and
streams over memory of several sizes. A pass can't take less than its operations at the
first or its bytes at the second, whichever is longer; that is its roofline time.

Bytes are those of a pass that touches every array once. Where they lie decides how
fast they come: the smallest cache that holds all arrays of the pass, but no closer
than the second level, since other passes ran since these arrays were written.
Operations of products are exact, without the padding, which the engine doesn't
multiply; those of other layers are a count of the formula per element, and never what
limits them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmaml import _native

FLOAT_BYTES = 4
PASSES = ("forward", "backward", "tangent_forward", "tangent_backward")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
USUAL_CACHES = {"L1": 32 << 10, "L2": 1 << 20}
LARGEST_CACHE_STREAM = 8 << 20  # a shared last level is never ours alone

# arrays of the input's size, of the output's size, operations per element of the input
_SMOOTH = {
    "forward": (1, 1, 4),
    "backward": (2, 1, 4),
    "tangent_forward": (2, 1, 4),
    "tangent_backward": (3, 2, 10),
}
_PIECEWISE = {
    "forward": (1, 1, 1),
    "backward": (2, 1, 1),
    "tangent_forward": (2, 1, 1),
    "tangent_backward": (2, 1, 1),
}
_NORM = {
    "forward": (1, 1, 6),
    "backward": (2, 1, 9),
    "tangent_forward": (2, 1, 9),
    "tangent_backward": (3, 2, 18),
}
_MAX_POOL = {name: (1, 2, 1) for name in PASSES}  # the winners lie beside the outputs
_PLAIN = {name: (1, 1, 1) for name in PASSES}
_FAMILIES = {
    "relu": _PIECEWISE,
    "leaky_relu": _PIECEWISE,
    "batch_norm": _NORM,
    "layer_norm": _NORM,
    "max_pool": _MAX_POOL,
    "average_pool": _PLAIN,
    "append_parameter": _PLAIN,
}


@dataclass(frozen=True)
class Need:
    """The least a call takes.

    Attributes:
        operations: a multiply-add counting two.
        bytes: read and written.
    """

    operations: int
    bytes: int


@dataclass(frozen=True)
class Ceilings:
    """What one core reached here.

    Attributes:
        operations: multiply-adds on registers, operations a second.
        capacity: bytes of the caches by level.
        bandwidth: bytes a second by level, "memory" the last.
    """

    operations: float
    capacity: Mapping[str, int]
    bandwidth: Mapping[str, float]

    def level(self, count: int) -> str:
        """Where ``count`` bytes come from: L2, a further cache, or memory."""
        for level, capacity in self.capacity.items():
            if level != "L1" and count <= capacity:
                return level
        return "memory"

    def seconds(self, need: Need) -> float:
        """Roofline time of a call."""
        return max(
            need.operations / self.operations,
            need.bytes / self.bandwidth[self.level(need.bytes)],
        )


def cache_sizes(folder: Path = CACHES) -> dict[str, int]:
    """Bytes of a core's data caches by level, the usual ones where nobody tells."""
    found = {}
    for index in sorted(folder.glob("index*")):
        try:
            kind = (index / "type").read_text().strip()
            level = (index / "level").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            found[f"L{level}"] = int(size[:-1]) << 10
    return {**USUAL_CACHES, **found}


def measure_ceilings(tries: int = 5) -> Ceilings:
    """Measures one core; takes some seconds.

    Raises:
        NativeUnavailable: if the extension can't be loaded.
    """
    core, capacity = _native.core(), cache_sizes()
    sizes = {
        level: min(size // 2, LARGEST_CACHE_STREAM) // 4096 * 4096
        for level, size in capacity.items()
    }
    sizes["memory"] = max(128 << 20, 4 * max(capacity.values()))
    bandwidth = {
        level: max(core.stream_bandwidth(k, size, tries) for k in ("read", "copy"))
        for level, size in sizes.items()
    }
    return Ceilings(core.multiply_add_peak(tries), capacity, bandwidth)


def _product_need(layer: Mapping[str, Any], name: str, samples: int) -> Need:
    x, y, w = layer["inputs"] * samples, layer["outputs"] * samples, layer["parameters"]
    inner = int(layer["adjoint"])  # the first layer's input has no tangent, no adjoint
    products, elements = {
        "forward": (1, x + w + y),
        "backward": (1 + inner, x + y + w + inner * (w + x)),
        "tangent_forward": (1 + inner, x + w + y + inner * (x + w)),
        "tangent_backward": (1 + 3 * inner, x + y + w + inner * (2 * x + y + 2 * w)),
    }[name]
    if layer.get("strips") and name.startswith("tangent"):
        elements += y  # the sums of a norm's tangents take both y and ty
    operations = 2 * layer["multiply_adds"] * samples * products
    return Need(operations, FLOAT_BYTES * elements)


def pass_need(layer: Mapping[str, Any], name: str, samples: int) -> Need:
    """Counts what a pass of a layer takes at least.

    Args:
        layer: as the extension's ``bench_layers`` describes it.
        name: one of ``PASSES``.
        samples: of one task.
    """
    if layer["kind"] == "bilinear":
        return _product_need(layer, name, samples)
    inputs, outputs, operations = _FAMILIES.get(layer["kind"], _SMOOTH)[name]
    # the convolution below has swept a norm's unpooled pixels: the pooled ones are left
    size = layer["outputs"] if layer.get("swept_below") else layer["inputs"]
    elements = inputs * size + outputs * layer["outputs"]
    count = samples * elements + layer["parameters"]
    return Need(operations * samples * size, FLOAT_BYTES * count)
