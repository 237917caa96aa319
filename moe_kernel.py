"""moe_kernel.cu for PyTorch: the file is compiled, called through ctypes, and made differentiable.

The model calls three functions of this file: `route` sorts the tokens by expert, `linear` and `swiglu` are
the two routed products. They check, cast and reshape what they get. Below them are the operators, which
PyTorch knows as torch.ops.mono_internvl.moe_route, moe_linear and moe_swiglu, their gradients, and the build.

Shapes: N tokens laid end to end, K -> M widths of a product. `permutation` (N,) int64 lists the token indices
sorted by expert: text, then visual, then pads, each in reading order. `counts` (2,) int64 holds the numbers
of text and of visual tokens. Rows in "permuted order" are sorted by this permutation.
"""
import contextlib
import ctypes
import functools
import hashlib
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import InputError

SOURCE = Path(__file__).resolve().with_name("moe_kernel.cu")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}           # the values of the kernel's Dtype


# ---------------------------------------------------------------- the build

def build(device: torch.device, source: Path = SOURCE) -> str:
    """Compiles with nvcc for a GPU, or with g++ and cuda_on_cpu.h for a CPU. Returns the path of the library.

    torch keeps it under TORCH_EXTENSIONS_DIR. Its name changes with sources, flags, torch and GPU.
    """
    from torch.utils import cpp_extension  # slow to import, seldom needed

    try:
        import fcntl
    except ImportError:
        raise RuntimeError("it needs Python's module fcntl, which Windows lacks; WSL has it") from None
    if device.type not in ("cpu", "cuda"):
        raise RuntimeError("it runs on NVIDIA GPUs and CPUs only")
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
        # torch's lock file survives a killed build, and every later build would hang. An flock is released
        # with its process, so once we hold it we may delete a stale lock.
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


@torch.compiler.disable
@functools.cache
def library(device: torch.device) -> ctypes.CDLL | None:
    """moe_kernel.cu for this device, built on first use. If that fails: None, and one warning says why."""
    try:
        loaded = ctypes.CDLL(build(device))
    except (ImportError, OSError, RuntimeError) as e:  # no setuptools, ninja or compiler, or its errors
        lines = str(e).splitlines() or [""]
        why = next((line for line in lines[1:] if "error" in line.lower()), lines[0])
        warnings.warn(f"no cuda back end on {device}: moe_kernel.cu could not be built ({why})", stacklevel=3)
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
        raise RuntimeError(f"moe_kernel.cu could not be built for {device}; choose the torch back end")
    pointers = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments]
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else contextlib.nullcontext():
        stream = torch.cuda.current_stream().cuda_stream if on_gpu else None
        error = getattr(loaded, function)(*pointers, ctypes.c_void_p(stream))
    if error:
        raise RuntimeError(f"{function}: {loaded.moe_error_string(error).decode()}")


# ---------------------------------------------------------------- the operators

def _aligned(t: Tensor | None) -> Tensor | None:
    """Contiguous and at a multiple of 16 bytes, as the kernels need it. Copies only if it must."""
    if t is None:
        return None
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


@torch.library.custom_op("mono_internvl::moe_route", mutates_args=())
def _route(expert: Tensor) -> tuple[Tensor, Tensor]:
    """expert (N,) uint8: 0 text, 1 visual, else pad -> permutation (N,) and counts (2,), both int64."""
    if expert.dim() != 1 or expert.dtype != torch.uint8:
        raise InputError(f"expert must be (N,) uint8, not {tuple(expert.shape)} {expert.dtype}")
    permutation = expert.new_empty(len(expert), dtype=torch.int64)
    counts = expert.new_empty(2, dtype=torch.int64)
    launch("moe_route", expert.device, _aligned(expert), permutation, counts, len(expert))
    return permutation, counts


@torch.library.custom_op("mono_internvl::moe_linear", mutates_args=())
def _linear(x: Tensor, w_text: Tensor, w_visual: Tensor, permutation: Tensor, counts: Tensor,
            residual: Tensor | None, gather: bool, scatter: bool, tile_config: int) -> Tensor:
    """x (N, K), weights (M, K) -> (N, M). x is in reading order if gather, else in permuted order; the result
    is in reading order if scatter. tile_config: 0 lets moe_kernel.cu choose, else a value of its enum."""
    y, permutation = x.new_empty(len(x), len(w_text)), _aligned(permutation)
    launch("moe_linear", x.device, *map(_aligned, (x, w_text, w_visual, residual)), y,
           permutation if gather else None, permutation if scatter else None, _aligned(counts), *x.shape,
           len(w_text), DTYPES[x.dtype], tile_config)
    return y


@torch.library.custom_op("mono_internvl::moe_swiglu", mutates_args=())
def _swiglu(x: Tensor, w1_text: Tensor, w3_text: Tensor, w1_visual: Tensor, w3_visual: Tensor,
            permutation: Tensor, counts: Tensor, tile_config: int) -> Tensor:
    """x (N, K) in reading order, weights (M, K) -> h = silu(x w1ᵀ) · (x w3ᵀ), (N, M), in permuted order."""
    h = x.new_empty(len(x), len(w1_text))
    launch("moe_swiglu", x.device, *map(_aligned, (x, w1_text, w3_text, w1_visual, w3_visual)), h,
           _aligned(permutation), _aligned(counts), *x.shape, len(w1_text), DTYPES[x.dtype], tile_config)
    return h


