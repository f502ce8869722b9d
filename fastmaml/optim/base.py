"""What the optimizers share: a step in one call per group, state, checks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from fastmaml import _native
from fastmaml.engines.placement import Placement, backend_for, missing

DTYPES = {torch.float32: "Float32", torch.float64: "Float64"}
Closure = Callable[[], Any]

_VALUES = dict.values


class Prepared:
    """The calls for one parameter group, good while its tensors stay where they are."""

    def __init__(self, params: list[Tensor], gradients: list[Tensor | None]) -> None:
        self.params = params
        self.gradients = gradients
        self.calls: list[tuple[Placement, Any]] = []
        self.options: Any = None  # what the calls depend on besides tensors
        self.tensors: list[Tensor] = []  # all that the calls read or write
        self.states: list[Tensor] = []  # those of them that are state
        self.kept: list[Tensor] = []  # the calls' own
        self.watches: list[Any] = []
        self.updated: list[Tensor] = []
        self.state: list[Any] = []  # of all groups, as `_contents` lists it
        self.settled = True

    def seal(self, state: list[Any]) -> None:
        """Notes where the tensors are."""
        self.state = state
        self.settled = self.settled and _native.contiguous(self.tensors)
        if self.settled:
            gradients = [g for g in self.gradients if g is not None]
            self.watches = [
                _native.watch(self.params, [(p, "grad") for p in self.params]),
                _native.watch(gradients),
                _native.watch(self.states, layout=False),
            ]

    def holds(
        self,
        params: list[Tensor],
        state: list[Any],
        options: Any,
    ) -> bool:
        """Whether the calls still point at the group's tensors."""
        return (
            self.settled
            and self.options == options
            and len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and len(state) == len(self.state)
            and all(map(is_, state, self.state))
            and not any(watch.changed() for watch in self.watches)
        )


