// A CPU's kernels in float32, and for single tokens also in bfloat16: one pass over memory where
// torch's operators take several.
//
// Letters as in reference.py. kernels.py calls these with contiguous memory and says what they
// compute. The order of each sum depends on shapes alone, so results do not depend on threads.
// Beware 0 * nan is nan: a slot of 0 must not be multiplied, whatever its row holds.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>
#include <type_traits>
#include <vector>

using Id = std::int64_t;

namespace {

const Id IN_RANGE = INT64_MIN, NO_MEMORY = INT64_MIN + 1;

// Whether there is such a row; if not, notes its id in `wrong`.
bool is_among(Id id, Id num_rows, Id& wrong) {
    if (id >= 0 && id < num_rows) return true;
#pragma omp atomic write
    wrong = id;
    return false;
}

struct BFloat16 {
    std::uint16_t bits;
};

float value(float x) { return x; }

float value(BFloat16 x) {
    const std::uint32_t bits = std::uint32_t{x.bits} << 16;
    float found;
    std::memcpy(&found, &bits, sizeof found);
    return found;
}

void store(float* at, float x) { *at = x; }

void store(BFloat16* at, float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x == x) bits += 0x7fff + (bits >> 16 & 1);  // to the nearest, ties to even
    at->bits = static_cast<std::uint16_t>(bits >> 16);
}

template <class Weight>
struct Term {
    float coef;
    const Weight* row;
};

// y = sum of coef * row over terms. Eight rows at a time, so that y is seldom read and written.
template <class Weight>
void weighted_sum(float* __restrict y, Id d, const Term<Weight>* terms, Id count) {
    std::fill(y, y + d, 0.0f);
    Id at = 0;
    for (; at + 8 <= count; at += 8) {
        const Term<Weight>* t = terms + at;
        const Weight *r0 = t[0].row, *r1 = t[1].row, *r2 = t[2].row, *r3 = t[3].row;
        const Weight *r4 = t[4].row, *r5 = t[5].row, *r6 = t[6].row, *r7 = t[7].row;
        const float c0 = t[0].coef, c1 = t[1].coef, c2 = t[2].coef, c3 = t[3].coef;
        const float c4 = t[4].coef, c5 = t[5].coef, c6 = t[6].coef, c7 = t[7].coef;
#pragma omp simd
        for (Id i = 0; i < d; ++i)
            y[i] +=
                (c0 * value(r0[i]) + c1 * value(r1[i]) + c2 * value(r2[i]) + c3 * value(r3[i])) +
                (c4 * value(r4[i]) + c5 * value(r5[i]) + c6 * value(r6[i]) + c7 * value(r7[i]));
    }
    for (; at + 2 <= count; at += 2) {
        const Weight *r0 = terms[at].row, *r1 = terms[at + 1].row;
        const float c0 = terms[at].coef, c1 = terms[at + 1].coef;
#pragma omp simd
        for (Id i = 0; i < d; ++i) y[i] += c0 * value(r0[i]) + c1 * value(r1[i]);
    }
    for (; at < count; ++at) {
        const Weight* row = terms[at].row;
        const float coef = terms[at].coef;
#pragma omp simd
        for (Id i = 0; i < d; ++i) y[i] += coef * value(row[i]);
    }
}

// Sixteen floats at once, in as many registers as this CPU needs.
const Id LANES = 16;
typedef float Lanes __attribute__((vector_size(LANES * 4)));

Lanes load(const float* at) {
    Lanes found;
    std::memcpy(&found, at, sizeof found);
    return found;
}

Lanes load(const BFloat16* at) {
    typedef std::uint16_t Halves __attribute__((vector_size(LANES * 2)));
    typedef std::uint32_t Words __attribute__((vector_size(LANES * 4)));
    Halves halves;
    std::memcpy(&halves, at, sizeof halves);
    return (Lanes)(__builtin_convertvector(halves, Words) << 16);
}

