// The first 3x3 convolution, norm and pool of images that do not move: numbers that depend on the images alone
// are computed once for a set of images.
//
// With patches p [K] of K = 9 cin values around each pixel, m = <p> and Cov = <p p^T> - m m^T, the convolution
// by T [C, K] has the mean T m and the variance diag(T Cov T^T); its values are needed at the maxima alone, and so
// are their tangents. Images are padded by a pixel: [B, H + 2, W + 2, cin], cin 1 or 3, with room for a vector
// behind them. Patches run over (dy, dx, channel), weights are w [C, cin, 3, 3], and C is a multiple of 16.
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
// The weights by taps, T^T [K, C].
template <int CIN, class Number>
static void by_tap(const real* w, L C, Number* taps) {
    for (L c = 0; c < C; c++)
        for (L tap = 0; tap < 9; tap++)
            for (L i = 0; i < CIN; i++) taps[(tap * CIN + i) * C + c] = w[(c * CIN + i) * 9 + tap];
}
// patches [K + 1, K]: Cov, and m below it. A patch is three rows of 3 cin values, u. Products of a row u of r with
// those of r, r + 1 and r + 2, added up over a line of the image, serve all patches that hold r.
template <int CIN>
static void patches_of(const real* images, Shape s, double* patches) {
    constexpr L ROW = 3 * CIN, K = 3 * ROW, COUNT = (K + 1 + LANES - 1) / LANES * LANES;
    const L W = s.W, line = (W + 2) * CIN;
    Room room(W * PATCH), products(ROW * PATCH);
    real *lines = room.data(), *sums = products.data();
    double gram[K][K + 1] = {};  // sums of p (p, 1)^T
    std::fill(lines, lines + W * PATCH, real(0));
    for (L x = 0; x < W; x++) lines[x * PATCH + K] = 1;
    for (L b = 0; b < s.B; b++)
        for (L r = 0; r < s.H + 2; r++) {
            const L rows = std::min<L>(3, s.H + 2 - r);
            for (L x = 0; x < W; x++)
                for (L dy = 0; dy < rows; dy++)
                    memcpy(lines + x * PATCH + dy * ROW, images + (b * (s.H + 2) + r + dy) * line + x * CIN,
                           ROW * sizeof(real));
            transposed_product<ROW>(lines, lines, sums, PATCH, COUNT, W);
            for (L dy = 0; dy < 3; dy++)
                if (r >= dy && r < dy + s.H)
                    for (L i = 0; i < ROW; i++) {
                        for (L j = 0; j < (3 - dy) * ROW; j++) gram[dy * ROW + i][dy * ROW + j] += sums[i * PATCH + j];
                        gram[dy * ROW + i][K] += sums[i * PATCH + K];
                    }
        }
    const double n = pixels(s);
    for (L i = 0; i < K; i++) {
        patches[K * K + i] = gram[i][K] / n;
        for (L j = 0; j <= i; j++)
            patches[i * K + j] = patches[j * K + i] = gram[j][i] / n - gram[i][K] / n * (gram[j][K] / n);
    }
}
// T^T and spread = Cov T^T, both [K, C].
template <int CIN>
static void spread_of(const real* w, L C, const double* patches, double* taps, double* spread) {
    constexpr L K = 9 * CIN;
    by_tap<CIN>(w, C, taps);
    memset(spread, 0, K * C * sizeof(double));
    for (L k = 0; k < K; k++)
        for (L j = 0; j < K; j++)
            for (L c = 0; c < C; c++) spread[k * C + c] += patches[k * K + j] * taps[j * C + c];
}
// mean, and the products of T with spread, which are the variance, or of a tangent <x' d>.
template <int CIN>
static void moments_of(const double* taps, L C, const double* patches, const double* spread, double* mean, double* product) {
    constexpr L K = 9 * CIN;
    std::fill(mean, mean + C, 0.);
    std::fill(product, product + C, 0.);
    for (L k = 0; k < K; k++)
        for (L c = 0; c < C; c++) {
            mean[c] += patches[K * K + k] * taps[k * C + c];
            product[c] += spread[k * C + c] * taps[k * C + c];
        }
}
// Sets mean and var of the convolution; spread.
template <int CIN>
static void first_moments_of(const real* w, L C, const double* patches, double* rows, double* spread) {
    std::unique_ptr<double[]> taps(new double[9 * CIN * C]);
    const Rows n(rows, C);
    spread_of<CIN>(w, C, patches, taps.get(), spread);
    moments_of<CIN>(taps.get(), C, patches, spread, n.mean, n.var);
    for (L c = 0; c < C; c++) n.var[c] = n.var[c] < 0 ? 0 : n.var[c];
}
// Sets <x'> and <x' d>; spread'.
template <int CIN>
static void first_moments_along_of(const real* w_t, L C, const double* patches, const double* spread, double* rows_t,
                                   double* spread_t) {
    std::unique_ptr<double[]> taps(new double[9 * CIN * C]);
    const Rows t(rows_t, C);
    spread_of<CIN>(w_t, C, patches, taps.get(), spread_t);
    moments_of<CIN>(taps.get(), C, patches, spread, t.mean, t.var);
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
// T^T [K, C], turned round in the channels that the norm turns round.
template <int CIN>
static void turned(const real* w, const real* scale, L C, real* taps) {
    by_tap<CIN>(w, C, taps);
    for (L k = 0; k < 9 * CIN; k++)
        for (L c = 0; c < C; c += LANES) store(taps + k * C + c, load(taps + k * C + c) * sign_of(scale + c));
}
template <int CIN>
static void maxima_of(const real* images, Shape s, const real* w, const real* scale, real* maxima, uint8_t* at) {
    Room room(9 * CIN * s.C);
    turned<CIN>(w, scale, s.C, room.data());
    convolved<CIN>(
        images, s, room.data(),
        [&](L c, L o, const V* x) {
            const Largest found = largest(x);
            store(maxima + o, found.value * sign_of(scale + c));
            store_bytes(at + o, found.place);
        },
        [](L) {});
}
// As maxima_of, for images of even sides; sets mean and var. Sums are of x - x0, with x0 that of the first pixel.
template <int CIN>
static void maxima_and_moments_of(const real* images, Shape s, const real* w, const real* scale, real* maxima, uint8_t* at,
                                  double* rows) {
    const Rows n(rows, s.C);
    Room room((3 + 9 * CIN) * s.C);
    real *x0 = room.data(), *sum = x0 + s.C, *square = sum + s.C, *filters = square + s.C;
    turned<CIN>(w, scale, s.C, filters);
    std::fill(sum, sum + 2 * s.C, real(0));
    memset(rows, 0, 2 * s.C * sizeof(double));
    for (L c = 0; c < s.C; c += LANES)
        windows_of<CIN, 1, 1>(images, (s.W + 2) * CIN, filters + c, s.C, [&](int, int, const V* x) { store(x0 + c, x[0]); });
    convolved<CIN>(
        images, s, filters,
        [&](L c, L o, const V* x) {
            const Largest found = largest(x);
            store(maxima + o, found.value * sign_of(scale + c));
            store_bytes(at + o, found.place);
            V d[4];
            UNROLL
            for (int k = 0; k < 4; k++) d[k] = x[k] - load(x0 + c);
            store(sum + c, load(sum + c) + ((d[0] + d[1]) + (d[2] + d[3])));
            store(square + c, load(square + c) + ((d[0] * d[0] + d[1] * d[1]) + (d[2] * d[2] + d[3] * d[3])));
        },
        [&](L c) {
            add_to(n.mean + c, load(sum + c));
            add_to(n.var + c, load(square + c));
            store(sum + c, V{});
            store(square + c, V{});
        });
    for (L c = 0; c < s.C; c++) {
        end_moments(n, pixels(s), c, x0[c]);
        if (scale[c] < 0) n.mean[c] = -n.mean[c];
    }
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
// maxima' = T' p at the maxima
template <int CIN>
static void maxima_along_of(const real* images, Shape s, const real* w_t, const uint8_t* at, real* maxima_t) {
    Room room(9 * CIN * s.C);
    real* taps = room.data();
    by_tap<CIN>(w_t, s.C, taps);
    at_maxima<CIN>(
        images, s, at,
        [&](auto tap, L o, L c) {
            V sum[3] = {};
            UNROLL
            for (int dy = 0; dy < 3; dy++)
                UNROLL
                for (int e = 0; e < 3 * CIN; e++) sum[dy] += tap(dy, e) * load(taps + (dy * 3 * CIN + e) * s.C + c);
            store(maxima_t + o, sum[0] + sum[1] + sum[2]);
        },
        [](L) {});
}
// sums [K, C] of g p at the maxima; also(v, o, c) turns a vector of grad into g, and end_also(c) ends a row of windows.
template <int CIN, class Also, class EndAlso>
INLINE void filter_sums(const real* images, Shape s, const real* grad, const uint8_t* at, double* sums, Also also,
                        EndAlso end_also) {
    constexpr int K = 9 * CIN;
    memset(sums, 0, K * s.C * sizeof(double));
    V sum[K] = {};
    at_maxima<CIN>(
        images, s, at,
        [&](auto tap, L o, L c) {
            const V g = also(load(grad + o), o, c);
            UNROLL
            for (int k = 0; k < K; k++) sum[k] += tap(k / (3 * CIN), k % (3 * CIN)) * g;
        },
        [&](L c) {
            UNROLL
            for (int k = 0; k < K; k++) {
                add_to(sums + k * s.C + c, sum[k]);
                sum[k] = V{};
            }
            end_also(c);
        });
}
// dw [C, cin, 3, 3] of values(k, c), T's gradient
template <int CIN, class Values>
INLINE void as_weights(L C, real* dw, Values values) {
    for (L c = 0; c < C; c++)
        for (L tap = 0; tap < 9; tap++)
            for (L i = 0; i < CIN; i++) dw[(c * CIN + i) * 9 + tap] = values(tap * CIN + i, c);
}
// dw = s sums - n (s g_mean m + bend spread); given moments do not move.
template <int CIN>
static void filter_grad_of(Shape s, L given, const double* patches, const double* spread, const double* sums, Rows n,
                           real* dw) {
    constexpr L K = 9 * CIN;
    as_weights<CIN>(s.C, dw, [&](L k, L c) {
        const double found = n.s[c] * sums[k * s.C + c];
        if (given) return found;
        return found - pixels(s) * (n.s[c] * n.g_mean[c] * patches[K * K + k] + n.bend[c] * spread[k * s.C + c]);
    });
}
// dw; sets the numbers and grads as norm_relu_back. Where there is room for the sums of g p, [K, C], they are kept, and
// grad becomes g.
template <int CIN>
static void back_of(const real* images, Shape s, real* grad, const real* maxima, const uint8_t* at, L given,
                    const double* patches, const double* spread, double* rows, double* sums, real* grads, real* dw) {
    const Rows n(rows, s.C);
    const bool keep = sums != nullptr;
    std::unique_ptr<double[]> room(keep ? nullptr : new double[9 * CIN * s.C]);
    if (!keep) sums = room.get();
    Line line(n, s.C);
    Channels mean(n.mean, s.C);
    memset(n.g_mean, 0, 2 * s.C * sizeof(double));
    V g_sum = {}, product = {};
    filter_sums<CIN>(
        images, s, grad, at, sums,
        [&](V v, L o, L c) {
            const V m = load(maxima + o), g = line.where_positive(v, m, c);
            if (keep) store(grad + o, g);
            g_sum += g;
            product += g * (m - mean[c]);
            return g;
        },
        [&](L c) {
            add_to(n.g_mean + c, g_sum);
            add_to(n.product + c, product);
            g_sum = product = V{};
        });
    norm_line_back(n, pixels(s), given, s.C, grads);
    filter_grad_of<CIN>(s, given, patches, spread, sums, n, dw);
}
// Turns grad' into g'; dw' = s' sums + s sums' - n ((s' g_mean + s g_mean') m + bend' spread + bend spread'); the rest as
// norm_relu_back_along.
template <int CIN>
static void back_along_of(const real* images, Shape s, real* grad_t, const real* g, const real* maxima,
                          const real* maxima_t, const uint8_t* at, const double* patches, const double* spread,
                          const double* spread_t, const double* sums, double* rows, double* rows_t, real* grads_t,
                          real* dw_t) {
    constexpr L K = 9 * CIN;
    const Rows n(rows, s.C), t(rows_t, s.C);
    std::unique_ptr<double[]> sums_t(new double[K * s.C]);
    norm_relu_back_along(grad_t, g, maxima, maxima_t, s.B * (s.H / 2) * (s.W / 2), s.C, pixels(s), rows, rows_t, grads_t);
    filter_sums<CIN>(
        images, s, grad_t, at, sums_t.get(), [](V g_t, L, L) { return g_t; }, [](L) {});
    as_weights<CIN>(s.C, dw_t, [&](L k, L c) {
        const L o = k * s.C + c;
        const double mean = (t.s[c] * n.g_mean[c] + n.s[c] * t.g_mean[c]) * patches[K * K + k];
        return t.s[c] * sums[o] + n.s[c] * sums_t[o] - pixels(s) * (mean + t.bend[c] * spread[o] + n.bend[c] * spread_t[o]);
    });
}
