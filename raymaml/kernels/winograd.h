// 3x3 convolutions of stride 1 and padding 1 by Winograd's algorithm (Lavin and Gray 2016, arXiv 1509.09308):
// F(4x4, 3x3) for the convolution and its gradient in the images, F(3x3, 4x4) for that in the filters.
//
//     y  = A^T [(G w G^T) * (B^T x B)] A         w 3x3, x 6x6, y 4x4
//     dw = A3^T [(G4 dy G4^T) * (B^T x B)] A3
//
// where * sums over channels or tiles: 36 products of matrices, [tiles, C] [C, K] or [C, tiles] [tiles, K]. The
// points of interpolation are 0, +-5/8, +-3/2 and infinity; 0, +-1, +-2 round three times as much. A sum of two
// convolutions (of a value and of its tangent) is added up before A. Images are [B, H, W, C]; C and K are
// multiples of 16.
#pragma once
#include "norm_pool.h"
#include "products.h"

constexpr double P = 0.625, Q = 1.5;
constexpr real P1 = P, P2 = P * P, P3 = P * P * P, Q1 = Q, Q2 = Q * Q, Q3 = Q * Q * Q, PQ = P2 * Q2, SUM = P2 + Q2;
constexpr real N0 = 1 / (P * P * Q * Q), NP = 1 / (2 * P * P * (P * P - Q * Q)), NQ = 1 / (2 * Q * Q * (Q * Q - P * P));
constexpr L TILE = 4, POINTS = 36;

