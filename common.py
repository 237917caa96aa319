"""What all files share: the error for users, JSON files, command-line flags, and the processes of a run."""
import argparse
import difflib
import json
import os
import sys
import typing
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import MISSING, field, fields
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

LFS_POINTER = b"version https://git-lfs"           # Git LFS puts a file that begins so in place of another


class InputError(ValueError):
    """A file, flag or tensor that a user gave does not fit. Scripts print the message, which says what to do.
    It is one line of valid Unicode, even if a file name or a text that it quotes is not."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()).encode(errors="backslashreplace").decode())


def readable(name: str | Path) -> str:
    """A name or an id as messages show it: escaped where it is no valid Unicode, and not too long."""
    name = str(name).encode(errors="backslashreplace").decode()
    return name if len(name) <= 200 else f"{name[:130]}...{name[-67:]}"


def unreadable(file: str | Path, error: str) -> InputError:
    """What to raise for a file that is not what it should be. Git LFS may not have fetched it."""
    with suppress(OSError, ValueError), open(file, "rb") as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            error = "is a Git LFS pointer, not the file itself: run `git lfs pull`"
    return InputError(f"{readable(file)} {error}")


def table(lines: list[dict]) -> str:
    """Markdown. Each line maps the titles of the columns to what stands there."""
    rows = [lines[0], ["---"] * len(lines[0]), *(line.values() for line in lines)]
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def read_json(path: str | Path, if_missing: str = "") -> dict:
    """The JSON object in a file. Raises InputError for all else; if_missing: added if there is no file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))   # Windows editors add a BOM
    except FileNotFoundError:
        raise InputError(f"{path} does not exist{if_missing}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise unreadable(path, f"is not readable JSON: {e}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a JSON {type(content).__name__}, expected an object of named fields")
    return content


def check_fields(config) -> None:
    """Raises InputError if a field of a dataclass does not have its declared type. Types must be exact: True
    is no int. Only an int in place of a float is accepted, and converted."""
    for name, kind in typing.get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), typing.get_args(kind) or (kind,)
        if kind is float and type(value) is int and abs(value) < sys.float_info.max:
            setattr(config, name, value := float(value))
        if type(value) not in kinds:
            raise InputError(f"config field {name} is {value!r} ({type(value).__name__}), "
                             f"expected {' or '.join(k.__name__ for k in kinds)}")


# ---------------------------------------------------------------- command-line flags

def flag(default, help: str, **options):
    """A field of a flags dataclass with its line in --help, and argparse's options, such as choices=[...]."""
    return field(default_factory=lambda: copy(default), metadata={"help": help, **options})


def parse_flags(flags: type, argv: Sequence[str] | None = None, description: str | None = None):
    """Fills a dataclass from the command line. Each field is a flag: `steps: int` takes --steps 200 or
    --steps=200, `compile: bool` --compile or --no-compile, `image: list[str]` one or more values, also when
    it is repeated. An unknown flag exits with 2 and suggests the nearest name."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    hints = typing.get_type_hints(flags)
    for f in fields(flags):
        options = {**f.metadata, "help": f.metadata.get("help", f.name).replace("%", "%%"),
                   "default": f.default if f.default_factory is MISSING else f.default_factory(),
                   "required": f.default is f.default_factory is MISSING}
        kind = hints[f.name]
        if bool in (kind, *typing.get_args(kind)):                         # bool, or bool | None
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is list:
            options |= {"type": typing.get_args(kind)[0], "nargs": "+", "action": "extend"}
            options["help"] += f" (default: {options['default']})"
            options["default"] = argparse.SUPPRESS  # else it would be extended; the dataclass fills it in
        else:                                                              # int, or int | None
            options["type"] = next((t for t in typing.get_args(kind) if t is not type(None)), kind)
        parser.add_argument("--" + f.name.rstrip("_"), dest=f.name, **options)   # as_ is --as
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        near = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), hints, 1)
        parser.error(f"unknown argument {name}" + (f"; did you mean --{near[0]}?" if near else ""))
    return flags(**vars(values))


# ---------------------------------------------------------------- the processes of a run

def auto_device() -> str:
    """What --device auto means: cuda, else mps (the GPU of a Mac), else cpu."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def rank() -> int:
    """The number of this process. torchrun starts one process per GPU and numbers them in the environment."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def sum_over_processes(*values: float) -> list[float]:
    """Adds up each value over all processes, which wait for each other here. The sums are made on CPUs, so no
    GPU has to finish its work first."""
    total = torch.tensor(values, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def stop_together(problem: str | None) -> None:
    """Raises InputError on every process if one of them has a problem. Else the others would wait for it."""
    if sum_over_processes(problem is not None)[0]:
        raise InputError(problem or "another process stopped, its message says why")


def wait_for_all():
    """Returns once every process has called this."""
    sum_over_processes(0)


def say(*text):
    """Prints on the first process only."""
    if not rank():
        print(*text, flush=True)


def full_tensor(t: Tensor) -> Tensor:
    """The whole of a tensor that FSDP spread over the processes (a DTensor). All must call this together."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t
