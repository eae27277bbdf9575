"""Hugging Face: every option off its default, and each refusal, one by one."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from test_transformers import BODY, GEOMETRY, NET, ids_of, llama, model, sized

transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

from nsa_neuron import model_bench  # noqa: E402
from nsa_neuron.errors import InvalidArgument  # noqa: E402
from nsa_neuron.integrations.transformers import NsaForCausalLM, NsaLmConfig, convert  # noqa: E402
from nsa_neuron.integrations.transformers import attention as hf_attention  # noqa: E402
from nsa_neuron.integrations.transformers import cache as hf_cache  # noqa: E402

convert_module = importlib.import_module("nsa_neuron.integrations.transformers.convert")

from nsa_neuron.integrations.transformers.attention import (  # noqa: E402
    attention_mask,
    edges_of,
    selected_attention,
)
from nsa_neuron.nn import NsaConfig  # noqa: E402

OPTIONS = {
    "hidden_size": 40, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12,
    "value_head_dim": 10, "compress_block": 6, "compress_stride": 3, "select_block": 9,
    "num_selected": 7, "num_initial": 2, "num_local": 3, "attention_window": 11, "phi": "linear",
    "phi_per_head": True, "shared_kv": True, "qkv_bias": True, "qk_norm": 0.5,
    "rope_theta": 123.0, "rope_placement": "before", "max_position_embeddings": 77,
}  # fmt: skip


def test_every_option_reaches_the_attention_layers():
    want = NsaConfig(
        dim=40, heads=6, kv_heads=3, dk=12, dv=10, block=6, stride=3, select_block=9,
        num_selected=7, num_initial=2, num_local=3, window=11, phi="linear", phi_per_head=True,
        shared_kv=True, qkv_bias=True, qk_norm=0.5, rope_base=123.0, rope="before",
        max_positions=77,
    )  # fmt: skip
    made = NsaLmConfig(**OPTIONS, num_hidden_layers=2)
    assert made.attention_config() == want
    names = {f.name for f in dataclasses.fields(NsaConfig)}
    defaults = NsaConfig(dim=40, heads=6, kv_heads=3, dk=12, dv=12)
    same = {n for n in names if getattr(want, n) == getattr(defaults, n)}
    assert same == {"dim", "heads", "kv_heads", "dk"}, "an option at its default tells nothing"


def test_defaults_of_a_configuration():
    made = NsaLmConfig()
    assert made.head_dim == made.value_head_dim == 1024 // 16
    assert NsaLmConfig(head_dim=12).value_head_dim == 12
    assert made.attention_kinds == ["nsa"] * 12 == made.layer_types
    want = NsaConfig(dim=1024, heads=16, kv_heads=1, dk=64, dv=64, max_positions=65536)
    assert made.attention_config() == want


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_a_converted_model_takes_over_every_option_of_the_old_one(tied):
    options = {
        "rms_norm_eps": 1e-2, "hidden_act": "gelu", "initializer_range": 0.3,
        "tie_word_embeddings": tied, "max_position_embeddings": 300,
    }  # fmt: skip
    old, ids = llama(**options, rope_parameters={"rope_type": "default", "rope_theta": 50.0}), ids_of(2, 60)  # fmt: skip # noqa: E501
    new = convert(old, **GEOMETRY, attention_kinds=["full"] * 3)
    torch.testing.assert_close(new(ids).logits, old(ids).logits, rtol=1e-4, atol=1e-5)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "vocab_size", *options):
        assert getattr(new.config, name) == getattr(old.config, name), name
    assert new.config.rope_theta == 50.0 and not new.training
    assert (new.lm_head.weight is new.model.embed_tokens.weight) == tied


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_converted_model_has_the_dtype_of_the_old_one(dtype):
    new = convert(llama().to(dtype), **GEOMETRY)
    assert {p.dtype for p in new.parameters()} == {dtype}


@torch.no_grad()
def test_gates_of_a_converted_model_are_open_for_the_selected_branch_only():
    """sigmoid(4) and sigmoid(-4), whatever the token; phi is a block's mean."""
    layer = convert(llama(), **GEOMETRY, attention_window=12).model.layers[1].self_attn
    gates = layer.gate(torch.randn(1, 5, 32)).sigmoid().view(1, 5, 4, 3)
    open_ = 1 / (1 + math.exp(-4))
    want = torch.tensor([1 - open_, open_, 1 - open_]).expand(1, 5, 4, 3)
    torch.testing.assert_close(gates, want)
    x = torch.randn(1, 8, 2, 8) + 2
    torch.testing.assert_close(layer.phi_k(x)[:, 0], x.mean(1), rtol=0.1, atol=0.1)


