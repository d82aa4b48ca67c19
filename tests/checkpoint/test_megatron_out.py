"""What is written for Megatron has its names, shapes and shares of ranks, and comes back bit for bit."""

from __future__ import annotations

import argparse

import pytest
import torch
from megatron_files import FILE, Sizes, table, weights
from one_at_a_time import OneAtATime
from test_megatron_in import BLOCKS, HYBRID, MULTI_HEAD, assert_same, read

from hinny.checkpoint.formats import megatron
from hinny.checkpoint.formats.megatron_args import Args
from hinny.checkpoint.formats.megatron_names import LOCAL, RELEASED
from hinny.checkpoint.formats.megatron_settings import Sizes as Shapes
from hinny.checkpoint.formats.megatron_settings import infer_model, infer_pattern
from hinny.config import ModelConfig, RopeScaling, load_recipe, validate
from hinny.errors import CheckpointError
from hinny.model import Model


def config(pattern, s, **changes):
    """hinny's model of the sizes that the files are made of."""
    data = dict(pattern=pattern, d_model=s.d_model, vocab_size=s.vocab, norm="layernorm1p" if s.bias else "rmsnorm",
                norm_eps=1e-5, tie_embeddings=s.tied, init_std=0.02)
    gpt = "M" not in pattern
    if "M" in pattern:
        data["mamba2"] = dict(d_state=s.state, head_dim=s.head_dim, n_groups=s.groups, expand=s.inner // s.d_model,
                              d_conv=s.taps, chunk_len=128)
    if "*" in pattern:
        rope = dict(positions="rope", rope_fraction=0.5, rope_base=10000.0)
        data["attention"] = dict(n_heads=s.q_heads, n_kv_heads=s.kv_heads, head_dim=s.channels,
                                 **(rope if gpt else dict(positions="none")))
    if "-" in pattern:
        data["mlp"] = dict(d_ff=s.ffn, activation="swiglu" if s.gated else "relu2" if gpt else "gelu")
    if gpt:
        data["output_init_std"] = 0.02 / len(pattern) ** 0.5
    return validate(ModelConfig, data | changes, "test")


CASES = [("released", "released", HYBRID, Sizes(vocab=256)), ("current", "2026-06", HYBRID, Sizes(vocab=256)),
         ("released", "local", BLOCKS, MULTI_HEAD), ("current", "engine", BLOCKS, MULTI_HEAD),
         ("current", "engine", "*-*-", Sizes(gated=True, tied=True, vocab=64)),
         ("current", "2026-06", "MMMM", Sizes(vocab=256)),
         ("released", "released", "M-M*-M", Sizes(gated=True, bias=True, tied=True, vocab=256))]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 1), (2, 2)])
@pytest.mark.parametrize(("layout", "era", "pattern", "sizes"), CASES)
def test_what_is_written_is_what_megatron_would_and_comes_back(tmp_path, layout, era, pattern, sizes, tp, pp):
    made = weights(pattern, sizes)
    model = config(pattern, sizes)
    megatron.write_checkpoint(model, made.__getitem__, tmp_path, layout=layout, tp=tp, pp=pp, seq_len=64)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "release\n"
    layers = len(pattern) // (2 if era in ("local", "engine") else 1)
    step = layers // pp
    for stage in range(pp):
        for rank in range(tp):
            name = f"mp_rank_{rank:02d}" + (f"_{stage:03d}" if pp > 1 else "")
            state = torch.load(tmp_path / "release" / name / FILE, weights_only=False)
            assert type(state["args"]) is argparse.Namespace
            assert (state["args"].tensor_model_parallel_size, state["args"].seq_length) == (tp, 64)
            assert (state["checkpoint_version"], state["iteration"]) == (3.0, 0)
            wanted = table(pattern, made, sizes, era, rank, tp, layers=(stage * step, (stage + 1) * step),
                           padded=sizes.vocab, first=stage == 0, last=stage == pp - 1,
                           stage_copy=sizes.tied and pp > 1)
            written = {name: v for name, v in state["model"].items() if not name.endswith("_extra_state")}
            assert written.keys() == wanted.keys()
            for name, v in wanted.items():
                assert torch.equal(written[name], v), name
                assert written[name].untyped_storage().nbytes() == v.nbytes
    foreign, found = read(tmp_path)
    assert_same(found, made)
    assert foreign.model == model


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_one_tensor_at_a_time_is_asked_for_and_once(tmp_path, tp, pp):
    sizes = Sizes(vocab=256)
    made = weights(HYBRID, sizes)
    read = OneAtATime(made)
    megatron.write_checkpoint(config(HYBRID, sizes), read, tmp_path, tp=tp, pp=pp)
    assert sorted(read.asked) == sorted(made)
    # the parts of one of theirs, in_proj, and what the tensor before it was made of
    assert read.most <= 7


def test_float32_weights_keep_their_type(tmp_path):
    made = weights(HYBRID, Sizes(vocab=256), torch.float32)
    megatron.write_checkpoint(config(HYBRID, Sizes(vocab=256)), made.__getitem__, tmp_path, tp=2)
    assert_same(read(tmp_path)[1], made)


