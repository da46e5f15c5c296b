#include "model.h"

#include <cmath>

#include "error.h"

namespace nms {

namespace {

constexpr int64_t largest = 1 << 24;  // of any size in a config: products of two fit 64 bits by far

const char* const weight_names[weight_slots] = {"self_q",  "self_k",    "self_v",  "self_out",  "cross_q",  "cross_k",
                                                "cross_v", "cross_out", "feed_in", "feed_gate", "feed_out", "head"};
const char* const table_names[table_slots] = {"self_norm", "cross_norm", "feed_norm",      "relative_bias",
                                              "embedding", "position",   "embedding_norm", "final_norm"};

std::string place(int32_t side, int32_t layer, const char* name) {
    std::string text = side == encoder_side ? "encoder" : "decoder";
    if (layer >= 0) text += " layer " + std::to_string(layer);
    return text + " " + name;
}

std::string shape_text(int64_t a, int64_t b) { return "[" + std::to_string(a) + ", " + std::to_string(b) + "]"; }

void check_number(const char* name, int64_t value, int64_t least, int64_t most) {
    if (value < least || value > most)
        refuse(std::string("config: ") + name + " is " + std::to_string(least) + " to " + std::to_string(most) +
               ", got " + std::to_string(value));
}

void check_finite(const char* name, float value) {
    if (!std::isfinite(value)) refuse(std::string("config: ") + name + " is not finite");
}

}  // namespace

Model::Model(const EngineConfig& given) : config(given), unit(unit_in_use()) {
    check_number("size", given.size, sizeof(EngineConfig), sizeof(EngineConfig));
    check_number("hidden", given.hidden, 1, 1 << 16);
    check_number("activation", given.activation, 0, activations - 1);
    check_finite("norm_epsilon", given.norm_epsilon);
    check_finite("head_scale", given.head_scale);
    for (int32_t i = 0; i < 2; i++) {
        const SideConfig& side = i == encoder_side ? given.encoder : given.decoder;
        check_number("layers", side.layers, 1, 1024);
        check_number("heads", side.heads, 1, 1024);
        check_number("head_dim", side.head_dim, 1, 1024);
        check_number("heads * head_dim", int64_t{side.heads} * side.head_dim, 1, 1 << 16);
        check_number("feed_forward", side.feed_forward, 1, 1 << 18);
        check_number("vocabulary", side.vocabulary, 1, largest);
        check_number("positions", side.positions, 0, largest);
        check_number("relative_reach", side.relative_reach, 0, 1 << 16);
        check_finite("embedding_scale", side.embedding_scale);
        check_finite("attention_scale", side.attention_scale);
        sides[i].config = side;
        sides[i].layers.resize(static_cast<size_t>(side.layers));
    }
    check_number("target_vocabulary", given.target_vocabulary, 2, given.decoder.vocabulary);  // what is produced is looked up
}

Layer& Model::layer_of(int32_t side, int32_t layer, const std::string& what) {
    if (side < 0 || side > 1 || layer < 0 || layer >= sides[side].config.layers)
        refuse(what + ": there is no layer " + std::to_string(layer) + " of side " + std::to_string(side));
    return sides[side].layers[static_cast<size_t>(layer)];
}

Model::Shape Model::weight_shape(int32_t side, int32_t layer, int32_t slot) const {
    const Side& s = sides[side];
    const int64_t hidden = config.hidden, inner = s.inner(), feed = s.config.feed_forward;
    if (layer < 0) return slot == head && side == decoder_side ? Shape{config.target_vocabulary, hidden} : Shape{-1, -1};
    switch (slot) {
        case self_q:
        case self_k:
        case self_v: return {inner, hidden};
        case self_out: return {hidden, inner};
        case cross_q:
        case cross_k:
        case cross_v: return side == decoder_side ? Shape{inner, hidden} : Shape{-1, -1};
        case cross_out: return side == decoder_side ? Shape{hidden, inner} : Shape{-1, -1};
        case feed_in: return {feed, hidden};
        case feed_gate: return config.gated ? Shape{feed, hidden} : Shape{-1, -1};
        case feed_out: return {hidden, feed};
        default: return {-1, -1};
    }
}

Model::Shape Model::table_shape(int32_t side, int32_t layer, int32_t slot) const {
    const Side& s = sides[side];
    const Shape norm{config.rms_norm ? 1 : 2, config.hidden}, none{-1, -1};
    if (layer < 0) {
        switch (slot) {
            case embedding: return {s.config.vocabulary, config.hidden};
            case position: return s.config.positions ? Shape{s.config.positions, config.hidden} : none;
            case embedding_norm_table: return config.embedding_norm ? norm : none;
            case final_norm_table: return config.final_norm ? norm : none;
            default: return none;
        }
    }
    switch (slot) {
        case self_norm:
        case feed_norm: return norm;
        case cross_norm: return side == decoder_side ? norm : none;
        case relative_bias:
            return s.config.relative_reach ? Shape{s.config.heads, 2 * int64_t{s.config.relative_reach} + 1} : none;
        default: return none;
    }
}

void Model::set_weight(int32_t side, int32_t layer, int32_t slot, int32_t format, int64_t out, int64_t in,
                       const uint8_t* packed, int64_t bytes, const float* bias) {
    if (slot < 0 || slot >= weight_slots) refuse("weight: there is no slot " + std::to_string(slot));
    const bool is_head = slot == head && layer == -1 && side == decoder_side;
    Weight& weight = is_head ? head_weight : layer_of(side, layer, weight_names[slot]).weights[slot];
    const std::string name = place(side, layer, weight_names[slot]);
    const Shape shape = weight_shape(side, layer, slot);
    if (shape.first < 0) refuse(name + ": this model has no such weight");
    if (shape.first != out || shape.second != in)
        refuse(name + ": it is " + shape_text(shape.first, shape.second) + ", got " + shape_text(out, in));
    if (format < 0 || format >= formats) refuse(name + ": there is no format " + std::to_string(format));
    const Format known = static_cast<Format>(format);
    const int64_t expected = static_cast<int64_t>(sizeof(Header)) + unit.packed_bytes(known, out, in);
    if (!packed || bytes != expected)
        refuse(name + ": the packed weight has " + std::to_string(expected) + " bytes, got " + std::to_string(bytes));
    if (!fits(packed, known, out, in)) refuse(name + ": the weight is packed for another unit, format or shape");
    weight.format = known;
    weight.out = out;
    weight.in = in;
    weight.packed = packed + sizeof(Header);
    weight.bias.clear();
    weight.bias_apart = &weight == &head_weight;  // whose bias is no part of its module
    if (!bias) return;
    weight.bias.assign(static_cast<size_t>(padded(out, 64)), 0.0f);
    std::memcpy(weight.bias.data(), bias, 4 * static_cast<size_t>(out));
}

void Model::set_table(int32_t side, int32_t layer, int32_t slot, int32_t number, int64_t rows, int64_t columns,
                      const void* data, const float* scale) {
    if (slot < 0 || slot >= table_slots) refuse("table: there is no slot " + std::to_string(slot));
    if (side < 0 || side > 1) refuse("table: there is no side " + std::to_string(side));
    Table& table = layer < 0 ? sides[side].tables[slot] : layer_of(side, layer, table_names[slot]).tables[slot];
    const std::string name = place(side, layer, table_names[slot]);
    const Shape shape = table_shape(side, layer, slot);
    if (shape.first < 0) refuse(name + ": this model has no such table");
    if (shape.first != rows || shape.second != columns)
        refuse(name + ": it is " + shape_text(shape.first, shape.second) + ", got " + shape_text(rows, columns));
    if (!data) refuse(name + ": there is no data");
    if (number < fp32 || number > fp16 || (number == int8 && !scale) || (number != fp32 && slot != embedding))
        refuse(name + ": numbers of kind " + std::to_string(number) + " do not go there");
    table.number = static_cast<Number>(number);
    table.rows = rows;
    table.columns = columns;
    table.scale = scale;
    table.data = data;
    if (slot == embedding) return;
    const float* numbers = static_cast<const float*>(data);
    table.own.assign(numbers, numbers + rows * columns);
    table.data = table.own.data();
}

void Model::check_complete() const {
    for (int32_t side = 0; side < 2; side++)
        for (int32_t layer = -1; layer < sides[side].config.layers; layer++) {
            const Layer* own = layer < 0 ? nullptr : &sides[side].layers[static_cast<size_t>(layer)];
            for (int32_t slot = 0; slot < weight_slots; slot++) {
                const Weight& weight = own ? own->weights[slot] : head_weight;
                if (weight_shape(side, layer, slot).first >= 0 && !weight.is_set())
                    refuse(place(side, layer, weight_names[slot]) + ": the weight is missing");
            }
            for (int32_t slot = 0; slot < table_slots; slot++) {
                const Table& table = own ? own->tables[slot] : sides[side].tables[slot];
                if (table_shape(side, layer, slot).first >= 0 && !table.is_set())
                    refuse(place(side, layer, table_names[slot]) + ": the table is missing");
            }
        }
}

}  // namespace nms
