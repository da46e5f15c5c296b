#include "engine.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <numeric>
#include <string>
#include <thread>

#include "error.h"

namespace nms {

namespace {

std::vector<int64_t> offsets(const Sentences& sentences) {
    std::vector<int64_t> at(static_cast<size_t>(sentences.count) + 1);
    for (size_t i = 0; i + 1 < at.size(); i++) at[i + 1] = at[i] + sentences.lengths[i];
    return at;
}

// The sentences of each batch: long ones first, so that threads end together and a batch holds what is alike.
std::vector<std::vector<int64_t>> batches_of(const Sentences& sources, int64_t most_sentences, int64_t most_tokens,
                                             int64_t threads) {
    std::vector<int64_t> order(static_cast<size_t>(sources.count));
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return sources.lengths[a] > sources.lengths[b]; });
    most_sentences = smaller(most_sentences, larger(1, blocks_of(sources.count, threads)));
    std::vector<std::vector<int64_t>> batches;
    int64_t tokens = 0;
    for (int64_t sentence : order) {
        const int64_t length = sources.lengths[sentence];
        if (batches.empty() || static_cast<int64_t>(batches.back().size()) == most_sentences ||
            tokens + length > most_tokens) {
            batches.emplace_back();
            tokens = 0;
        }
        batches.back().push_back(sentence);
        tokens += length;
    }
    return batches;
}

// Runs work(item) for all items on up to `threads` threads, of which the caller's is one; the first error ends it. A thread
// costs some tens of microseconds, a batch milliseconds; and a process that forks takes no pool of threads along.
template <class Make>
void spread(int64_t items, int64_t threads, const Make& make) {
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex mutex;
    const auto run = [&] {
        try {
            auto work = make();
            for (int64_t item; (item = next.fetch_add(1)) < items;) work(item);
        } catch (...) {
            const std::lock_guard<std::mutex> lock(mutex);
            if (!error) error = std::current_exception();
            next = items;
        }
    };
    const int64_t most = smaller(threads, items);
    std::vector<std::thread> others;
    others.reserve(static_cast<size_t>(larger(0, most - 1)));  // a failure later would leave threads running
    for (int64_t i = 1; i < most; i++) {
        try {
            others.emplace_back(run);
        } catch (const std::system_error&) {  // the system gives no more: those that run do the work
            break;
        }
    }
    run();
    for (std::thread& thread : others) thread.join();
    if (error) std::rethrow_exception(error);
}

const char* const ended = "the caller has ended it";

void end_if(Stop stop) {
    if (stop && stop->load(std::memory_order_relaxed)) refuse(ended);
}

void gather(const Sentences& all, const std::vector<int64_t>& at, const std::vector<int64_t>& chosen,
            std::vector<int32_t>& lengths, std::vector<int32_t>& tokens) {
    lengths.clear();
    tokens.clear();
    for (int64_t s : chosen) {
        lengths.push_back(all.lengths[s]);
        tokens.insert(tokens.end(), all.tokens + at[static_cast<size_t>(s)], all.tokens + at[static_cast<size_t>(s) + 1]);
    }
}

}  // namespace

// A batch's memory for the time of a call.
class Engine::Lease {
  public:
    Lease(Engine& engine, int64_t beams) : engine_(engine) {
        const std::lock_guard<std::mutex> lock(engine.mutex_);
        for (std::unique_ptr<Batch>& idle : engine.idle_)
            if (idle->beams() == beams) {
                batch_ = std::move(idle);
                std::swap(idle, engine.idle_.back());
                engine.idle_.pop_back();
                return;
            }
        if (!engine.idle_.empty()) engine.idle_.pop_back();  // of another number of beams: its memory is needed now
        batch_ = std::make_unique<Batch>(engine.model, beams);
    }
    Lease(Lease&&) = default;
    ~Lease() {
        if (!batch_) return;
        const std::lock_guard<std::mutex> lock(engine_.mutex_);
        engine_.idle_.push_back(std::move(batch_));
    }
    Batch& operator*() { return *batch_; }

  private:
    Engine& engine_;
    std::unique_ptr<Batch> batch_;
};

void Engine::check(const Sentences& sources, const Sentences& targets) const {
    const Side& encoder = model.encoder();
    const int32_t targets_below = model.config.target_vocabulary;
    int64_t at = 0, target = 0;
    for (int64_t i = 0; i < sources.count; i++) {
        const std::string name = "sentence " + std::to_string(i + 1);
        const int64_t length = sources.lengths[i], most = encoder.config.positions;
        if (length < 1 || length > 1 << 20) refuse(name + ": the source has " + std::to_string(length) + " tokens");
        if (most && length > most)
            refuse(name + ": the source has " + std::to_string(length) + " tokens, and the model takes " +
                   std::to_string(most) + "; split it");
        for (int64_t end = at + length; at < end; at++)
            if (sources.tokens[at] < 0 || sources.tokens[at] >= encoder.config.vocabulary)
                refuse(name + ": source tokens are below " + std::to_string(encoder.config.vocabulary) + ", got " +
                       std::to_string(sources.tokens[at]));
        if (targets.lengths[i] < 1 || targets.lengths[i] > 1 << 20)
            refuse(name + ": the target has " + std::to_string(targets.lengths[i]) + " tokens");
        for (int64_t end = target + targets.lengths[i]; target < end; target++)
            if (targets.tokens[target] < 0 || targets.tokens[target] >= targets_below)
                refuse(name + ": target tokens are below " + std::to_string(targets_below) + ", got " +
                       std::to_string(targets.tokens[target]));
    }
}

