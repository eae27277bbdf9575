"""Kernels of other repositories against NumPy: inputs of our own, references theirs or ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .examples import ExampleCase

if TYPE_CHECKING:
    from collections.abc import Callable

D = 128
FP32 = 2e-5
VIZ = "examples/nki_beta2"
DELTA = "contrib/models/Qwen3.5-2B/src/nki_kernels"


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + len(shape)).standard_normal(shape).astype(np.float32)


def _softmax_inputs() -> tuple[Any, ...]:
    return _normal(256, 200), np.zeros((256, 200), np.float32)


def _rms_norm_inputs() -> tuple[Any, ...]:
    gamma = np.broadcast_to(_normal(1, 192), (256, 192)).copy()
    return _normal(256, 192), gamma, np.zeros((256, 192), np.float32)


def _mlp_inputs() -> tuple[Any, ...]:
    x, w1, w2 = _normal(256, 128), _normal(256, 256, seed=1), _normal(256, 512, seed=2)
    return x, w1, w2, np.zeros((128, 512), np.float32)


def _product_inputs() -> tuple[Any, ...]:
    return _normal(256, 128), _normal(256, 1024, seed=1), np.zeros((128, 1024), np.float32)


def _rope_inputs() -> tuple[Any, ...]:
    q, k = _normal(1, 2, 256, 64), _normal(1, 2, 256, 64, seed=1)
    turn = np.outer(np.arange(256), 1e4 ** (-np.arange(0, 64, 2) / 64))
    table = np.concatenate([turn, turn], axis=1)
    cos, sin = np.cos(table).astype(np.float32), np.sin(table).astype(np.float32)
    return q, k, cos, sin, np.zeros_like(q), np.zeros_like(k), 1, 2, 256, 64


def _attention_inputs() -> tuple[Any, ...]:
    q, k, v = _normal(1, 2, 128, D), _normal(1, 2, 256, D, seed=1), _normal(1, 2, 256, 64, seed=2)
    out = np.zeros((1, 2, 128, 64), np.float32)
    return q, k, v, out, 1, 2, 2, 2, 128, 256, D, 64


def _add_inputs() -> tuple[Any, ...]:
    return _normal(64, 300), _normal(64, 300, seed=1), np.zeros((64, 300), np.float32)


def _delta_tokens(length: int) -> tuple[np.ndarray, ...]:
    """Queries, keys of norm 1, values, log-decays and gates, each repeated over 128 columns."""
    q, k, v = (_normal(length, D, seed=s) for s in (0, 1, 2))
    k /= np.linalg.norm(k, axis=1, keepdims=True)
    rng = np.random.default_rng(3)
    g = -rng.random((length, 1)).astype(np.float32) * 0.2
    beta = rng.random((length, 1)).astype(np.float32)
    return q, k, v, np.repeat(g, D, 1), np.repeat(beta, D, 1)


def gated_delta_rule(
    q: Any, k: Any, v: Any, g: Any, beta: Any, state: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence token by token in float64: outputs and the last state."""
    q, k, v, g, beta = (np.asarray(x, np.float64) for x in (q, k, v, g, beta))
    state = np.zeros((D, D)) if state is None else np.asarray(state, np.float64)
    out = []
    for t in range(len(q)):
        state = state * np.exp(g[t])[:, None]
        state = state + np.outer(k[t], (v[t] - state.T @ k[t]) * beta[t])
        out.append(state.T @ q[t])
    return np.stack(out), state


def _chunk_inputs() -> tuple[Any, ...]:
    q, k, v, g, beta = _delta_tokens(D)
    sums = np.cumsum(g, axis=0)
    last = np.repeat(sums[-1:], D, 0)
    strict = np.tril(np.ones((D, D), np.float32), -1)
    state = _normal(D, D, seed=9) * 0.1
    eye = np.eye(D, dtype=np.float32)
    return q, k, v, beta, sums, last, state, strict, eye, strict + eye


def _chunk(
    module: Any, q: Any, k: Any, v: Any, beta: Any, sums: Any, last: Any, state: Any, *_: Any
):
    return gated_delta_rule(q, k, v, np.diff(sums, axis=0, prepend=0), beta, state)


def _batched_inputs() -> tuple[Any, ...]:
    q, k, v, g, beta = _delta_tokens(3)
    return q, k, v, g[:, :1], beta[:, :1], _normal(3 * D, D, seed=9)


