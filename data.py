"""Turns text, pictures and files into what the model reads.

In this order: the tokenizer and streamed decoding; the chat template and its labels; tiling and normalisation
of pictures; training samples from JSONL files and tar shards; batches: padding, packing, and the order of
samples. `config` is a MonoInternVLConfig. In shapes, B is the rows of a batch, T the tokens of a row, and S
the side of a tile in pixels. Sources as in mono_internvl.py: [repo] is the official code, [ours] our choice.
"""
import codecs
import glob
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import sys
import tarfile
import threading
import time
from array import array
from bisect import bisect_right, insort_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import tokenizers
import torch
from PIL import ExifTags, Image, ImageEnhance, ImageOps, PngImagePlugin
from sentencepiece import SentencePieceProcessor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from common import LFS_POINTER, InputError, read_json, readable, unreadable

ImageFile = str | Path | io.BytesIO | Image.Image
IGNORED = -100                                     # the label of a token without loss
# "You are a multimodal model by Shanghai AI Laboratory and SenseTime, InternVL in English, a useful and
# harmless AI assistant." The official models were trained with this system message.
SYSTEM_MESSAGE = ("你是由上海人工智能实验室联合商汤科技"
                  "开发的书生多模态大模型，"
                  "英文名叫InternVL, 是一个有用无害的人工智能助手。")

# ---------------------------------------------------------------- tokenizer

class Tokenizer:
    """Turns text into ids and ids into text. It reads tokenizer.model, the sentencepiece BPE of InternLM2
    [repo]. A folder without that file needs a tokenizer.json with byte-level BPE, as in GPT-2. More tokens
    may be added by added_tokens.json, or by added_tokens_decoder in tokenizer_config.json.

    len(tok) is the size of the vocabulary with the added tokens. `special_tokens` maps text to id, and
    `bytes` maps each id to the UTF-8 bytes of its text. A conversation begins with `first_ids` (<s>, or
    nothing) and by default with `system_message`; `after_turn` stands between <|im_end|> and the next turn.
    With tokenizer.json, these three follow the chat_template of tokenizer_config.json. Raises InputError if a
    file is missing or damaged.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.sp, self.library = Path(folder), None, None      # one of the last two will be set
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
            added = {token: int(i) for token, i in added.items()}
            added |= {token["content"]: int(i) for i, token in decoder.items()}
            if self.library:                       # it finds the tokens of tokenizer.json itself
                added = {token: i for token, i in added.items() if i not in self.bytes}
            self.special_tokens |= added
            self.bytes |= {i: token.encode() for token, i in self.special_tokens.items()}
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise InputError(f"{self.folder}: added_tokens.json or the added_tokens_decoder of "
                             "tokenizer_config.json does not map tokens to ids") from None
        # The longest come first, because one token may begin another. "(?!)" never matches.
        longest_first = sorted(added if self.library else self.special_tokens, key=len, reverse=True)
        self.special_pattern = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self.system_message = config.get("system_message", self.system_message)  # the field is [ours]

    def read_sentencepiece(self, path: Path):
        try:
            self.sp = sp = SentencePieceProcessor(model_file=str(path))
            pieces = [sp.id_to_piece(i) for i in range(len(sp))]
            # A piece such as "<0xE4>" is one byte, which may be only a part of a character.
            self.bytes = {i: bytes([int(p[3:5], 16)]) if sp.is_byte(i) else p.replace("▁", " ").encode()
                          for i, p in enumerate(pieces)}
        except (RuntimeError, OSError, ValueError) as e:
            raise unreadable(path, f"is not a sentencepiece model: {e}") from None
        self.special_tokens = {p: i for i, p in enumerate(pieces) if sp.is_control(i) or sp.is_unknown(i)}
        self.bos_id, self.eos_id = sp.bos_id(), sp.eos_id()
        self.pad_id = self.eos_id if sp.pad_id() < 0 else sp.pad_id()
        self.first_ids, self.after_turn, self.system_message = [self.bos_id], "", SYSTEM_MESSAGE

    def read_tokenizer_json(self, path: Path, config: dict):
        """config is tokenizer_config.json, which names the tokens of begin, end and padding."""
        content = read_json(path)
        try:
            self.library = tokenizers.Tokenizer.from_str(json.dumps(content))
            self.library.no_truncation()
            self.library.no_padding()
            own = self.library.get_added_tokens_decoder()
            # Byte-level BPE writes each byte as one character. A visible character is its own byte. The
            # other bytes are written as the characters from 256 on.
            visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
            others = sorted(set(range(256)) - set(visible))
            byte = {chr(b): b for b in visible} | {chr(256 + n): b for n, b in enumerate(others)}
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
        bos, eos, pad = (token.get("content") if isinstance(token, dict) else token
                         for token in map(config.get, ("bos_token", "eos_token", "pad_token")))
        self.eos_id = self.special_tokens.get(eos, self.special_tokens.get("<|im_end|>", 0))
        self.bos_id, self.pad_id = (self.special_tokens.get(token, self.eos_id) for token in (bos, pad))
        # The template is a Jinja program, in which a line end may be written as a backslash and an n.
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
        """Text -> ids. bos puts `first_ids` in front. Raises InputError if the text is not valid Unicode."""
        if re.search("[\ud800-\udfff]", text):
            raise InputError(f"the text {text[:40]!r} is not valid Unicode (a lone surrogate)")
        ids = list(self.first_ids) if bos else []
        for i, part in enumerate(self.special_pattern.split(text)):
            if i % 2:                              # split gives text and special tokens in turn
                ids.append(self.special_tokens[part])
            elif self.sp:
                ids += self.sp.encode(part)
            else:
                ids += self.library.encode(part, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Ids -> text. Raises InputError for an id beyond the vocabulary."""
        stream = TextStream(self, skip_special_tokens)
        return "".join(map(stream.push, ids)) + stream.flush()


