"""Generation: a cache of keys and values, and the loop that reads a prompt and writes token by token.

In this order: `generate_naively`, which needs no cache and yields the same tokens as all the rest; KVCache;
sampling; CUDA graphs; reading the prompt (prefill); one decoding step; `generate`. The first and the last
function are also methods of MonoInternVL.

Shapes: B rows, T tokens, KV key/value heads, hd head size, V vocabulary. A *slot* of the cache holds the key
and the value of one token in every layer and row. `model` is a MonoInternVL.
"""
import contextlib
import functools
import math
import weakref
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from common import InputError

# ---------------------------------------------------------------- without a cache

@torch.no_grad()
def generate_naively(model, input_ids: Tensor, pixel_values: Tensor | None = None,
                     attention_mask: Tensor | None = None, max_new_tokens: int = 256,
                     eos_token_id: int | None = None) -> Iterator[Tensor]:
    """Greedy decoding without a cache: the whole sequence is read again for every token. `generate` yields
    the same tokens faster, and the tests compare it with this."""
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
    for _ in range(min(max_new_tokens, model.config.context_length - input_ids.shape[1])):
        logits = model(input_ids, pixel_values, attention_mask)[0][:, -1]           # (B, V)
        if model.config.img_context_token_id is not None:
            logits[:, model.config.img_context_token_id] = -torch.inf
        token = logits.argmax(-1)
        if eos_token_id is not None:
            token = token.masked_fill(ended, eos_token_id)
            ended |= token == eos_token_id
        yield token
        if ended.all():
            return
        input_ids = torch.cat([input_ids, token[:, None]], 1)
        attention_mask = None if attention_mask is None else F.pad(attention_mask, (0, 1), value=1)


# ---------------------------------------------------------------- the cache

