// Fused chunked cross-attention, forward and backward, for one instruction-set level (see simd.h).
//
// A work item is one (batch, chunk, kv head). Its visible keys are packed, `key_block` at a time and masked tokens left
// out altogether, into per-thread buffers; its rows are the attending tokens of all query heads of the group, taken
// kRows at a time. Scores are kept transposed, [key][row]: keys and values then serve as the broadcast operand just as
// they lie in memory, only the (fewer) rows are transposed, and softmax runs down the lanes without any horizontal
// operation. Rows are padded to kRowStep with zeros; a padded row has finite scores and contributes zero.
//
//   forward    S' = K Q'    softmax down S'    O = P V
//   backward   S' = K Q'    G' = V dO'         dV = P' dO    dK = dS' Q    dQ = dS K      (dS = P (G - delta))
//
// With bf16 dot products (kPairs) an "element" of a multiplied matrix is a pair of bf16 adjacent along the summed
// index. Otherwise bf16 and fp16 are widened to fp32 when packed. Sums and softmax are fp32 throughout.
//
// Any number of keys and rows runs in the same scratch: the forward has an online softmax over key blocks; the backward
// has every row's log-sum-exp and visits (row block, key block) in one sweep when an item has one block of either kind
// and otherwise in two sweeps, one for dQ and one for dK and dV.
#include "problem.h"
#include "simd.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

constexpr int kRows = 64;
constexpr int kRowStep = 16;
constexpr int kMaxDim = 256;
constexpr int kDepth = 128;  // summed indices per pass of the register tile: a panel of 128 x kPanel stays in L1
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

RK_INLINE int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
RK_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
RK_INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
RK_INLINE float infinity() { return __builtin_inff(); }

// ----------------------------------------------------------------------------------------------------- prefetch

// What the next key block will be packed from, fetched into L2 a little after every register tile. Rows of one head lie
// a whole token apart, which hardware prefetchers do not follow.
struct Prefetch {
  struct Stream {
    const char* row;
    int64_t step, bytes;
  };
  int64_t quota = 0;         // rows per tile
  int64_t slots = 0, rows = 0;  // what is left
  int64_t token = 0, retrieved = 1;
  Stream key, value;               // one row per slot
  int64_t key_jump = 0, value_jump = 0;  // from the first token of a neighbour to that of the next
  const char *key_start = nullptr, *value_start = nullptr;
  Stream lines[3];                 // queries; in the backward also output gradients and outputs
  int streams = 0;

  RK_INLINE void fetch(const Stream& s) {
    const char* end = s.row + s.bytes;
    for (const char* line = (const char*)((uintptr_t)s.row & ~(uintptr_t)63); line < end; line += 64)
      __builtin_prefetch(line, 0, 2);
  }

  void step() {
    for (int64_t i = 0; i < quota; ++i) {
      if (slots > 0) {
        fetch(key);
        fetch(value);
        key.row += key.step;
        value.row += value.step;
        if (++token == retrieved) {
          token = 0;
          key.row = key_start += key_jump;
          value.row = value_start += value_jump;
        }
        --slots;
      } else if (rows > 0) {
        for (int j = 0; j < streams; ++j) {
          fetch(lines[j]);
          lines[j].row += lines[j].step;
        }
        --rows;
      } else {
        quota = 0;
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------- matrix products

template <int kVectors, bool kDown, bool kPairs, bool kAdd>
RK_INLINE void tile(int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc) {
  vfloat acc[kTileRows][kVectors];
  RK_UNROLL for (int i = 0; i < kTileRows; ++i)
    RK_UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] = vfloat{};
  for (int64_t k = 0; k < depth; ++k) {
    vfloat bv[kVectors];
    RK_UNROLL for (int v = 0; v < kVectors; ++v) bv[v] = load(b + k * ldb + v * kLanes);
    RK_UNROLL for (int i = 0; i < kTileRows; ++i) {
      const float x = kDown ? a[k * lda + i] : a[i * lda + k];
      RK_UNROLL for (int v = 0; v < kVectors; ++v) acc[i][v] = multiply_add<kPairs>(acc[i][v], x, bv[v]);
    }
  }
  RK_UNROLL for (int i = 0; i < kTileRows; ++i)
    RK_UNROLL for (int v = 0; v < kVectors; ++v) {
      float* p = c + i * ldc + v * kLanes;
      store(p, kAdd ? load(p) + acc[i][v] : acc[i][v]);
    }
}

template <bool kDown, bool kPairs, bool kAdd>
static __attribute__((noinline)) void multiply_strip(
    int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t lda, const float* b, int64_t ldb,
    int64_t panel, float* c, int64_t ldc, Prefetch* next) {
  int64_t v = 0;
  for (; v + 2 <= vectors; v += 2)
    for (int64_t i = 0; i < rows; i += kTileRows) {
      tile<2, kDown, kPairs, kAdd>(depth, kDown ? a + i : a + i * lda, lda, b + v / 2 * panel, ldb,
                                   c + i * ldc + v * kLanes, ldc);
      if (next->quota > 0) next->step();
    }
  if (v < vectors)
    for (int64_t i = 0; i < rows; i += kTileRows)
      tile<1, kDown, kPairs, kAdd>(depth, kDown ? a + i : a + i * lda, lda, b + v / 2 * panel, ldb,
                                   c + i * ldc + v * kLanes, ldc);
}

// C[rows, columns] (+)= A B. A is [rows][depth], or with kDown [depth][rows]; kPanel columns of B start every `panel`
// elements. `rows` is a multiple of kTileRows and `columns` of kLanes.
template <bool kDown, bool kPairs>
RK_INLINE void multiply(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t lda, const float* b,
                        int64_t ldb, int64_t panel, float* c, int64_t ldc, bool add, Prefetch* next) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    const int64_t n = least(kDepth, depth - k);
    const float* at = kDown ? a + k * lda : a + k;
    if (add || k > 0)
      multiply_strip<kDown, kPairs, true>(rows, columns / kLanes, n, at, lda, b + k * ldb, ldb, panel, c, ldc,
                                          next);
    else
      multiply_strip<kDown, kPairs, false>(rows, columns / kLanes, n, at, lda, b + k * ldb, ldb, panel, c, ldc,
                                           next);
  }
}

// --------------------------------------------------------------------------------------- loading and storing rows

// dst[0, padded) fp32, zero beyond n
template <class T>
RK_INLINE void widen_row(const T* src, int64_t n, float* dst, int64_t padded) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(dst + i, widen_vector(src + i));
  for (; i < n; ++i) dst[i] = widen(src[i]);
  for (; i < padded; ++i) dst[i] = 0.0f;
}

