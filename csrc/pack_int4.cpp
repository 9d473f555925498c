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

// int4 weights into their in-memory format and back.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "layout.h"
#include "pack.h"

namespace peft_elastic {
namespace {

constexpr std::int64_t kRowCodes = 64;  // of a row of a tile: 16 outputs x 4 inputs

unsigned nibble(const std::uint8_t* values, std::int64_t index) { return values[index / 2] >> (index % 2 * 4) & 0xfu; }

ValueType type_of(const Int4Source& source) { return source.bitmask ? ValueType::kInt4 : ValueType::kInt4Dense; }

// The place of each input among the tiles; empty where they come as they are.
std::vector<std::int32_t> places_of(const std::int32_t* order, std::int64_t in_features) {
  if (!order) return {};
  std::vector<std::int32_t> places(static_cast<std::size_t>(in_features), -1);
  for (std::int64_t place = 0; place < in_features; ++place) {
    std::int32_t input;  // from memory that may not be aligned
    std::memcpy(&input, order + place, sizeof(input));
    if (input < 0 || input >= in_features || places[static_cast<std::size_t>(input)] >= 0) {
      fail("the order of the inputs is no permutation of them");
    }
    places[static_cast<std::size_t>(input)] = static_cast<std::int32_t>(place);
  }
  return places;
}

// Calls use(input, index of its value) for each stored value of a row of the source. Returns the index behind the last.
template <typename Use>
std::int64_t for_each_value(const Int4Source& source, std::int64_t row, std::int64_t next, Use use) {
  if (!source.bitmask) {
    for (std::int64_t k = 0; k < source.in_features; ++k) use(k, next++);
    return next;
  }
  const std::int64_t row_bytes = ceil_div(source.in_features, 8);
  const std::uint8_t* mask = source.bitmask + row * row_bytes;
  for (std::int64_t byte = 0; byte < row_bytes; ++byte) {
    for (std::uint64_t bits = mask[byte]; bits; bits &= bits - 1) use(8 * byte + lowest_bit(bits), next++);
  }
  return next;
}

// The lengths and the bitmask; the number of stored values.
std::int64_t check_source(const Int4Source& source) {
  const std::int64_t out = source.out_features, in = source.in_features;
  if (out < 1 || in < 1 || out > (std::int64_t{1} << 30) || in > (std::int64_t{1} << 30)) {
    fail("out_features and in_features must be 1 to 2^30, got " + std::to_string(out) + " and " + std::to_string(in));
  }
  std::int64_t count = out * in;
  if (source.bitmask) {
    const auto row_bytes = static_cast<std::size_t>(ceil_div(in, 8)), expected = static_cast<std::size_t>(out) * row_bytes;
    if (source.bitmask_bytes != expected) {
      fail("the bitmask has " + std::to_string(source.bitmask_bytes) + " bytes, expected " + std::to_string(expected));
    }
    const unsigned stray = in % 8 ? 0xffu << (in % 8) & 0xffu : 0;
    for (std::size_t row = 0; stray && row < static_cast<std::size_t>(out); ++row) {
      if (source.bitmask[(row + 1) * row_bytes - 1] & stray) fail("the bitmask has bits set behind in_features");
    }
    count = count_bits(source.bitmask, source.bitmask_bytes);
  }
  if (source.value_bytes != static_cast<std::size_t>((count + 1) / 2)) {
    fail("there are " + std::to_string(count) + " values, but " + std::to_string(source.value_bytes) +
         " bytes of them, expected " + std::to_string((count + 1) / 2));
  }
  if (count % 2 && source.values[count / 2] >> 4) fail("the last byte of the values has a value too many");
  return count;
}

// The shape of the packed weight: the bytes of its values depend on how many there are in each row of a tile.
Shape shape_of(const Int4Source& source) {
  const std::int64_t count = check_source(source);
  const std::int64_t blocks = ceil_div(source.out_features, kBlock), rows = ceil_div(source.in_features, kRowCodes) * kTileRows;
  Shape shape{type_of(source), source.out_features, source.in_features, count, blocks * rows * kInt4DenseRowBytes,
              source.group_size, source.order != nullptr};
  const std::vector<std::int32_t> places = places_of(source.order, source.in_features);
  if (source.bitmask) {
    shape.value_count = 0;
    std::vector<std::uint8_t> counts(static_cast<std::size_t>(rows));
    std::int64_t next = 0;
    for (std::int64_t block = 0; block < blocks; ++block) {
      std::memset(counts.data(), 0, counts.size());
      for (std::int64_t n = block * kBlock; n < std::min((block + 1) * kBlock, source.out_features); ++n) {
        next = for_each_value(source, n, next, [&](std::int64_t input, std::int64_t) {
          ++counts[static_cast<std::size_t>((places.empty() ? input : places[static_cast<std::size_t>(input)]) / 4)];
        });
      }
      for (const std::uint8_t row : counts) shape.value_count += (row + 1) / 2;
    }
  }
  return shape;
}

void check_group(float scale, unsigned zero) {
  if (!std::isfinite(scale)) fail("a scale is infinite or NaN");
  if (zero > 15) fail("a zero is " + std::to_string(zero) + ", allowed are 0 to 15");
}

// One row of a tile from its 64 codes, -1 where there is none. Returns where the next one begins.
std::uint8_t* write_sparse_row(const std::int8_t* codes, std::uint8_t* bitmap, std::uint8_t* values) {
  std::uint64_t bits = 0;
  unsigned count = 0, low = 0;
  for (int i = 0; i < kRowCodes; ++i) {
    if (codes[i] < 0) continue;
    bits |= std::uint64_t{1} << i;
    if (count++ % 2) {
      *values++ = static_cast<std::uint8_t>(low | static_cast<unsigned>(codes[i]) << 4);
    } else {
      low = static_cast<unsigned>(codes[i]);
    }
  }
  if (count % 2) *values++ = static_cast<std::uint8_t>(low);
  for (int i = 0; i < 8; ++i) bitmap[i] = static_cast<std::uint8_t>(bits >> (8 * i));
  return values;
}

std::uint8_t* write_dense_row(const std::int8_t* codes, std::uint8_t* values) {
  for (int i = 0; i < kInt4DenseRowBytes; ++i) {
    const int low = codes[i] < 0 ? 0 : codes[i], high = codes[32 + i] < 0 ? 0 : codes[32 + i];
    values[i] = static_cast<std::uint8_t>(low | high << 4);
  }
  return values + kInt4DenseRowBytes;
}

std::int64_t bytes_of_row(std::uint64_t bits) { return (population_count(bits) + 1) / 2; }

}  // namespace

std::size_t packed_int4_bytes(const Int4Source& source) { return layout_of(shape_of(source)).total; }

void pack_int4(const Int4Source& source, std::uint8_t* packed, std::size_t size) {
  Shape shape = shape_of(source);
  const Layout layout = layout_of(shape);
  if (size != layout.total) fail("the buffer is not of the size of the packed weight");
  const std::vector<std::int32_t> places = places_of(source.order, source.in_features);
  auto* const offsets = reinterpret_cast<std::uint64_t*>(packed + layout.offsets_at);
  auto* group = reinterpret_cast<QuantGroup*>(packed + layout.groups_at);
  std::uint8_t *bitmap = packed + layout.bitmaps_at, *values = packed + layout.values_at;
  std::uint8_t* const first_value = values;
  const std::int64_t rows = layout.tiles * kTileRows, groups = layout.group_count;
  std::vector<std::int8_t> codes(static_cast<std::size_t>(rows * kRowCodes));  // row of the tiles by row
  std::int64_t next = 0, equal = 0;                                            // values that are their zero
  for (std::int64_t block = 0; block < layout.blocks; ++block) {
    offsets[block] = static_cast<std::uint64_t>(values - first_value);
    std::memset(codes.data(), -1, codes.size());
    for (std::int64_t g = 0; g < groups; ++g) group[g] = {};
    for (std::int64_t n = 0; n < kBlock && block * kBlock + n < source.out_features; ++n) {
      const std::int64_t output = block * kBlock + n;
      for (std::int64_t g = 0; g < groups; ++g) {
        float scale;
        std::memcpy(&scale, source.scales + output * groups + g, sizeof(scale));
        const std::uint8_t zero = source.zeros[output * groups + g];
        check_group(scale, zero);
        group[g].scales[n] = scale;
        group[g].zeros[n] = zero;
      }
      next = for_each_value(source, output, next, [&](std::int64_t input, std::int64_t index) {
        const std::int64_t place = places.empty() ? input : places[static_cast<std::size_t>(input)];
        const unsigned code = nibble(source.values, index);
        equal += code == group[groups > 1 ? place / source.group_size : 0].zeros[n];
        codes[static_cast<std::size_t>(place / 4 * kRowCodes + n * 4 + place % 4)] = static_cast<std::int8_t>(code);
      });
    }
    if (source.bitmask && equal) fail("a stored value is its zero");
    for (std::int64_t row = 0; row < rows; ++row) {
      const std::int8_t* const from = codes.data() + row * kRowCodes;
      if (source.bitmask) {
        values = write_sparse_row(from, bitmap, values);
        bitmap += kRowCodes / 8;
      } else {
        values = write_dense_row(from, values);
      }
    }
    group += groups;
  }
  offsets[layout.blocks] = static_cast<std::uint64_t>(values - first_value);
  shape.nonzeros -= equal;
  write_header(shape, layout, packed);
  if (source.order) {
    std::memcpy(packed + layout.order_at, source.order, static_cast<std::size_t>(source.in_features) * sizeof(std::int32_t));
  }
  std::memset(values, 0, static_cast<std::size_t>(packed + layout.total - values));
}

void expand_int4_codes(const Weight& w, std::int64_t block, std::int8_t* target) {
  const std::int64_t width = w.tiles * kRowCodes, rows = w.tiles * kTileRows;
  const std::uint8_t* values = w.values + w.offsets[block];
  std::memset(target, -1, static_cast<std::size_t>(kBlock * width));
  for (std::int64_t row = 0; row < rows; ++row) {
    std::int8_t* const at = target + row * 4;
    if (w.type == ValueType::kInt4Dense) {
      for (int i = 0; i < kInt4DenseRowBytes; ++i) {
        at[i / 4 * width + i % 4] = static_cast<std::int8_t>(values[i] & 0xf);
        at[(8 + i / 4) * width + i % 4] = static_cast<std::int8_t>(values[i] >> 4);
      }
      values += kInt4DenseRowBytes;
      continue;
    }
    const std::uint64_t mask = load_bits(w.bitmaps + (block * rows + row) * 8, 8);
    std::int64_t next = 0;
    for (std::uint64_t bits = mask; bits; bits &= bits - 1) {
      const int i = lowest_bit(bits);
      at[i / 4 * width + i % 4] = static_cast<std::int8_t>(nibble(values, next++));
    }
    values += bytes_of_row(mask);
  }
}

void expand_int4_block(const Weight& w, std::int64_t block, std::int8_t* target) {
  const std::int64_t width = w.tiles * kRowCodes;
  expand_int4_codes(w, block, target);
  for (std::int64_t n = 0; n < kBlock; ++n) {
    for (std::int64_t g = 0; g < w.group_count; ++g) {
      const std::int64_t begin = g * w.group_rows * 4, end = g + 1 < w.group_count ? begin + w.group_rows * 4 : width;
      const std::int8_t zero = static_cast<std::int8_t>(w.groups[block * w.group_count + g].zeros[n]);
      for (std::int8_t* code = target + n * width + begin; code != target + n * width + end; ++code) {
        *code = static_cast<std::int8_t>(*code < 0 ? 0 : *code - zero);
      }
    }
  }
}

void unpack_int4(const Weight& w, std::uint8_t* bitmask, std::uint8_t* values, float* scales, std::uint8_t* zeros) {
  const std::int64_t width = w.tiles * kRowCodes, row_bytes = ceil_div(w.in_features, 8), groups = w.group_count;
  const bool dense = w.type == ValueType::kInt4Dense;
  const std::vector<std::int32_t> places = places_of(w.order, w.in_features);
  const std::int64_t count = dense ? w.out_features * w.in_features : w.nonzeros;
  if (count) std::memset(values, 0, static_cast<std::size_t>((count + 1) / 2));
  if (!dense) std::memset(bitmask, 0, static_cast<std::size_t>(w.out_features * row_bytes));
  std::vector<std::int8_t> codes(static_cast<std::size_t>(kBlock * width));
  std::int64_t next = 0;
  for (std::int64_t block = 0; block < w.blocks; ++block) {
    expand_int4_codes(w, block, codes.data());
    for (std::int64_t n = 0; n < kBlock && block * kBlock + n < w.out_features; ++n) {
      const std::int64_t output = block * kBlock + n;
      for (std::int64_t g = 0; g < groups; ++g) {
        scales[output * groups + g] = w.groups[block * groups + g].scales[n];
        zeros[output * groups + g] = w.groups[block * groups + g].zeros[n];
      }
      const std::int8_t* const row = codes.data() + n * width;
      for (std::int64_t k = 0; k < w.in_features; ++k) {
        const int code = row[places.empty() ? k : places[static_cast<std::size_t>(k)]];
        if (code < 0) continue;
        if (!dense) bitmask[output * row_bytes + k / 8] |= static_cast<std::uint8_t>(1u << (k % 8));
        values[next / 2] |= static_cast<std::uint8_t>(static_cast<unsigned>(code) << (next % 2 * 4));
        ++next;
      }
    }
  }
}

void check_int4_contents(const Weight& w) {
  const std::int64_t rows = w.tiles * kTileRows, width = w.tiles * kRowCodes, groups = w.group_count;
  const bool dense = w.type == ValueType::kInt4Dense;
  if (w.offsets[0] != 0) fail("the first offset is not 0");
  // All counts first: after this loop no offset leaves the values.
  std::int64_t bits = 0;
  for (std::int64_t block = 0; block < w.blocks; ++block) {
    if (w.offsets[block + 1] < w.offsets[block]) fail("the offsets are not in order");
    std::int64_t bytes = dense ? rows * kInt4DenseRowBytes : 0;
    for (std::int64_t row = 0; !dense && row < rows; ++row) {
      const std::uint64_t mask = load_bits(w.bitmaps + (block * rows + row) * 8, 8);
      bits += population_count(mask);
      bytes += bytes_of_row(mask);
    }
    if (w.offsets[block + 1] - w.offsets[block] != static_cast<std::uint64_t>(bytes)) {
      fail("the population count of block " + std::to_string(block) + " is not the number of its values");
    }
  }
  if (!dense) {
    if (bits != w.nonzeros) fail("the population count is not the number of nonzeros");
    check_bitmap_edges(w);
    const std::uint8_t* values = w.values;
    for (std::int64_t row = 0; row < w.blocks * rows; ++row) {
      const std::uint64_t mask = load_bits(w.bitmaps + row * 8, 8);
      values += bytes_of_row(mask);
      if (population_count(mask) % 2 && values[-1] >> 4) fail("a row has a value too many");
    }
  }
  places_of(w.order, w.in_features);
  std::vector<std::int8_t> codes(static_cast<std::size_t>(kBlock * width));
  std::int64_t nonzeros = 0;
  for (std::int64_t block = 0; block < w.blocks; ++block) {
    expand_int4_codes(w, block, codes.data());
    for (std::int64_t n = 0; n < kBlock; ++n) {
      const bool outside = block * kBlock + n >= w.out_features;
      for (std::int64_t g = 0; g < groups; ++g) {
        const QuantGroup& group = w.groups[block * groups + g];
        check_group(group.scales[n], group.zeros[n]);
        if (outside && (group.scales[n] != 0 || group.zeros[n] != 0)) fail("a group reaches outside of the weight");
        const std::int64_t begin = g * w.group_rows * 4, end = g + 1 < groups ? begin + w.group_rows * 4 : width;
        for (std::int64_t k = begin; k < end; ++k) {
          const int code = codes[static_cast<std::size_t>(n * width + k)];
          if (outside || k >= w.in_features) {
            if (code > 0) fail("a value lies outside of the weight");  // of sparse ones the edges have told
          } else if (code == group.zeros[n]) {
            if (!dense) fail("a stored value is its zero");
          } else {
            nonzeros += code >= 0;
          }
        }
      }
    }
  }
  if (nonzeros != w.nonzeros) fail("the number of nonzeros is another");
}

}  // namespace peft_elastic
