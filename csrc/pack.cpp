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

#include "pack.h"

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "layout.h"

namespace peft_elastic {
namespace {

constexpr std::int64_t kMaxFeatures = std::int64_t{1} << 30;  // so that nothing below overflows

std::size_t align_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

Layout layout_of(const Shape& shape) {
  const auto [type, out_features, in_features, nonzeros, value_count, group_size, has_order] = shape;
  if (type != ValueType::kBf16 && type != ValueType::kInt8 && !is_int4(type)) {
    fail("the value type is none of bf16, int8, int4 and dense int4");
  }
  if (out_features < 1 || out_features > kMaxFeatures || in_features < 1 || in_features > kMaxFeatures) {
    fail("out_features and in_features must be 1 to 2^30, got " + std::to_string(out_features) + " and " +
         std::to_string(in_features));
  }
  if (nonzeros < 0 || nonzeros > out_features * in_features) {
    fail("the number of nonzeros must be 0 to out_features * in_features, got " + std::to_string(nonzeros));
  }
  Layout layout;
  layout.blocks = ceil_div(out_features, kBlock);
  layout.tiles = ceil_div(in_features, tile_inputs(type));
  layout.group_count = 0;
  const std::int64_t tile_rows = layout.blocks * layout.tiles * kTileRows;
  if (is_int4(type)) {
    if (group_size < 1) fail("group_size must be 1 or more, got " + std::to_string(group_size));
    layout.group_count = ceil_div(in_features, group_size);
    if (layout.group_count > 1 && group_size % group_inputs(type)) {
      fail("group_size must be a multiple of 4 where there is more than one group, got " + std::to_string(group_size));
    }
    // A row has a byte for each two of its nonzeros, the last one of which may be alone.
    const std::int64_t least = (nonzeros + 1) / 2, most = least + tile_rows;
    const bool fits = type == ValueType::kInt4 ? least <= value_count && value_count <= most
                                               : value_count == tile_rows * kInt4DenseRowBytes;
    if (!fits) fail("the bytes of the values are not what the number of nonzeros asks for");
  } else if (value_count != nonzeros || group_size != 0 || has_order) {
    fail("the header has numbers that go with int4");
  }
  layout.offsets_at = sizeof(Header);
  layout.bitmaps_at = align_up(layout.offsets_at + 8 * static_cast<std::size_t>(layout.blocks + 1));
  layout.groups_at = layout.bitmaps_at + static_cast<std::size_t>(layout.blocks) * static_cast<std::size_t>(layout.tiles) *
                                             static_cast<std::size_t>(tile_bitmap_bytes(type));
  layout.order_at =
      align_up(layout.groups_at + static_cast<std::size_t>(layout.blocks * layout.group_count) * sizeof(QuantGroup));
  layout.values_at = align_up(layout.order_at + (has_order ? static_cast<std::size_t>(in_features) * 4 : 0));
  layout.total =
      align_up(layout.values_at + static_cast<std::size_t>(value_count * value_bytes(type))) + kTailPadding;
  return layout;
}

void write_header(const Shape& shape, const Layout& layout, std::uint8_t* packed) {
  Header header{};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.type = shape.type;
  header.has_order = shape.has_order;
  header.out_features = static_cast<std::uint64_t>(shape.out_features);
  header.in_features = static_cast<std::uint64_t>(shape.in_features);
  header.nonzeros = static_cast<std::uint64_t>(shape.nonzeros);
  header.value_count = static_cast<std::uint64_t>(shape.value_count);
  header.group_size = static_cast<std::uint64_t>(shape.group_size);
  header.offsets_at = layout.offsets_at;
  header.bitmaps_at = layout.bitmaps_at;
  header.groups_at = layout.groups_at;
  header.order_at = layout.order_at;
  header.values_at = layout.values_at;
  header.total_bytes = layout.total;
  std::memcpy(packed, &header, sizeof(header));
  const auto clear = [packed](std::size_t begin, std::size_t end) { std::memset(packed + begin, 0, end - begin); };
  clear(layout.offsets_at + 8 * static_cast<std::size_t>(layout.blocks + 1), layout.bitmaps_at);
  clear(layout.groups_at + static_cast<std::size_t>(layout.blocks * layout.group_count) * sizeof(QuantGroup), layout.order_at);
  clear(layout.order_at + (shape.has_order ? static_cast<std::size_t>(shape.in_features) * 4 : 0), layout.values_at);
}

namespace {

bool is_nonzero(std::uint16_t bf16) { return (bf16 & 0x7fffu) != 0; }
bool is_nonzero(std::int8_t value) { return value != 0; }

// Writes a packed weight block by block from 16 dense rows at a time.
template <typename Value>
class Packer {
 public:
  Packer(ValueType type, std::int64_t out_features, std::int64_t in_features, std::int64_t nonzeros, std::uint8_t* packed,
         std::size_t size)
      : type_(type), layout_(layout_of({type, out_features, in_features, nonzeros, nonzeros})), packed_(packed),
        nonzeros_(nonzeros) {
    if (size != layout_.total) fail("the buffer is not of the size of the packed weight");
    write_header({type, out_features, in_features, nonzeros, nonzeros}, layout_, packed);
    offsets_ = reinterpret_cast<std::uint64_t*>(packed + layout_.offsets_at);
    offsets_[0] = 0;
    values_ = packed + layout_.values_at;
    width_ = layout_.tiles * tile_inputs(type);
    dense_.assign(static_cast<std::size_t>(kBlock * width_), Value{0});
  }

