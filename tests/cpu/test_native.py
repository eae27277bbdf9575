"""What `cpu:native` promises beyond the conformance suite: threads, any geometry, no crash."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nsa_neuron as nsa
from nsa_neuron.backends.cpu.native_mode import IMPLEMENTATIONS, build, extension
from nsa_neuron.cases import Case, cast
from nsa_neuron.errors import InvalidArgument
from nsa_neuron.ops import get
from nsa_neuron.registry import REGISTRY, use_backend

pytestmark = pytest.mark.skipif(bool(build.hindrance()), reason=f"no kernels: {build.hindrance()}")

SMALL = {"block": 8, "stride": 4, "select_block": 16, "num_selected": 5}


def inputs(op: str, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, object]:
    """Arguments of an op at a size, at a small geometry where it has one."""
    spec = get(op)
    shape = {"B": 1, "S": 70, "T": 70, "Hq": 4, "Hkv": 2, "Dk": 16, "Dv": 24} | sizes
    known = {arg.name for arg in spec.scalars}
    scalars = {name: value for name, value in SMALL.items() if name in known}
    if "window" in known:
        scalars["window"] = 20
    return spec.arguments(Case(f"{op}-{sizes}", ("edge",), shape, scalars), dtype)


def call(op: str, values: dict[str, object]) -> tuple[torch.Tensor, ...]:
    with torch.no_grad(), use_backend("cpu:native"):
        out = getattr(torch.ops.nsa, op).default(**values)
    return out if isinstance(out, tuple) else (out,)


OPS = [
    name for name in IMPLEMENTATIONS if not name.startswith(("compress_b", "compress", "decode"))
]
OPS += [name for name in IMPLEMENTATIONS if name.startswith("compressed")]


@pytest.mark.parametrize("op", sorted(set(OPS)))
@pytest.mark.parametrize("sizes", [{"S": 300, "T": 300}, {"S": 1, "T": 300}], ids=["many", "one"])
def test_the_number_of_threads_changes_no_bit(op, sizes):
    values, before = inputs(op, **sizes), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(call(op, values))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@settings(max_examples=40)
@given(data=st.data())
def test_any_geometry(data):
    """Group sizes, dims, lengths, blocks and windows that no case of the suite has."""
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    op = draw("nsa_attention_forward", "nsa_attention_backward", "selected_attention_backward")
    hkv, d = draw(1, 2, 3), draw(1, 2, 4)
    l = d * draw(1, 2, 3)
    m = d * draw(3, 4, 7)
    s = draw(1, 2, 8, 9, 33, 130)
    sizes = {"B": draw(1, 2), "S": s, "T": s + draw(0, 1, 70), "Hq": hkv * draw(1, 5, 16, 40)}
    sizes |= {"Hkv": hkv, "Dk": draw(1, 7, 64), "Dv": draw(1, 9, 32)}
    scalars = {"select_block": m}
    if op.startswith("nsa"):
        scalars |= {"block": l, "stride": d, "num_selected": draw(3, 4, 70)}
        scalars |= {
            "window": draw(1, 5, 64, 1000),
            "num_initial": draw(0, 1),
            "num_local": draw(1, 2),
        }
    spec = get(op)
    values = spec.arguments(Case(str(sizes), ("edge",), sizes, scalars), torch.float32)
    got = call(op, values)
    exact = spec.reference(**cast(values, torch.float64, ()))
    eager = spec.reference(**values)
    for item, mine, oracle, plain in zip(spec.returns, got, exact, eager, strict=True):
        diff = spec.compare[item.name](mine, oracle, plain, values)
        assert diff.ok, f"{op} {sizes} {scalars}: {item.name}: {diff.detail}"


@pytest.mark.parametrize("s", [1, 70], ids=["one", "many"])
@pytest.mark.parametrize("op", ["selected_attention", "selected_attention_backward"])
@pytest.mark.parametrize(
    "row", [[0, 0, 1], [-2, 0, 1], [0, 1, 5], [2**31 - 1, 0, -1], [-(2**31), 0, 1]]
)
def test_kernels_refuse_ids_themselves(op, s, row):
    """Past the router, whose own check could be wrong: no id makes a kernel read out of bounds."""
    values = inputs(op, S=s)
    values["block_indices"] = torch.tensor(row, dtype=torch.int32).expand(1, s, 2, 3)
    with pytest.raises(InvalidArgument, match="block_indices"):
        IMPLEMENTATIONS[op](**values)


@pytest.mark.parametrize("page", [-1, 99, 2**31 - 1])
def test_the_decode_kernel_refuses_tables_itself(page):
    spec = get("decode")
    case = next(c for c in spec.cases if c.name == "two_sequences")
    values = spec.arguments(case, torch.float32)
    values["slc_table"][0, 0] = page
    with pytest.raises(InvalidArgument, match="page"):
        IMPLEMENTATIONS["decode"](**values)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("s", [1, 70], ids=["one", "many"])
def test_no_value_makes_ids_illegal_or_ends_the_process(value, s):
    values = inputs("nsa_attention_forward", S=s)
    for name in ("q", "k_cmp", "v_slc"):
        values[name][:, -1] = value
    _, ids, *_ = call("nsa_attention_forward", values)
    used = ids[ids >= 0]
    assert int(used.max()) <= 69 // 16 and int(ids.min()) >= -1


@pytest.mark.parametrize("queries", [1, 3, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_of_equal_blocks_the_first_are_chosen(queries, dtype):
    """Queries of 0 weigh all keys alike, so every block but the first and the last ones ties."""
    values = inputs("select_blocks", dtype, S=queries, T=160)
    values |= {"q": values["q"] * 0, "kv_len": 160, "num_initial": 1, "num_local": 2}
    t = torch.arange(160 - queries, 160)
    keys = ((t - 8) // 4 + 1).clamp(min=0)  # compressed keys that a query sees
    values["lse"] = keys.float().log()[None, :, None].expand(1, -1, 4).contiguous()
    (ids,) = call("select_blocks", values)
    for token, row in zip(t.tolist(), ids[0].tolist(), strict=True):
        own = token // 16
        expected = sorted({0, 1, 2, max(own - 1, 0), own} & set(range(own + 1)))
        if own >= 4:
            assert row == [expected] * 2, token


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_overlap_in_memory_are_read_as_they_are(queries, dtype):
    """One key for all tokens, keys that share all channels but one, and views of every second."""
    values = inputs("attention", dtype, S=queries)
    k, v = values["k"], values["v"]
    line = torch.randn(2, 70 + 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    views = {
        "one for all": (k[:, :1].expand_as(k), v[:, :1].expand_as(v)),
        "shifted": (line.as_strided((1, 70, 2, 16), (0, 1, 86, 1)), v),
        "every second": (torch.cat([k, k], 1)[:, ::2], torch.cat([v, v], 3)[..., ::2]),
    }
    for name, (keys, channels) in views.items():
        given_ = values | {"k": keys, "v": channels}
        whole = values | {"k": keys.contiguous(), "v": channels.contiguous()}
        for got, want in zip(call("attention", given_), call("attention", whole), strict=True):
            assert torch.equal(got, want), name


def test_a_call_in_a_thread_pool_runs_alone_and_right():
    """A parallel region of torch's own around a call: OpenMP must not be entered twice."""
    values = inputs("nsa_attention", S=120, T=120)
    before = torch.get_num_threads()
    wanted = call("nsa_attention", values)[0]
    with torch.inference_mode(), use_backend("cpu:native"):
        futures = [torch.jit.fork(lambda: nsa.nsa_attention(**values)) for _ in range(4)]
        assert all(torch.equal(torch.jit.wait(each), wanted) for each in futures)
    assert torch.get_num_threads() == before


