// An ONNX file → a graph that ONNX Runtime runs, checked against the manifest's tensor contract.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "files.hpp"
#include "manifest.hpp"
#include "onnxruntime.hpp"

namespace medsa::detail {

/// What all graphs of a session share.
class Environment {
 public:
  /// `threads`: of one run; 0 for all cores.
  Environment(std::shared_ptr<const Library> library, int threads)
      : library_(std::move(library)),
        env_(nullptr, library_->api().release_env),
        options_(nullptr, library_->api().release_session_options),
        memory_(nullptr, library_->api().release_memory_info) {
    const ort::Api& api = library_->api();
    ort::Env* env = nullptr;
    library_->check(api.create_env(ort::severity_fatal, "medsa", &env));
    env_.reset(env);
    library_->check(api.disable_telemetry_events(env));
    ort::SessionOptions* options = nullptr;
    library_->check(api.create_session_options(&options));
    options_.reset(options);
    // failures are thrown; the log would repeat them
    library_->check(api.set_session_log_severity_level(options, ort::severity_fatal));
    // a memory plan that stays between runs doubles the memory, in the same time
    library_->check(api.disable_mem_pattern(options));
    library_->check(api.set_intra_op_num_threads(options, threads));
    // addition and norm in one kernel take longer than in two
    library_->check(api.add_session_config_entry(
        options, "optimization.disable_specified_optimizers", "SkipLayerNormFusion"));
    ort::MemoryInfo* memory = nullptr;
    library_->check(
        api.create_cpu_memory_info(ort::arena_allocator, ort::default_memory, &memory));
    memory_.reset(memory);
  }

  const std::shared_ptr<const Library>& library() const { return library_; }
  const ort::Env* env() const { return env_.get(); }
  const ort::SessionOptions* options() const { return options_.get(); }
  const ort::MemoryInfo* memory() const { return memory_.get(); }

 private:
  std::shared_ptr<const Library> library_;
  Owned<ort::Env> env_;
  Owned<ort::SessionOptions> options_;
  Owned<ort::MemoryInfo> memory_;
};

class Graph {
 public:
  /// BundleError for a file that is not the graph its manifest describes.
  Graph(const Environment& environment, const std::filesystem::path& path,
        const GraphContract& contract)
      : environment_(environment),
        contract_(contract),
        session_(nullptr, environment.library()->api().release_session) {
    const Library& library = *environment.library();
    ort::Session* session = nullptr;
    if (ort::Status* status = library.api().create_session(environment.env(), path.c_str(),
                                                           environment.options(), &session)) {
      const std::string message = library.taken(status);
      if (is_full_memory(message)) {
        throw Error(Code::device_memory,
                    utf8(path) + " does not fit the memory: " + one_line(message));
      }
      throw Error(Code::bundle, utf8(path) + " is not a graph ONNX Runtime " + library.version() +
                                    " can load: " + one_line(message));
    }
    session_.reset(session);
    check_contract(path);
  }

  /// Run the graph on inputs in any order; its outputs.
  RunOutputs run(const std::vector<Input>& inputs) const {
    const Library& library = *environment_.library();
    const ort::Api& api = library.api();
    std::vector<Owned<ort::Value>> owners;
    std::vector<const ort::Value*> values;
    std::vector<const char*> names, output_names;
    float nothing = 0;  // an axis of length 0 has no data, but null is refused
    for (const Input& input : inputs) {
      ort::Value* value = nullptr;
      library.check(api.create_tensor_with_data(
          environment_.memory(),
          input.data == nullptr ? &nothing : const_cast<float*>(input.data),
          elements(input.shape) * sizeof(float), input.shape.data(), input.shape.size(),
          ort::element_float, &value));
      owners.emplace_back(value, api.release_value);
      values.push_back(value);
      names.push_back(input.name);
    }
    for (const Tensor& tensor : contract_.outputs) {
      output_names.push_back(tensor.name.c_str());
    }
    RunOutputs outputs(environment_.library(), contract_.outputs);
    library.check(api.run(session_.get(), nullptr, names.data(), values.data(), values.size(),
                          output_names.data(), output_names.size(), outputs.values().data()));
    return outputs;
  }

  const GraphContract& contract() const { return contract_; }

 private:
  /// "float32 (*, 3, 256, 256)" for each of the file's inputs or outputs.
  std::map<std::string, std::string> described(bool inputs) const {
    const Library& library = *environment_.library();
    const ort::Api& api = library.api();
    ort::Allocator* allocator = nullptr;
    library.check(api.get_allocator_with_default_options(&allocator));
    std::size_t count = 0;
    library.check((inputs ? api.session_get_input_count : api.session_get_output_count)(
        session_.get(), &count));
    std::map<std::string, std::string> tensors;
    for (std::size_t i = 0; i < count; ++i) {
      char* name = nullptr;
      library.check((inputs ? api.session_get_input_name : api.session_get_output_name)(
          session_.get(), i, allocator, &name));
      const std::string key = name;
      library.check(api.allocator_free(allocator, name));
      ort::TypeInfo* type = nullptr;
      library.check((inputs ? api.session_get_input_type_info : api.session_get_output_type_info)(
          session_.get(), i, &type));
      const Owned<ort::TypeInfo> owner(type, api.release_type_info);
      tensors[key] = tensor_in_words(type);
    }
    return tensors;
  }

  std::string tensor_in_words(const ort::TypeInfo* type) const {
    const Library& library = *environment_.library();
    const ort::Api& api = library.api();
    const ort::TensorInfo* info = nullptr;  // it belongs to `type`
    library.check(api.cast_type_info_to_tensor_info(type, &info));
    if (info == nullptr) {
      return "no tensor";
    }
    int element = 0;
    std::size_t axes = 0;
    library.check(api.get_tensor_element_type(info, &element));
    library.check(api.get_dimensions_count(info, &axes));
    std::vector<std::int64_t> shape(axes);
    library.check(api.get_dimensions(info, shape.data(), axes));
    const bool is_float = element == ort::element_float;
    return (is_float ? "float32 " : "type " + std::to_string(element) + " ") + in_words(shape);
  }

  void check_contract(const std::filesystem::path& path) const {
    std::string differences;
    for (const bool inputs : {true, false}) {
      std::map<std::string, std::string> actual = described(inputs), expected;
      for (const Tensor& tensor : inputs ? contract_.inputs : contract_.outputs) {
        expected[tensor.name] = tensor.dtype + " " + in_words(tensor.shape);
        actual.emplace(tensor.name, "absent");
      }
      for (const auto& [name, words] : actual) {
        const auto place = expected.find(name);
        const std::string wanted = place == expected.end() ? "absent" : place->second;
        if (words != wanted) {
          differences += (differences.empty() ? "" : "; ") + name + " is " + words +
                         ", the manifest says " + wanted;
        }
      }
    }
    if (!differences.empty()) {
      throw Error(Code::bundle, utf8(path) + " is not the graph its manifest describes: " +
                                    differences + ": export the checkpoint again");
    }
  }

  const Environment& environment_;
  const GraphContract& contract_;
  Owned<ort::Session> session_;
};

}  // namespace medsa::detail
