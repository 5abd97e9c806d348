// One or a few query rows per key/value head against a cache: the time is that of reading the cache once.
//
// A work item is (sequence, block of key/value heads, block of rows, range of slots). It goes through its slots a tile
// at a time: scores, online softmax, weighted sum. Four slots are taken together, and under them one head after the
// other, so that the cache is read as four streams of adjacent heads: as it lies in memory. Where more than four rows
// share a head, or keys have to be turned, a tile is widened to fp32 first, and both products run on that.
//
// Ranges of slots leave partial sums that `combine` adds in order. How a call is cut depends on shapes alone, so the
// result is bitwise the same for any number of threads.
#pragma once
#include "decode_problem.h"
#include "elements.h"
#include "layout.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

struct signed8_t {
  int8_t bits;
};
struct float8_t {  // e4m3fn
  uint8_t bits;
};

RK_INLINE float widen(signed8_t x) { return (float)x.bits; }
RK_INLINE float widen(float8_t x) {
  const uint32_t magnitude = x.bits & 0x7fu, sign = (uint32_t)(x.bits & 0x80u) << 24;
  if (magnitude == 0x7fu) return bits_to_float(sign | 0x7fc00000u);
  if (magnitude < 8u) {
    const float subnormal = (float)magnitude * 0.001953125f;  // 2^-9
    return sign ? -subnormal : subnormal;
  }
  return bits_to_float(sign | ((magnitude << 20) + (120u << 23)));
}
#if RK_LEVEL >= 2
RK_INLINE vfloat widen_vector(const signed8_t* p) {
  return (vfloat)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
RK_INLINE vfloat widen_vector(const float8_t* p) {
  // As a half, whose exponent is biased by 8 more: 2^8 is multiplied back. Subnormals come out exact.
  const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p));
  const __m256i magnitude = _mm256_and_si256(x, _mm256_set1_epi16(0x7f));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(x, _mm256_set1_epi16(0x80)), 8);
  const __m512 value = _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(_mm256_slli_epi16(magnitude, 7), sign)),
                                     _mm512_set1_ps(256.0f));
  const __mmask16 nan = _mm256_cmpeq_epi16_mask(magnitude, _mm256_set1_epi16(0x7f));
  return (vfloat)_mm512_mask_mov_ps(value, nan, _mm512_set1_ps(__builtin_nanf("")));
}
#elif RK_LEVEL == 1
RK_INLINE vfloat widen_vector(const signed8_t* p) {
  return (vfloat)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
RK_INLINE vfloat widen_vector(const float8_t* p) {
  const __m128i x = _mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p));
  const __m128i magnitude = _mm_and_si128(x, _mm_set1_epi16(0x7f));
  const __m128i sign = _mm_slli_epi16(_mm_and_si128(x, _mm_set1_epi16(0x80)), 8);
  const __m256 value = _mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(_mm_slli_epi16(magnitude, 7), sign)),
                                     _mm256_set1_ps(256.0f));
  const __m256i nan = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(magnitude, _mm_set1_epi16(0x7f)));
  return (vfloat)_mm256_blendv_ps(value, _mm256_set1_ps(__builtin_nanf("")), _mm256_castsi256_ps(nan));
}
#endif

constexpr int64_t kDirectRows = 4;    // rows of a head that the cache is read in place for
constexpr int64_t kPackedRows = 16;   // rows of an item otherwise
constexpr int64_t kDirectTile = 64;   // slots of a tile in place
constexpr int64_t kPackedFloats = 32768;
constexpr int64_t kStreamBytes = 4096;  // of adjacent heads read from a token at least, where there are as many
constexpr int64_t kItems = 32;          // wanted; fewer sequences and heads split their slots
constexpr int64_t kSplitSlots = 64;     // but not below this many

RK_INLINE int64_t divide_up(int64_t x, int64_t by) { return (x + by - 1) / by; }
RK_INLINE int64_t cache_bytes(CacheType type) { return type == kCacheFloat32 ? 4 : type <= kCacheBFloat16 ? 2 : 1; }