template <class T>
RK_INLINE void narrow_row(const float* src, int64_t n, float factor, T* dst) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) narrow_vector(load(src + i) * factor, dst + i);
  for (; i < n; ++i) narrow(src[i] * factor, dst + i);
}

// The same for a row that is not read again soon: whole cache lines are written past the cache, unread.
template <class T>
RK_INLINE void stream_row(const float* src, int64_t n, float factor, T* dst) {
#if RK_LEVEL >= 2
  constexpr int64_t kStep = 64 / (int64_t)sizeof(T);
  if (((uintptr_t)dst & 63) == 0 && n % kStep == 0) {
    for (int64_t i = 0; i < n; i += kStep) {
      if constexpr (sizeof(T) == 4) {
        _mm512_stream_ps((float*)(dst + i), (__m512)(load(src + i) * factor));
      } else {
        T line[kStep] __attribute__((aligned(64)));
        narrow_vector(load(src + i) * factor, line);
        narrow_vector(load(src + i + kLanes) * factor, line + kLanes);
        _mm512_stream_si512((__m512i*)(dst + i), _mm512_load_si512(line));
      }
    }
    return;
  }
#endif
  narrow_row(src, n, factor, dst);
}

static void widen_operand(const Operand& o, int64_t offset, int64_t n, float* dst) {
  if (o.type == kFloat32)
    widen_row((const float*)o.data + offset, n, dst, n);
  else if (o.type == kFloat16)
    widen_row((const half_t*)o.data + offset, n, dst, n);
  else
    widen_row((const bfloat_t*)o.data + offset, n, dst, n);
}

// Turns x by the table's row, or back with `direction` -1.
static void rotate(float* x, const Operand& cosine, const Operand& sine, int64_t row, int64_t width, bool interleaved,
                   float direction) {
  float c[kMaxDim / 2], s[kMaxDim / 2];
  widen_operand(cosine, row * cosine.stride0, width, c);
  widen_operand(sine, row * sine.stride0, width, s);
  if (interleaved) {
    for (int64_t j = 0; j < width; ++j) {
      const float a = x[2 * j], b = x[2 * j + 1], t = s[j] * direction;
      x[2 * j] = a * c[j] - b * t;
      x[2 * j + 1] = b * c[j] + a * t;
    }
  } else {
    for (int64_t j = 0; j < width; ++j) {
      const float a = x[j], b = x[j + width], t = s[j] * direction;
      x[j] = a * c[j] - b * t;
      x[j + width] = b * c[j] + a * t;
    }
  }
}

RK_INLINE void add_scaled(float* x, float factor, const float* y, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] += factor * y[i];
}

RK_INLINE float dot(const float* x, const float* y, int64_t padded) {
  vfloat sum = {};
  for (int64_t i = 0; i < padded; i += kLanes) sum += load(x + i) * load(y + i);
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

// ------------------------------------------------------------------------------------------------------- layout

// Buffer sizes, in fp32 elements unless said. Every buffer starts on a cache line.
struct Sizes {
  bool pairs;
  int64_t keys;                 // key_block
  int64_t dim, dim_value;       // padded to 16
  int64_t depth, depth_value;   // elements summed over d and d_value
  int64_t ld, ld_value;         // row length of packed keys and values; never a multiple of 512 bytes

  Sizes(const Problem& p, bool pairs_) : pairs(pairs_) {
    const int64_t per = pairs ? 2 : 1;
    dim = round_up(p.dim, 16);
    dim_value = round_up(p.dim_value, 16);
    keys = most(dim, dim_value) <= 128 ? 256 : 128;
    depth = (p.dim + per - 1) / per;
    depth_value = (p.dim_value + per - 1) / per;
    ld = round_up(depth, 16) + 16;
    ld_value = round_up(depth_value, 16) + 16;
  }
};

struct Arena {
  char* base;
  size_t used = 0;
  template <class T = float>
  T* take(int64_t count) {
    T* p = (T*)(base + used);
    used += ((size_t)count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

// The rows of one row block.
struct Rows {
  int64_t count, padded;
  int64_t head[kRows], token[kRows], row[kRows];
};

// The attending tokens of a work item.
struct Item {
  int64_t b, u, kv;
  int64_t first, count, row0;  // tokens [first, first + count), the first of them being chunk row row0
};

RK_INLINE Item make_item(const Problem& p, int64_t b, int64_t u, int64_t kv) {
  const int64_t start = p.first_token + u * p.stride;
  const int64_t first = most(start, 0), last = least(start + p.stride, p.tokens);
  return {b, u, kv, first, most(last - first, 0), first - start};
}

RK_INLINE void make_rows(const Problem& p, const Item& item, int64_t block, Rows* rows) {
  const int64_t group = p.heads / p.kv_heads, begin = block * kRows;
  rows->count = least(kRows, group * item.count - begin);
  rows->padded = round_up(rows->count, kRowStep);
  for (int64_t i = 0; i < rows->count; ++i) {
    const int64_t x = begin + i, token = x % item.count;
    rows->head[i] = item.kv * group + x / item.count;
    rows->token[i] = item.first + token;
    rows->row[i] = item.row0 + token;
  }
}

// The next key block: the slots (neighbour * r + token) of up to `limit` visible keys from `*cursor` on.
struct Keys {
  int64_t count, padded;
  bool contiguous;
  int64_t slot[256];
};

RK_INLINE void next_keys(const Problem& p, const Item& item, int64_t limit, int64_t* cursor, Keys* keys) {
  const int64_t slots = p.neighbours * p.retrieved;
  int64_t n = 0, s = *cursor;
  if (!p.mask) {
    for (; s < slots && n < limit; ++s) keys->slot[n++] = s;
  } else {
    const uint8_t* base = p.mask + item.b * p.mask_stride[0] + item.u * p.mask_stride[1];
    for (; s < slots && n < limit; ++s)
      if (base[s / p.retrieved * p.mask_stride[2] + s % p.retrieved * p.mask_stride[3]]) keys->slot[n++] = s;
  }
  *cursor = s;
  keys->count = n;
  keys->padded = round_up(n, 8);
  keys->contiguous = n > 0 && keys->slot[n - 1] - keys->slot[0] == n - 1;
}

// ------------------------------------------------------------------------------------------------------ packing

// One row of d elements into `dst` as the products want it: fp32, or bf16 (two to an element), zero beyond d.
template <class T, bool kPairs>
RK_INLINE void pack_row(const T* src, int64_t d, const Operand* cosine, const Operand* sine, int64_t row,
                        int64_t width, bool interleaved, float* dst, int64_t padded) {
  if constexpr (kPairs) {
    bfloat_t* out = (bfloat_t*)dst;
    if (width == 0) {
      int64_t i = 0;
      for (; i + 32 <= d; i += 32) __builtin_memcpy(out + i, src + i, 64);
      for (; i < d; ++i) __builtin_memcpy(out + i, src + i, 2);
    } else {
      float x[kMaxDim];
      widen_row(src, d, x, round_up(d, 16));
      rotate(x, *cosine, *sine, row, width, interleaved, 1.0f);
      narrow_row(x, d, 1.0f, out);
    }
    for (int64_t i = d; i < 2 * padded; ++i) out[i].bits = 0;
  } else {
    widen_row(src, d, dst, padded);
    if (width > 0) rotate(dst, *cosine, *sine, row, width, interleaved, 1.0f);
  }
}

#if RK_LEVEL >= 3
// dst[i] = pair (a[i], b[i])
RK_INLINE void interleave(const bfloat_t* a, const bfloat_t* b, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; i += 16) {
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + i)));
    const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(b + i)));
    _mm512_storeu_si512(dst + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
}
#endif

