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

// AVX2 and FMA. There is no expand instruction, so a byte of the bitmap selects one of 256 byte shuffles, which drops the
// packed values into place: bf16 into the upper half of a float, int8 into the top byte of a 32-bit integer.

#include <cstddef>
#include <cstring>

#include "kernels.h"

#if (defined(__AVX2__) && defined(__FMA__) && defined(__BMI2__) && defined(__POPCNT__)) || defined(PEFT_ELASTIC_SOFTWARE_MODEL)

#include "levels/attention.h"
#include "levels/avx2_int4.h"
#include "levels/fill.h"
#include "levels/simd.h"

namespace peft_elastic {
namespace {

struct Shuffles {
  std::uint8_t of[256][32];
};

// For each byte of a bitmap the control of VPSHUFB: 8 lanes of 32 bits, the n-th value into the upper bytes of the lane of the
// n-th set bit, zeros elsewhere. Both halves of the source register hold the same values.
constexpr Shuffles make_shuffles(int value_bytes) {
  Shuffles table{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int lane = 0; lane < 8; ++lane) {
      for (int byte = 0; byte < 4; ++byte) table.of[bits][4 * lane + byte] = 0x80;
      if (!((bits >> lane) & 1)) continue;
      for (int byte = 0; byte < value_bytes; ++byte) table.of[bits][4 * lane + 4 - value_bytes + byte] = static_cast<std::uint8_t>(next++);
    }
  }
  return table;
}

alignas(64) constexpr Shuffles kShufflesBf16 = make_shuffles(2);
alignas(64) constexpr Shuffles kShufflesInt8 = make_shuffles(1);

// The 8 weights of a byte of the bitmap, whose values begin at values[next]; moves `next` behind them. The expansion is the
// bound of this level, so every instruction counts: the byte comes from memory already widened, and its population count is
// that of the shifted byte, which is also the offset into the table. `next` starts at 0 for every 8 bytes, so that these
// depend on the ones before by one addition alone.
template <ValueType type>
PE_INLINE __m256 expand8(std::uint8_t bits, const std::uint8_t* values, std::size_t& next) {
  const std::size_t offset = static_cast<std::size_t>(bits) << 5;
  const std::uint8_t* const source = values + next * static_cast<std::size_t>(value_bytes(type));
  next += static_cast<std::size_t>(_mm_popcnt_u64(offset));
  if constexpr (type == ValueType::kBf16) {
    const auto* control = reinterpret_cast<const __m256i*>(&kShufflesBf16.of[0][0] + offset);
    const __m256i packed = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
    return _mm256_castsi256_ps(_mm256_shuffle_epi8(packed, _mm256_load_si256(control)));
  } else {
    const auto* control = reinterpret_cast<const __m256i*>(&kShufflesInt8.of[0][0] + offset);
    const __m256i packed = _mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source)));
    return _mm256_cvtepi32_ps(_mm256_shuffle_epi8(packed, _mm256_load_si256(control)));  // 2^24 times the value
  }
}

// One group of inputs (2 of bf16, 4 of int8) in every place of a register.
template <ValueType type>
PE_INLINE __m256 broadcast_group(const float* x) {
  if constexpr (type == ValueType::kBf16) {
    return _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(x)));
  } else {
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(x));
  }
}

constexpr float kInt8Unit = 1.0f / 16777216.0f;  // 2^-24: undoes the place of the byte, without rounding

// Adds neighbours: 16 outputs from 4 registers of (4 outputs x 2 inputs), or from 8 of (2 outputs x 4 inputs).
PE_INLINE void store_pairs(__m256 a, __m256 b, __m256 c, __m256 d, float* out) {
  const __m256d ab = _mm256_castps_pd(_mm256_hadd_ps(a, b));  // a0 a1 | b0 b1 | a2 a3 | b2 b3, each pair 64 bits
  const __m256d cd = _mm256_castps_pd(_mm256_hadd_ps(c, d));
  _mm256_storeu_ps(out, _mm256_castpd_ps(_mm256_permute4x64_pd(ab, 0xd8)));
  _mm256_storeu_ps(out + 8, _mm256_castpd_ps(_mm256_permute4x64_pd(cd, 0xd8)));
}

