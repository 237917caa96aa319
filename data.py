"""From text and pictures to what the model reads.

In this order: the tokenizer and streamed decoding; the chat template and its training labels; tiling and
normalisation of pictures; training samples from files in the official format; collation, packing and the
order of samples. A `config` is a MonoInternVLConfig.

Sources as in mono_internvl.py: [repo] is the official code, [ours] our choice.
"""
import codecs
import glob
import io
import itertools
import json
import random
import re
import sys
import tarfile
import warnings
from array import array
from bisect import bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from common import InputError, read_json

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
            only_json = (self.folder / "tokenizer.json").is_file()
            raise InputError(f"{self.folder} has " + (
                "a tokenizer.json only; what is read here is sentencepiece's tokenizer.model, as InternLM2, "
                "Llama 2 and TinyLlama have it" if only_json else
                "no tokenizer.model; it belongs beside the weights"))
        try:
            self.sp = sp = SentencePieceProcessor(model_file=str(self.folder / "tokenizer.model"))
        except (RuntimeError, OSError) as e:
            raise InputError(f"{self.folder}/tokenizer.model is not a sentencepiece model: {e}") from None
        added, config = ({} if not (self.folder / name).exists() else read_json(self.folder / name)
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


def turns(*texts: str) -> list[dict]:
    """Texts by turns from the human and the model -> a conversation."""
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(texts)]


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
               use_thumbnail: bool = True, min_tiles: int = 1,
               augment: random.Random | None = None) -> torch.Tensor:
    """A file or a PIL image -> (n_tiles, 3, image_size, image_size) float32, normalised with ImageNet's mean
    and std. augment: each tile first goes through JPEG, its quality drawn from 75 to 100 [repo:
    build_transform]. Raises InputError naming a file that is missing, damaged, empty or too large."""
    tiles = tile_image(image, max_tiles, image_size, use_thumbnail, min_tiles)
    for i, tile in enumerate(tiles if augment else ()):
        tile.save(file := io.BytesIO(), "JPEG", quality=augment.randint(75, 100))
        tiles[i] = open_image(file)
    pixels = torch.from_numpy(np.stack([np.asarray(tile) for tile in tiles]))          # (n, S, S, 3) uint8
    pixels = pixels.permute(0, 3, 1, 2).contiguous().float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


# ---------------------------------------------------------------- training samples from files