static void decode_plan(DecodeProblem& p) {
  const int64_t rows = p.tokens * (p.heads / p.kv_heads);
  p.packed = rows > kDirectRows || p.rotary_width > 0;
  p.row_block = p.packed ? least(rows, kPackedRows) : rows;
  p.head_block = 1;
  p.tile = kDirectTile;
  if (p.packed)
    p.tile = most(8, least(kDirectTile, kPackedFloats / most(p.dim, p.dim_value) / 4 * 4));
  else if (p.key_stride[3] <= p.key_stride[2])
    p.head_block = least(p.kv_heads, most(1, kStreamBytes / (p.dim * cache_bytes(p.key_type))));
  const int64_t whole = p.batch * divide_up(p.kv_heads, p.head_block) * divide_up(rows, most(p.row_block, 1));
  p.splits = most(1, least(divide_up(kItems, most(whole, 1)), p.slots / kSplitSlots));
  p.split_slots = round_up(divide_up(p.slots, p.splits), 4);
  p.splits = most(1, divide_up(p.slots, most(p.split_slots, 1)));
}

static int64_t decode_items(const DecodeProblem& p) {
  const int64_t rows = p.tokens * (p.heads / p.kv_heads);
  return p.batch * divide_up(p.kv_heads, p.head_block) * divide_up(rows, most(p.row_block, 1)) * p.splits;
}

struct DecodeBuffers {
  int64_t ld, ld_value;
  float *queries, *sums, *scores, *keys, *values, *highest, *total, *wide;

  DecodeBuffers(const DecodeProblem& p, Arena* arena) {
    ld = round_up(p.dim, 16);
    ld_value = round_up(p.dim_value, 16);
    const int64_t rows = p.head_block * p.row_block;
    queries = arena->take(rows * ld);
    sums = arena->take(rows * ld_value);
    scores = arena->take(rows * kDirectTile);
    keys = arena->take(p.packed ? p.tile * ld : 0);
    values = p.shared ? keys : arena->take(p.packed ? p.tile * ld_value : 0);
    highest = arena->take(rows);
    total = arena->take(rows);
    wide = arena->take(ld_value);
  }
};

static size_t decode_scratch(const DecodeProblem& p) {
  Arena arena{nullptr};
  DecodeBuffers(p, &arena);
  return arena.used;
}

// The four sums of the elements of four vectors.
RK_INLINE void sum_each(const vfloat* v, float* out) {
#if RK_LEVEL >= 1
  __m128 low[4];
  for (int i = 0; i < 4; ++i) {
#if RK_LEVEL >= 2
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), _mm512_extractf32x8_ps((__m512)v[i], 1));
#else
    const __m256 half = (__m256)v[i];
#endif
    low[i] = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(low[0], low[1]), _mm_hadd_ps(low[2], low[3])));
#else
  for (int i = 0; i < 4; ++i) {
    float sum = 0.0f;
    for (int j = 0; j < kLanes; ++j) sum += v[i][j];
    out[i] = sum;
  }
#endif
}

// What is `ahead` elements further in four rows is wanted next: rows are too short for the hardware to see that coming.
template <bool kAhead, class T>
RK_INLINE void fetch_ahead(const T* row, int64_t ahead) {
  if constexpr (kAhead) __builtin_prefetch(row + ahead, 0, 2);
}

// scores[row][0, 4) = queries[row] . keys[0, 4). Queries are zero from `dim` to `ld`.
template <int kCount, bool kAhead, class T>
RK_INLINE void four_scores(const T* const* keys, int64_t ahead, const float* queries, int64_t ld, int64_t dim,
                           float* scores) {
  vfloat sum[kCount][4];
  for (int r = 0; r < kCount; ++r)
    for (int s = 0; s < 4; ++s) sum[r][s] = vfloat{};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    vfloat k[4];
    RK_UNROLL for (int s = 0; s < 4; ++s) {
      k[s] = widen_vector(keys[s] + i);
      fetch_ahead<kAhead>(keys[s] + i, ahead);
    }
    RK_UNROLL for (int r = 0; r < kCount; ++r) {
      const vfloat q = load(queries + r * ld + i);
      RK_UNROLL for (int s = 0; s < 4; ++s) sum[r][s] += q * k[s];
    }
  }
  if (i < dim) {
    for (int s = 0; s < 4; ++s) {
      float last[kLanes];
      widen_row(keys[s] + i, dim - i, last, kLanes);
      for (int r = 0; r < kCount; ++r) sum[r][s] += load(queries + r * ld + i) * load(last);
    }
  }
  for (int r = 0; r < kCount; ++r) sum_each(sum[r], scores + r * kDirectTile);
}

