"""Random models of transformers that hide nothing, with their logits.

As transformers makes them, norms, biases and the padding row are trivial and weights tiny: a wrong
norm offset, bias, rotary position or gate order would not be seen. So every parameter is drawn
anew.
"""

import pathlib

import numpy as np
import torch
import transformers

torch.set_num_threads(1)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Draws embeddings from N(0, 1), other matrices from N(0, 0.25²), and biases from N(0, 0.2²);
    adds N(0, 0.2²) to norms' scales."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)
    }
    with torch.no_grad():
        for name, x in model.named_parameters():  # of tied ones, the first
            noise = torch.randn(x.shape, generator=generator)
            if id(x) in embeddings:
                x.copy_(noise)
            elif x.ndim > 1:
                x.copy_(0.25 * noise)
            elif name.endswith("bias"):
                x.copy_(0.2 * noise)
            else:
                x.add_(0.2 * noise)


def save_random(
    config: transformers.PreTrainedConfig,
    folder: pathlib.Path,
    *,
    seed: int = 0,
    length: int = 24,
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
    **save_options,
) -> tuple[np.ndarray, np.ndarray]:
    """Saves a random model with its weights in `dtype` as transformers does.

    Args:
        config: of the model; every sliding window must be shorter than `length`.
        folder: to write to.
        save_options: for `save_pretrained`, as `max_shard_size="60KB"`.

    Returns:
        tokens, int32 [B, T], and the logits of the saved weights, float32 [B, T, V], computed by
        eager attention in float32.
    """
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    randomise(model, seed)
    for x in model.parameters():  # not the buffers: rotary frequencies stay float32
        x.data = x.data.to(dtype).float()
    vocab_size = config.get_text_config().vocab_size
    tokens = np.random.default_rng(seed).integers(3, vocab_size, (batch, length), dtype=np.int32)
    logits = logits_of(model, tokens)
    model.to(dtype).save_pretrained(folder, **save_options)
    return tokens, logits


def logits_of(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits, float32 [B, T, V], of token ids [B, T]."""
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens.astype(np.int64))).logits.float().numpy()


def save_random_encoder(
    model: torch.nn.Module,
    folder: pathlib.Path,
    *,
    images: int = 2,
    dtype: torch.dtype = torch.float32,
    **save_options,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws an image encoder of transformers anew and saves it with its weights in `dtype`.

    Returns:
        pixel values, float32 [N, C, H, W], and the states of the saved weights after each layer,
        float32 [L, N, P, D], computed by eager attention in float32.
    """
    model.set_attn_implementation("eager")
    randomise(model)
    model.to(dtype).float()
    config = model.config
    sides = config.image_size
    height, width = sides if isinstance(sides, list | tuple) else (sides, sides)
    shape = (images, config.num_channels, height, width)
    x_NCHW = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    states = encoder_states(model, x_NCHW)
    model.to(dtype).save_pretrained(folder, **save_options)
    return x_NCHW, states


def encoder_states(model: torch.nn.Module, x_NCHW: np.ndarray) -> np.ndarray:
    """The states after each layer, float32 [L, N, P, D], of pixel values [N, C, H, W]."""
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(x_NCHW), output_hidden_states=True).hidden_states
    assert len(found) == 1 + model.config.num_hidden_layers  # the first is before all layers
    return np.stack([x.numpy() for x in found[1:]])
