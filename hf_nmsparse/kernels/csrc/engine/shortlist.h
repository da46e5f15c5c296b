// Which target tokens go with a source: a list for each source token, and the tokens that are always there. The head is
// then computed for those alone.
#pragma once
#include <vector>

#include "memory.h"
#include "model.h"

namespace nms {

// Some rows of the head, as a weight of their own.
struct HeadRows {
    std::vector<int32_t> tokens;  // ascending; the row of the head that each row here is
    Weight weight;

    // Takes the rows of `tokens` from the head of `model`.
    void gather(const Model& model);

  private:
    Arena memory_;
};

class Shortlist {
  public:
    // offsets: [source_tokens + 1], where the list of each source token begins in `ids`. Throws EngineError on what does
    // not fit the model.
    Shortlist(const Model& model, const int64_t* offsets, int64_t source_tokens, const int32_t* ids, int64_t id_count,
              const int32_t* always, int64_t always_count);

    const HeadRows& always() const { return always_; }
    bool is_always(int32_t token) const { return bits_[static_cast<size_t>(token) >> 5] >> (token & 31) & 1; }
    // The candidates of a source that are not always there, ascending.
    void find(const int32_t* source, int64_t length, std::vector<int32_t>& tokens) const;

  private:
    std::vector<int64_t> offsets_;
    std::vector<int32_t> ids_;
    std::vector<uint32_t> bits_;  // of the tokens that are always there
    HeadRows always_;
};

}  // namespace nms
