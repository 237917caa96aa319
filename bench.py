"""Every measured number of this project comes from here.

    python bench.py kernels        the routed feed-forward layer on each back end
    python bench.py infer          time to the first token and decoding rate of whole models
    python bench.py train          optimizer steps of the tiny model and of layers of full width
    python bench.py ablation       delta tuning against full fine-tuning, v1 and random experts
    python bench.py report         writes RESULTS.md from the measurements in assets/

The first four print each measurement as it comes and end with one line of JSON, which --json FILE keeps.
--markdown prints it as tables. Every back end is compared with the dense reference before it is timed.

In this order: measuring; the four commands, each followed by its tables and by what RESULTS.md says beside
them; the report; the flags.
"""
import argparse
import functools
import json
import math
import platform
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import budget
import train_evip
from common import InputError, read_json
from data import Tokenizer, collate, count_tokens, load_image
from evaluate import answer, text_probe
from generate import KVCache, decode
from mono_internvl import (
    FeedForward,
    MonoInternVL,
    MonoInternVLConfig,
    Routing,
    VisionEmbedding,
    mmoe_swiglu,
    pixel_shuffle,
)
from world import KINDS, World, make_picture, make_world_tokenizer

TEXT_TOKENS, TOKENS_PER_TILE = 64, 256             # of a measured prompt


# ---------------------------------------------------------------- measuring

def provenance(args) -> dict:
    """Where a result comes from. Every result begins with it."""
    if args.device == "cuda":
        hardware = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        cpuinfo = Path("/proc/cpuinfo")
        named = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
        hardware = f"{named[1] if named else platform.processor()}, {torch.get_num_threads()} threads"
    return {"bench": args.bench, "command": args.command, "hardware": hardware, "torch": torch.__version__,
            "device": args.device, "clock": "CPU time" if args.cpu_time else "wall time"}


def show(row: dict) -> dict:
    """Prints a measurement on one line and returns it."""
    print(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in row.items() if not isinstance(value, list)), flush=True)
    return row


def write_json(result: dict, path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(result) + "\n")


def replayed(run, device: str):
    """On a GPU: a function that replays the work of `run`, captured as a CUDA graph. On a CPU: `run`."""
    run()                                                                  # builds, allocates, warms up
    if device != "cuda":
        return run
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def times_in_ms(run, buffers: int, args) -> list[float]:
    """run(i) works on the i-th of several sets of tensors: caches must not hold what the next call needs. On
    a GPU events time ten replays in a row: the time of the device, without Python and without launches."""
    runs = [replayed(functools.partial(run, i), args.device) for i in range(buffers)]
    times, until = [], time.perf_counter() + args.seconds
    while len(times) < 5 or time.perf_counter() < until:
        if args.device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for i in range(10):
                runs[(len(times) + i) % buffers]()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 10)
        else:
            started = args.clock()
            runs[len(times) % buffers]()
            times.append((args.clock() - started) * 1e3)
    return times[len(times) // 10:]                                        # clock rates settle in the first


def interleaved(cases: dict, rounds: int, args, per: int = 1) -> dict[tuple, dict]:
    """Runs all cases in every round, so that whatever else the machine does affects all of them alike.
    Returns for each case its seconds, median and quartiles, divided by `per`."""
    times = {case: [] for case in cases}
    for _ in range(rounds):
        for case, run in cases.items():
            started = args.clock()
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[case].append((args.clock() - started) / per)
    for case, seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")   # within what was seen
        times[case] = {"seconds": median, "quartiles": [low, high], "runs": rounds}
    return times


def ceilings(dtype: torch.dtype, args) -> dict[str, float]:
    """What torch reaches here: a large matrix product, and a copy (bytes read plus bytes written)."""
    n, size = (8192, 2 ** 30) if args.device == "cuda" else (1024, 2 ** 27)
    a, b = (torch.randn(n, n, device=args.device).to(dtype) for _ in range(2))
    matmul = statistics.median(times_in_ms(lambda i: a @ b, 1, args))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=args.device) for _ in range(2))
    copy = statistics.median(times_in_ms(lambda i: target.copy_(source), 1, args))
    return {"matmul_tflops": 2 * n ** 3 / matmul / 1e9, "copy_gb_s": 2 * size / copy / 1e6}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def table(rows, columns: dict) -> str:
    """Markdown. columns: title -> what stands there, a key of the row or a function of it."""
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(cell(row) if callable(cell) else row[cell]) for cell in columns.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def made_by(result: dict) -> str:
    return f"`{result['command']}` on {result['hardware']}, torch {result['torch']}, {result['clock']}"


# ---------------------------------------------------------------- kernels

TILE_CONFIGS = {"small": 1, "medium": 2, "large": 3}                       # moe_kernel.cu's enum TileConfig