  std::int64_t blocks() const { return layout_.blocks; }
  Value* row(std::int64_t n) { return dense_.data() + n * width_; }  // of the block to come; zero behind in_features
  void clear() { std::memset(dense_.data(), 0, dense_.size() * sizeof(Value)); }

  void finish_block() {
    const std::int64_t group = group_inputs(type_);
    std::uint8_t* bitmap = packed_ + layout_.bitmaps_at + block_ * layout_.tiles * tile_bitmap_bytes(type_);
    const std::int64_t bitmap_bytes = tile_bitmap_bytes(type_) / kTileRows;
    Value row_values[64];
    for (std::int64_t k = 0; k < width_; k += group, bitmap += bitmap_bytes) {
      std::uint64_t bits = 0;
      std::size_t count = 0;
      int bit = 0;
      for (std::int64_t n = 0; n < kBlock; ++n) {
        const Value* source = dense_.data() + n * width_ + k;
        for (std::int64_t j = 0; j < group; ++j, ++bit) {
          const bool kept = is_nonzero(source[j]);
          row_values[count] = source[j];
          count += kept;
          bits |= static_cast<std::uint64_t>(kept) << bit;
        }
      }
      for (std::int64_t i = 0; i < bitmap_bytes; ++i) bitmap[i] = static_cast<std::uint8_t>(bits >> (8 * i));
      written_ += static_cast<std::int64_t>(count);
      if (written_ > nonzeros_) fail("the weight has more nonzeros than were counted");
      std::memcpy(values_, row_values, count * sizeof(Value));
      values_ += count * sizeof(Value);
    }
    offsets_[++block_] = static_cast<std::uint64_t>(written_);
  }

  void finish() {
    if (written_ != nonzeros_) fail("the weight has fewer nonzeros than were counted");
    std::memset(values_, 0, static_cast<std::size_t>(packed_ + layout_.total - values_));
  }

