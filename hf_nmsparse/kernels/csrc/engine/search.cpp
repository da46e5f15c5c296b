#include "search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "error.h"

namespace nms {

namespace {

constexpr float never = -std::numeric_limits<float>::infinity();

void check_token(const char* what, int64_t token, int64_t vocabulary) {
    if (token < 0 || token >= vocabulary)
        refuse(std::string("search: ") + what + " are tokens below " + std::to_string(vocabulary) + ", got " +
               std::to_string(token));
}

void check_number(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most)
        refuse(std::string("search: ") + name + " is " + std::to_string(least) + " to " + std::to_string(most) +
               ", got " + std::to_string(value));
}

void set_bit(std::vector<uint32_t>& bits, int32_t token) {
    bits[static_cast<size_t>(token) >> 5] |= 1u << (token & 31);
}

}  // namespace

// ---- rules ----------------------------------------------------------------------------------------------------------

SearchRules::SearchRules(const SearchConfig& given, int64_t tokens, const int32_t* eos_tokens, int64_t eos_count,
                         const int32_t* banned_lists, int64_t banned_size, const int32_t* begin_banned,
                         int64_t begin_banned_count)
    : config(given), vocabulary(tokens) {
    check_number("size", given.size, sizeof(SearchConfig), sizeof(SearchConfig));
    check_number("beams", given.beams, 1, 255);
    check_number("returned", given.returned, 1, given.sample ? 255 : given.beams);
    check_number("max_length", given.max_length, 2, 1 << 20);
    check_number("early_stopping", given.early_stopping, 0, 2);
    check_number("no_repeat_ngram", given.no_repeat_ngram, 0, 1 << 20);
    check_number("threads", given.threads, 1, 1024);
    check_number("batch_sentences", given.batch_sentences, 1, 1 << 20);
    check_number("batch_tokens", given.batch_tokens, 1, 1 << 30);
    check_number("shortlist", given.shortlist, 0, 1);
    check_number("number of EOS tokens", eos_count, 0, 64);
    if (given.forced_bos >= 0) check_token("forced_bos", given.forced_bos, tokens);
    if (given.forced_eos >= 0) check_token("forced_eos", given.forced_eos, tokens);
    if (!(given.repetition_penalty > 0.0f) || !std::isfinite(given.repetition_penalty))
        refuse("search: repetition_penalty is above 0");
    const double most = std::pow(double(given.max_length), double(given.length_penalty));  // that scores are divided by
    if (!(most >= double{std::numeric_limits<float>::min()} && most <= double{std::numeric_limits<float>::max()}))
        refuse("search: length_penalty is too far from 0 for translations of " + std::to_string(given.max_length) +
               " tokens");
    if (given.sample) {
        if (given.beams != 1) refuse("search: sampling takes one beam");
        if (!(given.temperature > 0.0f) || !std::isfinite(given.temperature)) refuse("search: temperature is above 0");
        if (!(given.top_p > 0.0f && given.top_p <= 1.0f)) refuse("search: top_p is above 0 and at most 1");
        check_number("top_k", given.top_k, 0, 1 << 30);
    }
    for (int64_t i = 0; i < eos_count; i++) {
        check_token("EOS", eos_tokens[i], tokens);
        eos.push_back(eos_tokens[i]);
    }
    if (candidates() > given.beams * tokens) refuse("search: the vocabulary is too small for so many beams");

    const size_t words = static_cast<size_t>((tokens + 31) / 32);
    std::vector<uint32_t> always(words);
    bool any = false;
    for (int64_t i = 0; i < banned_size;) {
        const int64_t length = banned_lists[i++];
        if (length < 1 || length > banned_size - i) refuse("search: banned lists are lengths and their tokens");
        for (int64_t j = 0; j < length; j++) check_token("banned", banned_lists[i + j], tokens);
        if (length == 1) {
            set_bit(always, banned_lists[i]);
            any = true;
        } else
            banned_phrases.emplace_back(banned_lists + i, banned_lists + i + length);
        i += length;
    }
    for (int with_eos = 0; with_eos < 2; with_eos++)
        for (int with_begin = 0; with_begin < 2; with_begin++) {
            std::vector<uint32_t>& bits = banned_[with_eos][with_begin] = always;
            if (with_eos)
                for (int32_t token : eos) set_bit(bits, token);
            for (int64_t i = 0; with_begin && i < begin_banned_count; i++) {
                check_token("begin-banned", begin_banned[i], tokens);
                set_bit(bits, begin_banned[i]);
            }
            any_banned_[with_eos][with_begin] =
                any || (with_eos && !eos.empty()) || (with_begin && begin_banned_count > 0);
        }
    needs_all_logits = given.sample || given.no_repeat_ngram > 0 || given.repetition_penalty != 1.0f ||
                       !banned_phrases.empty() || candidates() > Best::most;
}

