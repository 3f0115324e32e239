"""Other ways to adapt a frozen model by training few numbers, each as small as LoRA's own file.

    last layers     train the last modules, freeze the rest
    BitFit          train the biases                                    Ben Zaken et al. 2022, arXiv 2106.10199
    adapters        h + U act(D h + b_D) + b_U behind a sublayer        Houlsby et al. 2019, arXiv 1902.00751
    prompt tuning   n trained vectors in front of the embeddings        Lester et al. 2021, arXiv 2104.08691 ("PreEmbed")
    prefix tuning   n trained vectors in front of every block's input   Li and Liang 2021, arXiv 2101.00190 ("PreLayer")

How many numbers each trains: Hu et al. 2021, section 5.1, and `lora_lab.counting`. Functions change the model in place and return it, frozen but
for what the way trains. `mix` puts several finished LoRA adapters into one model, a row of the batch each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapt import find_targets, lora_layers
from ..layers import LoRAConv1D, LoRALinear

# ---- choosing what trains


def last_layers(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Train the modules with these names (whole, or their ends after a dot) in full and nothing else. Raises ValueError for a name without a match."""
    chosen = find_targets(model, list(names))
    model.requires_grad_(False)
    for module in chosen.values():
        module.requires_grad_(True)
    return model


def bitfit(model: nn.Module) -> nn.Module:
    """Train every bias, those of the norms included, and nothing else. Raises ValueError for a model without biases."""
    model.requires_grad_(False)
    biases = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise ValueError("BitFit trains biases, and no parameter of this model is called bias. Models like Llama have none: use another way")
    for bias in biases:
        bias.requires_grad_(True)
    return model


# ---- bottleneck adapters


class BottleneckAdapter(nn.Module):
    """h + U act(D h + b_D) + b_U: a small network beside the identity.

    D (width, d), b_D (width,), U (d, width), b_U (d,): 2 d width + width + d numbers. U and b_U start at zero, so that at first it is the identity.
    Because of the activation it can't be multiplied into a weight: it stays in the way of every token.
    """

    def __init__(self, d: int, width: int, activation: nn.Module | None = None, device=None, dtype=None):
        super().__init__()
        if width < 1:
            raise ValueError(f"width is the number of neurons in the bottleneck, 1 or more; found {width}")
        self.down, self.up = nn.Linear(d, width, device=device, dtype=dtype), nn.Linear(width, d, device=device, dtype=dtype)
        self.activation = activation or nn.GELU()
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.up(self.activation(self.down(h)))


class AdaptedOutput(nn.Module):
    """A frozen layer and an adapter behind it."""

    def __init__(self, base_layer: nn.Module, width: int):
        super().__init__()
        weight = base_layer.weight
        out = getattr(base_layer, "nf", None) or getattr(base_layer, "out_features", None)
        if out is None:
            raise TypeError(f"an adapter goes behind a linear layer; found {type(base_layer).__name__}")
        self.base_layer = base_layer
        self.adapter = BottleneckAdapter(out, width, device=weight.device, dtype=weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.base_layer(x))


def add_adapters(model: nn.Module, width: int, target_modules: str | Iterable[str]) -> nn.Module:
    """Freeze the model and put an adapter behind each target; rules for names as in `apply_lora`.

    Behind the last linear layer of a block's attention and of its MLP ("attn.c_proj", "mlp.c_proj" of GPT-2) stand Houlsby's two adapters a
    block; behind that of the MLP alone, one a block. Raises ValueError or TypeError, before anything is changed.
    """
    targets = find_targets(model, target_modules)
    built = {name: AdaptedOutput(module, width) for name, module in targets.items()}
    model.requires_grad_(False)
    for name, layer in built.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        layer.adapter.requires_grad_(True)
    return model


# ---- trained context


