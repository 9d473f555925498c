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

// What the levels above AVX2 share: VPEXPANDW and VPEXPANDB put a row of a tile in place in one instruction. Everything is in
// an unnamed namespace, as each level compiles it for its own instructions.
#pragma once

#include <cstring>

#include "kernels.h"
#include "simd.h"

namespace peft_elastic {
namespace {

PE_INLINE std::uint64_t load64(const std::uint8_t* p) {
  std::uint64_t bits;
  std::memcpy(&bits, p, sizeof(bits));
  return bits;
}

PE_INLINE int count_bits(std::uint64_t bits) { return static_cast<int>(_mm_popcnt_u64(bits)); }

// Hides from the compiler what a register holds.
#if defined(PEFT_ELASTIC_SOFTWARE_MODEL)
#define PE_OPAQUE(vector) static_cast<void>(vector)
#else
#define PE_OPAQUE(vector) asm("" : "+v"(vector))
#endif

// Expands 64 bytes of values. Measured on AMD Zen 5, each by several times: the expansion must not read the memory itself,
// and it waits for the old content of its target even where that is zeroed by the mask, so that the target is zeroed first.
template <ValueType type>
PE_INLINE __m512i expand_row(std::uint64_t bits, const std::uint8_t* values) {
  __m512i packed = _mm512_loadu_si512(values), target = _mm512_setzero_si512();
  PE_OPAQUE(packed);
  PE_OPAQUE(target);
  if constexpr (type == ValueType::kBf16) {
    return _mm512_mask_expand_epi16(target, static_cast<__mmask32>(bits), packed);
  } else {
    return _mm512_mask_expand_epi8(target, static_cast<__mmask64>(bits), packed);
  }
}

// Calls body(row, index of the row within the block) for each row of 64 bytes, in order. Two rows of bf16 share one word of
// the bitmap, so that the address of the second depends on one count and the next pair on one more.
template <ValueType type, typename Body>
PE_INLINE void for_each_row(const Weight& w, std::int64_t block, Body body) {
  const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(type);
  const std::uint8_t* values = w.values + w.offsets[block] * value_bytes(type);
  const std::int64_t rows = w.tiles * kTileRows;
  if constexpr (type == ValueType::kBf16) {
    for (std::int64_t row = 0; row < rows; row += 2, bitmap += 8) {
      const std::uint64_t bits = load64(bitmap);
      const std::uint8_t* second = values + 2 * count_bits(bits & 0xffffffffu);
      body(expand_row<type>(bits, values), row);
      body(expand_row<type>(bits >> 32, second), row + 1);
      values += 2 * count_bits(bits);
    }
  } else {
    for (std::int64_t row = 0; row < rows; ++row, bitmap += 8) {
      const std::uint64_t bits = load64(bitmap);
      body(expand_row<type>(bits, values), row);
      values += count_bits(bits);
    }
  }
}

// An operation multiplies one row of a tile with the activations that belong to it and adds to the 16 sums of a block.

struct Bf16Float {
  static constexpr ValueType kType = ValueType::kBf16;
  using Input = float;
  using Sum = __m512;
  struct Row {
    __m512 even, odd;
  };
  static PE_INLINE Sum zero() { return _mm512_setzero_ps(); }
  static PE_INLINE Row prepare(__m512i row) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(row, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(row, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static PE_INLINE Sum add(Sum sum, const Row& row, const Input* x) {
    sum = _mm512_fmadd_ps(row.even, _mm512_set1_ps(x[0]), sum);
    return _mm512_fmadd_ps(row.odd, _mm512_set1_ps(x[1]), sum);
  }
  static PE_INLINE Sum join(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static PE_INLINE __m512 finish(Sum sum, Sum) { return sum; }
  static PE_INLINE Sum correct(Sum correction, const Row&) { return correction; }
};

struct Int8Float {
  static constexpr ValueType kType = ValueType::kInt8;
  using Input = float;
  using Sum = __m512;
  struct Row {
    __m512 k[4];
  };
  static PE_INLINE Sum zero() { return _mm512_setzero_ps(); }
  // Each byte becomes the top byte of a 32-bit integer, 2^24 times its value.
  static PE_INLINE Row prepare(__m512i row) {
    const __m512i top = _mm512_set1_epi32(static_cast<int>(0xff000000u));
    return {{_mm512_cvtepi32_ps(_mm512_slli_epi32(row, 24)),
             _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_slli_epi32(row, 16), top)),
             _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_slli_epi32(row, 8), top)),
             _mm512_cvtepi32_ps(_mm512_and_si512(row, top))}};
  }
  static PE_INLINE Sum add(Sum sum, const Row& row, const Input* x) {
    sum = _mm512_fmadd_ps(row.k[0], _mm512_set1_ps(x[0]), sum);
    sum = _mm512_fmadd_ps(row.k[1], _mm512_set1_ps(x[1]), sum);
    sum = _mm512_fmadd_ps(row.k[2], _mm512_set1_ps(x[2]), sum);
    return _mm512_fmadd_ps(row.k[3], _mm512_set1_ps(x[3]), sum);
  }
  static PE_INLINE Sum join(Sum a, Sum b) { return _mm512_add_ps(a, b); }
  static PE_INLINE __m512 finish(Sum sum, Sum) {
    return _mm512_mul_ps(sum, _mm512_set1_ps(1.0f / 16777216.0f));  // 2^-24, without rounding
  }
  static PE_INLINE Sum correct(Sum correction, const Row&) { return correction; }
};

// VPDPBUSD multiplies unsigned with signed bytes: the activations enter with 128 added, and 128 times the sum of the weights
// is taken away in the end.
struct Int8Int8 {
  static constexpr ValueType kType = ValueType::kInt8;
  using Input = std::int8_t;
  using Sum = __m512i;
  using Row = __m512i;
  static PE_INLINE Sum zero() { return _mm512_setzero_si512(); }
  static PE_INLINE Row prepare(__m512i row) { return row; }
  static PE_INLINE Sum add(Sum sum, const Row& row, const Input* x) {
    std::int32_t quad;
    std::memcpy(&quad, x, sizeof(quad));
    const std::int32_t shifted = quad ^ static_cast<std::int32_t>(0x80808080u);
    return _mm512_dpbusd_epi32(sum, _mm512_set1_epi32(shifted), row);
  }
  static PE_INLINE Sum join(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static PE_INLINE __m512 finish(Sum sum, Sum correction) { return _mm512_cvtepi32_ps(_mm512_sub_epi32(sum, correction)); }
  static PE_INLINE Sum correct(Sum correction, const Row& row) {
    return _mm512_dpbusd_epi32(correction, _mm512_set1_epi32(static_cast<std::int32_t>(0x80808080u)), row);
  }
};

// One row of activations. Four sums by name hide the latency of the multiplication; gcc keeps no array of them in registers.
template <typename Op>
void multiply_one(const Weight& w, const typename Op::Input* x, std::int64_t first, std::int64_t last, float* sums) {
  constexpr std::int64_t kGroup = group_inputs(Op::kType);
  for (std::int64_t block = first; block < last; ++block) {
    typename Op::Sum a = Op::zero(), b = a, c = a, d = a, correction = a;
    for_each_row<Op::kType>(w, block, [&](__m512i expanded, std::int64_t index) __attribute__((always_inline)) {
      const auto row = Op::prepare(expanded);
      const typename Op::Sum next = Op::add(a, row, x + index * kGroup);
      correction = Op::correct(correction, row);
      a = b;  // the four take turns; the compiler renames them away
      b = c;
      c = d;
      d = next;
    });
    _mm512_store_ps(sums + block * kBlock, Op::finish(Op::join(Op::join(a, b), Op::join(c, d)), correction));
  }
}

// kCount rows of activations share each expanded row of a tile.
template <typename Op, int kCount>
void multiply_group(const Weight& w, const typename Op::Input* x, std::int64_t x_stride, std::int64_t first,
                    std::int64_t last, float* sums, std::int64_t sums_stride) {
  constexpr std::int64_t kGroup = group_inputs(Op::kType);
  for (std::int64_t block = first; block < last; ++block) {
    typename Op::Sum total[kCount], correction = Op::zero();
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) total[m] = Op::zero();
    for_each_row<Op::kType>(w, block, [&](__m512i expanded, std::int64_t index) __attribute__((always_inline)) {
      const auto row = Op::prepare(expanded);
      correction = Op::correct(correction, row);
#pragma GCC unroll 8
      for (int m = 0; m < kCount; ++m) total[m] = Op::add(total[m], row, x + m * x_stride + index * kGroup);
    });
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) {
      _mm512_store_ps(sums + m * sums_stride + block * kBlock, Op::finish(total[m], correction));
    }
  }
}

