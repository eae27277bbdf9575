"""What one call of `torch.ops.nsa` costs beyond an op that does nothing.

A backend whose lowerings return results made beforehand leaves only the plugin's own work:
dispatch, the sizes' key, the remembered choice, the graph node. Next to it, an empty
`torch.library` op of the same signature, with autograd registered the usual way, returns such
results too. Runs of the two alternate, so that a busy machine slows both, and the ratio of
neighbours is what is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.library import Library, infer_schema
from torch.utils.benchmark import Timer

import nsa_neuron.library  # noqa: F401  registers torch.ops.nsa
from nsa_neuron.bench.record import Record
from nsa_neuron.ops import get
from nsa_neuron.registry import REGISTRY, Lowered, Supported, Verdict, use_backend
from nsa_neuron.terminal import progress, table

if TYPE_CHECKING:
    from nsa_neuron.spec import Bound, OpSpec

BENCH = "overhead"
OPS = ("attention", "sliding_window_attention", "selected_attention", "gated_sum")
CASE = "one_token"
NUMBER = 100
"""Calls of one timed run: about 1 ms, long against the clock's resolution, and short enough for
neighbouring runs to find the machine in the same state."""
FORWARD, GRAD, BACKWARD = "forward", "forward, grad", "forward + backward"
NEW_IDS = "forward, new ids"
KERNEL_CHECKS = "forward, new ids, checked by the kernel"
"""As `cpu:native` does: ids are read where they are used, so the router does not read them."""
NAMESPACE = "nsa_bench"


class NullBackend:
    """Takes every call and returns results made beforehand.

    Args:
        checks: whether it says that its kernels check required ids themselves.
    """

    name = "null"

    def __init__(self, checks: bool) -> None:
        self._checks = checks

    def modes(self) -> Mapping[str, str]:
        return {"none": ""}

    def supports(self, bound: Bound, mode: str) -> Verdict:
        return Supported(None, required_ids(bound.spec) if self._checks else ())

    def lower(self, bound: Bound, plan: Any) -> Lowered:
        results = made_results(bound)
        return lambda **values: results


def made_results(bound: Bound) -> Any:
    """Zero results of a call's shapes; one tensor or a tuple."""
    made = tuple(torch.zeros(shape, dtype=kind) for _, shape, kind in bound.returns())
    return made[0] if len(made) == 1 else made


def required_ids(spec: OpSpec) -> tuple[str, ...]:
    """Names of the ids that an op must be given."""
    return tuple(arg.name for arg in spec.tensors if arg.dtype == "i32" and not arg.optional)


@contextmanager
def null_backend(checks: bool = False) -> Iterator[None]:
    """Registers the null backend and uses it."""
    REGISTRY.register(NullBackend(checks))
    try:
        with use_backend("null"):
            yield
    finally:
        REGISTRY.unregister("null")


def empty_op(library: Library, spec: OpSpec, values: Mapping[str, Any]) -> Callable[..., Any]:
    """An op of a spec's signature that does nothing, differentiable by an op that does nothing."""
    backward = get(spec.backward)
    for each in (spec, backward):
        library.define(each.name + infer_schema(each.reference, mutates_args=()))
    bound = spec.bind(values)
    forward_results = made_results(bound)
    known = _backward_values(spec, backward, values, forward_results)
    gradients = made_results(backward.bind(known))
    library.impl(spec.name, lambda *a, **k: forward_results, "CompositeExplicitAutograd")
    library.impl(backward.name, lambda *a, **k: gradients, "CompositeExplicitAutograd")
    namespace = getattr(torch.ops, NAMESPACE)
    gradient = getattr(namespace, backward.name).default
    tensors = [arg.name for arg in spec.tensors]
    wanted = [arg.name for arg in backward.tensors]
    given = [item.like for item in backward.returns]

    def setup_context(ctx: Any, inputs: Any, output: Any, keyword_only_inputs: Any = None) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*inputs, *outputs)
        ctx.count = len(inputs)

    def run_backward(ctx: Any, *grads: Any) -> Any:
        inputs, outputs = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        found = dict(zip(tensors, inputs, strict=False))
        found |= dict(zip((item.name for item in spec.returns), outputs, strict=True))
        found |= {f"grad_{r.name}": g for r, g in zip(spec.returns, grads, strict=True)}
        named = dict(zip(given, gradient(*(found.get(name) for name in wanted)), strict=True))
        return tuple(named.get(name) for name in tensors[: ctx.count])

    torch.library.register_autograd(
        f"{NAMESPACE}::{spec.name}", run_backward, setup_context=setup_context, lib=library
    )
    op: Callable[..., Any] = getattr(namespace, spec.name).default
    return op


