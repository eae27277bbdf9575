"""The layers and the model: configuration, initialisation, the ways to be fed, torch's tools."""

from __future__ import annotations

import collections
import copy
import itertools
import math

import pytest
import torch
from tiny import GEOMETRY, MIXED, SIZES, bytes_of, config, model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from nsa_neuron.errors import InvalidArgument, InvalidType, StateMismatch
from nsa_neuron.nn import (
    ByteLanguageModel,
    NativeSparseAttention,
    NsaConfig,
    next_token_loss,
    pack,
    rows_by_head,
)

VARIANTS = [
    {"phi": "mean"},
    {"phi": "linear", "rope": "before"},
    {"phi": "mlp", "shared_kv": True},
    {"phi": "mlp", "shared_kv": True, "rope": "before"},
    {"rope_base": 0.0},
    {"phi": "linear", "phi_per_head": True},
    {"phi_per_head": True, "qkv_bias": True, "qk_norm": 1e-6},
]


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"kv_heads": 3}, "kv_heads"),
        ({"kv_heads": 0}, "kv_heads"),
        ({"heads": -4}, "heads"),
        ({"dk": 7}, "dk"),
        ({"phi": "max"}, "phi"),
        ({"phi": None}, "phi"),
        ({"rope": "during"}, "rope"),
        ({"block": 0}, "block"),
        ({"stride": 3}, "stride"),
        ({"select_block": 18}, "select_block"),
        ({"select_block": 4}, "select_block"),
        ({"num_selected": 2}, "num_selected"),
        ({"window": 2**31}, "window"),
        ({"window": 1.5}, "window"),
        ({"dim": True}, "dim"),
        ({"rope_base": -1.0}, "rope_base"),
        ({"rope_base": math.inf}, "rope_base"),
        ({"shared_kv": 1}, "shared_kv"),
    ],
)
def test_bad_configurations_are_refused_when_they_are_made(change, argument):
    with pytest.raises(InvalidArgument) as caught:
        config(**change)
    assert caught.value.argument == argument


def test_a_configuration_survives_its_dictionary():
    made = config(phi="linear", shared_kv=True)
    assert NsaConfig.from_dict(made.to_dict()) == made
    with pytest.raises(InvalidArgument, match="no such name"):
        NsaConfig.from_dict({**SIZES, "colour": 1})
    with pytest.raises(InvalidArgument, match="'dim' is missing"):
        NsaConfig.from_dict(GEOMETRY)


@pytest.mark.parametrize("kinds", [("nsa",) * 2, MIXED, ("full",), ("window",)], ids=str)
@pytest.mark.parametrize("dim", [16, 256])
def test_the_first_loss_is_that_of_a_uniform_guess(kinds, dim):
    net = model(kinds, torch.float32, dim=dim)
    tokens = bytes_of(2, 64)
    loss = next_token_loss(net(tokens), tokens).item()
    assert abs(loss / math.log(256) - 1) < 0.02


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_every_parameter_learns(change):
    net = model(MIXED, **change).train()
    tokens = bytes_of(1, 40)
    next_token_loss(net(tokens), tokens).backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []


def test_a_small_model_learns_a_repeating_text():
    net = model(("nsa",), torch.float32, dim=32, dk=16, dv=16).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    text = torch.tensor(list(b"sparse attention " * 4))[None]
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = next_token_loss(net(text), text)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@pytest.mark.parametrize("kinds", [("nsa",), ("full",), ("window",)])
def test_the_future_does_not_matter(kinds):
    net = model(kinds)
    tokens, changed = bytes_of(1, 50), bytes_of(1, 50)
    changed[:, 30:] = bytes_of(1, 20, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(net(tokens)[:, :30], net(changed)[:, :30], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_packed_sequences_equal_single_ones(change):
    net = model(MIXED, **change)
    tokens, edges = bytes_of(1, 75), [0, 5, 40, 75]
    with torch.no_grad():
        packed = net(tokens, cu_seqlens=torch.tensor(edges, dtype=torch.int32))
        for first, last in itertools.pairwise(edges):
            torch.testing.assert_close(packed[:, first:last], net(tokens[:, first:last]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    net, tokens = model(MIXED), bytes_of(3, 50)
    lengths = torch.tensor([50, 33, 1])
    columns = torch.arange(50)
    mask = columns < lengths[:, None] if side == "right" else columns >= 50 - lengths[:, None]
    with torch.no_grad():
        padded = net(tokens, mask=mask)
        for row in range(3):
            alone = net(tokens[row][mask[row]][None])
            torch.testing.assert_close(padded[row][mask[row]], alone[0])
    assert not padded[~mask].any()


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(2, 5), InvalidType),
        (torch.ones(2, 4, dtype=torch.bool), InvalidArgument),
        (torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool(), InvalidArgument),
        (torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]]).bool(), InvalidArgument),
    ],
)
def test_bad_masks(mask, error):
    with pytest.raises(error) as caught:
        pack(bytes_of(2, 5), mask)
    assert caught.value.argument == "mask"


