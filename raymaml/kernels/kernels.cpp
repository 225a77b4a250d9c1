// The kernels in one library: a plain C interface, of pointers to tensors of type REAL and images [B, H, W, C].
#include "first_layer.h"
#include "lines.h"
#include "norm_pool.h"
#include "winograd.h"

// The functions of the first layer, for images of one channel or three.
#define BY_CHANNELS(name, ...) channels == 3 ? name<3>(__VA_ARGS__) : name<1>(__VA_ARGS__)

KERNEL first_gram(const real* images, L channels, Shape s, double* gram) { BY_CHANNELS(gram_of, images, s, gram); }
KERNEL first_maxima(const real* images, L channels, Shape s, const real* w, const real* weight, real* maxima, uint8_t* at) {
    BY_CHANNELS(maxima_of, images, s, w, weight, maxima, at);
}
KERNEL first_maxima_and_sums(const real* images, L channels, Shape s, const real* w, const real* weight, real* maxima,
                             uint8_t* at, double* sums) {
    BY_CHANNELS(maxima_and_sums_of, images, s, w, weight, maxima, at, sums);
}
KERNEL first_maxima_along(const real* images, L channels, Shape s, const real* w_t, const uint8_t* at, real* maxima_t) {
    BY_CHANNELS(maxima_along_of, images, s, w_t, at, maxima_t);
}
KERNEL first_filter_sums(const real* images, L channels, Shape s, const real* g, const uint8_t* at, double* sums) {
    BY_CHANNELS(filter_sums_of, images, s, g, nullptr, nullptr, nullptr, nullptr, at, sums, nullptr);
}
KERNEL first_sums(const real* images, L channels, Shape s, const real* grad, const real* maxima, const double* scale,
                  const double* shift, const double* mean, const uint8_t* at, double* filter_sums, double* sums) {
    BY_CHANNELS(filter_sums_of, images, s, grad, maxima, scale, shift, mean, at, filter_sums, sums);
}
