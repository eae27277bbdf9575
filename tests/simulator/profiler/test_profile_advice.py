"""Each rule of advice on a kernel that deserves it and on one that does not."""

from __future__ import annotations

from pathlib import Path

import pytest
from profile_helpers import EXAMPLE, STEPS, example, hbm, nisa, nl, profile_of, psum, sbuf, shapes

from nsa_neuron.simulator.profiler import advice, rules_compute, rules_dma


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


A = shapes((128, 8192))
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
}


def faulty_and_good(rule):
    body, arguments, *kinds = CASES[rule]
    kinds = [kind if isinstance(kind, tuple) else (kind,) for kind in kinds]
    return [profile_of(body, *arguments, *kind) for kind in kinds]


@pytest.mark.parametrize("rule", CASES)
def test_rule_speaks_where_it_should_and_only_there(rule):
    faulty, good = faulty_and_good(rule)
    told = {a.rule: a for a in faulty.advice}
    assert rule in told
    assert rule not in {a.rule for a in good.advice}
    advice_ = told[rule]
    assert advice_.file == __file__
    assert Path(__file__).read_text().splitlines()[advice_.line - 1].strip() == advice_.text
    assert 0 < advice_.gain_us < faulty.time.central / 1e3
    assert advice_.gain_share == pytest.approx(advice_.gain_us * 1e3 / faulty.time.central)
    assert advice_.gain_share >= advice.WORTH
    assert advice_.message in " ".join(str(faulty).split())


def test_every_rule_has_a_case():
    rules = (*rules_dma.RULES, *rules_compute.RULES)
    assert len(rules) == len(CASES) == len(set(rules))


@pytest.mark.parametrize(
    ("rule", "within"),
    [
        ("single-buffer", 0.01),
        ("hbm-reload", 0.05),
        ("activation-table-reload", 0.01),
        ("slow-on-gpsimd", 0.01),
    ],
)
def test_gain_is_what_the_rewrite_saves(rule, within):
    """Kernels of `CASES` whose twin differs in nothing but the advice."""
    faulty, good = faulty_and_good(rule)
    promised = next(a.gain_us for a in faulty.advice if a.rule == rule)
    saved = (faulty.time.central - good.time.central) / 1e3
    assert promised == pytest.approx(saved, rel=within)


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
