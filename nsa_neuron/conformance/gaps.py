"""Known gaps: what a backend gets wrong, is known to get wrong, and why; one file per backend.

A gap is strict: a case listed here that passes is a failure that says "remove it", so that the
files never outlive the defects. They are no place for what a backend refuses (`Unsupported` says
that itself).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path

from nsa_neuron.errors import NsaError


@dataclass(frozen=True)
class Gap:
    """Cases that a backend is known to fail; every field but `reason` is a glob.

    Attributes:
        op, mode, dtype, case: what is affected.
        reason: why, and what would close it.
        source: the file it stands in.
    """

    op: str
    mode: str
    dtype: str
    case: str
    reason: str
    source: str = ""

    def covers(self, op: str, mode: str, dtype: str, case: str) -> bool:
        pairs = ((op, self.op), (mode, self.mode), (dtype, self.dtype), (case, self.case))
        return all(fnmatchcase(value, pattern) for value, pattern in pairs)


def known_gaps(backend: str) -> tuple[Gap, ...]:
    """The gaps that this package lists for a backend; none for third parties' backends."""
    path = files("nsa_neuron").joinpath("known_gaps", f"{backend}.json")
    return _parse(path.read_text(), f"known_gaps/{backend}.json") if path.is_file() else ()


def load_gaps(source: str | Path | Sequence[Gap]) -> tuple[Gap, ...]:
    """Gaps from a file of the form `{"gaps": [{"op": ..., "mode": ..., ...}]}`, or as given.

    Raises:
        NsaError: the file cannot be read, or is not of that form.
    """
    if isinstance(source, (str, Path)):
        try:
            return _parse(Path(source).read_text(encoding="utf-8"), str(source))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise NsaError(
                f"{source} is no file of known gaps: {type(error).__name__}: {error}"
            ) from error
    return tuple(source)


def _parse(text: str, source: str) -> tuple[Gap, ...]:
    wanted = {field.name for field in fields(Gap)} - {"source"}
    gaps = []
    for i, row in enumerate(json.loads(text)["gaps"]):
        if set(row) != wanted or not row["reason"].strip():
            raise NsaError(f"{source}: gap {i} must have exactly {', '.join(sorted(wanted))}")
        gaps.append(Gap(**row, source=source))
    return tuple(gaps)
