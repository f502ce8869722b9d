// A whole task of a small network in one call, in the nearest caches: inner steps, query gradients
// and chain. With x = a of the stage before, a stage is
//
//   z  = x w + b            a  = f(z)              d: adjoint of z, da of a, dx of x
//   d  = f'(z) da           dx = d w^T             dw  = x^T d            db  = sum d
//   tz = x tw + tx w + tb   ta = f'(z) tz
//   td = f''(z) tz da + f'(z) tda                  tdx = td w^T + d tw^T
//                                                  tdw = x^T td + tx^T d  tdb = sum td
//
// What updates w updates w^T as well, from the same sums in the same order, so that nothing is ever
// transposed but the parameters the tasks share. Every element is one chain of multiply-adds over
// samples or features (a stage with one output: one per lane), whatever runs beside.

namespace FM_KERNELS {

class Resident {
 public:
  Resident(const ResidentCall<S>& call, const Residence& at, const ResidentTask<S>& task,
           const S* theta0, S* slot)
      : call_(call), at_(at), task_(task), theta0_(theta0), slot_(slot) {}

  void run() const {
    const index_t K = call_.steps;
    double unused;
    for (index_t k = 0; k < K; ++k) {
      S* next = slot_ + at_.thetas + k * at_.params;
      gradient(theta(k), support(), tape(k), {next, theta(k), S(-1), rates(k), true},
               {false, k + 1 == K}, &unused, &unused);
    }
    S* lambda = slot_ + at_.lambda;
    if (call_.loss_weights[K] == 0) std::memset(lambda, 0, at_.params * sizeof(S));
    for (index_t k = K;; --k) {
      add_query_gradient(k);
      if (k == 0) break;
      if (!call_.first_order) chain_step(k - 1);
    }
    store_lambda();
  }

  // The parameters tasks share, from the engine's layout.
  static void share(const Residence& at, const S* theta, S* set) {
    for (int l = 0; l < at.depth; ++l) {
      const Stage& s = at.stages[l];
      const S* w = theta + s.layer->param_offset;
      if (!s.single()) copy_rows(w, s.out, s.in, s.out, set + s.w, s.out_row);
      if (l > 0) transpose(w, s.in, s.out, set + s.wt, s.in_row);
      if (s.layer->has_bias) copy_rows(w + s.layer->bias_offset, 0, 1, s.out, set + s.b, 0);
    }
  }

 private:
  using Reinforce = math::PolicyGradient<math::Gaussian>;

  struct Batch {
    const S* x;
    const void* y;
    index_t count;
  };

  using Target = ParameterTarget;

  Batch support() const { return {task_.support_x, task_.support_y, call_.support}; }
  Batch query() const { return {task_.query_x, task_.query_y, call_.query}; }
  const S* theta(index_t k) const {
    return k == 0 ? theta0_ : slot_ + at_.thetas + (k - 1) * at_.params;
  }
  S* tape(index_t k) const { return slot_ + at_.tapes + (call_.first_order ? 0 : k) * at_.tape; }
  index_t row(index_t k) const { return min_of(k, call_.rate_rows - 1); }
  const S* rates(index_t k) const {
    return call_.rates + row(k) * index_t(call_.program->segments().size());
  }
  const Stage& last() const { return at_.stages[at_.depth - 1]; }
  // what a stage reads
  static const S* input(const Stage* s, const Batch& batch, const S* tape) {
    return s ? tape + s->a : batch.x;
  }
  const Stage* before(int l) const { return l > 0 ? &at_.stages[l - 1] : nullptr; }

  // lambda += w_k g_q(theta_k), which is where lambda starts at the last step
  void add_query_gradient(index_t k) const {
    const double weight = call_.loss_weights[k];
    task_.loss[k] = task_.accuracy[k] = std::numeric_limits<double>::quiet_NaN();
    if (weight == 0) return;
    S* lambda = slot_ + at_.lambda;
    const bool last = k == call_.steps;
    const Target target{lambda, last ? nullptr : lambda, S(weight), nullptr,
                        k > 0 && !call_.first_order};
    const LowRankStages low{last, last && !call_.first_order};
    gradient(theta(k), query(), slot_ + at_.query, target, low, &task_.loss[k], &task_.accuracy[k]);
  }

