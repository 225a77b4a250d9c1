// The first 3x3 convolution, norm and pool of images that do not move: numbers that depend on the images alone
// are computed once for a set of images.
//
// With patches p [K] of K = 9 cin values around each pixel, m = <p> and Cov = <p p^T> - m m^T, the convolution
// by w has the mean w m and the variance w Cov w^T; its values are needed at the maxima alone, and so are
// their tangents. Images are padded by a pixel: [B, H + 2, W + 2, cin], cin 1 or 3. Weights are [K, C], patches
// run over (dy, dx, channel), and C is a multiple of 16.
#pragma once
#include "norm_pool.h"
#include "products.h"

constexpr L PATCH = 32;  // room of a patch: 27 values or 9, and a one

// gram [32, 32] = the sum of (p, 1)(p, 1)^T over all pixels
template <int CIN>
static void gram_of(const real* images, Shape s, double* gram) {
    constexpr L K = 9 * CIN;
    const L W = s.W, line = (W + 2) * CIN;
    std::vector<real> patches(W * PATCH), sums(PATCH * PATCH);
    for (L x = 0; x < W; x++) patches[x * PATCH + K] = 1;
    memset(gram, 0, PATCH * PATCH * sizeof(double));
    for (L b = 0; b < s.B; b++)
        for (L y = 0; y < s.H; y++) {
            for (L x = 0; x < W; x++)
                for (L dy = 0; dy < 3; dy++)
                    memcpy(&patches[x * PATCH + dy * 3 * CIN], images + (b * (s.H + 2) + y + dy) * line + x * CIN,
                           3 * CIN * sizeof(real));
            product(patches.data(), 1, PATCH, patches.data(), PATCH, sums.data(), PATCH, K + 1, (K + 16) / 16 * 16, W,
                    false);
            for (L e = 0; e < PATCH * PATCH; e++) gram[e] += sums[e];
        }
}
#if VECTOR_BYTES == 64
constexpr int WINDOWS = 3, COLUMNS = 2;
#else
constexpr int WINDOWS = 1, COLUMNS = 2;
#endif
// Convolves NP windows by NR vectors of channels, and keeps the maxima.
template <int CIN, int NP, int NR>
INLINE void windows_of(const real* p, L line, const real* w, L C, const V* sign, real* maxima, uint8_t* at) {
    V x[NP][NR][4] = {};
    for (int dy = 0; dy < 3; dy++)
        for (int e = 0; e < 3 * CIN; e++) {
            V right[NR];
            UNROLL
            for (int v = 0; v < NR; v++) right[v] = load(w + (dy * 3 * CIN + e) * C + v * LANES);
            UNROLL
            for (int i = 0; i < NP; i++)
                UNROLL
                for (int k = 0; k < 4; k++) {
                    const V left = all(p[(dy + k / 2) * line + (2 * i + k % 2) * CIN + e]);
                    UNROLL
                    for (int v = 0; v < NR; v++) x[i][v][k] += left * right[v];
                }
        }
    UNROLL
    for (int i = 0; i < NP; i++)
        UNROLL
        for (int v = 0; v < NR; v++) {
            const Largest found = largest(x[i][v], sign[v]);
            store(maxima + i * C + v * LANES, found.value);
            store_bytes(at + i * C + v * LANES, found.place);
        }
}
template <int CIN, int NR>
INLINE void windows_maxima(const real* images, Shape s, L c, const real* w, const real* weight, real* maxima,
                           uint8_t* at) {
    const L h = s.H / 2, half = s.W / 2, line = (s.W + 2) * CIN;
    V sign[NR];
    for (int v = 0; v < NR; v++) sign[v] = sign_of(weight + c + v * LANES);
    for (L b = 0; b < s.B; b++)
        for (L i = 0; i < h; i++) {
            const real* p = images + (b * (s.H + 2) + 2 * i) * line;
            const L o = (b * h + i) * half * s.C + c;
            L j = 0;
            for (; j + WINDOWS <= half; j += WINDOWS)
                windows_of<CIN, WINDOWS, NR>(p + 2 * j * CIN, line, w + c, s.C, sign, maxima + o + j * s.C, at + o + j * s.C);
            for (; j < half; j++)
                windows_of<CIN, 1, NR>(p + 2 * j * CIN, line, w + c, s.C, sign, maxima + o + j * s.C, at + o + j * s.C);
        }
}
template <int CIN>
static void maxima_of(const real* images, Shape s, const real* w, const real* weight, real* maxima, uint8_t* at) {
    L c = 0;
    for (; c + COLUMNS * LANES <= s.C; c += COLUMNS * LANES)
        windows_maxima<CIN, COLUMNS>(images, s, c, w, weight, maxima, at);
    for (; c < s.C; c += LANES) windows_maxima<CIN, 1>(images, s, c, w, weight, maxima, at);
}
// Calls begin(c), window(c, o, tap) for each window of a row, and end(c), for each row of windows and block of
// channels c; o is the offset of the window's maximum, and tap(dy, e) gives a value of the patches around the maxima.
template <int CIN, class Begin, class Window, class End>
INLINE void each_first_row(const real* images, Shape s, const uint8_t* at, Begin begin, Window window, End end) {
    const L h = s.H / 2, half = s.W / 2, line = (s.W + 2) * CIN;
    for (L b = 0; b < s.B; b++)
        for (L i = 0; i < h; i++)
            for (L c = 0; c < s.C; c += LANES) {
                begin(c);
                for (L j = 0; j < half; j++) {
                    const real* p = images + (b * (s.H + 2) + 2 * i) * line + 2 * j * CIN;
                    const L o = ((b * h + i) * half + j) * s.C + c;
                    const Mask place = load_bytes(at + o), right = (place & 1) != 0, low = place > 1;
                    window(c, o, [&](int dy, int e) {
                        const real* q = p + dy * line + e;
                        const V above = where(right, all(q[CIN]), all(q[0]));
                        return where(low, where(right, all(q[line + CIN]), all(q[line])), above);
                    });
                }
                end(c);
            }
}
// maxima' = w' p at the maxima
template <int CIN>
static void maxima_along_of(const real* images, Shape s, const real* w_t, const uint8_t* at, real* maxima_t) {
    each_first_row<CIN>(
        images, s, at, [](L) {},
        [&](L c, L o, auto tap) {
            V sum[3] = {};
            UNROLL
            for (int e = 0; e < 3 * CIN; e++)
                UNROLL
                for (int dy = 0; dy < 3; dy++) sum[dy] += tap(dy, e) * load(w_t + (dy * 3 * CIN + e) * s.C + c);
            store(maxima_t + o, sum[0] + sum[1] + sum[2]);
        },
        [](L) {});
}
// sums [K, C] of g p at the maxima
template <int CIN>
static void filter_sums_of(const real* images, Shape s, const real* g, const uint8_t* at, double* sums) {
    constexpr int K = 9 * CIN;
    memset(sums, 0, K * s.C * sizeof(double));
    V sum[K];
    each_first_row<CIN>(
        images, s, at,
        [&](L) {
            UNROLL
            for (int k = 0; k < K; k++) sum[k] = V{};
        },
        [&](L, L o, auto tap) {
            const V grad = load(g + o);
            UNROLL
            for (int dy = 0; dy < 3; dy++)
                UNROLL
                for (int e = 0; e < 3 * CIN; e++) sum[dy * 3 * CIN + e] += tap(dy, e) * grad;
        },
        [&](L c) {
            UNROLL
            for (int k = 0; k < K; k++) add_to(sums + k * s.C + c, sum[k]);
        });
}