PE_INLINE void store_quads(__m256 a, __m256 b, __m256 c, __m256 d, float* out) {
  const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));  // a0 b0 c0 d0 | a1 b1 c1 d1
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  _mm256_storeu_ps(out, _mm256_mul_ps(_mm256_permutevar8x32_ps(sums, order), _mm256_set1_ps(kInt8Unit)));
}

// How far ahead of their use the values are fetched, in bytes: on AMD Zen 5 this makes bf16 at 50% 1.1 times as fast. What has
// fewer bytes (int8, more sparsity) is bound by the expansion, and gains nothing.
constexpr std::uintptr_t kPrefetchDistance = 8192;

PE_INLINE void prefetch(const std::uint8_t* p, std::uintptr_t distance) {
  _mm_prefetch(reinterpret_cast<const char*>(reinterpret_cast<std::uintptr_t>(p) + distance), _MM_HINT_T0);
}

// One row of activations: expand and multiply in registers. Sums by name, as gcc keeps no array of them in registers.
void multiply_one_bf16(const Weight& w, const float* x, std::int64_t first, std::int64_t last, float* sums) {
  for (std::int64_t block = first; block < last; ++block) {
    const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(ValueType::kBf16);
    const std::uint8_t* values = w.values + 2 * w.offsets[block];
    __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    const float* const end = x + w.tiles * 32;
    for (const float* inputs = x; inputs != end; inputs += 4, bitmap += 8) {  // two rows of a tile
      std::size_t next = 0;
      prefetch(values, kPrefetchDistance);
      const __m256 even = broadcast_group<ValueType::kBf16>(inputs);
      a0 = _mm256_fmadd_ps(expand8<ValueType::kBf16>(bitmap[0], values, next), even, a0);
      a1 = _mm256_fmadd_ps(expand8<ValueType::kBf16>(bitmap[1], values, next), even, a1);
      a2 = _mm256_fmadd_ps(expand8<ValueType::kBf16>(bitmap[2], values, next), even, a2);
      a3 = _mm256_fmadd_ps(expand8<ValueType::kBf16>(bitmap[3], values, next), even, a3);
      const __m256 odd = broadcast_group<ValueType::kBf16>(inputs + 2);
      b0 = _mm256_fmadd_ps(expand8<ValueType::kBf16>(bitmap[4], values, next), odd, b0);
      b1 = _mm256_fmadd_ps(expand8<ValueType::kBf16>(bitmap[5], values, next), odd, b1);
      b2 = _mm256_fmadd_ps(expand8<ValueType::kBf16>(bitmap[6], values, next), odd, b2);
      b3 = _mm256_fmadd_ps(expand8<ValueType::kBf16>(bitmap[7], values, next), odd, b3);
      values += 2 * next;
    }
    store_pairs(_mm256_add_ps(a0, b0), _mm256_add_ps(a1, b1), _mm256_add_ps(a2, b2), _mm256_add_ps(a3, b3),
                sums + block * kBlock);
  }
}

