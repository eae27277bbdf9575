"""Attention layers: Native Sparse Attention, and the full and windowed ones beside it.

All take `[B, S, dim]` and have three ways to be fed: whole sequences; sequences packed back to back
(`cu_seqlens`, B == 1); and a step of a cache (`nsa_neuron.nn.cache`), which gives each token its
position and holds what came before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from nsa_neuron import functional as nsa
from nsa_neuron.errors import InvalidArgument, InvalidType
from nsa_neuron.nn.layers import INIT_STD, Linear, reset
from nsa_neuron.nn.phi import Phi
from nsa_neuron.nn.rotary import Turn, block_positions, rotate, token_positions, turn_of, turned
from nsa_neuron.nn.state import ROWS_BY_HEAD, check_rows

if TYPE_CHECKING:
    from nsa_neuron.nn.cache import LayerStep
    from nsa_neuron.nn.config import NsaConfig

KINDS = ("nsa", "full", "window")


class Parallel(Protocol):
    """How a layer attends whose tokens or heads are spread over ranks: `nsa_neuron.distributed`."""

    def positions(self, tokens: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
        """Of the own tokens, `[tokens]` int64."""

    def nsa(self, layer: NativeSparseAttention, given: Mapping[str, Any], step: Any) -> Tensor:
        """o of q, gates, uncompressed k_raw, v_raw, the other branches' k, v, and cu_seqlens; the
        compressed blocks go to the step of a cache, if there is one."""

    def decode(self, layer: NativeSparseAttention, step: Any, q: Tensor, gates: Tensor) -> Tensor:
        """o of a later step of a cache."""

    def softmax(
        self, layer: SoftmaxAttention, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None
    ) -> Tensor:
        """o of full or windowed attention."""


class AttentionLayer(nn.Module):
    """Projections that every attention layer has: queries, keys, values, output.

    Args:
        config: sizes and options.
        sets: how many sets of keys and values it makes.
        out_std: how the output projection starts, see `residual_std`.
    """

    parallel: Parallel | None = None  # set by `nsa_neuron.distributed` only
    _version = ROWS_BY_HEAD

    def __init__(self, config: NsaConfig, sets: int, out_std: float) -> None:
        super().__init__()
        self.config = config
        self.sets = sets
        self._rope_base = repr(config.rope_base)
        bias = config.qkv_bias
        self.q = Linear(config.dim, config.heads * config.dk, bias=bias)
        self.kv = Linear(config.dim, sets * config.kv_heads * (config.dk + config.dv), bias=bias)
        self.q_norm, self.k_norm = _norm(config), _norm(config)
        self.out = Linear(config.heads * config.dv, config.dim, std=out_std)

    def reset_parameters(self) -> None:
        """All weights start again."""
        reset(self)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        # Before any parameter is loaded: they are the children's.
        check_rows(self, prefix, local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    @property
    def rope_base(self) -> float:
        """`config.rope_base`; 0: no rotary encoding.

        Kept as text, a constant: a float attribute is an input to torch.compile(dynamic=True),
        which finds it in use, throws its compiled graph away and compiles again.
        """
        return float(self._rope_base)

    @property
    def own_config(self) -> NsaConfig:
        """`config` with the heads that this rank holds: all, unless projections are spread."""
        c, weight = self.config, self.kv.weight
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        own = min(c.kv_heads, local.shape[0] // (self.sets * (c.dk + c.dv)))
        if own in (0, c.kv_heads):
            return c
        return dataclasses.replace(c, heads=c.heads * own // c.kv_heads, kv_heads=own)

    def project(
        self, x: Tensor, positions: Tensor
    ) -> tuple[Tensor, list[Tensor], list[Tensor], Turn | None]:
        """Rotated queries `[B, S, Hq, Dk]`; keys, normed, not rotated, and values of each set; and
        what rotates the keys."""
        c = self.config
        # Heads are counted from what comes: with tensor parallelism a layer holds some of them.
        q = _normed(self.q(x).unflatten(-1, (-1, c.dk)), self.q_norm)
        both = self.kv(x)
        head = self.sets * (c.dk + c.dv)
        if both.shape[-1] % head:
            expected = f"whole heads, multiples of {head}: use fewer tensor-parallel ranks"
            raise self._refuse("kv", f"{both.shape[-1]} columns on this rank", expected)
        both = both.unflatten(-1, (-1, self.sets, c.dk + c.dv))
        k, v = both.split((c.dk, c.dv), -1)
        k = _normed(k, self.k_norm)
        turn = turn_of(positions, c.dk, self.rope_base, q.dtype)
        return turned(q, turn), list(k.unbind(3)), list(v.unbind(3)), turn

    def positions_of(self, x: Tensor, cu_seqlens: Tensor | None, step: LayerStep | None) -> Tensor:
        """Positions of the tokens of x, after a look at how x is fed.

        Raises:
            InvalidArgument, InvalidType: x does not fit the layer or the step, or is too long.
        """
        if x.dim() != 3 or x.shape[-1] != self.config.dim:
            expected = f"of shape [B, S, dim = {self.config.dim}]"
            raise self._refuse("x", f"of shape {list(x.shape)}", expected)
        weight = self.q.weight
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            expected = f"{weight.dtype} like the layer, or used under autocast"
            raise InvalidType(type(self).__name__, "x", str(x.dtype), expected)
        if x.device != weight.device:
            raise self._refuse("x", f"on {x.device}", f"on {weight.device} like the layer")
        if step is not None:
            if cu_seqlens is not None:
                raise self._refuse("cu_seqlens", "given with a cache", "None: a cache has batches")
            step.check(x)
            return step.positions
        if self.parallel is not None:
            return self.parallel.positions(x.shape[1], cu_seqlens, x.device)
        longest = self.config.max_positions
        if cu_seqlens is None and x.shape[1] > longest:
            expected = f"at most max_positions = {longest} long"
            raise self._refuse("x", f"{x.shape[1]} tokens long", expected)
        return token_positions(x.shape[1], cu_seqlens, x.device)

    def _refuse(self, argument: str, found: object, expected: str) -> InvalidArgument:
        return InvalidArgument(type(self).__name__, argument, found, expected)


def _norm(config: NsaConfig) -> nn.Module | None:
    return nn.RMSNorm(config.dk, config.qk_norm) if config.qk_norm else None


def _normed(x: Tensor, norm: nn.Module | None) -> Tensor:
    return x if norm is None else norm(x).to(x.dtype)  # under autocast a norm gives float32


class NativeSparseAttention(AttentionLayer):
    """Attention with a compressed, a selected and a window branch, and a gate for each.

    Parameters: `q.weight [Hq*Dk, dim]`; `kv.weight [Hkv*sets*(Dk+Dv), dim]`, each head's sets in
    the order compressed, selected, window (or one set), keys before values; `gate.weight
    [Hq*3, dim]`, `gate.bias`; `out.weight [dim, Hq*Dv]`; `phi_k.*`, `phi_v.*` as for `compress`;
    with `config.qkv_bias` also `q.bias`, `kv.bias`, with `config.qk_norm` `q_norm.weight [Dk]`,
    `k_norm.weight [Dk]`. So every projection can be cut by heads; a state dict from before that is
    refused (`nsa_neuron.nn.rows_by_head` turns it). Every gate starts near one half.

    Args:
        config: sizes and options.
        out_std: how the output projection starts.
    """

    observer: Callable[..., None] | None = None  # set by `capture` only, see there

    def __init__(self, config: NsaConfig, out_std: float = INIT_STD) -> None:
        super().__init__(config, 1 if config.shared_kv else 3, out_std)
        self.gate = Linear(config.dim, config.heads * 3, bias=True)
        self.phi_k, self.phi_v = Phi(config, config.dk), Phi(config, config.dv)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, step: LayerStep | None = None
    ) -> Tensor:
        """`[B, S, dim]` -> `[B, S, dim]`.

        Args:
            x: states of whole sequences, or the new tokens' of a step.
            cu_seqlens: offsets of packed sequences, `[N + 1]` int32; needs B == 1.
            step: of a cache: earlier tokens are there, and these are added to it.

        Raises:
            InvalidArgument, InvalidType: x, cu_seqlens or the step do not fit.
        """
        positions = self.positions_of(x, cu_seqlens, step)
        q, k, v, turn = self.project(x, positions)
        gates = self.gate(x).sigmoid().unflatten(-1, (-1, 3))
        raw, k_slc, k_win = self._branch_keys(k, turn)
        v_cmp, v_slc, v_win = v if len(v) == 3 else v * 3
        if step is not None:
            step.store(cmp=(raw, v_cmp), slc=(k_slc, v_slc), win=(k_win, v_win))
        if step is not None and not step.whole:
            self._refuse_capture()
            step.store_blocks(*self.compress(*step.unfinished(), step.block_ends))
            if self.parallel is not None:
                return self._finish(self.parallel.decode(self, step, q, gates))
            return self._finish(step.attend(q, gates, self.config.geometry))
        if self.parallel is not None:
            self._refuse_capture()
            given = {"k_raw": raw, "v_raw": v_cmp, "k_slc": k_slc, "v_slc": v_slc}
            given |= {"q": q, "k_win": k_win, "v_win": v_win, "gates": gates}
            o = self.parallel.nsa(self, {**given, "cu_seqlens": cu_seqlens}, step)
            return self._finish(o)
        cmp = self.compress(raw, v_cmp, None, cu_seqlens)
        if step is not None:
            step.store_blocks(*cmp)
        values: dict[str, Any] = {
            "q": q, "k_cmp": cmp[0], "v_cmp": cmp[1], "k_slc": k_slc, "v_slc": v_slc,
            "k_win": k_win, "v_win": v_win, "gates": gates,
            "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
        }  # fmt: skip
        if self.observer is not None:
            self.observer(self, values)
        return self._finish(nsa.nsa_attention(**values, **self.config.geometry))

    def _branch_keys(self, k: list[Tensor], turn: Turn | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keys that phi compresses, and rotated keys of the selected and window branch."""
        before = self.config.rope == "before"
        rotated = [turned(key, turn) for key in k[-2:]]
        if len(k) == 1:
            return (rotated[0] if before else k[0]), rotated[0], rotated[0]
        return (turned(k[0], turn) if before else k[0]), rotated[0], rotated[1]

    def _refuse_capture(self) -> None:
        if self.observer is not None:
            if self.parallel is not None:
                raise self._refuse("observer", "set", "None: parallel layers cannot be captured")
            raise self._refuse("step", "a later one of a cache", "the first one while captured")

    def compress(
        self,
        k: Tensor,
        v: Tensor,
        ends: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compressed keys, with their positions in them, and values.

        Args:
            k: `[B, T, Hkv, Dk]`, rotated or not as `config.rope` says.
            v: `[B, T, Hkv, Dv]`.
            ends: positions of the blocks' last tokens, `[Nc]` or `[B, Nc]`; None: k starts at 0.
            cu_seqlens: offsets of packed sequences.
        """
        c = self.config
        k_cmp, v_cmp = self.phi_k(k, cu_seqlens), self.phi_v(v, cu_seqlens)
        if c.rope == "before" or self.rope_base == 0:
            return k_cmp, v_cmp
        if ends is None:
            # Counted from what compress gives, whose size torch.export must not look into.
            ends = block_positions(k_cmp.shape[1], c.block, c.stride, cu_seqlens, k.device)
        return rotate(k_cmp, ends, self.rope_base), v_cmp

    def _finish(self, o: Tensor) -> Tensor:
        y: Tensor = self.out(o.flatten(-2))
        return y


class SoftmaxAttention(AttentionLayer):
    """Full causal attention, or attention to the last `config.window` tokens.

    Args:
        config: sizes and options; those of compression and selection are not used.
        windowed: whether it sees the window only.
        out_std: how the output projection starts.
    """

    def __init__(self, config: NsaConfig, windowed: bool, out_std: float = INIT_STD) -> None:
        super().__init__(config, 1, out_std)
        self.windowed = windowed

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, step: LayerStep | None = None
    ) -> Tensor:
        """As `NativeSparseAttention.forward`."""
        positions = self.positions_of(x, cu_seqlens, step)
        q, k, v, turn = self.project(x, positions)
        key = turned(k[0], turn)
        pool = "win" if self.windowed else "slc"
        if step is not None:
            step.store(**{pool: (key, v[0])})
        if step is not None and not step.whole:
            o = step.attend_raw(q, pool, self._attend)
        elif self.parallel is not None:
            o = self.parallel.softmax(self, q, key, v[0], cu_seqlens)
        else:
            o = self._attend(q, key, v[0], cu_seqlens, cu_seqlens)
        y: Tensor = self.out(o.flatten(-2))
        return y

    def _attend(self, *tensors: Any) -> Tensor:
        """o of q, k, v, cu_seqlens_q, cu_seqlens_k."""
        if self.windowed:
            return nsa.sliding_window_attention(*tensors, window=self.config.window)[0]
        return nsa.attention(*tensors)[0]


def attention_layer(config: NsaConfig, kind: str, out_std: float = INIT_STD) -> AttentionLayer:
    """An attention layer by its kind: `nsa`, `full` or `window`.

    Raises:
        InvalidArgument: another kind.
    """
    if kind not in KINDS:
        raise InvalidArgument("attention_layer", "kind", repr(kind), f"one of {', '.join(KINDS)}")
    if kind == "nsa":
        return NativeSparseAttention(config, out_std)
    return SoftmaxAttention(config, kind == "window", out_std)
