// How a driver of tests/emulation/ fails: its functions return 0, or 1 and leave the reason, which
// tests read by `last_error`. Included once per driver, each of which is a program of its own.
#pragma once

#include <exception>
#include <string>

namespace {

std::string reason;

template <class Body>
int guarded(Body&& body) {
  try {
    body();
    return 0;
  } catch (const std::exception& e) {
    reason = e.what();
    return 1;
  }
}

}  // namespace

extern "C" const char* last_error() { return reason.c_str(); }
