"""Data sets: splits, packing and layouts, on made and on real files."""

import collections
import hashlib
import importlib
import io
import json
import socket
import zipfile

import numpy as np
import pytest
import torch
from dataset_files import (
    TWO,
    drawing,
    omniglot_files,
    photos,
    write_folder,
    write_zip,
)
from PIL import Image

from fastmaml.tasks import mini_imagenet, omniglot
from fastmaml.tasks.datasets import archive

module = importlib.import_module("fastmaml.tasks.datasets.omniglot")
SPLITS = [
    ("vinyals", "train", 1028), ("vinyals", "val", 172), ("vinyals", "test", 423),
    ("finn", "train", 1100), ("finn", "val", 100), ("finn", "test", 423),
    ("background", "train", 964), ("background", "test", 659),
]  # fmt: skip


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)


@pytest.fixture
def small_omniglot(tmp_path, monkeypatch):
    """A root whose Omniglot has two characters, one in each archive."""
    monkeypatch.setattr(module, "character_names", lambda: TWO)
    root = tmp_path / "root"
    root.mkdir()
    for part in module.PARTS:
        write_zip(root / f"{part}.zip", omniglot_files(part))
    return root


# Splits


@pytest.mark.parametrize(("split", "subset", "size"), SPLITS)
def test_splits_have_the_published_sizes_and_real_names(split, subset, size):
    names = module.split_names(split, subset)
    assert len(names) == len(set(names)) == size
    assert set(names) <= set(module.character_names())


@pytest.mark.parametrize("split", ["vinyals", "finn", "background"])
def test_subsets_share_no_character_and_leave_none_out(split):
    names = [n for s, subset, _ in SPLITS if s == split
             for n in module.split_names(split, subset)]  # fmt: skip
    assert sorted(names) == list(module.character_names())


def test_vinyals_split_divides_one_alphabet_alone():
    found = collections.defaultdict(set)
    for subset in ("train", "val", "test"):
        for name in module.split_names("vinyals", subset):
            found[name.split("/")[0]].add(subset)
    assert [a for a, subsets in found.items() if len(subsets) > 1] == ["Gurmukhi"]
    test = module.split_names("vinyals", "test")
    assert test[:4] == [f"Gurmukhi/character{i}" for i in (42, 43, 44, 45)]


def test_finn_split_never_changes():
    assert module.split_names("finn", "train")[:2] == [
        "Gurmukhi/character23",
        "Malayalam/character36",
    ]
    names = [n for s in ("train", "val", "test") for n in module.split_names("finn", s)]
    digest = hashlib.sha256("\n".join(names).encode()).hexdigest()
    assert digest.startswith("3dfcf2bce87c9b5b")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"split": "lake"}, "split must be one of.*'vinyals'.*got 'lake'"),
        ({"split": "background", "subset": "val"}, r"\['test', 'train'\], got 'val'"),
        ({"resample": "cubic"}, "resample must be one of"),
        ({"size": 0}, "size must be at least 1"),
    ],
)
def test_omniglot_refuses(tmp_path, arguments, words):
    with pytest.raises(ValueError, match=words):
        omniglot(tmp_path, **arguments)


# Packing Omniglot


def test_pixels_are_those_of_the_papers_code(small_omniglot, tmp_path):
    """Asked for Lanczos on 1-bit images, Pillow takes the nearest pixel."""
    data = omniglot(small_omniglot, split="background", cache_dir=tmp_path)
    assert data.names == [TWO[1]] and len(data) == 1
    assert data.images.shape == (1, 20, 1, 28, 28) and data.images.dtype == torch.uint8
    for i in range(20):
        image = Image.fromarray(drawing(i)).convert("1")
        shrunk = image.resize((28, 28), Image.Resampling.LANCZOS)
        expected = 255 - np.asarray(shrunk.convert("L"))
        assert np.array_equal(data.images[0, i, 0].numpy(), expected)


def test_resampling_and_size(small_omniglot, tmp_path):
    def read(**arguments):
        data = omniglot(
            small_omniglot, split="background", cache_dir=tmp_path, **arguments
        )
        return data.images

    assert read(size=105)[0, 3, 0].equal(torch.from_numpy(255 - drawing(3)))
    smooth = read(resample="lanczos")
    assert len(smooth.unique()) > 10 and not smooth.equal(read())
    assert read(size=14, resample="box").shape[3:] == (14, 14)


