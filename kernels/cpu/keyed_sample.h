// specfx::keyed_sample; the specification is keyed_sample_reference in ../keyed_sample.py.
//
// What the warpers keep of a row is all that stands behind one place in the order (value, entry), its *cut*: nothing is sorted but what
// has nearly the value of the cut. Logarithms are taken only of noise that could win.
#pragma once

#include "common.h"

namespace specfx {

constexpr int64_t kPart = 1 << 14;  // entries of a row that one work item looks at for the argmax
constexpr int64_t kChunk = 64;      // entries whose greatest is looked at before they are
constexpr double kMass = 0x1p40;    // of a row's best entry; see the specification
constexpr int kDeepest = 32;        // so far below the greatest logit masses are 0
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kNoise = 17;        // no noise is as large
typedef float Floats __attribute__((vector_size(32)));
typedef double Doubles __attribute__((vector_size(64)));
typedef int64_t Masses __attribute__((vector_size(64)));
typedef uint64_t Words __attribute__((vector_size(64)));

// Philox4x32-10 on eight blocks at a time, in the lower halves of 64-bit lanes.
struct Philox {
  uint32_t key[2], counter[3];  // position and the sequence's words; the first word of the counter is the block
  void operator()(uint32_t block, Words (&out)[4]) const {
    const Words low = Words{} + 0xFFFFFFFFu;
    Words c0 = Words{0, 1, 2, 3, 4, 5, 6, 7} + block, c1 = Words{} + counter[0], c2 = Words{} + counter[1], c3 = Words{} + counter[2];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round) {
      const Words first = c0 * 0xD2511F53u, second = c2 * 0xCD9E8D57u;
      c0 = (second >> 32) ^ c1 ^ k0;
      c1 = second & low;
      c2 = (first >> 32) ^ c3 ^ k1;
      c3 = first & low;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
  }
};

template <typename T> inline Vec widen(const T* x) {
  Vec y;
  for (int lane = 0; lane < kLanes; ++lane) y[lane] = to_float<T>(x[lane]);
  return y;
}
template <> inline Vec widen(const float* x) { return load(x); }
template <> inline Vec widen(const c10::BFloat16* x) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint32_t Bits __attribute__((vector_size(64)));
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  const Bits bits = __builtin_convertvector(halves, Bits) << 16;
  Vec y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

// The greatest of x[0, n); NaN if one is.
template <typename T> float greatest(const T* x, int64_t n) {
  Vec top = Vec{} + kHidden, strange = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec y = widen(x + i);
    top = y > top ? y : top;
    strange = y == y ? strange : y;
  }
  float result = kHidden;
  bool nan = false;
  for (int lane = 0; lane < kLanes; ++lane) result = std::max(result, top[lane]), nan |= strange[lane] != 0;
  for (; i < n; ++i) {
    const float y = to_float<T>(x[i]);
    result = std::max(result, y), nan |= y != y;
  }
  return nan ? std::numeric_limits<float>::quiet_NaN() : result;
}

struct Best {
  float score = kHidden;
  int64_t entry = 0;
};

// The first of the greatest of x[0, n), or the first NaN, as torch.argmax.
template <typename T> Best best_of(const T* x, int64_t n) {
  const int64_t step = 32 * kLanes;
  Best best;
  for (int64_t at = 0; at < n && best.score == best.score; at += step)
    if (const float top = greatest(x + at, std::min(step, n - at)); !(top <= best.score)) best = {top, at};
  for (const bool strange = best.score != best.score;; ++best.entry)
    if (const float y = to_float<T>(x[best.entry]); strange ? y != y : y == best.score) return best;
}