// Rows [row][ld] into panels: dst[panel of kPanel rows][element][row in panel].
RK_INLINE void transpose_rows(const float* rows, int64_t ld, int64_t padded_rows, int64_t elements, float* dst) {
  for (int64_t i = 0; i < padded_rows; i += kLanes)
    for (int64_t j = 0; j < elements; j += kLanes)
      transpose_square(rows + i * ld + j, ld, dst + i / kPanel * round_up(elements, 16) * kPanel + j * kPanel + i % kPanel,
                       kPanel);
}

RK_INLINE int64_t panel_size(int64_t depth) { return round_up(depth, 16) * kPanel; }

template <class T>
RK_INLINE const T* query_row(const Problem& p, const Item& item, const Rows& rows, int64_t i) {
  return (const T*)p.query + item.b * p.query_stride[0] + rows.token[i] * p.query_stride[1] +
         rows.head[i] * p.query_stride[2];
}

RK_INLINE int64_t key_offset(const Problem& p, const int64_t* stride, const Item& item, int64_t slot) {
  // 32-bit division is several times faster, and nearly every call can use it
  if (((uint64_t)slot | (uint64_t)p.retrieved) >> 32 == 0) {
    const uint32_t neighbour = (uint32_t)slot / (uint32_t)p.retrieved, token = (uint32_t)slot % (uint32_t)p.retrieved;
    return item.b * stride[0] + item.u * stride[1] + neighbour * stride[2] + token * stride[3] + item.kv * stride[4];
  }
  return item.b * stride[0] + item.u * stride[1] + slot / p.retrieved * stride[2] + slot % p.retrieved * stride[3] +
         item.kv * stride[4];
}

template <class T, bool kPairs>
static void pack_keys(const Problem& p, const Item& item, const Sizes& z, const Keys& keys, float* packed) {
  for (int64_t i = 0; i < keys.count; ++i)
    pack_row<T, kPairs>((const T*)p.key + key_offset(p, p.key_stride, item, keys.slot[i]), p.dim, &p.key_cos,
                        &p.key_sin, keys.slot[i] % p.retrieved, p.rotary_width, p.rotary_interleaved,
                        packed + i * z.ld, z.ld - 16);
  for (int64_t i = keys.count; i < keys.padded; ++i) __builtin_memset(packed + i * z.ld, 0, (size_t)(z.ld - 16) * 4);
}

template <class T, bool kPairs>
static void pack_values(const Problem& p, const Item& item, const Sizes& z, const Keys& keys, float* packed) {
  for (int64_t i = 0; i < keys.count; ++i)
    pack_row<T, kPairs>((const T*)p.value + key_offset(p, p.value_stride, item, keys.slot[i]), p.dim_value, nullptr,
                        nullptr, 0, 0, false, packed + i * z.ld_value, z.ld_value - 16);
  for (int64_t i = keys.count; i < keys.padded; ++i)
    __builtin_memset(packed + i * z.ld_value, 0, (size_t)(z.ld_value - 16) * 4);
}

// Rows [row][ld] of pairs along their length into [row / 2][dim] of pairs along the rows.
template <bool kPairs>
RK_INLINE void interleave_rows(const float* rows, int64_t ld, int64_t count, int64_t dim, float* dst, int64_t ld_dst) {
#if RK_LEVEL >= 3
  if constexpr (kPairs)
    for (int64_t i = 0; i < count; i += 2)
      interleave((const bfloat_t*)(rows + i * ld), (const bfloat_t*)(rows + (i + 1) * ld), dim, dst + i / 2 * ld_dst);
#endif
}

// The values of adjacent visible keys as pairs, straight from memory. d_value is a multiple of 16.
template <class T, bool kPairs>
static void interleave_values(const Problem& p, const Item& item, const Sizes& z, const Keys& keys, float* packed) {
#if RK_LEVEL >= 3
  if constexpr (kPairs) {
    static const bfloat_t zeros[kMaxDim] = {};
    for (int64_t i = 0; i < keys.count; i += 2) {
      const T* a = (const T*)p.value + key_offset(p, p.value_stride, item, keys.slot[i]);
      const T* b =
          i + 1 < keys.count ? (const T*)p.value + key_offset(p, p.value_stride, item, keys.slot[i + 1]) : zeros;
      interleave(a, b, p.dim_value, packed + i / 2 * z.dim_value);
    }
  }
#endif
}

// bias[key][row] * log2(e)
static void gather_bias(const Problem& p, const Rows& rows, const Keys& keys, float* bias) {
  float line[256 + 16] __attribute__((aligned(64)));
  float square[kLanes * 256] __attribute__((aligned(64)));
  const int64_t padded = keys.padded;
  for (int64_t i0 = 0; i0 < rows.padded; i0 += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      float* dst = square + i * 256;
      if (i0 + i >= rows.count) {
        __builtin_memset(dst, 0, sizeof(float) * 256);
        continue;
      }
      const int64_t offset = rows.head[i0 + i] * p.bias.stride0 + rows.row[i0 + i] * p.bias.stride1;
      int64_t k = 0;
      while (k < keys.count) {  // runs of consecutive slots that are consecutive in the bias too
        const int64_t start = keys.slot[k] % p.bias_slots;
        int64_t n = 1;
        while (k + n < keys.count && keys.slot[k + n] == keys.slot[k] + n && start + n < p.bias_slots) ++n;
        widen_operand(p.bias, offset + start, n, line);
        for (int64_t j = 0; j < n; ++j) dst[k + j] = line[j] * kLog2e;
        k += n;
      }
      for (; k < 256 && k < round_up(padded, kLanes); ++k) dst[k] = 0.0f;
    }
    int64_t k = 0;
    for (; k + kLanes <= padded; k += kLanes) transpose_square(square + k, 256, bias + k * kRows + i0, kRows);
    for (; k < padded; ++k)
      for (int64_t i = 0; i < kLanes; ++i) bias[k * kRows + i0 + i] = square[i * 256 + k];
  }
}

