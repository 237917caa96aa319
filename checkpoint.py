"""Files: the official checkpoint format in and out, language models in, and the state of an interrupted
training.

In this order: configs as JSON; tensors in safetensors files; the language models that a model may start from
(InternLM2 and Llama layout); a model with its tokenizer; the state of a training run. Everything here takes
tensors and plain values. Files are written under another name and then renamed, so a file with its final name
is complete. Nothing is ever unpickled.
"""
import contextlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

try:
    import fcntl
except ImportError:                                # Windows has none: two runs in one folder go unnoticed
    fcntl = None

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import common
from common import InputError, rank, read_json, say, wait_for_all, world_size

# ---------------------------------------------------------------- configs

# The official config.json nests these fields: our name -> its path in the file. All others lie at the top.
CONFIG_PATHS = {"vision_hidden_size": ("vision_config", "hidden_size")}
CONFIG_PATHS |= {name: ("vision_config", name) for name in ("num_channels", "patch_size", "image_size")}
CONFIG_PATHS |= {name: ("llm_config", name) for name in """vocab_size hidden_size intermediate_size
    num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps rope_theta rope_scaling
    max_position_embeddings bos_token_id eos_token_id pad_token_id attn_experts""".split()}


def _check_supported(llm: dict, path):
    """Refuses a language model that needs what the architecture here leaves out."""
    for name, supported in (("hidden_act", "silu"), ("bias", False), ("attention_bias", False),
                            ("mlp_bias", False), ("tie_word_embeddings", False)):
        if llm.get(name, supported) != supported:
            raise InputError(f"{path}: the LLM's {name} is {llm[name]!r}, supported is {supported!r}")


def _make_config(cls: type, values: dict, path):
    try:
        return cls(**values)
    except InputError as e:
        raise InputError(f"{path}: {e}") from None


def read_config(path: str | Path, cls: type):
    """An official (or our) config.json -> cls, the config's dataclass. Raises InputError naming a field."""
    official, values = read_json(path, "; expected a checkpoint folder that holds it"), {}
    for f in fields(cls):
        node = official
        for key in CONFIG_PATHS.get(f.name, (f.name,)):
            node = node.get(key, ...) if isinstance(node, dict) else ...   # ... stands for a missing field
        if node is not ...:
            values[f.name] = node
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "vision_hidden_size"):
        if name not in values:
            field = ".".join(CONFIG_PATHS[name])
            raise InputError(f"{path}: no field {field}; is this a Mono-InternVL folder?")
    _check_supported(official["llm_config"], path)
    config = _make_config(cls, values, path)
    for name, supported in (("ps_version", "v2"), ("force_image_size", config.image_size)):
        if official.get(name) not in (None, supported):
            raise InputError(f"{path}: {name} = {official[name]!r}, supported is {supported!r}")
    return config


