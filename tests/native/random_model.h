// A small random model behind the engine's C interface, and its logits in double precision.
#pragma once
#include <cmath>
#include <deque>
#include <string>
#include <vector>

#include "driver.h"
#include "engine/api.h"
#include "unit.h"

using namespace nms;

extern "C" {
int32_t nms_engine_new(const EngineConfig* config, void** engine, char* message, int64_t room);
void nms_engine_free(void* engine);
int32_t nms_engine_weight(void* engine, int32_t side, int32_t layer, int32_t slot, int32_t format, int64_t out, int64_t in,
                          const uint8_t* packed, int64_t bytes, const float* bias, char* message, int64_t room);
int32_t nms_engine_table(void* engine, int32_t side, int32_t layer, int32_t slot, int32_t number, int64_t rows,
                         int64_t columns, const void* data, const float* scale, char* message, int64_t room);
int32_t nms_engine_ready(void* engine, char* message, int64_t room);
int32_t nms_engine_translate(void* engine, const SearchConfig* config, int64_t sentences, const int32_t* source_lengths,
                             const int32_t* source_tokens, const int32_t* prompt_lengths, const int32_t* prompt_tokens,
                             const int32_t* eos, int32_t eos_count, const int32_t* banned, int64_t banned_size,
                             const int32_t* begin_banned, int32_t begin_banned_count, int32_t* out_tokens,
                             int32_t* out_lengths, float* out_scores, float* out_token_scores, float* out_attention,
                             Watcher watcher, Stop stop, char* message, int64_t room);
int32_t nms_engine_score(void* engine, int32_t threads, int64_t sentences, const int32_t* source_lengths,
                         const int32_t* source_tokens, const int32_t* target_lengths, const int32_t* target_tokens,
                         float* scores, Stop stop, char* message, int64_t room);
}

namespace {

using Tokens = std::vector<int32_t>;
using Line = std::vector<double>;
constexpr int32_t encoder_side = 0, decoder_side = 1, no_layer = -1;

// As the interface takes it, and [rows][columns] of what it is worth.
struct RandomWeight {
    int32_t side, layer, slot;
    Format format;
    int64_t out, in;
    Array<uint8_t> packed;
    Array<float> bias;  // empty: none
    Line value;
};
struct RandomTable {
    int32_t side, layer, slot;
    Number number;
    int64_t rows, columns;
    Array<uint8_t> data;
    Array<float> scale;  // empty but for int8
    Line value;
};

int64_t bytes_of(Number number) { return number == fp32 ? 4 : number == int8 ? 1 : 2; }

// One number of a kind into memory; what it is worth.
double put(Number number, float value, uint8_t* to) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (number == bf16) bits >>= 16;
    if (number == int8) bits = static_cast<uint32_t>(static_cast<int32_t>(127 * value));
    if (number == fp16)  // of normal numbers; others become zero
        bits = std::fabs(value) < 0x1p-14f ? 0 : (bits >> 16 & 0x8000) | ((bits >> 13 & 0x3ffff) - (112u << 10));
    std::memcpy(to, &bits, static_cast<size_t>(bytes_of(number)));
    if (number == int8) return static_cast<int8_t>(bits);
    if (number == fp16) return half_to_float(static_cast<uint16_t>(bits));
    return number == bf16 ? bf16_to_float(static_cast<uint16_t>(bits)) : value;
}

Number number_of(Format format) {
    if (is_int8(format)) return int8;
    return format == sparse_fp32 || format == dense_fp32 || format == fp32_1of4 ? fp32 : bf16;
}

