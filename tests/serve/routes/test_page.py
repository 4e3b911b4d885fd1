"""The page in a real browser: what a person does, and what then is on screen."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image, ImageOps
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver

from sana_sprint.images import infotext, read_settings, save_png
from sana_sprint.serve.engine.job import ImageRequest
from sana_sprint.serve.settings import Settings
from sana_sprint.vocabulary import Vocabulary
from tests.helpers.page import FakeEngine, PageUser, browser, color_of, page_server

PHONE = {"width": 320, "height": 640, "deviceScaleFactor": 1, "mobile": True}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """One browser for all: starting it takes longer than a test."""
    with browser(tmp_path_factory.mktemp("browser")) as driver:
        yield driver


@pytest.fixture
def user(driver: WebDriver) -> Iterator[PageUser]:
    """Somebody who has never been here: every test's server has a port, and so an origin, of its own."""
    driver.get("about:blank")
    driver.get_log("browser")
    user = PageUser(driver)
    yield user
    assert user.errors() == []


def last_color(engine: FakeEngine) -> tuple[int, int, int]:
    return color_of(engine.requests[-1])


def wait_for_prompt(user: PageUser, engine: FakeEngine, prompt: str) -> None:
    """Until the picture of this prompt is on screen, in its own colour."""
    user.wait_for(lambda: engine.requests[-1].prompt == prompt and user.pixel() == last_color(engine), prompt)


def rewrite(user: PageUser, prompt: str) -> None:
    box = user.by_id("prompt")
    box.send_keys(Keys.CONTROL, "a")
    box.send_keys(Keys.DELETE, prompt)


# ----- words and settings ---------------------------------------------------------------------------------------------


def test_the_picture_follows_what_is_typed(user: PageUser) -> None:
    engine = FakeEngine()
    with page_server(engine) as address:
        user.open(address)
        rewrite(user, "a dog and a cat")
        wait_for_prompt(user, engine, "a dog and a cat")
        assert user.by_id("picture").get_attribute("aria-label") == "a dog and a cat"
        assert {request.seed for request in engine.requests} == {1}  # the first example's: the noise stays
        assert engine.most == 1
        drawn = len(engine.requests)
        user.by_id("prompt").send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
        assert user.by_id("notice").get_attribute("hidden")  # nothing to draw is no error
        assert len(engine.requests) <= drawn + 1


def test_words_that_the_model_was_not_taught_are_named(user: PageUser) -> None:
    engine = FakeEngine()
    engine.vocabulary = Vocabulary.of(["a cat", "a bicycle"])
    with page_server(engine) as address:
        user.open(address)
        rewrite(user, "a cat riding a bicycle")
        user.wait_for(lambda: "not taught: riding." in user.by_id("notice").text)
        rewrite(user, "a bicycle")
        wait_for_prompt(user, engine, "a bicycle")
        user.wait_for(lambda: not user.by_id("notice").is_displayed())


def test_settings_reach_the_engine(user: PageUser) -> None:
    engine = FakeEngine()
    with page_server(engine) as address:
        user.open(address)
        user.run("document.querySelector('[name=steps][value=\"4\"]').click()")
        user.wait_for(lambda: engine.requests[-1].steps == 4)
        user.run(
            "const g = document.getElementById('guidance'); g.value = 3; g.dispatchEvent(new Event('input'))"
        )
        user.wait_for(lambda: engine.requests[-1].guidance_scale == 3)
        user.run(
            "const s = document.getElementById('size'); s.selectedIndex = 3; s.dispatchEvent(new Event('change'))"
        )
        user.wait_for(lambda: engine.requests[-1].width == 176 and engine.requests[-1].height == 96)
        user.wait_for(lambda: user.by_id("picture").get_attribute("width") == "176")
        before = engine.requests[-1].seed
        user.by_id("dice").click()
        user.wait_for(lambda: engine.requests[-1].seed != before)
        user.by_id("lock").click()  # from here on new words come with new noise
        seeds = len({request.seed for request in engine.requests})
        rewrite(user, "a moon ")
        user.wait_for(lambda: len({request.seed for request in engine.requests}) > seeds)


