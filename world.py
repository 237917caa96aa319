"""The embedded world: pictures, questions and a tokenizer for a first training run. Nothing is downloaded.

Five kinds of pictures are drawn when they are asked for: scenes of shapes, groups to count, bar charts, signs
to read, and real handwritten digits. A tile of 48 pixels is 3×3 visual tokens of 16×16 pixels, so that a
shape fills one token. A sign is two tiles wide, and is cut into tiles and a thumbnail like any large picture.
In this order: the world's words, pictures, held-out questions, the conversations of a stage, the tokenizer.
"""
import io
import itertools
import json
import random
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch.utils.data import Dataset

from checkpoint import IMAGE_TOKENS
from data import Tokenizer, encode_conversation, load_tiles, turns

IMAGE_SIZE = 48                                    # pixels of a tile
COLORS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 89, 214), "yellow": (240, 210, 30),
          "purple": (140, 60, 190), "white": (245, 245, 245)}
SHAPES = ("square", "ring", "triangle", "line", "cross")
SIZES = ("small", "large")
POSITIONS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom",
             "bottom right")                       # the cells of a 3×3 grid, row by row
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = ("cat", "dog", "sun", "bus", "box", "cup", "hat", "key", "map", "pen", "zoo", "fly")
OFF_TOPIC = ("free shipping", "click to enlarge", "photo of the day", "best price", "my holiday", "no image")
# The tasks, and how often a guess is right that knows the question and not the picture.
TASKS = {"color": 1 / 6, "shape": 1 / 5, "size": 1 / 2, "position": 1 / 9, "relation": 1 / 2, "count": 1 / 5,
         "chart": 1 / 6, "sign": 1 / 144, "digit": 1 / 10, "box": 1 / 18}


@dataclass
class Picture:
    image: Image.Image
    key: str                                       # its content: training and test never share a key
    alt: str                                       # a few words, like the alt text of a web page
    text: str                                      # the full description; S0 reads it instead of the picture
    questions: list[tuple[str, str, str]]          # (task, question, answer)


