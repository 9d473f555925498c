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

// Mutated checkpoints and packed weights: each is refused with std::invalid_argument, or is in order after all and then goes
// through unpacking and every kernel of the portable level. Built with sanitizers by test_levels.py.
// Usage: fuzz_pack COUNT SEED

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <vector>

#include "kernels.h"
#include "pack.h"

using namespace peft_elastic;

namespace {

struct Free {
  void operator()(std::uint8_t* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using Buffer = std::unique_ptr<std::uint8_t, Free>;

Buffer allocate(std::size_t bytes) { return Buffer(static_cast<std::uint8_t*>(::operator new(bytes ? bytes : 1, std::align_val_t{64}))); }

void use(const Weight& w) {
  const ValueLayout& layout = value_layout(w.type);
  const auto count = static_cast<std::size_t>(layout.tile_bitmap_bytes ? w.nonzeros : w.out_features * w.in_features);
  std::vector<std::uint8_t> bitmask(static_cast<std::size_t>(w.out_features * ((w.in_features + 7) / 8)));
  std::vector<std::uint8_t> values(layout.has_groups ? (count + 1) / 2 : count * static_cast<std::size_t>(layout.value_bytes));
  std::vector<std::uint8_t> zeros(static_cast<std::size_t>(w.out_features * w.group_count));
  std::vector<float> scales(zeros.size());
  std::vector<std::int32_t> order(w.order ? static_cast<std::size_t>(w.in_features) : 0);
  unpack(w, {layout.tile_bitmap_bytes ? bitmask.data() : nullptr, values.data(), scales.data(), zeros.data(),
             w.order ? order.data() : nullptr});
  std::vector<float> x(static_cast<std::size_t>(w.tiles * 64), 1.0f), sums(static_cast<std::size_t>(w.blocks * 16));
  Buffer scratch = allocate(kScratchBytes);
  const Kernel kernel = portable_kernels()->floats[index_of(w.type)];
  kernel(w, x.data(), w.tiles * layout.tile_inputs, 1, 0, w.blocks, sums.data(), w.blocks * 16, scratch.get());
}

// One mutated int4 weight: on disk, or packed.
void try_int4(std::mt19937& random) {
  const bool dense = random() % 2;
  const auto out = static_cast<std::int64_t>(1 + random() % 40), in = static_cast<std::int64_t>(1 + random() % 140);
  std::int64_t group_size = 4 * (1 + static_cast<std::int64_t>(random() % 40));
  const std::int64_t groups = (in + group_size - 1) / group_size, row_bytes = (in + 7) / 8;
  std::vector<std::uint8_t> bitmask(static_cast<std::size_t>(out * row_bytes)), zeros(static_cast<std::size_t>(out * groups), 3);
  std::vector<float> scales(zeros.size(), 0.5f);
  std::size_t count = static_cast<std::size_t>(out * in);
  if (!dense) {
    count = 0;
    for (std::int64_t i = 0; i < out * in; ++i) {
      if (random() % 2) continue;
      bitmask[static_cast<std::size_t>(i / in * row_bytes + i % in / 8)] |= static_cast<std::uint8_t>(1u << (i % in % 8));
      ++count;
    }
  }
  std::vector<std::uint8_t> values((count + 1) / 2, 0x75);
  if (count % 2) values.back() = 5;
  std::vector<std::int32_t> order(static_cast<std::size_t>(in));
  for (std::size_t i = 0; i < order.size(); ++i) order[order.size() - 1 - i] = static_cast<std::int32_t>(i);
  const bool on_disk = random() % 2, with_order = random() % 2;
  std::int64_t claimed_in = in;
  if (on_disk) {
    switch (random() % 8) {
      case 0: bitmask[random() % bitmask.size()] ^= static_cast<std::uint8_t>(1u << random() % 8); break;
      case 1: if (!values.empty()) values[random() % values.size()] = static_cast<std::uint8_t>(random()); break;
      case 2: values.resize(random() % (values.size() + 1)); break;
      case 3: bitmask.resize(random() % bitmask.size() + 1); break;
      case 4: zeros[random() % zeros.size()] = static_cast<std::uint8_t>(random()); break;
      case 5: order[random() % order.size()] = static_cast<std::int32_t>(random()); break;
      case 6: group_size = static_cast<std::int64_t>(random() % 8) ? group_size : -group_size; break;
      default: scales[random() % scales.size()] = random() % 2 ? INFINITY : 1.0f; break;
    }
    // scales and zeros are of the size that the caller has checked; all other lengths are checked here
    if (group_size < 0) claimed_in = -1;
  }
  const Source source{dense ? ValueType::kInt4Dense : ValueType::kInt4, out, claimed_in, dense ? nullptr : bitmask.data(),
                      bitmask.size(), values.data(), values.size(), group_size, scales.data(), zeros.data(),
                      with_order ? order.data() : nullptr};
  std::size_t size = packed_bytes(source);
  Buffer packed = allocate(size);
  pack(source, packed.get(), size);
  if (!on_disk) {
    for (unsigned flips = 1 + random() % 3; flips; --flips) {
      const std::size_t limit = random() % 2 ? sizeof(Header) : size;
      packed.get()[random() % limit] ^= static_cast<std::uint8_t>(1u << random() % 8);
    }
    if (random() % 4 == 0) {
      size = random() % size;
      Buffer shorter = allocate(size);
      std::memcpy(shorter.get(), packed.get(), size);
      packed = std::move(shorter);
    }
  }
  const Weight w = open_packed(packed.get(), size);
  check_contents(w);
  use(w);
}

}  // namespace

int main(int argc, char** argv) {
  const long count = argc > 1 ? std::atol(argv[1]) : 1000;
  std::mt19937 random(argc > 2 ? static_cast<unsigned>(std::atol(argv[2])) : 0);
  long refused = 0, accepted = 0;
  for (long round = 0; round < count; ++round) {
    if (random() % 2) {
      try {
        try_int4(random);
        ++accepted;
      } catch (const std::invalid_argument&) {
        ++refused;
      }
      continue;
    }
    const auto type = static_cast<ValueType>(random() % 2);
    const auto out_features = static_cast<std::int64_t>(1 + random() % 40);
    const auto in_features = static_cast<std::int64_t>(1 + random() % 140);
    std::vector<std::uint16_t> dense(static_cast<std::size_t>(out_features * in_features));
    for (auto& value : dense) value = random() % 2 ? static_cast<std::uint16_t>(0x3f81) : 0;  // bytes 0x81, 0x3f as int8
    const std::int64_t nonzeros = count_nonzeros(type, dense.data(), out_features, in_features, in_features);
    std::size_t size = packed_bytes(type, out_features, in_features, nonzeros);
    Buffer packed = allocate(size);
    pack_dense(type, dense.data(), out_features, in_features, in_features, packed.get(), size);
    try {
      if (random() % 2) {  // the form on disk
        std::vector<std::uint8_t> bitmask(static_cast<std::size_t>(out_features * ((in_features + 7) / 8)));
        std::vector<std::uint8_t> values(static_cast<std::size_t>(nonzeros * value_bytes(type)));
        unpack(open_packed(packed.get(), size), {bitmask.data(), values.data(), nullptr, nullptr, nullptr});
        std::int64_t claimed_out = out_features, claimed_in = in_features;
        switch (random() % 6) {
          case 0: if (!bitmask.empty()) bitmask[random() % bitmask.size()] ^= static_cast<std::uint8_t>(1u << random() % 8); break;
          case 1: if (!values.empty()) values[random() % values.size()] = static_cast<std::uint8_t>(random()); break;
          case 2: bitmask.resize(random() % (bitmask.size() + 1)); break;
          case 3: values.resize(random() % (values.size() + 1)); break;
          case 4: claimed_out = random() % 8 ? 1 + random() % 60 : static_cast<std::int64_t>(random()) << 31; break;
          default: claimed_in = random() % 8 ? 1 + random() % 200 : -static_cast<std::int64_t>(random()); break;
        }
        const Source source{type, claimed_out, claimed_in, bitmask.data(), bitmask.size(), values.data(), values.size(), 0, nullptr,
                            nullptr, nullptr};
        size = packed_bytes(source);
        Buffer again = allocate(size);
        pack(source, again.get(), size);
        const Weight w = open_packed(again.get(), size);
        check_contents(w);
        use(w);
      } else {
        for (unsigned flips = 1 + random() % 3; flips; --flips) {
          const std::size_t limit = random() % 2 ? sizeof(Header) : size;
          packed.get()[random() % limit] ^= static_cast<std::uint8_t>(1u << random() % 8);
        }
        if (random() % 4 == 0) {
          const std::size_t cut = random() % size;
          Buffer shorter = allocate(cut);
          std::memcpy(shorter.get(), packed.get(), cut);
          packed = std::move(shorter);
          size = cut;
        }
        const Weight w = open_packed(packed.get(), size);
        check_contents(w);
        use(w);
      }
      ++accepted;
    } catch (const std::invalid_argument&) {
      ++refused;
    }
  }
  std::printf("%ld refused, %ld accepted\n", refused, accepted);
  return 0;
}
