// 16-bit floats to float32.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace nsa {

inline void from_bfloat16(const uint16_t* x, float* out, int64_t count) {
  for (int64_t i = 0; i < count; i++) {
    const uint32_t bits = uint32_t(x[i]) << 16;
    std::memcpy(out + i, &bits, sizeof bits);
  }
}

// F16C is part of x86-64-v3, the least that this is compiled for.
inline void from_float16(const uint16_t* x, float* out, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i))));
  for (; i < count; i++) out[i] = _cvtsh_ss(x[i]);
}

}  // namespace nsa
