// The modality mixture-of-experts of Mono-InternVL as CUDA kernels.
//
// What. Every token has a fixed expert: text, visual or none (pad). A routed product multiplies the text
// tokens by the weights of the text expert, and the visual tokens by those of the visual expert:
//     moe_linear   y[token] = x[token] · w_e^T                            wqkv, wo, second half of the FFN
//     moe_swiglu   h[token] = silu(x[token] · w1_e^T) * (x[token] · w3_e^T)  first half of the FFN
// where e is the expert of the token. The output of a pad is zero. Pads are never read from x.
//
// Why. The simplest way runs both experts on all tokens and discards half of the results. A better way
// gathers the tokens of each expert, runs two ordinary matrix products, and scatters the results. It needs
// twice the launches, and it copies x and y through device memory. Here one launch serves both experts. The
// kernel gathers tokens while it loads them, scatters results while it stores them, and computes silu(gate) *
// up in registers. There are no atomics, and every sum has a fixed order, so the same inputs always give
// bitwise the same outputs.
//
// Layout. Once per forward pass, moe_route sorts the tokens by expert. The result stays on the device:
//     permutation = [ text tokens ... | visual tokens ... | pads ... ]   token indices, each part ascending
//     counts      = { number of text tokens, number of visual tokens }
// A *permuted index* is an index into this list, and *permuted order* is the order of the list. Seen as a
// GEMM, M = num_tokens, N = out_features and K = in_features.
//
// Tiles. The grid cuts the output into block tiles, and one thread block computes each of them. A block tile
// covers a *token tile*, which is up to BM consecutive permuted indices, and BN weight rows. An output column
// needs one weight row in moe_linear, and a row of w1 and a row of w3 in moe_swiglu. A new token tile starts
// at the first visual token, so no tile mixes two experts. The pads follow the visual tokens without such a
// break. Rounding up two parts instead of one adds at most one tile, so ceil(num_tokens / BM) + 1 token tiles
// suffice for every split, and the host can launch the kernel without knowing the counts. Each block reads
// the counts on the device, finds its expert and its tokens (find_token_tile), and returns at once if there
// are none. Since the host never waits for the device, a CUDA graph can capture all of it.
//
// Reading order: route_kernel; linear_naive_kernel, which is the whole idea in 20 lines; find_token_tile and
// the other parts that the tiled kernels share; gemm_kernel, for bf16 and fp16 on tensor cores since sm_80;
// wgmma_kernel, for those of Hopper GPUs; add_partial_sums_kernel, for sums that several blocks share
// (split-K); gemm_fp32_kernel; weight_gradient_kernel, for training; and the launchers, which Python calls.
//
// Floors. M·N·K multiply-adds for moe_linear, twice as many for moe_swiglu. The traffic is at least one read
// of each weight matrix in use, one read of x and one write of y. The FFN of the 2B model (widths 2048 and
// 8192) takes 100.7 Mflop per token in bf16, and each expert has 100.7 MB of weights. With few tokens,
// reading the weights takes most of the time. With many tokens, the products on the tensor cores do.
//
// What each refinement gains, in microseconds on an H100, for w1 and w3 of 3,392 tokens and for w2 of 64. The
// figures are from assets/moe_kernel_h100.json.
//                                                             w1, w3     w2
//     mma.sync, 128 x 128 weight rows, 64 x 32 for 64 tokens     592     50    gemm_kernel
//     wgmma, 128 x 256 and 64 x 64                               390     37    wgmma_kernel
//     the same, the sum split in 4 parts                                 20    add_partial_sums_kernel
//     torch: gather, cuBLAS and silu; cuBLAS and scatter         446     22
// No tile is the best for all products and numbers of tokens. So moe_kernel.py measures them on the device.
#include "cuda_on_cpu.h"

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };  // the numbers that Python passes
enum Expert { TEXT, VISUAL };               // every other number means pad

