"""Two or more language models composed by a bridge, in PyTorch (CALM, arXiv 2401.02412).

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

FOLDER holds the bridge; its config.json names the frozen models: an anchor, which generates, and
augments, which it reads. After anchor layer j the bridge adds, for each connection (i, j),

    H_j  ←  H_j + f_cross(f_proj(A_i), H_j)

where A_i, the tap, is an augment's hidden state after its layer i. A token sees the taps of its own
and of earlier tokens. This file needs torch and transformers alone, and was written by calm_jax.

Axes: B batch, T query, S key, D anchor width, E augment width, N heads, H head width.
"""

import contextlib
import copy
import functools
import inspect

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

NORM_EPS = 1e-6
ROPE_BASE = 10_000.0
# Arguments of `from_pretrained` for all models, and for the frozen ones alone.
SHARED = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
PLACING = ("device_map", "max_memory", "offload_folder")
FROZEN = (*PLACING, "attn_implementation", "quantization_config")
# What this version of transformers calls a cache.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


class CalmConfig(transformers.PreTrainedConfig):
    """Which models are composed, and how.

    Attributes:
        anchor: a folder or a name on the hub.
        augments: the same for each augment.
        sizes: [width, depth] of the anchor, then of each augment.
        dtypes, fingerprints: of the same, in the bridge's training and in calm_jax.
        connections: [augment, augment layer, anchor layer], all 0-based, in ascending order of
            anchor layers. The bridge has a cross-attention for each.
        bridges: for each augment the options of its cross-attentions.
        vocab_size: of the anchor.
    """

    model_type = "calm"

    def __init__(self, anchor="", vocab_size=0, **kwargs):
        self.anchor, self.vocab_size = anchor, vocab_size
        lists = ("augments", "sizes", "dtypes", "fingerprints", "connections", "bridges")
        for name in lists:
            setattr(self, name, list(kwargs.pop(name, ())))
        super().__init__(**kwargs)


def decoder_layers(decoder):
    """The layers of any decoder of transformers: `layers`, `h`, ..., its only list of modules."""
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    if len(lists) != 1:
        raise ValueError(f"{type(decoder).__name__} has {len(lists)} lists of modules, not one")
    return lists[0]


