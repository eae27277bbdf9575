"""What one pass of NSA asks of a GPU: every kernel launch and every torch operation, without a GPU.

The launchers run on tensors without memory ("meta"), at full size, with kernels that only note what
they are called with. From that follow the counts of `docs/performance.md`, what there is to compile
(`prewarm.py`) and the work that the host does for a pass (`host_time.py`).

    python -m tools.launched                  # the table
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nsa_neuron.backends import cuda
from nsa_neuron.backends.composite import WHOLE
from nsa_neuron.backends.cuda import plans
from nsa_neuron.ops import get
from nsa_neuron.ops.nsa_attention import PART_SPECS, PARTS
from nsa_neuron.toolchain import KernelPackage
from tools.peers.problem import Geometry, Heads

PAPER = Heads(64, 4, 192, 128)
ALLOCATIONS = frozenset({"empty", "new_empty", "empty_like", "empty_strided"})
VIEWS = frozenset(
    {"view", "_unsafe_view", "as_strided", "slice", "select", "unsqueeze", "squeeze", "transpose"}
    | {"expand", "detach", "t", "permute", "alias", "unbind", "split", "_reshape_alias", "reshape"}
)
SAVED = ("o", "block_indices", "o_cmp", "lse_cmp", "o_slc", "lse_slc", "o_win", "lse_win")


@dataclass(frozen=True)
class Launch:
    """One launch: op, kernel, grid, arguments as they are passed and constants by name."""

    op: str
    function: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel with the op whose file it is in."""
        return f"{self.op}.{self.function.__name__}"

    @property
    def variant(self) -> str:
        """What Triton compiles it for: constants, and of each argument what it specialises on."""
        kinds = [_kind(value) for value in self.arguments]
        return f"{self.name} {kinds} {sorted(self.constants.items())}"


def _kind(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return str(value.dtype)
    if isinstance(value, int):
        return "1" if value == 1 else f"int {value % 16 == 0} {value >= 2**31}"
    return type(value).__name__


@dataclass
class Pass:
    """What a pass does: launches in order, and torch operations by name."""

    launches: list[Launch] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)

    @property
    def on_device(self) -> int:
        """Torch operations that run a kernel of their own, most of them one."""
        free = ALLOCATIONS | VIEWS
        return sum(n for name, n in self.operations.items() if name not in free)

    @property
    def variants(self) -> set[str]:
        """The kernels that Triton compiles for it."""
        return {launch.variant for launch in self.launches}


