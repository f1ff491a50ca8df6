// One step of AdamW with second moments in full (also in 8 bits), averaged or factored, over a table of CPU tensors.
//
// The definition is kernels/reference.py, in the same order of operations: arithmetic in float32 (float64 for
// float64 parameters), each value rounded once, when it is written. update.py builds the table, build.py compiles
// this file. A tensor is seen as [pre, red, post], averaged over the middle (layout.py); one [red, post] is a unit.
//
// What is summed and in which order depends on shapes alone, never on the number of threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <thread>
#include <type_traits>
#include <vector>

#include "threads.h"

#ifdef _WIN32
#define SLIMADAM_EXPORT extern "C" __declspec(dllexport)
#else
#define SLIMADAM_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

constexpr int64_t kCodeBlock = 256;       // elements that share a scale, as slimadam.state.int8.BLOCK
constexpr int64_t kTask = 1 << 18;        // elements that a thread takes at a time
constexpr int64_t kSumTask = 1 << 17;     // and at most where it sums their squares only
constexpr int64_t kSmallUnit = 1 << 15;   // a unit of so few elements stays in one core's cache
constexpr int64_t kSumBlock = 1024;       // elements summed in a row before their sum is added to others
constexpr int64_t kColumnBlock = 4096;    // columns whose sums stay close at hand
constexpr int64_t kColumnsInTurn = 64;    // columns that a thread averages at a time
constexpr int64_t kFewColumns = 64;       // at least so many in a task
constexpr int64_t kRowBlock = 64;         // rows of a column summed before their sum is added to others
constexpr int64_t kSerial = 1 << 14;      // fewer elements than this are not worth waking threads
constexpr int64_t kPatience = 50000;       // how often a thread looks for another's work before it yields

constexpr int32_t kFloat8Offset = 125;     // what is added to a code to get the upper bits of a float
constexpr int32_t kFloat8Dropped = 22;     // and how many lower ones there are
constexpr int32_t kFloat8Largest = 254;    // the largest code of a finite number
constexpr int32_t kFloat8NotFinite = 255;

enum Dtype : int64_t { kFloat32, kFloat64, kBfloat16, kFloat16, kInt8 };

struct Entry {  // one row of the table
  void* param;
  const void* grad;
  void* exp_avg;
  uint8_t* exp_avg_scale;  // exponents, with int8 exp_avg
  void* exp_avg_sq;         // factored: the row averages
  void* columns;            // factored: the column averages; else null
  void* max_exp_avg_sq;     // amsgrad; else null
  void* step;
  int64_t step_dtype, dtype, exp_avg_dtype;
  int64_t pre, red, post;
  int64_t pitch;  // elements from one row to the next; a row has post elements, or red where post is 1
  uint64_t seed;
  int64_t precomputed;  // second moments have been updated, and of factored ones the rows are relative to their mean
  int64_t counts;    // the step count goes up first; of a parameter in parts, with one of them
  int64_t coded;     // exp_avg_sq holds float8: it is full and not precomputed, and there are no maxima
};

struct Hyper {
  double lr, beta1, beta2, eps, weight_decay, gradient_factor;  // the factor: negative to ascend
  int64_t stochastic_round;
};

// -- number formats -------------------------------------------------------------------------------------------

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};
struct float8 {  // kernels/float8.py
  uint8_t code;
};

inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float load(float value) { return value; }
inline double load(double value) { return value; }
inline float load(bfloat16 value) { return from_bits(static_cast<uint32_t>(value.bits) << 16); }
inline float load(float16 value) {
  const uint32_t magnitude = value.bits & 0x7fffu, sign = (value.bits & 0x8000u) << 16;
  const uint32_t finite = bits_of(from_bits(magnitude << 13) * 0x1p112f);
  return from_bits((magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : finite) | sign);
}
inline float load(float8 value) {
  const int32_t code = value.code;
  const int32_t finite = (code + kFloat8Offset) << kFloat8Dropped;
  return from_bits(static_cast<uint32_t>(code == 0 ? 0 : code > kFloat8Largest ? 0x7f800000 : finite));
}

inline void store(float& target, double value) { target = static_cast<float>(value); }
inline void store(float& target, float value) { target = value; }
inline void store(double& target, double value) { target = value; }
inline void store(bfloat16& target, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  target.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void store(float16& target, float value) {
  const uint32_t bits = bits_of(value), magnitude = bits & 0x7fffffffu, sign = bits >> 16 & 0x8000u;
  const uint32_t normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  const uint32_t subnormal = bits_of(from_bits(magnitude) + 0.5f) - bits_of(0.5f);
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  target.bits = static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : finite));
}
inline void store(bfloat16& target, double value) { store(target, static_cast<float>(value)); }

