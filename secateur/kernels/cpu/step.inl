// What a decoder layer does to a few tokens before and after its attention, in one call each: of a small model, calls take longer
// than what they compute. ops.cpp includes this among its operators. Everything between inputs and outputs is float32.
//
// H: features of a token, M: of the middle of an MLP, D: of a head.

// A weight as `sparse_linear` or `coded_linear` takes it, from lists of what weights have.
class Linear {
 public:
  // Five numbers a weight: bits, 0 for values under a mask; group size; rows of a tile; which tensors there are; input features.
  Linear(const std::vector<Tensor>& parts, size_t& part, const std::vector<int64_t>& forms, size_t& form) {
    STD_TORCH_CHECK(forms.size() >= form + 5, "secateur: a weight has five numbers");
    const int64_t bits = forms[form], group_size = forms[form + 1], tile_rows = forms[form + 2], present = forms[form + 3];
    I = forms[form + 4];
    form += 5;
    std::optional<Tensor> t[14];
    for (int i = 0; i < 14; i++)
      if (present >> i & 1) {
        STD_TORCH_CHECK(part < parts.size(), "secateur: a weight lacks tensors");
        t[i] = parts[part++];
      }
    STD_TORCH_CHECK(I >= 1 && t[0] && t[1] && (bits || t[2]), "secateur: a weight lacks tensors");
    is_coded = bits > 0;
    if (is_coded) {
      coded = checked_coded(I, bits, *t[0], *t[1], t[2], t[3], group_size, t[4], t[5], t[6], t[7], tile_rows, t[8], t[9], t[10],
                            t[11], t[12], t[13]);
      order = t[10] ? data<int32_t>(*t[10]) : nullptr;
      O = t[1]->numel() - 1;
    } else {
      sparse = checked_sparse(I, *t[0], *t[1], *t[2]);
      O = t[2]->numel() - 1;
    }
    STD_TORCH_CHECK(O >= 1, "secateur: a weight without rows");
  }

  Laid lay(const Tensor& x) const {
    if (is_coded) return lay_out(x, coded.group_size, coded.G, false, order);
    return lay_out(x, 0, 0, sparse.values.dtype == Float::bf16, nullptr);
  }

  int64_t scratch() const { return is_coded ? scratch_floats(I, coded.G) : 0; }

  // Some rows, of outputs that lie `stride` apart for each token.
  void rows(const Inputs& in, int64_t first, int64_t last, float* y, int64_t stride, float* spare) const {
    if (is_coded)
      chosen()->coded_dot(coded, in, first, last, y, stride, spare);
    else
      chosen()->sparse_dot(sparse, in, first, last, y, stride);
  }

  int64_t I, O;

 private:
  bool is_coded;
  Coded coded = {};
  Sparse sparse = {};
  const int32_t* order = nullptr;
};

std::vector<Linear> linears_of(const std::vector<Tensor>& parts, const std::vector<int64_t>& forms, size_t count) {
  std::vector<Linear> found;
  size_t part = 0, form = 0;
  for (size_t i = 0; i < count; i++) found.emplace_back(parts, part, forms, form);
  STD_TORCH_CHECK(part == parts.size() && form == forms.size(), "secateur: there are not ", count, " weights");
  return found;
}

// [T, features] of a contiguous tensor whose last dimension they are.
Tensor as_rows(const Tensor& x, int64_t features, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && x.size(-1) == features, "secateur: ", name, " is not [tokens, ", features, "] in the CPU's memory");
  float_of(x);
  const Tensor whole = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const int64_t sizes[] = {x.numel() / features, features};
  return torch::stable::view(whole, {sizes, 2});
}

// x / √(mean of x² + eps) · weight, in float32.
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const int64_t T = x.size(0), H = x.size(1);
  check(weight, weight.scalar_type(), H, "the norm's weight");
  Tensor y = empty(T, H, ScalarType::Float);
  float* const to = static_cast<float*>(y.data_ptr());
  with_values(x, [&](const auto* from) { std::transform(from, from + T * H, to, [](auto v) { return float(v); }); });
  with_values(weight, [&](const auto* scale) {
    for (float* row = to; row < to + T * H; row += H) {
      float squares[8] = {};
      for (int64_t i = 0; i < H; i++) squares[i & 7] += row[i] * row[i];
      float sum = 0;
      for (float some : squares) sum += some;
      const float length = 1 / std::sqrt(sum / float(H) + float(eps));
      for (int64_t i = 0; i < H; i++) row[i] = row[i] * length * float(scale[i]);
    }
  });
  return y;
}

