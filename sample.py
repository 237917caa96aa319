"""Ask a Mono-InternVL checkpoint about pictures: one question, a chat, or a file of questions.

    python sample.py --image digit.png --prompt "What do you see?"
    python sample.py --model FOLDER --image a.jpg b.jpg        # a chat about two pictures
    python sample.py --input questions.jsonl --output answers.jsonl

FOLDER is an official checkpoint or one of train_evip.py's. A line of questions.jsonl is {"image": "a.jpg",
"question": "What is this?"} ("image": a list for several, left out for none), or a line in the official
format of training, whose last answer the model does not see. In this order: the flags, the checkpoint, one
answer, the chat, the file of questions, main. Answers go to stdout or --output, everything else to stderr.
"""
import contextlib
import itertools
import json
import os
import shlex
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from budget import peak_memory
from checkpoint import newest_checkpoint
from common import InputError, flag, parse_flags
from data import JsonlDataset, TextStream, Tokenizer, collate, encode_conversation, load_image, turns
from generate import KVCache
from mono_internvl import MonoInternVL, MonoInternVLConfig

GREETING = """/image FILE [FILE ...] adds images to your next message, /clear starts over.
Ctrl-C stops an answer; /exit, Ctrl-D or Ctrl-C at the prompt ends the chat."""
LESS_MEMORY = ("--max_new_tokens, --max_tiles or --prefill_chunk, use fewer images, or choose --dtype "
               "bfloat16")


@dataclass
class Flags:
    model: str | None = flag(None, "checkpoint folder (None: the newest below out/)")
    image: list[str] = flag([], "files for the question, or for the first message of the chat")
    prompt: str | None = flag(None, "the question; it may place the images with <image> marks (None: chat)")
    input: str | None = flag(None, "a JSONL file of questions; needs --output")
    output: str | None = flag(None, "JSONL file for the answers, in the order of the questions; if an "
                              "interrupted run left one, the missing answers are added to it")
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
    device: str = flag("auto", "cpu, cuda, cuda:1, ...; auto is cuda if there is one")
    dtype: str = flag("auto", "auto is float32 on a CPU, else bfloat16",
                      choices=["auto", "float32", "bfloat16", "float16"])
    moe: str = flag("auto", "back end of the experts", choices=["auto", "dense", "torch", "cuda"])
    prefill_chunk: int | None = flag(4096, "tokens of the prompt read at a time: bounds memory")
    cuda_graphs: bool = flag(True, "on a GPU, replay decoding steps as CUDA graphs")
    compile: bool = flag(False, "compile the decoding step: a minute at the start, then faster on a GPU")


