// The weights of a model, as Python hands them over: packed weights and embeddings are borrowed, the rest is copied.
#pragma once
#include <string>
#include <vector>

#include "../runtime.h"
#include "api.h"

namespace nms {

struct Weight {
    Format format = formats;  // until it is set
    int64_t out = 0, in = 0;
    const uint8_t* packed = nullptr;  // behind the header
    std::vector<float> bias;          // padded to whole blocks; empty: none
    bool bias_apart = false;          // a bf16 model rounds the sums before it adds the bias

    bool is_set() const { return packed != nullptr; }
};

struct Table {
    Number number = fp32;
    int64_t rows = 0, columns = 0;
    const void* data = nullptr;
    const float* scale = nullptr;  // of the rows of int8
    std::vector<float> own;

    bool is_set() const { return data != nullptr; }
    const float* row(int64_t i) const { return static_cast<const float*>(data) + i * columns; }
};

struct Layer {
    Weight weights[weight_slots];
    Table tables[table_slots];
};

struct Side {
    SideConfig config{};
    std::vector<Layer> layers;
    Table tables[table_slots];

    int64_t inner() const { return int64_t{config.heads} * config.head_dim; }
};

enum SideIndex : int32_t { encoder_side = 0, decoder_side = 1 };

class Model {
  public:
    // Throws EngineError on a config that makes no sense.
    explicit Model(const EngineConfig& config);

    void set_weight(int32_t side, int32_t layer, int32_t slot, int32_t format, int64_t out, int64_t in,
                    const uint8_t* packed, int64_t bytes, const float* bias);
    void set_table(int32_t side, int32_t layer, int32_t slot, int32_t number, int64_t rows, int64_t columns,
                   const void* data, const float* scale);
    // Throws EngineError that names what is missing.
    void check_complete() const;

    const EngineConfig config;
    const Unit& unit;
    Side sides[2];
    Weight head_weight;

    const Side& encoder() const { return sides[encoder_side]; }
    const Side& decoder() const { return sides[decoder_side]; }

  private:
    struct Shape {
        int64_t first, second;
    };
    // Of a weight, [out, in]; of a table, [rows, columns]. -1 where this model has no such thing.
    Shape weight_shape(int32_t side, int32_t layer, int32_t slot) const;
    Shape table_shape(int32_t side, int32_t layer, int32_t slot) const;
    Layer& layer_of(int32_t side, int32_t layer, const std::string& what);
};

}  // namespace nms
