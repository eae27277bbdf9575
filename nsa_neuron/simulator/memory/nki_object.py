"""`nl.NKIObject`: classes that a kernel may use and take as arguments."""

from __future__ import annotations

import inspect
from typing import Any


class NKIObject:
    """Base of the classes a kernel may use; arguments of this kind are copied in by `__dict__`.

    As in NKI, where `@dataclass` on a subclass changes nothing, every attribute with a default is a
    field, annotated or not, and is set by keyword or, in order, by position.
    """

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__slots__" in cls.__dict__:
            return
        annotated = inspect.get_annotations(cls)
        for name, value in cls.__dict__.items():
            plain = not callable(value) and not hasattr(type(value), "__get__")
            if not name.startswith("__") and plain and type(value).__hash__ is not None:
                annotated.setdefault(name, Any)
        cls.__annotations__ = annotated
        if "__init__" not in cls.__dict__ and all(
            "__init__" not in c.__dict__ or c.__dict__["__init__"] is NKIObject.__init__
            for c in cls.__mro__[1:-1]
        ):
            cls.__init__ = NKIObject.__init__  # type: ignore[method-assign]  # dataclass keeps it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _set_fields(self, args, kwargs)


def _set_fields(self: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set fields by position and keyword; one without a value or default stays unset, as in NKI."""
    owners = type(self).__mro__
    names = [n for c in reversed(owners) for n in inspect.get_annotations(c)]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    unknown = [n for n in given if names and n not in names]
    if unknown or len(args) > len(names):
        what = f"field {unknown[0]!r}" if unknown else f"{len(args)} positional arguments"
        raise TypeError(f"{type(self).__name__}() got an unexpected {what}; fields: {names}")
    factories = getattr(type(self), "__dataclass_fields__", {})
    for name in dict.fromkeys((*names, *given)):
        if name in given:
            value = given[name]
        elif hasattr(type(self), name):
            value = getattr(type(self), name)
        elif callable(getattr(factories.get(name), "default_factory", None)):
            value = factories[name].default_factory()
        else:
            continue
        object.__setattr__(self, name, value)
    if hasattr(self, "__post_init__"):
        self.__post_init__()
