"""Ask a Mono-InternVL checkpoint about pictures: one question, a chat, or a file of questions.

    python sample.py --image digit.png --prompt "What do you see?"
    python sample.py --model FOLDER --image a.jpg b.jpg        # a chat about two pictures
    python sample.py --input questions.jsonl --output answers.jsonl

FOLDER is an official checkpoint or one of train_evip.py's. A line of questions.jsonl is {"image": "a.jpg",
"question": "What is this?"} ("image": a list for several, left out for none), or in the official format of
training, whose last answer is then not shown. In this file: the flags, the checkpoint, one answer, the chat,
the file of questions, main. Answers go to stdout or --output, everything else to stderr.
"""
import contextlib
import json
import os
import shlex
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import newest_checkpoint
from common import InputError, flag, parse_flags
from data import JsonlDataset, TextStream, Tokenizer, collate, encode_conversation, load_image, turns
from generate import KVCache
from mono_internvl import MonoInternVL, MonoInternVLConfig

GREETING = """/image FILE [FILE ...] adds images to your next message, /clear starts over.
Ctrl-C stops an answer; /exit, Ctrl-D or Ctrl-C at the prompt ends the chat."""


@dataclass
class Flags:
    model: str | None = flag(None, "checkpoint folder (None: the newest below out/)")
    image: list[str] = flag([], "files for the question, or for the first message of the chat")
    prompt: str | None = flag(None, "the question; it may place the images with <image> marks (None: chat)")
    input: str | None = flag(None, "a JSONL file of questions; needs --output")
    output: str | None = flag(None, "JSONL file for the answers, in the order of the questions; it may be "
                              "that of a run which was interrupted: what is missing is added")
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


def load_model(folder: Path, tok: Tokenizer, flags: Flags) -> MonoInternVL:
    name = flags.device if flags.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError):         # an unknown name, or a build of torch without this device
        raise InputError(f"--device {name}: torch has no such device on this machine") from None
    dtype = flags.dtype if flags.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    with memory_errors_say("choose --dtype bfloat16"):
        model = MonoInternVL.from_pretrained(folder, getattr(torch, dtype), device).eval()
    if len(tok) > model.config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {len(tok)} tokens, "
                         f"the model {model.config.vocab_size}")
    model.moe, model.cuda_graphs, model.compile_decode = flags.moe, flags.cuda_graphs, flags.compile
    return model


@contextlib.contextmanager
def memory_errors_say(what_to_do: str):
    try:
        yield
    except (MemoryError, RuntimeError) as e:
        if not isinstance(e, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(e):
            raise
        raise InputError(f"out of memory; {what_to_do}") from None


LOWER = "lower --max_new_tokens, --max_tiles or --prefill_chunk, use fewer images, or choose --dtype bfloat16"


def options(tok: Tokenizer, flags: Flags) -> dict:
    """What generate takes besides the prompt."""
    names = "max_new_tokens temperature top_k top_p repetition_penalty seed prefill_chunk".split()
    return {"eos_token_id": (tok.token_id("<|im_end|>"), tok.eos_id)} | {n: getattr(flags, n) for n in names}


def with_marks(prompt: str, images: int) -> str:
    """Puts <image> marks in front of a prompt that has none, numbered if they are several [repo: README]."""
    if "<image>" in prompt or not images:
        return prompt
    if images == 1:
        return f"<image>\n{prompt}"
    return "".join(f"Image-{i + 1}: <image>\n" for i in range(images)) + prompt


def respond(model: MonoInternVL, tok: Tokenizer, input_ids: list[int], tiles: list[torch.Tensor],
            flags: Flags, cache: KVCache) -> list[int]:
    """Prints the answer to a prompt as it is generated, and returns its tokens. Ctrl-C stops it. The special
    token that ends it is left out; others, such as <ref> and <box>, belong to it."""
    device, how = model.language_model.output.weight.device, options(tok, flags)
    stream, answer, times = TextStream(tok, skip_special_tokens=False), [], [time.perf_counter()]
    with contextlib.suppress(KeyboardInterrupt), memory_errors_say(LOWER):
        for token in model.generate(
                torch.tensor([input_ids], device=device), torch.cat(tiles).to(device) if tiles else None,
                kv_cache=cache, **how):
            times.append(time.perf_counter())
            if int(token) in how["eos_token_id"]:
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
              f"{peak_memory(device)}", file=sys.stderr)
    return answer


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"peak GPU memory {torch.cuda.max_memory_allocated(device) / 1e6:.0f} MB"
    try:
        import resource  # not on Windows
    except ImportError:
        return "peak memory unknown"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss              # kilobytes; bytes on a Mac
    return f"peak memory {peak * (1 if sys.platform == 'darwin' else 1024) / 1e6:.0f} MB"


