"""Sizes and options of an attention layer, checked where they are written down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.fields import check_rules, check_types
from nsa_neuron.ops.compress import METHODS
from nsa_neuron.spec import MAX_INT

ROPE_PLACEMENTS = ("before", "after")
_LEAST = {"num_initial": 0}  # every other integer is at least 1


@dataclass(frozen=True)
class NsaConfig:
    """Sizes and options of an attention layer.

    Attributes:
        dim: model width.
        heads: Hq. kv_heads: Hkv, divides heads.
        dk: head dim of queries and keys. dv: head dim of values.
        block, stride: l and d. select_block: m. num_selected: n. window: w.
        num_initial, num_local: blocks that are always selected; they count within n.
        phi: how blocks are compressed: `mean`, `linear` or `mlp`.
        phi_per_head: weights of phi for every kv head, or one set for all of them.
        shared_kv: one set of keys and values for the three branches, or one for each.
        qkv_bias: queries, keys and values have biases, as Qwen 2's.
        qk_norm: epsilon of the RMS norm that each head's queries and keys go through, as Qwen 3's;
            0: none.
        rope_base: base of the rotary position encoding; 0 turns it off.
        rope: `after`: phi compresses keys without positions, and a compressed key stands at its
            block's last token; `before`: phi compresses rotated keys.
        max_positions: longest sequence.

    Raises:
        InvalidArgument, InvalidType: a value that no call could use.
    """

    dim: int
    heads: int
    kv_heads: int
    dk: int
    dv: int
    block: int = 32
    stride: int = 16
    select_block: int = 64
    num_selected: int = 16
    num_initial: int = 1
    num_local: int = 2
    window: int = 512
    phi: str = "mlp"
    phi_per_head: bool = False
    shared_kv: bool = False
    qkv_bias: bool = False
    qk_norm: float = 0.0
    rope_base: float = 10_000.0
    rope: str = "after"
    max_positions: int = 2**20

    def __post_init__(self) -> None:
        check_types(self)
        self._check_sizes()
        forced = self.num_initial + self.num_local
        finite = math.isfinite(self.rope_base) and self.rope_base >= 0
        norm = math.isfinite(self.qk_norm) and self.qk_norm >= 0
        rules = (
            ("kv_heads", self.heads % self.kv_heads == 0, f"a divisor of heads = {self.heads}"),
            ("rope_base", finite, "finite and at least 0"),
            ("qk_norm", norm, "finite and at least 0"),
            ("dk", not self.rope_base or self.dk % 2 == 0, "even, for the rotary encoding"),
            ("stride", self.block % self.stride == 0, f"a divisor of block = {self.block}"),
            (
                "select_block",
                self.select_block % self.stride == 0 and self.select_block >= self.block,
                f"a multiple of stride = {self.stride} and at least block = {self.block}",
            ),
            (
                "num_selected",
                self.num_selected >= forced,
                f"at least num_initial + num_local = {forced}",
            ),
            ("phi", self.phi in METHODS, f"one of {', '.join(METHODS)}"),
            ("rope", self.rope in ROPE_PLACEMENTS, f"one of {', '.join(ROPE_PLACEMENTS)}"),
        )
        check_rules(self, rules)

    def _check_sizes(self) -> None:
        for f in dataclasses.fields(self):
            value, least = getattr(self, f.name), _LEAST.get(f.name, 1)
            if f.type == "int" and not least <= value <= MAX_INT:
                raise InvalidArgument("NsaConfig", f.name, value, f"from {least} to {MAX_INT}")

    @property
    def selection(self) -> dict[str, Any]:
        """The scalar arguments of `select_blocks` that say what is selected."""
        return {
            "select_block": self.select_block,
            "num_selected": self.num_selected,
            "num_initial": self.num_initial,
            "num_local": self.num_local,
        }

    @property
    def geometry(self) -> dict[str, Any]:
        """The scalar arguments of `nsa_attention` and `decode`."""
        return {
            "block": self.block,
            "stride": self.stride,
            **self.selection,
            "window": self.window,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NsaConfig:
        """The inverse of `to_dict`.

        Raises:
            InvalidArgument, InvalidType: an unknown or missing name, or a bad value.
        """
        if not isinstance(values, Mapping):
            raise InvalidType("NsaConfig", "values", type(values).__name__, "a mapping of names")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise InvalidArgument("NsaConfig", unknown[0], "given", "absent: there is no such name")
        missing = [
            f.name
            for f in dataclasses.fields(cls)
            if f.default is dataclasses.MISSING and f.name not in values
        ]
        if missing:
            raise InvalidArgument("NsaConfig", missing[0], "missing", "given")
        return cls(**values)
