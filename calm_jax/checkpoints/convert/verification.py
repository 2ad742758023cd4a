"""Checks, as far as this machine can, that a converted model computes the same as its source."""

import hashlib
import importlib
import importlib.util
import logging
from typing import Any

import jax
import numpy as np
from etils import epath

from calm_jax.checkpoints.convert.registry import FAMILIES
from calm_jax.checkpoints.files import explained, write_json
from calm_jax.checkpoints.frozen import Description, load_described
from calm_jax.checkpoints.sources.source import Source
from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig

FILE = "verification.json"
PROMPTS, LENGTH = 3, 64  # tokens
LARGEST_WINDOW = 1024  # the longest window that a prompt exceeds
TOLERANCE = 1e-4  # fraction of the largest logit, in float32
ROUNDED_TOLERANCE = 0.1  # if weights were rounded to bfloat16 but the source's were not
log = logging.getLogger("absl")


def verify_model(
    described: Description, source: Source, adapter: epath.PathLike | None = None
) -> None:
    """Computes logits of fixed prompts in float32, writes them to the folder, and compares them.

    If transformers is installed and reads `source`, they are compared with its logits; PEFT then
    applies the `adapter`. A log line says what was compared.

    Raises:
        CalmError: the folder cannot be loaded, a logit is not finite, transformers does not run
            the source, or the two differ by more than `TOLERANCE` of the largest.
    """
    decoder = load_described(described, dtype="float32")
    tokens_BT = fixed_prompts(described.config)
    logits_BTV = np.asarray(decoder(tokens_BT))
    if not np.isfinite(logits_BTV).all():
        raise CalmError(f"{source.path}: converted, it computes logits that are not finite")
    del decoder
    log.info(
        "Not covered: damage of the source's weights from before the conversion, since its format "
        "has no checksums"
    )
    window = described.config.window
    if window is not None and window >= tokens_BT.shape[1]:
        log.info(
            "Not covered: the window of %d tokens; prompts have %d", window, tokens_BT.shape[1]
        )
    compared = _compare(logits_BTV, tokens_BT, source, described, adapter)
    last_BV = logits_BTV[:, -1]
    best_BN = np.argsort(-last_BV, axis=-1)[:, :5]
    write_json(
        described.folder / FILE,
        {
            "prompts": tokens_BT.tolist(),
            "best_next": best_BN.tolist(),
            "their_logits": np.take_along_axis(last_BV, best_BN, -1).astype(float).tolist(),
            "logits_sha256": hashlib.sha256(logits_BTV.tobytes()).hexdigest(),
            "computed_with": f"jax {jax.__version__} on {jax.devices()[0].device_kind}, float32",
            "compared_with": compared,
        },
    )


def fixed_prompts(config: DecoderConfig) -> np.ndarray:
    """Token ids, int32 [B, T], the same for every model with this vocabulary size and window.

    Only one prompt exceeds the window: the logits of long prompts take much memory.
    """
    shape = (PROMPTS, LENGTH)
    if config.window is not None and LENGTH <= config.window <= LARGEST_WINDOW:
        shape = (1, config.window + LENGTH)
    return np.random.default_rng(0).integers(config.vocab_size, size=shape).astype(np.int32)


def _compare(
    logits_BTV: np.ndarray,
    tokens_BT: np.ndarray,
    source: Source,
    described: Description,
    adapter: epath.PathLike | None,
) -> dict[str, Any] | None:
    """The program that the logits were compared with, and the largest difference; or None."""
    if source.kind not in ("huggingface", "gguf"):
        log.info("Logits computed and recorded, but there is nothing here to compare them with")
        return None
    for package in ("transformers", "torch") + ("peft",) * (adapter is not None):
        if importlib.util.find_spec(package) is None:
            log.info("Logits computed and recorded; %s is not installed to compare them", package)
            return None
    import torch
    import transformers

    program = f"transformers {transformers.__version__}"
    # transformers raises many kinds of exceptions.
    with explained(f"{source.path}: {program} cannot run it"):
        try:
            model = _loaded_by_transformers(source, described)
        except (NotImplementedError, ValueError) as error:
            unread = isinstance(error, NotImplementedError) or "is not supported" in str(error)
            if source.kind != "gguf" or not unread:
                raise
            reason = str(error).partition("\n")[0]
            log.warning("Logits are not compared; %s does not read the file: %s", program, reason)
            return None
        if adapter is not None:
            model = importlib.import_module("peft").PeftModel.from_pretrained(model, str(adapter))
        with torch.no_grad():
            theirs_BTV = model(torch.from_numpy(tokens_BT.astype(np.int64))).logits.numpy()
    scale = float(np.max(np.abs(theirs_BTV)))
    difference = float(np.max(np.abs(theirs_BTV - logits_BTV))) / scale
    dtypes = {described.origin["dtype"], *described.origin["other_dtypes"].values()}
    rounded = described.config.dtype == "bfloat16" and dtypes != {"bfloat16"}
    tolerance = ROUNDED_TOLERANCE if rounded else TOLERANCE
    if not difference <= tolerance:
        raise CalmError(
            f"{source.path}: converted, its logits differ by {difference:.1e} of their scale from "
            f"those of transformers; at most {tolerance:.0e} is allowed"
        )
    if source.kind == "gguf":
        log.info("Not covered: the config of a GGUF file, of which transformers reads only parts")
    log.info("Logits are those of transformers, within %.1e of their scale", difference)
    return {"program": program, "difference": difference}


def _loaded_by_transformers(source: Source, described: Description) -> Any:
    """The model in transformers; of a GGUF file the tensors, with the config that was read here."""
    import torch
    import transformers

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    path = source.path
    if source.kind == "gguf":
        # transformers itself leaves out scaled rotary positions, windows, caps and more.
        values = FAMILIES[described.origin["family"]].huggingface_config(described.config)
        config = transformers.CONFIG_MAPPING[values["model_type"]].from_dict(values)
        options |= {"gguf_file": path.name, "config": config}
        path = path.parent
    return transformers.AutoModelForCausalLM.from_pretrained(str(path), **options)
