"""Whole models on this machine's CPU: decoding and training steps beside full attention.

Decoding is `NsaForCausalLM` with its cache beside transformers' Llama with its own, same sizes, one
sequence, in turns. Both caches are filled with random keys and values, since reading 128K tokens
would take the most of a run. Training steps are `ByteLanguageModel` with all layers `nsa`, then all
`full`. A layer's forward pass is measured against the op inside it, and against everything that it
has to do (`parts`: projections, rotation, compression, the op), called bare on the same tensors.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_neuron import functional as nsa
from nsa_neuron.bench.record import Record
from nsa_neuron.errors import BackendUnavailable
from nsa_neuron.nn import ByteLanguageModel, NativeSparseAttention, NsaConfig, next_token_loss
from nsa_neuron.nn.rotary import rotate
from nsa_neuron.terminal import progress, table

BENCH = "model"
BODY: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip
CONFIG = NsaConfig(dim=256, heads=16, kv_heads=1, dk=64, dv=64)
LAYERS = 2
DECODED = 16  # steps of a record
TRAIN_LIMIT = 32768
MODULE_TOKENS = 2048


def measure(tokens: Sequence[int]) -> list[Record]:
    """Decoding at every length, training steps up to `TRAIN_LIMIT`, and a layer's overhead."""
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

    def op() -> Tensor:
        return nsa.nsa_attention(**seen, **CONFIG.geometry)  # type: ignore[arg-type]

    def parts() -> Tensor:
        c, at = CONFIG, torch.arange(tokens)
        q = F.linear(x, layer.q.weight).view(1, tokens, c.heads, c.dk)
        k_cmp, k_slc, k_win = (
            F.linear(x, w).view(1, tokens, c.kv_heads, c.dk) for w in _rows(layer, 0, c.dk)
        )
        v_cmp, *_ = (
            F.linear(x, w).view(1, tokens, c.kv_heads, c.dv) for w in _rows(layer, c.dk, c.dv)
        )
        for key in (q, k_slc, k_win):
            rotate(key, at, c.rope_base)
        layer.phi_k(k_cmp), layer.phi_v(v_cmp)
        F.linear(x, layer.gate.weight, layer.gate.bias).sigmoid()
        return F.linear(op().flatten(-2), layer.out.weight)

    facts = {"tokens": tokens, "layers": 1}
    return _turns({"module": lambda: layer(x), "op": op, "parts": parts}, rounds, facts)


def _rows(layer: NativeSparseAttention, first: int, count: int) -> list[Tensor]:
    """The rows of `kv.weight` that give each set's keys (from row 0 on) or values."""
    c = layer.config
    by_set = layer.kv.weight.view(c.kv_heads, layer.sets, c.dk + c.dv, c.dim)
    return [by_set[:, i, first : first + count].flatten(0, 1) for i in range(layer.sets)]


def training(tokens: int) -> list[Record]:
    """A forward and a backward pass of a model with NSA, and with full attention; once, without a
    step to warm up, from 32K tokens on, where one of full attention takes a minute or two."""
    rounds = 3 if tokens < TRAIN_LIMIT // 2 else 1
    text = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(0))

    def step_of(kind: str) -> Callable[[], None]:
        torch.manual_seed(0)
        model = ByteLanguageModel(CONFIG, [kind] * LAYERS).train()

        def step() -> None:
            model.zero_grad()
            next_token_loss(model(text), text).backward()

        return step

    steps = {f"train {kind}": step_of(kind) for kind in ("nsa", "full")}
    return _turns(steps, rounds, {"tokens": tokens, "layers": LAYERS}, warm=rounds > 1)


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
    ids = torch.full((1, 1), 7)
    ours, theirs = DynamicCache(config=sparse.config), DynamicCache(config=dense.config)
    for layer, cached in enumerate(ours.layers):
        _fill(cached, CONFIG, tokens)
        keys = torch.randn(1, CONFIG.kv_heads, tokens, CONFIG.dk)
        theirs.update(keys, keys.clone(), layer)
    steps = {
        "decode nsa": lambda: sparse(ids, cache=ours, use_cache=True),
        "decode full": lambda: dense(ids, cache=theirs, use_cache=True),
    }
    held = {"decode nsa": _bytes_of(ours), "decode full": _bytes_of(theirs)}
    return _turns(steps, DECODED, {"tokens": tokens, "layers": LAYERS}, held)


def _fill(layer: Any, config: NsaConfig, tokens: int) -> None:
    """Random keys and values in an `NsaCacheLayer`, as its attention layer would have put them."""

    def pair(rows: int) -> tuple[Tensor, Tensor]:
        shape = (1, rows, config.kv_heads)
        return torch.randn(*shape, config.dk), torch.randn(*shape, config.dv)

    x = torch.empty(1, tokens, 1)
    with layer.step(config, "nsa", x, [tokens], torch.float32) as step:
        step.store(cmp=pair(tokens), slc=pair(tokens), win=pair(tokens))
        step.store_blocks(*pair(step.step.writes["cmp"].numel()))


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
    warm: bool = True,
) -> list[Record]:
    """Each step once to warm up, then all in turn; wall time, with CPU time and load beside it."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values() if warm else ():
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


TABLES = (
    ("a layer and the op inside it", "module", "op", "layer / op"),
    ("a layer and all that it has to do, bare", "module", "parts", "layer / parts"),
    ("a training step, forward and backward", "train nsa", "train full", "NSA / full"),
    ("one new token", "decode nsa", "decode full", "NSA / full"),
)


def tables(records: Sequence[Record]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headers and rows of each table of this benchmark's records."""
    by = {(r.name, r.facts["tokens"]): r for r in records}
    made = []
    for title, ours, theirs, says in TABLES:
        rows = []
        for tokens in sorted(t for name, t in by if name == ours and (theirs, t) in by):
            a, b = by[ours, tokens], by[theirs, tokens]
            cpu = a.facts["cpu_ms"] / max(b.facts["cpu_ms"], 1e-9)
            row = [str(tokens), str(a), str(b), f"{a.median / b.median:.2f}", f"{cpu:.2f}"]
            if "bytes" in a.facts:
                row += [f"{r.facts['bytes'] / 2**20:.1f}" for r in (a, b)]
                row += [f"{1e3 / r.median:.0f}" for r in (a, b)]
            rows.append([*row, str(a.facts["load"])])
        more = ["NSA cache, MiB", "full cache, MiB", "NSA, tokens/s", "full, tokens/s"]
        headers = ["tokens", f"{ours}, ms", f"{theirs}, ms", says, "by CPU time"]
        headers += more if ours == "decode nsa" else []
        if rows:
            made.append((f"{title}: median (20th to 80th)", [*headers, "load"], rows))
    return made


def to_text(records: Sequence[Record]) -> str:
    """The tables for people."""
    return "\n\n".join(table(*parts) for parts in tables(records))