// `gain`: about how much longer the product is than its input.
RandomWeight random_weight(int32_t side, int32_t layer, int32_t slot, Format format, int64_t out, int64_t in, float gain,
                           bool biased) {
    const int64_t width = is_2_of_4(format) ? in / 2 : in, code_bytes = (in / 4 * 3 + 7) / 8;
    const Number number = number_of(format);
    const int64_t size = bytes_of(number);
    const float most = gain * std::sqrt(3.0f / static_cast<float>(width));
    RandomWeight w{side, layer, slot, format, out, in, Array<uint8_t>(nms_packed_bytes(format, out, in)),
                   Array<float>(biased ? out : 0), Line(static_cast<size_t>(out * in))};
    Array<uint8_t> values(out * width * size), codes(out * code_bytes), dense(out * in * size);
    Array<float> scales(number == int8 ? out : 0), unused(scales.count);
    for (int64_t i = 0; i < out * width; i++)
        put(number, number == int8 ? draw.uniform() : most * draw.uniform(), values.data() + i * size);
    if (kept_of_16(format)) keep(values.data(), size, out, in, kept_of_16(format), 16);
    if (kept_of_4(format) == 1) keep(values.data(), size, out, in, 1, 4);
    std::memset(codes.data(), 0, static_cast<size_t>(codes.count));
    for (int64_t g = 0; g < out * (in / 4); g++) {
        const int64_t row = g / (in / 4), bit = g % (in / 4) * 3, code = draw.below(6);
        for (int64_t b = 0; b < 3; b++)
            codes[row * code_bytes + (bit + b) / 8] |= static_cast<uint8_t>((code >> b & 1) << ((bit + b) % 8));
    }
    for (int64_t row = 0; row < scales.count; row++) scales[row] = most / 127 * (0.5f + 0.5f * std::fabs(draw.uniform()));
    for (int64_t row = 0; row < w.bias.count; row++) w.bias[row] = 0.3f * draw.uniform();
    nms_repack(format, out, in, values.data(), codes.data(), scales.data(), w.packed.data());
    require(nms_restore(format, out, in, w.packed.data(), dense.data(), number == int8 ? unused.data() : nullptr) == 1,
            "a weight is refused");
    for (int64_t i = 0; i < out * in; i++) {
        const uint8_t* at = dense.data() + i * size;
        uint16_t half;
        float single;
        double& value = w.value[static_cast<size_t>(i)];
        if (number == int8) value = static_cast<int8_t>(*at) * double{scales[i / in]};
        if (number == bf16) value = (std::memcpy(&half, at, 2), bf16_to_float(half));
        if (number == fp32) value = (std::memcpy(&single, at, 4), single);
    }
    return w;
}

// Numbers around `centre`, at most `spread` away.
RandomTable random_table(int32_t side, int32_t layer, int32_t slot, Number number, int64_t rows, int64_t columns,
                         float centre, float spread) {
    RandomTable t{side, layer, slot, number, rows, columns, Array<uint8_t>(rows * columns * bytes_of(number)),
                  Array<float>(number == int8 ? rows : 0), Line()};
    for (int64_t row = 0; row < rows; row++) {
        if (number == int8) t.scale[row] = spread / 127;
        for (int64_t i = row * columns; i < (row + 1) * columns; i++) {
            const float drawn = number == int8 ? draw.uniform() : centre + spread * draw.uniform();
            const double value = put(number, drawn, t.data.data() + i * bytes_of(number));
            t.value.push_back(number == int8 ? value * double{t.scale[row]} : value);
        }
    }
    return t;
}

enum Precision { floats, mixed, bytes };  // formats of weights: without int8, all, int8 alone

class RandomModel {
  public:
    EngineConfig config{};
    std::deque<RandomWeight> weights;
    std::deque<RandomTable> tables;

