"""compute-sanitizer on small shapes: bad addresses, races, misused barriers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZER = shutil.which("compute-sanitizer")
# One process runs every stage, forward and backward, at a length that is no multiple of any tile.
PROGRAM = """
import torch
from tools.peers.adapters import Own
from tools.peers.problem import GRADS, Geometry, Heads, make_decode, make_problem
own = Own("tools.own_stages:STAGES")
geom, like = Geometry(n=4, w=40), (torch.bfloat16, "cuda")
for heads in (Heads(16, 1, 192, 128), Heads(2, 2, 80, 64)):
    p = make_problem(heads, geom, 333, 0.1, 4, *like)
    for stage, make in own.stages().items():
        if "decode" in stage:
            continue
        leaves = [getattr(p, name).detach().requires_grad_() for name in GRADS.get(stage, ())]
        out = make(p)(*leaves)
        if leaves:
            torch.autograd.grad(out, leaves, torch.ones_like(out))
    own.stages()["decode"](make_decode(heads, geom, 2, 333, *like))()
torch.cuda.synchronize()
print("all stages ran")
"""


@pytest.mark.gpu_only
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_sanitizer_finds_nothing(tool):
    # Without the caching allocator, a tensor's end is a real allocation's end.
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "17", sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    if "Device not supported" in done.stdout + done.stderr:
        pytest.skip("compute-sanitizer does not support this machine's device (virtualised)")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "all stages ran" in done.stdout
