"""Kernels that repositories show as examples, against NumPy or the reference beside them.

All of the SDK's `nki/examples`; `elsewhere` has those of other repositories.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from nsa_neuron import simulator

from .checkouts import path_of
from .manager import Outcome, compare, copied

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

RNG = np.random.default_rng(0)


def _normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.standard_normal(shape).astype(dtype)


def load(repository: str, file: str) -> ModuleType:
    """Import a file of a checkout by its path."""
    root = path_of(repository)
    assert root is not None
    path = root / file
    folder = str(path.parent)
    name = Path(file).stem.replace("-", "_")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(folder)
    return module


@dataclass(frozen=True)
class ExampleCase:
    """One kernel.

    Attributes:
        file: path in the checkout.
        kernel: name of the function.
        inputs: makes the arguments.
        reference: `reference(module, *arguments)` gives the result or a tuple of results.
        rtol: relative to the largest magnitude of the result.
        relax: rule id -> why the code breaks it.
        repository: whose checkout.
    """

    file: str
    kernel: str
    inputs: Callable[[], tuple[Any, ...]]
    reference: Callable[..., Any]
    rtol: float = 0.0
    relax: dict[str, str] = field(default_factory=dict)
    repository: str = "sdk"

    @property
    def id(self) -> str:
        """Name in pytest and in the table."""
        return f"{self.kernel}@{Path(self.file).stem}"

    @property
    def source(self) -> str:
        """Where the kernel comes from."""
        return self.file

    def run(self) -> Outcome:
        """Run the kernel on the simulator and compare."""
        module = load(self.repository, self.file)
        arguments = self.inputs()
        run = simulator.simulate(getattr(module, self.kernel), relax=self.relax)
        got = run(*copied(arguments))
        want = self.reference(module, *arguments)
        pairs = zip(
            got if isinstance(got, tuple) else (got,),
            want if isinstance(want, tuple) else (want,),
            strict=True,
        )
        shapes = ["x".join(map(str, a.shape)) for a in arguments if isinstance(a, np.ndarray)]
        outcome = Outcome(shapes=shapes, instructions=len(run.run.instructions))
        for error in (e for core in run.run.cores for e in core.relaxed):
            outcome.relaxed[error.rule] = outcome.relaxed.get(error.rule, 0) + 1
        for position, (g, w) in enumerate(pairs):
            compare(outcome, f"result {position}", g, w, self.rtol, 0.0)
        return outcome


def _mamba() -> tuple[Any, ...]:
    batch, channels, length, states = 1, 256, 512, 4
    delta, u = _normal(batch, channels, length), _normal(batch, channels, length)
    a = -np.abs(_normal(channels, states))
    return np.abs(delta), u, a, _normal(batch, states, length), _normal(batch, states, length)


def _mamba_reference(module: Any, delta: Any, u: Any, a: Any, b: Any, c: Any) -> Any:
    """The state-space recurrence in float64: h = exp(delta a) h + delta u b; y = sum(h c)."""
    wide = [x.astype(np.float64) for x in (delta, u, a, b, c)]
    delta, u, a, b, c = wide
    state = np.zeros((*delta.shape[:2], a.shape[1]))
    out = np.empty_like(delta)
    for t in range(delta.shape[2]):
        state *= np.exp(delta[:, :, t, None] * a)
        state += (delta * u)[:, :, t, None] * b[:, None, :, t]
        out[:, :, t] = (state * c[:, None, :, t]).sum(-1)
    return out


def _matmul(rows: int, inner: int, columns: int) -> Callable[[], tuple[Any, ...]]:
    """lhs transposed [K, M] and rhs [K, N], bf16."""
    dtype = ml_dtypes.bfloat16
    return lambda: (_normal(inner, rows, dtype=dtype), _normal(inner, columns, dtype=dtype))


def _product(module: Any, left: Any, right: Any) -> Any:
    return left.astype(np.float64).T @ right.astype(np.float64)


def _transposed(module: Any, x: Any, shape: tuple[int, int]) -> Any:
    return x.reshape(-1, *shape).transpose(0, 2, 1).reshape(x.shape)


def _pooled(module: Any, x: Any, n: int) -> Any:
    c, h, w = x.shape
    return x.reshape(c, h // n, n, w // n, n).max(axis=(2, 4))


_BF16 = 2.0**-7
_MATMUL = "matrix_multiplication/matrix_multiplication_nki_kernels.py"


def matmuls(repository: str, folder: str) -> list[ExampleCase]:
    """The kernels of the tutorial on matrix multiplication, which two repositories hold."""
    return [
        ExampleCase(
            f"{folder}/{_MATMUL}", f"nki_matmul_{name}_", _matmul(*shape), _product, _BF16,
            repository=repository,
        )
        for name, shape in (
            ("basic", (64, 128, 512)),
            ("tiled", (256, 256, 1024)),
            ("hoist_load", (256, 256, 1024)),
            ("block_free_dimension", (256, 256, 1024)),
            ("fully_optimized", (2048, 1024, 1024)),
        )
    ]  # fmt: skip


CASES: tuple[ExampleCase, ...] = (
    *(
        ExampleCase(
            f"nki/examples/getting_started_{flavour}.py",
            "nki_tensor_add_kernel",
            lambda: (np.ones((4, 3), np.float16), _normal(4, 3, dtype=np.float16)),
            lambda m, a, b: a + b,
        )
        for flavour in ("baremetal", "torch", "jax")
    ),
    ExampleCase(
        "nki/examples/simulate/nki_simulate_example.py",
        "add_kernel",
        lambda: (_normal(128, 512), _normal(128, 512)),
        lambda m, a, b: a + b,
    ),
    ExampleCase(
        "nki/examples/tensor_addition/tensor_addition_nki_kernels.py",
        "nki_tensor_add",
        lambda: tuple(_normal(256, 1024, dtype=ml_dtypes.bfloat16) for _ in range(2)),
        lambda m, a, b: a + b,
    ),
    ExampleCase(
        "nki/examples/index-case-1.py",
        "tensor_split_kernel_",
        lambda: (_normal(64, 77, dtype=ml_dtypes.bfloat16),),
        lambda m, x: (x[:, ::2], x[:, 1::2]),
    ),
    ExampleCase(
        "nki/examples/index-case-3.py",
        "tensor_maxpool_kernel_",
        lambda: (_normal(16, 12, 18), 3),
        _pooled,
    ),
    ExampleCase(
        "nki/examples/layout-pass.py",
        "tensor_exp_kernel_",
        lambda: (_normal(128, 512),),
        lambda m, x: np.exp(x.astype(np.float64)),
        1e-6,
    ),
    ExampleCase(
        "nki/examples/transpose2d/transpose2d_nki_kernels.py",
        "tensor_transpose2D_kernel_",
        lambda: (np.arange(60, dtype=np.int8).reshape(5, 12), (3, 4)),
        _transposed,
    ),
    ExampleCase(
        "nki/examples/average_pool2d/average_pool2d_nki_kernels.py",
        "tensor_avgpool_kernel",
        lambda: (_normal(32, 8, 12), 2),
        lambda m, x, n: m.np_average_pool_2D(x, n),
        1e-6,
    ),
    *matmuls("sdk", "nki/examples"),
    *matmuls("samples", "src/nki_samples/tutorials"),
    *(
        ExampleCase(
            "nki/examples/fused_mamba/mamba_nki_kernels.py",
            f"mamba_v{v}",
            _mamba,
            _mamba_reference,
            1e-5,
        )
        for v in (1, 2, 3)
    ),
)
