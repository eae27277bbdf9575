"""How long the host works for a pass of NSA, by a stand-in for the GPU.

    python -m tools.host_time [--tokens 8192 65536] [--repeats 20]

The launchers run as in a model, on tensors without memory, and every launch goes through Triton's
own code: arguments are bound and specialised, the compiled kernel is looked up, the grid computed.
Where the driver would be called, nothing is. So what is missing is the driver's launch (a few us
each), the allocator's work, and Python around the op (routing, autograd). CPU time of this machine,
which is no measurement of a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tools import launched


class StandInDriver:
    """What `JITFunction.run` asks a driver for: one device, one stream, the target sm_90."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def _compiled(launches: list[int]) -> Any:
    """A compiled kernel that counts its launches and does nothing."""

    def run(*arguments: Any) -> None:
        launches[0] += 1

    return SimpleNamespace(
        run=run, function=0, packed_metadata=(), launch_metadata=lambda *arguments: None
    )


@contextmanager
def stand_in() -> Iterator[list[int]]:
    """Launches reach Triton's code and end there inside; gives a list with their number.

    Kernels launched inside keep the stand-in for good; `launched.Stand` loads copies of its own.
    """
    launches, shipped, active = [0], JITFunction._do_compile, driver._active
    kernel = _compiled(launches)

    def compiled(self: Any, key: Any, signature: Any, device: int, *rest: Any) -> Any:
        self.device_caches[device][0][key] = kernel
        return kernel

    JITFunction._do_compile = compiled
    driver.set_active(StandInDriver())
    try:
        yield launches
    finally:
        JITFunction._do_compile = shipped
        driver._active = active  # `reset_active` would look for a GPU


def launch(x: launched.Launch) -> None:
    """As `kernel[grid](...)` does."""
    x.function[x.grid](*x.arguments, **x.constants)


def passes(heads: Any, tokens: int) -> dict[str, Callable[[], Any]]:
    """Forward and backward of NSA, ready to be called; see `launched.passes`."""
    values = launched.inputs(heads, tokens)
    forward = launched.lowered("nsa_attention_forward", values)
    saved = dict(zip(launched.SAVED, forward(), strict=True))
    whole = {"grad_o": saved.pop("o"), **values, **saved}
    return {"forward": forward, "backward": launched.lowered("nsa_attention_backward", whole)}


def host_times(tokens: int, repeats: int) -> dict[str, tuple[int, float]]:
    """Launches and median CPU time in us of each pass."""
    found = {}
    with stand_in() as launches, launched.standing_in(launch):
        for name, call in passes(launched.PAPER, tokens).items():
            call()
            times = []
            for _ in range(repeats):
                launches[0], start = 0, time.process_time()
                call()
                times.append(1e6 * (time.process_time() - start))
            found[name] = (launches[0], statistics.median(times))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 65536])
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args(argv)
    print(f"64/4/192/128, bfloat16, Triton {triton.__version__}, CPU time, no GPU")
    for tokens in args.tokens:
        for name, (count, us) in host_times(tokens, args.repeats).items():
            print(f"{tokens} {name}: {count} launches, {us:.0f} us, {us / count:.1f} us each")
    return 0


if __name__ == "__main__":
    sys.exit(main())
