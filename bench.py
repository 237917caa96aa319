"""Every measured number of this project comes from here.

    python bench.py kernels        the routed feed-forward layer on each back end
    python bench.py resources      registers and shared memory of the kernel's tiles, as nvcc compiles them
    python bench.py infer          time to the first token and decoding rate of whole models
    python bench.py train          optimizer steps of the tiny model and of layers of full width
    python bench.py data           photos become tiles
    python bench.py all            kernels, infer, train and data; --quick: fewer sizes and rounds
    python bench.py report         writes RESULTS.md from the measurements in assets/

Each measurement is printed as it comes. The last line is all of them as JSON, which --json FILE keeps. --help
after a command lists its flags. Every back end is compared with the dense reference before it is timed.

In this order: measuring; the commands, each with its flags and its tables; the report; main.
"""
import functools
import itertools
import json
import math
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import budget
import moe_kernel
import train_evip
from ablation import ablation_table
from common import InputError, flag, parse_flags, read_json, table
from data import Batches, JsonlDataset, collate, count_tokens, turns
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
from world import World, make_world_tokenizer

TEXT_TOKENS = 64                                   # of a measured prompt
GPU = torch.cuda.is_available()


# ---------------------------------------------------------------- measuring

@dataclass
class Flags:
    json: str | None = flag(None, "file for the result")
    device, cpu_time = "cpu", False                # flags of what is timed


@dataclass
class Timing(Flags):
    device: str = flag("cuda" if GPU else "cpu", "what to measure", choices=["cpu", "cuda"])
    cpu_time: bool = flag(False, "the process's own time, not wall time: for a thread on a shared machine")
    rounds: int = flag(10 if GPU else 3, "how often each case is timed")
    back_ends: list[str] = flag(["dense", "torch"] + ["cuda"] * GPU, "of the experts")


def provenance(argv: list[str], flags: Flags) -> dict:
    """Where a result comes from. Every result begins with it."""
    if flags.device == "cuda":
        hardware = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    else:
        cpuinfo = Path("/proc/cpuinfo")
        named = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
        hardware = f"{named[1] if named else platform.processor()}, {torch.get_num_threads()} threads"
    return {"bench": argv[0], "command": shlex.join(["python", "bench.py", *argv]), "hardware": hardware,
            "torch": torch.__version__, "device": flags.device,
            "clock": "CPU time" if flags.cpu_time else "wall time", "date": time.strftime("%Y-%m-%d")}


