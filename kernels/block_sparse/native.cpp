// y = act(x W^T + b) + residual on a CPU, W stored as tiles, over the brgemm that ships inside torch.
//
// One parallel region packs the stored tiles (2 % of the work at 1576 tokens; nothing is kept between calls,
// so no weight can be stale), one multiplies: tiles of tokens against block-rows. Stored tiles that lie side
// by side are one product. Few tokens: the input is packed instead of the weight, and the weight is read once.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

namespace {

using at::Tensor;
using Float = at::vec::Vectorized<float>;
namespace blas = at::native::cpublas;

enum class Act { none, gelu, gelu_tanh, silu };

Act act_of(const std::string& name) {
  if (name == "none") return Act::none;
  if (name == "gelu") return Act::gelu;
  if (name == "gelu_tanh") return Act::gelu_tanh;
  TORCH_CHECK(name == "silu", "act: expected none, gelu, gelu_tanh or silu, got ", name);
  return Act::silu;
}

// erf as a rational function of degree 13 / 10 (the one of Eigen and XLA), within 2e-7; the library call that
// at::vec makes costs seven times as much: at 1576 x 3072 values more than half of the product itself.
Float erf(Float z) {
  const Float x = at::vec::clamp(z, Float(-4.f), Float(4.f)), s = x * x;
  Float p(-2.72614225801306e-10f), q(-1.45660718464996e-05f);
  for (float c : {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f, -7.34990630326855e-04f,
                  -2.95459980854025e-03f, -1.60960333262415e-02f})
    p = at::vec::fmadd(p, s, Float(c));
  for (float c : {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f, -1.42647390514189e-02f})
    q = at::vec::fmadd(q, s, Float(c));
  return x * p / q;
}

template <Act act> Float activate(Float z) {
  const Float one(1.f), half(0.5f);
  if constexpr (act == Act::gelu) return half * z * (one + erf(z * Float(0.70710678118654752f)));
  if constexpr (act == Act::gelu_tanh) {
    const Float inner = Float(0.79788456080286536f) * (z + Float(0.044715f) * z * z * z);
    return half * z * (one + inner.tanh());
  }
  if constexpr (act == Act::silu) return z / (one + z.neg().exp());
  return z;
}

void widen(const float* from, float* to, int64_t n) { std::memcpy(to, from, n * sizeof(float)); }
void widen(const at::BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
}

// 4-byte units: [rows, cols], row stride ld -> [cols, rows]. A unit is one float or two bfloat16s of one row,
// so the same turn gives brgemm's plain float layout and its pairs-interleaved (VNNI) one.
void turn(const void* from, int64_t ld, void* to, int64_t rows, int64_t cols) {
  constexpr int64_t side = 16;
  const float* in = static_cast<const float*>(from);
  float* out = static_cast<float*>(to);
  for (int64_t i0 = 0; i0 < rows; i0 += side)
    for (int64_t j0 = 0; j0 < cols; j0 += side) {
      const int64_t m = std::min(side, rows - i0), n = std::min(side, cols - j0);
      if (m == side && n == side) {
        at::vec::transpose_mxn<float, side, side>(in + i0 * ld + j0, ld, out + j0 * rows + i0, rows);
      } else {
        for (int64_t j = j0; j < j0 + n; ++j)
          for (int64_t i = i0; i < i0 + m; ++i) std::memcpy(out + j * rows + i, in + i * ld + j, sizeof(float));
      }
    }
}

// Scratch that a thread keeps: fresh pages for each call cost up to 5 % of it.
template <int which, typename T> T* scratch(int64_t n) {
  thread_local std::vector<float> kept;
  const size_t needed = (n * sizeof(T) + sizeof(float) - 1) / sizeof(float);
  if (kept.size() < needed) kept.resize(needed);
  return reinterpret_cast<T*>(kept.data());
}

template <typename T> struct Problem {
  int64_t tokens, width, outputs, stride;  // of x: [tokens, width], row stride
  int64_t bn, bk;
  const T* x;
  const T* values;
  const int32_t* crow;
  const int32_t* idx;
  const float* bias;  // [outputs rounded up to whole tiles and vectors]
  const T* residual;  // [tokens, outputs] or null
  T* y;
  Act act;
  static constexpr int64_t per = 4 / sizeof(T);
  static constexpr bool vnni = per == 2;

  // Stored tiles from s on that lie side by side: a power of two of them, so that few kernels are compiled.
  int64_t run(int64_t s, int64_t end, int64_t most) const {
    int64_t n = 1;
    while (2 * n <= most && s + 2 * n <= end && idx[s + 2 * n - 1] == idx[s] + 2 * n - 1) n *= 2;
    return n;
  }
  int64_t cut(int64_t s, int64_t n) const {  // inputs that n tiles from s cover, cropped at the ragged edge
    return std::min(n * bk, width - idx[s] * bk);
  }
  // acc [m, n], row stride ld -> y at (m0, n0): bias, activation, residual in float, one rounding.
  template <Act act_> void finish_as(const float* acc, int64_t ld, int64_t m0, int64_t m, int64_t n0, int64_t n) const {
    constexpr int64_t one = Float::size(), step = one * per;
    const int64_t whole = n - n % step;
    alignas(64) float extra[step] = {}, edge[step] = {};
    alignas(64) T narrow[step];
    const auto at = [&](const float* from, int64_t j, int64_t k) {
      return activate<act_>(Float::loadu(from + k * one) + Float::loadu(bias + n0 + j + k * one)) +
             Float::loadu(extra + k * one);
    };
    const auto put = [&](T* to, const float* from, int64_t j) {
      if constexpr (vnni) {
        at::vec::convert_float_bfloat16(at(from, j, 0), at(from, j, 1)).store(to);
      } else {
        at(from, j, 0).store(to);
      }
    };
    for (int64_t i = 0; i < m; ++i) {
      const float* from = acc + i * ld;
      T* to = y + (m0 + i) * outputs + n0;
      const T* add = residual ? residual + (m0 + i) * outputs + n0 : nullptr;
      for (int64_t j = 0; j < whole; j += step) {
        if (add) widen(add + j, extra, step);
        put(to + j, from + j, j);
      }
      if (whole < n) {  // a ragged edge
        if (add) widen(add + whole, extra, n - whole);
        std::memcpy(edge, from + whole, (n - whole) * sizeof(float));
        put(narrow, edge, whole);
        std::memcpy(to + whole, narrow, (n - whole) * sizeof(T));
      }
    }
  }
  void finish(const float* acc, int64_t ld, int64_t m0, int64_t m, int64_t n0, int64_t n) const {
    switch (act) {
      case Act::none: return finish_as<Act::none>(acc, ld, m0, m, n0, n);
      case Act::gelu: return finish_as<Act::gelu>(acc, ld, m0, m, n0, n);
      case Act::gelu_tanh: return finish_as<Act::gelu_tanh>(acc, ld, m0, m, n0, n);
      case Act::silu: return finish_as<Act::silu>(acc, ld, m0, m, n0, n);
    }
  }
};

// Many tokens: the weight is packed, x is read where it lies.
template <typename T> void many_tokens(const Problem<T>& p, int64_t stored) {
  const int64_t size = p.bn * p.bk, rows = (p.outputs + p.bn - 1) / p.bn;
  T* packed = scratch<0, T>(stored * size);
  at::parallel_for(0, stored, 8, [&](int64_t from, int64_t to) {
    for (int64_t s = from; s < to; ++s)
      turn(p.values + s * size, p.bk / p.per, packed + s * size, p.bn, p.bk / p.per);
  });
  // Tiles of about 192 tokens (64 and 128 are 2 to 8 % slower), the same number for each thread.
  const int64_t threads = at::get_num_threads();
  const int64_t rounds = std::max<int64_t>(1, (p.tokens + 192 * threads - 1) / (192 * threads));
  const int64_t tile = std::max<int64_t>(1, (p.tokens + rounds * threads - 1) / (rounds * threads));
  at::parallel_for(0, (p.tokens + tile - 1) / tile, 1, [&](int64_t from, int64_t to) {
    float* acc = scratch<1, float>(tile * p.bn);
    for (int64_t t = from; t < to; ++t) {
      const int64_t m0 = t * tile, m = std::min(tile, p.tokens - m0);
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t end = p.crow[r + 1];
        bool more = false;
        for (int64_t s = p.crow[r]; s < end;) {
          const int64_t n = p.run(s, end, 8);
          blas::brgemm(m, p.bn, p.cut(s, n), p.stride, p.bn, p.bn, more,
                       p.x + m0 * p.stride + int64_t{p.idx[s]} * p.bk, packed + s * size, acc, p.vnni);
          more = true;
          s += n;
        }
        if (!more) std::memset(acc, 0, sizeof(float) * m * p.bn);
        p.finish(acc, p.bn, m0, m, r * p.bn, std::min(p.bn, p.outputs - r * p.bn));
      }
    }
    blas::brgemm_release(p.vnni);
  });
}