def _backward_values(
    spec: OpSpec, backward: OpSpec, values: Mapping[str, Any], results: Any
) -> dict[str, Any]:
    """Arguments of the backward op for one call of the forward op."""
    several = results if isinstance(results, tuple) else (results,)
    by_name = dict(zip((item.name for item in spec.returns), several, strict=True))
    grads = {f"grad_{name}": tensor for name, tensor in by_name.items()}
    known = {**backward.defaults, **values, **by_name, **grads}
    return {name: known.get(name) for name in backward.names}


def measure(ops: Sequence[str] = OPS, rounds: int = 150, number: int = NUMBER) -> list[Record]:
    """Times both ops of each name in alternation.

    Args:
        ops: names.
        rounds: pairs of neighbouring runs.
        number: calls of one run.

    Returns:
        For each op and mode: microseconds of a call of ours and of the empty op, and their ratio.
    """
    records = []
    library = Library(NAMESPACE, "FRAGMENT")
    with progress("overhead", sum(len(modes(get(x))) for x in ops)) as advance:
        for name in ops:
            spec = get(name)
            case = next(case for case in spec.cases if case.name == CASE)
            values = spec.arguments(case, torch.float32)
            ours = getattr(torch.ops.nsa, name).default
            empty = empty_op(library, spec, values)
            for mode in modes(spec):
                advance(f"{name}, {mode}")
                with null_backend(mode == KERNEL_CHECKS):
                    mine, other = _pair(ours, empty, spec, values, mode, rounds, number)
                records += _records(name, mode, number, mine, other)
    return records


def modes(spec: OpSpec) -> tuple[str, ...]:
    """How an op is called. One that is given ids (they are checked on the CPU, once while they stay
    the same) is also called with other ids each time, checked by the router or by the kernel."""
    more = (NEW_IDS, KERNEL_CHECKS) if required_ids(spec) else ()
    return (FORWARD, GRAD, BACKWARD, *more)


def _pair(
    ours: Callable[..., Any],
    empty: Callable[..., Any],
    spec: OpSpec,
    values: Mapping[str, Any],
    mode: str,
    rounds: int,
    number: int,
) -> tuple[list[float], list[float]]:
    """Microseconds per call of the two ops, `rounds` values each, measured in turn."""
    grad = mode in (GRAD, BACKWARD)
    args = [values[arg.name] for arg in spec.tensors if values[arg.name] is not None]
    args = [
        x.clone().requires_grad_(grad and arg.differentiable)
        for x, arg in zip(args, spec.tensors, strict=False)
    ]
    timers = [_timer(op, args, mode) for op in (ours, empty)]
    calls = 2 if mode in (NEW_IDS, KERNEL_CHECKS) else 1
    for timer in timers:
        timer.timeit(number)
    taken: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        # Whoever goes first may find a warmer or a colder machine.
        for which in (0, 1) if i % 2 else (1, 0):
            taken[which].append(timers[which].timeit(number).mean * 1e6 / calls)
    return taken


def _timer(op: Callable[..., Any], args: Sequence[Tensor], mode: str) -> Timer:
    values: dict[str, Any] = {"op": op, "args": args}
    if mode in (NEW_IDS, KERNEL_CHECKS):
        values["other"] = [x if x.is_floating_point() else x.clone() for x in args]
        return Timer("op(*args); op(*other)", globals=values)
    if mode != BACKWARD:
        return Timer("op(*args)", globals=values)
    out = op(*args)
    first = out[0] if isinstance(out, tuple) else out
    values |= {
        "grad": torch.ones_like(first),
        "backward": torch.autograd.grad,
        "leaves": [x for x in args if x.requires_grad],
    }
    one = "op(*args)[0]" if isinstance(out, tuple) else "op(*args)"
    return Timer(f"backward({one}, leaves, grad)", globals=values)


def _records(
    op: str, mode: str, number: int, mine: list[float], other: list[float]
) -> list[Record]:
    facts = {"op": op, "mode": mode, "calls_per_run": number, "threads": torch.get_num_threads()}
    ratios = [a / b for a, b in zip(mine, other, strict=True)]
    return [
        Record.of(BENCH, "torch.ops.nsa", "us", mine, **facts),
        Record.of(BENCH, "empty op", "us", other, **facts),
        Record.of(BENCH, "ratio", "ratio", ratios, **facts),
    ]


def to_text(records: Sequence[Record]) -> str:
    """The table of this benchmark's records; empty if there are none."""
    mine = [record for record in records if record.bench == BENCH]
    rows = [
        [a.facts["op"], a.facts["mode"], str(a), str(b), str(ratio)]
        for a, b, ratio in zip(mine[::3], mine[1::3], mine[2::3], strict=True)
    ]
    title = "one call against an empty op of the same signature: median (20th to 80th percentile)"
    headers = ["op", "mode", "torch.ops.nsa, us", "empty op, us", "ratio"]
    return table(title, headers, rows) if rows else ""
