// Drives the native library through its C interface with sizes that leave every kind of remainder, in buffers that end
// where their last byte does, and checks what it computes against plain loops. Exits with 1 at the first failure.
//
//   odd_sizes [--thin] [--guard] UNIT...
//
// --thin takes few sizes, for valgrind. --guard puts every buffer before a page that traps: AddressSanitizer watches no
// masked load or store, and valgrind may not know the instructions of a unit. Units that the machine lacks are left out.
//
// runtime.cpp has to be compiled with -Dscratch=library_scratch: its own scratch memory grows in steps and stays, so
// that an overrun would find memory. Here every other product gets scratch memory of the exact size.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "driver.h"

using Body = void (*)(int64_t, int64_t, void*);

extern "C" {
void nms_set_parallel_for(void* function);
int32_t nms_multiply(int32_t format, int64_t rows, int64_t out, int64_t in, const void* x, int64_t x_stride,
                     const uint8_t* packed, const void* bias, void* y, int32_t number);
int64_t nms_rank(const float* weight, uint8_t* mask, int64_t groups, int32_t n, int32_t m);
int64_t nms_rank_transposable(const float* weight, uint8_t* mask, int64_t rows, int64_t columns);
int32_t nms_decay(const float* weight, const uint8_t* mask, float* gradient, float decay, int64_t count);
int32_t nms_apply(const float* weight, const uint8_t* mask, float* masked, float scale, int64_t count);
int32_t nms_soften(const float* weight, const uint8_t* mask, float* soft, int64_t groups, int32_t m);
}

namespace {

enum Format {
    sparse_fp32,
    sparse_bf16,
    sparse_int8,
    dense_int8,
    dense_fp32,
    dense_bf16,
    int8_8of16,
    int8_4of16,
    fp32_1of4,
    bf16_1of4
};
enum Number { fp32, bf16 };
constexpr Format formats[] = {sparse_fp32, sparse_bf16, sparse_int8, dense_int8,
                              dense_fp32,  dense_bf16,  int8_8of16,  int8_4of16, fp32_1of4,  bf16_1of4};
constexpr const char* format_names[] = {"sparse fp32", "sparse bf16", "sparse int8", "dense int8",
                                        "dense fp32",  "dense bf16",  "int8 8 of 16", "int8 4 of 16",
                                        "fp32 1 of 4", "bf16 1 of 4"};
constexpr bool is_int8(Format format) {
    return format == sparse_int8 || format == dense_int8 || format == int8_8of16 || format == int8_4of16;
}
constexpr bool is_fp32(Format format) {
    return format == sparse_fp32 || format == dense_fp32 || format == fp32_1of4;
}
constexpr float infinity = std::numeric_limits<float>::infinity(), not_a_number = NAN;

bool thin = false;
std::atomic<bool> exact_scratch{false};

// fp32 or bf16, aligned to the size of a number and no more.
struct Numbers {
    Number number;
    int64_t count;
    size_t size;
    std::shared_ptr<uint8_t> memory;