 private:
  ValueType type_;
  Layout layout_;
  std::uint8_t* packed_;
  std::int64_t nonzeros_, written_ = 0, block_ = 0, width_ = 0;
  std::uint64_t* offsets_ = nullptr;
  std::uint8_t* values_ = nullptr;
  std::vector<Value> dense_;
};

template <typename Value>
std::int64_t count_typed(const Value* dense, std::int64_t out_features, std::int64_t in_features, std::int64_t row_stride) {
  std::int64_t count = 0;
  for (std::int64_t n = 0; n < out_features; ++n) {
    for (std::int64_t k = 0; k < in_features; ++k) count += is_nonzero(dense[n * row_stride + k]);
  }
  return count;
}

void check_value(std::uint16_t value) {
  if (!is_nonzero(value)) fail("a stored value is zero");
}

void check_value(std::int8_t value) {
  if (value == 0) fail("a stored value is zero");
  if (value == -128) fail("an int8 value is -128, allowed are -127 to 127");
}

template <typename Value>
void pack_dense_typed(ValueType type, const Value* dense, std::int64_t out_features, std::int64_t in_features,
                      std::int64_t row_stride, std::uint8_t* packed, std::size_t size) {
  const std::int64_t nonzeros = count_typed(dense, out_features, in_features, row_stride);
  Packer<Value> packer(type, out_features, in_features, nonzeros, packed, size);
  for (std::int64_t block = 0; block < packer.blocks(); ++block) {
    for (std::int64_t n = 0; n < kBlock; ++n) {
      const std::int64_t row = block * kBlock + n;
      if (row < out_features) {
        std::memcpy(packer.row(n), dense + row * row_stride, static_cast<std::size_t>(in_features) * sizeof(Value));
      } else {
        std::memset(packer.row(n), 0, static_cast<std::size_t>(in_features) * sizeof(Value));
      }
    }
    packer.finish_block();
  }
  packer.finish();
}

template <typename Value>
void pack_bitmask_typed(ValueType type, const std::uint8_t* bitmask, const Value* values, std::int64_t value_count,
                        std::int64_t out_features, std::int64_t in_features, std::uint8_t* packed, std::size_t size) {
  Packer<Value> packer(type, out_features, in_features, value_count, packed, size);
  const std::int64_t row_bytes = ceil_div(in_features, 8);
  const std::uint8_t stray = in_features % 8 ? static_cast<std::uint8_t>(0xffu << (in_features % 8)) : 0;
  std::int64_t next = 0;  // bounded by value_count, as the caller has compared it with the population count
  for (std::int64_t block = 0; block < packer.blocks(); ++block) {
    packer.clear();
    for (std::int64_t n = 0; n < kBlock && block * kBlock + n < out_features; ++n) {
      const std::uint8_t* mask = bitmask + (block * kBlock + n) * row_bytes;
      if (mask[row_bytes - 1] & stray) fail("the bitmask has bits set behind in_features");
      Value* row = packer.row(n);
      for (std::int64_t byte = 0; byte < row_bytes; ++byte, row += 8) {
        for (unsigned bits = mask[byte], k = 0; bits; bits >>= 1, ++k) {
          if (!(bits & 1u)) continue;
          Value value;
          std::memcpy(&value, values + next++, sizeof(value));
          check_value(value);
          row[k] = value;
        }
      }
    }
    packer.finish_block();
  }
  packer.finish();
}

// Tile by tile: its 16 rows as they lie in memory, each 16 outputs x 4 bytes of inputs, then turned, which gives each output 64
// bytes of its row.
template <typename Value>
void expand_block_typed(const Weight& w, std::int64_t block, Value* dense, std::int64_t width) {
  constexpr int kRowValues = 64 / sizeof(Value);
  const std::int64_t bitmap_bytes = tile_bitmap_bytes(w.type) / kTileRows;
  const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(w.type);
  const std::uint8_t* values = w.values + w.offsets[block] * sizeof(Value);
  for (std::int64_t tile = 0; tile < w.tiles; ++tile) {
    Value rows[kTileRows * kRowValues] = {};
    for (int row = 0; row < kTileRows; ++row, bitmap += bitmap_bytes) {
      for (std::uint64_t bits = load_bits(bitmap, bitmap_bytes); bits; bits &= bits - 1) {
        std::memcpy(rows + row * kRowValues + lowest_bit(bits), values, sizeof(Value));
        values += sizeof(Value);
      }
    }
    std::uint32_t words[kTileRows][kBlock];
    std::memcpy(words, rows, sizeof(words));
    for (int n = 0; n < kBlock; ++n) {
      std::uint32_t line[kTileRows];
      for (int row = 0; row < kTileRows; ++row) line[row] = words[row][n];
      std::memcpy(dense + n * width + tile * kRowValues, line, sizeof(line));
    }
  }
}

template <typename Value>
void unpack_typed(const Weight& w, std::uint8_t* bitmask, Value* values) {
  const std::int64_t width = w.tiles * tile_inputs(w.type), row_bytes = ceil_div(w.in_features, 8);
  std::vector<Value> dense(static_cast<std::size_t>(kBlock * width));
  for (std::int64_t block = 0; block < w.blocks; ++block) {
    expand_block_typed(w, block, dense.data(), width);
    for (std::int64_t n = 0; n < kBlock && block * kBlock + n < w.out_features; ++n) {
      const Value* row = dense.data() + n * width;
      std::uint8_t* mask = bitmask + (block * kBlock + n) * row_bytes;
      for (std::int64_t byte = 0; byte < row_bytes; ++byte) {
        unsigned bits = 0;
        for (int k = 0; k < 8; ++k) {  // width is a multiple of 8
          if (!is_nonzero(row[8 * byte + k])) continue;
          bits |= 1u << k;
          *values++ = row[8 * byte + k];
        }
        mask[byte] = static_cast<std::uint8_t>(bits);
      }
    }
  }
}

template <typename Value>
void check_contents_typed(const Weight& w) {
  const std::int64_t block_bytes = w.tiles * tile_bitmap_bytes(w.type);
  if (w.offsets[0] != 0) fail("the first offset is not 0");
  // In order first, then the counts: after this loop no offset leaves the values.
  for (std::int64_t block = 0; block < w.blocks; ++block) {
    if (w.offsets[block + 1] < w.offsets[block]) fail("the offsets are not in order");
    const std::int64_t count = count_bits(w.bitmaps + block * block_bytes, static_cast<std::size_t>(block_bytes));
    if (w.offsets[block + 1] - w.offsets[block] != static_cast<std::uint64_t>(count)) {
      fail("the population count of block " + std::to_string(block) + " is not the number of its values");
    }
  }
  check_bitmap_edges(w);
  for (std::uint64_t i = 0; i < w.offsets[w.blocks]; ++i) {
    Value value;
    std::memcpy(&value, w.values + i * sizeof(Value), sizeof(value));
    check_value(value);
  }
}

}  // namespace

void check_bitmap_edges(const Weight& w) {
  const std::int64_t bitmap_bytes = tile_bitmap_bytes(w.type) / kTileRows, group = group_inputs(w.type);
  for (std::int64_t block = 0; block < w.blocks; ++block) {
    const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * tile_bitmap_bytes(w.type);
    for (std::int64_t k = 0; k < w.tiles * kTileRows * group; k += group, bitmap += bitmap_bytes) {
      const bool edge = k + group > w.in_features || (block + 1) * kBlock > w.out_features;
      if (!edge) continue;
      std::int64_t bit = 0;
      for (std::uint64_t bits = load_bits(bitmap, bitmap_bytes); bits; bits >>= 1, ++bit) {
        if ((bits & 1) && (block * kBlock + bit / group >= w.out_features || k + bit % group >= w.in_features)) {
          fail("the bitmap has bits set outside of the weight");
        }
      }
    }
  }
}

std::size_t packed_bytes(ValueType type, std::int64_t out_features, std::int64_t in_features, std::int64_t nonzeros) {
  return layout_of({type, out_features, in_features, nonzeros, nonzeros}).total;
}

std::int64_t count_nonzeros(ValueType type, const void* dense, std::int64_t out_features, std::int64_t in_features,
                            std::int64_t row_stride) {
  return type == ValueType::kBf16
             ? count_typed(static_cast<const std::uint16_t*>(dense), out_features, in_features, row_stride)
             : count_typed(static_cast<const std::int8_t*>(dense), out_features, in_features, row_stride);
}

void pack_dense(ValueType type, const void* dense, std::int64_t out_features, std::int64_t in_features,
                std::int64_t row_stride, std::uint8_t* packed, std::size_t size) {
  if (type == ValueType::kBf16) {
    pack_dense_typed(type, static_cast<const std::uint16_t*>(dense), out_features, in_features, row_stride, packed, size);
    return;
  }
  pack_dense_typed(type, static_cast<const std::int8_t*>(dense), out_features, in_features, row_stride, packed, size);
  check_contents(open_packed(packed, size));  // -128
}

void pack_bitmask(ValueType type, const std::uint8_t* bitmask, std::size_t bitmask_bytes, const void* values,
                  std::int64_t value_count, std::int64_t out_features, std::int64_t in_features, std::uint8_t* packed,
                  std::size_t size) {
  layout_of({type, out_features, in_features, value_count, value_count});
  const std::size_t expected = static_cast<std::size_t>(out_features) * static_cast<std::size_t>(ceil_div(in_features, 8));
  if (bitmask_bytes != expected) {
    fail("the bitmask has " + std::to_string(bitmask_bytes) + " bytes, expected " + std::to_string(expected));
  }
  const std::int64_t bits = count_bits(bitmask, bitmask_bytes);
  if (bits != value_count) {
    fail("the bitmask has " + std::to_string(bits) + " bits set, but there are " + std::to_string(value_count) + " values");
  }
  if (type == ValueType::kBf16) {
    pack_bitmask_typed(type, bitmask, static_cast<const std::uint16_t*>(values), value_count, out_features, in_features,
                       packed, size);
  } else {
    pack_bitmask_typed(type, bitmask, static_cast<const std::int8_t*>(values), value_count, out_features, in_features,
                       packed, size);
  }
}

void unpack(const Weight& weight, std::uint8_t* bitmask, void* values) {
  if (weight.type == ValueType::kBf16) {
    unpack_typed(weight, bitmask, static_cast<std::uint16_t*>(values));
  } else {
    unpack_typed(weight, bitmask, static_cast<std::int8_t*>(values));
  }
}

void expand_block(const Weight& weight, std::int64_t block, void* target) {
  if (is_int4(weight.type)) {
    expand_int4_block(weight, block, static_cast<std::int8_t*>(target));
    return;
  }
  const std::int64_t width = weight.tiles * tile_inputs(weight.type);
  if (weight.type == ValueType::kBf16) {
    expand_block_typed(weight, block, static_cast<std::uint16_t*>(target), width);
  } else {
    expand_block_typed(weight, block, static_cast<std::int8_t*>(target), width);
  }
}

Weight open_packed(const std::uint8_t* packed, std::size_t size) {
  if (reinterpret_cast<std::uintptr_t>(packed) % kAlignment) fail("the packed weight is not aligned to 64 bytes");
  Header header;
  if (!packed) fail("the packed weight has no memory");
  if (size < sizeof(header)) fail("the packed weight is shorter than its header");
  std::memcpy(&header, packed, sizeof(header));
  if (std::memcmp(header.magic, kMagic, sizeof(kMagic)) != 0) fail("this is not a packed weight");
  constexpr std::uint64_t kLimit = std::uint64_t{1} << 62;
  for (const std::uint64_t number :
       {header.out_features, header.in_features, header.nonzeros, header.value_count, header.group_size}) {
    if (number > kLimit) fail("the header is damaged");
  }
  if (header.has_order > 1) fail("the header is damaged");
  const auto whole = [](std::uint64_t number) { return static_cast<std::int64_t>(number); };
  const Shape shape{header.type, whole(header.out_features), whole(header.in_features), whole(header.nonzeros),
                    whole(header.value_count), whole(header.group_size), header.has_order == 1};
  const Layout layout = layout_of(shape);
  if (header.offsets_at != layout.offsets_at || header.bitmaps_at != layout.bitmaps_at ||
      header.groups_at != layout.groups_at || header.order_at != layout.order_at || header.values_at != layout.values_at ||
      header.total_bytes != layout.total || size != layout.total) {
    fail("the packed weight has " + std::to_string(size) + " bytes, its header asks for " + std::to_string(layout.total));
  }
  Weight weight{};
  weight.type = shape.type;
  weight.out_features = shape.out_features;
  weight.in_features = shape.in_features;
  weight.blocks = layout.blocks;
  weight.tiles = layout.tiles;
  weight.nonzeros = shape.nonzeros;
  weight.offsets = reinterpret_cast<const std::uint64_t*>(packed + layout.offsets_at);
  weight.bitmaps = packed + layout.bitmaps_at;
  weight.values = packed + layout.values_at;
  weight.group_size = shape.group_size;
  weight.group_count = layout.group_count;
  weight.group_rows = layout.group_count > 1 ? shape.group_size / group_inputs(shape.type) : layout.tiles * kTileRows;
  weight.groups = reinterpret_cast<const QuantGroup*>(packed + layout.groups_at);
  weight.order = shape.has_order ? reinterpret_cast<const std::int32_t*>(packed + layout.order_at) : nullptr;
  if (weight.offsets[weight.blocks] != header.value_count) fail("the last offset is not the number of values");
  return weight;
}

void check_contents(const Weight& weight) {
  if (is_int4(weight.type)) {
    check_int4_contents(weight);
  } else if (weight.type == ValueType::kBf16) {
    check_contents_typed<std::uint16_t>(weight);
  } else {
    check_contents_typed<std::int8_t>(weight);
  }
}

}  // namespace peft_elastic
