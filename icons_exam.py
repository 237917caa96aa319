"""The exam of a run of the preset icons: what the language model still says in text, and what it sees.

train_evip.py holds it after the last stage. In this order: the loss and questions in text; questions about
pictures, answered by a greedy answer or by the likeliest option; accuracy per file of questions; capitals of
countries, where knowledge and sight meet; the report.
"""
import random
import re
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import torch

import benchmarks
from benchmarks import aggregate, prompt, score
from common import read_json
from data import IGNORED, Tokenizer, collate, encode_conversation, load_tiles, normalise, turns
from evaluate import blank, greedy_answers, make_sample, plot_predictions, print_table, read_losses
from icons import TEST_HAND, Pictures, plain_scene, test_questions
from mono_internvl import MonoInternVL

TEXT_QUESTIONS = (
    "What is the capital of France?", "Who wrote Romeo and Juliet?", "What is seven times eight?",
    "Name three mammals.", "Write one sentence about the sea.", "What is photosynthesis?",
    "How do I boil an egg?", "What color is the sky?", "Explain what a computer is.",
    "Tell me a short story about a dog.")


@torch.inference_mode()
def documentation_loss(model: MonoInternVL, tok: Tokenizer) -> float:
    """Loss per token on English text that every Python carries: its own documentation."""
    texts = [text for text in topics.values() if len(text) > 1500][:32]
    ids = torch.tensor([tok.encode(text, bos=False)[:256] for text in texts])
    ids = ids.to(model.language_model.output.weight.device)
    return torch.cat([model(part, labels=part, reduction="none")[1].float()
                      for part in ids.split(8)]).mean().item()


def ask_icons(model: MonoInternVL, tok: Tokenizer, rows: list[dict], show=lambda image: image,
              max_new_tokens: int = 24) -> list[str]:
    """Greedy answers to rows of icons.test_questions. show: what the model sees instead of a picture. "then"
    of a row is an answer to its question and a second question, which is the one that is asked."""
    c, said = model.config, []
    for start in range(0, len(rows), 64):
        samples = []
        for row in rows[start:start + 64]:
            shown = [show(row["image"])] if row["image"] else []
            tiles = [load_tiles(image, c.max_dynamic_patch, c.image_size) for image in shown]
            samples.append(make_sample(model, tok, tiles, prompt("icons", row) if shown else row["question"],
                                       *row.get("then", ())))
        said += [tok.decode(ids).strip() for ids in greedy_answers(model, tok, samples, max_new_tokens)]
    return said


@torch.inference_mode()
def likeliest(model: MonoInternVL, tok: Tokenizer, rows: list[dict], show=lambda image: image) -> list[str]:
    """For each row with options: the letter of the option whose text is the likeliest answer to the question.
    Unlike the letter that a model says, this does not depend on its knowing the format of choices."""
    c, device, letters = model.config, model.language_model.output.weight.device, []
    for start in range(0, len(rows), 16):
        samples = []
        for row in rows[start:start + 16]:
            tiles = load_tiles(show(row["image"]), c.max_dynamic_patch, c.image_size)
            for name in benchmarks.options(row).values():
                conversation = turns("<image>\n" + row["question"], name)
                ids, labels = encode_conversation(tok, conversation, [len(tiles)], c.tokens_per_tile)
                samples.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(labels),
                                "pixel_values": tiles})
        batch = {k: None if v is None else v.to(device) for k, v in collate(samples, tok.pad_id).items()}
        batch["pixel_values"] = normalise(batch["pixel_values"])
        losses = model(**batch, reduction="none")[1].float()
        of_sample = (batch["labels"][:, 1:] != IGNORED).nonzero()[:, 0]
        sums = iter(torch.zeros(len(samples), device=device).index_add_(0, of_sample, losses).tolist())
        for row in rows[start:start + 16]:
            loss_of = {letter: next(sums) for letter in benchmarks.options(row)}
            letters.append(min(loss_of, key=loss_of.get))
    return letters


def icons_accuracy(model: MonoInternVL, tok: Tokenizer, folder: Path, most: int) -> tuple[dict, list]:
    """({"FILE" or "FILE: CATEGORY": {"accuracy", "blank", "n"}}, the answers of the file "names" as examples
    for plot_predictions). FILE: a name of icons.test_questions. most: at most so many questions of a file."""
    table, examples, rng, files = {}, [], random.Random(0), test_questions(folder)
    files["choices by likelihood"] = files["choices"]
    for name, rows in files.items():
        rows = rng.sample(rows, min(most, len(rows)))
        for column, show in (("accuracy", lambda image: image), ("blank", blank)):
            said = (likeliest if "likelihood" in name else ask_icons)(model, tok, rows, show)
            result = aggregate("icons", rows, said)
            table.setdefault(name, {"n": len(rows)})[column] = result["score"] / 100
            for category, value in result["parts"].items():
                part = table.setdefault(f"{name}: {category}", {
                    "n": sum(row["category"] == category for row in rows)})
                part[column] = value / 100
            if (name, column) == ("names", "accuracy"):
                examples = [(SimpleNamespace(image=row["image"]), row["question"], row["answer"], text,
                             score("icons", row, text) == 1) for row, text in zip(rows, said, strict=True)]
    return table, examples