_route.register_fake(lambda expert: (expert.new_empty(expert.shape, dtype=torch.int64),
                                     expert.new_empty(2, dtype=torch.int64)))
_linear.register_fake(lambda x, w, *others: x.new_empty(x.shape[0], w.shape[0]))
_swiglu.register_fake(lambda x, w, *others: x.new_empty(x.shape[0], w.shape[0]))


# ---------------------------------------------------------------- their gradients

def _weight_gradients(dy: Tensor, x: Tensor, counts: Tensor, wanted) -> list[Tensor | None]:
    """dW (M, K) = dyᵀ x over each expert's tokens; dy (N, M), x (N, K) in permuted order. Only the device
    knows how many tokens that is, so the other rows are set to zero instead of left out. They are not
    multiplied by zero, because 0 · NaN = NaN."""
    position = torch.arange(x.shape[0], device=x.device)[:, None]
    experts = position < counts[0], (position >= counts[0]) & (position < counts.sum())
    return [torch.where(e, dy, 0).T @ torch.where(e, x, 0) if want else None
            for e, want in zip(experts, wanted, strict=True)]


def _linear_setup(ctx, inputs, output):
    *saved, residual, ctx.gather, ctx.scatter, ctx.tile_config = inputs
    ctx.save_for_backward(*saved)


def _linear_backward(ctx, dy):
    x, w_text, w_visual, permutation, counts = ctx.saved_tensors
    dx, dw, need = None, (None, None), ctx.needs_input_grad
    if need[0]:      # the same routed product with transposed weights; gather and scatter change places
        dx = _linear(dy, w_text.T, w_visual.T, permutation, counts, None, ctx.scatter, ctx.gather,
                     ctx.tile_config)
    if need[1] or need[2]:
        dy_routed, x_routed = dy[permutation] if ctx.scatter else dy, x[permutation] if ctx.gather else x
        dw = _weight_gradients(dy_routed, x_routed, counts, need[1:3])
    return dx, *dw, None, None, dy if need[5] else None, None, None, None


def _swiglu_setup(ctx, inputs, output):
    *saved, ctx.tile_config = inputs
    ctx.save_for_backward(*saved)


def _swiglu_backward(ctx, dh):
    x, w1_text, w3_text, w1_visual, w3_visual, permutation, counts = ctx.saved_tensors
    routed, need = (permutation, counts), ctx.needs_input_grad
    # gate and up are computed a second time: to keep them would take twice the memory of h.
    gate = _linear(x, w1_text, w1_visual, *routed, None, True, False, ctx.tile_config).float()
    up = _linear(x, w3_text, w3_visual, *routed, None, True, False, ctx.tile_config).float()
    s = gate.sigmoid()
    d_gate, d_up = (dh * up * s * (1 + gate * (1 - s))).to(x.dtype), (dh * gate * s).to(x.dtype)
    dx, dw1, dw3 = None, (None, None), (None, None)
    if need[0]:
        dx = _linear(d_gate, w1_text.T, w1_visual.T, *routed, None, False, True, ctx.tile_config)
        dx = _linear(d_up, w3_text.T, w3_visual.T, *routed, dx, False, True, ctx.tile_config)
    if any(need[1:5]):
        dw1 = _weight_gradients(d_gate, x[permutation], counts, (need[1], need[3]))
        dw3 = _weight_gradients(d_up, x[permutation], counts, (need[2], need[4]))
    return dx, dw1[0], dw3[0], dw1[1], dw3[1], None, None, None


_linear.register_autograd(_linear_backward, setup_context=_linear_setup)
_swiglu.register_autograd(_swiglu_backward, setup_context=_swiglu_setup)


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


def route(expert: Tensor) -> tuple[Tensor, Tensor]:
    """expert (N,) uint8, 0 text, 1 visual, 2 pad -> (permutation (N,), counts (2,)), both int64 and on the
    same device, without a device→host sync. Raises InputError for another shape or dtype."""
    return _route(expert)


def linear(x: Tensor, w_text: Tensor, w_visual: Tensor, permutation: Tensor, counts: Tensor) -> Tensor:
    """x (..., K), weights (M, K) -> (..., M): each token times its expert's weights, zero for pads. float32,
    bfloat16 or float16; K and M are multiples of 8. Raises InputError for what the kernel cannot do."""
    flat, w_text, w_visual = _cast_for_autocast(x.reshape(-1, x.shape[-1]), w_text, w_visual)
    _check(flat, (w_text, w_visual), permutation, counts)
    y = _linear(flat, w_text, w_visual, permutation, counts, None, True, True, 0)
    return y.view(*x.shape[:-1], len(w_text))


def swiglu(x: Tensor, text: Sequence[Tensor], visual: Sequence[Tensor], permutation: Tensor,
           counts: Tensor) -> Tensor:
    """x (..., D) -> (..., D): w2(silu(w1 x) · w3 x) with each token's expert, zero for pads. text, visual:
    the weights w1 (F, D), w3 (F, D), w2 (D, F). dtypes, widths and errors as for `linear`."""
    flat, *first, w2_text, w2_visual = _cast_for_autocast(
        x.reshape(-1, x.shape[-1]), *text[:2], *visual[:2], text[2], visual[2])
    _check(flat, first, permutation, counts)
    h = _swiglu(flat, *first, permutation, counts, 0)                      # stays in permuted order
    _check(h, (w2_text, w2_visual), permutation, counts)
    return _linear(h, w2_text, w2_visual, permutation, counts, None, False, True, 0).view(x.shape)