// What a routed product reads and writes. All matrices are row-major and contiguous, and start at a multiple
// of 16 bytes. in_features and out_features are multiples of 8. num_tokens includes the pads.
template <typename T> struct Problem {
    const T* x;                       // (num_tokens, in_features)
    const T *w_text, *w_visual;       // (out_features, in_features); in SwiGLU this is w1, the gate
    const T *w3_text, *w3_visual;     // (out_features, in_features); in SwiGLU only: w3, the up projection
    T* y;                             // (num_tokens, out_features)
    const int64_t *gather, *scatter;  // the permutation; null if x, or y, is in permuted order already
    const int64_t* counts;
    int num_tokens, in_features, out_features;
    float* partial_sums;              // (splits, num_tokens, out_features) in permuted order, or null
    int splits;                       // how many blocks share the sum of an output, each over a part of K
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline void from_float(float& to, float v) { to = v; }
__device__ inline void from_float(__nv_bfloat16& to, float v) { to = __float2bfloat16(v); }
__device__ inline void from_float(__half& to, float v) { to = __float2half(v); }

// ---------------------------------------------------------------- routing

// A stable partition by a single block. Each thread counts the experts in its own segment of the tokens. An
// inclusive scan over the threads then gives the place in each part of the list where its segment begins.
// Finally the thread walks through its segment again and writes the token indices. They are int64 because
// PyTorch indexes with the permutation too. The 8 bytes per token are negligible beside a row of x.
constexpr int ROUTE_THREADS = 256;
__global__ void __launch_bounds__(ROUTE_THREADS)
route_kernel(const uint8_t* expert, int64_t* permutation, int64_t* counts, int num_tokens) {
    DYNAMIC_SHARED(int, text_scan);  // after the scan, [t] counts the segments of threads 0 to t
    int* const visual_scan = text_scan + ROUTE_THREADS;
    const int t = threadIdx.x, segment = (num_tokens + ROUTE_THREADS - 1) / ROUTE_THREADS;
    const int begin = min(num_tokens, t * segment), end = min(num_tokens, begin + segment);
    int text = 0, visual = 0;
    for (int i = begin; i < end; i++) text += expert[i] == TEXT, visual += expert[i] == VISUAL;
    text_scan[t] = text;
    visual_scan[t] = visual;
    __syncthreads();
    for (int distance = 1; distance < ROUTE_THREADS; distance *= 2) {  // sums over 2, 4, 8, ... threads
        const int more_text = t >= distance ? text_scan[t - distance] : 0;
        const int more_visual = t >= distance ? visual_scan[t - distance] : 0;
        __syncthreads();  // all threads have read before any writes
        text_scan[t] += more_text;
        visual_scan[t] += more_visual;
        __syncthreads();
    }
    const int num_text = text_scan[ROUTE_THREADS - 1], num_visual = visual_scan[ROUTE_THREADS - 1];
    int next_text = text_scan[t] - text, next_visual = visual_scan[t] - visual;  // what earlier segments hold
    int next_pad = num_text + num_visual + begin - next_text - next_visual;
    next_visual += num_text;
    for (int i = begin; i < end; i++)
        permutation[expert[i] == TEXT ? next_text++ : expert[i] == VISUAL ? next_visual++ : next_pad++] = i;
    if (t == 0) counts[0] = num_text, counts[1] = num_visual;
}

// ---------------------------------------------------------------- the idea: one thread per output element

template <typename T> __global__ void linear_naive_kernel(const Problem<T> p) {
    const int64_t element = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= int64_t(p.num_tokens) * p.out_features) return;
    const int64_t permuted_index = element / p.out_features, column = element % p.out_features;
    const int64_t x_row = p.gather ? p.gather[permuted_index] : permuted_index;
    const int64_t y_row = p.scatter ? p.scatter[permuted_index] : permuted_index;
    const int64_t num_text = p.counts[0], pads_begin = num_text + p.counts[1];
    const T* w_row = (permuted_index < num_text ? p.w_text : p.w_visual) + column * p.in_features;
    float sum = 0;
    if (permuted_index < pads_begin)
        for (int k = 0; k < p.in_features; k++)
            sum += to_float(p.x[x_row * p.in_features + k]) * to_float(w_row[k]);
    from_float(p.y[y_row * p.out_features + column], sum);
}
// Why it is slow: every thread loads 2·K numbers for K multiply-adds. If the threads of a block share what
// they load, a tile of BM x BN outputs needs only (BM + BN)·K numbers for BM·BN·K multiply-adds. Shared
// memory is the place where they share it.

// ---------------------------------------------------------------- what the tiled kernels share

struct TokenTile {
    int begin, end;  // the permuted indices whose outputs the block writes; empty if begin >= end
    int pads_begin;  // permuted indices from here on are pads; their outputs need no product
    bool visual;     // the expert
};
__device__ inline TokenTile find_token_tile(int token_tile, int BM, const int64_t* counts, int num_tokens) {
    const int num_text = int(counts[0]), pads_begin = num_text + int(counts[1]);
    const int num_text_tiles = (num_text + BM - 1) / BM;
    if (token_tile < num_text_tiles)  // it ends before the visual tokens, so it holds no pads
        return {token_tile * BM, min(num_text, token_tile * BM + BM), num_text, false};
    const int begin = num_text + (token_tile - num_text_tiles) * BM;
    return {begin, min(num_tokens, begin + BM), pads_begin, true};
}

// The GPU starts blocks in the order x, y, z. The y index counts the column tiles. The token tiles are cut
// into bands: the x index counts the token tiles of one band, and the z index counts the bands, and in each
// band the splits. So blocks that run at the same time share a weight tile while it is in the L2 cache. Every
// column tile reads all rows of x in the band again; as a band is short, many of them are still in L2.
constexpr int BAND = 32;  // token tiles
__device__ inline int token_tile_of_block(int splits) { return blockIdx.z / splits * BAND + blockIdx.x; }

template <typename T> struct alignas(16) Vector {  // loaded or stored by one 16-byte access
    static constexpr int SIZE = 16 / sizeof(T);
    T v[SIZE];
};

__device__ inline float silu(float v) { return v / (1 + expf(-v)); }
// Fewer instructions. By the CUDA programming guide, the relative error is below (5 + 1.2 |v|) · 2^-23, and
// the result may be 0 where v is below -87. Neither matters in 16 bits.
__device__ inline float fast_silu(float v) { return __fdividef(v, 1 + __expf(-v)); }

// Writes 16 bytes of one row of y, from fp32 sums. out_features is a multiple of 8, so a vector lies entirely
// inside the row or entirely outside of it.
template <typename T>
__device__ inline void store_vector(const Problem<T>& p, int64_t y_row, int column,
                                    const float (&sum)[Vector<T>::SIZE], bool is_pad) {
    if (column >= p.out_features) return;
    Vector<T> result;
    for (int i = 0; i < Vector<T>::SIZE; i++) from_float(result.v[i], is_pad ? 0 : sum[i]);
    *reinterpret_cast<Vector<T>*>(p.y + y_row * p.out_features + column) = result;
}

// ---------------------------------------------------------------- bf16 and fp16: what the tiles share

// A block computes BM tokens x BN weight rows, BK numbers along K at a time. It consists of WARPS_M x WARPS_N
// warps, and each warp computes a warp tile of WM x WN. Shared memory holds a ring of STAGES stages: while
// the warps multiply one stage, cp.async fills others. BLOCKS and PENDING belong to wgmma_kernel.
template <int BM_, int BN_, int BK_, int WARPS_M_, int WARPS_N_, int STAGES_, int BLOCKS_ = 1,
          int PENDING_ = 0>
struct BlockTile {
    static constexpr int BM = BM_, BN = BN_, BK = BK_, STAGES = STAGES_;
    static constexpr int BLOCKS = BLOCKS_, PENDING = PENDING_;
    static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_, WM = BM / WARPS_M, WN = BN / WARPS_N;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N;
    static constexpr int STAGE_SIZE = (BM + BN) * BK, SHARED_BYTES = STAGES * STAGE_SIZE * 2;
};