@contextlib.contextmanager
def after_layers(layers, functions):
    """In the block, `functions[n]` gets the hidden states after layer n; a result replaces them."""

    def hook(function, layer, inputs, output):
        if not isinstance(output, tuple):
            return function(output)
        result = function(output[0])
        return None if result is None else (result, *output[1:])

    # First of all hooks, so that others, as of `output_hidden_states`, see the bridged states.
    handles = [
        layers[n].register_forward_hook(functools.partial(hook, function), prepend=True)
        for n, function in functions.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(model, cache, inputs, **wanted):
    """Calls a model of transformers with those inputs that it has arguments for."""
    known = inspect.signature(model.forward).parameters
    inputs = {key: x for key, x in inputs.items() if key in known}
    inputs["cache" if "cache" in known else "past_key_values"] = cache
    return model(**inputs, **wanted, use_cache=cache is not None)


class CalmCache(Cache):
    """The caches of the anchor and the augments, and f_cross' keys and values of the taps.

    Whatever crops, reorders, repeats or empties a cache does so for all `layers`, which are those
    of all caches. `bridge` has a layer for each connection, then one that says which tokens are the
    prompt.
    """

    layer_class_to_replicate = None
    offloading = False

    def __init__(self, anchor, augments, bridge):
        self.anchor, self.augments, self.bridge = anchor, augments, bridge

    @property
    def layers(self):
        return [layer for x in (self.anchor, *self.augments, self.bridge) for layer in x.layers]


def rms_norm(x, scale):
    """x / rms(x) * scale, computed in float32, in the dtype of x."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + NORM_EPS)
    return (y * scale.to(y)).to(x.dtype)


def linear(module, x):
    """The module's product in the dtype of x: its weights stay in float32."""
    return F.linear(x, module.weight.to(x), None if module.bias is None else module.bias.to(x))


def rotate(x_BNTH, positions_BT):
    """Rotary positions; feature h is paired with h + H/2."""
    half = x_BNTH.shape[-1] // 2
    powers = -torch.arange(0, 2 * half, 2, device=x_BNTH.device, dtype=torch.float32) / (2 * half)
    angles = positions_BT.to(x_BNTH.device)[:, None, :, None].float() * ROPE_BASE**powers
    sin, cos, (first, second) = angles.sin(), angles.cos(), x_BNTH.float().split(half, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, dim=-1).to(x_BNTH.dtype)


class CrossAttention(nn.Module):
    """f_proj and f_cross of one connection."""

    def __init__(self, width, augment_width, options):
        super().__init__()
        inner, bias = options["num_heads"] * options["head_dim"], options["bias"]
        self.options = options
        self.projection = nn.Linear(augment_width, width, bias=bias)
        self.query = nn.Linear(width, inner, bias=bias)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=bias)
        if options["output_projection"]:
            self.output = nn.Linear(inner, width, bias=bias)
        if options["norms"]:
            self.query_norm = nn.Parameter(torch.ones(width))
            self.tap_norm = nn.Parameter(torch.ones(augment_width))
        if options["gate"]:
            self.gate = nn.Parameter(torch.ones(()))

    def heads(self, x_BTD):
        return x_BTD.unflatten(-1, (self.options["num_heads"], -1)).transpose(1, 2)

    def forward(self, h_BTD, tap_BTE, positions_BT, visible_B1TS, cached):
        """f_cross(f_proj(tap), h) [B, T, D], exactly 0 where a token sees no tap.

        `cached` adds the new keys and values to those before them, and returns all.
        """
        options, tap_BTE = self.options, tap_BTE.to(h_BTD.device)
        if options["norms"]:
            tap_BTE = rms_norm(tap_BTE, self.tap_norm)
        x_BTD = linear(self.projection, tap_BTE.to(h_BTD.dtype))
        k_BNSH, v_BNSH = self.heads(linear(self.key, x_BTD)), self.heads(linear(self.value, x_BTD))
        q_in_BTD = rms_norm(h_BTD, self.query_norm) if options["norms"] else h_BTD
        q_BNTH = self.heads(linear(self.query, q_in_BTD))
        if options["rotary"]:
            q_BNTH, k_BNSH = rotate(q_BNTH, positions_BT), rotate(k_BNSH, positions_BT)
        k_BNSH, v_BNSH = cached(k_BNSH, v_BNSH)
        visible_B1TS = visible_B1TS.to(h_BTD.device)
        sees_any_B1T1 = visible_B1TS.any(-1, keepdim=True)
        # A softmax over nothing is not a number, in gradients too.
        mask_B1TS = visible_B1TS | ~sees_any_B1T1
        y_BNTH = F.scaled_dot_product_attention(q_BNTH, k_BNSH, v_BNSH, attn_mask=mask_B1TS)
        y_BTD = y_BNTH.transpose(1, 2).flatten(2)
        if options["output_projection"]:
            y_BTD = linear(self.output, y_BTD)
        if options["gate"]:
            y_BTD = y_BTD * self.gate.to(y_BTD)
        return torch.where(sees_any_B1T1[:, 0], y_BTD, 0)


class CalmForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """The composed model. Only the bridge is trained and saved.

    Attributes:
        bridge: a `CrossAttention` for each of `config.connections`.
        anchor: the model of transformers that generates; None until `from_pretrained` loads it.
        augments: the decoders of the augments, without heads and without layers after the last tap.
    """

    config_class = CalmConfig

    def __init__(self, config):
        super().__init__(config)
        widths = [width for width, _ in config.sizes]
        self.bridge = nn.ModuleList(
            CrossAttention(widths[0], widths[augment + 1], config.bridges[augment])
            for augment, _, _ in config.connections
        )
        self.anchor = None
        self.augments = nn.ModuleList()
        self.post_init()

    @classmethod
    def from_pretrained(cls, name, *args, **kwargs):
        """Loads the bridge, then the frozen models that its config names.

        Args:
            anchor, augments: where the frozen models are, if not where the config says.
            dtype: of the frozen models; default: those of the bridge's training. The bridge is
                float32 and computes in the anchor's dtype.
            device_map, attn_implementation, quantization_config, ...: for the frozen models.
        """
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        frozen = {key: kwargs.pop(key) for key in FROZEN if key in kwargs}
        shared = {key: kwargs[key] for key in SHARED if key in kwargs}
        model, info = super().from_pretrained(
            name, *args, dtype=torch.float32, output_loading_info=True, **kwargs
        )
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if info[problem]:
                raise OSError(f"{name}: the bridge has {problem}: {sorted(info[problem])}")
        model.load_frozen(name, None if dtype == "auto" else dtype, **frozen, **shared)
        with contextlib.suppress(OSError):  # the folder may have settings of its own
            own = {key: kwargs[key] for key in (*SHARED, "revision") if key in kwargs}
            model.generation_config = transformers.GenerationConfig.from_pretrained(name, **own)
        return model

    def load_frozen(self, where, dtype=None, **options):
        """Loads the anchor and the augments; a model that is absent or does not fit is an error."""
        config, loaded = self.config, []
        names = [config.anchor, *config.augments]
        if len(names) != len(config.sizes):
            count = len(config.sizes) - 1
            raise ValueError(f"{where} has a bridge to {count} augments, not {len(names) - 1}")
        for number, (name, size) in enumerate(zip(names, config.sizes, strict=True)):
            role = f"augment {number - 1}" if number else "anchor"
            own = dtype or getattr(torch, config.dtypes[number])
            try:
                model = AutoModelForCausalLM.from_pretrained(name, dtype=own, **options)
            except (OSError, ValueError) as error:
                raise OSError(
                    f"{where}: the {role}, {name}, cannot be loaded; from_pretrained(anchor=..., "
                    f"augments=[...]) says where it is now: {str(error).splitlines()[0]}"
                ) from error
            text = model.config.get_text_config(decoder=True)
            if (found := [text.hidden_size, text.num_hidden_layers]) != size:
                raise ValueError(f"{where}: [width, depth] of {role} {name} is {found}, not {size}")
            loaded.append(model.requires_grad_(False).eval())
        self.anchor, *augments = loaded
        self.generation_config = copy.deepcopy(self.anchor.generation_config)
        for number, augment in enumerate(augments):
            decoder = augment.get_decoder()
            last = max(i for augment, i, _ in config.connections if augment == number)
            del decoder_layers(decoder)[last + 1 :]
            self.augments.append(decoder)
        for (_, _, j), connection in zip(config.connections, self.bridge, strict=True):
            weight = next(decoder_layers(self.anchor.get_decoder())[j].parameters())
            if weight.device.type != "meta":  # else the layer's weights are elsewhere
                connection.to(weight.device)

    def save_pretrained(self, save_directory, *args, state_dict=None, **kwargs):
        """Writes the bridge, its config and its code; not the frozen models."""
        state_dict = self.state_dict() if state_dict is None else state_dict
        bridge = {name: x for name, x in state_dict.items() if name.startswith("bridge.")}
        return super().save_pretrained(save_directory, *args, state_dict=bridge, **kwargs)

    def train(self, mode=True):
        """Sets the mode of the bridge; the frozen models have no dropout."""
        super().train(mode)
        for model in filter(None, (self.anchor, *self.augments)):
            model.eval()
        return self

    def new_cache(self):
        """An empty cache for `forward` and `generate`."""
        anchor, *augments = (DynamicCache(config=m.config) for m in (self.anchor, *self.augments))
        for cache, decoder in zip(augments, self.augments, strict=True):
            del cache.layers[len(decoder_layers(decoder)) :]
        return CalmCache(anchor, augments, DynamicCache())

    def forward(
        self,
        input_ids,
        attention_mask=None,
        position_ids=None,
        cache=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        prompt_mask=None,
        past_key_values=None,
        **kwargs,
    ):
        """Logits, and with labels the loss.

        Args:
            input_ids: new tokens [B, T], for the anchor and every augment.
            attention_mask: 1 on tokens, 0 on padding, [B, cached + T]; default: no padding.
            position_ids: [B, T]; default: the number of tokens before each one.
            cache: a `CalmCache` that holds the tokens before; `past_key_values` is the same.
            labels: [B, T], as for any causal model: the token itself, or -100.
            prompt_mask: 1 on the prompt [B, up to cached + T]: `encoder_only` bridges see it alone.
                Default: with labels, tokens without one; else those of the first call. `generate`
                takes its whole input.
        """
        if self.anchor is None:
            raise ValueError("the frozen models are not loaded; use from_pretrained")
        cache = past_key_values if cache is None else cache
        if cache is not None and not isinstance(cache, CalmCache):
            raise ValueError(f"the cache is a {type(cache).__name__}; make one with new_cache()")
        if cache is None and (labels is None if use_cache is None else use_cache):
            cache = self.new_cache()
        (B, T), past = input_ids.shape, 0 if cache is None else cache.get_seq_length()
        if attention_mask is None:
            attention_mask = input_ids.new_ones(B, past + T)
        if (shape := tuple(attention_mask.shape)) != (B, past + T):
            raise ValueError(f"attention_mask has shape {shape}, not {(B, past + T)}")
        if position_ids is None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]

        visible = self.visible(input_ids, attention_mask, cache, labels, prompt_mask)
        names = ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
        values = (input_ids, attention_mask, position_ids, logits_to_keep)
        inputs = dict(zip(names, values, strict=True))
        taps = {}
        for number, decoder in enumerate(self.augments):
            layers = {i for augment, i, _ in self.config.connections if augment == number}
            keep = {i: functools.partial(taps.__setitem__, (number, i)) for i in layers}
            with torch.no_grad(), after_layers(decoder_layers(decoder), keep):
                run(decoder, None if cache is None else cache.augments[number], inputs)

        def bridged(j, h_BTD):
            total_BTD = h_BTD  # all connections to layer j read the same states
            for k, (augment, i, to) in enumerate(self.config.connections):
                if to == j:
                    update = cached if cache is None else functools.partial(cached, layer_idx=k)
                    about = (taps[augment, i], position_ids, visible[augment], update)
                    total_BTD = total_BTD + self.bridge[k](h_BTD, *about)
            return total_BTD

        cached = (lambda k, v: (k, v)) if cache is None else cache.bridge.update
        joined = {j: functools.partial(bridged, j) for _, _, j in self.config.connections}
        with after_layers(decoder_layers(self.anchor.get_decoder()), joined):
            wanted = ("output_hidden_states", "output_attentions")
            wanted = {key: True for key in wanted if kwargs.pop(key, False)}
            outputs = run(self.anchor, None if cache is None else cache.anchor, inputs, **wanted)
        loss, logits = None, outputs.logits
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=logits.shape[-1], **kwargs)
        others = {"hidden_states": outputs.hidden_states, "attentions": outputs.attentions}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: cache}, **others)

    def visible(self, input_ids, attention_mask, cache, labels, prompt_mask):
        """For each augment, which taps each new token sees, bool [B, 1, T, S]."""
        bridges, real_BS = self.config.bridges, attention_mask.bool()
        past, order_S = -input_ids.shape[1], torch.arange(real_BS.shape[1], device=real_BS.device)
        visible_B1TS = real_BS[:, None, None] & real_BS[:, None, past:, None]
        visible_B1TS = visible_B1TS & (order_S <= order_S[past:, None])
        if not any(options["encoder_only"] for options in bridges):
            return [visible_B1TS] * len(bridges)
        if prompt_mask is not None:
            prompt_BT = F.pad(prompt_mask, (0, len(order_S)))[:, : len(order_S)][:, past:].bool()
        elif labels is not None:
            prompt_BT = (labels == -100) | (real_BS.cumsum(-1) == 1)[:, past:]
        else:
            prompt_BT = torch.full_like(input_ids, len(order_S) == -past, dtype=torch.bool)
        prompt_B1T1 = prompt_BT[:, None, :, None]
        if cache is not None:
            number = len(self.config.connections)
            prompt_B1T1, _ = cache.bridge.update(prompt_B1T1, prompt_B1T1, number)
        inside_B1TS = visible_B1TS & prompt_B1T1.transpose(2, 3)
        return [inside_B1TS if options["encoder_only"] else visible_B1TS for options in bridges]

    def generate(self, inputs=None, **kwargs):
        """As for any model. The input is the prompt, which `encoder_only` bridges see alone."""
        tokens = kwargs.get("input_ids") if inputs is None else inputs
        if tokens is not None and any(options["encoder_only"] for options in self.config.bridges):
            kwargs.setdefault("prompt_mask", torch.ones_like(tokens))
        return super().generate(inputs, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args):
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(f"cache_implementation is {kind!r}; a CALM model has only 'dynamic'")
        if model_kwargs.get(CACHE) is not None:
            model_kwargs[CACHE]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = self.new_cache()