inline uint64_t mixed(uint64_t x) {
  x = (x ^ x >> 31) * 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 29) * 0xd1342543de82ef95u;
  return x ^ x >> 32;
}

// Up or down at random, so that the expectation is the value; the random bits depend on key and index alone.
inline void store_stochastically(bfloat16& target, float value, uint32_t low_key, uint32_t high_key, uint32_t index) {
  uint32_t noise = index * 0x9e3779b9u + low_key;
  noise = (noise ^ noise >> 16) * 0x7feb352du + high_key;
  noise = (noise ^ noise >> 15) * 0x846ca68bu;
  const uint32_t bits = bits_of(value);
  bfloat16 nearest;
  store(nearest, value);
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  target.bits = static_cast<uint16_t>(finite ? (bits + (noise >> 16)) >> 16 : nearest.bits);
}

// The same for a number that is not negative; the random bits depend on the upper half of the parameter and on the
// step's key.
inline void store_stochastically(float8& target, float value, float param, uint32_t key) {
  uint32_t noise = (bits_of(param) & 0xffff0000u) ^ key;
  noise = (noise ^ noise >> 16) * 0x7feb352du;
  noise = (noise ^ noise >> 15) * 0x846ca68bu;
  noise = (noise ^ noise >> 16) >> (32 - kFloat8Dropped);
  const int32_t upper = static_cast<int32_t>((bits_of(value) + noise) >> kFloat8Dropped);
  const int32_t finite = std::min(kFloat8Largest, std::max(1, upper - kFloat8Offset));
  const int32_t positive = value > 0 ? finite : 0;
  target.code = static_cast<uint8_t>(value <= std::numeric_limits<float>::max() ? positive : kFloat8NotFinite);
}

template <class P>
using Arithmetic = std::conditional_t<std::is_same_v<P, double>, double, float>;

template <class A>
inline A maximum(A a, A b) {  // NaN if one of them is
  return a >= b || a != a ? a : b;
}

// -- momentum in 8 bits ---------------------------------------------------------------------------------------

void decode(const int8_t* codes, const uint8_t* scales, float* value, int64_t n) {
  for (int64_t start = 0; start < n; start += kCodeBlock, ++scales) {
    const float scale = from_bits(uint32_t{*scales} << 23);
    const int64_t end = std::min(n, start + kCodeBlock);
#pragma omp simd
    for (int64_t k = start; k < end; ++k) {
      const float root = static_cast<float>(codes[k]) / 127.0f;
      value[k] = root * std::fabs(root) * scale;
    }
  }
}

template <class P>
void encode(const float* value, const P* grad, int8_t* codes, uint8_t* scales, int64_t n) {
  for (int64_t start = 0; start < n; start += kCodeBlock, ++scales) {
    const int64_t end = std::min(n, start + kCodeBlock);
    uint32_t largest = 0;  // compared as integers, a NaN is the largest
#pragma omp simd reduction(max : largest)
    for (int64_t k = start; k < end; ++k) largest = std::max(largest, bits_of(value[k]) & 0x7fffffffu);
    *scales = static_cast<uint8_t>(std::min(255u, (largest + 0x7fffffu) >> 23));
    const float scale = from_bits(uint32_t{*scales} << 23);
#pragma omp simd
    for (int64_t k = start; k < end; ++k) {
      const float root = 127.0f * std::sqrt(std::fabs(value[k]) / scale);
      const float whole = load(grad[k]) == 0 ? std::trunc(root) : std::nearbyint(root);
      const int32_t code = whole <= 127.0f ? static_cast<int32_t>(whole) : 0;  // 0 / 0 is no number
      codes[k] = static_cast<int8_t>(value[k] < 0 ? -code : code);
    }
  }
}

// -- what is added to a parameter, by the form of its second moment -------------------------------------------

template <class A>
struct Numbers {
  A gradient_factor, lerp_weight, beta2, second_weight, decay, negative_step_size, root, eps;
  A lerp_from_gradient;  // 1 or 0; a number, because with a bool compilers do not vectorise