// sums[row] += scores[row][0, 4) . values[0, 4)
template <int kCount, bool kAhead, class T>
RK_INLINE void four_values(const T* const* values, int64_t ahead, const float* scores, int64_t dim, float* sums,
                           int64_t ld) {
  vfloat weight[kCount][4];
  for (int r = 0; r < kCount; ++r)
    for (int s = 0; s < 4; ++s) weight[r][s] = splat(scores[r * kDirectTile + s]);
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) {
    vfloat v[4];
    RK_UNROLL for (int s = 0; s < 4; ++s) {
      v[s] = widen_vector(values[s] + i);
      fetch_ahead<kAhead>(values[s] + i, ahead);
    }
    RK_UNROLL for (int r = 0; r < kCount; ++r) {
      vfloat sum = load(sums + r * ld + i);
      RK_UNROLL for (int s = 0; s < 4; ++s) sum += weight[r][s] * v[s];
      store(sums + r * ld + i, sum);
    }
  }
  for (; i < dim; ++i)
    for (int r = 0; r < kCount; ++r) {
      float sum = sums[r * ld + i];
      for (int s = 0; s < 4; ++s) sum += scores[r * kDirectTile + s] * widen(values[s][i]);
      sums[r * ld + i] = sum;
    }
}

// Of the rows, the first few that are taken together fetch what is `ahead`; 0: none does.
template <class T>
RK_INLINE void scores_of_rows(const T* const* keys, int64_t ahead, const float* queries, int64_t ld, int64_t dim,
                              int64_t rows, float* scores) {
  int64_t r = 0;
  if (ahead != 0 && rows > 0) {
    if (rows >= 4)
      four_scores<4, true>(keys, ahead, queries, ld, dim, scores), r = 4;
    else if (rows >= 2)
      four_scores<2, true>(keys, ahead, queries, ld, dim, scores), r = 2;
    else
      four_scores<1, true>(keys, ahead, queries, ld, dim, scores), r = 1;
  }
  for (; r + 4 <= rows; r += 4) four_scores<4, false>(keys, 0, queries + r * ld, ld, dim, scores + r * kDirectTile);
  for (; r + 2 <= rows; r += 2) four_scores<2, false>(keys, 0, queries + r * ld, ld, dim, scores + r * kDirectTile);
  for (; r < rows; ++r) four_scores<1, false>(keys, 0, queries + r * ld, ld, dim, scores + r * kDirectTile);
}

template <class T>
RK_INLINE void values_of_rows(const T* const* values, int64_t ahead, const float* scores, int64_t dim, int64_t rows,
                              float* sums, int64_t ld) {
  int64_t r = 0;
  if (ahead != 0 && rows > 0) {
    if (rows >= 4)
      four_values<4, true>(values, ahead, scores, dim, sums, ld), r = 4;
    else if (rows >= 2)
      four_values<2, true>(values, ahead, scores, dim, sums, ld), r = 2;
    else
      four_values<1, true>(values, ahead, scores, dim, sums, ld), r = 1;
  }
  for (; r + 4 <= rows; r += 4) four_values<4, false>(values, 0, scores + r * kDirectTile, dim, sums + r * ld, ld);
  for (; r + 2 <= rows; r += 2) four_values<2, false>(values, 0, scores + r * kDirectTile, dim, sums + r * ld, ld);
  for (; r < rows; ++r) four_values<1, false>(values, 0, scores + r * kDirectTile, dim, sums + r * ld, ld);
}

