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

#pragma once

#include <cstdint>
#include <cstring>

#include "bits.h"
#include "values/layout.h"

namespace peft_elastic {

constexpr std::int64_t kInt4DenseRowBytes = 32;

// weight = scale (q - zero), q and zero 0 .. 15. Expanded, a value is its q; -1 where none is stored.
struct Int4Values {
  using Value = std::int8_t;
  static constexpr Value kNone = -1;
  static constexpr bool kWholeBytes = false;

  static bool is_stored(Value value) { return value >= 0; }

  // On disk: two to a byte, the first one low.
  static std::int64_t bytes_of(std::int64_t count) { return (count + 1) / 2; }
  static Value load(const std::uint8_t* values, std::int64_t index) {
    return static_cast<Value>(values[index / 2] >> (index % 2 * 4) & 0xf);
  }
  static void store(std::uint8_t* values, std::int64_t index, Value value) {
    std::uint8_t& byte = values[index / 2];  // the first one clears what is above it
    byte = static_cast<std::uint8_t>(index % 2 ? byte | value << 4 : value);
  }
};

// Of each row of a tile the stored q, padded to a whole byte.
struct Int4 : Int4Values {
  static constexpr ValueType kType = ValueType::kInt4;
  static constexpr ValueLayout kLayout = {"int4", 1, 64, 4, 128, true, false};

  static std::int64_t count_of(const std::uint8_t* bitmap, std::int64_t rows) {
    std::int64_t bytes = 0;
    for (std::int64_t row = 0; row < rows; ++row) bytes += bytes_of(population_count(load_bits(bitmap + row * 8, 8)));
    return bytes;
  }
  // A row has a byte for each two of its nonzeros, the last one of which may be alone.
  static bool fits(std::int64_t nonzeros, std::int64_t count, std::int64_t rows) {
    return bytes_of(nonzeros) <= count && count <= bytes_of(nonzeros) + rows;
  }
  static std::int64_t compress_row(const Value* row, std::int64_t width, std::uint64_t& bits, std::uint8_t* bytes) {
    Value kept[64 + 1];
    std::int64_t count = 0;
    bits = 0;
    for (int i = 0; i < 64; ++i) {
      const Value value = row[i / 4 * width + i % 4];
      kept[count] = value;
      count += is_stored(value);
      bits |= static_cast<std::uint64_t>(is_stored(value)) << i;
    }
    kept[count] = 0;
    for (std::int64_t i = 0; i < bytes_of(count); ++i) bytes[i] = static_cast<std::uint8_t>(kept[2 * i] | kept[2 * i + 1] << 4);
    return bytes_of(count);
  }
  static const std::uint8_t* expand_row(std::uint64_t bits, const std::uint8_t* values, Value* row) {
    std::int64_t count = 0;
    for (; bits; bits &= bits - 1) row[lowest_bit(bits)] = load(values, count++);
    return values + bytes_of(count);
  }
};

// Every q, without a bitmap: byte j of a row holds the values j (low) and 32 + j (high).
struct Int4Dense : Int4Values {
  static constexpr ValueType kType = ValueType::kInt4Dense;
  static constexpr ValueLayout kLayout = {"int4_dense", 1, 64, 4, 0, true, false};

  static std::int64_t count_of(const std::uint8_t*, std::int64_t rows) { return rows * kInt4DenseRowBytes; }
  static bool fits(std::int64_t, std::int64_t count, std::int64_t rows) { return count == rows * kInt4DenseRowBytes; }
  static std::int64_t compress_row(const Value* row, std::int64_t width, std::uint64_t&, std::uint8_t* bytes) {
    const auto four_of = [row, width](int n) {  // 0 where none is stored
      std::uint32_t codes;
      std::memcpy(&codes, row + n * width, sizeof(codes));
      return codes & ~(((codes >> 7) & 0x01010101u) * 0xffu);
    };
    for (int n = 0; n < 8; ++n) {
      const std::uint32_t both = four_of(n) | four_of(8 + n) << 4;
      std::memcpy(bytes + 4 * n, &both, sizeof(both));
    }
    return kInt4DenseRowBytes;
  }
  static const std::uint8_t* expand_row(std::uint64_t, const std::uint8_t* values, Value* row) {
    for (int i = 0; i < kInt4DenseRowBytes; ++i) {
      row[i] = static_cast<Value>(values[i] & 0xf);
      row[32 + i] = static_cast<Value>(values[i] >> 4);
    }
    return values + kInt4DenseRowBytes;
  }
};

}  // namespace peft_elastic
