"""Every Triton kernel with its argument types, for compiling it where nothing can be launched.

A launch derives an argument's type from the value passed; a compile check has no values. An entry
names what differs from the conventions all kernels follow:

- `stride_*` is an int32 divisible by 16, `scale` a float32, `cu_*` an int32 pointer;
- the names in `INTEGERS` are int32; those in `FLOAT32_TENSORS` float32 pointers;
- any other argument that is not a constant is a pointer to the compute dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nsa_neuron.backends.cuda.launch import decode
from nsa_neuron.backends.cuda.launch.common import (
    head_dim_constants,
    key_tile,
    query_tile_constants,
)
from nsa_neuron.backends.cuda.launch.select_blocks import tile_constants as select_tiles
from nsa_neuron.backends.cuda.launch.selected_attention.lists import pair_tile

INTEGERS = frozenset(
    {"num_seqs", "S", "T", "HQ", "rows", "heads", "tokens", "num_rows", "first_token"}
    | {"blocks_per_head", "chunk", "chunks", "chunks_per_part", "width", "longest"}
    | {"lane_width", "lane_slots", "part_offset"}
)
FLOAT32_TENSORS = frozenset({"lse", "delta", "grad_lse"})
PRODUCTS = ("fma", "mma", "wgmma")
"""Ordinary arithmetic; the tensor core instruction of a warp; that of a warpgroup (4 warps)."""

WGMMA_ROWS = 64

NO_PRODUCT = "no matrix product"
IEEE_PRODUCT = "IEEE float32: tensor cores would round to tf32"


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for: head dims, group size and the constants of its plan."""

    dk: int
    dv: int
    group: int
    planned: Mapping[str, Any]


Derive = Callable[[Shape], Mapping[str, Any]]


@dataclass(frozen=True)
class KernelEntry:
    """One kernel as the compile check sees it.

    Attributes:
        op: whose plan file holds its constants. kernel: name of the function, and of its plan
            unless `plan` says otherwise. module: module inside `cuda_kernels`.
        derive: the constants that the launcher adds to those of the plan.
        types: Triton types of arguments that break the conventions; `"dtype"` stands for the
            compute dtype, as in `"*dtype"`.
        wants_wgmma: whether its matrix products must be warpgroup instructions. exempt: why they
            are not, where they are not: `NO_PRODUCT` or a reason, then they must be `mma`.
        min_group, max_group: the group sizes it is launched for.
        variant: what sets it apart from other entries of the same kernel.
        packed: whether this is the variant for packed sequences.
    """

    op: str
    kernel: str
    module: str
    derive: Derive
    types: Mapping[str, str] = field(default_factory=dict)
    wants_wgmma: bool = True
    exempt: str = NO_PRODUCT
    plan: str = ""
    min_group: int = 1
    max_group: int = 1 << 30
    variant: str = ""
    packed: bool = False

    @property
    def planned(self) -> str:
        """Under which name plans hold its constants."""
        return self.plan or self.kernel

    @property
    def label(self) -> str:
        """The kernel's name and variant."""
        return " ".join(
            [self.kernel, *[self.variant] * bool(self.variant), *["packed"] * self.packed]
        )

    def products(self, dtype: str, constants: Mapping[str, Any]) -> tuple[str, str]:
        """The least that matrix products must be done with, and why that is not `wgmma`.

        Returns:
            One of `PRODUCTS`; the reason, empty for `wgmma`.
        """
        if self.exempt == NO_PRODUCT and not self.wants_wgmma:
            return "fma", NO_PRODUCT
        if dtype == "float32" and constants["PRECISION"] == "ieee":
            return "fma", IEEE_PRODUCT
        if not self.wants_wgmma:
            return "mma", self.exempt
        if constants.get("QUERIES") == 1 and constants["BLOCK_M"] < WGMMA_ROWS:
            return "mma", f"one token of {constants['BLOCK_M']} rows, wgmma has {WGMMA_ROWS}"
        if dtype == "float32":
            return "mma", "float32 (tf32x3): tiles of 64 rows, as wgmma has, spill"
        return "wgmma", ""

    def constants(self, shape: Shape) -> dict[str, Any]:
        """All constants of a launch: the plan's and the launcher's."""
        constants = {**shape.planned, **self.derive(shape)}
        return constants | {"PACKED": True} if self.packed else constants

    def type_of(self, name: str) -> str:
        """The Triton type of argument `name`, `dtype` standing for the compute dtype."""
        if name in self.types:
            return self.types[name]
        if name in INTEGERS or name.startswith("stride_"):
            return "i32"
        if name == "scale":
            return "fp32"
        if name.startswith("cu_"):
            return "*i32"
        return "*fp32" if name in FLOAT32_TENSORS else "*dtype"

    def is_aligned(self, name: str, kind: str) -> bool:
        """Whether a launch would find the argument divisible by 16."""
        return kind.startswith("*") or name.startswith("stride_")


