"""The command `peft-bundles`: describe, compose, share, generate with, route and sweep bundles from a shell.

This module is next to the package, not in it: `import peft_bundles` imports torch, transformers and PEFT, which takes
seconds, and help and tab completion must be fast. So each command imports the package itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any


try:
    import typer
    from typer.core import TyperGroup
except ImportError:
    raise SystemExit('error: typer is not installed; run: pip install "peft-bundles[cli]"') from None


CONFIG = "adapter_config.json"
# The base class of BadParameter, for wrong options and unknown commands; typer does not export it.
_UsageError: Any = typer.BadParameter.__mro__[2]


class OneLineErrors(TyperGroup):
    """Print every error as one line on stderr. Exit code 2 is for a mistyped command, 1 for all other errors."""

    def main(self, args: Any = None, prog_name: str | None = None, standalone_mode: bool = True, **extra: Any) -> Any:
        try:
            code = super().main(args, prog_name, standalone_mode=False, **extra)
        except _UsageError as error:
            command = error.ctx.command_path if error.ctx else "peft-bundles"
            code = _fail(f"{error.format_message().removeprefix('Invalid value: ')} See {command} --help.", 2)
        except (typer.Abort, KeyboardInterrupt):
            code = 130
        except (ImportError, ValueError, RuntimeError, OSError) as error:
            code = _fail(str(error), 1)
        except Exception as error:  # a bug, but still no traceback
            code = _fail(f"{type(error).__name__}: {error}", 1)
        if code == 130:  # typer returns it for a KeyboardInterrupt
            _fail("stopped by Ctrl-C", 130)
        if standalone_mode:
            sys.exit(code if isinstance(code, int) else 0)
        return code


def _fail(message: str, code: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return code


def _version(show: bool) -> None:
    if show:
        print(importlib.metadata.version("peft-bundles"))
        raise typer.Exit


app = typer.Typer(
    cls=OneLineErrors,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def options(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """Named low-rank bundles: describe, compose, share, generate, route, sweep and distill."""
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())


# ---- options ----


def _bundles_in(folder: str) -> list[str]:
    """Names of the bundles in a local adapter folder, or in `folder:bundle`; [] for anything else."""
    head, _, bundle = folder.rpartition(":")
    if bundle and head and Path(head).is_dir():
        return [bundle]
    try:
        return [spec["name"] for spec in json.loads((Path(folder) / CONFIG).read_text())["bundles"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _complete_bundle(ctx: typer.Context, incomplete: str) -> list[str]:
    sources = ctx.params.get("sources") or ctx.args  # an unfinished line is not parsed to its end
    names = [name for source in sources for name in _bundles_in(source)]
    return [name for name in names if name.startswith(incomplete)]


def _complete_alpha(ctx: typer.Context, incomplete: str) -> list[str]:
    return [f"{name}=" for name in _complete_bundle(ctx, incomplete.partition("=")[0])]


RESULTS = 'JSON file for the card: [{"task", "metric", "value" (or "values" per seed), "seeds", "base"}, ...].'
Sources = Annotated[
    list[str], typer.Argument(help="Adapters, as folder, folder:bundle, repo, repo:bundle or repo@revision:bundle.")
]
Base = Annotated[
    str | None,
    typer.Option(help="Base model, as folder, Hub id or id@revision. Default: as the adapter says."),
]
Alphas = Annotated[
    list[str] | None,
    typer.Option(
        "--alpha",
        metavar="BUNDLE=NUMBER",
        help="Alpha of a bundle: 0 off, 1 as trained. May be repeated.",
        autocompletion=_complete_alpha,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Rename = Annotated[bool, typer.Option("--rename", help="If two bundles have one name, rename the second.")]
Token = Annotated[str | None, typer.Option(envvar="HF_TOKEN", help="Hub token, for private repositories.")]
Results = Annotated[Path | None, typer.Option(help=RESULTS)]
Figure = Annotated[Path | None, typer.Option(help="Picture for the card, copied into the folder.")]
Data = Annotated[str | None, typer.Option(help="The training data, in words, for the card.")]


def _numbers(alphas: list[str] | None) -> dict[str, float]:
    """["b_logic=0.5"] -> {"b_logic": 0.5}."""
    numbers: dict[str, float] = {}
    for text in alphas or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"--alpha {text!r} is incomplete; write BUNDLE=NUMBER, e.g. b_logic=0.5.")
        if name in numbers:
            raise typer.BadParameter(f"--alpha {name} is given twice; give one number per bundle.")
        numbers[name] = _number(f"--alpha {text}", value)
    return numbers


def _number(what: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise typer.BadParameter(f"{what}: {value!r} is not a finite number; give one, e.g. 0.5.")
    return number


def _results(path: Path | None) -> Any:
    if path is None:
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"--results {path} is not valid JSON ({error}); give a JSON file.") from error


def _show(as_json: bool, values: dict[str, Any], text: str) -> None:
    print(json.dumps(values, indent=2) if as_json else text)


# ---- commands ----


@app.command()
def report(
    sources: Sources,
    base: Base = None,
    angles: Annotated[bool, typer.Option("--angles", help="Also measure principal angles between bundles.")] = False,
    rename: Rename = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Show ranks, overlaps and signals of bundles."""
    from peft_bundles.sharing import commands

    model, name = commands.load(sources, base, token, rename)
    from peft_bundles import report as describe
    from peft_bundles.core.walking import state_of

    reports = {adapter: describe(model, adapter, angles=angles) for adapter in state_of(model).configs}
    values = {
        adapter: {
            "bundles": each.rows,
            "overlap": each.overlap.tolist(),
            "angles": None if each.angles is None else each.angles.nan_to_num(-1).tolist(),
            "header": each.header,
        }
        for adapter, each in reports.items()
    }
    _show(as_json, {"base": name, "adapters": values}, "\n\n".join(map(str, reports.values())))


