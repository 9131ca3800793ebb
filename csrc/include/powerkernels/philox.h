// Philox4x32-10 (Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3").
#pragma once

#include <cstdint>

namespace powerkernels {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t v[4];
};

// counter = (index, position, step, chain); the low word of the seed is the first key word.
inline PhiloxWords philox4x32(PhiloxWords counter, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed);
  uint32_t key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t* c = counter.v;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(kPhiloxMultiplier0) * c[0];
    const uint64_t product1 = static_cast<uint64_t>(kPhiloxMultiplier1) * c[2];
    const uint32_t c0 = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ key0;
    const uint32_t c2 = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ key1;
    c[1] = static_cast<uint32_t>(product1);
    c[3] = static_cast<uint32_t>(product0);
    c[0] = c0;
    c[2] = c2;
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  return counter;
}

// A double in [0, 1) with 53 random bits.
inline double uniform53(uint32_t hi, uint32_t lo) {
  return (static_cast<double>(hi >> 5) * 0x1p26 + static_cast<double>(lo >> 6)) * 0x1p-53;
}

}  // namespace powerkernels
