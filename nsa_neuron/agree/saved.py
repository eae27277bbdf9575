"""One call of an nsa op in a file, so that it can be tried again: anywhere, on any target."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.errors import NsaError
from nsa_neuron.ops import get

if TYPE_CHECKING:
    from pathlib import Path

    from nsa_neuron.spec import OpSpec

SUFFIX = ".pt"
FORMAT = "nsa call 1"


@dataclass(frozen=True)
class SavedCall:
    """A call's op and arguments.

    Attributes:
        spec: the op.
        values: every argument by name, tensors on the CPU.
    """

    spec: OpSpec
    values: dict[str, Any]

    @property
    def function(self) -> Callable[..., Any]:
        """Calls the op on whatever target is in use, without gradients."""
        op = getattr(torch.ops.nsa, self.spec.name).default

        def call(**values: Any) -> Any:
            return op(**{name: _detached(x) for name, x in values.items()})

        call.__name__ = self.spec.name
        return call


def save(folder: Path, name: str, spec: OpSpec, values: Mapping[str, Any]) -> Path:
    """Writes a call, whole or not at all.

    Args:
        folder: made if it is not there.
        name: of the file, without suffix.
        spec: the op.
        values: its arguments by name.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}{SUFFIX}"
    half = file.with_suffix(f".{os.getpid()}")
    # A view would bring its whole storage along.
    given = {
        n: _detached(x).cpu().clone() if isinstance(x, Tensor) else x for n, x in values.items()
    }
    try:
        torch.save({"format": FORMAT, "op": spec.name, "values": given}, half)
        return half.replace(file)
    finally:
        half.unlink(missing_ok=True)


def load(file: Path) -> SavedCall:
    """The call in a file.

    Raises:
        NsaError: there is no such file, or it holds no call.
    """
    if not file.is_file():
        raise NsaError(f"there is no file {file}")
    try:
        found = torch.load(file, weights_only=True)
    except Exception as error:
        raise NsaError(f"{file} cannot be read: {str(error).partition(chr(10))[0]}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise NsaError(f"{file} holds no saved call of `nsa agree --save`")
    return SavedCall(get(found["op"]), found["values"])


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x
