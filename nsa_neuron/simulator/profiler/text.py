"""The report of a profile as text."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

LINES_SHOWN = 8


def render(facts: dict[str, Any]) -> str:
    """All of a report, from `Profile.to_dict()`."""
    time, launch = facts["time_us"], facts["launch_us"]
    lines = [
        f"{facts['kernel']} on {facts['target']}: {time['central']:.2f} us MODELLED, between "
        f"{time['low']:.2f} and {time['high']:.2f}",
        f"  constants: {facts['params']}; not measured, not run on hardware",
        f"  a launch adds {launch['central']:g} us ({launch['low']:g} to {launch['high']:g}), "
        "which no time here holds",
        *(f"  assumed: {a}" for a in facts["assumptions"]),
        *_roofline(facts["roofline"]),
    ]
    for number, core in enumerate(facts["cores"]):
        lines += _core(number, core)
    lines += _critical_path(facts["critical_path"])
    lines += _advice(facts["advice"], facts["together"])
    return "\n".join(lines)


def _roofline(r: dict[str, Any]) -> list[str]:
    need, moved = r["needed_bytes"], r["hbm_bytes"]
    lines = []
    if r["unit"] == "flop":
        where = (
            "no HBM traffic"
            if r["intensity"] is None
            else f"{r['intensity']:.1f} flop/B (ridge {r['ridge']:.1f})"
        )
        lines.append(
            f"  roofline: {where}, {_ROOF[r['bound']]}, {r['achieved_g_per_s'] / 1e3:.2f} of "
            f"{r['ceiling_g_per_s'] / 1e3:.2f} Tflop/s ({r['share_of_ceiling']:.0%} of the roof)"
        )
        if r["work_done"] > r["work"]:
            times = r["work_done"] / r["work"]
            lines.append(f"    the same products are computed {times:.2g} times, and count once")
    elif r["unit"] == "byte":
        lines.append(
            f"  roofline: no matrix products, {_ROOF[r['bound']]}, {r['achieved_g_per_s']:.0f} of "
            f"{r['ceiling_g_per_s']:.0f} GB/s needed ({r['share_of_ceiling']:.0%} of the roof)"
        )
    else:
        lines.append("  roofline: no matrix products and no HBM traffic, so no roof")
    again = f", {moved / need:.3g} times what is needed" if need and moved > 1.005 * need else ""
    return [
        *lines,
        f"  HBM: {moved:,} bytes moved{again}; {r['bandwidth_gb_s']:.0f} of "
        f"{r['bandwidth_peak_gb_s']:.0f} GB/s, DMA engines at most {r['dma_peak_gb_s']:.0f}",
    ]


_ROOF = {
    "compute": "under TensorE's roof",
    "HBM": "under HBM's roof",
    "DMA engines": "under the DMA engines' roof",
}


def _core(number: int, core: dict[str, Any]) -> list[str]:
    tensor, dma = core["tensor"], core["dma"]
    lines = [
        f"  core {number}",
        f"    {'':<11} {'instr.':>8} {'busy us':>10} {'busy':>6} {'stalled':>8}  longest waits",
    ]
    for name, lane in core["engines"].items():
        waits = [f"{w['us']:.2f} us {w['for']}" for w in lane["waits"]]
        per = lane["instructions"] if name.startswith("dma") else 1
        each = " per transfer" if name.startswith("dma") else ""
        waits += [f"({us / per:.2f} us{each}: {note})" for note, us in lane["notes_us"].items()]
        lines.append(
            f"    {name:<11} {lane['instructions']:>8} {lane['busy_us']:>10.2f} "
            f"{lane['busy_share']:>6.1%} {lane['stall_share']:>8.1%}  {waits[0] if waits else ''}"
        )
        lines += [f"    {'':<48}{w}" for w in waits[1:]]
    lines.append(
        f"    PE utilisation {tensor['utilisation']:.1%} of bf16 peak "
        f"({tensor['utilisation_while_busy']:.1%} while TensorE is busy)"
    )
    lines.append(
        f"    DMA {dma['transfers']} transfers, {dma['bytes_written']:,} bytes written, "
        f"{dma['bytes_per_descriptor']:,.0f} B per descriptor"
    )
    lines.append(
        f"    DMA engines {dma['engines_busy_share']:.1%} busy, "
        f"{dma['gb_s_while_active']:.0f} GB/s of HBM while any is active"
    )
    for buffer, m in core["memory"].items():
        lines.append(
            f"    {buffer.upper()} peak {m['peak']:,} of {m['limit']:,} bytes per partition at "
            f"{m['peak_at_us']:.2f} us, mean {m['mean']:,.0f}"
        )
    return lines


def _critical_path(path: dict[str, Any]) -> list[str]:
    total = sum(path["engines_us"].values()) or 1.0
    shares = ", ".join(f"{n} {us / total:.0%}" for n, us in path["engines_us"].items())
    lines = [f"  critical path: {shares}"]
    for row in path["lines"][:LINES_SHOWN]:
        place = f"{Path(row['file']).name}:{row['line']}"
        lines.append(
            f"    {row['time_us']:>10.2f} us {row['share']:>6.1%}  {place:<22} {row['what']:<22} "
            f"{row['text'][:48]}".rstrip()
        )
    rest = sum(r["time_us"] for r in path["lines"][LINES_SHOWN:]) + path["other_lines_us"]
    if rest:
        lines.append(f"    {rest:>10.2f} us {rest / total:>6.1%}  other lines")
    return lines


def _advice(advice: list[dict[str, Any]], together: dict[str, Any] | None) -> list[str]:
    if not advice:
        return ["  advice: no rule promises 1 % or more"]
    lines = ["  advice (modelled gain of each alone):"]
    for number, a in enumerate(advice, 1):
        place = f"{Path(a['file']).name}:{a['line']}"
        lines.append(
            f"    {number}. {a['gain_us']:.2f} us ({a['gain_share']:.1%})  {a['rule']} at {place}"
        )
        lines.append(f"        {a['text']}")
        lines += textwrap.wrap(a["message"], 96, initial_indent=" " * 8, subsequent_indent=" " * 8)
    if together:
        numbers = [str(n + 1) for n in together["of"]]
        lines.append(
            f"    {', '.join(numbers[:-1])} and {numbers[-1]} together: "
            f"{together['gain_us']:.2f} us ({together['gain_share']:.1%}), "
            f"{together['speedup']:.2f} times as fast"
        )
    return lines
