// The modality mixture-of-experts of Mono-InternVL as CUDA kernels.
//
// What. Every token carries a fixed label: text, visual, or pad. A routed linear layer multiplies text rows
// by one weight matrix and visual rows by another; the routed SwiGLU does so with two matrices at once and
// combines them:
//     moe_linear   y[row] = x[row] · w_e^T  (+ residual[row])            wqkv, wo, the second half of the FFN
//     moe_swiglu   h[row] = silu(x[row] · w1_e^T) * (x[row] · w3_e^T)    the first half of the FFN
// with e the expert of the row. Pad rows get zeros (or the residual alone) and cost nothing.
//
// Why. The obvious way runs both experts on all rows and throws half away. The next one gathers each expert's
// rows, runs two ordinary matrix products, and scatters the results: twice the launches, and copies of x and
// y through device memory in between. Here one launch serves both experts, rows are gathered while they are
// loaded and scattered while they are stored, and silu(gate) * up is formed in registers. Nothing is atomic
// and every sum has one fixed order: the same inputs give bitwise the same outputs.
//
// The layout of rows. moe_route turns the labels into a list, once per forward pass, on the device:
//     rows = [ text rows ... | visual rows ... | pad rows ... ], each part in reading order
//     counts = { number of text rows, number of visual rows }
// An entry's place in this list is a row's *position*. The output is cut into tiles of BM positions by BN
// columns, one block each. Row tiles start anew where the visual rows start, so no tile mixes two experts;
// pads end the visual part. Two parts round up at most once more than one, so ceil(n / BM) + 1 row tiles
// suffice for any split, and the host can launch without knowing the counts. A block reads the counts, finds
// its expert and rows (find_rows), and leaves at once when there are none. That makes all of it safe to
// capture in a CUDA graph.
//
// In which order to read: moe_route; moe_linear_naive, the whole idea in 20 lines; find_rows and the parts
// that the fast kernels share; moe_gemm, the bf16/fp16 tensor-core kernel; moe_gemm_fp32; the launchers,
// which are what Python calls.
//
// Floors. Multiply-adds: n·k·m for moe_linear, twice that for moe_swiglu. Bytes: each weight matrix in use
// once, x and y once. The FFN of the 2B model (k = 2048, m = 8192) in bf16 does 100.7 Mflop a row and reads
// 100.7 MB of weights an expert: with few rows the weights' bytes set the time, with many rows the tensor
// cores. Ceilings that remain here: mma.sync, which runs on every GPU since sm_80, does not reach the full
// rate of an H100; that takes wgmma (sm_90a only).
//
// What nvcc 13.0 gives (registers a thread on sm_80 / sm_89 / sm_90, shared memory a block; nothing spills):
//     moe_gemm large tile      211 / 211 / 215    96 KB     moe_gemm_fp32 linear    130 / 130 / 128  8.5 KB
//     moe_gemm medium tile     217 / 217 / 221    64 KB     moe_gemm_fp32 SwiGLU    135 / 143 / 166  8.5 KB
//     moe_gemm small, linear    72 /  72 /  72    96 KB     moe_linear_naive         30 /  38 /  30    0
//     moe_gemm small, SwiGLU    80 /  80 /  80    64 KB     moe_route                30 /  30 /  30    2 KB
//
// On a machine without a GPU, cuda_on_cpu.h runs this same file. Compiled and run on the CPU; not yet
// measured on a GPU.
#include "cuda_on_cpu.h"

enum Dtype { FLOAT32, BFLOAT16, FLOAT16 };
enum Label { TEXT, VISUAL };  // any other label is a pad