// Starts fetching the key block from `slot` of an item on and, where `slot` is 0, its first rows.
template <class T>
RK_INLINE Prefetch make_prefetch(const Problem& p, const Item& item, int64_t slot, const Sizes& z, int64_t tiles,
                                 bool backward) {
  Prefetch f;
  const int64_t size = sizeof(T), slots = p.neighbours * p.retrieved;
  f.slots = item.count > 0 ? least(slots - slot, z.keys) : 0;
  f.retrieved = p.retrieved;
  f.token = f.slots > 0 ? slot % p.retrieved : 0;
  if (f.slots > 0) {
    f.key = {(const char*)((const T*)p.key + key_offset(p, p.key_stride, item, slot)), p.key_stride[3] * size,
             p.dim * size};
    f.value = {(const char*)((const T*)p.value + key_offset(p, p.value_stride, item, slot)), p.value_stride[3] * size,
               p.dim_value * size};
    f.key_start = f.key.row - f.token * f.key.step;
    f.value_start = f.value.row - f.token * f.value.step;
    f.key_jump = p.key_stride[2] * size;
    f.value_jump = p.value_stride[2] * size;
  }
  if (slot == 0 && p.heads == p.kv_heads) {
    f.rows = least(item.count, kRows);
    f.streams = backward ? 3 : 1;
    f.lines[0] = {(const char*)((const T*)p.query + item.b * p.query_stride[0] + item.first * p.query_stride[1] +
                                item.kv * p.query_stride[2]),
                  p.query_stride[1] * size, p.dim * size};
    if (backward) {
      f.lines[1] = {(const char*)((const T*)p.grad_out + item.b * p.grad_out_stride[0] +
                                  item.first * p.grad_out_stride[1] + item.kv * p.grad_out_stride[2]),
                    p.grad_out_stride[1] * size, p.dim_value * size};
      f.lines[2] = {(const char*)((const T*)p.out + ((item.b * p.tokens + item.first) * p.heads + item.kv) * p.dim_value),
                    p.heads * p.dim_value * size, p.dim_value * size};
    }
  }
  f.quota = f.slots + f.rows > 0 ? (f.slots + f.rows + tiles - 1) / tiles : 0;
  return f;
}

RK_INLINE Item item_at(const Problem& p, int64_t index) {
  return make_item(p, index / p.kv_heads / p.chunks, index / p.kv_heads % p.chunks, index % p.kv_heads);
}

// ------------------------------------------------------------------------------------------------------ forward

struct ForwardBuffers {
  float *keys, *values, *raw, *rows, *scores, *probabilities, *bias, *out;
  float *highest, *sum, *rescale;
  float *null_value, *null_key, *wide;

  ForwardBuffers(const Problem& p, const Sizes& z, Arena* arena) {
    keys = arena->take(z.keys * z.ld);
    values = arena->take(z.pairs ? z.keys / 2 * z.dim_value : z.keys * z.ld_value);
    raw = arena->take(most(kRows * z.ld, z.pairs ? z.keys * z.ld_value : 0));
    rows = arena->take(kRows * round_up(z.depth, 16));
    scores = arena->take(z.keys * kRows);
    probabilities = z.pairs ? arena->take(z.keys / 2 * kRows) : scores;
    bias = arena->take(p.bias.data ? z.keys * kRows : 0);
    out = arena->take(kRows * z.dim_value);
    highest = arena->take(kRows);
    sum = arena->take(kRows);
    rescale = arena->take(kRows);
    null_key = arena->take(kMaxDim);
    null_value = arena->take(kMaxDim);
    wide = arena->take(kMaxDim);
  }
};

// Scores [key][row] -> unnormalised probabilities relative to the running maximum, which this updates with the sum.
template <bool kPairs>
static void softmax_block(const Keys& keys, int64_t padded_rows, float factor, const float* bias, float* scores,
                          float* probabilities, float* highest, float* sum, float* rescale) {
  const int64_t n = keys.count;
  for (int64_t i = 0; i < padded_rows; i += kLanes) {
    float* s = scores + i;
    vfloat high = load(highest + i), high1 = high;
    const vfloat before = high;
    float scale = factor;
    int64_t k = 0;
    if (bias) {
      for (; k < n; ++k) {
        const vfloat x = load(s + k * kRows) * factor + load(bias + k * kRows + i);
        store(s + k * kRows, x);
        high = larger(x, high);
      }
      scale = 1.0f;
    } else {
      for (; k + 2 <= n; k += 2) {
        high = larger(load(s + k * kRows) * factor, high);
        high1 = larger(load(s + (k + 1) * kRows) * factor, high1);
      }
      for (; k < n; ++k) high = larger(load(s + k * kRows) * factor, high);
      high = larger(high1, high);
    }
    store(highest + i, high);
    const vint nothing = high == splat(-infinity());
    const vfloat reference = nothing ? vfloat{} : high;
    const vfloat alpha = exp2(before - reference);
    store(rescale + i, alpha);
    vfloat total = {}, total1 = {};
    k = 0;
    for (; k + 2 <= n; k += 2) {
      const vfloat a = exp2(load(s + k * kRows) * scale - reference);
      const vfloat b = exp2(load(s + (k + 1) * kRows) * scale - reference);
      total += a;
      total1 += b;
#if RK_LEVEL >= 3
      if constexpr (kPairs) {
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
        const __m512i high16 = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
        _mm512_store_si512(probabilities + k / 2 * kRows + i, _mm512_or_si512(low, _mm512_slli_epi32(high16, 16)));
        continue;
      }
#endif
      store(probabilities + k * kRows + i, a);
      store(probabilities + (k + 1) * kRows + i, b);
    }
    if (k < n) {
      const vfloat a = exp2(load(s + k * kRows) * scale - reference);
      total += a;
#if RK_LEVEL >= 3
      if constexpr (kPairs)
        _mm512_store_si512(probabilities + k / 2 * kRows + i,
                           _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a)));
      else
#endif
        store(probabilities + k * kRows + i, a);
    }
    store(sum + i, load(sum + i) * alpha + (total + total1));
  }
}

