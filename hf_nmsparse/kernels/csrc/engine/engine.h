// Whole translations: sentences sorted into batches, batches dealt out to threads, searches fed by decoder steps.
#pragma once
#include <memory>
#include <mutex>
#include <vector>

#include "batch.h"
#include "model.h"
#include "search.h"
#include "shortlist.h"

namespace nms {

// Sentences of token ids, end to end.
struct Sentences {
    int64_t count;
    const int32_t* lengths;
    const int32_t* tokens;
};

class Engine {
  public:
    explicit Engine(const EngineConfig& config) : model(config) {}

    // The best hypotheses of each sentence, best first. `attention` of a hypothesis is a row of source weights for each
    // token behind the prompt, if the rules ask for it. `watcher` may be null; threads call it each for its own sentences.
    struct Translation {
        std::vector<Hypothesis> hypotheses;
        std::vector<std::vector<float>> attention;
    };
    std::vector<Translation> translate(const SearchRules& rules, const Sentences& sources, const Sentences& prompts,
                                       Watcher watcher, Stop stop);

    // Of translations that begin from now on and whose rules ask for it.
    void use(std::shared_ptr<const Shortlist> shortlist);

    // The log-probability of each target token given those before it; 0 for the first. Targets begin with the start
    // token. scores lie as the targets do.
    void score(int32_t threads, const Sentences& sources, const Sentences& targets, float* scores, Stop stop);

    Model model;

  private:
    class Lease;
    void check(const Sentences& sources, const Sentences& targets) const;
    std::shared_ptr<const Shortlist> shortlist_for(const SearchRules& rules);

    std::mutex mutex_;
    std::vector<std::unique_ptr<Batch>> idle_;  // of calls that have ended
    std::shared_ptr<const Shortlist> shortlist_;
};

}  // namespace nms
