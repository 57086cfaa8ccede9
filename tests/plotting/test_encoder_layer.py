"""The drawing of an encoder layer names every site of the library, and marks those where an adapter attaches."""

from __future__ import annotations

import importlib.util
import io
import itertools
import os
from types import ModuleType

import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text

import hadamard_toolkit as ht
from hadamard_toolkit.paths import CHECKOUT
from hadamard_toolkit.plotting import WIDTHS, sites
from hadamard_toolkit.plotting.attaching import attaching
from hadamard_toolkit.sites import SITES

ADAPTERS = {
    "Hadamard": ht.Hadamard(),
    "MAM": ht.MAM(),
    "UniPELT": ht.prompt_unipelt(),
    "FullFineTuning": ht.FullFineTuning(),
    "Stack": ht.Stack(ht.LoRA(layers=(0, 3)), ht.Hadamard(layers=(1,)), ht.LayerNormTuning(norm="both")),
}


def site_texts(figure: Figure) -> list[Text]:
    """The names of sites: the texts in the monospaced font."""
    return [text for text in figure.axes[0].texts if "DejaVu Sans Mono" in text.get_family()]


def names(figure: Figure) -> list[str]:
    return [text.get_text() for text in site_texts(figure)]


def dark(figure: Figure) -> set[str]:
    """Names of the sites whose frame is dark, by the box behind each name."""
    marked = set()
    for text in site_texts(figure):
        [box] = [
            patch
            for patch in figure.axes[0].patches
            if isinstance(patch, FancyBboxPatch) and patch.zorder > 0 and centre(patch, text)
        ]
        if sum(to_rgb(box.get_facecolor())) < 1:
            assert sum(to_rgb(text.get_color())) > 2, "light letters on a dark ground"
            marked.add(text.get_text())
    return marked


def centre(box: FancyBboxPatch, text: Text) -> bool:
    across, up = text.get_position()
    inside_across = box.get_x() < across < box.get_x() + box.get_width()
    return inside_across and box.get_y() < up < box.get_y() + box.get_height()


def beside(figure: Figure) -> list[str]:
    """The texts to the right of the layer, from top to bottom, each in one line."""
    texts = [text for text in figure.axes[0].texts if text.get_ha() == "left" and text.get_text()]
    return [text.get_text().replace("\n", " ") for text in sorted(texts, key=lambda t: -t.get_position()[1])]


def test_every_site_of_the_library_is_drawn_once_and_explained_in_its_words() -> None:
    figure = sites()
    assert sorted(names(figure)) == sorted(SITES)
    assert dark(figure) == set()
    said = " ".join(beside(figure))
    assert all(explanation in said for explanation in SITES.values())


def test_sites_stand_in_the_order_in_which_the_input_passes_them() -> None:
    up = {text.get_text(): text.get_position()[1] for text in site_texts(sites())}
    assert up["query"] == up["key"] == up["value"]
    passed = ["query", "attention_heads", "attention_output", "attention_norm", "ffn_input", "ffn_inner"]
    passed += ["ffn_hidden", "ffn_output", "ffn_residual", "ffn_norm"]
    assert sorted(passed, key=lambda name: up[name]) == passed


def test_hadamard_is_marked_at_attention_output_and_its_norm_with_its_formula() -> None:
    figure = sites(ht.Hadamard())
    assert sorted(names(figure)) == sorted(SITES)
    assert dark(figure) == {"attention_output", "attention_norm"}
    assert beside(figure) == ["weight and bias are trained", "A′ = W ⊙ A + b"]
    assert "Hadamard() attaches" in figure.texts[0].get_text()
    assert "also trains" not in figure.texts[0].get_text()
    before = sites(ht.Hadamard(placement="attention_heads", vectors=("weight",), norm=None))
    assert dark(before) == {"attention_heads"}
    assert beside(before) == ["A′ = W ⊙ A"]
    assert beside(sites(ht.Hadamard(vectors=("bias",), norm=None))) == ["A′ = A + b"]


@pytest.mark.parametrize(
    ("adapter", "lines"),
    [
        (ht.HeadOnly(), {}),
        (ht.LoRA(), {key: ["h′ = h + α/r · B A x"] for key in ("query", "value")}),
        (ht.LoRA(gated="masked", targets=("key",)), {"key": ["h′ = h + g · B A x"]}),
        (ht.IA3(), {key: ["h′ = W ⊙ h"] for key in ("key", "value", "ffn_hidden")}),
        (ht.Houlsby(), {key: ["h′ = h + up(act(down(h)))"] for key in ("attention_output", "ffn_output")}),
        (ht.Pfeiffer(), {"ffn_residual": ["h′ = h + up(act(down(x))), x = norm(h)"]}),
        (
            ht.ParallelAdapter(scale=4),
            {
                "ffn_output": ["h′ = h + 4 · up(act(down(x)))"],
                "ffn_input": ["x, read by the adapter at ffn_output"],
            },
        ),
        (ht.AdapterFusion(("rte", "sst2")), {"ffn_residual": ["h′ = h + Σₜ softmaxₜ(Q x · K zₜ) V zₜ"]}),
        (ht.PrefixTuning(), {"prefix": ["keys [P_K; K], values [P_V; V]"]}),
        (ht.PrefixTuning(gated="masked"), {"prefix": ["keys [g · P_K; K], values [g · P_V; V]"]}),
        (ht.PromptTuning(), {"prompt": ["[e₁; P; e₂ … eₙ]"]}),
        (ht.PromptTuning(position="front"), {"prompt": ["[P; e₁; e₂ … eₙ]"]}),
        (
            ht.Stack(ht.LoRA(layers=(0, 3)), ht.LoRA(gated="masked", layers=(5,), targets=("query",))),
            {
                "query": ["h′ = h + α/r · B A x (layers 0, 3)", "h′ = h + g · B A x (layer 5)"],
                "value": ["h′ = h + α/r · B A x (layers 0, 3)"],
            },
        ),
    ],
)
def test_what_an_adapter_computes_at_each_site(adapter: ht.Adapter, lines: dict[str, list[str]]) -> None:
    found = attaching(adapter)
    assert found.lines == lines
    assert found.sites == {site for site in lines if site != "ffn_input"}
    assert found.elsewhere == []