// Which weights lie in which row of the weight tile in shared memory. The product would allow any order. This
// one makes the epilogue cheap. mma leaves lane l with the sums of tile rows 8g + 2q and 8g + 2q + 1 in every
// group g of 8 tile rows, where q is l % 4. Four consecutive groups, h = 0 to 3, serve 32 columns: tile row
// 8h + 2q + i holds the weights of column 8q + 2h + i. So the four pairs of a lane are the 8 adjacent columns
// 8q to 8q + 7, and one 16-byte access stores them. In SwiGLU, the first half of a warp's rows is from w1 and
// the second half from w3, so that the gate and the up value of an output are in the same lane.
template <typename Tile, bool SWIGLU> __device__ inline int column_of_weight_row(int tile_row) {
    constexpr int COLUMNS = SWIGLU ? Tile::WN / 2 : Tile::WN;  // of a warp
    const int row = tile_row % COLUMNS, h = row / 8 % 4, q = row % 8 / 2, i = row % 2;
    return tile_row / Tile::WN * COLUMNS + row / 32 * 32 + 8 * q + 2 * h + i;
}

// Loading. A row of a shared-memory tile consists of 16-byte chunks. Adjacent threads load adjacent chunks of
// a row, and all threads together load ROWS_PER_PASS rows in one pass. A thread loads the same rows at every
// step along K, so it computes their addresses only once.
template <typename T, typename Tile, bool SWIGLU> struct TileLoader {
    static constexpr int BM = Tile::BM, BN = Tile::BN, BK = Tile::BK;
    static constexpr int CHUNKS = BK / 8, ROWS_PER_PASS = Tile::THREADS / CHUNKS;
    static_assert(BM % ROWS_PER_PASS == 0 && BN % ROWS_PER_PASS == 0 && ROWS_PER_PASS % 8 == 0,
                  "whole passes fill a tile, and row % 8, on which the swizzle depends, is the same in each");
    // The swizzle. ldmatrix and wgmma read the same chunk of 8 consecutive tile rows at once. The 32 banks of
    // shared memory serve 128 bytes at a time, and 64 / BK tile rows fill 128 bytes. Without a swizzle,
    // several of the 8 chunks would be in the same banks. So chunk c of tile row r is stored as chunk
    // c ^ (r % 8 / ROWS_PER_128_BYTES), which spreads the 8 chunks over all banks.
    static constexpr int ROWS_PER_128_BYTES = 64 / BK;

    const T *x_sources[BM / ROWS_PER_PASS], *w_sources[BN / ROWS_PER_PASS];  // null: no such row, load zeros
    const T* x;
    T* destination;
    int first_k, in_features, num_k_tiles;

    __device__ TileLoader(const Problem<T>& p, const TokenTile& tokens, int first_column, T* shared) {
        const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
#pragma unroll
        for (int i = 0; i < BM / ROWS_PER_PASS; i++) {
            const int permuted_index = tokens.begin + row + i * ROWS_PER_PASS;
            x_sources[i] = nullptr;
            if (permuted_index < tokens.end && permuted_index < tokens.pads_begin)
                x_sources[i] = p.x + (p.gather ? p.gather[permuted_index] : permuted_index) * p.in_features;
        }
        const T* const w1 = tokens.visual ? p.w_visual : p.w_text;
        const T* const w3 = tokens.visual ? p.w3_visual : p.w3_text;
#pragma unroll
        for (int i = 0; i < BN / ROWS_PER_PASS; i++) {
            const int tile_row = row + i * ROWS_PER_PASS;
            const int column = first_column + column_of_weight_row<Tile, SWIGLU>(tile_row);
            const T* const w = SWIGLU && tile_row % Tile::WN >= Tile::WN / 2 ? w3 : w1;
            w_sources[i] = column < p.out_features ? w + int64_t(column) * p.in_features : nullptr;
        }
        x = p.x;
        destination = shared + row * BK + (chunk ^ row % 8 / ROWS_PER_128_BYTES) * 8;
        // Each split takes an equal part of the K tiles. A tile of pads alone needs no product.
        const int all = (p.in_features + BK - 1) / BK, part = (all + p.splits - 1) / p.splits;
        const int first = min(all, int(blockIdx.z % p.splits) * part);
        num_k_tiles = tokens.begin < tokens.pads_begin ? min(all - first, part) : 0;
        first_k = first * BK + chunk * 8;  // K is a multiple of 8, so no chunk crosses its end
        in_features = p.in_features;
    }
    __device__ void operator()(int k_tile) const {
        if (k_tile < num_k_tiles) {
            T* const to = destination + k_tile % Tile::STAGES * Tile::STAGE_SIZE;
            const int k = first_k + k_tile * BK;
            auto copy = [&](int tile_row, const T* source) {
                const bool exists = source != nullptr && k < in_features;
                cp_async16(to + tile_row * BK, exists ? source + k : x, exists ? 16 : 0);
            };
#pragma unroll
            for (int i = 0; i < BM / ROWS_PER_PASS; i++) copy(i * ROWS_PER_PASS, x_sources[i]);
#pragma unroll
            for (int i = 0; i < BN / ROWS_PER_PASS; i++) copy(BM + i * ROWS_PER_PASS, w_sources[i]);
        }
        // Every call commits one group, even an empty one past the last K tile: cp_async_wait counts groups.
        cp_async_commit();
    }
};

