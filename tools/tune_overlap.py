"""Measures from which overlap of neighbouring queries on selected attention prefers their union.

`by_query` reads every block of a union once, so its time is linear in 1 / sharing (pairs of a token
and a block per union entry); `by_block` has the same work whatever is shared. Both are timed at two
overlaps, of independent and of correlated inputs, and where the straight lines through these times
cross is the threshold that a plan's row `dispatch` gets: `forward_rows` or `backward_dq_rows`, see
`nsa_neuron/backends/cuda/launch/selected_attention/dispatch.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from nsa_neuron.backends.cuda import kernel_package, plans
from nsa_neuron.backends.cuda.launch.selected_attention import by_query
from nsa_neuron.backends.cuda.launch.selected_attention.call import Call
from nsa_neuron.backends.cuda.launch.selected_attention.dispatch import BY_OVERLAP, PLANNED_BLOCK
from tools.tune_units import DESIGNS, Crossover, Unit

if TYPE_CHECKING:
    import argparse

    from tools import plan_files


class Tuner(Protocol):
    """What of `tune.Tuner` a crossover needs."""

    args: argparse.Namespace

    @property
    def machine(self) -> dict[str, Any]:
        """Facts of the machine."""

    def point(self, heads: Any) -> plan_files.Point:
        """The point of the plan that a head geometry belongs to."""

    def shipped(self, unit: Unit, point: plan_files.Point) -> dict[str, Any]:
        """The plan's constants there."""

    def complete(self, unit: Unit, heads: Any, every: list[dict[str, Any]]) -> bool:
        """Measures what is lacking; False when out of time."""

    def measured(self, unit: Unit, heads: Any) -> list[dict[str, Any]]:
        """The rows there are."""

    def key(self, unit: Unit, heads: Any) -> list[Any]:
        """What identifies a row."""

    def prepare(self, unit: Unit, heads: Any) -> tuple[Any, Any, list[Any]]:
        """Problem, call and leaves."""

    def emit(self, key: list[Any], constants: dict[str, Any], **fields: Any) -> None:
        """Writes a row."""

    def write_plan(
        self, unit: Unit, point: plan_files.Point, constants: dict[str, Any], measured: Any
    ) -> None:
        """Puts constants into the plan."""


Times = dict[str, float]
"""Milliseconds of each design."""


def units(args: argparse.Namespace) -> list[Unit]:
    """All that `tune` will measure, to compile it ahead."""
    return [unit for crossover in args.crossovers for unit in crossover.units((0.0, args.rho))]


def tune(tuner: Tuner, crossover: Crossover, heads: Any) -> bool:
    """Measures what is lacking and writes the threshold; False when out of time.

    Does nothing where the plan does not leave the choice to the overlap, and writes nothing where a
    design failed or was wrong: its row says why.
    """
    point = tuner.point(heads)
    both = crossover.units((0.0, tuner.args.rho))
    base = tuner.shipped(both[0], point)
    if base["strategy"] != BY_OVERLAP:
        return True
    sharings: list[float] = []
    times: list[Times] = []
    for unit in both:
        lacking = [design for design in DESIGNS if design not in designs(tuner, unit, heads)]
        if not tuner.complete(unit, heads, [{**base, "strategy": design} for design in lacking]):
            return False
        found = designs(tuner, unit, heads)
        if any(row["status"] != "ok" for row in found.values()):
            return True
        sharings.append(sharing(tuner, crossover, unit, heads))
        times.append({design: row["median_ms"] for design, row in found.items()})
    walker = Unit(crossover.stage, crossover.direction, crossover.op, crossover.kernel, ())
    least = break_even(sharings, times, tuner.shipped(walker, point)["QUERIES"])
    if least is not None:
        write(tuner, crossover, point, least, {"sharing": sharings, "median_ms": times})
    return True


def designs(tuner: Tuner, unit: Unit, heads: Any) -> dict[str, dict[str, Any]]:
    """The measured rows of a unit by design."""
    rows = tuner.measured(unit, heads)
    return {row["constants"]["strategy"]: row for row in rows if row["status"] != "counted"}


def sharing(tuner: Tuner, crossover: Crossover, unit: Unit, heads: Any) -> float:
    """Pairs per union entry, as the kernel counts them on the device; kept as a row."""
    for row in tuner.measured(unit, heads):
        if row["status"] == "counted":
            return float(row["sharing"])
    p, _, _ = tuner.prepare(unit, heads)
    point = tuner.point(heads)
    shape: dict[str, Any] = {
        "dk": point.dk, "dv": point.dv, "dtype": point.dtype, "group": point.group,
    }  # fmt: skip
    plan = plans.find(tuner.args.device_plans, crossover.op, **shape)
    kernels = kernel_package("hw" if p.q.is_cuda else "sim").load(crossover.op)
    q, k, v, ids = (x[None] for x in (p.q, p.k, p.v, p.ids))
    call = Call(kernels, plan, q, k, v, ids, p.geom.m, p.scale, (None, None))
    union = by_query.list_union(call, crossover.kernel)
    counted = float(union.pairs.sum() / union.counts.sum())
    tuner.emit(tuner.key(unit, heads), {}, status="counted", sharing=counted)
    return counted


def break_even(sharings: list[float], times: list[Times], queries: int) -> float | None:
    """The sharing at which both designs take the same time, in [1, queries].

    Returns:
        None where the measurements contradict the model: sharing more made the union slower, and
        the designs each win once.
    """
    first, second = (pair["by_query"] - pair["by_block"] for pair in times)
    far, near = (1 / value for value in sharings)
    if (far - near) * (first - second) <= 0:
        if first * second <= 0:
            return None
        return 1.0 if first < 0 else float(queries)
    at = far - first * (far - near) / (first - second)
    return 1 / min(max(at, 1 / queries), 1.0)


def write(
    tuner: Tuner, crossover: Crossover, point: plan_files.Point, least: float, facts: Any
) -> None:
    """Puts a measured threshold into the plan, next to what was measured for the other pass."""
    unit = crossover.units((0.0, 0.0))[0]
    name = f"{crossover.kernel}_rows"
    rows = least * point.group * PLANNED_BLOCK / tuner.args.geom.m
    facts = {"tokens": tuner.args.tokens, **facts}
    facts |= {fact: tuner.machine[fact] for fact in ("device", "revision")}
    listed = plans.load(tuner.args.device_plans, crossover.op)["dispatch"]
    found = next(row for row in listed if point.fits(row))
    here = all(found.get(bound) == value for bound, value in point.bounds().items())
    measured = {**(found.get("measured", {}) if here else {}), name: facts}
    tuner.write_plan(unit, point, {**tuner.shipped(unit, point), name: round(rows, 2)}, measured)
