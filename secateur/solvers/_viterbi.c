/* The search behind trellis.py, which validates everything first: the symbols of a ring whose states come nearest to given
 * weights.
 *
 * Steps go from the last weight of a ring to the first. Before a step there is, for each of the J = 2^(L-K) numbers that two
 * states in a row have in common, the least cost of a path that ends in it; a step adds to that what each of the 2^L states is
 * away from the weight, and takes the least of the 2^K states that have the same L - K bits in common with the next. Costs are
 * 16 bits that saturate: squares of 2^-11, of numbers of 2^-13, with the least cost of the step before taken off. They are kept for
 * all steps, so that the way back can find again by which state each came about, without having been told.
 *
 * Every variant computes the same bits. Addresses arrive as integers and the GIL is released, so that Python threads can each
 * take some of the rings.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static __forceinline
#endif

#if defined(__x86_64__) && !defined(_MSC_VER) && (__GNUC__ >= 9 || __clang_major__ >= 9)
#define X86 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2")))
#define AVX512 __attribute__((target("avx512f,avx512bw")))
#endif

enum { PLAIN, WITH_AVX2, WITH_AVX512 };
static int best_isa = PLAIN; /* of this machine */

enum { WORST = 65535, SCALE = 8192 };

/* What one thread works with. */
typedef struct {
    const int16_t *code; /* of each state */
    uint16_t *costs;     /* J before each step, and after the last */
    uint16_t *spread;    /* room for a number for each state */
    int K, L;
    int64_t J;
} Search;

/* One step: costs after it, where those before it are at least `base`; the least of those after it. */
typedef unsigned Step(const Search *s, const uint16_t *before, uint16_t *after, int x, unsigned base);

INLINE int16_t clipped(int x)
{
    return (int16_t)(x > 32767 ? 32767 : x < -32768 ? -32768 : x);
}

INLINE uint16_t cost_of(int x, int16_t code, uint16_t before)
{
    int16_t d = clipped(x - code);
    uint16_t cost = (uint16_t)((uint16_t)((d * d + 0x4000) >> 15) + before);
    return (uint16_t)(cost | -(cost < before)); /* as it saturates */
}

INLINE uint16_t lesser(uint16_t a, uint16_t b)
{
    return a < b ? a : b;
}

/* In loops that compilers make vectors of. */
INLINE unsigned plain_step(const Search *s, const uint16_t *before, uint16_t *restrict after, int x, unsigned base, int K)
{
    const int64_t J = s->J;
    uint16_t *restrict spread = s->spread; /* the costs before each state */
    uint16_t least = WORST, least_before = (uint16_t)base;
    for (int64_t i = 0; i < J; i++)
        for (int b = 0; b < 1 << K; b++)
            spread[(i << K) + b] = before[i];
    for (int64_t h = 0; h < 1 << K; h++) {
        const int16_t *code = s->code + h * J;
        const uint16_t *here = spread + h * J;
        for (int64_t j = 0; j < J; j++) {
            uint16_t cost = cost_of(x, code[j], here[j]);
            after[j] = h ? lesser(after[j], cost) : cost;
        }
    }
    for (int64_t j = 0; j < J; j++) {
        after[j] = (uint16_t)(after[j] > least_before ? after[j] - least_before : 0);
        least = lesser(least, after[j]);
    }
    return least;
}

#define PLAIN_STEPS(K)                                                                                                 \
    static unsigned plain_##K(const Search *s, const uint16_t *before, uint16_t *after, int x, unsigned base)          \
    {                                                                                                                  \
        return plain_step(s, before, after, x, base, K);                                                               \
    }
PLAIN_STEPS(2)
PLAIN_STEPS(3)
PLAIN_STEPS(4)

#ifdef X86

/* The costs before V states in a row, of which 2^K each have one in common. */
AVX512 INLINE __m512i avx512_spread(const uint16_t *before, __m512i spread, int K)
{
    __m512i costs;
    int64_t eight;
    int32_t four;
    if (K == 2)
        costs = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)before));
    else if (K == 3)
        memcpy(&eight, before, 8), costs = _mm512_set1_epi64(eight);
    else
        memcpy(&four, before, 4), costs = _mm512_set1_epi32(four);
    return _mm512_shuffle_epi8(costs, spread);
}