// A tile: the visible slots, the last of them repeated up to a multiple of four.
struct Tile {
  int64_t count;
  int64_t slot[kDirectTile], neighbour[kDirectTile], token[kDirectTile];
};

RK_INLINE void next_tile(const DecodeProblem& p, int64_t b, int64_t* cursor, int64_t end, Tile* tile) {
  int64_t n = 0, s = *cursor;
  int64_t neighbour = s / most(p.retrieved, 1), token = s - neighbour * p.retrieved;
  for (; s < end && n < p.tile; ++s) {
    if (!p.mask ||
        p.mask[b * p.mask_stride[0] + neighbour * p.mask_stride[1] + token * p.mask_stride[2]]) {
      tile->slot[n] = s;
      tile->neighbour[n] = neighbour;
      tile->token[n++] = token;
    }
    if (++token == p.retrieved) token = 0, ++neighbour;
  }
  *cursor = s;
  tile->count = n;
  for (; n % 4; ++n)
    tile->slot[n] = tile->slot[n - 1], tile->neighbour[n] = tile->neighbour[n - 1], tile->token[n] = tile->token[n - 1];
}

template <class T>
RK_INLINE const T* at(const void* data, const int64_t* stride, int64_t b, const Tile& tile, int64_t i, int64_t kv) {
  return (const T*)data + b * stride[0] + tile.neighbour[i] * stride[1] + tile.token[i] * stride[2] + kv * stride[3];
}

template <class T>
static void direct_scores(const DecodeProblem& p, int64_t b, const Tile& tile, int64_t kv, int64_t heads, int64_t rows,
                          const DecodeBuffers& f) {
  for (int64_t i = 0; i < tile.count; i += 4) {
    const T* keys[4];
    for (int s = 0; s < 4; ++s) keys[s] = at<T>(p.key, p.key_stride, b, tile, i + s, kv);
    for (int64_t h = 0; h < heads; ++h) {
      scores_of_rows<T>(keys, 4 * p.key_stride[2], f.queries + h * rows * f.ld, f.ld, p.dim, rows, f.scores + h * rows * kDirectTile + i);
      for (int s = 0; s < 4; ++s) keys[s] += p.key_stride[3];
    }
  }
}

template <class T>
static void direct_values(const DecodeProblem& p, int64_t b, const Tile& tile, int64_t kv, int64_t heads, int64_t rows,
                          const DecodeBuffers& f) {
  for (int64_t i = 0; i < tile.count; i += 4) {
    const T* values[4];
    for (int s = 0; s < 4; ++s) values[s] = at<T>(p.value, p.value_stride, b, tile, i + s, kv);
    for (int64_t h = 0; h < heads; ++h) {
      values_of_rows<T>(values, 4 * p.value_stride[2], f.scores + h * rows * kDirectTile + i, p.dim_value, rows,
                        f.sums + h * rows * f.ld_value, f.ld_value);
      for (int s = 0; s < 4; ++s) values[s] += p.value_stride[3];
    }
  }
}

template <class T>
static void pack_tile(const void* data, const int64_t* stride, int64_t b, const Tile& tile, int64_t kv, int64_t dim,
                      float* out, int64_t ld) {
  for (int64_t i = 0; i < round_up(tile.count, 4); ++i)
    widen_row(at<T>(data, stride, b, tile, i, kv), dim, out + i * ld, ld);
}

RK_INLINE void four_rows(const float* tile, int64_t ld, int64_t i, const float** rows) {
  for (int s = 0; s < 4; ++s) rows[s] = tile + (i + s) * ld;
}

#define RK_BY_TYPE(type, call)     \
  switch (type) {                  \
    case kCacheFloat32:            \
      call(float);                 \
      break;                       \
    case kCacheFloat16:            \
      call(half_t);                \
      break;                       \
    case kCacheBFloat16:           \
      call(bfloat_t);              \
      break;                       \
    case kCacheInt8:               \
      call(signed8_t);             \
      break;                       \
    case kCacheFloat8:             \
      call(float8_t);              \
      break;                       \
  }

