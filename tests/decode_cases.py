"""Problems for the tests of `decode`: random ones, and the golden vectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

import nsa_neuron as nsa
from nsa_neuron.cases import Case

GOLDEN = Path(__file__).with_name("golden")


@st.composite
def a_case(draw: Any) -> Case:
    """Random lengths, pages and geometry."""
    tokens = tuple(draw(st.lists(st.integers(0, 80), min_size=1, max_size=3)))
    d = draw(st.integers(1, 4))
    l = d * draw(st.integers(1, 3))
    m = l + d * draw(st.integers(0, 4))
    initial, local = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    scalars = {
        "block": l, "stride": d, "select_block": m, "num_initial": initial, "num_local": local,
        "num_selected": initial + local + draw(st.integers(0, 4)),
        "window": draw(st.integers(1, 90)), "scale": draw(st.sampled_from([None, 0.4])),
    }  # fmt: skip
    kv_heads = draw(st.integers(1, 2))
    sizes = {"B": len(tokens), "S": draw(st.integers(1, 4)), "Hkv": kv_heads}
    sizes |= {"Hq": kv_heads * draw(st.integers(1, 3)), "Dk": 8, "Dv": draw(st.integers(1, 9))}
    pages = tuple(draw(st.integers(1, most)) for most in (9, 3, 20))
    return Case(str(tokens), ("edge",), sizes, scalars, options={"tokens": tokens, "pages": pages})


def check_golden() -> None:
    """The golden decode vectors through `nsa_neuron.decode`, one branch at a time."""
    z = np.load(GOLDEN / "decode_32_16_64_B8_H1_G4_d64_n16.npz")
    meta = json.loads(str(z["meta"]))
    x = {name: torch.from_numpy(z[name]) for name in ("q", "k", "v", "k_cmp", "v_cmp", "seqlens")}

    def in_pages(cache: Tensor, page: int) -> tuple[Tensor, Tensor]:
        """The sequences' rows as one pool, in order, and its table."""
        b, rows = cache.shape[:2]
        count = -(-rows // page)
        padded = F.pad(cache, (0, 0, 0, 0, 0, count * page - rows), value=float("nan"))
        table = torch.arange(b * count, dtype=torch.int32).view(b, count)
        return padded.reshape(b * count, page, *cache.shape[2:]), table

    pools = {}
    for name, page in (("k_cmp", 16), ("v_cmp", 16), ("k", 64), ("v", 64)):
        pools[name], pools[f"{name}_table"] = in_pages(x[name], page)
    for branch, key in enumerate(("o_cmp", "o_slc", "o_win")):
        gates = F.one_hot(torch.full(x["q"].shape[:3], branch), 3).float()
        o = nsa.decode(
            x["q"], pools["k_cmp"], pools["v_cmp"], *(pools["k"], pools["v"]) * 2, gates,
            x["seqlens"], pools["k_cmp_table"], pools["k_table"], pools["k_table"],
            block=meta["l"], stride=meta["d"], select_block=meta["l_sel"],
            num_selected=meta["n"], window=meta["w"], scale=meta["scale"],
        )  # fmt: skip
        error = (o - torch.from_numpy(z[key])).abs().max().item()
        assert error <= 1e-5 * max(1.0, meta["max_abs"][key]), key
