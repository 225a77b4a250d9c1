// Small matrix products with all results in registers.
#pragma once
#include "vectors.h"

#if VECTOR_BYTES == 64
constexpr int ROWS = 12, FEWER = 8, WIDE = 2;  // 24 or 16 of 32 registers hold results
#elif VECTOR_BYTES == 32
constexpr int ROWS = 6, FEWER = 4, WIDE = 2;  // 12 or 8 of 16
#else
constexpr int ROWS = 6, FEWER = 4, WIDE = 4;  // 24 or 16 of 32
#endif

// m[i][k] (+)= sum_c a(i, c) u[c][k] for MR rows i and NR vectors of columns k; a(i, c) = a[i * row + c * column].
template <int MR, int NR>
INLINE void block(const real* a, L row, L column, const real* u, L ldu, real* m, L ldm, L count, bool add) {
    V sum[MR][NR];
    UNROLL
    for (int i = 0; i < MR; i++)
        UNROLL
        for (int k = 0; k < NR; k++) sum[i][k] = add ? load(m + i * ldm + k * LANES) : V{};
    for (L c = 0; c < count; c++) {
        V right[NR];
        UNROLL
        for (int k = 0; k < NR; k++) right[k] = load(u + c * ldu + k * LANES);
        UNROLL
        for (int i = 0; i < MR; i++) {
            const V left = all(a[i * row + c * column]);
            UNROLL
            for (int k = 0; k < NR; k++) sum[i][k] += left * right[k];
        }
    }
    UNROLL
    for (int i = 0; i < MR; i++)
        UNROLL
        for (int k = 0; k < NR; k++) store(m + i * ldm + k * LANES, sum[i][k]);
}
template <int NR>
INLINE void rows_of(const real* a, L row, L column, const real* u, L ldu, real* m, L ldm, L rows, L count, bool add) {
    L i = 0;
    if (rows % ROWS)
        for (; i + FEWER <= rows; i += FEWER)
            block<FEWER, NR>(a + i * row, row, column, u, ldu, m + i * ldm, ldm, count, add);
    for (; i + ROWS <= rows; i += ROWS) block<ROWS, NR>(a + i * row, row, column, u, ldu, m + i * ldm, ldm, count, add);
    for (; i + 4 <= rows; i += 4) block<4, NR>(a + i * row, row, column, u, ldu, m + i * ldm, ldm, count, add);
    for (; i < rows; i++) block<1, NR>(a + i * row, row, column, u, ldu, m + i * ldm, ldm, count, add);
}
// m [rows, columns] (+)= a [rows, count] u [count, columns], columns a multiple of LANES
INLINE void product(const real* a, L row, L column, const real* u, L ldu, real* m, L ldm, L rows, L columns, L count,
                    bool add) {
    L k = 0;
    for (; k + WIDE * LANES <= columns; k += WIDE * LANES)
        rows_of<WIDE>(a, row, column, u + k, ldu, m + k, ldm, rows, count, add);
    for (; k < columns; k += LANES) rows_of<1>(a, row, column, u + k, ldu, m + k, ldm, rows, count, add);
}
