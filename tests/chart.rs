//! The Helm chart: its schema against the daemon's, what it renders and what it refuses. Tests that need helm are run
//! by `make chart-test` (cargo test --test offline -- chart:: --ignored).

use crate::support;

use std::process::Command;

use kandle::settings;
use serde_json::{Value, json};
use support::{file, root, tool};

/// The smallest valid values: the configuration of a job.
fn minimal() -> Value {
    json!({ "config": {
        "kafka": { "brokers": "kafka:9092" },
        "input": { "topics": ["tickets"], "group": "kandle-tickets", "field": "/text" },
        "task": { "kind": "text-classification" },
        "model": { "source": "bundled" },
        "output": { "topic": "tickets-predictions" },
        "dead_letters": { "topic": "tickets-dead" },
    } })
}

/// Merges `over` into `into`: objects member by member, other values replaced.
fn merge(into: &mut Value, over: Value) {
    match (into, over) {
        (Value::Object(into), Value::Object(over)) => {
            for (key, value) in over {
                merge(into.entry(key).or_insert(Value::Null), value);
            }
        }
        (into, over) => *into = over,
    }
}

#[test]
fn the_schema_of_the_values_includes_the_daemons_schema() {
    let base = root().join("charts/kandle/ci/values.base.json");
    let mut schema: Value =
        serde_json::from_str(&std::fs::read_to_string(base).expect("read")).expect("JSON");
    let mut config = settings::schema();
    let fields = config.as_object_mut().expect("an object");
    fields.remove("$schema");
    fields.remove("title");
    schema["properties"]["config"] = config;
    let wanted = serde_json::to_string_pretty(&schema).expect("JSON") + "\n";
    let path = root().join("charts/kandle/values.schema.json");
    if std::env::var_os("KANDLE_WRITE").is_some() {
        std::fs::write(&path, &wanted).expect("written");
    }
    let there = std::fs::read_to_string(&path).expect("read");
    assert!(there == wanted, "values.schema.json is out of date: run `make generated`");
    // The chart's default values are valid with the configuration of a job, and only then.
    let mut values: Value = serde_saphyr::from_str(
        &std::fs::read_to_string(root().join("charts/kandle/values.yaml")).expect("read"),
    )
    .expect("YAML");
    let validator = jsonschema::validator_for(&schema).expect("a schema");
    assert!(!validator.is_valid(&values), "the schema must refuse values without a configuration");
    merge(&mut values, minimal());
    let faults: Vec<String> = validator.iter_errors(&values).map(|e| e.to_string()).collect();
    assert!(faults.is_empty(), "{faults:#?}");
}

fn helm() -> Command {
    Command::new(tool("helm"))
}

/// Renders the minimal values with `more` merged over them; the error is helm's message.
fn render(more: Value) -> Result<Vec<Value>, String> {
    let mut values = minimal();
    merge(&mut values, more);
    let values = file("values.json", &values.to_string());
    let output = helm()
        .args(["template", "job", "--namespace", "apps", "--kube-version", "1.34.0"])
        .args(["--api-versions", "monitoring.coreos.com/v1", "--values"])
        .arg(&values.path)
        .arg(root().join("charts/kandle"))
        .output()
        .expect("helm runs");
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let documents: Vec<Value> = serde_saphyr::from_multiple(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    Ok(documents.into_iter().filter(|document| !document.is_null()).collect())
}

#[track_caller]
fn rendered(more: Value) -> Vec<Value> {
    render(more).unwrap_or_else(|e| panic!("{e}"))
}

#[track_caller]
fn refused(more: Value, part: &str) {
    let Err(error) = render(more) else { panic!("not refused; expected {part:?}") };
    assert!(error.contains(part), "{part:?} is not in {error}");
}

#[track_caller]
fn one<'a>(documents: &'a [Value], kind: &str) -> &'a Value {
    let found: Vec<&Value> = documents.iter().filter(|d| d["kind"] == kind).collect();
    assert_eq!(found.len(), 1, "{kind} in {:?}", documents.iter().map(|d| &d["kind"]).collect::<Vec<_>>());
    found[0]
}