    explicit RandomModel(Precision precision) : precision_(precision) {
        constexpr int32_t hiddens[] = {20, 12, 32, 64}, heads[] = {1, 2, 3, 4}, head_dims[] = {5, 4, 8, 16, 12},
                          wide_dims[] = {32, 64, 128}, feeds[] = {36, 20, 64, 100};
        const auto one_of = [](const auto& list) { return list[draw.below(std::size(list))]; };
        config.size = sizeof config;
        config.hidden = one_of(hiddens);
        config.activation = static_cast<int32_t>(draw.below(activations));
        config.gated = draw.coin();
        config.rms_norm = draw.coin();
        config.norm_first = draw.coin();
        config.embedding_norm = draw.coin();
        config.final_norm = config.norm_first || draw.coin();
        config.bf16_activations = precision != floats && draw.below(3) == 0;
        config.half_cache = precision != floats && draw.coin();
        config.target_vocabulary = 41;
        config.norm_epsilon = 1e-5f;
        config.head_scale = draw.coin() ? 1.0f : 0.75f;
        for (SideConfig* side : {&config.encoder, &config.decoder}) {
            side->layers = 1 + draw.coin();
            const bool wide = draw.below(4) == 0;
            side->heads = wide ? 1 : one_of(heads);
            side->head_dim = wide ? one_of(wide_dims) : one_of(head_dims);
            side->feed_forward = one_of(feeds);
            side->vocabulary = side == &config.encoder ? 37 : 41;
            side->positions = draw.coin() ? 40 : 0;
            side->relative_reach = draw.coin() ? 1 + static_cast<int32_t>(draw.below(12)) : 0;
            side->embedding_scale = draw.coin() ? 1.0f : 1.5f;
            side->attention_scale = 1.0f / std::sqrt(static_cast<float>(side->head_dim));
        }
        make();
    }
    // The same weights behind a handle of the engine.
    void* build() const {
        void* engine = nullptr;
        char message[512] = "";
        const auto fine = [&](int32_t outcome) { require(outcome == 0, message); };
        fine(nms_engine_new(&config, &engine, message, sizeof message));
        for (const RandomWeight& w : weights)
            fine(nms_engine_weight(engine, w.side, w.layer, w.slot, w.format, w.out, w.in, w.packed.data(), w.packed.count,
                                   w.bias.count ? w.bias.data() : nullptr, message, sizeof message));
        for (const RandomTable& t : tables)
            fine(nms_engine_table(engine, t.side, t.layer, t.slot, t.number, t.rows, t.columns, t.data.data(),
                                  t.scale.count ? t.scale.data() : nullptr, message, sizeof message));
        fine(nms_engine_ready(engine, message, sizeof message));
        return engine;
    }
    // Whether `logits` is what the engine computes, but for the rounding of fp32.
    bool has_reference() const { return precision_ == floats; }

    // The logits behind each token of the target.
    std::vector<Line> logits(const Tokens& source, const Tokens& target) const {
        const std::vector<Line> memory = run(encoder_side, source, {});
        std::vector<Line> states = run(decoder_side, target, memory);
        for (Line& state : states) {
            for (double& x : state) x *= double{config.head_scale};
            state = multiply(decoder_side, no_layer, head, state);
        }
        return states;
    }

  private:
    const Precision precision_;