class Layer(nn.Module):
    """What an attention function is given of a model."""

    def __init__(self, **config):
        super().__init__()
        self.config = type("Config", (), config)()


SIZES = {
    "nsa_compress_block": 8, "nsa_compress_stride": 4, "nsa_select_block": 16,
    "nsa_num_selected": 5,
}  # fmt: skip


def tensors(tokens=112, heads=4, kv_heads=2):
    gen = torch.Generator().manual_seed(0)
    make = lambda h: torch.randn(1, h, tokens, 8, generator=gen, dtype=torch.float64)  # noqa: E731
    return make(heads), make(kv_heads), make(kv_heads)


LATE = range(100, 112)
"""Queries that have more blocks than they may choose."""


def by_hand(q, k, v, scale):
    """Means of blocks are scored, the best blocks chosen for a group, their tokens attended to."""
    out = torch.zeros(len(LATE), q.shape[1], v.shape[3], dtype=q.dtype)
    group = q.shape[1] // k.shape[1]
    means = k[0].unfold(1, 8, 4).mean(-1)  # [Hkv, Nc, D]
    for t in LATE:
        for h in range(k.shape[1]):
            heads = range(h * group, (h + 1) * group)
            seen = (t + 1 - 8) // 4 + 1
            odds = sum(((means[h, :seen] @ q[0, g, t]) * scale).softmax(0) for g in heads)
            own, scores = t // 16, [0.0] * (t // 16 + 1)
            for i, j in itertools.product(range(seen), range(own + 1)):
                shared = min(4 * i + 8, 16 * j + 16) - max(4 * i, 16 * j)
                scores[j] += max(0, shared) / 4 * float(odds[i])
            forced = {0, own - 1, own}
            rest = sorted(set(range(own + 1)) - forced, key=lambda j: -scores[j])
            ids = [p for p in range(t + 1) if p // 16 in forced | set(rest[:2])]
            for g in heads:
                out[t - LATE[0], g] = ((k[0, h, ids] @ q[0, g, t]) * scale).softmax(0) @ v[
                    0, h, ids
                ]
    return out


@pytest.mark.parametrize("scale", [0.05, 0.9])
def test_the_attention_function_is_what_its_page_says_at_every_scale(scale):
    q, k, v = tensors()
    got, weights = selected_attention(Layer(**SIZES), q, k, v, None, scaling=scale)
    assert weights is None and got.shape == (1, 112, 4, 8)
    late = got[0, LATE.start : LATE.stop]
    torch.testing.assert_close(late, by_hand(q, k, v, scale), rtol=1e-6, atol=1e-7)


def test_the_scale_is_one_over_the_root_of_the_dim_by_default():
    q, k, v = tensors()
    got, _ = selected_attention(Layer(**SIZES), q, k, v, None)
    want, _ = selected_attention(Layer(**SIZES), q, k, v, None, scaling=8**-0.5)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_sizes_are_the_config_s_or_the_defaults(monkeypatch):
    given = {}
    for name in ("compress", "compressed_attention", "select_blocks", "selected_attention"):
        op = getattr(hf_attention.nsa, name)

        def spied(*args, op=op, name=name, **named):
            given[name] = {n: x for n, x in named.items() if isinstance(x, int | float)}
            return op(*args, **named)

        monkeypatch.setattr(hf_attention.nsa, name, spied)
    for config, (block, stride, size, count) in (({}, (32, 16, 64, 16)), (SIZES, (8, 4, 16, 5))):
        selected_attention(Layer(**config), *tensors(), None)
        cut = {"block": block, "stride": stride}
        assert given["compress"] == cut
        assert given["compressed_attention"] == {**cut, "kv_len": 112}
        sizes = {"select_block": size, "num_selected": count}
        assert given["select_blocks"] == {**cut, **sizes, "kv_len": 112}
        assert given["selected_attention"] == {"select_block": size}


@pytest.mark.parametrize("name", ["sliding_window", "softcap", "s_aux", "position_bias", "alibi"])
def test_what_nsa_has_no_meaning_for_is_refused(name):
    with pytest.raises(InvalidArgument) as caught:
        selected_attention(Layer(**SIZES), *tensors(20), None, **{name: 3.0})
    assert caught.value.argument == name
    selected_attention(Layer(**SIZES), *tensors(20), None, **{name: None})


def test_dropout_and_what_is_not_causal_are_refused():
    for given, name in (({"dropout": 0.1}, "dropout"), ({"is_causal": False}, "is_causal")):
        with pytest.raises(InvalidArgument) as caught:
            selected_attention(Layer(**SIZES), *tensors(20), None, **given)
        assert caught.value.argument == name
    encoder = Layer(**SIZES)
    encoder.is_causal = False
    with pytest.raises(InvalidArgument, match="is_causal"):
        selected_attention(encoder, *tensors(20), None)
    selected_attention(encoder, *tensors(20), None, is_causal=True)


def test_masks():
    """A cache's rows are the tokens so far; padding is told where there is some."""
    assert attention_mask(2, 3, 7, q_offset=4) is None
    ones = torch.ones(2, 9)
    assert attention_mask(2, 3, 9, q_offset=6, attention_mask=ones) is None
    padded = ones.clone()
    padded[1, 2] = 0
    found = attention_mask(2, 3, 9, q_offset=6, attention_mask=padded)
    assert found.dtype == torch.bool and torch.equal(found, padded.bool())
    last = attention_mask(2, 3, 7, q_offset=4, attention_mask=padded)
    assert torch.equal(last, padded[:, 2:].bool())
    for wrong in ({"q_offset": 3}, {"q_offset": 5}, {"q_offset": 4, "kv_offset": 1}):
        with pytest.raises(InvalidArgument, match="DynamicCache"):
            attention_mask(2, 3, 7, **wrong)
    rows = torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    heads = [rows]  # a mask's first head is asked: there may be no other
    same = lambda b, h, q, k: (heads[h][b, q] == rows[b, k]) & (q >= k)  # noqa: E731
    found = attention_mask(2, 6, 6, mask_function=same, allow_is_causal_skip=False)
    assert found.dtype == torch.int32 and torch.equal(found, rows.int())
    assert attention_mask(2, 6, 6, mask_function=same) is None
    one = lambda b, h, q, k: (q >= k) & (b >= 0)  # noqa: E731
    assert attention_mask(2, 6, 6, mask_function=one, allow_is_causal_skip=False) is None


def test_edges_of_rows():
    found = edges_of(torch.tensor([[0, 0, 1], [1, 1, 1], [4, 5, 5]]))
    assert found.tolist() == [0, 2, 3, 6, 7, 9] and found.dtype == torch.int32


def test_capacities():
    """256 tokens of room, or an eighth where that is more; a static cache has its own."""
    layer = hf_cache.NsaCacheLayer()
    assert [layer._capacity(n) for n in (1, 2048, 2056, 8000)] == [257, 2304, 2313, 9000]
    assert (layer.get_max_length(), layer.get_mask_sizes(3)) == (-1, (3, 0))
    static = hf_cache.NsaStaticCacheLayer(99)
    assert static._capacity(5) == 99 == static.get_max_length() and static.grows is False


@torch.no_grad()
def test_a_cache_grows_seldom_and_knows_its_columns():
    cache, sizes = NET(ids_of(1, 5)).cache, []
    for i in range(12):
        NET(ids_of(1, 1, seed=i), cache=cache)
        sizes.append(cache.layers[0].store.capacity)
    assert sizes == [5 + 256] * 12 and cache.get_seq_length() == 17
    assert cache.layers[0].get_mask_sizes(4) == (21, 0)
    cache.crop(-30)
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(NET(ids_of(1, 9), cache=cache).logits, NET(ids_of(1, 9)).logits)
    with pytest.raises(InvalidArgument, match="those of an NSA layer"):
        cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 0)
    for name in ("offload", "prefetch"):
        with pytest.raises(InvalidArgument, match="offload"):
            getattr(cache.layers[0], name)()


