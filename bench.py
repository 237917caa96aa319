"""Every measured number of the README comes from here.

    python bench.py kernels [--json FILE] [--markdown]   the routed feed-forward layer
    python bench.py infer [--json FILE] [--png FILE] [--markdown]    time to first token, decoding rate
    python bench.py train [--json FILE] [--markdown]     optimizer steps of the tiny model and of full width

A run checks each back end against the dense reference before it times it, prints rows as they come, and ends
with one line of JSON that names the hardware and the versions; --markdown makes the README's table of it.
"""
import argparse
import functools
import json
import math
import platform
import random
import re
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import budget
import train_evip
from common import InputError
from data import Tokenizer, collate, load_image, sample_numbers
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

TEXT_TOKENS, TOKENS_PER_TILE = 64, 256


# ---------------------------------------------------------------- measuring

def hardware(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def times_in_ms(run, buffers: int, device: str, seconds: float, clock=time.perf_counter) -> list[float]:
    """run(i) works on the i-th of several sets of tensors: caches must not hold what the next call needs.

    On a GPU each set's work is captured as a CUDA graph and events time ten replays in a row: the device's
    time, neither Python's nor that of a launch. On a CPU: wall time.
    """
    for i in range(buffers):
        run(i)                                                             # builds, allocates, warms up
    if device == "cuda":
        graphs = [torch.cuda.CUDAGraph() for _ in range(buffers)]
        for i, graph in enumerate(graphs):
            with torch.cuda.graph(graph):
                run(i)
    times, until, i = [], time.perf_counter() + seconds, 0
    while len(times) < 5 or time.perf_counter() < until:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for j in range(i, i + 10):
                graphs[j % buffers].replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 10)
        else:
            start = clock()
            run(i % buffers)
            times.append((clock() - start) * 1e3)
        i += 1
    return times[len(times) // 10:]                                        # in the first, clocks still settle


def keep(result: dict, args) -> None:
    """What was measured so far: the process may be killed for memory before the end."""
    if args.json:
        Path(args.json).write_text(json.dumps(result) + "\n")


def replayed(run, device: str):
    """run itself; on a GPU a replay of its work, captured as a CUDA graph, until it is done."""
    if device != "cuda":
        return run
    run()                                                                  # builds, warms up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return lambda: (graph.replay(), torch.cuda.synchronize())


def ceilings(device: str, dtype: torch.dtype, seconds: float, clock=time.perf_counter) -> dict[str, float]:
    """What this machine's library reaches: a large matrix product, and a copy (bytes read plus written)."""
    n, size = (8192, 2 ** 30) if device == "cuda" else (1024, 2 ** 27)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    matmul = statistics.median(times_in_ms(lambda i: a @ b, 1, device, seconds, clock))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = statistics.median(times_in_ms(lambda i: target.copy_(source), 1, device, seconds, clock))
    return {"matmul_tflops": 2 * n ** 3 / matmul / 1e9, "copy_gb_s": 2 * size / copy / 1e6}


# ---------------------------------------------------------------- kernels

class FeedForwardCase:
    """One layer's routed feed-forward on one prompt: tiles of 256 visual tokens between 64 text tokens."""

    def __init__(self, tokens: int, config: MonoInternVLConfig,
                 dtype: torch.dtype, device: str, buffers: int):
        self.visual = torch.zeros(1, tokens, dtype=torch.bool, device=device)
        self.visual[:, TEXT_TOKENS // 2:tokens - TEXT_TOKENS // 2] = tokens > TEXT_TOKENS
        with torch.device(device):
            self.experts = [[self.scaled(FeedForward(config)).to(dtype) for _ in ("text", "visual")]
                            for _ in range(buffers)]
            self.x = [torch.randn(1, tokens, config.hidden_size).to(dtype) for _ in range(buffers)]
        visual = self.visual[0]
        self.sorted = [(x[0, ~visual].contiguous(), x[0, visual].contiguous()) for x in self.x]
        used = 1 + bool(visual.any())
        ffn = 3 * config.hidden_size * config.intermediate_size            # weights of an expert
        self.flop = 2 * ffn * tokens                                       # useful ones: one expert a token
        self.bytes = (used * ffn + 2 * tokens * config.hidden_size) * dtype.itemsize

    @staticmethod
    def scaled(expert: FeedForward) -> FeedForward:
        for weight in expert.requires_grad_(False).parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        return expert

    def run(self, back_end: str):
        """A function of the buffer's number that runs the layer; one routing, as in a forward pass."""
        if back_end == "two cuBLAS calls":                                 # rows lie sorted: nothing is moved
            return lambda i: [expert(x) for expert, x in zip(self.experts[i], self.sorted[i], strict=True)
                              if len(x)]
        name, _, tile = back_end.partition(" ")                            # "cuda 1": that tile only
        routing = Routing(self.visual, backend=name)
        if not tile:
            return lambda i: mmoe_swiglu(self.x[i], *self.experts[i], routing)
        where = routing.permutation, routing.counts

        def forced(i):
            t, v = self.experts[i]
            first = t.w1.weight, t.w3.weight, v.w1.weight, v.w3.weight
            h = torch.ops.mono_internvl.moe_swiglu(self.x[i][0], *first, *where, int(tile))
            y = torch.ops.mono_internvl.moe_linear(h, t.w2.weight, v.w2.weight, *where, None, False, True,
                                                   int(tile))
            return y[None]
        return forced

    def check(self, back_end: str) -> None:
        y = self.run(back_end)(0)
        expected = self.run("dense")(0).double()
        if isinstance(y, list):
            visual = self.visual[0]
            y = torch.cat(y)[None]
            expected = torch.cat((expected[:, ~visual], expected[:, visual]), 1)
        error = ((y.double() - expected).norm() / expected.norm()).item()
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
    device = args.device
    back_ends = ["dense", "torch", "cuda"] + ["two cuBLAS calls"] * (device == "cuda")
    back_ends += [f"cuda {tile}" for tile in (1, 2, 3)] * args.kernel_tiles
    config = MonoInternVLConfig(hidden_size=args.hidden_size, intermediate_size=args.intermediate_size)
    buffers, rows, limits = 3, [], {}
    for dtype in [torch.bfloat16] if device == "cuda" else [torch.float32, torch.bfloat16]:
        name = str(dtype).removeprefix("torch.")
        limits[name] = ceilings(device, dtype, args.seconds)
        for tokens in (TEXT_TOKENS + TOKENS_PER_TILE * tiles for tiles in args.image_tiles):
            case = FeedForwardCase(tokens, config, dtype, device, buffers)
            for back_end in back_ends:
                case.check(back_end)
                run = case.run(back_end)
                low, median, high = statistics.quantiles(times_in_ms(run, buffers, device, args.seconds), n=4)
                row = {"dtype": name, "tokens": tokens, "back_end": back_end, "ms": median,
                       "ms_quartiles": [low, high],
                       "tflops": case.flop / median / 1e9, "gb_s": case.bytes / median / 1e6,
                       "peak_mb": peak_memory_mb(run) if device == "cuda" else None}
                rows.append(row)
                print(f"{name:9}{tokens:6} {back_end:17}{median:9.3f} ms ({low:.3f}–{high:.3f})", flush=True)
    return {"bench": "kernels", "hardware": hardware(device), "torch": torch.__version__, "device": device,
            "hidden_size": args.hidden_size, "intermediate_size": args.intermediate_size, "ceilings": limits,
            "rows": rows}


def markdown(result: dict) -> str:
    """The README's table. Quartiles in brackets; matmul and copy: shares of these ceilings."""
    cuda_is = "" if result["device"] == "cuda" else ", `cuda` = moe_kernel.cu run by cuda_on_cpu.h"
    lines = [f"{result['hardware']}; torch {result['torch']}; feed-forward of one layer, hidden size "
             f"{result['hidden_size']}, intermediate size {result['intermediate_size']}{cuda_is}.", "",
             *[f"Measured ceilings, {name}: {limit['matmul_tflops']:.3g} TFLOP/s (matrix product), "
               f"{limit['copy_gb_s']:.4g} GB/s (copy)." for name, limit in result["ceilings"].items()], "",
             "| dtype | tokens | back end | ms (quartiles) | TFLOP/s | matmul | copy | peak MB | × dense |",
             "|---|---|---|---|---|---|---|---|---|"]
    for r in result["rows"]:
        limit = result["ceilings"][r["dtype"]]
        dense = next(d["ms"] for d in result["rows"]
                     if (d["dtype"], d["tokens"], d["back_end"]) == (r["dtype"], r["tokens"], "dense"))
        peak = "–" if r["peak_mb"] is None else f"{r['peak_mb']:.1f}"
        lines.append(f"| {r['dtype']} | {r['tokens']} | {r['back_end']} | {r['ms']:.3f} ("
                     f"{r['ms_quartiles'][0]:.3f}–{r['ms_quartiles'][1]:.3f}) | {r['tflops']:.3g} | "
                     f"{r['tflops'] / limit['matmul_tflops']:.0%} | "
                     f"{r['gb_s'] / limit['copy_gb_s']:.0%} | {peak} | {dense / r['ms']:.2f} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- infer

class Modular(MonoInternVL):
    """The modular counterpart from the same parts: InternViT-300M (24 layers, 1024 wide, 16 heads, MLP 4096,
    1025 tokens a tile), pixel shuffle, MLP, and the same LLM without visual experts. Random weights: latency
    does not depend on them. With fewer layers of the LLM, in proportion, the encoder has fewer as well."""

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
        # The MLP is that of our model, which is narrower at the reduced size: the first channels go into it.
        return self.mlp1(pixel_shuffle(x[:, :self.config.vision_hidden_size], self.config.shuffle))

    def route(self, input_ids, attention_mask, has_images):
        return None                                                        # all is text to this LLM

    def flop(self, tiles: int) -> int:
        n, layers = 1025, self.config.num_hidden_layers
        return tiles * layers * (2 * n * 12 * 1024 ** 2 + 4 * n * n * 1024)


def interleaved(cases: dict, rounds: int, clock) -> dict[tuple, list[float]]:
    """Seconds of each case in each round. A round runs all of them, so that whatever else the machine does
    meets all alike."""
    times = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return times


def spread(values: list[float]) -> dict:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")           # within what was seen
    return {"seconds": median, "quartiles": [low, high], "runs": len(values)}


def prompt(c: MonoInternVLConfig, tiles: int, batch: int, device: str):
    """64 text tokens around the visual tokens of so many tiles, and the tiles."""
    ids = torch.randint(3, c.img_context_token_id, (batch, TEXT_TOKENS + tiles * c.tokens_per_tile))
    ids[:, TEXT_TOKENS // 2:ids.shape[1] - TEXT_TOKENS // 2] = c.img_context_token_id
    pixels = torch.randn(batch * tiles, 3, c.image_size, c.image_size) if tiles else None
    return ids.to(device), None if pixels is None else pixels.to(device)


def first_token(model, back_end: str, cache: KVCache, ids, pixels):
    def run():
        model.moe, cache.input_ids = back_end, []        # the cache's memory is used again, not its content
        next(model.generate(ids, pixels, max_new_tokens=1, kv_cache=cache))
    return run


def decoding(model, mode: str, cache: KVCache, batch: int, columns: int, steps: int):
    """Greedy decoding as in generate, after a prompt of so many columns (what they hold costs the same)."""
    weight = model.language_model.output.weight
    cache.reserve(batch, columns + steps, weight.dtype, weight.device)

    def run():
        model.cuda_graphs, model.compile_decode = "graph" in mode, "compile" in mode
        cache.length, cache.real[:, :columns], cache.real[:, columns:] = columns, True, False
        token = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        for _ in range(steps):
            token = decode(model, token, cache).argmax(-1)
            token.tolist()                                                 # the one sync of a step
    return run


def random_models(config: MonoInternVLConfig, dtype, device) -> tuple[MonoInternVL, Modular]:
    """Ours and the modular counterpart, which share every tensor that both have: 2B fit into memory twice."""
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


@torch.inference_mode()
def infer(args) -> dict:
    share = args.layers / 24
    config = MonoInternVLConfig.mono_internvl_1_5_2b(
        num_hidden_layers=args.layers, img_context_token_id=1000, vocab_size=round(92553 * share),
        vision_hidden_size=8 * round(1024 * share / 8))
    result = {"bench": "infer", "hardware": hardware(args.device), "torch": torch.__version__,
              "device": args.device, "layers": args.layers, "parameters": 0,
              "clock": "CPU time" if args.cpu_time else "wall time",
              "ceilings": {}, "prefill": [], "decode": [], "text_only": [], "fused": [], "long_cache": []}
    for dtype in [torch.bfloat16] if args.device == "cuda" else [torch.bfloat16, torch.float32]:
        infer_in(dtype, config, args, result)
    return result


def infer_in(dtype: torch.dtype, config: MonoInternVLConfig, args, result: dict) -> None:
    """Appends to `result` what is measured in one dtype."""
    device, on_gpu, name = args.device, args.device == "cuda", str(dtype).removeprefix("torch.")
    clock = time.process_time if args.cpu_time else time.perf_counter
    limit = result["ceilings"][name] = ceilings(device, dtype, args.seconds, clock)
    torch.manual_seed(0)
    ours, modular = random_models(config, dtype, device)
    result["parameters"] = sum(p.numel() for p in ours.parameters())
    cache, columns = KVCache(config), lambda tiles: TEXT_TOKENS + tiles * TOKENS_PER_TILE
    # float32 on a CPU: only what the targets are about
    tiles_of = args.tiles if on_gpu or dtype == torch.bfloat16 else [t for t in args.tiles if t in (2, 7)]
    check_back_ends(ours, args.back_ends, config, device)
    for batch in args.batches if on_gpu else [1]:
        cases = {}
        for tiles in tiles_of:
            inputs = prompt(config, tiles, batch, device)
            for back_end in args.back_ends:
                cases[tiles, back_end] = first_token(ours, back_end, cache, *inputs)
            if dtype == torch.bfloat16:
                cases[tiles, "modular"] = first_token(modular, "torch", cache, *inputs)
        for (tiles, _), run in cases.items():
            if tiles == tiles_of[0] or on_gpu:
                run()                                                      # warms up
        for (tiles, back_end), seconds in interleaved(cases, args.rounds, clock).items():
            flop = budget.prefill_flop(config, columns(tiles), tiles, experts=1 + (back_end == "dense"))
            flop = batch * (flop + modular.flop(tiles) * (back_end == "modular"))
            model = modular if back_end == "modular" else ours
            read = sum(p.nbytes for n, p in model.named_parameters() if "tok_embeddings" not in n)
            floor = max(flop / limit["matmul_tflops"] / 1e12, read / limit["copy_gb_s"] / 1e9)
            row = {"dtype": name, "batch": batch, "tiles": tiles, "tokens": columns(tiles),
                   "back_end": back_end, **spread(seconds), "floor": floor}
            result["prefill"].append(row)
            print(f"{name} first token, batch {batch}, {tiles:2} tiles, {back_end:8}{row['seconds']:9.4f}"
                  f" s ({row['floor'] / row['seconds']:.0%} of its floor)", flush=True)
    for tokens in (64, 256):
        ids = torch.randint(3, 1000, (1, tokens), device=device)
        times = interleaved({model: first_token(model, "torch", cache, ids, None)
                             for model in (ours, modular)}, 3 * args.rounds, clock)
        row = {"dtype": name, "tokens": tokens, "seconds": statistics.median(times[ours]),
               "plain_llm": statistics.median(times[modular])}
        result["text_only"].append(row)
        print(f"{name} {tokens} text tokens: {row['plain_llm'] / row['seconds']:.3f} × the plain LLM's speed",
              flush=True)
    result["long_cache"].append(row := {"dtype": name, **long_cache(ours, args, clock)})
    print(f"{name} decoding at 2000 columns: {row['ratio']:.3f} × the time at 200, attention aside")
    for tokens in (1, columns(2)):
        result["fused"].append(row := {"dtype": name, "tokens": tokens,
                                       **fused_weights(ours, tokens, args, clock)})
        print(f"{name} w1 and w3 as one matrix, {tokens} tokens: {row['ratio']:.3f} × the speed of two")
    keep(result, args)
    modes = ["plain"] + ["graph", "graph + compile"] * on_gpu + ["compile"] * args.compile
    for batch in args.batches:
        cases = {(tiles, mode): decoding(ours, mode, cache, batch, columns(tiles), args.steps)
                 for tiles in tiles_of for mode in modes}
        for (tiles, _), run in cases.items():
            if tiles == tiles_of[0] or on_gpu:
                run()                                                      # captures, compiles
        for (tiles, mode), seconds in interleaved(cases, 3 * args.rounds, clock).items():
            read = budget.decode_bytes(config, columns(tiles), batch, dtype.itemsize)
            row = {"dtype": name, "batch": batch, "tiles": tiles, "columns": columns(tiles), "mode": mode,
                   **spread([s / args.steps for s in seconds]), "floor": read / limit["copy_gb_s"] / 1e9}
            result["decode"].append(row)
            print(f"{name} decoding, batch {batch:2}, {columns(tiles):4} columns, {mode:15}"
                  f"{batch / row['seconds']:9.2f} tokens/s ({row['floor'] / row['seconds']:.0%} of the "
                  "floor)", flush=True)
        keep(result, args)


def check_back_ends(model, back_ends, config, device):
    """Speed counts only where the answer is right."""
    ids, pixels = prompt(config, 1, 1, device)
    logits = {}
    for model.moe in ("dense", *back_ends):
        logits[model.moe] = model(ids, pixels)[0].double()
    for back_end, got in logits.items():
        error = ((got - logits["dense"]).norm() / logits["dense"].norm()).item()
        if not error < (1e-4 if model.language_model.output.weight.dtype == torch.float32 else 0.05):
            raise SystemExit(f"{back_end} is wrong: error {error:.1e}")


def attention_alone(c: MonoInternVLConfig, weight, visible: int, steps: int):
    """The part of attention in decoding steps that see so many columns, each layer with its own."""
    random = functools.partial(torch.randn, dtype=weight.dtype, device=weight.device)
    q = random(1, c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads, c.head_dim)
    keys, values = random(2, c.num_hidden_layers, 1, c.num_key_value_heads, visible, c.head_dim)
    mask = q.new_zeros(1, 1, 1, visible)

    def run():
        for _ in range(steps):
            for k, v in zip(keys, values, strict=True):
                nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return run


def long_cache(model, args, clock) -> dict:
    """A step at 2,000 cached tokens against one at 200, without what attention itself takes in both."""
    c, cache, mode = model.config, KVCache(model.config), "graph" if args.device == "cuda" else "plain"
    weight, cases = model.language_model.output.weight, {}
    for n in (200, 2000):
        cases[n, "step"] = decoding(model, mode, cache, 1, n, args.steps)
        cases[n, "step"]()
        visible = -(-n // cache.block_size) * cache.block_size
        cases[n, "attention"] = replayed(attention_alone(c, weight, visible, args.steps), args.device)
    times = {case: statistics.median(t) for case, t in interleaved(cases, 3 * args.rounds, clock).items()}
    rest = {n: times[n, "step"] - times[n, "attention"] for n in (200, 2000)}
    return {"step_200": times[200, "step"] / args.steps, "step_2000": times[2000, "step"] / args.steps,
            "attention_200": times[200, "attention"] / args.steps,
            "attention_2000": times[2000, "attention"] / args.steps, "ratio": rest[2000] / rest[200]}


def fused_weights(model, tokens: int, args, clock) -> dict:
    """Seconds of a layer's first two products, as they are and with w1 and w3 in one matrix."""
    experts = [layer.feed_forward for layer in model.language_model.model["layers"][:4]]
    fused = [torch.cat([e.w1.weight, e.w3.weight]) for e in experts]
    x = torch.randn(tokens, experts[0].w1.in_features, dtype=fused[0].dtype, device=fused[0].device)
    cases = {"two": lambda: [(e.w1(x), e.w3(x)) for e in experts],
             "one": lambda: [nn.functional.linear(x, w) for w in fused]}
    times = interleaved({name: replayed(run, args.device) for name, run in cases.items()},
                        9 * args.rounds, clock)
    two, one = (statistics.median(t) / len(experts) for t in times.values())
    return {"two": two, "one": one, "ratio": two / one}


def infer_markdown(result: dict) -> str:
    """The README's tables: medians, quartiles in brackets; floor: the share of it that was reached."""
    def cell(r, scale):
        if r is None:
            return "–"
        low, median, high = (f"{scale * t:.{3 if scale == 1 else 2}f}" for t in (
            r["quartiles"][0], r["seconds"], r["quartiles"][1]))
        return f"{median} ({low}–{high})"

    def table(rows, column, unit, more, scale):
        """A line for each dtype, batch and number of tiles, a column for each value of `column`."""
        names, groups = list(dict.fromkeys(r[column] for r in rows)), {}
        for r in rows:
            groups.setdefault((r["dtype"], r["batch"], r["tiles"]), {})[r[column]] = r
        titles = ["dtype", "batch", "tiles", *(f"{name}, {unit}" for name in names), *more]
        lines = [[*key, *(cell(group.get(name), scale) for name in names), *(f(group) for f in more.values())]
                 for key, group in groups.items()]
        return [f"| {' | '.join(map(str, line))} |" for line in [titles, ["---"] * len(titles), *lines]]

    def best(group):
        return min((r for n, r in group.items() if n not in ("dense", "modular")), key=lambda r: r["seconds"])

    def floor(group):
        return f"{best(group)['floor'] / best(group)['seconds']:.0%}"
    return "\n".join([
        f"{result['hardware']}; torch {result['torch']}; {result['layers']} of 24 layers of full width "
        f"({result['parameters'] / 1e6:.0f} M parameters), {result['clock']}.", "",
        *table(result["prefill"], "back_end", "s", {
            "dense / torch": lambda g: f"{g['dense']['seconds'] / g['torch']['seconds']:.2f}",
            "by operations": lambda g: f"{g['dense']['floor'] / g['torch']['floor']:.2f}",
            "less than modular": lambda g: "–" if "modular" not in g else
            f"{1 - best(g)['seconds'] / g['modular']['seconds']:.0%}",
            "floor": floor}, 1), "",
        *table(result["decode"], "mode", "ms a step", {
            "tokens/s": lambda g: f"{best(g)['batch'] / best(g)['seconds']:.1f}", "floor": floor}, 1e3), "",
        *[f"Text alone, {r['dtype']}, {r['tokens']} tokens: {r['plain_llm'] / r['seconds']:.3f} × the speed "
          "of the plain LLM." for r in result["text_only"]],
        *[f"A step at 2,000 cached tokens, {r['dtype']}: {r['ratio']:.2f} × one at 200, attention's own part "
          "aside." for r in result["long_cache"]],
        *[f"w1 and w3 as one matrix, {r['dtype']}, {r['tokens']} tokens: {r['ratio']:.2f} × the speed of two."
          for r in result["fused"]]])


def plot_infer(result: dict, path: str):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    dtype = result["prefill"][0]["dtype"]
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


# ---------------------------------------------------------------- train

def train_cases(args, folder: Path) -> dict:
    """{(model, stage): (config, batch)}: 16 samples of the embedded world for the tiny model, prompts with
    pictures for layers of the 2B model's width; half of the text is learned."""
    tok, cases = make_world_tokenizer(folder), {}
    c = train_evip.tiny_config("evip++", tok)
    for stage in train_evip.RECIPES["evip++"][2::2]:                       # S1.2 and S2
        samples = [World(stage.name, tok, c)[i] for i in range(stage.batch)]
        cases["tiny", stage] = c, collate(samples, tok.pad_id)
        wide = MonoInternVLConfig.mono_internvl_1_5_2b(
            num_hidden_layers=args.layers, vocab_size=max(1000, 92553 * args.layers // 24),
            img_context_token_id=999)
        ids, pixels = prompt(wide, args.tiles, args.batch, "cpu")
        after = torch.arange(ids.shape[1]) >= ids.shape[1] - TEXT_TOKENS // 2          # the visual tokens
        labels = ids.where(after, -100)
        cases[f"{args.layers} of 24 layers", stage] = wide, {
            "input_ids": ids, "pixel_values": pixels, "labels": labels, "attention_mask": None}
    return cases


def training_step(model, batch: dict, optimizer, back_end: str, autocast):
    def run() -> float:
        model.moe = back_end
        with autocast:
            loss = model(**batch)[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return run


def train(args) -> dict:
    """Whole optimizer steps: forward, backward, clipping, AdamW. On a GPU in bfloat16."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    limit, rows = ceilings(args.device, dtype, args.seconds, clock), []
    with tempfile.TemporaryDirectory() as folder:
        cases = train_cases(args, Path(folder))
    for (name, stage), (config, batch) in cases.items():
        torch.manual_seed(0)
        model = MonoInternVL(config)
        train_evip.select_trainable(model, stage)
        for p in model.parameters():
            p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
        model.to(args.device)
        owner = sample_numbers(batch)
        visual = len(batch["pixel_values"]) * config.tokens_per_tile
        lengths = owner[owner >= 0].bincount()
        rates = budget.flop_rates({n: p.shape for n, p in model.named_parameters()},
                                  train_evip.trainable_names(model, stage), config)
        flop = (rates["text"] * (int(lengths.sum()) - visual) + rates["visual"] * visual
                + rates["labels"] * int((batch["labels"][:, 1:] != -100).sum())
                + rates["pairs"] * int(lengths.square().sum()) / 2)
        batch = {k: v.to(args.device) for k, v in batch.items() if v is not None}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
        autocast = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
        runs = {back_end: training_step(model, batch, optimizer, back_end, autocast)
                for back_end in args.back_ends}
        losses = {back_end: run() for back_end, run in runs.items()}       # warms up as well
        if max(losses.values()) - min(losses.values()) > 1e-2 * max(losses.values()):
            raise SystemExit(f"{name}, {stage.name}: the back ends disagree: {losses}")
        rounds = args.tiny_rounds if name == "tiny" else args.rounds
        for back_end, seconds in interleaved(runs, rounds, clock).items():
            row = {"model": name, "stage": stage.name, "tokens": int(lengths.sum()), "visual": visual,
                   "back_end": back_end, **spread(seconds)}
            row |= {"tokens_per_s": row["tokens"] / row["seconds"], "tflops": flop / row["seconds"] / 1e12}
            rows.append(row)
            print(f"{name:18}{stage.name:6}{back_end:8}{row['seconds'] * 1e3:10.1f} ms a step, "
                  f"{row['tokens_per_s']:8.0f} tokens/s", flush=True)
        del model, optimizer, runs
    return {"bench": "train", "hardware": hardware(args.device), "torch": torch.__version__,
            "device": args.device, "clock": clock.__name__, "ceilings": limit, "rows": rows}


def train_markdown(result: dict) -> str:
    """The README's table. Share of peak: useful operations over what a large matrix product reaches."""
    peak = result["ceilings"]["matmul_tflops"]
    lines = [f"{result['hardware']}; torch {result['torch']}; measured peak {peak:.3g} TFLOP/s; "
             f"{result['clock']}.", "",
             "| model | stage | tokens (visual) | back end | ms a step (quartiles) | tokens/s "
             "| share of peak | × dense |", "|---|---|---|---|---|---|---|---|"]
    for r in result["rows"]:
        dense = next((d["seconds"] for d in result["rows"] if d["back_end"] == "dense"
                      and (d["model"], d["stage"]) == (r["model"], r["stage"])), math.nan)
        low, high = (q * 1e3 for q in r["quartiles"])
        lines.append(f"| {r['model']} | {r['stage']} | {r['tokens']} ({r['visual']}) | {r['back_end']} "
                     f"| {r['seconds'] * 1e3:.1f} ({low:.1f}–{high:.1f}) | {r['tokens_per_s']:.0f} "
                     f"| {r['tflops'] / peak:.0%} | {dense / r['seconds']:.2f} |")
    return "\n".join(lines)


# ---------------------------------------------------------------- ablation: the paper's claims, tried out

VARIANTS = {                           # of S1.1 and S1.2: what differs from the first
    "delta tuning, 1.5": {},
    "full fine-tuning, 1.5": {"trainable": "all"},
    "delta tuning, v1": {"attn_experts": ""},
    "delta tuning, 1.5, random experts": {"copy_experts": False},
}


def describe(model: MonoInternVL, tok: Tokenizer, n: int) -> dict[str, float]:
    """Which part of held-out pictures, n of a kind, the model describes rightly, and of as many grey ones."""
    def said(caption):                 # in any order, without the words that fill it
        return {frozenset(re.findall(r"\w+", part)) - {"a", "is"} for part in re.split("[.,]", caption)}
    c, right = model.config, {}
    rng = random.Random("test")
    pictures = [make_picture(rng, kind, "test") for kind in KINDS for _ in range(n)]
    for name in ("right", "blank"):
        images = [p.image if name == "right" else Image.new("RGB", p.image.size, "gray") for p in pictures]
        answers = answer(model, tok, [(load_image(image, c.max_dynamic_patch, c.image_size),
                                       "Describe the image.") for image in images])
        pairs = zip(answers, pictures, strict=True)
        right[name] = sum(said(a) == said(p.text) for a, p in pairs) / len(pictures)
    return right


def ablation(flags: train_evip.Flags, seeds: int = 3) -> dict:
    """Trains each variant through S1.1 and S1.2 on a CPU: from one S0 (or --init_from), on the same samples
    of the embedded world, for as many steps. Writes out/ablation/results.json and returns what it holds."""
    started, out, rows = time.time(), Path(flags.out or "out/ablation"), []
    s0, *stages = train_evip.RECIPES["evip++"][:3]

    def train(model: MonoInternVL, stage, flags, tok: Tokenizer):
        dataset = World(stage.name, tok, model.config, stage.max_tiles, flags.seed)
        if not train_evip.train_stage(model, dataset, stage, flags, train_evip.Progress(out / "log.jsonl"), tok):
            raise InputError("the ablation was stopped; asked for again, it starts anew")

    for seed in range(flags.seed, flags.seed + seeds):
        flags = replace(flags, seed=seed, device="cpu", dtype="float32")
        torch.manual_seed(seed)
        _, tok, build = train_evip.origin(flags, s0, True, out)
        llm = build()
        if flags.init_from is None:
            train(llm, s0, flags, tok)
        for name, change in VARIANTS.items():
            print(f"seed {seed}: {name}", flush=True)
            torch.manual_seed(seed)    # new weights, but for the LLM's
            model = MonoInternVL(replace(llm.config, attn_experts=change.get("attn_experts", "qkvo")))
            kept = {n: w for n, w in llm.state_dict().items() if n.startswith("lang") and "_ve." not in n}
            model.load_state_dict(kept, strict=False)
            if change.get("copy_experts", True):
                model.copy_text_experts()
            logits, before = text_probe(model, tok)
            for stage in stages:
                train(model, replace(stage, trainable=change.get("trainable", stage.trainable)), flags, tok)
            logits_after, after = text_probe(model, tok)
            # every sample is new, so the training loss says what is learned; its mean in tenths of S1.2
            steps = flags.steps or stages[-1].steps
            lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()[-steps:]
            tenths = torch.tensor([json.loads(line)["loss"] for line in lines]).tensor_split(min(10, steps))
            rows.append({"variant": name, "seed": seed, "text before": before, "text after": after,
                         "text bitwise equal": torch.equal(logits, logits_after),
                         **describe(model, tok, flags.eval_questions),
                         "caption loss": [tenth.mean().item() for tenth in tenths]})
    results = {"torch": torch.__version__, "threads": torch.get_num_threads(),
               "seconds": time.time() - started, "steps": [flags.steps or stage.steps for stage in stages],
               "batch_size": flags.batch_size or s0.batch, "pictures": len(KINDS) * flags.eval_questions,
               "rows": rows}
    (out / "results.json").write_text(json.dumps(results, indent=1))
    return results


def ablation_table(results: dict) -> str:
    """Markdown: mean ± standard deviation over the seeds."""
    lines = ["| S1.1 and S1.2 by | text loss before | after | bitwise equal | described rightly | blank image"
             " | caption loss |", "|---|---|---|---|---|---|---|"]
    for name in VARIANTS:
        rows = [{**row, "caption loss": row["caption loss"][-1]} for row in results["rows"]
                if row["variant"] == name]
        cells = ["yes" if all(row["text bitwise equal"] for row in rows) else "no"]
        for column, form in (("text before", ".3f"), ("text after", ".3f"),
                             ("right", ".0%"), ("blank", ".0%"), ("caption loss", ".3f")):
            values = [row[column] for row in rows]
            spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):{form}}{spread}")
        lines.append("| " + " | ".join([name, *cells[1:3], cells[0], *cells[3:]]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    on_gpu = torch.cuda.is_available()
    p = commands.add_parser("kernels", help="the routed feed-forward layer on each back end",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.set_defaults(run=kernels, table=markdown)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    p.add_argument("--hidden-size", type=int, default=2048 if on_gpu else 256)
    p.add_argument("--intermediate-size", type=int, default=8192 if on_gpu else 1024)
    p.add_argument("--image-tiles", type=int, nargs="+", default=[0, 1, 2, 4, 7, 13] if on_gpu else [0, 1, 2],
                   help="prompts: this many tiles of 256 visual tokens, and 64 text tokens")
    p.add_argument("--kernel-tiles", action="store_true", help="also each tile of moe_kernel.cu, for tuning")
    p.add_argument("--seconds", type=float, default=1.0, help="how long to repeat each measurement")
    p.add_argument("--json", metavar="FILE", help="also write the result here")
    p.add_argument("--markdown", action="store_true", help="also print the README's table")
    p = commands.add_parser("infer", help="time to first token and decoding rate of whole models",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.set_defaults(run=infer, table=infer_markdown)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    p.add_argument("--layers", type=int, default=24 if on_gpu else 1,
                   help="of full width; vocabulary, vision embedding and encoder in proportion")
    p.add_argument("--tiles", type=int, nargs="+", default=[1, 2, 4, 7, 13])
    p.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="on a CPU: of decoding only")
    p.add_argument("--back-ends", nargs="+", default=["dense", "torch"] + ["cuda"] * on_gpu)
    p.add_argument("--compile", action="store_true", help="also torch.compile without graphs")
    p.add_argument("--steps", type=int, default=64 if on_gpu else 8, help="tokens of one decoding run")
    p.add_argument("--rounds", type=int, default=10 if on_gpu else 3)
    p.add_argument("--cpu-time", action="store_true",
                   help="the process's own time, not wall time: for one thread on a machine that is shared")
    p.add_argument("--seconds", type=float, default=1.0, help="how long to measure each ceiling")
    p.add_argument("--png", metavar="FILE", help="also draw both curves")
    p.add_argument("--json", metavar="FILE", help="also write the result here")
    p.add_argument("--markdown", action="store_true", help="also print the README's tables")
    p = commands.add_parser("train", help="optimizer steps of the tiny model and of full-width layers",
                            formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.set_defaults(run=train, table=train_markdown)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if on_gpu else "cpu")
    p.add_argument("--layers", type=int, default=12 if on_gpu else 1, help="of full width")
    p.add_argument("--tiles", type=int, default=4 if on_gpu else 1, help="of a picture")
    p.add_argument("--batch", type=int, default=4 if on_gpu else 1, help="pictures in a full-width step")
    p.add_argument("--back-ends", nargs="+", default=["dense", "torch"] + ["cuda"] * on_gpu)
    p.add_argument("--rounds", type=int, default=10 if on_gpu else 3, help="of the full-width layers")
    p.add_argument("--tiny-rounds", type=int, default=60, help="of the tiny model")
    p.add_argument("--cpu-time", action="store_true",
                   help="the process's own time, not wall time: for one thread on a machine that is shared")
    p.add_argument("--seconds", type=float, default=1.0, help="how long to measure each ceiling")
    p.add_argument("--json", metavar="FILE", help="also write the result here")
    p.add_argument("--markdown", action="store_true", help="also print the README's table")
    args = parser.parse_args()
    result = args.run(args)
    if getattr(args, "png", None):
        plot_infer(result, args.png)
    if args.markdown:
        print(args.table(result))
    keep(result, args)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
