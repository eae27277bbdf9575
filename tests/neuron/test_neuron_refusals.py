"""Every limit of the `neuron` backend at its edge: the last size taken, the first one refused."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

import nsa_neuron as nsa
from nsa_neuron import simulator
from nsa_neuron.backends import neuron
from nsa_neuron.backends.neuron import hardware, limits, whole
from nsa_neuron.errors import NsaError
from nsa_neuron.ops import get
from nsa_neuron.registry import Unsupported, use_backend

if TYPE_CHECKING:
    from nsa_neuron.spec import Bound

pytestmark = pytest.mark.sim

SIZES = {"B": 1, "S": 1, "Hq": 1, "Hkv": 1, "Dk": 8, "Dv": 8, "D": 8, "3": 3}
GEOMETRY = {"l": 1, "d": 1}
# Pools of few pages in tables that could name very many tokens.
PAGES = {f"{what}_{pool}": n for pool in ("cmp", "slc", "win")
         for what, n in (("pages", 2), ("page", 64), ("most", 2))}  # fmt: skip


def a_call(
    op: str, given: tuple[str, ...] = (), dtype: torch.dtype = torch.bfloat16, **sizes: Any
) -> Bound:
    """A call of tensors without data, by the symbols of its sizes; `given`: optional arguments."""
    spec, known = get(op), SIZES | {"T": sizes.get("S", 1), "n_init": 1, "n_local": 2} | sizes
    dtypes = {"float": dtype, "i32": torch.int32, "stat": torch.float32}
    values = dict(spec.defaults)
    for arg in spec.tensors:
        if arg.name in given or arg.name not in spec.defaults:
            # Weights that heads share.
            shape = [known[symbol] for symbol in arg.forms[0]]
            values[arg.name] = torch.empty(shape, dtype=dtypes[arg.dtype], device="meta")
    for arg in spec.scalars:
        if arg.symbol in known:
            values[arg.name] = known[arg.symbol]
        elif arg.name in known:
            values[arg.name] = known[arg.name]
    return spec.bind(values)


def rule(bound: Bound, mode: str = "sim") -> str:
    """The rule that refuses a call, empty if it is taken."""
    found = limits.refusal(bound, mode)
    return found.rule if found else ""


def far(**more: Any) -> dict[str, Any]:
    """A call of `decode` whose tables name 16,384 blocks of 64 tokens."""
    wide = {"most_slc": 16_384, "most_win": 16_384, "m": 64, "l": 32, "d": 16, "w": 64, "n": 16}
    return PAGES | wide | more


@pytest.mark.parametrize(
    ("op", "taken", "refused", "why"),
    [
        ("attention", {"T": 2**24 - 1}, {"T": 2**24}, "length"),
        ("compressed_attention", {"T": 2**24 - 1, "Nc": 2**24 - 1, **GEOMETRY},
         {"T": 2**24, "Nc": 2**24, **GEOMETRY}, "length"),
        ("select_blocks", {"Hq": 512, "T": 64, "Nc": 64, "m": 64, "n": 4, **GEOMETRY},
         {"Hq": 513, "T": 64, "Nc": 64, "m": 64, "n": 4, **GEOMETRY}, "group"),
        ("select_blocks", {"T": 2**24 - 65, "Nc": 2**24 - 65, "m": 64, "n": 4, **GEOMETRY},
         {"T": 2**24 - 64, "Nc": 2**24 - 64, "m": 64, "n": 4, **GEOMETRY}, "length"),
        ("selected_attention", {"Hq": 1024, "n": 4, "m": 64},
         {"Hq": 1025, "n": 4, "m": 64}, "group"),
        # 128 queries of one head, blocks of one page and of two.
        ("selected_attention", {"n": 312, "m": 64}, {"n": 313, "m": 64}, "ids"),
        ("selected_attention", {"n": 156, "m": 256}, {"n": 157, "m": 256}, "ids"),
        ("selected_attention", {"B": 2, "Hq": 4, "Hkv": 2, "T": 2**22 - 65, "n": 4, "m": 64},
         {"B": 2, "Hq": 4, "Hkv": 2, "T": 2**22 - 64, "n": 4, "m": 64}, "length"),
        ("decode", far(Hq=128), far(Hq=129), "group"),
        ("decode", far(), far(most_slc=16_385), "blocks"),
        ("decode", far(n=128), far(n=129), "selected"),
        ("decode", far(n=64, S=3, Hq=64), far(n=65, S=3, Hq=64), "selected"),
        ("decode", far(w=8191), far(w=8192), "window"),
        ("decode", far(w=8190, S=2), far(w=8191, S=2), "window"),
        # 2**24 tokens of one head.
        ("decode", far(pages_slc=2**18 - 1), far(pages_slc=2**18), "pool"),
    ],
)  # fmt: skip
def test_sizes(op, taken, refused, why):
    assert (rule(a_call(op, **taken)), rule(a_call(op, **refused))) == ("", why)


def test_packed_sequences_count_a_block_more_each():
    packed = ("cu_seqlens_q", "cu_seqlens_k")
    sizes = {"Hq": 2, "Hkv": 2, "n": 4, "m": 64, "N1": 4}
    found = [
        rule(a_call("selected_attention", packed, T=2**23 - 192 - more, **sizes)) for more in (1, 0)
    ]
    assert found == ["", "length"]


@pytest.mark.parametrize(("symbol", "why"), [("l", "block"), ("F", "hidden")])
def test_compression_of_more_than_sbuf_holds(symbol, why):
    found = []
    for size in (8192, 8193):
        sizes = {"l": 1, "F": 1} | {symbol: size}
        sizes |= {"T": sizes["l"], "d": sizes["l"], "lD": 8 * sizes["l"], "method": "mlp"}
        found.append(rule(a_call("compress", ("w1", "b1", "w2", "b2"), **sizes)))
    assert found == ["", why]


@pytest.mark.parametrize(
    ("op", "symbol"), [("attention", "Dk"), ("attention", "Dv"), ("compress", "D")]
)
def test_head_dims(op, symbol, monkeypatch):
    monkeypatch.setitem(neuron.DEVICES_OF_MODE, "sim", ("meta",))
    sizes = {"T": 4, "l": 2, "d": 2, "method": "mean"}
    for size, refused in ((256, False), (257, True)):
        verdict = neuron.BACKEND.supports(a_call(op, **sizes, **{symbol: size}), "sim")
        assert (isinstance(verdict, Unsupported) and verdict.rule == "head_dim") is refused


def a_whole(**sizes: Any) -> Bound:
    known = {"l": 32, "d": 16, "m": 64, "n": 16, "w": 512} | sizes
    return a_call("nsa_attention", Nc=(known["T"] - known["l"]) // known["d"] + 1, **known)


@pytest.mark.parametrize(
    ("taken", "refused", "why"),
    [
        ({"Hq": 16}, {"Hq": 32}, "group"),
        ({"Dk": 192}, {"Dk": 193}, "head_dim"),
        ({"Dv": 128}, {"Dv": 129}, "head_dim"),
        ({"n": 32}, {"n": 33}, "selected"),
        ({"w": 4096}, {"w": 4097}, "window"),
        ({"n_init": 1, "n_local": 1}, {"n_init": 0, "n_local": 1}, "forced"),
        # In hardware loops beside a window of 512, beside a longer one; unrolled, as nothing but
        # forced blocks is chosen.
        ({"S": 2**18, "T": 2**20}, {"S": 2**18, "T": 2**20 + 1}, "length"),
        ({"S": 2**18, "T": 2**19, "w": 513}, {"S": 2**18, "T": 2**19 + 1, "w": 513}, "length"),
        ({"T": 2**18, "n": 3}, {"T": 2**18 + 1, "n": 3}, "length"),
    ],
)
def test_what_one_kernel_takes(taken, refused, why):
    found = [
        whole.hindrance(a_whole(**{"T": 4096, **sizes}), "sim", 1) for sizes in (taken, refused)
    ]
    assert found[0] is None and found[1] is not None and found[1].rule == why


def test_one_kernel_is_as_long_as_the_kv_heads_of_all_batch_rows_that_a_core_has(monkeypatch):
    asked = []
    monkeypatch.setattr(whole, "instructions", lambda bound, lanes: asked.append(lanes) or 0)
    for batch, kv_heads, cores in ((1, 1, 1), (3, 2, 1), (3, 2, 2), (3, 1, 2)):
        bound = a_whole(B=batch, Hq=kv_heads, Hkv=kv_heads, S=64, T=64)
        assert whole.hindrance(bound, "hw", cores) is None
    assert asked == [1, 6, 3, 2]


def test_programs_grow_with_the_heads_that_they_serve():
    """Unrolled and looped: kv heads, batch rows, and 128 query heads of a kv head at a time."""
    for tokens in (4096, 2**20):
        one = limits.range_instructions(a_call("attention", S=tokens, Hq=64))
        sizes = {"B": 2, "Hkv": 3, "Hq": 192, "S": tokens}
        assert limits.range_instructions(a_call("attention", **sizes)) == 6 * one
    long = {"S": 2**20, "T": 2**20}
    group = [limits.range_instructions(a_call("attention", Hq=g, **long)) for g in (128, 129)]
    assert group[1] == 2 * group[0]


@pytest.mark.parametrize(
    ("text", "cores"), [("1", 1), ("2", 2), ("", 2), ("0", 0), ("4", 0), ("two", 0), ("2 ", 0)]
)
def test_cores_of_a_launch(text, cores, monkeypatch):
    monkeypatch.setenv(neuron.LNC, text)
    if cores:
        assert neuron.logical_cores("hw") == cores
        return
    with pytest.raises(NsaError, match="must be 1 or 2"):
        neuron.logical_cores("hw")


def test_a_vendors_package_that_cannot_be_imported_is_quoted(tmp_path, monkeypatch):
    package = tmp_path / hardware.VENDOR_PACKAGE
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('libnrt.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, hardware.VENDOR_PACKAGE, raising=False)
    assert "libnrt.so is missing" in hardware.hindrance()


@pytest.mark.parametrize("op", ["sliding_window_attention", "sliding_window_attention_backward"])
def test_programs_of_windows_are_counted_by_their_keys(op):
    """A window of all keys is attention; one of 512 of 8192 meets 5 tiles of keys, not 33."""
    sizes = {"S": 8192, "Hq": 16, "T": 8192}
    causal = limits.range_instructions(a_call(op.replace("sliding_window_", ""), **sizes))
    counts = [limits.range_instructions(a_call(op, w=w, **sizes)) for w in (512, 4096, 8192)]
    assert counts[2] == causal and counts[0] < counts[1] < causal
    assert 2 < causal / counts[0] < 7


def test_what_the_simulator_would_only_warn_of_is_refused(monkeypatch):
    """Such a program may not run on a device: here one that is longer than compilers take."""
    branches = [torch.ones(1, 1, 1, 4)] * 3
    monkeypatch.setattr("nsa_neuron.simulator.run.cores.PROGRAM", 1)
    with use_backend("neuron:sim"), pytest.raises(simulator.SimulationError, match="doubtful"):
        nsa.gated_sum(*branches, torch.ones(1, 1, 1, 3))
