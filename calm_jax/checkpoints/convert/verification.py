"""Whether a converted folder computes what its source does, as far as this machine can tell."""

import hashlib
import importlib.util
import logging
from typing import Any

import jax
import numpy as np
from etils import epath

from calm_jax.checkpoints import frozen
from calm_jax.checkpoints.files import write_json
from calm_jax.checkpoints.sources.source import Source
from calm_jax.errors import CalmError

FILE = "verification.json"
PROMPTS, LENGTH = 3, 64  # tokens; a small window and half as many, where there is one
LARGEST_WINDOW = 1024  # that a prompt is made longer than
TOLERANCE = 1e-4  # of the largest logit, in float32
ROUNDED_TOLERANCE = 0.1  # where weights were rounded to bfloat16 and the source's were not
log = logging.getLogger("absl")


def verify_folder(folder: epath.Path, source: Source) -> None:
    """Computes logits of fixed prompts in float32, notes them in the folder, and compares them.

    They are compared with those of transformers, where it is installed and `source` is a Hugging
    Face folder; a log line says which was done.

    Raises:
        CalmError: the folder cannot be loaded, a logit is not finite, or the two differ by more
            than `TOLERANCE` of the largest.
    """
    decoder = frozen.load(folder, dtype="float32")
    window = decoder.config.window or 0
    length = LENGTH + (window if window <= LARGEST_WINDOW else 0)
    tokens_BT = fixed_prompts(decoder.config.vocab_size, length)
    logits_BTV = np.asarray(decoder(tokens_BT))
    if not np.isfinite(logits_BTV).all():
        raise CalmError(f"{source.place}: converted, it computes logits that are not finite")
    compared = _compare(logits_BTV, tokens_BT, source, frozen.describe(folder))
    last_BV = logits_BTV[:, -1]
    best_BN = np.argsort(-last_BV, axis=-1)[:, :5]
    write_json(
        folder / FILE,
        {
            "prompts": tokens_BT.tolist(),
            "best_next": best_BN.tolist(),
            "their_logits": np.take_along_axis(last_BV, best_BN, -1).astype(float).tolist(),
            "logits_sha256": hashlib.sha256(logits_BTV.tobytes()).hexdigest(),
            "computed_with": f"jax {jax.__version__} on {jax.devices()[0].device_kind}, float32",
            "compared_with": compared,
        },
    )


def fixed_prompts(vocab_size: int, length: int = LENGTH) -> np.ndarray:
    """Token ids, int32 [B, T], the same for every model with such a vocabulary and length."""
    return np.random.default_rng(0).integers(vocab_size, size=(PROMPTS, length)).astype(np.int32)


def _compare(
    logits_BTV: np.ndarray, tokens_BT: np.ndarray, source: Source, described: frozen.Description
) -> dict[str, Any] | None:
    """Name and greatest difference of what the logits were compared with, or None."""
    log.info("Weight bits that were damaged before, and that no checksum covers, stay unknown")
    if source.kind != "huggingface":
        log.info("Logits computed and noted; there is nothing here to compare them with")
        return None
    for package in ("transformers", "torch"):
        if importlib.util.find_spec(package) is None:
            log.info("Logits computed and noted; %s is not installed to compare them", package)
            return None
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(source.place), dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        theirs_BTV = model(torch.from_numpy(tokens_BT.astype(np.int64))).logits.numpy()
    scale = float(np.max(np.abs(theirs_BTV)))
    difference = float(np.max(np.abs(theirs_BTV - logits_BTV))) / scale
    rounded = described.config.dtype == "bfloat16" and described.origin["dtype"] != "bfloat16"
    tolerance = ROUNDED_TOLERANCE if rounded else TOLERANCE
    if not difference <= tolerance:
        raise CalmError(
            f"{source.place}: converted, its logits differ by {difference:.1e} of their scale from "
            f"those of transformers; at most {tolerance:.0e} is expected"
        )
    log.info("Logits are those of transformers, within %.1e of their scale", difference)
    return {"program": f"transformers {transformers.__version__}", "difference": difference}
