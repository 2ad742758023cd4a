"""The interface of every family of checkpoints."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from calm_jax.checkpoints.convert.huggingface_config import refuse, refuse_experts
from calm_jax.checkpoints.convert.table import Rule, Unused
from calm_jax.checkpoints.sources.source import Source, Tensor
from calm_jax.errors import CalmError
from calm_jax.models import DecoderConfig


@dataclasses.dataclass(frozen=True)
class Reading:
    """How one source becomes a frozen folder."""

    config: DecoderConfig  # the conversion chooses its dtype
    rules: tuple[Rule, ...]  # together they fill the whole canonical tree
    tensors: Mapping[str, Tensor]  # by the names that `rules` and `unused` use
    unused: tuple[Unused, ...] = ()  # the other tensors that `tensors` may hold
    warnings: tuple[str, ...] = ()  # lines for the user


class Family:
    """One family of checkpoints, in all the layouts in which it is published."""

    name: ClassVar[str]  # for `--format`
    # Meanings and defaults of options, by name, for facts that a checkpoint does not show.
    options: ClassVar[Mapping[str, str]] = {}

    def recognises(self, source: Source) -> bool:
        """Whether the source is of this family, judged only by names and config."""
        raise NotImplementedError

    def read(self, source: Source, **options: Any) -> Reading:
        """How to convert `source`.

        Raises:
            CalmError: the source needs something unsupported, which the message names, or an option
                contradicts the source.
        """
        raise NotImplementedError


class HuggingFaceFamily(Family):
    """A family published as `config.json` and safetensors, both of which can be written back."""

    architectures: ClassVar[tuple[str, ...]]  # in config.json; the first is the one to export
    model_type: ClassVar[str]  # in config.json, also to export
    other_model_types: ClassVar[tuple[str, ...]] = ()  # that are read too

    def recognises(self, source: Source) -> bool:
        if source.kind not in ("huggingface", "gguf") or source.config is None:
            return False
        architectures = source.config.get("architectures")
        # transformers uses model_type; architectures say which part of the model was saved, and
        # are missing if a config was saved without a model.
        default = self.model_type if architectures else None
        model_type = source.config.get("model_type", default)
        return model_type in (self.model_type, *self.other_model_types) and (
            not architectures or bool(set(architectures) & set(self.architectures))
        )

    def read(self, source: Source, **options: Any) -> Reading:
        if source.config is None:
            raise CalmError(f"{source.path}: {self.name} needs a config.json with the tensors")
        where = str(source.config_path)
        refuse(source.config, where, "quantization_config", None)
        refuse(source.config, where, "is_causal", True, None)
        refuse_experts(source.config, where)
        config = self.checked_config(source.config, where)
        return Reading(config, self.rules(config), self.tensors(source), self.unused(config))

    def checked_config(self, values: Mapping[str, Any], where: str) -> DecoderConfig:
        """`decoder_config`, with errors that name file and family."""
        try:
            return self.decoder_config(values, where)
        except CalmError as error:  # also from a DecoderConfig whose fields contradict each other
            told = str(error) if where in str(error) else f"{where}: {error}"
            raise CalmError(f"{told} (family {self.name})") from None

    def tensors(self, source: Source) -> Mapping[str, Tensor]:
        """The source's tensors by the names of `rules`."""
        found = {self.tensor_name(name): tensor for name, tensor in source.tensors.items()}
        if len(found) < len(source.tensors):
            raise CalmError(f"{source.path} has some tensors twice, under two names")
        return found

    def tensor_name(self, name: str) -> str:
        """The name in `rules` of the tensor that a source calls `name`."""
        return name

    def decoder_config(self, values: Mapping[str, Any], where: str) -> DecoderConfig:
        """The model's config from config.json in any of its spellings; `where` names the file.

        Raises:
            CalmError: something that is not supported, by its key and value.
        """
        raise NotImplementedError

    def huggingface_config(self, config: DecoderConfig) -> dict[str, Any]:
        """config.json for a model, as transformers 4 and 5 read it.

        If this family cannot express the model, the result describes another one: the export reads
        it back with `decoder_config` and compares.
        """
        raise NotImplementedError

    def rules(self, config: DecoderConfig) -> tuple[Rule, ...]:
        """The table for a model with this config."""
        raise NotImplementedError

    def unused(self, config: DecoderConfig) -> tuple[Unused, ...]:
        """The other tensors that files of this family may hold."""
        raise NotImplementedError
