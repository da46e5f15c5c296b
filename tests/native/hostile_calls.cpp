// Breaks calls of the engine's C interface one thing at a time: fields of structs, shapes, slots, contents of weights, ids,
// lengths, lists. Whatever comes in, a call ends with an outcome and at most one line of text, and what it translates keeps
// to the vocabulary and the lengths. Exits with 1 at the first failure.
//
//   hostile_calls [--guard] MUTATIONS UNIT
//
// --guard: see odd_sizes.cpp.
#include "random_model.h"

namespace {

int32_t extreme() {
    constexpr int32_t numbers[] = {INT32_MIN, -65536, -2, -1,        0,       1,       2,      3,
                                   255,       256,    41, 1 << 16, 1 << 20, 1 << 24, 1 << 30, INT32_MAX};
    return draw.below(4) ? numbers[draw.below(std::size(numbers))] : static_cast<int32_t>(draw.bits());
}

// Any field of a struct of 4-byte fields; extremes of floats come as bits.
template <class Struct>
void spoil(Struct& fields) {
    constexpr uint32_t floats[] = {0x7fc00000, 0x7f800000, 0xff800000, 0x7f7fffff, 0x00000001, 0x80000000, 0xbf800000};
    int32_t value = draw.below(3) ? extreme() : static_cast<int32_t>(floats[draw.below(std::size(floats))]);
    std::memcpy(reinterpret_cast<uint8_t*>(&fields) + 4 * draw.below(sizeof fields / 4), &value, 4);
}

int64_t calls = 0, translated = 0;

bool fine(int32_t outcome, const char* message) {
    calls++;
    require(outcome >= 0 && outcome <= 2, "an outcome is none of the three");
    require((outcome == 0) == (*message == 0), "an error has no message, or a success has one");
    require(std::strchr(message, '\n') == nullptr, "a message is more than a line");
    return outcome == 0;
}

// The contents behind the header, which no check can know; numbers that are not finite among them.
Array<uint8_t> spoiled(const Array<uint8_t>& bytes, int64_t first) {
    Array<uint8_t> changed(bytes.count);
    std::memcpy(changed.data(), bytes.data(), static_cast<size_t>(bytes.count));
    for (int64_t i = first, every = 1 + draw.below(40); i < bytes.count; i += every)
        changed[i] = draw.coin() ? static_cast<uint8_t>(draw.bits()) : 0xff;
    return changed;
}

// A model with one thing wrong, or nothing; null where the engine refuses it.
void* build(const RandomModel& model, std::vector<Array<uint8_t>>& borrowed) {
    EngineConfig config = model.config;
    const int64_t what = draw.below(4);
    if (what == 0) spoil(config);
    const int64_t items = static_cast<int64_t>(model.weights.size() + model.tables.size());
    const int64_t victim = what == 1 ? draw.below(items) : -1;
    void* engine = nullptr;
    char message[512] = "";
    if (!fine(nms_engine_new(&config, &engine, message, sizeof message), message)) return nullptr;
    bool whole = true;
    int64_t at = 0;
    for (RandomWeight w : model.weights) {
        const int64_t how = at++ == victim ? draw.below(8) : -1;
        int64_t bytes = w.packed.count;
        int32_t format = w.format;
        if (how == 0) continue;
        if (how == 1) w.side = extreme();
        if (how == 2) w.layer = extreme();
        if (how == 3) w.slot = extreme();
        if (how == 4) format = extreme();
        if (how == 5) bytes = draw.coin() ? extreme() : bytes - 1;
        if (how == 6) w.packed = spoiled(w.packed, 64);
        if (how == 7) (draw.coin() ? w.out : w.in) = extreme();
        if (how == 7 && draw.coin()) w.packed = spoiled(w.packed, 0);
        borrowed.push_back(w.packed);
        whole &= fine(nms_engine_weight(engine, w.side, w.layer, w.slot, format, w.out, w.in, w.packed.data(), bytes,
                                        w.bias.count ? w.bias.data() : nullptr, message, sizeof message), message);
        *message = 0;
    }
    for (RandomTable t : model.tables) {
        const int64_t how = at++ == victim ? draw.below(8) : -1;
        int32_t number = t.number;
        const void* data = t.data.data();
        if (how == 0) continue;
        if (how == 1) t.side = extreme();
        if (how == 2) t.layer = extreme();
        if (how == 3) t.slot = extreme();
        if (how == 4) number = draw.coin() ? -1 - t.number : 4 + t.number;
        if (how == 5) data = nullptr;
        if (how == 6) data = borrowed.emplace_back(spoiled(t.data, 0)).data();
        if (how == 7) (draw.coin() ? t.rows : t.columns) = extreme();
        whole &= fine(nms_engine_table(engine, t.side, t.layer, t.slot, number, t.rows, t.columns, data,
                                       t.scale.count ? t.scale.data() : nullptr, message, sizeof message), message);
        *message = 0;
    }
    const bool ready = fine(nms_engine_ready(engine, message, sizeof message), message);
    if (whole && ready) return engine;
    nms_engine_free(engine);
    return nullptr;
}

Tokens& one_of(std::vector<Tokens>& sentences) { return sentences[draw.below(static_cast<int64_t>(sentences.size()))]; }

void mutate(const RandomModel& model) {
    std::vector<Array<uint8_t>> borrowed;  // lives as long as the engine
    void* engine = build(model, borrowed);
    if (!engine) return;
    std::vector<Tokens> sources = random_sentences({3, 1, 6}, 37), prompts = random_sentences({1, 2, 1}, 41);
    Rules rules;
    rules.config.max_length = 8;
    rules.config.beams = rules.config.returned = 1 + static_cast<int32_t>(draw.below(3));
    if (draw.below(4) == 0) {
        rules.config.beams = rules.config.sample = 1;
        rules.config.top_k = 5;
        rules.config.top_p = 0.9f;
    }
    const int64_t what = draw.below(8);
    if (what <= 3) spoil(rules.config);
    if (what == 4) one_of(draw.coin() ? sources : prompts)[0] = extreme();
    if (what == 5) one_of(draw.coin() ? sources : prompts).resize(static_cast<size_t>(draw.below(60)));
    if (what == 6) {
        Tokens& list = draw.below(3) == 0 ? rules.eos : draw.coin() ? rules.banned : rules.begin_banned;
        const int64_t count = draw.below(70);
        list.clear();
        for (int64_t i = 0; i < count; i++) list.push_back(draw.below(3) ? static_cast<int32_t>(draw.below(42)) : extreme());
    }
    if (what == 7 && draw.coin()) sources.clear(), prompts.clear();
    // The caller makes room for what it asks for, which is refused where it is no size.
    const int64_t width = rules.config.max_length, returned = rules.config.returned;
    const bool room = width >= 0 && returned >= 0 && (width == 0 || returned <= (1 << 22) / width);
    if (room) {
        const Call result = call(engine, rules, sources, prompts);
        if (fine(result.outcome, result.message.c_str())) {
            translated++;
            for (const auto& found : result.translations)
                for (const Translated& one : found)
                    for (int32_t token : one.tokens)
                        require(static_cast<int64_t>(one.tokens.size()) <= width && token >= 0 &&
                                    token < model.config.target_vocabulary,
                                "a translation leaves its bounds");
        }
    }
    const Flat from(sources), to(prompts);
    Array<float> scores(to.tokens.count);
    char message[512] = "";
    fine(nms_engine_score(engine, draw.below(4) ? 1 : extreme(), from.lengths.count, from.lengths.data(), from.tokens.data(),
                          to.lengths.data(), to.tokens.data(), scores.data(), nullptr, message, sizeof message), message);
    nms_engine_free(engine);
}

}  // namespace

int main(int count, char** arguments) {
    const int64_t mutations = cases_to_run(count, arguments);
    if (mutations < 0) return 0;
    for (int64_t done = 0; done < mutations;) {
        RandomModel model(static_cast<Precision>(draw.below(3)));
        if (!model.config.decoder.positions) continue;  // which end the translations that shall be endless
        for (const int64_t end = smaller(mutations, done + 100); done < end; done++) {
            describe("mutation %lld", static_cast<long long>(done));
            mutate(model);
        }
    }
    require(translated * 8 > mutations && translated * 8 < 7 * mutations, "the mutations are too wild, or too tame");
    std::printf("%s: %lld calls with %lld mutations end well\n", nms_unit(), static_cast<long long>(calls),
                static_cast<long long>(mutations));
    return 0;
}
