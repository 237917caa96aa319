"""moe_kernel.cu: every test runs it on the CPU (cuda_on_cpu.h); most run on a GPU too: `pytest -m gpu`."""
import ctypes
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings

import binding
from binding import cuda_mmoe_linear, cuda_mmoe_swiglu, cuda_route, kernel_linear, kernel_route, kernel_swiglu

HERE = Path(__file__).resolve().parent
TEXT, VISUAL, PAD = 0, 1, 2
TILES = {"auto": 0, "small": 1, "medium": 2, "large": 3, "naive": 4}       # `enum Choice` in moe_kernel.cu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
needs_gpu = [pytest.mark.gpu, no_gpu]
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])

labels_of_a_batch = st.lists(st.sampled_from([TEXT, VISUAL, PAD]), max_size=130)
multiples_of_8 = st.integers(1, 34).map(lambda i: 8 * i)
dtypes = st.sampled_from(list(binding.KERNEL_DTYPES))


# ---------------------------------------------------------------- references, and the check for all builds

def random_tensors(*shapes, dtype=torch.float32, device="cpu", seed=0):
    """Standard normal; matrices after the first are scaled like weights (rows, K): x wᵀ is of order 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [t.div(t.shape[-1] ** 0.5 if i else 1).to(dtype).to(device) for i, t in enumerate(tensors)]


def choose(labels, text, visual):
    return torch.where(labels[:, None] == VISUAL, visual, text).masked_fill(labels[:, None] >= PAD, 0)


def linear_reference(x, w_text, w_visual, labels):
    return choose(labels, x @ w_text.T, x @ w_visual.T)


def swiglu_reference(x, w1_text, w3_text, w1_visual, w3_visual, labels):
    text, visual = F.silu(x @ w1_text.T) * (x @ w3_text.T), F.silu(x @ w1_visual.T) * (x @ w3_visual.T)
    return choose(labels, text, visual)


def in_float64(*tensors):
    return [t.detach().cpu().double() for t in tensors]


def assert_rounded(actual, expected):
    """expected in float64. Sums of order 1 in float32, then one rounding: half an eps, allowed twice."""
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=torch.finfo(actual.dtype).eps, atol=1e-5)


def launch_into_poison(function, n, m, dtype, device, before, after):
    """Call a launcher with an output full of NaN between two guard rows; return it, the guards untouched."""
    y = torch.full((n + 2, m), float("nan"), dtype=dtype, device=device)
    y[[0, -1]] = 7
    binding.launch_kernel(function, y.device, *before, y[1:-1], *after)
    assert (y[[0, -1]] == 7).all(), "the kernel wrote outside its output"
    return y[1:-1]


def check_kernels(labels, k, m, dtype, tile="auto", seed=0, device="cpu"):
    """Route, linear and SwiGLU of one case against float64, every element of the poisoned outputs written."""
    labels, n = torch.tensor(labels, dtype=torch.uint8, device=device), len(labels)
    rows, counts = (torch.full((size,), -1, device=device) for size in (n, 2))
    binding.launch_kernel("mmoe_route", rows.device, labels, rows, counts, n)
    assert torch.equal(rows, labels.clamp(max=PAD).argsort(stable=True))
    assert counts.tolist() == [(labels == TEXT).sum(), (labels == VISUAL).sum()]
    x, residual, *w = random_tensors((n, k), (n, m), *[(m, k)] * 4, dtype=dtype, device=device, seed=seed)
    x64, residual64, *w64 = in_float64(x, residual, *w)
    codes, order = labels.cpu(), rows.cpu()
    gather, scatter, add = seed % 2 == 0, seed // 2 % 2 == 0, seed // 4 % 2 == 0
    y = launch_into_poison("mmoe_linear", n, m, dtype, device,
                           (x if gather else x[rows], w[0], w[1], residual if add else None),
                           (rows if gather else None, rows if scatter else None, counts, n, k, m,
                            binding.KERNEL_DTYPES[dtype], TILES[tile]))
    expected = linear_reference(x64, w64[0], w64[1], codes)
    expected = expected if scatter else expected[order]
    assert_rounded(y, expected + residual64 if add else expected)
    if tile != "naive":
        h = launch_into_poison("mmoe_swiglu", n, m, dtype, device, (x, *w),
                               (rows, counts, n, k, m, binding.KERNEL_DTYPES[dtype], TILES[tile]))
        assert_rounded(h, swiglu_reference(x64, *w64, codes)[order])


def check_build(path):
    """What a sanitized or sabotaged build of moe_kernel.cu is put to: both experts with boundary tiles and
    tails, more steps along k than pipeline stages, and all-pad tiles, in every dtype and tile shape."""
    library = ctypes.CDLL(str(path))
    library.mmoe_error.restype = ctypes.c_char_p
    binding.kernel_library = lambda device: library
    batches = [[], [PAD] * 3, ([TEXT, VISUAL, VISUAL] * 23 + [PAD] * 80)[:140]]
    shapes = [(torch.float32, "auto"), (torch.bfloat16, "medium"), (torch.float16, "large"),
              (torch.bfloat16, "naive")]
    for seed, (labels, (dtype, tile)) in enumerate(itertools.product(batches, shapes)):
        check_kernels(labels, 168, 72, dtype, tile, seed)
    check_kernels(batches[2][:70], 584, 40, torch.float16, "small", seed=4)


def run_python(code, *arguments, timeout=120, **environment):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=HERE, timeout=timeout,
                          env={**os.environ, **environment}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def compile_with_gcc(source, output, *flags):
    command = ["g++", "-x", "c++", "-std=c++17", "-I", HERE, *flags, "-fPIC", "-shared", source, "-o", output]
    command = list(map(str, command))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# ---------------------------------------------------------------- what the kernels compute

@on_every_device
@settings(max_examples=25, deadline=None)
@given(labels=st.lists(st.integers(0, 3), max_size=700))
def test_moe_route_is_a_stable_partition(device, labels):
    labels = torch.tensor(labels, dtype=torch.uint8)
    rows, counts = cuda_route(labels.to(device))
    parts = [TEXT], [VISUAL], [PAD, 3]
    by_hand = [i for part in parts for i, label in enumerate(labels.tolist()) if label in part]
    assert rows.tolist() == by_hand
    assert counts.tolist() == [labels.tolist().count(TEXT), labels.tolist().count(VISUAL)]


@on_every_device
@settings(max_examples=40, deadline=None)
@given(labels=labels_of_a_batch, k=st.integers(1, 50).map(lambda i: 8 * i), m=multiples_of_8, dtype=dtypes,
       tile=st.sampled_from(list(TILES)), seed=st.integers(0, 7))
@example(labels=[], k=8, m=8, dtype=torch.bfloat16, tile="auto", seed=0)
@example(labels=[TEXT] * 64 + [VISUAL] * 66, k=200, m=264, dtype=torch.bfloat16, tile="large", seed=1)
@example(labels=[VISUAL] * 130, k=600, m=40, dtype=torch.float16, tile="small", seed=2)
def test_routed_kernels_equal_a_float64_reference_and_write_every_element(device, labels, k, m, dtype, tile,
                                                                          seed):
    check_kernels(labels, k, m, dtype, tile, seed, device)


@on_every_device
@settings(max_examples=25, deadline=None)
@given(labels=labels_of_a_batch, dtype=dtypes, bad=st.sampled_from([math.nan, math.inf, -math.inf]),
       kind=st.sampled_from([TEXT, VISUAL, PAD]))
@example(labels=[TEXT, VISUAL, PAD] * 3, dtype=torch.float32, bad=math.inf, kind=VISUAL)  # pads share tiles
@example(labels=[TEXT, VISUAL, PAD] * 3, dtype=torch.bfloat16, bad=math.inf, kind=VISUAL)
def test_nan_in_one_kind_of_token_and_its_expert_never_reaches_another(device, labels, dtype, bad, kind):
    labels = torch.tensor(labels, dtype=torch.uint8, device=device)
    x, *w = random_tensors((len(labels), 40), *[(48, 40)] * 4, (40, 48), (40, 48), dtype=dtype, device=device)
    rows, counts = cuda_route(labels)

    def both(x, w):
        return (cuda_mmoe_linear(x, w[0], w[2], rows, counts),
                cuda_mmoe_swiglu(x, (w[0], w[1], w[4]), (w[2], w[3], w[5]), rows, counts))
    mine = {TEXT: (0, 1, 4), VISUAL: (2, 3, 5), PAD: ()}[kind]
    clean, spoilt = both(x, w), both(x.masked_fill(labels[:, None] == kind, bad),
                                     [t.clone().fill_(bad) if i in mine else t for i, t in enumerate(w)])
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a[labels != kind], b[labels != kind])
        assert b[labels == PAD].eq(0).all()


@settings(max_examples=10, deadline=None)
@given(labels=labels_of_a_batch, dtype=dtypes, tile=st.sampled_from(["small", "medium", "large"]))
def test_the_order_of_threads_does_not_change_a_bit(labels, dtype, tile):
    labels = torch.tensor(labels, dtype=torch.uint8)
    x, *w = random_tensors((len(labels), 200), *[(72, 200)] * 4, dtype=dtype)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for reverse in "01":
            patch.setenv("CUDA_ON_CPU_REVERSE", reverse)
            rows, counts = cuda_route(labels)
            linear = kernel_linear(x, w[0], w[1], rows, counts, None, True, True, TILES[tile])
            results.append((rows, counts, linear,
                            kernel_swiglu(x, *w, rows, counts, TILES[tile])))
    for forward, backward in zip(*results, strict=True):
        assert torch.equal(forward, backward)


@on_every_device
def test_strided_and_misaligned_inputs_give_what_their_copies_give(device):
    labels = torch.tensor([TEXT, VISUAL, PAD] * 7, dtype=torch.uint8, device=device)
    x, w_text, w_visual = random_tensors((48, 42), (24, 24), (24, 48), dtype=torch.bfloat16, device=device)
    rows, counts = cuda_route(labels[::1])
    x = x[:, ::2].T[:21].T[:, :21].T.contiguous()[:, :48].repeat(1, 1)      # (21, 48)
    strided = torch.stack((x, x), -1)[..., 0][:, ::2]                        # (21, 24), strides (96, 4)
    shifted = F.pad(x[:, :24].flatten(), (1, 0))[1:].view(21, 24)            # contiguous, 2 bytes off
    assert not strided.is_contiguous() and shifted.data_ptr() % 16 == 2
    for awkward in (strided, shifted):
        inputs = awkward, w_text.T, w_visual[:, ::2]
        copies = (t.clone(memory_format=torch.contiguous_format) for t in inputs)
        assert torch.equal(cuda_mmoe_linear(*inputs, rows, counts), cuda_mmoe_linear(*copies, rows, counts))


@on_every_device
def test_a_routed_layer_equals_two_ordinary_ones(device):
    """The whole FFN, as the model calls it."""
    labels = torch.tensor([TEXT, VISUAL, VISUAL, PAD] * 20, dtype=torch.uint8, device=device)
    x, *w = random_tensors((80, 64), *[(96, 64)] * 4, (64, 96), (64, 96), device=device)
    y = cuda_mmoe_swiglu(x, (w[0], w[1], w[4]), (w[2], w[3], w[5]), *cuda_route(labels))
    x, *w = in_float64(x, *w)
    text, visual = ((F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
                    for w1, w3, w2 in ((w[0], w[1], w[4]), (w[2], w[3], w[5])))
    assert_rounded(y, choose(labels.cpu(), text, visual))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("tile", ["auto", "small", "medium", "large"])
@pytest.mark.parametrize("tokens", [64, 320, 1856])
def test_a_full_size_layer_is_right_on_a_gpu(device, tokens, tile):
    labels = torch.arange(tokens, device=device).remainder(11).clamp(max=2).to(torch.uint8)
    x, *w = random_tensors((tokens, 2048), *[(8192, 2048)] * 4, dtype=torch.bfloat16, device=device)
    rows, counts = cuda_route(labels)
    h = kernel_swiglu(x, *w, rows, counts, TILES[tile])
    y = kernel_linear(x, w[0], w[1], rows, counts, None, True, True, TILES[tile])
    x, *w = (t.double() for t in (x, *w))
    torch.testing.assert_close(y.double(), linear_reference(x, w[0], w[1], labels), rtol=2 ** -7, atol=1e-4)
    torch.testing.assert_close(h.double(), swiglu_reference(x, *w, labels)[rows], rtol=2 ** -7, atol=1e-4)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_a_cuda_graph_captured_with_one_mask_serves_every_other(device):
    """Capture refuses a sync, an allocation outside its pool and a launch on another stream."""
    x, *w = random_tensors((130, 64), *[(96, 64)] * 4, device=device)
    labels = torch.zeros(130, dtype=torch.uint8, device=device)

    def layer():
        rows, counts = cuda_route(labels)
        return kernel_swiglu(x, *w, rows, counts, 0), cuda_mmoe_linear(x, w[0], w[1], rows, counts)
    layer()                                                                # builds and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for seed in range(4):
        labels.copy_(torch.randint(0, 3, (130,), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for replayed, eager in zip(captured, layer(), strict=True):
            assert torch.equal(replayed, eager)


# ---------------------------------------------------------------- the operators in PyTorch

@on_every_device
@settings(max_examples=8, deadline=None)
@given(labels=labels_of_a_batch, gather=st.booleans(), scatter=st.booleans(), add=st.booleans(),
       wanted=st.lists(st.booleans(), min_size=6, max_size=6).filter(any))
def test_gradients_equal_those_of_the_float64_reference(device, labels, gather, scatter, add, wanted):
    labels = torch.tensor(labels, dtype=torch.uint8, device=device)
    rows, counts = cuda_route(labels)
    n, codes, order = len(labels), labels.cpu(), rows.cpu()
    inputs = random_tensors((n, 24), *[(40, 24)] * 4, (n, 40), device=device)
    reference = in_float64(*inputs)
    for t, r, want in zip(inputs, reference, wanted, strict=True):
        t.requires_grad_(want), r.requires_grad_(want)
    (x, a, b, c, d, residual), (x64, a64, b64, c64, d64, residual64) = inputs, reference
    residual, residual64 = (residual, residual64) if add else (None, torch.zeros(()))
    y = kernel_linear(x if gather else x[rows], a, b, rows, counts, residual, gather, scatter, 0)
    y64 = linear_reference(x64, a64, b64, codes)
    y64 = (y64 if scatter else y64[order]) + residual64
    h = kernel_swiglu(x, a, b, c, d, rows, counts, 0)
    h64 = swiglu_reference(x64, a64, b64, c64, d64, codes)[order]
    direction, = random_tensors((n, 40), device=device, seed=1)
    ((y + h) * direction).sum().backward() if (y + h).requires_grad else None
    ((y64 + h64) * direction.cpu()).sum().backward() if (y64 + h64).requires_grad else None
    for t, r in zip(inputs, reference, strict=True):
        assert (t.grad is None) == (r.grad is None)
        if t.grad is not None:
            torch.testing.assert_close(t.grad.cpu().double(), r.grad, rtol=1e-5, atol=3e-5)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_as_close_as_their_roundings_allow(device, dtype):
    labels = torch.tensor([TEXT, VISUAL, VISUAL, PAD, VISUAL] * 26, dtype=torch.uint8, device=device)
    inputs = random_tensors((130, 64), *[(72, 64)] * 4, dtype=dtype, device=device)
    inputs = [t.requires_grad_() for t in inputs]
    reference = [t.requires_grad_() for t in in_float64(*inputs)]
    rows, counts = cuda_route(labels)
    direction, = random_tensors((130, 72), dtype=dtype, device=device, seed=1)
    kernel_swiglu(*inputs, rows, counts, 0).backward(direction)
    swiglu_reference(*reference, labels.cpu())[rows.cpu()].backward(direction.cpu().double())
    for t, r in zip(inputs, reference, strict=True):      # five roundings on the way to each
        assert (t.grad.cpu().double() - r.grad).norm() / r.grad.norm() < 2 * torch.finfo(dtype).eps


def test_the_reference_itself_passes_gradcheck():
    labels = torch.tensor([TEXT, VISUAL, PAD, VISUAL, TEXT])
    inputs = [t.requires_grad_() for t in in_float64(*random_tensors((5, 8), *[(8, 8)] * 4))]
    assert torch.autograd.gradcheck(lambda *t: swiglu_reference(*t, labels), inputs)
    assert torch.autograd.gradcheck(lambda x, a, b, *_: linear_reference(x, a, b, labels), inputs[:3])


@on_every_device
@pytest.mark.parametrize("n", [0, 37])
def test_operators_pass_opcheck(device, n):
    labels = torch.arange(n, device=device).remainder(3).to(torch.uint8)
    rows, counts = cuda_route(labels)
    tensors = random_tensors((n, 24), (n, 40), *[(40, 24)] * 4, device=device)
    x, residual, *w = (t.requires_grad_() for t in tensors)
    torch.library.opcheck(kernel_route, (labels,))
    torch.library.opcheck(kernel_linear, (x, w[0], w[1], rows, counts, residual, True, True, 0))
    torch.library.opcheck(kernel_linear, (x, w[0].detach(), w[1], rows, counts, None, False, True, 0))
    torch.library.opcheck(kernel_swiglu, (x, *w, rows, counts, 0))


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(3, 12), w=torch.zeros(8, 12)), "multiples of 8"),
    (dict(w=torch.zeros(8, 24)), r"x \(N, K\)"),
    (dict(x=torch.zeros(2, 3, 16)), r"x \(N, K\)"),
    (dict(x=torch.zeros(3, 16).double(), w=torch.zeros(8, 16).double()), "float64"),
    (dict(w=torch.zeros(8, 16).bfloat16()), "bfloat16"),
    (dict(x=torch.zeros(3, 16, device="meta"), w=torch.zeros(8, 16, device="meta")), "meta"),
    (dict(w=torch.zeros(8, 16, device="meta")), "meta"),
    (dict(rows=torch.arange(3).int()), "int64"),
    (dict(rows=torch.arange(4)), r"rows \(N,\)"),
])
def test_what_the_kernel_cannot_do_is_a_clear_error(change, message):
    given = {"x": torch.zeros(3, 16), "w": torch.zeros(8, 16), "rows": torch.arange(3),
             "counts": torch.tensor([3, 0]), **change}
    x, w, rows, counts = given.values()
    with pytest.raises(ValueError, match=message):
        cuda_mmoe_linear(x, w, w, rows, counts)
    with pytest.raises(ValueError, match=message):
        cuda_mmoe_swiglu(x, (w, w, w.T), (w, w, w.T), rows, counts)


def test_labels_of_a_wrong_type_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        cuda_route(torch.zeros(4, dtype=torch.int64))


# ---------------------------------------------------------------- the build

def test_a_kernel_that_cannot_be_built_warns_once_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    binding.kernel_library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no-such-compiler"):
            assert binding.kernel_library(torch.device("cpu")) is None
        with pytest.raises(RuntimeError, match="choose the torch back end"):      # and no second warning
            cuda_route(torch.zeros(4, dtype=torch.uint8))
    finally:
        binding.kernel_library.cache_clear()


def test_two_processes_build_once_and_a_killed_build_stops_nobody(tmp_path):
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" int seven() { return 7; }\n')
    (tmp_path / "cuda_on_cpu.h").touch()
    build = ("import binding, ctypes, pathlib, sys, torch\n"
             "path = binding.build_kernel(torch.device('cpu'), pathlib.Path(sys.argv[1]))\n"
             "assert ctypes.CDLL(path).seven() == 7\nprint(path)")
    os.environ["TORCH_EXTENSIONS_DIR"], old = str(tmp_path / "built"), os.environ.get("TORCH_EXTENSIONS_DIR")
    try:
        folder = Path(binding.build_kernel(torch.device("cpu"), source)).parent
    finally:
        os.environ.pop("TORCH_EXTENSIONS_DIR") if old is None else os.environ.update(TORCH_EXTENSIONS_DIR=old)
    for file in folder.glob("*.so"):
        file.unlink()
    (folder / "lock").touch()               # as a killed torch build leaves it
    command = [sys.executable, "-c", build, str(source)]
    both = [subprocess.Popen(command, cwd=HERE, text=True, stdout=subprocess.PIPE,
                             env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")})
            for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(paths) == 1


def test_nvcc_compiles_it_without_warnings_or_spills(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    report = subprocess.run(["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_80,code=sm_80", "-Werror",
                             "all-warnings", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "moe.cubin",
                             HERE / "moe_kernel.cu"], text=True, capture_output=True)
    assert report.returncode == 0, report.stderr
    assert "warning" not in report.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr)
    assert len(spills) >= 18 and set(spills) == {("0", "0")}


# ---------------------------------------------------------------- the model of a GPU; do the checks bite?

TINY_KERNELS = """
#include "cuda_on_cpu.h"
__global__ void read_early(float* out) {                           // shared memory that nobody wrote
    DYNAMIC_SHARED(float, shared);
    out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void copy(const float* in, float* out, bool wait) {     // cp.async, with the wait or without
    DYNAMIC_SHARED(float, shared);
    cp_async16(shared + 4 * threadIdx.x, in, 16);
    cp_async_commit();
    if (wait) cp_async_wait<0>();
    out[threadIdx.x] = shared[4 * threadIdx.x];
}
__global__ void diverge() { if (threadIdx.x < 40) __syncthreads(); }
__global__ void neighbour(float* out) {                            // needs a barrier, has none
    DYNAMIC_SHARED(float, shared);
    shared[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared[threadIdx.x / 2];
}
extern "C" void run(int which, const float* in, float* out) {
    if (which == 0) LAUNCH(read_early, 1, 64, 256, 0, out);
    if (which == 1 || which == 2) LAUNCH(copy, 1, 64, 1024, 0, in, out, which == 2);
    if (which == 3) LAUNCH(neighbour, 1, 64, 256, 0, out);
    if (which == 4) LAUNCH(diverge, 1, 64, 0, 0);
}
"""


@pytest.mark.parametrize("flags", [[], ["-DCUDA_ON_CPU_UCONTEXT"]])
def test_cuda_on_cpu_is_strict_where_a_gpu_is_silent(tmp_path, monkeypatch, flags):
    (tmp_path / "tiny.cu").write_text(TINY_KERNELS)
    compiler = compile_with_gcc(tmp_path / "tiny.cu", tmp_path / "tiny.so", *flags)
    assert not (output := compiler.communicate()[0]), output
    library, given, out = ctypes.CDLL(str(tmp_path / "tiny.so")), torch.ones(4), torch.zeros(64)

    def run(which):
        library.run(which, ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        return out
    assert run(0).isnan().all(), "shared memory starts as NaN"
    assert run(1).isnan().all() and run(2).eq(1).all(), "nothing arrives before the wait"
    assert torch.equal(run(3), torch.arange(64) // 2.), "first to last, a missing barrier stays hidden ..."
    monkeypatch.setenv("CUDA_ON_CPU_REVERSE", "1")
    assert run(3)[2:].isnan().all(), "... and last to first it shows"
    died = run_python("import ctypes, sys; ctypes.CDLL(sys.argv[1]).run(4, None, None)", tmp_path / "tiny.so")
    assert died.returncode < 0
    where = r"diverge in block \(0, 0, 0\): thread 32 is at .*, thread 40 at the end"
    assert re.search(where, died.stdout), died.stdout


def test_sanitizers_find_nothing(tmp_path):
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]     # -O0 compiles fastest
    compiler = compile_with_gcc(HERE / "moe_kernel.cu", tmp_path / "asan.so", *sanitize)
    assert not (output := compiler.communicate()[0]), output
    libraries = (subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
                 for name in ("libasan", "libubsan"))
    result = run_python("import sys, test_kernel; test_kernel.check_build(sys.argv[1])", tmp_path / "asan.so",
                        CUDA_ON_CPU_REVERSE="1", ASAN_OPTIONS="detect_leaks=0",
                        LD_PRELOAD=" ".join(libraries))
    assert result.returncode == 0, result.stdout[-3000:]


PLANTED_BUGS = {                                # name: what stands in moe_kernel.cu, what is put there
    "nothing planted": ("", ""),
    "a missing barrier": ("        __syncthreads();              // everybody's", "        // everybody's"),
    "a missing barrier in the scan": ("        __syncthreads();  // all have read before any writes\n", ""),
    "a wait one group too short": ("cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    "rows off by one": ("rows.begin + load_row + i * PASS", "rows.begin + load_row + i * PASS + 1"),
    "the wrong expert at the boundary tile": ("if (tile < text_tiles)", "if (tile <= text_tiles)"),
    "a column past the tail": ("if (column >= p.m) return;", "if (column > p.m) return;"),
    "numbers past the tail of k": ("const bool exists = row != nullptr && k < p.k;",
                                   "const bool exists = row != nullptr;"),
}


def test_every_planted_bug_is_found(tmp_path):
    """The checks bite: each sabotaged copy fails them. The faithful copy, built with ucontext, passes."""
    text = (HERE / "moe_kernel.cu").read_text()
    waiting = []
    for i, (original, bug) in enumerate(PLANTED_BUGS.values()):
        assert not original or text.count(original) == 1, original
        source = tmp_path / f"{i}.cu"
        source.write_text(text.replace(original, bug) if original else text)
        flags = ["-O1"] if original else ["-O1", "-DCUDA_ON_CPU_UCONTEXT"]
        waiting.append(compile_with_gcc(source, tmp_path / f"{i}.so", *flags))
        for compiler in waiting if i % 2 or i + 1 == len(PLANTED_BUGS) else []:          # two at a time
            assert not (output := compiler.communicate()[0]), output
            waiting = []
    check = ("import os, sys, torch, test_kernel\n"                        # one import, a fork for each build
             "torch.set_num_threads(1)\n"
             "for path in sys.argv[1:]:\n"
             "    child = os.fork()\n"
             "    if not child:\n"
             "        try:\n            test_kernel.check_build(path)\n"
             "        except BaseException:\n            os._exit(1)\n"
             "        os._exit(0)\n"
             "    print('passed' if os.waitpid(child, 0)[1] == 0 else 'failed', flush=True)")
    result = run_python(check, *(tmp_path / f"{i}.so" for i in range(len(PLANTED_BUGS))))
    verdicts = [line for line in result.stdout.split() if line in ("passed", "failed")]
    expected = {name: "failed" if original else "passed" for name, (original, _) in PLANTED_BUGS.items()}
    assert dict(zip(PLANTED_BUGS, verdicts, strict=False)) == expected, result.stdout
