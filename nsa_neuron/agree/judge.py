"""Judges one call of an nsa op on the inputs that it got, and takes composed ops apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.cases import cast
from nsa_neuron.ops.nsa_attention import PART_SPECS, compose_backward, compose_forward
from nsa_neuron.registry import REGISTRY, Supported, Target

if TYPE_CHECKING:
    from nsa_neuron.spec import OpSpec

COMPOSED = {
    "nsa_attention": compose_forward,
    "nsa_attention_forward": compose_forward,
    "nsa_attention_backward": compose_backward,
}


@dataclass(frozen=True)
class Judgement:
    """The result that broke its budget, or came closest to it; `Call` says what the fields mean."""

    ok: bool
    result: str
    error: float
    budget: float
    detail: str = ""
    parts: tuple[str, ...] = ()


def judge(spec: OpSpec, target: Target, values: Mapping[str, Any], got: Any) -> Judgement:
    """Whether a call's results are right on its inputs.

    A composed op that is not is made again of its parts, on the target, each judged on its own
    inputs. If none is wrong and the whole is what its parts give, it differed from the float64
    reference in which of two equal blocks it selected, and is right.

    Args:
        spec: the op.
        target: who ran it.
        values: its arguments by name.
        got: its results.
    """
    with torch.no_grad():
        found = _compare(spec, values, got, spec.reference)
        if found.ok or spec.name not in COMPOSED:
            return found
        return _take_apart(spec, target, values, got, found)


def _compare(
    spec: OpSpec, values: Mapping[str, Any], got: Any, reference: Callable[..., Any]
) -> Judgement:
    """The results against a reference in float64 and in the call's dtype, all on the CPU."""
    values = {name: _home(x) for name, x in values.items()}
    got = tuple(map(_home, _tuple(got)))
    exact = _tuple(reference(**cast(values, torch.float64, ())))
    plain = _tuple(reference(**values))
    best = Judgement(True, "", 0.0, 0.0)
    share = -1.0
    for item, mine, oracle, eager in zip(spec.returns, got, exact, plain, strict=True):
        mine, oracle, eager = _without_nan(mine, oracle, eager)
        diff = spec.compare[item.name](mine, oracle, eager, values)
        if not diff.ok:
            where = _worst_place(item.name, mine, oracle)
            return Judgement(
                False, item.name, diff.error, diff.budget, f"{item.name}: {diff.detail}{where}"
            )
        used = diff.error / diff.budget if diff.budget else 0.0
        if used > share:
            share, best = used, Judgement(True, item.name, diff.error, diff.budget)
    return best


def _without_nan(got: Tensor, oracle: Tensor, eager: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All with 0 where both the results and the reference are NaN: a call that got NaN gives NaN,
    and the fault is where it came from."""
    if got.shape != oracle.shape or not oracle.is_floating_point():
        return got, oracle, eager
    both = got.isnan() & oracle.isnan()
    if not both.any():
        return got, oracle, eager
    return got.masked_fill(both, 0), oracle.masked_fill(both, 0), eager.masked_fill(both, 0)


def _take_apart(
    spec: OpSpec,
    target: Target,
    values: Mapping[str, Any],
    got: Any,
    found: Judgement,
) -> Judgement:
    wrong: dict[str, Judgement] = {}
    ids: list[Tensor] = []

    def part(name: str) -> Callable[..., Any]:
        def call(**arguments: Any) -> Any:
            results = _on_target(PART_SPECS[name], target, arguments)
            if results is None:  # the target has the whole only
                return PART_SPECS[name].reference(**arguments)
            part_spec = PART_SPECS[name]
            given = {**dict.fromkeys(part_spec.names), **part_spec.defaults, **arguments}
            verdict = _compare(part_spec, given, results, part_spec.reference)
            if not verdict.ok:
                wrong.setdefault(name, verdict)
            if name == "select_blocks":
                ids.append(results)
            return results

        return call

    COMPOSED[spec.name](part, values)
    if wrong:
        name, first = next(iter(wrong.items()))
        detail = f"{found.detail}; {name}.{first.detail}"
        return replace(found, detail=detail, parts=tuple(wrong))
    if not ids:
        return found

    def chosen(**arguments: Any) -> Any:
        """The reference that selects the blocks that the target selected."""

        def known(name: str) -> Callable[..., Any]:
            if name == "select_blocks":
                return lambda **_: _home(ids[0])
            return PART_SPECS[name].reference

        made = compose_forward(known, arguments)
        return made[0] if len(spec.returns) == 1 else made

    return _compare(spec, values, got, chosen)


def _on_target(spec: OpSpec, target: Target, values: Mapping[str, Any]) -> Any:
    """A part's results on a target; None where it has no kernel of its own for it."""
    backend = REGISTRY.get(target.backend)
    bound = spec.bind({**dict.fromkeys(spec.names), **spec.defaults, **values})
    verdict = backend.supports(bound, target.mode)
    if not isinstance(verdict, Supported):
        return None
    full = {name: values.get(name, spec.defaults.get(name)) for name in spec.names}
    return backend.lower(bound, verdict.plan)(**full)


def _worst_place(name: str, got: Tensor, oracle: Tensor) -> str:
    """Where the largest error is, with both values; empty where shapes differ or nothing does."""
    if got.shape != oracle.shape or not got.numel() or not got.is_floating_point():
        return ""
    error = (got.double() - oracle.double()).abs().masked_fill(got == oracle, 0)  # -inf - -inf
    error = torch.where(error.isnan(), torch.inf, error)
    flat = int(error.argmax())
    place = []
    for size in reversed(got.shape):
        flat, index = divmod(flat, size)
        place.append(index)
    at = tuple(reversed(place))
    return f"; {name}{list(at)} is {float(got[at]):.6g}, not {float(oracle[at]):.6g}"


def _home(x: Any) -> Any:
    return x.detach().cpu() if isinstance(x, Tensor) else x


def _tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)