// By halves: the compiler must not change the order of a sum, so it is written out.
float sum_of(Lanes lanes) {
    typedef float Half __attribute__((vector_size(LANES * 2)));
    typedef float Quarter __attribute__((vector_size(LANES)));
    Half halves[2];
    Quarter quarters[2];
    std::memcpy(halves, &lanes, sizeof halves);
    const Half half = halves[0] + halves[1];
    std::memcpy(quarters, &half, sizeof quarters);
    const Quarter sums = quarters[0] + quarters[1];
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class Weight>
float dot(const float* a, const Weight* b, Id d) {
    Lanes sums = {};
    Id i = 0;
    for (; i + LANES <= d; i += LANES) sums += load(a + i) * load(b + i);
    float sum = sum_of(sums);
    for (; i < d; ++i) sum += a[i] * value(b[i]);
    return sum;
}

// out[t * stride + r] = <g[t], rows[r]> for R rows and T tokens at once; `ahead` points to the rows
// that are read next, to be fetched meanwhile.
template <int R, int T, class Weight>
void tile_of_dots(const float* const* g, const Weight* const* rows, Id d,
                  const Weight* const* ahead, float* out, Id stride) {
    Lanes sums[T][R] = {};
    Id i = 0;
    for (; i + LANES <= d; i += LANES) {
        if (ahead != nullptr)
            for (int r = 0; r < R; ++r) __builtin_prefetch(ahead[r] + i);
        Lanes own[R];
        for (int r = 0; r < R; ++r) own[r] = load(rows[r] + i);
        for (int t = 0; t < T; ++t) {
            const Lanes token = load(g[t] + i);
            for (int r = 0; r < R; ++r) sums[t][r] += token * own[r];
        }
    }
    for (int t = 0; t < T; ++t)
        for (int r = 0; r < R; ++r) {
            float sum = sum_of(sums[t][r]);
            for (Id rest = i; rest < d; ++rest) sum += g[t][rest] * value(rows[r][rest]);
            out[t * stride + r] = sum;
        }
}

// out[t * stride + r] = <g[t], W[r]> for all rows of W [rows, d]; each row is read once.
template <class Weight>
void products(const float* const* g, Id tokens, const Weight* W, Id rows, Id d, float* out,
              Id stride) {
    for (Id r = 0; r < rows; r += 4) {
        if (r + 4 > rows) {  // the last rows, one by one
            for (Id t = 0; t < tokens; ++t)
                for (Id j = r; j < rows; ++j) out[t * stride + j] = dot(g[t], W + j * d, d);
            return;
        }
        const Weight *own[4], *ahead[4];
        for (Id j = 0; j < 4; ++j) {
            own[j] = W + (r + j) * d;
            ahead[j] = W + std::min(r + 4 + j, rows - 1) * d;
        }
        Id t = 0;
        if (tokens % 2) tile_of_dots<4, 1>(g, own, d, ahead, out + r, stride), t = 1;
        const auto next = [&](auto count) {
            tile_of_dots<4, count(), Weight>(g + t, own, d, t ? nullptr : ahead,
                                             out + t * stride + r, stride);
            t += count();
        };
#ifdef __AVX512F__  // its registers hold sixteen sums of sixteen lanes
        while (t + 4 <= tokens) next(std::integral_constant<int, 4>());
#endif
        while (t < tokens) next(std::integral_constant<int, 2>());
    }
}

std::int32_t count_from(float least, const float* row, Id m) {
    std::int32_t count = 0;
#pragma omp simd reduction(+ : count)
    for (Id i = 0; i < m; ++i) count += row[i] >= least;
    return count;
}

// A bound that at least k values of row [m] reach, or 0. It is found by bisection, and only a few
// more than k reach it, unless many values are equal.
float bound_of_topk(const float* row, Id m, Id k) {
    float low = 0, high = 0;
#pragma omp simd reduction(max : high)
    for (Id i = 0; i < m; ++i) high = row[i] > high ? row[i] : high;
    for (int halvings = 0; halvings < 12; ++halvings) {
        const float middle = low + (high - low) / 2;
        const Id count = count_from(middle, row, m);
        (count < k ? high : low) = middle;
        if (count >= k && count <= k + k / 4) break;
    }
    return low;
}

// acts, ids [k] = the k largest of relu(pre [m]); of equal ones those with the lowest index.
void topk(const float* pre, Id m, Id k, float* acts, Id* ids,
          std::vector<std::uint64_t>& candidates) {
    const float least = bound_of_topk(pre, m, k);
    candidates.resize(m);
    Id count = 0;
    // write every value, but advance only past candidates: without a branch, this is faster
    for (Id f = 0; f < m; ++f) {
        std::uint32_t bits;  // positive floats are ordered like their bits
        std::memcpy(&bits, pre + f, sizeof bits);
        const auto last = UINT32_MAX - static_cast<std::uint32_t>(f);
        candidates[count] = std::uint64_t{bits} << 32 | last;
        count += (pre[f] >= least) & (pre[f] > 0);
    }
    if (count > k)
        std::nth_element(candidates.begin(), candidates.begin() + (k - 1),
                         candidates.begin() + count, std::greater<>());
    for (Id j = 0; j < k; ++j) {
        const std::uint64_t found = j < count ? candidates[j] : UINT32_MAX;
        const auto bits = static_cast<std::uint32_t>(found >> 32);
        std::memcpy(acts + j, &bits, sizeof bits);
        ids[j] = UINT32_MAX - static_cast<std::uint32_t>(found);
    }
}

// The weights and rules for a single token, field by field as `token._Layout`. With one expert there
// is no router; b_enc may be null. With `low`, b_dec, W_enc, b_enc and W_dec are in bfloat16.
struct Plan {
    const float *scale, *outlier_norm, *router, *b_router;
    const void *b_dec, *W_enc, *b_enc, *W_dec;
    Id E, m, d, k;
    int centered, gated, low;
};

template <class Weight>
Id decode_one(const Plan& plan, const Weight* acts, const Id* ids, Id slots, Weight* y) {
    const auto* W = static_cast<const Weight*>(plan.W_dec);
    const auto* b_dec = static_cast<const Weight*>(plan.b_dec);
    Id wrong = IN_RANGE, count = 0;
    std::vector<Term<Weight>> terms(slots);
    std::vector<float> sum(plan.d);
    for (Id j = 0; j < slots; ++j) {
        const float act = value(acts[j]);
        if (act != 0 && is_among(ids[j], plan.E * plan.m, wrong))
            terms[count++] = {act, W + ids[j] * plan.d};
    }
    weighted_sum(sum.data(), plan.d, terms.data(), count);
    for (Id i = 0; i < plan.d; ++i) store(y + i, sum[i] + value(b_dec[i]) / *plan.scale);
    return wrong;
}

template <class Weight>
void encode_one(const Plan& plan, const float* x, Weight* acts, Id* ids, int threads) {
    const Id E = plan.E, m = plan.m, d = plan.d, k = plan.k;
    const float scale = *plan.scale;
    std::vector<float> input(x, x + d), pre(std::max(m, E)), kept(k);
    const float* token = input.data();
    Id expert = 0;
    float gate = 1;
    // route: the expert with the largest logit, and its probability
    if (E > 1) {
        for (Id i = 0; i < d; ++i) input[i] = scale * x[i] - plan.b_router[i];
        products(&token, 1, plan.router, E, d, pre.data(), E);
        float total = 0;
        for (Id e = 1; e < E; ++e)
            if (pre[e] > pre[expert]) expert = e;
        for (Id e = 0; e < E; ++e) total += std::exp(pre[e] - pre[expert]);
        if (plan.gated) gate = 1 / total;
    }
    // an outlier has no activations
    if (std::sqrt(dot(x, x, d)) > *plan.outlier_norm) gate = 0;
    const auto* b_dec = static_cast<const Weight*>(plan.b_dec);
    for (Id i = 0; i < d; ++i) input[i] = plan.centered ? x[i] - value(b_dec[i]) / scale : x[i];
    // the expert's products, a range of its features for each thread
    const Weight* W = static_cast<const Weight*>(plan.W_enc) + expert * m * d;
    const Id part = (m + 4 * threads - 1) / (4 * threads) * 4;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int t = 0; t < threads; ++t) {
        const Id begin = std::min(t * part, m), end = std::min(begin + part, m);
        products(&token, 1, W + begin * d, end - begin, d, pre.data() + begin, m);
    }
    if (plan.b_enc != nullptr) {
        const Weight* bias = static_cast<const Weight*>(plan.b_enc) + expert * m;
        for (Id f = 0; f < m; ++f) pre[f] += value(bias[f]) / scale;
    }
    std::vector<std::uint64_t> candidates;
    topk(pre.data(), m, k, kept.data(), ids, candidates);
    for (Id j = 0; j < k; ++j) {
        store(acts + j, gate == 0 ? 0 : gate * kept[j]);  // 0 * infinity would be nan
        ids[j] += expert * m;
    }
}

}  // namespace