@pytest.mark.parametrize("below", ["", "omniglot"])
@pytest.mark.parametrize("unpacked", [False, True])
def test_layouts_give_the_same_images(small_omniglot, tmp_path, below, unpacked):
    root = tmp_path / "other" / below
    root.mkdir(parents=True)
    for part in module.PARTS:
        files = omniglot_files(part)
        fork = {f"__MACOSX/{part}/a/b/._x.png": b"", f"{part}/a/b/._y.png": b""}
        if unpacked:
            write_folder(root, files)
        else:
            write_zip(root / f"{part}.zip", {**files, **fork})
    for subset in ("train", "test"):
        arguments = {"split": "background", "subset": subset, "cache_dir": tmp_path}
        one = omniglot(small_omniglot, **arguments)
        other = omniglot(tmp_path / "other", **arguments)
        assert one.images.equal(other.images) and one.names == other.names


def test_missing_archives_are_named_and_nothing_is_fetched(tmp_path, no_network):
    write_zip(tmp_path / "images_background.zip", {})
    with pytest.raises(FileNotFoundError, match=r"hold images_evaluation,.*download="):
        omniglot(tmp_path)


def test_incomplete_archives_are_refused(small_omniglot, tmp_path):
    files = omniglot_files("images_background", drawings=19)
    write_zip(small_omniglot / "images_background.zip", files)
    with pytest.raises(ValueError, match="1 differ.*'Greek/character01' with 19"):
        omniglot(small_omniglot, split="background", cache_dir=tmp_path)


def test_a_damaged_archive_is_named(small_omniglot, tmp_path):
    (small_omniglot / "images_background.zip").write_bytes(b"not a zip")
    with pytest.raises(ValueError, match=r"images_background.zip is no zip archive"):
        omniglot(small_omniglot, split="background", cache_dir=tmp_path)


def test_second_call_reads_the_cache_and_new_files_replace_it(
    small_omniglot, tmp_path, monkeypatch
):
    arguments = {"split": "background", "cache_dir": tmp_path / "cache"}
    first = omniglot(small_omniglot, **arguments)
    with monkeypatch.context() as patch:
        patch.delattr(module, "_pack")
        assert omniglot(small_omniglot, **arguments).images.equal(first.images)
    files = omniglot_files("images_background")
    files = dict(zip(files, reversed(files.values()), strict=True))
    write_zip(small_omniglot / "images_background.zip", files, zipfile.ZIP_STORED)
    changed = omniglot(small_omniglot, **arguments)
    assert changed.images.equal(first.images.flip(1))


# MiniImagenet


def test_both_layouts_of_mini_imagenet_agree(tmp_path):
    files, text = photos(["n03", "n01"])
    write_folder(tmp_path / "one", {**files, "train.csv": text.encode()})
    write_zip(tmp_path / "train.zip", {**files, "train.csv": text})
    one = mini_imagenet(tmp_path / "one", cache_dir=tmp_path / "cache")
    other = mini_imagenet(tmp_path, cache_dir=tmp_path / "cache")
    assert one.names == other.names == ["n01", "n03"]
    assert one.images.equal(other.images) and one.images.shape == (2, 3, 3, 84, 84)
    with Image.open(io.BytesIO(files["images/n0100002.jpg"])) as image:
        expected = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(one.images[0, 2].numpy(), expected)


def test_a_subset_in_parts_and_below_its_own_folder(tmp_path):
    for part, labels in (("a", ["n02", "n04"]), ("b", ["n03"])):
        files, text = photos(labels)
        name = tmp_path / "mini_imagenet" / f"val_{part}.zip"
        name.parent.mkdir(exist_ok=True)
        write_zip(name, {**files, f"val_{part}.csv": text})
    data = mini_imagenet(tmp_path, subset="val", cache_dir=tmp_path)
    assert data.names == ["n02", "n03", "n04"]


def test_the_list_chooses_the_images(tmp_path):
    files, _ = photos(["n01", "n02"])
    text = "filename,label\nn0200001.jpg,n02\n"
    write_folder(tmp_path, {**files, "test.csv": text.encode()})
    data = mini_imagenet(tmp_path, subset="test", cache_dir=tmp_path / "cache")
    assert data.names == ["n02"] and data.images.shape[:2] == (1, 1)