@app.command()
def compose(
    sources: Sources,
    output: Annotated[Path, typer.Option(help="Folder to save the adapter to.")],
    base: Base = None,
    rename: Rename = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several bundles. Bundles of several bases get a subfolder per basis."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists and is not an empty folder; give a new one.")
    from peft_bundles.sharing import commands

    model, name = commands.load(sources, base, token, rename)
    from peft_bundles.core.checkpoints import write
    from peft_bundles.sharing.composing import composition
    from peft_bundles.sharing.parts import from_model, with_base

    groups = composition(model).groups
    folders = [output if len(groups) == 1 else output / group["adapter"] for group in groups]
    for group, folder in zip(groups, folders):
        write(with_base(from_model(model, group["adapter"]), model), folder)
    values = {"base": name, "adapters": [{"folder": str(f), "bundles": g["bundles"]} for f, g in zip(folders, groups)]}
    _show(as_json, values, "\n".join(f"{f}: {', '.join(g['bundles'])}" for f, g in zip(folders, groups)))


@app.command()
def push(
    source: Annotated[
        str, typer.Argument(help="The bundle, as folder, or as folder:bundle if the folder has several.")
    ],
    repo: Annotated[str, typer.Argument(help="Hub repository, created if there is none.")],
    base: Base = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to.")] = None,
    results: Results = None,
    figure: Figure = None,
    data: Data = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Push one bundle to the Hub, with a model card.

    The card of the folder is used if the folder holds only this bundle and none of --results, --figure and --data is
    given. Otherwise a new card is written."""
    rows = _results(results)
    from peft_bundles.sharing import commands

    model, _ = commands.load([source], base, token)
    import peft_bundles
    from peft_bundles.core.walking import state_of

    bundles = state_of(model).bundle_names()
    if len(bundles) != 1:
        raise ValueError(f"{source} has the bundles {', '.join(bundles)}; push one, e.g. {source}:{bundles[0]}.")
    picture = None if figure is None else str(figure)
    use_card = rows is None and picture is None and data is None and _bundles_in(source) == bundles
    folder = Path(source).expanduser()
    url = peft_bundles.push_bundle(
        model,
        bundles[0],
        repo,
        private=private,
        token=token,
        revision=revision,
        results=rows,
        figure=picture,
        data=data,
        card=folder if use_card and (folder / "README.md").is_file() else None,
    )
    _show(as_json, {"bundle": bundles[0], "url": url}, url)


@app.command()
def pull(
    source: Annotated[str, typer.Argument(help="The bundle, as repo, repo:bundle or repo@revision:bundle.")],
    output: Annotated[Path | None, typer.Option(help="Folder to write it to. Default: the Hub's cache.")] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Download a bundle and check it."""
    import peft_bundles

    folder = peft_bundles.pull_bundle(source, output, token=token)
    _show(as_json, {"source": source, "folder": str(folder), "bundles": _bundles_in(str(folder))}, str(folder))


@app.command()
def generate(
    sources: Sources,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    alpha: Alphas = None,
    chat: Annotated[bool, typer.Option("--chat", help="Ask in the model's chat template; prints the answer.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    base: Base = None,
    rename: Rename = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Generate text at given alphas. For example: generate FOLDER --prompt TEXT --alpha b_logic=0.5"""
    alphas = _numbers(alpha)
    if not prompt.strip():
        raise typer.BadParameter(f"--prompt {prompt!r} is empty; give some text.")
    from peft_bundles.sharing import commands

    model, tokenizer, name = commands.ready(sources, alphas, base, token, rename)
    inputs = commands.inputs_of(prompt, chat, tokenizer, name).to(model.device)
    import torch

    torch.manual_seed(seed)
    how = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.no_grad():
        ids = model.generate(**inputs, alphas=alphas, max_new_tokens=max_new_tokens, pad_token_id=pad, **how)
    new = ids[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    values = {"prompt": prompt, "alphas": alphas, "text": text, "tokens": len(new)}
    _show(as_json, values, text if chat else tokenizer.decode(ids[0], skip_special_tokens=True))


@app.command()
def route(
    sources: Sources,
    prompt: Annotated[str, typer.Option(help="Text to read.")],
    null: Annotated[Path, typer.Option(help="What `Null.save` wrote; made of --texts if it does not exist.")],
    texts: Annotated[Path | None, typer.Option(help="Text that is nobody's, a blank line between texts.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Read it as a question in the model's chat template.")] = False,
    base: Base = None,
    rename: Rename = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Print the bundle that every token turns on. For example: route FOLDER --prompt TEXT --null null.safetensors"""
    if texts is None and not null.is_file():
        raise typer.BadParameter(f"--null {null} does not exist; give --texts FILE to measure it.")
    from peft_bundles.sharing import commands

    model, tokenizer, name = commands.ready(sources, (), base, token, rename)
    inputs = commands.inputs_of(prompt, chat, tokenizer, name).to(model.device)
    spoken = commands.spoken(model, tokenizer, inputs["input_ids"], null, texts)
    lines = [f"{word!r}\t{bundle or '-'}" for word, bundle in spoken]
    _show(as_json, {"prompt": prompt, "tokens": spoken}, "\n".join(lines))


@app.command()
def sweep(
    sources: Sources,
    bundle: Annotated[str, typer.Option(help="Bundle whose alpha changes.", autocompletion=_complete_bundle)],
    text: Annotated[
        list[str], typer.Option(metavar="TASK=FILE", help="A text file to score, and its name. May be repeated.")
    ],
    values: Annotated[str, typer.Option(help="Alphas, separated by commas.")] = "0,0.25,0.5,0.75,1,1.5",
    own: Annotated[str | None, typer.Option(help="The bundle's own task; also prints the selectivity.")] = None,
    alpha: Alphas = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows to read of each file.")] = 16,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 64,
    max_rows: Annotated[int, typer.Option(min=1, help="Largest number of rows in a forward.")] = 32,
    plot: Annotated[Path | None, typer.Option(help="Picture to write (needs matplotlib).")] = None,
    base: Base = None,
    rename: Rename = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Score texts at many alphas of one bundle. The score is minus the loss, in nats per token."""
    alphas = _numbers(alpha)
    points = [_number("--values", value) for value in values.split(",")]
    files: dict[str, str] = {}
    for item in text:
        task, _, path = item.partition("=")
        if not (task and path):
            raise typer.BadParameter(f"--text {item!r} is incomplete; write TASK=FILE, e.g. plays=hamlet.txt.")
        if task in files:
            raise typer.BadParameter(f"--text {task} is given twice; give each file another name.")
        files[task] = path
        if not Path(path).is_file():
            raise ValueError(f"--text {task}={path}: there is no such file; give a text file.")
    if own is not None and (own not in files or len(files) < 2 or 0.0 not in points):
        raise typer.BadParameter(
            f"--own {own!r} needs a --text of that name, at least one other --text, and 0 among --values."
        )
    if plot is not None and plot.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(f"--plot {plot} has no suffix of a picture format; give a .png, .svg or .pdf.")
    if plot is not None and not plot.parent.is_dir():
        raise typer.BadParameter(f"--plot {plot}: there is no folder {plot.parent}; give one that exists.")
    from peft_bundles.sharing import commands

    model, tokenizer, _ = commands.ready(sources, [bundle, *alphas], base, token, rename)
    from peft_bundles.evaluation import alpha_sweep, negative_loss

    tasks = {
        task: {"input_ids": commands.rows_of(f"--text {task}={path}", path, tokenizer, rows, tokens)}
        for task, path in files.items()
    }
    with model.alphas(alphas):
        result = alpha_sweep(model, bundle, points, negative_loss, tasks, max_rows=max_rows)
    if plot is not None:
        result.plot(plot)
    shown = {**result.to_dict(own), "fixed": alphas}
    _show(as_json, shown, commands.sweep_table(shown, points, own))


@app.command()
def distill(
    sources: Sources,
    text: Annotated[Path, typer.Option(help="Text file to imitate the bundles on; its last tenth is held out.")],
    output: Annotated[Path, typer.Option(help="Folder to save the LoRA to.")],
    alpha: Alphas = None,
    steps: Annotated[int, typer.Option(min=1)] = 200,
    rows: Annotated[int, typer.Option(min=1, help="Rows in a batch.")] = 8,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 128,
    base: Base = None,
    rename: Rename = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Train an ordinary LoRA that does what the bundles do."""
    alphas = _numbers(alpha)
    if not text.is_file():
        raise ValueError(f"--text {text}: there is no such file; give a text file.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output {output} exists and is not an empty folder; give a new one.")
    from peft_bundles.sharing import commands

    model, tokenizer, _ = commands.ready(sources, alphas, base, token, rename)
    import peft_bundles

    ids = commands.rows_of(f"--text {text}", text, tokenizer, sys.maxsize, tokens).to(model.device)
    held_out = max(len(ids) // 10, 1)
    if len(ids) <= held_out:
        raise ValueError(f"--text {text} has one row of {tokens} tokens; give more text, or lower --tokens.")
    batches = [{"input_ids": part} for part in ids[:-held_out].split(rows)]
    lora, result = peft_bundles.distill_to_lora(
        model, alphas, batches, held_out=[{"input_ids": part} for part in ids[-held_out:].split(rows)], steps=steps,
        progress=not as_json,
    )  # fmt: skip
    lora.save_pretrained(str(output))
    _show(as_json, {"folder": str(output), "alphas": alphas, **result.to_dict()}, f"{output}\n{result}")


@app.command()
def export(
    sources: Sources,
    lora: Annotated[Path, typer.Option(help="Folder to save the LoRA to.")],
    alpha: Alphas = None,
    base: Base = None,
    rename: Rename = False,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Save bundles at linear layers as a plain LoRA, exactly."""
    alphas = _numbers(alpha)
    from peft_bundles.sharing import commands

    commands.check_bundles(sources, alphas, rename, token)
    model, _ = commands.load(sources, base, token, rename)
    import peft_bundles

    folder = peft_bundles.to_lora(model, alphas, lora)
    _show(as_json, {"folder": str(folder), "alphas": alphas}, str(folder))


@app.command()
def card(
    folder: Annotated[Path, typer.Argument(help="Adapter folder.")],
    results: Results = None,
    figure: Figure = None,
    data: Data = None,
    as_json: AsJson = False,
) -> None:
    """Write the model card of an adapter folder."""
    rows = _results(results)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} has no {CONFIG}; give the folder of a saved adapter.")
    import peft_bundles

    path = peft_bundles.write_card(folder, results=rows, figure=None if figure is None else str(figure), data=data)
    _show(as_json, {"card": str(path)}, str(path))


def main() -> None:
    """Entry point of the console script. Libraries show no progress bars, and each warning takes one line."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("HF_HUB_VERBOSITY", "error"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
    ):
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns about missing kernels at import
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"warning: {' '.join(str(message).split())}\n"
    warnings.simplefilter("ignore", FutureWarning)
    app(prog_name="peft-bundles")


if __name__ == "__main__":
    main()
