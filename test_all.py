"""All tests, in the order of the story: `python -m pytest`; those that need a GPU: `python -m pytest -m gpu`.

The official numbers (assets/golden) come first; then the architecture against a reference that takes one
token at a time, routing, generation, checkpoints; then data.py, sample.py, the CUDA kernel, the notebooks,
the README, training. A name is a sentence about the system. A law holds for whatever hypothesis draws; its
draws are the same in each run.
"""
import contextlib
import ctypes
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
import platform
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.rnn import pad_sequence
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import bench
import budget
import checkpoint
import common
import data
import evaluate
import generate
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

@pytest.mark.parametrize("layout", ["left", "right", "between", "packed"])
@pytest.mark.parametrize("rope", ROPE)
@settings(max_examples=8)
@given(visual_rows(min_rows=2, max_rows=4), st.integers(0, 3))
def test_a_sample_in_a_padded_or_packed_row_is_as_if_alone(layout, rope, rows, first):
    """Logits, losses and rotary positions are those of the sample alone, whatever the others are."""
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

@pytest.mark.parametrize("rope", ROPE)
@settings(max_examples=15)
@given(visual_rows(), st.integers(1, 10), st.sampled_from(["", "qkv", "qkvo"]))
def test_chunks_of_a_prompt_and_single_tokens_after_it_have_the_logits_of_the_whole(rope, rows, chunk,
                                                                                    experts):
    model = tiny(experts, rope_scaling=ROPE[rope], max_position_embeddings=6 if rope == "dynamic" else 64)
    (ids, pixels, mask), steps = batch_of(rows), []
    hook = record(model.language_model.output, steps)
    tokens = torch.tensor(stream(model, ids, pixels, mask, max_new_tokens=3, temperature=1.0, seed=0,
                                 prefill_chunk=chunk)).T
    hook.remove()
    whole, whole_mask = torch.cat([ids, tokens], 1), F.pad(mask, (0, 3), value=1)
    with torch.no_grad():
        assert_close(steps[0], model(ids, pixels, mask)[0][:, -1], rtol=1e-4, atol=1e-4)
        logits = model(whole, pixels, whole_mask)[0][:, ids.shape[1] - 1:-1]
    for row, length in enumerate(map(len, rows)):
        if rope != "dynamic" or length + 3 <= 6:   # past the trained positions, cached keys keep their base
            assert_close(torch.stack(steps, 1)[row], logits[row], rtol=1e-4, atol=1e-4)


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
    some_items = st.lists(st.sampled_from([1, 2, -1, -2]), max_size=4)

    def __init__(self, device="cpu"):
        super().__init__()
        self.device, self.patch = device, pytest.MonkeyPatch()
        self.items, self.held = [1], []
        self.pictures = torch.randn(3, 3, 4, 8, generator=torch.Generator().manual_seed(0)).to(device)
        self.pictures[2] = math.nan
        self.memory = torch.zeros(80, 3, 4, 8, device=device)      # each prompt's pictures come to lie here

    @initialize(rope=st.sampled_from(list(ROPE)), experts=st.sampled_from(["", "qkvo"]),
                block=st.sampled_from([4, 64]), wide=st.booleans())
    def begin(self, rope, experts, block, wide):
        self.patch.setattr(KVCache, "BLOCK_SIZES", {self.device: block})
        self.trained, self.wide = 20 if rope == "dynamic" else math.inf, wide
        model = tiny(experts, rope_scaling=ROPE[rope], max_position_embeddings=40 if rope == "none" else 20)
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
        if len(self.items) > 20:
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
        expected, reused, read, begun, tokens = self.expected(new, *prompt), 0, [], [], []
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
        with contextlib.suppress(KeyboardInterrupt):
            tokens.extend(token.tolist() for token in itertools.islice(answer, stop))
        answer.close()
        for hook in hooks:
            hook.remove()
        failed = fail is not None and len(begun) >= fail
        assert tokens == expected[:len(tokens)] and (failed or len(tokens) == min(new, stop or new))
        assert self.cache.reused == reused
        if self.device == "cpu" and not failed:    # a replayed step calls no Python
            assert sum(x.shape[1] for x in read) == len(slots) - reused + max(0, len(tokens) - 1)
        answer = [token[0] for token in tokens]
        self.held = slots[:reused] if failed and not tokens else slots + [(t, 0, False) for t in answer[:-1]]
        self.held = [] if pads or rows > 1 else self.held
        self.items = [*answer, 1] if rows > 1 and chunk else self.items + answer   # begins like an answer

    @rule(more=some_items, **turn_of)
    def turn(self, more, **how):
        self.items = self.items + more
        self.ask(**how)

    @rule(keep=st.integers(0, 9), more=some_items, **turn_of)
    def edit(self, keep, more, **how):
        self.items = self.items[:keep] + more or [1]
        self.ask(**how)

    @rule(which=st.integers(0, 9), **turn_of)
    def another_picture(self, which, **how):
        places = [i for i, item in enumerate(self.items) if item < 0]
        if places:
            i = places[which % len(places)]
            self.items[i] = -3 - self.items[i]     # -1 becomes -2
        self.ask(**how)

    @rule(**turn_of)
    def pictures_of_another_size(self, **how):
        self.wide = not self.wide
        self.ask(**how)

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]), **turn_of)
    def another_dtype(self, dtype, **how):
        if self.cache.keys is None or self.cache.keys.dtype != dtype:
            self.held = []
        self.model.to(dtype)
        self.ask(**how)

    @rule(event=st.sampled_from([dict(fail=1), {}, dict(rows=2)]), **limits)
    def nothing_but_nan(self, event, **limits):
        self.items = [-3, 2, 2, 2, 2, -3]
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
def test_whatever_happened_to_a_cache_an_answer_is_the_naive_one_and_only_what_is_new_is_read(device):
    run_state_machine_as_test(functools.partial(Conversation, device), settings=settings(
        max_examples=45, stateful_step_count=12, phases=[Phase.generate]))


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


def test_a_captured_step_serves_every_later_token_of_its_block(monkeypatch):
    """What CUDA graphs rely on, shown without a GPU: a trace freezes all that Python computes, as they do."""
    def capture(step, inputs, pool):
        traced, result = make_fx(lambda: step(*inputs))(), step(*inputs)

        class Graph:
            def replay(self):
                replays.append(len(result))
                result.copy_(traced())
        return Graph(), result

    def reserve(self, *args, plain=KVCache.reserve):
        plain(self, *args)
        self.step_buffers.pool = "what a CPU has none of"
    replays, model = [], tiny()
    ids, pixels, mask = batch_of([[False, True, False], [False] * 7, [True, False], [False]])
    free = stream(model, ids, pixels, mask, max_new_tokens=20)
    ends = [free[3 * row + 1][row] for row in range(3)]            # rows end one after the other
    ended = stream(model, ids, pixels, mask, max_new_tokens=20, eos_token_id=ends)
    monkeypatch.setattr(KVCache, "BLOCK_SIZES", {"cpu": 8})
    monkeypatch.setattr(KVCache, "reserve", reserve)
    monkeypatch.setattr(generate, "capture", capture)
    cache = KVCache(model.config)
    for _ in range(2):
        assert stream(model, ids, pixels, mask, max_new_tokens=20, kv_cache=cache) == free
        assert stream(model, ids, pixels, mask, max_new_tokens=20, kv_cache=cache, eos_token_id=ends) == ended
    assert {4, 1} <= set(replays) <= {4, 2, 1}     # each size takes a capture: rows leave by halves
    assert len(cache.step_buffers.graphs) < len(replays) / 5


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
def test_graphs_give_the_same_tokens_and_a_step_never_waits_for_the_host(device, compile_decode, dtype,
                                                                          monkeypatch):
    monkeypatch.setattr(KVCache, "BLOCK_SIZES", {"cuda": 16})      # several graphs
    model = tiny(hidden_size=64, max_position_embeddings=256).to(device, dtype)
    prompt = to(device, batch_of([[False, True, False], [False] * 7, [True, False]]))
    model.cuda_graphs = False
    plain = stream(model, *prompt, max_new_tokens=60)
    model.cuda_graphs, model.compile_decode, cache = True, compile_decode, KVCache(model.config)
    captured = stream(model, *prompt, max_new_tokens=60, kv_cache=cache)
    assert len(cache.step_buffers.graphs) >= 4
    decode = generate.decode

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return decode(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(generate, "decode", watched)
    replayed = stream(model, *prompt, max_new_tokens=60, kv_cache=cache)
    assert captured == replayed
    if dtype == torch.float32 or not compile_decode:           # fused, 16-bit roundings may differ
        assert replayed == plain


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


def test_the_image_token_is_never_generated():
    model = tiny()
    with torch.no_grad():
        model.language_model.output.weight[IMG] = 100 * model.language_model.output.weight[7]
        model.language_model.output.weight[IMG + 1] = -model.language_model.output.weight[IMG]
    for options in (dict(), dict(temperature=1.0, seed=0), dict(temperature=5.0, top_k=2, seed=0)):
        tokens = stream(model, PROMPTS, max_new_tokens=20, **options)
        assert all(IMG not in token for token in tokens)
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
    dict(eos_token_id=[2, None]), dict(seed=[1])])
def test_a_sampling_value_out_of_range_is_named(option):
    with pytest.raises(InputError, match=f"{next(iter(option))} is "):
        stream(tiny(), PROMPTS, **{"max_new_tokens": 2, **option})


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

def tensors_of(folder):
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def test_loading_saving_and_loading_an_official_checkpoint_is_bitwise(tmp_path):
    source = OFFICIAL_TINY
    original = load_file(source / "model.safetensors")
    model = MonoInternVL.from_pretrained(source)
    for max_shard_bytes, files in ((10 ** 9, 1), (100_000, None), (1, len(original)), (10 ** 9, 1)):
        model.save_pretrained(tmp_path, max_shard_bytes)
        written = {p.name for p in tmp_path.iterdir()}
        shards = {name for name in written if name.endswith(".safetensors")}
        index_file = {"model.safetensors.index.json"} if len(shards) > 1 else set()
        assert written - shards == {"config.json"} | index_file
        assert 1 < len(shards) < len(original) if files is None else len(shards) == files
        if len(shards) > 1:
            index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
            assert index["weight_map"] == {n: f for f in shards for n in load_file(tmp_path / f)}
        again = MonoInternVL.from_pretrained(tmp_path)
        assert again.config == model.config
        for tensors in (tensors_of(tmp_path), again.state_dict()):
            assert tensors.keys() == original.keys()
            assert all(torch.equal(tensors[name], t) for name, t in original.items())


def test_a_save_that_fails_leaves_the_earlier_checkpoint_as_it_was(tmp_path, monkeypatch):
    tiny(seed=0).save_pretrained(tmp_path, max_shard_bytes=20_000)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = []

    def disk_full(tensors, path, **options):
        save_file(tensors, path, **options)
        calls.append(path)
        if len(calls) == 2:
            raise OSError("no space left on device")
    monkeypatch.setattr("checkpoint.save_file", disk_full)
    with pytest.raises(OSError, match="no space"):
        tiny(seed=1).save_pretrained(tmp_path, max_shard_bytes=20_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_leaves_files_of_other_makers_alone(tmp_path):
    (tmp_path / "model_card.safetensors.txt").write_text("mine")
    tiny().save_pretrained(tmp_path)
    assert (tmp_path / "model_card.safetensors.txt").read_text() == "mine"


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
    written = json.loads(config.to_json())
    official = json.loads((OFFICIAL_TINY / "config.json").read_text())
    assert written["llm_config"].keys() - official["llm_config"].keys() == {"attn_experts"}
    assert written["vision_config"].keys() == official["vision_config"].keys()
    assert written.keys() - official.keys() == {"img_context_token_id"}


def test_fields_that_hugging_face_adds_to_a_config_do_not_disturb(tmp_path):
    official = json.loads((OFFICIAL_TINY / "config.json").read_text())
    official["llm_config"] |= {"torch_dtype": "bfloat16", "top_p": 1.0, "_name_or_path": "x"}
    official |= {"auto_map": {"AutoModel": "x.Y"}, "transformers_version": None, "force_image_size": None}
    (tmp_path / "config.json").write_text(json.dumps(official))
    expected = MonoInternVLConfig.from_json(OFFICIAL_TINY / "config.json")
    assert MonoInternVLConfig.from_json(tmp_path / "config.json") == expected


def test_the_image_token_of_a_checkpoint_comes_from_its_tokenizer_files(tmp_path):
    shutil.copytree(OFFICIAL_TINY, tmp_path, dirs_exist_ok=True)
    assert MonoInternVL.from_pretrained(tmp_path).config.img_context_token_id is None
    (tmp_path / "added_tokens.json").write_text('{"<img>": 118, "<IMG_CONTEXT>": 120}')
    assert MonoInternVL.from_pretrained(tmp_path).config.img_context_token_id == 120
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"5": {"content": "<s>"}, '
                                                    '"121": {"content": "<IMG_CONTEXT>"}}}')
    assert MonoInternVL.from_pretrained(tmp_path).config.img_context_token_id == 120
    (tmp_path / "added_tokens.json").unlink()
    assert MonoInternVL.from_pretrained(tmp_path).config.img_context_token_id == 121
    for other in ("{}", '{"added_tokens_decoder": []}', '{"added_tokens_decoder": {"5": 3}}'):
        (tmp_path / "tokenizer_config.json").write_text(other)
        assert MonoInternVL.from_pretrained(tmp_path).config.img_context_token_id is None
    for bad in ('{"<IMG_CONTEXT>": 128}', '{"<IMG_CONTEXT>": "120"}', "[]"):
        (tmp_path / "added_tokens.json").write_text(bad)
        with pytest.raises(InputError, match="img_context_token_id|added_tokens.json"):
            MonoInternVL.from_pretrained(tmp_path)


def test_a_checkpoint_loads_in_half_precision_and_stays_close(golden):
    model = MonoInternVL.from_pretrained(OFFICIAL_TINY, dtype=torch.bfloat16)
    model.config.img_context_token_id = 120
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits, _ = model(golden["batch.input_ids"], golden["batch.pixel_values"])
    theirs = golden["batch.logits"]
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), theirs, rtol=0, atol=0.03 * theirs.abs().max().item())


A_WEIGHT = "language_model.model.layers.1.feed_forward_ve.w3.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(A_WEIGHT), f"{A_WEIGHT} is missing"),
    (lambda t: t.update(surplus=torch.zeros(3)), "surplus has no place"),
    (lambda t: t.update({A_WEIGHT: torch.zeros(32, 24)}), f"{A_WEIGHT} is .32, 24.*24, 32")])
def test_a_missing_surplus_or_misshapen_tensor_is_named(tmp_path, change, message):
    tiny().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        MonoInternVL.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_weight_file_is_named(tmp_path, keep):
    tiny().save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(InputError, match="model.safetensors is damaged or cut short"):
        MonoInternVL.from_pretrained(tmp_path)


def test_missing_files_and_broken_indexes_are_named(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path, max_shard_bytes=20_000)
    index = tmp_path / "model.safetensors.index.json"
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    good, weights = index.read_text(), shard.read_bytes()
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} does not exist"):
        MonoInternVL.from_pretrained(tmp_path)
    shard.write_bytes(weights)
    for broken in ("{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}',
                   '{"weight_map": {"a": "../a"}}', good.replace(shard.name, "/etc/passwd")):
        index.write_text(broken)
        with pytest.raises(InputError, match="index.json"):
            MonoInternVL.from_pretrained(tmp_path)
    index.unlink()
    with pytest.raises(InputError, match="model.safetensors does not exist"):
        MonoInternVL.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="config.json does not exist"):
        MonoInternVL.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("text", [
    "", "{", "[1]", "null", "\ud83d", "[" * 50_000, "{}", '{"llm_config": [1]}'])
def test_a_config_that_is_no_model_description_gets_one_line_naming_it(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match="config.json") as error:
        MonoInternVL.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field, value", [
    ("num_hidden_layers", "2"), ("num_hidden_layers", True), ("num_hidden_layers", 2.0),
    ("num_hidden_layers", 0), ("hidden_size", -32), ("hidden_size", 30), ("num_key_value_heads", 3),
    ("rms_norm_eps", None),
    ("rms_norm_eps", math.nan), ("rope_theta", math.inf), ("attn_experts", "kv"), ("rope_scaling", [2]),
    ("rope_scaling", {"type": "yarn", "factor": 2.0}), ("rope_scaling", {"type": "linear"}),
    ("rope_scaling", {"type": "linear", "factor": True}), ("rope_scaling", ROPE["linear"] | {"factor": 0.5}),
    ("bos_token_id", -1), ("patch_size", 3), ("downsample_ratio", 0.3), ("use_thumbnail", 1),
    ("min_dynamic_patch", 13), ("img_context_token_id", 50), ("num_attention_heads", 16),
    ("hidden_act", "gelu"), ("bias", True), ("tie_word_embeddings", True), ("ps_version", "v1"),
    ("force_image_size", 8)])
def test_a_config_field_that_does_not_fit_is_named(tmp_path, field, value):
    config = tiny().config
    official = json.loads(config.to_json())
    path = checkpoint.CONFIG_PATHS.get(field, ("llm_config", field) if field in official["llm_config"] else (field,))
    (official if len(path) == 1 else official[path[0]])[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(official))
    named = {"num_attention_heads": "hidden_size", "patch_size": "image_size"}.get(field, field)
    with pytest.raises(InputError, match=f"config.json: .*{named}"):
        MonoInternVLConfig.from_json(tmp_path / "config.json")


# ---------------------------------------------------------------- starting from a language model

def write_llm(folder, **changes) -> dict:
    """A random InternLM2 folder as its makers lay it out. Returns its weights."""
    g = torch.Generator().manual_seed(1)
    c = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "vocab_size": 45,
         "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2,
         "rms_norm_eps": 1e-5, "bias": False, "rope_theta": 10000, "rope_scaling": ROPE["dynamic"],
         "max_position_embeddings": 64, "hidden_act": "silu", "tie_word_embeddings": False, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 2, **changes}
    shapes = {"model.tok_embeddings.weight": (45, 32), "output.weight": (45, 32), "model.norm.weight": (32,)}
    for i in range(2):
        at = f"model.layers.{i}."
        shapes |= {at + "attention.wqkv.weight": (64, 32), at + "attention.wo.weight": (32, 32),
                   at + "feed_forward.w1.weight": (24, 32), at + "feed_forward.w3.weight": (24, 32),
                   at + "feed_forward.w2.weight": (32, 24), at + "attention_norm.weight": (32,),
                   at + "ffn_norm.weight": (32,)}
    tensors = {name: torch.randn(shape, generator=g) * 0.25 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(c))
    return tensors


def vl_config(**changes):
    return MonoInternVLConfig(**{**dict(
        vocab_size=45, hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rope_theta=1e4, rope_scaling=ROPE["dynamic"], max_position_embeddings=64,
        vision_hidden_size=6, patch_size=2, image_size=4), **changes})


@pytest.mark.parametrize("attn_experts", ["", "qkv", "qkvo"])
def test_a_model_made_from_an_llm_is_that_llm_on_text_and_on_embeddings_marked_visual(tmp_path, attn_experts):
    tensors = write_llm(tmp_path)
    config = vl_config(attn_experts=attn_experts)
    model = MonoInternVL.from_llm(tmp_path, config)
    w = {f"language_model.{name}": t.double() for name, t in tensors.items()}
    ids = torch.randint(0, 45, (1, 9), generator=torch.Generator().manual_seed(0))
    x = w["language_model.model.tok_embeddings.weight"][ids[0]]
    expected = naive_logits(w, config, x, [False] * 9)
    lm = model.language_model
    with torch.no_grad():
        assert_close(model(ids)[0][0].double(), expected, rtol=1e-5, atol=1e-5)
        for visual in (torch.ones_like(ids), torch.arange(9)[None] % 2):
            for backend in ("torch", "dense"):
                hidden = lm(x.float()[None], Routing(visual == 1, None, backend))
                assert_close(lm.output(hidden)[0].double(), expected, rtol=1e-5, atol=1e-5)


