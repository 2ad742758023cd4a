"""The JobSet of a training: against the schema of its API, and against what restarts need."""

import json
import pathlib

import hypothesis
import hypothesis.strategies as st
import jsonschema
import pytest
import shell_scripts
import yaml

SCHEMA = json.loads((pathlib.Path(__file__).parent / "jobset_schema.json").read_text())
IMAGE = "us-docker.pkg.dev/mine/images/calm_jax"
TRAIN = ("--", "--config=configs/own_models.py", "--workdir=gs://bucket/run")
FLAGS = ("--name=pair", f"--image={IMAGE}")


def manifest(*arguments: str, train: tuple[str, ...] = TRAIN) -> dict:
    lines = shell_scripts.lines("gke.sh", "render", *FLAGS, *arguments, *train)
    return yaml.safe_load("\n".join(lines))


def parts(jobset: dict) -> tuple[dict, dict, dict, dict]:
    """The replicated job, its job, pod and container."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    return replicated, job, pod, container


@pytest.mark.parametrize(
    ("topology", "accelerator", "shape", "slices", "workers", "chips"),
    [
        ("v5e:1x1", "tpu-v5-lite-podslice", "1x1", 1, 1, 1),
        ("v5e:2x2", "tpu-v5-lite-podslice", "2x2", 1, 1, 4),
        ("v5e:16x16", "tpu-v5-lite-podslice", "16x16", 1, 64, 4),
        ("v5p:2x4x4", "tpu-v5p-slice", "2x4x4", 1, 8, 4),
        ("v6e:4x8*3", "tpu-v6e-slice", "4x8", 3, 8, 4),
    ],
)
def test_slices_become_jobs_of_one_pod_a_host(topology, accelerator, shape, slices, workers, chips):
    jobset = manifest(f"--topology={topology}")
    jsonschema.validate(jobset, SCHEMA)
    replicated, job, pod, container = parts(jobset)
    assert replicated["replicas"] == slices
    assert (job["parallelism"], job["completions"]) == (workers, workers)
    assert job["completionMode"] == "Indexed"  # an index is a worker's number in its slice
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
    }
    assert container["resources"] == {"limits": {"google.com/tpu": chips}}
    assert container["image"] == IMAGE
    assert container["args"] == ["train", *TRAIN[1:]]


def test_workers_find_each_other_and_own_their_slice():
    jobset = manifest("--topology=v5e:4x8*2")
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }


def test_spot_and_service_account_are_chosen():
    pod = parts(manifest("--topology=v5e:4x8", "--spot", "--service-account=writer"))[2]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["serviceAccountName"] == "writer"


def outcome(jobset: dict, *, exit_code: int | None = None, disrupted: bool = False) -> str:
    """What the controllers do when a pod ends: as the APIs' reference says, in their order."""
    _, job, pod, container = parts(jobset)
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
    assert job["backoffLimit"] == 0
    reason = "BackoffLimitExceeded"
    for rule in job["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes")
        if codes:
            assert codes["operator"] == "In" and codes["containerName"] == container["name"]
            matches = exit_code in codes["values"]
        else:
            (condition,) = rule["onPodConditions"]
            assert condition == {"type": "DisruptionTarget", "status": "True"}
            matches = disrupted
        if matches:
            assert rule["action"] == "FailJob"
            reason = "PodFailurePolicy"
            break
    for rule in jobset["spec"]["failurePolicy"]["rules"]:
        if reason in rule["onJobFailureReasons"]:
            return rule["action"]
    return "RestartJobSet"


def test_preemption_starts_again_without_limit_and_faults_a_few_times():
    jobset = manifest("--topology=v5e:4x8", "--retries=5")
    assert outcome(jobset, exit_code=75) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(jobset, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
    assert outcome(jobset, exit_code=134) == "RestartJobSet"
    assert outcome(jobset, exit_code=2) == "RestartJobSet"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 5


WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")))


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.lists(WORDS, max_size=3))
def test_any_flag_of_the_training_arrives_as_it_is(words):
    flags = [f"--config.key={word}" for word in words]
    container = parts(manifest("--topology=v5e:4x8", train=(*TRAIN, *flags)))[3]
    assert container["args"] == ["train", *TRAIN[1:], *flags]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "failurePolicy", "maxRestart"), 1),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
        (("spec", "replicatedJobs", 0, "template", "spec", "completionMode"), "indexed"),
        (("spec", "replicatedJobs", 0, "replicas"), "2"),
        (("metadata", "name"), "Upper"),
    ],
)
def test_the_schema_refuses_mistakes(path, value):
    jobset = manifest("--topology=v5e:4x8")
    inner = jobset
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(jobset, SCHEMA)


