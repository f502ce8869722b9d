"""A module's forward pass as a straight line of operations, through ``torch.fx``.

A line is: one input, every operation takes the result of the one before it, the last
result is the output. Sizes of a batch (``x.size(0)``) may be read on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
MAX_POOL = (
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "ceil_mode",
    "return_indices",
)

# canonical name -> (names of the arguments after the input, functions, methods)
_OPERATIONS: dict[str, tuple[tuple[str, ...], tuple[Any, ...], tuple[str, ...]]] = {
    "relu": (
        ("inplace",),
        (F.relu, F.relu_, torch.relu, torch.relu_),
        ("relu", "relu_"),
    ),
    "tanh": ((), (F.tanh, torch.tanh, torch.tanh_), ("tanh", "tanh_")),
    "sigmoid": (
        (),
        (F.sigmoid, torch.sigmoid, torch.sigmoid_),
        ("sigmoid", "sigmoid_"),
    ),
    "gelu": (("approximate",), (F.gelu,), ()),
    "silu": (("inplace",), (F.silu,), ()),
    "leaky_relu": (
        ("negative_slope", "inplace"),
        (F.leaky_relu, F.leaky_relu_),
        (),
    ),
    "elu": (("alpha", "inplace"), (F.elu, F.elu_), ()),
    "softplus": (("beta", "threshold"), (F.softplus,), ()),
    "max_pool2d": (MAX_POOL, (F.max_pool2d, torch.max_pool2d), ()),
    "avg_pool2d": ((*POOL, "divisor_override"), (F.avg_pool2d,), ()),
    "adaptive_avg_pool2d": (("output_size",), (F.adaptive_avg_pool2d,), ()),
    "flatten": (("start_dim", "end_dim"), (torch.flatten,), ("flatten",)),
    "reshape": (("*shape",), (torch.reshape,), ("reshape", "view")),
    "mean": (("dim", "keepdim", "dtype"), (torch.mean,), ("mean",)),
    "dropout": (("p", "training", "inplace"), (F.dropout, F.dropout2d), ()),
    "identity": ((), (), ("contiguous",)),
}
_BY_FUNCTION = {f: name for name, (_, fs, _) in _OPERATIONS.items() for f in fs}
_BY_METHOD = {m: name for name, (_, _, ms) in _OPERATIONS.items() for m in ms}
_SUMS = (operator.add, operator.iadd, torch.add)
_EXPANSIONS = ("expand", "expand_as")


@dataclass(frozen=True)
class Step:
    """One operation of the line.

    Attributes:
        name: module path, or the graph's name for a function's result.
        operation: canonical name of a function; ``module``; or ``append`` for a
            parameter behind every sample's features.
        module: the module that is called.
        options: arguments by name, the input left out.
    """

    name: str
    operation: str
    module: nn.Module | None = None
    options: dict[str, Any] = field(default_factory=dict)


class Untraceable(Exception):
    """The forward pass is no straight line; the message says why."""


class _Tracer(fx.Tracer):
    def __init__(self, leaf: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self._leaf = leaf

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        plain = m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)
        return plain or self._leaf(m)

    def call_module(self, m: Any, forward: Any, args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Untraceable:
            raise
        except Exception as error:
            raise _untraceable(self.path_of_module(m), m, error) from error


def trace(model: nn.Module, leaf: Callable[[nn.Module], bool]) -> list[Step]:
    """The forward pass as steps.

    Args:
        model: traced in its present mode.
        leaf: says which modules are operations of their own.

    Raises:
        Untraceable: with the reason.
    """
    if leaf(model):
        return [Step("", "module", model)]
    try:
        graph = _Tracer(leaf).trace(model)
    except Untraceable:
        raise
    except Exception as error:
        raise _untraceable("", model, error) from error
    return _Line(model, graph).steps


def _untraceable(path: str, module: nn.Module, error: Exception) -> Untraceable:
    first_line = str(error).strip().split("\n")[0]
    return Untraceable(
        f"{path or 'the model'} ({type(module).__name__}): torch.fx can't trace its "
        f"forward pass: {first_line}"
    )


class _Line:
    """Walks a graph and keeps the steps, or raises where it leaves the line."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.steps: list[Step] = []
        self._model = model
        self._current: fx.Node | None = None
        visit = {
            "placeholder": self._input,
            "get_attr": lambda node: None,
            "call_module": self._module,
            "call_function": self._call,
            "call_method": self._call,
            "output": self._output,
        }
        for node in graph.nodes:
            visit[node.op](node)

    def _input(self, node: fx.Node) -> None:
        if self._current is None:
            self._current = node
        elif node.users or not node.args:
            raise Untraceable(
                f"the forward pass takes more than one input: {node.target}"
            )

    def _module(self, node: fx.Node) -> None:
        path = str(node.target)
        self._follow(node, f"module {path}")
        if len(node.args) > 1 or node.kwargs:
            raise Untraceable(f"module {path} is called with more than its input")
        self.steps.append(Step(path, "module", self._model.get_submodule(path)))

    def _call(self, node: fx.Node) -> None:
        if _is_size(node) or self._expanded(node) is not None:
            return
        if node.target in (torch.cat, torch.concat):
            self._append(node)
            return
        table: dict[Any, str] = _BY_METHOD if node.op == "call_method" else _BY_FUNCTION
        operation = table.get(node.target)
        if operation is None:
            raise Untraceable(_unsupported(node))
        self._follow(node, f"{operation} ({node.name})")
        options = _options(node, _OPERATIONS[operation][0])
        self.steps.append(Step(node.name, operation, options=options))

    def _append(self, node: fx.Node) -> None:
        """``cat([x, p.expand(...)], -1)`` is a parameter behind the features."""
        options = _options(node, ("dim",), head="tensors")
        parts = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = options.get("dim", 0)
        pair = list(parts) if isinstance(parts, list | tuple) else []
        name = self._expanded(pair[1]) if len(pair) == 2 else None
        if name is None or pair[0] is not self._current or dim not in (-1, 1):
            raise Untraceable(
                f"{node.name} joins tensors: only a 1-d parameter appended to every "
                "sample, torch.cat([x, p.expand(len, -1)], -1), is a layer"
            )
        self._current = node
        size = self._model.get_parameter(name).numel()
        found = {"parameter": name, "size": size}
        self.steps.append(Step(node.name, "append", options=found))

    def _expanded(self, node: Any) -> str | None:
        """Name of the 1-d parameter that the node expands over samples."""
        if not isinstance(node, fx.Node) or node.target not in _EXPANSIONS:
            return None
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.op != "get_attr":
            return None
        name = str(source.target)
        p = dict(self._model.named_parameters(remove_duplicate=False)).get(name)
        return name if p is not None and p.ndim == 1 else None

    def _output(self, node: fx.Node) -> None:
        result = node.args[0]
        if not isinstance(result, fx.Node):
            raise Untraceable("the forward pass returns more than one tensor")
        if result is not self._current:
            raise Untraceable(
                f"the forward pass returns {result.name}, not its last result: it is "
                "no straight line"
            )

    def _follow(self, node: fx.Node, what: str) -> None:
        source = node.args[0] if node.args else node.kwargs.get("input")
        if source is not self._current:
            raise Untraceable(
                f"{what} takes {getattr(source, 'name', source)} instead of the result "
                "before it: branches and residual sums are no straight line"
            )
        self._current = node


def _is_size(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("size", "dim")
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    source = node.args[0] if node.args else None
    return (
        node.target is operator.getitem
        and isinstance(source, fx.Node)
        and _is_size(source)
    )


def _options(
    node: fx.Node, names: tuple[str, ...], head: str = "input"
) -> dict[str, Any]:
    kwargs = {k: v for k, v in node.kwargs.items() if k != head}
    if names == ("*shape",):
        shape = node.args[1:] or (kwargs.get("shape", kwargs.get("size")),)
        flat = shape[0] if len(shape) == 1 else shape
        return {"shape": flat, "input": node.args[0] if node.args else None}
    return {**dict(zip(names, node.args[1:], strict=False)), **kwargs}


def _unsupported(node: fx.Node) -> str:
    target = getattr(node.target, "__name__", str(node.target))
    if node.target in _SUMS or node.target in ("add", "add_"):
        return f"{node.name} adds tensors: residual sums are no straight line"
    return f"{node.name}: {target} has no native layer"
