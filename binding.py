# ---------------------------------------------------------------- the cuda back end: moe_kernel.cu in PyTorch
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

KERNEL_SOURCE = Path(__file__).resolve().with_name("moe_kernel.cu")
KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def build_kernel(device: torch.device, source: Path = KERNEL_SOURCE) -> str:
    """Compile with nvcc for a GPU, or with g++ and cuda_on_cpu.h for a CPU; returns the path of the library.

    torch keeps it under TORCH_EXTENSIONS_DIR, by a name that changes with sources, flags, torch and GPU.
    """
    from torch.utils import cpp_extension  # slow to import, seldom needed
    flags = ["-O3"]
    if device.type == "cuda":
        sm = "{}{}".format(*torch.cuda.get_device_capability(device))
        flags.append(f"-gencode=arch=compute_{sm},code=sm_{sm}")
    key = hashlib.sha256(repr((str(source), flags, torch.__version__)).encode())
    for file in source, source.with_name("cuda_on_cpu.h"):
        key.update(file.read_bytes())
    name = f"moe_kernel_{device.type}_{key.hexdigest()[:16]}"
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root(), name)
    folder.mkdir(parents=True, exist_ok=True)
    path = os.environ.get("PATH", "")
    with open(folder / "one_builder", "w") as one_builder:
        # Two processes must not build at once. torch's own lock is a file that a killed build leaves behind;
        # the next would wait for ever. flock ends with its process: who holds it knows that no one builds.
        fcntl.flock(one_builder, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        if device.type == "cpu":           # torch without CUDA refuses a .cu, but not a .cpp that includes it
            include, source = f'#include "{source}"\n', folder / "moe_kernel.cpp"
            if not source.exists() or source.read_text() != include:
                source.write_text(include)
        try:
            os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + path    # for ninja
            for_compiler = "extra_cuda_cflags" if device.type == "cuda" else "extra_cflags"
            return cpp_extension.load(name, [str(source)], build_directory=str(folder),
                                      is_python_module=False, **{for_compiler: flags})
        finally:
            os.environ["PATH"] = path


@functools.cache
def kernel_library(device: torch.device) -> ctypes.CDLL | None:
    """moe_kernel.cu for this device, built on first use; if that fails, None, and one warning says why."""
    try:
        library = ctypes.CDLL(build_kernel(device))
    except (ImportError, OSError, RuntimeError) as e:  # no setuptools, no ninja, no compiler; its errors
        lines = str(e).splitlines() or [""]
        why = next((line for line in lines[1:] if "error" in line.lower()), lines[0])
        warnings.warn(f"no cuda back end on {device}: moe_kernel.cu could not be built ({why})", stacklevel=2)
        return None
    library.mmoe_error.restype = ctypes.c_char_p
    return library


def launch_kernel(function: str, device: torch.device, *arguments: Tensor | int | None) -> None:
    """Call a launcher of moe_kernel.cu on the device's current stream; None is a null pointer."""
    library = kernel_library(device)
    if library is None:
        raise RuntimeError(f"moe_kernel.cu could not be built for {device}; choose the torch back end")
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if on_gpu else None
        error = getattr(library, function)(*pointers, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"{function}: {library.mmoe_error(error).decode()}")


def plain(t: Tensor | None) -> Tensor | None:
    """As the kernels read it: contiguous, at a multiple of 16 bytes. Copied only if it is not so already."""
    t = t if t is None else t.contiguous()
    return t if t is None or t.data_ptr() % 16 == 0 else t.clone()


@torch.library.custom_op("mono_internvl::moe_route", mutates_args=())
def kernel_route(labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels (N,) uint8: 0 text, 1 visual, else pad -> rows (N,), counts (2,), both int64."""
    rows, counts = labels.new_empty(len(labels), dtype=torch.int64), labels.new_empty(2, dtype=torch.int64)
    launch_kernel("mmoe_route", labels.device, plain(labels), rows, counts, len(labels))
    return rows, counts


@torch.library.custom_op("mono_internvl::moe_linear", mutates_args=())
def kernel_linear(x: Tensor, w_text: Tensor, w_visual: Tensor, rows: Tensor,
                  counts: Tensor, residual: Tensor | None, gather: bool, scatter: bool,
                  tile: int) -> Tensor:
    """x (N, K), weights (M, K) -> (N, M). x is in routed order unless gather, y unless scatter."""
    y, rows = x.new_empty(len(x), len(w_text)), plain(rows)
    launch_kernel("mmoe_linear", x.device, *map(plain, (x, w_text, w_visual, residual)), y,
                  rows if gather else None, rows if scatter else None, plain(counts), *x.shape, len(w_text),
                  KERNEL_DTYPES[x.dtype], tile)
    return y


@torch.library.custom_op("mono_internvl::moe_swiglu", mutates_args=())
def kernel_swiglu(x: Tensor, w1_text: Tensor, w3_text: Tensor, w1_visual: Tensor,
                  w3_visual: Tensor, rows: Tensor, counts: Tensor, tile: int) -> Tensor:
    """x (N, K), weights (M, K) -> h = silu(x w1ᵀ) · (x w3ᵀ), (N, M), in routed order."""
    h = x.new_empty(len(x), len(w1_text))
    launch_kernel("mmoe_swiglu", x.device, *map(plain, (x, w1_text, w3_text, w1_visual, w3_visual)), h,
                  plain(rows), plain(counts), *x.shape, len(w1_text), KERNEL_DTYPES[x.dtype], tile)
    return h


kernel_route.register_fake(lambda labels: (labels.new_empty(labels.shape, dtype=torch.int64),
                                           labels.new_empty(2, dtype=torch.int64)))
kernel_linear.register_fake(lambda x, w, *others: x.new_empty(x.shape[0], w.shape[0]))
kernel_swiglu.register_fake(lambda x, w, *others: x.new_empty(x.shape[0], w.shape[0]))


def expert_gradients(dy: Tensor, x: Tensor, counts: Tensor, wanted) -> list[Tensor | None]:
    """dW (M, K) = dyᵀ x over each expert's rows; dy (N, M), x (N, K) in routed order. Only the device knows
    how many rows: so the others are zeroed, not left out (and not multiplied by 0: NaN must not spread)."""
    position = torch.arange(x.shape[0], device=x.device)[:, None]
    experts = position < counts[0], (position >= counts[0]) & (position < counts.sum())
    return [torch.where(e, dy, 0).T @ torch.where(e, x, 0) if want else None
            for e, want in zip(experts, wanted, strict=True)]


def linear_setup(ctx, inputs, output):
    *saved, residual, ctx.gather, ctx.scatter, ctx.tile = inputs
    ctx.save_for_backward(*saved)


def linear_backward(ctx, dy):
    x, w_text, w_visual, rows, counts = ctx.saved_tensors
    dx, dw, need = None, (None, None), ctx.needs_input_grad
    if need[0]:      # the same routed product with the weights transposed; gather and scatter change places
        dx = kernel_linear(dy, w_text.T, w_visual.T, rows, counts, None, ctx.scatter, ctx.gather, ctx.tile)
    if need[1] or need[2]:
        dy_routed, x_routed = dy[rows] if ctx.scatter else dy, x[rows] if ctx.gather else x
        dw = expert_gradients(dy_routed, x_routed, counts, need[1:3])
    return dx, *dw, None, None, dy if need[5] else None, None, None, None


def swiglu_setup(ctx, inputs, output):
    *saved, ctx.tile = inputs
    ctx.save_for_backward(*saved)


def swiglu_backward(ctx, dh):
    x, w1_text, w3_text, w1_visual, w3_visual, rows, counts = ctx.saved_tensors
    # Computed again: keeping them would take twice the memory of h. In routed order, like dh.
    gate = kernel_linear(x, w1_text, w1_visual, rows, counts, None, True, False, ctx.tile).float()
    up = kernel_linear(x, w3_text, w3_visual, rows, counts, None, True, False, ctx.tile).float()
    s = gate.sigmoid()
    d_gate, d_up = (dh * up * s * (1 + gate * (1 - s))).to(x.dtype), (dh * gate * s).to(x.dtype)
    dx, dw1, dw3, need = None, (None, None), (None, None), ctx.needs_input_grad
    if need[0]:
        dx = kernel_linear(d_gate, w1_text.T, w1_visual.T, rows, counts, None, False, True, ctx.tile)
        dx = kernel_linear(d_up, w3_text.T, w3_visual.T, rows, counts, dx, False, True, ctx.tile)
    if any(need[1:5]):
        dw1 = expert_gradients(d_gate, x[rows], counts, (need[1], need[3]))
        dw3 = expert_gradients(d_up, x[rows], counts, (need[2], need[4]))
    return dx, dw1[0], dw3[0], dw1[1], dw3[1], None, None, None


kernel_linear.register_autograd(linear_backward, setup_context=linear_setup)
kernel_swiglu.register_autograd(swiglu_backward, setup_context=swiglu_setup)


def check_kernel_inputs(x: Tensor, weights: tuple[Tensor, ...], rows: Tensor,
                        counts: Tensor) -> None:
    """Raises ValueError for what moe_kernel.cu cannot do. weights: all (M, K)."""
    tensors, shape, problem = (x, *weights, rows, counts), weights[0].shape, None
    if x.dim() != 2 or len(shape) != 2 or x.shape[1] != shape[1] or any(w.shape != shape for w in weights):
        problem = f"x (N, K) and weights (M, K), not {tuple(x.shape)} and {[tuple(w.shape) for w in weights]}"
    elif shape[0] % 8 or shape[1] % 8:
        problem = f"widths that are multiples of 8, not {tuple(shape)}"
    elif x.dtype not in KERNEL_DTYPES or any(w.dtype != x.dtype for w in weights):
        problem = f"one of {[*KERNEL_DTYPES]} for x and weights, not {[x.dtype, *(w.dtype for w in weights)]}"
    elif x.device.type not in ("cpu", "cuda") or any(t.device != x.device for t in tensors):
        problem = f"tensors on one GPU, or all on the CPU, not on {sorted({str(t.device) for t in tensors})}"
    elif x.is_cuda and x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) < (8, 0):
        problem = f"compute capability 8.0 or newer for {x.dtype}"
    elif rows.shape != x.shape[:1] or counts.shape != (2,) or {rows.dtype, counts.dtype} != {torch.int64}:
        problem = "rows (N,) and counts (2,), int64, as kernel_route makes them"
    if problem:
        raise ValueError(f"the cuda back end takes {problem}. The torch back end takes anything.")


def cuda_route(labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels (N,) uint8, 0 text, 1 visual, 2 pad -> Routing's rows and counts, by one kernel."""
    if labels.dim() != 1 or labels.dtype != torch.uint8 or labels.device.type not in ("cpu", "cuda"):
        raise ValueError(f"labels must be (N,) uint8 on CPU or GPU, not {labels.dtype} {tuple(labels.shape)} "
                         f"on {labels.device}")
    return kernel_route(labels)


def cuda_mmoe_linear(x, w_text, w_visual, rows, counts) -> Tensor:
    """x (N, K), weights (M, K) -> (N, M); 0 in the rows of pads."""
    check_kernel_inputs(x, (w_text, w_visual), rows, counts)
    return kernel_linear(x, w_text, w_visual, rows, counts, None, True, True, 0)


def cuda_mmoe_swiglu(x, text, visual, rows, counts) -> Tensor:
    """x (N, D) -> (N, D): w2(silu(w1 x) · w3 x). text, visual: w1 (F, D), w3 (F, D), w2 (D, F)."""
    check_kernel_inputs(x, (*text[:2], *visual[:2]), rows, counts)
    h = kernel_swiglu(x, *text[:2], *visual[:2], rows, counts, 0)
    check_kernel_inputs(h, (text[2], visual[2]), rows, counts)
    return kernel_linear(h, text[2], visual[2], rows, counts, None, False, True, 0)
