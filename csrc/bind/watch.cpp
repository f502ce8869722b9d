#include "bind/watch.h"

#include "bind/module.h"

namespace fm::bind {
namespace {

py::object interned(const py::str& name) {
  PyObject* string = name.inc_ref().ptr();
  PyUnicode_InternInPlace(&string);
  return py::reinterpret_steal<py::object>(string);
}

long long number(const py::object& f, const py::object& o) {
  PyObject* found = PyObject_CallOneArg(f.ptr(), o.ptr());
  if (!found) throw py::error_already_set();
  const long long n = PyLong_AsLongLong(found);
  Py_DECREF(found);
  if (n == -1 && PyErr_Occurred()) throw py::error_already_set();
  return n;
}

}  // namespace

ObjectWatch::ObjectWatch(const std::vector<Attribute>& same, const std::vector<Attribute>& equal,
                         const std::vector<Entry>& entries) {
  for (const auto& [o, name] : same) same_.push_back({o, interned(name), py::getattr(o, name)});
  for (const auto& [o, name] : equal) equal_.push_back({o, interned(name), py::getattr(o, name)});
  for (const auto& [d, key] : entries) entries_.push_back({d, key, d[key]});
}

bool ObjectWatch::changed() const {
  for (const Place& p : entries_) {
    PyObject* now = PyDict_GetItemWithError(p.owner.ptr(), p.key.ptr());  // borrowed
    if (!now && PyErr_Occurred()) throw py::error_already_set();
    if (now != p.value.ptr()) return true;
  }
  for (const Place& p : same_) {
    PyObject* now = PyObject_GetAttr(p.owner.ptr(), p.key.ptr());
    if (!now) throw py::error_already_set();
    Py_DECREF(now);
    if (now != p.value.ptr()) return true;
  }
  for (const Place& p : equal_) {
    PyObject* now = PyObject_GetAttr(p.owner.ptr(), p.key.ptr());
    if (!now) throw py::error_already_set();
    const int equal = PyObject_RichCompareBool(now, p.value.ptr(), Py_EQ);
    Py_DECREF(now);
    if (equal < 0) throw py::error_already_set();
    if (!equal) return true;
  }
  return false;
}

Watch::Watch(const std::vector<py::object>& tensors, const std::vector<py::object>& functions,
             const std::vector<ObjectWatch::Attribute>& attributes,
             std::shared_ptr<TensorReader> reader)
    : tensors_(tensors),
      functions_(functions),
      reader_(std::move(reader)),
      attributes_(attributes, {}, {}) {
  dlpack::Tensor t;
  for (const py::object& o : tensors_) {
    if (!reader_ || !reader_->read(o.ptr(), t)) {
      reader_ = nullptr;
      break;
    }
    layouts_.emplace_back(t);
  }
  if (reader_) return;
  for (const py::object& f : functions_) {
    for (const py::object& o : tensors_) numbers_.push_back(number(f, o));
  }
}

bool Watch::moved() const {
  if (reader_) {
    dlpack::Tensor t;
    const Layout* expected = layouts_.data();
    for (const py::object& o : tensors_) {
      if (!reader_->read(o.ptr(), t) || !(expected++)->is(t)) return true;
    }
    return false;
  }
  const long long* expected = numbers_.data();
  for (const py::object& f : functions_) {
    for (const py::object& o : tensors_) {
      if (number(f, o) != *expected++) return true;
    }
  }
  return false;
}

bool Watch::changed() const { return moved() || attributes_.changed(); }

void define_watch(py::module_& m) {
  py::class_<TensorReader, std::shared_ptr<TensorReader>>(m, "TensorReader")
      .def(py::init<py::object, py::object>());
  py::class_<ObjectWatch>(m, "ObjectWatch")
      .def(py::init<const std::vector<ObjectWatch::Attribute>&,
                    const std::vector<ObjectWatch::Attribute>&,
                    const std::vector<ObjectWatch::Entry>&>())
      .def("changed", &ObjectWatch::changed);
  py::class_<Watch, std::shared_ptr<Watch>>(m, "Watch")
      .def(py::init<const std::vector<py::object>&, const std::vector<py::object>&,
                    const std::vector<ObjectWatch::Attribute>&, std::shared_ptr<TensorReader>>(),
           py::arg("tensors"), py::arg("functions"), py::arg("attributes"),
           py::arg("reader").none(true))
      .def("changed", &Watch::changed);
}

}  // namespace fm::bind
