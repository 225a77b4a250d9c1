// Vectors of channels, in the extensions that GCC and Clang share, for AVX-512, AVX2 and NEON alike.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#ifndef REAL
#define REAL float
#endif
#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#define CAN_SHUFFLE false
#define SHUFFLE(a, b, lanes) (a)
#else
#define UNROLL _Pragma("GCC unroll 64")
#define CAN_SHUFFLE (VECTOR_BYTES == 64)
#define SHUFFLE(a, b, lanes) __builtin_shuffle(a, b, lanes)  // lanes of a, and of b behind them
#endif
#define KERNEL extern "C" __attribute__((visibility("default"))) void
#define INLINE static inline __attribute__((always_inline))

typedef REAL real;
typedef long L;
constexpr L LANES = VECTOR_BYTES / sizeof(real);
typedef real V __attribute__((vector_size(VECTOR_BYTES)));
typedef decltype(V{} > V{}) Mask;  // lanes of 0 or -1
typedef real Values __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(real)), may_alias));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
typedef short Shorts __attribute__((vector_size(LANES * sizeof(short))));
typedef double Sums __attribute__((vector_size(LANES * sizeof(double)), aligned(8), may_alias));

// Room for numbers, not set, from a line of the cache on: a vector that crosses one takes twice as long.
class Room {
    struct alignas(64) Line {
        real values[64 / sizeof(real)];
    };
    std::unique_ptr<Line[]> lines;

  public:
    Room(L count) : lines(new Line[count * sizeof(real) / sizeof(Line) + 1]) {}
    real* data() { return lines[0].values; }
};
INLINE V load(const real* p) { return *(const Values*)p; }
INLINE void store(real* p, V v) { *(Values*)p = v; }
INLINE Mask load_bytes(const uint8_t* p) {  // by way of shorts, without which GCC moves each alone
    return __builtin_convertvector(__builtin_convertvector(*(const Bytes*)p, Shorts), Mask);
}
INLINE void store_bytes(uint8_t* p, Mask m) { *(Bytes*)p = __builtin_convertvector(m, Bytes); }
// sums[lane] += v[lane]: sums over images are of double precision, those within a row of pixels are not
INLINE void add_to(double* sums, V v) { *(Sums*)sums += __builtin_convertvector(v, Sums); }
INLINE V where(Mask m, V a, V b) { return m ? a : b; }
INLINE V all(real value) { return value - V{}; }  // no operation: 0 + value is one, as it turns -0 into 0
// Numbers by channel, which come in double precision.
class Channels : Room {
  public:
    Channels(const double* from, L C) : Room(C) { std::copy(from, from + C, data()); }
    V operator[](L c) { return load(data() + c); }
};