def test_visual_experts_made_from_an_llm_are_copies_that_share_no_memory(tmp_path):
    write_llm(tmp_path)
    weights = dict(MonoInternVL.from_llm(tmp_path).named_parameters())     # default: 1.5, sizes of the LLM
    experts = [name for name in weights if "_ve." in name]
    assert len(experts) == 2 * (3 + 2)
    for name in experts:
        text = weights[name.replace("_ve.", ".")]
        assert torch.equal(weights[name], text) and weights[name].data_ptr() != text.data_ptr()


def test_a_larger_vocabulary_starts_new_rows_at_the_mean_and_changes_no_old_logit(tmp_path):
    tensors = write_llm(tmp_path)
    small, large = (MonoInternVL.from_llm(tmp_path, vl_config(vocab_size=n)) for n in (45, 51))
    for name in ("model.tok_embeddings.weight", "output.weight"):
        weight = large.state_dict()[f"language_model.{name}"]
        assert weight.shape == (51, 32) and torch.equal(weight[:45], tensors[name])
        assert_close(weight[45:], tensors[name].mean(0).expand(6, -1))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert_close(large(ids)[0][..., :45], small(ids)[0])


@pytest.mark.parametrize("config, message", [
    (dict(hidden_size=64), "hidden_size = 32.*64"), (dict(num_hidden_layers=3), "num_hidden_layers = 2.*3"),
    (dict(num_key_value_heads=4), "num_key_value_heads = 2.*4"), (dict(rope_theta=1e6), "rope_theta"),
    (dict(rope_scaling=None), "rope_scaling = {'type': 'dynamic'"),
    (dict(vocab_size=44), "language_model.model.tok_embeddings.weight|language_model.output.weight")])
def test_an_llm_that_does_not_fit_the_config_is_refused_by_field_or_tensor(tmp_path, config, message):
    write_llm(tmp_path)
    with pytest.raises(InputError, match=message):
        MonoInternVL.from_llm(tmp_path, vl_config(**config))


def test_a_llama_folder_gives_the_logits_that_transformers_computes(tmp_path):
    folder = GOLDEN / "llama_tiny"
    golden = load_file(folder / "golden.safetensors")
    model = MonoInternVL.from_llm(folder)
    assert model.config.rope_theta == 5000 and model.config.num_key_value_heads == 2
    lm = model.language_model
    with torch.no_grad():
        assert_close(model(golden["input_ids"])[0], golden["logits"], rtol=1e-5, atol=1e-5)
        routing = Routing(torch.ones_like(golden["input_ids"]) == 1)       # the visual experts are copies
        embeddings = lm.model["tok_embeddings"](golden["input_ids"])
        assert_close(lm.output(lm(embeddings, routing)), golden["logits"], rtol=1e-5, atol=1e-5)
    # older files name rope_theta beside the rest, leave out what is default, and may share embedding and head
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    del config["head_dim"], config["attention_bias"], config["mlp_bias"]
    weights = load_file(folder / "model.safetensors")
    tied = {n: t for n, t in weights.items() if n != "lm_head.weight"}
    untied = {**weights, "lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    logits = []
    for tensors, tie in ((tied, True), (untied, False)):
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tie}))
        with torch.no_grad():
            logits.append(MonoInternVL.from_llm(tmp_path, dtype=None)(golden["input_ids"])[0])
    assert torch.equal(*logits) and not torch.equal(logits[0], golden["logits"])


@pytest.mark.parametrize("change, message", [
    (dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}), "rope_scaling.*llama3"),
    (dict(attention_bias=True), "attention_bias"), (dict(mlp_bias=True), "mlp_bias"),
    (dict(head_dim=16), "head_dim is 16, supported is .* = 8"),
    (dict(num_key_value_heads=4), "q_proj.weight or its k_proj")])
