"""How many CPU threads the native engine uses."""

from __future__ import annotations

from fastmaml import _native


def set_num_threads(threads: int | None) -> None:
    """Sets the threads of the native engine, for all learners of this process.

    Results do not depend on it, to the bit. torch has threads of its own
    (``torch.set_num_threads``).

    Args:
        threads: at least 1, or ``None`` for the default: ``FASTMAML_NUM_THREADS`` if
            that is set, else the smaller of the CPUs this process may run on and the
            quota of its cgroup.

    Raises:
        TypeError: if ``threads`` is no integer.
        ValueError: if ``threads`` is less than 1.
        NativeUnavailable: if the extension can't be loaded.
    """
    if threads is not None and (
        type(threads) is bool or not hasattr(threads, "__index__")
    ):
        got = type(threads).__name__
        raise TypeError(f"threads={threads!r}: expected an integer or None, got {got}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}: expected at least 1, or None")
    _native.core().set_num_threads(threads or 0)


def get_num_threads() -> int:
    """Returns the threads of the native engine.

    Raises:
        NativeUnavailable: if the extension can't be loaded.
    """
    return _native.core().num_threads()
