"""Every constant of the cycle model, written down a second time: a change of one is a decision.

The values are those of docs/trainium2.md 6.3 to 6.5 and of the sources that `parameters` names; who
finds a better one changes it there and here, and reads what `nsa profile --validate` says.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from cost_helpers import hbm, nisa, nl, psum, record, sbuf

from nsa_neuron.simulator import cost
from nsa_neuron.simulator.cost import load
from nsa_neuron.simulator.cost.parameters import CONSTANTS, DIVISORS, LEVELS, SETS

# low (the fastest), central, high
VALUES = {
    "pe_clock": (2.4, 2.4, 2.4),
    "vector_clock": (0.96, 0.96, 0.96),
    "scalar_clock": (1.2, 1.2, 1.2),
    "gpsimd_clock": (1.2, 1.2, 1.2),
    "pe_overhead": (4, 6, 8),
    "pe_minimum": (32, 64, 64),
    "pe_latency": (380, 396, 420),
    "pe_fp32_passes": (2, 2, 2),
    "pe_fp32_rows": (2, 2, 2),
    "pe_load_rate": (0.25, 0.5, 1),
    "pe_warm_up": (3000, 4600, 6200),
    "pe_cool_down": (6200, 4200, 2800),
    "minimum_interval": (64, 64, 64),
    "vector_overhead": (19, 60, 72),
    "vector_latency": (135, 152, 160),
    "vector_two_tensors": (1, 1, 1),
    "vector_mode4": (0.25, 0.25, 1),
    "vector_mode2": (0.5, 0.5, 1),
    "vector_scan": (1, 2, 2),
    "vector_reciprocal": (1, 8, 8),
    "vector_bn_aggr": (13 / 3, 13 / 3, 13 / 3),
    "vector_other": (1, 1, 4),
    "vector_composed": (2, 9, 16),
    "vector_predicated": (1, 2, 2),
    "scalar_overhead": (50, 60, 72),
    "scalar_latency": (185, 190, 345),
    "scalar_table_load": (1540, 1540, 1540),
    "accumulator_read": (64, 64, 64),
    "stride_penalty": (1.3, 2, 4),
    "stride_limit": (16, 16, 16),
    "run_time_operand": (100, 500, 2000),
    "gpsimd_fixed": (150, 150, 150),
    "gpsimd_affine": (1, 1, 1),
    "gpsimd_other": (1, 2, 4),
    "gpsimd_composed": (4, 18, 40),
    "gpsimd_rsqrt": (4, 4, 4),
    "gpsimd_across": (2, 8, 32),
    "register_access": (100, 500, 2000),
    "loop_iteration": (50, 300, 1500),
    "psum_bank_share": (0, 1, 1),
    "semaphore": (30, 37, 100),
    "dma_semaphore": (300, 344, 400),
    "core_meeting": (500, 2000, 4000),
    "dma_start": (736, 820, 1011),
    "dma_start_hwdge": (736, 1000, 1435),
    "dma_trigger": (60, 82, 620),
    "dma_run_time": (1000, 1600, 2200),
    "dma_trigger_swdge": (100, 300, 1000),
    "dma_descriptor_swdge": (5, 14, 25),
    "dma_descriptor": (0.6, 3, 8.8),
    "dma_hbm_run": (3.4, 5.8, 8.8),
    "dma_rate": (26.98, 24.4, 23),
    "dma_completion": (0, 85, 112),
    "dma_warm_up": (0, 0, 900),
    "dma_packet": (65536, 65536, 65536),
    "dma_transpose": (0.9, 0.9, 0.5),
    "dma_transpose_sbuf": (0.9, 0.7, 0.5),
    "dma_transpose_other": (0.5, 0.25, 0.05),
    "dma_collective": (1, 1, 0.25),
    "hbm_stack": (716, 640, 575),
    "launch": (9000, 15000, 17000),
    "graph_launch": (94000, 94000, 200000),
}
# The same in the set "documented", where AWS publishes another number or none.
DOCUMENTED = {
    "pe_overhead": (0, 0, 0),
    "pe_fp32_passes": (1, 1, 1),
    "pe_fp32_rows": (4, 4, 4),
    "pe_warm_up": (0, 0, 0),
    "pe_cool_down": (1000000000000.0, 1000000000000.0, 1000000000000.0),
    "vector_overhead": (0, 0, 0),
    "vector_latency": (100, 100, 100),
    "vector_two_tensors": (2, 2, 2),
    "scalar_overhead": (0, 0, 0),
    "scalar_latency": (200, 200, 345),
    "semaphore": (100, 100, 100),
    "dma_semaphore": (344, 344, 344),
    "dma_start": (1000, 1300, 1300),
    "dma_trigger": (75, 75, 75),
    "dma_descriptor": (0, 0, 0),
    "dma_hbm_run": (0, 0, 0),
    "dma_rate": (27.2, 23, 23),
    "dma_completion": (0, 0, 0),
    "dma_transpose_sbuf": (0.5, 0.5, 0.25),
    "hbm_stack": (750, 725, 716),
}
GUESSES = {
    "core_meeting", "dma_collective", "dma_descriptor_swdge", "dma_run_time",
    "dma_transpose_other", "dma_trigger_swdge", "graph_launch", "gpsimd_across",
    "gpsimd_composed", "gpsimd_other", "loop_iteration", "psum_bank_share", "register_access",
    "run_time_operand", "vector_composed", "vector_other",
}  # fmt: skip


@pytest.mark.parametrize("set_", SETS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_constant_has_the_value_that_its_source_gives(set_, level):
    wanted = {**VALUES, **DOCUMENTED} if set_ == "documented" else VALUES
    column = ("low", "central", "high").index(level)
    p = load(set_, level)
    assert {name: getattr(p, name) for name in CONSTANTS} == pytest.approx(
        {name: values[column] for name, values in wanted.items()}
    )
    assert (p.set, p.level, p.given) == (set_, level, ())


def test_guesses_are_marked():
    assert {name for name, c in CONSTANTS.items() if c.guess} == GUESSES


def test_what_the_user_gives_replaces_every_level():
    for level in LEVELS:
        p = load(level=level, given=(("dma_rate", 1.0), ("psum_bank_share", 0.0)))
        assert (p.dma_rate, p.psum_bank_share) == (1.0, 0.0)
        assert p.given == (("dma_rate", 1.0), ("psum_bank_share", 0.0))
        assert p.pe_overhead == VALUES["pe_overhead"][LEVELS.index(level)]
    for wrong in (-1e-9, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="a constant is a finite number, 0 or more"):
            load(given=(("dma_rate", wrong),))


def test_what_times_are_divided_by_is_more_than_0_and_all_else_may_be_0():
    """A transposing load, fp32 products, a wide step, a run-time address: all at no cost at all."""

    def body(x):
        index, tile, turned = sbuf((1, 1), nl.int32), sbuf((128, 128), nl.bfloat16), sbuf((64, 8))
        nisa.memset(index, 0)
        nisa.dma_transpose(tile, x)
        nisa.nc_matmul(psum((128, 128)), sbuf((128, 128)), sbuf((128, 128)))
        nisa.activation(turned, nl.exp, sbuf((64, 8, 16))[:, :, 0])
        table = hbm((4, 64, 8)).select(0, index)
        nisa.dma_copy(turned, table, dge_mode=nisa.dge_mode.hwdge)
        nl.fori_loop(0, 9, lambda i: nisa.iota(sbuf((128, 8), nl.int32), [[1, 8]]) and None)

    for name in DIVISORS:
        with pytest.raises(ValueError, match=f"{name} = 0.0: a rate is more than 0"):
            load(given=((name, 0.0),))
    free = dict.fromkeys(CONSTANTS.keys() - DIVISORS, 0.0)
    run = record(body, np.zeros((128, 128), ml_dtypes.bfloat16))
    assert 0 < cost.estimate(run, constants=free).central.total < cost.central(run).total
