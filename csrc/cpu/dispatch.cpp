#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace retro_kernels {

extern const Level kLevel_portable;
#ifdef RK_HAVE_AVX2
extern const Level kLevel_avx2;
#endif
#ifdef RK_HAVE_AVX512
extern const Level kLevel_avx512;
#endif
#ifdef RK_HAVE_AVX512_BF16
extern const Level kLevel_avx512_bf16;
#endif
#ifdef RK_HAVE_AMX_BF16
extern const Level kLevel_amx_bf16;
#endif

namespace {

struct Candidate {
  const char* name;
  const Level* level;  // null: not built
  bool runs;
};

#if defined(__x86_64__)
struct Features {
  bool avx2 = false, avx512 = false, avx512_bf16 = false, amx_bf16 = false;

  Features() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool fma = c >> 12 & 1, saves = c >> 27 & 1, f16c = c >> 29 & 1;
    if (!saves || !fma || !f16c) return;
    unsigned low, high;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const unsigned most = a, tiles = d;
    avx2 = (low & 6) == 6 && (b >> 5 & 1);
    // F, DQ, BW, VL, and the operating system saves the registers
    avx512 = avx2 && (low & 0xe6) == 0xe6 && (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
    if (avx512 && most >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512_bf16 = a >> 5 & 1;
    // AMX-BF16 and AMX-TILE, and the operating system saves tile registers for those processes that ask
    if (avx512_bf16 && (low >> 17 & 3) == 3 && (tiles >> 22 & 1) && (tiles >> 24 & 1)) amx_bf16 = ask_for_tiles();
  }

  static bool ask_for_tiles() {
#if defined(__linux__)
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
  }
};
#endif

constexpr int kLevels = 5;

int candidates(Candidate* list) {
  int n = 0;
  list[n++] = {"portable", &kLevel_portable, true};
#if defined(__x86_64__)
  const Features cpu;
#ifdef RK_HAVE_AVX2
  list[n++] = {"avx2", &kLevel_avx2, cpu.avx2};
#else
  list[n++] = {"avx2", nullptr, cpu.avx2};
#endif
#ifdef RK_HAVE_AVX512
  list[n++] = {"avx512", &kLevel_avx512, cpu.avx512};
#else
  list[n++] = {"avx512", nullptr, cpu.avx512};
#endif
#ifdef RK_HAVE_AVX512_BF16
  list[n++] = {"avx512_bf16", &kLevel_avx512_bf16, cpu.avx512_bf16};
#else
  list[n++] = {"avx512_bf16", nullptr, cpu.avx512_bf16};
#endif
#ifdef RK_HAVE_AMX_BF16
  list[n++] = {"amx_bf16", &kLevel_amx_bf16, cpu.amx_bf16};
#else
  list[n++] = {"amx_bf16", nullptr, cpu.amx_bf16};
#endif
#endif
  return n;
}

const Level* find(const std::string& name) {
  Candidate list[kLevels];
  const int n = candidates(list);
  if (name.empty()) {
    for (int i = n - 1;; --i)
      if (list[i].level && list[i].runs) return list[i].level;
  }
  for (int i = 0; i < n; ++i) {
    if (name != list[i].name) continue;
    if (!list[i].runs)
      throw std::runtime_error("the instruction set \"" + name + "\" was asked for (RETRO_KERNELS_CPU_ISA), but this CPU, "
                               "or its operating system, does not have it; it can run: " + usable_levels());
    if (!list[i].level)
      throw std::runtime_error("the instruction set \"" + name + "\" was asked for (RETRO_KERNELS_CPU_ISA), but it was not "
                               "built (the compiler was too old); there are: " + usable_levels());
    return list[i].level;
  }
  throw std::runtime_error("the instruction set \"" + name + "\" (RETRO_KERNELS_CPU_ISA) is unknown on this machine; "
                           "there are: " + usable_levels());
}

std::atomic<const Level*> chosen{nullptr};

}  // namespace

const Level& level() {
  const Level* now = chosen.load(std::memory_order_acquire);
  if (!now) {
    const char* asked = std::getenv("RETRO_KERNELS_CPU_ISA");
    now = find(asked ? asked : "");
    chosen.store(now, std::memory_order_release);
  }
  return *now;
}

void choose_level(const std::string& name) { chosen.store(find(name), std::memory_order_release); }

std::string usable_levels() {
  Candidate list[kLevels];
  const int n = candidates(list);
  std::string names;
  for (int i = 0; i < n; ++i)
    if (list[i].level && list[i].runs) names += (names.empty() ? "" : " ") + std::string(list[i].name);
  return names;
}

}  // namespace retro_kernels
