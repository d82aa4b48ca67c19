"""Megatron's torch files of every era, from any ranks, become hinny's weights bit for bit."""

from __future__ import annotations

import io

import pytest
import torch
from megatron_files import FILE, GPT, Sizes, change, options, weights, write

from hinny.checkpoint.formats import megatron
from hinny.checkpoint.formats.table import Along
from hinny.checkpoint.matching import Reader, match

HYBRID = "M-M*-M"
BLOCKS = "*-*-*-*-"
MULTI_HEAD = Sizes(kv_heads=16, bias=True, vocab=300)


def read(folder):
    """Every weight of ours in a checkpoint that must be whole."""
    foreign = megatron.open_checkpoint(folder)
    matched = match(foreign)
    matched.require(str(folder))
    reader = Reader(matched)
    return foreign, {name: reader(name) for name in matched.infos}


def assert_same(found, made):
    assert found.keys() == made.keys()
    for name, v in made.items():
        kept = v.float() if name.rpartition(".")[2] in ("A_log", "D", "dt_bias") else v
        assert found[name].dtype == kept.dtype
        assert torch.equal(found[name], kept), name


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("era", ["released", "2024-07", "2026-06"])
def test_a_hybrid_comes_in_from_any_ranks(tmp_path, era, tp, pp):
    sizes = Sizes()
    made = weights(HYBRID, sizes)
    foreign, found = read(write(tmp_path, HYBRID, made, sizes, era, tp, pp))
    assert_same(found, made)
    model = foreign.model
    assert model.pattern == HYBRID
    assert (model.norm, model.vocab_size, model.mlp.activation) == ("rmsnorm", 257, "gelu")
    assert (model.mamba2.n_groups, model.mamba2.d_state, model.mamba2.head_dim) == (8, 128, 4)
    assert (model.attention.n_heads, model.attention.n_kv_heads, model.attention.positions) == (16, 8, "none")
    assert foreign.tokenizer == (tmp_path / "tokenizer.json",)
    words = {"released": "June 2024", "2024-07": "July 2024", "2026-06": "from June 2026"}[era]
    assert words in foreign.format


@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("era", GPT)
def test_a_gpt_comes_in_from_any_ranks(tmp_path, era, tp, pp):
    made = weights(BLOCKS, MULTI_HEAD)
    folder = write(tmp_path, BLOCKS, made, MULTI_HEAD, era, tp, pp, tokenizer=False,
                   args=options(BLOCKS, MULTI_HEAD, era, tp, pp, vocab_size=300))
    foreign, found = read(folder)
    assert_same(found, made)
    model = foreign.model
    assert (model.pattern, model.norm, model.mlp.activation) == (BLOCKS, "layernorm1p", "relu2")
    assert (model.attention.rope_fraction, model.attention.rope_base) == (0.5, 10000.0)
    assert model.output_init_std == pytest.approx(0.02 / 8**0.5)
    assert foreign.facts["args.rotary_base"] == "not there; Megatron's default, 10000.0, was taken"
    assert "GPT" in foreign.format


@pytest.mark.parametrize("tp", [1, 4])
def test_a_gated_mlp_and_grouped_queries_come_in(tmp_path, tp):
    sizes = Sizes(gated=True, tied=True, vocab=512)
    made = weights("*-*-", sizes)
    foreign, found = read(write(tmp_path, "*-*-", made, sizes, "engine", tp, 2, tokenizer=False))
    assert_same(found, made)
    assert foreign.model.mlp.activation == "swiglu"
    assert foreign.model.tie_embeddings
    assert list(foreign.ignored) == ["output_layer.weight"]


def test_a_legacy_model_keeps_its_copy_of_the_embedding_elsewhere(tmp_path):
    sizes = Sizes(bias=True, tied=True, vocab=256)
    made = weights("*-*-", sizes)
    folder = write(tmp_path, "*-*-", made, sizes, "legacy", 2, 2, tokenizer=False)
    for rank in range(2):
        def move(state):
            state["model"]["word_embeddings_for_head"] = state["model"]["language_model"].pop("output_layer")
        change(folder / f"release/mp_rank_{rank:02d}_001" / FILE, move)
    foreign, found = read(folder)
    assert_same(found, made)
    assert list(foreign.ignored) == ["word_embeddings_for_head.weight"]


def test_the_longest_sequence_is_told(tmp_path):
    sizes, told = Sizes(), {}
    for name, lengths in {"both": dict(seq_length=32, max_position_embeddings=64), "one": dict(seq_length=32),
                          "none": {}}.items():
        args = options("M", sizes, "released", **lengths)
        foreign, _ = read(write(tmp_path / name, "M", weights("M", sizes), sizes, "released", args=args))
        told[name] = foreign.facts.get("longest sequence")
    assert told == {"both": "64", "one": "32", "none": None}