def test_parameters_of_the_backbone_are_trained_at_the_site_of_their_module() -> None:
    biases = attaching(ht.BitFit())
    projections = {"query", "key", "value", "attention_output", "ffn_inner", "ffn_output"}
    assert biases.sites == projections | {"attention_norm", "ffn_norm"}
    assert set(map(tuple, biases.lines.values())) == {("bias is trained",)}
    assert biases.elsewhere == ["embeddings", "pooler"]
    assert "also trains: embeddings, pooler" in sites(ht.BitFit()).texts[0].get_text().replace("\n", " ")
    norms = attaching(ht.LayerNormTuning(norm="output", layers=(2,)))
    assert norms.lines == {"ffn_norm": ["weight and bias are trained (layer 2)"]}
    assert norms.elsewhere == []


def test_layers_are_named_in_their_order() -> None:
    [line, *_] = attaching(ht.LoRA(layers=(1, 8, 11))).lines["query"]
    assert line.endswith("(layers 1, 8, 11)")
    [line, *_] = attaching(ht.LoRA(layers=(8,))).lines["query"]
    assert line.endswith("(layer 8)")


def test_a_method_of_ones_own_is_called_by_its_class() -> None:
    class Shift(ht.SiteModule):
        def forward(self, hidden, inputs):
            return hidden

    class Mine(ht.Adapter):
        def declare(self, sites):
            from hadamard_toolkit.adapters.base import Insertion

            yield Insertion(sites(0, "ffn_inner"), Shift())

    assert attaching(Mine()).lines == {"ffn_inner": ["Shift (layer 0)"]}


def test_prefixes_and_prompts_have_their_place_where_an_adapter_makes_them() -> None:
    figure = sites(ht.prompt_unipelt())
    assert sorted(names(figure)) == sorted([*SITES, "prefix", "prompt"])
    assert dark(figure) == {"prefix", "prompt", "query", "value", "ffn_residual"}
    assert beside(figure)[-2:] == ["query, value: h′ = h + g · B A x", "[e₁; P; e₂ … eₙ]"]


@pytest.mark.parametrize("venue", WIDTHS)
@pytest.mark.parametrize("adapter", [None, *ADAPTERS.values()], ids=["none", *ADAPTERS])
def test_no_text_covers_another_or_leaves_the_figure(adapter: ht.Adapter | None, venue: str) -> None:
    figure = sites(adapter, venue=venue)
    assert figure.get_figwidth() == WIDTHS[venue]
    figure.draw_without_rendering()
    texts = [text for text in (*figure.axes[0].texts, *figure.texts) if text.get_text()]
    boxes = {text.get_text(): Text.get_window_extent(text) for text in texts}
    for (one, here), (other, there) in itertools.combinations(boxes.items(), 2):
        assert not here.overlaps(there), (one, other)
    for text, box in boxes.items():
        assert figure.bbox.padded(0.5).containsx(box.x1), text
        assert figure.bbox.padded(0.5).containsy(box.y0), text
        assert figure.bbox.padded(0.5).containsy(box.y1), text


def test_names_fit_their_frames() -> None:
    figure = sites(ht.prompt_unipelt())
    figure.draw_without_rendering()
    for text in site_texts(figure):
        box = text.get_window_extent()
        [frame] = [p for p in figure.axes[0].patches if p.zorder > 0 and centre(p, text)]
        around = frame.get_window_extent()
        assert around.x0 < box.x0
        assert box.x1 < around.x1


def test_the_same_call_gives_the_same_bytes() -> None:
    first, second = (io.BytesIO() for _ in range(2))
    for stream in (first, second):
        sites(ht.Hadamard()).savefig(stream, format="png")
    assert first.getvalue() == second.getvalue()


def test_what_is_no_adapter_and_layers_that_bert_base_lacks_are_refused() -> None:
    with pytest.raises(ht.ArgumentError, match="adapter='hadamard' is not allowed"):
        sites("hadamard")  # type: ignore[arg-type]
    with pytest.raises(ht.ArgumentError, match="layers 0 to 11"):
        sites(ht.Hadamard(layers=(12,)))
    with pytest.raises(ht.ArgumentError, match="venue='nature'"):
        sites(venue="nature")


def tool() -> ModuleType:
    """`tools/draw_sites.py`, which is a script and not part of the package."""
    spec = importlib.util.spec_from_file_location("draw_sites", CHECKOUT / "tools" / "draw_sites.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif("TEST_RESOLUTION" in os.environ, reason="other releases of matplotlib write other bytes")
def test_the_drawing_in_docs_is_up_to_date() -> None:
    script = tool()
    assert script.DRAWING.read_text(encoding="utf-8") == script.drawing(), "run tools/draw_sites.py"