bool SearchRules::is_eos(int32_t token) const { return std::find(eos.begin(), eos.end(), token) != eos.end(); }

const uint32_t* SearchRules::banned(bool eos_too, bool begin_too) const {
    return any_banned_[eos_too][begin_too] ? banned_[eos_too][begin_too].data() : nullptr;
}

// ---- one sentence ---------------------------------------------------------------------------------------------------

Search::Search(const SearchRules& rules, const int32_t* prompt, int64_t prompt_length, uint64_t seed)
    : rules_(rules), prompt_length_(prompt_length), random_(seed) {
    if (prompt_length < 1 || prompt_length >= rules.config.max_length)
        refuse("search: a prompt has 1 to max_length - 1 = " + std::to_string(rules.config.max_length - 1) +
               " tokens, got " + std::to_string(prompt_length));
    for (int64_t i = 0; i < prompt_length; i++) check_token("prompts", prompt[i], rules.vocabulary);
    beams_.push_back({0.0f, {prompt, prompt + prompt_length}, {}, {}});
    beams_[0].token_scores.assign(static_cast<size_t>(prompt_length), 0.0f);
}

int32_t Search::forced() const {
    if (in_prompt()) return -1;
    const SearchConfig& config = rules_.config;
    if (config.forced_eos >= 0 && length() == config.max_length - 1) return config.forced_eos;
    if (config.forced_bos >= 0 && length() == 1) return config.forced_bos;
    return -1;
}

const uint32_t* Search::banned() const {
    const SearchConfig& config = rules_.config;
    const bool too_short = length() < config.min_length || length() < prompt_length_ + config.min_new_tokens;
    const bool moved = prompt_length_ == 1 && config.forced_bos >= 0;  // the first token that is free
    return rules_.banned(too_short, length() == prompt_length_ + (moved ? 1 : 0));
}

void Search::process(const Beam& beam, float* scores) const {
    const SearchConfig& config = rules_.config;
    const std::vector<int32_t>& past = beam.tokens;
    if (config.repetition_penalty != 1.0f) {
        std::vector<int32_t> seen = past;
        std::sort(seen.begin(), seen.end());
        seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
        for (int32_t token : seen) {
            float& score = scores[token];
            score = score < 0.0f ? score * config.repetition_penalty : score / config.repetition_penalty;
        }
    }
    const size_t n = static_cast<size_t>(config.no_repeat_ngram);
    if (n > 0 && past.size() + 1 >= n)
        for (size_t i = 0; i + n <= past.size(); i++)
            if (std::equal(past.end() - static_cast<int64_t>(n) + 1, past.end(), past.begin() + static_cast<int64_t>(i)))
                scores[past[i + n - 1]] = never;
    for (const std::vector<int32_t>& phrase : rules_.banned_phrases)
        if (phrase.size() <= past.size() &&
            std::equal(phrase.begin(), phrase.end() - 1, past.end() - static_cast<int64_t>(phrase.size()) + 1))
            scores[phrase.back()] = never;
    if (const uint32_t* bits = banned())
        for (int64_t token = 0; token < rules_.vocabulary; token++)
            if (bits[token >> 5] >> (token & 31) & 1) scores[token] = never;
}

void Search::append(int32_t token) {
    for (Beam& beam : beams_) {
        beam.ancestors.push_back(static_cast<uint8_t>(&beam - beams_.data()));
        if (token >= 0) {
            beam.tokens.push_back(token);
            beam.token_scores.push_back(0.0f);
        }
    }
    position_++;
}

