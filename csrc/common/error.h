// Errors of the engine: thrown while a program is built or when a call's arguments are checked,
// never from inside a kernel. The binding turns them into Python's ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace fm {

struct Error : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw Error(text.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

}  // namespace fm
