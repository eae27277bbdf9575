"""Gather and scatter by an index tile: which rows of HBM a vector-indirect view names."""

import numpy as np

from ...memory.allocation import access_at
from ...memory.tensor import NkiTensor
from ...rules.session import violate, violation
from ...semantics.dma import in_bounds


def is_vector(tensor):
    """True for a view with a vector_offset."""
    return (
        type(tensor) is NkiTensor and tensor.dynamic is not None and tensor.dynamic.kind == "vector"
    )


def anywhere(view):
    """A stand-in for an indirect view in checks and record: it may touch the whole storage."""
    stand_in = view._view(view.shape, view.strides, 0)
    stand_in.dynamic = None
    allocation = view.memory.allocation
    place = allocation.form.place(view.access().layout, 0, True)
    stand_in._access = access_at(allocation, place.anywhere(allocation.form))
    return stand_in


def table_of(view):
    """The rows a vector-indirect view may address: a view [R, *rest], or None where R < 1."""
    dynamic = view.dynamic
    layout = view.access().layout
    total = view.memory.allocation.pitch_bytes // view.dtype.itemsize
    inner = sum((n - 1) * s for n, s in zip(layout.shape[1:], layout.strides[1:], strict=True))
    count = (total - 1 - inner - view.offset) // dynamic.stride + 1
    if dynamic.count is not None:
        count = min(count, dynamic.count)
    if count < 1:
        return None
    table = view._view((count, *view.shape[1:]), (dynamic.stride, *view.strides[1:]))
    table.dynamic = None
    return table


class Rows:
    """The rows of one indirect transfer.

    Attributes:
        table: view of all rows, or None where there is none.
        wanted: row numbers, of valid indices only.
        valid: which indices are valid, or None where all are.
    """

    __slots__ = ("table", "valid", "wanted")

    def __init__(self, core, instruction, role, view, indices, skip):
        self.table = table_of(view)
        count = self.table.shape[0] if self.table is not None else 0
        valid = in_bounds(indices, count)
        if not skip and not valid.all():
            bad = int(np.argmin(valid))
            violate(
                "oob",
                f"index {bad} is {int(indices[bad])}, the tensor has {count} rows",
                instruction=instruction,
                operand=role,
                value=int(indices[bad]),
                limit=f"0..{count - 1}",
                hint="oob_mode=nisa.oob_mode.skip leaves such rows alone",
            )
        self.valid = None if valid.all() else valid
        self.wanted = indices[valid]

    def views(self):
        """One view per row touched."""
        return [self.table[int(r) : int(r) + 1] for r in self.wanted]

    def require_readable(self, core, spec):
        """Refuse rows that were never written."""
        if not self.table.memory.written.full:
            for row in self.views():
                core.require_readable(row, spec)


def flat_indices(view, rows):
    """The first `rows` indices of a (P, 1) index tile."""
    return view.dynamic.index.array().reshape(-1)[:rows].astype(np.int64)


def one_index_per_row(view, instruction, role):
    """Refuse index tiles with more than one column, which only dma_transpose takes."""
    index = view.dynamic.index
    if index.size != index.shape[0]:
        raise violation(
            "shape",
            "vector_offset has one index per partition",
            instruction=instruction,
            operand=role,
            value=index.shape,
            limit="(P, 1)",
        )
