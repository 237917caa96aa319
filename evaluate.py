"""Asks a model about held-out pictures of the embedded world, or the questions of the papers' benchmarks.

    python evaluate.py                                     # the world; the newest checkpoint below out/
    python evaluate.py --model assets/tiny --questions 300 --seed 20261124
    python evaluate.py --model Mono-InternVL-2B --benchmark TextVQA_VAL.tsv ChartQA_TEST.tsv

Benchmarks come as VLMEvalKit's [K] public TSV files; benchmarks.py has their table, prompts and metrics. [K]
stores each picture as JPEG before it asks about it; here they are read as they are [ours].

Any other TSV file has your own questions: the columns question, answer, image (base64) or image_path, and, if
you like, options A, B, ... and category. Without a picture, a question is asked as text alone. What the model
says must be the answer, or name the letter of the right option. If the answer holds a box, as in
<ref>cup</ref><box>[[x1, y1, x2, y2]]</box>, the model must name a box whose intersection over union with it
is at least 0.5, as in RefCOCO. The report has the score of each category, too.

In this order: the flags, answers in batches; the embedded world: the probe of text, accuracy per task,
descriptions, plots; benchmarks: answers that survive a stop, the report; main.
"""
import csv
import itertools
import json
import os
import random
import re
import sys
import textwrap
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import benchmarks
from benchmarks import BENCHMARKS, OWN, Tsv, aggregate, prompt
from checkpoint import newest_checkpoint
from common import InputError, flag, parse_flags, rank, read_json, wait_for_all, world_size
from data import Tokenizer, collate, encode_conversation, load_tiles, open_image, turns
from mono_internvl import MonoInternVL
from sample import answer_batch, explain_out_of_memory, in_batches, load_model
from world import KINDS, TASKS, World, held_out_questions, is_correct, make_picture


@dataclass
class Flags:
    model: str | None = flag(None, "checkpoint folder (None: the newest below out/)")
    questions: int = flag(100, "held-out questions of the embedded world per task")
    seed: int = flag(0, "another seed asks other questions of the embedded world")
    benchmark: list[str] = flag([], "TSV files of benchmarks, named as in benchmarks.py, or of your own "
                                "questions: columns question, answer, image or image_path, category, "
                                "options A, B, ...")
    as_: str | None = flag(None, "the benchmark that the one TSV file is, whatever its name", metavar="NAME")
    out: str = flag("out/benchmarks", "folder for answers, the server's files and the report")
    batch_size: int = flag(8, "questions of a benchmark answered at a time")
    plain: bool = flag(False, "ask the bare question, without options and instructions")
    score_only: bool = flag(False, "score the answers in OUT again, without a model")
    judged: str | None = flag(None, "the scores that MMVet's public evaluator gave, a JSON file")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto is the CPU for the embedded world, and for "
                       "benchmarks a GPU if there is one")
    dtype: str = flag("auto", "of benchmarks; auto is float32 on a CPU, else bfloat16",
                      choices=["auto", "float32", "bfloat16", "float16"])
    moe: str = flag("auto", "back end of the experts", choices=["auto", "dense", "torch", "cuda"])
    cuda_graphs: bool = flag(True, "on a GPU, replay decoding steps as CUDA graphs")
    compile: bool = flag(False, "compile the decoding step: a minute at the start, then faster on a GPU")


def make_sample(model: MonoInternVL, tok: Tokenizer, tiles: list[Tensor], *texts: str) -> dict:
    """A question with its <image> marks, for collate; or a question, its answer and the next question, and so
    on. tiles: (n_tiles, 3, S, S) uint8 for each image."""
    ids, _ = encode_conversation(tok, turns(*texts), [len(t) for t in tiles], model.config.tokens_per_tile)
    if len(ids) >= model.config.context_length:
        raise InputError(f"{len(ids)} tokens fill the context of {model.config.context_length}")
    return {"input_ids": torch.tensor(ids), "pixel_values": torch.cat(tiles) if tiles else None}


def greedy_answers(model: MonoInternVL, tok: Tokenizer, samples: list[dict],
                   max_new_tokens: int) -> list[list[int]]:
    """The tokens of the answers to these questions, asked in one batch."""
    answered = answer_batch(model, tok, samples, max_new_tokens=max_new_tokens, prefill_chunk=4096,
                            eos_token_id=(tok.token_id("<|im_end|>"),))
    return [ids for ids, _ in answered]


# ---------------------------------------------------------------- the embedded world

