"""Ablations of the papers' claims: train all weights, drop the attention experts, or start experts at random.

    python ablation.py                         # the embedded world, the tiny language model: an hour on a CPU
    python ablation.py --data icons            # real pictures and SmolLM2-135M, as icons.py prepares them

Each variant starts from the same language model and learns from the same samples in the same order.
OUT/results.json keeps a row per run. This file holds, in this order: the variants; the embedded world (drawn
by world.py); real pictures; the table; main.
"""
import itertools
import json
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import train_evip
from common import InputError, flag, parse_flags, read_json, table
from data import Tokenizer, load_tiles
from evaluate import answer, described_rightly, text_probe
from icons import Icons, Pictures, plain_scene
from icons_exam import documentation_loss
from mono_internvl import MonoInternVL
from world import KINDS, World

# ---------------------------------------------------------------- the variants

# How S1.1 and S1.2 differ from the paper: {} for the first, which is the paper's way.
VARIANTS = {
    "delta tuning, 1.5": {},
    "full fine-tuning, 1.5": {"trainable": "all"},
    "delta tuning, v1": {"attn_experts": ""},
    "delta tuning, 1.5, random experts": {"copy_experts": False},
}
# Learning rates to try with real pictures, so that each variant can be judged by its best of three.
ICON_LRS = 6e-4, 3e-4, 1.2e-3
ICON_LRS_OF_ALL = 1e-4, 3e-5, 3e-4     # of full fine-tuning


@dataclass
class Flags:
    seeds: int = flag(3, "number of seeds")
    seed: int = flag(0, "first seed")
    steps: int | None = flag(None, "optimizer steps of each stage (default: the recipe's; with --data 400)")
    eval_questions: int = flag(100, "held-out pictures of each kind, of the embedded world")
    data: str | None = flag(None, "folder of icons.py: compare on its pictures and language model")
    things: int = flag(60, "things to learn with --data: a third from each group")
    out: str | None = flag(None, "folder of the run (default: out/ablation, with --data out/ablation_icons)")


def train_variant(change: dict, llm: MonoInternVL, tok: Tokenizer, train, stages: list, look,
                  text_loss=None) -> dict:
    """Trains a copy of the language model through the stages and returns what was measured. change: a value
    of VARIANTS. train(model, stage, tok): trains in place, and returns the loss of each step. look(model):
    measures what the model sees; its fields join the result. text_loss(model, tok): the loss on text (None:
    that of the embedded world's texts)."""
    model = MonoInternVL(replace(llm.config, attn_experts=change.get("attn_experts", "qkvo")))
    model.load_state_dict({name: weight for name, weight in llm.state_dict().items()
                           if name.startswith("language_model") and "_ve." not in name}, strict=False)
    if change.get("copy_experts", True):
        model.copy_text_experts()
    weight = llm.language_model.output.weight
    logits, before = text_probe(model.to(weight.device, weight.dtype), tok)
    before = text_loss(model, tok) if text_loss else before
    for stage in stages:
        losses = train(model, replace(stage, trainable=change.get("trainable", stage.trainable)), tok)
    logits_after, after = text_probe(model.to(weight.dtype), tok)
    after = text_loss(model, tok) if text_loss else after
    # Every sample is new, so the training loss tells what was learned: its mean in each tenth of S1.2.
    tenths = torch.tensor(losses).tensor_split(min(10, len(losses)))
    return {"text before": before, "text after": after,
            "text bitwise equal": torch.equal(logits, logits_after), **look(model),
            "caption loss": [tenth.mean().item() for tenth in tenths]}


def train_logged(model: MonoInternVL, dataset, stage, flags: train_evip.Flags, tok: Tokenizer) -> list[float]:
    """Trains a stage and returns the loss of each step."""
    log = Path(flags.out) / "log.jsonl"
    if not train_evip.train_stage(model, dataset, stage, flags, train_evip.Progress(log), tok):
        raise InputError("the ablation was stopped; the same command starts it again, with --data after the "
                         "runs that are finished")
    lines = log.read_text(encoding="utf-8").splitlines()[-(flags.steps or stage.steps):]
    return [json.loads(line)["loss"] for line in lines]


# ---------------------------------------------------------------- the embedded world

