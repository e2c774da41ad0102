"""The sample files for operators: their form, and that what they name is what the service has."""

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped] # it has no types
from prometheus_client.parser import text_string_to_metric_families

from chatproxy.config import Settings, load, variable_names
from chatproxy.metrics import Metrics
from chatproxy.routes import routes
from tests.conftest import ROOT, serving
from tests.upstream import CLOSE, Upstream, error, stream

HERE = Path(__file__).parent
ALERTS = HERE / "alerts.yaml"

# Of Prometheus and Grafana themselves.
FOREIGN_LABELS = {"job", "instance", "le"}


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((HERE / "dashboard.json").read_text())["panels"]
    return found


def expressions() -> list[str]:
    """All that the rules and the dashboard ask Prometheus for."""
    return [rule["expr"] for rule in rules()] + [target["expr"] for panel in panels() for target in panel["targets"]]


def series(kind: str, name: str) -> set[str]:
    """The names under which a metric is asked for."""
    suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    return {name + suffix for suffix in suffixes.get(kind, [""])}


def test_metrics_exist() -> None:
    """Every metric that is asked for is one that the service has."""
    families = list(text_string_to_metric_families(Metrics().render().decode()))
    known = {name for family in families for name in series(family.type, family.name)}
    asked = {name for text in expressions() for name in re.findall(r"\bchatproxy_\w+", text)}
    assert asked
    assert asked <= known


@pytest.mark.anyio
async def test_labels_exist() -> None:
    """Every label that is asked for, of a metric or in a legend, is one that some metric has."""
    async with (
        Upstream(stream("a"), error(500, {}), stream("b", CLOSE)) as grok,
        serving(grok.url, grok_retries=0) as service,
    ):
        for _ in range(3):
            await service.ask()
        text = (await service.client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    known = {label for sample in samples for label in sample.labels} | FOREIGN_LABELS
    asked: set[str] = set()
    for expression in expressions():
        asked |= {label for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(", ")}
        asked |= set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression))
    legends = " ".join(target["legendFormat"] for panel in panels() for target in panel["targets"])
    asked |= set(re.findall(r"{{(\w+)}}", legends))
    assert asked <= known
    ends = {sample.labels["end"] for sample in samples if sample.name == "chatproxy_stream_ends_total"}
    assert "failed" in ends


def test_alerts_are_told() -> None:
    """Each rule has its own name, a severity and a sentence; ratios and bounds wait before they ring."""
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["summary"].endswith((".", "?", "=1000."))
        assert "for" in rule or "increase" in rule["expr"]
    [full] = [rule["expr"] for rule in rules() if "streams_in_flight" in rule["expr"]]
    assert float(full.rpartition(" ")[2]) == 0.8 * Settings().max_streams


# For each rule, what makes it ring: series in the notation of `promtool test rules`, one value for each minute.
RINGING = {
    "ChatproxyDown": {'up{job="chatproxy", instance="a"}': "0x90"},
    "ChatproxyKeyRefused": {'chatproxy_upstream_failures_total{code="upstream_auth"}': "0+1x90"},
    "ChatproxyRequestsFail": {
        'chatproxy_requests_total{route="/api/chat", status="200"}': "0+10x90",
        'chatproxy_requests_total{route="/api/chat", status="502"}': "0+1x90",
    },
    "ChatproxyAnswersFail": {
        'chatproxy_stream_ends_total{end="done", code=""}': "0+10x90",
        'chatproxy_stream_ends_total{end="failed", code="upstream_cut_off"}': "0+1x90",
    },
    "ChatproxyFirstTokenSlow": {
        'chatproxy_time_to_first_token_seconds_bucket{le="30.0"}': "0x90",
        'chatproxy_time_to_first_token_seconds_bucket{le="60.0"}': "0+9x90",
        'chatproxy_time_to_first_token_seconds_bucket{le="+Inf"}': "0+9x90",
    },
    "ChatproxyNearlyFull": {'chatproxy_streams_in_flight{instance="a"}': "801x90"},
    "ChatproxySlow": {
        'chatproxy_overhead_seconds_bucket{instance="a", le="0.1"}': "0x90",
        'chatproxy_overhead_seconds_bucket{instance="a", le="0.25"}': "0+9x90",
        'chatproxy_overhead_seconds_bucket{instance="a", le="+Inf"}': "0+9x90",
    },
    "ChatproxyPaidAndUnread": {"chatproxy_unread_deltas_total": "0+2x150", "chatproxy_deltas_total": "0+9x150"},
}
QUIET = {
    "ChatproxyAnswersFail": {
        'chatproxy_stream_ends_total{end="done", code=""}': "0+1x90",
        'chatproxy_stream_ends_total{end="failed", code="stopped"}': "0+9x90",
    },
    "ChatproxyNearlyFull": {'chatproxy_streams_in_flight{instance="a"}': "800x90"},
}