def test_rows_are_padding_unless_args_count_them_all(tmp_path):
    sizes = Sizes()
    made = weights("M", sizes)
    for told, rows in ((300, 257), (384, 384)):
        args = options("M", sizes, "released", vocab_size=told)
        foreign, _ = read(write(tmp_path / str(told), "M", made, sizes, "released", args=args))
        assert foreign.model.vocab_size == rows


def test_mamba2_alone_comes_in(tmp_path):
    sizes = Sizes()
    made = weights("MM", sizes)
    foreign, found = read(write(tmp_path, "MM", made, sizes, "released"))
    assert_same(found, made)
    assert foreign.model.attention is None
    assert foreign.model.mlp is None


def test_uneven_stages_and_several_pieces_a_stage_are_put_in_order(tmp_path):
    sizes = Sizes()
    made = weights(HYBRID, sizes)
    write(tmp_path / "uneven", HYBRID, made, sizes, "released", 2, 2, stages=[5, 1])
    assert_same(read(tmp_path / "uneven")[1], made)
    write(tmp_path / "pieces", HYBRID, made, sizes, "2026-06", 1, 2, pieces=2, stages=[2, 1, 1, 2])
    assert_same(read(tmp_path / "pieces")[1], made)


def test_joining_ranks_end_to_end_is_wrong_for_what_is_stacked(tmp_path):
    """The naive merge has the right shape and the wrong rows: a test that it passed would test nothing."""
    sizes = Sizes()
    made = weights("M", sizes)
    foreign, found = read(write(tmp_path, "M", made, sizes, "released", 2))
    stacked = ["decoder.layers.0.mixer.in_proj.weight", "decoder.layers.0.mixer.conv1d.weight",
               "decoder.layers.0.mixer.conv1d.bias"]
    right = {name: foreign.tensors.read(name).clone() for name in stacked}
    foreign.tensors.cuts |= {name: Along() for name in stacked}
    for name in stacked:
        assert foreign.tensors.read(name).shape == right[name].shape
        assert not torch.equal(foreign.tensors.read(name), right[name])
    matched = match(foreign)
    wrong = Reader(matched)
    assert not any(torch.equal(wrong(f"layers.0.layer.{part}"), made[f"layers.0.layer.{part}"])
                   for part in ("in_proj.x.weight", "in_proj.C.weight", "conv.x.weight", "conv.B.bias"))
    assert_same(found, made)


def test_the_iteration_may_be_a_number_or_named_itself(tmp_path):
    sizes = Sizes()
    made = weights("M", sizes)
    write(tmp_path, "M", made, sizes, "released", name="iter_0000100", tracker="100")
    assert_same(read(tmp_path)[1], made)
    foreign = megatron.open_checkpoint(tmp_path / "iter_0000100")
    # without its tokenizer nothing tells the padding
    assert foreign.model.vocab_size == 384
    assert "no file tells" in foreign.facts["vocabulary"]
    assert megatron.recognises(tmp_path)
    assert megatron.recognises(tmp_path / "iter_0000100")
    assert not megatron.recognises(tmp_path / "iter_0000100" / "mp_rank_00")
    assert not megatron.recognises(tmp_path / "absent")


def test_extra_states_are_dropped_and_counted(tmp_path):
    sizes = Sizes()
    made = weights("M*-", sizes)
    extra = {"decoder.layers.1.self_attention.linear_qkv._extra_state": io.BytesIO(b"x"),
             "decoder.layers.1.self_attention.core_attention._extra_state": None,
             "decoder.layers.2.mlp.linear_fc1._extra_state": torch.zeros(3, dtype=torch.uint8)}
    foreign, found = read(write(tmp_path, "M*-", made, sizes, "released", 2, extra=extra))
    assert_same(found, made)
    assert foreign.facts["extra states dropped"] == "6"
    assert len(foreign.ignored) == 6


def test_what_args_lack_is_said(tmp_path):
    sizes = Sizes()
    absent = dict.fromkeys(("norm_epsilon", "squared_relu", "swiglu", "init_method_std", "apply_layernorm_1p",
                            "normalization", "untie_embeddings_and_output_weights", "window_size"), ...)
    args = options("M*-", sizes, "released", **absent)
    foreign, _ = read(write(tmp_path, "M*-", weights("M*-", sizes), sizes, "released", args=args))
    for key, default in (("norm_epsilon", "1e-05"), ("squared_relu", "False"), ("mamba_state_dim", "128")):
        assert foreign.facts[f"args.{key}"] == f"not there; Megatron's default, {default}, was taken"
    assert "window_size" in foreign.facts["options that args lacks"]
    assert not foreign.model.tie_embeddings
