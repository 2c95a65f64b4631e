"""A page with a slider for every bundle: dial them, and read the base model and the dialled one side by side.

    pip install "peft-bundles[app,demo]"
    python examples/quickstart.py        # trains the two bundles of the demo, once
    python examples/alpha_sliders.py     # then open http://127.0.0.1:7860

Both texts are written token by token in one batch, with the same random numbers, so that what differs comes from the
bundles. The colour of a token says how much likelier (orange) or less likely (blue) the bundles make it, given the text
before it: log p(dialled) - log p(base), in nats. Below the sliders, a sweep: how the loss on held-out text follows one
bundle's alpha while the others stay where their sliders are.
"""

from __future__ import annotations

import argparse
import html
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import torch
import transformers
from matplotlib.figure import Figure
from peft import PeftModel

from peft_bundles.core.walking import state_of
from peft_bundles.evaluation import AlphaSweep, alpha_sweep, negative_loss
from studies.data.corpora import encode, load_texts
from studies.data.smollm import model_folder


SWEEP = (0.0, 0.5, 1.0, 1.5, 2.0)
ROWS, LENGTH = 2, 48  # held-out rows of each kind that the sweep is made of, and their tokens: seconds on a CPU
FULL = 3.0  # nats at which a token has its full colour
LIKELIER, LESS_LIKELY = "240, 130, 20", "50, 120, 230"
PROMPTS = ["The first", "The king said", "Returns a tensor", "My lord, I"]
CSS = """
.text { white-space: pre-wrap; line-height: 1.7; min-height: 12em; overflow-wrap: anywhere; }
.text .prompt { opacity: 0.55; }
.legend span { padding: 0 0.4em; border-radius: 3px; }
"""


class Token(NamedTuple):
    """One generated token, and its log-probability under both models given the text before it."""

    id: int
    base: float
    dialled: float