def test_settings_survive_a_reload(user: PageUser) -> None:
    engine = FakeEngine()
    with page_server(engine) as address:
        user.open(address)
        rewrite(user, "a kite ")
        wait_for_prompt(user, engine, "a kite ")
        user.open(address)
        wait_for_prompt(user, engine, "a kite ")


def test_play_draws_one_seed_after_another(user: PageUser) -> None:
    engine = FakeEngine()
    with page_server(engine) as address:
        user.open(address)
        user.by_id("roll").click()
        user.wait_for(lambda: user.sequence() > 20)
        user.by_id("roll").click()
        assert len({request.seed for request in engine.requests}) >= 20
        assert engine.most == 1
        user.wait_for(lambda: float(user.by_id("rate").text) > 0)


RAPID_EDITS = """
    const [count, done] = [arguments[0], arguments[1]];
    const box = document.getElementById("prompt");
    const picture = document.getElementById("picture");
    window.shownNumbers = [];
    new MutationObserver(() => shownNumbers.push(Number(picture.dataset.sequence)))
      .observe(picture, { attributes: true, attributeFilter: ["data-sequence"] });
    let edits = 0;
    const edit = () => {
      box.value = `edit ${edits++} `;
      box.dispatchEvent(new InputEvent("input", { inputType: "insertText", data: " ", bubbles: true }));
      if (edits < count) setTimeout(edit, 3);
      else done();
    };
    edit();
"""


def test_200_rapid_edits_end_with_the_picture_of_the_last(user: PageUser) -> None:
    engine = FakeEngine()
    with page_server(engine) as address:
        user.open(address)
        user.driver.execute_async_script(RAPID_EDITS, 200)
        wait_for_prompt(user, engine, "edit 199 ")
        last = user.sequence()
        assert engine.most == 1  # never two in flight
        user.driver.execute_async_script("setTimeout(arguments[0], 500)")  # anything late would come now
        assert user.sequence() == last
        assert user.pixel() == last_color(engine)
        numbers = user.run("return shownNumbers")
        assert numbers == sorted(set(numbers))  # no picture came back, none was shown twice


def test_half_a_word_is_not_drawn(user: PageUser) -> None:
    engine = FakeEngine()
    with page_server(engine) as address:
        user.open(address)
        # One after another in a single task of the browser, so faster than any pause.
        user.run("""
            const box = document.getElementById("prompt");
            box.value = "";
            for (const letter of "zebra ") {
              box.value += letter;
              box.dispatchEvent(new InputEvent("input", { inputType: "insertText", data: letter, bubbles: true }));
            }
        """)
        wait_for_prompt(user, engine, "zebra ")
        assert not [request for request in engine.requests if request.prompt in ("z", "ze", "zeb", "zebr")]


# ----- the sketch -----------------------------------------------------------------------------------------------------


def stroke(user: PageUser) -> None:
    """A line through the middle of the pad, from left to right."""
    pad = user.by_id("pad")
    third = pad.size["width"] // 3
    actions = ActionChains(user.driver, duration=10).move_to_element_with_offset(pad, -third, 0)
    actions.click_and_hold().move_by_offset(third, 0).move_by_offset(third, 0).release().perform()


def is_dark(user: PageUser) -> bool:
    """Whether the line of `stroke` is in the picture, which the engine makes of the sketch itself."""
    return max(user.pixel(0.5, 0.5)) < 100 and min(user.pixel(0.5, 0.2)) > 200


def test_a_stroke_is_drawn_undone_redone_erased_and_cleared(user: PageUser) -> None:
    engine = FakeEngine(has_control=True)
    with page_server(engine) as address:
        user.open(address)
        assert engine.requests[-1].image is None
        stroke(user)
        user.wait_for(lambda: is_dark(user))
        request = engine.requests[-1]
        assert request.image is not None
        assert (request.image.shape, request.control_kind) == ((128, 128, 3), "scribble")
        user.by_id("undo").click()
        user.wait_for(lambda: engine.requests[-1].image is None and user.pixel() == last_color(engine))
        user.by_id("redo").click()
        user.wait_for(lambda: is_dark(user))
        user.by_id("eraser").click()
        user.run(
            "const w = document.getElementById('line-width'); w.value = 20; w.dispatchEvent(new Event('input'))"
        )
        stroke(user)
        # What is left is a blank paper, which no model can follow.
        user.wait_for(lambda: engine.requests[-1].image is None and user.pixel() == last_color(engine))
        user.by_id("undo").click()
        user.wait_for(lambda: is_dark(user))
        user.by_id("clear").click()
        user.wait_for(lambda: engine.requests[-1].image is None)
        assert not user.by_id("clear").is_enabled()
        assert engine.most == 1


