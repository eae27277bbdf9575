"""Whole models on this machine's CPU: decoding and training steps beside full attention.

Decoding is `NsaForCausalLM` with its cache beside transformers' Llama with its own, same sizes, one
sequence, in turns. Both caches are filled with random keys and values, since reading 128K tokens
would take the most of a run. Training steps are `ByteLanguageModel` with all layers `nsa`, then all
`full`. One layer beside the op inside it: `nsa_neuron.layer_bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsa_neuron.bench.turns import in_turns
from nsa_neuron.errors import BackendUnavailable
from nsa_neuron.nn import ByteLanguageModel, NsaConfig, next_token_loss
from nsa_neuron.terminal import progress, table

if TYPE_CHECKING:
    from nsa_neuron.bench.record import Record

BENCH = "model"
BODY: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 64,
}  # fmt: skip
CONFIG = NsaConfig(dim=256, heads=16, kv_heads=1, dk=64, dv=64)
LAYERS = 2
DECODED = 16  # steps of a record
TRAIN_LIMIT = 32768


def measure(tokens: Sequence[int]) -> list[Record]:
    """Decoding at every length, and training steps up to `TRAIN_LIMIT`."""
    trained = [length for length in tokens if length <= TRAIN_LIMIT]
    records: list[Record] = []
    with progress("model", len(tokens) + len(trained)) as advance:
        for length in trained:
            advance(f"training steps of {length} tokens")
            records += training(length)
        for length in tokens:
            advance(f"decoding at {length} tokens")
            records += decoding(length)
    return records


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
    return in_turns(BENCH, steps, rounds, {"tokens": tokens, "layers": LAYERS}, warm=rounds > 1)


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
    return in_turns(BENCH, steps, DECODED, {"tokens": tokens, "layers": LAYERS}, held)


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


TABLES = (
    ("a training step, forward and backward", "train nsa", "train full", "NSA / full"),
    ("one new token", "decode nsa", "decode full", "NSA / full"),
)


def tables(records: Sequence[Record]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headers and rows of each table of this benchmark's records."""
    by = {(r.name, r.facts["tokens"]): r for r in records if r.bench == BENCH}
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