void Engine::use(std::shared_ptr<const Shortlist> shortlist) {
    const std::lock_guard<std::mutex> lock(mutex_);
    shortlist_ = std::move(shortlist);
}

// What all of a call's batches use; null where the head is computed for all tokens.
std::shared_ptr<const Shortlist> Engine::shortlist_for(const SearchRules& rules) {
    if (!rules.config.shortlist) return nullptr;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!shortlist_) refuse("search: there is no shortlist; learn one, or translate without");
    for (int32_t token : rules.eos)
        if (!shortlist_->is_always(token))
            refuse("shortlist: EOS, " + std::to_string(token) + ", is not always there; learn it anew for this model");
    const int64_t count = static_cast<int64_t>(shortlist_->always().tokens.size());
    if (count <= rules.candidates())
        refuse("shortlist: " + std::to_string(count) + " tokens are always there, and so many beams need more than " +
               std::to_string(rules.candidates()) + "; learn it anew with more");
    return shortlist_;
}

std::vector<Engine::Translation> Engine::translate(const SearchRules& rules, const Sentences& sources,
                                                   const Sentences& prompts, Watcher watcher, Stop stop) {
    check(sources, prompts);
    const SearchConfig& config = rules.config;
    const std::shared_ptr<const Shortlist> shortlist = shortlist_for(rules);
    const std::vector<int64_t> source_at = offsets(sources), prompt_at = offsets(prompts);
    const auto batches = batches_of(sources, config.batch_sentences, config.batch_tokens, config.threads);
    const uint64_t seed = static_cast<uint32_t>(config.seed_low) | uint64_t{static_cast<uint32_t>(config.seed_high)} << 32;
    // Sampling returns searches of their own; beams return the best of one.
    const int64_t runs = config.sample ? config.returned : 1;
    std::vector<Translation> translations(static_cast<size_t>(sources.count));

    const auto make = [&] {
        return [&, lease = Lease(*this, config.beams), lengths = std::vector<int32_t>(), tokens = std::vector<int32_t>(),
                rows = std::vector<DecoderRow>(), best = std::vector<Best>()](int64_t item) mutable {
            const std::vector<int64_t>& chosen = batches[static_cast<size_t>(item)];
            Batch& batch = *lease;
            gather(sources, source_at, chosen, lengths, tokens);
            const bool attention = config.attention != 0;
            batch.encode(static_cast<int64_t>(chosen.size()), lengths.data(), tokens.data(), config.max_length, attention,
                         shortlist.get());
            for (int64_t run = 0; run < runs; run++) {
                std::vector<Search> searches;
                std::vector<std::vector<float>> watched(chosen.size());  // [position][beam][source length]
                std::vector<size_t> active;
                for (size_t i = 0; i < chosen.size(); i++) {
                    const size_t s = static_cast<size_t>(chosen[i]);
                    searches.emplace_back(rules, prompts.tokens + prompt_at[s], prompts.lengths[s],
                                          seed + static_cast<uint64_t>(chosen[i] * runs + run) * 0x9e3779b97f4a7c15u);
                    active.push_back(i);
                }
                while (!active.empty()) {
                    end_if(stop);
                    rows.clear();
                    bool head = false;
                    for (size_t i : active) {
                        const Search& search = searches[i];
                        head |= search.needs_head();
                        for (int64_t b = 0; b < search.rows(); b++)
                            rows.push_back({static_cast<int64_t>(i), search.token(b), search.position(), b,
                                            search.ancestors(b)});
                    }
                    batch.step(rows);
                    if (attention)
                        for (size_t r = 0; r < rows.size(); r++) {
                            std::vector<float>& kept = watched[static_cast<size_t>(rows[r].sentence)];
                            const int64_t width = lengths[static_cast<size_t>(rows[r].sentence)];
                            const int64_t at = (rows[r].position * config.beams + rows[r].beam) * width;
                            kept.resize(static_cast<size_t>(larger(static_cast<int64_t>(kept.size()), at + width)));
                            std::copy_n(batch.attention(static_cast<int64_t>(r)), width, kept.begin() + at);
                        }
                    float* logits = nullptr;
                    if (head && rules.needs_all_logits) logits = batch.head_logits();
                    if (head && !rules.needs_all_logits) {
                        best.resize(rows.size());
                        size_t r = 0;
                        for (size_t i : active)
                            for (int64_t b = 0; b < searches[i].rows(); b++, r++) {
                                std::fill(std::begin(best[r].sum), std::end(best[r].sum), 0.0f);
                                best[r].reference = best[r].least = -1e30f;
                                best[r].count = 0;
                                best[r].keep = static_cast<int32_t>(rules.candidates());
                                best[r].banned = searches[i].banned();
                            }
                        batch.head_best(best.data(), rules.needs_sum());
                    }
                    size_t kept = 0, r = 0;
                    for (size_t i : active) {
                        Search& search = searches[i];
                        const size_t own = static_cast<size_t>(search.rows());
                        if (logits && search.needs_head())
                            search.advance(logits + static_cast<int64_t>(r) * batch.logits_stride(),
                                           batch.logits_stride(), model.unit);
                        else
                            search.advance(head && !logits ? best.data() + r : nullptr);
                        r += own;
                        if (watcher) {
                            const Search::Settled settled = search.settled();
                            if (!watcher(chosen[i], settled.tokens, settled.count)) refuse(ended);
                        }
                        if (search.is_done())
                            batch.release(static_cast<int64_t>(i));
                        else
                            active[kept++] = i;
                    }
                    active.resize(kept);
                }
                for (size_t i = 0; i < chosen.size(); i++) {
                    Translation& translation = translations[static_cast<size_t>(chosen[i])];
                    std::vector<Hypothesis> found = searches[i].take_hypotheses();
                    if (static_cast<int64_t>(found.size()) > config.returned)
                        found.resize(static_cast<size_t>(config.returned));
                    for (Hypothesis& hypothesis : found) {
                        if (attention) {
                            const int64_t width = lengths[i], first = prompts.lengths[chosen[i]] - 1;
                            std::vector<float> weights;
                            for (int64_t p = first; p < static_cast<int64_t>(hypothesis.beams.size()); p++) {
                                const int64_t at = (p * config.beams + hypothesis.beams[static_cast<size_t>(p)]) * width;
                                weights.insert(weights.end(), watched[i].begin() + at, watched[i].begin() + at + width);
                            }
                            translation.attention.push_back(std::move(weights));
                        }
                        translation.hypotheses.push_back(std::move(hypothesis));
                    }
                }
            }
        };
    };
    spread(static_cast<int64_t>(batches.size()), config.threads, make);
    return translations;
}