// Two rows, whose sums fit the registers as well: each expanded byte is multiplied by both. (With three, and with int8, whose
// rows have 8 sums each, registers are spilled, and a panel is as fast.)
void multiply_two_bf16(const Weight& w, const float* x, std::int64_t x_stride, std::int64_t first, std::int64_t last,
                       float* sums, std::int64_t sums_stride) {
  for (std::int64_t block = first; block < last; ++block) {
    const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(ValueType::kBf16);
    const std::uint8_t* values = w.values + 2 * w.offsets[block];
    __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    const float* const end = x + w.tiles * 32;
    for (const float* inputs = x; inputs != end; inputs += 4, bitmap += 8) {  // two rows of a tile
      std::size_t next = 0;
      prefetch(values, kPrefetchDistance);
#pragma GCC unroll 2
      for (int row = 0; row < 2; ++row) {
        const __m256 a = broadcast_group<ValueType::kBf16>(inputs + 2 * row);
        const __m256 b = broadcast_group<ValueType::kBf16>(inputs + 2 * row + x_stride);
        __m256 weight = expand8<ValueType::kBf16>(bitmap[4 * row], values, next);
        a0 = _mm256_fmadd_ps(weight, a, a0);
        b0 = _mm256_fmadd_ps(weight, b, b0);
        weight = expand8<ValueType::kBf16>(bitmap[4 * row + 1], values, next);
        a1 = _mm256_fmadd_ps(weight, a, a1);
        b1 = _mm256_fmadd_ps(weight, b, b1);
        weight = expand8<ValueType::kBf16>(bitmap[4 * row + 2], values, next);
        a2 = _mm256_fmadd_ps(weight, a, a2);
        b2 = _mm256_fmadd_ps(weight, b, b2);
        weight = expand8<ValueType::kBf16>(bitmap[4 * row + 3], values, next);
        a3 = _mm256_fmadd_ps(weight, a, a3);
        b3 = _mm256_fmadd_ps(weight, b, b3);
      }
      values += 2 * next;
    }
    store_pairs(a0, a1, a2, a3, sums + block * kBlock);
    store_pairs(b0, b1, b2, b3, sums + sums_stride + block * kBlock);
  }
}

void multiply_one_int8(const Weight& w, const float* x, std::int64_t first, std::int64_t last, float* sums) {
  for (std::int64_t block = first; block < last; ++block) {
    const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(ValueType::kInt8);
    const std::uint8_t* values = w.values + w.offsets[block];
    __m256 a0 = _mm256_setzero_ps(), a1 = a0, a2 = a0, a3 = a0, a4 = a0, a5 = a0, a6 = a0, a7 = a0;
    const float* const end = x + w.tiles * 64;
    for (const float* inputs = x; inputs != end; inputs += 4, bitmap += 8) {
      std::size_t next = 0;
      const __m256 input = broadcast_group<ValueType::kInt8>(inputs);
      a0 = _mm256_fmadd_ps(expand8<ValueType::kInt8>(bitmap[0], values, next), input, a0);
      a1 = _mm256_fmadd_ps(expand8<ValueType::kInt8>(bitmap[1], values, next), input, a1);
      a2 = _mm256_fmadd_ps(expand8<ValueType::kInt8>(bitmap[2], values, next), input, a2);
      a3 = _mm256_fmadd_ps(expand8<ValueType::kInt8>(bitmap[3], values, next), input, a3);
      a4 = _mm256_fmadd_ps(expand8<ValueType::kInt8>(bitmap[4], values, next), input, a4);
      a5 = _mm256_fmadd_ps(expand8<ValueType::kInt8>(bitmap[5], values, next), input, a5);
      a6 = _mm256_fmadd_ps(expand8<ValueType::kInt8>(bitmap[6], values, next), input, a6);
      a7 = _mm256_fmadd_ps(expand8<ValueType::kInt8>(bitmap[7], values, next), input, a7);
      values += next;
    }
    store_quads(a0, a1, a2, a3, sums + block * kBlock);
    store_quads(a4, a5, a6, a7, sums + block * kBlock + 8);
  }
}

// More rows: part of a block is expanded in the L1 cache, once for all rows. The sums stay in memory between two of these
// panels and in registers within one. While a panel is multiplied the processor reads no weights ahead by itself, so its
// expansion asks for those of the next.
constexpr int kPanelBytes = 4 * 1024;

// Of floats, with one sum for each weight of a row of a tile.
template <ValueType type>
struct Panel {
  static constexpr int kRowFloats = type == ValueType::kBf16 ? 32 : 64;  // weights in a row of a tile
  static constexpr int kRows = kPanelBytes / (kRowFloats * 4);
  static constexpr int kGroup = static_cast<int>(group_inputs(type));
  static constexpr std::uintptr_t kBitmapBytes = kRows * kRowFloats / 8;
  static constexpr std::uintptr_t kValueBytes = kRows * kRowFloats * value_bytes(type) / 2;  // at 50%
};

