// Everything that can go wrong, as one exception type. Its codes are classes of the Python package.
#pragma once

#include <stdexcept>
#include <string>

namespace medsa {

/// The kinds of errors; each is a class of `medsa_deploy.errors`.
enum class Code {
  usage,               ///< UsageError: the call is wrong
  bundle,              ///< BundleError: a bundle is missing, changed, or of another version
  image,               ///< ImageError: NaN, constant, or of the wrong shape
  prompt,              ///< PromptError: outside the image, an empty box, no prompt at all
  missing_dependency,  ///< MissingDependencyError: ONNX Runtime is missing or too old
  device,              ///< DeviceError: ONNX Runtime failed while running
  device_memory,       ///< DeviceMemoryError: the memory is full
};

/// Every error of this library. The message says what was found, what was expected and what to do.
class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& message) : std::runtime_error(message), code_(code) {}

  Code code() const noexcept { return code_; }

  /// The name of the Python class: "BundleError".
  const char* name() const noexcept {
    switch (code_) {
      case Code::usage: return "UsageError";
      case Code::bundle: return "BundleError";
      case Code::image: return "ImageError";
      case Code::prompt: return "PromptError";
      case Code::missing_dependency: return "MissingDependencyError";
      case Code::device: return "DeviceError";
      case Code::device_memory: return "DeviceMemoryError";
    }
    return "MedsaError";
  }

  /// The exit code of the command line: 2 for a usage or input error, 3 for a fault at run time.
  int exit_code() const noexcept {
    return code_ == Code::device || code_ == Code::device_memory ? 3 : 2;
  }

 private:
  Code code_;
};

}  // namespace medsa