template <class T, bool kPairs>
static void forward_items(const Problem& p, const Sizes& z, const ForwardBuffers& f, int64_t first_item,
                          int64_t last_item) {
  const int64_t slots = p.neighbours * p.retrieved, group = p.heads / p.kv_heads;
  const bool one_block = slots <= z.keys;
  const float factor = p.scale * kLog2e;
  Rows rows;
  Keys keys;
  Prefetch ahead;
  Prefetch* const next = &ahead;
  const int64_t tiles = least(slots, z.keys) / kTileRows * kRows / kPanel + kRows / kTileRows * z.dim_value / kPanel + 1;
  for (int64_t index = first_item; index < last_item; ++index) {
    const Item item = item_at(p, index);
    if (item.count == 0) continue;
    const int64_t blocks = (group * item.count + kRows - 1) / kRows;
    for (int64_t block = 0; block < blocks; ++block) {
      make_rows(p, item, block, &rows);
      for (int64_t i = 0; i < rows.count; ++i)
        pack_row<T, kPairs>(query_row<T>(p, item, rows, i), p.dim, &p.query_cos, &p.query_sin, rows.row[i],
                            p.rotary_width, p.rotary_interleaved, f.raw + i * z.ld, z.ld - 16);
      for (int64_t i = rows.count; i < rows.padded; ++i) __builtin_memset(f.raw + i * z.ld, 0, (size_t)z.ld * 4);
      transpose_rows(f.raw, z.ld, rows.padded, round_up(z.depth, 16), f.rows);

      bool started = p.null_key.data != nullptr;
      for (int64_t i = 0; i < rows.padded; ++i) {
        f.highest[i] = -infinity();
        f.sum[i] = 0.0f;
        if (!started) continue;
        float* out = f.out + i * z.dim_value;
        if (i >= rows.count) {
          __builtin_memset(out, 0, (size_t)z.dim_value * 4);
          continue;
        }
        if (i == 0 || rows.head[i] != rows.head[i - 1]) {
          __builtin_memset(f.null_key, 0, kMaxDim * 4);
          __builtin_memset(f.null_value, 0, kMaxDim * 4);
          widen_operand(p.null_key, rows.head[i] * p.null_key.stride0, p.dim, f.null_key);
          widen_operand(p.null_value, rows.head[i] * p.null_value.stride0, p.dim_value, f.null_value);
        }
        const float* q = f.raw + i * z.ld;
        if (kPairs) widen_row((const bfloat_t*)q, p.dim, f.wide, z.dim), q = f.wide;
        f.highest[i] = dot(q, f.null_key, z.dim) * factor;
        f.sum[i] = 1.0f;
        __builtin_memcpy(out, f.null_value, (size_t)z.dim_value * 4);
      }

      int64_t cursor = 0;
      do {
        if (!one_block || block == 0) {
          next_keys(p, item, z.keys, &cursor, &keys);
          pack_keys<T, kPairs>(p, item, z, keys, f.keys);
          if (kPairs && p.dim_value % 16 == 0) {
            interleave_values<T, kPairs>(p, item, z, keys, f.values);
          } else if (kPairs) {
            pack_values<T, kPairs>(p, item, z, keys, f.raw);
            interleave_rows<kPairs>(f.raw, z.ld_value, keys.padded, z.dim_value, f.values, z.dim_value);
          } else {
            pack_values<T, kPairs>(p, item, z, keys, f.values);
          }
        } else {
          cursor = slots;
        }
        if (keys.count == 0) break;
        if (p.bias.data) gather_bias(p, rows, keys, f.bias);
        if (cursor < slots)
          ahead = make_prefetch<T>(p, item, cursor, z, tiles, false);
        else if (block + 1 == blocks && index + 1 < last_item)
          ahead = make_prefetch<T>(p, item_at(p, index + 1), 0, z, tiles, false);
        multiply<false, kPairs>(keys.padded, rows.padded, z.depth, f.keys, z.ld, f.rows, kPanel, panel_size(z.depth),
                                f.scores, kRows, false, next);
        softmax_block<kPairs>(keys, rows.padded, factor, p.bias.data ? f.bias : nullptr, f.scores, f.probabilities,
                              f.highest, f.sum, f.rescale);
        if (started)
          for (int64_t i = 0; i < rows.padded; ++i) {
            const float alpha = f.rescale[i];
            float* out = f.out + i * z.dim_value;
            for (int64_t j = 0; j < z.dim_value; j += kLanes) store(out + j, load(out + j) * alpha);
          }
        multiply<true, kPairs>(rows.padded, z.dim_value, kPairs ? (keys.count + 1) / 2 : keys.count, f.probabilities,
                               kRows, f.values, kPairs ? z.dim_value : z.ld_value, kPanel, f.out, z.dim_value, started,
                               next);
        started = true;
      } while (cursor < slots);

      for (int64_t i = 0; i < rows.count; ++i) {
        const int64_t position = (item.b * p.tokens + rows.token[i]) * p.heads + rows.head[i];
        T* out = (T*)p.out + position * p.dim_value;
        const float sum = f.sum[i];
        if (!started || sum == 0.0f) {
          __builtin_memset((void*)out, 0, (size_t)p.dim_value * sizeof(T));
          p.lse[position] = -infinity();
        } else {
          narrow_row(f.out + i * z.dim_value, p.dim_value, 1.0f / sum, out);
          p.lse[position] = (f.highest[i] + __builtin_log2f(sum)) * kLn2;
        }
      }
    }
  }
}

template <class T, bool kPairs>
static void forward_typed(const Problem& p, int64_t first_item, int64_t last_item, char* scratch) {
  const Sizes z(p, kPairs);
  Arena arena{scratch};
  const ForwardBuffers buffers(p, z, &arena);
  forward_items<T, kPairs>(p, z, buffers, first_item, last_item);
}

static void forward(const Problem& p, int64_t first_item, int64_t last_item, char* scratch) {
  if (p.type == kFloat32)
    forward_typed<float, false>(p, first_item, last_item, scratch);
  else if (p.type == kFloat16)
    forward_typed<half_t, false>(p, first_item, last_item, scratch);
  else
    forward_typed<bfloat_t, (RK_LEVEL >= 3)>(p, first_item, last_item, scratch);
}

// ----------------------------------------------------------------------------------------------------- backward

struct BackwardBuffers {
  // packed: as the broadcast operand, and with pairs adjacent along the keys or rows as the other operand
  float *keys, *keys_across, *values;
  float *query, *query_panels, *query_across;
  float *grad, *grad_panels, *grad_across;
  float *scores, *grad_scores, *bias;
  float *p_down, *ds_down, *ds_across;  // pairs along the rows, along the rows, along the keys
  float *grad_query, *grad_key, *grad_value;
  float *lse, *delta, *null_key, *null_value, *wide, *wide_grad;