def test_a_pen_that_only_touches_the_paper_leaves_a_dot(user: PageUser) -> None:
    """A line without length draws nothing on a canvas, and the model would be sent a blank picture."""
    engine = FakeEngine(has_control=True)
    touch = """
        const pad = document.getElementById("pad");
        pad.setPointerCapture = () => {};  // this pointer is not real
        const box = pad.getBoundingClientRect();
        for (const type of ["pointerdown", "pointermove", "pointermove", "pointerup"])
          pad.dispatchEvent(new PointerEvent(type, {
            pointerId: 1, button: 0, clientX: box.left + box.width / 2, clientY: box.top + box.height / 2,
          }));
    """
    with page_server(engine) as address:
        user.open(address)
        user.run(touch)
        user.wait_for(lambda: is_dark(user))


def test_the_sketch_is_hidden_where_the_model_has_no_use_for_it(user: PageUser) -> None:
    with page_server(FakeEngine()) as address:
        user.open(address)
        assert not user.by_id("sketch").is_displayed()
        assert not user.by_id("strength").is_displayed()
        assert "ControlNet" in user.by_id("no-control").text


def test_a_picture_from_outside_goes_onto_the_sketch(user: PageUser, tmp_path: Path) -> None:
    framed = ImageOps.expand(Image.new("RGB", (40, 40), "black"), border=5, fill="white")
    framed.save(tmp_path / "black.png")
    with page_server(FakeEngine(has_control=True)) as address:
        user.open(address)
        user.by_id("file").send_keys(str(tmp_path / "black.png"))
        user.wait_for(lambda: user.pixel() == (0, 0, 0))


# ----- what was drawn before ------------------------------------------------------------------------------------------


def test_history_restores_words_and_sketch_even_after_a_reload(user: PageUser) -> None:
    engine = FakeEngine(has_control=True)
    with page_server(engine) as address:
        user.open(address)
        stroke(user)
        user.wait_for(lambda: is_dark(user))
        user.wait_for(
            lambda: user.driver.find_elements("css selector", "#history [aria-label*='two apples']")
        )
        user.by_id("clear").click()
        rewrite(user, "a moon ")
        wait_for_prompt(user, engine, "a moon ")
        user.open(address)
        user.wait_for(
            lambda: user.driver.find_elements("css selector", "#history [aria-label*='two apples']")
        )
        user.driver.find_element("css selector", "#history [aria-label*='two apples']").click()
        user.wait_for(lambda: is_dark(user))
        assert engine.requests[-1].prompt.startswith("two apples")
        assert engine.requests[-2].prompt == "a moon "  # words and sketch came back together


def test_a_saved_picture_brings_its_settings_back(user: PageUser, tmp_path: Path) -> None:
    kept = {"prompt": "ein Apfel, größer", "seed": 12, "num_inference_steps": 4, "guidance_scale": 3.0}
    save_png(Image.new("RGB", (8, 8)), tmp_path / "ours.png", kept)
    Image.new("RGB", (8, 8)).save(tmp_path / "other.png")
    engine = FakeEngine()
    with page_server(engine) as address:
        user.open(address)
        user.by_id("file").send_keys(str(tmp_path / "ours.png"))
        wait_for_prompt(user, engine, "ein Apfel, größer")
        request = engine.requests[-1]
        assert (request.seed, request.steps, request.guidance_scale) == (12, 4, 3.0)
        user.by_id("file").send_keys(str(tmp_path / "other.png"))
        user.wait_for(lambda: "no settings" in user.by_id("notice").text)


