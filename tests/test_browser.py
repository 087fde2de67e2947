"""In a real JupyterLab in a real browser: a slider moves its figure, and a live plot moves while its run trains.

Needs JupyterLab, playwright's Python package and a Chromium or Chrome of the system; without them it is skipped. (No
browser is downloaded: playwright drives the one that is there.)
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT = 120_000  # milliseconds until something that should happen counts as not happening: machines may be busy
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight stay in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (the extra dev has it)")
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        pytest.skip(f"no browser found: none of {', '.join(BROWSERS)} is on the PATH")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a JupyterLab on a copy of the notebooks."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed (the extra notebook has it)")
    root = tmp_path_factory.mktemp("lab")
    for folder in ("notebooks", "accelerate_configs", "benchmarks"):  # the latter two are read by notebook 4
        shutil.copytree(ROOT / folder, root / folder)
    for name, values in SETTINGS.items():
        path = root / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {"ip": "127.0.0.1", "port": port, "port_retries": 0, "allow_root": True, "open_browser": False}
    command = [sys.executable, "-m", "jupyterlab", "--LabApp.expose_app_in_browser=True", "--IdentityProvider.token="]
    environment = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(root / "settings")}
    environment.pop("ACCELERATE_MIXED_PRECISION", None)
    with open(root / "log", "w") as log:
        server = subprocess.Popen(
            [*command, *(f"--ServerApp.{name}={value}" for name, value in options.items()), str(root / "notebooks")],
            stdout=log, stderr=log, env=environment, cwd=root,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, server, root / "log")
        yield url
    finally:
        server.terminate()  # and with it its kernels
        server.wait(30)


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(WAIT // 200):
        try:
            return urllib.request.urlopen(f"{url}/api").close()
        except OSError:
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
    raise AssertionError(log.read_text())


def run_all(browser, lab: str, name: str):
    """A page on which this notebook is running from top to bottom."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(WAIT)
    page.goto(f"{lab}/lab/tree/{name}.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function("jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
    return page


def another(page, image, before: str) -> str:
    """The source of an image, once it is not what it was before."""
    for _ in range(WAIT // 100):
        source = image.get_attribute("src")  # waits where there is no image for the moment
        if source != before:
            return source
        page.wait_for_timeout(100)
    raise AssertionError("the figure stays as it was")


def test_a_slider_moves_its_figure(browser, lab):
    page = run_all(browser, lab, "02_loss_math")
    box = page.locator(".widget-interact").first
    image = box.locator("img")
    figures = [image.get_attribute("src")]
    for handle in box.locator(".noUi-handle").all():
        handle.press("ArrowLeft")
        figures.append(another(page, image, figures[-1]))
    assert len(set(figures)) == len(figures) > 2
    page.close()


def test_the_live_plot_moves_while_the_run_trains(browser, lab):
    page = run_all(browser, lab, "03_train")
    cell = page.locator(".jp-CodeCell", has_text="live.update(")
    image = cell.locator(".jp-OutputArea img")
    figures = [image.get_attribute("src")]
    for _ in range(3):
        figures.append(another(page, image, figures[-1]))
    assert len(set(figures)) == 4
    assert cell.locator(".jp-InputPrompt").inner_text() == "[*]:"  # it is still running
    page.close()