class _Operations(TorchDispatchMode):
    def __init__(self, counted: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counted = counted

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.counted[function.__name__.split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


Started = Callable[[Launch], None]


class Stand:
    """In place of the package of kernels: what is launched goes to `started`."""

    def __init__(self, started: Started) -> None:
        self.package = KernelPackage("cuda_kernels", distribution="nsa-neuron")
        self.started = started

    def load(self, stem: str) -> Any:
        return _Module(stem, self.package.load(stem), self.started)


@dataclass(frozen=True)
class _Module:
    stem: str
    module: Any
    started: Started

    def __getattr__(self, name: str) -> _Kernel:
        return _Kernel(self.stem, getattr(self.module, name), self.started)


@dataclass(frozen=True)
class _Kernel:
    stem: str
    function: Any
    started: Started

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **constants: Any) -> None:
            self.started(Launch(self.stem, self.function, grid, arguments, constants))

        return launch


@contextmanager
def standing_in(started: Started) -> Iterator[None]:
    """All launches of the backend go to `started` inside."""
    package = cuda.kernel_package
    stand = Stand(started)
    cuda.kernel_package = lambda mode: stand  # type: ignore[assignment]
    try:
        yield
    finally:
        cuda.kernel_package = package


def inputs(
    heads: Heads, tokens: int, sequences: int = 0, device: str = "meta", **like: Any
) -> dict[str, Any]:
    """The arguments of `nsa_attention_forward` for self-attention over `tokens` tokens."""
    geom = Geometry()
    like = {"dtype": torch.bfloat16, "device": device, **like}

    def keys(count: int, dim: int) -> torch.Tensor:
        return torch.empty(1, count, heads.kv, dim, **like)

    blocks = geom.num_cmp(tokens)
    cu = torch.empty(sequences + 1, dtype=torch.int32, device=device) if sequences else None
    pairs = {f"{x}_{b}": keys(n, d) for b, n in (("cmp", blocks), ("slc", tokens), ("win", tokens))
             for x, d in (("k", heads.dk), ("v", heads.dv))}  # fmt: skip
    return {
        "q": torch.empty(1, tokens, heads.q, heads.dk, **like), **pairs,
        "gates": torch.empty(1, tokens, heads.q, 3, **like), "cu_seqlens_q": cu,
        "cu_seqlens_k": cu, "block": geom.l, "stride": geom.d, "select_block": geom.m,
        "num_selected": geom.n, "num_initial": geom.init, "num_local": geom.local,
        "window": geom.w, "scale": heads.dk**-0.5,
    }  # fmt: skip


def lowered(name: str, values: dict[str, Any], device: str = "h200") -> Callable[[], Any]:
    """An op on these values as the backend runs it, with a device's tile plans."""
    bound = get(name).bind(values)
    head = values["q"] if "q" in values else values["x"]

    def planned(op: str) -> tuple[str, Any]:
        stem = op.removesuffix("_backward")
        last = values.get("v_slc", values.get("v", head))
        shape = {"dk": head.shape[-1], "dv": last.shape[-1], "dtype": _name(head.dtype)}
        keys = values.get("k_slc", values.get("k", head))
        shape["group"] = head.shape[2] // keys.shape[2] if stem != "compress" else 1
        return "sim", plans.find(device, stem, **shape)

    parts = PARTS[WHOLE[name]] if name in WHOLE else ()
    plan: Any = {part: planned(part) for part in parts} if parts else planned(name)
    assert not parts or set(parts) <= PART_SPECS.keys()
    call = cuda.BACKEND.lower(bound, plan)
    return lambda: call(**values)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def passes(
    heads: Heads = PAPER, tokens: int = 65536, sequences: int = 0, device: str = "h200"
) -> dict[str, Pass]:
    """`compress` (of keys and of values, mean), `forward` and `backward` of NSA."""
    found: dict[str, Pass] = {}

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        found[name] = Pass()
        with _Operations(found[name].operations), standing_in(found[name].launches.append):
            yield

    values = inputs(heads, tokens, sequences)
    with noted("compress"):
        for x in (values["k_slc"], values["v_slc"]):
            absent = dict.fromkeys(("w1", "b1", "w2", "b2", "pe"))
            sizes = {"method": "mean", "block": values["block"], "stride": values["stride"]}
            cu = {"cu_seqlens_k": values["cu_seqlens_k"]}
            lowered("compress", {"x": x, **absent, **sizes, **cu}, device)()
    with noted("forward"):
        results = lowered("nsa_attention_forward", values, device)()
    saved = dict(zip(SAVED, results, strict=True))
    values = {"grad_o": saved.pop("o"), **values, **saved}
    with noted("backward"):
        lowered("nsa_attention_backward", values, device)()
    return found


def table() -> list[str]:
    """Rows of the documents' table."""
    rows = []
    for label, heads, tokens, sequences in (
        ("8K, G = 16", PAPER, 8192, 0),
        ("64K, G = 16", PAPER, 65536, 0),
        ("64K, G = 1", Heads(16, 16, 192, 128), 65536, 0),
        ("64K, G = 16, 8 packed", PAPER, 65536, 8),
    ):
        for name, done in passes(heads, tokens, sequences).items():
            if name != "compress":
                rows.append(
                    f"| {label} | {name} | {len(done.launches)} | {done.on_device} "
                    f"| {sum(done.operations.values())} |"
                )
    return rows


if __name__ == "__main__":
    print("\n".join(table()))
