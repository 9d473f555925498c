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

// What of a decoding step depends on the instructions: attention, and the products with dense weights. Included by the levels,
// which compile it for their own instructions; loops and no intrinsics, which the compiler puts into vectors.
#pragma once

#include <cstdint>
#include <limits>

#include "kernels.h"
#include "lanes.h"

namespace peft_elastic {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity(), kNan = std::numeric_limits<float>::quiet_NaN();

PE_INLINE float largest_of(const float* values, std::int64_t count) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = -kInfinity;
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = values[i + lane] > lanes[lane] ? values[i + lane] : lanes[lane];
  }
  float largest = lanes[0];
  for (int lane = 1; lane < kLanes; ++lane) largest = largest < lanes[lane] ? lanes[lane] : largest;
  for (; i < count; ++i) largest = largest < values[i] ? values[i] : largest;
  return largest;
}

// Scores to weights, in place; returns the inverse of their sum, or 0 where no position is seen.
PE_INLINE float softmax(float* scores, std::int64_t count) {
  const float largest = largest_of(scores, count);
  if (largest == -kInfinity) {
    bool hidden = true;  // and not NaN, which goes into the result
    for (std::int64_t i = 0; i < count; ++i) hidden = hidden && scores[i] == largest;
    for (std::int64_t i = 0; i < count; ++i) scores[i] = 0.0f;
    return hidden ? 0.0f : kNan;
  }
  float sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float score = scores[i + lane];
      const float weight = fast_exp(score - largest);
      scores[i + lane] = score == -kInfinity ? 0.0f : weight;
      sums[lane] += scores[i + lane];
    }
  }
  for (int lane = 0; i < count; ++i, ++lane) {
    scores[i] = scores[i] == -kInfinity ? 0.0f : fast_exp(scores[i] - largest);
    sums[lane] += scores[i];
  }
  return 1.0f / sum_of(sums);
}

// One query of one head over `count` positions: sum over t of softmax(scaling q K[t]) V[t], to `output` in the type T.
template <typename T>
PE_INLINE void attend_head(const float* query, const T* keys, const T* values, const std::uint8_t* mask, std::int64_t count,
                           std::int64_t dim, float scaling, float* scores, float* sums, T* output) {
  for (std::int64_t t = 0; t < count; ++t) scores[t] = scaling * dot(query, keys + t * dim, dim);
  if (mask) {
    for (std::int64_t t = 0; t < count; ++t) {
      if (!mask[t]) scores[t] = -kInfinity;
    }
  }
  const float scale = softmax(scores, count);
  for (std::int64_t d = 0; d < dim; ++d) sums[d] = 0;
  std::int64_t t = 0;
  for (; t + 4 <= count; t += 4) {
    const T* v = values + t * dim;
    const float w0 = scores[t], w1 = scores[t + 1], w2 = scores[t + 2], w3 = scores[t + 3];
    for (std::int64_t d = 0; d < dim; ++d) {
      sums[d] += (w0 * widen(v[d]) + w1 * widen(v[dim + d])) + (w2 * widen(v[2 * dim + d]) + w3 * widen(v[3 * dim + d]));
    }
  }
  for (; t < count; ++t) {
    for (std::int64_t d = 0; d < dim; ++d) sums[d] += scores[t] * widen(values[t * dim + d]);
  }
  for (std::int64_t d = 0; d < dim; ++d) store(output + d, sums[d] * scale);
}

template <typename T>
PE_INLINE void attend_heads(const Attention& job, std::int64_t first, std::int64_t last) {
  for (std::int64_t unit = first; unit < last; ++unit) {
    const std::int64_t row = unit / job.heads, head = unit % job.heads;
    const std::int64_t at = (row * job.kv_heads + head / (job.heads / job.kv_heads)) * job.capacity * job.head_dim;
    float* scores = job.scores + unit * job.scores_stride;
    attend_head(job.queries + unit * job.head_dim, static_cast<const T*>(job.keys) + at, static_cast<const T*>(job.values) + at,
           job.mask ? job.mask + row * job.count : nullptr, job.count, job.head_dim, job.scaling, scores,
           scores + job.count, static_cast<T*>(job.output) + unit * job.head_dim);
  }
}

// `attend` of a level.
void attend(const Attention& job, std::int64_t first, std::int64_t last) {
  if (job.type == FloatType::kFloat32) {
    attend_heads<float>(job, first, last);
  } else {
    attend_heads<std::uint16_t>(job, first, last);
  }
}

// Fetches what lies 8 KiB behind a row, which is faster than the processor's own prefetching (measured on AMD Zen 5).
PE_INLINE void prefetch_row(const void* row, std::int64_t bytes) {
#if defined(__GNUC__)
  const auto ahead = reinterpret_cast<std::uintptr_t>(row) + 8192;
  for (std::int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(reinterpret_cast<const void*>(ahead + static_cast<std::uintptr_t>(i)));
#endif
}

template <typename T>
PE_INLINE void multiply_dense_rows(const DenseProduct& job, std::int64_t first, std::int64_t last) {
  for (std::int64_t n = first; n < last; ++n) {
    const T* weight = static_cast<const T*>(job.weight) + n * job.in_features;
    prefetch_row(weight, job.in_features * static_cast<std::int64_t>(sizeof(T)));
    float bias = 0;
    if (job.bias) {
      bias = job.bias_type == FloatType::kFloat32 ? static_cast<const float*>(job.bias)[n]
                                                  : widen(static_cast<const std::uint16_t*>(job.bias)[n]);
    }
    for (std::int64_t m = 0; m < job.rows; ++m) {
      job.y[m * job.out_features + n] = dot(job.x + m * job.in_features, weight, job.in_features) + bias;
    }
  }
}

// `dense` of a level.
void multiply_dense(const DenseProduct& job, std::int64_t first, std::int64_t last) {
  if (job.type == FloatType::kFloat32) {
    multiply_dense_rows<float>(job, first, last);
  } else {
    multiply_dense_rows<std::uint16_t>(job, first, last);
  }
}

}  // namespace
}  // namespace peft_elastic