    Format draw_format(int64_t in) const {
        constexpr Format float_formats[] = {dense_fp32, dense_bf16, sparse_fp32, sparse_bf16, fp32_1of4, bf16_1of4};
        constexpr Format byte_formats[] = {dense_int8, sparse_int8, int8_8of16, int8_4of16};
        if (in % 4) return precision_ == bytes ? dense_int8 : float_formats[draw.below(2)];
        if (precision_ == floats) return float_formats[draw.below(6)];
        return precision_ == bytes ? byte_formats[draw.below(4)] : static_cast<Format>(draw.below(formats));
    }
    void weight(int32_t side, int32_t layer, int32_t slot, int64_t out, int64_t in, float gain) {
        weights.push_back(random_weight(side, layer, slot, draw_format(in), out, in, gain, draw.coin()));
    }
    void norm(int32_t side, int32_t layer, int32_t slot) {
        RandomTable t = random_table(side, layer, slot, fp32, config.rms_norm ? 1 : 2, config.hidden, 1.0f, 0.3f);
        for (int64_t i = config.hidden; i < t.rows * t.columns; i++)  // the bias
            t.value[static_cast<size_t>(i)] = put(fp32, static_cast<float>(t.value[static_cast<size_t>(i)]) - 1.0f,
                                                  t.data.data() + 4 * i);
        tables.push_back(std::move(t));
    }
    void make() {
        constexpr Number numbers[] = {fp32, bf16, int8, fp16};
        const int64_t hidden = config.hidden;
        for (int32_t s = encoder_side; s <= decoder_side; s++) {
            const SideConfig& side = s == encoder_side ? config.encoder : config.decoder;
            const int64_t inner = side.heads * side.head_dim;
            tables.push_back(random_table(s, no_layer, embedding, numbers[draw.below(4)], side.vocabulary, hidden, 0, 1));
            if (side.positions) tables.push_back(random_table(s, no_layer, position, fp32, side.positions, hidden, 0, 1));
            if (config.embedding_norm) norm(s, no_layer, embedding_norm_table);
            if (config.final_norm) norm(s, no_layer, final_norm_table);
            for (int32_t l = 0; l < side.layers; l++) {
                for (int32_t slot : {self_q, self_k, self_v}) weight(s, l, slot, inner, hidden, 1.5f);
                weight(s, l, self_out, hidden, inner, 1.0f);
                norm(s, l, self_norm);
                if (side.relative_reach)
                    tables.push_back(random_table(s, l, relative_bias, fp32, side.heads, 2 * side.relative_reach + 1, 0, 1));
                if (s == decoder_side) {
                    for (int32_t slot : {cross_q, cross_k, cross_v}) weight(s, l, slot, inner, hidden, 1.5f);
                    weight(s, l, cross_out, hidden, inner, 1.0f);
                    norm(s, l, cross_norm);
                }
                weight(s, l, feed_in, side.feed_forward, hidden, 1.0f);
                if (config.gated) weight(s, l, feed_gate, side.feed_forward, hidden, 1.0f);
                weight(s, l, feed_out, hidden, side.feed_forward, 1.0f);
                norm(s, l, feed_norm);
            }
        }
        weight(decoder_side, no_layer, head, config.target_vocabulary, hidden, 1.5f);
    }

    // ---- in double precision ----

