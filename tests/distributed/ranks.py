"""Processes that run checks together: started once per file, over gloo."""

from __future__ import annotations

import gc
import multiprocessing
import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

PRELOAD = [
    "nsa_neuron.distributed", "nsa_neuron.distributed.training", "nsa_neuron.backends.cpu",
    "torch.distributed.checkpoint._fsspec_filesystem", "torch.profiler", "torch.optim", "pytest",
]  # fmt: skip
"""Imported once, before ranks fork: what checks need, and what their files do."""


def _serve(rank: int, world: int, store: str, pipe: Any) -> None:
    """One rank: joins the group, then runs what it is sent until it is sent None."""
    gc.freeze()  # what was imported before the fork is neither walked through nor copied
    gc.set_threshold(100_000, 50, 100)
    os.environ.update(OMP_NUM_THREADS="1", RANK=str(rank), WORLD_SIZE=str(world))
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=200),
    )
    while (work := pipe.recv()) is not None:
        check, args = work
        torch.manual_seed(0)
        try:
            pipe.send((True, check(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """A group of processes; calling it runs a function on each and gives what they return."""

    def __init__(self, world: int, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.world = world
        self._pipes, self._processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world, str(folder / "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(mine)
            self._processes.append(process)

    def __call__(self, check: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
        """Results by rank.

        Raises:
            AssertionError: with the traceback of the first rank that failed.
        """
        for pipe in self._pipes:
            pipe.send((check, args))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(timeout):
                self.close()
                raise AssertionError(f"rank {rank} gave no answer within {timeout} s")
            answers.append(pipe.recv())
        wrong = [f"rank {r}:\n{answer}" for r, (ok, answer) in enumerate(answers) if not ok]
        assert not wrong, "\n".join(wrong)
        return [answer for _, answer in answers]

    def first(self, check: Callable[..., Any], *args: Any, timeout: float = 240) -> Any:
        """The result of rank 0, where another may end."""
        for pipe in self._pipes:
            pipe.send((check, args))
        assert self._pipes[0].poll(timeout), f"rank 0 gave no answer within {timeout} s"
        right, answer = self._pipes[0].recv()
        assert right, answer
        return answer

    def close(self) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
                process.join()
