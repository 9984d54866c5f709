"""`seedloom report` in a real browser: it says what the manifest says, and no data runs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from jobs.report import gather as gathering
from tests.local_build import run
from tests.small_build import make_config, seeds_recipe, sketch_recipe

pytestmark = pytest.mark.usefixtures("one_backbone")

SCRIPT = "<script>alert(1)</script>"
SCORE = "tests_small_build_HashFilter_fraction"
IMAGE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")  # its event loop runs until then, and other tests have their own
def chromium():
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here: the report's page was not looked at in a browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Open a file as a person would; what a browser complains of, or loads from elsewhere, fails."""
    trouble: list[str] = []
    contexts = []

    def start(file: Path, width: int = 1280, scheme: str = "light"):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: trouble.append(message.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("dialog", lambda dialog: (trouble.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda request: trouble.append(request.url) if other(request.url) else None)
        page.goto(file.as_uri())
        return page

    def other(url: str) -> bool:
        return not url.startswith(("data:", "file:"))

    yield start
    for context in contexts:
        context.close()
    assert trouble == []


@pytest.fixture(scope="module")
def built(tmp_path_factory, drawings, tangram):
    """A build with seeds, a refinement, failures, and classes that are called as nobody should be."""
    folder = tmp_path_factory.mktemp("report")
    references = shutil.copytree(drawings, folder / "references")
    (references / "circle").rename(references / IMAGE)
    recipes = {
        "mixed": seeds_recipe(generate="tests.small_build:Sketch", refine="tests.small_build:Shaken"),
        "poisoned": sketch_recipe(generate={"method": "tests.small_build:Poisoned", "share": 0.1}),
    }
    targets = [
        {"classes": [IMAGE, "ring"], "accepted": 6, "recipe": "mixed"},
        {"classes": ["gear"], "accepted": 8, "recipe": "poisoned"},
    ]
    named_classes = {"uri": str(references), "names": {"gear": SCRIPT, IMAGE: "circle"}}
    path = make_config(folder, references, recipes=recipes, targets=targets, references=named_classes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.worker.load_backbone", lambda settings, device: tangram)
        result = run(path)
    assert any(r.failed for t in result.manifest.targets.values() for r in t.recipes.values())
    return folder / "out", result.manifest


@pytest.fixture
def page_file(built, tmp_path, seedloom):
    file = tmp_path / "pages" / "report.html"
    ended = seedloom("report", built[0], "--out", file)
    assert ended.code == 0
    assert ended.out.split() == [str(file)]
    return file


def cards(page) -> list[dict]:
    return json.loads(page.locator("#data").text_content())["cards"]


def shown(page) -> int:
    return int(page.locator("#count").inner_text().split()[0])


def choose(page, name: str, value: str) -> None:
    page.locator(f"#f-{name}").select_option(value)


def test_the_page_tells_what_the_manifest_says(built, page_file, open_page):
    page = open_page(page_file)
    _, manifest = built
    accounts = [(n, t, r) for n, t in manifest.targets.items() for r in t.recipes.values()]
    rows = [row.inner_text().split("\t") for row in page.locator("#targets tbody tr").all()]
    assert [[int(cell) for cell in row[3:5]] for row in rows] == [
        [r.quota, r.accepted] for _, _, r in accounts
    ]
    assert [[int(cell) for cell in row[6:9]] for row in rows] == [
        [r.surplus, r.failed, r.candidates] for _, _, r in accounts
    ]
    for name, _, account in accounts:
        own = [card for card in cards(page) if card["target"] == name]
        assert len(own) == account.candidates
        for verdict, count in (("accepted", account.accepted), ("failed", account.failed)):
            assert sum(card["verdict"] == verdict for card in own) == count
        for rule, count in account.rejected.items():
            assert sum(card["rule"] == rule for card in own) == count
    for chart in ("targets", "scores", "seeds", "time"):
        assert page.locator(f"#{chart}-chart canvas").count() == 1


def test_names_from_data_stay_text(page_file, open_page):
    page = open_page(page_file)
    assert SCRIPT in page.locator("#targets tbody").inner_text()
    choose(page, "target", IMAGE)
    page.locator(".tile").first.click()
    assert IMAGE in page.locator("#detail-body").inner_text()
    assert page.locator("img:not([src^='data:'])").count() == 0
    assert page.locator("script").count() == 3
    text = page_file.read_text()
    assert SCRIPT not in text
    assert IMAGE not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)


@pytest.mark.parametrize("verdict", ["accepted", "failed", "rejected", "rejected by HashFilter.fraction"])
def test_filters_show_what_they_name(page_file, open_page, verdict):
    page = open_page(page_file)
    every = cards(page)
    assert shown(page) == len(every)
    choose(page, "verdict", verdict)
    assert shown(page) == sum(card["verdict"] == verdict.split()[0] for card in every) > 0
    choose(page, "target", "gear")
    wanted = [c for c in every if c["verdict"] == verdict.split()[0] and c["target"] == "gear"]
    assert shown(page) == len(wanted)
    assert page.locator(".tile").count() == min(60, len(wanted))
    page.locator("button[type=reset]").click()
    page.wait_for_function(f"document.getElementById('count').textContent.startsWith('{len(every)} ')")


def test_scores_and_recipes_filter_too(page_file, open_page):
    page = open_page(page_file)
    every = cards(page)
    choose(page, "recipe", "mixed")
    assert shown(page) == sum(card["recipe"] == "mixed" for card in every)
    assert page.locator("#f-least").is_disabled()
    choose(page, "score", SCORE)
    page.locator("#f-least").fill("0.3")
    page.locator("#f-most").fill("0.8")
    inside = [c for c in every if 0.3 <= c["scores"].get(SCORE, -1) <= 0.8]
    assert shown(page) == sum(card["recipe"] == "mixed" for card in inside) > 0


def test_a_candidate_says_where_it_came_from_and_how_to_make_it_again(built, page_file, open_page, seedloom):
    page = open_page(page_file)
    choose(page, "recipe", "mixed")
    page.keyboard.press("Tab")  # the whole way by keyboard
    page.locator(".tile").nth(1).focus()
    page.keyboard.press("Enter")
    key = page.locator("#detail-title").inner_text()
    card = next(card for card in cards(page) if card["key"] == key)
    facts = page.locator("#detail-body dl").inner_text()
    assert card["verdict"] in facts
    assert str(card["scores"][SCORE]) in facts
    assert page.locator("#detail-body .strip img").count() == len(card["parents"]) + 1  # and the nearest
    assert page.locator("#losses-chart canvas").count() == (len(card["losses"]) > 0)
    command = page.locator("#detail-body .command pre").inner_text().split()
    assert command[0] == "seedloom"
    page.keyboard.press("ArrowRight")
    assert page.locator("#detail-title").inner_text() != key
    page.keyboard.press("Escape")
    assert not page.locator("#detail").is_visible()
    assert seedloom(*command[1:]).code == 0


def test_every_verdict_can_be_made_again_but_a_failure_says_that_it_is_one(page_file, open_page, seedloom):
    page = open_page(page_file)
    for verdict in ("accepted", "rejected", "failed"):
        card = next(card for card in cards(page) if card["verdict"] == verdict)
        ended = seedloom(*card["reproduce"].split()[1:])
        assert ended.code == (2 if verdict == "failed" else 0)
        assert ("made again: the same bytes" in ended.out) == (verdict != "failed")
        assert ("failed (ValueError: poison)" in ended.err) == (verdict == "failed")


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (360, "light"), (1600, "dark")])
def test_it_fits_the_screen_and_follows_its_colours(page_file, open_page, width, scheme):
    page = open_page(page_file, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.locator(".tile").first.click()
    box = page.locator("#detail").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", paper)[:3])) / 3
    assert (brightness < 80) == (scheme == "dark")


def test_pages_share_the_candidates_and_each_has_every_verdict(
    built, tmp_path, seedloom, monkeypatch, open_page
):
    output, manifest = built
    total = sum(r.candidates for t in manifest.targets.values() for r in t.recipes.values())
    size = -(-total // 2)
    monkeypatch.setattr(gathering, "CARDS", size)
    ended = seedloom("report", output, "--out", tmp_path / "r.html", "--pages", "all")
    assert [Path(line).name for line in ended.out.split()] == ["r.html", "r-2.html"]
    first, second = (cards(open_page(tmp_path / name)) for name in ("r.html", "r-2.html"))
    assert len(first) == size
    keys = [card["key"] for card in (*first, *second)]
    assert len(set(keys)) == len(keys) == total
    assert {card["verdict"] for card in first} == {card["verdict"] for card in (*first, *second)}
    page = open_page(tmp_path / "r.html")
    page.get_by_role("link", name="page 2").click()
    assert page.url.endswith("r-2.html")
    shorter = seedloom("report", output, "--out", tmp_path / "one.html")
    assert f"{size} of {total} candidates; the others with --pages all" in shorter.out
    assert not (tmp_path / "one-2.html").exists()


def test_a_full_page_of_noise_stays_below_its_limit(tmp_path):
    """Noise is what compresses worst."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    sizes = [len(gathering._thumbnail(Image.fromarray(noise))) for _ in range(2)]
    assert max(sizes) * (gathering.CARDS + gathering.REFERENCES) < 9_000_000


def test_a_build_without_references_filters_or_run_has_a_page_too(tmp_path, seedloom, open_page):
    path = make_config(tmp_path, recipes={"plain": sketch_recipe()}, filter=[],
                       targets=[{"classes": ["circle"], "accepted": 4}])  # fmt: skip
    run(path)
    for file in (tmp_path / "out").glob("builds/*/run.json"):
        file.unlink()
    assert seedloom("report", tmp_path / "out", "--out", tmp_path / "r.html").code == 0
    page = open_page(tmp_path / "r.html")
    assert page.locator("section").count() == 3
    assert shown(page) == 4


@pytest.mark.parametrize("pages", ["0", "-1", "some", "1.5"])
def test_what_is_no_number_of_pages_is_refused(built, tmp_path, seedloom, pages):
    ended = seedloom("report", built[0], "--out", tmp_path / "r.html", "--pages", pages)
    assert ended.code == 2
    assert "allowed are all, or a whole number from 1 up" in ended.err
    assert not (tmp_path / "r.html").exists()
