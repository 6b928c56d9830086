// `manifest.json` → what a bundle is: network, conventions, tensor contract, files.
//
// Reading is strict, as in Python: an unknown schema version, an unknown field, or a value of the
// wrong type is refused. Fields that only people and other tools read are left unread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "fields.hpp"
#include "json.hpp"
#include "sha256.hpp"

namespace medsa {

constexpr int manifest_schema = 2;

enum class Preprocessing {
  medsa, sam, medsam, litemedsam, efficientsam, sam_med2d, finetune_sam, samed
};
enum class Postprocessing { sam, medsam, efficientsam, finetune_sam, samed };
enum class Outputs { classes, sam, labels };
enum class PromptNeed { required, optional, none };
enum class MaskChoice { first, best };
enum class PointOrder { xy, yx };
enum class PointFrame { network, image };

/// An interval of intensities that becomes black to white.
struct IntensityWindow {
  double low = 0;
  double high = 0;
};

/// Facts about the network; see `Network` in Python's manifest.
struct Network {
  int image_size = 0;      ///< S: the encoder takes (B, 3, S, S)
  int embedding_size = 0;  ///< g: the encoder gives (B, 256, g, g); logits have the side 4·g
  int mask_tokens = 0;
  int classes = 0;
  Outputs outputs = Outputs::classes;
  int chunk = 1;  ///< slices that are encoded together

  /// K: masks in the decoder's output.
  int masks() const {
    return outputs == Outputs::sam ? mask_tokens
                                   : classes + (outputs == Outputs::labels ? 1 : 0);
  }
};

/// How images and prompts are prepared; see `Conventions` in Python's manifest.
struct Conventions {
  Preprocessing preprocess = Preprocessing::medsa;
  PointOrder point_order = PointOrder::xy;
  PointFrame point_frame = PointFrame::network;
  double point_scale = 1;
  std::optional<int> pad_points;
  std::optional<IntensityWindow> intensity_window;
  double threshold = 0.5;
  std::vector<std::string> class_names;
  Postprocessing postprocess = Postprocessing::sam;
  PromptNeed prompts = PromptNeed::required;
  MaskChoice mask_choice = MaskChoice::first;
};

/// An input or output of a graph, float32 in every bundle; a dynamic axis is −1.
struct Tensor {
  std::string name;
  std::string dtype;
  std::vector<std::int64_t> shape;
};

struct GraphContract {
  std::vector<Tensor> inputs;
  std::vector<Tensor> outputs;
};

/// One file of the bundle.
struct File {
  std::string path;  ///< relative to the bundle, with /
  std::string role;
  std::string precision;
  std::uint64_t bytes = 0;
  std::string sha256;
};

struct Manifest {
  Network network;
  Conventions conventions;
  std::map<std::string, GraphContract> graphs;
  std::vector<File> files;

  /// The file of a role in a precision, or null.
  const File* find(const std::string& role, const std::string& precision) const {
    for (const File& file : files) {
      if (file.role == role && file.precision == precision) {
        return &file;
      }
    }
    return nullptr;
  }

  /// The contract of a graph; BundleError without one.
  const GraphContract& graph(const std::string& role) const {
    const auto place = graphs.find(role);
    if (place == graphs.end()) {
      throw Error(Code::bundle, "manifest.json describes no graph " + json::in_quotes(role) +
                                    ": export the checkpoint again");
    }
    return place->second;
  }

