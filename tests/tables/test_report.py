"""The HTML page, looked at and clicked in a real browser without a window."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from peftcli.tables.report import page
from peftcli.tables.runs import read_runs
from peftcli.tables.table import Asked, plan_of, table_of
from tests.tables.conftest import WriteRun

if TYPE_CHECKING:
    from tests.conftest import Cli

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
EVIL = "<script>document.title='taken'</script><img src=x onerror=document.title='taken'>"
ACTIONS = """<script>
const say = (name, value) => { document.documentElement.dataset[name] = String(value); };
const first = (id) => document.querySelector(`#${id} tbody tr:not([hidden]) td`).textContent;
say("title", document.title);
say("resources", performance.getEntriesByType("resource").length);
say("images", document.images.length);
const names = [...document.querySelectorAll("#runs tbody tr td:first-child")];
say("names", names.map((node) => node.textContent).join("|"));
say("curves", document.querySelectorAll("#curves path.curve").length);
say("dots", document.querySelectorAll("#costs circle").length);
say("before", first("table"));
const heads = document.querySelectorAll("#table th button");
heads[1].click(); say("ascending", first("table"));
heads[1].click(); say("descending", first("table"));
const svg = document.querySelector("#curves svg"), box = svg.getBoundingClientRect();
for (let y = box.top; y < box.bottom && document.getElementById("tip").hidden; y += 5) {
  const place = { clientX: box.left + box.width / 2, clientY: y };
  svg.dispatchEvent(new PointerEvent("pointermove", place));
}
say("tip", document.getElementById("tip").textContent);
const filter = document.getElementById("filter");
filter.value = "IA3"; filter.dispatchEvent(new Event("input"));
say("count", document.getElementById("count").textContent);
say("hiddenCurves", document.querySelectorAll("#curves path.curve[hidden]").length);
</script></body>"""


def write_page(runs: Path, to: Path, **asked: object) -> Path:
    records = read_runs([runs])
    plan = plan_of(records, Asked(**asked))
    to.write_text(page(records, table_of(records, plan), plan))
    return to


def looked_at(path: Path, tmp_path: Path) -> dict[str, str]:
    """What the page says of itself after the actions."""
    if BROWSER is None:
        pytest.skip("no chromium is installed: the report is not looked at in a browser")
    tried = path.with_suffix(".tried.html")
    tried.write_text(path.read_text().replace("</body>", ACTIONS))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'browser'}", tried.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    said = re.search(r"<html ([^>]*)>", done.stdout)
    assert said, done.stderr
    return {k: html.unescape(v) for k, v in re.findall(r'data-([\w-]+)="([^"]*)"', said[1])}


def test_two_hundred_runs_are_drawn_sorted_filtered_and_hovered(
    write_run: WriteRun, tmp_path: Path
) -> None:
    for i in range(200):
        method = ("lora", "ia3", "oft", "full")[i % 4]
        losses = tuple(1 / (step + 1 + i % 7) for step in range(300))
        write_run(f"runs/{i:03}", 0.5 + (i % 4) / 10, method=method, seed=i // 4, losses=losses)
    said = looked_at(write_page(tmp_path / "runs", tmp_path / "report.html"), tmp_path)
    assert said["resources"] == "0"  # nothing is fetched
    assert said["curves"] == "200"
    assert said["dots"] == "4"
    assert (said["before"], said["ascending"], said["descending"]) == ("full", "lora", "full")
    assert re.fullmatch(r".*runs/\d+: loss [\d.]+ at step \d+", said["tip"])
    assert said["count"] == "50 of 200 runs"
    assert said["hidden-curves"] == "150"
    assert int(said["rendered-after-ms"]) < 4000  # about 400 on an idle core


def test_names_that_look_like_markup_are_text(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_run("runs/a", 0.9, name=EVIL, **{"dataset.prompt": EVIL + " {text}"})
    write_run("runs/<b onclick=x>&amp;", 0.8, seed=1, **{"dataset.prompt": EVIL + " {text}"})
    path = write_page(tmp_path / "runs", tmp_path / "report.html", rows=("name",))
    text = path.read_text()
    assert EVIL not in text
    assert text.count("</script>") == 2  # the data's and the script's own
    said = looked_at(path, tmp_path)
    assert said["title"] == "accuracy by name"
    assert said["images"] == "0"
    assert said["names"] == "runs/<b onclick=x>&amp;|runs/a"
    assert folder.is_dir()


def test_the_page_asks_nothing_of_the_network(write_run: WriteRun, tmp_path: Path) -> None:
    write_run("runs/a", 0.9, losses=(1.0, float("nan"), 0.5))
    text = write_page(tmp_path / "runs", tmp_path / "report.html").read_text()
    assert "default-src 'none'" in text
    addresses = set(re.findall(r"https?://[^\s\"')]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"\b(src|href)=", text)
    data = re.search(r'id="data">(.*?)</script>', text, re.DOTALL)
    assert data
    assert json.loads(data[1])["runs"][0]["curves"]["loss"] == [[1, 1.0], [3, 0.5]]


def test_the_verb_writes_the_page(write_run: WriteRun, tmp_path: Path, cli: Cli) -> None:
    write_run("runs/a", 0.9)
    cli("report", tmp_path / "runs", "--output", "made/report.html")
    assert "<title>" in Path("made/report.html").read_text()