def new_image(rng: random.Random, width: int = IMAGE_SIZE) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A dark, nearly grey image, and what draws on it."""
    shade = rng.randrange(40, 90)
    image = Image.new("RGB", (width, IMAGE_SIZE), tuple(shade + rng.randrange(15) for _ in range(3)))
    return image, ImageDraw.Draw(image)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, color: str, size: str, cell: int) -> list[int]:
    """Draws a shape into a cell of the 3×3 grid. Returns its box [x1, y1, x2, y2] in 0..1000."""
    r = 7 if size == "large" else 5
    x, y = 8 + 16 * (cell % 3), 8 + 16 * (cell // 3)
    box, fill = (x - r, y - r, x + r, y + r), COLORS[color]
    if shape == "square":
        draw.rectangle(box, fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=2)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x + r, y + r), (x - r, y + r)], fill)
    else:                                          # a line, or two that cross
        draw.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
        if shape == "cross":
            draw.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill)
    return [round(v * 1000 / IMAGE_SIZE) for v in box]


def make_scene(rng: random.Random) -> Picture:
    n = rng.choice((1, 2, 2, 3))
    cells = sorted(rng.sample(range(9), n))        # sorted, so that one combination has one key
    shapes, colors, sizes = rng.sample(SHAPES, n), rng.sample(list(COLORS), n), rng.choices(SIZES, k=n)
    things = list(zip(shapes, colors, sizes, cells, strict=True))
    image, draw = new_image(rng)
    questions = []
    # Questions name a thing by its color. Every answer reads "key is value": whatever is asked, the model has
    # to look up the word before "is". With one wording per task, a tiny model learned only some of the tasks.
    for shape, color, size, cell in things:
        position, box = POSITIONS[cell], draw_shape(draw, shape, color, size, cell)
        questions += [("color", f"What color is {position}?", f"{position} is {color}."),
                      ("shape", f"What shape is {color}?", f"{color} is {shape} shaped."),
                      ("size", f"How big is {color}?", f"{color} is {size}."),
                      ("position", f"Where is {color}?", f"{color} is {position}."),
                      ("box", f"Find {color}.",
                       f"{color} is {position}. <ref>{color}</ref><box>[{box}]</box>")]
    if n > 1:
        for (_, a, _, cell_a), (_, b, _, cell_b) in itertools.permutations(rng.sample(things, 2)):
            for word, at_a, at_b in ("left of", cell_a % 3, cell_b % 3), ("above", cell_a // 3, cell_b // 3):
                if at_a != at_b:
                    questions.append(("relation", f"Is {a} {word} {b}?", f"{a} is {POSITIONS[cell_a]}. "
                                      f"{b} is {POSITIONS[cell_b]}. {'yes' if at_a < at_b else 'no'}."))
    # The description names the things in any order, and their position or their color first. So what follows
    # cannot be guessed from the order, it must be looked up.
    position_first, described, facts = rng.random() < 0.5, rng.sample(things, n), []
    for shape, color, size, cell in described:
        facts += [f"{POSITIONS[cell]} is {color}." if position_first else f"{color} is {POSITIONS[cell]}.",
                  f"{color} is {size}.", f"{color} is {shape} shaped."]
    alt = " and ".join(f"{color} {shape}" for shape, color, *_ in described)
    return Picture(image, f"scene: {things}", alt, " ".join(facts), questions)


def make_count(rng: random.Random) -> Picture:
    n, shape, color = rng.randrange(1, 6), rng.choice(SHAPES), rng.choice(list(COLORS))
    cells = sorted(rng.sample(range(9), n))
    image, draw = new_image(rng)
    for cell in cells:
        draw_shape(draw, shape, color, "small", cell)
    things = f"{color} {shape}" + ("" if n == 1 else "es" if shape == "cross" else "s")
    return Picture(image, f"count: {things} at {cells}", things, f"{NUMBERS[n]} {things}.",
                   [("count", f"How many {color} shapes are there?", f"{NUMBERS[n]}.")])


def make_chart(rng: random.Random) -> Picture:
    colors, heights = rng.sample(list(COLORS), 3), rng.sample(range(1, 7), 3)
    image, draw = new_image(rng)
    for i, (color, height) in enumerate(zip(colors, heights, strict=True)):
        draw.rectangle((16 * i + 2, IMAGE_SIZE - 1 - 7 * height, 16 * i + 13, IMAGE_SIZE - 1), COLORS[color])
    bars = ", ".join(f"{color} {NUMBERS[height]}" for color, height in zip(colors, heights, strict=True))
    tallest, shortest = colors[heights.index(max(heights))], colors[heights.index(min(heights))]
    return Picture(image, "chart: " + bars, "bar chart", f"a bar chart with {bars}.",
                   [("chart", "Which bar is the tallest?", f"{tallest}."),
                    ("chart", "Which bar is the shortest?", f"{shortest}.")])


load_font = lru_cache(ImageFont.load_default)


def make_sign(rng: random.Random) -> Picture:
    words = rng.choices(WORDS, k=2)
    image, draw = new_image(rng, 2 * IMAGE_SIZE)
    for i, word in enumerate(words):
        x, y = IMAGE_SIZE * i + IMAGE_SIZE // 2 + rng.randrange(-1, 2), IMAGE_SIZE // 2 + rng.randrange(-1, 2)
        draw.text((x, y), word, font=load_font(24), anchor="mm", fill=COLORS[rng.choice(("white", "yellow"))])
    text = " ".join(words)
    return Picture(image, "sign: " + text, "a sign", f"a sign that says {text}.",
                   [("sign", "What does the sign say?", f"{text}.")])


@lru_cache
def digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """(1797, 8, 8) uint8 scans with values 0..16, (1797,) labels. Source and licence: assets/README.md."""
    with np.load(Path(__file__).parent / "assets" / "digits.npz") as f:
        return f["images"], f["labels"]


def make_digit(rng: random.Random) -> Picture:
    scans, labels = digit_scans()
    i = rng.randrange(len(scans))
    ink = Image.fromarray((scans[i] * 15).astype(np.uint8)).resize((44, 44), Image.Resampling.BILINEAR)
    image, _ = new_image(rng)
    image.paste((235, 235, 235), (rng.randrange(5), rng.randrange(5)), mask=ink)
    digit = NUMBERS[labels[i]]
    return Picture(image, f"digit: scan {i}", "a digit", f"a handwritten {digit}.",
                   [("digit", "Which digit is this?", f"{digit}.")])


KINDS = {"scene": make_scene, "count": make_count, "chart": make_chart,
         "sign": make_sign, "digit": make_digit}


def make_picture(rng: random.Random, kind: str, split: str = "train") -> Picture:
    """A random picture for training ("train") or of the held-out fifth ("test"). Its key decides, so that a
    combination of things, bars or words, or the scan of a digit, is on one side only."""
    while True:
        picture = KINDS[kind](rng)
        if (zlib.crc32(picture.key.encode()) % 5 == 0) == (split == "test"):
            return picture


def held_out_questions(task: str, n: int, seed: int = 0) -> list[tuple[Picture, str, str]]:
    """n held-out (picture, question, answer) of a task."""
    rng, found = random.Random(f"test/{seed}/{task}"), []
    while len(found) < n:
        picture = make_picture(rng, task if task in KINDS else "scene", "test")
        of_task = [(picture, question, answer) for t, question, answer in picture.questions if t == task]
        found += [rng.choice(of_task)] if of_task else []
    return found


def is_correct(task: str, answer: str, truth: str) -> bool:
    """A relation needs the same last word (yes or no), a box an IoU of at least 1/2, else the same text."""
    if task == "relation":
        return answer.split()[-1:] == truth.split()[-1:]
    if task != "box":
        return answer == truth
    a, b = ([int(v) for v in re.findall(r"\d+", text)] for text in (answer, truth))
    if len(a) != 4:
        return False
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [max(0, x2 - x1) * max(0, y2 - y1) for x1, y1, x2, y2 in (a, b)]
    return overlap >= 0.5 * (sum(areas) - overlap)


CAPTIONS = {"S0": 0, "S1.2": 1, "S1.3": 0.54, "S2": 0.4}                   # the share of a stage's samples


def world_conversation(stage: str, rng: random.Random, split: str = "train"):
    """A sample of stage S0, S1.1, S1.2, S1.3 or S2: (conversation, its PIL image or None)."""
    kind = rng.choices(list(KINDS), (10, 1, 1.5, 1, 1))[0]
    picture = make_picture(rng, kind, split)
    if stage == "S1.1":                            # a sixth is the alt text of another picture, a sixth junk
        other = make_picture(rng, rng.choice(list(KINDS)), split).alt
        alt = rng.choices((picture.alt, other, rng.choice(OFF_TOPIC)), (4, 1, 1))[0]
        return turns("<image>", alt), picture.image
    if rng.random() < CAPTIONS[stage]:
        return turns("<image>\nDescribe the image.", picture.text), picture.image
    if stage == "S1.3":                            # captions 54 %, detection 5 %, OCR 41 % [v1]
        kind = "scene" if rng.random() < 0.05 / 0.46 else rng.choice(("chart", "sign", "digit"))
        picture = make_picture(rng, kind, split)
        pairs = [(q, a) for task, q, a in picture.questions if task in ("box", "chart", "sign", "digit")]
    else:
        pairs = [(q, a) for _, q, a in rng.sample(picture.questions, min(len(picture.questions), 4))]
    texts = list(itertools.chain(*pairs))
    if rng.random() < 0.1:                         # a question that has nothing to do with the picture
        n = rng.randrange(9)
        texts += [f"What comes after {NUMBERS[n]}?", f"{NUMBERS[n + 1]}."]
    if stage == "S1.3" or (stage == "S2" and rng.random() < 0.9):
        return turns("<image>\n" + texts[0], *texts[1:]), picture.image
    # S0 and a tenth of S2 are text alone: the description replaces the picture.
    if stage == "S0" and rng.random() < 0.3:
        return rng.choice((turns(picture.text, picture.alt),
                           turns(picture.text + "\nDescribe the image.", picture.text))), None
    boxes = [a[a.index("<ref>"):] for _, a in pairs if "<ref>" in a]
    return turns(" ".join([picture.text, *boxes]) + "\n" + texts[0], *texts[1:]), None


class World(Dataset):
    """The endless samples of a stage, with the fields of JsonlDataset's. The random numbers of sample i come
    from (split, seed, stage, i), so it is the same in every process and in any order."""

    def __init__(self, stage: str, tok: Tokenizer, config, max_tiles: int = 4,
                 seed: int = 0, split: str = "train"):
        self.stage, self.tok, self.config, self.max_tiles = stage, tok, config, max_tiles
        self.seed, self.split = seed, split

    def __getitem__(self, i: int) -> dict:
        rng = random.Random(f"{self.split}/{self.seed}/{self.stage}/{i}")
        conversation, image = world_conversation(self.stage, rng, self.split)
        tiles = None if image is None else load_tiles(image, self.max_tiles, IMAGE_SIZE)
        ids, labels = encode_conversation(self.tok, conversation, [] if tiles is None else [len(tiles)],
                                          self.config.tokens_per_tile)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": tiles,
                "id": f"{self.stage}/{i}",
                "task": "text" if image is None else "captions" if len(conversation) == 2 else "questions"}


def make_world_tokenizer(folder: str | Path) -> Tokenizer:
    """Trains a small sentencepiece model on texts of the world, which takes a second, and writes it to the
    folder in the official layout."""
    folder, rng, lines = Path(folder), random.Random(0), []
    for i in range(3000):
        conversation, _ = world_conversation("S1.1" if i % 4 == 0 else "S2", rng)
        for turn in conversation:
            lines += re.split(r"<[^>]*>|\n", turn["value"])
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=(line for line in lines if line), model_writer=model, model_type="bpe",
        vocab_size=640, hard_vocab_limit=False, character_coverage=1.0, byte_fallback=True,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        user_defined_symbols=["\n", "user", "assistant"], num_threads=1, minloglevel=2)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = len(SentencePieceProcessor(model_proto=model.getvalue()))
    added = {token: size + i for i, token in enumerate(IMAGE_TOKENS)}
    (folder / "added_tokens.json").write_text(json.dumps(added, indent=2))
    # No system message: its 156 tokens would be more than a sample has.
    (folder / "tokenizer_config.json").write_text(json.dumps({"system_message": ""}))
    return Tokenizer(folder)
