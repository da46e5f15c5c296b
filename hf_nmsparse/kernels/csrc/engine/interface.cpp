// The C interface of the engine: exceptions become codes with one line of text.
#include <algorithm>
#include <new>
#include <string>

#include "engine.h"
#include "error.h"

#define NMS_EXPORT extern "C" __attribute__((visibility("default")))

using namespace nms;

namespace {

int32_t tell(Outcome outcome, const std::string& text, char* message, int64_t room) {
    if (message && room > 0) {
        const size_t length = std::min(text.size(), static_cast<size_t>(room - 1));
        std::memcpy(message, text.data(), length);
        message[length] = 0;
    }
    return outcome;
}

template <class Body>
int32_t guarded(char* message, int64_t room, const Body& body) {
    try {
        body();
        return fine;
    } catch (const EngineError& error) {
        return tell(error.outcome, error.what(), message, room);
    } catch (const std::bad_alloc&) {
        return tell(refused, "out of memory; take smaller batches, fewer beams or a smaller max_length", message, room);
    } catch (const std::exception& error) {
        return tell(refused, error.what(), message, room);
    }
}

}  // namespace

NMS_EXPORT int32_t nms_engine_new(const EngineConfig* config, void** engine, char* message, int64_t room) {
    return guarded(message, room, [&] { *engine = new Engine(*config); });
}

NMS_EXPORT void nms_engine_free(void* engine) { delete static_cast<Engine*>(engine); }

// `packed` is borrowed: it lives as long as the engine.
NMS_EXPORT int32_t nms_engine_weight(void* engine, int32_t side, int32_t layer, int32_t slot, int32_t format, int64_t out,
                                     int64_t in, const uint8_t* packed, int64_t bytes, const float* bias, char* message,
                                     int64_t room) {
    return guarded(message, room, [&] {
        static_cast<Engine*>(engine)->model.set_weight(side, layer, slot, format, out, in, packed, bytes, bias);
    });
}

// Embeddings and their scales are borrowed, other tables are copied.
NMS_EXPORT int32_t nms_engine_table(void* engine, int32_t side, int32_t layer, int32_t slot, int32_t number, int64_t rows,
                                    int64_t columns, const void* data, const float* scale, char* message, int64_t room) {
    return guarded(message, room, [&] {
        static_cast<Engine*>(engine)->model.set_table(side, layer, slot, number, rows, columns, data, scale);
    });
}

NMS_EXPORT int32_t nms_engine_ready(void* engine, char* message, int64_t room) {
    return guarded(message, room, [&] { static_cast<Engine*>(engine)->model.check_complete(); });
}

// All arrays are copied. Translations under way keep what they began with.
NMS_EXPORT int32_t nms_engine_shortlist(void* engine, const int64_t* offsets, int64_t source_tokens, const int32_t* ids,
                                        int64_t id_count, const int32_t* always, int64_t always_count, char* message,
                                        int64_t room) {
    return guarded(message, room, [&] {
        Engine& own = *static_cast<Engine*>(engine);
        own.model.check_complete();
        own.use(std::make_shared<const Shortlist>(own.model, offsets, source_tokens, ids, id_count, always, always_count));
    });
}

// Tokens go to out_tokens [sentences * returned][max_length], prompt included, with their number to out_lengths (0 where
// there are fewer hypotheses) and their log-probabilities to out_token_scores, unless that is null. Attention goes to
// [sentences * returned][max_length][longest source], in the rows of the tokens that it produced, unless that is null.
NMS_EXPORT int32_t nms_engine_translate(void* engine, const SearchConfig* config, int64_t sentences,
                                        const int32_t* source_lengths, const int32_t* source_tokens,
                                        const int32_t* prompt_lengths, const int32_t* prompt_tokens, const int32_t* eos,
                                        int32_t eos_count, const int32_t* banned, int64_t banned_size,
                                        const int32_t* begin_banned, int32_t begin_banned_count, int32_t* out_tokens,
                                        int32_t* out_lengths, float* out_scores, float* out_token_scores,
                                        float* out_attention, Watcher watcher, Stop stop, char* message, int64_t room) {
    return guarded(message, room, [&] {
        Engine& own = *static_cast<Engine*>(engine);
        const SearchRules rules(*config, own.model.config.target_vocabulary, eos, eos_count, banned, banned_size,
                                begin_banned, begin_banned_count);
        const auto translations = own.translate(rules, {sentences, source_lengths, source_tokens},
                                                {sentences, prompt_lengths, prompt_tokens}, watcher, stop);
        const int64_t width = config->max_length, returned = config->returned;
        int64_t longest = 0;
        for (int64_t s = 0; s < sentences; s++) longest = larger(longest, source_lengths[s]);
        for (int64_t s = 0; s < sentences; s++) {
            const Engine::Translation& translation = translations[static_cast<size_t>(s)];
            for (int64_t i = 0; i < returned; i++) {
                const int64_t at = s * returned + i;
                out_lengths[at] = 0;
                if (i >= static_cast<int64_t>(translation.hypotheses.size())) continue;
                const Hypothesis& hypothesis = translation.hypotheses[static_cast<size_t>(i)];
                out_lengths[at] = static_cast<int32_t>(hypothesis.tokens.size());
                out_scores[at] = hypothesis.score;
                std::copy(hypothesis.tokens.begin(), hypothesis.tokens.end(), out_tokens + at * width);
                if (out_token_scores)
                    std::copy(hypothesis.token_scores.begin(), hypothesis.token_scores.end(),
                              out_token_scores + at * width);
                if (!out_attention || !config->attention) continue;
                const std::vector<float>& weights = translation.attention[static_cast<size_t>(i)];
                const int64_t length = source_lengths[s], first = prompt_lengths[s];
                for (int64_t p = 0; p * length < static_cast<int64_t>(weights.size()); p++)
                    std::copy_n(weights.begin() + p * length, length, out_attention + (at * width + first + p) * longest);
            }
        }
    });
}

// scores lie as target_tokens do.
NMS_EXPORT int32_t nms_engine_score(void* engine, int32_t threads, int64_t sentences, const int32_t* source_lengths, const int32_t* source_tokens,
                                    const int32_t* target_lengths, const int32_t* target_tokens, float* scores,
                                    Stop stop, char* message, int64_t room) {
    return guarded(message, room, [&] {
        static_cast<Engine*>(engine)->score(threads, {sentences, source_lengths, source_tokens},
                                            {sentences, target_lengths, target_tokens}, scores, stop);
    });
}