// The epilogue. Of every 16 tokens a lane holds two, 8 apart. Of every 32 columns it holds 8 adjacent ones
// (see column_of_weight_row).
template <typename Tile, bool SWIGLU, typename T>
__device__ inline void store_tile(const Problem<T>& p, const TokenTile& tokens, int first_column,
                                  const float (&sum)[Tile::WM / 16][Tile::WN / 8][4]) {
    constexpr int COLUMNS = SWIGLU ? Tile::WN / 2 : Tile::WN;  // of a warp
    static_assert(COLUMNS % 32 == 0, "a warp stores 32 columns at a time");
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < Tile::WM / 16 * 2; i++) {
        const int permuted_index = tokens.begin + warp % Tile::WARPS_M * Tile::WM + i * 8 + lane / 4;
        if (permuted_index >= tokens.end) break;
        const int64_t y_row = p.scatter ? p.scatter[permuted_index] : permuted_index;
#pragma unroll
        for (int j = 0; j < COLUMNS / 32; j++) {
            float result[8];
#pragma unroll
            for (int c = 0; c < 8; c++) {
                const int group = j * 4 + c / 2, element = i % 2 * 2 + c % 2;
                result[c] = sum[i / 2][group][element];
                if (SWIGLU) result[c] = fast_silu(result[c]) * sum[i / 2][group + COLUMNS / 8][element];
            }
            const int column = first_column + warp / Tile::WARPS_M * COLUMNS + j * 32 + lane % 4 * 8;
            if (!p.partial_sums) {
                store_vector(p, y_row, column, result, permuted_index >= tokens.pads_begin);
            } else if (column < p.out_features) {
                const int64_t row = int64_t(blockIdx.z % p.splits) * p.num_tokens + permuted_index;
                float* const sums = p.partial_sums + row * p.out_features + column;
                auto* const to = reinterpret_cast<Vector<float>*>(sums);
                to[0] = {result[0], result[1], result[2], result[3]};
                to[1] = {result[4], result[5], result[6], result[7]};
            }
        }
    }
}

// ---------------------------------------------------------------- bf16 and fp16: tensor cores since sm_80

