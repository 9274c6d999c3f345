// Linears of a decoder layer, and inputs laid out for several of them. ops.cpp includes this.
//
// O: output features, I: input features, T: tokens.

// A weight as `sparse_linear` or `coded_linear` takes it, or a dense one, from lists of what weights have; and a bias.
class Linear {
 public:
  // Five numbers a weight: bits, 0 for values under a mask and −1 for a dense weight; group size; rows of a tile; which tensors there
  // are, the bias being number `BIAS`; input features.
  Linear(const std::vector<Tensor>& parts, size_t& part, const std::vector<int64_t>& forms, size_t& form) {
    STD_TORCH_CHECK(forms.size() >= form + 5, "secateur: a weight has five numbers");
    bits_ = forms[form];
    const int64_t group_size = forms[form + 1], tile_rows = forms[form + 2], present = forms[form + 3];
    I = forms[form + 4];
    form += 5;
    std::optional<Tensor> t[BIAS + 1];
    for (int i = 0; i <= BIAS; i++)
      if (present >> i & 1) {
        STD_TORCH_CHECK(part < parts.size(), "secateur: a weight lacks tensors");
        t[i] = parts[part++];
      }
    STD_TORCH_CHECK(I >= 1 && I <= MOST_FEATURES && t[0] && (bits_ < 0 || t[1]) && (bits_ || t[2]), "secateur: a weight lacks tensors");
    if (bits_ > 0) {
      coded_ = checked_coded(I, bits_, *t[0], *t[1], t[2], t[3], group_size, t[4], t[5], t[6], t[7], tile_rows, t[8], t[9], t[10],
                             t[11], t[12], t[13]);
      order_ = t[10] ? data<int32_t>(*t[10]) : nullptr;
      O = t[1]->numel() - 1;
    } else if (bits_ == 0) {
      sparse_ = checked_sparse(I, *t[0], *t[1], *t[2]);
      O = t[2]->numel() - 1;
    } else {
      dense_ = t[0];
      O = t[0]->numel() / I;
    }
    bias_ = t[BIAS];
    STD_TORCH_CHECK(O >= 1 && O <= MOST_FEATURES, "secateur: a weight of ", O, " rows");
    look();
  }

  // Dense weights and biases are a model's own, and may have been put elsewhere since.
  void look() {
    if (dense_) dense_values_ = floats_of(*dense_, O * I, "the weight");
    if (bias_) bias_values_ = floats_of(*bias_, O, "the bias");
  }

  int64_t scratch() const { return bits_ > 0 ? scratch_floats(I, coded_.G) : 0; }

  // Floats that `lay` takes for so many tokens.
  int64_t laid_floats(int64_t T) const { return T * (2 * round_up(I) + round_up(coded_.G) + turned()); }

  // Whether inputs that are laid out for one serve the other.
  bool reads_as(const Linear& other) const {
    return I == other.I && !order_ && !other.order_ && coded_.group_size == other.coded_.group_size && splits() == other.splits();
  }

  // Of rows [T, round_up(I)] with zeros at their ends; they stay where they are if they can.
  Inputs lay(const float* rows, int64_t T, float* memory) const {
    const int64_t stride = round_up(I), sums = round_up(coded_.G);
    const StepKernels& kernels = *chosen()->step;
    Inputs in = {T, stride, rows, nullptr, nullptr, sums, nullptr, turned()};
    if (order_) {
      for (int64_t t = 0; t < T; t++) {
        lay_row(rows + t * stride, order_, I, memory + t * stride);
        std::fill(memory + t * stride + I, memory + (t + 1) * stride, 0.0f);
      }
      in.x = memory;
      memory += T * stride;
    }
    if (splits()) {
      for (int64_t t = 0; t < T; t++) kernels.split(rows + t * stride, stride, memory + t * stride);
      in.x_split = memory;
      memory += T * stride;
    }
    if (coded_.G) {
      for (int64_t t = 0; t < T; t++) kernels.group_sums(in.x + t * stride, I, coded_.group_size, coded_.G, memory + t * sums);
      in.group_sum = memory;
      memory += T * sums;
    }
    if (in.turned) {
      for (int64_t t = 0; t < T; t++) turn(in.x + t * stride, I, coded_.G, memory + t * in.turned);
      in.x_turned = memory;
    }
    return in;
  }

  // Some rows, of outputs that lie `stride` apart for each token.
  void rows(const Inputs& in, int64_t first, int64_t last, float* y, int64_t stride, float* spare) const {
    const Kernels& kernels = *chosen();
    if (bits_ > 0)
      kernels.coded_dot(coded_, in, first, last, y, stride, spare);
    else if (bits_ == 0)
      kernels.sparse_dot(sparse_, in, first, last, y, stride);
    else
      kernels.step->dense_dot({I, dense_values_}, in, first, last, y, stride);
    if (bias_)
      for (int64_t t = 0; t < in.T; t++)
        for (int64_t r = first; r < last; r++) y[t * stride + r] += value_at(bias_values_, r);
  }

  int64_t I, O;

 private:
  static constexpr int BIAS = 14;
  // So that no product of sizes is too large for its type.
  static constexpr int64_t MOST_FEATURES = int64_t(1) << 28;

  int64_t turned() const { return coded_.group_size == TURNED ? turned_floats(coded_.G) : 0; }
  bool splits() const { return bits_ == 0 && sparse_.values.dtype == Float::bf16; }

  int64_t bits_;
  Coded coded_ = {};
  Sparse sparse_ = {};
  const int32_t* order_ = nullptr;
  std::optional<Tensor> dense_, bias_;
  Floats dense_values_, bias_values_;
};

// [T, features] of a contiguous tensor whose last dimension they are.
Tensor as_rows(const Tensor& x, int64_t features, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() >= 1 && x.size(-1) == features, "secateur: ", name, " is not [tokens, ", features, "] in the CPU's memory");
  float_of(x);
  const Tensor whole = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const int64_t sizes[] = {x.numel() / features, features};
  return torch::stable::view(whole, {sizes, 2});
}