def record(result: dict, kind: str, row: dict, flags: Flags):
    """Prints a measurement on one line and adds it to the result, which is written at once: a long run may be
    killed for its memory."""
    print(", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in row.items() if not isinstance(value, list)), flush=True)
    result[kind].append(row)
    if flags.json:
        Path(flags.json).write_text(json.dumps(result) + "\n")


def repeated(run, times: int, device: str):
    """A function that calls run(0), …, run(times - 1). On a GPU it replays them as one CUDA graph, which
    takes the time of the device, without Python and without launches."""
    def loop():
        for i in range(times):
            run(i)
    if device != "cuda":
        return loop
    loop()                                         # builds, allocates, warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loop()

    def replay(owner=loop):                        # the graph reads tensors that belong to `run`
        graph.replay()
    return replay


def interleaved(cases: dict, rounds: int, flags: Timing, per: int = 1) -> dict[tuple, dict]:
    """Runs all cases in every round, so that whatever else the machine does affects all of them alike. A
    round before the first one warms up. Returns for each case the median and quartiles of its seconds,
    divided by `per`."""
    clock = time.process_time if flags.cpu_time else time.perf_counter
    times = {case: [] for case in cases}
    for _ in range(rounds + 1):
        for case, run in cases.items():
            started = clock()
            run()
            if flags.device == "cuda":
                torch.cuda.synchronize()
            times[case].append((clock() - started) / per)
    for case, seconds in times.items():
        low, median, high = statistics.quantiles(seconds[1:], n=4, method="inclusive")
        times[case] = {"seconds": median, "quartiles": [low, high], "runs": rounds}
    return times


def ceilings(dtype: torch.dtype, flags: Timing) -> dict[str, float]:
    """What torch reaches here: a large matrix product, and a copy (bytes read plus bytes written)."""
    n, size, times = (8192, 2 ** 30, 10) if flags.device == "cuda" else (1024, 2 ** 27, 1)
    a, b = (torch.randn(n, n, device=flags.device).to(dtype) for _ in range(2))
    source, target = (torch.randn(size // 4, device=flags.device) for _ in range(2))
    measured = interleaved({  # a kernel, because the copies of a CUDA graph reach only 63 % of it on an H200
        "matmul": repeated(lambda i: a @ b, times, flags.device),
        "copy": repeated(lambda i: torch.add(source, 1, out=target), times, flags.device)}, 10, flags, times)
    return {"matmul_tflops": 2 * n ** 3 / measured["matmul"]["seconds"] / 1e12,
            "copy_gb_s": 2 * size / measured["copy"]["seconds"] / 1e9}


def check(name: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float):
    """Speed counts only where the answer is right."""
    error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
    if not error < tolerance:
        raise SystemExit(f"{name} is wrong: relative error {error:.1e}")


def prompt_length(c: MonoInternVLConfig, tiles: int) -> int:
    return TEXT_TOKENS + tiles * c.tokens_per_tile


def random_prompt(c: MonoInternVLConfig, tiles: int, batch: int, device: str, text: int = TEXT_TOKENS):
    """Text tokens around the visual tokens of so many tiles, and the tiles."""
    ids = torch.randint(3, c.img_context_token_id, (batch, text + tiles * c.tokens_per_tile))
    ids[:, text // 2:ids.shape[1] - text // 2] = c.img_context_token_id
    pixels = torch.randn(batch * tiles, 3, c.image_size, c.image_size).to(device) if tiles else None
    return ids.to(device), pixels


def spread(median: float, quartiles: list[float], digits: int, scale: float = 1) -> str:
    return "{:.{d}f} ({:.{d}f}–{:.{d}f})".format(*(scale * t for t in (median, *quartiles)), d=digits)


# ---------------------------------------------------------------- kernels

@dataclass
class KernelsFlags(Timing):
    dtypes: list[str] = flag(["bfloat16"] if GPU else ["float32", "bfloat16"], "of weights and activations")
    rounds: int = flag(20, "how often each case is timed")
    back_ends: list[str] = flag(["dense", "torch", "cuda"] + ["cublas"] * GPU, "of the experts")
    hidden_size: int = flag(2048 if GPU else 256, "of the layer")
    intermediate_size: int = flag(8192 if GPU else 1024, "of the layer")
    image_tiles: list[int] = flag([0, 1, 2, 4, 7, 13] if GPU else [0, 1, 2],
                                  "of 256 visual tokens each, beside 64 text tokens")


class FeedForwardCase:
    """The routed feed-forward on one prompt: visual tokens between 64 text tokens. As in a model, many sets
    of weights and inputs share one routing, so that caches do not hold what the next call needs."""

    def __init__(self, tokens: int, config: MonoInternVLConfig, dtype, device: str, sets: int):
        self.visual = torch.zeros(1, tokens, dtype=torch.bool, device=device)
        self.visual[:, TEXT_TOKENS // 2:tokens - TEXT_TOKENS // 2] = tokens > TEXT_TOKENS
        with torch.device(device):
            self.experts = [[FeedForward(config).requires_grad_(False).to(dtype) for _ in ("text", "visual")]
                            for _ in range(sets)]
            self.x = [torch.randn(1, tokens, config.hidden_size).to(dtype) for _ in range(sets)]
        self.sorted = [(x[~self.visual], x[self.visual]) for x in self.x]
        used = 1 + bool(self.visual.any())
        weights = 3 * config.hidden_size * config.intermediate_size        # of an expert
        self.flop = 2 * weights * tokens                                   # useful: one expert per token
        self.bytes = (used * weights + 2 * tokens * config.hidden_size) * dtype.itemsize

    def run(self, back_end: str):
        """A function that runs the layer on set number i."""
        if back_end == "cublas":                                           # sorted beforehand: nothing moves
            return lambda i: [expert(x) for expert, x in zip(self.experts[i], self.sorted[i], strict=True)
                              if len(x)]
        routing = Routing(self.visual, backend=back_end)
        return lambda i: mmoe_swiglu(self.x[i], *self.experts[i], routing)


def peak_memory_mb(run) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(0)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


@torch.inference_mode()
def kernels(flags: KernelsFlags, result: dict):
    on_gpu, sets = flags.device == "cuda", 24 if flags.device == "cuda" else 3
    config = MonoInternVLConfig(hidden_size=flags.hidden_size, intermediate_size=flags.intermediate_size)
    result |= {"hidden_size": flags.hidden_size, "intermediate_size": flags.intermediate_size, "ceilings": {},
               "rows": []}
    for name in flags.dtypes:
        dtype = getattr(torch, name)
        result["ceilings"][name] = ceilings(dtype, flags)
        for tokens in (prompt_length(config, tiles) for tiles in flags.image_tiles):
            case, runs = FeedForwardCase(tokens, config, dtype, flags.device, sets), {}
            expected = case.run("dense")(0)
            for back_end in flags.back_ends:
                run = case.run(back_end)
                if back_end != "cublas":           # that is PyTorch alone
                    rounding = 4 * torch.finfo(dtype).eps + 1e-5           # to dtype, and of float32 sums
                    check(back_end, run(0), expected, rounding)
                runs[back_end] = repeated(run, sets, flags.device)
            for back_end, measured in interleaved(runs, flags.rounds, flags, per=sets).items():
                seconds = measured["seconds"]
                record(result, "rows", {
                    "dtype": name, "tokens": tokens, "back_end": back_end, "ms": seconds * 1e3,
                    "ms_quartiles": [t * 1e3 for t in measured["quartiles"]],
                    "tflops": case.flop / seconds / 1e12, "gb_s": case.bytes / seconds / 1e9,
                    "peak_mb": peak_memory_mb(case.run(back_end)) if on_gpu else None}, flags)


def kernels_tables(result: dict) -> str:
    limits, rows = result["ceilings"], result["rows"]
    dense = {(r["dtype"], r["tokens"]): r["ms"] for r in rows if r["back_end"] == "dense"}
    measured = "; ".join(f"{name} {limit['matmul_tflops']:.3g} TFLOP/s, {limit['copy_gb_s']:.4g} GB/s"
                         for name, limit in limits.items())
    return (f"Hidden size {result['hidden_size']}, intermediate size {result['intermediate_size']}. "
            f"Measured ceilings: {measured}.\n\n") + table([{
        "dtype": r["dtype"], "tokens": r["tokens"], "back end": r["back_end"],
        "ms (quartiles)": spread(r["ms"], r["ms_quartiles"], 3), "TFLOP/s": f"{r['tflops']:.3g}",
        "matmul": f"{r['tflops'] / limits[r['dtype']]['matmul_tflops']:.0%}",
        "copy": f"{r['gb_s'] / limits[r['dtype']]['copy_gb_s']:.0%}",
        "peak MB": "–" if r["peak_mb"] is None else f"{r['peak_mb']:.1f}",
        "× dense": f"{dense.get((r['dtype'], r['tokens']), math.nan) / r['ms']:.2f}"} for r in rows])


def chosen_table(microseconds: dict[str, dict]) -> str:
    """microseconds: of moe_kernel.py's file, {product: {tokens: {tile config or "torch": time}}}."""
    names, lines = {number: name for name, number in moe_kernel.TILES.items()}, {}
    for product, of_tokens in microseconds.items():
        for tokens, row in of_tokens.items():
            best = min(row, key=row.get)
            parts, tile = divmod(0 if best == "torch" else int(best), moe_kernel.SPLIT)
            lines.setdefault(tokens, {"tokens": tokens})[product.replace(" torch.", " ")] = (
                f"{names.get(tile, best)}{f' / {parts}' * bool(parts)}: {row[best]:.0f} / {row['torch']:.0f}")
    return table(list(lines.values()))


# ---------------------------------------------------------------- resources

@dataclass
class ResourcesFlags(Flags):
    sm: list[str] = flag(["80", "86", "89", "90", "90a", "100", "120"], "architectures to compile for")


def ptxas_report(sm: str) -> str:
    """What the assembler says about each kernel of moe_kernel.cu. Raises InputError if nvcc is missing."""
    try:
        command = moe_kernel.nvcc_command(sm)
    except RuntimeError as e:
        raise InputError(str(e)) from None
    with tempfile.TemporaryDirectory() as folder:
        command += ["-Werror", "all-warnings", "-Xptxas", "-v", "-cubin", "-o", f"{folder}/kernels.cubin"]
        compiled = subprocess.run([*command, moe_kernel.SOURCE], text=True, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT)
    if compiled.returncode:
        raise InputError(f"{shlex.join(command)} failed: {compiled.stdout}")
    return compiled.stdout


def resources(flags: ResourcesFlags, result: dict):
    """Of the bfloat16 tiles; those of float16 are alike. A tile is a BlockTile of moe_kernel.cu, whose name
    for the linker holds its numbers. Its shared memory is its ring of stages."""
    reports, rows = {sm: ptxas_report(sm) for sm in flags.sm}, {}
    version = subprocess.run([moe_kernel.nvcc_command("")[0], "--version"], text=True, capture_output=True)
    result |= {"nvcc": re.search(r"V([\d.]+)", version.stdout)[1], "sm": flags.sm, "rows": []}
    entry = r"entry function '(\S+)'.*\n.*\n.* (\d+) bytes spill loads\n.*Used (\d+) registers"
    for sm, report in reports.items():
        for name, spilled, registers in re.findall(entry, report):
            tile = re.search(r"\d([a-z]+_kernel)I13__nv_bfloat169BlockTileI((?:Li\d+E)+)ELb(.)E", name)
            if tile is None or tile[1] == "wgmma_kernel" and sm != "90a":
                continue
            bm, bn, bk, warps_m, warps_n, stages, *_ = map(int, re.findall(r"\d+", tile[2]))
            row = rows.setdefault(tile[0], {
                "kernel": tile[1], "product": ("linear", "SwiGLU")[int(tile[3])],
                "tokens": bm, "weight_rows": bn, "k": bk, "stages": stages, "threads": 32 * warps_m * warps_n,
                "shared_bytes": (bm + bn) * bk * 2 * stages, "spilled_bytes": 0, "registers": {}})
            row["registers"][sm] = int(registers)
            row["spilled_bytes"] += int(spilled)
    for row in sorted(rows.values(), key=lambda row: [*row.values()][:6]):
        record(result, "rows", row, flags)


def resources_table(result: dict) -> str:
    spilled = sum(row["spilled_bytes"] for row in result["rows"])
    return f"Bytes that did not fit into registers and were spilled to memory: {spilled}.\n\n" + table([{
        "kernel": r["kernel"], "product": r["product"],
        "tokens × weight rows × K": f"{r['tokens']} × {r['weight_rows']} × {r['k']}", "stages": r["stages"],
        "threads": r["threads"], "shared KB": r["shared_bytes"] // 1024,
        **{f"sm_{sm}": r["registers"].get(sm, "–") for sm in result["sm"]}} for r in result["rows"]])


# ---------------------------------------------------------------- infer

@dataclass
class InferFlags(Timing):
    dtypes: list[str] = flag(["bfloat16"] if GPU else ["float32", "bfloat16"], "of weights and activations")
    layers: int = flag(24 if GPU else 1, "of full width; vocabulary and vision in proportion")
    tiles: list[int] = flag([0, 1, 2, 4, 7, 13], "of 256 visual tokens each, beside 64 text tokens")
    batches: list[int] = flag([1, 16], "on a CPU: of decoding only")
    steps: int = flag(64 if GPU else 8, "tokens of one decoding run")
    compile: bool = flag(False, "also torch.compile without graphs")
    png: str | None = flag(None, "file for a picture")


class Modular(MonoInternVL):
    """The modular counterpart, of the same parts: InternViT-300M (24 layers, width 1024, 16 heads, MLP 4096,
    1025 tokens per tile), pixel shuffle, MLP, and the same LLM without visual experts. With fewer layers of
    the LLM, the encoder has fewer too."""

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


def first_token(model, back_end: str, cache: KVCache, ids, pixels, graphs: bool = True):
    """cache: of this model and back end alone, because its CUDA graphs are."""
    def run():
        model.moe, model.cuda_graphs = back_end, graphs
        cache.input_ids = []                       # uses the memory of the cache, but not its content
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


def prefill(ours: MonoInternVL, modular: Modular, batch: int, limit: dict,
            flags: InferFlags) -> Iterator[dict]:
    """Times to the first token. limit: what `ceilings` returned."""
    c, cases, caches = ours.config, {}, defaultdict(lambda: KVCache(ours.config))
    for tiles in flags.tiles:
        inputs = random_prompt(c, tiles, batch, flags.device)
        for back_end in flags.back_ends:
            cases[tiles, back_end] = first_token(ours, back_end, caches[back_end], *inputs)
        cases[tiles, "modular"] = first_token(modular, "torch", caches["modular"], *inputs)
        if flags.device == "cuda" and "cuda" in flags.back_ends:
            cases[tiles, "cuda, eager"] = first_token(ours, "cuda", caches["cuda"], *inputs, graphs=False)
    # The caches grow, then meet each prompt, then capture it.
    for run in [*cases.values()] * (2 * (flags.device == "cuda")):
        run()
    for (tiles, back_end), measured in interleaved(cases, flags.rounds, flags).items():
        model, tokens = modular if back_end == "modular" else ours, prompt_length(c, tiles)
        experts = 2 if back_end == "dense" and tiles else 1                # text alone: one on all back ends
        flop = budget.prefill_flop(c, tokens, tiles, experts)
        flop = batch * (flop + modular.flop(tiles) * (back_end == "modular"))
        read = sum(p.nbytes for name, p in model.named_parameters() if "tok_embeddings" not in name)
        yield {"batch": batch, "tiles": tiles, "tokens": tokens, "back_end": back_end, **measured,
               "floor": max(flop / limit["matmul_tflops"] / 1e12, read / limit["copy_gb_s"] / 1e9)}


def decoding_steps(model: MonoInternVL, cache: KVCache, batch: int, limit: dict,
                   flags: InferFlags) -> Iterator[dict]:
    modes = ["eager"] + ["graph", "graph + compile"] * (flags.device == "cuda") + ["compile"] * flags.compile
    cached = {tiles: prompt_length(model.config, tiles) for tiles in flags.tiles}
    cases = {(tiles, mode): decoding(model, mode, cache, batch, cached[tiles], flags.steps)
             for tiles in cached for mode in modes}
    for (tiles, mode), row in interleaved(cases, 3 * flags.rounds, flags, per=flags.steps).items():
        read = budget.decode_bytes(model.config, cached[tiles], batch,
                                   model.language_model.output.weight.itemsize)
        yield {"batch": batch, "tiles": tiles, "cached_tokens": cached[tiles], "mode": mode, **row,
               "floor": read / limit["copy_gb_s"] / 1e9}


@torch.inference_mode()
def infer(flags: InferFlags, result: dict):
    share = flags.layers / 24
    config = MonoInternVLConfig.mono_internvl_1_5_2b(
        num_hidden_layers=flags.layers, img_context_token_id=1000, vocab_size=round(92553 * share),
        vision_hidden_size=8 * round(1024 * share / 8))
    result |= {"layers": flags.layers, "ceilings": {}, "prefill": [], "decode": []}
    for name in flags.dtypes:
        dtype = getattr(torch, name)
        limit = result["ceilings"][name] = ceilings(dtype, flags)
        torch.manual_seed(0)
        ours, modular = random_models(config, dtype, flags.device)
        result["parameters"] = sum(p.numel() for p in ours.parameters())
        prompt, ours.moe = random_prompt(config, 1, 1, flags.device), "dense"
        expected = ours(*prompt)[0]
        for ours.moe in flags.back_ends:
            check(ours.moe, ours(*prompt)[0], expected, 1e-4 if name == "float32" else 0.05)
        for batch in flags.batches if flags.device == "cuda" else [1]:
            for row in prefill(ours, modular, batch, limit, flags):
                record(result, "prefill", {"dtype": name, **row}, flags)
        cache = KVCache(config)
        for batch in flags.batches:
            for row in decoding_steps(ours, cache, batch, limit, flags):
                record(result, "decode", {"dtype": name, **row}, flags)
    if flags.png:
        plot_infer(result, flags.png)


MEASURED = {"prefill": ("time to the first token", "back_end"), "decode": ("one decoding step", "mode")}


def infer_tables(result: dict) -> str:
    """A line for each dtype, batch and number of tiles, a column for each back end or decoding mode, in
    milliseconds. A CPU reads a prompt in seconds."""
    parts = [f"{result['layers']} of 24 layers of full width, {result['parameters'] / 1e6:.0f} M parameters."]
    for kind, (title, by) in MEASURED.items():
        in_seconds = kind == "prefill" and result["device"] == "cpu"
        unit, scale, digits = ("s", 1, 3) if in_seconds else ("ms", 1e3, 2)
        groups, lines, names = {}, [], dict.fromkeys(r[by] for r in result[kind])
        for r in result[kind]:
            groups.setdefault((r["dtype"], r["batch"], r["tiles"]), {})[r[by]] = r
        for (dtype, batch, tiles), group in groups.items():
            best = min((r for name, r in group.items() if name not in ("dense", "modular")),
                       key=lambda r: r["seconds"])
            line = {"dtype": dtype, "batch": batch, "tiles": tiles}
            for name in names:
                line[f"{name}, {unit}"] = "–" if name not in group else spread(
                    group[name]["seconds"], group[name]["quartiles"], digits, scale)
            if kind == "decode":
                line["tokens/s"] = f"{batch / best['seconds']:.1f}"
            else:
                dense, routed, modular = (group.get(name) for name in ("dense", "torch", "modular"))
                line["dense / torch"] = f"{dense['seconds'] / routed['seconds']:.2f}"
                line["by operations"] = f"{dense['floor'] / routed['floor']:.2f}"
                line["less than modular"] = "–" if modular is None else \
                    f"{1 - best['seconds'] / modular['seconds']:.0%}"
            lines.append(line | {"floor": f"{best['floor'] / best['seconds']:.0%}"})
        parts += [f"{title.capitalize()}:", table(lines)] if lines else []
    return "\n\n".join(parts)


def plot_infer(result: dict, path: str):
    figure = Figure(figsize=(11, 4))
    for axes, (kind, (title, by)) in zip(figure.subplots(1, 2), MEASURED.items(), strict=True):
        lines = {}
        for r in result[kind]:
            points = lines.setdefault(f"{r['dtype']}, {r[by]}, batch {r['batch']}", [])
            points.append((r["tiles"], r["seconds"]))
        for label, points in lines.items():
            axes.plot(*zip(*points, strict=True), "o-", label=label)
        axes.set(title=title, xlabel="tiles of 256 visual tokens, and 64 text tokens", ylabel="seconds")
        axes.set_ylim(0)
        axes.legend(fontsize=8)
    figure.suptitle(f"{result['hardware']}, {result['layers']} of 24 layers", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- train

@dataclass
class TrainFlags(Timing):
    tiny_rounds: int = flag(60, "how often the tiny model is timed")
    compile: str = flag("off", "torch.compile the layers", choices=["on", "off"])
    layers: int = flag(12 if GPU else 1, "of full width")
    tiles: int = flag(4 if GPU else 1, "of a picture")
    batch: int = flag(4 if GPU else 1, "pictures of a full-width step")
    icons_layers: int = flag(0 if GPU else 30, "of the icons preset's model, in float32 and bfloat16")


def one_step(config: MonoInternVLConfig, stage, batch: dict, dtype: str, args: TrainFlags):
    """A function that makes an optimizer step with a back end, as train_evip.py makes it, and returns the
    loss; and the useful operations of a step."""
    flags = train_evip.Flags(device=args.device, dtype=dtype, recompute="off", compile=args.compile)
    torch.manual_seed(0)
    model = MonoInternVL(config)
    train_evip.select_trainable(model, stage)
    forward, optimizer = train_evip.distribute(model, flags), train_evip.make_optimizer(model, flags)
    trainable = [p for p in model.parameters() if p.requires_grad]
    amounts = count_tokens(batch, config.tokens_per_tile)
    rates = budget.flop_rates(train_evip.shapes_of(model), train_evip.trainable_names(model, stage), config)

    def step(back_end: str) -> float:
        model.moe = back_end
        losses, = train_evip.backward(model, forward, [batch], amounts["labels"], stage, flags)
        torch.nn.utils.clip_grad_norm_(trainable, flags.grad_clip)
        optimizer.step()                           # with learning rate 0, so that all steps are alike
        optimizer.zero_grad()
        return losses.mean().item()

    return step, sum(rates[kind] * n for kind, n in amounts.items())


def step_times(args: TrainFlags, stage, name: str, config: MonoInternVLConfig, batch: dict,
               peaks: dict[str, float]) -> Iterator[dict]:
    """Times the steps of one model in one stage with each back end and dtype. peaks: dtype -> TFLOP/s."""
    amounts, runs = count_tokens(batch, config.tokens_per_tile), {}
    for dtype in peaks:
        step, flop = one_step(config, stage, batch, dtype, args)
        runs |= {(dtype, back_end): functools.partial(step, back_end) for back_end in args.back_ends}
    losses = {case: run() for case, run in runs.items()}
    if max(losses.values()) - min(losses.values()) > 1e-2 * max(losses.values()):
        raise SystemExit(f"{name}, {stage.name}: the losses disagree: {losses}")
    tokens = amounts["text"] + amounts["visual"]
    rounds = args.tiny_rounds if name == "tiny" else args.rounds
    for (dtype, back_end), measured in interleaved(runs, rounds, args).items():
        yield {"model": f"{name}, {dtype}" if len(peaks) > 1 else name, "stage": stage.name, "tokens": tokens,
               "visual": amounts["visual"], "back_end": back_end, **measured, "peak_tflops": peaks[dtype],
               "tokens_per_s": tokens / measured["seconds"], "tflops": flop / measured["seconds"] / 1e12}


def learned_prompt(c: MonoInternVLConfig, tiles: int, batch: int, text: int = TEXT_TOKENS) -> dict:
    """A batch of prompts with pictures, of which the text after the visual tokens is learned."""
    ids, pixels = random_prompt(c, tiles, batch, "cpu", text)
    after = torch.arange(ids.shape[1]) >= ids.shape[1] - text // 2
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": None,
            "labels": ids.where(after, -100)}


def train(flags: TrainFlags, result: dict):
    """The tiny model on 16 samples of the embedded world; layers of the 2B model's width; and the model that
    the icons preset trains, with 9 visual and 26 text tokens in each of 32 samples."""
    dtype = "bfloat16" if flags.device == "cuda" else "float32"
    result |= {"ceilings": ceilings(getattr(torch, dtype), flags), "rows": []}
    peaks = {dtype: result["ceilings"]["matmul_tflops"]}
    with tempfile.TemporaryDirectory() as folder:
        tok = make_world_tokenizer(Path(folder))
    tiny = train_evip.tiny_config("evip++", tok)
    wide = MonoInternVLConfig.mono_internvl_1_5_2b(
        num_hidden_layers=flags.layers, vocab_size=max(1000, 92553 * flags.layers // 24),
        img_context_token_id=999)
    semantic, instruct = train_evip.RECIPES["evip++"][2::2]
    for stage in semantic, instruct:
        samples = collate([World(stage.name, tok, tiny)[i] for i in range(stage.batch)], tok.pad_id)
        prompts = learned_prompt(wide, flags.tiles, flags.batch)
        cases = [("tiny", tiny, samples, peaks), (f"{flags.layers} of 24 layers", wide, prompts, peaks)]
        if stage is semantic and flags.icons_layers:
            smol = MonoInternVLConfig(
                vocab_size=49163, hidden_size=576, intermediate_size=1536, attn_experts="qkvo",
                num_hidden_layers=flags.icons_layers, num_attention_heads=9, num_key_value_heads=3,
                img_context_token_id=49156, **train_evip.ICON_SIZES)
            peak = ceilings(torch.bfloat16, flags)["matmul_tflops"]
            cases.append(("icons", smol, learned_prompt(smol, 1, 32, text=26), peaks | {"bfloat16": peak}))
        for case in cases:
            for row in step_times(flags, stage, *case):
                record(result, "rows", row, flags)


def train_tables(result: dict) -> str:
    peak, rows = result["ceilings"]["matmul_tflops"], result["rows"]
    peaks = dict.fromkeys(f"{r.get('peak_tflops', peak):.3g}" for r in rows)           # older files have one
    dense = {(r["model"], r["stage"]): r["seconds"] for r in rows if r["back_end"] == "dense"}
    return f"Measured peak {' and '.join(peaks)} TFLOP/s.\n\n" + table([{
        "model": r["model"], "stage": r["stage"], "back end": r["back_end"],
        "tokens (visual)": f"{r['tokens']} ({r['visual']})",
        "ms per step (quartiles)": spread(r["seconds"], r["quartiles"], 1, 1e3),
        "tokens/s": f"{r['tokens_per_s']:.0f}",
        "share of peak": f"{r['tflops'] / r.get('peak_tflops', peak):.0%}",
        "× dense": f"{dense.get((r['model'], r['stage']), math.nan) / r['seconds']:.2f}"} for r in rows])


# ---------------------------------------------------------------- data

@dataclass
class DataFlags(Flags):
    tiles: list[int] = flag([1, 7, 25], "of a photo, with its thumbnail")
    workers: list[int] = flag([1, 8] if GPU else [1], "how many processes read samples")
    width: int = flag(3000, "of the photo, in pixels; it is two thirds as high")
    samples: int = flag(10, "that each process reads in a round")
    rounds: int = flag(5, "how often each case is timed")


def write_photo(path: Path, width: int) -> int:
    """Random patterns of many scales, as photos have them. Returns the bytes of the JPEG file."""
    pixels, size = 128, (2 * width // 3, width)
    for scale in (1, 4, 16, 64, 256):
        pattern = torch.randn(1, 3, *(n // scale + 2 for n in size))
        pixels = pixels + 3 * scale ** 0.5 * nn.functional.interpolate(pattern, size, mode="bilinear")[0]
    Image.fromarray(pixels.clamp(0, 255).byte().permute(1, 2, 0).numpy()).save(path, quality=90)
    return path.stat().st_size


def take(batches: Iterator[dict], number: int):
    for _ in range(number):
        next(batches)


def read_photos(flags: DataFlags, result: dict):
    """Times processes that read samples as in training, each a photo and a short text."""
    with tempfile.TemporaryDirectory() as name:
        folder, result["rows"] = Path(name), []
        tok, jpeg = make_world_tokenizer(folder), write_photo(folder / "photo.jpg", flags.width)
        result |= {"photo": f"{flags.width}×{2 * flags.width // 3}", "jpeg_mb": jpeg / 1e6}
        line = {"image": "photo.jpg", "conversations": turns("<image>\nWhat is it?", "a pattern.")}
        (folder / "lines.jsonl").write_text(json.dumps(line))
        config = MonoInternVLConfig.mono_internvl_2b(img_context_token_id=tok.token_id("<IMG_CONTEXT>"))
        for tiles, workers in itertools.product(flags.tiles, flags.workers):
            photos = JsonlDataset(folder / "lines.jsonl", folder, tok, config, max_tiles=max(1, tiles - 1))
            batches = iter(Batches(photos, 1, tok.pad_id, pool=1, workers=workers))
            pixels = next(batches)["pixel_values"]

            # One case at a time: between its rounds, a process would read ahead.
            case = functools.partial(take, batches, flags.samples * max(1, workers))
            [measured] = interleaved({"": case}, flags.rounds, flags, per=flags.samples).values()
            rate = 1 / measured["seconds"]
            record(result, "rows", {
                "tiles": len(pixels), "workers": workers, **measured, "samples_per_s": rate,
                "jpeg_mb_s": jpeg * rate / 1e6, "pixels_mb_s": pixels.nbytes * rate / 1e6}, flags)


def data_tables(result: dict) -> str:
    return f"A photo of {result['photo']} pixels, {result['jpeg_mb']:.1f} MB.\n\n" + table([{
        "tiles": r["tiles"], "processes": r["workers"],
        "ms per sample (quartiles)": spread(r["seconds"], r["quartiles"], 1, 1e3),
        "samples/s": f"{r['samples_per_s']:.1f}", "MB/s of JPEG": f"{r['jpeg_mb_s']:.1f}",
        "MB/s of tiles": f"{r['pixels_mb_s']:.0f}"} for r in result["rows"]])


# ---------------------------------------------------------------- all

QUICK = {"kernels": "--image_tiles 0 1 7 --rounds 5",
         "infer": "--tiles 1 7 --batches 1 --rounds 3" + " --layers 8" * GPU,          # less to compile
         "train": "--rounds 3 --tiny_rounds 10", "data": "--rounds 3"}


@dataclass
class AllFlags:
    out: str = flag("out/bench", "folder for the JSON files; `bench.py report` finds them in assets/")
    quick: bool = flag(False, "fewer sizes and rounds")


def measure_all(flags: AllFlags) -> int:
    kind, out, status = "gpu" if GPU else "cpu", Path(flags.out), 0
    out.mkdir(parents=True, exist_ok=True)
    if GPU:                                        # measures the tiles that the back end cuda then takes
        if moe_kernel.main() == 0:
            shutil.copy(moe_kernel.library(torch.device("cuda")).table, out / "moe_kernel_gpu.json")
        else:
            print("moe_kernel.cu: skipped, because it does not run here\n", flush=True)
    for name, options in QUICK.items():
        started = time.time()
        status |= main([name, *options.split() * flags.quick, f"--json={out}/bench_{name}_{kind}.json",
                        *[f"--png={out}/bench_{name}_{kind}.png"] * (name == "infer")])
        print(f"{name}: {time.time() - started:.0f} s\n", flush=True)
    return status


# ---------------------------------------------------------------- report: RESULTS.md

def tables_of(pattern: str, made_by: str, tables) -> str:
    """A heading, how it was measured, the tables and the picture of each file in assets/."""
    parts = []
    for file in sorted(Path("assets").glob(pattern)):
        result, picture = read_json(file), file.with_suffix(".png")
        made_on = f"{made_by.format(**result)}, {result.get('date', 'date not recorded')}."
        parts += [f"#### `{file}`", made_on, tables(result)]
        parts += [f"![The same as a picture]({picture})"] * picture.exists()
    return "\n\n".join(parts)


def report() -> int:
    """Writes RESULTS.md: assets/results.md with the tables of the measurements in assets/. Both folders are
    in the current one."""
    if not Path("assets/results.md").exists():
        raise InputError("there is no assets/results.md: run this in the folder of the project")
    runs = [read_json(f"assets/results_seed{seed}.json") for seed in (0, 1)]
    icons = [read_json(f"assets/{name}.json") for name in ("icons", "icons_seed1")]
    ablations, timed = read_json("assets/ablation.json"), "`{command}` on {hardware}, torch {torch}, {clock}"
    values = {
        "torch": runs[0]["torch"], "seconds": f"{runs[0]['seconds']:.0f}",
        "before": f"{runs[0]['S1.1']['text loss before']:.6f}",
        "after": f"{runs[0]['S1.2']['text loss after']:.6f}",
        "accuracy": table([{
            "task": task, **{f"seed {run['seed']}": f"{run['tasks'][task]['accuracy']:.0%}" for run in runs},
            "blank image (seed 0)": f"{row['blank']:.0%}", "chance": f"{row['chance']:.0%}"}
            for task, row in runs[0]["tasks"].items()]),
        "icons": tables_of("icons.json", "`{command}`, {hardware}, torch {torch}", lambda result: table([
            {"questions": name, "number": row["n"], "right": f"{row['accuracy']:.1%}",
             "blank picture": f"{row['blank']:.1%}"} for name, row in result["tasks"].items()])),
        "icon_seeds": table([{
            "questions": name, "number": row["n"],
            **{f"{stage}, seed {run['seed']}": f"{run[tasks][name]['accuracy']:.1%}"
               for stage, tasks in (("S1.2", "tasks after S1.2"), ("S2", "tasks")) for run in icons}}
            for name, row in icons[1]["tasks after S1.2"].items()]),
        "ablation_torch": ablations["torch"], "ablation": ablation_table(ablations),
        "icon_ablation": tables_of("ablation_icons*.json", "`{command}`, {hardware}, torch {torch}",
                                   ablation_table),
        "train": tables_of("bench_train_*.json", timed, train_tables),
        "infer": tables_of("bench_infer_*.json", timed, infer_tables),
        "kernels": tables_of("bench_kernels_*.json", timed, kernels_tables),
        "data": tables_of("bench_data_*.json", timed, data_tables),
        "chosen": tables_of("moe_kernel_*.json", "`python moe_kernel.py` on {device}, torch {torch}",
                            lambda result: chosen_table(result["microseconds"])),
        "resources": tables_of("kernel_resources*.json", "`{command}`, nvcc {nvcc}", resources_table)}
    text = Template(Path("assets/results.md").read_text(encoding="utf-8")).substitute(values)
    Path("RESULTS.md").write_text(text, encoding="utf-8")
    return 0


# ---------------------------------------------------------------- main

COMMANDS = {"kernels": (KernelsFlags, kernels), "resources": (ResourcesFlags, resources),
            "infer": (InferFlags, infer), "train": (TrainFlags, train), "data": (DataFlags, read_photos)}


def main(argv: list[str] | None = None) -> int:
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if argv[0] not in (*COMMANDS, "all", "report"):
        print(__doc__)
        return 0 if argv[0] in ("-h", "--help") else 2
    try:
        if argv[0] == "report":
            return report()
        if argv[0] == "all":
            return measure_all(parse_flags(AllFlags, argv[1:]))
        flags_of, run = COMMANDS[argv[0]]
        flags = parse_flags(flags_of, argv[1:])
        result = provenance(argv, flags)
        run(flags, result)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    if flags.json:
        Path(flags.json).write_text(json.dumps(result) + "\n")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