  // lambda -= H_s(theta_k) [a_k (.) lambda]
  void chain_step(index_t k) const {
    S* lambda = slot_ + at_.lambda;
    const bool last = k + 1 == call_.steps;
    if (call_.one_rate) {
      const S factor = -call_.one_rate[row(k)];
      hessian_vector(theta(k), lambda, tape(k), {lambda, lambda, factor, nullptr, k > 0}, last);
    } else {
      S* v = slot_ + at_.direction;
      scale_by_rates(rates(k), lambda, v, last);
      hessian_vector(theta(k), v, tape(k), {lambda, lambda, S(-1), nullptr, k > 0}, last);
    }
  }

  void scale_by_rates(const S* rates, const S* from, S* to, bool last) const {
    const auto scale = [&](index_t begin, index_t n, S rate) {
      for (index_t i = begin; i < begin + n; ++i) to[i] = rate * from[i];
    };
    for (int l = 0; l < at_.depth; ++l) {
      const Stage& s = at_.stages[l];
      const S* rate = rates + s.layer->segment;
      const bool formed = !(last && s.low_rank);
      if (formed && !s.single()) scale(s.w, s.in * s.out_row, rate[0]);
      if (formed && l > 0) scale(s.wt, s.out * s.in_row, rate[0]);
      if (s.layer->has_bias) scale(s.b, s.out_row, rate[1]);
    }
  }

  bool still(const Stage& s) const { return call_.one_rate && !call_.adapted[s.layer->segment]; }

  // What of the stages of low rank is not there: weights of theta_K, which is read, and of what is
  // stored.
  struct LowRankStages {
    bool read, stored;
  };

  void gradient(const S* theta, const Batch& batch, S* tape, Target target,
                const LowRankStages& without, double* value, double* accuracy) const {
    const LowRank low(call_.support, call_.query);
    const index_t before_last = max_of<index_t>(call_.steps - 1, 0);
    const S *known = this->theta(before_last), *inner = this->tape(before_last);
    S *gram = slot_ + at_.gram, *scratch = slot_ + at_.scratch;
    for (int l = 0; l < at_.depth; ++l) {
      const Stage& s = at_.stages[l];
      const S* x = input(before(l), batch, tape);
      Operands pairs;
      ScaledOperands first;
      if (s.low_rank && without.read) {
        low.grams(x, inner + before(l)->a, s.in, s.in_row, scratch, gram, slot_ + s.inputs);
        first = low.of_query(gram, inner + s.d, -rates(before_last)[s.layer->segment]);
        pairs.add(x, known);
      } else {
        pairs.add(x, theta);
      }
      forward_product(s, pairs, s.layer->has_bias ? theta + s.b : nullptr, batch.count, s.relu,
                      nullptr, tape + s.z, first);
      if (s.activation) {
        s.activation->forward(batch.count * s.out_row, s.alpha, tape + s.z, tape + s.a);
      }
    }
    loss(batch, tape, value, accuracy);
    if (without.read && without.stored && target.factor != S(1)) {
      S* dz = tape + last().da;
      for (index_t i = 0; i < batch.count * last().out_row; ++i) dz[i] *= target.factor;
      target.factor = S(1);
    }
    for (int l = at_.depth; l-- > 0;) {
      const Stage& s = at_.stages[l];
      if (s.activation) {
        s.activation->slope(batch.count * s.out_row, s.alpha, tape + s.z, tape + s.a, tape + s.da,
                            tape + s.d);
      }
      const Stage* p = before(l);
      Operands adjoint, pairs;
      ScaledOperands first;
      if (s.low_rank && without.read) {
        low.grams(tape + s.d, inner + s.d, s.out, s.out_row, scratch, gram, slot_ + s.adjoints);
        first = low.of_query(gram, inner + p->a, -rates(before_last)[s.layer->segment]);
        adjoint.add(tape + s.d, known + s.wt);
      } else if (p) {
        adjoint.add(tape + s.d, theta + s.wt);
      }
      pairs.add(input(p, batch, tape), tape + s.d);
      S* da = p ? tape + p->da : nullptr;
      if (s.single()) {
        single_products(s, p->relu, adjoint, pairs, batch.count, da, target);
        continue;
      }
      if (p) adjoint_product(s, adjoint, batch.count, p->relu ? tape + p->a : nullptr, da, first);
      if (!(s.low_rank && without.stored)) weight_products(s, !p, pairs, batch.count, target);
      bias_sums(s, pairs, batch.count, target);
    }
  }