template <typename T, typename Tile, bool SWIGLU>  // Tile: a BlockTile
__global__ void __launch_bounds__(Tile::THREADS) gemm_kernel(const Problem<T> p) {
    constexpr int BM = Tile::BM, BK = Tile::BK, STAGES = Tile::STAGES, WM = Tile::WM, WN = Tile::WN;
    const TokenTile tokens = find_token_tile(token_tile_of_block(p.splits), BM, p.counts, p.num_tokens);
    if (tokens.begin >= tokens.end) return;
    const int first_column = blockIdx.y * (Tile::BN / (SWIGLU ? 2 : 1));
    DYNAMIC_SHARED(T, shared);  // STAGES x (BM rows of x, then BN weight rows) x BK
    const TileLoader<T, Tile, SWIGLU> load(p, tokens, first_column, shared);

    // Multiplying. Matrix A of mma is the tile of x, and matrix B is the weight tile. sum[i][j] holds 16 x 8
    // outputs of the warp tile, from row 16i of A and row 8j of the weight tile on, spread over the lanes as
    // mma leaves them. ldmatrix loads four 8 x 8 matrices and takes from each lane the address of one of
    // their rows. For A these matrices are rows 0-7 and 8-15 of one chunk, then the same rows of the next
    // chunk. For B they are both chunks of rows 0-7, then both chunks of rows 8-15.
    float sum[WM / 16][WN / 8][4] = {};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int a_row = warp % Tile::WARPS_M * WM + lane % 16;
    const int b_row = BM + warp / Tile::WARPS_M * WN + lane / 16 * 8 + lane % 8;
    const int swizzle = lane % 8 / load.ROWS_PER_128_BYTES;
    auto multiply = [&](const T* stage) {
#pragma unroll
        for (int chunk = 0; chunk < BK / 8; chunk += 2) {  // two chunks are the 16 numbers along K of one mma
            uint32_t a[WM / 16][4], b[WN / 16][4];
#pragma unroll
            for (int i = 0; i < WM / 16; i++)
                ldmatrix_x4(a[i], stage + (a_row + i * 16) * BK + ((chunk + lane / 16) ^ swizzle) * 8);
#pragma unroll
            for (int j = 0; j < WN / 16; j++)
                ldmatrix_x4(b[j], stage + (b_row + j * 16) * BK + ((chunk + lane / 8 % 2) ^ swizzle) * 8);
#pragma unroll
            for (int i = 0; i < WM / 16; i++)
#pragma unroll
                for (int j = 0; j < WN / 8; j++)
                    mma_m16n8k16(T(), sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    };

    for (int k_tile = 0; k_tile < STAGES - 1; k_tile++) load(k_tile);
    for (int k_tile = 0; k_tile < load.num_k_tiles; k_tile++) {
        cp_async_wait<STAGES - 2>();  // this thread's copies of k_tile have arrived
        __syncthreads();              // now those of all threads have, and no thread still reads k_tile - 1
        load(k_tile + STAGES - 1);    // so this may overwrite the stage of k_tile - 1
        multiply(shared + k_tile % STAGES * Tile::STAGE_SIZE);
    }
    store_tile<Tile, SWIGLU>(p, tokens, first_column, sum);
}

// ---------------------------------------------------------------- bf16 and fp16: tensor cores of Hopper

// A warp of gemm_kernel moves every number from shared memory to registers before it can multiply it, and
// mma.sync does not reach the full rate of Hopper's tensor cores. wgmma (sm_90a only) reads both matrices
// from shared memory itself. One instruction multiplies 64 rows of A by up to 256 rows of B, and a
// *warpgroup* executes it: four warps, and the number of the first is a multiple of four. It leaves the sums
// in the registers where mma would, 16 rows in each warp. So loading and the epilogue stay. New are:
//   - The descriptor. wgmma takes a 64-bit number for each matrix: its address, the distance of two groups of
//     8 rows, and the kind of swizzle. With BK = 64 our swizzle is the one that is called "128 bytes". The
//     next 16 numbers along K are 32 bytes further, so we add 2 to the address, which counts 16 bytes.
//   - wgmma is asynchronous. wgmma_commit closes a group, and wgmma_wait<n> waits until at most n groups are
//     incomplete. With PENDING = 1 the tensor cores already have the next group while the warps wait at the
//     barrier. A stage is then free one step later, so only AHEAD K tiles are loaded ahead.
//   - Two fences. wgmma_fence keeps other uses of the sums apart from those by wgmma. And wgmma does not read
//     shared memory on the path by which threads write it: fence_proxy_async, in the thread whose copies have
//     arrived and before the barrier, makes them visible to it.
template <typename T, typename Tile, bool SWIGLU>
__global__ void __launch_bounds__(Tile::THREADS, Tile::BLOCKS) wgmma_kernel(const Problem<T> p) {
    constexpr int BM = Tile::BM, BN = Tile::BN, BK = Tile::BK, STAGES = Tile::STAGES;
    constexpr int AHEAD = STAGES - 1 - Tile::PENDING;
    static_assert(BK == 64 && BM == Tile::THREADS / 128 * 64 && BN == Tile::WN, "64 x BN for a warpgroup");
    const TokenTile tokens = find_token_tile(token_tile_of_block(p.splits), BM, p.counts, p.num_tokens);
    if (tokens.begin >= tokens.end) return;
    const int first_column = blockIdx.y * (BN / (SWIGLU ? 2 : 1));
    DYNAMIC_SHARED(T, shared);  // STAGES x (BM rows of x, then BN weight rows) x BK
    const TileLoader<T, Tile, SWIGLU> load(p, tokens, first_column, shared);

    float sum[1][BN / 8][4] = {};
    const int first_row = threadIdx.x / 128 * 64;  // of this warpgroup
    const uint64_t a = wgmma_descriptor(shared + first_row * BK), b = wgmma_descriptor(shared + BM * BK);
    for (int i = 0; i < AHEAD; i++) load(i);
    // A warpgroup without tokens multiplies nothing. It still loads and waits with the others.
    const bool has_tokens = tokens.begin + first_row < min(tokens.end, tokens.pads_begin);
    for (int k_tile = 0; k_tile < load.num_k_tiles; k_tile++) {
        cp_async_wait<AHEAD - 1>();
        fence_proxy_async();
        __syncthreads();
        if (has_tokens) {
            wgmma_fence();
            const int stage = k_tile % STAGES * (Tile::STAGE_SIZE / 8);  // in units of 16 bytes
#pragma unroll
            for (int k = 0; k < BK / 16; k++) wgmma(T(), sum[0], a + stage + 2 * k, b + stage + 2 * k);
            wgmma_commit();
        }
        load(k_tile + AHEAD);  // overwrites a stage that was free when all threads were at the barrier
        wgmma_wait<Tile::PENDING>();
    }
    wgmma_wait<0>();
    for (int j = 0; j < BN / 8; j++) not_before(sum[0][j]);
    store_tile<Tile, SWIGLU>(p, tokens, first_column, sum);
}

// ---------------------------------------------------------------- split-K

// With few tokens there are fewer block tiles than multiprocessors: w2 has 32 tiles of 64 columns. Then
// several blocks share a tile, each sums over a part of K, and they write their sums in fp32 to partial_sums.
// This kernel adds them, always in the same order, so the result does not depend on which block finishes
// first. The price is 4 · splits bytes of memory for every output, written once and read once.
template <typename T> __global__ void add_partial_sums_kernel(const Problem<T> p) {
    const int64_t size = int64_t(p.num_tokens) * p.out_features;
    const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * 8;
    if (first >= size) return;
    const int permuted_index = int(first / p.out_features), column = int(first % p.out_features);
    float sum[8] = {};
    for (int split = 0; split < p.splits; split++) {
        const float* const part = p.partial_sums + split * size + first;
        const auto low = *reinterpret_cast<const Vector<float>*>(part);
        const auto high = *reinterpret_cast<const Vector<float>*>(part + 4);
        for (int i = 0; i < 4; i++) sum[i] += low.v[i], sum[4 + i] += high.v[i];
    }
    store_vector(p, p.scatter ? p.scatter[permuted_index] : permuted_index, column, sum,
                 permuted_index >= p.counts[0] + p.counts[1]);
}

// ---------------------------------------------------------------- fp32: FMAs on the CUDA cores

// A block of 64 threads computes 64 tokens x 64 weight rows, 8 x 8 sums per thread. For every step along K a
// thread reads 16 numbers from shared memory and makes 64 multiply-adds. Both tiles are stored transposed,
// [K][row], so that a thread reads several rows of one k as a 16-byte vector. Four of its weight rows are in
// the first half of the tile and four in the second. So the threads that read together read consecutive
// vectors, which avoids bank conflicts. In SwiGLU the first half holds w1 and the second half w3. The 4
// floats of padding keep the vectors aligned and halve the bank conflicts of the transposed stores.
constexpr int F32_B = 64, F32_BK = 16, F32_STRIDE = F32_B + 4, F32_THREADS = 64;
constexpr int F32_SHARED_BYTES = 2 * F32_BK * F32_STRIDE * 4;
template <bool SWIGLU>
__global__ void __launch_bounds__(F32_THREADS) gemm_fp32_kernel(const Problem<float> p) {
    const TokenTile tokens = find_token_tile(token_tile_of_block(1), F32_B, p.counts, p.num_tokens);
    if (tokens.begin >= tokens.end) return;
    const int first_column = blockIdx.y * (SWIGLU ? F32_B / 2 : F32_B);
    DYNAMIC_SHARED(float, x_tile);  // [F32_BK][F32_STRIDE], followed by w_tile of the same shape
    float* const w_tile = x_tile + F32_BK * F32_STRIDE;
    const int thread = threadIdx.x, load_row = thread / 4, load_k = thread % 4 * 4;  // 4 threads load a row
    const float* const w1 = tokens.visual ? p.w_visual : p.w_text;
    const float* const w3 = tokens.visual ? p.w3_visual : p.w3_text;
    const float *x_sources[4], *w_sources[4];  // null: no such row, load zeros
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int tile_row = load_row + i * 16, permuted_index = tokens.begin + tile_row;
        x_sources[i] = nullptr;
        if (permuted_index < tokens.end && permuted_index < tokens.pads_begin)
            x_sources[i] = p.x + (p.gather ? p.gather[permuted_index] : permuted_index) * p.in_features;
        const int column = first_column + (SWIGLU ? tile_row % 32 : tile_row);
        w_sources[i] = nullptr;
        if (column < p.out_features)
            w_sources[i] = (SWIGLU && tile_row >= 32 ? w3 : w1) + int64_t(column) * p.in_features;
    }
    auto load = [&](float* shared_tile, int tile_row, const float* source, int k) {
        Vector<float> four{};
        if (source != nullptr && k < p.in_features)
            four = *reinterpret_cast<const Vector<float>*>(source + k);
#pragma unroll
        for (int i = 0; i < 4; i++) shared_tile[(load_k + i) * F32_STRIDE + tile_row] = four.v[i];
    };
    const int a_row = thread / 8 * 8, b_row = thread % 8 * 4;  // where this thread reads x_tile and w_tile
    float sum[8][8] = {};
    for (int k = 0; k < (tokens.begin < tokens.pads_begin ? p.in_features : 0); k += F32_BK) {
        __syncthreads();  // no thread still reads the previous tiles
#pragma unroll
        for (int i = 0; i < 4; i++) load(x_tile, load_row + i * 16, x_sources[i], k + load_k);
#pragma unroll
        for (int i = 0; i < 4; i++) load(w_tile, load_row + i * 16, w_sources[i], k + load_k);
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < F32_BK; kk++) {
            Vector<float> a[2], b[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                a[half] = *reinterpret_cast<Vector<float>*>(x_tile + kk * F32_STRIDE + a_row + half * 4);
                b[half] = *reinterpret_cast<Vector<float>*>(w_tile + kk * F32_STRIDE + b_row + half * 32);
            }
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) sum[i][j] += a[i / 4].v[i % 4] * b[j / 4].v[j % 4];
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int permuted_index = tokens.begin + a_row + i;
        if (permuted_index >= tokens.end) break;
        const int64_t y_row = p.scatter ? p.scatter[permuted_index] : permuted_index;
#pragma unroll
        for (int half = 0; half < (SWIGLU ? 1 : 2); half++) {
            float result[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                result[j] = SWIGLU ? silu(sum[i][j]) * sum[i][4 + j] : sum[i][half * 4 + j];
            const int column = first_column + b_row + half * 32;
            store_vector(p, y_row, column, result, permuted_index >= tokens.pads_begin);
        }
    }
}

// ---------------------------------------------------------------- the gradient of the weights

// Training needs dw_e = dy_e^T · x_e for each expert that learns: the gradient of a weight is a sum over the
// tokens of its expert. dy and x are in permuted order, so these tokens are consecutive rows, and the counts
// say where they begin and end. A block computes GRAD_B x GRAD_B weights of one expert. Along the sum it
// loads GRAD_TOKENS rows of dy and of x at a time, into a ring of stages as in gemm_kernel. A row in shared
// memory is a token, but mma sums along the rows of A, so ldmatrix transposes what it loads. A row has 16
// chunks, and chunk c of row r is stored as c ^ (r % 8): so 8 rows of a chunk are in different banks.
constexpr int GRAD_B = 128, GRAD_TOKENS = 32, GRAD_STAGES = 3;
constexpr int GRAD_THREADS = 128;  // 2 x 2 warps, each for 64 x 64 weights
constexpr int GRAD_STAGE_SIZE = 2 * GRAD_TOKENS * GRAD_B;
constexpr int GRAD_SHARED_BYTES = GRAD_STAGES * GRAD_STAGE_SIZE * 2;
template <typename T>
__global__ void __launch_bounds__(GRAD_THREADS)
weight_gradient_kernel(const T* dy, const T* x, T* dw, const int64_t* counts, int out_features,
                       int in_features, int first_expert) {
    const bool visual = first_expert + blockIdx.z == VISUAL;
    const int first_row = blockIdx.x * GRAD_B, first_column = blockIdx.y * GRAD_B;  // of dw
    const int64_t first_token = visual ? counts[TEXT] : 0;
    const int num_tokens = int(counts[visual]), num_tiles = (num_tokens + GRAD_TOKENS - 1) / GRAD_TOKENS;
    DYNAMIC_SHARED(T, shared);  // GRAD_STAGES x (GRAD_TOKENS rows of dy, then as many rows of x) x GRAD_B

    const int load_row = threadIdx.x / 16, load_chunk = threadIdx.x % 16;  // 8 rows in one pass
    auto load = [&](int tile) {
        if (tile < num_tiles) {
            T* const stage = shared + tile % GRAD_STAGES * GRAD_STAGE_SIZE;
            auto copy = [&](int tile_row, const T* from, int token, int column, int width) {
                const bool exists = token < num_tokens && column < width;
                T* const to = stage + tile_row * GRAD_B + (load_chunk ^ load_row) * 8;
                cp_async16(to, exists ? from + (first_token + token) * width + column : from, exists ? 16 : 0);
            };
#pragma unroll
            for (int i = 0; i < GRAD_TOKENS; i += 8) {
                const int token = tile * GRAD_TOKENS + load_row + i;
                copy(load_row + i, dy, token, first_row + load_chunk * 8, out_features);
                copy(load_row + i + GRAD_TOKENS, x, token, first_column + load_chunk * 8, in_features);
            }
        }
        cp_async_commit();
    };

    // A lane passes the address of a row of 8 numbers, as in gemm_kernel. For A the four matrices are two
    // chunks of 8 tokens, then the same chunks of the next 8 tokens. For B they are 16 tokens of a chunk,
    // then the same tokens of the next chunk.
    float sum[4][8][4] = {};
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int a_token = lane / 16 * 8 + lane % 8, a_chunk = warp % 2 * 8 + lane / 8 % 2;
    const int b_token = lane / 8 % 2 * 8 + lane % 8, b_chunk = warp / 2 * 8 + lane / 16;
    auto multiply = [&](const T* stage) {
#pragma unroll
        for (int token = 0; token < GRAD_TOKENS; token += 16) {
            uint32_t a[4][4], b[4][4];
            const T* const a_row = stage + (token + a_token) * GRAD_B;
            const T* const b_row = stage + (GRAD_TOKENS + token + b_token) * GRAD_B;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                ldmatrix_x4_transposed(a[i], a_row + ((a_chunk + 2 * i) ^ lane % 8) * 8);
                ldmatrix_x4_transposed(b[i], b_row + ((b_chunk + 2 * i) ^ lane % 8) * 8);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 8; j++)
                    mma_m16n8k16(T(), sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    };
    for (int tile = 0; tile < GRAD_STAGES - 1; tile++) load(tile);
    for (int tile = 0; tile < num_tiles; tile++) {
        cp_async_wait<GRAD_STAGES - 2>();
        __syncthreads();
        load(tile + GRAD_STAGES - 1);
        multiply(shared + tile % GRAD_STAGES * GRAD_STAGE_SIZE);
    }

    struct alignas(4) Pair { T v[2]; };
    T* const dw_e = dw + blockIdx.z * int64_t(out_features) * in_features;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int row = first_row + warp % 2 * 64 + i * 8 + lane / 4;
        if (row >= out_features) break;
#pragma unroll
        for (int j = 0; j < 8; j++) {
            const int column = first_column + warp / 2 * 64 + j * 8 + lane % 4 * 2;
            if (column >= in_features) break;
            Pair pair;
            from_float(pair.v[0], sum[i / 2][j][i % 2 * 2]);
            from_float(pair.v[1], sum[i / 2][j][i % 2 * 2 + 1]);
            *reinterpret_cast<Pair*>(dw_e + int64_t(row) * in_features + column) = pair;
        }
    }
}

// ---------------------------------------------------------------- launching

static int div_up(int a, int b) { return (a + b - 1) / b; }

static dim3 tile_grid(int num_tokens, int out_features, int BM, int columns_per_block, int splits) {
    const int num_token_tiles = div_up(num_tokens, BM) + 1;
    return dim3(min(num_token_tiles, BAND), div_up(out_features, columns_per_block),
                div_up(num_token_tiles, BAND) * splits);
}

template <typename Tile, bool SWIGLU, typename T>
static int launch_block_tile(const Problem<T>& p, void (*kernel)(Problem<T>), cudaStream_t stream) {
    // A kernel may use more than 48 KB of shared memory only if this attribute allows it. The attribute is
    // set per device, so we set it before every launch.
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::SHARED_BYTES);
    if (error != cudaSuccess) return cudaGetLastError();  // takes it away, or the next launch would return it
    const dim3 grid =
        tile_grid(p.num_tokens, p.out_features, Tile::BM, SWIGLU ? Tile::BN / 2 : Tile::BN, p.splits);
    LAUNCH(kernel, grid, Tile::THREADS, Tile::SHARED_BYTES, stream, p);
    if (p.partial_sums) {
        const auto add_kernel = add_partial_sums_kernel<T>;
        const int64_t blocks = (int64_t(p.num_tokens) * p.out_features / 8 + 127) / 128;
        LAUNCH(add_kernel, dim3(unsigned(blocks)), 128, 0, stream, p);
    }
    return cudaGetLastError();
}