  BackwardBuffers(const Problem& p, const Sizes& z, Arena* arena) {
    keys = arena->take(z.keys * z.ld);
    keys_across = z.pairs ? arena->take(z.keys / 2 * z.dim) : keys;
    values = arena->take(z.keys * z.ld_value);
    query = arena->take(kRows * z.ld);
    query_across = z.pairs ? arena->take(kRows / 2 * z.dim) : query;
    query_panels = arena->take(kRows * round_up(z.depth, 16));
    grad = arena->take(kRows * z.ld_value);
    grad_across = z.pairs ? arena->take(kRows / 2 * z.dim_value) : grad;
    grad_panels = arena->take(kRows * round_up(z.depth_value, 16));
    scores = arena->take(z.keys * kRows);
    grad_scores = arena->take(z.keys * kRows);
    bias = arena->take(p.bias.data ? z.keys * kRows : 0);
    p_down = z.pairs ? arena->take(z.keys * kRows / 2) : scores;
    ds_down = z.pairs ? arena->take(z.keys * kRows / 2) : grad_scores;
    ds_across = z.pairs ? arena->take(z.keys / 2 * kRows) : grad_scores;
    grad_query = arena->take(kRows * z.dim);
    grad_key = arena->take(z.keys * z.dim);
    grad_value = arena->take(z.keys * z.dim_value);
    lse = arena->take(kRows);
    delta = arena->take(kRows);
    null_key = arena->take(kMaxDim);
    null_value = arena->take(kMaxDim);
    wide = arena->take(kMaxDim);
    wide_grad = arena->take(kMaxDim);
  }
};

// Packs queries and output gradients of a row block; lse (base 2) and delta; the null slot's share of all gradients.
// Rows that saw nothing are packed as zeros with lse +inf, whatever they hold.
template <class T, bool kPairs>
static void pack_backward_rows(const Problem& p, const Item& item, const Sizes& z, const BackwardBuffers& f,
                               const Rows& rows, bool grad_query, bool parameters, int64_t copy) {
  for (int64_t i = 0; i < rows.padded; ++i) {
    float* query = f.query + i * z.ld;
    float* grad = f.grad + i * z.ld_value;
    float* dq = f.grad_query + i * z.dim;
    if (grad_query && p.null_key.data) __builtin_memset(dq, 0, (size_t)z.dim * 4);
    const int64_t position = i < rows.count ? (item.b * p.tokens + rows.token[i]) * p.heads + rows.head[i] : 0;
    if (i >= rows.count || p.lse[position] == -infinity()) {
      __builtin_memset(query, 0, (size_t)(z.ld - 16) * 4);
      __builtin_memset(grad, 0, (size_t)(z.ld_value - 16) * 4);
      f.lse[i] = i < rows.count ? infinity() : 0.0f;
      f.delta[i] = 0.0f;
      continue;
    }
    pack_row<T, kPairs>(query_row<T>(p, item, rows, i), p.dim, &p.query_cos, &p.query_sin, rows.row[i],
                        p.rotary_width, p.rotary_interleaved, query, z.ld - 16);
    const T* grad_row = (const T*)p.grad_out + item.b * p.grad_out_stride[0] + rows.token[i] * p.grad_out_stride[1] +
                        rows.head[i] * p.grad_out_stride[2];
    pack_row<T, kPairs>(grad_row, p.dim_value, nullptr, nullptr, 0, 0, false, grad, z.ld_value - 16);
    const float* wide_grad = grad;
    if (kPairs) widen_row(grad_row, p.dim_value, f.wide_grad, z.dim_value), wide_grad = f.wide_grad;
    widen_row((const T*)p.out + position * p.dim_value, p.dim_value, f.wide, z.dim_value);
    f.lse[i] = p.lse[position] * kLog2e;
    f.delta[i] = dot(wide_grad, f.wide, z.dim_value);
    if (!p.null_key.data) continue;

    if (i == 0 || rows.head[i] != rows.head[i - 1] || f.lse[i - 1] == infinity()) {
      __builtin_memset(f.null_key, 0, kMaxDim * 4);
      __builtin_memset(f.null_value, 0, kMaxDim * 4);
      widen_operand(p.null_key, rows.head[i] * p.null_key.stride0, p.dim, f.null_key);
      widen_operand(p.null_value, rows.head[i] * p.null_value.stride0, p.dim_value, f.null_value);
    }
    const float* wide_query = query;
    if (kPairs) widen_row((const bfloat_t*)query, p.dim, f.wide, z.dim), wide_query = f.wide;
    const float logit = dot(wide_query, f.null_key, z.dim) * (p.scale * kLog2e);
    const float probability = exp2(splat(logit - f.lse[i]))[0];
    const float ds = probability * (dot(wide_grad, f.null_value, z.dim_value) - f.delta[i]);
    if (grad_query)
      for (int64_t j = 0; j < z.dim; ++j) dq[j] = ds * f.null_key[j];
    if (parameters && p.null_key_partial) {
      const int64_t at = copy * p.heads + rows.head[i];
      add_scaled(p.null_key_partial + at * p.dim, ds * p.scale, wide_query, p.dim);
      add_scaled(p.null_value_partial + at * p.dim_value, probability, wide_grad, p.dim_value);
    }
  }
  transpose_rows(f.query, z.ld, rows.padded, round_up(z.depth, 16), f.query_panels);
  transpose_rows(f.grad, z.ld_value, rows.padded, round_up(z.depth_value, 16), f.grad_panels);
  interleave_rows<kPairs>(f.query, z.ld, rows.padded, z.dim, f.query_across, z.dim);
  interleave_rows<kPairs>(f.grad, z.ld_value, rows.padded, z.dim_value, f.grad_across, z.dim_value);
}

#if RK_LEVEL >= 3
// Two keys by 32 rows of probabilities or dS, as bf16: pairs along the rows, and pairs along the keys.
RK_INLINE void store_down(vfloat low, vfloat high, float* p) {
  const __m512bh packed = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  __builtin_memcpy(p, &packed, 64);
}
RK_INLINE void store_across(vfloat a, vfloat b, float* p) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)a));
  const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)b));
  _mm512_store_si512(p, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
}
#endif

