"""Mono-InternVL and Mono-InternVL-1.5: one decoder-only transformer that reads image patches and text.

Read top to bottom: configuration, vision embedding, routing, its CUDA back end (may be skipped at a first
reading), the modality mixture-of-experts, the decoder and its cache, what generation and checkpoints need,
the whole model with generation, loading and saving.

Sources: [v1] arXiv 2410.08202, [v1.5] arXiv 2507.12566, [repo] the official code (OpenGVLab/Mono-InternVL),
[ours] our choice where those are silent. Shapes: B rows, T tokens, D hidden size, H heads, KV key/value
heads, hd head size, V vocabulary, S tile side in pixels, Dv channels of a patch, N = B·T tokens of the batch
laid end to end, K -> M widths of a linear. Names with _ve belong to the visual expert [repo].
"""
import contextlib
import ctypes
import functools
import hashlib
import json
import math
import os
import sys
import typing
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint


class InputError(ValueError):
    """A file, flag or tensor that a user gave does not fit. Scripts print the message: it says what to do."""


# ---------------------------------------------------------------- configuration

def read_json(path: str | Path, if_missing: str = "") -> dict:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist{if_missing}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{path} is not readable JSON: {e}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, expected an object of named fields")
    return content


def _check_llm(llm: dict, path):
    """Refuses an LLM that needs what the architecture here leaves out."""
    for name, supported in (("hidden_act", "silu"), ("bias", False), ("attention_bias", False),
                            ("mlp_bias", False), ("tie_word_embeddings", False)):
        if llm.get(name, supported) != supported:
            raise InputError(f"{path}: the LLM's {name} is {llm[name]!r}, supported is {supported!r}")