@pytest.mark.parametrize("native", [128, 512])  # larger pictures come as JPEG, and the page makes the PNG
def test_a_download_has_its_settings_inside(user: PageUser, native: int) -> None:
    engine = FakeEngine(native=native)
    with page_server(engine) as address:
        user.open(address)
        # The page gives the file to a link; what is in it is read instead of saved.
        user.run("""
            HTMLAnchorElement.prototype.click = function () {
              window.savedName = this.download;
            };
            const make = URL.createObjectURL;
            URL.createObjectURL = (blob) => ((window.savedBlob = blob), make.call(URL, blob));
        """)
        user.by_id("download").click()
        user.wait_for(lambda: user.run("return window.savedName"))
        data = user.driver.execute_async_script(
            "savedBlob.arrayBuffer().then((bytes) => arguments[0]([...new Uint8Array(bytes)]))"
        )
        name = user.run("return savedName")
    with Image.open(BytesIO(bytes(data))) as picture:
        settings = read_settings(picture)
        assert settings is not None
        assert picture.format == "PNG"
        assert picture.text["parameters"] == infotext(settings)  # type: ignore[attr-defined]  # a PNG's
        picture.load()  # checks every chunk
    assert (settings["prompt"], settings["seed"]) == (engine.requests[-1].prompt, engine.requests[-1].seed)
    assert name == "two-apples-on-a-blue-background-1.png"


# ----- the connection -------------------------------------------------------------------------------------------------


def test_the_page_comes_back_by_itself(user: PageUser) -> None:
    engine = FakeEngine()
    with page_server(engine) as address:
        user.open(address)
    user.wait_for(lambda: user.by_id("connection").get_attribute("data-state") == "waiting")
    assert "gone" in user.by_id("notice").text
    rewrite(user, "typed meanwhile")
    with page_server(engine, port=int(address.rstrip("/").rpartition(":")[2])):
        wait_for_prompt(user, engine, "typed meanwhile")
        assert user.by_id("connection").text == "Live"
        assert not user.by_id("notice").is_displayed()


def test_what_was_in_flight_when_the_server_went_is_asked_for_again(user: PageUser) -> None:
    engine = FakeEngine()
    with page_server(engine) as address:
        user.open(address)
        engine.hold()
        rewrite(user, "in flight")
        user.wait_for(lambda: engine.requests[-1].prompt == "in flight")
    engine.go_on()
    with page_server(engine, port=int(address.rstrip("/").rpartition(":")[2])):
        wait_for_prompt(user, engine, "in flight")


def test_a_busy_server_is_asked_again(user: PageUser) -> None:
    engine = FakeEngine()
    with page_server(engine) as address:
        user.open(address)
        engine.refusals = 1
        rewrite(user, "x ")
        user.wait_for(lambda: engine.refusals == 0 and "busy" in user.by_id("notice").text)
        wait_for_prompt(user, engine, "x ")
        user.wait_for(lambda: not user.by_id("notice").is_displayed())


def test_a_slow_picture_is_given_up_for_a_newer_one(user: PageUser) -> None:
    engine = FakeEngine()
    with page_server(engine) as address:
        user.open(address)
        engine.hold()
        rewrite(user, "slow ")
        user.wait_for(lambda: engine.requests[-1].prompt.startswith("s"))
        user.by_id("prompt").send_keys("and new ")
        user.wait_for(lambda: engine.requests[-1].prompt == "slow and new ")
        assert engine.jobs[-2].status == "cancelled"
        engine.go_on()
        wait_for_prompt(user, engine, "slow and new ")
        assert engine.most == 1


def test_a_key_is_asked_for(user: PageUser) -> None:
    engine = FakeEngine()
    with page_server(engine, Settings(api_key="se/cr=et")) as address:
        user.driver.get(address)
        for key in ("wrong", "se/cr=et"):
            user.wait_for(lambda: user.by_id("key-dialog").is_displayed())
            user.by_id("key").clear()
            user.by_id("key").send_keys(key, Keys.ENTER)
            user.wait_for(lambda: user.by_id("key-wrong").is_displayed() or user.sequence() > 0)
        user.wait_for(lambda: user.sequence() > 0)


