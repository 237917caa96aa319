"""What a run costs on paper: operations, bytes and memory, from sizes alone.

    python budget.py --preset 2b --gpus 8        # memory and time of each stage, without data or weights

In this order: the shapes of the weights; operations of inference and of training; memory of training; what
the machine at hand reaches; the printed plan. `c` is a MonoInternVLConfig. `shapes` maps the names of a
model's parameters to their shapes, `trained` holds the names of those that train.
"""
import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

try:
    import resource
except ImportError:                                # Windows has none
    resource = None

from common import InputError, flag, parse_flags

# ---------------------------------------------------------------- inference


def layer_weights(c) -> int:
    """Weights of one layer that one token is multiplied with."""
    heads = 2 * (c.num_attention_heads + c.num_key_value_heads)
    return c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)


def prefill_flop(c, tokens: int, tiles: int, experts: int) -> float:
    """Operations up to the first token's logits. experts: how many each token runs through (the dense back
    end runs both). Attention is causal."""
    patches, dv = (c.image_size // c.patch_size) ** 2, c.vision_hidden_size
    vision = 2 * patches * c.num_channels * c.patch_size ** 2 * dv
    vision += 2 * c.tokens_per_tile * c.hidden_size * (dv * c.shuffle ** 2 + c.hidden_size)
    layer = 2 * experts * tokens * layer_weights(c) + 2 * tokens ** 2 * c.hidden_size
    return tiles * vision + c.num_hidden_layers * layer + 2 * c.vocab_size * c.hidden_size


def decode_bytes(c, cached: int, batch: int, itemsize: int) -> int:
    """What one decoding step has to read: the text weights, the head, and the keys and values of `cached`
    tokens in each row. itemsize: bytes of a number."""
    kv = batch * cached * c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim
    return (c.num_hidden_layers * layer_weights(c) + c.vocab_size * c.hidden_size + kv) * itemsize


# ---------------------------------------------------------------- training

def flop_rates(shapes: dict[str, tuple], trained: set[str], c) -> dict[str, float]:
    """Useful operations of a training step, for MFU: for each "text" and "visual" token, for each of the
    supervised "labels", and for each of the "pairs" of tokens that see each other.

    A weight takes 2 operations forward, 2 for the gradient of its input, and 2 more if it trains. A pair
    takes 12 per channel and layer. What recompute computes twice counts once.
    """
    rates = defaultdict(float, pairs=12 * c.num_hidden_layers * c.hidden_size)
    for name, shape in shapes.items():
        if len(shape) < 2 or name.endswith(("tok_embeddings.weight", "position_embedding",
        "class_embedding")):
            continue
        flop = math.prod(shape) * (4 + 2 * (name in trained))
        if name == "language_model.output.weight":
            rates["labels"] += flop
        elif "_ve." in name or name.startswith("mlp1"):
            rates["visual"] += flop
        elif name.startswith("vision_model"):
            rates["visual"] += flop * c.shuffle ** 2                       # patches of a visual token
        else:
            rates["text"] += flop
            if "feed_forward." not in name and name.replace(".weight", "_ve.weight") not in shapes:
                rates["visual"] += flop                                    # without an expert: shared
    return rates


def memory_plan(shapes: dict[str, tuple], trained: set[str], c, *, rows: int, tokens: int, max_tiles: int,
                itemsize: int, sharded_over: int = 1, reshard: bool = True, accumulated: bool = False,
                recompute: bool = False) -> dict[str, float]:
    """Bytes of training on one device, by part, for the longest batch: `rows` rows of `tokens` tokens.

    What trains is held in float32 with AdamW's two moments, what is frozen in numbers of `itemsize` bytes.
    sharded_over: processes that share all of it (FSDP). reshard: layers are gathered one after the other, and
    not kept. accumulated: gradients wait for the last of several passes. recompute: a layer keeps only its
    input. All parts that follow from the parameters are exact. The activations are counted by hand.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    trains = sum(size for name, size in sizes.items() if name in trained)
    frozen = sum(sizes.values()) - trains
    plan = {"weights": (4 * trains + itemsize * frozen) / sharded_over,
            "gradients": 4 * trains / sharded_over, "optimizer": 8 * trains / sharded_over,
            "copies": itemsize * trains * (itemsize < 4)}                  # those that autocast makes
    if sharded_over > 1:
        # The whole model, or two layers at a time and all that is outside of layers; and gradients that wait.
        layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
        away = max(0, c.num_hidden_layers - 2) * layer * reshard
        plan["copies"] = itemsize * (trains + frozen - away) + 4 * trains * accumulated
    D, F = c.hidden_size, c.intermediate_size
    kv, visual = c.num_key_value_heads * c.head_dim, min(tokens, (max_tiles + 1) * c.tokens_per_tile)
    text_learns = "language_model.model.layers.0.attention.wqkv.weight" in trained
    norms_learn = "language_model.model.layers.0.ffn_norm.weight" in trained
    # Every token keeps the norms' inputs in float32, qkv, the rotated q and k, the attention's output, and
    # three times F. A token whose weights learn keeps the inputs of its four products, and those of the
    # norms' weights.
    layer = tokens * (8 * D + itemsize * (3 * D + 3 * kv + 3 * F))
    layer += (tokens if text_learns else visual) * itemsize * (3 * D + F)
    layer += tokens * itemsize * 2 * D * norms_learn
    layers = c.num_hidden_layers * layer
    if recompute:
        layers = c.num_hidden_layers * tokens * itemsize * D + layer
    pixels = c.shuffle ** 2 * (4 * c.num_channels * c.patch_size ** 2 + 6 * itemsize * c.vision_hidden_size)
    logits = min(2 ** 26, rows * c.vocab_size * max(tokens - visual, tokens // 8))     # MonoInternVL.LOGITS
    return plan | {"activations": rows * (layers + visual * pixels) + (itemsize + 8) * logits}


def sample_flop(shapes: dict[str, tuple], trained: set[str], c, tokens: int, max_tiles: int) -> float:
    """Useful operations of training on one sample of `tokens` tokens with as many tiles as it may have."""
    rates, visual = flop_rates(shapes, trained, c), min(tokens, (max_tiles + 1) * c.tokens_per_tile)
    return (rates["visual"] * visual + (rates["text"] + rates["labels"]) * (tokens - visual)
            + rates["pairs"] * tokens ** 2 / 2)


# ---------------------------------------------------------------- the machine at hand

def measured_peak(device: str, dtype: str) -> float:
    """What a large matrix product reaches on this device, in operations per second."""
    n = 8192 if device.startswith("cuda") else 512
    a = torch.randn(n, n, device=device).to(getattr(torch, dtype))         # a GPU is faster on ones or zeros
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * n ** 3 / best


def gpu_memory(device: str) -> float:
    """Bytes. Where there is no GPU, the plan is for one of 80 GB."""
    return torch.cuda.get_device_properties(device).total_memory if torch.cuda.is_available() else 80e9


def peak_memory(device: str) -> int | None:
    """The most bytes that this process used so far: of the GPU's memory, or of the machine's. None
    where nobody counts them (Windows)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss              # kilobytes; bytes on a Mac
    return peak * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------- the plan of a preset

def print_plan(stage: str, trains: int, memory: dict[str, float], chosen: list[str], seconds: float) -> None:
    """trains: parameters. memory: as memory_plan makes it. chosen: how layers run. seconds: NaN if nobody
    knows."""
    parts = ", ".join(f"{part} {size / 1e9:.3f}" for part, size in memory.items())
    print(f"{stage:6}{trains / 1e6:9.2f} M train: {parts}; together {sum(memory.values()) / 1e9:.2f}"
          + "".join(f", {words}" for words in chosen)
          + ("" if math.isnan(seconds) else f"; {seconds / 3600:,.1f} hours"))


@dataclass
class Flags:
    preset: str = flag("2b", "which table of stages", choices=["2b", "llava_sft", "tiny"])
    recipe: str = flag("evip++", "evip (v1) or evip++ (1.5)", choices=["evip", "evip++"])
    gpus: int = flag(8, "how many train together")
    batch_size: int | None = flag(None, "samples per pass and GPU (default: what train_evip.py takes)")
    tflops: float = flag(400.0, "useful operations that one GPU does in a second, in 10^12: an assumption")


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(Flags, argv, __doc__.split("\n")[0])
    run = train_evip.Flags(preset=flags.preset, recipe=flags.recipe, batch_size=flags.batch_size,
                           device="cuda", dtype="bfloat16", peak_tflops=flags.tflops)
    try:
        if flags.gpus < 1 or flags.tflops <= 0 or (flags.batch_size or 1) < 1:
            raise InputError("--gpus, --batch_size and --tflops must be positive")
        train_evip.dry_run(train_evip.PRESETS[flags.preset][flags.recipe], [], run, Path("out"), flags.gpus)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    # Only as a script: train_evip has the tables of stages, and it imports this file for its own memory plan.
    import train_evip
    sys.exit(main())