def read_llm_config(path: str | Path, cls: type, **changes):
    """An InternLM2 or Llama-layout config.json -> cls with the LLM's sizes. changes: other fields."""
    llm = read_json(path, "; expected an LLM folder that holds it")
    if llm.get("model_type") not in ("internlm2", "llama"):
        raise InputError(f"{path}: model_type {llm.get('model_type')!r} is not 'internlm2' or 'llama'")
    # The embedding of a Llama may be its head as well. Here it becomes two tensors.
    _check_supported({**llm, "tie_word_embeddings": False} if llm["model_type"] == "llama" else llm, path)
    llm["num_key_value_heads"] = llm.get("num_key_value_heads") or llm.get("num_attention_heads")
    # Newer files hold rope_theta and the scaling together in rope_parameters.
    rope = llm.get("rope_parameters") or llm.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{path}: rope_parameters or rope_scaling is {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    llm["rope_scaling"] = None if kind == "default" else {"type": kind, "factor": rope.get("factor")}
    theta = rope.get("rope_theta", llm.get("rope_theta"))
    llm["rope_theta"] = 10000.0 if theta is None else theta
    values = {f.name: llm[f.name] for f in fields(cls) if llm.get(f.name) is not None}
    config = _make_config(cls, values | changes, path)
    if llm.get("head_dim") not in (None, config.head_dim):
        raise InputError(f"{path}: head_dim is {llm['head_dim']}, supported is hidden_size / "
                         f"num_attention_heads = {config.head_dim}")
    return config


def config_json(values: dict) -> str:
    """The fields of a MonoInternVLConfig as the text of an official config.json."""
    official = {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat",
                "template": "internlm2-chat", "ps_version": "v2", "select_layer": -1,
                "dynamic_image_size": True, "force_image_size": values["image_size"],
                "llm_config": {"architectures": ["InternLM2VEForCausalLM"], "model_type": "internlm2",
                               "bias": False, "hidden_act": "silu", "tie_word_embeddings": False},
                "vision_config": {"model_type": "intern_vit_patch"}}
    for name, value in values.items():
        path = CONFIG_PATHS.get(name, (name,))
        (official if len(path) == 1 else official[path[0]])[path[-1]] = value
    return json.dumps(official, indent=2)


def read_img_context_token_id(folder: str | Path) -> int | None:
    """From added_tokens.json or, where that is missing, from tokenizer_config.json; None without either."""
    folder = Path(folder)
    if (folder / "added_tokens.json").exists():
        return read_json(folder / "added_tokens.json").get("<IMG_CONTEXT>")
    if (folder / "tokenizer_config.json").exists():
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder")
        for i, token in decoder.items() if isinstance(decoder, dict) else ():
            if isinstance(token, dict) and token.get("content") == "<IMG_CONTEXT>" and i.isdecimal():
                return int(i)
    return None


# ---------------------------------------------------------------- tensors

def read_tensors(folder: str | Path, dtype: torch.dtype | None, device) -> dict[str, Tensor]:
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists. dtype None:
    as the files have it."""
    folder, files = Path(folder), ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or any(Path(str(f)).name != f for f in weight_map.values()):
            raise InputError(f"{index}: no weight_map of tensor names to file names")
        files = sorted(set(weight_map.values()))
    tensors = {}
    for file in files:
        try:
            with safe_open(folder / file, "pt", device=str(device)) as f:
                for name in f.keys():
                    tensors[name] = f.get_tensor(name)
                    if dtype is not None:
                        tensors[name] = tensors[name].to(dtype)
        except FileNotFoundError:
            raise InputError(f"{folder / file} does not exist; expected model.safetensors or "
                             "all shards of its index") from None
        except (SafetensorError, OSError) as e:
            raise common.unreadable(folder / file, f"is damaged or cut short: {e}") from None
    return tensors


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, torch.Size], source) -> None:
    """Raises InputError that names the first tensor which is missing, surplus or of another shape."""
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise InputError(f"{source}: tensor {name} is missing")
        if name not in expected:
            raise InputError(f"{source}: tensor {name} has no place in the model of this config")
        if tensors[name].shape != expected[name]:
            raise InputError(f"{source}: tensor {name} is {tuple(tensors[name].shape)}, "
                             f"the config says {tuple(expected[name])}")
        if not tensors[name].is_floating_point():
            raise InputError(f"{source}: tensor {name} is {tensors[name].dtype}, expected floating point")


def write_model(folder: str | Path, tensors: dict[str, Tensor], config: dict,
                max_shard_bytes: int = 5_000_000_000) -> None:
    """Writes config.json and model.safetensors; a larger model as numbered shards with an index. config: the
    fields of a MonoInternVLConfig.

    All files are written aside, then renamed: a save that fails leaves an earlier checkpoint as it was.
    config.json is renamed last, so a folder that has one is complete.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, t in tensors.items():
        if shards[-1] and size + t.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = t.contiguous()
        size += t.nbytes
    n = len(shards)
    files = {f"model-{i:05}-of-{n:05}.safetensors" if n > 1 else "model.safetensors": shard
             for i, shard in enumerate(shards, 1)}
    if n > 1:
        index = {"metadata": {"total_size": sum(t.nbytes for s in shards for t in s.values())},
                 "weight_map": {key: name for name, shard in files.items() for key in shard}}
        files["model.safetensors.index.json"] = json.dumps(index, indent=2)
    files["config.json"] = config_json(config)
    aside = {name: folder / f"{name}.tmp" for name in files}
    try:
        for name, content in files.items():
            if isinstance(content, str):
                aside[name].write_text(content, encoding="utf-8")
            else:
                save_file(content, aside[name], metadata={"format": "pt"})
        for name in files:
            os.replace(aside[name], folder / name)
    finally:
        for path in aside.values():
            path.unlink(missing_ok=True)
    for stale in (folder / "model.safetensors", folder / "model.safetensors.index.json",
                  *folder.glob("model-?????-of-?????.safetensors")):       # of a save with other shards
        if stale.name not in files:
            stale.unlink(missing_ok=True)


# ---------------------------------------------------------------- language models to start from

LLAMA_NAMES = {"model.embed_tokens": "model.tok_embeddings", "lm_head": "output",
               "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
               "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
               "mlp.up_proj": "feed_forward.w3", "mlp.down_proj": "feed_forward.w2"}


def _from_llama(tensors: dict[str, Tensor], c, folder) -> dict[str, Tensor]:
    """A Llama's tensors under InternLM2's names; q, k and v become the rows (kv_head, [q × group, k, v],
    head_dim) of wqkv. Both models rotate halves of a head, so nothing else changes."""
    if "lm_head.weight" not in tensors:            # tied: the embedding is the head
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    heads = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
    for i in range(c.num_hidden_layers):
        names = [f"model.layers.{i}.self_attn.{part}_proj.weight" for part in "qkv"]
        parts = [tensors.pop(name, None) for name in names]
        if any(p is None or p.shape != (n * c.head_dim, c.hidden_size)
               for p, n in zip(parts, heads, strict=True)):
            raise InputError(f"{folder}: {names[0]} or its k_proj, v_proj is missing or of another size")
        parts = [p.unflatten(0, (c.num_key_value_heads, -1, c.head_dim)) for p in parts]
        tensors[f"model.layers.{i}.attention.wqkv.weight"] = torch.cat(parts, 1).flatten(0, 2)
    for theirs, ours in LLAMA_NAMES.items():
        tensors = {name.replace(theirs, ours): t for name, t in tensors.items()}
    return {name: t for name, t in tensors.items() if not name.endswith("rotary_emb.inv_freq")}    # old files


def read_llm_tensors(folder: str | Path, c, vocab_size: int, dtype: torch.dtype | None, device,
                     num_tokens: int | None = None) -> dict[str, Tensor]:
    """The tensors of an InternLM2 or Llama-layout folder under their names in MonoInternVL. c: the config of
    the model to be. vocab_size: of the LLM. num_tokens: of its tokenizer, if the vocabulary is padded with
    rows that mean nothing. The rows of new tokens start as the mean of the real ones [repo]."""
    tensors = read_tensors(folder, dtype, device)
    if "model.embed_tokens.weight" in tensors:
        tensors = _from_llama(tensors, c, folder)
    tensors = {f"language_model.{name}": t for name, t in tensors.items()}
    for name in ("language_model.model.tok_embeddings.weight", "language_model.output.weight"):
        old = tensors.get(name)
        real = min(vocab_size, num_tokens or vocab_size)
        if old is not None and old.ndim and len(old) == vocab_size <= c.vocab_size and real < c.vocab_size:
            mean = old[:real].float().mean(0, keepdim=True).to(old.dtype)
            tensors[name] = torch.cat([old[:real], mean.expand(c.vocab_size - real, -1)])
    return tensors


# ---------------------------------------------------------------- a model with its tokenizer

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "added_tokens.json", "tokenizer_config.json",
                   "special_tokens_map.json")
