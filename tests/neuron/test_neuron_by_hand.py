"""Values that can be told without a reference, where kernels choose a way or round."""

from __future__ import annotations

import pytest
import torch

import nsa_neuron as nsa
from nsa_neuron.backends.neuron import plans
from nsa_neuron.backends.neuron.launch.decode import single
from nsa_neuron.records import recording
from nsa_neuron.registry import use_backend

pytestmark = pytest.mark.sim


@pytest.fixture(autouse=True)
def simulated():
    with use_backend("neuron:sim"):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [2, 20])
def test_blocks_of_no_importance_are_still_chosen(heads, dtype):
    """All probability lies on key 0, that of all others is exactly 0: the forced blocks, and of
    the rest the lowest, which have equal importance."""
    tokens = 96
    q = torch.ones(1, 40, heads, 1, dtype=dtype)
    k = torch.zeros(1, tokens // 4, 1, 1, dtype=dtype)
    k[:, 0] = 4096.0
    ids = nsa.select_blocks(
        q, k, torch.full((1, 40, heads), 4096.0), kv_len=tokens, block=4, stride=4, select_block=8,
        num_selected=6, scale=1.0,
    )  # fmt: skip
    for row, t in zip(ids[0, :, 0].tolist(), range(tokens - 40, tokens), strict=True):
        assert row == [0, 1, 2, 3, t // 8 - 1, t // 8]


@pytest.mark.parametrize("most", [0, 2])
def test_decode_reads_blocks_of_no_importance(most, monkeypatch):
    """The same in decode, seen in values that name their block; one kernel or the other."""
    monkeypatch.setattr(single, "HEADS", most)
    tokens, page = 88, 16
    pages = -(-tokens // page)
    ones, blocks = torch.ones(1, 1, 2, 16), torch.arange(pages * page) // 8
    k_cmp = torch.zeros(2, 16, 1, 16)
    k_cmp[0, 0] = 1024.0
    v_slc = torch.nn.functional.one_hot(blocks, 16).float().view(pages, page, 1, 16)
    empty = torch.zeros(pages, page, 1, 16)
    gates = torch.tensor([0.0, 1.0, 0.0]).expand(1, 1, 2, 3)
    table = torch.arange(pages, dtype=torch.int32)[None]
    o = nsa.decode(
        ones, k_cmp, torch.zeros(2, 16, 1, 16), empty, v_slc, empty, empty, gates,
        torch.tensor([tokens], dtype=torch.int32), table[:, :2].contiguous(), table, table, block=4,
        stride=4, select_block=8, num_selected=6, num_initial=1, num_local=2, window=8, scale=1.0,
    )  # fmt: skip
    assert (o[0, 0] > 0).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 9, 10] * 2


@pytest.mark.parametrize("looped", [False, True])
def test_the_whole_op_reads_blocks_of_no_importance(looped, monkeypatch):
    """The same in one kernel, unrolled and in hardware loops: 960 tokens are 15 blocks."""
    if looped:
        always = {"most_unrolled": -1, "least_ranked": 0}
        monkeypatch.setitem(plans.load("nsa_attention"), "looped", always)
    tokens, queries = 960, 40
    q = torch.ones(1, queries, 2, 16)
    k_cmp, empty = torch.zeros(1, 59, 1, 16), torch.zeros(1, tokens, 1, 16)
    k_cmp[0, 0] = 16.0
    v_slc = torch.nn.functional.one_hot(torch.arange(tokens) // 64, 16).view(1, tokens, 1, 16)
    gates = torch.tensor([0.0, 1.0, 0.0]).expand(1, queries, 2, 3)
    values = (q, k_cmp, torch.zeros_like(k_cmp), empty, v_slc, empty, empty, gates)
    with recording() as runs:
        o = nsa.nsa_attention(
            *(x.bfloat16() for x in values), block=32, stride=16, select_block=64, num_selected=6,
            num_initial=1, num_local=2, window=64, scale=1.0,
        )  # fmt: skip
    assert [run.kernel for run in runs] == ["forward_looped" if looped else "forward"]
    taken = [row.nonzero().flatten().tolist() for row in o[0].flatten(0, 1) > 0]
    assert taken == [[0, 1, 2, 3, t // 64 - 1, t // 64] for t in range(920, 960) for _ in "gg"]


@pytest.mark.parametrize("large", [0, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_each_kv_head_has_a_bound_of_its_own(large, batch):
    """Keys of one kv head are 64 times another's: exponentials relative to the smaller bound would
    overflow. v is 1 in a head, so o is too, and lse is known from two kinds of logits."""
    k = torch.full((batch, 64, 2, 16), 1 / 16)
    k[:, :, large] = 4.0
    k[batch - 1] *= 2
    q = torch.full((batch, 64, 4, 16), 1.0)
    v = torch.ones(batch, 64, 2, 8)
    o, lse = nsa.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), scale=1.0)
    logit = k.sum(-1).repeat_interleave(2, 2)
    count = torch.arange(1.0, 65).log()[:, None]
    torch.testing.assert_close(lse, logit + count, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(o, torch.ones_like(o), rtol=0, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_that_meet_16_bit_weights_keep_more_bits(dtype):
    """Gradients of the two features sum up to 259, which bfloat16 has not, and -256."""
    x, grad = torch.zeros(1, 259, 1, 2, dtype=dtype), torch.zeros(1, 259, 1, 2, dtype=dtype)
    x[0, :256], grad[0, :, 0, 0], grad[0, :256, 0, 1] = -1.0, 1.0, -1.0
    w1 = torch.ones(2, 2, dtype=dtype, requires_grad=True)
    pe = torch.ones(1, 2, dtype=dtype, requires_grad=True)
    y = nsa.compress(x, w1, pe=pe, method="linear", block=1, stride=1)
    dw, dpe = torch.autograd.grad(y, (w1, pe), grad)
    # x gives -256 and 256; pe adds the sums.
    assert dw.tolist() == [[3.0, 0.0], [3.0, 0.0]]
    assert dpe.tolist() == [[3.0, 3.0]]


@pytest.mark.parametrize(
    ("dtype", "most"),
    [(torch.float32, 2e-7), (torch.float16, 6e-4), (torch.bfloat16, 5e-3)],
    ids=str,
)
def test_probabilities_have_the_bits_of_their_dtype(dtype, most):
    """A window of two keys with logits x and 0 and values 1 and 0: o = 1 / (1 + exp(-x))."""
    odd = torch.arange(64).remainder(2).float()
    x = torch.arange(64) / 16 - 2.0
    q, k = (torch.nn.functional.pad(each[:, None], (0, 15)) for each in (x, odd))
    q, k, v = (each.view(1, 64, 1, -1).to(dtype) for each in (q, k, odd[:, None]))
    o, lse = nsa.sliding_window_attention(q, k, v, window=2, scale=1.0)
    exact = x.double()[1:]
    assert (o[0, 1:, 0, 0] - torch.sigmoid(exact)).abs().max() < most
    assert (lse[0, 1:, 0] - torch.nn.functional.softplus(exact)).abs().max() < 3e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_statistics_reach_selection_with_all_their_bits(dtype):
    """Block 2 is one head's, block 4 the other's, whose lse is less by 2e-5: one place is free."""
    q = torch.eye(2).view(1, 1, 2, 2)
    k = torch.zeros(1, 24, 1, 2)
    k[0, 4:6, 0, 0] = k[0, 8:10, 0, 1] = 8.0
    ids = nsa.select_blocks(
        q.to(dtype), k.to(dtype), torch.tensor([[[8.03137, 8.03135]]]), kv_len=96, block=4,
        stride=4, select_block=8, num_selected=4, scale=1.0,
    )  # fmt: skip
    assert ids.flatten().tolist() == [0, 4, 10, 11]