extern "C" {

// acts, ids [p, k] = the k largest of relu(pre [p, m]).
void relu_topk(const float* pre, Id p, Id m, Id k, float* acts, Id* ids, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<std::uint64_t> candidates;
#pragma omp for schedule(static)
        for (Id i = 0; i < p; ++i) topk(pre + i * m, m, k, acts + i * k, ids + i * k, candidates);
    }
}

// pre[i] = W[e] @ x[rows[i]] + bias[e] for offsets[e] <= i < offsets[e + 1], for experts with 1 to
// `most` such rows. Each weight is read from memory once, however many threads there are. If rows is
// null, rows[i] is i.
void expert_products(const float* x, const Id* rows, const float* W, const float* bias,
                     const Id* offsets, Id E, Id m, Id d, Id most, float* pre, int threads) {
    std::vector<Id> few;
    for (Id e = 0; e < E; ++e)
        if (offsets[e] < offsets[e + 1] && offsets[e + 1] - offsets[e] <= most) few.push_back(e);
    const Id size = 64, blocks = (m + size - 1) / size, tasks = few.size() * blocks;
#pragma omp parallel num_threads(threads)
    {
        std::vector<const float*> tokens(most);
#pragma omp for schedule(dynamic)
        for (Id task = 0; task < tasks; ++task) {
            const Id e = few[task / blocks], f = task % blocks * size, begin = offsets[e];
            const Id num = std::min(size, m - f), count = offsets[e + 1] - begin;
            for (Id i = 0; i < count; ++i)
                tokens[i] = x + (rows == nullptr ? begin + i : rows[begin + i]) * d;
            float* out = pre + begin * m + f;
            products(tokens.data(), count, W + (e * m + f) * d, num, d, out, m);
            if (bias == nullptr) continue;
            for (Id i = 0; i < count; ++i)
                for (Id r = 0; r < num; ++r) out[i * m + r] += bias[e * m + f + r];
        }
    }
}