void Search::advance(const Best* best) {
    if (in_prompt()) return append(-1);
    candidates_.clear();
    const int32_t token = forced();
    const bool greedy = rules_.config.beams == 1;
    for (int32_t b = 0; b < static_cast<int32_t>(beams_.size()); b++) {
        const Beam& beam = beams_[static_cast<size_t>(b)];
        if (token >= 0) {
            candidates_.push_back({beam.score, 0.0f, b, token});
            continue;
        }
        const Best& row = best[b];
        float total = 0.0f;
        for (float lane : row.sum) total += lane;
        const float log_total = std::log(total);
        for (int32_t i = 0; i < row.count; i++) {
            const float score = rules_.needs_sum() ? row.logit[i] - row.reference - log_total : 0.0f;
            candidates_.push_back({score + beam.score, score, b, row.token[i]});
        }
    }
    if (!greedy) return choose_beams();
    choose_greedy(candidates_.empty() ? Candidate{never, never, 0, 0} : candidates_[0]);
}

void Search::advance(float* logits, int64_t stride, const Unit& unit) {
    candidates_.clear();
    const size_t wanted = static_cast<size_t>(rules_.candidates());
    const int64_t vocabulary = rules_.vocabulary;
    const auto better = [](const Candidate& a, const Candidate& b) {
        return a.score != b.score ? a.score > b.score : a.token < b.token;
    };
    for (int32_t b = 0; b < static_cast<int32_t>(beams_.size()); b++, logits += stride) {
        const Beam& beam = beams_[static_cast<size_t>(b)];
        const float log_total = unit.log_sum(logits, vocabulary);
        if (rules_.config.beams == 1) {
            process(beam, logits);
            const int32_t token = rules_.config.sample
                                      ? sample(logits)
                                      : static_cast<int32_t>(std::max_element(logits, logits + vocabulary) - logits);
            return choose_greedy({0.0f, logits[token] - log_total, b, token});
        }
        for (int64_t token = 0; token < vocabulary; token++) logits[token] -= log_total;
        process(beam, logits);
        const size_t before = candidates_.size();
        float least = never;  // of the ones that are kept, once they are all there
        for (int64_t token = 0; token < vocabulary; token++) {
            const float score = logits[token] + beam.score;
            if (!(score > least)) continue;
            candidates_.push_back({score, logits[token], b, static_cast<int32_t>(token)});
            if (candidates_.size() - before < 2 * wanted) continue;
            const auto from = candidates_.begin() + static_cast<int64_t>(before);
            std::nth_element(from, from + static_cast<int64_t>(wanted) - 1, candidates_.end(), better);
            candidates_.resize(before + wanted);
            least = candidates_.back().score;
        }
    }
    choose_beams();
}

// Splitmix64: what one sentence draws does not depend on another.
double Search::uniform() {
    uint64_t z = random_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return static_cast<double>((z ^ z >> 31) >> 11) * 0x1p-53;
}

