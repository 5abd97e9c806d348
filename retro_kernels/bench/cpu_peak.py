"""The multiply-add peak of a CPU, by a small C loop: torch's matrix product is no ceiling where its library is weak.

Compiled with the C compiler that is there; without one, or off x86-64 and AArch64, there is simply no such number.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

SOURCE = r"""
#include <stdint.h>
#if defined(__AVX512F__)
#define WIDTH 64
#elif defined(__AVX__)
#define WIDTH 32
#else
#define WIDTH 16
#endif
typedef float vector __attribute__((vector_size(WIDTH)));

/* Twelve named sums, because an array of them would live in memory. */
#define CHAINS 12
#define EACH(do) do(0) do(1) do(2) do(3) do(4) do(5) do(6) do(7) do(8) do(9) do(10) do(11)

/* Returns the floating-point operations done; sink keeps the loop alive. */
int64_t fp32_loop(int64_t rounds, float* sink) {
  vector a, b, total = {0};
  for (int i = 0; i < WIDTH / 4; ++i) { a[i] = *sink + 1.0f + 1e-7f * i; b[i] = *sink + 1e-7f * i; }
#define START(c) vector sum##c = a * (float)(c + 1);
#define STEP(c) sum##c = sum##c * a + b;
#define FINISH(c) total += sum##c;
  EACH(START)
  for (int64_t i = 0; i < rounds; ++i) { EACH(STEP) }
  EACH(FINISH)
  for (int i = 0; i < WIDTH / 4; ++i) *sink += total[i];
  return rounds * CHAINS * (WIDTH / 4) * 2;
}

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
int64_t bf16_loop(int64_t rounds, float* sink) {
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 0; /* a process asks for tile registers before it uses them */
  struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {1};
  for (int i = 0; i < 8; ++i) { config.bytes[i] = 64; config.rows[i] = 16; }
  __asm__ volatile("ldtilecfg %0" : : "m"(config)); /* which clears them: sums of zeros are no slower */
  for (int64_t i = 0; i < rounds; ++i) {
    _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  (void)sink;
  return rounds * 4 * 16 * 16 * 32 * 2;
}
#elif defined(__AVX512BF16__)
#include <immintrin.h>
int64_t bf16_loop(int64_t rounds, float* sink) {
  __m512 all = _mm512_setzero_ps();
  __m512bh a = (__m512bh)_mm512_set1_epi16(0x3f80), b = (__m512bh)_mm512_set1_epi16(0x3380);
#define START16(c) __m512 part##c = _mm512_set1_ps(*sink + (float)c);
#define STEP16(c) part##c = _mm512_dpbf16_ps(part##c, a, b);
#define FINISH16(c) all = _mm512_add_ps(all, part##c);
  EACH(START16)
  for (int64_t i = 0; i < rounds; ++i) { EACH(STEP16) }
  EACH(FINISH16)
  *sink += _mm512_reduce_add_ps(all);
  return rounds * CHAINS * 16 * 4;
}
#else
int64_t bf16_loop(int64_t rounds, float* sink) { (void)rounds; (void)sink; return 0; }
#endif
"""


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    compiler = next((path for name in ("gcc", "cc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "peak.c"), Path(folder, "peak.so")
        source.write_text(SOURCE)
        command = [
            compiler,
            "-O3",
            "-march=native",
            "-ffp-contract=fast",
            "-shared",
            "-fPIC",
            str(source),
            "-o",
            str(binary),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            library = ctypes.CDLL(str(binary))
        except (OSError, subprocess.SubprocessError):
            return None
    for loop in (library.fp32_loop, library.bf16_loop):
        loop.restype = ctypes.c_int64
        loop.argtypes = [ctypes.c_int64, ctypes.POINTER(ctypes.c_float)]
    return library


def multiply_add_rates(seconds: float = 0.15) -> dict[str, float]:
    """Floating-point operations a second of all of torch's threads together, by dtype name; {} when unknown."""
    import torch

    library = _library()
    if library is None:
        return {}
    threads = min(torch.get_num_threads(), os.cpu_count() or 1)

    def rate(loop) -> float:
        rounds, best = 1 << 16, 0.0
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            sinks = [ctypes.c_float(0) for _ in range(threads)]
            for _ in range(8):
                start = time.perf_counter()
                done = sum(pool.map(loop, [rounds] * threads, map(ctypes.byref, sinks)))
                took = time.perf_counter() - start
                best = max(best, done / took)
                if took < seconds:
                    rounds = int(rounds * min(8.0, max(1.2, seconds / took)))
        return best

    rates = {"fp32": rate(library.fp32_loop), "bf16": rate(library.bf16_loop)}
    return {name: value for name, value in rates.items() if value > 0}
