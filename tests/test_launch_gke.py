"""The JobSet of launch/gke_jobset.sh: against the API's own schema, and against what XPK makes."""

import math

import jsonschema
import pytest
import yaml
from golden_files import FOLDER
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
from launch_fakes import Fakes

from qwen_jax import distributed

OPTIONS = ["--name=run", "--image=img", "--claim=shared", "--topology=2x2x2", "--slices=2"]


@pytest.fixture
def manifest(tmp_path):
    """(options) -> the JobSet that a dry run prints."""
    fakes = Fakes(tmp_path)

    def manifest(*options: str) -> dict:
        command = [*OPTIONS, *options, "--dry-run", "--", "--config=configs/7b.py"]
        code, out, err = fakes.finish("gke_jobset.sh", *command)
        assert code == 0, err
        return yaml.safe_load(out.partition("\n")[2].rpartition("YAML\n")[0])

    return manifest


@pytest.fixture(scope="module")
def strict():
    """A validator of the published API models of JobSet that allows no unknown field."""

    def close(node):
        if isinstance(node, list):
            return [close(item) for item in node]
        if not isinstance(node, dict):
            return node
        if str(node.get("title")).endswith(("ResourceQuantity", "IntOrString")):
            return {"type": ["string", "number"]}
        if "anyOf" in node:  # an optional field: the type or null
            (kind,) = [choice for choice in node["anyOf"] if choice != {"type": "null"}]
            return close(kind)
        node = {key: close(value) for key, value in node.items()}
        return node | ({"additionalProperties": False} if "properties" in node else {})

    schema = close(JobsetV1alpha2JobSet.model_json_schema(by_alias=True))
    return jsonschema.Draft202012Validator(schema)


def mistakes(strict, jobset: dict) -> list[str]:
    return [error.message for error in strict.iter_errors(jobset)]


def job_of(jobset: dict) -> dict:
    (replicated,) = jobset["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def pod_of(jobset: dict) -> dict:
    return job_of(jobset)["template"]["spec"]


def test_the_manifest_fits_the_schema(manifest, strict):
    assert mistakes(strict, manifest()) == []


@pytest.mark.parametrize(
    "part, right, wrong",
    [
        (lambda jobset: jobset, "metadata", "metdata"),
        (lambda jobset: jobset["spec"], "replicatedJobs", "replicatedJob"),
        (lambda jobset: jobset["spec"]["failurePolicy"], "maxRestarts", "maxRestart"),
        (job_of, "parallelism", "paralellism"),
        (job_of, "backoffLimit", "backofLimit"),
        (lambda jobset: job_of(jobset)["podFailurePolicy"]["rules"][0], "onExitCodes", "exitCodes"),
        (pod_of, "nodeSelector", "nodeSelectors"),
        (lambda jobset: pod_of(jobset)["containers"][0], "volumeMounts", "volumeMount"),
    ],
)
def test_a_misspelt_field_is_caught(manifest, strict, part, right, wrong):
    jobset = manifest()
    fields = part(jobset)
    fields[wrong] = fields.pop(right)
    assert any(f"'{wrong}' was unexpected" in mistake for mistake in mistakes(strict, jobset))


def test_a_wrong_type_is_caught(manifest, strict):
    assert mistakes(strict, manifest("--slices=two")) == ["'two' is not of type 'integer'"]


def what_matters(jobset: dict) -> dict:
    """What decides where the pods run, how many there are, and when they start again."""
    spec, job, pod = jobset["spec"], job_of(jobset), pod_of(jobset)
    (container,), (rule,) = pod["containers"], job["podFailurePolicy"]["rules"]
    labels, annotations = jobset["metadata"]["labels"], jobset["metadata"]["annotations"]
    topology = "alpha.jobset.sigs.k8s.io/exclusive-topology"
    return {
        "queue": labels["kueue.x-k8s.io/queue-name"],
        "exclusive topology": annotations[topology],
        "failure policy": spec["failurePolicy"],
        "slices": spec["replicatedJobs"][0]["replicas"],
        "job": {name: job[name] for name in ("parallelism", "completions", "backoffLimit")},
        "on exit code": {k: v for k, v in rule.items() if k != "onPodConditions"},
        "pod": {
            name: pod[name]
            for name in ("restartPolicy", "hostNetwork", "dnsPolicy", "nodeSelector")
        },
        "chips per pod": container["resources"]["limits"]["google.com/tpu"],
        "tolerates": [toleration["key"] for toleration in pod["tolerations"]],
        "memory for /dev/shm": [
            volume["emptyDir"]["medium"] for volume in pod["volumes"] if "emptyDir" in volume
        ],
    }


def test_the_same_as_xpk_where_it_matters(manifest):
    ours = what_matters(manifest("--max-restarts=3"))
    theirs = yaml.safe_load((FOLDER / "xpk_jobset.yaml").read_text())
    codes, allowed = (side["on exit code"]["onExitCodes"] for side in (ours, theirs))
    assert ours["failure policy"]["rules"][0].pop("name")  # XPK leaves it to the server
    # We restart for fewer codes, and name our container ourselves.
    assert distributed.EXIT_RESTART in codes["values"]
    assert set(codes["values"]) < set(allowed["values"])
    assert not {1, 2} & set(codes["values"])
    allowed |= {"values": codes["values"], "containerName": "train"}
    # The node pool may be of spot machines.
    theirs["tolerates"].append("cloud.google.com/gke-spot")
    assert ours == theirs


@pytest.mark.parametrize(
    "options, hosts",
    [(["--topology=4x4x4"], 16), (["--topology=4x8"], 8), (["--chips-per-host=8"], 1)],
)
def test_hosts_of_a_slice(manifest, options, hosts):
    jobset = manifest(*options)
    job, container = job_of(jobset), pod_of(jobset)["containers"][0]
    assert job["parallelism"] == job["completions"] == hosts
    chips = container["resources"]["limits"]["google.com/tpu"]
    sides = pod_of(jobset)["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert chips * hosts == math.prod(map(int, sides))
