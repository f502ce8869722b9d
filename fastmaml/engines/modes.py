"""Modules whose training mode has no meaning inside an inner loop, and the way out.

Batch norm that updates running statistics writes to a buffer all tasks share, and
dropout draws a new mask at every pass: neither has a gradient through the inner
loop that means anything. Both are refused by name, with what to do instead.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.dropout import _DropoutNd

_STATISTICS = (
    "{path} ({kind}) would update running statistics in training mode, which all "
    "tasks share. Either pass batch_norm='batch' (batch statistics, the running "
    "buffers stay untouched) or call model.eval() (running statistics as constants)"
)
_INSTANCE = (
    "{path} ({kind}) would update running statistics in training mode, which all "
    "tasks share. Either build it with track_running_stats=False or call model.eval() "
    "(running statistics as constants)"
)
_DROPOUT = (
    "{path} ({kind}, p={p:g}) draws a random mask in training mode, so the inner loop "
    "has no gradient of its own. Either set p=0 or call model.eval()"
)


def refused_modes(model: nn.Module) -> list[str]:
    """One sentence for every module whose training mode can't be differentiated."""
    return [
        reason
        for path, module in model.named_modules()
        if (reason := _refusal(path or "the model itself", module)) is not None
    ]


def check_modes(model: nn.Module) -> None:
    """Raises ValueError naming every module that `refused_modes` finds."""
    if reasons := refused_modes(model):
        raise ValueError("model: " + "; ".join(reasons))


def with_batch_statistics(model: nn.Module) -> nn.Module:
    """A copy of the model whose batch norm uses batch statistics in every mode.

    The copy holds the very same parameters and buffers, so that it follows the
    model's training; only the modules around them are new. The model is not touched.
    """
    skeleton = _sharing_copy(model)
    for module in skeleton.modules():
        if isinstance(module, _BatchNorm):
            module.track_running_stats = False
            module.running_mean = None
            module.running_var = None
            module.num_batches_tracked = None
    return skeleton


def with_unit_scales(model: nn.Module) -> nn.Module:
    """The model, or a copy that passes ones where a norm has a shift but no scale.

    torch's double backward of batch and layer norm fails for a shift without a scale
    (an undefined tensor meets the shift's tangent); ones change no value. The copy
    holds the very same parameters.
    """
    if not any(_shift_alone(module) for module in model.modules()):
        return model
    skeleton = _sharing_copy(model)
    for module in skeleton.modules():
        if _shift_alone(module):
            del module.weight
            module.register_buffer("weight", torch.ones_like(module.bias.detach()))  # type: ignore[operator]
    return skeleton


def _shift_alone(module: nn.Module) -> bool:
    norm = isinstance(module, _BatchNorm | nn.LayerNorm)
    return norm and module.weight is None and module.bias is not None


def _sharing_copy(model: nn.Module) -> nn.Module:
    """New modules around the very same parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _refusal(path: str, module: nn.Module) -> str | None:
    if not module.training:
        return None
    kind = type(module).__name__
    if isinstance(module, _NormBase) and module.running_mean is not None:
        text = _STATISTICS if isinstance(module, _BatchNorm) else _INSTANCE
        return text.format(path=path, kind=kind)
    # RReLU and attention take a random path too, but say so through vmap's own error
    if isinstance(module, _DropoutNd) and module.p > 0:
        return _DROPOUT.format(path=path, kind=kind, p=module.p)
    return None