class OneCall(Optimizer):
    """What the three share: `step` without hooks' cost, prepared calls, checks.

    A subclass writes ``_options``, ``_prepare`` and ``_call``.
    """

    # the backend, for tests; None takes that of a parameter's device
    _backend: str | None = None
    # learning rates of the groups in their devices' memory, for captured steps
    _rates_there: list[Tensor] | None = None
    _prepared: list[Prepared | None]
    _states: Any

    def _options(self, group: dict[str, Any]) -> Any:
        """Settings of a group that decide which state its parameters have."""
        raise NotImplementedError

    def _prepare(self, found: Prepared, group: dict[str, Any], number: int) -> None:
        """Makes state where there is none, and the calls."""
        raise NotImplementedError

    def _call(
        self, call: Any, where: tuple[int, int, int], group: dict[str, Any]
    ) -> None:
        """Runs one call with the group's present settings."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as in torch.

        Raises:
            TypeError, ValueError: a parameter is not one these optimizers can update.
        """
        super().add_param_group(param_group)
        number = len(self.param_groups) - 1
        try:
            for i, p in enumerate(self.param_groups[-1]["params"]):
                self._check(f"parameter {i} of group {number}", p)
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients, or zeroes them, as in torch."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _update(self, closure: Closure | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.__dict__.get("_states") is not self.state:  # loaded, copied, unpickled
            self._states, self._prepared = self.state, []
        prepared, groups = self._prepared, self.param_groups
        if len(prepared) < len(groups):
            prepared += [None] * (len(groups) - len(prepared))
        state = _contents(self.state)
        for number, group in enumerate(groups):
            params = group["params"]
            options = self._options(group)
            found = prepared[number]
            if found is None or not found.holds(params, state, options):
                gradients = [p.grad for p in params]
                found = self._prepared_anew(number, group, gradients, options)
                prepared[number] = found
            there = self._rates_there[number] if self._rates_there else None
            for place, call in found.calls:
                with place.guard():
                    self._call(call, place.step(there), group)
            torch.autograd.graph.increment_version(found.updated)
        return loss

    def _prepared_anew(
        self,
        number: int,
        group: dict[str, Any],
        gradients: list[Tensor | None],
        options: Any,
    ) -> Prepared:
        found = Prepared(list(group["params"]), gradients)
        found.options = options
        self._prepare(found, group, number)
        found.seal(_contents(self.state))
        return found

    def _sorted(
        self, found: Prepared, number: int
    ) -> dict[tuple[str, torch.device], list[tuple[Tensor, Tensor]]]:
        """Parameters that have a gradient, with it, checked, by dtype and device."""
        sorted_pairs: dict[tuple[str, torch.device], list[tuple[Tensor, Tensor]]] = {}
        pairs = zip(found.params, found.gradients, strict=True)
        for i, (p, gradient) in enumerate(pairs):
            if gradient is None:
                continue
            what = f"parameter {i} of group {number}"
            self._check(what, p)
            self._check(f"the gradient of {what}", gradient, p)
            if not _alike(gradient, p):
                # a copy that this step reads; the next one copies anew
                gradient = torch.empty_like(p).copy_(gradient)
                found.settled = False
            kind = DTYPES[p.dtype], p.device
            sorted_pairs.setdefault(kind, []).append((p, gradient))
            found.updated.append(p)
        return sorted_pairs

    def _backend_for(self, device: torch.device) -> str:
        return self._backend or backend_for(device)

    def _placement(self, device: torch.device) -> Placement:
        return Placement(self._backend_for(device), device)

    def _state_like(self, found: Prepared, p: Tensor, name: str) -> Tensor:
        """The state tensor of a parameter: as it is, fitted to p, or new zeros."""
        entry = self.state[p]
        value = entry.get(name)
        if value is None:
            value = torch.zeros_like(p, memory_format=torch.preserve_format)
        elif value.shape != p.shape:
            raise ValueError(
                f"{self._name()}: the state {name!r} has shape {list(value.shape)}, "
                f"its parameter {list(p.shape)}; load a state of the same model"
            )
        elif (value.dtype, value.device) != (p.dtype, p.device) or not _alike(value, p):
            value = torch.empty_like(p).copy_(value)
        value = value.detach()
        entry[name] = value
        found.tensors.append(value)
        found.states.append(value)
        return value

    def _check(self, what: str, tensor: Tensor, like: Tensor | None = None) -> None:
        """Raises unless the kernels can read and write this tensor."""
        instead = f"use torch.optim.{type(self).__name__}"
        if tensor.layout != torch.strided:
            raise TypeError(
                f"{self._name()}: {what} is sparse ({tensor.layout}), expected a dense "
                f"tensor; {instead}"
            )
        if like is None and (reason := missing(self._backend_for(tensor.device))):
            raise ValueError(
                f"{self._name()}: {what} is on {tensor.device}, expected the CPU or a "
                f"device that the native engine has a backend for: {reason}; {instead}"
            )
        if like is not None and tensor.device != like.device:
            raise ValueError(
                f"{self._name()}: {what} is on {tensor.device}, expected "
                f"{like.device} like the parameter"
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{self._name()}: {what} is {tensor.dtype}, expected torch.float32 or "
                f"torch.float64; {instead}"
            )
        if like is not None and (tensor.dtype, tensor.shape) != (
            like.dtype,
            like.shape,
        ):
            raise ValueError(
                f"{self._name()}: {what} is {tensor.dtype} {list(tensor.shape)}, "
                f"expected {like.dtype} {list(like.shape)} like the parameter"
            )
        if like is None and torch.empty_like(tensor).stride() != tensor.stride():
            raise ValueError(
                f"{self._name()}: {what} has gaps or overlaps in memory (shape "
                f"{list(tensor.shape)}, strides {list(tensor.stride())}), expected "
                f"dense memory; {instead}"
            )

    def _name(self) -> str:
        return f"fastmaml.optim.{type(self).__name__}"


def _contents(state: dict[Tensor, dict[str, Any]]) -> list[Any]:
    """The entries of a state, and what they hold."""
    entries = state.values()
    return [*entries, *chain.from_iterable(map(_VALUES, entries))]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether elements of two tensors of one shape lie in memory in one order."""
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


# torch's wrapper of `step`, which runs hooks and names the step in profiles
_hooked = Optimizer.profile_hook_step(OneCall._update)


def step(self: Any, closure: Closure | None = None) -> Any:
    """Updates the parameters from their gradients; those without one stay.

    Args:
        self: the optimizer.
        closure: computes the loss and its gradients anew, as in torch.

    Returns:
        What ``closure`` returned, or ``None``.

    Raises:
        TypeError, ValueError: a parameter or gradient is not one these optimizers can
            update.
    """
    if (
        self._optimizer_step_pre_hooks
        or self._optimizer_step_post_hooks
        or torch_optimizer._global_optimizer_pre_hooks
        or torch_optimizer._global_optimizer_post_hooks
    ):
        return _hooked(self, closure)
    return OneCall._update(self, closure)


step.hooked = True  # type: ignore[attr-defined]  # torch then leaves it as it is
