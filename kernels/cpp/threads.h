// Threads that sleep between steps. The standard library's, so that no OpenMP runtime has to be installed, none
// competes with torch's, and every platform runs the same code.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
inline unsigned arithmetic_mode() { return _mm_getcsr(); }  // whether small numbers are flushed to zero
inline void set_arithmetic_mode(unsigned mode) { _mm_setcsr(mode); }
#else
inline unsigned arithmetic_mode() { return 0; }
inline void set_arithmetic_mode(unsigned) {}
#endif

class Threads {
 public:
  // Calls work() in this thread and in up to count - 1 others; returns when none is in it any more. What work() does
  // must be complete when any of these calls returns: a thread that wakes up too late does not take part, and where
  // another step is under way, none does.
  template <class Work>
  void run(int64_t count, Work& work) {
    const std::unique_lock<std::mutex> alone(in_use_, std::try_to_lock);
    if (count <= 1 || !alone) return work();
    open(count - 1, [](void* given) { (*static_cast<Work*>(given))(); }, &work);
    work();
    close();
  }

 private:
  using Call = void (*)(void*);

  void open(int64_t helpers, Call call, void* given) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (started_ < helpers && start()) {
      }
      call_ = call;
      given_ = given;
      mode_ = arithmetic_mode();
      places_ = helpers;
      ++turn_;
    }
    wake_.notify_all();
  }

  void close() {
    std::unique_lock<std::mutex> lock(mutex_);
    places_ = 0;
    left_.wait(lock, [this] { return at_work_ == 0; });
  }

  bool start() {
    try {
      std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // no more threads to be had: fewer do it
      return false;
    }
    ++started_;
    return true;
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (int64_t seen = 0;;) {
      wake_.wait(lock, [&] { return places_ > 0 && turn_ != seen; });
      seen = turn_;
      --places_;
      ++at_work_;
      set_arithmetic_mode(mode_);
      lock.unlock();
      call_(given_);
      lock.lock();
      if (--at_work_ == 0) left_.notify_one();
    }
  }

  std::mutex in_use_, mutex_;
  std::condition_variable wake_, left_;
  Call call_ = nullptr;
  void* given_ = nullptr;
  unsigned mode_ = 0;  // of the thread that opened the work
  int64_t started_ = 0, places_ = 0, at_work_ = 0, turn_ = 0;
};
