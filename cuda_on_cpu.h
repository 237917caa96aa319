// cuda_on_cpu.h compiles a .cu file with g++ and runs its kernels on the CPU. So they can be tested without a
// GPU and examined with gdb and AddressSanitizer (ASan).
//
//   nvcc moe_kernel.cu                   takes the first part: the names become CUDA and PTX instructions
//   g++ -x c++ -std=c++17 moe_kernel.cu  takes the second part: the names become a model of a GPU
//
// The model. Every CUDA thread of a block is a fiber, which means that it has a stack of its own, on which
// the kernel runs as ordinary C++. A fiber runs until the kernel has to wait for other threads: at
// __syncthreads, or at an instruction that a whole warp executes together (ldmatrix, mma). Then the next
// fiber runs. The blocks run one after another. Atomics, races between blocks, bank conflicts, wgmma and TMA
// are not modelled. The model is strict in the following ways, so that tests find mistakes:
//   - Shared memory is filled with NaN when a block starts. If a kernel reads memory that no thread wrote,
//     the result is NaN.
//   - cp.async copies nothing until the thread waits for it, so a missing wait leaves NaN in the result too.
//   - Each thread runs as far as it can before the next one starts, so a missing __syncthreads shows up. Some
//     show up only in the reverse order, which CUDA_ON_CPU_REVERSE=1 in the environment selects. A GPU may
//     choose either order.
//   - The program aborts if threads of a warp wait at different places, or if a barrier is not reached by all
//     threads of the block.
//   - Shared memory and stacks are ordinary memory, which -fsanitize=address,undefined checks.
// The stack switch is written in assembly for x86-64. On other CPUs, or with -DCUDA_ON_CPU_UCONTEXT, POSIX
// ucontext does it, more slowly.
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
#define SM80_ASM(...) __trap()  // cp.async and this shape of mma need sm_80; the fp32 kernels use neither
#else
#define SM80_ASM(...) asm volatile(__VA_ARGS__)
#endif

// Copies 16 bytes from global to shared memory asynchronously. Only the first `bytes` of them are read from
// the source, and the rest are zeros. With bytes = 0 the source is not read at all.
__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes) {
    const unsigned to = unsigned(__cvta_generic_to_shared(shared));
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
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    const unsigned from = unsigned(__cvta_generic_to_shared(row));
    SM80_ASM("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
         : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(from) : "memory");
}
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

// The keywords of CUDA C++ and the runtime functions that moe_kernel.cu uses.
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
    return bytes <= 99 << 10 ? cudaSuccess : cudaErrorInvalidValue;  // the limit on sm_86 and sm_89
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) { return *value = 132, cudaSuccess; }  // H100
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "invalid argument"; }

// 16-bit floats are stored as bits. Conversions round to the nearest value, ties to even, as on a GPU.
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

// The context of a fiber (or of the scheduler), and the switch from one to another.
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
typedef void* Context;  // the stack pointer; callee-saved registers are pushed on the stack itself
__attribute__((naked, noinline)) inline void switch_stack(Context& /*from: rdi*/, Context& /*to: rsi*/) {
    asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
        "movq %rsp, (%rdi); movq (%rsi), %rsp\n"
        "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}
inline void prepare_stack(Context& c, char* stack, size_t size, void (*entry)()) {
    void** top = reinterpret_cast<void**>(stack + size);
    *--top = nullptr;  // entry's return address: it never returns, but the ABI needs this alignment
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;  // the six registers that switch_stack pops
    c = top;
}
#endif

struct Copy { void* to; const void* from; int bytes; };  // one cp.async
struct Thread;
// Where a thread can wait. An instruction of a warp is executed once all lanes of the warp have reached it.
// At the start, at the end and at a barrier there is nothing to execute.
struct Instruction {
    const char* name;
    void (*execute)(Thread* lanes);
};
static const Instruction start{"start", nullptr}, finished{"the end", nullptr};
static const Instruction barrier{"__syncthreads", nullptr};

struct Thread {
    dim3 index;
    const Instruction* at;                  // where it waits
    int line = 0;                           // the source line where it waits
    void* operands[3];                      // of a warp instruction: addresses on stacks or in shared memory
    std::vector<std::vector<Copy>> copies;  // the pending groups of cp.async; the last one is still open
    char* stack;
    Context context;
    void* fake_stack = nullptr;             // belongs to ASan
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
static Gpu gpu;  // static, so that two libraries built with this header have one each
static std::mutex one_launch_at_a_time;
constexpr size_t STACK_BYTES = 256 << 10;

// ASan must be told about every switch. Otherwise it takes the other stack for an overflow of this one.
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

// Aborts unless all of these threads wait at the same place. Anything else is undefined behaviour on a GPU.
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
inline void run_warp(Thread* lanes, int n, bool reverse) {  // until all lanes wait at a barrier or have ended
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
    while (int(gpu.threads.size()) < n) {  // later launches reuse the stacks
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

// A lane holds two adjacent numbers of an 8x8 matrix in one 32-bit register. Returns number i of them.
template <class T> float element(const uint32_t& pair, int i) {
    return to_float32(reinterpret_cast<const T*>(&pair)[i]);
}

// Both instructions distribute matrices over the lanes as described at ldmatrix_x4 and MMA above.
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
    while (int(groups.size()) - 1 > PENDING) {  // the last group is still open and does not count
        for (const cuda_on_cpu::Copy& c : groups.front()) {
            memcpy(c.to, c.from, c.bytes);
            memset(static_cast<char*>(c.to) + c.bytes, 0, 16 - c.bytes);
        }
        groups.erase(groups.begin());
    }
}
#endif