// y[n] = sum_j coefs[n, j] * W[ids[n, j]]. Returns an id that is not one of num_rows, or IN_RANGE.
Id gather_sum(const float* coefs, const Id* ids, const float* W, Id n, Id k, Id num_rows, Id d,
              float* y, int threads) {
    Id wrong = IN_RANGE;
#pragma omp parallel num_threads(threads)
    {
        std::vector<Term<float>> terms(k);
#pragma omp for schedule(static)
        for (Id i = 0; i < n; ++i) {
            Id count = 0;
            for (Id p = i * k; p < (i + 1) * k; ++p) {
                if (coefs[p] == 0) continue;
                if (is_among(ids[p], num_rows, wrong)) terms[count++] = {coefs[p], W + ids[p] * d};
            }
            weighted_sum(y + i * d, d, terms.data(), count);
        }
    }
    return wrong;
}

// c[n, j] = <g[n], W[ids[n, j]]>. Returns as gather_sum.
Id row_dots(const float* g, const Id* ids, const float* W, Id n, Id k, Id num_rows, Id d, float* c,
            int threads) {
    Id wrong = IN_RANGE;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (Id i = 0; i < n; ++i) {
        const float* token = g + i * d;
        const Id* own = ids + i * k;
        float* out = c + i * k;
        bool all = true;
        for (Id j = 0; j < k; ++j) all &= is_among(own[j], num_rows, wrong);
        if (!all) continue;
        Id j = 0;
        for (; j + 4 <= k; j += 4) {
            const float* rows[4];
            for (Id r = 0; r < 4; ++r) rows[r] = W + own[j + r] * d;
            tile_of_dots<4, 1, float>(&token, rows, d, nullptr, out + j, 4);
        }
        for (; j < k; ++j) out[j] = dot(token, W + own[j] * d, d);
    }
    return wrong;
}

