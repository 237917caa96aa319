"""data.py and sample.py: the official numbers, laws that hold for any input, and what bad input gets."""
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

import data
import sample
from data import (
    IGNORED,
    JsonlDataset,
    TextStream,
    Tokenizer,
    chat_prompt,
    collate,
    encode_conversation,
    flag,
    load_image,
    load_meta,
    parse_flags,
    tile_image,
)
from mono_internvl import InputError, MonoInternVL, MonoInternVLConfig

HERE = Path(__file__).parent
OFFICIAL = HERE / "assets/golden/official_data"
PICTURE = str(OFFICIAL / "picture.png")            # 3 tiles of 56 pixels when 6 are allowed
GOLDEN = json.loads((OFFICIAL / "golden.json").read_text(encoding="utf-8"))
TOK = Tokenizer(OFFICIAL)
# "▁" is how sentencepiece writes a space: the one character that cannot come back
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
SPOKEN = PLAIN.filter(lambda text: "<" not in text)
TINY = MonoInternVLConfig(
    vocab_size=len(TOK), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, attn_experts="qkvo", vision_hidden_size=16, image_size=56,
    max_position_embeddings=512, max_dynamic_patch=6, img_context_token_id=TOK.token_id("<IMG_CONTEXT>"))


def ask(question: str, *rest: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate((question, *rest))]


# ---------------------------------------------------------------- tokenizer

@pytest.mark.parametrize("case", GOLDEN["tokenize"], ids=lambda case: ascii(case["text"][:20]))
def test_text_has_the_official_token_ids_and_comes_back(case):
    assert TOK.encode(case["text"]) == case["ids"]
    assert TOK.decode(case["ids"]) == case["decoded_skip_special"]
    assert TOK.decode(case["ids"], skip_special_tokens=False) == "<s>" + case["text"]


def test_special_tokens_are_read_from_the_folder(tmp_path):
    assert GOLDEN["special_tokens"].items() <= TOK.special_tokens.items()
    assert (len(TOK), TOK.bos_id, TOK.eos_id, TOK.pad_id) == (491, 1, 2, 2)
    for source in ("added_tokens.json", "tokenizer_config.json"):                      # either file is enough
        folder = tmp_path / source
        folder.mkdir()
        for name in ("tokenizer.model", source):
            shutil.copy(OFFICIAL / name, folder)
        assert Tokenizer(folder).special_tokens == TOK.special_tokens


def test_of_two_special_tokens_that_start_alike_the_longer_is_meant(tmp_path):
    shutil.copy(OFFICIAL / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<a": 480, "<a>": 481}')
    assert Tokenizer(tmp_path).encode("<a<a>", bos=False) == [480, 481]


@given(st.lists(st.one_of(PLAIN, st.sampled_from(sorted(TOK.special_tokens)))).map("".join))
def test_any_text_survives_encoding_and_decoding(text):
    assert TOK.decode(TOK.encode(text, bos=False), skip_special_tokens=False) == text


@given(PLAIN)
def test_streamed_text_is_the_text_with_no_character_broken_or_held_back(text):
    stream, shown, fed = TextStream(TOK, skip_special_tokens=False), "", 0
    for token in TOK.encode(text, bos=False):
        shown += stream.push(token)
        fed += len(TOK.bytes[token])
        assert text.startswith(shown)                                      # so no U+FFFD but the text's own
        assert fed - len(shown.encode()) < len((text[len(shown):] or "x")[0].encode())   # not even one more
    assert shown == text and stream.flush() == ""


@given(st.lists(st.integers(0, len(TOK) - 1)))
def test_any_tokens_stream_to_what_utf8_makes_of_their_bytes(ids):
    pieces = [TOK.sp.id_to_piece(i) for i in ids if i not in TOK.special_tokens.values()]
    expected = b"".join(bytes.fromhex(p[3:5]) if re.fullmatch("<0x..>", p) else p.replace("▁", " ").encode()
                        for p in pieces).decode("utf-8", "replace")
    stream = TextStream(TOK)
    assert "".join([*map(stream.push, ids), stream.flush()]) == TOK.decode(ids) == expected


def test_a_bad_tokenizer_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} has no tokenizer.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((OFFICIAL / "tokenizer.model").read_bytes()[:3000])
    with pytest.raises(InputError, match=f"{tmp_path}/tokenizer.model is not a sentencepiece model"):
        Tokenizer(tmp_path)
    shutil.copy(OFFICIAL / "tokenizer.model", tmp_path)
    for content, message in (("{", "not readable"), ('{"<img>": "x"}', "does not map"), ("[1]", "expected")):
        (tmp_path / "added_tokens.json").write_text(content)
        with pytest.raises(InputError, match=f"{tmp_path}.*{message}"):
            Tokenizer(tmp_path)


