// stream BUNDLE: raw frames on standard input → a mask for each on standard output.
//
//     camera | stream ultrasound.medsa --size 640x480 --box 200,120,420,360 | display

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <map>
#include <string>
#include <vector>

#ifdef _WIN32
#include <fcntl.h>
#include <io.h>
#endif

#include "command_line.hpp"

namespace {

constexpr const char* help =
    "usage: stream BUNDLE --size WIDTHxHEIGHT [options] < FRAMES > MASKS\n"
    "\n"
    "Reads frames without a header, row by row, and writes WIDTH·HEIGHT bytes for each: the mask\n"
    "as 0 and 255, or a number for each of several classes. A frame without structure, one flat\n"
    "grey, gives an empty mask.\n"
    "\n"
    "  --type u8|u16|i16|f32       of the frames' values, in this machine's byte order; default u8\n"
    "  --channels 1|3              default 1\n"
    "  --report yes|no             print the milliseconds of every frame on standard error\n";

struct Stream {
  example::Options options;
  int width = 0, height = 0, channels = 1;
  medsa::PixelType type = medsa::PixelType::u8;
  bool report = false;
};

void set_size(Stream& stream, const std::string& value) {
  const std::size_t cross = value.find('x');
  if (cross != std::string::npos) {
    stream.width = example::whole_number(value.substr(0, cross), "--size");
    stream.height = example::whole_number(value.substr(cross + 1), "--size");
  }
  if (stream.width < 1 || stream.height < 1 || stream.width > 16384 || stream.height > 16384) {
    example::refuse("--size " + value + " is not WIDTHxHEIGHT, each from 1 to 16384");
  }
}

/// An option of this example alone; false for another.
bool add_option(Stream& stream, const std::string& name, const std::string& value) {
  const std::map<std::string, medsa::PixelType> types = {{"u8", medsa::PixelType::u8},
                                                         {"u16", medsa::PixelType::u16},
                                                         {"i16", medsa::PixelType::i16},
                                                         {"f32", medsa::PixelType::f32}};
  if (name == "--size") {
    set_size(stream, value);
  } else if (name == "--type") {
    if (types.count(value) == 0) {
      example::refuse("--type " + value + " is none of u8, u16, i16, f32");
    }
    stream.type = types.at(value);
  } else if (name == "--channels") {
    stream.channels = example::whole_number(value, name);
  } else if (name == "--report") {
    stream.report = value == "yes";
  } else {
    return false;
  }
  return true;
}

Stream parsed(const std::vector<std::string>& words) {
  Stream stream;
  for (std::size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (word.rfind("-", 0) != 0) {
      stream.options.names.push_back(word);
      continue;
    }
    if (i + 1 == words.size()) {
      example::refuse(word + " has no value: see stream --help");
    }
    const std::string& value = words[++i];
    if (!add_option(stream, word, value) && !example::add_option(stream.options, word, value)) {
      example::refuse("unknown option " + word + ": see stream --help");
    }
  }
  if (stream.options.names.size() != 1 || stream.width == 0) {
    example::refuse("expected a bundle and --size WIDTHxHEIGHT: see stream --help");
  }
  if (stream.channels != 1 && stream.channels != 3) {
    example::refuse("--channels is " + std::to_string(stream.channels) + ", expected 1 or 3");
  }
  return stream;
}

/// The mask of a frame; empty for a frame that is one flat grey.
std::vector<std::uint8_t> mask_of(const medsa::Session& session, const Stream& stream,
                                  const medsa::ImageView& image) {
  try {
    const medsa::Embedding embedding = session.encode(image, stream.options.window);
    return example::shown(
        session.segment(embedding, stream.options.prompt, stream.options.segment));
  } catch (const medsa::Error& error) {
    if (error.code() != medsa::Code::image) {
      throw;
    }
    std::fprintf(stderr, "warning: %s\n", error.what());
    return std::vector<std::uint8_t>(static_cast<std::size_t>(image.width) *
                                     static_cast<std::size_t>(image.height));
  }
}

int run(const std::vector<std::string>& words) {
  if (!words.empty() && words[0] == "--help") {
    std::printf("%s%s", help, example::shared_help);
    return 0;
  }
  Stream stream = parsed(words);
#ifdef _WIN32
  _setmode(_fileno(stdin), _O_BINARY);
  _setmode(_fileno(stdout), _O_BINARY);
#endif
  if (const char* library = std::getenv("MEDSA_ONNXRUNTIME")) {
    stream.options.load.onnxruntime = library;
  }
  const medsa::Session session(stream.options.names[0], stream.options.load);
  const std::size_t value = stream.type == medsa::PixelType::u8    ? 1
                            : stream.type == medsa::PixelType::f32 ? 4
                                                                   : 2;
  std::vector<std::uint8_t> frame(static_cast<std::size_t>(stream.width) *
                                  static_cast<std::size_t>(stream.height) *
                                  static_cast<std::size_t>(stream.channels) * value);
  medsa::ImageView image;
  image.data = frame.data();
  image.width = stream.width;
  image.height = stream.height;
  image.type = stream.type;
  image.channels = stream.channels;
  for (std::size_t number = 0;; ++number) {
    const std::size_t size = std::fread(frame.data(), 1, frame.size(), stdin);
    if (size == 0 && std::feof(stdin)) {
      return 0;
    }
    if (size < frame.size()) {
      throw medsa::Error(medsa::Code::image, "frame " + std::to_string(number) + " is cut off: " +
                                                 std::to_string(size) + " bytes, expected " +
                                                 std::to_string(frame.size()));
    }
    const auto start = std::chrono::steady_clock::now();
    const std::vector<std::uint8_t> mask = mask_of(session, stream, image);
    const std::chrono::duration<double, std::milli> time =
        std::chrono::steady_clock::now() - start;
    if (std::fwrite(mask.data(), 1, mask.size(), stdout) < mask.size() ||
        std::fflush(stdout) != 0) {
      example::refuse("standard output cannot be written: the masks were not taken");
    }
    if (stream.report) {
      std::fprintf(stderr, "frame %zu: %.1f ms\n", number, time.count());
    }
  }
}

}  // namespace

int main(int argc, char** argv) { return example::run(run, argc, argv); }
