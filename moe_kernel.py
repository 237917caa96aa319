"""moe_kernel.cu for PyTorch: the file is compiled, called through ctypes, and made differentiable.

The model calls three functions of this file: `route` sorts the tokens by expert, `linear` and `swiglu` are
the two routed products. In this order: the build; the operators, which PyTorch knows as
torch.ops.mono_internvl.moe_route, moe_linear and moe_swiglu; how a device finds out which tiles are right and
which is the fastest (`python moe_kernel.py` shows it); the gradient; and what the model calls, which
checks, casts and reshapes.

Shapes: N tokens laid end to end, K -> M widths of a product. `permutation` (N,) int64 lists the token indices
sorted by expert: text, then visual, then pads, each in reading order. `counts` (2,) int64 holds the numbers
of text and of visual tokens. Rows in "permuted order" are sorted by this permutation.
"""
import contextlib
import ctypes
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import InputError

SOURCE = Path(__file__).resolve().with_name("moe_kernel.cu")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}           # the values of the kernel's Dtype
TILES = {"small": 1, "medium": 2, "large": 3, "naive": 4,                  # the kernel's TileConfig
         "hopper64x64": 5, "hopper64x128": 6, "hopper128x192": 7, "hopper128x256": 8,
         "medium3": 9, "large3": 10}
SPLIT = 100                                        # s · SPLIT + a tile config: the sum is split in s parts
SIZES = 64, 128, 256, 320, 512, 576, 1024, 1088, 1856, 2048, 3392, 4096    # tokens; of 1, 2, 4, 7, 13 tiles
# Tokens, K, M. They leave tails everywhere, and 4,200 tokens are more token tiles than a band has.
CHECKED_SIZES = (0, 8, 8), (1, 8, 8), (65, 200, 72), (270, 520, 264), (4200, 8, 8)


# ---------------------------------------------------------------- the build

@contextlib.contextmanager
def _locked(path: Path):
    """One process at a time. An flock is released with its process, even if that is killed."""
    try:
        import fcntl
    except ImportError:
        raise RuntimeError("it needs Python's module fcntl, which Windows lacks; WSL has it") from None
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):         # in a read-only folder nobody can write what others read
            fcntl.flock(stack.enter_context(open(path, "w")), fcntl.LOCK_EX)
        yield


def nvcc_command(sm: str) -> list[str]:
    """How to compile for an architecture. Raises RuntimeError if nvcc is missing."""
    home, path = os.environ.get("CUDA_HOME"), os.environ.get("PATH", "")
    folders = (f"{home}/bin", path) if home else (path, "/usr/local/cuda/bin")
    compiler = shutil.which("nvcc", path=os.pathsep.join(folders))
    if compiler is None:
        raise RuntimeError("nvcc is missing; install the CUDA toolkit, or set CUDA_HOME to its folder")
    return [compiler, "-std=c++17", "-O3", f"-gencode=arch=compute_{sm},code=sm_{sm}"]


