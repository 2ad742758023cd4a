"""PaLM of PyTorch against modules of torch with the same names, through `torch.save` and back.

Written from PaLM-pytorch (7164d13) and PaLM-rlhf-pytorch (v0.2.1 and bd0d0f3), without training,
caches and generation: what names, buffers and tied tensors a state dict has comes from torch.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra [parity]")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="needs the extra [parity]")

import calm_jax  # noqa: E402
from calm_jax.checkpoints.convert.palm_pytorch import PalmPytorch  # noqa: E402
from calm_jax.checkpoints.sources.opening import open_source  # noqa: E402
from tests.converting import decoder_in_memory  # noqa: E402
from tests.random_models import assert_close  # noqa: E402

nn, functional = torch.nn, torch.nn.functional
V, D, N, H, MULTIPLE, L = 48, 24, 3, 8, 4, 3
TOKENS = np.random.default_rng(0).integers(V, size=(2, 40)).astype(np.int32)


class LayerNorm(nn.Module):
    def __init__(self, offset):
        super().__init__()
        self.offset = offset
        self.gamma = nn.Parameter(torch.ones(D) - offset)
        self.register_buffer("beta", torch.zeros(D))

    def forward(self, x):
        return functional.layer_norm(x, x.shape[-1:], self.gamma + self.offset, self.beta)


class Residual(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, x):
        return self.fn(x) + x


class RotaryEmbedding(nn.Module):
    def __init__(self, scale_base):
        super().__init__()
        self.scale_base = scale_base
        self.register_buffer("inv_freq", 1.0 / (10000 ** (torch.arange(0, H, 2).float() / H)))
        if scale_base is not None:
            self.register_buffer("scale", (torch.arange(0, H, 2) + 0.4 * H) / (1.4 * H))

    def forward(self, length):
        t = torch.arange(length).type_as(self.inv_freq)
        angles = torch.outer(t, self.inv_freq).repeat(1, 2)
        if self.scale_base is None:
            return angles, torch.ones(1)
        power = (t - length // 2) / self.scale_base
        return angles, (self.scale ** power[:, None]).repeat(1, 2)


def rotate(angles, x, scale):
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x * angles.cos() * scale + turned * angles.sin() * scale


class SwiGLU(nn.Module):
    def forward(self, x):
        x, gate = x.chunk(2, dim=-1)
        return functional.silu(gate) * x


class ParallelTransformerBlock(nn.Module):
    def __init__(self, *, offset, scale_base, qk_norm, dropout):
        super().__init__()
        self.norm = LayerNorm(offset)
        self.rotary_emb = RotaryEmbedding(scale_base)
        self.widths = (N * H, H, H, 2 * MULTIPLE * D)
        self.fused_attn_ff_proj = nn.Linear(D, sum(self.widths), bias=False)
        self.attn_out = nn.Linear(N * H, D, bias=False)
        down = nn.Linear(MULTIPLE * D, D, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), *([nn.Dropout(0.1)] if dropout else []), down)
        self.qk_norm = qk_norm
        if qk_norm:
            self.q_scale = nn.Parameter(torch.ones(H))
            self.k_scale = nn.Parameter(torch.ones(H))

    def forward(self, x):
        q, k, v, hidden = self.fused_attn_ff_proj(self.norm(x)).split(self.widths, dim=-1)
        q = q.unflatten(-1, (N, H)).transpose(1, 2)
        if self.qk_norm:
            q = functional.normalize(q, dim=-1) * self.q_scale
            k = functional.normalize(k, dim=-1) * self.k_scale
        angles, scale = self.rotary_emb(x.shape[1])
        q, k = rotate(angles, q, scale), rotate(angles, k, scale**-1)
        attended = functional.scaled_dot_product_attention(
            q, k[:, None].expand_as(q), v[:, None].expand_as(q), is_causal=True
        )
        return self.attn_out(attended.transpose(1, 2).flatten(2)) + self.ff_out(hidden)


def palm_pytorch():
    """PaLM-pytorch: a sequence."""
    layers = [
        Residual(
            ParallelTransformerBlock(offset=0.0, scale_base=None, qk_norm=False, dropout=False)
        )
        for _ in range(L)
    ]
    model = nn.Sequential(nn.Embedding(V, D), *layers, LayerNorm(0.0), nn.Linear(D, V, bias=False))
    model[-1].weight = model[0].weight
    return model


class PalmRlhf(nn.Module):
    """PaLM-rlhf-pytorch; since 2025 with offset 1."""

    def __init__(self, *, offset=0.0, scale_base=512, qk_norm=False):
        super().__init__()
        made = {"offset": offset, "scale_base": scale_base, "qk_norm": qk_norm, "dropout": True}
        self.token_emb = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Residual(ParallelTransformerBlock(**made)) for _ in range(L))
        self.norm = LayerNorm(offset)
        self.to_logits = nn.Linear(D, V, bias=False)
        self.to_logits.weight = self.token_emb.weight
        self.finetune_modules = nn.ModuleDict({})

    def forward(self, tokens):
        x = self.token_emb(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.to_logits(self.norm(x))


# How each is made, and the options that say what its tensors cannot.
MODELS = {
    "PaLM-pytorch": (palm_pytorch, {}),
    "rlhf": (PalmRlhf, {}),
    "rlhf, qk norm": (lambda: PalmRlhf(qk_norm=True), {}),
    "rlhf, other decay": (lambda: PalmRlhf(scale_base=64), {"xpos_scale_base": 64.0}),
    "rlhf of 2025": (lambda: PalmRlhf(offset=1.0), {"norm_offset": 1.0}),
    "rlhf of 2025, qk norm": (
        lambda: PalmRlhf(offset=1.0, qk_norm=True),
        {"norm_offset": 1.0},
    ),
}


def random_model(name):
    """The model with every parameter random, and its logits of `TOKENS`."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for parameter, values in model.named_parameters():
            if parameter.endswith(("gamma", "_scale")):
                values += 0.2 * torch.randn_like(values)
            else:
                values.normal_(std=1.0 if values.shape[0] == V else 0.25)
        return model, model(torch.from_numpy(TOKENS).long()).numpy()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_logits(tmp_path, name, suffix):
    model, logits_BTV = random_model(name)
    path = tmp_path / f"palm.{suffix}"
    if suffix == "pt":
        torch.save(model.state_dict(), path)
    else:
        safetensors_torch.save_model(model, path)  # which leaves the tied head out
    options = MODELS[name][1]
    reading = PalmPytorch().read(open_source(path), **options)
    assert not reading.warnings
    decoder = decoder_in_memory(PalmPytorch(), open_source(path), **options)
    assert_close(decoder(TOKENS), logits_BTV, 1e-5)


def test_a_training_checkpoint_becomes_a_folder(tmp_path):
    """Data-parallel, in half precision, with the optimizer beside."""
    model, _ = random_model("rlhf")
    model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.from_numpy(TOKENS).long()).sum().backward()
    optimizer.step()
    state = nn.DataParallel(model).state_dict()
    saved = {"model": state, "optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
    torch.save(saved, tmp_path / "palm.pt")
    calm_jax.convert(tmp_path / "palm.pt", tmp_path / "model")
    decoder = calm_jax.load(tmp_path / "model")
    assert decoder.config.dtype == "bfloat16"
    stored = np.asarray(decoder.embedding[...].astype("float32"))
    np.testing.assert_array_equal(stored, model.token_emb.weight.detach().float().numpy())
    # The same rounded weights, computed in float32; the buffers of positions as they first were.
    exact = PalmRlhf().eval()
    buffers = dict(exact.named_buffers())
    exact.load_state_dict({k: buffers.get(k, x.float()) for k, x in model.state_dict().items()})
    with torch.no_grad():
        expected = exact(torch.from_numpy(TOKENS).long()).numpy()
    assert_close(calm_jax.load(tmp_path / "model", dtype="float32")(TOKENS), expected, 1e-5)
