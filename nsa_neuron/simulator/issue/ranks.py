"""Threads of one run: the cores of a launch, and the ranks of a collective run.

One thread runs at a time and hands over where it must wait, so runs are deterministic and a
deadlock is seen at once: nobody can run and somebody waits.
"""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from ..rules.errors import DeadlockError
from ..rules.session import call_site, locate, violation
from ..rules.table import declare

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..rules.errors import Location

_CC = "SDK nki/api/nki/collectives"
declare("collective", _CC, "the collective's tensors, group or dims are not allowed")
declare("collective-deadlock", _CC, "ranks wait for each other for ever", DeadlockError)


class Aborted(BaseException):
    """Ends a thread after another one failed."""


class Scheduler:
    """Runs bodies as threads, one at a time, switching where they meet.

    Args:
        count: number of threads.
        rule: rule broken by a deadlock.
        describe: name of thread i in the report.
    """

    def __init__(self, count: int, rule: str, describe: Callable[[int], str]) -> None:
        self._condition = threading.Condition()
        self._count = count
        self._rule = rule
        self._describe = describe
        self._turn = 0
        self._waiting: dict[int, tuple[Any, tuple[int, ...], Any, str]] = {}
        self._parked: dict[int, tuple[Callable[[], bool], bool, str]] = {}
        self._received: dict[int, dict[int, Any]] = {}
        self._finished: set[int] = set()
        self._failed: BaseException | None = None
        self._places: dict[int, Location | None] = {}

    def run(self, bodies: Sequence[Callable[[], Any]]) -> list[Any]:
        """Run one body per thread; return their results or raise the first failure."""
        results: list[Any] = [None] * len(bodies)

        def thread(me: int) -> None:
            try:
                with self._condition:
                    self._await_turn(me)
                results[me] = bodies[me]()
            except Aborted:
                pass
            except BaseException as error:
                with self._condition:
                    self._failed = self._failed or error
            finally:
                with self._condition:
                    self._finished.add(me)
                    self._hand_over()

        threads = [
            threading.Thread(target=thread, args=(i,), name=f"nki-{i}", daemon=True)
            for i in range(len(bodies))
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if self._failed is not None:
            raise self._failed
        return results

    def meet(
        self, me: int, members: tuple[int, ...], key: Any, payload: Any, what: str
    ) -> dict[int, Any]:
        """Wait until every member has arrived with the same key; return all payloads.

        Args:
            me: this thread.
            members: threads that must arrive, this one among them.
            key: what all must agree on, such as ("sendrecv", pipe_id).
            payload: handed to the others.
            what: description for the deadlock report.

        Raises:
            Aborted: the run has failed; its deadlock or other error is raised by `run`.
        """
        with self._condition:
            place = self._places[me] = locate(call_site())
            self._waiting[me] = (key, members, payload, f"{what} at {place}")
            if all(self._agrees(m, key, members) for m in members):
                payloads = {m: self._waiting.pop(m)[2] for m in members}
                for m in members:
                    self._received[m] = payloads
            else:
                self._hand_over()
                self._await_turn(me)
            return self._received.pop(me)

    def park(self, me: int, ready: Callable[[], bool], what: str, soft: bool) -> None:
        """Let others run until something is ready.

        Args:
            me: this thread.
            ready: tells whether this thread can go on; asked on other threads too.
            what: description for the deadlock report.
            soft: True where this thread may go on before that, once nobody else can run.

        Raises:
            Aborted: see `meet`.
        """
        with self._condition:
            if not ready():
                place = self._places[me] = locate(call_site())
                self._parked[me] = (ready, soft, f"{what} at {place}")
                self._hand_over()
                self._await_turn(me)

    def take_turns(self, me: int) -> None:
        """Let the next thread that can run go first."""
        with self._condition:
            self._hand_over()
            self._await_turn(me)

    def _runnable(self, candidate: int) -> bool:
        if candidate in self._waiting or candidate in self._finished:
            return False
        parked = self._parked.get(candidate)
        return parked is None or parked[0]()

    def _agrees(self, member: int, key: Any, members: tuple[int, ...]) -> bool:
        waiting = self._waiting.get(member)
        return waiting is not None and waiting[0] == key and waiting[1] == members

    def _hand_over(self) -> None:
        """Give the turn to the next thread that can run; nobody and some wait: a deadlock."""
        order = [(self._turn + step) % self._count for step in range(1, self._count + 1)]
        able = [c for c in order if self._runnable(c)]
        able += [c for c in order if c in self._parked and self._parked[c][1]]
        if able:
            self._turn = able[0]
            self._parked.pop(able[0], None)
        elif (self._waiting or self._parked) and self._failed is None:
            self._failed = self._deadlock()
        self._condition.notify_all()

    def _await_turn(self, me: int) -> None:
        while True:
            if self._failed is not None:
                raise Aborted
            if self._turn == me and me not in self._waiting and me not in self._parked:
                return
            self._condition.wait()

    def _deadlock(self) -> BaseException:
        texts = {i: w[3] for i, w in self._waiting.items()}
        texts |= {i: p[2] for i, p in self._parked.items()}
        lines = [f"{self._describe(i)} waits in {text}" for i, text in sorted(texts.items())]
        lines += [f"{self._describe(i)} has ended" for i in sorted(self._finished)]
        return violation(self._rule, "; ".join(lines), location=self._places[min(texts)])


class World:
    """The ranks of one run, each a launch of `lnc` cores.

    Attributes:
        ranks: number of ranks.
        lnc: cores per rank.
        scheduler: runs them; thread `rank * lnc + core`.
    """

    def __init__(self, ranks: int, lnc: int) -> None:
        self.ranks = ranks
        self.lnc = lnc
        rule = "lnc-deadlock" if ranks == 1 else "collective-deadlock"
        self.scheduler = Scheduler(ranks * lnc, rule, self._describe)

    def _describe(self, thread: int) -> str:
        rank, core = divmod(thread, self.lnc)
        if self.ranks == 1:
            return f"core {core}"
        return f"rank {rank} core {core}" if self.lnc > 1 else f"rank {rank}"


class PerRank:
    """An argument whose value differs by rank.

    Args:
        values: one value per rank.
    """

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = list(values)

    def of(self, rank: int, ranks: int) -> Any:
        """The value of one rank.

        Raises:
            UsageError: another number of values than ranks.
        """
        if len(self.values) != ranks:
            raise violation(
                "usage",
                "needs one value per rank",
                instruction="PerRank",
                value=len(self.values),
                limit=ranks,
            )
        return self.values[rank]


def of_rank(value: Any, rank: int, ranks: int) -> Any:
    """An argument as one rank sees it: `PerRank` values picked, shared arrays copied."""
    if isinstance(value, PerRank):
        return value.of(rank, ranks)
    if isinstance(value, np.ndarray):
        return value.copy()
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(of_rank(v, rank, ranks) for v in value)
    if isinstance(value, dict):
        return {k: of_rank(v, rank, ranks) for k, v in value.items()}
    if hasattr(value, "detach") and hasattr(value, "clone"):
        return value.detach().clone()
    return copy.copy(value) if hasattr(value, "__dict__") and not callable(value) else value
