// The two 16-bit types. A tensor's elements are moved as uint16_t; a type is a tag that says what they mean.
#pragma once
#include "platform.cuh"

namespace retro_kernels {

struct BFloat16 {};
struct Float16 {};

#if defined(RK_EMULATED)
namespace emulator {

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float widen(BFloat16, uint16_t x) { return float_of_bits(static_cast<uint32_t>(x) << 16); }

inline uint16_t narrow(BFloat16, float x) {
  const uint32_t bits = bits_of_float(x);
  if (x != x) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float widen(Float16, uint16_t x) {
  const int exponent = x >> 10 & 31, fraction = x & 1023;
  const float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                          : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                         : std::ldexp(static_cast<float>(fraction), -24);
  return x >> 15 ? -magnitude : magnitude;
}

inline uint16_t narrow(Float16, float x) {
  if (x != x) return 0x7fff;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent;
  std::frexp(magnitude, &exponent);  // magnitude = [0.5, 1) * 2^exponent
  const int shift = std::max(exponent - 11, -24);  // value of the last place
  const int quantum = static_cast<int>(std::nearbyint(std::ldexp(magnitude, -shift)));  // to nearest, ties to even
  // 1024..2048 quanta at `shift` are a normal number; fewer, at the smallest shift, a subnormal one
  if (quantum < 1024) return sign | static_cast<uint16_t>(quantum);
  return sign | static_cast<uint16_t>(((shift + 25 - 1) << 10) + quantum);
}

}  // namespace emulator
#endif

// Two numbers in one register, the first in its low half.
RK_DEVICE uint32_t pack(BFloat16, float low, float high) {
#if !defined(RK_EMULATED)
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return emulator::narrow(BFloat16(), low) | static_cast<uint32_t>(emulator::narrow(BFloat16(), high)) << 16;
#endif
}

RK_DEVICE uint32_t pack(Float16, float low, float high) {
#if !defined(RK_EMULATED)
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
#else
  return emulator::narrow(Float16(), low) | static_cast<uint32_t>(emulator::narrow(Float16(), high)) << 16;
#endif
}

RK_DEVICE void unpack(BFloat16, uint32_t packed, float& low, float& high) {
#if !defined(RK_EMULATED)
  low = __uint_as_float(packed << 16);
  high = __uint_as_float(packed & 0xffff0000u);
#else
  low = emulator::widen(BFloat16(), static_cast<uint16_t>(packed));
  high = emulator::widen(BFloat16(), static_cast<uint16_t>(packed >> 16));
#endif
}

RK_DEVICE void unpack(Float16, uint32_t packed, float& low, float& high) {
#if !defined(RK_EMULATED)
  asm("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
      : "=f"(low), "=f"(high)
      : "r"(packed));
#else
  low = emulator::widen(Float16(), static_cast<uint16_t>(packed));
  high = emulator::widen(Float16(), static_cast<uint16_t>(packed >> 16));
#endif
}

}  // namespace retro_kernels
