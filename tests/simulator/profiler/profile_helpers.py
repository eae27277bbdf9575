"""Small kernels with known faults, and their profiles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa_neuron import simulator
from nsa_neuron.simulator import ShapeDtype
from nsa_neuron.simulator.command import loading
from nsa_neuron.simulator.memory.tensor import NkiTensor
from nsa_neuron.simulator.nki import isa as nisa
from nsa_neuron.simulator.nki import language as nl
from nsa_neuron.simulator.profiler.what_if import Baseline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from nsa_neuron.simulator import Profile
    from nsa_neuron.simulator.profiler.candidates import Candidate

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples" / "profiling" / "linear_gelu.py"
STEPS = ("one_buffer", "fresh_buffers", "loaded_once", "wide_tiles", "in_order_of_use")
HARDWARE = nisa.dge_mode.hwdge
EXAMPLE_ARGUMENTS = ("x_t=randn:1024x512:bf16", "w=randn:1024x2048:bf16")


def sbuf(shape: tuple[int, ...], dtype: Any = nl.float32) -> NkiTensor:
    return nl.ndarray(shape, dtype, buffer=nl.sbuf)


def psum(shape: tuple[int, ...], dtype: Any = nl.float32, **place: Any) -> NkiTensor:
    return nl.ndarray(shape, dtype, buffer=nl.psum, **place)


def hbm(shape: tuple[int, ...], dtype: Any = nl.float32) -> NkiTensor:
    return nl.ndarray(shape, dtype, buffer=nl.shared_hbm)


def profile_of(body: Callable[..., Any], *args: Any, lnc: int = 1, **options: Any) -> Profile:
    """The profile of a body that need not return anything."""

    def kernel(*inputs: Any) -> Any:
        result = body(*inputs)
        return result if isinstance(result, NkiTensor) else hbm((1, 1))

    options = {"relax": {"output-unwritten"}, **options}
    return simulator.profile(simulator.Kernel(kernel, lnc), **options)(*args)


def ask(
    rule: Callable[[Baseline], Iterator[Candidate]], body: Callable[..., Any], *args: Any,
    lnc: int = 1, **options: Any,
) -> tuple[list[Candidate], Baseline]:  # fmt: skip
    """The candidates of a rule, and the timeline that it looked at."""
    base = Baseline(profile_of(body, *args, lnc=lnc, **options).timeline)
    return list(rule(base)), base


def example(step: str, m: int = 512, n: int = 2048, k: int = 1024) -> Profile:
    """A kernel of the worked example, profiled."""
    with simulator.activate(), loading.imported(EXAMPLE) as module:
        kernel = loading.find_kernel(module, step)
        return simulator.profile(kernel)(
            ShapeDtype((k, m), "bfloat16"), ShapeDtype((k, n), "bfloat16")
        )


def pipeline(a: Any) -> NkiTensor:
    """exp(2 a) by tiles of 128 x 256: DMA, VectorE, ScalarE, DMA."""
    out = hbm(a.shape, a.dtype)
    for start in range(0, a.shape[1], 256):
        columns = slice(start, start + 256)
        tile, doubled, result = (sbuf((128, 256), a.dtype) for _ in range(3))
        nisa.dma_copy(tile, a[:, columns])
        nisa.tensor_tensor(doubled, tile, tile, nl.add)
        nisa.activation(result, nl.exp, doubled)
        nisa.dma_copy(out[:, columns], result)
    return out


def matmuls(a: Any, b: Any) -> NkiTensor:
    """a.T @ b by tiles of 128 x 512, [128 k, 128] by [128 k, 512 n]."""
    out = hbm((a.shape[1], b.shape[1]), a.dtype)
    for n in range(0, b.shape[1], 512):
        sums = psum((128, 512))
        for k in range(0, a.shape[0], 128):
            x, y = sbuf((128, 128), a.dtype), sbuf((128, 512), b.dtype)
            nisa.dma_copy(x, a[k : k + 128, :])
            nisa.dma_copy(y, b[k : k + 128, n : n + 512])
            nisa.nc_matmul(sums, x, y)
        result = sbuf((128, 512), a.dtype)
        nisa.tensor_copy(result, sums)
        nisa.dma_copy(out[:, n : n + 512], result)
    return out


def two_cores(a: Any) -> NkiTensor:
    """Each core copies its half of a."""
    out = hbm(a.shape, a.dtype)
    half = a.shape[1] // 2
    first = nl.program_id(0) * half
    tile = sbuf((128, half), a.dtype)
    nisa.dma_copy(tile, a[:, first : first + half])
    nisa.dma_copy(out[:, first : first + half], tile)
    return out


def shapes(*sizes: tuple[int, ...], dtype: str = "float32") -> list[ShapeDtype]:
    return [ShapeDtype(size, dtype) for size in sizes]