def test_what_the_tokenizer_cannot_express_is_an_error():
    with pytest.raises(InputError, match=f"{OFFICIAL} has no token <video>"):
        TOK.token_id("<video>")
    with pytest.raises(InputError, match="491 tokens.* has no id 491"):
        TOK.decode([491])
    with pytest.raises(InputError, match="not valid Unicode"):
        TOK.encode("\ud800")


# ---------------------------------------------------------------- chat template and labels

@pytest.mark.parametrize("case", GOLDEN["conversations"], ids=range(len(GOLDEN["conversations"])))
def test_prompts_ids_and_labels_are_the_official_ones(case):
    conversation = case["conversations"]
    assert chat_prompt(conversation) == case["prompt"]
    ids_and_labels = encode_conversation(TOK, conversation, case["tiles_per_image"], case["tokens_per_tile"])
    assert ids_and_labels == (case["input_ids"], case["labels"])


def test_a_prompt_for_generation_ends_with_the_opened_turn():
    assert chat_prompt(ask("<image>\nhi")) == GOLDEN["generation_prompt"]


@given(st.lists(SPOKEN, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_only_answers_and_their_ends_are_learned_and_a_prompt_is_a_prefix_of_training(texts):
    ids, labels = encode_conversation(TOK, ask(*texts))
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    learned = TOK.decode([label for label in labels if label != IGNORED], skip_special_tokens=False)
    assert learned == "".join(answer.strip() + "<|im_end|>" for answer in texts[1::2])
    prompt, ignored = encode_conversation(TOK, ask(*texts[:-1]))
    assert ids[:len(prompt)] == prompt
    assert set(ignored) == {IGNORED}


def test_images_stand_where_their_marks_are_in_any_human_turn():
    conversation = ask("a <image> b", "see <image>?", "<image><image>", "yes")
    ids, _ = encode_conversation(TOK, conversation, tiles_per_image=[1, 2, 3], tokens_per_tile=4)
    text = TOK.decode(ids, skip_special_tokens=False)
    one, two, three = (f"<img>{'<IMG_CONTEXT>' * 4 * tiles}</img>" for tiles in (1, 2, 3))
    assert f"user\na {one} b<|im_end|>" in text and f"user\n{two}{three}<|im_end|>" in text
    assert "assistant\nsee <image>?<|im_end|>" in text                     # in an answer it is plain text


@pytest.mark.parametrize("conversation, message", [
    *((nothing, "expected a list of turns") for nothing in ([], None, {"from": "human", "value": "hi"})),
    (["hi"], "turn 1 .* is from None"), (ask("hi") * 2, "turn 2 .* is from 'human', expected \"gpt\""),
    ([{"from": "gpt", "value": "hi"}], "turn 1"), ([{"from": "system", "value": "hi"}], "from 'system'"),
    ([{"from": "human"}], "value None"), ([{"from": "human", "value": 3}], "value 3, expected text"),
    *((ask("hi", f"x{token}y"), f"turn 2 .* control token {re.escape(token)}") for token in data.RESERVED)])
def test_a_malformed_conversation_is_refused_with_its_turn(conversation, message):
    with pytest.raises(InputError, match=message):
        encode_conversation(TOK, conversation)
    with pytest.raises(InputError, match=message):
        chat_prompt(conversation)


@given(marks=st.integers(0, 3), images=st.integers(0, 3))
def test_marks_and_images_must_match_and_the_error_has_both_numbers(marks, images):
    conversation = ask("<image>" * marks, "ok")
    if marks == images:
        encode_conversation(TOK, conversation, [1] * images)
    else:
        with pytest.raises(InputError, match=f"has {marks} <image> marks for {images} images"):
            encode_conversation(TOK, conversation, [1] * images)


def test_a_tokenizer_without_image_tokens_takes_text_only(tmp_path):
    shutil.copy(OFFICIAL / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 480, "<|im_start|>": 481}')
    tok = Tokenizer(tmp_path)
    assert encode_conversation(tok, ask("hi", "ho")) == encode_conversation(TOK, ask("hi", "ho"))
    with pytest.raises(InputError, match="has no token <img>|has no token <IMG_CONTEXT>"):
        encode_conversation(tok, ask("<image>", "ho"), [1])


def test_a_tokenizer_folder_may_set_its_own_system_message_or_none(tmp_path):
    shutil.copytree(OFFICIAL, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for message in ("Look.", ""):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "system_message": message}))
        ids, _ = encode_conversation(Tokenizer(tmp_path), ask("hi"))
        assert ids == TOK.encode(chat_prompt(ask("hi"), system=message))
    assert chat_prompt(ask("hi"), "") == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"