    Numbers(Number kind, int64_t numbers)
        : number(kind),
          count(numbers),
          size(kind == fp32 ? 4 : 2),
          memory(exactly(static_cast<size_t>(numbers) * size, size)) {}
    void* data() const { return memory.get(); }
    float get(int64_t i) const {
        const uint8_t* from = memory.get() + i * static_cast<int64_t>(size);
        uint32_t bits;
        if (number == fp32)
            std::memcpy(&bits, from, 4);
        else
            bits = static_cast<uint32_t>(from[0] | from[1] << 8) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        return value;
    }
    void set(int64_t i, float value) const {
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        uint8_t* to = memory.get() + i * static_cast<int64_t>(size);
        if (number == fp32) {
            std::memcpy(to, &bits, 4);
            return;
        }
        bits = std::isnan(value) ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        to[0] = static_cast<uint8_t>(bits);
        to[1] = static_cast<uint8_t>(bits >> 8);
    }
    bool same(const Numbers& other, int64_t begin, int64_t end) const {
        const int64_t width = static_cast<int64_t>(size);
        return std::memcmp(memory.get() + begin * width, other.memory.get() + begin * width,
                           static_cast<size_t>((end - begin) * width)) == 0;
    }
};

// ---- weights --------------------------------------------------------------------------------------------------------

struct Weight {
    Format format;
    int64_t out, in;
    Array<uint8_t> packed, dense;  // `dense` is what restore has to give
    Array<float> scales;            // empty but for int8
    std::vector<double> value;      // [out, in], with the scale
    std::vector<double> sum, norm;  // of a row: the sum of magnitudes, the Euclidean norm
};

float number_of(Format format, const uint8_t* bytes) {
    if (is_int8(format)) return static_cast<int8_t>(*bytes);
    uint32_t bits = 0;
    if (is_fp32(format))
        std::memcpy(&bits, bytes, 4);
    else
        bits = static_cast<uint32_t>(bytes[0] | bytes[1] << 8) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// With `extreme` every value of int8 is -128.
Weight make_weight(Format format, int64_t out, int64_t in, bool extreme = false) {
    constexpr int places[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
    const bool sparse = format <= sparse_int8, scaled = is_int8(format);
    const int64_t size = scaled ? 1 : is_fp32(format) ? 4 : 2;
    const int64_t groups = in / 4, width = sparse ? 2 * groups : in, code_bytes = (groups * 3 + 7) / 8;
    Array<uint8_t> values(out * width * size), codes(sparse ? out * code_bytes : 0);
    Weight w{format, out, in, Array<uint8_t>(nms_packed_bytes(format, out, in)), Array<uint8_t>(out * in * size),
             Array<float>(scaled ? out : 0), {}, {}, {}};
    for (int64_t i = 0; i < out * width; i++) {
        const float value = draw.below(16) == 0 ? -0.0f : draw.uniform();  // a kept zero keeps its sign
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (scaled) bits = draw.below(8) == 0 ? (draw.coin() ? 0x80 : 0x7f) : draw.bits();  // -128, 127
        if (scaled && extreme) bits = 0x80;
        if (size == 2) bits >>= 16;
        for (int64_t b = 0; b < size; b++) values[i * size + b] = static_cast<uint8_t>(bits >> (8 * b));
    }
    if (format == int8_8of16) keep(values.data(), size, out, in, 8, 16);
    if (format == int8_4of16) keep(values.data(), size, out, in, 4, 16);
    if (format == fp32_1of4 || format == bf16_1of4) keep(values.data(), size, out, in, 1, 4);
    std::memset(w.dense.data(), 0, static_cast<size_t>(w.dense.count));
    if (!sparse) std::memcpy(w.dense.data(), values.data(), static_cast<size_t>(w.dense.count));
    if (sparse) std::memset(codes.data(), 0, static_cast<size_t>(codes.count));
    for (int64_t g = 0; sparse && g < out * groups; g++) {
        const int64_t row = g / groups, bit = 3 * (g % groups);
        const unsigned code = static_cast<unsigned>(draw.below(6));
        for (int b = 0; b < 3; b++)
            codes[row * code_bytes + (bit + b) / 8] |= static_cast<uint8_t>((code >> b & 1) << ((bit + b) % 8));
        for (int slot = 0; slot < 2; slot++)
            std::memcpy(w.dense.data() + (4 * g + places[code][slot]) * size, values.data() + (2 * g + slot) * size,
                        static_cast<size_t>(size));
    }
    for (int64_t row = 0; row < w.scales.count; row++) w.scales[row] = 0.01f + 0.01f * std::fabs(draw.uniform());
    for (int64_t row = 0; row < out; row++) {
        double sum = 0, squares = 0;
        for (int64_t i = 0; i < in; i++) {
            const double value =
                number_of(format, w.dense.data() + (row * in + i) * size) * (scaled ? double{w.scales[row]} : 1.0);
            w.value.push_back(value);
            sum += std::fabs(value);
            squares += value * value;
        }
        w.sum.push_back(sum);
        w.norm.push_back(std::sqrt(squares));
    }
    nms_repack(format, out, in, values.data(), sparse ? codes.data() : nullptr, scaled ? w.scales.data() : nullptr,
               w.packed.data());
    Array<uint8_t> dense(w.dense.count);
    Array<float> scales(w.scales.count);
    const auto restore = [&] {
        return nms_restore(format, out, in, w.packed.data(), dense.data(), scaled ? scales.data() : nullptr);
    };
    require(restore() == 1, "a weight is refused");
    require(dense.same(w.dense), "restore gives another weight than repack took");
    require(scales.same(w.scales), "restore gives other scales than repack took");
    uint8_t& changed = w.packed[draw.below(64)];  // of the header
    const uint8_t bit = static_cast<uint8_t>(1u << draw.below(8));
    changed ^= bit;
    require(restore() == 0, "a weight with a damaged header is taken");
    changed ^= bit;
    return w;
}

// ---- products -------------------------------------------------------------------------------------------------------

struct Input {
    int64_t rows, in, stride;
    bool two_values;  // a row holds 0 and one other number, which every number of levels can express
    Numbers x;

    Input(Number number, int64_t height, int64_t width, int64_t gap, bool two)
        : rows(height),
          in(width),
          stride(width + gap),
          two_values(two),
          x(number, height ? (height - 1) * (width + gap) + width : 0) {
        for (int64_t i = 0; i < x.count; i++) x.set(i, not_a_number);  // in the gaps
        for (int64_t row = 0; row < rows; row++) {
            const float most = std::exp2(3.0f * draw.uniform()) * (draw.coin() ? 1.0f : -1.0f);
            for (int64_t i = 0; i < in; i++)
                x.set(row * stride + i, most * (two_values ? static_cast<float>(draw.below(2)) : draw.uniform()));
        }
    }
    float at(int64_t row, int64_t i) const { return x.get(row * stride + i); }
};

Numbers make_bias(Number number, int64_t out) {
    Numbers bias(number, out);
    for (int64_t i = 0; i < out; i++) bias.set(i, draw.uniform());
    return bias;
}

Numbers multiply(const Weight& w, const Input& x, const Numbers* bias) {
    Numbers y(x.x.number, x.rows * w.out);
    const int32_t done = nms_multiply(w.format, x.rows, w.out, w.in, x.x.data(), x.stride, w.packed.data(),
                                      bias ? bias->data() : nullptr, y.data(), x.x.number);
    require(done == 1, "a weight is refused");
    return y;
}

// How far an output may lie from the sum in double precision.
//
// Float weights: a sum of n fp32 products is off by n roundings of its magnitudes at most.
// int8 weights: the sum of integers is exact, and so are activations of two values; what remains is the rounding of a
// few fp32 operations on numbers as large as range * sum(|w|). Other activations are off by half a step at most, the
// coarsest unit having 127 steps: errors that add up like uniform noise, of which 8 standard deviations are allowed, and
// never more than all half steps together.
// bf16: the output is rounded to 8 bits.
double tolerance(const Weight& w, const Input& x, int64_t column, double most, double range, double expected) {
    const double unit = 0x1p-24;
    double off;
    if (w.format == sparse_fp32 || w.format == sparse_bf16 || w.format == fp32_1of4 || w.format == bf16_1of4) {
        off = static_cast<double>(w.in / 2 + 3) * unit * (most * w.sum[column] + std::fabs(expected));
    } else {
        off = 16 * unit * (range * w.sum[column] + std::fabs(expected));
        const double step = range / 127;
        if (!x.two_values)
            off += std::min(8 * step / std::sqrt(12.0) * w.norm[column], 0.501 * step * w.sum[column]);
    }
    return off + (x.x.number == bf16 ? std::fabs(expected) * 0x1p-8 : 0.0);
}

void check(const Weight& w, const Input& x, const Numbers* bias, const Numbers& y) {
    std::vector<double> row(static_cast<size_t>(w.in));
    for (int64_t r = 0; r < x.rows; r++) {
        double low = 0, high = 0;
        for (int64_t i = 0; i < w.in; i++) {
            row[i] = x.at(r, i);
            low = std::min(low, row[i]);
            high = std::max(high, row[i]);
        }
        for (int64_t column = 0; column < w.out; column++) {
            const double* value = &w.value[column * w.in];
            double expected = bias ? bias->get(column) : 0.0;
            for (int64_t i = 0; i < w.in; i++) expected += value[i] * row[i];
            const double got = y.get(r * w.out + column);
            const double off = tolerance(w, x, column, std::max(high, -low), high - low, expected);
            if (std::fabs(got - expected) <= off) continue;
            char what[160];
            std::snprintf(what, sizeof what, "y[%lld, %lld] is %.9g, not %.9g within %.3g", static_cast<long long>(r),
                          static_cast<long long>(column), got, expected, off);
            require(false, what);
        }
    }
}

void describe_product(const Weight& w, const Input& x, bool bias) {
    describe("%s, out %lld, in %lld, rows %lld, stride %lld, x in %s of %s values, %s", format_names[w.format],
             static_cast<long long>(w.out), static_cast<long long>(w.in), static_cast<long long>(x.rows),
             static_cast<long long>(x.stride), x.x.number == fp32 ? "fp32" : "bf16", x.two_values ? "two" : "all",
             bias ? "bias" : "no bias");
}

void describe_weight(Format format, int64_t out, int64_t in) {
    describe("repack and restore of %s, out %lld, in %lld", format_names[format], static_cast<long long>(out),
             static_cast<long long>(in));
}

// The bits of all products so far; units that only differ in speed have the same.
uint64_t bits_of_products = 0;

void count_bits(const Numbers& y) {
    const uint8_t* bytes = y.memory.get();
    for (int64_t i = 0; i < y.count * static_cast<int64_t>(y.size); i++)
        bits_of_products = (bits_of_products ^ bytes[i]) * 0x100000001b3;  // FNV-1a
}

// Every shape with some of the row counts; the rest of a case is drawn. Returns the number of products.
int64_t check_products() {
    using Sizes = std::vector<int64_t>;
    const Sizes outs = thin ? Sizes{1, 17, 65} : Sizes{1, 7, 16, 17, 33, 64, 65, 100};
    const Sizes sparse_ins = thin ? Sizes{4, 60, 132} : Sizes{4, 8, 36, 60, 64, 68, 100, 132, 256, 260};
    const Sizes dense_ins = thin ? Sizes{5, 64, 132} : Sizes{1, 4, 5, 8, 13, 36, 60, 63, 64, 68, 100, 132, 256, 260};
    const Sizes heights =
        thin ? Sizes{1, 3, 8, 9, 17, 33, 57, 65}
             : Sizes{0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 55, 56, 63, 64, 65, 120, 130, 517};
    int64_t products = 0, turn = 0;
    for (Format format : formats)
        for (int64_t out : outs)
            for (int64_t in : format > sparse_int8 ? dense_ins : sparse_ins) {
                describe_weight(format, out, in);
                const Weight w = make_weight(format, out, in);
                const size_t steps = thin ? 2 : 6;
                for (size_t step = 0; step < steps; step++, products++) {
                    const int64_t rows = heights[static_cast<size_t>(turn++ * 5) % heights.size()];
                    const Number number = draw.coin() ? fp32 : bf16;
                    const Input x(number, rows, in, draw.coin() ? 1 + draw.below(9) : 0, draw.coin());
                    const Numbers bias = make_bias(number, out);
                    const Numbers* used = draw.coin() ? &bias : nullptr;
                    describe_product(w, x, used);
                    exact_scratch = !exact_scratch;
                    const Numbers y = multiply(w, x, used);
                    check(w, x, used, y);
                    count_bits(y);
                }
                turn++;  // so that no shape meets the same row counts every time
            }
    return products;
}

// Rows that are not finite, tiny or zero are their own affair.
void check_strange_rows() {
    for (Format format : formats)
        for (Number number : {fp32, bf16})
            for (int64_t rows : {5, 40}) {
                describe_weight(format, 17, 68);
                const Weight w = make_weight(format, 17, 68);
                const Numbers bias = make_bias(number, w.out);
                const Input x(number, rows, w.in, 3, false);
                describe_product(w, x, true);
                const Numbers before = multiply(w, x, &bias);
                const float spoils[] = {infinity, 0.0f, -infinity, 1e-41f, not_a_number};
                for (int64_t row = 0; row < 5; row++)
                    for (int64_t i = 0; i < w.in; i++)
                        if (row % 2 || i == 7 * row + 4) x.x.set(row * x.stride + i, spoils[row]);
                const Numbers after = multiply(w, x, &bias);
                require(after.same(before, 5 * w.out, rows * w.out), "a strange row changes another");
                for (int64_t row = 0; row < 5; row++)
                    for (int64_t column = 0; column < w.out; column++) {
                        const float got = after.get(row * w.out + column);
                        if (row % 2) {
                            require(got == bias.get(column), "the product with zeros or tiny numbers is not the bias");
                        } else if (is_int8(format)) {
                            require(std::isnan(got), "a row that is not finite gives a number");
                        }
                    }
            }
}

// The widest int8 layers that the package takes, with sums as large as they get.
void check_widest() {
    for (Format format : {sparse_int8, dense_int8, int8_8of16, int8_4of16}) {
        const int64_t in = 1 << 16;
        describe_weight(format, 3, in);
        const Weight w = make_weight(format, 3, in, true);
        const Input x(fp32, 2, in, 0, true);
        for (int64_t i = 0; i < x.x.count; i++) x.x.set(i, i < in ? 1.0f : -1.0f);
        describe_product(w, x, false);
        check(w, x, nullptr, multiply(w, x, nullptr));
    }
}

// ---- threads --------------------------------------------------------------------------------------------------------

std::atomic<int> splits{0};

int32_t three_threads(int64_t begin, int64_t end, int64_t, Body body, void* context) {
    const int64_t third = (end - begin + 2) / 3;
    std::vector<std::thread> others;
    for (int64_t from = begin + third; from < end; from += third)
        others.emplace_back(body, from, std::min(end, from + third), context);
    body(begin, std::min(end, begin + third), context);
    for (std::thread& other : others) other.join();
    splits++;
    return 0;
}

template <class Work>
void in_parallel(const Work& work, const char* what) {
    splits = 0;
    nms_set_parallel_for(reinterpret_cast<void*>(three_threads));
    work();
    nms_set_parallel_for(nullptr);
    require(splits > 0, what);
}

// Large enough to be split; the same bits with and without threads.
void check_threads() {
    for (Format format : formats) {
        const int64_t out = 300, in = format > sparse_int8 ? 515 : 516;
        describe_weight(format, out, in);
        const Random before = draw;
        const Weight w = make_weight(format, out, in);
        draw = before;
        in_parallel(
            [&] {
                const Weight again = make_weight(format, out, in);
                require(again.packed.same(w.packed), "threads repack to other bytes");
            },
            "repack and restore were not split");
        for (int64_t rows : thin ? std::vector<int64_t>{20} : std::vector<int64_t>{20, 100, 130})
            for (Number number : {fp32, bf16}) {
                const Input x(number, rows, in, 1, false);
                const Numbers bias = make_bias(number, out);
                describe_product(w, x, true);
                exact_scratch = !exact_scratch;
                const Numbers y = multiply(w, x, &bias);
                if (!thin) check(w, x, &bias, y);
                in_parallel([&] { require(multiply(w, x, &bias).same(y, 0, y.count), "threads compute other bits"); },
                            "the product was not split");
            }
    }
}

// Callers on threads of their own, whose scratch memory grows from call to call and ends with the thread.
void check_callers() {
    for (Format format : formats) {
        describe_weight(format, 33, 100);
        const Weight w = make_weight(format, 33, 100);
        std::vector<Input> inputs;
        std::vector<Numbers> outputs;
        for (int64_t rows : {3, 40, 1, 90}) {
            inputs.emplace_back(rows % 2 ? fp32 : bf16, rows, w.in, 2, false);
            outputs.push_back(multiply(w, inputs.back(), nullptr));
        }
        describe("%s from three threads at once", format_names[format]);
        for (bool exact : {false, true}) {
            exact_scratch = exact;
            std::atomic<int> wrong{0};
            std::vector<std::thread> callers;
            for (size_t first = 0; first < 3; first++)
                callers.emplace_back([&, first] {
                    for (size_t i = first; i < first + inputs.size(); i++) {
                        const Numbers& y = outputs[i % inputs.size()];
                        if (!multiply(w, inputs[i % inputs.size()], nullptr).same(y, 0, y.count)) wrong++;
                    }
                });
            for (std::thread& caller : callers) caller.join();
            require(wrong == 0, "callers disturb each other");
        }
    }
}

// ---- masks ----------------------------------------------------------------------------------------------------------

// A mask of `count` weights at random; zeros fill the last byte.
Array<uint8_t> random_mask(int64_t count) {
    Array<uint8_t> mask((count + 7) / 8);
    for (int64_t i = 0; i < mask.count; i++) mask[i] = 0;
    for (int64_t i = 0; i < count; i++) mask[i / 8] = static_cast<uint8_t>(mask[i / 8] | draw.coin() << (i % 8));
    return mask;
}

bool kept(const Array<uint8_t>& mask, int64_t i) { return mask[i / 8] >> (i % 8) & 1; }

// Sets whether a weight is kept; returns how many bits changed.
int64_t keep(const Array<uint8_t>& mask, int64_t i, bool is_kept) {
    if (kept(mask, i) == is_kept) return 0;
    mask[i / 8] = static_cast<uint8_t>(mask[i / 8] ^ 1 << (i % 8));
    return 1;
}

// The mask of `weight` by sorting, over `mask`; returns how many bits changed.
int64_t rank_by_sorting(const Array<float>& weight, const Array<uint8_t>& mask, int64_t groups, int n, int m) {
    int64_t flips = 0;
    for (int64_t g = 0; g < groups; g++) {
        std::vector<int> order;
        for (int i = 0; i < m; i++) order.push_back(i);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
            return std::fabs(weight[g * m + a]) > std::fabs(weight[g * m + b]);
        });
        for (int i = 0; i < m; i++) flips += keep(mask, g * m + order[static_cast<size_t>(i)], i < n);
    }
    return flips;
}

// Whether `rank(weight, mask)` of the library does what `slowly(weight, mask)` does, and notices NaN. Weights are `few`
// numbers again and again, so that there are ties, or any.
template <class Slowly, class Rank>
void check_ranking(int64_t count, const float (&few)[8], bool split, const Slowly& slowly, const Rank& rank_over) {
    const bool ties = draw.coin();
    Array<float> weight(count);
    const Array<uint8_t> mask = random_mask(count), expected(mask.count);
    for (int64_t i = 0; i < mask.count; i++) expected[i] = mask[i];
    for (int64_t i = 0; i < count; i++) weight[i] = ties ? few[draw.below(8)] : draw.uniform();
    const int64_t flips = slowly(weight, expected);
    const auto rank = [&] { return rank_over(weight.data(), mask.data()); };
    if (split)
        in_parallel([&] { require(rank() == flips, "threads count other flips"); }, "rank was not split");
    else
        require(rank() == flips, "the count of flips is wrong");
    require(mask.same(expected), "the mask is wrong");
    require(rank() == 0, "a mask that stays has flips");
    if (count == 0) return;
    weight[draw.below(count)] = draw.coin() ? not_a_number : -not_a_number;
    require(rank() == -2, "NaN is not noticed");
    if (split) in_parallel([&] { require(rank() == -2, "NaN is not noticed"); }, "rank was not split");
}

void check_rank_of(int64_t groups, int n, int m, bool split) {
    describe("rank %d:%d, %lld groups", n, m, static_cast<long long>(groups));
    check_ranking(
        groups * m, {0.0f, -0.0f, 1.0f, -1.0f, 2.0f, -2.0f, 1e-41f, infinity}, split,
        [&](const auto& weight, const auto& mask) { return rank_by_sorting(weight, mask, groups, n, m); },
        [&](const float* weight, uint8_t* mask) { return nms_rank(weight, mask, groups, n, m); });
}

// The transposable mask of `weight` by trying all patterns in order, over `mask`; returns how many bits changed.
int64_t rank_by_trying(const Array<float>& weight, const Array<uint8_t>& mask, int64_t rows, int64_t columns) {
    constexpr int pairs[] = {3, 5, 9, 6, 10, 12};
    int64_t flips = 0;
    for (int64_t y = 0; y < rows; y += 4)
        for (int64_t x = 0; x < columns; x += 4) {
            const auto total = [&](int row, int pair) {
                double sum = 0.0;
                for (int c = 0; c < 4; c++)
                    if (pair >> c & 1)
                        sum += std::min(std::fabs(weight[(y + row) * columns + x + c]),
                                        std::numeric_limits<float>::max());
                return sum;
            };
            int best[4] = {};
            double most = -1.0;
            for (int a : pairs)
                for (int b : pairs) {
                    double below = -1.0;
                    int lower[2] = {};
                    for (int c : pairs)
                        for (int d : pairs) {
                            bool fits = true;
                            for (int i = 0; i < 4; i++) fits &= (a >> i & 1) + (b >> i & 1) + (c >> i & 1) + (d >> i & 1) == 2;
                            if (!fits || total(2, c) + total(3, d) <= below) continue;
                            below = total(2, c) + total(3, d);
                            lower[0] = c;
                            lower[1] = d;
                        }
                    const double sum = total(0, a) + total(1, b) + below;
                    if (sum <= most) continue;
                    most = sum;
                    best[0] = a;
                    best[1] = b;
                    best[2] = lower[0];
                    best[3] = lower[1];
                }
            for (int row = 0; row < 4; row++)
                for (int c = 0; c < 4; c++) flips += keep(mask, (y + row) * columns + x + c, best[row] >> c & 1);
        }
    return flips;
}

void check_transposable_rank_of(int64_t rows, int64_t columns, bool split) {
    describe("transposable rank of %lld x %lld", static_cast<long long>(rows), static_cast<long long>(columns));
    check_ranking(
        rows * columns, {0.0f, -0.0f, 1.0f, -1.0f, 2.0f, 1e-41f, 1e30f, -infinity}, split,
        [&](const auto& weight, const auto& mask) { return rank_by_trying(weight, mask, rows, columns); },
        [&](const float* weight, uint8_t* mask) { return nms_rank_transposable(weight, mask, rows, columns); });
}

void check_decay_of(int64_t count, bool split) {
    describe("decay of %lld weights", static_cast<long long>(count));
    Array<float> weight(count), gradient(count), expected(count);
    const Array<uint8_t> mask = random_mask(count);
    const float decay = 2e-4f;
    for (int64_t i = 0; i < count; i++) {
        weight[i] = draw.uniform();
        gradient[i] = expected[i] = draw.uniform();
        if (!kept(mask, i)) expected[i] += decay * weight[i];
    }
    const auto work = [&] { nms_decay(weight.data(), mask.data(), gradient.data(), decay, count); };
    if (split)
        in_parallel(work, "decay was not split");
    else
        work();
    require(gradient.same(expected), "the gradient is wrong");
}

void check_apply_of(int64_t count, bool split) {
    const float scale = draw.coin() ? 0.0f : 0.3f;
    describe("masking %lld weights, the pruned times %g", static_cast<long long>(count), static_cast<double>(scale));
    Array<float> weight(count), masked(count), expected(count);
    const Array<uint8_t> mask = random_mask(count);
    for (int64_t i = 0; i < count; i++) {
        weight[i] = draw.below(8) == 0 ? -infinity : draw.uniform();
        expected[i] = kept(mask, i) ? weight[i] : scale == 0 ? 0.0f : scale * weight[i];
    }
    const auto work = [&] { nms_apply(weight.data(), mask.data(), masked.data(), scale, count); };
    if (split)
        in_parallel(work, "masking was not split");
    else
        work();
    require(masked.same(expected), "the masked weight is wrong");
}

void check_soften_of(int64_t groups, int m, bool split) {
    describe("thresholds of %lld groups of %d", static_cast<long long>(groups), m);
    Array<float> weight(groups * m), soft(weight.count), expected(weight.count);
    const Array<uint8_t> mask = random_mask(weight.count);
    for (int64_t i = 0; i < weight.count; i++) weight[i] = draw.below(8) == 0 ? -0.0f : draw.uniform();
    for (int64_t i = 0; i < weight.count; i++) {
        float threshold = 0.0f;
        for (int64_t rival = i / m * m; rival < i / m * m + m; rival++)
            if (!kept(mask, rival)) threshold = std::max(threshold, std::fabs(weight[rival]));
        expected[i] = kept(mask, i) ? weight[i] - std::copysign(threshold, weight[i]) : 0.0f;
    }
    const auto work = [&] { nms_soften(weight.data(), mask.data(), soft.data(), groups, m); };
    if (split)
        in_parallel(work, "softening was not split");
    else
        work();
    require(soft.same(expected), "the softened weight is wrong");
}

void check_masks() {
    constexpr int patterns[][2] = {{2, 4}, {4, 8}, {1, 4}, {1, 16}, {3, 5}, {16, 32}};
    for (const auto& [n, m] : patterns) {
        for (int64_t groups : {0, 1, 2, 5, 63, 64, 65, 100, 127, 128, 130}) {
            check_rank_of(groups, n, m, false);
            check_soften_of(groups, m, false);
        }
        check_rank_of(40000 / m, n, m, true);
        check_soften_of(40000 / m, m, true);
    }
    for (int64_t rows : {0, 4, 8, 20})
        for (int64_t columns : {0, 4, 8, 12, 60, 64, 68, 72, 132}) check_transposable_rank_of(rows, columns, false);
    check_transposable_rank_of(thin ? 64 : 256, 260, true);
    for (int64_t count : {0, 1, 3, 7, 15, 17, 33, 100, 4095, 4096, 4097, 9000, 40001}) {
        check_decay_of(count, count > 40000);
        check_apply_of(count, count > 40000);
    }
}

}  // namespace

