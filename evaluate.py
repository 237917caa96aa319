"""Asks a model about held-out pictures of the embedded world, and about grey ones as a control.

    python evaluate.py                                     # the newest checkpoint below out/
    python evaluate.py --model assets/tiny --questions 300 --seed 20261124

In this order: the flags, answers in batches, the probe of text, accuracy per task, descriptions, plots, main.
"""
import itertools
import json
import random
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from checkpoint import newest_checkpoint
from common import InputError, flag, parse_flags
from data import Tokenizer, collate, encode_conversation, load_image, turns
from mono_internvl import MonoInternVL
from world import KINDS, TASKS, World, held_out_questions, is_correct, make_picture


@dataclass
class Flags:
    model: str | None = flag(None, "checkpoint folder (None: the newest below out/)")
    questions: int = flag(100, "held-out questions per task")
    seed: int = flag(0, "another seed asks other questions")
    device: str = flag("cpu", "cpu, cuda, cuda:1, ...")


def answer(model: MonoInternVL, tok: Tokenizer, asked: list[tuple[Tensor, str]]) -> list[str]:
    """Greedy answers to (pixel_values (n_tiles, 3, S, S), question) pairs, in one left-padded batch."""
    end, samples, device = tok.token_id("<|im_end|>"), [], model.language_model.output.weight.device
    for pixels, question in asked:
        ids, labels = encode_conversation(tok, turns("<image>\n" + question), [len(pixels)],
                                          model.config.tokens_per_tile)
        samples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels),
                        "pixel_values": pixels})
    batch = collate(samples, tok.pad_id, left=True)
    del batch["labels"]
    batch = {name: t if t is None else t.to(device) for name, t in batch.items()}
    tokens = model.generate(**batch, max_new_tokens=48, eos_token_id=end, num_tokens=len(tok))
    rows = torch.stack(list(tokens), 1).tolist()
    return [tok.decode(row[:row.index(end)] if end in row else row, skip_special_tokens=False)
            for row in rows]


@torch.inference_mode()
def text_probe(model: MonoInternVL, tok: Tokenizer) -> tuple[Tensor, float]:
    """Logits and loss on held-out text. Delta tuning must leave them as they are, bit for bit."""
    batch = collate([World("S0", tok, model.config, split="test")[i] for i in range(64)], tok.pad_id)
    batch = {k: v if v is None else v.to(model.language_model.output.weight.device) for k, v in batch.items()}
    labels = batch.pop("labels")
    return model(**batch)[0], model(**batch, labels=labels)[1].item()


def delta_verdict(before: MonoInternVL, after: MonoInternVL, trained: set[str], tok: Tokenizer,
                  title: str) -> dict:
    """Did a stage that trained these parameters leave all others, and what the model says about text, as they
    were, bit for bit? Both models are on one device and in one dtype."""
    (old_logits, old_loss), (logits, loss) = text_probe(before, tok), text_probe(after, tok)
    weights = dict(before.named_parameters())
    same = [torch.equal(weights[name], p) for name, p in after.named_parameters() if name not in trained]
    verdict = {"text loss before": old_loss, "text loss after": loss, "frozen tensors": len(same),
               "logits bitwise equal": torch.equal(old_logits, logits), "weights bitwise equal": all(same)}
    print(f"{title}: text loss {old_loss:.6f} before, {loss:.6f} after; bitwise equal: text logits "
          f"{verdict['logits bitwise equal']}, {len(same)} frozen tensors {verdict['weights bitwise equal']}")
    return verdict


def blank(image: Image.Image) -> Image.Image:
    """A grey picture of the same size. Who answers as well about this one did not look."""
    return Image.new("RGB", image.size, (64, 64, 64))


