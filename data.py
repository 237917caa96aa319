"""From text and pictures to what the model reads.

In this order: the tokenizer and streamed decoding; the chat template and its training labels; tiling and
normalisation of pictures; training samples from JSONL files in the official format; collation; the scripts'
command-line flags.

Sources as in mono_internvl.py: [repo] is the official code, [ours] our choice.
"""
import argparse
import codecs
import difflib
import json
import re
import typing
import warnings
from array import array
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import MISSING, field, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch.utils.data import ConcatDataset, Dataset

from mono_internvl import InputError, MonoInternVLConfig, _read_json

IGNORED = -100                                     # the label of a token without loss

# ---------------------------------------------------------------- tokenizer

class Tokenizer:
    """The InternLM2 tokenizer: sentencepiece BPE with byte fallback, after text was cut at special tokens.

    Reads a folder in the official layout: tokenizer.model, and added_tokens.json or tokenizer_config.json's
    added_tokens_decoder. len(tok) is the vocabulary size with added tokens; special_tokens maps text to id.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "tokenizer.model").is_file():
            raise InputError(f"{self.folder} has no tokenizer.model; it belongs beside the weights")
        try:
            self.sp = sp = SentencePieceProcessor(model_file=str(self.folder / "tokenizer.model"))
        except (RuntimeError, OSError) as e:
            raise InputError(f"{self.folder}/tokenizer.model is not a sentencepiece model: {e}") from None
        added, config = ({} if not (self.folder / name).exists() else _read_json(self.folder / name)
                         for name in ("added_tokens.json", "tokenizer_config.json"))
        pieces = [sp.id_to_piece(i) for i in range(len(sp))]
        self.special_tokens = {p: i for i, p in enumerate(pieces) if sp.is_control(i) or sp.is_unknown(i)}
        try:
            self.special_tokens |= {token: int(i) for token, i in added.items()}
            decoder = config.get("added_tokens_decoder", {})
            self.special_tokens |= {token["content"]: int(i) for i, token in decoder.items()}
        except (AttributeError, KeyError, TypeError, ValueError):
            raise InputError(f"{self.folder}: added_tokens.json or the added_tokens_decoder of "
                             "tokenizer_config.json does not map tokens to ids") from None
        # longest first: of two tokens that start alike, the longer one is meant
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self.cut = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")
        # What each id stands for in UTF-8. A piece like "<0xE4>" is one byte, perhaps of a longer character:
        # ids are joined as bytes, and bytes become text.
        self.bytes = {i: bytes([int(p[3:5], 16)]) if sp.is_byte(i) else p.replace("▁", " ").encode()
                      for i, p in enumerate(pieces)}
        self.bytes |= {i: token.encode() for token, i in self.special_tokens.items()}
        self.special_ids = set(self.special_tokens.values())
        self.bos_id, self.eos_id = sp.bos_id(), sp.eos_id()
        self.pad_id = self.eos_id if sp.pad_id() < 0 else sp.pad_id()
        self.system_message = config.get("system_message", SYSTEM_MESSAGE)       # the field is [ours]

    def __len__(self) -> int:
        return max(self.bytes) + 1

    def token_id(self, token: str) -> int:
        if token not in self.special_tokens:
            raise InputError(f"the tokenizer in {self.folder} has no token {token}")
        return self.special_tokens[token]

    def encode(self, text: str, bos: bool = True) -> list[int]:
        if re.search("[\ud800-\udfff]", text):
            raise InputError(f"the text {text[:40]!r} is not valid Unicode (a lone surrogate)")
        ids = [self.bos_id] if bos else []
        for part in self.cut.split(text):
            ids += [self.special_tokens[part]] if part in self.special_tokens else self.sp.encode(part)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        stream = TextStream(self, skip_special_tokens)
        return "".join(map(stream.push, ids)) + stream.flush()


class TextStream:
    """Decodes token by token: a character comes out with its last byte, U+FFFD for what is not UTF-8."""

    def __init__(self, tok: Tokenizer, skip_special_tokens: bool = True):
        self.tok, self.skip = tok, tok.special_ids if skip_special_tokens else ()
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        token = int(token)
        if token not in self.tok.bytes:
            raise InputError(f"the tokenizer in {self.tok.folder} ({len(self.tok)} tokens) has no id {token}")
        return "" if token in self.skip else self.utf8.decode(self.tok.bytes[token])

    def flush(self) -> str:
        return self.utf8.decode(b"", final=True)


# ---------------------------------------------------------------- chat template and labels

# "You are a multimodal model by Shanghai AI Laboratory and SenseTime, InternVL in English, a useful and
# harmless AI assistant." The official models were trained with this message, so they are asked with it.
SYSTEM_MESSAGE = ("你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
                  "是一个有用无害的人工智能助手。")
# Written in a turn, these would forge a turn or an image. <ref>, <box> and their like belong to answers.
RESERVED = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def chat_parts(conversation: Sequence[dict], system: str) -> Iterator[tuple[str, str]]:
    """The internlm2-chat template in parts (role, text); what the model learns to write is role "gpt"."""
    if not isinstance(conversation, list | tuple) or not conversation:
        raise InputError(f"the conversation is {conversation!r:.60}, expected a list of turns")
    if system:
        yield "system", f"<|im_start|>system\n{system}<|im_end|>"
    for i, turn in enumerate(conversation):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        expected = "gpt" if i % 2 else "human"
        if role != expected:
            raise InputError(f'turn {i + 1} of the conversation is from {role!r}, expected "{expected}": '
                             'turns alternate, "human" first')
        if not isinstance(text, str):
            raise InputError(f"turn {i + 1} of the conversation has the value {text!r:.60}, expected text")
        for token in RESERVED:
            if token in text:
                raise InputError(f"turn {i + 1} of the conversation holds the control token {token}; "
                                 "write <image> where an image belongs")
        if role == "human":
            yield role, f"<|im_start|>user\n{text.strip()}<|im_end|>"
            yield "prompt", "<|im_start|>assistant\n"
        else:
            yield role, f"{text.strip()}<|im_end|>"


def chat_prompt(conversation: Sequence[dict], system: str = SYSTEM_MESSAGE) -> str:
    """[{"from": "human" | "gpt", "value": text}, ...] -> the text that the model reads after <s>; when the
    human has the last turn, it ends with the assistant's opened one. Raises InputError if roles do not
    alternate or a text holds a control token."""
    return "".join(text for _, text in chat_parts(conversation, system))


def encode_conversation(tok: Tokenizer, conversation: Sequence[dict], tiles_per_image: Sequence[int] = (),
                        tokens_per_tile: int = 256, system: str | None = None) -> tuple[list[int], list[int]]:
    """(input_ids, labels): chat_prompt as tokens, each <image> of a human turn as <img>,
    tiles·tokens_per_tile placeholders, </img>; labels are -100 but on answers and their <|im_end|>, or all
    -100 if the last turn is the human's. system None: tok.system_message.

    Parts are encoded one by one: labels are exact, and a prompt for generation is a prefix of the training
    ids. Raises InputError if the <image> marks do not match the images, or the tokenizer lacks image tokens.
    """
    parts = list(chat_parts(conversation, tok.system_message if system is None else system))
    marks = sum(text.count("<image>") for role, text in parts if role == "human")
    if marks != len(tiles_per_image):
        raise InputError(f"the conversation has {marks} <image> marks for {len(tiles_per_image)} images")
    tiles, input_ids, labels = iter(tiles_per_image), [tok.bos_id], [IGNORED]
    for role, text in parts:
        ids = []
        for i, piece in enumerate(text.split("<image>") if role == "human" else [text]):
            if i:
                visual = [tok.token_id("<IMG_CONTEXT>")] * (next(tiles) * tokens_per_tile)
                ids += [tok.token_id("<img>"), *visual, tok.token_id("</img>")]
            ids += tok.encode(piece, bos=False)
        input_ids += ids
        labels += ids if role == "gpt" else [IGNORED] * len(ids)
    return input_ids, labels if role == "gpt" else [IGNORED] * len(labels)


# ---------------------------------------------------------------- pictures: tiling and normalisation

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Pillow only warns of a picture with more than MAX_IMAGE_PIXELS (a small file can unpack to gigabytes); here
# that is an error. The filter is set once: one around each open would race between threads.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def open_image(image: str | Path | Image.Image) -> Image.Image:
    """RGB with its pixels read. As in the official code, transparency and EXIF rotation are ignored."""
    name = str(image) if isinstance(image, (str, Path)) else getattr(image, "filename", "") or "the image"
    try:
        if not isinstance(image, Image.Image):
            with Image.open(image) as opened:
                return open_image(opened)
        if not 0 < image.width * image.height <= (Image.MAX_IMAGE_PIXELS or float("inf")):
            raise InputError(f"{name} is {image.width} x {image.height} pixels, "
                             f"expected 1 to {Image.MAX_IMAGE_PIXELS} in all")
        return image.convert("RGB")
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"the image {name} does not exist") from None
    except Exception as e:                         # what a damaged file raises depends on its format
        raise InputError(f"{name} is not a readable image: {type(e).__name__}: {e}") from None


def tile_image(image: str | Path | Image.Image, max_tiles: int = 12, image_size: int = 448,
               use_thumbnail: bool = True, min_tiles: int = 1) -> list[Image.Image]:
    """Squares of image_size pixels, row by row, from the grid of min_tiles to max_tiles that distorts the
    image least; if they are several, a thumbnail of the whole follows [repo: dynamic_preprocess]."""
    if not 1 <= min_tiles <= max_tiles or image_size < 1:
        raise InputError(f"min_tiles {min_tiles}, max_tiles {max_tiles}, image_size {image_size}: "
                         "expected 1 <= min_tiles <= max_tiles and a positive size")
    image = open_image(image)
    grids = [(columns, tiles // columns) for tiles in range(min_tiles, max_tiles + 1)
             for columns in range(1, tiles + 1) if tiles % columns == 0]           # small grids first
    least = float("inf")
    for grid in grids:
        distortion = abs(image.width / image.height - grid[0] / grid[1])
        # of two grids with one shape, the larger is taken if the picture has more than half of its pixels
        if distortion < least or (distortion == least
                                  and image.width * image.height > 0.5 * image_size ** 2 * grid[0] * grid[1]):
            (columns, rows), least = grid, distortion
    resized = image.resize((columns * image_size, rows * image_size), Image.Resampling.BICUBIC)
    tiles = [resized.crop((x, y, x + image_size, y + image_size))
             for y in range(0, resized.height, image_size) for x in range(0, resized.width, image_size)]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((image_size, image_size), Image.Resampling.BICUBIC))
    return tiles


def load_image(image: str | Path | Image.Image, max_tiles: int = 12, image_size: int = 448,
               use_thumbnail: bool = True, min_tiles: int = 1) -> torch.Tensor:
    """A file or a PIL image -> (n_tiles, 3, image_size, image_size) float32, normalised with ImageNet's mean
    and std. Raises InputError naming a file that is missing, damaged, empty or too large."""
    tiles = tile_image(image, max_tiles, image_size, use_thumbnail, min_tiles)
    pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))          # (n, S, S, 3) uint8
    pixels = pixels.permute(0, 3, 1, 2).contiguous().float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


# ---------------------------------------------------------------- training samples from files

class JsonlDataset(Dataset):
    """One dataset in the official format; a line of `annotation` is {"id", "image": "a.jpg" | ["a.jpg", ...],
    "conversations": [{"from": "human" | "gpt", "value": "...<image>..."}, ...]}, without "image" for text
    alone.

    A sample is {"input_ids", "labels" (T,) int64, "pixel_values" (n_tiles, 3, S, S) or None, "id"}. Lines are
    read when asked for; only their positions are kept. repeat_time 2.5 is every line twice and a random half
    of them (seed) once more. max_tiles, the budget of one sample, is shared by its images [repo]; max_tokens
    (default: the model's context) is a limit, nothing is cut. A bad line raises InputError with file and line
    number when it is asked for.
    """

    def __init__(self, annotation: str | Path, root: str | Path, tok: Tokenizer, config: MonoInternVLConfig,
                 repeat_time: float = 1, max_tiles: int | None = None, max_tokens: int | None = None,
                 seed: int = 0):
        self.annotation, self.root, self.tok, self.config = annotation, Path(root).resolve(), tok, config
        self.max_tiles = config.max_dynamic_patch if max_tiles is None else max_tiles
        self.max_tokens = config.context_length if max_tokens is None else max_tokens
        if type(repeat_time) not in (int, float) or not 0 < repeat_time < float("inf"):
            raise InputError(f"repeat_time of {annotation} is {repeat_time!r}, expected a positive number")
        if type(self.max_tiles) is not int or self.max_tiles < 1:
            raise InputError(f"max_dynamic_patch of {annotation} is {self.max_tiles!r}, expected at least 1")
        if not self.root.is_dir():
            raise InputError(f"the image folder {root} of {annotation} does not exist")
        numbers, offsets, offset = array("q"), array("q"), 0
        try:
            with open(annotation, "rb") as f:
                for number, line in enumerate(f, 1):
                    if line.strip():
                        numbers.append(number)
                        offsets.append(offset)
                    offset += len(line)
        except OSError as e:
            raise InputError(f"{annotation} is not readable: {e.strerror}") from None
        lines = np.stack([numbers, offsets], 1)                            # (n, 2)
        part = np.random.default_rng(seed).permutation(len(lines))[:round(repeat_time % 1 * len(lines))]
        self.lines = np.concatenate([lines] * int(repeat_time) + [lines[np.sort(part)]])
        if not len(self.lines):
            raise InputError(f"{annotation} with repeat_time {repeat_time} has no samples")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> dict:
        number, offset = self.lines[i].tolist()
        where = f"{self.annotation}:{number}"
        with open(self.annotation, "rb") as f:
            f.seek(offset)
            try:
                return self.sample(f.readline())
            except InputError as e:
                raise InputError(f"{where}: {e}") from None

    def sample(self, line: bytes) -> dict:
        try:
            line = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InputError(f"not JSON: {getattr(e, 'msg', e)}") from None
        if not isinstance(line, dict):
            raise InputError(f"{line!r:.60} is not an object with conversations")
        images = line.get("image") or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise InputError(f"image is {images!r:.60}, expected a file name or a list of them")
        c, budget = self.config, max(1, self.max_tiles // max(1, len(images)))
        tiles = [load_image(self.path(image), budget, c.image_size, c.use_thumbnail,
                            min(budget, c.min_dynamic_patch)) for image in images]
        input_ids, labels = encode_conversation(self.tok, line.get("conversations"), [len(t) for t in tiles],
                                                c.tokens_per_tile)
        if len(input_ids) > self.max_tokens:
            raise InputError(f"{len(input_ids)} tokens, the limit is {self.max_tokens}")
        if all(label == IGNORED for label in labels):
            raise InputError("the last turn is the human's: no answer to learn")
        return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels),
                "pixel_values": torch.cat(tiles) if tiles else None, "id": line.get("id")}

    def path(self, image: str) -> Path:
        """The file of an image name, links followed: a downloaded annotation must not reach outside root."""
        try:
            path = (self.root / image).resolve()
        except (OSError, RuntimeError, ValueError) as e:                   # a loop of links, a null character
            raise InputError(f"image {image!r:.200} is no file name: {e}") from None
        if not path.is_relative_to(self.root):
            raise InputError(f"image {image} leads out of the image folder {self.root}")
        return path


def load_meta(path: str | Path, tok: Tokenizer, config: MonoInternVLConfig, max_tiles: int | None = None,
              max_tokens: int | None = None, seed: int = 0) -> ConcatDataset:
    """meta.json, {name: {root, annotation, repeat_time, max_dynamic_patch?, data_augment?}}, -> its datasets
    in a row. root and annotation are relative to meta.json's folder. max_dynamic_patch goes before max_tiles
    [repo]."""
    meta, folder, datasets = _read_json(path), Path(path).parent, []
    if not isinstance(meta, dict) or not meta:
        raise InputError(f"{path}: expected {{name: {{root, annotation, repeat_time}}}}")
    for name, entry in meta.items():
        here = f"{path}: dataset {name}"
        if not isinstance(entry, dict) or {type(entry.get("root")), type(entry.get("annotation"))} != {str}:
            raise InputError(f"{here} needs root and annotation, two paths")
        if unknown := entry.keys() - {"root", "annotation", "repeat_time", "max_dynamic_patch",
                                      "data_augment", "length"}:
            raise InputError(f"{here} has the unknown field {min(unknown)}")
        if entry.get("data_augment"):
            raise InputError(f"{here} asks for data_augment, which is not supported; set it to false")
        datasets.append(JsonlDataset(
            folder / entry["annotation"], folder / entry["root"], tok, config, entry.get("repeat_time", 1),
            entry.get("max_dynamic_patch", max_tiles), max_tokens, seed))
    return ConcatDataset(datasets)


# ---------------------------------------------------------------- collation

def collate(samples: Sequence[dict], pad_token_id: int = 0, left: bool = False) -> dict:
    """Samples -> one batch: input_ids and labels (B, T); attention_mask (B, T), None when no row is padded
    (the model is faster then); pixel_values (n_tiles, 3, S, S) of all rows in order, or None. left: pad in
    front, as generate needs it."""
    longest = max(len(s["input_ids"]) for s in samples)

    def pad(row: torch.Tensor, value: int) -> torch.Tensor:
        missing = longest - len(row)
        return torch.nn.functional.pad(row, (missing, 0) if left else (0, missing), value=value)

    tiles = [s["pixel_values"] for s in samples if s["pixel_values"] is not None]
    mask = torch.stack([pad(torch.ones_like(s["input_ids"]), 0) for s in samples])
    return {"input_ids": torch.stack([pad(s["input_ids"], pad_token_id) for s in samples]),
            "attention_mask": None if mask.all() else mask,
            "labels": torch.stack([pad(s["labels"], IGNORED) for s in samples]),
            "pixel_values": torch.cat(tiles) if tiles else None}


# ---------------------------------------------------------------- command-line flags

def flag(default, help: str, **options):
    """A field of a flags dataclass with its line in --help, and argparse's options, such as choices=[...]."""
    return field(default_factory=lambda: copy(default), metadata={"help": help, **options})


def parse_flags(flags: type, argv: Sequence[str] | None = None, description: str | None = None):
    """A dataclass type -> an instance of it from the command line. Each field is a flag: `steps: int` takes
    --steps 200 or --steps=200, `compile: bool` --compile or --no-compile, `image: list[str]` one or more
    values. An unknown flag exits with 2 and the nearest name."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    hints = typing.get_type_hints(flags)
    for f in fields(flags):
        options = {**f.metadata, "help": f.metadata.get("help", f.name).replace("%", "%%"),
                   "default": f.default if f.default_factory is MISSING else f.default_factory(),
                   "required": f.default is f.default_factory is MISSING}
        kind = hints[f.name]
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            options |= {"type": typing.get_args(kind)[0], "nargs": "+"}
        else:                                                              # int, or int | None
            options["type"] = next((t for t in typing.get_args(kind) if t is not type(None)), kind)
        parser.add_argument("--" + f.name, **options)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), hints, 1)
        parser.error(f"unknown argument {name}" + (f"; did you mean --{near[0]}?" if near else ""))
    return flags(**vars(values))
