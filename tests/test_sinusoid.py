"""The sine tasks: their formula, their distribution, and the seeded stream."""

import math

import pytest
import torch

from fastmaml.tasks import Sinusoid, TaskBatch

FIELDS = ("support_x", "support_y", "query_x", "query_y")


def equal(one: TaskBatch, other: TaskBatch) -> bool:
    return all(torch.equal(getattr(one, f), getattr(other, f)) for f in FIELDS)


def test_shapes_and_attributes():
    sampler = Sinusoid(support=5, queries=7)
    batch = sampler.sample(3)
    assert batch.support_x.shape == batch.support_y.shape == (3, 5, 1)
    assert batch.query_x.shape == batch.query_y.shape == (3, 7, 1)
    assert all(getattr(batch, field).is_contiguous() for field in FIELDS)
    assert (sampler.input_shape, sampler.outputs) == ((1,), 1)


def test_targets_are_the_wave_of_the_task():
    batch, amplitude, phase = Sinusoid(dtype=torch.float64).sample_with_parameters(20)
    for x, y in ((batch.support_x, batch.support_y), (batch.query_x, batch.query_y)):
        expected = amplitude.view(-1, 1, 1) * torch.sin(x - phase.view(-1, 1, 1))
        torch.testing.assert_close(y, expected, rtol=1e-14, atol=1e-14)


# the last is beyond what the quick sine is for
@pytest.mark.parametrize("bound", [1e-3, 5.0, 3e4, 1e7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sines_are_good_to_the_last_places(bound, dtype):
    sampler = Sinusoid(40, 3, x=(-bound, bound), dtype=dtype)
    batch, amplitude, phase = sampler.sample_with_parameters(50)
    angle = batch.support_x - phase[:, None, None]  # rounded as the sampler rounds it
    want = amplitude[:, None, None].double() * torch.sin(angle.double())
    error = (batch.support_y.double() - want).abs() / amplitude[:, None, None]
    assert error.max() < 2 * torch.finfo(dtype).eps


def test_distribution_is_the_papers():
    batch, amplitude, phase = Sinusoid().sample_with_parameters(20_000)
    x = torch.cat([batch.support_x, batch.query_x], 1)
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, math.pi), (x, -5, 5)):
        assert low <= values.min() and values.max() <= high
        # Quantiles of a uniform variable: standard error below 0.0036 of the range.
        quantiles = torch.quantile(values.flatten()[:20_000], torch.linspace(0, 1, 9))
        expected = torch.linspace(low, high, 9)
        assert (quantiles - expected).abs().max() < 0.018 * (high - low)


def test_ranges_can_be_chosen():
    sampler = Sinusoid(amplitude=(2, 2), phase=(1, 1), x=(0, 1))
    batch, amplitude, phase = sampler.sample_with_parameters(4)
    assert (amplitude == 2).all() and (phase == 1).all()
    assert (batch.support_x >= 0).all() and (batch.support_x <= 1).all()


def test_same_seed_same_stream_and_other_seed_another():
    one, same, other = Sinusoid(seed=4), Sinusoid(seed=4), Sinusoid(seed=5)
    first = one.sample(5)
    assert equal(first, same.sample(5))
    assert not equal(first, other.sample(5))
    assert not equal(first, one.sample(5))


def test_sampling_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Sinusoid().sample(3)
    assert torch.equal(before, torch.get_rng_state())


def test_state_continues_the_stream_bit_for_bit():
    sampler = Sinusoid(seed=1)
    sampler.sample(7)
    state = sampler.state_dict()
    ahead = [sampler.sample(3) for _ in range(3)]
    resumed = Sinusoid(seed=99)
    resumed.load_state_dict(state)
    assert all(equal(batch, resumed.sample(3)) for batch in ahead)


def test_fixed_set_is_repeatable_and_apart_from_the_stream():
    sampler = Sinusoid(seed=3)
    fixed = sampler.fixed(6, seed=3)
    first = sampler.sample(6)
    assert equal(fixed, sampler.fixed(6, seed=3))
    assert equal(first, Sinusoid(seed=3).sample(6))  # the stream was not moved
    assert not equal(fixed, first)  # nor is it its beginning
    assert not equal(fixed, sampler.fixed(6, seed=4))
    assert equal(fixed, sampler.fixed_with_parameters(6, seed=3)[0])


def test_fixed_batches_cover_the_set():
    sampler = Sinusoid()
    sizes = [len(batch) for batch in sampler.fixed_batches(10, batch=4)]
    assert sizes == [4, 4, 2]
    one, two = (list(sampler.fixed_batches(10, batch=4)) for _ in range(2))
    assert all(equal(a, b) for a, b in zip(one, two, strict=True))
    assert not equal(one[0], one[1])


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Sinusoid(support=0), ValueError, "support must be at least 1, got 0"),
        (lambda: Sinusoid(queries=2.5), TypeError, "queries must be an integer"),
        (lambda: Sinusoid(seed=-1), ValueError, "seed must be at least 0"),
        (lambda: Sinusoid(amplitude=(2, 1)), ValueError, "amplitude must be finite"),
        (lambda: Sinusoid(x=(0, math.inf)), ValueError, "x must be finite"),
        (lambda: Sinusoid(dtype=torch.int64), TypeError, "dtype must be a floating"),
        (lambda: Sinusoid().sample(0), ValueError, "tasks must be at least 1"),
        (lambda: Sinusoid().fixed(True), TypeError, "tasks must be an integer"),
    ],
)
def test_refuses(make, error, words):
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sampler": "FewShotImages"}, "state is of a FewShotImages"),
        ({"generator": "mersenne"}, "state is of the generator 'mersenne'"),
    ],
)
def test_refuses_a_state_of_something_else(change, words):
    sampler = Sinusoid()
    with pytest.raises(ValueError, match=words):
        sampler.load_state_dict({**sampler.state_dict(), **change})
    with pytest.raises(ValueError, match="lacks 'key'"):
        state = sampler.state_dict()
        del state["key"]
        sampler.load_state_dict(state)
