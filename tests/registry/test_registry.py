"""Who runs a call: verdicts, selections, policies, contracts."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import fresh
import pytest
import torch
from torch import Tensor

import nsa_neuron as nsa
from nsa_neuron import registry
from nsa_neuron.conformance.targets import find_targets
from nsa_neuron.errors import BackendUnavailable, ContractViolation, NoLowering, UnknownBackend
from nsa_neuron.ops import get
from nsa_neuron.registry import (
    REGISTRY,
    Backend,
    Registry,
    Selection,
    Supported,
    Target,
    Unsupported,
    requested,
    use_backend,
)

if TYPE_CHECKING:
    from pathlib import Path

    from nsa_neuron.spec import Bound


class Fake:
    """A backend with scripted answers; runs the reference, then `twist`."""

    def __init__(
        self,
        name: str,
        modes: dict[str, str] | None = None,
        verdict: Supported | Unsupported = Supported(),  # noqa: B008
        twist: Callable[[Any], Any] = lambda results: results,
    ) -> None:
        self.name = name
        self._modes = {"hw": ""} if modes is None else modes
        self.verdict = verdict
        self.twist = twist
        self.asked: list[str] = []
        self.plans: list[Any] = []
        self.calls = 0

    def modes(self) -> dict[str, str]:
        return self._modes

    def supports(self, bound: Bound, mode: str) -> Supported | Unsupported:
        self.asked.append(mode)
        return self.verdict

    def lower(self, bound: Bound, plan: Any) -> Callable[..., Any]:
        self.plans.append(plan)

        def run(**values: Any) -> Any:
            self.calls += 1
            return self.twist(bound.spec.reference(**values))

        return run


@pytest.fixture
def add() -> Iterator[Callable[..., Fake]]:
    """Registers fake backends globally and removes them afterwards."""
    made: list[str] = []

    def make(*args: Any, **kwargs: Any) -> Fake:
        backend = Fake(*args, **kwargs)
        REGISTRY.register(backend)
        made.append(backend.name)
        return backend

    yield make
    for name in made:
        REGISTRY.unregister(name)


def qkv(s: int = 6) -> list[Tensor]:
    return [torch.randn(1, s, 2, 4) for _ in range(3)]


def bound() -> Bound:
    spec = get("attention")
    return spec.bind(spec.arguments(spec.cases[1], torch.float32))


def test_protocol() -> None:
    assert isinstance(Fake("x"), Backend)
    assert isinstance(REGISTRY.get("reference"), Backend)
    assert not isinstance(object(), Backend)


def test_selection_carries_target_lowering_and_who_refused(monkeypatch: Any) -> None:
    own = Registry()
    picky, ready = Fake("picky", verdict=Unsupported("head_dim", "64 is too much")), Fake("ready")
    ready.verdict = Supported({"tile": 3})
    for backend in (picky, ready):
        own.register(backend)
    monkeypatch.setitem(registry.AUTOMATIC, "cpu", ("picky:hw", "ready:hw", "reference:eager"))
    selection = own.select(bound(), None)
    assert isinstance(selection, Selection)
    assert selection.target == Target("ready", "hw") and str(selection.target) == "ready:hw"
    assert [(str(r.target), r.rule) for r in selection.rejected] == [("picky:hw", "head_dim")]
    assert ready.plans == [{"tile": 3}], "the plan of the verdict reaches lower"


def test_no_lowering_lists_every_reason(monkeypatch: Any) -> None:
    own = Registry()
    own.register(Fake("one", verdict=Unsupported("dtype", "only float16")))
    own.register(Fake("two", {"hw": "no device here"}))
    monkeypatch.setitem(registry.AUTOMATIC, "cpu", ("one:hw", "two:hw"))
    with pytest.raises(NoLowering) as caught:
        own.select(bound(), None)
    assert caught.value.reasons == (
        ("one", "hw", "dtype", "only float16"),
        ("two", "hw", "available", "no device here"),
    )
    for part in ("attention", "float32", "only float16", "no device here", "one:hw", "two:hw"):
        assert part in str(caught.value)


def test_an_unavailable_mode_is_not_asked() -> None:
    own, away = Registry(), Fake("away", {"hw": "no device", "sim": ""})
    own.register(away)
    assert isinstance(own.ask(Target("away", "hw"), bound()), Unsupported)
    assert isinstance(own.ask(Target("away", "sim"), bound()), Supported)
    assert isinstance(own.ask(Target("away", "moon"), bound()), Unsupported)
    assert away.asked == ["sim"]


def test_an_exception_inside_a_check_propagates(add: Callable[..., Fake]) -> None:
    broken = add("broken")
    broken.supports = lambda bound, mode: 1 / 0  # type: ignore[method-assign]
    with use_backend("broken"), pytest.raises(ZeroDivisionError):
        nsa.attention(*qkv())


def test_an_explicit_request_never_falls_back(add: Callable[..., Fake]) -> None:
    add("picky", verdict=Unsupported("rank", "never"))
    with use_backend("picky"), pytest.raises(NoLowering) as caught:
        nsa.attention(*qkv())
    assert caught.value.reasons == (("picky", "hw", "rank", "never"),)
    assert nsa.attention(*qkv())[0].shape == (1, 6, 2, 4), "outside the request all is as before"


def test_automatic_choice_falls_back_and_logs_once(
    add: Callable[..., Fake], monkeypatch: Any, caplog: Any
) -> None:
    add("picky", verdict=Unsupported("rank", "a reason seen once"))
    monkeypatch.setitem(registry.AUTOMATIC, "cpu", ("picky:hw", "reference:eager"))
    REGISTRY.forget()
    try:
        with caplog.at_level(logging.WARNING, "nsa_neuron"):
            for s in (5, 6, 7, 5):
                nsa.attention(*qkv(s))
                nsa.sliding_window_attention(*qkv(s), window=3)
    finally:
        REGISTRY.forget()
    told = [record.getMessage() for record in caplog.records]
    for message, op in zip(told, ("attention ", "sliding_window_attention "), strict=True):
        assert message.startswith(op)
        assert all(part in message for part in ("reference:eager", "picky:hw", "rank"))


def test_cpu_tensors_never_choose_a_simulator() -> None:
    selection = REGISTRY.select(bound(), None)
    assert selection.target.backend == "cpu"


def test_use_backend_nests_and_restores(add: Callable[..., Fake]) -> None:
    one, two = add("one"), add("two", {"sim": "", "other": ""})
    before = requested()
    with use_backend("one") as target:
        assert str(target) == requested() == "one:hw"
        nsa.attention(*qkv())
        with use_backend("two") as inner:
            assert str(inner) == "two:sim", "the backend's first mode"
            nsa.attention(*qkv())
            nsa.attention(*qkv())
        assert requested() == "one:hw"
        with pytest.raises(KeyError), use_backend("two", mode="sim"):
            raise KeyError
        assert requested() == "one:hw"
    assert requested() == before
    assert (one.calls, two.calls) == (1, 2)


def test_use_backend_covers_the_backward_pass(add: Callable[..., Fake]) -> None:
    one = add("one")
    q, k, v = (x.requires_grad_() for x in qkv())
    with use_backend("one"):
        nsa.attention(q, k, v)[0].sum().backward()
    assert one.calls == 2


def test_use_backend_belongs_to_its_thread(add: Callable[..., Fake]) -> None:
    """Two threads with two requests do not see each other's."""
    backends = [add("one"), add("two")]
    barrier, errors = threading.Barrier(2), []

    def work(backend: Fake) -> None:
        try:
            with use_backend(backend.name):
                for _ in range(20):
                    barrier.wait(timeout=30)
                    nsa.attention(*qkv())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(backend,)) for backend in backends]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors and [backend.calls for backend in backends] == [20, 20]


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(
        UnknownBackend, match=r"no backend or target 'tpu'; there are .*reference.*h200"
    ):
        REGISTRY.get("tpu")
    for request in ("tpu", "tpu:hw"):
        with pytest.raises(UnknownBackend), use_backend(request):
            pass
    with pytest.raises(UnknownBackend, match="no mode 'sim'; it has eager"):
        REGISTRY.target("reference:sim")


