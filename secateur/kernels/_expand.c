/* Between dense rows and (bit mask, values): the loops behind expand.py, which validates everything first.
 *
 * A mask row is ceil(columns / 8) bytes, least significant bit first; a set bit takes the next element of `values`.
 * Addresses arrive as integers and the GIL is released, so Python threads can each take a range of rows. No address is
 * assumed to be aligned: tensors in a memory-mapped file need not be.
 *
 * Masks may come from hostile files. Whatever their bits say, and even if they change while we read them, no loop
 * touches `values` outside [pos, end) or `dense` outside its rows. A range handed to one thread is exactly its own, so
 * threads never write over each other's values either.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__GNUC__) || defined(__clang__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static __forceinline
#endif

#if defined(__x86_64__) && !defined(_MSC_VER) && (__GNUC__ >= 9 || __clang_major__ >= 9)
#define X86 1
#include <immintrin.h>
#define AVX2 __attribute__((target("avx2,popcnt")))
#define AVX512 __attribute__((target("avx512f,avx512bw,avx512vbmi2,bmi2,popcnt")))
#endif

enum { PLAIN, WITH_AVX2, WITH_AVX512 };
static int best_isa = PLAIN; /* of this machine */

/* One range of rows. `values` is read by expand and written by pack; `dense` the other way round. */
typedef struct {
    uint8_t *values, *mask, *dense;
    int64_t *counts;
    int64_t pos, end; /* elements of `values` that belong to this range */
    int64_t row, row_end, columns;
    int size; /* bytes per element: 2 or 4 */
} Job;

/* By mask byte: how many bits are set, and how eight elements move, as element numbers and as byte numbers. A number
 * with its top bit set makes pshufb write zero. */
static uint8_t set_bits[256];
static int8_t expand_lanes[256][8], pack_lanes[256][8];
static uint8_t expand_bytes[256][16], pack_bytes[256][16];

static void fill_tables(void)
{
    memset(expand_lanes, -1, sizeof expand_lanes);
    memset(pack_lanes, -1, sizeof pack_lanes);
    for (int bits = 0; bits < 256; bits++) {
        int n = 0;
        for (int i = 0; i < 8; i++)
            if (bits >> i & 1) {
                expand_lanes[bits][i] = (int8_t)n;
                pack_lanes[bits][n++] = (int8_t)i;
            }
        set_bits[bits] = (uint8_t)n;
        for (int i = 0; i < 16; i++) {
            int from = expand_lanes[bits][i / 2], to = pack_lanes[bits][i / 2];
            expand_bytes[bits][i] = (uint8_t)(from < 0 ? 0x80 : 2 * from + i % 2);
            pack_bytes[bits][i] = (uint8_t)(to < 0 ? 0x80 : 2 * to + i % 2);
        }
    }
}

/* Not zero, where minus zero counts as zero. Compared as bits: NaN and subnormals stay, whatever the FPU's mode. */
INLINE unsigned nonzero(const uint8_t *element, int size)
{
    uint16_t half;
    uint32_t word;
    if (size == 2)
        return memcpy(&half, element, 2), (half & 0x7fff) != 0;
    return memcpy(&word, element, 4), (word & 0x7fffffff) != 0;
}

/* Up to eight columns, element by element; these never look past `end`. They return the new position, -1 for none. */
INLINE int64_t expand_some(const Job *job, int64_t pos, unsigned bits, uint8_t *dense, int width, int size)
{
    for (int i = 0; i < width; i++, dense += size)
        if (!(bits >> i & 1))
            memset(dense, 0, size);
        else if (pos < job->end)
            memcpy(dense, job->values + pos++ * size, size);
        else
            return -1;
    return pos;
}

INLINE int64_t pack_some(const Job *job, int64_t pos, unsigned bits, const uint8_t *dense, int width, int size)
{
    for (int i = 0; i < width; i++)
        if (bits >> i & 1) {
            if (pos >= job->end)
                return -1;
            memcpy(job->values + pos++ * size, dense + i * size, size);
        }
    return pos;
}

INLINE unsigned mask_some(const uint8_t *dense, int width, int size)
{
    unsigned bits = 0;
    for (int i = 0; i < width; i++)
        bits |= nonzero(dense + i * size, size) << i;
    return bits;
}

/* Eight columns where eight elements of `values` are known to be there: free to touch them all. */
INLINE void plain_expand8(const uint8_t *values, unsigned bits, uint8_t *dense, int size)
{
    for (int i = 0; i < 8; i++, dense += size, bits >>= 1) {
        if (size == 2) {
            uint16_t half;
            memcpy(&half, values, 2);
            half &= (uint16_t)(0u - (bits & 1));
            memcpy(dense, &half, 2);
        } else {
            uint32_t word;
            memcpy(&word, values, 4);
            word &= 0u - (bits & 1);
            memcpy(dense, &word, 4);
        }
        values += (bits & 1) * size;
    }
}

