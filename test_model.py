"""Tests of mono_internvl.py: the official numbers, an independent reference, and laws (hypothesis)."""
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from mono_internvl import (
    FeedForward,
    InputError,
    MonoInternVL,
    MonoInternVLConfig,
    Routing,
    mmoe_linear,
    mmoe_swiglu,
    pixel_shuffle,
    sample_token,
)

GOLDEN = Path(__file__).parent / "assets" / "golden"
IMG = 40                                          # <IMG_CONTEXT> of the tiny models below
ROPE = {"none": None, **{kind: {"type": kind, "factor": 2.0} for kind in ("linear", "dynamic")}}
law = settings(max_examples=50, deadline=None, derandomize=True)


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


def visual_rows(min_rows=1, max_rows=3, max_tokens=9):
    row = st.lists(st.booleans(), min_size=1, max_size=max_tokens)
    return st.lists(row, min_size=min_rows, max_size=max_rows)


def record(module, store, what=lambda args, out: out):
    return module.register_forward_hook(lambda _, args, out: store.append(what(args, out).detach()))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


# ---------------------------------------------------------------- the official numbers

@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "official_tiny" / "golden.safetensors")


@pytest.fixture(scope="module")
def official():
    model = MonoInternVL.from_pretrained(GOLDEN / "official_tiny")
    model.config.img_context_token_id = 120
    return model


def assert_parity(ours, theirs):
    assert_close(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["prefill", "batch", "long", "text"])
@pytest.mark.parametrize("moe", ["torch", "dense"])
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


@pytest.mark.parametrize("moe", ["torch", "dense"])
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
    steps = []
    hook = record(official.language_model.output, steps)
    tokens = list(official.generate(golden["prefill.input_ids"], golden["prefill.pixel_values"],
                                    max_new_tokens=9, prefill_chunk=chunk))
    hook.remove()
    assert torch.equal(torch.stack(tokens, 1)[:, :8], golden["greedy.tokens"])
    assert_parity(torch.stack(steps, 1), golden["greedy.step_logits"])


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


# ---------------------------------------------------------------- files

def tensors_of(folder):
    return {name: t for file in Path(folder).glob("*.safetensors") for name, t in load_file(file).items()}


def test_loading_saving_and_loading_an_official_checkpoint_is_bitwise(tmp_path):
    source = GOLDEN / "official_tiny"
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
    monkeypatch.setattr("mono_internvl.save_file", disk_full)
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
    official = json.loads((GOLDEN / "official_tiny" / "config.json").read_text())
    assert written["llm_config"].keys() - official["llm_config"].keys() == {"attn_experts"}
    assert written["vision_config"].keys() == official["vision_config"].keys()
    assert written.keys() - official.keys() == {"img_context_token_id"}


def test_fields_that_hugging_face_adds_to_a_config_do_not_disturb(tmp_path):
    official = json.loads((GOLDEN / "official_tiny" / "config.json").read_text())
    official["llm_config"] |= {"torch_dtype": "bfloat16", "top_p": 1.0, "_name_or_path": "x"}
    official |= {"auto_map": {"AutoModel": "x.Y"}, "transformers_version": None, "force_image_size": None}
    (tmp_path / "config.json").write_text(json.dumps(official))
    expected = MonoInternVLConfig.from_json(GOLDEN / "official_tiny" / "config.json")
    assert MonoInternVLConfig.from_json(tmp_path / "config.json") == expected


def test_the_image_token_of_a_checkpoint_comes_from_its_tokenizer_files(tmp_path):
    shutil.copytree(GOLDEN / "official_tiny", tmp_path, dirs_exist_ok=True)
    assert MonoInternVL.from_pretrained(tmp_path).config.img_context_token_id is None
    (tmp_path / "added_tokens.json").write_text('{"<img>": 118, "<IMG_CONTEXT>": 120}')
    assert MonoInternVL.from_pretrained(tmp_path).config.img_context_token_id == 120
    for bad in ('{"<IMG_CONTEXT>": 128}', '{"<IMG_CONTEXT>": "120"}', "[]"):
        (tmp_path / "added_tokens.json").write_text(bad)
        with pytest.raises(InputError, match="img_context_token_id|added_tokens.json"):
            MonoInternVL.from_pretrained(tmp_path)