def build(device: torch.device, source: Path = SOURCE) -> str:
    """Compiles with nvcc for a GPU, or with g++ and cuda_on_cpu.h for a CPU. Returns the path of the library.

    It is kept under TORCH_EXTENSIONS_DIR. Its name changes with the sources, the command and the GPU.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        command = nvcc_command("90a" if capability == (9, 0) else "{}{}".format(*capability))  # a has wgmma
        command += ["-Xcompiler", "-fPIC"]
    elif device.type == "cpu":
        command = [os.environ.get("CXX", "g++"), "-x", "c++", "-std=c++17", "-O3", "-fPIC"]
    else:
        raise RuntimeError("it runs on NVIDIA GPUs and CPUs only")
    command += ["-shared", str(source)]
    key = hashlib.sha256(repr(command).encode())
    for file in source, source.with_name("cuda_on_cpu.h"), Path(__file__):  # which has the checks
        key.update(file.read_bytes())
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    folder = folder / f"moe_kernel_{device.type}_{key.hexdigest()[:16]}"
    library, unfinished = folder / "moe_kernel.so", folder / "unfinished.so"
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "one_builder"):
        if not library.exists():                   # another process may have built it meanwhile
            compiled = subprocess.run([*command, "-o", str(unfinished)], text=True, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT)
            if compiled.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{compiled.stdout}")
            unfinished.rename(library)             # a killed build leaves no half-written library
    return str(library)


@torch.compiler.disable
@functools.cache
def library(device: torch.device) -> ctypes.CDLL | None:
    """moe_kernel.cu for this device, built on first use. If that fails: None, and one warning says why."""
    try:
        path = build(device)
        loaded = ctypes.CDLL(path)
        loaded.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        loaded.table = Path(path).with_name("measured_" + re.sub(r"\W+", "_", loaded.device_name) + ".json")
    except (ImportError, OSError, RuntimeError) as e:      # no fcntl, no compiler, a folder that is read-only
        lines = str(e).splitlines() or [""]
        why = next((line for line in lines[1:] if re.search("error:|fatal|(cannot|not) f", line)), lines[0])
        warnings.warn(f"no cuda back end on {device}: moe_kernel.cu could not be built or loaded ({why})",
                      stacklevel=3)
        return None
    if device.type == "cpu":
        warnings.warn("the cuda back end on a CPU: cuda_on_cpu.h runs moe_kernel.cu for tests and study; "
                      "the torch back end is much faster here", stacklevel=3)
    loaded.moe_error_string.restype = ctypes.c_char_p
    return loaded


def launch(function: str, device: torch.device, *arguments: Tensor | int | None) -> None:
    """Calls a launcher of moe_kernel.cu on the device's current stream. None becomes a null pointer."""
    loaded = library(device)
    if loaded is None:
        raise RuntimeError(f"no cuda back end on {device}, as a warning said; choose the torch back end")
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if on_gpu else None
        error = getattr(loaded, function)(*pointers, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"{function}: {loaded.moe_error_string(error).decode()}")