INLINE void plain_pack8(uint8_t *values, unsigned bits, const uint8_t *dense, int size)
{
    for (int i = 0; i < 8; i++, dense += size, bits >>= 1) {
        memcpy(values, dense, size);
        values += (bits & 1) * size;
    }
}

INLINE unsigned plain_mask8(const uint8_t *dense, int size)
{
    return mask_some(dense, 8, size);
}

/* The loops over rows, from the three steps above and any faster ones of the same names. */
#define LOOPS(isa, TARGET)                                                                                             \
    TARGET INLINE int64_t isa##_expand_rows(const Job *job, int size)                                                  \
    {                                                                                                                  \
        int64_t pos = job->pos, columns = job->columns, whole = columns / 8;                                           \
        int rest = (int)(columns % 8);                                                                                 \
        for (int64_t row = job->row; row < job->row_end && pos >= 0; row++) {                                          \
            const uint8_t *mask = job->mask + row * ((columns + 7) / 8);                                               \
            uint8_t *dense = job->dense + row * columns * size;                                                        \
            for (int64_t b = 0; b < whole && pos >= 0; b++, dense += 8 * size) {                                       \
                unsigned bits = mask[b];                                                                               \
                if (job->end - pos >= 8) {                                                                             \
                    isa##_expand8(job->values + pos * size, bits, dense, size);                                        \
                    pos += set_bits[bits];                                                                             \
                } else                                                                                                 \
                    pos = expand_some(job, pos, bits, dense, 8, size);                                                 \
            }                                                                                                          \
            if (rest && pos >= 0)                                                                                      \
                pos = expand_some(job, pos, mask[whole], dense, rest, size);                                           \
        }                                                                                                              \
        return pos;                                                                                                    \
    }                                                                                                                  \
    TARGET INLINE int64_t isa##_pack_rows(const Job *job, int size)                                                    \
    {                                                                                                                  \
        int64_t pos = job->pos, columns = job->columns, whole = columns / 8;                                           \
        int rest = (int)(columns % 8);                                                                                 \
        for (int64_t row = job->row; row < job->row_end && pos >= 0; row++) {                                          \
            const uint8_t *mask = job->mask + row * ((columns + 7) / 8);                                               \
            const uint8_t *dense = job->dense + row * columns * size;                                                  \
            for (int64_t b = 0; b < whole && pos >= 0; b++, dense += 8 * size) {                                       \
                unsigned bits = mask[b];                                                                               \
                if (job->end - pos >= 8) {                                                                             \
                    isa##_pack8(job->values + pos * size, bits, dense, size);                                          \
                    pos += set_bits[bits];                                                                             \
                } else                                                                                                 \
                    pos = pack_some(job, pos, bits, dense, 8, size);                                                   \
            }                                                                                                          \
            if (rest && pos >= 0)                                                                                      \
                pos = pack_some(job, pos, mask[whole], dense, rest, size);                                             \
        }                                                                                                              \
        return pos;                                                                                                    \
    }                                                                                                                  \
    TARGET INLINE int64_t isa##_mask_rows(const Job *job, int size)                                                    \
    {                                                                                                                  \
        int64_t columns = job->columns, whole = columns / 8;                                                           \
        int rest = (int)(columns % 8);                                                                                 \
        for (int64_t row = job->row; row < job->row_end; row++) {                                                      \
            uint8_t *mask = job->mask + row * ((columns + 7) / 8);                                                     \
            const uint8_t *dense = job->dense + row * columns * size;                                                  \
            for (int64_t b = 0; b < whole; b++, dense += 8 * size)                                                     \
                mask[b] = (uint8_t)isa##_mask8(dense, size);                                                           \
            if (rest)                                                                                                  \
                mask[whole] = (uint8_t)mask_some(dense, rest, size);                                                   \
        }                                                                                                              \
        return 0;                                                                                                      \
    }                                                                                                                  \
    SIZES(isa, TARGET)

/* `size` as a constant, so that the compiler makes one loop for each. */
#define SIZES(isa, TARGET)                                                                                             \
    TARGET static int64_t isa##_expand(const Job *job)                                                                 \
    {                                                                                                                  \
        return job->size == 2 ? isa##_expand_rows(job, 2) : isa##_expand_rows(job, 4);                                 \
    }                                                                                                                  \
    TARGET static int64_t isa##_pack(const Job *job)                                                                   \
    {                                                                                                                  \
        return job->size == 2 ? isa##_pack_rows(job, 2) : isa##_pack_rows(job, 4);                                     \
    }                                                                                                                  \
    TARGET static int64_t isa##_mask(const Job *job)                                                                   \
    {                                                                                                                  \
        return job->size == 2 ? isa##_mask_rows(job, 2) : isa##_mask_rows(job, 4);                                     \
    }