def world_accuracy(model: MonoInternVL, tok: Tokenizer, n: int, seed: int = 0) -> tuple[dict, list]:
    """({task: {"accuracy", "blank", "chance"}}, examples): n held-out questions a task, drawn by seed, and
    the same about blank pictures. chance: a guess from the question alone. examples: (picture, question,
    truth, answer, is it right?), two for each task."""
    c, table, examples = model.config, {}, []
    for task, chance in TASKS.items():
        questions = held_out_questions(task, n, seed)
        table[task] = {"chance": chance}
        for column, shown in (("accuracy", lambda image: image), ("blank", blank)):
            pixels = [load_image(shown(picture.image), c.max_dynamic_patch, c.image_size)
                      for picture, _, _ in questions]
            answers = answer(model, tok, [(x, q) for x, (_, q, _) in zip(pixels, questions, strict=True)])
            right = [is_correct(task, a, truth) for a, (_, _, truth) in zip(answers, questions, strict=True)]
            table[task][column] = sum(right) / n
            if column == "accuracy":
                examples += [(*questions[i], answers[i], right[i]) for i in range(min(2, n))]
    table["mean"] = {column: sum(row[column] for row in table.values()) / len(TASKS)
                     for column in ("accuracy", "blank", "chance")}
    return table, examples


def print_table(table: dict) -> None:
    print(f"\n{'task':10}{'held-out':>10}{'blank image':>13}{'chance':>8}")
    for task, row in table.items():
        print(f"{task:10}{row['accuracy']:10.1%}{row['blank']:13.1%}{row['chance']:8.1%}")


def described_rightly(model: MonoInternVL, tok: Tokenizer, n: int) -> dict[str, float]:
    """The share of held-out pictures, n of each kind, whose description has no mistake ("right"), and the
    same when the model sees blank pictures instead ("blank")."""
    def facts(text):                   # in any order, without the words that say nothing
        return {frozenset(re.findall(r"\w+", part)) - {"a", "is"} for part in re.split("[.,]", text)}

    c, shares, rng = model.config, {}, random.Random("test")
    pictures = [make_picture(rng, kind, "test") for kind in KINDS for _ in range(n)]
    for column, shown in (("right", lambda image: image), ("blank", blank)):
        answers = answer(model, tok, [(load_image(shown(picture.image), c.max_dynamic_patch, c.image_size),
                                       "Describe the image.") for picture in pictures])
        pairs = zip(answers, pictures, strict=True)
        shares[column] = sum(facts(a) == facts(picture.text) for a, picture in pairs) / len(pictures)
    return shares


def plot_loss(log: Path, path: Path):
    """The losses of the last run in log.jsonl, with their moving average."""
    losses = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event.get("event") == "run":
            losses = {}
        elif "loss" in event:
            losses.setdefault(event["stage"], []).append(event["loss"])
    fig = Figure(figsize=(9, 4))
    ax, start = fig.subplots(), 0
    for stage, values in losses.items():
        smooth = list(itertools.accumulate(values, lambda average, value: 0.95 * average + 0.05 * value))
        steps = range(start, start + len(values))
        line, = ax.plot(steps, smooth, label=stage)
        ax.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.5)
        start += len(values)
    ax.set(xlabel="optimizer step", ylabel="loss (mean over supervised tokens)", yscale="log")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def plot_predictions(examples: list, path) -> None:
    """Twenty pictures with the question and the answer, green if it is right, else red with the truth."""
    fig = Figure(figsize=(15, 12))
    axes = fig.subplots(4, 5)
    for ax, (picture, question, truth, said, is_right) in zip(axes.flat, examples, strict=False):
        ax.imshow(picture.image)
        ax.set_axis_off()
        lines = (question, said) if is_right else (question, said, "✗ " + truth)
        ax.set_title("\n".join(textwrap.shorten(line, 42, placeholder="…") for line in lines), fontsize=9,
                     color="darkgreen" if is_right else "firebrick")
    fig.tight_layout()
    fig.savefig(path, dpi=90)


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(Flags, argv, __doc__.split("\n")[0])
    try:
        if flags.questions < 1:
            raise InputError(f"--questions is {flags.questions}, expected at least 1")
        folder = flags.model or newest_checkpoint()
        tok, model = Tokenizer(folder), MonoInternVL.from_pretrained(folder, device=flags.device).eval()
        print(f"{folder}, {flags.questions} questions per task, seed {flags.seed}")
        print_table(world_accuracy(model, tok, flags.questions, flags.seed)[0])
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
