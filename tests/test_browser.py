"""The page in a real browser: our nodes are there, and the example workflow opens, runs and shows its picture."""

import pytest
from host import browser

pytestmark = pytest.mark.skipif(not (browser.CHROMIUM and browser.CHROMEDRIVER), reason=browser.NO_BROWSER)


@pytest.fixture(scope="module")
def page(server, samples):
    samples.make_example_files()
    with browser.open_page(server.url) as page:
        yield page


def test_the_page_offers_the_nodes(page, server):
    ours = {name for name, node in server.object_info().items() if "GGUF" in node["python_module"]}
    assert {"UnetLoaderGGUF", "DualCLIPLoaderGGUF", "VAELoaderGGUF", "LoraLoaderGGUF"} <= ours
    assert ours <= page.node_types()


def test_the_example_workflow_runs_from_the_template_dialog(page, tmp_path):
    page.open_template("flux_gguf")
    page.set_widget("EmptySD3LatentImage", "width", 256)
    page.set_widget("EmptySD3LatentImage", "height", 256)
    page.set_widget("KSampler", "steps", 2)
    assert page.run() == [256, 256]
    screenshot = tmp_path / "page.png"
    page.screenshot(screenshot)
    assert screenshot.stat().st_size > 50_000
