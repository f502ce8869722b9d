"""Notices when a model changed in a way that its engine doesn't follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fastmaml import _native

Attribute = tuple[Any, str]
Entry = tuple[dict[str, Any], str]


class ModelWatch:
    """Remembers what an engine was built for.

    Values may change at any time, engines read them afresh. Replaced parameters,
    another dtype or device, frozen parameters and switched modes need a new engine.
    The check costs less than a microsecond for a small model, cheap enough for each
    call.

    Attributes:
        changed: whether the model needs a new engine.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        slots = [
            (module._parameters, key, p)
            for module in modules
            for key, p in module._parameters.items()
            if p is not None
        ]
        same: list[Attribute] = [(p, "requires_grad") for _, _, p in slots]
        same += [(module, "training") for module in modules]
        equal: list[Attribute] = []
        if slots:
            first = slots[0][2]
            same.append((first, "dtype"))
            equal.append((first, "device"))  # a new object each time
        entries: list[Entry] = [(slot, key) for slot, key, _ in slots]
        kind = PythonWatch if _native.unavailable() else _native.core().ObjectWatch
        self.changed = kind(same, equal, entries).changed


class PythonWatch:
    """The extension's `ObjectWatch` where there is no extension.

    Args:
        same: attributes that must stay the same objects.
        equal: attributes that must stay equal.
        entries: of dictionaries, that must stay the same objects.
    """

    def __init__(
        self,
        same: Sequence[Attribute],
        equal: Sequence[Attribute],
        entries: Sequence[Entry],
    ) -> None:
        self._same = [(o, name, getattr(o, name)) for o, name in same]
        self._equal = [(o, name, getattr(o, name)) for o, name in equal]
        self._entries = [(d, key, d[key]) for d, key in entries]

    def changed(self) -> bool:
        """Whether one of them is another."""
        return (
            any(d.get(key) is not value for d, key, value in self._entries)
            or any(getattr(o, name) is not value for o, name, value in self._same)
            or any(getattr(o, name) != value for o, name, value in self._equal)
        )
