// Notices changes of Python objects that prepared calls rely on: one call looks at many.
#pragma once

#include <memory>

#include "bind/tensor_reader.h"

namespace fm::bind {

// Attributes of objects and entries of dictionaries, all as they were when the watch was made:
// the same objects, or equal ones where that is enough.
class ObjectWatch {
 public:
  using Attribute = std::pair<py::object, py::str>;
  using Entry = std::pair<py::dict, py::object>;

  ObjectWatch(const std::vector<Attribute>& same, const std::vector<Attribute>& equal,
              const std::vector<Entry>& entries);
  bool changed() const;

 private:
  struct Place {
    py::object owner, key, value;
  };
  std::vector<Place> same_, equal_, entries_;
};

// Where tensors are and how they lie, and attributes that must stay the same objects.
class Watch {
 public:
  // Without a reader (None), what functions return for the tensors (integers) stands for how they
  // lie.
  Watch(const std::vector<py::object>& tensors, const std::vector<py::object>& functions,
        const std::vector<ObjectWatch::Attribute>& attributes,
        std::shared_ptr<TensorReader> reader);
  bool changed() const;

 private:
  bool moved() const;

  std::vector<py::object> tensors_, functions_;
  std::shared_ptr<TensorReader> reader_;
  std::vector<Layout> layouts_;
  std::vector<long long> numbers_;
  ObjectWatch attributes_;
};

}  // namespace fm::bind
