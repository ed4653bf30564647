"""What a person sees of a run in the real MLflow UI, in a real browser. Screenshots stay in ``screenshots/``."""

import itertools
import shutil
from pathlib import Path

import pytest
from conftest import write_images
from servers import running_server
from training import SMALL

from mlflow_ssl.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SCREENSHOTS = Path(__file__).with_name("screenshots")
SECONDS = 60_000
"""A page's longest wait, in milliseconds."""


class Shown:
    """A finished run on a server."""

    def __init__(self, server):
        self.client = server.client
        self.uri = server.uri
        experiment = self.client.get_experiment_by_name("byol")
        (self.run,) = self.client.search_runs([experiment.experiment_id])
        self.page = f"{self.uri}/#/experiments/{experiment.experiment_id}/runs/{self.run.info.run_id}"


@pytest.fixture(scope="module")
def shown(tmp_path_factory, migrated_store):
    """Train for real, with pictures, against a real server."""
    if BROWSER is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    here = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch, running_server(here, migrated_store) as server:
        patch.chdir(here)
        patch.setenv("MLFLOW_TRACKING_URI", server.uri)
        images = write_images(here / "parts", {"good": 24, "scratched": 24, "bent": 24}, size=24)
        words = ["trainer.max_epochs=4", "trainer.check_val_every_n_epoch=2", f"data_path={images}"]
        assert main([*SMALL, *words]) == 0
        yield Shown(server)


@pytest.fixture(scope="module")
def browser(shown):
    from playwright.sync_api import sync_playwright

    SCREENSHOTS.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=list(QUIET))
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, request):
    """Return an empty tab, and keep a picture of how the test left it."""
    tab = browser.new_page(viewport={"width": 1800, "height": 1100})
    tab.set_default_timeout(SECONDS)
    yield tab
    tab.screenshot(path=SCREENSHOTS / f"{request.node.name}.png")
    tab.close()


def visit(page, address):
    page.goto(address)
    page.get_by_text("About this run").or_(page.get_by_text("Artifacts", exact=True)).first.wait_for()


def test_the_run_page_says_what_was_done_and_how_to_go_on(shown, page):
    visit(page, f"{shown.page}?workflowType=machine_learning")
    page.get_by_text("Show more").first.click()
    said = page.inner_text("body")
    assert "training images of 3 classes" in said
    assert "untrained → trained" in said
    assert f"{shown.run.data.metrics['test_acc']:.3f}" in said
    assert 'mlflow.pytorch.load_model("models:/byol/1")' in said
    assert f"mlflow run . -P resume={shown.run.info.run_id}" in said
    assert f"mlflow run . -e reproduce -P run_id={shown.run.info.run_id}" in said
    assert "Finished" in said


def test_charts_stand_in_sections(shown, page):
    visit(page, f"{shown.page}/model-metrics?workflowType=machine_learning")
    sections = {"train", "embedding", "views", "evaluation"}
    page.get_by_placeholder("Search metric charts").wait_for()
    page.get_by_text("embedding/neighbours").first.hover()
    said = set()
    for _ in range(12):  # sections are made when they come into sight
        said |= {line.split(" (")[0] for line in page.inner_text("body").splitlines()}
        page.mouse.wheel(0, 600)
        page.wait_for_timeout(200)
    assert sections <= said
    page.get_by_placeholder("Search metric charts").fill("val_acc$|loss|tau")
    page.get_by_text("val_acc", exact=True).first.wait_for()
    page.get_by_text("Step", exact=True).first.wait_for()


def test_the_projection_shows_the_image_under_the_mouse(shown, page):
    visit(page, f"{shown.page}/artifacts/pictures/projection.html?workflowType=machine_learning")
    frame = page.frame_locator("iframe").first
    frame.locator("canvas").first.wait_for()
    page.wait_for_timeout(1000)  # Bokeh lays the plot out
    image = frame.locator("img[src^='data:image']")
    area = frame.locator("canvas").first.bounding_box()
    grid = itertools.product(range(20, int(area["height"]), 12), range(10, int(area["width"]), 12))
    for down, right in grid:
        page.mouse.move(area["x"] + right, area["y"] + down)
        if image.count():
            break
    assert image.first.is_visible()
    assert image.first.evaluate("image => image.naturalWidth") > 0
    named = frame.get_by_text(".png").first.inner_text()
    assert named.split("/")[0] in {"good", "scratched", "bent"}


def test_the_pictures_can_be_browsed_over_the_steps(shown, page):
    visit(page, f"{shown.page}/artifacts/pictures/steps.html?workflowType=machine_learning")
    frame = page.frame_locator("iframe").first
    slider = frame.locator("input[type=range]")
    slider.wait_for()
    last = frame.locator("#step").inner_text()
    assert frame.locator("img").count() >= 3
    slider.focus()
    page.keyboard.press("Home")
    assert frame.locator("#step").inner_text() == "0" != last
    assert {"views/pairs", "embedding/neighbours", "embedding/projection"} == set(frame.locator("h2").all_inner_texts())
    widths = frame.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert min(widths) > 100


def test_the_data_set_is_described(shown, page):
    visit(page, f"{shown.page}?workflowType=machine_learning")
    page.get_by_text("parts (").first.click()
    page.get_by_text("num classes").wait_for()
    said = page.inner_text("body")
    assert "3 datasets used" in said
    assert "num classes: 3" in said
    for split in ("Train", "Val", "Test"):
        assert split in said.splitlines()
    assert "good" in said


def test_the_registered_version_is_the_champion_and_says_how_to_use_it(shown, page):
    page.goto(f"{shown.uri}/#/models/byol/versions/1")
    page.get_by_text("Source Run").wait_for()
    page.get_by_text("champion").first.wait_for()
    said = page.inner_text("body")
    assert shown.run.info.run_name in said
    assert "mlflow models serve" in said
    assert "champion: there was none" in said


def test_the_log_and_the_configs_can_be_read(shown, page):
    visit(page, f"{shown.page}/artifacts/config/config_tree.txt?workflowType=machine_learning")
    page.get_by_text("max_epochs: 4").first.wait_for()
