"""A meta-gradient computed again: what a learner skips, and what it still notices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmaml
from fastmaml import MAML, TaskBatch, _native
from fastmaml.engines.native_call import PreparedCall
from fastmaml.learners import watch
from fastmaml.learners.watch import ModelWatch, PythonWatch

pytestmark = pytest.mark.skipif(
    _native.unavailable() is not None, reason="the extension is not built"
)

MODES = pytest.mark.parametrize("accumulate", [False, True])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def batch(tasks=3, samples=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    sizes = ((samples, 3), (samples, 2), (samples + 1, 3), (samples + 1, 2))
    draw = [torch.randn(tasks, *s, generator=g, dtype=torch.float64) for s in sizes]
    return TaskBatch(*draw)


def settled(accumulate, **options):
    """A learner whose next call has nothing to do but compute."""
    learner = MAML(network(), engine="native", **options)
    for _ in range(3):
        learner.backward(batch(), accumulate=accumulate)
    return learner


def forget(learner):
    for p in learner.parameters():
        p.grad = None


def unset(accumulate, **options):
    """The same of a loop that sets gradients to ``None``, as `zero_grad` does."""
    learner = MAML(network(), engine="native", **options)
    for _ in range(2):
        forget(learner)
        learner.backward(batch(), accumulate=accumulate)
    forget(learner)
    return learner


def check(learner, tasks, accumulate, times=3):
    """Calls, compared with autograd on top of what ``.grad`` holds."""
    # of its own: a meta-loss of this learner would make it look at everything again
    learn = learner.settings.learn_rates
    oracle = MAML(learner.model, engine="native", learn_rates=learn)
    for _ in range(times):
        start = [None if p.grad is None else p.grad.clone() for p in params(learner)]
        loss = oracle.meta_loss(tasks)
        want = torch.autograd.grad(loss, params(oracle))
        got = learner.backward(tasks, accumulate=accumulate)
        assert torch.equal(got, loss)
        for p, s, w in zip(params(learner), start, want, strict=True):
            assert torch.equal(p.grad, s + w if accumulate and s is not None else w)


def params(learner):
    return list(learner.parameters())


@pytest.fixture
def short_way(monkeypatch):
    """Counts the calls that skipped the checks."""
    if _native.reader() is None:
        pytest.skip("this torch has no DLPack exchange table")
    counts = {"again": 0, "run": 0}
    again, run = PreparedCall.again, PreparedCall.run

    def count_again(self, *args):
        found = again(self, *args)
        counts["again"] += found is not None
        return found

    def count_run(self, *args):
        counts["run"] += 1
        return run(self, *args)

    monkeypatch.setattr(PreparedCall, "again", count_again)
    monkeypatch.setattr(PreparedCall, "run", count_run)
    return counts


@MODES
@pytest.mark.parametrize("learn_rates", [False, True])
@pytest.mark.parametrize("start", [settled, unset])
def test_repeated_calls_take_the_short_way(start, accumulate, learn_rates, short_way):
    learner = start(accumulate, learn_rates=learn_rates)
    between = forget if start is unset else lambda learner: None
    before = dict(short_way)
    for seed in range(3):
        between(learner)
        learner.backward(batch(seed=seed), accumulate=accumulate)
    assert short_way["again"] == before["again"] + 3
    assert short_way["run"] == before["run"]
    between(learner)
    check(learner, batch(seed=5), accumulate)


@MODES
def test_gradients_set_to_none_come_back_as_other_tensors(accumulate):
    learner = unset(accumulate)
    held = []
    for seed in range(4):
        forget(learner)
        check(learner, batch(seed=seed), accumulate, times=1)
        held.append([(p.grad, p.grad.clone()) for p in learner.parameters()])
    # and once more where the last ones stay
    check(learner, batch(seed=9), accumulate)
    for gradient, value in sum(held[:-1], []):
        assert torch.equal(gradient, value)
    tensors = [gradient for gradient, _ in sum(held, [])]
    assert len({t.data_ptr() for t in tensors}) == len(tensors)
    for p in learner.parameters():
        assert p.grad.is_contiguous() and not p.grad.requires_grad
        assert p.grad.untyped_storage().nbytes() == 8 * p.numel()


@MODES
def test_some_gradients_set_to_none(accumulate):
    learner = unset(accumulate)
    check(learner, batch(), accumulate, times=1)
    for _ in range(2):
        next(learner.parameters()).grad = None
        check(learner, batch(seed=3), accumulate, times=1)


def test_gradients_set_to_none_stay_so_if_tasks_are_refused():
    learner = MAML(network().float(), loss="cross_entropy", engine="native")
    b = batch()
    x, labels = b.support_x.float(), torch.zeros(3, 4, dtype=torch.int64)
    for _ in range(3):
        forget(learner)
        learner.backward(TaskBatch(x, labels, x, labels))
    forget(learner)
    with pytest.raises(ValueError, match="support_y: classes run from 7"):
        learner.backward(TaskBatch(x, labels + 7, x, labels))
    assert all(p.grad is None for p in learner.parameters())


def another_size(learner):
    return batch(samples=7)


def fewer_tasks(learner):
    return batch(tasks=2)


def gaps(learner):
    b = batch()
    x = torch.stack([b.support_x, b.support_x + 9], -1)[..., 0]
    return TaskBatch(x, b.support_y, b.query_x, b.query_y)


def transposed_targets(learner):
    b = batch()
    y = b.query_y.transpose(1, 2).contiguous().transpose(1, 2)
    return TaskBatch(b.support_x, b.support_y, b.query_x, y)


def parameters_moved(learner):
    for p in learner.model.parameters():
        p.data = p.data * 1.5


def parameter_turned(learner):
    weight = learner.model[0].weight
    weight.data = (weight.data * 2).t().contiguous().t()


def parameter_seen_otherwise(learner):
    """Same memory, other strides."""
    model = learner.model
    model[2].weight.data = torch.arange(12).double().view(6, 2).t() / 12


def gradients_replaced(learner):
    for p in learner.parameters():
        p.grad = torch.ones_like(p)


def gradients_forgotten(learner):
    for p in learner.parameters():
        p.grad = None


def gradient_moved(learner):
    p = next(learner.parameters())
    p.grad.data = p.grad.data.clone()


def gradient_turned(learner):
    p = next(learner.parameters())
    p.grad.data = p.grad.data.t().contiguous().t()


def workspace_grown(learner):
    learner.evaluate(batch(tasks=50))


def more_threads(learner):
    fastmaml.set_num_threads(3)


CHANGES = [
    another_size,
    fewer_tasks,
    gaps,
    transposed_targets,
    parameters_moved,
    parameter_turned,
    parameter_seen_otherwise,
    gradients_replaced,
    gradients_forgotten,
    gradient_moved,
    gradient_turned,
    workspace_grown,
    more_threads,
]


@MODES
@pytest.mark.parametrize("read", ["by the extension", "by Python"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__)
def test_changes_are_noticed(change, accumulate, read, monkeypatch):
    if read == "by Python":  # as torch before 2.10
        monkeypatch.setattr(_native, "reader", lambda: None)
    threads = fastmaml.get_num_threads()
    fastmaml.set_num_threads(1)
    try:
        learner = settled(accumulate)
        check(learner, change(learner) or batch(seed=3), accumulate)
        check(learner, batch(seed=4), accumulate)
    finally:
        fastmaml.set_num_threads(threads)


@MODES
@pytest.mark.parametrize("read", ["by the extension", "by Python"])
@pytest.mark.parametrize(
    "change",
    [c for c in CHANGES if "gradient" not in c.__name__],
    ids=lambda c: c.__name__,
)
def test_changes_are_noticed_without_gradients(change, accumulate, read, monkeypatch):
    if read == "by Python":
        monkeypatch.setattr(_native, "reader", lambda: None)
    threads = fastmaml.get_num_threads()
    fastmaml.set_num_threads(1)
    try:
        learner = unset(accumulate)
        tasks = change(learner) or batch(seed=3)
        for _ in range(3):
            forget(learner)
            check(learner, tasks, accumulate, times=1)
    finally:
        fastmaml.set_num_threads(threads)


@MODES
@pytest.mark.parametrize("start", [settled, unset])
def test_a_hook_is_noticed(start, accumulate):
    learner = start(accumulate)
    seen = []
    first = next(learner.parameters())
    first.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    learner.backward(batch(), accumulate=accumulate)
    assert len(seen) == 1 and seen[0] is first


@MODES
def test_what_is_no_batch_is_refused(accumulate):
    learner = settled(accumulate)
    with pytest.raises(TypeError, match="expected a TaskBatch, got list"):
        learner.backward([1, 2], accumulate=accumulate)

    class Fields:
        support_x = support_y = query_x = query_y = "no tensor"

    with pytest.raises((AttributeError, TypeError)):
        learner.backward(Fields(), accumulate=accumulate)
    check(learner, batch(), accumulate)


def test_gradients_accumulate_over_batches_after_one_that_overwrites():
    learner = settled(False)
    for _ in range(2):
        learner.backward(batch(seed=1), accumulate=False)
        want = [p.grad.clone() for p in learner.parameters()]
        for seed in (2, 3):
            check(learner, batch(seed=seed), True, times=1)
        assert not torch.equal(want[0], next(learner.parameters()).grad)


def test_a_reader_needs_torchs_table():
    core = _native.core()
    with pytest.raises(ValueError, match="PyCapsule_GetPointer"):
        core.TensorReader(torch.Tensor, None)
    with pytest.raises(ValueError, match="expected torch.Tensor"):
        core.TensorReader(3, None)


@pytest.mark.parametrize("kind", ["extension", "Python"])
def test_a_watch_sees_what_needs_another_engine(kind, monkeypatch):
    if kind == "Python":
        monkeypatch.setattr(watch._native, "unavailable", lambda: "not built")
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))

    def changed(change):
        seen = ModelWatch(model)
        assert not seen.changed()
        assert isinstance(seen.changed.__self__, PythonWatch) == (kind == "Python")
        change()
        return seen.changed()

    def in_place():
        with torch.no_grad():
            model[0].weight.add_(1)

    assert not changed(in_place)
    assert changed(lambda: model[0].bias.requires_grad_(False))
    assert changed(model[1].eval)
    assert changed(model.double)
    assert changed(lambda: setattr(model[0], "bias", nn.Parameter(torch.zeros(3))))
    assert changed(lambda: model.to("meta"))
    assert changed(lambda: delattr(model[0], "weight"))