def chat(model: MonoInternVL, tok: Tokenizer, images: list[torch.Tensor], load, flags: Flags):
    """Reads messages until the end of input. images, (n_tiles, 3, S, S) each, join the next message. One
    cache serves all turns: of the conversation, as the model read and wrote it, only the rest is read."""
    print(GREETING, file=sys.stderr)
    cache, ids, tiles = KVCache(model.config), [], []
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
                    tok, turns(with_marks(line, len(images))), [len(t) for t in images],
                    model.config.tokens_per_tile, system="" if ids else None)
                asked = ids + turn[1:] if ids else turn        # <s> stands at the beginning only
                answer = respond(model, tok, asked, tiles + images, flags, cache)
                ids = asked + answer + [tok.token_id("<|im_end|>")]
                tiles, images = tiles + images, []
        except ValueError as e:                    # InputError, or shlex: a lone quotation mark
            print(f"error: {e}", file=sys.stderr)  # the message is dropped, its images stay


# ---------------------------------------------------------------- a file of questions

class Questions(JsonlDataset):
    """--input. A sample is what collate takes, "question", and "key": of the line and of all that an answer
    depends on: flags, the image folder, when the checkpoint was written. A line that cannot be asked raises
    InputError with its number."""

    def __init__(self, flags: Flags, tok: Tokenizer, model: MonoInternVL, load):
        self.load = load
        same = ("model", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed",
                "max_tiles", "dtype")
        super().__init__(flags.input, flags.image_root or Path(flags.input).parent, tok, model.config)
        written = (Path(flags.model) / "config.json").stat().st_mtime_ns       # trained anew, other answers
        self.settings = repr([str(self.root), written, *(asdict(flags)[name] for name in same)]).encode()

    def key(self, i: int) -> int:
        return zlib.crc32(self.read(*self.places[i].tolist())[1] + self.settings)

    def sample(self, line: bytes, images, augment) -> dict:
        line, images = self.parse(line, images)
        conversation = line.get("conversations")
        if "question" in line:
            if not isinstance(line["question"], str):
                raise InputError(f"question is {line['question']!r:.60}, expected text")
            conversation = turns(with_marks(line["question"], len(images)))
        elif isinstance(conversation, list) and len(conversation) % 2 == 0:
            conversation = conversation[:-1]       # its last turn is the answer that we are asked for
        elif conversation is None:
            raise InputError('it has neither "question" nor "conversations"')
        tiles = [self.load(image) for image in images]
        ids, labels = encode_conversation(self.tok, conversation, [len(t) for t in tiles],
                                          self.config.tokens_per_tile)
        if len(ids) >= self.max_tokens:
            raise InputError(f"{len(ids)} tokens fill the context of {self.max_tokens}")
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "id": line.get("id"),
                "pixel_values": torch.cat(tiles) if tiles else None, "question": conversation[-1]["value"]}


def answer_batch(model: MonoInternVL, tok: Tokenizer, samples: list[dict], flags: Flags,
                 cache: KVCache) -> list[list[int]]:
    """The tokens of each answer, those that end it left out."""
    batch = collate(samples, tok.pad_id, left=True)
    del batch["labels"]
    device = model.language_model.output.weight.device
    batch = {name: None if t is None else t.to(device) for name, t in batch.items()}
    how = options(tok, flags)
    how["seed"] = None if flags.seed is None else [flags.seed] * len(samples)  # as if each were asked alone
    with memory_errors_say(LOWER.replace("lower", "lower --batch_size,")):
        rows = torch.stack(list(model.generate(**batch, **how, kv_cache=cache)), 1).tolist()
    cut = [next((i for i, token in enumerate(row) if token in how["eos_token_id"]), len(row)) for row in rows]
    return [row[:n] for row, n in zip(rows, cut, strict=True)]


def finished(questions: Questions, output: Path) -> dict[int, bytes]:
    """{line number: record} of an earlier run; what a killed run wrote by halves does not count."""
    if not output.exists():
        return {}
    try:
        *lines, rest = output.read_bytes().split(b"\n")
    except OSError as e:
        raise InputError(f"{output} is not readable: {e.strerror}") from None
    if rest[:9] != b'{"line": '[:len(rest)]:       # what a record begins with, or the half of it
        raise InputError(f"{output} holds something else than answers; name another --output")
    row, done = {number: i for i, number in enumerate(questions.places[:, 0].tolist())}, {}
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            same = questions.key(row[record["line"]]) == record["key"]
        except (ValueError, KeyError, TypeError):
            same = False
        if not same:
            raise InputError(f"{output}:{number} answers another question, or the same with other flags; "
                             "move the file away, or name another --output")
        done[record["line"]] = line
    return done


