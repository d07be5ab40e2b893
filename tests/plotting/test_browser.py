"""The page in headless Chromium: what a reader sees and can point at, at two sizes and modes."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from helpers.readouts import contrast, readout, result_of, small

pytest.importorskip("playwright", reason="playwright is in the extra 'dev'")
from playwright.sync_api import Page, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no chromium: apt-get install chromium"
)
SIZES = [(1280, 800), (400, 800)]


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    hostile = small("W_out")
    hostile.vocabulary[int(hostile.top_ids[2, 1, 0])] = "<script>document.title = 'x'</script>"
    return result_of(readout("W_in", list(range(30)), 4, top_k=10), hostile).to_html(
        tmp_path_factory.mktemp("page") / "page.html"
    )


@pytest.fixture(params=SIZES, ids=["wide", "narrow"])
def page(browser, path, request):
    """The page, offline; a request for anything else or a script's error fails the test."""
    width, height = request.param
    context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
    page = context.new_page()
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(path.as_uri())
    yield page
    assert asked == [path.as_uri()] and errors == []
    context.close()


def card_of(page: Page, cell):
    return cell.locator(".card")


def test_cells_are_there_and_the_page_does_not_scroll_sideways(page):
    assert page.locator("table").count() == 2
    assert page.locator("table").nth(0).locator("td").count() == 30 * 4
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    cell = page.locator("table").nth(1).locator("td").first
    assert cell.evaluate("cell => parseFloat(getComputedStyle(cell).fontSize)") >= 11


def test_a_cell_shows_its_card_inside_the_window_when_pointed_at(page):
    cell = page.locator("table").nth(0).locator("td").nth(4)
    card = card_of(page, cell)
    assert not card.is_visible()
    cell.scroll_into_view_if_needed()
    cell.hover()
    assert card.is_visible()
    assert "W_in·28.0·top9" in card.inner_text() and "rank 612 of 1000" in card.inner_text()
    box, size = card.bounding_box(), page.viewport_size
    assert box["x"] >= 0 and box["x"] + box["width"] <= size["width"]
    assert box["y"] >= 0 and box["y"] + box["height"] <= size["height"]
    page.mouse.move(0, 0)
    assert not card.is_visible()


@pytest.mark.parametrize("y", [400, 550, 700])
@pytest.mark.parametrize("column", [0, 3])
def test_a_card_leaves_its_cell_in_view(page, y, column):
    """Wherever in the window the cell is, the card is above, below or beside it."""
    cell = page.locator("table").nth(0).locator("td").nth(4 * 20 + column)
    cell.evaluate(
        """(cell, y) => {
            const scroll = cell.closest(".scroll");
            scroll.scrollIntoView();
            scroll.scrollTop += cell.getBoundingClientRect().top - y;
            cell.focus({preventScroll: true});
        }""",
        y,
    )
    box, card = cell.bounding_box(), card_of(page, cell).bounding_box()
    assert box["y"] == pytest.approx(y, abs=1)
    assert card["y"] >= 0 and card["y"] + card["height"] <= page.viewport_size["height"]
    assert any(
        one[at] + one[size] <= other[at]
        for one, other in ((card, box), (box, card))
        for at, size in (("x", "width"), ("y", "height"))
    )


def test_the_headings_of_a_card_are_whole(page):
    cell = page.locator("table").nth(1).locator("td").first
    cell.focus()
    for column in card_of(page, cell).locator("pre").all():
        heading, width = column.evaluate(
            """pre => {
                const range = document.createRange(), text = pre.firstChild;
                range.setStart(text, 0);
                range.setEnd(text, text.data.indexOf("\\n"));
                return [range.getBoundingClientRect().width, pre.clientWidth];
            }"""
        )
        assert 0 < heading <= width


def test_the_keyboard_opens_a_card_too(page):
    cell = page.locator("table").nth(1).locator("td").nth(5)
    cell.focus()
    assert card_of(page, cell).is_visible()


def test_a_script_in_a_token_is_text(page):
    assert page.title() != "x"
    assert page.get_by_text("<script>document.title").count() >= 1


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_contrast_as_it_is_rendered(browser, path, mode, tmp_path):
    """Text against its cell's own background, by WCAG's formula, in each mode."""
    context = browser.new_context(color_scheme=mode, viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.goto(path.as_uri())
    colours = page.locator("td[style]").evaluate_all(
        """cells => cells.map(cell => [getComputedStyle(cell).backgroundColor,
            ...[...cell.querySelectorAll(":scope > bdi")].map(t => getComputedStyle(t).color)])"""
    )
    assert len(colours) == 30 * 4 + 3 * 4
    for background, *texts in colours:
        for text in texts:
            assert contrast(rendered(text), rendered(background)) >= 4.5
    shot = page.screenshot(path=tmp_path / f"{mode}.png")
    assert shot.startswith(b"\x89PNG")
    page_colour = rendered(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (page_colour.mean() > 0.5) == (mode == "light")
    context.close()


def rendered(colour: str) -> torch.Tensor:
    """Of ``rgb(1, 2, 3)`` or ``color(srgb 0.1 0.2 0.3)``."""
    numbers = re.findall(r"[\d.]+", colour)
    return torch.tensor(list(map(float, numbers[:3]))) / (1 if "srgb" in colour else 255)
