// Batch norm, 2x2 max-pool and ReLU of images [B, H, W, C], with their derivatives.
//
// With mean and r = 1 / sqrt(var + eps) of a channel, d = x - mean and s = scale r,
//
//     out = relu(s d + shift) at the maxima of s x over each 2x2 window,
//     at  = x there ("maxima"), and where = 0..3, the place of the maximum in its window.
//
// g is the derivative in out where out > 0, else 0: it is zero off the maxima. <a> is the sum of a over a
// channel's pixels by their number. See models/closed_rules/batch_norm.py for the formulas; here are their
// passes over the images; each reads its input once. C is a multiple of 16.
#pragma once
#include "lines.h"

struct Shape {
    L B, H, W, C;
};
INLINE L pixels(Shape s) { return s.B * s.H * s.W; }

// Calls row(first, pooled, two, c) for each pair of image rows and block of channels: offsets of their first
// pixel and of its window's maximum; two is false for a last row that stands alone.
template <class Row>
INLINE void each_row_pair(Shape s, Row row) {
    const L h = s.H / 2, w = s.W / 2;
    for (L b = 0; b < s.B; b++)
        for (L i = 0; i < (s.H + 1) / 2; i++)
            for (L c = 0; c < s.C; c += LANES)
                row((b * s.H + 2 * i) * s.W * s.C + c, (b * h + i) * w * s.C + c, 2 * i + 1 < s.H, c);
}
// Calls pixel(offset) for the pixels of a pair of rows that are in no window: a last column, a last row.
template <class Pixel>
INLINE void each_outside(Shape s, L first, bool two, Pixel pixel) {
    for (L j = two ? s.W / 2 * 2 : 0; j < s.W; j++)
        for (L i = 0; i <= (L)two; i++) pixel(first + (i * s.W + j) * s.C);
}
// The offset of place 0..3 of the j-th window.
INLINE L place(Shape s, L j, L k) { return ((k >> 1) * s.W + 2 * j + (k & 1)) * s.C; }

// The place of the largest of four values, the first of equal ones, and that value.
struct Largest {
    V value;
    Mask place;
};
INLINE Largest largest(const V v[4]) {
    V best = v[0];
    Mask at = {};
    UNROLL
    for (int k = 1; k < 4; k++) {
        const Mask more = v[k] > best;
        best = where(more, v[k], best);
        at = more ? Mask{} + k : at;
    }
    return {best, at};
}
// -1 for channels that the norm turns round.
INLINE V sign_of(const real* scale) { return where(load(scale) < V{}, all(-1), all(1)); }

