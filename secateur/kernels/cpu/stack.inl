// A stack of decoder layers that takes one token of each of a few texts through all layers, attention over the cache included, in one
// call: of a small model, calls take longer than what they compute. Weights are looked at once, when the stack is made. Everything
// between inputs and outputs is float32. ops.cpp includes this.
//
// T: texts, H: features of a token, M: of the middle of an MLP, D: of a head, S: tokens in the cache, L: layers.

class Stack {
 public:
  // Norms come by twos a layer, those before attention and before the MLP, or by fours, then those of each head of queries and of keys.
  Stack(const std::vector<Tensor>& parts, const std::vector<int64_t>& forms, std::vector<Tensor> norms, double eps, int64_t head, double scale)
      : norms_(std::move(norms)), parts_(parts), eps_(float(eps)), scale_(float(scale)), D_(head) {
    size_t part = 0, form = 0;
    while (form < forms.size()) linears_.emplace_back(parts, part, forms, form);
    STD_TORCH_CHECK(part == parts.size() && !linears_.empty() && linears_.size() % PARTS == 0, "secateur: these are no layers");
    layers_ = int64_t(linears_.size()) / PARTS;
    per_layer_ = int64_t(norms_.size()) / layers_;
    STD_TORCH_CHECK(int64_t(norms_.size()) == per_layer_ * layers_ && (per_layer_ == 2 || per_layer_ == 4), "secateur: layers have two or four norms");
    STD_TORCH_CHECK(D_ >= 2 && D_ % 2 == 0, "secateur: heads of ", D_, " features");
    H_ = linears_[Q].I;
    for (int64_t i = 0; i < layers_; i++) {
      const Linear* w = &linears_[i * PARTS];
      STD_TORCH_CHECK(w[Q].O % D_ == 0 && w[K].O % D_ == 0 && w[K].O == w[V].O && w[Q].O % w[K].O == 0 && w[O].I == w[Q].O,
                      "secateur: heads of layer ", i, " do not fit");
      STD_TORCH_CHECK(w[K].O == linears_[K].O, "secateur: layers have other heads");
      for (const int each : {Q, K, V, GATE, UP}) STD_TORCH_CHECK(w[each].I == H_, "secateur: inputs of layer ", i, " do not fit");
      STD_TORCH_CHECK(w[O].O == H_ && w[DOWN].O == H_ && w[GATE].O == w[UP].O && w[DOWN].I == w[UP].O, "secateur: outputs of layer ", i, " do not fit");
    }
    scales_.resize(norms_.size());
    look();
  }

  Tensor step(int64_t first, int64_t last, const Tensor& x, const Tensor& cos, const Tensor& sin, Maybe mask, Maybe norm, const Tensor& cache, int64_t filled);

 private:
  friend class Step;
  enum { Q, K, V, O, GATE, UP, DOWN, PARTS };

  // Norms are the model's own: see `Linear::look`.
  void look() {
    for (size_t i = 0; i < norms_.size(); i++) {
      const int64_t features = int64_t(i) % per_layer_ < 2 ? H_ : D_;
      STD_TORCH_CHECK(norms_[i].numel() == features, "secateur: a norm's weight is not [", features, "]");
      scales_[i] = floats_of(norms_[i], features, "a norm's weight");
    }
    for (Linear& linear : linears_) linear.look();
  }

  std::vector<Linear> linears_;
  std::vector<Tensor> norms_, parts_;
  std::vector<Floats> scales_;
  float eps_, scale_;
  int64_t layers_, per_layer_, H_, D_;
  std::mutex stepping_;  // one call at a time, since each looks where weights are
};

// One call of `Stack::step`: its memory, and the phases of each layer.
class Step {
 public:
  Step(const Stack& stack, int64_t first, int64_t last, int64_t T, int64_t S, int64_t room, int64_t threads)
      : stack_(stack), first_(first), last_(last), T_(T), S_(S), room_(room), threads_(threads) {
    const int64_t H = round_up(stack.H_);
    int64_t widest = 1, laid = 0;
    for (int64_t i = first * Stack::PARTS; i < last * Stack::PARTS; i++) {
      const Linear& linear = stack.linears_[i];
      widest = std::max({widest, round_up(linear.I), round_up(linear.O)});
      laid = std::max(laid, linear.laid_floats(T));
      floats_ = std::max(floats_, linear.scratch());
    }
    floats_ += round_up(S + 1);
    // Zeros are at the ends of rows whatever is computed.
    memory_.resize(T * (2 * H + 5 * widest) + 3 * laid);
    float* at = memory_.data();
    const auto take = [&](int64_t n) { return std::exchange(at, at + n); };
    x = take(T * H);
    normed_ = take(T * H);
    y_ = take(3 * T * widest);
    given_ = take(2 * T * widest);
    for (float*& each : laid_) each = take(laid);
  }

