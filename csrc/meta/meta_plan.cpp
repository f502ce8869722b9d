// What a caller is told of a plan.
#include "meta/meta_plan.h"

#include <utility>

namespace fm {

template <class S>
CallPlan plan_meta_gradient(const MetaCall<S>& call) {
  auto made = std::make_shared<const MetaPlan>(make_plan(call));
  const MetaPlan& plan = *made;
  CallPlan result = told_sizes<S>(call, plan.slots, plan.slot, plan.shared, plan.support.size);
  result.kept = plan.kept;
  result.resident = plan.resident.taken;
  result.factored = index_t(plan.factored.layers.size());
  result.meta = std::move(made);
  return result;
}

template CallPlan plan_meta_gradient(const MetaCall<float>&);
template CallPlan plan_meta_gradient(const MetaCall<double>&);

}  // namespace fm