def answer(model: MonoInternVL, tok: Tokenizer, asked: list[tuple[Tensor, str]]) -> list[str]:
    """Greedy answers to (tiles (n_tiles, 3, S, S) uint8, question) pairs, in one batch."""
    samples = [make_sample(model, tok, [pixels], "<image>\n" + question) for pixels, question in asked]
    return [tok.decode(ids, skip_special_tokens=False) for ids in greedy_answers(model, tok, samples, 48)]


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
    """A grey picture of the same size. A model that answers as well about this one did not look."""
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
            pixels = [load_tiles(shown(picture.image), c.max_dynamic_patch, c.image_size)
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
    width, last = max(map(len, table)), "chance" if "chance" in table[next(iter(table))] else "n"
    print(f"\n{'task':{width}}{'held-out':>10}{'blank image':>13}{last:>8}")
    for task, row in table.items():
        print(f"{task:{width}}{row['accuracy']:10.1%}{row['blank']:13.1%}"
              + (f"{row[last]:8.1%}" if last == "chance" else f"{row[last]:8}"))


def described_rightly(model: MonoInternVL, tok: Tokenizer, n: int) -> dict[str, float]:
    """The share of held-out pictures, n of each kind, whose description has no mistake ("right"), and the
    same when the model sees blank pictures instead ("blank")."""
    def facts(text):                   # parts of a description, in any order, without "a" and "is"
        return {frozenset(re.findall(r"\w+", part)) - {"a", "is"} for part in re.split("[.,]", text)}

    c, shares, rng = model.config, {}, random.Random("test")
    pictures = [make_picture(rng, kind, "test") for kind in KINDS for _ in range(n)]
    for column, shown in (("right", lambda image: image), ("blank", blank)):
        answers = answer(model, tok, [(load_tiles(shown(picture.image), c.max_dynamic_patch, c.image_size),
                                       "Describe the image.") for picture in pictures])
        pairs = zip(answers, pictures, strict=True)
        shares[column] = sum(facts(a) == facts(picture.text) for a, picture in pairs) / len(pictures)
    return shares


def read_losses(log: Path) -> dict[str, list[float]]:
    """Stage -> the loss of each step, of the last run in log.jsonl."""
    losses = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if event.get("event") == "run":
            losses = {}
        elif "loss" in event:
            losses.setdefault(event["stage"], []).append(event["loss"])
    return losses


def plot_loss(log: Path, path: Path):
    """The losses of a run, with their moving average."""
    fig = Figure(figsize=(9, 4))
    ax, start = fig.subplots(), 0
    for stage, values in read_losses(log).items():
        smooth = list(itertools.accumulate(values, lambda average, value: 0.95 * average + 0.05 * value))
        steps = range(start, start + len(values))
        line, = ax.plot(steps, smooth, label=stage)
        ax.plot(steps, values, color=line.get_color(), alpha=0.2, linewidth=0.5)
        start += len(values)
    ax.set(xlabel="optimizer step", ylabel="loss (mean over supervised tokens)", yscale="log")
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def plot_predictions(examples: list, path, source: str = "") -> None:
    """Twenty pictures with question and answer: green if the answer is right, else red with the right one.
    Boxes are drawn instead of written, right ones that the model missed dashed. source: whose pictures."""
    fig = Figure(figsize=(15, 14))
    room = {"left": 0.01, "right": 0.99, "bottom": 0.04, "top": 0.93, "hspace": 0.4, "wspace": 0.12}
    axes = fig.subplots(4, 5, gridspec_kw=room)              # five lines fit above each picture
    for ax, (picture, question, truth, said, is_right) in zip(axes.flat, examples, strict=False):
        color = "darkgreen" if is_right else "firebrick"
        ax.imshow(picture.image)
        ax.set(xticks=[], yticks=[], anchor="S")
        ax.spines[:].set(color=color, linewidth=4)
        lines = [question, said] if is_right else [question, said, "right: " + truth]
        for text, style in zip(lines[1:], ("-", "--"), strict=False):
            for box in re.findall(r"\[(\d+), (\d+), (\d+), (\d+)\]", text):
                sides = 2 * picture.image.size
                x1, y1, x2, y2 = (int(v) * side / 1000 for v, side in zip(box, sides, strict=True))
                ax.plot((x1, x2, x2, x1, x1), (y1, y1, y2, y2, y1), style, linewidth=3,
                        color="lime" if is_right else "red")
        lines = [textwrap.fill(re.sub("<ref>.*", "(box)", line), 36) for line in lines]
        ax.set_title("\n".join(lines), fontsize=11, color=color, parse_math=False)     # a $ is a $
    for ax in axes.flat[len(examples):]:
        ax.set_axis_off()
    fig.text(0.28, 0.01, "green: the answer is right", color="darkgreen", fontsize=14)
    fig.text(0.48, 0.01, "red: it is wrong, and the right one follows", color="firebrick", fontsize=14)
    fig.text(0.01, 0.985, source, fontsize=14)
    fig.savefig(path, dpi=180)


# ---------------------------------------------------------------- benchmarks: answers that survive a stop
# A window is some neighbouring rows. It is sorted by length, answered in batches, and written at once. It
# depends neither on what was answered before nor on the number of processes, so the answers do not either.

def read_answers(output: Path, tsv: Tsv, settings: str) -> dict[int, dict]:
    """{row: record} of OUT/NAME.jsonl and of the parts beside it, to which processes append. A part may end
    in half a record. Raises InputError if answers were made with other settings; "" accepts any."""
    found = {}
    parts = sorted(path for path in output.parent.iterdir() if path.name.startswith(output.name + ".part"))
    for path in [output] * output.exists() + parts:
        *records, rest = path.read_bytes().split(b"\n")
        for record in records + [rest] * (rest != b"" and path == output):
            try:
                fields = json.loads(record)
                same = fields["key"].startswith(f"{tsv.checksums[fields['row']]:08x}-{settings}")
            except (ValueError, KeyError, TypeError, IndexError, AttributeError):
                same = False
            if not same:
                raise InputError(f"{path} has answers to other questions, or with another model or settings: "
                                 "move it away, or choose another --out")
            found[fields["row"]] = fields
    return found


def merge_answers(output: Path, tsv: Tsv, settings: str) -> None:
    """Makes one file of OUT/NAME.jsonl and its parts, in the order of the rows."""
    found, temporary = read_answers(output, tsv, settings), output.with_name(output.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(found[i], ensure_ascii=False) + "\n" for i in sorted(found))
    os.replace(temporary, output)
    for path in output.parent.iterdir():
        if path.name.startswith(output.name + ".part"):
            path.unlink()


def answer_window(model: MonoInternVL, tok: Tokenizer, tsv: Tsv, window: range, benchmark: str, flags: Flags,
                  bar: tqdm) -> dict[int, dict]:
    """{row: {"prediction": text}} for a window; {"prediction": None, "error": why} if a question could not be
    asked."""
    b, c = BENCHMARKS.get(benchmark, OWN), model.config
    samples, found = [], {}
    for i in window:
        try:
            row, images = tsv.read(i)
            if benchmark.startswith("MMMU"):       # [K] enlarges the first picture
                first = open_image(images[0])
                images[0] = first.resize((2 * first.width, 2 * first.height), Image.Resampling.BILINEAR)
            tiles = [load_tiles(image, b.tiles or c.max_dynamic_patch, c.image_size) for image in images]
            samples.append({**make_sample(model, tok, tiles, prompt(benchmark, row, flags.plain)), "row": i})
        except InputError as e:
            found[i] = {"prediction": None, "error": str(e)}
            bar.update()
    for batch in in_batches(samples, flags.batch_size, c.context_length - b.tokens):
        with explain_out_of_memory("lower --batch_size, or choose --dtype bfloat16"):
            answered = greedy_answers(model, tok, batch, b.tokens)
        for sample, ids in zip(batch, answered, strict=True):
            found[sample["row"]] = {"prediction": tok.decode(ids).strip()}
        bar.update(len(batch))
    return found


def answer_file(model: MonoInternVL, tok: Tokenizer, tsv: Tsv, benchmark: str, output: Path, settings: str,
                flags: Flags) -> None:
    """Asks what OUT/NAME.jsonl does not answer yet. Each process takes every world_size-th window."""
    if not rank():
        merge_answers(output, tsv, settings)
    wait_for_all()
    done, n, size = read_answers(output, tsv, settings), len(tsv.rows), 4 * flags.batch_size
    windows = [range(start, min(start + size, n)) for start in range(0, n, size)]
    windows = [window for window in windows if any(i not in done for i in window)][rank()::world_size()]
    wait_for_all()                                 # a part is written only when all have read what there is
    with open(output.with_name(f"{output.name}.part{rank()}"), "ab") as part, \
            tqdm(total=sum(map(len, windows)), desc=benchmark, unit="question", disable=rank() > 0) as bar:
        for window in windows:
            found = answer_window(model, tok, tsv, window, benchmark, flags, bar)
            records = [{"row": i, "index": tsv.rows[i]["index"], **found[i],
                        "key": f"{tsv.checksums[i]:08x}-{settings}"} for i in window]
            part.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode())
            part.flush()
    wait_for_all()
    if not rank():
        merge_answers(output, tsv, settings)


