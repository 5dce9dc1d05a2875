"""The app as people meet it: a real Chromium on the running server, which reaches nothing but loopback."""

import shutil
import time

import pytest
from serve_app import CODE, HOSTILE, SAYS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (Debian: apt-get install chromium)")]
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--disable-background-networking",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser, server, request):
    """The page, opened; at the test's end nothing may have gone wrong on it, and nothing asked for from elsewhere."""
    wrong, page = [], browser.new_page(viewport={"width": getattr(request, "param", 1280), "height": 900})
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((server.url, "data:", "blob:")) else None)
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.goto(server.url)
    page.wait_for_selector(".status .dot", timeout=10_000)
    yield page
    page.close()
    assert wrong == []


def say(page, text: str) -> None:
    box = page.locator("#ask textarea")
    box.fill(text)
    box.press("Enter")


def answers(page) -> list[str]:
    """The shown texts of the assistant, without the line below them."""
    script = """() => [...document.querySelectorAll('#chat .bot .md')].map(shown => {
        const copy = shown.cloneNode(true); copy.querySelectorAll('.note').forEach(note => note.remove()); return copy.textContent; })"""
    return page.evaluate(script)


def wait_for(page, condition, seconds: float = 60.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        page.wait_for_timeout(50)
    return found


def ended(page, count: int = 1) -> None:
    """Waits until so many answers have said why they ended."""
    wait_for(page, lambda: page.locator("#chat .bot .note", has_text="seed").count() >= count)


def test_an_answer_grows_on_the_page_and_says_how_it_ended(page):
    assert "Tuned: base with the adapter grpo-final" in page.locator("#status").inner_text()
    say(page, "say plain")
    parts = set()
    wait_for(page, lambda: parts.update(answers(page)) or page.locator("#chat .bot .note", has_text="seed").count())
    assert len({part for part in parts if part}) >= 3
    assert answers(page) == [SAYS["plain"][0]]
    note = page.locator("#chat .bot .note").inner_text()
    assert "tokens/s" in note and "ended by itself" in note and "seed" in note


@pytest.mark.parametrize(("said", "text"), [("hostile", HOSTILE), ("code", CODE), ("scripts", SAYS["scripts"][0])])
def test_text_is_shown_exactly_and_does_nothing(page, said, text):
    say(page, f"say {said} {text}")
    ended(page)
    assert answers(page) == [text]
    assert page.locator("#chat .user .md").inner_text() == f"say {said} {text}"
    tags = ("img", "form", "script", "iframe", "style", "a", ".katex")
    assert page.locator(", ".join(f"#chat .md {tag}" for tag in tags)).count() == 0
    assert page.title() == "base GRPO", "the base's name, whatever it is"
    if text != HOSTILE:
        return
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_timeout(300)  # the tab is filled when it is first seen
    page.get_by_label("One question to both").fill(f"say {said}")
    page.locator("#compare").click()
    wait_for(page, lambda: page.locator(".note:visible", has_text="seed").count() == 2)
    assert [page.locator(f"#{pane} textarea").input_value() for pane in ("base", "tuned")] == [text, text]
    page.wait_for_timeout(300)


def test_stop_keeps_the_part_and_the_next_question_works(page, server):
    say(page, "say slow")
    wait_for(page, lambda: len("".join(answers(page))) > 30)
    page.locator("#ask .stop-button").click()
    assert server.idle_within(2), "it writes on after Stop"
    page.get_by_text("stopped").wait_for()
    kept = answers(page)[0]
    assert len(kept) > 30 and SAYS["slow"][0].startswith(kept[:-1])
    say(page, "say plain")
    ended(page)
    assert answers(page)[-1] == SAYS["plain"][0] and answers(page)[0] == kept


def test_stop_of_a_comparison_says_so(page, server):
    page.get_by_role("tab", name="Compare").click()
    page.wait_for_timeout(300)  # the tab is filled when it is first seen
    page.get_by_label("One question to both").fill("say slow")
    page.locator("#compare").click()
    wait_for(page, lambda: len(page.locator("#base textarea").input_value()) > 30)
    page.locator("#halt").click()
    wait_for(page, lambda: page.locator(".note:visible", has_text="stopped").count() == 2)
    page.get_by_label("One question to both").fill(" ")
    page.locator("#compare").click()
    page.get_by_text("The question is empty").wait_for()
    wait_for(page, lambda: page.locator("#base textarea").input_value() == "")


def test_retry_answers_anew_and_undo_takes_back(page):
    page.get_by_text("What are the benefits of exercise?").click()
    ended(page)
    before = page.locator("#chat .bot .note").inner_text()
    page.get_by_role("button", name="Retry").click()
    wait_for(page, lambda: "seed" in (now := page.locator("#chat .bot .note").inner_text()) and now != before)
    assert page.locator("#chat .bot .note").count() == 1
    page.get_by_role("button", name="Undo").click()
    wait_for(page, lambda: page.locator("#chat .bot").count() == 0)
    assert page.locator("#ask textarea").input_value() == "What are the benefits of exercise?"


def set_seed(page, seed: int) -> None:
    """A field that is opened just now may be set back once to what the server said, so look again."""
    field = page.get_by_role("spinbutton", name="Seed")
    for _ in range(10):
        field.fill(str(seed))
        field.press("Tab")  # leaving the field hands the number over
        page.wait_for_timeout(400)
        if field.input_value() == str(seed):
            return


def test_compare_differs_and_uses_one_seed(page):
    page.get_by_role("tab", name="Compare").click()
    page.get_by_role("button", name="Parameters").click()
    shown = []
    for seed in range(2):
        set_seed(page, seed)
        page.locator("#compare").click()
        wait_for(page, lambda seed=seed: page.locator(".note:visible", has_text=f"seed {seed}").count() == 2)
        shown.append([page.locator(f"#{pane} textarea").input_value() for pane in ("base", "tuned")])
    assert any(base != tuned for base, tuned in shown)


def test_parameters_take_effect_on_the_page(page):
    page.get_by_role("button", name="Parameters").click()
    set_seed(page, 7)
    page.get_by_label("Stop at the first answer").uncheck()
    page.wait_for_timeout(300)
    page.get_by_role("button", name="Parameters").click()
    say(page, "say stop")
    ended(page)
    assert answers(page) == [SAYS["stop"][0]] and "seed 7" in page.locator("#chat .bot .note").inner_text()


def test_what_cannot_be_answered_is_said(page):
    say(page, "   ")
    page.get_by_text("The question is empty").wait_for()
    say(page, "plant " * 3000)
    page.get_by_text("Not answered. The question has 18,0").wait_for()
    say(page, "say plain")
    ended(page)
    assert answers(page) == ["", SAYS["plain"][0]]


@pytest.mark.parametrize("page", [360], indirect=True)
def test_a_phone_has_no_sideways_scroll(page):
    say(page, "say code " + "long" * 100)
    ended(page)
    for tab in ("Chat", "Compare", "About"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, tab


def test_about_shows_what_the_adapter_s_files_say(page):
    page.get_by_role("tab", name="About").click()
    page.locator("#card").get_by_text("mean reward").first.wait_for()
    text = page.locator("#card").inner_text()
    assert "mean reward" in text and "6 steps" in text and "peft" in text and "library_name" not in text
    page.wait_for_function("[...document.images].some(image => image.naturalWidth > 500)")
    prompt = page.get_by_label("A prompt, as the model sees it").input_value()
    assert "Instruct: What are the benefits of exercise?\nOutput:" in prompt