LOOPS(plain, )

/* Set bits per row into `counts`. Returns 1 if a bit beyond the last column is set, else 0. */
INLINE int64_t count_any(const Job *job)
{
    int64_t bytes = (job->columns + 7) / 8, odd = 0;
    int rest = (int)(job->columns % 8);
    for (int64_t row = job->row; row < job->row_end; row++) {
        const uint8_t *mask = job->mask + row * bytes;
        uint64_t count = 0, word;
        int64_t b = 0;
        for (; b + 8 <= bytes; b += 8) {
            memcpy(&word, mask + b, 8);
            /* Compilers know this for a population count, and use the instruction where the target has one. */
            word -= word >> 1 & 0x5555555555555555u;
            word = (word & 0x3333333333333333u) + (word >> 2 & 0x3333333333333333u);
            word = (word + (word >> 4)) & 0x0f0f0f0f0f0f0f0fu;
            count += word * 0x0101010101010101u >> 56;
        }
        for (; b < bytes; b++)
            count += set_bits[mask[b]];
        job->counts[row] = (int64_t)count;
        if (rest)
            odd |= mask[bytes - 1] >> rest;
    }
    return odd != 0;
}

static int64_t plain_count(const Job *job)
{
    return count_any(job);
}

#ifdef X86

AVX2 static int64_t avx2_count(const Job *job)
{
    return count_any(job);
}

AVX2 INLINE void avx2_expand8(const uint8_t *values, unsigned bits, uint8_t *dense, int size)
{
    if (size == 2) {
        __m128i order = _mm_loadu_si128((const __m128i *)expand_bytes[bits]);
        __m128i eight = _mm_loadu_si128((const __m128i *)values);
        _mm_storeu_si128((__m128i *)dense, _mm_shuffle_epi8(eight, order));
    } else {
        __m256i order = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)expand_lanes[bits]));
        __m256i eight = _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i *)values), order);
        __m256i gaps = _mm256_srai_epi32(order, 31); /* the permutation cannot write zeros itself */
        _mm256_storeu_si256((__m256i *)dense, _mm256_andnot_si256(gaps, eight));
    }
}

AVX2 INLINE void avx2_pack8(uint8_t *values, unsigned bits, const uint8_t *dense, int size)
{
    if (size == 2) {
        __m128i order = _mm_loadu_si128((const __m128i *)pack_bytes[bits]);
        __m128i eight = _mm_loadu_si128((const __m128i *)dense);
        _mm_storeu_si128((__m128i *)values, _mm_shuffle_epi8(eight, order));
    } else {
        __m256i order = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)pack_lanes[bits]));
        __m256i eight = _mm256_loadu_si256((const __m256i *)dense);
        _mm256_storeu_si256((__m256i *)values, _mm256_permutevar8x32_epi32(eight, order));
    }
}

AVX2 INLINE unsigned avx2_mask8(const uint8_t *dense, int size)
{
    if (size == 2) {
        __m128i eight = _mm_slli_epi16(_mm_loadu_si128((const __m128i *)dense), 1); /* without the sign */
        __m128i zeros = _mm_cmpeq_epi16(eight, _mm_setzero_si128());
        return 0xff & ~(unsigned)_mm_movemask_epi8(_mm_packs_epi16(zeros, zeros));
    }
    __m256i eight = _mm256_slli_epi32(_mm256_loadu_si256((const __m256i *)dense), 1);
    __m256i zeros = _mm256_cmpeq_epi32(eight, _mm256_setzero_si256());
    return 0xff & ~(unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(zeros));
}

LOOPS(avx2, AVX2)

/* AVX-512 has both moves as instructions, a register of LANES elements at a time. Loads and stores under a mask do not
 * touch the lanes outside it, so the ends of rows and of `values` need no code of their own. */
#define FIRST(n) _bzhi_u32(~0u, (unsigned)(n))

AVX512 INLINE uint32_t read_bits(const uint8_t *mask, int width, int lanes)
{
    uint32_t bits = 0;
    if (width == lanes)
        return memcpy(&bits, mask, lanes / 8), bits;
    for (int b = 0; b < (width + 7) / 8; b++)
        bits |= (uint32_t)mask[b] << 8 * b;
    return bits & FIRST(width);
}

