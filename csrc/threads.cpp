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

#include "threads.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if !defined(_WIN32)
#include <pthread.h>
#endif

namespace peft_elastic {
namespace {

struct Job {
  void (*body)(void*, int);
  void* data;
  int parts;
};

// Never destroyed: its threads may wait in it when the process ends.
class Pool {
 public:
  // False if the pool is busy with the job of another thread.
  bool try_run(const Job& job) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < job.parts - 1 && start_worker()) {
      }
      job_ = job;
      next_ = 0;
      unfinished_ = job.parts;
      ++generation_;
    }
    wake_.notify_all();
    work(job);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return unfinished_ == 0; });
    job_.parts = 0;
    return true;
  }

 private:
  bool start_worker() {
    try {
      std::thread([this, seen = generation_] { serve(seen); }).detach();
    } catch (const std::system_error&) {
      return false;  // the threads that there are, at least the caller, take all parts
    }
    ++workers_;
    return true;
  }

  void serve(std::uint64_t seen) {
    for (;;) {
      Job job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        job = job_;
      }
      work(job);
    }
  }

  void work(const Job& job) {
    for (;;) {
      int part;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        // A late thread finds the job over, or the next one, which is not its own.
        if (job.parts == 0 || job_.data != job.data || job_.body != job.body || next_ >= job_.parts) return;
        part = next_++;
      }
      job.body(job.data, part);
      std::lock_guard<std::mutex> lock(mutex_);
      if (--unfinished_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  Job job_{};
  int next_ = 0, unfinished_ = 0, workers_ = 0;
  std::uint64_t generation_ = 0;
};

std::atomic<Pool*> g_pool{nullptr};
OpenMp g_openmp{};
// The child has one thread: neither our workers nor those of OpenMP exist there, and locks may be held for ever.
void forget_threads() {
  g_pool = nullptr;
  g_openmp = OpenMp{};
}

#if !defined(_WIN32)
// With the library, not with the first job: a child that is forked before that has no threads of OpenMP either.
[[maybe_unused]] const int g_fork_handler = pthread_atfork(nullptr, nullptr, forget_threads);
#endif

Pool& pool() {
  Pool* current = g_pool.load();
  if (current) return *current;
  Pool* fresh = new Pool;
  if (g_pool.compare_exchange_strong(current, fresh)) return *fresh;
  delete fresh;
  return *current;
}

void run_share(void* job_void) {
  const Job& job = *static_cast<const Job*>(job_void);
  // The team may be smaller than asked for.
  const int team = g_openmp.num_threads();
  for (int part = g_openmp.thread_num(); part < job.parts; part += team) job.body(job.data, part);
}

}  // namespace

void use_openmp(const OpenMp& functions) {
  g_openmp = functions.parallel && functions.thread_num && functions.num_threads ? functions : OpenMp{};
}

bool has_openmp() { return g_openmp.parallel != nullptr; }

void run_parallel(int parts, void (*body)(void* data, int part), void* data) {
  if (parts > 1) {
    Job job{body, data, parts};
    if (g_openmp.parallel) {
      g_openmp.parallel(run_share, &job, static_cast<unsigned>(parts), 0);
      return;
    }
    if (pool().try_run(job)) return;
  }
  for (int part = 0; part < parts; ++part) body(data, part);
}

}  // namespace peft_elastic