def test_a_cache_inside_the_data_folder_is_used_again(tmp_path, monkeypatch):
    files, text = photos(["n01"])
    write_folder(tmp_path, {**files, "train.csv": text.encode()})
    first = mini_imagenet(tmp_path, cache_dir=tmp_path)
    package = importlib.import_module("fastmaml.tasks.datasets.mini_imagenet")
    monkeypatch.delattr(package, "_pack")
    assert mini_imagenet(tmp_path, cache_dir=tmp_path).images.equal(first.images)


def test_other_sizes_and_grey_images_are_converted(tmp_path):
    grey = io.BytesIO()
    Image.new("L", (90, 70), 128).save(grey, "JPEG")
    text = "filename,label\na.jpg,n01\n"
    write_folder(
        tmp_path, {"images/a.jpg": grey.getvalue(), "train.csv": text.encode()}
    )
    data = mini_imagenet(tmp_path, size=20, cache_dir=tmp_path)
    assert data.images.shape == (1, 1, 3, 20, 20) and (data.images == 128).all()


def test_unequal_classes_are_refused_or_cut_openly(tmp_path):
    files, text = photos(["n01", "n02"])
    short = text.replace("n0200002.jpg,n02\n", "")
    write_folder(tmp_path, {**files, "train.csv": short.encode()})
    with pytest.raises(ValueError, match="2 of n02 and up to 3.*truncate=True"):
        mini_imagenet(tmp_path, cache_dir=tmp_path)
    with pytest.warns(UserWarning, match="using 2 of up to 3 images a class"):
        data = mini_imagenet(tmp_path, truncate=True, cache_dir=tmp_path)
    assert data.images.shape[:2] == (2, 2)


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({}, FileNotFoundError, r"root must hold train.csv and images/"),
        (
            {"train.csv": b"filename,label\nb.jpg,n1\n"},
            FileNotFoundError,
            "lists 'b.jpg' in train.csv but has no such image",
        ),
        ({"train.csv": b"name,label\na.jpg,n1\n"}, ValueError, "header filename,label"),
        ({"train.csv": b"filename,label\n"}, ValueError, "at least one row"),
        (
            {"train.csv": b"filename,label\na.jpg,n1\n"},
            ValueError,
            "images/a.jpg of .* is no readable image",
        ),
    ],
)
def test_mini_imagenet_refuses(tmp_path, files, error, words):
    write_folder(tmp_path, {"images/a.jpg": b"no image", **files})
    with pytest.raises(error, match=words):
        mini_imagenet(tmp_path, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="subset must be one of"):
        mini_imagenet(tmp_path, subset="all")


# The real files


def test_real_omniglot(data_dir):
    train, test = (omniglot(data_dir, subset=s) for s in ("train", "test"))
    assert train.images.shape == (1028, 20, 1, 28, 28)
    assert test.images.shape == (423, 20, 1, 28, 28)
    assert train.images.unique().tolist() == [0, 255]
    ink = train.images.float().mean() / 255
    assert 0.05 < ink < 0.15  # white ink on black, not the reverse


def test_real_omniglot_splits_are_the_recorded_ones(data_dir):
    recorded = json.loads((data_dir / "omniglot" / "splits.json").read_text())
    names = module.character_names()
    keys = {"vinyals": "vinyals", "finn": "finn_style",
            "background": "background_evaluation"}  # fmt: skip
    for split, subset, _ in SPLITS:
        expected = [names[i] for i in recorded[keys[split]][subset]]
        assert module.split_names(split, subset) == expected


def test_real_mini_imagenet(data_dir):
    data = mini_imagenet(data_dir, subset="val")
    assert data.images.shape == (16, 300, 3, 84, 84)
    assert data.names == sorted(data.names) and data.names[0] == "n01855672"
    mean = data.images.float().mean((0, 1, 3, 4)) / 255
    assert (mean > 0.35).all() and (mean < 0.55).all()  # of natural photographs


def test_real_mini_imagenet_subsets_share_no_class(data_dir):
    package = importlib.import_module("fastmaml.tasks.datasets.mini_imagenet")
    labels = {}
    for subset in ("train", "val", "test"):
        sources = [(archive.Archive(path), lists)
                   for path, lists in package._sources(data_dir, subset)]  # fmt: skip
        classes = package._classes(sources)
        assert {len(files) for files in classes.values()} == {300}
        labels[subset] = set(classes)
    assert {s: len(found) for s, found in labels.items()} == {
        "train": 64,
        "val": 16,
        "test": 20,
    }
    assert len(set.union(*labels.values())) == 100