@pytest.mark.anyio
async def test_rules_ring(tmp_path: Path) -> None:
    """Prometheus' own tool takes the rules, and each of them rings for what it is about, and for nothing else."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    assert set(RINGING) == {rule["alert"] for rule in rules()}
    cases = []
    for ringing, inputs in ((True, RINGING), (False, QUIET)):
        for name, given in inputs.items():
            # What the annotations say is compared too, so the rules are copied without them.
            labels = {"severity": next(rule["labels"]["severity"] for rule in rules() if rule["alert"] == name)}
            text = " ".join(given)
            labels |= dict(re.findall(r'\b(job|instance)="(\w+)"', text))
            cases.append(
                {
                    "interval": "1m",
                    "input_series": [{"series": key, "values": values} for key, values in given.items()],
                    "alert_rule_test": [
                        {
                            "eval_time": "140m" if "150" in str(given) else "85m",
                            "alertname": name,
                            "exp_alerts": [{"exp_labels": labels}] if ringing else [],
                        }
                    ],
                }
            )
    bare = [{key: value for key, value in rule.items() if key != "annotations"} for rule in rules()]
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump({"groups": [{"name": "chatproxy", "rules": bare}]}))
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["bare.yaml"], "tests": cases}))
    for arguments in (("check", "rules", str(ALERTS)), ("test", "rules", str(tmp_path / "test.yaml"))):
        process = await asyncio.create_subprocess_exec(
            promtool, *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()


def test_dashboard() -> None:
    """Grafana's panels have their own ids and places, and one data source to choose."""
    found = panels()
    assert len({panel["id"] for panel in found}) == len(found)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in found}) == len(found)
    for panel in found:
        assert panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert all('job="$job"' in target["expr"] for target in panel["targets"])


def kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    deployment, service = yaml.safe_load_all((HERE / "kubernetes.yaml").read_text())
    return deployment, service


def test_probes() -> None:
    """Each probe asks a route of the service, on the port where it listens, and readiness is not liveness."""
    deployment, service = kubernetes()
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    paths = {route.path for route in routes(Settings())}
    probes = {name: container[name]["httpGet"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert {probe["path"] for probe in probes.values()} <= paths
    assert (probes["readinessProbe"]["path"], probes["livenessProbe"]["path"]) == ("/readyz", "/healthz")
    [port] = container["ports"]
    assert port["containerPort"] == Settings().port
    assert {probe["port"] for probe in probes.values()} == {port["name"]} == {service["spec"]["ports"][0]["targetPort"]}
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels == service["spec"]["selector"]


def test_drain_in_the_files() -> None:
    """What is set are settings, and a stopped pod has told its running answers so before it is killed."""
    pod = kubernetes()[0]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    given = {each["name"]: each["value"] for each in container["env"]}
    assert set(given) <= set(variable_names())
    settings = load({name: value for name, value in given.items() if name != "GROK_API_KEY_FILE"})
    [_, pause] = container["lifecycle"]["preStop"]["exec"]["command"]
    assert float(pause) + settings.drain_timeout < pod["terminationGracePeriodSeconds"]


def test_confined() -> None:
    """The container is confined as compose.yaml confines it, and the key is a file that it may read."""
    pod = kubernetes()[0]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    [user] = re.findall(r"^USER (\d+):\1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    identity = pod["securityContext"]
    assert {identity["runAsUser"], identity["runAsGroup"], identity["fsGroup"]} == {int(user)}
    assert identity["runAsNonRoot"] is True
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    [mount], [volume] = container["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    assert volume["secret"]["defaultMode"] == 0o440
    [path] = [each["value"] for each in container["env"] if each["name"] == "GROK_API_KEY_FILE"]
    assert str(Path(path).parent) == mount["mountPath"]
    assert "GROK_API_KEY" not in {each["name"] for each in container["env"]}
    assert container["resources"]["limits"] == {"memory": "512Mi"}


def test_named_in_the_readme() -> None:
    """Users find the files: the README names each."""
    readme = (ROOT / "README.md").read_text()
    for path in HERE.iterdir():
        if path.suffix in (".yaml", ".json"):
            assert f"tests/operations/{path.name}" in readme
