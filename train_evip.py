"""EViP and EViP++: how a language model learns to see without forgetting how to read, in one script.

    python train_evip.py                                  # tiny Mono-InternVL-1.5, every stage, 2 CPU cores
    python train_evip.py --recipe evip                    # Mono-InternVL (v1): no visual attention experts
    python train_evip.py --stages S1.3 S2                 # some stages, from the checkpoint before them
    python train_evip.py --data meta.json --init_from FOLDER --stages S2          # your own data

Read RECIPES first: the table of stages is the paper. Then: one stage, the evaluation, the pictures, main.
Each stage leaves a checkpoint in the official format in out/RECIPE/STAGE/, and log.jsonl has every step.
"""
import copy
import json
import math
import re
import shutil
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import (
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
    make_world_tokenizer,
    parse_flags,
    turns,
)
from mono_internvl import InputError, MonoInternVL, MonoInternVLConfig

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


S0 = Stage("S0", "language, from text alone", "text", 1, 300, 1e-3, "cosine", "a pre-trained InternLM2-1.8B")
CONCEPT, SEMANTIC = "concepts, from noisy alt texts", "semantics, from clean captions"
ALIGN, INSTRUCT = "alignment: captions, boxes, OCR", "instructions: questions in turns"
RECIPES = {
    "evip": (                                         # Mono-InternVL [v1]
        S0,
        Stage("S1.1", CONCEPT, "visual", 4, 700, 1e-3, "constant", "922 M, 2e-4 constant (?)"),
        Stage("S1.2", SEMANTIC, "visual", 6, 1500, 1e-3, "constant", "258 M, 1e-4 (?)"),
        Stage("S1.3", ALIGN, "visual + attention", 12, 300, 1e-3, "constant", "143 M, 5e-5"),
        Stage("S2", INSTRUCT, "all", 24, 1900, 1e-3, "cosine", "5-7 M, 4e-5 cosine")),
    "evip++": (                                       # Mono-InternVL-1.5, with 58 % less data [v1.5]
        S0,
        Stage("S1.1", CONCEPT, "visual", 4, 200, 1e-3, "constant", "250 M (?)"),
        Stage("S1.2", SEMANTIC, "visual", 6, 900, 1e-3, "constant", "150 M (?)"),
        Stage("S1.3", ALIGN, "visual + attention", 12, 300, 1e-3, "constant", "150 M"),
        Stage("S2", INSTRUCT, "all", 24, 1900, 1e-3, "cosine", "7 M")),
}


def tiny_config(recipe: str, tok: Tokenizer) -> MonoInternVLConfig:
    """About a million parameters; pictures of 48 pixels become 3×3 visual tokens."""
    return MonoInternVLConfig(
        vocab_size=len(tok), hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
        rope_theta=100.0,                                               # texts are short: fast rotations
        attn_experts="qkvo" if recipe == "evip++" else "", vision_hidden_size=48, patch_size=8, image_size=48,
        max_dynamic_patch=2, bos_token_id=tok.bos_id, eos_token_id=tok.eos_id, pad_token_id=tok.pad_id,
        img_context_token_id=tok.token_id("<IMG_CONTEXT>"))


@dataclass
class Flags:
    recipe: str = flag("evip++", "evip (v1) or evip++ (1.5)", choices=list(RECIPES))
    stages: list[str] = flag([], "stages to run, e.g. S1.3 S2 (default: all)")
    out: str | None = flag(None, "folder of the run (default: out/RECIPE)")
    init_from: str | None = flag(None, "checkpoint to start from (default: the stage before, or nothing)")
    data: str | None = flag(None, "meta.json of your own data (default: the embedded world)")
    batch_size: int = flag(16, "samples per forward pass")
    grad_accum: int = flag(1, "forward passes per optimizer step")
    steps: int | None = flag(None, "optimizer steps of each stage (default: as in the table)")
    lr: float | None = flag(None, "peak learning rate of each stage (default: as in the table)")
    warmup: float = flag(0.03, "part of the steps over which the learning rate rises")
    weight_decay: float = flag(0.01, "AdamW's, on matrices")
    grad_clip: float = flag(1.0, "largest norm of the gradient")
    max_tokens: int | None = flag(None, "longest sample (default: the model's context)")
    max_bad: float = flag(0.01, "part of the samples that may be unreadable before training stops")
    seed: int = flag(0, "of weights, samples and their order")
    device: str = flag("auto", "cpu, cuda, ...; auto is cuda if there is one")
    dtype: str = flag("auto", "of the forward pass (autocast; weights stay float32); auto is bfloat16 on "
                      "GPUs that have it", choices=["auto", "float32", "bfloat16"])
    moe: str = flag("auto", "back end of the experts", choices=["auto", "dense", "torch", "cuda"])
    eval_questions: int = flag(100, "held-out questions per task at the end")


