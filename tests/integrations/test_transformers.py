"""Hugging Face: tiny random models, used as transformers uses them."""

from __future__ import annotations

import json
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

from nsa_neuron.errors import CacheExhausted, InvalidArgument, StateMismatch  # noqa: E402
from nsa_neuron.integrations.transformers import NsaForCausalLM, NsaLmConfig, convert  # noqa: E402
from nsa_neuron.integrations.transformers import cache as hf_cache  # noqa: E402
from nsa_neuron.integrations.transformers.attention import attention_mask  # noqa: E402
from nsa_neuron.nn.cache import cache as caches  # noqa: E402

GEOMETRY = {
    "compress_block": 8, "compress_stride": 4, "select_block": 16, "num_selected": 4,
}  # fmt: skip
BODY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS = ["nsa", "window", "full"]
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def config(**changes):
    values = {**BODY, **GEOMETRY, "attention_window": 12, "attention_kinds": KINDS}
    return NsaLmConfig(**{**values, **changes})


def model(seed=0, **changes):
    torch.manual_seed(seed)
    return NsaForCausalLM(config(**changes)).eval()


def ids_of(*shape, seed=1):
    return torch.randint(3, 64, shape, generator=torch.Generator().manual_seed(seed))


NET = model()


@torch.no_grad()
def continued(net, ids, count):
    """Greedy continuation without a cache."""
    for _ in range(count):
        logits = net(ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids


def test_the_first_loss_is_that_of_a_uniform_guess():
    for change in ({}, {"tie_word_embeddings": True}, {"attention_kinds": None}):
        net, ids = model(**change), ids_of(2, 60)
        assert abs(net(ids, labels=ids).loss.item() / math.log(64) - 1) < 0.02


def test_generate_equals_step_by_step():
    ids = ids_of(2, 40)
    assert torch.equal(NET.generate(ids, max_new_tokens=12, **GREEDY), continued(NET, ids, 12))


def test_generate_past_the_first_capacity_and_from_one_token():
    ids = ids_of(1, 1)
    assert torch.equal(NET.generate(ids, max_new_tokens=30, **GREEDY), continued(NET, ids, 30))
    ids = ids_of(1, 130)
    long = NET.generate(ids, max_new_tokens=140, **GREEDY)
    with torch.no_grad():
        expected = NET(long[:, :-1], use_cache=False).logits.argmax(-1)[:, 129:]
    assert torch.equal(long[:, 130:], expected)


def test_left_padding_changes_nothing():
    ids, lengths = ids_of(3, 30), (30, 17, 1)
    mask = torch.stack([torch.arange(30) >= 30 - n for n in lengths]).long()
    padded = NET.generate(ids * mask, attention_mask=mask, max_new_tokens=10, **GREEDY)
    for row, n in enumerate(lengths):
        alone = continued(NET, ids[row : row + 1, 30 - n :], 10)
        assert torch.equal(padded[row : row + 1, 30 - n :], alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_training_changes_nothing(side):
    ids, columns = ids_of(2, 30), torch.arange(30)
    real = columns < 21 if side == "right" else columns >= 9
    mask = torch.stack([torch.ones(30, dtype=torch.long), real.long()])
    with torch.no_grad():
        padded = NET(ids, attention_mask=mask, use_cache=False).logits
        alone = NET(ids[1:, real], use_cache=False).logits
    torch.testing.assert_close(padded[1, real], alone[0])


def test_beams_and_sampling():
    ids = ids_of(2, 20)
    wide = NET.generate(ids, num_beams=3, max_new_tokens=8, use_cache=True, **GREEDY)
    slow = NET.generate(ids, num_beams=3, max_new_tokens=8, use_cache=False, **GREEDY)
    assert torch.equal(wide, slow)
    torch.manual_seed(3)
    sampled = NET.generate(
        ids, do_sample=True, num_return_sequences=2, max_new_tokens=8, pad_token_id=0
    )
    assert sampled.shape[0] == 4 and torch.equal(sampled[::2, :20], ids)


def test_assisted_decoding_writes_the_same():
    ids = ids_of(1, 20)
    plain = NET.generate(ids, max_new_tokens=20, **GREEDY)
    assert torch.equal(
        NET.generate(ids, assistant_model=model(7), max_new_tokens=20, **GREEDY), plain
    )
    looked = NET.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=20, **GREEDY)
    assert torch.equal(looked, plain)


@torch.no_grad()
def test_a_static_cache_writes_the_same_and_never_grows():
    ids, count = ids_of(2, 20), 12
    want = NET.generate(ids, max_new_tokens=count, **GREEDY)
    static = NET.generate(ids, max_new_tokens=count, cache_implementation="static", **GREEDY)
    assert torch.equal(static, want)
    cache = transformers.StaticCache(config=NET.config, max_cache_len=24)
    whole = NET(ids_of(1, 24), use_cache=False).logits
    NET(ids_of(1, 24)[:, :1], cache=cache)
    NET(ids_of(1, 24)[:, 1:20], cache=cache)
    torch.testing.assert_close(NET(ids_of(1, 24)[:, 20:], cache=cache).logits, whole[:, 20:])
    assert {layer.store.capacity for layer in cache.layers} == {24} == {cache.get_max_length()}
    with pytest.raises(CacheExhausted, match="capacity is 24"):
        NET(ids[:1, :1], cache=cache)
    assert cache.get_seq_length() == 24


def test_the_cache_can_be_continued_cropped_repeated_and_selected():
    ids = ids_of(2, 50)
    with torch.no_grad():
        whole = NET(ids, use_cache=False).logits
        cache = NET(ids[:, :33]).cache
        assert cache.get_seq_length() == 33
        NET(ids_of(2, 9, seed=5), cache=cache)
        cache.crop(-9)
        torch.testing.assert_close(NET(ids[:, 33:40], cache=cache).logits, whole[:, 33:40])
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([2, 0]))
        torch.testing.assert_close(NET(ids[[1, 0], 40:], cache=cache).logits, whole[[1, 0], 40:])
        cache.reset()
        torch.testing.assert_close(NET(ids, cache=cache).logits, whole)