  Numbers(const Hyper& hyper, double step)
      : gradient_factor(static_cast<A>(hyper.gradient_factor)),
        lerp_weight(static_cast<A>(1 - hyper.beta1)),
        beta2(static_cast<A>(hyper.beta2)),
        second_weight(static_cast<A>(1 - hyper.beta2)),
        decay(static_cast<A>(1 - hyper.lr * hyper.weight_decay)),
        negative_step_size(static_cast<A>(-(hyper.lr / (1 - std::pow(hyper.beta1, step))))),
        root(static_cast<A>(std::sqrt(1 - std::pow(hyper.beta2, step)))),
        eps(static_cast<A>(hyper.eps)),
        lerp_from_gradient(lerp_weight >= A(0.5) ? 1 : 0) {
    lerp_weight -= lerp_from_gradient;
  }

  A coefficient(A second_moment) const { return negative_step_size / (std::sqrt(second_moment) / root + eps); }

  // From a sum of squares of gradients as they lie in memory; the square of a small factor would underflow.
  A mean_square(A sum, A count) const { return gradient_factor * (gradient_factor * sum) / count; }
};

template <class A>
struct OneForAll {
  A coefficient;
  A operator()(A exp_avg, A, int64_t) const { return coefficient * exp_avg; }
};

template <class A>
struct OnePerColumn {
  const A* coefficients;
  A operator()(A exp_avg, A, int64_t k) const { return coefficients[k] * exp_avg; }
};

template <class A>
struct Factored {
  Numbers<A> x;
  A row_root;
  const A* column_roots;
  A operator()(A exp_avg, A, int64_t k) const {
    return x.negative_step_size * exp_avg / (row_root * column_roots[k] + x.eps);
  }
};

template <class A>
struct Full {
  Numbers<A> x;
  A* second;
  A operator()(A exp_avg, A grad, int64_t k) const {
    const A moment = second[k] * x.beta2 + x.second_weight * grad * grad;
    second[k] = moment;
    return x.negative_step_size * exp_avg / (std::sqrt(moment) / x.root + x.eps);
  }
};

template <class P>
struct FullCodes {
  using A = Arithmetic<P>;
  Numbers<A> x;
  float8* second;
  uint32_t key;
  A operator()(A exp_avg, A grad, int64_t k, P param) const {
    const A moment = static_cast<A>(load(second[k])) * x.beta2 + x.second_weight * grad * grad;
    store_stochastically(second[k], static_cast<float>(moment), static_cast<float>(load(param)), key);
    return x.negative_step_size * exp_avg / (std::sqrt(moment) / x.root + x.eps);
  }
};

template <class A>
struct FullPrecomputed {
  Numbers<A> x;
  const A* second;
  A operator()(A exp_avg, A, int64_t k) const { return x.coefficient(second[k]) * exp_avg; }
};

template <class A>
struct FullMaximum {
  Numbers<A> x;
  A* second;
  A* largest;
  A operator()(A exp_avg, A grad, int64_t k) const {
    const A moment = second[k] * x.beta2 + x.second_weight * grad * grad;
    second[k] = moment;
    const A used = maximum(largest[k], moment);
    largest[k] = used;
    return x.negative_step_size * exp_avg / (std::sqrt(used) / x.root + x.eps);
  }
};

// -- one parameter --------------------------------------------------------------------------------------------

template <class A>
A* scratch(int which, int64_t count) {  // of this thread, valid until its next call for the same one
  thread_local std::vector<A> held[3];
  if (static_cast<int64_t>(held[which].size()) < count) held[which].resize(static_cast<size_t>(count));
  return held[which].data();
}

template <class P, class M>
class Update {
  using A = Arithmetic<P>;
  static constexpr bool kCodes = std::is_same_v<M, int8_t>;
  using Moment = std::conditional_t<kCodes, float, M>;  // as the arithmetic sees it

 public:
  Update(const Entry& entry, const Hyper& hyper)
      : entry_(entry),
        step_(entry.step_dtype == kFloat64 ? *static_cast<const double*>(entry.step)
                                           : static_cast<double>(*static_cast<const float*>(entry.step))),
        x_(hyper, step_),
        rounds_(hyper.stochastic_round && std::is_same_v<P, bfloat16>),
        param_(static_cast<P*>(entry.param)),
        grad_(static_cast<const P*>(entry.grad)),
        exp_avg_(static_cast<M*>(entry.exp_avg)),
        second_(static_cast<A*>(entry.exp_avg_sq)),
        columns_(static_cast<A*>(entry.columns)),
        largest_(static_cast<A*>(entry.max_exp_avg_sq)),
        red_(entry.red),
        post_(entry.post),
        width_(entry.columns || entry.post > 1 ? entry.post : entry.red),
        pitch_(entry.pitch) {}

