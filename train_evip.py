"""EViP and EViP++: how a language model learns to see without forgetting how to read, in one script.

    python train_evip.py                                  # tiny Mono-InternVL-1.5, every stage, 2 CPU cores
    python train_evip.py --recipe evip                    # Mono-InternVL (v1): no visual attention experts
    python train_evip.py --stages S1.3 S2                 # some stages, from the checkpoint before them
    python train_evip.py --ablation                       # delta tuning against full fine-tuning, and more
    python train_evip.py --data meta.json --init_from FOLDER --stages S2          # your own data
    torchrun --nproc_per_node 8 train_evip.py --preset 2b --data meta.json --init_from internlm2-chat-1_8b

Read RECIPES first: the table of stages is the paper. Then: the processes and the log, one stage (what trains,
sharding, checkpoints, the loop), what fits into memory, the evaluation, ablations, pictures, main. Each stage
leaves a checkpoint in the official format in OUT/STAGE/; OUT/log.jsonl has every step. A run that was
interrupted goes on when the same command is given again.
"""
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import sys
import tempfile
import textwrap
import time
import warnings
import zlib
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (
    KINDS,
    TASKS,
    Batches,
    Tokenizer,
    World,
    collate,
    encode_conversation,
    flag,
    held_out_questions,
    is_correct,
    load_image,
    load_meta,
    make_picture,
    make_world_tokenizer,
    parse_flags,
    too_many_bad,
    turns,
)
from mono_internvl import InputError, MonoInternVL, MonoInternVLConfig, read_json

warnings.filterwarnings("ignore", "torch.distributed is disabled")      # a single process is what is meant

# ---------------------------------------------------------------- the recipes