def launch_linear(y: Tensor, x: Tensor, w_text: Tensor, w_visual: Tensor, gather: Tensor | None,
                  scatter: Tensor | None, counts: Tensor, tile_config: int) -> None:
    splits = max(1, tile_config // SPLIT)
    partial_sums = x.new_empty(splits, *y.shape, dtype=torch.float32) if splits > 1 else None
    launch("moe_linear", x.device, x, w_text, w_visual, y, gather, scatter, counts, *x.shape, len(w_text),
           DTYPES[x.dtype], tile_config % SPLIT, partial_sums, splits)


# ---------------------------------------------------------------- the operators

def _aligned(t: Tensor) -> Tensor:
    """Contiguous and at a multiple of 16 bytes, as the kernels need it. Copies only if it must."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


@torch.library.custom_op("mono_internvl::moe_route", mutates_args=())
def route(expert: Tensor) -> tuple[Tensor, Tensor]:
    """expert (N,) uint8, 0 text, 1 visual, else pad -> (permutation (N,), counts (2,)), both int64 and on the
    same device, without a device→host sync. Raises InputError for another shape or dtype."""
    if expert.dim() != 1 or expert.dtype != torch.uint8:
        raise InputError(f"expert must be (N,) uint8, not {tuple(expert.shape)} {expert.dtype}")
    permutation = expert.new_empty(len(expert), dtype=torch.int64)
    counts = expert.new_empty(2, dtype=torch.int64)
    launch("moe_route", expert.device, _aligned(expert), permutation, counts, len(expert))
    return permutation, counts


@torch.library.custom_op("mono_internvl::moe_linear", mutates_args=())
def _linear(x: Tensor, w_text: Tensor, w_visual: Tensor, permutation: Tensor, counts: Tensor,
            gather: bool, scatter: bool, tile_config: int) -> Tensor:
    """x (N, K), weights (M, K) -> (N, M). x is in reading order if gather, else in permuted order; the result
    is in reading order if scatter. tile_config: of moe_kernel.cu's enum, or 0 for the fastest."""
    y, permutation = x.new_empty(len(x), len(w_text)), _aligned(permutation)
    tile_config = tile_config or best_tile(x.device, x.dtype, "linear" if gather else "w2", x.shape[1],
                                         len(w_text), tokens=len(x))
    launch_linear(y, *map(_aligned, (x, w_text, w_visual)), permutation if gather else None,
                  permutation if scatter else None, _aligned(counts), tile_config)
    return y


@torch.library.custom_op("mono_internvl::moe_swiglu", mutates_args=())
def _swiglu(x: Tensor, w1_text: Tensor, w3_text: Tensor, w1_visual: Tensor, w3_visual: Tensor,
            permutation: Tensor, counts: Tensor, tile_config: int) -> Tensor:
    """x (N, K) in reading order, weights (M, K) -> h = silu(x w1ᵀ) · (x w3ᵀ), (N, M), in permuted order. It
    has no gradient: see `swiglu`."""
    h = x.new_empty(len(x), len(w1_text))
    tile_config = tile_config or best_tile(x.device, x.dtype, "swiglu", x.shape[1], len(w1_text),
                                         tokens=len(x))
    launch("moe_swiglu", x.device, *map(_aligned, (x, w1_text, w3_text, w1_visual, w3_visual)), h,
           _aligned(permutation), _aligned(counts), *x.shape, len(w1_text), DTYPES[x.dtype], tile_config)
    return h


route.register_fake(lambda expert: (expert.new_empty(expert.shape, dtype=torch.int64),
                                     expert.new_empty(2, dtype=torch.int64)))
_linear.register_fake(lambda x, w, *others: x.new_empty(x.shape[0], w.shape[0]))
_swiglu.register_fake(lambda x, w, *others: x.new_empty(x.shape[0], w.shape[0]))


# ---------------------------------------------------------------- which tile, and is it right on this device?

# At the first use of a dtype on a device, every tile config is checked against the naive kernel. At the first
# use of a product, those that are right are measured. A JSON file beside the library keeps both results.

def tile_configs(device: torch.device, dtype: torch.dtype, product: str) -> list[int]:
    """What may be the fastest for a product on this device, beside torch. In float32 all tiles are the same.
    F.grouped_mm would need the weights of both experts in one tensor. They are two parameters, as in the
    official checkpoints, so each call would have to copy both."""
    if dtype == torch.float32:
        return [TILES["small"]]
    gpu = None if device.type == "cpu" else torch.cuda.get_device_properties(device)       # a CPU runs all
    if gpu and gpu.major < 8:
        return []                                  # it has neither cp.async nor this mma
    hopper = gpu is None or (gpu.major, gpu.minor) == (9, 0)
    three_stages = gpu is None or gpu.shared_memory_per_multiprocessor <= 100 << 10
    tiles = [t for name, t in TILES.items() if name != "naive" and (hopper or "hopper" not in name)
             and (three_stages or name[-1] != "3")]
    split = ("hopper64x64", "hopper128x192") if hopper else ("small", "medium")
    return tiles + [s * SPLIT + TILES[name] for name in split for s in (2, 4, 8) if product != "swiglu"]


def _find_fault(device: torch.device, dtype: torch.dtype, tile_config: int, n: int, k: int, m: int) -> str:
    """What is wrong with a tile config for these sizes, or "". Compares with linear_naive_kernel in float32
    on the same numbers. First come all outputs, with gather and scatter. Then, without both, come those of
    visual tokens and pads, while everything else is NaN."""
    generator = torch.Generator().manual_seed(n)
    x, *w = (torch.randn(size, k, generator=generator).to(device, dtype) for size in (n, m, m, m, m))
    w = [weight / k ** 0.5 for weight in w]                                # w1 and w3 of text, then of visual
    expert = (torch.arange(n) * 7 // 3 % 4).clamp(max=2).to(torch.uint8)
    permutation, counts = route(expert.to(device))
    right = expert.argsort(stable=True), expert.bincount(minlength=3)[:2]
    if not all(map(torch.equal, (permutation.cpu(), counts.cpu()), right)):
        raise RuntimeError(f"moe_route of moe_kernel.cu is wrong on {device}; please report this line")

    def naive(i, scatter):
        weights = w[i].float(), w[i + 2].float()
        return _linear(x.float(), *weights, permutation, counts, True, scatter, TILES["naive"])
    linear, swiglu = naive(0, True), torch.nn.functional.silu(naive(0, False)) * naive(1, False)
    for order in permutation, None:
        rows = slice(None)
        if order is None:
            x = x.masked_fill((expert != 1).to(device)[:, None], torch.nan)[permutation]
            w[:2] = [torch.full_like(weight, torch.nan) for weight in w[:2]]
            linear, rows = linear[permutation], torch.arange(n, device=device) >= counts[0]
        y, h = (torch.full((n, m), torch.nan, device=device, dtype=dtype) for _ in range(2))
        results = [("linear", y, linear)]
        try:
            launch_linear(y, x, w[0], w[2], order, order, counts, tile_config)
            if tile_config < SPLIT:                                        # SwiGLU does not split sums
                launch("moe_swiglu", device, x, *w, h, order, counts, n, k, m, DTYPES[dtype], tile_config)
                results.append(("SwiGLU", h, swiglu))
        except RuntimeError as e:
            return str(e)
        for product, result, right in results:
            wrong = ~((result - right).abs() <= torch.finfo(dtype).eps * right.abs() + 1e-4)[rows]
            if wrong.any():
                return f"{product} of {n} tokens, {k} to {m}: {int(wrong.sum())} of {wrong.numel()} numbers"
    return ""


def _microseconds(device: torch.device, call, copies: int) -> float:
    """Of one call, on the device alone: the calls of a CUDA graph do not wait for the host. call: a function
    of i < copies. It uses weights number i, so that it does not find them in the L2 cache."""
    if device.type == "cpu":
        started = time.perf_counter()
        call(0)
        return (time.perf_counter() - started) * 1e6
    graph, best = torch.cuda.CUDAGraph(), math.inf
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        call(0)
        torch.cuda.synchronize(device)
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for i in range(copies):
                call(i)
        finally:
            graph.capture_end()                    # even if there is no memory for a result
        for _ in range(4):
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            best = min(best, begin.elapsed_time(end) / copies * 1e3)
    return best


def _measure(product: str, n: int, weights: list, tiles: list) -> dict[str, float]:
    """{choice: microseconds} for n tokens, 64 of them text. A choice is a tile config or "torch", which is
    cuBLAS with as much gather, silu and scatter as the product needs in a layer. weights: of each call."""
    (m, k), device = weights[0][0].shape, weights[0][0].device
    x = torch.randn(n, k, device=device, dtype=weights[0][0].dtype, generator=torch.Generator(device))
    expert = torch.zeros(n, device=device, dtype=torch.uint8)
    expert[32:-32] = 1                                                     # as an image stands in a prompt
    permutation, counts = route(expert)

    def by_kernel(i, tile_config):
        if product == "swiglu":
            _swiglu(x, *weights[i], permutation, counts, tile_config)
        else:
            _linear(x, *weights[i], permutation, counts, product == "linear", True, tile_config)

    def by_torch(i):
        y, half = x.new_empty(n, m), len(weights[i]) // 2
        for part, w in (slice(64), weights[i][:half]), (slice(64, None), weights[i][half:]):
            rows = permutation[part]
            gathered = x[part] if product == "w2" else x[rows]             # x of w2 is in permuted order
            if product == "swiglu":
                torch.nn.functional.silu(gathered @ w[0].T) * (gathered @ w[1].T)
            else:
                y.index_copy_(0, rows, gathered @ w[0].T)
    calls = {str(t): functools.partial(by_kernel, tile_config=t) for t in tiles} | {"torch": by_torch}
    return {choice: _microseconds(device, call, len(weights)) for choice, call in calls.items()}


MEASURED = {}                                      # what this process has measured or read already
FAILED = set()                                     # the devices where measuring failed


@torch.compiler.disable
def measured(device: torch.device, dtype: torch.dtype, product: str, k: int, m: int) -> dict:
    """{number of tokens: {choice: microseconds}} of "linear" (wqkv, wo), "swiglu" (w1 and w3) or "w2", K -> M
    widths, on this device: read from the file beside the library, or measured now and written there. Raises
    RuntimeError if it would have to measure while a CUDA graph is captured."""
    if (asked := (device, dtype, product, k, m)) in MEASURED:
        return MEASURED[asked]
    loaded, key, on_gpu = library(device), f"{product} {k} to {m} {dtype}", device.type == "cuda"
    file, name = loaded.table, loaded.device_name
    made_with = {"device": name, "driver": loaded.moe_driver_version(), "torch": torch.__version__}
    with _locked(file.with_suffix(".lock")):
        try:
            table = json.loads(file.read_text())
            if {field: table[field] for field in made_with} != made_with:
                raise ValueError("another device, driver or torch")
            faults = table["faults"].get(str(dtype))
            times = {int(n): row for n, row in table["microseconds"].get(key, {}).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):    # none yet, old or damaged
            table, faults, times = made_with | {"faults": {}, "microseconds": {}}, None, {}
        if on_gpu and (faults is None or not times) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("moe_kernel.cu has not been measured; run the model once before capturing it")
        if faults is None:
            faults = {}
            for tile, sizes in itertools.product(tile_configs(device, dtype, "linear"), CHECKED_SIZES):
                if str(tile) not in faults and (why := _find_fault(device, dtype, tile, *sizes)):
                    faults[str(tile)] = why
                    warnings.warn(f"tile config {tile} of moe_kernel.cu is wrong on {name} ({why}) and will "
                                  f"not be used; please report this line together with {file}", stacklevel=3)
        if not times:
            tiles = [t for t in tile_configs(device, dtype, product) if str(t) not in faults]
            # 256 MB are more than an L2 cache. Small products get the weights of 32 layers, as in a model:
            # with thousands, measuring would take minutes.
            matrices = 4 if product == "swiglu" else 2
            copies = min(32, 1 + (256 << 20) // (matrices * k * m * dtype.itemsize)) if on_gpu else 1
            generator = torch.Generator(device)    # its own: the user's program still draws the same numbers
            weights = [torch.randn(matrices, m, k, device=device, dtype=dtype, generator=generator)
                       .div(k ** 0.5).unbind() for _ in range(copies)]
            times = {n: _measure(product, n, weights, tiles) for n in (SIZES if on_gpu else SIZES[:1])}
        table["faults"][str(dtype)], table["microseconds"][key] = faults, times
        with contextlib.suppress(OSError):                                 # from a read-only folder
            file.with_suffix(".new").write_text(json.dumps(table, indent=1))
            file.with_suffix(".new").rename(file)
    MEASURED[asked] = times
    return times


@functools.lru_cache(4096)
def _fastest(product: tuple, tokens: int) -> tuple[int | None, float, float]:
    """The fastest tile config for arguments of `measured`, or None; its microseconds, and those of torch,
    with the number of tokens that is nearest to this one, as a ratio."""
    times = measured(*product)
    row = times[min(times, key=lambda n: max(n, tokens) / max(1, min(n, tokens)))]
    tile = min((choice for choice in row if choice != "torch"), key=row.get, default=None)
    return tile and int(tile), row.get(tile, math.inf), row["torch"]


def best_tile(*product, tokens: int) -> int:
    """The fastest tile config for arguments of `measured`. On a CPU 0, which leaves it to moe_kernel.cu."""
    if product[0].type == "cpu":
        return 0
    tile = _fastest(product, tokens)[0]
    if tile is None:
        raise RuntimeError(f"no tile of moe_kernel.cu is right on {product[0]}; choose the torch back end")
    return tile


@torch.compiler.disable
def fastest_back_end(device: torch.device, dtype: torch.dtype, tokens: int, products) -> str:
    """"cuda" or "torch", whichever needs less time for the products (name, K, M) of a layer together.
    Where the kernel cannot run or cannot be measured, it is "torch"."""
    if (device.type != "cuda" or dtype not in DTYPES or not tile_configs(device, dtype, "linear")
            or any(k % 8 or m % 8 for _, k, m in products) or device in FAILED or library(device) is None):
        return "torch"
    if torch.cuda.is_current_stream_capturing():
        return "cuda"                              # torch would have to ask the host for the counts
    try:
        _, kernel, by_torch = zip(*(_fastest((device, dtype, *product), tokens) for product in products),
                                  strict=True)
    except RuntimeError as e:
        FAILED.add(device)
        warnings.warn("the torch back end is chosen, because moe_kernel.cu could not be measured on "
                      f"{library(device).device_name} ({str(e).partition(chr(10))[0]})", stacklevel=3)
        return "torch"
    return "cuda" if sum(kernel) < sum(by_torch) else "torch"


# ---------------------------------------------------------------- the gradient of the routed product

def _one_weight_gradient(dy: Tensor, x: Tensor, counts: Tensor, expert: int) -> Tensor:
    """dW (M, K) = dyᵀ x over the tokens of one expert, 0 text or 1 visual; dy (N, M), x (N, K) in permuted
    order. All rows are multiplied, and those of others are set to zero before: only the device knows how many
    tokens an expert has. A product with zero would not do, because 0 · NaN = NaN."""
    position, num_text = torch.arange(len(x), device=x.device)[:, None], counts[0]
    rows = (position >= num_text) & (position < counts.sum()) if expert else position < num_text
    return torch.where(rows, dy, 0).T @ torch.where(rows, x, 0)


def _launch_weight_gradients(dy: Tensor, x: Tensor, counts: Tensor, experts: list[int]) -> Tensor:
    dw = x.new_empty(len(experts), dy.shape[1], x.shape[1])
    launch("moe_weight_gradients", x.device, *map(_aligned, (dy, x)), dw, _aligned(counts), *dw.shape[1:],
           experts[0], len(experts), DTYPES[x.dtype])
    return dw


@functools.cache
def _gradient_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Is weight_gradient_kernel right on this device? Compared once, with NaN where it must not read."""
    for n, k, m in CHECKED_SIZES:
        generator = torch.Generator().manual_seed(n)
        dy, x = (torch.randn(n, size, generator=generator).to(device, dtype) for size in (m, k))
        counts = torch.tensor([n // 3, n // 2], device=device)             # the others are pads
        dy[n // 3 + n // 2:] = x[n // 3 + n // 2:] = torch.nan
        dw = _launch_weight_gradients(dy, x, counts, [0, 1])
        right = torch.stack([_one_weight_gradient(dy.float(), x.float(), counts, e) for e in range(2)])
        if not torch.allclose(dw.float(), right, rtol=torch.finfo(dtype).eps, atol=1e-3):
            warnings.warn(f"weight_gradient_kernel of moe_kernel.cu is wrong on {device} in {dtype} ({n} "
                          f"tokens, {k} to {m}) and will not be used; please report this line", stacklevel=3)
            return False
    return True


@torch.library.custom_op("mono_internvl::moe_weight_gradients", mutates_args=())
def _weight_gradients(dy: Tensor, x: Tensor, counts: Tensor, experts: list[int]) -> Tensor:
    """dW (len(experts), M, K) of the experts [0], [1] or [0, 1]; dy (N, M), x (N, K) in permuted order. In 16
    bits, weight_gradient_kernel multiplies each expert's own rows alone. In bfloat16 on Hopper, torch's
    grouped product uses wgmma and reads the counts on the device. It makes both gradients even if one is
    asked for: most tokens are visual, and so is the expert that learns alone. In float32, all rows are
    multiplied for each expert."""
    grouped_mm = getattr(torch.nn.functional, "grouped_mm", None)          # since torch 2.10
    if len(x) and x.dtype != torch.float32:
        if x.device.type == "cpu":
            return _launch_weight_gradients(dy, x, counts, experts)
        if grouped_mm and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device)[0] == 9:
            both = grouped_mm(dy.contiguous().T, x.contiguous(), offs=counts.cumsum(0, dtype=torch.int32))
            if len(experts) == 2:
                return both
            return both.narrow(0, experts[0], 1).clone()   # a result must not be a view, as register_fake's
        if not torch.cuda.is_current_stream_capturing() and _gradient_is_right(x.device, x.dtype):
            return _launch_weight_gradients(dy, x, counts, experts)
    return torch.stack([_one_weight_gradient(dy, x, counts, expert) for expert in experts])


_weight_gradients.register_fake(
    lambda dy, x, counts, experts: x.new_empty(len(experts), dy.shape[1], x.shape[1]))


def _save_for_backward(ctx, inputs, output):
    *saved, ctx.gather, ctx.scatter, _ = inputs
    ctx.save_for_backward(*saved)


def _linear_backward(ctx, dy):
    x, w_text, w_visual, permutation, counts = ctx.saved_tensors
    dx, dw, need = None, [None, None], ctx.needs_input_grad
    if need[0]:      # the same routed product with transposed weights; gather and scatter change places
        dx = _linear(dy, w_text.T, w_visual.T, permutation, counts, ctx.scatter, ctx.gather, 0)
    if learning := [expert for expert in range(2) if need[1 + expert]]:    # in S1, the visual expert alone
        dy_routed, x_routed = dy[permutation] if ctx.scatter else dy, x[permutation] if ctx.gather else x
        for expert, gradient in zip(learning, _weight_gradients(dy_routed, x_routed, counts, learning),
                                    strict=True):
            dw[expert] = gradient
    return dx, *dw, None, None, None, None, None


_linear.register_autograd(_linear_backward, setup_context=_save_for_backward)


# ---------------------------------------------------------------- what the model calls

def _check(x: Tensor, weights: Sequence[Tensor], permutation: Tensor, counts: Tensor) -> None:
    """Raises InputError for what moe_kernel.cu cannot do. x (N, K); weights: all (M, K)."""
    tensors, shape, problem = (x, *weights, permutation, counts), weights[0].shape, None
    if len(shape) != 2 or x.shape[1] != shape[1] or any(w.shape != shape for w in weights):
        problem = (f"x (..., K) and weights (M, K), not (..., {x.shape[1]}) and "
                   f"{[tuple(w.shape) for w in weights]}")
    elif shape[0] % 8 or shape[1] % 8:
        problem = f"widths that are multiples of 8, not {tuple(shape)}"
    elif x.dtype not in DTYPES or any(w.dtype != x.dtype for w in weights):
        problem = f"one of {[*DTYPES]} for x and weights, not {[x.dtype, *(w.dtype for w in weights)]}"
    elif x.device.type not in ("cpu", "cuda") or any(t.device != x.device for t in tensors):
        problem = f"tensors on one GPU, or all on the CPU, not on {sorted({str(t.device) for t in tensors})}"
    elif x.is_cuda and x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) < (8, 0):
        problem = f"compute capability 8.0 or newer for {x.dtype}"
    elif (permutation.shape != x.shape[:1] or counts.shape != (2,)
          or {permutation.dtype, counts.dtype} != {torch.int64}):
        problem = "permutation (N,) and counts (2,), int64, as moe_kernel.route makes them"
    if problem:
        raise InputError(f"the cuda back end takes {problem}. The torch back end takes anything.")


def _cast_for_autocast(*tensors: Tensor) -> list[Tensor]:
    """F.linear obeys torch.autocast by itself. A custom operator does not, so its inputs are cast here."""
    device_type = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(device_type)) for t in tensors]


def linear(x: Tensor, w_text: Tensor, w_visual: Tensor, permutation: Tensor, counts: Tensor) -> Tensor:
    """x (..., K), weights (M, K) -> (..., M): each token times its expert's weights, zero for pads. float32,
    bfloat16 or float16; K and M are multiples of 8. Raises InputError for what the kernel cannot do."""
    flat, w_text, w_visual = _cast_for_autocast(x.reshape(-1, x.shape[-1]), w_text, w_visual)
    _check(flat, (w_text, w_visual), permutation, counts)
    y = _linear(flat, w_text, w_visual, permutation, counts, True, True, 0)
    return y.view(*x.shape[:-1], len(w_text))


def swiglu(x: Tensor, text: Sequence[Tensor], visual: Sequence[Tensor], permutation: Tensor,
           counts: Tensor) -> Tensor:
    """x (..., D) -> (..., D): w2(silu(w1 x) · w3 x) with each token's expert, zero for pads. text, visual:
    the weights w1 (F, D), w3 (F, D), w2 (D, F). dtypes, widths and errors as for `linear`."""
    flat, *first, w2_text, w2_visual = _cast_for_autocast(
        x.reshape(-1, x.shape[-1]), *text[:2], *visual[:2], text[2], visual[2])
    _check(flat, first, permutation, counts)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (flat, *first)):
        # The backward pass needs gate and up, and _swiglu would have to compute them a second time.
        gate, up = (_linear(flat, *weights, permutation, counts, True, False, 0)
                    for weights in (first[::2], first[1::2]))
        h = torch.nn.functional.silu(gate) * up
    else:
        h = _swiglu(flat, *first, permutation, counts, 0)                  # stays in permuted order
    _check(h, (w2_text, w2_visual), permutation, counts)
    return _linear(h, w2_text, w2_visual, permutation, counts, False, True, 0).view(x.shape)


def main() -> int:
    """Checks and measures the products of a layer of the 2B model, and prints what was the fastest."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if library(device) is None:                    # a warning has said why
        return 1
    dtype, (d, f) = torch.bfloat16, (2048, 8192) if device.type == "cuda" else (64, 128)
    products = {"wqkv": ("linear", d, 2 * d), "wo": ("linear", d, d), "w1|w3": ("swiglu", d, f),
                "w2": ("w2", f, d)}
    try:
        tables = {name: measured(device, dtype, *product) for name, product in products.items()}
    except RuntimeError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print("tokens  product  fastest, microseconds; torch, microseconds")
    for name, table in tables.items():
        for n, times in table.items():
            best = min(times, key=times.get)
            print(f"{n:6}  {name:7}  {best:>7} {times[best]:8.1f}; torch {times['torch']:8.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
