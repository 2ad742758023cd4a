"""Controls and baselines: what is computed, against the same without batches and caches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models
from flax import nnx

import calm_jax
from calm_jax.cli import evaluate
from calm_jax.data.vocabularies import load_vocabulary
from calm_jax.decoding import Generator, Sampling
from calm_jax.errors import CalmError
from calm_jax.evaluation import controls
from calm_jax.evaluation.baselines import HandOver, Mixture
from calm_jax.evaluation.controls import Recomputed
from calm_jax.evaluation.variants import Variant
from calm_jax.models import CompositionConfig, Inputs, compose

NEW = 3


@pytest.fixture(scope="module")
def pair():
    model = tiny_models.randomised(tiny_models.composed(num_layers=2))
    # Strong enough to change what is chosen.
    nnx.update(model.bridge, jax.tree.map(lambda x: 3 * x, nnx.state(model.bridge)))
    return model


def prompts(count, seed=0, length=(3, 9)):
    random = np.random.default_rng(seed)
    return [random.integers(1, 60, random.integers(*length)).tolist() for _ in range(count)]


@functools.partial(jax.jit, static_argnames=("graphdef", "perturb"))
def next_tokens(graphdef, state, rows_BT, length, perturb):
    """The most probable token after the first `length` of each row; the others are padding."""
    model, mask_BT = nnx.merge(graphdef, state), jnp.zeros_like(rows_BT)
    segments_BT = mask_BT.at[:].set(jnp.arange(rows_BT.shape[1]) < length)
    inputs = Inputs(rows_BT, segments_BT=segments_BT, prompt_mask_BT=segments_BT)
    logits_BTV = model.logits(model.perturbed(inputs, perturb)[0])
    return jnp.argmax(logits_BTV[:, length - 1], axis=-1)


def one_by_one(model, rows, perturb):
    """Greedy tokens of rows of one length, each from a pass over the rows as they stand."""
    length = len(rows[0])
    rows_BT = np.zeros((len(rows), 12), np.int32)
    rows_BT[:, :length] = rows
    for end in range(length, length + NEW):
        rows_BT[:, end] = next_tokens(*nnx.split(model), rows_BT, end, perturb)
    return rows_BT[:, length : length + NEW].tolist()


def in_order(recomputed, asked, sampling):
    found = dict(recomputed.as_completed(asked, sampling))
    return [found[number] for number in range(len(asked))]


def test_without_a_change_it_answers_as_the_generator(pair, monkeypatch):
    monkeypatch.setitem(controls.OF_TAPS, "zeroed", lambda x, augment, layer: x)
    asked, sampling = prompts(5), Sampling(max_new_tokens=NEW)
    answers = in_order(Recomputed(pair, "zeroed", slots=3), asked, sampling)
    expected = Generator(pair, max_length=32, slots=3).generate(asked, sampling)
    assert [a.tokens for (a,) in answers] == [a.tokens for (a,) in expected]
    continuations = prompts(5, seed=1, length=(1, 4))
    scores = Recomputed(pair, "zeroed", slots=3).score(asked, continuations)
    expected = Generator(pair, max_length=32).score(asked, continuations)
    for ours, other in zip(scores, expected, strict=True):
        np.testing.assert_allclose(ours.tokens_logprobs, other.tokens_logprobs, atol=1e-4)
        assert ours.is_greedy == other.is_greedy


def test_an_answer_without_a_change_ends_where_the_generators_does(pair, monkeypatch):
    """At an end token, a stop text or its length."""
    monkeypatch.setitem(controls.OF_TAPS, "zeroed", lambda x, augment, layer: x)
    monkeypatch.setattr(pair.anchor, "vocabulary", load_vocabulary("bytes"))
    asked = prompts(5)
    (free,) = in_order(Recomputed(pair, "zeroed", slots=3), asked, Sampling(max_new_tokens=NEW))[0]
    sampling = Sampling(max_new_tokens=NEW, stop=(free.text[1], free.text[-1]))
    answers = in_order(Recomputed(pair, "zeroed", slots=3), asked, sampling)
    expected = Generator(pair, max_length=32, slots=3).generate(asked, sampling)
    assert answers == expected
    assert {"stop", "length"} == {one.finish_reason for (one,) in answers}


@pytest.mark.slow
def test_with_another_tokenizer_too(monkeypatch):
    """Of two augments one reads the anchor's tokens."""
    models = [tiny_models.decoder(seed, vocab_size=264, num_layers=2) for seed in range(3)]
    for model, name in zip(models, ("bytes", "key_value", "bytes"), strict=True):
        model.vocabulary = load_vocabulary(name)
    config = CompositionConfig(every=1, init="paper")
    model = tiny_models.randomised(compose(models[0], models[1:], config, rngs=nnx.Rngs(5)))
    monkeypatch.setitem(controls.OF_TAPS, "zeroed", lambda x, augment, layer: x)
    texts = ["<math>ab+cd=", "<math>1+2=", "<math>abcd+e-12="]
    asked, sampling = list(map(model.vocabulary.encode, texts)), Sampling(max_new_tokens=NEW)
    recomputed, generator = Recomputed(model, "zeroed", slots=2), Generator(model, max_length=64)
    answers = in_order(recomputed, asked, sampling)
    expected = generator.generate(asked, sampling)
    assert [a.tokens for (a,) in answers] == [a.tokens for (a,) in expected]
    continuations = list(map(model.vocabulary.encode, ["12", "3", "<math>"]))
    scores = recomputed.score(asked, continuations)
    for ours, other in zip(scores, generator.score(asked, continuations), strict=True):
        np.testing.assert_allclose(ours.tokens_logprobs, other.tokens_logprobs, atol=1e-4)
    monkeypatch.undo()
    zeroed = in_order(Recomputed(model, "zeroed", slots=2), asked, sampling)
    assert [a.tokens for (a,) in zeroed] != [a.tokens for (a,) in answers]


