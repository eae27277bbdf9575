"""The golden vectors on `neuron:sim`, by the same tests that the reference has to pass.

Those of windows and of decode are in these ops' own files.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import nsa_neuron as nsa
from nsa_neuron.registry import use_backend

pytestmark = pytest.mark.sim

_PATH = Path(__file__).parents[1] / "reference" / "test_golden.py"
_SPEC = importlib.util.spec_from_file_location("reference_golden", _PATH)
assert _SPEC is not None and _SPEC.loader is not None
golden = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(golden)


LONG = ("attn_32_16_64_S1024", "attn_32_16_64_S2048")
"""Selected attention and its gradients take this long: there, only what comes before it."""

WHOLE = [
    (kind, name)
    for kind in ("compress", "attn", "select", "full")
    for name in golden.files(kind)
    if not name.startswith(LONG)
]


@pytest.mark.parametrize(("kind", "name"), WHOLE)
def test_golden(kind, name):
    with use_backend("neuron", "sim"):
        getattr(golden, f"test_{kind}")(name, torch.float32)


@pytest.mark.parametrize("name", [n for n in golden.files("attn") if n.startswith(LONG)])
def test_compressed_attention_and_selection(name):
    g = golden.Golden(name, torch.float32)
    total = g.arrays["k"].shape[1]
    where = {"kv_len": total, **g.geometry, **g.packed}
    q, k_cmp, v_cmp = g.leaf("q", "k_cmp", "v_cmp")
    with use_backend("neuron", "sim"):
        o, lse = nsa.compressed_attention(q, k_cmp, v_cmp, **where)
        o.backward(g["do"])
        golden.check_selection(g, lse.detach(), total)
    g.close("o_cmp", o)
    g.close("lse_cmp", lse)
    for key, leaf in (("dq_cmp", q), ("dk_cmp", k_cmp), ("dv_cmp", v_cmp)):
        g.close(key, leaf.grad)