// The line s maxima + (shift - s mean), whose sign tells where out > 0 without a look at it.
struct Line {
    Channels scale, shift;
    Line(Rows n, L C) : scale(n.s, C), shift(n.line, C) {}
    V at(V maxima, L c) { return maxima * scale[c] + shift[c]; }
    V where_positive(V v, V maxima, L c) { return where(at(maxima, c) > V{}, v, V{}); }
};
// out = relu(s d + shift) for P pooled pixels; sets r, s and line
KERNEL norm_relu(const real* maxima, L P, L C, const real* scale, const real* shift, double eps, double* rows, real* out) {
    const Rows n(rows, C);
    norm_line(n, scale, shift, eps, C);
    Line line(n, C);
    for (L p = 0; p < P; p++)
        for (L c = 0; c < C; c += LANES) {
            const V v = line.at(load(maxima + p * C + c), c);
            store(out + p * C + c, where(v < V{}, V{}, v));  // keeps not-a-number
        }
}
// out' = s maxima' + s' maxima + line', where out > 0; sets r', s' and line'
KERNEL norm_relu_along(const real* maxima, const real* maxima_t, L P, L C, const real* scale, const real* scale_t,
                       const real* shift_t, double* rows, double* rows_t, real* out_t) {
    const Rows n(rows, C), t(rows_t, C);
    norm_line_along(n, t, scale, scale_t, shift_t, C);
    Line line(n, C), line_t(t, C);
    for (L p = 0; p < P; p++)
        for (L c = 0; c < C; c += LANES) {
            const L o = p * C + c;
            const V m = load(maxima + o), v = load(maxima_t + o) * line.scale[c] + line_t.at(m, c);
            store(out_t + o, line.where_positive(v, m, c));
        }
}
// Turns grad into zero but where out > 0; sets g_mean and product to its sums, and those of grad d, plus, of a tangent,
// g maxima'.
template <bool ALONG>
INLINE void masked_sums(real* grad, const real* g, const real* maxima, const real* maxima_t, L P, L C, Rows n, Rows sums) {
    Line line(n, C);
    Channels mean(n.mean, C);
    memset(sums.g_mean, 0, 2 * C * sizeof(double));
    for (L p0 = 0; p0 < P; p0 += 64)
        for (L c = 0; c < C; c += LANES) {
            V sum = {}, product[2] = {};
            for (L p = p0; p < std::min(P, p0 + 64); p++) {
                const L o = p * C + c;
                const V m = load(maxima + o), v = line.where_positive(load(grad + o), m, c);
                store(grad + o, v);
                sum += v;
                product[0] += v * (m - mean[c]);
                if constexpr (ALONG) product[1] += load(g + o) * load(maxima_t + o);
            }
            add_to(sums.g_mean + c, sum);
            add_to(sums.product + c, product[0] + product[1]);
        }
}
// Turns grad into g, for P pooled pixels; sets g_mean, product, bend and constant; grads [3, C] as of norm_line_back, by
// count pixels.
KERNEL norm_relu_back(real* grad, const real* maxima, L P, L C, L count, L given, double* rows, real* grads) {
    const Rows n(rows, C);
    masked_sums<false>(grad, nullptr, maxima, nullptr, P, C, n, n);
    norm_line_back(n, count, given, C, grads);
}
// Turns grad' into g'; sets the numbers of the tangent; grads_t [3, C].
KERNEL norm_relu_back_along(real* grad_t, const real* g, const real* maxima, const real* maxima_t, L P, L C, L count,
                            double* rows, double* rows_t, real* grads_t) {
    const Rows n(rows, C), t(rows_t, C);
    masked_sums<true>(grad_t, g, maxima, maxima_t, P, C, n, t);
    norm_line_back_along(n, t, count, C, grads_t);
}
// x_grad = constant - bend x everywhere, + s g at the maxima; it may be x
KERNEL norm_pool_grad(const real* x, Shape s, const real* g, const uint8_t* at, double* rows, real* x_grad) {
    const Rows n(rows, s.C);
    Channels as(n.constant, s.C), bs(n.bend, s.C), scales(n.s, s.C);
    each_row_pair(s, [&](L first, L pooled, bool two, L c) {
        const V a = as[c], b = bs[c], sc = scales[c];
        if (two)
            for (L j = 0; j < s.W / 2; j++, pooled += s.C) {
                const V peak = load(g + pooled) * sc;
                const Mask at_place = load_bytes(at + pooled);
                UNROLL
                for (int k = 0; k < 4; k++) {
                    const L o = first + place(s, j, k);
                    store(x_grad + o, a - load(x + o) * b + where(at_place == k, peak, V{}));
                }
            }
        each_outside(s, first, two, [&](L o) { store(x_grad + o, a - load(x + o) * b); });
    });
}
// maxima' = x' at the maxima; sets <x'> and <x' d>
KERNEL maxima_along(const real* x, const real* x_t, Shape s, const uint8_t* at, double* rows, real* maxima_t,
                    double* rows_t) {
    const Rows t(rows_t, s.C);
    Channels means(Rows(rows, s.C).mean, s.C);
    memset(rows_t, 0, 2 * s.C * sizeof(double));
    each_row_pair(s, [&](L first, L pooled, bool two, L c) {
        const V mean = means[c];
        V total = {}, product = {};
        const auto add = [&](L o) {
            const V v = load(x_t + o);
            total += v;
            product += v * (load(x + o) - mean);
            return v;
        };
        if (two)
            for (L j = 0; j < s.W / 2; j++, pooled += s.C) {
                const Mask at_place = load_bytes(at + pooled);
                V found = {};
                UNROLL
                for (int k = 0; k < 4; k++) {
                    const V v = add(first + place(s, j, k));
                    found = where(at_place == k, v, found);
                }
                store(maxima_t + pooled, found);
            }
        each_outside(s, first, two, add);
        add_to(t.mean + c, total);
        add_to(t.var + c, product);
    });
    for (L e = 0; e < 2 * s.C; e++) rows_t[e] /= pixels(s);
}
// x_t becomes x_grad' = constant' - bend' x - bend x' everywhere, + s g' + s' g at the maxima.
KERNEL norm_pool_grad_along(const real* x, real* x_t, Shape s, const real* g, const real* g_t, const uint8_t* at,
                            double* rows, double* rows_t) {
    const Rows n(rows, s.C), t(rows_t, s.C);
    Channels as(t.constant, s.C), bs(n.bend, s.C), bts(t.bend, s.C), scales(n.s, s.C), scales_t(t.s, s.C);
    each_row_pair(s, [&](L first, L pooled, bool two, L c) {
        const V a = as[c], b = bs[c], bt = bts[c], sc = scales[c], sct = scales_t[c];
        const auto flat = [&](L o) { return a - load(x + o) * bt - load(x_t + o) * b; };
        if (two)
            for (L j = 0; j < s.W / 2; j++, pooled += s.C) {
                const V peak = load(g_t + pooled) * sc + load(g + pooled) * sct;
                const Mask at_place = load_bytes(at + pooled);
                UNROLL
                for (int k = 0; k < 4; k++) {
                    const L o = first + place(s, j, k);
                    store(x_t + o, flat(o) + where(at_place == k, peak, V{}));
                }
            }
        each_outside(s, first, two, [&](L o) { store(x_t + o, flat(o)); });
    });
}
