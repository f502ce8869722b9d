// Notices changes of Python objects that prepared calls rely on: one call looks at many.
#include "bind/arguments.h"
#include "bind/module.h"

namespace fm::bind {
namespace {

// What functions return for objects (integers), and which objects their attributes are, all as
// they were when the watch was made.
class Watch {
 public:
  Watch(const std::vector<py::object>& objects, const std::vector<py::object>& functions,
        const std::vector<py::str>& attributes)
      : objects_(objects), functions_(functions) {
    for (const py::object& f : functions_) {
      for (const py::object& o : objects_) numbers_.push_back(number(f, o));
    }
    for (const py::str& name : attributes) {
      PyObject* interned = name.inc_ref().ptr();
      PyUnicode_InternInPlace(&interned);
      attributes_.push_back(py::reinterpret_steal<py::object>(interned));
      for (const py::object& o : objects_) values_.push_back(py::getattr(o, name));
    }
  }

  bool changed() const {
    const long long* expected = numbers_.data();
    for (const py::object& f : functions_) {
      for (const py::object& o : objects_) {
        if (number(f, o) != *expected++) return true;
      }
    }
    const py::object* value = values_.data();
    for (const py::object& name : attributes_) {
      for (const py::object& o : objects_) {
        PyObject* now = PyObject_GetAttr(o.ptr(), name.ptr());
        if (!now) throw py::error_already_set();
        Py_DECREF(now);
        if (now != (value++)->ptr()) return true;
      }
    }
    return false;
  }

 private:
  static long long number(const py::object& f, const py::object& o) {
    PyObject* found = PyObject_CallOneArg(f.ptr(), o.ptr());
    if (!found) throw py::error_already_set();
    const long long n = PyLong_AsLongLong(found);
    Py_DECREF(found);
    if (n == -1 && PyErr_Occurred()) throw py::error_already_set();
    return n;
  }

  std::vector<py::object> objects_, functions_, attributes_;
  std::vector<long long> numbers_;
  std::vector<py::object> values_;
};

}  // namespace

void define_watch(py::module_& m) {
  py::class_<Watch>(m, "Watch")
      .def(py::init<const std::vector<py::object>&, const std::vector<py::object>&,
                    const std::vector<py::str>&>())
      .def("changed", &Watch::changed);
}

}  // namespace fm::bind
