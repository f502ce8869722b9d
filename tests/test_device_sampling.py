"""Samplers that draw by kernels: the same tasks, from a stream in the device's memory.

Emulated here; with a GPU the same tests run on it.
"""

from __future__ import annotations

from contextlib import contextmanager

import backends
import pytest
import torch

from fastmaml import _native
from fastmaml.tasks import FewShotImages, Sinusoid
from fastmaml.tasks import sampler as samplers
from fastmaml.tasks.device import DeviceStream
from fastmaml.tasks.philox import TaskStream

BACKENDS = backends.usable(["cuda_emulated", "cuda"])
NAMES = ("support_x", "support_y", "query_x", "query_y")
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@contextmanager
def kernels_of(backend):
    """What is built within draws by the kernels of a backend."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samplers, "backend_for", lambda device: backend)
        yield


@pytest.fixture(params=BACKENDS)
def there(request):
    """Builds a sampler, given what it is, that draws on a device."""

    def build(kind, *arguments, **options):
        device = backends.device_of(request.param)
        with kernels_of(request.param):
            return kind(*arguments, device=device, **options)

    return build


def images(channels=2, size=7):
    generator = torch.Generator().manual_seed(0)
    shape = (6, 8, channels, size, size)
    return torch.randint(256, shape, generator=generator).to(torch.uint8)


def same(got, want, exact=True):
    for name in NAMES:
        g, w = getattr(got, name).cpu(), getattr(want, name)
        assert (g.shape, g.dtype, g.stride()) == (w.shape, w.dtype, w.stride())
        if exact or not g.is_floating_point():
            assert torch.equal(g, w), name
        else:
            bound = 1e-12 if g.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(g, w, rtol=bound, atol=bound)


@both_dtypes
def test_waves_are_those_of_the_cpu(there, dtype):
    device = there(Sinusoid, 7, 3, seed=5, dtype=dtype)
    host = Sinusoid(7, 3, seed=5, dtype=dtype)
    for tasks in (3, 1, 4):
        same(device.sample(tasks), host.sample(tasks), exact=False)
    got, want = device.sample_with_parameters(2), host.sample_with_parameters(2)
    same(got[0], want[0], exact=False)
    for g, w in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(g.cpu(), w, rtol=1e-6, atol=1e-6)
    assert device.state_dict() == host.state_dict()


@both_dtypes
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("rotations", [(0,), (180, 0), (0, 90, 180, 270)])
def test_episodes_are_those_of_the_cpu(there, dtype, rotations, channels_last):
    options = {"ways": 5, "shots": 2, "queries": 3, "rotations": rotations}
    options |= {"invert": channels_last, "channels_last": channels_last}
    options |= {"seed": 2**64 - 5, "dtype": dtype}
    device = there(FewShotImages, images(), **options)
    host = FewShotImages(images(), **options)
    for tasks in (3, 1, 4):
        same(device.sample(tasks), host.sample(tasks))
    assert device.state_dict() == host.state_dict()


def samplers_of(there):
    yield there(Sinusoid, 4, 2, seed=3), Sinusoid(4, 2, seed=3)
    yield there(FewShotImages, images(), seed=3), FewShotImages(images(), seed=3)


def test_the_stream_stays_in_its_memory(there):
    """Where a captured draw reads it: moved by draws, and by loading a state."""
    for device, host in samplers_of(there):
        place = device._stream.place
        where = place.data_ptr()
        assert place.device.type == device.device.type
        state = device.state_dict()
        device.sample(2)
        assert place.tolist() == [3, 2, 0]
        device.load_state_dict(state)
        assert place.tolist() == [3, 0, 0]
        same(device.sample(2), host.sample(2), exact=False)
        moved = {**state, "key": 2**64 - 1, "task": 2**63 + 1}
        device.load_state_dict(moved)
        host.load_state_dict(moved)
        assert device._stream.place.data_ptr() == where
        assert device.state_dict() == moved
        same(device.sample(2), host.sample(2), exact=False)
        assert device.state_dict() == host.state_dict()


def test_states_go_to_the_cpu_and_back(there):
    for device, host in samplers_of(there):
        device.sample(3)
        host.load_state_dict(device.state_dict())
        same(device.sample(2), host.sample(2), exact=False)
        host.sample(1)
        device.load_state_dict(host.state_dict())
        same(device.sample(2), host.sample(2), exact=False)


def test_fixed_sets_leave_the_stream(there):
    for device, host in samplers_of(there):
        same(device.fixed(3, seed=3), host.fixed(3, seed=3), exact=False)
        parts = list(device.fixed_batches(5, batch=2))
        want = list(host.fixed_batches(5, batch=2))
        for got, w in zip(parts, want, strict=True):
            same(got, w, exact=False)
        assert device.state_dict()["task"] == 0
        same(device.sample(2), host.sample(2), exact=False)


def test_another_stream_is_moved_too(there):
    for device, host in samplers_of(there):
        one, other = TaskStream(8, 2**40), TaskStream(8, 2**40)
        for _ in range(2):
            same(device.draw(2, one), host.draw(2, other), exact=False)
        assert one.task == other.task == 2**40 + 4


def test_what_kernels_can_not_do_the_host_does(there):
    half = there(Sinusoid, 4, 2, dtype=torch.bfloat16)
    assert not isinstance(half._stream, DeviceStream)
    assert half.sample(2).query_x.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="ways must be at most the 6 classes"):
        there(FewShotImages, images(), ways=7)


@pytest.mark.parametrize("backend", backends.usable(["cuda_emulated"]))
def test_launches_of_a_draw(backend):
    core = _native.core()
    with kernels_of(backend):
        waves, episodes = Sinusoid(3, 2), FewShotImages(images())
    for sampler, want in (
        (waves, ["sinusoid_kernel<S>"]),
        (episodes, ["episode_kernel", "gather_images_kernel<S>"]),
    ):
        core.begin_recording(run=True)
        sampler.sample(4)
        assert backends.recorded_kernels() == want
