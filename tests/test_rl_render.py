"""Robots can be drawn without a screen, where there is EGL or OSMesa."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("mujoco.batch", reason="needs the extra fastmaml[rl]")

DRAW = """
import sys
try:  # a library that isn't there fails at import or when it makes a context
    import mujoco
    mujoco.GLContext(8, 8).free()
except Exception as error:
    sys.exit(f"no OpenGL: {{type(error).__name__}}")
import gymnasium
import fastmaml.rl.envs
env = gymnasium.make("fastmaml/{name}-v0", render_mode="rgb_array")
env.reset(seed=0)
first = env.render()
assert first.shape == (480, 480, 3), first.shape
assert first.std() > 10
for _ in range(20):
    env.step(env.action_space.high)
assert (env.render() != first).any()
env.close()
"""


@pytest.mark.parametrize("name", ["HalfCheetahDir", "AntGoal"])
def test_a_robot_is_drawn(name, tmp_path):
    missing = []
    for library in ("egl", "osmesa"):
        environment = {**os.environ, "MUJOCO_GL": library}
        command = [sys.executable, "-c", DRAW.format(name=name)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path
        )
        if done.returncode == 0:
            return
        assert done.stderr.startswith("no OpenGL"), done.stderr
        missing.append(f"{library}: {done.stderr.strip()}")
    pytest.skip("; ".join(missing))
