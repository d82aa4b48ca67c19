"""Megatron checkpoints that contradict themselves, are not whole, or hold what hinny has not, are refused by name."""

from __future__ import annotations

import pytest
import torch
from megatron_files import FILE, Sizes, change, layer_of, options, weights, write
from test_megatron_in import MULTI_HEAD, read

from hinny.checkpoint.formats import megatron
from hinny.errors import CheckpointError


def damaged(tmp_path, pattern="M*-", era="released", tp=2, pp=1, sizes=None, **changes):
    sizes = sizes or Sizes()
    made = weights(pattern, sizes)
    return write(tmp_path, pattern, made, sizes, era, tp, pp, args=options(pattern, sizes, era, tp, pp, **changes))


CONTRADICTIONS = [
    (dict(hidden_size=32), "args.hidden_size is 32, .* says 16"),
    (dict(num_layers=4), "args.num_layers is 4, .* says 3"),
    (dict(ffn_hidden_size=48), "args.ffn_hidden_size is 48, .* says 24"),
    (dict(num_attention_heads=8), "args.num_attention_heads is 8, .* says 16"),
    (dict(num_query_groups=4), "args.num_query_groups is 4, .* says 8"),
    (dict(group_query_attention=False), "group_query_attention is False, .* 16 query and 8 key heads"),
    (dict(kv_channels=5), "heads of 5, but .* 128 rows"),
    (dict(padded_vocab_size=1024), "args.padded_vocab_size is 1024, .* says 512"),
    (dict(hybrid_override_pattern="M-*"), r"hybrid_override_pattern is 'M-\*', .* say 'M\*-'"),
    (dict(hybrid_override_pattern=None, hybrid_attention_ratio=0.5), r"hybrid_mlp_ratio are 0.5 and 0.0.* say 'M\*-'"),
    (dict(normalization="LayerNorm"), "args.normalization is 'LayerNorm', .* says 'RMSNorm'"),
    (dict(swiglu=True), "args.swiglu is True, .* says False"),
    (dict(mamba_state_dim=96), "mamba_state_dim is 96, but B has 1024 rows"),
    (dict(mamba_num_groups=4), "args.mamba_num_groups is 4, .* says 8"),
    (dict(mamba_head_dim=8), "args.mamba_head_dim is 8, .* says 4"),
    (dict(tensor_model_parallel_size=4, padded_vocab_size=1024), "tensor_model_parallel_size is 4, .* says 2"),
    (dict(pipeline_model_parallel_size=2, num_layers=6), "pipeline_model_parallel_size is 2, .* says 1"),
    (dict(untie_embeddings_and_output_weights=False), "untie_.* is False, but there is output_layer"),
]


@pytest.mark.parametrize(("changes", "says"), CONTRADICTIONS, ids=[" ".join(c) for c, _ in CONTRADICTIONS])
def test_args_that_contradict_the_tensors_are_refused_with_both_values(tmp_path, changes, says):
    with pytest.raises(CheckpointError, match=says):
        megatron.open_checkpoint(damaged(tmp_path, **changes))


REFUSED = [
    (dict(add_bias_linear=True), "args.add_bias_linear is True"),
    (dict(openai_gelu=True), "args.openai_gelu is True"),
    (dict(num_experts=8), "args.num_experts is 8"),
    (dict(rotary_interleaved=True), "args.rotary_interleaved is True"),
    (dict(window_size=(128, 0)), "args.window_size is a tuple"),
    (dict(norm_epsilon=1e-6), "args.norm_epsilon is 1e-06, but .* 1e-05"),
    (dict(position_embedding_type="learned_absolute"), "position_embedding_type is 'learned_absolute'; hinny has"),
    (dict(position_embedding_type=...), "has no position_embedding_type"),
    (dict(kv_channels=..., num_attention_heads=...), "neither kv_channels nor num_attention_heads"),
    (dict(apply_layernorm_1p=True), "RMSNorm with args.apply_layernorm_1p True"),
    (dict(norm_epsilon="small"), "args.norm_epsilon is 'small'; it must be of type float"),
    (dict(expert_model_parallel_size=2), "args.expert_model_parallel_size is 2"),
    (dict(hidden_size=torch.ones(2)), "args.hidden_size is a Inert"),
    (dict(untie_embeddings_and_output_weights="no"), "untie_embeddings_and_output_weights is 'no'; it must be of type"),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[" ".join(c) for c, _ in REFUSED])