  /// Side of a mask prompt, 4·g; 0 for a decoder that takes none.
  int mask_prompt_size() const {
    for (const Tensor& tensor : graph("decoder").inputs) {
      if (tensor.name == "mask_input") {
        return 4 * network.embedding_size;
      }
    }
    return 0;
  }
};

namespace detail {

inline constexpr FieldNames manifest_fields = {"source",  "network", "conventions",
                                               "graphs",  "files",   "parity",
                                               "recipes", "tools",   "schema",
                                                "digest"};
inline constexpr FieldNames network_fields = {
    "family",        "encoder",       "widths",         "depths",
    "heads",         "windows",       "global_blocks",  "image_size",
    "embedding_size", "patch_size",   "rel_pos",        "adapters",
    "parameters",    "adapter_parameters", "two_way",   "mask_tokens",
    "classes",       "outputs",       "hyp_lengths",    "hyp_prompt_length",
    "sd_trans",      "depth_chunk",   "slices"};
inline constexpr FieldNames conventions_fields = {
    "preprocess", "point_order", "point_frame", "prompt_scope", "point_scale",
    "pad_points", "intensity_window", "threshold", "class_names", "postprocess",
    "prompts", "trained_with", "mask_choice"};
inline constexpr FieldNames tensor_fields = {"name", "dtype", "shape"};
inline constexpr FieldNames graph_fields = {"inputs", "outputs"};
inline constexpr FieldNames file_fields = {"path",  "role",   "precision",
                                           "bytes", "sha256", "opset"};

// the ranges are those of `medsa_deploy/bundle/manifest_values.py`

inline Network decode_network(const json::Value& value) {
  const Fields fields(value, "manifest.json: network", network_fields);
  Network network;
  network.image_size = static_cast<int>(fields.integer("image_size", 1, 1 << 14));
  network.embedding_size = static_cast<int>(fields.integer("embedding_size", 1, 1 << 12));
  network.mask_tokens = static_cast<int>(fields.integer("mask_tokens", 1, 1 << 16));
  network.classes = static_cast<int>(fields.integer("classes", 1, 1 << 16));
  fields.required("outputs");
  network.outputs = fields.choice("outputs", Outputs::classes,
                                  {{"classes", Outputs::classes},
                                   {"sam", Outputs::sam},
                                   {"labels", Outputs::labels}});
  for (const char* name : {"slices", "depth_chunk"}) {
    if (const json::Value* field = fields.optional(name)) {
      network.chunk = static_cast<int>(fields.integer(*field, name, 1, 4096));
    }
  }
  return network;
}

inline Preprocessing decode_preprocessing(const Fields& fields) {
  fields.required("preprocess");
  return fields.choice("preprocess", Preprocessing::medsa,
                       {{"medsa", Preprocessing::medsa},
                        {"sam", Preprocessing::sam},
                        {"medsam", Preprocessing::medsam},
                        {"litemedsam", Preprocessing::litemedsam},
                        {"efficientsam", Preprocessing::efficientsam},
                        {"sam-med2d", Preprocessing::sam_med2d},
                        {"finetune-sam", Preprocessing::finetune_sam},
                        {"samed", Preprocessing::samed}});
}

inline Conventions decode_conventions(const json::Value& value) {
  const Fields fields(value, "manifest.json: conventions", conventions_fields);
  Conventions result;
  result.preprocess = decode_preprocessing(fields);
  result.point_order = fields.choice(
      "point_order", PointOrder::xy, {{"xy", PointOrder::xy}, {"yx", PointOrder::yx}});
  result.point_frame =
      fields.choice("point_frame", PointFrame::network,
                    {{"network", PointFrame::network}, {"image", PointFrame::image}});
  result.postprocess = fields.choice("postprocess", Postprocessing::sam,
                                     {{"sam", Postprocessing::sam},
                                      {"medsam", Postprocessing::medsam},
                                      {"efficientsam", Postprocessing::efficientsam},
                                      {"finetune-sam", Postprocessing::finetune_sam},
                                      {"samed", Postprocessing::samed}});
  result.prompts = fields.choice("prompts", PromptNeed::required,
                                 {{"required", PromptNeed::required},
                                  {"optional", PromptNeed::optional},
                                  {"none", PromptNeed::none}});
  result.mask_choice = fields.choice("mask_choice", MaskChoice::first,
                                     {{"first", MaskChoice::first}, {"best", MaskChoice::best}});
  if (const json::Value* field = fields.optional("point_scale")) {
    result.point_scale = fields.number(*field, "point_scale", 1e-6, 1e6);
  }
  if (const json::Value* field = fields.optional("pad_points")) {
    result.pad_points = static_cast<int>(fields.integer(*field, "pad_points", 0, 4096));
  }
  if (const json::Value* field = fields.optional("threshold")) {
    result.threshold = fields.number(*field, "threshold", 0, 1);
    if (result.threshold == 0 || result.threshold == 1) {
      refuse(fields.place("threshold"), "is not above 0 and below 1");
    }
  }
  if (const json::Value* field = fields.optional("intensity_window")) {
    const auto& ends = fields.list(*field, "intensity_window");
    if (ends.size() != 2) {
      refuse(fields.place("intensity_window"), "is not two numbers");
    }
    const double low = fields.number(ends[0], "intensity_window", -1e30, 1e30);
    const double high = fields.number(ends[1], "intensity_window", -1e30, 1e30);
    if (low >= high) {
      refuse(fields.place("intensity_window"), "is not a low and a higher intensity");
    }
    result.intensity_window = IntensityWindow{low, high};
  }
  if (const json::Value* field = fields.optional("class_names")) {
    for (const json::Value& name : fields.list(*field, "class_names")) {
      result.class_names.push_back(fields.text(name, "class_names"));
    }
  }
  return result;
}

inline constexpr std::int64_t most_axis = (std::int64_t{1} << 31) - 1;

inline std::vector<Tensor> decode_tensors(const json::Value& value, const std::string& place) {
  std::vector<Tensor> tensors;
  if (value.kind != json::Value::Kind::array) {
    refuse(place, "is not a list");
  }
  for (const json::Value& item : value.items) {
    const Fields fields(item, place, tensor_fields);
    Tensor tensor{fields.text("name"), fields.text("dtype"), {}};
    for (const json::Value& axis : fields.list(fields.required("shape"), "shape")) {
      const bool dynamic = axis.kind == json::Value::Kind::string;
      tensor.shape.push_back(dynamic ? -1 : fields.integer(axis, "shape", 1, most_axis));
    }
    tensors.push_back(tensor);
  }
  return tensors;
}

/// Paths are relative and inside the bundle.
inline void check_path(const std::string& path) {
  bool inside = path.find_first_of("\\:") == std::string::npos;
  std::size_t start = 0;
  while (inside && start <= path.size()) {
    const std::size_t end = std::min(path.find('/', start), path.size());
    const std::string part = path.substr(start, end - start);
    inside = !part.empty() && part != "." && part != ".." && part.rfind(".git", 0) != 0;
    for (const char c : part) {
      inside = inside && static_cast<unsigned char>(c) >= 0x20 && c != 0x7f;
    }
    start = end + 1;
  }
  if (!inside) {
    refuse("manifest.json: files", "names " + json::in_quotes(path) +
                                       ", which is no path inside the bundle");
  }
}

inline void check_classes(const Manifest& manifest) {
  const std::size_t names = manifest.conventions.class_names.size();
  if (names > 0 && names != static_cast<std::size_t>(manifest.network.classes)) {
    refuse("manifest.json: conventions: class_names",
           "has " + std::to_string(names) + " names, expected " +
               std::to_string(manifest.network.classes) + " or none");
  }
}

/// Whether a tensor has the sizes; −1 is any.
inline bool has_sizes(const Tensor& tensor, const std::vector<std::int64_t>& sizes) {
  bool equal = tensor.shape.size() == sizes.size();
  for (std::size_t axis = 0; equal && axis < sizes.size(); ++axis) {
    equal = sizes[axis] < 0 || tensor.shape[axis] == sizes[axis];
  }
  return equal;
}

/// The sizes of encoder and decoder are those of the network.
inline void check_graphs(const Manifest& manifest) {
  const std::int64_t side = manifest.network.image_size, grid = manifest.network.embedding_size;
  const std::int64_t masks = manifest.network.masks();
  struct Expected {
    const char* graph;
    bool input;
    const char* name;
    std::vector<std::int64_t> sizes;
  };
  const std::vector<Expected> tensors = {
      {"encoder", true, "image", {-1, 3, side, side}},
      {"encoder", false, "image_embeddings", {-1, 256, grid, grid}},
      {"decoder", true, "image_embeddings", {-1, 256, grid, grid}},
      {"decoder", true, "point_coords", {-1, -1, 2}},
      {"decoder", false, "low_res_masks", {-1, masks, 4 * grid, 4 * grid}},
      {"decoder", false, "iou_predictions", {-1, masks}}};
  for (const Expected& expected : tensors) {
    const GraphContract& graph = manifest.graph(expected.graph);
    bool fits = false;
    for (const Tensor& tensor : expected.input ? graph.inputs : graph.outputs) {
      fits = fits || (tensor.name == expected.name && has_sizes(tensor, expected.sizes));
    }
    if (!fits) {
      refuse("manifest.json: graphs: " + std::string(expected.graph),
             "has no tensor " + std::string(expected.name) + " of the network's sizes");
    }
  }
}

inline Manifest decode_manifest(const json::Value& value) {
  const std::string place = "manifest.json";
  const json::Value* schema =
      value.kind == json::Value::Kind::object ? value.find("schema") : nullptr;
  if (schema == nullptr) {
    throw Error(Code::bundle, place + " has no schema version: it is not a bundle's manifest; "
                                      "name a folder that medsa-deploy export has written");
  }
  if (schema->kind != json::Value::Kind::integer || schema->integer != manifest_schema) {
    throw Error(Code::bundle, place + " has another schema version than " +
                                  std::to_string(manifest_schema) +
                                  ": export the checkpoint again, or compile with the headers of "
                                  "the medsa-deploy that wrote it");
  }
  const Fields fields(value, place, manifest_fields);
  Manifest manifest;
  manifest.network = decode_network(fields.required("network"));
  manifest.conventions = decode_conventions(fields.required("conventions"));
  const json::Value& graphs = fields.required("graphs");
  if (graphs.kind != json::Value::Kind::object) {
    refuse(fields.place("graphs"), "is not an object");
  }
  for (const auto& [role, position] : graphs.places) {
    const std::string name = fields.place("graphs: " + role);
    const Fields graph(graphs.items[position], name, graph_fields);
    manifest.graphs[role] = {decode_tensors(graph.required("inputs"), name),
                             decode_tensors(graph.required("outputs"), name)};
  }
  for (const json::Value& item : fields.list(fields.required("files"), "files")) {
    const Fields file(item, fields.place("files"), file_fields);
    const auto bytes = file.integer("bytes", 0, std::int64_t{1} << 53);
    manifest.files.push_back({file.text("path"), file.text("role"), file.text("precision"),
                              static_cast<std::uint64_t>(bytes), file.text("sha256")});
    check_path(manifest.files.back().path);
  }
  check_classes(manifest);
  check_graphs(manifest);
  return manifest;
}

/// BundleError unless a digest is that of the text with zeros in its place; earlier texts have none.
inline void check_digest(const json::Value& value, const std::string& text) {
  const json::Value* digest =
      value.kind == json::Value::Kind::object ? value.find("digest") : nullptr;
  if (digest == nullptr) {
    return;
  }
  const std::string field = "\"digest\": \"";
  const std::size_t place = text.rfind(field + digest->string + "\"");
  std::string zeroed = text;
  if (place != std::string::npos && !digest->string.empty()) {
    zeroed.replace(place + field.size(), digest->string.size(), std::string(64, '0'));
  }
  Sha256 sha256;
  sha256.update(zeroed.data(), zeroed.size());
  if (sha256.hex() != digest->string) {
    throw Error(Code::bundle, "manifest.json is not as it was written: its digest differs; copy "
                              "the bundle again or export it again");
  }
}

}  // namespace detail

/// The manifest in a text; BundleError says which field is wrong.
inline Manifest manifest_from_json(const std::string& text) {
  const json::Value value = json::parse(text);
  detail::check_digest(value, text);
  return detail::decode_manifest(value);
}

}  // namespace medsa
