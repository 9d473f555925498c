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

// One decoding step through a stack of Llama-like layers with packed weights, or dense ones among them: what lies around the
// linear layers, without the many small operators that it takes elsewhere.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"
#include "linear.h"

namespace peft_elastic {

struct DecodeLinear {
  std::int64_t out_features, in_features;
  Weight weight;      // packed, unless there is a
  const void* dense;  // [out_features, in_features] of the model's type
  const float* scales;
  const void* bias;
  FloatType bias_type;
};

struct DecodeNorm {
  const void* weight;  // of the model's type; null: no norm here
  float epsilon;
};

// h += o(attention(rotate(q(norm h)), rotate(k(norm h)), v(norm h))), then h += down(silu(gate(norm h)) * up(norm h)).
struct DecodeLayer {
  DecodeLinear q, k, v, o, gate, up, down;
  DecodeNorm input_norm, mlp_norm, q_norm, k_norm;  // the last two over each head
  float scaling;                                    // of the attention scores
};

struct DecodeModel {
  FloatType type;  // of activations, norms, rotary embedding and cache: float32 or bfloat16
  std::int64_t hidden_size, head_dim;
  std::vector<DecodeLayer> layers;
};

// Throws std::invalid_argument if the shapes do not fit together.
void check_layer(const DecodeModel& model, const DecodeLayer& layer);

struct DecodeCall {
  std::int64_t batch, length, capacity;  // positions that the cache holds, and has room for (more than `length`)
  const void* hidden;                    // [batch, hidden_size]
  const void *cos, *sin;                 // [batch or 1, head_dim]
  bool rotary_per_row;                   // `batch` rows of them
  const std::uint8_t* mask;              // [batch, length + 1], 0 where a position is hidden; null: all are seen
  void* const* keys;                     // of each layer: [batch, kv_heads, capacity, head_dim]; the new ones are added
  void* const* values;
  void* output;  // [batch, hidden_size], before the last norm
  int threads;
};

// Between the layers, inside norms, attention and activations everything is float32; the inputs of the linear layers and
// the cache are of the model's type. Throws std::bad_alloc.
void decode(const DecodeModel& model, const DecodeCall& call, const Kernels& kernels);

// y = x W^T + b with a dense W, for few rows of x: as fast as W comes from memory. Everything is contiguous and of one type,
// float32 or bfloat16; sums are float32.
struct DenseCall {
  const void* x;  // [rows, in_features]
  std::int64_t rows, out_features, in_features;
  const void* weight;  // [out_features, in_features]
  const void* bias;    // [out_features] or null
  void* y;             // [rows, out_features]
  FloatType type;
  int threads;
};

// Throws std::bad_alloc.
void dense_linear(const DenseCall& call, const Kernels& kernels);

}  // namespace peft_elastic
