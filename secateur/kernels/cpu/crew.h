// Threads that go through a row of phases together, entered once: to begin and end as many parallel loops takes longer than what is
// computed in each of them.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <thread>

namespace secateur {

// Whoever is free takes the next chunk of a phase, and whoever ends the last of them opens the next phase. So nobody waits but for
// chunks that somebody is at: it goes through whether all threads come, or one of them does all, or they come one after the other.
class Crew {
 public:
  // `chunks(phase)`, at least one, and what to do: `work(phase, chunk, memory)`, then `after(phase)` once all are done. Each thread
  // has so many floats of memory.
  template <class Chunks, class Work, class After>
  static void go_through(int64_t phases, int64_t threads, int64_t floats, const Chunks& chunks, const Work& work, const After& after) {
    Crew crew;
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
      std::unique_ptr<float[]> memory(new float[floats]);
      crew.help(phases, memory.get(), chunks, work, after);
    });
  }

 private:
  static constexpr int CHUNK_BITS = 32;
  // Turns of waiting before others are let run.
  static constexpr int PATIENCE = 4096;

  template <class Chunks, class Work, class After>
  void help(int64_t phases, float* memory, const Chunks& chunks, const Work& work, const After& after) {
    for (int turns = 0;;) {
      uint64_t seen = next_.load(std::memory_order_acquire);
      if (phase_of(seen) >= phases) return;
      if (chunk_of(seen) < chunks(phase_of(seen))) seen = next_.fetch_add(1, std::memory_order_acq_rel);
      const int64_t phase = phase_of(seen), chunk = chunk_of(seen);
      if (phase >= phases) return;
      if (chunk >= chunks(phase)) {
        rest(turns++);
        continue;
      }
      turns = 0;
      work(phase, chunk, memory);
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 < chunks(phase)) continue;
      after(phase);
      done_.store(0, std::memory_order_relaxed);
      next_.store(uint64_t(phase + 1) << CHUNK_BITS, std::memory_order_release);
    }
  }

  static int64_t phase_of(uint64_t next) { return int64_t(next >> CHUNK_BITS); }
  static int64_t chunk_of(uint64_t next) { return int64_t(next & ((uint64_t(1) << CHUNK_BITS) - 1)); }

  static void rest(int turns) {
    if (turns >= PATIENCE) return std::this_thread::yield();
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_ia32_pause();
#endif
  }

  std::atomic<uint64_t> next_{0};  // phase, and the first chunk of it that nobody has taken
  std::atomic<int64_t> done_{0};   // chunks of the phase that is open
};

}  // namespace secateur
