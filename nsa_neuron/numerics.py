"""One tolerance policy for tests, the command line and benchmarks.

A kernel is judged against the float64 reference on the very inputs that it got. How much error is
allowed is not a constant: it is what plain low-precision torch makes on the same inputs (`eager`),
plus a band for the rounding of the result itself. So a kernel may not be worse than the obvious
implementation, whatever the problem's conditioning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@dataclass(frozen=True)
class Diff:
    """The outcome of one comparison.

    Attributes:
        ok: within budget.
        error: largest absolute error (for a selection: lost share of the score mass).
        budget: what was allowed, in the same unit.
        detail: what is wrong, empty when ok.
    """

    ok: bool
    error: float
    budget: float
    detail: str = ""


class Comparator(Protocol):
    """Judges one result of an op."""

    def __call__(
        self, got: Tensor, oracle: Tensor, eager: Tensor, inputs: Mapping[str, Any]
    ) -> Diff: ...


@dataclass(frozen=True)
class Budget:
    """Error of the kernel <= `factor` x error of low-precision eager + `ulps` roundings.

    The band is `ulps` units in the last place of the result's dtype at the oracle's largest
    magnitude (never below magnitude `floor`); float32 sums in another order need more of those
    units than 16-bit results, whose error is the final rounding. Root-mean-square errors are held
    to the same policy, so that a kernel cannot be wrong everywhere by less than the worst element.
    Positions of -inf must agree exactly; NaN is always wrong. Where eager itself overflows it
    grants nothing. What is behind several ops, each of which may round, is granted the band of
    `roundings` of them.
    """

    factor: float = 2.0
    floor: float = 0.05
    roundings: int = 1

    def band(self, dtype: torch.dtype, magnitude: float) -> float:
        ulps = {torch.float16: 1.0, torch.bfloat16: 1.0}.get(dtype, 16.0)
        return self.roundings * ulps * torch.finfo(dtype).eps * max(self.floor, magnitude)

    def __call__(
        self, got: Tensor, oracle: Tensor, eager: Tensor, inputs: Mapping[str, Any]
    ) -> Diff:
        if got.shape != oracle.shape:
            return Diff(False, math.inf, 0.0, f"shape {list(got.shape)}, not {list(oracle.shape)}")
        if got.numel() == 0:
            return Diff(True, 0.0, 0.0)
        exact, mine, plain = (x.detach().cpu().double() for x in (oracle, got, eager))
        if mine.isnan().any():
            return Diff(False, math.inf, 0.0, f"{int(mine.isnan().sum())} NaN")
        finite = exact.isfinite()
        if not torch.equal(mine.isfinite(), finite) or not torch.equal(
            mine[~finite], exact[~finite]
        ):
            return Diff(False, math.inf, 0.0, "infinities at other places than the reference")
        if not finite.any():
            return Diff(True, 0.0, 0.0)
        exact, mine, plain = exact[finite], mine[finite], plain[finite]
        band = self.band(got.dtype, float(exact.abs().max()))
        error, own = mine - exact, (plain - exact)[plain.isfinite()]
        worst, allowed = float(error.abs().max()), self.factor * _max(own) + band
        rms, rms_allowed = _rms(error), self.factor * _rms(own) + band / 2
        if worst > allowed:
            return Diff(False, worst, allowed, f"largest error {worst:.3g} > {allowed:.3g}")
        if rms > rms_allowed:
            return Diff(False, worst, allowed, f"rms error {rms:.3g} > {rms_allowed:.3g}")
        return Diff(True, worst, allowed)


@dataclass(frozen=True)
class Exact:
    """Every element equal."""

    def __call__(
        self, got: Tensor, oracle: Tensor, eager: Tensor, inputs: Mapping[str, Any]
    ) -> Diff:
        if got.shape != oracle.shape:
            return Diff(False, math.inf, 0.0, f"shape {list(got.shape)}, not {list(oracle.shape)}")
        wrong = int((got.cpu() != oracle.cpu()).sum())
        return Diff(wrong == 0, float(wrong), 0.0, f"{wrong} elements differ" if wrong else "")


@dataclass(frozen=True)
class TopKSet:
    """Selections are equal up to near-ties: the score mass that they capture is compared.

    Attributes:
        scores: inputs -> float64 scores `[B, S, Hkv, Ns]`, with `+inf` for forced and `-inf` for
            illegal blocks.
        tolerance: share of the captured mass that may be lost; float32 scores are good to about
            1e-6 of themselves.
    """

    scores: Callable[[Mapping[str, Any]], Tensor]
    tolerance: float = 1e-5

    def __call__(
        self, got: Tensor, oracle: Tensor, eager: Tensor, inputs: Mapping[str, Any]
    ) -> Diff:
        if got.shape != oracle.shape or got.dtype != oracle.dtype:
            found = f"{got.dtype}{list(got.shape)}, not {oracle.dtype}{list(oracle.shape)}"
            return Diff(False, math.inf, 0.0, found)
        mine, best = got.cpu().long(), oracle.cpu().long()
        detail = self._malformed(mine, best)
        if detail:
            return Diff(False, math.inf, self.tolerance, detail)
        scores = self.scores(inputs).cpu()
        if int(mine.max()) >= scores.shape[-1]:
            return Diff(False, math.inf, self.tolerance, f"block id {int(mine.max())} too large")
        forced = scores == math.inf
        taken, wanted = _member(mine, scores), _member(best, scores)
        if (taken & (scores == -math.inf)).any():
            return Diff(False, math.inf, self.tolerance, "a block that the query cannot see")
        if (forced & ~taken).any():
            return Diff(False, math.inf, self.tolerance, "a forced block is missing")
        free = scores.masked_fill(forced | (scores == -math.inf), 0.0)
        mass, ideal = (free * taken).sum(-1), (free * wanted).sum(-1)
        lost = float(((ideal - mass) / ideal.clamp(min=1e-30)).max())
        ok = lost <= self.tolerance
        return Diff(ok, max(lost, 0.0), self.tolerance, "" if ok else f"lost {lost:.3g} of mass")

    @staticmethod
    def _malformed(mine: Tensor, best: Tensor) -> str:
        """What is wrong with the form of the ids, whatever the scores."""
        if not torch.equal((mine >= 0).sum(-1), (best >= 0).sum(-1)):
            return "another number of blocks than the reference"
        padded = mine.masked_fill(mine < 0, torch.iinfo(torch.int64).max)
        step = padded[..., 1:] - padded[..., :-1]
        tail = (mine[..., 1:] < 0) & (mine[..., :-1] < 0)
        if ((step <= 0) & ~tail).any() or (mine < -1).any():
            return "ids are not ascending, distinct and padded with -1 on the right"
        return ""


def _member(ids: Tensor, scores: Tensor) -> Tensor:
    """ids `[..., n]` -> which blocks are chosen, bool like scores `[..., Ns]`."""
    ns = scores.shape[-1]
    hit = torch.zeros(*scores.shape[:-1], ns + 1, dtype=torch.bool)
    hit.scatter_(-1, ids.masked_fill(ids < 0, ns), True)
    return hit[..., :ns]


def _max(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