// AUTO is a guess for CPUs, where no tile is chosen by measuring. NAIVE runs linear_naive_kernel.
enum TileConfig { AUTO, SMALL, MEDIUM, LARGE, NAIVE, HOPPER_64x64, HOPPER_64x128, HOPPER_128x192,
                  HOPPER_128x256, MEDIUM_3, LARGE_3 };

// Large tiles load the fewest bytes from L2 per multiply-add. With few tokens, most of the time goes into
// reading the weights. Small tiles then give every multiprocessor a block, and their ring of stages keeps
// many bytes in flight. A multiprocessor of sm_86, 89 or 120 has 100 KB of shared memory, room for one block
// of the first three tiles. Two blocks of MEDIUM_3 or LARGE_3 fit, and one computes while the other waits. On
// Hopper two blocks of the smaller tiles of wgmma_kernel fit. RESULTS.md lists all registers and bytes.
template <bool SWIGLU, typename T>
static int launch_gemm(const Problem<T>& p, int tile_config, cudaStream_t stream) {
    int device = 0, capability = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device);
    const bool hopper = tile_config >= HOPPER_64x64 && tile_config <= HOPPER_128x256;
    if (hopper && capability != 9) return cudaErrorInvalidValue;
    if (tile_config == AUTO) tile_config = p.num_tokens <= 64 ? SMALL : p.num_tokens <= 1024 ? MEDIUM : LARGE;
