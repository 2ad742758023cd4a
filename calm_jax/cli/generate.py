"""`calm generate`: what a model answers."""

import sys
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from calm_jax.cli import config, models
from calm_jax.errors import CalmError
from calm_jax.quiet import quiet_libtpu
from calm_jax.text_files import read_lines

USAGE = """Prints what a model answers to each prompt.

  calm generate --workdir=runs/kv/composed --prompt='<math>ab+cd='
  calm generate --workdir=runs/kv/anchor/frozen --prompts_file=prompts.txt --max_new_tokens=8
  calm generate --workdir=models/gemma --chat --prompt='Who wrote Faust?'

WORKDIR is a run of `calm train`, a frozen folder or an exported bridge. Where the frozen models of
a bridge have moved since it was trained, --anchor and --augments say where they are. At every step
the most probable token is taken. With --chat each prompt is a message of the user, put to the model
in its own chat template. The first device computes; --mesh.tensor=8 and the like spread the model
over all."""

MESH = {"slices": 0, "data": -1, "fsdp": 1, "tensor": 1}


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("workdir", None, "folder that holds a model", flag_values=values)
    models.define(values)
    flags.DEFINE_multi_string("prompt", [], "text to go on from; repeatable", flag_values=values)
    flags.DEFINE_string("prompts_file", None, "file with a prompt a line", flag_values=values)
    flags.DEFINE_bool("chat", False, "prompts are messages of a user", flag_values=values)
    flags.DEFINE_string(
        "system", None, "message of the system before each with --chat", flag_values=values
    )
    flags.DEFINE_integer("max_new_tokens", 32, "length of an answer at most", flag_values=values)


def main(argv: list[str]) -> int:
    """Runs the command; `argv` is what follows its name."""
    given = models.mesh_as_config(argv)
    values, settings = config.parse(
        given,
        USAGE,
        _define,
        required=("workdir",),
        load_config=lambda _: ConfigDict({"mesh": MESH}),
    )
    prompts = list(values.prompt)
    if values.prompts_file is not None:
        prompts += read_lines(values.prompts_file)
    if not prompts:
        raise CalmError("no prompt: give --prompt or --prompts_file")
    if values.system is not None and not values.chat:
        raise CalmError("--system stands before messages of a chat: give --chat too")

    from calm_jax.checkpoints.any_model import load_model
    from calm_jax.decoding import generate
    from calm_jax.sharding import make_mesh

    quiet_libtpu()
    mesh = make_mesh(settings.mesh.to_dict()) if given != argv else None
    model = load_model(values.workdir, step=values.step, mesh=mesh, **models.moved(values))
    texts = prompts
    if values.chat:
        texts = _chats(model.vocabulary, prompts, values.system, values.workdir)
    answers = generate(model, texts, max_new_tokens=values.max_new_tokens)
    for prompt, text, tokens in zip(prompts, texts, answers, strict=True):
        answer = model.vocabulary.decode_after(model.vocabulary.encode_sequence(text), tokens)
        chat = f"user: {prompt}\nassistant: {answer.lstrip(' ')}"
        print(chat if values.chat else prompt + answer)
        if not answer:
            print(f"the answer to {prompt!r} is empty", file=sys.stderr)
    return 0


def _chats(vocabulary: Any, prompts: list[str], system: str | None, workdir: str) -> list[str]:
    if vocabulary is None or vocabulary.chat_template is None:
        raise CalmError(f"--chat: the vocabulary of {workdir} has no chat template")
    before = [] if system is None else [{"role": "system", "content": system}]
    return [vocabulary.chat([*before, {"role": "user", "content": text}]) for text in prompts]
