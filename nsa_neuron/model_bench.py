"""Whole models on this machine's CPU: decoding and training steps beside full attention.

Decoding is `NsaForCausalLM` with its cache beside transformers' Llama with its own, same sizes, one
sequence, in turns. NSA's cache is filled by reading random tokens; Llama's, whose reading would
take hours at 128K, by random keys and values of the same shapes. Training steps are
`ByteLanguageModel` with all layers `nsa`, then all `full`. The module's overhead is its forward
pass against the op inside it on the same tensors, so projections, rotation and compression count as
overhead.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nsa_neuron import functional as nsa
from nsa_neuron.bench.record import Record
from nsa_neuron.errors import BackendUnavailable
from nsa_neuron.nn import ByteLanguageModel, NativeSparseAttention, NsaConfig, next_token_loss
from nsa_neuron.terminal import progress, table

BENCH = "model"
BODY: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip
CONFIG = NsaConfig(dim=256, heads=16, kv_heads=1, dk=64, dv=64)
LAYERS = 2
DECODED = 16  # steps of a record
READ = 4096  # tokens of a piece of prefill
TRAIN_LIMIT = 32768
MODULE_TOKENS = 2048


def measure(tokens: Sequence[int]) -> list[Record]:
    """Decoding at every length, training steps up to `TRAIN_LIMIT`, and the module's overhead."""
    trained = [length for length in tokens if length <= TRAIN_LIMIT]
    records = overhead(MODULE_TOKENS)
    with progress("model", len(tokens) + len(trained)) as advance:
        for length in trained:
            advance(f"training steps of {length} tokens")
            records += training(length)
        for length in tokens:
            advance(f"decoding at {length} tokens")
            records += decoding(length)
    return records


@torch.no_grad()
def overhead(tokens: int, rounds: int = 9) -> list[Record]:
    """A layer's forward pass and its op, in turns."""
    torch.manual_seed(0)
    layer, x = NativeSparseAttention(CONFIG), torch.randn(1, tokens, CONFIG.dim)
    seen: dict[str, Tensor] = {}
    layer.observer = lambda _, values: seen.update(values)
    layer(x)
    del layer.observer

    def op() -> None:
        nsa.nsa_attention(**seen, **CONFIG.geometry)  # type: ignore[arg-type]

    facts = {"tokens": tokens, "layers": 1}
    return _turns({"module": lambda: layer(x), "op": op}, rounds, facts)


def training(tokens: int, rounds: int = 3) -> list[Record]:
    """A forward and a backward pass of a model with NSA, and with full attention."""
    text = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(0))

    def step_of(kind: str) -> Callable[[], None]:
        torch.manual_seed(0)
        model = ByteLanguageModel(CONFIG, [kind] * LAYERS).train()

        def step() -> None:
            model.zero_grad()
            next_token_loss(model(text), text).backward()

        return step

    steps = {f"train {kind}": step_of(kind) for kind in ("nsa", "full")}
    return _turns(steps, rounds, {"tokens": tokens, "layers": LAYERS})


@torch.no_grad()
def decoding(tokens: int) -> list[Record]:
    """One new token after another behind `tokens`, and the bytes of the caches."""
    try:
        from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

        from nsa_neuron.integrations.transformers import NsaForCausalLM, NsaLmConfig
    except ImportError:
        raise BackendUnavailable(
            "decoding is measured with transformers: pip install 'nsa-neuron[hf]'"
        ) from None
    sizes = {**BODY, "max_position_embeddings": 2 * tokens}
    torch.manual_seed(0)
    sparse, dense = NsaForCausalLM(NsaLmConfig(**sizes)), LlamaForCausalLM(LlamaConfig(**sizes))
    sparse.eval(), dense.eval()
    ids = torch.randint(3, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    ours, theirs = DynamicCache(config=sparse.config), DynamicCache(config=dense.config)
    for at in range(0, tokens, READ):
        sparse.model(ids[:, at : at + READ], cache=ours, use_cache=True)
    for layer in range(LAYERS):
        keys = torch.randn(1, CONFIG.kv_heads, tokens, CONFIG.dk)
        theirs.update(keys, keys.clone(), layer)
    steps = {
        "decode nsa": lambda: sparse(ids[:, :1], cache=ours, use_cache=True),
        "decode full": lambda: dense(ids[:, :1], cache=theirs, use_cache=True),
    }
    held = {"decode nsa": _bytes_of(ours), "decode full": _bytes_of(theirs)}
    return _turns(steps, DECODED, {"tokens": tokens, "layers": LAYERS}, held)


def _bytes_of(cache: Any) -> int:
    """Bytes of every tensor that a transformers cache holds, spare room left out of neither."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    todo: list[Any] = list(cache.layers)
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            store = item.untyped_storage()
            found[store.data_ptr()] = store.nbytes()
        elif isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, list | tuple):
            todo += item
        elif hasattr(item, "__dict__"):
            todo += vars(item).values()
    return sum(found.values())


def _turns(
    steps: dict[str, Callable[[], Any]],
    rounds: int,
    facts: dict[str, Any],
    held: dict[str, int] | None = None,
) -> list[Record]:
    """Each step once to warm up, then all in turn; wall time, with CPU time and load beside it."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            taken[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    records = []
    for name, runs in taken.items():
        cpu = sorted(cpu for _, cpu in runs)[len(runs) // 2]
        more = {"bytes": held[name]} if held else {}
        records.append(
            Record.of(
                BENCH, name, "ms", [1e3 * wall for wall, _ in runs], **facts, **more,
                cpu_ms=round(1e3 * cpu, 3), threads=torch.get_num_threads(),
                load=round(os.getloadavg()[0], 2),
            )
        )  # fmt: skip
    return records


def to_text(records: Sequence[Record]) -> str:
    """The tables of this benchmark's records."""
    by = {(r.name, r.facts["tokens"]): r for r in records}
    parts = []
    for title, ours, theirs, says in (
        ("a layer and the op inside it", "module", "op", "layer / op"),
        ("a training step, forward and backward", "train nsa", "train full", "NSA / full"),
        ("one new token", "decode nsa", "decode full", "NSA / full"),
    ):
        rows = []
        for tokens in sorted({t for name, t in by if name == ours}):
            a, b = by[ours, tokens], by[theirs, tokens]
            cpu = a.facts["cpu_ms"] / max(b.facts["cpu_ms"], 1e-9)
            row = [str(tokens), str(a), str(b), f"{a.median / b.median:.2f}", f"{cpu:.2f}"]
            if "bytes" in a.facts:
                row += [f"{r.facts['bytes'] / 2**20:.1f}" for r in (a, b)]
                row += [f"{1e3 / r.median:.0f}" for r in (a, b)]
            rows.append([*row, str(a.facts["load"])])
        if rows:
            more = ["NSA cache, MiB", "full cache, MiB", "NSA, tokens/s", "full, tokens/s"]
            headers = ["tokens", f"{ours}, ms", f"{theirs}, ms", says, "by CPU time"]
            headers += more if ours == "decode nsa" else []
            parts.append(table(f"{title}: median (20th to 80th)", [*headers, "load"], rows))
    return "\n\n".join(parts)
