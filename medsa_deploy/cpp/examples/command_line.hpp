// Words of a command line → options that the examples share; errors → a line and an exit code.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <locale>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "medsa.hpp"

namespace example {

[[noreturn]] inline void refuse(const std::string& message) {
  throw medsa::Error(medsa::Code::usage, message);
}

/// "40,60,200,210" → its numbers; UsageError unless there are `least` to `most`.
inline std::vector<float> numbers(const std::string& text, std::size_t least, std::size_t most,
                                  const std::string& option) {
  std::vector<float> values;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    std::istringstream stream(part);
    stream.imbue(std::locale::classic());
    float value = 0;
    if (!(stream >> value) || !stream.eof()) {
      values.clear();
      break;
    }
    values.push_back(value);
  }
  if (values.size() < least || values.size() > most || text.back() == ',') {
    refuse(option + " " + text + " is not " + std::to_string(least) +
           (most > least ? " to " + std::to_string(most) : "") + " numbers with commas between");
  }
  return values;
}

inline int whole_number(const std::string& text, const std::string& option) {
  char* end = nullptr;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || value < 0 || value > 1000000) {
    refuse(option + " " + text + " is not a whole number from 0 to 1000000");
  }
  return static_cast<int>(value);
}

/// What both examples take.
struct Options {
  std::vector<std::string> names;  ///< words that are no options
  medsa::Prompt prompt;
  medsa::LoadOptions load;
  medsa::SegmentOptions segment;
  std::optional<medsa::IntensityWindow> window;
};

/// Add an option that both examples have; false for another.
inline bool add_option(Options& options, const std::string& name, const std::string& value) {
  if (name == "--point") {
    const auto point = numbers(value, 2, 3, name);
    const float label = point.size() == 3 ? point[2] : 1;
    if (label != 0 && label != 1) {
      refuse("--point " + value + " has another label than 1, foreground, or 0, background");
    }
    options.prompt.points.push_back({point[0], point[1], label == 1 ? 1 : 0});
  } else if (name == "--box") {
    const auto box = numbers(value, 4, 4, name);
    if (options.prompt.box) {
      refuse("--box was given twice, expected one box for one object");
    }
    options.prompt.box = medsa::Box{box[0], box[1], box[2], box[3]};
  } else if (name == "--intensity-window") {
    const auto window = numbers(value, 2, 2, name);
    options.window = medsa::IntensityWindow{window[0], window[1]};
  } else if (name == "--threshold") {
    options.segment.threshold = static_cast<double>(numbers(value, 1, 1, name)[0]);
  } else if (name == "--threads") {
    options.load.threads = whole_number(value, name);
  } else if (name == "--precision") {
    options.load.precision = value;
  } else {
    return false;
  }
  return true;
}

/// Options that both examples have, for their help.
inline constexpr const char* shared_help =
    "  --point X,Y[,LABEL]         a click in pixels; label 1 foreground (default), 0 background\n"
    "  --box X0,Y0,X1,Y1           a box in pixels\n"
    "  --intensity-window LOW,HIGH intensities of black and white\n"
    "  --threshold PROBABILITY     above which a pixel belongs to the mask\n"
    "  --threads N                 threads of one run; default all cores\n"
    "  --precision NAME            fp32 (default), fp16, int8-cpu\n"
    "\n"
    "ONNX Runtime's shared library is MEDSA_ONNXRUNTIME, or that of the system's search path.\n";

/// One mask as 0 and 255, or the label map of several classes.
inline std::vector<std::uint8_t> shown(const medsa::Prediction& prediction) {
  if (prediction.count > 1 || prediction.rule.exclusive) {
    return prediction.label_map();
  }
  std::vector<std::uint8_t> pixels(prediction.mask(), prediction.mask() + prediction.pixels());
  for (std::uint8_t& pixel : pixels) {
    pixel = pixel != 0 ? 255 : 0;
  }
  return pixels;
}

/// ONNX Runtime reports to its vendor and writes into the home folder, unless its user decides.
inline void refuse_telemetry() {
#ifdef _WIN32
  if (std::getenv("ORT_DISABLE_TELEMETRY") == nullptr) {
    _putenv_s("ORT_DISABLE_TELEMETRY", "1");
  }
#else
  setenv("ORT_DISABLE_TELEMETRY", "1", 0);
#endif
}

/// Run a program; every error is one line on standard error, and the exit code of medsa-deploy.
template <class Program>
int run(Program program, int argc, char** argv) {
  refuse_telemetry();
  try {
    return program(std::vector<std::string>(argv + 1, argv + argc));
  } catch (const medsa::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return error.exit_code();
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "error: the memory is full: use a smaller image\n");
    return 3;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s (a fault in this program)\n", error.what());
    return 3;
  }
}

}  // namespace example
