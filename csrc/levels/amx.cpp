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

// Intel AMX (from Sapphire Rapids): expands tiles to the L1 cache and multiplies them with up to 32 rows of activations.

#include "kernels.h"

#if (defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__AVX512VBMI2__) && \
     defined(__AVX512BF16__)) ||                                                                          \
    defined(PEFT_ELASTIC_SOFTWARE_MODEL)

#include "levels/avx512_bf16.h"

// The intrinsics say nothing to gcc about the memory that they read.
#define PE_COMPILER_BARRIER() __asm__ volatile("" ::: "memory")

namespace peft_elastic {
namespace {

// Tiles 0 and 1: sums of the first 16 rows of activations for two blocks; 2 and 3: of the rows behind them. 4 and 5: activations
// of the first 16 rows and of the rows behind. 6 and 7: weights of the two blocks.
struct alignas(64) TileConfig {
  std::uint8_t palette, start_row, reserved[14];
  std::uint16_t bytes[16];
  std::uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as LDTILECFG reads it");

struct TileConfigs {
  TileConfig of[kMaxRows + 1];
};

constexpr TileConfigs make_configs() {
  TileConfigs configs{};
  for (int rows = 1; rows <= kMaxRows; ++rows) {
    TileConfig& config = configs.of[rows];
    config.palette = 1;
    const int head = rows < 16 ? rows : 16, tail = rows - head;
    const int tile_rows[8] = {head, head, tail, tail, head, tail, 16, 16};
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = static_cast<std::uint8_t>(tile_rows[tile]);
      config.bytes[tile] = tile_rows[tile] ? 64 : 0;
    }
  }
  return configs;
}

constexpr TileConfigs kConfigs = make_configs();

template <ValueType type>
PE_INLINE void expand_tile(RowReader<type>& reader, std::uint8_t* target) {
  for (int row = 0; row < kTileRows; row += 2, target += 128) {
    __m512i first, second;
    reader.next(first, second);
    _mm512_store_si512(target, first);
    _mm512_store_si512(target + 64, second);
  }
}

template <ValueType type>
PE_INLINE void load_activations(const std::uint8_t* x, std::int64_t stride, bool tail) {
  _tile_loadd(4, x, stride);
  if (tail) _tile_loadd(5, x + 16 * stride, stride);
}

// The sums of two blocks (one, if there is no second), left in tiles 0 to 3.
template <ValueType type>
PE_INLINE void accumulate(const Weight& w, const std::uint8_t* x, std::int64_t stride, bool tail, std::int64_t block, bool pair,
                          std::uint8_t* scratch) {
  _tile_zero(0);
  _tile_zero(1);
  if (tail) {
    _tile_zero(2);
    _tile_zero(3);
  }
  RowReader<type> left(w, block), right(w, pair ? block + 1 : block);
  for (std::int64_t tile = 0; tile < w.tiles; ++tile, x += 64) {
    std::uint8_t* const expanded = scratch + (tile & 1) * 2048;  // so that a tile is not overwritten while it is loaded
    expand_tile(left, expanded);
    if (pair) expand_tile(right, expanded + 1024);
    PE_COMPILER_BARRIER();
    load_activations<type>(x, stride, tail);
    _tile_loadd(6, expanded, 64);
    if constexpr (type == ValueType::kBf16) {
      _tile_dpbf16ps(0, 4, 6);
      if (tail) _tile_dpbf16ps(2, 5, 6);
    } else {
      _tile_dpbssd(0, 4, 6);
      if (tail) _tile_dpbssd(2, 5, 6);
    }
    if (!pair) continue;
    _tile_loadd(7, expanded + 1024, 64);
    if constexpr (type == ValueType::kBf16) {
      _tile_dpbf16ps(1, 4, 7);
      if (tail) _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_dpbssd(1, 4, 7);
      if (tail) _tile_dpbssd(3, 5, 7);
    }
  }
}

void to_float(const std::int32_t* source, std::int64_t rows, float* sums, std::int64_t sums_stride) {
  for (std::int64_t m = 0; m < rows; ++m) {
    _mm512_store_ps(sums + m * sums_stride, _mm512_cvtepi32_ps(_mm512_load_si512(source + m * kBlock)));
  }
}

template <ValueType type>
void multiply_tiles(const Weight& w, const void* x_void, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
                    std::int64_t last, float* sums, std::int64_t sums_stride, void* scratch_void) {
  const auto* x = static_cast<const std::uint8_t*>(x_void);
  auto* scratch = static_cast<std::uint8_t*>(scratch_void);
  const std::int64_t stride = x_stride * value_bytes(type);
  const bool tail = rows > 16;
  PE_COMPILER_BARRIER();
  _tile_loadconfig(&kConfigs.of[rows]);
  for (std::int64_t block = first; block < last; block += 2) {
    const bool pair = block + 1 < last;
    accumulate<type>(w, x, stride, tail, block, pair, scratch);
    float* const out = sums + block * kBlock;
    if constexpr (type == ValueType::kBf16) {
      const std::int64_t out_stride = sums_stride * static_cast<std::int64_t>(sizeof(float));
      _tile_stored(0, out, out_stride);
      if (pair) _tile_stored(1, out + kBlock, out_stride);
      if (tail) _tile_stored(2, out + 16 * sums_stride, out_stride);
      if (tail && pair) _tile_stored(3, out + 16 * sums_stride + kBlock, out_stride);
      PE_COMPILER_BARRIER();
    } else {
      auto* const whole = reinterpret_cast<std::int32_t*>(scratch + 4096);  // [32][16] for each of the two blocks
      _tile_stored(0, whole, 64);
      if (pair) _tile_stored(1, whole + 512, 64);
      if (tail) _tile_stored(2, whole + 256, 64);
      if (tail && pair) _tile_stored(3, whole + 768, 64);
      PE_COMPILER_BARRIER();
      to_float(whole, rows, out, sums_stride);
      if (pair) to_float(whole + 512, rows, out + kBlock, sums_stride);
    }
  }
  _tile_release();
}

// Below this many rows most of a tile would be empty, and expanding to the cache costs more than it saves: reasoned, not
// measured, as no machine with AMX was at hand.
constexpr std::int64_t kMinTileRows = 4;

void bf16_bf16(const Weight& w, const void* x, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
               std::int64_t last, float* sums, std::int64_t sums_stride, void* scratch) {
  const auto kernel = rows < kMinTileRows ? &multiply_rows<Bf16Bf16> : &multiply_tiles<ValueType::kBf16>;
  kernel(w, x, x_stride, rows, first, last, sums, sums_stride, scratch);
}

void int8_int8(const Weight& w, const void* x, std::int64_t x_stride, std::int64_t rows, std::int64_t first,
               std::int64_t last, float* sums, std::int64_t sums_stride, void* scratch) {
  const auto kernel = rows < kMinTileRows ? &multiply_rows<Int8Int8> : &multiply_tiles<ValueType::kInt8>;
  kernel(w, x, x_stride, rows, first, last, sums, sums_stride, scratch);
}

}  // namespace

const Kernels* amx_kernels() {
  static const Kernels kKernels = {
      {&multiply_rows<Bf16Float>, &multiply_rows<Int8Float>,
       avx512_kernels()->floats[index_of(ValueType::kInt4)],  // needs nothing that this level adds
       avx512_kernels()->floats[index_of(ValueType::kInt4Dense)]},
      {&bf16_bf16, &int8_int8},
      avx512_kernels()->attend,
      avx512_kernels()->dense,
      avx512_kernels()->fill,
  };
  return &kKernels;
}

}  // namespace peft_elastic

#else

namespace peft_elastic {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace peft_elastic

#endif
