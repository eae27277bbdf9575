// What Python calls, through ctypes: plain C, and no exception leaves it.
#include <cstring>
#include <exception>

#include "kernels.h"
#include "runtime.h"

namespace {

enum Status { OK = 0, BAD_IDS = 1, NO_MEMORY = 2, FAILED = 3, BAD_TABLE = 4 };

// Runs a kernel; what it throws becomes a status and a message of at most `size` bytes.
template <typename Kernel>
int guarded(char* message, int64_t size, const Kernel& kernel) noexcept {
  const auto tell = [&](const char* text, int status) {
    std::strncpy(message, text, size - 1);
    message[size - 1] = 0;
    return status;
  };
  try {
    kernel();
    return OK;
  } catch (const nsa::BadIds& error) {
    return tell(error.what(), BAD_IDS);
  } catch (const nsa::BadTable& error) {
    return tell(error.what(), BAD_TABLE);
  } catch (const std::bad_alloc&) {
    return tell("out of memory", NO_MEMORY);
  } catch (const std::exception& error) {
    return tell(error.what(), FAILED);
  } catch (...) {
    return tell("an exception of unknown type", FAILED);
  }
}

}  // namespace

#define NSA_EXPORT extern "C" __attribute__((visibility("default")))

// Python refuses a library whose record of a call is not its own.
NSA_EXPORT int64_t nsa_call_size() { return sizeof(nsa::Call); }

#define NSA_KERNEL(name)                                                              \
  NSA_EXPORT int nsa_##name(const nsa::Call* call, char* message, int64_t size) {     \
    return guarded(message, size, [&] { nsa::name(*call); });                         \
  }

NSA_KERNEL(interval_forward)
NSA_KERNEL(interval_backward)
NSA_KERNEL(compressed_forward)
NSA_KERNEL(selected_forward)
NSA_KERNEL(selected_backward)
// Of one op, and of the three branches of the whole.
NSA_EXPORT int nsa_few_queries(const nsa::Call* call, char* message, int64_t size) {
  return guarded(message, size, [&] { nsa::few_queries(call, 1); });
}
NSA_EXPORT int nsa_few_queries_whole(const nsa::Call* calls, char* message, int64_t size) {
  return guarded(message, size, [&] { nsa::few_queries(calls, 3); });
}
NSA_KERNEL(gated_sum)
NSA_KERNEL(gated_sum_backward)
