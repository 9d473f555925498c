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

// The Python module peft_elastic._C.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu_features.h"
#include "decode.h"
#include "dispatch.h"
#include "effective.h"
#include "linear.h"
#include "pack.h"
#include "threads.h"

// What this is built from, given by setup.py without quotes.
#define PEFT_ELASTIC_TEXT_OF(x) #x
#define PEFT_ELASTIC_TEXT(x) PEFT_ELASTIC_TEXT_OF(x)

namespace py = pybind11;

namespace {

py::dict cpu_report() {
  const peft_elastic::CpuReport report = peft_elastic::detect_cpu();
  py::dict features;
  for (const auto& [name, usable] : report.features) features[py::str(name)] = usable;
  py::dict caches;
  caches["l1d"] = report.l1d_bytes;
  caches["l2"] = report.l2_bytes;
  caches["l3"] = report.l3_bytes;
  py::dict result;
  result["architecture"] = report.architecture;
  result["vendor"] = report.vendor;
  result["brand"] = report.brand;
  result["features"] = features;
  result["amx_permitted"] = report.amx_permitted;
  result["cache_bytes"] = caches;
  result["compiler"] = peft_elastic::compiler_name();
  return result;
}

// Memory comes as addresses, so that nothing here depends on torch; the Python side (deploy/ops.py) owns it and has checked
// shapes, types and strides.
using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

peft_elastic::ValueType value_type(int type) {
  if (type != 0 && type != 1) throw std::invalid_argument("the value type must be 0 (bf16) or 1 (int8)");
  return static_cast<peft_elastic::ValueType>(type);
}

peft_elastic::FloatType float_type(int type) {
  if (type < 0 || type > 2) throw std::invalid_argument("the float type must be 0 (float32), 1 (bfloat16) or 2 (float16)");
  return static_cast<peft_elastic::FloatType>(type);
}

std::int64_t count_nonzeros(int type, Address dense, std::int64_t out_features, std::int64_t in_features,
                            std::int64_t row_stride) {
  py::gil_scoped_release release;
  return peft_elastic::count_nonzeros(value_type(type), at<const void>(dense), out_features, in_features, row_stride);
}

void pack_dense(int type, Address dense, std::int64_t out_features, std::int64_t in_features, std::int64_t row_stride,
                Address packed, std::size_t size) {
  py::gil_scoped_release release;
  peft_elastic::pack_dense(value_type(type), at<const void>(dense), out_features, in_features, row_stride,
                           at<std::uint8_t>(packed), size);
}

void pack_bitmask(int type, Address bitmask, std::size_t bitmask_bytes, Address values, std::int64_t value_count,
                  std::int64_t out_features, std::int64_t in_features, Address packed, std::size_t size) {
  py::gil_scoped_release release;
  peft_elastic::pack_bitmask(value_type(type), at<const std::uint8_t>(bitmask), bitmask_bytes, at<const void>(values),
                             value_count, out_features, in_features, at<std::uint8_t>(packed), size);
}

void unpack(Address packed, std::size_t size, Address bitmask, Address values) {
  py::gil_scoped_release release;
  const peft_elastic::Weight weight = peft_elastic::open_packed(at<const std::uint8_t>(packed), size);
  if (peft_elastic::is_int4(weight.type)) throw std::invalid_argument("the packed weight is int4");
  peft_elastic::check_contents(weight);
  peft_elastic::unpack(weight, at<std::uint8_t>(bitmask), at<void>(values));
}

// (out_features, in_features, group_size, bitmask or 0, its bytes, values, their bytes, scales, zeros, order or 0)
using Int4Addresses = std::tuple<std::int64_t, std::int64_t, std::int64_t, Address, std::size_t, Address, std::size_t, Address,
                                 Address, Address>;

peft_elastic::Int4Source int4_source(const Int4Addresses& addresses) {
  const auto& [out_features, in_features, group_size, bitmask, bitmask_bytes, values, value_bytes, scales, zeros, order] =
      addresses;
  return {out_features, in_features, group_size, at<const std::uint8_t>(bitmask), bitmask_bytes,
          at<const std::uint8_t>(values), value_bytes, at<const float>(scales), at<const std::uint8_t>(zeros),
          at<const std::int32_t>(order)};
}

std::size_t packed_int4_bytes(const Int4Addresses& source) {
  py::gil_scoped_release release;
  return peft_elastic::packed_int4_bytes(int4_source(source));
}

void pack_int4(const Int4Addresses& source, Address packed, std::size_t size) {
  py::gil_scoped_release release;
  peft_elastic::pack_int4(int4_source(source), at<std::uint8_t>(packed), size);
}

// order: of as many numbers as there are inputs, or 0 where the weight has none.
void unpack_int4(Address packed, std::size_t size, Address bitmask, Address values, Address scales, Address zeros,
                 Address order) {
  py::gil_scoped_release release;
  const peft_elastic::Weight weight = peft_elastic::open_packed(at<const std::uint8_t>(packed), size);
  const bool dense = weight.type == peft_elastic::ValueType::kInt4Dense;
  if (!peft_elastic::is_int4(weight.type) || dense != (bitmask == 0) || (weight.order != nullptr) != (order != 0)) {
    throw std::invalid_argument("the packed weight is of another kind");
  }
  peft_elastic::check_contents(weight);
  peft_elastic::unpack_int4(weight, at<std::uint8_t>(bitmask), at<std::uint8_t>(values), at<float>(scales),
                            at<std::uint8_t>(zeros));
  if (order) std::memcpy(at<void>(order), weight.order, static_cast<std::size_t>(weight.in_features) * sizeof(std::int32_t));
}

py::tuple describe(Address packed, std::size_t size) {
  const peft_elastic::Weight weight = peft_elastic::open_packed(at<const std::uint8_t>(packed), size);
  return py::make_tuple(static_cast<int>(weight.type), weight.out_features, weight.in_features, weight.nonzeros,
                        weight.group_size, weight.order != nullptr);
}

void check_contents(Address packed, std::size_t size) {
  py::gil_scoped_release release;
  peft_elastic::check_contents(peft_elastic::open_packed(at<const std::uint8_t>(packed), size));
}

// Tensors without memory (of the meta device, or fake ones) have this address.
void expect_memory(std::initializer_list<Address> addresses) {
  for (const Address address : addresses) {
    if (address == 0) throw std::invalid_argument("a tensor has no memory");
  }
}

// A tenth of a microsecond counts here: a token calls hundreds of layers.
void linear(Address packed, std::size_t size, Address x, int x_type, std::int64_t rows, std::int64_t in_features,
            std::int64_t x_stride, Address scales, Address bias, int bias_type, Address y, int y_type,
            std::int64_t out_features, int threads, bool int8_activations) {
  py::gil_scoped_release release;
  peft_elastic::LinearCall call;
  call.weight = peft_elastic::open_packed(at<const std::uint8_t>(packed), size);
  if (call.weight.out_features != out_features || call.weight.in_features != in_features) {
    throw std::invalid_argument("the packed weight is " + std::to_string(call.weight.out_features) + " x " +
                                std::to_string(call.weight.in_features) + ", expected " + std::to_string(out_features) +
                                " x " + std::to_string(in_features));
  }
  expect_memory({x, y});
  if (rows < 1 || (rows > 1 && x_stride < 0)) throw std::invalid_argument("x has no such rows");
  const bool int8 = call.weight.type == peft_elastic::ValueType::kInt8;
  if (int8 != (scales != 0)) throw std::invalid_argument("scales go with an int8 weight, and only with one");
  if (int8_activations && !int8) throw std::invalid_argument("int8 activations go with an int8 weight");
  call.x = at<const void>(x);
  call.x_type = float_type(x_type);
  call.rows = rows;
  call.x_stride = x_stride;
  call.scales = at<const float>(scales);
  call.bias = at<const void>(bias);
  call.bias_type = float_type(bias_type);
  call.y = at<void>(y);
  call.y_type = float_type(y_type);
  call.threads = threads;
  call.int8_activations = int8_activations;
  peft_elastic::linear(call, peft_elastic::selected_kernels());
}

void dense_rows(Address packed, std::size_t size, Address scales, std::int64_t first_row, std::int64_t rows, Address target,
                int type, int threads) {
  py::gil_scoped_release release;
  const peft_elastic::Weight weight = peft_elastic::open_packed(at<const std::uint8_t>(packed), size);
  if ((weight.type == peft_elastic::ValueType::kInt8) != (scales != 0)) {
    throw std::invalid_argument("scales go with an int8 weight, and only with one");
  }
  if (first_row < 0 || rows < 0 || first_row > weight.out_features - rows) {
    throw std::invalid_argument("rows outside of the weight");
  }
  if (rows) expect_memory({target});
  peft_elastic::dense_rows(weight, at<const float>(scales), first_row, rows, at<void>(target), float_type(type), threads);
}

py::list levels() {
  py::list result;
  for (const auto& status : peft_elastic::level_statuses()) {
    py::list missing;
    for (const auto& feature : status.missing) missing.append(feature);
    py::dict level;
    level["name"] = status.name;
    level["built"] = status.built;
    level["usable"] = status.usable;
    level["missing"] = missing;
    result.append(level);
  }
  return result;
}

void use_openmp(Address parallel, Address thread_num, Address num_threads) {
  peft_elastic::OpenMp functions{};
  functions.parallel = reinterpret_cast<decltype(functions.parallel)>(parallel);
  functions.thread_num = reinterpret_cast<decltype(functions.thread_num)>(thread_num);
  functions.num_threads = reinterpret_cast<decltype(functions.num_threads)>(num_threads);
  peft_elastic::use_openmp(functions);
}

// (out_features, in_features, packed or dense weight, bytes of the packed one or 0, scales, bias, type of the bias)
using LinearAddresses = std::tuple<std::int64_t, std::int64_t, Address, std::size_t, Address, Address, int>;
// (weight, epsilon)
using NormAddresses = std::pair<Address, float>;

peft_elastic::DecodeLinear decode_linear(const LinearAddresses& addresses) {
  const auto& [out_features, in_features, weight, size, scales, bias, bias_type] = addresses;
  peft_elastic::DecodeLinear linear{};
  linear.out_features = out_features;
  linear.in_features = in_features;
  linear.bias = at<const void>(bias);
  linear.bias_type = float_type(bias_type);
  if (size == 0) {
    expect_memory({weight});
    linear.dense = at<const void>(weight);
    return linear;
  }
  linear.weight = peft_elastic::open_packed(at<const std::uint8_t>(weight), size);
  linear.scales = at<const float>(scales);
  if (linear.weight.out_features != out_features || linear.weight.in_features != in_features) {
    throw std::invalid_argument("the packed weight is not of the size of its layer");
  }
  if ((linear.weight.type == peft_elastic::ValueType::kInt8) != (scales != 0)) {
    throw std::invalid_argument("scales go with an int8 weight, and only with one");
  }
  return linear;
}

// Linear layers: q, k, v, o, gate, up, down; norms: input, MLP, queries, keys.
void add_layer(peft_elastic::DecodeModel& model, const std::array<LinearAddresses, 7>& linears,
               const std::array<NormAddresses, 4>& norms, float scaling) {
  peft_elastic::DecodeLayer layer;
  peft_elastic::DecodeLinear* const to_linears[] = {&layer.q,    &layer.k,  &layer.v,   &layer.o,
                                                    &layer.gate, &layer.up, &layer.down};
  peft_elastic::DecodeNorm* const to_norms[] = {&layer.input_norm, &layer.mlp_norm, &layer.q_norm, &layer.k_norm};
  for (std::size_t i = 0; i < linears.size(); ++i) *to_linears[i] = decode_linear(linears[i]);
  for (std::size_t i = 0; i < norms.size(); ++i) *to_norms[i] = {at<const void>(norms[i].first), norms[i].second};
  expect_memory({norms[0].first, norms[1].first});
  layer.scaling = scaling;
  peft_elastic::check_layer(model, layer);
  model.layers.push_back(layer);
}

// keys_and_values: an array with the addresses of the keys and the values of each layer, in turn.
void decode(const peft_elastic::DecodeModel& model, std::int64_t batch, std::int64_t length, std::int64_t capacity,
            Address hidden, Address cos, Address sin, bool rotary_per_row, Address mask, Address keys_and_values,
            Address output, int threads) {
  py::gil_scoped_release release;
  if (batch < 1 || length < 0 || capacity <= length) throw std::invalid_argument("no room in the cache");
  expect_memory({hidden, cos, sin, keys_and_values, output});
  const std::size_t count = model.layers.size();
  std::vector<void*> keys(count), values(count);
  for (std::size_t i = 0; i < count; ++i) {
    keys[i] = at<void*>(keys_and_values)[2 * i];
    values[i] = at<void*>(keys_and_values)[2 * i + 1];
    if (!keys[i] || !values[i]) throw std::invalid_argument("the cache has no memory");
  }
  peft_elastic::DecodeCall call{};
  call.batch = batch;
  call.length = length;
  call.capacity = capacity;
  call.hidden = at<const void>(hidden);
  call.cos = at<const void>(cos);
  call.sin = at<const void>(sin);
  call.rotary_per_row = rotary_per_row;
  call.mask = at<const std::uint8_t>(mask);
  call.keys = keys.data();
  call.values = values.data();
  call.output = at<void>(output);
  call.threads = threads;
  peft_elastic::decode(model, call, peft_elastic::selected_kernels());
}

void dense_linear(Address x, std::int64_t rows, std::int64_t out_features, std::int64_t in_features, Address weight,
                  Address bias, Address y, int type, int threads) {
  py::gil_scoped_release release;
  expect_memory({x, weight, y});
  if (rows < 1 || out_features < 1 || in_features < 1) throw std::invalid_argument("a dense layer has no such sizes");
  peft_elastic::DenseCall call{};
  call.x = at<const void>(x);
  call.rows = rows;
  call.out_features = out_features;
  call.in_features = in_features;
  call.weight = at<const void>(weight);
  call.bias = at<const void>(bias);
  call.y = at<void>(y);
  call.type = float_type(type);
  call.threads = threads;
  if (call.type == peft_elastic::FloatType::kFloat16) throw std::invalid_argument("a dense layer in float16 is not provided for");
  peft_elastic::dense_linear(call, peft_elastic::selected_kernels());
}

void effective_panel(Address weight, int weight_type, std::int64_t rows, std::int64_t columns, std::int64_t weight_stride,
                     Address panel, Address slopes, bool masked, bool add, Address scales, Address zeros,
                     std::int64_t group_size, float top, int threads) {
  py::gil_scoped_release release;
  if (rows && columns) expect_memory({weight, panel});
  peft_elastic::EffectivePanel call{};
  call.weight = at<const void>(weight);
  call.weight_type = float_type(weight_type);
  call.rows = rows;
  call.columns = columns;
  call.weight_stride = weight_stride;
  call.panel = at<float>(panel);
  call.slopes = at<float>(slopes);
  call.masked = masked;
  call.add = add;
  call.scales = at<const float>(scales);
  call.zeros = at<const float>(zeros);
  call.group_size = group_size;
  call.top = top;
  call.threads = threads;
  peft_elastic::effective_panel(call, peft_elastic::selected_kernels());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ extension of peft_elastic. Use it through peft_elastic._native.";
  m.attr("__version__") = PEFT_ELASTIC_TEXT(PEFT_ELASTIC_VERSION);
  m.attr("fingerprint") = PEFT_ELASTIC_TEXT(PEFT_ELASTIC_FINGERPRINT);
  m.def("cpu_report", &cpu_report, "What this processor can do and the operating system allows.");

  m.def("levels", &levels, "The levels (instruction sets) of the kernels, best first.");
  m.def("selected_level", &peft_elastic::selected_level);
  m.def("select_level", &peft_elastic::select_level, "By name; an empty name selects the best usable level.");
  m.def("use_openmp", &use_openmp, "Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads, or zeros.");
  m.def("has_openmp", &peft_elastic::has_openmp);

  m.def("packed_bytes", [](int type, std::int64_t out_features, std::int64_t in_features, std::int64_t nonzeros) {
    return peft_elastic::packed_bytes(value_type(type), out_features, in_features, nonzeros);
  });
  m.def("count_nonzeros", &count_nonzeros);
  m.def("pack_dense", &pack_dense);
  m.def("pack_bitmask", &pack_bitmask);
  m.def("unpack", &unpack);
  m.def("packed_int4_bytes", &packed_int4_bytes);
  m.def("pack_int4", &pack_int4);
  m.def("unpack_int4", &unpack_int4);
  m.def("describe", &describe,
        "(value type, out_features, in_features, nonzeros, group_size, whether inputs have an order) of a packed weight.");
  m.def("check_contents", &check_contents);
  m.def("linear", &linear);
  m.def("dense_rows", &dense_rows);

  py::class_<peft_elastic::DecodeModel>(m, "DecodeModel")
      .def(py::init([](int type, std::int64_t hidden_size, std::int64_t head_dim) {
        return peft_elastic::DecodeModel{float_type(type), hidden_size, head_dim, {}};
      }))
      .def("add_layer", &add_layer);
  m.def("decode", &decode);
  m.def("dense_linear", &dense_linear);
  m.def("effective_panel", &effective_panel);
}
