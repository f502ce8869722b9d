"""The drawn characters: repeatable, and a task that is neither trivial nor hopeless."""

import importlib

import pytest
import torch

from fastmaml.tasks import FewShotImages, glyph_splits, glyphs

module = importlib.import_module("fastmaml.tasks.glyphs")


@pytest.fixture(scope="module")
def images():
    return glyphs(classes=200)


def test_shape_and_dtype():
    images = glyphs(classes=3, drawings=4, size=20)
    assert images.shape == (3, 4, 1, 20, 20)
    assert images.dtype == torch.uint8


def test_drawn_twice_gives_the_same_pixels():
    first = glyphs(classes=5, seed=3)
    module._build.cache_clear()
    assert torch.equal(first, glyphs(classes=5, seed=3))
    assert not torch.equal(first, glyphs(classes=5, seed=4))


def test_smaller_sets_are_the_beginning_of_larger_ones(images):
    assert torch.equal(glyphs(classes=7, drawings=5), images[:7, :5])


def test_the_result_is_the_callers_own():
    first = glyphs(classes=2)
    kept = first.clone()
    first.zero_()
    assert torch.equal(glyphs(classes=2), kept)


def test_ink_is_white_on_black_and_inside_the_frame(images):
    ink = images.float().div(255).mean((2, 3, 4))
    assert ink.min() > 0.02 and ink.max() < 0.4
    rim = images[:, :, 0, [0, -1]].float().mean() / 255
    assert rim < 0.01
    assert (images.flatten(2).amax(2) == 255).all()


def test_no_two_drawings_are_the_same(images):
    assert len(images.flatten(0, 1).flatten(1).unique(dim=0)) == 200 * 20


@pytest.mark.parametrize("size", [14, 64])
def test_other_sizes_show_the_same_characters(images, size):
    other = glyphs(classes=20, size=size).flatten(0, 1).float()
    shrunk = torch.nn.functional.interpolate(other, (7, 7), mode="area")
    usual = torch.nn.functional.adaptive_avg_pool2d(
        images[:20].flatten(0, 1).float(), 7
    )
    both = torch.stack([shrunk.flatten(), usual.flatten()])
    assert torch.corrcoef(both)[0, 1] > 0.95


def test_learnable_but_not_trivial(images):
    tasks = FewShotImages(images, ways=5, shots=1, queries=1).fixed(400)
    distance = torch.cdist(tasks.query_x.flatten(2), tasks.support_x.flatten(2))
    accuracy = (distance.argmin(2) == tasks.query_y).float().mean()
    assert 0.4 < accuracy < 0.8  # chance is 0.2


@pytest.mark.parametrize("classes", [12, 100, 1200])
def test_splits_share_no_class_and_leave_none_out(classes):
    splits = glyph_splits(classes)
    assert list(splits) == ["train", "val", "test"]
    numbers = [list(range(classes))[part] for part in splits.values()]
    assert sum(numbers, []) == list(range(classes))
    assert all(numbers)
    if classes == 1200:
        assert [len(part) for part in numbers] == [800, 100, 300]


def test_cache_on_disk_is_used(tmp_path, monkeypatch):
    module._build.cache_clear()
    first = glyphs(classes=3, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("glyphs-*.npy"))) == 1
    module._build.cache_clear()
    monkeypatch.delattr(module, "_draw_all")
    assert torch.equal(first, glyphs(classes=3, cache_dir=tmp_path))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"classes": 0}, "classes must be at least 1"),
        ({"drawings": 0}, "drawings must be at least 1"),
        ({"size": 7}, "size must be at least 8"),
        ({"seed": -1}, "seed must be at least 0"),
    ],
)
def test_refuses(change, words):
    with pytest.raises(ValueError, match=words):
        glyphs(**change)
    with pytest.raises(ValueError, match="at least 12"):
        glyph_splits(11)
