"""EViP and EViP++: how a language model learns to see without forgetting how to read, in one script.

    python train_evip.py                                  # tiny Mono-InternVL-1.5, every stage, 2 CPU cores
    python train_evip.py --recipe evip                    # Mono-InternVL (v1): no visual attention experts
    python train_evip.py --stages S1.3 S2                 # some stages, from the checkpoint before them
    python train_evip.py --data meta.json --init_from FOLDER --stages S2          # your own data
    torchrun --nproc_per_node 8 train_evip.py --preset 2b --data meta.json --init_from internlm2-chat-1_8b

Read RECIPES first: the table of stages is the paper. Then come the flags; what a stage trains, and where; one
optimizer step; the progress report; the loop over the steps of a stage; what a stage starts from; what a run
will do; the run. Each stage leaves a checkpoint in the official format in OUT/STAGE/, and OUT/log.jsonl has
every step. The same command continues an interrupted run. For [v1], [v1.5], [repo] and [ours], see
mono_internvl.py.
"""
import importlib.util
import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import budget
import checkpoint
import common
import data
from common import InputError, flag, full_tensor, parse_flags, rank, read_json, say, world_size
from data import MAX_PIXELS, Batches, Tokenizer, normalise
from evaluate import delta_verdict, plot_loss, plot_predictions, print_table, world_accuracy
from icons import Icons
from icons_exam import icons_report
from mono_internvl import MonoInternVL, MonoInternVLConfig
from world import World, make_world_tokenizer

warnings.filterwarnings("ignore", "torch.distributed is disabled")      # true and harmless: one process

# ---------------------------------------------------------------- the recipes

# Delta tuning: a stage trains the parameters whose name matches its pattern. All others stay frozen, bit for
# bit. The class embedding belongs to the file format only: nothing computes with it.
VISION = r"vision_model\.embeddings\.(patch|position)|mlp1|_ve\."     # vision embedding, mlp1, visual experts
TRAINABLE = {
    "text": rf"^(?!.*({VISION}|class_embedding))",                      # the whole LLM
    "visual": VISION,                                                   # FFN_v, and in 1.5 wqkv_v, wo_v
    "visual + attention": VISION + r"|attention\.w",                    # and the text tokens' wqkv, wo
    "all": r"^(?!.*class_embedding)",
}


@dataclass(frozen=True)
class Stage:
    name: str
    goal: str
    trainable: str                     # key of TRAINABLE
    max_tiles: int                     # most tiles of an image, thumbnail not counted [v1]
    steps: int                         # in RECIPES, steps, lr and schedule are for the tiny model [ours]
    lr: float
    schedule: str                      # "constant" after the warmup, or "cosine" down to zero
    paper: str                         # what the 2B model took: samples and lr; (?) where we are unsure
    batch: int = 16                    # samples of one optimizer step, of all GPUs together
    max_tokens: int | None = None      # of the longest sample; None: the model's context
    pool: int = 8                      # batches that are drawn and sorted by length together, to save pads


S0 = Stage("S0", "language, from text alone", "text", 1, 200, 1e-3, "cosine", "a pre-trained InternLM2-1.8B")
CONCEPT, SEMANTIC = "concepts, from noisy alt texts", "semantics, from clean captions"
ALIGN, INSTRUCT = "alignment: captions, boxes, OCR", "instructions: questions in turns"
RECIPES = {
    "evip": (                                         # Mono-InternVL [v1]
        S0,
        Stage("S1.1", CONCEPT, "visual", 4, 400, 1e-3, "constant", "922 M, 2e-4 constant (?)"),
        Stage("S1.2", SEMANTIC, "visual", 6, 1000, 1e-3, "constant", "258 M, 1e-4 (?)"),
        Stage("S1.3", ALIGN, "visual + attention", 12, 100, 1e-3, "constant", "143 M, 5e-5"),
        Stage("S2", INSTRUCT, "all", 24, 3600, 1e-3, "cosine", "5-7 M, 4e-5 cosine")),
    "evip++": (                                       # Mono-InternVL-1.5, with 58 % less data [v1.5]
        S0,
        Stage("S1.1", CONCEPT, "visual", 4, 100, 1e-3, "constant", "250 M (?)"),
        Stage("S1.2", SEMANTIC, "visual", 6, 500, 1e-3, "constant", "150 M (?)"),
        Stage("S1.3", ALIGN, "visual + attention", 12, 100, 1e-3, "constant", "150 M"),
        Stage("S2", INSTRUCT, "all", 24, 3600, 1e-3, "cosine", "7 M")),
}

# SFT: supervised fine-tuning. This row is the official script of Mono-InternVL.
SFT = Stage("S2", INSTRUCT, "all", 6, 5197, 4e-5, "cosine", "LLaVA-665k, 4e-5 cosine", 128, 2048)    # [repo]
ICON_SIZES = {"vision_hidden_size": 256, "patch_size": 8, "image_size": 48, "max_dynamic_patch": 2}
ICONS = (                                             # hours on a CPU, minutes on a GPU; all [ours]
    # Sorted by length, a batch would hold alike names, such as those of flags. So S1.1 and S1.2 do not sort.
    Stage("S1.1", CONCEPT, "visual", 1, 300, 6e-4, "constant", "", 32, pool=1),
    Stage("S1.2", SEMANTIC, "visual", 1, 4800, 6e-4, "cosine", "", 32, pool=1),
    Stage("S1.3", ALIGN, "visual + attention", 2, 150, 5e-5, "constant", "", 32),
    Stage("S2", INSTRUCT, "all", 2, 200, 2e-5, "cosine", "", 32))
