"""Decode against paged KV caches: one kernel for all three branches and the choice of blocks."""

from nki_kernels.decode.kernel import decode as decode
from nki_kernels.decode.single import decode_single as decode_single