  // Elements [first, last) with a second moment of their own.
  void full(int64_t first, int64_t last) const {
    int64_t stop = 0;
    for (int64_t from = first; from < last; from = stop) {
      stop = pitch_ == width_ ? last : std::min(last, (from / width_ + 1) * width_);
      over(from, stop, [&](int64_t start, int64_t end, Moment* exp_avg) {
        if (entry_.coded) {
          float8* codes = static_cast<float8*>(entry_.exp_avg_sq) + start;
          const uint32_t key = static_cast<uint32_t>(static_cast<int64_t>(step_)) * 0x9e3779b9u;
          run(start, end, exp_avg, FullCodes<P>{x_, codes, key});
        } else if (entry_.precomputed) {
          run(start, end, exp_avg, FullPrecomputed<A>{x_, second_ + start});
        } else if (largest_) {
          run(start, end, exp_avg, FullMaximum<A>{x_, second_ + start, largest_ + start});
        } else {
          run(start, end, exp_avg, Full<A>{x_, second_ + start});
        }
      });
    }
  }

  // Units [first, last), each read while it is in cache.
  void units(int64_t first, int64_t last) const {
    if constexpr (!kCodes && !std::is_same_v<P, bfloat16>) {
      if (post_ == 1 && !columns_ && !entry_.precomputed && red_ >= kSumBlock / 4) return long_rows(first, last);
    }
    const int64_t size = red_ * post_;
    const int64_t aligned = kCodes ? kCodeBlock / std::gcd(size, kCodeBlock) : 1;  // blocks of codes stay whole
    const int64_t together = aligned * std::max<int64_t>(1, 2048 / (size * aligned));
    for (int64_t start = first; start < last; start += together) {
      const int64_t end = std::min(last, start + together);
      A* coefficients = scratch<A>(0, (end - start) * post_);
      A* row_roots = columns_ ? scratch<A>(1, (end - start) * red_) : nullptr;
      for (int64_t unit = start; unit < end; ++unit) {
        A* own = coefficients + (unit - start) * post_;
        if (!entry_.precomputed) sums(unit, 0, red_, own);
        if (columns_) {
          factors(unit, own, row_roots + (unit - start) * red_);
        } else {
          average(unit, 0, post_, own);
        }
      }
      range(start * size, end * size, start, coefficients, row_roots);
    }
  }

  // Rows [first, last), each updated while the next one's squares are summed: memory streams without a pause.
  void long_rows(int64_t first, int64_t last) const {
    double sum = sum_of_squares(grad_ + first * pitch_, red_);
    for (int64_t row = first; row < last; ++row) {
      A coefficient = static_cast<A>(sum);
      average(row, 0, 1, &coefficient);
      const P* next = row + 1 < last ? grad_ + (row + 1) * pitch_ : nullptr;
      sum = 0;
      for (int64_t start = 0; start < red_; start += kSumBlock) {
        const int64_t from = row * pitch_ + start, count = std::min(kSumBlock, red_ - start);
        sum += static_cast<double>(update_and_sum(from, count, coefficient, next ? next + start : grad_ + from));
      }
    }
  }

