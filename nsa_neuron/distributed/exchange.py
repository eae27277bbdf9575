"""Messages between ranks: uneven, asynchronous, counted.

Everything that context parallelism moves goes through `exchange`: one all-to-all whose pieces have
any sizes, so that a rank sends each other rank only what that one needs. `counting` records the
bytes by purpose; they are tested against the formulas of `wire.py`.
"""

from __future__ import annotations

import math
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsa_neuron.errors import NsaError

Shape = tuple[int, ...]
WAITING = "nsa_distributed::wait"  # in profiler traces: what nothing hides
_counters: list[Counter[str]] = []
_lock = threading.Lock()


class RankFailure(NsaError, RuntimeError):
    """An exchange between ranks failed: one of them died, or did not come in time."""


class RanksDiffer(NsaError, ValueError):
    """Ranks that must call with the same arguments did not; raised on every one of them."""


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Bytes that this rank sends to other ranks while the `with` block runs, by purpose."""
    counter: Counter[str] = Counter()
    with _lock:
        _counters.append(counter)
    try:
        yield counter
    finally:
        with _lock:
            _counters.remove(counter)


class Pending:
    """An exchange under way; `wait` gives what the other ranks sent.

    Args:
        work: torch's handle; None: nothing had to be sent.
        sent: kept alive until it has arrived.
        buffer: where received elements land, rank after rank.
        shapes: of the pieces from each rank.
        purpose: for errors.
    """

    def __init__(
        self,
        work: Any,
        sent: Tensor,
        buffer: Tensor,
        shapes: Sequence[Sequence[Shape]],
        purpose: str,
    ) -> None:
        self._work, self._sent, self._buffer = work, sent, buffer
        self._shapes, self._purpose = shapes, purpose

    def wait(self) -> list[list[Tensor]]:
        """Pieces by rank.

        Raises:
            RankFailure: another rank is gone.
        """
        if self._work is not None:
            with failures(self._purpose), torch.profiler.record_function(WAITING):
                self._work.wait()
            self._work = None
        flat = [math.prod(shape) for shapes in self._shapes for shape in shapes]
        pieces = iter(self._buffer.split(flat))
        return [[next(pieces).view(shape) for shape in shapes] for shapes in self._shapes]


def exchange(
    group: dist.ProcessGroup | None,
    send: Sequence[Sequence[Tensor]],
    receive: Sequence[Sequence[Shape]],
    like: Tensor,
    purpose: str,
) -> Pending:
    """Starts to send pieces to each rank and to receive pieces from each.

    Args:
        group: of ranks, each of which calls this; None: there is no other rank.
        send: tensors for each rank of the group; nothing for oneself.
        receive: shapes of the tensors from each rank, which that rank's `send` must agree with.
        like: dtype and device of all pieces.
        purpose: under which the bytes are counted.
    """
    pieces = [piece.reshape(-1) for part in send for piece in part]
    sent = torch.cat(pieces) if pieces else like.new_empty(0)
    out = [sum(piece.numel() for piece in part) for part in send]
    into = [sum(math.prod(shape) for shape in part) for part in receive]
    buffer = like.new_empty(sum(into))
    if group is None:
        return Pending(None, sent, buffer, receive, purpose)
    count(purpose, sent)
    with failures(purpose):
        # Bytes, because gloo does not know every dtype.
        size = like.element_size()
        work = dist.all_to_all_single(
            buffer.view(torch.uint8),
            sent.view(torch.uint8),
            [n * size for n in into],
            [n * size for n in out],
            group=group,
            async_op=True,
        )
    return Pending(work, sent, buffer, receive, purpose)


def gather(group: dist.ProcessGroup | None, x: Tensor, purpose: str) -> list[Tensor]:
    """x of every rank; all have the same shape."""
    if group is None:
        return [x]
    world = group.size()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
    with failures(purpose):
        dist.all_gather(parts, x.contiguous(), group=group)
    count(purpose, x, world - 1)
    return parts


@contextmanager
def agreed(
    groups: Sequence[dist.ProcessGroup | None], like: Tensor
) -> Iterator[Callable[[str], None]]:
    """Makes sure that all ranks make the same call, or all raise.

    Inside, a rank checks its arguments and says what they are. Texts are compared over the groups,
    refusals too, so that no rank waits for one that raised. On accelerators that would wait for
    the device at each call, so there it happens only with NSA_CHECK_VALUES=1.

    Args:
        groups: of ranks, each of which calls this; None: no other rank.
        like: a tensor on the device that carries the texts.

    Raises:
        RanksDiffer: on every rank whose own arguments are right, with the texts that differ.
        RankFailure: another rank is gone.
    """
    said: list[str] = []
    refused: Exception | None = None
    try:
        yield said.append
    except NsaError as error:
        refused = error
        said = [f"refuses: {error}"]
    if like.device.type == "cpu" or os.environ.get("NSA_CHECK_VALUES") == "1":
        for group in groups:
            if group is not None:
                _compare(group, said[0], like.device, refused)
    if refused is not None:
        raise refused


def _compare(
    group: dist.ProcessGroup, text: str, device: torch.device, refused: Exception | None
) -> None:
    mine = text.encode()
    lengths = [int(n) for n in gather(group, torch.tensor([len(mine)], device=device), "agree")]
    padded = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    padded[: len(mine)] = torch.frombuffer(bytearray(mine), dtype=torch.uint8).to(device)
    texts = [
        bytes(part[:length].tolist()).decode()
        for part, length in zip(gather(group, padded, "agree"), lengths, strict=True)
    ]
    other = next((r for r, found in enumerate(texts) if found != texts[0]), None)
    if other is not None and refused is None:
        raise RanksDiffer(f"ranks differ\n  rank 0: {texts[0]}\n  rank {other}: {texts[other]}")


@contextmanager
def failures(purpose: str) -> Iterator[None]:
    """Names what failed where torch's process group raises."""
    try:
        yield
    except RuntimeError as error:
        raise RankFailure(
            f"the exchange '{purpose}' failed: another rank has ended, or did not come within the "
            f"process group's timeout ({error})"
        ) from error


def count(purpose: str, x: Tensor, times: int = 1) -> None:
    """Adds what is sent to the counters that are open."""
    with _lock:
        for counter in _counters:
            counter[purpose] += x.numel() * x.element_size() * times