def test_a_masked_loss_counts_real_pairs_only():
    net, tokens = model(), bytes_of(2, 30)
    mask = torch.arange(30) >= torch.tensor([[0], [10]])
    whole = next_token_loss(net(tokens, mask=mask), tokens, mask)
    sums = [
        next_token_loss(net(row), row) * (row.shape[1] - 1) for row in (tokens[:1], tokens[1:, 10:])
    ]
    torch.testing.assert_close(whole, sum(sums) / (29 + 19), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("phi", ["mean", "linear", "mlp"])
def test_autocast_trains(phi):
    net = model(MIXED, torch.float32, phi=phi).train()
    tokens = bytes_of(1, 40)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(net(tokens), tokens)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in net.parameters())
    torch.testing.assert_close(loss, next_token_loss(net(tokens), tokens), rtol=2e-2, atol=0)


@pytest.mark.parametrize("phi", ["mean", "linear", "mlp"])
def test_a_backward_pass_inside_autocast(phi):
    """Plain torch inside a lowering must not be cast behind its back."""
    net = model(MIXED, torch.float32, phi=phi).train()
    tokens = bytes_of(1, 40)
    grads = []
    for inside in (True, False):
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = next_token_loss(net(tokens), tokens)
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=0.1, atol=0.02 * float(b.abs().max()) + 1e-6)


def test_autocast_generates():
    net, tokens = model(MIXED, torch.float32), bytes_of(1, 20)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = net.new_cache(1, 32)
        for part in (tokens[:, :19], tokens[:, 19:]):
            with cache.step(part.shape[1]) as step:
                last = net(part, step, last=1)
        torch.testing.assert_close(last, net(tokens, last=1), rtol=0.1, atol=0.02)


@pytest.mark.parametrize("phi", ["mean", "linear", "mlp"])
def test_meta_construction_then_reset_gives_the_constructors_distributions(phi):
    made = model(MIXED, torch.float32, dim=64, phi=phi)
    with torch.device("meta"):
        net = ByteLanguageModel(config(dim=64, phi=phi), MIXED)
    net.to_empty(device="cpu")
    for p in net.parameters():
        p.data.fill_(float("nan"))
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for (name, got), want in zip(net.named_parameters(), made.parameters(), strict=True):
        assert not got.isnan().any(), name
        if got.numel() > 500:
            assert 0.8 < got.std() / want.std() < 1.25, name


@pytest.mark.parametrize("layers", [2, 8])
def test_what_is_added_to_the_stream_starts_smaller_in_deeper_models(layers):
    """GPT-2's rule, worked out: 0.02 / sqrt(2 * layers) is 0.01 with 2 layers, 0.005 with 8."""
    expected = {2: 0.01, 8: 0.005}[layers]
    net = model(("nsa",) * layers, torch.float32, dim=64)
    added = {n: p for n, p in net.named_parameters() if n.endswith(("out.weight", "down.weight"))}
    assert len(added) == 2 * layers, list(added)
    for name, p in added.items():
        assert abs(p.std().item() / expected - 1) < 0.1, name


def test_one_reset_starts_everything_again():
    net = model(MIXED)
    for p in net.parameters():
        p.data.fill_(float("nan"))
    net.reset_parameters()
    assert not any(p.isnan().any() for p in net.parameters())


