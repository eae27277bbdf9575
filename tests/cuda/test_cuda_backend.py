"""What the backend decides about a call: refusals by rule, kernels, and where it launches."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from nsa_neuron.backends import cuda
from nsa_neuron.backends.cuda import limits, plans
from nsa_neuron.interpreted_grid import StrictFunction
from nsa_neuron.ops import get
from nsa_neuron.registry import Supported, Unsupported

CASES = ("batch2_kv2", "one_token", "mean_kv2_pe_per_head")


def bound(op: str = "attention", device: str = "cpu", **sizes: int):
    """A small call, as if its tensors lay on a device."""
    spec = get(op)
    case = next(c for c in spec.cases if c.name in CASES)
    call = spec.bind(spec.arguments(case, torch.float32))
    return replace(call, device=torch.device(device), sizes={**call.sizes, **sizes})


def test_without_triton_no_mode_runs(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = "the package 'triton' is not installed"
    assert cuda.BACKEND.modes() == {"hw": missing, "sim": missing}


def test_an_operation_without_a_kernel_is_refused():
    other = replace(bound(), spec=SimpleNamespace(name="attend_more", stem="attend_more"))
    verdict = cuda.BACKEND.supports(other, "sim")
    assert isinstance(verdict, Unsupported) and verdict.rule == "kernel"
    assert "attend_more" in verdict.reason


def test_a_call_without_a_plan_is_refused(monkeypatch):
    def find(*where, **wanted):
        raise plans.PlanError("no row")

    monkeypatch.setattr(plans, "find", find)
    verdict = cuda.BACKEND.supports(bound(), "sim")
    assert isinstance(verdict, Unsupported) and (verdict.rule, verdict.reason) == ("plan", "no row")


ROWS = [
    {"max_dk": 64, "max_dv": 32, "dtypes": ["float16"], "min_g": 3, "max_g": 5,
     "constants": {"a": 1}, "accepts": {"narrow": "the first"}},
    {"max_dk": 128, "dtypes": ["float16", "float32"], "constants": {"a": 2}},
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, 1), ({"group": 5}, 1), ({"dk": 65}, 2), ({"dv": 33}, 2), ({"dtype": "float32"}, 2),
        ({"group": 2}, 2), ({"group": 6}, 2), ({"dk": 128, "dv": 999}, 2), ({"dk": 129}, 0),
        ({"dtype": "bfloat16"}, 0),
    ],
)  # fmt: skip
def test_the_first_row_that_fits(change, found, monkeypatch):
    """Bounds are inclusive; what a row accepts is its own."""
    monkeypatch.setattr(plans, "load", lambda device, op: {"forward": ROWS})
    wanted = {"dk": 64, "dv": 32, "dtype": "float16", "group": 3, **change}
    if not found:
        with pytest.raises(plans.PlanError, match=r"kernel 'forward' of op 'attention'.*'dk': "):
            plans.find("h200", "attention", **wanted)
        return
    assert plans.find("h200", "attention", **wanted) == {"forward": {"a": found}}
    accepted = {"narrow": "the first"} if found == 1 else {}
    assert plans.accepted("h200", "attention", "forward", **wanted) == accepted


@pytest.mark.parametrize(
    ("mode", "device", "rule"),
    [("sim", "cpu", ""), ("sim", "cuda:0", "device"), ("hw", "cpu", "device"), ("hw", "cuda", "")],
)
def test_each_mode_takes_tensors_of_its_device(mode, device, rule):
    verdict = cuda.BACKEND.supports(bound(device=device), mode)
    assert (verdict.rule if isinstance(verdict, Unsupported) else "") == rule


@pytest.mark.parametrize(
    ("op", "sizes", "rule"),
    [
        ("attention", {"B": 65_535, "Hkv": 1}, ""),
        ("attention", {"B": 65_536, "Hkv": 1}, "batch"),
        ("attention", {"B": 256, "Hkv": 256}, "batch"),
        ("decode", {"B": 65_536, "Hkv": 64}, ""),
        ("decode", {"m": 128, "d": 1}, ""),
        ("decode", {"m": 129, "d": 1}, "ratio"),
    ],
)
def test_what_a_grid_and_a_tile_hold(op, sizes, rule):
    """A grid's y and z end at 65,535, its x does not; a tile of decode has up to 128 keys."""
    refusal = limits.refusal(bound(op, **sizes))
    assert (refusal.rule if refusal else "") == rule


