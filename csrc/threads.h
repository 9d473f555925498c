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

// Runs the parts of a job on several threads.
#pragma once

#include <cstdint>

namespace peft_elastic {

// The functions of the OpenMP runtime that torch has loaded (GOMP_parallel, omp_get_thread_num, omp_get_num_threads): its
// threads are then ours too. Two pools on one machine would take the processors from each other, as the threads of OpenMP
// spin for milliseconds after each parallel region. Null pointers: back to a pool of our own.
struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
};
void use_openmp(const OpenMp& functions);
bool has_openmp();

// Calls body(data, part) once for each part from 0 to parts - 1, on at most that many threads, and returns when all are
// done. `body` must not throw. May be called from several threads at the same time, and after a fork.
void run_parallel(int parts, void (*body)(void* data, int part), void* data);

// Calls kernel(job, first, last) for so many ranges, of about the same size, that make up 0 .. units.
template <typename Job>
void run_ranges(int parts, std::int64_t units, void (*kernel)(const Job& job, std::int64_t first, std::int64_t last),
                const Job& job) {
  struct Ranges {
    int parts;
    std::int64_t units;
    void (*kernel)(const Job&, std::int64_t, std::int64_t);
    const Job& job;
  } ranges{parts, units, kernel, job};
  const auto body = [](void* data, int part) {
    const auto& all = *static_cast<const Ranges*>(data);
    all.kernel(all.job, all.units * part / all.parts, all.units * (part + 1) / all.parts);
  };
  run_parallel(parts, body, &ranges);
}

}  // namespace peft_elastic
