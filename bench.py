"""Every measured number of the README comes from here.

    python bench.py kernels [--json FILE] [--markdown]   the routed feed-forward layer

A run checks each back end against the dense reference before it times it, prints rows as they come, and ends
with one line of JSON that names the hardware and the versions; --markdown makes the README's table of it.
"""
import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch
from torch import nn

from mono_internvl import FeedForward, MonoInternVLConfig, Routing, kernel_linear, kernel_swiglu, mmoe_swiglu

TEXT_TOKENS, TOKENS_PER_TILE = 64, 256


# ---------------------------------------------------------------- measuring

def hardware(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"


def times_in_ms(run, buffers: int, device: str, seconds: float) -> list[float]:
    """run(i) works on the i-th of several sets of tensors: caches must not hold what the next call needs.

    On a GPU each set's work is captured as a CUDA graph and events time the replays: the device's time, not
    Python's. On a CPU: wall time.
    """
    for i in range(buffers):
        run(i)                                                             # builds, allocates, warms up
    if device == "cuda":
        graphs = [torch.cuda.CUDAGraph() for _ in range(buffers)]
        for i, graph in enumerate(graphs):
            with torch.cuda.graph(graph):
                run(i)
        run = lambda i: graphs[i].replay()                                 # noqa: E731
    times, until, i = [], time.perf_counter() + seconds, 0
    while len(times) < 5 or time.perf_counter() < until:
        if device == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run(i % buffers)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        else:
            start = time.perf_counter()
            run(i % buffers)
            times.append((time.perf_counter() - start) * 1e3)
        i += 1
    return times[len(times) // 10:]                                        # in the first, clocks still settle


def ceilings(device: str, dtype: torch.dtype, seconds: float) -> dict[str, float]:
    """What this machine's library reaches: a large matrix product, and a copy (bytes read plus written)."""
    n, size = (8192, 2 ** 30) if device == "cuda" else (1024, 2 ** 27)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    matmul = statistics.median(times_in_ms(lambda i: a @ b, 1, device, seconds))
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = statistics.median(times_in_ms(lambda i: target.copy_(source), 1, device, seconds))
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
        rows, counts = routing.rows, routing.counts

        def forced(i):
            t, v = self.experts[i]
            first = t.w1.weight, t.w3.weight, v.w1.weight, v.w3.weight
            h = kernel_swiglu(self.x[i][0], *first, rows, counts, int(tile))
            y = kernel_linear(h, t.w2.weight, v.w2.weight, rows, counts, None, False, True, int(tile))
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
    args = parser.parse_args()
    result = args.run(args)
    if args.markdown:
        print(args.table(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