    const RandomTable* table(int32_t side, int32_t layer, int32_t slot) const {
        for (const RandomTable& t : tables)
            if (t.side == side && t.layer == layer && t.slot == slot) return &t;
        return nullptr;
    }
    Line multiply(int32_t side, int32_t layer, int32_t slot, const Line& x) const {
        for (const RandomWeight& w : weights) {
            if (w.side != side || w.layer != layer || w.slot != slot) continue;
            Line y(static_cast<size_t>(w.out));
            for (int64_t row = 0; row < w.out; row++) {
                double sum = w.bias.count ? double{w.bias[row]} : 0.0;
                for (int64_t i = 0; i < w.in; i++)
                    sum += w.value[static_cast<size_t>(row * w.in + i)] * x[static_cast<size_t>(i)];
                y[static_cast<size_t>(row)] = sum;
            }
            return y;
        }
        require(false, "the model lacks a weight");
        return {};
    }
    Line normed(const RandomTable* t, Line x) const {
        double mean = 0, squares = 0;
        for (double v : x) mean += config.rms_norm ? 0.0 : v / static_cast<double>(x.size());
        for (double v : x) squares += (v - mean) * (v - mean) / static_cast<double>(x.size());
        for (size_t i = 0; i < x.size(); i++) {
            x[i] = (x[i] - mean) / std::sqrt(squares + double{config.norm_epsilon}) * t->value[i];
            if (!config.rms_norm) x[i] += t->value[x.size() + i];
        }
        return x;
    }
    double activate(double x) const {
        switch (config.activation) {
            case relu: return std::fmax(x, 0.0);
            case gelu: return 0.5 * x * std::erfc(-x * std::sqrt(0.5));
            case gelu_tanh: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
            default: return x / (1 + std::exp(-x));
        }
    }
    // Attention of query i to the first `visible(i)` of keys.
    template <class Visible>
    std::vector<Line> attend(const SideConfig& side, const RandomTable* bias, const std::vector<Line>& queries,
                             const std::vector<Line>& keys, const std::vector<Line>& values, Visible visible) const {
        std::vector<Line> all;
        for (size_t i = 0; i < queries.size(); i++) {
            Line out(queries[i].size());
            for (size_t h = 0; h < static_cast<size_t>(side.heads); h++) {
                const size_t first = h * static_cast<size_t>(side.head_dim), last = first + static_cast<size_t>(side.head_dim);
                Line score(visible(i));
                double total = 0;
                for (size_t j = 0; j < score.size(); j++) {
                    for (size_t c = first; c < last; c++) score[j] += queries[i][c] * keys[j][c] * double{side.attention_scale};
                    const int64_t reach = side.relative_reach, off = static_cast<int64_t>(j) - static_cast<int64_t>(i);
                    if (bias)
                        score[j] += bias->value[h * static_cast<size_t>(bias->columns) +
                                                static_cast<size_t>(reach + larger(-reach, smaller(reach, off)))];
                    total += score[j] = std::exp(score[j]);
                }
                for (size_t j = 0; j < score.size(); j++)
                    for (size_t c = first; c < last; c++) out[c] += score[j] / total * values[j][c];
            }
            all.push_back(out);
        }
        return all;
    }
    std::vector<Line> run(int32_t s, const Tokens& tokens, const std::vector<Line>& memory) const {
        const SideConfig& side = s == encoder_side ? config.encoder : config.decoder;
        const RandomTable *embeddings = table(s, no_layer, embedding), *positions = table(s, no_layer, position);
        std::vector<Line> x;
        for (size_t p = 0; p < tokens.size(); p++) {
            Line line;
            for (size_t i = 0; i < static_cast<size_t>(config.hidden); i++) {
                const size_t width = static_cast<size_t>(config.hidden), at = static_cast<size_t>(tokens[p]) * width + i;
                line.push_back(double{side.embedding_scale} * embeddings->value[at] +
                               (positions ? positions->value[p * width + i] : 0.0));
            }
            x.push_back(config.embedding_norm ? normed(table(s, no_layer, embedding_norm_table), line) : line);
        }
        // A residual block around `inside`, which takes and gives all lines.
        const auto block = [&](const RandomTable* norm, const auto& inside) {
            std::vector<Line> input = x;
            if (config.norm_first)
                for (Line& line : input) line = normed(norm, line);
            const std::vector<Line> output = inside(input);
            for (size_t p = 0; p < x.size(); p++) {
                for (size_t i = 0; i < x[p].size(); i++) x[p][i] += output[p][i];
                if (!config.norm_first) x[p] = normed(norm, x[p]);
            }
        };
        const auto each = [&](int32_t layer, int32_t slot, std::vector<Line> lines) {
            for (Line& line : lines) line = multiply(s, layer, slot, line);
            return lines;
        };
        for (int32_t l = 0; l < side.layers; l++) {
            block(table(s, l, self_norm), [&](const std::vector<Line>& input) {
                const auto seen = [&](size_t i) { return s == encoder_side ? input.size() : i + 1; };
                return each(l, self_out, attend(side, table(s, l, relative_bias), each(l, self_q, input),
                                                each(l, self_k, input), each(l, self_v, input), seen));
            });
            if (s == decoder_side)
                block(table(s, l, cross_norm), [&](const std::vector<Line>& input) {
                    return each(l, cross_out, attend(side, nullptr, each(l, cross_q, input), each(l, cross_k, memory),
                                                     each(l, cross_v, memory), [&](size_t) { return memory.size(); }));
                });
            block(table(s, l, feed_norm), [&](const std::vector<Line>& input) {
                std::vector<Line> wide = each(l, feed_in, input), gate;
                if (config.gated) gate = each(l, feed_gate, input);
                for (size_t p = 0; p < wide.size(); p++)
                    for (size_t i = 0; i < wide[p].size(); i++)
                        wide[p][i] = config.gated ? wide[p][i] * activate(gate[p][i]) : activate(wide[p][i]);
                return each(l, feed_out, wide);
            });
        }
        if (config.final_norm)
            for (Line& line : x) line = normed(table(s, no_layer, final_norm_table), line);
        return x;
    }
};

// ---- calls ----------------------------------------------------------------------------------------------------------

struct Rules {
    SearchConfig config{};
    Tokens eos{0}, banned, begin_banned;  // `banned`: lengths and their tokens

