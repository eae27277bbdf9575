"""The interpreter under a GPU's rules: what is a fault or a race there is refused here, by name."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext, suppress

import pytest

pytest.importorskip("triton")

import numpy as np
import racing_kernels as KERNELS
import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime.errors import InterpreterError

from nsa_neuron.conformance import Problem, Status, find_targets, try_problem
from nsa_neuron.errors import KernelFault
from nsa_neuron.interpreted_grid import places, program_order
from nsa_neuron.interpreted_language import INTERPRETED_LANGUAGE
from nsa_neuron.interpreted_watch import Watch
from nsa_neuron.ops import get

SIZE = 8


def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    """x, and a result in the middle of a larger storage: neighbours would take a stray store."""
    return torch.arange(SIZE, dtype=torch.float32), torch.full((3, SIZE), -1.0)[1]


def launch(name: str, *more: int) -> torch.Tensor:
    x, out = tensors()
    getattr(KERNELS, name)[(2,)](x, out, SIZE, *more)
    return out


def test_a_sound_kernel_runs_in_any_order():
    for order in ("ascending", "descending", 0, 1):
        with program_order(order):
            assert launch("halves", 0).tolist() == [2 * i for i in range(SIZE)]


FAULTS = [
    ("halves", 1, r"program \(1, 0, 0\): loads 1 elements outside its tensors, the first 0 bytes "
     r"behind 'x' \(float32 \[8\]\)"),
    ("loads_before", -1, r"loads 1 elements outside its tensors, the first 4 bytes before 'x'"),
    ("stores_behind", 1, r"stores 1 elements outside its tensors, the first 0 bytes behind 'out'"),
    ("overlaps", 1, r"stores element 4 of 'out' .*, which program \([01], 0, 0\) stored: a race"),
    ("reads_the_other", 4, r"loads element [04] of 'out' .*, which program \([01], 0, 0\) stored"),
    ("lanes_meet", 2, r"lanes of one store bring different values to element [04] of 'out'"),
    ("reads_back", 1, r"loads element [04] of 'out' .*, which it stored with no barrier between"),
    ("turns", 1, r"stores element [04] of 'out' .*, which another lane loaded with no barrier"),
    ("takes_first", 1, r"stores element [04] of 'out' .*, which another lane loaded with no bar"),
    ("hints", 2, r"says that [26] is a multiple of 4"),
]  # fmt: skip


@pytest.mark.parametrize("order", ["ascending", "descending", 0])
@pytest.mark.parametrize(("name", "off", "said"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_what_a_gpu_forbids_is_refused_and_one_step_inside_is_not(name, off, said, order):
    with program_order(order):
        launch(name, 0)
        with pytest.raises(KernelFault, match=f"kernel '{name}', .*{said}"):
            launch(name, off)


def test_lanes_that_agree_may_meet():
    out = tensors()[1]
    KERNELS.lanes_meet[(1,)](torch.ones(SIZE), out, SIZE, 2)
    assert out[:4].tolist() == [1.0] * 4


def test_other_errors_of_a_kernel_keep_their_cause():
    with pytest.raises(InterpreterError, match="a defect of another kind") as caught:
        launch("raises", 0)
    assert isinstance(caught.value.__cause__, AssertionError)


def test_masked_lanes_may_point_anywhere():
    assert launch("masked", 1 << 40).tolist() == [0.0, 1, 2, 3, 4, 5, 6, -1]


def test_the_last_program_may_read_what_the_others_stored_before_an_atomic():
    out, counter = torch.zeros(5), torch.zeros(1, dtype=torch.int32)
    for order in ("ascending", "descending", 3):
        counter.zero_()
        with program_order(order):
            KERNELS.last_adds_up[(4,)](out, counter, 4, True)
        assert out.tolist() == [1, 2, 3, 4, 10]
    with pytest.raises(KernelFault, match="a race"):
        KERNELS.last_adds_up[(4,)](out, counter.zero_(), 4, False)
    with program_order("ascending"), pytest.raises(KernelFault, match="a race"):
        KERNELS.one_stays_away[(4,)](out, counter.zero_(), 4)  # excused are those who came


@pytest.mark.parametrize(
    ("left_out", "said"),
    [
        ({"BEFORE": False}, "which program .* stored: a race"),
        ({"BEHIND": False}, "which program .* stored: a race"),
        ({"SEM": "relaxed"}, "which program .* stored: a race"),
        ({"SEM": "acquire"}, "which program .* stored: a race"),
        ({"SCOPE": "cta"}, "which program .* stored: a race"),
        ({"CACHE": ""}, r"loads what other programs stored to 'out' .* through L1"),
    ],
    ids=str,
)
def test_an_atomic_orders_what_barriers_and_its_scope_let_it(left_out, said):
    out, counter = torch.zeros(5), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(KernelFault, match=said):
        KERNELS.last_adds_up[(4,)](out, counter, 4, True, **left_out)


@pytest.mark.parametrize(
    ("cache", "sound"), [(".cg", True), (".cv", True), (".ca", False), ("", False)]
)
@pytest.mark.parametrize("words", [False, True], ids=["enumeration", "words"])
def test_a_load_says_that_it_goes_past_l1_by_an_enumeration_or_by_words(
    cache, sound, words, monkeypatch
):
    """From Triton 3.9 on a load asks the builder for its policy; the pinned Triton is made to."""

    def policy(semantic, modifier):
        return semantic.builder.get_cache_policy(
            modifier.removeprefix(".") or "none", "evict_normal"
        )

    if words:
        monkeypatch.setattr(TritonSemantic, "_str_to_load_cache_modifier", policy)
    out, counter = torch.zeros(5), torch.zeros(1, dtype=torch.int32)
    with nullcontext() if sound else pytest.raises(KernelFault, match="through L1"):
        KERNELS.last_adds_up[(4,)](out, counter, 4, True, CACHE=cache)
        assert out[4] == 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
def test_what_a_mask_leaves_out_is_anything_unless_it_is_said(dtype):
    x, out = torch.ones(4, dtype=dtype), torch.zeros(4, dtype=dtype)
    KERNELS.leaves_out[(1,)](x, out, 4, True)
    assert out.tolist() == [1, 1, 1, 0]
    KERNELS.leaves_out[(1,)](x, out, 4, False)
    assert out[:3].tolist() == [1, 1, 1]
    assert out[3].isnan() if dtype.is_floating_point else out[3] == 0x55555555


def test_a_view_is_its_elements_not_its_storage():
    x = torch.arange(3 * SIZE, dtype=torch.float32)
    with pytest.raises(KernelFault, match="behind 'x'"):
        KERNELS.halves[(2,)](x[:SIZE], torch.empty(SIZE), SIZE, 1)
    with pytest.raises(KernelFault, match="before 'x'"):
        KERNELS.loads_before[(2,)](x[SIZE:], torch.empty(SIZE), SIZE, -1)


def test_tiles_may_reach_into_several_tensors():
    """Each address is looked up by itself where no tensor holds all of them."""
    both = {name: torch.zeros(4, dtype=torch.int16) for name in "ab"}
    watch = Watch("reaches", both, (1, 1, 1))
    a, b = (x.data_ptr() for x in both.values())
    assert watch.inside("loads", np.array([a, b + 6])).name == "a"
    assert watch.inside("loads", np.array([[b + 6, a]])).name == "b"
    assert watch.inside("updates", np.array([], np.uint64)).name == "a"
    for stray, said in ((a - 2, "2 bytes before 'a'"), (b + 8, "0 bytes behind 'b'")):
        apart = abs(a - b) > 64  # else the neighbour may be the nearer one
        with pytest.raises(KernelFault, match=f"loads 1 elements .*{said if apart else 'bytes'}"):
            watch.inside("loads", np.array([a, b, stray]))


def test_hooks_of_a_kernel_see_its_arguments():
    seen = []
    KERNELS.masked.add_pre_run_hook(lambda x, out, size, off: seen.append((size, off)))
    try:
        launch("masked", 5)
    finally:
        KERNELS.masked.pre_run_hooks.clear()
    assert seen == [(SIZE, 5)]


def test_without_tensors_nothing_may_be_touched():
    with pytest.raises(KernelFault, match="was given no tensor"):
        KERNELS.halves[(2,)](torch.empty(0), torch.empty(0), SIZE, 0)


def test_orders_are_permutations_and_the_shuffle_is_one():
    for order in ("ascending", "descending", 0, 7):
        assert sorted(places(order, 50)) == list(range(50))
    assert list(places(0, 50)) == list(places(0, 50)) != list(range(50))
    assert list(places("descending", 3)) == [2, 1, 0]
    with pytest.raises(ValueError, match="no order 'sideways'"):
        places("sideways", 3)


def test_what_others_interpret_is_left_alone():
    """Kernels that this project did not load keep Triton's own interpreter."""
    code = (
        "import torch, triton, triton.language as tl\n"
        "from nsa_neuron.backends.cuda import kernel_package\n"
        "kernel_package('sim').load('gated_sum')\n"
        "from triton.runtime import interpreter\n"
        "assert interpreter.InterpretedFunction.__module__ == 'triton.runtime.interpreter'\n"
        "assert not {'create_masked_load', 'set_grid_idx'} & set(vars(interpreter."
        "interpreter_builder))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


ANY_ORDER = [
    ("compress_backward", "mlp_kv2"),
    ("compressed_attention_backward", "packed_dead_rows"),
    ("select_blocks", "no_initial_one_local"),
    ("selected_attention_backward", "dead_rows"),
    ("sliding_window_attention_backward", "dims_odd_80_24"),
    ("attention_backward", "m_plus_1"),
    ("decode", "group3"),
    ("decode", "two_sequences"),
    ("gated_sum_backward", "m_plus_1"),
]


@pytest.mark.parametrize("order", ["descending"])  # a shuffle is what they always run in
@pytest.mark.parametrize(("op", "case"), ANY_ORDER, ids=[f"{op}-{c}" for op, c in ANY_ORDER])
def test_kernels_do_not_depend_on_the_order_of_programs(op, case, order):
    (place,) = find_targets(["cuda:sim"])
    with program_order(order):
        outcome = try_problem(Problem(get(op), case, torch.float32), place)
    assert outcome.status is Status.PASS, outcome.detail


def test_a_fault_in_the_suite_is_a_failed_case_not_a_dead_process(monkeypatch):
    """A kernel that reads past its tensors, inside `nsa conform`."""
    from nsa_neuron.backends.cuda.launch import gated_sum
    from nsa_neuron.registry import REGISTRY

    forward = gated_sum.forward

    def short(kernels, plan, **values):
        values["gates"] = values["gates"][..., :2]  # the kernel reads three
        return forward(kernels, plan, **values)

    monkeypatch.setattr(gated_sum, "forward", short)
    monkeypatch.setattr(
        REGISTRY, "generation", -1
    )  # no choice of an earlier test, nor this one later
    (place,) = find_targets(["cuda:sim"])
    outcome = try_problem(Problem(get("gated_sum"), "m_plus_1", torch.float32), place)
    assert outcome.status is Status.FAIL and "KernelFault: kernel 'forward'" in outcome.detail


def test_triton_still_has_what_the_rules_stand_on():
    """The methods that are stood in for; a new Triton that renames one must not go unnoticed."""
    from triton.runtime import interpreter

    for name in ("set_grid_idx", "create_masked_load", "create_masked_store", "create_atomic_rmw",
                 "create_barrier"):  # fmt: skip
        assert callable(getattr(interpreter.InterpreterBuilder, name)), triton.__version__
    for name in ("_patch_lang", "_implicit_cvt", "_get_np_dtype"):
        assert callable(getattr(interpreter, name)), triton.__version__
    assert {"sanitize_overflow", "debug"} <= set(vars(interpreter.interpreter_builder.options))
    # What the interpreted language sets of these, and no more.
    block = tl.block_type(tl.float32, [8])
    assert set(vars(block)) == {"element_ty", "shape", "numel", "name"}, triton.__version__
    names = {"handle", "type", "dtype", "shape", "numel"}
    assert set(vars(tl.tensor(None, block))) == names, triton.__version__


def test_the_language_is_interpreted_within_a_launch_only():
    """Also behind a kernel that failed; and its dtypes and types are the shipped ones."""
    from triton.runtime import interpreter

    members = {
        (owner, name): vars(owner).get(name)
        for owner, names in (
            (tl, ("load", "range", "reduce")), (tl.core, ("load", "reduce")),
            (tl.tensor, ("__add__", "__bool__", "__init__", "T")),
            (tl.block_type, ("__init__",)), (interpreter, ("_get_np_dtype",)),
        )
        for name in names
    }  # fmt: skip
    kinds = [tl.int1, tl.bfloat16, tl.float32, tl.pointer_type(tl.float16)]
    kinds += [tl.block_type(kind, [8]) for kind in kinds]
    wanted = [interpreter._get_np_dtype(kind) for kind in kinds]
    for kernel in ("raises", "halves"):
        with suppress(InterpreterError):
            launch(kernel, 0)
        assert all(vars(owner).get(name) is x for (owner, name), x in members.items())
    blocks = [kind for kind in kinds if kind.is_block()]
    made = [vars(x) for kind in blocks for x in (kind, tl.tensor(None, kind))]
    with INTERPRETED_LANGUAGE, INTERPRETED_LANGUAGE:
        assert tl.load is not members[tl, "load"]
        assert [interpreter._get_np_dtype(kind) for kind in kinds] == wanted
        for _ in range(2):
            again = [tl.block_type(kind.element_ty, list(kind.shape)) for kind in blocks]
            quick = [vars(x) for kind in again for x in (kind, tl.tensor(None, kind))]
            for mine, shipped in zip(quick, made, strict=True):
                assert mine | shipped == mine  # and, of blocks, notes of its own
    assert tl.load is members[tl, "load"]
