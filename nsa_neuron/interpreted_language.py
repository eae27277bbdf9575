"""Triton's language as its interpreter needs it, put in place once for a whole launch.

Triton itself looks through the language and replaces its members again at every call of a device
function, which takes longer than most of their bodies. This module imports Triton; import it only
where that is there.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from nsa_neuron.interpreted_shortcuts import direct, shortcuts

if TYPE_CHECKING:
    from nsa_neuron.interpreted_operators import Member

_ABSENT = object()


class _Language:
    """A context in which `tl` and what its library is made of are interpreted; may be nested."""

    def __init__(self) -> None:
        self._depth = 0
        self._members: list[Member] = []
        self._before: list[Any] = []

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._members = self._members or _interpreted_members()
            self._before = [vars(owner).get(name, _ABSENT) for owner, name, _ in self._members]
            for owner, name, member in self._members:
                setattr(owner, name, member)

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            for (owner, name, _member), before in zip(self._members, self._before, strict=True):
                if before is _ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, before)


INTERPRETED_LANGUAGE = _Language()


def interpret_library_functions() -> None:
    """Lets interpreted kernels call Triton's own library functions (`tl.sum`, `tl.zeros`, ...).

    Those are Triton kernels themselves, decorated when `triton` was imported, hence compiled ones
    unless the environment said TRITON_INTERPRET=1 at that time. Calling a compiled function outside
    a kernel always raises, so giving that call a meaning takes nothing from anybody.
    """

    def call(function: Any, *args: object, **kwargs: object) -> object:
        known = interpreter.InterpretedFunction.rewritten_fn
        body = known.get(function.fn) or interpreter.InterpretedFunction(function.fn).rewrite()
        with INTERPRETED_LANGUAGE:
            return body(*args, **kwargs)

    JITFunction.__call__ = call


def _interpreted_members() -> list[Member]:
    """What Triton replaces in its language for a kernel that sees both of its faces."""
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        shipped: dict[tuple[int, str], Member] = {}
        for owner, name, member in scope._changes:
            shipped.setdefault((id(owner), name), (owner, name, member))  # the first is Triton's
        members = [
            (owner, name, direct(member, vars(owner)[name]))
            for owner, name, member in shipped.values()
        ]
    finally:
        scope.restore()
    return [*members, *shortcuts(members)]