// kCount rows of activations, kWidth registers of sums for each: 8 to 12 sums in all where there are rows enough, as the
// latency of two multiplications a cycle asks for.
template <ValueType type, int kCount, int kWidth = kCount <= 3 ? 4 : 2>
PE_INLINE void multiply_panel(const float* panel, int panel_rows, const float* x, std::int64_t x_stride, float* partial) {
  using P = Panel<type>;
  for (int part = 0; part < P::kRowFloats; part += 8 * kWidth) {
    __m256 sums[kCount][kWidth];
#pragma GCC unroll 4
    for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) sums[m][i] = _mm256_load_ps(partial + m * P::kRowFloats + part + 8 * i);
    }
    const float* weights = panel + part;
    const float* inputs = x;
    for (int row = 0; row < panel_rows; ++row, weights += P::kRowFloats, inputs += P::kGroup) {
      __m256 input[kCount];
#pragma GCC unroll 4
      for (int m = 0; m < kCount; ++m) input[m] = broadcast_group<type>(inputs + m * x_stride);
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) {
        const __m256 weight = _mm256_load_ps(weights + 8 * i);
#pragma GCC unroll 4
        for (int m = 0; m < kCount; ++m) sums[m][i] = _mm256_fmadd_ps(weight, input[m], sums[m][i]);
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < kCount; ++m) {
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) _mm256_store_ps(partial + m * P::kRowFloats + part + 8 * i, sums[m][i]);
    }
  }
}

template <ValueType type>
void multiply_many(const Weight& w, const float* x, std::int64_t x_stride, int rows, std::int64_t first, std::int64_t last,
                   float* sums, std::int64_t sums_stride, float* scratch) {
  using P = Panel<type>;
  float* const panel = scratch;                             // [kRows][kRowFloats]
  float* const partial = scratch + P::kRows * P::kRowFloats;  // [rows][kRowFloats]
  const int bitmap_row_bytes = static_cast<int>(tile_bitmap_bytes(type) / kTileRows);
  const int groups = (rows + 3) / 4;
  for (std::int64_t block = first; block < last; ++block) {
    const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(type);
    const std::uint8_t* values = w.values + w.offsets[block] * value_bytes(type);
    for (int i = 0; i < rows * P::kRowFloats; i += 8) _mm256_store_ps(partial + i, _mm256_setzero_ps());
    const std::int64_t block_rows = w.tiles * kTileRows;
    for (std::int64_t start = 0; start < block_rows; start += P::kRows) {
      const int count = static_cast<int>(block_rows - start < P::kRows ? block_rows - start : P::kRows);
      float* target = panel;
      for (int i = 0; i < count * bitmap_row_bytes; i += 8, bitmap += 8) {
        std::size_t next = 0;
        prefetch(values, P::kValueBytes);
        prefetch(bitmap, P::kBitmapBytes);
#pragma GCC unroll 8
        for (int byte = 0; byte < 8; ++byte, target += 8) {
          _mm256_store_ps(target, expand8<type>(bitmap[byte], values, next));
        }
        values += next * static_cast<std::size_t>(value_bytes(type));
      }
      const float* inputs = x + start * P::kGroup;
      float* partials = partial;
      for (int group = 0; group < groups; ++group) {
        const int size = rows * (group + 1) / groups - rows * group / groups;  // groups of about the same size
        switch (size) {
          case 1: multiply_panel<type, 1>(panel, count, inputs, x_stride, partials); break;
          case 2: multiply_panel<type, 2>(panel, count, inputs, x_stride, partials); break;
          case 3: multiply_panel<type, 3>(panel, count, inputs, x_stride, partials); break;
          default: multiply_panel<type, 4>(panel, count, inputs, x_stride, partials); break;
        }
        inputs += size * x_stride;
        partials += size * P::kRowFloats;
      }
    }
    for (int m = 0; m < rows; ++m) {
      const float* p = partial + m * P::kRowFloats;
      float* out = sums + m * sums_stride + block * kBlock;
      const auto load = [p](int i) { return _mm256_load_ps(p + 8 * i); };
      if constexpr (type == ValueType::kBf16) {
        store_pairs(load(0), load(1), load(2), load(3), out);
      } else {
        store_quads(load(0), load(1), load(2), load(3), out);
        store_quads(load(4), load(5), load(6), load(7), out + 8);
      }
    }
  }
}

