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

// Where the sections of a packed weight lie, and what the two packers (pack.cpp, pack_int4.cpp) share.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "format.h"

namespace peft_elastic {

constexpr char kMagic[8] = {'P', 'E', 'F', 'T', 'E', 'L', 'S', '1'};

[[noreturn]] inline void fail(const std::string& message) { throw std::invalid_argument(message); }

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// What a header says of a weight.
struct Shape {
  ValueType type;
  std::int64_t out_features, in_features, nonzeros;
  std::int64_t value_count;     // items in the section of the values
  std::int64_t group_size = 0;  // int4 only
  bool has_order = false;
};

struct Layout {
  std::int64_t blocks, tiles, group_count;
  std::size_t offsets_at, bitmaps_at, groups_at, order_at, values_at, total;
};

// Throws std::invalid_argument if the numbers are out of range or do not fit together.
Layout layout_of(const Shape& shape);

// Writes the header, and zeros between the sections.
void write_header(const Shape& shape, const Layout& layout, std::uint8_t* packed);

inline std::uint64_t load_bits(const std::uint8_t* p, std::int64_t bytes) {
  std::uint64_t bits = 0;
  for (std::int64_t i = 0; i < bytes; ++i) bits |= static_cast<std::uint64_t>(p[i]) << (8 * i);
  return bits;
}

inline int population_count(std::uint64_t bits) {
  bits -= (bits >> 1) & 0x5555555555555555u;
  bits = (bits & 0x3333333333333333u) + ((bits >> 2) & 0x3333333333333333u);
  bits = (bits + (bits >> 4)) & 0x0f0f0f0f0f0f0f0fu;
  return static_cast<int>((bits * 0x0101010101010101u) >> 56);
}

inline std::int64_t count_bits(const std::uint8_t* p, std::size_t bytes) {
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

inline int lowest_bit(std::uint64_t bits) {
#if defined(__GNUC__)
  return __builtin_ctzll(bits);
#else
  int bit = 0;
  while (!((bits >> bit) & 1)) ++bit;
  return bit;
#endif
}

// Throws if a bit of a bitmap stands for a place outside of the weight.
void check_bitmap_edges(const Weight& weight);

// Of a weight whose header and offsets are in order: check_contents in pack.h.
void check_int4_contents(const Weight& weight);

}  // namespace peft_elastic
