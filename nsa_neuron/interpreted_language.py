"""Triton's language as its interpreter needs it, put in place once for a whole launch.

Triton itself looks through the language and replaces its members again at every call of a device
function, which takes longer than most of their bodies. This module imports Triton; import it only
where that is there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    import numpy as np

_ABSENT = object()


class _Language:
    """A context in which `tl` and what its library is made of are interpreted; may be nested."""

    def __init__(self) -> None:
        self._depth = 0
        self._members: list[tuple[Any, str, Any]] = []
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


def _interpreted_members() -> list[tuple[Any, str, Any]]:
    """What Triton replaces in its language for a kernel that sees both of its faces."""
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    try:
        changed = {(id(owner), name): (owner, name) for owner, name, _ in scope._changes}
        members = [(owner, name, vars(owner)[name]) for owner, name in changed.values()]
    finally:
        scope.restore()
    builder = interpreter.interpreter_builder
    return [
        *members,
        (interpreter, "_get_np_dtype", _remembering(interpreter._get_np_dtype)),
        (builder, "options", _without_idle_checks(builder.options)),
        (tl.tensor, "__init__", _quick_tensor(tl.tensor.__init__)),
        (tl.block_type, "__init__", _quick_block_type(tl.block_type.__init__)),
    ]


def _without_idle_checks(options: Any) -> Any:
    """No check of every integer's overflow: without `debug` its verdict is thrown away."""
    return replace(options, sanitize_overflow=options.sanitize_overflow and options.debug)


def _quick_tensor(shipped: Callable[..., None]) -> Callable[..., None]:
    """`tensor.__init__`, which builds its shape of constants; once per shape is enough."""
    known: dict[tuple[int, ...], dict[str, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else ()
        if shape not in known:
            shipped(self, handle, type)
            known[shape] = {"shape": self.shape, "numel": self.numel}
        vars(self).update(known[shape], handle=handle, type=type, dtype=type.scalar)

    return init


def _quick_block_type(shipped: Callable[..., None]) -> Callable[..., None]:
    """`block_type.__init__`, which checks its shape and spells its name; once is enough."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *shape)
        if key not in known:
            shipped(self, element_ty, shape)
            known[key] = {name: getattr(self, name) for name in ("shape", "numel", "name")}
        vars(self).update(known[key], element_ty=element_ty)

    return init


def _remembering(shipped: Callable[[Any], np.dtype[Any]]) -> Callable[[Any], np.dtype[Any]]:
    """Triton's `_get_np_dtype`, which builds a table of all dtypes to look up one."""
    known = functools.cache(shipped)

    def numpy_dtype(dtype: Any) -> np.dtype[Any]:
        # Types of blocks and of pointers cannot be hashed.
        scalar = dtype.scalar
        return shipped(scalar) if isinstance(scalar, tl.pointer_type) else known(scalar)

    return numpy_dtype
