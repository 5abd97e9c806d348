// Groups: which query rows and which key slots see each other (ops/attention/common.py), and where their elements are.
#pragma once
#include "problem.h"
#include "ptx.cuh"

namespace retro_kernels {

// Places of the elements [i, 0] of a group in a tensor: `length` to a run, runs `outer` apart.
struct Places {
  int64_t base, outer, inner;
  int length;
  Divisor by_length;

  RK_DEVICE int64_t at(int i) const {
    const int run = divide(i, by_length);
    return base + run * outer + (i - run * length) * inner;
  }
};

// Under kClock a sequence's groups are not its chunks but all that its tokens and its chunks need: those below chunk 0
// and from `chunks` on have rows and no slots (tokens that attend to nothing), surplus chunks have slots and no rows.
// So every token and every key belongs to exactly one group, and what no one attends to comes out as 0 by itself.
// (With chunk_spans, tokens in no span belong to none: the caller zeroes the outputs before.)
struct Group {
  int batch, chunk, neighbour;
  int first;  // token of row 0
  int rows, slots;
};

RK_DEVICE Group group_at(const Problem& p, int batch, int index) {
  Group g;
  g.batch = batch;
  g.chunk = index;
  g.neighbour = 0;
  g.first = 0;
  g.rows = p.tokens;
  g.slots = p.neighbours * p.retrieved;
  if (p.grouping == kNeighbour) {
    g.chunk = index / p.neighbours;
    g.neighbour = index % p.neighbours;
    g.slots = p.retrieved;
  } else if (p.grouping == kChunk) {
    g.rows = p.tokens * p.query_neighbours;
    g.slots = p.retrieved;
  } else if (p.chunk_spans) {
    const int32_t* span = p.chunk_spans + (static_cast<int64_t>(batch) * p.chunks + index) * 2;
    g.first = span[0];
    g.rows = span[1];
    // whatever a broken span says, no token outside [0, n) is touched, and no more than a tile's worth
    if (g.first < 0 || g.rows < 0 || g.rows > p.stride || g.first > p.tokens - g.rows) g.first = g.rows = 0;
  } else {
    const int64_t start = p.first_token + static_cast<int64_t>(index) * p.stride, end = start + p.stride;
    const int64_t first = start < 0 ? 0 : start, last = end < p.tokens ? end : p.tokens;
    g.first = static_cast<int>(first);
    g.rows = last > first ? static_cast<int>(last - first) : 0;
    if (index < 0 || index >= p.chunks) g.slots = 0;
  }
  return g;
}

// Of the query's axes: query, out, lse and their gradients.
RK_DEVICE Places row_places(const Problem& p, const Group& g, const Strides& s, int head) {
  Places places;
  places.base = g.batch * s.batch + g.first * s.token + head * s.head;
  if (p.grouping != kClock) places.base += g.chunk * s.chunk + g.neighbour * s.neighbour;
  const bool runs = p.grouping == kChunk;
  places.outer = s.neighbour;
  places.inner = s.token;
  places.length = runs ? p.tokens : INT32_MAX;
  places.by_length = runs ? p.by_tokens : Divisor();
  return places;
}

// Of the key's axes: key, value, their gradients, and (head 0) the mask.
RK_DEVICE Places slot_places(const Problem& p, const Group& g, const Strides& s, int head) {
  Places places;
  places.base = g.batch * s.batch + g.chunk * s.chunk + g.neighbour * s.neighbour + head * s.head;
  places.outer = s.neighbour;
  places.inner = s.token;
  places.length = p.retrieved;
  places.by_length = p.by_retrieved;
  return places;
}

// Which slots of the group exist and are not masked, 64 to a word, in shared memory: ceil(slots / 64) words. To be
// called by all threads of the block; a block barrier must follow.
template <int THREADS>
RK_DEVICE void find_visible(const Problem& p, const Group& g, Shared words) {
  const Places places = slot_places(p, g, p.mask_stride, 0);
  uint32_t* half_words = shared_pointer<uint32_t>(words);
  for (int half = warp_index(); half < 2 * ((g.slots + 63) / 64); half += THREADS / 32) {
    const int slot = half * 32 + lane_index();
    bool visible = slot < g.slots;
    if (visible && p.mask) visible = p.mask[places.at(slot)] != 0;
    const uint32_t bits = ballot(visible);
    if (lane_index() == 0) half_words[half] = bits;
  }
}

}  // namespace retro_kernels