def test_commands():
    dry = ("--dry-run",)
    assert shell_scripts.lines("gke.sh", "image", f"--image={IMAGE}", *dry) == [
        f"docker build --file=launch/Dockerfile --build-arg=EXTRA=tpu --tag={IMAGE} .",
        f"docker push {IMAGE}",
    ]
    pools = shell_scripts.lines(
        "gke.sh", "pools", "--name=pair", "--cluster=tpus", "--location=us-west4",
        "--topology=v5p:2x4x4*2", "--spot", *dry,
    )  # fmt: skip
    assert pools == [
        f"gcloud container node-pools create pair-{number} --cluster=tpus --location=us-west4 "
        "--machine-type=ct5p-hightpu-4t --tpu-topology=2x4x4 --num-nodes=8 --scopes=cloud-platform "
        "--spot"
        for number in (0, 1)
    ]
    first, *rest = shell_scripts.lines(
        "gke.sh", "train", *FLAGS, "--topology=v5e:4x8", *dry, *TRAIN
    )
    assert first == "kubectl apply --filename=-"
    assert yaml.safe_load("\n".join(rest)) == manifest("--topology=v5e:4x8")
    assert shell_scripts.lines("gke.sh", "logs", "--name=pair", *dry) == [
        "kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=pair,"
        "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"
    ]
    assert shell_scripts.lines("gke.sh", "delete", "--name=pair", *dry) == [
        "kubectl delete jobset pair"
    ]


def test_train_applies_the_manifest(tmp_path):
    shell_scripts.write_program(
        tmp_path, "kubectl", f'#!/bin/sh\necho "$*" >{tmp_path}/called\ncat >{tmp_path}/applied\n'
    )
    result = shell_scripts.run(
        "gke.sh", "train", *FLAGS, "--topology=v5e:4x8", *TRAIN, programs=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "called").read_text() == "apply --filename=-\n"
    applied = yaml.safe_load((tmp_path / "applied").read_text())
    assert applied == manifest("--topology=v5e:4x8")


def test_an_experiment_is_a_jobset_a_command_and_waits_for_each_group(tmp_path):
    file = shell_scripts.write_commands(tmp_path / "commands.txt", "gs://bucket/runs")
    said = shell_scripts.lines(
        "gke.sh", "experiment", *FLAGS, "--topology=v5e:2x2", "--dry-run", "--", str(file)
    )
    calls = [line for line in said if line.startswith("kubectl")]
    wait = "kubectl wait --for='jsonpath={.status.terminalState}' --timeout=-1s jobset/pair"
    assert calls == [
        "kubectl apply --filename=-",
        f"{wait}-1-1",
        *["kubectl apply --filename=-"] * 2,
        f"{wait}-2-1 jobset/pair-2-2",
        "kubectl apply --filename=-",
        f"{wait}-3-1",
    ]
    manifests = "\n".join("---" if line in calls else line for line in said)
    jobsets = [found for found in yaml.safe_load_all(manifests) if found]
    for jobset in jobsets:
        jsonschema.validate(jobset, SCHEMA)
    assert [jobset["metadata"]["name"] for jobset in jobsets] == [
        "pair-1-1", "pair-2-1", "pair-2-2", "pair-3-1",
    ]  # fmt: skip
    arguments = [parts(jobset)[3]["args"] for jobset in jobsets]
    assert [words[0] for words in arguments] == ["train", "evaluate", "train", "evaluate"]
    assert "--config.augments=('gs://bucket/runs/seed_0/anchor/frozen',)" in arguments[2]


def test_an_experiment_needs_a_bucket_and_one_host(tmp_path):
    file = shell_scripts.write_commands(tmp_path / "commands.txt", "/disk/runs")
    for topology, message in (("v5e:2x2", "pods share no disk"), ("v5e:4x8", "on one host")):
        flags = (*FLAGS, f"--topology={topology}", "--dry-run", "--", str(file))
        result = shell_scripts.run("gke.sh", "experiment", *flags)
        assert result.returncode == 2 and message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fly",), "unknown command fly"),
        (("render", "--name=pair"), "--image is missing"),
        (("render", *FLAGS, "--topology=v5e", *TRAIN), "--topology=v5e is not of the form"),
        (("render", "--name=My_pair", *FLAGS[1:], "--topology=v5e:4x8"), "--name=My_pair: Kub"),
        (("render", *FLAGS, "--topology=v5e:4x8", "--retries=x"), "--retries=x is not a number"),
        (
            ("render", *FLAGS, "--topology=v5e:4x8", "--", "--config=c", "--workdir=runs/x"),
            "--workdir=runs/x: pods share no disk",
        ),
        (
            ("render", *FLAGS, "--topology=v5e:4x8", *TRAIN, "--overwrite=true"),
            "--overwrite=true: a training that is started again",
        ),
        (("pools", "--name=pair", "--topology=v5e:4x8"), "--cluster is missing"),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    result = shell_scripts.run("gke.sh", *arguments)
    assert result.returncode == 2
    assert not result.stdout
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"error: {message}")
