"""The page of a report in a real browser: it says no error, its switches work, and everybody can read it."""

import itertools
from pathlib import Path

import pytest

from made_runs import HOSTILE, patients, write_evaluation, write_run
from ultrarefiner.results import report

PHONE, DESKTOP = (390, 844), (1280, 900)


@pytest.fixture(scope="module")
def page_file(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    cases = patients(0, ids=HOSTILE)
    run = write_run(root / "runs", "seed=1", name="one", cases=cases)
    write_evaluation(run / "evaluation", cases, 1)
    write_run(root / "runs", "seed=1", "fold=1", name="two")
    report.write(root / "runs", root / "out", "<script>alert(1)</script>", 10, 3)
    return root / "out" / "index.html"


@pytest.fixture
def visit(browser, page_file):
    """Open the page in a window of a size; nothing may go wrong or be fetched until the test ends."""
    contexts, wrong = [], []

    def opened(size: tuple[int, int], scheme: str = "light", anchor: str = ""):
        context = browser.new_context(viewport=dict(zip(("width", "height"), size, strict=True)), color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith(("data:", page_file.as_uri())) else wrong.append(r.url))
        page.goto(page_file.as_uri() + anchor)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong, wrong


def seen(page, mask: str) -> str:
    """Whether the outlines of a mask are shown, as the browser computes it inside the pictures."""
    return page.evaluate(
        f"getComputedStyle(document.querySelector('.gallery')).getPropertyValue('--{mask}-shown').trim()"
    )


def test_the_switches_show_and_hide_outlines(visit):
    page = visit(DESKTOP)
    picture = page.locator(".gallery svg").first
    before = picture.screenshot()
    for mask in ("truth", "coarse", "refined"):
        box = page.get_by_role("checkbox", name=mask, exact=True)
        assert box.is_checked() and seen(page, mask) == "visible"
        box.uncheck()
        assert seen(page, mask) == "hidden"
    without = picture.screenshot()
    assert without != before
    page.get_by_role("checkbox", name="refined", exact=True).check()
    assert picture.screenshot() not in (before, without)


def test_a_point_and_a_picture_open_their_case(visit):
    page = visit(DESKTOP)
    dialog = page.get_by_role("dialog")
    page.locator(".gallery button").first.click()
    first = dialog.get_by_role("heading").inner_text()
    assert first and "coarse" in dialog.inner_text() and dialog.locator("svg").is_visible()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    point = page.locator(".dots a").first
    name = point.get_attribute("aria-label")
    point.dispatch_event("click")
    page.wait_for_function("document.querySelector('dialog').open")
    assert name.startswith(dialog.get_by_role("heading").inner_text())
    dialog.get_by_role("button", name="Close").click()
    page.wait_for_function("!location.hash")  # the dialog tells a moment later that it is closed
    assert "#case" not in page.url


def test_hostile_names_are_text_in_a_case_too(visit):
    for index, name in enumerate(HOSTILE):
        page = visit(DESKTOP, anchor=f"#case-{index}")
        assert page.get_by_role("dialog").get_by_role("heading").inner_text() == name


def test_a_case_without_a_picture_opens_as_well(visit):
    page = visit(PHONE)
    page.evaluate("location.hash = '#case-12'")  # the first of the run that nobody has evaluated
    page.wait_for_function("document.querySelector('dialog').open")
    assert not page.get_by_role("dialog").locator("svg").is_visible()


@pytest.mark.parametrize("size", [PHONE, DESKTOP])
def test_nothing_is_wider_than_the_window(visit, size):
    page = visit(size)
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]


def test_the_keyboard_reaches_pictures_and_tables(visit):
    page = visit(DESKTOP)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator(".gallery button").first.focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").is_visible()
    assert page.evaluate("[...document.querySelectorAll('.scroll')].every(one => one.tabIndex === 0 && one.ariaLabel)")


def test_levels_of_headings_and_descriptions_of_pictures(visit):
    page = visit(DESKTOP)
    levels = page.evaluate("[...document.querySelectorAll('main h2, main h3, main h4')].map(h => Number(h.tagName[1]))")
    assert page.locator("h1").count() == 1 and levels[0] == 2
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert page.evaluate("[...document.images].every(one => one.alt)")
    assert page.evaluate(
        "[...document.querySelectorAll('svg[role]')].every(s => s.ariaLabel || s.ariaLabelledByElements)"
    )


def test_printed_it_shows_results_and_no_switches(visit):
    page = visit(DESKTOP)
    page.emulate_media(media="print")
    assert not page.locator("fieldset").is_visible() and not page.locator("nav").is_visible()
    assert page.locator("table").first.is_visible()


@pytest.mark.parametrize(("size", "scheme"), [(PHONE, "light"), (DESKTOP, "dark")])
def test_axe_finds_no_fault(visit, axe, size, scheme):
    page = visit(size, scheme)
    page.evaluate(axe)
    for step in ("page", "case"):
        if step == "case":
            page.locator(".gallery button").first.click()
        faults = page.evaluate("axe.run().then(found => found.violations.map(v => [v.id, v.impact, v.nodes[0].html]))")
        assert not faults, (step, faults)