# ---------------------------------------------------------------- pictures

@pytest.mark.parametrize("image_size", [28, 448])
def test_tilings_are_the_official_ones(image_size, monkeypatch):
    grids = []

    def resize(image, size, resample):             # only the sizes matter here; the real thing takes seconds
        grids.append((size[0] // image_size, size[1] // image_size))
        return Image.new("RGB", size)
    monkeypatch.setattr(Image.Image, "resize", resize)
    cases = [case for case in GOLDEN["tiling"] if case["image_size"] == image_size]
    assert len(cases) == (138 if image_size == 28 else 46)
    for case in cases:
        image = Image.new("RGB", (case["width"], case["height"]))
        grids.clear()
        with_thumbnail = tile_image(image, case["max_num"], image_size)
        columns, rows = grids[0]
        assert {tile.size for tile in with_thumbnail} == {(image_size, image_size)}
        assert [columns, rows] == case.get("grid_columns_rows", [columns, rows])
        assert columns * rows == case.get("tiles", columns * rows)
        assert len(with_thumbnail) == case.get("tiles_with_thumbnail", columns * rows + (columns * rows > 1))
        assert len(tile_image(image, case["max_num"], image_size, use_thumbnail=False)) == columns * rows


def test_pixels_are_the_official_ones():
    case, expected = GOLDEN["picture"], load_file(OFFICIAL / "picture_pixels.safetensors")["pixel_values"]
    pixels = load_image(OFFICIAL / case["file"], case["max_num"], case["image_size"])
    assert pixels.dtype == torch.float32 and len(pixels) == case["n_tiles"]
    # Below 4, float16 rounds by at most 2**-10; one grey level is 1 / 255 / 0.229 = 0.017: no pixel differs.
    torch.testing.assert_close(pixels, expected.float(), atol=2 ** -10, rtol=0)
    assert torch.equal(pixels, load_image(Image.open(PICTURE), 6, 56))


def test_tiles_come_row_by_row_and_the_thumbnail_last():
    image, colours = Image.new("RGB", (56, 84)), [(40 * i, 0, 255) for i in range(6)]
    for i, colour in enumerate(colours):
        image.paste(colour, (i % 2 * 28, i // 2 * 28, i % 2 * 28 + 28, i // 2 * 28 + 28))
    *tiles, thumbnail = tile_image(image, max_tiles=6, image_size=28)
    assert [tile.getpixel((14, 14)) for tile in tiles] == colours
    assert thumbnail.getpixel((2, 2)) == colours[0] and thumbnail.getpixel((25, 25)) == colours[5]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_pictures_of_any_mode_are_read_as_convert_rgb_reads_them(mode):
    image = Image.open(PICTURE).convert("L" if mode in ("I;16", "I", "F") else "RGB").convert(mode)
    assert torch.equal(load_image(image, 6, 56), load_image(image.convert("RGB"), 6, 56))


def test_exif_rotation_is_ignored_like_in_the_official_code(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                               # orientation: turn by 90 degrees
    Image.open(PICTURE).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(load_image(tmp_path / "turned.png", 6, 56), load_image(PICTURE, 6, 56))


def png(width: int, height: int) -> bytes:
    """A PNG of 60 bytes that says it is that large."""
    def chunk(content):
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    header = chunk(b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT" + zlib.compress(b"")) + chunk(b"IEND")


def write_bad_images(folder: Path) -> dict[str, str]:
    """One file for each way to be bad; name -> what the error says."""
    picture, jpeg = Path(PICTURE).read_bytes(), io.BytesIO()
    Image.open(PICTURE).convert("RGB").save(jpeg, "JPEG")
    contents = {"empty.png": b"", "text.png": b"hello", "cut.png": picture[:2000], "header.png": picture[:40],
                "cut.jpg": jpeg.getvalue()[:1000], "flipped.png": picture[:200] + b"????" + picture[204:]}
    bombs = {"large.png": png(10_000, 10_000), "huge.png": png(100_000, 100_000)}  # Pillow warns, refuses
    for name, content in {**contents, **bombs}.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    return {**dict.fromkeys([*contents, "folder.png"], "is not a readable image"),
            **dict.fromkeys(bombs, "DecompressionBomb|is 10000 x 10000 pixels"), "none.png": "does not exist"}


@pytest.mark.parametrize("filter_", ["ignore", "error"])
def test_a_bad_image_file_is_one_error_with_its_name_whatever_the_warning_filter(tmp_path, filter_):
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter(filter_, Image.DecompressionBombWarning)
        filters = list(warnings.filters)
        for name, message in write_bad_images(tmp_path).items():
            with pytest.raises(InputError, match=f"{tmp_path / name} .*({message})"):
                load_image(tmp_path / name)
        assert (warnings.filters, Image.MAX_IMAGE_PIXELS) == (filters, limit)


def test_an_empty_picture_or_no_tiles_are_errors():
    with pytest.raises(InputError, match="0 x 5 pixels"):
        load_image(Image.new("RGB", (0, 5)))
    with pytest.raises(InputError, match="max_tiles 0"):
        load_image(PICTURE, max_tiles=0)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")     # pytest undid data.py's filter
def test_threads_see_bombs_and_good_pictures_apart(tmp_path):
    write_bad_images(tmp_path)

    def kind(path):
        try:
            return load_image(path, 6, 56).shape[0]
        except InputError:
            return "bad"
    with ThreadPoolExecutor(8) as pool:
        kinds = list(pool.map(kind, [tmp_path / "large.png", PICTURE, tmp_path / "huge.png"] * 20))
    assert kinds == ["bad", 3, "bad"] * 20


# ---------------------------------------------------------------- training samples from files

def write_meta(folder: Path, datasets: dict[str, list], **entry) -> Path:
    """meta.json, a JSONL file for each dataset (its lines: objects, or text as it is) and img/a.png."""
    (folder / "img").mkdir(exist_ok=True)
    shutil.copy(PICTURE, folder / "img/a.png")
    for name, lines in datasets.items():
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    entry = {"root": "img", "repeat_time": 1, **entry}
    meta = {name: {"annotation": f"{name}.jsonl", **entry} for name in datasets}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def test_datasets_give_what_their_lines_say(tmp_path):
    one, two, text = ask("<image>\nWhat?", "A car."), ask("<image> <image>", "Twice."), ask("你好", "hi")
    meta = write_meta(tmp_path, {"pictures": [{"id": 7, "image": "a.png", "conversations": one},
                                              {"id": 8, "image": ["a.png", "a.png"], "conversations": two}],
                                 "texts": [{"id": "t", "conversations": text}, "", " ",
                                           {"image": [], "conversations": text}]},
                      max_dynamic_patch=3, data_augment=False)
    samples = load_meta(meta, TOK, TINY)
    assert [samples[i]["id"] for i in range(len(samples))] == [7, 8, "t", None]
    # images of one sample share the budget: 3 tiles for one, 1 for each of two
    for i, (turns, images, budget) in enumerate([(one, 1, 3), (two, 2, 1), (text, 0, 3), (text, 0, 3)]):
        tiles = [load_image(PICTURE, budget, 56)] * images
        ids, labels = encode_conversation(TOK, turns, [len(t) for t in tiles], TINY.tokens_per_tile)
        assert (samples[i]["input_ids"].tolist(), samples[i]["labels"].tolist()) == (ids, labels)
        pixels = samples[i]["pixel_values"]
        assert torch.equal(pixels, torch.cat(tiles)) if images else pixels is None


def test_repeat_time_repeats_and_a_fraction_is_a_seeded_subset(tmp_path):
    write_meta(tmp_path, {"a": [{"id": i, "conversations": ask("a", "b")} for i in range(20)]})

    def ids(repeat_time, seed=0):
        samples = JsonlDataset(tmp_path / "a.jsonl", tmp_path, TOK, TINY, repeat_time, seed=seed)
        return [samples[i]["id"] for i in range(len(samples))]
    assert ids(3) == list(range(20)) * 3
    assert len(set(ids(0.3))) == len(ids(0.3)) == 6 and ids(0.3) == ids(0.3) != ids(0.3, seed=1)
    assert ids(1.5)[:20] == list(range(20)) and len(set(ids(1.5)[20:])) == 10


def test_datasets_in_one_meta_file_keep_their_own_repeat_time(tmp_path):
    meta = write_meta(tmp_path, {name: [{"id": name, "conversations": ask("a", "b")}] * 4 for name in "xy"})
    entries = json.loads(meta.read_text())
    entries["x"]["repeat_time"], entries["y"]["repeat_time"] = 2, 0.5
    meta.write_text(json.dumps(entries))
    samples = load_meta(meta, TOK, TINY)
    assert [samples[i]["id"] for i in range(len(samples))] == list("xxxxxxxxyy")


@pytest.mark.parametrize("line, message", [
    ("{bad", "not JSON"), ("1" * 5000, "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "is not an object"),
    ({"id": 1}, "expected a list of turns"), ({"conversations": ask("a")}, "no answer to learn"),
    ({"conversations": ask("\ud800", "b")}, "not valid Unicode"),
    ({"conversations": ask("a " * 600, "b")}, "tokens, the limit is 512"),
    ({"image": 3, "conversations": ask("<image>", "b")}, "image is 3"),
    ({"image": "a.png", "conversations": ask("a", "b")}, "0 <image> marks for 1 images"),
    ({"image": "a.png", "conversations": ask("<image><image>", "b")}, "2 <image> marks for 1 images"),
    ({"image": "none.png", "conversations": ask("<image>", "b")}, "none.png does not exist"),
    ({"image": "nul\0.png", "conversations": ask("<image>", "b")}, "is no file name"),
    ({"image": "../outside.png", "conversations": ask("<image>", "b")}, "leads out of the image folder"),
    ({"image": PICTURE, "conversations": ask("<image>", "b")}, "leads out of the image folder"),
    ({"image": "link.png", "conversations": ask("<image>", "b")}, "leads out of the image folder"),
    ({"image": "linked/picture.png", "conversations": ask("<image>", "b")}, "leads out of the image folder")])
def test_a_bad_line_is_named_by_file_and_number_and_the_others_still_load(tmp_path, line, message):
    good = {"conversations": ask("a", "b")}
    meta = write_meta(tmp_path, {"a": [good, "", line, good]})
    shutil.copy(PICTURE, tmp_path / "outside.png")
    os.symlink(PICTURE, tmp_path / "img/link.png")
    os.symlink(OFFICIAL, tmp_path / "img/linked")
    samples = load_meta(meta, TOK, TINY)
    with pytest.raises(InputError, match=f"{tmp_path}/a.jsonl:3: .*{message}"):
        samples[1]
    assert torch.equal(samples[0]["input_ids"], samples[2]["input_ids"])


@pytest.mark.parametrize("entry, message", [
    *(({"repeat_time": value}, "repeat_time .* expected a positive number") for value in (0, -1, "2", True)),
    ({"repeat_time": 0.001}, "no samples"), ({"annotation": "none.jsonl"}, "none.jsonl is not readable"),
    ({"root": "none"}, "image folder .*none"), ({"root": None}, "dataset a needs root"),
    ({"max_dynamic_patch": 0}, "max_dynamic_patch"), ({"repeat": 2}, "unknown field repeat"),
    ({"data_augment": True}, "data_augment")])
def test_a_bad_meta_file_is_refused_before_training(tmp_path, entry, message):
    meta = write_meta(tmp_path, {"a": [{"conversations": ask("a", "b")}]}, **entry)
    with pytest.raises(InputError, match=message):
        load_meta(meta, TOK, TINY)
    for content in ("", "{}", "[]", '{"a": 3}'):
        meta.write_text(content)
        with pytest.raises(InputError, match=str(meta)):
            load_meta(meta, TOK, TINY)


# ---------------------------------------------------------------- collation and flags

def test_batches_are_padded_on_the_side_asked_for_and_only_if_needed():
    def row(n, tiles):
        pixels = torch.full((tiles, 3, 2, 2), float(n)) if tiles else None
        return {"input_ids": torch.arange(1, n + 1), "labels": torch.arange(1, n + 1), "pixel_values": pixels}
    rows = [row(2, 1), row(4, 0), row(3, 2)]
    right, left = collate(rows, pad_token_id=9), collate(rows, pad_token_id=9, left=True)
    assert right["input_ids"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4], [1, 2, 3, 9]]
    assert right["labels"].tolist() == [[1, 2, -100, -100], [1, 2, 3, 4], [1, 2, 3, -100]]
    assert right["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert left["input_ids"].tolist() == [[9, 9, 1, 2], [1, 2, 3, 4], [9, 1, 2, 3]]
    assert left["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
    assert right["pixel_values"][:, 0, 0, 0].tolist() == [2, 3, 3]         # all rows' tiles, in order
    even = collate([row(2, 0), row(2, 0)])
    assert even["attention_mask"] is None and even["pixel_values"] is None


@dataclass
class Flags:
    steps: int = flag(3, "how many, 100% of them")
    lr: float = 1e-3
    compile: bool = True
    top_k: int | None = None
    image: list[str] = flag([], "files")
    moe: str = flag("auto", "back end", choices=["auto", "dense"])


def test_flags_keep_types_and_booleans_can_be_switched_off():
    assert parse_flags(Flags, []) == Flags(3, 1e-3, True, None, [], "auto")
    argv = "--steps=4 --lr 1 --no-compile --top_k 5 --image a b --moe dense".split()
    assert parse_flags(Flags, argv) == Flags(4, 1.0, False, 5, ["a", "b"], "dense")


@pytest.mark.parametrize("argv, message", [
    ("--setps 4", "unknown argument --setps; did you mean --steps?"), ("--step 4", "did you mean --steps?"),
    ("--top-k=4", "unknown argument --top-k; did you mean --top_k?"), ("--xyz", "unknown argument --xyz\n"),
    ("--steps x", "invalid int value"), ("--moe fast", "invalid choice")])
def test_a_wrong_flag_exits_with_2_and_the_nearest_name(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_flags(Flags, argv.split())
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_flags(Flags, ["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for line in ("how many, 100% of them (default: 3)", "--lr LR lr (default: 0.001)", "--no-compile",
                 "top_k (default: None)", "files (default: [])", "{auto,dense}"):
        assert line in text


# ---------------------------------------------------------------- sample.py

@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A checkpoint folder with random weights and the official tokenizer's files."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    MonoInternVL(TINY).save_pretrained(folder)
    for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
        shutil.copy(OFFICIAL / name, folder)
    return str(folder)


def script(monkeypatch, *answers: str | list):
    """Makes generate write these answers, one a call (exceptions in them are raised). Returns what it was
    asked: (input_ids, number of tiles) of each call."""
    prompts, answers = [], iter(answers)

    def generate(self, input_ids, pixel_values=None, **kwargs):
        prompts.append((input_ids[0].tolist(), 0 if pixel_values is None else len(pixel_values)))
        answer = next(answers)
        for token in TOK.encode(answer, bos=False) if isinstance(answer, str) else answer:
            if not isinstance(token, int):
                raise token
            yield torch.tensor([token])
    monkeypatch.setattr(MonoInternVL, "generate", generate)
    return prompts


def type_in(monkeypatch, *lines: str):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_answer_is_what_the_model_generates(tiny, images, capsys):
    argv = ["--model", tiny, "--prompt", "What?", "--max_new_tokens", "12"]
    assert sample.main(argv + (["--image"] + [PICTURE] * images if images else [])) == 0
    marks = ["", "<image>\n", "Image-1: <image>\nImage-2: <image>\n"][images]
    ids, _ = encode_conversation(TOK, ask(marks + "What?"), [3] * images, TINY.tokens_per_tile)
    pixels = torch.cat([load_image(PICTURE, 6, 56)] * images) if images else None
    model, end = MonoInternVL.from_pretrained(tiny), TOK.token_id("<|im_end|>")
    tokens = model.generate(torch.tensor([ids]), pixels, max_new_tokens=12, eos_token_id=end)
    assert capsys.readouterr().out == TOK.decode([token.item() for token in tokens]) + "\n"


@pytest.mark.parametrize("prompt, images, expected", [
    ("What?", 0, "What?"), ("What?", 1, "<image>\nWhat?"), ("<image> or <image>?", 2, "<image> or <image>?"),
    ("What?", 2, "Image-1: <image>\nImage-2: <image>\nWhat?")])
def test_images_without_marks_come_before_the_question(tiny, monkeypatch, prompt, images, expected):
    prompts = script(monkeypatch, "ok")
    sample.main(["--model", tiny, "--prompt", prompt, *(["--image"] + [PICTURE] * images if images else [])])
    ids, _ = encode_conversation(TOK, ask(expected), [3] * images, TINY.tokens_per_tile)
    assert prompts == [(ids, 3 * images)]


def test_sampling_follows_the_seed(tiny, capsys):
    answers, argv = [], f"--model {tiny} --prompt hi --temperature 2 --max_new_tokens 30 --seed".split()
    for seed in "112":
        sample.main([*argv, seed])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_an_answer_stops_at_the_end_of_its_turn_or_of_the_text(tiny, monkeypatch, capsys):
    script(monkeypatch, "ü<|im_end|>x", "ü</s>x", TOK.encode("ü", bos=False)[:1])
    for answer in ("ü", "ü", "\ufffd"):    # the last was cut inside a character
        assert sample.main(["--model", tiny, "--prompt", "hi"]) == 0
        assert capsys.readouterr().out == answer + "\n"


def test_images_join_any_turn_of_a_chat_and_clear_starts_over(tiny, monkeypatch, capsys):
    type_in(monkeypatch, "hi", f'/image "{PICTURE}" {PICTURE}', "and?", "", "more", f"/image {PICTURE}",
            "/clear", "new", "/exit", "unread")
    prompts = script(monkeypatch, "ho", "two", "three", "four")
    assert sample.main(["--model", tiny, "--max_tiles", "1"]) == 0
    turns = ["hi", "ho", "Image-1: <image>\nImage-2: <image>\nand?", "two", "more"]
    expected = [(turns[:1], []), (turns[:3], [1, 1]), (turns, [1, 1]), (["new"], [])]
    assert prompts == [(encode_conversation(TOK, ask(*turns), tiles, TINY.tokens_per_tile)[0], sum(tiles))
                       for turns, tiles in expected]
    assert capsys.readouterr().out == "ho\ntwo\nthree\nfour\n"


def test_a_mistake_in_a_chat_costs_one_message_only(tiny, monkeypatch, capsys):
    type_in(monkeypatch, "/image none.png", '/image "a', "<image> too many", "x " * 600, "hi")
    prompts = script(monkeypatch, [InputError("the prompt fills the context")], "ho")
    assert sample.main(["--model", tiny]) == 0
    out, err = capsys.readouterr()
    assert out == "ho\n" and len(prompts) == 2 and prompts[1] == (encode_conversation(TOK, ask("hi"))[0], 0)
    assert re.findall("error: (.{10})", err) == ["the image ", "No closing", "the conver", "the prompt"]


def test_ctrl_c_stops_an_answer_and_at_the_prompt_ends_the_chat(tiny, monkeypatch, capsys):
    class Keyboard(io.StringIO):
        def readline(self, *args):
            line = super().readline(*args)
            if not line:
                raise KeyboardInterrupt
            return line
    monkeypatch.setattr(sys, "stdin", Keyboard("hi\ngo on\n"))
    prompts = script(monkeypatch, [*TOK.encode("half", bos=False), KeyboardInterrupt()], "ho")
    assert sample.main(["--model", tiny]) == 0
    assert capsys.readouterr().out == "half\nho\n"
    assert prompts[1] == (encode_conversation(TOK, ask("hi", "half", "go on"))[0], 0)


@pytest.mark.parametrize("argv, message", [
    ("--image none.png", "none.png does not exist"), ("--image cut.png", "cut.png is not a readable image"),
    ("--image huge.png", "huge.png is not a readable image: DecompressionBombError"),
    ("--prompt <image>", "1 <image> marks for 0 images"),
    ("--image ok.png --prompt <image><image>", "2 <image> marks for 1 images"),
    ("--image ok.png ok.png --prompt <image>", "1 <image> marks for 2 images"),
    ("--prompt <IMG_CONTEXT>", "control token <IMG_CONTEXT>"), ("--prompt \udcff", "not valid Unicode"),
    ("--prompt long", "fills the context of 512"), ("--device abacus", "abacus: torch has no such device"),
    ("--model none", "none/config.json does not exist"), ("--model bare", "bare has no tokenizer.model"),
    ("--model cut", "model.safetensors is damaged"), ("--model small", "491 tokens, the model 488"),
    ("--temperature -1", "temperature is -1.0"), ("--temperature nan", "temperature is nan"),
    ("--top_p 0", "top_p is 0.0"), ("--top_k 0", "top_k is 0"), ("--image ok.png --max_tiles 0", "tiles 0")])
def test_bad_input_is_one_line_on_stderr_and_exit_1(tiny, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    write_bad_images(tmp_path)
    shutil.copy(PICTURE, "ok.png")
    for name in ("bare", "cut"):
        shutil.copytree(tiny, name)
    os.remove("bare/tokenizer.model")
    Path("cut/model.safetensors").write_bytes(Path("cut/model.safetensors").read_bytes()[:5000])
    if "small" in argv:
        MonoInternVL(replace(TINY, vocab_size=488)).save_pretrained("small")
        shutil.copytree(OFFICIAL, "small", dirs_exist_ok=True)
    words = ["x " * 600 if word == "long" else word for word in argv.split()]
    assert sample.main(["--model", tiny, "--prompt", "hi", *words]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(f"error: .*{re.escape(message)}.*\n", err)


def test_without_a_model_the_newest_checkpoint_is_taken_and_named(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--prompt", "hi"]) == 1
    assert "run `python train_evip.py` first" in capsys.readouterr().err
    for age, name in enumerate(("b/S1", "a/S2", "c/S0")):
        shutil.copytree(tiny, f"out/{name}")
        os.utime(f"out/{name}/config.json", (1e9 - age, 1e9 - age))
    os.utime("out/a/S2/config.json", (2e9, 2e9))
    assert sample.main(["--prompt", "hi", "--max_new_tokens", "1"]) == 0
    assert capsys.readouterr().err == "model: out/a/S2, the newest below out/\n"


def test_the_answer_may_go_to_a_reader_that_leaves(tiny, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert sample.main(["--model", tiny, "--prompt", "hi"]) == 1


def test_flags_reach_the_model(tiny, monkeypatch):
    used, kwargs = [], {}

    def generate(self, input_ids, pixel_values, **kwargs_):
        used.append((self.moe, input_ids.device.type, next(self.parameters()).dtype))
        kwargs.update(kwargs_)
        return iter(())
    monkeypatch.setattr(MonoInternVL, "generate", generate)
    sample.main(["--model", tiny, "--prompt", "hi", "--moe", "dense", "--device", "cpu", "--dtype",
                 "bfloat16"])
    sample.main(["--model", tiny, "--prompt", "hi", "--device", "cpu"])
    assert used == [("dense", "cpu", torch.bfloat16), ("auto", "cpu", torch.float32)]
    flags = {"max_new_tokens": 7, "temperature": 0.5, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.1,
             "seed": 3}
    sample.main(["--model", tiny, "--prompt", "hi", *(f"--{name}={value}" for name, value in flags.items())])
    assert kwargs == {**flags, "eos_token_id": TOK.token_id("<|im_end|>")}


def run_sample(*argv: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "sample.py"), *argv]
    return subprocess.run(command, capture_output=True, timeout=120, **kwargs)


def test_a_chat_works_through_pipes_in_any_locale(tiny):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    chat = run_sample("--model", tiny, "--temperature", "3", "--seed", "0", "--max_new_tokens", "40", env=env,
                      input="你好\n".encode() + b"\xff\n/exit\n")
    assert chat.returncode == 0 and not chat.stdout.decode("utf-8").isascii()
    assert sample.GREETING in chat.stderr.decode()


def test_the_script_ends_without_a_traceback_on_bad_input(tiny):
    bad = run_sample("--model", tiny, "--image", "none.png", "--prompt", "hi", text=True)
    assert (bad.returncode, bad.stdout, bad.stderr) == (1, "", "error: the image none.png does not exist\n")