class JsonlDataset(Dataset):
    """One dataset in the official format; a line of `annotation` is {"id", "image": "a.jpg" | ["a.jpg", ...],
    "conversations": [{"from": "human" | "gpt", "value": "...<image>..."}, ...]}, without "image" for text
    alone.

    A sample is {"input_ids", "labels" (T,) int64, "pixel_values" (n_tiles, 3, S, S) or None, "id"}. Samples
    are read when asked for; only their places are kept, 16 bytes each. repeat_time 2.5 is every sample twice
    and a random half of them (seed) once more [ours: the official code takes the first part of the file, and
    no fractions above 1]. max_tiles, the budget of one sample, is shared by its images [repo]; max_tokens
    (default: the model's context) is a limit, nothing is cut. augment: as in load_image, drawn by (seed,
    index). A bad sample raises InputError with its file and line number when it is asked for; without "id"
    they are its id.
    """

    BLOCK = 1 << 20                                # bytes

    task = None                                    # load_meta's name of the dataset

    def __init__(self, annotation: str | Path, root: str | Path, tok: Tokenizer, config,
                 repeat_time: float = 1, max_tiles: int | None = None, max_tokens: int | None = None,
                 seed: int = 0, augment: bool = False):
        self.annotation, self.root, self.tok, self.config = annotation, Path(root).resolve(), tok, config
        self.seed, self.augment = seed, augment
        self.max_tiles = config.max_dynamic_patch if max_tiles is None else max_tiles
        self.max_tokens = config.context_length if max_tokens is None else max_tokens
        if type(repeat_time) not in (int, float) or not 0 < repeat_time < float("inf"):
            raise InputError(f"repeat_time of {annotation} is {repeat_time!r}, expected a positive number")
        if type(self.max_tiles) is not int or self.max_tiles < 1:
            raise InputError(f"max_dynamic_patch of {annotation} is {self.max_tiles!r}, expected at least 1")
        if not self.root.is_dir():
            raise InputError(f"the image folder {root} of {annotation} does not exist")
        self.places = self.index()                                         # (n, 2) int64
        n = len(self.places)
        self.whole, some = int(repeat_time) * n, round(repeat_time % 1 * n)
        self.part = np.sort(np.random.default_rng(seed).permutation(n if some else 0)[:some])
        if not len(self):
            raise InputError(f"{annotation} with repeat_time {repeat_time} has no samples")

    def index(self) -> np.ndarray:
        """Numbers of the lines that are not blank, and their offsets in bytes. numpy finds them block by
        block: ten million lines take seconds."""
        starts, indented, blank, end, fresh = [np.empty(0, np.int64)], [], [], 0, True
        try:
            with open(self.annotation, "rb") as f:
                while block := f.read(self.BLOCK):
                    letters = np.frombuffer(block, np.uint8)
                    here = np.flatnonzero(letters[:-1] == ord("\n")) + 1
                    here = np.append(0, here) if fresh else here
                    starts.append(end + here)
                    indented += (end + here[letters[here] <= ord(" ")]).tolist()
                    fresh, end = block.endswith(b"\n"), end + len(block)
                for offset in indented:            # only these may be blank
                    f.seek(offset)
                    blank += [] if f.readline().strip() else [offset]
        except OSError as e:
            raise InputError(f"{self.annotation} is not readable: {e.strerror}") from None
        starts = np.concatenate(starts)
        places = np.stack([np.arange(1, len(starts) + 1), starts], 1)
        return np.delete(places, np.searchsorted(starts, blank), 0) if blank else places

    def __len__(self) -> int:
        return self.whole + len(self.part)

    def __getitem__(self, i: int) -> dict:
        place = self.places[i % len(self.places) if i < self.whole else self.part[i - self.whole]].tolist()
        name, line, images = self.read(*place)
        try:
            sample = self.sample(line, images, random.Random(f"{self.seed}/{i}") if self.augment else None)
            return {**sample, "id": name if sample["id"] is None else sample["id"], "task": self.task}
        except InputError as e:
            raise InputError(f"{name}: {e}") from None

    def read(self, number: int, offset: int) -> tuple[str, dict | bytes, list | None]:
        """(what to call it, the line, its images; None: the line names them)"""
        try:
            with open(self.annotation, "rb") as f:
                f.seek(offset)
                return f"{self.annotation}:{number}", f.readline(), None
        except OSError as e:
            raise InputError(f"{self.annotation} is not readable any more: {e.strerror}") from None

    def parse(self, line: dict | bytes, images: list | None) -> tuple[dict, list]:
        """(the line, its images: files, or what `read` found)"""
        try:
            line = json.loads(line) if isinstance(line, bytes) else line
        except (ValueError, RecursionError) as e:
            raise InputError(f"not JSON: {getattr(e, 'msg', e)}") from None
        if not isinstance(line, dict):
            raise InputError(f"{line!r:.60} is not an object with conversations")
        if images is None:
            images = line.get("image") or []
            images = [images] if isinstance(images, str) else images
            if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
                raise InputError(f"image is {images!r:.60}, expected a file name or a list of them")
            images = [self.path(image) for image in images]
        return line, images

    def sample(self, line: dict | bytes, images: list | None, augment: random.Random | None) -> dict:
        line, images = self.parse(line, images)
        c, budget = self.config, max(1, self.max_tiles // max(1, len(images)))
        tiles = [load_image(image, budget, c.image_size, c.use_thumbnail, min(budget, c.min_dynamic_patch),
                            augment) for image in images]
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


class TarDataset(JsonlDataset):
    """The same from .tar shards in WebDataset's layout: files whose names are alike up to the first dot stand
    together and are one sample. a.json is a line of JSONL, its images are the other files (a.jpg, a.1.png) in
    their order. If it has no conversations, a.txt is a caption, learned as the answer to <image> [ours].
    """

    def __init__(self, patterns: Sequence[str], *arguments, **options):
        """patterns: "a.tar", "a-{000..003}.tar", "a-*.tar"; the others as for JsonlDataset, without root."""
        self.shards = []
        for pattern in patterns:
            if braces := re.search(r"\{(\d+)\.\.(\d+)\}", pattern):
                numbers = range(int(braces[1]), int(braces[2]) + 1)
                self.shards += [pattern.replace(braces[0], f"{i:0{len(braces[1])}}") for i in numbers]
            else:
                self.shards += sorted(glob.glob(pattern)) if re.search(r"[*?]", pattern) else [pattern]
        if not self.shards:
            raise InputError(f"no file is called {' or '.join(patterns)}")
        super().__init__(" + ".join(patterns), ".", *arguments, **options)

    def index(self) -> np.ndarray:
        """Shard numbers and the offsets of samples' first headers. All headers are read once."""
        places, name = array("q"), None
        for number, path in enumerate(self.shards):
            try:
                with tarfile.open(path, "r:") as tar:
                    while member := tar.next():
                        if member.isfile() and name != (name := (number, stem(member))):
                            places.extend((number, member.offset))
                        tar.members.clear()        # tarfile would keep them all
                    tar.fileobj.seek(tar.offset)
                    if tar.fileobj.read(512) != bytes(512):
                        raise tarfile.ReadError("its end is missing")
            except (OSError, tarfile.TarError) as e:
                raise InputError(f"{path} is no complete, uncompressed .tar: {e}") from None
        return np.array(places, np.int64).reshape(-1, 2)

    def read(self, number: int, offset: int) -> tuple[str, dict | bytes, list | None]:
        path, files = self.shards[number], {}
        try:
            with open(path, "rb") as f:
                f.seek(offset)
                with tarfile.open(fileobj=f, mode="r:") as tar:
                    first = member = tar.next()
                    while member and stem(member) == stem(first):
                        if member.isfile():
                            files[member.name[len(stem(first)):]] = tar.extractfile(member).read()
                        member = tar.next()
            name = f"{path}: {stem(first)}"
        except (OSError, tarfile.TarError, AttributeError) as e:
            raise InputError(f"{path} is not readable any more: {e}") from None
        line, caption = files.pop(".json", b""), files.pop(".txt", None)
        if caption is not None and b'"conversations"' not in line:
            line = {"conversations": turns("<image>", caption.decode(errors="surrogateescape"))}
        return name, line, [io.BytesIO(content) for content in files.values()]


def stem(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.split(".")[0]


def load_meta(path: str | Path, tok: Tokenizer, config, max_tiles: int | None = None,
              max_tokens: int | None = None, seed: int = 0) -> ConcatDataset:
    """meta.json, {name: {root, annotation, repeat_time, max_dynamic_patch?, data_augment?}}, -> its datasets
    in a row. root and annotation are relative to meta.json's folder. An annotation that ends in .tar, or a
    list, names shards (see TarDataset) and needs no root. max_dynamic_patch goes before max_tiles [repo]."""
    meta, folder, datasets = read_json(path), Path(path).parent, []
    if not isinstance(meta, dict) or not meta:
        raise InputError(f"{path}: expected {{name: {{root, annotation, repeat_time}}}}")
    for name, entry in meta.items():
        here, entry = f"{path}: dataset {name}", entry if isinstance(entry, dict) else {}
        files = entry.get("annotation")
        shards = files if isinstance(files, list) else [files] if str(files).endswith(".tar") else []
        if not shards and {type(entry.get("root")), type(files)} != {str}:
            raise InputError(f"{here} needs root and annotation, two paths, or .tar shards as annotation")
        if unknown := entry.keys() - {"root", "annotation", "repeat_time", "max_dynamic_patch",
                                      "data_augment", "length"}:
            raise InputError(f"{here} has the unknown field {min(unknown)}")
        if type(augment := entry.get("data_augment", False)) is not bool:
            raise InputError(f"{here}: data_augment is {augment!r}, expected true or false")
        options = (tok, config, entry.get("repeat_time", 1), entry.get("max_dynamic_patch", max_tiles),
                   max_tokens, seed, augment)
        datasets.append(TarDataset([str(folder / str(shard)) for shard in shards], *options) if shards
                        else JsonlDataset(folder / files, folder / entry["root"], *options))
        datasets[-1].task = name
    return ConcatDataset(datasets)


# ---------------------------------------------------------------- collation, packing, order

def collate(samples: Sequence[dict], pad_token_id: int = 0, left: bool = False) -> dict:
    """Samples -> one batch: input_ids and labels (B, T); attention_mask (B, T), None when no row is padded
    (the model is faster then); pixel_values (n_tiles, 3, S, S) of all rows in order, or None; document_ids
    (B, T), 0 = pad, if the samples are packed rows. left: pad in front, as generate needs it."""
    longest = max(len(s["input_ids"]) for s in samples)

    def pad(rows: list[torch.Tensor], value: int) -> torch.Tensor:
        missing = [longest - len(row) for row in rows]
        return torch.stack([torch.nn.functional.pad(row, (n, 0) if left else (0, n), value=value)
                            for row, n in zip(rows, missing, strict=True)])

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
    """Samples one after the other in one row; document_ids (T,) tells them apart: 1 for the first, 2, ..."""
    tiles = [s["pixel_values"] for s in samples if s["pixel_values"] is not None]
    return {"input_ids": torch.cat([s["input_ids"] for s in samples]),
            "labels": torch.cat([s["labels"] for s in samples]),
            "pixel_values": torch.cat(tiles) if tiles else None,
            "document_ids": torch.cat([torch.full_like(s["input_ids"], i) for i, s in enumerate(samples, 1)])}


def sample_numbers(batch: dict) -> torch.Tensor:
    """(B, T) int64: which sample of the batch a token belongs to, -1 for pads. A packed row holds several."""
    documents = batch.get("document_ids")
    if documents is None:
        mask = batch["attention_mask"]
        documents = torch.ones_like(batch["labels"]) if mask is None else mask
    in_row = documents.amax(1, keepdim=True)                               # (B, 1) how many samples
    return torch.where(documents > 0, documents - 1 + in_row.cumsum(0) - in_row, -1)


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
    """The first rows of a batch as text. What is learned stands between » and «."""
    lines, columns = [], [batch[name][:rows] for name in ("input_ids", "labels")]
    for ids, labels, real in zip(*columns, sample_numbers(batch)[:rows] >= 0, strict=True):
        text, row = "", zip(ids[real].tolist(), labels[real].tolist(), strict=True)
        for learned, part in itertools.groupby(row, lambda pair: pair[1] != IGNORED):
            part = tok.decode([i for i, _ in part], skip_special_tokens=False)
            text += f"»{part}«" if learned else part
        lines.append(re.sub("(<IMG_CONTEXT>)+", lambda found: f"<IMG_CONTEXT>×{len(found[0]) // 13}", text))
    return "\n".join(lines)


def too_many_bad(bad: int, seen: int, size: int, max_bad: float) -> str | None:
    """What is wrong if more than max_bad of the samples are unreadable: of those seen so far, or of the first
    1000 while they are few."""
    if bad <= max_bad * min(size, max(seen, 1000)):
        return None
    return f"{bad} of {min(seen, size)} samples are unreadable; --max_bad {max_bad:g} allows fewer"


class Guarded(Dataset):
    """(index, sample, None), or (index, None, what is wrong): a bad sample must not end a worker process.
    Tensors as numpy arrays: those go through a pipe, tensors each through an open file of shared memory."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __getitem__(self, i: int) -> tuple[int, dict | None, str | None]:
        try:
            sample = self.dataset[i].items()
            return i, {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in sample}, None
        except InputError as e:
            return i, None, str(e)


class Batches:
    """Endless seeded batches of one rank: what collate gives, and "ids" and "tasks" of its samples.

    The order of all ranks together is one permutation per epoch, made from (seed, epoch) alone; number k of
    it, counted on through the epochs, is rank k % world_size's. A dataset without a length is read 0, 1, 2,
    ... Worker processes only fetch samples, in this order, which thus does not depend on how many they are.

    Samples of like length go together: `pool` batches are drawn, sorted, cut and shuffled. With pool=1, batch
    j of all ranks together is piece j of the order. With pack_tokens, a batch is batch_size rows of at most
    so many tokens, filled from a buffer of `pool` batches: the sample that has waited longest, then again and
    again the longest that still fits. `utilisation` is the share of batch_size·pack_tokens that is no pad.

    An unreadable sample (InputError), or one longer than pack_tokens, is left out and named by on_bad(index,
    message), once (default: on stderr). `bad` maps index to message, `seen` counts all samples drawn. Raises
    InputError if more than max_bad of them are bad.
    """

    def __init__(self, dataset: Dataset, batch_size: int, pad_token_id: int, *, seed: int = 0, rank: int = 0,
                 world_size: int = 1, workers: int = 0, pack_tokens: int | None = None, pool: int = 8,
                 max_bad: float = 0.01, on_bad: Callable[[int, str], None] | None = None):
        self.dataset, self.pad_token_id, self.workers, self.max_bad = dataset, pad_token_id, workers, max_bad
        self.batch_size, self.pool, self.pack_tokens = batch_size, pool, pack_tokens
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.size = len(dataset) if hasattr(dataset, "__len__") else None
        self.on_bad = on_bad or (lambda _, error: print("bad sample, left out:", error, file=sys.stderr))
        self.rng = random.Random(seed)             # shuffles pools, on all ranks alike: like lengths meet
        self.seen, self.bad, self.tokens, self.slots = 0, {}, 0, 0
        # Drawn, not given yet, as (tokens, -seen, index, sample): the batches of a pool, or as the only list
        # the packing buffer, kept sorted. The sample is None after load_state_dict, until it is fetched.
        self.waiting = []

    @property
    def utilisation(self) -> float:
        return self.tokens / max(1, self.slots)

    def order(self) -> Iterator[int]:
        """What to fetch: samples of a restored state, then this rank's share from number `seen` on."""
        yield from [i for drawn in self.waiting for *_, i, sample in drawn if sample is None]
        epoch = indices = None
        for k in itertools.count(self.seen * self.world_size + self.rank, self.world_size):
            if self.size and epoch != k // self.size:
                epoch = k // self.size
                indices = np.arange(self.size, dtype=np.uint32 if self.size < 2 ** 32 else np.int64)
                np.random.default_rng([self.seed, epoch]).shuffle(indices)
            yield int(indices[k % self.size]) if self.size else k

    def fetch(self) -> Iterator[tuple[int, dict | None, str | None]]:
        ahead = {}                                 # workers read the next pool while one is used
        if self.workers:
            ahead["prefetch_factor"] = max(2, -(-self.pool * self.batch_size // self.workers))
        # collate_fn and generator: samples come as they are, and no global random number is drawn
        for i, sample, error in DataLoader(
                Guarded(self.dataset), batch_size=None, sampler=self.order(), num_workers=self.workers,
                collate_fn=tuple, generator=torch.Generator(), **ahead):
            for name, value in (sample or {}).items():
                sample[name] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
            yield i, sample, error

    def draw(self, source) -> tuple[int, int, int, dict]:
        """The next good sample."""
        for misses in itertools.count(1):
            i, sample, error = next(source)
            self.seen += 1
            tokens = len(sample["input_ids"]) if sample else 0
            if self.pack_tokens and tokens > self.pack_tokens:
                error = f"sample {sample['id']}: {tokens} tokens, a packed row has {self.pack_tokens}"
            if error is None:
                return tokens, -self.seen, i, sample
            if i not in self.bad:
                self.bad[i] = error
                self.on_bad(i, error)
                if wrong := too_many_bad(len(self.bad), self.seen, self.size or sys.maxsize, self.max_bad):
                    raise InputError(f"{wrong}. The last: {error}")
            if misses == self.size:
                raise InputError(f"{misses} samples in a row are unreadable. The last: {self.bad[i]}")

    def next_group(self, source) -> list[tuple]:
        if not self.waiting:
            pool = [self.draw(source) for _ in range(self.pool * self.batch_size)]
            pool.sort(key=lambda drawn: drawn[0])
            self.waiting = [pool[i:i + self.batch_size] for i in range(0, len(pool), self.batch_size)]
            self.rng.shuffle(self.waiting)
        return self.waiting.pop(0)

    def next_rows(self, source) -> list[list[tuple]]:
        self.waiting = self.waiting or [[]]
        buffer, rows = self.waiting[0], []
        held = sum(tokens for tokens, *_ in buffer)
        while held < self.pool * self.batch_size * self.pack_tokens:
            drawn = self.draw(source)
            insort(buffer, drawn)
            held += drawn[0]
        for _ in range(self.batch_size):
            row = [buffer.pop(max(range(len(buffer)), key=lambda j: buffer[j][1]))]        # the oldest
            while fitting := bisect_right(buffer, (self.pack_tokens - sum(drawn[0] for drawn in row), 1)):
                row.append(buffer.pop(fitting - 1))                        # the longest, of equals the oldest
            rows.append(row)
            self.tokens += sum(drawn[0] for drawn in row)
            self.slots += self.pack_tokens
        return rows

    def __iter__(self) -> Iterator[dict]:
        source = self.fetch()
        for drawn in self.waiting:                 # of a restored state
            for j, (*place, sample) in enumerate(drawn):
                if sample is None:
                    i, sample, error = next(source)
                    if error:
                        raise InputError(f"{error}. Sample {i} was readable before the restart")
                    drawn[j] = (*place, sample)
        while True:
            rows = self.next_rows(source) if self.pack_tokens else [[d] for d in self.next_group(source)]
            rows = [[sample for *_, sample in row] for row in rows]
            batch = collate([pack(row) if self.pack_tokens else row[0] for row in rows], self.pad_token_id)
            yield {**batch, "ids": [sample["id"] for row in rows for sample in row],
                   "tasks": [sample.get("task") for row in rows for sample in row]}

    FIXED = "batch_size", "pool", "pack_tokens", "seed", "rank", "world_size", "size"

    def state_dict(self) -> dict:
        """Where to go on, as JSON: samples are kept by index, and fetched again when a state is restored."""
        return {"of": {name: getattr(self, name) for name in self.FIXED}, "seen": self.seen,
                "bad": list(self.bad.items()), "utilisation": [self.tokens, self.slots],
                "rng": self.rng.getstate(),
                "waiting": [[place for *place, _ in drawn] for drawn in self.waiting]}

    def load_state_dict(self, state: dict):
        """Before iterating. Raises InputError if the state is of another rank, batch size, dataset size..."""
        for name, value in state["of"].items():
            if value != getattr(self, name):
                raise InputError(f"the order of samples was saved with {name} = {value}, and now it is "
                                 f"{getattr(self, name)}: go on with the same, or start anew")
        self.seen, self.bad = state["seen"], dict(state["bad"])
        self.tokens, self.slots = state["utilisation"]
        version, words, gauss = state["rng"]
        self.rng.setstate((version, tuple(words), gauss))
        self.waiting = [[(*place, None) for place in drawn] for drawn in state["waiting"]]
