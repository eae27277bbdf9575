"""Collectives of run-time sizes: tensors are flat, sizes come from a uint32 metadata tensor."""

from ...issue.current import require_core
from ...rules.session import violate
from ..binding import save
from .group import Exchange, check_memory, check_priority, issue, refuse, ring_of, tensors_of


def start(name, srcs, dsts, replica_group, metadata, has_rdispls, priority):
    """Check the arguments; what `collect` needs of them."""
    core = require_core(f"ncc.{name}")
    check_priority(name, priority)
    srcs = tensors_of(name, "srcs", srcs, 1)
    dsts = tensors_of(name, "dsts", dsts, 1)
    check_memory(name, srcs, dsts, sbuf=False)
    ring, place = ring_of(core, replica_group, name)
    if has_rdispls:
        violate(
            "generation",
            "has_rdispls=True is not supported on trn2",
            instruction=f"ncc.{name}",
            operand="has_rdispls",
            value=True,
            limit=False,
        )
    rows = 4 if has_rdispls else 3
    wanted = (1, rows, len(ring)) if metadata.on_chip else (rows, len(ring))
    if metadata.shape != wanted or metadata.dtype.name != "uint32":
        raise refuse(
            name,
            "has the wrong shape or dtype",
            "metadata_tensor",
            value=(metadata.shape, metadata.dtype.name),
            limit=(wanted, "uint32"),
        )
    exchange = Exchange(core, name, ring, ring, (*srcs, *dsts))
    return core, srcs[0], dsts[0], ring, place, exchange, rows


def _place(name, core, dst, ring, chunks, table, recv_counts_known, has_rdispls):
    """Write each sender's chunk to its place in dst, and the counts to row 2."""
    slot = dst.size // len(ring)
    written = dst.reshape((dst.size,))
    for k, chunk in enumerate(chunks):
        start = int(table[3, k]) if has_rdispls else slot * k
        limit = dst.size if has_rdispls else start + slot
        if start + chunk.size > limit:
            violate(
                "oob",
                f"{chunk.size} elements of rank {ring[k]} do not fit at {start}",
                instruction=f"ncc.{name}",
                operand="dsts",
                value=chunk.size,
                limit=limit - start,
            )
            continue
        if chunk.size:
            part = written[start : start + chunk.size]
            save(core, part, chunk)
            core.mark_written(part)
    if not recv_counts_known:
        table[2] = [c.size for c in chunks]


def _chunk(name, flat, count, start, rank):
    count, start = int(count), int(start)
    if start + count > flat.size:
        violate(
            "oob",
            f"rank {rank} sends {count} elements from {start}",
            instruction=f"ncc.{name}",
            operand="srcs",
            value=start + count,
            limit=flat.size,
        )
    return flat[start : start + count]


def collect(title, prepared, metadata, recv_counts_known, has_rdispls, select, name):
    """Issue the collective; `select(table, place)` gives a rank's count and start."""
    core, src, dst, ring, place, exchange, rows = prepared

    def compute(arrays, outs):
        dst, out = outs
        chunks = []
        for rank in ring:
            flat, table = arrays[rank][0].reshape(-1), arrays[rank][1].reshape(rows, -1)
            count, start = select(table, place)
            chunks.append(_chunk(title, flat, count, start, rank))
        table = out.array().reshape(rows, -1)
        _place(title, core, dst, ring, chunks, table, recv_counts_known, has_rdispls)

    params = (ring, bool(recv_counts_known), bool(has_rdispls))
    operands = (dst, metadata), (src, metadata)
    return issue(core, exchange, *operands, compute, params, name, partial=True)


def share(table, place):
    """What a rank sends to all: count and start."""
    return table[0, 0], table[1, 0]


def own(table, place):
    """What a rank sends to the one at `place`: count and start."""
    return table[0, place], table[1, place]


def four_of_two(core, ring, title):
    """all_gather_v exists for two cores and four ranks."""
    if core.launch.lnc != 2 or len(ring) != 4:
        violate(
            "collective",
            "supports only kernel[2] and groups of four ranks",
            instruction=f"ncc.{title}",
            operand="replica_group",
            value=(core.launch.lnc, len(ring)),
            limit=(2, 4),
        )


def all_gather_v(
    srcs,
    dsts,
    replica_group,
    metadata_tensor,
    recv_counts_known=False,
    has_rdispls=False,
    priority=None,
    name=None,
):
    """Slot s of dst begins with the chunk that rank s sends to all."""
    title = "all_gather_v"
    prepared = start(title, srcs, dsts, replica_group, metadata_tensor, has_rdispls, priority)
    four_of_two(prepared[0], prepared[3], title)
    collect(title, prepared, metadata_tensor, recv_counts_known, has_rdispls, share, name)


def all_to_all_v(
    srcs,
    dsts,
    replica_group,
    metadata_tensor,
    recv_counts_known=False,
    has_rdispls=False,
    priority=None,
    name=None,
):
    """Slot s of dst begins with the chunk that rank s sends to this rank."""
    title = "all_to_all_v"
    prepared = start(title, srcs, dsts, replica_group, metadata_tensor, has_rdispls, priority)
    collect(title, prepared, metadata_tensor, recv_counts_known, has_rdispls, own, name)
