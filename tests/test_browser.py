"""In a real JupyterLab in a real browser: a slider changes its figure, and a live plot changes while its run trains.

Needs JupyterLab, playwright's Python package and an installed Chromium or Chrome; without them the tests are skipped.
(playwright downloads no browser: it uses the installed one.)
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
WAIT = 120_000  # milliseconds until a test fails because something did not happen: machines may be busy
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells stay in the page while they are not visible
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
pytestmark = pytest.mark.slow


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
    """The address of a JupyterLab that shows a copy of the notebooks."""
    pytest.importorskip("jupyterlab", reason="JupyterLab is not installed (the extra notebook has it)")
    root = tmp_path_factory.mktemp("lab")
    for folder in ("notebooks", "accelerate_configs", "benchmarks"):  # notebook 4 reads the latter two
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
    environment = {**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
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
        server.terminate()  # ends its kernels, too
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
    """Open a notebook and start to run it from top to bottom. Returns the page."""
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(WAIT)
    page.goto(f"{lab}/lab/tree/{name}.ipynb?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function("jupyterapp.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'")
    page.evaluate("void jupyterapp.commands.execute('notebook:run-all-cells')")
    return page


def changed_source(page, image, before: str) -> str:
    """Wait until an image differs from `before`, and return its source."""
    for _ in range(WAIT // 100):
        source = image.get_attribute("src")  # waits if there is no image at the moment
        if source != before:
            return source
        page.wait_for_timeout(100)
    raise AssertionError("the figure does not change")


def test_slider_moved_changes_its_figure(browser, lab):
    page = run_all(browser, lab, "02_loss_math")
    box = page.locator(".widget-interact").first
    image = box.locator("img")
    figures = [image.get_attribute("src")]
    for handle in box.locator(".noUi-handle").all():
        handle.press("ArrowLeft")
        figures.append(changed_source(page, image, figures[-1]))
    assert len(set(figures)) == len(figures) > 2
    page.close()


def test_live_plot_changes_while_the_run_trains(browser, lab):
    page = run_all(browser, lab, "03_train")
    cell = page.locator(".jp-CodeCell", has_text="live.update(")
    image = cell.locator(".jp-OutputArea img")
    figures = [image.get_attribute("src")]
    for _ in range(3):
        figures.append(changed_source(page, image, figures[-1]))
    assert len(set(figures)) == 4
    assert cell.locator(".jp-InputPrompt").inner_text() == "[*]:"  # it is still running
    page.close()