def all_zero(x, augment, layer):
    return jnp.zeros_like(x)


def test_zeroed_taps_are_zero(pair):
    asked = prompts(3, length=(4, 6))
    answers = in_order(Recomputed(pair, "zeroed", slots=2), asked, Sampling(max_new_tokens=NEW))
    for prompt, (answer,) in zip(asked, answers, strict=True):
        assert [answer.tokens] == one_by_one(pair, [prompt], all_zero)


def swapped(x, augment, layer):
    return x[::-1]


def test_shuffled_taps_are_those_of_another_row(pair):
    """Two rows of one length read each other's taps; three read those of the row before."""
    asked = prompts(2, length=(6, 7))
    order = np.random.default_rng(controls.SEED).permutation(2)
    expected = one_by_one(pair, [asked[number] for number in order], swapped)
    answers = in_order(Recomputed(pair, "shuffled", slots=8), asked, Sampling(max_new_tokens=NEW))
    assert [answers[number][0].tokens for number in order] == expected
    with pytest.raises(CalmError, match="at least two prompts"):
        in_order(Recomputed(pair, "shuffled", slots=8), asked[:1], Sampling(max_new_tokens=1))


def test_noise_has_the_norm_of_the_taps_and_forgets_them():
    x_BTE = jax.random.normal(jax.random.key(3), (2, 5, 64)) * jnp.array([1.0, 7.0])[:, None, None]
    first, second = controls.noise(x_BTE, 0, 1), controls.noise(2 * x_BTE[::-1], 0, 1)
    norms = [np.linalg.norm(x, axis=-1) for x in (x_BTE, first)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    directions = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (first, second)]
    np.testing.assert_allclose(*directions, atol=1e-5)  # whatever the taps say
    assert np.abs(controls.noise(x_BTE, 0, 2) - first).max() > 1


def test_permuting_changes_the_augments_alone(pair):
    model = nnx.clone(pair)
    controls.permute_augments(model)
    same = jax.tree.map(jnp.array_equal, nnx.state(model.anchor), nnx.state(pair.anchor))
    assert all(jax.tree.leaves(same))
    for ours, other in zip(
        *(jax.tree.leaves(nnx.state(m.augments[0])) for m in (model, pair)), strict=True
    ):
        assert ours.sharding == other.sharding
        np.testing.assert_array_equal(np.sort(ours, axis=None), np.sort(other, axis=None))
    tokens = jnp.array([[3, 4, 5, 6]])
    assert not np.allclose(model(tokens), pair(tokens), atol=1e-3)