@torch.no_grad()
def test_a_boolean_or_a_list_chooses_rows():
    ids = ids_of(3, 20)
    whole = NET(ids, use_cache=False).logits
    for chosen in (torch.tensor([True, False, True]), torch.tensor([0, 2])):
        cache = NET(ids[:, :15]).cache
        cache.batch_select_indices(chosen)
        got = NET(ids[[0, 2], 15:], cache=cache).logits
        torch.testing.assert_close(got, whole[[0, 2], 15:])
    cache = NET(ids[:, :15]).cache
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    torch.testing.assert_close(NET(ids[[2, 0, 0], 15:], cache=cache).logits, whole[[2, 0, 0], 15:])


@torch.no_grad()
def test_autocast_generates_with_a_cache_of_its_dtype():
    ids = ids_of(1, 30)
    want = NET(ids, use_cache=False).logits[:, 20:]
    with torch.autocast("cpu", torch.bfloat16):
        cache = NET(ids[:, :20]).cache
        got = NET(ids[:, 20:], cache=cache).logits
    assert cache.layers[0].store.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.1, atol=0.03)


@torch.no_grad()
def test_logits_that_are_asked_for_and_states_of_every_layer():
    ids = ids_of(2, 20)
    whole = NET(ids, use_cache=False, output_hidden_states=True)
    assert len(whole.hidden_states) == 3 + 1 and whole.loss is None
    assert torch.equal(whole.hidden_states[0], NET.model.embed_tokens(ids))
    for kept, rows in ((3, slice(17, 20)), (1, slice(19, 20)), (torch.tensor([0, 7]), [0, 7])):
        part = NET(ids, use_cache=False, logits_to_keep=kept).logits
        torch.testing.assert_close(part, whole.logits[:, rows])
    embedded = NET(inputs_embeds=NET.model.embed_tokens(ids), use_cache=False).logits
    torch.testing.assert_close(embedded, whole.logits)
    assert NET(ids).cache is not None and NET(ids, use_cache=False).cache is None
    with pytest.raises(InvalidArgument, match="given with inputs_embeds"):
        NET(ids, inputs_embeds=NET.model.embed_tokens(ids))
    odds = whole.logits.double().log_softmax(-1)
    sums = [odds[b, t, ids[b, t + 1]] for b in range(2) for t in range(19)]
    loss = NET(ids, labels=ids, use_cache=False).loss
    assert float(loss) == pytest.approx(-float(sum(sums)) / len(sums), rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "std"),
    [
        ({"hidden_size": 32, "tie_word_embeddings": False}, 0.02),
        ({"hidden_size": 400, "tie_word_embeddings": False}, 0.01),
        ({"hidden_size": 400, "tie_word_embeddings": False, "initializer_range": 0.002}, 0.002),
        ({"hidden_size": 32, "tie_word_embeddings": True}, 0.02),
        ({"hidden_size": 400, "tie_word_embeddings": True}, 1 / 400),
    ],
    ids=str,
)
def test_heads_start_softer_in_wide_models(changes, std):
    """At most initializer_range: 0.2 / sqrt(hidden), and 1 / hidden where the head is the
    embedding; everything else has initializer_range."""
    net = model(attention_kinds=["full"], num_hidden_layers=1, pad_token_id=None, **changes)
    assert float(net.lm_head.weight.detach().std()) == pytest.approx(std, rel=0.15)
    usual = changes.get("initializer_range", 0.02)
    assert float(net.model.layers[0].mlp.up_proj.weight.detach().std()) == pytest.approx(
        usual, rel=0.1
    )
    if not changes["tie_word_embeddings"]:
        embedding = net.model.embed_tokens.weight.detach()
        assert float(embedding.std()) == pytest.approx(usual, rel=0.1)


