"""Legal numbers without an end, layouts mistaken, values that are not finite, other threads."""

from __future__ import annotations

import contextvars
import threading

import pytest
import torch

import nsa_neuron as nsa
from nsa_neuron.backends.cpu.native_mode import build
from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.registry import requested
from nsa_neuron.spec import MAX_INT

ON_CPU = ["reference", "cpu:torch", "cpu:native"]
BACKENDS = [
    *ON_CPU, *(pytest.param(name, marks=pytest.mark.sim) for name in ("cuda:sim", "neuron:sim"))
]  # fmt: skip
WITH_GRADIENTS = [*ON_CPU, pytest.param("neuron:sim", marks=pytest.mark.sim)]
SMALL = {"block": 8, "stride": 4, "select_block": 16, "num_selected": 4, "window": 6}


def tensors(tokens=20, seed=0, batch=1):
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, tokens, 4, 16, generator=g)
    k = torch.randn(batch, tokens, 2, 16, generator=g)
    v = torch.randn(batch, tokens, 2, 8, generator=g)
    gates = torch.rand(batch, tokens, 4, 3, generator=g)
    return q, k, v, gates


def whole(q, k, v, gates, offsets=None, **scalars):
    packed = {} if offsets is None else {"cu_seqlens_k": offsets}
    k_cmp, v_cmp = (nsa.compress(x, block=8, stride=4, **packed) for x in (k, v))
    if offsets is not None:
        packed["cu_seqlens_q"] = offsets
    return nsa.nsa_attention(q, k_cmp, v_cmp, k, v, k, v, gates, **packed, **{**SMALL, **scalars})


def available(backend):
    if backend.startswith("cuda"):
        pytest.importorskip("triton")
    if backend == "cpu:native" and build.hindrance():
        pytest.skip(f"no kernels: {build.hindrance()}")
    return nsa.use_backend(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("large", "same"),
    [
        ({"window": MAX_INT}, {"window": 20}),
        ({"num_selected": MAX_INT}, {"num_selected": 4}),
        ({"select_block": 2**30, "num_selected": 2**20}, {"select_block": 20}),
    ],
    ids=str,
)
def test_more_than_all_is_all(backend, large, same):
    given = tensors()
    with nsa.use_backend("reference"):
        good = whole(*given, **same)
    with available(backend):
        torch.testing.assert_close(whole(*given, **large), good)


@pytest.mark.parametrize("backend", WITH_GRADIENTS)
def test_more_than_all_trains(backend):
    grads = []
    for scalars in ({"window": 20, "num_selected": 4}, {"window": MAX_INT, "num_selected": 50}):
        given = [x.requires_grad_() for x in tensors()]
        with nsa.use_backend(backend):
            whole(*given, **scalars).square().sum().backward()
        grads.append([x.grad for x in given])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ids_beyond_the_blocks_are_padding(backend):
    q, k, v, _ = tensors()
    k_cmp, v_cmp = nsa.compress(k, block=8, stride=4), nsa.compress(v, block=8, stride=4)
    place = {"kv_len": 20, "block": 8, "stride": 4}
    _, lse = nsa.compressed_attention(q, k_cmp, v_cmp, **place)
    with available(backend):
        ids = nsa.select_blocks(q, k_cmp, lse, **place, select_block=16, num_selected=1000)
        assert ids.shape[-1] == 1000 and (ids[..., 3:] == -1).all()
        a, _ = nsa.selected_attention(q, k, v, ids[..., :3].contiguous(), select_block=16)
        b, _ = nsa.selected_attention(q, k, v, ids[..., :16].contiguous(), select_block=16)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, nsa.attention(q, k, v)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_selection_block_of_any_size(backend):
    q, k, v, _ = tensors()
    ids = torch.zeros(1, 20, 2, 1, dtype=torch.int32)
    with available(backend):
        o, _ = nsa.selected_attention(q, k, v, ids, select_block=MAX_INT)
    torch.testing.assert_close(o, nsa.attention(q, k, v)[0])