  // What lies in memory from `first` on, with one coefficient; returns the sum of `other`'s squares.
  A update_and_sum(int64_t first, int64_t count, A coefficient, const P* __restrict other) const {
    P* __restrict param = param_ + first;
    M* __restrict exp_avg = exp_avg_ + first;
    const P* __restrict grad = grad_ + first;
    const Numbers<A> x = x_;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < count; ++k) {
      const A g = x.gradient_factor * load(grad[k]);
      const A before = load(exp_avg[k]);
      store(exp_avg[k], (x.lerp_from_gradient != 0 ? g : before) + x.lerp_weight * (g - before));
      store(param[k], load(param[k]) * x.decay + coefficient * static_cast<A>(load(exp_avg[k])));
      sum += static_cast<A>(load(other[k])) * load(other[k]);
    }
    return sum;
  }

  // A unit too large for one thread, by blocks of rows: their sums,
  void sums_of_blocks(int64_t unit, int64_t first, int64_t last, A* partial) const {
    const int64_t rows = rows_in_block(red_, post_);
    for (int64_t block = first; block < last; ++block)
      sums(unit, block * rows, std::min(red_, (block + 1) * rows), partial + block * post_);
  }

  // from the sums of all blocks the coefficients of columns [first, last); with factored second moments of all,
  void coefficients_of(int64_t unit, int64_t first, int64_t last, const A* partial, A* coefficients,
                       A* row_roots) const {
    const int64_t rows = rows_in_block(red_, post_);
    const int64_t blocks = entry_.precomputed ? 0 : (red_ + rows - 1) / rows;
    for (int64_t start = first; start < last; start += kColumnsInTurn) {
      const int64_t end = std::min(last, start + kColumnsInTurn);
      std::fill(coefficients + start, coefficients + end, A(0));
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t k = start; k < end; ++k) coefficients[k] += partial[block * post_ + k];
      if (!columns_) average(unit, start, end, coefficients + start);
    }
    if (columns_) factors(unit, coefficients, row_roots);
  }

  // and then its elements [first, last).
  void elements_of(int64_t unit, int64_t first, int64_t last, const A* coefficients, const A* row_roots) const {
    const int64_t start = unit * red_ * post_;
    range(start + first, start + last, unit, coefficients, row_roots);
  }

  // So many that a few threads have equally many blocks; bounded to bound the memory for partial sums.
  static int64_t rows_in_block(int64_t red, int64_t post) {
    const int64_t wanted = (red * post / kSumTask + 7) / 8 * 8;
    const int64_t blocks = std::min(std::max<int64_t>(8, wanted), std::max<int64_t>(32, (1 << 20) / post));
    return (red + blocks - 1) / blocks;
  }

 private:
  // Where an element lies, counted as if there were no gaps between rows.
  int64_t at(int64_t element) const {
    return pitch_ == width_ ? element : element / width_ * pitch_ + element % width_;
  }

  // Calls step(start, end, exp_avg of start) for [first, last), which starts with a block of codes.
  template <class Step>
  void over(int64_t first, int64_t last, Step step) const {
    if constexpr (kCodes) {
      constexpr int64_t kChunk = 4 * kCodeBlock;
      float decoded[kChunk];
      for (int64_t start = first; start < last; start += kChunk) {
        const int64_t end = std::min(last, start + kChunk);
        uint8_t* scales = entry_.exp_avg_scale + start / kCodeBlock;
        decode(exp_avg_ + start, scales, decoded, end - start);
        step(start, end, decoded);
        encode(decoded, grad_ + start, exp_avg_ + start, scales, end - start);
      }
    } else {
      step(first, last, exp_avg_ + at(first));
    }
  }

  // Elements [first, last) of units from `unit` on, whose coefficients (factored: roots) are known.
  void range(int64_t first, int64_t last, int64_t unit, const A* coefficients, const A* row_roots) const {
    over(first, last, [&](int64_t start, int64_t end, Moment* exp_avg) {
      int64_t row = start / width_, stop = 0;
      for (int64_t from = start; from < end; from = stop, ++row) {
        stop = std::min(end, (row + 1) * width_);
        Moment* own = exp_avg + (at(from) - at(start));
        const int64_t column = from - row * width_;
        if (columns_) {
          const A* roots = coefficients + (row / red_ - unit) * post_ + column;
          run(from, stop, own, Factored<A>{x_, row_roots[row - unit * red_], roots});
        } else if (post_ > 1) {
          run(from, stop, own, OnePerColumn<A>{coefficients + (row / red_ - unit) * post_ + column});
        } else {
          run(from, stop, own, OneForAll<A>{coefficients[row - unit]});
        }
      }
    });
  }

  template <class Step>
  void run(int64_t first, int64_t last, Moment* exp_avg, Step step) const {
    if constexpr (std::is_same_v<P, bfloat16>) {
      if (rounds_) return run<true>(first, last, exp_avg, step);
    }
    run<false>(first, last, exp_avg, step);
  }

  // First moment, weight decay and update of elements [first, last).
  template <bool kRounds, class Step>
  void run(int64_t first, int64_t last, Moment* __restrict exp_avg, Step step) const {
    P* __restrict param = param_ + at(first);
    const P* __restrict grad = grad_ + at(first);
    const Numbers<A> x = x_;
    const uint64_t key = kRounds ? mixed(entry_.seed + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(first >> 32)) : 0;
    const uint32_t low_key = static_cast<uint32_t>(key), high_key = static_cast<uint32_t>(key >> 32);
    const uint32_t index = static_cast<uint32_t>(first);
    const int64_t count = last - first;
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) {
      const A g = x.gradient_factor * load(grad[k]);
      const A before = load(exp_avg[k]);
      store(exp_avg[k], (x.lerp_from_gradient != 0 ? g : before) + x.lerp_weight * (g - before));
      const A moved = [&] {
        const A first_moment = static_cast<A>(load(exp_avg[k]));
        if constexpr (std::is_same_v<Step, FullCodes<P>>) {
          return step(first_moment, g, k, param[k]);
        } else {
          return step(first_moment, g, k);
        }
      }();
      const A value = load(param[k]) * x.decay + moved;
      if constexpr (kRounds) {
        store_stochastically(param[k], value, low_key, high_key, index + static_cast<uint32_t>(k));
      } else {
        store(param[k], value);
      }
    }
  }

  // Sums of squares of each column of rows [first, last) of a unit; with factored second moments row averages too.
  void sums(int64_t unit, int64_t first, int64_t last, A* total) const {
    const P* grad = grad_ + at((unit * red_ + first) * post_);
    if (columns_) row_averages(unit, first, last);
    if (post_ == 1) {
      *total = sum_of_squares(grad, last - first);
    } else {
      column_sums(grad, last - first, post_, total);
    }
  }

  static A sum_of_squares(const P* grad, int64_t count) {
    double total = 0;
    for (int64_t start = 0; start < count; start += kSumBlock) {
      const int64_t end = std::min(count, start + kSumBlock);
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = start; k < end; ++k) sum += static_cast<A>(load(grad[k])) * load(grad[k]);
      total += sum;
    }
    return static_cast<A>(total);
  }

  // Sums of squares of `width` columns of rows that are pitch_ elements apart.
  void column_sums(const P* grad, int64_t rows, int64_t width, A* total) const {
    std::fill(total, total + width, A(0));
    for (int64_t top = 0; top < rows; top += kRowBlock)
      for (int64_t left = 0; left < width; left += kColumnBlock)
        add_block_sums(grad + top * pitch_ + left, std::min(kRowBlock, rows - top), std::min(kColumnBlock, width - left),
                       total + left);
  }

  void add_block_sums(const P* grad, int64_t rows, int64_t width, A* total) const {
    A sums[kColumnBlock];
    std::fill(sums, sums + width, A(0));
    const int64_t quarter = rows / 4;  // four long streams: with four adjacent rows prefetching starts anew at each
    for (int64_t row = 0; row < quarter; ++row) {
      const P *a = grad + row * pitch_, *b = a + quarter * pitch_, *c = b + quarter * pitch_, *d = c + quarter * pitch_;
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) sums[k] += (square(a[k]) + square(b[k])) + (square(c[k]) + square(d[k]));
    }
    for (int64_t row = 4 * quarter; row < rows; ++row) {
      const P* a = grad + row * pitch_;
#pragma omp simd
      for (int64_t k = 0; k < width; ++k) sums[k] += square(a[k]);
    }
    for (int64_t k = 0; k < width; ++k) total[k] += sums[k];
  }

  static A square(P value) { return static_cast<A>(load(value)) * static_cast<A>(load(value)); }

  // Second moments of columns [first, last) of a unit from the sums of their squares, which become coefficients.
  void average(int64_t unit, int64_t first, int64_t last, A* __restrict sums) const {
    const Numbers<A> x = x_;  // apart from what is written, so that loops vectorise
    const int64_t start = unit * post_ + first, count = last - first;
    A* __restrict second = second_ + start;
    const A* used = second;
    if (!entry_.precomputed) {
      const A rows = static_cast<A>(red_);
#pragma omp simd
      for (int64_t k = 0; k < count; ++k)
        second[k] = second[k] * x.beta2 + x.second_weight * x.mean_square(sums[k], rows);
      if (largest_) {
        A* __restrict largest = largest_ + start;
#pragma omp simd
        for (int64_t k = 0; k < count; ++k) largest[k] = maximum(largest[k], second[k]);
        used = largest;
      }
    }
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) sums[k] = x.coefficient(used[k]);
  }

  void row_averages(int64_t unit, int64_t first, int64_t last) const {
    for (int64_t row = unit * red_ + first; row < unit * red_ + last; ++row) {
      const A mean = x_.mean_square(sum_of_squares(grad_ + row * pitch_, post_), static_cast<A>(post_));
      second_[row] = second_[row] * x_.beta2 + x_.second_weight * mean;
    }
  }

  // Column averages from the sums of their squares, which become roots; and the roots of r / mean(r).
  void factors(int64_t unit, A* sums, A* row_roots) const {
    A* columns = columns_ + unit * post_;
    const A height = static_cast<A>(red_);
    for (int64_t k = 0; k < post_; ++k) {
      if (!entry_.precomputed) columns[k] = columns[k] * x_.beta2 + x_.second_weight * x_.mean_square(sums[k], height);
      sums[k] = std::sqrt(columns[k]) / x_.root;
    }
    const A* rows = second_ + unit * red_;
    const double total = entry_.precomputed ? static_cast<double>(red_) : std::accumulate(rows, rows + red_, 0.0);
    A mean = static_cast<A>(total / static_cast<double>(red_));
    mean = mean < std::numeric_limits<A>::min() ? std::numeric_limits<A>::min() : mean;
    for (int64_t row = 0; row < red_; ++row) row_roots[row] = std::sqrt(rows[row] / mean);
  }

  const Entry& entry_;
  const double step_;
  const Numbers<A> x_;
  const bool rounds_;
  P* const param_;
  const P* const grad_;
  M* const exp_avg_;
  A *const second_, *const columns_, *const largest_;
  const int64_t red_, post_, width_, pitch_;
};

