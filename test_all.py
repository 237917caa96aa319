"""All tests, in the order of the story: `python -m pytest`; those that need a GPU: `python -m pytest -m gpu`.

The official numbers (assets/golden) come first; then the architecture against a reference that takes one
token at a time, routing, generation, checkpoints; then data.py, sample.py, the CUDA kernel, the notebooks,
the README, training. A name is a sentence about the system. A law holds for whatever hypothesis draws; its
draws are the same in each run.
"""
import base64
import contextlib
import copy
import csv
import ctypes
import faulthandler
import functools
import gc
import gzip
import inspect
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
import unittest.mock
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import jinja2  # comes with torch
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
import torchgen
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ablation
import bench
import benchmarks
import budget
import checkpoint
import common
import data
import evaluate
import generate
import icons
import icons_exam
import moe_kernel
import mono_internvl
import sample
import train_evip
import world
from common import InputError, flag, parse_flags
from data import (
    IGNORED,
    Batches,
    JsonlDataset,
    TextStream,
    Tokenizer,
    chat_prompt,
    collate,
    encode_conversation,
    load_image,
    load_meta,
    load_tiles,
    normalise,
    pack,
    tile_image,
)
from generate import KVCache, sample_token
from mono_internvl import (
    FeedForward,
    MonoInternVL,
    MonoInternVLConfig,
    Routing,
    mmoe_linear,
    mmoe_swiglu,
)
from world import World

HERE = Path(__file__).resolve().parent
GOLDEN = HERE / "assets" / "golden"
OFFICIAL_TINY = GOLDEN / "official_tiny"           # a checkpoint, and what the official code made of it
OFFICIAL_DATA = GOLDEN / "official_data"           # a tokenizer, and what the official code made of texts
CASES = json.loads((OFFICIAL_DATA / "golden.json").read_text(encoding="utf-8"))
TOK = Tokenizer(OFFICIAL_DATA)
PICTURE = str(OFFICIAL_DATA / "picture.png")       # 3 tiles of 56 pixels when 6 are allowed

# These tensors are tiny: a second thread would only wait for the first. Subprocesses inherit the variable.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

settings.register_profile("law", deadline=None, derandomize=True, report_multiple_bugs=False)
settings.load_profile("law")
law = settings(max_examples=50)

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
needs_gpu = [pytest.mark.gpu, no_gpu]
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])


# ---------------------------------------------------------------- tiny models and batches for them

IMG = 40                                           # <IMG_CONTEXT> of the model that tiny() makes
ROPE = {"none": None, **{kind: {"type": kind, "factor": 2.0} for kind in ("linear", "dynamic")}}
PROMPTS = torch.tensor([[1, 7, 12, 30], [1, 9, 3, 25]])
SMALL = MonoInternVLConfig(                        # a model for the official tokenizer and real pictures
    vocab_size=len(TOK), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, attn_experts="qkvo", vision_hidden_size=16, image_size=56,
    max_position_embeddings=512, max_dynamic_patch=6, img_context_token_id=TOK.token_id("<IMG_CONTEXT>"))


def tiny(attn_experts="qkvo", seed=0, **changes) -> MonoInternVL:
    """A random model of 2 layers whose tiles are one visual token each, so that any mask can be drawn. The
    weights are large enough for every part to matter in the logits."""
    torch.manual_seed(seed)
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=24, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                 vision_hidden_size=6, patch_size=2, image_size=4, img_context_token_id=IMG)
    model = MonoInternVL(MonoInternVLConfig(**{**sizes, "attn_experts": attn_experts, **changes}))
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.25)
        elif "norm" in name:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def batch_of(visual_rows: list[list[bool]], side="left", seed=0):
    """Modality masks of the rows -> input_ids, pixel_values (None without visual tokens), attention_mask.
    side: where the pads stand, "left", "right" or "between" the tokens."""
    g = torch.Generator().manual_seed(seed)
    width = max(map(len, visual_rows))
    ids = torch.randint(0, IMG, (len(visual_rows), width), generator=g)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(visual_rows):
        here = torch.arange(len(row)) + (width - len(row) if side == "left" else 0)
        if side == "between":
            here = torch.randperm(width, generator=g)[:len(row)].sort().values
        mask[i, here] = 1
        ids[i, here] = torch.where(torch.tensor(row), IMG, ids[i, here])
    tiles = sum(map(sum, visual_rows))
    return ids, torch.randn(tiles, 3, 4, 4, generator=g) if tiles else None, mask


def rows_alone(rows, ids, pixels, mask):
    """(input_ids (1, T), pixel_values) of each row of a batch, without its pads."""
    tiles = iter([] if pixels is None else pixels)
    for i, row in enumerate(rows):
        own = [next(tiles) for _ in range(sum(row))]
        yield ids[i:i + 1, mask[i].bool()], torch.stack(own) if own else None


def visual_rows(min_rows=1, max_rows=3, max_tokens=9):
    """Modality masks of the rows of a batch, evenly drawn: lists of hypothesis are short and alike."""
    def rows(seed):
        draw = random.Random(seed)
        shares = [draw.choice([0, 0.3, 0.7, 1]) for _ in range(draw.randint(min_rows, max_rows))]
        return [[draw.random() < p for _ in range(draw.randint(1, max_tokens))] for p in shares]
    return st.integers(0, 10**6).map(rows)


def to(device, tensors):
    return [None if t is None else t.to(device) for t in tensors]


def record(module, store, what=lambda args, out: out):
    return module.register_forward_hook(lambda _, args, out: store.append(what(args, out).detach()))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def stream(model, ids, *args, **options):
    return [token.tolist() for token in model.generate(ids, *args, **options)]


# ---------------------------------------------------------------- the official numbers

@pytest.fixture(scope="module")
def golden():
    return load_file(OFFICIAL_TINY / "golden.safetensors")


@pytest.fixture(scope="module")
def official():
    model = MonoInternVL.from_pretrained(OFFICIAL_TINY)
    model.config.img_context_token_id = 120
    return model


def assert_parity(ours, theirs):
    assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["prefill", "batch", "long", "text"])
@pytest.mark.parametrize("moe", ["torch", "dense", "cuda"])
def test_the_official_checkpoint_gives_the_official_hidden_states_and_logits(official, golden, name, moe,
                                                                              monkeypatch):
    monkeypatch.setattr(official, "moe", moe)
    ids, pixels = golden[f"{name}.input_ids"], golden.get(f"{name}.pixel_values")
    states, lm = [], official.language_model.model
    hooks = [lm["layers"][0].register_forward_pre_hook(lambda _, args: states.append(args[0].detach())),
             record(lm["layers"][0], states), record(lm["norm"], states)]
    with torch.no_grad():
        logits, loss = official(ids, pixels)
    for hook in hooks:
        hook.remove()
    assert loss is None
    assert_parity(logits, golden[f"{name}.logits"])
    if name != "text":
        with torch.no_grad():
            assert_parity(official.embed_images(pixels), golden[f"{name}.visual_embeds"])
            _, loss = official(ids, pixels, labels=golden[f"{name}.labels"])
            assert_parity(loss, golden[f"{name}.loss"][0])
        for i, state in enumerate(states):
            assert_parity(state, golden[f"{name}.hidden.{i}"])


@pytest.mark.parametrize("moe", ["torch", "dense", "cuda"])
def test_every_gradient_of_the_loss_is_the_official_one(official, golden, moe, monkeypatch):
    monkeypatch.setattr(official, "moe", moe)
    _, loss = official(golden["prefill.input_ids"], golden["prefill.pixel_values"],
                       labels=golden["prefill.labels"])
    ours = gradients(official, loss)
    theirs = {n.removeprefix("prefill.grad."): g for n, g in golden.items() if n.startswith("prefill.grad.")}
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert_close(ours[name], grad, rtol=0, atol=1e-5 * grad.abs().max().item() + 1e-12, msg=name)


@pytest.mark.parametrize("chunk", [None, 5])
def test_greedy_decoding_gives_the_official_tokens_and_step_logits(official, golden, chunk):
    steps, inputs = [], (golden["prefill.input_ids"], golden["prefill.pixel_values"])
    hook = record(official.language_model.output, steps)
    tokens = torch.tensor(stream(official, *inputs, max_new_tokens=9, prefill_chunk=chunk)).T
    hook.remove()
    assert torch.equal(tokens[:, :8], golden["greedy.tokens"])
    assert_parity(torch.stack(steps, 1), golden["greedy.step_logits"])
    assert torch.equal(torch.stack([*official.generate_naively(*inputs, max_new_tokens=9)], 1), tokens)


def test_the_2b_config_has_the_official_253_tensors_and_activates_about_1_9_billion_parameters():
    expected = json.loads((GOLDEN / "mono_internvl_2b_shapes.json").read_text())
    with torch.device("meta"):
        model = MonoInternVL(MonoInternVLConfig.mono_internvl_2b())
        counts_1_5 = MonoInternVL(MonoInternVLConfig.mono_internvl_1_5_2b()).parameter_counts()
    assert {name: list(t.shape) for name, t in model.state_dict().items()} == expected
    assert len(expected) == 253
    counts = model.parameter_counts()
    assert counts["total"] == 3_111_355_392
    assert 1.8e9 < counts["text"] < counts["visual"] < 1.91e9
    qkvo = 24 * (2048 * 4096 + 2048 * 2048)                         # what 1.5 adds, and no token pays for
    assert counts_1_5["total"] == counts["total"] + qkvo
    assert (counts_1_5["text"], counts_1_5["visual"]) == (counts["text"], counts["visual"])


# ---------------------------------------------------------------- architecture: one token at a time

def naive_logits(w: dict, c: MonoInternVLConfig, x: torch.Tensor, visual: list[bool], lengths=None):
    """Embeddings x (T, D) of one row -> logits (T, V) in float64, every token and head in its own loop.
    lengths: how long the sequence was when each token was read (default: T, all at once)."""
    hd, kv_heads, T = c.hidden_size // c.num_attention_heads, c.num_key_value_heads, len(visual)
    group, lengths = c.num_attention_heads // kv_heads, lengths or [T] * T
    scaling = c.rope_scaling or {"type": None, "factor": 1.0}

    def norm(v, name):
        return v / math.sqrt(sum(e * e for e in v.tolist()) / len(v) + c.rms_norm_eps) * w[f"{name}.weight"]

    def rotate(v, t):
        position, base, turned = t, c.rope_theta, v.clone()
        if scaling["type"] == "linear":
            position = t / scaling["factor"]
        elif scaling["type"] == "dynamic" and lengths[t] > c.max_position_embeddings:
            f = scaling["factor"]
            base *= (f * lengths[t] / c.max_position_embeddings - (f - 1)) ** (hd / (hd - 2))
        for i in range(hd // 2):
            a = position / base ** (2 * i / hd)
            turned[i] = v[i] * math.cos(a) - v[i + hd // 2] * math.sin(a)
            turned[i + hd // 2] = v[i + hd // 2] * math.cos(a) + v[i] * math.sin(a)
        return turned

    def pick(name, t):                            # the weight of token t's modality, where there are two
        expert = f"{name}_ve.weight"
        return w[expert if visual[t] and expert in w else f"{name}.weight"]

    x = list(x.double())
    for layer in range(c.num_hidden_layers):
        at = f"language_model.model.layers.{layer}"
        keys, values, mixed = {}, {}, []
        for t in range(T):
            qkv = (pick(f"{at}.attention.wqkv", t) @ norm(x[t], f"{at}.attention_norm")).split(hd)
            heads = []
            for kv in range(kv_heads):
                block = qkv[kv * (group + 2):(kv + 1) * (group + 2)]
                keys[kv, t], values[kv, t] = rotate(block[group], t), block[group + 1]
                for q in block[:group]:
                    q = rotate(q, t)
                    e = [math.exp(float(q @ keys[kv, s]) / math.sqrt(hd)) for s in range(t + 1)]
                    heads.append(sum(e[s] / sum(e) * values[kv, s] for s in range(t + 1)))
            mixed.append(pick(f"{at}.attention.wo", t) @ torch.cat(heads))
        for t in range(T):
            x[t] = x[t] + mixed[t]
            h, expert = norm(x[t], f"{at}.ffn_norm"), f"{at}.feed_forward" + ("_ve" if visual[t] else "")
            gate = w[f"{expert}.w1.weight"] @ h
            inner = gate / (1 + (-gate).exp()) * (w[f"{expert}.w3.weight"] @ h)
            x[t] = x[t] + w[f"{expert}.w2.weight"] @ inner
    return torch.stack([w["language_model.output.weight"] @ norm(v, "language_model.model.norm") for v in x])


def doubles(model):
    return {name: t.detach().double() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("attn_experts", ["", "qkv", "qkvo"])
def test_the_model_agrees_with_a_reference_that_takes_one_token_at_a_time(attn_experts, rope):
    # with dynamic RoPE the prompt is longer than the trained positions, and each new token stretches its base
    trained = 11 if rope == "dynamic" else 24
    model = tiny(attn_experts, rope_scaling=ROPE[rope], max_position_embeddings=trained)
    ids = torch.tensor([[5, IMG, IMG, 7, 39, IMG, IMG, IMG, 2, 3, 9, IMG, 11]])
    pixels, T, steps = torch.randn(6, 3, 4, 4), ids.shape[1], []
    hook = record(model.language_model.output, steps)
    whole = torch.cat([ids, torch.tensor(stream(model, ids, pixels, max_new_tokens=5)).T], 1)
    hook.remove()
    x, visual = model.embed(whole, pixels)[0], (whole == IMG)[0].tolist()
    with torch.no_grad():
        expected = naive_logits(doubles(model), model.config, x[:T], visual[:T]).float()
        for model.moe in ("torch", "dense", "cuda"):
            assert_parity(model(ids, pixels)[0][0], expected)
        expected = naive_logits(doubles(model), model.config, x, visual, [T] * T + [*range(T + 1, T + 6)])
    assert_parity(torch.cat(steps), expected[T - 1:-1].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_another_size_get_positions_that_are_interpolated_bicubically_in_float32(dtype):
    embeddings, pixels = tiny(image_size=8).vision_model["embeddings"].to(dtype), torch.randn(2, 3, 16, 12)
    grid = embeddings.position_embedding[0, 1:].view(4, 4, 6).permute(2, 0, 1)          # (Dv, rows, columns)
    positions = F.interpolate(grid[None].float(), (8, 6), mode="bicubic", align_corners=False).to(dtype)
    assert_close(embeddings(pixels), embeddings.patch_embedding(pixels.to(dtype)) + positions)


# ---------------------------------------------------------------- routing

@law
@given(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=30), st.integers(1, 3))
def test_routing_is_a_stable_partition_into_text_visual_and_pads(kinds, rows):
    kinds = torch.tensor(kinds * rows).view(rows, -1)
    routing = Routing(kinds == 1, (kinds != 2).long())
    parts = [[i for i, kind in enumerate(kinds.flatten().tolist()) if kind == k] for k in (0, 1, 2)]
    assert routing.permutation.tolist() == sum(parts, [])
    assert routing.counts.tolist() == [len(parts[0]), len(parts[1])]
    assert [r.tolist() for r in routing.token_indices] == parts[:2]
    assert (routing.permutation.dtype, routing.counts.dtype) == (torch.int64, torch.int64)


@on_every_device
@pytest.mark.parametrize("attn_experts", ["", "qkv", "qkvo"])
@settings(max_examples=20)
@given(visual_rows(), st.sampled_from(["left", "right", "between"]), st.booleans())
def test_every_back_end_gives_the_same_logits_and_gradients(device, attn_experts, rows, side, recompute):
    model, results = tiny(attn_experts).to(device), {}
    ids, pixels, mask = to(device, batch_of(rows, side))
    for model.moe in ("dense", "torch", "cuda"):
        model.language_model.recompute = recompute and model.moe != "dense"
        logits = model(ids, pixels, None if mask.all() else mask)[0] * mask[..., None]
        results[model.moe] = logits.detach(), gradients(model, logits.square().sum() / 100)
    expected, expected_grads = results.pop("dense")
    for logits, grads in results.values():
        assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        for name, grad in expected_grads.items():
            assert_close(grads[name], grad, rtol=1e-4, atol=1e-5 * max(1, grad.abs().max().item()))


@contextlib.contextmanager
def nan_in_new_memory():
    """Tensors made by torch.empty hold NaN: whoever reads what nobody wrote gives himself away."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@on_every_device
@pytest.mark.parametrize("backend", ["torch", "dense", "cuda"])
@settings(max_examples=25)
@given(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=30), st.sampled_from([0, 1, 2]),
       st.sampled_from([math.nan, math.inf, 1e38]), st.booleans())
def test_nan_in_tokens_or_weights_of_one_expert_never_reaches_the_other(device, backend, kinds, bad,
                                                                        poison, in_weights):
    """kinds: text 0, visual 1, pad 2, in any order. Tokens of the bad kind, or its weights, are spoiled."""
    kinds = torch.tensor([kinds], device=device)
    routing, config = Routing(kinds == 1, kinds != 2, backend), tiny().config
    x, rest = torch.randn(*kinds.shape, 32, device=device), kinds != bad
    text, visual = experts = [FeedForward(config).to(device) for _ in range(2)]

    def both(x):
        with nan_in_new_memory():
            return (mmoe_swiglu(x, text, visual, routing),
                    mmoe_linear(x, text.w1.weight, visual.w1.weight, routing))
    clean = both(x)
    if in_weights and bad < 2:
        for p in experts[bad].parameters():
            torch.nn.init.constant_(p, poison)
    spoiled = both(x if in_weights else torch.where(rest[..., None], x, poison))
    for before, after in zip(clean, spoiled, strict=True):
        assert torch.equal(before[rest], after[rest]) and before.isfinite().all()
        assert not before[kinds == 2].any() and not after[kinds == 2].any()
    if backend != "dense":                         # there, 0 · NaN reaches the gradients
        sum(after[rest].sum() for after in spoiled).backward()
        others = [p for i, expert in enumerate(experts) if i != bad for p in expert.parameters()]
        assert all(p.grad.isfinite().all() for p in others)


@settings(max_examples=25)
@given(visual_rows(), st.sampled_from(["left", "right", "between"]), st.sampled_from(["", "qkv", "qkvo"]))
@example([[False] * 3, [False]], "left", "qkvo")
def test_a_token_costs_the_work_of_one_expert_and_a_pad_costs_none(rows, side, attn_experts):
    ids, pixels, mask = batch_of(rows, side)
    model = tiny(attn_experts, img_context_token_id=None if pixels is None else IMG)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, pixels, mask)
    spent = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    visual, real = sum(map(sum, rows)), sum(map(len, rows))
    layer = "MonoInternVL.language_model.model.layers.1"
    assert spent.get(f"{layer}.feed_forward_ve", 0) == visual * 2 * 3 * 32 * 24
    assert spent.get(f"{layer}.feed_forward", 0) == (real - visual) * 2 * 3 * 32 * 24
    qkv, out = (real if part in attn_experts else mask.numel() for part in ("qkv", "o"))
    assert spent[f"{layer}.attention"] == qkv * 2 * 32 * 64 + out * 2 * 32 * 32


def test_an_unknown_back_end_is_named():
    model = tiny()
    model.moe = "tpu"
    with pytest.raises(InputError, match="'tpu'"):
        model(torch.tensor([[1]]), attention_mask=torch.tensor([[1]]))


# ---------------------------------------------------------------- padded and packed rows, the loss

def varlen_on_a_cpu(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size, enable_gqa=False):
    """What torch.nn.attention.varlen.varlen_attn computes on a GPU, sample by sample."""
    lengths = cu_seq_q.diff().tolist()
    assert cu_seq_q is cu_seq_k and max_q == max_k == max(lengths) and window_size == (-1, 0)
    samples = zip(*(t.transpose(0, 1).split(lengths, 1) for t in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*sample, is_causal=True, enable_gqa=enable_gqa)
                      for sample in samples], 1).transpose(0, 1)


@pytest.mark.parametrize("layout", ["left", "right", "between", "packed", "varlen"])
@pytest.mark.parametrize("rope", ROPE)
@settings(max_examples=8)
@given(visual_rows(min_rows=2, max_rows=4), st.integers(0, 3))
@example([[False] * 9, [False, True, False]], 0)       # beyond the trained length beside one within
def test_a_sample_in_a_padded_or_packed_row_is_as_if_alone(layout, rope, rows, first):
    """Logits, losses and rotary positions are those of the sample alone, whatever the others are."""
    with pytest.MonkeyPatch.context() as patch:    # varlen: packed, as a GPU computes it
        patch.setattr(mono_internvl, "varlen_attn", varlen_on_a_cpu)
        patch.setattr(mono_internvl, "varlen_serves", lambda *_: layout == "varlen")
        check_samples_in_rows("packed" if layout == "varlen" else layout, rope, rows, first)


def check_samples_in_rows(layout, rope, rows, first):
    # 6 trained positions: with dynamic RoPE, the samples of a batch differ in their base
    model, tables = tiny(rope_scaling=ROPE[rope], max_position_embeddings=6 if rope == "dynamic" else 9), []
    record(model.language_model.model["layers"][0], tables,        # cos, (B, 1, T, hd)
           lambda args, out: args[1][0].expand(len(out), -1, -1, -1))
    ids, pixels, mask = batch_of(rows, "right" if layout == "packed" else layout)
    samples, masks = [*rows_alone(rows, ids, pixels, mask)], {"attention_mask": mask}
    sample = torch.where(mask == 1, torch.arange(len(rows))[:, None], -1)  # which each token belongs to
    targets = torch.where(mask.cumsum(1) > 1, ids, IGNORED)                # but its first token
    if layout == "packed":                         # in two rows, with pads between samples and at the ends
        parts = slice(0, first % len(rows)), slice(first % len(rows), len(rows))
        ids, sample, targets = (pad_sequence([t[part].flatten() for part in parts if part.stop], True,
                                             padding_value=value)
                                for t, value in ((ids, 3), (sample, -1), (ids, IGNORED)))
        masks = {"document_ids": sample + 1}
    with torch.no_grad():
        logits = model(ids, pixels, **masks)[0]
        targets = targets.masked_fill(sample < 0, IGNORED)
        losses = model(ids, pixels, labels=targets, reduction="none", **masks)[1]
        for i, (own, picture) in enumerate(samples):
            alone, labels = model(own, picture)[0][0], own[0, 1:]
            assert_close(logits[sample == i], alone, rtol=1e-4, atol=1e-4)
            assert torch.equal(tables[0][:, 0][sample == i], tables[-1][0, 0])
            loss, losses = losses.tensor_split([len(labels)])
            if layout != "between":                # there, a pad predicts a token
                expected = F.cross_entropy(alone[:-1], labels, reduction="none")
                assert_close(loss, expected, rtol=1e-4, atol=1e-4)
        assert not len(losses)
        this = sample == first % len(rows)
        moved = model(torch.where(this | (ids == IMG), ids, (ids + 1) % IMG), pixels, **masks)[0]
    assert torch.equal(moved[this], logits[this]) and moved.isfinite().all()


@pytest.mark.parametrize("attn_experts", ["", "qkvo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=15)
@given(visual_rows(min_rows=2, max_rows=4, max_tokens=40), st.sampled_from(sorted(ROPE)), st.booleans())
def test_right_padded_rows_need_no_mask_the_loss_and_gradients_are_bitwise_those_under_one(
        attn_experts, dtype, rows, rope, all_labels):
    trained = 20 if rope == "dynamic" else 64
    model = tiny(attn_experts, rope_scaling=ROPE[rope], max_position_embeddings=trained).to(dtype)
    ids, pixels, mask = batch_of(rows, "right")
    labels, results = ids.where((mask == 1) & ((ids % 3 > 0) | all_labels), IGNORED), []
    sizes = model.check_inputs(ids, pixels, mask, labels)
    assert sizes["gaps"] == 0
    for gaps in (0, 1):                            # 1: as for left-padded rows
        options = dict(attention_mask=mask, sizes={**sizes, "gaps": gaps})
        logits, _ = model(ids, pixels, **options)
        loss = model(ids, pixels, labels=labels, **options)[1]
        results.append([logits[mask == 1], loss, *gradients(model, loss).values()])
        assert logits.isfinite().all()
    for without, under_a_mask in zip(*results, strict=True):
        assert torch.equal(without, under_a_mask)


class Largest(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made."""
    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        return result


@pytest.mark.parametrize("layout", ["alone", "right", "packed"])
def test_training_makes_no_tensor_as_large_as_a_mask_and_never_waits_for_the_device(layout, monkeypatch):
    """Shown without a GPU: tensors on the device "meta" have no content, so nobody can ask for it."""
    def attention(q, k, v, attn_mask, is_causal):
        assert attn_mask is None and is_causal and q.dtype == k.dtype == v.dtype
        return q * (k.sum() + v.sum())             # as large as the result, with gradients
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(mono_internvl, "varlen_serves", lambda *_: True)
    ids, pixels, mask = batch_of([[False, True] * 300, [False] * 500], "right")
    batch = {"input_ids": ids, "pixel_values": pixels, "labels": ids.where(mask == 1, IGNORED),
             "attention_mask": None if layout == "alone" else mask,
             "document_ids": (torch.arange(600) // 70 + 1) * mask if layout == "packed" else None}
    model = tiny(max_position_embeddings=600)
    sizes = model.check_inputs(**batch)
    batch, model = {k: None if t is None else t.to("meta") for k, t in batch.items()}, model.to("meta")
    with Largest() as largest:
        model(**batch, sizes=sizes)[1].backward()
    assert 0 < largest.elements < 600 ** 2 / 4


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_in_pieces_give_the_loss_and_gradients_of_all_at_once(reduction, monkeypatch):
    model, (ids, pixels, mask) = tiny(vocab_size=1000).double(), batch_of([[False, True] * 20, [False] * 30])
    results, largest = [], Largest()
    for at_a_time in (10 ** 6, 7000):              # all, and 7 tokens
        monkeypatch.setattr(MonoInternVL, "LOGITS", at_a_time)
        with largest if at_a_time == 7000 else contextlib.nullcontext():
            loss = model(ids, pixels.double(), mask, ids, reduction=reduction)[1]
            results.append([loss, *gradients(model, loss.sum()).values()])
    for pieces, whole in zip(*results, strict=True):
        assert_close(pieces, whole, rtol=1e-9, atol=1e-9)
    assert largest.elements == 1000 * 32           # the head's own weights and their gradient


@pytest.mark.parametrize("layout", ["right", "packed", "left"])
def test_a_layer_compiles_in_one_piece_and_trains_as_before(layout):
    model = tiny(num_hidden_layers=1)
    ids, pixels, mask = batch_of([[False, True] * 10, [False] * 15], "left" if layout == "left" else "right")
    batch = {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask, "labels": ids,
             "document_ids": (torch.arange(20) // 7 + 1) * mask if layout == "packed" else None}
    sizes = model.check_inputs(**batch)
    expected = gradients(model, model(**batch, sizes=sizes)[1])
    torch._dynamo.reset()
    model.language_model.model["layers"][0].compile(dynamic=True, fullgraph=True, backend="eager")
    for name, grad in gradients(model, model(**batch, sizes=sizes)[1]).items():
        assert_close(grad, expected[name])


@settings(max_examples=25)
@given(visual_rows(), st.sampled_from(["left", "right"]), st.randoms(use_true_random=False))
def test_the_loss_is_the_mean_over_supervised_tokens_and_the_head_sees_no_other_position(rows, side, random):
    model, (ids, pixels, mask) = tiny(), batch_of(rows, side)
    labels = ids.clone().apply_(lambda i: i if random.random() < 0.4 else IGNORED)
    with torch.no_grad():
        logits, _ = model(ids, pixels, mask)
    with FlopCounterMode(display=False) as counter:
        nothing, loss = model(ids, pixels, mask, labels)
    wanted = [(b, t) for b in range(len(ids)) for t in range(1, ids.shape[1]) if labels[b, t] != IGNORED]
    head = counter.get_flop_counts().get("MonoInternVL.language_model.output", {})
    assert nothing is None and sum(head.values()) == len(wanted) * 2 * 32 * 50
    mean = -sum(logits[b, t - 1].log_softmax(-1)[labels[b, t]] for b, t in wanted) / max(1, len(wanted))
    assert_close(loss, torch.as_tensor(mean, dtype=torch.float32), rtol=1e-5, atol=1e-5)
    grads = gradients(model, loss)                 # also without any supervised token
    assert all(g.isfinite().all() for g in grads.values())
    assert any(g.any() for g in grads.values()) == bool(wanted)


# ---------------------------------------------------------------- the cache

class Conversation(RuleBasedStateMachine):
    """One cache, and all that may happen to it. Whatever came before, an answer is that of
    `generate_naively`, and exactly the new part of the prompt is read.

    items: the prompt so far, tokens and pictures (-1, -2 and -3, which is all NaN). wide: its pictures take
    two visual tokens each, instead of one. held: what each slot of the cache holds, as (item, which of its
    tokens, whether it is a wide picture).
    """
    # stop: after so many tokens. fail: Ctrl-C when the second layer begins for that time. pads: so many
    # tokens are masked out, 0: a mask of ones. rows: the prompt so many times.
    event = st.sampled_from([{}, {}, {}, dict(stop=1), dict(stop=3), dict(fail=1), dict(fail=2),
                             dict(fail=4), dict(pads=0), dict(pads=2), dict(rows=2)])
    limits = dict(new=st.sampled_from([4, 4, 3, 1, 0]), chunk=st.sampled_from([None, None, 1, 2, 3]))
    turn_of = dict(**limits, event=event)
    some_items = st.integers(0, 10**6).map(                        # evenly drawn, up to four
        lambda seed: random.Random(seed).choices([1, 2, -1, -2], k=seed % 5))

    def __init__(self, device, rope):
        super().__init__()
        self.device, self.rope, self.patch = device, rope, pytest.MonkeyPatch()
        self.items, self.held = [1], []
        self.pictures = torch.randn(3, 3, 4, 8, generator=torch.Generator().manual_seed(0)).to(device)
        self.pictures[2] = math.nan
        self.memory = torch.zeros(80, 3, 4, 8, device=device)      # each prompt's pictures come to lie here

    @initialize(experts=st.sampled_from(["", "qkvo"]), block=st.sampled_from([4, 64]), wide=st.booleans())
    def begin(self, experts, block, wide):
        self.patch.setattr(KVCache, "BLOCK_SIZES", {self.device: block})
        self.trained, self.wide = 20 if self.rope == "dynamic" else math.inf, wide
        trained = 40 if self.rope == "none" else 20
        model = tiny(experts, rope_scaling=ROPE[self.rope], max_position_embeddings=trained)
        self.model, self.cache = model.to(self.device), KVCache(model.config)

    def teardown(self):
        self.patch.undo()

    def expected(self, new, *prompt, eos=None):
        naive = [t.tolist() for t in self.model.generate_naively(*prompt, new, eos)]
        if prompt[0].shape[1] + new - 1 > self.trained:            # cached keys keep the base of their RoPE
            cached = stream(self.model, *prompt, max_new_tokens=new)
            assert cached[:1] == naive[:1]
            return cached
        return naive

    def ask(self, new, chunk, event):
        stop, fail, pads, rows = *map(event.get, ("stop", "fail", "pads")), event.get("rows", 1)
        fail = fail if self.device == "cpu" else None              # not while a CUDA graph is captured
        if len(self.items) + self.wide * sum(item < 0 for item in self.items) > 28:
            self.items = [1, *self.items[-3:]]
        slots = [(item, i, item < 0 and self.wide) for item in self.items
                 for i in range(2 if item < 0 and self.wide else 1)]
        ids = torch.tensor([[IMG if item < 0 else item for item, *_ in slots]] * rows, device=self.device)
        shown = [self.pictures[-1 - item] for item in self.items if item < 0] * rows
        pixels = self.memory[:len(shown), ..., :8 if self.wide else 4]
        for place, picture in zip(pixels, shown, strict=True):
            place.copy_(picture[..., :pixels.shape[-1]])
        pads, masked = min(pads or 0, len(slots) - 1), pads is not None
        mask = (torch.arange(len(slots), device=self.device) >= pads).expand_as(ids) if masked else None
        prompt = ids, pixels if shown else None, mask
        broken = -3 in self.items and new > 0      # NaN reaches the logits: no token, but an error
        expected = [] if broken else self.expected(new, *prompt)
        reused, read, begun, tokens = 0, [], [], []
        if not pads and rows == 1 and max(len(slots), len(self.held)) <= self.trained:
            while (reused < min(len(self.held), len(slots) - 1) and self.held[reused] == slots[reused]
                   and slots[reused][0] != -3):    # NaN equals nothing
                reused += 1
            reused -= slots[reused][1]             # not half a picture

        def interrupt(*_):
            begun.append(1)
            if len(begun) == fail:
                raise KeyboardInterrupt
        hooks = [record(self.model.language_model.model["norm"], read),
                 self.model.language_model.model["layers"][1].register_forward_pre_hook(interrupt)]
        answer = self.model.generate(*prompt, max_new_tokens=new, prefill_chunk=chunk, kv_cache=self.cache)
        with contextlib.suppress(KeyboardInterrupt), \
                pytest.raises(InputError, match="NaN") if broken else contextlib.nullcontext():
            tokens.extend(token.tolist() for token in itertools.islice(answer, stop))
        answer.close()
        for hook in hooks:
            hook.remove()
        failed = fail is not None and len(begun) >= fail
        assert tokens == expected[:len(tokens)]
        assert failed or broken or len(tokens) == min(new, stop or new)
        assert self.cache.reused == reused
        if self.device == "cpu" and not failed:    # a replayed step calls no Python
            assert sum(x.shape[1] for x in read) == len(slots) - reused + max(0, len(tokens) - 1)
        answer = [token[0] for token in tokens]
        self.held = slots[:reused] if failed and not tokens else slots + [(t, 0, False) for t in answer[:-1]]
        self.held = [] if pads or rows > 1 or broken and not failed else self.held
        self.items = [*answer, 1] if rows > 1 and chunk else self.items + answer   # begins like an answer

    @rule(keep=st.sampled_from([99, 99, 0, 2, 5, 9]), more=some_items, which=st.integers(0, 9),
          change=st.sampled_from(["", "", "", "picture", "size", "dtype"]), **turn_of)
    def turn(self, keep, more, which, change, **how):
        self.items = self.items[:keep] + more or [1]
        places = [i for i, item in enumerate(self.items) if item in (-1, -2)]
        if change == "picture" and places:
            place = places[which % len(places)]
            self.items[place] = -3 - self.items[place]             # -1 becomes -2
        if change == "dtype":
            exact = next(self.model.parameters()).dtype == torch.float64
            self.model, self.held = self.model.to(torch.float32 if exact else torch.float64), []
        self.wide ^= change == "size"
        self.ask(**how)

    @rule(length=st.integers(15, 25), **limits)
    def a_long_prompt_and_back_to_its_beginning(self, length, **limits):
        self.items = [1] + [2] * length            # dynamic RoPE is trained for 20
        self.ask(event={}, **limits)
        self.items = self.items[:9]
        self.ask(4, None, {})

    @rule(begin=st.booleans(), event=st.sampled_from([dict(fail=1), {}, dict(rows=2)]), **limits)
    def nothing_but_nan(self, begin, event, **limits):
        self.items = [1] * begin + [-3, 2, 2, 2, 2, -3]        # attention may carry NaN to the 1 before it
        self.ask(event=event, **limits)
        self.items = [1, -1]
        self.ask(4, None, event if "rows" in event else {})

    @rule(rows=visual_rows(min_rows=2, max_rows=4, max_tokens=6), ender=st.integers(0, 11), **limits)
    def batch(self, rows, ender, new, chunk):
        prompt = to(self.device, batch_of(rows))
        free = sum(self.expected(new, *prompt), [7])
        eos = free[ender % len(free)]              # some row ends before the others
        assert stream(self.model, *prompt, max_new_tokens=new, prefill_chunk=chunk, eos_token_id=eos,
                      kv_cache=self.cache) == self.expected(new, *prompt, eos=eos)
        self.held = []


@on_every_device
@pytest.mark.parametrize("rope", ROPE)
def test_whatever_happened_to_a_cache_an_answer_is_the_naive_one_and_only_what_is_new_is_read(device, rope):
    run_state_machine_as_test(functools.partial(Conversation, device, rope), settings=settings(
        max_examples=15, stateful_step_count=15, phases=[Phase.generate]))


def test_a_cache_grows_by_doubling_never_shrinks_and_works_on_devices_that_nobody_has_measured():
    cache, sizes = KVCache(tiny(max_position_embeddings=400).config), []
    for rows, slots in [*((2, n) for n in range(1, 401)), (1, 3), (3, 3), (1, 420)]:
        cache.reserve(rows, slots, torch.float32, "meta")
        assert cache.real.shape == (cache.keys.shape[1], cache.keys.shape[3]) >= (rows, slots)
        sizes.append(tuple(cache.real.shape))
    assert sorted(set(sizes)) == [(2, 32), (2, 64), (2, 128), (2, 256), (2, 416), (3, 416), (3, 448)]
    assert sizes == sorted(sizes)


@pytest.mark.slow
def test_compiled_decoding_gives_the_same_tokens_and_copies_no_cache(monkeypatch):
    monkeypatch.setattr(KVCache, "BLOCK_SIZES", {"cpu": 8})                # a step sees 8, then 16 slots
    model, (ids, _, mask) = tiny(num_hidden_layers=1), batch_of([[False] * 4, [False] * 2])
    plain, cache = stream(model, ids, None, mask, max_new_tokens=8), KVCache(model.config)
    cache.reserve(2, 1000, torch.float32, "cpu")
    model.compile_decode = True
    answer = model.generate(ids, None, mask, max_new_tokens=8, kv_cache=cache)
    tokens = [next(answer).tolist() for _ in range(7)]
    with torch.profiler.profile(profile_memory=True) as profile:
        tokens += [token.tolist() for token in answer]
    memory = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert tokens == plain and 0 < max(memory) < cache.keys.nbytes


@pytest.fixture
def traced_steps(monkeypatch):
    """CUDA graphs without a GPU: a trace freezes all that Python computes, as they do. Gives two lists: what
    was captured, and the rows of each replay."""
    captures, replays = [], []

    def capture(step, inputs, pool):
        traced, result = make_fx(lambda: step(*inputs))(), step(*inputs)
        captures.append(step)

        class Graph:
            def replay(self):
                replays.append(len(result))
                result.copy_(traced())
        return Graph(), result

    def reserve(self, *args, plain=KVCache.reserve):
        plain(self, *args)
        self.pool = "what a CPU has none of"
    monkeypatch.setattr(KVCache, "BLOCK_SIZES", {"cpu": 8})
    monkeypatch.setattr(KVCache, "reserve", reserve)
    monkeypatch.setattr(generate, "capture", capture)
    return captures, replays


def test_a_captured_step_serves_every_later_token_of_its_block(traced_steps):
    model = tiny()
    ids, pixels, mask = batch_of([[False, True, False], [False] * 7, [True, False], [False]])
    model.cuda_graphs = False
    free = stream(model, ids, pixels, mask, max_new_tokens=20)
    ends = [free[3 * row + 1][row] for row in range(3)]            # rows end one after the other
    ended = stream(model, ids, pixels, mask, max_new_tokens=20, eos_token_id=ends)
    model.cuda_graphs, cache, (captures, replays) = True, KVCache(model.config), traced_steps
    for _ in range(2):
        assert stream(model, ids, pixels, mask, max_new_tokens=20, kv_cache=cache) == free
        assert stream(model, ids, pixels, mask, max_new_tokens=20, kv_cache=cache, eos_token_id=ends) == ended
    assert {4, 1} <= set(replays) <= {4, 2, 1}     # each size takes a capture: rows leave by halves
    assert len(cache.graphs) == len(captures) < len(replays) / 5


@pytest.mark.parametrize("visual", [False, True])
def test_a_captured_prompt_serves_every_prompt_of_its_size_from_the_second_on(traced_steps, visual):
    model = tiny(rope_scaling=ROPE["dynamic"], max_position_embeddings=6,  # its base depends on the length
                 num_hidden_layers=1)
    model.moe, (captures, _) = "cuda", traced_steps
    pictures = [False, visual, False, visual]      # 8 columns: prompts of 5 to 8 tokens
    prompts = [batch_of([pictures + [False] * more] * rows, seed=more)
               for rows in (1, 2) for more in (1, 4, 2)]
    for prompt in prompts:
        answers = []
        for model.cuda_graphs in (False, True):
            answers.append(stream(model, *prompt, max_new_tokens=2))
        assert answers[0] == answers[1]
    assert captures.count(generate.read_prompt) == 2           # one for each number of rows
    for (rows,), cache in generate.KEPT[model][1].items():
        for ids, pixels, _ in prompts:
            cache.input_ids = []
            if len(ids) == rows:
                logits = generate.prefill(model, ids, pixels, None, cache, 8)
                assert_close(logits, model(ids, pixels)[0][:, -1])
    assert captures.count(generate.read_prompt) == 2


def test_calls_without_a_cache_share_graphs_but_no_content_and_never_at_the_same_time(
        traced_steps, monkeypatch):
    model, (captures, _) = tiny(num_hidden_layers=1), traced_steps
    prompts = [batch_of([[False, True, False], [False]]), batch_of([[False, True]])]

    def answers(cuda_graphs):
        model.cuda_graphs = cuda_graphs
        return [stream(model, *prompt, max_new_tokens=3) for prompt in prompts]
    for change, captures_more in ((model.float, True), (model.float, False), (model.double, True),
                                  (model.language_model.model.tok_embeddings.weight.neg_, False)):
        with torch.no_grad():
            change()
        before, plain = len(captures), answers(False)
        assert answers(True) == plain and (len(captures) > before) == captures_more
    monkeypatch.setattr(generate, "KEPT_BYTES", 0)             # for large caches, memory counts more
    assert answers(True) == plain and not any(generate.KEPT[model][1].values())
    several = [model.generate(*prompt, max_new_tokens=3) for prompt in prompts * 2]
    tokens = [[token.tolist() for token in step] for step in zip(*several, strict=True)]
    assert [*map(list, zip(*tokens, strict=True))] == plain * 2


@law
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 70), st.sampled_from(
    ["none", "bool", "float"]), st.integers(0, 10**6))
def test_the_two_products_that_decode_on_a_gpu_equal_the_fused_kernel_and_copy_no_cache(
        rows, heads, group, columns, kind, seed):
    torch.manual_seed(seed)
    keys, values = torch.randn(2, rows + 1, heads, columns + 9, 16)
    k, v = (t[:rows, :, :columns] for t in (keys, values))         # as KVCache.append returns them
    q, real = 3 * torch.randn(rows, heads, group, 16), torch.rand(rows, 1, 1, columns) < 0.7
    real[..., -1] = True
    mask = {"none": None, "bool": real, "float": real.float().log()}[kind]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.profiler.profile(profile_memory=True) as profile:
        got = mono_internvl.attend_in_two_products(q, k, v, mask)
    assert_close(got, expected, rtol=0, atol=1e-6)
    memory = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 0 < max(memory) <= 4 * rows * heads * group * max(columns, 16)      # the scores, or the result


def test_hundreds_of_decoded_tokens_take_no_memory():
    def memory() -> int:
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())
    answer = tiny(max_position_embeddings=512).generate(PROMPTS, max_new_tokens=120)
    early, late = [memory() for i, _ in enumerate(answer) if i in (20, 118)]
    assert early == late > 0


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("compile_decode", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_graphs_give_the_same_tokens_and_neither_prompt_nor_step_waits_for_the_host(
        device, compile_decode, dtype, monkeypatch):
    monkeypatch.setattr(KVCache, "BLOCK_SIZES", {"cuda": 16})      # several graphs
    model = tiny(hidden_size=64, max_position_embeddings=256).to(device, dtype)
    prompt = to(device, batch_of([[False, True, False], [False] * 7, [True, False]]))
    model.cuda_graphs = False
    plain = stream(model, *prompt, max_new_tokens=60)
    model.cuda_graphs, model.compile_decode, cache = True, compile_decode, KVCache(model.config)
    captured = stream(model, *prompt, max_new_tokens=60, kv_cache=cache)
    assert len(cache.graphs) >= 4

    def watched(function, *args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for name in ("prefill", "decode"):
        monkeypatch.setattr(generate, name, functools.partial(watched, getattr(generate, name)))
    replayed = stream(model, *prompt, max_new_tokens=60, kv_cache=cache)
    assert captured == replayed
    if dtype == torch.float32 or not compile_decode:           # fused, 16-bit roundings may differ
        assert replayed == plain


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("pictures", [[False] * 3, [False, True, True]])
def test_a_prompt_that_a_cuda_graph_reads_gives_the_same_tokens(device, pictures):
    model = tiny(max_position_embeddings=256).to(device)
    model.moe, cache, answers = "cuda", KVCache(model.config), []
    for seed, more in enumerate((1, 40, 20, 30)):  # all within 64 columns
        prompt = to(device, batch_of([pictures + [False] * more] * 2, seed=seed))
        for model.cuda_graphs in (False, True):
            answers.append(stream(model, *prompt, max_new_tokens=5, kv_cache=cache))
        assert answers[-1] == answers[-2]
    assert sum(key[0] is generate.read_prompt for key in cache.graphs) == 1


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_stay_near_float32_whichever_attention_kernel_serves(device, dtype):
    """Heads of 128, 192 tokens: prefill at once, in chunks and padded; a decoded token; packed gradients."""
    torch.manual_seed(0)
    exact = MonoInternVL(replace(tiny().config, hidden_size=512, max_position_embeddings=512))
    rounded = MonoInternVL(exact.config).to(device, dtype)
    rounded.load_state_dict(exact.state_dict())
    ids, pixels, mask = batch_of([[False] * 3 + [True] * 180 + [False] * 9, [True, False] * 20])

    def near(got, expected):
        error = (got.detach().float().cpu() - expected).norm()
        assert error <= 4 * torch.finfo(dtype).eps * expected.norm()       # seen: 2.5
    with torch.no_grad():
        for rows, pads in (1, None), (2, mask):
            prompt, new = (ids[:rows], pixels[:160 + 20 * rows], pads), torch.tensor([[7], [8]])[:rows]
            longer = None if pads is None else F.pad(pads, (0, 1), value=1)
            expected = exact(torch.cat([prompt[0], new], 1), prompt[1], longer)[0]
            near(rounded(*to(device, prompt))[0][:, -1], expected[:, -2])
            for chunk in (64, 192):
                cache = KVCache(exact.config)
                cache.reserve(rows, 200, dtype, device)
                logits = generate.prefill(rounded, *to(device, prompt), cache, chunk)
                near(logits, expected[:, -2])
                step = generate.decode(rounded, new[:, 0].to(device), cache)
                near(step, expected[:, -1])
                assert logits.dtype == step.dtype == torch.float32         # for sampling
    packed = (ids[:1], pixels[:180], None, ids[:1], (torch.arange(192) // 70 + 1)[None])
    losses = rounded(*to(device, packed))[1], exact(*packed)[1]
    assert losses[0].dtype == torch.float32
    got, expected = gradients(rounded, losses[0]), gradients(exact, losses[1])
    for name, grad in expected.items():
        near(got[name], grad)


# ---------------------------------------------------------------- generation

@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 2.0])
def test_sampling_follows_penalty_temperature_top_k_and_top_p(temperature):
    draw = random.Random(temperature)
    for top_k, top_p, penalty, highest in itertools.product(
            [None, 1, 2, 4, 9], [None, 0.3, 0.6, 0.9, 1.0], [1.0, 0.5, 1.8], [1.5, -1.5]):
        raw = [highest - draw.uniform(0, 3) for _ in range(6)]
        generated = [draw.random() < 0.5 for _ in raw]
        scores = {i: s if not was else s / penalty if s > 0 else s * penalty
                  for i, (s, was) in enumerate(zip(raw, generated, strict=True))}
        order, reached, kept = sorted(scores, key=scores.get, reverse=True), 0.0, {}
        weights = {i: math.exp(scores[i] / temperature) if temperature else i == order[0]
                   for i in order[:top_k]}
        for i, weight in weights.items():          # the smallest set whose probability reaches top_p
            kept |= {i: weight} if reached < (top_p or 1) else {}
            reached += weight / sum(weights.values())
        logits, generated = torch.tensor([raw] * 300), torch.tensor([generated] * 300)
        draws = sample_token(logits, generated, temperature, top_k, top_p, penalty,
                             [torch.Generator().manual_seed(0)] * 300)
        frequency = draws.bincount(minlength=6) / 300
        for i in range(6):
            share = kept.get(i, 0) / sum(kept.values())
            assert abs(frequency[i] - share) < 0.12 and (frequency[i] > 0) == (share > 0) or 0 < share < 0.04


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_top_p_takes_no_further_token_once_its_probability_is_reached_exactly(count):
    logits = torch.zeros(200, 4)
    draws = sample_token(logits, logits > 0, 1.0, None, count / 4, 1.0, [None] * 200)
    assert len(draws.unique()) == count


def test_a_seed_reproduces_and_leaves_the_global_generator_alone():
    model, before = tiny(), torch.get_rng_state()
    options = dict(max_new_tokens=12, temperature=1.0)
    runs = [stream(model, PROMPTS, seed=seed, **options) for seed in (0, 0, 1, [0, 1])]
    assert runs[0] == runs[1] == runs[3] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    first = stream(model, PROMPTS, **options)
    torch.manual_seed(5)
    assert stream(model, PROMPTS, **options) == first != stream(model, PROMPTS, **options)


def test_the_repetition_penalty_counts_generated_tokens_of_the_row_only():
    model, prompt, steps = tiny(), torch.arange(40).repeat(2, 1), []       # a prompt of all tokens
    prompt[1, 0] = 7
    hook = record(model.language_model.output, steps)
    tokens = stream(model, prompt, max_new_tokens=10, repetition_penalty=1.7)
    hook.remove()
    for row in range(2):
        seen = []
        for logits, token in zip(steps, tokens, strict=True):
            scores = logits[row].clone()
            scores[IMG] = -math.inf
            for i in set(seen):
                scores[i] = scores[i] / 1.7 if scores[i] > 0 else scores[i] * 1.7
            assert token[row] == scores.argmax()
            seen.append(token[row])
    assert tokens != stream(model, prompt, max_new_tokens=10)


@on_every_device
@settings(max_examples=40)
@given(visual_rows(min_rows=2, max_rows=4), st.sampled_from([4, 64]), st.sampled_from([
    {}, dict(repetition_penalty=4.0), dict(temperature=1.5), dict(temperature=2.0, top_p=0.8),
    dict(temperature=1.0, top_k=5, repetition_penalty=3.0)]), st.sampled_from([int, list, tuple]), st.data())
def test_a_row_of_a_batch_yields_what_it_yields_alone_and_after_its_end_the_first_end_token(
        device, rows, block, sampling, several, data):
    # 8 trained positions: rows stretch the base of dynamic RoPE at different times
    model = tiny(rope_scaling=ROPE["dynamic"], max_position_embeddings=8).to(device)
    prompt, states = to(device, batch_of(rows)), []
    options = dict(max_new_tokens=7, **sampling)
    free = [[token for token, in stream(model, *alone, seed=3 + i, **options)]
            for i, alone in enumerate(rows_alone(rows, *prompt))]
    seen = st.sampled_from(sorted(set(sum(free, []))))
    ends = data.draw(st.lists(seen, min_size=1, max_size=2, unique=True))
    ends = ends[:1] if several is int else ends
    lengths = [next((n for n, token in enumerate(row, 1) if token in ends), 7) for row in free]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KVCache, "BLOCK_SIZES", {device: block})
        record(model.language_model.model["norm"], states)
        together = stream(model, *prompt, seed=3 if several is list else [*range(3, 3 + len(rows))],
                          eos_token_id=ends[0] if several is int else several(ends), **options)
    assert [*zip(*together, strict=True)] == [
        (*row[:n], *[ends[0]] * (max(lengths) - n)) for row, n in zip(free, lengths, strict=True)]
    if device == "cpu":                            # after the prefill, a step decodes the rows that go on
        going_on = [sum(n > step for n in lengths) for step in range(1, max(lengths))]
        assert [len(x) for x in states[1:]] == going_on


def test_neither_the_image_token_nor_ids_beyond_the_tokenizer_are_generated():
    model = tiny()
    with torch.no_grad():                          # one of these would always win
        head = model.language_model.output.weight
        head[IMG], head[49], head[48] = 100 * head[7], -100 * head[7], 100 * head[7]
    for options in ({}, dict(temperature=1.0, seed=0), dict(temperature=5.0, top_k=3, seed=0)):
        tokens = sum(stream(model, PROMPTS, max_new_tokens=20, num_tokens=48, **options), [])
        assert IMG not in tokens and max(tokens) < 48
    assert all(IMG not in token for token in model.generate_naively(PROMPTS, max_new_tokens=20))


def test_tokens_come_one_int64_per_row_as_many_as_asked_and_can_be_trained_on():
    model = tiny()
    for n in (0, 1, 4):
        tokens = list(model.generate(PROMPTS, max_new_tokens=n))
        assert len(tokens) == n and all(t.shape == (2,) and t.dtype == torch.int64 for t in tokens)
    model(tokens[-1][None], labels=tokens[-1][None])[1].backward()
    assert model.language_model.model.tok_embeddings.weight.grad.any()


@pytest.mark.parametrize("rope, context", [("none", 8), ("linear", 16), ("dynamic", 16)])
def test_generation_ends_with_the_context_and_a_prompt_that_fills_it_is_refused(rope, context):
    model, full = tiny(rope_scaling=ROPE[rope], max_position_embeddings=8), torch.ones(1, context + 1).long()
    assert len(stream(model, PROMPTS, max_new_tokens=100)) == context - 4
    assert len([*model.generate_naively(PROMPTS)]) == context - 4
    assert len(stream(model, full[:, 2:])) == 1
    with pytest.raises(InputError, match=f"context of {context}"):
        stream(model, full[:, 1:], max_new_tokens=1)
    assert model(full[:, 1:])[0].shape == (1, context, 50)
    two = F.pad(full, (0, 2), value=2)             # packed: a sample that does not fit, one that does
    for ids, documents in (full, None), (two, two):
        with pytest.raises(InputError, match=f"{context + 1} tokens do not fit the context of {context}"):
            model(ids, document_ids=documents)
    assert model(two[:, 1:], document_ids=two[:, 1:])[0].shape == (1, context + 2, 50)


@pytest.mark.parametrize("option", [
    dict(top_k=0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5), dict(top_p=math.nan),
    dict(temperature=-1.0), dict(temperature=math.nan), dict(temperature=math.inf),
    dict(repetition_penalty=0.0), dict(max_new_tokens=-1), dict(prefill_chunk=0), dict(eos_token_id="2"),
    dict(eos_token_id=[2, None]), dict(seed=[1]), dict(seed=-1), dict(seed=2 ** 64 - 1), dict(seed=[0, -1]),
    dict(seed=[2 ** 64, 0])])
def test_a_sampling_value_out_of_range_is_named(option):
    with pytest.raises(InputError, match=f"{next(iter(option))} is "):
        stream(tiny(), PROMPTS, **{"max_new_tokens": 2, **option})


@pytest.mark.parametrize("row", range(3))
@pytest.mark.parametrize("dtype, advice", [("float32", "damaged"), ("bfloat16", "--dtype float32"),
                                           ("float16", "--dtype bfloat16 or float32")])
def test_logits_that_are_no_numbers_end_generation_unless_their_row_has_ended(
        monkeypatch, row, dtype, advice):
    """With CUDA graphs, rows leave by halves: one that has ended may stay and overflow."""
    def reserve(self, *args, plain=KVCache.reserve):
        plain(self, *args)
        self.pool = "what a CPU has none of"

    def decode(model, token, cache):
        logits = torch.zeros(len(token), 50)
        logits[row] = math.inf
        return logits
    prompt = batch_of([[False] * 3, [False] * 7, [False] * 5], seed=2)
    model = tiny().to(getattr(torch, dtype))
    first, = stream(model, *prompt, max_new_tokens=1)
    assert len(set(first)) == 3
    monkeypatch.setattr(KVCache, "reserve", reserve)
    monkeypatch.setattr(generate, "decode", decode)
    with contextlib.nullcontext() if row == 0 else pytest.raises(
            InputError, match=f"NaN or infinite in {dtype}: .*{advice}"):
        tokens = stream(model, *prompt, max_new_tokens=3, eos_token_id=first[0])
        assert [token for token, *_ in tokens] == [first[0]] * 3


class Operators(TorchDispatchMode):
    """Notes all operators, and fails at one that makes a float64 or complex tensor."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                assert t.dtype != torch.float64 and not t.is_complex(), f"{operator} makes {t.dtype}"
        self.names.add(str(operator).removesuffix(".default"))
        return result


@pytest.mark.parametrize("backend", ["torch", "dense"])
@pytest.mark.parametrize("rope", ROPE)
def test_the_gpu_of_a_mac_has_all_that_training_and_generation_need(rope, backend):
    """It has neither float64 nor every operator. Outside of this test: sum_over_processes adds up float64 on
    the CPU, by design."""
    def has_mac(name):
        entry = entries[name]
        delegate = re.search(r"structured_delegate: (\S+)", entry)
        return has_mac(delegate[1]) if delegate else "dispatch:" not in entry or "MPS" in entry or (
            "Composite" in entry)
    kernels = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    entries = {re.match(r"[\w.]+", entry)[0]: entry for entry in kernels.read_text().split("\n- func: ")[1:]}
    prompt = batch_of([[False, True, False], [False] * 7, [True, False]])
    model = tiny(rope_scaling=ROPE[rope])
    model.moe, image, text = backend, (torch.tensor([[IMG, 1]]), prompt[1][:1]), (PROMPTS,)
    packed = prompt[0][:1], prompt[1][:1], None, prompt[0][:1], torch.tensor([[1, 1, 1, 2, 2, 2, 2]])
    optimizer = torch.optim.AdamW(model.parameters())
    with Operators() as seen:
        for arguments in packed, (*prompt, prompt[0]):
            model(*arguments)[1].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        for inputs, options in itertools.product((prompt, image, text), ({}, dict(
                temperature=1.0, seed=0, top_k=5, top_p=0.9, repetition_penalty=2.0, num_tokens=45))):
            assert len(stream(model, *inputs, max_new_tokens=4, prefill_chunk=3, **options)) == 4
    names = [name.removeprefix("aten.") for name in seen.names if name.startswith("aten.")]
    # Attention has a kernel of its own on each device.
    assert [name for name in names if not has_mac(name) and "attention_for_cpu" not in name] == []
    assert len(names) > 100 and not has_mac("linalg_eig")


@pytest.mark.parametrize("change, message", [
    (dict(input_ids=torch.tensor([1, 2])), "expected .B, T. int64"),
    (dict(input_ids=torch.tensor([[1, 2]], dtype=torch.int32)), "expected .B, T. int64"),
    (dict(input_ids=torch.zeros(1, 0, dtype=torch.int64)), "expected .B, T. int64"),
    (dict(input_ids=torch.tensor([[1, 50]])), "50 tokens"),
    (dict(input_ids=torch.tensor([[1, -100]])), "-100"),
    (dict(input_ids=torch.tensor([[1, 2]])), "0 <IMG_CONTEXT> tokens for 1 tiles"),
    (dict(input_ids=torch.tensor([[IMG, IMG]])), "2 <IMG_CONTEXT> tokens for 1 tiles"),
    (dict(pixel_values=None), "no pixel_values"),
    (dict(pixel_values=torch.zeros(2, 3, 4, 4)), "1 <IMG_CONTEXT> tokens for 2 tiles"),
    (dict(pixel_values=torch.zeros(3, 4, 4)), "n_tiles, 3, S, S"),
    (dict(pixel_values=torch.zeros(1, 1, 4, 4)), "n_tiles, 3, S, S"),
    (dict(pixel_values=torch.zeros(1, 3, 6, 4)), "multiple of 4"),
    (dict(pixel_values=torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), "uint8"),
    (dict(attention_mask=torch.ones(1, 3)), "attention_mask is"),
    (dict(document_ids=torch.ones(1, 3)), "document_ids is"),
    (dict(labels=torch.ones(1, 1)), "labels is"), (dict(labels=torch.ones(1, 2)), "labels is torch.float32"),
    (dict(labels=torch.tensor([[-100, 50]])), "reaches 50")])
def test_inputs_that_do_not_fit_get_one_line_that_says_why(change, message):
    inputs = {"input_ids": torch.tensor([[1, IMG]]), "pixel_values": torch.zeros(1, 3, 4, 4), **change}
    with pytest.raises(InputError, match=message):
        tiny()(**inputs)
    if not change.keys() & {"labels", "document_ids"}:
        with pytest.raises(InputError, match=message):
            next(tiny().generate(**inputs))


def test_images_need_a_known_image_token_and_generation_needs_left_padding():
    with pytest.raises(InputError, match="does not know its <IMG_CONTEXT> token"):
        tiny(img_context_token_id=None)(torch.tensor([[1, IMG]]), torch.zeros(1, 3, 4, 4))
    for mask in ([[1, 1, 1, 0], [1] * 4], [[0] * 4, [1] * 4]):
        with pytest.raises(InputError, match="left-padded"):
            stream(tiny(), PROMPTS, attention_mask=torch.tensor(mask))
    logits, _ = tiny()(PROMPTS, attention_mask=torch.tensor([[0] * 4, [1] * 4]))      # pads harm no other row
    assert logits.isfinite().all()
    assert_close(logits[1], tiny()(PROMPTS[1:])[0][0])


# ---------------------------------------------------------------- checkpoints

def contents_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_official_checkpoint_survives_loading_and_saving_bitwise_in_shards_of_any_size(tmp_path):
    original = load_file(OFFICIAL_TINY / "model.safetensors")
    model = MonoInternVL.from_pretrained(OFFICIAL_TINY)
    (tmp_path / "card.safetensors.txt").write_text("of another maker")     # saving leaves it alone
    for limit in (10 ** 9, 100_000, 1, 10 ** 9):
        model.save_pretrained(tmp_path, limit)
        shards = {path.name: load_file(path) for path in sorted(tmp_path.glob("*.safetensors"))}
        sizes = [[t.nbytes for t in shard.values()] for shard in shards.values()]
        assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
        assert all(sum(one) + sum(next_) > limit for one, next_ in itertools.pairwise(sizes))
        index = {"model.safetensors.index.json"} if len(shards) > 1 else set()
        assert contents_of(tmp_path).keys() == {"config.json", "card.safetensors.txt", *shards} | index
        for file in index:
            assert json.loads((tmp_path / file).read_text()) == {
                "metadata": {"total_size": sum(map(sum, sizes))},
                "weight_map": {name: file for file, shard in shards.items() for name in shard}}
        again = MonoInternVL.from_pretrained(tmp_path)
        assert again.config == model.config and again.state_dict().keys() == original.keys()
        assert all(torch.equal(again.state_dict()[name], t) for name, t in original.items())


def test_a_save_that_fails_leaves_the_earlier_checkpoint_and_no_half_one(tmp_path, monkeypatch):
    def disk_full(source, target, **_):
        target.write_bytes(b"half")
        raise OSError("no space left on device")
    tiny(seed=0).save_pretrained(tmp_path / "old", max_shard_bytes=20_000)
    before = contents_of(tmp_path / "old")
    for folder, module, function in (("old", checkpoint, "save_file"), ("new", os, "replace")):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
            patch.setattr(module, function, disk_full)
            tiny(seed=1).save_pretrained(tmp_path / folder, max_shard_bytes=20_000)
    assert contents_of(tmp_path / "old") == before and "config.json" not in contents_of(tmp_path / "new")


def test_every_config_field_survives_the_official_nested_json(tmp_path):
    config = MonoInternVLConfig(
        vocab_size=90, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=3, rms_norm_eps=1e-6, rope_theta=5e5, rope_scaling=ROPE["linear"],
        max_position_embeddings=99, bos_token_id=3, eos_token_id=4, pad_token_id=5, attn_experts="qkv",
        vision_hidden_size=7, num_channels=1, patch_size=3, image_size=12, downsample_ratio=0.25,
        min_dynamic_patch=2, max_dynamic_patch=6, use_thumbnail=False, img_context_token_id=77)
    default = MonoInternVLConfig()
    assert not [name for name, value in vars(config).items() if value == getattr(default, name)]
    (tmp_path / "config.json").write_text(config.to_json())
    assert MonoInternVLConfig.from_json(tmp_path / "config.json") == config
    written, official = json.loads(config.to_json()), json.loads((OFFICIAL_TINY / "config.json").read_text())
    assert written["llm_config"].keys() - official["llm_config"].keys() == {"attn_experts"}
    assert written["vision_config"].keys() == official["vision_config"].keys()
    assert written.keys() - official.keys() == {"img_context_token_id"}


@on_every_device
@pytest.mark.parametrize("moe", ["torch", "cuda"])
def test_a_checkpoint_loads_in_half_precision_and_stays_close(golden, tmp_path, device, moe):
    MonoInternVL.from_pretrained(OFFICIAL_TINY, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = MonoInternVL.from_pretrained(tmp_path, None, device)           # the dtype of the files
    model.moe, model.config.img_context_token_id = moe, 120
    with torch.no_grad():
        logits, _ = model(*to(device, [golden["batch.input_ids"], golden["batch.pixel_values"]]))
    theirs = golden["batch.logits"]
    assert {p.dtype for p in [logits, *model.parameters()]} == {torch.bfloat16}
    assert_close(logits.cpu().float(), theirs, rtol=0, atol=0.03 * theirs.abs().max().item())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_spread_model_is_gathered_and_written_tensor_by_tensor(rank, tmp_path, monkeypatch):
    """Never two whole tensors on a device; and the first process alone keeps what it was given."""
    whole = weakref.WeakSet()                      # those alive on the device

    class Whole:
        def __init__(self, values):
            assert not whole
            whole.add(self)
            self.values = values

        def cpu(self):
            return self.values.clone()

    class Spread:                                  # as FSDP's DTensor
        def __init__(self, values):
            self.values = values

        def detach(self):
            return self

        def full_tensor(self):
            return Whole(self.values)

    monkeypatch.setenv("RANK", str(rank))
    weights, model = load_file(OFFICIAL_TINY / "model.safetensors"), tmp_path / "model"
    checkpoint.save_with_tokenizer(model, {name: Spread(t) for name, t in weights.items()},
                                   vars(SMALL), OFFICIAL_DATA)
    assert not whole and model.exists() == (rank == 0)
    if rank == 0:
        written = load_file(model / "model.safetensors")
        assert written.keys() == weights.keys() and all(map(torch.equal, written.values(), weights.values()))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_within_a_stage_restore_everything_and_only_the_newest_stay(tmp_path):
    def save(step, save_model=Path.mkdir):
        torch.manual_seed(step)
        checkpoint.save_training(tmp_path, step, save_model, {"mean": torch.full((2, 3), float(step))},
                                 {"batches": {"seen": step}, "batch": 4}, keep=2)
        return torch.rand(3)

    def full(folder):
        raise OSError(28, "No space left on device")

    *_, expected = save(8), save(9), save(10)
    with pytest.raises(InputError, match="checkpoint of step 11 cannot be written.*No space left.*make room"):
        save(11, full)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000009", "step-0000010"]
    newest, restored = checkpoint.newest_partial(tmp_path), {"mean": torch.zeros(2, 3)}
    batches = unittest.mock.Mock()
    assert checkpoint.load_training(newest, restored, batches, 4) == 10
    batches.load_state_dict.assert_called_once_with({"seen": 10})
    assert torch.equal(torch.rand(3), expected) and restored["mean"].tolist() == [[10.0] * 3] * 2
    [file] = (newest / "optimizer").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"^{newest}/optimizer is damaged or incomplete .*$"):
        checkpoint.load_training(newest, restored, batches, 4)


# ---------------------------------------------------------------- starting from a language model

LLAMA = GOLDEN / "llama_tiny"                      # with the logits that transformers computes


def write_llm(folder: Path, kind: str = "internlm2"):
    """The same language model in another layout."""
    weights, config = load_file(LLAMA / "model.safetensors"), json.loads((LLAMA / "config.json").read_text())
    if kind == "internlm2":
        model = MonoInternVL.from_llm(LLAMA)
        weights = {name: t for name, t in model.language_model.state_dict().items() if "_ve." not in name}
        config = json.loads(model.config.to_json())["llm_config"]
    elif kind == "old llama":                      # as many key and value heads as query heads, no defaults
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        for name in ("rope_parameters", "head_dim", "attention_bias", "mlp_bias", "num_key_value_heads"):
            del config[name]
        weights |= {name: t.unflatten(0, (2, 1, 8)).repeat(1, 2, 1, 1).flatten(0, 2)
                    for name, t in weights.items() if re.search("[kv]_proj", name)}
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("kind", ["llama", "old llama", "internlm2"])
@pytest.mark.parametrize("attn_experts", ["", "qkv", "qkvo"])
def test_a_model_made_from_an_llm_has_its_logits_and_copies_as_visual_experts(tmp_path, kind, attn_experts):
    write_llm(tmp_path, kind)
    model = MonoInternVL.from_llm(tmp_path, MonoInternVLConfig.from_llm(tmp_path, attn_experts=attn_experts))
    golden, lm = load_file(LLAMA / "golden.safetensors"), model.language_model
    ids, expected = golden["input_ids"], golden["logits"]
    with torch.no_grad():
        assert_close(model(ids)[0], expected, rtol=1e-5, atol=1e-5)
        for visual in (torch.ones_like(ids), torch.arange(ids.numel()).view_as(ids) % 2):
            hidden = lm(lm.model["tok_embeddings"](ids), Routing(visual == 1))
            assert_close(lm.output(hidden), expected, rtol=1e-5, atol=1e-5)
    for copied in (model, tiny(attn_experts).copy_text_experts()):
        weights = dict(copied.named_parameters())
        experts = {name: name.replace("_ve.", ".") for name in weights if "_ve." in name}
        assert len(experts) == {"": 6, "qkv": 8, "qkvo": 10}[attn_experts]
        for name, text in experts.items():
            assert torch.equal(weights[name], weights[text])
            assert weights[name].data_ptr() != weights[text].data_ptr()


def test_a_tied_llama_gets_a_head_new_rows_at_the_mean_and_a_config_must_have_its_sizes(tmp_path):
    write_llm(tmp_path, "old llama")
    weights = load_file(tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del weights["lm_head.weight"]                  # the embedding is the head as well
    save_file(weights, tmp_path / "model.safetensors")
    for rope, expected in (({"rope_scaling": ROPE["linear"]}, (5000, ROPE["linear"])),
                           ({"rope_parameters": {"rope_theta": 500, "rope_type": "linear", "factor": 2.0}},
                            (500, ROPE["linear"])), ({"rope_theta": None}, (10000, None))):    # Llama 1 and 2
        (tmp_path / "config.json").write_text(json.dumps({**config, **rope, "tie_word_embeddings": True}))
        c = MonoInternVLConfig.from_llm(tmp_path, vocab_size=51)
        assert (c.rope_theta, c.rope_scaling) == expected
    large, old = MonoInternVL.from_llm(tmp_path, c).language_model, weights["model.embed_tokens.weight"]
    embedding, head = large.model["tok_embeddings"].weight, large.output.weight
    assert torch.equal(embedding, head) and embedding.data_ptr() != head.data_ptr()
    assert embedding.shape == (51, 32) and torch.equal(embedding[:48], old)
    assert_close(embedding[48:], old.mean(0).expand(3, -1))
    for field, value in (("hidden_size", 64), ("intermediate_size", 8), ("num_hidden_layers", 3),
                         ("rms_norm_eps", 0.1), ("num_attention_heads", 8), ("num_key_value_heads", 2),
                         ("rope_theta", 1e6), ("rope_scaling", ROPE["linear"]), ("vocab_size", 47)):
        with pytest.raises(InputError, match=f"{field} = .*{value}|tok_embeddings.weight is .48, 32"):
            MonoInternVL.from_llm(tmp_path, replace(c, **{field: value}))


# ---------------------------------------------------------------- tokenizer

# "▁" is how sentencepiece writes a space: the one character that cannot come back
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
SPOKEN = PLAIN.filter(lambda text: "<" not in text)
ask = data.turns


@pytest.mark.parametrize("case", CASES["tokenize"], ids=lambda case: ascii(case["text"][:20]))
def test_text_has_the_official_token_ids_and_comes_back(case):
    assert TOK.encode(case["text"]) == case["ids"]
    assert TOK.decode(case["ids"]) == case["decoded_skip_special"]
    assert TOK.decode(case["ids"], skip_special_tokens=False) == "<s>" + case["text"]


def test_special_tokens_and_the_system_message_are_read_from_the_folder(tmp_path):
    assert CASES["special_tokens"].items() <= TOK.special_tokens.items()
    assert (len(TOK), TOK.bos_id, TOK.eos_id, TOK.pad_id) == (491, 1, 2, 2)
    shutil.copy(OFFICIAL_DATA / "tokenizer.model", tmp_path)
    for source in ("added_tokens.json", "tokenizer_config.json"):                      # either file is enough
        shutil.copy(OFFICIAL_DATA / source, tmp_path)
        assert Tokenizer(tmp_path).special_tokens == TOK.special_tokens
        assert checkpoint.read_img_context_token_id(tmp_path) == TOK.token_id("<IMG_CONTEXT>")
        (tmp_path / source).unlink()
    assert checkpoint.read_img_context_token_id(tmp_path) is None
    (tmp_path / "added_tokens.json").write_text(
        '{"<|im_end|>": 480, "<|im_start|>": 481, "<a": 482, "<a>": 483}')
    for message in ("Look.", ""):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"system_message": message}))
        tok = Tokenizer(tmp_path)
        assert encode_conversation(tok, ask("hi"))[0] == TOK.encode(chat_prompt(ask("hi"), message))
    assert tok.encode("<a<a>", bos=False) == [482, 483]                    # of two, the longer is meant
    with pytest.raises(InputError, match=f"{tmp_path} has no token <IMG_CONTEXT>"):
        encode_conversation(tok, ask("<image>"), [1])
    with pytest.raises(InputError, match="491 tokens.* has no id 491"):
        TOK.decode([491])


@given(st.lists(st.one_of(PLAIN, st.sampled_from(sorted(TOK.special_tokens)))).map("".join),
       st.lists(st.integers(0, len(TOK) - 1)))
def test_any_text_comes_back_each_character_once_it_is_complete_and_u_fffd_is_for_what_is_no_utf8(text, ids):
    stream, shown, fed = TextStream(TOK, skip_special_tokens=False), "", b""
    for token in TOK.encode(text, bos=False):
        shown, fed = shown + stream.push(token), fed + TOK.bytes[token]
        assert shown == fed.decode(errors="ignore")
    assert shown == text and stream.flush() == ""
    pieces = [TOK.sp.id_to_piece(i) for i in ids if i not in TOK.special_tokens.values()]
    expected = b"".join(bytes.fromhex(p[3:5]) if re.fullmatch("<0x..>", p) else p.replace("▁", " ").encode()
                        for p in pieces).decode("utf-8", "replace")
    stream = TextStream(TOK)
    assert "".join([*map(stream.push, ids), stream.flush()]) == TOK.decode(ids) == expected


# ---------------------------------------------------------------- chat template and labels

@pytest.mark.parametrize("case", CASES["conversations"], ids=range(len(CASES["conversations"])))
def test_prompts_ids_and_labels_are_the_official_ones(case):
    conversation = case["conversations"]
    assert chat_prompt(conversation) == case["prompt"]
    ids_and_labels = encode_conversation(TOK, conversation, case["tiles_per_image"], case["tokens_per_tile"])
    assert ids_and_labels == (case["input_ids"], case["labels"])
    assert chat_prompt(ask("<image>\nhi")) == CASES["generation_prompt"]


@given(turns=st.lists(st.lists(st.tuples(SPOKEN, st.integers(1, 3)), min_size=1, max_size=3), min_size=1,
                      max_size=5),
       system=st.sampled_from([None, "", "Look."]), own=st.none() | SPOKEN, tokens_per_tile=st.integers(1, 3))
def test_answers_alone_are_learned_images_stand_at_their_marks_and_a_prompt_begins_the_training_ids(
        turns, system, own, tokens_per_tile):
    """A turn is drawn as pieces of text, between them marks of images that have so many tiles. What is
    learned is shown between » and «. The conversation's own message, if it has one, replaces the system's."""
    first, tok = [] if own is None else [{"from": "system", "value": own}], copy.copy(TOK)
    tok.system_message = TOK.system_message if system is None else system
    system_shown = own if first else tok.system_message
    shown = f"<s><|im_start|>system\n{system_shown}<|im_end|>" if system_shown else "<s>"
    texts = ["<image>".join(text for text, _ in turn).strip() for turn in turns]
    images = [tiles for turn in turns[::2] for _, tiles in turn[1:]]       # in an answer a mark is plain text
    tiles, (start, end) = iter(images), "»«" if len(turns) % 2 == 0 else ("", "")      # or no last answer
    for i, text in enumerate(texts):
        if i % 2:
            shown += f"{start}{text}<|im_end|>{end}"
        else:
            text = re.sub("<image>", lambda _: f"<img><IMG_CONTEXT>×{next(tiles) * tokens_per_tile}</img>",
                          text)
            shown += f"<|im_start|>user\n{text}<|im_end|><|im_start|>assistant\n"
    options = images, tokens_per_tile
    ids, labels = encode_conversation(tok, first + ask(*[f" {text}\n" for text in texts]), *options)
    sample = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "pixel_values": None}
    assert data.batch_as_text(collate([sample]), TOK) == shown
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    if len(turns) % 2 == 0:
        prompt, _ = encode_conversation(tok, first + ask(*texts[:-1]), *options)
        assert ids[:len(prompt)] == prompt


# ---------------------------------------------------------------- pictures

def test_tilings_are_the_official_ones(monkeypatch):
    sizes = []

    def resize(image, size, resample):             # only the sizes matter here; the real thing takes seconds
        sizes.append(size)
        return Image.new("RGB", size)
    monkeypatch.setattr(Image.Image, "resize", resize)
    for case in CASES["tiling"]:
        side, image = case["image_size"], Image.new("RGB", (case["width"], case["height"]))
        with_thumbnail = len(tile_image(image, case["max_num"], side))
        tiles = len(tile_image(image, case["max_num"], side, use_thumbnail=False))
        grid = [length // side for length in sizes[-1]]
        assert grid == case.get("grid_columns_rows", grid) and tiles == math.prod(grid)
        assert tiles == case.get("tiles", tiles)
        assert with_thumbnail == case.get("tiles_with_thumbnail", tiles + (tiles > 1))


@given(st.integers(1, 40), st.integers(1, 40), st.tuples(st.integers(1, 9), st.integers(1, 9)),
       st.integers(2, 6), st.booleans())
def test_the_closest_grid_within_the_limits_is_cut_row_by_row_and_a_thumbnail_follows(
        width, height, limits, size, thumbnail):
    fewest, most = sorted(limits)
    image = Image.frombytes("RGB", (width, height), random.Random(width).randbytes(3 * width * height))
    grids = [(columns, n // columns) for n in range(fewest, most + 1) for columns in range(1, n + 1)
             if n % columns == 0]
    distortion = {grid: abs(width / height - grid[0] / grid[1]) for grid in grids}
    closest = [grid for grid in grids if distortion[grid] == min(distortion.values())]
    filled = [grid for grid in closest if width * height > grid[0] * grid[1] * size ** 2 / 2]
    columns, rows = (filled or closest[:1])[-1]
    resized = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
    expected = [resized.crop((x * size, y * size, x * size + size, y * size + size))
                for y in range(rows) for x in range(columns)]
    if thumbnail and columns * rows > 1:
        expected.append(image.resize((size, size), Image.Resampling.BICUBIC))
    found = tile_image(image, most, size, thumbnail, fewest)
    assert [tile.tobytes() for tile in found] == [tile.tobytes() for tile in expected]


def test_pixels_are_the_official_ones():
    case, expected = CASES["picture"], load_file(OFFICIAL_DATA / "picture_pixels.safetensors")["pixel_values"]
    pixels = load_image(OFFICIAL_DATA / case["file"], case["max_num"], case["image_size"])
    # Below 4, float16 rounds by at most 2**-10; one grey level is 1 / 255 / 0.229 = 0.017: no pixel differs.
    assert_close(pixels, expected.float(), atol=2 ** -10, rtol=0)
    assert torch.equal(pixels, load_image(Image.open(PICTURE), 6, 56))
    for image, most, message in ((Image.new("RGB", (0, 5)), 1, "0 x 5 pixels"), (PICTURE, 0, "max_tiles 0")):
        with pytest.raises(InputError, match=message):
            load_image(image, most)


@on_every_device
def test_pixels_are_normalised_to_the_same_bits_on_every_device(device):
    tiles = torch.arange(256, dtype=torch.uint8).expand(2, 3, 4, 256)
    pixels, values = normalise(tiles.to(device)).cpu(), np.arange(256, dtype=np.float32) / np.float32(255)
    assert pixels.dtype == torch.float32 and pixels.shape == tiles.shape
    for i, (mean, std) in enumerate(zip(data.IMAGENET_MEAN, data.IMAGENET_STD, strict=True)):
        assert (pixels[:, i].numpy() == (values - np.float32(mean)) / np.float32(std)).all()


GREY = Image.open(PICTURE).convert("L")
GREY.putpixel((0, 0), 255)                         # its largest value is white in every depth
GREY_VALUES = np.asarray(GREY)


def saved(image: Image.Image, kind: str, **options) -> io.BytesIO:
    image.save(file := io.BytesIO(), kind, **options)
    return file


@pytest.mark.parametrize("mode, source", [
    *((mode, "RGB") for mode in ("1", "L", "P", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")),
    ("LA", "L"), ("PA", "P"), ("RGBa", "RGBA")])
def test_an_opaque_picture_of_8_bits_is_what_pillow_makes_of_it(mode, source):
    image = Image.open(PICTURE).convert("RGB").convert(source).convert(mode)
    assert torch.equal(load_image(image, 6, 56), load_image(image.convert("RGB"), 6, 56))


@pytest.mark.parametrize("values, kind", [
    *((GREY_VALUES.astype(order) * 257, kind) for order in ("<u2", ">u2") for kind in ("PNG", "TIFF", None)),
    *((GREY_VALUES.astype(np.int32) * scale, kind) for scale in (1, 257) for kind in ("TIFF", None)),
    *((GREY_VALUES.astype(np.float32) * scale, kind)
      for scale in (1 / 255, 1, 257, 2.0 ** 32 / 255) for kind in ("TIFF", None))])
def test_a_picture_is_the_same_in_every_depth_and_range(values, kind):
    image = Image.fromarray(values)
    assert image.mode in ("I;16", "I;16B", "I", "F")
    assert torch.equal(load_image(saved(image, kind) if kind else image, 6, 56), load_image(GREY, 6, 56))


def test_a_dark_picture_of_16_bits_stays_dark_and_12_bits_of_a_tiff_become_8():
    assert data.open_image(Image.fromarray(GREY_VALUES.astype(np.uint16))).getextrema() == ((0, 1),) * 3
    bits = "".join(f"{round(value * 4095 / 255):012b}" for value in range(256))
    pixels = int(bits, 2).to_bytes(len(bits) // 8, "big")                  # a row of all grey levels
    tags = {256: 256, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(pixels)}
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    tiff = struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", 9) + tags + bytes(4)
    assert [*data.open_image(io.BytesIO(tiff)).getchannel("R").tobytes()] == [*range(256)]


@pytest.mark.parametrize("value", [-1, -0.1, 2.0 ** 33, math.nan, math.inf, -math.inf])
def test_a_picture_whose_values_have_no_scale_is_refused_and_its_mode_named(value):
    values = GREY_VALUES.astype(np.int32 if value == -1 else np.float32)
    values[3, 4] = value
    with pytest.raises(InputError, match="not a readable image.* mode [IF] with values from"):
        load_image(saved(Image.fromarray(values), "TIFF"))
    with pytest.raises(InputError, match="not a readable image: .*La"):    # Pillow cannot convert this one
        load_image(Image.new("La", (3, 3)))


@pytest.mark.parametrize("mode, color", [("RGBA", None), ("LA", None), ("RGBa", None), ("P", None), ("1", 1),
                                         ("L", 200), ("RGB", (1, 2, 3)), ("I;16", 40_000)])
def test_what_is_transparent_is_white(mode, color):
    """A black square on a transparent ground: a palette's, a color that the PNG names as transparent, or an
    alpha channel with a stripe of half transparent black."""
    drawn, expected = Image.new("RGBA", (8, 8), (0, 0, 0, 0)), Image.new("RGB", (8, 8), "white")
    for image, black, half in (drawn, (0, 0, 0, 255), (0, 0, 0, 128)), (expected, (0, 0, 0), (127, 127, 127)):
        image.paste(black, (2, 2, 6, 6))
        if mode in ("RGBA", "LA", "RGBa"):
            image.paste(half, (6, 0, 8, 8))
    if color is None:
        image = drawn.quantize(4) if mode == "P" else drawn.convert(mode)
    else:
        image = Image.new(mode, (8, 8), color)
        image.paste(Image.new(mode, (4, 4)), (2, 2))
        image.info["transparency"] = color
    assert data.open_image(image).tobytes() == expected.tobytes()
    if mode != "RGBa":                             # a PNG has no such mode
        assert data.open_image(saved(image, "PNG")).tobytes() == expected.tobytes()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_a_picture_stands_upright_whatever_its_exif_orientation(kind):
    """The camera turned it by the inverse of what makes it upright."""
    upright, turn = Image.open(PICTURE).convert("RGB").crop((0, 0, 64, 32)), Image.Transpose
    turned = {2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
              6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270}
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    for orientation in range(10):
        image = upright.transpose(turned[orientation]) if orientation in turned else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        shown = data.open_image(saved(image, kind, exif=exif, **options))
        assert shown.size == upright.size
        difference = abs(np.asarray(shown, int) - np.asarray(upright, int)).max()
        assert difference <= (4 if kind == "JPEG" else 0), orientation
        assert data.open_image(shown).tobytes() == shown.tobytes()         # it is not turned twice


@pytest.mark.parametrize("block", [b"MM\0*\0\0\0\x08\0\x05\x01\x12", b"XX", b"", b"II*\0\xff\xff\xff\xff"])
def test_a_damaged_exif_block_leaves_a_picture_as_it_is(block):
    for kind in ("PNG", "JPEG", "WEBP"):
        plain, damaged = (saved(Image.open(PICTURE).convert("RGB"), kind, **options)
                          for options in ({}, {"exif": b"Exif\0\0" + block}))
        assert data.open_image(damaged).tobytes() == data.open_image(plain).tobytes()


def test_a_jpeg_without_its_end_and_a_png_with_large_texts_are_read_but_no_cut_or_huge_picture(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)                   # restored after the test
    picture, texts = Image.open(PICTURE).convert("RGB"), PngImagePlugin.PngInfo()
    texts.add_text("note", "long " * 10 ** 6, zip=True)
    for options in ({"pnginfo": texts}, {"icc_profile": bytes(3 * 10 ** 6)}):
        assert data.open_image(saved(picture, "PNG", **options)).tobytes() == picture.tobytes()
    for options in ({}, {"progressive": True}, {"restart_marker_rows": 1}):
        content = saved(picture, "JPEG", **options).getvalue()
        whole = data.open_image(io.BytesIO(content))
        assert data.open_image(io.BytesIO(content[:-2])).tobytes() == whole.tobytes()  # no end mark
        data.open_image(io.BytesIO(content[:-20]))
    for kind, mode in ("JPEG", "L"), ("JPEG", "CMYK"), *(
            (kind, "RGB") for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")):
        content = saved(picture.convert(mode), kind).getvalue()
        with pytest.raises(InputError, match="is not a readable image"):
            data.open_image(io.BytesIO(content[:len(content) // 2]))
    pixels = picture.width * picture.height
    for most in (pixels, pixels - 1, pixels // 3):
        with contextlib.nullcontext() if most == pixels else pytest.raises(
                InputError, match=f"pixels, expected 1 to {most} in all; --max_pixels"):
            load_image(PICTURE, 1, 56, max_pixels=most)


# ---------------------------------------------------------------- training samples from files

def write_meta(folder: Path, lines: list, **entry) -> Path:
    """meta.json with a dataset "a", a.jsonl with its lines (objects, or text as it is), and img/a.png."""
    (folder / "img").mkdir()
    shutil.copy(PICTURE, folder / "img/a.png")
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "meta.json").write_text(json.dumps({"a": {"annotation": "a.jsonl", "root": "img", **entry}}))
    return folder / "meta.json"


def write_shard(path: Path, files: dict[str, bytes], **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.type, member.size = tarfile.REGTYPE if content else tarfile.DIRTYPE, len(content)
            tar.addfile(member, io.BytesIO(content))


def assert_same(ours: dict, theirs: dict):
    for name, value in theirs.items():
        same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
        assert same, f"{name}: {ours[name]}, expected {value}"


@pytest.mark.parametrize("shards", [None, tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("own_tiles, thumbnail, fewest", [(3, True, 1), (None, False, 4)])
def test_a_dataset_gives_what_its_lines_or_shards_say(
        tmp_path, monkeypatch, shards, own_tiles, thumbnail, fewest):
    one, two, text = ask("<image>", "a car"), ask("<image> <image>", "Twice."), ask("你好", "hi")
    odd = "b\udce9\n.png"                          # no valid Unicode, but a file may have this name
    meta = write_meta(tmp_path, [{"id": "\ud800", "image": ["a.png", odd], "conversations": two}, "", " ",
                                 {"image": [], "conversations": text, "image_width": [3], "source": "x.png"},
                                 {"image": odd, "conversations": one}])
    Image.open(PICTURE).resize((40, 90)).save(small := tmp_path / "small.png")
    os.symlink(small, tmp_path / "img" / odd)      # a link of the user's may lead out of the folder
    files, names = ["a.jsonl", "a.jsonl"], ["\ud800", f"{tmp_path}/a.jsonl:4", f"{tmp_path}/a.jsonl:5"]
    if shards is not None:
        line, _, _, other, _ = (tmp_path / "a.jsonl").read_bytes().split(b"\n")
        long = "part/2" if shards == tarfile.USTAR_FORMAT else "long" * 80     # a header of several blocks
        write_shard(tmp_path / "s-000.tar", {
            "part.d": b"", f"{long}.0.png": Path(PICTURE).read_bytes(), f"{long}.json": line,
            f"{long}.1.png": small.read_bytes(), f"{long}.txt": b"no", "._a.png": b"Finder"}, format=shards)
        write_shard(tmp_path / "s-001.tar", {      # its first sample is called like the last one before it
                    f"{long}.json": other, "0001.txt": b"a car", "0001.json": b"{}",
                    "0001.png": small.read_bytes()}, format=shards)
        files = ["s-{000..001}.tar", ["s-*.tar"]]
        names = ["\ud800", f"{tmp_path}/s-001.tar: {long}", f"{tmp_path}/s-001.tar: 0001"]
    own = {"max_dynamic_patch": own_tiles} if own_tiles else {}
    meta.write_text(json.dumps({
        "a": {"annotation": files[0], "root": "img", **own},
        "b": {"annotation": files[1], "root": "img", "repeat_time": 2}}))
    config = replace(SMALL, use_thumbnail=thumbnail, min_dynamic_patch=fewest)
    samples = load_meta(meta, TOK, config, max_tiles=5)
    assert len(samples) == 9 and samples.has_images
    expected = [([PICTURE, small], two), ([], text), ([small], one)]
    for i, (name, (pictures, turns)) in enumerate(zip(names * 3, expected * 3, strict=True)):
        most = (own_tiles or 5 if i < 3 else 5) // max(1, len(pictures))   # the images share a budget
        tiles = [load_tiles(picture, most, 56, thumbnail, min(fewest, most)) for picture in pictures]
        ids, labels = encode_conversation(TOK, turns, [len(t) for t in tiles], SMALL.tokens_per_tile)
        assert_same(samples[i], {
            "id": name, "task": "a" if i < 3 else "b", "input_ids": torch.tensor(ids),
            "labels": torch.tensor(labels), "pixel_values": torch.cat(tiles) if tiles else None})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)                   # restored after the test
    with pytest.raises(InputError, match=f"^{re.escape(names[2])}: .* expected 1 to 999 .* --max_pixels"):
        load_meta(meta, TOK, config, max_pixels=999)[2]
    (file := tmp_path / ("a.jsonl" if shards is None else "s-000.tar")).unlink()
    with pytest.raises(InputError, match=f"{file} is not readable any more"):
        samples[0]


@pytest.mark.parametrize("names", [[".10.png", ".2.png"], ["1.png", "10.png"], ["part/7.2.png"],
                                   ["7.1.png", "elsewhere/7.10.png"], ["other.png"] * 3, None, []])
def test_images_of_a_shard_come_as_its_json_names_them_or_else_in_the_order_of_their_numbers(tmp_path, names):
    for file in (2, 10, 1):
        Image.new("RGB", (8, 8), (file, file, file)).save(tmp_path / f"{file}.png")
    shown = [int(re.findall("[0-9]+", name)[-1]) for name in names or [] if "other" not in name] or [1, 2, 10]
    line = {"image": names, "conversations": ask("<image>" * len(shown), "yes")}
    pictures = {f"part/7.{file}.png": (tmp_path / f"{file}.png").read_bytes() for file in (10, 2, 1)}
    files = {"part/7.json": json.dumps(line).encode(), **pictures}
    write_shard(tmp_path / "a.tar", files)
    sample = data.TarDataset([f"{tmp_path}/a.tar"], TOK, SMALL, max_tiles=3)[0]
    tiles = [load_tiles(tmp_path / f"{file}.png", 1, 56) for file in shown]
    assert torch.equal(sample["pixel_values"], torch.cat(tiles))
    if names and "other.png" not in names:         # if one is named, all that are named must exist
        for wrong in ("7.3.png", names[0] + "x", f"another/{names[0]}"):
            line["image"] = [*names, wrong]
            write_shard(tmp_path / "a.tar", {**files, "part/7.json": json.dumps(line).encode()})
            with pytest.raises(InputError, match="part/7: image is .*, but the sample has part/7.10.png"):
                data.TarDataset([f"{tmp_path}/a.tar"], TOK, SMALL)[0]


def test_a_dataset_knows_whether_any_line_has_an_image(tmp_path):
    text = [{"conversations": ask('{"image": "a.png"}', "b")}, {"image": "", "conversations": ask("a", "b")},
            {"image": [], "conversations": ask("a", "b")}, {"image": None, "conversations": ask("a", "b")}]
    meta = write_meta(tmp_path, text)
    entry = json.loads(meta.read_text())["a"]
    meta.write_text(json.dumps({"text": entry, "last": {**entry, "annotation": "last.jsonl"}}))
    for image in (None, "a.png", ["a.png"]):
        (tmp_path / "last.jsonl").write_text(json.dumps({"image": image, "conversations": ask("a", "b")}))
        assert load_meta(meta, TOK, SMALL).has_images is bool(image)
        write_shard(tmp_path / "a.tar", {"1.json": b"{}", **({"1.png": b"a"} if image else {})})
        assert data.TarDataset([f"{tmp_path}/a.tar"], TOK, SMALL).has_images is bool(image)


@law
@given(st.lists(st.sampled_from(["\n", " ", "\r\n", "\t", "7", "8.5"]), max_size=12).map("".join),
       st.sampled_from([1, 3, 0.3, 1.5, 2.25]), st.sampled_from(["utf-8", "utf-8-sig"]))
def test_each_line_is_a_sample_as_often_as_asked_for(text, times, encoding):
    lines = {number: line.strip() for number, line in enumerate(text.split("\n"), 1) if line.strip()}
    whole, size, numbers = int(times), int(times) * len(lines) + round(times % 1 * len(lines)), []
    assume(size)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "a.jsonl").write_bytes(text.encode(encoding))
        samples = JsonlDataset(f"{folder}/a.jsonl", folder, TOK, SMALL, times)
        for i in range(len(samples)):
            with pytest.raises(InputError) as error:                       # it says which line was read
                samples[i]
            _, number, what = str(error.value).split(":", 2)
            numbers.append(int(number))
            assert what.startswith((f" {lines[numbers[-1]]} is not", " not JSON"))
    assert numbers[:whole * len(lines)] == [*lines] * whole and len(numbers) == size
    assert {numbers.count(number) for number in lines} <= {whole, whole + 1}


def test_fractions_of_a_dataset_and_the_jpeg_of_data_augment_are_drawn_by_the_seed(tmp_path):
    line = {"image": "a.png", "conversations": ask("<image>", "b")}
    meta = write_meta(tmp_path, [{**line, "id": i} for i in range(16)], data_augment=True, repeat_time=0.5)
    quality_of = {}                                # pixels of a tile -> the quality of JPEG that gives them
    for tile, quality in itertools.product(tile_image(PICTURE, 6, 56), range(75, 101)):
        tile.save(file := io.BytesIO(), "JPEG", quality=quality)
        quality_of[load_tiles(Image.open(file), 1, 56).numpy().tobytes()] = quality
    samples = [[load_meta(meta, TOK, SMALL, seed=seed)[i] for i in range(8)] for seed in (0, 0, 1)]
    ids, again, other = ([s["id"] for s in eight] for eight in samples)
    assert ids == again != other and max(ids) > 8
    drawn, again, other = ([quality_of[tile.numpy().tobytes()] for s in eight for tile in s["pixel_values"]]
                           for eight in samples)
    assert drawn == again != other and len({*drawn}) > 9


# ---------------------------------------------------------------- wrong and damaged files

SHARD, SAMPLE_FILES = "model-00001-of-00002.safetensors", ["meta.json", "a.jsonl", "img/a.png", "s.tar"]
FILES = ["config.json", "model.safetensors.index.json", SHARD, "tokenizer.model", "added_tokens.json",
         "tokenizer_config.json", "llama/config.json", "llama/model.safetensors", *SAMPLE_FILES]


@pytest.fixture(scope="module")
def good_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(OFFICIAL_DATA, folder, dirs_exist_ok=True)
    tiny(vocab_size=len(TOK), img_context_token_id=None).save_pretrained(folder, max_shard_bytes=200_000)
    shutil.copytree(LLAMA, folder / "llama", ignore=lambda *_: ["golden.safetensors"])
    lines = [{"id": 1, "image": "a.png", "conversations": ask("<image>", "b", "c", "d")},
             {"conversations": ask("a", "b")}]
    write_meta(folder, lines, repeat_time=1, max_dynamic_patch=3, data_augment=False)
    write_shard(folder / "s.tar", {"1.txt": b"a car", "1.png": Path(PICTURE).read_bytes(),
                                   "2.json": json.dumps(lines[1]).encode()})
    return folder


def shard_of(*names: str) -> bytes:
    """A shard of empty files."""
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as tar:
        for name in names:
            tar.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def error_of(folder: Path, file: str, content: bytes | None) -> str | None:
    """What is said if one of FILES has this content (None: if it is missing), or None if all loads."""
    original = (folder / file).read_bytes()
    try:
        (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
        if file in SAMPLE_FILES:
            samples = (data.TarDataset([f"{folder}/s.tar"], TOK, SMALL) if file == "s.tar" else
                       load_meta(folder / "meta.json", TOK, SMALL))
            for i in reversed(range(len(samples))):                        # a bad first one leaves the others
                samples[i]
        elif file.startswith("llama"):
            MonoInternVL.from_llm(folder / "llama", dtype=None)
        else:
            Tokenizer(folder), MonoInternVL.from_pretrained(folder, dtype=None)
    except InputError as e:
        assert "\n" not in str(e)
        if file in SAMPLE_FILES:                   # it is short and can be printed, whatever names it holds
            assert len(str(e).encode()) < 1000
        return str(e)
    finally:
        (folder / file).write_bytes(original)


SYSTEM = {"from": "system", "value": "Look."}
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 7\n", "Git LFS"
# For each file, what is wrong and what is said. Wrong is a field's value (without a message, the field is
# named), a whole content (None: the file is missing), or what a function does to the tensors.
WRONG = {
    "config.json": [
        *(("num_hidden_layers", value) for value in ("2", True, 2.0, 10 ** 6)), ("hidden_size", 0),
        ("hidden_size", 30), ("num_key_value_heads", 3), ("rms_norm_eps", None), ("rms_norm_eps", math.nan),
        ("rope_theta", math.inf), ("rope_theta", 10 ** 400), ("attn_experts", "kv"),
        ("rope_scaling", [2]), ("rope_scaling", {"type": "yarn", "factor": 2.0}), ("bos_token_id", -1),
        ("rope_scaling", {"type": "linear"}), ("rope_scaling", {"type": "linear", "factor": True}),
        ("rope_scaling", {"type": "linear", "factor": 0.5}), ("downsample_ratio", 0.3), ("use_thumbnail", 1),
        ("min_dynamic_patch", 13), ("img_context_token_id", len(TOK)), ("bias", True), ("hidden_act", "gelu"),
        ("tie_word_embeddings", True), ("ps_version", "v1"), ("force_image_size", 8),
        ("num_attention_heads", 16, "hidden_size"), ("patch_size", 3, "image_size"),
        ("hidden_size", 2 ** 31, "sizes cannot be built"), (None, "does not exist; expected a checkpoint"),
        *((text, "is not readable JSON") for text in (b"\xed\xa0", b"[" * 50_000)),
        (b"[1]", "holds a JSON list"), (b'{"llm_config": [1]}', "no field llm_config.vocab_size")],
    "model.safetensors.index.json": [
        (None, "model.safetensors does not exist"),
        *(("weight_map", value) for value in (None, [], {"a": 3}, {"a": "../a"}, {"a": "/etc/passwd"}))],
    SHARD: [
        LFS, (None, f"{SHARD} does not exist"),
        (lambda t: t.pop("mlp1.1.bias"), "tensor mlp1.1.bias is missing"),
        (lambda t: t.update(surplus=torch.zeros(3)), "tensor surplus has no place"),
        (lambda t: t.update({"mlp1.1.bias": torch.zeros(3)}), "mlp1.1.bias is .3,., the config says .32,"),
        (lambda t: t.update({"mlp1.1.bias": torch.zeros(32).int()}), "is torch.int32, expected floating")],
    "tokenizer.model": [LFS, (None, "has no tokenizer.model"), (b"no", "is not a sentencepiece model")],
    "added_tokens.json": [*(("<IMG_CONTEXT>", i, "does not map tokens to ids") for i in ("x", math.inf)),
                          ("<IMG_CONTEXT>", 500, "img_context_token_id is 500")],
    "tokenizer_config.json": [("added_tokens_decoder", {"5": {"content": 3}}, "does not map tokens to ids")],
    "llama/config.json": [
        ("rope_type", "llama3", "rope_scaling.*llama3"), ("rope_parameters", [2]), ("attention_bias", True),
        ("mlp_bias", True), ("bias", True), ("hidden_act", "gelu"), ("model_type", "gpt2"),
        ("head_dim", 16, "head_dim is 16, supported is .* = 8"), (None, "does not exist; expected an LLM"),
        ("num_key_value_heads", 4, "q_proj.weight or its k_proj"), ("vocab_size", 2 ** 31, "is .48, 32"),
        (b'{"model_type": "internlm2", "tie_word_embeddings": true}', "tie_word_embeddings is True")],
    "meta.json": [
        *(("repeat_time", value, "repeat_time of .* expected a positive") for value in (0, "2", True, 1e308)),
        ("repeat_time", 0.001, "no samples"), ("annotation", "none", "none is not readable: No such"),
        ("annotation", "\0", "is not readable"), ("root", "none", "image folder .*none of .* does not exist"),
        *((field, value, "dataset a needs root")
          for field, value in (("root", None), ("annotation", []), ("a", 3))),
        ("annotation", ["none.tar"], "none.tar is no complete, uncompressed .tar"),
        ("annotation", "none-*.tar", "no file is called .*none"), ("annotation", "\0*.tar", "is no complete"),
        ("max_dynamic_patch", 0), ("max_dynamic_patch", True), ("data_augment", "yes"),
        ("a", {"root": "img", "annotation": "a.jsonl", "repeat": 2}, "dataset a has the unknown field"),
        (b"{}", "meta.json: expected")],
    "a.jsonl": [
        *(("conversations", value, "expected a list of turns") for value in ([], None, {"from": "human"})),
        ("conversations", [None, "hi"], "expected a list of turns"),
        ("conversations", [SYSTEM], "expected a list of turns"),
        ("conversations", [SYSTEM] * 2, "turn 2 .* is from 'system', expected \"human\""),
        ("conversations", [*ask("a", "b"), SYSTEM], "turn 3 .* is from 'system', expected \"human\""),
        ("conversations", [{**SYSTEM, "value": 3}, *ask("a", "b")], "turn 1 .* value 3, expected text"),
        ("conversations", [{**SYSTEM, "value": "<img>"}, *ask("a", "b")], "turn 1 .* control token <img>"),
        *(("conversations", ask("<image>", *answers), "an answer .* is empty")
          for answers in ([""], [" \n", "c", "d"])),
        ("conversations", ["hi"], "turn 1 .* is from None, expected \"human\""),
        ("conversations", ask("hi") * 2, "turn 2 .* is from 'human', expected \"gpt\""),
        ("conversations", [{"from": "human", "value": 3}], "value 3, expected text"),
        *(("conversations", ask("hi", f"x{token}y"), f"turn 2 .* control token {re.escape(token)}")
          for token in ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>")),
        ("conversations", ask("<image>"), "no answer to learn"),
        ("conversations", ask("<image>\ud800", "b"), "not valid Unicode"),
        ("conversations", ask("<image>" + "a " * 500, "b"), "tokens, the limit is 512"),
        ("conversations", ask("a", "b"), "has 0 <image> marks for 1 images"),
        ("image", 3, "image is 3"), ("image", [None], "image is"), ("image", "no.png", "png does not exist"),
        *(("image", file, "is not a readable image")
          for file in ("nul\0.png", ".", "\ud800.png", "x" * 1000)),
        ("image", "/9j/" * 50_000, "image '/9j/.* is no file name; save base64 pictures as files"),
        *(("image", file, "leads out of the image folder")
          for file in ("../a.jsonl", "img/../a.png", PICTURE)),
        *((field, value, f"field '{field}' is unknown; pictures belong in \"image\"")
          for field in ("images", "Image", "image_path", "IMAGE_URLS", "input_image", "image_2", "img",
                        "picture_file", "photo", "video", "frames", "pixel_values", "image-base64")
          for value in ("a.png", ["a.png"], {"bytes": "a"})),
        *((line, "a.jsonl:1: not JSON") for line in (b"{bad", b"1" * 5000, b'{"a":' * 100_000)),
        (b"1", "a.jsonl:1: .* is not an object"), LFS,
        *((text, "a.jsonl is not readable: expected JSONL, and it is one JSON") for text in (
            b'[{"id": 0}]', b' \n[\n{"id": 0}]', b'\xef\xbb\xbf[{}]', b'{\n"id": 0}', b"[" * 100_000)),
        *(('{"id": 0}\n'.encode(code), "a.jsonl is not readable: expected UTF-8 .* UTF-16")
          for code in ("utf-16", "utf-16-le", "utf-16-be"))],
    "img/a.png": [                                 # two are a header alone, of a huge picture
        (b"hello", "a.jsonl:1: .*a.png is not a readable image"), LFS,
        (b"P6 20000 20000 255\n", "a.jsonl:1: .*a.png is 20000 x 20000 pixels, .* 268435456 .* --max_pixels"),
        (b"P6 100000 100000 255\n", "a.png is more than 536870912 pixels, .* 268435456 .* --max_pixels")],
    "s.tar": [
        (gzip.compress(b""), "s.tar is no complete, uncompressed .tar"), LFS,
        *((shard_of(*names), f"s.tar is no .* .tar of samples: {wrong} does not fit: ")
          for *names, wrong in (
              ("a.json", "b.json", "a.png", "a.png"), ("a.json", "a.png", "a.json", "a.json"),
              ("a.1.png", "a.1.json", "a.1.json"), ("a.1.txt", "a.1.txt"))),
        (shard_of("a.png"), "s.tar: a has no .json and no .txt"), (shard_of("README"), "has no samples")]}


@pytest.mark.parametrize("file, wrong", [(file, wrong) for file in WRONG for wrong in WRONG[file]])
def test_what_is_wrong_with_a_file_is_said_in_one_line(good_files, file, wrong):
    change, content = wrong[0], (good_files / file).read_bytes()
    message = change if isinstance(change, str) and len(wrong) == 2 else wrong[-1]
    if isinstance(change, str):
        document, end = json.JSONDecoder().raw_decode(content.decode())
        nodes = [document, *(node for node in document.values() if isinstance(node, dict))]
        next((node for node in nodes if change in node), document)[change] = wrong[1]
        change = json.dumps(document).encode() + content[end:]
    elif callable(change):
        change(tensors := safetensors.torch.load(content))
        change = safetensors.torch.save(tensors)
    error = error_of(good_files, file, change)
    assert error and re.search(message, error), error[:1000]


# What no field expects: more than an int64, a float or the memory can hold, names that no file can have.
ODD = [10 ** 400, 2 ** 40, -1, 0.5, math.inf, math.nan, "\0", "\ud800", "a\nb", "..", "x" * 300, ["\0*.tar"],
       "s-{0..2}.tar", {"content": 3}]
WORDS = st.text(st.characters(exclude_characters="/"), max_size=4)
ANY_JSON = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2), max_leaves=4)


def fields_of(document):
    """(object or list, key or index) of every value within."""
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        yield document, key
        if isinstance(value, dict | list):
            yield from fields_of(value)


@pytest.mark.parametrize("file, damage", [
    (file, damage) for file in FILES for damage in ("cut", "flip", "value")
    if ".json" in file or damage != "value"])
@settings(max_examples=30)
@given(draw=st.data())
def test_a_file_cut_or_damaged_or_with_any_json_value_loads_or_is_one_line_that_names_it(
        good_files, file, damage, draw):
    content = (good_files / file).read_bytes()
    at = draw.draw(st.sampled_from(range(len(content))) | st.sampled_from(range(len(content))[:2000])
                   | st.sampled_from(range(0, len(content), 512)))
    change = content[:at]
    if damage == "flip":
        change += bytes([content[at] ^ draw.draw(st.integers(1, 255))]) + content[at + 1:]
    elif damage == "value":
        document, end = json.JSONDecoder().raw_decode(content.decode())
        node, key = draw.draw(st.sampled_from(list(fields_of(document))))
        node[key] = draw.draw(ANY_JSON)
        change = json.dumps(document).encode() + content[end:]
    error = error_of(good_files, file, change)
    assert error is None or str(good_files) in error or "img_context_token_id" in error
    if damage == "cut" and file.endswith((".json", ".safetensors", ".png")):
        assert error or at == len(content) - 1     # a newline
    if damage == "cut" and file == "s.tar":        # two blocks of zeros end a shard, one is enough
        assert bool(error) == (at < 512 * -(-len(content.rstrip(b"\0")) // 512) + 512)


# ---------------------------------------------------------------- collation and flags

@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 2)), min_size=1, max_size=4), st.booleans(),
       st.booleans())
def test_rows_are_packed_and_padded_on_the_side_asked_for_and_only_if_needed(sizes, left, packed):
    samples = [{"input_ids": torch.arange(n) + 10, "labels": torch.arange(n) + 20,
                "pixel_values": torch.full((tiles, 3, 2, 2), i, dtype=torch.uint8) if tiles else None}
               for i, (n, tiles) in enumerate(sizes)]
    rows = [samples[i // 2:i + 1] if packed else [s] for i, s in enumerate(samples)]
    lengths, number = [sum(len(s["labels"]) for s in row) for row in rows], itertools.count()

    def padded(value, tokens_of):
        """tokens_of: a function of a sample and its place in the row, from 1 on."""
        found = [torch.cat([tokens_of(s, place) for place, s in enumerate(row, 1)]) for row in rows]
        missing = [max(lengths) - n for n in lengths]
        return torch.stack([F.pad(row, (n, 0) if left else (0, n), value=value)
                            for row, n in zip(found, missing, strict=True)])
    batch = collate([pack(row) if packed else row[0] for row in rows], 99, left)
    tiles = [s["pixel_values"] for row in rows for s in row if s["pixel_values"] is not None]
    assert_same({"document_ids": None, **batch, "number": data.sample_numbers(batch)}, {
        "input_ids": padded(99, lambda s, _: s["input_ids"]),
        "labels": padded(IGNORED, lambda s, _: s["labels"]),
        "attention_mask": padded(0, lambda s, _: s["labels"] ** 0) if min(lengths) < max(lengths) else None,
        "document_ids": padded(0, lambda s, place: torch.full_like(s["labels"], place)) if packed else None,
        "number": padded(-1, lambda s, _: torch.full_like(s["labels"], next(number))),
        "pixel_values": torch.cat(tiles) if tiles else None})


@dataclass
class Flags:
    steps: int = flag(3, "how many, 100% of them")
    lr: float = 1e-3
    compile: bool = True
    top_k: int | None = None
    image: list[str] = flag([], "files")
    moe: str = flag("auto", "back end", choices=["auto", "dense"])
    sizes: list[int] = flag([1, 2], "widths")
    graphs: bool | None = None


@pytest.mark.parametrize("argv, expected", [
    ("", Flags(3, 1e-3, True, None, [], "auto", [1, 2])), ("--help", "widths (default: [1, 2])"),
    ("--image a --sizes 3 --image b c --sizes 4 5", Flags(image=["a", "b", "c"], sizes=[3, 4, 5])),
    ("--steps=4 --lr 1 --no-compile --top_k 5 --image a b --moe dense --graphs",
     Flags(4, 1.0, False, 5, ["a", "b"], "dense", graphs=True)), ("--no-graphs", Flags(graphs=False)),
    ("--setps 4", "unknown argument --setps; did you mean --steps?"), ("--step 4", "did you mean --steps?"),
    ("--top-k=4", "unknown argument --top-k; did you mean --top_k?"), ("--xyz", "unknown argument --xyz "),
    ("--steps x", "invalid int value"), ("--moe fast", "invalid choice"), ("--help", "{auto,dense}"),
    ("--help", "how many, 100% of them (default: 3)"), ("--help", "--no-compile")])
def test_flags_keep_types_and_have_help_and_a_wrong_one_exits_with_the_nearest_name(argv, expected, capsys):
    if isinstance(expected, Flags):
        assert parse_flags(Flags, argv.split()) == expected
        return
    with pytest.raises(SystemExit) as exit_:
        parse_flags(Flags, argv.split())
    said = re.sub(r"\s+", " ", "".join(capsys.readouterr()))
    assert expected in said and exit_.value.code == (0 if argv == "--help" else 2)


@pytest.mark.parametrize("gpu, mac, device", [
    (True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_is_the_fastest_device_of_the_machine(monkeypatch, gpu, mac, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mac)
    assert common.auto_device() == device


# ---------------------------------------------------------------- packing and order

class Samples(list):
    """Samples of such lengths. The id is the index; bad ones cannot be read."""

    def __init__(self, lengths, bad=()):
        self.bad = bad
        super().__init__({"input_ids": torch.full((n,), i), "labels": torch.arange(n), "pixel_values": None,
                          "id": i, "task": f"{i}?"} for i, n in enumerate(lengths))

    def __getitem__(self, i):
        if i in self.bad:
            raise InputError(f"line {i}")
        return super().__getitem__(i)


def test_epochs_and_seeds_differ_and_too_many_bad_samples_or_another_order_are_refused(capsys):
    def ids(n, bad=(), dataset=None, **options):
        options = {"batch_size": 1, "pad_token_id": 0, "pool": 1, **options}
        batches = Batches(dataset or Samples([9] * 10, bad), **options)
        return [i for batch in itertools.islice(batches, n) for i in batch["ids"]]
    assert len({*map(tuple, (ids(10), ids(20)[10:], ids(10, seed=1), range(10)))}) == 4

    class Endless:
        def __getitem__(self, i):
            return {**Samples([1])[0], "id": i}
    assert ids(3, dataset=Endless(), batch_size=2, rank=1, world_size=3) == [1, 4, 7, 10, 13, 16]
    ids(30, range(5), max_bad=0.5)
    assert capsys.readouterr().err.count("bad sample, left out: line") == 5
    for options, message in (({"bad": range(6), "max_bad": 0}, r"1 of the \d+ samples .* unreadable; --max"),
                             ({"bad": range(10), "max_bad": 0.5}, "all 10 samples are unreadable"),
                             ({"pack_tokens": 8}, "sample .: 9 tokens, a packed row has 8")):
        with pytest.raises(InputError, match=message):
            ids(30, **options)
    for bad, seen, size, allowed in ((10, 20, 10 ** 6, 1), (11, 20, 10 ** 6, 0), (20, 2000, 10 ** 6, 1),
                                     (21, 2000, 10 ** 6, 0), (10, 50, 60, 1), (11, 50, 60, 0)):
        assert (data.too_many_bad(bad, seen, size, 0.01) is None) == allowed
    assert data.too_many_bad(1, 20, 10 ** 6, 0) and not data.too_many_bad(0, 20, 10 ** 6, 0)
    options = {"dataset": Samples([9] * 10), "batch_size": 2, "pad_token_id": 0, "pool": 3, "world_size": 2}
    next(iter(source := Batches(**options)))
    for name, value in (("batch_size", 3), ("pool", 2), ("pack_tokens", 99), ("seed", 1), ("rank", 1),
                        ("world_size", 1), ("dataset", Samples([9] * 11)),
                        ("dataset", Samples([9] * 10, range(10)))):    # now unreadable
        with pytest.raises(InputError, match=f"saved with {'size' if name == 'dataset' else name} = |^line"):
            Batches(**{**options, name: value}).load_state_dict(source.state_dict())


def naive_batches(samples, order, batch_size, pool, limit, seed):
    """Rows of indices as Batches gives them, without workers, sorted buffers, saving. order: this rank's."""
    lengths, waiting, shuffle = [len(s["labels"]) for s in list(samples)], [], random.Random(seed).shuffle
    good = (i for i in order if i not in samples.bad and lengths[i] <= (limit or 99))
    while limit is None:
        batches = sorted(itertools.islice(good, pool * batch_size), key=lengths.__getitem__)
        batches = [batches[at:at + batch_size] for at in range(0, len(batches), batch_size)]
        shuffle(batches)
        yield from [[[i] for i in batch] for batch in batches]
    while True:
        while sum(lengths[i] for i in waiting) < pool * batch_size * limit:
            waiting.append(next(good))
        rows = []
        for _ in range(batch_size):
            row = [waiting.pop(0)]                                         # it has waited longest
            while fitting := [i for i in waiting if lengths[i] + sum(lengths[k] for k in row) <= limit]:
                row.append(max(fitting, key=lengths.__getitem__))          # of equals the oldest
                waiting.remove(row[-1])
            rows.append(row)
        yield rows


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@law
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), bad=st.sets(st.integers(0, 8)),
       limit=st.sampled_from([None, 8]), batch_size=st.integers(1, 3), pool=st.integers(1, 2),
       world_size=st.integers(1, 3), seed=st.integers(0, 3), workers=st.just(0),
       stops=st.lists(st.integers(0, 3), max_size=4))
@example([3, 9, 1, 4, 8, 2, 5], {5}, 8, 2, 2, 2, 0, 2, [1, 2])
def test_batches_are_those_of_a_naive_loop_wherever_the_order_is_saved_and_restored(
        lengths, bad, limit, batch_size, pool, world_size, seed, workers, stops):
    n, samples, named, rank = len(lengths), Samples(lengths, bad), [], seed % world_size
    unreadable = {i for i, tokens in enumerate(lengths) if i in bad or tokens > (limit or 9)}
    assume(len(unreadable) < n)
    whole_order = Batches(Samples([1] * n), 1, 0, seed=seed, pool=1)       # of one process
    epochs, share = itertools.tee(batch["ids"][0] for batch in whole_order)
    assert [sorted(itertools.islice(epochs, n)) for _ in range(3)] == [list(range(n))] * 3
    order, seen = itertools.tee(itertools.islice(share, rank, None, world_size))
    expected = naive_batches(samples, order, batch_size, pool, limit, seed)

    def new():
        return Batches(samples, batch_size, 0, seed=seed, rank=rank, world_size=world_size, workers=workers,
                       pool=pool, pack_tokens=limit, max_bad=1, on_bad=lambda i, _: named.append(i))
    source, tokens, room = new(), 0, 0
    for steps in [*stops, 2]:
        for batch, rows in zip(itertools.islice(source, steps), expected, strict=False):
            ids, rows = sum(rows, []), [[samples[i] for i in row] for row in rows]
            assert_same(batch, {**collate([pack(row) if limit else row[0] for row in rows]),
                                "ids": ids, "tasks": [f"{i}?" for i in ids]})
            tokens, room = tokens + sum(lengths[i] for i in ids), room + batch_size * (limit or 0)
        state = json.loads(json.dumps(source.state_dict()))
        source = new()
        source.load_state_dict(state)
    assert sorted(named) == sorted(source.bad) == sorted({*itertools.islice(seen, source.seen)} & unreadable)
    assert source.utilisation == (tokens / room if limit else 0)


@law
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), bad=st.sets(st.integers(0, 8)),
       limit=st.sampled_from([None, 8]), seed=st.integers(0, 3),
       runs=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=2, max_size=4))
def test_another_number_of_processes_loses_no_sample_and_reads_none_twice(lengths, bad, limit, seed, runs):
    """runs: for each run, how many batches each of its processes gives."""
    samples, states, given_ids = Samples(lengths, bad), [], []
    unreadable = {i for i, tokens in enumerate(lengths) if i in bad or tokens > (limit or 9)}
    assume(len(unreadable) < len(lengths))
    for steps in [*runs, [0]]:                     # the last run only tells what is still to come
        processes = [Batches(samples, 1, 0, seed=seed, rank=rank, world_size=len(steps), pool=2, max_bad=1,
                             pack_tokens=limit, on_bad=lambda *_: None) for rank in range(len(steps))]
        for batches, n in zip(processes, steps, strict=True):
            if states:
                batches.take_over(states)
            given_ids += [i for batch in itertools.islice(batches, n) for i in batch["ids"]]
        states = [json.loads(json.dumps(batches.state_dict())) for batches in processes]
    whole_order = Batches(Samples([1] * len(lengths)), 1, 0, seed=seed, pool=1)
    order = [batch["ids"][0] for batch in itertools.islice(whole_order, batches.start)]
    still_to_come = [order[position] for position in batches.left_over]
    assert sorted(given_ids + [i for i in still_to_come if i not in unreadable]) == \
        sorted(i for i in order if i not in unreadable)


READ_IN_A_WORKER = """
import os, time
from data import Batches
class Slow:
    def __getitem__(self, i):
        print(os.getpid(), flush=True)
        time.sleep(100)
next(iter(Batches(Slow(), 1, 0, workers=1)))
"""


def test_a_reader_process_that_is_killed_is_named_in_one_line():
    class KillsItsReader(list):
        def __getitem__(self, i):
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(InputError, match=r"^a process that reads samples ended \(Data.*--workers.*$"):
        next(iter(Batches(KillsItsReader([1]), 1, 0, workers=1)))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reader_processes_end_with_a_trainer_that_was_killed():
    with subprocess.Popen([sys.executable, "-c", READ_IN_A_WORKER],
                          cwd=HERE, stdout=subprocess.PIPE, text=True) as trainer:
        reader = int(trainer.stdout.readline())
        trainer.kill()
    for _ in range(100):
        if not Path(f"/proc/{reader}").exists():
            return
        time.sleep(0.1)
    os.kill(reader, signal.SIGKILL)
    raise AssertionError("the reader still lives after 10 s")


# ---------------------------------------------------------------- sample.py

ENDS = TOK.token_id("<|im_end|>"), TOK.eos_id      # either of them ends an answer
OWN = object()                                     # in a script for `listen`: the token of the model itself
SAMPLING = [{}, {"repetition_penalty": 5.0}, {"temperature": 0.3, "seed": 0},
            {"temperature": 0.5, "top_k": 40, "top_p": 0.9, "repetition_penalty": 3.0, "seed": 4}]


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> str:
    """A checkpoint folder with two pictures, of 3 tiles and of 1. The weights are large: one more word or
    picture in the prompt changes the answer, and both end tokens occur."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    model = MonoInternVL(SMALL)
    with torch.no_grad():
        model.language_model.output.weight[list(ENDS)] *= 1.5
        for p in model.language_model.model.layers.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    model.save_pretrained(folder)
    shutil.copytree(OFFICIAL_DATA, folder, dirs_exist_ok=True)
    Image.new("RGB", (56, 56), "red").save(folder / "red.png")
    return str(folder)


def listen(patch, scripts=()) -> list:
    """Returns a list to which each call of generate adds what it got and gave. A script tells one call what
    to give: OWN, other tokens, exceptions to raise. Calls after the last script give what the model gives."""
    calls, scripts, generate = [], iter(scripts), MonoInternVL.generate

    def wrapper(self, input_ids, pixel_values=None, **options):
        own, tokens = generate(self, input_ids, pixel_values, **options), []
        calls.append(SimpleNamespace(model=self, ids=input_ids, pixels=pixel_values, options=options,
                                     tokens=tokens))
        for item in next(scripts, itertools.repeat(OWN)):
            token = next(own, None)
            if isinstance(item, BaseException | type):
                raise item
            if item is OWN and token is None:
                return
            tokens.append(token.tolist() if item is OWN else [item])
            yield torch.tensor(tokens[-1])
    patch.setattr(MonoInternVL, "generate", wrapper)
    return calls


def type_in(patch, *lines: str):
    """What the user of a chat types."""
    patch.setattr("builtins.input", unittest.mock.Mock(side_effect=[*lines, EOFError]))


def write_lines(path: Path | str, lines: list[dict]):
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("argv, on_a_gpu, on_a_cpu", [
    ("", True, False), ("--input a.jsonl --output b.jsonl", True, False), ("--prompt hi", False, False),
    ("--prompt=", False, False), ("--no-compile", False, False), ("--prompt hi --compile", True, True)])
def test_a_chat_or_a_file_of_questions_on_a_gpu_is_compiled_unless_a_flag_says_otherwise(
        argv, on_a_gpu, on_a_cpu):
    flags = parse_flags(sample.Flags, argv.split())
    assert [sample.compiles(flags, kind) for kind in ("cuda", "cpu", "mps")] == [on_a_gpu, on_a_cpu, on_a_cpu]


@functools.cache
def answer_alone(folder: str, turns: tuple, images: tuple, **options) -> tuple[str, bool]:
    """What the model answers to the last turn of a conversation, asked without sample.py, and whether the
    answer came to its end."""
    tiles = [load_image(Path(folder) / image, 6, 56) for image in images]
    ids, _ = encode_conversation(TOK, data.turns(*turns), [len(t) for t in tiles], SMALL.tokens_per_tile)
    tokens = [int(t) for t in MonoInternVL.from_pretrained(folder).generate(
        torch.tensor([ids]), torch.cat(tiles) if tiles else None, eos_token_id=ENDS, **options)]
    text = TOK.decode([t for t in tokens if t not in ENDS], skip_special_tokens=False)
    return text, tokens[-1] in ENDS


ASKED = [                                          # a line of a file of questions, what the model should read
    ({"image": "red.png", "question": "What?"}, ("<image>\nWhat?",), ("red.png",)),
    ({"question": "hi " * 40}, ("hi " * 40,), ()), ({"question": "hi"}, ("hi",), ()),
    ({"question": "x " * 174}, ("x " * 174,), ()),                         # its answer fills the context
    ({"image": ["picture.png", "red.png"], "question": "So?", "id": 7},
     ("Image-1: <image>\nImage-2: <image>\nSo?",), ("picture.png", "red.png")),
    ({"image": "red.png", "question": "What is <image>?"}, ("What is <image>?",), ("red.png",)),
    ({"question": "ü"}, ("ü",), ()), ({"conversations": data.turns("So?")}, ("So?",), ()),
    ({"image": "red.png", "conversations": data.turns("<image>\nWhat?", "Red.", "Sure?", "Yes."), "id": "x"},
     ("<image>\nWhat?", "Red.", "Sure?"), ("red.png",))]                   # its last answer is not shown


def test_flags_reach_the_model_and_the_pictures(saved_model, tmp_path, monkeypatch):
    shutil.copytree(saved_model, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"use_thumbnail": False, "min_dynamic_patch": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    calls, options = listen(monkeypatch), {**SAMPLING[3], "max_new_tokens": 1, "prefill_chunk": 9}
    for argv in (["--dtype=float16", "--compile"], ["--moe=dense", "--no-cuda_graphs", "--max_tiles=2"]):
        sample.main(["--model", str(tmp_path), "--device=cpu", "--prompt", "hi", "--image", PICTURE, PICTURE,
                     *argv, *(f"--{name}={value}" for name, value in options.items())])
    models = [call.model for call in calls]
    assert [(m.moe, next(m.parameters()).dtype, m.cuda_graphs, m.compile_decode) for m in models] == [
        ("auto", torch.float16, True, True), ("dense", torch.float32, False, False)]
    for call, limits in zip(calls, [(6, 56, False, 4), (2, 56, False, 2)], strict=True):
        tiles, asked = load_image(PICTURE, *limits), data.turns("Image-1: <image>\nImage-2: <image>\nhi")
        assert call.ids[0].tolist() == encode_conversation(TOK, asked, [len(tiles)] * 2, 4)[0]
        assert torch.equal(call.pixels, torch.cat([tiles, tiles]))
        assert isinstance(call.options.pop("kv_cache"), KVCache)
        assert call.options == {**options, "eos_token_id": ENDS, "num_tokens": len(TOK)}


def test_without_a_model_the_newest_checkpoint_is_taken_and_named(saved_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--prompt", "hi"]) == 1
    for written, name in ((1e9, "b/S1"), (2e9, "a/S2"), (0, "c/S0")):
        shutil.copytree(saved_model, f"out/{name}")
        os.utime(f"out/{name}/config.json", (written, written))
    assert sample.main(["--prompt", "hi", "--max_new_tokens", "1"]) == 0
    assert re.fullmatch("error: .*train_evip.py.*\nmodel: out/a/S2, .*\nthe answer was cut .*\n",
                        capsys.readouterr().err)


def test_the_script_works_through_pipes_in_any_locale_and_exits_with_a_status(saved_model, monkeypatch):
    for argv, status in (["--model", saved_model], 0), (["--model", "none"], 1):
        typed, out = io.BytesIO("你好\n".encode() + b"\xff\n/exit\n"), io.BytesIO()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(typed, "ascii"))
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii", write_through=True))
        monkeypatch.setattr(sys, "argv", ["sample.py", *argv, "--temperature", "3", "--seed", "0"])
        with pytest.raises(SystemExit, match=str(status)):
            runpy.run_path(str(HERE / "sample.py"), run_name="__main__")
        assert out.getvalue().decode().isascii() == bool(status)
    reader, writer = os.pipe()
    os.close(reader)                               # whoever reads the answer has left
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert sample.main(["--model", saved_model, "--prompt", "hi"]) == 1


LONG = "x " * 600                                  # fills the context
MISTAKES = ["/image red.png none.png", '/image "red.png', "<image> <image> <image> <image>", "<img>"]
LINES = {"hi": 4, "and?": 4, "<image>?": 1, "/image red.png": 2, '/image red.png "picture.png"': 2,
         "/clear": 1, "": 1, LONG: 1, **dict.fromkeys(MISTAKES, 0.5)}      # what is typed, and how often


def whole_prompt(messages: list[str], answers: list[list[int]], tiles: list[int]) -> list[int]:
    """The tokens of a conversation. The answers, all but the last one, are given as tokens."""
    texts = itertools.chain.from_iterable((message, "") for message in messages)
    ids, labels = encode_conversation(TOK, data.turns(*texts), tiles, SMALL.tokens_per_tile)
    answers, whole = iter([*answers, []]), []
    for token, label in zip(ids, labels, strict=True):
        whole += [token] if label == IGNORED else [*next(answers), token]
    return whole[:-1]


@pytest.mark.parametrize("seed", range(20))
def test_a_chat_asks_with_all_that_was_said_and_reads_what_is_new(saved_model, monkeypatch, capsys, seed):
    """Each line comes with the script of the answer that it gets if the model is asked."""
    draw = random.Random(seed)
    lines = [(line, [OWN] * draw.randint(0, 3) + [draw.choice([*ENDS, KeyboardInterrupt, OWN])])
             for line in draw.choices(list(LINES), LINES.values(), k=14)]
    typed = [line for line, _ in lines] + draw.choice([["/exit", "more"], [KeyboardInterrupt], [EOFError]])
    keyboard = unittest.mock.Mock(side_effect=typed)
    monkeypatch.setattr("builtins.input", keyboard)
    monkeypatch.chdir(saved_model)
    calls = listen(monkeypatch, (lines[keyboard.call_count - 1][1] for _ in lines))
    assert sample.main(["--model", ".", "--stats", "--max_new_tokens", "9"]) == 0
    out, err = capsys.readouterr()
    messages, answers, images, waiting, known, asked, errors, said = [], [], [], [], 0, iter(calls), 0, ""
    stats, full, cut = iter(re.findall("time to first token.*", err)), 0, 0
    for line, script in lines:
        if line in MISTAKES or "<image>" in line and len(waiting) != 1:
            errors += 1
        elif line == "/clear":
            messages, answers, images, waiting, known = [], [], [], [], 0
        elif line.startswith("/image"):
            waiting = waiting + re.findall(r"\w+\.png", line)
        elif line:
            marks = [f"Image-{i}: <image>\n" for i in range(1, len(waiting) + 1)]
            marks = [] if "<image>" in line else marks if len(marks) != 1 else ["<image>\n"]
            call, message = next(asked), "".join(marks) + line
            tiles = [load_image(image, 6, 56) for image in images + waiting]
            ids = whole_prompt([*messages, message], answers, [len(t) for t in tiles])
            assert call.ids[0].tolist() == ids
            assert torch.equal(call.pixels, torch.cat(tiles)) if tiles else call.pixels is None
            if line == LONG:
                errors += 1                        # the message is dropped, its images keep waiting
                full += 1
                continue
            is_cut = not any(t in ENDS for t, in call.tokens) and KeyboardInterrupt not in script
            cut += is_cut
            answer = [t for t, in call.tokens if t not in ENDS]
            tokens, visual, text, reused, _ = map(int, re.findall(r"(?<![\d.])\d+(?![\d.])", next(stats)))
            assert (tokens, visual) == (len(call.tokens), sum(map(len, tiles)) * SMALL.tokens_per_tile)
            assert visual + text == len(ids) > reused >= known
            messages, answers = [*messages, message], [*answers, answer]
            images, waiting, known = images + waiting, [], len(ids) + len(answer) - is_cut
            said += TOK.decode(answer, skip_special_tokens=False) + "\n"
    assert out == said and next(asked, None) is next(stats, None) is None
    assert [err.count(words) for words in ("error: ", "/clear the chat", "cut after")] == [errors, full, cut]


@pytest.mark.parametrize("typed, names", [
    ("~/a.png", ["{home}/a.png"]), ("~/my cat.png", ["{home}/my cat.png"]),
    ("none.png a.png", ["none.png", "a.png"]), (r"C:\Users\x y\a.png", [r"C:\Users\x y\a.png"]),
    (r"C:\Users\x\b.png a.png", [r"C:\Users\x\b.png", "a.png"]),
    (r'"C:\Users\x y\b.png" a.png', [r"C:\Users\x y\b.png", "a.png"]), (r"\\pc\b.png", [r"\\pc\b.png"]),
    (r"my\ cat.png 'a b' my\(1\).png", ["my cat.png", "a b", "my(1).png"])])
def test_the_chat_takes_file_names_of_every_system(saved_model, tmp_path, monkeypatch, typed, names):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in "my cat.png", r"C:\Users\x y\a.png":
        Path(name).touch()
    type_in(monkeypatch, f"/image {typed}")
    load = unittest.mock.Mock()
    sample.chat(SimpleNamespace(config=SMALL), TOK, [], load, sample.Flags())
    assert [call.args[0] for call in load.call_args_list] == [name.format(home=tmp_path) for name in names]


def test_a_system_message_of_the_flag_or_of_the_conversation_is_read_in_place_of_the_default(
        saved_model, tmp_path, monkeypatch, capsys):
    def prompts(*argv):
        del calls[:]
        type_in(monkeypatch, "hi", "so?")
        assert sample.main(["--model", saved_model, "--max_new_tokens", "1", *argv]) == 0
        return [TOK.decode(row.tolist(), skip_special_tokens=False) for call in calls for row in call.ids]
    calls, own = listen(monkeypatch), [{"from": "system", "value": "Be long."}, *data.turns("hi", "ho")]
    write_lines(tmp_path / "questions.jsonl", [{"conversations": own}, {"question": "hi"}])
    file = ["--input", f"{tmp_path}/questions.jsonl", "--batch_size=1", "--output"]
    asked = "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"
    for flag_, message in ([], TOK.system_message), (["--system", "Be short.\udcff"], "Be short.?"), (
            ["--system="], ""):
        first = f"<s><|im_start|>system\n{message}<|im_end|>{asked}" if message else f"<s>{asked}"
        assert prompts("--prompt", "hi", *flag_) == [first]
        chat = prompts(*flag_)
        assert chat[0] == first and chat[1].startswith(first) and chat[1].count("system\n") == bool(message)
        assert sorted(prompts(*file, f"{tmp_path}/{len(message)}.jsonl", *flag_)) == sorted([
            first, f"<s><|im_start|>system\nBe long.<|im_end|>{asked}"])
    assert sample.main(["--model", saved_model, *file, f"{tmp_path}/0.jsonl"]) == 1      # another message


BLUE = (0, 0, 255)


@pytest.mark.parametrize("answer, boxes", [
    ("<ref>cup</ref><box>[[100, 200, 400, 900]]</box>", [(20, 20, 80, 90)]),
    ("a <ref>cup</ref><box>[[400, 900, 100, 200],[500,0,1000,500]]</box> and <ref>杯</ref> "
     "<box>[[0, 500, 90, 950]]</box>.", [(20, 20, 80, 90), (100, 0, 200, 50), (0, 50, 18, 95)]),
    ("<box>[[100.0, 200.0, 400.0, 900.0], [1, 2]]</box>", [(20, 20, 80, 90)]),
    ("no box", []), ("<ref>cup</ref><box>[[1, 2], [3, 4]]</box>", []), ("[[1, 2, 3, 4]]", [])])
def test_the_boxes_of_an_answer_are_drawn_with_their_names(saved_model, tmp_path, monkeypatch, capsys, answer,
                                                           boxes):
    picture, drawn = tmp_path / "blue.png", tmp_path / "drawn"
    Image.new("RGB", (200, 100), BLUE).save(picture)
    listen(monkeypatch, [[*TOK.encode(answer + "<|im_end|>", bos=False)]])
    argv = ["--model", saved_model, "--prompt", "Find it.", "--image", str(picture), "--draw"]
    assert sample.main([*argv, str(drawn)]) == 0
    out, err = capsys.readouterr()
    assert out == answer + "\n" and err == ("" if boxes else "the answer names no box, nothing is drawn\n")
    assert drawn.exists() == bool(boxes)
    if boxes:
        image = Image.open(drawn)
        assert (image.format, image.size) == ("PNG", (200, 100))
        for left, top, right, bottom in boxes:
            for x, y in ((right, bottom), (left, bottom), (right, top), ((left + right) // 2, bottom)):
                assert image.getpixel((min(x, 199), min(y, 99))) != BLUE
            assert image.getpixel(((left + right) // 2, bottom - 4)) == BLUE             # only its frame
        changed = [image.getpixel((x, y)) != BLUE for x in range(22, 40) for y in range(22, 34)]
        assert any(changed) == ("cup" in answer)   # the name
        listen(monkeypatch, [[*TOK.encode(answer + "<|im_end|>", bos=False)]])
        assert sample.main([*argv, f"{tmp_path}/none/a.png"]) == 1
        assert re.fullmatch(r"error: .*none/a.png.*\n", capsys.readouterr().err)


CANNOT_BE_ASKED = ["{", "{}", '{"question": 1}', '{"image": "none.png", "question": "?"}',
                   '{"conversations": []}', json.dumps({"question": "x " * 176})]      # fills the context


# What has no UTF-8: half a surrogate pair, from JSON or from the name of a file that is not in UTF-8.
@pytest.mark.parametrize("half", ["\ud800", "\udcff"])
def test_ids_questions_and_names_that_are_no_unicode_are_answered_and_escaped(
        saved_model, tmp_path, monkeypatch, capfd, half):
    (tmp_path / "\udcff").mkdir()
    monkeypatch.chdir(tmp_path / "\udcff")
    shutil.copy(f"{saved_model}/red.png", "\udcff.png")
    lines = [{"question": "hi", "id": f"{half}x"}, {"question": f"h{half}"},
             {"question": "hi", "id": {half: [half]}}, {"conversations": data.turns(f"{half}?", half, "So?")},
             {"question": "?", "image": "\udcff.png"}]
    bad = [{"question": "hi", "image": "\ud800.png"}, {"question": "hi", "image": f"{half}/none.png"}]
    write_lines("questions.jsonl", lines + bad)
    calls, folder = listen(monkeypatch), str(Path.cwd())
    status, records = ask_file(folder, saved_model, "--batch_size=1")
    ids = [line.get("id", f"{folder}/questions.jsonl:{number}") for number, line in enumerate(lines, 1)]
    assert status == 0 and [record["id"] for record in records] == ids
    assert [record["question"] for record in records] == ["hi", f"h{half}", "hi", "So?", "<image>\n?"]
    assert re.findall(r"left out: .*jsonl:(\d+)", capfd.readouterr().err) == ["6", "7"]
    read = [TOK.decode(call.ids[0].tolist()) for call in calls]
    assert sum("user\nh?assistant" in text for text in read) == 1
    assert sum("user\n??assistant" in text for text in read) == 1
    assert ask_file(folder, saved_model)[1] == records         # nothing is asked again
    assert sample.main(["--model", saved_model, "--prompt", f"h{half}", "--image", "\udcff.png"]) == 0
    type_in(monkeypatch, f"h{half}")
    assert sample.main(["--model", saved_model]) == 0
    assert TOK.decode(calls[-1].ids[0].tolist()) in read and len(calls) == len(lines) + 2
    write_lines("questions.jsonl", bad)
    Path("answers.jsonl").unlink()
    assert ask_file(folder, saved_model) == (1, []) and "none of the 2 questions" in capfd.readouterr().err


def ask_file(folder, model: str, *argv: str) -> tuple[int, list[dict]]:
    """Answers questions.jsonl of a folder. Returns the status and the records of answers.jsonl."""
    output = Path(folder) / "answers.jsonl"
    status = sample.main(["--model", model, "--input", f"{folder}/questions.jsonl", "--output", str(output),
                          "--max_new_tokens", "9", *argv])
    return status, [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("seed", range(20))
def test_a_file_of_questions_gives_what_asking_one_by_one_gives_even_if_it_is_interrupted(
        saved_model, tmp_path, monkeypatch, capsys, seed):
    draw, options = random.Random(seed), SAMPLING[seed % len(SAMPLING)]
    lines = [draw.choice(ASKED) if draw.random() < 0.8 else (draw.choice(["", " ", *CANNOT_BE_ASKED]),)
             for _ in range(12)]
    argv = [f"--{name}={value}" for name, value in {**options, "batch_size": draw.randint(1, 4)}.items()]
    shutil.copytree(saved_model, tmp_path / ("" if seed % 3 else "images"), dirs_exist_ok=True)
    argv += [] if seed % 3 else [f"--image_root={tmp_path}/images"]
    questions, output, stop = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl", draw.randint(0, 4)
    questions.write_text("\n".join(json.dumps(line) if rest else line for line, *rest in lines))
    if seed % 4 == 1:
        output.symlink_to("elsewhere.jsonl")
    expected = [{"line": number, "id": line.get("id", f"{questions}:{number}"), "question": read[0][-1],
                 "answer": answer, "finished": finished, "key": unittest.mock.ANY}
                for number, (line, *read) in enumerate(lines, 1) if read
                for answer, finished in [answer_alone(saved_model, *read, max_new_tokens=9, **options)]]
    bad = [number for number, (line, *_) in enumerate(lines, 1) if line in CANNOT_BE_ASKED]
    calls = listen(monkeypatch, [itertools.repeat(OWN)] * stop + [[KeyboardInterrupt]])

    def run() -> tuple[int, list[dict], int]:
        del calls[:]
        status, records = ask_file(tmp_path, saved_model, *argv)
        err = capsys.readouterr().err
        assert status or sorted(map(int, re.findall(r"left out: .*questions.jsonl:(\d+): ", err))) == bad
        assert f"{len(records)} of {len(expected) + len(bad)} questions" in err
        return status, records, sum(len(call.ids) for call in calls)
    status, part, _ = run()
    assert len(part) == sum(len(call.ids) for call in calls[:stop])
    assert status == (130 if len(calls) > stop else 0)
    assert part == [record for record in expected if record in part]
    # A run that is killed leaves its records unsorted, and perhaps a part of the last one.
    written = output.read_text().splitlines(keepends=True)
    output.write_text("".join(written[::-1]) + '{"line": 1, "id": "x"}'[:draw.randint(0, 22)])
    assert run() == (0, expected, len(expected) - len(part))
    whole = output.read_bytes()
    assert run() == (0, expected, 0) and output.read_bytes() == whole
    assert output.is_symlink() == (seed % 4 == 1)  # the file that a link leads to was written


def test_answers_of_an_earlier_run_count_only_if_nothing_that_they_depend_on_has_changed(
        saved_model, tmp_path, monkeypatch, capsys):
    """Every flag of sample.py changes the answers, or it does not: the two lists name them all."""
    monkeypatch.chdir(shutil.copytree(saved_model, tmp_path / "model"))
    model, questions = str(tmp_path / "model"), Path("questions.jsonl")
    questions.write_text('{"question": "hi"}\n')
    assert ask_file(".", model)[0] == 0
    before, calls = Path("answers.jsonl").read_bytes(), listen(monkeypatch)
    same = ("device=cpu moe=dense prefill_chunk=9 no-cuda_graphs compile stats batch_size=1 "
            "max_pixels=9").split()
    other = (f"model={saved_model} image_root=.. max_new_tokens=5 temperature=1 top_k=1 top_p=0.5 seed=0 "
             "repetition_penalty=2 max_tiles=1 dtype=bfloat16 system= system=x").split()
    named = {flag.removeprefix("no-").split("=")[0] for flag in same + other}
    assert named | {"image", "prompt", "draw", "input", "output"} == set(sample.Flags.__dataclass_fields__)

    def refuses(*flags):
        status = ask_file(".", model, *("--" + flag for flag in flags))[0]
        assert ("answers.jsonl:1 answers another question" in capsys.readouterr().err) == bool(status)
        assert Path("answers.jsonl").read_bytes() == before and not calls
        return status
    assert not any(refuses(flag) for flag in same) and all(refuses(flag) for flag in other)
    os.utime("config.json", (1, 1))                # the checkpoint was written again
    assert refuses()
    shutil.copystat(f"{saved_model}/config.json", "config.json")
    for content in ('{"question": "ho"}\n', '\n{"question": "hi"}\n'):
        questions.write_text(content)
        assert refuses()
    questions.write_text('{"question": "hi"}\n{"question": "new"}\n')
    assert [record["question"] for record in ask_file(".", model)[1]] == ["hi", "new"] and len(calls) == 1


ASK_FILE, ASK = "--input ok.jsonl --output", "--prompt hi --image red.png"
BAD_FLAGS = {                                      # flags, what the error names
    "--prompt hi --image none.png": "none.png does not exist", "--prompt hi --device abacus": "abacus",
    "--prompt hi --model small": "491 tokens, the model 488", "--output new.jsonl": "--input and --output",
    f"{ASK_FILE} new.jsonl --prompt hi": "--prompt", f"{ASK_FILE} new.jsonl --image red.png": "--image",
    "--batch_size 0": "--batch_size is 0", "--max_tiles 0": "--max_tiles is 0",
    f"{ASK_FILE} new.jsonl --max_new_tokens 0": "--max_new_tokens is 0",
    **{f"{ASK_FILE} new.jsonl --seed={seed}": f"seed is {seed}, " for seed in (-1, 2 ** 64, -2 ** 70)},
    f"{ASK_FILE} new.jsonl --temperature -1": "temperature is -1",
    f"--draw a.png {ASK_FILE} new.jsonl": "--draw needs", "--draw a.png --image red.png": "--draw needs",
    f"--draw a.png {ASK} picture.png": "--draw needs", "--draw a.png --prompt hi": "--draw needs",
    f"--draw ./red.png {ASK}": "./red.png would overwrite red.png",
    "--input none.jsonl --output new.jsonl": "none.jsonl is not readable",
    "--input fifo --output new.jsonl": "--input fifo is no regular file",
    **{f"{ASK_FILE} {name}": f"{name} cannot be written: " for name in ("fifo", ".", "none/a.jsonl")},
    **{f"{ASK_FILE} {name}": "would overwrite ok.jsonl" for name in (
        "ok.jsonl", "link.jsonl", "hard.jsonl", "small/../ok.jsonl")},
    "--input link.jsonl --output ok.jsonl": "ok.jsonl would overwrite link.jsonl",
    "--input a.jsonl.tmp --output a.jsonl": "a.jsonl.tmp would overwrite a.jsonl.tmp",
    f"{ASK_FILE} done.jsonl": "done.jsonl:1 answers another",
    f"{ASK_FILE} line.jsonl": "line.jsonl holds something else"}           # it is not half an answer


def test_what_cannot_be_done_is_one_line_and_changes_no_file(saved_model, tmp_path, monkeypatch, capsys):
    def files():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.chdir(shutil.copytree(saved_model, tmp_path, dirs_exist_ok=True))
    shutil.copytree(saved_model, "small")
    MonoInternVL(replace(SMALL, vocab_size=488)).save_pretrained("small")
    Path("ok.jsonl").write_text('{"question": "hi"}\n')
    Path("line.jsonl").write_text('{"question": "hi"}')
    Path("done.jsonl").write_text('{"line": 1, "question": "hi"}\n')
    Path("a.jsonl.tmp").write_text('{"question": "hi"}\n')
    os.symlink("ok.jsonl", "link.jsonl")
    os.link("ok.jsonl", "hard.jsonl")
    os.mkfifo("fifo")
    before = files()
    for argv, message in BAD_FLAGS.items():
        assert sample.main(["--model", ".", *argv.split()]) == 1
        out, err = capsys.readouterr()
        assert out == "" and re.fullmatch(f"error: .*{re.escape(message)}.*\n", err), (argv, err)
        assert files() == before, argv


@pytest.mark.parametrize("kind", ["pipe", "device", "stdout", "full"])
def test_an_output_that_is_no_file_is_written_in_place(saved_model, tmp_path, monkeypatch, capfd, kind):
    shutil.copytree(saved_model, tmp_path, dirs_exist_ok=True)
    write_lines(tmp_path / "questions.jsonl", [line for line, *_ in ASKED])
    assert ask_file(tmp_path, saved_model, f"--image_root={tmp_path}", "--batch_size=2")[0] == 0
    expected, place = (tmp_path / "answers.jsonl").read_bytes(), tmp_path / kind
    capfd.readouterr()
    if kind == "pipe":
        os.mkfifo(place)
        reader = os.open(place, os.O_RDONLY | os.O_NONBLOCK)
        assert os.get_blocking(sample.open_in_place(place))    # a slow reader is waited for
    elif kind == "stdout":
        place = Path("/dev/stdout")
    else:                                          # copies of /dev/null and /dev/full
        try:
            os.mknod(place, 0o666 | stat.S_IFCHR, os.makedev(1, 3 if kind == "device" else 7))
            place.write_bytes(b"")
        except PermissionError:
            pytest.skip("only root can make a device")
    before = os.stat(place).st_ino
    for _ in range(2):                             # there is nothing to resume from
        status = sample.main(["--model", saved_model, "--input", f"{tmp_path}/questions.jsonl", "--output",
                              str(place), f"--image_root={tmp_path}", "--batch_size=2", "--max_new_tokens=9"])
        out, err = capfd.readouterr()
        assert status == (kind == "full") and ("full cannot be written: No space left" in err) == status
        if kind in ("pipe", "stdout"):
            assert expected == (os.read(reader, 10 ** 6) if kind == "pipe" else out.encode())
    assert os.stat(place).st_ino == before and (kind == "stdout" or not place.is_file())
    assert not [*tmp_path.glob("*.tmp")]


def test_an_error_of_the_model_is_one_line_that_says_what_to_lower_and_a_chat_goes_on(
        saved_model, tmp_path, monkeypatch, capsys):
    with pytest.raises(RuntimeError) as too_large:
        torch.empty(2 ** 60)                       # more than can be addressed
    given = [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError(
        "MPS backend out of memory (MPS allocated: 9.0 GB)"), InputError("NaN"), OWN, too_large.value]
    calls = listen(monkeypatch, [[error] for error in given])
    write_lines(tmp_path / "questions.jsonl", [{"question": "hi"}] * 2)
    type_in(monkeypatch, *["hi"] * 4)
    argv = ["--model", saved_model, "--max_new_tokens=1"]
    statuses = (sample.main([*argv, "--prompt", "hi"]), sample.main(argv),
                ask_file(tmp_path, saved_model, "--batch_size=1")[0])
    said = re.findall("error: (NaN|out of memory; lower (--batch_size, )?--max_new)", capsys.readouterr().err)
    assert statuses == (1, 0, 1) and len(calls) == 6           # the chat went on, the file stopped
    assert [line if line == "NaN" else lower for line, lower in said] == ["", "", "", "NaN", "--batch_size, "]


# ---------------------------------------------------------------- bench.py infer

def narrow(**changes) -> MonoInternVLConfig:
    """What bench.py measures, but narrow: 56-pixel tiles of 4 tokens."""
    return replace(MonoInternVLConfig.mono_internvl_2b(attn_experts="qkvo"), **{
        **changes, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "image_size": 56})


def test_the_modular_counterpart_is_an_encoder_before_the_same_llm():
    with torch.device("meta"):
        full = bench.Modular(MonoInternVLConfig.mono_internvl_2b(img_context_token_id=1000))
    assert 300e6 < sum(p.numel() for p in full.encoder.parameters()) < 310e6             # InternViT-300M
    config = narrow(num_hidden_layers=2, vocab_size=1100, img_context_token_id=1000, vision_hidden_size=16)
    ours, modular = bench.random_models(config, torch.float32, "cpu")
    assert_close(modular(PROMPTS)[0], ours(PROMPTS)[0])
    seen = []
    record(modular.encoder, seen)
    assert modular.embed_images(torch.randn(3, 3, 56, 56)).shape == (3, config.tokens_per_tile, 64)
    assert seen[0].shape == (3, 4 * config.tokens_per_tile + 1, 1024)      # patches, and a class token


def test_bench_infer_measures_every_combination_and_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MonoInternVLConfig, "mono_internvl_1_5_2b", narrow)
    first_token, owners = bench.first_token, {}    # cache -> whose CUDA graphs it has

    def recorded(model, back_end, cache, *inputs):
        owners.setdefault(cache, set()).add((model, back_end))
        return first_token(model, back_end, cache, *inputs)

    monkeypatch.setattr(bench, "first_token", recorded)
    flags = "--layers 1 --tiles 0 1 2 --rounds 2 --steps 1 --batches 1 2 --cpu_time"
    assert bench.main(["infer", *flags.split(), f"--json={tmp_path}/a.json", f"--png={tmp_path}/a.png"]) == 0
    result, out = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == result and flags in result["command"]
    assert len(owners) == 6 and all(len(one) == 1 for one in owners.values())
    dtypes, tiles = ["float32", "bfloat16"], [0, 1, 2]
    assert [(r["dtype"], r["tiles"], r["back_end"]) for r in result["prefill"]] == \
        list(itertools.product(dtypes, tiles, ["dense", "torch", "modular"]))
    assert [(r["dtype"], r["batch"], r["cached_tokens"]) for r in result["decode"]] == \
        list(itertools.product(dtypes, [1, 2], [64, 68, 72]))
    for row in result["prefill"] + result["decode"]:
        assert 0 < row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1] and row["floor"] > 0
    of_text = [r["floor"] for r in result["prefill"] if r["tiles"] == 0]
    assert of_text[0] == of_text[1] and of_text[3] == of_text[4]           # text costs one expert everywhere
    lines = [line for line in bench.infer_tables(result).splitlines() if line.startswith("| ")]
    assert len(lines) == 2 * 2 + 6 + 12 and min(Image.open(tmp_path / "a.png").size) > 300


def test_a_photo_is_read_as_the_tiles_that_are_measured(monkeypatch, capsys):
    read, original = [], JsonlDataset.__getitem__
    monkeypatch.setattr(JsonlDataset, "__getitem__", lambda self, i: (read.append(i), original(self, i))[1])
    assert bench.main(["data", *"--width 300 --samples 2 --rounds 2 --workers 0 1".split()]) == 0
    assert len(read) == 3 * (1 + (1 + 2) * 2)      # by this process: one, a round to warm up, and two rounds
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(r["tiles"], r["workers"]) for r in result["rows"]] == \
        list(itertools.product([1, 7, 7], [0, 1]))                         # too small for 25 tiles
    for row in result["rows"]:
        assert row["samples_per_s"] * row["seconds"] == pytest.approx(1)
        assert row["pixels_mb_s"] / row["samples_per_s"] > 0.99 * row["tiles"] * 3 * 448 ** 2 / 1e6


@pytest.mark.slow
def test_one_command_measures_everything_and_the_report_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(MonoInternVLConfig, "mono_internvl_1_5_2b", narrow)
    monkeypatch.setattr(bench, "QUICK", {name: SHORT[f"bench.py {name}"] for name in bench.QUICK})
    monkeypatch.chdir(tmp_path)
    assert bench.main(["all", "--quick", "--out=assets"]) == 0
    for name in ("results.md", "results_seed0.json", "results_seed1.json", "ablation.json", "icons.json",
                 "icons_seed1.json"):
        shutil.copy(HERE / "assets" / name, "assets")
    assert bench.main(["report"]) == 0
    report = Path("RESULTS.md").read_text(encoding="utf-8")
    for name in bench.QUICK:
        assert f"#### `assets/bench_{name}_" in report
    assert "| icons, float32 |" in report and "| icons, bfloat16 |" in report
    assert bench.main(["train", *"--rounds 2 --tiny_rounds 2 --icons_layers 0".split()]) == 0


# ---------------------------------------------------------------- the kernel: what it computes

TEXT, VISUAL, PAD = 0, 1, 2                                            # every other number means pad, too
TILES = {"auto": 0, **moe_kernel.TILES, **{f"{name} / {s}": moe_kernel.SPLIT * s + moe_kernel.TILES[name]
                                           for name, s in (("small", 2), ("hopper64x64", 8))}}
OPERATORS = torch.ops.mono_internvl
on_every_dtype = pytest.mark.parametrize("dtype", moe_kernel.DTYPES)
on_a_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])


def random_tensors(*shapes, dtype=torch.float32, device="cpu", seed=0) -> list:
    """Standard normal; matrices after the first are scaled like weights (rows, K): x wᵀ is of order 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [t.div(t.shape[-1] ** 0.5 if i else 1).to(dtype).to(device) for i, t in enumerate(tensors)]


def random_labels(draw: random.Random, most: int, device="cpu") -> torch.Tensor:
    kinds = draw.choice([[TEXT], [VISUAL], [PAD], [TEXT, VISUAL], *[[TEXT, VISUAL, PAD, 255]] * 4])
    labels = draw.choices(kinds, k=draw.choice([0, 1, 64, 128, *[draw.randrange(most)] * 4]))
    return torch.tensor(labels, dtype=torch.uint8, device=device)


def choose(labels, text, visual):
    labels = labels.to(text.device)[:, None]
    return torch.where(labels == VISUAL, visual, text).masked_fill(labels >= PAD, 0)


def linear_reference(labels, x, w_text, w_visual):
    return choose(labels, x @ w_text.T, x @ w_visual.T)


def swiglu_reference(labels, x, w1_text, w3_text, w1_visual, w3_visual):
    text, visual = F.silu(x @ w1_text.T) * (x @ w3_text.T), F.silu(x @ w1_visual.T) * (x @ w3_visual.T)
    return choose(labels, text, visual)


def both_products(x, w, rows, counts) -> tuple:
    """As the model calls them. w: w1 and w3 of the text expert, of the visual expert, then w2 of both."""
    return (moe_kernel.linear(x, w[0], w[2], rows, counts),
            moe_kernel.swiglu(x, (w[0], w[1], w[4]), (w[2], w[3], w[5]), rows, counts))


def in_float64(*tensors) -> list:
    return [t.detach().cpu().double() for t in tensors]


def assert_rounded(actual, expected):
    """expected in float64. Sums of order 1 in float32, then one rounding: half an eps, allowed twice."""
    assert_close(actual.cpu().double(), expected, rtol=torch.finfo(actual.dtype).eps, atol=1e-5)


def skip_unless_possible(tile: str, device: str) -> None:
    if "hopper" in tile and device == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("not a Hopper GPU")


def check_route(labels) -> tuple:
    rows, counts = (torch.full((size,), -1, device=labels.device) for size in (len(labels), 2))
    moe_kernel.launch("moe_route", labels.device, labels, rows, counts, len(labels))
    assert torch.equal(rows, labels.clamp(max=PAD).argsort(stable=True))
    assert counts.tolist() == [(labels == TEXT).sum(), (labels == VISUAL).sum()]
    return rows, counts


def check_kernels(labels, k, m, dtype, tile="auto", gather=True, scatter=True, seed=0) -> list:
    """Route, linear and SwiGLU of one case against float64. They must write all of their outputs, which are
    full of NaN before, and nothing beside them. Returns these outputs."""
    (rows, counts), n, device = check_route(labels), len(labels), labels.device
    x, *w = random_tensors((n, k), *[(m, k)] * 4, dtype=dtype, device=device, seed=seed)
    (x64, *w64), order, tile_config, results = in_float64(x, *w), rows.cpu(), TILES[tile], []
    linear = linear_reference(labels, x64, w64[0], w64[1])

    def launch_linear(y):
        moe_kernel.launch_linear(y, x if gather else x[rows], w[0], w[1], rows if gather else None,
                                 rows if scatter else None, counts, tile_config)

    def launch_swiglu(y):
        moe_kernel.launch("moe_swiglu", device, x, *w, y, rows, counts, n, k, m, moe_kernel.DTYPES[dtype],
                          tile_config)
    launches = {launch_linear: linear if scatter else linear[order],
                launch_swiglu: swiglu_reference(labels, x64, *w64)[order]}
    for launch, expected in [*launches.items()][:1 if tile == "naive" or "/" in tile else 2]:
        y = torch.full((n + 2, m), math.nan, dtype=dtype, device=device)
        y[[0, -1]] = 7
        with nan_in_new_memory():
            launch(y[1:-1])
        assert_rounded(y[1:-1], expected)
        assert y[[0, -1]].eq(7).all(), f"{launch.__name__} wrote outside of its output"
        results.append(y)
    return results


@on_every_device
@pytest.mark.parametrize("dtype, tile", [
    (dtype, tile) for dtype in moe_kernel.DTYPES for tile in TILES
    if dtype != torch.float32 or tile in ("auto", "naive")])               # float32 has one tile
def test_launchers_equal_a_float64_reference_bitwise_alike_in_every_order_of_threads(device, dtype, tile,
                                                                                     monkeypatch):
    skip_unless_possible(tile, device)
    draw = random.Random(f"{dtype} {tile}")
    for seed, options in enumerate([*itertools.product([False, True], repeat=2)] * 2):   # gather, scatter
        labels, k, m = random_labels(draw, 200, device), 8 * draw.randint(1, 80), 8 * draw.randint(1, 30)
        results = []
        for reverse, eager in "00", "10", "01":
            monkeypatch.setenv("CUDA_ON_CPU_REVERSE", reverse)
            monkeypatch.setenv("CUDA_ON_CPU_EAGER", eager)
            results.append(check_kernels(labels, k, m, dtype, tile, *options, seed))
        assert all(map(torch.equal, results[0] * 2, results[1] + results[2]))
        check_route(random_labels(draw, 3000, device))


@pytest.mark.parametrize("kilobytes, tiles", [
    (99, {"small", "medium", "large", "medium3", "large3"}), (49, {"medium3", "large3"})])
def test_where_a_multiprocessor_has_100_kilobytes_these_tiles_fit_in_once_or_twice(
        monkeypatch, kilobytes, tiles):
    monkeypatch.setenv("CUDA_ON_CPU_SHARED_KB", str(kilobytes))
    fit, labels = set(), torch.tensor([TEXT, VISUAL], dtype=torch.uint8)
    for tile in "small", "medium", "large", "medium3", "large3":
        with contextlib.suppress(RuntimeError):
            check_kernels(labels, 72, 40, torch.bfloat16, tile)
            fit.add(tile)
    assert fit == tiles


@on_every_device
@pytest.mark.parametrize("dtype, tile", [(torch.float32, "auto"), (torch.bfloat16, "small"),
                                         (torch.bfloat16, "small / 2"), (torch.float16, "hopper64x64")])
def test_a_prompt_with_more_token_tiles_than_a_band_is_right(device, dtype, tile):
    skip_unless_possible(tile, device)
    labels = torch.arange(2200, device=device).remainder(7).clamp(max=PAD).to(torch.uint8)
    check_kernels(labels, 72, 40, dtype, tile)


@on_every_device
@on_every_dtype
@pytest.mark.parametrize("kind", [TEXT, VISUAL, PAD])
def test_nan_in_one_kind_of_token_and_its_expert_never_reaches_another(device, dtype, kind):
    """Neither outputs and gradients of other tokens, nor the gradients of the other expert's weights."""
    labels = torch.arange(90, device=device).remainder(3).to(torch.uint8)              # all kinds share tiles
    x, dy, dz, *w = random_tensors((90, 40), (90, 48), (90, 40), *[(48, 40)] * 4, *[(40, 48)] * 2,
                                   dtype=dtype, device=device)
    mine = {TEXT: (0, 1, 4), VISUAL: (2, 3, 5), PAD: ()}[kind]             # the weights of this kind
    results = []
    for bad in (0.5, math.nan, math.inf, -math.inf):
        x_, *dyz = (t.masked_fill(labels[:, None] == kind, bad) for t in (x, dy, dz))
        w_ = [torch.full_like(t, bad) if i in mine else t for i, t in enumerate(w)]
        inputs = [t.requires_grad_() for t in (x_, *w_)]
        outputs = both_products(inputs[0], inputs[1:], *moe_kernel.route(labels))
        dx, *dw = torch.autograd.grad(outputs, inputs, dyz)
        assert all(t[labels == PAD].eq(0).all() for t in (*outputs, dx))
        results.append([t[labels != kind] for t in (*outputs, dx)])
        results[-1] += [t for i, t in enumerate(dw) if i not in mine]
        assert all(map(torch.equal, results[0], results[-1]))


@on_every_device
@on_every_dtype
def test_inputs_may_have_any_leading_shape_and_layout_and_autocast_casts_them(device, dtype, monkeypatch):
    def aligned_launch(function, device, *arguments, launch=moe_kernel.launch):    # a CPU would not complain
        assert all(t.data_ptr() % 16 == 0 for t in arguments if isinstance(t, torch.Tensor))
        launch(function, device, *arguments)
    monkeypatch.setattr(moe_kernel, "launch", aligned_launch)
    labels = torch.tensor([TEXT, VISUAL, VISUAL, PAD] * 6, dtype=torch.uint8, device=device)
    inputs = random_tensors((2, 12, 24), *[(16, 24)] * 4, *[(24, 16)] * 2, device=device)
    x, *w = (t.requires_grad_() for t in inputs)
    routed, (x64, *w64) = moe_kernel.route(labels), in_float64(x.flatten(0, 1), *w)
    y, z = (t.flatten(0, 1) for t in both_products(x, w, *routed))
    assert_rounded(y, linear_reference(labels, x64, w64[0], w64[2]))
    assert_rounded(z, linear_reference(labels, swiglu_reference(labels, x64, *w64[:4]), *w64[4:]))
    cast = [t.detach().to(dtype).requires_grad_() for t in inputs]
    expected = both_products(cast[0], cast[1:], *routed)
    with torch.autocast(device, dtype, enabled=dtype != torch.float32):
        results = both_products(x, w, *routed)
    results[1].sum().backward(), expected[1].sum().backward()
    assert all(map(torch.equal, results, expected))
    assert all(torch.equal(t.grad, c.grad.float()) for t, c in zip(inputs, cast, strict=True))
    for layout in (lambda t: t.repeat_interleave(2, -1)[..., ::2],         # every other number
                   lambda t: F.pad(t.flatten(), (1, 0))[1:].view_as(t),    # one number off
                   lambda t: t.mT.contiguous().mT):                        # transposed
        tensors = [layout(t.detach()).requires_grad_() for t in cast]
        assert all(map(torch.equal, both_products(tensors[0], tensors[1:], *routed), expected))


@on_a_gpu
@pytest.mark.parametrize("tile", [tile for tile in TILES if tile != "naive"])
@pytest.mark.parametrize("tokens", [64, 320, 1856])
def test_a_full_size_layer_is_right(device, tokens, tile):
    skip_unless_possible(tile, device)
    labels = torch.arange(tokens, device=device).remainder(11).clamp(max=2).to(torch.uint8)
    x, *w = random_tensors((tokens, 2048), *[(8192, 2048)] * 4, dtype=torch.bfloat16, device=device)
    rows, counts = moe_kernel.route(labels)
    h = OPERATORS.moe_swiglu(x, *w, rows, counts, TILES[tile] % moe_kernel.SPLIT)      # splits no sums
    y = OPERATORS.moe_linear(x, w[0], w[2], rows, counts, True, True, TILES[tile])
    x, *w = (t.double() for t in (x, *w))
    assert_close(y.double(), linear_reference(labels, x, w[0], w[2]), rtol=2 ** -7, atol=1e-4)
    assert_close(h.double(), swiglu_reference(labels, x, *w)[rows], rtol=2 ** -7, atol=1e-4)


@on_a_gpu
def test_a_cuda_graph_captured_with_one_mask_serves_every_other(device):
    """Capture refuses a sync, an allocation outside its pool and a launch on another stream."""
    x, *w = random_tensors((130, 64), *[(96, 64)] * 4, *[(64, 96)] * 2, device=device)
    labels = torch.zeros(130, dtype=torch.uint8, device=device)
    both_products(x, w, *moe_kernel.route(labels))                         # builds and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both_products(x, w, *moe_kernel.route(labels))
    for seed in range(4):
        labels.copy_(torch.randint(0, 3, (130,), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        assert all(map(torch.equal, captured, both_products(x, w, *moe_kernel.route(labels))))


# ---------------------------------------------------------------- the kernel: the operators in PyTorch

@on_every_device
@on_every_dtype
@pytest.mark.parametrize("gather, scatter", [*itertools.product([False, True], repeat=2)])
def test_gradients_equal_those_of_the_float64_reference(device, dtype, gather, scatter):
    """Of whichever inputs want one. In 16 bits they are as close as the roundings on the way allow."""
    draw = random.Random(f"{gather} {scatter}")
    for seed in range(8):
        labels = random_labels(draw, 130, device)
        (rows, counts), n = moe_kernel.route(labels), len(labels)
        shapes = (n, 24), *[(40, 24)] * 4, *[(24, 40)] * 2
        inputs = random_tensors(*shapes, dtype=dtype, device=device, seed=seed)
        reference, order = in_float64(*inputs), rows.cpu()
        for t, r in zip(inputs, reference, strict=True):
            r.requires_grad_(t.requires_grad_(draw.random() < 0.7).requires_grad)
        (x, *w), (x64, *w64) = inputs, reference
        y = OPERATORS.moe_linear(x if gather else x[rows], w[0], w[2], rows, counts, gather, scatter, 0)
        y64 = linear_reference(labels, x64, w64[0], w64[2])
        y64, z = y64 if scatter else y64[order], both_products(x, w, rows, counts)[1]
        z64 = linear_reference(labels, swiglu_reference(labels, x64, *w64[:4]), *w64[4:])
        dy, dz = random_tensors((n, 40), (n, 24), dtype=dtype, device=device, seed=seed + 1)
        for loss in (y * dy).sum() + (z * dz).sum(), (y64 * dy.cpu()).sum() + (z64 * dz.cpu()).sum():
            loss.backward() if loss.requires_grad else None
        for t, r in zip(inputs, reference, strict=True):
            assert (t.grad is None) == (r.grad is None)
            if t.grad is not None and dtype == torch.float32:
                assert_close(t.grad.cpu().double(), r.grad, rtol=1e-5, atol=3e-5)
            elif t.grad is not None:
                assert (t.grad.cpu().double() - r.grad).norm() <= 2 * torch.finfo(dtype).eps * r.grad.norm()


def check_weight_gradients(num_text, num_visual, pads, m, k, dtype, device="cpu"):
    """Pads are NaN, which a gradient must not read. An expert without tokens gets zeros."""
    dy, x = random_tensors((num_text + num_visual + pads, m), (num_text + num_visual + pads, k), dtype=dtype,
                           device=device)
    dy[num_text + num_visual:] = x[num_text + num_visual:] = torch.nan
    counts = torch.tensor([num_text, num_visual], device=device)
    dw = moe_kernel._launch_weight_gradients(dy, x, counts, [0, 1])
    for experts in [0], [1], [0, 1]:
        alone = moe_kernel._launch_weight_gradients(dy, x, counts, experts)
        assert torch.equal(alone, dw[experts]), "always the same bits, alone or together"
    for expert, rows in enumerate((slice(num_text), slice(num_text, num_text + num_visual))):
        right = dy[rows].double().T @ x[rows].double()
        assert_close(dw[expert].double(), right, rtol=torch.finfo(dtype).eps, atol=1e-4)
        assert_close(moe_kernel._one_weight_gradient(dy, x, counts, expert).double(), right,
                     rtol=torch.finfo(dtype).eps, atol=1e-4 if dtype != torch.float16 else 1e-3)


@on_every_device
@pytest.mark.parametrize("num_text, num_visual, pads, m, k, dtype", [
    (0, 0, 3, 8, 8, torch.bfloat16), (5, 0, 0, 8, 136, torch.float16), (0, 33, 2, 136, 8, torch.bfloat16),
    (31, 97, 40, 264, 72, torch.bfloat16), (130, 1, 0, 24, 200, torch.float16)])
def test_weight_gradients_are_sums_over_each_experts_own_tokens(device, num_text, num_visual, pads, m, k,
                                                                dtype):
    """With tails in both widths, fewer and more tokens than the ring of stages holds, and empty experts."""
    check_weight_gradients(num_text, num_visual, pads, m, k, dtype, device)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="torch before 2.10")
@pytest.mark.parametrize("experts", [[0], [1], [0, 1]])
@pytest.mark.parametrize("dtype, capability, capturing, is_right, way", [
    (torch.bfloat16, 9, True, False, "grouped"), (torch.float16, 9, False, True, "kernel"),
    (torch.bfloat16, 8, False, True, "kernel"), (torch.bfloat16, 10, False, True, "kernel"),
    (torch.bfloat16, 8, False, False, "all rows"), (torch.float16, 9, True, True, "all rows"),
    (torch.float32, 9, False, True, "all rows")])
def test_how_a_gpu_computes_weight_gradients_without_the_host(monkeypatch, dtype, capability, capturing,
                                                              is_right, way, experts):
    """Fake tensors hold no numbers, so whoever asks the host for one fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    ways = []
    dw = lambda dy, x, *_: ways.append("all rows") or dy.T @ x             # noqa: E731
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(moe_kernel, "_gradient_is_right", lambda device, dtype: is_right)
    monkeypatch.setattr(moe_kernel, "_one_weight_gradient", dw)
    monkeypatch.setattr(moe_kernel, "launch", lambda *_: ways.append("kernel"))
    with FakeTensorMode(), unittest.mock.patch.object(F, "grouped_mm", wraps=F.grouped_mm) as product:
        dy, x, counts = (torch.empty(size, device="cuda", dtype=dtype) for size in ((72, 24), (72, 40), 2))
        monkeypatch.setattr(moe_kernel, "_aligned", lambda tensor: tensor)
        result = moe_kernel._weight_gradients._init_fn(dy, x, counts.long(), experts)
        assert result.shape == (len(experts), 24, 40) and result.dtype == dtype and result.is_cuda
        assert result.storage_offset() == 0, "torch.compile expects what register_fake makes"
    assert {*ways, *["grouped"] * product.called} == {way}


def test_a_gradient_kernel_that_is_wrong_is_found_and_one_line_says_so(monkeypatch):
    assert moe_kernel._gradient_is_right.__wrapped__(CPU, torch.bfloat16)
    launch = moe_kernel.launch
    monkeypatch.setattr(moe_kernel, "launch", lambda *a: launch(*a) or a[4][-1, -1].zero_())
    with pytest.warns(UserWarning, match="weight_gradient_kernel .* is wrong on cpu .* not be used"):
        assert not moe_kernel._gradient_is_right.__wrapped__(CPU, torch.bfloat16)


def test_one_expert_that_learns_alone_gets_its_gradient_without_the_host():
    """Meta tensors hold no numbers, too."""
    dy, x, counts = (torch.empty(size, device="meta") for size in ((70, 24), (70, 40), 2))
    for expert in range(2):
        assert moe_kernel._one_weight_gradient(dy, x, counts.long(), expert).shape == (24, 40)


@pytest.mark.slow
@on_every_device
@pytest.mark.parametrize("n, dtype", [(0, torch.float32), (37, torch.float32), (37, torch.bfloat16)])
def test_operators_pass_opcheck(device, n, dtype):
    labels = torch.arange(n, device=device).remainder(3).to(torch.uint8)
    tensors = random_tensors((n, 24), *[(40, 24)] * 4, dtype=dtype, device=device)
    (x, *w), routed = (t.requires_grad_() for t in tensors), moe_kernel.route(labels)
    for operator, inputs in ((OPERATORS.moe_route, (labels,)),
                             (OPERATORS.moe_swiglu, (*(t.detach() for t in tensors), *routed, 0)),
                             (OPERATORS.moe_linear, (x, w[0], w[1], *routed, True, True, 0)),
                             (OPERATORS.moe_linear, (x, w[0].detach(), w[1], *routed, False, True, 0)),
                             (OPERATORS.moe_weight_gradients, (x.detach(), x.detach(), routed[1], [1]))):
        torch.library.opcheck(operator.default, inputs)


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(3, 12), "w": torch.zeros(8, 12)}, "multiples of 8.*torch back end"),
    ({"w": torch.zeros(12, 16)}, "multiples of 8"), ({"w_visual": torch.zeros(16, 16)}, "weights"),
    ({"w_visual": torch.zeros(8, 16).half()}, "float16"), ({"w2": torch.zeros(16, 24)}, "weights"),
    ({"x": torch.zeros(3, 16).double(), "w": torch.zeros(8, 16).double()}, "float64"),
    ({"x": torch.zeros(3, 16, device="meta"), "w": torch.zeros(8, 16, device="meta")}, "meta"),
    ({"w": torch.zeros(8, 16, device="meta")}, "meta"), ({"w": torch.zeros(8, 16).bfloat16()}, "bfloat16"),
    ({"w": torch.zeros(8, 24)}, r"x \(\.\.\., K\)"), ({"x": torch.zeros(2, 3, 16)}, r"permutation \(N,\)"),
    ({"rows": torch.arange(4)}, r"permutation \(N,\)"), ({"rows": torch.arange(3).int()}, "int64"),
    ({"counts": torch.tensor([1, 1, 1])}, r"counts \(2,\)"), ({"labels": torch.zeros(4)}, "uint8"),
    ({"labels": torch.zeros(2, 2, dtype=torch.uint8)}, "uint8")])
def test_what_the_kernel_cannot_do_is_a_clear_error(change, message):
    given = {"x": torch.zeros(3, 16), "w": torch.zeros(8, 16), "rows": torch.arange(3),
             "counts": torch.tensor([3, 0]), "labels": torch.zeros(3, dtype=torch.uint8), **change}
    x, w, *routed, labels = (given[name] for name in ("x", "w", "rows", "counts", "labels"))
    visual, w2 = given.get("w_visual", w), given.get("w2", w.T)
    calls = {"linear": lambda: moe_kernel.linear(x, w, visual, *routed),
             "swiglu": lambda: moe_kernel.swiglu(x, (w, w, w2), (w, visual, w2), *routed),
             "route": lambda: moe_kernel.route(labels)}
    for name in ["route"] if "labels" in change else ["swiglu"] if "w2" in change else ["linear", "swiglu"]:
        with pytest.raises(InputError, match=message):
            calls[name]()


@pytest.mark.slow
def test_torch_compile_takes_a_model_with_the_kernel():
    model, (ids, pixels, mask) = tiny().bfloat16(), batch_of([[False, True, True, False], [True, False]])
    model.moe, pixels = "cuda", pixels.bfloat16()
    compiled, labels = torch.compile(model, backend="aot_eager"), ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        assert torch.equal(compiled(ids, pixels, mask)[0], model(ids, pixels, mask)[0])
    expected = gradients(model, model(ids, pixels, mask, labels)[1])
    for name, gradient in gradients(model, compiled(ids, pixels, mask, labels)[1]).items():
        assert_close(gradient, expected[name])


# ---------------------------------------------------------------- the kernel: the build

@pytest.mark.parametrize("environment, missing, backend, message", [
    ({}, None, "cuda", "for tests and study"),
    ({"CXX": "no-compiler", "TORCH_EXTENSIONS_DIR": "empty"}, None, "torch", "no-compiler"),
    ({}, "fcntl", "torch", "needs Python's module fcntl, which Windows lacks")])
def test_a_kernel_on_a_cpu_or_one_that_cannot_be_built_says_so_once(
        tmp_path, monkeypatch, environment, missing, backend, message):
    monkeypatch.chdir(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)        # its import fails, as on Windows
    library = inspect.unwrap(moe_kernel.library, stop=lambda function: hasattr(function, "cache_clear"))
    library.cache_clear()                          # as in a process that has not loaded it yet
    with pytest.warns(UserWarning, match=message) as warned:
        for _ in range(3):
            assert Routing(torch.tensor([[True, False]]), backend="cuda").backend == backend
    assert len(warned) == 1
    if backend == "torch":
        with pytest.raises(RuntimeError, match="choose the torch back end"):
            moe_kernel.route(torch.zeros(4, dtype=torch.uint8))
    library.cache_clear()


def test_without_the_modules_that_windows_lacks_everything_else_works(saved_model):
    code = ("import sys\nsys.modules |= dict.fromkeys(['fcntl', 'resource', 'readline', 'termios', 'pwd'])\n"
            "import bench, evaluate, sample, train_evip\nsys.exit(sample.main(sys.argv[1:]))")
    asked = run_python(code, "--model", saved_model, "--prompt", "hi", "--moe=cuda", "--image", PICTURE,
                       "--max_new_tokens=2", "--stats")
    assert asked.returncode == 0 and "peak memory unknown" in asked.stdout, asked.stdout
    assert asked.stdout.count("no cuda back end on cpu: moe_kernel.cu could not be built or loaded") == 1


@pytest.mark.parametrize("platform, unit", [("linux", 1024), ("darwin", 1)])
def test_peak_memory_is_in_bytes_on_every_system(monkeypatch, platform, unit):
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(resource, "getrusage", lambda who: SimpleNamespace(ru_maxrss=3000))
    assert budget.peak_memory("cpu") == budget.peak_memory("mps") == 3000 * unit
    monkeypatch.setattr(budget, "resource", None)
    assert budget.peak_memory("cpu") is None


@pytest.mark.slow
def test_two_processes_build_once_and_a_killed_build_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" int seven() { return 7; }\n')
    (tmp_path / "cuda_on_cpu.h").touch()
    library = Path(moe_kernel.build(torch.device("cpu"), source))
    library.unlink()
    (library.parent / "lock").touch()              # as a killed torch build leaves it
    code = ("import moe_kernel, ctypes, pathlib, sys, torch\n"
            "path = moe_kernel.build(torch.device('cpu'), pathlib.Path(sys.argv[1]))\n"
            "assert ctypes.CDLL(path).seven() == 7\nprint(path)")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: run_python(code, source), range(2)))
    assert [(p.returncode, p.stdout) for p in both] == [(0, f"{library}\n")] * 2
    assert len(list(library.parent.glob("*.so"))) == 1


CPU = torch.device("cpu")
RESOURCES = json.loads((HERE / "assets" / "kernel_resources.json").read_text(encoding="utf-8"))


@pytest.mark.slow
@pytest.mark.parametrize("sm", ["80", "90a", "120"])
@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_nvcc_compiles_it_without_warnings_spills_or_products_one_after_another(tmp_path, monkeypatch, sm):
    """C7500 to C7599 are ptxas' remarks about wgmma that it cannot run asynchronously."""
    report = bench.ptxas_report(sm)
    assert not re.search("warning|C75", report), report
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(spills) >= 36 and set(spills) == {("0", "0")}
    monkeypatch.setattr(bench, "ptxas_report", lambda sm: report)
    assert bench.main(["resources", f"--sm={sm}", f"--json={tmp_path}/a.json"]) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    if result["nvcc"] == RESOURCES["nvcc"]:
        kept = [{**row, "registers": {sm: row["registers"].get(sm)}} for row in RESOURCES["rows"]]
        assert result["rows"] == [row for row in kept if row["registers"][sm]]


def test_the_kept_resources_are_those_of_the_tiles_that_exist():
    """Those of another kernel would say nothing. If this fails: python bench.py resources --json FILE."""
    tiles = re.findall(r"  TILE\(\w+, (\w+), (.*)\)", (HERE / "moe_kernel.cu").read_text())
    expected = set()
    for (kernel, arguments), (product, taken) in itertools.product(tiles, [("SwiGLU", 1), ("linear", 2)]):
        numbers = re.sub(r"SWIGLU \? (\d+) : (\d+)", rf"\{taken}", arguments).split(", ")
        expected.add((kernel, product, *(int(numbers[i]) for i in (0, 1, 2, 5))))
    names = "kernel", "product", "tokens", "weight_rows", "k", "stages"
    assert {tuple(row[name] for name in names) for row in RESOURCES["rows"]} == expected
    assert len(expected) == 2 * len(moe_kernel.TILES) - 2                  # all but the naive kernel
    assert all(row["spilled_bytes"] == 0 for row in RESOURCES["rows"])


@pytest.mark.parametrize("output, message", [
    (None, "nvcc is missing; install"),
    ("nvcc fatal   : Unsupported gpu architecture 'compute_90a'", "'compute_90a'"),
    ("ld: cannot find -lcudart_static: No such file\ncollect2: error: ld returned 1", "-lcudart_static")])
def test_without_a_good_nvcc_one_line_names_what_is_missing(tmp_path, monkeypatch, capsys, output, message):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    if output:
        (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho {shlex.quote(output)}; exit 1")
        (tmp_path / "nvcc").chmod(0o755)
    library = inspect.unwrap(moe_kernel.library, stop=lambda function: hasattr(function, "cache_clear"))
    with pytest.warns(UserWarning, match=message) as warned:
        assert library.__wrapped__(torch.device("cuda")) is None
    assert len(warned) == 1 and "\n" not in str(warned[0].message)
    assert bench.main(["resources"]) == 1 and re.search(f"^error: .*{message}", capsys.readouterr().err)


def test_the_nvcc_in_cuda_home_is_taken_before_another_one_on_the_path(tmp_path, monkeypatch):
    for folder in tmp_path / "old", tmp_path / "cuda/bin":
        folder.mkdir(parents=True)
        (folder / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/old")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert moe_kernel.nvcc_command("90a")[0] == f"{tmp_path}/old/nvcc"
    monkeypatch.setenv("CUDA_HOME", f"{tmp_path}/cuda")
    assert moe_kernel.nvcc_command("90a")[0] == f"{tmp_path}/cuda/bin/nvcc"
    (tmp_path / "cuda/bin/nvcc").unlink()
    assert moe_kernel.nvcc_command("90a")[0] == f"{tmp_path}/old/nvcc"


def test_another_gpu_has_another_table_and_another_moe_kernel_py_another_folder(tmp_path, monkeypatch):
    """Two GPUs may share a home. And moe_kernel.py holds the tiles that may be chosen and their checks."""
    library = inspect.unwrap(moe_kernel.library, stop=lambda function: hasattr(function, "cache_clear"))
    path = Path(moe_kernel.build(CPU))
    monkeypatch.setattr(moe_kernel, "build", lambda device: str(path))
    for name in "NVIDIA H100 80GB HBM3", "NVIDIA H200":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        loaded = library.__wrapped__(torch.device("cuda"))
        assert loaded.table == path.with_name(f"measured_{name.replace(' ', '_')}.json")
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for file, text in ("tiny.cu", ""), ("cuda_on_cpu.h", ""), ("moe_kernel.py", "x"):
        (tmp_path / file).write_text(text)
    folders = [Path(moe_kernel.build(CPU, tmp_path / "tiny.cu")).parent]
    monkeypatch.setattr(moe_kernel, "__file__", str(tmp_path / "moe_kernel.py"))
    folders.append(Path(moe_kernel.build(CPU, tmp_path / "tiny.cu")).parent)
    assert folders[0] != folders[1]


def test_where_the_kernel_cannot_be_built_its_measurement_is_skipped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(moe_kernel, "library", lambda device: None)
    assert moe_kernel.main() == 1
    monkeypatch.setattr(bench, "GPU", True)
    monkeypatch.setattr(bench, "QUICK", {})
    assert bench.main(["all", f"--out={tmp_path}"]) == 0
    assert "moe_kernel.cu: skipped" in capsys.readouterr().out


# ---------------------------------------------------------------- the kernel: it checks and measures itself

def measured_again(*arguments):
    """What a process says that has not asked before."""
    moe_kernel.MEASURED.clear()
    return moe_kernel.measured(*arguments)


@pytest.fixture
def own_table(tmp_path, monkeypatch):
    """The file of a device on which nothing has been measured, for two tiles and a split sum."""
    monkeypatch.setattr(moe_kernel.library(CPU), "table", tmp_path / "measured.json")
    monkeypatch.setattr(moe_kernel, "tile_configs", lambda *_: [1, 2, 201])
    return tmp_path / "measured.json"


@pytest.mark.parametrize("spoil", [
    lambda y: y[::max(1, len(y) - 1)].zero_(), lambda y: y[:, -1].fill_(math.nan),
    lambda y: y.mul_(1 + 2 ** -6), lambda y: y.fill_(math.nan) if y.isnan().any() else y])
@pytest.mark.parametrize("function", ["moe_linear", "moe_swiglu"])
def test_a_tile_that_is_wrong_on_this_device_is_reported_and_never_used(
        own_table, monkeypatch, function, spoil):
    """Two lost rows, NaN in a column, an error of three roundings, NaN that spreads from one expert."""
    def spoiled(name, device, *arguments, launch=moe_kernel.launch):
        launch(name, device, *arguments)
        y, tile_config = {"moe_linear": (3, -3), "moe_swiglu": (5, -1)}.get(name, (0, 0))
        if name == function and arguments[tile_config] == 2 and len(arguments[y]):
            spoil(arguments[y])
    monkeypatch.setattr(moe_kernel, "launch", spoiled)
    with pytest.warns(UserWarning, match="tile config 2 .* is wrong on cpu .* report") as warned:
        times = measured_again(CPU, torch.bfloat16, "linear", 64, 72)
    assert len(warned) == 1 and all(row.keys() == {"1", "201", "torch"} for row in times.values())


@pytest.mark.parametrize("where", ["no gather", "no scatter", "pads beside NaN"])
def test_a_tile_is_also_checked_without_gather_without_scatter_and_at_pads(own_table, monkeypatch, where):
    """w2 has no gather, and training has products without scatter."""
    def spoiled(name, device, *arguments, launch=moe_kernel.launch):
        launch(name, device, *arguments)
        if name == "moe_linear" and arguments[-3] == 2 and len(arguments[3]):
            y, gather, scatter, counts = arguments[3:7]
            if where == "pads beside NaN":
                y[counts.sum():][y[0].isnan().expand(len(y) - counts.sum(), -1)] = math.nan
            elif (gather if where == "no gather" else scatter) is None:
                y[-1] += 1
    monkeypatch.setattr(moe_kernel, "launch", spoiled)
    with pytest.warns(UserWarning, match="tile config 2 .* is wrong on cpu"):
        measured_again(CPU, torch.bfloat16, "linear", 64, 72)


def test_a_tile_that_cannot_be_launched_is_never_used_and_does_not_spoil_the_next_launch(
        own_table, monkeypatch):
    monkeypatch.setenv("CUDA_ON_CPU_SHARED_KB", "49")          # too little for small, enough for medium3
    monkeypatch.setattr(moe_kernel, "tile_configs", lambda *_: [1, 9])
    with pytest.warns(UserWarning, match=r"tile config 1 .* \(moe_linear: invalid argument\)") as warned:
        times = measured_again(CPU, torch.bfloat16, "linear", 64, 72)
    assert len(warned) == 1 and times[64].keys() == {"9", "torch"}


@pytest.mark.parametrize("spoil", [lambda permutation, counts: counts[0].add_(1),
                                   lambda permutation, counts: permutation.copy_(permutation.roll(1))])
def test_a_wrong_route_is_an_error_because_every_tile_needs_it(own_table, monkeypatch, spoil):
    def spoiled(name, device, *arguments, launch=moe_kernel.launch):
        launch(name, device, *arguments)
        if name == "moe_route":
            spoil(*arguments[1:3])
    monkeypatch.setattr(moe_kernel, "launch", spoiled)
    with pytest.raises(RuntimeError, match="moe_route .* is wrong on cpu; please report"):
        measured_again(CPU, torch.bfloat16, "linear", 64, 72)


def test_measuring_does_not_change_what_is_drawn_afterwards(own_table):
    state = torch.get_rng_state()
    measured_again(CPU, torch.float32, "linear", 64, 72)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_was_measured_is_kept_until_device_or_software_change_or_its_file_is_damaged(
        own_table, monkeypatch):
    launches, launch = [], moe_kernel.launch
    monkeypatch.setattr(moe_kernel, "launch", lambda *arguments: launches.append(launch(*arguments)))
    asked = CPU, torch.float32, "linear", 64, 72
    times, text = measured_again(*asked), own_table.read_text()
    for other in (b"", b"null", b"[1]", text.encode()[:-9], text.replace('"torch":', '"x":').encode(),
                  text.replace('"driver": 0', '"driver": 1').encode(), b'{"faults": 1}',
                  re.sub('"microseconds": .*', '"microseconds": {"linear 64 to 72 torch.float32": {}}}', text,
                         flags=re.DOTALL).encode()):
        launches.clear()
        assert measured_again(*asked) == times and not launches
        own_table.write_bytes(other)
        times = measured_again(*asked)
        assert launches and times.keys() == {64}
    for product in "swiglu", "w2":                 # they join, and do not replace the first
        measured_again(CPU, torch.float32, product, 72, 64)
    assert len(json.loads(own_table.read_text())["microseconds"]) == 3
    monkeypatch.setattr(moe_kernel.library(CPU), "table", Path("/proc/no such folder/measured.json"))
    assert measured_again(*asked).keys() == {64}, "where nothing can be kept, it is measured again"


def test_a_product_is_measured_with_many_weights_but_with_those_of_32_layers_at_most(tmp_path, monkeypatch):
    """Thousands of tiny ones would take minutes. Of 2048 × 2048, 17 copies are more than an L2 cache."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    loaded = SimpleNamespace(table=tmp_path / "a.json", device_name="a GPU", moe_driver_version=lambda: 13)
    monkeypatch.setattr(moe_kernel, "library", lambda device: loaded)
    monkeypatch.setattr(moe_kernel, "tile_configs", lambda *_: [2])
    monkeypatch.setattr(moe_kernel, "_find_fault", lambda *_: "")
    monkeypatch.setattr(moe_kernel, "_measure", lambda product, n, weights, tiles: {"2": len(weights)})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "Generator", lambda device: None)
    with FakeTensorMode():
        counted = [measured_again(torch.device("cuda"), torch.bfloat16, "w2", width, width)[64]["2"]
                   for width in (8, 2048)]
    assert counted == [32, 17]


@pytest.mark.slow
def test_two_processes_measure_once(tmp_path):
    code = ("import pathlib, sys, torch, moe_kernel\nd = torch.device('cpu')\n"
            "moe_kernel.library(d).table = pathlib.Path(sys.argv[1], 'measured.json')\n"
            "print(moe_kernel.measured(d, torch.float32, 'swiglu', 64, 72))")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: run_python(code, tmp_path, PYTHONWARNINGS="ignore"), range(2)))
    assert both[0].returncode == 0 and both[0].stdout == both[1].stdout


@pytest.mark.parametrize("major, minor, kilobytes, made_for_it", [
    (7, 5, 64, None), (8, 0, 164, set()), (8, 9, 100, {9, 10}), (9, 0, 228, {5, 6, 7, 8}),
    (12, 0, 100, {9, 10})])
def test_a_gpu_measures_the_tiles_that_were_made_for_it(monkeypatch, major, minor, kilobytes, made_for_it):
    gpu = SimpleNamespace(major=major, minor=minor, shared_memory_per_multiprocessor=kilobytes << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    for product in "linear", "swiglu", "w2":
        tiles = {*moe_kernel.tile_configs(torch.device("cuda"), torch.bfloat16, product)}
        if made_for_it is None:                    # bfloat16 needs compute capability 8.0
            assert not tiles
            continue
        assert tiles & {*range(5, 11)} == made_for_it and {1, 2, 3} <= tiles
        assert any(t > moe_kernel.SPLIT for t in tiles) == (product != "swiglu")


def test_the_fastest_tile_and_back_end_of_the_nearest_size_are_chosen(monkeypatch):
    times = {64: {"1": 3.0, "2": 2.0, "torch": 1.0}, 1024: {"1": 5.0, "2": 9.0, "torch": 7.0},
             4096: {"torch": 1.0}}
    monkeypatch.setattr(moe_kernel, "measured", lambda *_: times)
    monkeypatch.setattr(moe_kernel, "library", lambda device: object())
    monkeypatch.setattr(moe_kernel, "tile_configs", lambda *_: [1, 2])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(moe_kernel, "_fastest", moe_kernel._fastest.__wrapped__)
    gpu, bf16, products = torch.device("cuda"), torch.bfloat16, [("linear", 64, 72), ("swiglu", 64, 72)]
    for tokens, tile, back_end in ((1, 2, "torch"), (250, 2, "torch"), (260, 1, "cuda"), (2000, 1, "cuda")):
        assert moe_kernel.best_tile(gpu, bf16, "linear", 64, 72, tokens=tokens) == tile
        assert moe_kernel.fastest_back_end(gpu, bf16, tokens, products) == back_end
    times[64] |= {str(tile): 2.0 for tile in range(3, 11)}
    assert moe_kernel.best_tile(gpu, bf16, "linear", 64, 72, tokens=64) == 2, "of equals always the first"
    assert moe_kernel.fastest_back_end(gpu, bf16, 9999, products) == "torch", "no tile is right"
    with pytest.raises(RuntimeError, match="no tile .* torch back end"):
        moe_kernel.best_tile(gpu, bf16, "linear", 64, 72, tokens=9999)
    assert moe_kernel.fastest_back_end(CPU, bf16, 64, products) == "torch"
    assert moe_kernel.fastest_back_end(gpu, torch.float64, 64, products) == "torch"


@pytest.mark.parametrize("major, dtype, width", [(7, torch.bfloat16, 64), (9, torch.bfloat16, 60)])
def test_auto_is_torch_where_the_kernel_cannot_run_and_nothing_is_built(monkeypatch, major, dtype, width):
    gpu = SimpleNamespace(major=major, minor=0, shared_memory_per_multiprocessor=228 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(moe_kernel, "library", None)
    products = [("swiglu", 64, width)]
    assert moe_kernel.fastest_back_end(torch.device("cuda"), dtype, 64, products) == "torch"


def test_where_measuring_fails_auto_is_torch_and_one_line_says_why_once(monkeypatch):
    def broken(*_):
        raise RuntimeError("moe_route: CUDA driver version is insufficient for CUDA runtime version\nmore")
    monkeypatch.setattr(moe_kernel, "measured", broken)
    monkeypatch.setattr(moe_kernel, "library", lambda device: SimpleNamespace(device_name="a GPU"))
    monkeypatch.setattr(moe_kernel, "tile_configs", lambda *_: [1])
    monkeypatch.setattr(moe_kernel, "FAILED", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked = torch.device("cuda"), torch.bfloat16, 64, [("linear", 640, 72)]
    with pytest.warns(UserWarning, match="torch back end is .* on a GPU .moe_route: CUDA driver") as warned:
        assert {moe_kernel.fastest_back_end(*asked) for _ in range(3)} == {"torch"}
    assert len(warned) == 1 and "\n" not in str(warned[0].message)


def test_while_a_graph_is_captured_the_tile_comes_from_the_file_or_not_at_all(tmp_path, monkeypatch):
    """Nothing can be measured then, and a tile that nobody checked may be wrong."""
    loaded = SimpleNamespace(table=tmp_path / "a.json", device_name="a GPU", moe_driver_version=lambda: 13)
    monkeypatch.setattr(moe_kernel, "library", lambda device: loaded)
    monkeypatch.setattr(moe_kernel, "MEASURED", {})
    monkeypatch.setattr(moe_kernel, "_fastest", moe_kernel._fastest.__wrapped__)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    asked = torch.device("cuda"), torch.bfloat16, "linear", 64, 72
    with pytest.raises(RuntimeError, match="^.*run the model once before capturing.*$"):
        moe_kernel.best_tile(*asked, tokens=64)
    loaded.table.write_text(json.dumps({
        "device": "a GPU", "driver": 13, "torch": torch.__version__, "faults": {"torch.bfloat16": {}},
        "microseconds": {"linear 64 to 72 torch.bfloat16": {"64": {"1": 3.0, "2": 2.0, "torch": 1.0}}}}))
    assert moe_kernel.best_tile(*asked, tokens=64) == 2


# ---------------------------------------------------------------- the kernel: do the checks bite?

def check_build(path):
    """What a sanitized or sabotaged build of moe_kernel.cu is put to: both experts with boundary tiles and
    tails, more steps along K than pipeline stages, and tiles of pads alone, in every dtype and tile shape;
    and once more token tiles than a band has."""
    faulthandler.disable()
    torch.set_num_threads(1)
    library = ctypes.CDLL(str(path))
    library.moe_error_string.restype = ctypes.c_char_p
    moe_kernel.library = lambda device: library
    mixed = [TEXT, VISUAL, VISUAL, VISUAL, VISUAL] * 18 + [PAD] * 50
    shapes = [(torch.float32, "auto"), (torch.bfloat16, "medium"), (torch.float16, "large"),
              (torch.bfloat16, "naive"), (torch.bfloat16, "hopper64x128"), (torch.float16, "hopper128x192")]
    for eager in "01":
        os.environ["CUDA_ON_CPU_EAGER"] = eager
        for seed, (labels, (dtype, tile)) in enumerate(itertools.product([[], [PAD] * 3, mixed], shapes)):
            options = seed % 2 == 0, seed // 2 % 2 == 0
            check_kernels(torch.tensor(labels, dtype=torch.uint8), 456, 72, dtype, tile, *options)
        check_weight_gradients(70, 130, 3, 136, 72, torch.bfloat16)
        check_kernels(torch.tensor(mixed[:70], dtype=torch.uint8), 584, 40, torch.float16, "small / 2")
    check_kernels(torch.tensor(mixed * 16, dtype=torch.uint8), 8, 8, torch.float32)        # two bands


def run_python(code, *arguments, **environment):
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=HERE, timeout=120, text=True,
                          env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def compile_with_gcc(source, output, *flags):
    return subprocess.Popen(["g++", "-x", "c++", "-std=c++17", "-I", HERE, *flags, "-fPIC", "-shared", source,
                             "-o", output], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


TINY_KERNELS = """
#include "cuda_on_cpu.h"
__global__ void kernel(int which, const float* in, float* out) {
    DYNAMIC_SHARED(float, shared);
    const int t = threadIdx.x;
    if (which == 0) out[t] = shared[t];                    // shared memory that nobody wrote
    if (which == 1 || which == 2) {                        // cp.async, without the wait or with it
        cp_async16(shared + 4 * t, in, 16);
        cp_async_commit();
        if (which == 2) cp_async_wait<0>();
        out[t] = shared[4 * t];
    }
    if (which == 3) shared[t] = t, out[t] = shared[t / 2]; // needs a barrier, has none
    if (which == 4 && t < 40) __syncthreads();             // does not reach all threads
    if (which == 5) cp_async16(shared + 2 * t, in, 16);    // not at multiples of 16 bytes
    if (which == 6) {                                      // 8 rows in the same banks
        uint32_t matrices[4];
        ldmatrix_x4(matrices, shared + 32 * (t % 8));
    }
}
extern "C" int run(int which, const float* in, float* out) {
    const int shared_bytes = which == 7 ? 50 << 10 : 1024; // more than a kernel may use without an attribute
    LAUNCH(kernel, 1, 64, shared_bytes, 0, which, in, out);
    return cudaGetLastError();
}
"""


def test_cuda_on_cpu_is_strict_where_a_gpu_is_silent(tmp_path, monkeypatch):
    (tmp_path / "tiny.cu").write_text(TINY_KERNELS)
    compiler = compile_with_gcc(tmp_path / "tiny.cu", tmp_path / "tiny.so")
    assert not (output := compiler.communicate()[0]), output
    library, given, out = ctypes.CDLL(str(tmp_path / "tiny.so")), torch.ones(4), torch.zeros(64)

    def run(which):
        library.run(which, ctypes.c_void_p(given.data_ptr()), ctypes.c_void_p(out.data_ptr()))
        return out
    assert run(0).isnan().all(), "shared memory starts as NaN"
    assert run(1).isnan().all() and run(2).eq(1).all(), "nothing arrives before the wait"
    assert torch.equal(run(3), torch.arange(64) // 2.), "first to last, a missing barrier stays hidden ..."
    monkeypatch.setenv("CUDA_ON_CPU_REVERSE", "1")
    assert run(3)[2:].isnan().all(), "... and last to first it shows"
    monkeypatch.setenv("CUDA_ON_CPU_EAGER", "1")
    assert run(1).eq(1).all(), "a copy may arrive before the wait"
    assert library.run(7, None, None) != 0 and library.run(8, None, None) == 0
    for which, message in ((4, r"diverge in block \(0, 0, 0\): thread 32 is at .*, thread 40 at the end"),
                           (5, "misaligned"), (6, "bank conflicts")):
        died = run_python("import ctypes, sys; ctypes.CDLL(sys.argv[1]).run(int(sys.argv[2]), None, None)",
                          tmp_path / "tiny.so", str(which))
        assert died.returncode < 0 and re.search(message, died.stdout)


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]     # -O0 compiles fastest
    compiler = compile_with_gcc(HERE / "moe_kernel.cu", tmp_path / "asan.so", *sanitize)
    assert not (output := compiler.communicate()[0]), output
    libraries = (subprocess.check_output(["g++", f"-print-file-name={name}.so"], text=True).strip()
                 for name in ("libasan", "libubsan"))
    result = run_python("import sys, test_all; test_all.check_build(sys.argv[1])", tmp_path / "asan.so",
                        CUDA_ON_CPU_REVERSE="1", ASAN_OPTIONS="detect_leaks=0",
                        LD_PRELOAD=" ".join(libraries))
    assert result.returncode == 0, result.stdout[-3000:]


PLANTED_BUGS = {                                   # name: what stands in moe_kernel.cu, what is put there
    "nothing planted": ("", ""),
    "a missing barrier": ("        __syncthreads();              // now those of", "        // now those of"),
    "a missing barrier in the scan": ("__syncthreads();  // all threads have read before any writes", ""),
    "a wait one group too short": ("cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    "a load before the barrier": ("        cp_async_wait<STAGES - 2>();",
                                  "        load(k_tile + STAGES - 1);\n        cp_async_wait<STAGES - 1>();\n"
                                  "        auto load = [](int) {};"),
    "rows off by one": ("tokens.begin + row + i", "tokens.begin + 1 + row + i"),
    "the wrong expert at the boundary tile": ("token_tile < num_text_tiles", "token_tile <= num_text_tiles"),
    "a token tile between two bands is left out": ("splits * BAND", "splits * (BAND + 1)"),
    "a column past the tail": ("if (column >= p.out_features) ret", "if (column > p.out_features) ret"),
    "numbers past the tail of K": ("source != nullptr && k < in_features;", "source != nullptr;"),
    "a misaligned slot": ("(chunk ^ row % 8 / ROWS_PER_128_BYTES) * 8;",
                          "(chunk ^ row % 8 / ROWS_PER_128_BYTES) * 8 + 4;"),
    "no swizzle": ("ROWS_PER_128_BYTES = 64 / BK;", "ROWS_PER_128_BYTES = 8;"),
    "no attribute for shared memory": (
        "cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Tile::SHARED_BYTES);",
        "cudaSuccess;"),
    "a split in the place of another": ("int64_t(blockIdx.z % p.splits) * p.num_tokens",
                                        "int64_t(blockIdx.z / p.splits) * p.num_tokens"),
    "a split that is added twice": ("p.partial_sums + split * size", "p.partial_sums + split / 2 * size"),
    "gradient: a missing barrier": ("GRAD_STAGES - 2>();\n        __syncthreads();", "GRAD_STAGES - 2>();"),
    "gradient: a wait one group too short": ("cp_async_wait<GRAD_STAGES - 2>()",
                                             "cp_async_wait<GRAD_STAGES - 1>()"),
    "gradient: no swizzle": ("(load_chunk ^ load_row) * 8;", "load_chunk * 8;"),
    "gradient: the tokens of the other expert": ("token < num_tokens && column", "column"),
    "gradient: a tail of the widths": ("if (column >= in_features) break;", ""),
    "wgmma: no fence between copies and products": ("        fence_proxy_async();\n", ""),
    "wgmma: no fence between the sums and products": ("        wgmma_fence();\n", ""),
    "wgmma: no wait for the last products": ("    wgmma_wait<0>();\n", ""),
    "wgmma: a wait for copies one group too short": ("cp_async_wait<AHEAD - 1>()", "cp_async_wait<AHEAD>()"),
    "wgmma: a copy while products still read": ("AHEAD = STAGES - 1 - Tile::PENDING;", "AHEAD = STAGES - 1;"),
    "wgmma: a step along K too short": ("a + stage + 2 * k", "a + stage + k"),
    "wgmma: the rows of another warpgroup": ("threadIdx.x / 128 * 64;", "threadIdx.x / 128 * 0;")}


@pytest.mark.slow
def test_every_planted_bug_is_found(tmp_path):
    """The checks bite: each sabotaged copy fails them, and the faithful copy passes."""
    text, compilers, passed = (HERE / "moe_kernel.cu").read_text(), [], {}
    for name, (original, bug) in PLANTED_BUGS.items():
        assert not original or text.count(original) == 1, original
        (tmp_path / f"{name}.cu").write_text(text.replace(original, bug))
        compilers.append(compile_with_gcc(tmp_path / f"{name}.cu", tmp_path / f"{name}.so", "-O0"))
    for name, compiler in zip(PLANTED_BUGS, compilers, strict=True):
        assert not (output := compiler.communicate()[0]), output
        child = multiprocessing.get_context("fork").Process(target=check_build,
                                                            args=(tmp_path / f"{name}.so",))
        child.start()
        child.join()
        passed[name] = child.exitcode == 0
    assert passed == {name: name == "nothing planted" for name in PLANTED_BUGS}


# ---------------------------------------------------------------- the benchmarks

TOOLKIT = json.loads((GOLDEN / "benchmarks.json").read_text(encoding="utf-8"))
CHOICES = ["MMBench_DEV_EN", "MMBench_TEST_EN", "CCBench", "SEEDBench_IMG", "ScienceQA_TEST", "AI2D_TEST",
           "MMMU_DEV_VAL"]
TSV_OF = {"vqa_accuracy": ["TextVQA_VAL"], "anls": ["DocVQA_VAL", "DocVQA_TEST", "InfoVQA_VAL"],
          "relaxed_accuracy": ["ChartQA_TEST"], "exact_match": ["GQA_TestDev_Balanced"],
          "yes_no": ["MME", "HallusionBench", "POPE"], "mmmu": ["MMMU_DEV_VAL"], "ocrbench": ["OCRBench"],
          "option": CHOICES, "mathvista": ["MathVista_MINI"]}
TINY_MODEL = ["--model", str(HERE / "assets/tiny")]


def as_row(fields: dict) -> dict[str, str]:
    """As it stands in a TSV file: texts, and nothing where a field is missing."""
    return {name: str(value) for name, value in fields.items() if value is not None}


def base64_image(image: Image.Image) -> str:
    image.save(file := io.BytesIO(), "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_tsv(path: Path, rows: list[dict]):
    with open(path, "w", encoding="utf-8", newline="") as file:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = csv.DictWriter(file, columns, delimiter="\t")
        table.writeheader()
        table.writerows(rows)


@pytest.mark.parametrize("metric", TSV_OF)
def test_a_row_is_scored_as_the_toolkit_scores_it(metric):
    cases = [case for case in TOOLKIT["cases"] if case["metric"] == metric]
    for case, name in itertools.product(cases, TSV_OF[metric]):
        fields, said = case["fields"], case["prediction"]
        row = as_row({"answer": fields.get("answers"), **fields, **fields.get("options", {})})
        given = benchmarks.score(name, row, said)
        assert (given or 0) == pytest.approx(case.get("score", case.get("score_prefetch_only"))), case
        if "inferred" in case or "prefetch" in case:         # false: a judge would be asked
            assert (given is None) == (not case.get("inferred", case.get("prefetch"))), case
        if "judge_output" in fields:
            judged = {**row, "res": fields["judge_output"]}
            assert benchmarks.score(name, judged, said) == case["score_given_judge_output"], case
        if "processed_prediction" in case:
            assert benchmarks.normalize(said) == case["processed_prediction"]
            assert list(map(benchmarks.normalize, fields["answers"])) == case["processed_answers"]
    assert cases


# One quirk is left out: pandas makes floats of a column of numbers. Only cut-down files have such columns.
@pytest.mark.parametrize("case", [case for case in TOOLKIT["prompts"] + TOOLKIT["tsv"]
                                  if "quirk" not in case], ids=lambda case: case["id"])
def test_a_file_is_read_and_a_question_is_asked_as_the_toolkit_does(case, tmp_path, monkeypatch):
    asked, pictures = [], [base64_image(Image.new("RGB", (8 * k, 8))) for k in range(1, 4)]
    if "tsv" in case:
        text = re.sub(r"(?m)^(?=\d+\t)", pictures[0] + "\t", case["tsv"])
        (tmp_path / "a.tsv").write_text("image\t" + text)
    else:
        pictures = pictures[:case["n_images"]]
        columns = "answer category l2-category image_path question_type answer_type choices answer_option"
        write_tsv(tmp_path / "a.tsv", [{**dict.fromkeys(columns.split(), "1"), **case["row"],
                                        "image": pictures[0] if len(pictures) == 1 else repr(pictures)}])
    tsv = benchmarks.Tsv(tmp_path / "a.tsv", case["benchmark"])

    def record(model, tok, tiles, text):
        asked.append((text, tiles))
        raise InputError("enough")

    monkeypatch.setattr(evaluate, "make_sample", record)
    monkeypatch.setattr(evaluate, "load_tiles", lambda picture, max_tiles, image_size: (
        data.open_image(picture).width, max_tiles))
    evaluate.answer_window(SimpleNamespace(config=SMALL), TOK, tsv, range(len(tsv.rows)), case["benchmark"],
                           evaluate.Flags(), unittest.mock.Mock())
    tiles = [(8 * k * (1 + image["upscale"]), image["max_tiles"]) for k, image in enumerate(case["tiles"], 1)
             ] if "tiles" in case else [(8, 6)]
    assert asked == [(prompt, tiles) for prompt in case.get("prompts", [case.get("prompt")])]


@pytest.mark.parametrize("case", TOOLKIT["aggregates"], ids=lambda case: case["id"])
def test_rows_add_up_to_the_toolkits_numbers(case):
    rows, wanted = list(map(as_row, case["rows"])), case["result"]
    if "quirk" in case:                            # a spreadsheet made nan of "" and None, which stay texts
        wanted = {"Overall": 100 * sum(row["prediction"].lower() in row["answer"] for row in rows[1:]) / 2}
    found = evaluate.aggregate(case["benchmark"], rows, [row["prediction"] for row in rows])
    mine = {**found, **found["parts"], "reasoning": found.get("cognition"),
            "Final Score Norm": found["score"] / 10,
            **dict.fromkeys(("Overall", "Final Score", "MME_sum", "HallB_avg"), found["score"])}
    mine["Text Recognition"] = sum(value for name, value in found["parts"].items()
                                   if re.search("Handwriting|(Text|String) Recognition", name))
    if case["benchmark"] in CHOICES:               # fractions, for each split
        wanted = next(wanted[split] for split in ("validation", "dev", "none") if split in wanted)
        names = {"CP": "coarse_perception", "LR": "logic_reasoning", "RR": "relation_reasoning"}
        wanted = {names.get(name, name): 100 * value for name, value in wanted.items()}
    if case["benchmark"] == "HallusionBench":
        assert {name: found[name] for name in ("aAcc", "fAcc", "qAcc")} == pytest.approx(wanted["Overall"])
    if case["benchmark"] == "MMVet":               # [K] counts questions of one capability twice in its part
        wanted = {"Overall": wanted["Overall"]}
    for name, value in {**wanted, **case.get("paper_number", {})}.items():
        if isinstance(value, dict):                # several numbers: find the one that we give
            value = value.get("Overall", value.get("acc", sum(value.values()) / 3))
        assert mine[name] == pytest.approx(value), name


SPOKEN = ("A B C D Z yes no Yes. 1,000 3.5% 0 12 14. nan inf the dont somebody'd cat cat! ß 是 [1] "
          "<box>[[0,0,9,9]]</box> <box>[[0,0,0,0]]</box> [[9,9,0,0]]").split()
SAID = st.text(max_size=9) | st.lists(st.sampled_from(SPOKEN), max_size=4).map(" ".join)
ROWS = st.fixed_dictionaries(
    {"question": SAID, "answer": SAID | st.sampled_from("ABCD") | st.lists(SAID, max_size=3).map(repr),
     "index": st.integers(0, 3).map(lambda i: f"{i % 2 * 1_000_000 + i // 2}"), "A": SAID, "category": SAID},
    optional={"B": SAID, "C": SAID, "D": SAID, "l2-category": SAID, "image_path": st.sampled_from("ab"),
              "split": st.sampled_from(["dev", "validation"]), "score": st.sampled_from(["0.5", "1.0"]),
              "question_type": st.sampled_from(["multi_choice", "free_form"]), "choices": st.just("['a', 1]"),
              "answer_type": st.sampled_from(["integer", "float", "text", "list"]), "answer_option": SAID})
NAMES = st.sampled_from([*benchmarks.BENCHMARKS, "questions of your own"])


@settings(max_examples=200)
@given(NAMES, ROWS, SAID)
def test_any_answer_scores_between_0_and_1_or_is_left_open(name, row, said):
    given = benchmarks.score(name, row, said)
    assert given is None or 0 <= given <= 1
    assert benchmarks.score(name, row, None) == 0              # what could not be asked
    for answer, right in ("B", True), ("the text", True), ("A", False), (row["A"] + "?", False):
        assert benchmarks.score("own", {**row, "B": "the text", "answer": answer}, "B") == right
    assert benchmarks.anls({**row, "answer": repr([said, "x"])}, said) == 1
    words = re.sub("[^a-z0-9' ]", "", said)                  # without marks, which vanish step by step
    assert benchmarks.normalize(benchmarks.normalize(words)) == benchmarks.normalize(words)


@pytest.mark.parametrize("said, right", [
    ("<ref>cup</ref><box>[[100, 100, 200, 200]]</box>", True), ("a cup [[100.0,100,200.0,200]]", True),
    ("[[100, 100, 200, 150]]", True), ("[[100, 100, 200, 149]]", False),           # half of it, and less
    ("[[100, 100, 300, 200]]", True), ("[[100, 100, 301, 200]]", False),           # twice as large, and more
    ("[[150, 100, 250, 200]]", False), ("[[300, 300, 400, 400]]", False), ("[[200, 200, 100, 100]]", False),
    ("[[150, 150, 150, 150]]", False), ("[[100, 100, 200, 200], [0, 0, 9, 9]]", False),      # one too many
    ("[[100, 100, 200]]", False), ("[[100, 100, 200, 20", False), ("[[a, b, c, d]]", False), ("cup", False),
    ("", False), (f"[[{'9' * 999}, 0, 1, {'9' * 5000}]]", False)])
def test_a_box_of_your_own_questions_is_right_if_it_overlaps_the_answer_by_half(said, right):
    def score(answer, said, benchmark="own"):
        return benchmarks.score(benchmark, {"question": "?", "answer": answer}, said)
    answer = "<ref>cup</ref><box>[[100, 100, 200, 200]]</box>"
    assert score(answer, said) == score(repr(["none", answer]), said) == right
    for unreadable in ("what <box> means", "<box>[[1, 1, 1, 1]]</box>"):
        assert score(unreadable, said) == 0 and score(unreadable, unreadable) == 1
    assert score(answer, said, "GQA_TestDev_Balanced") == (said == answer)
    two = "<box>[[0, 0, 100, 100], [500, 0, 600, 100]]</box>"
    assert score(two, "[500, 0, 600, 90] [0, 0, 90, 100]") == 1 and score(two, "[0, 0, 100, 100]") == 0


@settings(max_examples=100)
@given(NAMES, st.lists(st.tuples(ROWS, SAID), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_no_total_depends_on_the_order_of_rows_and_a_judge_can_only_raise_it(name, pairs, rng):
    def total(name, pairs):
        return evaluate.aggregate(name, *map(list, zip(*pairs, strict=True)))

    found, again = total(name, pairs), total(name, rng.sample(pairs, len(pairs)))
    for key in ("parts", "part_rows"):
        assert found.pop(key) == pytest.approx(again.pop(key))
    assert found == pytest.approx(again)
    assert found["at_most"] >= found["score"] - 1e-9
    choices = [({**row, "answer": "A", "split": ""}, said) for row, said in pairs]
    judged = [(row, "A" if benchmarks.score("CCBench", row, said) is None else said) for row, said in choices]
    assert total("CCBench", judged)["score"] == pytest.approx(total("CCBench", choices)["at_most"])
    rotations = [({**row, "index": str(k + i * 10 ** 6)}, rng.choice([said, "A"]))
                 for k, (row, said) in enumerate(choices) for i in range(3)]
    assert total("CCBench", rotations)["score"] <= total("AI2D_TEST", rotations)["score"] + 1e-9


def world_rows(task: str, n: int) -> list[dict]:
    """Held-out questions of the embedded world as the rows of a TSV file."""
    return [{"index": i, "image": base64_image(picture.image), "question": question, "answer": truth,
             "category": task, "image_path": i}
            for i, (picture, question, truth) in enumerate(world.held_out_questions(task, n))]


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_benchmark_that_was_stopped_anywhere_ends_with_the_same_files(tmp_path, monkeypatch, capsys):
    write_tsv(tmp_path / "questions.tsv", [*world_rows("color", 12), *world_rows("sign", 9)])

    def run(out, *flags):
        return evaluate.main([*TINY_MODEL, "--plain", "--batch_size=2", f"--out={tmp_path / out}",
                              f"--benchmark={tmp_path / 'questions.tsv'}", "--as=own", *flags])

    assert run("whole") == 0
    whole, rng, answer_batch = files_in(tmp_path / "whole"), random.Random(0), evaluate.greedy_answers
    assert set(whole) == {"own.jsonl", "report.json", "report.png"}
    for stop in range(1, 11, 4):                   # Ctrl-C in a batch; then a crash loses the end of the file
        calls = itertools.count(1)
        monkeypatch.setattr(evaluate, "greedy_answers", lambda *a, stop=stop, calls=calls: (
            answer_batch(*a) if next(calls) < stop else (_ for _ in ()).throw(KeyboardInterrupt)))
        assert run(f"{stop}") == 130 and run(f"{stop}", "--score_only") == 1 and "own.jsonl answers" in (
            capsys.readouterr().err)
        monkeypatch.setattr(evaluate, "greedy_answers", answer_batch)
        part = tmp_path / f"{stop}" / "own.jsonl.part0"
        written = part.read_bytes()
        part.write_bytes(written[:rng.randrange(len(written) + 1)])
        part.with_name("own.jsonl.part3").write_bytes(written[:len(written) // 2])         # another process
        assert run(f"{stop}") == 0 and files_in(tmp_path / f"{stop}") == whole
    assert run("whole", "--score_only", "--model=nowhere") == 0 and files_in(tmp_path / "whole") == whole
    write_tsv(tmp_path / "questions.tsv", world_rows("sign", 21))    # others under the same name
    assert run("whole") == 1 and "answers to other questions" in capsys.readouterr().err


@pytest.mark.slow
def test_any_number_of_processes_writes_the_same_answers_even_if_they_are_killed(tmp_path):
    write_tsv(tmp_path / "own.tsv", world_rows("position", 90))

    def run(out, number=1, killed=None):
        """killed: in its second window, this process and then the others are killed."""
        def one_process(rank):
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)}
            windows, answer_window = itertools.count(), evaluate.answer_window
            evaluate.answer_window = lambda *a: (os.kill(os.getpid(), signal.SIGKILL) if rank == killed
                                                 and next(windows) else answer_window(*a))
            os._exit(evaluate.main([*TINY_MODEL, "--plain", "--batch_size=2", f"--out={tmp_path / out}",
                                    f"--benchmark={tmp_path / 'own.tsv'}"]))

        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        fork = multiprocessing.get_context("fork")
        processes = [fork.Process(target=one_process, args=(rank,)) for rank in range(number)]
        for process in processes:
            process.start()
        for process in processes if killed is None else [processes[killed]]:
            process.join(200)
        if killed is not None:
            for process in processes:
                process.kill()
                process.join()
        codes = [process.exitcode for process in processes]
        if killed is None:
            assert codes == [0] * number
        else:                                      # another may notice it before it is killed, and say so
            assert codes[killed] == -9 and set(codes) <= {-9, 1}
        return files_in(tmp_path / out)

    one = run("one")
    assert run("two", 2) == one
    for number, killed in ((2, 0), (3, 2)):
        left = run("killed", number, killed)
        assert 0 < sum(content.count(b"\n") for name, content in left.items() if ".part" in name) < 90
        assert run("killed", 5 - number) == one
        shutil.rmtree(tmp_path / "killed")


def test_a_row_that_cannot_be_asked_counts_as_wrong_and_is_listed(tmp_path, capsys):
    good = world_rows("color", 1)[0]
    (tmp_path / "there.png").write_bytes(base64.b64decode(good["image"]))
    bad = {"its image is not base64": {"image": "a" * 69}, "not a readable image": {"image": "a" * 68},
           "is not a readable": {"image": good["image"][:100]}, "2 <image> marks": {"question": "<image>?"},
           "control token": {"question": "What<|im_end|>?"}, "is no index": {"image": "77"},
           "has no question": {"question": "N/A"}, "tokens fill": {"question": "What? " * 900},
           "readable image: ": {"image": repr([good["image"], "a" * 68])}}
    rows = [good, *({**good, **fields} for fields in bad.values()), {**good, "image": "0"}]
    write_tsv(tmp_path / "own.tsv", [{**row, "index": i} for i, row in enumerate(rows)])
    paths = {"there.png": True, "gone.png": False, "['there.png']": True, "there.png\0": False, "[]": False}
    del good["image"]
    write_tsv(tmp_path / "paths.tsv", [{**good, "image_path": path} for path in paths])
    assert evaluate.main([*TINY_MODEL, "--plain", f"--out={tmp_path}", "--benchmark",
                          *(str(tmp_path / f"{name}.tsv") for name in ("own", "paths"))]) == 0
    own, by_path = json.loads((tmp_path / "report.json").read_text())
    assert (own["n"], own["left_out"], own["score"]) == (11, 0, pytest.approx(200 / 11))
    assert [row["index"] for row in own["unreadable"]] == [str(i) for i in range(1, 10)]
    assert all(message in row["error"] for message, row in zip(bad, own["unreadable"], strict=True))
    assert by_path["score"] == pytest.approx(100 * sum(paths.values()) / len(paths))
    assert "own: row 9 counts as wrong: " in capsys.readouterr().out


def test_your_own_questions_may_have_no_picture_and_each_category_stands_apart(tmp_path, monkeypatch, capsys):
    asked, make_sample = [], evaluate.make_sample
    monkeypatch.setattr(evaluate, "make_sample", lambda *a: (asked.append(make_sample(*a)), asked[-1])[1])
    seen = [row | {"category": "flags"} for row in world_rows("color", 3)]
    alone = {"question": "top is red.\nWhat color is top?", "answer": "top is red.", "image": ""}
    foods = alone | {"category": "foods"}
    write_tsv(tmp_path / "own.tsv", [*seen, foods, alone | {"image": "None"},
                                     foods | {"answer": "top is blue.", "image_path": ""}])
    assert evaluate.main([*TINY_MODEL, f"--out={tmp_path}", f"--benchmark={tmp_path / 'own.tsv'}"]) == 0
    result, = json.loads((tmp_path / "report.json").read_text())
    assert (result["n"], result["unreadable"], result["score"]) == (6, [], pytest.approx(500 / 6))
    assert (result["parts"], result["part_rows"]) == ({"flags": 100, "foods": 50}, {"flags": 3, "foods": 2})
    assert re.search(r"\n  flags +3 +100.0 +\n  foods +2 +50.0 +\n", capsys.readouterr().out)
    text, _ = encode_conversation(Tokenizer(HERE / "assets/tiny"), ask(alone["question"]))
    assert [sample["input_ids"].tolist() for sample in asked if sample["pixel_values"] is None] == [text] * 3
    write_tsv(tmp_path / "MME.tsv", [alone | {"category": "", "image_path": ""}])      # a paper's benchmark
    assert evaluate.main([*TINY_MODEL, f"--out={tmp_path}", f"--benchmark={tmp_path / 'MME.tsv'}"]) == 1
    assert "no row with a picture" in capsys.readouterr().err


@pytest.mark.parametrize("damage, message", [
    (lambda text: text.replace("question", "query"), "has no column question"),
    (lambda text: text.replace("image", "picture"), "has no column image"),
    (lambda text: text.replace("answer", "reply"), "has no column answer"),
    (lambda text: text.replace("index", "number"), "has no column index"),
    (lambda text: text[:len(text) * 3 // 4], "damaged or was cut off"),
    (lambda text: text.rstrip() + '\t"A', "damaged or was cut off"),
    (lambda text: text.replace("\t", ","), "has no column"),
    (lambda text: text.replace("\n0\t", "\nzero\t"), "expected a number"),
    (lambda text: text.splitlines()[0], "no row with a picture"), (lambda text: "", "has no column"),
    (lambda text: "\x00\n" + text, "(has no column|NUL)"), (lambda text: None, "No such file")])
def test_a_damaged_file_is_named_in_one_line(damage, message, tmp_path, capsys):
    write_tsv(tmp_path / "MMBench_DEV_EN.tsv", world_rows("color", 3))
    text = damage((tmp_path / "MMBench_DEV_EN.tsv").read_text())
    (tmp_path / "MMBench_DEV_EN.tsv").unlink() if text is None else (
        tmp_path / "MMBench_DEV_EN.tsv").write_text(text)
    assert evaluate.main([*TINY_MODEL, f"--out={tmp_path}", "--benchmark",
                          str(tmp_path / "MMBench_DEV_EN.tsv")]) == 1
    assert re.fullmatch(f"error: .*MMBench_DEV_EN.tsv.*{message}.*\n", capsys.readouterr().err)


def test_pictures_are_not_held_in_memory(tmp_path):
    write_tsv(tmp_path / "MME.tsv", [{"index": i, "image": "x" * 500_000, "question": "Q", "answer": "Yes",
                                      "category": "OCR", "image_path": i} for i in range(60)])
    tracemalloc.start()
    tsv = benchmarks.Tsv(tmp_path / "MME.tsv", "MME")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(tsv.rows) == 60 and held < 100_000 and peak < 10 * 500_000
    assert tsv.read(59)[0]["image"] == "x" * 500_000


def test_the_report_has_what_servers_and_judges_take_and_gives_their_verdict(tmp_path, monkeypatch, capsys):
    picture, said = base64_image(Image.new("RGB", (48, 48))), iter([])
    monkeypatch.setattr(evaluate, "greedy_answers", lambda model, tok, batch, tokens: [
        tok.encode(next(said), bos=False) for _ in batch])

    def run(name, texts, *flags, **columns):
        nonlocal said
        said = iter(texts)
        write_tsv(tmp_path / f"{name}.tsv", [{"index": i, "image": picture, "question": "Q", **columns}
                                             for i in range(len(texts))])
        assert evaluate.main([*TINY_MODEL, "--plain", f"--out={tmp_path}", *flags, "--benchmark",
                              str(tmp_path / f"{name}.tsv")]) == 0
        result, = json.loads((tmp_path / "report.json").read_text())
        printed = "–" if result["score"] is None else f"{result['score']:.1f}"
        assert re.search(rf" {len(texts)} +{printed} .*{re.escape(result['note'])}", capsys.readouterr().out)
        return result

    assert run("MMBench_TEST_EN", ["A", "two\nlines"], A="cat", B='"dog"')["score"] is None
    assert (tmp_path / "MMBench_TEST_EN.csv").read_text() == (
        'index,question,A,B,C,D,prediction\n0,Q,cat,"""dog""",,,A\n1,Q,cat,"""dog""",,,"two\nlines"\n')
    assert run("InfoVQA_TEST", ["12 %"])["score"] is None
    assert json.loads((tmp_path / "InfoVQA_TEST.json").read_text()) == [{"questionId": 0, "answer": "12 %"}]
    assert run("DocVQA_VAL", ["abxd", "?"], answer="['abcd', 'x']")["score"] == 37.5
    assert run("MMVet", ["long", "short"], answer="A", category="ocr")["score"] is None
    assert json.loads((tmp_path / "MMVet.json").read_text()) == {"v1_0": "long", "v1_1": "short"}
    (tmp_path / "judged.json").write_text('{"v1_0": 0.5, "v1_1": {"score": [1.0, 0.8], "model": ["gpt-4"]}}')
    judged = run("MMVet", ["long", "short"], "--score_only", f"--judged={tmp_path / 'judged.json'}",
                 answer="A", category="ocr")
    assert (judged["score"], judged["open"], judged["Mono-InternVL-2B"]) == (pytest.approx(70), 0, 40.1)
    by_rule = run("MathVista_MINI", ["so it is 14.", "0", "no"], answer="14", question_type="free_form",
                  answer_type="integer", choices="", answer_option="")
    assert by_rule["score"] == pytest.approx(100 / 3) and "by rule" in by_rule["note"]


def test_the_recipe_for_vlmevalkit_answers_as_evaluate_does(tmp_path, monkeypatch):
    class InternVLChat:                            # what it does with a message [K: generate_v2]
        def __init__(self):
            raise AssertionError("this would load the model through transformers")

        def generate_inner(self, message):
            question, picture = (part["value"] for part in message)
            tiles = load_image(picture, 6, 48).to(self.device)
            return self.model.chat(
                self.tokenizer, pixel_values=tiles, num_patches_list=[len(tiles)], verbose=False,
                question="<image>\n" + question, generation_config=self.kwargs)

    for name in ("vlmeval", "vlmeval.vlm", "vlmeval.vlm.internvl_chat"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(InternVLChat=InternVLChat))
    cells = json.loads((HERE / "notebooks" / "05_make_it_yours.ipynb").read_text(encoding="utf-8"))["cells"]
    [adapter] = ["".join(cell["source"]) for cell in cells if "**VLMEvalKit" in "".join(cell["source"])]
    exec(re.search("```python\n(.*?)```", adapter, re.S)[1], scope := {})
    model = scope["MonoInternVLChat"](HERE / "assets/tiny", "cpu", torch.float32, max_new_tokens=100)
    rows = [*world_rows("position", 2), *world_rows("sign", 2)]
    write_tsv(tmp_path / "own.tsv", rows)
    assert evaluate.main([*TINY_MODEL, "--plain", f"--out={tmp_path}",
                          f"--benchmark={tmp_path / 'own.tsv'}"]) == 0
    said = [json.loads(line)["prediction"] for line in (tmp_path / "own.jsonl").read_text().splitlines()]
    assert said == [model.generate_inner([{"value": row["question"]}, {
        "value": io.BytesIO(base64.b64decode(row["image"]))}]) for row in rows]


# ---------------------------------------------------------------- the embedded world

STAGES = ("S0", "S1.1", "S1.2", "S1.3", "S2")


@pytest.fixture(scope="module")
def world_tok(tmp_path_factory):
    return world.make_world_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def split_of(picture: world.Picture) -> str:
    return "test" if zlib.crc32(picture.key.encode()) % 5 == 0 else "train"


@settings(max_examples=40)
@given(st.integers(0, 10 ** 9), st.sampled_from(list(world.KINDS)))
def test_training_and_held_out_pictures_share_no_combination_and_no_scan(seed, kind):
    pictures = [world.make_picture(random.Random(seed), kind, split) for split in ("train", "test", "test")]
    assert [split_of(picture) for picture in pictures] == ["train", "test", "test"]
    assert pictures[1].key == pictures[2].key and pictures[1].image.tobytes() == pictures[2].image.tobytes()
    if kind in ("scene", "count"):                 # a combination has one key, in whatever order it is drawn
        cells = re.findall(r"\d", pictures[0].key)
        assert cells == sorted(cells) != []


@pytest.mark.parametrize("task", world.TASKS)
def test_a_held_out_question_has_one_right_answer_and_a_guess_is_right_by_chance(task):
    values = set()
    for picture, question, truth in world.held_out_questions(task, min(300, int(16 / world.TASKS[task]))):
        assert split_of(picture) == "test"
        assert [a for t, q, a in picture.questions if q == question and t == task] == [truth]
        wrong = ["", ".", truth[:len(truth) // 2], truth.replace("yes", "no") if "yes" in truth else "yes."]
        wrong += [truth[:-1], "It says " + truth] if task not in ("relation", "box") else []
        assert world.is_correct(task, truth, truth)
        assert not any(world.is_correct(task, answer, truth) for answer in wrong)
        words = truth[:-1].split()
        values |= set(words if task == "sign" else words[-1:] if task == "relation" else
                      re.split(r" is |\[\[", truth)[-1:])
    assert len(values) == {"sign": 12}.get(task, round(1 / world.TASKS[task]))


def test_a_relation_is_right_by_its_verdict_and_a_box_from_half_overlap_on():
    assert world.is_correct("relation", "red is left. blue is top. no.", "red is top. blue is left. no.")
    for box, right in (("0, 0, 100, 50", True), ("0, 0, 100, 49", False), ("0, 0, 49, 100", False),
                       ("33, 0, 133, 100", True), ("0, 34, 100, 134", False), ("0, 0, 200, 101", False),
                       ("200, 200, 300, 300", False), ("100, 100, 0, 0", False), ("0, 0, 100", False)):
        assert world.is_correct("box", f"<box>[[{box}]]</box>", "<box>[[0, 0, 100, 100]]</box>") is right, box


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_gives_the_same_samples_anywhere_and_text_without_unknown_pieces(stage, world_tok):
    config = train_evip.tiny_config("evip++", world_tok)
    first, second, other, narrow = (World(stage, world_tok, config, tiles, seed)
                                    for tiles, seed in ((4, 3), (4, 3), (4, 4), (1, 3)))
    second[7]                                      # the order of asking does not matter
    samples = [first[i] for i in range(30)]
    assert all(torch.equal(a["input_ids"], second[i]["input_ids"]) for i, a in enumerate(samples))
    assert any(not torch.equal(a["input_ids"], other[i]["input_ids"]) for i, a in enumerate(samples))
    for i, (ids, tiles) in enumerate((s["input_ids"], s["pixel_values"]) for s in samples):
        assert (ids == config.img_context_token_id).sum() == 9 * (0 if tiles is None else len(tiles))
        assert tiles is None or len(narrow[i]["pixel_values"]) == 1
        assert not any(world_tok.sp.is_byte(i) for i in ids.tolist() if i < len(world_tok.sp))
    counts = {0 if s["pixel_values"] is None else len(s["pixel_values"]) for s in samples}
    assert counts == {"S0": {0}, "S2": {0, 1, 3}}.get(stage, {1, 3})      # a sign: two tiles and a thumbnail


def facts(text: str) -> set:
    """What a text says: pairs of what is what, boxes."""
    pairs = re.findall(r"([\w ]+) is ([\w ]+)", text)
    return {*re.findall("<ref>.*?</box>", text), *(frozenset((a.strip(), b)) for a, b in pairs)}


@pytest.mark.parametrize("stage, shares", [
    ("S0", {"text": 1}), ("S1.1", {"alt": 0.67, "noise": 0.33}),           # like web alt texts
    ("S1.2", {"caption": 1}), ("S1.3", {"caption": 0.54, "box": 0.05, "ocr": 0.41}),             # [v1]
    ("S2", {"caption": 0.4, "text": 0.06, "ocr": 0.13, "other": 0.41})])   # text: a tenth of the questions
def test_a_stage_mixes_kinds_of_samples_of_its_split_and_text_alone_answers_its_questions(
        stage, shares, world_tok, monkeypatch):
    drawn, original = [], world.make_picture
    monkeypatch.setattr(world, "make_picture", lambda *a: (drawn.append(original(*a)), drawn[-1])[1])
    rng, found = random.Random(1), dict.fromkeys(shares, 0)
    for _ in range(1000):
        drawn.clear()
        (first, *asked), image = world.world_conversation(stage, rng, "test")
        assert {split_of(picture) for picture in drawn} == {"test"}
        said = " ".join(turn["value"] for turn in [first, *asked])
        assert said.count("<image>") == (image is not None) == first["value"].startswith("<image>")
        found["text" if image is None else "caption" if "Describe the image." in said else
              ("alt" if asked[0]["value"] == drawn[0].alt else "noise") if stage == "S1.1" else
              "ocr" if re.search("bar|sign|digit", said) else "box" if stage == "S1.3" else "other"] += 0.001
        for before, after in re.findall(r"What comes after (\w+)\? (\w+)", said):
            assert world.NUMBERS.index(after) == world.NUMBERS.index(before) + 1
        for turn in asked[::2] if image is None else []:
            assert facts(turn["value"]) <= facts(first["value"])
    assert found == pytest.approx(shares, abs=0.03)
    World(stage, world_tok, train_evip.tiny_config("evip++", world_tok), split="test")[0]
    assert {split_of(picture) for picture in drawn} == {"test"}


def test_the_picture_of_predictions_has_whole_texts_in_the_color_of_the_verdict_and_draws_boxes(
        tmp_path, monkeypatch):
    figures, save = [], evaluate.Figure.savefig
    monkeypatch.setattr(evaluate.Figure, "savefig", lambda figure, path, dpi: (
        figures.append(figure), save(figure, path, dpi=20)))               # a small one is drawn sooner
    picture = world.make_picture(random.Random(0), "scene")
    said = "red is bottom right. blue is bottom left, and so is the one of $x_$. yes."      # no formula
    truth, box = "red is top.", "<ref>red</ref><box>[[{}]]</box>"
    evaluate.plot_predictions([
        (picture, "Is it?", said, said, True),
        (picture, "Find red.", f"{truth} {box.format('0, 0, 500, 250')}",
         f"{said} {box.format('250, 500, 750, 1000')}", False)], tmp_path / "predictions.png")
    right, wrong, *empty = figures[0].axes
    assert right.get_title().split() == f"Is it? {said}".split()
    assert wrong.get_title().split() == f"Find red. {said} (box) right: {truth} (box)".split()
    assert [ax.title.get_color() for ax in (right, wrong)] == ["darkgreen", "firebrick"]
    assert right.axison and wrong.axison and not any(ax.axison for ax in empty)
    assert not right.lines and [line.get_linestyle() for line in wrong.lines] == ["-", "--"]
    assert [line.get_xydata()[::2].tolist() for line in wrong.lines] == [
        [[12, 24], [36, 48], [12, 24]], [[0, 0], [24, 12], [0, 0]]]


# ---------------------------------------------------------------- a real language model

SMOL_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are Smol.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SMOL_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# In each group, one name is held out: its checksum is a multiple of 20.
ICON_NAMES = {3: ("red fox", "owl", "cat", "goat"), 4: ("green apple", "pear", "hot dog", "spoon"),
              9: ("flag: France", "flag: Chad", "flag: Cuba", "flag: Croatia")}


@pytest.fixture(scope="module")
def smol(tmp_path_factory):
    """A two-layer Llama with a byte-level tokenizer.json, in the layout of SmolLM2's folder."""
    folder = tmp_path_factory.mktemp("smol")
    shutil.copy(GOLDEN / "llama_tiny" / "config.json", folder)
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Digits(individual_digits=True),
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)])
    library.decoder = tokenizers.decoders.ByteLevel()
    library.train_from_iterator(
        [icons.CHOOSE, *icons.ASKED, *icons.GENERAL, "What is this? a kind of the flag of France, an owl"],
        tokenizers.trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(SMOL_SPECIAL), show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    library.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "pad_token": "<|im_end|>",
        "chat_template": SMOL_TEMPLATE}))
    size, weights = library.get_vocab_size(), load_file(GOLDEN / "llama_tiny" / "model.safetensors")
    del weights["lm_head.weight"]                  # tied
    weights["model.embed_tokens.weight"] = torch.randn(size, 32, generator=torch.Generator().manual_seed(0))
    save_file({name: t.bfloat16() for name, t in weights.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {
        "vocab_size": size, "tie_word_embeddings": True, "max_position_embeddings": 512, "rope_theta": 1e5}
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@given(st.data())
def test_the_ids_of_a_tokenizer_json_are_its_librarys_and_any_text_comes_back(smol, data):
    own, added = Tokenizer(smol), {"<img>": 500, "<img>x": 501}
    text = data.draw(st.lists(st.one_of(st.text(), st.sampled_from([*SMOL_SPECIAL, "What is", " 19", "你"]))
                              ).map("".join))
    assume(not re.search("[\ud800-\udfff]", text))
    library = tokenizers.Tokenizer.from_file(str(smol / "tokenizer.json"))
    ids, stream = own.encode(text), TextStream(own, skip_special_tokens=False)
    assert ids == library.encode(text).ids and own.special_tokens.keys() == {*SMOL_SPECIAL}
    assert "".join([*map(stream.push, ids), stream.flush()]) == text       # byte by byte
    assert own.decode(ids) == library.decode(ids) == re.sub("|".join(map(re.escape, SMOL_SPECIAL)), "", text)
    with tempfile.TemporaryDirectory() as folder:  # tokens that only added_tokens.json knows
        shutil.copytree(smol, folder, dirs_exist_ok=True)
        Path(folder, "added_tokens.json").write_text(json.dumps(added))
        more = Tokenizer(folder)
    assert more.encode(f"{text}<img>x<img>") == [*ids, 501, 500] and len(more) == 502


@pytest.mark.parametrize("texts", [["Hi"], ["Hi", "Yes.", "Why?"], [" 7 cats ", "\n12 owls\n"]])
def test_the_chat_template_of_a_tokenizer_json_is_kept_and_turns_can_be_added_to_it(smol, tmp_path, texts):
    checkpoint.add_tokens(smol, tmp_path, ["<img>", "</img>", "<IMG_CONTEXT>"], len(Tokenizer(smol)))
    roles = itertools.cycle(("user", "assistant"))
    messages = [{"role": role, "content": text.strip()} for role, text in zip(roles, texts, strict=False)]
    expected = jinja2.Template(SMOL_TEMPLATE).render(messages=messages, add_generation_prompt=len(texts) % 2)
    for folder in (smol, tmp_path):                # the language model's, and that of our checkpoints
        tok = Tokenizer(folder)
        ids, _ = encode_conversation(tok, ask(*texts))
        # Nothing is learned from, or answered to, the line end after the last turn.
        assert tok.decode(ids, skip_special_tokens=False) == expected.removesuffix("<|im_end|>\n") + (
            "<|im_end|>" if expected.endswith("<|im_end|>\n") else "")
    for other in (tok, TOK):                       # sample.py adds a turn to the ids that it has
        whole, _ = encode_conversation(other, ask("Hi", "Yes.", "Why?"))
        begin, _ = encode_conversation(other, ask("Hi"))
        more, _ = encode_conversation(other, ask("Why?"), continued=True)
        assert begin + other.encode("Yes.<|im_end|>", bos=False) + more == whole


def gguf_parts(smol: Path) -> tuple[dict, dict]:
    """The metadata and tensors that a GGUF file of this folder has. Rotary pairs lie side by side."""
    config = json.loads((smol / "config.json").read_text())
    names = {theirs: ours for ours, theirs in icons.LLAMA_NAMES.items()}
    model = json.loads((smol / "tokenizer.json").read_text())["model"]
    tokens, tensors = sorted(model["vocab"], key=model["vocab"].get), {}
    fields = {"general.architecture": "llama", "llama.attention.head_count": config["num_attention_heads"],
              "llama.attention.head_count_kv": config["num_key_value_heads"],
              "llama.embedding_length": config["hidden_size"], "llama.rope.freq_base": config["rope_theta"],
              "llama.feed_forward_length": config["intermediate_size"],
              "llama.block_count": config["num_hidden_layers"],
              "llama.context_length": config["max_position_embeddings"],
              "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
              "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens,
              "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
              "tokenizer.ggml.token_type": [3 if token in SMOL_SPECIAL else 1 for token in tokens],
              "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2,
              "tokenizer.ggml.padding_token_id": 2, "tokenizer.chat_template": SMOL_TEMPLATE}
    for name, weight in load_file(smol / "model.safetensors").items():
        layer = re.search(r"layers\.(\d+)\.(.*)\.weight", name)
        part = names[layer[2] if layer else name.removesuffix(".weight")]
        if part in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        tensors[(f"blk.{layer[1]}." if layer else "") + part + ".weight"] = weight.float().numpy()
    return fields, tensors


def stand_in_for_gguf(monkeypatch, fields: dict, tensors: dict, dequantize=lambda values, kind: values):
    """The package gguf, with one file."""
    reader = SimpleNamespace(
        fields={name: SimpleNamespace(contents=lambda value=value: value) for name, value in fields.items()},
        tensors=[SimpleNamespace(name=name, data=t, tensor_type=SimpleNamespace(name="Q9_9"))
                 for name, t in tensors.items()])
    monkeypatch.setitem(sys.modules, "gguf", SimpleNamespace(
        GGUFReader=lambda path: reader, quants=SimpleNamespace(dequantize=dequantize)))


@pytest.mark.parametrize("package", ["a stand-in", "gguf"])
def test_a_gguf_file_becomes_the_folder_that_it_was_made_from(smol, tmp_path, monkeypatch, package):
    (fields, tensors), path = gguf_parts(smol), tmp_path / "llm.gguf"
    if package == "gguf":
        writer = pytest.importorskip("gguf").GGUFWriter(str(path), "llama")
        for name, value in fields.items():
            kind = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32,
                    list: writer.add_array}[type(value)]
            kind(name, value) if name != "general.architecture" else None
        for name, t in tensors.items():
            writer.add_tensor(name, t)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    else:
        stand_in_for_gguf(monkeypatch, fields, tensors)
    icons.convert_gguf(path, tmp_path / "llm")
    made, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "llm", smol))
    assert_same(made, given)
    assert made.keys() == given.keys()
    ours, theirs = (MonoInternVLConfig.from_llm(folder) for folder in (tmp_path / "llm", smol))
    assert math.isclose(ours.rms_norm_eps, theirs.rms_norm_eps, rel_tol=1e-6)          # a float32 in the file
    assert replace(ours, rms_norm_eps=theirs.rms_norm_eps) == theirs
    ours, theirs = Tokenizer(tmp_path / "llm"), Tokenizer(smol)
    assert encode_conversation(ours, ask("What are 19 cats?")) == encode_conversation(
        theirs, ask("What are 19 cats?"))
    for tok in (ours, theirs):
        del tok.folder, tok.library
    assert vars(ours) == vars(theirs)


def write_package(folder: Path, name: str, **files: dict) -> None:
    with tarfile.open(folder / f"{name}-1.2.3.tgz", "w:gz") as tar:
        for file, content in files.items():
            content = json.dumps(content).encode()
            header = tarfile.TarInfo("package/" + file.replace("__", "/") + ".json")
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))


def render_stand_in(svg_string: str, **_) -> bytes:
    """The package resvg-py, for pictures of one color."""
    color = re.search('fill="(#[0-9a-f]{6})"', svg_string)
    if color is None:
        raise ValueError("no such picture")
    Image.new("RGBA", (64, 64), color[1]).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.fixture
def icon_folder(smol, tmp_path, monkeypatch):
    """What `python icons.py` prepares, from small packages of one-colored drawings."""
    monkeypatch.setitem(sys.modules, "resvg_py", SimpleNamespace(svg_to_bytes=render_stand_in))
    packages, out = tmp_path / "packages", tmp_path / "icons"
    packages.mkdir()
    emoji, drawings = [], {}
    for group, names in ICON_NAMES.items():
        for i, name in enumerate(names):
            iso = {"France": "FR", "Chad": "TD", "Cuba": "CU", "Croatia": "HR"}.get(name[6:])
            flag_emoji = "".join(chr(0x1F1E6 + ord(c) - ord("A")) for c in iso or "")
            emoji.append({"label": name, "hexcode": f"{group}{i}", "group": group, "subgroup": group,
                          "emoji": flag_emoji or "?", "tags": ["thing", "drawing"]})
            drawings[f"flag-for-{name[6:].lower()}" if iso else name.replace(" ", "-")] = iso
    write_package(packages, "emojibase-data", en__data=emoji, de__data=[e | {"label": "Ding"} for e in emoji],
                  meta__groups={"subgroups": {"3": "animal-bird", "4": "food-fruit", "9": "country-flag"}})
    info = {"author": {"name": "A. Hand"}, "license": {"title": "MIT"}}
    for hand in icons.HANDS:
        slugs = [iso.lower() for iso in drawings.values() if iso] if hand in icons.FLAG_HANDS else drawings
        body = f'<rect fill="#{zlib.crc32(hand.encode()) % 2 ** 24:06x}"/>'
        write_package(packages, f"iconify-json-{hand}", info=info, icons={
            "icons": {slug: {"body": body} for slug in slugs} | {"unknown-thing": {"body": ""}}})
    flags = [f"--llm={smol}", f"--packages={packages}", f"--out={out}", "--chats=1"]
    (out / "chats.json").parent.mkdir()
    assert icons.main(flags) == 0
    (out / "chats.json").write_text(json.dumps({"chats": [["Hello!", "Hi, I am Smol."]]}))
    return out


def test_held_out_things_and_the_test_hand_are_never_trained_on_and_each_picture_has_a_licence(icon_folder):
    index = json.loads((icon_folder / "index.json").read_text())
    splits = {split: icons.Pictures(icon_folder, split) for split in ("train", "test", "unseen")}
    sources = {split: {s for of in p.drawings.values() for s in of} for split, p in splits.items()}
    assert sum(map(len, sources.values())) == len(set.union(*sources.values())) == len(index["pictures"])
    for split, hands in ("train", {*icons.HANDS} - {icons.TEST_HAND}), ("test", {icons.TEST_HAND}):
        assert {index["pictures"][s]["hand"] for s in sources[split]} == hands
    hidden = {"goat", "spoon", "flag of Croatia"}
    assert {splits["unseen"].name(t) for t in splits["unseen"].drawings} == hidden
    for picture in index["pictures"]:
        assert (picture["author"], picture["licence"]) == ("A. Hand", "MIT")
        assert picture["source"].startswith(f"@iconify-json/{picture['hand']}: ")
        assert (icon_folder / picture["file"]).is_file()
    pictures = splits["train"]
    signs = range(len(index["pictures"]), len(index["pictures"]) + len(pictures.words))
    for stage, i in itertools.product(STAGES[1:], range(60)):
        rng = random.Random(i)
        conversation, scene, _ = icons.icon_conversation(pictures, [["a", "b"]], stage, rng, 48, 2)
        said = " ".join(turn["value"] for turn in conversation)
        assert not re.search("|".join(rf"\b{name}\b" for name in hidden), said)
        for source, *_ in scene.placed if scene else ():
            assert source in sources["train"] or source in signs
    names = (icon_folder / "questions" / "choices.tsv").read_text().splitlines()
    assert len(names) == 1 + len(sources["test"])
    row = dict(zip(names[0].split("\t"), names[1].split("\t"), strict=True))
    assert row[row["answer"]] == splits["test"].name(next(iter(splits["test"].drawings)))
    assert Image.open(io.BytesIO(base64.b64decode(row["image"]))).size == (48, 48)


@given(seed=st.integers(0, 10 ** 6))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_thing_is_drawn_within_its_box_and_nowhere_else(icon_folder, seed):
    pictures = icons.Pictures(icon_folder)
    questions, scene = icons.scene_conversation(pictures, random.Random(seed), 48, 2)
    image, ground = np.asarray(pictures.draw(scene)).astype(int), np.array(scene.ground) * scene.brightness
    for i, (_, left, top, side, _) in enumerate(scene.placed):
        x1, y1, x2, y2 = (round(v * size / 1000) for v, size in zip(
            scene.box(i), (scene.width, scene.height) * 2, strict=True))
        assert (x1, y1, x2, y2) == (left, top, left + side, top + side)
        assert 0 <= x1 < x2 <= scene.width and 0 <= y1 < y2 <= scene.height
        color = np.array(pictures.image(scene.placed[i][0]).getpixel((32, 32))[:3]) * scene.brightness
        assert abs(image[top + side // 2, left + side // 2] - color.clip(0, 255)).max() <= 2
        image[y1:y2, x1:x2] = ground.clip(0, 255)
    assert abs(image - ground.clip(0, 255)).max() <= 2
    assert ("How many things are there?", icons.NUMBERS[len(scene.placed)]) in questions


def test_a_language_model_learns_real_pictures_through_all_stages_and_its_text_is_bitwise_the_same_after_s1(
        icon_folder, tmp_path, monkeypatch, capsys):
    assert train_evip.main(["--preset=icons", "--dry_run"]) == 1
    assert "`python icons.py` has prepared: --data icons" in capsys.readouterr().err
    llm, out = icon_folder / "llm", tmp_path / "out"
    flags = ["--preset=icons", f"--data={icon_folder}", f"--init_from={llm}", f"--out={out}", "--steps=2",
             "--batch_size=4", "--grad_accum=1", "--device=cpu", "--dtype=float32", "--peak_tflops=1",
             "--eval_questions=3"]
    assert train_evip.main(flags) == 0
    report = json.loads((out / "results.json").read_text())
    losses = report["text loss"]
    assert losses["S1.1"] == losses["S1.2"] != losses["S1.3"] and losses["S1.3"] != losses["S2"]
    assert report["tasks"]["names"]["n"] == 3 and (out / "predictions.png").stat().st_size > 0
    assert {"France", "Chad"} <= {row["country"] for row in report["capitals"]}
    ids = torch.tensor([Tokenizer(llm).encode("What is a cat?")])
    before = MonoInternVL.from_llm(llm)(ids)[0]
    for stage in ("S1.1", "S1.2"):
        assert report[stage]["logits bitwise equal"] and report[stage]["weights bitwise equal"]
        model = MonoInternVL.from_pretrained(out / stage)
        assert torch.equal(model(ids)[0][..., :before.shape[-1]], before)
    model, tok = MonoInternVL.from_pretrained(out / "S2"), Tokenizer(out / "S2")
    assert model.config.img_context_token_id == tok.token_id("<IMG_CONTEXT>")
    assert (tok.first_ids, tok.after_turn, tok.system_message) == ([], "\n", "You are Smol.")
    for event in events_of(out):
        if event.get("stage") in ("S1.1", "S1.2"):
            assert [*event["tasks"]] == ["alt text" if event["stage"] == "S1.1" else "caption"]
    dataset = icons.Icons(icon_folder, "S2", tok, model.config, 2)
    assert_same(dataset[5], dataset[5])            # the same whenever it is asked for
    for stage in STAGES[1:]:
        ids = icons.Icons(icon_folder, stage, tok, model.config, 2)[0]["input_ids"]
        assert ("You are Smol." in tok.decode(ids)) == (stage == "S2")
    asked = []
    monkeypatch.setattr(icons_exam, "greedy_answers", lambda model, tok, samples, n: [
        asked.append(sample) or tok.encode("flag of Chad") for sample in samples])
    rows = icons_exam.ask_capitals(model, tok, icon_folder)
    assert rows[0]["flag named"] == "flag of Chad"
    with_picture, with_blank = asked[-2 * len(rows)], asked[-len(rows)]
    assert torch.equal(with_picture["input_ids"], with_blank["input_ids"])
    assert re.search(r"What is this\?.*assistant\s+flag of Chad.*user\s+What is the cap",
                     tok.decode(with_blank["input_ids"]), re.S)
    assert len(with_picture["pixel_values"].unique()) > 1 == len(with_blank["pixel_values"].unique())
    (icon_folder / "chats.json").write_text('{"chats": []}')
    with pytest.raises(InputError, match="more --chats"):
        icons.Icons(icon_folder, "S2", tok, model.config)
    tasks = {dataset[i]["task"] for i in range(60)}
    assert tasks == {"questions", "text", "reading", "scene"}


@pytest.mark.slow
def test_real_pictures_compare_each_variant_at_its_best_of_three_learning_rates_and_the_comparison_continues(
        icon_folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = [f"--data={icon_folder}", "--things=6", "--steps=1", "--seeds=1", f"--out={out}"]
    assert ablation.main(command) == 0
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert len({(row["variant"], row["lr"]) for row in rows}) == len(rows) == 3 * len(ablation.VARIANTS)
    for row in rows:
        delta = not row["variant"].startswith("full")
        assert row["text bitwise equal"] == (row["text before"] == row["text after"]) == delta
        assert len(row["said"]["unseen hand"]) == 6                        # two of each group
    (out / "results.json").write_text(json.dumps(
        json.loads((out / "results.json").read_text()) | {"rows": rows[:-1]}))
    capsys.readouterr()
    assert ablation.main([*command, "--seeds=2"]) == 0
    printed, again = capsys.readouterr().out, json.loads((out / "results.json").read_text())["rows"]
    assert printed.count("seed 0: ") == 1, "only what was missing is trained"
    again, second = again[:len(rows)], again[len(rows):]
    for name, row in zip(ablation.VARIANTS, second, strict=True):          # of each, the best learning rate
        best = min((row for row in again if row["variant"] == name), key=lambda row: row["caption loss"][-1])
        assert (row["variant"], row["lr"], row["seed"]) == (name, best["lr"], 1)
        assert f"| {name} | {best['lr']:g} |" in printed
    assert ablation.main([*command, "--things=5"]) == 1
    assert "--things 5, expected at least 6" in capsys.readouterr().err
    assert again[:-1] == rows[:-1] and again[-1]["text after"] == rows[-1]["text after"]


def test_datasets_of_a_meta_json_are_used_in_their_stages_and_vary_if_they_are_to(tmp_path):
    line = {"image": "a.png", "conversations": ask("<image>", "b")}
    meta = write_meta(tmp_path, [line] * 8)
    entry = json.loads(meta.read_text())["a"]
    meta.write_text(json.dumps({"noisy": entry | {"stages": ["S1.1"]}, "all": entry | {"augment": True},
                                "late": entry | {"stages": ["S1.3", "S2"]}}))
    used = {stage: [d.task for d in load_meta(meta, TOK, SMALL, stage=stage).datasets]
            for stage in (None, *STAGES[1:])}
    assert used == {None: ["noisy", "all", "late"], "S1.1": ["noisy", "all"], "S1.2": ["all"],
                    "S1.3": ["all", "late"], "S2": ["all", "late"]}
    once, again, other = ([load_meta(meta, TOK, SMALL, 1, seed=seed)[8 + i]["pixel_values"] for i in range(8)]
                          for seed in (0, 0, 1))
    plain, means = load_tiles(PICTURE, 1, 56), {t.float().mean().item() for t in once}
    assert all(map(torch.equal, once, again)) and len(means) == 8
    assert not any(torch.equal(a, b) for a, b in itertools.product(once, [plain, *other]))
    assert torch.equal(load_meta(meta, TOK, SMALL, 1)[0]["pixel_values"], plain)
    for field, value, message in (("stages", "S2", "stages is 'S2', expected a list"),
                                  ("stages", [], "expected a list"), ("stages", [1], "expected a list"),
                                  ("augment", 1, "augment is 1, expected true")):
        meta.write_text(json.dumps({"a": entry | {field: value}}))
        with pytest.raises(InputError, match=message):
            load_meta(meta, TOK, SMALL)
    meta.write_text(json.dumps({"a": entry | {"stages": ["S2"]}}))
    with pytest.raises(InputError, match="no dataset is for S1.1; add it"):
        load_meta(meta, TOK, SMALL, stage="S1.1")


@pytest.mark.parametrize("preset, gain, chosen", [("icons", 4.0, "bfloat16"), ("icons", 1.9, "float32"),
                                                  ("tiny", 4.0, "float32")])
def test_a_cpu_trains_in_bfloat16_if_its_products_are_twice_as_fast_and_the_model_is_not_tiny(
        monkeypatch, capsys, preset, gain, chosen):
    monkeypatch.setattr(budget, "measured_peak", lambda device, dtype: gain if dtype == "bfloat16" else 1.0)
    flags = train_evip.Flags(preset=preset, device="cpu")
    train_evip.choose_device(flags)
    assert flags.dtype == chosen
    assert (f"--dtype {chosen}" in capsys.readouterr().out) == (preset != "tiny")


def damage(path: Path, content: bytes | None) -> None:
    path.unlink() if content is None else path.write_bytes(content)


BAD_ICONS = {
    "a missing package": (lambda f, s: damage(next(f.glob("*noto-1*")), None), "npm pack @iconify-json/noto"),
    "a damaged package": (lambda f, s: damage(next(f.glob("*cif*")), b"\x1f\x8b"), "cif-1.2.3.tgz is dam"),
    "no emojibase": (lambda f, s: damage(next(f.glob("emoji*")), None), "npm pack emojibase-data"),
    "no resvg": (lambda f, s: s.setitem(sys.modules, "resvg_py", None), "pip install resvg-py"),
}


@pytest.mark.parametrize("name", BAD_ICONS)
def test_what_is_missing_or_damaged_in_the_packages_is_said_in_one_line(icon_folder, smol, monkeypatch,
                                                                        capsys, name):
    change, message = BAD_ICONS[name]
    packages = icon_folder.parent / "packages"
    change(packages, monkeypatch)
    assert icons.main([f"--llm={smol}", f"--packages={packages}", f"--out={icon_folder}"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1


def test_a_drawing_that_does_not_render_is_named_and_left_out(icon_folder, smol, capsys):
    packages = icon_folder.parent / "packages"
    write_package(packages, "iconify-json-noto", info={"author": {"name": "B"}, "license": {"title": "MIT"}},
                  icons={"icons": {"owl": {"body": "<path/>"}, "cat": {"body": '<rect fill="#00ff00"/>'}}})
    icons.prepare_pictures(packages, icon_folder)
    said = capsys.readouterr()
    assert "noto: owl does not render" in said.err and "1 did not render" in said.out
    files = [p["file"] for p in json.loads((icon_folder / "index.json").read_text())["pictures"]]
    assert "pictures/noto/owl.png" not in files and "pictures/noto/cat.png" in files


def test_language_models_that_cannot_be_converted_are_refused_in_one_line(smol, tmp_path, monkeypatch):
    fields, tensors = gguf_parts(smol)

    def cannot(values, kind):
        raise NotImplementedError

    for change, more, dequantize, message in (
            ({"general.architecture": "mamba"}, {}, None, "('mamba', 'gpt2', 'smollm'), supported is"),
            ({"tokenizer.ggml.pre": "llama-bpe"}, {}, None, "'llama-bpe'"),
            ({}, {"blk.0.ssm.weight": np.zeros(1)}, None, "blk.0.ssm has no place"),
            ({}, {}, cannot, "is quantised as Q9_9")):
        given = {"dequantize": dequantize} if dequantize else {}
        stand_in_for_gguf(monkeypatch, fields | change, tensors | more, **given)
        with pytest.raises(InputError, match=re.escape(message)):
            icons.convert_gguf("a.gguf", tmp_path / "llm")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match="pip install gguf"):
        icons.convert_gguf("a.gguf", tmp_path / "llm")
    shutil.copytree(smol, tmp_path / "other")
    words = json.dumps({"model": {"type": "WordLevel", "vocab": {"▁a": 0}, "unk_token": "▁a"}})
    for content, message in (("{", "not readable JSON"), ("{}", "is not a tokenizer"),
                             (words, "is not byte-level BPE")):
        (tmp_path / "other" / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match=message):
            Tokenizer(tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer.model and no tokenizer.json"):
        Tokenizer(tmp_path / "other")


# ---------------------------------------------------------------- the notebooks

NOTEBOOKS = sorted(path.name for path in (HERE / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
def test_notebooks_run_from_top_to_bottom(tmp_path):
    """By their own command, two at a time, in a copy of the project."""
    for file in [*HERE.glob("*.py"), *HERE.glob("*.cu"), *HERE.glob("*.h")]:
        (tmp_path / file.name).symlink_to(file)
    for folder in ("assets", "notebooks"):
        shutil.copytree(HERE / folder, tmp_path / folder)

    def run(name):
        return subprocess.run([sys.executable, "notebooks/execute.py", name], cwd=tmp_path, timeout=600,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    with ThreadPoolExecutor(2) as pool:
        assert [done.stderr[-3000:] for done in pool.map(run, NOTEBOOKS) if done.returncode] == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_kept_outputs_belong_to_the_code_above_them(name):
    nbformat = pytest.importorskip("nbformat")     # a machine with a GPU may lack what runs notebooks
    notebook = nbformat.read(HERE / "notebooks" / name, as_version=4)
    source_hash = runpy.run_path(str(HERE / "notebooks" / "execute.py"))["source_hash"]
    assert notebook.metadata["outputs_of_source"] == source_hash(notebook), \
        f"the code of {name} changed: python notebooks/execute.py {name}"
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        assert output.output_type != "error" and output.get("name") != "stderr", output
        assert str(Path.home()) not in str(output) and "/tmp/" not in str(output)
    prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert all((HERE / "notebooks" / link).exists() for link in re.findall(r"\]\((?!http)([^)#]+)\)", prose))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_has_short_cells_with_prose_between_them_versions_first_and_exercises_last(name):
    cells = pytest.importorskip("nbformat").read(HERE / "notebooks" / name, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert [cell.source for cell in code if len(cell.source.splitlines()) > 15] == []
    assert [b.source for a, b in itertools.pairwise(cells) if a.cell_type == b.cell_type == "code"] == []
    assert "torch.__version__" in code[0].source and cells[0].source.startswith(f"# {int(name[:2])}. ")
    folded = [cell.metadata.get("jupyter", {}).get("source_hidden", False) for cell in code]
    assert any(cell.source.startswith("## Exercises") for cell in cells)
    assert True in folded and folded == sorted(folded)       # solutions come last, hidden at first


# ---------------------------------------------------------------- the README

README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = (HERE / "RESULTS.md").read_text(encoding="utf-8")
SHORT = {"train_evip.py": "--steps=1 --batch_size=2 --grad_accum=1 --eval_questions=1",
         "sample.py": "--max_new_tokens=2", "evaluate.py": "--questions=1",
         "bench.py kernels": "--rounds=2 --image_tiles 0 --hidden_size=64 --intermediate_size=64",
         "bench.py report": "", "bench.py train": "--rounds 2 --tiny_rounds 2 --icons_layers 1",
         "bench.py data": "--width 300 --samples 2 --rounds 2", "bench.py all": "--quick",
         "bench.py infer": "--layers 1 --tiles 1 --batches 1 --rounds 2 --steps 1",
         "ablation.py": "--seeds=1 --steps=1 --eval_questions=1"}


def readme_commands() -> list[str]:
    """The lines of its bash blocks and what the running text quotes, without comments and pip install."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    lines += re.findall(r"`((?:python|torchrun) [^`]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
    lines = [" ".join(re.sub(r"\s+#.*", "", line).split()) for line in lines]
    lines = [line.removeprefix("pip install -r requirements.txt && ") for line in lines]
    return list(dict.fromkeys(filter(None, lines)))


@pytest.fixture
def newcomer(short_run, tmp_path, monkeypatch):
    """A folder where the README's commands find what they name: a run, data and a checkpoint of one's own."""
    tok = Tokenizer(short_run / "S0")
    shutil.copytree(short_run, tmp_path / "out" / "evip++")
    train_evip.save(learner(tok, "evip"), tok, tmp_path / "Mono-InternVL-2B")  # in place of the official one
    shutil.copytree(short_run / "S1.3", tmp_path / "FOLDER")
    language_model(tmp_path / "internlm2-chat-1_8b", tok, "internlm2")
    shutil.copytree(HERE / "assets", tmp_path / "assets")
    shutil.copy(PICTURE, tmp_path / "photo.jpg")
    write_conversations(tmp_path, 0, 4)
    (tmp_path / "questions.jsonl").write_text('{"image": "photo.jpg", "question": "What is this?"}')
    for task, name in ("color", "TextVQA_VAL"), ("relation", "MME"), ("count", "ChartQA_TEST"):
        write_tsv(tmp_path / f"{name}.tsv", world_rows(task, 2))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt="": (_ for _ in ()).throw(EOFError))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_runs(command, newcomer, monkeypatch, capfd):
    words = shlex.split(command)
    if words[0] == "torchrun":                               # as one process
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")):]]
    if words[1] == "-m":                                     # these tests themselves
        assert words[2] == "pytest" and words[-1] == Path(__file__).name
    elif words[1] in ("budget.py", "moe_kernel.py"):
        subprocess.run([sys.executable, HERE / words[1], *words[2:]], check=True)
    elif words[1] != "notebooks/execute.py":                 # which the test of the notebooks runs
        options = SHORT[" ".join(words[1:3 if words[1] == "bench.py" else 2])].split()
        monkeypatch.setattr(ablation, "VARIANTS", dict(list(ablation.VARIANTS.items())[:1]))
        monkeypatch.setattr(bench, "QUICK", {name: SHORT[f"bench.py {name}"] for name in bench.QUICK})
        monkeypatch.setattr(MonoInternVLConfig, "mono_internvl_1_5_2b", narrow)
        script = sys.modules[words[1].removesuffix(".py")]
        assert script.main([*words[2:], *options]) == 0, capfd.readouterr().err


def test_the_model_that_comes_along_answers_as_the_readme_says(monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    examples = re.findall(r"python sample.py (--model assets/tiny --image .*?)  +# (.*)", README)
    assert len(examples) >= 2
    for command, answer in examples:
        assert sample.main(shlex.split(command)) == 0
        assert capsys.readouterr().out.strip() == answer


@pytest.mark.parametrize("text", [README, RESULTS], ids=["README.md", "RESULTS.md"])
def test_the_files_and_sections_that_are_named_exist(text):
    yours = {"meta.json", "lines.jsonl", "log.jsonl", "questions.jsonl", "loss.png", "predictions.png",
             "tokenizer.model", "tokenizer.json", "0001.jpg", "0001.json", "0001.txt", "out/evip++/",
             "tensorboard/", "report.json", "report.png", "out/benchmarks/", "vlmeval/vlm/mono_internvl.py",
             "vlmeval/vlm/__init__.py", "vlmeval/config.py"}
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    named = {*re.findall(r"\]\((?!http|#)([^)#]+)\)", prose),
             *re.findall(r"`([\w./+-]+(?:\.(?:py|cu|h|jsonl?|png|npz|ipynb|md|txt|model|jpg)|/))`", prose)}
    assert [name for name in named - yours if not (HERE / name).exists()] == []
    titles = re.findall(r"^#+ (.*)", text, re.M)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_results_md_is_what_bench_report_makes_of_the_measurements(tmp_path, monkeypatch):
    (tmp_path / "assets").symlink_to(HERE / "assets")
    monkeypatch.chdir(tmp_path)
    assert bench.main(["report"]) == 0
    assert (tmp_path / "RESULTS.md").read_text(encoding="utf-8") == RESULTS


def test_the_readme_is_short_and_repeats_the_recipes_and_the_results_truly():
    assert len(README.splitlines()) <= 220 and len(README.split()) <= 2000
    assert len(re.findall("^pip install", README, re.M)) == 2              # what .ci/run takes
    for stage, v1 in zip(train_evip.RECIPES["evip++"], train_evip.RECIPES["evip"], strict=True):
        row = [stage.name, stage.goal, stage.trainable, str(stage.max_tiles),
               f"{stage.steps} · {stage.lr:g} {stage.schedule}", stage.paper, v1.paper]
        assert f"| {' | '.join(row)} |" in README
    shares = [re.findall(r"(\d+(?:\.\d+)?) ?%", re.sub(r"```.*?```", "", text, flags=re.S))
              for text in (README, RESULTS)]
    assert len(shares[0]) > 4 and {*shares[0]} <= {*shares[1]}


def test_the_code_and_the_tests_that_the_papers_claims_name_are_there():
    sources = {file.name: file.read_text(encoding="utf-8") for file in HERE.glob("*.py")}
    claims = RESULTS[RESULTS.index("## Paper to code"):RESULTS.index("## Held-out")]
    for names, file in re.findall(r"((?:`\w+`,? ?)+)in `(\w+\.py)`", claims):
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^ *(def |class |){name}\b", sources[file], re.M), name
    for name in re.findall(r"`(test_\w+)", claims):
        assert f"def {name}" in sources["test_all.py"], name


# ---------------------------------------------------------------- training

slow = pytest.mark.slow
FEW = ["--batch_size=2", "--grad_accum=1", "--device=cpu"]


def tiny_flags(**changes) -> train_evip.Flags:
    values = {"device": "cpu", "batch_size": 4, "grad_accum": 1, "dtype": "float32", **changes}
    return parse_flags(train_evip.Flags, [f"--{name}" if value is True else f"--{name}={value}"
                                          for name, value in values.items()])


def stage_of(name: str, recipe="evip++", **changes) -> train_evip.Stage:
    return replace(train_evip.RECIPES[recipe][STAGES.index(name)], **changes)


def learner(world_tok, recipe="evip++") -> MonoInternVL:
    """A random model, smaller than that of the embedded run."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)
    return MonoInternVL(replace(train_evip.tiny_config(recipe, world_tok), **sizes, vision_hidden_size=8))


def learning_in(stage: str, names) -> set[str]:
    """What the papers let a stage train. The class token is there for the file format only."""
    names = set(names) - {"vision_model.embeddings.class_embedding"}
    visual = {n for n in names if n.startswith(("mlp1", "vision_model")) or "_ve." in n}
    attention = {n for n in names if n.endswith(("wqkv.weight", "wo.weight"))}
    return {"S0": names - visual, "S1.3": visual | attention, "S2": names}.get(stage, visual)


def events_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags, folder", [
    ("", "out/evip++"), ("--recipe evip", "out/evip"), ("--data a --stages S2", "out/evip++"),
    ("--data a --init_from b --stages S2", "out/evip++-own"),
    ("--data a --init_from b --stages S2 --out c", "c"),
    ("--data a --init_from b --preset icons", "out/evip++-icons")])
def test_a_model_that_learns_from_own_data_does_not_replace_the_default_run(tmp_path, monkeypatch, flags,
                                                                            folder):
    seen = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_evip, "run_stages", lambda stages, out, flags: seen.append(str(out)))
    assert train_evip.main([*flags.split(), "--device=cpu", "--dtype=float32"]) == 0 and seen == [folder]


def test_a_big_model_is_never_trained_at_the_tiny_models_learning_rate(monkeypatch):
    stage, flags = stage_of("S2"), train_evip.Flags
    assert train_evip.peak_lr(tiny(), stage, flags()) == stage.lr > 4e-5
    monkeypatch.setattr(train_evip, "is_big", lambda model: True)
    for chosen, expected in (flags(), 4e-5), (flags(lr=0.1), 0.1), (flags(preset="2b"), stage.lr):
        assert train_evip.peak_lr(tiny(), stage, chosen) == expected


@pytest.mark.parametrize("recipe", ["evip", "evip++"])
def test_a_stage_trains_what_the_paper_says_and_learning_to_see_leaves_text_bitwise_as_it_was(
        recipe, world_tok, tmp_path):
    model, before = learner(world_tok, recipe), learner(world_tok, recipe)
    for name in STAGES:
        before.load_state_dict(model.state_dict())
        train_evip.train_stage(model, World(name, world_tok, model.config), stage_of(name, recipe, steps=2),
                               tiny_flags(), train_evip.Progress(tmp_path / "log.jsonl"), world_tok)
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
        assert moved == learning_in(name, dict(model.named_parameters())), name
        verdict = evaluate.delta_verdict(before, model, moved, world_tok, name)
        assert verdict["frozen tensors"] == len(list(model.parameters())) - len(moved)
        same = verdict["text loss before"] == verdict["text loss after"]
        assert same == verdict["logits bitwise equal"] == (name in ("S1.1", "S1.2"))
        assert verdict["weights bitwise equal"]
    strict = evaluate.delta_verdict(before, model, moved - {"mlp1.0.weight"}, world_tok, name)
    assert not strict["weights bitwise equal"]


@pytest.mark.parametrize("name, changes", [
    ("S2", {}), ("S2", {"pack": True, "max_tokens": 180}), ("S1.2", {"seed": 3}), ("S0", {"grad_clip": 1e9}),
    pytest.param("S2", {"compile": "on"}, marks=slow)])
def test_training_equals_a_loop_written_out_sample_by_sample(name, changes, world_tok, tmp_path, monkeypatch):
    """The mean loss over the tokens of a step, clipping, warmup and cosine, AdamW; and what is logged."""
    compile_ = torch.nn.Module.compile             # dynamo alone: the C++ compiler takes minutes
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: compile_(self, backend="eager", **o))
    flags = tiny_flags(**{"batch_size": 2, "grad_accum": 3, "pool": 2, "steps": 5, "warmup": 0.4, "lr": 0.02,
                          "weight_decay": 2.0, "grad_clip": 1e-6, "peak_tflops": 1e-6, **changes})
    model, oracle, stage = learner(world_tok), learner(world_tok), stage_of(name)
    c, lessons = model.config, World(name, world_tok, model.config, stage.max_tiles, flags.seed)
    log = train_evip.Progress(tmp_path / "log.jsonl")
    assert train_evip.train_stage(model, lessons, stage, flags, log, world_tok)
    assert (model.language_model.model.layers[0]._compiled_call_impl is not None) == (flags.compile == "on")

    shapes = {n: p.shape for n, p in oracle.named_parameters()}
    adam = {n: [torch.zeros(shapes[n]), torch.zeros(shapes[n])] for n in learning_in(name, shapes)}
    rates, total = budget.flop_rates(shapes, set(adam), c), dict.fromkeys(("tokens", "visual", "flop"), 0)
    batches = iter(Batches(lessons, 2, world_tok.pad_id, seed=flags.seed, pool=2,
                           pack_tokens=flags.max_tokens if flags.pack else None))
    for step, event in enumerate(events_of(tmp_path)):
        by_task = {}                               # sums of losses, and how many tokens
        for one in (lessons[int(i.split("/")[1])] for _ in range(3) for i in next(batches)["ids"]):
            labels, tokens = (one["labels"][1:] != IGNORED).sum().item(), len(one["input_ids"])
            visual = (one["input_ids"] == c.img_context_token_id).sum().item()
            losses, n = by_task.get(one["task"], (0, 0))
            tiles = one["pixel_values"]
            inputs = collate([one]) | {"pixel_values": None if tiles is None else normalise(tiles)}
            by_task[one["task"]] = losses + oracle(**inputs)[1] * labels, n + labels
            amounts = {"text": tokens - visual, "visual": visual, "labels": labels, "pairs": tokens ** 2 / 2}
            total["tokens"] += tokens
            total["visual"] += visual
            total["flop"] += sum(rates[kind] * amounts[kind] for kind in amounts)
        loss = sum(losses for losses, _ in by_task.values()) / sum(n for _, n in by_task.values())
        grads = gradients(oracle, loss)
        norm = math.sqrt(sum(grads[n].square().sum() for n in adam))
        lr = 0.02 * ([0.5, 1] + ([1] * 3 if stage.schedule == "constant" else [1, 0.75, 0.25]))[step]
        means = {task: (losses / n).item() for task, (losses, n) in by_task.items()}
        assert event["tasks"] == pytest.approx(means, rel=1e-4)
        assert [event[key] for key in ("loss", "grad_norm", "lr")] == pytest.approx(
            [loss.item(), norm, lr], rel=1e-4)
        assert (event["stage"], event["step"]) == (name, step)
        if flags.pack:
            assert event["utilisation"] == pytest.approx(total["tokens"] / ((step + 1) * 6 * 180), abs=1e-3)
        for n, (mean, square) in adam.items():
            p, g = oracle.get_parameter(n).data, grads[n] * min(1, flags.grad_clip / (norm + 1e-6))
            mean.mul_(0.9).add_(0.1 * g)
            square.mul_(0.999).add_(0.001 * g * g)
            p *= 1 - lr * 2.0 * (p.ndim > 1)       # no weight decay of norms and biases
            p -= lr * (mean / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    for n, p in model.named_parameters():          # unclipped, Adam follows gradients that are mere rounding
        assert_close(p, oracle.get_parameter(n), rtol=1e-3, atol=1e-4 if flags.grad_clip < 1 else 2e-2)
    rates = [event["visual_tokens_per_s"], event["mfu"] * 1e6]             # at a peak of 1e6 flop/s
    assert [rate / event["tokens_per_s"] for rate in rates] == pytest.approx(
        [total[kind] / total["tokens"] for kind in ("visual", "flop")], rel=0.01)


@pytest.mark.parametrize("stage, dtype", [("S1.2", "float32"), ("S1.2", "bfloat16"), ("S2", "float32")])
def test_predicted_memory_and_operations_are_what_pytorch_counts(stage, dtype):
    c = MonoInternVLConfig(vocab_size=500, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                           num_attention_heads=4, num_key_value_heads=2, vision_hidden_size=32, patch_size=8,
                           image_size=64, img_context_token_id=499, attn_experts="qkvo")
    model, stage = MonoInternVL(c), stage_of(stage, max_tiles=3)
    train_evip.select_trainable(model, stage)
    ids = torch.randint(0, 499, (2, 192))
    ids[:, 3:3 + 4 * 16] = 499                     # 3 tiles and the thumbnail
    batch = {"input_ids": ids, "pixel_values": torch.randn(8, 3, 64, 64),
             "attention_mask": torch.ones_like(ids), "labels": ids.where(ids != 499, IGNORED)}
    plans, kept = {}, {"on": {}, "off": {}}        # without and with recompute
    for recompute, store in kept.items():
        def pack(t, store=store):
            store[t.untyped_storage().data_ptr()] = t          # alive, so that no other tensor gets its place
            return t

        flags = tiny_flags(batch_size=2, max_tokens=192, dtype=dtype, recompute=recompute)
        plans[recompute] = plan = train_evip.memory_plan(model, stage, flags, 1)
        train_evip.distribute(model, flags)
        states = train_evip.make_optimizer(model, flags).state.values()
        with FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), \
                    torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                loss = model(**batch)[1]
            loss.backward()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    less, more = (sum(t.untyped_storage().nbytes() for place, t in store.items() if place not in weights)
                  for store in kept.values())
    assert 0.85 < (plan["activations"] + plan["copies"]) / more < 1.15
    if dtype == "float32":                         # with recompute, one of the 4 layers at a time
        assert 0.85 < plans["on"]["activations"] / (less + (more - less) / 4) < 1.15
    assert {part: plan[part] for part in ("weights", "gradients", "optimizer")} == {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in model.parameters() if p.grad is not None),
        "optimizer": sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))}
    shapes = {n: p.shape for n, p in model.named_parameters()}
    rates = budget.flop_rates(shapes, learning_in(stage.name, shapes), c)
    numbers = data.count_tokens(batch, c.tokens_per_tile)
    flop = sum(rates[kind] * numbers[kind] for kind in ("text", "visual", "labels"))
    counted = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    assert flop == pytest.approx(counted, rel=0.02)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The main command, shortened to a few steps a stage."""
    out = tmp_path_factory.mktemp("project") / "out" / "run"
    assert train_evip.main(["--steps=3", f"--out={out}", "--eval_questions=2", *FEW]) == 0
    return out


def test_one_command_goes_through_every_stage_and_reports_what_it_did(short_run):
    first, *events = events_of(short_run)
    assert first["event"] == "run"
    assert [(e["stage"], e["step"]) for e in events] == [(s, i) for s in STAGES for i in range(3)]
    results = json.loads((short_run / "results.json").read_text())
    for stage in ("S1.1", "S1.2"):
        assert results[stage]["weights bitwise equal"] and results[stage]["logits bitwise equal"]
    assert set(results["tasks"]) == {*world.TASKS, "mean"}
    for name in ("loss.png", "predictions.png"):
        assert min(Image.open(short_run / name).size) > 300
    assert not list(short_run.glob("*.partial"))


def test_a_stage_begins_with_the_one_before_and_the_first_to_see_with_copies_of_the_text_experts(
        short_run, tmp_path):
    for before, stage in itertools.pairwise(STAGES[:3]):
        out = tmp_path / stage
        shutil.copytree(short_run / before, out / before)
        assert train_evip.main([f"--out={out}", "--stages", stage, "--lr=0", "--steps=1", *FEW]) == 0
        old, new = (load_file(folder / "model.safetensors") for folder in (short_run / before, out / stage))
        assert set(old) == set(new)
        for name, weight in new.items():           # with a learning rate of 0 a stage ends as it begins
            assert torch.equal(weight, old[name.replace("_ve.", ".") if stage == "S1.1" else name]), name


def write_conversations(folder: Path, bad: int, good: int) -> Path:
    """meta.json with `good` readable samples and `bad` ones whose image is damaged."""
    world.make_picture(random.Random(0), "sign").image.save(folder / "good.png")         # 3 tiles
    (folder / "bad.png").write_bytes(b"no picture")
    lines = [{"id": i, "image": "bad.png" if i < bad else "good.png",
              "conversations": data.turns("<image>\nWhat is it?", "a sign.")} for i in range(bad + good)]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "meta.json").write_text(json.dumps({"mine": {"root": ".", "annotation": "lines.jsonl"}}))
    return folder / "meta.json"


def test_own_data_is_read_three_times_and_bad_samples_are_left_out_and_named(lessons, tmp_path, capsys):
    meta, out = write_conversations(tmp_path, 1, 4), tmp_path / "out"
    with open(tmp_path / "lines.jsonl", "a") as file:
        file.write("\n" + json.dumps({"id": "long", "conversations": data.turns("Why?", "red " * 2000)}))
    entry = {"root": ".", "annotation": "lines.jsonl", "max_dynamic_patch": 1}
    meta.write_text(json.dumps({"signs": entry, "more": {**entry, "repeat_time": 2}}))
    flags = [f"--data={meta}", f"--init_from={lessons}/model", f"--out={out}", "--stages=S2",
             "--max_tokens=5000", *FEW]
    assert train_evip.main([*flags, "--max_bad=0.5"]) == 0
    said = capsys.readouterr()
    assert "S2 learns from 18 samples: 6 of signs, 12 of more; 27 step(s) of 2 are 3 epochs" in said.out
    assert len(steps_logged(out)) == 27 and re.search("S2: 6 of [0-9]+ samples were bad and left", said.out)
    damaged, long = sorted({e["error"] for e in events_of(out) if e.get("event") == "bad sample"})
    assert "lines.jsonl:1" in damaged and "bad.png" in damaged and damaged in said.err
    assert re.search(r"lines.jsonl:6: \d+ tokens, the limit is 1024", long)            # the model's context
    # A checkpoint is asked with the tiles that the stage was trained with, not with the data set's one.
    assert MonoInternVL.from_pretrained(out / "S2").config.max_dynamic_patch == 24
    for stopped in ["--steps=9"], ["--dry_run"]:
        assert train_evip.main([*flags, *stopped, "--max_bad=0"]) == 1
        assert re.search("[0-9]+ of the [0-9]+ samples .*--max_bad 0 ", capsys.readouterr().err)


def test_what_cannot_be_trained_is_refused_before_the_first_step(lessons, world_tok, tmp_path, capsys):
    def refused(*flags):
        assert train_evip.main([f"--data={tmp_path}/meta.json", f"--out={tmp_path}/out", *FEW, *flags]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert not any('"loss"' in log.read_text() for log in tmp_path.glob("out/log.jsonl"))
        return error

    write_conversations(tmp_path, 0, 1)
    model = f"--init_from={lessons}/model"
    assert "is a 1.5 model" in refused(model, "--recipe=evip", "--stages", "S2")
    train_evip.save(learner(world_tok, "evip"), world_tok, tmp_path / "v1")
    assert "is a v1 model" in refused(f"--init_from={tmp_path}/v1", "--stages", "S2")
    small = MonoInternVL(replace(learner(world_tok).config, vocab_size=len(world_tok) - 1))
    train_evip.save(small, world_tok, tmp_path / "small")
    assert f"has {len(world_tok)} tokens, the model knows {len(world_tok) - 1}" in \
        refused(f"--init_from={tmp_path}/small", "--stages", "S2")
    (tmp_path / "lines.jsonl").write_text(json.dumps({"conversations": data.turns("Why?", "So.")}))
    assert "no sample of" in refused(model, "--stages", "S1.2")


def test_a_second_run_in_one_folder_is_refused_while_the_first_lives(lessons, tmp_path, monkeypatch):
    out, flags = tmp_path / "out", [*lessons_of(lessons, "S2"), "--steps=2", *FEW]

    def second_run(rank, step):
        monkeypatch.undo()
        run = subprocess.run([sys.executable, "train_evip.py", *flags, f"--out={out}"], cwd=HERE,
                             capture_output=True, text=True)
        if run.returncode != 1 or "another run is writing to" not in run.stderr:
            os._exit(99)

    assert train(out, *flags, hook=lambda rank, step: step or second_run(rank, step)) == [0]
    assert [step for _, step, *_ in steps_logged(out)] == [0, 1]
    monkeypatch.setattr(checkpoint, "fcntl", None)     # as on Windows, where both would run
    assert train(out, *flags) == [0]


@pytest.mark.parametrize("arguments, message", [
    ("--stages S3", "no such stage; there are S0, S1.1"),
    ("--stages S1.2", "holds no checkpoint to start S1.2 from"),
    ("--data meta.json", "with --data, name other --stages"),
    ("--preset 2b", "--preset 2b learns from your own data: name it with --data"),
    ("--preset 2b --data meta.json", "name its folder with --init_from"),
    ("--batch_size 3", "1 process(es) with --batch_size 3 do not divide S0's batch of 16"),
    *((f"--{name} {value}", f"--{name} is {value}") for name, value in dict(
        batch_size=0, grad_accum=0, pool=0, steps=0, max_tokens=-1, save_every=0, keep=0, eval_questions=0,
        max_bad=1.5).items()),
    ("--workers -1", "--workers -1"), ("--seed -1", "--seed -1"), (f"--seed {2 ** 63}", f"--seed {2 ** 63}"),
])
def test_a_run_that_cannot_start_says_why_in_one_line(arguments, message, tmp_path, capsys):
    assert train_evip.main([*arguments.split(), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_loss_that_is_no_number_stops_the_training_and_names_its_samples(world_tok, tmp_path):
    model = learner(world_tok)
    samples = [World("S1.2", world_tok, model.config)[i] for i in range(8)]
    samples[5]["pixel_values"] = samples[5]["pixel_values"] * math.nan     # no uint8 any more
    with pytest.raises(InputError, match=r"loss of S1.2 is nan at step \d, .* these samples: S1.2/5$"):
        train_evip.train_stage(model, samples, stage_of("S1.2"), tiny_flags(pool=1),
                               train_evip.Progress(tmp_path / "log.jsonl"), world_tok)
    assert all(p.isfinite().all() for p in model.parameters())             # the step was not taken


def test_the_plan_of_the_2b_model_is_arithmetic_on_its_sizes(monkeypatch, capsys):
    """Written out for 24 layers of 2048 channels, 16 heads, 8 of keys and values, an FFN of 8192."""
    monkeypatch.setattr(budget, "train_evip", train_evip, raising=False)   # the script imports it itself
    assert budget.main(["--preset=2b", "--gpus=4"]) == 0
    lines = [line for line in capsys.readouterr().out.replace(",", "").splitlines() if "weights" in line]
    plan = {line.split()[0]: [*map(float, re.findall(r" (\d+\.\d+)", line))][-7:] for line in lines}
    assert tuple(plan) == STAGES[1:]
    assert ["gathered twice" in line for line in lines] == [False, False, True, False]
    attention = 24 * (2048 * (2048 + 2 * 1024) + 2048 ** 2)
    layers, head = attention + 24 * 3 * 2048 * 8192, 92553 * 2048
    vision = 588 * 1024 + 1024 + 1025 * 1024       # patches with their bias, positions
    projector = 2 * 4096 + 4096 * 2048 + 2048 ** 2 + 2 * 2048
    model = 2 * layers + 2 * head + 49 * 2048 + vision + projector
    matrices = layers + 4 * 588 * 1024 + projector - 2 * 4096 - 2 * 2048   # that a visual token meets
    for stage, samples, tokens, tiles, trained, per_text in (
            ("S1.1", 122000 * 2048, 2048, 5, layers + vision + projector, 4 * (layers + head)),
            ("S1.3", 73000 * 2048, 4096, 13, layers + attention + vision + projector,
             4 * (layers + head) + 2 * attention),
            ("S2", 55000 * 128, 8192, 25, model, 6 * (layers + head))):
        visual = 256 * tiles
        flop = visual * 6 * matrices + (tokens - visual) * per_text + 12 * 24 * 2048 * tokens ** 2 / 2
        away = (2 * layers / 24 + 2 * 2048) * 22 * (stage == "S1.3")      # 22 of its layers are not gathered
        expected = [(4 * trained + 2 * (model - trained)) / 4e9, trained / 1e9, 2 * trained / 1e9,
                    (2 * (model - away) + 4 * trained) / 1e9, plan[stage][4], sum(plan[stage][:5]),
                    samples * flop / (4 * 400e12) / 3600]
        assert plan[stage] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert budget.main(["--gpus=0"]) == 1 and "must be positive" in capsys.readouterr().err


def test_batches_reach_whatever_device_trains():
    """Also one that is no GPU of NVIDIA's, such as a Mac's. "meta" is the one that every machine has."""
    assert train_evip.to_device(torch.ones(3), torch.device("meta")).device.type == "meta"


def test_a_gpu_keeps_results_and_gathered_layers_as_long_as_its_memory_allows(monkeypatch):
    stage = train_evip.PRESETS["2b"]["evip++"][2]
    with torch.device("meta"):
        model = MonoInternVL(MonoInternVLConfig.mono_internvl_1_5_2b())
    gpu, fast_to_small = train_evip.Flags(preset="2b", device="cuda", dtype="bfloat16"), \
        list(itertools.product(["off", "on"], repeat=2))                   # recompute, reshard

    def chosen(processes, memory, **overruled):
        monkeypatch.setattr(budget, "gpu_memory", lambda device: memory)
        flags = train_evip.fit_to_memory(model, stage, replace(gpu, **overruled), processes)
        return flags.recompute, flags.reshard

    for processes, choices in ((1, fast_to_small[::2]), (4, fast_to_small)):     # one has nothing to gather
        needed = {choice: sum(train_evip.memory_plan(model, stage, replace(
            gpu, recompute=choice[0], reshard=choice[1]), processes).values()) for choice in choices}
        for choice, size in needed.items():
            smaller = [other for other, its in needed.items() if its < size]
            assert chosen(processes, 1.25001 * size) == choice
            assert not smaller or chosen(processes, 1.24999 * size) in smaller
        for recompute, reshard in fast_to_small:
            assert chosen(processes, 80e9, recompute=recompute, reshard=reshard) == (recompute, reshard)
    assert chosen(4, 0) == chosen(4, 0, recompute="on") == ("on", "on")
    assert chosen(4, 1e15, reshard="on") == ("off", "on")
    gpu = replace(gpu, device="cpu")               # where big models save memory
    assert chosen(4, 1e15) == ("on", "on")
    model = tiny()
    assert chosen(4, 0) == ("off", "off")


def test_a_dry_run_tells_what_would_happen_and_writes_nothing(lessons, tmp_path, capsys, monkeypatch):
    def dry_run(*flags):
        assert train_evip.main(["--dry_run", *flags]) == 0
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    first, second = (dry_run("--pool=1", f"--seed={seed}") for seed in (0, 1))
    assert "<|im_start|>user" in first and "»" in first and "hours" not in first and first != second
    said = dry_run(*lessons_of(lessons, "S2"), "--pack", "--max_tokens=128")
    assert "<img><IMG_CONTEXT>×27</img>\nWhat is this?" in said and "»a small red ring." in said
    said = dry_run("--preset=2b", "--recipe=evip", "--dtype=bfloat16")     # with no data and no weights
    assert re.search(r"S1.1 .*weights 8.667", said) and "without --init_from and --data" in said


def test_evaluation_is_right_about_held_out_pictures_and_by_chance_about_blank_ones(capsys):
    tables, tiny_model = [], ["--model", str(HERE / "assets/tiny")]
    for seed in (0, 0, 1):
        assert evaluate.main([*tiny_model, "--questions=6", f"--seed={seed}"]) == 0
        rows = re.findall(r"(\w+) +([\d.]+)% +([\d.]+)% +([\d.]+)%\n", capsys.readouterr().out)
        tables.append({task: [float(value) / 100 for value in values] for task, *values in rows})
        *tasks, mean = tables[-1].values()
        assert list(tables[-1]) == [*world.TASKS, "mean"]
        assert mean == pytest.approx([sum(column) / 10 for column in zip(*tasks, strict=True)], abs=1e-3)
        assert [chance for *_, chance in tasks] == pytest.approx(list(world.TASKS.values()), abs=1e-3)
        assert min(right for right, *_ in tasks) > 0.6 and mean[0] > 0.9 and abs(mean[1] - mean[2]) < 0.1
    assert tables[0] == tables[1] != tables[2]
    for flags in ([*tiny_model, "--questions=0"], ["--model=nowhere"]):
        assert evaluate.main(flags) == 1
        assert re.match(r"error: (--questions is 0|nowhere has no).*\n$", capsys.readouterr().err)


@slow
def test_the_ablation_compares_four_ways_from_one_language_model(tmp_path, monkeypatch):
    flags = tiny_flags(out=str(tmp_path), steps=2, eval_questions=1, batch_size=2)
    results = ablation.ablation(flags, 1)
    assert results == json.loads((tmp_path / "results.json").read_text())
    for name, row in zip(ablation.VARIANTS, results["rows"], strict=True):
        assert row["variant"] == name and name in ablation.ablation_table(results)
        assert row["text bitwise equal"] == ("delta" in name) == (row["text before"] == row["text after"])
        assert row["text before"] == results["rows"][0]["text before"]     # one language model
    assert len({row["caption loss"][0] for row in results["rows"]}) == 4   # but four trainings
    monkeypatch.setattr(train_evip, "train_stage", lambda *arguments: False)             # as after Ctrl-C
    with pytest.raises(InputError, match="the ablation was stopped"):
        ablation.ablation(flags, 1)


# ---------------------------------------------------------------- training: distribution and resume
# Processes are forked: nothing is imported again, and what a test patched holds in them as well.

def train(folder, *flags, world=1, hook=None, kill_at=None) -> list[int]:
    """Exit codes of `world` processes that run train_evip.py. hook(rank, step) is called in each of them
    before every optimizer step. kill_at waits for the moment to kill them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one_process(rank):
        os.setpgrp()
        torch.set_num_threads(1)
        if world > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)}
        original = train_evip.learning_rate
        if hook:
            train_evip.learning_rate = lambda step, *rest: (hook(rank, step), original(step, *rest))[1]
        with open(f"{folder}.err{rank}", "a") as err, contextlib.redirect_stderr(err), \
                contextlib.redirect_stdout(err):
            code = train_evip.main([*flags, f"--out={folder}", "--device=cpu", "--peak_tflops=1"])
            err.flush()
        os._exit(code)             # no clean-up of pytest's

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=one_process, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        if kill_at:
            kill_at()
            process.kill()
        process.join(200)
        assert process.exitcode is not None, "a process hangs"
    return [process.exitcode for process in processes]


@pytest.fixture(scope="module")
def lessons(tmp_path_factory, world_tok):
    """A very small model, and 24 samples for it: half of them text alone, of many lengths."""
    folder, rng, lines = tmp_path_factory.mktemp("lessons"), random.Random(0), []
    train_evip.save(learner(world_tok), world_tok, folder / "model")
    write_conversations(folder, 0, 1)
    for i in range(24):
        image, question = ({}, "") if i % 2 else ({"image": "good.png"}, "<image>\n")
        turns = data.turns(question + "What is this?", "a small red ring. " * rng.randint(1, 8))
        lines.append({"id": i, **image, "conversations": turns})
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def lessons_of(folder: Path, *stages: str) -> list[str]:
    return [f"--data={folder}/meta.json", f"--init_from={folder}/model", "--stages", *stages]


def steps_logged(folder) -> list:
    """What must not depend on when and how often a run was interrupted."""
    keys = ("stage", "step", "loss", "tasks", "lr", "grad_norm", "order", "utilisation")     # if packed
    return [[e.get(key) for key in keys] for e in events_of(folder) if "loss" in e]


def signal_at(when, number=signal.SIGTERM, to=0):
    """A hook: process `to` and its workers get a signal in step `when`."""
    return lambda rank, step: os.killpg(0, number) if (rank, step) == (to, when) else None


def contents(folder: Path) -> dict[str, object]:
    """Every file below: the bits of each tensor, JSON but for the log's length, bytes."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: {key: t.view(torch.uint8).tolist() for key, t in load_file(p).items() if t.ndim}
            if p.suffix == ".safetensors"
            else {**json.loads(p.read_text()), "log": None} if p.suffix == ".json" else p.read_bytes()
            for name, p in files.items()}


def train_in_one_go_and_in_pieces(folder: Path, stage: str, *flags: str, world: int, changed=()) -> Path:
    """Checks that both give the same weights, moments, random numbers, place in the data, and log, bit for
    bit. Returns the folder of the run in one go, of 6 steps. changed: more flags of the pieces."""
    once, pieces, done = folder / "once", folder / "pieces", [0] * world
    flags = [*flags, "--steps=6", "--save_every=4"]

    def keep(rank, step):                          # what was saved after step 4 goes with the stage
        if (rank, step) == (0, 4):
            [saved] = folder.glob(f"*/{stage}.partial/step-0000004")
            shutil.copytree(saved, saved.parents[1] / "kept")

    assert train(once, *flags, world=world, hook=keep) == done
    flags += changed
    assert train(pieces, *flags, world=world, hook=signal_at(0, signal.SIGINT, to=world - 1)) == done
    assert [p.name for p in (pieces / f"{stage}.partial").iterdir()] == ["step-0000002"]
    assert train(pieces, *flags, world=world, hook=keep) == done
    for name in (stage, "kept"):
        assert contents(once / name) == contents(pieces / name)
    assert steps_logged(once) == steps_logged(pieces)
    assert [step for _, step, *_ in steps_logged(once)] == list(range(6))
    return once


def test_a_stopped_and_resumed_run_equals_one_in_one_go_bit_for_bit(lessons, tmp_path):
    train_in_one_go_and_in_pieces(tmp_path, "S2", *lessons_of(lessons, "S2"), "--pack", "--max_tokens=96",
                                  "--batch_size=1", "--grad_accum=2", "--workers=1", "--pool=2",
                                  "--recompute=on", world=1)


@slow
@pytest.mark.parametrize("parallel, dtype, tolerance", [
    ("ddp", "float32", 1e-5), ("fsdp", "float32", 1e-5), ("fsdp", "bfloat16", 2e-2)])
def test_two_processes_resume_bitwise_and_learn_what_one_learns_from_twice_the_batch(
        lessons, tmp_path, monkeypatch, parallel, dtype, tolerance):
    """What is frozen does not change. Each process holds the weights and the optimizer state of the plan.
    Layers that stay gathered save gathers and change nothing that is learned."""
    make_optimizer, backward = train_evip.make_optimizer, train_evip.backward

    class Gathers(TorchDispatchMode):
        number = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.number += "allgather" in str(op)
            return op(*args, **(kwargs or {}))

    def counted(*arguments):                       # in the processes
        with Gathers() as gathers:
            losses = backward(*arguments)
        # Two layers and the rest: once a step, or 3 forward and the 2 layers backward, in each of 2 passes.
        if parallel == "fsdp":
            assert gathers.number == {"on": 10, "off": 3}[arguments[-1].reshard]
        return losses

    def checked(model, flags):
        optimizer = make_optimizer(model, flags)
        with torch.device("meta"):
            plan = train_evip.memory_plan(MonoInternVL(model.config), stage_of("S1.2"), flags, 2)
        moments = (state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
        if parallel == "fsdp":                     # nor does a save gather more than one tensor at a time
            assert all(isinstance(t, DTensor) for t in model.state_dict().values())
        for part, tensors in (("weights", model.parameters()), ("optimizer", moments)):
            own = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)
            assert common.sum_over_processes(own)[0] / 2 == plan[part], part
        return optimizer

    flags = [*lessons_of(lessons, "S1.2"), "--pool=1"]
    assert train(tmp_path / "one", *flags, "--steps=6", "--batch_size=4", "--grad_accum=1") == [0]
    monkeypatch.setattr(train_evip, "make_optimizer", checked)
    monkeypatch.setattr(train_evip, "backward", counted)
    two = train_in_one_go_and_in_pieces(
        tmp_path, "S1.2", *flags, f"--parallel={parallel}", "--batch_size=1", "--grad_accum=2",
        f"--dtype={dtype}", "--reshard=on", world=2, changed=["--reshard=off"])
    one, two, old = (load_file(folder / "model.safetensors")
                     for folder in (tmp_path / "one/S1.2", two / "S1.2", lessons / "model"))
    assert {name for name in one if not torch.equal(one[name], old[name])} == learning_in("S1.2", one)
    for name, weight in one.items():
        if name in learning_in("S1.2", one):       # what trains is float32 in any case
            assert_close(two[name], weight, rtol=0, atol=tolerance)
        else:
            assert torch.equal(two[name], weight.to(getattr(torch, dtype)))
    for mine, theirs in zip(steps_logged(tmp_path / "one"), steps_logged(tmp_path / "once"), strict=True):
        assert mine[:2] == theirs[:2]
        assert (theirs[2], theirs[5]) == pytest.approx((mine[2], mine[5]), rel=10 * tolerance)


@slow
@pytest.mark.parametrize("worlds, parallel", [
    ((2, 1), "fsdp auto"), ((2, 1), "ddp auto"), ((1, 2), "auto fsdp"), ((1, 2), "auto ddp"),
    ((2, 2), "ddp fsdp"), ((2, 2), "fsdp ddp")])
def test_another_number_of_processes_goes_on_as_if_it_had_been_there_from_the_start(
        lessons, tmp_path, worlds, parallel):
    flags = [*lessons_of(lessons, "S2"), "--steps=5", "--pool=1", "--batch_size=2", "--warmup=0"]
    once, pieces = tmp_path / "once", tmp_path / "pieces"
    assert train(once, *flags, "--grad_accum=2") == [0]
    for n, name, hook in zip(worlds, parallel.split(), (signal_at(2, signal.SIGINT), None), strict=True):
        assert train(pieces, *flags, f"--grad_accum={2 // n}", f"--parallel={name}", world=n,
                     hook=hook) == [0] * n
    for mine, theirs in zip(steps_logged(pieces), steps_logged(once), strict=True):
        assert mine[:2] == theirs[:2] and mine[2] == pytest.approx(theirs[2], rel=1e-4)
    mine, theirs = (load_file(folder / "S2/model.safetensors") for folder in (pieces, once))
    for name, weight in theirs.items():            # moments that were lost would change the second half
        assert_close(mine[name], weight, rtol=0, atol=2e-5)


@slow
def test_ten_kills_at_random_moments_lose_nothing_beyond_the_last_checkpoint(lessons, tmp_path):
    flags = [*lessons_of(lessons, "S2"), "--steps=32", *FEW, "--save_every=1", "--max_tokens=64",
             "--max_bad=1"]
    out, once, rng, saved = tmp_path / "killed", tmp_path / "once", random.Random(0), [0]

    def newest():
        return max((int(p.name[5:]) for p in (out / "S2.partial").glob("step-*")), default=0)

    def a_moment():                                # while it starts, steps, or writes one of its checkpoints
        goal, until = saved[-1] + rng.randrange(3), time.time() + 100
        while newest() < goal and time.time() < until:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))

    for _ in range(10):
        assert train(out, *flags, kill_at=a_moment) == [-signal.SIGKILL]
        saved.append(newest())
        assert len(list(out.glob("S2.partial/step-*"))) <= 3               # --keep=2, and one about to go
    assert saved == sorted(saved) and saved[-1] > 5
    assert train(once, *flags) == train(out, *flags) == [0]
    assert contents(out / "S2") == contents(once / "S2") and steps_logged(out) == steps_logged(once)
    bad, named = ([e for e in events_of(folder) if e.get("event") == "bad sample"] for folder in (out, once))
    assert bad == named != []                      # once, although many lives met them


@slow
def test_problems_of_one_process_stop_all_and_leave_the_earlier_checkpoints_usable(lessons, tmp_path):
    flags = [*lessons_of(lessons, "S2"), "--steps=4", *FEW, "--save_every=1"]

    def disk_is_full(rank, step):                  # no file of the first process may grow beyond 50 kB
        if (rank, step) == (0, 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    out = tmp_path / "full"
    assert train(out, *flags, "--parallel=fsdp", world=2, hook=disk_is_full) == [1, 1]
    for rank in (0, 1):
        error = Path(f"{out}.err{rank}").read_text().splitlines()[-1]
        assert re.search("of step 2 cannot be written.*process 0: .Errno 27. File too large", error)
    assert [p.name for p in (out / "S2.partial").iterdir()] == ["step-0000001"]
    # one process continues, but only with as many samples in a step
    advice = r"this run has 4 samples, and with 1 process\(es\) it would have 2: change --grad_accum"
    assert train(out, *flags) == [1] and re.search(advice, Path(f"{out}.err0").read_text())
    assert train(out, *flags, "--parallel=fsdp", world=2) == [0, 0]
    assert [step for _, step, *_ in steps_logged(out)] == [0, 1, 2, 3]

    out, half_unreadable = tmp_path / "bad", write_conversations(tmp_path, 12, 12)
    assert train(out, f"--data={half_unreadable}", *flags[1:], "--max_bad=0.1", world=2) == [1, 1]
    for rank, log in enumerate(("log.jsonl", "log.rank1.jsonl")):
        error = Path(f"{out}.err{rank}").read_text()
        assert re.search(r"\d of the \d+ samples .* --max_bad 0.1 allows fewer", error)
        assert "Traceback" not in error
        named = [e["error"] for e in map(json.loads, (out / log).open()) if "error" in e]
        assert named and all("bad.png" in error for error in named) and len(set(named)) == len(named)


def test_only_flags_that_change_nothing_learned_may_differ_when_a_run_continues(tmp_path):
    flags, free = vars(train_evip.Flags()), train_evip.FREE_TO_CHANGE
    assert not free & {"recipe", "preset", "stages", "init_from", "data", "batch_size", "grad_accum", "pack",
                       "pool", "steps", "lr", "warmup", "weight_decay", "grad_clip", "max_tokens", "seed",
                       "dtype", "max_bad"}
    checkpoint.write_run(tmp_path, checkpoint.read_run(tmp_path, flags, [], free) | {"done": ["S0"]})
    for name in flags:
        changed = flags | {name: "other"}
        if name in free:
            assert checkpoint.read_run(tmp_path, changed, [], free)["done"] == ["S0"]
        else:
            with pytest.raises(InputError, match=f"had --{name} .*, not other: .*--resume never"):
                checkpoint.read_run(tmp_path, changed, [], free)


def test_an_interrupted_run_continues_and_a_finished_one_starts_from_the_beginning(lessons, tmp_path):
    out, said = tmp_path / "out", Path(f"{tmp_path}/out.err0")
    flags = [*lessons_of(lessons, "S1.3", "S2"), "--steps=3", *FEW]
    assert train(out, *flags, hook=signal_at(0)) == [0] and "stopped" in said.read_text()          # in S1.3
    [state] = out.glob("S1.3.partial/*/rank0.json")            # what earlier versions did not write
    for path, keys in (out / "run.json", ["processes"]), (state, ["batch"]):
        content = json.loads(path.read_text())
        for key in keys:
            del content[key]
        for key in ("left_over", "start"):
            content.get("batches", {}).pop(key, None)
        path.write_text(json.dumps(content))
    assert train(out, *flags, "--lr=0.5") == [1] and "had --lr None, not 0.5" in said.read_text()
    assert train(out, *flags, hook=signal_at(1, signal.SIGKILL)) == [-signal.SIGKILL]      # early in S2
    assert train(out, *flags, "--keep=1") == [0]
    steps = [[stage, i] for stage in ("S1.3", "S2") for i in range(3)]
    assert [step[:2] for step in steps_logged(out)] == steps
    once = contents(out / "S2")
    assert train(out, *flags, "--lr=0.5", hook=signal_at(0)) == [0]
    assert train(out, *flags, "--resume=never") == [0]
    assert contents(out / "S2") == once and said.read_text().count("which continues") == 2
    assert [e["event"] for e in events_of(out) if "event" in e] == ["run", "resume", "resume", "run", "run"]


def language_model(folder: Path, world_tok, kind: str, padding: int = 0) -> Path:
    """A small LLM folder with a sentencepiece tokenizer that knows no chat and no images. padding: rows of
    zeros after those of its tokens."""
    folder.mkdir()
    shutil.copy(world_tok.folder / "tokenizer.model", folder)
    write_llm(folder, kind)
    size, weights = len(world_tok.sp), load_file(folder / "model.safetensors")
    for name in weights:
        if re.search("embed|lm_head|output", name):
            weights[name] = F.pad(torch.randn(size, 32), (0, 0, 0, padding))
    save_file(weights, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"vocab_size": size + padding, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind, recipe, padding", [("llama", "evip++", 0), ("llama", "evip++", 30),
                                                   pytest.param("internlm2", "evip", 5, marks=slow)])
def test_training_starts_from_a_language_model_whose_tokenizer_gets_image_tokens(world_tok, tmp_path, capsys,
                                                                                 kind, recipe, padding):
    """padding: rows of the vocabulary beyond the tokenizer, as many models have them."""
    llm, out, size = tmp_path / "llm", tmp_path / "out", len(world_tok.sp)
    language_model(llm, world_tok, kind, padding)
    flags = [f"--data={write_conversations(tmp_path, 0, 1)}", f"--init_from={llm}", f"--recipe={recipe}",
             "--stages=S1.1", "--steps=1", "--lr=0", *FEW, f"--out={out}"]
    assert train_evip.main([*flags, "--dry_run"]) == 0 and not out.exists()
    assert "»" in capsys.readouterr().out          # a batch, with the tokenizer that training would make
    assert train_evip.main(flags) == 0
    model, tok = MonoInternVL.from_pretrained(out / "S1.1"), Tokenizer(out / "S1.1")
    assert model.config.img_context_token_id == tok.token_id("<IMG_CONTEXT>") == size + 4
    assert model.config.attn_experts == ("qkvo" if recipe == "evip++" else "")
    assert len(tok) == size + 11 and model.config.vocab_size == size + max(11, padding)
    for rows in (model.language_model.model.tok_embeddings.weight, model.language_model.output.weight):
        mean = rows[:size].mean(0)
        assert_close(rows[size:], mean.expand(len(rows) - size, -1), rtol=1e-5, atol=1e-6)
    for name, weight in model.named_parameters():  # experts are copies, and a learning rate of 0 keeps them
        assert torch.equal(weight, model.get_parameter(name.replace("_ve.", ".")))


@slow
def test_torchrun_starts_it(lessons, tmp_path):
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                          "train_evip.py", *lessons_of(lessons, "S2"), "--steps=2", f"--out={tmp_path}",
                          "--device=cpu"],
                         cwd=HERE, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert "2 process(es), cpu" in run.stdout and re.search(r"S2 .* 2 +16 +1e-03", run.stdout)
    assert [step for _, step, *_ in steps_logged(tmp_path)] == [0, 1]
