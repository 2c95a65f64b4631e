"""examples/alpha_sliders.py: its streams against the models, the page through Gradio's client, and in a browser."""

from __future__ import annotations

import json
import re
import shutil
import threading
from html import unescape
from pathlib import Path

import pytest
import torch
from gradio_client import Client
from models import batch, bundle_config, perturb, tiny
from peft import get_peft_model
from playwright.sync_api import expect, sync_playwright
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
NAMES = ["b_mlp", "b_linear", "b_diag"]
OFF = dict.fromkeys(NAMES, 0.0)
ON = dict.fromkeys(NAMES, 1.0)


@pytest.fixture(scope="module")
def app():
    """The example as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
        import alpha_sliders

        yield alpha_sliders


@pytest.fixture(scope="module")
def tokenizer():
    """Bytes and a few merges, so that a character may be several tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<bos>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["the king said that the lord of the rings is the end of the tale"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def model():
    return perturb(get_peft_model(tiny("llama", vocab_size=300), bundle_config()), scale=0.6).eval()


def alone(model, ids: torch.Tensor, alphas) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, alphas=alphas).logits.log_softmax(-1)


def test_a_stream_is_both_models_read_token_by_token(app, model, tokenizer):
    alphas = {"b_mlp": 1.0, "b_linear": 0.5, "b_diag": 1.5}
    frames = [tuple(map(len, texts)) for texts in app.stream(model, tokenizer, "the king", alphas, tokens=12)]
    assert [max(each) for each in frames] == list(range(1, len(frames) + 1))  # a token at a time
    *_, texts = app.stream(model, tokenizer, "the king", alphas, tokens=12)
    prompt = tokenizer("the king", return_tensors="pt")["input_ids"]
    for text, writer in zip(texts, (OFF, alphas)):
        ids = torch.cat([prompt, torch.tensor([[t.id for t in text]])], 1)
        for setting, read in ((OFF, "base"), (alphas, "dialled")):
            logs = alone(model, ids, setting)[0, prompt.shape[1] - 1 : -1]
            found = torch.tensor([getattr(t, read) for t in text])
            wanted = logs.gather(-1, ids[0, prompt.shape[1] :, None]).squeeze(-1)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
            if setting is writer:
                assert logs.argmax(-1).tolist() == [t.id for t in text]  # temperature 0
    assert [t.id for t in texts[0]] != [t.id for t in texts[1]]


def test_with_all_off_both_texts_are_one(app, model, tokenizer):
    """Also when sampling: the random numbers are shared."""
    for temperature in (0.0, 1.0):
        *_, (left, right) = app.stream(model, tokenizer, "the", OFF, tokens=20, temperature=temperature)
        # Not to the bit: rows of a batch may differ in the last digit by where they stand in it (some CPUs' products).
        numbers = [x for pair in zip(left, right) for t in pair for x in (t.base, t.dialled)]
        assert [t.id for t in left] == [t.id for t in right] and len(left) == len(right)
        assert numbers == pytest.approx([x for t in left for x in [t.base] * 4], abs=1e-5)
    runs = [
        [t.id for t in list(app.stream(model, tokenizer, "the", OFF, tokens=20, temperature=1.0, seed=seed))[-1][0]]
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_sampling_follows_the_distribution(app, model, tokenizer):
    """The share of each first token over many seeds, against its probability."""
    prompt = tokenizer("the", return_tensors="pt")["input_ids"]
    wanted = alone(model, prompt, OFF)[0, -1].div(0.15).softmax(-1)  # cold, so that few tokens have all the mass
    count = torch.zeros_like(wanted)
    for seed in range(200):
        texts = next(app.stream(model, tokenizer, "the", OFF, tokens=1, temperature=0.15, seed=seed))
        count[texts[0][0].id] += 1
    assert 0.5 * (count / 200 - wanted).abs().sum() < 0.5 * (2 * (wanted * (1 - wanted) / 200).sqrt()).sum() + 0.02


def test_a_text_ends_with_its_end_token(app, model, tokenizer, monkeypatch):
    *_, (left, right) = app.stream(model, tokenizer, "the", ON, tokens=12)
    end = left[3].id
    first = [t.id for t in left].index(end) + 1
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end])
    *_, (short, other) = app.stream(model, tokenizer, "the", ON, tokens=12)
    assert [t.id for t in short] == [t.id for t in left][:first]
    assert len(other) == next((i + 1 for i, t in enumerate(right) if t.id == end), 12)


