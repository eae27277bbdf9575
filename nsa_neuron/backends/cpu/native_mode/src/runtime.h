// What kernels need of the machine: products, threads, memory. Implemented on torch in runtime.cpp,
// the only file that sees torch's headers.
#pragma once
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <new>
#include <stdexcept>

namespace nsa {

// Block ids that break the contract: what they are, `|`, what they must be.
struct BadIds : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A table of pages that leads outside the pools.
struct BadTable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// c (+)= a @ b, row-major: a [m, k], b [k, n], c [m, n] with leading dimensions.
void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
          float* c, int64_t ldc, bool add);

// Threads of a parallel region here: torch's number, 1 inside another region.
int64_t thread_count();

// Runs `worker(task)` for tasks 0 .. count - 1 on torch's threads. `make` gives each thread a worker
// with its own memory. Whoever is free takes the next task, so put long ones first; what a task
// computes must not depend on who runs it. The first exception is thrown again at the end.
void parallel(int64_t count, const std::function<std::function<void(int64_t)>()>& make);

// Uninitialised floats, aligned to a cache line, with room for a vector past the end.
class Buffer {
 public:
  explicit Buffer(int64_t count = 0) { grow(count); }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void grow(int64_t count) {
    if (count <= size_) return;
    std::free(data_);
    data_ = nullptr;
    size_ = 0;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(float) + 127) / 64 * 64;
    data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
    size_ = count;
  }
  float* get() const { return data_; }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace nsa
