"""Two saved reports side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence


def load(path: str | Path) -> dict[str, Any]:
    """A report that `nsa profile --json` printed or `Profile.save` wrote.

    Raises:
        ValueError: the file is missing or is no report.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no file {path}")
    try:
        facts = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(facts, dict) or "time_us" not in facts or "critical_path" not in facts:
        raise ValueError(f"{path} is no saved profile; write one with nsa profile ... --save")
    return facts


def compare(
    a: dict[str, Any], b: dict[str, Any], names: Sequence[str] = ("a", "b")
) -> dict[str, Any]:
    """What changed from report `a` to report `b`.

    Args:
        a, b: reports.
        names: what to call them, such as their files.

    Returns:
        "a", "b": name, kernel and arguments of each;
        "quantities": name -> {"a", "b", "ratio"} (ratio None where a is 0), in the order to show;
        "comparable": whether target, constants and number of cores agree.
    """
    rows: dict[str, tuple[float, float]] = {
        "time us": (a["time_us"]["central"], b["time_us"]["central"]),
        "time us, low": (a["time_us"]["low"], b["time_us"]["low"]),
        "time us, high": (a["time_us"]["high"], b["time_us"]["high"]),
        "instructions": (a["instructions"], b["instructions"]),
        "HBM bytes": (a["roofline"]["hbm_bytes"], b["roofline"]["hbm_bytes"]),
        "HBM GB/s": (a["roofline"]["bandwidth_gb_s"], b["roofline"]["bandwidth_gb_s"]),
        "share of the roof": (
            a["roofline"]["share_of_ceiling"] or 0.0,
            b["roofline"]["share_of_ceiling"] or 0.0,
        ),
    }
    for number, (x, y) in enumerate(zip(a["cores"], b["cores"], strict=False)):
        core = f"core {number} " if len(a["cores"]) > 1 else ""
        rows[f"{core}PE utilisation"] = (x["tensor"]["utilisation"], y["tensor"]["utilisation"])
        for buffer in ("sbuf", "psum"):
            rows[f"{core}{buffer.upper()} peak, bytes"] = (
                x["memory"][buffer]["peak"],
                y["memory"][buffer]["peak"],
            )
        for lane in dict.fromkeys((*x["engines"], *y["engines"])):
            one, other = x["engines"].get(lane), y["engines"].get(lane)
            for what in ("instructions", "busy_us"):
                rows[f"{core}{lane} {what.replace('_', ' ')}"] = (
                    one[what] if one else 0,
                    other[what] if other else 0,
                )
    same = all(a[key] == b[key] for key in ("target", "params")) and len(a["cores"]) == len(
        b["cores"]
    )
    return {
        "modelled": True,
        **{
            key: {
                "name": name,
                "kernel": facts["kernel"],
                "arguments": facts.get("arguments", []),
                "time_us": facts["time_us"]["central"],
            }
            for key, name, facts in zip("ab", names, (a, b), strict=True)
        },
        "comparable": same,
        "quantities": {
            name: {"a": x, "b": y, "ratio": y / x if x else None} for name, (x, y) in rows.items()
        },
    }


def render(found: dict[str, Any]) -> str:
    """The comparison as text; what did not change is left out."""
    lines = ["A -> B, MODELLED, not measured", *(_label(key, found[key]) for key in "ab")]
    head = len(lines)
    if not found["comparable"]:
        lines.append("  NOT COMPARABLE: target, constants or number of cores differ")
    for name, q in found["quantities"].items():
        if q["a"] != q["b"]:
            ratio = "new" if q["ratio"] is None else f"x {q['ratio']:.3f}"
            lines.append(f"  {name:<28} {_number(q['a']):>14} -> {_number(q['b']):>14}  {ratio}")
    if len(lines) == head:
        lines.append("  no difference")
    return "\n".join(lines)


def _label(key: str, run: dict[str, Any]) -> str:
    arguments = f"({', '.join(run['arguments'])})" if run["arguments"] else ""
    return f"  {key.upper()}: {run['name']}, {run['kernel']}{arguments}, {run['time_us']:.2f} us"


def _number(x: float) -> str:
    return f"{x:,}" if isinstance(x, int) else f"{x:,.3f}"