// exp(x) for x <= 0, to the last bit or two; below 1e-17 for all below -40.
inline Doubles exp_nonpositive(Doubles x) {
  x = x > -40.0 ? x : Doubles{} - 40.0;  // NaN too
  const Masses whole = __builtin_convertvector(x * 1.4426950408889634 - 0.5, Masses);
  const Doubles n = __builtin_convertvector(whole, Doubles);
  const Doubles r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  Doubles y = Doubles{} + 1.0 / 6227020800.0;
  for (const double factorial : {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0})
    y = y * r + 1.0 / factorial;
  const Masses bits = (whole + 1023) << 52;
  Doubles power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

// One row that is drawn. x: its logits, divided by the temperature.
struct Row {
  const float* x;
  int64_t entries;
  float top;                // the greatest
  std::vector<float> tops;  // the greatest of each chunk

  Row(const float* x_, int64_t n) : x(x_), entries(n), tops((n + kChunk - 1) / kChunk) {
    for (int64_t at = 0; at < n; at += kChunk) tops[at / kChunk] = greatest(x + at, std::min(kChunk, n - at));
    top = greatest(tops.data(), tops.size());
  }

  // Of up to eight logits.
  Masses masses(const float* y, int64_t count) const {
    Floats few = Floats{} + kHidden;
    if (count == 8)
      std::memcpy(&few, y, sizeof few);
    else
      for (int64_t i = 0; i < count; ++i) few[i] = y[i];
    const Doubles depth = __builtin_convertvector(few, Doubles) - static_cast<double>(top);
    return __builtin_convertvector(exp_nonpositive(depth) * kMass, Masses);
  }

  // A little less than what lies `depth` (not positive) from the greatest, whichever way floats round.
  float floor(double depth) const { return static_cast<float>(top + depth - 1e-3 - 1e-6 * std::abs(static_cast<double>(top))); }

  // Calls f with each entry of at least `least`.
  template <typename F> void each(float least, F f) const {
    for (int64_t at = 0; at < entries; at += kChunk) {
      if (tops[at / kChunk] < least) continue;
      for (int64_t v = at; v < std::min(at + kChunk, entries); ++v)
        if (x[v] >= least) f(v);
    }
  }

  // The k-th largest. As many chunks have an entry that is at least the k-th largest of their greatest, so it is at least that.
  float kth(int64_t k) const {
    float least = kHidden;
    std::vector<float> found;
    if (k <= static_cast<int64_t>(tops.size())) {
      found = tops;
      std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), std::greater<>());
      least = found[k - 1];
      found.clear();
    }
    each(least, [&](int64_t v) { found.push_back(x[v]); });
    std::nth_element(found.begin(), found.begin() + (k - 1), found.end(), std::greater<>());
    return found[k - 1];
  }
};

// Kept is what is greater than `value`, and of its equals the entries from `entry` on.
struct Cut {
  float value = kHidden;
  int64_t entry = 0;
  bool keeps(float y, int64_t v) const { return y > value || (y == value && v >= entry); }
};

// Of the entries of at least `least`, the most probable ones, until the others' share is at most 1 - top_p.
inline Cut nucleus(const Row& row, float least, double top_p) {
  constexpr int kBuckets = 8 * kDeepest;  // by value: eighths below the greatest
  int64_t mass[kBuckets] = {}, total = 0;
  const auto bucket = [&](float y) {
    const double depth = (static_cast<double>(row.top) - y) * 8;
    return depth < kBuckets ? static_cast<int>(depth) : kBuckets - 1;
  };
  for (int64_t at = 0; at < row.entries; at += 8) {
    const float most = row.tops[at / kChunk];
    if (most < least || most < row.top - static_cast<double>(kDeepest)) continue;
    const int64_t count = std::min<int64_t>(8, row.entries - at);
    const Masses own = row.masses(row.x + at, count);
    for (int64_t i = 0; i < count; ++i)
      if (own[i] > 0 && row.x[at + i] >= least) mass[bucket(row.x[at + i])] += own[i], total += own[i];
  }
  const int64_t wanted = total - static_cast<int64_t>((1 - top_p) * static_cast<double>(total));
  int64_t above = 0;
  int at = 0;
  while (at + 1 < kBuckets && above + mass[at] < wanted) above += mass[at++];
  std::vector<std::pair<float, int64_t>> close;
  row.each(std::max(least, row.floor(-(at + 1) / 8.0)), [&](int64_t v) {
    if (bucket(row.x[v]) == at) close.emplace_back(row.x[v], v);
  });
  std::sort(close.begin(), close.end(), std::greater<>());
  Cut cut{close[0].first, close[0].second};
  for (const auto& [y, v] : close) {
    if (above >= wanted) break;
    cut = {y, v};
    above += row.masses(&y, 1)[0];
  }
  return cut;
}

inline int64_t draw(const Row& row, const Cut& cut, double min_p, const Philox& philox) {
  const auto has_mass = [&](float y) { return !(static_cast<double>(row.masses(&y, 1)[0]) < min_p * kMass); };
  const float least = min_p > 0 ? std::max(cut.value, row.floor(std::log(min_p))) : cut.value;
  Best best;
  for (int64_t at = 0; at < row.entries; at += kChunk) {
    const float top = row.tops[at / kChunk];
    if (top < least || top + kNoise <= best.score) continue;
    // Noise g wins only if top + g > best, give or take what adding them rounds: u is then above exp(-exp(top - best)).
    const double lead = static_cast<double>(best.score) - top, slack = 1e-3 + 4e-7 * std::abs(static_cast<double>(best.score));
    const uint64_t enough = static_cast<uint64_t>(std::max(0.0, std::exp(-std::exp(slack - lead)) * 0x1p23 - 2));
    uint64_t words[4][kChunk / 4];
    bool any = false;
    for (int64_t part = 0; part < 2; ++part) {
      Words bits[4], most = {};
      philox(static_cast<uint32_t>(at / 4 + part * 8), bits);
      for (int word = 0; word < 4; ++word) {
        bits[word] >>= 9;
        most = bits[word] > most ? bits[word] : most;
        std::memcpy(&words[word][part * 8], &bits[word], sizeof bits[word]);
      }
      for (int lane = 0; lane < 8; ++lane) any |= most[lane] >= enough;
    }
    if (!any) continue;
    for (int64_t v = at; v < std::min(at + kChunk, row.entries); ++v) {
      const uint64_t word = words[v % 4][(v - at) / 4];
      if (word < enough || row.x[v] < least || !cut.keeps(row.x[v], v)) continue;
      const float uniform = (static_cast<float>(word) + 0.5f) * 0x1p-23f;
      const float score = row.x[v] - std::log(-std::log(uniform));
      if (score > best.score && (min_p <= 0 || has_mass(row.x[v]))) best = {score, v};
    }
  }
  return best.entry;
}

