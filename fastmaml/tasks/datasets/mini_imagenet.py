"""MiniImagenet: 100 classes of ImageNet, 600 images of 84 x 84 each.

The lists of Ravi and Larochelle 2017: 64 train, 16 validation, 20 test classes.
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastmaml.tasks.datasets.archive import Archive
from fastmaml.tasks.datasets.cache import (
    cache_root,
    fingerprint,
    load_or_build,
    progress_bar,
)
from fastmaml.tasks.datasets.data import FewShotData
from fastmaml.tasks.sampler import check_count

Subset = Literal["train", "val", "test"]
_SUBSETS = ("train", "val", "test")
_VERSION = 1  # of the packing; part of the name of a cached file
_Classes = dict[str, list[tuple[Archive, str]]]


def mini_imagenet(
    root: str | os.PathLike[str],
    *,
    subset: Subset = "train",
    size: int = 84,
    truncate: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> FewShotData:
    """Returns MiniImagenet's images of one subset.

    Two layouts are read, below ``root`` or ``root/mini_imagenet``. In both the lists
    have the header ``filename,label``:

    * ``images/*.jpg`` beside ``train.csv``, ``val.csv`` and ``test.csv``;
    * archives or folders that hold their csv and ``images/*.jpg``, one or several a
      subset: ``train.zip``, or ``train_a.zip`` and ``train_b.zip``.

    This package neither contains nor fetches the images. They are ImageNet's, whose
    terms allow non-commercial research and education alone and forbid passing them on;
    get them after accepting those terms at image-net.org, and don't publish the cache.

    The images are read once, packed and cached (0.8 GB for all of ``train``).

    Args:
        root: folder of the data set.
        subset: ``"train"``, ``"val"`` or ``"test"``.
        size: height and width in pixels; images of another size are resized by Lanczos'
            filter as in the paper's code.
        truncate: whether to cut all classes to the number of images of the smallest
            one, with a warning; otherwise unequal numbers are an error.
        cache_dir: where to keep the packed array; ``None`` means ``$FASTMAML_CACHE``,
            or else ``~/.cache/fastmaml``.
        progress: whether to show a progress bar while packing, on a terminal.

    Returns:
        Images [classes, n, 3, size, size] uint8, classes and their images in sorted
        order, and the WordNet ids of the classes.

    Raises:
        FileNotFoundError: lists or images are not there.
        ValueError: an argument, list or image does not fit.
    """
    if subset not in _SUBSETS:
        raise ValueError(f"subset must be one of {_SUBSETS}, got {subset!r}")
    check_count("size", size)
    with ExitStack() as stack:
        sources = [
            (stack.enter_context(Archive(path)), lists)
            for path, lists in _sources(Path(root).expanduser(), subset)
        ]
        key = fingerprint(
            (archive.signature(), lists, truncate) for archive, lists in sources
        )
        images, notes = load_or_build(
            cache_root(cache_dir),
            f"mini-imagenet-v{_VERSION}-{subset}-{size}-{key}",
            lambda: _pack(_classes(sources), size, truncate, progress),
        )
    return FewShotData(torch.from_numpy(images), list(notes["names"]))


def _sources(root: Path, subset: str) -> list[tuple[Path, str | None]]:
    """Archives or folders of a subset, each with its list or ``None`` for all in it."""
    for base in (root, root / "mini_imagenet"):
        if (base / f"{subset}.csv").exists() and (base / "images").is_dir():
            return [(base, f"{subset}.csv")]
        parts = [*base.glob(f"{subset}.zip"), *sorted(base.glob(f"{subset}_*.zip"))]
        folders = [base / subset, *sorted(base.glob(f"{subset}_*"))]
        parts = parts or [f for f in folders if f.is_dir() and any(f.glob("*.csv"))]
        if parts:
            return [(part, None) for part in parts]
    raise FileNotFoundError(
        f"root must hold {subset}.csv and images/, or {subset}.zip, or {subset}_*.zip, "
        f"directly or below 'mini_imagenet'; {root} does not"
    )


def _classes(sources: list[tuple[Archive, str | None]]) -> _Classes:
    """Images of every class, as archive and file name, all sorted."""
    classes: dict[str, set[tuple[str, str]]] = {}
    archives = {str(archive.path): archive for archive, _ in sources}
    for archive, chosen in sources:
        files = {name.rsplit("/", 1)[-1]: name for name in archive.names()}
        for csv_name in [chosen] if chosen else archive.names(".csv"):
            for file, label in _read_list(archive, csv_name):
                if file not in files:
                    raise FileNotFoundError(
                        f"{archive.path} lists {file!r} in {csv_name} but has no such "
                        "image; fetch the missing images, or correct the list"
                    )
                images = classes.setdefault(label, set())
                images.add((files[file], str(archive.path)))
    return {
        label: [(archives[path], file) for file, path in sorted(classes[label])]
        for label in sorted(classes)
    }


def _read_list(archive: Archive, name: str) -> list[tuple[str, str]]:
    text = io.StringIO(archive.read(name).decode("utf-8-sig"))
    rows = list(csv.DictReader(text))
    if not rows or not {"filename", "label"} <= set(rows[0]):
        raise ValueError(
            f"{name} of {archive.path} must be a csv with the header filename,label "
            "and at least one row"
        )
    return [(row["filename"], row["label"]) for row in rows]


def _pack(
    classes: _Classes, size: int, truncate: bool, progress: bool
) -> tuple[np.ndarray, dict[str, Any]]:
    count = _count(classes, truncate)
    images = np.empty((len(classes), count, 3, size, size), np.uint8)
    jobs = [(row, n, *job) for row, files in enumerate(classes.values())
            for n, job in enumerate(files[:count])]  # fmt: skip
    bar = progress_bar(
        jobs, total=len(jobs), text="packing MiniImagenet", show=progress
    )
    for row, n, archive, file in bar:
        images[row, n] = _decode(archive, file, size)
    return images, {"names": list(classes)}


def _count(classes: _Classes, truncate: bool) -> int:
    """Images a class has, after truncation if that was asked for."""
    counts = {label: len(files) for label, files in classes.items()}
    least, most = min(counts, key=counts.__getitem__), max(counts.values())
    if counts[least] == most:
        return most
    if not truncate:
        raise ValueError(
            f"all classes must have the same number of images, got {counts[least]} of "
            f"{least} and up to {most} of others; pass truncate=True to use "
            f"{counts[least]} of each"
        )
    warnings.warn(
        f"using {counts[least]} of up to {most} images a class, as {least} has no more",
        stacklevel=2,
    )
    return counts[least]


def _decode(archive: Archive, file: str, size: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(archive.read(file))) as image:
            colour = image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(
            f"{file} of {archive.path} is no readable image ({error}); fetch it again"
        ) from error
    if colour.size != (size, size):
        colour = colour.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(colour).transpose(2, 0, 1)
