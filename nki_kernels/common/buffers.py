"""Tiles on chip."""

import nki.language as nl


def sbuf(shape, dtype):
    """An unwritten tile in SBUF."""
    return nl.ndarray(shape, dtype=dtype, buffer=nl.sbuf)


def psum(shape, dtype=nl.float32):
    """An unwritten tile in PSUM, at most one bank."""
    return nl.ndarray(shape, dtype=dtype, buffer=nl.psum)


def columns(count, rows, dtype=nl.float32):
    """`count` unwritten tiles [rows, 1] in SBUF."""
    found = []
    for _ in range(count):
        found.append(sbuf((rows, 1), dtype))
    return found
