// A feature counts only when the processor reports it and the operating system saves the registers
// it needs: a processor with AVX-512 under a kernel that does not enable it must not be given it.
#include "features.h"

#include <algorithm>
#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace ft::machine {
namespace {

// What an instruction set of setup.py needs, worst first.
struct InstructionSet {
  const char* name;
  std::vector<std::string> needs;
};

#if defined(__x86_64__)

const InstructionSet kSets[] = {
    {"baseline", {}},
    {"avx2", {"avx2", "fma", "f16c"}},
    {"avx512", {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}},
    {"avx512_bf16",
     {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}},
    {"amx",
     {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16",
      "amx_tile", "amx_bf16"}},
};

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // zeros where unknown
  return r;
}

// The register states that the operating system saves: bit 1 xmm, 2 ymm, 5 to 7 zmm and its masks,
// 17 and 18 AMX's tiles.
uint64_t saved_states(const Registers& basic) {
  constexpr uint32_t kOsxsave = 1u << 27;
  if (!(basic.ecx & kOsxsave)) return 0;
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<uint64_t>(high) << 32 | low;
}

// Linux lends the matrix unit to a process that asks for it (Documentation/arch/x86/xstate.rst).
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Bit positions: Intel's Software Developer's Manual, volume 2, CPUID.
std::vector<std::string> probe() {
  const Registers basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  const uint64_t saved = saved_states(basic);
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  const bool ymm = (saved & kYmm) == kYmm, zmm = (saved & kZmm) == kZmm;
  const bool tiles = (saved & kTiles) == kTiles && may_use_tiles();
  const struct {
    const char* name;
    bool usable;
    uint32_t word;
    int bit;
  } all[] = {
      {"avx", ymm, basic.ecx, 28},
      {"f16c", ymm, basic.ecx, 29},
      {"fma", ymm, basic.ecx, 12},
      {"avx2", ymm, extended.ebx, 5},
      {"avx512f", zmm, extended.ebx, 16},
      {"avx512dq", zmm, extended.ebx, 17},
      {"avx512bw", zmm, extended.ebx, 30},
      {"avx512vl", zmm, extended.ebx, 31},
      {"avx512_vnni", zmm, extended.ecx, 11},
      {"avx512_bf16", zmm, more.eax, 5},
      {"avx512_fp16", zmm, extended.edx, 23},
      {"avx_vnni", ymm, more.eax, 4},
      {"amx_bf16", tiles, extended.edx, 22},
      {"amx_tile", tiles, extended.edx, 24},
  };
  std::vector<std::string> found;
  for (const auto& feature : all) {
    if (feature.usable && (feature.word >> feature.bit & 1)) found.push_back(feature.name);
  }
  return found;
}

#elif defined(__aarch64__)

const InstructionSet kSets[] = {{"neon", {"asimd"}}};

// Bit positions: Linux, arch/arm64/include/uapi/asm/hwcap.h.
std::vector<std::string> probe() {
  const uint64_t words[] = {getauxval(AT_HWCAP), getauxval(AT_HWCAP2)};
  const struct {
    const char* name;
    int word, bit;
  } all[] = {
      {"asimd", 0, 1}, {"fphp", 0, 9},     {"asimdhp", 0, 10}, {"asimddp", 0, 20}, {"sve", 0, 22},
      {"sve2", 1, 1},  {"svebf16", 1, 12}, {"i8mm", 1, 13},    {"bf16", 1, 14},
  };
  std::vector<std::string> found;
  for (const auto& feature : all) {
    if (words[feature.word] >> feature.bit & 1) found.push_back(feature.name);
  }
  return found;
}

#endif

}  // namespace

std::vector<std::string> cpu_features() { return probe(); }

std::vector<std::string> supported_isas() {
  const std::vector<std::string> have = probe();
  std::vector<std::string> names;
  for (const InstructionSet& set : kSets) {
    const bool complete = std::all_of(set.needs.begin(), set.needs.end(), [&](const auto& need) {
      return std::find(have.begin(), have.end(), need) != have.end();
    });
    if (complete) names.push_back(set.name);
  }
  return names;
}

}  // namespace ft::machine
