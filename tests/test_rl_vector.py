"""What rollouts rely on: rows, seeds, masks, tasks, and other people's environments."""

import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra fastmaml[rl]")

from gymnasium.utils.env_checker import check_env  # noqa: E402

from fastmaml.rl.envs import Navigation2D, Navigation2DVector  # noqa: E402
from fastmaml.rl.envs.draws import reset_uniforms  # noqa: E402
from fastmaml.rl.vector import RowsEnv, make_rows, row_seeds  # noqa: E402
from fastmaml.tasks.philox import philox4x32  # noqa: E402


def towards(envs, observation):
    return np.clip(8 * (envs.tasks - observation), -1, 1).astype(np.float32)


def walk(envs, steps, seeds, act):
    """Observations, rewards, terminated, truncated, active, each [steps, R, ...]."""
    observation, _ = envs.reset(seed=seeds)
    rows = []
    for _ in range(steps):
        observation, *flags, info = envs.step(act(envs, observation))
        rows.append((observation, *flags, info["active"]))
    return [np.stack(column) for column in zip(*rows, strict=True)]


def test_fastmaml_imports_without_gymnasium():
    script = (
        "import sys, fastmaml, fastmaml.rl.vector; sys.exit('gymnasium' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_row_seeds_do_not_depend_on_the_batch():
    all_of_them = row_seeds(3, 5, 4).reshape(5, 4)
    assert len(np.unique(all_of_them)) == 20
    assert (all_of_them >= 0).all()
    np.testing.assert_array_equal(
        row_seeds(3, [2, 4], [1, 3]).reshape(2, 2), all_of_them[2::2, 1::2]
    )
    assert not np.isin(row_seeds(4, 5, 4), all_of_them).any()
    with pytest.raises(ValueError, match="seed must be in"):
        row_seeds(-1, 2, 2)


def test_draws_are_the_words_they_say():
    """Word i of a row is word i mod 4 of block i div 4; plane 1 has the lower bits."""
    key = 0x65736574, 0x726F7773
    seeds = np.array([5, 2**40 + 3], dtype=np.uint64)
    got = reset_uniforms(seeds, 6)
    for row, seed in enumerate([5, 2**40 + 3]):
        for i in range(6):
            high, low = (
                int(
                    philox4x32([i // 4, plane, seed % 2**32, seed // 2**32], key)[i % 4]
                )
                for plane in (0, 1)
            )
            assert got[row, i] == (high >> 8) * 2.0**-24 + (low >> 3) * 2.0**-53


@pytest.mark.parametrize("preset", ["code", "paper"])
def test_navigation_follows_its_formulas(preset):
    envs = Navigation2DVector(6, preset)
    goals = envs.sample_tasks(3, seed=1)
    assert np.abs(goals).max() < 0.5
    envs.set_tasks(goals)
    draw = np.random.default_rng(0).uniform(-2, 2, (20, 6, 2)).astype(np.float32)
    steps = iter(draw)
    observation, reward, terminated, _, _ = walk(envs, 20, None, lambda *_: next(steps))
    position = np.cumsum(np.clip(0.1 * draw.astype(np.float64), -0.1, 0.1), axis=0)
    apart = np.linalg.norm(position - np.repeat(goals, 2, axis=0), axis=-1)
    assert not terminated.any()
    np.testing.assert_allclose(observation, position, rtol=1e-6, atol=1e-7)
    expected = -apart if preset == "code" else -(apart**2)
    np.testing.assert_allclose(reward, expected, rtol=1e-12)


@pytest.mark.parametrize(("preset", "there"), [("code", True), ("paper", False)])
def test_navigation_presets_end_differently(preset, there):
    """At (0.009, 0.009) both coordinates are near, but not the distance, 0.0127."""
    env = Navigation2D(preset, task=(0.009, 0.009))
    env.reset(seed=0)
    assert env.step(np.zeros(2, np.float32))[2] is there


@pytest.mark.parametrize("preset", ["code", "paper"])
def test_navigation_in_rows_is_navigation(preset):
    envs = Navigation2DVector(10, preset)
    envs.set_tasks(envs.sample_tasks(5, seed=2))
    observation, reward, terminated, truncated, active = walk(envs, 100, None, towards)
    assert terminated[-1].all()
    assert not truncated.any()
    for row in range(10):
        env = Navigation2D(preset, task=envs.tasks[row])
        seen, _ = env.reset(seed=row)
        length = active[:, row].sum()
        for t in range(length):
            act = np.clip(8 * (env.task - seen), -1, 1).astype(np.float32)
            seen, got, ended, cut, _ = env.step(act)
            np.testing.assert_array_equal(seen, observation[t, row])
            assert (got, ended, cut) == (reward[t, row], t == length - 1, False)


def test_ended_rows_rest_and_horizons_truncate():
    envs = Navigation2DVector(4, horizon=5)
    envs.set_tasks([[0.05, 0.0], [0.5, 0.5]])
    observation, reward, terminated, truncated, active = walk(envs, 7, 5, towards)
    assert active[:, 0].sum() < 5
    ended = active[:, 0].sum() - 1
    assert terminated[ended:, :2].all()
    assert not terminated[:ended, :2].any()
    assert (reward[ended + 1 :, :2] == 0).all()
    assert (observation[ended:, :2] == observation[ended, :2]).all()
    np.testing.assert_array_equal(active[:, 3], np.arange(7) < 5)
    np.testing.assert_array_equal(truncated[:, 3], np.arange(7) >= 4)
    assert not (terminated & truncated).any()
    observation, _ = envs.reset()
    assert (observation == 0).all()
    assert envs.step(np.zeros((4, 2)))[4]["active"].all()


def test_what_is_not_finite_ends_the_episode_and_is_counted():
    envs = Navigation2DVector(3)
    envs.set_tasks([[0.5, 0.5]])
    envs.reset(seed=0)
    first = envs.step(np.ones((3, 2)))[0]
    act = np.ones((3, 2))
    act[1, 0] = np.nan
    second, reward, terminated, _, info = envs.step(act)
    assert info["nonfinite"].tolist() == [False, True, False]
    assert terminated.tolist() == [False, True, False]
    assert info["active"].all()
    np.testing.assert_array_equal(second[1], first[1])
    assert reward[1] == 0
    assert (second[0] != first[0]).all()
    info = envs.step(np.ones((3, 2)))[4]
    assert info["nonfinite"].tolist() == [False, True, False]
    assert info["active"].tolist() == [True, False, True]
    env = Navigation2D()
    env.reset(seed=0)
    *_, terminated, _, info = env.step(np.array([np.nan, 0.0]))
    assert terminated
    assert info["nonfinite"]


def test_tasks_are_numbered_and_checked():
    envs = Navigation2DVector(6)
    np.testing.assert_array_equal(envs.sample_tasks(7, 5)[:3], envs.sample_tasks(3, 5))
    goals = envs.sample_tasks(4000, 0)
    np.testing.assert_allclose(goals.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(goals.std(0), 12**-0.5, atol=0.01)
    envs.set_tasks(goals[:3])
    np.testing.assert_array_equal(envs.tasks, np.repeat(goals[:3], 2, axis=0))
    for wrong, message in [
        (goals[:4], "divide the 6 rows"),
        (goals[:3, :1], r"expected shape \[n, 2\]"),
        ([[np.nan, 0.0]], "must be finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            envs.set_tasks(wrong)


def test_misuse_is_refused():
    with pytest.raises(ValueError, match="preset must be one of code, paper"):
        Navigation2DVector(2, "gym")
    with pytest.raises(ValueError, match="horizon must be at least 1 step, got 0"):
        Navigation2DVector(2, horizon=0)
    envs = Navigation2DVector(2)
    with pytest.raises(gymnasium.error.ResetNeeded):
        envs.step(np.zeros((2, 2)))
    with pytest.raises(ValueError, match="one for each of 2 rows"):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="options"):
        envs.reset(options={"reset_mask": np.ones(2, bool)})
    envs.reset()
    with pytest.raises(ValueError, match=r"expected shape \[2, 2\], got \[2, 3\]"):
        envs.step(np.zeros((2, 3)))
    envs.close()
    with pytest.raises(gymnasium.error.ClosedEnvironmentError):
        envs.reset()


def test_checkers_and_registry_accept_navigation():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(mini|maxi)mum value is.*infinity.*")
        check_env(gymnasium.make("fastmaml/Navigation2D-v0").unwrapped)
    envs = make_rows("fastmaml/Navigation2D-v0", 4, preset="paper", horizon=9)
    assert isinstance(envs, RowsEnv)
    assert (envs.preset, envs.horizon, envs.num_envs) == ("paper", 9, 4)
    with pytest.raises(ValueError, match="workers"):
        make_rows("fastmaml/Navigation2D-v0", 4, workers=2)


class Impatient(Navigation2D):
    """Truncates itself after 3 steps if its goal lies left; no step may follow."""

    def reset(self, **arguments):
        self.over = False
        return super().reset(**arguments)

    def step(self, action):
        assert not self.over, "stepped after its end"
        observation, reward, terminated, truncated, info = super().step(action)
        truncated |= bool(self._elapsed >= 3 and self.task[0] < 0)
        self.over = terminated or truncated
        return observation, reward, terminated, truncated, {"x": 1}


@pytest.mark.parametrize("workers", [0, 1])
def test_other_environments_become_rows(workers):
    threads = threading.active_count()
    own = Navigation2DVector(6, horizon=12)
    other = make_rows(Impatient, 6, horizon=12, workers=workers)
    assert isinstance(other, RowsEnv)
    goals = own.sample_tasks(3, seed=4)
    np.testing.assert_array_equal(other.sample_tasks(3, seed=4), goals)
    assert (goals[:, 0] < 0).any()
    assert (goals[:, 0] > 0).any()
    for envs in (own, other):
        envs.set_tasks(goals)
    seeds = row_seeds(0, 3, 2)
    expected = walk(own, 12, seeds, towards)
    for _ in range(2):  # a second episode starts afresh
        got = walk(other, 12, seeds, towards)
        patient = np.repeat(goals[:, 0] > 0, 2)
        for mine, theirs in zip(expected, got, strict=True):
            np.testing.assert_array_equal(mine[:, patient], theirs[:, patient])
            np.testing.assert_array_equal(mine[:2], theirs[:2])
        _, reward, terminated, truncated, active = got
        np.testing.assert_array_equal(
            active[:, ~patient].T, np.tile(np.arange(12) < 3, (sum(~patient), 1))
        )
        assert truncated[2:, ~patient].all()
        assert not reward[3:, ~patient].any()
        assert not terminated[:, ~patient].any()
    children = list(getattr(other._envs, "processes", ()))
    assert len(children) == 6 * workers
    other.close()
    assert not any(child.is_alive() for child in children)
    assert threading.active_count() == threads


INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # also in the background
import numpy as np
from fastmaml.rl.envs import Navigation2D
from fastmaml.rl.vector import make_rows
many = make_rows(Navigation2D, 3, horizon=1000, workers=1)
rows = make_rows("fastmaml/HalfCheetahDir-v0", 64, threads=3)
print(*[child.pid for child in many._envs.processes], flush=True)
many.reset(seed=0)
rows.reset(seed=0)
for t in range(1000):
    many.step(np.zeros((3, 2)))
    rows.step(np.zeros((64, 6)))
    if t == 5:
        os.kill(os.getpid(), signal.SIGINT)
"""


def test_an_interrupt_leaves_no_processes(tmp_path):
    pytest.importorskip("mujoco.batch", reason="needs mujoco 3.17 or newer")
    command = [sys.executable, "-c", INTERRUPTED]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert "KeyboardInterrupt" in done.stderr
    children = [int(pid) for pid in done.stdout.split()]
    assert len(children) == 3
    for pid in children:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_environments_without_tasks_are_refused():
    with pytest.raises(ValueError, match="has no sample_tasks"):
        make_rows("CartPole-v1", 2, horizon=5)
    with pytest.raises(ValueError, match="horizon"):
        make_rows(Navigation2D, 2)