void bf16_float(const Weight& w, const void* x, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                std::int64_t last, float* sums, std::int64_t sums_stride, void* scratch) {
  const float* inputs = static_cast<const float*>(x);
  if (rows == 1) {
    multiply_one_bf16(w, inputs, first, last, sums);
  } else if (rows == 2) {
    multiply_two_bf16(w, inputs, x_stride, first, last, sums, sums_stride);
  } else {
    multiply_many<ValueType::kBf16>(w, inputs, x_stride, static_cast<int>(rows), first, last, sums, sums_stride,
                                    static_cast<float*>(scratch));
  }
}

void int8_float(const Weight& w, const void* x, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                std::int64_t last, float* sums, std::int64_t sums_stride, void* scratch) {
  const float* inputs = static_cast<const float*>(x);
  if (rows == 1) {
    multiply_one_int8(w, inputs, first, last, sums);
  } else {
    multiply_many<ValueType::kInt8>(w, inputs, x_stride, static_cast<int>(rows), first, last, sums, sums_stride,
                                    static_cast<float*>(scratch));
  }
}

// For each byte of a bitmap the control of VPSHUFB: 8 bytes, the n-th value into the byte of the n-th set bit.
struct ByteShuffles {
  std::uint8_t of[257][8];  // 16 bytes are read
};

constexpr ByteShuffles make_byte_shuffles() {
  ByteShuffles table{};
  for (int bits = 0; bits < 256; ++bits) {
    int next = 0;
    for (int bit = 0; bit < 8; ++bit) table.of[bits][bit] = static_cast<std::uint8_t>((bits >> bit) & 1 ? next++ : 0x80);
  }
  return table;
}

alignas(64) constexpr ByteShuffles kByteShuffles = make_byte_shuffles();

// One row of a tile, 16 outputs x 4 inputs, as bytes. Returns where the values of the next begin.
PE_INLINE const std::uint8_t* expand_row_int8(const std::uint8_t* bitmap, const std::uint8_t* values, std::uint8_t* target) {
  std::size_t next = 0;
#pragma GCC unroll 8
  for (int byte = 0; byte < 8; ++byte) {
    const std::size_t bits = bitmap[byte];
    const __m128i packed = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + next));
    const __m128i control = _mm_loadu_si128(reinterpret_cast<const __m128i*>(kByteShuffles.of[bits]));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(target + 8 * byte), _mm_shuffle_epi8(packed, control));
    next += static_cast<std::size_t>(_mm_popcnt_u64(bits));
  }
  return values + next;
}

// Adds to `sum` (8 outputs) the products of 4 inputs each. VPMADDUBSW wants one side without a sign, which moves to the other;
// two products are at most 2 x 127 x 127, so its 16 bits do not saturate.
PE_INLINE __m256i add_products(__m256i sum, __m256i weight, __m256i weight_size, __m256i input) {
  const __m256i pairs = _mm256_maddubs_epi16(weight_size, _mm256_sign_epi8(input, weight));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

// kCount rows of activations: 2 sums each, which with the weights and their sizes fill the 16 registers when kCount is 4.
template <int kCount>
PE_INLINE void multiply_panel_int8(const std::uint8_t* panel, int panel_rows, const std::int8_t* x, std::int64_t x_stride,
                                   std::int32_t* partial) {
  auto* const stored = reinterpret_cast<__m256i*>(partial);
  __m256i sums[kCount][2];
#pragma GCC unroll 4
  for (int m = 0; m < kCount; ++m) {
    sums[m][0] = _mm256_load_si256(stored + 2 * m);
    sums[m][1] = _mm256_load_si256(stored + 2 * m + 1);
  }
  for (int row = 0; row < panel_rows; ++row, panel += 64, x += 4) {
    const __m256i low = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel));
    const __m256i high = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + 32));
    const __m256i low_size = _mm256_abs_epi8(low), high_size = _mm256_abs_epi8(high);
