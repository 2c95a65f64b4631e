"""Keys of bundles, and the null that they are compared with: measured in forward passes, without training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from .calibration import OUTLIER, own_samples, padded
from .core.attaching import own_config
from .core.base import base_fingerprint, find_blocks
from .core.evidence import running_sum
from .core.state import Key
from .core.walking import measured, resolve_adapter, state_of
from .routers.keys import DECAY, Null, projection, remembered_at


RANK = 128  # of the null's covariance, beside its diagonal
SHRINK = 0.1  # share of the mean variance that is added to every direction
SAMPLE = 1024  # tokens of the null on which every key is tried
REMEMBERED = 2048  # states of its rows that a key remembers
CANDIDATES = 8192  # states that they are chosen from


class _States:
    """Sums over the states of every depth, from the hooks of one forward.

    Attributes:
        sums, counts: by depth, over the tokens that are not outliers, in float64. outers: of outer products.
        limits: by depth, lengths above which a state is an outlier: of every batch.
        samples: by depth, states averaged over tokens as evidence is, at a share of the tokens.
        states: at the depth that is remembered: every `stride`-th state, projected.
        rows, tokens: numbers of those that were read.
    """

    def __init__(self, depths: int, outer: bool, sampled: float = 0.0) -> None:
        self.states: list[Tensor] = []
        self.stride = 1
        self.sums: list[Any] = [0.0] * depths
        self.outers: list[Any] = [0.0] * depths
        self.counts: list[Any] = [0.0] * depths
        self.limits: list[list[float]] = [[] for _ in range(depths)]
        self.samples: list[list[Tensor]] = [[] for _ in range(depths)]
        self.outer, self.sampled = outer, sampled
        self.rows = self.tokens = 0
        self.attended: Tensor | None = None

    def start(self, attended_BT: Tensor) -> None:
        self.rows += int(attended_BT.any(1).sum())
        self.tokens += int(attended_BT.sum())
        first_BT = attended_BT & (attended_BT.cumsum(1) == 1)  # an attention sink
        self.attended = attended_BT & ~first_BT

    def add(self, depth: int, hidden_BTd: Tensor) -> None:
        assert self.attended is not None
        inside_BT = self.attended.to(hidden_BTd.device)
        x_BTd = hidden_BTd.detach().double()
        length_BT = x_BTd.norm(dim=-1)
        if not bool(length_BT[inside_BT].isfinite().all()):
            raise ValueError("the base model's hidden states are not finite; check its weights, dtype and the rows.")
        limit = OUTLIER * length_BT[inside_BT].median() if bool(inside_BT.any()) else length_BT.new_tensor(math.inf)
        self.limits[depth].append(float(limit))
        inside_BT = inside_BT & (length_BT <= limit)
        kept_Nd = x_BTd[inside_BT]
        self.sums[depth] = self.sums[depth] + kept_Nd.sum(0)
        self.counts[depth] += len(kept_Nd)
        if depth == remembered_at(len(self.sums)) and not self.outer:
            self.states.append((kept_Nd[:: self.stride] @ projection(kept_Nd)).bfloat16())
            if sum(map(len, self.states)) > 2 * CANDIDATES:
                self.states, self.stride = [torch.cat(self.states)[::2]], 2 * self.stride
        if self.outer:
            self.outers[depth] = self.outers[depth] + kept_Nd.T @ kept_Nd
        if self.sampled:
            weights = inside_BT[..., None].double()
            averaged = running_sum(x_BTd * weights, DECAY) / running_sum(weights, DECAY).clamp_min(1e-9)
            read_Nd = averaged[self.attended.to(hidden_BTd.device)]
            count = max(round(len(read_Nd) * self.sampled), 1)
            chosen = torch.linspace(0, len(read_Nd) - 1, min(count, len(read_Nd))).long()
            self.samples[depth].append(read_Nd[chosen.to(read_Nd.device)].float().cpu())

    def means(self) -> Tensor:
        """(P, d), float64, on the CPU."""
        return torch.stack([(total / max(n, 1)).cpu() for total, n in zip(self.sums, self.counts)])


@contextmanager
def _reading(model: nn.Module, states: _States, on: Sequence[str]) -> Iterator[None]:
    """Run the block in eval mode with only these bundles on, and add what its forwards compute to `states`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    blocks = [base.get_submodule(name) for name in find_blocks(base)]  # type: ignore[operator,union-attr]
    state, call = state_of(model), state_of(model).call
    before = call.own, call.router

    def first(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.add(0, args[0] if args else kwargs["hidden_states"])

    def later(depth: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        states.add(depth, output[0] if isinstance(output, tuple) else output)

    # Before the bundles behind the block act: a router reads its states there, too.
    handles = [blocks[0].register_forward_pre_hook(first, with_kwargs=True)]
    handles += [block.register_forward_hook(partial(later, n), prepend=True) for n, block in enumerate(blocks, 1)]
    call.own = type(call.own)({name: float(name in on) for name in state.bundle_names()})
    call.router = None
    try:
        with measured(model, bundles=bool(on)):
            yield
    finally:
        call.own, call.router = before
        for handle in handles:
            handle.remove()


def learn_keys(
    model: nn.Module,
    rows: Mapping[str, Iterable[Any]],
    tokenizer: Any = None,
    *,
    adapter: str | None = None,
    always_on: Sequence[str] = (),
    max_length: int = 512,
    batch_size: int = 8,
    progress: bool = True,
) -> dict[str, dict[str, int]]:
    """Make the keys of bundles from the hidden states of their rows in the base model. Nothing is trained.

    A key travels in the bundle's checkpoint; with it `model.set_router("keys")` turns the bundle on where text like
    its rows is read. It holds hidden states of the rows, so do not share keys of secret rows.
    `BundleTrainer` makes keys by itself.

    Args:
        model: a model with bundles.
        rows: bundle -> its training rows, prompts and answers: strings, or dicts with "text", "prompt" and
            "completion", "messages" or "input_ids".
        tokenizer: the model's. Not needed for rows with "input_ids".
        adapter: name of the adapter. None: the only one.
        always_on: bundles that are on while the states are measured, as they will be in use.
        max_length: tokens kept of a row.
        batch_size: rows per forward pass.
        progress: show a progress bar.

    Returns:
        bundle -> {"rows": ..., "tokens": ...}; also saved as `config.keys`.

    Raises:
        ValueError: no such adapter or bundle; no rows, or rows of another kind; states that are not finite.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, learn_keys, learn_null
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> bundles = {name: {"rank": 2, "place": "mlp", "signals": {"lm": 1.0}} for name in ("b_low", "b_high")}
        >>> model = get_peft_model(base, BundleConfig(bundles=bundles, task_type="CAUSAL_LM")).eval()
        >>> low = [{"input_ids": [1, 2, 3, 4, 1, 3]}, {"input_ids": [1, 4, 2, 3, 2, 1]}]
        >>> high = [{"input_ids": [1, 48, 47, 46, 49, 48]}, {"input_ids": [1, 46, 49, 48, 47, 48]}]
        >>> learn_keys(model, {"b_low": low, "b_high": high}, progress=False)["b_low"]
        {'rows': 2, 'tokens': 12}
        >>> texts = torch.randint(5, 45, (64, 16), generator=torch.Generator().manual_seed(0)).tolist()
        >>> null = learn_null(model, [{"input_ids": ids} for ids in texts], progress=False)
        >>> model.set_router("keys")
        >>> gates = model.gates(torch.tensor([[1, 3, 2, 4, 4, 3], [1, 47, 48, 46, 46, 47]]))
        >>> gates.bundles, gates.values[:, -1].tolist()
        (['b_low', 'b_high'], [[1.0, 0.0], [0.0, 1.0]])
    """
    adapter = resolve_adapter(model, adapter)
    state = state_of(model)
    config = state.configs[adapter]
    if not isinstance(rows, Mapping) or not rows:
        raise ValueError(f"rows={rows!r} must be a dict of bundle -> its rows, with at least one bundle.")
    if unknown := sorted({*rows, *always_on} - set(state.bundle_names())):
        raise ValueError(f"there are no bundles {unknown}; adapter {adapter!r} has {list(config.bundles or ())}.")
    batches = {
        name: token_batches(list(of_bundle), tokenizer, max_length, batch_size, f"bundle {name!r}")
        for name, of_bundle in rows.items()
    }
    return keys_from_batches(model, batches, adapter, always_on, progress)


def keys_from_batches(
    model: nn.Module,
    batches: Mapping[str, Iterable[Mapping[str, Tensor]]],
    adapter: str,
    always_on: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, dict[str, int]]:
    """`learn_keys` from batches of token ids and their masks, both (B, T)."""
    state, device = state_of(model), next(model.parameters()).device
    keys, counts = {}, {}
    for name, of_bundle in tqdm(batches.items(), desc="keys", unit="bundle", disable=not progress):
        states = _run(model, of_bundle, _States(state.num_layers + 1, False), always_on, device)
        if states.tokens - states.rows < 1:
            raise ValueError(f"bundle {name!r}: its rows have no token besides the first of each; give longer rows.")
        remembered = spread_out(torch.cat(states.states), REMEMBERED)
        keys[adapter, name] = Key(states.means().bfloat16(), remembered.cpu())
        counts[name] = {"rows": states.rows, "tokens": states.tokens}
    state.keys.update(keys)
    config = own_config(model, adapter)
    config.keys = {**(config.keys or {}), **counts}
    state.version += 1
    return counts


def learn_null(
    model: nn.Module,
    texts: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
    tokenizer: Any = None,
    *,
    tokens: int = 20_000,
    max_length: int = 256,
    batch_size: int = 8,
    always_on: Sequence[str] = (),
    seed: int = 0,
    progress: bool = True,
) -> Null:
    """Measure text that belongs to no bundle, which keys are compared with. Run it once per base model.

    Args:
        model: a model with bundles.
        texts: strings (or rows as in `learn_keys`) that no bundle should speak in, as varied as possible; or a dict of
            kind of text -> its texts, such as raw text, chat and code. For strings in a list and a tokenizer with a
            chat template there are three kinds: the texts as they are; as the question of a user; and questions that
            the base model samples as a user (and its answers), as in Magpie (arXiv 2406.08464). None: text that the
            base model generates.
        tokenizer: the model's.
        tokens: number of tokens to measure, shared by the kinds of text.
        max_length: tokens per sequence.
        batch_size: sequences per forward pass.
        always_on: bundles that are on while it is measured, as in `learn_keys`.
        seed: seed of the text that the base model generates.
        progress: show a progress bar.

    Returns:
        The null. The model uses it from now on; `null.save(path)` keeps it for the next start, where
        `model.set_null(Null.load(path))` takes it.

    Raises:
        ValueError: no text, text without a tokenizer, or rows of another kind.

    Example: see `learn_keys`.
    """
    state, device = state_of(model), next(model.parameters()).device
    depths = state.num_layers + 1
    kinds = _kinds(model, texts, tokenizer, tokens, max_length, batch_size, seed)
    share = tokens / len(kinds)
    measured: dict[str, _States] = {}
    with tqdm(total=tokens, unit="token", desc="null", disable=not progress) as bar:
        for kind, batches in kinds.items():
            states = measured[kind] = _States(depths, True, SAMPLE / tokens)
            _run(model, batches, states, always_on, device, share, bar)
            if states.tokens - states.rows < 2:
                raise ValueError(f"the texts of kind {kind!r} are empty; give texts with words in them.")
    mean_PKd = torch.stack([states.means() for states in measured.values()], 1)
    diagonal, factor = [], []
    for depth in range(depths):
        counts = [states.counts[depth] for states in measured.values()]
        total_dd = sum(states.outers[depth] for states in measured.values())
        within_dd = total_dd / sum(counts)
        for n, count in enumerate(counts):
            mean_d = mean_PKd[depth, n].to(within_dd.device)
            within_dd = within_dd - (count / sum(counts)) * torch.outer(mean_d, mean_d)
        parts = low_rank(within_dd, min(RANK, within_dd.shape[0] // 2))
        diagonal.append(parts[0].float().cpu())
        factor.append(parts[1].float().cpu())
    limits = [[limit for states in measured.values() for limit in states.limits[depth]] for depth in range(depths)]
    state.null = Null(
        tuple(measured),
        mean_PKd.float(),
        torch.stack(diagonal),
        torch.stack(factor),
        torch.tensor([max(of_depth) for of_depth in limits]),
        torch.stack(
            [torch.cat([part for s in measured.values() for part in s.samples[p]]) for p in range(depths)]
        ).bfloat16(),
        sum(states.tokens for states in measured.values()),
        base_fingerprint(model),
    )
    state.version += 1
    return state.null


def spread_out(states_Nd: Tensor, count: int) -> Tensor:
    """`count` states that lie as far apart as possible, so that every state is near one of them (k-centre, greedy).

    Distances are measured in the standard deviations of the states.
    """
    if len(states_Nd) <= count:
        return states_Nd
    x_Nd = states_Nd.float()
    x_Nd = x_Nd / x_Nd.std(0).clamp_min(1e-6)
    chosen, nearest_N = [0], torch.full((len(x_Nd),), math.inf, device=x_Nd.device)
    for _ in range(count - 1):
        nearest_N = torch.minimum(nearest_N, (x_Nd - x_Nd[chosen[-1]]).square().sum(1))
        chosen.append(int(nearest_N.argmax()))
    return states_Nd[torch.tensor(chosen, device=states_Nd.device)]


def low_rank(covariance_dd: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(diagonal (d,), factor (d, rank)): a covariance, shrunk towards its mean variance, as diag + factor factor^T."""
    variance_d = covariance_dd.diagonal()
    mean = variance_d.mean()
    scale_d = variance_d.clamp_min(1e-3 * variance_d.median()).clamp_min(1e-12).sqrt()
    values, vectors = torch.linalg.eigh(covariance_dd / torch.outer(scale_d, scale_d))
    values, vectors = values[-rank:].clamp_min(0), vectors[:, -rank:]
    factor_dr = vectors * values.sqrt() * scale_d[:, None]
    rest_d = (variance_d - factor_dr.square().sum(1)).clamp_min(0)
    return (1 - SHRINK) * rest_d + SHRINK * mean, math.sqrt(1 - SHRINK) * factor_dr


def _run(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    states: _States,
    always_on: Sequence[str],
    device: torch.device,
    wanted: float = math.inf,
    bar: Any = None,
) -> _States:
    with _reading(model, states, always_on):
        for batch in batches:
            mask = batch.get("attention_mask")
            ids = batch["input_ids"].to(device)
            mask = torch.ones_like(ids) if mask is None else mask.to(device)
            before = states.tokens
            states.start(mask.bool())
            model(input_ids=ids, attention_mask=mask, use_cache=False)
            if bar is not None:
                bar.update(min(states.tokens - before, bar.total - bar.n))
            if states.tokens >= wanted:
                break
    return states


def _kinds(
    model: nn.Module,
    texts: Any,
    tokenizer: Any,
    tokens: int,
    max_length: int,
    batch_size: int,
    seed: int,
) -> dict[str, Iterable[Mapping[str, Tensor]]]:
    """Kind of text -> its batches."""
    options: dict[str, Any] = {"max_length": max_length, "batch_size": batch_size, "seed": seed}
    if texts is None:
        texts = {"own samples": own_samples(model, tokenizer, tokens=tokens, **options)}
    if isinstance(texts, str):
        raise ValueError("texts is one string; give a list of texts.")
    kinds = texts if isinstance(texts, Mapping) else {"raw": texts}
    kinds = {kind: list(of_kind) for kind, of_kind in kinds.items()}
    if not kinds or not all(kinds.values()):
        raise ValueError("texts are empty; give text that belongs to no bundle, or None for the base model's samples.")
    if (
        not isinstance(texts, Mapping)
        and getattr(tokenizer, "chat_template", None)
        and isinstance(kinds["raw"][0], str)
    ):
        start = _question_start(tokenizer)
        asked = [{"messages": [{"role": "user", "content": text[: 4 * max_length]}]} for text in kinds["raw"]]
        kinds["as questions"] = asked
        kinds["own questions"] = own_samples(model, tokenizer, tokens=tokens // 3, start=start, **options)
    return {
        kind: token_batches(of_kind, tokenizer, max_length, batch_size, f"texts of kind {kind!r}")
        for kind, of_kind in kinds.items()
    }


def _question_start(tokenizer: Any) -> list[int]:
    """The tokens of a chat before the first word of a user."""
    mark = "QUESTION"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return tokenizer(text[: text.index(mark)], add_special_tokens=False)["input_ids"]


def token_batches(
    rows: Sequence[Any], tokenizer: Any, max_length: int, batch_size: int, what: str
) -> Iterator[dict[str, Tensor]]:
    """Rows as padded batches of token ids, (B, T).

    Raises:
        ValueError: no rows, a row of another kind, or text without a tokenizer.
    """
    if isinstance(rows, str) or not rows:
        raise ValueError(f"{what} has no rows; give a list of at least one.")
    ids = [_token_ids(row, tokenizer, f"{what}: row {number}")[:max_length] for number, row in enumerate(rows)]
    pad = next(
        (t for t in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)) if t), 0
    )
    cpu = torch.device("cpu")
    return (padded(ids[start : start + batch_size], pad, cpu) for start in range(0, len(ids), batch_size))


def _token_ids(row: Any, tokenizer: Any, where: str) -> list[int]:
    if isinstance(row, Mapping) and "input_ids" in row:
        return list(row["input_ids"])
    if not callable(tokenizer):
        raise ValueError(f"{where} is text, and tokenizer is {tokenizer!r}; pass the model's as tokenizer=.")
    text = row.get("text") if isinstance(row, Mapping) else row
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]
    messages = row.get("messages") if isinstance(row, Mapping) else None
    if isinstance(row, Mapping) and messages is None and "prompt" in row:
        prompt, completion = row["prompt"], row.get("completion", "")
        if isinstance(prompt, str) and isinstance(completion, str):
            return tokenizer(prompt + completion)["input_ids"]
        messages = [*prompt, *(completion or [])]
    if not isinstance(messages, list):
        raise ValueError(
            f"{where} is {str(row)[:60]!r}; give a string, or a dict with 'text', 'prompt' and 'completion', "
            "'messages' or 'input_ids'."
        )
    ask = messages[-1].get("role") == "user"
    return tokenizer.apply_chat_template(messages, add_generation_prompt=ask, return_dict=True)["input_ids"]