def test_a_view_is_not_written_with_all_that_it_is_a_view_of(tmp_path):
    sizes = Sizes(vocab=256)
    made = weights("M", sizes)
    heap = torch.cat([v.flatten() for v in made.values()])
    views = dict(zip(made, heap.split([v.numel() for v in made.values()]), strict=True))
    read_view = {name: view.view(made[name].shape) for name, view in views.items()}
    megatron.write_checkpoint(config("M", sizes), read_view.__getitem__, tmp_path)
    assert (tmp_path / "release/mp_rank_00" / FILE).stat().st_size < 1.2 * heap.nbytes
    assert_same(read(tmp_path)[1], made)


def test_transformer_engine_finds_the_extra_states_that_it_expects(tmp_path):
    expected = {"released": {"1.mlp.linear_fc1", "1.mlp.linear_fc2", "2.self_attention.linear_qkv",
                             "2.self_attention.linear_proj"}}
    expected["current"] = expected["released"] | {"0.mixer.in_proj", "0.mixer.out_proj"}
    sizes = Sizes(vocab=256)
    for layout, linears in expected.items():
        made = weights("M-*", sizes)
        megatron.write_checkpoint(config("M-*", sizes), made.__getitem__, tmp_path / layout, layout=layout)
        state = torch.load(tmp_path / layout / "release/mp_rank_00" / FILE, weights_only=False)["model"]
        assert {name for name, v in state.items() if v is None} == {
            f"decoder.layers.{linear}._extra_state" for linear in linears}


def test_the_cuts_of_a_pattern_are_its_stages(tmp_path):
    sizes = Sizes(vocab=256)
    made = weights("M-M*-M", sizes)
    megatron.write_checkpoint(config("M|-M*-|M", sizes), made.__getitem__, tmp_path, pp=3)
    state = torch.load(tmp_path / "release/mp_rank_00_001" / FILE, weights_only=False)
    assert {name.split(".")[2] for name in state["model"]} == {"0", "1", "2", "3"}
    assert state["args"].hybrid_layer_pattern == "M|-M*-|M"
    assert_same(read(tmp_path)[1], made)


FIRST_MAMBA = validate(ModelConfig, dict(
    pattern="1", d_model=16, vocab_size=32, norm="rmsnorm", norm_eps=1e-5, init_std=0.02, tie_embeddings=False,
    mamba1=dict(d_state=4, expand=2, d_conv=4, dt_rank=1, chunk_len=4)), "test")


@pytest.mark.parametrize(("model", "options", "says"), [
    (config("MM", Sizes(vocab=256)), dict(tp=3), "vocab_size is 256, which tp = 3 must divide; model.mamba2.n_g"),
    (config("*-", Sizes(vocab=256)), dict(tp=16), "n_kv_heads is 8, which tp = 16 must divide; model.mlp.d_ff"),
    (config("MMM", Sizes(vocab=256)), dict(pp=2), "model.pattern has 3 layers.* which pp = 2 must divide"),
    (config("MM|M", Sizes(vocab=256)), dict(pp=2, layout="released"), "3 layers.* which pp = 2 must divide"),
    (config("MM", Sizes(vocab=256), norm_eps=1e-6), {}, "model.norm_eps is 1e-06"),
    (FIRST_MAMBA, {}, "Mamba layers of the first kind"),
])
def test_what_megatron_or_the_ranks_cannot_hold_is_refused(tmp_path, model, options, says):
    with pytest.raises(CheckpointError, match=says):
        megatron.write_checkpoint(model, lambda name: pytest.fail("read"), tmp_path, **options)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "release").write_text("in the way")
    made = weights("M", Sizes(vocab=256))
    with pytest.raises(CheckpointError, match="cannot be written"):
        megatron.write_checkpoint(config("M", Sizes(vocab=256)), made.__getitem__, tmp_path)


H, INNER, GROUPS, HEADS, FFN, VOCAB = 4096, 8192, 1024, 128, 16384, 256000


def released_hybrid(pattern):
    """Names and shapes of the released Mamba-2 models."""
    out = {"embedding.word_embeddings.weight": (VOCAB, H), "decoder.final_norm.weight": (H,),
           "output_layer.weight": (VOCAB, H)}
    for i, symbol in enumerate(pattern):
        layer = f"decoder.layers.{i}."
        if symbol == "M":
            out |= {layer + "norm.weight": (H,), layer + "mixer.in_proj.weight": (18560, H),
                    layer + "mixer.conv1d.weight": (10240, 1, 4), layer + "mixer.conv1d.bias": (10240,),
                    layer + "mixer.A_log": (HEADS,), layer + "mixer.D": (HEADS,), layer + "mixer.dt_bias": (HEADS,),
                    layer + "mixer.norm.weight": (INNER,), layer + "mixer.out_proj.weight": (H, INNER)}
        elif symbol == "*":
            out |= {layer + "self_attention.linear_qkv.layer_norm_weight": (H,),
                    layer + "self_attention.linear_qkv.weight": (6144, H),
                    layer + "self_attention.linear_proj.weight": (H, H)}
        else:
            out |= {layer + "mlp.linear_fc1.layer_norm_weight": (H,), layer + "mlp.linear_fc1.weight": (FFN, H),
                    layer + "mlp.linear_fc2.weight": (H, FFN)}
    return out