class TrainedContext(nn.Module):
    """A frozen GPT-2 with n trained vectors in front of what it reads; every token moves n positions to the right.

    deep=False   prompt tuning, P (n, d): read like n embedded tokens, through all blocks
    deep=True    prefix tuning, P (blocks, n, d): block l reads P[l] in front of its input, and what it would make of P[l] is thrown away
    seed         which tokens of the vocabulary lend their embeddings, or their activations, as first values

    Both ways the blocks see nothing of P but its keys and values, so these are put into the cache that generation uses anyway. The context has n
    positions less, in every text. Raises ValueError for an n that leaves no room.
    """

    def __init__(self, model: nn.Module, n: int, deep: bool, seed: int = 0):
        super().__init__()
        if not 1 <= n < model.config.n_positions:
            raise ValueError(f"n trained positions of a context of {model.config.n_positions}: 1 <= n, and room for a text; found {n}")
        self.model, self.n, self.deep = model.requires_grad_(False), n, deep
        tokens = torch.randint(model.config.vocab_size, (1, n), generator=torch.Generator().manual_seed(seed)).to(model.device)
        with torch.no_grad():
            if deep:
                hidden = model.transformer(tokens, output_hidden_states=True, use_cache=False).hidden_states[:-1]
                start = torch.cat(hidden)  # (blocks, n, d)
            else:
                start = model.transformer.wte(tokens)[0]
        self.P = nn.Parameter(start.clone())
        self._kept = None

    @property
    def config(self):
        return self.model.config

    @property
    def device(self):
        return self.P.device

    def keys_and_values(self) -> list[tuple[Tensor, Tensor]]:
        """What the blocks see of P: for each a pair (1, heads, n, d / heads). Without gradients it is kept until P changes, as a server would."""
        if torch.is_grad_enabled():
            return self._read()
        if self._kept is None or self._kept[0] != (id(self.P), self.P._version):
            self._kept = (id(self.P), self.P._version), self._read()
        return self._kept[1]

    def _read(self) -> list[tuple[Tensor, Tensor]]:
        if not self.deep:
            cache = self.model.transformer(inputs_embeds=self.P[None], use_cache=True).past_key_values
            return [(layer.keys, layer.values) for layer in cache.layers]
        pairs = []
        for block, P in zip(self.model.transformer.h, self.P, strict=True):
            _, *both = block.attn.c_attn(block.ln_1(P)).split(block.attn.split_size, dim=-1)  # (n, d) each
            pairs.append(tuple(t.view(1, self.n, -1, block.attn.head_dim).transpose(1, 2) for t in both))
        return pairs

    def cache(self, batch: int):
        """The cache of a batch of texts that have read P and nothing else."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for layer, pair in enumerate(self.keys_and_values()):
            cache.update(*(t.expand(batch, -1, -1, -1) for t in pair), layer)
        return cache

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options):
        """What the model makes of the tokens behind P; logits (B, T, vocabulary), for the tokens alone."""
        if attention_mask is not None:
            options["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0) + self.n
            attention_mask = F.pad(attention_mask, (self.n, 0), value=1)
        return self.model(input_ids, attention_mask=attention_mask, past_key_values=self.cache(len(input_ids)), **options)

    @torch.no_grad()
    def generate(self, ids: Tensor, attention_mask: Tensor, generation_config, logits_processor=()) -> Tensor:
        """Greedy text behind P: ids and what was added, as `lora_lab.gpt2.generate` asks for it. Raises ValueError for a beam search."""
        if (generation_config.num_beams or 1) != 1:
            raise ValueError("a model with a trained context writes greedily here; use strategy='greedy' or 'sampling'")
        out = self(ids, attention_mask, use_cache=True)
        alive = torch.ones(len(ids), dtype=torch.bool, device=ids.device)
        for left in reversed(range(generation_config.max_new_tokens)):
            scores = out.logits[:, -1].float()
            for process in logits_processor:
                scores = process(ids, scores)
            token = scores.argmax(-1).where(alive, generation_config.pad_token_id)
            ids, attention_mask = torch.cat([ids, token[:, None]], 1), F.pad(attention_mask, (0, 1), value=1)
            alive &= token != generation_config.eos_token_id
            if not (alive.any() and left):
                break
            out = self.model(
                token[:, None], attention_mask=F.pad(attention_mask, (self.n, 0), value=1), past_key_values=out.past_key_values,
                position_ids=attention_mask.sum(1, keepdim=True) - 1 + self.n, use_cache=True,
            )  # fmt: skip
        return ids


class TokensBeside(nn.Module):
    """A block of an encoder, (B, T, d) -> (B, T, d), with trained tokens behind its input: they come in here, or leave here, or both."""

    def __init__(self, block: nn.Module, n: int, tokens: Tensor | None, leave: bool):
        super().__init__()
        self.block, self.n, self.leave = block, n, leave
        self.tokens = None if tokens is None else nn.Parameter(tokens)  # (n, d)

    def forward(self, x: Tensor) -> Tensor:
        if self.tokens is not None:
            x = torch.cat([x, self.tokens.expand(len(x), -1, -1)], 1)
        x = self.block(x)
        return x[:, : -self.n] if self.leave else x


def add_tokens(model: nn.Module, n: int, blocks: str, d: int, deep: bool, seed: int = 0) -> nn.Module:
    """Prompts (deep=False) or prefixes (deep=True) for an encoder whose tokens all see each other: n trained tokens, or n for each block.

    blocks   the name of the ModuleList or Sequential of blocks; d: the width of a token. First values: normal, 0.02, from the seed
    """
    stack = model.get_submodule(blocks)
    draw = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for k, block in enumerate(stack):
        tokens = 0.02 * torch.randn(n, d, generator=draw) if deep or k == 0 else None
        stack[k] = TokensBeside(block, n, tokens, leave=deep or k == len(stack) - 1)
    return model


# ---- several tasks in one batch


class MixedLoRA(nn.Module):
    """One frozen layer, an adapter for each task, and a task for each row of the batch.

        y_i = W0 x_i + b + s_t B_t A_t x_i,   t = rows[i]

    A (tasks, r, in), B (tasks, out, r), scaling (tasks,); x (rows, ..., in). The base is multiplied once for all rows: that is what merging, which
    writes one task into W0, can't do.
    """

    def __init__(self, base_layer: nn.Module, layers: Sequence[LoRALinear]):
        super().__init__()
        ranks = {layer.lora_A.shape[0] for layer in layers}
        if len(ranks) != 1:
            raise ValueError(f"adapters in one batch have one rank here; found {sorted(ranks)}. lora_lab.combining pads a smaller one")
        self.base_layer = base_layer
        self.register_buffer("A", torch.stack([layer.lora_A.detach() for layer in layers]))
        self.register_buffer("B", torch.stack([layer.full_B().detach() for layer in layers]))
        self.register_buffer("scaling", torch.tensor([layer.scaling for layer in layers]).to(self.A))
        self.rows: Tensor | None = None  # (rows,) the task of each

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.rows is None:
            return y
        if len(self.rows) != len(x):
            raise ValueError(f"{len(self.rows)} tasks were given for a batch of {len(x)} rows")
        flat = x.reshape(len(x), -1, x.shape[-1])
        update = flat @ self.A[self.rows].mT @ (self.scaling[self.rows, None, None] * self.B[self.rows]).mT
        return y + update.view(y.shape)


def mix(base: nn.Module, adapted: Sequence[nn.Module]) -> nn.Module:
    """Put the adapters of several finished models into `base`, whose adapted layers become `MixedLoRA`; returned in eval mode.

    All must adapt the same linear layers. Choose a task for each row of a batch by `with rows(model, tasks):`. Raises ValueError or TypeError.
    """
    found = [lora_layers(model) for model in adapted]
    if not found or any(set(f) != set(found[0]) for f in found) or not found[0]:
        raise ValueError("mix takes models that carry LoRA on the same layers; found " + ", ".join(str(sorted(f)) for f in found))
    for name, layer in found[0].items():
        if not isinstance(layer, (LoRALinear, LoRAConv1D)):
            raise TypeError(f"mix is written for linear layers; {name!r} is a {type(layer).__name__}")
    for name in found[0]:
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, MixedLoRA(base.get_submodule(name), [f[name] for f in found]))
    return base.requires_grad_(False).eval()


@contextmanager
def rows(model: nn.Module, tasks: Sequence[int] | Tensor) -> Iterator[None]:
    """Within the block, row i of a batch goes through the adapter of tasks[i]; outside it, all rows through the base alone."""
    layers = [module for module in model.modules() if isinstance(module, MixedLoRA)]
    if not layers:
        raise ValueError("this model mixes no adapters; make it by mix(base, models)")
    tasks, known = torch.as_tensor(tasks), len(layers[0].A)
    if tasks.ndim != 1 or not ((tasks >= 0) & (tasks < known)).all():
        raise ValueError(f"tasks are numbers from 0 to {known - 1}, one for each row; found {tasks.tolist()}")
    try:
        for layer in layers:
            layer.rows = tasks.to(layer.A.device)
        yield
    finally:
        for layer in layers:
            layer.rows = None