#pragma GCC unroll 4
    for (int m = 0; m < kCount; ++m) {
      std::int32_t quad;
      std::memcpy(&quad, x + m * x_stride, sizeof(quad));
      const __m256i input = _mm256_set1_epi32(quad);
      sums[m][0] = add_products(sums[m][0], low, low_size, input);
      sums[m][1] = add_products(sums[m][1], high, high_size, input);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < kCount; ++m) {
    _mm256_store_si256(stored + 2 * m, sums[m][0]);
    _mm256_store_si256(stored + 2 * m + 1, sums[m][1]);
  }
}

void int8_int8(const Weight& w, const void* x, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
               std::int64_t last, float* sums, std::int64_t sums_stride, void* scratch) {
  constexpr int kRows = kPanelBytes / 64;
  auto* const panel = static_cast<std::uint8_t*>(scratch);                    // [kRows][64]
  auto* const partial = reinterpret_cast<std::int32_t*>(panel + kPanelBytes);  // [rows][16]
  const int count = static_cast<int>(rows), groups = (count + 3) / 4;
  for (std::int64_t block = first; block < last; ++block) {
    const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(ValueType::kInt8);
    const std::uint8_t* values = w.values + w.offsets[block];
    std::memset(partial, 0, static_cast<std::size_t>(count) * 64);
    const std::int64_t block_rows = w.tiles * kTileRows;
    for (std::int64_t start = 0; start < block_rows; start += kRows) {
      const int panel_rows = static_cast<int>(block_rows - start < kRows ? block_rows - start : kRows);
      for (int row = 0; row < panel_rows; ++row, bitmap += 8) {
        prefetch(values, kPanelBytes / 2);
        prefetch(bitmap, kPanelBytes / 8);
        values = expand_row_int8(bitmap, values, panel + 64 * row);
      }
      const std::int8_t* inputs = static_cast<const std::int8_t*>(x) + start * 4;
      std::int32_t* partials = partial;
      for (int group = 0; group < groups; ++group) {
        const int size = count * (group + 1) / groups - count * group / groups;  // groups of about the same size
        switch (size) {
          case 1: multiply_panel_int8<1>(panel, panel_rows, inputs, x_stride, partials); break;
          case 2: multiply_panel_int8<2>(panel, panel_rows, inputs, x_stride, partials); break;
          case 3: multiply_panel_int8<3>(panel, panel_rows, inputs, x_stride, partials); break;
          default: multiply_panel_int8<4>(panel, panel_rows, inputs, x_stride, partials); break;
        }
        inputs += size * x_stride;
        partials += size * 16;
      }
    }
    for (int m = 0; m < count; ++m) {
      const auto* total = reinterpret_cast<const __m256i*>(partial + 16 * m);
      float* out = sums + m * sums_stride + block * kBlock;
      _mm256_store_ps(out, _mm256_cvtepi32_ps(_mm256_load_si256(total)));
      _mm256_store_ps(out + 8, _mm256_cvtepi32_ps(_mm256_load_si256(total + 1)));
    }
  }
}

}  // namespace

const Kernels* avx2_kernels() {
  static constexpr Kernels kKernels = {
      {&bf16_float, &int8_float, &multiply_int4<false>, &multiply_int4<true>},
      {nullptr, &int8_int8},
      &attend,
      &multiply_dense,
      &fill,
  };
  return &kKernels;
}

}  // namespace peft_elastic

#else

namespace peft_elastic {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace peft_elastic

#endif