IMAGE_TOKENS = ("<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>",
                "<ref>", "</ref>", "<box>", "</box>")


def copy_tokenizer(folder: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (folder / name).exists() and folder != to:
            shutil.copy(folder / name, to / name)


def add_tokens(folder: Path, to: Path, tokens: list[str], first_id: int) -> None:
    """Copies the tokenizer's files to another folder and gives it more tokens, with ids from first_id on. All
    processes call this, the first one writes."""
    if not rank():
        copy_tokenizer(folder, to)
        path = to / "added_tokens.json"
        added = read_json(path) if path.exists() else {}
        added |= {token: first_id + i for i, token in enumerate(tokens)}
        path.write_text(json.dumps(added, indent=2))
    say(f"{folder}: its tokenizer gets {', '.join(tokens)}, ids from {first_id} on; their embeddings "
        "start at the mean of the others")
    wait_for_all()


def save_with_tokenizer(folder: Path, tensors: dict[str, Tensor], config: dict, tokenizer: Path) -> None:
    """Writes a model that may be spread over the processes, and its tokenizer. All processes call this. One
    tensor after the other goes to the memory of the first process, which writes."""
    complete = {}
    for name, t in tensors.items():
        t = common.full_tensor(t.detach())
        if not rank():
            complete[name] = t.cpu()
    if not rank():
        copy_tokenizer(tokenizer, folder)
        write_model(folder, complete, config)


def newest_checkpoint() -> Path:
    """The newest OUT/STAGE folder of train_evip.py below out/. Raises InputError if there is none."""
    found = sorted(Path("out").glob("*/*/config.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise InputError("there is no checkpoint below out/: run `python train_evip.py` first, "
                         "or name a folder with --model")
    return found[-1].parent


# ---------------------------------------------------------------- the state of an interrupted training

def newest_partial(folder: Path) -> Path | None:
    """The newest checkpoint within a stage. folder: OUT/STAGE.partial, which holds step-0000500 and so on."""
    return max(folder.glob("step-*"), default=None)


def save_training(folder: Path, step: int, save_model: Callable[[Path], None], moments: dict[str, Tensor],
                  state: dict, keep: int) -> None:
    """Writes folder/step-NNNNNNN, and deletes all but the newest `keep`. All processes call this.

    save_model(path) writes the model in the official format. moments: AdamW's, of which each process writes
    its share as safetensors. state: what this process has to remember, as JSON; its random numbers are added.
    Raises InputError if the disk is full; earlier checkpoints stay complete.
    """
    aside, problem = folder / "unfinished", ""
    if not rank():
        shutil.rmtree(aside, ignore_errors=True)
    wait_for_all()
    try:
        writer = dcp.HuggingFaceStorageWriter(str(aside / "optimizer"), save_distributed=True)
        dcp.save(moments, no_dist=not dist.is_initialized(), storage_writer=writer)
        save_model(aside / "model")
        rng = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])]
        (aside / f"rank{rank()}.json").write_text(json.dumps({
            "step": step, "processes": world_size(), **state, "rng": [s.tolist() for s in rng]}))
    except dcp.CheckpointException as e:
        problem = "; ".join(f"process {i}: {error}" for i, (error, _) in e.failures.items())
    except (OSError, SafetensorError) as e:
        problem = str(e)
    if common.sum_over_processes(bool(problem))[0]:
        if not rank():
            shutil.rmtree(aside, ignore_errors=True)
        raise InputError(f"the checkpoint of step {step} cannot be written to {folder} "
                         f"({problem or 'another process says why'}); those already there are complete: make "
                         "room, then give the same command again")
    if not rank():
        os.replace(aside, folder / f"step-{step:07}")
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)
    wait_for_all()


