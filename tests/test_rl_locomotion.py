"""Locomotion: rows against single environments, gymnasium, MuJoCo, and formulas."""

import gc
import os
import warnings
from pathlib import Path

import numpy as np
import pytest

REASON = "needs the extra fastmaml[rl]"
gymnasium = pytest.importorskip("gymnasium", reason=REASON)
mujoco = pytest.importorskip("mujoco", reason=REASON)
pytest.importorskip("mujoco.batch", reason="needs mujoco 3.17 or newer")

from gymnasium.utils.env_checker import check_env  # noqa: E402

from fastmaml.rl.vector import RowsEnv, make_rows, row_seeds  # noqa: E402

NAMES = ["HalfCheetahDir", "HalfCheetahVel", "AntDir", "AntVel", "AntGoal"]
PRESETS = ["finn2017", "gym"]
EVERY = [(name, preset) for name in NAMES for preset in PRESETS]
every = pytest.mark.parametrize(("name", "preset"), EVERY)


@pytest.fixture(autouse=True)
def log_elsewhere(tmp_path, monkeypatch):
    """MuJoCo writes its warnings into a file of the current folder."""
    monkeypatch.chdir(tmp_path)


def rows_of(name, preset, num_envs=6, tasks=3, threads=2, **settings):
    envs = make_rows(
        f"fastmaml/{name}-v0", num_envs, preset=preset, threads=threads, **settings
    )
    envs.set_tasks(envs.sample_tasks(tasks, seed=3))
    return envs


def single_of(name, preset, task, **settings):
    made = gymnasium.make(f"fastmaml/{name}-v0", preset=preset, task=task, **settings)
    return made.unwrapped


def actions_of(envs, steps, seed=0):
    """Actions that also leave [-1, 1], [steps, R, A]."""
    scale = envs.robot.physics.action_range
    shape = steps, *envs.action_space.shape
    drawn = np.random.default_rng(seed).uniform(-1.3 * scale, 1.3 * scale, shape)
    return drawn.astype(np.float32)


def states(envs):
    return {k: envs._batch.bind(k).copy() for k in ("qpos", "qvel", "qacc_warmstart")}


def run(envs, actions, seeds):
    """What all steps returned, and the state after each, by name, [steps, R, ...]."""
    first, _ = envs.reset(seed=seeds)
    told = [{"first": first, **states(envs)}]
    for act in actions:
        observation, reward, terminated, truncated, info = envs.step(act)
        flags = {"terminated": terminated, "truncated": truncated, **info}
        told.append({"observation": observation, "reward": reward, **flags})
        told[-1].update(states(envs))
    names = told[-1]
    return {name: np.stack([t[name] for t in told[1:]]) for name in names} | {
        "first": first
    }


@every
def test_rows_are_single_environments_bit_for_bit(name, preset):
    envs = rows_of(name, preset, horizon=200)
    actions = actions_of(envs, 200)
    seeds = row_seeds(7, 3, 2)
    got = run(envs, actions, seeds)
    lengths = got["active"].sum(0)
    for row in range(6):
        env = single_of(name, preset, envs.tasks[row], horizon=200)
        first, _ = env.reset(seed=int(seeds[row]))
        np.testing.assert_array_equal(first, got["first"][row])
        for t in range(lengths[row]):
            observation, *told, info = env.step(actions[t, row])
            np.testing.assert_array_equal(observation, got["observation"][t, row])
            names = "reward", "terminated", "truncated"
            assert told == [got[n][t, row] for n in names]
            assert info == {"nonfinite": False}
            for field in ("qpos", "qvel", "qacc_warmstart"):
                expected = getattr(env.data, field)
                np.testing.assert_array_equal(expected, got[field][t, row])
    if "Cheetah" in name:
        assert (lengths == 200).all()


@every
def test_a_row_does_not_depend_on_batch_or_threads(name, preset):
    envs = rows_of(name, preset, threads=1)
    actions, seeds = actions_of(envs, 60), row_seeds(1, 3, 2)
    expected = run(envs, actions, seeds)
    threaded = run(rows_of(name, preset, threads=2), actions, seeds)
    for key, value in expected.items():
        np.testing.assert_array_equal(threaded[key], value)
    alone = rows_of(name, preset, num_envs=1, tasks=1)
    for row in (0, 5):
        alone.set_tasks(envs.tasks[row : row + 1])
        for _ in range(2):  # nothing is left of an episode after a reset
            got = run(alone, actions[:, row : row + 1], seeds[row : row + 1])
        np.testing.assert_array_equal(got.pop("first")[0], expected["first"][row])
        for key, value in got.items():
            np.testing.assert_array_equal(value[:, 0], expected[key][:, row])