@torch.no_grad()
def test_windows_and_what_phi_has_read_are_given_back(monkeypatch):
    """Pools for the last rows only, beams and short crops included; a long crop is refused."""
    monkeypatch.setattr(hf_cache, "SLACK", 6)
    monkeypatch.setattr(hf_cache, "STEP", 4)
    monkeypatch.setattr(caches, "PAGE_TOKENS", 64)
    ids, whole = ids_of(2, 400), NET(ids_of(2, 400), use_cache=False).logits
    cache = NET(ids[:, :300]).cache
    rows = {name: len(t.users) // 2 for name, t in cache.layers[0].store.books.tables.items()}
    assert rows == {"cmp": 8, "slc": 8, "win": 2, "raw": 2}  # pages of 64 tokens, per sequence
    torch.testing.assert_close(NET(ids[:, 300:305], cache=cache).logits, whole[:, 300:305])
    cache.crop(-6)
    torch.testing.assert_close(NET(ids[:, 299:390], cache=cache).logits, whole[:, 299:390])
    with pytest.raises(InvalidArgument, match="what slack = 6 keeps"):
        cache.crop(-50)
    assert cache.get_seq_length() == 390
    torch.testing.assert_close(NET(ids[:, 390:], cache=cache).logits, whole[:, 390:])
    kept = NET.generate(ids[:1, :200], num_beams=3, max_new_tokens=80, use_cache=True, **GREEDY)
    slow = NET(kept[:, :-1], use_cache=False).logits
    again = NET(kept[:, :200]).cache
    torch.testing.assert_close(NET(kept[:, 200:-1], cache=again).logits, slow[:, 200:])


def test_old_rows_of_several_heads_are_refused_and_can_be_turned(tmp_path):
    """What was saved before rows of kv.weight were ordered by head must not load silently."""
    NET.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    saved = json.loads(path.read_text())
    assert saved.pop("attention_layout") == 2
    path.write_text(json.dumps(saved))
    with pytest.raises(StateMismatch, match=r"rows_by_head\(weight, 3, 2\)"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    for harmless in ({"shared_kv": True}, {"attention_kinds": ["full"] * 3}):
        path.write_text(json.dumps({**saved, **harmless}))
        transformers.AutoConfig.from_pretrained(tmp_path)
    state = NET.state_dict()
    for data in state._metadata.values():
        data["version"] = 1
    net = model(5)
    before = net.model.layers[0].self_attn.kv.weight.clone()
    with pytest.raises(StateMismatch, match=r"layers\.0\.self_attn\.kv\.weight is of version 1"):
        net.load_state_dict(state)
    assert torch.equal(net.model.layers[0].self_attn.kv.weight, before)
    net.load_state_dict(dict(state))
    assert torch.equal(net(ids_of(1, 9)).logits, NET(ids_of(1, 9)).logits)


def test_save_and_load(tmp_path):
    NET.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, NsaForCausalLM) and again.config.attention_kinds == KINDS
    for (name, a), b in zip(NET.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    ids = ids_of(1, 20)
    assert torch.equal(again(ids).logits, NET(ids).logits)
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path), NsaLmConfig)