def test_a_checkpoint_loads_in_half_precision_and_stays_close(golden):
    model = MonoInternVL.from_pretrained(GOLDEN / "official_tiny", dtype=torch.bfloat16)
    model.config.img_context_token_id = 120
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        logits, _ = model(golden["batch.input_ids"], golden["batch.pixel_values"])
    theirs = golden["batch.logits"]
    assert logits.dtype == torch.bfloat16
    assert_close(logits.float(), theirs, rtol=0, atol=0.03 * theirs.abs().max().item())


NAME = "language_model.model.layers.1.feed_forward_ve.w3.weight"


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop(NAME), f"{NAME} is missing"),
    (lambda t: t.update(surplus=torch.zeros(3)), "surplus has no place"),
    (lambda t: t.update({NAME: torch.zeros(32, 24)}), f"{NAME} is .32, 24.*24, 32")])
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
    path = config._PATHS.get(field, ("llm_config", field) if field in official["llm_config"] else (field,))
    (official if len(path) == 1 else official[path[0]])[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(official))
    named = {"num_attention_heads": "hidden_size", "patch_size": "image_size"}.get(field, field)
    with pytest.raises(InputError, match=f"config.json: .*{named}"):
        MonoInternVLConfig.from_json(tmp_path / "config.json")


# ---------------------------------------------------------------- a reference that takes one token at a time

def naive_logits(w: dict, c: MonoInternVLConfig, x: torch.Tensor, visual: list[bool]) -> torch.Tensor:
    """Embeddings x (T, D) of one row -> logits (T, V) in float64, every token and head in its own loop."""
    hd, kv_heads, T = c.hidden_size // c.num_attention_heads, c.num_key_value_heads, len(visual)
    group = c.num_attention_heads // kv_heads
    scaling = c.rope_scaling or {"type": None, "factor": 1.0}
    base = c.rope_theta
    if scaling["type"] == "dynamic" and T > c.max_position_embeddings:
        f = scaling["factor"]
        base *= (f * T / c.max_position_embeddings - (f - 1)) ** (hd / (hd - 2))

    def norm(v, name):
        return v / math.sqrt(sum(e * e for e in v.tolist()) / len(v) + c.rms_norm_eps) * w[f"{name}.weight"]

    def rotate(v, position):
        position = position / scaling["factor"] if scaling["type"] == "linear" else position
        turned = v.clone()
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


def naive_tile(w: dict, c: MonoInternVLConfig, pixels: torch.Tensor) -> list[torch.Tensor]:
    """One tile (3, S, S) -> its visual tokens, patch by patch."""
    at, p, r, side = "vision_model.embeddings", c.patch_size, c.shuffle, c.image_size // c.patch_size
    patches = {}
    for i in range(side):
        for j in range(side):
            cut = pixels.double()[:, i * p:(i + 1) * p, j * p:(j + 1) * p]
            patches[i, j] = (w[f"{at}.patch_embedding.weight"] * cut).sum((1, 2, 3)) \
                + w[f"{at}.patch_embedding.bias"] + w[f"{at}.position_embedding"][0, 1 + i * side + j]
    tokens = []
    for i in range(0, side, r):
        for j in range(0, side, r):
            v = torch.cat([patches[i + a, j + b] for a in range(r) for b in range(r)])
            v = (v - v.mean()) / (v.var(correction=0) + 1e-5).sqrt() * w["mlp1.0.weight"] + w["mlp1.0.bias"]
            v = w["mlp1.1.weight"] @ v + w["mlp1.1.bias"]
            v = v * (1 + torch.erf(v / math.sqrt(2))) / 2
            tokens.append(w["mlp1.3.weight"] @ v + w["mlp1.3.bias"])
    return tokens