inline int64_t sample(std::vector<float>& x, const int64_t* key, const double* warp) {
  const int64_t n = x.size();
  const float temperature = static_cast<float>(warp[0]);
  if (!(greatest(x.data(), n) < std::numeric_limits<float>::infinity())) return -1;  // something is inf or NaN
  for (float& y : x) y = std::min(y / temperature, kLargest);
  const Row row(x.data(), n);
  if (!(row.top > kHidden)) return -1;
  Cut cut;
  if (warp[1] > 0 && warp[1] < static_cast<double>(n)) cut.value = row.kth(static_cast<int64_t>(warp[1]));
  if (warp[2] < 1) cut = nucleus(row, cut.value, warp[2]);
  const uint64_t seed = static_cast<uint64_t>(key[0]), sequence = static_cast<uint64_t>(key[1]);
  return draw(row, cut, warp[3],
              {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
               {static_cast<uint32_t>(key[2]), static_cast<uint32_t>(sequence), static_cast<uint32_t>(sequence >> 32)}});
}

template <typename T> void choose(const T* logits, int64_t rows, int64_t entries, const int64_t* keys, const double* warp, int64_t* out) {
  std::vector<int64_t> greedy, drawn;
  for (int64_t row = 0; row < rows; ++row) (static_cast<float>(warp[row * 4]) == 0 ? greedy : drawn).push_back(row);
  const int64_t parts = std::max<int64_t>(1, (entries + kPart - 1) / kPart);
  std::vector<Best> best(greedy.size() * parts);
  at::parallel_for(0, best.size(), 2, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t at = item % parts * kPart;
      best[item] = best_of(logits + greedy[item / parts] * entries + at, std::min(kPart, entries - at));
      best[item].entry += at;
    }
  });
  for (size_t i = 0; i < greedy.size(); ++i) {
    Best top = best[i * parts];
    for (int64_t part = 1; part < parts && top.score == top.score; ++part) {
      const Best& other = best[i * parts + part];
      if (!(other.score <= top.score)) top = other;
    }
    out[greedy[i]] = top.entry;
  }
  at::parallel_for(0, drawn.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> x(entries);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = drawn[i];
      for (int64_t v = 0; v < entries; ++v) x[v] = to_float<T>(logits[row * entries + v]);
      out[row] = sample(x, keys + row * 3, warp + row * 4);
    }
  });
}

inline Tensor keyed_sample(const Tensor& logits_, const Tensor& keys_, const Tensor& warp_) {
  const int64_t rows = logits_.dim() == 2 ? logits_.size(0) : -1;
  TORCH_CHECK(rows >= 0 && logits_.size(1) > 0 && logits_.is_floating_point(), "specfx::keyed_sample: logits must be floating [R, V]");
  TORCH_CHECK(keys_.dim() == 2 && keys_.size(0) == rows && keys_.size(1) == 3 && keys_.scalar_type() == at::kLong,
              "specfx::keyed_sample: keys must be int64 [R, 3]");
  TORCH_CHECK(warp_.dim() == 2 && warp_.size(0) == rows && warp_.size(1) == 4 && warp_.scalar_type() == at::kDouble,
              "specfx::keyed_sample: warp must be float64 [R, 4]");
  const Tensor logits = logits_.contiguous(), keys = keys_.contiguous(), warp = warp_.contiguous();
  Tensor out = at::empty({rows}, keys.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, logits.scalar_type(), "specfx::keyed_sample", [&] {
    choose(logits.const_data_ptr<scalar_t>(), rows, logits.size(1), keys.const_data_ptr<int64_t>(), warp.const_data_ptr<double>(),
           out.mutable_data_ptr<int64_t>());
  });
  return out;
}

}  // namespace specfx
