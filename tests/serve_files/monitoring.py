"""Prometheus, its alerts and their tests, Grafana."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serve_files import HTTP, PROMTOOL, accepts, load
from serve_files.docker import compose


def alerts(serve: Path) -> dict[str, str]:
    """The expression of each alert."""
    groups = load(serve / "monitoring/alerts.yml")["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def dashboard(serve: Path) -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    found: dict[str, Any] = json.loads((serve / "monitoring/grafana/dashboards/mpdsgr.json").read_text())
    return found


def panel_queries(serve: Path) -> list[str]:
    """Every PromQL expression of the dashboard, its variables set."""
    found = [target["expr"] for panel in dashboard(serve)["panels"] for target in panel.get("targets", ())]
    return [re.sub(r"\$(instance|model)\b", ".*", query.replace("$__rate_interval", "5m")) for query in found]


def prometheus_reads_its_files(serve: Path) -> None:
    """With a key file, which it looks for; discovery of pods is cut out: Debian builds promtool without it."""
    monitoring = serve / "monitoring"
    key = monitoring / "prometheus-key"
    key.write_text("a key\n")
    try:
        accepts(PROMTOOL, "check", "config", "prometheus.yml", cwd=monitoring)
        whole = (monitoring / "prometheus-kubernetes.yml").read_text()
        rest = re.sub(r" {4}kubernetes_sd_configs:\n(?: {6}.*\n)+", "", whole)
        assert rest != whole
        (monitoring / "rest.yml").write_text(rest)
        accepts(PROMTOOL, "check", "config", "rest.yml", cwd=monitoring)
    finally:
        key.unlink()
        (monitoring / "rest.yml").unlink(missing_ok=True)


def prometheus_finds_the_server(serve: Path) -> None:
    services, prometheus = compose(serve)["services"], load(serve / "monitoring/prometheus.yml")
    (job,) = prometheus["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert target == f"server:{HTTP}"
    assert "server" in services
    mounted = {volume["target"] for volume in services["prometheus"]["volumes"]}
    names = [*prometheus["rule_files"], "prometheus.yml"]
    assert {f"/etc/prometheus/{name}" for name in names} <= mounted
    (secret,) = services["prometheus"]["secrets"]
    assert secret["target"] == f"/etc/prometheus/{job['authorization']['credentials_file']}"
    (source,) = load(serve / "monitoring/grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = load(serve / "monitoring/grafana/provisioning/dashboards/mpdsgr.yml")["providers"]
    grafana = {volume["target"] for volume in services["grafana"]["volumes"]}
    assert {provider["options"]["path"], "/etc/grafana/provisioning"} <= grafana
    for expression in alerts(serve).values():
        assert expression.count('job="mpdsgr"') == len(re.findall(r"\b(?:mpdsgr|process|up)\w*\s*\{", expression))


def rules_lint(serve: Path) -> None:
    accepts(PROMTOOL, "check", "rules", "--lint=all", "--lint-fatal", "alerts.yml", cwd=serve / "monitoring")


def rules_pass_their_tests(serve: Path) -> None:
    """And every alert is seen to fire, and to stay silent."""
    cases = [case for test in load(serve / "monitoring/alerts_test.yml")["tests"] for case in test["alert_rule_test"]]
    for firing in (True, False):
        assert {case["alertname"] for case in cases if bool(case.get("exp_alerts")) is firing} == alerts(serve).keys()
    accepts(PROMTOOL, "test", "rules", "alerts_test.yml", cwd=serve / "monitoring")


def dashboard_is_whole(serve: Path) -> None:
    """Its queries parse, its panels lie beside each other, and what they name is defined."""
    found, queries = dashboard(serve), panel_queries(serve)
    assert len(queries) > 20
    rules = [{"record": f"query:{index}", "expr": query} for index, query in enumerate(queries)]
    (serve / "queries.json").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    try:
        accepts(PROMTOOL, "check", "rules", "queries.json", cwd=serve)
    finally:
        (serve / "queries.json").unlink()
    variables = {variable["name"] for variable in found["templating"]["list"]}
    assert {"datasource", "model"} <= variables
    panels = [panel for panel in found["panels"] if panel["type"] != "row"]
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([(panel["datasource"], panel["targets"]) for panel in panels])))
    assert used == {*variables, "__rate_interval"}
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    cells = [cell for panel in found["panels"] for cell in _cells(**panel["gridPos"])]
    assert len(set(cells)) == len(cells)
    assert all(x < 24 for x, _ in cells)
    assert all(panel["description"] and panel["targets"] for panel in panels)


def _cells(h: int, w: int, x: int, y: int) -> Iterator[tuple[int, int]]:
    return ((column, row) for column in range(x, x + w) for row in range(y, y + h))