def answer_file(model: MonoInternVL, tok: Tokenizer, load, flags: Flags):
    """Answers are appended as they come, batch by batch, and put in order at the end: a run that is stopped
    at any moment loses the batch at work, and the same command goes on."""
    questions, output = Questions(flags, tok, model, load), Path(flags.output)
    done, left_out, cache = finished(questions, output), 0, KVCache(model.config)
    write(output, done)
    todo = [i for i, number in enumerate(questions.places[:, 0].tolist()) if number not in done]
    bar = tqdm(total=len(questions), initial=len(done), unit="question")
    started, tokens = time.perf_counter(), 0
    try:
        with open(output, "ab") as file:
            for start in range(0, len(todo), 4 * flags.batch_size):        # like lengths go together
                samples = []
                for i in todo[start:start + 4 * flags.batch_size]:
                    try:
                        samples.append({**questions[i], "row": i})
                    except InputError as e:
                        left_out += 1
                        tqdm.write(f"left out: {e}", file=sys.stderr)
                bar.update(min(len(todo) - start, 4 * flags.batch_size) - len(samples))
                samples.sort(key=lambda sample: len(sample["input_ids"]))
                # A batch ends with the context of its longest row. Who may get that far is asked alone.
                room = model.config.context_length - flags.max_new_tokens
                long = [[s] for s in samples if len(s["input_ids"]) > room]
                samples = samples[:len(samples) - len(long)]
                for batch in [samples[first:first + flags.batch_size]
                              for first in range(0, len(samples), flags.batch_size)] + long:
                    for sample, ids in zip(batch, answer_batch(model, tok, batch, flags, cache), strict=True):
                        number, tokens = int(questions.places[sample["row"], 0]), tokens + len(ids)
                        done[number] = json.dumps({
                            "line": number, "id": sample["id"], "question": sample["question"],
                            "answer": tok.decode(ids, skip_special_tokens=False),
                            "key": questions.key(sample["row"])}, ensure_ascii=False).encode()
                        file.write(done[number] + b"\n")
                    file.flush()
                    bar.update(len(batch))
                    bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.1f} tokens/s")
    finally:
        bar.close()
        write(output, done)
        print(f"{output}: {len(done)} of {len(questions)} questions answered, {left_out} left out",
              file=sys.stderr)
    if flags.stats:
        print(f"{tokens / (time.perf_counter() - started):.1f} tokens/s; "
              f"{peak_memory(model.language_model.output.weight.device)}", file=sys.stderr)


def write(output: Path, done: dict[int, bytes]):
    """The records in the order of their lines; the file is replaced at once."""
    aside = output.with_name(output.name + ".tmp")
    try:
        aside.write_bytes(b"".join(done[number] + b"\n" for number in sorted(done)))
        os.replace(aside, output)
    except OSError as e:
        raise InputError(f"{output} cannot be written: {e.strerror}") from None


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(Flags, argv, __doc__.split("\n")[0])
    try:
        if flags.model is None:
            flags.model = newest_checkpoint()
            print(f"model: {flags.model}, the newest below out/", file=sys.stderr)
        folder = Path(flags.model)
        flags.model = str(folder.resolve())
        config, tok = MonoInternVLConfig.from_json(folder / "config.json"), Tokenizer(folder)
        max_tiles = config.max_dynamic_patch if flags.max_tiles is None else flags.max_tiles

        def load(path: str) -> torch.Tensor:
            return load_image(path, max_tiles, config.image_size, config.use_thumbnail,
                              min(max_tiles, config.min_dynamic_patch))

        if (flags.input is None) != (flags.output is None) or flags.input and (flags.image or flags.prompt):
            raise InputError("--input and --output go together, without --image and --prompt")
        if flags.batch_size < 1:
            raise InputError(f"--batch_size is {flags.batch_size}, expected at least 1")
        if max_tiles < 1:
            raise InputError(f"--max_tiles is {max_tiles}, expected at least 1")
        images = [load(path) for path in flags.image]       # before the weights: a wrong name shows at once
        model = load_model(folder, tok, flags)
        if flags.input is not None:
            answer_file(model, tok, load, flags)
        elif flags.prompt is None:
            chat(model, tok, images, load, flags)
        else:
            ids, _ = encode_conversation(tok, turns(with_marks(flags.prompt, len(images))),
                                         [len(t) for t in images], config.tokens_per_tile)
            respond(model, tok, ids, images, flags, KVCache(model.config))
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                        # whoever read our stdout has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")       # also where a pipe's default is another encoding
    sys.stdin.reconfigure(errors="replace")
    sys.exit(main())