  template <class X>
  void set(const X* values) {
    for (int64_t t = 0; t < T_; t++)
      for (int64_t i = 0; i < stack_.H_; i++) x[t * round_up(stack_.H_) + i] = float(values[t * stack_.H_ + i]);
  }

  template <class C>
  void run(C* cache, Float dtype, const float* cos, const float* sin, const uint8_t* mask) {
    if (first_ == last_) return;
    before_attention(first_);
    Crew::go_through(
        (last_ - first_) * PHASES, threads_, floats_, [&](int64_t phase) { return chunks(phase); },
        [&](int64_t phase, int64_t chunk, float* spare) {
          if (phase % PHASES == ATTENTION)
            attend(phase / PHASES, chunk, cache, dtype, mask, spare);
          else
            multiply(phase, chunk, spare);
        },
        [&](int64_t phase) { after(phase, cache, cos, sin); });
  }

  float* x;  // [T, H]

 private:
  enum { INPUTS, ATTENTION, OUT, MIDDLE, DOWN, PHASES };

  const Linear* of_layer(int64_t i) const { return &stack_.linears_[(first_ + i) * Stack::PARTS]; }

  // The weights that a phase multiplies by: they are next to each other.
  std::pair<const Linear*, int64_t> weights(int64_t phase) const {
    const Linear* w = of_layer(phase / PHASES);
    switch (phase % PHASES) {
      case INPUTS:
        return {w + Stack::Q, 3};
      case OUT:
        return {w + Stack::O, 1};
      case MIDDLE:
        return {w + Stack::GATE, 2};
      default:
        return {w + Stack::DOWN, 1};
    }
  }

  // Rows that are dealt out: a row of the gate goes with that of the other.
  int64_t rows_of(int64_t phase) const {
    const auto [w, count] = weights(phase);
    return phase % PHASES == INPUTS ? w[0].O + w[1].O + w[2].O : w[0].O;
  }

  int64_t chunks(int64_t phase) const {
    if (phase % PHASES == ATTENTION) return T_ * of_layer(phase / PHASES)[Stack::Q].O / stack_.D_;
    const auto [w, count] = weights(phase);
    const int64_t rows = rows_of(phase), numbers = rows * w[0].I * (phase % PHASES == MIDDLE ? 2 : 1);
    return threads_ == 1 ? 1 : std::clamp<int64_t>(numbers / WEIGHTS_PER_CHUNK, 1, std::min(rows, threads_ * CHUNKS_PER_THREAD));
  }

  void multiply(int64_t phase, int64_t chunk, float* spare) {
    const auto [w, count] = weights(phase);
    const int64_t rows = rows_of(phase), of = chunks(phase), begin = rows * chunk / of, end = rows * (chunk + 1) / of;
    if (phase % PHASES == INPUTS) {
      for (int64_t i = 0, base = 0; i < count; base += w[i++].O) {
        const int64_t from = std::max(begin - base, int64_t(0)), to = std::min(end - base, w[i].O);
        if (from < to) w[i].rows(in_[i], from, to, y_ + base, rows, spare);
      }
      return;
    }
    for (int64_t i = 0; i < count; i++) w[i].rows(in_[i], begin, end, y_ + i * rows, count * rows, spare);
    if (phase % PHASES == MIDDLE) {
      for (int64_t t = 0; t < T_; t++)
        chosen()->step->gated(y_ + 2 * t * rows + begin, y_ + (2 * t + 1) * rows + begin, end - begin, given_ + t * round_up(rows) + begin);
      return;
    }
    for (int64_t t = 0; t < T_; t++)
      for (int64_t r = begin; r < end; r++) x[t * round_up(rows) + r] += y_[t * rows + r];
  }

  template <class C>
  void attend(int64_t i, int64_t chunk, const C* cache, Float dtype, const uint8_t* mask, float* spare) {
    const Linear* w = of_layer(i);
    const int64_t D = stack_.D_, heads = w[Stack::Q].O / D, kept = w[Stack::K].O / D, t = chunk / heads, h = chunk % heads;
    const int64_t outputs = w[Stack::Q].O + 2 * w[Stack::K].O, k = h / (heads / kept);
    const Floats keys = {place(cache, i, 0, t, k, 0), dtype}, values = {place(cache, i, 1, t, k, 0), dtype};
    chosen()->step->attend({D, S_ + 1, y_ + t * outputs + h * D, keys, values, mask ? mask + t * (S_ + 1) : nullptr}, spare,
                           given_ + t * round_up(w[Stack::Q].O) + h * D);
  }

