"""How layers start, and what half precision and far positions do not change."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny import MIXED, bytes_of, config, model

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn import NativeSparseAttention, next_token_loss
from nsa_neuron.nn.attention import _normed
from nsa_neuron.nn.layers import Embedding, Linear
from nsa_neuron.nn.phi import Phi
from nsa_neuron.nn.rotary import block_positions, rotate


def phi(dim=64, **changes):
    torch.manual_seed(1)
    return Phi(config(block=16, stride=8, **changes), dim)


@torch.no_grad()
@pytest.mark.parametrize("per_head", [False, True])
def test_linear_phi_starts_as_the_mean_of_a_block(per_head):
    """But for noise of 0.02 / block in each of its weights, and positions of 0.02."""
    made, x = phi(phi="linear", phi_per_head=per_head), torch.randn(1, 40, 2, 64) + 3
    want = torch.stack([x[:, i : i + 16].mean(1) for i in (0, 8, 16, 24)], 1)
    got = made(x)
    assert float((got - want).abs().max()) < 0.5
    noise = made.w1.unflatten(-2, (16, 64)) - torch.eye(64) / 16
    assert float(noise.std()) == pytest.approx(0.02 / 16, rel=0.1)
    assert float(made.pe.std()) == pytest.approx(0.02, rel=0.1)


@torch.no_grad()
def test_mlp_phi_keeps_the_variance_of_what_it_reads():
    """Before the bend it is that of a number of the block: 1 here, at any length of a block."""
    made, x = phi(phi="mlp"), torch.randn(1, 800, 2, 64)
    blocks = x[0, :, 0].unfold(0, 16, 8).transpose(1, 2).flatten(1)
    assert float((blocks @ made.w1).std()) == pytest.approx(1, rel=0.1)
    assert float((torch.randn(500, 64) @ made.w2).std()) == pytest.approx(1, rel=0.1)
    assert not made.b1.any() and not made.b2.any()
    assert float(made.pe.std()) == pytest.approx(0.02, rel=0.1)


@torch.no_grad()
def test_weights_start_with_the_standard_deviation_that_they_were_given():
    torch.manual_seed(0)
    for made, std in (
        (Linear(80, 90, bias=True), 0.02), (Linear(80, 90, std=0.3), 0.3),
        (Embedding(80, 90), 0.02), (Embedding(80, 90, std=0.3), 0.3),
    ):  # fmt: skip
        assert float(made.weight.std()) == pytest.approx(std, rel=0.05)
        assert float(made.weight.mean()) == pytest.approx(0, abs=std / 20)
        assert getattr(made, "bias", None) is None or not made.bias.any()


@torch.no_grad()
@pytest.mark.parametrize(("dim", "std"), [(16, 0.02), (400, 0.01)])
def test_the_head_starts_softer_in_wide_models(dim, std):
    """At most 0.02, and 0.2 / sqrt(dim); gates and projections are as every other layer's."""
    net = model(("nsa",), torch.float32, dim=dim)
    assert float(net.head.weight.std()) == pytest.approx(std, rel=0.1)
    layer = net.blocks[0].attention
    for weight in (layer.q.weight, layer.kv.weight, layer.gate.weight, net.embedding.weight):
        assert float(weight.std()) == pytest.approx(0.02, rel=0.15)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_far_positions_are_exact_in_half_precision(dtype):
    """Positions and angles are float32: neighbours at 100,000 stand one turn apart."""
    x = torch.randn(1, 3, 2, 16, dtype=torch.float64)
    at = torch.tensor([99_999, 100_000, 100_001])
    rates = 10_000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
    angles = at.double()[:, None, None] * rates
    turned = torch.complex(x[..., :8], x[..., 8:]) * torch.polar(torch.ones_like(angles), angles)
    want = torch.cat([turned.real, turned.imag], -1)
    got = rotate(x.to(dtype), at, 10_000.0)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0.05)
    exact = rotate(x.float(), at, 10_000.0)
    torch.testing.assert_close(exact.double(), want, rtol=0, atol=0.03)


def test_blocks_of_sequences_far_shorter_than_a_block_belong_to_nobody():
    """Sequences of 1, 9, 2 and 8 tokens, blocks of 8 every 2: one block each of 9 and 8."""
    edges = torch.tensor([0, 1, 10, 12, 22], dtype=torch.int32)
    found = block_positions(3, 8, 2, edges, torch.device("cpu"))
    assert found.tolist() == [7, 7, 9]


@torch.no_grad()
def test_packed_sequences_of_one_token_equal_single_ones():
    net = model(("nsa",), stride=2)
    edges, tokens = [0, 1, 2, 3, 40, 41, 75], bytes_of(1, 75)
    packed = net(tokens, cu_seqlens=torch.tensor(edges, dtype=torch.int32))
    for first, last in itertools.pairwise(edges):
        torch.testing.assert_close(packed[:, first:last], net(tokens[:, first:last]))


