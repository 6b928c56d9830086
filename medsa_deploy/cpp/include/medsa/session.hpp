// A session on a bundle: it encodes an image once, then decodes a mask for every prompt.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "decoding.hpp"
#include "errors.hpp"
#include "graph.hpp"
#include "image.hpp"
#include "manifest.hpp"
#include "masks.hpp"
#include "onnxruntime.hpp"
#include "open_bundle.hpp"
#include "pixels.hpp"
#include "prediction.hpp"
#include "prompts.hpp"

namespace medsa {

/// How masks are made.
struct SegmentOptions {
  bool multimask = false;           ///< SAM's three candidates
  std::optional<double> threshold;  ///< probability above which a pixel belongs to a mask; none:
                                    ///< the bundle's
};

/// Runs one bundle with ONNX Runtime on the CPU. One thread may use a session at a time; any number
/// of sessions may exist.
class Session {
 public:
  /// Open a bundle. The files it runs are compared with their SHA-256 first.
  ///
  /// BundleError for a bundle that is missing, changed, of another version, or without the
  /// precision. MissingDependencyError without ONNX Runtime. UsageError for unusable options.
  explicit Session(const std::filesystem::path& bundle, const LoadOptions& options = {})
      : bundle_(guarded([&] { return std::make_unique<detail::OpenBundle>(bundle, options); })) {}

  /// Encode an image; every prompt on it then costs a decoder run only.
  ///
  /// 8-bit images are taken as display values. Others are mapped to them by `window`, else the
  /// bundle's, else from minimum to maximum. ImageError for NaN, constant or misshapen images.
  /// UsageError for a 3D network, which takes `encode_slices`.
  Embedding encode(const ImageView& image,
                   const std::optional<IntensityWindow>& window = std::nullopt) const {
    if (chunk() > 1) {
      throw Error(Code::usage, "this network sees " + std::to_string(chunk()) +
                                   " neighbouring slices at a time: give slices to encode_slices");
    }
    return std::move(guarded([&] { return encode_chunk({image}, window, false); })[0]);
  }

  /// Encode neighbouring slices of a volume, all of one size, in their order.
  ///
  /// Their number is a multiple of `chunk()`: repeat the last slice to complete one. A slice may be
  /// constant. Give the window of the whole volume, or slices are stretched one by one.
  std::vector<Embedding> encode_slices(
      const std::vector<ImageView>& slices,
      const std::optional<IntensityWindow>& window = std::nullopt) const {
    const auto size = static_cast<std::size_t>(chunk());
    if (slices.empty() || slices.size() % size != 0) {
      throw Error(Code::usage, std::to_string(slices.size()) +
                                   " slices were given; this network takes a multiple of " +
                                   std::to_string(size) +
                                   ": repeat the last slice to complete a chunk");
    }
    return guarded([&] {
      std::vector<Embedding> embeddings;
      for (auto first = slices.begin(); first != slices.end();) {
        const auto last = first + static_cast<std::ptrdiff_t>(size);
        for (Embedding& embedding : encode_chunk({first, last}, window, true)) {
          embeddings.push_back(std::move(embedding));
        }
        first = last;
      }
      return embeddings;
    });
  }

  /// Masks for prompt sets, in pixels (x, y) of the image; each set has its own masks.
  ///
  /// PromptError for prompts outside the image, empty boxes, or no prompt.
  Prediction segment(const Embedding& embedding, const std::vector<Prompt>& prompts,
                     const SegmentOptions& options = {}) const {
    return guarded([&] { return predict(embedding, prompts, options); });
  }

  /// Masks for one prompt set; without one for a network that needs none.
  Prediction segment(const Embedding& embedding, const Prompt& prompt = {},
                     const SegmentOptions& options = {}) const {
    return segment(embedding, std::vector<Prompt>{prompt}, options);
  }

  /// The decoder's outputs for prompt sets, with all K masks, without masks of the image's size.
  Logits decode_logits(const Embedding& embedding, const std::vector<Prompt>& prompts) const {
    return guarded([&] { return decode(embedding, prompts); });
  }

  const Manifest& manifest() const { return bundle_->manifest; }
  int chunk() const { return bundle_->manifest.network.chunk; }
  int image_size() const { return bundle_->manifest.network.image_size; }
  const std::string& onnxruntime_version() const { return bundle_->library->version(); }

  /// Names of the classes that masks are of, in order.
  std::vector<std::string> classes() const {
    const Manifest& manifest = bundle_->manifest;
    std::vector<std::string> names = manifest.conventions.class_names;
    const auto count = static_cast<std::size_t>(
        manifest.network.outputs == Outputs::sam ? 1 : manifest.network.classes);
    if (names.empty() && count == 1) {
      return {"mask"};
    }
    for (std::size_t k = names.size(); k < count; ++k) {
      names.push_back("class " + std::to_string(k + 1));
    }
    return names;
  }

