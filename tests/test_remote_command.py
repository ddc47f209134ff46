"""mpdsgr validate --url: the report on a server, a server that dies, and one of another network."""

from pathlib import Path
from typing import Any

from conftest import QUICK_GATE, assert_input_error, mpdsgr_here, perturbed
from oip_server import Handler, OipServer
from over_url import FAST, INPUTS, linear, network
from ports import free_ports

from mpdsgr_deploy.bundle import Bundle, open_bundle
from mpdsgr_deploy.protocols import Predictor
from mpdsgr_deploy.runtime import open_predictor
from mpdsgr_deploy.validation.report import Report


def validated(bundle: Bundle, url: str, tmp_path: Path, report: str = "report") -> Any:
    (tmp_path / "gate.toml").write_text(QUICK_GATE)
    options = ["--gate", tmp_path / "gate.toml", "--report", tmp_path / report]
    return mpdsgr_here("validate", bundle.path, "--url", url, "--rate", FAST, *options)


def test_the_command_validates_a_server_and_goes_on_after_it_died(
    bundle: Bundle, network: Predictor, tmp_path: Path
) -> None:
    with OipServer(network, INPUTS, port=free_ports(1)[0]) as server:
        done = validated(bundle, server.url, tmp_path)
        assert done.returncode == 0, done.stderr
        whole = len(server.times)
    report = Report.model_validate_json((tmp_path / "report" / "report.json").read_text())
    assert (report.backend, report.artefact_file) == ("remote", server.url)

    def dies(handler: Handler, number: int) -> bool:
        if number == 9:
            handler.oip.stop()
            handler.close_connection = True
        return number == 9

    with OipServer(network, INPUTS, port=server.port, meddle=dies) as dying:
        done = validated(bundle, server.url, tmp_path, "again")
    assert_input_error(done, "cannot reach", "is the server running")
    with OipServer(network, INPUTS, port=server.port) as second:
        done = validated(bundle, server.url, tmp_path, "again")
    assert done.returncode == 0, done.stderr
    again = Report.model_validate_json((tmp_path / "again" / "report.json").read_text())
    assert (again.rows, again.health) == (report.rows, report.health)
    # asked twice: the golden batch, the clean images, and what was under way when the server died
    assert len(dying.times) + len(second.times) == whole + 3


def test_a_server_of_another_network_is_found_out(bundle: Bundle, tmp_path: Path) -> None:
    with OipServer(linear, INPUTS) as server:
        done = validated(bundle, server.url, tmp_path)
    assert done.returncode == 3
    assert "does not serve this bundle" in done.stderr
    other = open_bundle(perturbed(bundle, tmp_path / "other"))
    with open_predictor(other) as network, OipServer(network, INPUTS) as server:
        done = validated(bundle, server.url, tmp_path)
    assert done.returncode in (1, 3), done.stderr  # as the golden batch has it


def test_a_rate_of_nothing_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    done = mpdsgr_here("validate", bundle.path, "--url", "http://x/v2/models/n", "--rate", 0, "--report", tmp_path)
    assert_input_error(done, "--rate")