# ----- for everybody --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_control", [False, True])
def test_a_phone_shows_everything_without_scrolling_sideways(user: PageUser, has_control: bool) -> None:
    with page_server(FakeEngine(has_control=has_control)) as address:
        user.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
        try:
            user.open(address)
            assert user.run("return document.documentElement.scrollWidth") == PHONE["width"]
            too_small = user.run("""
                return [...document.querySelectorAll("main button, main select, header button")]
                  .filter((one) => one.checkVisibility() && !one.classList.contains("plain"))
                  .filter((one) => Math.min(one.offsetWidth, one.offsetHeight) < 40)
                  .map((one) => one.id);
            """)
            assert too_small == []
            assert user.by_id("picture").size["width"] > 0.85 * PHONE["width"]
        finally:
            user.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def press(user: PageUser, *keys: str) -> None:
    ActionChains(user.driver).send_keys(*keys).perform()


def test_the_keyboard_alone_is_enough(user: PageUser) -> None:
    engine = FakeEngine(has_control=True)
    with page_server(engine) as address:
        user.open(address)
        press(user, "/")
        press(user, Keys.END, " and a d1ce ", Keys.ENTER)  # letters and digits are text here, no shortcuts
        user.wait_for(lambda: engine.requests[-1].prompt.endswith("and a d1ce "))
        press(user, Keys.ESCAPE, "4")
        user.wait_for(lambda: engine.requests[-1].steps == 4)
        seed = engine.requests[-1].seed
        press(user, "d")
        user.wait_for(lambda: engine.requests[-1].seed != seed)
        for _ in range(20):  # more than there are things to reach before the pad
            press(user, Keys.TAB)
            if user.run("return document.activeElement.id") == "pad":
                break
        press(user, " ", Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, " ")
        user.wait_for(lambda: engine.requests[-1].image is not None)
        ActionChains(user.driver).key_down(Keys.CONTROL).send_keys("z").key_up(Keys.CONTROL).perform()
        user.wait_for(lambda: engine.requests[-1].image is None)
        press(user, "?")
        user.wait_for(lambda: user.by_id("help-dialog").is_displayed())
        press(user, Keys.ESCAPE)
        user.wait_for(lambda: not user.by_id("help-dialog").is_displayed())


def test_everything_has_a_name_and_what_changes_fast_does_not_speak(user: PageUser) -> None:
    with page_server(FakeEngine(has_control=True)) as address:
        user.open(address)
        nodes = user.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
        of_use = {"button", "textbox", "slider", "combobox", "radio", "spinbutton", "checkbox", "image"}
        nameless = [
            node["role"]["value"]
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in of_use and not node["name"]["value"]
        ]
        assert nameless == []
        live = user.run("""
            return [...document.querySelectorAll("[aria-live], [role=status], [role=alert], output")].map((one) => one.id);
        """)
        assert not {"meter", "p50", "p95", "rate", "picture"} & set(live)
        assert (
            user.run("return document.querySelector('#meter').closest('[aria-live], [role=status]')") is None
        )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_switch(user: PageUser, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    brightness = "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    with page_server(FakeEngine()) as address:
        user.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        try:
            user.open(address)
            assert (user.run(brightness) > 128) == (scheme == "light")
            user.by_id("theme").click()
            assert (user.run(brightness) > 128) == (scheme == "dark")
        finally:
            user.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_the_page_asks_for_nothing_from_elsewhere(user: PageUser) -> None:
    with page_server(FakeEngine()) as address:
        user.open(address)
        loaded = user.run("return performance.getEntriesByType('resource').map((one) => one.name)")
        assert loaded
        assert [name for name in loaded if not name.startswith((address, "blob:"))] == []
        policy = user.driver.execute_async_script(
            "fetch('/').then((answer) => arguments[0](answer.headers.get('content-security-policy')))"
        )
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy


def test_the_colour_of_a_request_tells_it_from_others() -> None:
    """Checks the assumption of the tests above."""
    colors = {color_of(ImageRequest(f"edit {i} ", seed=1)) for i in range(200)}
    assert len(colors) == 200
