"""Report and review in a real browser, driven as a person would."""

import json
import os
import shutil
import time
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_review import serve

import cdp
from pipelines.decisions import CorrectionTable
from pipelines.run import main

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.trains]

FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--force-prefers-reduced-motion",
         "--window-size=1280,900")  # fmt: skip
PATIENCE_S = 120
"""How long a busy machine may take for what an idle one does at once."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Headless Chromium; a run with CI=true must find it."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        reason = "no Chromium here: install chromium and chromium-driver (.ci/run does)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    page = start_browser(chromium, driver, tmp_path_factory)
    page.set_script_timeout(PATIENCE_S)
    yield page
    page.quit()


def start_browser(chromium, driver, tmp_path_factory):
    """A started browser. On a busy machine a start may fail: each try has a profile of its own."""
    from selenium import webdriver
    from selenium.common.exceptions import WebDriverException

    for last in (False, False, True):
        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        try:
            return webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        except WebDriverException:
            if last:
                raise


def wait_for(browser, condition, *arguments, seconds=PATIENCE_S):
    """Until a script's answer is true; the answer."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = browser.execute_script(condition, *arguments)
        if found:
            return found
        time.sleep(0.03)
    raise AssertionError(f"not within {seconds} s: {condition}")


def open_page(browser, address):
    browser.get_log("browser")
    browser.get(address)
    wait_for(browser, "return document.documentElement.dataset.ready === 'true'")


def find(browser, css):
    from selenium.webdriver.common.by import By

    return browser.find_elements(By.CSS_SELECTOR, css)


