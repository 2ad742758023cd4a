"""What a folder with a config.json is: for the line that refuses it."""

from collections.abc import Mapping
from typing import Any


def kind_of(config: Mapping[str, Any]) -> str:
    """Words for the folder whose config.json says this."""
    form, kind = str(config.get("format", "")), config.get("kind")
    if kind == "decoder":
        return "a decoder's run"
    if kind == "composed":
        return "a composed run"
    if form.startswith("calm_jax bridge"):
        return "an exported bridge"
    if form.startswith("calm_jax frozen folder"):
        return "a frozen folder"
    return "a Hugging Face folder" if "model_type" in config else "a folder of another program"
