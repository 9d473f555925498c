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

#include "linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "floats.h"
#include "pack.h"
#include "threads.h"

namespace peft_elastic {
namespace {

float widen_fp16(std::uint16_t value) {
  const std::uint32_t sign = static_cast<std::uint32_t>(value & 0x8000u) << 16;
  const std::uint32_t magnitude = value & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Exponents differ by 112; the product is exact, subnormal numbers included.
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude << 13) * bits_to_float(0x77800000u)));
}

std::uint16_t round_to_fp16(float value) {
  const std::uint32_t bits = float_to_bits(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x47800000u) return sign | 0x7c00u;  // 65536 and more; what rounds up to it is handled below
  if (magnitude < 0x38800000u) {                        // below 2^-14: a multiple of 2^-24, rounded by the addition
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<std::uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

float load_float(const void* p, FloatType type, std::int64_t index) {
  switch (type) {
    case FloatType::kFloat32: return static_cast<const float*>(p)[index];
    case FloatType::kBfloat16: return widen_bf16(static_cast<const std::uint16_t*>(p)[index]);
    default: return widen_fp16(static_cast<const std::uint16_t*>(p)[index]);
  }
}

void store_float(void* p, FloatType type, std::int64_t index, float value) {
  switch (type) {
    case FloatType::kFloat32: static_cast<float*>(p)[index] = value; break;
    case FloatType::kBfloat16: static_cast<std::uint16_t*>(p)[index] = round_to_bf16(value); break;
    default: static_cast<std::uint16_t*>(p)[index] = round_to_fp16(value); break;
  }
}

// order: which element comes where, or null: as they come.
void widen(const void* source, FloatType type, std::int64_t count, const std::int32_t* order, float* target) {
  if (order) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = load_float(source, type, order[i]);
    return;
  }
  if (type == FloatType::kFloat32) {
    std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(float));
  } else if (type == FloatType::kBfloat16) {
    for (std::int64_t i = 0; i < count; ++i) target[i] = widen_bf16(static_cast<const std::uint16_t*>(source)[i]);
  } else {
    for (std::int64_t i = 0; i < count; ++i) target[i] = widen_fp16(static_cast<const std::uint16_t*>(source)[i]);
  }
}

const std::uint8_t* advance(const void* p, FloatType type, std::int64_t elements) {
  return static_cast<const std::uint8_t*>(p) + elements * (type == FloatType::kFloat32 ? 4 : 2);
}

// Memory of the calling thread, aligned to 64 bytes, kept between calls: a token calls hundreds of layers.
class Workspace {
 public:
  std::uint8_t* reserve(std::size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(static_cast<std::uint8_t*>(::operator new(bytes, std::align_val_t{kAlignment})));
      size_ = bytes;
    }
    return memory_.get();
  }

 private:
  struct Delete {
    void operator()(std::uint8_t* p) const { ::operator delete(p, std::align_val_t{kAlignment}); }
  };
  std::unique_ptr<std::uint8_t, Delete> memory_;
  std::size_t size_ = 0;
};

thread_local Workspace t_workspace;

// Rounds a row to int8. Returns its scale; a row with a NaN or an infinity has the scale NaN and so yields NaN. Written so that
// compilers vectorize it: sizes are compared as integers, and an addition rounds to nearest, ties to even.
float quantize_row(const float* x, std::int64_t count, std::int8_t* target) {
  std::int32_t largest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, static_cast<std::int32_t>(float_to_bits(x[i]) & 0x7fffffffu));
  }
  const bool finite = largest < 0x7f800000;
  if (!finite || largest == 0) {
    std::memset(target, 0, static_cast<std::size_t>(count));
    return finite ? 0.0f : std::nanf("");
  }
  const float scale = bits_to_float(static_cast<std::uint32_t>(largest)) / 127.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: the sum has no place for fractions
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = std::max(-127.0f, std::min(127.0f, x[i] / scale));
    target[i] = static_cast<std::int8_t>(float_to_bits(value + kRound));
  }
  return scale;
}

