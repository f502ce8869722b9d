"""What the compile step hands to the native engine: layers in order, and a loss."""

from __future__ import annotations

from dataclasses import dataclass, field

Attribute = int | float | bool | tuple[int, ...]


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a straight-line program.

    Attributes:
        kind: such as ``linear``, ``conv2d``, ``relu``; CONTRIBUTING.md lists them.
        name: path of the module, or a name derived from the function that is called.
        attributes: sizes and options by name.
        parameters: state-dict names of (weight, bias), ``None`` where one is absent;
            empty for kinds without parameters.
    """

    kind: str
    name: str
    attributes: dict[str, Attribute] = field(default_factory=dict)
    parameters: tuple[str | None, ...] = ()

    def __str__(self) -> str:
        """The kind, its options and its path on one line."""
        options = ", ".join(f"{k}={_short(v)}" for k, v in self.attributes.items())
        return f"{self.kind}({options})  {self.name}"


@dataclass(frozen=True)
class LossSpec:
    """A built-in loss, by its name in `fastmaml.losses.BUILT_IN`."""

    kind: str
    reduction: str = "mean"


@dataclass(frozen=True)
class LoweredProgram:
    """A model and its loss as data."""

    layers: tuple[LayerSpec, ...]
    loss: LossSpec

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters, in the order of the layers."""
        return tuple(n for layer in self.layers for n in layer.parameters if n)


def _short(value: Attribute) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