def released_gpt():
    """The same of the released Transformer."""
    out = {"embedding.word_embeddings.weight": (VOCAB, H), "output_layer.weight": (VOCAB, H),
           "decoder.final_layernorm.weight": (H,), "decoder.final_layernorm.bias": (H,)}
    for i in range(32):
        layer = f"decoder.layers.{i}."
        out |= {f"{layer}{norm}.{part}": (H,) for norm in ("input_layernorm", "pre_mlp_layernorm")
                for part in ("weight", "bias")}
        out |= {layer + "self_attention.linear_qkv.weight": (12288, H),
                layer + "self_attention.linear_proj.weight": (H, H),
                layer + "mlp.linear_fc1.weight": (FFN, H), layer + "mlp.linear_fc2.weight": (H, FFN)}
    return out


EIGHT = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
RELEASES = {
    "8b-mamba2": (released_hybrid("M" * 56), RELEASED, 507, 8_236_999_680, dict(
        squared_relu=False, normalization="RMSNorm", position_embedding_type="none", apply_layernorm_1p=False,
        hybrid_attention_ratio=0.0, hybrid_mlp_ratio=0.0)),
    "8b-hybrid": (released_hybrid(EIGHT), RELEASED, 315, 8_654_517_248, dict(
        squared_relu=False, normalization="RMSNorm", position_embedding_type="none", apply_layernorm_1p=False,
        hybrid_attention_ratio=0.08, hybrid_mlp_ratio=0.5, group_query_attention=True, num_query_groups=8)),
    "8b-transformer": (released_gpt(), LOCAL, 260, 8_540_135_424, dict(
        squared_relu=True, normalization="LayerNorm", position_embedding_type="rope", apply_layernorm_1p=True,
        rotary_percent=0.5, group_query_attention=False, num_query_groups=1)),
}


@pytest.mark.parametrize("name", RELEASES)
def test_the_released_models_have_these_names_shapes_and_recipes(name):
    shapes, names, count, parameters, fields = RELEASES[name]
    assert len(shapes) == count
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters
    model = load_recipe(name).model
    with torch.device("meta"):
        ours = Model(model).state_dict()
    rows = megatron.rows(model, names)
    assert {row.theirs: tuple(row.layout.join([ours[part] for part in row.ours]).shape) for row in rows} == shapes
    assert sorted(part for row in rows for part in row.ours) == sorted(ours)
    args = Args({**fields, "ffn_hidden_size": FFN, "kv_channels": 128, "norm_epsilon": 1e-5, "openai_gelu": False,
                 "add_bias_linear": False, "swiglu": False, "init_method_std": 0.02, "num_attention_heads": 32}, name)
    inferred = infer_model(infer_pattern(shapes, names.whole), names, Shapes(shapes, 1), args, lambda rows: rows, False)
    allocation = {"n_layers": None, "attention_ratio": None, "mlp_ratio": None}
    assert inferred == model.model_copy(update=allocation)
    for ranks in (2, 4, 8):
        parts = {row.theirs: tuple(row.cut.shards(torch.empty(shapes[row.theirs], device="meta"), ranks)[0].shape)
                 for row in rows}
        assert infer_model(inferred.pattern, names, Shapes(parts, ranks), args, lambda rows: rows, False) == inferred


def scaled(**attention):
    model = config("*-*-", MULTI_HEAD)
    return model.model_copy(update={"attention": model.attention.model_copy(update=attention)})


@pytest.mark.parametrize(("length", "trained"), [(None, 32), (96, 32)])
def test_interpolated_positions_are_an_option_of_megatrons(tmp_path, length, trained):
    model = scaled(rope_scaling=RopeScaling(method="interpolation", factor=4.0, trained_len=trained))
    megatron.write_checkpoint(model, weights("*-*-", MULTI_HEAD).__getitem__, tmp_path, seq_len=length)
    args = torch.load(tmp_path / "release" / "mp_rank_00" / FILE, weights_only=False)["args"]
    assert (args.rotary_seq_len_interpolation_factor, args.seq_length) == (4, 128)
    assert megatron.open_checkpoint(tmp_path).model.attention == model.attention


@pytest.mark.parametrize(("attention", "says"), [
    (dict(score_scale=1.5), "score_scale is 1.5; Megatron has no such factor"),
    (dict(rope_scaling=RopeScaling(method="yarn", factor=4.0, trained_len=32)), "rope_scaling is yarn by 4"),
    (dict(rope_scaling=RopeScaling(method="interpolation", factor=2.5, trained_len=32)), "is interpolation by 2.5")])
def test_positions_that_megatron_cannot_be_told_of_are_refused(tmp_path, attention, says):
    model = scaled(**attention)
    with pytest.raises(CheckpointError, match=says):
        megatron.write_checkpoint(model, weights("*-*-", MULTI_HEAD).__getitem__, tmp_path)
