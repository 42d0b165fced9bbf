// specfx::keyed_sample; the specification is keyed_sample_reference in ../keyed_sample.py.
#pragma once

#include "common.h"

namespace specfx {

struct Philox {
  uint32_t key[2], counter[3];  // position and the sequence's words; the first word of the counter is the block
  void operator()(uint32_t block, uint32_t (&out)[4]) const {
    uint32_t c0 = block, c1 = counter[0], c2 = counter[1], c3 = counter[2], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round) {
      const uint64_t first = uint64_t{0xD2511F53} * c0, second = uint64_t{0xCD9E8D57} * c2;
      c0 = static_cast<uint32_t>(second >> 32) ^ c1 ^ k0;
      c1 = static_cast<uint32_t>(second);
      c2 = static_cast<uint32_t>(first >> 32) ^ c3 ^ k1;
      c3 = static_cast<uint32_t>(first);
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
  }
};

inline Tensor keyed_sample(const Tensor& logits_, const Tensor& keys_) {
  TORCH_CHECK(logits_.dim() == 2 && logits_.scalar_type() == at::kFloat, "specfx::keyed_sample: logits must be float32 [R, V]");
  TORCH_CHECK(keys_.dim() == 2 && keys_.size(0) == logits_.size(0) && keys_.size(1) == 3 && keys_.scalar_type() == at::kLong,
              "specfx::keyed_sample: keys must be int64 [R, 3]");
  const Tensor logits = logits_.contiguous(), keys = keys_.contiguous();
  Tensor out = at::empty({logits.size(0)}, keys.options());
  const int64_t entries = logits.size(1);
  at::parallel_for(0, logits.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* x = logits.const_data_ptr<float>() + row * entries;
      const int64_t* key = keys.const_data_ptr<int64_t>() + row * 3;
      const uint64_t seed = static_cast<uint64_t>(key[0]), sequence = static_cast<uint64_t>(key[1]);
      const Philox philox{{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
                          {static_cast<uint32_t>(key[2]), static_cast<uint32_t>(sequence), static_cast<uint32_t>(sequence >> 32)}};
      float best = kHidden;
      int64_t chosen = 0;
      for (int64_t v = 0; v < entries; v += 4) {
        const int64_t count = std::min<int64_t>(4, entries - v);
        float top = kHidden;
        for (int64_t i = 0; i < count; ++i) top = std::max(top, x[v + i]);
        if (top + 17.f <= best) continue;  // the noise is below 16.7
        uint32_t words[4];
        philox(static_cast<uint32_t>(v / 4), words);
        for (int64_t i = 0; i < count; ++i) {
          const float uniform = (static_cast<float>(words[i] >> 9) + 0.5f) * 0x1p-23f;
          const float score = x[v + i] - std::log(-std::log(uniform));
          if (score > best) best = score, chosen = v + i;
        }
      }
      out.mutable_data_ptr<int64_t>()[row] = chosen;
    }
  });
  return out;
}

}  // namespace specfx