def load_training(folder: Path, moments: dict[str, Tensor], batches, batch: int) -> int:
    """Restores the moments (in place), the random numbers and the place in the data. Returns how many steps
    were done. batches: a data.Batches. batch: samples per step. If there are more processes than before, the
    new ones take the random numbers of the first. Raises InputError if the checkpoint is damaged."""
    processes = read_json(folder / "rank0.json")["processes"]
    everyones = [read_json(folder / f"rank{i}.json") for i in range(processes)]
    state, problem = everyones[rank() if rank() < processes else 0], None
    try:
        dcp.load(moments, no_dist=not dist.is_initialized(),
                 storage_reader=dcp.HuggingFaceStorageReader(str(folder / "optimizer")))
    except dcp.CheckpointException as e:
        problem = "; ".join(f"process {i}: {error}" for i, (error, _) in e.failures.items())
        raise InputError(f"{folder / 'optimizer'} is damaged or incomplete ({problem})") from None
    setters = [torch.set_rng_state] + [torch.cuda.set_rng_state] * torch.cuda.is_available()
    for set_state, values in zip(setters, state["rng"], strict=False):
        set_state(torch.tensor(values, dtype=torch.uint8))
    try:
        if processes == world_size():
            batches.load_state_dict(state["batches"])                      # reads samples, which may fail
        else:
            batches.take_over([one["batches"] for one in everyones])
    except InputError as e:
        problem = str(e)
    if state.get("batch", batch) != batch:         # older checkpoints do not say it
        problem = (f"a step of this run has {state['batch']} samples, and with {world_size()} process(es) it "
                   f"would have {batch}: change --grad_accum")
    common.stop_together(problem)
    return state["step"]