def test_gradient_checkpointing_gives_the_same_gradients():
    net, ids = model().train(), ids_of(1, 40)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            net.gradient_checkpointing_enable()
        net.zero_grad()
        net(ids, labels=ids, use_cache=False).loss.backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_a_trainer_step(tmp_path):
    net = model()
    rows = [{"input_ids": row, "labels": row} for row in ids_of(4, 24)]
    before = net.lm_head.weight.clone()
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(net, args, train_dataset=rows).train()
    assert not torch.equal(net.lm_head.weight, before)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: NET(), "input_ids"),
        (lambda: NET(ids_of(1, 5), attention_mask=torch.ones(1, 4)), "5 wide"),
        (lambda: NET(ids_of(1, 5), attention_mask=torch.ones(1, 1, 5, 5)), r"shape \[1, seen"),
        (lambda: NET(ids_of(1, 3), attention_mask=torch.tensor([[1, 1, 0]])), "on the left"),
        (lambda: NET(ids_of(1, 5), cache=transformers.DynamicCache()), "NsaCacheLayer"),
        (lambda: NET(ids_of(2, 5), cache=NET(ids_of(1, 5)).cache), "1 like the cache"),
        (lambda: NET(ids_of(1, 513), use_cache=False), "max_positions = 512"),
        (
            lambda: NET.generate(ids_of(1, 5), max_new_tokens=1, cache_implementation="offloaded"),
            "'cache_implementation' is offloaded",
        ),
        (
            lambda: NET.generate(
                ids_of(1, 5), transformers.GenerationConfig(cache_implementation="quantized")
            ),
            "'cache_implementation' is quantized",
        ),
    ],
)
def test_bad_calls(call, text):
    with pytest.raises(InvalidArgument, match=text):
        call()


@torch.no_grad()
def test_a_cache_that_is_full_keeps_what_it_has():
    ids = ids_of(1, 512)
    cache = NET(ids[:, :500]).cache
    with pytest.raises(CacheExhausted, match="capacity is 512"):
        NET(ids_of(1, 13), cache=cache)
    assert cache.get_seq_length() == 500
    whole = NET(ids, use_cache=False).logits
    torch.testing.assert_close(NET(ids[:, 500:], cache=cache).logits, whole[:, 500:])


@pytest.mark.parametrize(
    "change",
    [
        {"attention_kinds": ["nsa"]},
        {"attention_kinds": ["nsa", "full", "none"]},
        {"compress_stride": 3},
    ],
)
def test_bad_configurations(change):
    with pytest.raises(Exception, match=r"attention_kinds|stride"):
        config(**change)


def llama(**changes):
    torch.manual_seed(2)
    made = transformers.LlamaConfig(**{**BODY, **changes})
    return transformers.LlamaForCausalLM(made).eval()


def sized(net, **geometry):
    for name, value in {**GEOMETRY, **geometry}.items():
        setattr(net.config, f"nsa_{name}", value)
    return net


