// Why the engine stops: an exception inside, a code and one line of message at the C interface.
#pragma once
#include <stdexcept>
#include <string>

namespace nms {

enum Outcome : int32_t {
    fine = 0,
    refused = 1,  // what was asked is wrong
    unable = 2,   // it is right, but not for the engine
};

class EngineError : public std::runtime_error {
  public:
    EngineError(Outcome outcome, const std::string& message) : std::runtime_error(message), outcome(outcome) {}
    const Outcome outcome;
};

[[noreturn]] inline void refuse(const std::string& message) { throw EngineError(refused, message); }

}  // namespace nms