// scores, grad_scores [key][row] -> probabilities and dS, as the three products want them.
template <bool kPairs, bool kKeepWide>
static void differentiate_block(const Keys& keys, int64_t padded_rows, float factor, const float* bias,
                                const BackwardBuffers& f) {
  const auto terms = [&](int64_t at, int64_t i, vfloat* p, vfloat* ds) __attribute__((always_inline)) {
    vfloat x = load(f.scores + at) * factor - load(f.lse + i);
    if (bias) x = (load(f.scores + at) * factor + load(bias + at)) - load(f.lse + i);
    *p = exp2(x);
    *ds = *p * (load(f.grad_scores + at) - load(f.delta + i));
    if (kKeepWide) store(f.grad_scores + at, *ds);
  };
#if RK_LEVEL >= 3
  if constexpr (kPairs) {
    for (int64_t k = 0; k < keys.count; k += 2)
      for (int64_t i = 0; i < padded_rows; i += 32) {
        vfloat p[4] = {}, ds[4] = {};
        const bool second = k + 1 < keys.count, wide = i + 16 < padded_rows;
        terms(k * kRows + i, i, p, ds);
        if (wide) terms(k * kRows + i + 16, i + 16, p + 1, ds + 1);
        if (second) terms((k + 1) * kRows + i, i, p + 2, ds + 2);
        if (second && wide) terms((k + 1) * kRows + i + 16, i + 16, p + 3, ds + 3);
        store_down(p[0], p[1], f.p_down + k * kRows / 2 + i / 2);
        store_down(p[2], p[3], f.p_down + (k + 1) * kRows / 2 + i / 2);
        store_down(ds[0], ds[1], f.ds_down + k * kRows / 2 + i / 2);
        store_down(ds[2], ds[3], f.ds_down + (k + 1) * kRows / 2 + i / 2);
        store_across(ds[0], ds[2], f.ds_across + k / 2 * kRows + i);
        store_across(ds[1], ds[3], f.ds_across + k / 2 * kRows + i + 16);
      }
    return;
  }
#endif
  for (int64_t k = 0; k < keys.count; ++k)
    for (int64_t i = 0; i < padded_rows; i += kLanes) {
      vfloat p, ds;
      terms(k * kRows + i, i, &p, &ds);
      store(f.scores + k * kRows + i, p);
      if (!kKeepWide) store(f.grad_scores + k * kRows + i, ds);
    }
}

static void add_bias_gradient(const Problem& p, const Rows& rows, const Keys& keys, const float* grad_scores,
                              int64_t copy) {
  float square[kLanes * 256] __attribute__((aligned(64)));
  for (int64_t i0 = 0; i0 < rows.padded; i0 += kLanes) {
    for (int64_t k = 0; k < keys.count; k += kLanes)
      transpose_square(grad_scores + k * kRows + i0, kRows, square + k, 256);
    for (int64_t i = 0; i < kLanes && i0 + i < rows.count; ++i) {
      float* to = p.bias_partial +
                  ((copy * p.heads + rows.head[i0 + i]) * p.chunk_rows + rows.row[i0 + i]) * p.bias_slots;
      const float* from = square + i * 256;
      int64_t k = 0;
      while (k < keys.count) {
        const int64_t start = keys.slot[k] % p.bias_slots;
        int64_t n = 1;
        while (k + n < keys.count && keys.slot[k + n] == keys.slot[k] + n && start + n < p.bias_slots) ++n;
        add_scaled(to + start, 1.0f, from + k, n);
        k += n;
      }
    }
  }
}

// One (row block, key block). `add_key`: dK and dV already hold the sum over earlier row blocks.
template <class T, bool kPairs>
static void backward_tile(const Problem& p, const Sizes& z, const BackwardBuffers& f, const Rows& rows,
                          const Keys& keys, bool query_wanted, bool key_wanted, bool add_query, bool add_key,
                          bool parameters, int64_t copy, Prefetch* next) {
  const float factor = p.scale * kLog2e;
  const int64_t row_depth = kPairs ? (rows.count + 1) / 2 : rows.count;
  const int64_t key_depth = kPairs ? (keys.count + 1) / 2 : keys.count;
  const float* bias = p.bias.data ? f.bias : nullptr;
  if (bias) gather_bias(p, rows, keys, f.bias);
  multiply<false, kPairs>(keys.padded, rows.padded, z.depth, f.keys, z.ld, f.query_panels, kPanel,
                          panel_size(z.depth), f.scores, kRows, false, next);
  multiply<false, kPairs>(keys.padded, rows.padded, z.depth_value, f.values, z.ld_value, f.grad_panels, kPanel,
                          panel_size(z.depth_value), f.grad_scores, kRows, false, next);
  if (parameters && p.bias_partial) {
    differentiate_block<kPairs, true>(keys, rows.padded, factor, bias, f);
    add_bias_gradient(p, rows, keys, f.grad_scores, copy);
  } else {
    differentiate_block<kPairs, false>(keys, rows.padded, factor, bias, f);
  }
  const int64_t ld_scores = kPairs ? kRows / 2 : kRows;
  if (key_wanted) {
    multiply<false, kPairs>(keys.padded, z.dim_value, row_depth, f.p_down, ld_scores, f.grad_across,
                            kPairs ? z.dim_value : z.ld_value, kPanel, f.grad_value, z.dim_value, add_key, next);
    multiply<false, kPairs>(keys.padded, z.dim, row_depth, f.ds_down, ld_scores, f.query_across,
                            kPairs ? z.dim : z.ld, kPanel, f.grad_key, z.dim, add_key, next);
  }
  if (query_wanted)
    multiply<true, kPairs>(rows.padded, z.dim, key_depth, f.ds_across, kRows, f.keys_across, kPairs ? z.dim : z.ld,
                           kPanel, f.grad_query, z.dim, add_query, next);
}

RK_INLINE int64_t gradient_row(const Problem& p, const Item& item, int64_t slot) {
  return (((item.b * p.chunks + item.u) * p.neighbours * p.retrieved) + slot) * p.kv_heads + item.kv;
}

template <class T>
static void write_keys(const Problem& p, const Item& item, const Sizes& z, const BackwardBuffers& f,
                       const Keys& keys) {
  for (int64_t i = 0; i < keys.count; ++i) {
    const int64_t at = gradient_row(p, item, keys.slot[i]);
    float* dk = f.grad_key + i * z.dim;
    if (p.rotary_width > 0)
      rotate(dk, p.key_cos, p.key_sin, keys.slot[i] % p.retrieved, p.rotary_width, p.rotary_interleaved, -1.0f);
    if (p.stream_gradients) {
      stream_row(dk, p.dim, p.scale, (T*)p.grad_key + at * p.dim);
      stream_row(f.grad_value + i * z.dim_value, p.dim_value, 1.0f, (T*)p.grad_value + at * p.dim_value);
    } else {
      narrow_row(dk, p.dim, p.scale, (T*)p.grad_key + at * p.dim);
      narrow_row(f.grad_value + i * z.dim_value, p.dim_value, 1.0f, (T*)p.grad_value + at * p.dim_value);
    }
  }
#if RK_LEVEL >= 2
  if (p.stream_gradients) _mm_sfence();
#endif
}