def test_a_llama_beyond_the_architecture_is_refused_by_field_or_tensor(tmp_path, change, message):
    config = json.loads((GOLDEN / "llama_tiny" / "config.json").read_text())
    shutil.copy(GOLDEN / "llama_tiny" / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(InputError, match=message):
        MonoInternVL.from_llm(tmp_path)


@pytest.mark.parametrize("change", [dict(model_type="gpt2"), dict(hidden_act="gelu"), dict(bias=True)])
def test_an_llm_of_another_architecture_is_refused(tmp_path, change):
    write_llm(tmp_path, **change)
    with pytest.raises(InputError, match=f"config.json: .*{next(iter(change))}"):
        MonoInternVL.from_llm(tmp_path, vl_config())


# ---------------------------------------------------------------- tokenizer

# "▁" is how sentencepiece writes a space: the one character that cannot come back
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"))
SPOKEN = PLAIN.filter(lambda text: "<" not in text)


def ask(question: str, *rest: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate((question, *rest))]


@pytest.mark.parametrize("case", CASES["tokenize"], ids=lambda case: ascii(case["text"][:20]))
def test_text_has_the_official_token_ids_and_comes_back(case):
    assert TOK.encode(case["text"]) == case["ids"]
    assert TOK.decode(case["ids"]) == case["decoded_skip_special"]
    assert TOK.decode(case["ids"], skip_special_tokens=False) == "<s>" + case["text"]


def test_special_tokens_are_read_from_the_folder(tmp_path):
    assert CASES["special_tokens"].items() <= TOK.special_tokens.items()
    assert (len(TOK), TOK.bos_id, TOK.eos_id, TOK.pad_id) == (491, 1, 2, 2)
    for source in ("added_tokens.json", "tokenizer_config.json"):                      # either file is enough
        folder = tmp_path / source
        folder.mkdir()
        for name in ("tokenizer.model", source):
            shutil.copy(OFFICIAL_DATA / name, folder)
        assert Tokenizer(folder).special_tokens == TOK.special_tokens


def test_of_two_special_tokens_that_start_alike_the_longer_is_meant(tmp_path):
    shutil.copy(OFFICIAL_DATA / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<a": 480, "<a>": 481}')
    assert Tokenizer(tmp_path).encode("<a<a>", bos=False) == [480, 481]


@given(st.lists(st.one_of(PLAIN, st.sampled_from(sorted(TOK.special_tokens)))).map("".join))
def test_any_text_survives_encoding_and_decoding(text):
    assert TOK.decode(TOK.encode(text, bos=False), skip_special_tokens=False) == text


@given(PLAIN)
def test_streamed_text_is_the_text_with_no_character_broken_or_held_back(text):
    stream, shown, fed = TextStream(TOK, skip_special_tokens=False), "", 0
    for token in TOK.encode(text, bos=False):
        shown += stream.push(token)
        fed += len(TOK.bytes[token])
        assert text.startswith(shown)                                      # so no U+FFFD but the text's own
        assert fed - len(shown.encode()) < len((text[len(shown):] or "x")[0].encode())   # not even one more
    assert shown == text and stream.flush() == ""


@given(st.lists(st.integers(0, len(TOK) - 1)))
def test_any_tokens_stream_to_what_utf8_makes_of_their_bytes(ids):
    pieces = [TOK.sp.id_to_piece(i) for i in ids if i not in TOK.special_tokens.values()]
    expected = b"".join(bytes.fromhex(p[3:5]) if re.fullmatch("<0x..>", p) else p.replace("▁", " ").encode()
                        for p in pieces).decode("utf-8", "replace")
    stream = TextStream(TOK)
    assert "".join([*map(stream.push, ids), stream.flush()]) == TOK.decode(ids) == expected


def test_a_bad_tokenizer_folder_is_named(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} has no tokenizer.model"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((OFFICIAL_DATA / "tokenizer.model").read_bytes()[:3000])
    with pytest.raises(InputError, match=f"{tmp_path}/tokenizer.model is not a sentencepiece model"):
        Tokenizer(tmp_path)
    shutil.copy(OFFICIAL_DATA / "tokenizer.model", tmp_path)
    for content, message in (("{", "not readable"), ('{"<img>": "x"}', "does not map"), ("[1]", "expected")):
        (tmp_path / "added_tokens.json").write_text(content)
        with pytest.raises(InputError, match=f"{tmp_path}.*{message}"):
            Tokenizer(tmp_path)


def test_what_the_tokenizer_cannot_express_is_an_error():
    with pytest.raises(InputError, match=f"{OFFICIAL_DATA} has no token <video>"):
        TOK.token_id("<video>")
    with pytest.raises(InputError, match="491 tokens.* has no id 491"):
        TOK.decode([491])
    with pytest.raises(InputError, match="not valid Unicode"):
        TOK.encode("\ud800")


# ---------------------------------------------------------------- chat template and labels

@pytest.mark.parametrize("case", CASES["conversations"], ids=range(len(CASES["conversations"])))
def test_prompts_ids_and_labels_are_the_official_ones(case):
    conversation = case["conversations"]
    assert chat_prompt(conversation) == case["prompt"]
    ids_and_labels = encode_conversation(TOK, conversation, case["tiles_per_image"], case["tokens_per_tile"])
    assert ids_and_labels == (case["input_ids"], case["labels"])


def test_a_prompt_for_generation_ends_with_the_opened_turn():
    assert chat_prompt(ask("<image>\nhi")) == CASES["generation_prompt"]


@given(st.lists(SPOKEN, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
def test_only_answers_and_their_ends_are_learned_and_a_prompt_is_a_prefix_of_training(texts):
    ids, labels = encode_conversation(TOK, ask(*texts))
    assert all(label in (token, IGNORED) for token, label in zip(ids, labels, strict=True))
    learned = TOK.decode([label for label in labels if label != IGNORED], skip_special_tokens=False)
    assert learned == "".join(answer.strip() + "<|im_end|>" for answer in texts[1::2])
    prompt, ignored = encode_conversation(TOK, ask(*texts[:-1]))
    assert ids[:len(prompt)] == prompt
    assert set(ignored) == {IGNORED}


def test_images_stand_where_their_marks_are_in_any_human_turn():
    conversation = ask("a <image> b", "see <image>?", "<image><image>", "yes")
    ids, _ = encode_conversation(TOK, conversation, tiles_per_image=[1, 2, 3], tokens_per_tile=4)
    text = TOK.decode(ids, skip_special_tokens=False)
    one, two, three = (f"<img>{'<IMG_CONTEXT>' * 4 * tiles}</img>" for tiles in (1, 2, 3))
    assert f"user\na {one} b<|im_end|>" in text and f"user\n{two}{three}<|im_end|>" in text
    assert "assistant\nsee <image>?<|im_end|>" in text                     # in an answer it is plain text


@pytest.mark.parametrize("conversation, message", [
    *((nothing, "expected a list of turns") for nothing in ([], None, {"from": "human", "value": "hi"})),
    (["hi"], "turn 1 .* is from None"), (ask("hi") * 2, "turn 2 .* is from 'human', expected \"gpt\""),
    ([{"from": "gpt", "value": "hi"}], "turn 1"), ([{"from": "system", "value": "hi"}], "from 'system'"),
    ([{"from": "human"}], "value None"), ([{"from": "human", "value": 3}], "value 3, expected text"),
    *((ask("hi", f"x{token}y"), f"turn 2 .* control token {re.escape(token)}") for token in data.RESERVED)])
def test_a_malformed_conversation_is_refused_with_its_turn(conversation, message):
    with pytest.raises(InputError, match=message):
        encode_conversation(TOK, conversation)
    with pytest.raises(InputError, match=message):
        chat_prompt(conversation)


@given(marks=st.integers(0, 3), images=st.integers(0, 3))
def test_marks_and_images_must_match_and_the_error_has_both_numbers(marks, images):
    conversation = ask("<image>" * marks, "ok")
    if marks == images:
        encode_conversation(TOK, conversation, [1] * images)
    else:
        with pytest.raises(InputError, match=f"has {marks} <image> marks for {images} images"):
            encode_conversation(TOK, conversation, [1] * images)


def test_a_tokenizer_without_image_tokens_takes_text_only(tmp_path):
    shutil.copy(OFFICIAL_DATA / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 480, "<|im_start|>": 481}')
    tok = Tokenizer(tmp_path)
    assert encode_conversation(tok, ask("hi", "ho")) == encode_conversation(TOK, ask("hi", "ho"))
    with pytest.raises(InputError, match="has no token <img>|has no token <IMG_CONTEXT>"):
        encode_conversation(tok, ask("<image>", "ho"), [1])


def test_a_tokenizer_folder_may_set_its_own_system_message_or_none(tmp_path):
    shutil.copytree(OFFICIAL_DATA, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for message in ("Look.", ""):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "system_message": message}))
        ids, _ = encode_conversation(Tokenizer(tmp_path), ask("hi"))
        assert ids == TOK.encode(chat_prompt(ask("hi"), system=message))
    assert chat_prompt(ask("hi"), "") == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\n"


# ---------------------------------------------------------------- pictures

@pytest.mark.parametrize("image_size", [28, 448])
def test_tilings_are_the_official_ones(image_size, monkeypatch):
    grids = []

    def resize(image, size, resample):             # only the sizes matter here; the real thing takes seconds
        grids.append((size[0] // image_size, size[1] // image_size))
        return Image.new("RGB", size)
    monkeypatch.setattr(Image.Image, "resize", resize)
    cases = [case for case in CASES["tiling"] if case["image_size"] == image_size]
    assert len(cases) == (138 if image_size == 28 else 46)
    for case in cases:
        image = Image.new("RGB", (case["width"], case["height"]))
        grids.clear()
        with_thumbnail = tile_image(image, case["max_num"], image_size)
        columns, rows = grids[0]
        assert {tile.size for tile in with_thumbnail} == {(image_size, image_size)}
        assert [columns, rows] == case.get("grid_columns_rows", [columns, rows])
        assert columns * rows == case.get("tiles", columns * rows)
        assert len(with_thumbnail) == case.get("tiles_with_thumbnail", columns * rows + (columns * rows > 1))
        assert len(tile_image(image, case["max_num"], image_size, use_thumbnail=False)) == columns * rows


def test_pixels_are_the_official_ones():
    case, expected = CASES["picture"], load_file(OFFICIAL_DATA / "picture_pixels.safetensors")["pixel_values"]
    pixels = load_image(OFFICIAL_DATA / case["file"], case["max_num"], case["image_size"])
    assert pixels.dtype == torch.float32 and len(pixels) == case["n_tiles"]
    # Below 4, float16 rounds by at most 2**-10; one grey level is 1 / 255 / 0.229 = 0.017: no pixel differs.
    assert_close(pixels, expected.float(), atol=2 ** -10, rtol=0)
    assert torch.equal(pixels, load_image(Image.open(PICTURE), 6, 56))


def test_tiles_come_row_by_row_and_the_thumbnail_last():
    image, colours = Image.new("RGB", (56, 84)), [(40 * i, 0, 255) for i in range(6)]
    for i, colour in enumerate(colours):
        image.paste(colour, (i % 2 * 28, i // 2 * 28, i % 2 * 28 + 28, i // 2 * 28 + 28))
    *tiles, thumbnail = tile_image(image, max_tiles=6, image_size=28)
    assert [tile.getpixel((14, 14)) for tile in tiles] == colours
    assert thumbnail.getpixel((2, 2)) == colours[0] and thumbnail.getpixel((25, 25)) == colours[5]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "I", "F"])
def test_pictures_of_any_mode_are_read_as_convert_rgb_reads_them(mode):
    image = Image.open(PICTURE).convert("L" if mode in ("I;16", "I", "F") else "RGB").convert(mode)
    assert torch.equal(load_image(image, 6, 56), load_image(image.convert("RGB"), 6, 56))


def test_exif_rotation_is_ignored_like_in_the_official_code(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6                               # orientation: turn by 90 degrees
    Image.open(PICTURE).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(load_image(tmp_path / "turned.png", 6, 56), load_image(PICTURE, 6, 56))


def png(width: int, height: int) -> bytes:
    """A PNG of 60 bytes that says it is that large."""
    def chunk(content):
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    header = chunk(b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT" + zlib.compress(b"")) + chunk(b"IEND")


def write_bad_images(folder: Path) -> dict[str, str]:
    """One file for each way to be bad; name -> what the error says."""
    picture, jpeg = Path(PICTURE).read_bytes(), io.BytesIO()
    Image.open(PICTURE).convert("RGB").save(jpeg, "JPEG")
    contents = {"empty.png": b"", "text.png": b"hello", "cut.png": picture[:2000], "header.png": picture[:40],
                "cut.jpg": jpeg.getvalue()[:1000], "flipped.png": picture[:200] + b"????" + picture[204:]}
    bombs = {"large.png": png(10_000, 10_000), "huge.png": png(100_000, 100_000)}  # Pillow warns, refuses
    for name, content in {**contents, **bombs}.items():
        (folder / name).write_bytes(content)
    (folder / "folder.png").mkdir()
    return {**dict.fromkeys([*contents, "folder.png"], "is not a readable image"),
            **dict.fromkeys(bombs, "DecompressionBomb|is 10000 x 10000 pixels"), "none.png": "does not exist"}


@pytest.mark.parametrize("filter_", ["ignore", "error"])
def test_a_bad_image_file_is_one_error_with_its_name_whatever_the_warning_filter(tmp_path, filter_):
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter(filter_, Image.DecompressionBombWarning)
        filters = list(warnings.filters)
        for name, message in write_bad_images(tmp_path).items():
            with pytest.raises(InputError, match=f"{tmp_path / name} .*({message})"):
                load_image(tmp_path / name)
        assert (warnings.filters, Image.MAX_IMAGE_PIXELS) == (filters, limit)


def test_an_empty_picture_or_no_tiles_are_errors():
    with pytest.raises(InputError, match="0 x 5 pixels"):
        load_image(Image.new("RGB", (0, 5)))
    with pytest.raises(InputError, match="max_tiles 0"):
        load_image(PICTURE, max_tiles=0)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")     # pytest undid data.py's filter
def test_threads_see_bombs_and_good_pictures_apart(tmp_path):
    write_bad_images(tmp_path)

    def kind(path):
        try:
            return load_image(path, 6, 56).shape[0]
        except InputError:
            return "bad"
    with ThreadPoolExecutor(8) as pool:
        kinds = list(pool.map(kind, [tmp_path / "large.png", PICTURE, tmp_path / "huge.png"] * 20))
    assert kinds == ["bad", 3, "bad"] * 20


# ---------------------------------------------------------------- training samples from files

def write_meta(folder: Path, datasets: dict[str, list], **entry) -> Path:
    """meta.json, a JSONL file for each dataset (its lines: objects, or text as it is) and img/a.png."""
    (folder / "img").mkdir(exist_ok=True)
    shutil.copy(PICTURE, folder / "img/a.png")
    for name, lines in datasets.items():
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    entry = {"root": "img", "repeat_time": 1, **entry}
    meta = {name: {"annotation": f"{name}.jsonl", **entry} for name in datasets}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def test_datasets_give_what_their_lines_say(tmp_path):
    one, two, text = ask("<image>\nWhat?", "A car."), ask("<image> <image>", "Twice."), ask("你好", "hi")
    meta = write_meta(tmp_path, {"pictures": [{"id": 7, "image": "a.png", "conversations": one},
                                              {"id": 8, "image": ["a.png", "a.png"], "conversations": two}],
                                 "texts": [{"id": "t", "conversations": text}, "", " ",
                                           {"image": [], "conversations": text}]},
                      max_dynamic_patch=3, data_augment=False)
    samples = load_meta(meta, TOK, SMALL)
    assert [samples[i]["id"] for i in range(len(samples))] == [7, 8, "t", f"{tmp_path}/texts.jsonl:4"]
    # images of one sample share the budget: 3 tiles for one, 1 for each of two
    for i, (turns, images, budget) in enumerate([(one, 1, 3), (two, 2, 1), (text, 0, 3), (text, 0, 3)]):
        tiles = [load_image(PICTURE, budget, 56)] * images
        ids, labels = encode_conversation(TOK, turns, [len(t) for t in tiles], SMALL.tokens_per_tile)
        assert (samples[i]["input_ids"].tolist(), samples[i]["labels"].tolist()) == (ids, labels)
        pixels = samples[i]["pixel_values"]
        assert torch.equal(pixels, torch.cat(tiles)) if images else pixels is None


def test_repeat_time_repeats_and_a_fraction_is_a_seeded_subset(tmp_path):
    write_meta(tmp_path, {"a": [{"id": i, "conversations": ask("a", "b")} for i in range(20)]})

    def ids(repeat_time, seed=0):
        samples = JsonlDataset(tmp_path / "a.jsonl", tmp_path, TOK, SMALL, repeat_time, seed=seed)
        return [samples[i]["id"] for i in range(len(samples))]
    assert ids(3) == list(range(20)) * 3
    assert len(set(ids(0.3))) == len(ids(0.3)) == 6 and ids(0.3) == ids(0.3) != ids(0.3, seed=1)
    assert ids(1.5)[:20] == list(range(20)) and len(set(ids(1.5)[20:])) == 10


def test_datasets_in_one_meta_file_keep_their_own_repeat_time(tmp_path):
    meta = write_meta(tmp_path, {name: [{"id": name, "conversations": ask("a", "b")}] * 4 for name in "xy"})
    entries = json.loads(meta.read_text())
    entries["x"]["repeat_time"], entries["y"]["repeat_time"] = 2, 0.5
    meta.write_text(json.dumps(entries))
    samples = load_meta(meta, TOK, SMALL)
    assert [samples[i]["id"] for i in range(len(samples))] == list("xxxxxxxxyy")


@pytest.mark.parametrize("line, message", [
    ("{bad", "not JSON"), ("1" * 5000, "not JSON"), ("[" * 100_000, "not JSON"), ("[1]", "is not an object"),
    ({"id": 1}, "expected a list of turns"), ({"conversations": ask("a")}, "no answer to learn"),
    ({"conversations": ask("\ud800", "b")}, "not valid Unicode"),
    ({"conversations": ask("a " * 600, "b")}, "tokens, the limit is 512"),
    ({"image": 3, "conversations": ask("<image>", "b")}, "image is 3"),
    ({"image": "a.png", "conversations": ask("a", "b")}, "0 <image> marks for 1 images"),
    ({"image": "a.png", "conversations": ask("<image><image>", "b")}, "2 <image> marks for 1 images"),
    ({"image": "none.png", "conversations": ask("<image>", "b")}, "none.png does not exist"),
    ({"image": "nul\0.png", "conversations": ask("<image>", "b")}, "is no file name"),
    ({"image": "../outside.png", "conversations": ask("<image>", "b")}, "leads out of the image folder"),
    ({"image": PICTURE, "conversations": ask("<image>", "b")}, "leads out of the image folder"),
    ({"image": "link.png", "conversations": ask("<image>", "b")}, "leads out of the image folder"),
    ({"image": "linked/picture.png", "conversations": ask("<image>", "b")}, "leads out of the image folder")])
def test_a_bad_line_is_named_by_file_and_number_and_the_others_still_load(tmp_path, line, message):
    good = {"conversations": ask("a", "b")}
    meta = write_meta(tmp_path, {"a": [good, "", line, good]})
    shutil.copy(PICTURE, tmp_path / "outside.png")
    os.symlink(PICTURE, tmp_path / "img/link.png")
    os.symlink(OFFICIAL_DATA, tmp_path / "img/linked")
    samples = load_meta(meta, TOK, SMALL)
    with pytest.raises(InputError, match=f"{tmp_path}/a.jsonl:3: .*{message}"):
        samples[1]
    assert torch.equal(samples[0]["input_ids"], samples[2]["input_ids"])


@pytest.mark.parametrize("entry, message", [
    *(({"repeat_time": value}, "repeat_time .* expected a positive number") for value in (0, -1, "2", True)),
    ({"repeat_time": 0.001}, "no samples"), ({"annotation": "none.jsonl"}, "none.jsonl is not readable"),
    ({"root": "none"}, "image folder .*none"), ({"root": None}, "dataset a needs root"),
    ({"max_dynamic_patch": 0}, "max_dynamic_patch"), ({"repeat": 2}, "unknown field repeat"),
    ({"data_augment": "yes"}, "data_augment is 'yes', expected true or false"),
    ({"annotation": []}, "needs root"), ({"annotation": "none-*.tar"}, "no file is called .*none-\\*.tar"),
    ({"annotation": ["none.tar"]}, "none.tar is no complete, uncompressed .tar")])
def test_a_bad_meta_file_is_refused_before_training(tmp_path, entry, message):
    meta = write_meta(tmp_path, {"a": [{"conversations": ask("a", "b")}]}, **entry)
    with pytest.raises(InputError, match=message):
        load_meta(meta, TOK, SMALL)
    for content in ("", "{}", "[]", '{"a": 3}'):
        meta.write_text(content)
        with pytest.raises(InputError, match=str(meta)):
            load_meta(meta, TOK, SMALL)


@law
@given(st.lists(st.sampled_from(["\n", " ", "\r\n", "\t", "{}", "[1]"]), max_size=12).map("".join),
       st.integers(1, 9))
def test_line_numbers_and_offsets_do_not_depend_on_the_blocks_they_are_read_in(text, block):
    dataset = JsonlDataset.__new__(JsonlDataset)
    with tempfile.NamedTemporaryFile() as f:
        f.write(text.encode())
        f.flush()
        dataset.annotation, dataset.BLOCK_SIZE = f.name, block
        places = dataset.find_samples().tolist()
    lines = text.encode().split(b"\n")
    offsets = itertools.accumulate([0, *(len(line) + 1 for line in lines[:-1])])
    assert places == [[i, at] for i, (line, at) in enumerate(zip(lines, offsets, strict=True), 1)
                      if line.strip()]


def test_a_large_file_is_indexed_in_blocks_and_not_held_in_memory(tmp_path):
    """10 M lines open in seconds and in megabytes because no line becomes a Python object."""
    n, line = 20_000, json.dumps({"conversations": ask("a" * 700, "b")}).encode()
    (tmp_path / "a.jsonl").write_bytes(b"".join(b"%d %s\n" % (i, line) for i in range(n)))
    tracemalloc.start()
    try:
        samples = JsonlDataset(tmp_path / "a.jsonl", tmp_path, TOK, SMALL)
        held, peak = tracemalloc.get_traced_memory()
        objects = sum(s.count for s in tracemalloc.take_snapshot().statistics("filename"))
    finally:
        tracemalloc.stop()
    size = os.path.getsize(tmp_path / "a.jsonl")
    assert len(samples) == n and held < 20 * n + 50_000 and peak < size / 2 and objects < 1000
    with pytest.raises(InputError, match="a.jsonl:15001: not JSON"):
        samples[15_000]


def test_data_augment_is_jpeg_of_each_tile_drawn_by_seed_and_sample(tmp_path):
    meta = write_meta(tmp_path, {"a": [{"image": "a.png", "conversations": ask("<image>", "b")}] * 8},
                      data_augment=True)
    drawn = [load_meta(meta, TOK, SMALL, seed=seed)[i]["pixel_values"]
             for seed in (0, 0, 1) for i in range(8)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[:8], drawn[8:16], strict=True))
    quality_of = {}                                # pixels of a tile -> the quality of JPEG that gives them
    for tile, quality in itertools.product(tile_image(PICTURE, 6, 56), range(75, 101)):
        tile.save(file := io.BytesIO(), "JPEG", quality=quality)
        quality_of[load_image(Image.open(file), 1, 56).numpy().tobytes()] = quality
    found = [[quality_of[tile.numpy().tobytes()] for tile in pixels] for pixels in drawn]
    assert found[:8] != found[16:] and len(set(map(tuple, found[:8]))) > 4 and len({*sum(found, [])}) > 9


def write_shard(path: Path, files: dict[str, bytes], **options) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            member.size = len(content or b"")
            tar.addfile(member, io.BytesIO(content or b""))
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_shards_give_what_the_same_lines_give(format, tmp_path):
    picture, small = Path(PICTURE).read_bytes(), io.BytesIO()
    Image.open(PICTURE).resize((40, 90)).save(small, "PNG")
    lines = [{"id": 5, "image": "a.png", "conversations": ask("<image>\nWhat?", "A car.")},
             {"id": "two", "image": ["a.png", "b.png"], "conversations": ask("<image> <image>", "Twice.")},
             {"id": "t", "conversations": ask("hi", "ho")},
             {"id": "c", "image": "b.png", "conversations": ask("<image>", "a small car")}]
    meta = write_meta(tmp_path, {"lines": lines})
    (tmp_path / "img/b.png").write_bytes(small.getvalue())
    expected = load_meta(meta, TOK, SMALL)
    long = "" if format == tarfile.USTAR_FORMAT else "long" * 80           # a header of several blocks
    write_shard(tmp_path / "s-000.tar", {
        "part": None, "part/0001.png": picture, "part/0001.json": json.dumps(lines[0]).encode(),
        f"part/{long}2.json": json.dumps(lines[1]).encode(), f"part/{long}2.0.png": picture,
        f"part/{long}2.1.png": small.getvalue()}, format=format)
    write_shard(tmp_path / "s-001.tar", {
        f"part/{long}2.json": json.dumps(lines[2]).encode(), "0001.txt": b"a small car",
        "0001.json": b'{"width": 40}', "0001.png": small.getvalue()}, format=format)
    for annotation in ("s-{000..001}.tar", "s-*.tar", ["s-000.tar", "s-001.tar"]):
        meta.write_text(json.dumps({"s": {"annotation": annotation, "repeat_time": 1.5}}))
        samples = load_meta(meta, TOK, SMALL)
        assert len(samples) == 6
        for i, caption_id in enumerate([None, None, None, f"{tmp_path}/s-001.tar: 0001"]):
            ours, theirs = samples[i], expected[i]
            assert ours["id"] == (caption_id or theirs["id"])
            assert ours["input_ids"].tolist() == theirs["input_ids"].tolist()
            assert ours["labels"].tolist() == theirs["labels"].tolist()
            if theirs["pixel_values"] is None:
                assert ours["pixel_values"] is None
            else:
                assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


def test_a_cut_or_packed_shard_is_refused_and_a_bad_sample_in_one_is_named(tmp_path):
    good = {"1.txt": b"a car", "1.png": Path(PICTURE).read_bytes()}
    shard = write_shard(tmp_path / "a.tar", {**good, "2.png": good["1.png"], "3.txt": b"a",
                                             "3.png": b"no", "4.txt": b"\xff", "4.png": good["1.png"],
                                             "5.json": b"{"})
    samples = data.TarDataset([str(shard)], TOK, SMALL)
    assert len(samples) == 5 and len(samples[0]["pixel_values"]) == 3
    for i, message in ((1, "a.tar: 2: not JSON"), (2, "a.tar: 3: .* not a readable image"),
                       (3, "a.tar: 4: .* not valid Unicode"), (4, "a.tar: 5: not JSON")):
        with pytest.raises(InputError, match=message):
            samples[i]
    content = shard.read_bytes()
    end = len(content.rstrip(b"\0"))
    for size in (0, 100, 512, 700, 1024, 1030, 20_000, end - end % 512, end - end % 512 + 512):
        shard.write_bytes(content[:size])
        with pytest.raises(InputError, match="a.tar is no complete, uncompressed .tar"):
            data.TarDataset([str(shard)], TOK, SMALL)
    for size in (100, 2000):
        shard.write_bytes(content[:size])
        with pytest.raises(InputError, match="a.tar is not readable any more"):
            samples[0]
    shard.write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match="a.tar is no complete, uncompressed .tar"):
        data.TarDataset([str(shard)], TOK, SMALL)


# ---------------------------------------------------------------- collation and flags

def test_batches_are_padded_on_the_side_asked_for_and_only_if_needed():
    def row(n, tiles):
        pixels = torch.full((tiles, 3, 2, 2), float(n)) if tiles else None
        return {"input_ids": torch.arange(1, n + 1), "labels": torch.arange(1, n + 1), "pixel_values": pixels}
    rows = [row(2, 1), row(4, 0), row(3, 2)]
    right, left = collate(rows, pad_token_id=9), collate(rows, pad_token_id=9, left=True)
    assert right["input_ids"].tolist() == [[1, 2, 9, 9], [1, 2, 3, 4], [1, 2, 3, 9]]
    assert right["labels"].tolist() == [[1, 2, -100, -100], [1, 2, 3, 4], [1, 2, 3, -100]]
    assert right["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert left["input_ids"].tolist() == [[9, 9, 1, 2], [1, 2, 3, 4], [9, 1, 2, 3]]
    assert left["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]
    assert right["pixel_values"][:, 0, 0, 0].tolist() == [2, 3, 3]         # all rows' tiles, in order
    even = collate([row(2, 0), row(2, 0)])
    assert even["attention_mask"] is None and even["pixel_values"] is None


@dataclass
class Flags:
    steps: int = flag(3, "how many, 100% of them")
    lr: float = 1e-3
    compile: bool = True
    top_k: int | None = None
    image: list[str] = flag([], "files")
    moe: str = flag("auto", "back end", choices=["auto", "dense"])


def test_flags_keep_types_and_booleans_can_be_switched_off():
    assert parse_flags(Flags, []) == Flags(3, 1e-3, True, None, [], "auto")
    argv = "--steps=4 --lr 1 --no-compile --top_k 5 --image a b --moe dense".split()
    assert parse_flags(Flags, argv) == Flags(4, 1.0, False, 5, ["a", "b"], "dense")


@pytest.mark.parametrize("argv, message", [
    ("--setps 4", "unknown argument --setps; did you mean --steps?"), ("--step 4", "did you mean --steps?"),
    ("--top-k=4", "unknown argument --top-k; did you mean --top_k?"), ("--xyz", "unknown argument --xyz\n"),
    ("--steps x", "invalid int value"), ("--moe fast", "invalid choice")])
def test_a_wrong_flag_exits_with_2_and_the_nearest_name(argv, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_flags(Flags, argv.split())
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_help_lists_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        parse_flags(Flags, ["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for line in ("how many, 100% of them (default: 3)", "--lr LR lr (default: 0.001)", "--no-compile",
                 "top_k (default: None)", "files (default: [])", "{auto,dense}"):
        assert line in text


# ---------------------------------------------------------------- packing and order

def text_samples(lengths, seed=0):
    """Samples of text, every token supervised, the first as well: nothing may predict it. The id is the
    number."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, IMG, (n,), generator=g) for n in lengths]
    return [{"input_ids": row, "labels": row.clone(), "pixel_values": None, "id": i}
            for i, row in enumerate(rows)]


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("experts", ["", "qkvo"])
def test_a_packed_sample_is_as_if_alone_and_changing_its_neighbour_leaves_it_bitwise(
        experts, rope, monkeypatch):
    """Logits, loss and gradients of samples with images, packed in two rows that no context would hold; the
    longest one stretches the base of dynamic RoPE, for itself alone."""
    model = tiny(experts, max_position_embeddings=8, rope_scaling=ROPE[rope])
    samples = text_samples([12, 3, 7] if rope != "none" else [8, 3, 7], seed=1)
    for visual in (samples[0], samples[2]):
        visual["input_ids"][1:4] = IMG
        visual["labels"][1:5] = IGNORED
        visual["pixel_values"] = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(len(visual)))
    rows = [pack(samples), pack(samples[1:])]
    batch = collate(rows)
    labels, ids = batch.pop("labels"), batch["document_ids"]
    assert ids[1].tolist() == [1] * 3 + [2] * 7 + [0] * (ids.shape[1] - 10)
    positions, tables = [], mono_internvl.rope_tables
    with monkeypatch.context() as patch:           # RoPE is relative: only the tables show where it starts
        patch.setattr(mono_internvl, "rope_tables", lambda c, p, *rest: (positions.append(p),
                                                                          tables(c, p, *rest))[1])
        logits = model(**batch)[0]
    lengths = [len(s["input_ids"]) for s in samples]
    assert positions[0][0].tolist() == [i for n in lengths for i in range(n)]
    alone = [model(s["input_ids"][None], s["pixel_values"])[0][0] for s in samples]
    for row, documents in ((0, alone), (1, alone[1:])):
        for i, expected in enumerate(documents, 1):
            assert_close(logits[row][ids[row] == i], expected, rtol=1e-4, atol=1e-5)
    # the loss of the samples one by one, weighted by their supervised tokens, and its gradients
    packed = model(**batch, labels=labels)[1]
    single = [model(s["input_ids"][None], s["pixel_values"], labels=s["labels"][None])[1] for s in samples]
    counts = [int((s["labels"][1:] != IGNORED).sum()) for s in samples]
    weights = [counts[0], 2 * counts[1], 2 * counts[2]]
    expected = sum(w * loss for w, loss in zip(weights, single, strict=True)) / sum(weights)
    assert_close(packed, expected, rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(gradients(model, packed).items(), gradients(model, expected).values(),
                                    strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    for changed in range(3):                       # other tokens and pixels in one of them: the rest stays
        others = [{**s} for s in samples]
        others[changed]["input_ids"] = samples[changed]["input_ids"].clone()
        others[changed]["input_ids"][-2:] = 5 + changed
        if samples[changed]["pixel_values"] is not None:
            others[changed]["pixel_values"] = samples[changed]["pixel_values"] * 1000
        new = collate([pack(others), pack(others[1:])])
        del new["labels"]
        new = model(**new)[0]
        same = ids[0] != changed + 1
        assert torch.equal(new[0][same], logits[0][same]) and not torch.equal(new[0], logits[0])
    with pytest.raises(InputError, match="17 tokens do not fit the context"):
        model(torch.zeros(1, 20, dtype=torch.int64), document_ids=torch.tensor([[1] * 17 + [2] * 3]))


def write_bad_samples(folder: Path, good: int, bad_of_each: int) -> tuple[Path, set[str]]:
    """meta.json of one file with bad lines of ten kinds among the good ones, and the bad ones' names."""
    picture = Path(PICTURE).read_bytes()
    (folder / "img").mkdir()
    (folder / "img/good.png").write_bytes(picture)
    (folder / "img/cut.png").write_bytes(picture[:len(picture) // 2])
    (folder / "img/text.png").write_bytes(b"no picture")
    (folder / "img/empty.png").write_bytes(b"")
    (folder / "img/folder.png").mkdir()

    def line(image, turns):
        return json.dumps({"image": image, "conversations": turns}).encode()
    pair = ask("<image>", "b")
    kinds = [b'{"id": 1, "conversations": [{"fr', b"\xff\xfe\x00", b"null", line([], ask("b " * 600, "c")),
             line([], ask("only a question")), line("good.png", ask("no mark", "b")), line("cut.png", pair),
             line("text.png", pair), line("empty.png", pair), line("folder.png", pair)]
    lines = [(line([], ask(f"{i}", "b" * (i % 9))), False) for i in range(good)]
    lines += [(kind, True) for kind in kinds] * bad_of_each
    random.Random(0).shuffle(lines)
    (folder / "a.jsonl").write_bytes(b"\n".join(content for content, _ in lines))
    (folder / "meta.json").write_text(json.dumps({"a": {"root": "img", "annotation": "a.jsonl"}}))
    return folder / "meta.json", {f"{folder}/a.jsonl:{i}" for i, (_, bad) in enumerate(lines, 1) if bad}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_bad_samples_of_ten_kinds_are_all_named_once_and_the_others_all_given(tmp_path):
    meta, bad = write_bad_samples(tmp_path, good=80, bad_of_each=2)
    samples, named, given = load_meta(meta, TOK, SMALL, max_tokens=256), [], set()
    batches = Batches(samples, 2, 0, max_bad=0.2, pack_tokens=256, workers=2, pool=2,
                      on_bad=lambda i, error: named.append(error.split(": ")[0]))
    for batch in batches:
        given.update(batch["ids"])
        if batches.seen > 2.5 * len(samples):      # two epochs, and what waits in the buffer
            break
    assert sorted(named) == sorted(bad) and len(batches.bad) == 20
    assert given == {f"{tmp_path}/a.jsonl:{i}" for i in range(1, 101)} - bad
    with pytest.raises(InputError, match=r"11 of \d+ samples are unreadable; --max_bad 0.1 allows fewer"):
        list(itertools.islice(Batches(samples, 2, 0, max_bad=0.1, on_bad=lambda *_: None), 100))
    only_bad = torch.utils.data.Subset(samples, [int(name.split(":")[1]) - 1 for name in bad])
    with pytest.raises(InputError, match="20 samples in a row are unreadable"):
        next(iter(Batches(only_bad, 1, 0, max_bad=1)))


def drawn(batches, n) -> list[list]:
    """The ids of the next n batches."""
    return [batch["ids"] for batch in itertools.islice(batches, n)]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_ranks_and_workers_share_one_seeded_order_without_gap_or_overlap():
    samples = text_samples([3] * 10)

    def ids(n, size, **options):
        return list(itertools.chain(*drawn(Batches(samples, size, 0, pool=1, **options), n)))
    one = ids(15, 2)
    assert [sorted(one[i:i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3      # three epochs
    assert one[:10] != one[10:20] != one[20:] != sorted(one[20:]) and ids(5, 2, seed=1) != one[:10]
    assert ids(15, 2, workers=2) == one
    # 3 ranks with 2 each are 1 process with 6: position k of the order is rank k % 3's, across epochs
    ranks = [ids(5, 2, rank=r, world_size=3) for r in range(3)]
    assert [list(group) for group in zip(*ranks, strict=True)] == [one[i:i + 3] for i in range(0, 30, 3)]
    pools = drawn(Batches(text_samples(range(1, 33)), 4, 0), 8)
    assert sorted(itertools.chain(*pools)) == list(range(32))
    assert all(max(group) - min(group) == 3 for group in pools) and pools != sorted(pools)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("pack_tokens", [None, 24])
def test_a_saved_order_goes_on_bitwise_with_pool_and_packing_buffer(pack_tokens):
    samples = text_samples([random.Random(i).randrange(1, 24) for i in range(60)])
    samples[7]["input_ids"] = torch.zeros(30, dtype=torch.int64)           # too long for a packed row

    def batches(**changes):
        return Batches(samples, **{"batch_size": 3, "pad_token_id": 0, "pool": 4, "pack_tokens": pack_tokens,
                                   "max_bad": 1, "rank": 1, "world_size": 2, **changes})
    whole = list(itertools.islice(batches(), 30))
    interrupted = batches(workers=2)
    source, given = iter(interrupted), 0
    for done, workers in ((0, 0), (3, 2), (17, 0)):
        while given < done:
            next(source)
            given += 1
        state = json.loads(json.dumps(interrupted.state_dict()))
        resumed = batches(workers=workers)
        resumed.load_state_dict(state)
        for old, new in zip(whole[done:done + 10], resumed, strict=False):
            assert old["ids"] == new["ids"] and torch.equal(old["input_ids"], new["input_ids"])
    assert list(resumed.bad) == ([7] if pack_tokens else [])
    for name, value in (("world_size", 4), ("batch_size", 2), ("pack_tokens", 99)):
        with pytest.raises(InputError, match=f"saved with {name} = .* now it is {value}"):
            batches(**{name: value}).load_state_dict(state)


def test_packing_loses_nothing_and_fills_rows_of_mixed_lengths_above_90_percent():
    rng = random.Random(0)
    samples = text_samples([min(1024, int(rng.lognormvariate(4.5, 1))) for _ in range(2000)])
    source, given, heads = Batches(samples, 4, 0, pack_tokens=1024), [], []
    for batch in itertools.islice(source, 40):
        heads += [batch["ids"][n] for n in itertools.accumulate([0, *batch["document_ids"].amax(1)[:-1]])]
        given += batch["ids"]
        assert batch["input_ids"].shape[0] == 4 and batch["input_ids"].shape[1] <= 1024
        lengths = torch.cat([row.bincount()[1:] for row in batch["document_ids"]])
        assert lengths.tolist() == [len(samples[i]["input_ids"]) for i in batch["ids"]]
        assert torch.equal(batch["input_ids"][batch["document_ids"] > 0],
                           torch.cat([samples[i]["input_ids"] for i in batch["ids"]]))
    real = sum(len(samples[i]["input_ids"]) for i in given)
    assert source.utilisation == real / (40 * 4 * 1024) > 0.98
    # all that was drawn, in the order of unpacked batches, was given or waits
    order = list(itertools.chain(*drawn(Batches(samples, 1, 0, pool=1), source.seen)))
    assert sorted(given + [waiting.index for waiting in source.buffer]) == sorted(order)
    # none waits for ever: a row begins with the sample that was drawn first
    assert (drawn_at := [order.index(i) for i in heads]) == sorted(drawn_at)


# ---------------------------------------------------------------- sample.py

@pytest.fixture(scope="session")
def saved_model(tmp_path_factory) -> str:
    """A checkpoint folder with random weights and the official tokenizer's files."""
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    MonoInternVL(SMALL).save_pretrained(folder)
    for name in ("tokenizer.model", "added_tokens.json", "tokenizer_config.json"):
        shutil.copy(OFFICIAL_DATA / name, folder)
    return str(folder)


def script(monkeypatch, *answers: str | list):
    """Makes generate write these answers, one a call, up to an end token (exceptions in them are raised).
    Returns what it was asked: (input_ids, number of tiles) of each call."""
    prompts, answers = [], iter(answers)

    def generate(self, input_ids, pixel_values=None, eos_token_id=(), **kwargs):
        prompts.append((input_ids[0].tolist(), 0 if pixel_values is None else len(pixel_values)))
        answer = next(answers)
        for token in TOK.encode(answer, bos=False) if isinstance(answer, str) else answer:
            if not isinstance(token, int):
                raise token
            yield torch.tensor([token])
            if token in eos_token_id:
                return
    monkeypatch.setattr(MonoInternVL, "generate", generate)
    return prompts


def type_in(monkeypatch, *lines: str):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))


@pytest.mark.parametrize("images", [0, 1, 2])
def test_the_answer_is_what_the_model_generates(saved_model, images, capsys):
    argv = ["--model", saved_model, "--prompt", "What?", "--max_new_tokens", "12"]
    assert sample.main(argv + (["--image"] + [PICTURE] * images if images else [])) == 0
    marks = ["", "<image>\n", "Image-1: <image>\nImage-2: <image>\n"][images]
    ids, _ = encode_conversation(TOK, ask(marks + "What?"), [3] * images, SMALL.tokens_per_tile)
    pixels = torch.cat([load_image(PICTURE, 6, 56)] * images) if images else None
    model, end = MonoInternVL.from_pretrained(saved_model), TOK.token_id("<|im_end|>")
    tokens = model.generate(torch.tensor([ids]), pixels, max_new_tokens=12, eos_token_id=end)
    ids = [token.item() for token in tokens]
    ids = ids[:-1] if ids[-1] == end else ids
    assert capsys.readouterr().out == TOK.decode(ids, skip_special_tokens=False) + "\n"


@pytest.mark.parametrize("prompt, images, expected", [
    ("What?", 0, "What?"), ("What?", 1, "<image>\nWhat?"), ("<image> or <image>?", 2, "<image> or <image>?"),
    ("What?", 2, "Image-1: <image>\nImage-2: <image>\nWhat?")])
def test_images_without_marks_come_before_the_question(saved_model, monkeypatch, prompt, images, expected):
    prompts = script(monkeypatch, "ok")
    argv = ["--model", saved_model, "--prompt", prompt]
    sample.main(argv + (["--image"] + [PICTURE] * images if images else []))
    ids, _ = encode_conversation(TOK, ask(expected), [3] * images, SMALL.tokens_per_tile)
    assert prompts == [(ids, 3 * images)]


def test_sampling_follows_the_seed(saved_model, capsys):
    answers, argv = [], f"--model {saved_model} --prompt hi --temperature 2 --max_new_tokens 30 --seed".split()
    for seed in "112":
        sample.main([*argv, seed])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]


def test_an_answer_stops_at_the_end_of_its_turn_or_of_the_text(saved_model, monkeypatch, capsys):
    script(monkeypatch, "ü<|im_end|>x", "ü</s>x", TOK.encode("ü", bos=False)[:1])
    for answer in ("ü", "ü", "\ufffd"):    # the last was cut inside a character
        assert sample.main(["--model", saved_model, "--prompt", "hi"]) == 0
        assert capsys.readouterr().out == answer + "\n"


def test_images_join_any_turn_of_a_chat_and_clear_starts_over(saved_model, monkeypatch, capsys):
    type_in(monkeypatch, "hi", f'/image "{PICTURE}" {PICTURE}', "and?", "", "more", f"/image {PICTURE}",
            "/clear", "new", "/exit", "unread")
    prompts = script(monkeypatch, "ho", "two", "three", "four")
    assert sample.main(["--model", saved_model, "--max_tiles", "1"]) == 0
    turns = ["hi", "ho", "Image-1: <image>\nImage-2: <image>\nand?", "two", "more"]
    expected = [(turns[:1], []), (turns[:3], [1, 1]), (turns, [1, 1]), (["new"], [])]
    assert prompts == [(encode_conversation(TOK, ask(*turns), tiles, SMALL.tokens_per_tile)[0], sum(tiles))
                       for turns, tiles in expected]
    assert capsys.readouterr().out == "ho\ntwo\nthree\nfour\n"


def test_a_mistake_in_a_chat_costs_one_message_only(saved_model, monkeypatch, capsys):
    type_in(monkeypatch, "/image none.png", '/image "a', "<image> too many", "x " * 600, "hi")
    prompts = script(monkeypatch, [InputError("the prompt fills the context")], "ho")
    assert sample.main(["--model", saved_model]) == 0
    out, err = capsys.readouterr()
    assert out == "ho\n" and len(prompts) == 2 and prompts[1] == (encode_conversation(TOK, ask("hi"))[0], 0)
    assert re.findall("error: (.{10})", err) == ["the image ", "No closing", "the conver", "the prompt"]


def test_ctrl_c_stops_an_answer_and_at_the_prompt_ends_the_chat(saved_model, monkeypatch, capsys):
    class Keyboard(io.StringIO):
        def readline(self, *args):
            line = super().readline(*args)
            if not line:
                raise KeyboardInterrupt
            return line
    monkeypatch.setattr(sys, "stdin", Keyboard("hi\ngo on\n"))
    prompts = script(monkeypatch, [*TOK.encode("half", bos=False), KeyboardInterrupt()], "ho")
    assert sample.main(["--model", saved_model]) == 0
    assert capsys.readouterr().out == "half\nho\n"
    assert prompts[1] == (encode_conversation(TOK, ask("hi", "half", "go on"))[0], 0)


@pytest.mark.parametrize("argv, message", [
    ("--image none.png", "none.png does not exist"), ("--image cut.png", "cut.png is not a readable image"),
    ("--image huge.png", "huge.png is not a readable image: DecompressionBombError"),
    ("--prompt <image>", "1 <image> marks for 0 images"),
    ("--image ok.png --prompt <image><image>", "2 <image> marks for 1 images"),
    ("--image ok.png ok.png --prompt <image>", "1 <image> marks for 2 images"),
    ("--prompt <IMG_CONTEXT>", "control token <IMG_CONTEXT>"), ("--prompt \udcff", "not valid Unicode"),
    ("--prompt long", "fills the context of 512"), ("--device abacus", "abacus: torch has no such device"),
    ("--model none", "none/config.json does not exist"), ("--model bare", "bare has no tokenizer.model"),
    ("--model cut", "model.safetensors is damaged"), ("--model small", "491 tokens, the model 488"),
    ("--temperature -1", "temperature is -1.0"), ("--temperature nan", "temperature is nan"),
    ("--top_p 0", "top_p is 0.0"), ("--top_k 0", "top_k is 0"),
    ("--image ok.png --max_tiles 0", "max_tiles is 0")])
def test_bad_input_is_one_line_on_stderr_and_exit_1(saved_model, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    write_bad_images(tmp_path)
    shutil.copy(PICTURE, "ok.png")
    for name in ("bare", "cut"):
        shutil.copytree(saved_model, name)
    os.remove("bare/tokenizer.model")
    Path("cut/model.safetensors").write_bytes(Path("cut/model.safetensors").read_bytes()[:5000])
    if "small" in argv:
        MonoInternVL(replace(SMALL, vocab_size=488)).save_pretrained("small")
        shutil.copytree(OFFICIAL_DATA, "small", dirs_exist_ok=True)
    words = ["x " * 600 if word == "long" else word for word in argv.split()]
    assert sample.main(["--model", saved_model, "--prompt", "hi", *words]) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(f"error: .*{re.escape(message)}.*\n", err)


def test_without_a_model_the_newest_checkpoint_is_taken_and_named(saved_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["--prompt", "hi"]) == 1
    assert "run `python train_evip.py` first" in capsys.readouterr().err
    for age, name in enumerate(("b/S1", "a/S2", "c/S0")):
        shutil.copytree(saved_model, f"out/{name}")
        os.utime(f"out/{name}/config.json", (1e9 - age, 1e9 - age))
    os.utime("out/a/S2/config.json", (2e9, 2e9))
    assert sample.main(["--prompt", "hi", "--max_new_tokens", "1"]) == 0
    assert capsys.readouterr().err == "model: out/a/S2, the newest below out/\n"


def test_the_answer_may_go_to_a_reader_that_leaves(saved_model, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert sample.main(["--model", saved_model, "--prompt", "hi"]) == 1


def test_flags_reach_the_model(saved_model, monkeypatch):
    used, kwargs = [], {}

    def generate(self, input_ids, pixel_values, **kwargs_):
        used.append((self.moe, input_ids.device.type, next(self.parameters()).dtype))
        kwargs.update(kwargs_)
        return iter(())
    monkeypatch.setattr(MonoInternVL, "generate", generate)
    argv = ["--model", saved_model, "--prompt", "hi"]
    sample.main([*argv, "--moe", "dense", "--device", "cpu", "--dtype", "bfloat16"])
    sample.main([*argv, "--device", "cpu"])
    sample.main([*argv, "--moe", "cuda", "--device", "cpu"])
    assert used == [("dense", "cpu", torch.bfloat16), ("auto", "cpu", torch.float32),
                    ("cuda", "cpu", torch.float32)]
    flags = {"max_new_tokens": 7, "temperature": 0.5, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.1,
             "seed": 3, "prefill_chunk": 9}
    sample.main([*argv, *(f"--{name}={value}" for name, value in flags.items())])
    assert isinstance(kwargs.pop("kv_cache"), KVCache)
    assert kwargs == {**flags, "eos_token_id": (TOK.token_id("<|im_end|>"), TOK.eos_id)}


def test_the_marks_of_a_grounded_answer_are_part_of_it(saved_model, monkeypatch, capsys):
    answer = "<ref>cat</ref><box>[[1, 2, 30, 40]]</box>"
    script(monkeypatch, answer + "<|im_end|>")
    assert sample.main(["--model", saved_model, "--prompt", "Where is the cat?"]) == 0
    assert capsys.readouterr().out == answer + "\n"


def test_a_chat_reads_each_turn_once_and_answers_as_if_it_read_all(saved_model, monkeypatch, capsys):
    type_in(monkeypatch, "hi", f"/image {PICTURE}", "and?", "more", "/clear", "hi")
    asked, plain = [], MonoInternVL.generate

    def generate(self, input_ids, pixel_values, **kwargs):
        answer = []
        asked.append((self, input_ids, pixel_values, kwargs, answer))
        for token in plain(self, input_ids, pixel_values, **kwargs):
            if not answer:
                asked[-1] += (kwargs["kv_cache"].reused,)
            answer.append(token.tolist())
            yield token
    monkeypatch.setattr(MonoInternVL, "generate", generate)
    assert sample.main(["--model", saved_model, "--max_new_tokens", "9", "--stats"]) == 0
    stats = re.findall(r"time to first token [0-9.]+ s, then [0-9.]+ tokens/s; (\d+) tokens; prompt: "
                       r"(\d+) visual, (\d+) text tokens, (\d+) of them read before; peak memory \d+ MB",
                       capsys.readouterr().err)
    assert len(asked) == len(stats) == 4 and torch.equal(asked[3][1], asked[0][1])
    monkeypatch.setattr(MonoInternVL, "generate", plain)
    before = 0
    for turn, stat, tiles in zip(asked, stats, (0, 3, 3, 0), strict=True):
        model, ids, pixels, kwargs, answer, reused = turn
        del kwargs["kv_cache"]
        assert stream(model, ids, pixels, **kwargs) == answer
        visual = tiles * SMALL.tokens_per_tile
        assert stat == (str(len(answer)), str(visual), str(ids.shape[1] - visual), str(reused))
        # All that was read in the turn before; its last token was yielded only. After /clear: this very
        # prompt, but for the last token, from which the answer follows.
        assert reused == (before if ids is not asked[3][1] else ids.shape[1] - 1)
        before = ids.shape[1] + len(answer) - 1


def write_questions(folder: Path) -> Path:
    """Nine lines that can be asked, with blank ones and five that cannot between them."""
    shutil.copy(PICTURE, folder / "a.png")
    Image.new("RGB", (56, 56), "red").save(folder / "b.png")
    asked = [{"image": "a.png", "question": "What?"}, {"question": "hi " * 40}, {"question": "hi"},
             {"image": ["a.png", "b.png"], "question": "Which?", "id": 7},
             {"image": "b.png", "question": "What?"},
             {"image": "b.png", "conversations": ask("<image>\nWhat?", "Red.", "Sure?", "Yes."), "id": "x"},
             {"conversations": ask("So?")}, {"image": "b.png", "question": "What is <image>?"},
             {"question": "ümlaut"}]
    bad = ["{", '{"question": 1}', '{"image": "none.png", "question": "?"}', '{"conversations": []}',
           '{"image": "../a.png", "question": "?"}']
    lines = [json.dumps(q) for q in asked]
    for i, line in enumerate(bad):
        lines.insert(2 * i, line)
    (folder / "questions.jsonl").write_text("\n" + "\n\n".join(lines))
    return folder / "questions.jsonl"


def ask_file(saved_model, questions: Path, output: str, *argv: str) -> tuple[int, list[dict]]:
    output, records = questions.with_name(output), []
    code = sample.main(["--model", saved_model, "--input", str(questions), "--output", str(output),
                        "--max_new_tokens", "6", "--batch_size", "3", *argv])
    if output.exists():
        records = [json.loads(line) for line in output.read_text("utf-8").splitlines()]
    return code, records


@pytest.mark.parametrize("sampling", [[], ["--temperature", "1.5", "--seed", "4"]])
def test_a_file_of_questions_is_answered_in_order_as_one_by_one_and_bad_lines_are_named(
        saved_model, tmp_path, monkeypatch, capsys, sampling):
    questions = write_questions(tmp_path)
    code, records = ask_file(saved_model, questions, "answers.jsonl", *sampling)
    err = capsys.readouterr().err
    assert code == 0 and "9 of 14 questions answered, 5 left out" in err
    assert sorted(map(int, re.findall(r"left out: .*questions.jsonl:(\d+): ", err))) == [2, 6, 10, 14, 18]
    lines = questions.read_text().splitlines()
    for record, number in zip(records, (4, 8, 12, 16, 20, 22, 24, 26, 28), strict=True):
        asked = json.loads(lines[number - 1])
        assert (record["line"], record["id"]) == (number, asked.get("id", f"{questions}:{number}"))
        if record["id"] == "x":                    # two turns: its last answer is not shown
            ids, _ = encode_conversation(TOK, asked["conversations"][:-1], [1], SMALL.tokens_per_tile)
            tokens = stream(MonoInternVL.from_pretrained(saved_model), torch.tensor([ids]),
                            load_image(tmp_path / "b.png", 6, 56), max_new_tokens=6, seed=4,
                            temperature=1.5 if sampling else 0, eos_token_id=TOK.token_id("<|im_end|>"))
            alone = TOK.decode([t for t, in tokens], skip_special_tokens=False).removesuffix("<|im_end|>")
        else:
            images = asked.get("image", [])
            images = [images] if isinstance(images, str) else images
            images = ["--image", *images] if images else []
            with monkeypatch.context() as patch:
                patch.chdir(tmp_path)
                sample.main(["--model", saved_model, "--max_new_tokens", "6", *sampling, *images,
                             "--prompt", asked.get("question", "So?")])
            alone = capsys.readouterr().out.removesuffix("\n")
        assert record["answer"] == alone


def test_an_interrupted_file_of_questions_goes_on_and_ends_like_an_uninterrupted_one(saved_model, tmp_path,
                                                                                      monkeypatch, capsys):
    questions, sampling = write_questions(tmp_path), ["--temperature", "1.5", "--seed", "4"]
    _, whole = ask_file(saved_model, questions, "whole.jsonl", *sampling)
    plain, asked = MonoInternVL.generate, []

    def generate(self, input_ids, *args, **kwargs):
        asked.append(len(input_ids))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return plain(self, input_ids, *args, **kwargs)
    monkeypatch.setattr(MonoInternVL, "generate", generate)
    code, part = ask_file(saved_model, questions, "parts.jsonl", *sampling)
    assert code == 130 and part == [record for record in whole if record in part] and len(part) == 6
    assert "6 of 14 questions answered" in capsys.readouterr().err
    output = tmp_path / "parts.jsonl"              # a run that was killed leaves them as they came
    output.write_text("".join(json.dumps(record) + "\n" for record in part[::-1]) + '{"line": 4, "ans')
    for _ in range(2):                             # the second time, nothing is left to do
        code, parts = ask_file(saved_model, questions, "parts.jsonl", *sampling)
        assert code == 0 and parts == whole and sum(asked[3:]) == 3


@pytest.mark.parametrize("argv, message", [
    ("--seed 5", "answers another question, or the same with other flags"),
    ("--batch_size 0", "--batch_size is 0"), ("--prompt hi", "go together, without"),
    ("--input none.jsonl", "none.jsonl is not readable"), ("--output none/a.jsonl", "cannot be written"),
    ("--image_root none", "the image folder none"), ("--image_root /", "answers another question"),
    ("--output .", " is not readable: Is a directory"), ("--max_tiles 0", "--max_tiles is 0"),
    ("--output {questions}", "answers another question")])
def test_a_file_of_questions_that_cannot_be_answered_is_one_line(saved_model, tmp_path, capsys, argv, message):
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question": "hi"}\n')
    assert ask_file(saved_model, questions, "a.jsonl")[0] == 0
    capsys.readouterr()
    before = questions.read_bytes(), (tmp_path / "a.jsonl").read_bytes()
    assert ask_file(saved_model, questions, "a.jsonl", *argv.format(questions=questions).split())[0] == 1
    assert re.fullmatch(f"error: .*{re.escape(message)}.*\n", capsys.readouterr().err)
    assert (questions.read_bytes(), (tmp_path / "a.jsonl").read_bytes()) == before


def test_a_file_that_holds_no_answers_is_never_overwritten(saved_model, tmp_path, capsys):
    questions = tmp_path / "questions.jsonl"       # one line without an end looked like half an answer
    questions.write_text('{"question": "hi"}')
    assert ask_file(saved_model, questions, "questions.jsonl")[0] == 1
    assert "holds something else than answers" in capsys.readouterr().err
    assert questions.read_text() == '{"question": "hi"}'


def test_answers_of_a_checkpoint_that_was_written_anew_are_not_its_own(saved_model, tmp_path, capsys):
    folder, questions = shutil.copytree(saved_model, tmp_path / "model"), tmp_path / "questions.jsonl"
    questions.write_text('{"question": "hi"}\n')
    for code in (0, 0, 1):
        if code:
            os.utime(folder / "config.json", (1, 1))
        assert ask_file(str(folder), questions, "a.jsonl")[0] == code
    assert "answers another question" in capsys.readouterr().err


def test_a_long_neighbour_does_not_cut_an_answer(saved_model, tmp_path, monkeypatch):
    folder, questions = shutil.copytree(saved_model, tmp_path / "model"), tmp_path / "questions.jsonl"
    config = json.loads((folder / "config.json").read_text())
    config["llm_config"] |= {"max_position_embeddings": 420, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config))
    asked, plain = [], MonoInternVL.generate

    def generate(self, input_ids, *args, **kwargs):
        asked.append(tuple(input_ids.shape))
        return plain(self, input_ids, *args, **kwargs)
    monkeypatch.setattr(MonoInternVL, "generate", generate)
    questions.write_text("".join(json.dumps({"question": "hi " * n}) + "\n" for n in (2, 70, 1)))
    code, records = ask_file(str(folder), questions, "a.jsonl", "--max_new_tokens", "60")
    assert code == 0 and len(records) == 3 and [rows for rows, _ in asked] == [2, 1]
    assert 420 - 60 < asked[1][1] < 420


def test_too_little_memory_is_one_line_that_says_what_to_lower(saved_model, tmp_path, monkeypatch, capsys):
    shutil.copytree(saved_model, tmp_path, dirs_exist_ok=True)
    MonoInternVL(replace(SMALL, max_position_embeddings=10 ** 17)).save_pretrained(tmp_path)
    argv = ["--model", str(tmp_path), "--max_new_tokens", str(10 ** 16)]       # more than can be addressed
    assert sample.main([*argv, "--prompt", "hi"]) == 1
    assert capsys.readouterr().err.startswith("error: out of memory; lower --max_new_tokens, --max_tiles")
    type_in(monkeypatch, "hi", "hi")               # a chat goes on
    assert sample.main(argv) == 0
    assert capsys.readouterr().err.count("error: out of memory; lower") == 2
    (tmp_path / "q.jsonl").write_text('{"question": "hi"}\n')
    code, _ = ask_file(str(tmp_path), tmp_path / "q.jsonl", "a.jsonl", *argv[2:])
    assert code == 1 and "error: out of memory; lower --batch_size" in capsys.readouterr().err


def run_sample(*argv: str, **kwargs) -> subprocess.CompletedProcess:
    command = [sys.executable, str(HERE / "sample.py"), *argv]
    return subprocess.run(command, capture_output=True, timeout=120, **kwargs)


def test_a_chat_works_through_pipes_in_any_locale(saved_model):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    chat = run_sample("--model", saved_model, *"--temperature 3 --seed 0 --max_new_tokens 40".split(), env=env,
                      input="你好\n".encode() + b"\xff\n/exit\n")
    assert chat.returncode == 0 and not chat.stdout.decode("utf-8").isascii()
    assert sample.GREETING in chat.stderr.decode()


def test_the_script_ends_without_a_traceback_on_bad_input(saved_model):
    bad = run_sample("--model", saved_model, "--image", "none.png", "--prompt", "hi", text=True)
    assert (bad.returncode, bad.stdout, bad.stderr) == (1, "", "error: the image none.png does not exist\n")


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
    shared, names = {p.data_ptr() for p in ours.parameters()}, dict(modular.named_parameters())
    assert {n for n, p in names.items() if p.data_ptr() not in shared} == \
        {n for n in names if n.startswith(("patches.", "encoder."))}
    assert_close(modular(PROMPTS)[0], ours(PROMPTS)[0])
    seen = []
    record(modular.encoder, seen)
    assert modular.embed_images(torch.randn(3, 3, 56, 56)).shape == (3, config.tokens_per_tile, 64)
    assert seen[0].shape == (3, 4 * config.tokens_per_tile + 1, 1024)      # patches, and a class token


def test_bench_infer_measures_every_combination_and_draws_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(MonoInternVLConfig, "mono_internvl_1_5_2b", narrow)
    monkeypatch.setattr(bench, "TOKENS_PER_TILE", 4)
    flags = "--layers 1 --tiles 1 2 --rounds 2 --steps 1 --batches 1 2 --seconds 0 --cpu-time --markdown"
    assert bench.main(["infer", *flags.split(), f"--json={tmp_path}/a.json", f"--png={tmp_path}/a.png"]) == 0
    result, out = json.loads((tmp_path / "a.json").read_text()), capsys.readouterr().out
    assert json.loads(out.splitlines()[-1]) == result and flags in result["command"]
    assert {(r["dtype"], r["tiles"], r["back_end"]) for r in result["prefill"]} == {
        *itertools.product(["bfloat16"], [1, 2], ["dense", "torch", "modular"]),
        ("float32", 2, "dense"), ("float32", 2, "torch")}
    assert {(r["dtype"], r["batch"], r["cached_tokens"]) for r in result["decode"]} == {
        *itertools.product(["bfloat16"], [1, 2], [68, 72]), ("float32", 1, 72), ("float32", 2, 72)}
    for row in result["prefill"] + result["decode"]:
        assert 0 < row["quartiles"][0] <= row["seconds"] <= row["quartiles"][1] and row["floor"] > 0
    tables = [line for line in out.splitlines() if line.startswith("| ")]
    assert len(tables) == 2 * 2 + 3 + 6 and min(Image.open(tmp_path / "a.png").size) > 300


# ---------------------------------------------------------------- the kernel: references and the checks

TEXT, VISUAL, PAD = 0, 1, 2
TILES = {"auto": 0, "small": 1, "medium": 2, "large": 3, "naive": 4}   # `enum TileConfig` in moe_kernel.cu

labels_of_a_batch = st.lists(st.sampled_from([TEXT, VISUAL, PAD]), max_size=130)
multiples_of_8 = st.integers(1, 34).map(lambda i: 8 * i)
dtypes = st.sampled_from(list(moe_kernel.DTYPES))


def random_tensors(*shapes, dtype=torch.float32, device="cpu", seed=0):
    """Standard normal; matrices after the first are scaled like weights (rows, K): x wᵀ is of order 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    return [t.div(t.shape[-1] ** 0.5 if i else 1).to(dtype).to(device) for i, t in enumerate(tensors)]


def choose(labels, text, visual):
    return torch.where(labels[:, None] == VISUAL, visual, text).masked_fill(labels[:, None] >= PAD, 0)


def linear_reference(x, w_text, w_visual, labels):
    return choose(labels, x @ w_text.T, x @ w_visual.T)


def swiglu_reference(x, w1_text, w3_text, w1_visual, w3_visual, labels):
    text, visual = F.silu(x @ w1_text.T) * (x @ w3_text.T), F.silu(x @ w1_visual.T) * (x @ w3_visual.T)
    return choose(labels, text, visual)


def in_float64(*tensors):
    return [t.detach().cpu().double() for t in tensors]


def assert_rounded(actual, expected):
    """expected in float64. Sums of order 1 in float32, then one rounding: half an eps, allowed twice."""
    assert_close(actual.cpu().double(), expected, rtol=torch.finfo(actual.dtype).eps, atol=1e-5)


def launch_into_poison(function, n, m, dtype, device, before, after):
    """Call a launcher with an output full of NaN between two guard rows; return it, the guards untouched."""
    y = torch.full((n + 2, m), float("nan"), dtype=dtype, device=device)
    y[[0, -1]] = 7
    moe_kernel.launch(function, y.device, *before, y[1:-1], *after)
    assert (y[[0, -1]] == 7).all(), "the kernel wrote outside its output"
    return y[1:-1]


def check_kernels(labels, k, m, dtype, tile="auto", seed=0, device="cpu"):
    """Route, linear and SwiGLU of one case against float64, every element of the poisoned outputs written."""
    labels, n = torch.tensor(labels, dtype=torch.uint8, device=device), len(labels)
    rows, counts = (torch.full((size,), -1, device=device) for size in (n, 2))
    moe_kernel.launch("moe_route", rows.device, labels, rows, counts, n)
    assert torch.equal(rows, labels.clamp(max=PAD).argsort(stable=True))
    assert counts.tolist() == [(labels == TEXT).sum(), (labels == VISUAL).sum()]
    x, residual, *w = random_tensors((n, k), (n, m), *[(m, k)] * 4, dtype=dtype, device=device, seed=seed)
    x64, residual64, *w64 = in_float64(x, residual, *w)
    codes, order = labels.cpu(), rows.cpu()
    gather, scatter, add = seed % 2 == 0, seed // 2 % 2 == 0, seed // 4 % 2 == 0
    y = launch_into_poison("moe_linear", n, m, dtype, device,
                           (x if gather else x[rows], w[0], w[1], residual if add else None),
                           (rows if gather else None, rows if scatter else None, counts, n, k, m,
                            moe_kernel.DTYPES[dtype], TILES[tile]))
    expected = linear_reference(x64, w64[0], w64[1], codes)
    expected = expected if scatter else expected[order]
    assert_rounded(y, expected + residual64 if add else expected)
    if tile != "naive":
        h = launch_into_poison("moe_swiglu", n, m, dtype, device, (x, *w),
                               (rows, counts, n, k, m, moe_kernel.DTYPES[dtype], TILES[tile]))
        assert_rounded(h, swiglu_reference(x64, *w64, codes)[order])


def check_build(path):
    """What a sanitized or sabotaged build of moe_kernel.cu is put to: both experts with boundary tiles and
    tails, more steps along k than pipeline stages, and all-pad tiles, in every dtype and tile shape."""
    library = ctypes.CDLL(str(path))
    library.moe_error_string.restype = ctypes.c_char_p
    moe_kernel.library = lambda device: library
    batches = [[], [PAD] * 3, ([TEXT, VISUAL, VISUAL] * 23 + [PAD] * 80)[:140]]
    shapes = [(torch.float32, "auto"), (torch.bfloat16, "medium"), (torch.float16, "large"),
              (torch.bfloat16, "naive")]
    for seed, (labels, (dtype, tile)) in enumerate(itertools.product(batches, shapes)):
        check_kernels(labels, 168, 72, dtype, tile, seed)
    check_kernels(batches[2][:70], 584, 40, torch.float16, "small", seed=4)


def run_python(code, *arguments, timeout=120, **environment):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=HERE, timeout=timeout,
                          env={**os.environ, **environment}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def compile_with_gcc(source, output, *flags):
    command = ["g++", "-x", "c++", "-std=c++17", "-I", HERE, *flags, "-fPIC", "-shared", source, "-o", output]
    command = list(map(str, command))
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# ---------------------------------------------------------------- the kernel: what it computes

@on_every_device
@settings(max_examples=25)
@given(labels=st.lists(st.integers(0, 3), max_size=700))
def test_moe_route_is_a_stable_partition(device, labels):
    labels = torch.tensor(labels, dtype=torch.uint8)
    rows, counts = moe_kernel._route(labels.to(device))
    parts = [TEXT], [VISUAL], [PAD, 3]
    by_hand = [i for part in parts for i, label in enumerate(labels.tolist()) if label in part]
    assert rows.tolist() == by_hand
    assert counts.tolist() == [labels.tolist().count(TEXT), labels.tolist().count(VISUAL)]


@on_every_device
@settings(max_examples=40)
@given(labels=labels_of_a_batch, k=st.integers(1, 50).map(lambda i: 8 * i), m=multiples_of_8, dtype=dtypes,
       tile=st.sampled_from(list(TILES)), seed=st.integers(0, 7))
@example(labels=[], k=8, m=8, dtype=torch.bfloat16, tile="auto", seed=0)
@example(labels=[TEXT] * 64 + [VISUAL] * 66, k=200, m=264, dtype=torch.bfloat16, tile="large", seed=1)
@example(labels=[VISUAL] * 130, k=600, m=40, dtype=torch.float16, tile="small", seed=2)
def test_routed_kernels_equal_a_float64_reference_and_write_every_element(device, labels, k, m, dtype, tile,
                                                                          seed):
    check_kernels(labels, k, m, dtype, tile, seed, device)


@on_every_device
@settings(max_examples=25)
@given(labels=labels_of_a_batch, dtype=dtypes, bad=st.sampled_from([math.nan, math.inf, -math.inf]),
       kind=st.sampled_from([TEXT, VISUAL, PAD]))
@example(labels=[TEXT, VISUAL, PAD] * 3, dtype=torch.float32, bad=math.inf, kind=VISUAL)  # pads share tiles
@example(labels=[TEXT, VISUAL, PAD] * 3, dtype=torch.bfloat16, bad=math.inf, kind=VISUAL)
def test_nan_in_one_kind_of_token_and_its_expert_never_reaches_another(device, labels, dtype, bad, kind):
    labels = torch.tensor(labels, dtype=torch.uint8, device=device)
    x, *w = random_tensors((len(labels), 40), *[(48, 40)] * 4, (40, 48), (40, 48), dtype=dtype, device=device)
    rows, counts = moe_kernel._route(labels)

    def both(x, w):
        return (moe_kernel.linear(x, w[0], w[2], rows, counts),
                moe_kernel.swiglu(x, (w[0], w[1], w[4]), (w[2], w[3], w[5]), rows, counts))
    mine = {TEXT: (0, 1, 4), VISUAL: (2, 3, 5), PAD: ()}[kind]
    clean, spoilt = both(x, w), both(x.masked_fill(labels[:, None] == kind, bad),
                                     [t.clone().fill_(bad) if i in mine else t for i, t in enumerate(w)])
    for a, b in zip(clean, spoilt, strict=True):
        assert torch.equal(a[labels != kind], b[labels != kind])
        assert b[labels == PAD].eq(0).all()


@settings(max_examples=10)
@given(labels=labels_of_a_batch, dtype=dtypes, tile=st.sampled_from(["small", "medium", "large"]))
def test_the_order_of_threads_does_not_change_a_bit(labels, dtype, tile):
    labels = torch.tensor(labels, dtype=torch.uint8)
    x, *w = random_tensors((len(labels), 200), *[(72, 200)] * 4, dtype=dtype)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        for reverse in "01":
            patch.setenv("CUDA_ON_CPU_REVERSE", reverse)
            rows, counts = moe_kernel._route(labels)
            linear = moe_kernel._linear(x, w[0], w[1], rows, counts, None, True, True, TILES[tile])
            results.append((rows, counts, linear,
                            moe_kernel._swiglu(x, *w, rows, counts, TILES[tile])))
    for forward, backward in zip(*results, strict=True):
        assert torch.equal(forward, backward)


@on_every_device
def test_strided_and_misaligned_inputs_give_what_their_copies_give(device):
    labels = torch.tensor([TEXT, VISUAL, PAD] * 7, dtype=torch.uint8, device=device)
    x, w_text, w_visual = random_tensors((21, 48), (24, 24), (24, 48), dtype=torch.bfloat16, device=device)
    rows, counts = moe_kernel._route(labels)
    strided = x[:, ::2]                                                      # (21, 24), strides (48, 2)
    shifted = F.pad(x[:, :24].flatten(), (1, 0))[1:].view(21, 24)            # contiguous, 2 bytes off
    assert not strided.is_contiguous() and shifted.data_ptr() % 16 == 2
    for awkward in (strided, shifted):
        inputs = awkward, w_text.T, w_visual[:, ::2]
        copies = (t.clone(memory_format=torch.contiguous_format) for t in inputs)
        assert torch.equal(moe_kernel.linear(*inputs, rows, counts), moe_kernel.linear(*copies, rows, counts))


@on_every_device
def test_a_routed_layer_equals_two_ordinary_ones(device):
    """The whole FFN, as the model calls it."""
    labels = torch.tensor([TEXT, VISUAL, VISUAL, PAD] * 20, dtype=torch.uint8, device=device)
    x, *w = random_tensors((80, 64), *[(96, 64)] * 4, (64, 96), (64, 96), device=device)
    y = moe_kernel.swiglu(x, (w[0], w[1], w[4]), (w[2], w[3], w[5]), *moe_kernel._route(labels))
    x, *w = in_float64(x, *w)
    text, visual = ((F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
                    for w1, w3, w2 in ((w[0], w[1], w[4]), (w[2], w[3], w[5])))
    assert_rounded(y, choose(labels.cpu(), text, visual))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("tile", ["auto", "small", "medium", "large"])
@pytest.mark.parametrize("tokens", [64, 320, 1856])
def test_a_full_size_layer_is_right_on_a_gpu(device, tokens, tile):
    labels = torch.arange(tokens, device=device).remainder(11).clamp(max=2).to(torch.uint8)
    x, *w = random_tensors((tokens, 2048), *[(8192, 2048)] * 4, dtype=torch.bfloat16, device=device)
    rows, counts = moe_kernel._route(labels)
    h = moe_kernel._swiglu(x, *w, rows, counts, TILES[tile])
    y = moe_kernel._linear(x, w[0], w[1], rows, counts, None, True, True, TILES[tile])
    x, *w = (t.double() for t in (x, *w))
    assert_close(y.double(), linear_reference(x, w[0], w[1], labels), rtol=2 ** -7, atol=1e-4)
    assert_close(h.double(), swiglu_reference(x, *w, labels)[rows], rtol=2 ** -7, atol=1e-4)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_a_cuda_graph_captured_with_one_mask_serves_every_other(device):
    """Capture refuses a sync, an allocation outside its pool and a launch on another stream."""
    x, *w = random_tensors((130, 64), *[(96, 64)] * 4, device=device)
    labels = torch.zeros(130, dtype=torch.uint8, device=device)

    def layer():
        rows, counts = moe_kernel._route(labels)
        return moe_kernel._swiglu(x, *w, rows, counts, 0), moe_kernel.linear(x, w[0], w[1], rows, counts)
    layer()                                                                # builds and loads
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for seed in range(4):
        labels.copy_(torch.randint(0, 3, (130,), generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for replayed, eager in zip(captured, layer(), strict=True):
            assert torch.equal(replayed, eager)


# ---------------------------------------------------------------- the kernel: the operators in PyTorch

@on_every_device
@settings(max_examples=8)
@given(labels=labels_of_a_batch, gather=st.booleans(), scatter=st.booleans(), add=st.booleans(),
       wanted=st.lists(st.booleans(), min_size=6, max_size=6).filter(any))
def test_gradients_equal_those_of_the_float64_reference(device, labels, gather, scatter, add, wanted):
    labels = torch.tensor(labels, dtype=torch.uint8, device=device)
    rows, counts = moe_kernel._route(labels)
    n, codes, order = len(labels), labels.cpu(), rows.cpu()
    inputs = random_tensors((n, 24), *[(40, 24)] * 4, (n, 40), device=device)
    reference = in_float64(*inputs)
    for t, r, want in zip(inputs, reference, wanted, strict=True):
        t.requires_grad_(want), r.requires_grad_(want)
    (x, a, b, c, d, residual), (x64, a64, b64, c64, d64, residual64) = inputs, reference
    residual, residual64 = (residual, residual64) if add else (None, torch.zeros(()))
    y = moe_kernel._linear(x if gather else x[rows], a, b, rows, counts, residual, gather, scatter, 0)
    y64 = linear_reference(x64, a64, b64, codes)
    y64 = (y64 if scatter else y64[order]) + residual64
    h = moe_kernel._swiglu(x, a, b, c, d, rows, counts, 0)
    h64 = swiglu_reference(x64, a64, b64, c64, d64, codes)[order]
    direction, = random_tensors((n, 40), device=device, seed=1)
    ((y + h) * direction).sum().backward() if (y + h).requires_grad else None
    ((y64 + h64) * direction.cpu()).sum().backward() if (y64 + h64).requires_grad else None
    for t, r in zip(inputs, reference, strict=True):
        assert (t.grad is None) == (r.grad is None)
        if t.grad is not None:
            assert_close(t.grad.cpu().double(), r.grad, rtol=1e-5, atol=3e-5)


@on_every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_as_close_as_their_roundings_allow(device, dtype):
    labels = torch.tensor([TEXT, VISUAL, VISUAL, PAD, VISUAL] * 26, dtype=torch.uint8, device=device)
    inputs = random_tensors((130, 64), *[(72, 64)] * 4, dtype=dtype, device=device)
    inputs = [t.requires_grad_() for t in inputs]
    reference = [t.requires_grad_() for t in in_float64(*inputs)]
    rows, counts = moe_kernel._route(labels)
    direction, = random_tensors((130, 72), dtype=dtype, device=device, seed=1)
    moe_kernel._swiglu(*inputs, rows, counts, 0).backward(direction)
    swiglu_reference(*reference, labels.cpu())[rows.cpu()].backward(direction.cpu().double())
    for t, r in zip(inputs, reference, strict=True):      # five roundings on the way to each
        assert (t.grad.cpu().double() - r.grad).norm() / r.grad.norm() < 2 * torch.finfo(dtype).eps


def test_the_reference_itself_passes_gradcheck():
    labels = torch.tensor([TEXT, VISUAL, PAD, VISUAL, TEXT])
    inputs = [t.requires_grad_() for t in in_float64(*random_tensors((5, 8), *[(8, 8)] * 4))]
    assert torch.autograd.gradcheck(lambda *t: swiglu_reference(*t, labels), inputs)
    assert torch.autograd.gradcheck(lambda x, a, b, *_: linear_reference(x, a, b, labels), inputs[:3])


@on_every_device
@pytest.mark.parametrize("n", [0, 37])
def test_operators_pass_opcheck(device, n):
    labels = torch.arange(n, device=device).remainder(3).to(torch.uint8)
    rows, counts = moe_kernel._route(labels)
    tensors = random_tensors((n, 24), (n, 40), *[(40, 24)] * 4, device=device)
    x, residual, *w = (t.requires_grad_() for t in tensors)
    torch.library.opcheck(moe_kernel._route, (labels,))
    torch.library.opcheck(moe_kernel._linear, (x, w[0], w[1], rows, counts, residual, True, True, 0))
    torch.library.opcheck(moe_kernel._linear, (x, w[0].detach(), w[1], rows, counts, None, False, True, 0))
    torch.library.opcheck(moe_kernel._swiglu, (x, *w, rows, counts, 0))


@pytest.mark.parametrize("change, message", [
    (dict(x=torch.zeros(3, 12), w=torch.zeros(8, 12)), "multiples of 8"),
    (dict(w=torch.zeros(8, 24)), r"x \(\.\.\., K\)"),
    (dict(x=torch.zeros(2, 3, 16)), r"permutation \(N,\)"),
    (dict(x=torch.zeros(3, 16).double(), w=torch.zeros(8, 16).double()), "float64"),
    (dict(w=torch.zeros(8, 16).bfloat16()), "bfloat16"),
    (dict(x=torch.zeros(3, 16, device="meta"), w=torch.zeros(8, 16, device="meta")), "meta"),
    (dict(w=torch.zeros(8, 16, device="meta")), "meta"),
    (dict(permutation=torch.arange(3).int()), "int64"),
    (dict(permutation=torch.arange(4)), r"permutation \(N,\)"),
])
def test_what_the_kernel_cannot_do_is_a_clear_error(change, message):
    given = {"x": torch.zeros(3, 16), "w": torch.zeros(8, 16), "permutation": torch.arange(3),
             "counts": torch.tensor([3, 0]), **change}
    x, w, permutation, counts = given.values()
    with pytest.raises(InputError, match=message):
        moe_kernel.linear(x, w, w, permutation, counts)
    with pytest.raises(InputError, match=message):
        moe_kernel.swiglu(x, (w, w, w.T), (w, w, w.T), permutation, counts)


@pytest.mark.parametrize("labels", [torch.zeros(4, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.uint8)])
def test_labels_of_a_wrong_type_or_shape_are_refused(labels):
    with pytest.raises(InputError, match="uint8"):
        moe_kernel._route(labels)


# ---------------------------------------------------------------- the kernel: the whole model

@on_every_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_official_checkpoint_gives_the_same_logits_and_tokens_with_the_kernel(golden, device, dtype):
    model = MonoInternVL.from_pretrained(OFFICIAL_TINY, dtype, device)
    model.config.img_context_token_id = 120
    for name in ("prefill", "batch", "long", "text"):
        inputs = to(device, [golden[f"{name}.input_ids"], golden.get(f"{name}.pixel_values")])
        if name == "batch":                        # pads, and text rows beside visual ones
            inputs.append(torch.ones_like(inputs[0]))
            inputs[2][:, 0] = 0
        results = {}
        for model.moe in ("torch", "cuda"):
            with torch.no_grad():
                results[model.moe] = model(*inputs)[0].float(), stream(model, *inputs, max_new_tokens=6)
        (logits, tokens), (expected, expected_tokens) = results["cuda"], results["torch"]
        scale = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        assert_close(logits, expected, rtol=0, atol=scale * expected.abs().max().item())
        assert dtype != torch.float32 or tokens == expected_tokens


@on_every_device
def test_autocast_reaches_the_kernel_and_rounds_no_more_than_it_does_elsewhere(device):
    x, w, rows, counts = to(device, (torch.randn(6, 32), torch.randn(8, 32), torch.arange(6),
                                     torch.tensor([3, 3])))
    for enabled, dtype in (True, torch.bfloat16), (False, torch.float32):
        with torch.autocast(device, torch.bfloat16, enabled=enabled):
            assert moe_kernel.linear(x, w, w, rows, counts).dtype == F.linear(x, w).dtype == dtype
            assert moe_kernel.swiglu(x, (w, w, w.T), (w, w, w.T), rows, counts).dtype == dtype
    model, results = tiny().to(device), {}
    ids, pixels, mask = to(device, batch_of([[False, True, True, False], [True, False]]))
    for name in ("exact", "torch", "cuda"):
        model.moe = "torch" if name == "exact" else name
        with torch.autocast(device, torch.bfloat16, enabled=name != "exact"):
            _, loss = model(ids, pixels, mask, ids)
        grads = gradients(model, loss)
        assert {g.dtype for g in grads.values()} == {torch.float32}          # that of the parameters
        results[name] = torch.cat([g.flatten() for g in grads.values()])
    error = {name: (grad - results["exact"]).norm() for name, grad in results.items()}
    assert 0 < error["cuda"] < 1.5 * error["torch"] < 0.1 * results["exact"].norm()


@pytest.mark.slow
def test_torch_compile_takes_a_model_with_the_kernel():
    model, (ids, pixels, mask) = tiny(), batch_of([[False, True, True, False], [True, False]])
    model.moe = "cuda"
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(ids, pixels, mask)[0], model(ids, pixels, mask)[0])


def test_widths_that_the_kernel_cannot_take_are_one_error_that_names_another_back_end():
    model, (ids, pixels, mask) = tiny(intermediate_size=20), batch_of([[False, True]])
    model.moe = "cuda"
    with pytest.raises(InputError, match="multiples of 8.*torch back end"):
        model(ids, pixels, mask)


# ---------------------------------------------------------------- the kernel: the build

@pytest.fixture
def no_library_yet(monkeypatch):
    """moe_kernel.library as in a fresh process; the one that other tests share comes back afterwards."""
    fresh = functools.cache(inspect.unwrap(moe_kernel.library))
    monkeypatch.setattr(moe_kernel, "library", fresh)


def test_on_a_cpu_the_cuda_back_end_says_once_what_it_is(no_library_yet):
    with pytest.warns(UserWarning, match="for tests and study") as warned:
        for _ in range(3):
            assert Routing(torch.tensor([[True, False]]), backend="cuda").backend == "cuda"
    assert len(warned) == 1


def test_a_kernel_that_cannot_be_built_says_why_once_and_models_fall_back_to_torch(no_library_yet, tmp_path,
                                                                                   monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no-such-compiler") as warned:
        for _ in range(3):
            assert Routing(torch.tensor([[True, False]]), backend="cuda").backend == "torch"
    assert len(warned) == 1
    with pytest.raises(RuntimeError, match="choose the torch back end"):
        moe_kernel._route(torch.zeros(4, dtype=torch.uint8))


def test_two_processes_build_once_and_a_killed_build_stops_nobody(tmp_path):
    source = tmp_path / "tiny.cu"
    source.write_text('extern "C" int seven() { return 7; }\n')
    (tmp_path / "cuda_on_cpu.h").touch()
    build = ("import moe_kernel, ctypes, pathlib, sys, torch\n"
             "path = moe_kernel.build(torch.device('cpu'), pathlib.Path(sys.argv[1]))\n"
             "assert ctypes.CDLL(path).seven() == 7\nprint(path)")
    os.environ["TORCH_EXTENSIONS_DIR"], old = str(tmp_path / "built"), os.environ.get("TORCH_EXTENSIONS_DIR")
    try:
        folder = Path(moe_kernel.build(torch.device("cpu"), source)).parent
    finally:
        os.environ.pop("TORCH_EXTENSIONS_DIR") if old is None else os.environ.update(TORCH_EXTENSIONS_DIR=old)
    for file in folder.glob("*.so"):
        file.unlink()
    (folder / "lock").touch()               # as a killed torch build leaves it
    command = [sys.executable, "-c", build, str(source)]
    both = [subprocess.Popen(command, cwd=HERE, text=True, stdout=subprocess.PIPE,
                             env={**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path / "built")})
            for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(paths) == 1


def test_nvcc_compiles_it_without_warnings_or_spills(tmp_path):
    if not shutil.which("nvcc"):
        pytest.skip("nvcc is not installed")
    report = subprocess.run(["nvcc", "-std=c++17", "-O3", "-gencode=arch=compute_80,code=sm_80", "-Werror",
                             "all-warnings", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "moe.cubin",
                             HERE / "moe_kernel.cu"], text=True, capture_output=True)
    assert report.returncode == 0, report.stderr
    assert "warning" not in report.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report.stderr)
    assert len(spills) >= 18 and set(spills) == {("0", "0")}


# ---------------------------------------------------------------- the kernel: do the checks bite?

TINY_KERNELS = """
#include "cuda_on_cpu.h"
__global__ void read_early(float* out) {                           // shared memory that nobody wrote
    DYNAMIC_SHARED(float, shared);
    out[threadIdx.x] = shared[threadIdx.x];
}
__global__ void copy(const float* in, float* out, bool wait) {     // cp.async, with the wait or without
    DYNAMIC_SHARED(float, shared);
    cp_async16(shared + 4 * threadIdx.x, in, 16);
    cp_async_commit();
    if (wait) cp_async_wait<0>();
    out[threadIdx.x] = shared[4 * threadIdx.x];
}
__global__ void diverge() { if (threadIdx.x < 40) __syncthreads(); }
__global__ void neighbour(float* out) {                            // needs a barrier, has none
    DYNAMIC_SHARED(float, shared);
    shared[threadIdx.x] = threadIdx.x;
    out[threadIdx.x] = shared[threadIdx.x / 2];
}
extern "C" void run(int which, const float* in, float* out) {
    if (which == 0) LAUNCH(read_early, 1, 64, 256, 0, out);
    if (which == 1 || which == 2) LAUNCH(copy, 1, 64, 1024, 0, in, out, which == 2);
    if (which == 3) LAUNCH(neighbour, 1, 64, 256, 0, out);
    if (which == 4) LAUNCH(diverge, 1, 64, 0, 0);
}
"""


@pytest.mark.parametrize("flags", [[], ["-DCUDA_ON_CPU_UCONTEXT"]])
def test_cuda_on_cpu_is_strict_where_a_gpu_is_silent(tmp_path, monkeypatch, flags):
    (tmp_path / "tiny.cu").write_text(TINY_KERNELS)
    compiler = compile_with_gcc(tmp_path / "tiny.cu", tmp_path / "tiny.so", *flags)
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
    died = run_python("import ctypes, sys; ctypes.CDLL(sys.argv[1]).run(4, None, None)", tmp_path / "tiny.so")
    assert died.returncode < 0
    where = r"diverge in block \(0, 0, 0\): thread 32 is at .*, thread 40 at the end"
    assert re.search(where, died.stdout), died.stdout


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


PLANTED_BUGS = {                                # name: what stands in moe_kernel.cu, what is put there
    "nothing planted": ("", ""),
    "a missing barrier": ("        __syncthreads();              // now those of", "        // now those of"),
    "a missing barrier in the scan": ("__syncthreads();  // all threads have read before any writes", ""),
    "a wait one group too short": ("cp_async_wait<STAGES - 2>()", "cp_async_wait<STAGES - 1>()"),
    "rows off by one": ("tokens.begin + load_row + i * ROWS_PER_PASS",
                        "tokens.begin + load_row + i * ROWS_PER_PASS + 1"),
    "the wrong expert at the boundary tile": ("if (token_tile < num_text_tiles)",
                                              "if (token_tile <= num_text_tiles)"),
    "a column past the tail": ("if (column >= p.out_features) return;",
                               "if (column > p.out_features) return;"),
    "numbers past the tail of k": ("const bool exists = source != nullptr && k < p.in_features;",
                                   "const bool exists = source != nullptr;"),
}


def test_every_planted_bug_is_found(tmp_path):
    """The checks bite: each sabotaged copy fails them. The faithful copy, built with ucontext, passes."""
    text = (HERE / "moe_kernel.cu").read_text()
    waiting = []
    for i, (original, bug) in enumerate(PLANTED_BUGS.values()):
        assert not original or text.count(original) == 1, original
        source = tmp_path / f"{i}.cu"
        source.write_text(text.replace(original, bug) if original else text)
        flags = ["-O1"] if original else ["-O1", "-DCUDA_ON_CPU_UCONTEXT"]
        waiting.append(compile_with_gcc(source, tmp_path / f"{i}.so", *flags))
        for compiler in waiting if i % 2 or i + 1 == len(PLANTED_BUGS) else []:          # two at a time
            assert not (output := compiler.communicate()[0]), output
            waiting = []
    check = ("import os, sys, torch, test_all\n"                        # one import, a fork for each build
             "torch.set_num_threads(1)\n"
             "for path in sys.argv[1:]:\n"
             "    child = os.fork()\n"
             "    if not child:\n"
             "        try:\n            test_all.check_build(path)\n"
             "        except BaseException:\n            os._exit(1)\n"
             "        os._exit(0)\n"
             "    print('passed' if os.waitpid(child, 0)[1] == 0 else 'failed', flush=True)")
    result = run_python(check, *(tmp_path / f"{i}.so" for i in range(len(PLANTED_BUGS))))
    verdicts = [line for line in result.stdout.split() if line in ("passed", "failed")]
    expected = {name: "failed" if original else "passed" for name, (original, _) in PLANTED_BUGS.items()}
    assert dict(zip(PLANTED_BUGS, verdicts, strict=False)) == expected, result.stdout


# ---------------------------------------------------------------- the embedded world

@pytest.fixture(scope="module")
def world_tok(tmp_path_factory):
    return world.make_world_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@settings(max_examples=40)
@given(st.integers(0, 10 ** 9), st.sampled_from(list(world.KINDS)))
def test_training_and_held_out_pictures_share_no_combination_and_no_scan(seed, kind):
    train, test = (world.make_picture(random.Random(seed), kind, split) for split in ("train", "test"))
    in_test = [zlib.crc32(picture.key.encode()) % 5 == 0 for picture in (train, test)]
    assert in_test == [False, True]
    redrawn = world.make_picture(random.Random(seed), kind, "test")
    assert redrawn.key == test.key and redrawn.image.tobytes() == test.image.tobytes()


@pytest.mark.parametrize("task", world.TASKS)
def test_every_question_has_one_right_answer_which_scores_and_others_do_not(task):
    asked = world.held_out_questions(task, 12)
    assert all(world.is_correct(task, truth, truth) for _, _, truth in asked)
    truths = {truth.split()[-1] if task == "relation" else truth for _, _, truth in asked}
    assert len(truths) > 1                         # a constant answer cannot be right everywhere
    assert not all(world.is_correct(task, asked[0][2], truth) for _, _, truth in asked)
    for picture, question, truth in asked:         # a question about a picture is never ambiguous
        assert {answer for _, q, answer in picture.questions if q == question} == {truth}


def test_another_seed_asks_other_held_out_questions():
    first, again, other = ([(p.key, q) for p, q, _ in world.held_out_questions("position", 20, seed)]
                           for seed in (0, 0, 1))
    assert first == again and first != other


def test_a_box_is_right_from_half_overlap_on():
    truth = "<ref>red shape</ref><box>[[0, 0, 100, 100]]</box>"
    for box, right in (("0, 0, 100, 100", True), ("0, 0, 100, 51", True), ("0, 0, 100, 49", False),
                       ("200, 200, 300, 300", False), ("0, 0, 100", False), ("100, 100, 0, 0", False)):
        assert world.is_correct("box", f"<box>[[{box}]]</box>", truth) is right


@pytest.mark.parametrize("stage", ["S0", "S1.1", "S1.2", "S1.3", "S2"])
def test_a_stage_gives_the_same_samples_anywhere_and_text_without_unknown_pieces(stage, world_tok):
    config = train_evip.tiny_config("evip++", world_tok)
    first, second = World(stage, world_tok, config, seed=3), World(stage, world_tok, config, seed=3)
    other = World(stage, world_tok, config, seed=4)
    second[7]                                      # the order of asking does not matter
    samples = [first[i] for i in range(30)]
    assert all(torch.equal(a["input_ids"], second[i]["input_ids"]) for i, a in enumerate(samples))
    assert any(not torch.equal(a["input_ids"], other[i]["input_ids"]) for i, a in enumerate(samples))
    for sample_ in samples:
        ids, tiles = sample_["input_ids"], sample_["pixel_values"]
        assert (ids == config.img_context_token_id).sum() == 9 * (0 if tiles is None else len(tiles))
        assert not any(world_tok.sp.is_byte(i) for i in ids.tolist() if i < len(world_tok.sp))
    counts = {0 if s["pixel_values"] is None else len(s["pixel_values"]) for s in samples}
    assert counts == {"S0": {0}, "S2": {0, 1, 3}}.get(stage, {1, 3})      # a sign: two tiles and a thumbnail


def test_a_third_of_the_alt_texts_is_noise(world_tok):
    rng, wrong = random.Random(0), 0
    for _ in range(600):
        state = rng.getstate()
        conversation, image = world.world_conversation("S1.1", rng)
        replay = random.Random()
        replay.setstate(state)
        picture = world.make_picture(replay, replay.choices(list(world.KINDS), (10, 1, 1.5, 1, 1))[0])
        assert image.tobytes() == picture.image.tobytes()
        wrong += conversation[1]["value"] != picture.alt
    assert 0.25 < wrong / 600 < 0.36               # some wrong alt texts happen to fit ("a sign")


# ---------------------------------------------------------------- the notebooks

NOTEBOOKS = sorted(path.name for path in (HERE / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("name", NOTEBOOKS)


def read_notebook(name, folder=HERE):
    """(notebook, its code cells, the hash of their code)"""
    import nbformat
    notebook = nbformat.read(folder / "notebooks" / name, as_version=4)
    source_hash = runpy.run_path(str(HERE / "notebooks" / "execute.py"))["source_hash"]
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"], source_hash(notebook)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """All notebooks run by their own command, two at a time, in a copy of the project: {name: its output}."""
    copy = tmp_path_factory.mktemp("copy")
    for file in [*HERE.glob("*.py"), *HERE.glob("*.cu"), *HERE.glob("*.h")]:
        (copy / file.name).symlink_to(file)
    for folder in ("assets", "notebooks"):
        shutil.copytree(HERE / folder, copy / folder)

    def run(name):
        return subprocess.run([sys.executable, copy / "notebooks/execute.py", name], cwd=copy, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with ThreadPoolExecutor(2) as pool:
        return copy, dict(zip(NOTEBOOKS, pool.map(run, NOTEBOOKS), strict=True))


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs_from_top_to_bottom(name, executed):
    copy, results = executed
    assert results[name].returncode == 0, results[name].stdout[-3000:]
    notebook, cells, source_hash = read_notebook(name, copy)
    assert notebook.metadata["outputs_of_source"] == source_hash
    assert cells[0].outputs[0]["text"].startswith(f"Python {platform.python_version()}")


@every_notebook
def test_kept_outputs_belong_to_the_code_above_them(name):
    notebook, cells, source_hash = read_notebook(name)
    assert notebook.metadata["outputs_of_source"] == source_hash, \
        f"the code of {name} changed: python notebooks/execute.py {name}"
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error" and output.get("name") != "stderr", output
        assert str(Path.home()) not in str(output) and "/tmp/" not in str(output)
    prose = "".join(cell.source for cell in notebook.cells if cell not in cells)
    assert all((HERE / "notebooks" / link).exists() for link in re.findall(r"\]\((?!http)([^)#]+)\)", prose))


# ---------------------------------------------------------------- the README

README = (HERE / "README.md").read_text(encoding="utf-8")
RESULTS = (HERE / "RESULTS.md").read_text(encoding="utf-8")
SHORT = {"train_evip.py": "--steps=1 --batch_size=2 --grad_accum=1 --eval_questions=1",
         "sample.py": "--max_new_tokens=2", "evaluate.py": "--questions=1",
         "bench.py kernels": "--seconds=0 --image-tiles 0 --hidden-size=64 --intermediate-size=64",
         "bench.py report": "",
         "bench.py train": "--seconds=0 --rounds 2 --tiny-rounds 2",
         "bench.py infer": "--seconds=0 --layers 1 --tiles 1 --batches 1 --rounds 2 --steps 1",
         "bench.py ablation": "--seeds=1 --steps=1 --eval-questions=1"}


def readme_commands() -> list[str]:
    """The lines of its bash blocks and what the running text quotes, without comments and pip install."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    lines += re.findall(r"`((?:python|torchrun) [^`]+)`", re.sub(r"```.*?```", "", README, flags=re.S))
    lines = [" ".join(re.sub(r"\s+#.*", "", line).split()) for line in lines]
    lines = [line.removeprefix("pip install -r requirements.txt && ") for line in lines]
    return list(dict.fromkeys(filter(None, lines)))


def recipe(heading: str) -> str:
    """The first code block after a bold heading."""
    return re.search(rf"\*\*{re.escape(heading)}\.\*\*.*?```python\n(.*?)```", README, re.S)[1]


@pytest.fixture
def newcomer(short_run, tmp_path, monkeypatch):
    """A folder where the README's commands find what they name: a run, data and a checkpoint of one's own."""
    (tmp_path / "out").mkdir()
    shutil.copytree(short_run, tmp_path / "out" / "evip++")
    shutil.copytree(short_run / "S2", tmp_path / "Mono-InternVL-2B")       # in place of the official one
    shutil.copytree(short_run / "S1.3", tmp_path / "FOLDER")
    language_model(tmp_path / "internlm2-chat-1_8b", Tokenizer(short_run / "S0"), "internlm2")
    (tmp_path / "assets").mkdir()
    for path in (HERE / "assets").iterdir():                               # new files stay in this folder
        (tmp_path / "assets" / path.name).symlink_to(path)
    shutil.copy(PICTURE, tmp_path / "photo.jpg")
    write_conversations(tmp_path, 0, 4)
    (tmp_path / "questions.jsonl").write_text('{"image": "photo.jpg", "question": "What is this?"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda prompt="": (_ for _ in ()).throw(EOFError))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_runs(command, newcomer, monkeypatch, capfd):
    words = shlex.split(command)
    if words[0] == "torchrun":                               # as one process
        words = ["python", *words[words.index("train_evip.py"):]]
    assert words[0] == "python"
    if words[1] == "-m":                                     # pytest: these tests themselves
        assert words[2] == "pytest" and words[-1] == Path(__file__).name
    elif words[1] in ("notebooks/execute.py", "budget.py"):  # the notebooks are run above
        assert (HERE / words[1]).exists()
        if words[1] == "budget.py":
            subprocess.run([sys.executable, HERE / "budget.py", *words[2:]], check=True)
    else:
        scripts = {f"{module.__name__}.py": module for module in (train_evip, sample, bench, evaluate)}
        options = SHORT[" ".join(words[1:3 if words[1] == "bench.py" else 2])].split()
        if words[1] == "bench.py":
            monkeypatch.setattr(bench, "VARIANTS", dict(list(bench.VARIANTS.items())[:1]))
            monkeypatch.setattr(MonoInternVLConfig, "mono_internvl_1_5_2b", narrow)
        assert scripts[words[1]].main([*words[2:], *options]) == 0, capfd.readouterr().err


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
             "tensorboard/"}
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


def test_the_readme_repeats_the_recipes_and_the_results_truly():
    for stage, v1 in zip(train_evip.RECIPES["evip++"], train_evip.RECIPES["evip"], strict=True):
        row = [stage.name, stage.goal, stage.trainable, str(stage.max_tiles),
               f"{stage.steps} · {stage.lr:g} {stage.schedule}", stage.paper, v1.paper]
        assert f"| {' | '.join(row)} |" in README
    extract = README[README.index("## What is measured"):README.index("## Paper facts")]
    figures = [line for line in extract.splitlines() if line.startswith("| ")]
    assert len(figures) == 8 and set(figures) <= set(RESULTS.splitlines())
    assert len(re.findall("^pip install", README, re.M)) == 2              # what .ci/run runs


def test_the_recipe_for_an_expert_type_makes_one(tmp_path, monkeypatch):
    monkeypatch.setattr(mono_internvl, "DecoderLayer", mono_internvl.DecoderLayer)       # comes back later
    exec(recipe("An expert type"), {})
    model = tiny().copy_text_experts()
    train_evip.select_trainable(model, stage_of("S1.1"))
    norms = [p for name, p in model.named_parameters() if "ffn_norm_ve" in name]
    assert len(norms) == 2 and all(p.requires_grad for p in norms)
    ids, pixels = torch.tensor([[1, IMG, 2]]), torch.randn(1, 3, 4, 4)
    text, image = model(ids[:, :1])[0], model(ids, pixels)[0]
    norms[0].data.mul_(3)
    assert torch.equal(model(ids[:, :1])[0], text) and not torch.equal(model(ids, pixels)[0], image)
    model.save_pretrained(tmp_path)
    assert_close(MonoInternVL.from_pretrained(tmp_path)(ids, pixels)[0], model(ids, pixels)[0])


@pytest.mark.slow
def test_the_recipes_for_a_dataset_and_a_stage_train_on_it(newcomer, monkeypatch):
    for kind, name in (("digit", "daisy"), ("scene", "rose")):
        (newcomer / "flowers" / name).mkdir(parents=True)
        world.make_picture(random.Random(0), kind).image.save(newcomer / "flowers" / name / "1.jpg")
    exec(recipe("A dataset"), {})
    tok = Tokenizer(newcomer / "out/evip++/S2")
    config = MonoInternVLConfig.from_json(newcomer / "out/evip++/S2/config.json")
    labels = [sample["labels"] for sample in load_meta("meta.json", tok, config)]
    learned = [tok.decode(row[row != IGNORED].tolist()) for row in labels]
    assert learned == ["daisy", "rose"]
    monkeypatch.setitem(train_evip.RECIPES, "evip++", train_evip.RECIPES["evip++"])      # comes back later
    main = train_evip.main
    monkeypatch.setattr(train_evip, "main", lambda argv: main([*argv, "--steps=2", "--batch_size=2"]))
    exec(recipe("A stage"), {})
    assert MonoInternVL.from_pretrained(newcomer / "out/evip++/S3")


# ---------------------------------------------------------------- training

def tiny_flags(**changes) -> train_evip.Flags:
    values = {"device": "cpu", "batch_size": 4, "grad_accum": 1, "dtype": "float32", **changes}
    return parse_flags(train_evip.Flags, [f"--{name}" if value is True else f"--{name}={value}"
                                          for name, value in values.items()])


def stage_of(name: str, recipe="evip++", **changes) -> train_evip.Stage:
    stage = next(s for s in train_evip.RECIPES[recipe] if s.name == name)
    return replace(stage, **changes)


@pytest.mark.parametrize("recipe", ["evip", "evip++"])
def test_learning_to_see_leaves_text_weights_and_logits_bitwise_as_they_were(recipe, world_tok, tmp_path):
    torch.manual_seed(0)
    model = MonoInternVL(train_evip.tiny_config(recipe, world_tok)).copy_text_experts()
    log = train_evip.Progress(tmp_path / "log.jsonl")
    logits, _ = evaluate.text_probe(model, world_tok)
    for name in ("S1.1", "S1.2"):
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        train_evip.train_stage(model, World(name, world_tok, model.config), stage_of(name, recipe, steps=4),
                               tiny_flags(), log, world_tok)
        visual = {n for n in before if n.startswith(("mlp1", "vision_model")) or "_ve." in n}
        visual -= {"vision_model.embeddings.class_embedding"}             # in the file format only
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == visual
        assert {n for n, p in model.named_parameters() if p.grad is not None} <= visual
        assert torch.equal(evaluate.text_probe(model, world_tok)[0], logits)


def test_each_stage_trains_what_the_recipe_says(world_tok):
    model = MonoInternVL(train_evip.tiny_config("evip++", world_tok))
    names = {name for name, _ in model.named_parameters()} - {"vision_model.embeddings.class_embedding"}
    visual = {n for n in names if n.startswith(("mlp1", "vision_model")) or "_ve." in n}
    attention = {n for n in names if n.endswith(("wqkv.weight", "wo.weight"))}
    expected = {"S0": names - visual, "S1.1": visual, "S1.2": visual, "S1.3": visual | attention, "S2": names}
    for name, trained in expected.items():
        train_evip.select_trainable(model, stage_of(name))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trained, name


def test_accumulated_gradients_equal_one_large_batch_whatever_the_share_of_supervised_tokens(
        world_tok, tmp_path, monkeypatch):
    results = []
    for size in (8, 2):
        torch.manual_seed(0)
        model = MonoInternVL(train_evip.tiny_config("evip++", world_tok))
        gradients = []
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda trained, limit, seen=gradients: (
            seen.append([p.grad.clone() for p in trained]), torch.tensor(0.0))[1])
        train_evip.train_stage(model, World("S2", world_tok, model.config), stage_of("S2", steps=1),
                               tiny_flags(batch_size=size, grad_accum=8 // size, pool=1),
                               train_evip.Progress(tmp_path / f"{size}.jsonl"), world_tok)
        results.append((json.loads((tmp_path / f"{size}.jsonl").read_text()), gradients[0]))
    (large, expected), (small, accumulated) = results
    assert large["loss"] == pytest.approx(small["loss"], rel=1e-6)
    assert large["tasks"] == pytest.approx(small["tasks"], rel=1e-5) and len(large["tasks"]) > 1
    for one, other in zip(accumulated, expected, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_a_model_can_learn_a_handful_of_pictures_by_heart(world_tok, tmp_path):
    torch.manual_seed(0)
    model = MonoInternVL(train_evip.tiny_config("evip++", world_tok))
    samples = [World("S1.2", world_tok, model.config)[i] for i in range(8)]
    train_evip.train_stage(model, samples, stage_of("S2", steps=120, lr=2e-3),
                           tiny_flags(batch_size=8, pool=1), train_evip.Progress(tmp_path / "log"), world_tok)
    batch = collate(samples)
    assert model(**batch)[1].item() < 0.05
    # it is the picture that it knows: with the pixels of another, the loss is high
    pixels = [s["pixel_values"] for s in samples]
    shifted = [{**s, "pixel_values": p} for s, p in zip(samples, pixels[1:] + pixels[:1], strict=True)
               if len(p) == len(s["pixel_values"])]
    assert model(**collate(shifted))[1].item() > 0.5


def test_the_learning_rate_warms_up_and_then_stays_or_falls_to_zero():
    flags = tiny_flags(warmup=0.1)
    constant, cosine = stage_of("S1.1", lr=1.0), stage_of("S2", lr=1.0)
    rates = [[train_evip.learning_rate(i, 100, stage, flags) for i in range(100)]
             for stage in (constant, cosine)]
    assert rates[0][:10] == rates[1][:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(rates[0][10:]) == {1.0}
    assert rates[1][10] == 1.0 and rates[1][55] == pytest.approx(0.5) and 0 < rates[1][99] < 0.001
    assert all(a > b for a, b in itertools.pairwise(rates[1][10:]))


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The main command, shortened to a few steps a stage."""
    out = tmp_path_factory.mktemp("project") / "out" / "run"
    assert train_evip.main(["--steps=6", f"--out={out}", "--eval_questions=3", "--batch_size=4",
                            "--grad_accum=1"]) == 0
    return out


def test_one_command_goes_through_every_stage_and_reports_what_it_did(short_run):
    events = [json.loads(line) for line in (short_run / "log.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "run"
    steps = [(e["stage"], e["step"]) for e in events[1:]]
    assert steps == [(s, i) for s in ("S0", "S1.1", "S1.2", "S1.3", "S2") for i in range(6)]
    results = json.loads((short_run / "results.json").read_text())
    for stage in ("S1.1", "S1.2"):
        assert results[stage]["weights bitwise equal"] and results[stage]["logits bitwise equal"]
        assert results[stage]["text loss before"] == results[stage]["text loss after"]
    assert set(results["tasks"]) == {*world.TASKS, "mean"}
    for name in ("loss.png", "predictions.png"):
        assert min(Image.open(short_run / name).size) > 300
    for stage in ("S0", "S1.1", "S1.2", "S1.3", "S2"):
        model = MonoInternVL.from_pretrained(short_run / stage)
        assert model.config.vocab_size == len(Tokenizer(short_run / stage))


def test_sample_takes_the_newest_stage_and_says_so(short_run, monkeypatch, capsys):
    monkeypatch.chdir(short_run.parent.parent)
    world.make_picture(random.Random(0), "digit").image.resize((200, 200)).save("mine.png")
    assert sample.main(["--image", "mine.png", "--prompt", "Which digit?", "--max_new_tokens", "4"]) == 0
    assert str(Path("out/run/S2")) in capsys.readouterr().err


def test_stages_one_by_one_equal_all_in_one_run(short_run, tmp_path):
    for stage in ("S0", "S1.1", "S1.2"):
        assert train_evip.main(["--steps=6", f"--out={tmp_path}", "--batch_size=4", "--grad_accum=1",
                                "--stages", stage]) == 0
    for stage in ("S0", "S1.1", "S1.2"):
        one, all_ = (load_file(folder / stage / "model.safetensors") for folder in (tmp_path, short_run))
        assert all(torch.equal(one[name], all_[name]) for name in all_), stage


def write_conversations(folder: Path, bad: int, good: int) -> Path:
    """meta.json with `good` readable samples and `bad` ones whose image is damaged."""
    world.make_picture(random.Random(0), "scene").image.save(folder / "good.png")
    (folder / "bad.png").write_bytes(b"no picture")
    lines = [{"id": i, "image": "bad.png" if i < bad else "good.png",
              "conversations": data.turns("<image>\nWhat is it?", "a scene.")} for i in range(bad + good)]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    meta = {"mine": {"root": ".", "annotation": "lines.jsonl", "repeat_time": 1}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


def test_own_data_trains_and_a_bad_sample_is_left_out_and_named(short_run, tmp_path, capsys):
    arguments = ["--data", str(write_conversations(tmp_path, 1, 9)), "--init_from", str(short_run / "S1.3"),
                 "--out", str(tmp_path / "out"), "--stages", "S2", "--steps=3", "--batch_size=2",
                 "--grad_accum=1"]
    assert train_evip.main([*arguments, "--max_bad=0.2"]) == 0
    named = [e for e in map(json.loads, open(tmp_path / "out/log.jsonl")) if e.get("event") == "bad sample"]
    assert len(named) == 1 and "lines.jsonl:1" in named[0]["error"] and "bad.png" in named[0]["error"]
    assert "lines.jsonl:1" in capsys.readouterr().err
    assert MonoInternVL.from_pretrained(tmp_path / "out/S2")
    assert train_evip.main([*arguments, "--max_bad=0.05"]) == 1
    assert "--max_bad 0.05" in capsys.readouterr().err


def test_the_ablation_compares_four_ways_from_one_language_model(tmp_path, monkeypatch, capsys):
    results = bench.ablation(tiny_flags(out=str(tmp_path), steps=2, eval_questions=1, batch_size=2), 2)
    assert results == json.loads((tmp_path / "results.json").read_text())
    rows = results["rows"]
    assert [(row["seed"], row["variant"]) for row in rows] == \
        [(seed, variant) for seed in range(2) for variant in bench.VARIANTS]
    for i, row in enumerate(rows):
        delta = "delta" in row["variant"]
        assert row["text bitwise equal"] == delta == (row["text before"] == row["text after"])
        assert row["text before"] == rows[i // 4 * 4]["text before"]       # one S0 a seed
        assert len(row["caption loss"]) == 2 and 0 <= row["blank"] <= 1
    assert len({row["caption loss"][0] for row in rows}) == 8              # but eight trainings
    assert bench.ablation_table(results).count(" ± ") == 20
    monkeypatch.setattr(train_evip, "train_stage", lambda *arguments: False)             # as after Ctrl-C
    with pytest.raises(InputError, match="the ablation was stopped"):
        bench.ablation(tiny_flags(out=str(tmp_path), steps=2), 1)


@pytest.mark.parametrize("arguments, message", [
    (["--stages", "S3"], "no such stage; there are S0, S1.1"),
    (["--stages", "S1.2"], "holds no checkpoint to start S1.2 from"),
    (["--stages", "S2", "--init_from", "nowhere"], "nowhere holds no checkpoint"),
    (["--data", "meta.json"], "with --data, name other --stages"),
    (["--batch_size", "0"], "--batch_size is 0"),
])
def test_a_run_that_cannot_start_says_why_in_one_line(arguments, message, tmp_path, capsys):
    assert train_evip.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_unknown_flag_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as stop:
        train_evip.main(["--stage", "S2"])
    assert stop.value.code == 2 and "did you mean --stages?" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_training(world_tok, tmp_path):
    model = MonoInternVL(train_evip.tiny_config("evip++", world_tok))
    model.mlp1[1].weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="loss of S1.2 is nan at step 0.*samples: S1.2/"):
        train_evip.train_stage(model, World("S1.2", world_tok, model.config), stage_of("S1.2"), tiny_flags(),
                               train_evip.Progress(tmp_path / "log.jsonl"), world_tok)


# ---------------------------------------------------------------- training: distribution and resume
# Processes are forked, not started anew: no imports again, and what a test patched holds in them as well.

def train(folder, *flags, world=1, hook=None, kill_at=None) -> list[int]:
    """Exit codes of `world` processes that run train_evip.py with flags, and write to `folder`. hook(rank,
    step) is called in each of them in every step, before the optimizer's. kill_at waits for the moment to
    kill them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def one_process(rank):
        torch.set_num_threads(1)
        if world > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": str(port)}
        original = train_evip.learning_rate
        if hook:
            train_evip.learning_rate = lambda step, *rest: (hook(rank, step), original(step, *rest))[1]
        with open(f"{folder}.err{rank}", "a") as err, contextlib.redirect_stderr(err), \
                contextlib.redirect_stdout(err):
            code = train_evip.main([*flags, f"--out={folder}", "--device=cpu"])
            err.flush()
        os._exit(code)             # no clean-up of pytest's

    processes = [FORK.Process(target=one_process, args=(rank,)) for rank in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        if kill_at:
            kill_at()
            process.kill()
        process.join(200)
        assert process.exitcode is not None, "a process hangs"
    return [process.exitcode for process in processes]


FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def lessons(tmp_path_factory, world_tok):
    """A very small model, and 24 samples for it: half of them text alone, of many lengths."""
    folder, rng = tmp_path_factory.mktemp("lessons"), random.Random(0)
    torch.manual_seed(0)
    config = replace(train_evip.tiny_config("evip++", world_tok), hidden_size=32, intermediate_size=32,
                     num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vision_hidden_size=8)
    train_evip.save(MonoInternVL(config), world_tok, folder / "model")
    world.make_picture(rng, "scene").image.save(folder / "scene.png")
    lines = []
    for i in range(24):
        words = "a small red ring. " * rng.randint(1, 8)
        image = {} if i % 2 else {"image": "scene.png"}
        question = "What is this?" if i % 2 else "<image>\nWhat is this?"
        lines.append({"id": i, **image, "conversations": data.turns(question, words)})
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "meta.json").write_text(json.dumps({"mine": {"root": ".", "annotation": "lines.jsonl"}}))
    return folder


def steps_logged(folder) -> list:
    """What must not depend on when and how often a run was interrupted."""
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    keys = ("stage", "step", "loss", "tasks", "lr", "grad_norm", "order", "utilisation")     # if packed
    return [[e.get(key) for key in keys] for e in events if "loss" in e]


def signal_at(when, number=signal.SIGTERM, to=0):
    """A hook: the process `to` gets a signal in step `when`."""
    return lambda rank, step: os.kill(os.getpid(), number) if (rank, step) == (to, when) else None


def contents(folder: Path) -> dict[str, object]:
    """Every file below: the bits of each tensor, JSON but for the log's length, bytes."""
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file()}
    return {name: {key: t.numpy().tobytes() for key, t in load_file(p).items()} if p.suffix == ".safetensors"
            else {**json.loads(p.read_text()), "log": None} if p.suffix == ".json" else p.read_bytes()
            for name, p in files.items()}


@pytest.mark.parametrize("world, parallel", [(1, "auto"), (2, "ddp"), (2, "fsdp")])
def test_a_stopped_and_resumed_run_equals_one_in_one_go_bit_for_bit(lessons, tmp_path, world, parallel):
    """With packing, accumulation, workers and recomputed layers. Weights, AdamW's moments, the place in the
    data, random numbers, the log."""
    flags = [f"--data={lessons}/meta.json", f"--init_from={lessons}/model", "--stages=S2", "--steps=7",
             "--pack", "--max_tokens=96", "--batch_size=1", "--grad_accum=2", "--workers=1", "--pool=2",
             "--recompute=on", "--save_every=5", f"--parallel={parallel}"]
    once, twice = tmp_path / "once", tmp_path / "twice"

    def keep(rank, step):                          # what was saved after step 5 goes with the stage
        if (rank, step) == (0, 5):
            [folder] = tmp_path.glob("*/S2.partial/step-0000005")
            folder.rename(folder.parent.parent / "kept")

    done = [0] * world
    assert train(once, *flags, world=world, hook=keep) == done
    assert train(twice, *flags, world=world, hook=signal_at(0, signal.SIGINT, to=world - 1)) == done
    assert [p.name for p in (twice / "S2.partial").iterdir()] == ["step-0000002"]
    assert train(twice, *flags, world=world, hook=keep) == done
    one, other = (contents(folder / "kept") for folder in (once, twice))
    parts = {"model", "optimizer", *(f"rank{i}.json" for i in range(world))}
    assert {name.split("/")[0] for name in one} == parts
    assert one == other
    assert contents(once / "S2") == contents(twice / "S2") and not (twice / "S2.partial").exists()
    assert steps_logged(once) == steps_logged(twice)
    assert [step for _, step, *_ in steps_logged(once)] == list(range(7))


def test_ten_kills_at_random_moments_lose_nothing_beyond_the_last_checkpoint(lessons, tmp_path):
    flags = [f"--data={lessons}/meta.json", f"--init_from={lessons}/model", "--stages=S2", "--steps=32",
             "--batch_size=2", "--grad_accum=1", "--save_every=1", "--max_tokens=64", "--max_bad=1"]
    out, rng, saved = tmp_path / "killed", random.Random(0), [0]

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
    assert saved == sorted(saved) and saved[-1] > 5
    assert train(tmp_path / "once", *flags) == [0]
    assert train(out, *flags) == [0]
    assert contents(out / "S2") == contents(tmp_path / "once" / "S2")
    assert steps_logged(out) == steps_logged(tmp_path / "once")
    bad = [[e for e in map(json.loads, (folder / "log.jsonl").open()) if e.get("event") == "bad sample"]
           for folder in (out, tmp_path / "once")]
    assert bad[0] == bad[1] and len(bad[0]) > 0    # named once, although many lives met them


def test_two_processes_learn_what_one_learns_from_twice_the_batch(lessons, tmp_path, monkeypatch):
    """With DDP and FSDP; and what is frozen has no gradient, no optimizer state and does not change."""
    original, initial = train_evip.train_stage, load_file(lessons / "model" / "model.safetensors")

    def inspected(model, *rest):                   # in the processes: what is there after the last step
        optimizers = []
        adamw = torch.optim.AdamW
        torch.optim.AdamW = lambda *a, **o: (optimizers.append(adamw(*a, **o)), optimizers[0])[1]
        finished = original(model, *rest)
        trained = {id(p) for p in model.parameters() if p.requires_grad}
        assert {id(p) for p in optimizers[0].state} == trained and len(trained) == 19
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
        states = optimizers[0].state.values()
        held = {"weights": model.parameters(),
                "optimizer": (state[moment] for state in states for moment in ("exp_avg", "exp_avg_sq"))}
        with torch.device("meta"):
            plan = train_evip.memory_plan(MonoInternVL(model.config), *rest[1:3], common.world_size())
        for part, tensors in held.items():
            own = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)
            everyones = common.sum_over_processes(own)[0] / common.world_size()
            assert everyones == plan[part], (part, everyones, plan)
        return finished

    monkeypatch.setattr(train_evip, "train_stage", inspected)
    results = {}
    for name, world, parallel, size, dtype in (
            ("one", 1, "auto", 4, "float32"), ("ddp", 2, "ddp", 2, "float32"),
            ("fsdp", 2, "fsdp", 1, "float32"), ("coarse", 2, "fsdp", 2, "bfloat16")):
        assert train(tmp_path / name, f"--data={lessons}/meta.json", f"--init_from={lessons}/model",
                     "--pool=1", "--stages=S1.2", "--steps=4", f"--parallel={parallel}", f"--dtype={dtype}",
                     f"--batch_size={size}", f"--grad_accum={4 // size // world}", world=world) == [0] * world
        trained = load_file(tmp_path / name / "S1.2" / "model.safetensors")
        results[name] = trained, steps_logged(tmp_path / name)
    weights, steps = results["one"]
    frozen = {n for n in weights if not re.search(train_evip.VISION, n)}
    assert {n for n in weights if torch.equal(weights[n], initial[n])} == frozen
    for name, tolerance in (("ddp", 1e-5), ("fsdp", 1e-5), ("coarse", 2e-2)):
        others, logged = results[name]
        for n, t in weights.items():
            if n in frozen:
                assert torch.equal(others[n], t.bfloat16() if name == "coarse" else t)
            else:                                  # what trains is float32 in any case
                assert_close(others[n], t, rtol=0, atol=tolerance)
        for mine, theirs in zip(steps, logged, strict=True):
            assert mine[:2] == theirs[:2] and mine[2] == pytest.approx(theirs[2], abs=5 * tolerance)
            assert mine[5] == pytest.approx(theirs[5], rel=10 * tolerance)             # the gradient's norm


def test_problems_of_one_process_stop_all_and_leave_the_earlier_checkpoints_usable(lessons, tmp_path):
    flags = [f"--data={lessons}/meta.json", f"--init_from={lessons}/model", "--stages=S2", "--steps=4",
             "--batch_size=2", "--grad_accum=1", "--save_every=1"]

    def disk_is_full(rank, step):                  # no file of the first process may grow beyond 50 kB
        if (rank, step) == (0, 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))

    out = tmp_path / "full"
    assert train(out, *flags, "--parallel=fsdp", world=2, hook=disk_is_full) == [1, 1]
    for rank in (0, 1):
        error = Path(f"{out}.err{rank}").read_text().splitlines()[-1]
        assert "the checkpoint of step 2 cannot be written" in error and "make room" in error
        assert "process 0: [Errno 27] File too large" in error
    assert [p.name for p in (out / "S2.partial").iterdir()] == ["step-0000001"]
    # another number of processes cannot go on with the order of samples, and says so; as many can
    assert train(out, *flags) == [1]
    assert "saved by 2 process(es)" in Path(f"{out}.err0").read_text()
    assert train(out, *flags, "--parallel=fsdp", world=2) == [0, 0]
    assert [step for _, step, *_ in steps_logged(out)] == [0, 1, 2, 3]

    # half of the samples cannot be read, all of them by one process
    shutil.copytree(lessons, tmp_path / "bad")
    (tmp_path / "bad" / "scene.png").write_bytes(b"no picture")
    out = tmp_path / "bad" / "out"
    assert train(out, f"--data={tmp_path}/bad/meta.json", *flags[1:], "--max_bad=0.1", world=2) == [1, 1]
    for rank in (0, 1):
        error = Path(f"{out}.err{rank}").read_text()
        assert "samples are unreadable; --max_bad 0.1 allows fewer" in error and "Traceback" not in error
        log = (out / f"log.rank{rank}.jsonl" if rank else out / "log.jsonl").open()
        named = [e["error"] for e in map(json.loads, log) if "error" in e]
        assert named and all("scene.png" in error for error in named) and len(set(named)) == len(named)


def test_an_interrupted_run_goes_on_only_with_its_own_flags_and_a_finished_one_starts_anew(lessons, tmp_path):
    flags = [f"--data={lessons}/meta.json", f"--init_from={lessons}/model", "--stages", "S1.3", "S2",
             "--steps=3", "--batch_size=2", "--grad_accum=1"]
    assert train(tmp_path / "out", *flags, hook=signal_at(0)) == [0]       # S1.3 stops after step 2
    said = Path(f"{tmp_path}/out.err0")
    assert "stopped" in said.read_text()
    assert train(tmp_path / "out", *flags, "--lr=0.5") == [1]
    assert "had --lr None, not 0.5" in said.read_text()
    kept = contents(tmp_path / "out" / "S1.3.partial")
    assert train(tmp_path / "out", *flags, "--keep=1") == [0] and kept     # this one changes nothing learned
    steps = [step[:2] for step in steps_logged(tmp_path / "out")]
    assert steps == [[stage, i] for stage in ("S1.3", "S2") for i in range(3)]
    once = contents(tmp_path / "out" / "S2")
    assert train(tmp_path / "out", *flags, "--lr=0.5") == [0]              # finished: all is made anew
    assert contents(tmp_path / "out" / "S2") != once
    assert train(tmp_path / "out", *flags, hook=signal_at(0)) == [0]
    assert train(tmp_path / "out", *flags, "--resume=never") == [0]
    assert contents(tmp_path / "out" / "S2") == once
    assert said.read_text().count("which continues") == 1


@pytest.mark.parametrize("stage, dtype", [("S1.2", "float32"), ("S1.2", "bfloat16"), ("S2", "float32")])
def test_the_predicted_activations_are_what_the_layers_keep(stage, dtype):
    c = MonoInternVLConfig(vocab_size=500, hidden_size=128, intermediate_size=512, num_hidden_layers=4,
                           num_attention_heads=4, num_key_value_heads=2, vision_hidden_size=32, patch_size=8,
                           image_size=64, img_context_token_id=499, attn_experts="qkvo")
    model, stage = MonoInternVL(c), stage_of(stage, max_tiles=3)
    flags = tiny_flags(batch_size=2, max_tokens=192, dtype=dtype)
    plan = train_evip.memory_plan(model, stage, flags, 1)
    train_evip.select_trainable(model, stage)
    train_evip.distribute(model, flags)
    ids = torch.randint(0, 499, (2, 192))
    ids[:, 3:3 + 4 * 16] = 499                     # 3 tiles and the thumbnail
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t   # alive, so that no other tensor gets its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), \
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        model(ids, torch.randn(8, 3, 64, 64), labels=ids.where(ids != 499, IGNORED))
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in weights)
    assert 0.85 < (plan["activations"] + plan["copies"]) / measured < 1.15


def test_a_dry_run_tells_what_would_happen_and_writes_nothing(lessons, tmp_path, capsys):
    flags = ["--dry_run", f"--out={tmp_path / 'out'}"]
    assert train_evip.main(flags) == 0
    said = capsys.readouterr().out
    assert "S1.1  concepts, from noisy alt texts" in said and "optimizer 0.00" in said
    assert "»" in said and "<|im_start|>user" in said
    assert train_evip.main([*flags, f"--data={lessons}/meta.json", f"--init_from={lessons}/model", "--stages",
                            "S2", "--pack", "--max_tokens=128"]) == 0
    said = capsys.readouterr().out
    assert "<img><IMG_CONTEXT>×9</img>\nWhat is this?" in said and "»a small red ring." in said
    # the real thing, from its config alone: 1.27 B parameters learn in S1.1
    (tmp_path / "2b").mkdir()
    (tmp_path / "2b" / "config.json").write_text(MonoInternVLConfig.mono_internvl_1_5_2b(
        img_context_token_id=92546).to_json())
    for path in (lessons / "model").glob("*token*"):
        shutil.copy(path, tmp_path / "2b")
    assert train_evip.main([*flags, f"--data={lessons}/meta.json", f"--init_from={tmp_path / '2b'}",
                            "--preset=2b", "--dtype=bfloat16"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"S1.1 +concepts.* visual +4 +122000 +2048 ", said)
    assert re.search(r"S1.1 +1524.20 M train: weights 9.875, gradients 6.097, optimizer 12.194", said)
    assert not (tmp_path / "out").exists()


def language_model(folder: Path, world_tok, kind: str) -> Path:
    """A small LLM folder with a sentencepiece tokenizer that knows no chat and no images."""
    folder.mkdir()
    shutil.copy(world_tok.folder / "tokenizer.model", folder)
    size = len(world_tok.sp)
    if kind == "llama":
        source = GOLDEN / "llama_tiny"
        weights = load_file(source / "model.safetensors")
        config = json.loads((source / "config.json").read_text())
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = torch.randn(size, 32)
    else:
        write_llm(folder)
        weights = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        for name in ("model.tok_embeddings.weight", "output.weight"):
            weights[name] = torch.randn(size, 32)
    save_file(weights, folder / "model.safetensors")
    config |= {"vocab_size": size, "max_position_embeddings": 1024}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind, recipe", [("llama", "evip++"), ("internlm2", "evip")])
def test_training_starts_from_a_language_model_whose_tokenizer_gets_image_tokens(world_tok, tmp_path, capsys,
                                                                                 kind, recipe):
    llm = language_model(tmp_path / "llm", world_tok, kind)
    world.make_picture(random.Random(0), "scene").image.save(tmp_path / "scene.png")
    line = {"id": 0, "image": "scene.png", "conversations": data.turns("<image>", "a ring.")}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line))
    (tmp_path / "meta.json").write_text(json.dumps({"mine": {"root": ".", "annotation": "lines.jsonl"}}))
    flags = [f"--data={tmp_path}/meta.json", f"--init_from={llm}", f"--recipe={recipe}", "--stages=S1.1",
             "--steps=1", "--batch_size=1", "--grad_accum=1", f"--out={tmp_path}/out", "--device=cpu"]
    assert train_evip.main(flags) == 0
    said, size = capsys.readouterr().out, len(world_tok.sp)
    assert "gets <|im_end|>, <|im_start|>, <img>, </img>, <IMG" in said and f"ids from {size} on" in said
    assert "bitwise equal: text logits True" in said
    model = MonoInternVL.from_pretrained(tmp_path / "out" / "S1.1")
    tok = Tokenizer(tmp_path / "out" / "S1.1")
    assert model.config.img_context_token_id == tok.token_id("<IMG_CONTEXT>") == size + 4
    assert model.config.attn_experts == ("qkvo" if recipe == "evip++" else "")
    embeddings = model.language_model.model["tok_embeddings"].weight
    assert len(embeddings) == model.config.vocab_size == len(tok) == size + 11
    assert_close(embeddings[size:], embeddings[:size].mean(0).expand(11, -1))
    (llm / "tokenizer.model").rename(llm / "tokenizer.json")
    assert train_evip.main([*flags, "--resume=never"]) == 1
    assert "tokenizer.json only" in capsys.readouterr().err


def test_compiled_layers_have_the_loss_and_gradients_of_the_others(monkeypatch):
    compile_ = torch.nn.Module.compile             # dynamo alone: the C++ compiler takes minutes
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **o: compile_(self, backend="eager", **o))
    ids, pixels, mask = batch_of([[False, True, False, False, True], [False] * 3], "right")
    plain, compiled = (train_evip.distribute(tiny(num_hidden_layers=1), tiny_flags(**flags))
                       for flags in ({}, {"compile": True}))
    assert plain.language_model.model.layers[0]._compiled_call_impl is None
    assert compiled.language_model.model.layers[0]._compiled_call_impl is not None
    losses = [m(ids, pixels, mask, ids.where(mask == 1, IGNORED))[1] for m in (plain, compiled)]
    assert_close(losses[1], losses[0])
    expected, actual = (gradients(m, loss) for m, loss in zip((plain, compiled), losses, strict=True))
    for name in expected:
        assert_close(actual[name], expected[name])


def test_torchrun_starts_it(lessons, tmp_path):
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                          "train_evip.py", f"--data={lessons}/meta.json", f"--init_from={lessons}/model",
                          "--stages=S2", "--steps=2", f"--out={tmp_path}", "--device=cpu"],
                         cwd=HERE, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert "2 process(es), cpu" in run.stdout and run.stdout.count("holds") == 0
    assert re.search(r"S2 .* 2 +16 +1e-03", run.stdout)                    # the table's batch, in halves
    assert [step for _, step, *_ in steps_logged(tmp_path)] == [0, 1]
    assert MonoInternVL.from_pretrained(tmp_path / "S2")


def test_the_presets_have_the_papers_and_the_official_scripts_figures():
    real, sft = train_evip.PRESETS["2b"], train_evip.PRESETS["llava_sft"]
    for stages in real.values():
        assert [s.name for s in stages] == ["S1.1", "S1.2", "S1.3", "S2"]
        assert [s.max_tiles for s in stages] == [4, 6, 12, 24]
        assert [s.trainable for s in stages] == ["visual", "visual", "visual + attention", "all"]
        assert all(s.max_tokens > 256 * (s.max_tiles + 1) for s in stages)
    seen = {recipe: sum(s.steps * s.batch for s in stages[:3]) for recipe, stages in real.items()}
    assert seen == pytest.approx({"evip": 1323e6, "evip++": 550e6}, rel=0.01)
    for stage, in sft.values():
        flags = parse_flags(train_evip.Flags, [])
        assert (stage.lr, stage.schedule, stage.batch, stage.max_tokens, stage.max_tiles, flags.warmup,
                flags.weight_decay) == (4e-5, "cosine", 128, 2048, 6, 0.03, 0.01)
        assert stage.steps * stage.batch == pytest.approx(665298, rel=1e-3)                # one epoch