// Few tokens: x is packed once ([width, tokens]), and each tile of the weight is read once, where it lies.
template <typename T> void few_tokens(const Problem<T>& p) {
  const int64_t rows = (p.outputs + p.bn - 1) / p.bn, units = (p.width + p.per - 1) / p.per;
  T* turned = scratch<0, T>(units * p.per * p.tokens);
  turn(p.x, p.stride / p.per, turned, p.tokens, units);
  at::parallel_for(0, rows, 1, [&](int64_t from, int64_t to) {
    float *acc = scratch<1, float>(p.bn * p.tokens), *back = scratch<2, float>(p.bn * p.tokens);
    for (int64_t r = from; r < to; ++r) {
      const int64_t end = p.crow[r + 1];
      bool more = false;
      for (int64_t s = p.crow[r]; s < end; ++s) {
        blas::brgemm(p.bn, p.tokens, p.cut(s, 1), p.bk, p.tokens, p.tokens, more,
                     p.values + s * p.bn * p.bk, turned + int64_t{p.idx[s]} * p.bk * p.tokens, acc, p.vnni);
        more = true;
      }
      if (!more) std::memset(acc, 0, sizeof(float) * p.bn * p.tokens);
      turn(acc, p.tokens, back, p.bn, p.tokens);
      p.finish(back, p.bn, 0, p.tokens, r * p.bn, std::min(p.bn, p.outputs - r * p.bn));
    }
    blas::brgemm_release(p.vnni);
  });
}

