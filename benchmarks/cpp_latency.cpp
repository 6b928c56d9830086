// cpp_latency BUNDLE THREADS SIDE: milliseconds of the C++ session, a line for each request.
//
// Standard input has a word a line: `encode`, or `click` for a prompt on the last embedding. The
// image is SIDE × SIDE grey bytes, which come first.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string>
#include <vector>

#include "medsa.hpp"

int main(int, char** words) {
  using Clock = std::chrono::steady_clock;
  medsa::LoadOptions options;
  options.threads = std::atoi(words[2]);
  options.onnxruntime = std::getenv("MEDSA_ONNXRUNTIME");
  const int side = std::atoi(words[3]);
  std::vector<std::uint8_t> pixels(static_cast<std::size_t>(side) * static_cast<std::size_t>(side));
  std::cin.read(reinterpret_cast<char*>(pixels.data()), static_cast<std::streamsize>(pixels.size()));
  medsa::ImageView image;
  image.data = pixels.data();
  image.width = image.height = side;
  medsa::Prompt prompt;
  const float middle = static_cast<float>(side) / 2;
  prompt.points.push_back({middle, middle, 1});
  prompt.box = medsa::Box{middle / 2, middle / 2, middle * 1.5F, middle * 1.5F};
  const medsa::Session session(words[1], options);
  medsa::Embedding embedding;
  for (std::string word; std::cin >> word;) {
    const auto start = Clock::now();
    if (word == "encode") {
      embedding = session.encode(image);
    } else {
      session.segment(embedding, prompt);
    }
    const std::chrono::duration<double, std::milli> elapsed = Clock::now() - start;
    std::printf("%.4f\n", elapsed.count());
    std::fflush(stdout);
  }
}
