"""The kinds of folders, recognised by their config.json."""

from collections.abc import Mapping
from typing import Any

DECODER_RUN, COMPOSED_RUN = "a decoder's run", "a composed run"
FROZEN, BRIDGE = "a frozen folder", "an exported bridge"
PYTORCH_BRIDGE = "a bridge for PyTorch"


def kind_of(config: Mapping[str, Any]) -> str:
    """The kind, in words, of a folder with this config.json of any version."""
    format = str(config.get("format", ""))
    if format.startswith("calm_jax bridge"):
        return BRIDGE
    if format.startswith("calm_jax frozen folder"):
        return FROZEN
    runs = {"decoder": DECODER_RUN, "composed": COMPOSED_RUN}
    if not format and str(config.get("kind")) in runs:
        return runs[config["kind"]]
    if config.get("model_type") == "calm" and "bridges" in config:
        return PYTORCH_BRIDGE
    return "a Hugging Face folder" if "model_type" in config else "a folder of another program"
