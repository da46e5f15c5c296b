// The sentences that a worker translates together: what the encoder made of them, and a decoder step for rows that belong
// to them. It knows no search: rows are tokens at positions, and each says which cells hold what came before it.
#pragma once
#include <initializer_list>
#include <vector>

#include "memory.h"
#include "model.h"
#include "shortlist.h"

namespace nms {

// Keys and values of a decoder layer lie in cells, one for each position and beam. A cell is written once and never moved;
// a row says by one byte a position which beam's cell it continues.
constexpr int64_t block_positions = 16;  // of which a block of cells holds all layers

struct DecoderRow {
    int64_t sentence;         // of the batch
    int32_t token;
    int64_t position;         // of the token, from 0
    int64_t beam;             // whose cell takes the token's keys and values
    const uint8_t* ancestors; // [position]: the beam whose cell holds each position before
};

class Batch {
  public:
    Batch(const Model& model, int64_t beams);

    // Runs the encoder over sentences that lie end to end; lengths are positive. No target will have more than
    // `most_positions`. If `watch_attention`, steps keep each row's weights over its source. With a shortlist the head is
    // computed for the candidates of each sentence alone.
    void encode(int64_t sentences, const int32_t* lengths, const int32_t* tokens, int64_t most_positions,
                bool watch_attention, const Shortlist* shortlist);

    // One step of the decoder; afterwards `head` may be called for its rows.
    void step(const std::vector<DecoderRow>& rows);

    // The best logits of each row of the last step, and their sum of exponentials if `with_sum`.
    void head_best(Best* best, bool with_sum);
    // All logits of each row of the last step, [rows][logits_stride()]; minus infinity where there is no candidate.
    float* head_logits();
    int64_t logits_stride() const { return padded(model_.config.target_vocabulary, 32); }

    // Gives the memory of a sentence's cells back.
    void release(int64_t sentence);
    // Weights over the source of a row of the last step: mean over the heads of the last layer.
    const float* attention(int64_t row) const { return attention_.data() + row * attention_width_; }

    int64_t beams() const { return beams_; }

  private:
    void reserve(int64_t sentences, int64_t tokens);
    void choose_candidates(const int32_t* tokens);
    void embed(const Side& side, int32_t token, int64_t position, float* x) const;
    Norm norm_of(const Table& table) const;
    // Rows that a block reads: the state itself, or its norm where norms come first.
    Rows block_input(const Table& norm, int64_t rows);
    void end_block(const Table& norm, int64_t rows);
    Projection projection(const Weight& weight) const;  // without what is done to its sums
    void project(const Weight& weight, const Rows& rows, int64_t count, Finish finish, float* y, int64_t stride) const;
    // What the head reads.
    Rows step_state() const { return {x_, hidden_stride_, bytes_, hidden_stride_, scale_, zero_}; }
    // The logits of all sentences' candidates for all rows of the step; returns the numbers of a row.
    int64_t candidate_logits();
    // Where one of the weights that these rows meet takes bytes.
    void quantise(const Rows& rows, int64_t count, std::initializer_list<const Weight*> weights) const;
    void keep(const float* numbers, int64_t count, uint8_t* to) const;  // in the caches' number type
    void feed_forward(const Layer& layer, int64_t rows);
    void encoder_attention(const std::vector<float>& bias);
    void self_attention(int64_t layer, const std::vector<DecoderRow>& rows);
    void cross_attention(int64_t layer, const std::vector<DecoderRow>& rows);
    // [heads][2 * length - 1]: biases by key - query, from 1 - length on.
    std::vector<float> spread_bias(const Side& side, const Table& table, int64_t length) const;

    const Model& model_;
    const Unit& unit_;
    const int64_t beams_;
    const bool half_;
    const int64_t cache_bytes_;  // of a key's or value's number
    int64_t cell_bytes_;

    Arena arena_;
    BlockPool pool_;
    // Buffers of rows, each row padded; x is the residual stream, normed what blocks read where norms come first.
    int64_t row_count_ = 0, hidden_stride_, inner_stride_, wide_stride_;
    float *x_ = nullptr, *normed_ = nullptr, *wide_ = nullptr, *context_ = nullptr;
    uint8_t* bytes_ = nullptr;
    float* scale_ = nullptr;
    int32_t* zero_ = nullptr;
    float* turned_ = nullptr;
    float* scores_ = nullptr;
    std::vector<float> head_logits_, candidate_logits_;

    const Shortlist* shortlist_ = nullptr;
    // Candidates that are not always there: of all sentences, whose rows of the head are computed for all rows of a step;
    // and of each, with their places among those. What is made of its own, in their order, depends on no other sentence.
    struct Candidates {
        std::vector<int32_t> tokens, places;
    };
    HeadRows together_;
    const Weight* candidate_weight_ = nullptr;
    std::vector<Candidates> candidates_;
    std::vector<int32_t> place_of_;     // [token]
    std::vector<size_t> row_sentence_;  // of the last step

    // Of the sentences: where each begins, how long it is, how wide its turned keys are.
    int64_t sentences_ = 0, longest_ = 0, positions_ = 0, step_rows_ = 0;
    std::vector<int64_t> offset_, length_, width_;
    // [layer][sentence], in the order in which a step reads it: of each head the keys, [head_dim][width], and the values,
    // [width][head_dim].
    std::vector<uint8_t*> cross_;
    std::vector<std::vector<uint8_t*>> cells_;  // [sentence]: blocks
    std::vector<const uint8_t*> places_;  // cells of a row
    std::vector<std::vector<float>> self_bias_;  // [layer or 1]

    bool watching_ = false;
    int64_t attention_width_ = 0;
    std::vector<float> attention_;
};

}  // namespace nms
