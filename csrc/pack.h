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

// A block of 16 outputs, dense: [16][tiles * tile_inputs] of the value type, zero at the edges. Does not throw.
void expand_block(const Weight& weight, std::int64_t block, void* target);

// Checks the header against the size: what a kernel needs to find the sections. Constant time.
Weight open_packed(const std::uint8_t* packed, std::size_t size);

// Checks everything else: offsets, population counts, padding, values.
void check_contents(const Weight& weight);

}  // namespace peft_elastic
