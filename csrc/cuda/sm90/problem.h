// What the Hopper kernels are handed, by value as a __grid_constant__: the copy engine reads its maps there.
#pragma once
#include "../common/problem.h"

#if defined(__CUDACC__)
#include <cuda.h>
#else
#include "../emulator/tensor_map.h"
#endif

namespace retro_kernels {
namespace sm90 {

#if defined(__CUDACC__)
using TensorMap = CUtensorMap;
#else
using TensorMap = emulator::TensorMap;
#endif

// Axes of the maps, innermost first: (column, head, token, neighbour, sequence and chunk), in boxes of 64 columns of up
// to 64 tokens. Under kClock the queries' tokens are those of their sequence, and they have neither neighbour nor
// chunk.
struct Forward {
  TensorMap query, key, value, out;
  Problem p;
  int box_rows;   // tokens in a box of queries
  int row_tiles;  // of 64 rows, of a chunk (kClock) or a neighbour
  int items, blocks;
};

// Gradients have the axes of what they are of.
struct Backward {
  TensorMap query, out, grad_out, key, value, grad_query, grad_key, grad_value;
  Problem p;
  int box_rows, row_tiles;
  int row_blocks;  // of 64 rows, that see a group's slots: of all query heads of its key/value head
  int items, blocks;
};

// The absorbed strategy: chunks alone, grouping kClock. The states' axes are (column, -, retrieved token, neighbour,
// sequence and chunk), in boxes of `state_box` tokens; those of the weights [kv head, row, column] are (column,
// kv head, row).
struct Absorbed {
  TensorMap query, encoded, w_key, w_value, out;
  Problem p;  // without keys and values
  int width;
  int box_rows, row_tiles, items, blocks;
  int cluster;    // blocks that share a chunk's states
  int state_box;  // tokens of a neighbour in a box of states
};

}  // namespace sm90
}  // namespace retro_kernels
