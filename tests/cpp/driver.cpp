// Requests on standard input → replies on standard output, so that a test runs many cases in one
// process. A request is a line of words, and the bytes that it announces. A reply is a line
// `ok SIZE…` with the sizes of the arrays that follow, or `error NAME EXIT_CODE MESSAGE`.

#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "medsa.hpp"

namespace {

using Bytes = std::vector<char>;

template <class T>
Bytes bytes_of(const std::vector<T>& values) {
  const auto* first = reinterpret_cast<const char*>(values.data());
  return Bytes(first, first + values.size() * sizeof(T));
}

/// An image of the caller with the bytes around it: rows may have gaps or run upwards.
struct Pixels {
  Bytes bytes;
  std::size_t offset = 0;
  medsa::ImageView view;

  medsa::ImageView image() const {
    medsa::ImageView result = view;
    result.data = bytes.data() + offset;
    return result;
  }
};

class Driver {
 public:
  void serve() {
    std::string line;
    while (std::getline(std::cin, line)) {
      words_ = std::istringstream(line);
      std::vector<Bytes> arrays;
      std::string reply = "ok";
      try {
        arrays = answer(word());
      } catch (const medsa::Error& error) {
        reply = std::string("error ") + error.name() + " " + std::to_string(error.exit_code()) +
                " " + error.what();
      }
      for (const Bytes& array : arrays) {
        reply += " " + std::to_string(array.size());
      }
      std::cout << reply << '\n';
      for (const Bytes& array : arrays) {
        std::cout.write(array.data(), static_cast<std::streamsize>(array.size()));
      }
      std::cout.flush();
    }
  }

 private:
  std::string word() {
    std::string result;
    words_ >> result;
    return result;
  }
  double number() { return std::strtod(word().c_str(), nullptr); }
  int integer() { return std::atoi(word().c_str()); }

  Bytes read(std::size_t size) {
    Bytes bytes(size);
    std::cin.read(bytes.data(), static_cast<std::streamsize>(size));
    return bytes;
  }

  std::vector<float> floats(std::size_t count) {
    const Bytes bytes = read(count * sizeof(float));
    std::vector<float> values(count);
    if (count > 0) {
      std::memcpy(values.data(), bytes.data(), bytes.size());
    }
    return values;
  }

  /// A window of two numbers; none for "none".
  std::optional<medsa::IntensityWindow> window() {
    const std::string low = word();
    if (low == "none") {
      return std::nullopt;
    }
    return medsa::IntensityWindow{std::strtod(low.c_str(), nullptr), number()};
  }

  std::vector<Bytes> answer(const std::string& request) {
    if (request == "image") return image();
    if (request == "clear") return images_.clear(), std::vector<Bytes>{};
    if (request == "preprocess") return preprocess();
    if (request == "masks") return masks();
    if (request == "open") return open();
    if (request == "encode") return encode();
    if (request == "segment") return segment();
    if (request == "manifest") return manifest();
    if (request == "sha256") return sha256();
    throw std::runtime_error("unknown request " + request);
  }

  std::vector<Bytes> image() {
    Pixels pixels;
    const std::string type = word();
    pixels.view.type = type == "u8"    ? medsa::PixelType::u8
                       : type == "u16" ? medsa::PixelType::u16
                       : type == "i16" ? medsa::PixelType::i16
                                       : medsa::PixelType::f32;
    pixels.view.width = integer();
    pixels.view.height = integer();
    pixels.view.channels = integer();
    pixels.view.pitch = integer();
    pixels.view.inverted = integer() != 0;
    pixels.offset = static_cast<std::size_t>(integer());
    pixels.bytes = read(static_cast<std::size_t>(integer()));
    images_.push_back(std::move(pixels));
    return {};
  }

  std::vector<Bytes> preprocess() {
    medsa::Conventions conventions = conventions_of("preprocess", word());
    const int size = integer();
    std::optional<medsa::IntensityWindow> used;
    const medsa::ImageView view = images_.back().image();
    const auto planes = medsa::detail::planes_of(view);
    const auto shown =
        medsa::detail::intensities(planes, conventions, view.inverted, window(), used);
    const auto [values, frame] = medsa::detail::preprocess(shown, conventions.preprocess, size);
    return {bytes_of(values), bytes_of(std::vector<int>{frame.content_height,
                                                        frame.content_width})};
  }

  /// The conventions of a manifest with one word, so that names are read as a bundle's are.
  static medsa::Conventions conventions_of(const std::string& field, const std::string& name) {
    const std::string preprocess = field == "preprocess" ? name : "sam";
    const std::string more = field == "preprocess" ? "" : ",\"" + field + "\":\"" + name + "\"";
    return medsa::detail::decode_conventions(
        medsa::json::parse("{\"preprocess\":\"" + preprocess + "\"" + more + "}"));
  }

