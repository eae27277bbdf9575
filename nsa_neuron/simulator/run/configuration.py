"""What a kernel is launched with besides its arguments: number of cores, configuration."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from ..rules.session import violation

if TYPE_CHECKING:
    from ..issue.core import NeuronCore

_DEGREE = "NEURON_LOGICAL_NC_CONFIG"


def degree(given: int | None, version: str, kernel: str) -> int:
    """How many cores run a kernel.

    Args:
        given: what the launch bracket says, or None.
        version: of NKI; from 0.7 on the environment decides where there is no bracket.
        kernel: its name.

    Raises:
        UsageError: rule "lnc": a value of the environment that is neither 1 nor 2, or another one
            than the bracket's, as NCC_EVRF066 (NKI 0.7) or the runtime (NKI 0.6) refuses.
    """
    set_to = os.environ.get(_DEGREE)
    if set_to is None:
        return given or 1
    if set_to not in ("1", "2"):
        raise violation(
            "lnc", f"{_DEGREE} is 1 or 2", instruction=kernel, value=set_to, limit=(1, 2)
        )
    number = int(set_to)
    asked = given or (1 if version == "0.6" else number)
    if asked != number:
        code = "the runtime fails" if version == "0.6" else "NCC_EVRF066"
        raise violation(
            "lnc",
            f"the kernel has LNC degree {asked}, the environment {number}: {code}",
            instruction=kernel,
            value=asked,
            limit=number,
            hint=f"kernel[{number}](...)"
            if version == "0.6"
            else f"set {_DEGREE}={asked}, or leave the bracket out",
        )
    return asked


def check_configured(configs: tuple[Any, Any], version: str, kernel: str) -> None:
    """Refuse the configuration of a kernel where NKI has none yet.

    Raises:
        UsageError: rule "version".
    """
    if version == "0.6" and configs != (None, None):
        raise violation(
            "version",
            "compile_config= and specialization_config= are of NKI 0.7; NKI 0.6 is simulated",
            instruction=kernel,
            hint="@nki.jit",
        )


def check_nested(core: NeuronCore, nested: tuple[Any, Any], name: str) -> None:
    """What a kernel that another one calls is inlined under: the top kernel's configuration.

    Raises:
        UsageError: rule "configuration": its own differs, and the top kernel's does not say
            `allow_nested_config_override`.
    """
    if core.nki == "0.6":
        core.warn(
            f"{name}, decorated with @nki.jit, is called by a kernel: documented from NKI 0.7 on; "
            "for NKI 0.6 decorate only what is launched"
        )
        return
    top = core.state.get("configuration", (None, None))
    differs = [n for n, t in zip(nested, top, strict=True) if n is not None and n != t]
    if not differs:
        return
    what = f"{name} is inlined under the configuration of the kernel that calls it, not its own"
    if top[1] is not None and top[1].allow_nested_config_override:
        core.warn(what)
        return
    raise violation(
        "configuration",
        what,
        instruction=name,
        value=differs[0],
        limit=top[0] if nested[0] in differs else top[1],
        hint="the same configuration for both, or SpecializationConfig("
        "allow_nested_config_override=True) for the kernel that is launched",
    )
