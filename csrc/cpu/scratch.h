// Working memory that is taken for one call and kept for the next.
//
// Fresh pages cost more than the arithmetic done in them, so blocks go back to a small per-thread
// pool instead of to the system. A thread keeps at most kKeptBytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace ft::FT_ISA {

class Scratch {
 public:
  explicit Scratch(size_t bytes) : block_(Pool::of_this_thread().take(bytes)) {}
  ~Scratch() { Pool::of_this_thread().give_back(block_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // The next `count` elements, aligned to a cache line. The caller asked for enough bytes: sum of
  // bytes<T>(count) over all it takes.
  template <typename T>
  T* take(size_t count) {
    T* at = reinterpret_cast<T*>(static_cast<char*>(block_.memory) + used_);
    used_ += bytes<T>(count);
    return at;
  }
  // Rounded up to cache lines, with one line to spare: neighbours never share one, and equal
  // power-of-two arrays do not all start in the same cache set.
  template <typename T>
  static constexpr size_t bytes(size_t count) {
    return (count * sizeof(T) + 2 * kAlign - 1) / kAlign * kAlign;
  }

 private:
  static constexpr size_t kAlign = 64;
  static constexpr size_t kKeptBytes = size_t{64} << 20;
  static constexpr int kKeptBlocks = 4;
  struct Block {
    void* memory = nullptr;
    size_t size = 0;
  };

  class Pool {
   public:
    static Pool& of_this_thread() {
      static thread_local Pool pool;
      return pool;
    }
    ~Pool() {
      for (Block& b : blocks_) std::free(b.memory);
    }
    // The smallest kept block that is large enough, or a new one.
    Block take(size_t bytes) {
      Block* best = nullptr;
      for (Block& b : blocks_) {
        if (b.size >= bytes && b.memory && (!best || b.size < best->size)) best = &b;
      }
      if (best) {
        Block found = *best;
        kept_ -= found.size;
        *best = {};
        return found;
      }
      Block made{nullptr, (bytes + 4095) / 4096 * 4096};
      if (made.size == 0) made.size = 4096;
      made.memory = std::aligned_alloc(kAlign, made.size);
      if (!made.memory) throw std::bad_alloc();
      return made;
    }
    void give_back(Block block) {
      Block* slot = nullptr;
      for (Block& b : blocks_) {
        if (!b.memory) slot = &b;
      }
      if (!slot) {  // full: the smallest goes
        slot = &blocks_[0];
        for (Block& b : blocks_) {
          if (b.size < slot->size) slot = &b;
        }
        if (slot->size > block.size) {
          std::free(block.memory);
          return;
        }
      }
      if (kept_ - slot->size + block.size > kKeptBytes) {
        std::free(block.memory);
        return;
      }
      kept_ += block.size - slot->size;
      std::free(slot->memory);
      *slot = block;
    }

   private:
    Block blocks_[kKeptBlocks];
    size_t kept_ = 0;
  };

  Block block_;
  size_t used_ = 0;
};

// The bytes of all that `take_all` takes from what it is given: a first round, before there is
// memory.
class ScratchSize {
 public:
  template <typename TakeAll>
  static size_t of(const TakeAll& take_all) {
    ScratchSize size;
    take_all(size);
    return size.bytes_;
  }
  template <typename T>
  T* take(size_t count) {
    bytes_ += Scratch::bytes<T>(count);
    return nullptr;
  }

 private:
  size_t bytes_ = 0;
};

}  // namespace ft::FT_ISA
