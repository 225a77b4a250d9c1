// The kernels in one library: a plain C interface, of pointers to tensors of type REAL and images [B, H, W, C].
#include "first_layer.h"
#include "lines.h"
#include "norm_pool.h"
#include "winograd.h"

// The functions of the first layer, for images of one channel or three.
#define BY_CHANNELS(name, ...) channels == 3 ? name<3>(__VA_ARGS__) : name<1>(__VA_ARGS__)

KERNEL first_patches(const real* images, L channels, Shape s, double* patches) {
    BY_CHANNELS(patches_of, images, s, patches);
}
KERNEL first_moments(const real* w, L channels, L C, const double* patches, double* rows, double* spread) {
    BY_CHANNELS(first_moments_of, w, C, patches, rows, spread);
}
KERNEL first_moments_along(const real* w_t, L channels, L C, const double* patches, const double* spread, double* rows_t,
                           double* spread_t) {
    BY_CHANNELS(first_moments_along_of, w_t, C, patches, spread, rows_t, spread_t);
}
KERNEL first_maxima(const real* images, L channels, Shape s, const real* w, const real* scale, real* maxima, uint8_t* at) {
    BY_CHANNELS(maxima_of, images, s, w, scale, maxima, at);
}
KERNEL first_maxima_and_moments(const real* images, L channels, Shape s, const real* w, const real* scale, real* maxima,
                                uint8_t* at, double* rows) {
    BY_CHANNELS(maxima_and_moments_of, images, s, w, scale, maxima, at, rows);
}
KERNEL first_maxima_along(const real* images, L channels, Shape s, const real* w_t, const uint8_t* at, real* maxima_t) {
    BY_CHANNELS(maxima_along_of, images, s, w_t, at, maxima_t);
}
KERNEL first_back(const real* images, L channels, Shape s, real* grad, const real* maxima, const uint8_t* at, L given,
                  const double* patches, const double* spread, double* rows, double* sums, real* grads, real* dw) {
    BY_CHANNELS(back_of, images, s, grad, maxima, at, given, patches, spread, rows, sums, grads, dw);
}
KERNEL first_back_along(const real* images, L channels, Shape s, real* grad_t, const real* g, const real* maxima,
                        const real* maxima_t, const uint8_t* at, const double* patches, const double* spread,
                        const double* spread_t, const double* sums, double* rows, double* rows_t, real* grads_t,
                        real* dw_t) {
    BY_CHANNELS(back_along_of, images, s, grad_t, g, maxima, maxima_t, at, patches, spread, spread_t, sums, rows, rows_t,
                grads_t, dw_t);
}
