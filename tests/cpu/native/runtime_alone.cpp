// runtime.h without torch: threads of the standard library and plain products, so that kernels run
// under sanitizers, which know neither torch's OpenMP nor its compiled products.
#include <algorithm>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "runtime.h"

namespace nsa {

int64_t threads = 1;  // set by the driver

void gemm(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb, float* c,
          int64_t ldc, bool add) {
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) {
      float total = add ? c[i * ldc + j] : 0.f;
      for (int64_t x = 0; x < k; x++) total += a[i * lda + x] * b[x * ldb + j];
      c[i * ldc + j] = total;
    }
}

int64_t thread_count() { return threads; }

void parallel(int64_t count, const std::function<std::function<void(int64_t)>()>& make) {
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    try {
      const auto worker = make();
      for (int64_t task; (task = next.fetch_add(1)) < count;) worker(task);
    } catch (...) {
      std::lock_guard<std::mutex> guard(mutex);
      error = std::current_exception();
    }
  };
  std::vector<std::thread> team;
  for (int64_t i = 0; i < std::min(threads, count); i++) team.emplace_back(work);
  for (std::thread& each : team) each.join();
  if (error) std::rethrow_exception(error);
}

}  // namespace nsa