static void tile_scores(const DecodeProblem& p, int64_t b, const Tile& tile, int64_t kv, int64_t heads, int64_t rows,
                        const DecodeBuffers& f) {
  if (!p.packed) {
#define RK_CALL(T) direct_scores<T>(p, b, tile, kv, heads, rows, f)
    RK_BY_TYPE(p.key_type, RK_CALL)
#undef RK_CALL
    return;
  }
#define RK_CALL(T) pack_tile<T>(p.key, p.key_stride, b, tile, kv, p.dim, f.keys, f.ld)
  RK_BY_TYPE(p.key_type, RK_CALL)
#undef RK_CALL
  if (p.rotary_width > 0)
    for (int64_t i = 0; i < round_up(tile.count, 4); ++i)
      rotate(f.keys + i * f.ld, p.key_cos, p.key_sin, tile.token[i], p.rotary_width, p.rotary_interleaved, 1.0f);
  const float* keys[4];
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t i = 0; i < tile.count; i += 4) {
      four_rows(f.keys, f.ld, i, keys);
      scores_of_rows<float>(keys, 0, f.queries + r * f.ld, f.ld, p.dim, least(4, rows - r),
                            f.scores + r * kDirectTile + i);
    }
}

static void tile_values(const DecodeProblem& p, int64_t b, const Tile& tile, int64_t kv, int64_t heads, int64_t rows,
                        const DecodeBuffers& f) {
  if (!p.packed) {
#define RK_CALL(T) direct_values<T>(p, b, tile, kv, heads, rows, f)
    RK_BY_TYPE(p.value_type, RK_CALL)
#undef RK_CALL
    return;
  }
  if (!p.shared) {
#define RK_CALL(T) pack_tile<T>(p.value, p.value_stride, b, tile, kv, p.dim_value, f.values, f.ld_value)
    RK_BY_TYPE(p.value_type, RK_CALL)
#undef RK_CALL
  }
  const float* values[4];
  for (int64_t r = 0; r < rows; r += 4)
    for (int64_t i = 0; i < tile.count; i += 4) {
      four_rows(f.values, f.ld_value, i, values);
      values_of_rows<float>(values, 0, f.scores + r * kDirectTile + i, p.dim_value, least(4, rows - r),
                            f.sums + r * f.ld_value, f.ld_value);
    }
}

// Whether there is a NaN among the scores that have this maximum and this sum of weights. A maximum does not see NaN, the
// sum does; but beside a maximum of +inf it is NaN in any case, so that the maximum is then made NaN for it: lse is +inf
// with a score of +inf, and NaN with one of NaN.
RK_INLINE bool nan_before(float highest, float total) {
  return highest != highest || (total != total && highest != infinity());
}

// One row's products of a tile -> its weights relative to the running maximum, times the values' scales.
static void tile_softmax(const DecodeProblem& p, const Tile& tile, const float* key_scale, const float* value_scale,
                         const float* bias, float* scores, float* highest, float* total, float* sums, int64_t ld) {
  const bool capped = p.softcap > 0.0f;
  const float factor = capped ? p.scale / p.softcap : p.scale * kLog2e;
  const int64_t n = tile.count, padded = round_up(n, kLanes);
  for (int64_t i = 0; i < n; ++i) scores[i] *= key_scale ? factor * key_scale[i] : factor;
  if (capped)
    for (int64_t i = 0; i < padded; i += kLanes) store(scores + i, tanh(load(scores + i)) * (p.softcap * kLog2e));
  if (bias) {
    const bool per_slot = p.bias_slots != p.retrieved;
    for (int64_t i = 0; i < n; ++i) scores[i] += in_base_2(bias[per_slot ? tile.slot[i] : tile.token[i]]);
  }
  for (int64_t i = n; i < padded; ++i) scores[i] = -infinity();
  float high = *highest;
  for (int64_t i = 0; i < n; ++i) high = scores[i] > high ? scores[i] : high;
  if (high == infinity()) {
    bool nan = nan_before(*highest, *total);
    for (int64_t i = 0; i < n; ++i) nan |= scores[i] != scores[i];
    if (nan) high = __builtin_nanf("");
  }
  const float reference = high == -infinity() ? 0.0f : high;
  const float shrink = exp2(splat(*highest - reference))[0];
  vfloat sum = {};
  for (int64_t i = 0; i < padded; i += kLanes) {
    const vfloat weight = exp2(load(scores + i) - reference);
    sum += weight;
    store(scores + i, weight);
  }
  float all = 0.0f;
  for (int i = 0; i < kLanes; ++i) all += sum[i];
  *total = *total * shrink + all;
  *highest = high;
  if (value_scale)
    for (int64_t i = 0; i < n; ++i) scores[i] *= value_scale[i];
  if (shrink != 1.0f)
    for (int64_t i = 0; i < ld; i += kLanes) store(sums + i, load(sums + i) * shrink);
}