@contextlib.contextmanager
def explain_out_of_memory(advice: str):
    """Turns what torch and Python raise when memory runs out into an InputError with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(e):
            raise
        raise InputError(f"out of memory; {advice}") from None


def load_model(folder: Path, tok: Tokenizer, flags: Flags) -> MonoInternVL:
    name = flags.device if flags.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError):         # an unknown name, or a build of torch without this device
        raise InputError(f"--device {name}: torch has no such device on this machine") from None
    dtype = flags.dtype if flags.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    with explain_out_of_memory("choose --dtype bfloat16"):
        model = MonoInternVL.from_pretrained(folder, getattr(torch, dtype), device).eval()
    if len(tok) > model.config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {len(tok)} tokens, "
                         f"the model {model.config.vocab_size}")
    model.moe, model.cuda_graphs, model.compile_decode = flags.moe, flags.cuda_graphs, flags.compile
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


def memory_report(device: torch.device) -> str:
    name, peak = "peak GPU memory" if device.type == "cuda" else "peak memory", peak_memory(str(device))
    return f"{name} unknown" if peak is None else f"{name} {peak / 1e6:.0f} MB"


def print_answer(model: MonoInternVL, tok: Tokenizer, input_ids: list[int], tiles: list[torch.Tensor],
                 flags: Flags, cache: KVCache) -> list[int]:
    """Prints the answer to a prompt while it is generated, and returns its tokens. Ctrl-C stops it. The
    special token that ends the answer is left out. Others, such as <ref> and <box>, are part of it."""
    device, options = next(model.parameters()).device, generate_options(tok, flags)
    stream, answer, times = TextStream(tok, skip_special_tokens=False), [], [time.perf_counter()]
    with contextlib.suppress(KeyboardInterrupt), explain_out_of_memory(f"lower {LESS_MEMORY}"):
        for token in model.generate(
                torch.tensor([input_ids], device=device), torch.cat(tiles).to(device) if tiles else None,
                kv_cache=cache, **options):
            times.append(time.perf_counter())
            if int(token) in options["eos_token_id"]:
                break
            answer.append(int(token))
            print(stream.push(token), end="", flush=True)
    print(stream.flush(), flush=True)
    if flags.stats:
        visual = input_ids.count(model.config.img_context_token_id)
        seconds = [b - a for a, b in zip(times, times[1:], strict=False)]
        rate = f", then {len(seconds[1:]) / sum(seconds[1:]):.1f} tokens/s" if len(seconds) > 1 else ""
        print(f"time to first token {sum(seconds[:1]):.3f} s{rate}; {len(seconds)} tokens; prompt: {visual} "
              f"visual, {len(input_ids) - visual} text tokens, {cache.reused} of them read before; "
              f"{memory_report(device)}", file=sys.stderr)
    return answer


# ---------------------------------------------------------------- the chat

def chat(model: MonoInternVL, tok: Tokenizer, images: list[torch.Tensor],
         load: Callable[[str], torch.Tensor], flags: Flags):
    """Reads messages until the end of input. images, (n_tiles, 3, S, S) each, belong to the next message. All
    turns share a cache. The prompt of a turn begins with the tokens of the conversation so far, so the model
    reads only what is new."""
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
                images = images + [load(path) for path in shlex.split(rest)]
                print(f"{len(images)} image(s) join your next message", file=sys.stderr)
            elif line:
                turn, _ = encode_conversation(
                    tok, turns(add_image_marks(line, len(images))), [len(t) for t in images],
                    model.config.tokens_per_tile, continued=bool(ids))
                prompt = ids + turn
                answer = print_answer(model, tok, prompt, tiles + images, flags, cache)
                ids = prompt + answer + [tok.token_id("<|im_end|>")]
                tiles, images = tiles + images, []
        except ValueError as e:                    # InputError, or a lone quotation mark in shlex
            print(f"error: {e}", file=sys.stderr)  # the message is dropped, its images stay


# ---------------------------------------------------------------- a file of questions

class Questions(JsonlDataset):
    """The lines of --input. A sample has what collate needs, and its "question"."""

    def __init__(self, flags: Flags, tok: Tokenizer, config: MonoInternVLConfig,
                 load: Callable[[str], torch.Tensor]):
        super().__init__(flags.input, flags.image_root or Path(flags.input).parent, tok, config)
        self.load, self.left_out = load, 0
        self.line_numbers = self.locations[:, 0].tolist()
        model, names = Path(flags.model).resolve(), ("max_new_tokens", "temperature", "top_k", "top_p",
                                                     "repetition_penalty", "seed", "max_tiles", "dtype")
        written = (model / "config.json").stat().st_mtime_ns               # when the model was saved
        self.settings = [str(self.root), written, str(model), *(asdict(flags)[name] for name in names)]

    def key(self, i: int) -> int:
        """A checksum of question i and of the settings: of all that its answer depends on."""
        return zlib.crc32(self.read(i)[1] + repr(self.settings).encode())

    def make_sample(self, line: bytes, images: list | None, augment: None) -> dict:
        line, images = self.parse_line(line, images)
        conversation = line.get("conversations")
        if "question" in line:
            if not isinstance(line["question"], str):
                raise InputError(f"question is {line['question']!r:.60}, expected text")
            conversation = turns(add_image_marks(line["question"], len(images)))
        elif isinstance(conversation, list) and len(conversation) % 2 == 0:
            conversation = conversation[:-1]       # the last turn is the answer that we ask for
        elif conversation is None:
            raise InputError('it has neither "question" nor "conversations"')
        tiles = [self.load(image) for image in images]
        ids, labels = encode_conversation(self.tok, conversation, [len(t) for t in tiles],
                                          self.config.tokens_per_tile)
        if len(ids) >= self.max_tokens:
            raise InputError(f"{len(ids)} tokens fill the context of {self.max_tokens}")
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "id": line.get("id"),
                "pixel_values": torch.cat(tiles) if tiles else None, "question": conversation[-1]["value"]}

    def batches(self, todo: list[int], flags: Flags, bar: tqdm) -> Iterator[list[dict]]:
        """The questions `todo` in batches of similar length, made from 4 · batch_size questions at a time.
        Those that cannot be asked are left out, named on stderr, and counted in the bar."""
        size = flags.batch_size
        for start in range(0, len(todo), 4 * size):
            samples = []
            for i in todo[start:start + 4 * size]:
                try:
                    samples.append({**self[i], "index": i})
                except InputError as e:
                    self.left_out += 1
                    bar.update()
                    tqdm.write(f"left out: {e}", file=sys.stderr)
            samples.sort(key=lambda sample: len(sample["input_ids"]))
            # A batch ends when its longest row fills the context. Questions that may do so are asked alone.
            room = self.max_tokens - flags.max_new_tokens
            short = [sample for sample in samples if len(sample["input_ids"]) <= room]
            yield from (short[i:i + size] for i in range(0, len(short), size))
            yield from ([sample] for sample in samples[len(short):])


def answer_batch(model: MonoInternVL, tok: Tokenizer, samples: list[dict], flags: Flags,
                 cache: KVCache) -> list[list[int]]:
    """The tokens of each answer, without the one that ends it."""
    batch = collate(samples, tok.pad_id, left=True)
    del batch["labels"]
    device, options = next(model.parameters()).device, generate_options(tok, flags)
    batch = {name: None if t is None else t.to(device) for name, t in batch.items()}
    if flags.seed is not None:                     # a seed for each row: as if each were asked alone
        options["seed"] = [flags.seed] * len(samples)
    with explain_out_of_memory(f"lower --batch_size, {LESS_MEMORY}"):
        rows = torch.stack(list(model.generate(**batch, **options, kv_cache=cache)), 1).tolist()
    ends = options["eos_token_id"]
    return [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]


def read_answers(questions: Questions, output: Path) -> dict[int, bytes]:
    """{line number: record}, what an earlier run of the same command wrote to --output. Raises InputError if
    the file holds anything else, but for half a record at the end: a killed run may leave one."""
    if not output.exists():
        return {}
    try:
        *records, rest = output.read_bytes().split(b"\n")
    except OSError as e:
        raise InputError(f"{output} is not readable: {e.strerror}") from None
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


def write_answers(output: Path, answers: dict[int, bytes]):
    """Writes the records in the order of their lines. A new file replaces the old one when it is complete."""
    temporary = output.with_name(output.name + ".tmp")
    try:
        temporary.write_bytes(b"".join(answers[number] + b"\n" for number in sorted(answers)))
        os.replace(temporary, output)
    except OSError as e:
        raise InputError(f"{output} cannot be written: {e.strerror}") from None


def answer_file(model: MonoInternVL, tok: Tokenizer, load: Callable[[str], torch.Tensor], flags: Flags):
    """Answers --input. Each batch of answers is appended to --output as soon as it is there, and the file is
    sorted at the end. A run that is stopped loses one batch at most, and the same command continues it."""
    questions, output = Questions(flags, tok, model.config, load), Path(flags.output)
    answers, cache = read_answers(questions, output), KVCache(model.config)
    write_answers(output, answers)
    todo = [i for i, number in enumerate(questions.line_numbers) if number not in answers]
    bar = tqdm(total=len(questions), initial=len(answers), unit="question")
    started, tokens = time.perf_counter(), 0
    try:
        with open(output, "ab") as file:
            for batch in questions.batches(todo, flags, bar):
                for sample, ids in zip(batch, answer_batch(model, tok, batch, flags, cache), strict=True):
                    number = questions.line_numbers[sample["index"]]
                    answers[number] = json.dumps(
                        {"line": number, "id": sample["id"], "question": sample["question"],
                         "answer": tok.decode(ids, skip_special_tokens=False),
                         "key": questions.key(sample["index"])}, ensure_ascii=False).encode()
                    file.write(answers[number] + b"\n")
                    tokens += len(ids)
                file.flush()
                bar.update(len(batch))
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.1f} tokens/s")
    finally:
        bar.close()
        write_answers(output, answers)
        print(f"{output}: {len(answers)} of {len(questions)} questions answered, {questions.left_out} left "
              "out", file=sys.stderr)
    if flags.stats:
        print(f"{tokens / (time.perf_counter() - started):.1f} tokens/s; "
              f"{memory_report(next(model.parameters()).device)}", file=sys.stderr)


# ---------------------------------------------------------------- main

def run(flags: Flags):
    if flags.model is None:
        flags.model = newest_checkpoint()
        print(f"model: {flags.model}, the newest below out/", file=sys.stderr)
    folder = Path(flags.model)
    config, tok = MonoInternVLConfig.from_json(folder / "config.json"), Tokenizer(folder)
    max_tiles = config.max_dynamic_patch if flags.max_tiles is None else flags.max_tiles
    if (flags.input is None) != (flags.output is None) or flags.input and (flags.image or flags.prompt):
        raise InputError("--input and --output go together, without --image and --prompt")
    if flags.batch_size < 1:
        raise InputError(f"--batch_size is {flags.batch_size}, expected at least 1")
    if max_tiles < 1:
        raise InputError(f"--max_tiles is {max_tiles}, expected at least 1")
    load = partial(load_image, max_tiles=max_tiles, image_size=config.image_size,
                   use_thumbnail=config.use_thumbnail, min_tiles=min(max_tiles, config.min_dynamic_patch))
    images = [load(path) for path in flags.image]  # before the weights: a wrong name shows at once
    model = load_model(folder, tok, flags)
    if flags.input is not None:
        answer_file(model, tok, load, flags)
    elif flags.prompt is None:
        chat(model, tok, images, load, flags)
    else:
        ids, _ = encode_conversation(tok, turns(add_image_marks(flags.prompt, len(images))),
                                     [len(t) for t in images], config.tokens_per_tile)
        print_answer(model, tok, ids, images, flags, KVCache(config))


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(Flags, argv, __doc__.split("\n")[0])
    try:
        run(flags)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                        # the program that read our stdout has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")       # also where a pipe's default is another encoding
    sys.stdin.reconfigure(errors="replace")
    sys.exit(main())
