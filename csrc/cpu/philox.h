// Philox4x32-7 over a tile of consecutive voxels (the noise contract, calseg/rng.py).
//
// Only the voxel differs between lanes: word 1 (voxel >> 32) is one value over a tile, word 2 (the quad) over a call and
// word 3 is 0. So half of the first two rounds depends on the voxel alone and is made once per tile, and the other
// half is scalar: a quad costs five full rounds instead of seven.
//
// 32 x 32 -> 64 bit products want 64-bit lanes: even and odd voxels live in two vectors whose low halves hold the
// words, so that no shuffle is needed between rounds; one shift and one merge at the end give voxel order.
#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/vector_math.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

#if defined(__AVX512F__)
struct Lanes {
    __m512i v;
    static constexpr int count = 8;
};
CALSEG_INLINE Lanes broadcast(uint64_t x) { return {_mm512_set1_epi64(static_cast<long long>(x))}; }
CALSEG_INLINE Lanes load_lanes(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
CALSEG_INLINE void store_lanes(void* p, Lanes a) { _mm512_storeu_si512(p, a.v); }
CALSEG_INLINE Lanes mul_low(Lanes a, Lanes b) { return {_mm512_mul_epu32(a.v, b.v)}; }
CALSEG_INLINE Lanes high(Lanes a) { return {_mm512_srli_epi64(a.v, 32)}; }
CALSEG_INLINE Lanes xor3(Lanes a, Lanes b, Lanes c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
CALSEG_INLINE Lanes merge(Lanes even, Lanes odd) {
    return {_mm512_mask_blend_epi32(0xaaaa, even.v, _mm512_slli_epi64(odd.v, 32))};
}
#elif defined(__AVX2__)
struct Lanes {
    __m256i v;
    static constexpr int count = 4;
};
CALSEG_INLINE Lanes broadcast(uint64_t x) { return {_mm256_set1_epi64x(static_cast<long long>(x))}; }
CALSEG_INLINE Lanes load_lanes(const uint64_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
CALSEG_INLINE void store_lanes(void* p, Lanes a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
CALSEG_INLINE Lanes mul_low(Lanes a, Lanes b) { return {_mm256_mul_epu32(a.v, b.v)}; }
CALSEG_INLINE Lanes high(Lanes a) { return {_mm256_srli_epi64(a.v, 32)}; }
CALSEG_INLINE Lanes xor3(Lanes a, Lanes b, Lanes c) {
    return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)};
}
CALSEG_INLINE Lanes merge(Lanes even, Lanes odd) {
    return {_mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xaa)};
}
#elif defined(__SSE2__)
struct Lanes {
    __m128i v;
    static constexpr int count = 2;
};
CALSEG_INLINE Lanes broadcast(uint64_t x) { return {_mm_set1_epi64x(static_cast<long long>(x))}; }
CALSEG_INLINE Lanes load_lanes(const uint64_t* p) { return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))}; }
CALSEG_INLINE void store_lanes(void* p, Lanes a) { _mm_storeu_si128(static_cast<__m128i*>(p), a.v); }
CALSEG_INLINE Lanes mul_low(Lanes a, Lanes b) { return {_mm_mul_epu32(a.v, b.v)}; }
CALSEG_INLINE Lanes high(Lanes a) { return {_mm_srli_epi64(a.v, 32)}; }
CALSEG_INLINE Lanes xor3(Lanes a, Lanes b, Lanes c) { return {_mm_xor_si128(_mm_xor_si128(a.v, b.v), c.v)}; }
CALSEG_INLINE Lanes merge(Lanes even, Lanes odd) {
    return {_mm_or_si128(_mm_srli_epi64(_mm_slli_epi64(even.v, 32), 32), _mm_slli_epi64(odd.v, 32))};
}
#else
// Any processor: pairs of 64-bit words, which compilers map to what they have.
struct Lanes {
    uint64_t v[4];
    static constexpr int count = 4;
};
CALSEG_INLINE Lanes broadcast(uint64_t x) { return {{x, x, x, x}}; }
CALSEG_INLINE Lanes load_lanes(const uint64_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
CALSEG_INLINE void store_lanes(void* p, Lanes a) { std::memcpy(p, a.v, sizeof a.v); }
CALSEG_INLINE Lanes mul_low(Lanes a, Lanes b) {
    Lanes r;
    for (int i = 0; i < 4; ++i) r.v[i] = (a.v[i] & 0xffffffffu) * (b.v[i] & 0xffffffffu);
    return r;
}
CALSEG_INLINE Lanes high(Lanes a) {
    for (int i = 0; i < 4; ++i) a.v[i] >>= 32;
    return a;
}
CALSEG_INLINE Lanes xor3(Lanes a, Lanes b, Lanes c) {
    for (int i = 0; i < 4; ++i) a.v[i] ^= b.v[i] ^ c.v[i];
    return a;
}
CALSEG_INLINE Lanes merge(Lanes even, Lanes odd) {
    Lanes r;
    uint32_t words[8];
    for (int i = 0; i < 4; ++i) {
        words[2 * i] = static_cast<uint32_t>(even.v[i]);
        words[2 * i + 1] = static_cast<uint32_t>(odd.v[i]);
    }
    std::memcpy(r.v, words, sizeof words);
    return r;
}
#endif

// The voxels' part of the first two rounds, for up to `capacity` voxels (a multiple of 16).
class PhiloxTile {
   public:
    // 3 words of 64 bits a voxel
    explicit PhiloxTile(uint64_t* cache, int capacity)
        : c0_(cache), c1_(cache + capacity), c3_(cache + 2 * capacity) {}

    // Voxels first, first + 1, ... first + count - 1, which must share voxel >> 32; count a multiple of 16.
    void set_voxels(uint64_t seed, uint64_t first, int count) {
        key0_ = static_cast<uint32_t>(seed);
        key1_ = static_cast<uint32_t>(seed >> 32);
        voxel_high_ = static_cast<uint32_t>(first >> 32);
        count_ = count;
        for (int block = 0; block < count; block += 2 * Lanes::count)
            for (int i = 0; i < 2 * Lanes::count; ++i) {
                int voxel = block + (i < Lanes::count ? 2 * i : 2 * (i - Lanes::count) + 1);
                uint64_t p0 = static_cast<uint64_t>(static_cast<uint32_t>(first) + static_cast<uint32_t>(voxel)) * kPhiloxM0;
                uint32_t c2 = static_cast<uint32_t>(p0 >> 32) ^ key1_;  // after round 1
                uint64_t p1 = static_cast<uint64_t>(c2) * kPhiloxM1;
                c0_[block + i] = p1 >> 32;
                c1_[block + i] = p1;
                c3_[block + i] = static_cast<uint32_t>(p0);
            }
    }

    // The four words of a quad, one row of `stride` voxels each.
    void words(uint32_t quad, uint32_t* CALSEG_RESTRICT out, int stride) const {
        uint64_t p1 = static_cast<uint64_t>(quad) * kPhiloxM1;  // round 1, what the voxel does not touch
        uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ voxel_high_ ^ key0_, c1 = static_cast<uint32_t>(p1);
        uint32_t k0 = key0_ + kPhiloxW0, k1 = key1_ + kPhiloxW1;
        uint64_t p0 = static_cast<uint64_t>(c0) * kPhiloxM0;  // round 2
        const Lanes x0 = broadcast(c1 ^ k0), x2 = broadcast((p0 >> 32) ^ k1), c3 = broadcast(static_cast<uint32_t>(p0));
        const Lanes zero = broadcast(0), m0 = broadcast(kPhiloxM0), m1 = broadcast(kPhiloxM1);
        Lanes keys[5][2];
        for (auto& key : keys) {
            k0 += kPhiloxW0;
            k1 += kPhiloxW1;
            key[0] = broadcast(k0);
            key[1] = broadcast(k1);
        }
        for (int block = 0; block < count_; block += 2 * Lanes::count) {
            Lanes a[2][4];
            for (int half = 0; half < 2; ++half) {
                const int at = block + half * Lanes::count;
                a[half][0] = xor3(load_lanes(c0_ + at), x0, zero);
                a[half][1] = load_lanes(c1_ + at);
                a[half][2] = xor3(load_lanes(c3_ + at), x2, zero);
                a[half][3] = c3;
                for (const auto& key : keys) {
                    Lanes q0 = mul_low(a[half][0], m0), q1 = mul_low(a[half][2], m1);
                    a[half][0] = xor3(high(q1), a[half][1], key[0]);
                    a[half][1] = q1;
                    a[half][2] = xor3(high(q0), a[half][3], key[1]);
                    a[half][3] = q0;
                }
            }
            for (int lane = 0; lane < 4; ++lane) store_lanes(out + lane * stride + block, merge(a[0][lane], a[1][lane]));
        }
    }

   private:
    uint64_t *c0_, *c1_, *c3_;
    uint32_t key0_ = 0, key1_ = 0, voxel_high_ = 0;
    int count_ = 0;
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