def doubles(model):
    return {name: t.detach().double() for name, t in model.state_dict().items()}


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("attn_experts", ["", "qkv", "qkvo"])
def test_the_model_agrees_with_a_reference_that_takes_one_token_at_a_time(attn_experts, rope):
    model = tiny(attn_experts, image_size=8, rope_scaling=ROPE[rope], max_position_embeddings=12)
    w, c = doubles(model), model.config
    ids = torch.tensor([5, IMG, IMG, IMG, IMG, 7, 39, IMG, IMG, IMG, IMG, 2])
    if rope == "dynamic":                          # past the trained positions
        ids = torch.cat([ids, torch.tensor([3, 9, 11, 30])])
    pixels = torch.randn(2, 3, 8, 8)
    visual = (ids == IMG).tolist()
    x = w["language_model.model.tok_embeddings.weight"][ids].clone()
    x[ids == IMG] = torch.stack([token for tile in pixels for token in naive_tile(w, c, tile)])
    expected = naive_logits(w, c, x, visual)
    with torch.no_grad():
        for model.moe in ("torch", "dense"):
            logits, _ = model(ids[None], pixels)
            assert_close(logits[0].double(), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_pixel_shuffle_folds_each_square_of_patches_into_one_token_in_reading_order():
    x = torch.arange(2 * 4 * 4).view(1, 2, 4, 4)   # channel 0 holds 0..15, channel 1 16..31
    tokens = pixel_shuffle(x, 2)
    assert tokens.shape == (1, 4, 8)
    assert tokens[0, 1].tolist() == [2, 18, 3, 19, 6, 22, 7, 23]


def test_tiles_of_another_size_get_interpolated_positions():
    model = tiny(image_size=8)
    with torch.no_grad():
        model.vision_model["embeddings"].position_embedding[:, 1:] = torch.arange(6.0)
        embeddings = model.vision_model["embeddings"]
        pixels = torch.randn(1, 3, 16, 12)
        patches = embeddings.patch_embedding(pixels)
        assert_close(embeddings(pixels), patches + torch.arange(6.0).view(1, 6, 1, 1).expand_as(patches))
        grid = embeddings.position_embedding
        grid[0, 1:] = torch.arange(4.0).repeat(4)[:, None]                 # rises from left to right
        positions = embeddings(torch.zeros(1, 3, 16, 16))[0, 0] - embeddings.patch_embedding.bias[0]
        assert (positions.diff(dim=1)[:, 1:-1] > 0).all() and positions.diff(dim=0).abs().max() < 1e-5


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
    (dict(vocab_size=44), "language_model.model.tok_embeddings.weight|language_model.output.weight")])
def test_an_llm_that_does_not_fit_the_config_is_refused_by_field_or_tensor(tmp_path, config, message):
    write_llm(tmp_path)
    with pytest.raises(InputError, match=message):
        MonoInternVL.from_llm(tmp_path, vl_config(**config))


@pytest.mark.parametrize("change", [dict(model_type="llama"), dict(hidden_act="gelu"), dict(bias=True)])
def test_an_llm_of_another_architecture_is_refused(tmp_path, change):
    write_llm(tmp_path, **change)
    with pytest.raises(InputError, match=f"config.json: .*{next(iter(change))}"):
        MonoInternVL.from_llm(tmp_path, vl_config())


# ---------------------------------------------------------------- routing

@law
@given(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=30), st.integers(1, 3))
def test_routing_is_a_stable_partition_into_text_visual_and_pads(kinds, rows):
    kinds = torch.tensor(kinds * rows).view(rows, -1)
    routing = Routing(kinds == 1, (kinds != 2).long())
    parts = [[i for i, kind in enumerate(kinds.flatten().tolist()) if kind == k] for k in (0, 1, 2)]
    assert routing.rows.tolist() == sum(parts, [])
    assert routing.counts.tolist() == [len(parts[0]), len(parts[1])]
    assert [r.tolist() for r in routing.split] == parts[:2]
    assert (routing.rows.dtype, routing.counts.dtype) == (torch.int64, torch.int64)


