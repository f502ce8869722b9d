"""Parameters and the state around them that a program can't carry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from fastmaml.compile.program import LoweredProgram

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def refusals(model: nn.Module) -> list[str]:
    """What keeps the model's parameters and modules from becoming a program."""
    return [*_module_refusals(model), *_parameter_refusals(model)]


def usage_refusals(model: nn.Module, program: LoweredProgram) -> list[str]:
    """Parameters that the layers use twice or not at all."""
    used = list(program.parameters)
    repeated = sorted({n for n in used if used.count(n) > 1})
    unused = [n for n, _ in model.named_parameters() if n not in used]
    return [
        *(f"parameter {n} is used by more than one layer" for n in repeated),
        *(f"parameter {n} is not used by the forward pass" for n in unused),
    ]


def _module_refusals(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        name = f"{path or 'the model'} ({type(module).__name__})"
        if any(getattr(module, hooks, None) for hooks in _HOOKS):
            yield f"{name} has hooks, which a program would not call"
        if parametrize.is_parametrized(module):
            yield f"{name} is parametrized: its tensors are computed, not parameters"
        if "forward" in vars(module):
            yield f"{name} has a forward function patched onto the instance"


def _parameter_refusals(model: nn.Module) -> Iterator[str]:
    parameters = list(model.named_parameters())
    if any(isinstance(p, UninitializedParameter) for _, p in parameters):
        yield "lazy parameters have no shape yet: run one forward pass first"
        return
    if not any(p.requires_grad for _, p in parameters):
        yield "the model has no trainable parameters"
    dtypes = {p.dtype for _, p in parameters}
    if not dtypes <= {torch.float32, torch.float64} or len(dtypes) > 1:
        names = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        yield f"parameters are {names}: expected float32 or float64 throughout"
    for name, p in parameters:
        if not p.requires_grad:
            yield f"parameter {name} is frozen (requires_grad=False)"
    yield from _tied(model.named_parameters(remove_duplicate=False))


def _tied(parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[str]:
    first: dict[int, str] = {}
    for name, p in parameters:
        if id(p) in first:
            yield f"parameter {name} is tied to {first[id(p)]}"
        first.setdefault(id(p), name)
