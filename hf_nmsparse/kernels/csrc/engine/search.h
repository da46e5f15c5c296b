// The search for translations of one sentence, as transformers 5 does it, token by token. It sees scores, tokens and
// parents, and knows no model.
#pragma once
#include <vector>

#include "../unit.h"
#include "api.h"

namespace nms {

// What all sentences of a call have in common.
class SearchRules {
  public:
    // banned: lists one behind the other, a length and its tokens. Lists of one token are never produced, longer ones
    // never completed. begin_banned: tokens that are not produced first. Throws EngineError on what makes no sense.
    SearchRules(const SearchConfig& config, int64_t vocabulary, const int32_t* eos, int64_t eos_count,
                const int32_t* banned, int64_t banned_size, const int32_t* begin_banned, int64_t begin_banned_count);

    const SearchConfig config;
    const int64_t vocabulary;
    std::vector<int32_t> eos;
    std::vector<std::vector<int32_t>> banned_phrases;  // of two tokens and more
    bool needs_all_logits;                             // or the best ones of each row do

    bool is_eos(int32_t token) const;
    int64_t candidates() const { return config.beams == 1 ? 1 : (eos.empty() ? 2 : 1 + int64_t(eos.size())) * config.beams; }
    // Whether the head's sum of exponentials is looked at.
    bool needs_sum() const { return config.beams > 1 || config.token_scores; }
    // A bit a token that may not be produced, or null.
    const uint32_t* banned(bool eos_too, bool begin_too) const;

  private:
    std::vector<uint32_t> banned_[2][2];
    bool any_banned_[2][2];
};

struct Hypothesis {
    float score;
    std::vector<int32_t> tokens;       // with the prompt
    std::vector<float> token_scores;   // log-probabilities; 0 for the prompt
    std::vector<uint8_t> beams;        // whose row has produced each token, from the first behind the prompt on
};

class Search {
  public:
    Search(const SearchRules& rules, const int32_t* prompt, int64_t prompt_length, uint64_t seed);

    // The rows of the next step: their tokens at `position()`, and the beams whose cells hold what came before.
    int64_t rows() const { return static_cast<int64_t>(beams_.size()); }
    int64_t position() const { return position_; }
    int32_t token(int64_t row) const { return beams_[static_cast<size_t>(row)].tokens[static_cast<size_t>(position_)]; }
    const uint8_t* ancestors(int64_t row) const { return beams_[static_cast<size_t>(row)].ancestors.data(); }

    // Whether the step's logits are looked at: not within a prompt, and not where the token is forced.
    bool needs_head() const { return !in_prompt() && forced() < 0; }
    const uint32_t* banned() const;

    // Takes the step's outcome and goes on: either the best logits of each row, or all logits (which it changes), or
    // null where the head is not needed.
    void advance(const Best* best);
    void advance(float* logits, int64_t stride, const Unit& unit);

    bool is_done() const { return done_; }

    // The first tokens of what will be best, as far as all hypotheses share them: no later step changes them.
    struct Settled {
        const int32_t* tokens;
        int64_t count;
    };
    Settled settled();

    std::vector<Hypothesis> take_hypotheses() { return std::move(finished_); }

  private:
    struct Beam {
        float score;
        std::vector<int32_t> tokens;
        std::vector<float> token_scores;
        std::vector<uint8_t> ancestors;
    };
    struct Candidate {
        float score, token_score;
        int32_t beam, token;
    };

    int64_t length() const { return position_ + 1; }  // of what is there before the step's token
    bool in_prompt() const { return length() < prompt_length_; }
    int32_t forced() const;
    void process(const Beam& beam, float* scores) const;
    void choose_greedy(const Candidate& candidate);
    void choose_beams();
    void append(int32_t token);
    void finish(float score, const Beam& beam, const Candidate& candidate);
    int32_t sample(const float* scores);
    double uniform();  // in [0, 1)

    const SearchRules& rules_;
    int64_t prompt_length_, position_ = 0, settled_ = 0;
    std::vector<Beam> beams_, next_;
    std::vector<Candidate> candidates_;
    std::vector<Hypothesis> finished_;
    bool done_ = false;
    uint64_t random_;
};

}  // namespace nms
