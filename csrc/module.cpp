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

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
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

// Memory comes as addresses, so that nothing here depends on torch; the Python side (layers/ops.py) owns it and has checked
// shapes, types and strides.
using Address = std::uintptr_t;
using peft_elastic::FloatType;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

std::int64_t count_nonzeros(peft_elastic::ValueType type, Address dense, std::int64_t out_features, std::int64_t in_features,
                            std::int64_t row_stride) {
  py::gil_scoped_release release;
  return peft_elastic::count_nonzeros(type, at<const void>(dense), out_features, in_features, row_stride);
}

void pack_dense(peft_elastic::ValueType type, Address dense, std::int64_t out_features, std::int64_t in_features,
                std::int64_t row_stride, Address packed, std::size_t size) {
  py::gil_scoped_release release;
  peft_elastic::pack_dense(type, at<const void>(dense), out_features, in_features, row_stride, at<std::uint8_t>(packed), size);
}

peft_elastic::Source make_source(peft_elastic::ValueType type, std::int64_t out_features, std::int64_t in_features,
                                 Address values, std::size_t value_bytes, Address bitmask, std::size_t bitmask_bytes,
                                 std::int64_t group_size, Address scales, Address zeros, Address order) {
  if (peft_elastic::value_layout(type).has_groups && (!scales || !zeros)) {
    throw std::invalid_argument("scales and zeros go with int4 values");
  }
  return {type, out_features, in_features, at<const std::uint8_t>(bitmask), bitmask_bytes, at<const std::uint8_t>(values),
          value_bytes, group_size, at<const float>(scales), at<const std::uint8_t>(zeros), at<const std::int32_t>(order)};
}

std::size_t packed_bytes(const peft_elastic::Source& source) {
  py::gil_scoped_release release;
  return peft_elastic::packed_bytes(source);
}

void pack(const peft_elastic::Source& source, Address packed, std::size_t size) {
  py::gil_scoped_release release;
  peft_elastic::pack(source, at<std::uint8_t>(packed), size);
}

// 0 for what the weight has not.
void unpack(Address packed, std::size_t size, Address values, Address bitmask, Address scales, Address zeros, Address order) {
  py::gil_scoped_release release;
  const peft_elastic::Weight weight = peft_elastic::open_packed(at<const std::uint8_t>(packed), size);
  const peft_elastic::ValueLayout& layout = peft_elastic::value_layout(weight.type);
  if ((layout.tile_bitmap_bytes != 0) != (bitmask != 0) || layout.has_groups != (scales != 0) ||
      layout.has_groups != (zeros != 0) || (weight.order != nullptr) != (order != 0)) {
    throw std::invalid_argument("the packed weight is of another kind");
  }
  peft_elastic::check_contents(weight);
  peft_elastic::unpack(weight, {at<std::uint8_t>(bitmask), at<std::uint8_t>(values), at<float>(scales), at<std::uint8_t>(zeros),
                                at<std::int32_t>(order)});
}