INLINE void b(const V d[6], V o[6]) {
    const V even_p = d[4] - Q2 * d[2], odd_p = P1 * (d[3] - Q2 * d[1]);
    const V even_q = d[4] - P2 * d[2], odd_q = Q1 * (d[3] - P2 * d[1]);
    o[0] = PQ * d[0] + (d[4] - SUM * d[2]);
    o[1] = even_p + odd_p;
    o[2] = even_p - odd_p;
    o[3] = even_q + odd_q;
    o[4] = even_q - odd_q;
    o[5] = PQ * d[1] + (d[5] - SUM * d[3]);
}
INLINE void spread_over_points(V even_p, V odd_p, V even_q, V odd_q, V o[6]) {
    o[1] = NP * (even_p + odd_p);
    o[2] = NP * (even_p - odd_p);
    o[3] = NQ * (even_q + odd_q);
    o[4] = NQ * (even_q - odd_q);
}
INLINE void g(const V w[3], V o[6]) {
    spread_over_points(w[0] + P2 * w[2], P1 * w[1], w[0] + Q2 * w[2], Q1 * w[1], o);
    o[0] = N0 * w[0];
    o[5] = w[2];
}
INLINE void g4(const V y[4], V o[6]) {
    spread_over_points(y[0] + P2 * y[2], P1 * y[1] + P3 * y[3], y[0] + Q2 * y[2], Q1 * y[1] + Q3 * y[3], o);
    o[0] = N0 * y[0];
    o[5] = y[3];
}
INLINE void a(const V m[6], V o[4]) {
    const V sum_p = m[1] + m[2], dif_p = m[1] - m[2], sum_q = m[3] + m[4], dif_q = m[3] - m[4];
    o[0] = m[0] + sum_p + sum_q;
    o[1] = P1 * dif_p + Q1 * dif_q;
    o[2] = P2 * sum_p + Q2 * sum_q;
    o[3] = P3 * dif_p + Q3 * dif_q + m[5];
}
INLINE void a3(const V m[6], V o[3]) {
    const V sum_p = m[1] + m[2], dif_p = m[1] - m[2], sum_q = m[3] + m[4], dif_q = m[3] - m[4];
    o[0] = m[0] + sum_p + sum_q;
    o[1] = P1 * dif_p + Q1 * dif_q;
    o[2] = P2 * sum_p + Q2 * sum_q + m[5];
}
// Transforms a square of N x N values, which read(row, column) gives, down its columns, then along its rows: M x M.
template <int N, int M, void (*transform)(const V*, V*), class Read>
INLINE void squared(Read read, V (&out)[M][M]) {
    V half[M][N];
    UNROLL
    for (int column = 0; column < N; column++) {
        V from[N], to[M];
        UNROLL
        for (int k = 0; k < N; k++) from[k] = read(k, column);
        transform(from, to);
        UNROLL
        for (int k = 0; k < M; k++) half[k][column] = to[k];
    }
    UNROLL
    for (int k = 0; k < M; k++) transform(half[k], out[k]);
}
// Transforms N x N pixels of an image of C channels from (y, x) on; those outside are zero.
template <int N, int M, void (*transform)(const V*, V*)>
INLINE void squared_pixels(const real* image, L H, L W, L C, L y, L x, V (&out)[M][M]) {
    const real* corner = image + (y * W + x) * C;
    if (y >= 0 && x >= 0 && y + N <= H && x + N <= W)
        squared<N, M, transform>([&](int i, int j) { return load(corner + (i * W + j) * C); }, out);
    else
        squared<N, M, transform>(
            [&](int i, int j) {
                const bool there = y + i >= 0 && y + i < H && x + j >= 0 && x + j < W;
                return there ? load(corner + (i * W + j) * C) : V{};
            },
            out);
}
// Writes a tile of pixels to an image of C channels from (y, x) on, but for those outside.
INLINE void write_tile(const V (&tile)[TILE][TILE], real* image, L H, L W, L C, L y, L x) {
    real* corner = image + (y * W + x) * C;
    if (y + TILE <= H && x + TILE <= W) {
        UNROLL
        for (int i = 0; i < TILE; i++)
            UNROLL
            for (int j = 0; j < TILE; j++) store(corner + (i * W + j) * C, tile[i][j]);
        return;
    }
    UNROLL
    for (int i = 0; i < TILE; i++)
        UNROLL
        for (int j = 0; j < TILE; j++)
            if (y + i < H && x + j < W) store(corner + (i * W + j) * C, tile[i][j]);
}
template <int M>
INLINE void write_points(const V (&square)[M][M], real* out, L stride) {
    UNROLL
    for (int i = 0; i < M; i++)
        UNROLL
        for (int j = 0; j < M; j++) store(out + (i * M + j) * stride, square[i][j]);
}
struct Tile {
    L image, y, x;
};
// The tiles of a set of images, and a number of them at a time: they stay in the cache, unless filters do not.
struct Tiles {
    L across, each, count, batch;
    Tiles(Shape s)
        : across((s.W + TILE - 1) / TILE),
          each((s.H + TILE - 1) / TILE * across),
          count(s.B * each),
          batch(s.C > 256 ? 96 : s.C > 128 ? 24 : s.C > 32 ? 12 : 24) {}
    Tile operator[](L t) const { return {t / each, t % each / across * TILE, t % each % across * TILE}; }
};
// From a point of a matrix [36, size] to the next: padded lest all 36 fall on one set of the cache.
INLINE L padded(L size) { return size + 16; }
// Points [36, tiles, C].
struct Points {
    L stride;
    Room values;
    Points(L tiles, L C) : stride(padded(tiles * C)), values(POINTS * stride) {}
    real* at(L point) { return values.data() + point * stride; }
};
static void transform_images(const real* x, Shape s, const Tiles& tiles, L first, L count, Points& out) {
    for (L t = 0; t < count; t++) {
        const Tile tile = tiles[first + t];
        for (L c = 0; c < s.C; c += LANES) {
            V points[6][6];
            squared_pixels<6, 6, b>(x + tile.image * s.H * s.W * s.C + c, s.H, s.W, s.C, tile.y - 1, tile.x - 1, points);
            write_points(points, out.at(0) + t * s.C + c, out.stride);
        }
    }
}
// Filters w [K, C, 3, 3] -> u [36, C, K]; turned: those of the gradient in the images, u [36, K, C], turned round.
// Points of u are padded(C K) apart.
KERNEL winograd_filters(const real* w, L C, L K, L turned, real* u) {
    const L inputs = turned ? K : C, outputs = turned ? C : K;
    const L next_input = turned ? 9 * C : 9, next_output = turned ? 9 : 9 * C;
    for (L c = 0; c < inputs; c++)
        for (L k = 0; k < outputs; k += LANES) {
            const real* first = w + c * next_input + k * next_output;
            alignas(V) real filter[9][LANES];
            for (L lane = 0; lane < LANES; lane++)
                for (int tap = 0; tap < 9; tap++) filter[turned ? 8 - tap : tap][lane] = first[lane * next_output + tap];
            V points[6][6];
            squared<3, 6, g>([&](int i, int j) { return load(filter[3 * i + j]); }, points);
            write_points(points, u + c * outputs + k, padded(C * K));
        }
}
// Convolves x [B, H, W, C] by the filters u, and adds x2 by u2 where there are; done(tile, k, pixels) gets 4x4 pixels of
// a vector of channels from k on, of the first tile first.
template <class Done>
INLINE void convolved_by_tiles(const real* x, const real* u, const real* x2, const real* u2, Shape s, L K, Done done) {
    const real *images[] = {x, x2}, *filters[] = {u, u2};
    const Tiles tiles(s);
    Points in(tiles.batch, s.C), out(tiles.batch, K);
    for (L first = 0; first < tiles.count; first += tiles.batch) {
        const L count = std::min(tiles.batch, tiles.count - first);
        for (L i = 0; i < (x2 ? 2 : 1); i++) {
            transform_images(images[i], s, tiles, first, count, in);
            for (L point = 0; point < POINTS; point++)
                product(in.at(point), s.C, 1, filters[i] + point * padded(s.C * K), K, out.at(point), K, count, K, s.C, i > 0);
        }
        for (L t = 0; t < count; t++)
            for (L k = 0; k < K; k += LANES) {
                V pixels[4][4];
                const real* points = out.at(0) + t * K + k;
                squared<6, 4, a>([&](int i, int j) { return load(points + (6 * i + j) * out.stride); }, pixels);
                done(tiles[first + t], k, pixels);
            }
    }
}
// y [B, H, W, K] = x [B, H, W, C] by the filters u, plus x2 by u2 where there are
KERNEL winograd(const real* x, const real* u, const real* x2, const real* u2, Shape s, L K, real* y) {
    convolved_by_tiles(x, u, x2, u2, s, K, [&](Tile tile, L k, const V(&pixels)[4][4]) {
        write_tile(pixels, y + tile.image * s.H * s.W * K + k, s.H, s.W, K, tile.y, tile.x);
    });
}
// As winograd of one pair, with the maxima and where of scale y; sets mean and var. y is written where there is room for
// it. Sums are of y - y0, with y0 the first pixel of each channel, so that a large mean costs no digits.
KERNEL winograd_and_maxima(const real* x, const real* u, Shape s, L K, const real* scale, real* y, real* maxima, uint8_t* at,
                           double* rows) {
    const Rows n(rows, K);
    const L h = s.H / 2, w = s.W / 2;
    Room room(K);
    real* y0 = room.data();
    memset(rows, 0, 2 * K * sizeof(double));
    bool is_first = true;
    convolved_by_tiles(x, u, nullptr, nullptr, s, K, [&](Tile tile, L k, const V(&pixels)[4][4]) {
        if (is_first) store(y0 + k, pixels[0][0]);
        is_first = is_first && k + LANES < K;
        if (y) write_tile(pixels, y + tile.image * s.H * s.W * K + k, s.H, s.W, K, tile.y, tile.x);
        const L rows_left = s.H - tile.y, columns_left = s.W - tile.x;
        const V first = load(y0 + k), sign = sign_of(scale + k);
        V sum[2] = {}, square[2] = {};
        UNROLL
        for (int i = 0; i < TILE; i++)
            UNROLL
            for (int j = 0; j < TILE; j++)
                if (i < rows_left && j < columns_left) {
                    const V d = pixels[i][j] - first;
                    sum[j % 2] += d;
                    square[j % 2] += d * d;
                }
        add_to(n.mean + k, sum[0] + sum[1]);
        add_to(n.var + k, square[0] + square[1]);
        UNROLL
        for (int i = 0; i < TILE; i += 2)
            UNROLL
            for (int j = 0; j < TILE; j += 2)
                if (i + 1 < rows_left && j + 1 < columns_left) {
                    const V v[4] = {pixels[i][j] * sign, pixels[i][j + 1] * sign, pixels[i + 1][j] * sign,
                                    pixels[i + 1][j + 1] * sign};
                    const L o = ((tile.image * h + (tile.y + i) / 2) * w + (tile.x + j) / 2) * K + k;
                    const Largest found = largest(v);
                    store(maxima + o, found.value * sign);
                    store_bytes(at + o, found.place);
                }
    });
    for (L k = 0; k < K; k++) end_moments(n, pixels(s), k, y0[k]);
}
// dw [K, C, 3, 3] = the gradient in the filters, for dy [B, H, W, K] behind x [B, H, W, C], plus that for dy2, x2
KERNEL winograd_filter_grad(const real* x, const real* dy, const real* x2, const real* dy2, Shape s, L K, real* dw) {
    const real *images[] = {x, x2}, *grads[] = {dy, dy2};
    const Tiles tiles(s);
    Points in(tiles.batch, s.C), out(tiles.batch, K), part(s.C, K), sum(s.C, K);
    L batches = 0, parts = 0;
    const auto end_part = [&] {  // sums of sums round less
        if (parts++ == 0) return std::swap(part, sum);
        for (L e = 0; e < POINTS * sum.stride; e++) sum.at(0)[e] += part.at(0)[e];
    };
    for (L i = 0; i < (x2 ? 2 : 1); i++)
        for (L first = 0; first < tiles.count; first += tiles.batch) {
            const L count = std::min(tiles.batch, tiles.count - first);
            transform_images(images[i], s, tiles, first, count, in);
            for (L t = 0; t < count; t++) {
                const Tile tile = tiles[first + t];
                for (L k = 0; k < K; k += LANES) {
                    V points[6][6];
                    squared_pixels<4, 6, g4>(grads[i] + tile.image * s.H * s.W * K + k, s.H, s.W, K, tile.y, tile.x, points);
                    write_points(points, out.at(0) + t * K + k, out.stride);
                }
            }
            for (L point = 0; point < POINTS; point++)
                product(in.at(point), 1, s.C, out.at(point), K, part.at(point), K, s.C, K, count, batches > 0);
            if (++batches == 16) {
                end_part();
                batches = 0;
            }
        }
    if (batches) end_part();
    for (L c = 0; c < s.C; c++)
        for (L k = 0; k < K; k += LANES) {
            V filter[3][3];
            const real* points = sum.at(0) + c * K + k;
            squared<6, 3, a3>([&](int i, int j) { return load(points + (6 * i + j) * sum.stride); }, filter);
            alignas(V) real values[9][LANES];
            UNROLL
            for (int tap = 0; tap < 9; tap++) store(values[tap], filter[tap / 3][tap % 3]);
            for (L lane = 0; lane < LANES; lane++)
                for (int tap = 0; tap < 9; tap++) dw[((k + lane) * s.C + c) * 9 + tap] = values[tap][lane];
        }
}