// The products of several weights with the same inputs, one after the other in each row of y [T, outputs of all].
Tensor products_of(const Tensor& x, const Linear* weights, size_t count) {
  int64_t outputs = 0, scratch = 0;
  std::vector<Laid> laid;
  for (size_t i = 0; i < count; i++) {
    STD_TORCH_CHECK(weights[i].I == x.size(1), "secateur: the input has ", x.size(1), " features, but the weight takes ", weights[i].I);
    outputs += weights[i].O;
    scratch = std::max(scratch, weights[i].scratch());
    laid.push_back(weights[i].lay(x));
  }
  Tensor y = empty(x.size(0), outputs, ScalarType::Float);
  float* const to = static_cast<float*>(y.data_ptr());
  torch::stable::parallel_for(0, outputs, grain(x.size(1)), [&](int64_t begin, int64_t end) {
    std::vector<float> spare(scratch);
    for (int64_t i = 0, base = 0; i < int64_t(count); base += weights[i++].O) {
      const int64_t first = std::max(begin - base, int64_t(0)), last = std::min(end - base, weights[i].O);
      if (first < last) weights[i].rows(laid[i].in, first, last, to + base, outputs, spare.data());
    }
  });
  return y;
}

// Queries, keys and values [T, outputs of all] of tokens x [T, H], the first two of them turned by cos and sin [T, D].
Tensor attention_inputs(const Tensor& x_any, const Tensor& norm, double eps, const Tensor& cos_any, const Tensor& sin_any,
                        std::vector<Tensor> parts, std::vector<int64_t> forms) {
  const std::vector<Linear> weights = linears_of(parts, forms, 3);
  const Tensor x = as_rows(x_any, weights[0].I, "the input");
  const int64_t T = x.size(0), D = cos_any.size(-1), turned = weights[0].O + weights[1].O, all = turned + weights[2].O;
  STD_TORCH_CHECK(T >= 1 && T < FROM_TOKENS, "secateur: ", T, " tokens are not a few");
  STD_TORCH_CHECK(D >= 2 && D % 2 == 0 && weights[0].O % D == 0 && weights[1].O % D == 0 && weights[2].O % D == 0, "secateur: heads of ", D, " features");
  const Tensor cos = as_dtype(as_rows(cos_any, D, "cos"), ScalarType::Float), sin = as_dtype(as_rows(sin_any, D, "sin"), ScalarType::Float);
  STD_TORCH_CHECK(cos.size(0) == T && sin.size(0) == T, "secateur: cos and sin are not of ", T, " tokens");
  Tensor y = products_of(rms_norm(x, norm, eps), weights.data(), 3);
  for (int64_t t = 0; t < T; t++) {
    const float *c = data<float>(cos) + t * D, *s = data<float>(sin) + t * D;
    float* const row = static_cast<float*>(y.data_ptr()) + t * all;
    for (float* head = row; head < row + turned; head += D)
      for (int64_t i = 0; i < D / 2; i++) {
        const float low = head[i], high = head[i + D / 2];
        head[i] = low * c[i] - high * s[i];
        head[i + D / 2] = high * c[i + D / 2] + low * s[i + D / 2];
      }
  }
  return as_dtype(y, x.scalar_type());
}

// silu(gate) · up, [T, M] of y [T, 2 M].
Tensor gated(const Tensor& y, int64_t M) {
  const int64_t T = y.size(0);
  Tensor z = empty(T, M, ScalarType::Float);
  const float* const from = data<float>(y);
  float* const to = static_cast<float*>(z.data_ptr());
  for (int64_t t = 0; t < T; t++)
    for (int64_t m = 0; m < M; m++) {
      const float gate = from[t * 2 * M + m];
      to[t * M + m] = gate / (1 + std::exp(-gate)) * from[t * 2 * M + M + m];
    }
  return z;
}

void add_to(const Tensor& sum, const Tensor& x) {
  float* const to = static_cast<float*>(sum.data_ptr());
  const int64_t n = sum.numel();
  with_values(x, [&](const auto* values) {
    for (int64_t i = 0; i < n; i++) to[i] += float(values[i]);
  });
}

// What a layer makes of tokens x [T, H] and of what attention gave for them: x + o(a), and the MLP of that, normed, on top.
Tensor after_attention(const Tensor& a_any, const Tensor& x_any, const Tensor& norm, double eps, std::vector<Tensor> parts,
                       std::vector<int64_t> forms) {
  const std::vector<Linear> weights = linears_of(parts, forms, 4);
  const Linear &out = weights[0], &gate = weights[1], &up = weights[2], &down = weights[3];
  const Tensor x = as_rows(x_any, out.O, "the input"), a = as_rows(a_any, out.I, "what attention gives");
  const int64_t T = x.size(0);
  STD_TORCH_CHECK(T >= 1 && T < FROM_TOKENS && a.size(0) == T, "secateur: ", T, " tokens are not a few");
  STD_TORCH_CHECK(gate.O == up.O && down.O == out.O, "secateur: weights of an MLP do not fit");
  Tensor y = products_of(a, &out, 1);
  add_to(y, x);
  const Tensor middle = gated(products_of(rms_norm(y, norm, eps), &gate, 2), gate.O);
  Tensor z = products_of(middle, &down, 1);
  add_to(z, y);
  return as_dtype(z, x.scalar_type());
}
