"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawings each.

Lake, Salakhutdinov, Tenenbaum, "Human-level concept learning through probabilistic
program induction" (Science 2015); MIT licence.
"""

from __future__ import annotations

import functools
import io
import json
import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastmaml.tasks.datasets import download as _download
from fastmaml.tasks.datasets.archive import Archive, first_existing
from fastmaml.tasks.datasets.cache import (
    cache_root,
    fingerprint,
    load_or_build,
    progress_bar,
)
from fastmaml.tasks.datasets.data import FewShotData
from fastmaml.tasks.sampler import check_count

Split = Literal["vinyals", "finn", "background"]
Subset = Literal["train", "val", "test"]
Resample = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]

PARTS = ("images_background", "images_evaluation")
DRAWINGS = 20
_VERSION = 1  # of the packing; part of the name of a cached file
_RESAMPLES = ("nearest", "box", "bilinear", "bicubic", "lanczos")


def omniglot(
    root: str | os.PathLike[str],
    *,
    split: Split = "vinyals",
    subset: Subset = "train",
    size: int = 28,
    resample: Resample = "nearest",
    download: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> FewShotData:
    """Returns Omniglot's characters, ink white on black, as the paper feeds them.

    Splits, in characters (each is four classes with ``rotations=(0, 90, 180, 270)``):

    * ``"vinyals"``: 1028 train, 172 val, 423 test, by alphabet but for one. The
      published lists of Vinyals et al. 2016, which most papers report on.
    * ``"finn"``: 1100 train, 100 val, 423 test, drawn at random over all alphabets. The
      sizes of the paper; its own lists came from the order of a directory and cannot be
      recovered, so these are a repeatable stand-in.
    * ``"background"``: 964 train, 659 test, no val. The authors' own, by alphabet.

    The images are read once, packed and cached; later calls take below a second.

    Args:
        root: folder with ``images_background`` and ``images_evaluation``, each as the
            official zip archive or unpacked, directly or below ``omniglot``.
        split: name of the split.
        subset: which part of it.
        size: height and width in pixels; the originals have 105.
        resample: how to shrink. ``"nearest"`` gives the pixels of the paper's code,
            where the library fell back to it because the images have one bit.
        download: whether to fetch missing archives (14 MB) into ``root``, over HTTPS
            from the authors' repository on GitHub, checked as ``fetch`` says. Without
            it the network is never touched.
        cache_dir: where to keep the packed array; ``None`` means ``$FASTMAML_CACHE``,
            or else ``~/.cache/fastmaml``.
        progress: whether to show a progress bar while packing, on a terminal.

    Returns:
        Images [characters, 20, 1, size, size] uint8 and names like
        ``Greek/character01``.

    Raises:
        FileNotFoundError: the images are not there and ``download`` is false.
        ValueError: an argument is none of its choices, or the images are not the 1623
            characters of 20 drawings.
    """
    chosen = split_names(split, subset)
    if resample not in _RESAMPLES:
        raise ValueError(f"resample must be one of {_RESAMPLES}, got {resample!r}")
    check_count("size", size)
    folder = Path(root).expanduser()
    with ExitStack() as stack:
        parts = [stack.enter_context(a) for a in _archives(folder, download, progress)]
        key = fingerprint(part.signature() for part in parts)
        name = f"omniglot-v{_VERSION}-{size}-{resample}-{key}"
        images, _ = load_or_build(
            cache_root(cache_dir), name, lambda: _pack(parts, size, resample, progress)
        )
    rows = {character: row for row, character in enumerate(character_names())}
    picked = images[[rows[character] for character in chosen]]
    return FewShotData(torch.from_numpy(picked), chosen)


@functools.lru_cache(maxsize=1)
def character_names() -> tuple[str, ...]:
    """Returns the 1623 names ``alphabet/characterNN`` of Omniglot, sorted."""
    counts = _lists()["characters"].items()
    names = (
        f"{a}/character{i:02d}" for a, count in counts for i in range(1, count + 1)
    )
    return tuple(sorted(names))


def split_names(split: str, subset: str) -> list[str]:
    """Returns the characters of one subset of a split, see ``omniglot``.

    Raises:
        ValueError: there is no such split or subset.
    """
    splits = {"vinyals": _vinyals, "finn": _finn, "background": _background}
    if split not in splits:
        raise ValueError(f"split must be one of {sorted(splits)}, got {split!r}")
    subsets = splits[split]()
    if subset not in subsets:
        raise ValueError(
            f"subset of the split {split!r} must be one of {sorted(subsets)}, got "
            f"{subset!r}"
        )
    return subsets[subset]


@functools.lru_cache(maxsize=1)
def _lists() -> dict[str, Any]:
    file = resources.files("fastmaml.tasks.datasets") / "omniglot_splits.json"
    return json.loads(file.read_text(encoding="utf-8"))


def _vinyals() -> dict[str, list[str]]:
    lists = _lists()
    return {
        subset: [name for entry in entries for name in _expand(entry)]
        for subset, entries in lists["vinyals"].items()
    }


def _expand(entry: str) -> Iterator[str]:
    """Names of an entry: an alphabet, or ``alphabet/first-last``."""
    alphabet, _, span = entry.partition("/")
    span = span or f"1-{_lists()['characters'][alphabet]}"
    first, last = map(int, span.split("-"))
    return (f"{alphabet}/character{i:02d}" for i in range(first, last + 1))


def _finn() -> dict[str, list[str]]:
    names = list(character_names())
    random.Random(1).shuffle(names)
    return {"train": names[:1100], "val": names[1100:1200], "test": names[1200:]}


def _background() -> dict[str, list[str]]:
    evaluation = set(_lists()["evaluation"])
    subsets: dict[str, list[str]] = {"train": [], "test": []}
    for name in character_names():
        held_out = name.partition("/")[0] in evaluation
        subsets["test" if held_out else "train"].append(name)
    return subsets


def _archives(root: Path, download: bool, progress: bool) -> list[Archive]:
    if download:
        for part in PARTS:
            if _find(root, part) is None:
                _download.fetch(part, root, progress=progress)
    found = {part: _find(root, part) for part in PARTS}
    missing = [part for part, path in found.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"root must hold {' and '.join(missing)}, as .zip or unpacked folder, "
            f"directly or below 'omniglot'; {root} does not. Pass download=True to "
            "fetch what is missing from the authors' repository (14 MB)"
        )
    return [Archive(path) for path in found.values() if path is not None]


def _find(root: Path, part: str) -> Path | None:
    spots = (f"{part}.zip", f"omniglot/{part}.zip", part, f"omniglot/{part}")
    return first_existing(root, *spots)


def _pack(
    parts: list[Archive], size: int, resample: str, progress: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    files = character_files(parts)
    jobs = [(row, n, *job) for row, name in enumerate(character_names())
            for n, job in enumerate(files[name])]  # fmt: skip
    images = np.empty((len(files), DRAWINGS, 1, size, size), np.uint8)
    bar = progress_bar(jobs, total=len(jobs), text="packing Omniglot", show=progress)
    for row, n, archive, file in bar:
        images[row, n, 0] = _decode(archive.read(file), size, resample)
    return images, {}


def character_files(parts: list[Archive]) -> dict[str, list[tuple[Archive, str]]]:
    """Returns the drawings of every character, as archive and file name.

    Raises:
        ValueError: these are not the 1623 characters of 20 drawings.
    """
    files: dict[str, list[tuple[Archive, str]]] = {}
    for archive in parts:
        for file in archive.names(".png"):
            character = "/".join(file.split("/")[-3:-1])
            files.setdefault(character, []).append((archive, file))
    wrong = [n for n in character_names() if len(files.get(n, ())) != DRAWINGS]
    wrong += sorted(set(files) - set(character_names()))
    if wrong:
        raise ValueError(
            f"{' and '.join(str(p.path) for p in parts)} must hold {DRAWINGS} drawings "
            f"of each of the 1623 characters of Omniglot; {len(wrong)} differ, such as "
            f"{wrong[0]!r} with {len(files.get(wrong[0], ()))}. "
            "Fetch the archives again"
        )
    return files


def _decode(content: bytes, size: int, resample: str) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(content)) as image:
        grey = image.convert("L")
    if grey.size != (size, size):
        grey = grey.resize((size, size), Image.Resampling[resample.upper()])
    return 255 - np.asarray(grey)