@law
@given(visual_rows(), st.sampled_from(["left", "right"]), st.sampled_from(["", "qkv", "qkvo"]), st.booleans())
def test_the_torch_back_end_equals_the_dense_one_in_values_and_gradients(rows, side, attn_experts, masked):
    model = tiny(attn_experts)
    ids, pixels, mask = batch_of(rows, side)
    if not masked:
        assume(mask.all())
    results = []
    for model.moe in ("dense", "torch"):
        logits, _ = model(ids, pixels, mask if masked else None)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)) * mask[..., None]
        results.append((logits * mask[..., None], gradients(model, (logits * weights).sum())))
    assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-5)
    for name, grad in results[0][1].items():
        assert_close(results[1][1][name], grad, rtol=1e-4, atol=1e-5 * max(1, grad.abs().max().item()))


@law
@given(visual_rows(), st.sampled_from(["left", "right", "between"]), st.sampled_from(list(ROPE)))
def test_a_padded_batch_gives_each_row_what_it_gets_alone(rows, side, rope):
    # 6 trained positions: with dynamic RoPE, rows of one batch differ in their base
    model = tiny(rope_scaling=ROPE[rope], max_position_embeddings=6 if rope != "none" else 64)
    ids, pixels, mask = batch_of(rows, side)
    with torch.no_grad():
        logits, _ = model(ids, pixels, mask)
        for i, row in enumerate(rows):
            tile = sum(map(sum, rows[:i]))
            here = mask[i].bool()
            alone, _ = model(ids[i:i + 1, here], pixels[tile:tile + sum(row)] if sum(row) else None)
            assert_close(logits[i, here], alone[0], rtol=1e-4, atol=1e-4)


@law
@given(visual_rows(max_rows=2), st.sampled_from(["left", "right", "between"]))
def test_what_stands_in_a_pad_changes_no_real_logit(rows, side):
    model = tiny()
    ids, pixels, mask = batch_of(rows, side)
    with torch.no_grad():
        logits, _ = model(ids, pixels, mask)
        other, _ = model(torch.where(mask == 1, ids, 3), pixels, mask)
    assert torch.equal(logits[mask == 1], other[mask == 1]) and logits.isfinite().all()


@law
@given(visual_rows(), st.sampled_from(["left", "right"]))
@example([[False] * 3, [False]], "left")
def test_each_expert_works_on_its_own_tokens_and_pads_cost_nothing(rows, side):
    model = tiny()
    ids, pixels, mask = batch_of(rows, side)
    names = {p.data_ptr(): name for name, p in model.named_parameters()}
    work = dict.fromkeys(names.values(), 0)
    linear = F.linear

    def counting(x, weight, bias=None):
        work[names[weight.data_ptr()]] += x.numel() // x.shape[-1]
        return linear(x, weight, bias)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", counting)
        model(ids, pixels, mask)
    visual, real = sum(map(sum, rows)), sum(map(len, rows))
    for name, n in work.items():
        if ".attention.w" in name or ".feed_forward" in name:
            assert n == (visual if "_ve." in name else real - visual), name


def test_a_padded_batch_of_text_wakes_no_visual_expert_whatever_its_tokens():
    model, seen = tiny(), []
    record(model.language_model.model["layers"][0].feed_forward_ve, seen, lambda args, out: args[0])
    ids = torch.arange(50)[None].repeat(2, 1)[:, torch.arange(50) != IMG]
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    model(ids, None, mask)
    assert sum(x.numel() for x in seen) == 0


