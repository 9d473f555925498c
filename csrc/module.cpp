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

#include "cpu_features.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ extension of peft_elastic. Use it through peft_elastic._native.";
  m.def("cpu_report", &cpu_report, "What this processor can do and the operating system allows.");
}