// What a routed product reads and writes. All matrices are row-major and contiguous, and start at multiples
// of 16 bytes.
template <typename T> struct Problem {
    const T *x, *w_text, *w_visual;    // (n, k), (m, k), (m, k)
    const T *w3_text, *w3_visual;      // (m, k), (m, k): SwiGLU's factor without silu; w_* is the one with it
    const T* residual;                 // (n, m), or null
    T* y;                              // (n, m)
    const int64_t *gather, *scatter;   // rows, or null where x, or y, is in routed order already
    const int64_t* counts;
    int n, k, m;
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline void from_float(float& to, float v) { to = v; }
__device__ inline void from_float(__nv_bfloat16& to, float v) { to = __float2bfloat16(v); }
__device__ inline void from_float(__half& to, float v) { to = __float2half(v); }

// ---------------------------------------------------------------- routing

// A stable partition by one block. Each thread counts the labels of its own stretch; an inclusive scan over
// the threads tells it where its stretch begins in each part of the list; then it walks the stretch again and
// writes row numbers. rows is int64 since PyTorch indexes with it too; 8 bytes are nothing beside a row of x.
constexpr int ROUTE_THREADS = 256;
__global__ void __launch_bounds__(ROUTE_THREADS)
moe_route(const uint8_t* labels, int64_t* rows, int64_t* counts, int n) {
    DYNAMIC_SHARED(int, text_until);  // of all threads up to and including this one
    int* const visual_until = text_until + ROUTE_THREADS;
    const int t = threadIdx.x, stretch = (n + ROUTE_THREADS - 1) / ROUTE_THREADS;
    const int begin = min(n, t * stretch), end = min(n, begin + stretch);
    int text = 0, visual = 0;
    for (int i = begin; i < end; i++) text += labels[i] == TEXT, visual += labels[i] == VISUAL;
    text_until[t] = text;
    visual_until[t] = visual;
    __syncthreads();
    for (int distance = 1; distance < ROUTE_THREADS; distance *= 2) {  // sums over 2, 4, 8, ... threads
        const int more_text = t >= distance ? text_until[t - distance] : 0;
        const int more_visual = t >= distance ? visual_until[t - distance] : 0;
        __syncthreads();  // all have read before any writes
        text_until[t] += more_text;
        visual_until[t] += more_visual;
        __syncthreads();
    }
    const int all_text = text_until[ROUTE_THREADS - 1], all_visual = visual_until[ROUTE_THREADS - 1];
    int text_at = text_until[t] - text, visual_at = visual_until[t] - visual;
    int pad_at = all_text + all_visual + begin - text_at - visual_at;
    visual_at += all_text;
    for (int i = begin; i < end; i++)
        rows[labels[i] == TEXT ? text_at++ : labels[i] == VISUAL ? visual_at++ : pad_at++] = i;
    if (t == 0) counts[0] = all_text, counts[1] = all_visual;
}

// ---------------------------------------------------------------- the idea: one thread an output element

template <typename T> __global__ void moe_linear_naive(const Problem<T> p) {
    const int64_t element = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (element >= int64_t(p.n) * p.m) return;
    const int64_t position = element / p.m, column = element % p.m;
    const int64_t from = p.gather ? p.gather[position] : position;
    const int64_t to = p.scatter ? p.scatter[position] : position;
    const int64_t text = p.counts[0], real = text + p.counts[1];
    const T* w = (position < text ? p.w_text : p.w_visual) + column * p.k;
    float sum = 0;
    if (position < real)
        for (int k = 0; k < p.k; k++) sum += to_float(p.x[from * p.k + k]) * to_float(w[k]);
    if (p.residual) sum += to_float(p.residual[to * p.m + column]);
    from_float(p.y[to * p.m + column], sum);
}
// Why it is slow: every thread fetches 2·k numbers for k multiply-adds. A tile of BM x BN outputs needs (BM +
// BN)·k numbers for BM·BN·k multiply-adds, if its threads share what they fetched: that is what shared memory
// is for.

// ---------------------------------------------------------------- what the tiled kernels share

struct RowTile {
    int begin, end;  // positions that the tile writes; empty: nothing to do
    int real;        // positions from here on are pads: they are written, but not computed
    bool visual;
};
__device__ inline RowTile find_rows(int tile, int BM, const int64_t* counts, int n) {
    const int text = int(counts[0]), real = text + int(counts[1]);
    const int text_tiles = (text + BM - 1) / BM;
    if (tile < text_tiles) return {tile * BM, min(text, tile * BM + BM), text, false};
    const int begin = text + (tile - text_tiles) * BM;
    return {begin, min(n, begin + BM), real, true};
}

// Blocks start in the order x, y, z. The row tile is x (and z), so that neighbours in time share a weight
// tile while it is in the L2 cache; a band of BAND row tiles bounds the rows of x that this order goes
// through meanwhile.
constexpr int BAND = 32;
__device__ inline int row_tile_number() { return blockIdx.z * BAND + blockIdx.x; }

template <typename T> struct alignas(16) Vector {  // moves in one 16-byte access
    static constexpr int SIZE = 16 / sizeof(T);
    T v[SIZE];
};

__device__ inline float silu(float v) { return v / (1 + expf(-v)); }

// Write 16 bytes of one output row, from fp32 sums. m is a multiple of 8, so a vector lies inside the row or
// outside.
template <typename T>
__device__ inline void store(const Problem<T>& p, int64_t row, int column,
                             const float (&sum)[Vector<T>::SIZE], bool is_pad) {
    if (column >= p.m) return;
    Vector<T> result{}, residual{};
    if (p.residual) residual = *reinterpret_cast<const Vector<T>*>(p.residual + row * p.m + column);
    for (int i = 0; i < Vector<T>::SIZE; i++)
        from_float(result.v[i], (is_pad ? 0 : sum[i]) + to_float(residual.v[i]));
    *reinterpret_cast<Vector<T>*>(p.y + row * p.m + column) = result;
}

// ---------------------------------------------------------------- bf16 and fp16: tensor cores

// A block computes BM positions x BN weight rows in steps of BK along k, with WARPS_M x WARPS_N warps side by
// side. STAGES slots of shared memory form a ring: while one is multiplied, STAGES - 1 others are being
// filled.
template <int BM_, int BN_, int BK_, int WARPS_M_, int WARPS_N_, int STAGES_> struct Tile {
    static constexpr int BM = BM_, BN = BN_, BK = BK_, STAGES = STAGES_;
    static constexpr int WARPS_M = WARPS_M_, WARPS_N = WARPS_N_;
    static constexpr int THREADS = 32 * WARPS_M * WARPS_N, SHARED_BYTES = STAGES * (BM + BN) * BK * 2;
    static constexpr int WM = BM / WARPS_M, WN = BN / WARPS_N;  // what one warp computes
};

// Which weight row stands in row r of the weight tile. Any order would do for the product; this one makes the
// epilogue cheap. mma leaves a lane with columns 2q, 2q+1 (q = lane % 4) of every 8 tile rows. Dealing the
// weight rows out so that tile row 8h + 2q + i holds column 8q + 2h + i turns four such pairs into 8
// neighbours: one 16-byte store. SwiGLU alternates 8 rows of w1 with 8 rows of w3, and the gate and up of an
// element meet in one lane.
template <bool SWIGLU> __device__ inline int tile_column(int r) {
    constexpr int MATRICES = SWIGLU ? 2 : 1;
    const int eight = r / 8, h = eight / MATRICES % 4, q = r % 8 / 2, i = r % 2;
    return eight / (4 * MATRICES) * 32 + 8 * q + 2 * h + i;
}

template <typename T, typename Tile, bool SWIGLU>
__global__ void __launch_bounds__(Tile::THREADS) moe_gemm(const Problem<T> p) {
    constexpr int BM = Tile::BM, BN = Tile::BN, BK = Tile::BK, STAGES = Tile::STAGES;
    constexpr int WM = Tile::WM, WN = Tile::WN, WARPS_N = Tile::WARPS_N;
    constexpr int MATRICES = SWIGLU ? 2 : 1;
    const RowTile rows = find_rows(row_tile_number(), BM, p.counts, p.n);
    if (rows.begin >= rows.end) return;
    const int first_column = blockIdx.y * (BN / MATRICES);
    DYNAMIC_SHARED(T, shared);  // STAGES x (BM rows of x, then BN weight rows) x BK
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;

    // Loading. A tile row is CHUNKS chunks of 16 bytes; neighbouring threads load neighbouring chunks of a
    // row, and PASS rows are loaded at a time. Each thread's rows stay the same for all k, so it looks them
    // up once.
    constexpr int CHUNKS = BK / 8, PASS = Tile::THREADS / CHUNKS;
    static_assert(BM % PASS == 0 && BN % PASS == 0 && PASS % 8 == 0, "a pass loads groups of 8 rows");
    const int load_row = thread / CHUNKS, load_chunk = thread % CHUNKS;
    const T *x_rows[BM / PASS], *w_rows[BN / PASS];  // null: there is no such row, load zeros
#pragma unroll
    for (int i = 0; i < BM / PASS; i++) {
        const int position = rows.begin + load_row + i * PASS;
        const bool exists = position < rows.end && position < rows.real;
        x_rows[i] = exists ? p.x + (p.gather ? p.gather[position] : position) * p.k : nullptr;
    }
    const T* const w1 = rows.visual ? p.w_visual : p.w_text;
    const T* const w3 = rows.visual ? p.w3_visual : p.w3_text;
#pragma unroll
    for (int i = 0; i < BN / PASS; i++) {
        const int r = load_row + i * PASS, column = first_column + tile_column<SWIGLU>(r);
        w_rows[i] = column < p.m ? (SWIGLU && r / 8 % 2 ? w3 : w1) + int64_t(column) * p.k : nullptr;
    }
    // ldmatrix reads one chunk of 8 consecutive tile rows at a time. The 32 banks serve 128 bytes at once,
    // that is 64 / BK tile rows: unless rows rotate their chunks, these 8 chunks would share banks. XOR with
    // the row does that.
    constexpr int ROWS_PER_128_BYTES = 64 / BK;
    const int store_chunk = load_chunk ^ (load_row % 8 / ROWS_PER_128_BYTES);
    const int k_tiles = rows.begin < rows.real ? (p.k + BK - 1) / BK : 0;  // a tile of pads computes nothing
    auto load = [&](int k_tile) {
        if (k_tile < k_tiles) {
            T* const to = shared + k_tile % STAGES * (BM + BN) * BK + load_row * BK + store_chunk * 8;
            const int k = k_tile * BK + load_chunk * 8;  // like p.k a multiple of 8: no chunk straddles it
            auto copy = [&](T* slot, const T* row) {
                const bool exists = row != nullptr && k < p.k;
                cp_async16(slot, exists ? row + k : p.x, exists ? 16 : 0);
            };
#pragma unroll
            for (int i = 0; i < BM / PASS; i++) copy(to + i * PASS * BK, x_rows[i]);
#pragma unroll
            for (int i = 0; i < BN / PASS; i++) copy(to + (BM + i * PASS) * BK, w_rows[i]);
        }
        cp_async_commit();  // one group a k tile, past the last one empty groups: the wait below counts them
    };

    // Multiplying. sum[i][j] is the warp's part of C at rows 16i, weight-tile rows 8j, spread over lanes as
    // mma has it.
    float sum[WM / 16][WN / 8][4] = {};
    const int x_row = warp / WARPS_N * WM + lane % 16;                      // the addresses that this lane
    const int w_row = BM + warp % WARPS_N * WN + lane / 16 * 8 + lane % 8;  // gives to ldmatrix
    const int rotate = lane % 8 / ROWS_PER_128_BYTES;
    auto multiply = [&](const T* slot) {
#pragma unroll
        for (int k = 0; k < CHUNKS; k += 2) {  // 16 numbers along k
            uint32_t a[WM / 16][4], b[WN / 16][4];
#pragma unroll
            for (int i = 0; i < WM / 16; i++)
                ldmatrix_x4(a[i], slot + (x_row + i * 16) * BK + ((k + lane / 16) ^ rotate) * 8);
#pragma unroll
            for (int j = 0; j < WN / 16; j++)
                ldmatrix_x4(b[j], slot + (w_row + j * 16) * BK + ((k + lane / 8 % 2) ^ rotate) * 8);
#pragma unroll
            for (int i = 0; i < WM / 16; i++)
#pragma unroll
                for (int j = 0; j < WN / 8; j++)
                    mma_m16n8k16(T(), sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
    };

    for (int k_tile = 0; k_tile < STAGES - 1; k_tile++) load(k_tile);
    for (int k_tile = 0; k_tile < k_tiles; k_tile++) {
        cp_async_wait<STAGES - 2>();  // this thread's copies of k_tile have arrived
        __syncthreads();              // everybody's have, and everybody is done with k_tile - 1,
        load(k_tile + STAGES - 1);    // whose slot this overwrites
        multiply(shared + k_tile % STAGES * (BM + BN) * BK);
    }

    // Storing: two rows of every 16 belong to a lane, and of every 32 columns 8 neighbours (see tile_column).
#pragma unroll
    for (int i = 0; i < WM / 16 * 2; i++) {
        const int position = rows.begin + warp / WARPS_N * WM + i * 8 + lane / 4;
        if (position >= rows.end) break;
        const int64_t row = p.scatter ? p.scatter[position] : position;
#pragma unroll
        for (int j = 0; j < WN / (32 * MATRICES); j++) {
            float result[8];
#pragma unroll
            for (int c = 0; c < 8; c++) {
                const int eight = (j * 4 + c / 2) * MATRICES, e = i % 2 * 2 + c % 2;
                result[c] = sum[i / 2][eight][e];
                if (SWIGLU) result[c] = silu(result[c]) * sum[i / 2][eight + MATRICES - 1][e];
            }
            const int column = first_column + warp % WARPS_N * (WN / MATRICES) + j * 32 + lane % 4 * 8;
            store(p, row, column, result, position >= rows.real);
        }
    }
}

// ---------------------------------------------------------------- fp32: multiply-adds of the ordinary cores

// 64 positions x 64 weight rows a block, 64 threads, 8 x 8 sums a thread: 16 numbers from shared memory feed
// 64 multiply-adds. Both tiles are stored k first, so that a thread reads its rows in 16-byte vectors; its 8
// weight rows are 4 in each half of the tile, which keeps the banks apart. In SwiGLU the first half holds w1,
// the second w3.
constexpr int F32_B = 64, F32_BK = 16, F32_STRIDE = F32_B + 4, F32_THREADS = 64;
constexpr int F32_SHARED_BYTES = 2 * F32_BK * F32_STRIDE * 4;
template <bool SWIGLU> __global__ void __launch_bounds__(F32_THREADS) moe_gemm_fp32(const Problem<float> p) {
    const RowTile rows = find_rows(row_tile_number(), F32_B, p.counts, p.n);
    if (rows.begin >= rows.end) return;
    const int first_column = blockIdx.y * (SWIGLU ? F32_B / 2 : F32_B);
    DYNAMIC_SHARED(float, x_tile);  // [F32_BK][F32_STRIDE], twice
    float* const w_tile = x_tile + F32_BK * F32_STRIDE;
    const int thread = threadIdx.x, load_row = thread / 4, load_k = thread % 4 * 4;  // 4 threads a row
    const float* const w1 = rows.visual ? p.w_visual : p.w_text;
    const float* const w3 = rows.visual ? p.w3_visual : p.w3_text;
    const float *x_rows[4], *w_rows[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = load_row + i * 16, position = rows.begin + r;
        const bool exists = position < rows.end && position < rows.real;
        x_rows[i] = exists ? p.x + (p.gather ? p.gather[position] : position) * p.k : nullptr;
        const int column = first_column + (SWIGLU ? r % 32 : r);
        w_rows[i] = column < p.m ? (SWIGLU && r >= 32 ? w3 : w1) + int64_t(column) * p.k : nullptr;
    }
    auto load = [&](float* tile, int row, const float* from, int k) {
        const bool exists = from != nullptr && k < p.k;
        Vector<float> four{};
        if (exists) four = *reinterpret_cast<const Vector<float>*>(from + k);
#pragma unroll
        for (int i = 0; i < 4; i++) tile[(load_k + i) * F32_STRIDE + row] = four.v[i];
    };
    const int row = thread / 8 * 8, column = thread % 8 * 4;
    float sum[8][8] = {};
    for (int k = 0; k < (rows.begin < rows.real ? p.k : 0); k += F32_BK) {
        __syncthreads();  // everybody is done with the tile before
#pragma unroll
        for (int i = 0; i < 4; i++) load(x_tile, load_row + i * 16, x_rows[i], k + load_k);
#pragma unroll
        for (int i = 0; i < 4; i++) load(w_tile, load_row + i * 16, w_rows[i], k + load_k);
        __syncthreads();
#pragma unroll
        for (int kk = 0; kk < F32_BK; kk++) {
            Vector<float> a[2], b[2];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                a[half] = *reinterpret_cast<Vector<float>*>(x_tile + kk * F32_STRIDE + row + half * 4);
                b[half] = *reinterpret_cast<Vector<float>*>(w_tile + kk * F32_STRIDE + column + half * 32);
            }
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) sum[i][j] += a[i / 4].v[i % 4] * b[j / 4].v[j % 4];
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int position = rows.begin + row + i;
        if (position >= rows.end) break;
        const int64_t to = p.scatter ? p.scatter[position] : position;
#pragma unroll
        for (int half = 0; half < (SWIGLU ? 1 : 2); half++) {
            float result[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                result[j] = SWIGLU ? silu(sum[i][j]) * sum[i][4 + j] : sum[i][half * 4 + j];
            store(p, to, first_column + column + half * 32, result, position >= rows.real);
        }
    }
}

// ---------------------------------------------------------------- launching

static int div_up(int a, int b) { return (a + b - 1) / b; }

static dim3 tile_grid(int n, int m, int BM, int columns) {
    const int row_tiles = div_up(n, BM) + 1;
    return dim3(min(row_tiles, BAND), div_up(m, columns), div_up(row_tiles, BAND));
}

template <typename T, typename Tile, bool SWIGLU>
static int launch_tile(const Problem<T>& p, cudaStream_t stream) {
    const auto kernel = moe_gemm<T, Tile, SWIGLU>;
    // more than 48 KB of shared memory must be asked for, on every device that is used
    const cudaError_t e =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::SHARED_BYTES);
    if (e != cudaSuccess) return e;
    const dim3 grid = tile_grid(p.n, p.m, Tile::BM, SWIGLU ? Tile::BN / 2 : Tile::BN);
    LAUNCH(kernel, grid, Tile::THREADS, Tile::SHARED_BYTES, stream, p);
    return cudaGetLastError();
}

// Large tiles fetch least from L2 per multiply-add; small tiles give every multiprocessor a block when rows
// are few, and keep many bytes in flight, which is what counts there. All fit in 96 KB, the most that an
// sm_89 block may have.
template <bool SWIGLU> using Large = Tile<128, 256, 32, 2, 4, 4>;
template <bool SWIGLU> using Medium = Tile<128, 128, 32, 2, 2, 4>;
template <bool SWIGLU> using Small = Tile<64, SWIGLU ? 64 : 32, 64, 4, 1, SWIGLU ? 4 : 8>;
enum Choice { AUTO, SMALL, MEDIUM, LARGE, NAIVE };  // AUTO serves callers; the others tests and measurements

template <bool SWIGLU, typename T>
static int launch_tiled(const Problem<T>& p, int tile, cudaStream_t stream) {
    if (tile == AUTO) {
        int device = 0, processors = 0;
        cudaError_t e = cudaGetDevice(&device);
        if (e == cudaSuccess) e = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
        if (e != cudaSuccess) return e;
        auto fills = [&](int BM, int BN) {
            return int64_t(div_up(p.n, BM)) * div_up(p.m, SWIGLU ? BN / 2 : BN) >= processors;
        };
        tile = fills(128, 256) ? LARGE : fills(128, 128) ? MEDIUM : SMALL;
    }
    if (tile == LARGE) return launch_tile<T, Large<SWIGLU>, SWIGLU>(p, stream);
    if (tile == MEDIUM) return launch_tile<T, Medium<SWIGLU>, SWIGLU>(p, stream);
    return launch_tile<T, Small<SWIGLU>, SWIGLU>(p, stream);
}

template <bool SWIGLU>
static int launch_tiled(const Problem<float>& p, int /*the only one*/, cudaStream_t stream) {
    const auto kernel = moe_gemm_fp32<SWIGLU>;
    const dim3 grid = tile_grid(p.n, p.m, F32_B, SWIGLU ? F32_B / 2 : F32_B);
    LAUNCH(kernel, grid, F32_THREADS, F32_SHARED_BYTES, stream, p);
    return cudaGetLastError();
}

template <bool SWIGLU, typename T> static int launch(const Problem<T>& p, int choice, cudaStream_t stream) {
    if (p.n == 0 || p.m == 0) return cudaSuccess;  // an empty grid would be an error
    if (choice != NAIVE) return launch_tiled<SWIGLU>(p, choice, stream);
    const auto kernel = moe_linear_naive<T>;
    const int64_t blocks = (int64_t(p.n) * p.m + 255) / 256;
    if (SWIGLU || blocks > INT32_MAX) return cudaErrorInvalidValue;
    LAUNCH(kernel, dim3(unsigned(blocks)), 256, 0, stream, p);
    return cudaGetLastError();
}

struct Arguments {  // a Problem before its type is known
    const void *x, *w_text, *w_visual, *w3_text, *w3_visual, *residual;
    void* y;
    const int64_t *gather, *scatter, *counts;
    int n, k, m;
    template <typename T> Problem<T> as() const {
        auto t = [](const void* pointer) { return static_cast<const T*>(pointer); };
        return {t(x), t(w_text), t(w_visual), t(w3_text), t(w3_visual), t(residual), static_cast<T*>(y),
                gather, scatter, counts, n, k, m};
    }
};
template <bool SWIGLU> static int launch(const Arguments& a, int dtype, int choice, cudaStream_t stream) {
    if (dtype == FLOAT32) return launch<SWIGLU>(a.as<float>(), choice, stream);
    if (dtype == BFLOAT16) return launch<SWIGLU>(a.as<__nv_bfloat16>(), choice, stream);
    if (dtype == FLOAT16) return launch<SWIGLU>(a.as<__half>(), choice, stream);
    return cudaErrorInvalidValue;
}

// What Python calls. Pointers are device memory; the launch goes to the current device and the given stream,
// allocates nothing and waits for nothing. Returns 0 or a CUDA error code.
extern "C" int mmoe_route(const uint8_t* labels, int64_t* rows, int64_t* counts, int n, cudaStream_t stream) {
    LAUNCH(moe_route, 1, ROUTE_THREADS, 2 * ROUTE_THREADS * sizeof(int), stream, labels, rows, counts, n);
    return cudaGetLastError();
}
extern "C" int mmoe_linear(const void* x, const void* w_text, const void* w_visual, const void* residual,
                           void* y, const int64_t* gather, const int64_t* scatter, const int64_t* counts,
                           int n, int k, int m, int dtype, int choice, cudaStream_t stream) {
    const Arguments a{x, w_text, w_visual, nullptr, nullptr, residual, y, gather, scatter, counts, n, k, m};
    return launch<false>(a, dtype, choice, stream);
}
extern "C" int mmoe_swiglu(const void* x, const void* w1_text, const void* w3_text, const void* w1_visual,
                           const void* w3_visual, void* h, const int64_t* rows, const int64_t* counts,
                           int n, int k, int m, int dtype, int choice, cudaStream_t stream) {
    const Arguments a{x, w1_text, w1_visual, w3_text, w3_visual, nullptr, h, rows, nullptr, counts, n, k, m};
    return launch<true>(a, dtype, choice, stream);
}
extern "C" const char* mmoe_error(int code) { return cudaGetErrorString(cudaError_t(code)); }
