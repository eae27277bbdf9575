"""Continuing texts: prefill, then one byte of every sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.fields import SEEDS, check_int, check_rules, check_types

if TYPE_CHECKING:
    from nsa_neuron.nn.cache import KvCache
    from nsa_neuron.nn.model import ByteLanguageModel


@dataclass(frozen=True)
class Sampling:
    """How the next byte is chosen.

    Attributes:
        temperature: 0: the likeliest byte; else logits are divided by it.
        top_k: only the k likeliest; 0: all.
        top_p: only the likeliest whose probabilities sum to p; 1: all.
        seed: of the random numbers.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        rules = (
            ("temperature", 0 <= self.temperature < float("inf"), "finite and at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("seed", self.seed in SEEDS, "a 64-bit number"),
        )
        check_rules(self, rules)

    def choose(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """A token for each row of `[B, V]`: `[B]` int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        ranked, ids = (logits.float() / self.temperature).sort(stable=True, dim=-1, descending=True)
        before = ranked.softmax(-1).cumsum(-1) - ranked.softmax(-1)
        drop = before >= self.top_p
        if self.top_k:
            drop |= torch.arange(ranked.shape[-1], device=ranked.device) >= self.top_k
        odds = ranked.masked_fill(drop, -torch.inf).softmax(-1)
        chosen = torch.multinomial(odds.cpu(), 1, generator=generator).to(ids.device)
        token: Tensor = ids.gather(-1, chosen)[:, 0]
        return token


Forward = Callable[..., Tensor]


def generate(
    model: ByteLanguageModel,
    prompts: Sequence[bytes],
    count: int,
    *,
    sampling: Sampling | None = None,
    cache: KvCache | None = None,
    forward: Forward | None = None,
    chunk: int = 4096,
) -> list[bytes]:
    """What the model writes behind each prompt.

    Args:
        model: of bytes.
        prompts: one or more texts, none of them empty; their lengths may differ.
        count: bytes to write for each.
        sampling: default: the likeliest byte.
        cache: holds what prompts continue, and is left with what was written except for the last
            byte; default: a new one.
        forward: the model, compiled; default: the model.
        chunk: prompts are read in pieces of at most so many bytes.

    Raises:
        InvalidArgument: an empty prompt, or numbers out of range.
        CacheExhausted: the cache is too small.
    """
    pieces = stream(
        model, prompts, count, sampling=sampling, cache=cache, forward=forward, chunk=chunk
    )
    steps = [new.tolist() for new in pieces]
    return [bytes(row) for row in zip(*steps, strict=True)]


@torch.no_grad()
def stream(
    model: ByteLanguageModel,
    prompts: Sequence[bytes],
    count: int,
    *,
    sampling: Sampling | None = None,
    cache: KvCache | None = None,
    forward: Forward | None = None,
    chunk: int = 4096,
) -> Iterator[Tensor]:
    """`generate`, giving each step's new bytes `[B]` as they come."""
    several = isinstance(prompts, Sequence) and not isinstance(prompts, str)
    texts = prompts if several else [prompts]
    other = [type(x).__name__ for x in texts if not isinstance(x, (bytes, bytearray))]
    if other:
        expected = "a list of bytes, one for each text"
        raise InvalidType("generate", "prompts", f"of type {other[0]}", expected)
    if not prompts or not all(prompts):
        raise InvalidArgument("generate", "prompts", "empty", "one or more texts, none empty")
    check_int("generate", "count", count, 1)
    check_int("generate", "chunk", chunk, 1)
    if sampling is not None and not isinstance(sampling, Sampling):
        raise InvalidType("generate", "sampling", type(sampling).__name__, "a Sampling")
    if cache is not None and not hasattr(cache, "step"):  # `distributed` has caches of its own
        raise InvalidType("generate", "cache", type(cache).__name__, "a cache of the model")
    longest = max(map(len, prompts))
    if cache is None:
        cache = model.new_cache(len(prompts), longest + count)
    if cache.batch != len(prompts):
        found = f"for {cache.batch} sequences"
        raise InvalidArgument("generate", "cache", found, f"for the {len(prompts)} prompts")
    run = model if forward is None else forward  # a compiled module has no truth value
    chosen = sampling or Sampling()
    generator = torch.Generator().manual_seed(chosen.seed)
    logits = prefill(run, prompts, cache, chunk)
    for left in reversed(range(count)):
        new = chosen.choose(logits, generator)
        yield new
        if left:
            with cache.step(1) as step:
                logits = run(new[:, None], step, last=1)[:, -1]


def prefill(run: Forward, prompts: Sequence[bytes], cache: KvCache, chunk: int = 4096) -> Tensor:
    """Reads prompts into a cache; gives the logits behind them, `[B, V]`."""
    longest = max(map(len, prompts))
    rows = torch.zeros(len(prompts), longest, dtype=torch.int64)
    for row, text in zip(rows, prompts, strict=True):
        row[longest - len(text) :] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    logits = torch.zeros(0)
    for start in range(0, longest, chunk):
        stop = min(start + chunk, longest)
        counts = [max(0, min(stop - start, stop - (longest - len(text)))) for text in prompts]
        with cache.step(stop - start, counts) as step:
            logits = run(rows[:, start:stop].to(cache.device), step, last=1)[:, -1]
    return logits