EPOCHS = 3                                            # of your own data without --steps and --preset [ours]
PRESETS = {
    "tiny": RECIPES,                                  # from nothing, with its own small language model
    # On many GPUs, from a pre-trained LLM (--init_from). Batches before S1.3, the learning rates of 1.5 and
    # max_tokens (256 a tile, and room for text) are [ours]. Steps = samples / batch.
    "2b": {
        "evip": (
            Stage("S1.1", CONCEPT, "visual", 4, 450000, 2e-4, "constant", "922 M, 2e-4 (?)", 2048, 2048),
            Stage("S1.2", SEMANTIC, "visual", 6, 126000, 1e-4, "constant", "258 M, 1e-4 (?)", 2048, 2560),
            Stage("S1.3", ALIGN, "visual + attention", 12, 70000, 5e-5, "constant", "143 M", 2048, 4096),
            Stage("S2", INSTRUCT, "all", 24, 47000, 4e-5, "cosine", "5-7 M, 4e-5", 128, 8192)),
        "evip++": (
            Stage("S1.1", CONCEPT, "visual", 4, 122000, 2e-4, "constant", "250 M (?)", 2048, 2048),
            Stage("S1.2", SEMANTIC, "visual", 6, 73000, 1e-4, "constant", "150 M (?)", 2048, 2560),
            Stage("S1.3", ALIGN, "visual + attention", 12, 73000, 5e-5, "constant", "150 M", 2048, 4096),
            Stage("S2", INSTRUCT, "all", 24, 55000, 4e-5, "cosine", "7 M", 128, 8192))},
    "llava_sft": {"evip": (SFT,), "evip++": (SFT,)},  # from any checkpoint
    "icons": {"evip": ICONS, "evip++": ICONS},        # real pictures, SmolLM2-135M: see icons.py
}


def tiny_config(recipe: str, tok: Tokenizer) -> MonoInternVLConfig:
    """About a million parameters; pictures of 48 pixels become 3×3 visual tokens."""
    return MonoInternVLConfig(
        vocab_size=len(tok), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
        rope_theta=100.0,                                               # short texts need fast rotations
        attn_experts="qkvo" if recipe == "evip++" else "", vision_hidden_size=48, patch_size=8, image_size=48,
        max_dynamic_patch=2, bos_token_id=tok.bos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id,
        img_context_token_id=tok.token_id("<IMG_CONTEXT>"))


SWITCH = ["auto", "on", "off"]


@dataclass
class Flags:
    recipe: str = flag("evip++", "evip (v1) or evip++ (1.5)", choices=list(RECIPES))
    preset: str = flag("tiny", "which table of stages", choices=list(PRESETS))
    stages: list[str] = flag([], "stages to run, e.g. S1.3 S2 (default: all)")
    out: str | None = flag(None, "folder of the run (default: out/RECIPE, with -PRESET or -own behind it)")
    init_from: str | None = flag(None, "folder to start from: a Mono-InternVL, InternLM2 or Llama layout")
    data: str | None = flag(None, "meta.json of your own data, or for icons its folder (default: the world)")
    batch_size: int | None = flag(None, "samples per forward pass and process (default: 16, big models 4)")
    grad_accum: int | None = flag(None, "forward passes per step (default: what makes the table's batch)")
    pack: bool = flag(False, "pack samples into rows of max_tokens; batches then count rows")
    pool: int | None = flag(None, "batches that are sorted by length together; 1: none (default: as in the "
                                  "table)")
    workers: int = flag(0, "processes that read samples ahead, for each training process")
    steps: int | None = flag(None, "optimizer steps of each stage (default: as in the table)")
    lr: float | None = flag(None, "peak learning rate of each stage (default: as in the table)")
    warmup: float = flag(0.03, "fraction of the steps over which the learning rate rises")
    weight_decay: float = flag(0.01, "weight decay of AdamW, for matrices only")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    max_tokens: int | None = flag(None, "longest sample (default: as in the table, or the model's context)")
    max_pixels: int = flag(MAX_PIXELS, "images with more pixels are refused")
    max_bad: float = flag(0.01, "fraction of the samples that may be unreadable before training stops")
    seed: int = flag(0, "seed of the weights, the samples and their order")
    device: str = flag("auto", "cpu, cuda, ...; auto is cuda, else mps, else cpu")
    dtype: str = flag("auto", "of the forward pass and of frozen weights; auto: bfloat16 where it is fast",
                      choices=["auto", "float32", "bfloat16"])
    moe: str = flag("auto", "back end of the experts", choices=["auto", "dense", "torch", "cuda"])
    parallel: str = flag("auto", "ddp copies the model to each process, fsdp shards it; auto: big models",
                         choices=["auto", "ddp", "fsdp"])
    recompute: str = flag("auto", "run layers twice to save memory; auto: if needed", choices=SWITCH)
    reshard: str = flag("auto", "fsdp: gather layers twice to save memory; auto: if needed", choices=SWITCH)
    compile: str = flag("auto", "torch.compile the layers; auto: of big models on one GPU", choices=SWITCH)
    resume: str = flag("auto", "auto continues an interrupted run; never starts from the beginning",
                       choices=["auto", "never"])
    save_every: int = flag(500, "optimizer steps between checkpoints within a stage")
    keep: int = flag(2, "how many of these checkpoints are kept")
    peak_tflops: float | None = flag(None, "peak of one device, for MFU (default: a matrix product is timed)")
    dry_run: bool = flag(False, "only print the stages, the predicted memory and a batch")
    eval_questions: int = flag(100, "held-out questions per task at the end, 1000 for all of icons")


# These flags may change when an interrupted run continues, because they do not change what is learned.
FREE_TO_CHANGE = {"out", "device", "moe", "workers", "parallel", "recompute", "reshard", "compile",
                  "resume", "save_every", "keep", "peak_tflops", "dry_run", "eval_questions"}


# ---------------------------------------------------------------- what a stage trains, and where