class TextStream:
    """Decodes token by token. A character comes with its last byte, U+FFFD for what is not UTF-8."""

    def __init__(self, tok: Tokenizer, skip_special_tokens: bool = True):
        self.tok, self.skipped_ids = tok, set(tok.special_tokens.values()) if skip_special_tokens else ()
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int | torch.Tensor) -> str:
        """Takes the next id and returns the text that it completes, which may be ""."""
        token = int(token)
        if token not in self.tok.bytes:
            raise InputError(f"the tokenizer in {self.tok.folder} ({len(self.tok)} tokens) has no id {token}")
        return "" if token in self.skipped_ids else self.utf8.decode(self.tok.bytes[token])

    def flush(self) -> str:
        """Call it after the last token. Returns U+FFFD if the text ended within a character, else ""."""
        return self.utf8.decode(b"", final=True)


# ---------------------------------------------------------------- chat template and labels

# A turn must not hold these, which would fake a turn or an image. <ref>, <box> and the like are allowed.
RESERVED = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")


def turns(*texts: str) -> list[dict]:
    """A conversation of these texts, the human's and the model's in turn."""
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


def chat_parts(conversation: Sequence[dict], system: str, after_turn: str = "",
               continued: bool = False) -> Iterator[tuple[str, str]]:
    """Yields the parts (role, text) of a conversation in the internlm2-chat template [repo]. The role is
    "system", "human", "prompt" for the beginning of the model's turn, or "gpt" for its answer. A first turn
    from "system" replaces `system` [ours, as in later InternVL]. after_turn is Tokenizer.after_turn.
    continued says that turns came before, so `system` is left out."""
    first = conversation[0] if isinstance(conversation, list | tuple) and conversation else None
    own = isinstance(first, dict) and first.get("from") == "system"        # has it a message of its own?
    if first is None or len(conversation) == own:
        raise InputError(f"the conversation is {conversation!r:.60}, expected a list of turns")
    before = after_turn if continued else ""       # what stands before a human's turn
    if system and not own and not continued:
        yield "system", f"<|im_start|>system\n{system}<|im_end|>"
        before = after_turn
    for number, turn in enumerate(conversation, 1):
        role, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        expected = "system" if own and number == 1 else "human" if (number + own) % 2 else "gpt"
        if role != expected:
            raise InputError(f'turn {number} of the conversation is from {role!r:.60}, expected '
                             f'"{expected}": turns alternate, "human" first')
        if not isinstance(text, str):
            raise InputError(f"turn {number} of the conversation has the value {text!r:.60}, expected text")
        for token in RESERVED:
            if token in text:
                raise InputError(f"turn {number} of the conversation holds the control token {token}; "
                                 "write <image> where an image belongs")
        if role == "system":
            if not text:
                continue
            yield role, f"<|im_start|>system\n{text}<|im_end|>"
        elif role == "human":
            yield role, f"{before}<|im_start|>user\n{text.strip()}<|im_end|>"
            yield "prompt", f"{after_turn}<|im_start|>assistant\n"
        else:
            yield role, f"{text.strip()}<|im_end|>"
        before = after_turn


def chat_prompt(conversation: Sequence[dict], system: str = SYSTEM_MESSAGE) -> str:
    """[{"from": "human" | "gpt", "value": text}, ...] -> the text that the model reads after <s>. If the last
    turn is the human's, the text ends where the answer begins. The first turn may be a system message, from
    "system". Raises InputError if roles do not alternate or a text holds a control token."""
    return "".join(text for _, text in chat_parts(conversation, system))


def encode_conversation(tok: Tokenizer, conversation: Sequence[dict], tiles_per_image: Sequence[int] = (),
                        tokens_per_tile: int = 256, continued: bool = False) -> tuple[list[int], list[int]]:
    """A conversation -> (input_ids, labels), two lists of one length. The ids are those of <s> and of
    chat_prompt with tok.system_message. Each <image> of a human turn becomes <img>, then <IMG_CONTEXT>
    tokens_per_tile times for each tile, then </img>. The labels are the ids of the answers with their
    <|im_end|>, and -100 elsewhere. All are -100 if the last turn is the human's. continued says that turns
    came before these, so <s> and the system message are left out.

    Parts are encoded one by one, so no token spans a prompt and its answer, and a prompt for generation is a
    prefix of the training ids. Raises InputError like chat_prompt, and if marks and images differ in number.
    """
    parts = list(chat_parts(conversation, tok.system_message, tok.after_turn, continued))
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
    if role != "gpt":                              # the last turn is a question
        labels = [IGNORED] * len(labels)
    return input_ids, labels


# ---------------------------------------------------------------- pictures: tiling and normalisation

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_PIXELS = 2 ** 28                               # a small file may claim any number of pixels
PngImagePlugin.MAX_TEXT_CHUNK = 100 * 2 ** 20      # bytes of text in a PNG [repo: even more]


