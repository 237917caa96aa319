"""Ask a Mono-InternVL checkpoint about pictures: one question, a chat, or a file of questions.

    python sample.py --image digit.png --prompt "What do you see?"
    python sample.py --model FOLDER --image a.jpg b.jpg        # a chat about two pictures
    python sample.py --input questions.jsonl --output answers.jsonl

FOLDER is an official checkpoint or one of train_evip.py's. A line of questions.jsonl is {"image": "a.jpg",
"question": "What is this?"}. "image" is a list for several images and left out for none. A line may also be
in the official format of training, and its last answer is then not shown to the model. Answers go to stdout
or --output, everything else to stderr. In this order: the flags, the checkpoint, one answer, the chat, the
file of questions, main.
"""
import contextlib
import itertools
import json
import os
import re
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from benchmarks import boxes
from budget import peak_memory
from checkpoint import newest_checkpoint
from common import InputError, auto_device, flag, parse_flags
from data import JsonlDataset, TextStream, Tokenizer, collate, encode_conversation, num_tokens, turns
from generate import KVCache, check_options
from mono_internvl import MonoInternVL, MonoInternVLConfig

GREETING = """/image FILE [FILE ...] adds images to your next message, /clear starts over.
Ctrl-C stops an answer; /exit, Ctrl-D or Ctrl-C at the prompt ends the chat."""
LESS_MEMORY = "--max_new_tokens, --max_tiles or --prefill_chunk, use fewer images, or choose --dtype bfloat16"


@dataclass
class Flags:
    model: str | None = flag(None, "checkpoint folder (None: the newest below out/)")
    image: list[str] = flag([], "files for the question, or for the first message of the chat")
    prompt: str | None = flag(None, "the question; it may place the images with <image> marks (None: chat)")
    system: str | None = flag(None, "system message, for conversations without one (None: the checkpoint's)")
    draw: str | None = flag(None, "PNG file: the image of --prompt with the boxes that the answer names")
    input: str | None = flag(None, 'JSONL file, one {"image": FILE, "question": TEXT} a line; needs --output')
    output: str | None = flag(None, "JSONL file for the answers, in the order of the questions; that of an "
                              "interrupted run is continued, a pipe or device gets all answers at the end")
    image_root: str | None = flag(None, "folder of the images that --input names (None: that of --input)")
    batch_size: int = flag(8, "questions of --input answered at a time")
    stats: bool = flag(False, "print times, numbers of tokens and memory after each answer")
    max_new_tokens: int = flag(512, "longest answer")
    temperature: float = flag(0.0, "0 takes the likeliest token, higher values take more chances")
    top_k: int | None = flag(None, "sample among the k likeliest tokens only")
    top_p: float | None = flag(None, "sample among the likeliest tokens that together have this probability")
    repetition_penalty: float = flag(1.0, "above 1 makes tokens of the answer so far less likely")
    seed: int | None = flag(None, "makes sampling repeatable")
    max_tiles: int | None = flag(None, "most tiles of one image (None: the checkpoint's max_dynamic_patch)")
    max_pixels: int = flag(data.MAX_PIXELS, "images with more pixels are refused")
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto is cuda, else mps, else cpu")
    dtype: str = flag("auto", "auto is float32 on a CPU, else bfloat16",
                      choices=["auto", "float32", "bfloat16", "float16"])
    moe: str = flag("auto", "back end of the experts", choices=["auto", "dense", "torch", "cuda"])
    prefill_chunk: int | None = flag(4096, "tokens of the prompt read at a time: bounds memory")
    cuda_graphs: bool = flag(True, "on a GPU, replay decoding steps as CUDA graphs")
    compile: bool | None = flag(None, "compile the decoding step: a minute first, then faster on a GPU; "
                                "None: for a chat or a file of questions on a GPU")


