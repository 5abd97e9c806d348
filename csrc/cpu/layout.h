// How a call is cut up: work items, row blocks, key blocks, and the buffers' sizes.
#pragma once
#include "elements.h"

namespace retro_kernels {
namespace RK_NAMESPACE {
namespace {

constexpr int kRows = 64;
constexpr int kRowStep = 16;
constexpr int kMostKeys = 256;

// Buffer sizes, in fp32 elements unless said. Every buffer starts on a cache line.
struct Sizes {
  bool pairs;
  int64_t keys;                 // key_block
  int64_t dim, dim_value;       // padded to 16
  int64_t depth, depth_value;   // elements summed over d and d_value
  int64_t ld, ld_value;         // row length of packed keys and values; never a multiple of 512 bytes
  int64_t ld_table;             // of the packed table of distances, likewise

  Sizes(const Problem& p, bool pairs_) : pairs(pairs_) {
    const int64_t per = pairs ? 2 : 1;
    dim = round_up(p.dim, 16);
    dim_value = round_up(p.dim_value, 16);
    keys = most(dim, dim_value) <= 128 ? kMostKeys : kMostKeys / 2;
    depth = (p.dim + per - 1) / per;
    depth_value = (p.dim_value + per - 1) / per;
    ld = round_up(depth, 16) + 16;
    ld_value = round_up(depth_value, 16) + 16;
    ld_table = round_up(depth, 16);
    if (ld_table % 128 == 0) ld_table += 16;
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

// A work item: one group of one sequence, one kv head and the query heads that read it.
struct Item {
  int64_t b, kv;
  int64_t chunk, neighbour, neighbours;  // its keys: `neighbours` of chunk `chunk` of key from `neighbour` on
  int64_t slots;                         // neighbours * r
  int64_t query_chunk;                   // its rows: of this chunk of query,
  int64_t query_neighbour, runs;         // of `runs` neighbours from this one on,
  int64_t first, count, row0;            // tokens [first, first + count), the first of them being row row0
};

RK_INLINE Item item_at(const Problem& p, int64_t index) {
  Item item = {};
  item.kv = index % p.kv_heads;
  const int64_t group = index / p.kv_heads % p.groups;
  item.b = index / p.kv_heads / p.groups;
  item.neighbours = item.runs = 1;
  item.count = p.tokens;
  if (p.grouping == kNeighbour) {
    item.chunk = item.query_chunk = group / p.neighbours;
    item.neighbour = item.query_neighbour = group % p.neighbours;
  } else if (p.grouping == kChunk) {
    item.chunk = item.query_chunk = group;
    item.runs = p.query_neighbours;
  } else {
    item.chunk = group;
    item.neighbours = p.neighbours;
    if (p.chunk_spans) {
      const int32_t* span = p.chunk_spans + (item.b * p.chunks + group) * 2;
      item.first = span[0], item.count = span[1];
    } else {
      const int64_t start = p.first_token + group * p.stride;
      item.first = most(start, 0);
      item.count = most(least(start + p.stride, p.tokens) - item.first, 0);
      item.row0 = item.first - start;
    }
  }
  item.slots = item.neighbours * p.retrieved;
  if (item.runs == 0) item.count = 0;
  return item;
}

// Rows of a block are the tokens of all runs (query head, neighbour) of an item one after the other; where rows of a
// block must be consecutive, a block never goes beyond its run.
RK_INLINE bool keep_runs(const Problem& p) { return p.causal || p.relative_key.data; }

RK_INLINE int64_t row_blocks(const Problem& p, const Item& item) {
  const int64_t runs = p.heads / p.kv_heads * item.runs;
  return keep_runs(p) ? runs * ((item.count + kRows - 1) / kRows) : (runs * item.count + kRows - 1) / kRows;
}

// The rows of one row block.
struct Rows {
  int64_t count, padded;
  int64_t begin, end;            // slots outside [begin, end) are seen by no row
  int64_t all_begin, all_end;    // slots inside [all_begin, all_end) are seen by every row
  int64_t head[kRows], token[kRows], neighbour[kRows];
  int64_t row[kRows];            // of the tables
  int64_t angle[kRows];          // of the query's rotary tables
  int64_t position[kRows];       // in [b, lq, kq, n, h], as out and lse have it
  uint32_t place[kRows], head_count[kRows];  // what dropout counts
  // causal: what each row sees, padded rows everything
  int32_t first[kRows] __attribute__((aligned(64))), last[kRows] __attribute__((aligned(64)));
};

struct BlockStart {
  int64_t run, token, count;  // its first row: the token of this run, from the item's first token on; how many rows
};

RK_INLINE BlockStart block_start(const Problem& p, const Item& item, int64_t block) {
  if (keep_runs(p)) {
    const int64_t per_run = (item.count + kRows - 1) / kRows, token = block % per_run * kRows;
    return {block / per_run, token, least(kRows, item.count - token)};
  }
  const int64_t begin = block * kRows, run = begin / item.count;
  return {run, begin - run * item.count, least(kRows, p.heads / p.kv_heads * item.runs * item.count - begin)};
}

RK_INLINE void make_rows(const Problem& p, const Item& item, int64_t block, Rows* rows) {
  const BlockStart start = block_start(p, item, block);
  rows->count = start.count;
  rows->padded = round_up(rows->count, kRowStep);
  rows->begin = rows->all_begin = 0;
  rows->end = rows->all_end = item.slots;
  int64_t x = start.token;
  for (int64_t i = 0, run = start.run; i < rows->count; ++run, x = 0) {
    const int64_t head = item.kv * (p.heads / p.kv_heads) + run / item.runs;
    const int64_t neighbour = item.query_neighbour + run % item.runs;
    const int64_t first =
        ((item.b * p.query_chunks + item.query_chunk) * p.query_neighbours + neighbour) * p.tokens + item.first;
    for (; i < rows->count && x < item.count; ++i, ++x) {
      rows->head[i] = head;
      rows->neighbour[i] = neighbour;
      rows->token[i] = item.first + x;
      rows->row[i] = rows->angle[i] = item.row0 + x;
      rows->position[i] = (first + x) * p.heads + head;
    }
  }
  if (p.dropout)
    for (int64_t i = 0; i < rows->padded; ++i) {
      const int64_t j = least(i, rows->count - 1);
      rows->place[i] =
          (uint32_t)((item.query_chunk * p.query_neighbours + rows->neighbour[j]) * p.tokens + rows->token[j]);
      rows->head_count[i] = (uint32_t)(item.b * p.heads + rows->head[j]);
    }
  if (!p.causal) return;
  const int32_t* first = p.first_visible ? p.first_visible + item.b * p.tokens : nullptr;
  rows->begin = item.slots;
  for (int64_t i = 0; i < rows->padded; ++i) {
    rows->first[i] = 0;
    rows->last[i] = INT32_MAX;
    if (i >= rows->count) continue;
    rows->last[i] = (int32_t)rows->row[i];
    if (first) {
      rows->first[i] = first[rows->row[i]];
      rows->angle[i] = rows->row[i] - rows->first[i];
    }
    rows->begin = least(rows->begin, rows->first[i]);
    rows->all_begin = most(rows->all_begin, rows->first[i]);
  }
  rows->all_end = rows->row[0] + 1;
  rows->end = rows->row[rows->count - 1] + 1;
}

// A key block: the slots (neighbour * r + token) of up to `limit` visible keys.
struct Keys {
  int64_t count, padded;
  int64_t all;  // `count` before `keep_below`
  int64_t slot[kMostKeys];
};

// Those from `*cursor` on and below `end`. With relative positions a block spans no more than `limit` tokens of
// neighbours: whole neighbours, or part of one.
RK_INLINE void next_keys(const Problem& p, const Item& item, int64_t limit, int64_t* cursor, int64_t end, Keys* keys) {
  int64_t n = 0, s = *cursor;
  const uint8_t* mask = nullptr;
  if (p.mask)
    mask = p.mask + item.b * p.mask_stride[0] + item.chunk * p.mask_stride[1] + item.neighbour * p.mask_stride[2];
  const bool part = p.relative_key.data && p.retrieved > limit;
  if (p.relative_key.data && !part && p.retrieved > 0) limit = limit / p.retrieved * p.retrieved;
  while (n == 0 && s < end) {
    const int64_t stop = part ? least(end, least(s + limit, (s / p.retrieved + 1) * p.retrieved)) : end;
    if (!mask)
      for (; s < stop && n < limit; ++s) keys->slot[n++] = s;
    else
      for (; s < stop && n < limit; ++s)
        if (mask[s / p.retrieved * p.mask_stride[2] + s % p.retrieved * p.mask_stride[3]]) keys->slot[n++] = s;
  }
  *cursor = s;
  keys->count = keys->all = n;
  keys->padded = round_up(n, 8);
}

// Leaves out the packed keys from slot `end` on, or takes them back.
RK_INLINE void keep_below(int64_t end, Keys* keys) {
  int64_t n = keys->all;
  while (n > 0 && keys->slot[n - 1] >= end) --n;
  keys->count = n;
  keys->padded = round_up(n, 8);
}

// Whether some row of the block does not see some key of the block.
RK_INLINE bool partly_hidden(const Problem& p, const Rows& rows, const Keys& keys) {
  return p.causal && keys.count > 0 && (keys.slot[0] < rows.all_begin || keys.slot[keys.count - 1] >= rows.all_end);
}

}  // namespace
}  // namespace RK_NAMESPACE
}  // namespace retro_kernels
