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

// Into the in-memory format and back. Everything is checked before it is read or written; bad input throws
// std::invalid_argument.
#pragma once

#include <cstddef>
#include <cstdint>

#include "format.h"
#include "values/values.h"

namespace peft_elastic {

// A weight in the layout on disk.
struct Source {
  ValueType type;
  std::int64_t out_features, in_features;
  const std::uint8_t* bitmask;  // [out, ceil(in / 8)], bit j of byte b of a row is column 8 b + j; null for dense int4
  std::size_t bitmask_bytes;
  const std::uint8_t* values;  // row by row; of int4 two to a byte, the first one low; the last byte may have a zero behind it
  std::size_t value_bytes;
  // int4 only
  std::int64_t group_size;    // else 0
  const float* scales;        // [out_features, groups], finite
  const std::uint8_t* zeros;  // [out_features, groups], 0 .. 15
  const std::int32_t* order;  // [in_features]: the inputs in the order of their groups, or null: as they come
};

// The bytes of the packed weight. Checks the source, but for the values.
std::size_t packed_bytes(const Source& source);

void pack(const Source& source, std::uint8_t* packed, std::size_t size);

// Where a weight in the layout on disk goes, as in Source; order: of as many numbers as there are inputs, null if it has none.
struct Target {
  std::uint8_t *bitmask, *values;
  float* scales;
  std::uint8_t* zeros;
  std::int32_t* order;
};

// The inverse of pack, after check_contents.
void unpack(const Weight& weight, const Target& target);

// From a dense weight [out, in] of bf16 or int8, row_stride elements from one row to the next; zeros of either sign are dropped.
std::int64_t count_nonzeros(ValueType type, const void* dense, std::int64_t out_features, std::int64_t in_features,
                            std::int64_t row_stride);
std::size_t packed_bytes(ValueType type, std::int64_t out_features, std::int64_t in_features, std::int64_t nonzeros);
void pack_dense(ValueType type, const void* dense, std::int64_t out_features, std::int64_t in_features,
                std::int64_t row_stride, std::uint8_t* packed, std::size_t size);

// A block of 16 outputs, dense: [16][tiles * tile_inputs] of the value type, zero at the edges; int8 for int4, whose q - zero
// it gives, in the order of the tiles. Does not throw.
void expand_block(const Weight& weight, std::int64_t block, void* target);

// Checks the header against the size: what a kernel needs to find the sections. Constant time.
Weight open_packed(const std::uint8_t* packed, std::size_t size);

// Checks everything else: offsets, population counts, padding, values.
void check_contents(const Weight& weight);

}  // namespace peft_elastic