def open_image(image: ImageFile, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image, as RGB like a viewer shows it. Raises an InputError that names the image if it is
    missing, damaged, empty or larger than max_pixels."""
    name = getattr(image, "filename", image if isinstance(image, str | Path) else "")
    name = readable(name or "the image")
    Image.MAX_IMAGE_PIXELS = max_pixels            # Pillow refuses more than twice as many
    try:
        with nullcontext(image) if isinstance(image, Image.Image) else Image.open(image) as opened:
            if 0 < opened.width * opened.height <= max_pixels:
                return as_shown(opened)
            size = f"{opened.width} x {opened.height}"
    except FileNotFoundError:
        raise InputError(f"the image {name} does not exist") from None
    except Image.DecompressionBombError:
        size = f"more than {2 * max_pixels}"
    except Exception as e:                         # a damaged file raises a different error in each format
        raise unreadable(name, f"is not a readable image: {type(e).__name__}: {readable(e)}") from None
    raise InputError(f"{name} is {size} pixels, expected 1 to {max_pixels} in all; --max_pixels allows more")


def as_shown(image: Image.Image) -> Image.Image:
    """An opened image as 8-bit RGB, on white where it is transparent, and turned as its EXIF block says
    [ours: the official code only does convert("RGB")]. Raises errors of any kind."""
    end_mark = [b"\xff\xd9"]
    if image.format in ("JPEG", "MPO") and (file := image.fp):
        # Pillow refuses a JPEG without its last bytes. With an end mark added, it decodes what is there.
        image.load_read = lambda size: file.read(size) or (end_mark.pop() if end_mark else b"")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        # These modes do not say which value is white. We take the smallest usual one that holds all values.
        # Mode I;16 has 16 bits, but in a TIFF it may have 12.
        bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))[0]
        scales = {"I": (255, 65535, 2 ** 32), "F": (1, 255, 65535, 2 ** 32)}.get(image.mode, (2 ** bits - 1,))
        values = np.asarray(image, np.float32)
        if not 0 <= values.min() <= values.max() <= scales[-1]:
            raise ValueError(f"mode {image.mode} with values from {values.min():g} to {values.max():g}")
        white = next(scale for scale in scales if values.max() <= scale)
        if "transparency" in image.info:
            values = np.where(values == image.info["transparency"], white, values)
        rgb = Image.fromarray(np.rint(values / (white / 255)).astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        rgba, rgb = image.convert("RGBA"), Image.new("RGB", image.size, "white")
        rgb.paste(rgba, mask=rgba)
    else:
        rgb = image.convert("RGB")
    if not end_mark:                               # a missing part becomes grey: 128, or 127 if inverted
        lowest = np.asarray(image)[-max(1, image.height // 8):]
        if np.isin(lowest, (127, 128)).all():
            raise OSError("an eighth of the picture or more is missing")
    rgb.info.clear()                               # else whoever opens it next would turn it once more
    with suppress(Exception):                      # there may be no EXIF block, or a damaged one
        rgb.getexif()[ExifTags.Base.Orientation] = image.getexif()[ExifTags.Base.Orientation]
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def tile_image(image: ImageFile, max_tiles: int = 12, image_size: int = 448, use_thumbnail: bool = True,
               min_tiles: int = 1, max_pixels: int = MAX_PIXELS) -> list[Image.Image]:
    """Cuts an image into square RGB tiles of image_size pixels [repo: dynamic_preprocess]. Of all grids with
    min_tiles to max_tiles tiles, it takes the one with the closest aspect ratio, resizes the image to fill it
    and cuts it row by row. After several tiles comes a thumbnail of the whole. Raises like open_image."""
    if not 1 <= min_tiles <= max_tiles <= 1000 or image_size < 1:
        raise InputError(f"min_tiles {min_tiles}, max_tiles {max_tiles}, image_size {image_size}: "
                         "expected 1 <= min_tiles <= max_tiles <= 1000 and a positive size")
    image = open_image(image, max_pixels)
    grids = [(across, count // across) for count in range(min_tiles, max_tiles + 1)
             for across in range(1, count + 1) if count % across == 0]
    least = float("inf")
    for across, down in grids:                     # small grids come first
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


def load_tiles(image: ImageFile, max_tiles: int = 12, image_size: int = 448, use_thumbnail: bool = True,
               min_tiles: int = 1, jpeg_rng: random.Random | None = None,
               max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """The tiles of tile_image as (n_tiles, 3, image_size, image_size) uint8. jpeg_rng sends each tile through
    JPEG of a quality that it draws from 75 to 100 [repo: build_transform]. Raises like tile_image."""
    tiles = tile_image(image, max_tiles, image_size, use_thumbnail, min_tiles, max_pixels)
    for i, tile in enumerate(tiles if jpeg_rng else ()):
        tile.save(file := io.BytesIO(), "JPEG", quality=jpeg_rng.randint(75, 100))
        tiles[i] = open_image(file)
    pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))          # (n, S, S, 3)
    return pixels.permute(0, 3, 1, 2).contiguous()


def normalise(tiles: torch.Tensor) -> torch.Tensor:
    """(n_tiles, 3, S, S) uint8 -> float32, less ImageNet's mean and divided by its deviation, as the model
    takes it. Tiles stay uint8, a quarter of the bytes, until they are on the model's device."""
    # We divide by tensors: to divide by a Python number, CUDA multiplies by its reciprocal, which may change
    # the last bit.
    constants = torch.tensor([(255.0, 255.0, 255.0), IMAGENET_MEAN, IMAGENET_STD])
    white, mean, std = constants.to(tiles.device, non_blocking=True)[..., None, None]  # (3, 1, 1) each
    return tiles.float().div_(white).sub_(mean).div_(std)


def load_image(image: ImageFile, *options, **named_options) -> torch.Tensor:
    """load_tiles, with its options, and normalise in one: (n_tiles, 3, image_size, image_size) float32."""
    return normalise(load_tiles(image, *options, **named_options))


def paste(canvas: Image.Image, image: Image.Image, left: int, top: int, width: int, height: int,
          angle: float) -> None:
    """Draws an image, turned by an angle in degrees and resized, onto an RGB canvas."""
    image = image.convert("RGBA").rotate(angle, Image.Resampling.BICUBIC)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    canvas.paste(image, (left, top), mask=image)


def change_lightly(image: ImageFile, rng: random.Random, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image at 75 to 100 % of its size, turned by up to 12° and somewhere on a ground of a random color,
    all of it up to 20 % darker or brighter [ours]. RGB, of the original size. Raises like open_image."""
    opened = open_image(image, max_pixels)
    canvas = Image.new("RGB", opened.size, tuple(rng.randrange(256) for _ in range(3)))
    scale = rng.uniform(0.75, 1)
    width, height = (max(1, round(side * scale)) for side in opened.size)
    left, top = rng.randint(0, opened.width - width), rng.randint(0, opened.height - height)
    paste(canvas, opened, left, top, width, height, rng.uniform(-12, 12))
    return ImageEnhance.Brightness(canvas).enhance(rng.uniform(0.8, 1.2))


# ---------------------------------------------------------------- training samples from files

# Names of fields, without digits and signs: images, imagepath, video or pixelvalues, but not imagewidth.
PICTURE_FIELD = re.compile("(image|img|picture|photo|screenshot|pixel|video|frame|audio)s?"
                           "((path|file|name|url|uri|list|data|byte|base|b|value|tensor)s?)*$")
NAMES_AN_IMAGE = re.compile(rb'"image"\s*:\s*\[?\s*"[^"]')


class JsonlDataset(Dataset):
    """A dataset in the official format [repo]. A line of the file `annotation` is {"id", "image": "a.jpg" |
    ["a.jpg", ...], "conversations": [{"from": "human" | "gpt", "value": "...<image>..."}, ...]}. "image" is
    left out for text alone. `root` is the folder of the images.

    A sample is {"input_ids", "labels": (T,) int64, "pixel_values": (n_tiles, 3, S, S) uint8 or None, "id",
    "task"}. The file and line number stand in for a missing "id". Samples are read when they are asked for,
    and a bad one then raises an InputError with its file and line number. Memory holds 16 bytes per line.

    repeat_time 2.5 gives every sample twice and a random half of them, drawn by seed, once more [ours: the
    official code takes the first part of the file, and no fractions above 1]. The images of a sample share
    max_tiles [repo]. A sample of more than max_tokens (default: the model's context) is an error and is never
    cut. data_augment sends tiles through JPEG like load_tiles, and augment sends images through
    change_lightly. Both draw from (seed, index), so repeat_time 10 gives ten variants of a picture.
    `has_images` says whether any line names an image.
    """

    has_images = False                             # until find_samples sees one

    def __init__(self, annotation: str | Path, root: str | Path, tok: Tokenizer, config,
                 repeat_time: float = 1, max_tiles: int | None = None, max_tokens: int | None = None,
                 seed: int = 0, task: str | None = None, max_pixels: int = MAX_PIXELS,
                 data_augment: bool = False, augment: bool = False):
        name = self.name = readable(annotation)
        if not os.path.isdir(root):
            raise InputError(f"the image folder {readable(root)} of {name} does not exist")
        self.annotation, self.root, self.tok, self.config = annotation, Path(root).resolve(), tok, config
        self.seed, self.task, self.max_pixels = seed, task, max_pixels
        self.data_augment, self.augment = data_augment, augment
        self.max_tiles = config.max_dynamic_patch if max_tiles is None else max_tiles
        self.max_tokens = config.context_length if max_tokens is None else max_tokens
        if type(repeat_time) not in (int, float) or not 0 < repeat_time <= 1e6:
            raise InputError(f"repeat_time of {name} is {repeat_time!r:.60}, expected a positive number of "
                             "at most 1e6")
        if type(self.max_tiles) is not int or self.max_tiles < 1:
            raise InputError(f"max_dynamic_patch of {name} is {self.max_tiles!r:.60}, expected at least 1")
        self.locations = self.find_samples()
        n = len(self.locations)
        self.repeated, extra = int(repeat_time) * n, round(repeat_time % 1 * n)
        self.extra = np.sort(np.random.default_rng(seed).permutation(n if extra else 0)[:extra])
        if not len(self):
            raise InputError(f"{name} with repeat_time {repeat_time} has no samples")

    def find_samples(self) -> np.ndarray:
        """(n, 2) int64: the line number and the byte offset of each line that is not blank."""
        locations = array("q")
        try:
            with open(self.annotation, "rb") as f:
                offset = 3 if f.read(3) == codecs.BOM_UTF8 else 0
                f.seek(offset)
                beginning = f.read(1000)
                if beginning.startswith(LFS_POINTER):
                    raise ValueError               # `unreadable` says that it is a pointer
                if b"\0" in beginning[:4]:
                    raise ValueError("expected UTF-8 text, and it is probably UTF-16")
                if re.match(rb"\s*(\[|{\s*\n)", beginning):
                    raise ValueError("expected JSONL, and it is one JSON document: put each sample on a line "
                                     "of its own, as `jq -c '.[]' FILE` does with an array")
                f.seek(offset)
                for number, line in enumerate(f, 1):
                    if line.strip():
                        locations.extend((number, offset))
                        self.has_images |= bool(NAMES_AN_IMAGE.search(line))
                    offset += len(line)
        except (OSError, ValueError) as e:         # open raises ValueError for a null character in a name
            raise unreadable(self.annotation, f"is not readable: {getattr(e, 'strerror', e)}") from None
        return np.array(locations, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return self.repeated + len(self.extra)

    def __getitem__(self, i: int) -> dict:
        location = i % len(self.locations) if i < self.repeated else self.extra[i - self.repeated]
        name, line, files = self.read(location)
        try:
            sample = self.make_sample(line, files, random.Random(f"{self.seed}/{i}"))
        except InputError as e:
            raise InputError(f"{readable(name)}: {e}") from None
        return {**sample, "id": name if sample["id"] is None else sample["id"], "task": self.task}

    def read(self, location: int) -> tuple[str, bytes, dict | None]:
        """(name for messages, line, and of a shard the images as {name: content}, else None)."""
        number, offset = self.locations[location].tolist()
        try:
            with open(self.annotation, "rb") as f:
                f.seek(offset)
                return f"{self.annotation}:{number}", f.readline(), None
        except OSError as e:
            raise InputError(f"{self.name} is not readable any more: {e.strerror}") from None

    def parse_line(self, line: bytes, files: dict | None) -> tuple[dict, list]:
        """A line and files from `read` -> (the line as an object, its images as paths or open files)."""
        try:
            line = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InputError(f"not JSON: {getattr(e, 'msg', e)}") from None
        if not isinstance(line, dict):
            raise InputError(f"{line!r:.60} is not an object with conversations")
        for field, value in line.items():
            may_hold_picture = PICTURE_FIELD.search(re.sub("[^a-z]", "", field.lower()))
            if may_hold_picture and field != "image" and value and isinstance(value, str | list | dict):
                raise InputError(f'the field {field!r:.60} is unknown; pictures belong in "image"')
        names = line.get("image") or []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise InputError(f"image is {names!r:.60}, expected a file name or a list of them")
        return line, self.find_images(names, files)

    def find_images(self, names: list[str], files: None) -> list[Path]:
        """The files that "image" names. A downloaded annotation must not name files outside of root. Links
        in root are the user's own and may lead anywhere."""
        for name in names:
            if len(name) > 4096:                   # more than any file system takes
                raise InputError(f"image {name[:40]!r}... is no file name; save base64 pictures as files")
            if Path(name).anchor or ".." in Path(name).parts:
                raise InputError(f"image {readable(name)} leads out of the image folder {self.root}")
        return [self.root / name for name in names]

    def make_sample(self, line: bytes, files: dict | None, rng: random.Random) -> dict:
        """A line and files from `read` -> a sample, whose "id" is None if the line has none."""
        line, images = self.parse_line(line, files)
        if self.augment:
            images = [change_lightly(image, rng, self.max_pixels) for image in images]
        c, share = self.config, max(1, self.max_tiles // max(1, len(images)))
        tiles = [load_tiles(image, share, c.image_size, c.use_thumbnail, min(share, c.min_dynamic_patch),
                            rng if self.data_augment else None, self.max_pixels) for image in images]
        input_ids, labels = encode_conversation(self.tok, line.get("conversations"), [len(t) for t in tiles],
                                                c.tokens_per_tile)
        if len(input_ids) > self.max_tokens:
            raise InputError(f"{len(input_ids)} tokens, the limit is {self.max_tokens}")
        if all(label == IGNORED for label in labels):
            raise InputError("the last turn is the human's: no answer to learn")
        if not all(turn["value"].strip() for turn in line["conversations"] if turn["from"] == "gpt"):
            raise InputError("an answer of the conversation is empty")
        return {"input_ids": torch.tensor(input_ids), "labels": torch.tensor(labels),
                "pixel_values": torch.cat(tiles) if tiles else None, "id": line.get("id")}


def sample_files(tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """(header, key, extension) of each file. By WebDataset's rule, "part/7.left.png" has the key "part/7" and
    the extension ".left.png". A file without a key or an extension belongs to no sample and is skipped."""
    while member := tar.next():
        tar.members.clear()                        # tarfile would keep all headers in memory
        name = re.fullmatch(r"((?:.*/)?[^./]+)(\.[^/]*)", member.name, re.DOTALL)
        if name and member.isfile():
            yield member, name[1], name[2]


class TarDataset(JsonlDataset):
    """The same from .tar shards in WebDataset's layout, where neighbouring files with one key are a sample.
    a.json is its line, and other files (a.jpg, a.1.png) are its images. If a.json is missing or has no
    conversations, a.txt is a caption, which is learned as the answer to <image> [ours]. Images come in the
    order in which "image" of a.json names them. If it names none, their numbers decide: a.2.png before
    a.10.png."""

    TEXTS = ".json", ".txt"

    def __init__(self, patterns: Sequence[str], *arguments, **options):
        """patterns are "a.tar", "a-{000..003}.tar" or "a-*.tar". The rest is JsonlDataset's after root."""
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
            raise InputError(f"no file is called {readable(' or '.join(patterns))}")
        super().__init__(" + ".join(patterns), ".", *arguments, **options)

    def find_samples(self) -> np.ndarray:
        """(n, 2) int64: the shard and the byte offset of each sample's first file. Reads all headers once."""
        locations = array("q")
        for number, path in enumerate(self.shards):
            previous, seen = None, set()           # the key of the last file, all names and keys so far
            try:
                with tarfile.open(path, "r:") as tar:
                    for member, key, extension in sample_files(tar):
                        came_before = member.name in seen or (key != previous and key in seen)
                        dotted_text = extension.endswith(self.TEXTS) and extension not in self.TEXTS
                        if came_before or dotted_text:
                            raise tarfile.ReadError(
                                f"{readable(member.name)} does not fit: the files of a sample stand together "
                                "and are called KEY.json or KEY.txt, KEY.jpg, KEY.2.jpg, with no dot in KEY "
                                "and another KEY for each sample")
                        if key != previous:
                            locations.extend((number, member.offset))
                        self.has_images |= extension not in self.TEXTS
                        seen |= {member.name, key}
                        previous = key
                    tar.fileobj.seek(tar.offset)   # a .tar ends with zeros, which tarfile does not check
                    if tar.fileobj.read(512) != bytes(512):
                        raise tarfile.ReadError("its end is missing")
            except (OSError, ValueError, tarfile.TarError) as e:
                raise unreadable(path, f"is no complete, uncompressed .tar of samples: {e}") from None
        return np.array(locations, np.int64).reshape(-1, 2)

    def read(self, location: int) -> tuple[str, bytes, dict | None]:
        number, offset = self.locations[location].tolist()
        path, sample_key, files = self.shards[number], None, {}
        try:
            with open(path, "rb") as f:
                f.seek(offset)
                with tarfile.open(fileobj=f, mode="r:") as tar:
                    for member, key, _ in sample_files(tar):
                        if sample_key not in (None, key):
                            break
                        sample_key, files[member.name] = key, tar.extractfile(member).read()
            if sample_key is None:
                raise tarfile.ReadError(f"no file begins at byte {offset}")
        except (OSError, tarfile.TarError) as e:
            raise InputError(f"{readable(path)} is not readable any more: {e}") from None
        line, caption = files.pop(f"{sample_key}.json", b""), files.pop(f"{sample_key}.txt", None)
        if caption is not None and b'"conversations"' not in line:
            caption = caption.decode(errors="surrogateescape")             # `encode` refuses invalid UTF-8
            line = json.dumps({"conversations": turns("<image>", caption)}).encode()
        if not line:
            raise InputError(f"{readable(f'{path}: {sample_key}')} has no .json and no .txt")
        return f"{path}: {sample_key}", line, files

    def find_images(self, names: list[str], files: dict[str, bytes]) -> list[io.BytesIO]:
        """The files that "image" names as part/7.left.png, 7.left.png or left.png. All, if it names none."""
        called = {}
        for file in files:
            name = file.rpartition("/")[2]
            called |= {name: file, name.partition(".")[2]: file}
        found = [called.get(name.rpartition("/")[2].lstrip(".")) for name in names]
        if not any(found):                         # by their numbers, 2 before 10
            found = sorted(files, key=lambda file: re.sub(r"\d+", lambda number: number[0].zfill(20), file))
        elif None in found or len({*found}) < len({*names}):
            raise InputError(f"image is {names!r:.60}, but the sample has {readable(', '.join(files))}")
        return [io.BytesIO(files[file]) for file in found]


def load_meta(path: str | Path, tok: Tokenizer, config, max_tiles: int | None = None,
              max_tokens: int | None = None, seed: int = 0, max_pixels: int = MAX_PIXELS,
              stage: str | None = None) -> ConcatDataset:
    """The datasets of a meta.json, {name: {root, annotation, repeat_time, max_dynamic_patch?,
    data_augment?}}, one after the other [repo]. root and annotation are relative to the folder of meta.json.
    An annotation that ends in .tar, or is a list, names shards (TarDataset) and needs no root.
    max_dynamic_patch replaces max_tiles. Both ours: "stages": ["S1.1", ...] uses a dataset in these stages
    only, and "augment": true changes its images lightly. `has_images` is true if any dataset has images.
    Raises an InputError that names the dataset and the field, or says that no dataset is for this stage."""
    meta, folder, datasets = read_json(path), Path(path).parent, []
    if not meta:
        raise InputError(f"{path}: expected {{name: {{root, annotation, repeat_time}}}}")
    for name, entry in meta.items():
        here, entry = f"{path}: dataset {readable(name)}", entry if isinstance(entry, dict) else {}
        files = entry.get("annotation")
        shards = files if isinstance(files, list) else [files] if str(files).endswith(".tar") else []
        if not shards and {type(entry.get("root")), type(files)} != {str}:
            raise InputError(f"{here} needs root and annotation, two paths, or .tar shards as annotation")
        if unknown := entry.keys() - {"root", "annotation", "repeat_time", "max_dynamic_patch",
                                      "data_augment", "length", "stages", "augment"}:
            raise InputError(f"{here} has the unknown field {readable(min(unknown))}")
        options = {field: entry.get(field, False) for field in ("data_augment", "augment")}
        for field, value in options.items():
            if type(value) is not bool:
                raise InputError(f"{here}: {field} is {value!r:.60}, expected true or false")
        stages = entry.get("stages", [stage])
        if not isinstance(stages, list) or "stages" in entry and {*map(type, stages)} != {str}:
            raise InputError(f'{here}: stages is {stages!r:.60}, expected a list such as ["S1.1", "S1.2"]')
        if stage is not None and stage not in stages:
            continue
        options |= {"repeat_time": entry.get("repeat_time", 1), "seed": seed, "max_tokens": max_tokens,
                    "max_tiles": entry.get("max_dynamic_patch", max_tiles), "max_pixels": max_pixels,
                    "task": name}
        if shards:
            paths = [str(folder / str(shard)) for shard in shards]
            datasets.append(TarDataset(paths, tok, config, **options))
        else:
            datasets.append(JsonlDataset(folder / files, folder / entry["root"], tok, config, **options))
    if not datasets:
        raise InputError(f"{path}: no dataset is for {stage}; add it to the stages of one, or name other "
                         "--stages")
    everything = ConcatDataset(datasets)
    everything.has_images = any(dataset.has_images for dataset in datasets)
    return everything


# ---------------------------------------------------------------- batches: padding and packing

def collate(samples: Sequence[dict], pad_token_id: int = 0, left: bool = False) -> dict:
    """Samples, or rows from `pack`, -> a batch. input_ids and labels are (B, T) int64; questions have no
    labels. attention_mask is (B, T), 0 at pads, or None without pads, which makes the model faster.
    pixel_values is (n_tiles, 3, S, S) uint8, the tiles of all rows in order, or None. Packed rows have
    document_ids, (B, T), 0 at pads. left puts the pads first, as generate needs them."""
    def pad(sequences: list[torch.Tensor], value: int) -> torch.Tensor:
        return pad_sequence(sequences, True, value, "left" if left else "right")

    tiles = [s["pixel_values"] for s in samples if s["pixel_values"] is not None]
    mask = pad([torch.ones_like(s["input_ids"]) for s in samples], 0)
    batch = {"input_ids": pad([s["input_ids"] for s in samples], pad_token_id),
             "attention_mask": None if mask.all() else mask,
             "pixel_values": torch.cat(tiles) if tiles else None}
    for name, value in ("labels", IGNORED), ("document_ids", 0):
        if name in samples[0]:
            batch[name] = pad([s[name] for s in samples], value)
    return batch


def pack(samples: Sequence[dict]) -> dict:
    """One row of several samples. document_ids, (T,) int64, are 1 in the first sample, 2 in the second and so
    on. They keep the model from mixing the samples."""
    tiles = [s["pixel_values"] for s in samples if s["pixel_values"] is not None]
    return {"input_ids": torch.cat([s["input_ids"] for s in samples]),
            "labels": torch.cat([s["labels"] for s in samples]),
            "pixel_values": torch.cat(tiles) if tiles else None,
            "document_ids": torch.cat([torch.full_like(s["input_ids"], i) for i, s in enumerate(samples, 1)])}


def sample_numbers(batch: dict) -> torch.Tensor:
    """(B, T) int64: the number of each token's sample in the batch, from 0 on, and -1 at pads."""
    documents, mask = batch.get("document_ids"), batch["attention_mask"]
    if documents is None:
        documents = torch.ones_like(batch["labels"]) if mask is None else mask
    per_row = documents.amax(1, keepdim=True)      # (B, 1) how many samples a row has
    in_rows_before = per_row.cumsum(0) - per_row
    return torch.where(documents > 0, in_rows_before + documents - 1, -1)


def count_tokens(batch: dict, tokens_per_tile: int) -> dict[str, float]:
    """Counts the "text" and "visual" tokens of a batch, the supervised "labels", and the "pairs" of tokens of
    one sample of which one attends to the other."""
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
    """A message if more than the share max_bad of the `seen` samples is unreadable, else None. Early on, it
    is the share of 1000 samples, or of `size`, those of the dataset, if these are fewer. Up to 10 bad samples
    are accepted unless max_bad is 0 [ours]."""
    allowed = max(10, max_bad * min(size, max(seen, 1000))) if max_bad else 0
    if bad <= allowed:
        return None
    return (f"{bad} of the {min(seen, size)} samples read so far are unreadable; --max_bad {max_bad:g} "
            "allows fewer")


def end_with_parent(_: int):
    """Runs in each reader process, and ends it when the training process is gone, even if it was killed."""
    parent = multiprocessing.parent_process().pid

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


class ErrorsAsValues(Dataset):
    """Gives (index, sample, None), or (index, None, message) for a bad sample, which must not end a worker
    process. Tensors become numpy arrays: each tensor that a worker sends would keep a file open."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, i: int) -> tuple[int, dict | None, str | None]:
        try:
            sample = self.dataset[i].items()
            return i, {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in sample}, None
        except InputError as e:
            return i, None, str(e)


def num_tokens(sample: dict) -> int:
    return len(sample["input_ids"])


class Batches:
    """Endless batches for one rank: what `collate` returns, with "ids" and "tasks" of the samples.

    All ranks share one permutation per epoch, made from (seed, epoch) alone. Rank r takes positions r,
    r + world_size, … A dataset without a length is read in the order 0, 1, 2, … Worker processes only fetch
    samples, so their number does not change the order.

    Samples of similar length share a batch: the samples of `pool` batches are read, sorted by length and cut
    into batches, which are shuffled. With pool=1, the batches of all ranks together are pieces of
    the order, one after the other.

    With pack_tokens, a batch has batch_size rows of at most pack_tokens tokens, filled from a buffer that
    holds the tokens of `pool` batches. A row takes the sample that has waited longest, and then again and
    again the longest sample that still fits. `utilisation` is the filled share of batch_size · pack_tokens.

    A bad sample (InputError, or longer than pack_tokens) is left out and reported once by on_bad(index,
    message), by default on stderr. `bad` maps index to message, `seen` counts all samples read. Raises
    InputError if the share of bad samples is above max_bad.
    """

    # A saved order is continued with the same values of these.
    SETTINGS = "batch_size", "pool", "pack_tokens", "seed", "rank", "world_size", "size"

    def __init__(self, dataset: Dataset, batch_size: int, pad_token_id: int, *, seed: int = 0, rank: int = 0,
                 world_size: int = 1, workers: int = 0, pack_tokens: int | None = None, pool: int = 8,
                 max_bad: float = 0.01, on_bad: Callable[[int, str], None] | None = None):
        self.dataset, self.pad_token_id, self.workers, self.max_bad = dataset, pad_token_id, workers, max_bad
        self.batch_size, self.pool, self.pack_tokens = batch_size, pool, pack_tokens
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.size = len(dataset) if hasattr(dataset, "__len__") else None
        self.on_bad = on_bad or (lambda _, error: print("bad sample, left out:", error, file=sys.stderr))
        self.rng = random.Random(seed)             # all ranks shuffle alike, so batches of like length meet
        self.seen, self.bad, self.packed_tokens, self.packed_room = 0, {}, 0, 0
        # `take_over` sets these: the positions to read first, and where the order continues after them.
        self.left_over, self.start = [], 0
        # Samples that wait for their batch, in the order of their batches; for packing, sorted by length.
        self.buffer = []

    @property
    def utilisation(self) -> float:
        return self.packed_tokens / max(1, self.packed_room)

    def position(self, n: int) -> int:
        """The position, counted on through the epochs, of the n-th sample that all ranks together read."""
        waiting = len(self.left_over)
        return self.left_over[n] if n < waiting else self.start + n - waiting

    def indices(self) -> Iterator[int]:
        """The indices in the dataset that this rank has still to read, in order and without end."""
        epoch = order = None
        for n in itertools.count(self.seen * self.world_size + self.rank, self.world_size):
            position = self.position(n)
            if self.size and epoch != position // self.size:
                epoch = position // self.size
                order = np.random.default_rng([self.seed, epoch]).permutation(self.size)
            yield int(order[position % self.size]) if self.size else position

    def fetch(self) -> Iterator[tuple[int, dict | None, str | None]]:
        """(index, sample or None, error or None) for each of `indices`."""
        # Workers read the next pool while this one is used. collate_fn keeps items as they are. A generator
        # of its own keeps the DataLoader from drawing a number from the global one.
        ahead = 2 + self.pool * self.batch_size // self.workers if self.workers else None
        items = DataLoader(
            ErrorsAsValues(self.dataset), batch_size=None, sampler=self.indices(), collate_fn=tuple,
            num_workers=self.workers, prefetch_factor=ahead, generator=torch.Generator(),
            worker_init_fn=end_with_parent)
        try:
            for i, sample, error in items:
                for name, value in (sample or {}).items():
                    sample[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                yield i, sample, error
        except RuntimeError as e:
            if "DataLoader worker" not in str(e):
                raise
            raise InputError(f"a process that reads samples ended ({e}); fewer --workers need less "
                             "memory") from None

    def next_sample(self, source) -> dict:
        """The next good sample, with its "index" in the dataset and its "number" among those that this rank
        has read, from 1 on. source is the iterator of `fetch`."""
        while True:
            i, sample, error = next(source)
            self.seen += 1
            if error is None and self.pack_tokens and (n := num_tokens(sample)) > self.pack_tokens:
                error = f"sample {sample['id']}: {n} tokens, a packed row has {self.pack_tokens}"
            if error is None:
                return {**sample, "index": i, "number": self.seen}
            if i not in self.bad:
                self.bad[i] = error
                self.on_bad(i, error)
                if problem := too_many_bad(len(self.bad), self.seen, self.size or sys.maxsize, self.max_bad):
                    raise InputError(f"{problem}. The last: {error}")
            if len(self.bad) == self.size:
                raise InputError(f"all {self.size} samples are unreadable. The last: {error}")

    def next_batch(self, source) -> list[list[dict]]:
        """The next batch: for each row, a list of one sample."""
        if not self.buffer:
            pool = [self.next_sample(source) for _ in range(self.pool * self.batch_size)]
            pool.sort(key=num_tokens)
            batches = [pool[i:i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
            self.rng.shuffle(batches)
            self.buffer = list(itertools.chain(*batches))
        return [[self.buffer.pop(0)] for _ in range(self.batch_size)]

    def next_packed_batch(self, source) -> list[list[dict]]:
        """The next batch: for each row, a list of as many samples as fit."""
        buffer, rows = self.buffer, []
        tokens = sum(map(num_tokens, buffer))
        while tokens < self.pool * self.batch_size * self.pack_tokens:
            sample = self.next_sample(source)
            insort_left(buffer, sample, key=num_tokens)                    # the newest first among equals
            tokens += num_tokens(sample)
        for _ in range(self.batch_size):
            oldest = min(range(len(buffer)), key=lambda i: buffer[i]["number"])
            row = [buffer.pop(oldest)]
            room = self.pack_tokens - num_tokens(row[0])
            while fitting := bisect_right(buffer, room, key=num_tokens):   # how many samples fit
                row.append(buffer.pop(fitting - 1))                # the longest, the oldest among equals
                room -= num_tokens(row[-1])
            rows.append(row)
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
        """What load_state_dict needs, ready for JSON. Samples in the buffer are saved by their index."""
        return {"settings": {name: getattr(self, name) for name in self.SETTINGS}, "seen": self.seen,
                "left_over": self.left_over, "start": self.start, "bad": list(self.bad.items()),
                "packed_tokens": self.packed_tokens, "packed_room": self.packed_room,
                "rng": self.rng.getstate(),
                "buffer": [{"index": s["index"], "number": s["number"]} for s in self.buffer]}

    def check_settings(self, state: dict, names: Sequence[str] = SETTINGS):
        for name in names:
            if state["settings"][name] != getattr(self, name):
                raise InputError(f"the order of samples was saved with {name} = {state['settings'][name]}, "
                                 f"and now it is {getattr(self, name)}: continue with the same value, or "
                                 "start a new run")

    def load_state_dict(self, state: dict):
        """Call it before iterating. Raises InputError if SETTINGS differ, or a buffered sample is bad now."""
        self.check_settings(state)
        self.seen, self.bad = state["seen"], dict(state["bad"])
        self.left_over, self.start = state.get("left_over", []), state.get("start", 0)     # not in old states
        self.packed_tokens, self.packed_room = state["packed_tokens"], state["packed_room"]
        version, words, gauss = state["rng"]
        self.rng.setstate((version, tuple(words), gauss))
        self.buffer = [{**self.dataset[b["index"]], **b} for b in state["buffer"]]

    def take_over(self, states: Sequence[dict]):
        """Continues the order of a run with another number of ranks, from the states of all of them. First
        come the samples that were still in their buffers, or that only some ranks had reached. None is lost,
        and none is given twice. Call it before iterating."""
        old = len(states)
        for state in states:
            self.check_settings(state, ("seed", "size"))
            self.bad |= dict(state["bad"])
        self.left_over, self.start = states[0].get("left_over", []), states[0].get("start", 0)
        end = max(len(self.left_over), *(state["seen"] * old for state in states))
        numbers = []                               # of the samples to read first, among those of all ranks
        for r, state in enumerate(states):
            numbers += [(b["number"] - 1) * old + r for b in state["buffer"]]
            numbers += range(state["seen"] * old + r, end, old)
        self.left_over, self.start = sorted(map(self.position, numbers)), self.position(end)