def ablation(flags: train_evip.Flags, seeds: int = 3) -> dict:
    """Trains each variant through S1.1 and S1.2 on a CPU, with the same samples of the embedded world and
    numbers of steps. All variants of a seed start from one language model: that of S0, or init_from. Writes
    OUT/results.json and returns what it holds."""
    started, rows = time.time(), []
    flags = replace(flags, device="cpu", dtype="float32", out=flags.out or "out/ablation")
    s0, *stages = train_evip.RECIPES["evip++"][:3]
    for seed in range(flags.seed, flags.seed + seeds):
        flags = replace(flags, seed=seed)

        def train(model, stage, tok, flags=flags):
            dataset = World(stage.name, tok, model.config, stage.max_tiles, flags.seed)
            return train_logged(model, dataset, stage, flags, tok)

        torch.manual_seed(seed)
        _, tok, build = train_evip.origin(flags, s0, True, Path(flags.out))
        llm = build()
        if flags.init_from is None:
            train(llm, s0, tok)
        for name, change in VARIANTS.items():
            print(f"seed {seed}: {name}", flush=True)
            torch.manual_seed(seed)                # new weights for all but the LLM
            rows.append({"variant": name, "seed": seed, **train_variant(
                change, llm, tok, train, stages,
                lambda model, tok=tok, n=flags.eval_questions: described_rightly(model, tok, n))})
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows,
               "seconds": time.time() - started, "steps": [flags.steps or stage.steps for stage in stages],
               "batch_size": flags.batch_size or s0.batch, "pictures": len(KINDS) * flags.eval_questions}
    (Path(flags.out) / "results.json").write_text(json.dumps(results, indent=1))
    return results


# ---------------------------------------------------------------- real pictures and a real language model

