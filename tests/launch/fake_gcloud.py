"""`gcloud` of a cloud that is a JSON file: slices come and go, and trainings on them.

The file is named by $FAKE_CLOUD. Its "events" happen one after the other, each before the state is
asked for: "preempt", "none", or a status that the training ends with. Whatever real slices would
refuse ends with status 1: a second slice of the name, files for a slice that is gone, a training
that was not installed.
"""

import json
import os
import pathlib
import shutil
import sys

path = pathlib.Path(os.environ["FAKE_CLOUD"])
cloud = json.loads(path.read_text())
arguments = sys.argv[1:]
group, verb = arguments[2:4]
queued = group == "queued-resources"
there = "ACTIVE" if cloud["queued"] else "READY"


def refuse(message: str):
    path.write_text(json.dumps(cloud))
    sys.exit(f"ERROR: (gcloud.compute.tpus.{group}.{verb}) {message}")


def reachable():
    if cloud["state"] != there:
        refuse(f"{cloud['state']}: the node is not there")


command = next((x.removeprefix("--command=") for x in arguments if x.startswith("--command=")), "")
name = next((word for word in ("install", "start", "status") if f"worker.sh {word}" in command), "")
cloud["calls"].append(name or verb)
if verb == "describe":
    event = cloud["events"].pop(0) if cloud["events"] else "none"
    if event == "preempt":
        cloud |= {"state": "SUSPENDED" if queued else "PREEMPTED"}
    elif event == "unreachable":
        refuse("UNAVAILABLE: the service is currently unavailable")
    elif event != "none":
        cloud["training"] = f"exit {event}"
    if cloud["state"] == "ABSENT":
        refuse("NOT_FOUND: Resource was not found")
    print(cloud["state"])
    if cloud["state"] == "WAITING_FOR_RESOURCES":
        cloud["state"] = there
elif verb == "create":
    if cloud["state"] != "ABSENT":
        refuse("ALREADY_EXISTS")
    cloud |= {"installed": False, "training": "none"}
    cloud["state"] = "WAITING_FOR_RESOURCES" if queued else there
elif verb == "delete":
    if cloud["state"] == "ABSENT":
        refuse("NOT_FOUND")
    cloud["state"] = "ABSENT"
elif verb == "scp":
    reachable()
    shutil.copy(arguments[4], path.parent / "copied.tar.gz")
elif name == "install":
    reachable()
    cloud["installed"] = True
elif name == "start":
    reachable()
    if not cloud["installed"] or cloud["training"] == "running":
        refuse("no installation, or a training already")
    cloud["training"] = "running"
elif name == "status":
    reachable()
    print(*[cloud["training"]] * 4, sep="\n")
path.write_text(json.dumps(cloud))