@pytest.mark.parametrize(
    ("name", "theirs"), [("HalfCheetahDir", "HalfCheetah-v5"), ("AntDir", "Ant-v5")]
)
def test_gym_preset_moves_as_gymnasium_does(name, theirs):
    envs = rows_of(name, "gym", num_envs=2, tasks=2, horizon=200)
    other = gymnasium.make(theirs).unwrapped
    actions = actions_of(envs, 200)
    got = run(envs, actions, [11, 12])
    for row in range(2):
        other.reset(seed=0)
        mujoco.mj_resetData(other.model, other.data)
        qpos, qvel = envs.robot.start(np.array([11, 12]))
        other.set_state(qpos[row], qvel[row])
        np.testing.assert_allclose(
            other._get_obs()[:17], got["first"][row, :17], rtol=1e-6, atol=1e-6
        )
        for t in range(got["active"][:, row].sum()):
            act = np.clip(actions[t, row].astype(np.float64) / 10, -1, 1)
            observation, *_, info = other.step(act)
            np.testing.assert_array_equal(other.data.qpos, got["qpos"][t, row])
            np.testing.assert_array_equal(other.data.qvel, got["qvel"][t, row])
            state = observation[: 27 if name == "AntDir" else 17]
            seen = got["observation"][t, row, : len(state)]
            np.testing.assert_array_equal(seen, state.astype(np.float32))
            if name == "HalfCheetahDir":
                reward = envs.tasks[row] * info["x_velocity"] - 0.05 * (act**2).sum()
                np.testing.assert_allclose(got["reward"][t, row], reward, rtol=1e-12)


def velocity_of_all(model, data):
    """Velocity of the whole body's centre of mass along x, from each body's."""
    body = mujoco.mjtObj.mjOBJ_BODY
    momentum, one = 0.0, np.zeros(6)
    for i in range(1, model.nbody):
        mujoco.mj_objectVelocity(model, data, body, i, one, 0)
        momentum += model.body_mass[i] * one[3]
    return momentum / model.body_mass[1:].sum()


def objective(name, preset, task, velocity, place):
    if name.endswith("Dir"):
        return task * velocity
    if name == "HalfCheetahVel":
        return -abs(velocity - task)
    if name == "AntVel":
        return 1.0 - abs(velocity - task)
    return (4.0 if preset == "finn2017" else 0.0) - np.abs(place - task).sum()


@every
def test_rewards_and_observations_are_their_formulas(name, preset):
    """Stepped by plain MuJoCo with everything computed anew from each state."""
    envs = rows_of(name, preset, num_envs=3)
    model, data, paper = envs.robot.model, None, preset == "finn2017"
    ant, steps = name.startswith("Ant"), 40
    actions = actions_of(envs, steps)
    got = run(envs, actions, [5, 6, 7])
    qpos, qvel = envs.robot.start(np.array([5, 6, 7]))
    gymnastic_goal = name == "AntGoal" and not paper
    for row in range(3):
        data, now = mujoco.MjData(model), mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = qpos[row], qvel[row]
        mujoco.mj_forward(model, data)
        torso = data.xpos[1].copy()
        for t in range(got["active"][:, row].sum()):
            act = actions[t, row].astype(np.float64) / (1 if paper else 10)
            data.ctrl[:] = act = np.clip(act, -1, 1)
            start = data.qpos[0]
            for _ in range(1 if paper else 5):
                mujoco.mj_copyData(now, model, data)
                mujoco.mj_step(model, data)
            mujoco.mj_forward(model, now)  # the beginning of the last physics step
            mujoco.mj_rnePostConstraint(model, now)
            forces = np.clip(now.cfrc_ext, -1, 1)
            mujoco.mj_copyData(now, model, data)
            mujoco.mj_forward(model, now)
            if paper:
                velocity, place = velocity_of_all(model, now), now.subtree_com[1]
            elif ant:
                velocity, place = (data.xpos[1, 0] - torso[0]) / 0.05, data.xpos[1]
                torso = data.xpos[1].copy()
            else:
                velocity, place = (data.qpos[0] - start) / 0.05, data.xpos[1]
            task = envs.tasks[row]
            reward = objective(name, preset, task, velocity, place[:2])
            if not ant:
                reward -= 0.05 * (act**2).sum()
                parts = [now.qpos[1:], now.qvel, *([now.subtree_com[1]] * paper)]
            else:
                reward -= (0.1 if gymnastic_goal else 0.005) * (act**2).sum()
                reward -= 0.0005 * (forces**2).sum()
                reward += 0.0 if gymnastic_goal else 0.05
                skipped = 0 if paper or gymnastic_goal else 2
                parts = [now.qpos[skipped:], now.qvel]
                parts += [forces[0 if paper else 1 :].ravel()]
                parts += [now.xmat[1], now.subtree_com[1]] * paper
                dead = not 0.2 <= now.qpos[2] <= 1.0 and not gymnastic_goal
                assert got["terminated"][t, row] == dead
            np.testing.assert_allclose(
                got["reward"][t, row], reward, rtol=1e-9, atol=1e-9
            )
            np.testing.assert_allclose(
                got["observation"][t, row], np.concatenate(parts), rtol=1e-6, atol=1e-6
            )