def write_slots(keys: Tensor, values: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Writes k, v (B, KV, T, hd) into keys, values (B, KV, slots, hd) at slots (T,)."""
    keys.index_copy_(2, slots, k)
    values.index_copy_(2, slots, v)


# torch.compile turns an in-place write into a copy of the whole cache. An opaque custom op avoids that: 1
# instead of 247 ms a step, measured on a CPU with 8 small layers and a cache of 8 rows of 4,096 slots.
write_slots_compiled = torch.library.custom_op("mono_internvl::write_slots", write_slots,
                                               mutates_args=("keys", "values"))


class KVCache:
    """Keys and values of the tokens read so far. It grows on demand. It may serve many calls of `generate` of
    one model with unchanged weights: a prompt that begins like the cached one is read from there on only.

    keys, values  (layers, rows, KV, slots, hd)
    real          (rows, slots) bool: False at pads and at slots beyond `length`
    length        filled slots, the same number in all rows
    A layer writes its new keys and values at `new_slots` (T,) and attends to the first `visible` slots.
    """
    # Decoding attends to whole blocks of slots, so few shapes occur and few CUDA graphs are captured.
    BLOCK_SIZES = {"cpu": 32, "cuda": 512}

    def __init__(self, config):
        """config: a MonoInternVLConfig"""
        self.config = config
        self.keys = self.values = self.real = None
        self.length = self.visible = 0
        self.new_slots = None
        self.padded = False                        # does any row hold a pad?
        self.input_ids, self.tiles = [], None      # the tokens and tiles in the slots, if there is one row
        self.reused = 0                            # tokens of the last prompt that were in the cache already
        self.graphs, self.pool = {}, None          # CUDA graphs of `replay`, and the memory pool they share

    @property
    def block_size(self) -> int:
        return self.BLOCK_SIZES.get(self.keys.device.type, 32)

    def reserve(self, rows: int, slots: int, dtype: torch.dtype, device) -> None:
        """Makes room for so many rows and slots. Keeps what is cached, unless dtype or device change."""
        c, device = self.config, torch.device(device)
        if self.keys is None or (self.keys.dtype, self.keys.device) != (dtype, device):
            empty = (c.num_hidden_layers, 0, c.num_key_value_heads, 0, c.head_dim)
            self.keys = self.values = torch.empty(empty, dtype=dtype, device=device)
            self.real, self.length = torch.empty(0, 0, dtype=torch.bool, device=device), 0
        old_rows, old_slots = self.real.shape
        if rows <= old_rows and slots <= old_slots:
            return
        if old_slots and slots > old_slots:        # double it: the next turn of a chat needs even more
            slots = max(slots, min(2 * old_slots, c.context_length))
        rows, slots = max(rows, old_rows), -(-max(slots, old_slots) // self.block_size) * self.block_size
        # Zeros, not garbage: a masked position still contributes 0 · value, and 0 · NaN = NaN.
        more = (0, 0, 0, slots - old_slots, 0, 0, 0, rows - old_rows)
        self.keys, self.values = F.pad(self.keys, more), F.pad(self.values, more)
        self.real = F.pad(self.real, (0, slots - old_slots, 0, rows - old_rows))
        self.graphs = {}                           # the old ones read the old addresses
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def truncate(self, length: int) -> None:
        """Forgets all slots from `length` on, also those that an interrupted step wrote."""
        for t in (self.keys, self.values):
            t[:, :, :, length:self.visible] = 0
        self.real[:, length:] = False
        self.input_ids, self.length, self.visible = self.input_ids[:length], length, length
        self.padded = self.padded and length > 0

    def extend(self, rows: int, T: int, attention_mask: Tensor | None) -> Tensor | None:
        """Prepares the next T slots of the first rows. Returns real (rows, length + T), or None if there is
        no pad. attention_mask (rows, T)."""
        self.visible = self.length + T
        self.new_slots = torch.arange(self.length, self.visible, device=self.keys.device)
        self.real[:rows, self.length:self.visible] = True if attention_mask is None else attention_mask.bool()
        self.padded |= attention_mask is not None
        return self.real[:rows, :self.visible] if self.padded else None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Stores k, v (B, KV, T, hd) and returns the visible ones, (B, KV, visible, hd) each. `length`
        changes only after all layers have stored theirs."""
        rows = len(k)
        keys, values = self.keys[layer, :rows], self.values[layer, :rows]
        write = write_slots_compiled if torch.compiler.is_compiling() else write_slots
        write(keys, values, self.new_slots, k.to(keys.dtype), v.to(keys.dtype))
        return keys[:, :, :self.visible], values[:, :, :self.visible]

    def keep_rows(self, rows: list[int]) -> list[int]:
        """Drops finished rows: moves the survivors to the front, copying as few as possible. Returns the new
        order: which old row each of the first rows is now."""
        order = list(range(len(rows)))
        free = sorted(set(order) - set(rows))
        for target, row in zip(free, (r for r in rows if r >= len(rows)), strict=True):
            order[target] = row
            for t in (self.keys, self.values):
                t[:, target] = t[:, row]
            self.real[target] = self.real[row]
        return order

    def common_prefix(self, input_ids: Tensor, pixel_values: Tensor | None,
                      attention_mask: Tensor | None) -> tuple[int, int]:
        """Length of the longest cached prefix of this prompt, as (tokens, tiles)."""
        c, (B, T), same, tiles = self.config, input_ids.shape, 0, 0
        # Dynamic RoPE changes its base past the trained length. Keys with another base cannot be reused.
        dynamic = (c.rope_scaling or {}).get("type") == "dynamic"
        base_changes = dynamic and max(T, self.length) > c.max_position_embeddings
        if B > 1 or base_changes or self.padded or attention_mask is not None:
            return 0, 0
        # The last token is always read, because its hidden state predicts the next one.
        for cached, new in zip(self.input_ids[:min(self.length, T - 1)], input_ids[0].tolist(), strict=False):
            if cached != new:
                break
            same += 1
        visual = [i for i in range(same) if self.input_ids[i] == c.img_context_token_id]
        if visual:
            per_tile = math.prod(s // (c.patch_size * c.shuffle) for s in pixel_values.shape[2:])
            for cached, new in zip(self.tiles[:len(visual) // per_tile], pixel_values, strict=False):
                if not cached.equal(new.to(cached.device)):
                    break
                tiles += 1
            visual = visual[tiles * per_tile:]     # these placeholders stand for another picture now
        return visual[0] if visual else same, tiles


# ---------------------------------------------------------------- sampling

def sample_token(logits: Tensor, generated: Tensor, temperature: float, top_k: int | None,
                 top_p: float | None, repetition_penalty: float, generators: list) -> Tensor:
    """Next tokens (B,) from logits (B, V): penalty, temperature, top-k, top-p, in Hugging Face's order.
    generated (B, V) bool: the tokens of the answer so far. generators: one for each row, None for the global
    one."""
    if repetition_penalty != 1.0:
        penalised = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(generated, penalised, logits)
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:            # the smallest set that reaches probability top_p
        p, order = logits.softmax(-1).sort(descending=True)
        beyond = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)
    # Exponential race: with t_i ~ Exp(p_i), argmin t is i with probability p_i. Unlike torch.multinomial, it
    # needs no GPU sync.
    noise = torch.stack([torch.empty_like(row).exponential_(generator=g)
                         for row, g in zip(logits, generators, strict=True)])
    return (logits.softmax(-1) / noise).argmax(-1)


# ---------------------------------------------------------------- CUDA graphs

@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream for all captures, because libraries keep a workspace for every stream that they meet."""
    return torch.cuda.Stream(device)


def capture(function, inputs: tuple, pool) -> tuple:
    """Captures function(*inputs) as a CUDA graph. Returns the graph and its result, a tensor that every
    replay overwrites. Graphs that never run at the same time may share a memory pool."""
    with torch.cuda.device(inputs[1].device):
        side = capture_stream(inputs[1].device)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(*inputs)                      # libraries choose their kernels before the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=side):
            result = function(*inputs)
    return graph, result


def replay(function, inputs: tuple, sizes: tuple, kv_cache: KVCache) -> Tensor:
    """function(*inputs) as a CUDA graph: one launch in place of hundreds. sizes: what its shapes depend on.
    A graph reads the same addresses at every replay, so the tensors among inputs are copied to those that it
    was captured with. The next call may overwrite the result."""
    key = function, *sizes
    if kv_cache.graphs.get(key) is None:
        own = tuple(t.clone() if isinstance(t, Tensor) else t for t in inputs)
        kv_cache.graphs[key] = *capture(function, own, kv_cache.pool), own
    graph, result, own = kv_cache.graphs[key]
    for old, new in zip(own, inputs, strict=True):
        if isinstance(new, Tensor):
            old.copy_(new)
    graph.replay()
    return result


# ---------------------------------------------------------------- reading the prompt

LONGEST_CAPTURED = 1088                            # longer prompts, in tokens, are not read by a CUDA graph


def read_prompt(model, input_ids: Tensor, pixel_values: Tensor | None, length: Tensor,
                kv_cache: KVCache) -> Tensor:
    """input_ids (B, L), whose first `length` (1,) columns are the prompt -> logits (B, V) of the next token.
    The length is read on the device, so one CUDA graph serves all prompts of up to L tokens."""
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    kv_cache.new_slots, kv_cache.visible, routing = columns, len(columns), None
    if pixel_values is not None:                   # pads go to no expert; without tiles, they count as text
        routing = model.route(input_ids, (columns < length).expand_as(input_ids), True)
    x = model.language_model.run_layers(model.embed(input_ids, pixel_values), columns[None], length, None,
                                        routing, kv_cache)
    return model.language_model.output(x.index_select(1, length - 1)[:, 0]).float()


def replay_prompt(model, ids: Tensor, pixels: Tensor | None, kv_cache: KVCache) -> Tensor | None:
    """read_prompt as a CUDA graph: a GPU reads a short prompt faster than the host launches the kernels one
    by one. 320 tokens take an H100 6.6 ms instead of 31. Returns None if no graph can read the prompt, and
    for the cache's first prompt of a size, because a capture takes longer than reading one prompt."""
    if not model.cuda_graphs or kv_cache.pool is None or ids.shape[1] > LONGEST_CAPTURED:
        return None
    (B, T), step = ids.shape, min(64, kv_cache.block_size)
    L = -(-T // step) * step                       # few lengths, so few graphs
    padded = F.pad(ids, (0, L - T), value=int(model.config.img_context_token_id == 0))     # any text token
    if pixels is not None and getattr(model.route(padded, None, True), "backend", "cuda") != "cuda":
        return None                                # other back ends ask the device how many tokens are visual
    sizes, length = (B, L, None if pixels is None else pixels.shape), torch.full((1,), T, device=ids.device)
    if (read_prompt, *sizes) not in kv_cache.graphs:
        kv_cache.graphs[read_prompt, *sizes] = None
        return None
    logits = replay(read_prompt, (model, padded, pixels, length, kv_cache), sizes, kv_cache)
    kv_cache.extend(B, T, None)
    kv_cache.length, kv_cache.visible = T, L
    return logits


@torch.inference_mode()
def prefill(model, input_ids: Tensor, pixel_values: Tensor | None, attention_mask: Tensor | None,
            kv_cache: KVCache, chunk: int) -> Tensor:
    """Reads the prompt into the cache, `chunk` tokens at a time, without the prefix that is cached already.
    Returns the logits (B, V) of the next token: the head runs on the last position only. If input_ids and
    attention_mask are on the CPU, nothing here waits for a GPU."""
    T, device, logits = input_ids.shape[1], kv_cache.keys.device, None
    past, tiles = kv_cache.common_prefix(input_ids, pixel_values, attention_mask)
    kv_cache.truncate(past)
    kv_cache.reused = past
    ids, mask, pixels = (None if t is None else t.to(device, non_blocking=True) for t in (
        input_ids, attention_mask, None if pixel_values is None else pixel_values[tiles:]))
    if past == 0 and chunk >= T and mask is None:
        logits = replay_prompt(model, ids, pixels, kv_cache)
    if logits is None:
        x, lengths = model.embed(ids[:, past:], pixels), T if mask is None else mask.sum(1)
        visual = input_ids == (-1 if pixels is None else model.config.img_context_token_id)
        real = torch.ones_like(visual) if mask is None else attention_mask.bool()
        for start in range(past, T, chunk):
            part = slice(start, start + chunk)
            sizes = [int((real & expert)[:, part].sum()) for expert in (~visual, visual)]
            part_mask = None if mask is None else mask[:, part]
            routing = model.route(ids[:, part], part_mask, sizes[1] > 0)
            if routing is not None:
                routing.split(*sizes)
            hidden = model.language_model(x[:, start - past:start - past + chunk], routing, part_mask,
                                          kv_cache, lengths)
        logits = model.language_model.output(hidden[:, -1]).float()
    if len(input_ids) == 1:
        kv_cache.input_ids = input_ids[0].tolist()
        # A copy, because the caller may fill the same tensor with the next picture.
        kv_cache.tiles = None if pixel_values is None else pixel_values.clone()
    return logits


# ---------------------------------------------------------------- one decoding step

def decode_step(model, token: Tensor, slot: Tensor, kv_cache: KVCache) -> Tensor:
    """token (B, 1) -> logits (B, V) of the next. slot (1,): where its key and value go. A generated token is
    text, so there is no routing. All shapes depend on `visible` alone: a CUDA graph can replay it."""
    language_model, kv_cache.new_slots = model.language_model, slot
    kv_cache.real[:len(token)].index_fill_(1, slot, True)
    real = kv_cache.real[:len(token), :kv_cache.visible]                   # (B, visible)
    lengths, x = real.sum(1), language_model.model.tok_embeddings(token)
    mask = real.to(x.dtype).log()[:, None, None]                           # 0 or -inf, once for all layers
    x = language_model.run_layers(x, lengths[:, None] - 1, lengths, mask, None, kv_cache)
    return language_model.output(x[:, -1]).float()


@functools.cache
def compiled(function):
    # A batch of one row, a cache of one block and each dtype compile a variant. torch allows 8 by default.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    return torch.compile(function, fullgraph=True)


@torch.inference_mode()
def decode(model, token: Tensor, kv_cache: KVCache) -> Tensor:
    """token (B,) on the device -> logits (B, V) of the next, without a device→host sync. The next call may
    overwrite these logits."""
    kv_cache.visible = (kv_cache.length // kv_cache.block_size + 1) * kv_cache.block_size
    step = compiled(decode_step) if model.compile_decode else decode_step
    inputs = model, token[:, None], torch.full((1,), kv_cache.length, device=token.device), kv_cache
    if model.cuda_graphs and kv_cache.pool is not None:
        logits = replay(step, inputs, (len(token), kv_cache.visible), kv_cache)
    else:
        logits = step(*inputs)
    kv_cache.length += 1
    return logits


# ---------------------------------------------------------------- the loop

def check_options(rows, max_new_tokens, temperature, top_k, top_p, repetition_penalty, eos_token_id, seed,
                  prefill_chunk) -> None:
    """Raises InputError that names the option of `generate` which is out of range."""
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else seed
    for name, value, fits, expected in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
            ("temperature", temperature, 0 <= temperature < math.inf, "at least 0"),
            ("top_k", top_k, top_k is None or top_k >= 1, "None or at least 1"),
            ("top_p", top_p, top_p is None or 0 < top_p <= 1, "None or above 0 and at most 1"),
            ("repetition_penalty", repetition_penalty, 0 < repetition_penalty < math.inf, "above 0"),
            ("eos_token_id", eos_token_id, all(type(e) is int for e in eos_token_id), "None, an id or ids"),
            ("seed", seed, seed is None or len(seeds) == rows and all(0 <= s < 2 ** 64 for s in seeds),
             "None, a number from 0 to 2**64 - 1, or one for each row"),
            ("prefill_chunk", prefill_chunk, prefill_chunk is None or prefill_chunk >= 1,
             "None or at least 1")):
        if not fits:
            raise InputError(f"{name} is {value!s:.60}, expected {expected}")


KEPT = weakref.WeakKeyDictionary()                 # model -> addresses of its weights, {rows: KVCache}
KEPT_BYTES = 2 ** 30                               # of the caches that are kept for one model


@contextlib.contextmanager
def kept_cache(model, rows: tuple) -> Iterator[KVCache]:
    """A cache for a call of `generate` that brings none. If it has CUDA graphs and is not large, the next
    such call with as many rows gets it, because a graph takes as long to capture as dozens of tokens to
    decode. Its content is forgotten: training may have changed the weights."""
    weights = [p.data_ptr() for p in model.parameters()]
    if model not in KEPT or KEPT[model][0] != weights:         # graphs read the weights at their addresses
        KEPT[model] = weights, {}
    kept = KEPT[model][1]
    cache = kept.pop(rows, None)                   # two calls at a time never share one
    if cache is None:
        cache = KVCache(model.config)
    else:
        cache.truncate(0)
    try:
        yield cache
    finally:
        if cache.graphs and sum(2 * c.keys.nbytes for c in [cache, *kept.values()]) <= KEPT_BYTES:
            kept[rows] = cache


@torch.no_grad()                                   # not inference_mode: the results may be trained on
def generate(model, input_ids: Tensor, pixel_values: Tensor | None = None,
             attention_mask: Tensor | None = None, max_new_tokens: int = 256, temperature: float = 0.0,
             top_k: int | None = None, top_p: float | None = None, repetition_penalty: float = 1.0,
             eos_token_id: int | Sequence[int] | None = None, seed: int | Sequence[int] | None = None,
             prefill_chunk: int | None = None, kv_cache: KVCache | None = None,
             num_tokens: int | None = None) -> Iterator[Tensor]:
    """Yields the next token of each row, (B,) int64 on the CPU, until all rows end or the context is full.

    input_ids (B, T), pixel_values (n_tiles, 3, S, S), attention_mask (B, T): as in MonoInternVL.forward, with
    the pads on the left, so that all rows end in the same column. On any device. With input_ids and
    attention_mask on the CPU, each token, also the first, costs one sync with a GPU.
    temperature: 0 is greedy. repetition_penalty: for generated tokens only, not for the prompt's [repo].
    eos_token_id: the token, or the tokens, that end a row. An ended row yields it, or the first of them, from
    then on. None: no row ends.
    seed: each row draws from its own generator, and the global one is left alone. A number s gives row i the
    seed s + i; a list has one seed for each row.
    prefill_chunk: tokens of the prompt that are read at a time, to bound memory.
    kv_cache: the cache of earlier calls. Its memory is used again. If the prompt (of one row) begins like the
    cached one, only the rest is read. That changes no answer, except for roundings in 16 bits.
    num_tokens: the tokenizer's size. Ids beyond it pad the vocabulary of some models and have no text. They
    are never generated, nor is <IMG_CONTEXT>, which means nothing without a tile.
    Raises InputError for inputs and options that do not fit, and when logits are not finite.
    """
    if kv_cache is None:
        options = {**locals()}                     # all arguments
        with kept_cache(model, input_ids.shape[:1]) as options["kv_cache"]:
            yield from generate(**options)
        return
    # The host reads the prompt several times. On the CPU, that takes no sync with the GPU.
    input_ids, attention_mask = input_ids.cpu(), None if attention_mask is None else attention_mask.cpu()
    model.check_inputs(input_ids, pixel_values, attention_mask)
    weight, context = model.language_model.output.weight, model.config.context_length
    (B, T), dtype, device, cache = input_ids.shape, weight.dtype, weight.device, kv_cache
    ends = list(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else [eos_token_id]
    ends = [] if eos_token_id is None else ends
    check_options(B, max_new_tokens, temperature, top_k, top_p, repetition_penalty, ends, seed, prefill_chunk)
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise InputError("a row of attention_mask ends in padding; generate needs left-padded rows")
    if T >= context:
        raise InputError(f"the prompt of {T} tokens fills the context of {context}; "
                         "shorten it, use fewer tiles, or /clear the chat")
    max_new_tokens = min(max_new_tokens, context - T)
    if attention_mask is not None and attention_mask.all():
        attention_mask = None                      # no pads: attention needs no mask
    cache.reserve(B, T + max_new_tokens, dtype, device)
    logits = prefill(model, input_ids, pixel_values, attention_mask, cache, prefill_chunk or T)

    image_token, V = model.config.img_context_token_id, model.config.vocab_size
    forbidden = list(range(V if num_tokens is None else num_tokens, V))
    forbidden += [] if image_token is None else [image_token]
    forbidden = torch.tensor(forbidden, dtype=torch.int64).to(device, non_blocking=True)
    seeds = [seed + row for row in range(B)] if isinstance(seed, int) else seed or []
    generators = [torch.Generator(device).manual_seed(s) for s in seeds] or [None] * B
    generated = torch.zeros(B, V, dtype=torch.bool, device=device)
    running = list(range(B))                       # the prompt's row that each row of the cache belongs to
    ended = set()                                  # rows of the prompt
    for count in range(1, max_new_tokens + 1):
        bad = ~logits.isfinite().all(-1)
        logits = logits.index_fill(1, forbidden, -torch.inf)
        token = sample_token(logits, generated, temperature, top_k, top_p, repetition_penalty,
                             [generators[row] for row in running])
        numbers = token.masked_fill(bad, -1).tolist()                      # the one sync of a step
        new = dict(zip(running, numbers, strict=True))
        if any(t < 0 and row not in ended for row, t in new.items()):
            cache.truncate(0)                      # attention may have spread it to tokens before its origin
            name = str(dtype).removeprefix("torch.")
            better = "bfloat16 or float32" if name == "float16" else "float32"
            raise InputError(f"the logits are NaN or infinite in {name}: " + (
                "the weights are damaged; try another copy of them" if name == "float32" else
                f"numbers overflow or the weights are damaged; try --dtype {better}"))
        tokens = [ends[0] if row in ended else new[row] for row in range(B)]
        yield torch.tensor(tokens)
        ended |= {row for row in running if tokens[row] in ends}
        survivors = [i for i, row in enumerate(running) if row not in ended]
        if count == max_new_tokens or not survivors:
            return
        # Ended rows leave the batch. Where every batch size needs a CUDA graph, they leave by halves only.
        any_size = cache.pool is None or not model.cuda_graphs
        if len(survivors) < len(running) and (any_size or len(survivors) <= len(running) // 2):
            order = cache.keep_rows(survivors)
            running, token, generated = [running[i] for i in order], token[order], generated[order]
        if B == 1:
            cache.input_ids.append(tokens[0])
        generated.scatter_(1, token[:, None], True)
        logits = decode(model, token, cache)