@dataclass
class MonoInternVLConfig:
    """Every size of the model; the defaults are Mono-InternVL-2B. Files nest them as the official ones do."""
    vocab_size: int = 92553
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_key_value_heads: int = 8
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1e6
    rope_scaling: dict | None = None              # {"type": "linear" | "dynamic", "factor": float}
    max_position_embeddings: int = 32768
    bos_token_id: int = 1
    eos_token_id: int = 2
    pad_token_id: int = 2
    attn_experts: str = ""                        # projections with a visual copy: "" [v1], "qkv" or "qkvo"
    vision_hidden_size: int = 1024                # channels of the patch embedding, before pixel shuffle
    num_channels: int = 3
    patch_size: int = 14
    image_size: int = 448                         # side of one square tile, in pixels
    downsample_ratio: float = 0.5                 # pixel shuffle: 1/ratio² patches become one visual token
    min_dynamic_patch: int = 1                    # tiles of one image: fewest ...
    max_dynamic_patch: int = 12                   # ... and most, the thumbnail not counted
    use_thumbnail: bool = True
    img_context_token_id: int | None = None       # <IMG_CONTEXT>, holds the place of one visual token

    def __post_init__(self):
        for name, expected in typing.get_type_hints(type(self)).items():
            value = getattr(self, name)
            if expected is float and type(value) is int:
                value = float(value)
                setattr(self, name, value)
            allowed = typing.get_args(expected) or (expected,)
            if type(value) not in allowed:        # exact types: True is no number of layers
                raise InputError(f"config field {name} is {value!r} ({type(value).__name__}), "
                                 f"expected {' or '.join(t.__name__ for t in allowed)}")
            least = 0 if name.endswith("token_id") else 1e-12
            if type(value) in (int, float) and not least <= value < math.inf:         # NaN fails as well
                raise InputError(f"config field {name} is {value}, expected a positive number")
        if self.attn_experts not in ("", "qkv", "qkvo"):
            raise InputError(f"config field attn_experts is {self.attn_experts!r}, "
                             "expected '', 'qkv' or 'qkvo'")
        if self.rope_scaling is not None:
            kind, factor = self.rope_scaling.get("type"), self.rope_scaling.get("factor")
            number = type(factor) in (int, float) and 1 <= factor < math.inf
            if kind not in ("linear", "dynamic") or not number:
                raise InputError(f"config field rope_scaling is {self.rope_scaling}, expected null or "
                                 '{"type": "linear" or "dynamic", "factor": a number >= 1}')
        for whole, part in (("hidden_size", "num_attention_heads"),
                            ("num_attention_heads", "num_key_value_heads"), ("image_size", "patch_size")):
            if getattr(self, whole) % getattr(self, part):
                raise InputError(f"config field {whole} = {getattr(self, whole)} is not a multiple of "
                                 f"{part} = {getattr(self, part)}")
        if self.head_dim % 2 or self.head_dim < 4:
            raise InputError(f"config field hidden_size = {self.hidden_size} makes heads of {self.head_dim}; "
                             "rotary positions need an even size of at least 4")
        for name, limit in (("min_dynamic_patch", self.max_dynamic_patch + 1),
                            ("img_context_token_id", self.vocab_size)):
            if (getattr(self, name) or 0) >= limit:
                raise InputError(f"config field {name} is {getattr(self, name)}, expected less than {limit}")
        if (1 / self.downsample_ratio) % 1 or (self.image_size // self.patch_size) % self.shuffle:
            raise InputError(f"config field downsample_ratio = {self.downsample_ratio} does not divide the "
                             f"{self.image_size // self.patch_size}-patch side of a tile")

    @classmethod
    def mono_internvl_2b(cls, **changes) -> "MonoInternVLConfig":
        return cls(**{"rope_scaling": {"type": "dynamic", "factor": 2.0}, **changes})

    @classmethod
    def mono_internvl_1_5_2b(cls, **changes) -> "MonoInternVLConfig":
        return cls.mono_internvl_2b(**{"attn_experts": "qkvo", **changes})   # "qkvo": [ours], see README

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def shuffle(self) -> int:
        """Patches along one side of the square that pixel shuffle folds into one visual token."""
        return int(1 / self.downsample_ratio)

    @property
    def tokens_per_tile(self) -> int:
        return (self.image_size // self.patch_size // self.shuffle) ** 2

    @property
    def context_length(self) -> int:
        """Most tokens of one row: RoPE scaling stretches the trained positions by its factor."""
        return int(self.max_position_embeddings * (self.rope_scaling["factor"] if self.rope_scaling else 1))

    # the official config.json nests these fields: our name -> the path there
    _PATHS = {"vision_hidden_size": ("vision_config", "hidden_size")}
    _PATHS |= {name: ("vision_config", name) for name in ("num_channels", "patch_size", "image_size")}
    _PATHS |= {name: ("llm_config", name) for name in """vocab_size hidden_size intermediate_size
        num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps rope_theta rope_scaling
        max_position_embeddings bos_token_id eos_token_id pad_token_id attn_experts""".split()}

    @classmethod
    def from_json(cls, path: str | Path) -> "MonoInternVLConfig":
        """Reads an official (or our) config.json. Raises InputError naming the field that does not fit."""
        official = read_json(path, "; expected a checkpoint folder that holds it")
        values = {}
        for f in fields(cls):
            node = official
            for key in cls._PATHS.get(f.name, (f.name,)):
                node = node.get(key, ...) if isinstance(node, dict) else ...
            if node is not ...:
                values[f.name] = node
        for name in ("vocab_size", "hidden_size", "num_hidden_layers", "vision_hidden_size"):
            if name not in values:
                field = ".".join(cls._PATHS[name])
                raise InputError(f"{path}: no field {field}; is this a Mono-InternVL folder?")
        _check_llm(official["llm_config"], path)
        try:
            config = cls(**values)
        except InputError as e:
            raise InputError(f"{path}: {e}") from None
        for name, supported in (("ps_version", "v2"), ("force_image_size", config.image_size)):
            if official.get(name) not in (None, supported):
                raise InputError(f"{path}: {name} = {official[name]!r}, supported is {supported!r}")
        return config

    @classmethod
    def from_llm(cls, folder: str | Path, **changes) -> "MonoInternVLConfig":
        """The sizes of an InternLM2 or Llama-layout folder; changes: fields of ours, as in cls(...)."""
        path = Path(folder) / "config.json"
        llm = read_json(path, "; expected an LLM folder that holds it")
        if llm.get("model_type") not in ("internlm2", "llama"):
            raise InputError(f"{path}: model_type {llm.get('model_type')!r} is not 'internlm2' or 'llama'")
        # a Llama's embedding may be its head as well: here it becomes two tensors
        _check_llm({**llm, "tie_word_embeddings": False} if llm["model_type"] == "llama" else llm, path)
        llm["num_key_value_heads"] = llm.get("num_key_value_heads") or llm.get("num_attention_heads")
        # rope_theta and rope_scaling: side by side, or, in newer files, together in rope_parameters
        rope = llm.get("rope_parameters") or llm.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        llm["rope_scaling"] = None if kind == "default" else {"type": kind, "factor": rope.get("factor")}
        llm["rope_theta"] = rope.get("rope_theta", llm.get("rope_theta", 10000.0))
        values = {f.name: llm[f.name] for f in fields(cls) if llm.get(f.name) is not None}
        try:
            config = cls(**{**values, **changes})
        except InputError as e:
            raise InputError(f"{path}: {e}") from None
        if llm.get("head_dim") not in (None, config.head_dim):
            raise InputError(f"{path}: head_dim is {llm['head_dim']}, supported is hidden_size / "
                             f"num_attention_heads = {config.head_dim}")
        return config

    def to_json(self) -> str:
        official = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat",
                    "template": "internlm2-chat", "ps_version": "v2", "select_layer": -1,
                    "dynamic_image_size": True, "force_image_size": self.image_size,
                    "llm_config": {"architectures": ["InternLM2VEForCausalLM"], "model_type": "internlm2",
                                   "bias": False, "hidden_act": "silu", "tie_word_embeddings": False},
                    "vision_config": {"model_type": "intern_vit_patch"}}
        for name, value in asdict(self).items():
            path = self._PATHS.get(name, (name,))
            (official if len(path) == 1 else official[path[0]])[path[-1]] = value
        return json.dumps(official, indent=2)


# ---------------------------------------------------------------- vision embedding: pixels to visual tokens

class VisionEmbedding(nn.Module):
    """Patches + learned 2-D positions: all that is left of a vision tower, no transformer layer [v1, 3.1]."""

    def __init__(self, c: MonoInternVLConfig):
        super().__init__()
        self.grid, width = c.image_size // c.patch_size, c.vision_hidden_size
        # The official model embeds a class token (position slot 0) and drops it at once. Nothing computes it
        # here; the parameter stays for the file format.
        self.class_embedding = nn.Parameter(torch.randn(1, 1, width))
        self.position_embedding = nn.Parameter(torch.randn(1, 1 + self.grid ** 2, width))
        self.patch_embedding = nn.Conv2d(c.num_channels, width, c.patch_size, stride=c.patch_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n_tiles, 3, S, S) -> (n_tiles, Dv, S/patch, S/patch)"""
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        positions = self.position_embedding[:, 1:].mT.unflatten(2, (self.grid, self.grid))  # (1, Dv, g, g)
        if patches.shape[-2:] != positions.shape[-2:]:
            positions = F.interpolate(positions.float(), patches.shape[-2:], mode="bicubic")
        return patches + positions.to(patches.dtype)


def pixel_shuffle(x: Tensor, r: int) -> Tensor:
    """(n, C, h, w) -> (n, h/r · w/r, r²·C): each r×r square of patches is one token [repo, ps_version v2]."""
    n, c, h, w = x.shape
    x = x.view(n, c, h // r, r, w // r, r)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // r) * (w // r), r * r * c)


# ---------------------------------------------------------------- routing: which expert for which token

class Routing:
    """Which expert each token goes to: a static rule, no learned gate. One per forward pass, for all layers.

    rows    (N,) int64: numbers of the text tokens, of the visual tokens, of the pads, each in reading order
    counts  (2,) int64: how many text and how many visual tokens
    Both live on the device of the mask and are made without a device→host sync. Pads go to no expert: their
    outputs are zero and cost nothing.
    """

    def __init__(self, visual: Tensor, attention_mask: Tensor | None = None, backend: str = "auto"):
        """visual (B, T) bool: True at <IMG_CONTEXT>; attention_mask (B, T): 1 = real token, 0 = pad. backend:
        "dense", the naive reference; "torch", gather and scatter; "cuda", moe_kernel.cu; or "auto"."""
        if backend not in ("auto", "dense", "torch", "cuda"):
            raise InputError(f"unknown MoE back end {backend!r}; choose auto, dense, torch or cuda")
        # auto stays torch on every device until a GPU has measured where cuda is the faster one.
        if backend == "auto" or backend == "cuda" and kernel_library(visual.device) is None:   # it has warned
            backend = "torch"
        self.backend = backend
        expert = visual.reshape(-1).to(torch.uint8)                        # (N,) 0 text, 1 visual, 2 pad
        if attention_mask is not None:
            expert = expert.masked_fill(attention_mask.reshape(-1) == 0, 2)
        self.expert = expert
        if backend == "cuda":
            self.rows, self.counts = kernel_route(expert)
        else:
            self.rows = expert.argsort(stable=True)
            self.counts = torch.stack([(expert == 0).sum(), (expert == 1).sum()])

    @functools.cached_property
    def split(self) -> tuple[Tensor, Tensor]:
        """(text rows, visual rows). The host must know their lengths: on a GPU one sync per forward pass."""
        text, visual = self.counts.tolist()
        return self.rows[:text], self.rows[text:text + visual]


def routed(x: Tensor, text_expert, visual_expert, routing: Routing | None) -> Tensor:
    """(..., D) -> (..., D'): each token through its modality's expert. routing None: all is text."""
    if routing is None:
        return text_expert(x)
    flat = x.reshape(-1, x.shape[-1])                                      # (N, D)
    if routing.backend == "dense":
        # The naive reference: both experts on every token, then choose. torch.where, not a product with the
        # mask as in the official code: there an overflow in the unchosen expert (inf · 0) becomes NaN.
        expert = routing.expert[:, None]
        y = torch.where(expert == 1, visual_expert(flat), text_expert(flat)).masked_fill(expert == 2, 0)
    else:
        text_rows, visual_rows = routing.split
        text = text_expert(flat.index_select(0, text_rows))
        visual = visual_expert(flat.index_select(0, visual_rows))
        pads = len(text) + len(visual) < len(flat)                         # they stay zero
        y = (text.new_zeros if pads else text.new_empty)(len(flat), text.shape[-1])
        y.index_copy_(0, text_rows, text).index_copy_(0, visual_rows, visual)
    return y.view(*x.shape[:-1], y.shape[-1])


# ---------------------------------------------------------------- the cuda back end: moe_kernel.cu in PyTorch

# What routed computes, by hand-written kernels. Here: build the file, call it, make PyTorch operators of the
# calls, give them gradients, check what they get.

KERNEL_SOURCE = Path(__file__).resolve().with_name("moe_kernel.cu")
KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def build_kernel(device: torch.device, source: Path = KERNEL_SOURCE) -> str:
    """Compile with nvcc for a GPU, or with g++ and cuda_on_cpu.h for a CPU; returns the path of the library.

    torch keeps it under TORCH_EXTENSIONS_DIR, by a name that changes with sources, flags, torch and GPU.
    """
    import fcntl  # not on Windows

    from torch.utils import cpp_extension  # slow to import, seldom needed

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


@torch.compiler.disable
@functools.cache
def kernel_library(device: torch.device) -> ctypes.CDLL | None:
    """moe_kernel.cu for this device, built on first use; if that fails, None, and one warning says why."""
    try:
        library = ctypes.CDLL(build_kernel(device))
    except (ImportError, OSError, RuntimeError) as e:  # no setuptools, no ninja, no compiler; its errors
        lines = str(e).splitlines() or [""]
        why = next((line for line in lines[1:] if "error" in line.lower()), lines[0])
        warnings.warn(f"no cuda back end on {device}: moe_kernel.cu could not be built ({why})", stacklevel=3)
        return None
    if device.type == "cpu":
        warnings.warn("the cuda back end on a CPU: cuda_on_cpu.h runs moe_kernel.cu for tests and study; "
                      "the torch back end is much faster here", stacklevel=3)
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
    if t is None:
        return None
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


@torch.library.custom_op("mono_internvl::moe_route", mutates_args=())
def kernel_route(labels: Tensor) -> tuple[Tensor, Tensor]:
    """labels (N,) uint8: 0 text, 1 visual, else pad -> Routing's rows (N,) and counts (2,), both int64."""
    if labels.dim() != 1 or labels.dtype != torch.uint8:
        raise InputError(f"labels must be (N,) uint8, not {tuple(labels.shape)} {labels.dtype}")
    rows, counts = labels.new_empty(len(labels), dtype=torch.int64), labels.new_empty(2, dtype=torch.int64)
    launch_kernel("mmoe_route", labels.device, plain(labels), rows, counts, len(labels))
    return rows, counts


@torch.library.custom_op("mono_internvl::moe_linear", mutates_args=())
def kernel_linear(x: Tensor, w_text: Tensor, w_visual: Tensor, rows: Tensor, counts: Tensor,
                  residual: Tensor | None, gather: bool, scatter: bool, tile: int) -> Tensor:
    """x (N, K), weights (M, K) -> (N, M). x is in routed order unless gather, y unless scatter. tile: 0 lets
    moe_kernel.cu choose, else its `enum Choice`."""
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


def check_kernel_inputs(x: Tensor, weights: Sequence[Tensor], rows: Tensor, counts: Tensor) -> None:
    """Raises InputError for what moe_kernel.cu cannot do. weights: all (M, K)."""
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
        raise InputError(f"the cuda back end takes {problem}. The torch back end takes anything.")


def cast_for_autocast(*tensors: Tensor) -> list[Tensor]:
    """F.linear obeys torch.autocast by itself; a custom operator has to be told."""
    device_type = tensors[0].device.type
    if not (torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)):
        return list(tensors)
    return [t.to(torch.get_autocast_dtype(device_type)) for t in tensors]


def cuda_mmoe_linear(x, w_text, w_visual, rows, counts) -> Tensor:
    """x (N, K), weights (M, K) -> (N, M); 0 in the rows of pads."""
    x, w_text, w_visual = cast_for_autocast(x, w_text, w_visual)
    check_kernel_inputs(x, (w_text, w_visual), rows, counts)
    return kernel_linear(x, w_text, w_visual, rows, counts, None, True, True, 0)


def cuda_mmoe_swiglu(x, text, visual, rows, counts) -> Tensor:
    """x (N, D) -> (N, D): w2(silu(w1 x) · w3 x). text, visual: w1 (F, D), w3 (F, D), w2 (D, F)."""
    x, *first, w2_text, w2_visual = cast_for_autocast(x, *text[:2], *visual[:2], text[2], visual[2])
    check_kernel_inputs(x, first, rows, counts)
    h = kernel_swiglu(x, *first, rows, counts, 0)                          # stays in routed order
    check_kernel_inputs(h, (w2_text, w2_visual), rows, counts)
    return kernel_linear(h, w2_text, w2_visual, rows, counts, None, False, True, 0)


# ---------------------------------------------------------------- the modality mixture-of-experts

def mmoe_linear(x: Tensor, w_text: Tensor, w_visual: Tensor, routing: Routing | None) -> Tensor:
    """Routed linear, (..., K) -> (..., M); weights (M, K). The attention experts of 1.5 [v1.5]."""
    if routing is not None and routing.backend == "cuda":
        y = cuda_mmoe_linear(x.reshape(-1, x.shape[-1]), w_text, w_visual, routing.rows, routing.counts)
        return y.view(*x.shape[:-1], len(w_text))
    return routed(x, lambda t: F.linear(t, w_text), lambda t: F.linear(t, w_visual), routing)


class FeedForward(nn.Module):
    """SwiGLU, one expert: w2(silu(w1 x) · w3 x)."""

    def __init__(self, c: MonoInternVLConfig):
        super().__init__()
        self.w1 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.w3 = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.w2 = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def mmoe_swiglu(x: Tensor, experts_text: FeedForward, experts_visual: FeedForward,
                routing: Routing | None) -> Tensor:
    """Routed feed-forward, (..., D) -> (..., D): FFN_v(x) on visual tokens, FFN_t(x) on text [v1, eq. 3]."""
    if routing is not None and routing.backend == "cuda":
        text, visual = ((e.w1.weight, e.w3.weight, e.w2.weight) for e in (experts_text, experts_visual))
        y = cuda_mmoe_swiglu(x.reshape(-1, x.shape[-1]), text, visual, routing.rows, routing.counts)
        return y.view(x.shape)
    return routed(x, experts_text, experts_visual, routing)


# ---------------------------------------------------------------- the decoder: InternLM2 with visual experts

class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)      # in float32, cast, then × weight