def test_what_hinny_has_not_or_nothing_tells_is_refused(tmp_path, changes, says):
    with pytest.raises(CheckpointError, match=says):
        megatron.open_checkpoint(damaged(tmp_path, **changes))


def test_a_plain_layer_norm_is_refused(tmp_path):
    """Its gain is not weight + 1, and taking one off would round."""
    folder = damaged(tmp_path, "*-", "local", sizes=MULTI_HEAD, apply_layernorm_1p=False)
    with pytest.raises(CheckpointError, match=r"LayerNorm with args\.apply_layernorm_1p False"):
        megatron.open_checkpoint(folder)


def test_options_of_layers_that_are_not_there_do_not_matter(tmp_path):
    folder = damaged(tmp_path, "MM", add_bias_linear=True, window_size=(1, 0), openai_gelu=True, kv_channels=7,
                     position_embedding_type="learned_absolute", squared_relu=True)
    assert read(folder)[0].model.pattern == "MM"


def test_ranks_of_the_time_before_files_were_merged_are_said(tmp_path):
    """The sizes show that nothing is missing."""
    foreign, _ = read(damaged(tmp_path, tensor_model_parallel_size=8, pipeline_model_parallel_size=3))
    assert foreign.facts["args.tensor_model_parallel_size"] == "8, of the time before its files were merged"
    assert foreign.facts["args.pipeline_model_parallel_size"] == "3, of the time before its files were merged"


def test_ranks_that_disagree_on_what_they_share_are_refused(tmp_path):
    folder = damaged(tmp_path, tp=4)
    name = "decoder.layers.0.norm.weight"
    change(folder / "release/mp_rank_03" / FILE, lambda state: state["model"][name].add_(1))
    with pytest.raises(CheckpointError, match=rf"{name}: rank 3 has another copy than rank 0"):
        read(folder)