def trainable_names(model: MonoInternVL, stage: Stage) -> set[str]:
    return {name for name, _ in model.named_parameters() if re.search(TRAINABLE[stage.trainable], name)}


def select_trainable(model: MonoInternVL, stage: Stage):
    """Delta tuning: only the stage's parameters require a gradient."""
    names = trainable_names(model, stage)
    for name, p in model.named_parameters():
        p.requires_grad_(name in names)
        p.grad = None


def shapes_of(model: MonoInternVL) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def is_big(model: MonoInternVL) -> bool:
    """Big models are sharded, compiled on a GPU, and take fewer samples at a time."""
    return sum(p.numel() for p in model.parameters()) > 1e9


def is_sharded(model: MonoInternVL, flags: Flags, processes: int) -> bool:
    return processes > 1 and (flags.parallel == "fsdp" or flags.parallel == "auto" and is_big(model))


def batch_plan(model: MonoInternVL, stage: Stage, flags: Flags, processes: int) -> tuple[int, int, int]:
    """(samples per forward pass and process, forward passes per step, samples per step). The table's batch is
    kept on any number of GPUs; --batch_size with --grad_accum overrules it."""
    size = flags.batch_size or min(4 if is_big(model) else 16, max(1, stage.batch // processes))
    accum = flags.grad_accum or max(1, stage.batch // (size * processes))
    batch = size * accum * processes
    if flags.grad_accum is None and batch != stage.batch:
        raise InputError(f"{processes} process(es) with --batch_size {size} do not divide {stage.name}'s "
                         f"batch of {stage.batch}; give another --batch_size, or --grad_accum as well")
    return size, accum, batch


def token_limit(c: MonoInternVLConfig, stage: Stage, flags: Flags) -> int:
    """Tokens of the longest sample. No flag can raise it above the model's context."""
    return min(flags.max_tokens or stage.max_tokens or c.context_length, c.context_length)


def memory_plan(model: MonoInternVL, stage: Stage, flags: Flags, processes: int) -> dict[str, float]:
    """budget.memory_plan of a stage: bytes on one device, by part. The model may be on the meta device."""
    rows, accum, _ = batch_plan(model, stage, flags, processes)
    return budget.memory_plan(
        shapes_of(model), trainable_names(model, stage), model.config, rows=rows, max_tiles=stage.max_tiles,
        tokens=token_limit(model.config, stage, flags), itemsize=getattr(torch, flags.dtype).itemsize,
        sharded_over=processes if is_sharded(model, flags, processes) else 1, reshard=flags.reshard == "on",
        accumulated=accum > 1, recompute=flags.recompute == "on")


USABLE = 0.8                 # of a GPU's memory may be planned for, because activations are only estimated


def fit_to_memory(model: MonoInternVL, stage: Stage, flags: Flags, processes: int) -> Flags:
    """The flags with --recompute and --reshard decided. Both save memory and cost time; running layers twice
    costs more than gathering their weights twice. So auto takes the first choice whose plan fits a GPU. On a
    CPU, it saves memory for big models only [ours]."""
    choices = [replace(flags, recompute=recompute, reshard=reshard)
               for recompute in ("off", "on") if flags.recompute in ("auto", recompute)
               for reshard in ("off", "on") if flags.reshard in ("auto", reshard)]
    if not flags.device.startswith("cuda"):
        return choices[-1 if is_big(model) else 0]
    for choice in choices[:-1]:
        needed = sum(memory_plan(model, stage, choice, processes).values())
        if needed <= USABLE * budget.gpu_memory(flags.device):
            return choice
    return choices[-1]


def distribute(model: MonoInternVL, flags: Flags) -> torch.nn.Module:
    """Moves the model to its device and dtype, wraps it in DDP or FSDP, and returns the module to call.

    Weights that train are held in float32, frozen ones in the dtype of the forward pass. With DDP, each
    process holds the whole model, and gradients are averaged. With FSDP, each holds a share of every tensor
    and gathers a layer when the layer runs. flags: as fit_to_memory returns them.
    """
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else getattr(torch, flags.dtype))
    device, layers = torch.device(flags.device), model.language_model.model.layers
    model.moe = flags.moe
    model.language_model.recompute = flags.recompute == "on"
    compile_pays = is_big(model) and device.type == "cuda" and world_size() == 1       # measured there only
    if flags.compile == "on" or flags.compile == "auto" and compile_pays:
        for layer in layers:
            layer.compile(dynamic=True)
    if is_sharded(model, flags, world_size()):
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, flags.dtype), reduce_dtype=torch.float32)
        mesh = init_device_mesh(device.type, (world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=flags.reshard == "on")
        return fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to(device)
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if world_size() > 1 else model


def make_optimizer(model: MonoInternVL, flags: Flags) -> torch.optim.AdamW:
    """AdamW for the trainable parameters only. Weight decay is for matrices, not for norms and biases."""
    trainable = [p for p in model.parameters() if p.requires_grad]         # FSDP has replaced them by now
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trainable if p.ndim > 1], "weight_decay": flags.weight_decay},
         {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0}],
        lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    for p in trainable:                            # before the first step, so that load_training can fill it
        optimizer.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}
    return optimizer


