// Bytes → their SHA-256 (FIPS 180-4), with the processor's own instructions if it has them.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#if (defined(__GNUC__) || defined(__clang__)) && defined(__x86_64__)
#define MEDSA_SHA_NI 1
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace medsa {
namespace detail {

using ShaState = std::array<std::uint32_t, 8>;

alignas(16) inline constexpr std::array<std::uint32_t, 64> sha_constants = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

inline std::uint32_t rotate(std::uint32_t value, int bits) {
  return (value >> bits) | (value << (32 - bits));
}

/// Blocks of 64 bytes into the state.
inline void compress_portable(ShaState& state, const std::uint8_t* data, std::size_t blocks) {
  for (; blocks > 0; --blocks, data += 64) {
    std::array<std::uint32_t, 64> w;
    for (std::size_t i = 0; i < 16; ++i) {
      w[i] = (static_cast<std::uint32_t>(data[4 * i]) << 24) | (data[4 * i + 1] << 16) |
             (data[4 * i + 2] << 8) | data[4 * i + 3];
    }
    for (std::size_t i = 16; i < 64; ++i) {
      const std::uint32_t s0 = rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ (w[i - 15] >> 3);
      const std::uint32_t s1 = rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ (w[i - 2] >> 10);
      w[i] = w[i - 16] + s0 + w[i - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = state;
    for (std::size_t i = 0; i < 64; ++i) {
      const std::uint32_t s1 = rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25);
      const std::uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + sha_constants[i] + w[i];
      const std::uint32_t s0 = rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22);
      const std::uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
      h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const ShaState round = {a, b, c, d, e, f, g, h};
    for (std::size_t i = 0; i < 8; ++i) {
      state[i] += round[i];
    }
  }
}

#ifdef MEDSA_SHA_NI
/// Whether the processor has SHA, SSSE3 and SSE4.1 instructions.
inline bool has_sha_instructions() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  const bool sse = __get_cpuid(1, &a, &b, &c, &d) && (c >> 9 & 1) && (c >> 19 & 1);
  return sse && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b >> 29 & 1);
}

/// As `compress_portable`; the state is in the order of the instructions meanwhile: ABEF and CDGH.
__attribute__((target("sha,sse4.1,ssse3"))) inline void compress_sha_ni(ShaState& state,
                                                                        const std::uint8_t* data,
                                                                        std::size_t blocks) {
  const auto load = [](const void* at) __attribute__((target("sse4.1"))) {
    return _mm_loadu_si128(static_cast<const __m128i*>(at));
  };
  const __m128i big_endian = _mm_set_epi64x(0x0c0d0e0f08090a0b, 0x0405060700010203);
  const __m128i abcd = _mm_shuffle_epi32(load(&state[0]), 0xB1);
  const __m128i efgh = _mm_shuffle_epi32(load(&state[4]), 0x1B);
  __m128i abef = _mm_alignr_epi8(abcd, efgh, 8);
  __m128i cdgh = _mm_blend_epi16(efgh, abcd, 0xF0);
  for (; blocks > 0; --blocks, data += 64) {
    const __m128i abef_before = abef, cdgh_before = cdgh;
    __m128i w[4];
    for (int i = 0; i < 16; ++i) {
      __m128i& now = w[i & 3];  // W of four steps before, until it is replaced
      if (i < 4) {
        now = _mm_shuffle_epi8(load(data + 16 * i), big_endian);
      } else {
        const __m128i previous = w[(i + 3) & 3];
        const __m128i sum = _mm_add_epi32(_mm_sha256msg1_epu32(now, w[(i + 1) & 3]),
                                          _mm_alignr_epi8(previous, w[(i + 2) & 3], 4));
        now = _mm_sha256msg2_epu32(sum, previous);
      }
      const __m128i words = _mm_add_epi32(now, load(&sha_constants[static_cast<std::size_t>(4 * i)]));
      cdgh = _mm_sha256rnds2_epu32(cdgh, abef, words);
      abef = _mm_sha256rnds2_epu32(abef, cdgh, _mm_shuffle_epi32(words, 0x0E));
    }
    abef = _mm_add_epi32(abef, abef_before);
    cdgh = _mm_add_epi32(cdgh, cdgh_before);
  }
  const __m128i feba = _mm_shuffle_epi32(abef, 0x1B), dchg = _mm_shuffle_epi32(cdgh, 0xB1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(&state[0]), _mm_blend_epi16(feba, dchg, 0xF0));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(&state[4]), _mm_alignr_epi8(dchg, feba, 8));
}
#endif

}  // namespace detail

/// The SHA-256 of bytes that come in pieces.
class Sha256 {
 public:
  /// `portable`: without the processor's own instructions, for tests.
  explicit Sha256(bool portable = false) : portable_(portable) {
#ifdef MEDSA_SHA_NI
    portable_ = portable_ || !detail::has_sha_instructions();
#else
    portable_ = true;
#endif
  }

  void update(const void* data, std::size_t size) {
    const auto* bytes = static_cast<const std::uint8_t*>(data);
    if (size == 0) {
      return;  // also of null
    }
    length_ += size;
    if (pending_ > 0) {
      const std::size_t more = std::min(size, block_.size() - pending_);
      std::memcpy(block_.data() + pending_, bytes, more);
      pending_ += more, bytes += more, size -= more;
      if (pending_ < block_.size()) {
        return;
      }
      compress(block_.data(), 1);
      pending_ = 0;
    }
    compress(bytes, size / block_.size());
    pending_ = size % block_.size();
    if (pending_ > 0) {
      std::memcpy(block_.data(), bytes + (size - pending_), pending_);
    }
  }

  /// The digest in hexadecimal. Nothing can be added afterwards.
  std::string hex() {
    const std::uint64_t bits = length_ * 8;
    const std::uint8_t one = 0x80, zero = 0;
    update(&one, 1);
    while (pending_ != 56) {
      update(&zero, 1);
    }
    std::array<std::uint8_t, 8> end;
    for (std::size_t i = 0; i < 8; ++i) {
      end[i] = static_cast<std::uint8_t>(bits >> (56 - 8 * i));
    }
    update(end.data(), end.size());
    std::string text;
    for (const std::uint32_t word : state_) {
      for (int shift = 28; shift >= 0; shift -= 4) {
        text += "0123456789abcdef"[word >> shift & 15];
      }
    }
    return text;
  }

 private:
  void compress(const std::uint8_t* data, std::size_t blocks) {
    if (blocks == 0) {
      return;
    }
#ifdef MEDSA_SHA_NI
    if (!portable_) {
      return detail::compress_sha_ni(state_, data, blocks);
    }
#endif
    detail::compress_portable(state_, data, blocks);
  }

  detail::ShaState state_ = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                             0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::uint8_t, 64> block_{};
  std::size_t pending_ = 0;
  std::uint64_t length_ = 0;
  bool portable_;
};

}  // namespace medsa