@pytest.mark.parametrize("name", [None, 3, ("cpu", "torch")])
def test_a_backend_is_named_by_text(name: Any) -> None:
    with pytest.raises(UnknownBackend, match="a backend is named by text"), use_backend(name):
        pass


def test_machines_are_names_of_backends_everywhere() -> None:
    assert str(REGISTRY.target("h200:sim")) == "cuda:sim" and REGISTRY.resolve("trn2") == "neuron"
    with use_backend("h200:sim") as target:
        assert str(target) == requested() == "cuda:sim"
    with use_backend("h200", mode="sim") as target:
        assert str(target) == "cuda:sim"
    assert [str(place.target) for place in find_targets(["h200"])] == ["cuda:hw", "cuda:sim"]
    with pytest.raises(UnknownBackend, match="exists already"):
        REGISTRY.register(Fake("reference"))


def test_a_simulator_never_stands_in_for_hardware(add: Callable[..., Fake]) -> None:
    """Without a mode the backend's first is meant; the error says which mode could run."""
    away = add("away", {"hw": "no such device", "sim": ""})
    with pytest.raises(BackendUnavailable, match="no such device; 'away:sim' can run here"):
        with use_backend("away"):
            pass
    with use_backend("away", "sim") as target:
        nsa.attention(*qkv())
    assert str(target) == "away:sim" and away.calls == 1


