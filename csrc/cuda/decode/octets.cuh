// Eight adjacent numbers of a cache, a weight or a query: what a thread loads at once, 16 bytes where they are halves.
// Loading is apart from widening, so that several loads are on their way before the first number is needed.
#pragma once
#include "../common/numbers.cuh"
#include "problem.h"

namespace retro_kernels {
namespace decode {

using Quad = Vector16;
struct alignas(8) Pair {
  uint32_t x, y;
};

struct Octet {
  float x[8];
};

template <int kType>
struct Raw {  // int8 and float8
  Pair bits;
};
template <>
struct Raw<kFloat16> {
  Quad bits;
};
template <>
struct Raw<kBFloat16> {
  Quad bits;
};
template <>
struct Raw<kFloat32> {
  Quad bits, more;
};

template <int kType>
RK_DEVICE const char* address(const void* data, int64_t element) {
  return static_cast<const char*>(data) + element * (kType == kFloat32 ? 4 : kType <= kBFloat16 ? 2 : 1);
}

template <int kType>
RK_DEVICE Raw<kType> load(const void* data, int64_t element) {
  const char* p = address<kType>(data, element);
  Raw<kType> raw;
  raw.bits = *reinterpret_cast<const decltype(raw.bits)*>(p);
  if constexpr (kType == kFloat32) raw.more = *reinterpret_cast<const Quad*>(p + 16);
  return raw;
}

// float8 e4m3fn as a half whose exponent is biased by 8 more: 2^8 is multiplied back. Subnormals come out exact.
RK_DEVICE float widen_float8(uint32_t byte) {
  const uint32_t magnitude = byte & 0x7fu;
  const uint32_t half = magnitude == 0x7fu ? 0x7e00u : ((byte & 0x80u) << 8) | (magnitude << 7);
  return 256.0f * half_to_float(half);
}

template <int kType>
RK_DEVICE float widen_one(uint32_t word, int part) {  // part: which element of a 4-byte word
  if constexpr (kType == kFloat16) {
    return half_to_float(word >> (16 * part));
  } else if constexpr (kType == kBFloat16) {
    return bits_to_float(part ? word & 0xffff0000u : word << 16);
  } else if constexpr (kType == kInt8) {
    return static_cast<float>(static_cast<int8_t>(word >> (8 * part)));
  } else {
    return widen_float8((word >> (8 * part)) & 0xffu);
  }
}

template <int kType>
RK_DEVICE Octet widen(const Raw<kType>& raw) {
  Octet out;
  if constexpr (kType == kFloat32) {
    const uint32_t words[8] = {raw.bits.x, raw.bits.y, raw.bits.z, raw.bits.w,
                               raw.more.x, raw.more.y, raw.more.z, raw.more.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) out.x[i] = bits_to_float(words[i]);
  } else if constexpr (kType <= kBFloat16) {
    const uint32_t words[4] = {raw.bits.x, raw.bits.y, raw.bits.z, raw.bits.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) out.x[i] = widen_one<kType>(words[i / 2], i % 2);
  } else {
    const uint32_t words[2] = {raw.bits.x, raw.bits.y};
#pragma unroll
    for (int i = 0; i < 8; ++i) out.x[i] = widen_one<kType>(words[i / 4], i % 4);
  }
  return out;
}

#define RK_BY_CACHE_TYPE(type, call) \
  switch (type) {                    \
    case kFloat32:                   \
      call(kFloat32);                \
      break;                         \
    case kFloat16:                   \
      call(kFloat16);                \
      break;                         \
    case kBFloat16:                  \
      call(kBFloat16);               \
      break;                         \
    case kInt8:                      \
      call(kInt8);                   \
      break;                         \
    case kFloat8:                    \
      call(kFloat8);                 \
      break;                         \
  }

// Eight numbers of a query or an output, whose type is known at run time.
RK_DEVICE Octet load_octet(Type type, const void* data, int64_t element) {
  if (type == kFloat32) return widen(load<kFloat32>(data, element));
  if (type == kFloat16) return widen(load<kFloat16>(data, element));
  return widen(load<kBFloat16>(data, element));
}

RK_DEVICE float load_number(Type type, const void* data, int64_t element) {
  if (type == kFloat32) return static_cast<const float*>(data)[element];
  const uint16_t bits = static_cast<const uint16_t*>(data)[element];
  return type == kFloat16 ? half_to_float(bits) : bits_to_float(static_cast<uint32_t>(bits) << 16);
}

RK_DEVICE void store_number(Type type, void* data, int64_t element, float x) {
  if (type == kFloat32)
    static_cast<float*>(data)[element] = x;
  else
    static_cast<uint16_t*>(data)[element] = static_cast<uint16_t>(type == kFloat16 ? pack(Float16(), x, 0.0f) : pack(BFloat16(), x, 0.0f));
}

}  // namespace decode
}  // namespace retro_kernels