def test_a_copy_of_the_embedding_that_differs_is_refused(tmp_path):
    folder = damaged(tmp_path, "M-", pp=2, sizes=Sizes(tied=True))
    change(folder / "release/mp_rank_01_001" / FILE, lambda state: state["model"]["output_layer.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"output_layer.weight must repeat embedding.word_embeddings.weight"):
        megatron.open_checkpoint(folder)


def test_ranks_with_other_names_shapes_or_types_are_refused(tmp_path):
    for case, (edit, says) in enumerate([
            (lambda m: m.pop("decoder.layers.0.mixer.D"), "only one of them has 1 name: decoder.layers.0.mixer.D"),
            (lambda m: m.update({"decoder.layers.0.mixer.D": torch.zeros(3)}), r"shape \[3\], and on tensor rank 0"),
            (lambda m: m.update({"decoder.layers.0.mixer.D": torch.zeros(4)}), r"float32 of shape \[4\]")]):
        folder = damaged(tmp_path / str(case))
        change(folder / "release/mp_rank_01" / FILE, lambda state, edit=edit: edit(state["model"]))
        with pytest.raises(CheckpointError, match=says):
            megatron.open_checkpoint(folder)


def test_a_missing_rank_file_is_named(tmp_path):
    folder = damaged(tmp_path, "M-", tp=2, pp=2)
    (folder / "release/mp_rank_01_000" / FILE).unlink()
    with pytest.raises(CheckpointError, match="of 1 name: tensor rank 1 of pipeline stage 0"):
        megatron.open_checkpoint(folder)


def test_the_last_rank_is_missed_too(tmp_path):
    folder = damaged(tmp_path, tp=4)
    (folder / "release/mp_rank_03" / FILE).unlink()
    (folder / "release/mp_rank_03").rmdir()
    with pytest.raises(CheckpointError, match=r"tensor_model_parallel_size is 4, .* says 3"):
        megatron.open_checkpoint(folder)


def test_a_tracker_that_leads_nowhere_is_refused(tmp_path):
    folder = damaged(tmp_path)
    tracker = folder / "latest_checkpointed_iteration.txt"
    tracker.write_text("200\n")
    with pytest.raises(CheckpointError, match="no folder iter_0000200 beside it; there are 1 name: release"):
        megatron.open_checkpoint(folder)
    tracker.write_text("../elsewhere\n")
    with pytest.raises(CheckpointError, match=r"says '\.\./elsewhere'; it must be 'release' or the number"):
        megatron.open_checkpoint(folder)


def test_files_that_are_no_checkpoint_of_megatron_are_refused(tmp_path):
    file = tmp_path / "release/mp_rank_00" / FILE
    file.parent.mkdir(parents=True)
    for state, says in [
            ({"model": {}}, "checkpoint_version is None"), ({"checkpoint_version": 1.0}, "checkpoint_version is 1.0"),
            ({"checkpoint_version": 3.0}, "`args` is None"), ([1], "holds a list"),
            ({"checkpoint_version": 3.0, "args": options("M", Sizes(), "released")}, "no table `model`"),
            ({"checkpoint_version": 3.0, "args": options("M", Sizes(), "released"), "model": {"w": torch.ones(1)}},
             r"no layers by Megatron's names \(decoder.layers.0 …\); it holds 1 name: w"),
            ({"checkpoint_version": 3.0, "args": options("M", Sizes(), "released"), "model": {"w": "text"}},
             "what is no tensor: 1 name: w")]:
        torch.save(state, file)
        with pytest.raises(CheckpointError, match=says):
            megatron.open_checkpoint(tmp_path / "release")
    (tmp_path / "release/mp_rank_00_000_000").mkdir()
    with pytest.raises(CheckpointError, match="expert parallelism"):
        megatron.open_checkpoint(tmp_path / "release")


def test_a_misfit_is_told_with_the_era_that_it_looks_like(tmp_path):
    sizes = Sizes()
    made = weights("MM-", sizes)
    extra = {f"decoder.layers.1.{name}": v for name, v in layer_of(1, "M", made, sizes, "2026-06", 0, 1).items()}
    folder = write(tmp_path, "MM-", made, sizes, "released", extra=extra)
    with pytest.raises(CheckpointError, match=r"(?s)left over: 3 .*It looks like .*Megatron, keys from June 2026 on"):
        read(folder)


def test_layers_that_are_not_there_or_not_known_are_refused(tmp_path):
    sizes = Sizes()
    made = weights("M-M", sizes)
    folder = write(tmp_path / "gap", "M-M", made, sizes, "released")
    file = folder / "release/mp_rank_00" / FILE

    def drop(state):
        state["model"] = {name: v for name, v in state["model"].items() if "layers.1." not in name}

    change(file, drop)
    with pytest.raises(CheckpointError, match="1 of 3 layers have no tensors: 1"):
        megatron.open_checkpoint(folder)
    write(tmp_path / "odd", "M-M", made, sizes, "released", extra={"decoder.layers.3.cross_attention.w": torch.ones(1)})
    with pytest.raises(CheckpointError, match="layer 3 holds cross_attention; known are"):
        megatron.open_checkpoint(tmp_path / "odd")


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    sizes = Sizes(vocab=128)
    folder = write(tmp_path, "M", weights("M", sizes), sizes, "released")
    with pytest.raises(CheckpointError, match=r"tokenizer.json has 257 words, but the embedding has 128 rows"):
        megatron.open_checkpoint(folder)
