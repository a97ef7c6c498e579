"""The Helm chart and the base of kustomize: what Kubernetes takes, what fits together, flags that Baton has."""

import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from baton import config
from baton.config import parse_kubernetes
from baton.discovery.kubernetes import PORT_NAME
from baton.metric_names import METRICS
from cli import main, worker
from kvtransfer.lanes.registry import parse_lanes
from tests.deploy.crd_schemas import SCHEMAS
from tests.deploy.manifests import (
    BASE,
    CHART,
    EXAMPLES,
    MISSING,
    NAMESPACE,
    ROOT,
    Object,
    Pod,
    objects,
    of_kind,
    pods,
    render,
    selects,
)  # fmt: skip

KUBERNETES = ("1.27", "1.33", "1.37")
WORKER = (
    config.WorkerOptions, config.DiscoveryOptions, config.ModelOptions, config.EngineOptions, config.HandoverOptions,
    config.TierOptions, config.TlsOptions,
)  # fmt: skip
COORDINATOR = (
    config.CoordinatorOptions, config.DiscoveryOptions, config.ModelOptions, config.TlsOptions, config.PublicTlsOptions,
)  # fmt: skip
CASES = {"base": BASE, "defaults": None, **{path.stem: path for path in EXAMPLES}}


@cache
def written(case: str) -> list[Object]:
    """Of the base without helm, of everything else as it renders values."""
    if case == "base":
        return [each for each in yaml.safe_load_all(BASE.read_text()) if each]
    path = CASES[case]
    return objects(render(yaml.safe_load(path.read_text()) if path else {}))


@pytest.fixture(params=CASES)
def whole(request: pytest.FixtureRequest) -> list[Object]:
    return written(request.param)


def one(of: list[Object], kind: str, name: str = "") -> Object:
    (found,) = (each for each in of_kind(of, kind) if name in each["metadata"]["name"])
    return found


def options_of(pod: Pod) -> dict[type, Any]:
    """As the process in the pod would have them. Raises what it would, or ends the test as it would end."""
    words = pod.words()
    arguments = main.parse(words)
    classes = COORDINATOR if words[0] == "coordinator" else WORKER
    return {each: config.from_arguments(each, arguments) for each in classes}


# Kubernetes takes it


