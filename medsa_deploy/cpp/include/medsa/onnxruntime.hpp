// ONNX Runtime's shared library → graphs that run. The library is opened when a bundle is, so one
// binary runs with any version from `oldest_onnxruntime` on, and needs none of its headers.
//
// Its C API is a table of functions in a documented order that never changes: versions append. The
// members declared here are all of the first version's, which is part of every later one.
#pragma once

#include <cctype>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#include <windows.h>
#define MEDSA_ORT_CALL __stdcall
#else
#include <dlfcn.h>
#define MEDSA_ORT_CALL
#endif

#include "errors.hpp"
#include "files.hpp"
#include "manifest.hpp"

namespace medsa {

/// Minor version of the oldest ONNX Runtime 1.x that runs a bundle.
constexpr int oldest_onnxruntime = 17;

namespace detail::ort {

struct Status;
struct Env;
struct Session;
struct SessionOptions;
struct RunOptions;
struct Value;
struct MemoryInfo;
struct TypeInfo;
struct TensorInfo;
struct Allocator;

using Path = std::filesystem::path::value_type;
using Result = Status*;  ///< null for success
using Absent = void*;    ///< a member that is not called

/// The start of `OrtApi`, in its order; `Absent` members are other functions of the API.
struct Api {
  Absent create_status;
  int(MEDSA_ORT_CALL* get_error_code)(const Status*);
  const char*(MEDSA_ORT_CALL* get_error_message)(const Status*);
  Result(MEDSA_ORT_CALL* create_env)(int severity, const char* log_id, Env**);
  Absent create_env_with_custom_logger;
  Absent enable_telemetry_events;
  Result(MEDSA_ORT_CALL* disable_telemetry_events)(const Env*);
  Result(MEDSA_ORT_CALL* create_session)(const Env*, const Path*, const SessionOptions*, Session**);
  Absent create_session_from_array;
  Result(MEDSA_ORT_CALL* run)(Session*, const RunOptions*, const char* const* input_names,
                              const Value* const* inputs, std::size_t input_count,
                              const char* const* output_names, std::size_t output_count,
                              Value** outputs);
  Result(MEDSA_ORT_CALL* create_session_options)(SessionOptions**);
  Absent options_11_to_16[6];
  Result(MEDSA_ORT_CALL* disable_mem_pattern)(SessionOptions*);
  Absent options_18_to_21[4];
  Result(MEDSA_ORT_CALL* set_session_log_severity_level)(SessionOptions*, int);
  Absent set_session_graph_optimization_level;
  Result(MEDSA_ORT_CALL* set_intra_op_num_threads)(SessionOptions*, int);
  Absent options_and_domains_25_to_29[5];
  Result(MEDSA_ORT_CALL* session_get_input_count)(const Session*, std::size_t*);
  Result(MEDSA_ORT_CALL* session_get_output_count)(const Session*, std::size_t*);
  Absent session_get_overridable_initializer_count;
  Result(MEDSA_ORT_CALL* session_get_input_type_info)(const Session*, std::size_t, TypeInfo**);
  Result(MEDSA_ORT_CALL* session_get_output_type_info)(const Session*, std::size_t, TypeInfo**);
  Absent session_get_overridable_initializer_type_info;
  Result(MEDSA_ORT_CALL* session_get_input_name)(const Session*, std::size_t, Allocator*, char**);
  Result(MEDSA_ORT_CALL* session_get_output_name)(const Session*, std::size_t, Allocator*, char**);
  Absent initializers_and_run_options_38_to_48[11];
  Result(MEDSA_ORT_CALL* create_tensor_with_data)(const MemoryInfo*, void* data, std::size_t bytes,
                                                  const std::int64_t* shape, std::size_t axes,
                                                  int type, Value**);
  Result(MEDSA_ORT_CALL* is_tensor)(const Value*, int*);
  Result(MEDSA_ORT_CALL* get_tensor_mutable_data)(Value*, void**);
  Absent strings_52_to_54[3];
  Result(MEDSA_ORT_CALL* cast_type_info_to_tensor_info)(const TypeInfo*, const TensorInfo**);
  Absent types_56_to_59[4];
  Result(MEDSA_ORT_CALL* get_tensor_element_type)(const TensorInfo*, int*);
  Result(MEDSA_ORT_CALL* get_dimensions_count)(const TensorInfo*, std::size_t*);
  Result(MEDSA_ORT_CALL* get_dimensions)(const TensorInfo*, std::int64_t*, std::size_t);
  Absent symbolic_dimensions_and_count_63_to_64[2];
  Result(MEDSA_ORT_CALL* get_tensor_type_and_shape)(const Value*, TensorInfo**);
  Absent values_66_to_68[3];
  Result(MEDSA_ORT_CALL* create_cpu_memory_info)(int allocator, int memory, MemoryInfo**);
  Absent memory_70_to_75[6];
  Result(MEDSA_ORT_CALL* allocator_free)(Allocator*, void*);
  Absent allocator_get_info;
  Result(MEDSA_ORT_CALL* get_allocator_with_default_options)(Allocator**);
  Absent values_and_kernels_79_to_91[13];
  void(MEDSA_ORT_CALL* release_env)(Env*);
  void(MEDSA_ORT_CALL* release_status)(Status*);
  void(MEDSA_ORT_CALL* release_memory_info)(MemoryInfo*);
  void(MEDSA_ORT_CALL* release_session)(Session*);
  void(MEDSA_ORT_CALL* release_value)(Value*);
  Absent release_run_options;
  void(MEDSA_ORT_CALL* release_type_info)(TypeInfo*);
  void(MEDSA_ORT_CALL* release_tensor_info)(TensorInfo*);
  void(MEDSA_ORT_CALL* release_session_options)(SessionOptions*);
  Absent release_custom_op_domain;
  Absent later_versions_102_to_129[28];
  Result(MEDSA_ORT_CALL* add_session_config_entry)(SessionOptions*, const char* key,
                                                   const char* value);
};
// the last member of the first version is number 101, as ONNX Runtime itself asserts
static_assert(offsetof(Api, run) == 9 * sizeof(void*));
static_assert(offsetof(Api, set_intra_op_num_threads) == 24 * sizeof(void*));
static_assert(offsetof(Api, session_get_output_name) == 37 * sizeof(void*));
static_assert(offsetof(Api, get_tensor_mutable_data) == 51 * sizeof(void*));
static_assert(offsetof(Api, get_tensor_type_and_shape) == 65 * sizeof(void*));
static_assert(offsetof(Api, get_allocator_with_default_options) == 78 * sizeof(void*));
static_assert(offsetof(Api, release_custom_op_domain) == 101 * sizeof(void*));
static_assert(offsetof(Api, add_session_config_entry) == 130 * sizeof(void*));

/// `OrtApiBase`
struct ApiBase {
  const Api*(MEDSA_ORT_CALL* get_api)(std::uint32_t version);
  const char*(MEDSA_ORT_CALL* get_version)();
};

constexpr int severity_fatal = 4, element_float = 1, arena_allocator = 1, default_memory = 0;

}  // namespace detail::ort

namespace detail {

/// Whether a message of ONNX Runtime is about a full memory.
inline bool is_full_memory(std::string message) {
  for (char& c : message) {
    c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  }
  for (const char* words : {"out of memory", "failed to allocate memory", "bad_alloc",
                            "bad allocation"}) {
    if (message.find(words) != std::string::npos) {
      return true;
    }
  }
  return false;
}

/// A message as one line of at most 200 bytes.
inline std::string one_line(const std::string& message) {
  std::string line;
  for (const char c : message) {
    line += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return line.substr(0, 200);
}

/// The minor version of "1.20.1"; 1000 of a later major version, −1 of what is no version.
inline int minor_version(const std::string& version) {
  int major = -1, minor = -1;
  if (std::sscanf(version.c_str(), "%d.%d", &major, &minor) != 2 || major < 1) {
    return -1;
  }
  return major > 1 ? 1000 : minor;
}

/// ONNX Runtime, opened. It stays in the process: its threads do not survive being unloaded.
class Library {
 public:
  /// `path`: of the shared library; empty for the system's search path. `base`: what the host's own
  /// `OrtGetApiBase()` gives, or null. MissingDependencyError if it is missing or too old.
  Library(const std::filesystem::path& path, const void* base) {
    const auto* api_base = static_cast<const ort::ApiBase*>(base);
    if (api_base == nullptr) {
      api_base = open(path);
    }
    version_ = api_base->get_version();
    if (minor_version(version_) < oldest_onnxruntime) {
      throw Error(Code::missing_dependency, "ONNX Runtime " + version_ + " is too old: install 1." +
                                                std::to_string(oldest_onnxruntime) + " or newer");
    }
    api_ = api_base->get_api(oldest_onnxruntime);
    if (api_ == nullptr) {
      throw Error(Code::missing_dependency, "ONNX Runtime " + version_ + " has no API of version " +
                                                std::to_string(oldest_onnxruntime));
    }
  }

  const ort::Api& api() const { return *api_; }
  const std::string& version() const { return version_; }

  /// DeviceError for a status that is a failure.
  void check(ort::Status* status) const {
    if (status != nullptr) {
      const std::string message = taken(status);
      const Code code = is_full_memory(message) ? Code::device_memory : Code::device;
      throw Error(code, "ONNX Runtime failed: " + one_line(message));
    }
  }

  /// The message of a failure, which is released.
  std::string taken(ort::Status* status) const {
    std::string message = api_->get_error_message(status);
    api_->release_status(status);
    return message;
  }

 private:
  using GetApiBase = const ort::ApiBase*(MEDSA_ORT_CALL*)();

  [[noreturn]] static void fail(const std::string& reason) {
    throw Error(Code::missing_dependency,
                "ONNX Runtime's shared library cannot be opened (" + one_line(reason) +
                    "): install it, or name its file in LoadOptions::onnxruntime (the examples read "
                    "MEDSA_ONNXRUNTIME)");
  }

#ifdef _WIN32
  static const ort::ApiBase* open(const std::filesystem::path& path) {
    const HMODULE library = LoadLibraryW(path.empty() ? L"onnxruntime.dll" : path.c_str());
    if (library == nullptr) {
      fail("error " + std::to_string(GetLastError()));
    }
    const FARPROC symbol = GetProcAddress(library, "OrtGetApiBase");
    return symbol == nullptr ? nullptr : base_of(reinterpret_cast<void*>(symbol));
  }
#else
  static const ort::ApiBase* open(const std::filesystem::path& path) {
#ifdef __APPLE__
    const std::vector<std::string> names = {"libonnxruntime.dylib"};
#else
    const std::vector<std::string> names = {"libonnxruntime.so.1", "libonnxruntime.so"};
#endif
    std::string reason;
    for (const std::string& name : path.empty() ? names : std::vector<std::string>{path.string()}) {
      if (void* library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) {
        return base_of(dlsym(library, "OrtGetApiBase"));
      }
      const char* error = dlerror();
      reason += (reason.empty() ? "" : "; ") + std::string(error == nullptr ? name : error);
    }
    fail(reason);
  }
#endif

  static const ort::ApiBase* base_of(void* symbol) {
    if (symbol == nullptr) {
      fail("it has no function OrtGetApiBase");
    }
    return reinterpret_cast<GetApiBase>(symbol)();
  }

  const ort::Api* api_ = nullptr;
  std::string version_;
};

/// What ONNX Runtime gave, released at the end.
template <class T>
using Owned = std::unique_ptr<T, void(MEDSA_ORT_CALL*)(T*)>;

/// An input of a run: float32 values of the caller.
struct Input {
  const char* name;
  const float* data;
  std::vector<std::int64_t> shape;
};

inline std::size_t elements(const std::vector<std::int64_t>& shape) {
  std::size_t count = 1;
  for (const std::int64_t axis : shape) {
    count *= static_cast<std::size_t>(axis);
  }
  return count;
}

/// A shape in words; a dynamic axis is *.
inline std::string in_words(const std::vector<std::int64_t>& shape) {
  std::string words;
  for (const std::int64_t axis : shape) {
    words += (words.empty() ? "" : ", ") + (axis < 0 ? "*" : std::to_string(axis));
  }
  return "(" + words + ")";
}

/// Outputs of a run; they keep their memory until they are dropped.
class RunOutputs {
 public:
  RunOutputs(std::shared_ptr<const Library> library, const std::vector<Tensor>& tensors)
      : library_(std::move(library)), tensors_(tensors), values_(tensors.size(), nullptr) {}
  RunOutputs(RunOutputs&&) = default;
  RunOutputs(const RunOutputs&) = delete;
  RunOutputs& operator=(const RunOutputs&) = delete;
  ~RunOutputs() {
    for (ort::Value* value : values_) {
      if (value != nullptr) {
        library_->api().release_value(value);
      }
    }
  }

  std::vector<ort::Value*>& values() { return values_; }

  /// Data and shape of an output; DeviceError unless its fixed axes are those that are expected.
  std::pair<const float*, std::vector<std::int64_t>> read(
      const std::string& name, const std::vector<std::int64_t>& expected) const {
    const ort::Api& api = library_->api();
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      if (tensors_[i].name != name) {
        continue;
      }
      ort::TensorInfo* info = nullptr;
      library_->check(api.get_tensor_type_and_shape(values_[i], &info));
      const Owned<ort::TensorInfo> owner(info, api.release_tensor_info);
      std::size_t axes = 0;
      library_->check(api.get_dimensions_count(info, &axes));
      std::vector<std::int64_t> shape(axes);
      library_->check(api.get_dimensions(info, shape.data(), axes));
      int type = 0;
      library_->check(api.get_tensor_element_type(info, &type));
      bool equal = type == ort::element_float && axes == expected.size();
      for (std::size_t axis = 0; equal && axis < axes; ++axis) {
        equal = expected[axis] < 0 || shape[axis] == expected[axis];
      }
      if (!equal) {
        throw Error(Code::device, "ONNX Runtime gave " + name + " of the shape " +
                                      in_words(shape) + ", expected " + in_words(expected));
      }
      void* data = nullptr;
      library_->check(api.get_tensor_mutable_data(values_[i], &data));
      return {static_cast<const float*>(data), shape};
    }
    throw Error(Code::bundle, "the graph has no output " + name + ": export the checkpoint again");
  }

  const std::vector<Tensor>& tensors() const { return tensors_; }

 private:
  std::shared_ptr<const Library> library_;
  const std::vector<Tensor>& tensors_;
  std::vector<ort::Value*> values_;
};

}  // namespace detail
}  // namespace medsa