// Any number of rows, in groups of at most 8 that fit the registers; each group expands the weight anew, which is cheap here.
template <typename Op>
void multiply_rows(const Weight& w, const void* x_void, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                   std::int64_t last, float* sums, std::int64_t sums_stride, void*) {
  const auto* x = static_cast<const typename Op::Input*>(x_void);
  if (rows == 1) {
    multiply_one<Op>(w, x, first, last, sums);
    return;
  }
  // Block by block, so that the groups after the first find the block in the cache.
  const std::int64_t groups = (rows + 7) / 8;
  for (std::int64_t block = first; block < last; ++block) {
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::int64_t begin = rows * group / groups;
      const auto* inputs = x + begin * x_stride;
      float* out = sums + begin * sums_stride;
      switch (rows * (group + 1) / groups - begin) {
        case 1: multiply_group<Op, 1>(w, inputs, x_stride, block, block + 1, out, sums_stride); break;
        case 2: multiply_group<Op, 2>(w, inputs, x_stride, block, block + 1, out, sums_stride); break;
        case 3: multiply_group<Op, 3>(w, inputs, x_stride, block, block + 1, out, sums_stride); break;
        case 4: multiply_group<Op, 4>(w, inputs, x_stride, block, block + 1, out, sums_stride); break;
        case 5: multiply_group<Op, 5>(w, inputs, x_stride, block, block + 1, out, sums_stride); break;
        case 6: multiply_group<Op, 6>(w, inputs, x_stride, block, block + 1, out, sums_stride); break;
        case 7: multiply_group<Op, 7>(w, inputs, x_stride, block, block + 1, out, sums_stride); break;
        default: multiply_group<Op, 8>(w, inputs, x_stride, block, block + 1, out, sums_stride); break;
      }
    }
  }
}

}  // namespace
}  // namespace peft_elastic
