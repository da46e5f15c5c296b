// Memory of a worker: an arena for what lives as long as a batch, and blocks of cache cells that sentences take as they
// grow and give back as they end. Neither gives memory back to the system before the worker ends, so that a step allocates
// nothing once the sizes have been seen.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common.h"

namespace nms {

constexpr int64_t huge_page = 2 << 20;

inline uint8_t* aligned_memory(int64_t bytes) {
    const int64_t alignment = bytes >= huge_page ? huge_page : 64;
    const size_t size = static_cast<size_t>(padded(bytes, alignment));
    void* memory = std::aligned_alloc(static_cast<size_t>(alignment), size);
    if (!memory) throw std::bad_alloc();
#if defined(__linux__)
    if (bytes >= huge_page) madvise(memory, size, MADV_HUGEPAGE);  // fewer misses of the page tables' cache
#endif
    return static_cast<uint8_t*>(memory);
}

class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() { std::free(memory_); }

    // Room for `bytes` from now on; what was taken before is gone.
    void reserve(int64_t bytes) {
        if (bytes > bytes_) {
            std::free(memory_);
            memory_ = nullptr;
            bytes_ = 0;
            memory_ = aligned_memory(bytes);
            bytes_ = bytes;
        }
        used_ = 0;
    }
    // `count` of T, undefined.
    template <class T>
    T* take(int64_t count) {
        const int64_t bytes = room<T>(count);
        if (used_ + bytes > bytes_) throw std::bad_alloc();
        T* taken = reinterpret_cast<T*>(memory_ + used_);
        used_ += bytes;
        return taken;
    }
    template <class T>
    static int64_t room(int64_t count) {
        return padded(count * static_cast<int64_t>(sizeof(T)), 64);
    }

  private:
    uint8_t* memory_ = nullptr;
    int64_t bytes_ = 0, used_ = 0;
};

// Blocks of one size.
class BlockPool {
  public:
    BlockPool() = default;
    BlockPool(const BlockPool&) = delete;
    BlockPool& operator=(const BlockPool&) = delete;
    ~BlockPool() { clear(); }

    // Sets the size of the blocks, all of which have been given back.
    void resize(int64_t bytes) {
        if (bytes == bytes_) return;
        clear();
        bytes_ = bytes;
    }
    uint8_t* take() {
        if (free_.empty()) {
            all_.reserve(all_.size() + 1);
            free_.reserve(all_.size() + 1);
            all_.push_back(aligned_memory(bytes_));
            free_.push_back(all_.back());
        }
        uint8_t* block = free_.back();
        free_.pop_back();
        return block;
    }
    void give_back_all() { free_ = all_; }
    void give_back(uint8_t* block) { free_.push_back(block); }

  private:
    void clear() {
        for (uint8_t* block : all_) std::free(block);
        all_.clear();
        free_.clear();
    }
    int64_t bytes_ = 0;
    std::vector<uint8_t*> all_, free_;
};

}  // namespace nms
