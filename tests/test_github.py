"""What GitHub reads: forms, workflow and documents parse, follow its schema, and agree with the code."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from resdet.version import VERSION

ROOT = Path(__file__).resolve().parents[1]
GITHUB = ROOT / ".github"
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")

# https://docs.github.com/en/communities/using-templates-to-encourage-useful-issues-and-pull-requests
FORM_KEYS = {"name", "description", "body", "assignees", "labels", "title", "type", "projects"}
ATTRIBUTES = {
    "markdown": {"value"},
    "textarea": {"label", "description", "placeholder", "value", "render"},
    "input": {"label", "description", "placeholder", "value"},
    "dropdown": {"label", "description", "multiple", "options", "default"},
    "checkboxes": {"label", "description", "options"},
}
REQUIRED = {"markdown": {"value"}, "dropdown": {"label", "options"}, "checkboxes": {"options"}}


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def form_errors(form: Any) -> list[str]:
    errors = [f"unknown key {key}" for key in form.keys() - FORM_KEYS]
    errors += [f"no {key}" for key in ("name", "description", "body") if not form.get(key)]
    if all(element["type"] == "markdown" for element in form["body"]):
        errors.append("asks for nothing")
    ids = [element["id"] for element in form["body"] if "id" in element]
    errors += ["an id twice"] if len(set(ids)) < len(ids) else []
    errors += [f"id {name}" for name in ids if not re.fullmatch(r"[\w-]+", name)]
    labels = [element["attributes"]["label"] for element in form["body"] if "label" in element["attributes"]]
    errors += ["a label twice"] if len(set(labels)) < len(labels) else []
    for element in form["body"]:
        kind, attributes = element["type"], element["attributes"]
        errors += [f"unknown key {key}" for key in element.keys() - {"type", "id", "attributes", "validations"}]
        errors += [f"{kind}: unknown {key}" for key in attributes.keys() - ATTRIBUTES[kind]]
        errors += [f"{kind}: no {key}" for key in REQUIRED.get(kind, {"label"}) - attributes.keys()]
        if "validations" in element and not isinstance(element["validations"].get("required"), bool):
            errors.append(f"{kind}: validations")
    return errors


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_follow_githubs_schema(path: Path) -> None:
    assert form_errors(load(path)) == []
    broken = load(path)
    broken["body"][-1]["attributes"]["labels"] = broken["body"][-1]["attributes"].pop("label", "")
    assert form_errors(broken) != []


def test_a_bug_report_has_the_versions() -> None:
    body = load(GITHUB / "ISSUE_TEMPLATE" / "bug.yml")["body"]
    (versions,) = [element for element in body if element.get("id") == "versions"]
    assert "resdet --version" in versions["attributes"]["label"]
    assert versions["validations"]["required"]
    assert load(GITHUB / "ISSUE_TEMPLATE" / "config.yml").keys() <= {"blank_issues_enabled", "contact_links"}
    assert {path.stem for path in FORMS} == {"bug", "question", "feature"}


def test_the_workflow_runs_what_developers_run() -> None:
    workflow = load(GITHUB / "workflows" / "ci.yml")
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key "on" as true
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in job["steps"] if "uses" in step)
    (setup,) = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    assert setup["cache"] == "pip"
    assert (ROOT / setup["cache-dependency-path"]).is_file()
    pythons = job["strategy"]["matrix"]["python"]
    assert all(isinstance(python, str) for python in pythons)  # 3.10 as a number is 3.1
    oldest = re.search(r'requires-python = ">=(.*)"', (ROOT / "pyproject.toml").read_text())
    assert oldest
    assert pythons[0] == oldest[1]


def test_versions_come_from_one_place() -> None:
    changelog = (GITHUB / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\] - (Unreleased|\d{4}-\d\d-\d\d)$", changelog, re.MULTILINE)
    assert versions[0][0] == VERSION
    assert re.findall(r"^## (.*)$", changelog, re.MULTILINE) == [f"[{number}] - {when}" for number, when in versions]
    assert load(GITHUB / "CITATION.cff")["version"] == VERSION
    assert '[tool.hatch.version]\npath = "resdet/version.py"\n' in (ROOT / "pyproject.toml").read_text()


def test_the_citation_has_what_the_format_needs() -> None:
    citation = load(GITHUB / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["license"] == "Apache-2.0"
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year", "url"} <= reference.keys()
        assert all({"family-names", "given-names"} == author.keys() for author in reference["authors"])


DOCUMENTS = ["CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "PULL_REQUEST_TEMPLATE.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_name_what_exists(name: str) -> None:
    text = (GITHUB / name).read_text(encoding="utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        file, _, anchor = link.partition("#")
        path = GITHUB / file
        assert path.is_file(), link
        titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in {title.lower().replace(" ", "-") for title in titles}, link
    for path in re.findall(r"`((?:resdet|tests|tools|configs|\.ci|\.github)/[\w./]*)`", text):
        assert (ROOT / path).exists(), path
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for path in re.findall(r"\b((?:tests|tools|configs)/\S+)", block):
            assert (ROOT / path).exists(), path


def test_contributors_install_what_the_first_page_says() -> None:
    command = 'pip install -e ".[dev]"'
    assert command in (GITHUB / "CONTRIBUTING.md").read_text()
    assert command in (ROOT / "README.md").read_text()