def test_a_backend_that_cannot_run_here_says_why(add: Callable[..., Fake]) -> None:
    add("away", {"hw": "no such device", "sim": "no such package"})
    for mode, reason in (("hw", "no such device"), ("sim", "no such package")):
        with pytest.raises(BackendUnavailable, match=f"away:{mode} cannot run here: {reason}$"):
            with use_backend("away", mode):
                pass


def test_an_object_that_is_no_backend_is_refused() -> None:
    own = Registry()
    own._sources["odd"] = "collections:OrderedDict"
    with pytest.raises(UnknownBackend, match="lacks a member"):
        own.get("odd")


LIES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "shape": (lambda r: (r[0][:, 1:].contiguous(), r[1]), "returned o of attention as"),
    "dtype": (lambda r: (r[0].double(), r[1]), "float64"),
    "statistics dtype": (lambda r: (r[0], r[1].half()), "returned lse"),
    "stride": (lambda r: (r[0].transpose(1, 2).contiguous().transpose(1, 2), r[1]), "strides"),
    "too few": (lambda r: r[:1], "1 results, not 2"),
    "too many": (lambda r: (*r, r[0]), "3 results, not 2"),
    "one tensor": (lambda r: r[0], "1 results, not 2"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_backend_is_caught(add: Callable[..., Fake], lie: str) -> None:
    twist, message = LIES[lie]
    add("liar", twist=twist)
    with use_backend("liar"), pytest.raises(ContractViolation, match=message) as caught:
        nsa.attention(*qkv())
    assert "liar:hw" in str(caught.value)


def test_choices_are_remembered_until_backends_change(add: Callable[..., Fake]) -> None:
    one = add("one")
    with use_backend("one"):
        for _ in range(3):
            nsa.attention(*qkv())
        assert one.asked == ["hw"]
        nsa.attention(*qkv(9))
        assert one.asked == ["hw", "hw"], "another size is another choice"
        REGISTRY.forget()
        nsa.attention(*qkv())
        assert len(one.asked) == 3


def output(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def python(code: str, **env: str) -> str:
    return output(fresh.run(code, **env))


CALL = """
import torch, nsa_neuron as nsa
from nsa_neuron.registry import requested, use_backend
q = torch.randn(1, 4, 2, 4)
"""


def test_nsa_backend_in_the_environment() -> None:
    code = CALL + "print(requested()); print(nsa.attention(q, q, q)[0].shape[1])"
    assert python(code, NSA_BACKEND="reference").split() == ["reference", "4"]
    assert python(code, NSA_BACKEND="").split() == ["None", "4"]


def test_nsa_backend_reaches_new_threads_and_use_backend_outranks_it() -> None:
    code = (
        CALL
        + """
import threading
seen = []
thread = threading.Thread(target=lambda: seen.append(requested()))
thread.start(); thread.join()
with use_backend("reference", "eager"):
    print(seen[0], requested())
"""
    )
    assert python(code, NSA_BACKEND="cuda:sim").split() == ["cuda:sim", "reference:eager"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tpu", "UnknownBackend NSA_BACKEND is 'tpu': no backend or target 'tpu'; there are"),
        ("cuda:fast", "UnknownBackend NSA_BACKEND is 'cuda:fast': backend 'cuda' has no mode"),
        ("neuron:hw", "BackendUnavailable NSA_BACKEND is 'neuron:hw': neuron:hw cannot run here"),
    ],
)
def test_nsa_backend_is_checked_when_the_ops_are_registered(name: str, said: str) -> None:
    code = """
try:
    import torch, nsa_neuron
except Exception as error:
    print(type(error).__name__, error)
"""
    assert python(code, NSA_BACKEND=name).startswith(said)


PLUGIN = """
from nsa_neuron.registry import Supported

class Backend:
    name = "acme"
    calls = 0
    def modes(self): return {"eager": ""}
    def supports(self, bound, mode): return Supported()
    def lower(self, bound, plan):
        def run(**values):
            Backend.calls += 1
            return bound.spec.reference(**values)
        return run

BACKEND = Backend()
"""


def test_entry_points_add_backends(tmp_path: Path) -> None:
    """A distribution with an entry point, as pip would lay it out; imported on first use only."""
    (tmp_path / "acme_nsa.py").write_text(PLUGIN)
    info = tmp_path / "acme_nsa-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-nsa\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nsa_neuron.backends]\nacme = acme_nsa:BACKEND\n")
    code = (
        CALL
        + """
import sys
from nsa_neuron.registry import REGISTRY
print("acme" in REGISTRY.names(), "acme_nsa" in sys.modules)
with use_backend("acme"):
    nsa.attention(q, q, q)
print(sys.modules["acme_nsa"].BACKEND.calls)
"""
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert output(done).split() == ["True", "False", "1"]


def test_pinned_ops_ask_one_target_only(add: Callable[..., Fake]) -> None:
    """What compiled graphs call: the policy around them does not matter any more."""
    from nsa_neuron.library import pinned

    one = add("pinned_fake")
    op = pinned("attention", Target("pinned_fake", "hw"))
    assert op is pinned("attention", Target("pinned_fake", "hw"))
    with use_backend("reference"):
        op(*qkv())
    assert one.calls == 1


def test_backward_keeps_the_forward_request_in_another_thread():
    """Autograd runs CUDA backward in threads of its own, which see no context variable."""
    calls = []

    class Counting:
        name = "counting"

        def modes(self):
            return {"hw": ""}

        def supports(self, bound, mode):
            return Supported()

        def lower(self, bound, plan):
            def run(**values):
                calls.append(bound.spec.name)
                return bound.spec.reference(**values)

            return run

    REGISTRY.register(Counting())
    try:
        q = torch.randn(1, 4, 1, 8, requires_grad=True)
        with use_backend("counting"):
            o, _ = torch.ops.nsa.attention(q, q, q)
        thread = threading.Thread(target=o.sum().backward)
        thread.start()
        thread.join()
    finally:
        REGISTRY.unregister("counting")
    assert calls == ["attention", "attention_backward"]
