"""Each rule of advice on a kernel that deserves it and on one that does not."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import rowwise
from profile_helpers import (
    EXAMPLE,
    STEPS,
    example,
    hbm,
    matmuls,
    nisa,
    nl,
    profile_of,
    psum,
    sbuf,
    shapes,
)

from nsa_neuron import simulator
from nsa_neuron.simulator.profiler import (
    advice,
    fusions,
    rules_compute,
    rules_dma,
    rules_passes,
    rules_repeat,
)
from nsa_neuron.simulator.profiler.flow import Flow


def load_columns(a, width):
    """Loads of 128 x width, each used by nobody."""
    for start in range(0, a.shape[1], width):
        nisa.dma_copy(sbuf((128, width)), a[:, start : start + width])


def few_partitions(a, rows):
    for start in range(0, a.shape[0], rows):
        nisa.dma_copy(sbuf((rows, a.shape[1])), a[start : start + rows])


def load_repeatedly(a, times):
    for _ in range(times):
        nisa.dma_copy(sbuf((128, 1024)), a)


def refill(a, fresh):
    tile = sbuf((128, 512))
    for start in range(0, a.shape[1], 512):
        if fresh:
            tile = sbuf((128, 512))
        nisa.dma_copy(tile, a[:, start : start + 512])
        nisa.activation(sbuf((128, 512)), nl.copy, tile)


def queue(a, other):
    """A load that needs a stored result holds up the loads behind it."""
    kept = hbm((128, 2048))
    tile = sbuf((128, 2048))
    nisa.memset(tile, 0.0)
    for _ in range(8):
        nisa.activation(tile, nl.exp, tile)
    nisa.dma_copy(kept, tile)
    mode = nisa.dge_mode.hwdge if other else nisa.dge_mode.unknown
    nisa.dma_copy(sbuf((128, 2048)), kept, dge_mode=mode)
    for start in range(0, a.shape[1], 2048):
        nisa.dma_copy(sbuf((128, 2048)), a[:, start : start + 2048])


def activations(width):
    for _ in range(4096 // width):
        nisa.activation(sbuf((128, width)), nl.copy, sbuf((128, width)))


def functions(sorted_):
    calls = [nl.exp, nl.silu] * 8
    if sorted_:
        calls = [nl.exp] * 8 + [nl.silu] * 8
    for function in calls:
        nisa.activation(sbuf((128, 64)), function, sbuf((128, 64)))


def banks(apart):
    """VectorE and ScalarE copy out of PSUM, from one bank or from two."""
    for _ in range(8):
        one = psum((128, 256))
        two = psum((128, 256)) if apart else one
        nisa.tensor_copy(sbuf((128, 256)), one)
        nisa.activation(sbuf((128, 256)), nl.copy, two)


def multiply(dtype, columns):
    x, y = sbuf((128, 128), dtype), sbuf((128, 512), dtype)
    for start in range(0, 4096, columns):
        part = slice(start % 512, start % 512 + columns)
        nisa.nc_matmul(psum((128, columns)), x, y[:, part])


def strided(step):
    source = sbuf((128, 512 * step))
    for _ in range(8):
        nisa.tensor_copy(sbuf((128, 512)), source[:, ::step])


def copies_on(engine):
    for _ in range(8):
        nisa.tensor_copy(sbuf((128, 512)), sbuf((128, 512)), engine=engine)


def squares(a, in_one_pass):
    """Row sums of squares."""
    for start in range(0, a.shape[1], 1024):
        tile, square, total = sbuf((128, 1024)), sbuf((128, 1024)), sbuf((128, 1))
        nisa.dma_copy(tile, a[:, start : start + 1024])
        if in_one_pass:
            nisa.activation_reduce(square, nl.square, tile, nl.add, total)
        else:
            nisa.tensor_tensor(square, tile, tile, nl.multiply)
            nisa.tensor_reduce(total, nl.add, square, axis=1)


def scaled(a, dtype):
    """((a + 1) squared) b by way of tiles of some dtype, in bf16 HBM."""
    out = hbm(a.shape, a.dtype)
    for start in range(0, a.shape[1], 2048):
        columns = slice(start, start + 2048)
        tile, result = sbuf((128, 2048), a.dtype), sbuf((128, 2048), a.dtype)
        one, two = sbuf((128, 2048), dtype), sbuf((128, 2048), dtype)
        nisa.dma_copy(tile, a[:, columns])
        nisa.tensor_scalar(one, tile, nl.add, 1.0, op1=nl.multiply, operand1=2.0)
        nisa.tensor_tensor(two, one, one, nl.multiply)
        nisa.tensor_tensor(result, two, tile, nl.multiply)
        nisa.dma_copy(out[:, columns], result)
    return out


def copies_in(a, on_scalar):
    """VectorE adds; somebody copies."""
    for start in range(0, a.shape[1], 1024):
        tile, total, kept = sbuf((128, 1024)), sbuf((128, 1024)), sbuf((128, 1024))
        nisa.dma_copy(tile, a[:, start : start + 1024])
        nisa.tensor_tensor(total, tile, tile, nl.add)
        engine = nisa.engine.scalar if on_scalar else nisa.engine.vector
        nisa.tensor_copy(kept, tile, engine=engine)


A = shapes((128, 8192))
BF16 = shapes((128, 8192), dtype="bfloat16")
ONE = shapes((128, 1024))
# rule -> a kernel, its arguments, and what makes it faulty and what good
CASES = {
    "dma-small-rows": (load_columns, A, 64, 1024),
    "dma-few-engines": (few_partitions, A, 16, 128),
    "dma-small-transfers": (load_columns, A, 64, 1024),
    "hbm-reload": (load_repeatedly, ONE, 8, 1),
    "single-buffer": (refill, A, False, True),
    "dma-queue-blocked": (queue, A, False, True),
    "unbatched-activations": (activations, [], 32, 512),
    "activation-table-reload": (functions, [], False, True),
    "psum-bank-conflict": (banks, [], False, True),
    "matmul-fp32": (multiply, [], (nl.float32, 512), (nl.bfloat16, 512)),
    "matmul-few-columns": (multiply, [], (nl.bfloat16, 32), (nl.bfloat16, 512)),
    "wide-stride": (strided, [], 9, 2),
    "slow-on-gpsimd": (copies_on, [], nisa.engine.gpsimd, nisa.engine.vector),
    "adjacent-passes": (squares, A, False, True),
    "fp32-tiles": (scaled, BF16, nl.float32, nl.bfloat16),
    "idle-engine": (copies_in, A, False, True),
    "run-time-operands": (rowwise.doubled, shapes((8, 128, 2048)), False, True),
}
INPUTS = shapes((512, 2048), (1, 2048), dtype="bfloat16")


def faulty_and_good(rule):
    if rule == "same-work-on-both-cores":
        kernels = (rowwise.rms_norm, rowwise.rms_norm_halved)
        return [profile_of(kernel, *INPUTS, lnc=2) for kernel in kernels]
    body, arguments, *kinds = CASES[rule]
    kinds = [kind if isinstance(kind, tuple) else (kind,) for kind in kinds]
    return [profile_of(body, *arguments, *kind) for kind in kinds]


@pytest.mark.parametrize("rule", [*CASES, "same-work-on-both-cores"])
def test_rule_speaks_where_it_should_and_only_there(rule):
    faulty, good = faulty_and_good(rule)
    told = {a.rule: a for a in faulty.advice}
    assert rule in told
    assert rule not in {a.rule for a in good.advice}
    advice_ = told[rule]
    file = Path(advice_.file)
    assert file in (Path(__file__), Path(rowwise.__file__))
    assert file.read_text().splitlines()[advice_.line - 1].strip() == advice_.text
    assert 0 < advice_.gain_us < faulty.time.central / 1e3
    assert advice_.gain_share == pytest.approx(advice_.gain_us * 1e3 / faulty.time.central)
    assert advice_.gain_share >= advice.WORTH
    assert advice_.message in " ".join(str(faulty).split())


def test_every_rule_has_a_case():
    rules = {*(*rules_dma.RULES, *rules_compute.RULES, *rules_passes.RULES, *rules_repeat.RULES)}
    assert rules == set(advice.RULES) and len(rules) == len(CASES) + 1  # and the one of two cores


@pytest.mark.parametrize(
    ("rule", "within"),
    [
        ("single-buffer", 0.01),
        ("hbm-reload", 0.05),
        ("activation-table-reload", 0.01),
        ("matmul-fp32", 0.01),
        ("wide-stride", 0.01),
        ("unbatched-activations", 0.04),
        ("slow-on-gpsimd", 0.01),
        ("adjacent-passes", 0.02),
        ("fp32-tiles", 0.02),
        ("idle-engine", 0.02),
        ("same-work-on-both-cores", 0.03),
        ("run-time-operands", 0.01),
    ],
)
def test_gain_is_what_the_rewrite_saves(rule, within):
    """Kernels of `CASES` whose twin differs in nothing but the advice."""
    faulty, good = faulty_and_good(rule)
    promised = next(a.gain_us for a in faulty.advice if a.rule == rule)
    saved = (faulty.time.central - good.time.central) / 1e3
    assert promised == pytest.approx(saved, rel=within)


FULL = shapes((2048, 4096), (1, 4096), dtype="bfloat16")


@pytest.mark.parametrize(
    ("plain", "rewritten", "faster"),
    [
        (rowwise.rms_norm, rowwise.rms_norm_fused, 3.2),
        (rowwise.softmax, rowwise.softmax_apart, 2.4),
    ],
)
def test_what_the_advice_gains_at_once_is_what_the_rewritten_kernel_gains(plain, rewritten, faster):
    """Row-wise kernels of 2048 x 4096 in bf16: fused, in bf16 tiles, on both engines."""
    inputs = FULL[:1] if plain is rowwise.softmax else FULL
    before, after = (profile_of(kernel, *inputs) for kernel in (plain, rewritten))
    saved = (before.time.central - after.time.central) / 1e3
    together = before.together
    assert together.gain_us == pytest.approx(saved, rel=0.02)
    assert before.time.central / after.time.central == pytest.approx(faster, abs=0.1)
    assert together.speedup == pytest.approx(faster, abs=0.1)
    assert {before.advice[k].rule for k in together.of} >= {"adjacent-passes", "fp32-tiles"}
    assert f"{together.speedup:.2f} times as fast" in str(before)
    assert len(together.of) < len(before.advice)  # what does not help then is left out
    assert after.together is None


def test_one_piece_of_softmax_s_advice_alone_makes_it_1_3_times_faster():
    before, after = (profile_of(k, FULL[0]) for k in (rowwise.softmax, rowwise.softmax_summed))
    told = next(a for a in before.advice if "sums each row while it computes" in a.message)
    saved = before.time.central - after.time.central
    assert told.gain_us * 1e3 == pytest.approx(saved, rel=0.02)
    assert before.time.central / after.time.central == pytest.approx(1.3, abs=0.06)


def test_rewritten_kernels_compute_what_they_did():
    """The twins of `rowwise` agree with NumPy, with data."""
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal((256, 512)), rng.standard_normal((1, 512))
    exponent = np.exp(x - x.max(axis=1, keepdims=True))
    wanted = {
        "rms_norm": x / np.sqrt((x * x).mean(axis=1, keepdims=True)) * w,
        "softmax": exponent / exponent.sum(axis=1, keepdims=True),
    }
    x, w = x.astype(ml_dtypes.bfloat16), w.astype(ml_dtypes.bfloat16)
    for kernel, lnc in KERNELS.items():
        name = "softmax" if kernel.__name__.startswith("softmax") else "rms_norm"
        given = (x,) if name == "softmax" else (x, w)
        got = simulator.simulate(simulator.Kernel(kernel, lnc))(*given)
        scale = np.abs(wanted[name]).max()
        assert np.abs(got.astype(float) - wanted[name]).max() < 0.02 * scale, kernel.__name__


KERNELS = {
    rowwise.rms_norm: 1,
    rowwise.rms_norm_fused: 1,
    rowwise.rms_norm_halved: 2,
    rowwise.softmax: 1,
    rowwise.softmax_fused: 1,
    rowwise.softmax_apart: 1,
    rowwise.softmax_summed: 1,
}


def test_advice_is_sorted_by_gain_and_speaks_of_kernel_lines():
    found = example(STEPS[0]).advice
    gains = [a.gain_us for a in found]
    assert gains and gains == sorted(gains, reverse=True)
    assert {a.file for a in found} == {str(EXAMPLE)}


def test_a_what_if_leaves_the_profile_as_it_was():
    found = example(STEPS[1], 256, 512, 256)
    before = found.timeline.end.copy()
    assert found.advice
    assert (found.timeline.end == before).all()
    assert example(STEPS[1], 256, 512, 256).to_dict() == found.to_dict()


def test_a_pass_that_others_read_is_not_fused_away():
    """one is multiplied, and in every second iteration stored as well."""

    def body(a):
        out = hbm(a.shape, a.dtype)
        for start in range(0, a.shape[1], 1024):
            columns = slice(start, start + 1024)
            tile, one, two = (sbuf((128, 1024)) for _ in range(3))
            nisa.dma_copy(tile, a[:, columns])
            nisa.tensor_scalar(one, tile, nl.multiply, 2.0)
            nisa.tensor_tensor(two, one, tile, nl.multiply)
            nisa.dma_copy(out[:, columns], two if start % 2048 else one)
        return out

    found = profile_of(body, *A)
    pairs = fusions.fusions(found.run.instructions, Flow(found.run))
    assert [a // 4 for a, _, _ in pairs] == [1, 3, 5, 7]  # four instructions an iteration


def widened(a):
    out = hbm(a.shape)
    tile, one, two = sbuf(a.shape, a.dtype), sbuf(a.shape), sbuf(a.shape)
    nisa.dma_copy(tile, a)
    nisa.tensor_scalar(one, tile, nl.add, 1.0)
    nisa.tensor_tensor(two, one, one, nl.multiply)
    nisa.dma_copy(out, two)
    return out


@pytest.mark.parametrize("kernel", [lambda: profile_of(scaled, *A, nl.float32),
                                    lambda: profile_of(widened, *BF16)],
                         ids=["fp32 to fp32", "bf16 to fp32"])  # fmt: skip
def test_fp32_results_are_not_told_to_be_narrow(kernel):
    assert "fp32-tiles" not in {piece.rule for piece in kernel().advice}


def test_products_that_both_cores_compute_are_the_same_work():
    found = profile_of(matmuls, *shapes((512, 128), (512, 4096), dtype="bfloat16"), lnc=2)
    assert "same-work-on-both-cores" in {a.rule for a in found.advice}
    flow, half = Flow(found.run), len(found.run.cores[0].instructions)
    assert flow.values[:half] == flow.values[half:] and len(set(flow.values)) > half / 2