def _batched(module: Any, q: Any, k: Any, v: Any, g: Any, beta: Any, states: Any) -> Any:
    parts = []
    for t in range(len(q)):
        one = (x[t : t + 1] for x in (q, k, v, np.repeat(g, D, 1), np.repeat(beta, D, 1)))
        parts.append(gated_delta_rule(*one, states[t * D : (t + 1) * D]))
    return tuple(np.concatenate(kind) for kind in zip(*parts, strict=True))


def _partial_rope_inputs() -> tuple[Any, ...]:
    turn = np.outer(np.arange(160), 1e4 ** (-np.arange(0, 64, 2) / 64))
    table = np.concatenate([turn, turn], axis=1)[None].astype(np.float32)
    gammas = _normal(256), _normal(256, seed=1)
    q, k = _normal(1, 160, 512), _normal(1, 160, 256, seed=1)
    return q, k, *gammas, np.cos(table), np.sin(table), 1e-6


def _partial_rope(module: Any, q: Any, k: Any, gq: Any, gk: Any, cos: Any, sin: Any, eps: Any):
    def one(x: np.ndarray, gamma: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64).reshape(1, 160, -1, 256).transpose(0, 2, 1, 3)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * gamma
        low, high = x[..., :32], x[..., 32:64]
        turned = np.concatenate([-high, low], axis=-1)
        return np.concatenate([x[..., :64] * cos + turned * sin, x[..., 64:]], axis=-1)

    return one(q, gq), one(k, gk)


def _rms_norm(module: Any, x: Any, weight: Any, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x * x).mean(1, keepdims=True) + eps) * weight


def _viz(name: str, inputs: Callable[[], Any], reference: Callable[..., Any], kernel: str = ""):
    return ExampleCase(
        f"{VIZ}/{name}.py", kernel or f"{name}_kernel", inputs, reference, FP32,
        repository="triton-viz",
    )  # fmt: skip


def _delta(file: str, kernel: str, inputs: Callable[[], Any], reference: Callable[..., Any]):
    return ExampleCase(f"{DELTA}/{file}.py", kernel, inputs, reference, FP32, repository="nxdi")


CASES: tuple[ExampleCase, ...] = (
    _viz("add", _add_inputs, lambda m, a, b, _: a + b, "nki_tensor_add_kernel"),
    _viz("matmul", _product_inputs, lambda m, a, b, _: a.T.astype(float) @ b),
    _viz("mlp", _mlp_inputs, lambda m, x, a, b, _: np.maximum(x.T.astype(float) @ a, 0) @ b),
    _viz("rmsnorm", _rms_norm_inputs, lambda m, x, g, _: m._numpy_rmsnorm(x, g)),
    _viz("softmax", _softmax_inputs, lambda m, x, _: m._numpy_softmax(x)),
    _viz("rope", _rope_inputs, lambda m, q, k, cos, sin, *_: m._rope_reference(q, k, cos, sin)),
    _viz(
        "tiled_attention",
        _attention_inputs,
        lambda m, q, k, v, *_: m._numpy_tiled_attention(q, k, v),
    ),
    ExampleCase(
        "examples/models/gpt_oss/kernels/nki/rmsnorm.py",
        "nki_rmsnorm_kernel",
        lambda: (_normal(256, 384), _normal(384), 1e-5),
        _rms_norm,
        FP32,
        repository="nkipy",
    ),
    _delta(
        "nki_deltanet", "deltanet_recurrent_fwd", lambda: _delta_tokens(24),
        lambda m, *x: gated_delta_rule(*x)[0],
    ),
    _delta(
        "nki_deltanet", "deltanet_recurrent_fwd_state", lambda: _delta_tokens(24),
        lambda m, *x: gated_delta_rule(*x),
    ),
    _delta(
        "nki_deltanet", "deltanet_recurrent_step",
        lambda: (*_delta_tokens(1), _normal(D, D, seed=9)),
        lambda m, *x: gated_delta_rule(*x),
    ),
    _delta(
        "nki_deltanet", "_deltanet_recurrent_step_batched_kernel", _batched_inputs, _batched
    ),
    _delta("nki_deltanet_chunked", "deltanet_chunk_step", _chunk_inputs, _chunk),
    _delta(
        "qwen_qk_norm_rope", "qwen_qk_norm_partial_rope_kernel", _partial_rope_inputs, _partial_rope
    ),
)  # fmt: skip