def choose_things(data: Path, out: Path, n: int):
    """Makes `out` a folder like `data` that has only n of its things, n // 3 of each of the three groups.
    They are spread evenly over the list of a group."""
    index, kept = read_json(data / "index.json", "; python icons.py makes it"), set()
    for group in {thing["group"]: None for thing in index["things"]}:
        numbers = [i for i, thing in enumerate(index["things"])
                   if thing["group"] == group and not thing["held_out"]]
        kept |= {numbers[i * len(numbers) // (n // 3)] for i in range(n // 3)}
    index["pictures"] = [picture for picture in index["pictures"] if picture["thing"] in kept]
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.json").write_text(json.dumps(index))
    if not (out / "pictures").exists():
        (out / "pictures").symlink_to((data / "pictures").resolve(), target_is_directory=True)


def named_rightly(model: MonoInternVL, tok: Tokenizer, folder: Path) -> dict:
    """Asks the model to name one picture of each thing, once from an icon set (a "hand") that it was trained
    on, and once from the one that it never saw. Returns what it "said" and the share of right names."""
    found = {}
    for column, split in ("seen hand", "train"), ("unseen hand", "test"):
        pictures = Pictures(folder, split)
        chosen = [(thing, sources[0]) for thing, sources in pictures.drawings.items()]
        said = answer(model, tok, [(load_tiles(pictures.draw(plain_scene(source, 48)), 1, 48),
                                    "What is this?") for _, source in chosen])
        found[column] = [[pictures.name(thing), text] for (thing, _), text in zip(chosen, said, strict=True)]
    return {"said": found, **{column: sum(name == text for name, text in pairs) / len(pairs)
                              for column, pairs in found.items()}}


def icon_run(flags: train_evip.Flags, folder: Path, name: str) -> dict:
    """Trains a variant through S1.2 with flags.lr and flags.seed on the pictures in `folder`. Returns a row
    of OUT/results.json."""
    stage = next(s for s in train_evip.ICONS if s.name == "S1.2")
    _, tok, build = train_evip.origin(flags, stage, True, Path(flags.out))
    tok.system_message = ""                        # captions come without one, so ask without one, too

    def train(model, stage, tok):
        dataset = Icons(folder, stage.name, tok, model.config, 1, flags.seed)
        return train_logged(model, dataset, stage, flags, tok)

    print(f"seed {flags.seed}: {name}, learning rate {flags.lr:g}", flush=True)
    llm = build().to(flags.device)
    torch.manual_seed(flags.seed)                  # new weights for all but the LLM
    row = {"variant": name, "lr": flags.lr, "seed": flags.seed, **train_variant(
        VARIANTS[name], llm, tok, train, [stage], lambda model: named_rightly(model, tok, folder),
        documentation_loss)}
    print({key: value for key, value in row.items() if key != "said"}, flush=True)
    return row


def icon_ablation(flags: train_evip.Flags, things: int, seeds: int) -> dict:
    """Trains each variant through S1.2 on a few things of a folder that icons.py has prepared: with three
    learning rates, and with the best of them for each further seed. OUT/results.json gets each row at once,
    so the same command continues after a stop."""
    train_evip.choose_device(flags)
    out, folder = Path(flags.out), Path(flags.out) / "few"
    choose_things(Path(flags.data), folder, things)
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "things": things,
               "steps": flags.steps, "batch_size": flags.batch_size, "dtype": flags.dtype,
               "device": flags.device, "rows": []}
    if (out / "results.json").exists():
        earlier = read_json(out / "results.json")
        same = all(earlier.get(key) == value for key, value in results.items() if key != "rows")
        results["rows"] = earlier["rows"] if same else []
    done = {(row["variant"], row["lr"], row["seed"]) for row in results["rows"]}
    for seed, (name, change) in itertools.product(range(flags.seed, flags.seed + seeds), VARIANTS.items()):
        lrs = ICON_LRS_OF_ALL if "trainable" in change else ICON_LRS
        if seed > flags.seed:
            lrs = [best_lr([row for row in results["rows"]
                            if row["variant"] == name and row["seed"] == flags.seed])]
        for lr in lrs:
            if (name, lr, seed) not in done:
                results["rows"].append(icon_run(replace(flags, seed=seed, lr=lr), folder, name))
                (out / "results.json").write_text(json.dumps(results, indent=1))
    return results


# ---------------------------------------------------------------- the table

def best_lr(rows: list[dict]) -> float | None:
    """Of the runs of one variant: the learning rate with the lowest caption loss at the end, with the first
    seed, which has tried several."""
    first = min(row["seed"] for row in rows)
    return min((row for row in rows if row["seed"] == first),
               key=lambda row: row["caption loss"][-1]).get("lr")


def ablation_table(results: dict) -> str:
    """A line per variant. Of several learning rates it shows the best, so that no variant is judged by a rate
    that does not suit it."""
    def mean(rows, key, form):
        values = [row[key][-1] if key == "caption loss" else row[key] for row in rows]
        deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.mean(values):{form}}{deviation}"

    lines = []
    for name in VARIANTS:
        rows = [row for row in results["rows"] if row["variant"] == name]
        if not rows:
            continue
        lr = best_lr(rows)
        rows = [row for row in rows if row.get("lr") == lr]
        line = {"S1.2 by": name, "learning rate": f"{lr:g}"} if lr else {"S1.1 and S1.2 by": name}
        line |= {"text loss before": mean(rows, "text before", ".3f"),
                 "after": mean(rows, "text after", ".3f"),
                 "bitwise equal": "yes" if all(row["text bitwise equal"] for row in rows) else "no"}
        shown = {"seen hand": "names right, seen hand", "unseen hand": "unseen hand"} if lr else {
            "right": "described rightly", "blank": "blank image"}
        line |= {heading: mean(rows, key, ".0%") for key, heading in shown.items()}
        lines.append(line | {"caption loss": mean(rows, "caption loss", ".3f")})
    return table(lines)


# ---------------------------------------------------------------- main

def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(Flags, argv, __doc__.split("\n\n")[0])
    own = train_evip.Flags(steps=flags.steps, eval_questions=flags.eval_questions, seed=flags.seed,
                           out=flags.out or "out/ablation" + "_icons" * bool(flags.data))
    try:
        if flags.seeds < 1 or flags.things < 6:    # as many of each of three groups
            raise InputError(f"--seeds is {flags.seeds}, expected at least 1; --things {flags.things}, "
                             "expected at least 6")
        if flags.data is None:
            print(ablation_table(ablation(own, flags.seeds)))
        else:
            own = replace(own, preset="icons", data=flags.data, init_from=f"{flags.data}/llm",
                          batch_size=16, steps=flags.steps or 400)
            print(ablation_table(icon_ablation(own, flags.things, flags.seeds)))
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
