// What the drivers share: the case at hand, memory that ends exactly, random numbers.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

extern "C" {
const char* nms_unit();
int32_t nms_select_unit(const char* name);
int64_t nms_packed_bytes(int32_t format, int64_t out, int64_t in);
int32_t nms_repack(int32_t format, int64_t out, int64_t in, const void* values, const uint8_t* codes, const float* scales,
                   uint8_t* packed);
int32_t nms_restore(int32_t format, int64_t out, int64_t in, const uint8_t* packed, void* dense, float* scales);
}

namespace {

bool guard = false;  // every buffer ends before a page that traps
char now[200] = "the start";  // what is being done

void describe(const char* format, ...) {
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(now, sizeof now, format, arguments);
    va_end(arguments);
}

void require(bool holds, const char* what) {
    if (holds) return;
    std::printf("%s: %s: %s\n", nms_unit(), now, what);
    std::fflush(stdout);
    std::_Exit(1);
}

// Names the case that a sanitizer or the guard stopped.
void on_signal(int number) {
    const char head[] = "\nstopped in the case: ";
    if (write(2, head, sizeof head - 1) < 0 || write(2, now, std::strlen(now)) < 0 || write(2, "\n", 1) < 0) {
    }
    std::signal(number, SIG_DFL);
    std::raise(number);
}

// ---- memory that ends exactly ---------------------------------------------------------------------------------------

std::shared_ptr<uint8_t> guarded(size_t bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), room = (bytes + page - 1) / page * page;
    void* region = mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
    if (region == MAP_FAILED || mprotect(static_cast<uint8_t*>(region) + room, page, PROT_NONE)) std::abort();
    return {static_cast<uint8_t*>(region) + room - bytes, [=](uint8_t*) { munmap(region, room + page); }};
}

// `shift` bytes off the alignment that malloc gives.
std::shared_ptr<uint8_t> exactly(size_t bytes, size_t shift) {
    if (guard) return guarded(bytes);
    uint8_t* memory = static_cast<uint8_t*>(std::malloc(bytes + shift));
    if (!memory) std::abort();
    return {memory + shift, [=](uint8_t*) { std::free(memory); }};
}

template <class T>
struct Array {
    int64_t count;
    std::shared_ptr<uint8_t> memory;

    explicit Array(int64_t size) : count(size), memory(exactly(static_cast<size_t>(size) * sizeof(T), 0)) {}
    T* data() const { return reinterpret_cast<T*>(memory.get()); }
    T& operator[](int64_t i) const { return data()[i]; }
    bool same(const Array& other) const {
        return std::memcmp(data(), other.data(), static_cast<size_t>(count) * sizeof(T)) == 0;
    }
};

struct Random {
    uint64_t state = 0x9e3779b97f4a7c15;

    uint32_t bits() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        return static_cast<uint32_t>(state >> 32);
    }
    int64_t below(int64_t limit) { return bits() % limit; }
    bool coin() { return bits() & 1; }
    float uniform() { return static_cast<float>(static_cast<int32_t>(bits())) * 0x1p-31f; }  // -1 to 1
};

Random draw;

// Makes zeros of all numbers of rows, `size` bytes each, but of `kept` of each run of so many, drawn.
inline void keep(uint8_t* values, int64_t size, int64_t rows, int64_t in, int kept, int run) {
    for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0, missing = kept; i < in; i++) {
            if (i % run == 0) missing = kept;
            if (draw.below(run - i % run) < missing)
                missing--;
            else
                std::memset(values + (row * in + i) * size, 0, static_cast<size_t>(size));
        }
}

// The arguments `[--guard] NUMBER UNIT` of a driver that goes through so many cases on one unit; returns the number, or -1
// where this machine has not the unit, which is said.
inline int64_t cases_to_run(int count, char** arguments) {
    guard = count == 4 && std::strcmp(arguments[1], "--guard") == 0;
    const int first = guard ? 2 : 1;
    std::signal(SIGABRT, on_signal);
    if (guard) std::signal(SIGSEGV, on_signal);
    require(count == first + 2, "name the number of cases and the unit");
    if (nms_select_unit(arguments[first + 1])) return std::atoll(arguments[first]);
    std::printf("%s: not on this machine\n", arguments[first + 1]);
    return -1;
}

}  // namespace
