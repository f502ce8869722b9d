"""The stream of random words: the published generator, and one stream everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fastmaml
from fastmaml import _native
from fastmaml.tasks import FewShotImages, Sinusoid
from fastmaml.tasks.philox import TaskStream, distinct, philox4x32, task_words

FIELDS = ("support_x", "support_y", "query_x", "query_y")
native = pytest.mark.skipif(
    _native.unavailable() is not None, reason="the native engine is not built"
)

# counter, key and answer: the known answers that accompany Salmon et al. 2011
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert tuple(philox4x32(counter, key).tolist()) == answer


@native
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers_of_the_extension(counter, key, answer):
    assert tuple(_native.core().philox4x32(counter, key)) == answer


def test_word_i_of_task_t_is_where_it_is_said_to_be():
    key, first = 0x0123456789ABCDEF, 2**32 - 1
    words = task_words(key, first, 3, 7, plane=1)
    for t in range(3):
        for i in range(7):
            number = first + t
            counter = (i // 4, 1, number % 2**32, number // 2**32)
            block = philox4x32(counter, (0x89ABCDEF, 0x01234567))
            assert words[t, i] == block[i % 4]


def test_a_stream_moves_past_what_it_gave():
    stream = TaskStream(5)
    together = task_words(5, 0, 7, 3)
    parts = [stream.words(n, 3) for n in (3, 4)]
    assert np.array_equal(np.concatenate(parts), together)
    assert stream.task == 7


@pytest.mark.parametrize(("choices", "count"), [(4, 3), (4, 4), (5, 2), (3, 1)])
def test_every_ordered_selection_is_equally_likely(choices, count):
    rows = 48_000
    picks = distinct(task_words(0, 0, rows, count), choices)
    assert picks.shape == (rows, count)
    codes = (picks * choices ** np.arange(count)).sum(1)
    seen = np.bincount(codes)
    seen = seen[seen > 0]
    selections = int(np.prod(np.arange(choices - count + 1, choices + 1)))
    assert len(seen) == selections
    expected = rows / selections
    chi_square = ((seen - expected) ** 2 / expected).sum()
    freedom = max(selections - 1, 1)
    assert chi_square < freedom + 4.5 * (2 * freedom) ** 0.5


def images(classes=30, drawings=9, size=(2, 3, 5)):
    generator = torch.Generator().manual_seed(0)
    shape = (classes, drawings, *size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


SAMPLERS = {
    "sinusoid": lambda **o: Sinusoid(7, 4, **o),
    "sinusoid, other ranges": lambda **o: Sinusoid(
        1, 1, amplitude=(-1, 2), phase=(2, 2), x=(0, 9), **o
    ),
    "images": lambda **o: FewShotImages(images(), ways=4, shots=2, queries=3, **o),
    "all images": lambda **o: FewShotImages(
        images(5), ways=5, shots=1, queries=8, invert=True, channels_last=True, **o
    ),
}
every_sampler = pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)


def without_extension(make, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(_native, "unavailable", lambda: "taken away")
        return make(**options)


def strides(tensor):
    """Of the axes that are longer than one; the others' mean nothing."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in pairs if size > 1]


@native
@every_sampler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_restatement_gives_the_same_tasks(make, dtype, monkeypatch):
    options = {"seed": 2**63 + 11, "dtype": dtype}
    drawn = make(**options)
    restated = without_extension(make, monkeypatch, **options)
    for sampler in (drawn, restated):
        sampler.load_state_dict(sampler.state_dict() | {"task": 2**32 - 3})
    for tasks in (5, 1, 8):
        one, other = drawn.sample(tasks), restated.sample(tasks)
        for name in FIELDS:
            a, b = getattr(one, name), getattr(other, name)
            assert (a.dtype, a.shape, strides(a)) == (b.dtype, b.shape, strides(b))
            exact = name.endswith("_x") and "images" in type(drawn).__name__.lower()
            if exact or not a.is_floating_point():
                assert torch.equal(a, b)
            else:
                # a few roundings of numbers up to 5
                bound = 16 * torch.finfo(dtype).eps
                torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@every_sampler
def test_tasks_do_not_depend_on_how_they_are_batched(make):
    one, other = make(seed=3), make(seed=3)
    whole, parts = one.sample(7), [other.sample(n) for n in (1, 4, 2)]
    for name in FIELDS:
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(whole, name), joined)
    assert one.state_dict() == other.state_dict()
    fixed = list(one.fixed_batches(7, 1, batch=3))
    assert torch.equal(
        torch.cat([part.query_x for part in fixed]), one.fixed(7, 1).query_x
    )


@every_sampler
def test_double_precision_refines_single(make):
    single, double = (make(seed=4, dtype=d) for d in (torch.float32, torch.float64))
    a, b = single.sample(6), double.sample(6)
    torch.testing.assert_close(a.support_x, b.support_x.float(), rtol=1e-6, atol=1e-5)
    if isinstance(single, Sinusoid):
        assert not torch.equal(b.support_x, b.support_x.float().double())


@every_sampler
def test_half_precision_is_the_same_stream(make):
    half, single = make(seed=4, dtype=torch.bfloat16), make(seed=4)
    a, b = half.sample(3), single.sample(3)
    torch.testing.assert_close(a.query_x.float(), b.query_x, rtol=1e-2, atol=1e-2)


@native
def test_threads_do_not_change_the_images():
    # more pixels than one thread takes
    pool = images(6, 12, (3, 84, 84))
    before = fastmaml.get_num_threads()
    batches = []
    try:
        for threads in (1, 2, 3):
            fastmaml.set_num_threads(threads)
            sampler = FewShotImages(pool, ways=5, shots=2, queries=8)
            batches.append(sampler.sample(3))
    finally:
        fastmaml.set_num_threads(before)
    for batch in batches[1:]:
        for name in FIELDS:
            assert torch.equal(getattr(batch, name), getattr(batches[0], name))


@every_sampler
def test_batches_pass_the_checks_they_are_spared(make):
    batch = make().sample(3)
    fastmaml.TaskBatch(*(getattr(batch, name) for name in FIELDS))


@native
def test_the_extension_refuses_more_than_there_is():
    sampler = FewShotImages(images(), ways=4, shots=2, queries=3)
    sampler.queries = 8
    with pytest.raises(ValueError, match=r"expected at most 9, got 2 \+ 8"):
        sampler.sample(1)


def test_seeds_have_64_bits():
    with pytest.raises(ValueError, match=r"seed must be below 2\^64"):
        Sinusoid(seed=2**64)


def test_states_of_torchs_generator_are_explained():
    sampler = Sinusoid()
    old = {
        "sampler": "Sinusoid",
        "device": "cpu",
        "generator": torch.Generator().get_state(),
    }
    with pytest.raises(ValueError, match=r"torch's generator.*start the run again"):
        sampler.load_state_dict(old)
    with pytest.raises(ValueError, match="generator 'threefry'"):
        sampler.load_state_dict(sampler.state_dict() | {"generator": "threefry"})
