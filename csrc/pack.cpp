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

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "bits.h"
#include "layout.h"

namespace peft_elastic {
namespace {

constexpr std::int64_t kMaxFeatures = std::int64_t{1} << 30;  // so that nothing below overflows

std::size_t align_up(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

void check_features(std::int64_t out_features, std::int64_t in_features) {
  if (out_features < 1 || out_features > kMaxFeatures || in_features < 1 || in_features > kMaxFeatures) {
    fail("out_features and in_features must be 1 to 2^30, got " + std::to_string(out_features) + " and " +
         std::to_string(in_features));
  }
}

}  // namespace

Layout layout_of(const Shape& shape) {
  const auto [type, out_features, in_features, nonzeros, value_count, group_size, has_order] = shape;
  if (!is_value_type(type)) fail("the value type is none of bf16, int8, int4 and dense int4");
  check_features(out_features, in_features);
  if (nonzeros < 0 || nonzeros > out_features * in_features) {
    fail("the number of nonzeros must be 0 to out_features * in_features, got " + std::to_string(nonzeros));
  }
  Layout layout;
  layout.blocks = ceil_div(out_features, kBlock);
  layout.tiles = ceil_div(in_features, tile_inputs(type));
  layout.group_count = 0;
  const std::int64_t tile_rows = layout.blocks * layout.tiles * kTileRows;
  const bool fits = with_value_type(
      type, [nonzeros = nonzeros, count = value_count, tile_rows](auto v) { return decltype(v)::fits(nonzeros, count, tile_rows); });
  if (value_layout(type).has_groups) {
    if (group_size < 1) fail("group_size must be 1 or more, got " + std::to_string(group_size));
    layout.group_count = ceil_div(in_features, group_size);
    if (layout.group_count > 1 && group_size % group_inputs(type)) {
      fail("group_size must be a multiple of 4 where there is more than one group, got " + std::to_string(group_size));
    }
    if (!fits) fail("the bytes of the values are not what the number of nonzeros asks for");
  } else if (!fits || group_size != 0 || has_order) {
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

void check_group(float scale, unsigned zero) {
  if (!std::isfinite(scale)) fail("a scale is infinite or NaN");
  if (zero > 15) fail("a zero is " + std::to_string(zero) + ", allowed are 0 to 15");
}

template <typename V>
void check_value(typename V::Value value) {
  if (const char* fault = V::fault(value)) fail(fault);
}

// The lengths and the bitmask; the number of stored values.
template <typename V>
std::int64_t check_source(const Source& source) {
  const std::int64_t out = source.out_features, in = source.in_features;
  check_features(out, in);
  std::int64_t count = out * in;
  if (V::kLayout.tile_bitmap_bytes) {
    const auto row_bytes = static_cast<std::size_t>(ceil_div(in, 8)), expected = static_cast<std::size_t>(out) * row_bytes;
    if (source.bitmask_bytes != expected || !source.bitmask) {
      fail("the bitmask has " + std::to_string(source.bitmask_bytes) + " bytes, expected " + std::to_string(expected));
    }
    const unsigned stray = in % 8 ? 0xffu << (in % 8) & 0xffu : 0;
    for (std::size_t row = 0; stray && row < static_cast<std::size_t>(out); ++row) {
      if (source.bitmask[(row + 1) * row_bytes - 1] & stray) fail("the bitmask has bits set behind in_features");
    }
    count = count_bits(source.bitmask, source.bitmask_bytes);
  }
  const auto expected = static_cast<std::size_t>(V::bytes_of(count));
  if constexpr (V::kWholeBytes) {
    if (source.value_bytes != expected) {
      fail("the bitmask has " + std::to_string(count) + " bits set, but there are " +
           std::to_string(source.value_bytes / static_cast<std::size_t>(V::bytes_of(1))) + " values");
    }
  } else {
    if (source.value_bytes != expected) {
      fail("there are " + std::to_string(count) + " values, but " + std::to_string(source.value_bytes) +
           " bytes of them, expected " + std::to_string(expected));
    }
    if (count % 2 && V::load(source.values, count)) fail("the last byte of the values has a value too many");
  }
  return count;
}

// Calls use(input, index of its value) for each stored value of a row of the source. Returns the index behind the last.
template <typename V, typename Use>
std::int64_t for_each_value(const Source& source, std::int64_t row, std::int64_t next, Use use) {
  if (!V::kLayout.tile_bitmap_bytes) {
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

template <typename V>
Shape shape_of(const Source& source) {
  const std::int64_t count = check_source<V>(source);
  Shape shape{V::kType, source.out_features, source.in_features, count, count, source.group_size, source.order != nullptr};
  const std::vector<std::int32_t> places = places_of(source.order, source.in_features);
  if constexpr (V::kWholeBytes) return shape;
  const std::int64_t blocks = ceil_div(source.out_features, kBlock);
  const std::int64_t rows = ceil_div(source.in_features, V::kLayout.tile_inputs) * kTileRows;
  if (!V::kLayout.tile_bitmap_bytes) {
    shape.value_count = V::count_of(nullptr, blocks * rows);
    return shape;
  }
  // The bytes of the values depend on how many there are in each row of a tile.
  shape.value_count = 0;
  std::vector<std::uint8_t> counts(static_cast<std::size_t>(rows));
  std::int64_t next = 0;
  for (std::int64_t block = 0; block < blocks; ++block) {
    std::memset(counts.data(), 0, counts.size());
    for (std::int64_t n = block * kBlock; n < std::min((block + 1) * kBlock, source.out_features); ++n) {
      next = for_each_value<V>(source, n, next, [&](std::int64_t input, std::int64_t) {
        const std::int64_t place = places.empty() ? input : places[static_cast<std::size_t>(input)];
        ++counts[static_cast<std::size_t>(place / V::kLayout.group_inputs)];
      });
    }
    for (const std::uint8_t row : counts) shape.value_count += V::bytes_of(row);
  }
  return shape;
}

// Writes a packed weight block by block from 16 expanded rows at a time.
template <typename V>
class Packer {
 public:
  using Value = typename V::Value;

  Packer(const Shape& shape, std::uint8_t* packed, std::size_t size)
      : shape_(shape), layout_(layout_of(shape)), packed_(packed) {
    if (size != layout_.total) fail("the buffer is not of the size of the packed weight");
    values_ = packed + layout_.values_at;
    width_ = layout_.tiles * V::kLayout.tile_inputs;
    block_values_.resize(static_cast<std::size_t>(kBlock * width_));
    clear();
    offset(0) = 0;
  }

  std::int64_t blocks() const { return layout_.blocks; }
  std::int64_t group_count() const { return layout_.group_count; }
  // Of the block to come. Nothing is stored in a row until it is written, nor behind in_features.
  Value* row(std::int64_t n) { return block_values_.data() + n * width_; }
  QuantGroup* groups() {
    return reinterpret_cast<QuantGroup*>(packed_ + layout_.groups_at) + block_ * layout_.group_count;
  }
  void clear() {
    std::memset(block_values_.data(), V::kNone, block_values_.size() * sizeof(Value));  // 0 or -1: the same in every byte
  }

  void finish_block() {
    constexpr std::int64_t kGroup = V::kLayout.group_inputs, kBitmapBytes = V::kLayout.tile_bitmap_bytes / kTileRows;
    std::uint8_t* bitmap = packed_ + layout_.bitmaps_at + block_ * layout_.tiles * V::kLayout.tile_bitmap_bytes;
    for (std::int64_t k = 0; k < width_; k += kGroup, bitmap += kBitmapBytes) {
      std::uint64_t bits = 0;
      std::uint8_t bytes[kBlock * kGroup * sizeof(Value)];
      const std::int64_t size = V::compress_row(block_values_.data() + k, width_, bits, bytes);
      for (std::int64_t i = 0; i < kBitmapBytes; ++i) bitmap[i] = static_cast<std::uint8_t>(bits >> (8 * i));
      written_ += size / V::kLayout.value_bytes;
      if (written_ > shape_.value_count) fail("the weight has more nonzeros than were counted");
      std::memcpy(values_, bytes, static_cast<std::size_t>(size));
      values_ += size;
    }
    offset(++block_) = static_cast<std::uint64_t>(written_);
  }

  void finish(std::int64_t nonzeros, const std::int32_t* order) {
    if (written_ != shape_.value_count) fail("the weight has fewer nonzeros than were counted");
    shape_.nonzeros = nonzeros;
    write_header(shape_, layout_, packed_);
    if (order) std::memcpy(packed_ + layout_.order_at, order, static_cast<std::size_t>(shape_.in_features) * sizeof(*order));
    std::memset(values_, 0, static_cast<std::size_t>(packed_ + layout_.total - values_));
  }

 private:
  std::uint64_t& offset(std::int64_t block) { return reinterpret_cast<std::uint64_t*>(packed_ + layout_.offsets_at)[block]; }

  Shape shape_;
  Layout layout_;
  std::uint8_t* packed_;
  std::int64_t written_ = 0, block_ = 0, width_ = 0;
  std::uint8_t* values_ = nullptr;
  std::vector<Value> block_values_;
};

void read_groups(const Source& source, std::int64_t output, std::int64_t count, QuantGroup* groups) {
  for (std::int64_t g = 0; g < count; ++g) {
    float scale;
    std::memcpy(&scale, source.scales + output * count + g, sizeof(scale));
    const std::uint8_t zero = source.zeros[output * count + g];
    check_group(scale, zero);
    groups[g].scales[output % kBlock] = scale;
    groups[g].zeros[output % kBlock] = zero;
  }
}

template <typename V>
void pack_typed(const Source& source, std::uint8_t* packed, std::size_t size) {
  const Shape shape = shape_of<V>(source);
  Packer<V> packer(shape, packed, size);
  const std::vector<std::int32_t> places = places_of(source.order, source.in_features);
  const std::int64_t group_count = packer.group_count();
  std::int64_t next = 0, equal = 0;  // values that are their zero
  for (std::int64_t block = 0; block < packer.blocks(); ++block) {
    packer.clear();
    QuantGroup* const groups = packer.groups();
    for (std::int64_t g = 0; g < group_count; ++g) groups[g] = {};
    for (std::int64_t n = 0; n < kBlock && block * kBlock + n < source.out_features; ++n) {
      if (V::kLayout.has_groups) read_groups(source, block * kBlock + n, group_count, groups);
      typename V::Value* const row = packer.row(n);
      next = for_each_value<V>(source, block * kBlock + n, next, [&](std::int64_t input, std::int64_t index) {
        const auto value = V::load(source.values, index);
        if constexpr (V::kLayout.has_groups) {
          const std::int64_t place = places.empty() ? input : places[static_cast<std::size_t>(input)];
          equal += value == groups[group_count > 1 ? place / source.group_size : 0].zeros[n];
          row[place] = value;
        } else {
          check_value<V>(value);
          row[input] = value;
        }
      });
    }
    if (V::kLayout.tile_bitmap_bytes && equal) fail("a stored value is its zero");
    packer.finish_block();
  }
  packer.finish(shape.nonzeros - equal, source.order);
}

template <typename V>
std::int64_t count_dense(const typename V::Value* dense, std::int64_t out_features, std::int64_t in_features,
                         std::int64_t row_stride) {
  std::int64_t count = 0;
  for (std::int64_t n = 0; n < out_features; ++n) {
    for (std::int64_t k = 0; k < in_features; ++k) count += V::is_stored(dense[n * row_stride + k]);
  }
  return count;
}

template <typename V>
void pack_dense_typed(const typename V::Value* dense, std::int64_t out_features, std::int64_t in_features,
                      std::int64_t row_stride, std::uint8_t* packed, std::size_t size) {
  using Value = typename V::Value;
  const std::int64_t nonzeros = count_dense<V>(dense, out_features, in_features, row_stride);
  Packer<V> packer({V::kType, out_features, in_features, nonzeros, nonzeros}, packed, size);
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
  packer.finish(nonzeros, nullptr);
  if (V::kDenseMayBeFaulty) check_contents(open_packed(packed, size));
}

// A block as expand_block gives it, but with kNone where nothing is stored, and groups not yet applied. Tile by tile: its 16 rows
// as they lie in memory, each 16 outputs x 4 bytes of inputs, then turned, which gives each output 64 bytes of its row.
template <typename V>
void read_block(const Weight& w, std::int64_t block, typename V::Value* dense) {
  using Value = typename V::Value;
  constexpr int kRowValues = 64 / sizeof(Value);
  constexpr std::int64_t kBitmapBytes = V::kLayout.tile_bitmap_bytes / kTileRows;
  const std::int64_t width = w.tiles * V::kLayout.tile_inputs;
  const std::uint8_t* bitmap = w.bitmaps + block * w.tiles * V::kLayout.tile_bitmap_bytes;
  const std::uint8_t* values = w.values + w.offsets[block] * static_cast<std::uint64_t>(V::kLayout.value_bytes);
  for (std::int64_t tile = 0; tile < w.tiles; ++tile) {
    Value rows[kTileRows * kRowValues];
    std::memset(rows, V::kNone, sizeof(rows));
    for (int row = 0; row < kTileRows; ++row, bitmap += kBitmapBytes) {
      values = V::expand_row(load_bits(bitmap, kBitmapBytes), values, rows + row * kRowValues);
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

// Calls use(group, n, first place, place behind the last) for each group of each output of a block.
template <typename Use>
void for_each_group(const Weight& w, std::int64_t block, std::int64_t width, Use use) {
  for (std::int64_t n = 0; n < kBlock; ++n) {
    for (std::int64_t g = 0; g < w.group_count; ++g) {
      const std::int64_t begin = g * w.group_rows * group_inputs(w.type);
      const std::int64_t end = g + 1 < w.group_count ? begin + w.group_rows * group_inputs(w.type) : width;
      use(w.groups[block * w.group_count + g], n, begin, end);
    }
  }
}

template <typename V>
void expand_block_typed(const Weight& w, std::int64_t block, typename V::Value* dense) {
  read_block<V>(w, block, dense);
  if constexpr (V::kLayout.has_groups) {
    using Value = typename V::Value;
    const std::int64_t width = w.tiles * V::kLayout.tile_inputs;
    for_each_group(w, block, width, [=](const QuantGroup& group, std::int64_t n, std::int64_t begin, std::int64_t end) {
      const Value zero = static_cast<Value>(group.zeros[n]);
      for (Value* code = dense + n * width + begin; code != dense + n * width + end; ++code) {
        *code = static_cast<Value>(*code < 0 ? 0 : *code - zero);
      }
    });
  }
}

template <typename V>
void unpack_typed(const Weight& w, const Target& target) {
  using Value = typename V::Value;
  const std::int64_t width = w.tiles * V::kLayout.tile_inputs, row_bytes = ceil_div(w.in_features, 8), groups = w.group_count;
  const std::vector<std::int32_t> places = places_of(w.order, w.in_features);
  std::vector<Value> block_values(static_cast<std::size_t>(kBlock * width)), in_order;
  if (!places.empty()) in_order.assign(static_cast<std::size_t>(width), V::kNone);
  std::uint8_t *const bitmask = target.bitmask, *const values = target.values;  // a store of a byte might have changed them
  std::int64_t next = 0;
  for (std::int64_t block = 0; block < w.blocks; ++block) {
    read_block<V>(w, block, block_values.data());
    for (std::int64_t n = 0; n < kBlock && block * kBlock + n < w.out_features; ++n) {
      const std::int64_t output = block * kBlock + n;
      for (std::int64_t g = 0; g < groups; ++g) {
        target.scales[output * groups + g] = w.groups[block * groups + g].scales[n];
        target.zeros[output * groups + g] = w.groups[block * groups + g].zeros[n];
      }
      Value* row = block_values.data() + n * width;
      if (!places.empty()) {
        for (std::size_t k = 0; k < places.size(); ++k) in_order[k] = row[places[k]];
        row = in_order.data();
      } else if (V::kNone < 0) {
        // all of a dense weight is stored, also what lies behind its edge
        std::memset(row + w.in_features, V::kNone, static_cast<std::size_t>(width - w.in_features) * sizeof(Value));
      }
      for (std::int64_t byte = 0; byte < row_bytes; ++byte, row += 8) {
        unsigned bits = 0;
        for (int k = 0; k < 8; ++k) {
          if (!V::is_stored(row[k])) continue;
          bits |= 1u << k;
          V::store(values, next++, row[k]);
        }
        if (V::kLayout.tile_bitmap_bytes) bitmask[output * row_bytes + byte] = static_cast<std::uint8_t>(bits);
      }
    }
  }
  if (target.order) std::memcpy(target.order, w.order, static_cast<std::size_t>(w.in_features) * sizeof(*w.order));
}

// Throws if a bit of a bitmap stands for a place outside of the weight.
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

template <typename V>
void check_plain_values(const Weight& w) {
  const auto count = static_cast<std::int64_t>(w.offsets[w.blocks]);
  bool faulty = false;  // which one, is asked only then: so the loop becomes vectors
  for (std::int64_t i = 0; i < count; ++i) faulty |= V::fault(V::load(w.values, i)) != nullptr;
  for (std::int64_t i = 0; faulty && i < count; ++i) check_value<V>(V::load(w.values, i));
}

template <typename V>
void check_grouped_values(const Weight& w) {
  constexpr bool kDense = !V::kLayout.tile_bitmap_bytes;
  const std::int64_t width = w.tiles * V::kLayout.tile_inputs;
  places_of(w.order, w.in_features);
  std::vector<typename V::Value> codes(static_cast<std::size_t>(kBlock * width));
  std::int64_t nonzeros = 0;
  for (std::int64_t block = 0; block < w.blocks; ++block) {
    read_block<V>(w, block, codes.data());
    for_each_group(w, block, width, [&](const QuantGroup& group, std::int64_t n, std::int64_t begin, std::int64_t end) {
      const bool outside = block * kBlock + n >= w.out_features;
      check_group(group.scales[n], group.zeros[n]);
      if (outside && (group.scales[n] != 0 || group.zeros[n] != 0)) fail("a group reaches outside of the weight");
      for (std::int64_t k = begin; k < end; ++k) {
        const int code = codes[static_cast<std::size_t>(n * width + k)];
        if (outside || k >= w.in_features) {
          if (code > 0) fail("a value lies outside of the weight");  // of sparse ones the edges have told
        } else if (code == group.zeros[n]) {
          if (!kDense) fail("a stored value is its zero");
        } else {
          nonzeros += code >= 0;
        }
      }
    });
  }
  if (nonzeros != w.nonzeros) fail("the number of nonzeros is another");
}

template <typename V>
void check_contents_typed(const Weight& w) {
  constexpr std::int64_t kBitmapBytes = V::kLayout.tile_bitmap_bytes / kTileRows;
  const std::int64_t rows = w.tiles * kTileRows;
  if (w.offsets[0] != 0) fail("the first offset is not 0");
  // In order first, then the counts: after this loop no offset leaves the values.
  for (std::int64_t block = 0; block < w.blocks; ++block) {
    if (w.offsets[block + 1] < w.offsets[block]) fail("the offsets are not in order");
    const std::int64_t count = V::count_of(w.bitmaps + block * rows * kBitmapBytes, rows);
    if (w.offsets[block + 1] - w.offsets[block] != static_cast<std::uint64_t>(count)) {
      fail("the population count of block " + std::to_string(block) + " is not the number of its values");
    }
  }
  if constexpr (kBitmapBytes != 0) {
    if constexpr (!V::kWholeBytes) {
      if (count_bits(w.bitmaps, static_cast<std::size_t>(w.blocks * rows * kBitmapBytes)) != w.nonzeros) {
        fail("the population count is not the number of nonzeros");
      }
    }
    check_bitmap_edges(w);
    if constexpr (!V::kWholeBytes) {
      const std::uint8_t* values = w.values;
      for (std::int64_t row = 0; row < w.blocks * rows; ++row) {
        const int count = population_count(load_bits(w.bitmaps + row * kBitmapBytes, kBitmapBytes));
        if (count % 2 && V::load(values, count)) fail("a row has a value too many");
        values += V::bytes_of(count);
      }
    }
  }
  if constexpr (V::kLayout.has_groups) {
    check_grouped_values<V>(w);
  } else {
    check_plain_values<V>(w);
  }
}

// Of the types that a dense weight can have.
template <typename Use>
auto with_dense_type(ValueType type, Use use) {
  if (type == ValueType::kBf16) return use(Bf16{});
  if (type != ValueType::kInt8) fail("a dense weight must be bf16 or int8");
  return use(Int8{});
}

}  // namespace

std::size_t packed_bytes(const Source& source) {
  return with_value_type(source.type, [&](auto v) { return layout_of(shape_of<decltype(v)>(source)).total; });
}

void pack(const Source& source, std::uint8_t* packed, std::size_t size) {
  with_value_type(source.type, [&](auto v) { pack_typed<decltype(v)>(source, packed, size); });
}

void unpack(const Weight& weight, const Target& target) {
  with_value_type(weight.type, [&](auto v) { unpack_typed<decltype(v)>(weight, target); });
}

std::int64_t count_nonzeros(ValueType type, const void* dense, std::int64_t out_features, std::int64_t in_features,
                            std::int64_t row_stride) {
  return with_dense_type(type, [&](auto v) {
    using V = decltype(v);
    return count_dense<V>(static_cast<const typename V::Value*>(dense), out_features, in_features, row_stride);
  });
}

std::size_t packed_bytes(ValueType type, std::int64_t out_features, std::int64_t in_features, std::int64_t nonzeros) {
  return layout_of({type, out_features, in_features, nonzeros, nonzeros}).total;
}

void pack_dense(ValueType type, const void* dense, std::int64_t out_features, std::int64_t in_features,
                std::int64_t row_stride, std::uint8_t* packed, std::size_t size) {
  with_dense_type(type, [&](auto v) {
    using V = decltype(v);
    pack_dense_typed<V>(static_cast<const typename V::Value*>(dense), out_features, in_features, row_stride, packed, size);
  });
}

void expand_block(const Weight& weight, std::int64_t block, void* target) {
  with_value_type(weight.type, [&](auto v) {
    using V = decltype(v);
    expand_block_typed<V>(weight, block, static_cast<typename V::Value*>(target));
  });
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
  with_value_type(weight.type, [&](auto v) { check_contents_typed<decltype(v)>(weight); });
}

}  // namespace peft_elastic