def test_a_call_is_planned_by_its_own_dims_dtype_and_group():
    call = bound(Dk=192, Dv=128, Hq=32, Hkv=2)
    verdict = cuda.BACKEND.supports(replace(call, dtype=torch.bfloat16), "hw")
    assert isinstance(verdict, Unsupported)  # it lies on the CPU
    call = replace(call, dtype=torch.bfloat16, device=torch.device("cuda"))
    verdict = cuda.BACKEND.supports(call, "hw")
    assert isinstance(verdict, Supported)
    wanted = {"dk": 192, "dv": 128, "dtype": "bfloat16", "group": 16}
    assert verdict.plan == ("hw", plans.find("h200", "attention", **wanted))


@pytest.mark.parametrize(("op", "dim"), [("compress", "D"), ("select_blocks", "Dk"),
                                         ("gated_sum", "Dv")])  # fmt: skip
def test_an_operation_with_one_head_dim_is_planned_by_it(op, dim, monkeypatch):
    asked = {}
    monkeypatch.setattr(plans, "find", lambda device, stem, **wanted: asked.update(wanted) or {})
    assert isinstance(cuda.BACKEND.supports(bound(op, **{dim: 72}), "sim"), Supported)
    assert (asked["dk"], asked["dv"]) == (72, 72)


def test_kernels_of_a_gpu_are_compiled_and_others_interpreted():
    for mode, kind in (("hw", JITFunction), ("sim", StrictFunction)):
        assert type(cuda.kernel_package(mode).load("gated_sum").forward) is kind


@pytest.mark.parametrize("mode", ["hw", "sim"])
@pytest.mark.parametrize("op", ["attention", "nsa_attention_backward"])
def test_on_a_gpu_launches_happen_where_the_tensors_lie(op, mode, monkeypatch):
    placed = []
    monkeypatch.setattr(cuda, "_on_device", lambda launch, device: placed.append(device) or launch)
    call = bound(op, device="cuda:1" if mode == "hw" else "cpu")
    verdict = cuda.BACKEND.supports(call, mode)
    assert isinstance(verdict, Supported), verdict
    cuda.BACKEND.lower(call, verdict.plan)
    assert set(placed) == ({torch.device("cuda:1")} if mode == "hw" else set())
    if mode == "hw":
        assert len(placed) == (1 if op == "attention" else 1 + len(verdict.plan))


STRIDED = [
    *((f"compress{way}", case) for way in ("", "_backward") for case in ("mean", "linear", "mlp")),
    *((f"{stem}{way}", "one_token") for way in ("", "_backward")
      for stem in ("attention", "compressed_attention", "gated_sum", "selected_attention",
                   "sliding_window_attention")),
    ("select_blocks", "one_token"), ("decode", "one_token"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "name"), STRIDED)
def test_channels_may_lie_apart(op, name):
    """Kernels read channels that are adjacent; what is not so is copied, and gives the same."""
    spec = get(op)
    values = spec.arguments(next(c for c in spec.cases if c.name == name), torch.float32)
    apart = dict(values)
    for key, x in values.items():
        if isinstance(x, torch.Tensor) and x.numel():
            apart[key] = x.repeat_interleave(2, -1)[..., ::2]
            assert x.shape[-1] == 1 or apart[key].stride(-1) == 2
    outs = []
    for given in (values, apart):
        call = spec.bind(given)
        verdict = cuda.BACKEND.supports(call, "sim")
        assert isinstance(verdict, Supported)
        out = cuda.BACKEND.lower(call, verdict.plan)(**given)
        outs.append(out if isinstance(out, tuple) else (out,))
    assert all(a.equal(b) for a, b in zip(*outs, strict=True))