def _dims(shape: Shape) -> dict[str, int]:
    return head_dim_constants(shape.dk, shape.dv)


def _delta(shape: Shape) -> Mapping[str, Any]:
    dims = _dims(shape)
    return {name: dims[name] for name in ("DV", "V0", "V1")} | {"HAS_GRAD_LSE": False}


def _delta_entry(op: str) -> KernelEntry:
    return KernelEntry(op, "backward_delta", op, _delta, wants_wgmma=False)


def _flash(op: str, window: int) -> tuple[KernelEntry, ...]:
    def derive(shape: Shape) -> Mapping[str, Any]:
        return {"G": shape.group, "WINDOW": window, "PACKED": False, **_dims(shape)}

    kernels = ("forward", "backward_dq", "backward_dkv")
    return (*(KernelEntry(op, kernel, op, derive) for kernel in kernels), _delta_entry(op))


_SELECT_BLOCK, _NUM_SELECTED = 64, 16
_SELECTED_TYPES = {
    **dict.fromkeys(("block_indices", "entries", "counts", "pairs", "chosen", "queries"), "*i32"),
    **{"items": "*i32", "slots": "*i16", "used_slots": "*i8"},
    **dict.fromkeys(("partial_lse", "partial_dq", "workspace"), "*fp32"),
    **{"tiles": "i32", "min_sharing": "fp32"},
}
_LIST_TYPES = {**_SELECTED_TYPES, "counts": "*i32"}


def _measured(shape: Shape) -> dict[str, bool]:
    """Whether the plans let the overlap decide, so that the kernel begins with reading a flag."""
    return {"MEASURED": 5 <= shape.group <= 32}


def _by_query(shape: Shape) -> Mapping[str, Any]:
    return {
        **query_tile_constants(shape.planned, shape.group, _SELECT_BLOCK),
        **_dims(shape),
        "NUM_SELECTED": _NUM_SELECTED,
        "SELECT_BLOCK": _SELECT_BLOCK,
        "PACKED": False,
        **_measured(shape),
    }


def _by_block(shape: Shape) -> Mapping[str, Any]:
    constants = {"SELECT_BLOCK": _SELECT_BLOCK, "PACKED": False, "G": shape.group, **_dims(shape)}
    slots = {"NUM_SELECTED": _NUM_SELECTED}
    return {"BLOCK_N": _SELECT_BLOCK, **slots, **constants, **_measured(shape)}


def _dkv_by_block(shape: Shape) -> Mapping[str, Any]:
    """As `_by_block`, but a block may be cut in several tiles."""
    tile = key_tile(shape.planned["BLOCK_N"], _SELECT_BLOCK)
    return {**_by_block(shape), "BLOCK_N": tile}


def _reduce(shape: Shape) -> Mapping[str, Any]:
    return {"SELECT_BLOCK": _SELECT_BLOCK, "PACKED": False, **_dims(shape)}


_IDS = {"NUM_SELECTED": _NUM_SELECTED, "SELECT_BLOCK": _SELECT_BLOCK, "PACKED": False}


