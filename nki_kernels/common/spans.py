"""Cutting a range into pieces."""


def spans(count, size):
    """(start, length) of the pieces of at most `size` that cover 0..count-1."""
    pieces = []
    for start in range(0, count, size):
        pieces.append((start, min(size, count - start)))
    return pieces


def covering(count, size):
    """(starts, length) of pieces of one length that cover 0..count-1.

    The last piece begins early instead of being short, so that every piece runs the same program;
    rows in two pieces are made twice, with the same bits.
    """
    length = min(count, size)
    starts = []
    for start in range(0, count, length):
        starts.append(min(start, count - length))
    return starts, length