  std::vector<Bytes> masks() {
    medsa::detail::MaskRule rule;
    rule.postprocess = conventions_of("postprocess", word()).postprocess;
    rule.probability = number();
    rule.exclusive = integer() != 0;
    const int count = integer(), side = integer();
    medsa::Frame frame;
    frame.network_size = integer();
    frame.height = integer(), frame.width = integer();
    frame.content_height = integer(), frame.content_width = integer();
    const auto layers = static_cast<std::size_t>(count), edge = static_cast<std::size_t>(side);
    const std::vector<float> logits = floats(layers * edge * edge);
    const auto operators = medsa::detail::mask_operators(rule.postprocess, side, frame);
    std::vector<std::uint8_t> result((layers - (rule.exclusive ? 1 : 0)) *
                                     static_cast<std::size_t>(frame.width) *
                                     static_cast<std::size_t>(frame.height));
    medsa::detail::image_masks(logits.data(), layers, edge, operators, rule, result.data());
    return {bytes_of(result)};
  }

  std::vector<Bytes> open() {
    medsa::LoadOptions options;
    options.threads = integer();
    options.precision = word();
    options.manifest_sha256 = word();
    if (options.manifest_sha256 == "any") {
      options.manifest_sha256.clear();
    }
    if (const char* library = std::getenv("MEDSA_ONNXRUNTIME")) {
      options.onnxruntime = library;
    }
    std::string path;
    std::getline(words_ >> std::ws, path);
    session_.reset();
    session_ = std::make_unique<medsa::Session>(path, options);
    std::string names;
    for (const std::string& name : session_->classes()) {
      names += name + "\n";
    }
    return {Bytes(names.begin(), names.end())};
  }

  /// Encode all images: one of a network on single images, or the slices of chunks.
  std::vector<Bytes> encode() {
    const auto limits = window();
    std::vector<medsa::ImageView> views;
    for (const Pixels& pixels : images_) {
      views.push_back(pixels.image());
    }
    embeddings_ = word() == "slices"
                      ? session_->encode_slices(views, limits)
                      : std::vector<medsa::Embedding>{session_->encode(views.at(0), limits)};
    std::vector<Bytes> arrays;
    for (const medsa::Embedding& embedding : embeddings_) {
      arrays.push_back(bytes_of(embedding.values));
    }
    return arrays;
  }

  std::vector<Bytes> segment() {
    const auto place = static_cast<std::size_t>(integer());
    medsa::SegmentOptions options;
    options.multimask = integer() != 0;
    if (const std::string threshold = word(); threshold != "none") {
      options.threshold = std::strtod(threshold.c_str(), nullptr);
    }
    std::vector<medsa::Prompt> prompts(static_cast<std::size_t>(integer()));
    for (medsa::Prompt& prompt : prompts) {
      const auto points = static_cast<std::size_t>(integer());
      const bool box = integer() != 0;
      const auto mask = static_cast<std::size_t>(integer());
      const std::vector<float> values = floats(3 * points + (box ? 4 : 0));
      for (std::size_t i = 0; i < points; ++i) {
        prompt.points.push_back(
            {values[3 * i], values[3 * i + 1], static_cast<int>(values[3 * i + 2])});
      }
      if (box) {
        const float* corners = values.data() + 3 * points;
        prompt.box = medsa::Box{corners[0], corners[1], corners[2], corners[3]};
      }
      prompt.mask = floats(mask);
    }
    const auto prediction = session_->segment(embeddings_.at(place), prompts, options);
    std::vector<int> regions;
    for (std::size_t set = 0; set < prediction.sets; ++set) {
      for (std::size_t k = 0; k < prediction.count; ++k) {
        const medsa::Region region = prediction.region(set, k);
        regions.insert(regions.end(), {static_cast<int>(region.area), region.x0, region.y0,
                                       region.x1, region.y1});
      }
    }
    return {bytes_of(prediction.masks), bytes_of(prediction.scores),
            bytes_of(prediction.low_res_logits), bytes_of(regions),
            bytes_of(prediction.label_map()),
            bytes_of(std::vector<double>{prediction.decode_ms, prediction.postprocess_ms})};
  }

  std::vector<Bytes> manifest() {
    const Bytes text = read(static_cast<std::size_t>(integer()));
    medsa::manifest_from_json(std::string(text.begin(), text.end()));
    return {};
  }

  std::vector<Bytes> sha256() {
    medsa::Sha256 digest(word() == "portable");
    const auto piece = static_cast<std::size_t>(integer());
    const Bytes data = read(static_cast<std::size_t>(integer()));
    for (std::size_t at = 0; at < data.size(); at += piece) {
      digest.update(data.data() + at, std::min(piece, data.size() - at));
    }
    const std::string hex = digest.hex();
    return {Bytes(hex.begin(), hex.end())};
  }

  std::istringstream words_;
  std::vector<Pixels> images_;
  std::unique_ptr<medsa::Session> session_;
  std::vector<medsa::Embedding> embeddings_;
};

}  // namespace

int main() {
  std::ios::sync_with_stdio(false);
  Driver().serve();
}
