// The numbers by channel of a batch norm, in double precision: those of blocks.py, with the same names. A prime is _t.
//
//     r = 1 / sqrt(var + eps)        s = scale r         line = s maxima + (shift - s mean)
//     g_mean = <g>                   product = <g d>     bend = s r^2 product
//     r' = -r^3 <x' d>               s' = scale' r + scale r'
//     product' = <g' d> + <g x'> - <g> <x'>              bend' = r^2 (s' product + s product') + 2 s r r' product
//
// and the constants of the gradient in x and of its tangent, which are numbers by channel as well.
#pragma once
#include "vectors.h"

// rows [3, C]: r, s and shift - s mean
KERNEL norm_line(const double* mean, const double* var, const real* scale, const real* shift, double eps, L C,
                 double* rows) {
    double *r = rows, *s = rows + C, *line = rows + 2 * C;
    for (L c = 0; c < C; c++) {
        r[c] = 1 / std::sqrt(var[c] + eps);
        s[c] = scale[c] * r[c];
        line[c] = shift[c] - s[c] * mean[c];
    }
}
// rows [4, C]: g_mean, product, bend and the constant, from the sums of g and g d over n pixels; scale_grad, shift_grad
KERNEL norm_line_back(const double* sums, double n, const double* mean, const double* r, const double* s, L C,
                      double* rows, real* scale_grad, real* shift_grad) {
    double *g_mean = rows, *product = rows + C, *bend = rows + 2 * C, *constant = rows + 3 * C;
    for (L c = 0; c < C; c++) {
        g_mean[c] = sums[c] / n;
        product[c] = sums[C + c] / n;
        bend[c] = s[c] * r[c] * r[c] * product[c];
        constant[c] = bend[c] * mean[c] - s[c] * g_mean[c];
        scale_grad[c] = r[c] * sums[C + c];
        shift_grad[c] = sums[c];
    }
}
// rows [3, C]: r', s' and (shift - s mean)', from <x'> and <x' d>
KERNEL norm_line_along(const double* x_mean, const double* x_product, const double* mean, const double* r,
                       const double* s, const real* scale, const real* scale_t, const real* shift_t, L C, double* rows) {
    double *r_t = rows, *s_t = rows + C, *line_t = rows + 2 * C;
    for (L c = 0; c < C; c++) {
        r_t[c] = -r[c] * r[c] * r[c] * x_product[c];
        s_t[c] = scale_t[c] * r[c] + scale[c] * r_t[c];
        line_t[c] = shift_t[c] - s[c] * x_mean[c] - s_t[c] * mean[c];
    }
}
// rows [3, C]: g_mean', bend' and constant', from the sums of g', g' d and g x' over n pixels, the rows of the norm and
// its tangent; scale_grad', shift_grad'
KERNEL norm_line_back_along(const double* sums, double n, const double* mean, const double* x_mean, const double* line,
                            const double* back, const double* line_t, L C, double* rows, real* scale_grad_t,
                            real* shift_grad_t) {
    const double *r = line, *s = line + C, *r_t = line_t, *s_t = line_t + C;
    const double *g_mean = back, *product = back + C, *bend = back + 2 * C;
    double *g_mean_t = rows, *bend_t = rows + C, *constant_t = rows + 2 * C;
    for (L c = 0; c < C; c++) {
        g_mean_t[c] = sums[c] / n;
        const double product_t = (sums[C + c] + sums[2 * C + c]) / n - g_mean[c] * x_mean[c];
        bend_t[c] = r[c] * r[c] * (s_t[c] * product[c] + s[c] * product_t) + 2 * s[c] * r[c] * r_t[c] * product[c];
        constant_t[c] = bend[c] * x_mean[c] + bend_t[c] * mean[c] - s_t[c] * g_mean[c] - s[c] * g_mean_t[c];
        scale_grad_t[c] = n * (product_t * r[c] + product[c] * r_t[c]);
        shift_grad_t[c] = sums[c];
    }
}