def press(browser, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def list_complaints(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture
def report(browser, known_run):
    page = known_run / "report" / "report.html"
    open_page(browser, f"file://{quote(str(page.resolve()))}")
    # Faces wait until somebody comes near; pictures of two sections are part of the page.
    assert not find(browser, "main section:not(#looking):not(#inputs) img")
    browser.execute_script("document.getElementById('clusters').scrollIntoView()")
    wait_for(browser, "return document.querySelector('#clusters .sheet')")
    return browser


def list_shown(browser):
    return [each.get_attribute("data-cluster") for each in find(browser, "#clusters .sheet")]


def test_the_report_opens_from_disk_filters_and_turns_pages(report):
    assert len(find(report, "main svg")) >= 6
    first = list_shown(report)
    assert 0 < len(first) <= 12
    report.execute_script("document.querySelector('[data-view=all]').click()")
    press(report, "/", first[-1])
    # Between two keys the page may already look for the first.
    wait_for(report, "const s = [...document.querySelectorAll('#clusters .sheet')];"
             "return s.length === 1 && s[0].dataset.cluster === arguments[0]",
             first[-1])  # fmt: skip
    face = find(report, "#clusters button.face")[0]
    name = face.get_attribute("aria-label").split(",")[0]
    face.click()
    (dialog,) = find(report, "dialog[open]")
    assert name in dialog.text
    press(report, "\ue00c")  # escape
    wait_for(report, "return !document.querySelector('dialog[open]')")
    wait_for(
        report,
        "return [...document.querySelectorAll('#clusters img')].every(i => i.complete"
        " && i.naturalWidth > 0)",
    )
    assert list_complaints(report) == []


def test_the_report_is_walked_by_keyboard(report):
    report.execute_script("document.querySelector('#clusters button.face').focus()")
    label = "return document.activeElement.getAttribute('aria-label')"
    before = report.execute_script(label)
    press(report, "\ue014")  # right
    assert report.execute_script(label) != before
    press(report, "\ue012")  # left
    assert report.execute_script(label) == before
    press(report, "\ue007")  # enter
    assert find(report, "dialog[open]")
    press(report, "\ue00c")


def test_the_map_is_chosen_from_by_mouse_and_by_keys(report):
    shown = "return document.querySelector('#map .shown').textContent"
    dot = "document.querySelector('#map g.cluster circle')"
    label = report.execute_script(f"return {dot}.closest('g').dataset.cluster")
    report.execute_script(f"{dot}.dispatchEvent(new MouseEvent('click', {{bubbles: true}}))")
    assert f"cluster {label}." in report.execute_script(shown)
    assert find(report, f"#map .shown [data-cluster='{label}'] button.face")
    press(report, "n", "\ue007")
    name = report.execute_script("return document.activeElement.getAttribute('aria-label')")
    assert name.startswith("Cluster ")
    assert f"Cluster {label}," not in name
    assert name.split(",")[0].lower() in report.execute_script(shown)
    press(report, "p")
    again = report.execute_script("return document.activeElement.getAttribute('aria-label')")
    assert again.startswith(f"Cluster {label},")
    for key in "\ue012\ue013\ue014\ue015":  # the four arrows
        press(report, key)
    assert report.execute_script("return document.activeElement.closest('#map svg') !== null")
    assert list_complaints(report) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_report_fits_narrow_screens_and_the_dark(report, scheme, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    report.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    report.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    try:
        wait_for(report, "return innerWidth === arguments[0]", width)
        wait_for(
            report, "return matchMedia(arguments[0]).matches", f"(prefers-color-scheme: {scheme})"
        )
        assert report.execute_script("return document.documentElement.scrollWidth") <= width
        colours = report.execute_script(
            "const s = getComputedStyle(document.body);"
            "const l = c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0);"
            "return [l(s.backgroundColor), l(s.color)]"
        )
        assert (colours[0] > colours[1]) == (scheme == "light")
    finally:
        report.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_report_prints(report):
    printed = report.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(printed["data"]) > 20_000


def question(browser):
    """The question as shown: title and the sample ids of each side."""
    return browser.execute_script(
        "return [document.querySelector('#ask h2').textContent,"
        " [...document.querySelectorAll('#ask .side')].map(side =>"
        " [...side.querySelectorAll('button.face')].map(face => +face.dataset.id))]"
    )


def message(browser, text):
    return wait_for(
        browser,
        "const m = document.getElementById('message');"
        "return !m.hidden && m.textContent.includes(arguments[0]) && m.textContent",
        text,
    )


def browse_clusters(browser, client):
    """Open the second tab, and wait until it shows the clusters as the server has them now."""
    browser.execute_script("document.querySelector('[data-tab=browse]').click()")
    status, found = client.get("clusters?order=size")
    assert status == 200
    labels = [each["label"] for each in found["clusters"]]
    wait_for(browser, "return JSON.stringify([...document.querySelectorAll('#browse .sheet')]"
             ".map(sheet => +sheet.dataset.cluster)) === JSON.stringify(arguments[0])",
             labels)  # fmt: skip
    return labels


def open_cluster(browser, client, least):
    """Open the largest cluster, of at least `least` faces, from the second tab; its label."""
    browse_clusters(browser, client)
    label = browser.execute_script(
        "const sheet = document.querySelector('#browse .sheet');"
        "sheet.querySelector('.acts button').click(); return sheet.dataset.cluster"
    )
    wait_for(browser, "return !document.getElementById('ask').hidden && document.querySelectorAll("
             "'#ask button.face').length >= arguments[0]", least)  # fmt: skip
    return label


def test_review_from_question_to_rerun(browser, own_known_run, known):
    table = CorrectionTable(own_known_run)
    with serve(own_known_run) as client:
        address = f"http://{client.host}/{client.token}/"
        open_page(browser, address)
        first = question(browser)

        press(browser, "s")
        message(browser, "decision 1 is kept")
        assert table.read()[0].action in ("accept", "merge")
        press(browser, "u")
        message(browser, "decision 1 is undone")
        assert question(browser) == first
        press(browser, "k")
        end = time.monotonic() + PATIENCE_S
        while question(browser) == first and time.monotonic() < end:
            time.sleep(0.03)
        assert question(browser) != first

        # The focus of an answered question goes to the title of the next, which is announced.
        browser.execute_script("document.querySelector('#ask [data-act=skip]').focus()")
        press(browser, "k")
        wait_for(browser, "return document.activeElement.matches('#ask h2')")
        title, sides = question(browser)
        said = browser.execute_script("return document.getElementById('announced').textContent")
        assert said.startswith(title)
        assert all(f"{len(side)} image" in said for side in sides)

        label = open_cluster(browser, client, 3)
        (members,) = question(browser)[1]
        faces = find(browser, "#ask button.face")
        faces[-1].click()
        drag(browser, faces[-2], find(browser, "#ask .tray")[0])
        wait_for(browser, "return document.querySelector('.tray').textContent.startsWith('2 ')")
        press(browser, "x")
        message(browser, "2 faces split off")

        merged = browse_clusters(browser, client)[2:4]
        for at in (2, 3):
            browser.execute_script(
                "document.querySelectorAll('#browse .sheet')[arguments[0]]"
                ".querySelectorAll('.acts button')[1].click()", at)  # fmt: skip
            wait_for(browser, "return document.getElementById('chosen').textContent.includes("
                     "arguments[0])", "is chosen" if at == 2 else "choose two")  # fmt: skip
        message(browser, "Merged")

        browser.execute_script("document.querySelector('[data-tab=history]').click()")
        wait_for(browser, "return document.querySelectorAll('#history tbody tr').length === 4")
        assert len(find(browser, "#history tr.undone")) == 2  # the first, and its undo
        browser.refresh()
        wait_for(browser, "return document.documentElement.dataset.ready === 'true'")
        wait_for(browser, "return document.getElementById('progress').textContent"
                 ".startsWith('2 decisions')")  # fmt: skip
        assert list_complaints(browser) == []

        before = cdp.open_run(own_known_run).labels.set_index("sample_id").pseudo_label
        arguments = [*known, "--runs-dir", str(own_known_run.parent)]
        assert main([*arguments, "--until", "propagate"]) == 0
        after = cdp.open_run(own_known_run).labels.set_index("sample_id").pseudo_label
        out, rest = members[-2:], members[:-2]
        assert before[members].unique().tolist() == [int(label)]
        assert not set(after[out]) & (set(after[rest]) - {-1})
        decided = [each for each in table.read() if each.action == "merge"][-1]
        keys = cdp.open_run(own_known_run).samples.set_index("sha256").sample_id
        whole = keys[[key for group in decided.groups for key in group]]
        assert after[whole].nunique() == 1
        assert len(merged) == 2

        browser.refresh()
        wait_for(browser, "return document.getElementById('progress').textContent"
                 ".includes(' 0 images will move')")  # fmt: skip


def test_a_larger_picture_leads_to_its_neighbours_and_left_out_images_are_listed(
    browser, known_run
):
    with serve(known_run) as client:
        open_page(browser, f"http://{client.host}/{client.token}/")
        browser.execute_script("document.querySelector('#ask button.face').focus()")
        press(browser, " ")
        wait_for(browser, "return document.querySelectorAll('#larger .near button').length >= 8")
        (dialog,) = find(browser, "#larger[open]")
        assert "48 x 48 px" in dialog.text
        caption = find(browser, "#larger .near button")[0].get_attribute("aria-label")
        assert ", cosine 0." in caption
        find(browser, "#larger .near button")[0].click()
        wait_for(browser, "return document.querySelector('#larger dd').textContent"
                 " === arguments[0]",
                 caption.split(",")[0])  # fmt: skip
        press(browser, " ")
        wait_for(browser, "return !document.getElementById('larger').open")
        browser.execute_script("document.querySelector('[data-tab=left]').click()")
        _, found = client.get("left-out/unlabelled")
        shown = wait_for(browser, "const rows = document.querySelectorAll('#left li');"
                         "return rows.length === arguments[0] && [...rows].map(r => r.textContent)",
                         min(48, found["total"]))  # fmt: skip
        assert found["images"][0]["name"] in shown[0]
        assert found["images"][0]["reason"] in shown[0]
        find(browser, "[data-left=rejected]")[0].click()
        wait_for(browser, "return document.querySelector('#left p').textContent === arguments[0]",
                 "There is none.")  # fmt: skip
        assert list_complaints(browser) == []


def drag(browser, face, tray):
    from selenium.webdriver import ActionChains

    ActionChains(browser).drag_and_drop(face, tray).perform()


def test_a_contradiction_offers_to_undo_what_is_in_its_way(browser, own_known_run):
    with serve(own_known_run) as client:
        open_page(browser, f"http://{client.host}/{client.token}/")
        open_cluster(browser, client, 3)
        press(browser, "s")
        message(browser, "decision 1 is kept")
        open_cluster(browser, client, 3)
        find(browser, "#ask button.face")[0].click()
        press(browser, "x")
        message(browser, "contradicts decision 1")
        find(browser, "#message button")[0].click()
        message(browser, "decision 3 is kept")
        kept = [each.action for each in CorrectionTable(own_known_run).read()]
        assert kept == ["accept", "undo", "split"]


def test_names_of_files_never_run(browser, own_known_run):
    """Names that are markup, in every place the review page shows them."""
    hostile = "<img src=x onerror=document.title='owned'>.jpg"
    path = (own_known_run / "propagate" / "labels.parquet").resolve()
    table = pq.read_table(path)
    names = pa.array([hostile] * len(table))
    pq.write_table(table.set_column(table.schema.get_field_index("path"), "path", names), path)
    with serve(own_known_run) as client:
        open_page(browser, f"http://{client.host}/{client.token}/")
        open_cluster(browser, client, 2)
        press(browser, "s")
        message(browser, "is kept")
        browser.execute_script("document.querySelector('[data-tab=history]').click()")
        wait_for(browser, "return document.querySelectorAll('#history tbody tr').length === 1")
        assert browser.title == "Review of known"
        assert not find(browser, "img[src='x']")
        labels = json.dumps(
            [each.get_attribute("title") for each in find(browser, "#history .face")]
        )
        assert "onerror" in labels
