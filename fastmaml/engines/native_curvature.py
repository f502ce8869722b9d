"""Products with many vectors at one point, such as those of conjugate gradients.

From the second product on (or the first, if more are announced), what the passes
without a vector leave for each sample stays in memory, so each further product is the
passes along its vector alone. This is the inside of `NativeEngine`, in a file of its
own.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from fastmaml import _native
from fastmaml.engines.base import Params

FORWARD, GRADIENT, HESSIAN, GAUSS_NEWTON = range(4)

Named = dict[str, Tensor]


class NativeCurvature:
    """See `fastmaml.engines.base.Curvature`; the same bits as the engine's products.

    Args:
        engine: the native engine.
        params: read at each product; they must not change between them.
        x: [T, N, ...], likewise.
        y: [T, N, ...], likewise.
        many: keep from the first product on.
    """

    def __init__(
        self, engine: Any, params: Params, x: Tensor, y: Tensor, *, many: bool = False
    ) -> None:
        self._engine = engine
        self._many = many
        self._where = params, x, y
        self._tape: Tensor | None = None
        self._began: int | None = None  # the latest product
        self._filled: int | None = None  # the product that left the tape

    def hvp(self, vector: Params) -> Named:
        """Hessian of the loss times ``vector``."""
        return self._product(HESSIAN, vector)

    def gauss_newton_product(self, vector: Params) -> Named:
        """J' H_loss J times ``vector``, J the Jacobian of the outputs."""
        return self._product(GAUSS_NEWTON, vector)

    @property
    def kept_bytes(self) -> int:
        """Memory of what is kept; none before the second product, or the first."""
        return 0 if self._tape is None else self._tape.numel()

    def _product(self, product: int, vector: Params) -> Named:
        # what the only product leaves is quicker written into the cache, and forgotten
        if self._tape is None and (self._many or self._began == product):
            self._tape = self._room()
        self._began = product
        if self._tape is None:
            return self._engine._curvature(product, *self._where, vector)
        kept = _native.own_address(self._tape), self._filled == product
        self._filled = None  # should the call fail
        result = self._engine._curvature(product, *self._where, vector, kept)
        self._filled = product
        return result

    def _room(self) -> Tensor | None:
        """Memory for the tapes of all tasks, if the engine may keep so much."""
        engine, (params, x, _) = self._engine, self._where
        program = engine._program_for(x)
        element = engine._parameters.dtype(params).itemsize
        size = x.shape[0] * program.kept_tape_size(x.shape[1]) * element
        if not engine._may_keep(size):
            return None
        with engine._lock:
            tape = _smallest(engine._tapes, size)
        if tape is None:
            tape = engine._empty((size,), torch.uint8)
        # the next one finds its pages mapped
        weakref.finalize(self, engine._tapes.append, tape).atexit = False
        return tape


def _smallest(tapes: list[Tensor], size: int) -> Tensor | None:
    """Takes the smallest tape of at least ``size`` bytes, or forgets all."""
    fitting = [i for i, tape in enumerate(tapes) if tape.numel() >= size]
    if not fitting:
        tapes.clear()
        return None
    return tapes.pop(min(fitting, key=lambda i: tapes[i].numel()))