  // tdw into the target, from the tape of the gradient there; v and what the target adds to are the
  // last lambda or not
  void hessian_vector(const S* theta, const S* v, S* tape, const Target& target, bool last) const {
    const Batch batch = support();
    const LowRank low(call_.support, call_.query);
    const S* query = slot_ + at_.query;
    S* tangent = slot_ + at_.tangent;
    const auto rate = [&](const Stage& s) {
      return call_.one_rate ? S(1) : rates(call_.steps - 1)[s.layer->segment];
    };
    for (int l = 0; l < at_.depth; ++l) {
      const Stage& s = at_.stages[l];
      const Stage* p = before(l);
      const bool moves = !still(s), low_rank = last && s.low_rank;
      Operands pairs;
      ScaledOperands first;
      if (low_rank && moves) first = low.of_support(slot_ + s.inputs, query + s.d, rate(s));
      pairs.add(input(p, batch, tape), moves && !low_rank ? v : nullptr);
      pairs.add(p ? tangent + p->ta : nullptr, theta);
      forward_product(s, pairs, s.layer->has_bias && moves ? v + s.b : nullptr, batch.count, false,
                      s.relu ? tape + s.a : nullptr, tangent + s.tz, first);
      if (s.activation) {
        s.activation->slope(batch.count * s.out_row, s.alpha, tape + s.z, tape + s.a,
                            tangent + s.tz, tangent + s.ta);
      }
    }
    loss_hessian(batch, tape, tangent);
    for (int l = at_.depth; l-- > 0;) {
      const Stage& s = at_.stages[l];
      const Stage* p = before(l);
      if (s.activation) {
        s.activation->curve(batch.count * s.out_row, s.alpha, tape + s.z, tape + s.a,
                            tangent + s.tz, tape + s.da, tangent + s.tda, tangent + s.td);
      }
      const bool moves = !still(s), low_rank = last && s.low_rank;
      Operands adjoint, pairs;
      ScaledOperands first;
      if (p) {
        if (low_rank && moves) first = low.of_support(slot_ + s.adjoints, query + p->a, rate(s));
        adjoint.add(tangent + s.td, theta + s.wt);
        adjoint.add(tape + s.d, moves && !low_rank ? v + s.wt : nullptr);
      }
      pairs.add(input(p, batch, tape), tangent + s.td);
      pairs.add(p ? tangent + p->ta : nullptr, tape + s.d);
      S* tda = p ? tangent + p->tda : nullptr;
      if (s.single()) {
        single_products(s, p->relu, adjoint, pairs, batch.count, tda, target);
        continue;
      }
      if (p) adjoint_product(s, adjoint, batch.count, p->relu ? tape + p->a : nullptr, tda, first);
      if (low_rank) {
        Operands base;
        base.add(query + p->a, query + s.d);
        weight_products(s, base, call_.query, pairs, batch.count, target);
      } else {
        weight_products(s, !p, pairs, batch.count, target);
      }
      bias_sums(s, pairs, batch.count, target);
    }
  }

  // Calls body(n, z, place of its adjoint, target) for every sample.
  template <class Target, class Body>
  void each_sample(const Batch& batch, index_t width, Body&& body) const {
    const Target* y = static_cast<const Target*>(batch.y);
    for (index_t n = 0; n < batch.count; ++n) body(n * last().out_row, y + n * width);
  }

  void loss(const Batch& batch, S* tape, double* value, double* accuracy) const {
    const Program& program = *call_.program;
    const S scale = S(program.loss_scale(batch.count));
    const S* z = tape + last().a;
    S* dz = tape + last().da;
    const index_t outputs = last().out;
    double total = 0;
    index_t hits = 0;
    *accuracy = std::numeric_limits<double>::quiet_NaN();
    if (program.loss() == LossKind::squared_error) {
      each_sample<S>(batch, outputs, [&](index_t i, const S* y) {
        total += math::squared_error(z + i, y, outputs, scale, dz + i);
      });
    } else if (program.loss() == LossKind::gaussian_policy) {
      each_sample<S>(batch, Reinforce::target_size(outputs), [&](index_t i, const S* y) {
        total += Reinforce::value(z + i, y, outputs, scale, dz + i);
      });
    } else {
      each_sample<std::int64_t>(batch, 1, [&](index_t i, const std::int64_t* y) {
        bool correct = false;
        total += math::cross_entropy(z + i, *y, outputs, scale, dz + i, &correct);
        hits += correct;
      });
      *accuracy = double(hits) / double(batch.count);
    }
    *value = total;
  }

