"""Dashboard, alerts and scraping: only metrics that exist, and alerts that fire when they should and not before."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import ray
import yaml

from pipelines import metrics
from tests.infra.manifests import INFRA, KUBERAY, documents, pod_specs

DASHBOARD = json.loads((INFRA / "monitoring" / "dashboard.json").read_text())
(ALERTS,) = documents(INFRA / "monitoring" / "alerts.yaml")
RULES = [rule for group in ALERTS["spec"]["groups"] for rule in group["rules"]]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]] + [rule["expr"] for rule in RULES]


def metrics_of_ray():
    """The names in the installed Ray: those of its own dashboards, of its node reporter and of Ray Data."""
    package = Path(ray.__file__).parent
    names = set()
    for path in (package / "dashboard" / "modules" / "metrics" / "dashboards").glob("*.py"):
        names |= set(re.findall(r"\bray_[a-z0-9_]+", path.read_text()))
    reporter = (package / "dashboard" / "modules" / "reporter" / "reporter_agent.py").read_text()
    return names | {f"ray_{name}" for name in re.findall(r'Gauge\(\s*"([a-z_]+)"', reporter)}


def metrics_in(expression):
    return set(re.findall(r"\bray_[a-z_]+(?=\{|\)|\[|$|,| unless| offset)", expression)) - {"ray_io_cluster"}


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_panel_or_alert_asks_for_metrics_that_exist(expression):
    ours = {f"ray_{name}" for name in {*metrics.COUNTERS, *metrics.GAUGES}}
    asked = metrics_in(expression)
    assert asked and asked <= ours | metrics_of_ray()


def test_every_metric_of_ours_is_shown():
    shown = set().union(*(metrics_in(target["expr"]) for panel in PANELS for target in panel["targets"]))
    assert {f"ray_{name}" for name in {*metrics.COUNTERS, *metrics.GAUGES}} <= shown


def test_counters_are_rated_and_labels_are_those_of_the_metric():
    for expression in EXPRESSIONS:
        for name, (_, tags) in {**metrics.COUNTERS, **metrics.GAUGES}.items():
            for match in re.finditer(rf"ray_{name}\b(?:\{{([^}}]*)\}})?", expression):
                labels = set(re.findall(r"(\w+)=", match[1] or ""))
                assert labels <= {*tags, "ray_io_cluster"}


def test_panels_have_places_of_their_own_and_say_what_they_show():
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert all(panel["description"] and panel["fieldConfig"]["defaults"]["unit"] for panel in PANELS)


def test_variables_of_the_dashboard_are_defined():
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]) + json.dumps(DASHBOARD["templating"])))
    assert used == defined


def test_the_pod_monitor_reads_the_ports_that_pods_have():
    (monitor,) = documents(INFRA / "monitoring" / "pod_monitor.yaml")
    (job,) = documents(KUBERAY / "base" / "rerank" / "rayjob.yaml")
    ports = {
        port["name"] for spec in pod_specs(job).values() for c in spec["containers"] for port in c.get("ports", [])
    }
    asked = {endpoint["port"] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    assert {port for port in ports if "metrics" in port} == asked
    spaces = {yaml.safe_load(path.read_text())["namespace"] for path in KUBERAY.glob("overlays/*/rerank/*tion.yaml")}
    assert {*monitor["spec"]["namespaceSelector"]["matchNames"]} == spaces
    labels = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["metadata"]["labels"]
    assert monitor["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_the_scrape_config_reads_the_file_that_ray_writes():
    config = yaml.safe_load((INFRA / "monitoring" / "scrape_config.yaml").read_text())
    (job,) = config["scrape_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert [Path(file).name for file in job["file_sd_configs"][0]["files"]] == [PROMETHEUS_SERVICE_DISCOVERY_FILE]


def test_the_runbook_says_what_each_alert_means():
    headings = re.findall(r"^#+ (.+)$", (INFRA / "README.md").read_text(), re.MULTILINE)
    for rule in RULES:
        assert rule["alert"] in headings
        assert rule["annotations"]["runbook_url"] == f"infra/README.md#{rule['alert'].lower()}"
    assert [heading for heading in headings if heading.startswith("Crossenc")] == [rule["alert"] for rule in RULES]


# What Prometheus itself makes of the rules. Series are samples a minute apart.

RUN = '{ray_io_cluster="night", run="abc"}'
NODE = '{ray_io_cluster="night", instance="node"}'
FIRES = {
    "CrossencNoProgress": (
        {f"ray_crossenc_shards_remaining{RUN}": "7x60", f"ray_crossenc_shards_committed_total{RUN}": "3x60"},
        50,
    ),
    "CrossencRefusedShare": (
        {
            'ray_crossenc_pairs_refused_total{ray_io_cluster="night", run="abc", reason="a"}': "1x60",
            'ray_crossenc_pairs_refused_total{ray_io_cluster="night", run="abc", reason="b"}': "1x60",
            f"ray_crossenc_pairs_scored_total{RUN}": "150x60",
        },
        10,
    ),
    "CrossencShardRetries": ({f"ray_crossenc_shard_retries_total{RUN}": "0+1x60"}, 50),
    "CrossencDeviceMemory": ({f"ray_crossenc_out_of_memory_total{NODE}": "_x10 1x50"}, 20),
    "CrossencNodeMemory": ({f"ray_memory_manager_worker_eviction_total{NODE}": "_x10 1x50"}, 15),
    "CrossencDiskFull": ({f"ray_node_disk_utilization_percentage{NODE}": "90x60"}, 10),
}
SILENT = {
    "CrossencNoProgress": {
        f"ray_crossenc_shards_remaining{RUN}": "100-1x60",
        f"ray_crossenc_shards_committed_total{RUN}": "0+1x60",
    },
    "CrossencRefusedShare": {
        f"ray_crossenc_pairs_refused_total{RUN}": "1x60",
        f"ray_crossenc_pairs_scored_total{RUN}": "150x60",
    },
    "CrossencShardRetries": {f"ray_crossenc_shard_retries_total{RUN}": "0x10 8x50"},
    "CrossencDeviceMemory": {f"ray_crossenc_out_of_memory_total{NODE}": "4x90"},
    "CrossencNodeMemory": {f"ray_memory_manager_worker_eviction_total{NODE}": "4x90"},
    "CrossencDiskFull": {f"ray_node_disk_utilization_percentage{NODE}": "80x60"},
}


def promtool_test(folder, rule, series, at_minutes, count):
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("needs promtool, of the package prometheus")
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "one", "rules": [rule]}]}))
    matches = f'count(ALERTS{{alertname="{rule["alert"]}", alertstate="firing"}}) or vector(0)'
    expected = {"expr": matches, "eval_time": f"{at_minutes}m", "exp_samples": [{"labels": "{}", "value": count}]}
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    test = {"interval": "1m", "input_series": inputs, "promql_expr_test": [expected]}
    body = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
    (folder / "test.yaml").write_text(yaml.safe_dump(body))
    done = subprocess.run([promtool, "test", "rules", "test.yaml"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_fires(rule, tmp_path):
    series, at_minutes = FIRES[rule["alert"]]
    promtool_test(tmp_path, rule, series, at_minutes, 1)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_is_silent_when_all_is_well(rule, tmp_path):
    promtool_test(tmp_path, rule, SILENT[rule["alert"]], 50, 0)