// Splits the blocks among the parts by the bytes that they read.
class Partition {
 public:
  Partition(const Weight& w, int parts) : w_(w), parts_(parts) {}
  std::int64_t first(int part) const {
    const std::uint64_t goal = cost(w_.blocks) / static_cast<std::uint64_t>(parts_) * static_cast<std::uint64_t>(part);
    if (part >= parts_) return w_.blocks;
    std::int64_t low = 0, high = w_.blocks;
    while (low < high) {
      const std::int64_t middle = low + (high - low) / 2;
      if (cost(middle) < goal) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

 private:
  std::uint64_t cost(std::int64_t blocks) const {
    return w_.offsets[blocks] * static_cast<std::uint64_t>(value_bytes(w_.type)) +
           static_cast<std::uint64_t>(blocks * w_.tiles * tile_bitmap_bytes(w_.type)) +
           static_cast<std::uint64_t>(blocks * w_.group_count) * sizeof(QuantGroup);
  }
  const Weight& w_;
  int parts_;
};

// One pass over the weight, for at most kMaxRows rows of x.
struct Pass {
  const LinearCall* call;
  Kernel kernel;
  const void* inputs;
  std::int64_t input_stride, rows, first_row, sums_stride;
  const float* input_scales;  // int8 activations: one for each row
  float* sums;
  std::uint8_t* scratch;  // kScratchBytes for each part
  int parts;
};

void finish_rows(const Pass& pass, std::int64_t first, std::int64_t last) {
  const LinearCall& call = *pass.call;
  const std::int64_t begin = first * kBlock, end = std::min(last * kBlock, call.weight.out_features);
  for (std::int64_t m = 0; m < pass.rows; ++m) {
    float* sums = pass.sums + m * pass.sums_stride;
    const float input_scale = pass.input_scales ? pass.input_scales[m] : 1.0f;
    if (call.scales) {
      for (std::int64_t n = begin; n < end; ++n) sums[n] *= call.scales[n] * input_scale;
    }
    if (call.bias) {
      for (std::int64_t n = begin; n < end; ++n) sums[n] += load_float(call.bias, call.bias_type, n);
    }
    const std::int64_t at = (pass.first_row + m) * call.weight.out_features;
    for (std::int64_t n = begin; n < end; ++n) store_float(call.y, call.y_type, at + n, sums[n]);
  }
}

void run_part(void* data, int part) {
  const Pass& pass = *static_cast<const Pass*>(data);
  const Weight& w = pass.call->weight;
  const Partition partition(w, pass.parts);
  const std::int64_t first = partition.first(part), last = partition.first(part + 1);
  if (first == last) return;
  pass.kernel(w, pass.inputs, pass.input_stride, pass.rows, first, last, pass.sums, pass.sums_stride,
              pass.scratch + static_cast<std::size_t>(part) * kScratchBytes);
  finish_rows(pass, first, last);
}

}  // namespace

void linear(const LinearCall& call, const Kernels& kernels) {
  const Weight& w = call.weight;
  const std::int64_t width = w.tiles * tile_inputs(w.type);
  const bool bf16_inputs =
      w.type == ValueType::kBf16 && call.x_type == FloatType::kBfloat16 && kernels.own[index_of(w.type)];
  const auto kernel_of = [&](const Kernels& table) {
    return (bf16_inputs || call.int8_activations ? table.own : table.floats)[index_of(w.type)];
  };
  Pass pass{};
  pass.call = &call;
  pass.kernel = kernel_of(kernels) ? kernel_of(kernels) : kernel_of(*portable_kernels());
  const FloatType kernel_type = bf16_inputs ? FloatType::kBfloat16 : FloatType::kFloat32;
  const bool direct = !call.int8_activations && call.x_type == kernel_type && w.in_features == width && !w.order;

  const std::int64_t chunk = std::min(call.rows, kMaxRows);
  pass.parts = static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>(call.threads, w.blocks)));
  pass.sums_stride = w.blocks * kBlock;
  const std::size_t sums_bytes = static_cast<std::size_t>(chunk * pass.sums_stride) * sizeof(float);
  const std::size_t input_bytes = direct ? 0 : static_cast<std::size_t>(chunk * width) * sizeof(float);
  const std::size_t int8_bytes = call.int8_activations ? static_cast<std::size_t>(chunk * width) : 0;
  const std::size_t scratch_bytes = static_cast<std::size_t>(pass.parts) * kScratchBytes;
  std::uint8_t* const memory = t_workspace.reserve(scratch_bytes + sums_bytes + input_bytes + int8_bytes);
  pass.scratch = memory;
  pass.sums = reinterpret_cast<float*>(memory + scratch_bytes);
  std::uint8_t* const converted = memory + scratch_bytes + sums_bytes;
  auto* const int8_inputs = reinterpret_cast<std::int8_t*>(converted + input_bytes);
  float input_scales[kMaxRows];

  for (std::int64_t first = 0; first < call.rows; first += chunk) {
    pass.first_row = first;
    pass.rows = std::min(chunk, call.rows - first);
    pass.inputs = advance(call.x, call.x_type, first * call.x_stride);
    pass.input_stride = call.x_stride;
    if (!direct) {
      pass.inputs = converted;
      pass.input_stride = width;
      for (std::int64_t m = 0; m < pass.rows; ++m) {
        const std::uint8_t* source = advance(call.x, call.x_type, (first + m) * call.x_stride);
        if (bf16_inputs) {
          auto* row = reinterpret_cast<std::uint16_t*>(converted) + m * width;
          std::memcpy(row, source, static_cast<std::size_t>(w.in_features) * 2);
          std::memset(row + w.in_features, 0, static_cast<std::size_t>(width - w.in_features) * 2);
          continue;
        }
        float* row = reinterpret_cast<float*>(converted) + m * width;
        widen(source, call.x_type, w.in_features, w.order, row);
        std::fill(row + w.in_features, row + width, 0.0f);
        if (call.int8_activations) input_scales[m] = quantize_row(row, width, int8_inputs + m * width);
      }
    }
    if (call.int8_activations) {
      pass.inputs = int8_inputs;
      pass.input_scales = input_scales;
    }
    run_parallel(pass.parts, &run_part, &pass);
  }
}

