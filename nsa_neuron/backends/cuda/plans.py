"""Tile plans: which constants a kernel is launched with, as data per device.

`plans/<device>/<op>.json` holds, per kernel of the op, rows that are tried in order; the first one
whose bounds hold gives the constants:

    {"forward": [{"max_dk": 128, "max_dv": 128, "dtypes": ["bfloat16"], "min_g": 8,
                  "constants": {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}}]}

Bounds may be left out: `max_dk`, `max_dv` (inclusive), `dtypes`, `min_g`, `max_g` (inclusive).
`accepts` maps what `nsa compile-check` would call a problem of the row to the reason why it is not.
`tools/tune.py` measures on a GPU and writes these files; nothing is tuned at import or launch.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from nsa_neuron.errors import NsaError

PLANS_FOLDER = Path(__file__).with_name("plans")
DEVICES = ("h200", "h100", "interpret")
SAME_AS = {"h100": "h200"}
"""Devices whose files hold only what differs from another's: the kernels they leave out, and whole
ops, are that device's."""

Constants = dict[str, Any]
Rows = dict[str, list[dict[str, Any]]]


class PlanError(NsaError):
    """No tile plan is shipped for a kernel, its head dims, dtype and group size."""


@functools.cache
def load(device: str, op: str) -> Rows:
    """All plan rows of `op` on `device`, by kernel.

    Raises:
        PlanError: no such file.
    """
    path = PLANS_FOLDER / device / f"{op}.json"
    base = load(SAME_AS[device], op) if device in SAME_AS else {}
    if not base and not path.is_file():
        raise PlanError(f"no tile plans for op '{op}' on device '{device}': {path} does not exist")
    rows: Rows = json.loads(path.read_text()) if path.is_file() else {}
    return base | rows


def find(device: str, op: str, *, dk: int, dv: int, dtype: str, group: int) -> dict[str, Constants]:
    """The constants of every kernel of `op`, by kernel name.

    Args:
        device: one of `DEVICES`.
        dk, dv: head dims of keys and values. dtype: `"float32"`, `"float16"` or `"bfloat16"`.
        group: query heads per kv head.

    Raises:
        PlanError: a kernel has no row for these arguments.
    """
    wanted = {"dk": dk, "dv": dv, "dtype": dtype, "group": group}
    return {
        kernel: dict(_first_fit(device, op, kernel, wanted)["constants"])
        for kernel in load(device, op)
    }


def accepted(
    device: str, op: str, kernel: str, *, dk: int, dv: int, dtype: str, group: int
) -> dict[str, str]:
    """What a kernel's row accepts, by the name of the finding: the reason. As `find`."""
    wanted = {"dk": dk, "dv": dv, "dtype": dtype, "group": group}
    return dict(_first_fit(device, op, kernel, wanted).get("accepts", {}))


def fits(row: dict[str, Any], *, dk: int, dv: int, dtype: str, group: int) -> bool:
    """Whether a call is within the bounds of a plan row."""
    return bool(
        dk <= row.get("max_dk", dk)
        and dv <= row.get("max_dv", dv)
        and dtype in row.get("dtypes", [dtype])
        and row.get("min_g", 1) <= group <= row.get("max_g", group)
    )


def _first_fit(device: str, op: str, kernel: str, wanted: dict[str, Any]) -> dict[str, Any]:
    for row in load(device, op)[kernel]:
        if fits(row, **wanted):
            return row
    raise PlanError(
        f"no tile plan for kernel '{kernel}' of op '{op}' on device '{device}' with {wanted}: "
        f"add a row to {PLANS_FOLDER / device / (op + '.json')}"
    )