template <class T>
static void write_queries(const Problem& p, const Item& item, const Sizes& z, const BackwardBuffers& f,
                          const Rows& rows, bool computed) {
  for (int64_t i = 0; i < rows.count; ++i) {
    T* out = (T*)p.grad_query + ((item.b * p.tokens + rows.token[i]) * p.heads + rows.head[i]) * p.dim;
    float* dq = f.grad_query + i * z.dim;
    // a row that saw nothing gets exactly 0 even when the keys of others hold NaN
    if (!computed || f.lse[i] == infinity()) {
      __builtin_memset((void*)out, 0, (size_t)p.dim * sizeof(T));
      continue;
    }
    if (p.rotary_width > 0)
      rotate(dq, p.query_cos, p.query_sin, rows.row[i], p.rotary_width, p.rotary_interleaved, -1.0f);
    narrow_row(dq, p.dim, p.scale, out);
  }
}

template <class T>
static void clear_hidden_keys(const Problem& p, const Item& item) {
  const int64_t slots = p.neighbours * p.retrieved;
  const uint8_t* mask = p.mask ? p.mask + item.b * p.mask_stride[0] + item.u * p.mask_stride[1] : nullptr;
  if (!mask && item.count > 0) return;
  for (int64_t s = 0; s < slots; ++s) {
    if (item.count > 0 && mask[s / p.retrieved * p.mask_stride[2] + s % p.retrieved * p.mask_stride[3]]) continue;
    const int64_t at = gradient_row(p, item, s);
    __builtin_memset((void*)((T*)p.grad_key + at * p.dim), 0, (size_t)p.dim * sizeof(T));
    __builtin_memset((void*)((T*)p.grad_value + at * p.dim_value), 0, (size_t)p.dim_value * sizeof(T));
  }
}

template <class T, bool kPairs>
static void pack_backward_keys(const Problem& p, const Item& item, const Sizes& z, const BackwardBuffers& f,
                               const Keys& keys) {
  pack_keys<T, kPairs>(p, item, z, keys, f.keys);
  pack_values<T, kPairs>(p, item, z, keys, f.values);
  interleave_rows<kPairs>(f.keys, z.ld, keys.padded, z.dim, f.keys_across, z.dim);
}

template <class T, bool kPairs>
static void backward_typed(const Problem& p, int64_t index, int64_t following, int64_t copy, char* scratch) {
  const Sizes z(p, kPairs);
  Arena arena{scratch};
  const BackwardBuffers f(p, z, &arena);
  const Item item = item_at(p, index);
  clear_hidden_keys<T>(p, item);
  if (item.count == 0) return;
  const int64_t slots = p.neighbours * p.retrieved, group = p.heads / p.kv_heads;
  const int64_t row_blocks = (group * item.count + kRows - 1) / kRows;
  const bool one_sweep = slots <= z.keys || row_blocks == 1;
  const bool null_slot = p.null_key.data != nullptr;
  Rows rows;
  Keys keys;
  Prefetch ahead;
  const int64_t tiles = 2 * (least(slots, z.keys) / kTileRows * kRows / kPanel) +
                        least(slots, z.keys) / kTileRows * (z.dim + z.dim_value) / kPanel +
                        kRows / kTileRows * z.dim / kPanel + 1;

  // Row blocks outside: dQ, the parameters, and with a single row block dK and dV as well.
  if (slots > z.keys) {
    for (int64_t block = 0; block < row_blocks; ++block) {
      make_rows(p, item, block, &rows);
      pack_backward_rows<T, kPairs>(p, item, z, f, rows, true, true, copy);
      bool started = null_slot;
      for (int64_t cursor = 0; cursor < slots;) {
        next_keys(p, item, z.keys, &cursor, &keys);
        if (keys.count == 0) break;
        pack_backward_keys<T, kPairs>(p, item, z, f, keys);
        if (cursor < slots)
          ahead = make_prefetch<T>(p, item, cursor, z, tiles, true);
        else if (one_sweep && following >= 0)
          ahead = make_prefetch<T>(p, item_at(p, following), 0, z, tiles, true);
        backward_tile<T, kPairs>(p, z, f, rows, keys, true, one_sweep, started, false, true, copy,
                                  &ahead);
        if (one_sweep) write_keys<T>(p, item, z, f, keys);
        started = true;
      }
      write_queries<T>(p, item, z, f, rows, started);
    }
    if (one_sweep) return;
  }

  // Key blocks outside: dK and dV, and with a single key block everything.
  int64_t cursor = 0;
  do {
    next_keys(p, item, z.keys, &cursor, &keys);
    if (keys.count == 0 && !one_sweep) break;
    pack_backward_keys<T, kPairs>(p, item, z, f, keys);
    for (int64_t block = 0; block < row_blocks; ++block) {
      make_rows(p, item, block, &rows);
      pack_backward_rows<T, kPairs>(p, item, z, f, rows, one_sweep, one_sweep, copy);
      if (block + 1 == row_blocks && cursor >= slots && following >= 0)
        ahead = make_prefetch<T>(p, item_at(p, following), 0, z, tiles, true);
      if (keys.count > 0)
        backward_tile<T, kPairs>(p, z, f, rows, keys, one_sweep, true, null_slot, block > 0, one_sweep, copy, &ahead);
      if (one_sweep) write_queries<T>(p, item, z, f, rows, null_slot || keys.count > 0);
    }
    write_keys<T>(p, item, z, f, keys);
  } while (cursor < slots);
}

static void backward(const Problem& p, int64_t item, int64_t following, int64_t copy, char* scratch) {
  if (p.type == kFloat32)
    backward_typed<float, false>(p, item, following, copy, scratch);
  else if (p.type == kFloat16)
    backward_typed<half_t, false>(p, item, following, copy, scratch);
  else
    backward_typed<bfloat_t, (RK_LEVEL >= 3)>(p, item, following, copy, scratch);
}

static size_t scratch_bytes(const Problem& p, bool backward) {
  const Sizes z(p, p.type == kBFloat16 && RK_LEVEL >= 3);
  Arena arena{nullptr};
  if (backward)
    BackwardBuffers(p, z, &arena);
  else
    ForwardBuffers(p, z, &arena);
  return arena.used;
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