def test_failures_become_exceptions():
    """A call that asks for more memory than there is."""
    q = torch.zeros(1, 9, 1, 1)
    k = torch.zeros(1, 1, 1, 1).expand(1, 9, 1, 1)
    ids = torch.zeros(1, 9, 1, 1, dtype=torch.int32)
    huge = {"select_block": 2**58, "scale": None}
    with pytest.raises((MemoryError, nsa.errors.NsaError), match="selected_attention"):
        IMPLEMENTATIONS["selected_attention"](q, k, k, ids, **huge)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", sorted(IMPLEMENTATIONS))
def test_it_is_what_cpu_tensors_get_unasked(op, dtype):
    """So tests/torch_ops (fuzz, opcheck, vmap, export, inductor) try it, which ask for nothing."""
    spec = get(op)
    bound = spec.bind(spec.arguments(spec.cases[0], dtype))
    assert str(REGISTRY.select(bound, None).target) == "cpu:native"


@pytest.mark.slow
def test_avx2_is_chosen_at_run_time_and_right():
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    code = (
        "from nsa_neuron.backends.cpu.native_mode import build, extension; extension.load()\n"
        "assert 'avx2' in build.library_name(), build.library_name()\n"
        "from nsa_neuron import conformance\n"
        "report = conformance.run(['cpu:native'], tags=['smoke'])\n"
        "print(report.ran, [str(row) for row in report.failures])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    ran, failed = done.stdout.split(maxsplit=1)
    assert int(ran) > 50 and failed.strip() == "[]"


def test_the_library_knows_the_record_of_a_call():
    assert extension.load().nsa_call_size() > 0


def test_ids_are_checked_by_the_kernel_alone_after_the_first_call(monkeypatch):
    values = inputs("selected_attention", S=37)
    call("selected_attention", values)
    spec = get("selected_attention")
    monkeypatch.setitem(spec.__dict__, "check_values", None)  # the router must not call it
    call("selected_attention", {**values, "block_indices": values["block_indices"].clone()})
    values["block_indices"][0, 20, 1, 0] = 99
    with pytest.raises(InvalidArgument, match="id 99 of query 20"):
        call("selected_attention", values)