// -- the table ------------------------------------------------------------------------------------------------

template <class P, class Call>
void with_momentum(const Entry& entry, const Hyper& hyper, Call call) {
  if (entry.exp_avg_dtype == kInt8) return call(Update<P, int8_t>(entry, hyper));
  if (entry.exp_avg_dtype == entry.dtype) return call(Update<P, P>(entry, hyper));
  if constexpr (!std::is_same_v<P, float>) {
    if (entry.exp_avg_dtype == kFloat32) return call(Update<P, float>(entry, hyper));
  }
  if constexpr (!std::is_same_v<P, bfloat16>) {
    if (entry.exp_avg_dtype == kBfloat16) return call(Update<P, bfloat16>(entry, hyper));
  }
}

template <class Call>
void with_types(const Entry& entry, const Hyper& hyper, Call call) {
  switch (entry.dtype) {
    case kFloat32: return with_momentum<float>(entry, hyper, call);
    case kFloat64: return with_momentum<double>(entry, hyper, call);
    case kBfloat16: return with_momentum<bfloat16>(entry, hyper, call);
    default: return with_momentum<float16>(entry, hyper, call);
  }
}

bool is_full(const Entry& entry) { return entry.red == 1 && !entry.columns; }

enum class Kind { kElements, kUnits, kSums, kCoefficients, kUpdate };

