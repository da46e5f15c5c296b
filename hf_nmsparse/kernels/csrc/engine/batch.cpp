#include "batch.h"

#include <algorithm>
#include <limits>

#include "error.h"

namespace nms {

Batch::Batch(const Model& model, int64_t beams)
    : model_(model),
      unit_(model.unit),
      beams_(beams),
      half_(model.config.half_cache != 0),
      cache_bytes_(half_ ? 2 : 4) {
    const int64_t inner = model.decoder().inner(), widest = larger(inner, model.encoder().inner());
    hidden_stride_ = padded(model.config.hidden, 64);
    inner_stride_ = padded(widest, 64);
    wide_stride_ = padded(larger(3 * widest + 64, larger(model.encoder().config.feed_forward,
                                                         model.decoder().config.feed_forward)), 64);
    // An odd number of cache lines a cell, so that cells spread over all sets of a cache.
    cell_bytes_ = (blocks_of(2 * inner * cache_bytes_, 64) | 1) * 64;
    const int64_t layers = model.decoder().config.layers;
    pool_.resize(layers * block_positions * beams * cell_bytes_);
}

// ---- memory ---------------------------------------------------------------------------------------------------------

void Batch::reserve(int64_t sentences, int64_t tokens) {
    const int64_t layers = model_.decoder().config.layers, inner = model_.decoder().inner();
    row_count_ = larger(tokens, sentences * beams_);
    const int64_t byte_stride = larger(hidden_stride_, wide_stride_);
    const int64_t head_dim = larger(model_.encoder().config.head_dim, model_.decoder().config.head_dim);
    const int64_t room = padded(larger(longest_, positions_), 16) + 64;
    int64_t source = 0;
    for (int64_t s = 0; s < sentences; s++) source += Arena::room<uint8_t>(2 * inner * width_[static_cast<size_t>(s)] * cache_bytes_);
    int64_t bytes = 0;
    bytes += 2 * Arena::room<float>(row_count_ * hidden_stride_);
    bytes += Arena::room<float>(row_count_ * wide_stride_) + Arena::room<float>(row_count_ * inner_stride_);
    bytes += Arena::room<uint8_t>(row_count_ * byte_stride) + 2 * Arena::room<float>(row_count_);
    bytes += Arena::room<float>(head_dim * padded(longest_, 16)) + Arena::room<float>(4 * room);
    bytes += layers * source;
    arena_.reserve(bytes);

    x_ = arena_.take<float>(row_count_ * hidden_stride_);
    normed_ = arena_.take<float>(row_count_ * hidden_stride_);
    wide_ = arena_.take<float>(row_count_ * wide_stride_);
    context_ = arena_.take<float>(row_count_ * inner_stride_);
    bytes_ = arena_.take<uint8_t>(row_count_ * byte_stride);
    scale_ = arena_.take<float>(row_count_);
    zero_ = arena_.take<int32_t>(row_count_);
    turned_ = arena_.take<float>(head_dim * padded(longest_, 16));
    scores_ = arena_.take<float>(4 * room);
    cross_.resize(static_cast<size_t>(layers * sentences));
    for (int64_t i = 0; i < layers * sentences; i++)
        cross_[static_cast<size_t>(i)] =
            arena_.take<uint8_t>(2 * inner * width_[static_cast<size_t>(i % sentences)] * cache_bytes_);
    // Padding behind the numbers of a row is zero, and stays so.
    std::memset(x_, 0, static_cast<size_t>(4 * row_count_ * hidden_stride_));
    std::memset(normed_, 0, static_cast<size_t>(4 * row_count_ * hidden_stride_));
    std::memset(context_, 0, static_cast<size_t>(4 * row_count_ * inner_stride_));
}

void Batch::release(int64_t sentence) {
    for (uint8_t* block : cells_[static_cast<size_t>(sentence)]) pool_.give_back(block);
    cells_[static_cast<size_t>(sentence)].clear();
}

// ---- rows -----------------------------------------------------------------------------------------------------------

Norm Batch::norm_of(const Table& table) const {
    const EngineConfig& config = model_.config;
    return {config.hidden, table.row(0), config.rms_norm ? nullptr : table.row(1), config.norm_epsilon,
            config.bf16_activations != 0};
}

void Batch::embed(const Side& side, int32_t token, int64_t position_of, float* x) const {
    const Table& table = side.tables[embedding];
    const int64_t size = table.number == fp32 ? 4 : table.number == int8 ? 1 : 2;
    const float scale = side.config.embedding_scale * (table.scale ? table.scale[token] : 1.0f);
    const float* position_row = side.config.positions ? side.tables[position].row(position_of) : nullptr;
    const uint8_t* row = static_cast<const uint8_t*>(table.data) + size * table.columns * token;
    unit_.embed(row, table.number, scale, position_row, table.columns, model_.config.bf16_activations != 0, x);
    if (model_.config.embedding_norm) unit_.normalise(norm_of(side.tables[embedding_norm_table]), x, x);
}

Rows Batch::block_input(const Table& norm, int64_t rows) {
    float* from = x_;
    if (model_.config.norm_first) {
        const Norm n = norm_of(norm);
        for (int64_t i = 0; i < rows; i++) unit_.normalise(n, x_ + i * hidden_stride_, normed_ + i * hidden_stride_);
        from = normed_;
    }
    return {from, hidden_stride_, bytes_, hidden_stride_, scale_, zero_};
}

void Batch::end_block(const Table& norm, int64_t rows) {
    if (model_.config.norm_first) return;
    const Norm n = norm_of(norm);
    for (int64_t i = 0; i < rows; i++) unit_.normalise(n, x_ + i * hidden_stride_, x_ + i * hidden_stride_);
}

void Batch::quantise(const Rows& rows, int64_t count, std::initializer_list<const Weight*> weights) const {
    for (const Weight* weight : weights)
        if (weight->is_set() && is_int8(weight->format)) return unit_.quantise(rows, 0, count, weight->in);
}

Projection Batch::projection(const Weight& weight) const {
    Projection p{};
    p.format = weight.format;
    p.out = weight.out;
    p.in = weight.in;
    p.packed = weight.packed;
    p.bias = weight.bias.empty() ? nullptr : weight.bias.data();
    p.bias_apart = weight.bias_apart;
    p.activation = static_cast<Activation>(model_.config.activation);
    p.bf16 = model_.config.bf16_activations != 0;
    return p;
}

void Batch::project(const Weight& weight, const Rows& rows, int64_t count, Finish finish, float* y,
                    int64_t stride) const {
    Projection p = projection(weight);
    p.finish = finish;
    p.y = y;
    p.y_stride = stride;
    unit_.project(p, rows, count, 0, blocks_of(weight.out, 2 * unit_.lanes));
}

void Batch::keep(const float* numbers, int64_t count, uint8_t* to) const {
    if (half_)
        unit_.narrow(numbers, count, reinterpret_cast<uint16_t*>(to));
    else
        std::memcpy(to, numbers, static_cast<size_t>(4 * count));
}

void Batch::feed_forward(const Layer& layer, int64_t rows) {
    const Weight& in = layer.weights[feed_in];
    const Weight& out = layer.weights[feed_out];
    const Rows input = block_input(layer.tables[feed_norm], rows);
    quantise(input, rows, {&in, &layer.weights[feed_gate]});
    if (model_.config.gated) {
        project(in, input, rows, store_sums, wide_, wide_stride_);
        project(layer.weights[feed_gate], input, rows, gate, wide_, wide_stride_);
    } else
        project(in, input, rows, store_active, wide_, wide_stride_);
    // Blocks of 16 rows may end before the multiple of 32 up to which products read.
    const int64_t written = padded(in.out, 2 * unit_.lanes), unwritten = padded(in.out, 32) - written;
    for (int64_t i = 0; unwritten > 0 && i < rows; i++)
        std::memset(wide_ + i * wide_stride_ + written, 0, static_cast<size_t>(4 * unwritten));
    const Rows hidden{wide_, wide_stride_, bytes_, wide_stride_, scale_, zero_};
    quantise(hidden, rows, {&out});
    project(out, hidden, rows, add_residual, x_, hidden_stride_);
    end_block(layer.tables[feed_norm], rows);
}

std::vector<float> Batch::spread_bias(const Side& side, const Table& table, int64_t length) const {
    const int64_t reach = side.config.relative_reach, width = 2 * length - 1;
    std::vector<float> spread(static_cast<size_t>(side.config.heads * width + 16));
    for (int64_t head = 0; head < side.config.heads; head++)
        for (int64_t i = 0; i < width; i++) {
            const int64_t distance = larger(-reach, smaller(reach, i - (length - 1)));
            spread[static_cast<size_t>(head * width + i)] = table.row(head)[reach + distance];
        }
    return spread;
}

// ---- encoder --------------------------------------------------------------------------------------------------------

void Batch::encode(int64_t sentences, const int32_t* lengths, const int32_t* tokens, int64_t most_positions,
                   bool watch_attention, const Shortlist* shortlist) {
    const Side& side = model_.encoder();
    const Side& decoder = model_.decoder();
    sentences_ = sentences;
    positions_ = most_positions;
    watching_ = watch_attention;
    offset_.assign(static_cast<size_t>(sentences) + 1, 0);
    length_.resize(static_cast<size_t>(sentences));
    width_.resize(static_cast<size_t>(sentences));
    longest_ = 0;
    for (size_t s = 0; s < static_cast<size_t>(sentences); s++) {
        length_[s] = lengths[s];
        offset_[s + 1] = offset_[s] + lengths[s];
        width_[s] = padded(lengths[s], 16);
        longest_ = larger(longest_, lengths[s]);
    }
    const int64_t rows = offset_.back();
    reserve(sentences, rows);
    pool_.give_back_all();
    cells_.assign(static_cast<size_t>(sentences), {});
    places_.resize(static_cast<size_t>(most_positions) + 1);
    shortlist_ = shortlist;
    if (shortlist) choose_candidates(tokens);

    for (int64_t s = 0; s < sentences; s++)
        for (int64_t p = 0; p < length_[static_cast<size_t>(s)]; p++) {
            const int64_t row = offset_[static_cast<size_t>(s)] + p;
            embed(side, tokens[row], p, x_ + row * hidden_stride_);
        }
    std::vector<float> bias;
    for (const Layer& layer : side.layers) {
        if (side.config.relative_reach) bias = spread_bias(side, layer.tables[relative_bias], longest_);
        const Rows input = block_input(layer.tables[self_norm], rows);
        quantise(input, rows, {&layer.weights[self_q], &layer.weights[self_k], &layer.weights[self_v]});
        for (int32_t slot = self_q; slot <= self_v; slot++)
            project(layer.weights[slot], input, rows, store_sums, wide_ + slot * side.inner(), wide_stride_);
        encoder_attention(bias);
        const Rows context{context_, inner_stride_, bytes_, inner_stride_, scale_, zero_};
        quantise(context, rows, {&layer.weights[self_out]});
        project(layer.weights[self_out], context, rows, add_residual, x_, hidden_stride_);
        end_block(layer.tables[self_norm], rows);
        feed_forward(layer, rows);
    }
    if (model_.config.final_norm) {
        const Norm n = norm_of(side.tables[final_norm_table]);
        for (int64_t i = 0; i < rows; i++) unit_.normalise(n, x_ + i * hidden_stride_, x_ + i * hidden_stride_);
    }

    // Keys and values of the decoder's attention to the source, once for all beams and steps.
    const Rows state{x_, hidden_stride_, bytes_, hidden_stride_, scale_, zero_};
    for (const Layer& layer : decoder.layers)
        if (is_int8(layer.weights[cross_k].format) || is_int8(layer.weights[cross_v].format)) {
            unit_.quantise(state, 0, rows, model_.config.hidden);
            break;
        }
    const int64_t head_dim = decoder.config.head_dim;
    const int64_t inner = decoder.inner();
    for (size_t l = 0; l < decoder.layers.size(); l++) {
        project(decoder.layers[l].weights[cross_k], state, rows, store_sums, wide_, wide_stride_);
        project(decoder.layers[l].weights[cross_v], state, rows, store_sums, wide_ + inner, wide_stride_);
        for (size_t s = 0; s < static_cast<size_t>(sentences); s++) {
            uint8_t* to = cross_[l * static_cast<size_t>(sentences) + s];
            const int64_t row = head_dim * cache_bytes_;
            for (int64_t head = 0; head < decoder.config.heads; head++, to += 2 * row * width_[s]) {
                const float* from = wide_ + offset_[s] * wide_stride_ + head * head_dim;
                unit_.turn(from, wide_stride_, length_[s], head_dim, turned_, width_[s]);
                keep(turned_, head_dim * width_[s], to);
                for (int64_t p = 0; p < length_[s]; p++)
                    keep(from + inner + p * wide_stride_, head_dim, to + row * (width_[s] + p));
            }
        }
    }
    // The decoder's rows begin with clean padding, too; its widths may differ from the encoder's.
    std::memset(context_, 0, static_cast<size_t>(4 * sentences * beams_ * inner_stride_));

    self_bias_.clear();
    if (decoder.config.relative_reach)
        for (const Layer& layer : decoder.layers)
            self_bias_.push_back(spread_bias(decoder, layer.tables[relative_bias], most_positions));
    if (watching_) {
        attention_width_ = padded(longest_, 16);
        attention_.resize(static_cast<size_t>(sentences * beams_ * attention_width_));
    }
}

void Batch::encoder_attention(const std::vector<float>& bias) {
    const Side& side = model_.encoder();
    const int64_t inner = side.inner(), head_dim = side.config.head_dim;
    for (size_t s = 0; s < static_cast<size_t>(sentences_); s++) {
        const float* first = wide_ + offset_[s] * wide_stride_;
        for (int64_t head = 0; head < side.config.heads; head++) {
            const float* query = first + head * head_dim;
            unit_.turn(query + inner, wide_stride_, length_[s], head_dim, turned_, width_[s]);
            TurnedAttention a{};
            a.query = query;
            a.query_stride = wide_stride_;
            a.queries = length_[s];
            a.keys = turned_;
            a.width = width_[s];
            a.values = query + 2 * inner;
            a.value_stride = wide_stride_;
            a.count = length_[s];
            a.head_dim = head_dim;
            a.scale = side.config.attention_scale;
            a.bias = bias.empty() ? nullptr : bias.data() + head * (2 * longest_ - 1) + longest_ - 1;
            a.bf16 = model_.config.bf16_activations != 0;
            a.out = context_ + offset_[s] * inner_stride_ + head * head_dim;
            a.out_stride = inner_stride_;
            a.scores = scores_;
            unit_.attend_turned(a);
        }
    }
}

// ---- decoder --------------------------------------------------------------------------------------------------------

void Batch::step(const std::vector<DecoderRow>& rows) {
    const Side& side = model_.decoder();
    const int64_t count = static_cast<int64_t>(rows.size()), inner = side.inner(), hidden = model_.config.hidden;
    step_rows_ = count;
    row_sentence_.resize(rows.size());
    for (size_t i = 0; i < rows.size(); i++) {
        row_sentence_[i] = static_cast<size_t>(rows[i].sentence);
        if (side.config.positions && rows[i].position >= side.config.positions)
            throw EngineError(unable, "the target is longer than the model's " +
                                          std::to_string(side.config.positions) + " positions");
        embed(side, rows[i].token, rows[i].position, x_ + static_cast<int64_t>(i) * hidden_stride_);
        std::vector<uint8_t*>& blocks = cells_[static_cast<size_t>(rows[i].sentence)];
        while (static_cast<int64_t>(blocks.size()) * block_positions <= rows[i].position) blocks.push_back(pool_.take());
    }
    const Rows context{context_, inner_stride_, bytes_, inner_stride_, scale_, zero_};
    for (size_t l = 0; l < side.layers.size(); l++) {
        const Layer& layer = side.layers[l];
        Rows input = block_input(layer.tables[self_norm], count);
        quantise(input, count, {&layer.weights[self_q], &layer.weights[self_k], &layer.weights[self_v]});
        for (int32_t slot = self_q; slot <= self_v; slot++)
            project(layer.weights[slot], input, count, store_sums, wide_ + slot * inner, wide_stride_);
        self_attention(static_cast<int64_t>(l), rows);
        quantise(context, count, {&layer.weights[self_out]});
        project(layer.weights[self_out], context, count, add_residual, x_, hidden_stride_);
        end_block(layer.tables[self_norm], count);

        input = block_input(layer.tables[cross_norm], count);
        quantise(input, count, {&layer.weights[cross_q]});
        project(layer.weights[cross_q], input, count, store_sums, wide_, wide_stride_);
        cross_attention(static_cast<int64_t>(l), rows);
        quantise(context, count, {&layer.weights[cross_out]});
        project(layer.weights[cross_out], context, count, add_residual, x_, hidden_stride_);
        end_block(layer.tables[cross_norm], count);

        feed_forward(layer, count);
    }
    const bool scaled = model_.config.head_scale != 1.0f;
    for (int64_t i = 0; i < count; i++) {
        float* x = x_ + i * hidden_stride_;
        if (model_.config.final_norm) unit_.normalise(norm_of(side.tables[final_norm_table]), x, x);
        if (scaled)
            unit_.embed(x, fp32, model_.config.head_scale, nullptr, hidden, model_.config.bf16_activations != 0, x);
    }
    quantise(step_state(), count, {&model_.head_weight});
}

void Batch::self_attention(int64_t layer, const std::vector<DecoderRow>& rows) {
    const Side& side = model_.decoder();
    const int64_t inner = side.inner();
    const int64_t layer_bytes = block_positions * beams_ * cell_bytes_;
    for (size_t i = 0; i < rows.size(); i++) {
        const DecoderRow& row = rows[i];
        const std::vector<uint8_t*>& blocks = cells_[static_cast<size_t>(row.sentence)];
        const auto cell = [&](int64_t p, int64_t beam) {
            return blocks[static_cast<size_t>(p / block_positions)] + layer * layer_bytes +
                   (p % block_positions * beams_ + beam) * cell_bytes_;
        };
        const float* query = wide_ + static_cast<int64_t>(i) * wide_stride_;
        uint8_t* own = cell(row.position, row.beam);
        keep(query + inner, 2 * inner, own);
        for (int64_t p = 0; p < row.position; p++) places_[static_cast<size_t>(p)] = cell(p, row.ancestors[p]);
        places_[static_cast<size_t>(row.position)] = own;
        for (int64_t p = 0; p < row.position; p++)  // all at once, before the first is waited for
            for (int64_t at = 0; at < cell_bytes_; at += 64) __builtin_prefetch(places_[static_cast<size_t>(p)] + at, 0, 2);
        CellAttention a{};
        a.query = query;
        a.cells = places_.data();
        a.half = half_;
        a.value_at = inner;
        a.count = row.position + 1;
        a.heads = side.config.heads;
        a.head_dim = side.config.head_dim;
        a.scale = side.config.attention_scale;
        if (!self_bias_.empty()) {
            a.bias = self_bias_[static_cast<size_t>(layer)].data() + positions_ - 1 - row.position;
            a.bias_stride = 2 * positions_ - 1;
        }
        a.bf16 = model_.config.bf16_activations != 0;
        a.out = context_ + static_cast<int64_t>(i) * inner_stride_;
        a.scores = scores_;
        unit_.attend_cells(a);
    }
}

void Batch::cross_attention(int64_t layer, const std::vector<DecoderRow>& rows) {
    const Side& side = model_.decoder();
    const int64_t head_dim = side.config.head_dim;
    const bool watched = watching_ && layer + 1 == side.config.layers;
    if (watched) std::fill(attention_.begin(), attention_.end(), 0.0f);
    for (size_t first = 0, last = 0; first < rows.size(); first = last) {
        const size_t s = static_cast<size_t>(rows[first].sentence);
        while (last < rows.size() && rows[last].sentence == rows[first].sentence) last++;
        const int64_t at = static_cast<int64_t>(first);
        for (int64_t head = 0; head < side.config.heads; head++) {
            TurnedAttention a{};
            a.query = wide_ + at * wide_stride_ + head * head_dim;
            a.query_stride = wide_stride_;
            a.queries = static_cast<int64_t>(last - first);
            const uint8_t* keys = cross_[static_cast<size_t>(layer * sentences_) + s] +
                                  2 * head * head_dim * width_[s] * cache_bytes_;
            a.keys = keys;
            a.width = width_[s];
            a.values = keys + head_dim * width_[s] * cache_bytes_;
            a.half = half_;
            a.value_stride = head_dim;
            a.count = length_[s];
            a.head_dim = head_dim;
            a.scale = side.config.attention_scale;
            a.bf16 = model_.config.bf16_activations != 0;
            a.out = context_ + at * inner_stride_ + head * head_dim;
            a.out_stride = inner_stride_;
            a.scores = scores_;
            if (watched) {
                a.weights = attention_.data() + at * attention_width_;
                a.weights_stride = attention_width_;
            }
            unit_.attend_turned(a);
        }
    }
    if (watched)
        for (float& weight : attention_) weight /= static_cast<float>(side.config.heads);
}

// ---- head -----------------------------------------------------------------------------------------------------------

void Batch::choose_candidates(const int32_t* tokens) {
    place_of_.assign(static_cast<size_t>(model_.config.target_vocabulary), -1);
    candidates_.resize(static_cast<size_t>(sentences_));
    for (size_t s = 0; s < candidates_.size(); s++) {
        shortlist_->find(tokens + offset_[s], length_[s], candidates_[s].tokens);
        for (int32_t token : candidates_[s].tokens) place_of_[static_cast<size_t>(token)] = 0;
    }
    together_.tokens.clear();
    for (size_t token = 0; token < place_of_.size(); token++)
        if (place_of_[token] == 0) {
            place_of_[token] = static_cast<int32_t>(together_.tokens.size());
            together_.tokens.push_back(static_cast<int32_t>(token));
        }
    const bool most = 2 * together_.tokens.size() > place_of_.size();  // then the head is used as it is
    for (Candidates& own : candidates_) {
        own.places = own.tokens;
        if (!most)
            for (int32_t& place : own.places) place = place_of_[static_cast<size_t>(place)];
    }
    if (!most) together_.gather(model_);
    candidate_weight_ = most ? &model_.head_weight : &together_.weight;
}

int64_t Batch::candidate_logits() {
    const int64_t width = padded(candidate_weight_->out, 32), needed = step_rows_ * width;
    if (static_cast<int64_t>(candidate_logits_.size()) < needed) candidate_logits_.resize(static_cast<size_t>(needed));
    project(*candidate_weight_, step_state(), step_rows_, store_sums, candidate_logits_.data(), width);
    return width;
}

void Batch::head_best(Best* best, bool with_sum) {
    const Weight& weight = shortlist_ ? shortlist_->always().weight : model_.head_weight;
    Projection p = projection(weight);
    p.finish = with_sum ? keep_best : keep_best_only;
    p.columns = shortlist_ ? shortlist_->always().tokens.data() : nullptr;
    p.best = best;
    unit_.project(p, step_state(), step_rows_, 0, blocks_of(weight.out, 2 * unit_.lanes));
    if (!shortlist_) return;
    const int64_t width = candidate_logits();
    for (size_t row = 0; row < row_sentence_.size(); row++) {
        const Candidates& own = candidates_[row_sentence_[row]];
        p.out = static_cast<int64_t>(own.tokens.size());
        p.columns = own.tokens.data();
        unit_.choose(p, candidate_logits_.data() + static_cast<int64_t>(row) * width, own.places.data(), best + row);
    }
}

float* Batch::head_logits() {
    const int64_t stride = logits_stride(), needed = step_rows_ * stride;
    if (static_cast<int64_t>(head_logits_.size()) < needed) head_logits_.resize(static_cast<size_t>(needed));
    float* logits = head_logits_.data();
    if (!shortlist_) {
        project(model_.head_weight, step_state(), step_rows_, store_sums, logits, stride);
        return logits;
    }
    std::fill_n(logits, needed, -std::numeric_limits<float>::infinity());
    const HeadRows& always = shortlist_->always();
    std::vector<float> common(static_cast<size_t>(step_rows_ * padded(always.weight.out, 32)));
    project(always.weight, step_state(), step_rows_, store_sums, common.data(), padded(always.weight.out, 32));
    const int64_t width = candidate_logits();
    for (size_t row = 0; row < row_sentence_.size(); row++) {
        float* to = logits + static_cast<int64_t>(row) * stride;
        const float* from = common.data() + static_cast<int64_t>(row) * padded(always.weight.out, 32);
        for (size_t i = 0; i < always.tokens.size(); i++) to[always.tokens[i]] = from[i];
        const Candidates& own = candidates_[row_sentence_[row]];
        from = candidate_logits_.data() + static_cast<int64_t>(row) * width;
        for (size_t i = 0; i < own.tokens.size(); i++) to[own.tokens[i]] = from[own.places[i]];
    }
    return logits;
}

}  // namespace nms
