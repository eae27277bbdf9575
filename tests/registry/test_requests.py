"""Names, requests and fall-backs at their limits: who stays, who goes, what is said."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch

import nsa_neuron as nsa
from nsa_neuron import registry
from nsa_neuron.errors import BackendUnavailable, NoLowering, UnknownBackend
from nsa_neuron.library import pinned
from nsa_neuron.ops import get
from nsa_neuron.registry import (
    BUILT_IN,
    REGISTRY,
    Registry,
    Supported,
    Target,
    Unsupported,
    requested,
    requesting,
    same_device,
    use_backend,
)


class Plain:
    """Takes everything and runs the reference; `fails` is raised when it lowers."""

    def __init__(self, name: str, fails: Exception | None = None) -> None:
        self.name, self.fails = name, fails

    def modes(self) -> dict[str, str]:
        return {"hw": ""}

    def supports(self, bound: Any, mode: str) -> Supported:
        return Supported()

    def lower(self, bound: Any, plan: Any) -> Any:
        if self.fails:
            raise self.fails
        return bound.spec.reference


def bound() -> Any:
    spec = get("attention")
    return spec.bind(spec.arguments(spec.cases[1], torch.float32))


# ---- names


@pytest.mark.parametrize("loaded", [False, True])
def test_a_name_belongs_to_one_backend(loaded: bool) -> None:
    """Whether or not the first was asked for already; built-in ones are imported late."""
    own, first = Registry(), Plain("acme")
    own.register(first)
    if loaded:
        assert own.get("acme") is first
    for name in ("acme", "cuda"):
        with pytest.raises(UnknownBackend, match=f"named '{name}' exists already"):
            own.register(Plain(name))
    assert own.get("acme") is first


def test_a_removed_backend_is_gone_and_its_name_free() -> None:
    own, second = Registry(), Plain("acme")
    own.register(Plain("acme"))
    own.get("acme")
    before = own.generation
    own.unregister("acme")
    assert own.generation > before and "acme" not in own.names()
    with pytest.raises(UnknownBackend, match="no backend or target 'acme'"):
        own.get("acme")
    own.register(second)
    assert own.get("acme") is second


def test_an_entry_point_takes_no_built_in_s_place(monkeypatch) -> None:
    points = [
        importlib.metadata.EntryPoint(name, "nowhere:BACKEND", registry.ENTRY_POINTS)
        for name in ("cpu", "acme")
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    own = Registry()
    assert own.names() == (*BUILT_IN, "acme")
    assert own.get("cpu") is REGISTRY.get("cpu")
    for registry_of in (own, Registry()):  # which looked for entry points, and which did not yet
        registry_of.unregister("acme")
        assert registry_of.names() == tuple(BUILT_IN)


def test_a_backend_comes_before_a_machine_of_its_name() -> None:
    own, mine = Registry(), Plain("h200")
    assert own.resolve("h200") == "cuda" and own.resolve("trn2") == "neuron"
    own.register(mine)
    assert own.get("h200") is mine and own.target("h200") == Target("h200", "hw")


# ---- what a backend finds out when it lowers


def test_a_backend_that_cannot_lower_is_passed_over_unless_it_was_asked_for(monkeypatch) -> None:
    own = Registry()
    own.register(Plain("late", BackendUnavailable("no compiler here")))
    own.register(Plain("next"))
    monkeypatch.setitem(registry.AUTOMATIC, "cpu", ("late:hw", "next:hw"))
    found = own.select(bound(), None)
    assert found.target == Target("next", "hw")
    assert [(r.target.backend, r.rule, r.reason) for r in found.rejected] == [
        ("late", "available", "no compiler here")
    ]
    with pytest.raises(BackendUnavailable, match=r"^no compiler here"):
        own.select(bound(), "late")
    monkeypatch.setitem(registry.AUTOMATIC, "cpu", ("late:hw",))
    with pytest.raises(NoLowering, match="no compiler here"):
        own.select(bound(), None)


def test_other_errors_of_a_backend_are_nobody_s_refusal(monkeypatch) -> None:
    own = Registry()
    own.register(Plain("broken", ValueError("a bug")))
    monkeypatch.setitem(registry.AUTOMATIC, "cpu", ("broken:hw", "reference:eager"))
    with pytest.raises(ValueError, match="a bug"):
        own.select(bound(), None)


# ---- requests


def test_a_request_ends_with_its_block_however_it_ends() -> None:
    before = requested()
    for asking in (lambda: requesting("cpu:torch"), lambda: use_backend("cpu", "torch")):
        with pytest.raises(ZeroDivisionError), asking():
            assert requested() == "cpu:torch"
            with requesting(None):
                assert requested() == "cpu:torch", "None changes nothing"
            with requesting("reference:eager"):
                assert requested() == "reference:eager"
            assert requested() == "cpu:torch"
            raise ZeroDivisionError
        assert requested() == before


def test_devices_are_told_by_their_type() -> None:
    assert same_device(torch.device("cuda", 1), "cpu", "cuda") is None
    assert same_device(torch.device("cpu"), "cpu") is None
    refusal = same_device(torch.device("meta"), "cpu", "cuda")
    assert refusal == Unsupported("device", "tensors are on 'meta', not on cpu or cuda")


# ---- what a router hands on


@pytest.mark.parametrize("backend", ["reference", "cpu:torch"])
def test_autocast_changes_nothing_inside_a_lowering(backend: str) -> None:
    """Products of float32 tensors would become bfloat16 ones."""
    q, k, v = (torch.randn(1, 40, 2, 16) for _ in range(3))
    with use_backend(backend):
        plain = nsa.attention(q, k, v)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (q[0, 0] @ k[0, 0].T).dtype == torch.bfloat16
            cast = nsa.attention(q, k, v)
            assert torch.is_autocast_enabled("cpu")
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_ids_beyond_the_blocks_are_padding_where_training_keeps_them() -> None:
    spec = get("nsa_attention_forward")
    case = next(c for c in spec.cases if c.name == "batch2_kv2")
    values = spec.arguments(case, torch.float32)
    few = torch.ops.nsa.nsa_attention_forward(**values | {"num_selected": 4})
    many = torch.ops.nsa.nsa_attention_forward(**values | {"num_selected": 1000})
    assert many[1].shape[-1] == 1000 and (many[1][..., 4:] == -1).all()
    for a, b in zip(
        (few[0], few[1], *few[2:]), (many[0], many[1][..., :4], *many[2:]), strict=True
    ):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_each_mode_of_a_backend_has_a_pinned_op_of_its_own() -> None:
    targets = [Target("cpu", "torch"), Target("cpu", "native"), Target("reference", "eager")]
    ops = [pinned("gated_sum", target) for target in targets]
    assert len({str(op) for op in ops}) == 3
    assert [pinned("gated_sum", target) for target in targets] == ops, "made once"
    assert str(ops[0]) == "nsa_lowered.gated_sum__cpu_torch.default"


@pytest.mark.parametrize(
    ("name", "error", "said"),
    [
        (None, None, ""), ("", None, ""), ("reference", None, ""), ("cpu:torch", None, ""),
        ("tpu", UnknownBackend, "NSA_BACKEND is 'tpu': no backend or target 'tpu'"),
        ("cpu:fast", UnknownBackend, "NSA_BACKEND is 'cpu:fast': backend 'cpu' has no mode"),
        ("trn2:hw", BackendUnavailable, "NSA_BACKEND is 'trn2:hw': neuron:hw cannot run here"),
    ],
)  # fmt: skip
def test_the_environment_s_backend_is_checked(monkeypatch, name, error, said: str) -> None:
    if name is None:
        monkeypatch.delenv("NSA_BACKEND", raising=False)
    else:
        monkeypatch.setenv("NSA_BACKEND", name)
    if error is None:
        registry.check_environment()
        return
    with pytest.raises(error) as caught:
        registry.check_environment()
    assert str(caught.value).startswith(said)
