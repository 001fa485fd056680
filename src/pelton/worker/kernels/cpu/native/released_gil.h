// Python's lock, let go while native code runs.
#pragma once

#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace pelton {

// In place of nb::gil_scoped_release: a daemon that comes back when the interpreter has ended is unwound by it, out of
// C++ that does not expect that, and the process aborts in the midst of its exit. Such a thread waits for the exit instead.
class ReleasedGil {
public:
    ReleasedGil() : state_(PyEval_SaveThread()) {}
    ReleasedGil(const ReleasedGil&) = delete;
    ReleasedGil& operator=(const ReleasedGil&) = delete;

    ~ReleasedGil() {
        try {
            PyEval_RestoreThread(state_);
        } catch (abi::__forced_unwind&) {
            for (;;) pause();
        }
    }

private:
    PyThreadState* state_;
};

}  // namespace pelton
