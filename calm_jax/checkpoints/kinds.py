"""What a folder with a config.json is: who reads it, or which words refuse it."""

from collections.abc import Mapping
from typing import Any

DECODER_RUN, COMPOSED_RUN = "a decoder's run", "a composed run"
FROZEN, BRIDGE = "a frozen folder", "an exported bridge"


def kind_of(config: Mapping[str, Any]) -> str:
    """Words for the folder whose config.json says this, of whatever version."""
    form = str(config.get("format", ""))
    if form.startswith("calm_jax bridge"):
        return BRIDGE
    if form.startswith("calm_jax frozen folder"):
        return FROZEN
    runs = {"decoder": DECODER_RUN, "composed": COMPOSED_RUN}
    if not form and str(config.get("kind")) in runs:
        return runs[config["kind"]]
    return "a Hugging Face folder" if "model_type" in config else "a folder of another program"