namespace nms {

uint8_t* library_scratch(int64_t bytes);

uint8_t* scratch(int64_t bytes) {
    static thread_local std::shared_ptr<uint8_t> own;
    if (!exact_scratch) return library_scratch(bytes);
    own = nullptr;  // first, so that no call gets the memory of another
    if (guard) {
        own = guarded(static_cast<size_t>(bytes));
    } else {
        void* memory = nullptr;
        if (posix_memalign(&memory, 64, static_cast<size_t>(bytes))) std::abort();
        own = {static_cast<uint8_t*>(memory), [](uint8_t* old) { std::free(old); }};
    }
    return own.get();
}

}  // namespace nms

int main(int count, char** arguments) {
    std::vector<std::string> units;
    for (int i = 1; i < count; i++) {
        const std::string argument = arguments[i];
        if (argument == "--thin")
            thin = true;
        else if (argument == "--guard")
            guard = true;
        else
            units.push_back(argument);
    }
    std::signal(SIGABRT, on_signal);
    if (guard) std::signal(SIGSEGV, on_signal);
    require(!units.empty(), "name the units to test");
    require(nms_select_unit("none") == 0, "a unit that does not exist is chosen");
    for (const std::string& unit : units) {
        if (!nms_select_unit(unit.c_str())) {
            std::printf("%s: not on this machine\n", unit.c_str());
            continue;
        }
        require(unit == nms_unit(), "another unit is chosen");
        draw = Random();
        bits_of_products = 0xcbf29ce484222325;
        const int64_t products = check_products();
        check_strange_rows();
        if (!thin) check_widest();
        check_threads();
        check_callers();
        check_masks();
        std::printf("%s: %lld products are right, bits %016llx\n", unit.c_str(), static_cast<long long>(products),
                    static_cast<unsigned long long>(bits_of_products));
    }
    return 0;
}