    Rules() {
        config.size = sizeof config;
        config.beams = config.returned = config.threads = 1;
        config.max_length = 20;
        config.forced_bos = config.forced_eos = config.unknown_token = -1;
        config.batch_sentences = 64;
        config.batch_tokens = 4096;
        config.token_scores = 1;
        config.length_penalty = config.repetition_penalty = config.temperature = config.top_p = 1.0f;
    }
};

struct Translated {
    Tokens tokens;
    float score;
    std::vector<float> token_scores;

    bool operator==(const Translated& other) const {
        return tokens == other.tokens && score == other.score && token_scores == other.token_scores;
    }
};
using Translations = std::vector<std::vector<Translated>>;  // [sentence][hypothesis]

// Sentences end to end, in memory that ends with the last.
struct Flat {
    Array<int32_t> lengths, tokens;

    explicit Flat(const std::vector<Tokens>& sentences)
        : lengths(static_cast<int64_t>(sentences.size())), tokens(count(sentences)) {
        int64_t at = 0, s = 0;
        for (const Tokens& sentence : sentences) {
            lengths[s++] = static_cast<int32_t>(sentence.size());
            for (int32_t token : sentence) tokens[at++] = token;
        }
    }
    static int64_t count(const std::vector<Tokens>& sentences) {
        int64_t all = 0;
        for (const Tokens& sentence : sentences) all += static_cast<int64_t>(sentence.size());
        return all;
    }
};

struct Call {
    int32_t outcome;
    std::string message;
    Translations translations;
    std::vector<float> attention;  // [sentence * returned][max_length][longest source], if it is asked for
};

Call call(void* engine, const Rules& rules, const std::vector<Tokens>& sources, const std::vector<Tokens>& prompts) {
    const int64_t count = static_cast<int64_t>(sources.size()), returned = rules.config.returned;
    const int64_t slots = count * returned, width = rules.config.max_length;
    int64_t longest = 0;
    for (const Tokens& source : sources) longest = larger(longest, static_cast<int64_t>(source.size()));
    const Flat from(sources), begin(prompts), lists({rules.eos, rules.banned, rules.begin_banned});
    const int32_t* list = lists.tokens.data();
    Array<int32_t> tokens(slots * width), lengths(slots);
    Array<float> scores(slots), token_scores(slots * width), attention(rules.config.attention ? slots * width * longest : 0);
    for (int64_t i = 0; i < attention.count; i++) attention[i] = 0.0f;
    char message[512] = "";
    Call result{0, {}, {}, {}};
    result.outcome = nms_engine_translate(
        engine, &rules.config, count, from.lengths.data(), from.tokens.data(), begin.lengths.data(), begin.tokens.data(),
        list, lists.lengths[0], list + lists.lengths[0], lists.lengths[1], list + lists.lengths[0] + lists.lengths[1],
        lists.lengths[2], tokens.data(), lengths.data(), scores.data(), token_scores.data(),
        rules.config.attention ? attention.data() : nullptr, nullptr, nullptr, message, sizeof message);
    result.message = message;
    if (result.outcome) return result;
    result.attention.assign(attention.data(), attention.data() + attention.count);
    for (int64_t s = 0; s < count; s++) {
        result.translations.emplace_back();
        for (int64_t at = s * returned; at < (s + 1) * returned; at++)
            if (lengths[at])
                result.translations.back().push_back(
                    {{tokens.data() + at * width, tokens.data() + at * width + lengths[at]},
                     scores[at],
                     {token_scores.data() + at * width, token_scores.data() + at * width + lengths[at]}});
    }
    return result;
}

std::vector<Tokens> random_sentences(const std::vector<int64_t>& lengths, int64_t vocabulary) {
    std::vector<Tokens> sentences;
    for (int64_t length : lengths) {
        sentences.emplace_back();
        for (int64_t i = 0; i < length; i++) sentences.back().push_back(static_cast<int32_t>(draw.below(vocabulary)));
    }
    return sentences;
}

}  // namespace