RK_INLINE void write_out(const DecodeProblem& p, int64_t row, const float* sums, float highest, float total) {
  const bool nothing = total == 0.0f;
  const float factor = nothing ? 0.0f : 1.0f / total;
  if (p.type == kFloat32)
    narrow_row(sums, p.dim_value, factor, (float*)p.out + row * p.dim_value);
  else if (p.type == kFloat16)
    narrow_row(sums, p.dim_value, factor, (half_t*)p.out + row * p.dim_value);
  else
    narrow_row(sums, p.dim_value, factor, (bfloat_t*)p.out + row * p.dim_value);
  p.lse[row] = nothing                  ? -infinity()
               : highest == infinity() ? highest
                                       : (highest + __builtin_log2f(total)) * kLn2;
}

// The null slot is added last, to sums relative to `highest`.
RK_INLINE void add_null(const DecodeProblem& p, int64_t row, float* sums, float* wide, float* highest, float* total) {
  if (!p.null_logit) return;
  const float logit = in_base_2(p.null_logit[row]);
  float high = *highest > logit ? *highest : logit;
  if (high == infinity() && (nan_before(*highest, *total) || logit != logit)) high = __builtin_nanf("");
  const float reference = high == -infinity() ? 0.0f : high;
  const float shrink = exp2(splat(*highest - reference))[0], weight = exp2(splat(logit - reference))[0];
  *total = *total * shrink + weight;
  *highest = high;
  for (int64_t i = 0; i < p.dim_value; ++i) sums[i] *= shrink;
  if (!p.null_value.data) return;
  widen_operand(p.null_value, row % p.heads * p.null_value.stride0, p.dim_value, wide);
  add_scaled(sums, weight, wide, p.dim_value);
}

RK_INLINE void gather_scales(const float* scale, const int64_t* stride, int64_t b, const Tile& tile, float* out) {
  for (int64_t i = 0; i < tile.count; ++i)
    out[i] = scale[b * stride[0] + tile.neighbour[i] * stride[1] + tile.token[i] * stride[2]];
}

