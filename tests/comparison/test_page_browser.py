"""The page of runs in a real browser without a network: it is drawn, fits, and can be used."""

import contextlib
import shutil

import pytest
from PIL import Image

from modeling.comparison.charts import colour_of
from modeling.comparison.page import write_page
from modeling.comparison.summaries import read_summaries
from tests.comparison.runs import noisy
from tests.comparison.test_page import HOSTILE, draw_grid

playwright = pytest.importorskip("playwright.sync_api", reason="playwright (requirements-dev.txt) is not installed")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome is installed"),
]

# How many pixels of a chart have this colour, up to antialiasing.
COUNT = """([name, colour]) => {
    const canvas = document.querySelector(`[data-chart=${name}] canvas`);
    const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    const wanted = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
    let count = 0;
    for (let i = 0; i < pixels.length; i += 4) {
        count += wanted.every((value, part) => Math.abs(pixels[i + part] - value) < 4) && pixels[i + 3] > 250;
    }
    return count;
}"""


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium, tmp_path):
    """Opens the page of these folders; afterwards nothing was requested, reported or asked by it."""

    @contextlib.contextmanager
    def open_page(folders, width=1600, scheme="light"):
        path, events = tmp_path / "report.html", []
        write_page(read_summaries(folders)[0], path)
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("request", lambda request: events.append(request.url))
        page.on("console", lambda message: events.append(message.text))
        page.on("pageerror", lambda error: events.append(str(error)))
        page.on("dialog", lambda dialog: events.append(dialog.message))
        page.goto(path.as_uri())
        page.wait_for_selector(f"body[data-drawn={scheme}]")
        yield page
        context.close()
        assert [event for event in events if not event.startswith(("data:image/", "Canvas2D"))] == [path.as_uri()]

    return open_page


def whole_run(write_run, number, **changes):
    """A run's folder with a line of every kind and three grids."""
    folder = write_run(noisy(number), f"run{number}", seed=number, **changes)
    lines = (folder / "metrics.jsonl").read_text()
    more = '{"train/loss_smoothed": 0.05, "train/lr": 0.001, "images_per_second": 250.5, '
    (folder / "metrics.jsonl").write_text(lines.replace("{", more))
    for step, colour in ((25, "red"), (50, "green"), (75, "blue")):
        draw_grid(folder, step, colour)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1600])
@pytest.mark.parametrize("num_runs", [1, pytest.param(20, marks=pytest.mark.long)])
def test_charts_are_drawn_and_nothing_is_wider_than_the_window(opened, write_run, num_runs, width, scheme):
    folders = [whole_run(write_run, number) for number in range(num_runs)]
    with opened(folders, width, scheme) as page:
        for chart in ("loss", "bins", "lr", "speed"):
            assert page.evaluate(COUNT, [chart, colour_of(num_runs - 1)]) > 50  # the last one lies on top
        assert page.evaluate("document.documentElement.scrollWidth") == width
        boxes = "[...document.querySelectorAll('canvas, img:not([hidden]), pre, .card')]"
        assert page.evaluate(f"Math.max(...{boxes}.map((box) => box.getBoundingClientRect().right))") <= width


def test_the_slider_moves_all_grids_by_keyboard(opened, write_run):
    with opened([whole_run(write_run, number) for number in range(2)]) as page:
        shown = "[...document.querySelectorAll('[data-frames] img:not([hidden])')].map((picture) => picture.alt)"
        assert [alt.rpartition(" at ")[2] for alt in page.evaluate(shown)] == [
            "step 75, ema weights", "step 75, raw weights",
        ] * 2  # fmt: skip
        page.get_by_role("slider", name="Step").focus()
        page.keyboard.press("ArrowLeft")
        assert [alt.split(" at ")[1][:7] for alt in page.evaluate(shown)] == ["step 50"] * 4
        assert page.get_by_role("slider", name="Step").get_attribute("aria-valuetext") == "step 50"
        page.keyboard.press("Home")
        assert page.locator("output").inner_text() == "step 25"
        assert page.get_by_text("EMA, step 25").count() == 2


def test_a_run_can_be_left_out_everywhere_by_keyboard(opened, write_run):
    with opened([whole_run(write_run, number) for number in range(2)]) as page:
        before = page.evaluate(COUNT, ["speed", colour_of(1)])
        box = page.get_by_role("checkbox").nth(1)
        box.focus()
        page.keyboard.press("Space")
        page.wait_for_timeout(300)
        assert before > 50
        assert page.evaluate(COUNT, ["speed", colour_of(1)]) == 0
        assert page.locator(".card:visible").count() == 1
        page.keyboard.press("Space")
        page.wait_for_timeout(300)
        assert page.evaluate(COUNT, ["speed", colour_of(1)]) == before
        page.get_by_role("button", name="none").press("Enter")
        assert page.locator(".card:visible").count() == 0
        page.get_by_role("button", name="all").press("Enter")
        assert page.locator(".card:visible").count() == 2


def test_a_strange_name_does_nothing_and_is_shown_as_it_is(opened, write_run):
    folders = [whole_run(write_run, 0, model__name=HOSTILE), whole_run(write_run, 1, dataset__name=HOSTILE)]
    with opened(folders) as page:
        assert page.get_by_text(HOSTILE).count() > 1
        canvas = page.locator("[data-chart=loss] canvas")
        canvas.scroll_into_view_if_needed()
        box, tooltip = canvas.bounding_box(), page.locator("#vg-tooltip-element.visible")
        for share in range(100):  # down through the chart, until a point is under the pointer
            page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * share / 100)
            if tooltip.count():
                break
        assert HOSTILE[:20] in tooltip.inner_text()
        assert page.locator("[onerror]").count() == 0


def test_what_a_page_would_load_or_run_is_forbidden(chromium, write_run, tmp_path):
    write_page(read_summaries([write_run(noisy(0))])[0], tmp_path / "report.html")
    with chromium.new_page() as page:
        page.goto((tmp_path / "report.html").as_uri())
        assert page.evaluate("""async () => {
            const refused = [];
            document.addEventListener("securitypolicyviolation", (event) => refused.push(event.effectiveDirective));
            await fetch("https://example.org/").catch(() => 0);
            document.body.append(Object.assign(new Image(), {src: "https://example.org/a.png"}));
            document.body.append(Object.assign(document.createElement("script"), {textContent: "window.ran = 1"}));
            await new Promise((done) => setTimeout(done, 300));
            return [...refused.toSorted(), String(window.ran)];
        }""") == ["connect-src", "img-src", "script-src-elem", "undefined"]


def test_a_run_without_a_line_has_a_page_without_charts(opened, write_run):
    folder = write_run([], is_finished=False)
    (folder / "samples").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "samples" / "inputs.png")
    with opened([folder], width=390) as page:
        assert page.get_by_text("No run has written a line yet.").is_visible()
        assert page.get_by_alt_text("Images that a run was trained on").is_visible()
        assert page.locator("canvas").count() == 0


def test_a_run_in_progress_is_drawn_beside_one_that_has_just_begun(opened, write_run):
    folders = [write_run(noisy(0)[:3], is_finished=False), write_run([], "begun", is_finished=False, seed=1)]
    with opened(folders) as page:
        assert page.get_by_text("its first line comes at step 25").is_visible()
        assert page.locator("canvas").count() == 3  # no losses by timestep yet
