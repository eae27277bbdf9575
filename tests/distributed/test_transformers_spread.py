"""`NsaForCausalLM`: Hugging Face's tensor parallelism by its plan, and our context parallelism."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "value_head_dim": 6,
    "compress_block": 8, "compress_stride": 4, "select_block": 16, "num_selected": 4,
    "attention_window": 12, "max_position_embeddings": 256, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip


def made(**changes):
    """A model, the same on every rank."""
    from nsa_neuron.integrations.transformers import NsaForCausalLM, NsaLmConfig

    torch.manual_seed(0)
    return NsaForCausalLM(NsaLmConfig(**{**SIZES, **changes})).double()


def spread_out(model):
    """As `from_pretrained(..., distributed_config=...)` does it, which needs accelerate."""
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    ranks = dist.get_world_size()
    plan, _, _ = model._resolve_parallel_plans(DistributedConfig(tp_size=ranks))
    return apply_tensor_parallelism(model, init_device_mesh("cpu", (ranks,)), plan)


def check(changes):
    whole = made(**changes)
    spread = spread_out(made(**changes))
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    want, got = whole(tokens, labels=tokens), spread(tokens, labels=tokens)
    torch.testing.assert_close(got.logits, want.logits, rtol=1e-9, atol=1e-9)
    want.loss.backward()
    got.loss.backward()
    named = dict(whole.named_parameters())
    for name, p in spread.named_parameters():
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        torch.testing.assert_close(
            grad, named[name].grad, rtol=1e-8, atol=1e-9,
            msg=lambda found, name=name: f"{name}: {found}",
        )  # fmt: skip
    options = {"max_new_tokens": 10, "do_sample": False}
    assert torch.equal(
        spread.eval().generate(tokens[:1], **options), whole.eval().generate(tokens[:1], **options)
    )
    return sum(isinstance(p, DTensor) for p in spread.parameters())


def check_context_parallel():
    from nsa_neuron.distributed import context_parallel, shard

    mesh = init_device_mesh("cpu", (2,))
    whole = made(attention_kinds=["nsa", "window"])
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(1))
    want = whole(tokens, use_cache=False).logits
    got = context_parallel(whole, mesh)(shard(tokens, mesh), use_cache=False).logits
    torch.testing.assert_close(got, shard(want, mesh), rtol=1e-9, atol=1e-9)


def check_too_many_ranks():
    from nsa_neuron.errors import InvalidArgument

    spread = spread_out(made(num_key_value_heads=1))
    with pytest.raises(InvalidArgument, match="fewer tensor-parallel ranks"):
        spread(torch.zeros(1, 20, dtype=torch.int64))


@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": 1e-6, "qkv_bias": True, "attention_kinds": ["nsa", "full"]}],
    ids=str,
)
def test_a_spread_model_is_the_whole_one(two, changes):
    assert min(two(check, changes)) >= 2 * 7 - 1


def test_more_ranks_than_kv_heads_are_refused(two):
    two(check_too_many_ranks)


def test_context_parallelism(two):
    two(check_context_parallel)