def _union(shape: Shape) -> Mapping[str, Any]:
    return {**_IDS, "SELECTED_POW2": _NUM_SELECTED, "QUERIES": 4}


def _lists(shape: Shape) -> Mapping[str, Any]:
    return {**_IDS, **pair_tile(shape.planned, _NUM_SELECTED), **_measured(shape)}


def _combine(shape: Shape) -> Mapping[str, Any]:
    dims = _dims(shape)
    constants = {name: dims[name] for name in ("DV", "V0", "V1")}
    return {"G": shape.group, "NUM_SELECTED": _NUM_SELECTED, **constants, **_measured(shape)}


def _sum_dq(shape: Shape) -> Mapping[str, Any]:
    dims = _dims(shape)
    constants = {name: dims[name] for name in ("DK", "D0", "D1")}
    return {"G": shape.group, "NUM_SELECTED": _NUM_SELECTED, **constants, **_measured(shape)}


def _planned_only(shape: Shape) -> Mapping[str, Any]:
    return {}


def _selected(kernel: str, derive: Derive, **options: Any) -> KernelEntry:
    op = "selected_attention"
    return KernelEntry(op, kernel, op, derive, _SELECTED_TYPES, **options)


# Compression and the shapes that follow from it: l = 32, d = 16, 64K tokens.
_COMPRESSION = {"BLOCK": 32, "STRIDE": 16}
_SELECTABLE = 1024
_FORCED = {"INITIAL": 1, "LOCAL": 2}
_COLUMN_SPLITS = 64  # of `column_sum` in the shipped plans; reduce_splits adds them up
_COMPRESSED_TYPES = {
    **{"NC": "i32", "elements": "i32", "partial": "*fp32"},
    **{"dk": "*fp32", "dv": "*fp32"},  # split over queries in every shipped plan, see SPLITS
}
_SELECT_TYPES = {
    **dict.fromkeys(("HKV_B", "tiles"), "i32"),
    **dict.fromkeys(("block_indices", "carried_ids"), "*i32"),
    "scores": "*fp32",
}
_COMPRESS_TYPES = {
    **dict.fromkeys(("B", "NC", "HKV", "HEADS", "elements"), "i32"),
    **dict.fromkeys(("starts", "total"), "*i32"),
    **dict.fromkeys(("hidden", "partial", "y_sum"), "*fp32"),
    "bias": "*fp32",  # with the encoding's share in it
}
_DELTA_TYPES = {
    f"{name}_{branch}": "*fp32" for name in ("lse", "delta") for branch in ("cmp", "slc", "win")
}
_DECODE_TYPES = {
    **dict.fromkeys(("HKV", "MAX_TILES", "cmp_pages", "win_pages", "slc_pages"), "i32"),
    **dict.fromkeys(("cmp_table", "win_table", "slc_table", "seqlens", "ids", "counters"), "*i32"),
    **dict.fromkeys(("partial_o", "partial_ml", "importance", "over", "tile_maximum"), "*fp32"),
    "id_scores": "*fp32",
}


def _compressed(shape: Shape) -> Mapping[str, Any]:
    return {"G": shape.group, "PACKED": False, **_COMPRESSION, **_dims(shape)}


def _select(shape: Shape) -> Mapping[str, Any]:
    ratio = _SELECT_BLOCK // _COMPRESSION["STRIDE"]
    tiles = select_tiles(shape.planned, shape.group, ratio, _NUM_SELECTED, _SELECTABLE)
    fixed = {"PACKED": False, "SELECT": _SELECT_BLOCK, "N": _NUM_SELECTED}
    return {**_compressed(shape), **fixed, **_FORCED, **tiles}


def _compress(shape: Shape, **change: Any) -> Mapping[str, Any]:
    flags = {"PACKED": False, "HAS_PE": True, "HAS_BIAS": True, "GELU": False}
    width = 1 << (shape.dk - 1).bit_length()
    rows = _COMPRESSION["BLOCK"] * shape.dk
    sizes = {"N": shape.dk, "D": shape.dk, "WIDTH": width, "ROWS": rows}
    return {**sizes, **flags, **_COMPRESSION, **change}


