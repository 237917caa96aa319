"""Turns text, pictures and files into what the model reads.

In this order: the tokenizer and streamed decoding; the chat template and its labels; tiling and normalisation
of pictures; training samples from JSONL files and tar shards; batches: padding, packing, and the order of
samples. `config` is a MonoInternVLConfig. Shapes: B rows of a batch, T tokens, S pixels along a tile.
Sources as in mono_internvl.py: [repo] is the official code, [ours] our choice.
"""
import codecs
import ctypes
import glob
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import signal
import sys
import tarfile
import threading
import time
import warnings
from array import array
from bisect import bisect_right, insort_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
import torch
from PIL import Image, ImageEnhance
from sentencepiece import SentencePieceProcessor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from common import InputError, read_json

IGNORED = -100                                     # the label of a token without loss

# ---------------------------------------------------------------- tokenizer

class Tokenizer:
    """Text <-> ids. Reads tokenizer.model, sentencepiece BPE with byte fallback between special tokens, as
    InternLM2 has it [repo]; or, where that is missing, tokenizer.json, byte-level BPE as in GPT-2.

    Further tokens come from added_tokens.json or from tokenizer_config.json's added_tokens_decoder. len(tok)
    is the size of the vocabulary with added tokens, special_tokens maps text to id. Where the folder has no
    tokenizer.model, its chat_template decides whether <s> begins a conversation, what stands after <|im_end|>
    and which system message is the default. Raises InputError if a file is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.sp, self.library = Path(folder), None, None
        added, config = ({} if not (self.folder / name).exists() else read_json(self.folder / name)
                         for name in ("added_tokens.json", "tokenizer_config.json"))
        decoder = config.get("added_tokens_decoder", {})
        if (self.folder / "tokenizer.model").is_file():
            self.read_sentencepiece(self.folder / "tokenizer.model")
        elif (self.folder / "tokenizer.json").is_file():
            self.read_tokenizer_json(self.folder / "tokenizer.json", config)
            decoder = {}                           # the same tokens as in tokenizer.json
        else:
            raise InputError(f"{self.folder} has no tokenizer.model and no tokenizer.json; one of them "
                             "belongs beside the weights")
        try:
            known = set(self.bytes)
            more = {token: int(i) for token, i in added.items()}
            more |= {token["content"]: int(i) for i, token in decoder.items()}
            if self.library:                       # it finds its own added tokens in a text by itself
                more = {token: i for token, i in more.items() if i not in known}
            self.special_tokens |= more
            self.bytes |= {i: token.encode() for token, i in self.special_tokens.items()}
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise InputError(f"{self.folder}: added_tokens.json or the added_tokens_decoder of "
                             "tokenizer_config.json does not map tokens to ids") from None
        # Longest first: the pattern takes the first alternative that fits, and one may begin another. "(?!)"
        # fits nowhere.
        longest_first = sorted(more if self.library else self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self.system_message = config.get("system_message", self.system_message)  # the field is [ours]

    def read_sentencepiece(self, path: Path):
        try:
            self.sp = sp = SentencePieceProcessor(model_file=str(path))
            pieces = [sp.id_to_piece(i) for i in range(len(sp))]
            # The UTF-8 bytes of each id. A piece such as "<0xE4>" may be a part of a character, so decoding
            # first joins the bytes and then makes text of them.
            self.bytes = {i: bytes([int(p[3:5], 16)]) if sp.is_byte(i) else p.replace("▁", " ").encode()
                          for i, p in enumerate(pieces)}
        except (RuntimeError, OSError, ValueError) as e:
            raise InputError(f"{path} is not a sentencepiece model: {e}") from None
        self.special_tokens = {p: i for i, p in enumerate(pieces) if sp.is_control(i) or sp.is_unknown(i)}
        self.bos_id, self.eos_id = sp.bos_id(), sp.eos_id()
        self.pad_id = self.eos_id if sp.pad_id() < 0 else sp.pad_id()
        self.first_ids, self.after_turn, self.system_message = [self.bos_id], "", SYSTEM_MESSAGE

    def read_tokenizer_json(self, path: Path, config: dict):
        """config: tokenizer_config.json. It names the tokens of begin, end and padding."""
        content = read_json(path)
        try:
            self.library = tokenizers.Tokenizer.from_str(json.dumps(content))
            self.library.no_truncation()
            self.library.no_padding()
            own = self.library.get_added_tokens_decoder()
            # In byte-level BPE, each character of a piece stands for a byte: itself if it can be seen.
            seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
            unseen = sorted(set(range(256)) - set(seen))
            byte = {chr(b): b for b in seen} | {chr(256 + n): b for n, b in enumerate(unseen)}
            self.bytes = {i: bytes(byte[character] for character in piece)
                          for piece, i in self.library.get_vocab(with_added_tokens=False).items()
                          if i not in own}
        except KeyError:
            raise InputError(f"{path} is not byte-level BPE; of other models, name a folder with the "
                             "sentencepiece file tokenizer.model") from None
        except Exception as e:                     # the library has no class for its errors
            raise InputError(f"{path} is not a tokenizer: {str(e) or 'no vocabulary':.200}") from None
        self.bytes |= {i: token.content.encode() for i, token in own.items()}
        self.special_tokens = {token.content: i for i, token in own.items() if token.special}

        def token_id(kind, default):
            token = config.get(kind)
            token = token.get("content") if isinstance(token, dict) else token
            return self.special_tokens.get(token, default)

        self.eos_id = token_id("eos_token", self.special_tokens.get("<|im_end|>", 0))
        self.bos_id, self.pad_id = token_id("bos_token", self.eos_id), token_id("pad_token", self.eos_id)
        # The template is a Jinja program. In it, "\n" is a line end, or a backslash and an n.
        template = str(config.get("chat_template", ""))
        self.first_ids = [self.bos_id] if "bos_token" in template else []
        self.after_turn = "\n" if re.search(r"<\|im_end\|>(['\"]\s*\+\s*['\"])?(\n|\\n)", template) else ""
        system = re.search(r"<\|im_start\|>system(?:\n|\\n)([^{}<>|]*?)<\|im_end\|>", template)
        self.system_message = system[1].replace("\\n", "\n") if system else ""

    def __len__(self) -> int:
        return max(self.bytes) + 1

    def token_id(self, token: str) -> int:
        """The id of a special token. Raises InputError if there is no such token."""
        if token not in self.special_tokens:
            raise InputError(f"the tokenizer in {self.folder} has no token {token}")
        return self.special_tokens[token]

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Text -> ids, if bos with <s> in front, where the model has one. Raises InputError if the text has
        no UTF-8."""
        if re.search("[\ud800-\udfff]", text):
            raise InputError(f"the text {text[:40]!r} is not valid Unicode (a lone surrogate)")
        ids = list(self.first_ids) if bos else []
        for i, part in enumerate(self.special_pattern.split(text)):
            if i % 2:
                ids.append(self.special_tokens[part])
            else:
                ids += self.sp.encode(part) if self.sp else self.library.encode(
                    part, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids -> text. Raises InputError for an id beyond the vocabulary."""
        stream = TextStream(self, skip_special_tokens)
        return "".join(map(stream.push, ids)) + stream.flush()


class TextStream:
    """Decodes token by token. A character comes with its last byte, U+FFFD for bytes that are not UTF-8."""

    def __init__(self, tok: Tokenizer, skip_special_tokens: bool = True):
        self.tok, self.skipped_ids = tok, set(tok.special_tokens.values()) if skip_special_tokens else ()
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int | torch.Tensor) -> str:
        """Takes the next token. Returns the text that it completes, perhaps none."""
        token = int(token)
        if token not in self.tok.bytes:
            raise InputError(f"the tokenizer in {self.tok.folder} ({len(self.tok)} tokens) has no id {token}")
        return "" if token in self.skipped_ids else self.utf8.decode(self.tok.bytes[token])

    def flush(self) -> str:
        """Returns U+FFFD if the text ended within a character."""
        return self.utf8.decode(b"", final=True)


# ---------------------------------------------------------------- chat template and labels

# "You are a multimodal model by Shanghai AI Laboratory and SenseTime, InternVL in English, a useful and
# harmless AI assistant." The official models were trained with this message, so they are asked with it.
SYSTEM_MESSAGE = ("你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
                  "是一个有用无害的人工智能助手。")
# A turn must not hold these: they would fake a turn or an image. Answers may hold <ref>, <box> and the like.
RESERVED = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def turns(*texts: str) -> list[dict]:
    """A conversation of these texts. The first is the human's, the second the model's, and so on."""
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def chat_parts(conversation: Sequence[dict], system: str, after_turn: str = "",
               continued: bool = False) -> Iterator[tuple[str, str]]:
    """The internlm2-chat template [repo] in parts (role, text). The model learns the parts of role "gpt".
    after_turn: what other models have between <|im_end|> and the next turn. continued: turns came before."""
    if not isinstance(conversation, list | tuple) or not conversation:
        raise InputError(f"the conversation is {conversation!r:.60}, expected a list of turns")
    before = after_turn if continued else ""
    if system and not continued:
        yield "system", f"<|im_start|>system\n{system}<|im_end|>"
        before = after_turn
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
            yield role, f"{before}<|im_start|>user\n{text.strip()}<|im_end|>"
            yield "prompt", f"{after_turn}<|im_start|>assistant\n"
        else:
            yield role, f"{text.strip()}<|im_end|>"
        before = after_turn


def chat_prompt(conversation: Sequence[dict], system: str = SYSTEM_MESSAGE) -> str:
    """[{"from": "human" | "gpt", "value": text}, ...] -> the text that the model reads after <s>. After a
    human's last turn, it ends where the answer begins. Raises InputError if roles do not alternate or a text
    holds a control token."""
    return "".join(text for _, text in chat_parts(conversation, system))


def encode_conversation(tok: Tokenizer, conversation: Sequence[dict], tiles_per_image: Sequence[int] = (),
                        tokens_per_tile: int = 256, system: str | None = None,
                        continued: bool = False) -> tuple[list[int], list[int]]:
    """A conversation -> (input_ids, labels), two lists of one length. input_ids: <s> and chat_prompt. Each
    <image> of a human turn becomes <img>, tiles · tokens_per_tile times <IMG_CONTEXT>, </img>. labels: the
    ids of the answers and their <|im_end|>, else -100; all -100 if the last turn is the human's. system None
    takes tok.system_message. continued: turns came before these, so there is no <s> and no system message.

    Parts are encoded one by one, so labels are exact, and a prompt for generation is a prefix of the ids in
    training. Raises InputError like chat_prompt, and if there are not as many <image> marks as images.
    """
    system = tok.system_message if system is None else system
    parts = list(chat_parts(conversation, system, tok.after_turn, continued))
    marks = sum(text.count("<image>") for role, text in parts if role == "human")
    if marks != len(tiles_per_image):
        raise InputError(f"the conversation has {marks} <image> marks for {len(tiles_per_image)} images")
    tile_counts, input_ids = iter(tiles_per_image), [] if continued else list(tok.first_ids)
    labels = [IGNORED] * len(input_ids)
    for role, text in parts:
        ids = []
        for i, piece in enumerate(text.split("<image>") if role == "human" else [text]):
            if i:                                  # an image comes between two pieces
                placeholders = [tok.token_id("<IMG_CONTEXT>")] * (next(tile_counts) * tokens_per_tile)
                ids += [tok.token_id("<img>"), *placeholders, tok.token_id("</img>")]
            ids += tok.encode(piece, bos=False)
        input_ids += ids
        labels += ids if role == "gpt" else [IGNORED] * len(ids)
    return input_ids, labels if role == "gpt" else [IGNORED] * len(labels)


# ---------------------------------------------------------------- pictures: tiling and normalisation

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A small file can unpack to gigabytes. Pillow only warns of a picture with more than MAX_IMAGE_PIXELS pixels;
# here that is an error. The filter is set once, because setting it around each open is not thread-safe.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def open_image(image: str | Path | io.BytesIO | Image.Image) -> Image.Image:
    """Returns the image in RGB, its pixels read. Transparency and EXIF rotation are ignored [repo]. Raises
    InputError that names an image which is missing, damaged, empty or too large."""
    name = str(image) if isinstance(image, (str, Path)) else getattr(image, "filename", "") or "the image"
    try:
        with nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as opened:
            if 0 < opened.width * opened.height <= (Image.MAX_IMAGE_PIXELS or float("inf")):
                return opened.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"the image {name} does not exist") from None
    except Exception as e:                         # a damaged file raises a different error in each format
        raise InputError(f"{name} is not a readable image: {type(e).__name__}: {e}") from None
    raise InputError(f"{name} is {opened.width} x {opened.height} pixels, "
                     f"expected 1 to {Image.MAX_IMAGE_PIXELS} in all")


def tile_image(image: str | Path | io.BytesIO | Image.Image, max_tiles: int = 12, image_size: int = 448,
               use_thumbnail: bool = True, min_tiles: int = 1) -> list[Image.Image]:
    """Square RGB tiles of image_size pixels [repo: dynamic_preprocess]. The grid of min_tiles to max_tiles
    tiles with the closest aspect ratio wins; the image is resized to fill it and cut row by row. If there are
    several tiles, a thumbnail of the whole comes last. Raises InputError like open_image."""
    if not 1 <= min_tiles <= max_tiles <= 1000 or image_size < 1:
        raise InputError(f"min_tiles {min_tiles}, max_tiles {max_tiles}, image_size {image_size}: "
                         "expected 1 <= min_tiles <= max_tiles <= 1000 and a positive size")
    image = open_image(image)
    grids = [(across, count // across) for count in range(min_tiles, max_tiles + 1)
             for across in range(1, count + 1) if count % across == 0]             # small grids first
    least = float("inf")
    for across, down in grids:
        distortion = abs(image.width / image.height - across / down)
        # Of two grids with one aspect ratio, the larger wins if the image has more than half of its pixels.
        half_filled = image.width * image.height > 0.5 * image_size ** 2 * across * down
        if distortion < least or (distortion == least and half_filled):
            width, height, least = across * image_size, down * image_size, distortion
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    tiles = [resized.crop((x, y, x + image_size, y + image_size))
             for y in range(0, height, image_size) for x in range(0, width, image_size)]
    if use_thumbnail and len(tiles) > 1:
        tiles.append(image.resize((image_size, image_size), Image.Resampling.BICUBIC))
    return tiles


def load_image(image: str | Path | io.BytesIO | Image.Image, max_tiles: int = 12, image_size: int = 448,
               use_thumbnail: bool = True, min_tiles: int = 1,
               augment: random.Random | None = None) -> torch.Tensor:
    """The tiles of tile_image as (n_tiles, 3, image_size, image_size) float32, normalised with the mean and
    deviation of ImageNet. With augment, each tile first goes through JPEG of a quality drawn from 75 to 100
    [repo: build_transform]. Raises InputError like tile_image."""
    tiles = tile_image(image, max_tiles, image_size, use_thumbnail, min_tiles)
    for i, tile in enumerate(tiles if augment else ()):
        tile.save(file := io.BytesIO(), "JPEG", quality=augment.randint(75, 100))
        tiles[i] = open_image(file)
    pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))          # (n, S, S, 3) uint8
    pixels = pixels.permute(0, 3, 1, 2).contiguous().float() / 255                     # (n, 3, S, S)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def paste(canvas: Image.Image, image: Image.Image, left: int, top: int, width: int, height: int,
          angle: float) -> None:
    """Draws an image, turned by an angle in degrees and resized, onto an RGB canvas."""
    image = image.convert("RGBA").rotate(angle, Image.Resampling.BICUBIC)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(image, (left, top), mask=image)


def change_lightly(image: str | Path | io.BytesIO | Image.Image, rng: random.Random) -> Image.Image:
    """An RGB image of the same size: the image at 75 to 100 % of its size, turned by up to 12°, anywhere on a
    ground of any color, and up to 20 % darker or brighter [ours]. Raises InputError like open_image."""
    opened = image if isinstance(image, Image.Image) and image.mode == "RGBA" else open_image(image)
    canvas = Image.new("RGB", opened.size, tuple(rng.randrange(256) for _ in range(3)))
    scale = rng.uniform(0.75, 1)
    width, height = (max(1, round(side * scale)) for side in opened.size)
    left, top = rng.randint(0, opened.width - width), rng.randint(0, opened.height - height)
    paste(canvas, opened, left, top, width, height, rng.uniform(-12, 12))
    return ImageEnhance.Brightness(canvas).enhance(rng.uniform(0.8, 1.2))


# ---------------------------------------------------------------- training samples from files

class JsonlDataset(Dataset):
    """A dataset in the official format [repo]. A line of the file `annotation` is {"id", "image": "a.jpg" |
    ["a.jpg", ...], "conversations": [{"from": "human" | "gpt", "value": "...<image>..."}, ...]}, without
    "image" for text alone. `root` is the folder of the images.

    A sample is {"input_ids", "labels": (T,) int64, "pixel_values": (n_tiles, 3, S, S) float32 or None, "id",
    "task"}. It is read when it is asked for. Memory holds only where each line begins, 16 bytes per line.

    repeat_time 2.5 gives every sample twice and a random half of them, by seed, once more [ours: the official
    code takes the first part of the file, and no fractions above 1]. The images of a sample share max_tiles
    [repo]. A sample of more than max_tokens (default: the model's context) is an error, nothing is cut. With
    augment, its tiles go through JPEG as in load_image; with vary, its images through change_lightly. (seed,
    index) decide how, so repeat_time 10 gives ten variants of a picture. A bad sample raises InputError when
    it is asked for, with its file and line number. A sample without "id" has these as its id.
    """

    BLOCK_SIZE = 1 << 20                           # bytes

    def __init__(self, annotation: str | Path, root: str | Path, tok: Tokenizer, config,
                 repeat_time: float = 1, max_tiles: int | None = None, max_tokens: int | None = None,
                 seed: int = 0, augment: bool = False, task: str | None = None, vary: bool = False):
        if not os.path.isdir(root):
            raise InputError(f"the image folder {root} of {annotation} does not exist")
        self.annotation, self.root, self.tok, self.config = annotation, Path(root).resolve(), tok, config
        self.seed, self.augment, self.task, self.vary = seed, augment, task, vary
        self.max_tiles = config.max_dynamic_patch if max_tiles is None else max_tiles
        self.max_tokens = config.context_length if max_tokens is None else max_tokens
        if type(repeat_time) not in (int, float) or not 0 < repeat_time <= 1e6:
            raise InputError(f"repeat_time of {annotation} is {repeat_time!r}, expected a positive number of "
                             "at most 1e6")
        if type(self.max_tiles) is not int or self.max_tiles < 1:
            raise InputError(f"max_dynamic_patch of {annotation} is {self.max_tiles!r}, expected at least 1")
        self.locations = self.find_samples()
        n = len(self.locations)
        self.repeated, extra = int(repeat_time) * n, round(repeat_time % 1 * n)
        self.extra = np.sort(np.random.default_rng(seed).permutation(n if extra else 0)[:extra])
        if not len(self):
            raise InputError(f"{annotation} with repeat_time {repeat_time} has no samples")

    def find_samples(self) -> np.ndarray:
        """(n, 2) int64: the line number and the byte offset of each line that is not blank. numpy looks for
        line ends block by block, so ten million lines take seconds."""
        locations, lines, block_start = [np.empty((0, 2), np.int64)], 0, 0
        try:
            with open(self.annotation, "rb") as f:
                while block := f.read(self.BLOCK_SIZE) + f.readline():     # whole lines
                    characters = np.frombuffer(block, np.uint8)
                    starts = np.append(0, np.flatnonzero(characters[:-1] == ord("\n")) + 1)
                    ends = np.append(starts[1:], len(block))
                    blank = [i for i in np.flatnonzero(characters[starts] <= ord(" "))
                             if not block[starts[i]:ends[i]].strip()]
                    numbers = np.arange(lines + 1, lines + 1 + len(starts))
                    locations.append(np.delete(np.stack([numbers, block_start + starts], 1), blank, 0))
                    lines, block_start = lines + len(starts), block_start + len(block)
        except (OSError, ValueError) as e:         # ValueError: a null character in the name
            raise InputError(f"{self.annotation} is not readable: {getattr(e, 'strerror', e)}") from None
        return np.concatenate(locations)

    def __len__(self) -> int:
        return self.repeated + len(self.extra)

    def __getitem__(self, i: int) -> dict:
        location = i % len(self.locations) if i < self.repeated else self.extra[i - self.repeated]
        name, line, images = self.read(location)
        rng = random.Random(f"{self.seed}/{i}") if self.augment or self.vary else None
        try:
            sample = self.make_sample(line, images, rng)
        except InputError as e:
            raise InputError(f"{name}: {e}") from None
        return {**sample, "id": name if sample["id"] is None else sample["id"], "task": self.task}

    def read(self, location: int) -> tuple[str, bytes, list | None]:
        """What is there: (name for messages, line, images). Images None: the line names their files."""
        number, offset = self.locations[location].tolist()
        try:
            with open(self.annotation, "rb") as f:
                f.seek(offset)
                return f"{self.annotation}:{number}", f.readline(), None
        except OSError as e:
            raise InputError(f"{self.annotation} is not readable any more: {e.strerror}") from None

    def parse_line(self, line: bytes, images: list | None) -> tuple[dict, list]:
        """What `read` returned -> (the line as an object, its images: paths or open files)."""
        try:
            line = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InputError(f"not JSON: {getattr(e, 'msg', e)}") from None
        if not isinstance(line, dict):
            raise InputError(f"{line!r:.60} is not an object with conversations")
        if images is None:
            images = line.get("image") or []
            images = [images] if isinstance(images, str) else images
            if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
                raise InputError(f"image is {images!r:.60}, expected a file name or a list of them")
            images = [self.image_path(image) for image in images]
        return line, images

    def image_path(self, image: str) -> Path:
        """The file that `image` names, links followed. A downloaded annotation must not reach beyond root."""
        try:
            path = (self.root / image).resolve()
        except (OSError, RuntimeError, ValueError) as e:                   # a loop of links, a null character
            raise InputError(f"image {image!r:.200} is no file name: {e}") from None
        if not path.is_relative_to(self.root):
            raise InputError(f"image {image} leads out of the image folder {self.root}")
        return path

    def make_sample(self, line: bytes, images: list | None, rng: random.Random | None) -> dict:
        """What `read` returned -> a sample. Its "id" is None if the line has none. rng: for augmentation."""
        line, images = self.parse_line(line, images)
        if self.vary:
            images = [change_lightly(image, rng) for image in images]
        c, share = self.config, max(1, self.max_tiles // max(1, len(images)))
        tiles = [load_image(image, share, c.image_size, c.use_thumbnail, min(share, c.min_dynamic_patch),
                            rng if self.augment else None) for image in images]
        input_ids, labels = encode_conversation(self.tok, line.get("conversations"), [len(t) for t in tiles],
                                                c.tokens_per_tile)
        if len(input_ids) > self.max_tokens:
            raise InputError(f"{len(input_ids)} tokens, the limit is {self.max_tokens}")
        if all(label == IGNORED for label in labels):
            raise InputError("the last turn is the human's: no answer to learn")
        return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels),
                "pixel_values": torch.cat(tiles) if tiles else None, "id": line.get("id")}


class TarDataset(JsonlDataset):
    """The same from .tar shards in WebDataset's layout: neighbouring files with one key are a sample. a.json
    is its line, other files (a.jpg, a.1.png) are its images, in the order of the shard. If a.json is missing
    or has no conversations, a.txt is a caption, learned as the answer to <image> [ours]."""

    def __init__(self, patterns: Sequence[str], *arguments, **options):
        """patterns: "a.tar", "a-{000..003}.tar" or "a-*.tar". The others are JsonlDataset's after root."""
        self.shards = []
        for pattern in patterns:
            if braces := re.search(r"\{(\d{1,6})\.\.(\d{1,6})\}", pattern):
                numbers = range(int(braces[1]), int(braces[2]) + 1)
                self.shards += [pattern.replace(braces[0], f"{i:0{len(braces[1])}}") for i in numbers]
            elif re.search(r"[*?]", pattern) and "\0" not in pattern:      # glob would raise ValueError
                self.shards += sorted(glob.glob(pattern))
            else:
                self.shards.append(pattern)
        if not self.shards:
            raise InputError(f"no file is called {' or '.join(patterns)}")
        super().__init__(" + ".join(patterns), ".", *arguments, **options)

    def find_samples(self) -> np.ndarray:
        """(n, 2) int64: shard number and byte offset of each sample's first file. Reads all headers once."""
        locations, previous = array("q"), None
        for number, path in enumerate(self.shards):
            try:
                with tarfile.open(path, "r:") as tar:
                    while member := tar.next():
                        key, _ = key_and_extension(member.name)
                        if member.isfile() and previous != (number, key):
                            locations.extend((number, member.offset))
                            previous = number, key
                        tar.members.clear()        # tarfile would keep all headers in memory
                    tar.fileobj.seek(tar.offset)   # zeros end an archive; tarfile accepts one without them
                    if tar.fileobj.read(512) != bytes(512):
                        raise tarfile.ReadError("its end is missing")
            except (OSError, ValueError, tarfile.TarError) as e:
                raise InputError(f"{path} is no complete, uncompressed .tar: {e}") from None
        return np.array(locations, np.int64).reshape(-1, 2)

    def read(self, location: int) -> tuple[str, bytes, list | None]:
        number, offset = self.locations[location].tolist()
        path, sample_key, files = self.shards[number], None, {}
        try:
            with open(path, "rb") as f:
                f.seek(offset)
                with tarfile.open(fileobj=f, mode="r:") as tar:
                    for member in tar:
                        key, extension = key_and_extension(member.name)
                        if sample_key not in (None, key):
                            break
                        sample_key = key
                        if member.isfile():
                            files[extension] = tar.extractfile(member).read()
            if sample_key is None:
                raise tarfile.ReadError(f"no file begins at byte {offset}")
        except (OSError, tarfile.TarError) as e:
            raise InputError(f"{path} is not readable any more: {e}") from None
        line, caption = files.pop(".json", b""), files.pop(".txt", None)
        if caption is not None and b'"conversations"' not in line:
            caption = caption.decode(errors="surrogateescape")             # `encode` refuses invalid UTF-8
            line = json.dumps({"conversations": turns("<image>", caption)}).encode()
        return f"{path}: {sample_key}", line, [io.BytesIO(content) for content in files.values()]


def key_and_extension(name: str) -> tuple[str, str]:
    """WebDataset's rule: the file "part/7.left.png" has the key "part/7" and the extension ".left.png"."""
    folder, slash, file = name.rpartition("/")
    stem, dot, extension = file.partition(".")
    return folder + slash + stem, dot + extension


STAGE_NAMES = "S1.1", "S1.2", "S1.3", "S2"


def load_meta(path: str | Path, tok: Tokenizer, config, max_tiles: int | None = None,
              max_tokens: int | None = None, seed: int = 0, stage: str | None = None) -> ConcatDataset:
    """The datasets of a meta.json, {name: {root, annotation, repeat_time, max_dynamic_patch?,
    data_augment?}}, in a row [repo]. root and annotation are relative to the folder of meta.json. An
    annotation that ends in .tar, or is a list, names shards (TarDataset) and needs no root. max_dynamic_patch
    replaces max_tiles. "stages": ["S1.1", ...] keeps a dataset to these stages, and "augment": true is
    JsonlDataset's vary [both ours]. Raises InputError that names the dataset and the field, and if no dataset
    is for this stage."""
    meta, folder, datasets = read_json(path), Path(path).parent, []
    if not meta:
        raise InputError(f"{path}: expected {{name: {{root, annotation, repeat_time}}}}")
    for name, entry in meta.items():
        here, entry = f"{path}: dataset {name}", entry if isinstance(entry, dict) else {}
        files = entry.get("annotation")
        shards = files if isinstance(files, list) else [files] if str(files).endswith(".tar") else []
        if not shards and {type(entry.get("root")), type(files)} != {str}:
            raise InputError(f"{here} needs root and annotation, two paths, or .tar shards as annotation")
        if unknown := entry.keys() - {"root", "annotation", "repeat_time", "max_dynamic_patch",
                                      "data_augment", "length", "stages", "augment"}:
            raise InputError(f"{here} has the unknown field {min(unknown)}")
        for field in ("data_augment", "augment"):
            if type(entry.get(field, False)) is not bool:
                raise InputError(f"{here}: {field} is {entry[field]!r:.60}, expected true or false")
        stages = entry.get("stages", list(STAGE_NAMES))
        if not isinstance(stages, list) or not stages or any(s not in STAGE_NAMES for s in stages):
            raise InputError(f"{here}: stages is {stages!r:.60}, expected a list of {', '.join(STAGE_NAMES)}")
        if stage is not None and stage not in stages:
            continue
        options = (tok, config, entry.get("repeat_time", 1), entry.get("max_dynamic_patch", max_tiles),
                   max_tokens, seed, entry.get("data_augment", False), name, entry.get("augment", False))
        datasets.append(TarDataset([str(folder / str(shard)) for shard in shards], *options) if shards
                        else JsonlDataset(folder / files, folder / entry["root"], *options))
    if not datasets:
        raise InputError(f"{path}: no dataset is for {stage}; add it to the stages of one, or name other "
                         "--stages")
    return ConcatDataset(datasets)


# ---------------------------------------------------------------- batches: padding and packing

def collate(samples: Sequence[dict], pad_token_id: int = 0, left: bool = False) -> dict:
    """Samples, or rows of `pack`, -> a batch: input_ids and labels (B, T) int64; attention_mask (B, T), 0 at
    pads, or None without pads, because the model is then faster; pixel_values (n_tiles, 3, S, S) of all rows
    in order, or None; with packed rows document_ids (B, T), 0 at pads. left: pads come first, as generate
    needs it."""
    def pad(sequences: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(sequences, True, value, "left" if left else "right")

    tiles = [s["pixel_values"] for s in samples if s["pixel_values"] is not None]
    mask = pad([torch.ones_like(s["input_ids"]) for s in samples], 0)
    batch = {"input_ids": pad([s["input_ids"] for s in samples], pad_token_id),
             "attention_mask": None if mask.all() else mask,
             "labels": pad([s["labels"] for s in samples], IGNORED),
             "pixel_values": torch.cat(tiles) if tiles else None}
    if "document_ids" in samples[0]:
        batch["document_ids"] = pad([s["document_ids"] for s in samples], 0)
    return batch


def pack(samples: Sequence[dict]) -> dict:
    """Samples one after the other in one row. document_ids (T,) int64, 1 in the first sample, 2 in the second
    and so on, keep the model from mixing them."""
    tiles = [s["pixel_values"] for s in samples if s["pixel_values"] is not None]
    return {"input_ids": torch.cat([s["input_ids"] for s in samples]),
            "labels": torch.cat([s["labels"] for s in samples]),
            "pixel_values": torch.cat(tiles) if tiles else None,
            "document_ids": torch.cat([torch.full_like(s["input_ids"], i) for i, s in enumerate(samples, 1)])}


def sample_numbers(batch: dict) -> torch.Tensor:
    """(B, T) int64: which sample of the batch a token belongs to, -1 at pads. A packed row has several."""
    documents, mask = batch.get("document_ids"), batch["attention_mask"]
    if documents is None:
        documents = torch.ones_like(batch["labels"]) if mask is None else mask
    per_row = documents.amax(1, keepdim=True)                              # (B, 1) number of samples
    return torch.where(documents > 0, documents - 1 + per_row.cumsum(0) - per_row, -1)


def count_tokens(batch: dict, tokens_per_tile: int) -> dict[str, float]:
    """How many "text" and "visual" tokens a batch has, how many supervised "labels", and how many "pairs" of
    tokens of one sample, of which one sees the other."""
    owner = sample_numbers(batch)
    lengths = owner[owner >= 0].bincount()
    visual = 0 if batch["pixel_values"] is None else len(batch["pixel_values"]) * tokens_per_tile
    return {"text": int(lengths.sum()) - visual, "visual": visual,
            "labels": int((batch["labels"][:, 1:] != IGNORED).sum()),
            "pairs": int(lengths.square().sum()) / 2}


def batch_as_text(batch: dict, tok: Tokenizer, rows: int = 3) -> str:
    """The first rows of a batch as text, one line each. What is learned stands between » and «."""
    lines = []
    for ids, labels, real in zip(batch["input_ids"][:rows], batch["labels"], sample_numbers(batch) >= 0,
                                 strict=False):
        text, tokens = "", zip(ids[real].tolist(), labels[real].tolist(), strict=True)
        for learned, group in itertools.groupby(tokens, lambda token: token[1] != IGNORED):
            part = tok.decode([i for i, _ in group], skip_special_tokens=False)
            text += f"»{part}«" if learned else part
        lines.append(re.sub("(<IMG_CONTEXT>)+",
                            lambda run: f"<IMG_CONTEXT>×{run[0].count('<IMG_CONTEXT>')}", text))
    return "\n".join(lines)


# ---------------------------------------------------------------- batches: the order of samples

def too_many_bad(bad: int, seen: int, size: int, max_bad: float) -> str | None:
    """A message if the share of unreadable samples is above max_bad, else None. While fewer than 1000 (or
    `size`, those of the dataset) were seen, it is the share of 1000. Up to 10 are no reason to stop, unless
    max_bad is 0 [ours]."""
    if bad <= (max_bad and max(10, max_bad * min(size, max(seen, 1000)))):
        return None
    return (f"{bad} of the {min(seen, size)} samples read so far are unreadable; --max_bad {max_bad:g} "
            "allows fewer")


def end_with_parent(_: int):
    """Called in each reader process. If the training process is killed, it cannot end its readers itself."""
    parent = multiprocessing.parent_process().pid
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1                       # of linux/prctl.h
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:                 # it died before the call
            os._exit(1)
        return

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


class ErrorsAsValues(Dataset):
    """Items are (index, sample, None) or (index, None, error message): a bad sample must not end a worker
    process. Tensors become numpy arrays, which travel through a pipe: a tensor would need an open file."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, i: int) -> tuple[int, dict | None, str | None]:
        try:
            sample = self.dataset[i].items()
            return i, {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in sample}, None
        except InputError as e:
            return i, None, str(e)


class Buffered(NamedTuple):
    """A sample that waits for its batch."""
    number: int                                    # how many samples this rank had read by then
    index: int                                     # its index in the dataset
    tokens: int
    sample: dict


class Batches:
    """Endless seeded batches of one rank: what `collate` returns, and "ids" and "tasks" of the samples.

    All ranks share one permutation per epoch, made from (seed, epoch) alone. Rank r takes positions r,
    r + world_size, … A dataset without a length is read in the order 0, 1, 2, … Worker processes only fetch
    samples, so their number does not change the order.

    Samples of similar length share a batch: the samples of `pool` batches are read, sorted by length and cut
    into batches, which are shuffled. With pool=1, batch j of all ranks together is piece j of the order.

    With pack_tokens, a batch has batch_size rows of at most pack_tokens tokens, filled from a buffer that
    holds the tokens of `pool` batches. A row takes the sample that has waited longest, and then the longest
    that still fits, until none does. `utilisation` is the share of batch_size · pack_tokens that is no pad.

    A bad sample (InputError, or longer than pack_tokens) is left out and reported once by on_bad(index,
    message), by default on stderr. `bad` maps index to message, `seen` counts all samples read. Raises
    InputError if more than max_bad of them are bad.
    """

    # A saved order can only be continued with the same values of these.
    SETTINGS = "batch_size", "pool", "pack_tokens", "seed", "rank", "world_size", "size"

    def __init__(self, dataset: Dataset, batch_size: int, pad_token_id: int, *, seed: int = 0, rank: int = 0,
                 world_size: int = 1, workers: int = 0, pack_tokens: int | None = None, pool: int = 8,
                 max_bad: float = 0.01, on_bad: Callable[[int, str], None] | None = None):
        self.dataset, self.pad_token_id, self.workers, self.max_bad = dataset, pad_token_id, workers, max_bad
        self.batch_size, self.pool, self.pack_tokens = batch_size, pool, pack_tokens
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.size = len(dataset) if hasattr(dataset, "__len__") else None
        self.on_bad = on_bad or (lambda _, error: print("bad sample, left out:", error, file=sys.stderr))
        self.rng = random.Random(seed)             # shuffles batches on all ranks alike: like lengths meet
        self.seen, self.bad, self.packed_tokens, self.packed_room = 0, {}, 0, 0
        # What comes first in the order, and where it goes on. Other numbers than these: `take_over`.
        self.left_over, self.start = [], 0
        # Read, not given yet: the batches of a pool, one after the other, or, for packing, sorted by length.
        self.buffer: list[Buffered] = []

    @property
    def utilisation(self) -> float:
        return self.packed_tokens / max(1, self.packed_room)

    def position(self, n: int) -> int:
        """The place in the order, epochs one after the other, of sample n of all ranks together."""
        waiting = len(self.left_over)
        return self.left_over[n] if n < waiting else self.start + n - waiting

    def indices(self) -> Iterator[int]:
        """This rank's share of the order, from the first sample on that was not read yet."""
        epoch = order = None
        for n in itertools.count(self.seen * self.world_size + self.rank, self.world_size):
            position = self.position(n)
            if self.size and epoch != position // self.size:
                epoch = position // self.size
                order = np.arange(self.size, dtype=np.uint32 if self.size < 2 ** 32 else np.int64)
                np.random.default_rng([self.seed, epoch]).shuffle(order)
            yield int(order[position % self.size]) if self.size else position

    def fetch(self) -> Iterator[tuple[int, dict | None, str | None]]:
        """(index, sample or None, error or None) for each of `indices`."""
        # Workers read the next pool while this one is used. collate_fn keeps items as they are. generator: a
        # DataLoader would draw a number from the global one.
        ahead = max(2, -(-self.pool * self.batch_size // self.workers)) if self.workers else None
        for i, sample, error in DataLoader(
                ErrorsAsValues(self.dataset), batch_size=None, sampler=self.indices(), collate_fn=tuple,
                num_workers=self.workers, prefetch_factor=ahead, generator=torch.Generator(),
                worker_init_fn=end_with_parent):
            for name, value in (sample or {}).items():
                sample[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            yield i, sample, error

    def next_sample(self, source) -> Buffered:
        """The next good sample. source: what `fetch` yields."""
        while True:
            i, sample, error = next(source)
            self.seen += 1
            tokens = len(sample["input_ids"]) if sample else 0
            if self.pack_tokens and tokens > self.pack_tokens:
                error = f"sample {sample['id']}: {tokens} tokens, a packed row has {self.pack_tokens}"
            if error is None:
                return Buffered(self.seen, i, tokens, sample)
            if i not in self.bad:
                self.bad[i] = error
                self.on_bad(i, error)
                if problem := too_many_bad(len(self.bad), self.seen, self.size or sys.maxsize, self.max_bad):
                    raise InputError(f"{problem}. The last: {error}")
            if len(self.bad) == self.size:
                raise InputError(f"all {self.size} samples are unreadable. The last: {error}")

    def next_batch(self, source) -> list[list[dict]]:
        """The next batch, a list of its samples for each row: one sample."""
        if not self.buffer:
            pool = [self.next_sample(source) for _ in range(self.pool * self.batch_size)]
            pool.sort(key=lambda b: b.tokens)
            batches = [pool[i:i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
            self.rng.shuffle(batches)
            self.buffer = list(itertools.chain(*batches))
        return [[self.buffer.pop(0).sample] for _ in range(self.batch_size)]

    def next_packed_batch(self, source) -> list[list[dict]]:
        """The next batch, a list of its samples for each row: as many as fit."""
        buffer, rows = self.buffer, []
        tokens = sum(b.tokens for b in buffer)
        while tokens < self.pool * self.batch_size * self.pack_tokens:
            sample = self.next_sample(source)
            insort_left(buffer, sample, key=lambda b: b.tokens)            # of equal length: the newest first
            tokens += sample.tokens
        for _ in range(self.batch_size):
            oldest = min(range(len(buffer)), key=lambda i: buffer[i].number)
            row = [buffer.pop(oldest)]
            room = self.pack_tokens - row[0].tokens
            while fitting := bisect_right(buffer, room, key=lambda b: b.tokens):    # so many samples fit
                row.append(buffer.pop(fitting - 1))        # the longest of them, and of equal ones the oldest
                room -= row[-1].tokens
            rows.append([b.sample for b in row])
            self.packed_tokens += self.pack_tokens - room
            self.packed_room += self.pack_tokens
        return rows

    def __iter__(self) -> Iterator[dict]:
        source = self.fetch()
        while True:
            rows = self.next_packed_batch(source) if self.pack_tokens else self.next_batch(source)
            batch = collate([pack(row) if self.pack_tokens else row[0] for row in rows], self.pad_token_id)
            samples = list(itertools.chain(*rows))
            yield {**batch, "ids": [sample["id"] for sample in samples],
                   "tasks": [sample.get("task") for sample in samples]}

    def state_dict(self) -> dict:
        """The position in the order, as JSON. Samples in the buffer are saved by their index."""
        return {"settings": {name: getattr(self, name) for name in self.SETTINGS}, "seen": self.seen,
                "left_over": self.left_over, "start": self.start,
                "bad": list(self.bad.items()), "packed_tokens": self.packed_tokens,
                "packed_room": self.packed_room, "rng": self.rng.getstate(),
                "buffer": [{"number": b.number, "index": b.index, "tokens": b.tokens} for b in self.buffer]}

    def check_settings(self, state: dict, names: Sequence[str] = SETTINGS):
        for name in names:
            if state["settings"][name] != getattr(self, name):
                raise InputError(f"the order of samples was saved with {name} = {state['settings'][name]}, "
                                 f"and now it is {getattr(self, name)}: continue with the same value, or "
                                 "start a new run")

    def load_state_dict(self, state: dict):
        """Call it before iterating. Raises InputError if SETTINGS differ or a buffered sample is bad now."""
        self.check_settings(state)
        self.seen, self.bad = state["seen"], dict(state["bad"])
        self.left_over, self.start = state["left_over"], state["start"]
        self.packed_tokens, self.packed_room = state["packed_tokens"], state["packed_room"]
        version, words, gauss = state["rng"]
        self.rng.setstate((version, tuple(words), gauss))
        self.buffer = [Buffered(**b, sample=self.dataset[b["index"]]) for b in state["buffer"]]

    def take_over(self, states: Sequence[dict]):
        """Continues the order of another number of ranks from the states of all of them. First come the
        samples that were still in their buffers, or that one rank had not reached while others were further
        on: none is lost, and none is given twice. Call it before iterating."""
        old = len(states)
        for state in states:
            self.check_settings(state, ("seed", "size"))
            self.bad |= dict(state["bad"])
        self.left_over, self.start = states[0]["left_over"], states[0]["start"]
        end = max(len(self.left_over), *(state["seen"] * old for state in states))
        numbers = [(b["number"] - 1) * old + r for r, state in enumerate(states) for b in state["buffer"]]
        for r, state in enumerate(states):
            numbers += range(state["seen"] * old + r, end, old)
        self.left_over, self.start = sorted(map(self.position, numbers)), self.position(end)
