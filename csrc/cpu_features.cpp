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

#include "cpu_features.h"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64) || defined(_M_IX86)
#define PEFT_ELASTIC_X86 1
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#endif

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peft_elastic {
namespace {

enum Word { kLeaf1Ecx, kLeaf7Ebx, kLeaf7Ecx, kLeaf7Edx, kLeaf7Sub1Eax, kWords };  // where cpuid reports a feature
enum State { kNone, kYmm, kZmm, kTiles, kStates };  // the registers that the operating system has to save for it

struct Feature {
  const char* name;
  Word word;
  int bit;
  State state;
};

// Intel's Software Developer's Manual, volume 2, CPUID; AMD64 Architecture Programmer's Manual, volume 3, appendix E.
constexpr Feature kFeatures[] = {
    {"ssse3", kLeaf1Ecx, 9, kNone},
    {"sse4_1", kLeaf1Ecx, 19, kNone},
    {"sse4_2", kLeaf1Ecx, 20, kNone},
    {"popcnt", kLeaf1Ecx, 23, kNone},
    {"bmi1", kLeaf7Ebx, 3, kNone},
    {"bmi2", kLeaf7Ebx, 8, kNone},
    {"avx", kLeaf1Ecx, 28, kYmm},
    {"f16c", kLeaf1Ecx, 29, kYmm},
    {"fma", kLeaf1Ecx, 12, kYmm},
    {"avx2", kLeaf7Ebx, 5, kYmm},
    {"avx_vnni", kLeaf7Sub1Eax, 4, kYmm},
    {"avx512f", kLeaf7Ebx, 16, kZmm},
    {"avx512cd", kLeaf7Ebx, 28, kZmm},
    {"avx512dq", kLeaf7Ebx, 17, kZmm},
    {"avx512bw", kLeaf7Ebx, 30, kZmm},
    {"avx512vl", kLeaf7Ebx, 31, kZmm},
    {"avx512vbmi", kLeaf7Ecx, 1, kZmm},
    {"avx512_vbmi2", kLeaf7Ecx, 6, kZmm},
    {"avx512_vnni", kLeaf7Ecx, 11, kZmm},
    {"avx512_bitalg", kLeaf7Ecx, 12, kZmm},
    {"avx512_vpopcntdq", kLeaf7Ecx, 14, kZmm},
    {"avx512_bf16", kLeaf7Sub1Eax, 5, kZmm},
    {"avx512_fp16", kLeaf7Edx, 23, kZmm},
    {"amx_tile", kLeaf7Edx, 24, kTiles},
    {"amx_bf16", kLeaf7Edx, 22, kTiles},
    {"amx_int8", kLeaf7Edx, 25, kTiles},
    {"amx_fp16", kLeaf7Sub1Eax, 21, kTiles},
};

constexpr const char* kArchitecture =
#if defined(__x86_64__) || defined(_M_X64)
    "x86_64";
#elif defined(__i386__) || defined(_M_IX86)
    "i386";
#elif defined(__aarch64__) || defined(_M_ARM64)
    "aarch64";
#elif defined(__arm__)
    "arm";
#elif defined(__riscv)
    "riscv";
#elif defined(__powerpc64__)
    "ppc64";
#elif defined(__s390x__)
    "s390x";
#else
    "unknown";
#endif

#if defined(PEFT_ELASTIC_X86)

struct Registers {
  std::uint32_t eax, ebx, ecx, edx;
};

// All zeros for a leaf that the processor does not have.
Registers cpuid(std::uint32_t leaf, std::uint32_t subleaf = 0) {
  Registers r{0, 0, 0, 0};
#if defined(_MSC_VER)
  int words[4];
  __cpuid(words, static_cast<int>(leaf & 0x80000000u));  // the highest leaf of its range
  if (static_cast<std::uint32_t>(words[0]) >= leaf) {
    __cpuidex(words, static_cast<int>(leaf), static_cast<int>(subleaf));
    std::memcpy(&r, words, sizeof(r));
  }
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

// Which registers the operating system saves. Only for processors whose cpuid reports OSXSAVE.
std::uint64_t read_xcr0() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  // Not the intrinsic, for which this file would have to be compiled with -mxsave.
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
#endif
}

// Linux hands out the tile registers on request, once per process (since 5.16; Documentation/arch/x86/xstate.rst).
// Elsewhere XCR0 has said all there is to say.
bool request_amx_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long kGetPermission = 0x1022;      // ARCH_GET_XCOMP_PERM
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  std::uint64_t granted = 0;
  if (syscall(SYS_arch_prctl, kGetPermission, &granted) == 0 && ((granted >> kTileData) & 1u)) return true;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return true;
#endif
}

std::string brand_name() {
  char text[49] = {};
  for (std::uint32_t i = 0; i < 3; ++i) {
    const Registers r = cpuid(0x80000002u + i);
    std::memcpy(text + sizeof(r) * i, &r, sizeof(r));
  }
  const std::string brand(text);  // some processors pad it with spaces on either side
  const std::size_t first = brand.find_first_not_of(' ');
  return first == std::string::npos ? "" : brand.substr(first, brand.find_last_not_of(' ') - first + 1);
}

void detect_caches(CpuReport& report) {
  // The same table, which AMD keeps elsewhere.
  const bool amd = report.vendor == "AuthenticAMD" || report.vendor == "HygonGenuine";
  for (std::uint32_t i = 0;; ++i) {
    const Registers r = cpuid(amd ? 0x8000001Du : 4u, i);
    const std::uint32_t type = r.eax & 0x1Fu, level = (r.eax >> 5) & 7u;
    if (type == 0 || i == 16) break;  // the end of the table, or a table that has none
    if (type == 2) continue;          // instructions only
    const std::size_t line = (r.ebx & 0xFFFu) + 1, partitions = ((r.ebx >> 12) & 0x3FFu) + 1;
    const std::size_t ways = (r.ebx >> 22) + 1, sets = static_cast<std::size_t>(r.ecx) + 1;
    const std::size_t bytes = line * partitions * ways * sets;
    if (level == 1) report.l1d_bytes = bytes;
    if (level == 2) report.l2_bytes = bytes;
    if (level == 3) report.l3_bytes = bytes;
  }
}

void detect(CpuReport& report, std::uint32_t (&words)[kWords], bool (&saved)[kStates]) {
  const Registers leaf0 = cpuid(0), leaf1 = cpuid(1), leaf7 = cpuid(7);
  const std::uint32_t vendor[3] = {leaf0.ebx, leaf0.edx, leaf0.ecx};
  report.vendor.assign(reinterpret_cast<const char*>(vendor), sizeof(vendor));
  report.brand = brand_name();
  detect_caches(report);

  words[kLeaf1Ecx] = leaf1.ecx;
  words[kLeaf7Ebx] = leaf7.ebx;
  words[kLeaf7Ecx] = leaf7.ecx;
  words[kLeaf7Edx] = leaf7.edx;
  words[kLeaf7Sub1Eax] = leaf7.eax >= 1 ? cpuid(7, 1).eax : 0;  // leaf7.eax: its highest subleaf

  const bool osxsave = (leaf1.ecx >> 27) & 1u;
  const std::uint64_t xcr0 = osxsave ? read_xcr0() : 0;
  const auto all = [xcr0](std::uint64_t mask) { return (xcr0 & mask) == mask; };
  saved[kNone] = true;
  saved[kYmm] = all(0x6);        // SSE, AVX
  saved[kZmm] = all(0xE6);       // and masks, upper halves, registers 16 to 31
  saved[kTiles] = all(0x60000);  // tile configuration, tile data
}

#else

void detect(CpuReport& report, std::uint32_t (&)[kWords], bool (&)[kStates]) {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const auto bytes = [](int name) {
    const long answer = sysconf(name);  // -1 where unknown
    return answer > 0 ? static_cast<std::size_t>(answer) : std::size_t{0};
  };
  report.l1d_bytes = bytes(_SC_LEVEL1_DCACHE_SIZE);
  report.l2_bytes = bytes(_SC_LEVEL2_CACHE_SIZE);
  report.l3_bytes = bytes(_SC_LEVEL3_CACHE_SIZE);
#else
  (void)report;
#endif
}

bool request_amx_tiles() { return false; }

#endif

}  // namespace

CpuReport detect_cpu() {
  CpuReport report;
  report.architecture = kArchitecture;
  std::uint32_t words[kWords] = {};
  bool saved[kStates] = {};
  detect(report, words, saved);
  bool amx = false;
  for (const Feature& f : kFeatures) {
    const bool usable = saved[f.state] && ((words[f.word] >> f.bit) & 1u);
    report.features.emplace_back(f.name, usable);
    amx = amx || (usable && f.state == kTiles);
  }
  report.amx_permitted = amx && request_amx_tiles();
  return report;
}

std::string compiler_name() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

}  // namespace peft_elastic
