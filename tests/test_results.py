"""The results page shows what the results files hold, and nothing else."""

import sys
from pathlib import Path

TRAIN = Path(__file__).parent.parent / "train"
sys.path.insert(0, str(TRAIN))

import results  # noqa: E402


def test_the_page_quotes_the_files() -> None:
    found = results.load()
    assert found
    page = results.PAGE.read_text()
    shown = page.partition(results.BEGIN)[2].partition(results.END)[0]
    assert shown == results.render(found)


def test_every_file_says_where_it_comes_from() -> None:
    for name, result in results.load().items():
        report = result["report"]
        assert report["verdict"] in ("pass", "fail"), name
        assert report["provenance"]["hardware"]["cpu"], name
        assert result["training_provenance"]["packages"]["torch"], name
        assert result["recipe"]["data"]["root"] == "data", name
        assert all(row["n"] == report["rows"][0]["n"] > 0 for row in report["rows"]), name
