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

namespace peft_elastic {

// The bytes of a packed weight.
std::size_t packed_bytes(ValueType type, std::int64_t out_features, std::int64_t in_features, std::int64_t nonzeros);

std::int64_t count_nonzeros(ValueType type, const void* dense, std::int64_t out_features, std::int64_t in_features,
                            std::int64_t row_stride);

// From a dense weight [out, in], row_stride elements from one row to the next; zeros of either sign are dropped.
void pack_dense(ValueType type, const void* dense, std::int64_t out_features, std::int64_t in_features,
                std::int64_t row_stride, std::uint8_t* packed, std::size_t size);

// From the layout on disk: a bitmask [out, ceil(in / 8)], bit j of byte b of a row is column 8 b + j, and the nonzeros row
// by row.
void pack_bitmask(ValueType type, const std::uint8_t* bitmask, std::size_t bitmask_bytes, const void* values,
                  std::int64_t value_count, std::int64_t out_features, std::int64_t in_features, std::uint8_t* packed,
                  std::size_t size);

// The inverse of pack_bitmask, after check_contents.
void unpack(const Weight& weight, std::uint8_t* bitmask, void* values);

// An int4 weight in the layout on disk.
struct Int4Source {
  std::int64_t out_features, in_features, group_size;
  const std::uint8_t* bitmask;  // as above; null: dense, every value is stored
  std::size_t bitmask_bytes;
  const std::uint8_t* values;  // row by row, two to a byte, the first one low; the last byte may have a zero behind it
  std::size_t value_bytes;
  const float* scales;         // [out_features, groups], finite
  const std::uint8_t* zeros;   // [out_features, groups], 0 .. 15
  const std::int32_t* order;   // [in_features]: the inputs in the order of their groups, or null: as they come
};

// The bytes of the packed weight. Checks the source, but for the values.
std::size_t packed_int4_bytes(const Int4Source& source);

void pack_int4(const Int4Source& source, std::uint8_t* packed, std::size_t size);

// The inverse, after check_contents: bitmask [out, ceil(in / 8)] unless the weight is dense, values, scales, zeros.
void unpack_int4(const Weight& weight, std::uint8_t* bitmask, std::uint8_t* values, float* scales, std::uint8_t* zeros);

// A block of an int4 weight, [16][tiles * 64] in the order of the tiles: q, -1 where none is stored. Does not throw.
void expand_int4_codes(const Weight& weight, std::int64_t block, std::int8_t* target);

// A block of an int4 weight, q - zero, zero where none is stored: what expand_block gives. Does not throw.
void expand_int4_block(const Weight& weight, std::int64_t block, std::int8_t* target);

// A block of 16 outputs, dense: [16][tiles * tile_inputs] of the value type, zero at the edges; int8 for int4, whose q - zero
// it gives, in the order of the tiles. Does not throw.
void expand_block(const Weight& weight, std::int64_t block, void* target);

// Checks the header against the size: what a kernel needs to find the sections. Constant time.
Weight open_packed(const std::uint8_t* packed, std::size_t size);

// Checks everything else: offsets, population counts, padding, values.
void check_contents(const Weight& weight);

}  // namespace peft_elastic