// W[f] = sum of coefs[n, j] * x[n] over ids[n, j] = f, for each of num_rows rows. Returns as
// gather_sum, or NO_MEMORY: an exception would end the process.
Id scatter_sum(const float* coefs, const Id* ids, const float* x, Id n, Id k, Id num_rows, Id d,
               float* W, int threads) try {
    // sort the terms by feature, by counting
    Id wrong = IN_RANGE;
    std::vector<Id> starts(num_rows + 1);
    for (Id p = 0; p < n * k; ++p)
        if (coefs[p] != 0 && is_among(ids[p], num_rows, wrong)) ++starts[ids[p] + 1];
    if (wrong != IN_RANGE) return wrong;
    for (Id f = 0; f < num_rows; ++f) starts[f + 1] += starts[f];
    std::vector<Term<float>> terms(starts[num_rows]);
    std::vector<Id> next(starts.begin(), starts.end() - 1);
    for (Id i = 0; i < n; ++i)
        for (Id p = i * k; p < (i + 1) * k; ++p)
            if (coefs[p] != 0) terms[next[ids[p]]++] = {coefs[p], x + i * d};
#pragma omp parallel for schedule(dynamic, 64) num_threads(threads)
    for (Id f = 0; f < num_rows; ++f)
        weighted_sum(W + f * d, d, terms.data() + starts[f], starts[f + 1] - starts[f]);
    return wrong;
} catch (const std::bad_alloc&) {
    return NO_MEMORY;
}

// One step of Adam on rows of w, m, v [rows, d] with the gradient scale * g. With `unit`, rows have
// length 1: the gradient along a row is left out, and the row is scaled back to length 1.
void adam_rows(float* w, const float* g, float* m, float* v, Id rows, Id d, int unit, float scale,
               float rate, float fresh1, float beta2, float fresh2, float eps, float correction2,
               int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (Id r = 0; r < rows; ++r) {
        float* __restrict wr = w + r * d;
        float* __restrict mr = m + r * d;
        float* __restrict vr = v + r * d;
        const float* __restrict gr = g + r * d;
        const float along = unit ? scale * dot(gr, wr, d) : 0;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (Id i = 0; i < d; ++i) {
            const float grad = scale * gr[i] - along * wr[i];
            mr[i] += (grad - mr[i]) * fresh1;
            vr[i] = beta2 * vr[i] + fresh2 * grad * grad;
            wr[i] -= rate * mr[i] / (std::sqrt(vr[i]) * correction2 + eps);
            squares += wr[i] * wr[i];
        }
        if (!unit) continue;
        const float shrink = 1 / std::max(std::sqrt(squares), 1e-12f);
#pragma omp simd
        for (Id i = 0; i < d; ++i) wr[i] *= shrink;
    }
}

// acts, ids [k] of one token x [d]; see `token.TokenPlan.encode`.
void encode_token(const Plan* plan, const float* x, void* acts, Id* ids, int threads) {
    if (plan->low)
        encode_one(*plan, x, static_cast<BFloat16*>(acts), ids, threads);
    else
        encode_one(*plan, x, static_cast<float*>(acts), ids, threads);
}

// y [d] = sum_j acts[j] * W_dec[ids[j]] + b_dec / scale, of one token. Returns as gather_sum.
Id decode_token(const Plan* plan, const void* acts, const Id* ids, Id slots, void* y) {
    if (plan->low)
        return decode_one(*plan, static_cast<const BFloat16*>(acts), ids, slots,
                          static_cast<BFloat16*>(y));
    return decode_one(*plan, static_cast<const float*>(acts), ids, slots, static_cast<float*>(y));
}

}  // extern "C"