void Engine::score(int32_t threads, const Sentences& sources, const Sentences& targets, float* scores, Stop stop) {
    constexpr int64_t batch_sentences = 64, batch_tokens = 4096;
    if (threads < 1) refuse("score: threads are 1 or more, got " + std::to_string(threads));
    check(sources, targets);
    const std::vector<int64_t> source_at = offsets(sources), target_at = offsets(targets);
    const auto batches = batches_of(sources, batch_sentences, batch_tokens, threads);
    const auto make = [&] {
        return [&, lease = Lease(*this, 1), lengths = std::vector<int32_t>(), tokens = std::vector<int32_t>(),
                rows = std::vector<DecoderRow>()](int64_t item) mutable {
            const std::vector<int64_t>& chosen = batches[static_cast<size_t>(item)];
            Batch& batch = *lease;
            gather(sources, source_at, chosen, lengths, tokens);
            int64_t longest = 0;
            for (int64_t s : chosen) longest = larger(longest, targets.lengths[s]);
            batch.encode(static_cast<int64_t>(chosen.size()), lengths.data(), tokens.data(), longest, false, nullptr);
            const std::vector<uint8_t> ancestors(static_cast<size_t>(longest));
            for (int64_t s : chosen) scores[target_at[static_cast<size_t>(s)]] = 0.0f;
            for (int64_t p = 0; p + 1 < longest; p++) {
                end_if(stop);
                rows.clear();
                for (size_t i = 0; i < chosen.size(); i++) {
                    const int64_t s = chosen[i], at = target_at[static_cast<size_t>(s)];
                    if (p + 1 < targets.lengths[s])
                        rows.push_back({static_cast<int64_t>(i), targets.tokens[at + p], p, 0, ancestors.data()});
                    else if (p + 1 == targets.lengths[s])
                        batch.release(static_cast<int64_t>(i));
                }
                batch.step(rows);
                const float* logits = batch.head_logits();
                for (const DecoderRow& row : rows) {
                    const int64_t at = target_at[static_cast<size_t>(chosen[static_cast<size_t>(row.sentence)])] + p + 1;
                    scores[at] = logits[targets.tokens[at]] - model.unit.log_sum(logits, model.config.target_vocabulary);
                    logits += batch.logits_stride();
                }
            }
        };
    };
    spread(static_cast<int64_t>(batches.size()), threads, make);
}

}  // namespace nms