@law
@given(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=20), st.sampled_from(["torch", "dense"]))
def test_each_modality_goes_through_its_own_weights_and_pads_become_zero(kinds, backend):
    kinds = torch.tensor(kinds)[None]
    routing = Routing(kinds == 1, (kinds != 2).long(), backend)
    x, w_text, w_visual = torch.randn(1, kinds.shape[1], 6), torch.randn(4, 6), torch.randn(4, 6)
    expected = torch.zeros(1, kinds.shape[1], 4)
    for t, kind in enumerate(kinds[0].tolist()):
        if kind != 2:
            expected[0, t] = (w_text, w_visual)[kind] @ x[0, t]
    assert_close(mmoe_linear(x, w_text, w_visual, routing), expected)


@pytest.mark.parametrize("moe", ["torch", "dense"])
def test_visual_nan_never_reaches_text_only_rows(moe):
    model = tiny()
    model.moe = moe
    ids, pixels, mask = batch_of([[False] * 5, [False, True, True, False], [False] * 3])
    with torch.no_grad():
        clean, _ = model(ids, pixels, mask)
        poisoned, _ = model(ids, pixels * torch.nan, mask)
    assert torch.equal(poisoned[[0, 2]], clean[[0, 2]]) and poisoned[1].isnan().any()


@law
@given(st.lists(st.booleans(), min_size=1, max_size=20), st.sampled_from(["torch", "dense"]),
       st.sampled_from([math.nan, math.inf, 1e38]))
def test_nan_in_visual_tokens_never_reaches_the_text_experts_outputs(visual, backend, poison):
    visual = torch.tensor(visual)[None]
    c = tiny().config
    text_expert, visual_expert = FeedForward(c), FeedForward(c)
    x = torch.randn(1, visual.shape[1], c.hidden_size)
    bad = torch.where(visual[..., None], poison, x)
    routing = Routing(visual, None, backend)
    clean, poisoned = (mmoe_swiglu(v, text_expert, visual_expert, routing) for v in (x, bad))
    assert torch.equal(clean[~visual], poisoned[~visual]) and clean.isfinite().all()
    if backend == "torch":
        poisoned[~visual].sum().backward()
        assert all(p.grad.isfinite().all() for p in text_expert.parameters())


@pytest.mark.parametrize("backend", ["torch", "dense"])
def test_an_expert_that_overflows_harms_no_token_of_the_other(backend):
    x, w = torch.randn(1, 4, 6), torch.randn(5, 6)
    visual = torch.tensor([[False, True, True, False]])
    y = mmoe_linear(x, w, w * torch.inf, Routing(visual, None, backend))
    assert_close(y[~visual], (x @ w.T)[~visual])


def test_an_unknown_back_end_is_named():
    model = tiny()
    model.moe = "tpu"
    with pytest.raises(InputError, match="'tpu'"):
        model(torch.tensor([[1]]), attention_mask=torch.tensor([[1]]))


# ---------------------------------------------------------------- one forward path: prefill, chunks, decoding

@law
@given(visual_rows(), st.integers(1, 10), st.sampled_from(list(ROPE)), st.sampled_from(["", "qkvo"]))
def test_prefill_in_chunks_equals_prefill_at_once(rows, chunk, rope, attn_experts):
    model = tiny(attn_experts, rope_scaling=ROPE[rope], max_position_embeddings=6 if rope != "none" else 64)
    ids, pixels, mask = batch_of(rows)
    for m in (mask, None) if mask.all() else (mask,):
        runs = []
        for size in (None, chunk):
            states = []
            hook = record(model.language_model.model["norm"], states)
            list(model.generate(ids, pixels, m, max_new_tokens=1, prefill_chunk=size))
            hook.remove()
            runs.append(torch.cat(states, 1)[mask == 1])
        assert_close(runs[1], runs[0], rtol=1e-4, atol=1e-4)