def read_run(out: Path, flags: dict, partials: list[Path], free_to_change: set[str]) -> dict:
    """out/run.json, the record of a run: its flags, and which stages are done. An interrupted run is
    continued, if all flags that are not free to change are the same. A run that has finished, or that has
    saved nothing yet, starts from the beginning, as does any run with --resume never."""
    new = {"flags": flags, "processes": world_size(), "interrupted": False, "finished": False, "done": [],
           "log": 0, "report": {}}
    run = read_json(out / "run.json") if (out / "run.json").exists() else new
    run["interrupted"] = not run["finished"] and bool(run["done"] or any(map(newest_partial, partials)))
    if not run["interrupted"] or flags["resume"] == "never":
        return new
    if run.get("processes", world_size()) != world_size():     # the samples of a step are compared later
        free_to_change = free_to_change | {"grad_accum"}
    for name, value in run["flags"].items():
        if name not in free_to_change and value != flags.get(name, value):
            raise InputError(f"{out} holds an interrupted run that had --{name} {value}, not {flags[name]}: "
                             "give the same flags to continue it, --resume never to start from the "
                             "beginning, or another --out")
    return run


@contextlib.contextmanager
def stop_signals():
    """Yields a list to which SIGTERM and Ctrl-C add, so that the caller can finish its step and save it. A
    second signal stops at once."""
    received = []

    def on_signal(number, frame):
        if received:
            raise KeyboardInterrupt
        received.append(number)

    handlers = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def lock_run(out: Path):
    """Keeps other runs out of a folder. All processes call this. Raises InputError if one is there."""
    problem = None
    with contextlib.ExitStack() as until_the_end:
        if not rank() and fcntl is not None:
            out.mkdir(parents=True, exist_ok=True)
            file = until_the_end.enter_context(open(out / "run.lock", "w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)           # released with this process
            except OSError:
                problem = f"another run is writing to {out}: wait for its end, or name another --out"
        common.stop_together(problem)
        yield


def write_run(out: Path, run: dict) -> None:
    if not rank():
        (out / "run.json.tmp").write_text(json.dumps(run, indent=2))
        os.replace(out / "run.json.tmp", out / "run.json")