  template <class C>
  C* place(C* cache, int64_t i, int64_t which, int64_t t, int64_t head, int64_t s) const {
    const int64_t kept = stack_.linears_[Stack::K].O / stack_.D_;
    return cache + ((((2 * i + which) * T_ + t) * kept + head) * room_ + s) * stack_.D_;
  }

  template <class C>
  void after(int64_t phase, C* cache, const float* cos, const float* sin) {
    const int64_t i = phase / PHASES;
    switch (phase % PHASES) {
      case INPUTS:
        return turn_and_keep(i, cache, cos, sin);
      case ATTENTION:
      case MIDDLE:
        clear_ends(weights(phase + 1).first->I);
        return lay(phase + 1, given_);
      case OUT:
        norm(1, i);
        return lay(phase + 1, normed_);
      default:
        if (first_ + i + 1 < last_) before_attention(first_ + i + 1);
    }
  }

  void before_attention(int64_t layer) {
    norm(0, layer - first_);
    lay((layer - first_) * PHASES + INPUTS, normed_);
  }

  void norm(int64_t which, int64_t i) {
    const int64_t H = round_up(stack_.H_);
    for (int64_t t = 0; t < T_; t++)
      chosen()->step->rms_norm(x + t * H, stack_.scales_[(first_ + i) * stack_.per_layer_ + which], stack_.H_, stack_.eps_, normed_ + t * H);
  }

  // Rows of other lengths were where these are.
  void clear_ends(int64_t I) {
    for (int64_t t = 0; t < T_; t++) std::fill(given_ + t * round_up(I) + I, given_ + (t + 1) * round_up(I), 0.0f);
  }

  void lay(int64_t phase, const float* rows) {
    const auto [w, count] = weights(phase);
    for (int64_t i = 0; i < count; i++) in_[i] = i && w[i].reads_as(w[i - 1]) ? in_[i - 1] : w[i].lay(rows, T_, laid_[i]);
  }

  // Queries and keys are normed, where heads have norms, and turned; keys and values go to the cache.
  template <class C>
  void turn_and_keep(int64_t i, C* cache, const float* cos, const float* sin) {
    const Linear* w = of_layer(i);
    const StepKernels& kernels = *chosen()->step;
    const int64_t D = stack_.D_, heads = w[Stack::Q].O / D, kept = w[Stack::K].O / D;
    const Floats* scales = &stack_.scales_[(first_ + i) * stack_.per_layer_];
    for (int64_t t = 0; t < T_; t++) {
      float* head = y_ + t * (heads + 2 * kept) * D;
      for (int64_t h = 0; h < heads + kept; h++, head += D) {
        if (stack_.per_layer_ == 4) kernels.rms_norm(head, scales[h < heads ? 2 : 3], D, stack_.eps_, head);
        kernels.turn(head, cos + t * D, sin + t * D, D);
        if (h < heads)
          for (int64_t d = 0; d < D; d++) head[d] *= stack_.scale_;
        else
          std::transform(head, head + D, place(cache, i, 0, t, h - heads, S_), [](float v) { return C(v); });
      }
      for (int64_t h = 0; h < kept; h++, head += D)
        std::transform(head, head + D, place(cache, i, 1, t, h, S_), [](float v) { return C(v); });
    }
  }

  // A chunk is not to be smaller, and there are not to be more of them, than pays for taking it.
  static constexpr int64_t WEIGHTS_PER_CHUNK = 1 << 15, CHUNKS_PER_THREAD = 2;

  const Stack& stack_;
  int64_t first_, last_, T_, S_, room_, threads_, floats_ = 0;
  std::vector<float> memory_;
  float *normed_, *y_, *given_, *laid_[3];
  Inputs in_[3];
};

