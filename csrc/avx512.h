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
#include <type_traits>

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

// A mask register is filled faster from memory than from the general register that counts the bits, which gcc would choose.
template <ValueType type>
PE_INLINE auto load_mask(const std::uint8_t* bitmap) {
  std::conditional_t<type == ValueType::kBf16, __mmask32, __mmask64> mask;
#if defined(PEFT_ELASTIC_SOFTWARE_MODEL)
  std::memcpy(&mask, bitmap, sizeof(mask));
#else
  const auto& source = *reinterpret_cast<const std::uint8_t(*)[sizeof(mask)]>(bitmap);
  if constexpr (type == ValueType::kBf16) {
    asm("kmovd %1, %0" : "=k"(mask) : "m"(source));
  } else {
    asm("kmovq %1, %0" : "=k"(mask) : "m"(source));
  }
#endif
  return mask;
}

// Expands 64 bytes of values. Measured on AMD Zen 5, each by several times: the expansion must not read the memory itself,
// and it waits for the old content of its target even where that is zeroed by the mask, so that the target is zeroed first.
template <ValueType type>
PE_INLINE __m512i expand_row(const std::uint8_t* bitmap, const std::uint8_t* values) {
  __m512i packed = _mm512_loadu_si512(values), target = _mm512_setzero_si512();
  PE_OPAQUE(packed);
  PE_OPAQUE(target);
  if constexpr (type == ValueType::kBf16) {
    return _mm512_mask_expand_epi16(target, load_mask<type>(bitmap), packed);
  } else {
    return _mm512_mask_expand_epi8(target, load_mask<type>(bitmap), packed);
  }
}

// How far ahead of their use the values are fetched, in bytes: measured on AMD Zen 5, where 8 KiB is 1.5 times as fast as
// the processor's own prefetching, and less than 4 KiB is slower than none. The bitmap is left to the processor.
constexpr std::int64_t kPrefetchDistance = 8192;

// Reads the weights of a block row by row.
template <ValueType type>
class RowReader {
 public:
  PE_INLINE RowReader(const Weight& w, std::int64_t block)
      : bitmap_(w.bitmaps + block * w.tiles * tile_bitmap_bytes(type)),
        values_(w.values + w.offsets[block] * value_bytes(type)) {}

  // Two rows at a time: the addresses of a pair wait for one addition alone.
  PE_INLINE void next(__m512i& first, __m512i& second) {
    constexpr int kRowBytes = tile_bitmap_bytes(type) / kTileRows;
    _mm_prefetch(reinterpret_cast<const char*>(values_) + kPrefetchDistance, _MM_HINT_T0);
    std::int64_t in_first, in_both;
    if constexpr (type == ValueType::kBf16) {
      const std::uint64_t bits = load64(bitmap_);
      in_first = 2 * count_bits(bits & 0xffffffffu);
      in_both = 2 * count_bits(bits);
    } else {
      in_first = count_bits(load64(bitmap_));
      in_both = in_first + count_bits(load64(bitmap_ + kRowBytes));
    }
    first = expand_row<type>(bitmap_, values_);
    second = expand_row<type>(bitmap_ + kRowBytes, values_ + in_first);
    values_ += in_both;
    bitmap_ += 2 * kRowBytes;
  }

 private:
  const std::uint8_t* bitmap_;
  const std::uint8_t* values_;
};

// An operation multiplies one row of a tile with the activations that belong to it and adds to the 16 sums of a block, which
// begin with start(offset): an offset of the row of activations (see offset_of).

struct FloatSum {
  __m512 low, high;  // two, so that the multiplications of a row do not all wait for each other
};

