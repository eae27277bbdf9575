"""What `capture` and `look` tell, against a loop over keys: probabilities, importance, why."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import MIXED, bytes_of, model

from nsa_neuron.nn import NativeSparseAttention, capture
from nsa_neuron.show import look

NET = model(MIXED, torch.float32)
TEXT = bytes(bytes_of(120).tolist())


def loud(net):
    """With weights that make attention far from even, and gates far from each other."""
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith(("q.weight", "kv.weight", "gate.weight")):
                p.mul_(20)
    return net


@torch.no_grad()
def test_probabilities_and_importance_are_those_of_a_loop_over_keys():
    net, tokens, t = loud(model(("nsa",))), bytes_of(2, 90), 77
    layer = next(m for m in net.modules() if isinstance(m, NativeSparseAttention))
    given = {}
    with capture(net, [t]) as found:
        observe = layer.observer

        def both(own, values):
            given.update(values)
            observe(own, values)

        layer.observer = both
        net(tokens)
    q, c = found[0].queries[t], net.config
    for b in range(2):
        for h in range(4):
            kv, query = h // 2, given["q"][b, t, h]
            for keys, ids, told in (
                (given["k_cmp"], range((t + 1 - 8) // 4 + 1), q.compressed),
                (given["k_win"], range(t - 11, t + 1), q.window),
            ):
                logits = [float(query @ keys[b, i, kv]) / math.sqrt(c.dk) for i in ids]
                top = max(logits)
                odds = [math.exp(x - top) for x in logits]
                wanted = torch.tensor([x / sum(odds) for x in odds])
                torch.testing.assert_close(told[b, h], wanted, rtol=1e-4, atol=1e-6)
        for kv in range(2):
            for j in range(t // 16 + 1):
                shared = [
                    (i, len(set(range(4 * i, 4 * i + 8)) & set(range(16 * j, 16 * j + 16))) / 4)
                    for i in range((t + 1 - 8) // 4 + 1)
                ]
                wanted = sum(w * float(q.compressed[b, 2 * kv + g, i])
                             for i, w in shared for g in range(2))  # fmt: skip
                assert float(q.importance[b, kv, j]) == pytest.approx(wanted, abs=1e-5)
    torch.testing.assert_close(q.gates, given["gates"][:, t])


@torch.no_grad()
def test_a_view_is_its_heads_part_of_what_was_captured():
    """Means over the heads of its group, lengths after the gates, and which layer it is."""
    net = loud(model(MIXED))
    tokens = torch.tensor([list(TEXT)])
    with capture(net, [50, 119]) as layers:
        net(tokens)
    views = look(net, TEXT, [50, -1]).views
    assert [(v.query, v.layer, v.kv_head) for v in views] == [
        (t, layer, head) for t in (50, 119) for layer in (0, 1) for head in (0, 1)
    ]
    for v in views:
        q, heads = layers[v.layer].queries[v.query], range(2 * v.kv_head, 2 * v.kv_head + 2)
        assert v.name == layers[v.layer].name
        for told, captured in ((v.compressed, q.compressed), (v.window, q.window)):
            wanted = sum(captured[0, h] for h in heads) / 2
            torch.testing.assert_close(torch.tensor(told), wanted, rtol=1e-5, atol=1e-7)
        assert v.importance == pytest.approx(q.importance[0, v.kv_head].tolist())
        gates = q.gates[0, heads.start : heads.stop].float()
        torch.testing.assert_close(torch.tensor(v.gates), gates)
        for i, branch in enumerate(("cmp", "slc", "win")):
            lengths = [
                float(q.gates[0, h, i]) * math.dist(q.outputs[branch][0, h].tolist(), [0.0] * 6)
                for h in heads
            ]
            assert v.outputs[i] == pytest.approx(sum(lengths) / 2, rel=1e-4)
        for p in v.picked:
            assert (p.first, p.last) == (16 * p.block, min(16 * p.block + 15, v.query))
            assert p.importance == v.importance[p.block]


@pytest.mark.parametrize(
    ("change", "query", "wanted"),
    [
        # 4 blocks of 16 bytes are selected: block 5 is the query's own, all others are seen.
        ({"num_selected": 6}, 95, ["first", *["importance"] * 3, "before", "own"]),
        ({"num_selected": 6, "num_local": 3}, 95,
         ["first", *["importance"] * 2, "before", "before", "own"]),
        ({"num_selected": 6, "num_local": 1}, 95, ["first", *["importance"] * 4, "own"]),
        ({"num_selected": 6, "num_initial": 2}, 95,
         ["first", "first", "importance", "importance", "before", "own"]),
        ({"num_selected": 6, "num_initial": 0}, 95, [*["importance"] * 4, "before", "own"]),
        ({}, 20, ["before", "own"]),
        ({}, 3, ["own"]),
    ],
    ids=str,
)  # fmt: skip
def test_every_reason_for_a_pick(change, query, wanted):
    view = look(model(("nsa",), torch.float32, **change), TEXT, [query]).views[0]
    assert [p.why for p in view.picked] == wanted


def test_a_look_knows_the_text_and_its_sizes():
    found = look(NET, TEXT, [-120, 5, 119, -1])
    assert found.queries == (0, 5, 119) and found.text == TEXT
    assert (found.select_block, found.block, found.stride) == (16, 8, 4)
    assert [view.query for view in found.views] == [at for at in (0, 5, 119) for _ in range(4)]