#define AVX512_ROWS(move, BITS, EACH)                                                                                  \
    AVX512 static int64_t avx512_##move##_##BITS(const Job *job)                                                       \
    {                                                                                                                  \
        enum { SIZE = BITS / 8, LANES = 64 / SIZE };                                                                   \
        int64_t pos = job->pos, columns = job->columns;                                                                \
        for (int64_t row = job->row; row < job->row_end; row++) {                                                      \
            const uint8_t *mask = job->mask + row * ((columns + 7) / 8);                                               \
            uint8_t *dense = job->dense + row * columns * SIZE;                                                        \
            for (int64_t c = 0; c < columns; c += LANES, mask += LANES / 8, dense += 64) {                             \
                int width = columns - c < LANES ? (int)(columns - c) : LANES;                                          \
                uint32_t bits = read_bits(mask, width, LANES);                                                         \
                int n = _mm_popcnt_u32(bits);                                                                          \
                uint8_t *values = job->values + pos * SIZE;                                                            \
                if (n > job->end - pos)                                                                                \
                    return -1;                                                                                         \
                EACH(BITS)                                                                                             \
                pos += n;                                                                                              \
            }                                                                                                          \
        }                                                                                                              \
        return pos;                                                                                                    \
    }

#define EXPAND_EACH(BITS)                                                                                              \
    __m512i some = _mm512_maskz_loadu_epi##BITS(FIRST(n), values);                                                     \
    _mm512_mask_storeu_epi##BITS(dense, FIRST(width), _mm512_maskz_expand_epi##BITS(bits, some));

#define PACK_EACH(BITS)                                                                                                \
    __m512i some = _mm512_maskz_loadu_epi##BITS(FIRST(width), dense);                                                  \
    _mm512_mask_storeu_epi##BITS(values, FIRST(n), _mm512_maskz_compress_epi##BITS(bits, some));

AVX512_ROWS(expand, 16, EXPAND_EACH)
AVX512_ROWS(expand, 32, EXPAND_EACH)
AVX512_ROWS(pack, 16, PACK_EACH)
AVX512_ROWS(pack, 32, PACK_EACH)

static int64_t avx512_expand(const Job *job)
{
    return job->size == 2 ? avx512_expand_16(job) : avx512_expand_32(job);
}

static int64_t avx512_pack(const Job *job)
{
    return job->size == 2 ? avx512_pack_16(job) : avx512_pack_32(job);
}

#endif

typedef int64_t Step(const Job *job);
enum { EXPAND, PACK, MASK, COUNT };

static Step *const steps[][4] = {
    {plain_expand, plain_pack, plain_mask, plain_count},
#ifdef X86
    {avx2_expand, avx2_pack, avx2_mask, avx2_count},
    {avx512_expand, avx512_pack, avx2_mask, avx2_count},
#endif
};

/* run(step, isa, (values, mask, dense, counts), (row, row_end, columns, size), (pos, end)): what the step returns. */
static PyObject *run(PyObject *self, PyObject *args)
{
    unsigned long long values, mask, dense, counts;
    long long row, row_end, columns, pos, end, result;
    int step, isa, size;
    (void)self;
    if (!PyArg_ParseTuple(args, "ii(KKKK)(LLLi)(LL)", &step, &isa, &values, &mask, &dense, &counts, &row, &row_end,
                          &columns, &size, &pos, &end))
        return NULL;
    if (step < EXPAND || step > COUNT || isa < PLAIN || isa > best_isa || (size != 2 && size != 4)) {
        PyErr_SetString(PyExc_ValueError, "no such kernel");
        return NULL;
    }
    Job job = {.values = (uint8_t *)(uintptr_t)values,
               .mask = (uint8_t *)(uintptr_t)mask,
               .dense = (uint8_t *)(uintptr_t)dense,
               .counts = (int64_t *)(uintptr_t)counts,
               .pos = pos,
               .end = end,
               .row = row,
               .row_end = row_end,
               .columns = columns,
               .size = size};
    Py_BEGIN_ALLOW_THREADS
    result = steps[isa][step](&job);
    Py_END_ALLOW_THREADS
    return PyLong_FromLongLong(result);
}

static PyMethodDef methods[] = {
    {"run", run, METH_VARARGS,
     "run(step, isa, (values, mask, dense, counts), (row, row_end, columns, size), (pos, end))"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_expand", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__expand(void)
{
    PyObject *created = PyModule_Create(&module);
    fill_tables();
#ifdef X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("popcnt"))
        best_isa = WITH_AVX2;
    if (best_isa == WITH_AVX2 && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vbmi2"))
        best_isa = WITH_AVX512;
#endif
    if (created && PyModule_AddIntConstant(created, "BEST_ISA", best_isa) < 0)
        Py_CLEAR(created);
    return created;
}