def _gated(shape: Shape) -> Mapping[str, Any]:
    return {"DV": shape.dv, "WIDTH": 1 << (shape.dv - 1).bit_length(), "DELTA": False}


def _gated_deltas(shape: Shape) -> Mapping[str, Any]:
    return {**_gated(shape), "DELTA": True}


def _gated_entries() -> tuple[KernelEntry, ...]:
    def entry(
        kernel: str,
        derive: Derive,
        types: Mapping[str, str] = {},
        variant: str = "",
    ) -> KernelEntry:
        return KernelEntry(
            "gated_sum", kernel, "gated_sum", derive, types, wants_wgmma=False, variant=variant
        )  # fmt: skip

    return (
        entry("forward", _gated),
        entry("backward", _gated),
        entry("backward", _gated_deltas, _DELTA_TYPES, "with deltas"),
        entry("add", _planned_only, {"elements": "i32"}),
    )


def _decode(shape: Shape, **change: int) -> Mapping[str, Any]:
    group = 1 << (shape.group - 1).bit_length()
    splits = {"CMP_SPLITS": 4, "WIN_SPLITS": 4, "SLC_SPLITS": _NUM_SELECTED}
    sizes = {"SELECT": _SELECT_BLOCK, "N": _NUM_SELECTED, **_COMPRESSION, **change}
    return {
        **_dims(shape), **_FORCED, **splits, **sizes, "PLACES": sum(splits.values()),
        "G": shape.group, "GP": decode.HEADS_PER_PROGRAM, "HEADS": min(16, group),
        "PARTS": decode.group_parts(shape.group), "NP": 1 << (sizes["N"] - 1).bit_length(),
        "WINDOW": 512, "CMP_PAGE": 128, "WIN_PAGE": 128, "SLC_PAGE": 128,
    }  # fmt: skip


def _decode_score(shape: Shape, **change: int) -> Mapping[str, Any]:
    sizes = _decode(shape, **change)
    ratio = sizes["SELECT"] // sizes["STRIDE"]
    return {**sizes, **decode.score_constants(shape.planned, ratio, sizes["NP"])}


def _decode_attend(shape: Shape, **change: int) -> Mapping[str, Any]:
    sizes = _decode(shape, **change)
    return {**sizes, "BLOCK_N": key_tile(decode.SELECTED_KEYS, sizes["SELECT"])}


def _decode_entries() -> tuple[KernelEntry, ...]:
    def entry(kernel: str, derive: Any, variant: str = "", **change: int) -> KernelEntry:
        return KernelEntry(
            "decode", kernel, "decode", functools.partial(derive, **change), _DECODE_TYPES,
            wants_wgmma=False, exempt="16 rows, wgmma has 64", variant=variant,
        )  # fmt: skip

    return (
        entry("score", _decode_score),
        entry("score", _decode_score, "stride 1", STRIDE=1),
        entry("attend", _decode_attend),
        entry("attend", _decode_attend, "m of 144", SELECT=144),
    )


def _count_compressed(op: str) -> KernelEntry:
    def derive(shape: Shape) -> Mapping[str, Any]:
        return _COMPRESSION

    return KernelEntry(op, "count_compressed", op, derive, wants_wgmma=False)


def _compressed_entries() -> tuple[KernelEntry, ...]:
    op = "compressed_attention"
    matmuls = ("forward", "backward_dq", "backward_dkv")

    def reduce(splits: int) -> KernelEntry:
        return KernelEntry(
            op, "reduce_splits", op, lambda shape: {"SPLITS": splits}, _COMPRESSED_TYPES,
            wants_wgmma=False, variant=f"of {splits}",
        )  # fmt: skip

    return (
        *(KernelEntry(op, kernel, op, _compressed, _COMPRESSED_TYPES) for kernel in matmuls),
        _count_compressed(op),
        _delta_entry(op),
        *(reduce(splits) for splits in (2, 4)),  # SPLITS of backward_dkv's plans
    )


