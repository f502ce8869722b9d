"""Tasks that the CUDA backend samples, emulated, are those of the samplers."""

from __future__ import annotations

import ctypes
import math
import shutil

import emulated_layers as emulated
import numpy as np
import pytest
import torch
from emulated_layers import Memory

from fastmaml.tasks import FewShotImages, Sinusoid
from fastmaml.tasks.philox import distinct, task_words

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

both_dtypes = pytest.mark.parametrize(
    "dtype", (torch.float64, torch.float32), ids=("float64", "float32")
)


def double(dtype) -> int:
    return int(dtype == torch.float64)


def stream_at(key: int, task: int) -> torch.Tensor:
    """Where a stream stands, as in a device's memory."""
    return torch.from_numpy(np.array([key, task, 0], dtype=np.uint64).view(np.int64))


KEY = 0xFEDCBA9876543210


@pytest.fixture(scope="module")
def driver(compiled):
    return emulated.build(compiled)


@pytest.mark.parametrize("plane", [0, 1])
@pytest.mark.parametrize("first", [0, 2**32 - 2])
def test_words_are_those_of_the_stream(driver, plane, first):
    got = torch.zeros(5, 11, dtype=torch.int32)
    driver.call("task_words", KEY, first, 5, plane, 11, got)
    want = task_words(KEY, first, 5, 11, plane=plane)
    assert np.array_equal(got.numpy().view(np.uint32), want)


@both_dtypes
@pytest.mark.parametrize("far", [False, True])
def test_waves_are_those_of_the_sampler(driver, dtype, far):
    x = (-5e6, 5e6) if far else (-5.0, 5.0)
    sampler = Sinusoid(7, 3, seed=5, dtype=dtype, x=x)
    key, first = (sampler.state_dict()[n] for n in ("key", "task"))
    want = sampler.sample(4)
    sizes = {"support": 7, "query": 3}
    memory = Memory(dtype, 1)
    places = [memory.empty(4 * n) for n in sizes.values() for _ in "xy"]
    ranges = torch.tensor([0.1, 5.0, 0.0, math.pi, *x], dtype=torch.float64)
    amplitude, phase = memory.empty(4), memory.empty(4)
    stream = stream_at(key, first)
    driver.call(
        *("sinusoids", double(dtype), stream, 4, 7, 3, ranges, *places),
        *(amplitude, phase),
    )
    assert torch.equal(stream, stream_at(key, first + 4))
    names = ("support_x", "support_y", "query_x", "query_y")
    bound = 1e-13 if double(dtype) else 1e-5
    for got, name in zip(places, names, strict=True):
        w = getattr(want, name).flatten()
        scale = 1e7 if far and double(dtype) else 1.0  # of an argument's rounding
        if far and not double(dtype) and name.endswith("y"):
            continue  # the sine of a float32 whose rounding exceeds the period
        torch.testing.assert_close(got, w, rtol=bound, atol=bound * scale)
    memory.check()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_waves_of_many_blocks_read_the_stream_before_it_moves(driver, seed):
    """In any order of blocks: 100 tasks of 20 samples are 8."""
    sampler = Sinusoid(15, 5, seed=7)
    key, first = (sampler.state_dict()[n] for n in ("key", "task"))
    memory = Memory(torch.float32, 1)
    places = [memory.empty(100 * n) for n in (15, 5) for _ in "xy"]
    ranges = torch.tensor([0.1, 5.0, 0.0, math.pi, -5.0, 5.0], dtype=torch.float64)
    stream = stream_at(key, first)
    driver.library.shuffle(ctypes.c_int64(seed))
    for draw in range(2):
        want = sampler.sample(100)
        driver.call("sinusoids", 0, stream, 100, 15, 5, ranges, *places, None, None)
        assert torch.equal(stream, stream_at(key, first + 100 * (draw + 1)))
        for got, x in zip(places[::2], (want.support_x, want.query_x), strict=True):
            torch.testing.assert_close(got, x.flatten(), rtol=1e-6, atol=1e-6)
    driver.library.shuffle(ctypes.c_int64(0))
    memory.check()


@pytest.mark.parametrize(
    "sizes", [(5, 7, 5, 1, 2), (40, 20, 33, 5, 15), (9, 3, 2, 3, 0)]
)
def test_episodes_are_those_of_the_stream(driver, sizes):
    classes, drawings, ways, shots, queries = sizes
    tasks, each = 3, shots + queries
    rows = [torch.full((tasks, ways, n), -1) for n in (shots, queries) * 2]
    stream = stream_at(KEY, 2**32 - 2)
    driver.call("episodes", stream, tasks, torch.tensor(sizes), *rows)
    assert torch.equal(stream, stream_at(KEY, 2**32 - 2))
    words = task_words(KEY, 2**32 - 2, tasks, ways * (1 + each))
    picked = distinct(words[:, :ways], classes)
    drawn = distinct(words[:, ways:].reshape(-1, each), drawings)
    want = picked[:, :, None] * drawings + drawn.reshape(tasks, ways, each)
    assert np.array_equal(torch.cat(rows[:2], 2).numpy(), want)
    for labels in rows[2:]:
        assert torch.equal(labels, torch.arange(ways)[:, None].expand_as(labels))


def test_episodes_that_do_not_fit_are_refused(driver):
    rows = torch.empty(1000)
    for sizes, reason in (
        ((5, 7, 6, 1, 2), "ways: expected 1 to 5, got 6"),
        ((5, 7, 5, 5, 3), "at most 7, got 5 \\+ 3"),
        ((5, 7000, 5, 5, 3000), "32 \\(shots \\+ queries\\)"),
    ):
        with pytest.raises(RuntimeError, match=reason):
            driver.call(
                *("episodes", stream_at(1, 0), 1, torch.tensor(sizes), rows, rows),
                *(None, None),
            )


@both_dtypes
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_those_of_the_sampler(
    driver, dtype, channels, invert, channels_last
):
    images = torch.randint(256, (6, 5, channels, 17, 17)).to(torch.uint8)
    rotations = (0, 270, 90, 180)
    options = {"ways": 5, "shots": 1, "queries": 2, "rotations": rotations}
    options |= {"invert": invert, "channels_last": channels_last, "dtype": dtype}
    sampler = FewShotImages(images, seed=3, **options)
    key, first = (sampler.state_dict()[n] for n in ("key", "task"))
    want = sampler.sample(3)
    rows = torch.full((45,), -1)
    sizes = torch.tensor([24, 5, 5, 1, 2])
    stream = stream_at(key, first)
    driver.call("episodes", stream, 3, sizes, rows, rows[15:], None, None)
    quarters = torch.tensor([angle // 90 for angle in rotations])
    memory = Memory(dtype, 1)
    halves = (want.support_x, want.query_x)
    outs = [memory.empty(x.numel()) for x in halves]
    driver.call(
        *("gather_images", double(dtype), images),
        *(torch.tensor([6, 5, channels, 17, 17]), quarters),
        *(int(invert), int(channels_last), rows, 15, 30, *outs, stream, 3),
    )
    for x, out in zip(halves, outs, strict=True):
        stored = x.permute(0, 1, 3, 4, 2) if channels_last else x
        assert torch.equal(out.view(stored.shape), stored)
    assert torch.equal(stream, stream_at(key, first + 3))
    memory.check()
