#include "program/loss.h"

#include <string>

#include "common/error.h"

namespace fm {

LossKind loss_kind(const LossSpec& loss) {
  require(loss.reduction == "mean" ||
              (loss.reduction == "sum_over_ways" && loss.kind == "cross_entropy"),
          "reduction: expected 'mean' (or 'sum_over_ways' for cross_entropy), got '",
          loss.reduction, "' for loss '", loss.kind, "'");
  const char* names[] = {"mse",
                         "cross_entropy",
                         "policy_gradient",
                         "likelihood_ratio",
                         "gaussian_kl",
                         "categorical_policy_gradient",
                         "categorical_likelihood_ratio",
                         "categorical_kl"};
  static_assert(sizeof(names) / sizeof(*names) == size_t(LossKind::count));
  std::string known;
  for (int kind = 0; kind < int(LossKind::count); ++kind) {
    if (loss.kind == names[kind]) return LossKind(kind);
    known += (kind ? ", " : "") + std::string(names[kind]);
  }
  fail("loss: expected one of ", known, ", got '", loss.kind, "'");
}

index_t loss_target_size(LossKind loss, index_t outputs) {
  switch (loss) {
    case LossKind::cross_entropy:
      return 1;
    case LossKind::gaussian_policy:
      return outputs / 2 + 1;
    case LossKind::gaussian_ratio:
      return outputs / 2 + 2;
    case LossKind::categorical_policy:
      return 2;
    case LossKind::categorical_ratio:
      return 3;
    case LossKind::gaussian_kl:
    case LossKind::categorical_kl:
      return outputs + 1;
    default:
      return outputs;
  }
}

}  // namespace fm