struct Task {
  Kind kind;
  const Entry* entry;
  int64_t first, last;   // elements, units, blocks of rows, columns, elements of the unit
  int64_t shared = -1;   // which shared unit it belongs to
};

// How many tasks of a kind are not done.
struct Left : std::atomic<int64_t> {
  explicit Left(int64_t count) : std::atomic<int64_t>(count) {}
  Left(const Left& other) : std::atomic<int64_t>(other.load()) {}

  void done() { fetch_sub(1, std::memory_order_release); }
  void wait() const {
    for (int64_t turn = 0; load(std::memory_order_acquire) > 0; ++turn)
      if (turn > kPatience) std::this_thread::yield();
  }
};

// A unit too large for one thread. Every second one uses the same memory.
struct Shared {
  int64_t unit;  // which of its entry's
  Left sums, coefficients, updates;
};

struct Memory {
  std::vector<double> partial, coefficients, row_roots;
};

// The tasks of a step, in an order in which each waits for earlier ones alone, so that whoever waits waits for a thread
// that is at work.
class Work {
 public:
  Work(const Hyper& hyper, std::vector<Task>& tasks, std::vector<Shared>& shared, Memory (&memory)[2])
      : hyper_(hyper), tasks_(tasks), shared_(shared), memory_(memory) {
    tasks_.clear();
    shared_.clear();
  }

  int64_t elements = 0;

  void add(const Entry* table, int64_t count) {
    for (const Entry* entry = table; entry < table + count; ++entry)
      if (!is_shared(*entry)) add_alone(*entry);
    for (const Entry* entry = table; entry < table + count; ++entry)
      if (is_shared(*entry)) share(*entry);
  }

  void operator()() {
    const int64_t count = static_cast<int64_t>(tasks_.size());
    for (int64_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count;)
      run(tasks_[static_cast<size_t>(index)]);
  }

 private:
  static int64_t unit_of(const Entry& entry) { return entry.red * entry.post; }

  static bool is_shared(const Entry& entry) {
    const bool whole_blocks = entry.exp_avg_dtype != kInt8 || entry.pre == 1 || unit_of(entry) % kCodeBlock == 0;
    return !is_full(entry) && unit_of(entry) > kSmallUnit && whole_blocks;
  }

  void add_alone(const Entry& entry) {
    const int64_t unit = unit_of(entry), total = unit * entry.pre;
    if (total == 0) return;
    elements += total;
    if (is_full(entry)) return cut(Kind::kElements, entry, total, kTask);
    const int64_t aligned = kCodeBlock / std::gcd(unit, kCodeBlock);
    cut(Kind::kUnits, entry, entry.pre, aligned * std::max<int64_t>(1, kTask / (unit * aligned)));
  }