def rope_tables(c: MonoInternVLConfig, positions: Tensor, lengths: Tensor | int, dtype: torch.dtype):
    """cos and sin, each (B, 1, T, hd), for positions (B, T) in rows of `lengths` (B,) tokens in all, or in
    documents of `lengths` (B, T).

    rope_scaling "linear" divides positions by the factor; "dynamic" (NTK) raises the base once a row is
    longer than the trained positions: a matter of its own length, not of the batch, nor of a packed row.
    """
    kind, factor = (c.rope_scaling["type"], c.rope_scaling["factor"]) if c.rope_scaling else (None, 1.0)
    lengths = torch.as_tensor(lengths, device=positions.device, dtype=torch.float32)
    lengths = lengths[..., None] if lengths.ndim == 2 else lengths.view(-1, 1, 1)
    base = torch.full_like(lengths, c.rope_theta)
    if kind == "dynamic":
        stretch = (factor * lengths / c.max_position_embeddings - (factor - 1)).clamp(min=1)
        base = base * stretch ** (c.head_dim / (c.head_dim - 2))
    exponents = torch.arange(0, c.head_dim, 2, device=positions.device, dtype=torch.float32) / c.head_dim
    t = positions.float() / factor if kind == "linear" else positions.float()
    angles = t[..., None] * base ** -exponents                             # (B, T, hd/2)
    angles = torch.cat([angles, angles], -1)[:, None]                      # half-rotation layout [repo]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def write_columns(keys: Tensor, values: Tensor, columns: Tensor, k: Tensor, v: Tensor) -> None:
    """k, v (B, KV, T, hd) into keys, values (B, KV, columns, hd) at columns (T,)."""
    keys.index_copy_(2, columns, k)
    values.index_copy_(2, columns, v)