def _compress_entries() -> tuple[KernelEntry, ...]:
    def entry(kernel: str, variant: str = "", types: Any = {}, **flags: Any) -> KernelEntry:  # noqa: B006
        return KernelEntry(
            "compress", kernel, "compress", functools.partial(_compress, **flags),
            _COMPRESS_TYPES | types, wants_wgmma=kernel.startswith("linear"), variant=variant,
        )  # fmt: skip

    # The second layer of the mlp reads one row per block, and its backward the hidden layer.
    second = {"BLOCK": 1, "STRIDE": 1}
    others = ("mean_forward", "mean_backward", "column_sum", "encoding_gradient")
    return (
        _count_compressed("compress"),
        entry("first_tokens"),
        entry("linear_forward"),
        entry("linear_forward", "gelu", {"bias": "*dtype"}, GELU=True),
        entry("linear_forward", "to float32", {"y": "*fp32"}),
        entry("linear_forward", "encoding", {"y": "*fp32", "bias": "*dtype"}, STRIDE=32),
        entry("linear_forward", "second", {"bias": "*dtype"}, **second),
        entry("linear_backward_x"),
        entry("linear_backward_x", "second", **second, GELU=True),
        entry("linear_backward_w"),
        entry("linear_backward_w", "second", {"x": "*fp32"}, **second, GELU=True, HAS_PE=False),
        *(entry(kernel) for kernel in others),
        entry("reduce_splits", "", {"total": "*fp32"}, SPLITS=_COLUMN_SPLITS),
    )


KERNELS: tuple[KernelEntry, ...] = (
    *_flash("attention", 0),
    *_flash("sliding_window_attention", 512),
    _selected("union_blocks", _union, wants_wgmma=False),
    _selected("choose_strategy", _planned_only, wants_wgmma=False, min_group=5, max_group=32),
    *(
        KernelEntry(
            "selected_attention",
            kernel,
            "selected_attention",
            derive,
            _LIST_TYPES,
            wants_wgmma=False,
        )
        for kernel, derive in (
            ("count_pairs", _lists),
            ("sum_chunks", _measured),
            ("cut_lists", _measured),
            ("place_pairs", _lists),
        )
    ),
    _selected("forward", _by_query, min_group=5),
    _selected("forward_by_block", _by_block, max_group=32),
    _selected("combine", _combine, wants_wgmma=False, max_group=32),
    _selected("backward_dq", _by_query, min_group=5),
    _selected("backward_dq_by_block", _by_block, max_group=32),
    _selected("sum_dq", _sum_dq, wants_wgmma=False, max_group=32),
    _selected("backward_dkv", _dkv_by_block),
    _selected("reduce_dkv", _reduce, wants_wgmma=False),
    _delta_entry("selected_attention"),
    *_compressed_entries(),
    KernelEntry("select_blocks", "forward", "select_blocks", _select, _SELECT_TYPES),
    _count_compressed("select_blocks"),
    *_compress_entries(),
    *_gated_entries(),
    *_decode_entries(),
)

_HAVE_PACKED = {
    "attention": ("forward", "backward_dq", "backward_dkv"),
    "sliding_window_attention": ("forward", "backward_dq", "backward_dkv"),
    "selected_attention": (
        *("union_blocks", "count_pairs", "place_pairs", "forward", "forward_by_block"),
        *("backward_dq", "backward_dq_by_block", "backward_dkv", "reduce_dkv"),
    ),
}
PACKED_KERNELS: tuple[KernelEntry, ...] = tuple(
    replace(entry, packed=True)
    for entry in KERNELS
    if entry.kernel in _HAVE_PACKED.get(entry.op, ())
)
"""The same kernels for packed sequences, where that changes loops and addresses most."""

EVERY_KERNEL = KERNELS + PACKED_KERNELS