struct Bf16Float {
  static constexpr ValueType kType = ValueType::kBf16;
  using Input = float;
  using Sum = FloatSum;
  struct Row {
    __m512 even, odd;
  };
  static std::int32_t offset_of(const Input*, std::int64_t) { return 0; }
  static PE_INLINE Sum start(std::int32_t) { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
  static PE_INLINE Row prepare(__m512i row) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(row, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(row, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static PE_INLINE Sum add(Sum sum, const Row& row, const Input* x) {
    sum.low = _mm512_fmadd_ps(row.even, _mm512_set1_ps(x[0]), sum.low);
    sum.high = _mm512_fmadd_ps(row.odd, _mm512_set1_ps(x[1]), sum.high);
    return sum;
  }
  static PE_INLINE Sum join(Sum a, Sum b) { return {_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)}; }
  static PE_INLINE __m512 finish(Sum sum) { return _mm512_add_ps(sum.low, sum.high); }
};

struct Int8Float {
  static constexpr ValueType kType = ValueType::kInt8;
  using Input = float;
  using Sum = FloatSum;
  struct Row {
    __m512 k0, k1, k2, k3;
  };
  static std::int32_t offset_of(const Input*, std::int64_t) { return 0; }
  static PE_INLINE Sum start(std::int32_t) { return {_mm512_setzero_ps(), _mm512_setzero_ps()}; }
  // Each byte becomes the top byte of a 32-bit integer, 2^24 times its value. A shuffle does that with less work for the
  // units that also expand and convert than a shift and a mask.
  static PE_INLINE __m512 widen(__m512i row, int byte) {
    const __m128i control = _mm_add_epi8(_mm_set1_epi32(byte << 24), _mm_setr_epi32(0x00808080, 0x04808080, 0x08808080, 0x0c808080));
    return _mm512_cvtepi32_ps(_mm512_shuffle_epi8(row, _mm512_broadcast_i32x4(control)));
  }
  static PE_INLINE Row prepare(__m512i row) { return {widen(row, 0), widen(row, 1), widen(row, 2), widen(row, 3)}; }
  static PE_INLINE Sum add(Sum sum, const Row& row, const Input* x) {
    sum.low = _mm512_fmadd_ps(row.k0, _mm512_set1_ps(x[0]), sum.low);
    sum.high = _mm512_fmadd_ps(row.k1, _mm512_set1_ps(x[1]), sum.high);
    sum.low = _mm512_fmadd_ps(row.k2, _mm512_set1_ps(x[2]), sum.low);
    sum.high = _mm512_fmadd_ps(row.k3, _mm512_set1_ps(x[3]), sum.high);
    return sum;
  }
  static PE_INLINE Sum join(Sum a, Sum b) { return {_mm512_add_ps(a.low, b.low), _mm512_add_ps(a.high, b.high)}; }
  static PE_INLINE __m512 finish(Sum sum) {
    return _mm512_mul_ps(_mm512_add_ps(sum.low, sum.high), _mm512_set1_ps(1.0f / 16777216.0f));  // 2^-24, without rounding
  }
};

// VPDPBUSD multiplies unsigned with signed bytes: the weights enter with 128 added, and the sums begin with -128 times the
// sum of the activations. Whatever wraps around on the way comes back, as the result fits.
struct Int8Int8 {
  static constexpr ValueType kType = ValueType::kInt8;
  using Input = std::int8_t;
  using Sum = __m512i;
  using Row = __m512i;
  static std::int32_t offset_of(const Input* x, std::int64_t width) {
    std::uint32_t sum = 0;
    for (std::int64_t k = 0; k < width; ++k) sum += static_cast<std::uint32_t>(static_cast<std::int32_t>(x[k]));
    return static_cast<std::int32_t>(0u - 128u * sum);
  }
  static PE_INLINE Sum start(std::int32_t offset) { return _mm512_set1_epi32(offset); }
  static PE_INLINE Row prepare(__m512i row) {
    return _mm512_xor_si512(row, _mm512_set1_epi32(static_cast<std::int32_t>(0x80808080u)));
  }
  static PE_INLINE Sum add(Sum sum, const Row& row, const Input* x) {
    std::int32_t quad;
    std::memcpy(&quad, x, sizeof(quad));
    return _mm512_dpbusd_epi32(sum, row, _mm512_set1_epi32(quad));
  }
  static PE_INLINE Sum join(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
  static PE_INLINE __m512 finish(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

// One row of activations. Four sums by name hide the latency of the multiplication.
template <typename Op>
void multiply_one(const Weight& w, const typename Op::Input* x, std::int64_t first, std::int64_t last, float* sums) {
  constexpr std::int64_t kGroup = group_inputs(Op::kType);
  const std::int64_t rows = w.tiles * kTileRows;
  const std::int32_t offset = Op::offset_of(x, rows * kGroup);
  for (std::int64_t block = first; block < last; ++block) {
    RowReader<Op::kType> reader(w, block);
    typename Op::Sum a = Op::start(offset), b = Op::start(0), c = b, d = b;
    const typename Op::Input* inputs = x;
    for (std::int64_t row = 0; row < rows; row += 4, inputs += 4 * kGroup) {
      __m512i row_a, row_b, row_c, row_d;
      reader.next(row_a, row_b);
      reader.next(row_c, row_d);
      a = Op::add(a, Op::prepare(row_a), inputs);
      b = Op::add(b, Op::prepare(row_b), inputs + kGroup);
      c = Op::add(c, Op::prepare(row_c), inputs + 2 * kGroup);
      d = Op::add(d, Op::prepare(row_d), inputs + 3 * kGroup);
    }
    _mm512_store_ps(sums + block * kBlock, Op::finish(Op::join(Op::join(a, b), Op::join(c, d))));
  }
}

// kCount rows of activations share each expanded row of a tile. Few rows keep two sums each, one for every other row of a
// tile, again for the latency.
template <typename Op, int kCount>
void multiply_group(const Weight& w, const typename Op::Input* x, std::int64_t x_stride, std::int64_t first,
                    std::int64_t last, float* sums, std::int64_t sums_stride, const std::int32_t* offsets) {
  constexpr std::int64_t kGroup = group_inputs(Op::kType);
  constexpr bool kTwoSums = kCount <= 4;
  for (std::int64_t block = first; block < last; ++block) {
    typename Op::Sum total[kCount], other[kTwoSums ? kCount : 1];
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) {
      total[m] = Op::start(offsets[m]);
      if constexpr (kTwoSums) other[m] = Op::start(0);
    }
    RowReader<Op::kType> reader(w, block);
    const typename Op::Input* inputs = x;
    for (std::int64_t row = 0; row < w.tiles * kTileRows; row += 2, inputs += 2 * kGroup) {
      __m512i first_row, second_row;
      reader.next(first_row, second_row);
      const auto row_a = Op::prepare(first_row);
#pragma GCC unroll 8
      for (int m = 0; m < kCount; ++m) total[m] = Op::add(total[m], row_a, inputs + m * x_stride);
      const auto row_b = Op::prepare(second_row);
#pragma GCC unroll 8
      for (int m = 0; m < kCount; ++m) {
        auto& sum = kTwoSums ? other[m] : total[m];
        sum = Op::add(sum, row_b, inputs + m * x_stride + kGroup);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) {
      const auto sum = kTwoSums ? Op::join(total[m], other[m]) : total[m];
      _mm512_store_ps(sums + m * sums_stride + block * kBlock, Op::finish(sum));
    }
  }
}

// Any number of rows, in groups of at most 8 that fit the registers; each group expands the weight anew, which is cheap here.
template <typename Op>
void multiply_rows(const Weight& w, const void* x_void, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                   std::int64_t last, float* sums, std::int64_t sums_stride, void* scratch) {
  const auto* x = static_cast<const typename Op::Input*>(x_void);
  if (rows == 1) {
    multiply_one<Op>(w, x, first, last, sums);
    return;
  }
  auto* const offsets = static_cast<std::int32_t*>(scratch);
  for (std::int64_t m = 0; m < rows; ++m) {
    offsets[m] = Op::offset_of(x + m * x_stride, w.tiles * tile_inputs(Op::kType));
  }
  // Block by block, so that the groups after the first find the block in the cache.
  const std::int64_t groups = (rows + 7) / 8;
  for (std::int64_t block = first; block < last; ++block) {
    for (std::int64_t group = 0; group < groups; ++group) {
      const std::int64_t begin = rows * group / groups;
      const auto* inputs = x + begin * x_stride;
      float* out = sums + begin * sums_stride;
      switch (rows * (group + 1) / groups - begin) {
        case 1: multiply_group<Op, 1>(w, inputs, x_stride, block, block + 1, out, sums_stride, offsets + begin); break;
        case 2: multiply_group<Op, 2>(w, inputs, x_stride, block, block + 1, out, sums_stride, offsets + begin); break;
        case 3: multiply_group<Op, 3>(w, inputs, x_stride, block, block + 1, out, sums_stride, offsets + begin); break;
        case 4: multiply_group<Op, 4>(w, inputs, x_stride, block, block + 1, out, sums_stride, offsets + begin); break;
        case 5: multiply_group<Op, 5>(w, inputs, x_stride, block, block + 1, out, sums_stride, offsets + begin); break;
        case 6: multiply_group<Op, 6>(w, inputs, x_stride, block, block + 1, out, sums_stride, offsets + begin); break;
        case 7: multiply_group<Op, 7>(w, inputs, x_stride, block, block + 1, out, sums_stride, offsets + begin); break;
        default: multiply_group<Op, 8>(w, inputs, x_stride, block, block + 1, out, sums_stride, offsets + begin); break;
      }
    }
  }
}

}  // namespace
}  // namespace peft_elastic