@every
def test_gymnasium_accepts_every_environment(name, preset):
    made = gymnasium.make(f"fastmaml/{name}-v0", preset=preset)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*(mini|maxi)mum value is.*infinity.*")
        check_env(made.unwrapped, skip_render_check=True)
    envs = rows_of(name, preset)
    assert isinstance(envs, RowsEnv)
    assert envs.horizon == (200 if preset == "finn2017" else 100)
    assert envs.single_observation_space == made.observation_space
    assert envs.single_action_space == made.action_space
    observation, _ = envs.reset(seed=0)
    assert observation in envs.observation_space
    assert observation.dtype == np.float32


def test_ended_rows_are_not_stepped():
    envs = rows_of("AntDir", "finn2017", horizon=30)
    envs.reset(seed=0)
    envs._state["qpos"][2, 2] = 3.0  # too high
    actions = actions_of(envs, 32)
    *_, info = envs.step(actions[0])
    assert info["active"].all()
    rest = states(envs)
    for t in range(1, 32):
        observation, reward, terminated, truncated, info = envs.step(actions[t])
        assert terminated[2]
        assert not truncated[2]
        assert not info["active"][2]
        assert info["active"][0] == (t < 30)
        assert truncated[0] == (t >= 29)
        assert reward[2] == 0
        if t == 1:
            held = observation[2].copy()
        np.testing.assert_array_equal(observation[2], held)
    for name, value in states(envs).items():
        np.testing.assert_array_equal(value[2], rest[name][2])
        assert (value[0] != rest[name][0]).any()


@pytest.mark.parametrize("name", ["HalfCheetahDir", "AntVel"])
@pytest.mark.parametrize(
    ("field", "value"),
    [("actions", np.nan)]
    + [(field, v) for field in ("qpos", "qvel") for v in (np.nan, np.inf, 1e15)],
)
def test_what_is_not_finite_ends_the_episode_and_is_counted(name, field, value):
    envs, same = rows_of(name, "finn2017"), rows_of(name, "finn2017")
    actions = actions_of(envs, 3)
    planted = actions.copy()
    for each in (envs, same):
        each.reset(seed=0)
        before = each.step(actions[0])[0]
    env = single_of(name, "finn2017", envs.tasks[4])
    env.reset(seed=4)
    env.step(actions[0, 4])
    if field == "actions":
        planted[1, 4, 2] = value
    else:
        envs._state[field][4, 3] = value
        getattr(env.data, field)[3] = value
    observation, reward, terminated, _, info = envs.step(planted[1])
    alone, *told, single_info = env.step(planted[1, 4])
    np.testing.assert_array_equal(alone, observation[4])
    assert told == [0.0, True, False]
    assert single_info["nonfinite"]
    assert np.flatnonzero(info["nonfinite"]).tolist() == [4]
    np.testing.assert_array_equal(observation[4], before[4])
    assert terminated[4]
    assert reward[4] == 0
    others = [0, 1, 2, 3, 5]
    np.testing.assert_array_equal(observation[others], same.step(actions[1])[0][others])
    observation, *_, info = envs.step(actions[2])
    assert np.flatnonzero(info["nonfinite"]).tolist() == [4]
    assert not info["active"][4]
    np.testing.assert_array_equal(observation[others], same.step(actions[2])[0][others])
    got, expected = run(envs, actions, [1] * 6), run(same, actions, [1] * 6)
    assert not got["nonfinite"].any()
    np.testing.assert_array_equal(got["observation"], expected["observation"])


