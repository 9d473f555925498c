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

// Bitmaps. Everything is inlined into its caller, and so compiled for the caller's instructions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "floats.h"

namespace peft_elastic {

PE_INLINE std::uint64_t load_bits(const std::uint8_t* p, std::int64_t bytes) {
  std::uint64_t bits = 0;
  for (std::int64_t i = 0; i < bytes; ++i) bits |= static_cast<std::uint64_t>(p[i]) << (8 * i);
  return bits;
}

PE_INLINE int population_count(std::uint64_t bits) {
  bits -= (bits >> 1) & 0x5555555555555555u;
  bits = (bits & 0x3333333333333333u) + ((bits >> 2) & 0x3333333333333333u);
  bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<int>((bits * 0x0101010101010101u) >> 56);
}

PE_INLINE std::int64_t count_bits(const std::uint8_t* p, std::size_t bytes) {
  std::int64_t count = 0;
  std::size_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    std::uint64_t bits;
    std::memcpy(&bits, p + i, 8);
    count += population_count(bits);
  }
  for (; i < bytes; ++i) count += population_count(p[i]);
  return count;
}

PE_INLINE int lowest_bit(std::uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_ctzll(bits);
#else
  int bit = 0;
  while (!((bits >> bit) & 1)) ++bit;
  return bit;
#endif
}

}  // namespace peft_elastic
