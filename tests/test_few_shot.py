"""FewShotImages: what makes a task valid, told from pixels that name their origin."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaml.tasks import FewShotImages

CLASSES, DRAWINGS = 30, 8


def named_images(classes=CLASSES, drawings=DRAWINGS):
    """[classes, n, 2, 3, 3] images; channel 0 is the class, channel 1 the drawing."""
    images = torch.empty(classes, drawings, 2, 3, 3, dtype=torch.uint8)
    images[:, :, 0] = torch.arange(classes).view(-1, 1, 1, 1)
    images[:, :, 1] = torch.arange(drawings).view(1, -1, 1, 1)
    return images


def origin(x):
    """Classes and drawings [T, N] that images of ``named_images`` come from."""
    return (x[:, :, :, 0, 0] * 255).round().long().unbind(2)


def test_shapes_labels_and_order():
    sampler = FewShotImages(named_images(), ways=4, shots=2, queries=3)
    batch = sampler.sample(6)
    assert batch.support_x.shape == (6, 8, 2, 3, 3)
    assert batch.query_x.shape == (6, 12, 2, 3, 3)
    assert batch.support_y[5].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert batch.query_y[5].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    assert (sampler.input_shape, sampler.outputs) == ((2, 3, 3), 4)


def test_a_label_is_one_class_and_no_two_labels_share_one():
    batch = FewShotImages(named_images(), ways=5, shots=2, queries=3).sample(200)
    support = origin(batch.support_x)[0].view(200, 5, 2)
    query = origin(batch.query_x)[0].view(200, 5, 3)
    assert (support == support[:, :, :1]).all()
    assert (query == support[:, :, :1]).all()
    ordered = support[:, :, 0].sort(1).values
    assert (ordered[:, 1:] > ordered[:, :-1]).all()


def test_images_of_a_class_are_distinct_over_support_and_query():
    batch = FewShotImages(named_images(), ways=5, shots=3, queries=5).sample(200)
    support = origin(batch.support_x)[1].view(200, 5, 3)
    query = origin(batch.query_x)[1].view(200, 5, 5)
    every = torch.cat([support, query], 2).sort(2).values
    assert torch.equal(every, torch.arange(8).expand(200, 5, 8))  # all 8, once each


def test_all_classes_are_needed_at_the_limit():
    batch = FewShotImages(named_images(classes=5), ways=5, queries=7).sample(50)
    classes = origin(batch.support_x)[0].sort(1).values
    assert torch.equal(classes, torch.arange(5).expand(50, 5))


def test_every_ordered_pair_of_drawings_is_equally_likely():
    sampler = FewShotImages(named_images(drawings=5), ways=5, shots=1, queries=1)
    batch = sampler.sample(4000)
    codes = origin(batch.support_x)[1] * 5 + origin(batch.query_x)[1]
    seen = torch.bincount(codes.flatten(), minlength=25).double()
    assert (seen[::6] == 0).all()  # never twice the same
    seen = seen[seen > 0]
    expected = 20_000 / 20
    # 19 degrees of freedom: 47 is exceeded once in 2500 streams
    assert len(seen) == 20 and ((seen - expected) ** 2 / expected).sum() < 47


def test_every_class_is_equally_likely():
    batch = FewShotImages(named_images(), ways=5).sample(6000)
    seen = torch.bincount(origin(batch.support_x)[0].flatten(), minlength=30).double()
    # 29 degrees of freedom, less for drawing without replacement
    assert ((seen - 1000) ** 2 / 1000).sum() < 62


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_are_exactly_the_images_over_255(dtype, channels_last):
    images = torch.randint(0, 256, (6, 3, 3, 4, 5), dtype=torch.uint8)
    sampler = FewShotImages(
        images, ways=6, shots=2, dtype=dtype, channels_last=channels_last
    )
    batch = sampler.sample(4)
    pool = {image.numpy().tobytes() for image in (images.to(dtype) / 255).flatten(0, 1)}
    for x in (*batch.support_x.flatten(0, 1), *batch.query_x.flatten(0, 1)):
        assert x.contiguous().numpy().tobytes() in pool


def test_channels_last_changes_memory_and_nothing_else():
    images = torch.randint(0, 256, (9, 4, 3, 5, 5), dtype=torch.uint8)
    usual, last = (
        FewShotImages(images, rotations=(0, 90), channels_last=flag).sample(3)
        for flag in (False, True)
    )
    for name in ("support_x", "query_x"):
        x = getattr(last, name)
        assert torch.equal(getattr(usual, name), x)
        assert getattr(usual, name).is_contiguous()
        flat = x.flatten(0, 1)
        assert flat.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("angles", [(0, 90), (180, 270), (0, 90, 180, 270)])
def test_rotations_are_pils_counter_clockwise_ones(angles):
    image = torch.randint(0, 256, (1, 1, 1, 7, 7), dtype=torch.uint8)
    images = image.expand(1, 2, 1, 7, 7)
    sampler = FewShotImages(images, ways=len(angles), rotations=angles)
    assert sampler.classes == len(angles)
    picture = Image.fromarray(image[0, 0, 0].numpy())
    expected = {np.asarray(picture.rotate(angle)).tobytes() for angle in angles}
    got = (sampler.sample(1).support_x[0, :, 0] * 255).round().byte().numpy()
    assert {x.tobytes() for x in got} == expected and len(expected) == len(angles)


def test_a_class_keeps_its_rotation_over_support_and_query():
    images = named_images(classes=3)
    images[:, :, :, 0, 0] = 255  # marks the corner, which rotations move
    sampler = FewShotImages(images, ways=8, queries=4, rotations=(0, 90, 180, 270))
    batch = sampler.sample(50)

    def corner(x):
        return (x[:, :, 0] == 1).flatten(2).int().argmax(2)

    support = corner(batch.support_x)
    query = corner(batch.query_x).view(50, 8, 4)
    assert (query == support.unsqueeze(2)).all()
    assert support.unique().tolist() == [0, 2, 6, 8]


def test_invert():
    images = named_images()
    plain, inverted = (
        FewShotImages(images, invert=flag).sample(3).query_x for flag in (False, True)
    )
    torch.testing.assert_close(inverted, 1 - plain)


def test_numpy_images_also_read_only_are_copied_not_shared():
    images = named_images().numpy()
    images.flags.writeable = False
    sampler = FewShotImages(images)
    same = FewShotImages(named_images())
    assert torch.equal(sampler.sample(4).support_x, same.sample(4).support_x)


def test_state_continues_the_stream_bit_for_bit():
    sampler = FewShotImages(named_images(), seed=5)
    first = sampler.sample(2)
    state = sampler.state_dict()
    ahead = [sampler.sample(3) for _ in range(3)]
    resumed = FewShotImages(named_images(), seed=77)
    resumed.load_state_dict(state)
    for batch in ahead:
        again = resumed.sample(3)
        assert torch.equal(batch.support_x, again.support_x)
        assert torch.equal(batch.query_x, again.query_x)
    assert not torch.equal(first.support_x, ahead[0].support_x[:2])


def test_fixed_set_does_not_move_the_stream():
    sampler = FewShotImages(named_images(), seed=2)
    fixed = sampler.fixed(4, seed=2)
    assert torch.equal(fixed.query_x, sampler.fixed(4, seed=2).query_x)
    first = sampler.sample(4)
    assert torch.equal(
        first.query_x, FewShotImages(named_images(), seed=2).sample(4).query_x
    )
    assert not torch.equal(first.query_x, fixed.query_x)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"images": named_images().float()}, TypeError, "uint8.*got torch.float32"),
        ({"images": [1]}, TypeError, "got list"),
        ({"images": named_images()[0]}, ValueError, r"shape \(8, 2, 3, 3\)"),
        ({"ways": 31}, ValueError, "ways must be at most the 30 classes"),
        ({"ways": 1}, ValueError, "ways must be at least 2"),
        ({"shots": 5, "queries": 4}, ValueError, r"at most the 8 images.*5 \+ 4"),
        ({"queries": 0}, ValueError, "queries must be at least 1"),
        ({"rotations": (0, 45)}, ValueError, "rotations must be some of"),
        ({"rotations": ()}, ValueError, "rotations must be some of"),
        ({"rotations": (90, 90)}, ValueError, "must not repeat"),
        (
            {"images": named_images()[..., :2], "rotations": (0, 90)},
            ValueError,
            "square images, got 3 x 2",
        ),
    ],
)
def test_refuses(change, error, words):
    with pytest.raises(error, match=words):
        FewShotImages(**{"images": named_images(), **change})