class FeedForwardCase:
    """The routed feed-forward of one layer on one prompt: visual tokens between 64 text tokens. There are
    several sets of weights and inputs (see times_in_ms) and one routing, as for the layers of a model."""

    def __init__(self, tokens: int, config: MonoInternVLConfig, dtype, device: str, buffers: int):
        self.visual = torch.zeros(1, tokens, dtype=torch.bool, device=device)
        self.visual[:, TEXT_TOKENS // 2:tokens - TEXT_TOKENS // 2] = tokens > TEXT_TOKENS
        with torch.device(device):
            self.experts = [[FeedForward(config).requires_grad_(False).to(dtype) for _ in ("text", "visual")]
                            for _ in range(buffers)]
            self.x = [torch.randn(1, tokens, config.hidden_size).to(dtype) for _ in range(buffers)]
        self.sorted = [self.by_expert(x) for x in self.x]
        used = 1 + bool(self.visual.any())
        weights = 3 * config.hidden_size * config.intermediate_size        # of an expert
        self.flop = 2 * weights * tokens                                   # useful: one expert per token
        self.bytes = (used * weights + 2 * tokens * config.hidden_size) * dtype.itemsize

    def by_expert(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [x[~self.visual], x[self.visual]]

    def run(self, back_end: str):
        """A function that runs the layer on set number i."""
        if back_end == "two cuBLAS calls":                                 # sorted beforehand: nothing moves
            return lambda i: [expert(x) for expert, x in zip(self.experts[i], self.sorted[i], strict=True)
                              if len(x)]
        name, _, size = back_end.partition(" ")                            # "cuda small": that tile only
        routing = Routing(self.visual, backend=name)
        if not size:
            return lambda i: mmoe_swiglu(self.x[i], *self.experts[i], routing)
        ops, order = torch.ops.mono_internvl, (routing.permutation, routing.counts, TILE_CONFIGS[size])

        def with_one_tile(i):
            (t1, t3, t2), (v1, v3, v2) = ((e.w1.weight, e.w3.weight, e.w2.weight) for e in self.experts[i])
            h = ops.moe_swiglu(self.x[i][0], t1, t3, v1, v3, *order)
            return ops.moe_linear(h, t2, v2, *order[:2], None, False, True, order[2])[None]
        return with_one_tile

    def check(self, back_end: str) -> None:
        y, expected = self.run(back_end)(0), self.run("dense")(0)
        if isinstance(y, list):
            y, expected = torch.cat(y), torch.cat(self.by_expert(expected))
        error = relative_error(y, expected)
        if not error < 4 * torch.finfo(y.dtype).eps + 1e-5:                # roundings to dtype; float32 sums
            raise SystemExit(f"{back_end} is wrong at {self.visual.numel()} tokens: error {error:.1e}")


def peak_memory_mb(run) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(0)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@torch.inference_mode()
def kernels(args) -> dict:
    on_gpu, buffers = args.device == "cuda", 3
    back_ends = ["dense", "torch", "cuda"] + ["two cuBLAS calls"] * on_gpu
    back_ends += [f"cuda {size}" for size in TILE_CONFIGS] * args.kernel_tiles
    config = MonoInternVLConfig(hidden_size=args.hidden_size, intermediate_size=args.intermediate_size)
    result = provenance(args) | {"hidden_size": args.hidden_size, "ceilings": {}, "rows": [],
                                 "intermediate_size": args.intermediate_size}
    for dtype in [torch.bfloat16] if on_gpu else [torch.float32, torch.bfloat16]:
        name = str(dtype).removeprefix("torch.")
        result["ceilings"][name] = ceilings(dtype, args)
        for tokens in (TEXT_TOKENS + TOKENS_PER_TILE * tiles for tiles in args.image_tiles):
            case = FeedForwardCase(tokens, config, dtype, args.device, buffers)
            for back_end in back_ends:
                case.check(back_end)
                run = case.run(back_end)
                low, median, high = statistics.quantiles(times_in_ms(run, buffers, args), n=4)
                result["rows"].append(show({
                    "dtype": name, "tokens": tokens, "back_end": back_end, "ms": median,
                    "ms_quartiles": [low, high], "tflops": case.flop / median / 1e9,
                    "gb_s": case.bytes / median / 1e6, "peak_mb": peak_memory_mb(run) if on_gpu else None}))
    return result


def kernels_tables(result: dict) -> str:
    ms = {(r["dtype"], r["tokens"], r["back_end"]): r["ms"] for r in result["rows"]}
    limits = result["ceilings"]
    measured = "; ".join(f"{name} {limit['matmul_tflops']:.3g} TFLOP/s, {limit['copy_gb_s']:.4g} GB/s"
                         for name, limit in limits.items())
    return (f"{made_by(result)}. Hidden size {result['hidden_size']}, intermediate size "
            f"{result['intermediate_size']}. Measured ceilings: {measured}.\n\n" + table(result["rows"], {
                "dtype": "dtype", "tokens": "tokens", "back end": "back_end",
                "ms (quartiles)": lambda r: "{:.3f} ({:.3f}–{:.3f})".format(r["ms"], *r["ms_quartiles"]),
                "TFLOP/s": lambda r: f"{r['tflops']:.3g}",
                "matmul": lambda r: f"{r['tflops'] / limits[r['dtype']]['matmul_tflops']:.0%}",
                "copy": lambda r: f"{r['gb_s'] / limits[r['dtype']]['copy_gb_s']:.0%}",
                "peak MB": lambda r: "–" if r["peak_mb"] is None else f"{r['peak_mb']:.1f}",
                "× dense": lambda r: f"{ms[r['dtype'], r['tokens'], 'dense'] / r['ms']:.2f}"}))


KERNELS_PROSE = """
The feed-forward of one layer, on 64 text tokens and some tiles of 256 visual tokens. *matmul* and *copy* are
shares of what a large matrix product and a large copy reach on this machine. Useful operations are counted,
one expert per token, so `dense` cannot exceed half. On a CPU, `cuda` is moe_kernel.cu run by cuda_on_cpu.h,
one fiber per CUDA thread: its times say nothing about a GPU.
"""


# ---------------------------------------------------------------- infer

class Modular(MonoInternVL):
    """The modular counterpart, of the same parts: InternViT-300M (24 layers, width 1024, 16 heads, MLP 4096,
    1025 tokens per tile), pixel shuffle, MLP, and the same LLM without visual experts. The weights are
    random, since latency does not depend on them. With fewer layers of the LLM, the encoder has fewer too."""

    def __init__(self, config: MonoInternVLConfig):
        super().__init__(replace(config, attn_experts=""))
        for layer in self.language_model.model["layers"]:
            layer.feed_forward_ve = None
        self.patches = VisionEmbedding(replace(config, vision_hidden_size=1024))
        encoder = nn.TransformerEncoderLayer(1024, 16, 4096, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(encoder, config.num_hidden_layers, enable_nested_tensor=False)

    def embed_images(self, pixel_values):
        x = self.patches(pixel_values)                                     # (n, 1024, 32, 32)
        class_token = self.patches.class_embedding.expand(len(x), -1, -1)
        y = self.encoder(torch.cat([class_token, x.flatten(2).mT], 1))[:, 1:]         # (n, 1024, 1024)
        x = y.mT.unflatten(2, x.shape[2:])
        # mlp1 is that of our model. With fewer layers it is narrower, and takes the first channels only.
        return self.mlp1(pixel_shuffle(x[:, :self.config.vision_hidden_size], self.config.shuffle))

    def route(self, input_ids, attention_mask, has_images):
        return None                                                        # all is text to this LLM

    def flop(self, tiles: int) -> int:
        n, layers = 1025, self.config.num_hidden_layers
        return tiles * layers * (2 * n * 12 * 1024 ** 2 + 4 * n * n * 1024)


def prompt_length(tiles: int) -> int:
    return TEXT_TOKENS + tiles * TOKENS_PER_TILE


def random_prompt(c: MonoInternVLConfig, tiles: int, batch: int, device: str):
    """64 text tokens around the visual tokens of so many tiles, and the tiles."""
    ids = torch.randint(3, c.img_context_token_id, (batch, TEXT_TOKENS + tiles * c.tokens_per_tile))
    ids[:, TEXT_TOKENS // 2:ids.shape[1] - TEXT_TOKENS // 2] = c.img_context_token_id
    pixels = torch.randn(batch * tiles, 3, c.image_size, c.image_size) if tiles else None
    return ids.to(device), None if pixels is None else pixels.to(device)


def random_models(config: MonoInternVLConfig, dtype, device) -> tuple[MonoInternVL, Modular]:
    """Ours and the modular counterpart. They share every tensor that both have, to save memory."""
    with torch.device("meta"):
        models = MonoInternVL(config), Modular(config)
    weights = {}
    for model in models:
        for name, p in model.named_parameters():
            if name not in weights:
                weights[name] = torch.empty(p.shape, dtype=dtype, device=device)
                weights[name].normal_(std=0.02) if p.ndim > 1 else weights[name].fill_(1)
        model.load_state_dict(weights, strict=False, assign=True)          # the counterpart lacks some
        model.eval().requires_grad_(False)
    return models


def first_token(model, back_end: str, cache: KVCache, ids, pixels):
    def run():
        model.moe, cache.input_ids = back_end, []        # uses the memory of the cache, but not its content
        next(model.generate(ids, pixels, max_new_tokens=1, kv_cache=cache))
    return run


def decoding(model, mode: str, cache: KVCache, batch: int, cached: int, steps: int):
    """Greedy decoding as in generate, after so many cached tokens. Their content costs nothing."""
    weight = model.language_model.output.weight
    cache.reserve(batch, cached + steps, weight.dtype, weight.device)

    def run():
        model.cuda_graphs, model.compile_decode = "graph" in mode, "compile" in mode
        cache.length, cache.real[:, :cached], cache.real[:, cached:] = cached, True, False
        token = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        for _ in range(steps):
            token = decode(model, token, cache).argmax(-1)
            token.tolist()                                                 # the one sync of a step
    return run


def attention_alone(c: MonoInternVLConfig, weight, visible: int, steps: int):
    """The attention of decoding steps that see so many slots of the cache. Each layer has its own."""
    random = functools.partial(torch.randn, dtype=weight.dtype, device=weight.device)
    q = random(1, c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads, c.head_dim)
    keys, values = random(2, c.num_hidden_layers, 1, c.num_key_value_heads, visible, c.head_dim)
    mask = q.new_zeros(1, 1, 1, visible)

    def run():
        for _ in range(steps):
            for k, v in zip(keys, values, strict=True):
                F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return run


class Inference:
    """The measurements in one dtype. Each generator yields rows of the result."""

    def __init__(self, dtype: torch.dtype, config: MonoInternVLConfig, args):
        self.args, self.config, self.dtype, self.on_gpu = args, config, dtype, args.device == "cuda"
        self.limit = ceilings(dtype, args)
        torch.manual_seed(0)
        self.ours, self.modular = random_models(config, dtype, args.device)
        self.cache = KVCache(config)
        # float32 on a CPU takes long: only the two sizes whose ratios have targets
        self.tiles = [t for t in args.tiles if self.on_gpu or dtype == torch.bfloat16 or t in (2, 7)]

    def check(self):
        """Speed counts only where the answer is right."""
        model, prompt = self.ours, random_prompt(self.config, 1, 1, self.args.device)
        model.moe = "dense"
        expected = model(*prompt)[0]
        for model.moe in self.args.back_ends:
            error = relative_error(model(*prompt)[0], expected)
            if not error < (1e-4 if self.dtype == torch.float32 else 0.05):
                raise SystemExit(f"{model.moe} is wrong: error {error:.1e}")

    def timed(self, cases: dict, rounds: int, per: int = 1) -> dict[tuple, dict]:
        """Warms up (captures, compiles), then times. On a CPU one size is enough to warm up."""
        for (tiles, _), run in cases.items():
            if self.on_gpu or tiles == self.tiles[0]:
                run()
        return interleaved(cases, rounds, self.args, per)

    def prefill(self) -> Iterator[dict]:
        for batch in self.args.batches if self.on_gpu else [1]:
            cases = {}
            for tiles in self.tiles:
                inputs = random_prompt(self.config, tiles, batch, self.args.device)
                for back_end in self.args.back_ends:
                    cases[tiles, back_end] = first_token(self.ours, back_end, self.cache, *inputs)
                if self.dtype == torch.bfloat16:
                    cases[tiles, "modular"] = first_token(self.modular, "torch", self.cache, *inputs)
            for (tiles, back_end), measured in self.timed(cases, self.args.rounds).items():
                yield {"batch": batch, "tiles": tiles, "tokens": prompt_length(tiles), "back_end": back_end,
                       **measured, "floor": self.prefill_floor(batch, tiles, back_end)}

    def prefill_floor(self, batch: int, tiles: int, back_end: str) -> float:
        """The seconds that the operations need at least, or the reading of the weights if that is longer."""
        model = self.modular if back_end == "modular" else self.ours
        flop = budget.prefill_flop(self.config, prompt_length(tiles), tiles, 1 + (back_end == "dense"))
        flop = batch * (flop + self.modular.flop(tiles) * (back_end == "modular"))
        read = sum(p.nbytes for n, p in model.named_parameters() if "tok_embeddings" not in n)
        return max(flop / self.limit["matmul_tflops"] / 1e12, read / self.limit["copy_gb_s"] / 1e9)

    def text_only(self) -> Iterator[dict]:
        for tokens in (64, 256):
            ids = torch.randint(3, 1000, (1, tokens), device=self.args.device)
            ours, modular = interleaved({model: first_token(model, "torch", self.cache, ids, None)
                                         for model in (self.ours, self.modular)},
                                        3 * self.args.rounds, self.args).values()
            yield {"tokens": tokens, "seconds": ours["seconds"], "llm_seconds": modular["seconds"]}

    def long_cache(self) -> Iterator[dict]:
        """A step after 2,000 cached tokens against one after 200, both without the time of attention."""
        cases, cache, steps = {}, KVCache(self.config), self.args.steps
        for n in (200, 2000):
            step = decoding(self.ours, "graph" if self.on_gpu else "eager", cache, 1, n, steps)
            step()
            visible = -(-n // cache.block_size) * cache.block_size
            attention = attention_alone(self.config, self.ours.language_model.output.weight, visible, steps)
            cases |= {f"step_{n}": step, f"attention_{n}": replayed(attention, self.args.device)}
        measured = interleaved(cases, 3 * self.args.rounds, self.args, per=steps)
        row = {case: row["seconds"] for case, row in measured.items()}
        yield row | {"ratio": (row["step_2000"] - row["attention_2000"])
                     / (row["step_200"] - row["attention_200"])}

    def fused(self) -> Iterator[dict]:
        """The first two products of a layer, as they are and with w1 and w3 in one matrix."""
        experts = [layer.feed_forward for layer in self.ours.language_model.model["layers"][:4]]
        matrices = [torch.cat([e.w1.weight, e.w3.weight]) for e in experts]
        for tokens in (1, prompt_length(2)):
            x = matrices[0].new_empty(tokens, experts[0].w1.in_features).normal_()
            runs = {"two": lambda x=x: [(e.w1(x), e.w3(x)) for e in experts],
                    "one": lambda x=x: [F.linear(x, w) for w in matrices]}
            measured = interleaved({name: replayed(run, self.args.device) for name, run in runs.items()},
                                   9 * self.args.rounds, self.args, per=len(experts))
            two, one = (row["seconds"] for row in measured.values())
            yield {"tokens": tokens, "two": two, "one": one, "ratio": two / one}

    def decode(self) -> Iterator[dict]:
        modes = ["eager"] + ["graph", "graph + compile"] * self.on_gpu + ["compile"] * self.args.compile
        for batch in self.args.batches:
            cases = {(tiles, mode): decoding(self.ours, mode, self.cache, batch, prompt_length(tiles),
                                             self.args.steps) for tiles in self.tiles for mode in modes}
            for (tiles, mode), row in self.timed(cases, 3 * self.args.rounds, self.args.steps).items():
                read = budget.decode_bytes(self.config, prompt_length(tiles), batch, self.dtype.itemsize)
                yield {"batch": batch, "tiles": tiles, "cached_tokens": prompt_length(tiles), "mode": mode,
                       **row, "floor": read / self.limit["copy_gb_s"] / 1e9}


@torch.inference_mode()
def infer(args) -> dict:
    share = args.layers / 24
    config = MonoInternVLConfig.mono_internvl_1_5_2b(
        num_hidden_layers=args.layers, img_context_token_id=1000, vocab_size=round(92553 * share),
        vision_hidden_size=8 * round(1024 * share / 8))
    kinds = "prefill", "text_only", "long_cache", "fused", "decode"
    result = provenance(args) | {"layers": args.layers, "ceilings": {}, **{kind: [] for kind in kinds}}
    for dtype in [torch.bfloat16] if args.device == "cuda" else [torch.bfloat16, torch.float32]:
        name, inference = str(dtype).removeprefix("torch."), Inference(dtype, config, args)
        result["ceilings"][name] = inference.limit
        result["parameters"] = sum(p.numel() for p in inference.ours.parameters())
        inference.check()
        for kind in kinds:
            print(f"{kind}:")
            for row in getattr(inference, kind)():
                result[kind].append(show({"dtype": name, **row}))
                write_json(result, args.json)      # now, since the run may be killed for its memory later
    return result


def infer_tables(result: dict) -> str:
    def best(group):
        return min((r for n, r in group.items() if n not in ("dense", "modular")), key=lambda r: r["seconds"])

    def cell(group, name, unit):
        if name not in group:
            return "–"
        scale, form = (1e3, "{:.2f} ({:.2f}–{:.2f})") if unit == "ms" else (1, "{:.3f} ({:.3f}–{:.3f})")
        return form.format(*(scale * t for t in (group[name]["seconds"], *group[name]["quartiles"])))

    def compared(rows, by, unit, more):
        """A line for each dtype, batch and number of tiles, a column for each value of `by`, then `more`."""
        groups = {}
        for r in rows:
            groups.setdefault((r["dtype"], r["batch"], r["tiles"]), {})[r[by]] = r
        names = dict.fromkeys(r[by] for r in rows)
        columns = {key: lambda g, key=key: best(g)[key] for key in ("dtype", "batch", "tiles")}
        columns |= {f"{name}, {unit}": functools.partial(cell, name=name, unit=unit) for name in names}
        floor = {"floor": lambda g: f"{best(g)['floor'] / best(g)['seconds']:.0%}"}
        return table(groups.values(), columns | more | floor)

    parts = [f"{made_by(result)}. {result['layers']} of 24 layers of full width, "
             f"{result['parameters'] / 1e6:.0f} M parameters.",
             "Time to the first token:", compared(result["prefill"], "back_end", "s", {
                 "dense / torch": lambda g: f"{g['dense']['seconds'] / g['torch']['seconds']:.2f}",
                 "by operations": lambda g: f"{g['dense']['floor'] / g['torch']['floor']:.2f}",
                 "less than modular": lambda g: "–" if "modular" not in g else
                 f"{1 - best(g)['seconds'] / g['modular']['seconds']:.0%}"})]
    if result["decode"]:
        parts += ["One decoding step:", compared(result["decode"], "mode", "ms", {
            "tokens/s": lambda g: f"{best(g)['batch'] / best(g)['seconds']:.1f}"})]
    ratios = [(r, f"text alone, {r['tokens']} tokens", r["llm_seconds"] / r["seconds"],
               "speed of the LLM without visual experts") for r in result["text_only"]]
    ratios += [(r, "a step after 2,000 cached tokens, attention left out", r["ratio"],
                "time of one after 200") for r in result["long_cache"]]
    ratios += [(r, f"w1 and w3 as one matrix, {r['tokens']} token(s)", r["ratio"], "speed of two")
               for r in result["fused"]]
    return "\n\n".join([*parts, "\n".join(
        f"- {r['dtype']}, {what}: {ratio:.3f} × the {of_what}" for r, what, ratio, of_what in ratios)])


def plot_infer(result: dict, path: str):
    figure, dtype = Figure(figsize=(11, 4)), result["prefill"][0]["dtype"]
    left, right = figure.subplots(1, 2)
    for axes, rows, line, value in (
            (left, result["prefill"], "back_end", lambda r: r["seconds"]),
            (right, result["decode"], "mode", lambda r: r["batch"] / r["seconds"])):
        rows = [r for r in rows if r["dtype"] == dtype]
        for key in dict.fromkeys((r[line], r["batch"]) for r in rows):
            points = [r for r in rows if (r[line], r["batch"]) == key]
            x, y = [r["tiles"] for r in points], [value(r) for r in points]
            shown, = axes.plot(x, y, "o-", label=f"{key[0]}, batch {key[1]}")
            if axes is right:
                axes.plot(x, [r["batch"] / r["floor"] for r in points], ":", color=shown.get_color())
        axes.set(xlabel="tiles of 256 visual tokens, and 64 text tokens", ylim=(0, None))
        axes.legend()
    left.set(title="time to first token", ylabel="seconds")
    right.set(title="decoding (dotted: what the copy bandwidth allows)", ylabel="tokens a second",
              yscale="log", ylim=(1, None))
    figure.suptitle(f"{result['hardware']}, {dtype}, {result['layers']} of 24 layers", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


INFER_PROSE = """
Weights are random, values are medians, with quartiles in brackets. *modular* is the counterpart of the same
parts: InternViT-300M, MLP, and the same LLM without visual experts. *by operations* is the ratio of `dense`
to `torch` that counting operations gives: attention and the vision embedding are the same for both. *floor*
is the share that was reached of what the machine allows, by the rate of a large matrix product and by the
bandwidth of a large copy. (That one reads and writes; reading alone can be faster.)

The targets on a CPU were 1.7 × `dense` at 2 tiles and 1.9 × at 7. Measured are 1.84 and 1.87 in float32, but
1.52 and 1.70 in bfloat16: the matrix unit of this processor (AMX) is so fast that the rest weighs more.
Without AMX (the second file) the ratios are 1.95 and 1.94. In float32
the remaining gap is time outside the matrix products: norms, RoPE, softmax, gather and scatter, and the few
text tokens. w1 and w3 stay two matrices, since one is no faster.

The machine (24 GiB) was shared. Text alone, and float32 at 2 tiles, were measured again when the other core
was idle. Beside a busy core they had been 0.96 to 1.02, and 1.68 and 1.75 × `dense`.
"""


# ---------------------------------------------------------------- train

def train_cases(args, folder: Path) -> dict:
    """{(model, stage): (config, batch)}: 16 samples of the embedded world for the tiny model; prompts with
    pictures for layers of the 2B model's width, where half of the text is learned."""
    tok, cases = make_world_tokenizer(folder), {}
    c = train_evip.tiny_config("evip++", tok)
    vocab_size = max(1000, 92553 * args.layers // 24)
    wide = MonoInternVLConfig.mono_internvl_1_5_2b(num_hidden_layers=args.layers, vocab_size=vocab_size,
                                                   img_context_token_id=999)
    for stage in train_evip.RECIPES["evip++"][2::2]:                       # S1.2 and S2
        samples = [World(stage.name, tok, c)[i] for i in range(stage.batch)]
        cases["tiny", stage] = c, collate(samples, tok.pad_id)
        ids, pixels = random_prompt(wide, args.tiles, args.batch, "cpu")
        after = torch.arange(ids.shape[1]) >= ids.shape[1] - TEXT_TOKENS // 2          # the visual tokens
        cases[f"{args.layers} of 24 layers", stage] = wide, {
            "input_ids": ids, "pixel_values": pixels, "attention_mask": None,
            "labels": ids.where(after, -100)}
    return cases


def step_times(name: str, stage, config: MonoInternVLConfig, batch: dict, args) -> Iterator[dict]:
    """Times the optimizer steps of one model in one stage, as train_evip.py makes them, on each back end."""
    dtype = "bfloat16" if args.device == "cuda" else "float32"
    flags = train_evip.Flags(device=args.device, dtype=dtype, recompute="off")
    torch.manual_seed(0)
    model = MonoInternVL(config)
    train_evip.select_trainable(model, stage)
    forward, optimizer = train_evip.distribute(model, flags), train_evip.make_optimizer(model, flags)
    trainable = [p for p in model.parameters() if p.requires_grad]
    amounts = count_tokens(batch, config.tokens_per_tile)
    rates = budget.flop_rates(train_evip.shapes_of(model), train_evip.trainable_names(model, stage), config)
    flop, tokens = sum(rates[kind] * n for kind, n in amounts.items()), amounts["text"] + amounts["visual"]

    def step(back_end: str) -> float:
        model.moe = back_end
        losses, = train_evip.backward(model, forward, [batch], amounts["labels"], stage, flags)
        torch.nn.utils.clip_grad_norm_(trainable, flags.grad_clip)
        optimizer.step()                           # with learning rate 0, so that all steps are alike
        optimizer.zero_grad()
        return losses.mean().item()

    runs = {back_end: functools.partial(step, back_end) for back_end in args.back_ends}
    losses = {back_end: run() for back_end, run in runs.items()}           # warms up as well
    if max(losses.values()) - min(losses.values()) > 1e-2 * max(losses.values()):
        raise SystemExit(f"{name}, {stage.name}: the back ends disagree: {losses}")
    rounds = args.tiny_rounds if name == "tiny" else args.rounds
    for back_end, measured in interleaved(runs, rounds, args).items():
        yield {"model": name, "stage": stage.name, "tokens": tokens, "visual": amounts["visual"],
               "back_end": back_end, **measured, "tokens_per_s": tokens / measured["seconds"],
               "tflops": flop / measured["seconds"] / 1e12}


def train(args) -> dict:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    result = provenance(args) | {"ceilings": ceilings(dtype, args), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        cases = train_cases(args, Path(folder))
    for (name, stage), (config, batch) in cases.items():
        result["rows"] += [show(row) for row in step_times(name, stage, config, batch, args)]
    return result


def train_tables(result: dict) -> str:
    peak = result["ceilings"]["matmul_tflops"]
    dense = {(r["model"], r["stage"]): r["seconds"] for r in result["rows"] if r["back_end"] == "dense"}
    return f"{made_by(result)}. Measured peak {peak:.3g} TFLOP/s.\n\n" + table(result["rows"], {
        "model": "model", "stage": "stage", "back end": "back_end",
        "tokens (visual)": lambda r: f"{r['tokens']} ({r['visual']})",
        "ms per step (quartiles)": lambda r: "{:.1f} ({:.1f}–{:.1f})".format(
            *(1e3 * t for t in (r["seconds"], *r["quartiles"]))),
        "tokens/s": lambda r: f"{r['tokens_per_s']:.0f}",
        "share of peak": lambda r: f"{r['tflops'] / peak:.0%}",
        "× dense": lambda r: f"{dense.get((r['model'], r['stage']), math.nan) / r['seconds']:.2f}"})


TRAIN_PROSE = """
Whole optimizer steps: forward, backward, clipping, AdamW. *share of peak* counts useful operations. `dense`
runs both experts on every token, pads included, as the official code does. At full width, AdamW takes a good
part of a step of 320 tokens: it updates 63 or 126 M parameters, and no routing makes that faster. Hence 1.51
and 1.69 instead of the 1.7 that was the target.
"""


# ---------------------------------------------------------------- ablation: the paper's claims, tried out

VARIANTS = {                           # of S1.1 and S1.2: what differs from the first
    "delta tuning, 1.5": {},
    "full fine-tuning, 1.5": {"trainable": "all"},
    "delta tuning, v1": {"attn_experts": ""},
    "delta tuning, 1.5, random experts": {"copy_experts": False},
}


def describe(model: MonoInternVL, tok: Tokenizer, n: int) -> dict[str, float]:
    """The share of held-out pictures, n of each kind, that the model describes rightly ("right"), and the
    same when it sees grey pictures instead ("blank")."""
    def facts(caption):                # in any order, without the words that say nothing
        return {frozenset(re.findall(r"\w+", part)) - {"a", "is"} for part in re.split("[.,]", caption)}
    c, shares, rng = model.config, {}, random.Random("test")
    pictures = [make_picture(rng, kind, "test") for kind in KINDS for _ in range(n)]
    for name in ("right", "blank"):
        images = [p.image if name == "right" else Image.new("RGB", p.image.size, "gray") for p in pictures]
        answers = answer(model, tok, [(load_image(image, c.max_dynamic_patch, c.image_size),
                                       "Describe the image.") for image in images])
        pairs = zip(answers, pictures, strict=True)
        shares[name] = sum(facts(a) == facts(p.text) for a, p in pairs) / len(pictures)
    return shares


def train_variant(change: dict, llm: MonoInternVL, tok: Tokenizer, train, stages: list, n: int) -> dict:
    """Takes a copy of the language model through the stages. change: of VARIANTS. n: see describe."""
    model = MonoInternVL(replace(llm.config, attn_experts=change.get("attn_experts", "qkvo")))
    model.load_state_dict({name: weight for name, weight in llm.state_dict().items()
                           if name.startswith("language_model") and "_ve." not in name}, strict=False)
    if change.get("copy_experts", True):
        model.copy_text_experts()
    logits, before = text_probe(model, tok)
    for stage in stages:
        losses = train(model, replace(stage, trainable=change.get("trainable", stage.trainable)), tok)
    logits_after, after = text_probe(model, tok)
    # Every sample is new, so the training loss tells what was learned: its mean in each tenth of S1.2.
    tenths = torch.tensor(losses).tensor_split(min(10, len(losses)))
    return {"text before": before, "text after": after,
            "text bitwise equal": torch.equal(logits, logits_after), **describe(model, tok, n),
            "caption loss": [tenth.mean().item() for tenth in tenths]}


def ablation(flags: train_evip.Flags, seeds: int = 3) -> dict:
    """Trains each variant through S1.1 and S1.2 on a CPU: from one S0 per seed (or --init_from), on the same
    samples of the embedded world, for as many steps. Writes OUT/results.json and returns what it holds."""
    started, out, rows = time.time(), Path(flags.out or "out/ablation"), []
    s0, *stages = train_evip.RECIPES["evip++"][:3]

    def train(model: MonoInternVL, stage, tok: Tokenizer) -> list[float]:
        """Returns the loss of each step."""
        log, dataset = out / "log.jsonl", World(stage.name, tok, model.config, stage.max_tiles, flags.seed)
        if not train_evip.train_stage(model, dataset, stage, flags, train_evip.Progress(log), tok):
            raise InputError("the ablation was stopped; the same command starts it from the beginning")
        lines = log.read_text(encoding="utf-8").splitlines()[-(flags.steps or stage.steps):]
        return [json.loads(line)["loss"] for line in lines]

    for seed in range(flags.seed, flags.seed + seeds):
        flags = replace(flags, seed=seed, device="cpu", dtype="float32")
        torch.manual_seed(seed)
        _, tok, build = train_evip.origin(flags, s0, True, out)
        llm = build()
        if flags.init_from is None:
            train(llm, s0, tok)
        for name, change in VARIANTS.items():
            print(f"seed {seed}: {name}", flush=True)
            torch.manual_seed(seed)                # new weights for all but the LLM
            rows.append({"variant": name, "seed": seed,
                         **train_variant(change, llm, tok, train, stages, flags.eval_questions)})
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows,
               "seconds": time.time() - started, "steps": [flags.steps or stage.steps for stage in stages],
               "batch_size": flags.batch_size or s0.batch, "pictures": len(KINDS) * flags.eval_questions}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    return results


def run_ablation(args) -> dict:
    flags = train_evip.Flags(steps=args.steps or None, eval_questions=args.eval_questions, seed=args.seed,
                             out=args.out)
    return provenance(args) | ablation(flags, args.seeds)


def ablation_table(results: dict) -> str:
    def mean(key, form):
        def cell(rows):
            values = [row[key][-1] if key == "caption loss" else row[key] for row in rows]
            deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            return f"{statistics.mean(values):{form}}{deviation}"
        return cell

    groups = [[row for row in results["rows"] if row["variant"] == name] for name in VARIANTS]
    return table(filter(None, groups), {
        "S1.1 and S1.2 by": lambda rows: rows[0]["variant"], "text loss before": mean("text before", ".3f"),
        "after": mean("text after", ".3f"),
        "bitwise equal": lambda rows: "yes" if all(row["text bitwise equal"] for row in rows) else "no",
        "described rightly": mean("right", ".0%"), "blank image": mean("blank", ".0%"),
        "caption loss": mean("caption loss", ".3f")})


ABLATION_PROSE = """
`python bench.py ablation` takes one S0 per seed through S1.1 and S1.2 in four ways, on the same samples and
for as many steps. *described rightly* counts, of 500 held-out pictures of all five kinds, those whose
description has no mistake; *blank image* is the same question about grey pictures; *caption loss* is the mean
over the last tenth of S1.2. Mean ± standard deviation over seeds 0, 1 and 2, one CPU thread each, torch
{torch}. (Charts were 1 in 14 of the pictures then; now they are 1.5 in 14.5.)

Delta tuning keeps the language model, in every bit. Full fine-tuning describes better after the same steps,
and forgets the text. The attention experts of 1.5 help: the caption loss is lower than that of v1 with every
seed. Whether visual experts start as copies or at random makes no difference here: the language model of the
paper has seen trillions of tokens, and ours has trained for 200 steps. All of this is about a model of a
million parameters after two stages. [03_evip_training](notebooks/03_evip_training.ipynb) draws the curves.
"""


# ---------------------------------------------------------------- report: RESULTS.md

ACCURACY_PROSE = """
`python train_evip.py` (seed 0) and `python train_evip.py --seed 1`, torch {torch}: 100 questions per task
about held-out pictures. No combination of things, bars or words and no scan of a digit is shared with
training. *blank image* is the control: a model that answers as well about a grey picture does not look.
*chance* is a guess from the question alone. Text loss before S1.1 and after S1.2 (seed 0): {before:.6f} and
{after:.6f}, the logits bitwise equal.

Seed 0 took {seconds:.0f} s on one core of an AMD EPYC (`OMP_NUM_THREADS=1`) that did other work too. On two
idle cores it took 190 s and reached 96.4 % on average: threads add up in another order, so the weights
differ. `--recipe evip` (v1), run once with seed 0, took 244 s on two cores and reached 86 %; its weakest
tasks were shape (61 %), box (79 %) and size (82 %).

About twenty full runs settled the wording of the world, the size of the model and the schedule. They were
judged by other held-out questions (seed 4242), but the last two choices, how often a chart is shown and how
many steps S2 has, followed a look at this table. So 300 new questions per task were asked once afterwards, by
`python evaluate.py --model out/evip++/S2 --questions 300 --seed 20261124`: the means were 96.7 % (seed 0) and
95.7 % (seed 1), and the weakest task was position with 91 % and 90 %. Runs differ: a skill such as comparing
bars forms late and all at once. With 600 steps fewer, one task in ten stayed at 48 to 75 %.
"""


def accuracy_table(runs: list[dict]) -> str:
    def percent(run, column):
        return lambda task: f"{run['tasks'][task][column]:.0%}"

    return table(runs[0]["tasks"], {
        "task": str, **{f"seed {run['seed']}": percent(run, "accuracy") for run in runs},
        "blank image (seed 0)": percent(runs[0], "blank"), "chance": percent(runs[0], "chance")})


def report(args) -> None:
    """Writes RESULTS.md from the measurements in assets/. Both are in the current folder."""
    assets, on_gpu = Path("assets"), False
    runs = [read_json(file) for file in sorted(assets.glob("results_seed*.json"))]
    if not runs:
        raise InputError("there is no assets/results_seed0.json: run this in the folder of the project")
    losses = {"before": runs[0]["S1.1"]["text loss before"], "after": runs[0]["S1.2"]["text loss after"]}
    parts = ["## Held-out accuracy of the tiny model", ACCURACY_PROSE.format(**runs[0], **losses),
             accuracy_table(runs)]
    for title, name, prose, tables in (("Training steps", "train", TRAIN_PROSE, train_tables),
                                       ("Inference", "infer", INFER_PROSE, infer_tables),
                                       ("The kernel", "kernels", KERNELS_PROSE, kernels_tables)):
        parts += [f"## {title}", prose]
        for file in sorted(assets.glob(f"bench_{name}_*.json")):
            result, picture = read_json(file), file.with_suffix(".png")
            on_gpu |= result["device"] == "cuda"
            parts += [f"### `{file}`", tables(result)] + [f"![{title}]({picture})"] * picture.exists()
    ablations = read_json(assets / "ablation.json")
    parts += ["## Ablations", ABLATION_PROSE.format(**ablations), ablation_table(ablations)]
    head = ["# Results", "`python bench.py report` makes all these tables of the files in `assets/`."]
    head += ["**Nothing has been measured on a GPU yet.**"] * (not on_gpu)
    text = "\n\n".join(part.strip() for part in head + parts) + "\n"
    Path("RESULTS.md").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------- the flags

def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, gpu = parser.add_subparsers(dest="bench", required=True), torch.cuda.is_available()

    def command(run, tables, help: str, **options):
        """options: name -> (default, help, *choices). The default tells the type; False makes it a switch."""
        sub = commands.add_parser(run.__name__.removeprefix("run_"), help=help,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run, tables=tables, device="cpu", cpu_time=False, png=None)
        for name, (default, text, *choices) in options.items():
            how = {"action": "store_true"} if default is False else {"type": type(default)}
            how |= {"type": type(default[0]), "nargs": "+"} if isinstance(default, list) else {}
            how |= {"choices": choices} if choices else {}
            sub.add_argument("--" + name.replace("_", "-"), default=default, help=text, **how)

    output = {"json": ("", "file for the result"), "markdown": (False, "also print the result as tables")}
    timing = {"device": ("cuda" if gpu else "cpu", "what to measure", "cpu", "cuda"), **output,
              "seconds": (1.0, "how long to repeat each measurement of a ceiling or a kernel")}
    rounds = {"back_ends": (["dense", "torch"] + ["cuda"] * gpu, "of the experts"),
              "rounds": (10 if gpu else 3, "how often each case is timed"),
              "cpu_time": (False, "the process's own time, not wall time: for a thread on a shared machine")}
    beside = "numbers of tiles, of 256 visual tokens each, beside 64 text tokens"
    command(kernels, kernels_tables, "the routed feed-forward layer on each back end", **timing,
            hidden_size=(2048 if gpu else 256, "of the layer"),
            intermediate_size=(8192 if gpu else 1024, "of the layer"),
            image_tiles=([0, 1, 2, 4, 7, 13] if gpu else [0, 1, 2], beside),
            kernel_tiles=(False, "also each block tile of moe_kernel.cu, for tuning"))
    command(infer, infer_tables, "time to the first token and decoding rate of whole models", **timing,
            **rounds, tiles=([1, 2, 4, 7, 13], beside), batches=([1, 16], "on a CPU: of decoding only"),
            layers=(24 if gpu else 1, "of full width; vocabulary and vision in proportion"),
            compile=(False, "also torch.compile without graphs"),
            steps=(64 if gpu else 8, "tokens of one decoding run"), png=("", "file for a picture"))
    command(train, train_tables, "optimizer steps of the tiny model and of layers of full width", **timing,
            **rounds, layers=(12 if gpu else 1, "of full width"), tiles=(4 if gpu else 1, "of a picture"),
            batch=(4 if gpu else 1, "pictures of a full-width step"),
            tiny_rounds=(60, "how often the tiny model is timed"))
    command(run_ablation, ablation_table, "the paper's comparisons with the tiny model, on a CPU", **output,
            seeds=(3, "how many"), seed=(0, "the first"), steps=(0, "of each stage (0: as in the recipe)"),
            eval_questions=(100, "held-out pictures of each kind"), out=("out/ablation", "folder of the run"))
    command(report, None, "write RESULTS.md from the measurements in assets/")
    args = parser.parse_args(argv)
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    args.command = shlex.join(["python", "bench.py", *argv])
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    try:
        result = args.run(args)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if result is None:                             # of `report`
        return 0
    write_json(result, args.json)
    if args.png:
        plot_infer(result, args.png)
    if args.markdown:
        print(args.tables(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
