"""Ask a Mono-InternVL checkpoint about pictures: one question, or a chat at the terminal.

    python sample.py --image digit.png --prompt "What do you see?"
    python sample.py --model FOLDER --image a.jpg b.jpg        # a chat about two pictures

FOLDER is an official checkpoint or one of train_evip.py's. In this file: the flags, the checkpoint, one
answer, the chat, main. Answers go to stdout, everything else to stderr.
"""
import contextlib
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data import TextStream, Tokenizer, encode_conversation, flag, load_image, parse_flags
from mono_internvl import InputError, MonoInternVL, MonoInternVLConfig

GREETING = """/image FILE [FILE ...] adds images to your next message, /clear starts over.
Ctrl-C stops an answer; /exit, Ctrl-D or Ctrl-C at the prompt ends the chat."""


@dataclass
class Flags:
    model: str | None = flag(None, "checkpoint folder (None: the newest below out/)")
    image: list[str] = flag([], "files for the question, or for the first message of the chat")
    prompt: str | None = flag(None, "the question; it may place the images with <image> marks (None: chat)")
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


def newest_checkpoint() -> Path:
    """train_evip.py writes out/RUN/STAGE/, config.json last."""
    found = sorted(Path("out").glob("*/*/config.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError("there is no checkpoint below out/: run `python train_evip.py` first, "
                         "or name a folder with --model")
    print(f"model: {found[-1].parent}, the newest below out/", file=sys.stderr)
    return found[-1].parent


def load_model(folder: Path, tok: Tokenizer, flags: Flags) -> MonoInternVL:
    name = flags.device if flags.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(1, device=name).device
    except (RuntimeError, AssertionError):         # an unknown name, or a build of torch without this device
        raise InputError(f"--device {name}: torch has no such device on this machine") from None
    dtype = flags.dtype if flags.dtype != "auto" else "float32" if device.type == "cpu" else "bfloat16"
    model = MonoInternVL.from_pretrained(folder, getattr(torch, dtype), device).eval()
    if len(tok) > model.config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has {len(tok)} tokens, "
                         f"the model {model.config.vocab_size}")
    model.config.img_context_token_id = tok.special_tokens.get("<IMG_CONTEXT>")  # not in official files
    model.moe = flags.moe
    return model


def with_marks(prompt: str, images: int) -> str:
    """Puts <image> marks in front of a prompt that has none, numbered if they are several [repo: README]."""
    if "<image>" in prompt or not images:
        return prompt
    if images == 1:
        return f"<image>\n{prompt}"
    return "".join(f"Image-{i + 1}: <image>\n" for i in range(images)) + prompt


def respond(model: MonoInternVL, tok: Tokenizer, conversation: list[dict], tiles: list[torch.Tensor],
            flags: Flags) -> str:
    """Prints the answer to the last turn as it is generated, and returns it. Ctrl-C stops it."""
    input_ids, _ = encode_conversation(tok, conversation, [len(t) for t in tiles],
                                       model.config.tokens_per_tile)
    device = next(model.parameters()).device
    tokens = model.generate(
        torch.tensor([input_ids], device=device), torch.cat(tiles).to(device) if tiles else None,
        max_new_tokens=flags.max_new_tokens, temperature=flags.temperature, top_k=flags.top_k,
        top_p=flags.top_p, repetition_penalty=flags.repetition_penalty,
        eos_token_id=(tok.token_id("<|im_end|>"), tok.eos_id), seed=flags.seed)
    stream, pieces = TextStream(tok), []
    with contextlib.suppress(KeyboardInterrupt):
        for token in tokens:
            pieces.append(stream.push(token))
            print(pieces[-1], end="", flush=True)
    pieces.append(stream.flush())
    print(pieces[-1], flush=True)
    return "".join(pieces)


def chat(model: MonoInternVL, tok: Tokenizer, images: list[torch.Tensor], load, flags: Flags):
    """Reads messages until the end of input. images, (n_tiles, 3, S, S) each, join the next message. For each
    answer the model reads the whole conversation: no cache is kept between turns."""
    print(GREETING, file=sys.stderr)
    conversation, tiles = [], []
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
                conversation, tiles, images = [], [], []
            elif command == "/image":
                images = images + [load(path) for path in shlex.split(rest)]
                print(f"{len(images)} image(s) join your next message", file=sys.stderr)
            elif line:
                asked = conversation + [{"from": "human", "value": with_marks(line, len(images))}]
                answer = respond(model, tok, asked, tiles + images, flags)
                conversation = asked + [{"from": "gpt", "value": answer}]
                tiles, images = tiles + images, []
        except ValueError as e:                    # InputError, or shlex: a lone quotation mark
            print(f"error: {e}", file=sys.stderr)  # the message is dropped, its images stay


def main(argv: list[str] | None = None) -> int:
    flags = parse_flags(Flags, argv, __doc__.split("\n")[0])
    try:
        folder = Path(flags.model) if flags.model else newest_checkpoint()
        config, tok = MonoInternVLConfig.from_json(folder / "config.json"), Tokenizer(folder)
        max_tiles = config.max_dynamic_patch if flags.max_tiles is None else flags.max_tiles

        def load(path: str) -> torch.Tensor:
            return load_image(path, max_tiles, config.image_size, config.use_thumbnail,
                              min(max_tiles, config.min_dynamic_patch))

        images = [load(path) for path in flags.image]       # before the weights: a wrong name shows at once
        model = load_model(folder, tok, flags)
        if flags.prompt is None:
            chat(model, tok, images, load, flags)
        else:
            prompt = with_marks(flags.prompt, len(images))
            respond(model, tok, [{"from": "human", "value": prompt}], images, flags)
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