@pytest.mark.parametrize("version", KUBERNETES)
def test_every_object_is_what_kubernetes_knows_and_nothing_else(whole: list[Object], version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason=MISSING)
    jsonschema = pytest.importorskip("jsonschema", reason=MISSING)
    for each in whole:
        own = SCHEMAS.get((each["apiVersion"], each["kind"]))
        if own is None:
            validate.validate(each, version, strict=True)
        else:
            jsonschema.Draft202012Validator(own).validate(each)
    for pod in pods(whole):  # also those inside of objects that it does not know
        template = {"selector": {"matchLabels": pod.labels}, "template": pod.template}
        deployment = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": template}
        validate.validate(deployment, version, strict=True)
    for scaled in of_kind(whole, "ScaledObject"):
        behavior = scaled["spec"]["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        target = scaled["spec"]["scaleTargetRef"]
        hpa = {"scaleTargetRef": target, "maxReplicas": 1, "behavior": behavior}
        kind = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler"}
        validate.validate({**kind, "metadata": {"name": "x"}, "spec": hpa}, version, strict=True)


@pytest.mark.parametrize("mistake", ["replica", "probe"])
def test_a_field_that_does_not_exist_would_be_found(mistake: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason=MISSING)
    deployment = json.loads(json.dumps(one(written("base"), "Deployment", "decode")))
    if mistake == "replica":
        deployment["spec"]["replica"] = 1
    else:
        deployment["spec"]["template"]["spec"]["containers"][0]["livenessProbe"]["httpget"] = {}
    with pytest.raises(validate.ValidationError):
        validate.validate(deployment, KUBERNETES[0], strict=True)


def test_helm_finds_nothing_to_say_about_it() -> None:
    helm = pytest.importorskip("helm_python", reason=MISSING)
    for path in (None, *EXAMPLES):
        values = yaml.safe_load(path.read_text()) if path else {}
        found = helm.lint(CHART, values, strict=True)
        assert not found["errors"]
        assert {message["error"] for message in found["messages"]} <= {"icon is recommended"}, path


def test_names_are_unique_and_short_enough_for_what_is_made_of_them(whole: list[Object]) -> None:
    names = [(each["kind"], each["metadata"]["name"]) for each in whole]
    assert len(names) == len(set(names))
    assert all(len(name) <= 47 for _, name in names), "a pod's name has 16 more, and is a label of LeaderWorkerSets"


# Baton takes it


def test_every_flag_is_one_that_baton_has_with_a_value_that_it_takes(whole: list[Object]) -> None:
    for pod in pods(whole):
        options = options_of(pod)
        known = {config.flag(field.name) for each in options for field in dataclasses.fields(each)}
        flags = [word.partition("=")[0] for word in pod.words()[1:]]
        assert set(flags) <= known, "argparse would take the beginning of a flag for all of it"
        assert not [word for word in pod.words() if "$(" in word or "None" in word]
        if config.HandoverOptions in options:
            tls = options[config.TlsOptions].tls_cert
            parse_lanes(options[config.HandoverOptions].lanes, cast(Any, SimpleNamespace()) if tls else None)


def test_numbers_of_flags_are_written_as_they_were_meant() -> None:
    options = {}
    for pod in pods(written("secure")):
        options[pod.name] = options_of(pod)
    front = options["chat-baton-coordinator"][config.CoordinatorOptions]
    assert (front.max_requests, front.request_timeout_s) == (4096, 900.5)
    mixed = options["chat-baton-both"][config.EngineOptions]
    assert (mixed.deterministic, mixed.kv_memory, mixed.threads) == (True, "1GiB", 1)


def test_threads_are_as_many_as_a_pod_asked_for_and_a_gpu_is_its_own() -> None:
    for pod in pods(written("autoscale-from-zero")):
        if pod.words()[0] != "coordinator":
            assert options_of(pod)[config.EngineOptions].threads == 8
    gpus = [pod for pod in pods(written("gpu")) if pod.words()[0] != "coordinator"]
    for pod in gpus:
        engine = options_of(pod)[config.EngineOptions]
        assert (engine.device, engine.gpu_share, engine.threads) == ("cuda", 0.9, 0)
        assert pod.main["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert "cuda" in pod.main["image"]
    (front,) = (pod for pod in pods(written("gpu")) if pod not in gpus)
    assert "nvidia.com/gpu" not in json.dumps(front.main["resources"])
    assert "cpu" in front.main["image"]


# It fits together


def test_whatever_a_pod_refers_to_is_there(whole: list[Object]) -> None:
    for pod in pods(whole):
        volumes = {each["name"]: each for each in pod.spec["volumes"]}
        used = set()
        for container in pod.containers:
            mounts = container["volumeMounts"]
            used |= {each["name"] for each in mounts}
            assert len({each["mountPath"] for each in mounts}) == len(mounts)
        assert used == set(volumes), pod.name
        mounts = {each["mountPath"]: volumes[each["name"]] for each in pod.main["volumeMounts"]}
        for word in pod.words():
            _, _, value = word.partition("=")
            if value.startswith("/"):
                assert any(value == mount or value.startswith(mount + "/") for mount in mounts), f"{word}: no such file"
        for volume in volumes.values():
            if "secret" in volume:
                assert volume["secret"]["defaultMode"] == 0o440, "the rest of the machine may not read it"
            if "configMap" in volume:
                assert one(whole, "ConfigMap", volume["configMap"]["name"])
        ports = {each["name"]: each["containerPort"] for each in pod.main["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            assert pod.main[probe]["httpGet"]["port"] in ports
        options = options_of(pod)
        chosen = options.get(config.CoordinatorOptions) or options[config.WorkerOptions]
        assert ports["monitor"] == chosen.monitor_port
        if isinstance(chosen, config.CoordinatorOptions):
            listens = (chosen.port, chosen.grpc_port, chosen.link_port)
            assert (ports["http"], ports["grpc"], ports["link"]) == listens


def test_claims_are_made_or_named_by_who_installs_it() -> None:
    made = one(written("gpu"), "PersistentVolumeClaim")
    assert made["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    for pod in pods(written("gpu")):
        (volume,) = (each for each in pod.spec["volumes"] if each["name"] == "models")
        assert volume["persistentVolumeClaim"]["claimName"] == made["metadata"]["name"]
    assert not of_kind(written("rdma-groups"), "PersistentVolumeClaim")


def selectors(of: list[Object]) -> Iterator[tuple[Object, dict[str, str], str]]:
    """(object, labels, component of the pods that it is for)."""
    for each in of:
        spec, name = each.get("spec", {}), each["metadata"]["name"]
        part = "coordinator" if each["metadata"]["labels"]["app.kubernetes.io/component"] == "coordinator" else name
        match each["kind"]:
            case "Service":
                yield each, spec["selector"], part
            case "Deployment" | "PodDisruptionBudget" | "InferencePool":
                yield each, spec["selector"]["matchLabels"], part


def test_everything_selects_the_pods_it_is_for_and_no_others(whole: list[Object]) -> None:
    for each, labels, part in selectors(whole):
        found = [pod for pod in pods(whole) if selects(labels, pod)]
        owners = {pod.owner["metadata"]["labels"]["app.kubernetes.io/component"] for pod in found}
        if part == "coordinator":
            assert owners == {"coordinator"}, each["metadata"]["name"]
        else:
            assert [pod.name for pod in found] == [part], each["metadata"]["name"]
    budgets = of_kind(whole, "PodDisruptionBudget")
    assert {each["metadata"]["name"] for each in budgets} == {pod.name for pod in pods(whole)}


def test_a_release_leaves_the_pods_of_another_alone() -> None:
    other = list(pods(objects(render({}, "other"))))
    for _, labels, _ in selectors(written("defaults")):
        assert not [pod for pod in other if selects(labels, pod)]


def test_a_new_chart_with_the_same_values_restarts_no_worker(tmp_path: Path) -> None:
    """What says the chart's version is on objects, not on pods: a worker has a model to load."""
    for pod in pods(written("defaults")):
        assert not [name for name in pod.labels if "chart" in name or "version" in name]


def test_workers_find_the_service_of_the_coordinators_and_may_look(whole: list[Object]) -> None:
    for pod in pods(whole):
        options = options_of(pod)
        front = options.get(config.CoordinatorOptions)
        discovery = options[config.DiscoveryOptions].discovery
        account = pod.spec.get("serviceAccountName")
        if front is not None:
            assert pod.spec["automountServiceAccountToken"] is False
            assert bool(discovery) == discovery.startswith("etcd://") == bool(front.advertise_host)
            continue
        if discovery.startswith("etcd://"):
            assert pod.spec["automountServiceAccountToken"] is False
            assert not of_kind(whole, "Role", "RoleBinding", "ServiceAccount")
            continue
        where = parse_kubernetes(discovery)
        assert where.namespace == "", "its own"
        (service,) = (each for each in of_kind(whole, "Service") if each["metadata"]["name"] == where.name)
        assert service["spec"]["clusterIP"] == "None"
        assert PORT_NAME in {each["name"] for each in service["spec"]["ports"]}
        assert pod.spec["automountServiceAccountToken"] is True
        assert one(whole, "ServiceAccount")["metadata"]["name"] == account
        binding, role = one(whole, "RoleBinding"), one(whole, "Role")
        assert binding["roleRef"]["name"] == role["metadata"]["name"]
        assert [each["name"] for each in binding["subjects"]] == [account]
        assert role["rules"] == [
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]}
        ]


def test_operators_in_a_pod_are_answered_though_clients_need_tls(whole: list[Object]) -> None:
    for pod in pods(whole):
        options = options_of(pod)
        if config.CoordinatorOptions in options:
            env = {each["name"]: each.get("value") for each in pod.main["env"]}
            has_tls = bool(options[config.PublicTlsOptions].public_tls_cert)
            port = options[config.CoordinatorOptions].operator_port
            assert env.get("BATON_URL") == (f"http://127.0.0.1:{port}" if has_tls else None)
            assert (port > 0) is has_tls


# Pods go and come


def test_who_is_told_to_go_has_the_time_to_drain(whole: list[Object]) -> None:
    front_s = 0.0
    for pod in sorted(pods(whole), key=lambda pod: pod.words()[0] != "coordinator"):
        options = options_of(pod)
        grace_s = pod.spec["terminationGracePeriodSeconds"]
        if front := options.get(config.CoordinatorOptions):
            front_s = front.drain_timeout_s
            assert front.drain_notice_s >= 5, "a Service goes on sending requests for a while"
            assert grace_s >= front.drain_notice_s + front_s + 10
        else:
            drain_s = options[config.WorkerOptions].drain_timeout_s
            assert drain_s > front_s, "coordinators move its streams before it would cut them off"
            # tiers, last words to coordinators: cli.assembly.CLOSE_TIMEOUT_S, twice UNLINK_TIMEOUT_S
            assert grace_s >= drain_s + 10 + 2 * worker.UNLINK_TIMEOUT_S


def test_probes_ask_what_is_answered(whole: list[Object]) -> None:
    for pod in pods(whole):
        assert pod.main["livenessProbe"]["httpGet"]["path"] == "/health"
        assert pod.main["startupProbe"]["httpGet"]["path"] == "/health"
        zero = [
            each["spec"]["scaleTargetRef"]["name"]
            for each in of_kind(whole, "ScaledObject")
            if each["spec"]["minReplicaCount"] == 0 and not each["metadata"]["name"].endswith("prefill")
        ]
        path = "/health" if zero and pod.words()[0] == "coordinator" else "/ready"
        assert pod.main["readinessProbe"]["httpGet"]["path"] == path, "from zero, requests must reach a coordinator"


def test_a_worker_may_take_long_to_load_and_not_for_ever() -> None:
    (decode,) = (pod for pod in pods(written("defaults")) if pod.name.endswith("decode"))
    probe = decode.main["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 1800
    assert decode.owner["spec"]["progressDeadlineSeconds"] > 1800


# Nobody has more than is needed


def test_nobody_is_root_and_nothing_is_written_but_what_is_meant_for_it(whole: list[Object]) -> None:
    for pod in pods(whole):
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["runAsGroup"] == security["fsGroup"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for name in ("hostNetwork", "hostPID", "hostIPC"):
            assert name not in pod.spec
        for container in pod.containers:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert {"memory"} <= set(container["resources"]["limits"])
            assert {"memory", "cpu"} <= set(container["resources"]["requests"])
            assert {"name": "HOME", "value": "/tmp"} in container["env"]
            assert "/tmp" in {each["mountPath"] for each in container["volumeMounts"]}
        writable = {each["mountPath"] for each in pod.main["volumeMounts"] if not each.get("readOnly")}
        assert writable <= {"/tmp", "/dev/shm", "/kv"}


def test_the_link_is_for_workers_and_hand_over_for_workers_among_themselves(whole: list[Object]) -> None:
    found = list(pods(whole))
    for policy in of_kind(whole, "NetworkPolicy"):
        for_whom = [pod for pod in found if selects(policy["spec"]["podSelector"]["matchLabels"], pod)]
        fronts = {pod.words()[0] == "coordinator" for pod in for_whom}
        assert len(fronts) == 1
        for rule in policy["spec"]["ingress"]:
            ports = {each["port"] for each in rule.get("ports", [])}
            if ports >= {"http"}:
                assert fronts == {True}
                continue
            assert ports <= {"monitor", "link"}
            assert rule["from"], "an empty list is everybody"
            if ports != {"monitor"}:
                (peer,) = rule["from"]
                let_in = [pod for pod in found if selects(peer["podSelector"]["matchLabels"], pod)]
                assert let_in
                assert all(pod.words()[0] != "coordinator" for pod in let_in)
            assert bool(ports) is (fronts == {True})


def test_pods_reach_each_other_dns_and_what_was_named_where_egress_is_limited() -> None:
    coordinator_, worker_ = of_kind(written("secure"), "NetworkPolicy")
    for policy in (coordinator_, worker_):
        assert policy["spec"]["policyTypes"] == ["Ingress", "Egress"]
        ports = {each["port"] for rule in policy["spec"]["egress"] for each in rule.get("ports", [])}
        assert ports >= {53, 443, 6443, 2379}
    assert {"port": 50052} in [each for rule in worker_["spec"]["egress"] for each in rule.get("ports", [])]
    assert coordinator_["spec"]["ingress"][0]["from"] == [{"namespaceSelector": {"matchLabels": {"chat": "yes"}}}]


def test_a_model_is_fetched_by_who_starts_first_and_only_that_one_has_the_token() -> None:
    values = {"model": {"name": "org/model", "source": "hub", "revision": "abc", "tokenSecret": "hub"}}
    for pod in pods(objects(render(values))):
        (fetch,) = pod.spec["initContainers"]
        assert fetch["command"] == ["hf", "download", "--quiet"]
        assert fetch["args"][:2] == ["org/model", "--revision=abc"]
        weights = "--include=*.safetensors" in fetch["args"]
        assert weights is (pod.words()[0] != "coordinator"), "a coordinator needs no weights"
        assert [each for each in fetch["env"] if each["name"] == "HF_TOKEN"]
        names = {each["name"]: each.get("value") for each in pod.main["env"]}
        assert "HF_TOKEN" not in names
        assert names["HF_HUB_OFFLINE"] == "1"
        home = {each["name"]: each.get("value") for each in fetch["env"]}["HF_HOME"]
        assert home == names["HF_HOME"] == "/models"
        assert {"name": "models", "mountPath": "/models", "readOnly": True} in pod.main["volumeMounts"]


# It is measured and scaled


def exported() -> set[str]:
    """Names of everything at /metrics of a coordinator; of histograms without what stands behind."""
    return {metric.exported for metric in METRICS.values()}


def names_in(query: str) -> set[str]:
    return {word for word in query.replace("(", " ").replace("{", " ").split() if word.startswith(("baton_", "vllm:"))}


def test_pools_are_scaled_by_what_coordinators_tell() -> None:
    there = exported()
    assert "vllm:num_requests_waiting" in there
    scaled = of_kind(written("autoscale-from-zero"), "ScaledObject")
    assert len(scaled) == 2
    for each in scaled:
        for trigger in each["spec"]["triggers"]:
            query = trigger["metadata"]["query"]
            assert names_in(query)
            assert names_in(query) <= there, query
            service = one(written("autoscale-from-zero"), "Service", "coordinator")["metadata"]["name"]
            assert f'{{namespace="{NAMESPACE}",service="{service}"' in query
    hpas = [
        each for each in of_kind(written("secure"), "HorizontalPodAutoscaler") if "pods" in each["spec"]["metrics"][0]
    ]
    assert {each["spec"]["metrics"][0]["pods"]["metric"]["name"] for each in hpas} == {
        "baton_worker_waiting_prefill_tokens", "baton_worker_running_requests",
    } <= there  # fmt: skip


def test_loads_that_nobody_chose_follow_from_what_a_worker_does_by_itself() -> None:
    engine = config.EngineOptions()
    for each in of_kind(written("secure"), "HorizontalPodAutoscaler"):
        metric = each["spec"]["metrics"][0]
        if metric["type"] == "Pods":
            prefills = each["metadata"]["name"].endswith("prefill")
            load = 8 * engine.max_batch_tokens if prefills else engine.max_running * 3 // 4
            assert metric["pods"]["target"]["averageValue"] == str(load)


def test_what_is_scaled_exists_and_has_no_number_of_its_own(whole: list[Object]) -> None:
    scaled = of_kind(whole, "ScaledObject", "HorizontalPodAutoscaler")
    targets = {each["spec"]["scaleTargetRef"]["name"]: each["spec"]["scaleTargetRef"] for each in scaled}
    assert len(targets) == len(scaled)
    for pod in pods(whole):
        target = targets.pop(pod.name, None)
        assert ("replicas" in pod.owner["spec"]) is (target is None), "an upgrade would undo what the scaler chose"
        if target is not None:
            assert (target["apiVersion"], target["kind"]) == (pod.owner["apiVersion"], pod.owner["kind"])
    assert not targets


def test_from_zero_the_first_request_starts_one_worker_of_each_pool() -> None:
    for each in of_kind(written("autoscale-from-zero"), "ScaledObject"):
        assert each["spec"]["minReplicaCount"] == 0
        load, first = each["spec"]["triggers"]
        assert 'reason="unavailable"' in first["metadata"]["query"]
        assert first["metadata"]["query"].startswith("clamp_max("), "a storm of refusals is no reason for a hundred"
        assert load["metadata"]["activationThreshold"] == first["metadata"]["activationThreshold"] == "0"
        assert each["spec"]["fallback"]["replicas"] == 1


def test_groups_are_placed_together_and_their_workers_live_on_their_own() -> None:
    groups = of_kind(written("rdma-groups"), "LeaderWorkerSet")
    assert len(groups) == 2
    for each in groups:
        assert "annotations" not in each["metadata"], "prefill and decode may share a rack"
        assert each["spec"]["leaderWorkerTemplate"]["size"] == 4
        assert each["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "None"
    alone = objects(render({"poolDefaults": {"groupSize": 2, "groupTopologyKey": "example.com/rack"}}))
    for each in of_kind(alone, "LeaderWorkerSet"):
        place = {"leaderworkerset.sigs.k8s.io/exclusive-topology": "example.com/rack"}
        assert each["metadata"]["annotations"] == place
    (pod, *_) = (pod for pod in pods(written("rdma-groups")) if pod.words()[0] == "decode")
    (near,) = pod.spec["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert near["podAffinityTerm"]["topologyKey"] == "topology.example.com/rack"
    workers = [pod for pod in pods(written("rdma-groups")) if pod.words()[0] != "coordinator"]
    assert all(selects(near["podAffinityTerm"]["labelSelector"]["matchLabels"], pod) for pod in workers)
    assert pod.main["resources"]["limits"] == {
        "memory": "128Gi", "nvidia.com/gpu": "1", "rdma/hca_shared_devices_a": "1",
    }  # fmt: skip
    tiers = options_of(pod)[config.TierOptions]
    assert (tiers.disk_kv_folder, tiers.disk_kv_memory) == ("/kv/blocks", "500GiB")
    (kv,) = (each for each in pod.spec["volumes"] if each["name"] == "kv")
    assert kv["ephemeral"]["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"] == "551Gi", (
        "and its books"
    )


def test_one_scrape_reaches_every_coordinator_once() -> None:
    whole = written("gpu")
    monitor = one(whole, "ServiceMonitor")
    services = [
        each for each in of_kind(whole, "Service")
        if monitor["spec"]["selector"]["matchLabels"].items() <= each["metadata"]["labels"].items()
    ]  # fmt: skip
    (endpoint,) = monitor["spec"]["endpoints"]
    have = [each for each in services if endpoint["port"] in {port["name"] for port in each["spec"]["ports"]}]
    assert len(have) == 1
    job = have[0]["metadata"]["labels"][monitor["spec"]["jobLabel"]]
    assert f'up{{job="{job}"}}' in (ROOT / "deploy" / "observability" / "rules.yml").read_text()
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_a_picker_finds_coordinators_by_the_labels_and_metrics_that_it_looks_for() -> None:
    whole = written("gateway")
    pool, route = one(whole, "InferencePool"), one(whole, "HTTPRoute")
    (front,) = (pod for pod in pods(whole) if selects(pool["spec"]["selector"]["matchLabels"], pod))
    assert front.labels["llm-d.ai/engine-type"] == "vllm", "whose names of metrics are"
    assert front.labels["llm-d.ai/role"] == "prefill-decode", "no second pod is looked for"
    assert {"vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"} <= exported()
    assert pool["spec"]["targetPorts"] == [{"number": options_of(front)[config.CoordinatorOptions].port}]
    (rule,) = route["spec"]["rules"]
    (backend,) = rule["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", pool["metadata"]["name"])
    for pod in pods(whole):
        if pod.words()[0] != "coordinator":
            assert not [name for name in pod.labels if name.startswith("llm-d.ai/")]


# Mistakes in values are said


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"pools": {"decode": None}}, "nothing would answer"),
        ({"pools": {"decode": {"role": "decode", "replica": 2}}}, "replica"),
        ({"pools": {"decode": {"role": "decoder"}}}, "role"),
        ({"pools": {"decode": {"role": "decode", "gpus": 8}}}, "gpus"),
        ({"pools": {"decode": {"role": "decode", "autoscaling": {"min": 0}}}}, "only kind keda"),
        ({"pools": {"decode": {"role": "decode", "autoscaling": {"kind": "keda"}}}}, "autoscaling.prometheus"),
        ({"poolDefaults": {"drainTimeoutSeconds": 10}}, "more than coordinator.drainTimeoutSeconds"),
        ({"poolDefaults": {"maxUnavailable": 0}}, "no pod could be replaced"),
        ({"poolDefaults": {"autoscaling": {"min": 5}}}, "more than max"),
        ({"coordinator": {"clientCaSecret": "clients"}}, "needs coordinator.publicTlsSecret"),
        ({"gateway": {"enabled": True}}, "the Service of the picker"),
        ({"discovery": {"etcd": "http://etcd:2379"}}, "etcd"),
        ({"model": {"source": "s3"}}, "source"),
        ({"model": {"source": "hub"}}, "model.name"),
        ({"model": {"source": "volume"}}, "model.name"),
        ({"tls": {"workerSecret": "one"}}, "both or neither"),
        ({"imagee": {}}, "imagee"),
    ],
)
def test_values_that_make_no_sense_are_refused_with_what_to_change(values: Object, complaint: str) -> None:
    helm = pytest.importorskip("helm_python", reason=MISSING)
    with pytest.raises(helm.HelmError, match=complaint):
        render(values)


def test_the_schema_knows_every_value_and_only_those() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    def check(schema: Object, values: Any, where: str) -> None:
        if "$ref" in schema or schema.get("additionalProperties") is not False:
            return
        assert set(schema["properties"]) == set(values), where
        for name, value in values.items():
            check(schema["properties"][name], value, f"{where}.{name}")

    schema["properties"].pop("global")  # helm's own
    check(schema, values, "values")
    pool = schema["properties"]["pools"]["additionalProperties"]["oneOf"][1]["properties"]
    assert set(pool) == {"role", *schema["properties"]["poolDefaults"]["properties"]}
