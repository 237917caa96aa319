// cuda_on_cpu.h compiles a .cu file with g++ and runs its kernels on the CPU. So they can be tested without a
// GPU and examined with gdb and AddressSanitizer (ASan).
//
//   nvcc moe_kernel.cu                   takes the first part: the names become CUDA and PTX instructions
//   g++ -x c++ -std=c++17 moe_kernel.cu  takes the second part: the names become a model of a GPU
//
// The model. Every CUDA thread of a block is a fiber, which means that it has a stack of its own, on which
// the kernel runs as ordinary C++. A fiber runs until the kernel has to wait for other threads: at
// __syncthreads, or at an instruction that a warp or a warpgroup executes together (ldmatrix, mma, wgmma).
// Then the next fiber runs. The blocks run one after another. Atomics, races between blocks and TMA are not
// modelled. The model is strict, so that tests find mistakes. A GPU may behave in each of the ways that these
// variables select:
//   - Shared memory is NaN when a block starts, so a read of what no thread wrote shows in the result.
//   - cp.async copies nothing until the thread waits for it, so a missing wait leaves NaN in the result too.
//     With CUDA_ON_CPU_EAGER=1 in the environment it copies at once, and a copy that is issued too early
//     overwrites what others still need. wgmma does the opposite: with CUDA_ON_CPU_EAGER=1 it multiplies only
//     when it is waited for, otherwise at once.
//   - wgmma sees NaN where the thread whose copy has arrived has not executed fence.proxy.async.
//   - Each thread runs as far as it can before the next one starts, so a missing __syncthreads shows up. Some
//     show up only in the reverse order, which CUDA_ON_CPU_REVERSE=1 selects.
//   - The program aborts if threads of a warp wait at different places, or if a barrier is not reached by all
//     threads of the block; if cp.async, ldmatrix or wgmma gets a misaligned address in shared memory; and if
//     the rows that ldmatrix reads together lie in the same banks.
//   - A launch with more than 48 KB of shared memory fails unless cudaFuncSetAttribute has allowed it, which
//     gives at most 227 KB, or what CUDA_ON_CPU_SHARED_KB says.
//   - Shared memory and stacks are ordinary memory, which -fsanitize=address,undefined checks.
#pragma once
#undef _FORTIFY_SOURCE  // whose longjmp refuses to change to another stack
#include <cstdint>

