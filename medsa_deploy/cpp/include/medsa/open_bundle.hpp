// A bundle's folder → its graphs, opened, after its files were compared with their SHA-256.
#pragma once

#include <cstdint>
#include <filesystem>
#include <future>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "files.hpp"
#include "graph.hpp"
#include "manifest.hpp"
#include "onnxruntime.hpp"

namespace medsa {

/// How a bundle is opened.
struct LoadOptions {
  std::string precision = "fp32";     ///< of the files: fp32, fp16, int8-cpu
  int threads = 0;                    ///< of one run; 0 for all cores
  std::filesystem::path onnxruntime;  ///< the shared library; empty: the system's search path
  const void* ort_api_base = nullptr; ///< or what the host's own `OrtGetApiBase()` gives
  std::string manifest_sha256;        ///< of the manifest that is expected; empty for any
  bool portable = false;              ///< run `encoder.onnx`, not the one for ONNX Runtime alone
};

namespace detail {

/// A bundle and its graphs; they refer to its members, so it never moves.
struct OpenBundle {
  OpenBundle(const std::filesystem::path& folder, const LoadOptions& load_options)
      : bundle(folder),
        options(load_options),
        manifest(manifest_from_json(read_manifest(bundle, options.manifest_sha256))) {
    if (options.threads < 0 || options.threads > 1024) {
      throw Error(Code::usage, "threads is " + std::to_string(options.threads) +
                                   ", expected a whole number from 1 to 1024, or 0 for all");
    }
    const bool splits = find("decoder-image") != nullptr && find("decoder-click") != nullptr;
    std::vector<std::future<void>> checks;  // beside each other, and beside ONNX Runtime's start
    for (const char* role : {"weights", "encoder", "encoder-onnxruntime", "decoder-image",
                             "decoder-click", "decoder"}) {
      if (find(role) != nullptr) {
        checks.push_back(std::async(std::launch::async, [this, role] {
          check_file(file_of(role), bundle);
        }));
      }
    }
    library = std::make_shared<Library>(options.onnxruntime, options.ort_api_base);
    environment = std::make_unique<Environment>(library, options.threads);
    const std::int64_t grid = manifest.network.embedding_size;
    embedding_shape = {1, 256, grid, grid};
    for (std::future<void>& check : checks) {
      check.get();
    }
    auto decoders = std::async(std::launch::async, [&] {  // beside the encoder, in half the time
      std::map<std::string, std::unique_ptr<Graph>> opened;
      for (const char* role : {"decoder-image", "decoder-click"}) {
        if (splits) {  // the whole decoder is opened for the first mask prompt
          opened[role] = open(role, role);
        }
      }
      if (!splits) {
        opened["decoder"] = open("decoder", "decoder");
      }
      return opened;
    });
    const bool own = !options.portable && find("encoder-onnxruntime") != nullptr;
    auto encoder = open("encoder", own ? "encoder-onnxruntime" : "encoder");
    graphs = decoders.get();
    graphs["encoder"] = std::move(encoder);
  }

  const File* find(const std::string& role) const {
    return manifest.find(role, options.precision);
  }

  const File& file_of(const std::string& role) const {
    const File* file = find(role);
    if (file == nullptr) {
      throw Error(Code::bundle, "the bundle has no " + role + " in " + options.precision +
                                    ": choose another precision, or add it with "
                                    "medsa-deploy quantize");
    }
    return *file;
  }

  /// A graph from the file of a role, which was compared with its SHA-256.
  std::unique_ptr<Graph> open(const std::string& graph, const std::string& role) const {
    const auto path = bundle / utf8_path(file_of(role).path);
    return std::make_unique<Graph>(*environment, path, manifest.graph(graph));
  }

  /// The whole decoder of a bundle that has it in two parts is opened when it is first needed.
  const Graph& graph(const std::string& name) {
    std::unique_ptr<Graph>& place = graphs[name];
    if (!place) {
      check_file(file_of(name), bundle);  // again: it may have changed since
      place = open(name, name);
    }
    return *place;
  }

  std::filesystem::path bundle;
  LoadOptions options;
  Manifest manifest;
  std::shared_ptr<const Library> library;
  std::unique_ptr<Environment> environment;
  std::map<std::string, std::unique_ptr<Graph>> graphs;
  std::vector<std::int64_t> embedding_shape;
};

}  // namespace detail
}  // namespace medsa
