// medsa-deploy's runtime in C++17: a bundle → masks, with ONNX Runtime on the CPU.
//
//     medsa::Session session("liver.medsa");
//     medsa::ImageView image;
//     image.data = pixels, image.width = 320, image.height = 240;
//     const medsa::Embedding embedding = session.encode(image);  // once per image
//     const medsa::Prediction prediction = session.segment(embedding, {{{120, 88}}, {}, {}});
//     const std::uint8_t* mask = prediction.mask();              // (H, W) of 0 and 1
//
// Header-only; needs the standard library, and ONNX Runtime's shared library when it runs. Every
// failure is a `medsa::Error`. There is no global state. Each header mirrors a Python module:
//
//     errors       errors.py                    json, manifest  bundle/manifest.py, strict_json.py
//     files        bundle/files.py              sha256          hashlib
//     pixels       transforms/intensities.py    image           transforms/image.py
//     resampling   transforms/resampling.py     prompts         transforms/prompts.py
//     masks        transforms/masks.py          onnxruntime, graph  runtime/backends/
//     open_bundle  runtime/loading.py           decoding        runtime/decoding.py
//     prediction   runtime/prediction.py        session         runtime/session.py
#pragma once

#include "medsa/errors.hpp"
#include "medsa/manifest.hpp"
#include "medsa/pixels.hpp"
#include "medsa/prediction.hpp"
#include "medsa/prompts.hpp"
#include "medsa/session.hpp"
