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
// The in-memory format of a sparse weight: a bitmap and the packed nonzeros, in the order in which the kernels read them.
//
// A weight W [out, in] is cut into blocks of 16 outputs and these into tiles: 16 outputs x 32 inputs of bf16, or 16 outputs
// x 64 inputs of int8. The edges are padded with zeros. A tile has 16 rows of 64 bytes; row r holds, output by output, the
// inputs 2r and 2r+1 (bf16) or 4r .. 4r+3 (int8): the "B" tile of Intel AMX (Intel Software Developer's Manual, TDPBF16PS
// and TDPBSSD), which is also the operand of the AVX512 dot products. Of each row the nonzeros alone are stored, in this
// order, with a bitmap of one bit per weight: 32 bits for a row of bf16, 64 for a row of int8.
//
// int4 (weight = scale * (q - zero), q and zero 0 .. 15, with a scale and a zero for each output and group of inputs) has the
// tiles of int8, in two forms. Sparse: of each row the q that are not their zero, as nibbles, the low one first, padded to a
// whole byte for each row; and a bitmap as that of int8. Dense: no bitmap, 32 bytes for each row, byte j of which holds the
// 4-bit values j (low) and 32 + j (high). A group is a whole number of rows of tiles; the last one ends with the last tile. Where
// the groups of a checkpoint lie scattered over its inputs, `order` says which input each place of the tiles stands for.
//
// One buffer, little endian, aligned to 64 bytes:
//   Header
//   offsets   u64 [blocks + 1]          index of the first value of each block of outputs; of int4: of its first byte
//   bitmaps   u32 or u64 [blocks][tiles][16]; none for dense int4
//   groups    QuantGroup [blocks][groups], int4 only
//   order     i32 [in_features], int4 only, and not always
//   values    bf16 or int8 [nonzeros], or bytes of nibbles, then 64 bytes of padding, so that wide loads never leave the buffer
#pragma once

#include <cstddef>
#include <cstdint>

namespace peft_elastic {

// What there is to know about each: values/values.h.
enum class ValueType : std::uint32_t { kBf16 = 0, kInt8 = 1, kInt4 = 2, kInt4Dense = 3 };
constexpr std::uint32_t kValueTypes = 4;

constexpr std::int64_t kBlock = 16;        // outputs of a tile
constexpr std::int64_t kTileRows = 16;     // rows of a tile
constexpr std::size_t kAlignment = 64;     // of the buffer and of its sections
constexpr std::size_t kTailPadding = 64;   // behind the values
constexpr std::int64_t kMaxRows = 32;      // activations that a level multiplies in one call

struct Header {
  char magic[8];
  ValueType type;
  std::uint32_t has_order;
  std::uint64_t out_features, in_features, nonzeros;
  std::uint64_t value_count;  // the last offset
  std::uint64_t group_size;   // in inputs; 0 but for int4
  std::uint64_t offsets_at, bitmaps_at, groups_at, order_at, values_at, total_bytes;  // sections, in bytes from the header
  char padding[24];
};
static_assert(sizeof(Header) == 128, "the header is part of the format");

// Scale and zero of 16 outputs in one group of inputs.
struct QuantGroup {
  float scales[kBlock];
  std::uint8_t zeros[kBlock];
};
static_assert(sizeof(QuantGroup) == 80, "the groups are part of the format");

// A checked buffer, as the kernels see it.
struct Weight {
  ValueType type;
  std::int64_t out_features, in_features, blocks, tiles;  // tiles: of one block
  std::int64_t nonzeros;
  const std::uint64_t* offsets;
  const std::uint8_t* bitmaps;
  const std::uint8_t* values;
  // int4 only
  std::int64_t group_size, group_count, group_rows;  // rows: of tiles, in each group but the last, which has what is left
  const QuantGroup* groups;                          // [blocks][group_count]
  const std::int32_t* order;                         // [in_features], or null: as they come
};

}  // namespace peft_elastic