# ---------------------------------------------------------------- benchmarks: the report

V1, V15 = "Mono-InternVL-2B", "Mono-InternVL-1.5-2B (second hand)"


def write_server_file(benchmark: str, rows: list[dict], said: list[str], output: Path) -> None:
    """Writes what you submit to the servers of MMBench, DocVQA and InfoVQA, or to the evaluator of MMVet."""
    if benchmark.startswith("MMBench"):
        with open(output.with_suffix(".csv"), "w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["index", "question", *"ABCD", "prediction"], extrasaction="ignore")
            table.writeheader()
            table.writerows({**row, "prediction": text} for row, text in zip(rows, said, strict=True))
        return
    ids = [row.get("questionId", row["index"]) for row in rows]
    answers = {f"v1_{number}": text for number, text in zip(ids, said, strict=True)}
    if benchmark != "MMVet":
        answers = [{"questionId": int(number) if number.isdecimal() else number, "answer": text}
                   for number, text in zip(ids, said, strict=True)]
    output.with_suffix(".json").write_text(json.dumps(answers, ensure_ascii=False), encoding="utf-8")


def result_of(benchmark: str, tsv: Tsv, output: Path, settings: str, judged: dict) -> dict:
    """What `aggregate` makes of the answers, beside the papers' scores."""
    found, b, rows = read_answers(output, tsv, settings), BENCHMARKS.get(benchmark, OWN), tsv.rows
    if len(found) < len(rows):
        raise InputError(f"{output} answers {len(found)} of {len(rows)} questions; the same command without "
                         "--score_only adds the others")
    said = [found[i]["prediction"] for i in range(len(rows))]
    if benchmark == "MathVista_MINI":
        rows = [benchmarks.extract_by_rule(row, text) for row, text in zip(rows, said, strict=True)]
    if benchmark == "MMVet":
        rows = [{**row, "score": judged.get(row["index"])} for row in rows]
    if benchmark.startswith(("MMBench", "DocVQA", "InfoVQA", "MMVet")):
        write_server_file(benchmark, rows, [text or "" for text in said], output)
    result = {"benchmark": benchmark, "split": b.split, **aggregate(benchmark, rows, said)}
    if not any("answer" in row for row in rows) or benchmark == "MMVet" and not judged:
        result["score"] = result["at_most"] = None
    unreadable = [{"index": found[i]["index"], "error": found[i]["error"]}
                  for i in range(len(rows)) if "error" in found[i]]
    return {**result, V1: b.v1, V15: b.v15, "note": b.note, "left_out": tsv.left_out,
            "unreadable": unreadable}


def print_report(results: list[dict]) -> None:
    """Prints the table. "at most": the score if a GPT judged all answers right that rules leave open."""
    columns = "{:21.21}{:12}{:>7}{:>8}{:>8}{:>9}{:>8}{:>9}{:>12}  {}"
    print("\n" + columns.format("benchmark", "split", "n", "score", "2B", "1.5-2B*", "open", "at most",
                                "unreadable", ""))
    for r in results:
        reached, v1, v15, most = ("–" if r[key] is None else f"{r[key]:.1f}" for key in
                                ("score", V1, V15, "at_most"))
        print(columns.format(r["benchmark"], r["split"], r["n"], reached, v1, v15, r["open"], most,
                             len(r["unreadable"]), r["note"]))
        if r["note"] == OWN.note and r["score"] is not None:
            for name, value in r["parts"].items():
                print(columns.format("  " + name, "", r["part_rows"][name], f"{value:.1f}", *[""] * 6))
    print("* second hand: from the tables of NEO")
    for r in results:
        if r["left_out"]:
            print(f"{r['benchmark']}: {r['left_out']} rows without a picture were left out")
        for row in r["unreadable"][:20]:
            print(f"{r['benchmark']}: row {row['index']} counts as wrong: {row['error']}")
        if len(r["unreadable"]) > 20:
            print(f"{r['benchmark']}: and {len(r['unreadable']) - 20} more; report.json lists them")


def plot_report(results: list[dict], path: Path) -> None:
    """Bars: these scores beside the papers'. MME and OCRBench are no percentages and are scaled to 100."""
    results, scale = [r for r in results if r["score"] is not None], {"MME": 28, "OCRBench": 10}
    fig = Figure(figsize=(max(6, 1.2 * len(results)), 4))
    ax = fig.subplots()
    for k, (key, label) in enumerate((("score", "this model"), (V1, V1), (V15, V15))):
        heights = [(r[key] or 0) / scale.get(r["benchmark"], 1) for r in results]
        ax.bar([i + 0.27 * (k - 1) for i in range(len(results))], heights, 0.25, label=label)
    ax.set_xticks(range(len(results)), [r["benchmark"].replace("_", "\n") for r in results], fontsize=8)
    ax.set(ylabel="score (MME / 28, OCRBench / 10)", ylim=(0, 100))
    ax.legend(fontsize=8)
    fig.tight_layout()
    fig.savefig(path, dpi=120)


# ---------------------------------------------------------------- main

def read_judged(path: str) -> dict[str, float]:
    """{index: score} from the JSON of MMVet's evaluator: {"v1_0": score or {"score": [one per run]}, ...}."""
    judged = {}
    for name, value in read_json(path).items():
        value = value.get("score") if isinstance(value, dict) else value
        value = value if isinstance(value, list) else [value]
        if not value or not all(type(number) in (int, float) and 0 <= number <= 1 for number in value):
            raise InputError(f"{path}: the score of {name!r:.40} is {value!r:.40}, expected numbers 0 to 1")
        judged[name.removeprefix("v1_")] = sum(value) / len(value)
    return judged


def run_benchmarks(flags: Flags) -> None:
    names, out = [flags.as_ or Path(path).stem for path in flags.benchmark], Path(flags.out)
    if len(set(names)) < len(names):
        raise InputError(f"several files are the benchmark {max(names, key=names.count)!r:.40}; run them one "
                         "by one, with an --out for each")
    if flags.batch_size < 1:
        raise InputError(f"--batch_size is {flags.batch_size}, expected at least 1")
    judged = {} if flags.judged is None else read_judged(flags.judged)
    files = [Tsv(Path(path), name) for path, name in zip(flags.benchmark, names, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    if world_size() > 1:                           # under torchrun; a process that is done may wait for days
        dist.init_process_group("gloo", timeout=timedelta(days=30))
        if flags.device == "auto" and torch.cuda.is_available():
            flags.device = f"cuda:{os.environ['LOCAL_RANK']}"
    settings = dict.fromkeys(names, "")            # of each benchmark, a checksum of what answers depend on
    if not flags.score_only:
        folder = Path(flags.model or newest_checkpoint()).resolve()
        tok = Tokenizer(folder)
        model = load_model(folder, tok, flags)
        saved = (folder / "config.json").stat().st_mtime_ns
        dtype = str(model.language_model.output.weight.dtype)
        for name, tsv in zip(names, files, strict=True):
            depends_on = [str(folder), saved, dtype, flags.plain, name]
            settings[name] = f"{zlib.crc32(repr(depends_on).encode()):08x}"
            answer_file(model, tok, tsv, name, out / f"{name}.jsonl", settings[name], flags)
    if not rank():
        results = [result_of(name, tsv, out / f"{name}.jsonl", settings[name], judged)
                   for name, tsv in zip(names, files, strict=True)]
        print_report(results)
        (out / "report.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
        plot_report(results, out / "report.png")


def ask_about_the_world(flags: Flags) -> None:
    if flags.questions < 1:
        raise InputError(f"--questions is {flags.questions}, expected at least 1")
    folder, device = flags.model or newest_checkpoint(), "cpu" if flags.device == "auto" else flags.device
    tok, model = Tokenizer(folder), MonoInternVL.from_pretrained(folder, device=device).eval()
    print(f"{folder}, {flags.questions} questions per task, seed {flags.seed}")
    print_table(world_accuracy(model, tok, flags.questions, flags.seed)[0])


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(Flags, argv, __doc__.split("\n")[0])
    try:
        if flags.benchmark:
            run_benchmarks(flags)
        else:
            ask_about_the_world(flags)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except OSError as e:                           # a full disk, a folder without permission
        print(f"error: {e.filename} cannot be read or written: {e.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
