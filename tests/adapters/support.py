"""The support table of `docs/support.md`, computed and written: `python -m tests.adapters.support`.

Every registered adapter, as it comes, is attached to a tiny model of every architecture, run, merged and exported; what
raises `UnsupportedError` is listed with its reason. A new adapter gets its row by being registered.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

import hadamard_toolkit as ht
from hadamard_toolkit.adapters.base import REGISTRY, Adapter
from hadamard_toolkit.errors import UnsupportedError
from hadamard_toolkit.paths import CHECKOUT, atomic_write
from hadamard_toolkit.training.loop import check
from tests.adapters.life import LABELS, counts_on_bert_base, logits, shake
from tests.architectures import ARCHITECTURES, tiny_basis, tiny_batch, tiny_model
from tests.training.tiny import tiny_bert, tiny_task

NEED_FIELDS: dict[str, Adapter] = {  # those that have no defaults
    "AdapterFusion": ht.AdapterFusion(("a", "b")),
    "Stack": ht.Stack(ht.LoRA(), ht.LayerNormTuning()),
    "Subspace": ht.Subspace(ht.Hadamard(norm=None), tiny_basis()),
}
NAMED = {
    "AdapterFusion": '`AdapterFusion(("a", "b"))`',
    "Stack": "`Stack(LoRA(), LayerNormTuning())`",
    "Subspace": '`Subspace(Hadamard(norm=None), basis="…")`',
}
SWITCHED: dict[str, Adapter] = {
    '`Hadamard(placement="attention_heads")`': ht.Hadamard(placement="attention_heads"),
    '`PromptTuning(position="front")`': ht.PromptTuning(position="front"),
    "`prompt_unipelt()`": ht.prompt_unipelt(),
    "`ia3_prefix_bottleneck()`": ht.ia3_prefix_bottleneck(),
    "`stacked_unipelt()`": ht.stacked_unipelt(),
}
HEADER = """\
<!-- Generated from the tests: python -m tests.adapters.support -->

# What works where

Every adapter with its defaults, on every architecture. ✓: it attaches, runs, gets gradients, and `detach` gives the
model back bit for bit; a number: it is refused for this reason (`UnsupportedError`, before anything is changed).
*Identity*: the logits of the freshly attached model are the base model's, bit for bit. *Merges*: `attachment.merge()`
gives a plain model with the same logits to 1e-5, which `save_pretrained` and `from_pretrained` keep (where no part is
inserted, there is nothing to fold). *To peft*: `ht.export_peft` writes a folder in stock peft's format, and
`ht.import_peft` reads it back with the same logits. Both hold on all architectures that are not named; *if* names those
where a warning says under which condition. Parameters: trained and stored on BERT-base, without the head.
"""


def _cached(adapter: Adapter) -> None:
    model = tiny_model("gpt2")
    ht.attach(model, adapter)
    ids = torch.full((2, 3), 5)
    model(ids, past_key_values=model(ids, use_cache=True).past_key_values)


def _gated_on_shared_projections() -> None:
    ht.attach(tiny_model("deberta-v2", share_att_key=True), ht.UniPELT())


def _gated_on_chunks() -> None:
    model = tiny_model("bert", chunk_size_feed_forward=3)
    ht.attach(model, ht.Pfeiffer(gated="original"))
    logits(model)


def _masked_gate_without_the_model() -> None:
    model = tiny_model("bert")
    ht.attach(model, ht.LoRA(gated="masked"))
    model.bert.encoder(torch.zeros(1, 2, 16))


def _prompt_with_another_mask() -> None:
    model = tiny_model("bert")
    ht.attach(model, ht.PromptTuning())
    logits(model, attention_mask=torch.ones(3, 1, 9, 9))


def _replica() -> None:
    model = tiny_model("bert")
    ht.attach(model, ht.LoRA())
    model.base_model._replicate_for_data_parallel()(**tiny_batch())


def _trained_in_half_precision() -> None:
    check(ht.attach(tiny_bert().bfloat16(), ht.Hadamard()), tiny_task(), ht.Protocol(max_length=16), 0)


ELSEWHERE: dict[str, Callable[[], object]] = {  # what no cell of the table shows
    "gated LoRA, `UniPELT` too, on DeBERTa-v3 (deberta-v2 with `share_att_key=True`)": _gated_on_shared_projections,
    "gates in a decoder with a filled cache of keys and values": partial(_cached, ht.LoRA(gated="original")),
    "gates in a feed-forward block that is computed in chunks": _gated_on_chunks,
    "masked gates in layers that are called without their model": _masked_gate_without_the_model,
    "prompts with a filled cache of keys and values": partial(_cached, ht.PromptTuning()),
    "prompts with another attention mask": _prompt_with_another_mask,
    "every adapter that inserts something, on several devices by `nn.DataParallel`": _replica,
    "training of a head, a norm or a backbone that is in half precision": _trained_in_half_precision,
}


@dataclass
class Row:
    """What was seen of one method, by architecture where it may differ; refusals hold their reason."""

    works: dict[str, str | None] = field(default_factory=dict)
    identity: set[bool] = field(default_factory=set)
    merges: dict[str, str | None] = field(default_factory=dict)
    exports: dict[str, str | None] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)  # of exports, as their warnings say


def defaults() -> dict[str, Adapter]:
    """Every registered adapter as it comes, by its name."""
    return {name: NEED_FIELDS.get(name) or REGISTRY[name]() for name in sorted(REGISTRY)}


def methods() -> dict[str, Adapter]:
    """What the rows are called -> the adapter: all that are registered, then the same with some switches set."""
    return {NAMED.get(name, f"`{name}`"): adapter for name, adapter in defaults().items()} | SWITCHED


def observe(adapter: Adapter) -> Row:
    """Attach, run, export, merge and detach on a tiny model of each architecture."""
    row = Row()
    for architecture in ARCHITECTURES:
        model = tiny_model(architecture)
        before, weights = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
        try:
            attachment = ht.attach(model, adapter)
        except UnsupportedError as error:
            row.works[architecture] = str(error)
            continue
        row.works[architecture] = None
        row.identity.add(torch.equal(logits(model), before))
        model(**tiny_batch(), labels=LABELS).loss.backward()
        assert any(p.grad is not None and p.grad.any() for p in attachment.parameters())

        shake(attachment)
        expected = logits(model)
        with tempfile.TemporaryDirectory() as folder:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always", UserWarning)
                export = partial(ht.export_peft, attachment, Path(folder) / "peft")
                row.exports[architecture] = _refusal(export)
            if said:
                row.conditions[architecture] = _unnamed(str(said[0].message))
            row.merges[architecture] = _refusal(attachment.merge)
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
            attachment.detach()
            assert list(model.state_dict()) == list(weights)
            assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
            if row.exports[architecture] is None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # the export has said the same
                    ht.import_peft(model, Path(folder) / "peft")
                torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    return row


def _refusal(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except UnsupportedError as error:
        return re.sub(r"^\S+\(.*\) has no export", "it has no export", _unnamed(str(error)))
    return None


def _unnamed(reason: str) -> str:
    """The same reason for every model class."""
    return re.sub(r"\w+ForSequenceClassification", "this model", reason)


class Notes:
    """Reasons, each numbered when it is first cited."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def cite(self, reason: str) -> str:
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"[{self.reasons.index(reason) + 1}]"