#ifdef __CUDACC__  // ---------------------------------------------------------------- a real GPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name)                              \
    extern __shared__ __align__(1024) unsigned char name##_raw[]; \
    type* const name = reinterpret_cast<type*>(name##_raw)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define SM80_ASM(...) __trap()  // cp.async and this shape of mma need sm_80; the fp32 kernels use neither
#else
#define SM80_ASM(...) asm volatile(__VA_ARGS__)
#endif

__device__ __forceinline__ unsigned shared_address(const void* p) { return __cvta_generic_to_shared(p); }
// Copies 16 bytes from global to shared memory asynchronously. Only the first `bytes` of them are read from
// the source, and the rest are zeros. With bytes = 0 the source is not read at all.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes) {
    const unsigned to = shared_address(shared);
    SM80_ASM("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// cp_async_commit closes the current group of copies. cp_async_wait waits until at most PENDING of the latest
// groups of this thread are incomplete.
__device__ __forceinline__ void cp_async_commit() { SM80_ASM("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
    SM80_ASM("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Loads four 8x8 matrices of 16-bit numbers into the registers of a warp. Lane l passes the address of row
// l%8 of matrix l/8. In r[i] it receives two numbers of matrix i: row l/4, columns 2*(l%4) and 2*(l%4)+1.
// The transposed kind gives it rows 2*(l%4) and 2*(l%4)+1, column l/4.
#define LDMATRIX(NAME, KIND)                                                                                \
    __device__ __forceinline__ void NAME(uint32_t (&r)[4], const void* row) {                               \
        const unsigned from = shared_address(row);                                                          \
        SM80_ASM("ldmatrix.sync.aligned.m8n8.x4." KIND "shared.b16 {%0, %1, %2, %3}, [%4];"                 \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");                  \
    }
LDMATRIX(ldmatrix_x4, "")
LDMATRIX(ldmatrix_x4_transposed, "trans.")
// C (16x8, fp32) += A (16x16) · B (16x8). A and the transpose of B are spread over the 32 lanes of a warp as
// ldmatrix leaves them. Lane l holds four numbers of C: c[0] and c[1] at row l/4, columns 2*(l%4) and
// 2*(l%4)+1, and c[2] and c[3] in the same columns of row l/4+8.
#define MMA(TYPE, NAME)                                                                                     \
    __device__ __forceinline__ void mma_m16n8k16(TYPE, float (&c)[4], const uint32_t (&a)[4],               \
                                                 uint32_t b0, uint32_t b1) {                                \
        SM80_ASM("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                             \
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                          \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                           \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                           \
    }
MMA(__nv_bfloat16, "bf16")  // the first argument only selects the type
MMA(__half, "f16")

// What follows exists in sm_90a only.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define SM90A_ASM(...) asm volatile(__VA_ARGS__)
#else
#define SM90A_ASM(...) __trap()
#endif
#define SM90A(NAME, INSTRUCTION) \
    __device__ __forceinline__ void NAME() { SM90A_ASM(INSTRUCTION ";" ::: "memory"); }
SM90A(fence_proxy_async, "fence.proxy.async.shared::cta")
SM90A(wgmma_fence, "wgmma.fence.sync.aligned")
SM90A(wgmma_commit, "wgmma.commit_group.sync.aligned")
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    SM90A_ASM("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The compiler does not know that wgmma is asynchronous. This keeps it from reading sums before this point.
__device__ __forceinline__ void not_before(float (&c)[4]) {
    asm volatile("" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])::"memory");
}
// C (64xN, fp32) += A (64x16) · B (16xN). a and b describe A and the transpose of B. Warp w of the warpgroup
// holds rows 16w to 16w + 15 of C, and c[j] is what mma would leave of its columns 8j to 8j + 7.
#define R5(t, a, b, c, d, e) "%" #t #a ", %" #t #b ", %" #t #c ", %" #t #d ", %" #t #e
#define R10(t) R5(t, 0, 1, 2, 3, 4) ", " R5(t, 5, 6, 7, 8, 9)
#define R30 R10() ", " R10(1) ", " R10(2)
#define R60 R30 ", " R10(3) ", " R10(4) ", " R10(5)
#define R90 R60 ", " R10(6) ", " R10(7) ", " R10(8)
#define R120 R90 ", " R10(9) ", " R10(10) ", " R10(11)
#define C4(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define C32(j) C4(j), C4(j + 1), C4(j + 2), C4(j + 3), C4(j + 4), C4(j + 5), C4(j + 6), C4(j + 7)
#define WGMMA(TYPE, NAME, N, REGISTERS, A, B, ...)                                                          \
    __device__ __forceinline__ void wgmma(TYPE, float (&c)[N / 8][4], uint64_t a, uint64_t b) {             \
        SM90A_ASM("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGISTERS "}, "      \
                  A ", " B ", 1, 1, 1, 0, 0;" : __VA_ARGS__ : "l"(a), "l"(b) : "memory");                   \
    }
#define WGMMAS(TYPE, NAME)                                                                                  \
    WGMMA(TYPE, NAME, 64, R30 ", %30, %31", "%32", "%33", C32(0))                                           \
    WGMMA(TYPE, NAME, 128, R60 ", %60, %61, %62, %63", "%64", "%65", C32(0), C32(8))                        \
    WGMMA(TYPE, NAME, 192, R90 ", %90, %91, %92, %93, %94, %95", "%96", "%97", C32(0), C32(8), C32(16))     \
    WGMMA(TYPE, NAME, 256, R120 ", %120, %121, %122, %123, %124, %125, %126, %127", "%128", "%129",         \
          C32(0), C32(8), C32(16), C32(24))
WGMMAS(__nv_bfloat16, "bf16")
WGMMAS(__half, "f16")

#else  // ---------------------------------------------------------------- the model
#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <sys/mman.h>
#include <ucontext.h>
#include <utility>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, size_t*) {}
#endif

// The keywords of CUDA C++ and the runtime functions that moe_kernel.cu uses.
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ((void)(stream),                                            \
     cuda_on_cpu::launch((void*)kernel, grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); }))
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(cuda_on_cpu::gpu.shared)
#define __expf expf
#define __fdividef(a, b) ((a) / (b))
#define threadIdx (cuda_on_cpu::gpu.running->index)
#define blockIdx (cuda_on_cpu::gpu.block)
#define blockDim (cuda_on_cpu::gpu.block_size)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using std::max;
using std::min;
typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 9, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

// 16-bit floats are stored as bits. Conversions round to the nearest value, ties to even, as on a GPU.
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
template <class To, class From> To bit_cast(From from) {
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}
inline float __bfloat162float(__nv_bfloat16 h) { return bit_cast<float>(uint32_t(h.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16(float f) {
    const uint32_t u = bit_cast<uint32_t>(f);
    return {uint16_t(f != f ? 0x7fff : (u + 0x7fff + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half h) {
    const uint32_t sign = (h.bits & 0x8000u) << 16, rest = (h.bits & 0x7fffu) << 13;
    const bool finite = rest < 0x7c00u << 13;  // 2^112 corrects the exponent, for subnormals too
    const float f = finite ? bit_cast<float>(rest) * 0x1p112f : bit_cast<float>(rest | 0x7f800000u);
    return bit_cast<float>(bit_cast<uint32_t>(f) | sign);
}
inline __half __float2half(float f) {
    const uint32_t u = bit_cast<uint32_t>(f), magnitude = u & 0x7fffffffu, sign = u >> 16 & 0x8000u;
    if (f != f) return {0x7fff};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // 65520 and above round to infinity
    if (magnitude < 0x38800000u)                                     // below 2^-14: a multiple of 2^-24
        return {uint16_t(sign | uint32_t(std::nearbyint(std::fabs(f) * 0x1p24f)))};
    return {uint16_t(sign | (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13)};
}
inline float to_float32(__nv_bfloat16 h) { return __bfloat162float(h); }
inline float to_float32(__half h) { return __half2float(h); }

namespace cuda_on_cpu {

template <class... Args> [[noreturn]] void fail(const char* format, Args... args) {
    fprintf(stderr, format, args...);
    abort();
}

struct Copy {  // one cp.async
    void* to;
    const void* from;
    int bytes;
};
struct Product {       // one wgmma of a warpgroup
    uint64_t a, b;     // the descriptors
    float* sums[128];  // of each thread
    void (*execute)(const Product&);
};
struct Thread;
// Where a thread can wait. The instruction is executed once so many threads have reached it: those of a warp,
// of a warpgroup, or of the whole block.
struct Instruction {
    const char* name;
    int threads;
    void (*execute)(Thread* threads);
};
constexpr int WARP = 32, WARPGROUP = 128, BLOCK = 1024;  // a block has at most so many threads
static const Instruction start{"the start", 0, nullptr}, finished{"the end", 0, nullptr};
static const Instruction barrier{"__syncthreads", BLOCK, [](Thread*) {}};

struct Thread {
    dim3 index;
    const Instruction* at;                       // where it waits
    int line = 0;                                // the source line where it waits
    const void* operands[3];                     // addresses on stacks or in shared memory
    std::vector<std::vector<Copy>> copies;       // the pending groups of cp.async; the last one is still open
    std::vector<size_t> unfenced;                // where its copies arrived since its last fence.proxy.async
    std::vector<std::vector<Product>> products;  // in the first thread of a warpgroup: the groups of wgmma
    bool registers_fenced = false;
    char* stack = nullptr;
    jmp_buf registers;                           // while it does not run
    void* fake_stack = nullptr;                  // belongs to ASan
};

struct Gpu {
    Thread threads[BLOCK];
    Thread* running = nullptr;
    dim3 block, block_size;
    bool reverse = false, eager = false;    // as the environment says
    unsigned char* shared = nullptr;
    std::vector<bool> visible;              // per 16 bytes of shared memory: to wgmma
    std::function<void()> kernel;
    jmp_buf scheduler;                      // its registers while a thread runs
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
};
static std::map<void*, int> max_shared_bytes;  // of kernels that may use more than 48 KB
static cudaError_t last_error = cudaSuccess;
static Gpu gpu;  // static, so that two libraries built with this header have one each
static std::mutex one_launch_at_a_time;
constexpr size_t STACK_BYTES = 256 << 10;

// _setjmp keeps the registers of the fiber that stops, and _longjmp loads those of the fiber that continues.
// A fiber never ends: it runs a thread of every block. ASan must be told about each switch. Otherwise it
// takes the other stack for an overflow of this one.
inline void leave_thread() {
    Thread& t = *gpu.running;
    __sanitizer_start_switch_fiber(&t.fake_stack, gpu.scheduler_stack, gpu.scheduler_stack_size);
    if (!_setjmp(t.registers)) _longjmp(gpu.scheduler, 1);
    __sanitizer_finish_switch_fiber(t.fake_stack, &gpu.scheduler_stack, &gpu.scheduler_stack_size);
}
inline void fiber() {
    __sanitizer_finish_switch_fiber(nullptr, &gpu.scheduler_stack, &gpu.scheduler_stack_size);
    for (;;) {
        gpu.kernel();
        gpu.running->at = &finished;
        leave_thread();
    }
}
inline void run_thread(Thread& t) {
    gpu.running = &t;
    const bool is_new = t.stack == nullptr;
    if (is_new)
        t.stack = static_cast<char*>(
            mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (t.stack == MAP_FAILED) fail("cuda_on_cpu: no memory for a stack\n");
    __sanitizer_start_switch_fiber(&gpu.scheduler_fake_stack, t.stack, STACK_BYTES);
    if (!_setjmp(gpu.scheduler)) {
        if (!is_new) _longjmp(t.registers, 1);
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = t.stack;
        context.uc_stack.ss_size = STACK_BYTES;
        makecontext(&context, fiber, 0);
        setcontext(&context);
    }
    __sanitizer_finish_switch_fiber(gpu.scheduler_fake_stack, nullptr, nullptr);
}
inline void wait_at(const Instruction& instruction, int line, const void* a = nullptr,
                    const void* b = nullptr, const void* c = nullptr) {
    Thread& t = *gpu.running;
    t.at = &instruction, t.line = line;
    t.operands[0] = a, t.operands[1] = b, t.operands[2] = c;
    leave_thread();
}

// Aborts unless all of these threads wait at the same place. Anything else is undefined behaviour on a GPU.
inline void check_together(const Thread* threads, int n) {
    for (int i = 1; i < n; i++) {
        const Thread &a = threads[0], &b = threads[i];
        if (a.at == b.at && (a.line == b.line || a.at == &finished)) continue;
        fail("cuda_on_cpu: threads diverge in block (%u, %u, %u): thread %d is at %s (line %d), "
             "thread %d at %s (line %d)\n", gpu.block.x, gpu.block.y, gpu.block.z, int(&a - gpu.threads),
             a.at->name, a.line, int(&b - gpu.threads), b.at->name, b.line);
    }
}
// Runs the threads of a warp, a warpgroup or the block until they wait for more threads or have ended.
inline void run_together(Thread* threads, int n, int group) {
    const int part = group == BLOCK ? WARPGROUP : group == WARPGROUP ? WARP : 1;
    const int parts = (n + part - 1) / part;
    for (;;) {
        for (int i = 0; i < parts; i++) {
            const int first = (gpu.reverse ? parts - 1 - i : i) * part;
            if (part == 1) run_thread(threads[first]);
            else run_together(threads + first, std::min(n - first, part), part);
        }
        check_together(threads, n);
        if (threads->at->threads != group) return;
        if (n != group && group != BLOCK)
            fail("cuda_on_cpu: %s by %d threads, not %d\n", threads->at->name, n, group);
        threads->at->execute(threads);
    }
}
inline int environment(const char* variable, int otherwise) {
    const char* value = getenv(variable);
    return value ? atoi(value) : otherwise;
}
inline void launch(void* function, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
    const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
    const int n = block.x * block.y * block.z;
    if (n > BLOCK || (shared_bytes > 48 << 10 && int(shared_bytes) > max_shared_bytes[function])) {
        last_error = cudaErrorInvalidValue;
        return;
    }
    gpu.reverse = environment("CUDA_ON_CPU_REVERSE", 0);
    gpu.eager = environment("CUDA_ON_CPU_EAGER", 0);
    gpu.block_size = block;
    gpu.kernel = std::move(kernel);
    gpu.shared = static_cast<unsigned char*>(aligned_alloc(1024, (shared_bytes / 1024 + 1) * 1024));
    for (unsigned b = 0; b < grid.x * grid.y * grid.z; b++) {
        gpu.block = dim3(b % grid.x, b / grid.x % grid.y, b / (grid.x * grid.y));
        memset(gpu.shared, 0xff, shared_bytes);  // NaN in every float format
        gpu.visible.assign(shared_bytes / 16 + 1, true);
        for (int i = 0; i < n; i++) {
            Thread& t = gpu.threads[i];
            t.index = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
            t.at = &start;
            t.copies.assign(1, {});
            t.products.assign(1, {});
            t.unfenced.clear();
            t.registers_fenced = false;
        }
        run_together(gpu.threads, n, BLOCK);
    }
    free(gpu.shared);
}

// A lane holds two adjacent numbers of an 8x8 matrix in one 32-bit register. Returns number i of them.
template <class T> float element(const uint32_t& pair, int i) {
    return to_float32(reinterpret_cast<const T*>(&pair)[i]);
}

// The place of an address in shared memory. Aborts unless it is a multiple of 16, as all accesses here need.
inline size_t shared_offset(const void* address) {
    const size_t offset = static_cast<const unsigned char*>(address) - gpu.shared;
    if (offset % 16) fail("cuda_on_cpu: a misaligned address in shared memory\n");
    return offset;
}

inline void execute_copy(const Copy& copy) {
    memcpy(copy.to, copy.from, copy.bytes);
    memset(static_cast<char*>(copy.to) + copy.bytes, 0, 16 - copy.bytes);
    gpu.running->unfenced.push_back(shared_offset(copy.to) / 16);
    gpu.visible.at(gpu.running->unfenced.back()) = false;
}

// Both instructions distribute matrices over the lanes as described at ldmatrix_x4 and MMA above.
template <bool TRANSPOSED> void execute_ldmatrix(Thread* lanes) {
    for (int i = 0; i < 4; i++) {  // the 8 rows of a matrix must lie in different banks: 128 bytes at a time
        unsigned banks = 0;
        for (int l = 0; l < 8; l++) banks |= 1 << shared_offset(lanes[i * 8 + l].operands[1]) / 16 % 8;
        if (banks != 0xff) fail("cuda_on_cpu: bank conflicts in ldmatrix\n");
    }
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 8; i++) {  // number i % 2 of matrix i / 2
            const int row = TRANSPOSED ? l % 4 * 2 + i % 2 : l / 4;
            const int column = TRANSPOSED ? l / 4 : l % 4 * 2 + i % 2;
            memcpy((uint16_t*)lanes[l].operands[0] + i,
                   (const uint16_t*)lanes[i / 2 * 8 + row].operands[1] + column, 2);
        }
}
template <class T> void execute_mma(Thread* lanes) {
    float A[16][16], B[16][8], C[16][8] = {};
    for (int l = 0; l < 32; l++) {
        const auto a = (const uint32_t*)lanes[l].operands[1], b = (const uint32_t*)lanes[l].operands[2];
        for (int i = 0; i < 2; i++) {
            const int m = l / 4, n = l / 4, k = l % 4 * 2 + i;
            A[m][k] = element<T>(a[0], i), A[m + 8][k] = element<T>(a[1], i);
            A[m][k + 8] = element<T>(a[2], i), A[m + 8][k + 8] = element<T>(a[3], i);
            B[k][n] = element<T>(b[0], i), B[k + 8][n] = element<T>(b[1], i);
        }
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++)
            ((float*)lanes[l].operands[0])[i] += C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}
template <bool TRANSPOSED> static const Instruction ldmatrix{"ldmatrix", WARP, execute_ldmatrix<TRANSPOSED>};
template <class T> static const Instruction mma{"mma", WARP, execute_mma<T>};

// wgmma, as the PTX specification describes it. A descriptor holds the address of a matrix divided by 16 in
// bits 0-13, and the distance between two groups of 8 rows divided by 16 in bits 32-45. Bits 62-63 are 1 for
// the 128-byte swizzle. Its rows are 128 bytes apart, and bits 4-6 of an address are xored with bits 7-9.
template <class T> float element_of_shared_matrix(uint64_t descriptor, int row, int k) {
    if (descriptor >> 62 != 1 || descriptor >> 46 & 0x3f) fail("cuda_on_cpu: not the 128-byte swizzle\n");
    const unsigned start = (descriptor & 0x3fff) * 16, stride = (descriptor >> 32 & 0x3fff) * 16;
    const unsigned address = start + row / 8 * stride + row % 8 * 128 + k * 2;
    const unsigned swizzled = address ^ (address >> 7 & 7) << 4;
    if (!gpu.visible.at(swizzled / 16)) return NAN;  // a fence.proxy.async is missing
    return to_float32(*reinterpret_cast<T*>(gpu.shared + swizzled));
}
template <class T, int N> void execute_product(const Product& p) {
    static float A[64][16], B[16][N];
    for (int k = 0; k < 16; k++) {
        for (int m = 0; m < 64; m++) A[m][k] = element_of_shared_matrix<T>(p.a, m, k);
        for (int n = 0; n < N; n++) B[k][n] = element_of_shared_matrix<T>(p.b, n, k);
    }
    for (int m = 0; m < 64; m++) {
        float C[N] = {};
        for (int k = 0; k < 16; k++)
            for (int n = 0; n < N; n++) C[n] += A[m][k] * B[k][n];
        for (int n = 0; n < N; n++)  // row m belongs to warp m / 16, and there the fragments are those of mma
            p.sums[m / 16 * 32 + m % 8 * 4 + n % 8 / 2][n / 8 * 4 + m % 16 / 8 * 2 + n % 2] += C[n];
    }
}
template <class T, int N> void execute_wgmma(Thread* threads) {
    const auto descriptors = (const uint64_t*)threads->operands[1];
    Product product{descriptors[0], descriptors[1], {}, execute_product<T, N>};
    for (int i = 0; i < WARPGROUP; i++) {
        product.sums[i] = (float*)threads[i].operands[0];
        if (memcmp(threads[i].operands[1], descriptors, 16)) fail("cuda_on_cpu: descriptors differ\n");
        if (!threads[i].registers_fenced) fail("cuda_on_cpu: wgmma without wgmma.fence\n");
    }
    if (gpu.eager) threads->products.back().push_back(product);
    else product.execute(product);
}
template <int PENDING> void execute_wgmma_wait(Thread* threads) {
    auto& groups = threads->products;
    for (; int(groups.size()) - 1 > PENDING; groups.erase(groups.begin()))
        for (const Product& product : groups.front()) product.execute(product);
}
inline void execute_wgmma_commit(Thread* threads) { threads->products.emplace_back(); }
template <class T, int N> static const Instruction wgmma{"wgmma", WARPGROUP, execute_wgmma<T, N>};
template <int PENDING>
static const Instruction wgmma_wait{"wgmma.wait_group", WARPGROUP, execute_wgmma_wait<PENDING>};
static const Instruction wgmma_commit{"wgmma.commit_group", WARPGROUP, execute_wgmma_commit};
}  // namespace cuda_on_cpu

template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel* kernel, int, int bytes) {
    const int limit = cuda_on_cpu::environment("CUDA_ON_CPU_SHARED_KB", 227);  // of a block; sm_90 has 227 KB
    if (bytes > limit << 10) return cuda_on_cpu::last_error = cudaErrorInvalidValue;
    return cuda_on_cpu::max_shared_bytes[(void*)kernel] = bytes, cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return std::exchange(cuda_on_cpu::last_error, cudaSuccess); }
inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::wait_at(cuda_on_cpu::barrier, line); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
    cuda_on_cpu::wait_at(cuda_on_cpu::ldmatrix<false>, line, r, row);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
    cuda_on_cpu::wait_at(cuda_on_cpu::ldmatrix<true>, line, r, row);
}
template <class T>
void mma_m16n8k16(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  int line = __builtin_LINE()) {
    const uint32_t b[2] = {b0, b1};
    cuda_on_cpu::wait_at(cuda_on_cpu::mma<T>, line, c, a, b);
}
inline void cp_async16(void* shared, const void* global, int bytes) {
    const cuda_on_cpu::Copy copy{shared, global, bytes};
    cuda_on_cpu::shared_offset(shared);
    if (cuda_on_cpu::gpu.eager) cuda_on_cpu::execute_copy(copy);
    else cuda_on_cpu::gpu.running->copies.back().push_back(copy);
}
inline void cp_async_commit() { cuda_on_cpu::gpu.running->copies.emplace_back(); }
template <int PENDING> void cp_async_wait() {
    auto& groups = cuda_on_cpu::gpu.running->copies;
    for (; int(groups.size()) - 1 > PENDING; groups.erase(groups.begin()))  // the last one is still open
        for (const cuda_on_cpu::Copy& copy : groups.front()) cuda_on_cpu::execute_copy(copy);
}
inline void fence_proxy_async() {
    for (size_t chunk : cuda_on_cpu::gpu.running->unfenced) cuda_on_cpu::gpu.visible.at(chunk) = true;
    cuda_on_cpu::gpu.running->unfenced.clear();
}
inline unsigned shared_address(const void* p) { return unsigned(cuda_on_cpu::shared_offset(p)); }
inline void not_before(float (&)[4]) {}
inline void wgmma_fence() { cuda_on_cpu::gpu.running->registers_fenced = true; }
inline void wgmma_commit(int line = __builtin_LINE()) {
    cuda_on_cpu::wait_at(cuda_on_cpu::wgmma_commit, line);
}
template <int PENDING> void wgmma_wait(int line = __builtin_LINE()) {
    cuda_on_cpu::wait_at(cuda_on_cpu::wgmma_wait<PENDING>, line);
}
template <class T, int GROUPS>
void wgmma(T, float (&c)[GROUPS][4], uint64_t a, uint64_t b, int line = __builtin_LINE()) {
    const uint64_t descriptors[2] = {a, b};
    cuda_on_cpu::wait_at(cuda_on_cpu::wgmma<T, GROUPS * 8>, line, c, descriptors);
}
#endif

// The descriptor of a matrix in shared memory with 64 numbers of 16 bits in a row, in the 128-byte swizzle.
// Bits 0-13 are its address, bits 32-45 the 1024 bytes from 8 rows to the next 8 rows, both in units of 16
// bytes. Bits 62-63 are 1 for this swizzle, which ignores bits 16-29.
__device__ inline uint64_t wgmma_descriptor(const void* matrix) {
    return shared_address(matrix) >> 4 | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
