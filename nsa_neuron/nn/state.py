"""State dicts that are checked as a whole before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from nsa_neuron.errors import StateMismatch

SHOWN = 3  # names in a message
ROWS_BY_HEAD = 2
"""Version of an attention layer's parameters; 1 had rows of `kv.weight` by set, then by head."""


def rows_by_head(rows: Tensor, sets: int, kv_heads: int) -> Tensor:
    """`kv.weight` or `kv.bias` of version 1, `[sets * Hkv * (Dk + Dv), ...]`, as version 2's.

    Args:
        rows: of all heads.
        sets: of keys and values: 3, or 1 with `shared_kv` and in full and windowed attention.
        kv_heads: Hkv.
    """
    by_set: Tensor = rows.unflatten(0, (sets, kv_heads, -1))
    return by_set.transpose(0, 1).flatten(0, 2)


def check_rows(layer: Any, prefix: str, metadata: Mapping[str, Any]) -> None:
    """Refuses a state dict whose rows of `kv.weight` would be taken for those of other heads.

    Args:
        layer: an attention layer.
        prefix: of its names in the state dict.
        metadata: torch's, of the layer in the state dict; empty in a plain dict, which is taken for
            one of the present version.

    Raises:
        StateMismatch: version 1, where several sets and heads make a difference.
    """
    sets, heads = layer.sets, layer.config.kv_heads
    if metadata.get("version", ROWS_BY_HEAD) < ROWS_BY_HEAD and min(sets, heads) > 1:
        raise StateMismatch(
            f"{prefix}kv.weight is of version {metadata['version']}, whose rows may be in another "
            f"order of heads: if it was saved before revision fcd0a07 (2026-11-28), turn it with "
            f"nsa_neuron.nn.rows_by_head(weight, {sets}, {heads}); then, or if it is younger, load "
            "dict(state_dict), which has no version"
        )


class CheckedModule(nn.Module):
    """A module whose `load_state_dict` loads everything or, raising, nothing.

    Attributes:
        _version: of the layout of its parameters; torch keeps it in a state dict's metadata.
    """

    _version = 1

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, but a mismatch leaves the module as it was.

        Raises:
            StateMismatch: names or shapes of another configuration, or a newer layout.
        """
        own = self.state_dict()
        metadata = getattr(state_dict, "_metadata", {})
        versions = metadata.get("", {})
        for name, module in self.named_modules():
            if getattr(module, "_version", None) == ROWS_BY_HEAD and hasattr(module, "sets"):
                check_rows(module, f"{name}.", metadata.get(name, {}))
        if versions.get("version", self._version) > self._version:
            raise StateMismatch(
                f"the state dict has version {versions['version']} of {type(self).__name__}'s "
                f"layout; this nsa-neuron knows up to {self._version}: update it"
            )
        wrong = [
            f"{name} is {list(state_dict[name].shape)}, not {list(value.shape)}"
            for name, value in own.items()
            if name in state_dict
            and isinstance(value, Tensor)
            and state_dict[name].shape != value.shape
        ]
        if strict:
            wrong += [f"{name} is missing" for name in own if name not in state_dict]
            wrong += [f"{name} is unknown" for name in state_dict if name not in own]
        if wrong:
            more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
            raise StateMismatch(
                f"the state dict is of another configuration than this {type(self).__name__}: "
                f"{'; '.join(wrong[:SHOWN])}{more}"
            )
        return super().load_state_dict(state_dict, strict, assign)
