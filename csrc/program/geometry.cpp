#include "program/geometry.h"

#include <map>
#include <utility>

#include "program/layer.h"

namespace fm {
namespace {

// The kernel positions one output position sees along one axis, and where.
struct AxisTap {
  index_t kernel, src;
};
using AxisTaps = std::vector<AxisTap>;

// Positions of an axis that see the same kernel positions at the same distances.
struct AxisClass {
  AxisTaps taps;
  std::vector<index_t> positions, bases;  // base: source position of the first tap
};

std::vector<AxisClass> classify(const std::vector<AxisTaps>& axis) {
  std::map<std::vector<std::pair<index_t, index_t>>, AxisClass> classes;
  for (index_t p = 0; p < index_t(axis.size()); ++p) {
    const AxisTaps& taps = axis[p];
    const index_t base = taps.empty() ? 0 : taps.front().src;
    std::vector<std::pair<index_t, index_t>> key;
    for (const AxisTap& tap : taps) key.emplace_back(tap.kernel, tap.src - base);
    AxisClass& found = classes[key];
    if (found.positions.empty()) {
      for (const auto& [kernel, distance] : key) found.taps.push_back({kernel, distance});
    }
    found.positions.push_back(p);
    found.bases.push_back(base);
  }
  std::vector<AxisClass> result;
  for (auto& entry : classes) result.push_back(std::move(entry.second));
  return result;
}

std::vector<AxisTaps> forward_axis(index_t in, index_t out, const Window& w, int axis) {
  std::vector<AxisTaps> taps(out);
  for (index_t o = 0; o < out; ++o) {
    for (index_t k = 0; k < w.kernel[axis]; ++k) {
      const index_t src = o * w.stride[axis] - w.padding[axis] + k;
      if (src >= 0 && src < in) taps[o].push_back({k, src});
    }
  }
  return taps;
}

std::vector<AxisTaps> backward_axis(index_t in, index_t out, const Window& w, int axis) {
  std::vector<AxisTaps> taps(in);
  for (index_t i = 0; i < in; ++i) {
    for (index_t k = 0; k < w.kernel[axis]; ++k) {
      const index_t shifted = i + w.padding[axis] - k;
      if (shifted < 0 || shifted % w.stride[axis] != 0) continue;
      const index_t src = shifted / w.stride[axis];
      if (src < out) taps[i].push_back({k, src});
    }
  }
  return taps;
}

GatherTable make_table(const Shape& src, const Shape& dst, const Window& window,
                       const std::vector<AxisTaps>& rows, const std::vector<AxisTaps>& columns) {
  GatherTable table;
  table.src_size = src.size();
  table.dst_size = dst.size();
  const index_t c = src.channels;
  const auto column_classes = classify(columns);
  for (const AxisClass& h : classify(rows)) {
    for (const AxisClass& w : column_classes) {
      PixelGroup group;
      for (const AxisTap& th : h.taps) {
        for (const AxisTap& tw : w.taps) {
          const TapRun run{(th.src * src.width + tw.src) * c,
                           (th.kernel * window.kernel[1] + tw.kernel) * c, c};
          TapRun* last = group.runs.empty() ? nullptr : &group.runs.back();
          if (last && last->src + last->length == run.src &&
              last->weight + last->length == run.weight) {
            last->length += c;
          } else {
            group.runs.push_back(run);
          }
        }
      }
      for (size_t i = 0; i < h.positions.size(); ++i) {
        for (size_t j = 0; j < w.positions.size(); ++j) {
          group.rows.push_back({(h.bases[i] * src.width + w.bases[j]) * c,
                                (h.positions[i] * dst.width + w.positions[j]) * dst.channels});
        }
      }
      table.groups.push_back(std::move(group));
    }
  }
  return table;
}

}  // namespace

ConvGeometry make_conv_geometry(const Shape& in, const Shape& out, const Window& w) {
  ConvGeometry g;
  g.forward = make_table(in, out, w, forward_axis(in.height, out.height, w, 0),
                         forward_axis(in.width, out.width, w, 1));
  g.backward = make_table(out, in, w, backward_axis(in.height, out.height, w, 0),
                          backward_axis(in.width, out.width, w, 1));
  return g;
}

}  // namespace fm
