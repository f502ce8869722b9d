// What the calls of the module have in common: addresses as they come from fastmaml/_native.py.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/error.h"
#include "meta/options.h"

namespace py = pybind11;

namespace fm {

using Address = std::uintptr_t;
using Addresses = std::vector<Address>;

template <class P>
P* at(Address address) {
  return reinterpret_cast<P*>(address);
}

template <class P>
TensorList<P> tensors(const Program& program, const Addresses& addresses, bool per_task) {
  require(addresses.size() == program.parameters().size(), "expected ", program.parameters().size(),
          " tensors, got ", addresses.size());
  TensorList<P> list;
  list.per_task = per_task;
  for (Address a : addresses) list.tensors.push_back(at<P>(a));
  return list;
}

// (x, y, samples per task, channels last)
using SamplesTuple = std::tuple<Address, Address, index_t, bool>;

template <class S>
Samples<S> samples(const SamplesTuple& t) {
  return {at<const S>(std::get<0>(t)), at<const void>(std::get<1>(t)), std::get<2>(t),
          std::get<3>(t)};
}

// (values, layout, rows, adapted per tensor)
using RatesTuple = std::tuple<Address, int, index_t, std::vector<std::uint8_t>>;

template <class S>
Rates<S> rates(const Program& program, const RatesTuple& t) {
  require(std::get<3>(t).size() == program.parameters().size(), "adapted: expected ",
          program.parameters().size(), " flags, got ", std::get<3>(t).size());
  return {at<const S>(std::get<0>(t)), RateLayout(std::get<1>(t)), std::get<2>(t), std::get<3>(t)};
}

}  // namespace fm
