// What Python hands to the engine: plain structs of 4-byte fields, which kernels/engine.py mirrors. Both begin with their
// own size, so that a library and a package of different versions refuse each other. Activations and formats are those of
// `unit.h` and `common.h`.
#pragma once
#include <atomic>
#include <cstdint>

namespace nms {

struct SideConfig {  // the encoder or the decoder
    int32_t layers;
    int32_t heads;
    int32_t head_dim;
    int32_t feed_forward;
    int32_t vocabulary;       // rows of the embedding
    int32_t positions;        // rows of the table that is added to embeddings; 0: none
    int32_t relative_reach;   // biases by distance, clamped to this; 0: none
    float embedding_scale;
    float attention_scale;    // of queries
};

struct EngineConfig {
    int32_t size;
    int32_t hidden;
    int32_t activation;
    int32_t gated;             // feed-forward: activation(gate(x)) * fc1(x)
    int32_t rms_norm;          // norms without mean and bias
    int32_t norm_first;        // norms before each block and at the end of a side, instead of behind each residual
    int32_t embedding_norm;    // a norm on the embedding
    int32_t final_norm;        // a norm at the end of each side
    int32_t bf16_activations;  // results are rounded to bf16 wherever a bf16 model of transformers rounds them
    int32_t half_cache;        // the decoder keeps keys and values in fp16
    int32_t target_vocabulary; // rows of the head
    float norm_epsilon;
    float head_scale;          // of the decoder's last state
    SideConfig encoder, decoder;
};

// Weights of products. Those of a layer by side and layer; `head` by itself.
enum WeightSlot : int32_t {
    self_q = 0, self_k = 1, self_v = 2, self_out = 3,
    cross_q = 4, cross_k = 5, cross_v = 6, cross_out = 7,
    feed_in = 8, feed_gate = 9, feed_out = 10,
    head = 11,  // layer -1
    weight_slots = 12,
};

// Tables in fp32, but for embeddings, which are fp32 or bf16, or int8 with a scale a row.
enum TableSlot : int32_t {
    self_norm = 0,       // [1 or 2][hidden]: gain and, without rms_norm, bias
    cross_norm = 1,
    feed_norm = 2,
    relative_bias = 3,   // [heads][2 * reach + 1], of self-attention; by key's position - query's, from -reach on
    embedding = 4,       // layer -1: [vocabulary][hidden]; borrowed, not copied
    position = 5,        // layer -1: [positions][hidden]
    embedding_norm_table = 6,  // layer -1
    final_norm_table = 7,      // layer -1
    table_slots = 8,
};

// Called after each step with a sentence and the first tokens of its translation, prompt included, which no later step
// changes. 0 ends the call.
using Watcher = int32_t (*)(int64_t sentence, const int32_t* tokens, int64_t count);

// What another thread sets to end a call after the step that it is at; null where nobody will.
using Stop = const std::atomic<int32_t>*;

enum EarlyStopping : int32_t { stop_if_no_better = 0, stop_when_full = 1, stop_never_early = 2 };

struct SearchConfig {
    int32_t size;
    int32_t beams;
    int32_t returned;          // hypotheses a sentence
    int32_t max_length;        // of the target with its prompt
    int32_t min_length;        // EOS is banned below it; prompt included, as transformers counts
    int32_t min_new_tokens;    // as min_length, without the prompt
    int32_t early_stopping;
    int32_t no_repeat_ngram;   // 0: off
    int32_t forced_bos;        // at length 1; -1: none
    int32_t forced_eos;        // at max_length - 1; -1: none
    int32_t sample;
    int32_t top_k;             // 0: off
    int32_t threads;
    int32_t batch_sentences;   // most sentences that are worked on together
    int32_t batch_tokens;      // and most source tokens, but for single sentences
    int32_t token_scores;      // whether log-probabilities of the tokens are wanted
    int32_t attention;         // whether weights over the source are wanted: mean over heads of the last layer
    int32_t shortlist;         // whether only the candidates of the model's shortlist are looked at
    int32_t unknown_token;     // the translation is refused as soon as a beam takes this one; -1: none
    int32_t seed_low, seed_high;
    float length_penalty;
    float repetition_penalty;  // 1: off
    float temperature;
    float top_p;               // 1: off
};

}  // namespace nms