def test_an_error_of_the_simulator_ends_the_episode_and_is_counted(monkeypatch):
    envs = rows_of("HalfCheetahDir", "gym")
    first, _ = envs.reset(seed=0)
    step = envs._batch.step

    def failing(*arguments):
        step(*arguments)
        raise mujoco.batch.SimulationError(np.array([1]), "planted")

    monkeypatch.setattr(envs._batch, "step", failing)
    observation, _, terminated, _, info = envs.step(actions_of(envs, 1)[0])
    assert np.flatnonzero(info["nonfinite"]).tolist() == [1]
    assert np.flatnonzero(terminated).tolist() == [1]
    np.testing.assert_array_equal(observation[1], first[1])


def running_threads():
    return len(os.listdir("/proc/self/task"))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc")
def test_closing_ends_the_threads():
    gc.collect()
    before = running_threads()
    envs = rows_of("HalfCheetahVel", "finn2017", threads=4)
    envs.reset(seed=0)
    envs.step(actions_of(envs, 1)[0])
    assert running_threads() == before + 3
    envs.close()
    assert running_threads() == before
    envs.close()
    with pytest.raises(gymnasium.error.ClosedEnvironmentError):
        envs.step(np.zeros((6, 6)))


def test_tasks_are_distributed_as_the_paper_says():
    def draw(name, preset="finn2017"):
        drawn = rows_of(name, preset).sample_tasks(4000, seed=1)
        np.testing.assert_array_equal(
            drawn[:5], rows_of(name, preset).sample_tasks(5, seed=1)
        )
        return drawn

    for name in ("HalfCheetahDir", "AntDir"):
        assert set(draw(name)) == {-1.0, 1.0}
        assert abs(draw(name).mean()) < 0.05
    for name, fastest in [("HalfCheetahVel", 2), ("AntVel", 3)]:
        drawn = draw(name)
        assert 0 <= drawn.min() < 0.01
        assert fastest - 0.01 < drawn.max() <= fastest
        assert abs(drawn.mean() - fastest / 2) < 0.05
    square = draw("AntGoal")
    assert np.abs(square).max() > 2.99
    np.testing.assert_allclose(square.std(0), 3 / 3**0.5, rtol=0.03)
    radius = np.linalg.norm(draw("AntGoal", "gym"), axis=1)
    assert radius.max() <= 3
    # uniform in the disc: a quarter of the goals within half the radius
    assert abs((radius < 1.5).mean() - 0.25) < 0.03
    with pytest.raises(ValueError, match=r"direction is 1 \(forwards\) or -1, got 0.5"):
        rows_of("AntDir", "gym").set_tasks([0.5])


@pytest.mark.parametrize("name", ["HalfCheetahDir", "AntDir"])
def test_episodes_begin_as_the_presets_say(name):
    seeds = row_seeds(0, 40, 100)
    for preset in PRESETS:
        robot = rows_of(name, preset).robot
        qpos, qvel = robot.start(seeds)
        noise = qpos - robot.pose
        np.testing.assert_allclose(qvel.mean(0), 0, atol=0.01)
        np.testing.assert_allclose(qvel.std(0), 0.1, rtol=0.05)
        np.testing.assert_allclose((qvel**4).mean(0), 3e-4, rtol=0.3)
        np.testing.assert_allclose(noise.mean(0), 0, atol=0.005)
        both = np.concatenate([noise, qvel], axis=1)
        independent = np.corrcoef(both.T) - np.eye(both.shape[1])
        assert np.abs(independent).max() < 0.08
        if preset == "finn2017":
            np.testing.assert_allclose(noise.std(0), 0.01, rtol=0.05)
            np.testing.assert_allclose((noise**4).mean(0), 3e-8, rtol=0.3)
        else:
            assert np.abs(noise).max() <= 0.1
            np.testing.assert_allclose(noise.std(0), 0.2 / 12**0.5, rtol=0.05)


def test_the_ant_of_the_paper_differs_from_gymnasiums():
    paper = rows_of("AntDir", "finn2017").robot
    other = rows_of("AntDir", "gym").robot
    shipped = gymnasium.make("Ant-v5").unwrapped.model
    assert (paper.dt, other.dt) == (0.02, 0.05)
    assert paper.model.opt.timestep == 0.02
    assert other.model.opt.timestep == shipped.opt.timestep
    np.testing.assert_array_equal(
        paper.model.geom_solimp[:, :3], np.tile([0.8, 0.8, 0.01], (14, 1))
    )
    np.testing.assert_array_equal(other.model.geom_solimp, shipped.geom_solimp)
    np.testing.assert_array_equal(paper.model.body_mass, shipped.body_mass)
    np.testing.assert_array_equal(paper.pose[[2, 8, 10, 12, 14]], [0.55, 1, -1, -1, 1])
    np.testing.assert_array_equal(other.pose, shipped.qpos0)