def test_pieces_join_to_the_text_and_whole_characters(app, tokenizer):
    text = "the 猫 said π ≤ 4"
    ids = tokenizer(text)["input_ids"]
    tokens = [app.Token(i, -1.0, -0.5) for i in ids]
    found = list(app.pieces(tokenizer, tokens))
    assert "".join(piece for piece, _, _ in found) == text and len(found) < len(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece, _, _ in found)
    assert sum(base for _, base, _ in found) == pytest.approx(-len(ids))  # log-probabilities of a group add up


def test_colours_say_the_sign_and_the_size(app, tokenizer):
    tokens = [app.Token(5, -3.0, -1.5), app.Token(6, -1.0, -9.0), app.Token(7, -2.0, -2.0)]
    page = app.coloured(tokenizer, "<b>", tokens)
    spans = re.findall(r'<span title="([^"]*)"([^>]*)>', page)
    assert "&lt;b&gt;" in page and "<b>" not in page
    assert f"rgba({app.LIKELIER}, 0.38)" in spans[0][1] and f"rgba({app.LESS_LIKELY}, 0.75)" in spans[1][1]
    assert spans[2][1] == "" and spans[0][0] == "log p: base -3.00, dialled -1.50"


# ---- the page ----


@pytest.fixture(scope="module")
def url(app, model, tokenizer):
    """The page, served on this machine."""
    tasks = {kind: {"input_ids": batch(3, 10, seed=i)} for i, kind in enumerate(("plays", "docs"))}
    page = app.build(model, tokenizer, tasks)
    _, address, _ = app.launch(page, prevent_thread_lock=True, quiet=True, show_error=True)
    yield address
    page.close()


def words(page: str) -> str:
    return unescape(re.sub("<[^>]*>", "", page))


def test_the_page_through_its_api(app, model, tokenizer, url):
    client = Client(url, verbose=False)
    job = client.submit("the king", 12, 0.0, 0, 1.0, 0.5, 0.0, api_name="/generate")
    left, right = job.result(timeout=60)
    *_, texts = app.stream(model, tokenizer, "the king", {"b_mlp": 1.0, "b_linear": 0.5, "b_diag": 0.0}, tokens=12)
    assert [left, right] == [app.coloured(tokenizer, "the king", text) for text in texts]
    assert len(job.outputs()) == 12  # streamed
    left, right = client.predict("the king", 12, 0.7, 3, 0.0, 0.0, 0.0, api_name="/generate")
    assert left == right and "rgba" not in left
    assert client.predict("b_linear alone", api_name="/preset") == (0.0, 1.0, 0.0)
    pictures = [
        json.dumps(client.predict("b_mlp", *alphas, api_name="/sweep"))
        for alphas in ((1, 1, 1), (0.5, 1, 1), (1, 0, 1))
    ]
    assert len(set(pictures)) == 3  # the mark moves; another bundle's alpha bends the curves


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("the", 12, 0.0, 0, "high", 1.0, 1.0), "high"),
        ((" ", 12, 0.0, 0, 1.0, 1.0, 1.0), "The prompt is empty"),
        (("the", 12, 0.0, 0, 3.0, 1.0, 1.0), "3.0"),
    ],
)
def test_bad_input_to_the_page(url, given, message):
    with pytest.raises(Exception, match=message):
        Client(url, verbose=False).predict(*given, api_name="/generate")