  void loss_hessian(const Batch& batch, const S* tape, S* tangent) const {
    const Program& program = *call_.program;
    const S scale = S(program.loss_scale(batch.count));
    const S *z = tape + last().a, *tz = tangent + last().ta;
    S* tdz = tangent + last().tda;
    const index_t outputs = last().out;
    if (program.loss() == LossKind::squared_error) {
      const V factor = splat(S(2) * scale);
      for (index_t i = 0; i < batch.count * last().out_row; i += kLanes) {
        store(tdz + i, factor * load(tz + i));
      }
    } else if (program.loss() == LossKind::gaussian_policy) {
      each_sample<S>(batch, Reinforce::target_size(outputs), [&](index_t i, const S* y) {
        Reinforce::hessian(z + i, y, tz + i, outputs, scale, tdz + i);
      });
    } else {
      each_sample<std::int64_t>(batch, 1, [&](index_t i, const std::int64_t*) {
        math::cross_entropy_hessian(z + i, tz + i, outputs, scale, tdz + i);
      });
    }
  }

  // To the engine's layout.
  void store_lambda() const {
    const S* lambda = slot_ + at_.lambda;
    S* row = call_.lambdas + task_.task * call_.program->param_count();
    for (int l = 0; l < at_.depth; ++l) {
      const Stage& s = at_.stages[l];
      S* out = row + s.layer->param_offset;
      if (s.single()) {
        copy_rows(lambda + s.wt, 0, 1, s.in, out, 0);
      } else {
        copy_rows(lambda + s.w, s.out_row, s.in, s.out, out, s.out);
      }
      if (!s.layer->has_bias) continue;
      copy_rows(lambda + s.b, 0, 1, s.out, out + s.layer->bias_offset, 0);
    }
  }

  // Rows that lie `from_row` and `to_row` apart.
  static void copy_rows(const S* from, index_t from_row, index_t rows, index_t columns, S* to,
                        index_t to_row) {
    if (from_row == columns && to_row == columns) {
      columns *= rows;
      rows = 1;
    }
    for (index_t r = 0; r < rows; ++r, from += from_row, to += to_row) {
      for_columns(columns, [&](auto lanes, index_t c) { lanes.put(to + c, lanes.get(from + c)); });
    }
  }

  const ResidentCall<S>& call_;
  const Residence& at_;
  const ResidentTask<S>& task_;
  const S* theta0_;
  S* slot_;
};

// What tasks share: where everything is, the tree, then the parameters.
struct SharedRoom {
  static constexpr index_t kTree = (index_t(sizeof(Residence)) / kAlignment + 1) * kAlignment;
  index_t params;  // elements
  explicit SharedRoom(index_t tasks)
      : params((kTree + kAlignment + RowTree::bytes(tasks)) / index_t(sizeof(S))) {}
  static RowTree tree(S* shared) {
    const auto address = reinterpret_cast<std::uintptr_t>(shared) + kTree;
    return RowTree(reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment));
  }
};

inline ResidentSizes resident_plan(const ResidentCall<S>& call) {
  Residence at;
  if (!at.plan(call)) return {};
  return {true, SharedRoom(call.tasks).params + at.params, at.slot, at.tape};
}

inline void resident_share(const ResidentCall<S>& call, const S* theta, S* shared) {
  Residence* at = new (shared) Residence;
  at->plan(call);
  SharedRoom::tree(shared).clear(call.tasks);
  Resident::share(*at, theta, shared + SharedRoom(call.tasks).params);
}

inline void resident_task(const ResidentCall<S>& call, S* shared, S* slot,
                          const ResidentTask<S>& task) {
  const Residence& at = *std::launder(reinterpret_cast<const Residence*>(shared));
  Resident(call, at, task, shared + SharedRoom(call.tasks).params, slot).run();
  SharedRoom::tree(shared).arrive(call.lambdas, call.tasks, call.program->param_count(), task.task);
}

}  // namespace FM_KERNELS
