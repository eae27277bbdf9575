"""A transformers cache layer that holds what NSA needs of the past."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from nsa_neuron.errors import InvalidArgument
from nsa_neuron.nn.cache import LayerStep, PagedCache

if TYPE_CHECKING:
    from nsa_neuron.nn.config import NsaConfig

ROOM = 256  # tokens, or an eighth of what is there: what a cache has and grows by beyond its use
STEP = 64  # new tokens that there is always room for
SLACK = 256  # tokens that `crop` may take back where a layer keeps its window only


class NsaCacheLayer(CacheLayerMixin):
    """One layer's `PagedCache`, which grows; `DynamicCache(config=...)` makes these.

    It counts columns of the padded batch, as transformers does, and keeps real tokens only. Of the
    window branch and of what phi has compressed it keeps the last `SLACK` beyond what is seen.
    """

    _layer_type: str | None = "nsa"
    is_compileable = False
    is_croppable = True
    is_sliding = False
    grows = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.store: PagedCache | None = None
        self.columns = 0

    @contextmanager
    def step(
        self, config: NsaConfig, kind: str, x: Tensor, counts: Sequence[int], dtype: torch.dtype
    ) -> Iterator[LayerStep]:
        """Room for the columns of x.

        Args:
            config, kind: of the attention layer.
            x: `[B, S, dim]`.
            counts: real tokens of each row, at its end.
            dtype: of keys and values.
        """
        batch, tokens = x.shape[:2]
        whole = self.columns == 0 and min(counts) == tokens  # which needs no room in windows
        longest = max(1 if whole else tokens, STEP)
        if self.store is None:
            capacity = min(self._capacity(max(counts)), config.max_positions)
            self.store = PagedCache(
                config, (kind,), batch, capacity, dtype=dtype, device=x.device,
                slack=SLACK if self.grows else None, longest_step=longest if self.grows else None,
            )  # fmt: skip
        if self.store.batch != batch:
            found, expected = f"of {batch} rows", f"of {self.store.batch} like the cache"
            raise InvalidArgument("NsaCacheLayer", "hidden_states", found, expected)
        needed = max(have + new for have, new in zip(self.store.lengths, counts, strict=True))
        longest = max(longest, self.store.longest_step or 1)
        full = self.store.capacity < needed <= config.max_positions
        if self.grows and (full or longest != self.store.longest_step):
            capacity = self._capacity(needed) if full else self.store.capacity
            self.store.resize(range(batch), min(capacity, config.max_positions), longest)
        with self.store.step(tokens, counts) as step:
            yield step.layers[0]
        self.columns += tokens
        self.is_initialized = True

    def _capacity(self, tokens: int) -> int:
        return tokens + max(ROOM, tokens // 8)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The attention layer does it: its sizes are needed."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Not for NSA: its layers store three branches and compressed blocks, through `step`."""
        raise InvalidArgument(
            "NsaCacheLayer", "key_states", "given by another attention", "those of an NSA layer"
        )

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.columns

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self.columns + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last columns; the number is negative, as transformers gives it.

        Raises:
            InvalidArgument: more than `SLACK` of them, and what the layer then needs is gone.
        """
        count = abs(tokens_to_remove)
        if self.store is not None and count:
            self.store.truncate([max(0, have - count) for have in self.store.lengths])
            self.columns = max(0, self.columns - count)

    def reset(self) -> None:
        """Forgets everything."""
        self.store, self.columns, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        if self.store is not None:
            self.store.reorder(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times."""
        if self.store is not None:
            self._select([i for i in range(self.store.batch) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only these rows."""
        if self.store is not None:
            rows = torch.arange(self.store.batch, device=indices.device)[indices]
            self._select(rows.tolist())

    def offload(self) -> None:
        """Refused: the cache stays where the layer is."""
        raise InvalidArgument("NsaCacheLayer", "offload", "asked for", "left out")

    prefetch = offload

    def _select(self, order: Sequence[int]) -> None:
        assert self.store is not None
        self.store.resize(order, self.store.capacity, self.store.longest_step)


class NsaStaticCacheLayer(NsaCacheLayer):
    """The same with a fixed capacity; `StaticCache(config=..., max_cache_len=...)` makes these.

    Its memory is allocated at once; the model is not compiled for it by `generate`.

    Args:
        max_cache_len: real tokens of the longest row.
    """

    _layer_type = None  # transformers would register it as what DynamicCache makes
    grows = False

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.max_cache_len = max_cache_len

    def _capacity(self, tokens: int) -> int:
        return self.max_cache_len

    def get_max_length(self) -> int:
        """Its capacity."""
        return self.max_cache_len


STATIC_LAYER_TYPE_MAPPING["nsa"] = NsaStaticCacheLayer
