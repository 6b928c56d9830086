// An embedding and prompt sets → the decoder's logits and scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "graph.hpp"
#include "image.hpp"
#include "manifest.hpp"
#include "masks.hpp"
#include "onnxruntime.hpp"
#include "prompts.hpp"

namespace medsa {

/// An encoded image: all that prompts need of it.
struct Embedding {
  /// A tensor that the split decoder's clicks read.
  struct Part {
    std::string name;
    std::vector<std::int64_t> shape;
    std::vector<float> values;
  };

  std::vector<float> values;                ///< (1, 256, g, g)
  std::vector<Part> image_part;             ///< empty: the decoder runs whole
  Frame frame;                              ///< how the image lies in the network's frame
  std::optional<IntensityWindow> window;    ///< intensities of black and white; none: as they were
  double preprocess_ms = 0;                 ///< of a slice, its share of its chunk's
  double encode_ms = 0;                     ///< with the decoder's image part
  std::shared_ptr<const detail::MaskOperators> operators;  ///< from logits to the image's pixels
};

/// The decoder's outputs for P prompt sets, in their order.
struct Logits {
  std::size_t sets = 0;       ///< P
  std::size_t masks = 0;      ///< K
  std::size_t side = 0;       ///< 4g
  std::vector<float> values;  ///< (P, K, 4g, 4g)
  std::vector<float> scores;  ///< (P, K) predicted IoU
};

namespace detail {

constexpr std::size_t sets_at_once = 8;  ///< prompt sets that are decoded together

/// Prompt sets that go through the decoder together.
struct Group {
  std::vector<std::size_t> members;  ///< their places among all sets
  std::size_t tokens = 0;            ///< N
  bool has_mask = false;
};

/// Sets with equally many tokens, all with a mask or all without, at most `sets_at_once`.
inline std::vector<Group> grouped(const std::vector<NetworkPrompt>& tokens,
                                  const std::vector<Prompt>& prompts) {
  std::vector<Group> alike;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const std::size_t count = tokens[i].labels.size();
    const bool has_mask = !prompts[i].mask.empty();
    auto place = std::find_if(alike.begin(), alike.end(), [&](const Group& group) {
      return group.tokens == count && group.has_mask == has_mask;
    });
    if (place == alike.end()) {
      place = alike.insert(alike.end(), Group{{}, count, has_mask});
    }
    place->members.push_back(i);
  }
  std::vector<Group> groups;
  for (const Group& group : alike) {
    const std::size_t total = group.members.size();
    const std::size_t batches = (total + sets_at_once - 1) / sets_at_once;
    std::size_t start = 0;
    for (std::size_t batch = 0; batch < batches; ++batch) {  // as equal as they can be
      const std::size_t size = total / batches + (batch < total % batches ? 1 : 0);
      const auto first = group.members.begin() + static_cast<std::ptrdiff_t>(start);
      groups.push_back({{first, first + static_cast<std::ptrdiff_t>(size)}, group.tokens,
                        group.has_mask});
      start += size;
    }
  }
  return groups;
}

inline void check_finite(const float* values, std::size_t count, const char* kind) {
  float sum = 0;  // NaN and infinity times 0 are NaN
  for (std::size_t i = 0; i < count; ++i) {
    sum += values[i] * 0.0f;
  }
  if (sum != 0) {  // NaN compares unequal to everything
    throw Error(Code::device,
                std::string("ONNX Runtime gave ") + kind + " with NaN or Inf: nothing returned");
  }
}

/// PromptError for empty sets of a network that needs prompts, or prompts if it takes none.
inline void check_prompted(PromptNeed need, const std::vector<Prompt>& prompts) {
  const auto empty = static_cast<std::size_t>(std::count_if(
      prompts.begin(), prompts.end(), [](const Prompt& prompt) { return prompt.empty(); }));
  if (need == PromptNeed::none && empty < prompts.size()) {
    throw Error(Code::prompt,
                "this network segments without prompts: leave points, boxes and masks out");
  }
  if (prompts.empty() || (need == PromptNeed::required && empty > 0)) {
    throw Error(Code::prompt,
                "a prompt set is empty: give points, a box or a mask. Only networks trained "
                "without prompts (SAMed, finetune-SAM, or exported with --no-prompts) segment "
                "without");
  }
}

/// UsageError for an embedding that cannot be this network's.
inline void check_embedding(const Embedding& embedding, const Manifest& manifest,
                            const std::vector<std::int64_t>& expected) {
  if (embedding.values.size() != elements(expected) ||
      embedding.frame.network_size != manifest.network.image_size || !embedding.operators) {
    throw Error(Code::usage, "the embedding has " + std::to_string(embedding.values.size()) +
                                 " values and frame " +
                                 std::to_string(embedding.frame.network_size) +
                                 ", this network's have " + in_words(expected) + " and " +
                                 std::to_string(manifest.network.image_size) +
                                 ": encode the image with this session");
  }
}

/// The inputs of a decoder run, and the memory that they are in.
struct DecoderInputs {
  std::vector<float> coords, labels, mask, has_mask;
  std::vector<Input> inputs;
};

inline void add_prompts(DecoderInputs& result, const Group& group,
                        const std::vector<NetworkPrompt>& tokens) {
  for (const std::size_t member : group.members) {
    const NetworkPrompt& prompt = tokens[member];
    result.coords.insert(result.coords.end(), prompt.coords.begin(), prompt.coords.end());
    result.labels.insert(result.labels.end(), prompt.labels.begin(), prompt.labels.end());
  }
  const auto sets = static_cast<std::int64_t>(group.members.size());
  const auto count = static_cast<std::int64_t>(group.tokens);
  result.inputs.push_back({"point_coords", result.coords.data(), {sets, count, 2}});
  result.inputs.push_back({"point_labels", result.labels.data(), {sets, count}});
}

/// `mask_input` and `has_mask_input`; a network without mask prompts takes neither.
inline void add_masks(DecoderInputs& result, const Group& group,
                      const std::vector<Prompt>& prompts, int mask_size) {
  if (mask_size == 0) {
    return;
  }
  const auto side = static_cast<std::size_t>(mask_size);
  for (const std::size_t member : group.members) {
    const std::vector<float>& mask = prompts[member].mask;
    result.mask.insert(result.mask.end(), mask.begin(), mask.end());
  }
  result.mask.resize(group.members.size() * side * side);
  result.has_mask = {group.has_mask ? 1.0f : 0.0f};
  result.inputs.push_back({"mask_input",
                           result.mask.data(),
                           {static_cast<std::int64_t>(group.members.size()), 1, mask_size,
                            mask_size}});
  result.inputs.push_back({"has_mask_input", result.has_mask.data(), {1}});
}

/// Whether a group runs the split decoder's click part.
inline bool runs_click(const Group& group, const Embedding& embedding, bool splits) {
  return splits && !embedding.image_part.empty() && !group.has_mask;
}

/// One run of the decoder, or of its click part; results go to the sets' places.
inline void decode_group(const Graph& graph, bool click, const Group& group,
                         const Embedding& embedding, const std::vector<std::int64_t>& shape,
                         DecoderInputs& inputs, Logits& result) {
  if (click) {
    for (const Embedding::Part& part : embedding.image_part) {
      inputs.inputs.push_back({part.name.c_str(), part.values.data(), part.shape});
    }
  } else {
    inputs.inputs.push_back({"image_embeddings", embedding.values.data(), shape});
  }
  const RunOutputs outputs = graph.run(inputs.inputs);
  const auto sets = static_cast<std::int64_t>(group.members.size());
  const auto count = static_cast<std::int64_t>(result.masks);
  const auto side = static_cast<std::int64_t>(result.side);
  const float* logits = outputs.read("low_res_masks", {sets, count, side, side}).first;
  const float* scores = outputs.read("iou_predictions", {sets, count}).first;
  const std::size_t values = result.masks * result.side * result.side;
  for (std::size_t i = 0; i < group.members.size(); ++i) {
    std::copy_n(logits + i * values, values, result.values.data() + group.members[i] * values);
    std::copy_n(scores + i * result.masks, result.masks,
                result.scores.data() + group.members[i] * result.masks);
  }
}

}  // namespace detail
}  // namespace medsa
