// The first 3x3 convolution, norm and pool of images that do not move: numbers that depend on the images alone
// are computed once for a set of images.
//
// With patches p [K] of K = 9 cin values around each pixel, m = <p> and Cov = <p p^T> - m m^T, the convolution
// by w has the mean w m and the variance w Cov w^T; its values are needed at the maxima alone, and so are
// their tangents. Images are padded by a pixel: [B, H + 2, W + 2, cin], cin 1 or 3, with room for a vector behind
// them. Weights are [K, C], patches run over (dy, dx, channel), and C is a multiple of 16.
#pragma once
#include "norm_pool.h"
#include "products.h"

constexpr L PATCH = 32;  // room of a patch: 27 values or 9, and a one

// m [N, columns] = a^T u, with a of N columns [count, N], u [count, columns], all of leading dimension ld
template <int N>
INLINE void transposed_product(const real* a, const real* u, real* m, L ld, L columns, L count) {
    L k = 0;
    for (; k + 2 * LANES <= columns; k += 2 * LANES) block<N, 2>(a, 1, ld, u + k, ld, m + k, ld, count, false);
    for (; k < columns; k += LANES) block<N, 1>(a, 1, ld, u + k, ld, m + k, ld, count, false);
}
// gram [32, 32] = the sum of (p, 1)(p, 1)^T over all pixels. A patch is three rows of 3 cin values, u. Products of a
// row u of r with those of r, r + 1 and r + 2, added up over a line of the image, serve all patches that hold r.
template <int CIN>
static void gram_of(const real* images, Shape s, double* gram) {
    constexpr L ROW = 3 * CIN, K = 3 * ROW, COUNT = (K + 1 + LANES - 1) / LANES * LANES;
    const L W = s.W, line = (W + 2) * CIN;
    Room room(W * PATCH), products(ROW * PATCH);
    real *patches = room.data(), *sums = products.data();
    std::fill(patches, patches + W * PATCH, real(0));
    for (L x = 0; x < W; x++) patches[x * PATCH + K] = 1;
    memset(gram, 0, PATCH * PATCH * sizeof(double));
    for (L b = 0; b < s.B; b++)
        for (L r = 0; r < s.H + 2; r++) {
            const L rows = std::min<L>(3, s.H + 2 - r);
            for (L x = 0; x < W; x++)
                for (L dy = 0; dy < rows; dy++)
                    memcpy(patches + x * PATCH + dy * ROW, images + (b * (s.H + 2) + r + dy) * line + x * CIN,
                           ROW * sizeof(real));
            transposed_product<ROW>(patches, patches, sums, PATCH, COUNT, W);
            for (L dy = 0; dy < 3; dy++)
                if (r >= dy && r < dy + s.H)
                    for (L i = 0; i < ROW; i++) {
                        for (L j = 0; j < (3 - dy) * ROW; j++) gram[(dy * ROW + i) * PATCH + dy * ROW + j] += sums[i * PATCH + j];
                        gram[(dy * ROW + i) * PATCH + K] += sums[i * PATCH + K];
                    }
        }
    gram[K * PATCH + K] = s.B * s.H * W;
    for (L i = 0; i <= K; i++)
        for (L j = 0; j < i; j++) gram[i * PATCH + j] = gram[j * PATCH + i];
}
#if VECTOR_BYTES == 64
constexpr int WINDOWS = 3, COLUMNS = 2;
#else
constexpr int WINDOWS = 1, COLUMNS = 2;
#endif
// Convolves NP windows of 2x2 pixels by NR vectors of channels; done(i, v, values) gets the four values of each.
template <int CIN, int NP, int NR, class Done>
INLINE void windows_of(const real* p, L line, const real* w, L C, Done done) {
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
        for (int v = 0; v < NR; v++) done(i, v, x[i][v]);
}
// Does so for all windows, in NR vectors from channel c on: done(c, o, values), o the offset of the window in pooled
// images; end_row(c) after each row.
template <int CIN, int NR, class Done, class EndRow>
INLINE void all_windows(const real* images, Shape s, L c, const real* w, Done done, EndRow end_row) {
    const L h = s.H / 2, half = s.W / 2, line = (s.W + 2) * CIN;
    for (L row = 0; row < s.B * h; row++) {
        const real* p = images + (row / h * (s.H + 2) + row % h * 2) * line;
        L j = 0;
        auto give = [&](int i, int v, const V* x) { done(c + v * LANES, (row * half + j + i) * s.C + c + v * LANES, x); };
        for (; j + WINDOWS <= half; j += WINDOWS) windows_of<CIN, WINDOWS, NR>(p + 2 * j * CIN, line, w + c, s.C, give);
        for (; j < half; j++) windows_of<CIN, 1, NR>(p + 2 * j * CIN, line, w + c, s.C, give);
        for (int v = 0; v < NR; v++) end_row(c + v * LANES);
    }
}
template <int CIN, class Done, class EndRow>
INLINE void convolved(const real* images, Shape s, const real* w, Done done, EndRow end_row) {
    L c = 0;
    for (; c + COLUMNS * LANES <= s.C; c += COLUMNS * LANES) all_windows<CIN, COLUMNS>(images, s, c, w, done, end_row);
    for (; c < s.C; c += LANES) all_windows<CIN, 1>(images, s, c, w, done, end_row);
}
// w [K, C], turned round in the channels that the norm turns round
INLINE void turned(const real* w, const real* weight, L K, L C, real* to) {
    for (L k = 0; k < K; k++)
        for (L c = 0; c < C; c += LANES) store(to + k * C + c, load(w + k * C + c) * sign_of(weight + c));
}
template <int CIN>
static void maxima_of(const real* images, Shape s, const real* w, const real* weight, real* maxima, uint8_t* at) {
    Room room(9 * CIN * s.C);
    turned(w, weight, 9 * CIN, s.C, room.data());
    convolved<CIN>(
        images, s, room.data(),
        [&](L c, L o, const V* x) {
            const Largest found = largest(x);
            store(maxima + o, found.value * sign_of(weight + c));
            store_bytes(at + o, found.place);
        },
        [](L) {});
}
// As maxima_of, for images of even sides; sums [3, C] of x - x0, of its square, and x0, x of the first pixel, of the
// turned x.
template <int CIN>
static void maxima_and_sums_of(const real* images, Shape s, const real* w, const real* weight, real* maxima, uint8_t* at,
                               double* sums) {
    Room room((3 + 9 * CIN) * s.C);
    real *x0 = room.data(), *sum = x0 + s.C, *square = sum + s.C, *filters = square + s.C;
    turned(w, weight, 9 * CIN, s.C, filters);
    std::fill(x0, x0 + 3 * s.C, real(0));
    memset(sums, 0, 3 * s.C * sizeof(double));
    for (L c = 0; c < s.C; c += LANES) {
        windows_of<CIN, 1, 1>(images, (s.W + 2) * CIN, filters + c, s.C, [&](int, int, const V* x) { store(x0 + c, x[0]); });
        add_to(sums + 2 * s.C + c, load(x0 + c));
    }
    convolved<CIN>(
        images, s, filters,
        [&](L c, L o, const V* x) {
            const Largest found = largest(x);
            store(maxima + o, found.value * sign_of(weight + c));
            store_bytes(at + o, found.place);
            V d[4];
            UNROLL
            for (int k = 0; k < 4; k++) d[k] = x[k] - load(x0 + c);
            store(sum + c, load(sum + c) + ((d[0] + d[1]) + (d[2] + d[3])));
            store(square + c, load(square + c) + ((d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3])));
        },
        [&](L c) {
            add_to(sums + c, load(sum + c));
            add_to(sums + s.C + c, load(square + c));
            store(sum + c, V{});
            store(square + c, V{});
        });
}
// Whether a vector holds a row of the pixels around a window, and two can be shuffled, which takes half the time.
template <int CIN>
constexpr bool shuffles = CAN_SHUFFLE && LANES >= 4 * CIN;
// Calls window(tap, o, c) for each window and vector of channels, and end_row(c) after each row of windows: o is the
// offset of the window's maximum, and tap(dy, e) gives a value of the patches around the maxima.
template <int CIN, class Window, class EndRow>
INLINE void at_maxima(const real* images, Shape s, const uint8_t* at, Window window, EndRow end_row) {
    const L h = s.H / 2, half = s.W / 2, line = (s.W + 2) * CIN;
    for (L row = 0; row < s.B * h; row++)
        for (L c = 0; c < s.C; c += LANES) {
            const real* p = images + (row / h * (s.H + 2) + row % h * 2) * line;
            for (L j = 0; j < half; j++, p += 2 * CIN) {
                const L o = (row * half + j) * s.C + c;
                const Mask place = load_bytes(at + o), right = (place & 1) != 0, low = place > 1;
                V rows[4];
                if constexpr (shuffles<CIN>)
                    for (int y = 0; y < 4; y++) rows[y] = load(p + y * line);
                const auto tap = [&](int dy, int e) {
                    if constexpr (shuffles<CIN>) {
                        const Mask lane = (place >> 1) * (Mask{} + LANES) + (place & 1) * (Mask{} + CIN) + e;
                        return SHUFFLE(rows[dy], rows[dy + 1], lane);
                    }
                    const real* q = p + dy * line + e;
                    const V above = where(right, all(q[CIN]), all(q[0]));
                    return where(low, where(right, all(q[line + CIN]), all(q[line])), above);
                };
                window(tap, o, c);
            }
            end_row(c);
        }
}
// maxima' = w' p at the maxima
template <int CIN>
static void maxima_along_of(const real* images, Shape s, const real* w_t, const uint8_t* at, real* maxima_t) {
    at_maxima<CIN>(
        images, s, at,
        [&](auto tap, L o, L c) {
            V sum[3] = {};
            UNROLL
            for (int dy = 0; dy < 3; dy++)
                UNROLL
                for (int e = 0; e < 3 * CIN; e++) sum[dy] += tap(dy, e) * load(w_t + (dy * 3 * CIN + e) * s.C + c);
            store(maxima_t + o, sum[0] + sum[1] + sum[2]);
        },
        [](L) {});
}
// sums [K, C] of g p at the maxima. Without mean, g is grad; else g is grad where out > 0, and there are more sums:
// [2, C] of g and of g d, as relu_sums has them.
template <int CIN>
static void filter_sums_of(const real* images, Shape s, const real* grad, const real* maxima, const double* scale,
                           const double* shift, const double* mean, const uint8_t* at, double* sums, double* more) {
    constexpr int K = 9 * CIN;
    memset(sums, 0, K * s.C * sizeof(double));
    V sum[K] = {}, g_sum = {}, product = {};
    const auto add = [&](auto tap, V g) {
        UNROLL
        for (int k = 0; k < K; k++) sum[k] += tap(k / (3 * CIN), k % (3 * CIN)) * g;
    };
    const auto end_row = [&](L c) {
        UNROLL
        for (int k = 0; k < K; k++) {
            add_to(sums + k * s.C + c, sum[k]);
            sum[k] = V{};
        }
    };
    if (!mean) {
        at_maxima<CIN>(images, s, at, [&](auto tap, L o, L) { add(tap, load(grad + o)); }, end_row);
        return;
    }
    Line line(scale, shift, s.C);
    Channels mu(mean, s.C);
    memset(more, 0, 2 * s.C * sizeof(double));
    at_maxima<CIN>(
        images, s, at,
        [&](auto tap, L o, L c) {
            const V m = load(maxima + o), g = line.where_positive(load(grad + o), m, c);
            g_sum += g;
            product += g * (m - mu[c]);
            add(tap, g);
        },
        [&](L c) {
            add_to(more + c, g_sum);
            add_to(more + s.C + c, product);
            g_sum = product = V{};
            end_row(c);
        });
}