def _everywhere(seen: dict[str, str | None], notes: Notes) -> str:
    """`✓`, `–` with the first reason if all architectures refuse, or which of them do and why."""
    refused = {architecture: reason for architecture, reason in seen.items() if reason is not None}
    if not refused:
        return "✓"
    if len(refused) == len(seen):
        return f"– {notes.cite(next(iter(refused.values())))}"
    return "✓, not " + _where(refused, notes)


def _where(reasons: dict[str, str], notes: Notes) -> str:
    """Architectures by their reason, each with its number."""
    where: dict[str, list[str]] = {}
    for architecture, reason in reasons.items():
        where.setdefault(notes.cite(reason), []).append(architecture)
    return ", ".join(f"{', '.join(names)} {number}" for number, names in where.items())


def support_table() -> str:
    """The text of `docs/support.md` up to the part on banks."""
    notes = Notes()
    columns = ["method", *ARCHITECTURES, "identity", "merges", "to peft", "trained", "stored"]
    lines = [columns, ["---", *[":-:"] * len(ARCHITECTURES), ":-:", "---", "---", "--:", "--:"]]
    for name, adapter in methods().items():
        print(name, file=sys.stderr)
        row = observe(adapter)
        assert len(row.identity) == 1, f"{name} is the identity on some architectures only"
        counts = counts_on_bert_base(adapter)
        trained, stored = (sum(counts[role][i] for role in counts if role != "head") for i in (0, 1))
        cells = ["✓" if reason is None else notes.cite(reason) for reason in row.works.values()]
        identity = "✓" if row.identity == {True} else "–"
        everywhere = [_everywhere(seen, notes) for seen in (row.merges, row.exports)]
        if row.conditions:
            everywhere[1] += "; if: " + _where(row.conditions, notes)
        lines.append([name, *cells, identity, *everywhere, f"{trained:,}", f"{stored:,}"])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    reasons = "\n".join(f"{number}. {reason}" for number, reason in enumerate(notes.reasons, start=1))
    elsewhere = "\n".join(f"- {situation}: {_refusal(attempt)}" for situation, attempt in ELSEWHERE.items())
    also = f"Also refused, when attached, when the model runs or before it trains:\n\n{elsewhere}\n"
    return f"{HEADER}\n{table}\n\nReasons:\n\n{reasons}\n\n{also}"


if __name__ == "__main__":
    from tests.training.bank_support import bank_table

    atomic_write(CHECKOUT / "docs" / "support.md", f"{support_table()}\n{bank_table()}")