@torch.no_grad()
def stream(
    model: PeftModel,
    tokenizer: Any,
    prompt: str,
    alphas: Mapping[str, float],
    *,
    tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[tuple[list[Token], list[Token]]]:
    """Write on with the base model and with the dialled one; yields both texts so far, a token longer each time.

    Four rows in one batch: each of the two texts is read by each of the two models, so that every token has two
    log-probabilities. Text 0 is written by the base model, text 1 by the dialled one.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    if not ids.shape[1]:
        raise ValueError("the prompt is empty; give some text to go on with.")
    end = model.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    gates = {name: torch.tensor([0.0, value, 0.0, value]) for name, value in alphas.items()}
    generator = torch.Generator().manual_seed(seed)
    texts: tuple[list[Token], list[Token]] = ([], [])
    running, cache, step = [True, True], None, ids.expand(4, -1)
    for _ in range(tokens):
        output = model(input_ids=step, past_key_values=cache, use_cache=True, alphas=gates)
        cache = output.past_key_values
        logs = output.logits[:, -1].float().log_softmax(-1).cpu().view(2, 2, -1)  # [text, who reads it]
        # Gumbel-max sampling: with the same noise, equal distributions give equal tokens.
        noise = -torch.empty(logs.shape[-1]).exponential_(generator=generator).log()
        chosen = []
        for i, text in enumerate(texts):
            written = logs[i, i]
            token = int((written / temperature + noise if temperature else written).argmax())
            chosen.append(token)
            if running[i]:
                text.append(Token(token, float(logs[i, 0, token]), float(logs[i, 1, token])))
                running[i] = token not in ends
        yield texts
        if not any(running):
            return
        step = torch.tensor(chosen, device=ids.device).repeat_interleave(2)[:, None]


def pieces(tokenizer: Any, tokens: list[Token]) -> Iterator[tuple[str, float, float]]:
    """(text, log p base, log p dialled) of every token; tokens that are parts of one character come together."""
    done, start = "", 0
    for stop in range(1, len(tokens) + 1):
        text = tokenizer.decode([t.id for t in tokens[:stop]], skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            group = tokens[start:stop]
            yield text[len(done) :], sum(t.base for t in group), sum(t.dialled for t in group)
            done, start = text, stop


def coloured(tokenizer: Any, prompt: str, tokens: list[Token]) -> str:
    """A text as HTML: the prompt, and every token on the colour of its difference."""
    parts = [f'<span class="prompt">{html.escape(prompt)}</span>']
    for text, base, dialled in pieces(tokenizer, tokens):
        difference = dialled - base
        colour = LIKELIER if difference > 0 else LESS_LIKELY
        strength = 0.75 * min(abs(difference) / FULL, 1.0)
        style = f' style="background: rgba({colour}, {strength:.2f})"' if strength >= 0.02 else ""
        parts.append(f'<span title="log p: base {base:.2f}, dialled {dialled:.2f}"{style}>{html.escape(text)}</span>')
    return f'<div class="text">{"".join(parts)}</div>'


def presets(names: list[str]) -> dict[str, list[float]]:
    """Preset -> one alpha a bundle."""
    single = {f"{name} alone": [float(other == name) for other in names] for name in names}
    return {"base model": [0.0] * len(names), "all on": [1.0] * len(names), **(single if len(names) > 1 else {})}


def build(model: PeftModel, tokenizer: Any, tasks: Mapping[str, Mapping[str, Any]]) -> gr.Blocks:
    """The page. `tasks` are the held-out batches of the sweep, as of `alpha_sweep`."""
    names = state_of(model).bundle_names()
    learnt = {
        name: ", ".join(s for s, w in spec.signals.items() if w)
        for config in state_of(model).configs.values()
        for name, spec in (config.bundles or {}).items()
    }
    settings = presets(names)

    def numbers(values: tuple[Any, ...]) -> dict[str, float]:
        for name, value in zip(names, values):
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise gr.Error(f"the alpha of {name} is {value!r}; give a number such as 0.5.")
        return dict(zip(names, map(float, values)))

    def write(
        prompt: str, tokens: int, temperature: float, seed: int | None, *values: Any
    ) -> Iterator[tuple[str, str]]:
        if not prompt.strip():
            raise gr.Error("The prompt is empty; give some text to go on with.")
        how = {"tokens": int(tokens), "temperature": float(temperature), "seed": int(seed or 0)}
        for texts in stream(model, tokenizer, prompt, numbers(values), **how):
            yield tuple(coloured(tokenizer, prompt, text) for text in texts)  # type: ignore[misc]

    @lru_cache(256)
    def swept(bundle: str, others: tuple[tuple[str, float], ...]) -> AlphaSweep:
        with model.alphas(dict(others)):
            return alpha_sweep(model, bundle, SWEEP, negative_loss, tasks, max_rows=64)

    def sweep(bundle: str, *values: Any) -> Figure:
        alphas = numbers(values)
        others = tuple((name, value) for name, value in alphas.items() if name != bundle)
        figure = Figure(figsize=(5, 3.4), layout="constrained")
        axes = figure.subplots()
        swept(bundle, others).draw(axes, now=alphas[bundle])
        axes.set_ylabel("minus held-out loss, change in nats")
        return figure

    with gr.Blocks(title="Alpha sliders", analytics_enabled=False) as page:
        gr.Markdown("## Alpha sliders\nDial what each bundle learnt, and compare with the base model.")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                preset = gr.Radio(list(settings), value="all on", label="Preset")
                sliders = [
                    gr.Slider(0, 2, 1, step=0.05, label=name, info=f"learnt from: {learnt[name]}", elem_id=name)
                    for name in names
                ]
                bundle = gr.Radio(names, value=names[0], label="Sweep of")
                plot = gr.Plot(show_label=False, elem_id="plot")
            with gr.Column(scale=5, min_width=480):
                prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=2)
                gr.Examples(PROMPTS, prompt)
                with gr.Row():
                    tokens = gr.Slider(4, 128, 48, step=4, label="Tokens")
                    temperature = gr.Slider(0, 1.5, 0.7, step=0.1, label="Temperature", info="0: the likeliest token")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0)
                with gr.Row():
                    go = gr.Button("Generate", variant="primary", elem_id="go")
                    stop = gr.Button("Stop", elem_id="stop")
                with gr.Row(equal_height=True):
                    with gr.Column(variant="panel", min_width=220):
                        gr.Markdown("**Base model** (all alphas 0)")
                        left = gr.HTML(coloured(tokenizer, "", []), elem_id="base")
                    with gr.Column(variant="panel", min_width=220):
                        gr.Markdown("**Dialled**")
                        right = gr.HTML(coloured(tokenizer, "", []), elem_id="dialled")
                gr.HTML(
                    f'<div class="legend">The bundles make a token <span style="background: rgba({LIKELIER}, 0.75)">'
                    f'likelier</span> or <span style="background: rgba({LESS_LIKELY}, 0.75)">less likely</span>, full '
                    f"colour at {FULL:g} nats. Hover for the numbers.</div>"
                )
        dialled = [prompt, tokens, temperature, seed, *sliders]  # a click while a text is written: the next one
        writing = go.click(write, dialled, [left, right], api_name="generate", trigger_mode="always_last")
        stop.click(None, cancels=[writing])
        preset.input(lambda name: settings[name], preset, sliders, api_name="preset")
        for slider in sliders:  # moved by hand, it is no preset any more
            slider.input(lambda: None, None, preset, show_progress="hidden", api_visibility="private")
        changes = [page.load, bundle.change, *(slider.change for slider in sliders)]
        gr.on(
            changes,
            sweep,
            [bundle, *sliders],
            plot,
            trigger_mode="always_last",
            api_name="sweep",
            show_progress="hidden",
        )
    return page


def launch(page: gr.Blocks, **options: Any) -> Any:
    """Start the server, on this machine only and without fonts from elsewhere."""
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    return page.launch(theme=theme, css=CSS, footer_links=[], **options)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--adapter", default="outputs/quickstart", help="folder of an adapter with bundles")
    parser.add_argument("--model", help="folder or Hub id of its base model; the demo's by default")
    parser.add_argument("--port", type=int, default=7860)
    args = parser.parse_args(argv)
    if not (Path(args.adapter) / "adapter_config.json").is_file():
        parser.error(f"{args.adapter} holds no adapter; run examples/quickstart.py first, or name one with --adapter.")
    path = args.model or str(model_folder())
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    base = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    tasks = {
        kind: {"input_ids": encode(tokenizer, held_out, ROWS, LENGTH)} for kind, (_, held_out) in load_texts(0).items()
    }
    launch(build(model, tokenizer, tasks), server_port=args.port)


if __name__ == "__main__":
    main()
