// What one vector unit offers: the functions that its instructions make fast, behind one table.
#pragma once
#include "common.h"

namespace nms {

// One product y = x @ W.T + bias.
struct Product {
    int64_t rows, out, in;
    const void* x;  // [rows, in] of `number`, a row every x_stride numbers
    int64_t x_stride;
    const uint8_t* packed;
    const void* bias;  // [out] of `number`, or null
    void* y;           // [rows, out] of `number`, contiguous
    Number number;
};

// ---- the engine's rows ----------------------------------------------------------------------------------------------

enum Activation : int32_t { relu = 0, gelu = 1, gelu_tanh = 2, silu = 3, activations = 4 };

// Rows of numbers that products take: fp32, zeros behind a row's numbers up to the next multiple of 32; and, for int8
// weights, bytes, signed or not as the unit multiplies them, of which a row is about scale * (byte - zero), up to the next
// multiple of 64.
struct Rows {
    float* x;
    int64_t stride;
    uint8_t* bytes;
    int64_t byte_stride;
    float* scale;
    int32_t* zero;
};

// The best of a row of the head so far. Its sums do not depend on how many rows are computed together.
struct alignas(64) Best {
    static constexpr int most = 64;
    float sum[16];       // of exp(logit - reference), a lane each
    float reference;
    float least;         // what is not above it is no candidate, once all places are taken
    int32_t count, keep;
    const uint32_t* banned;  // a bit a token, or null
    float logit[most];
    int32_t token[most];
};

enum Finish : int32_t {
    store_sums,     // y = sums
    add_residual,   // y += sums
    store_active,   // y = activation(sums)
    gate,           // y = y * activation(sums)
    keep_best,      // no y: `best` of each row, with the sum of exponentials
    keep_best_only, // and without it
};

// One product of the engine, with what is done to its sums while they are at hand. Rows of y are as wide as whole blocks
// of the weight, so that nothing is masked; padding is zero again wherever it was.
struct Projection {
    Format format;
    int64_t out, in;
    const uint8_t* packed;   // behind the header
    const float* bias;       // padded to whole blocks, or null
    bool bias_apart;         // in bf16 the sums are rounded before it is added, and once more after
    Finish finish;
    Activation activation;
    bool bf16;               // results are rounded as those of a bf16 model
    const int32_t* columns;  // of `keep_best`: the token of each row of the weight, or null where it is the row itself
    float* y;
    int64_t y_stride;
    Best* best;
};

struct Norm {
    int64_t width;
    const float* gain;
    const float* bias;  // null: RMS norm
    float epsilon;
    bool bf16;
};

// Attention of rows to keys that lie in cells: of each position one address, under which a head's key and value lie.
struct CellAttention {
    const float* query;        // [heads * head_dim]
    const uint8_t* const* cells; // [count]: keys [heads * head_dim], then `value_at` numbers on the values
    bool half;                 // keys and values are fp16, not fp32
    int64_t value_at, count, heads, head_dim;
    float scale;
    const float* bias;         // [heads][bias_stride], for position 0 on, or null
    int64_t bias_stride;
    bool bf16;
    float* out;                // [heads * head_dim]
    float* scores;             // room for `count`, padded to 16
};

// Attention of one head of several rows to keys that are turned over: [head_dim][width].
struct TurnedAttention {
    const float* query;        // a row every query_stride
    int64_t query_stride, queries;
    const void* keys;
    int64_t width;             // a multiple of 16
    const void* values;        // [count], a row every value_stride
    bool half;                 // keys and values are fp16, not fp32
    int64_t value_stride, count, head_dim;
    float scale;
    const float* bias;         // of query 0 and position 0; query i begins i floats earlier; or null
    bool bf16;
    float* out;
    int64_t out_stride;
    float* weights;            // a row every weights_stride to which weights are added, or null
    int64_t weights_stride;
    float* scores;             // room for 4 * width
};

struct Unit {
    const char* name;
    int32_t lanes;
    int64_t (*packed_bytes)(Format format, int64_t out, int64_t in);
    void (*repack)(Format format, int64_t out, int64_t in, const void* values, const uint8_t* codes,
                   const float* scales, uint8_t* packed);
    void (*restore)(Format format, int64_t out, int64_t in, const uint8_t* packed, void* dense, float* scales);
    // Rows of a packed weight [out, in] as a packed weight [count, in].
    void (*gather)(Format format, int64_t out, int64_t in, const uint8_t* packed, const int32_t* rows, int64_t count,
                   uint8_t* gathered);
    void (*multiply)(Format format, const Product& product);
    // `multiply` of bf16 by sparse bf16 of a kind; null where it does that too.
    void (*multiply_pairs)(Format format, const Product& product);

    void (*quantise)(const Rows& rows, int64_t begin, int64_t end, int64_t width);
    void (*project)(const Projection& projection, const Rows& rows, int64_t count, int64_t first_block, int64_t last_block);
    // As `project` that keeps the best, of the logits of one row: those at `places`, [projection.out].
    void (*choose)(const Projection& projection, const float* logits, const int32_t* places, Best* best);
    void (*normalise)(const Norm& norm, const float* x, float* y);
    void (*embed)(const void* row, Number number, float scale, const float* position, int64_t width, bool bf16, float* x);
    void (*attend_cells)(const CellAttention& attention);
    void (*attend_turned)(const TurnedAttention& attention);
    void (*turn)(const float* keys, int64_t stride, int64_t count, int64_t head_dim, float* turned, int64_t width);
    void (*narrow)(const float* x, int64_t count, uint16_t* to);  // to fp16, what is beyond its range to its largest
    float (*log_sum)(const float* logits, int64_t count);

    void (*rank)(const float* weight, uint8_t* mask, int64_t groups, int n, int m, int64_t* flips, int32_t* nan);
    void (*rank_transposable)(const float* weight, uint8_t* mask, int64_t rows, int64_t columns, int64_t* flips,
                              int32_t* nan);
    void (*decay)(const float* weight, const uint8_t* mask, float* gradient, float decay, int64_t count);
    void (*apply)(const float* weight, const uint8_t* mask, float* masked, float scale, int64_t count);
    void (*soften)(const float* weight, const uint8_t* mask, float* soft, int64_t groups, int m);
};

extern const Unit scalar_unit;
#if defined(__x86_64__)
extern const Unit avx2_unit;
extern const Unit avx512_unit;
extern const Unit avx512_bf16_unit;
void multiply_pairs_avx512(Format format, const Product& product);
#elif defined(__aarch64__)
extern const Unit neon_unit;
extern const Unit neon_dotprod_unit;
#endif

}  // namespace nms
