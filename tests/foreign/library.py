"""nki-library's kernels: AWS's own test functions with AWS's inputs, references and tolerances."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from dataclasses import dataclass, field, replace
from typing import Any

from .manager import Manager, Outcome
from .parameters import cases_of, fill


@dataclass(frozen=True)
class LibraryCase:
    """One kernel with one of the parametrizations of its test.

    Attributes:
        kernel: name in the table.
        test: "path under test/integration/nkilib::Class.method" or "path::function".
        pick: which parametrization, counted from the smallest.
        values: parameters to use instead of AWS's.
        dims: sizes to use instead of AWS's in a ranged test.
        relax: rule id -> why AWS's code breaks it.
        slow: True where it takes more than about five seconds.
    """

    kernel: str
    test: str
    pick: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    dims: dict[str, int] = field(default_factory=dict)
    relax: dict[str, str] = field(default_factory=dict)
    slow: bool = False

    @property
    def id(self) -> str:
        """Name in pytest and in the table."""
        return f"{self.kernel}-{self.pick}" if self.pick else self.kernel

    @property
    def source(self) -> str:
        """Where inputs and reference come from."""
        return self.test

    def run(self) -> Outcome:
        """Run AWS's test on the simulator; the checkout must be importable."""
        path, name = self.test.split("::")
        module = importlib.import_module(f"test.integration.nkilib.{path.replace('/', '.')}")
        manager = Manager(frozenset(self.relax))
        owner, _, method = name.rpartition(".")
        instance = getattr(module, owner)() if owner else None
        function = getattr(instance or module, method)
        case = {**cases_of(function)[self.pick], **self.values}
        if self.dims:
            ranged = case["range_test_options"]
            tensors = {k: {**v, **self.dims} for k, v in ranged.tensors.items()}
            case["range_test_options"] = replace(ranged, tensors=tensors)
        arguments = {
            p: case[p] if p in case else fill(p)
            for p, parameter in inspect.signature(function).parameters.items()
            if p in case or parameter.default is inspect.Parameter.empty
        }
        arguments["test_manager"] = manager
        with contextlib.redirect_stdout(io.StringIO()):
            function(**arguments)
        return manager.outcome


_INTEGER = {"enum": "passes dge_mode=3 where NKI 0.3 and later take nisa.dge_mode.none"}
_PADDING = {
    "uninitialized-read": "transposes and searches 128 partitions of which it wrote every 16th"
}
_TILE = {"uninitialized-read": "copies a PSUM tile of which it wrote a part"}
_RACE = {"lnc-race": "clears results on one core that the other one adds to, without meeting"}
_AHEAD = {
    "sbuf-capacity": "clears buffers long before their first use; in program order they do not fit"
}


def _case(kernel: str, path: str, name: str, *picks: int, **rest: Any) -> list[LibraryCase]:
    return [LibraryCase(kernel, f"{path}::{name}", p, **rest) for p in picks or (0,)]


_CTE = "core/attention/test_attention_cte"
_CTE_CLASS = "TestRangedAttentionCTEKernels.test_attention_cte"
_MASK = "core/attention/test_gen_mask_tkg"
_QKV = "core/qkv/test_qkv_cte"
_CC = "experimental/collectives/test_collectives"
_SMALL = {"hid": 1024, "int": 256, "exp": 2, "tok": 512}
_MOE = ("core/moe/moe_cte/test_moe_cte_unified", "TestMoeCTEUnified.test_moe_cte_unified")
_VIEW = "core/utils/test_tensor_view"

