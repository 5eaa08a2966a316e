"""The page itself in headless Chromium: open a workflow template, queue it, look at what is drawn."""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
NO_BROWSER = "no Chromium with chromedriver on this machine"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1600,1000",
)
SECONDS = 30
# The page glides to the new view.
FIT_SECONDS = 1

IS_READY = "window.app?.graph && window.LiteGraph && LiteGraph.registered_node_types.KSampler"
PICTURE = "app.graph._nodes.find(node => node.type === 'SaveImage').imgs?.[0]"
# A card of the template dialog.
CARD = '[data-testid="template-workflow-{}"]'


class Page:
    """A page that has loaded; `driver` is selenium's, for what has no method here."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        script = f"return !!({condition})"
        WebDriverWait(self.driver, SECONDS).until(lambda driver: driver.execute_script(script), condition)

    def node_types(self) -> set[str]:
        """The classes of nodes that the page offers."""
        return set(self.driver.execute_script("return Object.keys(LiteGraph.registered_node_types)"))

    def open_template(self, name: str) -> None:
        """Open an example workflow through the template dialog, as a user does."""
        card = CARD.format(name)
        self.driver.execute_script("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        self.wait(f"document.querySelector('{card}')")
        self.driver.find_element(By.CSS_SELECTOR, card).click()
        self.wait(f"!document.querySelector('{card}')")

    def set_widget(self, node: str, widget: str, value: object) -> None:
        """Set a widget of the only node of a class."""
        script = """const node = app.graph._nodes.find(node => node.type === arguments[0]);
                    node.widgets.find(widget => widget.name === arguments[1]).value = arguments[2];"""
        self.driver.execute_script(script, node, widget, value)

    def run(self) -> list[int]:
        """Queue the workflow as the Run button does; returns width and height of the picture that SaveImage shows."""
        self.driver.execute_async_script("app.queuePrompt(0, 1).then(arguments[0])")
        self.wait(f"{PICTURE}?.naturalWidth")
        return self.driver.execute_script(f"return [{PICTURE}.naturalWidth, {PICTURE}.naturalHeight]")

    def screenshot(self, file: Path) -> None:
        self.driver.execute_script("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        time.sleep(FIT_SECONDS)
        self.driver.save_screenshot(str(file))


@contextmanager
def open_page(url: str) -> Iterator[Page]:
    options = Options()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, Service(CHROMEDRIVER))
        try:
            driver.set_script_timeout(SECONDS)
            driver.get(url)
            page = Page(driver)
            page.wait(IS_READY)
            yield page
        finally:
            driver.quit()