# ---------------------------------------------------------------- one stage

class Log:
    """log.jsonl, a line per event; also what loss.png is drawn from."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a", encoding="utf-8")

    def write(self, **event):
        self.file.write(json.dumps(event) + "\n")
        self.file.flush()


def batches(dataset, flags: Flags, pad_id: int, log: Log) -> Batches:
    """The training samples. An unreadable one is named, counted and left out; more than max_bad of them stop
    the training."""
    def on_bad(i: int, error: str):
        tqdm.write(f"bad sample, left out: {error}", file=sys.stderr)
        log.write(event="bad sample", error=error)
    return Batches(dataset, flags.batch_size, pad_id, seed=flags.seed, max_bad=flags.max_bad, on_bad=on_bad)


def select_trainable(model: MonoInternVL, stage: Stage) -> list[torch.nn.Parameter]:
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(TRAINABLE[stage.trainable], name) is not None)
        p.grad = None
    return [p for p in model.parameters() if p.requires_grad]


def learning_rate(step: int, steps: int, stage: Stage, flags: Flags) -> float:
    warmup = max(1, round(flags.warmup * steps))
    peak = stage.lr if flags.lr is None else flags.lr
    if step < warmup:
        return peak * (step + 1) / warmup
    if stage.schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_stage(model: MonoInternVL, dataset, stage: Stage, flags: Flags, log: Log, pad_id: int):
    """Trains the stage's parameters in place; float32 weights, autocast if flags.dtype says so."""
    device = next(model.parameters()).device
    trainable = select_trainable(model, stage)
    optimizer = torch.optim.AdamW(                                      # state for trainable parameters only
        [{"params": [p for p in trainable if p.ndim > 1], "weight_decay": flags.weight_decay},
         {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0}],
        lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=True)
    steps = stage.steps if flags.steps is None else flags.steps
    source, started, tokens = iter(batches(dataset, flags, pad_id, log)), time.time(), 0
    model.train()
    bar = tqdm(range(steps), desc=f"{stage.name:4} {sum(p.numel() for p in trainable) / 1e6:.2f} M train",
               unit="step", mininterval=0.5)
    for step in bar:
        micro = [next(source) for _ in range(flags.grad_accum)]
        # the mean is over the supervised tokens of the whole step, not a mean of the micro-batches' means
        counts = [int((m["labels"][:, 1:] != -100).sum()) for m in micro]
        loss = 0.0
        for m, count in zip(micro, counts, strict=True):
            m = {k: v.to(device) for k, v in m.items() if isinstance(v, Tensor)}
            with torch.autocast(device.type, torch.bfloat16, enabled=flags.dtype == "bfloat16"):
                part = model(**m)[1] * (count / max(1, sum(counts)))
            part.backward()
            loss += part.item()
            mask = m.get("attention_mask")
            tokens += m["input_ids"].numel() if mask is None else int(mask.sum())
        if not math.isfinite(loss):
            raise InputError(f"the loss of {stage.name} is {loss} at step {step}; lower --lr")
        norm = torch.nn.utils.clip_grad_norm_(trainable, flags.grad_clip).item()
        lr = learning_rate(step, steps, stage, flags)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        rate = tokens / (time.time() - started)
        bar.set_postfix_str(f"loss {loss:.3f}, {rate / 1e3:.1f}k tokens/s")
        log.write(stage=stage.name, step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=round(rate))
    model.eval()


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
    rows = torch.stack(list(model.generate(**batch, max_new_tokens=40, eos_token_id=end)), 1).tolist()
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

def start(flags: Flags, stages: list[Stage], out: Path) -> tuple[MonoInternVL, Tokenizer]:
    """The model to begin with, and its tokenizer: --init_from, or the stage before, or a new one for S0."""
    recipe = RECIPES[flags.recipe]
    if flags.init_from is None and stages[0] is recipe[0]:
        tok = make_world_tokenizer(out / "tokenizer")
        return MonoInternVL(tiny_config(flags.recipe, tok)), tok
    folder = Path(flags.init_from or out / recipe[recipe.index(stages[0]) - 1].name)
    if not (folder / "config.json").exists():
        raise InputError(f"{folder} holds no checkpoint to start {stages[0].name} from: "
                         "run the stages before it, or name a folder with --init_from")
    is_llm = json.loads((folder / "config.json").read_text()).get("model_type") == "internlm2"
    return (MonoInternVL.from_llm if is_llm else MonoInternVL.from_pretrained)(folder), Tokenizer(folder)


def save(model: MonoInternVL, tok: Tokenizer, folder: Path):
    for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (tok.folder / name).exists() and tok.folder != folder:
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(tok.folder / name, folder / name)
    model.save_pretrained(folder)      # config.json comes last: a folder that has it is complete


