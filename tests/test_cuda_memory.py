"""Nobody but kernels touches the workspace: it lies in pages that only they can access.

The emulation opens `device_memory` while a kernel runs and closes it behind; whoever
else reads or writes there ends the process. So each case is a process of its own, and
those with a planted access must end by the signal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import backends
import pytest
from command import environment

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.parametrize("backend", backends.usable(["cuda_emulated"]))

SCRIPT = """
import ctypes, sys
import torch
from fastmaml import MAML, _native
from fastmaml.engines.native import NativeEngine
from engines import engine_for, rates_of
from problems import BY_NAME

backend, name, planted = sys.argv[1:]
core, rooms = _native.core(), []

def larger(self, size):
    room = (ctypes.c_char * size).from_address(core.device_memory(size))
    rooms.append(room)
    self._workspace = torch.frombuffer(room, dtype=torch.uint8)
    return self._workspace

def everything(engine, problem, model):
    params = {n: p.detach() for n, p in model.named_parameters()}
    tasks = problem.tasks(2)
    for layout in ("scalar", "per_tensor", "per_parameter"):
        rates = rates_of(problem, model, layout, True, 2)
        for learned in (False, True):
            options = {"steps": 2, "rate_gradient": learned}
            found = engine.meta_gradient(params, rates, tasks, **options)
            yield from found.gradients.values()
    yield engine.evaluate(params, rates, tasks, steps=2).loss
    yield from engine.adapt(
        params, rates, tasks.support_x, tasks.support_y, steps=1
    ).values()
    yield engine.forward(
        {n: p.expand(2, *p.shape) for n, p in params.items()}, tasks.query_x
    )

problem = BY_NAME[name]
model = problem.build()
want = list(everything(engine_for(backend, problem, model), problem, model))
NativeEngine._larger = larger
guarded = engine_for("cpu_lockstep" if planted == "driver" else backend, problem, model)
got = list(everything(guarded, problem, model))
if planted == "python":
    guarded._workspace[0].item()
assert rooms and all(map(torch.equal, got, want))
print("sound")
"""


def run(backend: str, name: str, planted: str) -> subprocess.CompletedProcess[str]:
    signals = "handle_segv=0:handle_sigbus=0"  # else AddressSanitizer takes them
    options = ":".join(filter(None, [os.environ.get("ASAN_OPTIONS"), signals]))
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, backend, name, planted],
        cwd=HERE,
        env=environment() | {"ASAN_OPTIONS": options},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("name", ["omniglot-conv", "omniglot-fc", "policy"])
def test_a_call_leaves_the_workspace_to_kernels(name, backend):
    done = run(backend, name, "nowhere")
    assert (done.returncode, done.stdout) == (0, "sound\n"), done.stderr[-2000:]


# `driver`: kernels of the CPU, which the emulation does not launch
@pytest.mark.parametrize("planted", ["python", "driver"])
def test_a_stray_access_ends_the_process(planted, backend):
    done = run(backend, "omniglot-fc", planted)
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stderr[-2000:]
