"""Notices when a model changed in a way that its engine doesn't follow."""

from __future__ import annotations

from torch import nn


class ModelWatch:
    """Remembers what an engine was built for.

    Values may change at any time, engines read them afresh. Replaced parameters,
    another dtype or device, frozen parameters and switched modes need a new engine.
    The check costs about a microsecond for a small model, cheap enough for each call.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._slots = [
            (module._parameters, key, p, p.requires_grad)
            for module in modules
            for key, p in module._parameters.items()
            if p is not None
        ]
        self._modes = [(module, module.training) for module in modules]
        first = self._slots[0][2] if self._slots else None
        self._first = first
        self._kind = (first.dtype, first.device) if first is not None else None

    def changed(self) -> bool:
        """Whether the model needs a new engine."""
        for slot, key, p, trainable in self._slots:
            if slot.get(key) is not p or p.requires_grad is not trainable:
                return True
        for module, mode in self._modes:
            if module.training is not mode:
                return True
        first = self._first
        return first is not None and (first.dtype, first.device) != self._kind
