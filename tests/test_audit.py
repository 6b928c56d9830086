"""`make sbom` and `make audit`: the package's libraries, licences and known vulnerabilities."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from packaging.version import Version
from test_sbom import by_name, properties, validated

from benchmarks.supply_chain import audit
from benchmarks.supply_chain.advisories import (
    ADVISORIES,
    Advisory,
    affecting,
    read_advisories,
    refresh,
)
from benchmarks.supply_chain.requirements import ROOT, lowest_versions, pinned_versions
from benchmarks.supply_chain.sbom import main as write_package_sbom

RECORDS = {
    "PYSEC-1": {
        "id": "PYSEC-1",
        "aliases": ["GHSA-1", "CVE-2030-1"],
        "affected": [
            {
                "package": {"ecosystem": "PyPI", "name": "Pillow"},
                "ranges": [
                    {"type": "GIT", "events": [{"introduced": "abc"}]},
                    {
                        "type": "ECOSYSTEM",
                        "events": [
                            {"introduced": "0"},
                            {"fixed": "2"},
                            {"introduced": "3"},
                            {"last_affected": "99"},
                        ],
                    },
                ],
            },
            {"package": {"ecosystem": "npm", "name": "pillow"}, "ranges": []},
        ],
    },
    "PYSEC-2": {"id": "PYSEC-2", "withdrawn": "2030-01-01T00:00:00Z", "affected": []},
}


class Osv(BaseHTTPRequestHandler):
    """Answers like OSV, with a page more for pillow."""

    def do_POST(self) -> None:
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        self.answer({"results": [self.result(query) for query in queries]})

    def result(self, query: dict) -> dict:
        if query["package"]["name"] != "pillow":
            return {}
        if "page_token" in query:
            return {"vulns": [{"id": "PYSEC-2"}]}
        return {"vulns": [{"id": "PYSEC-1"}], "next_page_token": "more"}

    def do_GET(self) -> None:
        self.answer(RECORDS[self.path.rpartition("/")[2]])

    def answer(self, document: dict) -> None:
        content = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *values: object) -> None:
        """No lines in the test's output."""


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Osv) as osv:
        thread = threading.Thread(target=osv.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{osv.server_port}/v1"
        osv.shutdown()
        thread.join()


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "advisories.json"
    entries = [{"library": "gdcm", "identifier": "CVE-1", "last_affected": "3"}]
    path.write_text(json.dumps({"date": "2030-01-01", "source": "test", "advisories": entries}))
    return path


def test_the_pinned_libraries_pass_without_a_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main([]) == 0
    printed = capsys.readouterr().out
    listing = read_advisories(ADVISORIES)
    assert f"up to {listing.date}, {listing.source}" in printed
    assert "0 advisories hit them" in printed
    assert "licences     0 not allowed" in printed
    assert printed.endswith("passed\n")


def test_a_hit_of_a_pinned_version_fails_and_names_the_fix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pins = tmp_path / "constraints.txt"
    pins.write_text("# pins\nPillow==10.2.0\nnumpy==2.0  # why\n")
    assert audit.main(["--constraints", str(pins)]) == 1
    printed = capsys.readouterr().out
    assert "pinned       2 libraries, 1 advisories hit them" in printed
    assert "pillow: CVE-2024-28219, fixed in 10.3.0" in printed
    assert printed.endswith("FAILED\n")


def test_a_licence_that_is_not_allowed_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = tmp_path / "licences.json"
    data = json.loads(audit.LICENCES.read_text())
    policy.write_text(json.dumps({**data, "allowed": sorted({*data["allowed"]} - {"MPL-2.0"})}))
    assert audit.main(["--licences", str(policy)]) == 1
    assert "certifi: MPL-2.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("(MIT OR GPL-3.0-only) AND Apache-2.0", True),
        ("", False),
    ],
)
def test_expressions_are_read(expression: str, allowed: bool) -> None:
    assert audit.is_allowed(expression, audit.read_policy(audit.LICENCES)) == allowed


def test_advisories_know_their_versions() -> None:
    ranges = [
        Advisory(library="a", identifier="1", introduced="1.0", fixed="2.0"),
        Advisory(library="a", identifier="2", last_affected="1.5"),
        Advisory(library="a", identifier="3", introduced="1.10"),
    ]
    hits = {
        version: [advisory.identifier for advisory in affecting({"a": version}, ranges)]
        for version in ("0.9", "1.0", "1.5", "1.9", "1.10", "2.0")
    }
    assert hits == {
        "0.9": ["2"],
        "1.0": ["1", "2"],
        "1.5": ["1", "2"],
        "1.9": ["1"],
        "1.10": ["1", "3"],
        "2.0": ["3"],
    }


def test_a_refresh_asks_osv_and_keeps_what_it_does_not_list(server: str, stored: Path) -> None:
    today = date(2031, 1, 2)
    listing = refresh(["numpy", "pillow"], stored, server=server, today=today)
    assert read_advisories(stored) == listing
    assert (listing.date, listing.source, listing.age_days(today)) == ("2031-01-02", server, 0)
    assert listing.advisories == (
        Advisory(library="gdcm", identifier="CVE-1", last_affected="3"),
        Advisory(library="pillow", identifier="CVE-2030-1", introduced="0", fixed="2"),
        Advisory(library="pillow", identifier="CVE-2030-1", introduced="3", last_affected="99"),
    )


def test_without_an_answer_the_stored_list_is_used(
    stored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = stored.read_bytes()
    options = ["--refresh", "--server", "http://127.0.0.1:9/v1", "--advisories", str(stored)]
    assert audit.main(options) == 0
    printed = capsys.readouterr()
    assert "not refreshed: http://127.0.0.1:9/v1 does not answer" in printed.err
    assert "1 up to 2030-01-01, test" in printed.out
    assert stored.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", '{"date": "x", "source": "", "advisories": []}'])
def test_a_damaged_list_is_an_error(text: str, stored: Path) -> None:
    stored.write_text(text)
    assert audit.main(["--advisories", str(stored)]) == 2


def test_every_lowest_version_is_below_its_pin() -> None:
    pins = pinned_versions(ROOT / "constraints.txt")
    lowest = lowest_versions(ROOT / "pyproject.toml")
    shared = pins.keys() & lowest.keys()
    assert len(shared) > 40
    assert [name for name in shared if Version(lowest[name]) > Version(pins[name])] == []


def test_the_packages_bill_lists_its_libraries(tmp_path: Path) -> None:
    path = tmp_path / "package.cdx.json"
    assert write_package_sbom([str(path)]) == 0
    document = validated(path)
    assert document["metadata"]["component"]["name"] == "medsa-deploy"
    libraries = by_name(document, "library")
    assert libraries["onnxruntime"]["scope"] == "required"
    assert libraries["torch"]["scope"] == "optional"
    assert "export" in properties(libraries["torch"])["extras"].split()
    assert "pytest" not in libraries
    edges = {edge["ref"]: edge.get("dependsOn", []) for edge in document["dependencies"]}
    numpy = libraries["numpy"]["bom-ref"]
    assert numpy in edges[libraries["onnxruntime"]["bom-ref"]]