#define TILE(CONFIG, KERNEL, ...)                                                                           \
    case CONFIG: return launch_block_tile<BlockTile<__VA_ARGS__>, SWIGLU>(                                  \
        p, KERNEL<T, BlockTile<__VA_ARGS__>, SWIGLU>, stream);
    switch (tile_config) {  // BM, BN, BK, WARPS_M, WARPS_N, STAGES, and for wgmma BLOCKS, PENDING
        TILE(SMALL, gemm_kernel, 64, SWIGLU ? 64 : 32, 64, 4, 1, SWIGLU ? 4 : 8)
        TILE(MEDIUM, gemm_kernel, 64, 128, 64, 2, 2, 4)
        TILE(LARGE, gemm_kernel, 128, 128, 32, 2, 2, 4)
        TILE(MEDIUM_3, gemm_kernel, 64, 128, 32, 2, 2, 3)
        TILE(LARGE_3, gemm_kernel, 128, 128, 32, 2, 2, 3)
        TILE(HOPPER_64x64, wgmma_kernel, 64, 64, 64, 4, 1, 6, 2, 1)
        TILE(HOPPER_64x128, wgmma_kernel, 64, 128, 64, 4, 1, 4, 2, 0)
        TILE(HOPPER_128x192, wgmma_kernel, 128, 192, 64, 8, 1, 5, 1, 1)
        TILE(HOPPER_128x256, wgmma_kernel, 128, 256, 64, 8, 1, 4, 1, 1)
    }
    return cudaErrorInvalidValue;
}