def test_a_temperature_is_refused(pair):
    with pytest.raises(CalmError, match="answers greedily"):
        in_order(Recomputed(pair, "noise", slots=2), [[1, 2]], Sampling(temperature=1.0))


@pytest.mark.parametrize("weight", [0.0, 0.35, 1.0])
def test_a_mixture_is_the_weighted_sum_of_log_probabilities(weight):
    anchor, augment = tiny_models.decoder(1, "llama"), tiny_models.decoder(2, embed_dim=16)
    asked = prompts(5)
    generator = Generator(Mixture(anchor, augment, weight), max_length=32, slots=2)
    answers = generator.generate(asked, Sampling(max_new_tokens=NEW))
    for prompt, (answer,) in zip(asked, answers, strict=True):
        row_T = np.zeros(12, np.int32)  # padding at the end changes nothing before it
        row_T[: len(prompt)] = prompt
        for end in range(len(prompt), len(prompt) + NEW):
            of_anchor, of_augment = (
                jax.nn.log_softmax(model(row_T[None])[0, end - 1]) for model in (anchor, augment)
            )
            row_T[end] = jnp.argmax((1 - weight) * of_anchor + weight * of_augment)
        assert answer.tokens == row_T[len(prompt) : len(prompt) + NEW].tolist()


class Letters:
    """A vocabulary of single characters."""

    size, base_size, eos_ids, start_ids = 60, 60, (0,), ()

    def encode_sequence(self, text):
        return [ord(letter) % 60 for letter in text]

    def decode(self, ids):
        return "".join(chr(64 + token % 26) for token in ids)

    def decode_after(self, before, ids):
        return self.decode(ids)


def test_what_the_augment_says_is_put_into_the_prompt():
    augment = tiny_models.decoder(2, embed_dim=16)
    augment.vocabulary = Letters()
    rule = HandOver(question="Q:{inputs}", prompt="{inputs} [{answer}]", replace=("<a>", "<b>"))
    sampling = Sampling(max_new_tokens=3)
    ((said, prompt),) = rule.prompts(augment, ["<a>xyz"], [sampling], slots=1)
    ids = Letters().encode_sequence("Q:<b>xyz")
    ((answer,),) = Generator(augment, max_length=32).generate([ids], sampling)
    assert said == answer.text
    assert prompt == f"<a>xyz [{said}]"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"control": "zeroed", "mix": "x"}, "--control and --mix cannot be given together"),
        ({"control": "burnt"}, "known are shuffled, zeroed, noise, permuted"),
    ],
)
def test_a_variant_that_is_none(arguments, message):
    with pytest.raises(CalmError, match=message):
        Variant(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "{inputs} {answer}"}, "its fields are {inputs}"),
        ({"prompt": "{inputs"}, "its fields are {inputs} and {answer}"),
        ({"prompt": "{inputs}"}, "it must have an {answer}"),
    ],
)
def test_templates_that_mean_nothing(arguments, message):
    with pytest.raises(CalmError, match=message):
        HandOver(**arguments)


def test_the_command_knows_every_control():
    assert evaluate.CONTROLS == controls.CONTROLS


def test_a_control_sees_the_prompt_alone_with_an_encoder_only_bridge():
    config = CompositionConfig(every=2, encoder_only=True)
    model = tiny_models.randomised(tiny_models.composed(config))
    asked, sampling = prompts(3), Sampling(max_new_tokens=NEW)
    changed = controls.OF_TAPS | {"zeroed": lambda x, augment, layer: x}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(controls, "OF_TAPS", changed)
        answers = in_order(Recomputed(model, "zeroed", slots=3), asked, sampling)
    expected = calm_jax.Generator(model, max_length=32).generate(asked, sampling)
    assert [a.tokens for (a,) in answers] == [a.tokens for (a,) in expected]