@law
@given(visual_rows(), st.integers(1, 5), st.sampled_from(list(ROPE)), st.integers(0, 3))
def test_cached_decoding_equals_recomputing_everything(rows, new, rope, chunk):
    model = tiny(rope_scaling=ROPE[rope])
    ids, pixels, mask = batch_of(rows)
    steps = []
    hook = record(model.language_model.output, steps)
    tokens = torch.stack(list(model.generate(ids, pixels, mask, max_new_tokens=new, temperature=1.0, seed=0,
                                             prefill_chunk=chunk or None)), 1)
    hook.remove()
    assume(not (tokens == IMG).any())              # a generated token is text, whatever its number
    whole, whole_mask = torch.cat([ids, tokens], 1), F.pad(mask, (0, new), value=1)
    with torch.no_grad():
        logits, _ = model(whole, pixels, whole_mask)
    assert_close(torch.stack(steps, 1), logits[:, ids.shape[1] - 1:-1], rtol=1e-4, atol=1e-4)


@law
@given(visual_rows(min_rows=2))
def test_a_left_padded_batch_generates_what_its_rows_generate_alone(rows):
    model = tiny(rope_scaling=ROPE["dynamic"], max_position_embeddings=8)
    ids, pixels, mask = batch_of(rows)
    together = torch.stack(list(model.generate(ids, pixels, mask, max_new_tokens=4)), 1)
    for i, row in enumerate(rows):
        tile = sum(map(sum, rows[:i]))
        own = pixels[tile:tile + sum(row)] if sum(row) else None
        alone = list(model.generate(ids[i:i + 1, mask[i].bool()], own, max_new_tokens=4))
        assert together[i].tolist() == torch.cat(alone).tolist()


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_an_image_of_a_later_turn_goes_through_the_visual_experts(chunk):
    model = tiny()
    ids = torch.tensor([[1, 5, 6, IMG, IMG, 7, 8, 9, 10, IMG, IMG, IMG, 11]])
    seen = {"feed_forward": [], "feed_forward_ve": []}
    for name, store in seen.items():
        record(model.language_model.model["layers"][1].get_submodule(name), store, lambda args, out: args[0])
    list(model.generate(ids, torch.randn(5, 3, 4, 4), max_new_tokens=3, prefill_chunk=chunk))
    assert sum(x.numel() // x.shape[-1] for x in seen["feed_forward_ve"]) == 5
    assert sum(x.numel() // x.shape[-1] for x in seen["feed_forward"]) == 8 + 2    # prompt, tokens fed back


def test_a_token_never_sees_what_comes_after_it():
    model = tiny()
    ids, pixels, _ = batch_of([[False, True, False, False, True, False, True, False]])
    later = ids.clone()
    later[0, 5] = (ids[0, 5] + 1) % IMG
    with torch.no_grad():
        a, b = model(ids, pixels)[0][0], model(later, pixels)[0][0]
    assert torch.equal(a[:5], b[:5]) and (a[5:] != b[5:]).any(-1).all()


# ---------------------------------------------------------------- the loss

@law
@given(visual_rows(), st.sampled_from(["left", "right"]), st.randoms(use_true_random=False))
def test_the_loss_is_the_mean_over_supervised_tokens_and_the_head_sees_no_other_position(rows, side, random):
    model = tiny()
    ids, pixels, mask = batch_of(rows, side)
    labels = ids.clone().apply_(lambda i: i if random.random() < 0.4 else -100)
    with torch.no_grad():
        logits, _ = model(ids, pixels, mask)
    head = []
    hook = record(model.language_model.output, head, lambda args, out: args[0])
    _, loss = model(ids, pixels, mask, labels)
    hook.remove()
    wanted = [(b, t) for b in range(len(ids)) for t in range(1, ids.shape[1]) if labels[b, t] != -100]
    assert sum(h.numel() // h.shape[-1] for h in head) == len(wanted)
    mean = -sum(logits[b, t - 1].log_softmax(-1)[labels[b, t]] for b, t in wanted) / max(1, len(wanted))
    assert_close(loss, torch.as_tensor(mean, dtype=torch.float32), rtol=1e-5, atol=1e-5)
    grads = gradients(model, loss)                 # also without any supervised token
    assert all(g.isfinite().all() for g in grads.values())
    assert any(g.any() for g in grads.values()) == bool(wanted)


# ---------------------------------------------------------------- generation

def stream(model, ids, *args, **options):
    return [token.tolist() for token in model.generate(ids, *args, **options)]


TEXT = torch.tensor([[1, 7, 12, 30], [1, 9, 3, 25]])


def test_tokens_come_as_one_int64_per_row_and_as_many_as_asked():
    model = tiny()
    for n in (0, 1, 3):
        tokens = list(model.generate(TEXT, max_new_tokens=n))
        assert len(tokens) == n and all(t.shape == (2,) and t.dtype == torch.int64 for t in tokens)


def test_top_k_of_one_is_greedy_and_a_mask_of_ones_is_no_mask():
    model = tiny()
    greedy = stream(model, TEXT, max_new_tokens=8)
    assert stream(model, TEXT, max_new_tokens=8, temperature=5.0, top_k=1) == greedy
    assert stream(model, TEXT, max_new_tokens=8, temperature=5.0, top_p=1e-9) == greedy
    for ones in (torch.ones_like(TEXT), torch.ones_like(TEXT).bool()):
        assert stream(model, TEXT, attention_mask=ones, max_new_tokens=8) == greedy


def test_a_seed_reproduces_and_leaves_the_global_generator_alone():
    model = tiny()
    before = torch.get_rng_state()
    runs = [stream(model, TEXT, max_new_tokens=12, temperature=1.0, seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    first = stream(model, TEXT, max_new_tokens=12, temperature=1.0)
    torch.manual_seed(5)
    assert stream(model, TEXT, max_new_tokens=12, temperature=1.0) == first


@law
@given(st.lists(st.integers(-30, 30), min_size=2, max_size=6, unique=True), st.sampled_from([0.7, 1.0, 2.0]),
       st.one_of(st.none(), st.integers(1, 8)), st.one_of(st.none(), st.floats(0.05, 1.0)))
def test_sampling_follows_the_truncated_distribution(tenths, temperature, top_k, top_p):
    scores = [t / 20 for t in tenths]
    p = {i: math.exp(s / temperature) for i, s in enumerate(scores)}
    kept = sorted(p, key=p.get, reverse=True)[:top_k]
    total, reached, nucleus = sum(p[i] for i in kept), 0.0, []
    for i in kept:                                 # the smallest set whose probability reaches top_p
        if top_p is not None and reached >= top_p:
            break
        assume(top_p is None or abs(reached + p[i] / total - top_p) > 1e-4)        # no matter of rounding
        nucleus.append(i)
        reached += p[i] / total
    logits, n = torch.tensor(scores).repeat(4000, 1), sum(p[i] for i in nucleus)
    draws = sample_token(logits, torch.zeros_like(logits, dtype=torch.bool), temperature, top_k, top_p, 1.0,
                         torch.Generator().manual_seed(0))
    frequency = (draws.bincount(minlength=len(scores)) / 4000).tolist()
    assert {i for i, f in enumerate(frequency) if f} == set(nucleus)
    for i in nucleus:
        assert abs(frequency[i] - p[i] / n) < 0.05


@law
@given(st.lists(st.integers(-30, 30), min_size=2, max_size=6, unique=True), st.floats(0.5, 3.0), st.data())
def test_the_repetition_penalty_divides_positive_and_multiplies_negative_logits(tenths, penalty, data):
    scores = [t / 10 for t in tenths]
    seen = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    expected = [s if not was else s / penalty if s > 0 else s * penalty
                for s, was in zip(scores, seen, strict=True)]
    assume(sorted(expected)[-1] - sorted(expected)[-2] > 1e-5)
    token = sample_token(torch.tensor([scores]), torch.tensor([seen]), 0.0, None, None, penalty, None)
    assert token.tolist() == [expected.index(max(expected))]


def test_the_repetition_penalty_counts_generated_tokens_of_the_row_only():
    model = tiny()
    steps = []
    hook = record(model.language_model.output, steps)
    tokens = stream(model, TEXT, max_new_tokens=10, repetition_penalty=1.7)
    hook.remove()
    for row in range(2):
        seen = []
        for logits, token in zip(steps, tokens, strict=True):
            scores = logits[row].clone()
            for i in set(seen):
                scores[i] = scores[i] / 1.7 if scores[i] > 0 else scores[i] * 1.7
            assert token[row] == scores.argmax()
            seen.append(token[row])
    assert tokens != stream(model, TEXT, max_new_tokens=10)


def test_a_row_that_ended_repeats_eos_and_the_stream_stops_with_the_last_row():
    model = tiny()
    free = stream(model, TEXT, max_new_tokens=40, temperature=2.0, seed=3)
    columns = list(zip(*free, strict=True))
    ends = {eos: [c.index(eos) for c in columns] for eos in range(50) if all(eos in c for c in columns)}
    eos, (first, second) = next((e, f) for e, f in ends.items() if f[0] != f[1])
    stopped = stream(model, TEXT, max_new_tokens=40, temperature=2.0, seed=3, eos_token_id=eos)
    assert len(stopped) == max(first, second) + 1
    for row, end in enumerate((first, second)):
        assert [t[row] for t in stopped] == [t[row] for t in free[:end]] + [eos] * (len(stopped) - end)


@pytest.mark.parametrize("rope, context", [("none", 8), ("linear", 16), ("dynamic", 16)])
def test_generation_ends_with_the_context_and_a_prompt_that_fills_it_is_refused(rope, context):
    model = tiny(rope_scaling=ROPE[rope], max_position_embeddings=8)
    assert len(stream(model, TEXT, max_new_tokens=100)) == context - 4
    with pytest.raises(InputError, match=f"context of {context}"):
        stream(model, torch.ones(1, context, dtype=torch.int64), max_new_tokens=1)
    assert model(torch.ones(1, context, dtype=torch.int64))[0].shape == (1, context, 50)
    with pytest.raises(InputError, match=f"context of {context}"):
        model(torch.ones(1, context + 1, dtype=torch.int64))


@pytest.mark.parametrize("option", [
    dict(top_k=0), dict(top_k=-1), dict(top_p=0.0), dict(top_p=1.5), dict(top_p=math.nan),
    dict(temperature=-1.0), dict(temperature=math.nan), dict(repetition_penalty=0.0),
    dict(max_new_tokens=-1), dict(prefill_chunk=0)])
def test_a_sampling_value_out_of_range_is_named(option):
    with pytest.raises(InputError, match=f"{next(iter(option))} is "):
        stream(tiny(), TEXT, **{"max_new_tokens": 2, **option})


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
    (dict(pixel_values=torch.zeros(1, 3, 6, 6)), "multiple of 4"),
    (dict(pixel_values=torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), "uint8"),
    (dict(attention_mask=torch.ones(1, 3)), "attention_mask is"),
    (dict(labels=torch.ones(1, 1)), "labels is")])
def test_inputs_that_do_not_fit_get_one_line_that_says_why(change, message):
    inputs = {"input_ids": torch.tensor([[1, IMG]]), "pixel_values": torch.zeros(1, 3, 4, 4), **change}
    with pytest.raises(InputError, match=message):
        tiny()(**inputs)
    if "labels" not in change:
        with pytest.raises(InputError, match=message):
            next(tiny().generate(**inputs))


def test_images_need_a_known_image_token_and_generation_needs_left_padding():
    with pytest.raises(InputError, match="IMG_CONTEXT"):
        tiny(img_context_token_id=None)(torch.tensor([[1, IMG]]), torch.zeros(1, 3, 4, 4))
    for mask in ([[1, 1, 1, 0], [1] * 4], [[0] * 4, [1] * 4]):
        with pytest.raises(InputError, match="left-padded"):
            stream(tiny(), TEXT, attention_mask=torch.tensor(mask))
    logits, _ = tiny()(TEXT, attention_mask=torch.tensor([[0] * 4, [1] * 4]))      # pads harm no other row
    assert logits.isfinite().all()
    assert_close(logits[1], tiny()(TEXT[1:])[0][0])