 private:
  using Clock = std::chrono::steady_clock;

  /// What a function gives; a full memory is an Error, too.
  template <class Function>
  static auto guarded(Function function) -> decltype(function()) {
    try {
      return function();
    } catch (const std::bad_alloc&) {
      throw Error(Code::device_memory, "the memory is full: use smaller images or fewer prompts");
    }
  }

  static double milliseconds(Clock::time_point start, Clock::time_point end) {
    return std::chrono::duration<double, std::milli>(end - start).count();
  }

  const detail::Graph& graph(const std::string& name) const { return bundle_->graph(name); }
  bool splits() const { return bundle_->graphs.count("decoder-click") > 0; }

  /// Images that the network sees together → their embeddings. `flat`: they may be one flat grey.
  std::vector<Embedding> encode_chunk(const std::vector<ImageView>& images,
                                      const std::optional<IntensityWindow>& window,
                                      bool flat) const {
    const Manifest& manifest = bundle_->manifest;
    const Clock::time_point start = Clock::now();
    std::vector<Embedding> embeddings(images.size());
    std::vector<float> batch;
    for (std::size_t i = 0; i < images.size(); ++i) {
      const detail::Planes planes = detail::planes_of(images[i]);
      if (!flat) {
        detail::check_not_constant(planes);
      }
      const detail::Planes shown = detail::intensities(
          planes, manifest.conventions, images[i].inverted, window, embeddings[i].window);
      if (!flat) {
        detail::check_not_flat(planes, shown, embeddings[i].window);
      }
      auto [values, frame] =
          detail::preprocess(shown, manifest.conventions.preprocess, manifest.network.image_size);
      if (i == 0) {
        batch = std::move(values);
      } else {
        batch.insert(batch.end(), values.begin(), values.end());
      }
      embeddings[i].frame = frame;
      if (frame.width != embeddings[0].frame.width || frame.height != embeddings[0].frame.height) {
        throw Error(Code::image, "the slices of a chunk have different sizes");
      }
    }
    const Clock::time_point prepared = Clock::now();
    run_encoder(batch, embeddings);
    const auto operators = std::make_shared<const detail::MaskOperators>(
        detail::mask_operators(manifest.conventions.postprocess,
                               4 * manifest.network.embedding_size, embeddings[0].frame));
    const auto slices = static_cast<double>(images.size());
    for (Embedding& embedding : embeddings) {
      embedding.operators = operators;
      embedding.preprocess_ms = milliseconds(start, prepared) / slices;
      embedding.encode_ms = milliseconds(prepared, Clock::now()) / slices;
    }
    return embeddings;
  }

  /// The embedding of each image of a batch (B, 3, S, S), and the decoder's image part.
  void run_encoder(const std::vector<float>& batch, std::vector<Embedding>& embeddings) const {
    const auto count = static_cast<std::int64_t>(embeddings.size());
    const std::int64_t side = bundle_->manifest.network.image_size;
    std::vector<std::int64_t> shape = bundle_->embedding_shape;
    shape[0] = count;
    const detail::RunOutputs encoded =
        graph("encoder").run({{"image", batch.data(), {count, 3, side, side}}});
    const float* values = encoded.read("image_embeddings", shape).first;
    detail::check_finite(values, detail::elements(shape), "an embedding");
    // a copy: the output itself would keep the memory of the encoder's next runs
    for (std::size_t i = 0; i < embeddings.size(); ++i) {
      const std::size_t size = detail::elements(bundle_->embedding_shape);
      embeddings[i].values.assign(values + i * size, values + (i + 1) * size);
    }
    if (!splits()) {
      return;
    }
    const detail::RunOutputs parts =
        graph("decoder-image").run({{"image_embeddings", values, shape}});
    for (const Tensor& tensor : parts.tensors()) {
      std::vector<std::int64_t> expected = tensor.shape;
      if (expected.empty()) {
        throw Error(Code::bundle, "decoder-image gives " + tensor.name +
                                      " without a batch axis: export the checkpoint again");
      }
      expected[0] = count;
      auto [part, actual] = parts.read(tensor.name, expected);
      actual[0] = 1;
      const std::size_t size = detail::elements(actual);
      for (std::size_t i = 0; i < embeddings.size(); ++i) {
        embeddings[i].image_part.push_back(
            {tensor.name, actual, {part + i * size, part + (i + 1) * size}});
      }
    }
  }

