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

// AVX2 and AVX512 from SIMDe, and what it lacks: the expansions, dot products where it has none, and the AMX tiles. The tiles
// follow the pseudocode of Intel's Software Developer's Manual (TDPBF16PS, TDPBSSD, TILELOADD, TILESTORED) and check what the
// processor would fault on.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace software_model {

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "software model: %s\n", what);
  std::abort();
}

template <typename T>
inline simde__m512i expand(simde__m512i target, std::uint64_t mask, simde__m512i source) {
  T from[64 / sizeof(T)], to[64 / sizeof(T)];
  std::memcpy(from, &source, 64);
  std::memcpy(to, &target, 64);
  for (std::size_t i = 0, next = 0; i < 64 / sizeof(T); ++i) to[i] = (mask >> i) & 1 ? from[next++] : to[i];
  std::memcpy(&target, to, 64);
  return target;
}

// Unsigned bytes to 16 or 32 bits each.
template <typename To, typename Source>
inline simde__m512i widen_bytes(Source source) {
  std::uint8_t from[sizeof(source)];
  To to[64 / sizeof(To)];
  static_assert(sizeof(from) == 64 / sizeof(To), "as many as there are");
  std::memcpy(from, &source, sizeof(from));
  for (std::size_t i = 0; i < sizeof(from); ++i) to[i] = from[i];
  simde__m512i target;
  std::memcpy(&target, to, 64);
  return target;
}

inline float widen(std::uint16_t bits) {
  const std::uint32_t word = static_cast<std::uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
}

inline simde__m512 dot_bf16(simde__m512 sum, simde__m512i a, simde__m512i b) {
  float total[16];
  std::uint16_t x[32], y[32];
  std::memcpy(total, &sum, 64);
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  for (int i = 0; i < 16; ++i) {
    total[i] = std::fma(widen(x[2 * i + 1]), widen(y[2 * i + 1]), total[i]);
    total[i] = std::fma(widen(x[2 * i]), widen(y[2 * i]), total[i]);
  }
  std::memcpy(&sum, total, 64);
  return sum;
}

inline simde__m512i dot_int8(simde__m512i sum, simde__m512i a, simde__m512i b) {
  std::int32_t total[16];
  std::uint8_t x[64];
  std::int8_t y[64];
  std::memcpy(total, &sum, 64);
  std::memcpy(x, &a, 64);
  std::memcpy(y, &b, 64);
  for (int i = 0; i < 64; ++i) total[i / 4] += static_cast<std::int32_t>(x[i]) * y[i];
  std::memcpy(&sum, total, 64);
  return sum;
}

struct Tiles {
  bool configured = false;
  int rows[8], bytes[8];
  std::uint8_t data[8][16][64];

  void load_config(const void* memory) {
    std::uint8_t config[64];
    std::memcpy(config, memory, 64);
    require(config[0] == 1, "palette 1 is the only one");
    for (int i = 1; i < 16; ++i) require(config[i] == 0, "reserved bytes of the configuration are zero");
    for (int tile = 0; tile < 8; ++tile) {
      rows[tile] = config[48 + tile];
      bytes[tile] = config[16 + 2 * tile] | config[17 + 2 * tile] << 8;
      require(rows[tile] <= 16 && bytes[tile] <= 64 && (rows[tile] == 0) == (bytes[tile] == 0), "a tile is too large");
    }

    for (auto& tile : data) std::memset(tile, 0, sizeof(tile));
    configured = true;
  }
  void check(int tile) const { require(configured && rows[tile] > 0, "the tile is not configured"); }
  void release() { configured = false; }
  void zero(int tile) {
    check(tile);
    std::memset(data[tile], 0, sizeof(data[tile]));
  }
  void load(int tile, const void* memory, std::int64_t stride) {
    zero(tile);
    for (int r = 0; r < rows[tile]; ++r) {
      std::memcpy(data[tile][r], static_cast<const char*>(memory) + r * stride, static_cast<std::size_t>(bytes[tile]));
    }
  }
  void store(int tile, void* memory, std::int64_t stride) const {
    check(tile);
    for (int r = 0; r < rows[tile]; ++r) {
      std::memcpy(static_cast<char*>(memory) + r * stride, data[tile][r], static_cast<std::size_t>(bytes[tile]));
    }
  }
  void check_shapes(int c, int a, int b) const {
    check(a);
    check(b);
    check(c);
    require(rows[c] == rows[a] && bytes[c] == bytes[b] && bytes[a] == 4 * rows[b], "the shapes of the tiles disagree");
    require(a != b && b != c && a != c, "the tiles of a product are distinct");
  }
  template <typename Sum, typename Value, int kGroup, typename Widen>
  void dot(int c, int a, int b, Widen widen_value) {
    check_shapes(c, a, b);
    for (int m = 0; m < rows[c]; ++m) {
      for (int k = 0; k < bytes[a] / 4; ++k) {
        for (int n = 0; n < bytes[c] / 4; ++n) {
          Sum total;
          std::memcpy(&total, data[c][m] + 4 * n, 4);
          for (int i = 0; i < kGroup; ++i) {
            Value x, y;
            std::memcpy(&x, data[a][m] + 4 * k + i * sizeof(Value), sizeof(Value));
            std::memcpy(&y, data[b][k] + 4 * n + i * sizeof(Value), sizeof(Value));
            total += static_cast<Sum>(widen_value(x)) * static_cast<Sum>(widen_value(y));
          }
          std::memcpy(data[c][m] + 4 * n, &total, 4);
        }
      }
    }
  }
};

inline Tiles& tiles() {
  static thread_local Tiles state;
  return state;
}

}  // namespace software_model

#undef _mm512_cvtepu8_epi16
#undef _mm512_cvtepu8_epi32
#undef _mm512_mask_expand_epi16
#undef _mm512_mask_expand_epi8
#undef _mm512_dpbf16_ps
#undef _mm512_dpbusd_epi32
#define _mm512_cvtepu8_epi16(source) software_model::widen_bytes<std::uint16_t>(source)
#define _mm512_cvtepu8_epi32(source) software_model::widen_bytes<std::uint32_t>(source)
#define _mm512_mask_expand_epi16(target, mask, source) software_model::expand<std::uint16_t>(target, mask, source)
#define _mm512_mask_expand_epi8(target, mask, source) software_model::expand<std::uint8_t>(target, mask, source)
#define _mm512_dpbf16_ps(sum, a, b) software_model::dot_bf16(sum, a, b)
#define _mm512_dpbusd_epi32(sum, a, b) software_model::dot_int8(sum, a, b)
#define _mm_popcnt_u64(bits) __builtin_popcountll(bits)
#define __m512bh simde__m512i
#define _tile_loadconfig(p) software_model::tiles().load_config(p)
#define _tile_release() software_model::tiles().release()
#define _tile_zero(t) software_model::tiles().zero(t)
#define _tile_loadd(t, p, s) software_model::tiles().load(t, p, s)
#define _tile_stored(t, p, s) software_model::tiles().store(t, p, s)
#define _tile_dpbf16ps(c, a, b) software_model::tiles().dot<float, std::uint16_t, 2>(c, a, b, software_model::widen)
#define _tile_dpbssd(c, a, b) \
  software_model::tiles().dot<std::int32_t, std::int8_t, 4>(c, a, b, [](std::int8_t v) { return static_cast<int>(v); })
