"""Arrays packed once and kept on disk: written atomically, checked when read.

An entry is two files: ``NAME.npy``, and ``NAME.json`` with the sha256 of the array's
bytes and what else belongs to it (class names). The json is written last, so an entry
without a matching json was not finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

_Item = TypeVar("_Item")
Packed = tuple[np.ndarray, dict[str, Any]]


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Returns the cache directory.

    Args:
        cache_dir: the directory itself; ``None`` means ``$FASTMAML_CACHE``, and if that
            is not set ``~/.cache/fastmaml``.
    """
    chosen = cache_dir or os.environ.get("FASTMAML_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "fastmaml"


def load_or_build(folder: Path, name: str, build: Callable[[], Packed]) -> Packed:
    """Returns a cached array and its notes, built and kept if need be.

    Args:
        folder: where entries are; made if missing.
        name: of the entry. It must name everything the content depends on.
        build: makes array and notes; notes must be what json can hold.

    A damaged entry is rebuilt with a warning that names it. A folder that cannot be
    written to costs a warning too; the array is then not kept.
    """
    try:
        return _load(folder, name)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
        warnings.warn(
            f"the cache entry {folder / name}.npy is damaged ({error}); rebuilding it",
            stacklevel=3,
        )
    array, notes = build()
    array = np.ascontiguousarray(array)
    try:
        _save(folder, name, array, notes)
    except OSError as error:
        warnings.warn(
            f"could not write the cache entry {folder / name}.npy ({error}); set "
            "FASTMAML_CACHE or cache_dir to a folder that can be written to",
            stacklevel=3,
        )
    return array, notes


def fingerprint(parts: Iterable[object]) -> str:
    """Returns 16 hexadecimal digits that name what an entry was made from."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
        digest.update(b"\0")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that appears at ``path`` whole, at the end, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def progress_bar(
    items: Iterable[_Item], *, total: int, text: str, show: bool
) -> Iterable[_Item]:
    """Wraps ``items`` in a progress bar, shown only when stderr is a terminal."""
    from tqdm.auto import tqdm

    return tqdm(items, total=total, desc=text, disable=None if show else True)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(array.data).hexdigest()


def _load(folder: Path, name: str) -> Packed:
    entry = json.loads((folder / f"{name}.json").read_text())
    array = np.load(folder / f"{name}.npy", allow_pickle=False)
    if _digest(array) != entry["sha256"]:
        raise ValueError("its sha256 is not the recorded one")
    return array, entry["notes"]


def _save(folder: Path, name: str, array: np.ndarray, notes: dict[str, Any]) -> None:
    with atomic_write(folder / f"{name}.npy") as file:
        np.save(file, array, allow_pickle=False)
    entry = {"sha256": _digest(array), "shape": array.shape, "notes": notes}
    with atomic_write(folder / f"{name}.json") as file:
        file.write(json.dumps(entry).encode())
