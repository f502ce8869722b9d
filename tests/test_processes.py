"""Processes, loaders and threads beside an engine whose threads are already alive."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from native_cases import threads
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from fastmaml import MAML
from fastmaml.tasks import FewShotImages, Sinusoid, TaskBatch, TaskSampler

forks = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
methods = pytest.mark.parametrize("method", ["fork", "spawn"])


def few_shot(seed: int = 0, dtype: torch.dtype = torch.float32) -> FewShotImages:
    images = torch.arange(12 * 4 * 81).remainder(251).view(12, 4, 1, 9, 9)
    return FewShotImages(images.byte(), ways=3, queries=2, seed=seed, dtype=dtype)


def learner() -> MAML:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 49, 3),
    )
    options: dict[str, Any] = {"inner_lr": 0.1, "inner_steps": 2, "engine": "native"}
    return MAML(model, loss="cross_entropy", **options)


def gradients(learner: MAML, tasks: TaskBatch) -> list[Tensor]:
    learner.backward(tasks, accumulate=False)
    return [p.grad.clone() for p in learner.parameters() if p.grad is not None]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def fields(tasks: TaskBatch) -> tuple[Tensor, ...]:
    return tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y


@pytest.fixture
def used() -> Iterator[MAML]:
    """A learner whose engine has threads, which no child has."""
    with threads(2):
        one = learner()
        gradients(one, few_shot().sample(6))
        yield one


def _gradients(connection: Any, learner: MAML, sampler: TaskSampler) -> None:
    found = gradients(learner, sampler.sample(6))
    connection.send_bytes(pickle.dumps([g.numpy() for g in found]))
    connection.close()


@forks
@methods
def test_a_process_started_after_use_computes_the_same(used: MAML, method: str) -> None:
    context = multiprocessing.get_context(method)
    receive, send = context.Pipe(duplex=False)
    arguments = (send, used, few_shot(seed=1))
    child = context.Process(target=_gradients, args=arguments)
    child.start()
    try:
        assert receive.poll(60), "the child hangs"
        got = [torch.from_numpy(g) for g in pickle.loads(receive.recv_bytes())]
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert same(got, gradients(used, few_shot(seed=1).sample(6)))


class Episodes(IterableDataset):
    """Batches of tasks, every worker's from a stream of its own."""

    def __iter__(self) -> Iterator[TaskBatch]:
        worker = get_worker_info()
        sampler = few_shot(seed=worker.id if worker else 0)
        for _ in range(3):
            yield sampler.sample(4)


class Shared(IterableDataset):
    """Batches of a sampler that was made, and has drawn, in the parent."""

    def __init__(self, sampler: TaskSampler) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[TaskBatch]:
        for _ in range(2):
            yield self.sampler.sample(3)


@forks
def test_workers_of_a_loader_draw_episodes_while_the_learner_computes(
    used: MAML,
) -> None:
    loader = DataLoader(Episodes(), batch_size=None, num_workers=2, timeout=60)
    streams = [few_shot(seed=worker) for worker in range(2)]
    for index, tasks in enumerate(loader):
        wanted = streams[index % 2].sample(4)
        assert same(fields(tasks), fields(wanted))
        assert same(gradients(used, tasks), gradients(used, wanted))
    assert index == 5


@forks
@methods
@pytest.mark.parametrize("make", [few_shot, lambda: Sinusoid(3, 4, seed=2)])
def test_a_worker_goes_on_with_the_sampler_it_is_given(
    used: MAML, method: str, make: Callable[[], TaskSampler]
) -> None:
    sampler, other = make(), make()
    sampler.sample(5)
    other.sample(5)
    loader = DataLoader(
        Shared(sampler),
        batch_size=None,
        num_workers=1,
        timeout=60,
        multiprocessing_context=method,
    )
    for tasks in loader:
        assert same(fields(tasks), fields(other.sample(3)))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [few_shot, Sinusoid])
def test_a_copied_sampler_goes_on_where_the_first_was(
    kind: Callable[..., TaskSampler], dtype: torch.dtype, copied: Any
) -> None:
    one = kind(seed=3, dtype=dtype)
    one.sample(2)
    two = copied(one)
    assert two._drawer is not None
    assert same(fields(two.sample(4)), fields(one.sample(4)))


def test_two_learners_in_a_pool_of_threads_disturb_each_other_nowhere() -> None:
    with threads(2):
        learners = [learner() for _ in range(2)]
        tasks = [few_shot(seed=i).sample(5 + i) for i in range(2)]
        wanted = [gradients(one, its) for one, its in zip(learners, tasks, strict=True)]

        def work(i: int) -> bool:
            return all(
                same(gradients(learners[i], tasks[i]), wanted[i]) for _ in range(20)
            )

        with ThreadPoolExecutor(2) as pool:
            done = [pool.submit(work, i) for i in range(2)]
            assert [d.result(timeout=60) for d in done] == [True, True]