def test_a_decoder_layer_is_two_branches_beside_the_stream():
    """Norms by hand; the perceptron is down(silu(gate) * up)."""
    net = model(attention_kinds=["full"], num_hidden_layers=1, rms_norm_eps=0.5).double()
    layer, x = net.model.layers[0], torch.randn(1, 9, 32, dtype=torch.float64)

    def normed(x, norm):
        return (x / (x.square().mean(-1, True) + 0.5).sqrt()) * norm.weight

    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) / 3)
        y = x + layer.self_attn(normed(x, layer.input_layernorm))
        z, mlp = normed(y, layer.post_attention_layernorm), layer.mlp
        gate = z @ mlp.gate_proj.weight.T
        bent = gate * torch.sigmoid(gate) * (z @ mlp.up_proj.weight.T)
        want = y + bent @ mlp.down_proj.weight.T
        torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def test_a_cache_that_is_offloaded_is_refused():
    cache = transformers.DynamicCache(config=NET.config)
    cache.offloading = True
    with pytest.raises(InvalidArgument, match="with offloading"):
        NET(ids_of(1, 5), cache=cache)


def test_what_was_loaded_is_not_started_again(tmp_path):
    """Weights of a checkpoint stay as they are, phi's and the head's too."""
    net = model(tie_word_embeddings=True)
    with torch.no_grad():
        for p in net.parameters():
            p.fill_(0.7)
    net.save_pretrained(tmp_path)
    again = NsaForCausalLM.from_pretrained(tmp_path)
    assert all(bool((p == 0.7).all()) for p in again.parameters())
    assert BODY["vocab_size"] == again.vocab_size and sized(again).config.nsa_num_selected == 4


