// Makes small random models of every kind the engine knows and checks its translations: against a model in double
// precision, against the rules of the search, and against themselves in other batches, on more threads and in concurrent
// calls. Exits with 1 at the first failure.
//
//   translations [--guard] MODELS UNIT
//
// --guard: see odd_sizes.cpp.
#include <algorithm>
#include <numeric>
#include <thread>

#include "random_model.h"

namespace {

void require_near(double a, double b, double most, const char* what) {
    if (std::fabs(a - b) <= most) return;
    std::printf("%.7g and %.7g\n", a, b);
    require(false, what);
}

Translations translate(void* engine, const Rules& rules, const std::vector<Tokens>& sources,
                       const std::vector<Tokens>& prompts) {
    Call result = call(engine, rules, sources, prompts);
    require(result.outcome == 0, result.message.c_str());
    return std::move(result.translations);
}

// ---- the rules of the search ----------------------------------------------------------------------------------------

bool has(const Tokens& list, int32_t token) { return std::find(list.begin(), list.end(), token) != list.end(); }

std::vector<Tokens> phrases_of(const Rules& rules) {
    std::vector<Tokens> phrases;
    for (auto at = rules.banned.begin(); at != rules.banned.end(); at += 1 + *at) phrases.emplace_back(at + 1, at + 1 + *at);
    return phrases;
}

// The token that has to stand behind these, or -1.
int32_t forced(const SearchConfig& config, const Tokens& past) {
    const int64_t length = static_cast<int64_t>(past.size());
    if (config.forced_eos >= 0 && length == config.max_length - 1) return config.forced_eos;
    return config.forced_bos >= 0 && length == 1 ? config.forced_bos : -1;
}

// Whether the token may stand behind these.
bool allowed(const Rules& rules, size_t prompt, const Tokens& past, int32_t token) {
    const SearchConfig& config = rules.config;
    const int64_t length = static_cast<int64_t>(past.size());
    const bool moved = prompt == 1 && config.forced_bos >= 0;
    if (past.size() == prompt + moved && has(rules.begin_banned, token)) return false;
    if (has(rules.eos, token) &&
        (length < config.min_length || length < static_cast<int64_t>(prompt) + config.min_new_tokens))
        return false;
    for (const Tokens& phrase : phrases_of(rules))
        if (phrase.back() == token && (phrase.size() == 1 || phrase.size() <= past.size()) &&
            std::equal(phrase.begin(), phrase.end() - 1, past.end() - static_cast<int64_t>(phrase.size()) + 1))
            return false;
    const int64_t n = config.no_repeat_ngram;
    for (int64_t i = 0; n && i + n <= length; i++)
        if (past[static_cast<size_t>(i + n - 1)] == token &&
            std::equal(past.end() - n + 1, past.end(), past.begin() + i))
            return false;
    return true;
}

void check_rules(const Rules& rules, const Tokens& prompt, const Translated& found) {
    const SearchConfig& config = rules.config;
    const int64_t length = static_cast<int64_t>(found.tokens.size());
    require(length > static_cast<int64_t>(prompt.size()) && length <= config.max_length, "a translation has a wrong length");
    require(std::equal(prompt.begin(), prompt.end(), found.tokens.begin()), "a translation has not its prompt");
    double sum = 0;
    for (size_t p = 0; p < found.tokens.size(); p++) {
        sum += double{found.token_scores[p]};
        if (p < prompt.size()) {
            require(found.token_scores[p] == 0.0f, "a token of the prompt has a score");
            continue;
        }
        const Tokens past(found.tokens.begin(), found.tokens.begin() + static_cast<int64_t>(p));
        const int32_t token = found.tokens[p], due = forced(config, past);
        require(due < 0 || token == due, "a token is not the forced one");
        require(due >= 0 || allowed(rules, prompt.size(), past, token), "a token is banned");
        require(p + 1 == found.tokens.size() || !has(rules.eos, token), "a translation goes on behind its end");
    }
    require(length == config.max_length || has(rules.eos, found.tokens.back()), "a translation has no end");
    const double produced = static_cast<double>(found.tokens.size() - prompt.size());
    require_near(double{found.score} * std::pow(produced, double{config.length_penalty}), sum, 2e-5 * (1 + std::fabs(sum)),
                 "a score is not that of the tokens");
}

// Every token of a greedy translation is the best by the logits in double precision, within rounding.
void check_choices(const RandomModel& model, const Rules& rules, const Tokens& source, const Tokens& prompt,
                   const Translated& found) {
    const std::vector<Line> logits = model.logits(source, found.tokens);
    for (size_t p = prompt.size(); p < found.tokens.size(); p++) {
        const Tokens past(found.tokens.begin(), found.tokens.begin() + static_cast<int64_t>(p));
        if (forced(rules.config, past) >= 0) continue;
        Line line = logits[p - 1];
        const double penalty = double{rules.config.repetition_penalty};
        for (size_t token = 0; token < line.size(); token++)
            if (has(past, static_cast<int32_t>(token))) line[token] *= line[token] < 0 ? penalty : 1 / penalty;
        double best = -1e30;
        for (size_t token = 0; token < line.size(); token++)
            if (allowed(rules, prompt.size(), past, static_cast<int32_t>(token))) best = std::fmax(best, line[token]);
        require_near(line[static_cast<size_t>(found.tokens[p])], best, 1e-4, "a greedy token is not the best one");
    }
}

// ---- scores of given translations -----------------------------------------------------------------------------------

std::vector<std::vector<float>> score(void* engine, int32_t threads, const std::vector<Tokens>& sources,
                                      const std::vector<Tokens>& targets) {
    const Flat from(sources), to(targets);
    Array<float> scores(to.tokens.count);
    char message[512] = "";
    const int32_t outcome = nms_engine_score(engine, threads, from.lengths.count, from.lengths.data(), from.tokens.data(),
                                             to.lengths.data(), to.tokens.data(), scores.data(), nullptr, message, sizeof message);
    require(outcome == 0, message);
    std::vector<std::vector<float>> all;
    const float* at = scores.data();
    for (const Tokens& target : targets) {
        all.emplace_back(at, at + target.size());
        at += target.size();
    }
    return all;
}

void check_scores(const RandomModel& model, void* engine, const std::vector<Tokens>& sources,
                  const std::vector<Tokens>& targets) {
    const auto scores = score(engine, 1, sources, targets);
    require(scores == score(engine, 4, sources, targets), "four threads give other scores");
    for (size_t s = 0; s < sources.size(); s++) {
        require(score(engine, 1, {sources[s]}, {targets[s]})[0] == scores[s], "a sentence alone has other scores");
        require(scores[s][0] == 0.0f, "the start token has a score");
        if (!model.has_reference()) continue;
        const std::vector<Line> logits = model.logits(sources[s], targets[s]);
        for (size_t p = 1; p < targets[s].size(); p++) {
            double total = 0;
            for (double logit : logits[p - 1]) total += std::exp(logit);
            require_near(double{scores[s][p]}, logits[p - 1][static_cast<size_t>(targets[s][p])] - std::log(total), 1e-4,
                         "a score is not that of double precision");
        }
    }
}

// ---- searches -------------------------------------------------------------------------------------------------------

std::vector<Rules> kinds_of_search() {
    std::vector<Rules> all(9);
    all[1].config.beams = all[1].config.returned = 4;
    all[1].config.length_penalty = 0.6f;
    SearchConfig* c = &all[2].config;  // what keeps the best logits alone
    c->beams = 3;
    c->min_length = 5;
    c->early_stopping = stop_when_full;
    all[2].eos = {0, 5};
    all[2].banned = {1, 7, 1, 40};
    all[2].begin_banned = {3, 4};
    c = &all[3].config;  // and what needs all
    c->beams = c->returned = 2;
    c->no_repeat_ngram = 2;
    c->repetition_penalty = 1.3f;
    c->forced_bos = 9;
    c->forced_eos = 0;
    c->early_stopping = stop_never_early;
    all[3].banned = {2, 5, 6, 1, 8};
    all[3].begin_banned = {3, 4};
    all[4] = all[3];
    c = &all[4].config;
    c->beams = c->returned = 1;
    c->min_new_tokens = 6;
    c = &all[5].config;
    c->sample = 1;
    c->returned = 3;
    c->temperature = 0.8f;
    c->top_k = 10;
    c->top_p = 0.9f;
    c->seed_low = 17;
    all[6].config.beams = all[6].config.returned = 36;  // more candidates than a row of the head keeps
    all[7].config.beams = 5;
    all[7].config.returned = 2;
    all[7].config.attention = 1;
    all[7].eos = {};
    all[8].config.max_length = 4;
    all[8].config.forced_bos = all[8].config.forced_eos = 2;
    all[8].eos = {2};
    return all;
}

void check_search(const RandomModel& model, void* engine, const Rules& rules, const std::vector<Tokens>& sources,
                  const std::vector<Tokens>& prompts) {
    const Call whole = call(engine, rules, sources, prompts);
    require(whole.outcome == 0, whole.message.c_str());
    Rules split = rules;
    split.config.threads = 4;
    require(translate(engine, split, sources, prompts) == whole.translations, "four threads translate otherwise");
    split.config.batch_sentences = 3;
    split.config.batch_tokens = 20;
    require(translate(engine, split, sources, prompts) == whole.translations, "small batches translate otherwise");
    const int64_t width = rules.config.max_length, longest = static_cast<int64_t>(
        std::max_element(sources.begin(), sources.end(), [](auto& a, auto& b) { return a.size() < b.size(); })->size());
    for (size_t s = 0; s < sources.size(); s++) {
        const std::vector<Translated>& found = whole.translations[s];
        if (!rules.config.sample)  // whose draws depend on the place among the sentences
            require(translate(engine, rules, {sources[s]}, {prompts[s]})[0] == found, "a sentence alone translates otherwise");
        require(!found.empty() && found.size() <= static_cast<size_t>(rules.config.returned), "translations are missing");
        for (size_t i = 0; i < found.size(); i++) {
            check_rules(rules, prompts[s], found[i]);
            if (rules.config.sample) continue;
            require(i == 0 || found[i - 1].score >= found[i].score, "a worse translation stands before a better one");
            for (size_t j = 0; j < i; j++) require(found[j].tokens != found[i].tokens, "a translation comes twice");
        }
        if (model.has_reference() && rules.config.beams == 1 && !rules.config.sample)
            check_choices(model, rules, sources[s], prompts[s], found[0]);
        for (size_t i = 0; rules.config.attention && i < found.size(); i++)
            for (size_t p = prompts[s].size(); p < found[i].tokens.size(); p++) {
                const float* row = whole.attention.data() + ((static_cast<int64_t>(s) * rules.config.returned +
                                                              static_cast<int64_t>(i)) * width + static_cast<int64_t>(p)) * longest;
                require_near(std::accumulate(row, row + sources[s].size(), 0.0), 1.0,
                             model.config.bf16_activations ? 1e-2 : 1e-5, "attention does not sum to 1");
            }
        // Repetition penalties act on scores, but not on those of `score`.
        if (rules.config.sample || rules.config.repetition_penalty != 1.0f) continue;
        // Attention sums in another order there, and what is rounded behind it may fall on the other side of a half.
        const double near = model.has_reference() ? 1e-4 : 0.2;
        const std::vector<float> again = score(engine, 1, {sources[s]}, {found[0].tokens})[0];
        for (size_t p = prompts[s].size(); p < again.size(); p++) {
            const Tokens past(found[0].tokens.begin(), found[0].tokens.begin() + static_cast<int64_t>(p));
            if (forced(rules.config, past) < 0)
                require_near(double{found[0].token_scores[p]}, double{again[p]}, near, "score() says otherwise than the search");
        }
    }
}

// The best logits of each row and all logits lead to the same translations; so do greedy search and sampling that has no choice.
void check_ways(void* engine, const std::vector<Tokens>& sources, const std::vector<Tokens>& prompts) {
    for (int32_t beams : {1, 4}) {
        Rules best, all;
        best.config.beams = all.config.beams = beams;
        all.banned = {20};  // of 20 tokens: never there, but all logits are looked at
        all.banned.resize(21, 1);
        const auto first = translate(engine, best, sources, prompts), second = translate(engine, all, sources, prompts);
        for (size_t s = 0; s < sources.size(); s++)
            require_near(double{first[s][0].score}, double{second[s][0].score}, 1e-4, "all logits lead elsewhere");
        if (beams > 1) continue;
        Rules sampled;
        sampled.config.sample = 1;
        sampled.config.top_k = 1;
        const auto only = translate(engine, sampled, sources, prompts);
        sampled.config.top_k = 0;
        sampled.config.top_p = 1e-6f;
        const auto likeliest = translate(engine, sampled, sources, prompts);
        for (size_t s = 0; s < sources.size(); s++)
            require(only[s][0].tokens == second[s][0].tokens && likeliest[s][0].tokens == second[s][0].tokens,
                    "sampling of one token is not greedy");
    }
    Rules sampled;
    sampled.config.sample = 1;
    const auto first = translate(engine, sampled, sources, prompts);
    require(first == translate(engine, sampled, sources, prompts), "a seed gives two translations");
    sampled.config.seed_high = 1;
    require(first != translate(engine, sampled, sources, prompts), "seeds do not matter");
}

void check_callers(void* engine, const std::vector<Rules>& kinds, const std::vector<Tokens>& sources,
                   const std::vector<Tokens>& prompts) {
    std::vector<Translations> alone(4), together(4);
    for (size_t i = 0; i < 4; i++) alone[i] = translate(engine, kinds[i], sources, prompts);
    std::vector<std::thread> callers;
    for (size_t i = 0; i < 4; i++)
        callers.emplace_back([&, i] {
            for (int turn = 0; turn < 3; turn++) {
                Rules rules = kinds[i];
                rules.config.threads = 1 + turn;
                together[i] = translate(engine, rules, sources, prompts);
            }
        });
    for (std::thread& caller : callers) caller.join();
    require(alone == together, "callers disturb each other");
}

void check_model(int64_t number) {
    const RandomModel model(static_cast<Precision>(number % 3));
    void* engine = model.build();
    const std::vector<Tokens> sources = random_sentences({5, 1, 17, 33, 2, 16, 3}, 37);
    const std::vector<Tokens> prompts = random_sentences({1, 1, 2, 1, 3, 1, 1}, 41);
    const std::vector<Rules> kinds = kinds_of_search();
    for (size_t kind = 0; kind < kinds.size(); kind++) {
        describe("model %lld, search %zu", static_cast<long long>(number), kind);
        check_search(model, engine, kinds[kind], sources, prompts);
    }
    describe("model %lld", static_cast<long long>(number));
    check_scores(model, engine, sources, random_sentences({6, 2, 20, 1, 17, 3, 16}, 41));
    check_ways(engine, sources, prompts);
    check_callers(engine, kinds, sources, prompts);
    nms_engine_free(engine);
}

}  // namespace

int main(int count, char** arguments) {
    const int64_t models = cases_to_run(count, arguments);
    if (models < 0) return 0;
    for (int64_t number = 0; number < models; number++) check_model(number);
    std::printf("%s: translations of %lld models are right\n", nms_unit(), static_cast<long long>(models));
    return 0;
}
