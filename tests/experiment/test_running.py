"""Jobs in processes of their own: done ones are skipped, failed ones stop those that need them."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

from child_processes import environment
from etils import epath

from calm_jax.experiment.arms import Arm, Job
from calm_jax.experiment.running import DONE, is_done, run


def job(folder, name, *arguments, needs=()):
    place = epath.Path(folder) / name
    return Job(Arm(name), 0, place, (), arguments or ("--version",), tuple(needs))


def test_what_is_done_is_skipped_and_a_failure_stops_only_its_own(tmp_path):
    good = job(tmp_path, "good")
    bad = job(tmp_path, "bad", "report", "--experiment=nowhere")
    after_bad = job(tmp_path, "after_bad", needs=[bad])
    after_that = job(tmp_path, "after_that", needs=[after_bad, good])
    after_good = job(tmp_path, "after_good", needs=[good])
    jobs, said = [good, bad, after_bad, after_that, after_good], []
    wrong = run(jobs, say=said.append)
    assert list(wrong) == [bad, after_bad, after_that]
    assert wrong[bad].startswith("calm report ended with status 2: error: ")
    assert "nowhere" in wrong[bad] and "bad.log" in wrong[bad]
    assert wrong[after_bad] == "not run, since bad, seed 0 failed"
    assert wrong[after_that] == "not run, since after_bad, seed 0 failed"
    assert said[0].startswith("[1/5] good, seed 0")
    assert "left" in said[-1]
    assert (tmp_path / "good.log").read_text().startswith("$ calm --version\ncalm_jax ")

    said.clear()
    before = (tmp_path / "good" / DONE).stat().st_mtime_ns
    assert list(run(jobs, say=said.append)) == list(wrong)
    assert said[0] == "2 of 5 jobs are done already"
    assert (tmp_path / "good" / DONE).stat().st_mtime_ns == before


def test_a_job_of_other_commands_is_not_done(tmp_path):
    run([job(tmp_path, "one")], say=lambda line: None)
    assert is_done(job(tmp_path, "one"))
    assert not is_done(job(tmp_path, "one", "--help"))
    assert not is_done(dataclasses.replace(job(tmp_path, "one"), config="{}"))
    assert json.loads((tmp_path / "one" / DONE).read_text())["seconds"] > 0


def test_a_job_whose_scores_are_gone_or_of_another_call_is_not_done(tmp_path):
    one = job(tmp_path, "one")
    one.results.mkdir(parents=True)
    summary = one.results / "summary.json"
    summary.write_text('{"_run": {"step": 100, "date": "today"}, "task": {}}')
    run([one], say=lambda line: None)
    assert is_done(one)
    summary.write_text('{"_run": {"step": 50, "date": "today"}, "task": {}}')
    assert not is_done(one)
    summary.unlink()
    assert not is_done(one)


_WAITING = """
import sys, pathlib
sys.path[:0] = {paths!r}
from etils import epath
from calm_jax import errors
from calm_jax.experiment import arms, running
place = epath.Path({folder!r}) / "slow"
job = arms.Job(arms.Arm("slow"), 0, place, (), {command!r}, ())
later = arms.Job(arms.Arm("later"), 0, place.with_name("later"), (), ("--version",), ())
try:
    running.run([job, later])
except errors.Preempted as error:
    sys.exit(error.status)
"""


def waiting(folder, command, said):
    """The process of an experiment, once its first job has said something."""
    code = _WAITING.format(paths=sys.path, folder=str(folder), command=command)
    process = subprocess.Popen([sys.executable, "-c", code], env=environment(), text=True)
    log, deadline = folder / "slow.log", time.monotonic() + 120
    while not (log.exists() and said in log.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    return process


def test_a_signal_reaches_the_running_job_and_ends_the_experiment(tmp_path):
    import tiny_models

    import calm_jax
    from calm_jax.data.vocabulary import ByteVocabulary

    vocabulary = ByteVocabulary()
    model = tmp_path / "frozen"
    calm_jax.save_frozen(
        tiny_models.decoder(vocab_size=vocabulary.size), model, vocabulary=vocabulary
    )
    # A server runs until it is told to stop, and then ends well.
    process = waiting(tmp_path, ("serve", f"--workdir={model}", "--port=0"), "serving")
    log = tmp_path / "slow.log"
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == os.EX_TEMPFAIL
    assert "stopping" in log.read_text()
    assert not (tmp_path / "later.log").exists()
    assert not (tmp_path / "slow" / DONE).exists()


_TRAINING = """
import json, pathlib
from calm_jax.models import DecoderConfig
from calm_jax.training.configuration import decoder_run

def get_config():
    data = pathlib.Path({data!r})
    data.write_text(json.dumps({{"inputs": "a", "targets": "b"}}) + "\\n")
    sizes = dict(embed_dim=16, num_layers=1, num_heads=2, head_dim=4, mlp_dim=32)
    config = decoder_run(DecoderConfig.palm(vocab_size=264, **sizes))
    config.data.train = config.data.validation = ({{"jsonl": str(data)}},)
    config.data.update(length=16, cache_dir={cache!r})
    config.vocabulary, config.cache_compiled = "bytes", {cache!r}
    config.train.update(num_steps=10**6, batch_size=8, log_every=1, tensorboard=False)
    return config
"""


def test_a_training_that_is_told_to_stop_by_its_own_and_by_the_experiment_saves(tmp_path):
    """What a batch system does: it signals every process, and the experiment hands its own on."""
    config, place = tmp_path / "config.py", tmp_path / "slow"
    config.write_text(_TRAINING.format(data=str(tmp_path / "a.jsonl"), cache=str(tmp_path / "c")))
    command = ("train", f"--config={config}", f"--workdir={place}")
    process = waiting(tmp_path, command, "step 1/")
    (child,) = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGTERM)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == os.EX_TEMPFAIL
    log = (tmp_path / "slow.log").read_text()
    assert "stopped after step" in log and "which is saved" in log
    assert any(path.name.isdigit() for path in (place / "checkpoints").iterdir())