def test_activation_checkpointing_gives_the_same_gradients():
    layer = NativeSparseAttention(config()).double()
    x = torch.randn(1, 40, 16, dtype=torch.float64, requires_grad=True)
    plain = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    saved = checkpoint(layer, x, use_reentrant=False).square().sum()
    for a, b in zip(plain, torch.autograd.grad(saved, [x, *layer.parameters()]), strict=True):
        torch.testing.assert_close(a, b)


def test_deepcopy_and_functional_call():
    layer = NativeSparseAttention(config())
    x = torch.randn(1, 20, 16)
    twin = copy.deepcopy(layer)
    torch.testing.assert_close(twin(x), layer(x), rtol=0, atol=0)
    doubled = {name: 2 * p for name, p in layer.named_parameters()}
    got = torch.func.functional_call(layer, doubled, (x,))
    twin.load_state_dict(doubled)
    torch.testing.assert_close(got, twin(x))
    grads = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(
        dict(layer.named_parameters())
    )
    assert all(grad.isfinite().all() for grad in grads.values())


def test_compiled_training_equals_eager_in_one_graph():
    torch._dynamo.reset()
    net = model(("nsa", "full"), torch.float32)
    once = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(net, backend=once, fullgraph=True, dynamic=True)
    for tokens in (bytes_of(2, 40), bytes_of(2, 57)):
        want = torch.autograd.grad(next_token_loss(net(tokens), tokens), net.head.weight)[0]
        got = torch.autograd.grad(next_token_loss(fast(tokens), tokens), net.head.weight)[0]
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert once.frame_count == 1  # no float attribute was an input, and specialized again


def test_a_state_dict_loads_whole_or_not_at_all():
    net, other = model(), model(seed=5)
    before = copy.deepcopy(net.state_dict())
    wider = model(dim=32).state_dict()
    less = dict(other.state_dict())
    del less["head.weight"]
    newer = other.state_dict()
    newer._metadata[""]["version"] = 99
    for state, text in ((wider, "is .*, not"), (less, "head.weight is missing"), (newer, "99")):
        with pytest.raises(StateMismatch, match=text):
            net.load_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    net.load_state_dict(other.state_dict())
    assert torch.equal(net.head.weight, other.head.weight)


def attention_of(net):
    return net.blocks[0].attention