fn kinds(documents: &[Value]) -> Vec<String> {
    let mut kinds: Vec<String> =
        documents.iter().map(|d| d["kind"].as_str().expect("a kind").to_owned()).collect();
    kinds.sort();
    kinds
}

#[test]
#[ignore = "make chart-test"]
fn each_mode_has_its_workload() {
    let run = rendered(json!({}));
    assert_eq!(kinds(&run), ["ConfigMap", "Deployment", "Pod", "Service", "ServiceAccount"]);
    let pod = &one(&run, "Deployment")["spec"]["template"]["spec"];
    assert_eq!(pod["containers"][0]["args"], json!(["run", "--config=/etc/kandle/kandle.yaml"]));
    // `config` is in the ConfigMap unchanged.
    let text = one(&run, "ConfigMap")["data"]["kandle.yaml"].as_str().expect("a file");
    let read: Value = serde_saphyr::from_str(text).expect("YAML");
    assert_eq!(read, minimal()["config"]);

    let set = rendered(json!({ "run": { "workload": "StatefulSet", "replicas": 3 } }));
    let set = &one(&set, "StatefulSet")["spec"];
    assert_eq!(set["replicas"], 3);
    let env = set["template"]["spec"]["containers"][0]["env"].as_array().expect("env");
    let name = env.iter().find(|e| e["name"] == "KANDLE__INPUT__PROPERTIES__GROUP_INSTANCE_ID");
    assert_eq!(name.expect("a static member")["valueFrom"]["fieldRef"]["fieldPath"], "metadata.name");

    let drain = rendered(
        json!({ "mode": "drain", "drain": { "schedule": "0 1 * * *", "timeZone": "Europe/Berlin", "parallelism": 2, "strict": true } }),
    );
    assert_eq!(kinds(&drain), ["ConfigMap", "CronJob", "Pod", "ServiceAccount"]);
    let cron = &one(&drain, "CronJob")["spec"];
    assert_eq!((&cron["schedule"], &cron["timeZone"]), (&json!("0 1 * * *"), &json!("Europe/Berlin")));
    let job = &cron["jobTemplate"]["spec"];
    assert_eq!((&job["parallelism"], &job["completions"]), (&json!(2), &json!(2)));
    assert_eq!(job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"], json!([2, 3]));
    let container = &job["template"]["spec"]["containers"][0];
    assert_eq!(container["args"], json!(["drain", "--strict", "--config=/etc/kandle/kandle.yaml"]));
    assert_eq!(container["readinessProbe"], Value::Null, "a drain receives no traffic");

    let replay = json!({ "mode": "replay", "replay": { "from": "offset:0", "to": "2026-01-01T00:00:00Z" } });
    let first = rendered(replay.clone());
    let args = &one(&first, "Job")["spec"]["template"]["spec"]["containers"][0]["args"];
    assert_eq!(
        args,
        &json!([
            "replay",
            "--id=job",
            "--from=offset:0",
            "--to=2026-01-01T00:00:00Z",
            "--config=/etc/kandle/kandle.yaml"
        ])
    );
    // Changed settings rename the Job, because an existing Job cannot be changed.
    let mut other = replay.clone();
    merge(&mut other, json!({ "replay": { "to": "2026-01-02T00:00:00Z" } }));
    let other = rendered(other);
    assert_ne!(one(&first, "Job")["metadata"]["name"], one(&other, "Job")["metadata"]["name"]);
    for more in [
        json!({ "resources": { "limits": { "memory": "4Gi" } } }),
        json!({ "replay": { "parallelism": 3 } }),
        json!({ "hostAliases": [{ "ip": "10.0.0.1", "hostnames": ["kafka"] }] }),
        json!({ "podLabels": { "a": "b" } }),
        json!({ "config": { "window": { "max_records": 7 } } }),
    ] {
        let mut other = replay.clone();
        merge(&mut other, more.clone());
        let other = rendered(other);
        assert_ne!(one(&first, "Job")["metadata"]["name"], one(&other, "Job")["metadata"]["name"], "{more}");
    }
    refused(json!({ "mode": "replay" }), "replay.from and replay.to");
}

#[test]
#[ignore = "make chart-test"]
fn install_refuses_an_invalid_configuration() {
    refused(json!({ "config": { "kafka": { "borkers": "x" } } }), "borkers");
    refused(json!({ "config": { "window": { "max_records": 0 } } }), "max_records");
    refused(json!({ "config": { "task": { "kind": "poetry" } } }), "kind");
    refused(json!({ "config": null }), "config");
    refused(json!({ "mode": "walk" }), "mode");
    refused(json!({ "replicas": 3 }), "replicas");
    refused(json!({ "config": { "server": { "listen": "0.0.0.0:0" } } }), "need a fixed port");
}

#[test]
#[ignore = "make chart-test"]
fn secrets_are_references_and_never_stand_in_a_config_map() {
    let with = |value: &str| json!({ "config": { "kafka": { "properties": { "sasl.password": value } } } });
    refused(with("hunter2"), "would be stored in a ConfigMap");
    refused(with("hunter2$${env:x}"), "would be stored in a ConfigMap");
    refused(json!({ "config": { "kafka": { "properties": { "client.rack": 1.25 } } } }), "quote it");
    refused(json!({ "config": { "model": { "source": "o/n", "token": "hf_x" } } }), "config.model.token");
    for name in ["sasl.jaas.config", "ssl.key.pem", "sasl.oauthbearer.config", "ssl.keystore.password"] {
        refused(
            json!({ "config": { "output": { "properties": { name: "hunter2" } } } }),
            "would be stored in a ConfigMap",
        );
    }
    let mut named = with("${env:SASL_PASSWORD}");
    merge(
        &mut named,
        json!({
            "secretEnv": [{ "name": "SASL_PASSWORD", "secret": "kafka", "key": "password" }],
            "secretFiles": [{ "secret": "kafka-tls", "mountPath": "/run/secrets/kafka" }],
        }),
    );
    let all = rendered(named);
    let pod = &one(&all, "Deployment")["spec"]["template"]["spec"];
    let env = pod["containers"][0]["env"].as_array().expect("env");
    let password = env.iter().find(|e| e["name"] == "SASL_PASSWORD").expect("SASL_PASSWORD");
    assert_eq!(password["valueFrom"]["secretKeyRef"], json!({ "name": "kafka", "key": "password" }));
    let volumes = pod["volumes"].as_array().expect("volumes");
    assert!(volumes.iter().any(|v| v["secret"]["secretName"] == "kafka-tls"), "{volumes:?}");
}

#[test]
#[ignore = "make chart-test"]
fn the_grace_period_covers_work_in_flight_and_a_changed_configuration_rolls_the_pods() {
    let grace = |more| {
        let all = rendered(more);
        one(&all, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"].clone()
    };
    // batch.timeout 2m + delivery.revoke_timeout 30s + a margin of 30 s.
    assert_eq!(grace(json!({})), 180);
    let longer =
        json!({ "config": { "batch": { "timeout": "3m 30s" }, "delivery": { "revoke_timeout": "1m" } } });
    assert_eq!(grace(longer), 300);
    assert_eq!(grace(json!({ "terminationGracePeriodSeconds": 77 })), 77);
    let template = |more| {
        let all = rendered(more);
        one(&all, "Deployment")["spec"]["template"]["metadata"].clone()
    };
    let other = json!({ "config": { "window": { "max_records": 7 } } });
    assert_ne!(template(json!({})), template(other));
    assert_eq!(template(json!({})), template(json!({ "dashboards": { "enabled": true } })));
}

#[test]
#[ignore = "make chart-test"]
fn one_autoscaler_at_a_time_and_no_idle_consumers() {
    let keda = rendered(json!({ "keda": { "enabled": true, "maxReplicas": 6 } }));
    assert_eq!(one(&keda, "Deployment")["spec"]["replicas"], Value::Null, "the autoscaler sets the replicas");
    let object = &one(&keda, "ScaledObject")["spec"];
    assert_eq!(object["maxReplicaCount"], 6);
    let trigger = &object["triggers"][0];
    assert_eq!(trigger["metadata"]["consumerGroup"], "kandle-tickets");
    assert_eq!(trigger["metadata"]["allowIdleConsumers"], "false");
    let time = json!({ "keda": { "enabled": true, "trigger": "prometheus", "prometheusAddress": "http://p:9090", "remainingSeconds": 300 } });
    let time = rendered(time);
    let metadata = &one(&time, "ScaledObject")["spec"]["triggers"][0]["metadata"];
    assert!(metadata["query"].as_str().is_some_and(|q| q.contains("kandle_drain_remaining_seconds")));
    let hpa = rendered(json!({ "autoscaling": { "enabled": true } }));
    assert_eq!(one(&hpa, "HorizontalPodAutoscaler")["spec"]["maxReplicas"], 4);
    refused(json!({ "autoscaling": { "enabled": true }, "keda": { "enabled": true } }), "one of them");
    refused(json!({ "mode": "drain", "keda": { "enabled": true } }), "scale mode run");
    refused(
        json!({ "keda": { "enabled": true }, "config": { "input": { "topics": ["^t.*"] } } }),
        "a pattern",
    );
}

#[test]
#[ignore = "make chart-test"]
fn large_integers_are_not_rendered_as_floats() {
    let all = rendered(json!({
        "config": { "window": { "max_records": 1000000 }, "batch": { "max_tokens": 2000000 } },
        "podSecurityContext": { "runAsUser": 1000680000, "supplementalGroups": [3000000] },
        "tolerations": [{ "key": "k", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 4000000 }],
        "probes": { "startup": { "failureThreshold": 5000000 } },
        "terminationGracePeriodSeconds": 6000000,
        "run": { "revisionHistoryLimit": 0, "maxSurge": "50%" },
        "keda": { "enabled": true, "lagThreshold": 7000000, "cooldownPeriod": 8000000, "maxReplicas": 9000000 },
        "prometheusRule": { "enabled": true, "lagSeconds": 1000000 },
    }));
    let config = one(&all, "ConfigMap")["data"]["kandle.yaml"].as_str().expect("a file");
    assert!(config.contains("max_records: 1000000") && config.contains("max_tokens: 2000000"), "{config}");
    let deployment = &one(&all, "Deployment")["spec"];
    let pod = &deployment["template"]["spec"];
    assert_eq!(pod["securityContext"]["runAsUser"], json!(1000680000));
    assert_eq!(pod["securityContext"]["supplementalGroups"], json!([3000000]));
    assert_eq!(pod["tolerations"][0]["tolerationSeconds"], json!(4000000));
    assert_eq!(pod["containers"][0]["startupProbe"]["failureThreshold"], json!(5000000));
    assert_eq!(pod["terminationGracePeriodSeconds"], json!(6000000));
    assert_eq!(deployment["revisionHistoryLimit"], json!(0));
    assert_eq!(deployment["strategy"]["rollingUpdate"], json!({ "maxUnavailable": 1, "maxSurge": "50%" }));
    let scaled = &one(&all, "ScaledObject")["spec"];
    assert_eq!(scaled["triggers"][0]["metadata"]["lagThreshold"], "7000000");
    assert_eq!((&scaled["cooldownPeriod"], &scaled["maxReplicaCount"]), (&json!(8000000), &json!(9000000)));
    let rules = &one(&all, "PrometheusRule")["spec"]["groups"][0]["rules"];
    assert!(rules[0]["expr"].as_str().is_some_and(|expr| expr.ends_with("> 1000000")), "{rules}");
    let slow = json!({ "trigger": "prometheus", "prometheusAddress": "p", "remainingSeconds": 1000000 });
    let mut time = json!({ "keda": { "enabled": true } });
    merge(&mut time["keda"], slow);
    let time = rendered(time);
    assert_eq!(one(&time, "ScaledObject")["spec"]["triggers"][0]["metadata"]["threshold"], "1000000");
    let drain = rendered(json!({ "mode": "drain", "drain": { "activeDeadlineSeconds": 1000000 } }));
    assert_eq!(
        one(&drain, "CronJob")["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"],
        json!(1000000)
    );
}

#[test]
#[ignore = "make chart-test"]
fn keda_gets_values_that_it_can_resolve() {
    let with = |brokers: &str, topic: &str| {
        json!({ "keda": { "enabled": true }, "config": {
            "kafka": { "brokers": brokers }, "input": { "topics": [topic], "group": "a$$b" },
        } })
    };
    let all = rendered(with("${env:BROKERS}", "${env:TOPIC}"));
    let spec = &one(&all, "ScaledObject")["spec"];
    assert_eq!(spec["scaleTargetRef"]["envSourceContainerName"], "kandle");
    let metadata = &spec["triggers"][0]["metadata"];
    assert_eq!(
        (&metadata["bootstrapServersFromEnv"], &metadata["bootstrapServers"]),
        (&json!("BROKERS"), &Value::Null)
    );
    assert_eq!((&metadata["topicFromEnv"], &metadata["consumerGroup"]), (&json!("TOPIC"), &json!("a$b")));
    let literal = rendered(with("k:9092", "g$${env:X}"));
    assert_eq!(one(&literal, "ScaledObject")["spec"]["triggers"][0]["metadata"]["topic"], "g${env:X}");
    refused(with("${file:/run/brokers}", "t"), "cannot read config.kafka.brokers");
    refused(with("${env:HOST}:9092", "t"), "cannot read config.kafka.brokers");
}

/// Values with this login.
fn login(properties: Value) -> Value {
    json!({ "keda": { "enabled": true }, "config": { "kafka": { "properties": properties } } })
}

#[test]
#[ignore = "make chart-test"]
fn keda_logs_in_as_the_pods_do() {
    let plain = rendered(json!({ "keda": { "enabled": true, "excludePersistentLag": true } }));
    let trigger = &one(&plain, "ScaledObject")["spec"]["triggers"][0];
    assert_eq!(trigger["metadata"]["excludePersistentLag"], "true");
    assert_eq!((&trigger["metadata"]["sasl"], &trigger["authenticationRef"]), (&Value::Null, &Value::Null));

    let mut scram = login(json!({
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": "/run/secrets/kafka/ca.crt",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "kan$$dle",
        "sasl.password": "${env:SASL_PASSWORD}",
        "ssl.key.password": "${env:KEY_PASSWORD}",
    }));
    scram["secretEnv"] = json!([{ "name": "SASL_PASSWORD", "secret": "login", "key": "password" }]);
    scram["secretFiles"] = json!([{ "secret": "tls", "mountPath": "/run/secrets/kafka" }]);
    let all = rendered(scram.clone());
    let trigger = &one(&all, "ScaledObject")["spec"]["triggers"][0];
    assert_eq!(
        (&trigger["metadata"]["sasl"], &trigger["metadata"]["tls"]),
        (&json!("scram_sha512"), &json!("enable"))
    );
    let authentication = one(&all, "TriggerAuthentication");
    assert_eq!(trigger["authenticationRef"]["name"], authentication["metadata"]["name"]);
    let own = one(&all, "Secret");
    assert_eq!(own["stringData"], json!({ "username": "kan$dle" }));
    assert_eq!(
        authentication["spec"]["secretTargetRef"],
        json!([
            { "parameter": "ca", "name": "tls", "key": "ca.crt" },
            { "parameter": "password", "name": "login", "key": "password" },
            { "parameter": "username", "name": own["metadata"]["name"], "key": "username" },
        ])
    );
    assert_eq!(
        authentication["spec"]["env"],
        json!([{ "parameter": "keyPassword", "name": "KEY_PASSWORD", "containerName": "kandle" }])
    );
    scram["keda"]["authenticationRef"] = json!("mine");
    let all = rendered(scram);
    assert!(!kinds(&all).contains(&"TriggerAuthentication".to_owned()));
    assert_eq!(one(&all, "ScaledObject")["spec"]["triggers"][0]["authenticationRef"]["name"], "mine");

    let mut iam = login(json!({ "sasl.mechanism": "AWS_MSK_IAM" }));
    iam["config"]["kafka"]["brokers"] = json!("b-1.demo.x.c2.kafka.eu-central-1.amazonaws.com:9098");
    let all = rendered(iam);
    let metadata = &one(&all, "ScaledObject")["spec"]["triggers"][0]["metadata"];
    assert_eq!((&metadata["sasl"], &metadata["awsRegion"]), (&json!("aws_msk_iam"), &json!("eu-central-1")));
    assert_eq!(one(&all, "TriggerAuthentication")["spec"]["podIdentity"]["provider"], "aws");

    let sasl = |name: &str, value: &str| {
        let mut properties = json!({ "security.protocol": "SASL_SSL", "sasl.mechanism": "PLAIN" });
        properties[name] = json!(value);
        login(properties)
    };
    refused(sasl("sasl.mechanism", "GSSAPI"), "no counterpart of sasl.mechanism GSSAPI");
    refused(sasl("sasl.password", "${file:/elsewhere/password}"), "cannot read /elsewhere/password");
    refused(sasl("sasl.password", "a${env:B}"), "cannot read sasl.password");
    refused(sasl("security.protocol", "${env:PROTOCOL}"), "cannot read security.protocol");
}

#[test]
#[ignore = "make chart-test"]
fn a_strimzi_user_logs_the_pods_and_keda_in() {
    let with = |authentication: &str| {
        let strimzi = json!({ "user": "kandle", "cluster": "demo", "authentication": authentication });
        json!({ "strimzi": strimzi, "keda": { "enabled": true } })
    };
    let all = rendered(with("scram-sha-512"));
    let config = one(&all, "ConfigMap")["data"]["kandle.yaml"].as_str().expect("a file");
    let config: Value = serde_saphyr::from_str(config).expect("YAML");
    let properties = &config["kafka"]["properties"];
    assert_eq!(properties["sasl.password"], "${file:/run/secrets/strimzi/user/password}");
    assert_eq!(
        (&properties["sasl.username"], &properties["security.protocol"]),
        (&json!("kandle"), &json!("SASL_SSL"))
    );
    let pod = &one(&all, "Deployment")["spec"]["template"]["spec"];
    let secrets: Vec<&Value> = pod["volumes"]
        .as_array()
        .expect("volumes")
        .iter()
        .map(|volume| &volume["secret"]["secretName"])
        .filter(|name| !name.is_null())
        .collect();
    assert_eq!(secrets, ["kandle", "demo-cluster-ca-cert"]);
    let references = &one(&all, "TriggerAuthentication")["spec"]["secretTargetRef"];
    assert_eq!(references[0], json!({ "parameter": "ca", "name": "demo-cluster-ca-cert", "key": "ca.crt" }));
    assert_eq!(references[1], json!({ "parameter": "password", "name": "kandle", "key": "password" }));

    let all = rendered(with("tls"));
    let references = &one(&all, "TriggerAuthentication")["spec"]["secretTargetRef"];
    assert_eq!(references[1], json!({ "parameter": "cert", "name": "kandle", "key": "user.crt" }));
    assert_eq!(references[2], json!({ "parameter": "key", "name": "kandle", "key": "user.key" }));

    refused(json!({ "strimzi": { "user": "kandle" } }), "strimzi.cluster");
    let mut both = with("tls");
    both["config"] = json!({ "kafka": { "properties": { "security.protocol": "SSL" } } });
    refused(both, "is set by strimzi.user");
}

#[test]
#[ignore = "make chart-test"]
fn the_network_policy_allows_the_ports_of_the_configuration() {
    let ports = |more: Value| -> Vec<i64> {
        let mut values = json!({ "networkPolicy": { "enabled": true, "hub": false } });
        merge(&mut values, more);
        let all = rendered(values);
        let egress = one(&all, "NetworkPolicy")["spec"]["egress"].as_array().expect("rules").clone();
        let ports = egress.iter().flat_map(|rule| rule["ports"].as_array().expect("ports").clone());
        ports.map(|port| port["port"].as_i64().expect("a number")).filter(|port| *port != 53).collect()
    };
    let brokers = |brokers: &str| json!({ "config": { "kafka": { "brokers": brokers } } });
    assert_eq!(ports(brokers("a:19092, b:29092,c")), [19092, 29092, 9092]);
    assert_eq!(ports(brokers("a:19092,")), [19092]);
    assert_eq!(ports(brokers("SASL_SSL://[::1]:9198")), [9198]);
    let mut advertised = brokers("a:9092");
    merge(&mut advertised, json!({ "networkPolicy": { "kafkaPorts": [31000, 9092] } }));
    assert_eq!(ports(advertised), [31000, 9092]);
    for (endpoint, port) in [
        ("http://otel:4318", 4318),
        ("https://otel/x", 443),
        ("http://otel", 80),
        ("http://[::1]:43/a:1", 43),
    ] {
        assert_eq!(ports(json!({ "config": { "otel": { "endpoint": endpoint } } })), [9092, port]);
    }
    let mut unknown = brokers("${env:BROKERS}");
    merge(&mut unknown, json!({ "networkPolicy": { "enabled": true } }));
    refused(unknown.clone(), "networkPolicy.kafkaPorts");
    merge(&mut unknown, json!({ "networkPolicy": { "kafkaPorts": [9096] } }));
    assert_eq!(ports(unknown), [9096]);
    refused(
        json!({ "networkPolicy": { "enabled": true }, "config": { "otel": { "endpoint": "${env:OTEL}" } } }),
        "networkPolicy.extraEgress",
    );
}

#[test]
#[ignore = "make chart-test"]
fn extra_containers_hooks_dns_and_annotations_reach_the_pods() {
    let beside = |name: &str| json!([{ "name": name, "image": "busybox" }]);
    let values = json!({
        "initContainers": beside("first"), "sidecars": beside("proxy"), "checkBeforeStart": true,
        "lifecycle": { "postStart": { "exec": { "command": ["true"] } } },
        "dnsPolicy": "None", "dnsConfig": { "nameservers": ["10.0.0.10"] },
        "hostAliases": [{ "ip": "10.0.0.1", "hostnames": ["kafka"] }],
        "workloadAnnotations": { "reloader.stakater.com/auto": "true" },
    });
    let run = rendered(values.clone());
    let deployment = one(&run, "Deployment");
    assert_eq!(deployment["metadata"]["annotations"]["reloader.stakater.com/auto"], "true");
    let pod = &deployment["spec"]["template"]["spec"];
    let names = |list: &Value| -> Vec<String> {
        let list = list.as_array().expect("a list").iter();
        list.map(|item| item["name"].as_str().expect("a name").to_owned()).collect()
    };
    assert_eq!(names(&pod["initContainers"]), ["first", "check"]);
    assert_eq!(names(&pod["containers"]), ["kandle", "proxy"]);
    assert_eq!(pod["containers"][0]["lifecycle"]["postStart"]["exec"]["command"], json!(["true"]));
    assert_eq!(
        (&pod["dnsPolicy"], &pod["dnsConfig"]["nameservers"]),
        (&json!("None"), &json!(["10.0.0.10"]))
    );
    assert_eq!(pod["hostAliases"][0]["hostnames"], json!(["kafka"]));
    let check = &one(&run, "Pod")["spec"];
    assert_eq!((&check["hostAliases"], &check["dnsConfig"]), (&pod["hostAliases"], &pod["dnsConfig"]));
    let mut drain = values;
    merge(&mut drain, json!({ "mode": "drain" }));
    refused(drain.clone(), "sidecars");
    drain["sidecars"] = json!([]);
    let drain = rendered(drain);
    let cron = one(&drain, "CronJob");
    assert_eq!(cron["metadata"]["annotations"]["reloader.stakater.com/auto"], "true");
    let pod = &cron["spec"]["jobTemplate"]["spec"]["template"]["spec"];
    assert_eq!(names(&pod["initContainers"]), ["first", "check"]);
}

#[test]
#[ignore = "make chart-test"]
fn gpus_caches_and_alerts() {
    let gpu = rendered(json!({
        "gpu": { "enabled": true, "resource": "nvidia.com/mig-1g.10gb" },
        "runtimeClassName": "nvidia",
        "tolerations": [{ "key": "nvidia.com/gpu", "operator": "Exists" }],
    }));
    let pod = &one(&gpu, "Deployment")["spec"]["template"]["spec"];
    assert_eq!(
        pod["containers"][0]["resources"]["limits"],
        json!({ "memory": "2Gi", "nvidia.com/mig-1g.10gb": 1 })
    );
    assert_eq!(pod["runtimeClassName"], "nvidia");

    let pulled = rendered(json!({ "modelCache": { "type": "persistentVolumeClaim", "pullJob": true } }));
    let claim = one(&pulled, "PersistentVolumeClaim");
    let job = one(&pulled, "Job");
    let weight = |v: &Value| {
        v["metadata"]["annotations"]["helm.sh/hook-weight"].as_str().and_then(|w| w.parse::<i32>().ok())
    };
    assert!(weight(claim) < weight(job), "the claim must be created before the job that fills it");
    let pull = &job["spec"]["template"]["spec"];
    assert_eq!(pull["containers"][0]["args"], json!(["model", "pull", "--config=/etc/kandle/kandle.yaml"]));
    let names: Vec<&Value> =
        pull["volumes"].as_array().expect("volumes").iter().map(|v| &v["configMap"]["name"]).collect();
    assert!(names.contains(&&json!("job-kandle-pull")), "{names:?}");
    let env = &one(&pulled, "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"];
    assert!(
        env.as_array().expect("env").contains(&json!({ "name": "KANDLE__MODEL__OFFLINE", "value": "true" }))
    );
    refused(json!({ "modelCache": { "pullJob": true } }), "needs a claim");

    let watched = rendered(json!({
        "podMonitor": { "enabled": true }, "dashboards": { "enabled": true },
        "prometheusRule": { "enabled": true, "lagSeconds": 90, "runbook": "https://wiki/kandle" },
    }));
    let rules = &one(&watched, "PrometheusRule")["spec"]["groups"][0]["rules"];
    assert_eq!(rules[0]["expr"], "max by (namespace, job, topic) (kandle_lag_seconds) > 90");
    assert_eq!(rules[0]["annotations"]["runbook_url"], "https://wiki/kandle#kandlelagging");
    let dashboards = watched.iter().filter(|d| d["metadata"]["labels"]["grafana_dashboard"] == "1");
    for map in dashboards.clone() {
        for text in map["data"].as_object().expect("data").values() {
            serde_json::from_str::<Value>(text.as_str().expect("text")).expect("a dashboard is JSON");
        }
    }
    assert_eq!(dashboards.count(), 3);
}
