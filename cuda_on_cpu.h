// cuda_on_cpu.h: compile a .cu file with g++ and run its kernels on the CPU, without a GPU, under gdb or
// ASan.
//
//   nvcc moe_kernel.cu                  the names below become CUDA and PTX instructions (first part, short)
//   g++ -x c++ -std=c++17 moe_kernel.cu the same names become a model of a GPU (second part)
//
// The model. Every CUDA thread of a block is a fiber: a stack of its own on which the kernel runs as ordinary
// C++. It runs until the kernel waits for other threads: at __syncthreads, or at an instruction that a warp
// executes together (ldmatrix, mma). Then the next fiber runs. Blocks follow one another, so atomics and
// races between blocks are not modelled. Nor are bank conflicts, wgmma and TMA. What it is strict about, so
// that tests find mistakes:
//   - shared memory holds NaN when a block starts: reading what nobody wrote shows in the result;
//   - cp.async copies nothing until the thread waits for it: a missing wait shows;
//   - a thread runs as far as it can before the next: a missing __syncthreads shows; CUDA_ON_CPU_REVERSE=1
//     in the environment runs the threads last to first, another order that a GPU may choose;
//   - threads of a warp that wait at different places, and barriers that some threads never reach, abort;
//   - shared memory and stacks are ordinary memory that -fsanitize=address,undefined watches.
// The stack switch is written for x86-64; elsewhere, or with -DCUDA_ON_CPU_UCONTEXT, POSIX ucontext does it
// (slower).
#pragma once
#include <cstdint>