def run(flags: Flags):
    started, recipe = time.time(), RECIPES[flags.recipe]
    names = [stage.name for stage in recipe]
    if unknown := [name for name in flags.stages if name not in names]:
        raise InputError(f"--stages {unknown[0]}: no such stage; there are {', '.join(names)}")
    stages = [s for s in recipe if s.name in (flags.stages or names)]
    if flags.data and stages[0].name == "S0":
        raise InputError("S0 makes the embedded world's own language model; with --data, name other --stages")
    for name, fits in (("batch_size", flags.batch_size > 0), ("grad_accum", flags.grad_accum > 0),
                       ("steps", flags.steps is None or flags.steps > 0),
                       ("max_bad", 0 <= flags.max_bad <= 1), ("eval_questions", flags.eval_questions > 0)):
        if not fits:
            raise InputError(f"--{name} is {getattr(flags, name)}, out of range")
    if flags.device == "auto":
        flags.device = "cuda" if torch.cuda.is_available() else "cpu"
    if flags.dtype == "auto":          # on a CPU the casts cost the tiny model more than bfloat16 gains
        has_bf16 = flags.device.startswith("cuda") and torch.cuda.is_bf16_supported()
        flags.dtype = "bfloat16" if has_bf16 else "float32"
    out = Path(flags.out or f"out/{flags.recipe}")
    torch.manual_seed(flags.seed)
    model, tok = start(flags, stages, out)
    model.to(flags.device)
    model.moe = flags.moe
    counts = model.parameter_counts()
    total, text, visual = (counts[key] / 1e6 for key in ("total", "text", "visual"))
    print(f"{flags.recipe}: {total:.2f} M parameters, {text:.2f} M for a text token, {visual:.2f} M for a "
          f"visual token; {flags.device}, {flags.dtype}, {torch.get_num_threads()} threads; writes {out}/")
    print(f"{'stage':6}{'learns':34}{'trains':20}{'tiles':>5}{'steps':>7}{'lr':>8}  2B model in the paper")
    for s in stages:
        print(f"{s.name:6}{s.goal:34}{s.trainable:20}{s.max_tiles:5}{flags.steps or s.steps:7}"
              f"{flags.lr or s.lr:8.0e}  {s.paper}")
    log = Log(out / "log.jsonl")
    log.write(event="run", flags=vars(flags))
    report = {"recipe": flags.recipe, "seed": flags.seed, "torch": torch.__version__}
    for stage in stages:
        if stage.name == "S1.1" and flags.init_from is None:
            model.copy_text_experts()  # EViP begins: vision starts from language
        delta = stage.trainable == "visual"
        before = (copy.deepcopy(model.state_dict()), *text_probe(model, tok)) if delta else None
        dataset = load_meta(flags.data, tok, model.config, stage.max_tiles, flags.max_tokens, flags.seed) \
            if flags.data else World(stage.name, tok, model.config, stage.max_tiles, flags.seed)
        train_stage(model, dataset, stage, flags, log, tok.pad_id)
        save(model, tok, out / stage.name)
        if delta:
            weights, logits, loss = before
            frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
            after_logits, after_loss = text_probe(model, tok)
            same_logits = torch.equal(logits, after_logits)
            same_weights = all(torch.equal(weights[n], model.get_parameter(n)) for n in frozen)
            report[stage.name] = {"text loss before": loss, "text loss after": after_loss,
                                  "logits bitwise equal": same_logits, "weights bitwise equal": same_weights}
            print(f"{stage.name}: text loss {loss:.6f} before, {after_loss:.6f} after; bitwise equal: "
                  f"text logits {same_logits}, {len(frozen)} frozen tensors {same_weights}")
    report["train seconds"] = time.time() - started
    plot_loss(out / "log.jsonl", out / "loss.png")
    if not flags.data and stages[-1].name == "S2":
        report["tasks"], examples = evaluate(model, tok, flags.eval_questions)
        plot_predictions(examples, out / "predictions.png")
        print(f"\n{'task':10}{'held-out':>10}{'blank image':>13}{'chance':>8}")
        for task, row in report["tasks"].items():
            print(f"{task:10}{row['accuracy']:10.1%}{row['blank']:13.1%}{row['chance']:8.1%}")
    report["seconds"] = time.time() - started
    (out / "results.json").write_text(json.dumps(report, indent=2))
    print(f"\n{report['seconds']:.0f} s. {out}/ has a checkpoint a stage, results.json, log.jsonl, loss.png")
    if "tasks" in report:
        print("and predictions.png. Ask it: python sample.py --image FILE --prompt \"Describe the image.\"")


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(Flags, argv, __doc__.split("\n")[0])
    try:
        run(flags)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; finished stages are saved", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