  Logits decode(const Embedding& embedding, const std::vector<Prompt>& prompts) const {
    const Manifest& manifest = bundle_->manifest;
    const int mask_size = manifest.mask_prompt_size();
    detail::check_embedding(embedding, manifest, bundle_->embedding_shape);
    detail::check_prompted(manifest.conventions.prompts, prompts);
    std::vector<detail::NetworkPrompt> tokens;
    for (const Prompt& prompt : prompts) {
      tokens.push_back(
          detail::network_prompt(prompt, embedding.frame, manifest.conventions, mask_size));
    }
    Logits result;
    result.sets = prompts.size();
    result.masks = static_cast<std::size_t>(manifest.network.masks());
    result.side = 4 * static_cast<std::size_t>(manifest.network.embedding_size);
    result.values.resize(result.sets * result.masks * result.side * result.side);
    result.scores.resize(result.sets * result.masks);
    for (const detail::Group& group : detail::grouped(tokens, prompts)) {
      const bool click = detail::runs_click(group, embedding, splits());
      detail::DecoderInputs inputs;
      detail::add_prompts(inputs, group, tokens);
      if (!click) {
        detail::add_masks(inputs, group, prompts, mask_size);
      }
      detail::decode_group(graph(click ? "decoder-click" : "decoder"), click, group, embedding,
                           bundle_->embedding_shape, inputs, result);
    }
    detail::check_finite(result.values.data(), result.values.size(), "masks");
    detail::check_finite(result.scores.data(), result.scores.size(), "masks");
    return result;
  }

  Prediction predict(const Embedding& embedding, const std::vector<Prompt>& prompts,
                     const SegmentOptions& options) const {
    const Manifest& manifest = bundle_->manifest;
    const detail::MaskRule rule = rule_of(options);
    const Clock::time_point start = Clock::now();
    Logits logits = decode(embedding, prompts);
    const Clock::time_point decoded = Clock::now();
    Prediction result;
    choose(logits, options, result);
    result.sets = logits.sets;
    result.side = logits.side;
    result.width = embedding.frame.width;
    result.height = embedding.frame.height;
    result.classes = manifest.network.outputs != Outputs::sam;
    result.rule = rule;
    result.operators = embedding.operators;
    const std::size_t layers = result.count;
    result.count -= rule.exclusive ? 1 : 0;
    result.masks.resize(result.sets * result.count * result.pixels());
    for (std::size_t set = 0; set < result.sets; ++set) {
      detail::image_masks(result.low_res_logits.data() + set * layers * result.side * result.side,
                          layers, result.side, *embedding.operators, rule,
                          result.masks.data() + set * result.count * result.pixels());
    }
    result.decode_ms = milliseconds(start, decoded);
    result.postprocess_ms = milliseconds(decoded, Clock::now());
    return result;
  }

  /// UsageError for options that this network does not have.
  detail::MaskRule rule_of(const SegmentOptions& options) const {
    const Manifest& manifest = bundle_->manifest;
    const bool exclusive = manifest.network.outputs == Outputs::labels;
    if (options.multimask && manifest.network.outputs != Outputs::sam) {
      throw Error(Code::usage,
                  "multimask is for SAM's outputs; this network's masks are classes");
    }
    if (exclusive && options.threshold) {
      throw Error(Code::usage,
                  "a threshold was given, but this network's classes exclude each other: a pixel "
                  "belongs to the highest; leave the threshold out");
    }
    if (exclusive && manifest.network.classes > 255) {
      throw Error(Code::usage, "a label map holds 1 to 255 classes, not " +
                                   std::to_string(manifest.network.classes));
    }
    const double probability = options.threshold.value_or(manifest.conventions.threshold);
    detail::check_probability(probability);
    return {manifest.conventions.postprocess, probability, exclusive};
  }

  /// The masks that the caller sees: all classes; of SAM's outputs one, or the candidates.
  void choose(Logits& logits, const SegmentOptions& options, Prediction& result) const {
    const Manifest& manifest = bundle_->manifest;
    std::size_t first = 0, last = logits.masks;
    const bool sam = manifest.network.outputs == Outputs::sam;
    const bool best = sam && !options.multimask &&
                      manifest.conventions.mask_choice == MaskChoice::best && logits.masks > 1;
    if (sam) {
      first = (options.multimask || best) && logits.masks > 1 ? 1 : 0;
      last = options.multimask || best ? logits.masks : 1;
    }
    const std::size_t values = logits.side * logits.side;
    result.count = best ? 1 : last - first;
    const bool background = manifest.network.outputs == Outputs::labels;
    for (std::size_t set = 0; set < logits.sets; ++set) {
      const float* scores = logits.scores.data() + set * logits.masks;
      std::size_t from = first, to = last;
      if (best) {
        from = static_cast<std::size_t>(std::max_element(scores + first, scores + last) - scores);
        to = from + 1;
      }
      const float* source = logits.values.data() + set * logits.masks * values;
      result.low_res_logits.insert(result.low_res_logits.end(), source + from * values,
                                   source + to * values);
      result.scores.insert(result.scores.end(), scores + from + (background ? 1 : 0), scores + to);
    }
  }

  std::unique_ptr<detail::OpenBundle> bundle_;
};

}  // namespace medsa
