"""Which GPUs get which plans, and which are refused before a launch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nsa_neuron import compile_check
from nsa_neuron.backends import cuda
from nsa_neuron.backends.cuda import devices, plan_points, plans
from nsa_neuron.backends.cuda.devices import SHARED_BYTES, Gpu
from nsa_neuron.ops import get
from nsa_neuron.registry import Supported, Unsupported

H200 = Gpu("NVIDIA H200", (9, 0), SHARED_BYTES, 143_771 * 2**20)
H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), SHARED_BYTES, 81_559 * 2**20)
RTX = Gpu("NVIDIA RTX PRO 6000", (12, 0), 101_376, 96 * 2**30)
B200 = Gpu("NVIDIA B200", (10, 0), SHARED_BYTES, 180 * 2**30)


@pytest.mark.parametrize(
    ("gpu", "folder", "hindrance"),
    [
        (H200, "h200", ""),
        (replace(H200, name="Graphics Device"), "h200", ""),
        (H100, "h100", ""),
        (replace(H100, name="NVIDIA H100 NVL", memory=94 * 2**30), "h100", ""),
        (replace(H100, shared_bytes=SHARED_BYTES - 1), "h100", "232447 bytes of shared memory"),
        (B200, "h200", "is sm_100; the tile plans are compiled for sm_90"),
        (RTX, "h100", "is sm_120; the tile plans are compiled for sm_90"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_plans_of_a_gpu_and_why_there_are_none(gpu, folder, hindrance):
    assert gpu.plans == folder
    assert hindrance in gpu.hindrance and bool(hindrance) == bool(gpu.hindrance)


def test_what_the_driver_says_is_read(monkeypatch):
    said = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, shared_memory_per_block_optin=5, total_memory=7
    )
    other = SimpleNamespace(**{**vars(said), "name": "first"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", {0: other, 3: said}.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.gpu() == devices.gpu(3) == Gpu("NVIDIA H100", (9, 0), 5, 7)
    assert devices.gpu(0).name == "first"
    assert "5 bytes of shared memory" in devices.hindrance()


@pytest.fixture
def bound():
    """A call whose tensors lie on GPU 1."""
    q = torch.empty(1, 8, 16, 64, device="meta", dtype=torch.bfloat16)
    k = torch.empty(1, 8, 1, 64, device="meta", dtype=torch.bfloat16)
    spec = get("attention")
    call = spec.bind({**spec.defaults, "q": q, "k": k, "v": k})
    return replace(call, device=torch.device("cuda", 1))


@pytest.mark.parametrize(("gpu", "rule"), [(H200, ""), (H100, ""), (RTX, "gpu")])
def test_a_call_is_refused_on_a_gpu_without_plans(monkeypatch, bound, gpu, rule):
    monkeypatch.setattr(cuda, "_gpu_of", {1: gpu}.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    verdict = cuda.BACKEND.supports(bound, "hw")
    assert isinstance(verdict, Unsupported) == bool(rule)
    if rule:
        assert verdict.rule == rule and "RTX" in verdict.reason
    else:
        assert isinstance(verdict, Supported)


def test_an_h100_differs_in_where_the_designs_break_even_only():
    wanted = {"dk": 192, "dv": 128, "dtype": "bfloat16", "group": 16}
    for op in cuda.STEMS:
        ours, theirs = (plans.find(device, op, **wanted) for device in ("h100", "h200"))
        assert ours.keys() == theirs.keys()
        assert {k for k in ours if ours[k] != theirs[k]} <= {"dispatch"}, op
    ours, theirs = (
        plans.find(d, "selected_attention", **wanted)["dispatch"] for d in ("h100", "h200")
    )
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed == {"forward_rows", "backward_dq_rows"}
    for name in changed:
        assert ours[name] == pytest.approx(theirs[name] * 3.35 / 4.8, rel=0.01)


def test_every_kernel_row_of_every_gpu_is_compiled_for_the_h200():
    """A row that only another device has would be accepted uncompiled."""
    compiled = {(job.entry.op, str(job.planned)) for job in compile_check.jobs()}
    kernels = plan_points.NOT_KERNELS
    for op in cuda.STEMS:
        for kernel, rows in plans.load("h100", op).items():
            if kernel not in kernels:
                assert all((op, str(row["constants"])) in compiled for row in rows), (op, kernel)