def test_two_people_at_once(app, model, tokenizer, url):
    """Alphas belong to a call: two streams with different ones do not mix."""
    settings = [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.0, 1.0, 0.5)]
    found: dict[int, str] = {}

    def visit(i: int) -> None:
        found[i] = Client(url, verbose=False).predict("the lord", 16, 0.0, 0, *settings[i], api_name="/generate")[1]

    threads = [threading.Thread(target=visit, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, values in enumerate(settings):
        *_, (_, text) = app.stream(model, tokenizer, "the lord", dict(zip(NAMES, values)), tokens=16)
        assert found[i] == app.coloured(tokenizer, "the lord", text)


def test_a_missing_adapter_names_the_fix(app, tmp_path, capsys):
    with pytest.raises(SystemExit):
        app.main(["--adapter", str(tmp_path)])
    assert "holds no adapter; run examples/quickstart.py first" in capsys.readouterr().err


# ---- in a browser ----


def browser_path() -> str:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert path is not None, "no browser: apt-get install chromium-headless-shell"
    return path


@pytest.fixture
def tab(url):
    """A tab of a headless Chromium with the page open; a script that fails, or a word to another host, is an error."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        wrong: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:", "ws")) else wrong.append(r.url))
        page.goto(url)
        expect(page.locator("#go")).to_be_visible(timeout=30_000)
        expect(page.locator("#plot img")).to_be_visible(timeout=30_000)
        yield page
        browser.close()
    assert not wrong


WATCH = """() => {
    window.lengths = new Set();
    const look = () => window.lengths.add(document.querySelector('#dialled .text').textContent.length);
    new MutationObserver(look).observe(document.querySelector('#dialled'), {subtree: true, childList: true});
}"""


def test_in_a_browser(tab, tmp_path):
    number = lambda name: tab.locator(f"#{name} input[type=number]")  # noqa: E731
    text = lambda side: tab.locator(f"#{side} .text")  # noqa: E731

    # The text streams in, and has colours where the bundles disagree.
    tab.get_by_label("Prompt").fill("the king")
    tab.evaluate(WATCH)
    tab.locator("#go").click()
    expect(tab.locator("#stop")).to_be_enabled()
    tab.wait_for_function("document.querySelectorAll('#dialled .text span[title]').length >= 20", timeout=60_000)
    tab.wait_for_timeout(500)
    assert len(tab.evaluate("[...window.lengths]")) >= 5
    assert text("base").text_content() != text("dialled").text_content()
    assert tab.locator("#dialled span[style*='rgba']").count() > 3
    tab.screenshot(path=tmp_path / "dialled.png", full_page=True)

    # A preset moves the sliders; with all of them at 0 both sides are the base model, without colours.
    before = tab.locator("#plot img").get_attribute("src")
    tab.get_by_label("base model").check()
    for name in NAMES:
        expect(number(name)).to_have_value("0")
    expect(tab.locator("#plot img")).not_to_have_attribute("src", before, timeout=30_000)
    tab.locator("#go").click()
    expect(tab.locator("#dialled span[style*='rgba']")).to_have_count(0, timeout=30_000)
    tab.wait_for_function(
        "document.querySelector('#base .text').textContent == document.querySelector('#dialled .text').textContent"
    )

    # A slider moves the mark of the plot, and changes what is written.
    before = tab.locator("#plot img").get_attribute("src")
    slider = tab.locator("#b_mlp input[type=range]")
    slider.focus()
    for _ in range(10):
        slider.press("ArrowRight")
    expect(number("b_mlp")).to_have_value("0.5")
    expect(tab.get_by_label("base model")).not_to_be_checked()
    expect(tab.locator("#plot img")).not_to_have_attribute("src", before, timeout=30_000)
    tab.locator("#go").click()
    expect(tab.locator("#dialled span[style*='rgba']").first).to_be_visible(timeout=30_000)

    # Enter submits. A prompt is shown as text and never becomes a part of the page.
    hostile = "<img src=x onerror=alert(1)> ${alert(2)} {{alert(3)}} `"
    tab.get_by_label("Prompt").fill(hostile)
    tab.get_by_label("Prompt").press("Enter")
    expect(text("dialled").locator(".prompt")).to_have_text(hostile, timeout=30_000)
    assert tab.locator("#dialled img").count() == 0

    # An empty prompt is answered with what to do.
    tab.get_by_label("Prompt").fill("")
    tab.locator("#go").click()
    expect(tab.get_by_text("The prompt is empty; give some text to continue.")).to_be_visible(timeout=30_000)


@pytest.fixture(params=[1280, 390], ids=["desk", "phone"])
def sized(tab, request):
    """The page on a desk and on a phone."""
    tab.set_viewport_size({"width": request.param, "height": 844})
    return tab


def filled(page) -> None:
    """Wait for both texts."""
    page.wait_for_function("document.querySelectorAll('#dialled .text span[title]').length >= 20", timeout=60_000)
    page.wait_for_function("document.querySelectorAll('#base .text span[title]').length >= 20", timeout=60_000)


@pytest.mark.parametrize("key", ["Enter", "Control+Enter"])
def test_the_keyboard_generates(sized, key):
    sized.get_by_label("Prompt").fill("the king")
    sized.get_by_label("Prompt").press(key)
    filled(sized)


def test_texts_of_earlier_settings_are_marked(sized):
    stale = sized.locator("#stale")
    moved = sized.locator("#b_mlp input[type=range]")
    moved.focus()
    moved.press("ArrowLeft")
    sized.wait_for_timeout(500)
    expect(stale).to_have_text("")  # there is no text yet
    sized.locator("#go").click()
    filled(sized)
    expect(stale).to_have_text("")
    moved.focus()
    moved.press("ArrowLeft")
    expect(stale).to_contain_text("earlier settings", timeout=10_000)
    sized.locator("#go").click()
    expect(stale).to_have_text("", timeout=10_000)
    moved.focus()
    moved.press("ArrowLeft")  # while the texts are written: they belong to earlier settings as soon as they are there
    sized.wait_for_timeout(3000)
    expect(stale).to_contain_text("earlier settings")


@pytest.mark.parametrize(("field", "value"), [("Prompt", ""), ("Seed", "-1")])
def test_a_refused_generation_leaves_the_old_texts_marked(sized, field, value):
    sized.get_by_role("button", name="Examples and settings").click()
    sized.locator("#go").click()
    filled(sized)
    sized.get_by_label(field).fill(value)
    sized.locator("#go").click()
    expect(sized.get_by_test_id("toast-body").first).to_be_visible(timeout=10_000)
    expect(sized.locator("#stale")).to_contain_text("earlier settings", timeout=10_000)


def test_numbers_without_a_mouse(sized):
    sized.locator("#go").click()
    filled(sized)
    sized.wait_for_timeout(1000)
    table = sized.locator("#dialled .numbers table")
    expect(table).not_to_be_visible()
    sized.locator("#dialled .numbers summary").press("Enter")
    expect(table).to_be_visible()
    assert re.search(r"-\d+\.\d\d", table.inner_text())


def test_an_alpha_below_zero(sized):
    sized.locator("#b_mlp input[type=number]").fill("-0.5")
    sized.locator("#b_mlp input[type=number]").press("Tab")
    sized.locator("#go").click()
    filled(sized)
    expect(sized.get_by_text("is less than minimum")).to_have_count(0)


def test_sliders_and_texts_are_on_one_screen(sized):
    """From the first slider to the first line of the text with bundles, once both texts are there."""
    sized.locator("#go").click()
    filled(sized)
    slider, text = (sized.locator(where).bounding_box() for where in (f"#{NAMES[0]}", "#dialled"))
    assert abs(text["y"] - slider["y"]) < 844 - 40  # a line is 27 px high


def test_the_plot_fits_a_dark_page(tab, url):
    """Nothing in the picture is white, and its corner is transparent."""
    tab.goto(f"{url}?__theme=dark")
    picture = tab.locator("#plot img")
    expect(picture).to_be_visible(timeout=30_000)
    alpha, white = picture.evaluate(
        """async img => {
            await img.decode();
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [img.naturalWidth, img.naturalHeight];
            const pen = canvas.getContext('2d');
            pen.drawImage(img, 0, 0);
            const data = pen.getImageData(0, 0, canvas.width, canvas.height).data;
            let white = 0;
            for (let i = 0; i < data.length; i += 4)
                white += data[i] > 240 && data[i + 1] > 240 && data[i + 2] > 240 && data[i + 3] > 200;
            return [data[3], white / (canvas.width * canvas.height)];
        }"""
    )
    assert alpha == 0 and white < 0.01


def test_an_empty_prompt_prints_no_traceback(url, capfd):
    with pytest.raises(Exception, match="The prompt is empty"):
        Client(url, verbose=False).predict(" ", 12, 0.0, 0, 1.0, 1.0, 1.0, api_name="/generate")
    assert "Traceback" not in capfd.readouterr().err


def test_on_a_phone(tab, tmp_path):
    tab.set_viewport_size({"width": 390, "height": 844})
    tab.locator("#go").click()
    tab.wait_for_function("document.querySelectorAll('#dialled .text span[title]').length >= 20", timeout=60_000)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390  # nothing sticks out
    tab.screenshot(path=tmp_path / "phone.png", full_page=True)