namespace {

struct DenseJob {
  const Weight* weight;
  const float* scales;
  std::int64_t first_row, rows;
  void* target;
  FloatType type;
  std::uint8_t* staging;  // of each part: one block
  std::size_t staging_bytes;
  int parts;
};

template <typename Load>
void convert_values(const DenseJob& job, std::int64_t at, Load load) {
  const std::int64_t count = job.weight->in_features;
  if (job.type == FloatType::kFloat32) {
    float* const target = static_cast<float*>(job.target) + at;
    for (std::int64_t k = 0; k < count; ++k) target[k] = load(k);
  } else if (job.type == FloatType::kBfloat16) {
    std::uint16_t* const target = static_cast<std::uint16_t*>(job.target) + at;
    for (std::int64_t k = 0; k < count; ++k) target[k] = round_to_bf16(load(k));
  } else {
    std::uint16_t* const target = static_cast<std::uint16_t*>(job.target) + at;
    for (std::int64_t k = 0; k < count; ++k) target[k] = round_to_fp16(load(k));
  }
}

// A row of the weight as the type that was asked for.
template <typename V>
void convert_row(const DenseJob& job, const typename V::Value* values, std::int64_t row) {
  const Weight& w = *job.weight;
  const std::int64_t at = (row - job.first_row) * w.in_features;
  if constexpr (V::kLayout.has_groups) {
    const QuantGroup* const groups = w.groups + row / kBlock * w.group_count;
    for (std::int64_t place = 0; place < w.in_features; ++place) {
      const std::int64_t group = w.group_count > 1 ? place / w.group_size : 0;
      const float value = groups[group].scales[row % kBlock] * static_cast<float>(values[place]);
      store_float(job.target, job.type, at + (w.order ? w.order[place] : place), value);
    }
  } else if constexpr (V::kLayout.has_row_scales) {
    const float scale = job.scales[row];
    convert_values(job, at, [=](std::int64_t k) { return static_cast<float>(V::widen(values[k])) * scale; });
  } else if (V::kType == ValueType::kBf16 && job.type == FloatType::kBfloat16) {
    std::memcpy(static_cast<std::uint16_t*>(job.target) + at, values, static_cast<std::size_t>(w.in_features) * 2);
  } else {
    convert_values(job, at, [=](std::int64_t k) { return V::widen(values[k]); });
  }
}

template <typename V>
void run_dense_part(void* data, int part) {
  const DenseJob& job = *static_cast<const DenseJob*>(data);
  const Weight& w = *job.weight;
  std::uint8_t* const staging = job.staging + static_cast<std::size_t>(part) * job.staging_bytes;
  const std::int64_t last_row = job.first_row + job.rows;
  const std::int64_t width = w.tiles * V::kLayout.tile_inputs;
  // Blocks in turn, so that no block is expanded by two threads.
  for (std::int64_t block = job.first_row / kBlock + part; block * kBlock < last_row; block += job.parts) {
    expand_block(w, block, staging);
    const std::int64_t end = std::min(last_row, (block + 1) * kBlock);
    for (std::int64_t row = std::max(job.first_row, block * kBlock); row < end; ++row) {
      convert_row<V>(job, reinterpret_cast<const typename V::Value*>(staging) + row % kBlock * width, row);
    }
  }
}

}  // namespace

void dense_rows(const Weight& weight, const float* scales, std::int64_t first_row, std::int64_t rows, void* target,
                FloatType type, int threads) {
  DenseJob job{&weight, scales, first_row, rows, target, type, nullptr, 0, std::max(1, threads)};
  // Tiles are 64 bytes wide, so every block of the staging area stays aligned.
  job.staging_bytes =
      static_cast<std::size_t>(kBlock * weight.tiles * tile_inputs(weight.type) * value_bytes(weight.type));
  job.staging = t_workspace.reserve(job.staging_bytes * static_cast<std::size_t>(job.parts));
  const auto body = with_value_type(weight.type, [](auto v) { return &run_dense_part<decltype(v)>; });
  run_parallel(job.parts, body, &job);
}

}  // namespace peft_elastic