def test_autocast_trains_layers_with_norms_and_biases():
    net = model(MIXED, torch.float32, qk_norm=1e-6, qkv_bias=True).train()
    tokens = bytes_of(1, 40)
    plain = next_token_loss(net(tokens), tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(net(tokens), tokens)
    loss.backward()
    torch.testing.assert_close(loss, plain, rtol=2e-2, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_norm_that_gives_float32_gives_back_what_it_took():
    """As norms do under autocast on some devices, where values stay in half precision."""
    x = torch.randn(1, 2, 3, 8).bfloat16()
    assert _normed(x, lambda y: 2 * y.float()).dtype == torch.bfloat16
    assert torch.equal(_normed(x, lambda y: 2 * y.float()), 2 * x) and _normed(x, None) is x


def test_the_loss_of_half_precision_is_not_rounded():
    """The mean of -log p in float32 of what the logits say, 16 bits or not."""
    logits, tokens = torch.randn(2, 300, 256).bfloat16() * 4, bytes_of(2, 300)
    found = next_token_loss(logits, tokens)
    odds = logits.double().log_softmax(-1)
    sums = [
        odds[b, t, tokens[b, t + 1]] for b in range(2) for t in range(299)
    ]  # fmt: skip
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(-float(sum(sums)) / len(sums), rel=1e-5)


@torch.no_grad()
def test_only_the_last_logits_with_and_without_padding():
    net, tokens = model(("nsa", "full")), bytes_of(2, 20)
    mask = torch.arange(20) >= torch.tensor([[0], [7]])
    for given in ({}, {"mask": mask}):
        whole = net(tokens, **given)
        for last in (1, 3):
            part = net(tokens, **given, last=last)
            assert part.shape == (2, last, 256)
            torch.testing.assert_close(part, whole[:, -last:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_states_behind_each_number_of_blocks():
    net, tokens = model(MIXED), bytes_of(1, 20)
    x = net.embedding(tokens)
    for count, block in enumerate(net.blocks):
        assert torch.equal(net.hidden(tokens, layers=count), x)
        x = block(x)
    assert torch.equal(net.hidden(tokens), x)
    torch.testing.assert_close(net(tokens), net.head(net.norm(x)), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_block_is_two_branches_beside_the_stream():
    """x + attention(norm(x)), and that + down(gelu(up(norm(that)))), norms by hand."""

    def normed(x, norm):
        return x / (x.square().mean(-1, True) + torch.finfo(x.dtype).eps).sqrt() * norm.weight

    net = model(("window",))
    block = net.blocks[0]
    for p in block.parameters():
        p.copy_(torch.randn_like(p) / 3)
    x = torch.randn(1, 15, 16, dtype=torch.float64)
    y = x + block.attention(normed(x, block.norm1))
    hidden = normed(y, block.norm2) @ block.up.weight.T
    bent = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    torch.testing.assert_close(block(x), y + bent @ block.down.weight.T, rtol=1e-6, atol=1e-6)


def test_a_sequence_may_be_as_long_as_the_longest_and_no_longer():
    net = model(("nsa",), max_positions=20)
    assert net(bytes_of(1, 20)).shape == (1, 20, 256)
    with pytest.raises(InvalidArgument, match="'x' is 21 tokens long; it must be at most"):
        net(bytes_of(1, 21))


def test_offsets_beside_a_cache_are_refused():
    net = model(("nsa",))
    cache, x = net.new_cache(1, 32), torch.randn(1, 5, 16, dtype=torch.float64)
    layer = next(m for m in net.modules() if isinstance(m, NativeSparseAttention))
    edges = torch.tensor([0, 2, 5], dtype=torch.int32)
    with (
        torch.no_grad(),
        pytest.raises(InvalidArgument, match="given with a cache"),
    ):
        with cache.step(5) as step:
            layer(x, edges, step.layers[0])


@pytest.mark.parametrize(
    "change",
    [{"window": 2**31 - 1}, {"num_initial": 0}, {"qk_norm": 0.0}, {"rope_base": 0.0, "dk": 7},
     {"num_selected": 3}, {"select_block": 8}, {"stride": 8}, {"stride": 1}, {"kv_heads": 4}],
    ids=str,
)  # fmt: skip
def test_configurations_at_their_limits_are_taken(change):
    made = config(**change)
    assert {name: getattr(made, name) for name in change} == change


@pytest.mark.parametrize(
    "change",
    [{"qk_norm": -1e-9}, {"qk_norm": math.nan}, {"num_initial": -1}, {"num_local": 0},
     {"rope_base": math.nan}, {"select_block": 4, "block": 8}, {"heads": 2**31},
     {"qk_norm": "1"}, {"qk_norm": True}, {"phi_per_head": 0}],
    ids=str,
)  # fmt: skip
def test_configurations_beyond_their_limits_are_refused(change):
    with pytest.raises(InvalidArgument) as caught:
        config(**change)
    assert caught.value.argument == next(iter(change))