py::tuple describe(Address packed, std::size_t size) {
  const peft_elastic::Weight weight = peft_elastic::open_packed(at<const std::uint8_t>(packed), size);
  return py::make_tuple(weight.type, weight.out_features, weight.in_features, weight.nonzeros,
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

void check_scales(const peft_elastic::Weight& weight, Address scales) {
  if (peft_elastic::value_layout(weight.type).has_row_scales != (scales != 0)) {
    throw std::invalid_argument("scales go with an int8 weight, and only with one");
  }
}

// A tenth of a microsecond counts here: a token calls hundreds of layers.
void linear(Address packed, std::size_t size, Address x, FloatType x_type, std::int64_t rows, std::int64_t in_features,
            std::int64_t x_stride, Address scales, Address bias, FloatType bias_type, Address y, FloatType y_type,
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
  check_scales(call.weight, scales);
  if (int8_activations && call.weight.type != peft_elastic::ValueType::kInt8) throw std::invalid_argument("int8 activations go with an int8 weight");
  call.x = at<const void>(x);
  call.x_type = x_type;
  call.rows = rows;
  call.x_stride = x_stride;
  call.scales = at<const float>(scales);
  call.bias = at<const void>(bias);
  call.bias_type = bias_type;
  call.y = at<void>(y);
  call.y_type = y_type;
  call.threads = threads;
  call.int8_activations = int8_activations;
  peft_elastic::linear(call, peft_elastic::selected_kernels());
}

void dense_rows(Address packed, std::size_t size, Address scales, std::int64_t first_row, std::int64_t rows, Address target,
                FloatType type, int threads) {
  py::gil_scoped_release release;
  const peft_elastic::Weight weight = peft_elastic::open_packed(at<const std::uint8_t>(packed), size);
  check_scales(weight, scales);
  if (first_row < 0 || rows < 0 || first_row > weight.out_features - rows) {
    throw std::invalid_argument("rows outside of the weight");
  }
  if (rows) expect_memory({target});
  peft_elastic::dense_rows(weight, at<const float>(scales), first_row, rows, at<void>(target), type, threads);
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

// size: the bytes of a packed weight; 0: the weight is dense.
peft_elastic::DecodeLinear make_decode_linear(std::int64_t out_features, std::int64_t in_features, Address weight,
                                              std::size_t size, Address scales, Address bias, FloatType bias_type) {
  peft_elastic::DecodeLinear linear{};
  linear.out_features = out_features;
  linear.in_features = in_features;
  linear.bias = at<const void>(bias);
  linear.bias_type = bias_type;
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
  check_scales(linear.weight, scales);
  return linear;
}

using peft_elastic::DecodeLinear;
using peft_elastic::DecodeNorm;

void add_layer(peft_elastic::DecodeModel& model, const DecodeLinear& q, const DecodeLinear& k, const DecodeLinear& v,
               const DecodeLinear& o, const DecodeLinear& gate, const DecodeLinear& up, const DecodeLinear& down,
               const DecodeNorm& input_norm, const DecodeNorm& mlp_norm, const DecodeNorm* q_norm, const DecodeNorm* k_norm,
               float scaling) {
  const DecodeNorm none{nullptr, 0.0f};
  const peft_elastic::DecodeLayer layer{q,        k,        v,      o, gate, up, down, input_norm, mlp_norm, q_norm ? *q_norm : none,
                                        k_norm ? *k_norm : none, scaling};
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
                  Address bias, Address y, FloatType type, int threads) {
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
  call.type = type;
  call.threads = threads;
  if (call.type == peft_elastic::FloatType::kFloat16) throw std::invalid_argument("a dense layer in float16 is not provided for");
  peft_elastic::dense_linear(call, peft_elastic::selected_kernels());
}

void effective_panel(Address weight, FloatType weight_type, std::int64_t rows, std::int64_t columns, std::int64_t weight_stride,
                     Address panel, Address slopes, bool masked, bool add, Address scales, Address zeros,
                     std::int64_t group_size, float top, int threads) {
  py::gil_scoped_release release;
  if (rows && columns) expect_memory({weight, panel});
  peft_elastic::EffectivePanel call{};
  call.weight = at<const void>(weight);
  call.weight_type = weight_type;
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
  m.doc() = "The C++ extension of peft_elastic. Use it through peft_elastic.layers.";
  m.attr("__version__") = PEFT_ELASTIC_TEXT(PEFT_ELASTIC_VERSION);
  m.attr("fingerprint") = PEFT_ELASTIC_TEXT(PEFT_ELASTIC_FINGERPRINT);
  m.def("cpu_report", &cpu_report, "What this processor can do and the operating system allows.");

  m.def("levels", &levels, "The levels (instruction sets) of the kernels, best first.");
  m.def("selected_level", &peft_elastic::selected_level);
  m.def("select_level", &peft_elastic::select_level, "By name; an empty name selects the best usable level.");
  m.def("use_openmp", &use_openmp, "Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads, or zeros.");
  m.def("has_openmp", &peft_elastic::has_openmp);

  using namespace py::literals;
  py::enum_<peft_elastic::ValueType> value_types(m, "ValueType", "Of the values of a weight.");
  for (std::uint32_t type = 0; type < peft_elastic::kValueTypes; ++type) {
    value_types.value(peft_elastic::kValueLayouts[type].name, static_cast<peft_elastic::ValueType>(type));
  }
  py::enum_<FloatType>(m, "FloatType", "Of activations, biases, norms and dense weights.")
      .value("float32", FloatType::kFloat32)
      .value("bfloat16", FloatType::kBfloat16)
      .value("float16", FloatType::kFloat16);

  py::class_<peft_elastic::Source>(m, "Source", "A weight in the layout on disk, whose memory must outlive it.")
      .def(py::init(&make_source), py::kw_only(), "type"_a, "out_features"_a, "in_features"_a, "values"_a, "value_bytes"_a,
           "bitmask"_a = 0, "bitmask_bytes"_a = 0, "group_size"_a = 0, "scales"_a = 0, "zeros"_a = 0, "order"_a = 0);
  m.def("packed_bytes", &packed_bytes, "source"_a);
  m.def("pack", &pack, "source"_a, "packed"_a, "size"_a);
  m.def("unpack", &unpack, "packed"_a, "size"_a, py::kw_only(), "values"_a, "bitmask"_a = 0, "scales"_a = 0, "zeros"_a = 0,
        "order"_a = 0);
  m.def("count_nonzeros", &count_nonzeros, "type"_a, "dense"_a, "out_features"_a, "in_features"_a, "row_stride"_a);
  m.def("packed_dense_bytes",
        py::overload_cast<peft_elastic::ValueType, std::int64_t, std::int64_t, std::int64_t>(&peft_elastic::packed_bytes),
        "type"_a, "out_features"_a, "in_features"_a, "nonzeros"_a);
  m.def("pack_dense", &pack_dense, "type"_a, "dense"_a, "out_features"_a, "in_features"_a, "row_stride"_a, "packed"_a, "size"_a);
  m.def("describe", &describe, "packed"_a, "size"_a,
        "(value type, out_features, in_features, nonzeros, group_size, whether inputs have an order) of a packed weight.");
  m.def("check_contents", &check_contents, "packed"_a, "size"_a);
  m.def("linear", &linear, "packed"_a, "size"_a, "x"_a, "x_type"_a, "rows"_a, "in_features"_a, "x_stride"_a, "scales"_a,
        "bias"_a, "bias_type"_a, "y"_a, "y_type"_a, "out_features"_a, "threads"_a, "int8_activations"_a);
  m.def("dense_rows", &dense_rows, "packed"_a, "size"_a, "scales"_a, "first_row"_a, "rows"_a, "target"_a, "type"_a, "threads"_a);

  py::class_<DecodeLinear>(m, "DecodeLinear", "A linear layer with a packed weight, or (size 0) a dense one.")
      .def(py::init(&make_decode_linear), py::kw_only(), "out_features"_a, "in_features"_a, "weight"_a, "size"_a, "scales"_a,
           "bias"_a, "bias_type"_a);
  py::class_<DecodeNorm>(m, "DecodeNorm")
      .def(py::init([](Address weight, float epsilon) {
             expect_memory({weight});
             return DecodeNorm{at<const void>(weight), epsilon};
           }),
           py::kw_only(), "weight"_a, "epsilon"_a);
  py::class_<peft_elastic::DecodeModel>(m, "DecodeModel")
      .def(py::init([](FloatType type, std::int64_t hidden_size, std::int64_t head_dim) {
             return peft_elastic::DecodeModel{type, hidden_size, head_dim, {}};
           }),
           "type"_a, "hidden_size"_a, "head_dim"_a)
      .def("add_layer", &add_layer, py::kw_only(), "q"_a, "k"_a, "v"_a, "o"_a, "gate"_a, "up"_a, "down"_a, "input_norm"_a,
           "mlp_norm"_a, "q_norm"_a, "k_norm"_a, "scaling"_a);
  m.def("decode", &decode, "model"_a, py::kw_only(), "batch"_a, "length"_a, "capacity"_a, "hidden"_a, "cos"_a, "sin"_a,
        "rotary_per_row"_a, "mask"_a, "keys_and_values"_a, "output"_a, "threads"_a);
  m.def("dense_linear", &dense_linear, py::kw_only(), "x"_a, "rows"_a, "out_features"_a, "in_features"_a, "weight"_a, "bias"_a,
        "y"_a, "type"_a, "threads"_a);
  m.def("effective_panel", &effective_panel, py::kw_only(), "weight"_a, "weight_type"_a, "rows"_a, "columns"_a,
        "weight_stride"_a, "panel"_a, "slopes"_a, "masked"_a, "add"_a, "scales"_a, "zeros"_a, "group_size"_a, "top"_a,
        "threads"_a);
}
