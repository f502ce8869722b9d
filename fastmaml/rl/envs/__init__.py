"""Environments whose tasks differ in their reward, one at a time and in batches.

Importing this registers them with gymnasium:

    gymnasium.make("fastmaml/Navigation2D-v0", preset="code")
    fastmaml.rl.vector.make_rows("fastmaml/Navigation2D-v0", 800, preset="code")

``fastmaml.rl.vector`` describes what both have in common.
"""

try:
    import gymnasium
except ImportError as error:
    raise ImportError(
        'fastmaml.rl.envs needs gymnasium: pip install "gymnasium[mujoco]"'
    ) from error

from fastmaml.rl.envs.base import TaskEnv as TaskEnv
from fastmaml.rl.envs.base import TaskVectorEnv as TaskVectorEnv
from fastmaml.rl.envs.navigation import Navigation2D as Navigation2D
from fastmaml.rl.envs.navigation import Navigation2DVector as Navigation2DVector
from fastmaml.rl.envs.user import UserRows as UserRows

# name -> module; those on MuJoCo are imported when they are made
ENVIRONMENTS = {
    "Navigation2D": "navigation",
    "HalfCheetahDir": "half_cheetah",
    "HalfCheetahVel": "half_cheetah",
    "AntDir": "ant",
    "AntVel": "ant",
    "AntGoal": "ant",
}

for _name, _module in ENVIRONMENTS.items():
    gymnasium.register(
        f"fastmaml/{_name}-v0",
        entry_point=f"fastmaml.rl.envs.{_module}:{_name}",
        vector_entry_point=f"fastmaml.rl.envs.{_module}:{_name}Vector",
    )