# Of a write in place torch.compile makes a copy of the whole cache, but not of an operator that it can't look
# into: 1 instead of 247 ms a step for 8 small layers and a cache of 8 rows of 4,096 columns, on a CPU.
write_columns_compiled = torch.library.custom_op("mono_internvl::write_columns", write_columns,
                                                 mutates_args=("keys", "values"))


class KVCache:
    """Keys and values of the tokens read so far. Grows on demand; one may serve many calls of `generate`, of
    one model whose weights stay as they are: a prompt that begins like the one before is not read again.

    keys, values (layers, rows, KV, columns, hd). length: filled columns, the same in all rows. real (rows,
    columns) bool: False at pads, and beyond length. A layer writes at the columns `write` (T,) and attends
    to the first `visible` ones.
    """
    # A decoding step sees whole blocks of columns: few shapes, so few CUDA graphs. A CPU has none to save.
    BLOCKS = {"cpu": 32, "cuda": 512}

    def __init__(self, config: MonoInternVLConfig):
        self.c, self.length, self.visible = config, 0, 0
        self.keys = self.values = self.real = None
        self.ids, self.tiles = [], None            # what stands in the columns, if there is one row
        self.padded = False                        # is there a pad in any row?
        self.reused = 0                            # columns of the last prompt that were there already

    def reserve(self, rows: int, columns: int, dtype: torch.dtype, device) -> None:
        """Makes room, and keeps what there is if it has to move."""
        c, device = self.c, torch.device(device)
        if self.keys is None or (self.keys.dtype, self.keys.device) != (dtype, device):
            shape = (c.num_hidden_layers, 0, c.num_key_value_heads, 0, c.head_dim)
            self.keys = self.values = torch.empty(shape, dtype=dtype, device=device)
            self.real, self.length = torch.empty(0, 0, dtype=torch.bool, device=device), 0
        old_rows, width = self.real.shape
        if rows <= old_rows and columns <= width:
            return
        if width and columns > width:              # the next turn will need more still
            columns = max(columns, min(2 * width, c.context_length))
        self.block = self.BLOCKS.get(device.type, 32)
        rows, columns = max(rows, old_rows), -(-max(columns, width) // self.block) * self.block
        # zeros, as a masked column still takes part in 0 · value: there may be no NaN
        room = (0, 0, 0, columns - width, 0, 0, 0, rows - old_rows)
        self.keys, self.values = F.pad(self.keys, room), F.pad(self.values, room)
        self.real = F.pad(self.real, (0, columns - width, 0, rows - old_rows))
        self.token = torch.zeros(rows, 1, dtype=torch.int64, device=device)    # what a captured step reads
        self.column = torch.zeros(1, dtype=torch.int64, device=device)
        self.graphs = {}                           # (step, rows, visible) -> CUDA graph, its logits
        self.pool = torch.cuda.graph_pool_handle() if self.column.is_cuda else None    # of their memory

    def truncate(self, length: int) -> None:
        """Forgets all columns from `length` on, those of an interrupted step included."""
        for t in (self.keys, self.values):
            t[:, :, :, length:self.visible] = 0
        self.real[:, length:] = False
        self.ids, self.length, self.visible = self.ids[:length], length, length
        self.padded = self.padded and length > 0

    def extend(self, rows: int, T: int, attention_mask: Tensor | None) -> Tensor | None:
        """T more columns of the first rows will be written: real (rows, length + T), None without any pad."""
        self.visible = self.length + T
        self.write = torch.arange(self.length, self.visible, device=self.keys.device)
        new = True if attention_mask is None else attention_mask.bool()
        self.real[:rows, self.length:self.visible] = new
        self.padded |= attention_mask is not None
        return self.real[:rows, :self.visible] if self.padded else None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, KV, T, hd); returns the visible ones, (B, KV, visible, hd) each. `length` moves
        once all layers have stored theirs."""
        rows = len(k)
        keys, values = self.keys[layer, :rows], self.values[layer, :rows]
        write = write_columns_compiled if torch.compiler.is_compiling() else write_columns
        write(keys, values, self.write, k.to(keys.dtype), v.to(keys.dtype))
        return keys[:, :, :self.visible], values[:, :, :self.visible]

    def keep(self, rows: list[int]) -> list[int]:
        """Only these rows go on. They become the first ones, by few moves; returns which row is now where."""
        order = list(range(len(rows)))
        holes = sorted(set(order) - set(rows))
        for hole, row in zip(holes, (r for r in rows if r >= len(rows)), strict=True):
            order[hole] = row
            for t in (self.keys, self.values):
                t[:, hole] = t[:, row]
            self.real[hole] = self.real[row]
        return order

    def common_prefix(self, input_ids: Tensor, pixel_values: Tensor | None,
                attention_mask: Tensor | None) -> tuple[int, int]:
        """How many columns, and how many tiles in them, hold the beginning of this prompt already."""
        c, (B, T), same, tiles = self.c, input_ids.shape, 0, 0
        # Past the trained length, dynamic RoPE gave or will give the keys another base.
        dynamic = (c.rope_scaling or {}).get("type") == "dynamic"
        stretched = dynamic and max(T, self.length) > c.max_position_embeddings
        if B > 1 or stretched or self.padded or attention_mask is not None:
            return 0, 0
        # The last token is always read: its state gives the next one.
        for old, new in zip(self.ids[:min(self.length, T - 1)], input_ids[0].tolist(), strict=False):
            if old != new:
                break
            same += 1
        visual = [i for i in range(same) if self.ids[i] == c.img_context_token_id]
        if visual and self.tiles.shape[1:] == pixel_values.shape[1:]:
            per_tile = math.prod(s // (c.patch_size * c.shuffle) for s in pixel_values.shape[2:])
            for old, new in zip(self.tiles[:len(visual) // per_tile], pixel_values, strict=False):
                if not old.equal(new):
                    break
                tiles += 1
            visual = visual[tiles * per_tile:]     # the same placeholders, of another picture
        return visual[0] if visual else same, tiles


# cuDNN's attention, the first choice on Hopper since torch 2.11, makes a plan for each new length of prompt,
# and its gradients under a mask can be NaN (pytorch issue 196678). The other kernels stay.
torch.backends.cuda.enable_cudnn_sdp(False)


class Attention(nn.Module):
    """Causal grouped-query attention, one softmax over visual and text tokens. In 1.5 the projections have
    visual experts (*_ve); the output of a visual token is wo_ve(x), never wo_ve(wo(x))."""

    def __init__(self, c: MonoInternVLConfig, layer: int):
        super().__init__()
        self.c, self.layer = c, layer
        width = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
        self.wqkv = nn.Linear(c.hidden_size, width, bias=False)
        self.wo = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        if c.attn_experts:
            self.wqkv_ve = nn.Linear(c.hidden_size, width, bias=False)
        if c.attn_experts == "qkvo":
            self.wo_ve = nn.Linear(c.hidden_size, c.hidden_size, bias=False)

    def forward(self, x, rope, mask, routing, kv_cache=None):
        c = self.c
        B, T, D = x.shape
        if c.attn_experts:
            qkv = mmoe_linear(x, self.wqkv.weight, self.wqkv_ve.weight, routing)
        else:
            qkv = self.wqkv(x)
        # rows of wqkv are grouped by key/value head: its query heads, then its key, then its value [repo]
        group = c.num_attention_heads // c.num_key_value_heads
        qkv = qkv.view(B, T, c.num_key_value_heads, group + 2, c.head_dim).permute(0, 2, 3, 1, 4)
        qk = apply_rope(qkv[:, :, :-1].flatten(1, 2), *rope).unflatten(1, (-1, group + 1))
        q, k, v = qk[:, :, :-1], qk[:, :, -1], qkv[:, :, -1]   # (B, KV, group, T, hd), twice (B, KV, T, hd)
        if kv_cache is not None:
            k, v = kv_cache.append(self.layer, k, v)           # (B, KV, visible, hd)
        if T == 1:
            # One token: the queries of a group see the same columns of the same head, like several tokens of
            # one head. No key or value is repeated for them.
            y = F.scaled_dot_product_attention(q.squeeze(3), k, v, attn_mask=mask)     # (B, KV, group, hd)
        else:
            # Repeated they are served by every fused attention kernel, whatever the mask. None: causal.
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
            y = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, attn_mask=mask, is_causal=mask is None)
            y = y.transpose(1, 2)                              # (B, T, H, hd)
        y = y.reshape(B, T, D)
        if c.attn_experts == "qkvo":
            return mmoe_linear(y, self.wo.weight, self.wo_ve.weight, routing)
        return self.wo(y)


class DecoderLayer(nn.Module):
    """x' = x + MHA(RMSNorm(x)); x'' = x' + MMoE(RMSNorm(x')) [v1, eq. 1-2]. The norms are shared."""

    def __init__(self, c: MonoInternVLConfig, layer: int):
        super().__init__()
        self.attention_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.attention = Attention(c, layer)
        self.ffn_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.feed_forward = FeedForward(c)        # the text expert: the pre-trained LLM's own
        self.feed_forward_ve = FeedForward(c)     # the visual expert, at first a copy of it

    def forward(self, x, rope, mask, routing, kv_cache=None):
        x = x + self.attention(self.attention_norm(x), rope, mask, routing, kv_cache)
        return x + mmoe_swiglu(self.ffn_norm(x), self.feed_forward, self.feed_forward_ve, routing)


class InternLM2(nn.Module):
    def __init__(self, c: MonoInternVLConfig):
        super().__init__()
        self.c = c
        self.model = nn.ModuleDict({
            "tok_embeddings": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList(DecoderLayer(c, i) for i in range(c.num_hidden_layers)),
            "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        self.output = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.recompute = False                    # in training: keep each layer's input only, run it twice

    def forward(self, x, routing=None, attention_mask=None, kv_cache=None, lengths=None,
                document_ids=None) -> Tensor:
        """Embeddings x (B, T, D) -> hidden states (B, T, D) after the final norm, before the head.

        attention_mask (B, T): 1 = real, 0 = pad. kv_cache: the tokens follow those that it holds, and join
        them. lengths: tokens that a row will have after a prefill in chunks (default: up to now); only
        dynamic RoPE looks at it. Past max_position_embeddings, cached keys keep their base [repo].
        document_ids (B, T), without a cache: rows are packed; each run of one id is a sequence of its own.
        """
        B, T, _ = x.shape
        past = 0 if kv_cache is None else kv_cache.length
        real = attention_mask if kv_cache is None else kv_cache.extend(B, T, attention_mask)
        columns = torch.arange(past + T, device=x.device)
        positions, mask, longest = columns[None, past:], None, past + T    # (1, T)
        if past and T > 1:
            mask = causal_lower_right(T, past + T)  # (T, past + T), causal after a cache
        if document_ids is not None:
            # Runs are counted, so that pads in one piece are a document too, which nobody reads.
            starts = F.pad(document_ids.diff(dim=1) != 0, (1, 0))          # (B, T) a document's first token
            runs = starts.cumsum(1)
            positions = columns - (columns * starts).cummax(1).values
            lengths = torch.zeros_like(runs).scatter_add_(1, runs, torch.ones_like(runs)).gather(1, runs)
            longest = int(lengths.max())
            mask = (runs[:, :, None] == runs[:, None]) & (columns <= columns[:, None])
            mask = mask[:, None]                                           # (B, 1, T, T), block-diagonal
        elif real is not None:
            real = real.bool()                                             # (B, past + T)
            positions = (real.cumsum(1) - 1).clamp(min=0)[:, past:]        # a row counts its own tokens only
            lengths = real.sum(1) if lengths is None else lengths
            # A pad sees itself: a row of the softmax with nothing to see would be NaN.
            mask = (columns <= columns[past:, None]) & real[:, None] | (columns == columns[past:, None])
            mask = mask[:, None]                                           # (B, 1, T, past + T)
        if longest > self.c.context_length:
            raise InputError(f"{longest} tokens do not fit the context of {self.c.context_length}; "
                             "shorten the text or use fewer tiles")
        lengths = past + T if lengths is None else lengths
        x = self.run_layers(x, positions, lengths, mask, routing, kv_cache)
        if kv_cache is not None:
            kv_cache.length += T
        return x

    def run_layers(self, x, positions, lengths, mask, routing, kv_cache) -> Tensor:
        rope = rope_tables(self.c, positions, lengths, x.dtype)
        for layer in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, mask, routing, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rope, mask, routing, kv_cache)
        return self.model.norm(x)


# ---------------------------------------------------------------- generation: steps as graphs, sampling

@functools.cache
def compiled(function):
    # A shape of its own for one row, one block, another dtype: more variants than the 8 that torch allows.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: libraries keep a workspace for each stream that they have seen."""
    return torch.cuda.Stream(device)


def capture(step, inputs: tuple, pool):
    """step(*inputs) as a CUDA graph, and its result: one tensor, which every replay fills anew. Graphs that
    never run at the same time may share a pool of memory."""
    with torch.cuda.device(inputs[1].device):
        side = capture_stream(inputs[1].device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step(*inputs)                          # libraries choose their kernels before the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            result = step(*inputs)
    return graph, result


def sample_token(logits, seen, temperature, top_k, top_p, repetition_penalty, generators) -> Tensor:
    """Next tokens (B,) from logits (B, V): penalty, temperature, top-k, top-p, in Hugging Face's order.
    generators: one a row, None is the global one. Without a device→host sync, which torch.multinomial has."""
    if repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:           # the smallest set of tokens whose probability reaches top_p
        p, order = logits.softmax(-1).sort(descending=True)
        late = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(late.scatter(1, order, late), -torch.inf)
    # of waiting times with rates p, the shortest is number i with probability p_i
    waiting = torch.stack([torch.empty_like(row).exponential_(generator=g)
                           for row, g in zip(logits, generators, strict=True)])
    return (logits.softmax(-1) / waiting).argmax(-1)


# ---------------------------------------------------------------- the files of a checkpoint

def _img_context_token_id(folder: Path) -> int | None:
    """From added_tokens.json or, where that is missing, from tokenizer_config.json; None without either."""
    if (folder / "added_tokens.json").exists():
        return read_json(folder / "added_tokens.json").get("<IMG_CONTEXT>")
    if (folder / "tokenizer_config.json").exists():
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
        for i, token in decoder.items() if isinstance(decoder, dict) else ():
            if isinstance(token, dict) and token.get("content") == "<IMG_CONTEXT>" and i.isdecimal():
                return int(i)
    return None


LLAMA_NAMES = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output",
               "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
               "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
               "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}


def _from_llama(tensors: dict[str, Tensor], c: MonoInternVLConfig, folder) -> dict[str, Tensor]:
    """A Llama's tensors under InternLM2's names; q, k and v become the rows (kv_head, [q × group, k, v],
    head_dim) of wqkv. Both models rotate halves of a head, so nothing else changes."""
    if "lm_head.weight" not in tensors:            # tied: the embedding is the head
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
    for i in range(c.num_hidden_layers):
        names = [f"model.layers.{i}.self_attn.{part}_proj.weight" for part in "qkv"]
        parts = [tensors.pop(name, None) for name in names]
        if any(p is None or p.shape != (n * c.head_dim, c.hidden_size)
               for p, n in zip(parts, heads, strict=True)):
            raise InputError(f"{folder}: {names[0]} or its k_proj, v_proj is missing or of another size")
        parts = [p.unflatten(0, (c.num_key_value_heads, -1, c.head_dim)) for p in parts]
        tensors[f"model.layers.{i}.attention.wqkv.weight"] = torch.cat(parts, 1).flatten(0, 2)
    for theirs, ours in LLAMA_NAMES.items():
        tensors = {name.replace(theirs, ours): t for name, t in tensors.items()}
    return {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}    # old files


def _read_tensors(folder: str | Path, dtype: torch.dtype | None, device) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    folder = Path(folder)
    files = ["model.safetensors"]
    if (folder / "model.safetensors.index.json").exists():
        index = folder / "model.safetensors.index.json"
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or any(Path(str(f)).name != f for f in weight_map.values()):
            raise InputError(f"{index}: no weight_map of tensor names to file names")
        files = sorted(set(weight_map.values()))
    tensors = {}
    for file in files:
        try:
            with safe_open(folder / file, "pt", device=str(device)) as f:
                for name in f.keys():
                    tensors[name] = f.get_tensor(name)
                    if dtype is not None:
                        tensors[name] = tensors[name].to(dtype)
        except FileNotFoundError:
            raise InputError(f"{folder / file} does not exist; expected model.safetensors or "
                             "all shards of its index") from None
        except (SafetensorError, OSError) as e:
            raise InputError(f"{folder / file} is damaged or cut short: {e}") from None
    return tensors


# ---------------------------------------------------------------- the whole model

class MonoInternVL(nn.Module):
    """Vision embedding + pixel shuffle + mlp1 -> visual tokens, which join the text tokens in one decoder."""

    def __init__(self, config: MonoInternVLConfig):
        super().__init__()
        c = self.config = config
        self.moe = "auto"                          # back end of the experts: auto, dense, torch, cuda
        self.cuda_graphs, self.compile_decode = True, False                # of a decoding step
        shuffled = c.vision_hidden_size * c.shuffle ** 2
        self.vision_model = nn.ModuleDict({"embeddings": VisionEmbedding(c)})
        self.mlp1 = nn.Sequential(nn.LayerNorm(shuffled), nn.Linear(shuffled, c.hidden_size), nn.GELU(),
                                  nn.Linear(c.hidden_size, c.hidden_size))
        self.language_model = InternLM2(c)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
                # 1/sqrt(fan-in): 0.022 at the width of the 2B model, and right for a tiny one too. Embeddings
                # as large as what layers add to them, patches that stand out from their positions [ours]
                std = 1.0 if isinstance(module, nn.Embedding) else module.weight[0].numel() ** -0.5
                std = 2 * std if isinstance(module, nn.Conv2d) else std
                nn.init.normal_(module.weight, std=std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        """(n_tiles, 3, S, S) -> visual tokens (n_tiles, tokens per tile, D)"""
        return self.mlp1(pixel_shuffle(self.vision_model.embeddings(pixel_values), self.config.shuffle))

    def embed(self, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
        """(B, T) int64, (n_tiles, 3, S, S) -> (B, T, D): visual tokens at <IMG_CONTEXT>, in order."""
        x = self.language_model.model.tok_embeddings(input_ids)
        if pixel_values is None:
            return x
        visual_tokens = self.embed_images(pixel_values).flatten(0, 1)      # (n_tiles · tokens per tile, D)
        rows = (input_ids == self.config.img_context_token_id).flatten().nonzero().squeeze(1)
        if len(rows) != len(visual_tokens):
            raise InputError(f"{len(rows)} <IMG_CONTEXT> tokens for {len(pixel_values)} tiles, which need "
                             f"{len(visual_tokens)} ({len(visual_tokens) // max(1, len(pixel_values))} each)")
        return x.flatten(0, 1).index_copy(0, rows, visual_tokens.to(x.dtype)).view_as(x)

    def route(self, input_ids: Tensor, attention_mask: Tensor | None,
              has_images: bool) -> Routing | None:
        """None without images and without a mask: then the model is the plain LLM, at its speed."""
        if not has_images and attention_mask is None:
            return None
        visual = input_ids == (self.config.img_context_token_id if has_images else -1)
        return Routing(visual, attention_mask, self.moe)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None,
                attention_mask: Tensor | None = None, labels: Tensor | None = None,
                document_ids: Tensor | None = None, reduction: str = "mean"):
        """(logits, loss).

        input_ids (B, T) int64; pixel_values (n_tiles, 3, S, S), the tiles of all rows in reading order;
        attention_mask (B, T), 1 = real token; labels (B, T) int64, -100 = ignored, shifted inside.
        Without labels: logits (B, T, V), None. With labels: None, the mean cross-entropy over the supervised
        tokens; the head runs on their positions only (V is 92553: logits of a long prompt fill gigabytes).
        reduction "none": their losses one by one, (supervised,), in reading order.
        document_ids (B, T) int64: several samples are packed in a row, one after the other, as 1, 2, ...; 0 =
        pad. A sample's logits, loss and positions are as if it were alone.
        Raises InputError for inputs that do not fit: shapes, ids, tiles per <IMG_CONTEXT>, context length.
        """
        self.check_inputs(input_ids, pixel_values, attention_mask, labels, document_ids)
        routing = self.route(input_ids, attention_mask, pixel_values is not None)
        hidden = self.language_model(self.embed(input_ids, pixel_values), routing, attention_mask,
                                     document_ids=document_ids)
        if labels is None:
            return self.language_model.output(hidden), None
        supervised = labels[:, 1:] != -100                                 # position t predicts token t + 1
        if document_ids is not None:
            supervised &= document_ids[:, 1:] == document_ids[:, :-1]      # the last of one predicts nothing
        logits = self.language_model.output(hidden[:, :-1][supervised])    # (supervised, V)
        if not len(logits) and reduction == "mean":
            return None, hidden.sum() * 0  # a mean over nothing, gradient zero
        return None, F.cross_entropy(logits.float(), labels[:, 1:][supervised], reduction=reduction)

    def check_inputs(self, input_ids, pixel_values, attention_mask, labels=None, document_ids=None):
        c, shape = self.config, tuple(input_ids.shape)
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
            raise InputError(f"input_ids is {shape} {input_ids.dtype}, expected (B, T) int64 with B, T > 0")
        for name, t in (("attention_mask", attention_mask), ("labels", labels),
                        ("document_ids", document_ids)):
            if t is not None and t.shape != input_ids.shape:
                raise InputError(f"{name} is {tuple(t.shape)}, input_ids is {shape}")
        low, high = input_ids.aminmax()
        if low < 0 or high >= c.vocab_size:
            raise InputError(f"input_ids reach from {low} to {high}, the model knows {c.vocab_size} tokens; "
                             "is this its tokenizer?")
        if labels is not None and (labels.dtype != torch.int64 or labels.max() >= c.vocab_size):
            raise InputError(f"labels is {labels.dtype} and reaches {labels.max()}, expected int64 token ids "
                             f"below {c.vocab_size}, or -100")
        if pixel_values is None:
            if c.img_context_token_id is not None and (input_ids == c.img_context_token_id).any():
                raise InputError("input_ids holds <IMG_CONTEXT> tokens, but there are no pixel_values")
            return
        if c.img_context_token_id is None:
            raise InputError("this model does not know its <IMG_CONTEXT> token: no tokenizer files beside "
                             "the weights name it; set model.config.img_context_token_id or drop the image")
        side = c.patch_size * c.shuffle
        if (pixel_values.ndim != 4 or not pixel_values.is_floating_point()
                or pixel_values.shape[1] != c.num_channels or any(s % side for s in pixel_values.shape[2:])):
            raise InputError(f"pixel_values is {tuple(pixel_values.shape)} {pixel_values.dtype}, expected "
                             f"(n_tiles, {c.num_channels}, S, S) of floats with S a multiple of {side}")

    # ------------------------------------------------------------ generation

    @torch.inference_mode()
    def prefill(self, input_ids: Tensor, pixel_values: Tensor | None, attention_mask: Tensor | None,
                kv_cache: KVCache, chunk: int) -> Tensor:
        """Reads the prompt into the cache, `chunk` tokens at a time; what the cache holds already is not read
        again. Returns the logits (B, V) of the next token: the head runs on the last position only."""
        T, image_token = input_ids.shape[1], self.config.img_context_token_id
        past, tiles = kv_cache.common_prefix(input_ids, pixel_values, attention_mask)
        kv_cache.truncate(past)
        kv_cache.reused = past
        x = self.embed(input_ids[:, past:], None if pixel_values is None else pixel_values[tiles:])
        lengths = T if attention_mask is None else attention_mask.sum(1)
        for start in range(past, T, chunk):
            part = slice(start, start + chunk)
            mask = None if attention_mask is None else attention_mask[:, part]
            has_images = pixel_values is not None and bool((input_ids[:, part] == image_token).any())
            routing = self.route(input_ids[:, part], mask, has_images)
            new = x[:, start - past:start - past + chunk]
            hidden = self.language_model(new, routing, mask, kv_cache, lengths)
        if len(input_ids) == 1:
            # a copy: the caller may fill the same tensor with the next picture
            kv_cache.ids = input_ids[0].tolist()
            kv_cache.tiles = None if pixel_values is None else pixel_values.clone()
        return self.language_model.output(hidden[:, -1]).float()

    def decode_step(self, token: Tensor, kv_cache: KVCache) -> Tensor:
        """token (B, 1) -> logits (B, V) of the next. A generated token is text: no routing. Its column and
        position are read on the device, shapes are those of `visible` columns: a CUDA graph can replay it."""
        lm = self.language_model
        kv_cache.real[:len(token)].index_fill_(1, kv_cache.column, True)
        real = kv_cache.real[:len(token), :kv_cache.visible]               # (B, visible)
        lengths, x = real.sum(1), lm.model.tok_embeddings(token)
        mask = real.to(x.dtype).log()[:, None, None]                       # 0 or -inf, once for all layers
        x = lm.run_layers(x, lengths[:, None] - 1, lengths, mask, None, kv_cache)
        return lm.output(x[:, -1]).float()

    @torch.inference_mode()
    def decode(self, token: Tensor, kv_cache: KVCache) -> Tensor:
        """token (B,) on the device -> logits (B, V) of the next, without a device→host sync. On a GPU a step
        is a CUDA graph: one launch in place of hundreds. The next call may overwrite these logits."""
        rows, visible = len(token), (kv_cache.length // kv_cache.block + 1) * kv_cache.block
        kv_cache.token[:rows, 0] = token
        kv_cache.column.fill_(kv_cache.length)
        kv_cache.write, kv_cache.visible = kv_cache.column, visible
        step = compiled(MonoInternVL.decode_step) if self.compile_decode else MonoInternVL.decode_step
        inputs = self, kv_cache.token[:rows], kv_cache
        if self.cuda_graphs and kv_cache.pool is not None:
            if (step, rows, visible) not in kv_cache.graphs:
                kv_cache.graphs[step, rows, visible] = capture(step, inputs, kv_cache.pool)
            graph, logits = kv_cache.graphs[step, rows, visible]
            graph.replay()
        else:
            logits = step(*inputs)
        kv_cache.length += 1
        return logits

    @torch.no_grad()                               # not inference_mode: what is yielded may be trained on
    def generate(self, input_ids: Tensor, pixel_values: Tensor | None = None,
                 attention_mask: Tensor | None = None, max_new_tokens: int = 256, temperature: float = 0.0,
                 top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
                 eos_token_id: int | Sequence[int] | None = None, seed: int | Sequence[int] | None = None,
                 prefill_chunk: int | None = None, kv_cache: KVCache | None = None) -> Iterator[Tensor]:
        """Yields (B,) int64 on the CPU as decoded, until every row has ended or the context is full.

        temperature 0 is greedy. eos_token_id: the token, or the tokens, that end a row; from then on the row
        yields it, or the first of them (None: no row ends).
        attention_mask (B, T): pad on the left, all rows end in the same column. The repetition penalty
        counts generated tokens only [repo: it sees no prompt ids]. seed: each row draws from a generator of
        its own, and the global one is left alone; a number s gives row i the seed s + i, a list has one for
        each row. prefill_chunk: prompt tokens read at a time, to bound memory. kv_cache: of earlier calls;
        its memory is used again, and if this prompt of one row begins with what it holds (a conversation
        that goes on), only the rest is read. That changes no answer, but for 16-bit roundings.
        <IMG_CONTEXT> is never generated: without a tile it means nothing.
        """
        self.check_inputs(input_ids, pixel_values, attention_mask)
        B, T = input_ids.shape
        chunk = T if prefill_chunk is None else prefill_chunk
        ends = eos_token_id if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
        ends = [] if eos_token_id is None else ends
        for name, value, fits, expected in (
                ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
                ("temperature", temperature, 0 <= temperature < math.inf, "at least 0"),
                ("top_k", top_k, top_k is None or top_k >= 1, "None or at least 1"),
                ("top_p", top_p, top_p is None or 0 < top_p <= 1, "None or above 0 and at most 1"),
                ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "above 0"),
                ("eos_token_id", eos_token_id, all(type(e) is int for e in ends), "None, an id or ids"),
                ("seed", seed, seed is None or isinstance(seed, int) or len(seed) == B,
                 "None, a number, or one for each row"),
                ("prefill_chunk", prefill_chunk, chunk >= 1, "None or at least 1")):
            if not fits:
                raise InputError(f"{name} is {value}, expected {expected}")
        if attention_mask is not None and not attention_mask[:, -1].all():
            raise InputError("a row of attention_mask ends in padding; generate needs left-padded rows")
        if T >= self.config.context_length:
            raise InputError(f"the prompt of {T} tokens fills the context of {self.config.context_length}; "
                             "shorten it or use fewer tiles")
        max_new_tokens = min(max_new_tokens, self.config.context_length - T)
        if attention_mask is not None and attention_mask.all():
            attention_mask = None                  # no pads: attention may skip its upper half
        cache, device = KVCache(self.config) if kv_cache is None else kv_cache, input_ids.device
        cache.reserve(B, T + max_new_tokens, self.language_model.output.weight.dtype, device)
        logits = self.prefill(input_ids, pixel_values, attention_mask, cache, chunk)
        forbidden = [] if self.config.img_context_token_id is None else [self.config.img_context_token_id]
        forbidden = torch.tensor(forbidden, dtype=torch.int64, device=device)
        seeds = [seed + row for row in range(B)] if isinstance(seed, int) else seed or []
        generators = [torch.Generator(device).manual_seed(s) for s in seeds] or [None] * B
        seen = torch.zeros(B, self.config.vocab_size, dtype=torch.bool, device=device)
        yielded, running, ended = [0] * B, list(range(B)), set()           # running: the cache's rows
        for step in range(max_new_tokens):
            token = sample_token(logits.index_fill(1, forbidden, -torch.inf), seen, temperature, top_k, top_p,
                                 repetition_penalty, [generators[row] for row in running])
            for row, t in zip(running, token.tolist(), strict=True):       # the one sync of a step
                yielded[row] = ends[0] if row in ended else t
            yield torch.tensor(yielded)
            ended |= {row for row in running if yielded[row] in ends}
            yielded = [ends[0] if row in ended else t for row, t in enumerate(yielded)]
            keep = [i for i, row in enumerate(running) if row not in ended]
            if step + 1 == max_new_tokens or not keep:
                return
            # Rows that ended leave the batch; where each size needs a graph of its own, only by halves.
            any_size = cache.pool is None or not self.cuda_graphs
            if len(keep) < len(running) and (any_size or len(keep) <= len(running) // 2):
                order = cache.keep(keep)
                running, token, seen = [running[i] for i in order], token[order], seen[order]
            if B == 1:
                cache.ids.append(yielded[0])
            seen.scatter_(1, token[:, None], True)
            logits = self.decode(token, cache)

    # ------------------------------------------------------------ the official folder format

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = torch.float32,
                        device="cpu") -> "MonoInternVL":
        """Loads an official Hugging Face folder or one of ours: config.json + model*.safetensors. dtype None:
        as the files have it.

        Raises InputError that names the file, field or tensor that is missing, surplus, misshapen, damaged.
        """
        config = MonoInternVLConfig.from_json(Path(folder) / "config.json")
        if config.img_context_token_id is None:    # official configs leave it to the tokenizer's files
            config = replace(config, img_context_token_id=_img_context_token_id(Path(folder)))
        with torch.device("meta"):
            model = cls(config)
        model._assign(_read_tensors(folder, dtype, device), folder)
        return model

    @classmethod
    def from_llm(cls, folder: str | Path, config: MonoInternVLConfig | None = None,
                 dtype: torch.dtype | None = torch.float32, device="cpu") -> "MonoInternVL":
        """An InternLM2 or Llama-layout folder -> a model yet to learn to see: visual experts copy the text
        experts [v1], the vision embedding and mlp1 are random. config (default: 1.5 with the LLM's sizes) may
        have a larger vocabulary; the new rows (image tokens) start as the mean of the old ones [repo].
        dtype None: as the files have it. Nothing is initialised that the files then replace.
        """
        sizes = MonoInternVLConfig.from_llm(folder, attn_experts="qkvo")
        config = config or sizes
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling"):
            if getattr(config, name) != getattr(sizes, name):
                raise InputError(f"{folder} has {name} = {getattr(sizes, name)}, "
                                 f"the config {getattr(config, name)}")
        tensors = _read_tensors(folder, dtype, device)
        if "model.embed_tokens.weight" in tensors:
            tensors = _from_llama(tensors, config, folder)
        tensors = {f"language_model.{name}": t for name, t in tensors.items()}
        for name in ("language_model.model.tok_embeddings.weight", "language_model.output.weight"):
            old = tensors.get(name)
            if old is not None and len(old) < config.vocab_size:
                mean = old.float().mean(0, keepdim=True).to(old.dtype)
                tensors[name] = torch.cat([old, mean.expand(config.vocab_size - len(old), -1)])
        with torch.device("meta"):
            model = cls(config)
        tensors |= {name: tensors[text].clone() for name in model.state_dict() if "_ve." in name
                    if (text := name.replace("_ve.", ".")) in tensors}
        # a model with next to no LLM, for its random vision embedding and mlp1
        vision = cls(replace(config, num_hidden_layers=1, intermediate_size=1, attn_experts="",
                             vocab_size=1 + (config.img_context_token_id or 0)))
        tensors |= {name: t.to(device, dtype) for name, t in vision.state_dict().items()
                    if not name.startswith("language_model")}
        model._assign(tensors, folder)
        return model

    @torch.no_grad()
    def copy_text_experts(self) -> "MonoInternVL":
        """Every visual expert becomes a copy of its text expert: vision starts from what the LLM knows."""
        for name, weight in self.named_parameters():
            if "_ve." in name:
                weight.copy_(self.get_parameter(name.replace("_ve.", ".")))
        return self

    def _assign(self, tensors: dict[str, Tensor], source):
        expected = self.state_dict()
        for name in sorted(expected.keys() | tensors.keys()):
            if name not in tensors:
                raise InputError(f"{source}: tensor {name} is missing")
            if name not in expected:
                raise InputError(f"{source}: tensor {name} has no place in the model of this config")
            if tensors[name].shape != expected[name].shape:
                raise InputError(f"{source}: tensor {name} is {tuple(tensors[name].shape)}, "
                                 f"the config says {tuple(expected[name].shape)}")
        self.load_state_dict(tensors, assign=True)

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = 5_000_000_000):
        """Writes config.json and model.safetensors; a larger model as numbered shards with an index.

        All files are written aside, then renamed: a save that fails leaves an earlier checkpoint as it was.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        shards, size = [{}], 0
        for name, t in self.state_dict().items():
            if shards[-1] and size + t.nbytes > max_shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = t.contiguous()
            size += t.nbytes
        n = len(shards)
        files = {f"model-{i:05}-of-{n:05}.safetensors" if n > 1 else "model.safetensors": shard
                 for i, shard in enumerate(shards, 1)}
        if n > 1:
            index = {"metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())},
                     "weight_map": {key: name for name, shard in files.items() for key in shard}}
            files["model.safetensors.index.json"] = json.dumps(index, indent=2)
        files["config.json"] = self.config.to_json()
        aside = {name: folder / f"{name}.tmp" for name in files}
        try:
            for name, content in files.items():
                if isinstance(content, str):
                    aside[name].write_text(content, encoding="utf-8")
                else:
                    save_file(content, aside[name], metadata={"format": "pt"})
            for name in files:
                os.replace(aside[name], folder / name)
        finally:
            for path in aside.values():
                path.unlink(missing_ok=True)
        for stale in (folder / "model.safetensors", folder / "model.safetensors.index.json",
                      *folder.glob("model-?????-of-?????.safetensors")):   # of a save with other shards
            if stale.name not in files:
                stale.unlink(missing_ok=True)

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all, and those that a text or a visual token passes through, embeddings included."""
        sizes = {name: p.numel() for name, p in self.named_parameters()}
        text_experts = {name.replace("_ve.", ".") for name in sizes if "_ve." in name}
        not_for_text = [name for name in sizes if "_ve." in name or not name.startswith("language_model")]
        total = sum(sizes.values())
        return {"total": total, "text": total - sum(sizes[name] for name in not_for_text),
                "visual": total - sum(sizes[name] for name in text_experts)}