int32_t Search::sample(const float* scores) {
    const SearchConfig& config = rules_.config;
    std::vector<std::pair<float, int32_t>> tokens;
    for (int64_t token = 0; token < rules_.vocabulary; token++)
        if (scores[token] > never) tokens.push_back({scores[token] / config.temperature, static_cast<int32_t>(token)});
    if (tokens.empty()) return 0;
    std::sort(tokens.begin(), tokens.end(), [](const auto& a, const auto& b) {
        return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    if (config.top_k > 0 && static_cast<size_t>(config.top_k) < tokens.size())
        tokens.resize(static_cast<size_t>(config.top_k));
    double total = 0.0;
    std::vector<double> weights;
    for (const auto& [score, token] : tokens) total += weights.emplace_back(std::exp(double(score) - tokens[0].first));
    // The smallest set of the likeliest tokens whose probabilities reach top_p.
    double reached = 0.0;
    size_t kept = 0;
    while (kept < weights.size() && (kept == 0 || reached < config.top_p * total)) reached += weights[kept++];
    double left = reached * uniform();
    for (size_t i = 0; i < kept; i++)
        if ((left -= weights[i]) < 0.0) return tokens[i].second;
    return tokens[kept - 1].second;
}

Search::Settled Search::settled() {
    const std::vector<int32_t>& first = finished_.empty() ? beams_[0].tokens : finished_[0].tokens;
    const auto shared = [&](const auto& hypotheses) {
        const size_t at = static_cast<size_t>(settled_);
        return std::all_of(hypotheses.begin(), hypotheses.end(), [&](const auto& hypothesis) {
            return at < hypothesis.tokens.size() && hypothesis.tokens[at] == first[at];
        });
    };
    if (done_) settled_ = static_cast<int64_t>(first.size());
    while (settled_ < static_cast<int64_t>(first.size()) && shared(beams_) && shared(finished_)) settled_++;
    return {first.data(), settled_};
}

void Search::choose_greedy(const Candidate& candidate) {
    Beam& beam = beams_[0];
    beam.ancestors.push_back(0);
    beam.tokens.push_back(candidate.token);
    beam.token_scores.push_back(candidate.token_score);
    beam.score += candidate.token_score;
    position_++;
    done_ = rules_.is_eos(candidate.token) || length() >= rules_.config.max_length;
    if (done_) {
        const float produced = static_cast<float>(length() - prompt_length_);
        finished_.push_back({beam.score / std::pow(produced, rules_.config.length_penalty), beam.tokens,
                             beam.token_scores, beam.ancestors});
    } else if (candidate.token == rules_.config.unknown_token)
        throw EngineError(unable, "the model has produced a token that transformers counts as padding");
}

void Search::finish(float score, const Beam& beam, const Candidate& candidate) {
    const size_t most = static_cast<size_t>(rules_.config.beams);
    size_t at = finished_.size();
    while (at > 0 && finished_[at - 1].score < score) at--;
    if (at >= most) return;
    Hypothesis hypothesis{score, beam.tokens, beam.token_scores, beam.ancestors};
    hypothesis.tokens.push_back(candidate.token);
    hypothesis.token_scores.push_back(candidate.token_score);
    hypothesis.beams.push_back(static_cast<uint8_t>(candidate.beam));
    finished_.insert(finished_.begin() + static_cast<int64_t>(at), std::move(hypothesis));
    if (finished_.size() > most) finished_.pop_back();
}

void Search::choose_beams() {
    const SearchConfig& config = rules_.config;
    const size_t beams = static_cast<size_t>(config.beams);
    const size_t wanted = std::min(candidates_.size(), static_cast<size_t>(rules_.candidates()));
    std::partial_sort(candidates_.begin(), candidates_.begin() + static_cast<int64_t>(wanted), candidates_.end(),
                      [](const Candidate& a, const Candidate& b) {
                          if (a.score != b.score) return a.score > b.score;
                          return a.beam != b.beam ? a.beam < b.beam : a.token < b.token;
                      });
    candidates_.resize(wanted);

    const bool last = length() + 1 >= config.max_length;
    const double produced = static_cast<double>(length() + 1 - prompt_length_);
    const float divisor = static_cast<float>(std::pow(produced, static_cast<double>(config.length_penalty)));
    size_t used = 0;
    for (size_t i = 0; i < wanted; i++) {
        const Candidate& candidate = candidates_[i];
        if (!(candidate.score > never)) break;
        const Beam& parent = beams_[static_cast<size_t>(candidate.beam)];
        if (last || rules_.is_eos(candidate.token)) {
            // Only a candidate among the best `beams` may finish; the others are there so that enough go on.
            if (i < beams) finish(candidate.score / divisor, parent, candidate);
            continue;
        }
        if (used == beams) continue;
        if (candidate.token == config.unknown_token)
            throw EngineError(unable, "the model has produced a token that transformers counts as padding");
        if (used == next_.size()) next_.emplace_back();
        Beam& beam = next_[used++];  // whose memory is used again
        beam = parent;
        beam.score = candidate.score;
        beam.tokens.push_back(candidate.token);
        beam.token_scores.push_back(candidate.token_score);
        beam.ancestors.push_back(static_cast<uint8_t>(candidate.beam));
    }
    next_.resize(used);
    std::swap(beams_, next_);
    position_++;
    if (last || beams_.empty()) {
        done_ = true;
        return;
    }
    if (finished_.size() < beams) return;
    if (config.early_stopping == stop_when_full) {
        done_ = true;
        return;
    }
    double best_length = static_cast<double>(length() - prompt_length_);
    if (config.early_stopping == stop_never_early && config.length_penalty > 0.0f)
        best_length = static_cast<double>(config.max_length - prompt_length_);
    const float most = beams_[0].score / static_cast<float>(std::pow(best_length, double(config.length_penalty)));
    done_ = !(most > finished_.back().score);
}

}  // namespace nms
