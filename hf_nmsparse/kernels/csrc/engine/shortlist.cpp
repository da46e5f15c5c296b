#include "shortlist.h"

#include <algorithm>
#include <string>

#include "error.h"

namespace nms {

namespace {

void make_set(std::vector<int32_t>& tokens) {
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
}

void check_tokens(const char* what, const int32_t* tokens, int64_t count, int64_t vocabulary) {
    for (int64_t i = 0; i < count; i++)
        if (tokens[i] < 0 || tokens[i] >= vocabulary)
            refuse(std::string("shortlist: ") + what + " holds target tokens below " + std::to_string(vocabulary) +
                   ", got " + std::to_string(tokens[i]) + "; learn it anew for this model");
}

}  // namespace

void HeadRows::gather(const Model& model) {
    const Weight& head = model.head_weight;
    const int64_t count = static_cast<int64_t>(tokens.size());
    weight.format = head.format;
    weight.out = count;
    weight.in = head.in;
    if (!count) return;
    const int64_t bytes = model.unit.packed_bytes(head.format, count, head.in);
    memory_.reserve(Arena::room<uint8_t>(bytes));
    uint8_t* packed = memory_.take<uint8_t>(bytes);
    model.unit.gather(head.format, head.out, head.in, head.packed, tokens.data(), count, packed);
    weight.packed = packed;
    weight.bias_apart = head.bias_apart;
    weight.bias.assign(head.bias.empty() ? 0 : static_cast<size_t>(padded(count, 64)), 0.0f);
    for (size_t i = 0; i < tokens.size() && !head.bias.empty(); i++)
        weight.bias[i] = head.bias[static_cast<size_t>(tokens[i])];
}

Shortlist::Shortlist(const Model& model, const int64_t* offsets, int64_t source_tokens, const int32_t* ids,
                     int64_t id_count, const int32_t* always, int64_t always_count)
    : offsets_(offsets, offsets + larger(0, source_tokens + 1)),
      ids_(ids, ids + larger(0, id_count)),
      bits_(static_cast<size_t>(blocks_of(model.config.target_vocabulary, 32))) {
    const int64_t sources = model.encoder().config.vocabulary, targets = model.config.target_vocabulary;
    if (source_tokens != sources)
        refuse("shortlist: it is of " + std::to_string(source_tokens) + " source tokens, and the model has " +
               std::to_string(sources) + "; learn it anew for this model");
    if (offsets_.front() != 0 || offsets_.back() != id_count || !std::is_sorted(offsets_.begin(), offsets_.end()))
        refuse("shortlist: offsets rise from 0 to the number of ids, " + std::to_string(id_count));
    check_tokens("a list", ids, id_count, targets);
    check_tokens("the list of what is always there", always, always_count, targets);
    if (always_count < 1) refuse("shortlist: no token is always there");
    always_.tokens.assign(always, always + always_count);
    make_set(always_.tokens);
    always_.gather(model);
    for (int32_t token : always_.tokens) bits_[static_cast<size_t>(token) >> 5] |= 1u << (token & 31);
}

void Shortlist::find(const int32_t* source, int64_t length, std::vector<int32_t>& tokens) const {
    tokens.clear();
    for (int64_t i = 0; i < length; i++) {
        const size_t at = static_cast<size_t>(source[i]);
        for (int64_t j = offsets_[at]; j < offsets_[at + 1]; j++)
            if (!is_always(ids_[static_cast<size_t>(j)])) tokens.push_back(ids_[static_cast<size_t>(j)]);
    }
    make_set(tokens);
}

}  // namespace nms
