// Reads where tensors of Python are and how they lie, without a call of Python: by the table of
// functions that torch offers through DLPack (from torch 2.10 on). The table is plain C with a
// version, so this module needs nothing of torch to be built or loaded.
#pragma once

#include <algorithm>
#include <vector>

#include "bind/arguments.h"

namespace fm::bind {

// As dlpack.h of version 1 has them; what is not used here is a plain pointer.
namespace dlpack {

struct Tensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t ndim;
  std::uint8_t code, bits;
  std::uint16_t lanes;
  const std::int64_t *shape, *strides;
  std::uint64_t byte_offset;
};

struct Exchange {
  std::uint32_t major, minor;
  const Exchange* previous;
  void *allocate, *export_owned, *import_owned;
  // Returns 0, or sets a Python error; `out` is good as long as the tensor stays as it is.
  int (*read)(void* tensor, Tensor* out);
  void* stream;
};

}  // namespace dlpack

// All about a tensor but its values.
struct Layout {
  Address data;
  std::uint64_t device, type;
  std::vector<std::int64_t> sizes, strides;

  explicit Layout(const dlpack::Tensor& t)
      : data(address(t)),
        device(device_of(t)),
        type(type_of(t)),
        sizes(t.shape, t.shape + t.ndim),
        strides(t.strides, t.strides + t.ndim) {}

  // Whether another tensor has the same sizes, type and device.
  bool fits(const dlpack::Tensor& t) const {
    return device == device_of(t) && type == type_of(t) && std::size_t(t.ndim) == sizes.size() &&
           std::equal(sizes.begin(), sizes.end(), t.shape);
  }
  bool is(const dlpack::Tensor& t) const {
    return data == address(t) && fits(t) && std::equal(strides.begin(), strides.end(), t.strides);
  }

  static Address address(const dlpack::Tensor& t) { return Address(t.data) + t.byte_offset; }
  // In order and without gaps.
  static bool contiguous(const dlpack::Tensor& t) {
    std::int64_t stride = 1;
    for (int d = t.ndim; d-- > 0; stride *= t.shape[d]) {
      if (t.shape[d] != 1 && t.strides[d] != stride) return false;
    }
    return true;
  }

 private:
  static std::uint64_t device_of(const dlpack::Tensor& t) {
    return std::uint64_t(t.device_type) << 32 | std::uint32_t(t.device_id);
  }
  static std::uint64_t type_of(const dlpack::Tensor& t) {
    return std::uint64_t(t.code) << 24 | std::uint64_t(t.bits) << 16 | t.lanes;
  }
};

class TensorReader {
 public:
  // `type` is torch.Tensor, `table` what it calls __dlpack_c_exchange_api__.
  TensorReader(py::object type, py::object table)
      : type_(std::move(type)), table_(std::move(table)) {
    require(PyType_Check(type_.ptr()), "type: expected torch.Tensor");
    exchange_ = static_cast<const dlpack::Exchange*>(
        PyCapsule_GetPointer(table_.ptr(), "dlpack_exchange_api"));
    if (!exchange_) throw py::error_already_set();
    require(exchange_->major == 1 && exchange_->read,
            "DLPack: expected version 1 with a reader of ", "tensors, got version ",
            exchange_->major);
  }

  // False for what is no tensor, or none with an address.
  bool read(PyObject* object, dlpack::Tensor& out) const {
    if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(type_.ptr()))) return false;
    if (exchange_->read(object, &out) == 0) return true;
    PyErr_Clear();
    return false;
  }

 private:
  py::object type_, table_;
  const dlpack::Exchange* exchange_;
};

}  // namespace fm::bind
