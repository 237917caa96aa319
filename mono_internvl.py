"""Mono-InternVL and Mono-InternVL-1.5: one decoder-only transformer that reads image patches and text.

Read top to bottom: configuration; vision embedding; routing and the modality mixture-of-experts; norms and
rotary positions; positions and masks; attention, decoder layer, language model; the whole model. Generation
is in generate.py, files are in checkpoint.py, the CUDA kernel is in moe_kernel.py and moe_kernel.cu.

Sources: [v1] arXiv 2410.08202, [v1.5] arXiv 2507.12566, [repo] the official code (OpenGVLab/Mono-InternVL),
[ours] our choice where those are silent. Shapes: B rows, T tokens, D hidden size, H heads, KV key/value
heads, hd head size, V vocabulary, S tile side in pixels, Dv channels of a patch, N = B·T tokens of the batch
laid end to end, K -> M widths of a linear. Names with _ve belong to the visual expert [repo].
"""
import contextlib
import functools
import inspect
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint as recomputed

import checkpoint
import moe_kernel
from common import InputError, check_fields
from generate import generate, generate_naively

try:
    from torch.nn.attention.varlen import varlen_attn
    VARLEN = {*inspect.signature(varlen_attn).parameters}  # without "window_size" before torch 2.11
except ImportError:                                        # before torch 2.10
    VARLEN = {}

# ---------------------------------------------------------------- configuration

@dataclass
class MonoInternVLConfig:
    """Every size of the model. The defaults are those of Mono-InternVL-2B."""
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
    img_context_token_id: int | None = None       # <IMG_CONTEXT>, the placeholder of one visual token

    def __post_init__(self):
        self.validate()

    def validate(self):
        """Raises InputError that names the field which does not fit."""
        def require(fits, name, expected):
            if not fits:
                raise InputError(f"config field {name} is {getattr(self, name)!r}, expected {expected}")

        check_fields(self)
        for name, value in vars(self).items():
            least = 0 if name.endswith("token_id") else 1e-12
            most = 1000 if name == "num_hidden_layers" else 2 ** 31 if type(value) is int else 1e12
            require(type(value) not in (int, float) or least <= value <= most, name,
                    f"a positive number of at most {most:g}")
        require(self.attn_experts in ("", "qkv", "qkvo"), "attn_experts", "'', 'qkv' or 'qkvo'")
        scaling = {"type": "linear", "factor": 1.0} if self.rope_scaling is None else self.rope_scaling
        require(scaling.get("type") in ("linear", "dynamic") and type(scaling.get("factor")) in (int, float)
                and 1 <= scaling["factor"] <= 1e6, "rope_scaling",
                'null or {"type": "linear" or "dynamic", "factor": a number from 1 to 1e6}')
        for whole, part in (("hidden_size", "num_attention_heads"),
                            ("num_attention_heads", "num_key_value_heads"), ("image_size", "patch_size")):
            require(getattr(self, whole) % getattr(self, part) == 0, whole,
                    f"a multiple of {part} = {getattr(self, part)}")
        require(self.head_dim % 2 == 0 and self.head_dim >= 4, "hidden_size",
                f"heads of an even size of at least 4 for rotary positions, not {self.head_dim}")
        require(self.min_dynamic_patch <= self.max_dynamic_patch, "min_dynamic_patch",
                f"at most max_dynamic_patch = {self.max_dynamic_patch}")
        require((self.img_context_token_id or 0) < self.vocab_size, "img_context_token_id",
                f"less than vocab_size = {self.vocab_size}")
        patches = self.image_size // self.patch_size
        require((1 / self.downsample_ratio) % 1 == 0 and patches % self.shuffle == 0, "downsample_ratio",
                f"1/n where n divides the {patches} patches on the side of a tile")

    @classmethod
    def mono_internvl_2b(cls, **changes) -> "MonoInternVLConfig":
        return cls(**{"rope_scaling": {"type": "dynamic", "factor": 2.0}, **changes})

    @classmethod
    def mono_internvl_1_5_2b(cls, **changes) -> "MonoInternVLConfig":
        return cls.mono_internvl_2b(**{"attn_experts": "qkvo", **changes})   # "qkvo": [ours], see README

    @classmethod
    def from_json(cls, path: str | Path) -> "MonoInternVLConfig":
        """Reads an official (or our) config.json. Raises InputError that names a field that does not fit."""
        return checkpoint.read_config(path, cls)

    @classmethod
    def from_llm(cls, folder: str | Path, **changes) -> "MonoInternVLConfig":
        """The sizes of an InternLM2 or Llama-layout folder; changes: fields of ours, as in cls(...)."""
        return checkpoint.read_llm_config(Path(folder) / "config.json", cls, **changes)

    def to_json(self) -> str:
        """The text of an official config.json."""
        return checkpoint.config_json(asdict(self))

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