  void share(const Entry& entry) {
    const int64_t rows = Update<float, float>::rows_in_block(entry.red, entry.post), unit = unit_of(entry);
    const int64_t blocks = (entry.red + rows - 1) / rows, sums = entry.precomputed ? 0 : blocks;
    const int64_t columns = entry.columns ? entry.post : std::max(kFewColumns, entry.post / 32);
    elements += unit * entry.pre;
    for (Memory& one : memory_) {
      grow(one.partial, sums * entry.post);
      grow(one.coefficients, entry.post);
      grow(one.row_roots, entry.columns ? entry.red : 0);
    }
    for (int64_t number = 0; number < entry.pre; ++number) {
      const int64_t shared = static_cast<int64_t>(shared_.size());
      const int64_t averages = (entry.post + columns - 1) / columns, updates = (unit + kTask - 1) / kTask;
      shared_.push_back({number, Left(sums), Left(averages), Left(updates)});
      cut(Kind::kSums, entry, sums, 1, shared);
      cut(Kind::kCoefficients, entry, entry.post, columns, shared);
      cut(Kind::kUpdate, entry, unit, kTask, shared);
    }
  }

  void cut(Kind kind, const Entry& entry, int64_t count, int64_t each, int64_t shared = -1) {
    for (int64_t first = 0; first < count; first += each)
      tasks_.push_back({kind, &entry, first, std::min(count, first + each), shared});
  }

  static void grow(std::vector<double>& held, int64_t count) {
    if (static_cast<int64_t>(held.size()) < count) held.resize(static_cast<size_t>(count));
  }

  void run(const Task& task) {
    with_types(*task.entry, hyper_, [&](const auto& update) {
      if (task.kind == Kind::kElements) return update.full(task.first, task.last);
      if (task.kind == Kind::kUnits) return update.units(task.first, task.last);
      run_shared(update, task);
    });
  }

  template <class P, class M>
  void run_shared(const Update<P, M>& update, const Task& task) {
    using A = Arithmetic<P>;
    Shared& shared = shared_[static_cast<size_t>(task.shared)];
    Memory& memory = memory_[task.shared % 2];
    A* partial = reinterpret_cast<A*>(memory.partial.data());
    A* coefficients = reinterpret_cast<A*>(memory.coefficients.data());
    A* row_roots = reinterpret_cast<A*>(memory.row_roots.data());
    if (task.kind == Kind::kSums) {
      wait_for_memory(task.shared);
      update.sums_of_blocks(shared.unit, task.first, task.last, partial);
      shared.sums.done();
    } else if (task.kind == Kind::kCoefficients) {
      wait_for_memory(task.shared);
      shared.sums.wait();
      update.coefficients_of(shared.unit, task.first, task.last, partial, coefficients, row_roots);
      shared.coefficients.done();
    } else {
      shared.coefficients.wait();
      update.elements_of(shared.unit, task.first, task.last, coefficients, row_roots);
      shared.updates.done();
    }
  }

  void wait_for_memory(int64_t shared) const {
    if (shared >= 2) shared_[static_cast<size_t>(shared - 2)].updates.wait();
  }

  const Hyper& hyper_;
  std::vector<Task>& tasks_;
  std::vector<Shared>& shared_;
  Memory (&memory_)[2];
  std::atomic<int64_t> next_{0};
};

void count_step(const Entry& entry) {
  if (entry.step_dtype == kFloat64) {
    ++*static_cast<double*>(entry.step);
  } else {
    ++*static_cast<float*>(entry.step);
  }
}

Threads* threads = new Threads;  // never deleted: they wait in it when the process ends

}  // namespace

// Updates every tensor of the table in place.
SLIMADAM_EXPORT void slimadam_step(const Entry* table, int64_t count, const Hyper* hyper, int64_t most_threads) {
  thread_local std::vector<Task> tasks;  // kept, so that a step allocates nothing
  thread_local std::vector<Shared> shared;
  thread_local Memory memory[2];
  for (const Entry* entry = table; entry < table + count; ++entry)
    if (entry->counts) count_step(*entry);
  Work work(*hyper, tasks, shared, memory);
  work.add(table, count);
  threads->run(work.elements > kSerial ? most_threads : 1, work);
}

// Of which source this library was made.
SLIMADAM_EXPORT const char* slimadam_source() { return SLIMADAM_SOURCE; }

// In a process that was forked: the threads of its parent do not exist there.
SLIMADAM_EXPORT void slimadam_forked() { threads = new Threads; }
