// A straight chain of layers and a loss: shapes, parameter layout, validation.
//
// The engine keeps activations channels last and weights as [kernel pixels * in, out]. `Parameter`
// says how one tensor of the model (PyTorch's layout) maps onto that: element e of the engine's
// tensor is element index[e] of the model's. A Flatten between a convolution and a Linear layer
// vanishes into that index, and so does Identity.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "program/backend.h"
#include "program/layer.h"

namespace fm {

// A layer as the caller describes it, before shapes are known.
struct LayerSpec {
  std::string kind, name;
  Window window;
  index_t in = 0, out = 0;  // channels or features; 0 where the layer takes what comes
  bool has_weight = false, has_bias = false;
  double eps = 0, alpha = 0;
  std::vector<index_t> shape;  // layer_norm: the normalised shape, channels first
};

struct LossSpec {
  std::string kind;       // a name of loss_kind in program.cpp
  std::string reduction;  // mean | sum_over_ways
};

struct Parameter {
  std::string name;
  index_t offset = 0, count = 0;    // in the engine's layout
  std::vector<std::int32_t> index;  // empty: the layouts agree
  index_t table = 0;                // where the index lies in Program::tables, in bytes
};

class Program {
 public:
  // `input` is channels first: {features} or {channels, height, width}. Throws `Error` that names
  // the layer, what it got and what it expected.
  Program(const std::vector<index_t>& input, const std::vector<LayerSpec>& layers, LossSpec loss);

  const std::vector<LayerDesc>& layers() const { return layers_; }
  const std::vector<std::string>& names() const { return names_; }
  const std::vector<Parameter>& parameters() const { return parameters_; }
  const std::vector<Segment>& segments() const { return segments_; }
  // What operations of a backend read of a program, for one whose memory isn't the host's: the
  // segments, and every index behind them.
  std::vector<char> tables() const;
  index_t table_bytes() const { return table_bytes_; }
  index_t param_count() const { return param_count_; }  // engine's layout, padding included
  Shape input() const { return input_; }
  Shape output() const { return output_; }
  LossKind loss() const { return loss_; }
  double loss_scale(index_t samples) const;
  index_t target_size() const;  // elements of one sample's target, 1 for a label
  // Samples that pass through all layers together, the others following: all of them where a layer
  // looks across samples or over an image, else as many as the second-level cache holds.
  index_t chunk(index_t samples) const { return chunk_ > 0 ? min_of(chunk_, samples) : samples; }
  // First layer with parameters: nothing before it needs a gradient.
  index_t first_trainable() const { return first_trainable_; }

 private:
  void fuse();
  void choose_chunk();
  void choose_strips();
  void choose_folds();
  void place_tables();

  Shape input_, output_;
  std::vector<LayerDesc> layers_;
  std::vector<std::string> names_;
  std::vector<Parameter> parameters_;
  std::vector<Segment> segments_;
  std::vector<std::unique_ptr<ConvGeometry>> geometries_;
  index_t param_count_ = 0, first_trainable_ = 0, chunk_ = 0, table_bytes_ = 0;
  LossKind loss_ = LossKind::squared_error;
  bool sum_over_ways_ = false;
};

}  // namespace fm
