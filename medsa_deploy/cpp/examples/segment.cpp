// segment BUNDLE IMAGE.pgm -o MASK.pgm: one image and a prompt → its mask.

#include <cstdio>
#include <string>
#include <vector>

#include "command_line.hpp"
#include "netpbm.hpp"

namespace {

constexpr const char* help =
    "usage: segment BUNDLE IMAGE.pgm|IMAGE.ppm -o MASK.pgm [options]\n"
    "\n"
    "Writes the mask as 0 and 255, or a number for each of several classes.\n"
    "\n";

int segment(const std::vector<std::string>& words) {
  example::Options options;
  std::string output;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word == "--help") {
      std::printf("%s%s", help, example::shared_help);
      return 0;
    }
    if (word.rfind("-", 0) != 0) {
      options.names.push_back(word);
      continue;
    }
    if (i + 1 == words.size()) {
      example::refuse(word + " has no value: see segment --help");
    }
    const std::string& value = words[++i];
    if (word == "-o") {
      output = value;
    } else if (!example::add_option(options, word, value)) {
      example::refuse("unknown option " + word + ": see segment --help");
    }
  }
  if (options.names.size() != 2 || output.empty()) {
    example::refuse("expected a bundle, an image and -o MASK.pgm: see segment --help");
  }
  if (const char* library = std::getenv("MEDSA_ONNXRUNTIME")) {
    options.load.onnxruntime = library;
  }
  const example::Picture picture = example::read_picture(options.names[1]);
  const medsa::Session session(options.names[0], options.load);
  const medsa::Embedding embedding = session.encode(picture.view(), options.window);
  const medsa::Prediction prediction = session.segment(embedding, options.prompt, options.segment);
  example::write_pgm(output, example::shown(prediction), prediction.width, prediction.height);
  const std::vector<std::string> classes = session.classes();
  for (std::size_t k = 0; k < prediction.count; ++k) {
    const medsa::Region region = prediction.region(0, k);
    std::printf("%s: %zu pixels in %d,%d,%d,%d, score %.3f\n", classes.at(k).c_str(), region.area,
                region.x0, region.y0, region.x1, region.y1,
                static_cast<double>(prediction.score(0, k)));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return example::run(segment, argc, argv); }