void check(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& idx, int64_t outputs) {
  TORCH_CHECK(x.dim() == 2 && values.dim() == 3, "expected x [M, K] and values [S, bn, bk]");
  TORCH_CHECK(crow.scalar_type() == at::kInt && idx.scalar_type() == at::kInt, "crow, idx: expected int32");
  TORCH_CHECK(values.is_contiguous() && crow.is_contiguous() && idx.is_contiguous(), "tiles: expected contiguous");
  TORCH_CHECK(values.size(2) % 2 == 0, "values: expected an even number of columns in a tile");
  const int64_t bn = values.size(1), bk = values.size(2), stored = values.size(0);
  const int64_t rows = (outputs + bn - 1) / bn, cols = (x.size(1) + bk - 1) / bk;
  TORCH_CHECK(crow.numel() == rows + 1, "crow: expected ", rows + 1, " entries, got ", crow.numel());
  TORCH_CHECK(idx.numel() >= stored, "idx: expected at least ", stored, " entries, got ", idx.numel());
  const int32_t *at = crow.const_data_ptr<int32_t>(), *col = idx.const_data_ptr<int32_t>();
  TORCH_CHECK(at[0] == 0 && at[rows] == stored, "crow: expected 0 first and ", stored, " last");
  for (int64_t r = 0; r < rows; ++r) TORCH_CHECK(at[r] <= at[r + 1], "crow: falls at row ", r);
  for (int64_t s = 0; s < stored; ++s)
    TORCH_CHECK(0 <= col[s] && col[s] < cols, "idx: expected columns below ", cols, ", got ", col[s]);
}

// Below this many tokens packing the input is cheaper than packing the weight (measured: 64 < here < 197).
constexpr int64_t few = 128;

template <typename T>
Tensor product(const Tensor& given, const Tensor& values, const Tensor& crow, const Tensor& idx,
               const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t outputs, Act act) {
  const int64_t width = given.size(1), tokens = given.size(0);
  Tensor y = at::empty({tokens, outputs}, given.options());
  if (y.numel() == 0) return y;
  Tensor x = given;
  if constexpr (Problem<T>::vnni) {  // an odd width leaves a pair without its second half
    if (width % 2 || x.stride(0) % 2 || x.storage_offset() % 2) x = at::constant_pad_nd(x, {0, width % 2}, 0);
  }
  if (x.stride(1) != 1 || x.stride(0) < x.size(1)) x = x.contiguous();
  const int64_t bn = values.size(1), padded = (outputs + bn - 1) / bn * bn + 2 * Float::size();
  Tensor shift = at::zeros({padded}, x.options().dtype(at::kFloat));
  if (bias) shift.narrow(0, 0, outputs).copy_(*bias);
  const Tensor more = residual ? residual->contiguous() : Tensor();
  Problem<T> p{tokens, x.size(1), outputs, tokens == 1 ? x.size(1) : x.stride(0), bn, values.size(2),
               x.const_data_ptr<T>(), values.const_data_ptr<T>(), crow.const_data_ptr<int32_t>(),
               idx.const_data_ptr<int32_t>(), shift.const_data_ptr<float>(),
               residual ? more.const_data_ptr<T>() : nullptr, y.data_ptr<T>(), act};
  if (tokens < few) few_tokens(p); else many_tokens(p, values.size(0));
  return y;
}

Tensor block_sparse_linear(const Tensor& x, const Tensor& values, const Tensor& crow, const Tensor& idx,
                           const std::optional<Tensor>& bias, const std::optional<Tensor>& residual, int64_t outputs,
                           const std::string& act) {
  check(x, values, crow, idx, outputs);
  const auto dtype = x.scalar_type();
  TORCH_CHECK(values.scalar_type() == dtype, "values: expected the dtype of x, ", dtype, ", got ", values.scalar_type());
  if (dtype == at::kFloat) return product<float>(x, values, crow, idx, bias, residual, outputs, act_of(act));
  TORCH_CHECK(dtype == at::kBFloat16, "x: expected float32 or bfloat16, got ", dtype);
  return product<at::BFloat16>(x, values, crow, idx, bias, residual, outputs, act_of(act));
}

}  // namespace

TORCH_LIBRARY(hwprune_native, m) {
  m.def("block_sparse_linear(Tensor x, Tensor values, Tensor crow, Tensor idx, Tensor? bias, Tensor? residual, "
        "int outputs, str act) -> Tensor");
}
TORCH_LIBRARY_IMPL(hwprune_native, CPU, m) { m.impl("block_sparse_linear", &block_sparse_linear); }