# ---------------------------------------------------------------- vision embedding: pixels to visual tokens

class VisionEmbedding(nn.Module):
    """Patches + learned 2-D positions: all that is left of a vision tower, no transformer layer [v1, 3.1]."""

    def __init__(self, c: MonoInternVLConfig):
        super().__init__()
        self.grid, width = c.image_size // c.patch_size, c.vision_hidden_size
        # The official model embeds a class token (position slot 0) and drops it at once. We do not compute
        # it; the parameter stays for the file format.
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

    expert       (N,) uint8: 0 text, 1 visual, 2 pad
    permutation  (N,) int64: token indices sorted by expert, each expert's in reading order
    counts       (2,) int64: how many text and how many visual tokens
    All are on the device of the mask and are made without a device→host sync. Pads go to no expert: their
    outputs are zero and cost nothing.
    """

    def __init__(self, visual: Tensor, attention_mask: Tensor | None = None, backend: str = "auto"):
        """visual (B, T) bool: True at <IMG_CONTEXT>; attention_mask (B, T): 1 = real token, 0 = pad. backend:
        "dense", the naive reference; "torch", gather and scatter; "cuda", moe_kernel.cu; or "auto"."""
        if backend not in ("auto", "dense", "torch", "cuda"):
            raise InputError(f"unknown MoE back end {backend!r}; choose auto, dense, torch or cuda")
        # On a GPU without gradients, MonoInternVL.route has already replaced "auto" by the back end that was
        # measured to be faster. Everywhere else, "auto" means "torch".
        if backend == "auto" or backend == "cuda" and moe_kernel.library(visual.device) is None:
            backend = "torch"
        self.backend = backend
        self.expert = visual.reshape(-1).to(torch.uint8)
        if attention_mask is not None:
            self.expert = self.expert.masked_fill(attention_mask.reshape(-1) == 0, 2)
        if backend == "cuda":
            self.permutation, self.counts = moe_kernel.route(self.expert)
        else:
            self.permutation = self.expert.argsort(stable=True)
            self.counts = torch.stack([(self.expert == 0).sum(), (self.expert == 1).sum()])

    @functools.cached_property
    def token_indices(self) -> tuple[Tensor, Tensor]:
        """Indices of the text tokens and of the visual tokens. The host must know how many there are. Unless
        split has been called with the numbers, it asks the GPU: one sync per forward pass."""
        return self.split(*self.counts.tolist())

    def split(self, text: int, visual: int) -> tuple[Tensor, Tensor]:
        self.token_indices = self.permutation[:text], self.permutation[text:text + visual]
        return self.token_indices


def routed(x: Tensor, text_expert, visual_expert, routing: Routing | None, kernel=None) -> Tensor:
    """(..., D) -> (..., D'): each token through the expert of its modality. Pads become zero.

    text_expert, visual_expert: functions of (n, D) tokens. routing None: all tokens are text. kernel: what
    the back end "cuda" calls with x, permutation and counts.
    """
    if routing is None:
        return text_expert(x)
    if routing.backend == "cuda" and kernel is not None:
        return kernel(x, routing.permutation, routing.counts)
    flat = x.reshape(-1, x.shape[-1])                                      # (N, D)
    if routing.backend == "dense":
        # The naive reference: both experts on every token, then choose. torch.where, not a product with the
        # mask as in the official code: there an overflow in the unchosen expert (inf · 0) becomes NaN.
        expert = routing.expert[:, None]
        y = torch.where(expert == 1, visual_expert(flat), text_expert(flat)).masked_fill(expert == 2, 0)
    else:
        # Gather each expert's tokens, run the expert on them, scatter the results.
        text_indices, visual_indices = routing.token_indices
        text = text_expert(flat.index_select(0, text_indices))
        visual = visual_expert(flat.index_select(0, visual_indices))
        has_pads = len(text) + len(visual) < len(flat)                     # they stay zero
        y = (text.new_zeros if has_pads else text.new_empty)(len(flat), text.shape[-1])
        y.index_copy_(0, text_indices, text).index_copy_(0, visual_indices, visual)
    return y.view(*x.shape[:-1], y.shape[-1])


def mmoe_linear(x: Tensor, w_text: Tensor, w_visual: Tensor, routing: Routing | None) -> Tensor:
    """Routed linear, (..., K) -> (..., M); weights (M, K). The attention experts of 1.5 [v1.5]."""
    def kernel(x, permutation, counts):
        return moe_kernel.linear(x, w_text, w_visual, permutation, counts)

    return routed(x, lambda t: F.linear(t, w_text), lambda t: F.linear(t, w_visual), routing, kernel)


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
    def kernel(x, permutation, counts):
        text, visual = ((e.w1.weight, e.w3.weight, e.w2.weight) for e in (experts_text, experts_visual))
        return moe_kernel.swiglu(x, text, visual, permutation, counts)

    return routed(x, experts_text, experts_visual, routing, kernel)


# ---------------------------------------------------------------- norms and rotary positions

class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)      # in float32, cast, then × weight


def rope_tables(c: MonoInternVLConfig, positions: Tensor, lengths: Tensor | int, dtype: torch.dtype):
    """cos and sin, each (B, 1, T, hd), for positions (B, T). lengths: how many tokens the sequence of each
    token has, as one number, (B,) per row, or (B, T) per token of packed rows.

    rope_scaling "linear" divides positions by the factor. "dynamic" (NTK) raises the base once a sequence is
    longer than the trained positions. It depends on the sequence's own length, not on the batch.
    """
    kind, factor = (c.rope_scaling["type"], c.rope_scaling["factor"]) if c.rope_scaling else (None, 1.0)
    if isinstance(lengths, int):                                           # a copy would be a sync
        lengths = torch.full((1,), lengths, device=positions.device)
    lengths = lengths.float()[..., None] if lengths.ndim == 2 else lengths.float().view(-1, 1, 1)
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


# ---------------------------------------------------------------- positions and masks

def document_positions(document_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(positions, starts), (B, T) each, of packed samples: a token's place in its sample, and whether that is
    the first. A sample is a run of equal ids. So pads at the end count as one, which no other sample sees."""
    starts = F.pad(document_ids.diff(dim=1) != 0, (1, 0), value=True)
    columns = torch.arange(starts.shape[1], device=starts.device)
    return columns - (columns * starts).cummax(1).values, starts


def varlen_serves(x: Tensor, head_dim: int) -> bool:
    """Can varlen_attn compute the attention of embeddings x?"""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return (x.is_cuda and torch.cuda.get_device_capability(x.device) >= (8, 0) and "window_size" in VARLEN
            and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0)


def positions_and_mask(T: int, past: int, real: Tensor | None, document_ids: Tensor | None, device,
                       sizes: dict | None, varlen: bool):
    """(positions (1 or B, T), lengths, mask) of T new tokens after `past` cached ones.

    real (B, past + T) bool: False at pads; None: there are none. document_ids (B, T): several samples are
    packed in a row. sizes: see MonoInternVL.check_inputs. varlen: see varlen_serves. lengths: as rope_tables
    takes them. mask: what scaled_dot_product_attention takes, broadcast over heads; None is plain causal
    attention, which needs no tensor; a pair is (cu_seqlens, longest sample) for varlen_attn.
    """
    columns = torch.arange(past + T, device=device)
    if document_ids is not None:
        # Samples 1 1 2 2 in a row.      x . . .    Each sees itself only and counts from 0.
        #                                x x . .
        #                                . . x .
        #                                . . x x
        positions, starts = document_positions(document_ids)
        runs = starts.cumsum(1) - 1
        lengths = torch.zeros_like(runs).scatter_add_(1, runs, torch.ones_like(runs)).gather(1, runs)
        if varlen and sizes:                       # where each begins if the rows lie end to end; the end
            begins = torch.nonzero_static(starts.flatten(), size=sizes["samples"]).squeeze(1)
            return positions, lengths, (F.pad(begins, (0, 1), value=starts.numel()).int(), sizes["longest"])
        mask = (runs[:, :, None] == runs[:, None]) & (columns <= columns[:, None])
        return positions, lengths, mask[:, None]                           # mask (B, 1, T, T)
    right_padded = real is not None and not past and sizes and not sizes["gaps"]
    if real is not None and not right_padded:
        # One pad, then two tokens.      x . .      Nobody sees a pad, except the pad itself: a softmax over
        #                                . x .      nothing would be NaN. Each row counts its own tokens.
        #                                . x x
        positions = (real.cumsum(1) - 1).clamp(min=0)[:, past:]
        mask = (columns <= columns[past:, None]) & real[:, None] | (columns == columns[past:, None])
        return positions, real.sum(1), mask[:, None]                       # mask (B, 1, T, past + T)
    if past and T > 1:
        # Two cached tokens, three new.  x x x . .  Causal, aligned at the lower right corner.
        #                                x x x x .
        #                                x x x x x
        return columns[None, past:], past + T, causal_lower_right(T, past + T)
    # Three tokens, nothing cached.      x . .      Plain causal attention. One new token sees all columns.
    #                                    x x .      Pads at the end change nothing for the tokens before them.
    #                                    x x x
    return columns[None, past:], real.sum(1) if right_padded else past + T, None


# ---------------------------------------------------------------- the decoder: InternLM2 with visual experts

def attend_in_two_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ / √hd) v under a mask (bool, or 0 and -inf); q (B, KV, n, hd), k, v (B, KV, columns, hd).
    Scores stay float32: rounded to bfloat16, they would make the result six times less exact."""
    float32 = {"out_dtype": torch.float32} if q.dtype.itemsize == 2 else {}
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT, **float32).unflatten(0, q.shape[:2])
    scores = scores * q.shape[-1] ** -0.5                                  # (B, KV, n, columns)
    if mask is not None:
        scores = scores.where(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).to(v.dtype) @ v


def attend(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:
    """softmax(q kᵀ / √hd) v under a mask of positions_and_mask, (B, T, H · hd). q (B, KV, group, T, hd): the
    query heads of a group share a key/value head; k, v (B, KV, columns, hd)."""
    B, _, group, T, _ = q.shape
    q, k, packed = q.to(v.dtype), k.to(v.dtype), isinstance(mask, tuple)   # RoPE is float32 under autocast
    if T == 1 and not packed:
        # The query heads of a group see the same keys, like several tokens of one head. So no key is copied.
        # A GPU's fused kernels read the columns of a head one after the other: 3584 columns take an H200 135
        # µs, and two products 23 µs. (bmm with out_dtype has no gradients.) On a CPU, the fused kernel wins.
        products = q.is_cuda and not torch.is_grad_enabled()
        kernel = attend_in_two_products if products else F.scaled_dot_product_attention
        return kernel(q.squeeze(3), k, v, mask).reshape(B, 1, -1)
    q = q.flatten(1, 2)                            # (B, H, T, hd)
    # Only flash attention reads shared keys and values without copies. It takes 16-bit numbers and no mask.
    # float16 is left out: it is mostly used on older GPUs, which have no flash attention.
    gqa = "enable_gqa" in VARLEN if packed else mask is None and q.is_cuda and q.dtype == torch.bfloat16
    options = {"enable_gqa": True} if gqa else {}
    k, v = (k, v) if gqa else (t.repeat_interleave(group, 1) for t in (k, v))
    if packed:
        q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))     # (B · T, heads, hd)
        begins, longest = mask
        y = varlen_attn(q, k, v, begins, begins, longest, longest, window_size=(-1, 0), **options)    # causal
        return y.reshape(B, T, -1)
    # Any fused kernel except cuDNN's. That one, the first choice on Hopper since torch 2.11, makes a plan for
    # every new length of a prompt, and its gradients under a mask can be NaN (pytorch issue 196678).
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    # In 16 bits, a CPU's fused kernel is slow with gradients: for 35 tokens it takes 2.2 times as long.
    short = T <= 128 and q.dtype.itemsize == 2 and torch.is_grad_enabled() and not q.is_cuda
    with sdpa_kernel(kernels[-1:] if short else kernels) if q.is_cuda or short else contextlib.nullcontext():
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, **options)
    return y.transpose(1, 2).reshape(B, T, -1)


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
        # The rows of wqkv are grouped by key/value head: its query heads, its key, its value [repo].
        group = c.num_attention_heads // c.num_key_value_heads
        qkv = qkv.view(B, T, c.num_key_value_heads, group + 2, c.head_dim).permute(0, 2, 3, 1, 4)
        qk = apply_rope(qkv[:, :, :-1].flatten(1, 2), *rope).unflatten(1, (-1, group + 1))
        q, k, v = qk[:, :, :-1], qk[:, :, -1], qkv[:, :, -1]   # (B, KV, group, T, hd), twice (B, KV, T, hd)
        if kv_cache is not None:
            k, v = kv_cache.append(self.layer, k, v)           # (B, KV, visible, hd)
        y = attend(q, k, v, mask)                              # (B, T, D)
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
        self.feed_forward_ve = FeedForward(c)     # the visual expert, which starts as a copy of it

    def forward(self, x, rope, mask, routing, kv_cache=None):
        x = x + self.attention(self.attention_norm(x), rope, mask, routing, kv_cache)
        return x + mmoe_swiglu(self.ffn_norm(x), self.feed_forward, self.feed_forward_ve, routing)


class InternLM2(nn.Module):
    """The language model, whose layers hold the visual experts."""

    def __init__(self, c: MonoInternVLConfig):
        super().__init__()
        self.c = c
        self.model = nn.ModuleDict({
            "tok_embeddings": nn.Embedding(c.vocab_size, c.hidden_size),
            "layers": nn.ModuleList(DecoderLayer(c, i) for i in range(c.num_hidden_layers)),
            "norm": RMSNorm(c.hidden_size, c.rms_norm_eps)})
        self.output = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.recompute = False        # in training: keep only the input of each layer and run the layer twice

    def forward(self, x, routing=None, attention_mask=None, kv_cache=None, lengths=None,
                document_ids=None, sizes=None) -> Tensor:
        """Embeddings x (B, T, D) -> hidden states (B, T, D) after the final norm, before the head.

        attention_mask (B, T): 1 = real, 0 = pad. kv_cache: x continues the tokens that it holds, and is added
        to them. lengths: for dynamic RoPE, the tokens of a row when a prefill in chunks is complete (default:
        those until now). Cached keys are not rotated again when dynamic RoPE changes its base [repo].
        document_ids (B, T): see positions_and_mask; not together with a cache. sizes: see
        MonoInternVL.check_inputs.
        """
        B, T, _ = x.shape
        past, real = 0, None if attention_mask is None else attention_mask.bool()
        if kv_cache is not None:
            past, real = kv_cache.length, kv_cache.extend(B, T, attention_mask)
        positions, own_lengths, mask = positions_and_mask(
            T, past, real, document_ids, x.device, sizes, varlen_serves(x, self.c.head_dim))
        lengths = own_lengths if lengths is None else lengths
        x = self.run_layers(x, positions, lengths, mask, routing, kv_cache)
        if kv_cache is not None:
            kv_cache.length += T
        return x

    def run_layers(self, x, positions, lengths, mask, routing, kv_cache=None) -> Tensor:
        rope = rope_tables(self.c, positions, lengths, x.dtype)
        for layer in self.model.layers:
            if self.recompute and torch.is_grad_enabled():
                x = recomputed(layer, x, rope, mask, routing, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rope, mask, routing, kv_cache)
        return self.model.norm(x)


# ---------------------------------------------------------------- the whole model

def shifted(labels: Tensor, document_ids: Tensor | None) -> Tensor:
    """(B, T): the label that each position predicts, which is the next token's; -100 where there is none."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100)
    if document_ids is not None:                   # a sample does not predict the next one's first token
        targets = targets.masked_fill(document_ids != document_ids.roll(-1, 1), -100)
    return targets


