// Random number generator Philox4x32-7 for kLanes consecutive voxels. calseg/backends/rng.py defines how it is used.
//
// The counter has four words: 0 is voxel mod 2^32, 1 is voxel >> 32, 2 is the quad, and 3 is 0. Only word 0 differs between
// lanes. So in the first two rounds, one half of the work depends on the voxel alone and is done once for all quads. The
// other half is the same for all lanes and is scalar. A quad then costs five full rounds instead of seven.
//
// The products of two 32-bit words have 64 bits and need 64-bit lanes. One vector holds the words of the even voxels in the
// low halves of its lanes, and another one those of the odd voxels. So no shuffle is needed between rounds. At the end, a
// shift and a merge restore the order of the voxels.
#pragma once

#include "cpu/simd.h"

namespace calseg {
namespace CALSEG_ISA {
namespace {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

// Vector of 64-bit lanes whose low halves hold the 32-bit words of every second voxel.
#if defined(__AVX512F__)
struct Words {
    __m512i v;
    static constexpr int count = 8;
};
CALSEG_INLINE Words all_words(uint64_t x) { return {_mm512_set1_epi64(static_cast<long long>(x))}; }
CALSEG_INLINE Words load_words(const uint64_t* p) { return {_mm512_loadu_si512(p)}; }
CALSEG_INLINE void store_words(void* p, Words a) { _mm512_storeu_si512(p, a.v); }
CALSEG_INLINE Words sum(Words a, Words b) { return {_mm512_add_epi64(a.v, b.v)}; }
CALSEG_INLINE Words mul_low(Words a, Words b) { return {_mm512_mul_epu32(a.v, b.v)}; }
CALSEG_INLINE Words high(Words a) { return {_mm512_srli_epi64(a.v, 32)}; }
CALSEG_INLINE Words xor3(Words a, Words b, Words c) { return {_mm512_ternarylogic_epi64(a.v, b.v, c.v, 0x96)}; }
CALSEG_INLINE Words merge(Words even, Words odd) { return {_mm512_mask_blend_epi32(0xaaaa, even.v, _mm512_slli_epi64(odd.v, 32))}; }
#elif defined(__AVX2__)
struct Words {
    __m256i v;
    static constexpr int count = 4;
};
CALSEG_INLINE Words all_words(uint64_t x) { return {_mm256_set1_epi64x(static_cast<long long>(x))}; }
CALSEG_INLINE Words load_words(const uint64_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
CALSEG_INLINE void store_words(void* p, Words a) { _mm256_storeu_si256(static_cast<__m256i*>(p), a.v); }
CALSEG_INLINE Words sum(Words a, Words b) { return {_mm256_add_epi64(a.v, b.v)}; }
CALSEG_INLINE Words mul_low(Words a, Words b) { return {_mm256_mul_epu32(a.v, b.v)}; }
CALSEG_INLINE Words high(Words a) { return {_mm256_srli_epi64(a.v, 32)}; }
CALSEG_INLINE Words xor3(Words a, Words b, Words c) { return {_mm256_xor_si256(_mm256_xor_si256(a.v, b.v), c.v)}; }
CALSEG_INLINE Words merge(Words even, Words odd) { return {_mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xaa)}; }
#elif defined(__SSE2__)
struct Words {
    __m128i v;
    static constexpr int count = 2;
};
CALSEG_INLINE Words all_words(uint64_t x) { return {_mm_set1_epi64x(static_cast<long long>(x))}; }
CALSEG_INLINE Words load_words(const uint64_t* p) { return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))}; }
CALSEG_INLINE void store_words(void* p, Words a) { _mm_storeu_si128(static_cast<__m128i*>(p), a.v); }
CALSEG_INLINE Words sum(Words a, Words b) { return {_mm_add_epi64(a.v, b.v)}; }
CALSEG_INLINE Words mul_low(Words a, Words b) { return {_mm_mul_epu32(a.v, b.v)}; }
CALSEG_INLINE Words high(Words a) { return {_mm_srli_epi64(a.v, 32)}; }
CALSEG_INLINE Words xor3(Words a, Words b, Words c) { return {_mm_xor_si128(_mm_xor_si128(a.v, b.v), c.v)}; }
CALSEG_INLINE Words merge(Words even, Words odd) {
    return {_mm_or_si128(_mm_srli_epi64(_mm_slli_epi64(even.v, 32), 32), _mm_slli_epi64(odd.v, 32))};
}
#else
struct Words {
    static constexpr int count = kLanes / 2;
    uint64_t v[count];
};
CALSEG_INLINE Words all_words(uint64_t x) {
    Words r;
    for (auto& word : r.v) word = x;
    return r;
}
CALSEG_INLINE Words load_words(const uint64_t* p) {
    Words r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
CALSEG_INLINE void store_words(void* p, Words a) { std::memcpy(p, a.v, sizeof a.v); }
CALSEG_INLINE Words sum(Words a, Words b) {
    for (int i = 0; i < Words::count; ++i) a.v[i] += b.v[i];
    return a;
}
CALSEG_INLINE Words mul_low(Words a, Words b) {
    for (int i = 0; i < Words::count; ++i) a.v[i] = (a.v[i] & 0xffffffffu) * (b.v[i] & 0xffffffffu);
    return a;
}
CALSEG_INLINE Words high(Words a) {
    for (auto& word : a.v) word >>= 32;
    return a;
}
CALSEG_INLINE Words xor3(Words a, Words b, Words c) {
    for (int i = 0; i < Words::count; ++i) a.v[i] ^= b.v[i] ^ c.v[i];
    return a;
}
CALSEG_INLINE Words merge(Words even, Words odd) {
    uint32_t words[2 * Words::count];
    for (int i = 0; i < Words::count; ++i) {
        words[2 * i] = static_cast<uint32_t>(even.v[i]);
        words[2 * i + 1] = static_cast<uint32_t>(odd.v[i]);
    }
    std::memcpy(even.v, words, sizeof words);
    return even;
}
#endif

// Generator of the random words of kLanes consecutive voxels. All of them must have the same voxel >> 32.
class Philox {
 public:
    explicit Philox(uint64_t seed) : key0_(static_cast<uint32_t>(seed)), key1_(static_cast<uint32_t>(seed >> 32)) {
        uint32_t k0 = key0_ + kPhiloxW0, k1 = key1_ + kPhiloxW1;
        for (auto& key : keys_) {
            k0 += kPhiloxW0;
            k1 += kPhiloxW1;
            key[0] = all_words(k0);
            key[1] = all_words(k1);
        }
        for (int half = 0; half < 2; ++half) {
            uint64_t lanes[Words::count];
            for (int i = 0; i < Words::count; ++i) lanes[i] = static_cast<uint64_t>(2 * i + half);
            lanes_[half] = load_words(lanes);
        }
    }

    // Sets the voxels to `first` and those after it. Computes the part of the first two rounds that depends on the voxel
    // alone.
    CALSEG_MEMBER void set_voxels(uint64_t first) {
        voxel_high_ = static_cast<uint32_t>(first >> 32);
        const Words m0 = all_words(kPhiloxM0), m1 = all_words(kPhiloxM1), key = all_words(key1_), zero = all_words(0);
        for (int half = 0; half < 2; ++half) {
            const Words p0 = mul_low(sum(all_words(first), lanes_[half]), m0);
            const Words p1 = mul_low(xor3(high(p0), key, zero), m1);
            c0_[half] = high(p1);
            c1_[half] = p1;
            c3_[half] = p0;
        }
    }

    // Computes the four words of K quads, from `quad` on, for each voxel. The K quads are computed together, so that the
    // processor overlaps their chains of operations.
    template <int K>
    CALSEG_MEMBER void words(uint32_t quad, uint32_t (*to)[4][kLanes]) const {
        const Words m0 = all_words(kPhiloxM0), m1 = all_words(kPhiloxM1), zero = all_words(0);
        Words a[2 * K][4];
        for (int k = 0; k < K; ++k) {
            // Compute the half of rounds 1 and 2 that does not depend on the lane.
            const uint64_t p1 = static_cast<uint64_t>(quad + static_cast<uint32_t>(k)) * kPhiloxM1;  // round 1
            const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ voxel_high_ ^ key0_;
            const uint64_t p0 = static_cast<uint64_t>(c0) * kPhiloxM0;  // round 2
            const Words x0 = all_words(static_cast<uint32_t>(p1) ^ (key0_ + kPhiloxW0));
            const Words x2 = all_words(static_cast<uint32_t>(p0 >> 32) ^ (key1_ + kPhiloxW1));
            for (int half = 0; half < 2; ++half) {
                a[2 * k + half][0] = xor3(c0_[half], x0, zero);
                a[2 * k + half][1] = c1_[half];
                a[2 * k + half][2] = xor3(c3_[half], x2, zero);
                a[2 * k + half][3] = all_words(static_cast<uint32_t>(p0));
            }
        }
        for (const auto& key : keys_)
            for (auto& c : a) {
                const Words q0 = mul_low(c[0], m0), q1 = mul_low(c[2], m1);
                c[0] = xor3(high(q1), c[1], key[0]);
                c[1] = q1;
                c[2] = xor3(high(q0), c[3], key[1]);
                c[3] = q0;
            }
        for (int k = 0; k < K; ++k)
            for (int lane = 0; lane < 4; ++lane) store_words(to[k][lane], merge(a[2 * k][lane], a[2 * k + 1][lane]));
    }

 private:
    uint32_t key0_, key1_, voxel_high_ = 0;
    Words lanes_[2], keys_[5][2], c0_[2], c1_[2], c3_[2];
};

}  // namespace
}  // namespace CALSEG_ISA
}  // namespace calseg
