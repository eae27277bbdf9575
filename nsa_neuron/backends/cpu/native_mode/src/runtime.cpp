#include "runtime.h"

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <exception>
#include <mutex>

namespace nsa {

void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
          float* c, int64_t ldc, bool add) {
  at::native::cpublas::brgemm(m, n, k, lda, ldb, ldc, add, a, b, c, /*is_vnni=*/false);
}

int64_t thread_count() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

namespace {

// The first exception of any thread: none may leave an OpenMP region.
class FirstError {
 public:
  void keep() noexcept {
    std::lock_guard<std::mutex> guard(mutex_);
    if (!error_) error_ = std::current_exception();
    failed_ = true;
  }
  bool failed() const { return failed_; }
  void raise() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr error_;
  std::atomic<bool> failed_{false};
};

}  // namespace

void parallel(int64_t count, const std::function<std::function<void(int64_t)>()>& make) {
  if (count <= 0) return;
  std::atomic<int64_t> next{0};
  FirstError error;
  const int threads = static_cast<int>(std::min<int64_t>(thread_count(), count));
  auto work = [&] {
    try {
      const auto worker = make();
      for (int64_t task; !error.failed() && (task = next.fetch_add(1)) < count;) worker(task);
    } catch (...) {
      error.keep();
    }
    at::native::cpublas::brgemm_release(false);
  };
  if (threads == 1) {
    work();
  } else {
#pragma omp parallel num_threads(threads)
    work();
  }
  error.raise();
}

}  // namespace nsa
