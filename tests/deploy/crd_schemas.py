"""Schemas of the custom resources that the chart writes, as far as it writes them: what is not here is a mistake.

After the definitions of LeaderWorkerSet v1, KEDA 2.17 and later, the Prometheus operator, Gateway API v1 and its
Inference Extension v1. Pods and the behaviour of autoscalers are Kubernetes' own, and checked by its schemas.
"""

from typing import Any

Schema = dict[str, Any]
TEXT: Schema = {"type": "string", "minLength": 1}
LABELS: Schema = {"type": "object", "additionalProperties": {"type": "string", "maxLength": 63}}
NAME: Schema = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
COUNT: Schema = {"type": "integer", "minimum": 0}
ANY: Schema = {"type": "object"}


def record(properties: dict[str, Schema], *required: str) -> Schema:
    return {
        "type": "object", "additionalProperties": False, "properties": properties, "required": list(required),
    }  # fmt: skip


def each(item: Schema, least: int = 1, most: int = 16) -> Schema:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def one_of(*words: str) -> Schema:
    return {"enum": list(words)}


def resource(spec: Schema) -> Schema:
    metadata = record({"name": NAME, "labels": LABELS, "annotations": ANY}, "name")
    return record({"apiVersion": TEXT, "kind": TEXT, "metadata": metadata, "spec": spec}, "metadata", "spec")


_TARGET = record({"apiVersion": TEXT, "kind": TEXT, "name": NAME}, "name")

SCHEMAS: dict[tuple[str, str], Schema] = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): resource(
        record(
            {
                "replicas": COUNT,
                "startupPolicy": one_of("LeaderCreated", "LeaderReady"),
                "rolloutStrategy": record(
                    {
                        "type": one_of("RollingUpdate"),
                        "rollingUpdateConfiguration": record({"maxUnavailable": COUNT, "maxSurge": COUNT}),
                    },
                    "type",
                ),
                "leaderWorkerTemplate": record(
                    {
                        "size": {"type": "integer", "minimum": 1},
                        "restartPolicy": one_of("RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"),
                        "workerTemplate": ANY,
                    },
                    "workerTemplate",
                ),
            },
            "leaderWorkerTemplate",
        )
    ),
    ("keda.sh/v1alpha1", "ScaledObject"): resource(
        record(
            {
                "scaleTargetRef": _TARGET,
                "minReplicaCount": COUNT,
                "maxReplicaCount": {"type": "integer", "minimum": 1},
                "pollingInterval": {"type": "integer", "minimum": 1},
                "cooldownPeriod": COUNT,
                "fallback": record(
                    {
                        "failureThreshold": COUNT,
                        "replicas": COUNT,
                        "behavior": one_of(
                            "static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"
                        ),
                    },
                    "failureThreshold",
                    "replicas",
                ),
                "advanced": record({"horizontalPodAutoscalerConfig": record({"behavior": ANY})}),
                "triggers": each(
                    record(
                        {
                            "type": one_of("prometheus"),
                            "metadata": record(
                                {
                                    "serverAddress": {"type": "string", "pattern": "^https?://"},
                                    "query": TEXT,
                                    # Numbers are texts here: KEDA refuses others.
                                    "threshold": {"type": "string", "pattern": r"^\d+(\.\d+)?$"},
                                    "activationThreshold": {"type": "string", "pattern": r"^\d+(\.\d+)?$"},
                                },
                                "serverAddress", "query", "threshold",
                            ),
                        },
                        "type", "metadata",
                    )
                ),
            },
            "scaleTargetRef", "triggers",
        )
    ),
    ("monitoring.coreos.com/v1", "ServiceMonitor"): resource(
        record(
            {
                "jobLabel": TEXT,
                "selector": record({"matchLabels": LABELS}, "matchLabels"),
                "namespaceSelector": record({"matchNames": each(NAME)}),
                "endpoints": each(
                    record({
                        "port": TEXT, "path": {"type": "string", "pattern": "^/"},
                        "interval": {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
                    })
                ),
            },
            "selector", "endpoints",
        )
    ),
    ("inference.networking.k8s.io/v1", "InferencePool"): resource(
        record(
            {
                "selector": record({"matchLabels": LABELS}, "matchLabels"),
                "targetPorts": each(record({"number": PORT}, "number"), most=8),
                "endpointPickerRef": record(
                    {
                        "name": NAME, "port": record({"number": PORT}, "number"),
                        "failureMode": one_of("FailOpen", "FailClose"),
                    },
                    "name", "port",
                ),
            },
            "selector", "targetPorts", "endpointPickerRef",
        )
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): resource(
        record(
            {
                "parentRefs": each(
                    record({"name": NAME, "namespace": NAME, "sectionName": NAME, "port": PORT}, "name"), most=32
                ),
                "hostnames": each({"type": "string", "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"}),
                "rules": each(
                    record({
                        "matches": each(
                            record({"path": record({"type": one_of("Exact", "PathPrefix"), "value": TEXT})})
                        ),
                        "backendRefs": each(
                            record({"group": TEXT, "kind": TEXT, "name": NAME, "port": PORT}, "name")
                        ),
                        "timeouts": record({"request": {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}}),
                    })
                ),
            },
            "rules",
        )
    ),
}  # fmt: skip