# Delta tuning: a stage trains the parameters whose name matches, all others stay frozen, bit for bit.
VISION = r"vision_model\.embeddings\.(patch|position)|mlp1|_ve\."     # vision embedding, mlp1, visual experts
TRAINABLE = {
    "text": rf"^(?!.*({VISION}|class_embedding))",                      # the LLM, to have one to freeze
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
    steps: int                         # of the tiny model; like lr and schedule: [ours]
    lr: float
    schedule: str                      # "constant" after the warmup, or "cosine" down to zero
    paper: str                         # what the 2B model did: samples and lr; (?) where we are unsure
    batch: int = 16                    # samples of one optimizer step, of all GPUs together
    max_tokens: int | None = None      # longest sample; None: the model's context


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

# The real thing, on a node of GPUs: what the papers say, and [ours] where they leave it open: batches before
# S1.3, the learning rates of 1.5, max_tokens (256 a tile, and room for text). Steps = samples / batch.
SFT = Stage("S2", INSTRUCT, "all", 6, 5197, 4e-5, "cosine", "LLaVA-665k, 4e-5 cosine", 128, 2048)    # [repo]
PRESETS = {
    "tiny": RECIPES,                                  # from nothing, with its own small language model
    "2b": {                                           # from a pre-trained LLM: --init_from
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
    "llava_sft": {"evip": (SFT,), "evip++": (SFT,)},  # the official fine-tuning script, of any checkpoint
}


def tiny_config(recipe: str, tok: Tokenizer) -> MonoInternVLConfig:
    """About a million parameters; pictures of 48 pixels become 3×3 visual tokens."""
    return MonoInternVLConfig(
        vocab_size=len(tok), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=1024,
        rope_theta=100.0,                                               # texts are short: fast rotations
        attn_experts="qkvo" if recipe == "evip++" else "", vision_hidden_size=48, patch_size=8, image_size=48,
        max_dynamic_patch=2, bos_token_id=tok.bos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id,
        img_context_token_id=tok.token_id("<IMG_CONTEXT>"))


@dataclass
class Flags:
    recipe: str = flag("evip++", "evip (v1) or evip++ (1.5)", choices=list(RECIPES))
    preset: str = flag("tiny", "which table of stages: tiny, 2b or llava_sft", choices=list(PRESETS))
    stages: list[str] = flag([], "stages to run, e.g. S1.3 S2 (default: all)")
    out: str | None = flag(None, "folder of the run (default: out/RECIPE or out/RECIPE-PRESET)")
    init_from: str | None = flag(None, "Mono-InternVL, InternLM2 or Llama-layout folder to start "
                                 "from (default: the stage before, or nothing)")
    data: str | None = flag(None, "meta.json of your own data (default: the embedded world)")
    batch_size: int | None = flag(None, "samples per forward pass and process (default: 16 or, for a billion "
                                  "parameters, 4; at most the table's batch)")
    grad_accum: int | None = flag(None, "forward passes per optimizer step (default: what makes the table's "
                                  "batch on any number of processes)")
    pack: bool = flag(False, "pack samples into rows of max_tokens; batches then count rows")
    pool: int = flag(8, "so many batches are drawn and sorted by length together; 1: none, a random order")
    workers: int = flag(0, "processes that read samples ahead, for each training process")
    steps: int | None = flag(None, "optimizer steps of each stage (default: as in the table)")
    lr: float | None = flag(None, "peak learning rate of each stage (default: as in the table)")
    warmup: float = flag(0.03, "part of the steps over which the learning rate rises")
    weight_decay: float = flag(0.01, "AdamW's, on matrices")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    max_tokens: int | None = flag(None, "longest sample (default: as in the table, or the model's context)")
    max_bad: float = flag(0.01, "part of the samples that may be unreadable before training stops")
    seed: int = flag(0, "of weights, samples and their order")
    device: str = flag("auto", "cpu, cuda, ...; auto is cuda if there is one")
    dtype: str = flag("auto", "of the forward pass and of frozen weights; what trains stays float32; auto: "
                      "bfloat16 on GPUs that have it",
                      choices=["auto", "float32", "bfloat16"])
    moe: str = flag("auto", "back end of the experts", choices=["auto", "dense", "torch", "cuda"])
    parallel: str = flag("auto", "several processes: ddp, each holds all; fsdp, each holds a share; auto: "
                         "fsdp from a billion parameters on", choices=["auto", "ddp", "fsdp"])
    recompute: str = flag("auto", "of a layer keep the input only, and run it twice; auto: from a billion "
                          "parameters on", choices=["auto", "on", "off"])
    compile: bool = flag(False, "torch.compile the layers")
    resume: str = flag("auto", "auto: go on with a run of this out folder that was interrupted; never: start "
                       "anew", choices=["auto", "never"])
    save_every: int = flag(500, "optimizer steps between checkpoints within a stage")
    keep: int = flag(2, "so many of them are kept")
    peak_tflops: float | None = flag(None, "of one device, for MFU (default: a matrix product is measured)")
    dry_run: bool = flag(False, "only print the stages, the predicted memory and a batch")
    eval_questions: int = flag(100, "held-out questions per task at the end")
    ablation: bool = flag(False, "compare delta tuning with full fine-tuning, v1 and random experts instead")


# What may differ when an interrupted run goes on: nothing of it changes what is learned.
FREE_TO_CHANGE = {"out", "device", "moe", "workers", "parallel", "recompute", "compile", "resume",
                  "save_every", "keep", "peak_tflops", "dry_run", "eval_questions"}


# ---------------------------------------------------------------- the processes, and what they report

def rank() -> int:
    """Number of this process: torchrun starts one per GPU and numbers them in their environment."""
    return int(os.environ.get("RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def add_up(*values: float) -> list[float]:
    """Sums over all processes, and a place where they wait for each other. On CPUs: no GPU is waited for."""
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def say(*text):
    if not rank():
        print(*text, flush=True)


class Log:
    """log.jsonl, a line per event; also what loss.png is drawn from. Processes other than the first write
    their bad samples to log.rank1.jsonl, ... keep: so many bytes of an earlier run's log stay."""

    def __init__(self, path: Path, keep: int | None = None):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path.with_suffix(f".rank{rank()}.jsonl") if rank() else path, "ab")
        if keep is not None and keep < self.file.tell():
            self.file.truncate(keep)

    def write(self, **event):
        self.file.write(json.dumps(event).encode() + b"\n")
        self.file.flush()

    def tensorboard(self, stage: str, first: int):
        """Where the first process's figures go as well, if tensorboard is installed."""
        if not rank() and importlib.util.find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
            return SummaryWriter(str(Path(self.file.name).with_name("tensorboard") / stage), purge_step=first)


# ---------------------------------------------------------------- one stage

def is_big(model: MonoInternVL) -> bool:
    return sum(p.numel() for p in model.parameters()) > 1e9


def is_sharded(model: MonoInternVL, flags: Flags) -> bool:
    return world() > 1 and (flags.parallel == "fsdp" or flags.parallel == "auto" and is_big(model))


def batch_plan(model: MonoInternVL, stage: Stage, flags: Flags) -> tuple[int, int]:
    """(samples per forward pass and process, forward passes per step). The table's batch holds on any number
    of GPUs; --batch_size with --grad_accum overrules it."""
    size = flags.batch_size or min(4 if is_big(model) else 16, max(1, stage.batch // world()))
    accum = flags.grad_accum or max(1, stage.batch // (size * world()))
    if flags.grad_accum is None and accum * size * world() != stage.batch:
        raise InputError(f"{world()} process(es) with --batch_size {size} do not divide {stage.name}'s batch "
                         f"of {stage.batch}; give another --batch_size, or --grad_accum as well")
    return size, accum


def token_limit(model: MonoInternVL, stage: Stage, flags: Flags) -> int:
    return flags.max_tokens or stage.max_tokens or model.config.context_length


def select_trainable(model: MonoInternVL, stage: Stage):
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(TRAINABLE[stage.trainable], name) is not None)
        p.grad = None


def distribute(model: MonoInternVL, flags: Flags) -> torch.nn.Module:
    """Casts the model and moves it to its device, in place, and returns what to call in its stead.

    What trains is held in float32, AdamW's masters; what is frozen in the type of the computation. DDP: each
    process holds all, gradients are averaged. FSDP: each holds a share of every tensor, and a layer is put
    together when its turn comes."""
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else getattr(torch, flags.dtype))
    device, layers = torch.device(flags.device), model.language_model.model.layers
    model.moe = flags.moe
    model.language_model.recompute = flags.recompute == "on" or flags.recompute == "auto" and is_big(model)
    if flags.compile:
        for layer in layers:
            layer.compile(dynamic=True)
    if is_sharded(model, flags):
        policy = MixedPrecisionPolicy(param_dtype=getattr(torch, flags.dtype), reduce_dtype=torch.float32)
        mesh = init_device_mesh(device.type, (world(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to(device)
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if world() > 1 else model


def whole(t: Tensor) -> Tensor:
    """All of a tensor that FSDP spread over the processes; each of them must ask for it."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def learning_rate(step: int, steps: int, stage: Stage, flags: Flags) -> float:
    warmup = max(1, round(flags.warmup * steps))
    peak = stage.lr if flags.lr is None else flags.lr
    if step < warmup:
        return peak * (step + 1) / warmup
    if stage.schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def sample_numbers(batch: dict) -> Tensor:
    """(B, T) int64: which sample of the batch a token belongs to, -1 for pads. A packed row holds several."""
    documents = batch.get("document_ids")
    if documents is None:
        mask = batch["attention_mask"]
        documents = torch.ones_like(batch["labels"]) if mask is None else mask
    in_row = documents.amax(1, keepdim=True)                               # (B, 1) how many samples
    return torch.where(documents > 0, documents - 1 + in_row.cumsum(0) - in_row, -1)


def flop_rates(model: MonoInternVL) -> dict[str, float]:
    """Useful operations of training, for MFU: per text and visual token, per supervised one, per pair of
    tokens that see each other. A weight takes 2 forward, 2 for the gradient of its input, 2 if it trains
    itself; a pair 12 per channel and layer. What --recompute computes twice counts once."""
    c, weights, rates = model.config, dict(model.named_parameters()), defaultdict(float)
    rates["pairs"] = 12 * c.num_hidden_layers * c.hidden_size
    for name, p in weights.items():
        if p.ndim < 2 or name.endswith(("tok_embeddings.weight", "position_embedding", "class_embedding")):
            continue
        flop = p.numel() * (4 + 2 * p.requires_grad)
        if name == "language_model.output.weight":
            rates["labels"] += flop
        elif "_ve." in name or name.startswith("mlp1"):
            rates["visual"] += flop
        elif name.startswith("vision_model"):
            rates["visual"] += flop * c.shuffle ** 2                       # patches of a visual token
        else:
            rates["text"] += flop
            if "feed_forward." not in name and name.replace(".weight", "_ve.weight") not in weights:
                rates["visual"] += flop                                    # without an expert: shared
    return rates


def measured_peak(flags: Flags) -> float:
    """What a large matrix product reaches on this device, in operations per second."""
    n = 8192 if flags.device.startswith("cuda") else 512
    a = torch.ones(n, n, dtype=getattr(torch, flags.dtype), device=flags.device)
    best = math.inf
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2 * n ** 3 / best


def memory_gb(flags: Flags) -> float:
    """The most this process had so far: on the GPU, or of the machine's memory."""
    if flags.device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


# ---- checkpoints: of a finished stage in OUT/STAGE, within a stage in OUT/STAGE.partial/step-0000500

TOKENIZER_FILES = "tokenizer.model", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"


def save(model: MonoInternVL, tok: Tokenizer, folder: Path):
    """The official format, with its tokenizer. All processes call it, the first one writes."""
    weights = {name: whole(t.detach()) for name, t in model.state_dict().items()}
    if rank():
        return
    with torch.device("meta"):
        complete = MonoInternVL(model.config)
    complete.load_state_dict({name: t.cpu() for name, t in weights.items()}, assign=True)
    for name in TOKENIZER_FILES:
        if (tok.folder / name).exists() and tok.folder != folder:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(tok.folder / name, folder / name)
    complete.save_pretrained(folder)   # config.json comes last: a folder that has it is complete


def optimizer_tensors(model: MonoInternVL, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    return {f"{name}.{key}": optimizer.state[p][key] for name, p in model.named_parameters()
            if p.requires_grad for key in ("exp_avg", "exp_avg_sq")}


def save_partial(folder: Path, step: int, model, tok, optimizer, batches: Batches, log: Log, keep: int):
    """The model in the official format; AdamW's moments, each process its share, as safetensors through
    torch.distributed.checkpoint; and of each process its place in the data, its random numbers, its log's
    length. Written aside and renamed: what has its name is complete."""
    aside, problem = folder / "unfinished", ""
    if not rank():
        shutil.rmtree(aside, ignore_errors=True)
    add_up(0)
    try:
        dcp.save(optimizer_tensors(model, optimizer), no_dist=not dist.is_initialized(),
                 storage_writer=HuggingFaceStorageWriter(str(aside / "optimizer"), save_distributed=True))
        save(model, tok, aside / "model")
        rng = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
        (aside / f"rank{rank()}.json").write_text(json.dumps({
            "step": step, "processes": world(), "batches": batches.state_dict(), "log": log.file.tell(),
            "rng": [state.tolist() for state in rng]}))
    except dcp.CheckpointException as e:
        problem = "; ".join(f"process {i}: {error}" for i, (error, _) in e.failures.items())
    except (OSError, SafetensorError) as e:
        problem = str(e)
    if add_up(bool(problem))[0]:
        if not rank():
            shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"the checkpoint of step {step} cannot be written to {folder} "
                         f"({problem or 'another process says why'}); those already there are complete: make "
                         "room, then give the same command again")
    if not rank():
        os.replace(aside, folder / f"step-{step:07}")
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    add_up(0)


def load_partial(folder: Path, model, optimizer, batches: Batches) -> int:
    """All but the model's weights, which it was made from. Returns how many steps were done."""
    mine = folder / f"rank{rank()}.json"
    state = read_json(mine if mine.exists() else folder / "rank0.json")
    if state["processes"] != world():
        raise InputError(f"{folder} was saved by {state['processes']} process(es), whose order of samples "
                         f"{world()} cannot continue: start as many, or a new run from its weights, with "
                         f"--init_from {folder}/model and another --out")
    dcp.load(optimizer_tensors(model, optimizer), no_dist=not dist.is_initialized(),
             storage_reader=HuggingFaceStorageReader(str(folder / "optimizer")))
    for moments in optimizer.state.values():
        moments["step"].fill_(state["step"])
    batches.load_state_dict(state["batches"])
    setters = [torch.set_rng_state] + [torch.cuda.set_rng_state] * torch.cuda.is_available()
    for set_state, values in zip(setters, state["rng"], strict=False):
        set_state(torch.tensor(values, dtype=torch.uint8))
    return state["step"]


def newest_partial(folder: Path | None) -> Path | None:
    return max(folder.glob("step-*"), default=None) if folder else None


# ---- a step, and the loop

def backward(model: MonoInternVL, forward, micro: list[dict], total: float, stage: Stage,
             flags: Flags) -> list[Tensor]:
    """Adds the gradients of the mean loss over `total` supervised tokens, those of the whole step and of all
    processes: not a mean of means. Returns the tokens' losses, (supervised,) for each of micro."""
    device, c, token_losses = torch.device(flags.device), model.config, []
    fsdp = isinstance(model, FSDPModule)
    for i, m in enumerate(micro):
        inputs = {k: v.to(device) for k, v in m.items() if isinstance(v, Tensor)}
        if inputs.get("pixel_values") is None and stage.trainable != "text":
            # No tiles, instead of nothing: visual experts take part with no token and get gradients of zero.
            # So all processes exchange the same gradients, whatever samples they have.
            side = c.image_size
            inputs["pixel_values"] = torch.zeros(0, c.num_channels, side, side, device=device)
        last = i + 1 == len(micro)                                         # gradients travel once per step
        if fsdp:
            model.set_requires_gradient_sync(last)
        with (forward.no_sync() if forward is not model and not last else nullcontext(),
              torch.autocast(device.type, torch.bfloat16,                  # FSDP casts by itself
                             enabled=flags.dtype == "bfloat16" and not fsdp)):
            losses = forward(**inputs, reduction="none")[1]
            (losses.sum() * (world() / max(1, total))).backward()          # they are averaged: hence world
        token_losses.append(losses.detach())
    return token_losses


def account(c: MonoInternVLConfig, micro: list[dict], token_losses: list[Tensor]):
    """What this process learned from in a step: (the sum of the losses, their mean by task, the samples whose
    loss is no number, how many of what flop_rates counts)."""
    sums, counts, spoilt, own = defaultdict(float), defaultdict(int), [], defaultdict(int)
    for m, losses in zip(micro, token_losses, strict=True):
        owner, n = sample_numbers(m), len(m["ids"])
        of_label = owner[:, 1:][m["labels"][:, 1:] != -100]                # (supervised,)
        by_sample = torch.zeros(n).index_add_(0, of_label, losses.float().cpu()).tolist()
        labels = of_label.bincount(minlength=n).tolist()
        for sample, task, loss, tokens in zip(m["ids"], m["tasks"], by_sample, labels, strict=True):
            sums[str(task)] += loss
            counts[str(task)] += tokens
            spoilt += [] if math.isfinite(loss) else [sample]
        lengths = owner[owner >= 0].bincount()
        visual = 0 if m["pixel_values"] is None else len(m["pixel_values"]) * c.tokens_per_tile
        for key, value in (("text", int(lengths.sum()) - visual), ("visual", visual),
                           ("labels", len(losses)), ("pairs", int(lengths.square().sum()) / 2)):
            own[key] += value
    return sum(sums.values()), {task: sums[task] / max(1, counts[task]) for task in sums}, spoilt, own


def train_stage(model: MonoInternVL, dataset, stage: Stage, flags: Flags, log: Log, tok: Tokenizer,
                partial: Path | None = None) -> bool:
    """Trains the stage's parameters in place, going on from the newest checkpoint in the folder `partial`.
    True when all steps are done; False after SIGTERM or Ctrl-C, with a checkpoint of the last step."""
    c, device = model.config, torch.device(flags.device)
    batch_size, accum = batch_plan(model, stage, flags)
    steps = stage.steps if flags.steps is None else flags.steps
    select_trainable(model, stage)
    forward = distribute(model, flags)
    trainable = [p for p in model.parameters() if p.requires_grad]      # FSDP made other ones of them
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trainable if p.ndim > 1], "weight_decay": flags.weight_decay},
         {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0}],
        lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    for p in trainable:                                                 # state for trainable parameters only
        optimizer.state[p] = {"step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}

    def on_bad(i: int, error: str):
        tqdm.write(f"bad sample, left out: {error}", file=sys.stderr)
        log.write(event="bad sample", error=error)

    batches = Batches(dataset, batch_size, tok.pad_id, seed=flags.seed, rank=rank(), world_size=world(),
                      workers=flags.workers, pool=flags.pool, on_bad=on_bad,
                      pack_tokens=token_limit(model, stage, flags) if flags.pack else None,
                      max_bad=1.0)                                      # those of all processes count, below
    checkpoint = newest_partial(partial)
    first = load_partial(checkpoint, model, optimizer, batches) if checkpoint else 0
    stop_signals = []

    def on_signal(number, frame):                                       # the step is finished, then saved
        if stop_signals:
            raise KeyboardInterrupt                                     # the second time: at once
        stop_signals.append(number)

    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    board = log.tensorboard(stage.name, first)
    peak = (flags.peak_tflops or 0) * 1e12 or measured_peak(flags)
    rates, source, started, done = flop_rates(model), iter(batches), time.time(), defaultdict(float)
    model.train()
    title = f"{stage.name:4} {sum(p.numel() for p in trainable) / 1e6:.2f} M train"
    bar = tqdm(range(first, steps), title, initial=first, total=steps, unit="step", mininterval=0.5,
               disable=rank() > 0)
    try:
        for step in bar:
            # Samples. If one process has none, all must stop: they would wait for its gradients for ever.
            micro, problem = [], None
            try:
                micro = [next(source) for _ in range(accum)]
            except InputError as e:
                problem = str(e)
            supervised = sum(int((m["labels"][:, 1:] != -100).sum()) for m in micro)
            failed, bad, seen, total = add_up(problem is not None, len(batches.bad), batches.seen, supervised)
            # over the epochs, each process meets the same bad samples: hence size · world
            problem = problem or too_many_bad(int(bad), int(seen), world() * (batches.size or sys.maxsize),
                                              flags.max_bad)
            if problem or failed:
                raise InputError(problem or "another process stopped, its message says why")

            token_losses = backward(model, forward, micro, total, stage, flags)
            norm = whole(torch.nn.utils.clip_grad_norm_(trainable, flags.grad_clip)).item()
            loss_sum, by_task, spoilt, own = account(c, micro, token_losses)
            loss, tokens, visual, stop = add_up(loss_sum, own["text"] + own["visual"], own["visual"],
                                                len(stop_signals))
            loss /= max(1, total)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                everyones = [spoilt]
                if dist.is_initialized():
                    everyones = [None] * world()
                    dist.all_gather_object(everyones, spoilt)
                names = ", ".join(str(name) for names in everyones for name in names) or "none by itself"
                raise InputError(f"the loss of {stage.name} is {loss} at step {step}, the gradient's norm "
                                 f"{norm}; lower --lr, or look at these samples: {names:.2000}")
            lr = learning_rate(step, steps, stage, flags)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()

            # Show it, and keep it.
            done["tokens"] += tokens
            done["visual"] += visual
            done["flop"] += sum(rates[key] * own[key] for key in own)
            seconds = time.time() - started
            shown = {"loss": loss, "lr": lr, "grad_norm": norm,
                     "tokens_per_s": round(done["tokens"] / seconds),
                     "visual_tokens_per_s": round(done["visual"] / seconds),
                     "mfu": round(done["flop"] / seconds / peak, 4), "memory_gb": round(memory_gb(flags), 3)}
            if flags.pack:
                shown["utilisation"] = round(batches.utilisation, 4)        # of the packed rows
            order = zlib.crc32(repr([m["ids"] for m in micro]).encode())
            log.write(stage=stage.name, step=step, **shown, tasks=by_task, order=order)
            if board and step % 10 == 0:
                for name, value in (shown | {f"loss/{task}": v for task, v in by_task.items()}).items():
                    board.add_scalar(name, value, step)
            bar.set_postfix_str(
                f"loss {loss:.3f}" + "".join(f" {task} {value:.2f}" for task, value in by_task.items())
                + f", lr {lr:.1e}, norm {norm:.2f}, {shown['tokens_per_s'] / 1e3:.1f}k tokens/s "
                f"({shown['visual_tokens_per_s'] / 1e3:.1f}k visual), {shown['mfu']:.0%} MFU, "
                f"{shown['memory_gb']:.1f} GB", refresh=False)
            if partial and (stop or (step + 1) % flags.save_every == 0) and step + 1 < steps:
                save_partial(partial, step + 1, model, tok, optimizer, batches, log, flags.keep)
            if stop and step + 1 < steps:
                return False
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if board:
            board.close()
    model.eval()
    return True


# ---------------------------------------------------------------- before a long run: what fits into memory

def memory_plan(model: MonoInternVL, stage: Stage, flags: Flags) -> dict[str, float]:
    """Bytes on one device, by part, for the longest batch. What follows from the parameters is exact; what
    the layers keep for the backward pass is counted by hand. The model may be on the meta device."""
    c, (batch_size, accum) = model.config, batch_plan(model, stage, flags)
    select_trainable(model, stage)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    wide, sharded = getattr(torch, flags.dtype).itemsize, is_sharded(model, flags)
    share = world() if sharded else 1
    plan = {"weights": (4 * trained + wide * frozen) / share, "gradients": 4 * trained / share,
            "optimizer": 8 * trained / share, "copies": wide * trained * (wide < 4)}      # autocast's
    if sharded:        # two layers put together, and all outside of layers; gradients that wait for the last
        layers = model.language_model.model.layers
        layer = sum(p.numel() for p in layers[0].parameters())
        plan["copies"] = wide * (trained + frozen - (len(layers) - 2) * layer) + 4 * trained * (accum > 1)
    T, D, F = token_limit(model, stage, flags), c.hidden_size, c.intermediate_size
    kv, visual = c.num_key_value_heads * c.head_dim, min(T, (stage.max_tiles + 1) * c.tokens_per_tile)
    # Every token: the norms' inputs in float32; qkv, q and k turned, the attention's output, three times F.
    # What learns: the inputs of its four products as well, and if all does, those of the norms' weights.
    layer = T * (8 * D + wide * (3 * D + 3 * kv + 3 * F))
    layer += (visual if stage.trainable == "visual" else T) * wide * (3 * D + F)
    layer += T * wide * 2 * D * (stage.trainable == "all")
    layers = c.num_hidden_layers * layer
    if flags.recompute == "on" or flags.recompute == "auto" and is_big(model):
        layers = c.num_hidden_layers * T * wide * D + layer
    pixels = c.shuffle ** 2 * (4 * c.num_channels * c.patch_size ** 2 + 6 * wide * c.vision_hidden_size)
    logits = (wide + 8) * c.vocab_size * max(T - visual, T // 8)
    return plan | {"activations": batch_size * (layers + visual * pixels + logits)}


def dry_run(model: MonoInternVL, dataset, stages: list[Stage], flags: Flags, tok: Tokenizer):
    """model: on the meta device. Prints what training would need on each device, and a batch as text."""
    print(f"\nMemory per device, GB ({world()} process(es), {flags.dtype}; activations are estimated for the "
          "longest batch):")
    for stage in stages:
        plan = memory_plan(model, stage, flags)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        parts = ", ".join(f"{part} {size / 1e9:.3f}" for part, size in plan.items())
        print(f"{stage.name:6}{trained / 1e6:9.2f} M train: {parts}; together {sum(plan.values()) / 1e9:.2f}")
    size, accum = batch_plan(model, stages[0], flags)
    limit = token_limit(model, stages[0], flags)
    batch = next(iter(Batches(dataset, size, tok.pad_id, seed=flags.seed, pool=flags.pool,
                              pack_tokens=limit if flags.pack else None)))
    print(f"\n{stages[0].name}: {accum} × {world()} × {size} rows a step. The first has the shape "
          f"{tuple(batch['input_ids'].shape)}; what is learned stands in »«:")
    columns = batch["input_ids"][:3], batch["labels"][:3], sample_numbers(batch)[:3] >= 0
    for ids, labels, real in zip(*columns, strict=True):
        text, row = "", zip(ids[real].tolist(), labels[real].tolist(), strict=True)
        for learned, part in itertools.groupby(row, lambda pair: pair[1] != -100):
            part = tok.decode([i for i, _ in part], skip_special_tokens=False)
            text += f"»{part}«" if learned else part
        print(re.sub("(<IMG_CONTEXT>)+", lambda run: f"<IMG_CONTEXT>×{len(run[0]) // 13}", text), "\n")


# ---------------------------------------------------------------- evaluation on held-out pictures

@torch.inference_mode()
def text_probe(model: MonoInternVL, tok: Tokenizer) -> tuple[Tensor, float]:
    """Logits and loss on held-out text. Delta tuning must leave them as they are, bit for bit."""
    batch = collate([World("S0", tok, model.config, split="test")[i] for i in range(64)], tok.pad_id)
    batch = {k: v if v is None else v.to(model.language_model.output.weight.device) for k, v in batch.items()}
    labels = batch.pop("labels")
    return model(**batch)[0], model(**batch, labels=labels)[1].item()


def answer(model: MonoInternVL, tok: Tokenizer, asked: list[tuple[torch.Tensor, str]]) -> list[str]:
    """Greedy answers to (pixel_values, question), in one left-padded batch."""
    end, samples = tok.token_id("<|im_end|>"), []
    for pixels, question in asked:
        ids, labels = encode_conversation(tok, turns("<image>\n" + question), [len(pixels)],
                                          model.config.tokens_per_tile)
        samples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels),
                        "pixel_values": pixels})
    batch = collate(samples, tok.pad_id, left=True)
    del batch["labels"]
    batch = {k: v if v is None else v.to(model.language_model.output.weight.device) for k, v in batch.items()}
    rows = torch.stack(list(model.generate(**batch, max_new_tokens=48, eos_token_id=end)), 1).tolist()
    return [tok.decode(row[:row.index(end)] if end in row else row, skip_special_tokens=False)
            for row in rows]


def evaluate(model: MonoInternVL, tok: Tokenizer, n: int, seed: int = 0) -> tuple[dict, list]:
    """({task: {"accuracy", "blank", "chance"}}, examples): n held-out questions a task, drawn by seed, and
    the same about a grey image, the control which shows that answers come from the picture."""
    c, table, examples = model.config, {}, []
    for task, chance in TASKS.items():
        questions = held_out_questions(task, n, seed)
        table[task] = {"chance": chance}
        for name, shade in (("accuracy", None), ("blank", (64, 64, 64))):
            images = [p.image if shade is None else p.image.copy() for p, _, _ in questions]
            if shade is not None:
                for image in images:
                    image.paste(shade, (0, 0, *image.size))
            pixels = [load_image(image, c.max_dynamic_patch, c.image_size) for image in images]
            answers = answer(model, tok, [(x, q) for x, (_, q, _) in zip(pixels, questions, strict=True)])
            right = [is_correct(task, a, truth) for a, (_, _, truth) in zip(answers, questions, strict=True)]
            table[task][name] = sum(right) / n
            if shade is None:
                examples += [(*questions[i], answers[i], right[i]) for i in range(min(2, n))]
    table["mean"] = {column: sum(row[column] for row in table.values()) / len(TASKS)
                     for column in ("accuracy", "blank", "chance")}
    return table, examples


# ---------------------------------------------------------------- ablations: the paper's claims, tried out

VARIANTS = {                           # of S1.1 and S1.2: what differs from the first
    "delta tuning, 1.5": {},
    "full fine-tuning, 1.5": {"trainable": "all"},
    "delta tuning, v1": {"attn_experts": ""},
    "delta tuning, 1.5, random experts": {"copy_experts": False},
}


def describe(model: MonoInternVL, tok: Tokenizer, n: int) -> dict[str, float]:
    """Which part of held-out pictures, n of a kind, the model describes rightly, and of as many grey ones."""
    def said(caption):                 # in any order, without the words that fill it
        return {frozenset(re.findall(r"\w+", part)) - {"a", "is"} for part in re.split("[.,]", caption)}
    c, right = model.config, {}
    rng = random.Random("test")
    pictures = [make_picture(rng, kind, "test") for kind in KINDS for _ in range(n)]
    for name in ("right", "blank"):
        images = [p.image if name == "right" else Image.new("RGB", p.image.size, "gray") for p in pictures]
        answers = answer(model, tok, [(load_image(image, c.max_dynamic_patch, c.image_size),
                                       "Describe the image.") for image in images])
        pairs = zip(answers, pictures, strict=True)
        right[name] = sum(said(a) == said(p.text) for a, p in pairs) / len(pictures)
    return right


def ablation(flags: Flags, seeds: int = 3) -> dict:
    """Trains each variant through S1.1 and S1.2 on a CPU: from one S0 (or --init_from), on the same samples
    of the embedded world, for as many steps. Writes out/ablation/results.json and returns what it holds."""
    if flags.data:
        raise InputError("--ablation is about the embedded world; drop --data")
    started, out, rows = time.time(), Path(flags.out or "out/ablation"), []
    s0, *stages = RECIPES["evip++"][:3]

    def train(model: MonoInternVL, stage: Stage, flags: Flags, tok: Tokenizer):
        dataset = World(stage.name, tok, model.config, stage.max_tiles, flags.seed)
        if not train_stage(model, dataset, stage, flags, Log(out / "log.jsonl"), tok):
            raise InputError("the ablation was stopped; asked for again, it starts anew")

    for seed in range(flags.seed, flags.seed + seeds):
        flags = replace(flags, seed=seed, device="cpu", dtype="float32")
        torch.manual_seed(seed)
        _, tok, build = origin(flags, s0, True, out)
        llm = build()
        if flags.init_from is None:
            train(llm, s0, flags, tok)
        for name, change in VARIANTS.items():
            print(f"seed {seed}: {name}", flush=True)
            torch.manual_seed(seed)    # new weights, but for the LLM's
            model = MonoInternVL(replace(llm.config, attn_experts=change.get("attn_experts", "qkvo")))
            kept = {n: w for n, w in llm.state_dict().items() if n.startswith("lang") and "_ve." not in n}
            model.load_state_dict(kept, strict=False)
            if change.get("copy_experts", True):
                model.copy_text_experts()
            logits, before = text_probe(model, tok)
            for stage in stages:
                train(model, replace(stage, trainable=change.get("trainable", stage.trainable)), flags, tok)
            logits_after, after = text_probe(model, tok)
            # every sample is new, so the training loss says what is learned; its mean in tenths of S1.2
            steps = flags.steps or stages[-1].steps
            lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()[-steps:]
            tenths = torch.tensor([json.loads(line)["loss"] for line in lines]).tensor_split(min(10, steps))
            rows.append({"variant": name, "seed": seed, "text before": before, "text after": after,
                         "text bitwise equal": torch.equal(logits, logits_after),
                         **describe(model, tok, flags.eval_questions),
                         "caption loss": [tenth.mean().item() for tenth in tenths]})
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(),
               "seconds": time.time() - started, "steps": [flags.steps or stage.steps for stage in stages],
               "batch_size": flags.batch_size or s0.batch, "pictures": len(KINDS) * flags.eval_questions,
               "rows": rows}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    print("\n" + ablation_table(results))
    return results


def ablation_table(results: dict) -> str:
    """Markdown: mean ± standard deviation over the seeds."""
    lines = ["| S1.1 and S1.2 by | text loss before | after | bitwise equal | described rightly | blank image"
             " | caption loss |", "|---|---|---|---|---|---|---|"]
    for name in VARIANTS:
        rows = [{**row, "caption loss": row["caption loss"][-1]} for row in results["rows"]
                if row["variant"] == name]
        cells = ["yes" if all(row["text bitwise equal"] for row in rows) else "no"]
        for column, form in (("text before", ".3f"), ("text after", ".3f"),
                             ("right", ".0%"), ("blank", ".0%"), ("caption loss", ".3f")):
            values = [row[column] for row in rows]
            spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}")
        lines.append("| " + " | ".join([name, *cells[1:3], cells[0], *cells[3:]]) + " |")
    return "\n".join(lines)


# ---------------------------------------------------------------- pictures

def plot_loss(log: Path, path: Path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    losses = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event.get("event") == "run":
            losses = {}                                                 # of the last run only
        elif "loss" in event:
            losses.setdefault(event["stage"], []).append(event["loss"])
    fig, ax = plt.subplots(figsize=(9, 4))
    start = 0
    for stage, values in losses.items():
        smooth, ema = [], values[0]
        for value in values:
            ema = 0.95 * ema + 0.05 * value
            smooth.append(ema)
        line, = ax.plot(range(start, start + len(values)), smooth, label=stage)
        ax.plot(range(start, start + len(values)), values, color=line.get_color(), alpha=0.2, linewidth=0.5)
        start += len(values)
    ax.set(xlabel="optimizer step", ylabel="loss (mean over supervised tokens)", yscale="log")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    plt.close(fig)


def plot_predictions(examples: list, path: Path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    fig, axes = plt.subplots(4, 5, figsize=(15, 12))
    for ax, (picture, question, truth, said, ok) in zip(axes.flat, examples, strict=False):
        ax.imshow(picture.image)
        ax.set_axis_off()
        lines = (question, said) if ok else (question, said, "✗ " + truth)
        ax.set_title("\n".join(textwrap.shorten(line, 42, placeholder="…") for line in lines), fontsize=9,
                     color="darkgreen" if ok else "firebrick")
    fig.tight_layout()
    fig.savefig(path, dpi=90)
    plt.close(fig)


# ---------------------------------------------------------------- main

IMAGE_TOKENS = ("<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>",
                "<ref>", "</ref>", "<box>", "</box>")


def add_image_tokens(folder: Path, to: Path) -> Tokenizer:
    """The tokenizer of a language model, in the folder `to` with the chat and image tokens that it lacks."""
    if not (folder / "tokenizer.model").exists() and (folder / "tokenizer.json").exists():
        raise InputError(f"{folder} has a tokenizer.json only; what is read here is sentencepiece's "
                         "tokenizer.model, as InternLM2, Llama 2 and TinyLlama have it")
    tok = Tokenizer(folder)
    if missing := [token for token in IMAGE_TOKENS if token not in tok.special_tokens]:
        if not rank():
            to.mkdir(parents=True, exist_ok=True)
            for name in TOKENIZER_FILES:
                if (folder / name).exists():
                    shutil.copy(folder / name, to / name)
            added = read_json(to / "added_tokens.json") if (to / "added_tokens.json").exists() else {}
            added |= {token: len(tok) + i for i, token in enumerate(missing)}
            (to / "added_tokens.json").write_text(json.dumps(added, indent=2))
            print(f"{folder}: its tokenizer gets {', '.join(missing)}, ids from {len(tok)} on; their "
                  "embeddings start at the mean of the others")
        add_up(0)
        tok = Tokenizer(to)
    return tok


def origin(flags: Flags, stage: Stage, first: bool, out: Path):
    """(config, tokenizer, a function that makes the model) that a stage begins with: --init_from for the
    first of the run, the stage before it, or for S0 a new model."""
    recipe = PRESETS[flags.preset][flags.recipe]
    if stage.name == "S0" and not flags.init_from:
        if not rank():
            make_world_tokenizer(out / "tokenizer")
        add_up(0)
        tok = Tokenizer(out / "tokenizer")
        config = tiny_config(flags.recipe, tok)
        return config, tok, lambda: MonoInternVL(config)
    before = recipe[max(0, recipe.index(stage) - 1)]
    folder = Path(flags.init_from) if flags.init_from and first else out / before.name
    if before is stage and not flags.init_from:
        raise InputError(f"{stage.name} of --preset {flags.preset} starts from a model: name its folder with "
                         "--init_from")
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no checkpoint to start {stage.name} from: "
                         "run the stages before it, or name a folder with --init_from")
    if read_json(folder / "config.json").get("model_type") in ("internlm2", "llama"):
        tok = add_image_tokens(folder, out / "tokenizer")
        config = MonoInternVLConfig.from_llm(
            folder, attn_experts="qkvo" if flags.recipe == "evip++" else "", bos_token_id=tok.bos_id,
            eos_token_id=tok.eos_id, pad_token_id=tok.pad_id)
        config = replace(config, vocab_size=max(config.vocab_size, len(tok)),
                         img_context_token_id=tok.token_id("<IMG_CONTEXT>"))
        return config, tok, lambda: MonoInternVL.from_llm(folder, config, dtype=None)

    def build() -> MonoInternVL:
        model = MonoInternVL.from_pretrained(folder, dtype=None)
        # EViP begins: vision starts from language
        return model.copy_text_experts() if before.name == "S0" and not flags.init_from else model
    return MonoInternVLConfig.from_json(folder / "config.json"), Tokenizer(folder), build


def delta_verdict(before: MonoInternVL, after: MonoInternVL, stage: Stage, tok: Tokenizer,
                  flags: Flags) -> dict:
    """Did the stage leave all that it freezes, and what the model says about text, as it was, bit for bit?"""
    for model in (before, after):
        select_trainable(model, stage)
        model.to(flags.device, getattr(torch, flags.dtype))              # that of what is frozen
    (old_logits, old_loss), (logits, loss) = (text_probe(model, tok) for model in (before, after))
    weights = dict(before.named_parameters())
    same = [torch.equal(weights[n], p) for n, p in after.named_parameters() if not p.requires_grad]
    return {"text loss before": old_loss, "text loss after": loss, "frozen tensors": len(same),
            "logits bitwise equal": torch.equal(old_logits, logits), "weights bitwise equal": all(same)}


def earlier_run(out: Path, flags: Flags, stages: list[Stage]) -> dict:
    """OUT/run.json: which stages are done. That of a run which was interrupted is gone on with; one that is
    finished, or has saved nothing yet, is started anew."""
    new = {"flags": vars(flags), "finished": False, "done": [], "log": 0, "report": {}}
    partials = [out / f"{stage.name}.partial" for stage in stages]
    run = read_json(out / "run.json") if (out / "run.json").exists() else new
    unfinished = not run["finished"] and (run["done"] or any(map(newest_partial, partials)))
    if unfinished and flags.resume == "auto":
        for name, value in run["flags"].items():
            if name not in FREE_TO_CHANGE and value != getattr(flags, name, value):
                raise InputError(f"{out} holds a run that was interrupted and had --{name} {value}, not "
                                 f"{getattr(flags, name)}: give the same flags to go on, or --resume never "
                                 "to start anew, or another --out")
        say(f"{out} holds a run that was interrupted: it goes on"
            + (f" after {run['done'][-1]}" if run["done"] else "") + " (--resume never starts anew)")
        return run
    if not rank() and not flags.dry_run:
        for folder in partials:
            shutil.rmtree(folder, ignore_errors=True)
    return new


def run(flags: Flags):
    started, recipe = time.time(), PRESETS[flags.preset][flags.recipe]
    names = [stage.name for stage in recipe]
    if unknown := [name for name in flags.stages if name not in names]:
        raise InputError(f"--stages {unknown[0]}: no such stage; there are {', '.join(names)}")
    stages = [s for s in recipe if s.name in (flags.stages or names)]
    if flags.data and stages[0].name == "S0":
        raise InputError("S0 makes the embedded world's own language model; with --data, name other --stages")
    if not flags.data and flags.preset != "tiny":
        raise InputError(f"--preset {flags.preset} learns from your own data: name it with --data")
    for name in ("batch_size", "grad_accum", "pool", "steps", "max_tokens", "save_every", "keep",
                 "eval_questions"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise InputError(f"--{name} is {getattr(flags, name)}, out of range")
    if not 0 <= flags.max_bad <= 1 or flags.workers < 0:
        raise InputError(f"--max_bad is {flags.max_bad}, --workers {flags.workers}: out of range")
    if flags.device == "auto":
        flags.device = "cuda" if torch.cuda.is_available() else "cpu"
    if flags.device == "cuda":         # torchrun numbers the processes of a machine: each takes its GPU
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise InputError(f"process {local} has no GPU: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(local)
        flags.device = f"cuda:{local}"
    if flags.dtype == "auto":          # on a CPU the casts cost the tiny model more than bfloat16 gains
        has_bf16 = flags.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        flags.dtype = "bfloat16" if has_bf16 else "float32"
    if world() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if flags.device.startswith("cuda") else "gloo")
    out = Path(flags.out or f"out/{flags.recipe}" + f"-{flags.preset}" * (flags.preset != "tiny"))
    torch.manual_seed(flags.seed)
    progress = earlier_run(out, flags, stages)
    add_up(0)                          # all have read it: now it may change
    report = progress["report"] | {"recipe": flags.recipe, "seed": flags.seed, "torch": torch.__version__}
    todo = [stage for stage in stages if stage.name not in progress["done"]]

    def load_data(stage: Stage, tok: Tokenizer, config: MonoInternVLConfig):
        limit = flags.max_tokens or stage.max_tokens
        return load_meta(flags.data, tok, config, stage.max_tiles, limit, flags.seed) \
            if flags.data else World(stage.name, tok, config, stage.max_tiles, flags.seed)

    with tempfile.TemporaryDirectory() if flags.dry_run else nullcontext(out) as folder:
        next_ = (todo or stages)[0]
        config, tok, build = origin(flags, next_, next_ is stages[0], Path(folder))
        with torch.device("meta"):
            model = MonoInternVL(config)
        counts = model.parameter_counts()
        total, text, visual = (counts[key] / 1e6 for key in ("total", "text", "visual"))
        say(f"{flags.recipe}: {total:.2f} M parameters, {text:.2f} M for a text token, {visual:.2f} M for a "
            f"visual token; {world()} process(es), {flags.device}, {flags.dtype}, {torch.get_num_threads()} "
            f"threads; writes {out}/")
        say(f"{'stage':6}{'learns':34}{'trains':20}{'tiles':>5}{'steps':>8}{'batch':>7}{'lr':>8}"
            "  2B model in the paper")
        for s in stages:
            size, accum = batch_plan(model, s, flags)
            say(f"{s.name:6}{s.goal:34}{s.trainable:20}{s.max_tiles:5}{flags.steps or s.steps:8}"
                f"{size * accum * world():7}{flags.lr or s.lr:8.0e}  {s.paper}"
                + ("  (done)" if s not in todo else ""))
        if flags.dry_run:
            if not rank():
                dry_run(model, load_data(stages[0], tok, config), stages, flags, tok)
            return

    def write_progress():
        if not rank():
            (out / "run.json.tmp").write_text(json.dumps(progress, indent=2))
            os.replace(out / "run.json.tmp", out / "run.json")

    partial = newest_partial(out / f"{todo[0].name}.partial") if todo else None
    keep = progress["log"] if progress["done"] and not rank() else None
    if partial and (partial / f"rank{rank()}.json").exists():
        keep = read_json(partial / f"rank{rank()}.json")["log"]
    log = Log(out / "log.jsonl", keep)
    log.write(event="resume" if progress["done"] or partial else "run", flags=vars(flags))
    progress["flags"] = progress["flags"] | vars(flags)
    write_progress()
    for stage in todo:
        if stage is not todo[0]:
            config, tok, build = origin(flags, stage, stage is stages[0], out)
        partial = newest_partial(out / f"{stage.name}.partial")
        model = MonoInternVL.from_pretrained(partial / "model", dtype=None) if partial else build()
        dataset = load_data(stage, tok, config)
        if not train_stage(model, dataset, stage, flags, log, tok, out / f"{stage.name}.partial"):
            say(f"stopped; {out}/{stage.name}.partial is complete: the same command goes on from there")
            return
        save(model, tok, out / stage.name)
        del model
        if stage.trainable == "visual" and not rank():
            after = MonoInternVL.from_pretrained(out / stage.name, dtype=None)
            verdict = report[stage.name] = delta_verdict(build(), after, stage, tok, flags)
            print(f"{stage.name}: text loss {verdict['text loss before']:.6f} before, "
                  f"{verdict['text loss after']:.6f} after; bitwise equal: text logits "
                  f"{verdict['logits bitwise equal']}, {verdict['frozen tensors']} frozen tensors "
                  f"{verdict['weights bitwise equal']}")
        progress["done"].append(stage.name)
        progress |= {"log": log.file.tell(), "report": report}
        write_progress()
        add_up(0)
        if not rank():
            shutil.rmtree(out / f"{stage.name}.partial", ignore_errors=True)
    if rank():
        return
    report["train seconds"] = time.time() - started
    plot_loss(out / "log.jsonl", out / "loss.png")
    if not flags.data and stages[-1].name == "S2":
        model = MonoInternVL.from_pretrained(out / "S2", device=flags.device)
        report["tasks"], examples = evaluate(model, Tokenizer(out / "S2"), flags.eval_questions)
        plot_predictions(examples, out / "predictions.png")
        print(f"\n{'task':10}{'held-out':>10}{'blank image':>13}{'chance':>8}")
        for task, row in report["tasks"].items():
            print(f"{task:10}{row['accuracy']:10.1%}{row['blank']:13.1%}{row['chance']:8.1%}")
    report["seconds"] = time.time() - started
    (out / "results.json").write_text(json.dumps(report, indent=2))
    progress["finished"] = True
    write_progress()
    print(f"\n{report['seconds']:.0f} s. {out}/ has a checkpoint a stage, results.json, log.jsonl, loss.png")
    if "tasks" in report:
        print("and predictions.png. Ask it: python sample.py --image FILE --prompt \"Describe the image.\"")


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(Flags, argv, __doc__.split("\n")[0])
    try:
        (ablation if flags.ablation else run)(flags)
    except (InputError, OSError, SafetensorError) as e:                # such as: no space left on device
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; what was saved is complete: the same command goes on from there", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