class MonoInternVL(nn.Module):
    """Vision embedding + pixel shuffle + mlp1 -> visual tokens, which join the text tokens in one decoder."""

    generate, generate_naively = generate, generate_naively     # of generate.py
    LOGITS = 2 ** 26                               # most logits at a time in training: 256 MB in float32

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
                # 1/sqrt(fan-in): 0.022 at the width of the 2B model, and right for a tiny one, too.
                # Embeddings get 1, the size of what layers add to them. Patches get twice the std, so that
                # their position embeddings do not drown them [ours].
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
        placeholders = (input_ids == self.config.img_context_token_id).flatten()
        places = torch.nonzero_static(placeholders, size=len(visual_tokens)).squeeze(1)
        return x.flatten(0, 1).index_copy(0, places, visual_tokens.to(x.dtype)).view_as(x)

    def route(self, input_ids: Tensor, attention_mask: Tensor | None, has_images: bool) -> Routing | None:
        """None without images and without a mask: then the model is the plain LLM, at its speed."""
        if not has_images and attention_mask is None:
            return None
        visual, back_end = input_ids == (self.config.img_context_token_id if has_images else -1), self.moe
        if back_end == "auto" and visual.is_cuda and not torch.is_grad_enabled():
            c, wqkv = self.config, self.language_model.model["layers"][0].attention.wqkv
            d, f = c.hidden_size, c.intermediate_size
            products = [("swiglu", d, f), ("w2", f, d)]                    # of a layer: name, K, M
            if "qkv" in c.attn_experts:
                products.append(("linear", d, wqkv.out_features))
            if "qkvo" in c.attn_experts:
                products.append(("linear", d, d))
            back_end = moe_kernel.fastest_back_end(visual.device, wqkv.weight.dtype, visual.numel(), products)
        return Routing(visual, attention_mask, back_end)

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None,
                attention_mask: Tensor | None = None, labels: Tensor | None = None,
                document_ids: Tensor | None = None, reduction: str = "mean", sizes: dict | None = None):
        """(logits, loss).

        input_ids (B, T) int64; pixel_values (n_tiles, 3, S, S), the tiles of all rows in reading order;
        attention_mask (B, T), 1 = real token; labels (B, T) int64, -100 = ignored, shifted inside.
        Without labels: logits (B, T, V), None. With labels: None, the mean cross-entropy over the supervised
        tokens; the head runs on their positions only.
        reduction "none": the loss of each supervised token, (supervised,), in reading order.
        document_ids (B, T) int64: the number 1, 2, ... of the sample that a token belongs to, if a row packs
        several samples; 0 = pad. A sample's logits, loss and positions are as if it were alone.
        sizes: what check_inputs returned for this batch. If it was called with CPU tensors, before they were
        copied to a GPU, nothing here waits for the GPU.
        Raises InputError for inputs that do not fit: shapes, ids, tiles per <IMG_CONTEXT>, context length.
        """
        sizes = sizes or self.check_inputs(input_ids, pixel_values, attention_mask, labels, document_ids)
        length = sizes.get("longest_real", input_ids.shape[1])
        if length > self.config.context_length:
            raise InputError(f"{length} tokens do not fit the context of {self.config.context_length}; "
                             "shorten the text or use fewer tiles")
        routing = self.route(input_ids, attention_mask, pixel_values is not None)
        if routing is not None:
            routing.split(sizes["text"], sizes["visual"])
        hidden = self.language_model(self.embed(input_ids, pixel_values), routing, attention_mask,
                                     document_ids=document_ids, sizes=sizes)
        if labels is None:
            return self.language_model.output(hidden), None
        if not sizes["supervised"] and reduction == "mean":
            return None, hidden.sum() * 0  # a mean over nothing, gradient zero
        targets = shifted(labels, document_ids).flatten()
        places = torch.nonzero_static(targets != -100, size=sizes["supervised"]).squeeze(1)
        losses = self.token_losses(hidden.flatten(0, 1).index_select(0, places), targets[places])
        return None, losses if reduction == "none" else losses.mean()

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(n, D), (n,) -> cross-entropy (n,). The logits of many tokens would fill gigabytes. So they are
        computed in pieces of 256 MB, which the backward pass computes again instead of keeping them."""
        def of_piece(hidden, targets):
            return F.cross_entropy(self.language_model.output(hidden).float(), targets, reduction="none")

        rows = max(1, self.LOGITS // self.config.vocab_size)
        if len(hidden) <= rows:
            return of_piece(hidden, targets)
        return torch.cat([recomputed(of_piece, *piece, use_reentrant=False, preserve_rng_state=False)
                          for piece in zip(hidden.split(rows), targets.split(rows), strict=True)])

    def check_inputs(self, input_ids, pixel_values, attention_mask, labels=None, document_ids=None) -> dict:
        """Raises InputError for inputs that do not fit forward; of pixel_values, only shape and dtype matter.
        Returns numbers that the host needs, with one sync if the tensors are on a GPU: "text" and "visual",
        the tokens of each expert; "gaps", how many tokens directly follow a pad; "supervised", how many
        tokens the loss is a mean over. For packed rows also "samples", where a run of pads counts as one,
        "longest", the most tokens of a sample, and "longest_real", the same without pads."""
        c, shape = self.config, tuple(input_ids.shape)
        if input_ids.ndim != 2 or input_ids.dtype != torch.int64 or not input_ids.numel():
            raise InputError(f"input_ids is {shape} {input_ids.dtype}, expected (B, T) int64 with B, T > 0")
        for name, t in (("attention_mask", attention_mask), ("labels", labels),
                        ("document_ids", document_ids)):
            if t is not None and t.shape != input_ids.shape:
                raise InputError(f"{name} is {tuple(t.shape)}, input_ids is {shape}")
        if labels is not None and labels.dtype != torch.int64:
            raise InputError(f"labels is {labels.dtype}, expected int64 token ids, or -100")
        visual = input_ids == (-1 if c.img_context_token_id is None else c.img_context_token_id)
        real = torch.ones_like(visual) if attention_mask is None else attention_mask.bool()
        low, high = input_ids.aminmax()
        sizes = {"low": low, "high": high, "placeholders": visual.sum(), "text": (real & ~visual).sum(),
                 "visual": (real & visual).sum(), "gaps": (real[:, 1:] > real[:, :-1]).sum()}
        if labels is not None:
            sizes |= {"label": labels.max(), "supervised": (shifted(labels, document_ids) != -100).sum()}
        if document_ids is not None:
            positions, starts = document_positions(document_ids)
            sizes |= {"samples": starts.sum(), "longest": positions.max() + 1,
                      "longest_real": (positions * (document_ids > 0)).max() + 1}
        sizes = dict(zip(sizes, torch.stack([*sizes.values()]).tolist(), strict=True))
        if sizes["low"] < 0 or sizes["high"] >= c.vocab_size:
            raise InputError(f"input_ids reach from {sizes['low']} to {sizes['high']}, the model knows "
                             f"{c.vocab_size} tokens; is this its tokenizer?")
        if sizes.get("label", -100) >= c.vocab_size:
            raise InputError(f"labels reaches {sizes['label']}, expected ids below {c.vocab_size}, or -100")
        if pixel_values is None and sizes["placeholders"]:
            raise InputError("input_ids holds <IMG_CONTEXT> tokens, but there are no pixel_values")
        if pixel_values is None:
            return sizes
        if c.img_context_token_id is None:
            raise InputError("this model does not know its <IMG_CONTEXT> token: no tokenizer files beside "
                             "the weights name it; set model.config.img_context_token_id or drop the image")
        side = c.patch_size * c.shuffle
        if (pixel_values.ndim != 4 or not pixel_values.is_floating_point()
                or pixel_values.shape[1] != c.num_channels or any(s % side for s in pixel_values.shape[2:])):
            raise InputError(f"pixel_values is {tuple(pixel_values.shape)} {pixel_values.dtype}, expected "
                             f"(n_tiles, {c.num_channels}, S, S) of floats with S a multiple of {side}")
        tiles, per_tile = len(pixel_values), pixel_values.shape[2:].numel() // side ** 2
        if sizes["placeholders"] != tiles * per_tile:
            raise InputError(f"{sizes['placeholders']} <IMG_CONTEXT> tokens for {tiles} tiles, which need "
                             f"{tiles * per_tile} ({per_tile} each)")
        return sizes

    # ---- files: the official folder format

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: torch.dtype | None = torch.float32,
                        device="cpu") -> "MonoInternVL":
        """Loads an official Hugging Face folder or one of ours: config.json + model*.safetensors. dtype None:
        as the files have it.

        Raises InputError that names the file, field or tensor that is missing, surplus, misshapen, damaged.
        """
        config = MonoInternVLConfig.from_json(Path(folder) / "config.json")
        if config.img_context_token_id is None:    # official configs leave it to the tokenizer's files
            config = replace(config, img_context_token_id=checkpoint.read_img_context_token_id(folder))
        model = cls._without_memory(config, folder)
        return model._assign(checkpoint.read_tensors(folder, dtype, device), folder)

    @classmethod
    def from_llm(cls, folder: str | Path, config: MonoInternVLConfig | None = None,
                 dtype: torch.dtype | None = torch.float32, device="cpu",
                 num_tokens: int | None = None) -> "MonoInternVL":
        """An InternLM2 or Llama-layout folder -> a model that has yet to learn to see: visual experts copy
        the text experts [v1], the vision embedding and mlp1 are random. config (default: 1.5 with the LLM's
        sizes) may have a larger vocabulary; the new rows (image tokens) start as the mean of the old ones
        [repo]. num_tokens: the size of the LLM's tokenizer. Rows beyond it are padding, and count as new.
        dtype None: as the files have it. Raises InputError like from_pretrained.
        """
        sizes = MonoInternVLConfig.from_llm(folder, attn_experts="qkvo")
        config = config or sizes
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                     "num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling"):
            if getattr(config, name) != getattr(sizes, name):
                raise InputError(f"{folder} has {name} = {getattr(sizes, name)}, "
                                 f"the config {getattr(config, name)}")
        model = cls._without_memory(config, folder)
        tensors = checkpoint.read_llm_tensors(folder, config, sizes.vocab_size, dtype, device, num_tokens)
        tensors |= {name: tensors[text].clone() for name in model.state_dict() if "_ve." in name
                    if (text := name.replace("_ve.", ".")) in tensors}
        # The random vision embedding and mlp1 are taken from a second model, whose LLM is tiny.
        seeing = cls(replace(config, num_hidden_layers=1, intermediate_size=1, attn_experts="",
                             vocab_size=1 + (config.img_context_token_id or 0)))
        tensors |= {name: t.to(device, dtype) for name, t in seeing.state_dict().items()
                    if not name.startswith("language_model")}
        return model._assign(tensors, folder)

    @classmethod
    def _without_memory(cls, config: MonoInternVLConfig, source) -> "MonoInternVL":
        """A model whose parameters have shapes, but no values yet."""
        try:
            with torch.device("meta"):
                return cls(config)
        except RuntimeError as e:                  # a product of sizes overflows
            raise InputError(f"{source}: a model of its config's sizes cannot be built: {e}") from None

    def _assign(self, tensors: dict[str, Tensor], source) -> "MonoInternVL":
        checkpoint.check_tensors(tensors, {name: t.shape for name, t in self.state_dict().items()}, source)
        self.load_state_dict(tensors, assign=True)
        return self

    def save_pretrained(self, folder: str | Path, max_shard_bytes: int = 5_000_000_000):
        """Writes config.json and model.safetensors; a larger model as numbered shards with an index."""
        checkpoint.write_model(folder, self.state_dict(), asdict(self.config), max_shard_bytes)

    @torch.no_grad()
    def copy_text_experts(self) -> "MonoInternVL":
        """Every visual expert becomes a copy of its text expert: vision starts from what the LLM knows."""
        for name, weight in self.named_parameters():
            if "_ve." in name:
                weight.copy_(self.get_parameter(name.replace("_ve.", ".")))
        return self

    def parameter_counts(self) -> dict[str, int]:
        """Parameters in all, and those that a text or a visual token passes through, embeddings included."""
        sizes = {name: p.numel() for name, p in self.named_parameters()}
        text_experts = {name.replace("_ve.", ".") for name in sizes if "_ve." in name}
        not_for_text = [name for name in sizes if "_ve." in name or not name.startswith("language_model")]
        total = sum(sizes.values())
        return {"total": total, "text": total - sum(sizes[name] for name in not_for_text),
                "visual": total - sum(sizes[name] for name in text_experts)}