@contextlib.contextmanager
def explain_out_of_memory(advice: str):
    """Turns what torch and Python raise when memory runs out into an InputError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not re.search("MemoryError|(allocate|out of) memory", repr(e)):
            raise
        raise InputError(f"out of memory; {advice}") from None


def compiles(flags: Flags, device_type: str) -> bool:
    """Whether to compile the decoding step. One question alone is answered sooner without."""
    return flags.compile if flags.compile is not None else device_type == "cuda" and flags.prompt is None


def load_model(folder: Path, tok: Tokenizer, flags: Flags) -> MonoInternVL:
    name = flags.device if flags.device != "auto" else auto_device()
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError):         # an unknown name, or a build of torch without this device
        raise InputError(f"--device {name}: torch has no such device on this machine") from None
    dtype = flags.dtype if flags.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    with explain_out_of_memory("choose --dtype bfloat16"):
        model = MonoInternVL.from_pretrained(folder, getattr(torch, dtype), device).eval()
    if len(tok) > model.config.vocab_size:
        raise InputError(f"{folder}'s tokenizer has {len(tok)} tokens, the model {model.config.vocab_size}")
    model.moe, model.cuda_graphs = flags.moe, flags.cuda_graphs
    model.compile_decode = compiles(flags, device.type)
    if model.compile_decode:
        print("decoding is compiled, which takes about a minute once; --no-compile does without",
              file=sys.stderr)
    return model


# ---------------------------------------------------------------- one answer

def generate_options(tok: Tokenizer, flags: Flags) -> dict:
    """The arguments of generate besides the prompt and the cache."""
    names = "max_new_tokens temperature top_k top_p repetition_penalty seed prefill_chunk".split()
    return {"eos_token_id": (tok.token_id("<|im_end|>"), tok.eos_id)} | {n: getattr(flags, n) for n in names}


def add_image_marks(question: str, images: int) -> str:
    """Puts <image> marks before a question without any, numbered if there are several [repo: README]."""
    if "<image>" in question or not images:
        return question
    if images == 1:
        return f"<image>\n{question}"
    return "".join(f"Image-{i + 1}: <image>\n" for i in range(images)) + question


def encode_prompt(tok: Tokenizer, config: MonoInternVLConfig, conversation, tiles: list[torch.Tensor],
                  continued: bool = False) -> list[int]:
    """The ids of a conversation. What is not valid Unicode, half a surrogate pair, becomes "?"."""
    conversation = json.loads(json.dumps(conversation, ensure_ascii=False).encode(errors="replace"))
    return encode_conversation(tok, conversation, [len(t) for t in tiles], config.tokens_per_tile,
                               continued=continued)[0]


def memory_report(device: torch.device) -> str:
    name, peak = "peak GPU memory" if device.type == "cuda" else "peak memory", peak_memory(str(device))
    return f"{name} unknown" if peak is None else f"{name} {peak / 1e6:.0f} MB"


def print_answer(model: MonoInternVL, tok: Tokenizer, input_ids: list[int], tiles: list[torch.Tensor],
                 flags: Flags, cache: KVCache) -> list[int]:
    """Prints the answer to a prompt while it is generated, and returns its tokens. Ctrl-C stops it. The
    token that ends the answer is left out. Other special tokens, such as <ref> and <box>, are part of it."""
    device, options, cut = next(model.parameters()).device, generate_options(tok, flags), ""
    stream, answer, times = TextStream(tok, skip_special_tokens=False), [], [time.perf_counter()]
    with contextlib.suppress(KeyboardInterrupt), explain_out_of_memory(f"lower {LESS_MEMORY}"):
        for token in model.generate(
                torch.tensor([input_ids]), data.normalise(torch.cat(tiles).to(device)) if tiles else None,
                kv_cache=cache, num_tokens=len(tok), **options):
            times.append(time.perf_counter())
            if int(token) in options["eos_token_id"]:
                break
            answer.append(int(token))
            print(stream.push(token), end="", flush=True)
        else:
            cut = f"the answer was cut after {len(answer)} tokens, by --max_new_tokens or a full context\n"
    print(stream.flush(), flush=True)
    print(cut, end="", file=sys.stderr)
    if flags.stats:
        visual = input_ids.count(model.config.img_context_token_id)
        seconds = [b - a for a, b in itertools.pairwise(times)]            # for each token
        rate = f", then {len(seconds[1:]) / sum(seconds[1:]):.1f} tokens/s" if len(seconds) > 1 else ""
        print(f"time to first token {sum(seconds[:1]):.3f} s{rate}; {len(seconds)} tokens; prompt: {visual} "
              f"visual, {len(input_ids) - visual} text tokens, {cache.reused} of them read before; "
              f"{memory_report(device)}", file=sys.stderr)
    return answer


def draw_boxes(picture: Image.Image, answer: str, output: str):
    """Draws the boxes of an answer, <ref>name</ref><box>[[x1, y1, x2, y2], ...]</box>, onto the picture and
    saves it. Coordinates are thousandths of its width and height."""
    named = [(ref, box) for ref, text in re.findall(r"(?:<ref>([^<]*)</ref>\s*)?<box>([^<]*)</box>", answer)
             for box in boxes(text)]
    if not named:
        print("the answer names no box, nothing is drawn", file=sys.stderr)
        return
    draw, size = ImageDraw.Draw(picture), max(picture.size)
    for (ref, box), color in zip(named, itertools.cycle(["red", "lime", "cyan", "yellow"]), strict=False):
        left, right = sorted(x * picture.width / 1000 for x in box[::2])
        top, bottom = sorted(y * picture.height / 1000 for y in box[1::2])
        draw.rectangle((left, top, right, bottom), outline=color, width=max(1, size // 300))
        draw.text((left + 2, top), ref, color, font_size=max(10, size // 40))
    picture.save(output, "PNG")


# ---------------------------------------------------------------- the chat

def chat(model: MonoInternVL, tok: Tokenizer, images: list[torch.Tensor],
         load: Callable[[str], torch.Tensor], flags: Flags):
    """Reads messages until the end of input. images are the tiles, (n_tiles, 3, S, S) uint8, of each image
    for the next message. The prompt of a turn begins with all tokens of the conversation so far. The model
    has them in its cache and only reads what is new."""
    print(GREETING, file=sys.stderr)
    cache, ids, tiles = KVCache(model.config), [], []          # tokens and tiles of the conversation so far
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401              # gives input() a history and cursor keys
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/exit":
                return
            elif command == "/clear":
                ids, tiles, images = [], [], []
            elif command == "/image":
                # One name alone needs no quotes. A backslash before a letter is part of a Windows path.
                quoted = re.sub(r"\\(?=[\w.\\])", r"\\\\", rest)
                paths = [rest] if os.path.isfile(os.path.expanduser(rest)) else shlex.split(quoted)
                images = images + [load(os.path.expanduser(path)) for path in paths]
                print(f"{len(images)} image(s) join your next message", file=sys.stderr)
            elif line:
                prompt = ids + encode_prompt(tok, model.config, turns(add_image_marks(line, len(images))),
                                             images, continued=bool(ids))
                answer = print_answer(model, tok, prompt, tiles + images, flags, cache)
                ids = prompt + answer + [tok.token_id("<|im_end|>")]
                tiles, images = tiles + images, []
        except ValueError as e:                    # InputError, or a lone quotation mark in shlex
            print(f"error: {e}", file=sys.stderr)  # the message is dropped, its images stay


# ---------------------------------------------------------------- a file of questions

def in_batches(samples: list[dict], size: int, room: int) -> list[list[dict]]:
    """Batches of questions of similar length. All answers of a batch end when one row fills the context.
    Questions of more than `room` tokens, where that may happen, are therefore asked alone."""
    samples = sorted(samples, key=num_tokens)
    short = [sample for sample in samples if num_tokens(sample) <= room]
    return [short[i:i + size] for i in range(0, len(short), size)] + [[s] for s in samples[len(short):]]


class Questions(JsonlDataset):
    """The lines of --input. A sample has what collate needs, and its "question"."""

    def __init__(self, flags: Flags, tok: Tokenizer, config: MonoInternVLConfig,
                 load: Callable[[str], torch.Tensor]):
        super().__init__(flags.input, flags.image_root or Path(flags.input).parent, tok, config)
        self.load, self.left_out = load, 0
        self.line_numbers = self.locations[:, 0].tolist()
        names = "max_new_tokens temperature top_k top_p repetition_penalty seed max_tiles dtype".split()
        model = Path(flags.model).resolve()
        saved = (model / "config.json").stat().st_mtime_ns                 # when the model was saved
        # What an answer depends on besides its question.
        self.settings = [str(self.root), saved, str(model), *(getattr(flags, name) for name in names)]
        self.settings += [] if flags.system is None else [flags.system]

    def key(self, i: int) -> int:
        """A checksum of question i and of the settings."""
        return zlib.crc32(self.read(i)[1] + repr(self.settings).encode())

    def make_sample(self, line: bytes, files: None, rng) -> dict:
        line, images = self.parse_line(line, files)
        conversation = line.get("conversations")
        if "question" in line:
            if not isinstance(line["question"], str):
                raise InputError(f"question is {line['question']!r:.60}, expected text")
            conversation = turns(add_image_marks(line["question"], len(images)))
        elif isinstance(conversation, list) and any(
                isinstance(turn, dict) and turn.get("from") == "gpt" for turn in conversation[-1:]):
            conversation = conversation[:-1]       # the last turn is the answer that we ask for
        elif conversation is None:
            raise InputError('it has neither "question" nor "conversations"')
        tiles = [self.load(image) for image in images]
        ids = encode_prompt(self.tok, self.config, conversation, tiles)
        if len(ids) >= self.max_tokens:
            raise InputError(f"{len(ids)} tokens fill the context of {self.max_tokens}")
        return {"input_ids": torch.tensor(ids), "pixel_values": torch.cat(tiles) if tiles else None,
                "id": line.get("id"), "question": conversation[-1]["value"]}

    def batches(self, todo: list[int], flags: Flags, bar: tqdm) -> Iterator[list[dict]]:
        """The questions `todo` in batches. 4 · batch_size questions are read and sorted at a time. Those that
        cannot be asked are left out, named on stderr, and counted in the bar."""
        for start in range(0, len(todo), 4 * flags.batch_size):
            samples = []
            for i in todo[start:start + 4 * flags.batch_size]:
                try:
                    samples.append({**self[i], "index": i})
                except InputError as e:
                    self.left_out += 1
                    bar.update()
                    tqdm.write(f"left out: {e}", file=sys.stderr)
            yield from in_batches(samples, flags.batch_size, self.max_tokens - flags.max_new_tokens)


def answer_batch(model: MonoInternVL, tok: Tokenizer, samples: list[dict],
                 **options) -> list[tuple[list[int], bool]]:
    """For each sample, the tokens of the answer without the one that ends it, and whether there was one.
    options are those of generate, with a tuple as eos_token_id."""
    batch, ends = collate(samples, tok.pad_id, left=True), set(options["eos_token_id"])
    if batch["pixel_values"] is not None:          # generate looks at the ids, which is faster on a CPU
        batch["pixel_values"] = data.normalise(batch["pixel_values"].to(next(model.parameters()).device))
    tokens = list(model.generate(**batch, **options, num_tokens=len(tok)))
    return [(list(itertools.takewhile(lambda token: token not in ends, row)), not ends.isdisjoint(row))
            for row in torch.stack(tokens, 1).tolist()]


def open_in_place(output: Path) -> int | None:
    """A file descriptor if --output is a device, a pipe or our own stdout, which can be written but not read
    or replaced. None if it is a regular file or does not exist."""
    if output.exists() and os.path.samestat(output.stat(), os.fstat(1)):
        return os.dup(1)
    if not output.exists() or output.is_file():
        return None
    try:
        fd = os.open(output, os.O_WRONLY | os.O_NONBLOCK)      # do not wait for the reader of a pipe
    except OSError as e:
        nobody = "; nobody reads it" * output.is_fifo()
        raise InputError(f"{output} cannot be written: {e.strerror}{nobody}") from None
    os.set_blocking(fd, True)
    return fd


def read_answers(questions: Questions, output: Path) -> dict[int, bytes]:
    """{line number: record} of what an earlier run of the same command wrote to --output. Half a record may
    stand at the end, as a killed run leaves it. Raises InputError if the file holds anything else."""
    if not output.exists():
        return {}
    *records, rest = output.read_bytes().split(b"\n")
    beginning = b'{"line": '
    if not rest.startswith(beginning) and not beginning.startswith(rest):
        raise InputError(f"{output} holds something else than answers; name another --output")
    index, answers = {number: i for i, number in enumerate(questions.line_numbers)}, {}
    for number, record in enumerate(records, 1):
        try:
            fields = json.loads(record)
            same = questions.key(index[fields["line"]]) == fields["key"]
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise InputError(f"{output}:{number} answers another question, or the same with other flags; "
                             "move the file away, or name another --output")
        answers[fields["line"]] = record
    return answers


def write_answers(output: Path, answers: dict[int, bytes], in_place: int | None = None):
    """Writes the records in the order of their lines, to the descriptor in_place if there is one. Otherwise a
    new file replaces the old one when it is complete."""
    target = os.path.realpath(output)              # of a link, the file that it leads to
    try:
        with open(target + ".tmp" if in_place is None else in_place, "wb") as file:
            file.writelines(answers[number] + b"\n" for number in sorted(answers))
        if in_place is None:
            os.replace(target + ".tmp", target)
    except OSError as e:
        raise InputError(f"{output} cannot be written: {e.strerror}") from None


def answer_file(model: MonoInternVL, tok: Tokenizer, load: Callable[[str], torch.Tensor], flags: Flags):
    """Answers --input. Each batch of answers is appended to --output at once, and the file is sorted at the
    end. A run that is stopped loses one batch at most, and the same command continues it."""
    questions, output = Questions(flags, tok, model.config, load), Path(flags.output)
    in_place, options, answers = open_in_place(output), generate_options(tok, flags), {}
    options["kv_cache"] = KVCache(model.config)
    if in_place is None:
        answers = read_answers(questions, output)
        write_answers(output, answers)
    todo = [i for i, number in enumerate(questions.line_numbers) if number not in answers]
    bar = tqdm(total=len(questions), initial=len(answers), unit="question")
    started, tokens, rate = time.perf_counter(), 0, "0.0 tokens/s"
    try:
        with open(output if in_place is None else os.devnull, "ab") as file:
            for batch in questions.batches(todo, flags, bar):
                if flags.seed is not None:         # each row gets the seed, as if it were asked alone
                    options["seed"] = [flags.seed] * len(batch)
                with explain_out_of_memory(f"lower --batch_size, {LESS_MEMORY}"):
                    results = answer_batch(model, tok, batch, **options)
                for sample, (ids, finished) in zip(batch, results, strict=True):
                    number = questions.line_numbers[sample["index"]]
                    # Half a surrogate pair has no UTF-8. backslashreplace writes it as JSON does: \ud800.
                    answers[number] = json.dumps(
                        {"line": number, "id": sample["id"], "question": sample["question"],
                         "answer": tok.decode(ids, skip_special_tokens=False), "finished": finished,
                         "key": questions.key(sample["index"])},
                        ensure_ascii=False).encode(errors="backslashreplace")
                    file.write(answers[number] + b"\n")
                    tokens += len(ids)
                file.flush()
                bar.update(len(batch))
                rate = f"{tokens / (time.perf_counter() - started):.1f} tokens/s"
                bar.set_postfix_str(rate)
    finally:
        bar.close()
        write_answers(output, answers, in_place)
        print(f"{output}: {len(answers)} of {len(questions)} questions answered, {questions.left_out} left "
              "out", file=sys.stderr)
    if flags.stats:
        print(f"{rate}; {memory_report(next(model.parameters()).device)}", file=sys.stderr)
    if not answers:
        raise InputError(f"none of the {len(questions)} questions could be answered")


# ---------------------------------------------------------------- main

def check_flags(flags: Flags):
    """Raises InputError for flags that contradict each other or are out of range."""
    if (flags.input is None) != (flags.output is None) or flags.input and (flags.image or flags.prompt):
        raise InputError("--input and --output go together, without --image and --prompt")
    if flags.draw and (flags.prompt is None or len(flags.image) != 1):
        raise InputError("--draw needs --prompt and one --image")
    if flags.input and os.path.exists(flags.input) and not os.path.isfile(flags.input):
        raise InputError(f"--input {flags.input} is no regular file; save the questions in one first")
    written = [flags.draw, flags.output, f"{os.path.realpath(flags.output)}.tmp" if flags.output else None]
    for path, source in itertools.product(filter(None, written), filter(None, [*flags.image, flags.input])):
        if os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source):
            raise InputError(f"{path} would overwrite {source}; name another --output or --draw")
    for name in ("batch_size", "max_tiles", "max_new_tokens", "max_pixels"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise InputError(f"--{name} is {getattr(flags, name)}, expected at least 1")


def run(flags: Flags):
    check_flags(flags)
    if flags.model is None:
        flags.model = newest_checkpoint()
        print(f"model: {flags.model}, the newest below out/", file=sys.stderr)
    folder = Path(flags.model)
    config, tok = MonoInternVLConfig.from_json(folder / "config.json"), Tokenizer(folder)
    check_options(1, **generate_options(tok, flags))
    if flags.system is not None:
        tok.system_message = flags.system.encode(errors="replace").decode()
    max_tiles = config.max_dynamic_patch if flags.max_tiles is None else flags.max_tiles
    load = partial(data.load_tiles, max_tiles=max_tiles, image_size=config.image_size,
                   use_thumbnail=config.use_thumbnail, min_tiles=min(max_tiles, config.min_dynamic_patch),
                   max_pixels=flags.max_pixels)
    images = [load(path) for path in flags.image]  # before the weights, so a wrong name is noticed at once
    model = load_model(folder, tok, flags)
    if flags.input is not None:
        answer_file(model, tok, load, flags)
    elif flags.prompt is None:
        chat(model, tok, images, load, flags)
    else:
        ids = encode_prompt(tok, config, turns(add_image_marks(flags.prompt, len(images))), images)
        answer = print_answer(model, tok, ids, images, flags, KVCache(config))
        if flags.draw:
            picture = data.open_image(flags.image[0], flags.max_pixels)
            draw_boxes(picture, tok.decode(answer, skip_special_tokens=False), flags.draw)


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(Flags, argv, __doc__.split("\n")[0])
    try:
        run(flags)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                        # the program that read our stdout has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError) as e:             # OSError: a full disk, a folder that is missing
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")       # a pipe may have another encoding by default
    sys.stdin.reconfigure(errors="surrogateescape")            # for file names after /image
    sys.exit(main())
