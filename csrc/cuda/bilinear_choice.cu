// How the products of bilinear layers are multiplied, in which tiles, and which share a launch.
#include <limits>

#include "cuda/bilinear.h"

namespace FM_CUDA {
namespace {

// Fewer than two blocks for each of an H100's 132 multiprocessors are no faster than two.
constexpr double kFewBlocks = 264;

double blocks_of(const ProductShape& s, index_t tasks, TileShape tile) {
  return double(tasks) * s.groups * blocks_for(s.rows, kTileRows[int(tile)]) *
         blocks_for(s.columns, kTileColumns[int(tile)]);
}

// A block's time for a step of its sum is about its multiplications, times 1 for a warp that holds
// 32 x 32 sums (64 x 64, 128 x 32), 1.4 for 16 x 16 and 1.9 for 32 x 8: instructions that a warp
// issues for each mma, 4.3, 7.7 and 14, against the 6.5 cycles of a TF32 mma. 1 + 16 / rows + 16 /
// columns gives these ratios.
double step_of(TileShape tile) {
  const double rows = kTileRows[int(tile)], columns = kTileColumns[int(tile)];
  return rows * columns * (1 + 16 / rows + 16 / columns);
}

TileShape choose_tile(const ProductShape& s, index_t tasks) {
  TileShape best = TileShape::t64x64;
  double least = std::numeric_limits<double>::infinity();
  for (int i = 0; i < int(TileShape::count); ++i) {
    const TileShape tile = TileShape(i);
    const double cost = max_of(blocks_of(s, tasks, tile), kFewBlocks) * step_of(tile);
    if (cost < least) {
      least = cost;
      best = tile;
    }
  }
  return best;
}

}  // namespace

// Products of vectors are not for tensor cores, which would multiply mostly zeros.
Choice choose(const ProductShape& s, index_t tasks, Precision precision, std::size_t scalar_size) {
  const TileShape tile = choose_tile(s, tasks);
  if (scalar_size != sizeof(float) || s.columns < 4 || s.depth < 4) {
    return {Arithmetic::scalar, tile};
  }
  switch (precision) {
    case Precision::tf32:
      return {Arithmetic::tf32, tile};
    case Precision::bfloat16:
      return {Arithmetic::bfloat16, tile};
    default:
      return {Arithmetic::split_tf32, tile};
  }
}

// A launch has one kind of tile, which one of the two would not have chosen: what that costs must
// be less than a launch, some 2.5 us or 1.3e8 multiplications of an H100 in split TF32.
bool choose_together(const Chosen& weights, const Chosen& inputs, index_t tasks, Choice& both) {
  constexpr double kLaunch = 1.3e8;
  if (weights.choice.arithmetic != inputs.choice.arithmetic) return false;
  const ProductShape &w = weights.shape, &i = inputs.shape;
  const double w_steps = double(weights.pairs) * min_of(w.part, w.depth);
  const double i_steps = double(inputs.pairs) * i.kernel[0] * i.kernel[1] * i.out / i.groups;
  const auto time = [](double blocks, double work) {
    return work * max_of(1.0, kFewBlocks / blocks);
  };
  const auto work = [=](const ProductShape& s, double steps, TileShape tile) {
    return blocks_of(s, tasks, tile) * step_of(tile) * steps;
  };
  const TileShape own_w = weights.choice.tile, own_i = inputs.choice.tile;
  double least = kLaunch + time(blocks_of(w, tasks, own_w), work(w, w_steps, own_w)) +
                 time(blocks_of(i, tasks, own_i), work(i, i_steps, own_i));
  bool together = false;
  for (const TileShape tile : {own_w, own_i}) {
    const double blocks = blocks_of(w, tasks, tile) + blocks_of(i, tasks, tile);
    const double cost = time(blocks, work(w, w_steps, tile) + work(i, i_steps, tile));
    if (cost > least) continue;
    least = cost;
    both = {weights.choice.arithmetic, tile};
    together = true;
  }
  return together;
}

}  // namespace FM_CUDA
