"""The problems of the suite and their solutions: inputs, float64 oracle, plain low-precision torch.

Every op's own cases in every dtype, and one case of each op once more with non-contiguous inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron import cases
from nsa_neuron.errors import NsaError
from nsa_neuron.ops import OPS, get

if TYPE_CHECKING:
    from nsa_neuron.cases import Case
    from nsa_neuron.spec import OpSpec

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes that every backend is tried in; the reference is tried in float64 as well."""
TAGS = ("smoke", "edge", "conform")


@dataclass(frozen=True)
class Problem:
    """A case of an op in a dtype.

    Attributes:
        spec: the op.
        case: the case's name.
        dtype: of floating tensors.
        strided: inputs are not contiguous.
    """

    spec: OpSpec
    case: str
    dtype: torch.dtype
    strided: bool = False

    @property
    def op(self) -> str:
        """The op's name."""
        return self.spec.name

    @property
    def label(self) -> str:
        """The case's name as in reports."""
        return f"{self.case}+strided" if self.strided else self.case

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.op}-{self.label}-{self.dtype_name}"


@dataclass(frozen=True)
class Solution:
    """A problem's inputs and what they give; all on the CPU.

    Attributes:
        inputs: every argument by name.
        oracle: results of the reference in float64 on the same numbers.
        eager: results of the reference in the problem's dtype.
    """

    inputs: dict[str, Any]
    oracle: tuple[Tensor, ...]
    eager: tuple[Tensor, ...]


def problems(
    ops: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = DTYPES,
    tags: Sequence[str] = TAGS,
    case: str | None = None,
) -> list[Problem]:
    """Every problem of some ops (default: all), the problems of one case next to each other.

    Args:
        ops: names.
        dtypes: floating dtypes.
        tags: cases with any of these; `bench` cases are too large for the float64 reference.
        case: this case only.

    Raises:
        NsaError: no such op or tag.
    """
    unknown = set(tags) - set(TAGS)
    if unknown:
        raise NsaError(f"no tag {', '.join(sorted(unknown))}; there are {', '.join(TAGS)}")
    found = []
    for spec in [get(name) for name in ops] or OPS:
        chosen = [c for c in spec.cases if set(tags) & set(c.tags) and "bench" not in c.tags]
        chosen = [c for c in chosen if case in (None, c.name)]
        if not chosen:
            continue
        dense = [c for c in chosen if c.lengths is None]
        packed = [c for c in chosen if c.lengths is not None]
        telling = [_telling(group) for group in (dense, packed) if group]
        for strided, c in [*((False, c) for c in chosen), *((True, c) for c in telling)]:
            found += [Problem(spec, c.name, dtype, strided) for dtype in dtypes]
    return found


def _telling(chosen: Sequence[Case]) -> Case:
    """The case whose strides tell most: several kv heads and batches, then few tokens.

    With one head, swapping the axes of tokens and heads changes nothing.
    """
    return max(chosen, key=lambda c: (c.size("Hkv") > 1, c.size("B") > 1, -abs(c.size("S") - 40)))


def solve(problem: Problem) -> Solution:
    """The solution of a problem; shared by the targets that are tried on it one after the other."""
    return _solve(problem.spec, problem.case, problem.dtype)


@lru_cache(maxsize=16)
def _solve(spec: OpSpec, case_name: str, dtype: torch.dtype) -> Solution:
    case = next(c for c in spec.cases if c.name == case_name)
    inputs = spec.arguments(case, dtype)
    with torch.no_grad():
        oracle = _results(spec.reference(**cases.cast(inputs, torch.float64, ())))
        eager = oracle if dtype == torch.float64 else _results(spec.reference(**inputs))
    return Solution(inputs, oracle, eager)


def _results(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


def place_inputs(inputs: Mapping[str, Any], device: str, strided: bool) -> dict[str, Any]:
    """Copies of the inputs on a device, contiguous or with gaps and swapped axes."""
    return {
        name: _place(x, device, strided) if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


def _place(x: Tensor, device: str, strided: bool) -> Tensor:
    x = x.to(device, copy=True).contiguous()
    return scatter(x) if strided else x


def scatter(x: Tensor) -> Tensor:
    """The same tensor with axes 1 and 2 swapped in memory and poison between its elements."""
    swapped = x.transpose(1, 2) if x.dim() > 2 else x
    poison = float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max
    wide = x.new_full((*swapped.shape[:-1], 2 * swapped.shape[-1]), poison)
    wide[..., ::2] = swapped
    spread = wide[..., ::2]
    return spread.transpose(1, 2) if x.dim() > 2 else spread