#ifdef __CUDACC__  // ---------------------------------------------------------------- a real GPU
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    kernel<<<grid, block, shared_bytes, stream>>>(__VA_ARGS__)
#define DYNAMIC_SHARED(type, name)                              \
    extern __shared__ __align__(128) unsigned char name##_raw[]; \
    type* const name = reinterpret_cast<type*>(name##_raw)

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define SM80(...) __trap()  // cp.async, and mma of this shape, came with sm_80; the fp32 kernels use neither
#else
#define SM80(...) asm volatile(__VA_ARGS__)
#endif

// 16 bytes from global to shared memory in the background; with bytes = 0 the source is not read: zeros are
// written.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes) {
    const unsigned to = unsigned(__cvta_generic_to_shared(shared));
    SM80("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}
// Close a group of copies. Wait until at most PENDING of this thread's latest groups are still under way.
__device__ __forceinline__ void cp_async_commit() { SM80("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
    SM80("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}
// Four 8x8 matrices of 16-bit numbers. Lane l gives the address of row l%8 of matrix l/8, and receives from
// every matrix i the two neighbours at row l/4, columns 2*(l%4) and 2*(l%4)+1, in r[i].
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    const unsigned from = unsigned(__cvta_generic_to_shared(row));
    SM80("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}
// C (16x8, fp32) += A (16x16) B (16x8), spread over the 32 lanes of a warp as ldmatrix leaves them. Lane l
// holds of C: c[0], c[1] at row l/4, columns 2*(l%4) and one on; c[2], c[3] eight rows below.
#define MMA(TYPE, NAME)                                                                                     \
    __device__ __forceinline__ void mma_m16n8k16(TYPE, float (&c)[4], const uint32_t (&a)[4],               \
                                                 uint32_t b0, uint32_t b1) {                                \
        SM80("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 "                                 \
             "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                              \
             : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                               \
             : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                               \
    }
MMA(__nv_bfloat16, "bf16")  // the first argument only selects the type
MMA(__half, "f16")

#else  // ---------------------------------------------------------------- the model
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <sys/mman.h>
#include <vector>
#if !defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
#define CUDA_ON_CPU_UCONTEXT
#endif
#ifdef CUDA_ON_CPU_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

// The words of CUDA C++ and the calls of its runtime that a .cu file here uses.
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
    ((void)(stream), cuda_on_cpu::launch(grid, block, shared_bytes, [=] { kernel(__VA_ARGS__); }))
#define DYNAMIC_SHARED(type, name) type* const name = reinterpret_cast<type*>(cuda_on_cpu::gpu.shared)
#define threadIdx (cuda_on_cpu::gpu.running->index)
#define blockIdx (cuda_on_cpu::gpu.block)
#define blockDim (cuda_on_cpu::gpu.block_size)
#define gridDim (cuda_on_cpu::gpu.grid_size)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using std::max;
using std::min;
typedef int cudaError_t;
typedef void* cudaStream_t;
enum { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaDevAttrMultiProcessorCount };
template <class Kernel> cudaError_t cudaFuncSetAttribute(Kernel*, int, int bytes) {
    return bytes <= 99 << 10 ? cudaSuccess : cudaErrorInvalidValue;  // the limit of sm_89, the smallest
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 132, cudaSuccess; }  // H100
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

// 16-bit floats: their bits, and conversions that round to the nearest, ties to even, as the GPU's do.
struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
template <class To, class From> To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
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
    const bool finite = rest < 0x7c00u << 13;  // times 2^112 moves the exponent, that of subnormals too
    const float f = finite ? bit_cast<float>(rest) * 0x1p112f : bit_cast<float>(rest | 0x7f800000u);
    return bit_cast<float>(bit_cast<uint32_t>(f) | sign);
}
inline __half __float2half(float f) {
    const uint32_t u = bit_cast<uint32_t>(f), size = u & 0x7fffffffu, sign = u >> 16 & 0x8000u;
    if (f != f) return {0x7fff};
    if (size >= 0x477ff000u) return {uint16_t(sign | 0x7c00)};  // 65520 and more rounds to infinity
    if (size < 0x38800000u)                                     // below 2^-14: a multiple of 2^-24
        return {uint16_t(sign | uint32_t(std::nearbyint(std::fabs(f) * 0x1p24f)))};
    return {uint16_t(sign | (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13)};
}
inline float to_float32(__nv_bfloat16 h) { return __bfloat162float(h); }
inline float to_float32(__half h) { return __half2float(h); }

namespace cuda_on_cpu {

// A stack to run on, and how to leave one for another.
#ifdef CUDA_ON_CPU_UCONTEXT
typedef ucontext_t Context;
inline void switch_stack(Context& from, Context& to) { swapcontext(&from, &to); }
inline void prepare_stack(Context& c, char* stack, size_t size, void (*entry)()) {
    getcontext(&c);
    c.uc_stack.ss_sp = stack;
    c.uc_stack.ss_size = size;
    c.uc_link = nullptr;
    makecontext(&c, entry, 0);
}
#else
typedef void* Context;  // the stack pointer; what a function must preserve lies on the stack itself
__attribute__((naked, noinline)) inline void switch_stack(Context& /*from: rdi*/, Context& /*to: rsi*/) {
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
        "movq %rsp, (%rdi); movq (%rsi), %rsp\n"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void prepare_stack(Context& c, char* stack, size_t size, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + size);
    *--top = nullptr;  // where entry would return to; it never does, but the ABI wants this alignment
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    c = top;
}
#endif

struct Copy { void* to; const void* from; int bytes; };
struct Thread;
struct Instruction {  // what a thread waits for; a warp's is executed once all its lanes have come to it
    const char* name;
    void (*execute)(Thread* lanes);
};
static const Instruction start{"start", nullptr}, finished{"the end", nullptr};
static const Instruction barrier{"__syncthreads", nullptr};

struct Thread {
    dim3 index;
    const Instruction* at;
    int line = 0;                           // of the source, where it waits
    void* operands[3];                      // of the instruction: addresses on this stack or in shared memory
    std::vector<std::vector<Copy>> copies;  // groups of cp.async not waited for yet; the last is still open
    char* stack;
    Context context;
    void* fake_stack = nullptr;             // ASan's
};

struct Gpu {
    std::vector<Thread> threads;
    Thread* running = nullptr;
    dim3 block, block_size, grid_size;
    unsigned char* shared = nullptr;
    std::function<void()> kernel;
    Context scheduler;
    void* scheduler_fake_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_size = 0;
};
static Gpu gpu;  // static: two libraries built with this header must not share one
static std::mutex one_launch_at_a_time;
constexpr size_t STACK_BYTES = 256 << 10;

// ASan has to be told of every switch, or it takes the other stack for an overflow of this one.
inline void leave_thread(bool for_good) {
    Thread& t = *gpu.running;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(for_good ? nullptr : &t.fake_stack, gpu.scheduler_stack,
                                   gpu.scheduler_stack_size);
#else
    (void)for_good;
#endif
    switch_stack(t.context, gpu.scheduler);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(t.fake_stack, &gpu.scheduler_stack, &gpu.scheduler_stack_size);
#endif
}
inline void run_thread(Thread& t) {
    gpu.running = &t;
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_start_switch_fiber(&gpu.scheduler_fake_stack, t.stack, STACK_BYTES);
#endif
    switch_stack(gpu.scheduler, t.context);
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(gpu.scheduler_fake_stack, nullptr, nullptr);
#endif
}
inline void thread_main() {
#ifdef __SANITIZE_ADDRESS__
    __sanitizer_finish_switch_fiber(nullptr, &gpu.scheduler_stack, &gpu.scheduler_stack_size);
#endif
    gpu.kernel();
    gpu.running->at = &finished;
    leave_thread(true);
}
inline void wait_at(const Instruction& instruction, int line) {
    gpu.running->at = &instruction;
    gpu.running->line = line;
    leave_thread(false);
}

// All of these threads must wait at the same place: anything else is undefined on a GPU.
inline void check_together(const Thread* threads, int n, const char* group) {
    for (int i = 1; i < n; i++) {
        const Thread &a = threads[0], &b = threads[i];
        if (a.at == b.at && (a.line == b.line || a.at == &finished)) continue;
        fprintf(stderr,
                "cuda_on_cpu: threads of one %s diverge in block (%u, %u, %u): thread %d is at %s (line %d), "
                "thread %d at %s (line %d)\n",
                group, gpu.block.x, gpu.block.y, gpu.block.z, int(&a - gpu.threads.data()), a.at->name,
                a.line, int(&b - gpu.threads.data()), b.at->name, b.line);
        abort();
    }
}
inline void run_warp(Thread* lanes, int n, bool reverse) {  // until all lanes wait at a barrier, or end
    for (;;) {
        for (int i = 0; i < n; i++) run_thread(lanes[reverse ? n - 1 - i : i]);
        check_together(lanes, n, "warp");
        if (!lanes->at->execute) return;
        if (n != 32) fprintf(stderr, "cuda_on_cpu: %s by %d threads, not 32\n", lanes->at->name, n), abort();
        lanes->at->execute(lanes);
    }
}
inline void run_block(int n, bool reverse) {
    for (int i = 0; i < n; i++) {
        Thread& t = gpu.threads[i];
        const dim3& size = gpu.block_size;
        t.index = dim3(i % size.x, i / size.x % size.y, i / (size.x * size.y));
        t.at = &start;
        t.copies.assign(1, {});
        prepare_stack(t.context, t.stack, STACK_BYTES, thread_main);
    }
    do {
        for (int w = 0, warps = (n + 31) / 32; w < warps; w++) {
            const int first = (reverse ? warps - 1 - w : w) * 32;
            run_warp(&gpu.threads[first], std::min(n - first, 32), reverse);
        }
        check_together(gpu.threads.data(), n, "block");
    } while (gpu.threads[0].at != &finished);
}
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
    const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
    const char* reverse = getenv("CUDA_ON_CPU_REVERSE");
    const int n = block.x * block.y * block.z;
    while (int(gpu.threads.size()) < n) {  // stacks are kept for the next launch
        gpu.threads.emplace_back();
        gpu.threads.back().stack = static_cast<char*>(
            mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
        if (gpu.threads.back().stack == MAP_FAILED) perror("cuda_on_cpu: a stack"), abort();
    }
    gpu.grid_size = grid;
    gpu.block_size = block;
    gpu.kernel = std::move(kernel);
    gpu.shared = static_cast<unsigned char*>(aligned_alloc(128, (shared_bytes / 128 + 1) * 128));
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                gpu.block = dim3(x, y, z);
                memset(gpu.shared, 0xff, shared_bytes);  // NaN in every float format
                run_block(n, reverse && *reverse == '1');
            }
    free(gpu.shared);
}

// One lane's share of an 8x8 matrix of T: two neighbours in 32 bits.
template <class T> float element(const uint32_t& pair, int i) {
    return to_float32(reinterpret_cast<const T*>(&pair)[i]);
}

inline void execute_ldmatrix(Thread* lanes) {
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++)
            memcpy(static_cast<uint32_t*>(lanes[l].operands[0]) + i,
                   static_cast<char*>(lanes[i * 8 + l / 4].operands[1]) + l % 4 * 4, 4);
}
template <class T> void execute_mma(Thread* lanes) {
    float A[16][16], B[16][8], C[16][8] = {};
    for (int l = 0; l < 32; l++) {
        const uint32_t* a = static_cast<uint32_t*>(lanes[l].operands[1]);
        const uint32_t* b = static_cast<uint32_t*>(lanes[l].operands[2]);
        for (int i = 0; i < 2; i++) {
            const int row = l / 4, k = l % 4 * 2 + i;
            A[row][k] = element<T>(a[0], i), A[row + 8][k] = element<T>(a[1], i);
            A[row][k + 8] = element<T>(a[2], i), A[row + 8][k + 8] = element<T>(a[3], i);
            B[k][row] = element<T>(b[0], i), B[k + 8][row] = element<T>(b[1], i);
        }
    }
    for (int i = 0; i < 16; i++)
        for (int k = 0; k < 16; k++)
            for (int j = 0; j < 8; j++) C[i][j] += A[i][k] * B[k][j];
    for (int l = 0; l < 32; l++)
        for (int i = 0; i < 4; i++)
            static_cast<float*>(lanes[l].operands[0])[i] += C[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
}
static const Instruction ldmatrix{"ldmatrix", execute_ldmatrix};
template <class T> static const Instruction mma{"mma", execute_mma<T>};
}  // namespace cuda_on_cpu

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_cpu::wait_at(cuda_on_cpu::barrier, line); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, int line = __builtin_LINE()) {
    void** operands = cuda_on_cpu::gpu.running->operands;
    operands[0] = r, operands[1] = const_cast<void*>(row);
    cuda_on_cpu::wait_at(cuda_on_cpu::ldmatrix, line);
}
template <class T>
void mma_m16n8k16(T, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  int line = __builtin_LINE()) {
    uint32_t b[2] = {b0, b1};
    void** operands = cuda_on_cpu::gpu.running->operands;
    operands[0] = c, operands[1] = const_cast<uint32_t*>(a), operands[2] = b;
    cuda_on_cpu::wait_at(cuda_on_cpu::mma<T>, line);
}
inline void cp_async16(void* shared, const void* global, int bytes) {
    cuda_on_cpu::gpu.running->copies.back().push_back({shared, global, bytes});
}
inline void cp_async_commit() { cuda_on_cpu::gpu.running->copies.emplace_back(); }
template <int PENDING> void cp_async_wait() {
    auto& groups = cuda_on_cpu::gpu.running->copies;
    while (int(groups.size()) - 1 > PENDING) {
        for (const cuda_on_cpu::Copy& c : groups.front()) {
            memcpy(c.to, c.from, c.bytes);
            memset(static_cast<char*>(c.to) + c.bytes, 0, 16 - c.bytes);
        }
        groups.erase(groups.begin());
    }
}
#endif