AVX512 INLINE unsigned avx512_step(const Search *s, const uint16_t *before, uint16_t *after, int x, unsigned base, int K)
{
    const int64_t J = s->J;
    const __m512i vx = _mm512_set1_epi16((int16_t)x), vbase = _mm512_set1_epi16((int16_t)base);
    __m512i least = _mm512_set1_epi16(-1);
    uint8_t bytes[64];
    for (int i = 0; i < 64; i++)
        bytes[i] = (uint8_t)(2 * ((i / 2) >> K) + i % 2);
    const __m512i spread = _mm512_loadu_si512(bytes);
    for (int64_t j = 0; j < J; j += 32) {
        __m512i found = _mm512_set1_epi16(-1);
        for (int h = 0; h < 1 << K; h++) {
            const int64_t state = h * J + j;
            __m512i d = _mm512_subs_epi16(vx, _mm512_loadu_si512(s->code + state));
            __m512i cost = avx512_spread(before + (state >> K), spread, K);
            found = _mm512_min_epu16(found, _mm512_adds_epu16(cost, _mm512_mulhrs_epi16(d, d)));
        }
        found = _mm512_subs_epu16(found, vbase);
        least = _mm512_min_epu16(least, found);
        _mm512_storeu_si512(after + j, found);
    }
    __m256i half = _mm256_min_epu16(_mm512_castsi512_si256(least), _mm512_extracti64x4_epi64(least, 1));
    __m128i last = _mm_min_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    return (unsigned)_mm_extract_epi16(_mm_minpos_epu16(last), 0);
}

AVX2 INLINE __m256i avx2_spread(const uint16_t *before, __m256i spread, int K)
{
    int64_t eight;
    int32_t four;
    if (K == 2)
        return memcpy(&eight, before, 8), _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), spread);
    if (K == 3)
        return memcpy(&four, before, 4), _mm256_shuffle_epi8(_mm256_set1_epi32(four), spread);
    return _mm256_set1_epi16((int16_t)before[0]);
}

AVX2 INLINE unsigned avx2_step(const Search *s, const uint16_t *before, uint16_t *after, int x, unsigned base, int K)
{
    const int64_t J = s->J;
    const __m256i vx = _mm256_set1_epi16((int16_t)x), vbase = _mm256_set1_epi16((int16_t)base);
    __m256i least = _mm256_set1_epi16(-1);
    uint8_t bytes[32];
    for (int i = 0; i < 32; i++)
        bytes[i] = (uint8_t)(2 * ((i / 2) >> K) + i % 2);
    const __m256i spread = _mm256_loadu_si256((const __m256i *)bytes);
    for (int64_t j = 0; j < J; j += 16) {
        __m256i found = _mm256_set1_epi16(-1);
        for (int h = 0; h < 1 << K; h++) {
            const int64_t state = h * J + j;
            __m256i d = _mm256_subs_epi16(vx, _mm256_loadu_si256((const __m256i *)(s->code + state)));
            __m256i cost = avx2_spread(before + (state >> K), spread, K);
            found = _mm256_min_epu16(found, _mm256_adds_epu16(cost, _mm256_mulhrs_epi16(d, d)));
        }
        found = _mm256_subs_epu16(found, vbase);
        least = _mm256_min_epu16(least, found);
        _mm256_storeu_si256((__m256i *)(after + j), found);
    }
    __m128i last = _mm_min_epu16(_mm256_castsi256_si128(least), _mm256_extracti128_si256(least, 1));
    return (unsigned)_mm_extract_epi16(_mm_minpos_epu16(last), 0);
}

#define X86_STEPS(K)                                                                                                   \
    AVX2 static unsigned avx2_##K(const Search *s, const uint16_t *before, uint16_t *after, int x, unsigned base)      \
    {                                                                                                                  \
        return avx2_step(s, before, after, x, base, K);                                                                \
    }                                                                                                                  \
    AVX512 static unsigned avx512_##K(const Search *s, const uint16_t *before, uint16_t *after, int x, unsigned base)  \
    {                                                                                                                  \
        return avx512_step(s, before, after, x, base, K);                                                              \
    }
X86_STEPS(2)
X86_STEPS(3)
X86_STEPS(4)

#endif

/* For K = 2, 3, 4; those with vectors take as many costs at once as are named. */
static Step *const steps[][3] = {
    {plain_2, plain_3, plain_4},
#ifdef X86
    {avx2_2, avx2_3, avx2_4},
    {avx512_2, avx512_3, avx512_4},
#endif
};
static const int lanes[] = {1, 16, 32};

/* The states of the best path through `count` weights. It begins and ends with what is in common, `seam`, if that is not
 * negative; else where it likes. */
static void search(const Search *s, Step *step, const int16_t *x, int64_t count, int64_t seam, uint16_t *states)
{
    const int64_t J = s->J;
    unsigned base = 0;
    for (int64_t j = 0; j < J; j++)
        s->costs[j] = seam < 0 || j == seam ? 0 : WORST;
    for (int64_t t = 0; t < count; t++)
        base = step(s, s->costs + t * J, s->costs + (t + 1) * J, x[t], base);
    int64_t j = seam < 0 ? 0 : seam;
    for (int64_t other = 1; seam < 0 && other < J; other++)
        if (s->costs[count * J + other] < s->costs[count * J + j])
            j = other;
    for (int64_t t = count - 1; t >= 0; t--) {
        const uint16_t *before = s->costs + t * J;
        unsigned least = WORST + 1;
        int64_t best = j;
        for (int64_t state = j; state < J << s->K; state += J) {
            unsigned cost = cost_of(x[t], s->code[state], before[state >> s->K]);
            if (cost < least)
                least = cost, best = state;
        }
        states[t] = (uint16_t)best;
        j = best >> s->K;
    }
}