@pytest.mark.parametrize("value", [2**31, 2**63, 10**30])
def test_numbers_that_no_kernel_counts_to_are_refused(value):
    q, k, v, _ = tensors()
    with pytest.raises(InvalidArgument, match=f"at most {MAX_INT}") as caught:
        nsa.sliding_window_attention(q, k, v, window=value)
    assert caught.value.argument == "window"


def test_heads_before_tokens_get_a_hint():
    q, k, _, _ = tensors()
    q, k = q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()
    for call in (
        lambda: nsa.attention(q, k, k),
        lambda: nsa.sliding_window_attention(q, k, k),
        lambda: torch.ops.nsa.attention(q, k, k),
    ):
        with pytest.raises(InvalidArgument, match=r"look like \[B, H, S, D\].*transpose\(1, 2\)"):
            call()
    with pytest.raises(InvalidArgument) as caught:
        nsa.attention(
            torch.randn(1, 20, 4, 16), torch.randn(1, 20, 3, 16), torch.randn(1, 20, 3, 8)
        )
    assert "look like" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused_with_what_to_do(layout):
    x = torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (3, 5)], layout=layout)
    with pytest.raises(InvalidType, match=r"nested tensor.*cu_seqlens"):
        nsa.attention(x, x, x)


# Rule for values: within a sequence every token must be finite (a NaN times a probability of 0 is a
# NaN, as in torch's own attention); between sequences nothing passes, whatever they hold.


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_not_finite_stay_in_their_packed_sequence(backend):
    q, k, v, gates = tensors(40)
    offsets = torch.tensor([0, 13, 27, 40], dtype=torch.int32)
    spoiled = v.clone()
    spoiled[0, 13:20], spoiled[0, 20:27] = float("nan"), float("inf")
    with nsa.use_backend("reference"):
        good = whole(q, k, v, gates, offsets), nsa.attention(q, k, v, offsets, offsets)[0]
    with available(backend):
        for clean, dirty in (
            (good[0], whole(q, k, spoiled, gates, offsets)),
            (good[1], nsa.attention(q, k, spoiled, offsets, offsets)[0]),
        ):
            for part in (slice(0, 13), slice(27, 40)):
                torch.testing.assert_close(dirty[:, part], clean[:, part])
            assert not dirty[:, 26].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:All-NaN")
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_are_not_finite_stay_in_their_batch_row(backend):
    q, k, v, gates = tensors(20, batch=2)
    spoiled = (q.clone(), k.clone(), v.clone(), gates)
    for x in spoiled[:3]:
        x[1] = float("nan")
    with nsa.use_backend("reference"):
        good = whole(q, k, v, gates)[0]
    with available(backend):
        torch.testing.assert_close(whole(*spoiled)[0], good)


@pytest.mark.parametrize("backend", WITH_GRADIENTS)
def test_gradients_that_are_not_finite_stay_in_their_packed_sequence(backend):
    given = [x.requires_grad_() for x in tensors(40)]
    offsets = torch.tensor([0, 13, 27, 40], dtype=torch.int32)
    weight = torch.ones(1, 40, 4, 8)
    grads = []
    for value in (1.0, float("nan")):
        weight[:, 13:27] = value
        with nsa.use_backend(backend):
            grads.append(torch.autograd.grad((whole(*given, offsets) * weight).sum(), given))
    for clean, dirty in zip(*grads, strict=True):
        for part in (slice(0, 13), slice(27, 40)):
            torch.testing.assert_close(dirty[:, part], clean[:, part])


def test_a_request_holds_in_its_thread_and_travels_with_its_context():
    seen = []

    def look():
        seen.append(requested())

    with nsa.use_backend("reference"):
        plain = threading.Thread(target=look)
        carried = threading.Thread(target=contextvars.copy_context().run, args=(look,))
        for thread in (plain, carried):
            thread.start()
            thread.join()
    assert seen == [None, "reference:eager"]


def test_the_base_error_is_public():
    assert nsa.NsaError in InvalidArgument.__mro__
