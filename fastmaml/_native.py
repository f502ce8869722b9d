"""The door to the compiled engine: loads ``fastmaml._core``, or explains why not.

Importing fastmaml never fails for lack of the extension. Whoever needs it calls
`core`, and gets the module or an error that says what was tried and how to repair it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

NAME = "fastmaml._core"
_CPU = torch.device("cpu")
_ADDRESS, _IS_CONTIGUOUS, _NUMEL = Tensor.data_ptr, Tensor.is_contiguous, Tensor.numel


class NativeUnavailable(ImportError):
    """The compiled engine is missing or does not load; the message says why."""


def load() -> ModuleType:
    """Imports the extension module.

    The environment variable ``FASTMAML_CORE_PATH`` names another extension file to
    load instead of the installed one, for example one built with a sanitizer.

    Raises:
        NativeUnavailable: what was tried, the underlying error, how to rebuild.
    """
    path = os.environ.get("FASTMAML_CORE_PATH")
    try:
        return _load_file(path) if path else importlib.import_module(NAME)
    except Exception as error:  # a broken binary can fail in any way it likes
        raise NativeUnavailable(_explain(path, error)) from error


@functools.cache
def core() -> ModuleType:
    """Returns the extension module, loading it at the first call.

    Raises:
        NativeUnavailable: as `load` does; a later call tries again.
    """
    return load()


def unavailable() -> str | None:
    """Returns why the compiled engine can't be used, or ``None`` if it can."""
    try:
        core()
    except NativeUnavailable as error:
        return str(error)
    return None


def _load_file(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAME, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not named like an extension module (_core*.so)")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[NAME] = module
    return module


def _explain(path: str | None, error: Exception) -> str:
    folder = Path(__file__).parent
    if path:
        tried = f"{path}, named by FASTMAML_CORE_PATH"
        remedy = "unset FASTMAML_CORE_PATH, or point it at a built extension"
    else:
        found = ", ".join(sorted(file.name for file in folder.glob("_core*"))) or "none"
        tried = f"{NAME} in {folder} (extension files there: {found})"
        remedy = (
            "in a checkout of fastmaml run `pip install --force-reinstall --no-deps .` "
            f"with this Python ({sys.executable}); it needs a C++17 compiler"
        )
    return (
        "fastmaml's compiled engine is not available.\n"
        f"  tried:  {tried}\n"
        f"  error:  {type(error).__name__}: {error}\n"
        f"  to fix: {remedy}\n"
        '  until then engine="functional" runs every model, only slower.'
    )


def address(
    name: str,
    tensor: Tensor,
    dtype: torch.dtype,
    shape: Sequence[int],
    device: torch.device = _CPU,
) -> int:
    """Returns the memory address of a tensor the engine may read or write.

    Raises:
        TypeError: if the dtype differs.
        ValueError: if the tensor is on another device, not contiguous, or of another
            shape.
    """
    if tensor.dtype != dtype:
        raise TypeError(
            f"{name}: expected {dtype}, got {tensor.dtype}; "
            f"convert it with .to({dtype})"
        )
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}"
        )
    if tensor.device != device:
        where, move = ("the CPU", ".cpu()") if device == _CPU else (device, ".to(...)")
        raise ValueError(
            f"{name}: expected a tensor on {where}, got one on {tensor.device}; "
            f"move it with {move}"
        )
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected contiguous memory; call .contiguous()")
    return tensor.data_ptr()


def own_address(tensor: Tensor) -> int:
    """As `address`, for a tensor that the caller has just made to measure."""
    return tensor.data_ptr()


def images_address(
    name: str, images: Tensor, dtype: torch.dtype, device: torch.device = _CPU
) -> int:
    """As `address`, for images [..., C, H, W] that lie channels last in memory."""
    last = images.movedim(-3, -1)
    return address(name, last, dtype, last.shape, device)


def addresses(tensors: Iterable[Tensor]) -> list[int]:
    """Where tensors are, for callers that have checked them before."""
    return [*map(_ADDRESS, tensors)]


def watch(
    tensors: Sequence[Tensor],
    attributes: Sequence[tuple[Any, str]] = (),
    *,
    layout: bool = True,
) -> Any:
    """Returns what has a quick ``changed()``, for prepared calls.

    Args:
        tensors: whose addresses may not change.
        attributes: (owner, name) of what must stay the same object.
        layout: whether their sizes and gaps may not change either.
    """
    functions = [_ADDRESS, _IS_CONTIGUOUS, _NUMEL] if layout else [_ADDRESS]
    return core().Watch(list(tensors), functions, list(attributes), reader())


@functools.cache
def reader() -> Any:
    """What reads tensors inside the extension; ``None`` if torch is older than 2.10."""
    table = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    return None if table is None else core().TensorReader(Tensor, table)


def contiguous(tensors: Iterable[Tensor]) -> bool:
    """Whether all of them still lie in memory without gaps, in order."""
    return all(map(_IS_CONTIGUOUS, tensors))
