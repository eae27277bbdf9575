"""The configuration of a kernel, from NKI 0.7 on.

What the options do to the compiler has no counterpart here: they are checked and kept. Defaults
that AWS does not publish are None.
"""

import os
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any

from ..rules.session import violation


class AddressRotation(Enum):
    """Whether the backend may move a tensor to another address."""

    AUTO = 0
    ENABLE = 1
    DISABLE = 2


def _check(config: Any, kinds: dict[str, type]) -> None:
    """Refuse values of another kind."""
    for item in fields(config):
        value, kind = getattr(config, item.name), kinds.get(item.name, bool)
        if value is not None and type(value) is not kind:
            raise violation(
                "configuration",
                f"is a {kind.__name__}",
                instruction=type(config).__name__,
                operand=item.name,
                value=value,
            )


@dataclass(frozen=True)
class CompileConfig:
    """Options of the compiler.

    Attributes:
        address_rotation: an `AddressRotation`.
        non_ssa_legalization, dead_code_elim: passes of the backend.
        barrier_check: look for races between two cores; the simulator always does.
        prefetch_auto: place loads in a ring of SBUF; excludes NKI_PREFETCH_RING_SIZE.
        nki_alloc_fallback: try neuronx-cc's allocation where NKI's fails; the simulator refuses
            what does not fit in either case.
    """

    address_rotation: AddressRotation = AddressRotation.AUTO
    non_ssa_legalization: bool | None = None
    dead_code_elim: bool | None = None
    barrier_check: bool | None = None
    prefetch_auto: bool = False
    nki_alloc_fallback: bool = True

    def __post_init__(self) -> None:
        _check(self, {"address_rotation": AddressRotation})
        if self.prefetch_auto and os.environ.get("NKI_PREFETCH_RING_SIZE"):
            raise violation(
                "configuration",
                "excludes NKI_PREFETCH_RING_SIZE, which is set",
                instruction="CompileConfig",
                operand="prefetch_auto",
                value=True,
            )


@dataclass(frozen=True)
class SpecializationConfig:
    """Options of the specialisation.

    Attributes:
        allow_nested_config_override: a nested kernel of another configuration is warned of instead
            of refused.
    """

    allow_nested_config_override: bool | None = None

    def __post_init__(self) -> None:
        _check(self, {})