Tensor Stack::step(int64_t first, int64_t last, const Tensor& x_any, const Tensor& cos_any, const Tensor& sin_any, Maybe mask, Maybe norm,
                   const Tensor& cache, int64_t filled) {
  const Tensor x = as_rows(x_any, H_, "the input");
  const int64_t T = x.size(0), kept = linears_[K].O / D_;
  STD_TORCH_CHECK(0 <= first && first <= last && last <= layers_, "secateur: there are ", layers_, " layers");
  STD_TORCH_CHECK(T >= 1 && T < FROM_TOKENS, "secateur: ", T, " tokens are not a few");
  const Tensor cos = as_dtype(as_rows(cos_any, D_, "cos"), ScalarType::Float), sin = as_dtype(as_rows(sin_any, D_, "sin"), ScalarType::Float);
  STD_TORCH_CHECK(cos.size(0) == T && sin.size(0) == T, "secateur: cos and sin are not of ", T, " tokens");
  STD_TORCH_CHECK(cache.is_cpu() && cache.is_contiguous() && cache.dim() == 6 && cache.size(0) == last - first && cache.size(1) == 2 &&
                      cache.size(2) == T && cache.size(3) == kept && cache.size(5) == D_,
                  "secateur: the cache is not [", last - first, ", 2, ", T, ", ", kept, ", tokens, ", D_, "], side by side in the CPU's memory");
  const Float dtype = float_of(cache);
  const int64_t room = cache.size(4);
  STD_TORCH_CHECK(0 <= filled && filled < room, "secateur: there is no room for token ", filled, " in a cache of ", room);
  if (mask) {
    check(*mask, ScalarType::Bool, T * (filled + 1), "the mask");
    STD_TORCH_CHECK(mask->numel() == T * (filled + 1), "secateur: the mask is not [", T, ", ", filled + 1, "]");
  }
  if (norm) STD_TORCH_CHECK(norm->numel() == H_, "secateur: the last norm's weight is not [", H_, "]");
  const Floats last_scale = norm ? floats_of(*norm, H_, "the last norm's weight") : Floats();
  const std::lock_guard<std::mutex> lock(stepping_);
  look();
  Step step(*this, first, last, T, filled, room, torch::stable::get_num_threads());
  with_values(x, [&](const auto* values) { step.set(values); });
  with_values(cache, [&](const auto* values) {
    using C = std::remove_const_t<std::remove_pointer_t<decltype(values)>>;
    step.run(const_cast<C*>(values), dtype, data<float>(cos), data<float>(sin), mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr);
  });
  Tensor y = empty(T, H_, ScalarType::Float);
  for (int64_t t = 0; t < T; t++) {
    float *const from = step.x + t * round_up(H_), *const to = static_cast<float*>(y.data_ptr()) + t * H_;
    if (norm)
      chosen()->step->rms_norm(from, last_scale, H_, eps_, to);
    else
      std::copy_n(from, H_, to);
  }
  return as_dtype(y, x.scalar_type());
}

// Stacks by their numbers, which is what Python has of them. They outlive what the program destroys at its end.
struct Stacks {
  std::mutex mutex;
  std::map<int64_t, std::shared_ptr<Stack>> all;
  int64_t made = 0;
};

Stacks& stacks() {
  static Stacks& found = *new Stacks;
  return found;
}

int64_t make_stack(std::vector<Tensor> parts, std::vector<int64_t> forms, std::vector<Tensor> norms, double eps, int64_t head, double scale) {
  auto made = std::make_shared<Stack>(parts, forms, norms, eps, head, scale);
  const std::lock_guard<std::mutex> lock(stacks().mutex);
  stacks().all[++stacks().made] = std::move(made);
  return stacks().made;
}

bool free_stack(int64_t number) {
  std::shared_ptr<Stack> found;  // goes when nobody waits for it
  const std::lock_guard<std::mutex> lock(stacks().mutex);
  const auto at = stacks().all.find(number);
  if (at == stacks().all.end()) return false;
  found = std::move(at->second);
  stacks().all.erase(at);
  return true;
}

Tensor stack_step(int64_t number, int64_t first, int64_t last, const Tensor& x, const Tensor& cos, const Tensor& sin, Maybe mask, Maybe norm,
                  const Tensor& cache, int64_t filled) {
  std::shared_ptr<Stack> stack;
  {
    const std::lock_guard<std::mutex> lock(stacks().mutex);
    const auto at = stacks().all.find(number);
    if (at != stacks().all.end()) stack = at->second;
  }
  STD_TORCH_CHECK(stack, "secateur: there is no stack of number ", number);
  return stack->step(first, last, x, cos, sin, mask, norm, cache, filled);
}

// x Wᵀ + bias for a dense W.
Tensor dense_linear(const Tensor& x_any, const Tensor& weight, Maybe bias) {
  check_input(x_any);
  const int64_t T = x_any.size(0), I = x_any.size(1), O = weight.dim() == 2 ? weight.size(0) : 0;
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == I, "secateur: the weight is not [outputs, ", I, "]");
  const Dense w = {I, floats_of(weight, O * I, "the weight")};
  const Tensor x = x_any.is_contiguous() ? x_any : torch::stable::contiguous(x_any);
  const Laid laid = lay_out(x, 0, 0, false, nullptr);
  Tensor y = empty(T, O, ScalarType::Float);
  float* const to = static_cast<float*>(y.data_ptr());
  torch::stable::parallel_for(0, O, grain(I), [&](int64_t first, int64_t last) { chosen()->step->dense_dot(w, laid.in, first, last, to, O); });
  return finish(y, bias, x.scalar_type());
}