@pytest.mark.parametrize("kind", ["nsa", "window"])
def test_a_layer_that_trains_can_be_mapped(kind):
    """Inside of vmap nothing says that autograd records outside."""
    net, x = model((kind,)), torch.randn(3, 1, 21, 16, dtype=torch.float64)
    layer = net.blocks[0].attention
    mapped = torch.vmap(layer)(x)
    assert mapped.requires_grad
    torch.testing.assert_close(mapped[:, 0], layer(x[:, 0]), rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_state_dict_with_rows_by_set_is_refused_and_can_be_turned():
    net, other = model(), model(seed=5)
    before, x = copy.deepcopy(net.state_dict()), bytes_of(1, 30)
    state = other.state_dict()
    layers = [name for name, m in net.named_modules() if isinstance(m, NativeSparseAttention)]
    for name in layers:
        state._metadata[name]["version"] = 1
        by_head = state[f"{name}.kv.weight"].unflatten(0, (2, 3, -1))
        state[f"{name}.kv.weight"] = by_head.transpose(0, 1).flatten(0, 2)
    with pytest.raises(StateMismatch, match=r"rows_by_head\(weight, 3, 2\)"):
        net.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    alone = {k.removeprefix(f"{layers[0]}."): v for k, v in state.items() if layers[0] in k}
    alone = collections.OrderedDict(alone)
    alone._metadata = {"": {"version": 1}}
    with pytest.raises(StateMismatch, match="version 1"):
        net.blocks[0].attention.load_state_dict(alone)
    young = dict(state)
    for name in layers:
        young[f"{name}.kv.weight"] = rows_by_head(state[f"{name}.kv.weight"], 3, 2)
    net.load_state_dict(young)
    assert torch.equal(net(x), other(x))
    one_head = model(kv_heads=1)
    state = one_head.state_dict()
    for data in state._metadata.values():
        data["version"] = 1
    model(kv_heads=1, seed=5).load_state_dict(state)  # one head: the same order


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda net: net(bytes_of(1, 5).int()), InvalidType, "torch.int32"),
        (lambda net: net(bytes_of(5)), InvalidArgument, r"of shape \[5\]"),
        (lambda net: net(b"bytes"), InvalidType, "a torch.Tensor"),
        (lambda net: net(bytes_of(1, 5), last=0), InvalidArgument, "'last' is 0"),
        (lambda net: net(bytes_of(1, 5).to("meta")), InvalidArgument, "on cpu like the model"),
        (lambda net: attention_of(net)(torch.zeros(1, 5, 16)), InvalidType, "torch.float64 like"),
        (
            lambda net: attention_of(net)(
                torch.zeros(1, 5, 16, dtype=torch.float64, device="meta")
            ),
            InvalidArgument,
            "on cpu like the layer",
        ),
        (lambda net: net(bytes_of(1, 0)), InvalidArgument, "S at least 1"),
        (lambda net: net(torch.tensor([[7, 256]])), InvalidArgument, "from 7 to 256; it must be"),
        (lambda net: net(torch.tensor([[7, -1]])), InvalidArgument, "from -1 to 7; it must be"),
        (lambda net: net(bytes_of(1, 30)), InvalidArgument, "max_positions = 20"),
        (lambda net: attention_of(net)(torch.zeros(1, 5, 8)), InvalidArgument, "dim = 16"),
        (lambda net: next_token_loss(net(bytes_of(1, 1)), bytes_of(1, 1)), InvalidArgument, "2"),
        (lambda net: ByteLanguageModel(net.config, ["none"]), InvalidArgument, "nsa, full, window"),
        (lambda net: ByteLanguageModel(net.config, 0), InvalidArgument, "at least 1"),
        (lambda net: ByteLanguageModel(net.config, 1.5), InvalidType, "a number of layers"),
        (lambda net: net.new_cache(1, 21), InvalidArgument, "max_positions = 20"),
    ],
)
def test_bad_calls(call, error, text):
    net = model(max_positions=20)
    with pytest.raises(error, match=text):
        call(net)


@pytest.mark.parametrize("rope", ["after", "before"])
def test_export_of_every_length(rope):
    """Short sequences have no or one compressed block: sizes that torch would make special."""
    net, tokens = model(("nsa", "full"), torch.float32, rope=rope), bytes_of(1, 41)
    sizes = {"tokens": {1: torch.export.Dim("s", min=2, max=256)}}
    program = torch.export.export(net, (tokens,), dynamic_shapes=sizes).module()
    for length in (2, 7, 8, 11, 12, 15, 16, 41, 256):
        text = bytes_of(1, length)
        torch.testing.assert_close(program(text), net(text))


def test_an_exported_program_trains_and_takes_any_batch():
    net, tokens = model(("nsa",), torch.float32), bytes_of(2, 41)
    sizes = {"tokens": {0: torch.export.Dim("b", min=2, max=8), 1: torch.export.Dim.AUTO}}
    program = torch.export.export(net, (tokens,), dynamic_shapes=sizes).module()
    for text in (bytes_of(3, 2), bytes_of(5, 9), bytes_of(2, 70)):
        torch.testing.assert_close(program(text), net(text))
        for one in (program, net):
            one.zero_grad()
            next_token_loss(one(text), text).backward()
        for (name, p), q in zip(program.named_parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=name)


def test_fsdp2_trains_like_one_module():
    """One process: what FSDP2 does to modules and parameters, without another rank."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, tokens = model(("nsa", "full"), torch.float32), bytes_of(1, 40)
    net = copy.deepcopy(plain)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in net.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(net, mesh=mesh)
        next_token_loss(net(tokens), tokens).backward()
        next_token_loss(plain(tokens), tokens).backward()
        for (name, a), b in zip(net.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, msg=name)
    finally:
        dist.destroy_process_group()