def ask_capitals(model: MonoInternVL, tok: Tokenizer, folder: Path) -> list[dict]:
    """What the model says about the capitals of countries: asked in text alone; about a picture of the flag;
    about it in two turns, first for its name; and the second turn again, with a blank picture and the same
    name in the first. It was never trained on capitals with pictures."""
    pictures, capitals = Pictures(folder, "test"), read_json(Path(__file__).with_name("assets")
                                                             / "capitals.json")
    flags = [(thing, sources[0]) for thing, sources in pictures.drawings.items()
             if pictures.things[thing].get("iso") in capitals]
    rows = [{"image": pictures.draw(plain_scene(source, model.config.image_size)),
             "country": pictures.name(thing).removeprefix("flag of "),
             "capital": capitals[pictures.things[thing]["iso"]]} for thing, source in flags]
    in_text = ask_icons(model, tok, [{"image": None, "question": f"What is the capital of {row['country']}?"}
                                     for row in rows])
    seen = ask_icons(model, tok, [row | {"question": "Which country's flag is this? What is its capital?"}
                                  for row in rows])
    rows = [row | {"question": "What is this?"} for row in rows]
    named = ask_icons(model, tok, rows)
    rows = [row | {"then": (name, "What is the capital of this country?")}
            for row, name in zip(rows, named, strict=True)]
    then, then_blank = (ask_icons(model, tok, rows, show) for show in (lambda image: image, blank))
    return [{"country": row["country"], "capital": row["capital"], "in text": a, "seeing the flag": b,
             "flag named": c, "capital then": d, "capital then, blank picture": e}
            for row, a, b, c, d, e in zip(rows, in_text, seen, named, then, then_blank, strict=True)]


def says(text: str, name: str) -> bool:
    """Does the text hold this name as words of its own? "Rabatel" is not "Rabat"."""
    return re.search(rf"\b{re.escape(name)}\b", text) is not None


def icons_report(run: Path, data: Path, stages: list[str], device: str, dtype: torch.dtype,
                 most: int) -> dict:
    """Measures a run of the preset icons: the loss and answers in text after each stage, and what the last
    stage's model sees. Prints it, and draws RUN/predictions.png. most: see icons_accuracy."""
    report = {"text loss": {}, "answers": {}, "losses": {}}
    for stage, losses in read_losses(run / "log.jsonl").items():           # 40 means of neighbouring steps
        parts = torch.tensor(losses).tensor_split(min(40, len(losses)))
        report["losses"][stage] = [round(part.mean().item(), 4) for part in parts]
    for stage in stages:
        tok = Tokenizer(run / stage)
        model = MonoInternVL.from_pretrained(run / stage, dtype=dtype, device=device).eval()
        report["text loss"][stage] = documentation_loss(model, tok)
        if stage in (stages[0], stages[-1]):       # after S1.1 they are those of before training, bit for bit
            rows = [{"image": None, "question": question} for question in TEXT_QUESTIONS]
            report["answers"][stage] = ask_icons(model, tok, rows, max_new_tokens=64)
    report["tasks"], examples = icons_accuracy(model, tok, data, most)
    report["capitals"] = ask_capitals(model, tok, data)
    known = [row for row in report["capitals"] if says(row["in text"], row["capital"])]
    print("\nloss on English documentation after", ", ".join(
        f"{stage} {loss:.3f}" for stage, loss in report["text loss"].items()))
    print_table(report["tasks"])
    at_once, then = (sum(says(row[answer], row["capital"]) for row in known)
                     for answer in ("seeing the flag", "capital then"))
    print(f"{len(known)} of {len(report['capitals'])} capitals are known in text; of them, {at_once} are "
          f"said in front of the flag, and {then} once the flag has been named")
    drawn = next(picture for picture in Pictures(data).pictures if picture["hand"] == TEST_HAND)
    plot_predictions(random.Random(0).sample(examples, min(20, len(examples))), run / "predictions.png",
                     "Drawings: {hand} by {author}, {licence}".format(**drawn))
    return report
