"""What collecting trajectories needs of environments, in one place.

A *row* is one episode of one task. Rows are ordered by task: with ``T`` tasks and
``R = num_envs`` rows, row ``r`` is episode ``r mod (R / T)`` of task
``r div (R / T)``, so arrays ``[rows, ...]`` reshape to ``[tasks, episodes, ...]``.

    envs = make_rows("fastmaml/HalfCheetahDir-v0", 800, preset="finn2017", threads=2)
    envs.set_tasks(envs.sample_tasks(40, seed=0))             # 20 episodes a task
    obs, info = envs.reset(seed=row_seeds(seed, 40, 20))
    for _ in range(envs.horizon):
        obs, reward, terminated, truncated, info = envs.step(actions)
        counts = info["active"]               # rows whose episode this step belongs to
    envs.close()

The environments of `fastmaml.rl.envs` step all rows at once. Anybody else's
`gymnasium.Env` joins through `fastmaml.rl.envs.user.UserRows`, which runs them in
gymnasium's own vector environments behind the same interface. Nothing here imports
gymnasium before an environment is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastmaml.tasks.philox import philox4x32

_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


@runtime_checkable
class RowsEnv(Protocol):
    """Environments that step all rows at once; autoreset is disabled.

    Attributes:
        num_envs: rows, R.
        horizon: steps after which an episode is truncated.
        single_observation_space: gymnasium space of a row's observation, [O].
        single_action_space: gymnasium space of a row's action, [A].
    """

    num_envs: int
    horizon: int
    single_observation_space: Any
    single_action_space: Any

    def sample_tasks(self, n: int, seed: int) -> NDArray[Any]:
        """Draws tasks; task i depends on the seed and on i alone, [n, ...]."""
        ...

    def set_tasks(self, tasks: ArrayLike) -> None:
        """Gives every row its task; holds from the next step on.

        Args:
            tasks: [T, ...] where T divides the number of rows.
        """
        ...

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[Any], dict[str, Any]]:
        """Starts an episode in every row.

        Args:
            seed: a seed for each row [R], whose episode it decides whatever stands in
                other rows; a number s for ``s, s + 1, ...``; ``None`` to go on.
            options: none are known.

        Returns:
            Observations [R, O] and ``info``.
        """
        ...

    def step(
        self, actions: NDArray[Any]
    ) -> tuple[
        NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, NDArray[Any]]
    ]:
        """Takes a step in every row whose episode has not ended.

        A row that has ended stays as it is until the next reset: its observation and
        its flags are repeated, its reward is 0, and its action is ignored.

        Args:
            actions: [R, A].

        Returns:
            Observations [R, O] float32; rewards [R] float64; terminated [R] and
            truncated [R], which stay true; and ``info`` with

            * ``active`` [R]: the row was running when this step began. The masks of
              a trajectory are the ``active`` of its steps.
            * ``nonfinite`` [R]: the row's episode has ended because its simulator
              left the finite numbers. Its last observation is the one before that,
              the reward of that step is 0, and it is terminated.
        """
        ...

    def close(self) -> None:
        """Ends threads and processes; nothing but closing is allowed after it."""
        ...


def row_seeds(
    seed: int, tasks: int | ArrayLike, episodes: int | ArrayLike
) -> NDArray[np.int64]:
    """A seed for every row, made of its task's and its episode's number.

    A row's seed depends on these numbers alone and not on how many rows there are, so
    a part of a batch can be collected again elsewhere. Philox4x32-10 under the key
    ``seed`` at the counter (task mod 2^32, task div 2^32, episode, 2^32 - 1), 63 bits.

    Args:
        seed: of the collection, below 2^64; use another one for each.
        tasks: how many tasks, or their numbers [T].
        episodes: how many episodes of each, or their numbers [E] below 2^32.

    Returns:
        [T * E] int64, not negative, ordered by task.

    Raises:
        ValueError: the seed is not in [0, 2^64).
    """
    key = _key(seed)
    number = _numbers(tasks)
    episode = _numbers(episodes)
    counter = np.empty((len(number), len(episode), 4), dtype=np.uint64)
    counter[..., 0] = (number & _LOW)[:, None]
    counter[..., 1] = (number >> _SHIFT)[:, None]
    counter[..., 2] = episode
    counter[..., 3] = _LOW
    words = philox4x32(counter, key).astype(np.uint64)
    seeds = (words[..., 0] | words[..., 1] << _SHIFT) >> np.uint64(1)
    return seeds.reshape(-1).astype(np.int64)


def make_rows(
    env: str | Callable[[], Any],
    num_envs: int,
    *,
    horizon: int | None = None,
    workers: int = 0,
    **settings: Any,
) -> RowsEnv:
    """Makes the rows of an environment.

    Args:
        env: a registered id, or a function that makes a ``gymnasium.Env``. One
            without a batched form must have ``sample_tasks(n, seed)`` and
            ``set_task(task)``.
        num_envs: rows, R.
        horizon: steps of an episode; needed where there is no batched form.
        workers: without a batched form, 0 steps the rows one after the other in this
            process, 1 or more has a process for each row.
        settings: passed to the environment, such as ``preset`` and ``threads``.

    Raises:
        ImportError: gymnasium is not installed.
        ValueError: ``horizon`` is missing or ``workers`` is of no use.
    """
    import fastmaml.rl.envs as envs  # registers; says what to install

    if isinstance(env, str):
        import gymnasium

        batched: Any = gymnasium.spec(env).vector_entry_point
        if isinstance(batched, str):
            batched = gymnasium.envs.registration.load_env_creator(batched)
        if isinstance(batched, type) and issubclass(batched, envs.TaskVectorEnv):
            if workers:
                raise ValueError(
                    f"workers: {env} steps all rows at once and takes none, got "
                    f"{workers}; its threads= may say how many threads do so"
                )
            if horizon is not None:
                settings["horizon"] = horizon
            mode = gymnasium.VectorizeMode.VECTOR_ENTRY_POINT
            made: Any = gymnasium.make_vec(env, num_envs, mode, **settings)
            return made
        name, kept = env, dict(settings)
        settings = {}

        def env() -> Any:
            return gymnasium.make(name, **kept)

    if settings:
        raise ValueError(f"settings are for registered environments, got {settings}")
    if horizon is None:
        raise ValueError("horizon: needed for an environment without a batched form")
    return envs.UserRows(env, num_envs, horizon=horizon, workers=workers)


def repeat_tasks(tasks: NDArray[Any], rows: int) -> NDArray[Any]:
    """The task of every row, [rows, ...] of tasks [T, ...].

    Raises:
        ValueError: the number of tasks doesn't divide the number of rows.
    """
    if not len(tasks) or rows % len(tasks):
        raise ValueError(
            f"tasks: their number must divide the {rows} rows, got {len(tasks)}; "
            "make as many rows as tasks times episodes"
        )
    return np.repeat(tasks, rows // len(tasks), axis=0)


def _key(seed: int) -> tuple[int, int]:
    if not 0 <= int(seed) < 2**64:
        raise ValueError(f"seed must be in [0, 2^64), got {seed}")
    return int(seed) & 0xFFFFFFFF, int(seed) >> 32


def _numbers(count: int | ArrayLike) -> NDArray[np.uint64]:
    given = np.asarray(count)
    if given.ndim == 0:
        return np.arange(int(given), dtype=np.uint64)
    return given.astype(np.uint64)