static void decode_item(const DecodeProblem& p, int64_t index, const DecodeBuffers& f) {
  const int64_t group = p.heads / p.kv_heads, all_rows = p.tokens * group;
  const int64_t split = index % p.splits;
  index /= p.splits;
  const int64_t row_blocks = divide_up(all_rows, p.row_block), head_blocks = divide_up(p.kv_heads, p.head_block);
  const int64_t first_row = index % row_blocks * p.row_block, last_row = least(first_row + p.row_block, all_rows);
  index /= row_blocks;
  const int64_t kv = index % head_blocks * p.head_block, heads = least(p.head_block, p.kv_heads - kv);
  const int64_t b = index / head_blocks;

  // Row (token, query head within the group), of the tokens that attend; the place of row r under head h is in [b, t, h].
  int64_t place[kPackedRows], rows = 0;
  for (int64_t row = first_row; row < last_row; ++row)
    if (p.attends[b * p.tokens + row / group])
      place[rows++] = (b * p.tokens + row / group) * p.heads + kv * group + row % group;
  if (rows == 0) return;

  for (int64_t h = 0; h < heads; ++h)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = place[r] + h * group, head = at % p.heads, token = at / p.heads % p.tokens;
      const int64_t from = b * p.query_stride[0] + token * p.query_stride[1] + head * p.query_stride[2];
      float* to = f.queries + (h * rows + r) * f.ld;
      Operand query;
      query.data = p.query, query.type = p.type;
      widen_operand(query, from, p.dim, to);
      for (int64_t i = p.dim; i < f.ld; ++i) to[i] = 0.0f;
    }
  __builtin_memset(f.sums, 0, (size_t)(heads * rows * f.ld_value) * 4);
  for (int64_t i = 0; i < heads * rows; ++i) f.highest[i] = -infinity(), f.total[i] = 0.0f;

  int64_t cursor = split * p.split_slots;
  const int64_t end = least(cursor + p.split_slots, p.slots);
  Tile tile;
  float key_scale[kDirectTile], value_scale[kDirectTile];
  while (cursor < end) {
    next_tile(p, b, &cursor, end, &tile);
    if (tile.count == 0) break;
    tile_scores(p, b, tile, kv, heads, rows, f);
    if (p.key_scale) gather_scales(p.key_scale, p.key_scale_stride, b, tile, key_scale);
    if (p.value_scale) gather_scales(p.value_scale, p.value_scale_stride, b, tile, value_scale);
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t i = h * rows + r;
        tile_softmax(p, tile, p.key_scale ? key_scale : nullptr, p.value_scale ? value_scale : nullptr,
                     p.logit_bias ? p.logit_bias + (place[r] + h * group) * p.bias_slots : nullptr,
                     f.scores + i * kDirectTile, f.highest + i, f.total + i, f.sums + i * f.ld_value, f.ld_value);
      }
    tile_values(p, b, tile, kv, heads, rows, f);
  }

  for (int64_t h = 0; h < heads; ++h)
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t i = h * rows + r, row = place[r] + h * group;
      float* sums = f.sums + i * f.ld_value;
      if (p.splits == 1) {
        add_null(p, row, sums, f.wide, f.highest + i, f.total + i);
        write_out(p, row, sums, f.highest[i], f.total[i]);
      } else {
        float* to = p.partial + (split * p.batch * p.tokens * p.heads + row) * (p.dim_value + 2);
        __builtin_memcpy(to, sums, (size_t)p.dim_value * 4);
        to[p.dim_value] = f.highest[i], to[p.dim_value + 1] = f.total[i];
      }
    }
}

static void decode_attend(const DecodeProblem& p, int64_t first, int64_t last, char* scratch) {
  Arena arena{scratch};
  const DecodeBuffers buffers(p, &arena);
  for (int64_t i = first; i < last; ++i) decode_item(p, i, buffers);
}

static void decode_combine(const DecodeProblem& p, int64_t first, int64_t last, char* scratch) {
  Arena arena{scratch};
  const DecodeBuffers f(p, &arena);
  const int64_t step = p.batch * p.tokens * p.heads * (p.dim_value + 2);
  for (int64_t row = first; row < last; ++row) {
    if (!p.attends[row / p.heads]) continue;
    const float* from = p.partial + row * (p.dim_value + 2);
    float highest = -infinity(), total = 0.0f;
    bool nan = false;
    for (int64_t s = 0; s < p.splits; ++s) {
      const float x = from[s * step + p.dim_value];
      highest = x > highest ? x : highest;
      nan |= nan_before(x, from[s * step + p.dim_value + 1]);
    }
    if (nan) highest = __builtin_nanf("");
    const float reference = highest == -infinity() ? 0.0f : highest;
    __builtin_memset(f.sums, 0, (size_t)f.ld_value * 4);
    for (int64_t s = 0; s < p.splits; ++s) {
      const float* part = from + s * step;
      const float weight = exp2(splat(part[p.dim_value] - reference))[0];
      total += weight * part[p.dim_value + 1];
      add_scaled(f.sums, weight, part, p.dim_value);
    }
    add_null(p, row, f.sums, f.wide, &highest, &total);
    write_out(p, row, f.sums, highest, total);
  }
}