@torch.no_grad()
def test_the_training_free_form_is_full_attention_while_all_fits():
    net, ids = sized(llama()), ids_of(2, 64)
    want = net(ids).logits
    net.set_attn_implementation("nsa")
    torch.testing.assert_close(net(ids).logits, want, rtol=1e-4, atol=1e-5)
    sparse = net(ids_of(1, 120)).logits
    net.set_attn_implementation("sdpa")
    assert not torch.allclose(sparse, net(ids_of(1, 120)).logits, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_the_training_free_form_generates_with_padding(family):
    torch.manual_seed(4)
    made = getattr(transformers, f"{family}Config")(**BODY)
    net = sized(getattr(transformers, f"{family}ForCausalLM")(made).eval(), num_selected=3)
    net.set_attn_implementation("nsa")
    ids = ids_of(2, 70)
    mask = torch.stack([torch.ones(70), torch.arange(70) >= 30]).long()
    padded = net.generate(ids * mask, attention_mask=mask, max_new_tokens=6, **GREEDY)
    for row, first in ((0, 0), (1, 30)):
        alone = ids[row : row + 1, first:]
        for _ in range(6):
            new = net(alone, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            alone = torch.cat([alone, new], 1)
        assert torch.equal(padded[row : row + 1, first:], alone)


def test_the_training_free_form_refuses_what_it_cannot_mean():
    made = transformers.MistralConfig(**BODY, sliding_window=8)
    net = transformers.MistralForCausalLM(made)
    net.set_attn_implementation("nsa")
    with pytest.raises(InvalidArgument, match="sliding_window"):
        net(ids_of(1, 20))


PACKED = torch.tensor([[*range(20), *range(33), *range(1), *range(10)], [*range(64)]])


@torch.no_grad()
@pytest.mark.parametrize("name", ["own", "training-free"])
def test_sequences_packed_by_position_ids_do_not_see_each_other(name):
    net, ids = (NET, ids_of(2, 64)) if name == "own" else (sized(llama()), ids_of(2, 64))
    if name != "own":
        net.set_attn_implementation("nsa")
    got = net(ids, position_ids=PACKED, use_cache=name == "own").logits
    for row, first, last in ((0, 0, 20), (0, 20, 53), (0, 53, 54), (0, 54, 64), (1, 0, 64)):
        alone = net(ids[row : row + 1, first:last], use_cache=False).logits[0]
        torch.testing.assert_close(got[row, first:last], alone, rtol=1e-4, atol=1e-5)
    if name == "own":
        cache = transformers.DynamicCache(config=net.config)
        with pytest.raises(InvalidArgument, match="'position_ids' is those of packed sequences"):
            net(ids, position_ids=PACKED, cache=cache)


def test_the_training_free_form_refuses_caches_and_masks_that_it_would_misread():
    net, ids = sized(llama()), ids_of(1, 20)
    net.set_attn_implementation("nsa")
    with pytest.raises(InvalidArgument, match=r"'cache' is of 25 rows for 20 tokens.*DynamicCache"):
        net.generate(ids, max_new_tokens=6, cache_implementation="static", **GREEDY)
    sees_all = {"mask_function": lambda b, h, q, k: (q >= 0) & (k >= 0)}
    with pytest.raises(InvalidArgument, match="sees what comes later"):
        attention_mask(1, 8, 8, allow_is_causal_skip=False, **sees_all)
    with pytest.raises(InvalidArgument, match="of the model's own"):
        attention_mask(1, 8, 8, use_vmap=True)


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_a_converted_model_begins_near_the_old_one(shared):
    old, ids = llama(), ids_of(2, 60)
    new = convert(old, **GEOMETRY, attention_window=12, shared_kv=shared)
    want, got = old(ids).logits, new(ids).logits
    assert (got - want).norm() < 0.05 * want.norm()
    full = convert(old, **GEOMETRY, attention_kinds=["full"] * 3)
    torch.testing.assert_close(full(ids).logits, want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["Qwen2", "Qwen3"])
def test_qwen_s_biases_and_norms_are_converted(family):
    torch.manual_seed(3)
    made = getattr(transformers, f"{family}Config")(**BODY)
    old, ids = getattr(transformers, f"{family}ForCausalLM")(made).eval(), ids_of(2, 60)
    for name, p in old.named_parameters():
        if name.endswith(("proj.bias", "q_norm.weight", "k_norm.weight")):
            p.add_(torch.randn_like(p) / 2)
    want = old(ids).logits
    full = convert(old, **GEOMETRY, attention_kinds=["full"] * 3)
    torch.testing.assert_close(full(ids).logits, want, rtol=1e-4, atol=1e-5)
    sparse = convert(old, **GEOMETRY, attention_window=12)
    assert (sparse(ids).logits - want).norm() < 0.1 * want.norm()
    again = NsaLmConfig.from_dict(sparse.config.to_dict())
    assert (again.qkv_bias, again.qk_norm > 0) == (family == "Qwen2", family == "Qwen3")


def test_conversion_refuses_what_it_would_lose():
    with pytest.raises(InvalidArgument, match=r"o_proj\.bias"):
        convert(llama(attention_bias=True))
    made = transformers.Qwen2Config(
        **BODY, use_sliding_window=True, sliding_window=16, max_window_layers=1
    )
    with pytest.raises(InvalidArgument, match="'sliding_attention'"):
        convert(transformers.Qwen2ForCausalLM(made))
    scaled = llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(InvalidArgument, match="rope_type 'linear'"):
        convert(scaled)