def moments(model: MonoInternVL, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """AdamW's two moments of each trainable parameter, under their names in a checkpoint."""
    return {f"{name}.{key}": optimizer.state[p][key] for name, p in model.named_parameters()
            if p.requires_grad for key in ("exp_avg", "exp_avg_sq")}


def peak_lr(model: MonoInternVL, stage: Stage, flags: Flags) -> float:
    """--lr, or the table's. The tiny model's rates would ruin a big model, which takes the official
    fine-tuning's instead [ours]."""
    if flags.lr is not None:
        return flags.lr
    return SFT.lr if flags.preset == "tiny" and is_big(model) else stage.lr


def learning_rate(step: int, steps: int, peak: float, stage: Stage, flags: Flags) -> float:
    """Rises linearly during the warmup, then stays, or falls to zero along a cosine."""
    warmup = max(1, round(flags.warmup * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    if stage.schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ---------------------------------------------------------------- one optimizer step

def next_batches(source, batches: Batches, accum: int, flags: Flags) -> tuple[list[dict], float, int, int]:
    """Reads the micro-batches of one step, one for each forward pass. Returns them and, over all processes,
    the step's supervised tokens, the bad samples so far, and the samples read so far. Raises InputError on
    every process if one of them cannot read enough samples."""
    micro, problem = [], None
    try:
        micro = [next(source) for _ in range(accum)]
    except InputError as e:
        problem = str(e)
    supervised = sum(int((m["labels"][:, 1:] != -100).sum()) for m in micro)
    bad, seen, total = map(int, common.sum_over_processes(len(batches.bad), batches.seen, supervised))
    # Over several epochs each process meets every sample, so one sample can count world_size times.
    common.stop_together(problem or data.too_many_bad(
        bad, seen, world_size() * (batches.size or sys.maxsize), flags.max_bad))
    return micro, total, bad, seen


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """A copy from pinned memory to a GPU does not make the host wait. Tiles travel as uint8, a quarter of the
    bytes, and are normalised on the device."""
    t = t.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else t.to(device)
    return normalise(t) if t.dtype == torch.uint8 else t


def backward(model: MonoInternVL, forward, micro: list[dict], total: float, stage: Stage,
             flags: Flags) -> list[Tensor]:
    """Adds the gradients of the mean loss over the step's `total` supervised tokens on all processes: not a
    mean of means. Returns each token's loss, (supervised,) per micro-batch. forward: from `distribute`."""
    device, c, token_losses = torch.device(flags.device), model.config, []
    fsdp = isinstance(model, FSDPModule)
    for i, m in enumerate(micro):
        inputs = {k: to_device(v, device) for k, v in m.items() if isinstance(v, Tensor)}
        # The checks read the tensors on the CPU, so the host does not wait for the GPU. Of the pixels, they
        # need only shape and dtype.
        sizes = model.check_inputs(m["input_ids"], inputs.get("pixel_values"), m["attention_mask"],
                                   m["labels"], m.get("document_ids"))
        if inputs.get("pixel_values") is None and stage.trainable != "text":
            # Pass zero tiles rather than None: visual experts then run on no tokens and get zero gradients,
            # so all ranks exchange the same set.
            inputs["pixel_values"] = torch.zeros(0, c.num_channels, c.image_size, c.image_size, device=device)
        last = i + 1 == len(micro)                 # the last pass of a step exchanges the gradients
        if fsdp:
            model.set_requires_gradient_sync(last)
            model.set_reshard_after_backward(last or flags.reshard == "on")    # the weights change after it
        with (forward.no_sync() if forward is not model and not last else nullcontext(),
              torch.autocast(device.type, torch.bfloat16,                  # FSDP casts by itself
                             enabled=flags.dtype == "bfloat16" and not fsdp)):
            losses = forward(**inputs, reduction="none", sizes=sizes)[1]
            # DDP and FSDP average over the processes, but the loss is a sum over them.
            (losses.sum() * (world_size() / max(1, total))).backward()
        token_losses.append(losses.detach())
    return token_losses


def account(c: MonoInternVLConfig, micro: list[dict], token_losses: list[Tensor]):
    """What this process learned from in a step: (the sum of the losses, their mean by task, the ids of the
    samples whose loss is not finite, the amounts of data.count_tokens)."""
    sums, counts, not_finite, amounts = defaultdict(float), defaultdict(int), [], defaultdict(int)
    for m, losses in zip(micro, token_losses, strict=True):
        owner = data.sample_numbers(m)[:, 1:][m["labels"][:, 1:] != -100]  # (supervised,): each one's sample
        n = len(m["ids"])
        by_sample = torch.zeros(n).index_add_(0, owner, losses.float().cpu()).tolist()
        labels = owner.bincount(minlength=n).tolist()
        for sample, task, loss, number in zip(m["ids"], m["tasks"], by_sample, labels, strict=True):
            sums[str(task)] += loss
            counts[str(task)] += number
            if not math.isfinite(loss):
                not_finite.append(sample)
        for kind, number in data.count_tokens(m, c.tokens_per_tile).items():
            amounts[kind] += number
    means = {task: sums[task] / max(1, counts[task]) for task in sums}
    return sum(sums.values()), means, not_finite, amounts


# ---------------------------------------------------------------- progress: bar, log, TensorBoard

class Progress:
    """What a run shows and keeps: a bar for each stage, log.jsonl with a line per event, and tensorboard/ if
    TensorBoard is installed. Other processes write their bad samples to log.rank1.jsonl and so on."""

    def __init__(self, path: Path, length: int | None = None):
        """length: bytes of an earlier run's log to keep. None keeps all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path.with_suffix(f".rank{rank()}.jsonl") if rank() else path, "ab")
        if length is not None and length < self.file.tell():
            self.file.truncate(length)
        self.board = None

    def write(self, **event):
        self.file.write(json.dumps(event).encode() + b"\n")
        self.file.flush()

    @contextmanager
    def steps(self, stage: Stage, model: MonoInternVL, first: int, steps: int, flags: Flags):
        """Yields the numbers of the steps that are left to do, as a bar that moves with them."""
        self.stage, self.device = stage.name, flags.device
        self.bad = self.seen = 0                   # samples of all processes; train_stage sets them
        self.totals, self.started = defaultdict(float), time.time()
        self.rates = budget.flop_rates(shapes_of(model), trainable_names(model, stage), model.config)
        self.peak = (flags.peak_tflops or 0) * 1e12 or budget.measured_peak(flags.device, flags.dtype)
        if not rank() and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter  # optional
            folder = Path(self.file.name).with_name("tensorboard") / stage.name
            self.board = SummaryWriter(str(folder), purge_step=first)
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.bar = tqdm(range(first, steps), f"{stage.name:4} {trains / 1e6:.2f} M train", initial=first,
                        total=steps, unit="step", mininterval=0.5, disable=rank() > 0)
        try:
            yield self.bar
        finally:
            self.bar.close()
            if self.bad:
                say(f"{self.stage}: {self.bad} of {self.seen} samples were bad and left out; "
                    "log.jsonl names them")
            if self.board:
                self.board.close()

    def bad_sample(self, index: int, error: str):
        tqdm.write(f"bad sample, left out: {error}", file=sys.stderr)
        self.write(event="bad sample", error=error)

    def check_finite(self, step: int, loss: float, norm: float, samples: list):
        """Raises InputError on all processes. samples: those of this process whose loss is not finite."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            names = ", ".join(map(str, samples)) or "none of this process"
            raise InputError(f"the loss of {self.stage} is {loss} at step {step}, the gradient's norm "
                             f"{norm}; lower --lr, or look at these samples: {names:.2000}")

    def report(self, step: int, loss: float, lr: float, norm: float, by_task: dict, amounts: dict,
               text: float, visual: float, micro: list[dict], utilisation: float | None):
        """by_task, amounts: as `account` returns them. text, visual: the step's tokens of all processes.
        utilisation: the share of packed rows that is filled, None without --pack."""
        self.totals["tokens"] += text + visual
        self.totals["visual"] += visual
        self.totals["flop"] += sum(self.rates[kind] * number for kind, number in amounts.items())
        seconds = time.time() - self.started
        shown = {"loss": loss, "lr": lr, "grad_norm": norm,
                 "tokens_per_s": round(self.totals["tokens"] / seconds),
                 "visual_tokens_per_s": round(self.totals["visual"] / seconds),
                 "mfu": round(self.totals["flop"] / seconds / self.peak, 4),
                 "memory_gb": round((budget.peak_memory(self.device) or 0) / 1e9, 3)}
        if utilisation is not None:
            shown["utilisation"] = round(utilisation, 4)
        order = zlib.crc32(repr([m["ids"] for m in micro]).encode())
        self.write(stage=self.stage, step=step, **shown, tasks=by_task, order=order)
        if self.board and step % 10 == 0:
            for name, value in (shown | {f"loss/{task}": v for task, v in by_task.items()}).items():
                self.board.add_scalar(name, value, step)
        self.bar.set_postfix(shown | by_task, refresh=False)


# ---------------------------------------------------------------- the loop

def save(model: MonoInternVL, tok: Tokenizer, folder: Path):
    """The official format, with its tokenizer. All processes call this."""
    checkpoint.save_with_tokenizer(folder, model.state_dict(), asdict(model.config), tok.folder)


def train_stage(model: MonoInternVL, dataset, stage: Stage, flags: Flags, progress: Progress, tok: Tokenizer,
                partial: Path | None = None) -> bool:
    """Trains the parameters in place. Continues from the newest checkpoint in the folder `partial` and
    saves there. Returns True when all steps are done, False after SIGTERM or Ctrl-C."""
    batch_size, accum, batch = batch_plan(model, stage, flags, world_size())
    steps = flags.steps or stage.steps
    select_trainable(model, stage)
    flags = fit_to_memory(model, stage, flags, world_size())
    # GPUs may differ in memory, but all processes must gather layers at the same times.
    recompute, reshard = common.sum_over_processes(flags.recompute == "on", flags.reshard == "on")
    flags = replace(flags, recompute="on" if recompute else "off", reshard="on" if reshard else "off")
    forward = distribute(model, flags)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, flags)
    batches = Batches(dataset, batch_size, tok.pad_id, seed=flags.seed, rank=rank(), world_size=world_size(),
                      workers=flags.workers, pool=flags.pool or stage.pool, on_bad=progress.bad_sample,
                      pack_tokens=token_limit(model.config, stage, flags) if flags.pack else None,
                      max_bad=1.0)                 # next_batches counts the bad samples of all processes
    first, newest = 0, partial and checkpoint.newest_partial(partial)
    if newest:
        first = checkpoint.load_training(newest, moments(model, optimizer), batches, batch)
        for state in optimizer.state.values():
            state["step"].fill_(first)
    source = iter(batches)
    model.train()
    with checkpoint.stop_signals() as stopped, progress.steps(stage, model, first, steps, flags) as numbers:
        for step in numbers:
            micro, supervised, progress.bad, progress.seen = next_batches(source, batches, accum, flags)
            token_losses = backward(model, forward, micro, supervised, stage, flags)
            norm = full_tensor(torch.nn.utils.clip_grad_norm_(trainable, flags.grad_clip)).item()
            loss_sum, by_task, not_finite, amounts = account(model.config, micro, token_losses)
            loss, text, visual, stop = common.sum_over_processes(
                loss_sum, amounts["text"], amounts["visual"], len(stopped))
            loss /= max(1, supervised)
            progress.check_finite(step, loss, norm, not_finite)
            lr = learning_rate(step, steps, peak_lr(model, stage, flags), stage, flags)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            progress.report(step, loss, lr, norm, by_task, amounts, text, visual, micro,
                            batches.utilisation if flags.pack else None)
            is_last = step + 1 == steps
            if partial and not is_last and (stop or (step + 1) % flags.save_every == 0):
                checkpoint.save_training(partial, step + 1, lambda folder: save(model, tok, folder),
                                         moments(model, optimizer), keep=flags.keep,
                                         state={"batches": batches.state_dict(), "batch": batch,
                                                "log": progress.file.tell()})
            if stop and not is_last:
                return False
    model.eval()
    return True


# ---------------------------------------------------------------- what a stage starts from

def language_model_origin(flags: Flags, folder: Path, new_tokenizer: Path):
    """What `origin` returns, for an LLM that has not seen pictures. Its tokenizer gets the tokens that a
    picture needs."""
    tok = Tokenizer(folder)
    num_tokens = len(tok)
    missing = [token for token in checkpoint.IMAGE_TOKENS if token not in tok.special_tokens]
    if missing:
        checkpoint.add_tokens(folder, new_tokenizer, missing, len(tok))
        tok = Tokenizer(new_tokenizer)
    config = MonoInternVLConfig.from_llm(
        folder, attn_experts="qkvo" if flags.recipe == "evip++" else "", bos_token_id=tok.bos_id,
        eos_token_id=tok.eos_id, pad_token_id=tok.pad_id, **(ICON_SIZES if flags.preset == "icons" else {}))
    config = replace(config, vocab_size=max(config.vocab_size, len(tok)),
                     img_context_token_id=tok.token_id("<IMG_CONTEXT>"))

    def build() -> MonoInternVL:
        torch.manual_seed(flags.seed)              # the same random vision embedding whenever it is built
        return MonoInternVL.from_llm(folder, config, dtype=None, num_tokens=num_tokens)

    return config, tok, build


def origin(flags: Flags, stage: Stage, first: bool, out: Path, new_tokenizer: Path | None = None):
    """What a stage starts from: (config, tokenizer, a function that builds the model). S0 starts from a new
    model, the `first` stage of a run from --init_from, any other from the stage before it. new_tokenizer:
    where to write a tokenizer that has to be made (default: in `out`)."""
    new_tokenizer = new_tokenizer or out / "tokenizer"
    if stage.name == "S0" and not flags.init_from:
        if not rank():
            make_world_tokenizer(new_tokenizer)
        common.wait_for_all()
        tok = Tokenizer(new_tokenizer)
        config = tiny_config(flags.recipe, tok)
        return config, tok, lambda: MonoInternVL(config)
    recipe = PRESETS[flags.preset][flags.recipe]
    if flags.init_from and first:
        folder = Path(flags.init_from)
    elif stage == recipe[0]:
        raise InputError(f"{stage.name} of --preset {flags.preset} starts from a model: name its folder with "
                         "--init_from")
    else:
        folder = out / recipe[recipe.index(stage) - 1].name
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no checkpoint to start {stage.name} from: "
                         "run the stages before it, or name a folder with --init_from")
    if read_json(folder / "config.json").get("model_type") in ("internlm2", "llama"):
        return language_model_origin(flags, folder, new_tokenizer)

    def build() -> MonoInternVL:
        model = MonoInternVL.from_pretrained(folder, dtype=None)
        # EViP begins: the visual experts start as copies of the text experts.
        return model.copy_text_experts() if folder == out / "S0" else model

    config, tok = MonoInternVLConfig.from_json(folder / "config.json"), Tokenizer(folder)
    if (flags.recipe == "evip++") != bool(config.attn_experts):
        kind, other = ("1.5", "evip++") if config.attn_experts else ("v1", "evip")
        raise InputError(f"{folder} is a {kind} model (its attn_experts is {config.attn_experts!r}), and "
                         f"--recipe is {flags.recipe}: train it with --recipe {other}")
    if len(tok) > config.vocab_size:
        raise InputError(f"the tokenizer in {folder} has {len(tok)} tokens, "
                         f"the model knows {config.vocab_size}")
    return config, tok, build


# ---------------------------------------------------------------- what a run will do

def print_stages(stages: list[Stage], done: list[str], model: MonoInternVL, flags: Flags, processes: int):
    """The sizes of the model and the table of stages. The model may be on the meta device."""
    counts = model.parameter_counts()
    total, text, visual = (counts[key] / 1e6 for key in ("total", "text", "visual"))
    say(f"{flags.recipe}: {total:.2f} M parameters, {text:.2f} M for a text token, {visual:.2f} M for a "
        f"visual token; {processes} process(es), {flags.device}, {flags.dtype}, {torch.get_num_threads()} "
        "threads")
    say(f"{'stage':6}{'learns':34}{'trains':20}{'tiles':>5}{'steps':>8}{'batch':>7}{'lr':>8}"
        "  2B model in the paper")
    for s in stages:
        steps = flags.steps or (f"{EPOCHS} ep." if flags.data and flags.preset == "tiny" else s.steps)
        *_, batch = batch_plan(model, s, flags, processes)
        say(f"{s.name:6}{s.goal:34}{s.trainable:20}{s.max_tiles:5}{steps:>8}{batch:7}"
            f"{peak_lr(model, s, flags):8.0e}  {s.paper}" + ("  (done)" if s.name in done else ""))


def print_memory(stages: list[Stage], model: MonoInternVL, flags: Flags, processes: int):
    """The memory that each stage needs on a device and, with --peak_tflops, its hours."""
    print("\nMemory per device in GB for the longest batch (activations are estimated)"
          + (f", and hours if\nevery sample were the longest at {flags.peak_tflops:g} TFLOP/s a device"
             if flags.peak_tflops else "") + ":")
    shapes, speed = shapes_of(model), processes * (flags.peak_tflops or math.nan) * 1e12
    for stage in stages:
        trained, longest = trainable_names(model, stage), token_limit(model.config, stage, flags)
        flop = budget.sample_flop(shapes, trained, model.config, longest, stage.max_tiles)
        chosen = fit_to_memory(model, stage, flags, processes)
        words = ["layers run twice"] if chosen.recompute == "on" else []
        if is_sharded(model, flags, processes):
            words += ["layers are gathered twice" if chosen.reshard == "on" else "layers stay gathered"]
        budget.print_plan(stage.name, sum(math.prod(shapes[name]) for name in trained),
                          memory_plan(model, stage, chosen, processes), words,
                          (flags.steps or stage.steps) * stage.batch * flop / speed)
    if flags.device.startswith("cuda"):
        print("--recompute auto and --reshard auto take the fastest choice of at most "
              f"{USABLE * budget.gpu_memory(flags.device) / 1e9:.1f} GB, {USABLE:.0%} of a GPU's memory.")


def dry_run(stages: list[Stage], done: list[str], flags: Flags, out: Path, processes: int):
    """Prints the stages, the memory that they need, and a batch as text. Writes nothing. Without --init_from,
    a preset other than tiny has the papers' sizes."""
    missing = [f"--{name}" for name in ("init_from", "data")
               if flags.preset != "tiny" and not getattr(flags, name)]
    with tempfile.TemporaryDirectory() as folder:
        if "--init_from" in missing:
            config = replace(MonoInternVLConfig.mono_internvl_2b(img_context_token_id=92546),
                             attn_experts="qkvo" if flags.recipe == "evip++" else "")
        else:
            config, tok, _ = origin(flags, stages[0], True, out, Path(folder))
        with torch.device("meta"):
            model = MonoInternVL(config)
        print_stages(stages, done, model, flags, processes)
        if rank():
            return
        print_memory(stages, model, flags, processes)
        if missing:
            print(f"\nThere is no example batch without {' and '.join(missing)}.")
            return
        size, accum, samples = batch_plan(model, stages[0], flags, processes)
        dataset, _ = load_data(stages[0], tok, config, flags, samples)
        limit = token_limit(config, stages[0], flags) if flags.pack else None
        batch = next(iter(Batches(dataset, size, tok.pad_id, seed=flags.seed, max_bad=flags.max_bad,
                                  pool=flags.pool or stages[0].pool, pack_tokens=limit)))
        print(f"\n{stages[0].name}: {accum} × {processes} × {size} rows a step. The first batch has the "
              f"shape {tuple(batch['input_ids'].shape)}. What is learned stands between » and «:")
        print(data.batch_as_text(batch, tok))


# ---------------------------------------------------------------- the run

def check_flags(flags: Flags) -> list[Stage]:
    """The stages to run. Raises InputError for flags that contradict each other or are out of range."""
    recipe = PRESETS[flags.preset][flags.recipe]
    names = [stage.name for stage in recipe]
    if unknown := [name for name in flags.stages if name not in names]:
        raise InputError(f"--stages {unknown[0]}: no such stage; there are {', '.join(names)}")
    stages = [s for s in recipe if s.name in (flags.stages or names)]
    if flags.data and stages[0].name == "S0":
        raise InputError("S0 makes the embedded world's own language model; with --data, name other --stages")
    if flags.preset == "icons" and (not flags.data or flags.dry_run and not flags.init_from):
        raise InputError("--preset icons learns from what `python icons.py` has prepared: --data icons "
                         "--init_from icons/llm")
    if not flags.data and flags.preset != "tiny" and not flags.dry_run:
        raise InputError(f"--preset {flags.preset} learns from your own data: name it with --data")
    for name in ("batch_size", "grad_accum", "pool", "steps", "max_tokens", "save_every", "keep",
                 "max_pixels", "eval_questions"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise InputError(f"--{name} is {getattr(flags, name)}, out of range")
    if not 0 <= flags.max_bad <= 1 or flags.workers < 0 or not 0 <= flags.seed < 2 ** 63:
        raise InputError(f"--max_bad is {flags.max_bad}, --workers {flags.workers}, --seed {flags.seed}: one "
                         "is out of range")
    return stages


def choose_device(flags: Flags):
    """Replaces auto in --device and --dtype. torchrun starts one process for each GPU of a machine."""
    if flags.device == "auto":
        flags.device = common.auto_device()
    if flags.device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise InputError(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
        flags.device = f"cuda:{local}"
    if flags.dtype == "auto":
        use_bf16 = flags.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        if flags.device == "cpu" and flags.preset != "tiny":   # casts cost the tiny model more than it gains
            gain = budget.measured_peak("cpu", "bfloat16") / budget.measured_peak("cpu", "float32")
            use_bf16 = gain >= 2
            say(f"matrix products in bfloat16 have {gain:.1f} times the speed of float32 on this CPU: "
                f"--dtype {'bfloat16' if use_bf16 else 'float32'}")
        flags.dtype = "bfloat16" if use_bf16 else "float32"


def load_data(stage: Stage, tok: Tokenizer, config: MonoInternVLConfig, flags: Flags, batch: int):
    """(dataset of a stage, the stage with the number of its steps). batch: samples per step."""
    if not flags.data:
        return World(stage.name, tok, config, stage.max_tiles, flags.seed), stage
    if flags.preset == "icons":
        return Icons(flags.data, stage.name, tok, config, stage.max_tiles, flags.seed), stage
    limit = token_limit(config, stage, flags)
    dataset = data.load_meta(flags.data, tok, config, stage.max_tiles, limit, flags.seed, flags.max_pixels,
                             stage.name)
    if stage.trainable.startswith("visual") and not dataset.has_images:
        raise InputError(f"{stage.name} learns to see, but no sample of {flags.data} has an image; for "
                         "text alone, choose --stages S2")
    if flags.preset == "tiny":                     # whose steps are for the embedded world
        stage = replace(stage, steps=math.ceil(EPOCHS * len(dataset) / batch))
    steps = flags.steps or stage.steps
    say(f"{stage.name} learns from {len(dataset)} samples: "
        + ", ".join(f"{len(d)} of {d.task}" for d in dataset.datasets)
        + f"; {steps} step(s) of {batch} are {batch * steps / len(dataset):.3g} epochs")
    return dataset, stage


def open_progress(out: Path, stage: Stage | None, record: dict, flags: Flags) -> Progress:
    """Opens log.jsonl, cut to what an interrupted run had written by its last checkpoint."""
    partial = checkpoint.newest_partial(out / f"{stage.name}.partial") if stage else None
    length = record["log"] if record["done"] and not rank() else None
    if partial and (partial / f"rank{rank()}.json").exists():
        length = read_json(partial / f"rank{rank()}.json")["log"]
    progress = Progress(out / "log.jsonl", length)
    progress.write(event="resume" if record["done"] or partial else "run", flags=vars(flags))
    return progress


def run_stage(stage: Stage, start: tuple, out: Path, flags: Flags, progress: Progress, report: dict) -> bool:
    """Trains a stage from `start`, what origin returned, or from its newest checkpoint, and saves it. Returns
    False if it is stopped. `report` gets the proof that the text model has not changed."""
    config, tok, build = start
    folder = out / f"{stage.name}.partial"
    partial = checkpoint.newest_partial(folder)
    model = MonoInternVL.from_pretrained(partial / "model", dtype=None) if partial else build()
    if stage.trainable != "text":                  # later questions come with as many tiles as these [repo]
        model.config.max_dynamic_patch = max(stage.max_tiles, config.min_dynamic_patch)
    *_, batch = batch_plan(model, stage, flags, world_size())
    dataset, stage = load_data(stage, tok, config, flags, batch)
    if not train_stage(model, dataset, stage, flags, progress, tok, folder):
        say(f"stopped; {folder} is complete: the same command continues from there")
        return False
    save(model, tok, out / stage.name)
    del model
    if stage.trainable == "visual" and not rank():
        to = flags.device, getattr(torch, flags.dtype)                     # the dtype of frozen weights
        before, after = build().to(*to), MonoInternVL.from_pretrained(out / stage.name, dtype=None).to(*to)
        report[stage.name] = delta_verdict(before, after, trainable_names(after, stage), tok, stage.name)
    return True


def finish(out: Path, flags: Flags, ask: bool, report: dict, started: float):
    """Writes the pictures and results.json. ask: the final model answers held-out questions of the world."""
    report["train seconds"] = time.time() - started
    plot_loss(out / "log.jsonl", out / "loss.png")
    if ask:
        model = MonoInternVL.from_pretrained(out / "S2", device=flags.device)
        report["tasks"], examples = world_accuracy(model, Tokenizer(out / "S2"), flags.eval_questions)
        plot_predictions(examples, out / "predictions.png")
        print_table(report["tasks"])
    if flags.preset == "icons" and (out / "S2").exists():
        done = [stage.name for stage in ICONS if (out / stage.name).exists()]
        report |= icons_report(out, Path(flags.data), done, flags.device, getattr(torch, flags.dtype),
                               flags.eval_questions)
    report["seconds"] = time.time() - started
    (out / "results.json").write_text(json.dumps(report, indent=2))
    print(f"\n{report['seconds']:.0f} s. {out}/ has a checkpoint of each stage, the log and the pictures.")
    if ask:
        print("Ask it: python sample.py --image FILE --prompt \"Describe the image.\"")


def run(flags: Flags):
    stages = check_flags(flags)
    choose_device(flags)
    if world_size() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if flags.device.startswith("cuda") else "gloo")
    # A model that learns from your own data must not replace the stages of the default run.
    own = "-own" if flags.data and flags.init_from else ""
    ending = own if flags.preset == "tiny" else f"-{flags.preset}"
    out = Path(flags.out or f"out/{flags.recipe}{ending}")
    torch.manual_seed(flags.seed)
    with nullcontext() if flags.dry_run else checkpoint.lock_run(out):
        run_stages(stages, out, flags)


def run_stages(stages: list[Stage], out: Path, flags: Flags):
    """Trains the stages that OUT/run.json does not record as done."""
    started, partials = time.time(), [out / f"{stage.name}.partial" for stage in stages]
    record = checkpoint.read_run(out, vars(flags), partials, FREE_TO_CHANGE)
    common.wait_for_all()                          # every process has read the record: it may change now
    if flags.dry_run:
        return dry_run(stages, record["done"], flags, out, world_size())
    if record["interrupted"]:
        say(f"{out} holds an interrupted run, which continues"
            + (f" after {record['done'][-1]}" if record["done"] else "")
            + " (--resume never starts from the beginning)")
    elif not rank():
        for folder in partials:
            shutil.rmtree(folder, ignore_errors=True)
    report = record["report"] | {"recipe": flags.recipe, "seed": flags.seed, "torch": torch.__version__}
    todo = [stage for stage in stages if stage.name not in record["done"]]
    first = (todo or stages)[0]
    start = origin(flags, first, first is stages[0], out)
    with torch.device("meta"):
        print_stages(stages, record["done"], MonoInternVL(start[0]), flags, world_size())
    say(f"writes {out}/")
    progress = open_progress(out, todo[0] if todo else None, record, flags)
    record |= {"flags": record["flags"] | vars(flags), "processes": world_size()}
    checkpoint.write_run(out, record)
    for stage in todo:
        if stage is not first:
            start = origin(flags, stage, False, out)
        if not run_stage(stage, start, out, flags, progress, report):
            return
        record["done"].append(stage.name)
        record |= {"log": progress.file.tell(), "report": report}
        checkpoint.write_run(out, record)
        common.wait_for_all()
        if not rank():
            shutil.rmtree(out / f"{stage.name}.partial", ignore_errors=True)
    if not rank():
        finish(out, flags, not flags.data and stages[-1].name == "S2", report, started)
        checkpoint.write_run(out, record | {"finished": True})


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(Flags, argv, __doc__.split("\n")[0])
    try:
        run(flags)
    except (InputError, OSError, SafetensorError) as e:                    # the disk may be full
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was saved is complete: the same command continues from there", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