CASES: tuple[LibraryCase, ...] = (
    *_case("cumsum", "core/cumsum/test_cumsum", "TestCumsumKernel.test_cumsum_fast", 0, 1, 2),
    *_case("rope", "core/embeddings/test_rope", "TestRopeKernel.test_rope_fast", 0, 5),
    *_case("rope", "core/embeddings/test_rope", "TestRopeKernel.test_rope_manual", 2),
    *_case("rope_hf", "core/embeddings/test_rope_hf", "TestRopeHFKernel.test_rope_hf_lnc", 0, 1),
    *_case(
        "find_nonzero_indices",
        "core/subkernels/test_find_nonzero_indices",
        "TestFindNonzeroIndicesKernel.test_find_nonzero_indices_with_col_start_fast",
        0,
        1,
        relax=_PADDING,
    ),
    *_case(
        "find_nonzero_indices_with_count",
        "experimental/benchmark/test_find_nonzero_indices_with_count",
        "TestFindNonzeroIndicesWithCountKernel.test_find_nonzero_indices_unit",
        2,
        relax=_PADDING,
    ),
    *_case(
        "indexed_flatten",
        "core/subkernels/test_indexed_flatten",
        "TestIndexedFlattenKernel.test_indexed_flatten_fast",
        0,
        2,
    ),
    *_case("gen_mask_tkg_hbm", _MASK, "TestGenMaskTkgHbm.test_flat_kv", 0, 1),
    *_case("gen_mask_tkg_hbm", _MASK, "TestGenMaskTkgHbm.test_block_kv", 0),
    *_case("gen_mask_tkg_hbm", _MASK, "TestGenMaskTkgHbm.test_swa_with_active_mask", 0),
    *_case("gen_mask_tkg_hbm", _MASK, "TestGenMaskTkgHbm.test_fa_tiling", 0),
    *_case(
        "depthwise_conv1d_implicit_gemm",
        "experimental/conv/test_depthwise_conv1d",
        "TestDepthwiseConv1d.test_depthwise_conv1d_all",
        0,
        1,
    ),
    *_case("conv1d", "experimental/conv/test_conv1d", "TestConv1DKernel.test_conv1d_all", 0, 7, 30),
    *_case(
        "dynamic_elementwise_add",
        "experimental/dynamic_shapes/test_dynamic_elementwise_add",
        "TestDynamicElementwiseAdd.test_dynamic_elementwise_add_fast",
        0,
        3,
    ),
    *_case(
        "topk_reduce",
        "experimental/subkernels/test_topk_reduce",
        "TestTopkReduceKernel.test_topk_reduce",
        0,
        1,
    ),
    *_case(
        "cross_partition_copy",
        "core/utils/test_cross_partition_copy",
        "TestCrossPartitionCopy.test_cross_partition_copy",
        0,
        3,
    ),
    *_case("tp_broadcast", "core/utils/test_tp_broadcast", "test_tp_broadcast", 0, 3),
    *_case("TensorView", _VIEW, "TestDynamicTensorView.test_dynamic_select", 0, 3),
    *_case(
        "cascaded_max", "core/max/test_cascaded_max", "TestCascadedMaxKernel.test_cascaded_max_unit"
    ),
    *_case(
        "folded_load_store",
        "core/max/test_cascaded_max_utils",
        "TestCascadedMaxUtils.test_folded_load_store_dst_batch",
        0,
        2,
    ),
    *_case(
        "layernorm_tkg",
        "core/subkernels/test_layernorm_tkg",
        "TestLayerNormTKGKernel.test_layernorm_tkg_unit",
        0,
        2,
        relax=_INTEGER,
    ),
    *_case(
        "rmsnorm_tkg",
        "core/subkernels/test_rmsnorm_tkg",
        "TestRmsNormTKGKernel.test_rmsnorm_tkg_unit",
        0,
        3,
        relax=_INTEGER,
    ),
    *_case(
        "rmsnorm_quant",
        "core/rmsnorm/test_rmsnorm_quant",
        "TestRmsNormQuantKernel.test_rmsnorm_row_quant_sweep",
    ),
    *_case(
        "output_projection_cte",
        "core/output_projection/test_output_proj_cte",
        "TestOutputProjCteKernel.test_output_proj_cte_bf16_unit",
        0,
        1,
    ),
    *_case(
        "output_projection_cte fp8",
        "core/output_projection/test_output_proj_cte",
        "TestOutputProjCteKernel.test_output_proj_cte_static_fp8_unit",
    ),
    *_case(
        "output_projection_tkg",
        "core/output_projection/test_output_proj_tkg",
        "TestOutputProjTkgKernel.test_output_proj_tkg_unit",
        0,
        1,
    ),
    *_case(
        "router_topk",
        "core/router_topk/test_router_topk",
        "TestRouterTopkKernel.test_router_topk",
        0,
        1,
    ),
    *_case("topk", "core/topk/test_topk", "TestTopKKernel.test_topk_unit", 0),
    *_case("topk rotational", "core/topk/test_topk", "TestTopKKernel.test_topk_unsorted", 0),
    *_case("attention_cte", _CTE, f"{_CTE_CLASS}_no_cp_unit", 0, 1),
    *_case("attention_cte", _CTE, f"{_CTE_CLASS}_no_cp_vnc_unit", 0),
    *_case("attention_cte", _CTE, f"{_CTE_CLASS}_cp_apc_klr_unit", 0),
    *_case("attention_cte", _CTE, f"{_CTE_CLASS}_seq_pack_unit", 0),
    *_case(
        "attention_tkg",
        "core/attention/test_attention_tkg",
        "TestAttentionTkgKernel.test_attn_tkg_sweep",
        0,
        1,
        9,
    ),
    *_case(
        "attention_bwd",
        "core/attention/test_attention_bwd",
        "TestAttentionBwdKernel.test_attention_bwd_sequence_packing",
        0,
        1,
    ),
    *_case("qkv_cte", _QKV, "TestQkvCteKernel.test_qkv_cte_accuracy_unit", 0, 1),
    *_case("qkv_cte", _QKV, "TestQkvCteKernel.test_qkv_cte_performance_nbsd_unit", 0),
    *_case("qkv_cte", _QKV, "TestQkvCteKernel.test_qkv_cte_fused_rope_unit", 0, relax=_TILE),
    *_case("qkv_cte fp8 cache", _QKV, "TestQkvCteKernel.test_qkv_cte_fp8_kv_cache_quantization"),
    *_case(
        "cross_entropy_backward",
        "experimental/loss/test_cross_entropy_backward",
        "TestCrossEntropyBackwardSweep.test_switch_transformers_fast",
    ),
    *_case("all_reduce", _CC, "TestCollectives.test_all_reduce", 0, 1),
    *_case("all_gather", _CC, "TestCollectives.test_all_gather", 1),
    *_case("reduce_scatter", _CC, "TestCollectives.test_reduce_scatter", 0),
    *_case("all_to_all", _CC, "TestCollectives.test_all_to_all", 0),
    *_case("rank_id", _CC, "TestCollectives.test_rank_id", 0),
    *_case("attn_q_batch_shard", _CC, "TestCollectives.test_batch_shard_input", 0),
    *_case(
        "allgather_sb2sb",
        "experimental/collectives/test_sb2sb_allgather",
        "TestSb2sbAllgather.test_allgather_sb2sb",
    ),
    *_case(
        "allgather_sb2sb_tiled",
        "experimental/collectives/test_sb2sb_allgather",
        "TestSb2sbAllgather.test_allgather_sb2sb_tiled",
    ),
    *_case(
        "fine_grained_allgather",
        "experimental/collectives/test_fg_allgather",
        "TestFgAllgather.test_fine_grained_allgather",
        slow=True,
    ),
    *_case("bwmm_shard_on_block", *_MOE, 3, relax=_AHEAD, slow=True),
    *_case("blockwise_mm_baseline_shard_intermediate", *_MOE, 1, dims=_SMALL),
    *_case("..._shard_intermediate_hybrid", *_MOE, 0, dims=_SMALL),
    *_case(
        "blockwise_mm_bwd",
        "experimental/moe/test_bwmm_bwd",
        "TestMoeBlockwiseMatMulBwdShardHAffinityHDroplessLnc2"
        ".test_moe_blockwise_mm_bwd_shardH_affinityH_dropless_lnc2",
        values={"hidden": 1024, "tokens": 512, "expert": 2, "intermediate": 256},
        relax=_RACE,
        slow=True,
    ),
    *_case("mlp_cte", "core/mlp/test_mlp_cte", "TestMlpCteKernel.test_mlp_cte_unit", slow=True),
)
