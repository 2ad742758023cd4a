"""Tasks of lm-evaluation-harness: an adapter from its models to the generator.

Importing this module imports `lm_eval` (the extra [harness]).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from calm_jax import sharding
from calm_jax.checkpoints.any_model import load_model
from calm_jax.checkpoints.files import check_writable, write_text
from calm_jax.decoding import Generator, Sampling
from calm_jax.errors import CalmError
from calm_jax.evaluation.answering import models_by_name, rows
from calm_jax.models import ComposedDecoder

CONTEXT = 2048  # tokens of a prompt with its answer, unless another number is given
_NEW_TOKENS = 256  # of an answer whose task does not say; the harness's own
_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "configs", "higher_is_better",
         "samples")  # fmt: skip
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):
    """A decoder or a composed model as the harness asks it.

    Prompts are encoded and cut as its own `hf` model does: those longer than `context` lose their
    beginning.

    Args:
        model: with a vocabulary that has an end token.
        context: tokens of a prompt with its answer at most.
        batch_size: rows that are decoded at once at most.

    Raises:
        CalmError: the model has no vocabulary, or that no end token.
    """

    def __init__(self, model: Any, *, context: int = CONTEXT, batch_size: int = 8):
        super().__init__()
        if model.vocabulary is None or model.vocabulary.eos_id is None:
            raise CalmError("the harness needs a model with a vocabulary that has an end token")
        self.vocabulary, self.context = model.vocabulary, context
        # The last token of a continuation is scored and not read.
        length = context + 1
        self.generator = Generator(model, max_length=length, slots=rows(batch_size, length))

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos_id = self.vocabulary.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text; where `add_special_tokens` is False without the start token."""
        if add_special_tokens is False:
            return self.vocabulary.encode(string)
        return self.vocabulary.encode_sequence(string)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        prompts, continuations = [], []
        for _, prompt, continuation in requests:
            room = self.context + 1 - len(continuation)
            if room < 1:
                raise CalmError(
                    f"a continuation has {len(continuation)} tokens, but the context {self.context}"
                )
            prompts.append(prompt[-room:])
            continuations.append(continuation)
        scores = self.generator.score(prompts, continuations)
        return [(score.logprob, score.is_greedy) for score in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """How probable whole texts are, read in windows of the context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.context,
                context_len=1,
            )
            for prompt, continuation in map(make_disjoint_window, pieces):
                windows.append((None, prompt, continuation))
                owners.append(number)
        found = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows)
        for number, (logprob, _) in zip(owners, scores, strict=True):
            found[number] += logprob
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers, each up to the first of its request's texts that stop it."""
        prompts, samplings = [], []
        for request in requests:
            text, given = request.args
            sampling = self._sampling(given)
            room = self.context - sampling.max_new_tokens
            if room < 1:
                raise CalmError(
                    f"an answer may have {sampling.max_new_tokens} tokens, but the context has "
                    f"{self.context}: give a larger --context"
                )
            prompts.append(self.tok_encode(text)[-room:])
            samplings.append(sampling)
        answers = self.generator.generate(prompts, samplings)
        said = []
        for (answer,), sampling in zip(answers, samplings, strict=True):
            if answer.error is not None:
                raise CalmError(answer.error)
            text = self.vocabulary.decode(answer.tokens)
            said.append(postprocess_generated_text(text, list(sampling.stop), None))
        return said

    def _sampling(self, given: Mapping[str, Any]) -> Sampling:
        values = normalize_gen_kwargs(dict(given), _NEW_TOKENS)
        draws = values.pop("do_sample", False)
        stop = values.pop("until", None) or []
        tokens = values.pop("max_gen_toks")
        options = {name: values.pop(name) for name in _SAMPLING if name in values}
        if values:
            raise CalmError(f"generation_kwargs: {sorted(values)[0]!r} is not supported")
        if not draws:  # then these have nothing to choose from
            options = {k: v for k, v in options.items() if k == "repetition_penalty"}
        stops = [stop] if isinstance(stop, str) else stop
        return Sampling(max_new_tokens=tokens, stop=tuple(filter(None, stops)), **options)


def evaluate_harness(
    folder: epath.PathLike,
    tasks: Sequence[str],
    *,
    parts: bool = False,
    output: epath.PathLike,
    moved: Mapping[str, Any],
    step: int | None = None,
    mesh: Mapping[str, int] | None = None,
    **options: Any,
) -> str:
    """Scores a run, a frozen folder or a bridge; returns its tables, and those of its parts.

    Writes `harness.json` into `output`: results, versions and samples of each, by its name, that of
    the model itself being "".

    Args:
        parts: whether the anchor and the augments of a pair are scored alone as well.
        moved: `anchor` and `augments`, where these have moved.
        step, mesh: as in `runner.evaluate`.
        options: of `run_harness`.

    Raises:
        CalmError: as `load_model` and `run_harness` do; parts of a model that has none.
    """
    check_writable(output)
    built = None if mesh is None else sharding.make_mesh(mesh)
    loaded = load_model(folder, step=step, mesh=built, **moved)
    if parts and not isinstance(loaded, ComposedDecoder):
        raise CalmError(f"{folder} has no parts to score")
    found = {}
    for name, model in models_by_name(loaded, parts=parts).items():
        results = run_harness(model, tasks, **options)
        found[name] = {key: results[key] for key in _KEPT if key in results}
    # Some values of its tasks are arrays, functions and the like.
    text = json.dumps(found, indent=1, ensure_ascii=False, default=str)
    write_text(epath.Path(output) / "harness.json", text + "\n")
    titles = {name: f"{name} alone" if name else "" for name in found}
    tables = [f"{titles[name]}\n{make_table(results)}" for name, results in found.items()]
    return "\n".join(tables).strip()


def run_harness(
    model: Any,
    tasks: Sequence[str],
    *,
    include_path: epath.PathLike | None = None,
    shots: int | None = None,
    limit: int = 0,
    context: int = 0,
    batch_size: int = 8,
) -> dict[str, Any]:
    """Scores a model on tasks of the harness; returns what `simple_evaluate` does, with samples.

    Args:
        tasks: their names.
        include_path: a folder with tasks of one's own, as YAML.
        shots, limit: as of the harness, where they are given.
        context, batch_size: as of `HarnessModel`; a context of 0 is `CONTEXT`.

    Raises:
        CalmError: an unknown task, or as `HarnessModel` does.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise CalmError(
            f"--harness={unknown[0]}: the harness has no such task; --include_path names a folder "
            "with your own"
        )
    asked = HarnessModel(model, context=context or CONTEXT, batch_size=batch_size)
    return simple_evaluate(
        asked,
        tasks=list(tasks),
        num_fewshot=shots,
        limit=limit or None,
        task_manager=manager,
        bootstrap_iters=1000,
    )
