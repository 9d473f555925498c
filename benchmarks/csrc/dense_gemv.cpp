// Copyright 2026 The peft-elastic authors.
//
// Licensed under the Apache License, Version 2.0 (the "License");
// you may not use this file except in compliance with the License.
// You may obtain a copy of the License at
//
//     http://www.apache.org/licenses/LICENSE-2.0
//
// Unless required by applicable law or agreed to in writing, software
// distributed under the License is distributed on an "AS IS" BASIS,
// WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
// See the License for the specific language governing permissions and
// limitations under the License.
// What the sparse kernels are measured against: a dense bf16 matrix-vector product that runs as fast as the weights
// come from memory, and how fast they can come. Compiled by benchmarks/kernels.py, once for each instruction set.
#include <immintrin.h>

#include <cstdint>
#include <vector>

namespace {

#if defined(__AVX512F__)
using Ints = __m512i;
using Floats = __m512;
inline Ints load(const void* p) { return _mm512_loadu_si512(p); }
inline Ints either(Ints a, Ints b) { return _mm512_or_si512(a, b); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// Of the pairs of bf16 in v the even ones, or the odd ones, as floats.
inline Floats even(Ints v) { return _mm512_castsi512_ps(_mm512_slli_epi32(v, 16)); }
inline Floats odd(Ints v) { return _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(-65536))); }
inline float sum(Floats a, Floats b) { return _mm512_reduce_add_ps(_mm512_add_ps(a, b)); }
#else
using Ints = __m256i;
using Floats = __m256;
inline Ints load(const void* p) { return _mm256_loadu_si256(static_cast<const Ints*>(p)); }
inline Ints either(Ints a, Ints b) { return _mm256_or_si256(a, b); }
inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline Floats zero() { return _mm256_setzero_ps(); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats even(Ints v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
inline Floats odd(Ints v) { return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(-65536))); }
inline float sum(Floats a, Floats b) {
  float lanes[8];
  _mm256_storeu_ps(lanes, _mm256_add_ps(a, b));
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}
#endif

constexpr std::int64_t kStep = sizeof(Ints) / 2;  // weights in a register
// Measured on Zen 5: one stream reaches 80% of what four do.
constexpr int kStreams = 4;
constexpr std::int64_t kPrefetchBytes = 2048;

inline float to_float(std::uint16_t bf16) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bf16) << 16;
  float value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// y[s * rows + r] for all s < kCount. Each stream walks through consecutive rows, so that what is fetched ahead of the end
// of a row is the next one.
template <int kCount>
void multiply(const std::uint16_t* w, std::int64_t rows, std::int64_t columns, const float* x, const float* x_even,
              const float* x_odd, float* y) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const std::uint16_t* row[kCount];
    Floats sums[kCount][2];
    for (int s = 0; s < kCount; ++s) {
      row[s] = w + (s * rows + r) * columns;
      sums[s][0] = sums[s][1] = zero();
    }
    std::int64_t k = 0;
    for (; k + 64 / 2 <= columns; k += 64 / 2) {  // a cache line of each stream
#pragma GCC unroll 8
      for (int s = 0; s < kCount; ++s) {
        _mm_prefetch(reinterpret_cast<const char*>(row[s] + k) + kPrefetchBytes, _MM_HINT_T0);
      }
#pragma GCC unroll 2
      for (std::int64_t i = k; i < k + 64 / 2; i += kStep) {
        const Floats at_even = load_floats(x_even + i / 2), at_odd = load_floats(x_odd + i / 2);
#pragma GCC unroll 8
        for (int s = 0; s < kCount; ++s) {
          const Ints pairs = load(row[s] + i);
          sums[s][0] = multiply_add(even(pairs), at_even, sums[s][0]);
          sums[s][1] = multiply_add(odd(pairs), at_odd, sums[s][1]);
        }
      }
    }
    for (int s = 0; s < kCount; ++s) {
      float total = sum(sums[s][0], sums[s][1]);
      for (std::int64_t i = k; i < columns; ++i) total += to_float(row[s][i]) * x[i];
      y[s * rows + r] = total;
    }
  }
}

}  // namespace

extern "C" {

// y = W x; w: bf16 [rows, columns], x: float [columns], y: float [rows].
void dense_gemv(const std::uint16_t* w, std::int64_t rows, std::int64_t columns, const float* x, float* y, int threads) {
  static thread_local std::vector<float> split;
  const std::int64_t pairs = columns / 2;
  split.resize(static_cast<std::size_t>(2 * pairs));
  float *const x_even = split.data(), *const x_odd = x_even + pairs;
  for (std::int64_t i = 0; i < pairs; ++i) {
    x_even[i] = x[2 * i];
    x_odd[i] = x[2 * i + 1];
  }
#pragma omp parallel for num_threads(threads) schedule(static, 1)
  for (int part = 0; part < threads; ++part) {
    const std::int64_t first = rows * part / threads, count = rows * (part + 1) / threads - first;
    const std::int64_t each = count / kStreams, rest = first + kStreams * each;
    multiply<kStreams>(w + first * columns, each, columns, x, x_even, x_odd, y + first);
    multiply<1>(w + rest * columns, first + count - rest, columns, x, x_even, x_odd, y + rest);
  }
}

// Reads a buffer from end to end; the result keeps the compiler from leaving that out.
std::uint64_t stream_read(const std::uint8_t* buffer, std::int64_t bytes, int threads) {
  std::uint64_t result = 0;
#pragma omp parallel for num_threads(threads) schedule(static, 1) reduction(| : result)
  for (int part = 0; part < threads; ++part) {
    const std::int64_t lines = bytes / 64, first = lines * part / threads, last = lines * (part + 1) / threads;
    const std::int64_t each = (last - first) / kStreams;
    Ints sums[kStreams] = {};
    for (std::int64_t line = first; line < first + each; ++line) {
#pragma GCC unroll 8
      for (int s = 0; s < kStreams; ++s) {
        const std::uint8_t* p = buffer + (line + s * each) * 64;
        _mm_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes, _MM_HINT_T0);
        for (std::size_t at = 0; at < 64; at += sizeof(Ints)) sums[s] = either(sums[s], load(p + at));
      }
    }
    std::uint64_t words[sizeof(Ints) / 8];
    for (int s = 0; s < kStreams; ++s) {
      __builtin_memcpy(words, &sums[s], sizeof(words));
      for (std::uint64_t word : words) result |= word;
    }
  }
  return result;
}

}  // extern "C"