template <bool SWIGLU>
static int launch_gemm(const Problem<float>& p, int /*tile_config: fp32 has only one*/, cudaStream_t stream) {
    const auto kernel = gemm_fp32_kernel<SWIGLU>;
    const dim3 grid = tile_grid(p.num_tokens, p.out_features, F32_B, SWIGLU ? F32_B / 2 : F32_B, 1);
    LAUNCH(kernel, grid, F32_THREADS, F32_SHARED_BYTES, stream, p);
    return cudaGetLastError();
}

template <bool SWIGLU, typename T>
static int launch_product(const Problem<T>& p, int tile_config, cudaStream_t stream) {
    if (p.num_tokens == 0 || p.out_features == 0) return cudaSuccess;  // CUDA rejects an empty grid
    if (tile_config != NAIVE) return launch_gemm<SWIGLU>(p, tile_config, stream);
    const auto kernel = linear_naive_kernel<T>;
    const int64_t blocks = (int64_t(p.num_tokens) * p.out_features + 255) / 256;
    if (SWIGLU || blocks > INT32_MAX) return cudaErrorInvalidValue;
    LAUNCH(kernel, dim3(unsigned(blocks)), 256, 0, stream, p);
    return cudaGetLastError();
}

struct UntypedProblem {  // a Problem as Python passes it, with its element type known only at run time
    const void *x, *w_text, *w_visual, *w3_text, *w3_visual;
    void* y;
    const int64_t *gather, *scatter, *counts;
    int num_tokens, in_features, out_features;
    float* partial_sums;
    int splits;
    template <typename T> Problem<T> as() const {
        auto typed = [](const void* pointer) { return static_cast<const T*>(pointer); };
        return {typed(x), typed(w_text), typed(w_visual), typed(w3_text), typed(w3_visual),
                static_cast<T*>(y), gather, scatter, counts, num_tokens, in_features, out_features,
                partial_sums, splits};
    }
};
template <bool SWIGLU>
static int launch_for_dtype(const UntypedProblem& p, int dtype, int tile_config, cudaStream_t stream) {
    if (dtype == FLOAT32) return launch_product<SWIGLU>(p.as<float>(), tile_config, stream);
    if (dtype == BFLOAT16) return launch_product<SWIGLU>(p.as<__nv_bfloat16>(), tile_config, stream);
    if (dtype == FLOAT16) return launch_product<SWIGLU>(p.as<__half>(), tile_config, stream);
    return cudaErrorInvalidValue;
}

// What Python calls. All pointers are device pointers, dtype is a Dtype, and tile_config is a TileConfig. The
// functions launch on the current device and the given stream. They allocate nothing and wait for nothing.
// They return 0 or a CUDA error code.
extern "C" int moe_route(const uint8_t* expert, int64_t* permutation, int64_t* counts, int num_tokens,
                         cudaStream_t stream) {
    LAUNCH(route_kernel, 1, ROUTE_THREADS, 2 * ROUTE_THREADS * sizeof(int), stream,
           expert, permutation, counts, num_tokens);
    return cudaGetLastError();
}
// gather and scatter are the permutation. Null means that x, or y, is already in permuted order.
// partial_sums is room for splits x num_tokens x out_features numbers, or null if splits is 1.
extern "C" int moe_linear(const void* x, const void* w_text, const void* w_visual, void* y,
                          const int64_t* gather, const int64_t* scatter, const int64_t* counts,
                          int num_tokens, int in_features, int out_features, int dtype, int tile_config,
                          float* partial_sums, int splits, cudaStream_t stream) {
    const UntypedProblem p{x, w_text, w_visual, nullptr, nullptr, y, gather, scatter, counts,
                           num_tokens, in_features, out_features, partial_sums, splits};
    return launch_for_dtype<false>(p, dtype, tile_config, stream);
}
// x is in reading order. h is written in permuted order, since only the second half of the FFN reads it.
extern "C" int moe_swiglu(const void* x, const void* w1_text, const void* w3_text, const void* w1_visual,
                          const void* w3_visual, void* h, const int64_t* permutation, const int64_t* counts,
                          int num_tokens, int in_features, int out_features, int dtype, int tile_config,
                          cudaStream_t stream) {
    const UntypedProblem p{x, w1_text, w1_visual, w3_text, w3_visual, h, permutation, nullptr, counts,
                           num_tokens, in_features, out_features, nullptr, 1};
    return launch_for_dtype<true>(p, dtype, tile_config, stream);
}
template <typename T>
static int launch_weight_gradients(const void* dy, const void* x, void* dw, const int64_t* counts,
                                   int out_features, int in_features, int first_expert, int num_experts,
                                   cudaStream_t stream) {
    const auto kernel = weight_gradient_kernel<T>;
    const dim3 grid(div_up(out_features, GRAD_B), div_up(in_features, GRAD_B), num_experts);
    LAUNCH(kernel, grid, GRAD_THREADS, GRAD_SHARED_BYTES, stream, static_cast<const T*>(dy),
           static_cast<const T*>(x), static_cast<T*>(dw), counts, out_features, in_features, first_expert);
    return cudaGetLastError();
}
// dy (tokens, out_features) and x (tokens, in_features) are in permuted order, and dw is (num_experts,
// out_features, in_features), for first_expert and the one after it. dtype is not FLOAT32.
extern "C" int moe_weight_gradients(const void* dy, const void* x, void* dw, const int64_t* counts,
                                    int out_features, int in_features, int first_expert, int num_experts,
                                    int dtype, cudaStream_t stream) {
    const auto launch = dtype == BFLOAT16 ? launch_weight_gradients<__nv_bfloat16>
                                          : launch_weight_gradients<__half>;
    return dtype == FLOAT32 ? cudaErrorInvalidValue
                            : launch(dy, x, dw, counts, out_features, in_features, first_expert,
                                     num_experts, stream);
}
extern "C" int moe_driver_version() {
    int version = 0;
    cudaDriverGetVersion(&version);
    return version;
}
extern "C" const char* moe_error_string(int code) { return cudaGetErrorString(cudaError_t(code)); }
