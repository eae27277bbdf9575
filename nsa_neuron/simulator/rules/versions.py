"""Versions of NKI: which there are, and the names that only some of them have.

Sources: AWS documentation v2.33.0 and v2.33.1 (NKI 0.7): nki/migration, release-notes/components/
nki, nki/deep-dives/nki-scalar, nki/deep-dives/nki-loops, and the pages of each name; SDK (NKI 0.6).
"""

from __future__ import annotations

from typing import Any

from .session import current_session, violation

VERSIONS = ("0.6", "0.7")
NEWEST = VERSIONS[-1]

# Names of `nki.language`, `nki.isa`, `nki.collectives` and `nki.compiler` that came with a version,
# and what the version before has in their place.
ADDED: dict[str, tuple[str, str]] = {
    "scalar_load": ("0.7", "nisa.register_load(register, src)"),
    "scalar_store": ("0.7", "nisa.register_store(dst, register)"),
    "NkiScalar": ("0.7", "nisa.VirtualRegister"),
    "int64": ("0.7", "nl.int32; addresses beyond 4 GiB by slicing at build time"),
    "tiles": ("0.7", "slices of the tensor"),
    "blocks": ("0.7", "slices of the tensor"),
    "alloc_tiles": ("0.7", "nl.ndarray(shape, dtype, buffer=...), or a list of tensors"),
    "alloc_blocks": ("0.7", "nl.ndarray(shape, dtype, buffer=...), or a list of tensors"),
    "NkiGrid": ("0.7", "nl.NkiTensor"),
    "NkiTileGrid": ("0.7", "nl.NkiTensor"),
    "NkiBlockGrid": ("0.7", "nl.NkiTensor"),
    "all_to_all_v_prepare": ("0.7", "ncc.all_to_all_v"),
    "all_to_all_v_trigger": ("0.7", "ncc.all_to_all_v"),
    "all_gather_v_prepare": ("0.7", "ncc.all_gather_v"),
    "all_gather_v_trigger": ("0.7", "ncc.all_gather_v"),
    "CompileConfig": ("0.7", "@nki.jit without a configuration"),
    "SpecializationConfig": ("0.7", "@nki.jit without a configuration"),
    "AddressRotation": ("0.7", "@nki.jit without a configuration"),
}

# Names that a version removed, and what it has in their place.
REMOVED: dict[str, tuple[str, str]] = {
    "dynamic_range": ("0.7", "nl.fori_loop(start, stop, body, step)"),
}

# Names that still work, from when on they are deprecated, and what to write.
DEPRECATED: dict[str, tuple[str, str]] = {
    "dynamic_range": ("0.6", "nl.fori_loop(start, stop, body, step); NKI 0.7 has removed it"),
    "affine_range": ("0.7", "range"),
    "sequential_range": ("0.7", "range"),
    "static_range": ("0.7", "range"),
}


def check_version(version: Any) -> None:
    """Refuse a version that is not simulated.

    Raises:
        ValueError: naming those that are.
    """
    if version not in VERSIONS:
        raise ValueError(
            f"NKI {version!r} is not simulated; versions: {', '.join(map(repr, VERSIONS))}"
        )


def is_in(name: str, version: str) -> bool:
    """Whether a version has a name; True for names that all have."""
    if name in ADDED and VERSIONS.index(version) < VERSIONS.index(ADDED[name][0]):
        return False
    gone = REMOVED.get(name)
    return gone is None or VERSIONS.index(version) < VERSIONS.index(gone[0])


def deprecation(name: str, version: str) -> str:
    """What to write in the place of a name that is deprecated in a version, else ""."""
    since, instead = DEPRECATED.get(name, ("", ""))
    late = since and VERSIONS.index(version) >= VERSIONS.index(since)
    return instead if late and is_in(name, version) else ""


def why_not(name: str, version: str) -> tuple[str, str]:
    """What is wrong with a name in a version that has not got it, and what to write."""
    if name in REMOVED:
        since, instead = REMOVED[name]
        return f"was removed in NKI {since}; NKI {version} is simulated", instead
    since, instead = ADDED[name]
    return f"is of NKI {since}; NKI {version} is simulated", instead


def require(what: str, name: str) -> None:
    """Refuse a call that the version being run has not got.

    Args:
        what: the call, for the message.
        name: its name in the tables above.

    Raises:
        SimulationError: rule "version".
    """
    session = current_session()
    if session is not None and not is_in(name, session.nki):
        message, instead = why_not(name, session.nki)
        raise violation("version", message, instruction=what, hint=instead)
