"""Sites: the tables name real modules, and a site is where its name says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel

import hadamard_toolkit as ht
from hadamard_toolkit import architectures, sites
from hadamard_toolkit.errors import ArgumentError, UnsupportedError
from hadamard_toolkit.sites import SITES, ProjectionSlice, Sites, head_parameters
from hadamard_toolkit.unsharing import unshare
from tests.architectures import ARCHITECTURES, tiny_batch, tiny_config, tiny_model


def test_every_architecture_of_the_design_has_a_table() -> None:
    assert set(ARCHITECTURES) == set(architectures.ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_site_of_every_layer_exists_and_has_the_width_of_what_passes_it(architecture: str) -> None:
    model = tiny_model(architecture)
    unshare(model)
    places = Sites(model)
    assert len(places) == 3
    seen: dict[tuple[int, str], int] = {}
    names = [name for name in SITES if name != "ffn_residual" or places.post_norm(0)]

    for layer in range(3):
        for name in names:
            site = places(layer, name)
            if site.side == "module":
                assert "Norm" in type(site.module).__name__
                seen[layer, name] = site.width
                continue

            def record(
                module: nn.Module, args: tuple[Tensor, ...], output: Tensor, site: sites.Site = site
            ) -> None:
                passing = args[0] if site.side == "input" else output
                passing = site.projection_slice.read(passing) if site.projection_slice else passing
                seen[site.layer, site.name] = passing.shape[-1]

            site.module.register_forward_hook(record)
    model(**tiny_batch())
    for layer in range(3):
        for name in names:
            assert seen[layer, name] == places(layer, name).width, (layer, name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_each_norm_follows_its_block(architecture: str) -> None:
    model = tiny_model(architecture)
    unshare(model)
    places, called = Sites(model), list[tuple[int, str]]()
    order = [
        (layer, name)
        for layer in range(len(places))
        for name in ("attention_output", "attention_norm", "ffn_output", "ffn_norm")
    ]
    for place in order:
        places(*place).module.register_forward_pre_hook(lambda *_, place=place: called.append(place))
    model(**tiny_batch())
    assert called == order


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_residual_sum_is_a_site_where_a_norm_reads_it(architecture: str) -> None:
    model = tiny_model(architecture)
    unshare(model)
    places = Sites(model)
    if architecture in ("modernbert", "t5", "gpt2", "llama"):
        assert not places.post_norm(0)
        with pytest.raises(UnsupportedError, match="norms come before its blocks"):
            places(0, "ffn_residual")
        return
    seen: dict[str, Tensor] = {}
    places(0, "ffn_residual").module.register_forward_pre_hook(lambda m, args: seen.update(sum=args[0]))
    places(0, "ffn_output").module.register_forward_hook(lambda m, args, output: seen.update(ffn=output))
    places(0, "ffn_input").module.register_forward_pre_hook(lambda m, args: seen.update(read=args[0]))
    model(**tiny_batch())
    torch.testing.assert_close(seen["sum"], seen["ffn"] + seen["read"])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scaling_a_projection_at_its_site_reaches_only_that_projection(architecture: str) -> None:
    """Zeroed values silence the attention heads; zeroed queries make attention blind to content."""
    model = tiny_model(architecture)
    unshare(model)
    places = Sites(model)
    heads: list[Tensor] = []
    places(0, "attention_heads").module.register_forward_pre_hook(lambda m, args: heads.append(args[0]))
    value = places(0, "value")
    model(**tiny_batch())

    def silence(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return (
            value.projection_slice.write(output, value.projection_slice.read(output) * 0)
            if value.projection_slice
            else output * 0
        )

    value.module.register_forward_hook(silence)
    model(**tiny_batch())
    # deberta adds the value bias behind the projection
    expected = (
        model.base_model.encoder.layer[0].attention.self.v_bias
        if architecture == "deberta"
        else torch.zeros(1)
    )
    assert heads[0].abs().max() > 0
    torch.testing.assert_close(heads[1], expected.expand_as(heads[1]), atol=1e-6, rtol=0)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.data())
def test_parts_of_a_fused_projection(of: int, heads: int, width: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, of - 1))
    part = ProjectionSlice(index, of, heads)
    fused = torch.randn(2, of * heads * width)
    taken = part.read(fused)
    assert torch.equal(part.write(fused, taken), fused)
    changed = part.write(fused, taken + 1)
    assert torch.equal(part.read(changed), taken + 1)
    others = [ProjectionSlice(i, of, heads) for i in range(of) if i != index]
    assert all(torch.equal(other.read(changed), other.read(fused)) for other in others)


def test_contiguous_thirds_are_those_of_chunk() -> None:
    fused = torch.randn(5, 12)
    assert all(torch.equal(ProjectionSlice(i, 3).read(fused), fused.chunk(3, -1)[i]) for i in range(3))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_what_the_base_model_lacks(architecture: str) -> None:
    model = tiny_model(architecture)
    head = head_parameters(model)
    base = sum(1 for _ in model.base_model.parameters())
    assert head
    assert len(head) + base == sum(1 for _ in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_position_limit_is_where_the_model_fails(architecture: str) -> None:
    model = tiny_model(architecture)
    limit = sites.position_limit(model)
    longest = torch.full((1, limit or 60), 5)
    longest[:, -1] = 2
    model(input_ids=longest)
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.cat([longest[:, :1], longest], 1))


def test_layers_are_checked() -> None:
    places = Sites(tiny_model("bert"))
    assert places.layers("all") == [0, 1, 2]
    assert places.layers((2, -3, 2)) == [0, 2]
    for bad in ((3,), (-4,), (1.0,), (True,)):
        with pytest.raises(ArgumentError, match="is not a layer of this model, which has layers 0 to 2"):
            places.layers(bad)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="layers='some'"):
        places.layers("some")
    with pytest.raises(ArgumentError, match="site='attention' is not allowed"):
        places(0, "attention")


def test_a_table_that_does_not_fit_says_what_is_missing() -> None:
    model = tiny_model("bert")
    del model.bert.encoder.layer[1].attention.output.LayerNorm
    with pytest.raises(UnsupportedError, match=r"no site 'attention_norm' in layer 1.*LayerNorm is missing"):
        Sites(model)(1, "attention_norm")


def test_a_user_can_add_an_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    model.config.model_type = "novel"
    monkeypatch.setitem(architectures.ARCHITECTURES, "novel", copy.copy(architectures.ARCHITECTURES["bert"]))
    assert Sites(model)(0, "query").path == "bert.encoder.layer.0.attention.self.query"


def around(model: PreTrainedModel) -> nn.Module:
    class Scorer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ModuleDict({"model": model})

    return Scorer()


def wrapped_by_peft(model: PreTrainedModel) -> Any:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"]))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (nn.DataParallel, r"model is a DataParallel around a BertForSeq.*attach to that one, model\.module,"),
        (around, r"model is a Scorer around a BertForSeq.*attach to that one, model\.inner\.model,"),
        (wrapped_by_peft, r"model is a PeftModel; take peft's adapter off .*merge_and_unload.*import_peft"),
        (lambda model: wrapped_by_peft(model).base_model.model, r"that peft has changed, at 'bert.*query'"),
        (lambda model: model.bert.pooler, "model is a BertPooler; an adapter needs a transformers model"),
        (lambda model: "bert-base", "model is a str; an adapter needs"),
    ],
)
def test_only_a_plain_model_takes_an_adapter(wrap: Any, message: str, tmp_path: Path) -> None:
    wrapped = wrap(tiny_model("bert"))
    names = list(wrapped.state_dict()) if isinstance(wrapped, nn.Module) else []
    ht.attach(tiny_model("bert"), ht.Hadamard()).save(tmp_path)
    for attempt in (
        lambda: ht.attach(wrapped, ht.Hadamard()),
        lambda: ht.load_attachment(wrapped, tmp_path),
        lambda: ht.import_peft(wrapped, tmp_path),
    ):
        with pytest.raises(ArgumentError, match=message):
            attempt()
    assert (list(wrapped.state_dict()) if isinstance(wrapped, nn.Module) else []) == names


@pytest.mark.parametrize(
    ("kind", "architecture", "missing"),
    [
        (transformers.T5EncoderModel, "t5", "decoder.block"),
        (transformers.T5ForTokenClassification, "t5", "decoder.block"),
        (transformers.BartForCausalLM, "bart", "encoder.layers"),
    ],
)
def test_half_a_model_is_refused(kind: Any, architecture: str, missing: str) -> None:
    model = kind(tiny_config(architecture))
    names = list(model.state_dict())
    with pytest.raises(UnsupportedError, match=rf"{kind.__name__} has no '{missing}'"):
        ht.attach(model, ht.Hadamard())
    assert list(model.state_dict()) == names


def test_a_convolution_is_no_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.SqueezeBertConfig(
        vocab_size=60,
        hidden_size=16,
        embedding_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = ht.backbone_from_config(config)
    with pytest.raises(UnsupportedError, match="architecture 'squeezebert' has no table"):
        ht.attach(model, ht.Hadamard())
    table = architectures.LayerTable(
        layers="encoder.layers",
        output_projection="post_attention.conv1d",
        query="attention.query",
        key="attention.key",
        value="attention.value",
        ffn_first="intermediate.conv1d",
        ffn_second="output.conv1d",
        attention_norm="post_attention.layernorm",
        ffn_norm="output.layernorm",
    )
    monkeypatch.setitem(architectures.ARCHITECTURES, "squeezebert", (table,))
    for adapter in (ht.Hadamard(), ht.LoRA(), ht.IA3(), ht.PrefixTuning()):
        with pytest.raises(UnsupportedError, match=r"has a Conv1d at encoder.layers.0.*nn.Linear"):
            ht.attach(model, adapter)
    ht.attach(model, ht.LayerNormTuning())


@pytest.mark.parametrize("architecture", ["deberta", "deberta-v2"])
def test_positions_that_come_on_top_limit_the_input_too(architecture: str) -> None:
    model = tiny_model(architecture, position_biased_input=True)
    assert sites.position_limit(model) == 40
    model(input_ids=torch.full((1, 40), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, 41), 5))