INLINE float value_of(uint32_t state)
{
    const uint32_t hash = state * 0x83DCD12Du;
    const int sum = (int)((hash & 255) + (hash >> 8 & 255) + (hash >> 16 & 255) + (hash >> 24));
    return (float)(sum - 510) / 147.8f;
}

/* Weights of 2^-13, which an int16 holds up to 4 of. */
INLINE int16_t fixed(float x)
{
    float y = x * SCALE;
    return (int16_t)(y > 32767.0f ? 32767.0f : y > -32767.0f ? y + (y < 0 ? -0.5f : 0.5f) : -32767.0f);
}

/* What the symbols of a ring stand for, by their states alone. */
static void decode(const uint8_t *symbols, float *values, int64_t T, int K, int L)
{
    uint32_t state = 0;
    for (int64_t t = (L + K - 1) / K - 1; t >= 0; t--)
        state = state << K | symbols[t % T];
    for (int64_t t = T - 1; t >= 0; t--) {
        state = (state << K | symbols[t]) & ((1u << L) - 1);
        values[t] = value_of(state);
    }
}

static int encode(int isa, const float *x, uint8_t *symbols, float *values, int64_t first, int64_t last, int64_t T,
                  int K, int L, int64_t ahead)
{
    const int64_t states = (int64_t)1 << L, J = states >> K;
    Step *step = steps[J < lanes[isa] ? PLAIN : isa][K - 2];
    const int64_t longest = T > 2 * ahead + 1 ? T : 2 * ahead + 1;
    int16_t *code = malloc(states * sizeof *code), *ring = malloc((T + longest) * sizeof *ring);
    uint16_t *costs = malloc((longest + 1) * J * sizeof *costs), *path = malloc(longest * sizeof *path);
    uint16_t *spread = malloc(states * sizeof *spread);
    const int done = code && ring && costs && path && spread;
    Search s = {code, costs, spread, K, L, J};
    for (int64_t i = 0; done && i < states; i++)
        code[i] = fixed(value_of((uint32_t)i));
    for (int64_t n = first; done && n < last; n++) {
        int16_t *about = ring + T; /* the ends of the ring, the last steps before the first */
        const int64_t after = ahead ? ahead : 1;
        for (int64_t t = 0; t < T; t++)
            ring[t] = fixed(x[n * T + T - 1 - t]);
        memcpy(about, ring + T - ahead, ahead * sizeof *ring);
        memcpy(about + ahead, ring, after * sizeof *ring);
        search(&s, step, about, ahead + after, -1, path);
        search(&s, step, ring, T, path[ahead] >> K, path);
        for (int64_t t = 0; t < T; t++)
            symbols[n * T + T - 1 - t] = (uint8_t)(path[t] & ((1 << K) - 1));
        decode(symbols + n * T, values + n * T, T, K, L);
    }
    free(code), free(ring), free(costs), free(path), free(spread);
    return done;
}

/* encode(isa, (x, symbols, values), (first, last, T), (K, L, ahead)): the rings `first` to `last`. */
static PyObject *run(PyObject *self, PyObject *args)
{
    unsigned long long x, symbols, values;
    long long first, last, T, ahead;
    int isa, K, L, done;
    (void)self;
    if (!PyArg_ParseTuple(args, "i(KKK)(LLL)(iiL)", &isa, &x, &symbols, &values, &first, &last, &T, &K, &L, &ahead))
        return NULL;
    if (isa < PLAIN || isa > best_isa || K < 2 || K > 4 || L < K || L > 16 || ahead < 0 || 2 * ahead > T) {
        PyErr_SetString(PyExc_ValueError, "no such search");
        return NULL;
    }
    Py_BEGIN_ALLOW_THREADS
    done = encode(isa, (const float *)(uintptr_t)x, (uint8_t *)(uintptr_t)symbols, (float *)(uintptr_t)values,
                  first, last, T, K, L, ahead);
    Py_END_ALLOW_THREADS
    if (!done)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"encode", run, METH_VARARGS, "encode(isa, (x, symbols, values), (first, last, T), (K, L, ahead))"}, {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_viterbi", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__viterbi(void)
{
    PyObject *created = PyModule_Create(&module);
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2"))
        best_isa = WITH_AVX2;
    if (best_isa == WITH_AVX2 && __builtin_cpu_supports("avx512bw"))
        best_isa = WITH_AVX512;
#endif
    if (created && PyModule_AddIntConstant(created, "BEST_ISA", best_isa) < 0)
        Py_CLEAR(created);
    return created;
}