def test_a_config_that_says_nothing_of_its_encoding_has_the_usual_one():
    """Nor of its layers' types, nor of a head's size."""
    values = {name: getattr(llama().config, name) for name in convert_module._SAME}
    for missing in ({}, {"rope_parameters": None, "layer_types": None, "head_dim": None}):
        made = convert_module._config(SimpleNamespace(**values, **missing), {"num_selected": 5})
        assert (made.rope_theta, made.head_dim, made.phi) == (10_000.0, 32 // 4, "linear")
        assert made.num_selected == 5 and made.rms_norm_eps == values["rms_norm_eps"]
    with pytest.raises(InvalidArgument, match="with rope_type 'yarn'; it must be with 'default'"):
        convert_module._config(SimpleNamespace(**values, rope_parameters={"rope_type": "yarn"}), {})


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers"),
        ({"num_hidden_layers": 2}, "num_hidden_layers"),
        # Matrices of the same shapes, of other heads.
        (
            {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16},
            "num_attention_heads",
        ),
        ({"num_key_value_heads": 1}, "num_key_value_heads"), ({"head_dim": 16}, "head_dim"),
        ({"vocab_size": 7}, "vocab_size"), ({"hidden_size": 64}, "hidden_size"),
        ({"intermediate_size": 8}, "intermediate_size"), ({"value_head_dim": 6}, "value_head_dim"),
    ],
    ids=str,
)  # fmt: skip
def test_a_model_is_not_converted_to_another_size(options, argument):
    with pytest.raises(InvalidArgument, match="the model's") as caught:
        convert(llama(), **GEOMETRY, **options)
    assert caught.value.argument == argument


def test_decoding_goes_on_behind_caches_of_equal_tokens(monkeypatch):
    got = {}
    monkeypatch.setattr(
        model_bench,
        "in_turns",
        lambda bench, steps, rounds, facts, held: got.update(
            steps=steps, held=held, about=(bench, rounds, facts)
        ),
    )
    filled, caches = [], []
    fill, size = model_bench._fill, model_bench._bytes_of
    monkeypatch.setattr(model_bench, "_fill", lambda *a: filled.append(a[1:]) or fill(*a))
    monkeypatch.setattr(model_bench, "_bytes_of", lambda c: caches.append(c) or size(c))
    model_bench.decoding(100)
    assert got["about"] == ("model", 16, {"tokens": 100, "layers": 2})
    assert filled == [(model_bench.CONFIG, 100)] * 2
    row = 4 * (64 + 64)  # bytes of a token's key and value
    assert got["held"]["decode full"] == 2 * 100 * row
    # Three branches' rows and 5 blocks, in whole pages, with room for more.
    assert 3 * 100 * row < got["held"]["decode nsa"] / 2 < 20 * 256 * row
    for step in got["steps"].values():
        made = [step().logits for _ in range(2)]
        assert made[0].shape == (1, 1, 256) and all(x.isfinite().all() for x in made)
    assert [cache.get_seq_length() for cache in caches] == [102, 102]
    keys = caches[1].layers[0].keys[:, :, :100]
    assert keys.std() > 0.9 and keys.shape == (1, 1, 100, 64)
