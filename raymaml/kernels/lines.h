// The numbers by channel of a batch norm, in double precision: those of blocks.py, with the same names. A prime is _t.
//
//     r = 1 / sqrt(var + eps)        s = scale r         line = shift - s mean, as out = relu(s maxima + line)
//     g_mean = <g>                   product = <g d>     bend = s r^2 product
//     r' = -r^3 <x' d>               s' = scale' r + scale r'
//     product' = <g' d> + <g x'> - <g> <x'>              bend' = r^2 (s' product + s product') + 2 s r r' product
//
// and the constants of the gradient in x and of its tangent, which are numbers by channel as well.
#pragma once
#include "vectors.h"

// [9, C]. Of a tangent, mean is <x'> and var <x' d>.
struct Rows {
    double *mean, *var, *r, *s, *line, *g_mean, *product, *bend, *constant;
    Rows(double* rows, L C)
        : mean(rows),
          var(rows + C),
          r(rows + 2 * C),
          s(rows + 3 * C),
          line(rows + 4 * C),
          g_mean(rows + 5 * C),
          product(rows + 6 * C),
          bend(rows + 7 * C),
          constant(rows + 8 * C) {}
};
// Sets mean and var from the sums of x - x0 and of its square over n pixels.
INLINE void end_moments(Rows n, L count, L c, double x0) {
    n.mean[c] /= count;
    const double var = n.var[c] / count - n.mean[c] * n.mean[c];
    n.var[c] = var < 0 ? 0 : var;  // keeps not-a-number
    n.mean[c] += x0;
}
// Sets r, s and line.
INLINE void norm_line(Rows n, const real* scale, const real* shift, double eps, L C) {
    for (L c = 0; c < C; c++) {
        n.r[c] = 1 / std::sqrt(n.var[c] + eps);
        n.s[c] = scale[c] * n.r[c];
        n.line[c] = shift[c] - n.s[c] * n.mean[c];
    }
}
INLINE void norm_line_along(Rows n, Rows t, const real* scale, const real* scale_t, const real* shift_t, L C) {
    for (L c = 0; c < C; c++) {
        t.r[c] = -n.r[c] * n.r[c] * n.r[c] * t.var[c];
        t.s[c] = scale_t[c] * n.r[c] + scale[c] * t.r[c];
        t.line[c] = shift_t[c] - n.s[c] * t.mean[c] - t.s[c] * n.mean[c];
    }
}
// Sets g_mean, product, bend and constant, where g_mean and product are sums of g and g d over pixels, and grads
// [3, C], those in the convolution's bias, in scale and in shift. Given moments do not move, as those of endlessly
// many pixels; without them the bias moves the mean alone.
INLINE void norm_line_back(Rows n, L count, bool given, L C, real* grads) {
    for (L c = 0; c < C; c++) {
        grads[c] = given ? n.s[c] * n.g_mean[c] : 0;
        grads[C + c] = n.r[c] * n.product[c];
        grads[2 * C + c] = n.g_mean[c];
        n.g_mean[c] = given ? 0 : n.g_mean[c] / count;
        n.product[c] = given ? 0 : n.product[c] / count;
        n.bend[c] = n.s[c] * n.r[c] * n.r[c] * n.product[c];
        n.constant[c] = n.bend[c] * n.mean[c] - n.s[c] * n.g_mean[c];
    }
}
// As norm_line_back, where t.g_mean and t.product are sums of g' and of g' d + g x'; the norm goes by the batch.
INLINE void norm_line_back_along(Rows n, Rows t, L count, L C, real* grads_t) {
    for (L c = 0; c < C; c++) {
        const double r = n.r[c], s = n.s[c], r_t = t.r[c], s_t = t.s[c], product = n.product[c];
        t.g_mean[c] /= count;
        const double product_t = t.product[c] = t.product[c] / count - n.g_mean[c] * t.mean[c];
        t.bend[c] = r * r * (s_t * product + s * product_t) + 2 * s * r * r_t * product;
        t.constant[c] = n.bend[c] * t.mean[c] + t.bend[c] * n.mean[c] - s_t * n.g_mean[c] - s * t.g_mean[c];
        grads_t[c] = 0;
        grads_t[C + c] = count * (product_t * r + product * r_t);
        grads_t[2 * C + c] = count * t.g_mean[c];
    }
}