struct ProjectBuffers {
  int64_t ld, ld_sums;
  float *rows, *sums, *scores;

  ProjectBuffers(const ProjectProblem& p, Arena* arena) {
    ld = round_up(p.depth, 16);
    ld_sums = round_up(p.part, 16);
    rows = arena->take(p.transposed ? kPackedRows * ld : 0);
    sums = arena->take(p.transposed ? 0 : kPackedRows * ld_sums);
    scores = arena->take(kPackedRows * kDirectTile);
  }
};

static size_t project_scratch(const ProjectProblem& p) {
  Arena arena{nullptr};
  ProjectBuffers(p, &arena);
  return arena.used;
}

// Columns [first, last) of out for `count` rows; x and out are where each of those rows begins.
template <class T>
static void project_rows(const ProjectProblem& p, const T* weight, const T* const* x, T* const* out, int64_t count,
                         int64_t first, int64_t last, const ProjectBuffers& f) {
  const int64_t step = p.weight_stride[1];
  const T* rows[4];
  if (p.transposed) {
    for (int64_t r = 0; r < count; ++r) widen_row(x[r], p.depth, f.rows + r * f.ld, f.ld);
    for (int64_t tile = first; tile < last; tile += kDirectTile) {
      const int64_t end = least(tile + kDirectTile, last);
      for (int64_t i = tile; i < end; i += 4) {
        for (int s = 0; s < 4; ++s) rows[s] = weight + least(i + s, end - 1) * step;
        scores_of_rows<T>(rows, 4 * step, f.rows, f.ld, p.depth, count, f.scores + i - tile);
      }
      for (int64_t r = 0; r < count; ++r) narrow_row(f.scores + r * kDirectTile, end - tile, 1.0f, out[r] + tile);
    }
    return;
  }
  __builtin_memset(f.sums, 0, (size_t)(count * f.ld_sums) * 4);
  for (int64_t tile = 0; tile < p.depth; tile += kDirectTile) {
    const int64_t n = least(kDirectTile, p.depth - tile);
    for (int64_t r = 0; r < count; ++r)
      widen_row(x[r] + tile, n, f.scores + r * kDirectTile, round_up(n, 4));
    for (int64_t i = 0; i < n; i += 4) {
      for (int s = 0; s < 4; ++s) rows[s] = weight + least(tile + i + s, p.depth - 1) * step + first;
      values_of_rows<T>(rows, 4 * step, f.scores + i, last - first, count, f.sums, f.ld_sums);
    }
  }
  for (int64_t r = 0; r < count; ++r) narrow_row(f.sums + r * f.ld_sums, last - first, 1.0f, out[r] + first);
}

template <class T>
static void project_item(const ProjectProblem& p, int64_t index, const ProjectBuffers& f) {
  const int64_t group = p.heads / p.kv_heads, kv = index / p.parts, first = index % p.parts * p.part;
  const T* x[kPackedRows];
  T* out[kPackedRows];
  for (int64_t row = 0; row < p.tokens * group;) {
    int64_t count = 0;
    for (; count < kPackedRows && row < p.tokens * group; ++count, ++row) {
      const int64_t token = row / group, head = kv * group + row % group;
      x[count] = (const T*)p.x + token * p.x_stride[0] + head * p.x_stride[1];
      out[count] = (T*)p.out + (token * p.heads + head) * p.width;
    }
    project_rows<T>(p, (const T*)p.weight + kv * p.weight_stride[0], x, out, count, first,
                    least(first + p.part, p.width), f);
  }
}

static void project(const ProjectProblem& p, int64_t first, int64_t last, char* scratch) {
  Arena arena{scratch};
  const ProjectBuffers buffers(p, &arena);
  for (int64_t i = first; i < last; ++i) {
    if (p.type == kFloat32)
      project_item<float>(p, i, buffers);
    else if (p.type == kFloat16)
      project_item<half_t>(p, i, buffers);
    else
      project_item<bfloat_t>(p, i, buffers);
  }
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
