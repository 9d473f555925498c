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

// What the types have in common whose values are whole bytes and whose zeros are not stored.
#pragma once

#include <cstdint>
#include <cstring>

#include "bits.h"
#include "values/layout.h"

namespace peft_elastic {

template <typename V, typename ValueOf>
struct PlainValues {
  using Value = ValueOf;
  static constexpr Value kNone = 0;
  static constexpr bool kWholeBytes = true;

  // On disk.
  static std::int64_t bytes_of(std::int64_t count) { return count * static_cast<std::int64_t>(sizeof(Value)); }
  static Value load(const std::uint8_t* values, std::int64_t index) {
    Value value;  // from memory that may not be aligned
    std::memcpy(&value, values + bytes_of(index), sizeof(value));
    return value;
  }
  static void store(std::uint8_t* values, std::int64_t index, Value value) {
    std::memcpy(values + bytes_of(index), &value, sizeof(value));
  }

  // In memory.
  static std::int64_t count_of(const std::uint8_t* bitmap, std::int64_t rows) {
    return count_bits(bitmap, static_cast<std::size_t>(rows * V::kLayout.tile_bitmap_bytes / kTileRows));
  }
  static bool fits(std::int64_t nonzeros, std::int64_t count, std::int64_t) { return count == nonzeros; }
  static std::int64_t compress_row(const Value* row, std::int64_t width, std::uint64_t& bits, std::uint8_t* bytes) {
    std::int64_t count = 0;
    int bit = 0;
    bits = 0;
    for (int n = 0; n < kBlock; ++n, row += width) {
      for (int k = 0; k < V::kLayout.group_inputs; ++k, ++bit) {
        const bool stored = V::is_stored(row[k]);
        store(bytes, count, row[k]);
        count += stored;
        bits |= static_cast<std::uint64_t>(stored) << bit;
      }
    }
    return bytes_of(count);
  }
  static const std::uint8_t* expand_row(std::uint64_t bits, const std::uint8_t* values, Value* row) {
    for (; bits; bits &= bits - 1, values += sizeof(Value)) std::memcpy(row + lowest_bit(bits), values, sizeof(Value));
    return values;
  }
};

}  // namespace peft_elastic
