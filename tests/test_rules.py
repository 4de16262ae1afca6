"""Every rule with its legal neighbours and the way out that it offers."""

from __future__ import annotations

import re
import shlex

import pytest

from megatron_ds.config import Config, parse
from megatron_ds.errors import ConfigErrors
from megatron_ds.plan import Plan, make_plan
from megatron_ds.rules import check_kernels
from tests.helpers.recipe import Value, words
from tests.test_plan import BASE, GPT2_VOCAB

LISTS = ("--rampup-batch-size", "--recompute-modules")


def config(flags: dict[str, Value]) -> Config:
    argv = words({name: value for name, value in (BASE | flags).items() if name != "model_type"})
    for flag in LISTS:
        if flag in argv:
            at = argv.index(flag) + 1
            argv[at : at + 1] = argv[at].split()
    return parse(argv, {"model_type": flags.get("model_type", "GPT")})


def plan(world_size: int = 1, /, **flags: Value) -> Plan:
    return make_plan(config(flags), world_size, GPT2_VOCAB)


# Of each rule: ranks, flags that break it, the flag that the message is about, and near ones that do not.
Rule = tuple[int, dict[str, Value], str, dict[str, Value]]
RULES: dict[str, Rule] = {
    "world": (6, {"tensor_model_parallel_size": 4}, "--tensor-model-parallel-size", {"tensor_model_parallel_size": 3}),
    "world, pp": (8, {"pipeline_model_parallel_size": 3}, "--pipeline-model", {"pipeline_model_parallel_size": 4}),
    "world and batch": (
        6, {"tensor_model_parallel_size": 4, "global_batch_size": 8}, "--tensor-model-parallel-size",
        {"tensor_model_parallel_size": 6, "global_batch_size": 8},
    ),
    "heads": (1, {"num_attention_heads": 7}, "--num-attention-heads", {"num_attention_heads": 8}),
    "heads, free size": (1, {"num_attention_heads": 7}, "--num-att", {"num_attention_heads": 7, "kv_channels": 64}),
    "heads over tp": (
        8, {"num_attention_heads": 12, "tensor_model_parallel_size": 8, "global_batch_size": 64},
        "--num-attention-heads", {"num_attention_heads": 16, "tensor_model_parallel_size": 8, "global_batch_size": 64},
    ),
    "heads of GPT-2 XL over tp": (
        2, {"num_attention_heads": 25, "hidden_size": 1600, "num_layers": 48, "tensor_model_parallel_size": 2},
        "--num-attention-heads",
        {"num_attention_heads": 25, "hidden_size": 1600, "num_layers": 48, "tensor_model_parallel_size": 1},
    ),
    "key/value heads": (1, {"num_key_value_heads": 5}, "--num-key-value-heads", {"num_key_value_heads": 4}),
    "groups without their flag": (
        1, {"num_query_groups": 2}, "--num-query-groups", {"group_query_attention": True, "num_query_groups": 2},
    ),
    "groups": (
        1, {"group_query_attention": True, "num_query_groups": 8}, "--num-query-groups",
        {"group_query_attention": True, "num_query_groups": 6},
    ),
    "groups over tp": (
        4, {"num_key_value_heads": 2, "tensor_model_parallel_size": 4, "global_batch_size": 4},
        "--num-key-value-heads", {"num_key_value_heads": 4, "tensor_model_parallel_size": 4, "global_batch_size": 4},
    ),
    "rotary percent": (1, {"position_embedding_type": "rope", "rotary_percent": 0.24}, "--rotary-percent",
                       {"position_embedding_type": "rope", "rotary_percent": 0.25}),
    "odd head": (1, {"position_embedding_type": "rope", "kv_channels": 33}, "--rotary-percent", {"kv_channels": 33}),
    "ffn over tp": (
        4, {"ffn_hidden_size": 3070, "tensor_model_parallel_size": 4}, "--ffn-hidden-size",
        {"ffn_hidden_size": 3072, "tensor_model_parallel_size": 4},
    ),
    "layers": (5, {"pipeline_model_parallel_size": 5}, "--num-layers",
               {"pipeline_model_parallel_size": 5, "num_layers": 10}),
    "layers and batch": (
        8, {"pipeline_model_parallel_size": 8, "global_batch_size": 8}, "--num-layers",
        {"pipeline_model_parallel_size": 4, "global_batch_size": 8},
    ),
    "batch": (4, {"global_batch_size": 40}, "--global-batch-size", {"global_batch_size": 48}),
    "batch below": (4, {"global_batch_size": 8}, "--global-batch-size", {"global_batch_size": 16}),
    "samples": (1, {"train_iters": None, "train_samples": 3}, "--train-samples",
                {"train_iters": None, "train_samples": 4}),
    "both durations": (1, {"train_samples": 400}, "--train-iters and --train-samples", {}),
    "save interval": (1, {"save": "x"}, "--save-interval", {"save": "x", "save_interval": 1}),
    "finetune": (1, {"finetune": True}, "--finetune", {"finetune": True, "load": "x"}),
    "positions": (1, {"max_position_embeddings": 1023}, "--max-position-embeddings", {"max_position_embeddings": 1024}),
    "position type": (1, {"position_embedding_type": "relative"}, "--position-embedding-type",
                      {"position_embedding_type": "rotary", "max_position_embeddings": 2}),
    "unknown position type": (1, {"position_embedding_type": "sinus"}, "--position-embedding-type",
                              {"position_embedding_type": "none", "max_position_embeddings": 2}),
    "no positions": (1, {"no_position_embedding": True}, "--no-position-embedding",
                     {"no_position_embedding": True, "position_embedding_type": "rope"}),
    "checkpoint args": (1, {"use_checkpoint_args": True}, "--use-checkpoint-args",
                        {"use_checkpoint_args": True, "load": "x"}),
    "missing checkpoint": (1, {"exit_on_missing_checkpoint": True}, "--exit-on-missing-checkpoint",
                           {"exit_on_missing_checkpoint": True, "load": "x"}),
    "two models": (
        1, {"use_checkpoint_args": True, "load": "x", "model_preset": "gpt2-124m"}, "--use-checkpoint-args and",
        {"load": "x", "model_preset": "gpt2-124m"},
    ),
    "two activations": (1, {"swiglu": True, "relu": True}, "--swiglu and --relu", {"relu": True}),
    "two gates": (1, {"swiglu": True, "glu_activation": "geglu"}, "--swiglu and --glu", {"glu_activation": "geglu"}),
    "gelu of a gate": (1, {"squared_relu": True, "openai_gelu": True}, "--squared-relu and --openai-gelu",
                       {"glu_activation": "geglu", "openai_gelu": True, "no_bias_gelu_fusion": True}),
    "two residuals": (
        1, {"use_parallel_residual": True, "apply_residual_connection_post_layernorm": True},
        "--use-parallel-residual and", {"apply_residual_connection_post_layernorm": True},
    ),
    "window of keys": (1, {"window_size": -1}, "--window-size", {"window_size": 0}),
    "stretched, not rope": (1, {"use_rope_scaling": True}, "--use-rope-scaling",
                            {"use_rope_scaling": True, "position_embedding_type": "rope"}),
    "steps, not rope": (
        1, {"rotary_seq_len_interpolation_factor": 2}, "--rotary-seq-len-interpolation-factor",
        {"rotary_seq_len_interpolation_factor": 2, "position_embedding_type": "rope"},
    ),
    "stretched twice": (
        1, {"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2, "position_embedding_type": "rope"},
        "--use-rope-scaling", {"rotary_seq_len_interpolation_factor": 0.5, "position_embedding_type": "rope"},
    ),
    "stretch of nothing": (
        1, {"rope_scaling_factor": 4, "position_embedding_type": "rope"}, "--rope-scaling-factor",
        {"rope_scaling_factor": 4, "position_embedding_type": "rope", "use_rope_scaling": True},
    ),
    "frequencies": (
        1, {"rope_scaling_low_freq_factor": 4, "position_embedding_type": "rope", "use_rope_scaling": True},
        "--rope-scaling-low-freq-factor",
        {"rope_scaling_low_freq_factor": 3, "position_embedding_type": "rope", "use_rope_scaling": True},
    ),
    "stretch by nothing": (
        1, {"rope_scaling_factor": 0, "position_embedding_type": "rope", "use_rope_scaling": True},
        "--rope-scaling-factor", {"position_embedding_type": "rope", "use_rope_scaling": True},
    ),
    "scale": (1, {"softmax_scale": 0}, "--softmax-scale", {"softmax_scale": 1}),
    "buckets of nothing": (1, {"relative_attention_num_buckets": 8}, "--relative-attention-num-buckets", {}),
    "ring and ALiBi": (
        2, {"context_parallel_size": 2, "position_embedding_type": "alibi"}, "--context-parallel-size",
        {"ds_sequence_parallel_size": 2, "position_embedding_type": "alibi"},
    ),
    "ring and window": (2, {"context_parallel_size": 2, "window_size": 5}, "--context-parallel-size",
                        {"ds_sequence_parallel_size": 2, "window_size": 5}),
    "ring and documents": (2, {"context_parallel_size": 2, "reset_attention_mask": True}, "--context-parallel-size",
                           {"ds_sequence_parallel_size": 2, "reset_attention_mask": True}),
    "ring and scale": (2, {"context_parallel_size": 2, "softmax_scale": 1}, "--context-parallel-size",
                       {"ds_sequence_parallel_size": 2, "softmax_scale": 1}),
    "layers of another model": (1, {"encoder_num_layers": 2}, "--encoder-num-layers", {}),
    "masking of another model": (1, {"mask_prob": 0.2}, "--mask-prob", {"mask_prob": 0.15}),
    "head of another model": (1, {"bert_no_binary_head": True}, "--bert-no-binary-head", {}),
    "split rank of another model": (
        2, {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_split_rank": 1}, "--pipeline-model-parallel-s",
        {"pipeline_model_parallel_size": 2},
    ),
    "norm": (1, {"normalization": "batchnorm"}, "--normalization", {"normalization": "rmsnorm"}),
    "halves": (1, {"bf16": True, "fp16": True}, "--fp16 and --bf16", {"bf16": True}),
    "zero": (1, {"zero_stage": 0, "use_distributed_optimizer": True}, "--use-distributed-optimizer",
             {"zero_stage": 1, "use_distributed_optimizer": True}),
    "warm-up": (1, {"lr_warmup_iters": 100}, "--lr-warmup-iters", {"lr_warmup_iters": 99}),
    "data": (1, {"mock_data": None}, "--data-path", {"mock_data": None, "data_path": "x"}),
    "no data is no fault of a plan": (1, {"mock_data": None}, "--data-path", {"mock_data": None, "dry_run": True}),
    "split": (1, {"split": "1,2,3,4"}, "--split", {"split": "969, 30, 1"}),
    "log interval": (1, {"log_interval": 0}, "--log-interval", {"log_interval": 1}),
    "dropout": (1, {"hidden_dropout": 1}, "--hidden-dropout", {"hidden_dropout": 0}),
    "count": (1, {"eval_interval": 0}, "--eval-interval", {"eval_interval": 1}),
    "seed": (1, {"seed": -1}, "--seed", {"seed": 0}),
    "sequence over cp": (
        8, {"context_parallel_size": 4, "seq_length": 1020}, "--seq-length",
        {"context_parallel_size": 4, "seq_length": 1016},
    ),
    "ring needs two pieces": (2, {"context_parallel_size": 2, "seq_length": 1022}, "--seq-length",
                              {"ds_sequence_parallel_size": 2, "seq_length": 1022}),
    "world, cp": (8, {"context_parallel_size": 3, "seq_length": 1020}, "--context-parallel-size",
                  {"context_parallel_size": 2, "seq_length": 1020}),
    "sequence over tp": (
        2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 1023}, "--sequence-parallel",
        {"tensor_model_parallel_size": 2, "seq_length": 1023},
    ),
    "share of a sequence over tp": (
        8, {"tensor_model_parallel_size": 4, "context_parallel_size": 2, "sequence_parallel": True, "seq_length": 1020},
        "--sequence-parallel",
        {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True, "seq_length": 1020},
    ),
    "no tp, no matter": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 1023},
                         "--sequence-parallel", {"sequence_parallel": True, "seq_length": 1023}),
    "two ways to share a sequence": (4, {"context_parallel_size": 2, "ds_sequence_parallel_size": 2},
                                     "--context-parallel-size and", {"context_parallel_size": 2}),
    "ulysses and sp": (
        4, {"ds_sequence_parallel_size": 2, "sequence_parallel": True, "tensor_model_parallel_size": 2},
        "--ds-sequence-parallel-size and --sequence-parallel",
        {"ds_sequence_parallel_size": 4, "sequence_parallel": True},
    ),
    "ulysses over heads": (8, {"ds_sequence_parallel_size": 8}, "--num-attention-heads",
                           {"ds_sequence_parallel_size": 4}),
    "ulysses and tp over heads": (8, {"ds_sequence_parallel_size": 4, "tensor_model_parallel_size": 2},
                                  "--num-attention-heads",
                                  {"ds_sequence_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "ulysses over key/value heads": (
        4, {"ds_sequence_parallel_size": 4, "num_key_value_heads": 2}, "--num-key-value-heads",
        {"ds_sequence_parallel_size": 2, "num_key_value_heads": 2},
    ),
    "layers of virtual stages": (
        2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 4, "global_batch_size": 8},
        "--num-layers",
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 3, "global_batch_size": 8},
    ),
    "layers in a virtual stage": (
        2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 4, "global_batch_size": 8},
        "--num-layers",
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3, "global_batch_size": 8},
    ),
    "two numbers for virtual stages": (
        2, {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3, "global_batch_size": 8,
            "num_virtual_stages_per_pipeline_rank": 3}, "--num-layers-per-virtual-pipeline-stage and",
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2, "global_batch_size": 8,
         "num_virtual_stages_per_pipeline_rank": 3},
    ),
    "virtual stages of one": (1, {"num_virtual_stages_per_pipeline_rank": 2}, "--num-virtual-stages",
                              {"num_virtual_stages_per_pipeline_rank": 1}),
    "virtual stages of another schedule": (
        2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "pipeline_schedule": "gpipe",
            "global_batch_size": 8}, "--num-virtual-stages",
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "global_batch_size": 8,
         "pipeline_schedule": "interleaved"},
    ),
    "virtual stages of zbh1": (
        2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "enable_zbh1_pipeline": True,
            "global_batch_size": 8}, "--num-virtual-stages",
        {"pipeline_model_parallel_size": 2, "enable_zbh1_pipeline": True, "global_batch_size": 4},
    ),
    "interleaved without": (
        2, {"pipeline_model_parallel_size": 2, "pipeline_schedule": "interleaved", "global_batch_size": 8},
        "--pipeline-schedule interleaved",
        {"pipeline_model_parallel_size": 2, "pipeline_schedule": "1f1b", "global_batch_size": 4},
    ),
    "two schedules": (1, {"enable_zbh1_pipeline": True, "pipeline_schedule": "gpipe"}, "--enable-zbh1-pipeline",
                      {"enable_zbh1_pipeline": True, "pipeline_schedule": "zbh1"}),
    "rounds of micro-batches": (
        2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "global_batch_size": 12},
        "--global-batch-size",
        {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "global_batch_size": 16},
    ),
    "uneven and virtual": (
        2, {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2, "global_batch_size": 8,
            "decoder_first_pipeline_num_layers": 4}, "--decoder-first",
        {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 4},
    ),
    "uneven": (5, {"pipeline_model_parallel_size": 5}, "--num-layers",
               {"pipeline_model_parallel_size": 5, "pp_partition_method": "type:transformer|embedding"}),
    "a layer for every stage": (
        16, {"pipeline_model_parallel_size": 16, "pp_partition_method": "parameters"}, "--num-layers",
        {"pipeline_model_parallel_size": 4, "pp_partition_method": "parameters"},
    ),
    "rest between the ends": (
        4, {"pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": 2,
            "decoder_last_pipeline_num_layers": 3}, "--decoder-first",
        {"pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": 3,
         "decoder_last_pipeline_num_layers": 3},
    ),
    "nothing between the ends": (
        4, {"pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": 10}, "--decoder-first",
        {"pipeline_model_parallel_size": 4, "decoder_first_pipeline_num_layers": 9},
    ),
    "ends of two stages": (
        2, {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 5,
            "decoder_last_pipeline_num_layers": 6}, "--decoder-first",
        {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 5,
         "decoder_last_pipeline_num_layers": 7},
    ),
    "ends and method": (
        2, {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 5,
            "pp_partition_method": "uniform"},
        "--pp-partition-method", {"pipeline_model_parallel_size": 2, "pp_partition_method": "uniform"},
    ),
    "method": (1, {"pp_partition_method": "best"}, "--pp-partition-method",
               {"pp_partition_method": "type:TRANSFORMER"}),
    "ramp by micro-batches": (
        4, {"train_iters": None, "train_samples": 999, "rampup_batch_size": "16 8 100", "global_batch_size": 64},
        "--rampup-batch-size",
        {"train_iters": None, "train_samples": 999, "rampup_batch_size": "16 16 100", "global_batch_size": 64},
    ),
    "ramp decreased": (
        4, {"train_iters": None, "train_samples": 999, "rampup_batch_size": "8 8 100", "global_batch_size": 64,
            "decrease_batch_size_if_needed": True}, "--rampup-batch-size",
        {"train_iters": None, "train_samples": 999, "rampup_batch_size": "16 8 100", "global_batch_size": 64,
         "decrease_batch_size_if_needed": True},
    ),
    "ramp that misses": (
        1, {"train_iters": None, "train_samples": 999, "rampup_batch_size": "16 20 100", "global_batch_size": 64},
        "--rampup-batch-size",
        {"train_iters": None, "train_samples": 999, "rampup_batch_size": "16 12 100", "global_batch_size": 64},
    ),
    "ramp downwards": (
        1, {"train_iters": None, "train_samples": 999, "rampup_batch_size": "68 4 100", "global_batch_size": 64},
        "--rampup-batch-size",
        {"train_iters": None, "train_samples": 999, "rampup_batch_size": "64 4 100", "global_batch_size": 64},
    ),
    "ramp of rounds": (
        2, {"train_iters": None, "train_samples": 999, "rampup_batch_size": "8 4 100", "global_batch_size": 64,
            "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}, "--rampup-batch-size",
        {"train_iters": None, "train_samples": 999, "rampup_batch_size": "8 8 100", "global_batch_size": 64,
         "pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
    ),
    "ramp of what": (1, {"rampup_batch_size": "8 4"}, "--rampup-batch-size",
                     {"train_iters": None, "train_samples": 99, "rampup_batch_size": "4 4 0"}),
    "ramp of iterations": (1, {"rampup_batch_size": "8 8 100", "global_batch_size": 16}, "--rampup-batch-size",
                           {"global_batch_size": 16}),
    "steps by micro-batches": (
        4, {"train_iters": None, "train_samples": 999, "step_batch_size_schedule": "0:16 1M:40"},
        "--step-batch-size-schedule",
        {"train_iters": None, "train_samples": 999, "step_batch_size_schedule": "0:16 1M:48"},
    ),
    "steps decreased": (
        4, {"train_iters": None, "train_samples": 999, "step_batch_size_schedule": "0:16 1M:40"},
        "--step-batch-size-schedule",
        {"train_iters": None, "train_samples": 999, "step_batch_size_schedule": "0:16 1M:40",
         "decrease_batch_size_if_needed": True},
    ),
    "steps and batch": (
        1, {"train_iters": None, "train_samples": 999, "step_batch_size_schedule": "0:16", "global_batch_size": 16},
        "--step-batch-size-schedule", {"train_iters": None, "train_samples": 999, "step_batch_size_schedule": "0:16"},
    ),
    "steps and ramp": (
        1, {"train_iters": None, "train_samples": 999, "step_batch_size_schedule": "0:16",
            "rampup_batch_size": "4 4 9"}, "--rampup-batch-size and",
        {"train_iters": None, "train_samples": 999, "step_batch_size_schedule": "0:16"},
    ),
    "steps that cannot be read": (
        1, {"train_iters": None, "train_samples": 999, "step_batch_size_schedule": "16"}, "--step-batch-size-schedule",
        {"train_iters": None, "train_samples": 999, "step_batch_size_schedule": "0:16"},
    ),
    "decreased to nothing": (4, {"global_batch_size": 8, "decrease_batch_size_if_needed": True}, "--global-batch-size",
                             {"global_batch_size": 40, "decrease_batch_size_if_needed": True}),
    "residual": (1, {"fp32_residual_connection": True}, "--fp32-residual",
                 {"fp32_residual_connection": True, "bf16": True}),
    "bf16 reduction": (1, {"grad_reduce_in_bf16": True, "fp16": True}, "--grad-reduce-in-bf16",
                       {"grad_reduce_in_bf16": True, "bf16": True}),
    "loss scale": (1, {"loss_scale": -1, "fp16": True}, "--loss-scale", {"loss_scale": 0, "fp16": True}),
    "minimum of the loss scale": (1, {"min_loss_scale": 0, "fp16": True}, "--min-loss-scale",
                                  {"min_loss_scale": 0.5, "fp16": True}),
    "initial loss scale": (1, {"min_loss_scale": 8, "initial_loss_scale": 4, "fp16": True}, "--initial-loss-scale",
                           {"min_loss_scale": 8, "initial_loss_scale": 8, "fp16": True}),
    "window": (1, {"loss_scale_window": 0}, "--loss-scale-window", {"loss_scale_window": 1}),
    "hysteresis": (1, {"hysteresis": 0}, "--hysteresis", {"hysteresis": 1}),
    "parameters gathered": (1, {"overlap_param_gather": True}, "--overlap-param-gather",
                            {"overlap_param_gather": True, "zero_stage": 2}),
    "method of selective": (
        1, {"recompute_granularity": "selective", "recompute_method": "block"}, "--recompute-method",
        {"recompute_granularity": "full", "recompute_method": "block"},
    ),
    "method of nothing": (1, {"recompute_method": "uniform"}, "--recompute-method",
                          {"activations_checkpoint_method": "uniform"}),
    "layers of nothing": (1, {"recompute_num_layers": 2}, "--recompute-num-layers",
                          {"recompute_num_layers": 2, "checkpoint_activations": True}),
    "more layers than there are": (
        1, {"recompute_num_layers": 13, "checkpoint_activations": True}, "--recompute-num-layers",
        {"recompute_num_layers": 12, "checkpoint_activations": True},
    ),
    "two granularities": (1, {"recompute_activations": True, "checkpoint_activations": True}, "--recompute-granularity",
                          {"recompute_activations": True}),
    "two methods": (1, {"recompute_method": "uniform", "activations_checkpoint_method": "block"}, "--recompute-method",
                    {"recompute_method": "block", "activations_checkpoint_method": "block"}),
    "distributed over one": (1, {"distribute_saved_activations": True, "checkpoint_activations": True},
                             "--distribute-saved-activations", {"checkpoint_activations": True}),
    "distributed twice": (
        2, {"distribute_saved_activations": True, "checkpoint_activations": True, "sequence_parallel": True,
            "tensor_model_parallel_size": 2}, "--distribute-saved-activations",
        {"distribute_saved_activations": True, "checkpoint_activations": True, "tensor_model_parallel_size": 2},
    ),
    "nothing to distribute": (
        2, {"distribute_saved_activations": True, "tensor_model_parallel_size": 2}, "--distribute-saved-activations",
        {"distribute_saved_activations": True, "tensor_model_parallel_size": 2, "recompute_granularity": "full"},
    ),
    "nothing on the host": (1, {"checkpoint_in_cpu": True, "recompute_activations": True}, "--checkpoint-in-cpu",
                            {"checkpoint_in_cpu": True, "checkpoint_activations": True}),
    "rope base": (1, {"rotary_base": 0}, "--rotary-base", {"rotary_base": 0.5}),
}  # fmt: skip

BERT_RULES: dict[str, Rule] = {
    "documents": (1, {"reset_attention_mask": True}, "--reset-attention-mask", {}),
    "positions of documents": (1, {"reset_position_ids": True}, "--reset-position-ids", {}),
    "ends": (1, {"eod_mask_loss": True}, "--eod-mask-loss", {}),
    "parallel residual": (1, {"use_parallel_residual": True}, "--use-parallel-residual",
                          {"apply_residual_connection_post_layernorm": True}),
    "window": (1, {"window_size": 3}, "--window-size", {}),
    "scaled": (1, {"scale_decoder_outputs": True}, "--scale-decoder-outputs",
               {"no_lm_head_bias": True, "untie_embeddings_and_output_weights": True}),
    "position type": (1, {"position_embedding_type": "alibi"}, "--position-embedding-type",
                      {"position_embedding_type": "rope"}),
    "ring": (2, {"context_parallel_size": 2}, "--context-parallel-size", {"ds_sequence_parallel_size": 2}),
    "share masked": (1, {"mask_prob": 1}, "--mask-prob", {"mask_prob": 0.99}),
    "short ones": (1, {"short_seq_prob": 1.1}, "--short-seq-prob", {"short_seq_prob": 0}),
    "spans": (1, {"noise_density": 0.15}, "--noise-density", {"bert_no_binary_head": True}),
    "decoder": (1, {"decoder_seq_length": 128}, "--decoder-seq-length", {"embed_layernorm": True}),
}  # fmt: skip

PP4: dict[str, Value] = {"pipeline_model_parallel_size": 4}
T5_RULES: dict[str, Rule] = {
    "length of the decoder": (1, {"decoder_seq_length": None}, "--decoder-seq-length", {"decoder_seq_length": 1}),
    "length": (1, {"seq_length": None}, "--encoder-seq-length", {"seq_length": None, "encoder_seq_length": 8}),
    "positive length": (1, {"decoder_seq_length": 0}, "--decoder-seq-length", {"decoder_seq_length": 2048}),
    "positions": (1, {"decoder_seq_length": 2048, "max_position_embeddings": 1024}, "--max-position-embeddings",
                  {"decoder_seq_length": 2048, "max_position_embeddings": 2048}),
    "no table of positions": (
        1, {"decoder_seq_length": 2048, "max_position_embeddings": 1024}, "--max-position-embeddings",
        {"decoder_seq_length": 2048, "max_position_embeddings": 1024, "position_embedding_type": "relative"},
    ),
    "position type": (1, {"position_embedding_type": "alibi"}, "--position-embedding-type",
                      {"position_embedding_type": "relative"}),
    "buckets": (1, {"position_embedding_type": "relative", "relative_attention_num_buckets": 7}, "--relative",
                {"position_embedding_type": "relative", "relative_attention_num_buckets": 8}),
    "distance": (1, {"position_embedding_type": "relative", "relative_attention_max_distance": 16}, "--relative",
                 {"position_embedding_type": "relative", "relative_attention_max_distance": 17}),
    "two numbers of layers": (1, {"encoder_num_layers": 6}, "--num-layers and --encoder",
                              {"encoder_num_layers": 6, "num_layers": None}),
    "no number of layers": (1, {"num_layers": None, "decoder_num_layers": 6}, "--num-layers",
                            {"decoder_num_layers": 6}),
    "grouped heads": (1, {"num_key_value_heads": 6}, "--num-key-value-heads", {"num_key_value_heads": 12}),
    "documents": (1, {"reset_attention_mask": True}, "--reset-attention-mask", {}),
    "post-LN": (1, {"apply_residual_connection_post_layernorm": True}, "--apply-residual", {}),
    "norm of heads": (1, {"qk_layernorm": True}, "--qk-layernorm", {"apply_layernorm_1p": True}),
    "scaled and untied": (
        1, {"scale_decoder_outputs": True, "untie_embeddings_and_output_weights": True}, "--scale-decoder-outputs",
        {"scale_decoder_outputs": True},
    ),
    "binary head": (1, {"bert_no_binary_head": True}, "--bert-no-binary-head", {"no_lm_head_bias": True}),
    "two maskings": (1, {"mask_prob": 0.2, "mean_noise_span_length": 3}, "--mask-prob", {"mask_prob": 0.2}),
    "short samples of whole ones": (
        1, {"short_seq_prob": 0.2, "noise_density": 0.1}, "--short-seq-prob", {"short_seq_prob": 0.2},
    ),
    "density": (1, {"noise_density": 0}, "--noise-density", {"noise_density": 0.5, "mean_noise_span_length": 1}),
    "span": (1, {"mean_noise_span_length": 0.5}, "--mean-noise-span-length", {"mean_noise_span_length": 1.5}),
    "ring": (2, {"context_parallel_size": 2}, "--context-parallel-size",
             {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "Ulysses": (2, {"ds_sequence_parallel_size": 2}, "--ds-sequence-parallel-size", {"tensor_model_parallel_size": 2}),
    "sequence parallel": (
        2, {"tensor_model_parallel_size": 2, "sequence_parallel": True, "decoder_seq_length": 127},
        "--sequence-parallel", {"tensor_model_parallel_size": 2, "decoder_seq_length": 127},
    ),
    "a layer for every stage": (
        8, {"pipeline_model_parallel_size": 8, "num_layers": 3}, "--num-layers",
        {"pipeline_model_parallel_size": 8, "num_layers": 4},
    ),
    "a layer for every virtual stage": (
        4, PP4 | {"num_virtual_stages_per_pipeline_rank": 2, "num_layers": None, "encoder_num_layers": 3,
                  "decoder_num_layers": 4, "global_batch_size": 16}, "--encoder-num-layers",
        PP4 | {"num_virtual_stages_per_pipeline_rank": 2, "num_layers": None, "encoder_num_layers": 3,
               "decoder_num_layers": 5, "global_batch_size": 16},
    ),
    "layers in a virtual stage": (
        4, PP4 | {"num_layers_per_virtual_pipeline_stage": 2, "num_layers": 6, "global_batch_size": 16}, "--num-layers",
        PP4 | {"num_layers_per_virtual_pipeline_stage": 2, "num_layers": 8, "global_batch_size": 16},
    ),
    "split at the end": (4, PP4 | {"pipeline_model_parallel_split_rank": 4}, "--pipeline-model-parallel-split-rank",
                         PP4 | {"pipeline_model_parallel_split_rank": 3}),
    "split of one": (1, {"pipeline_model_parallel_split_rank": 1}, "--pipeline-model-parallel-split-rank", {}),
    "split of few layers": (
        4, PP4 | {"pipeline_model_parallel_split_rank": 3, "num_layers": 2}, "--pipeline-model-parallel-split-rank",
        PP4 | {"pipeline_model_parallel_split_rank": 2, "num_layers": 2},
    ),
    "split of a short decoder": (
        4, PP4 | {"pipeline_model_parallel_split_rank": 1, "decoder_num_layers": 2}, "--pipeline-model-parallel-split",
        PP4 | {"pipeline_model_parallel_split_rank": 2, "decoder_num_layers": 2},
    ),
    "split and virtual": (
        4, PP4 | {"pipeline_model_parallel_split_rank": 2, "num_virtual_stages_per_pipeline_rank": 3,
                  "global_batch_size": 16}, "--pipeline-model-parallel-split-rank",
        PP4 | {"num_virtual_stages_per_pipeline_rank": 3, "global_batch_size": 16},
    ),
    "uneven ends": (4, PP4 | {"decoder_first_pipeline_num_layers": 2}, "--decoder-first-pipeline-num-layers", PP4),
    "uneven method": (4, PP4 | {"pp_partition_method": "parameters"}, "--pp-partition-method", PP4 | {"num_layers": 3}),
    "more layers than there are": (
        1, {"recompute_num_layers": 25, "checkpoint_activations": True}, "--recompute-num-layers",
        {"recompute_num_layers": 24, "checkpoint_activations": True},
    ),
}  # fmt: skip

BERT: dict[str, Value] = {"model_type": "BERT"}
T5: dict[str, Value] = {"model_type": "T5", "decoder_seq_length": 128}
ALL_RULES: dict[str, Rule] = RULES | {
    f"{kind} {name}": (ranks, base | broken, subject, base | legal)
    for kind, base, rules in (("BERT:", BERT, BERT_RULES), ("T5:", T5, T5_RULES))
    for name, (ranks, broken, subject, legal) in rules.items()
}


@pytest.mark.parametrize("rule", ALL_RULES)
def test_rule_its_neighbour_and_its_way_out(rule: str) -> None:
    world_size, broken, subject, legal = ALL_RULES[rule]
    plan(world_size, **legal)
    with pytest.raises(ConfigErrors) as caught:
        plan(world_size, **broken)
    (error,) = caught.value.errors
    assert error.subject.startswith(subject) or subject in error.subject
    assert error.found
    assert error.expected
    offered = ways_out(error.fix, world_size)
    for changes, ranks in offered:
        plan(ranks, **broken | changes)
    if not offered:
        assert error.fix, rule  # a sentence


def ways_out(fix: str, world_size: int) -> list[tuple[dict[str, Value], int]]:
    """Every alternative of a message that can be typed as it stands: what it changes, and on how many ranks."""
    out: list[tuple[dict[str, Value], int]] = []
    for option in re.split(r", or |, ", fix.removesuffix(" or more")):
        ranks = re.fullmatch(r"start (\d+) ranks", option)
        if ranks:
            out.append(({}, int(ranks[1])))
        elif option.startswith("--") and not any(word in option for word in ("PREFIX", "DIR", " out", ": ", " ...")):
            out.append((_changes(option), world_size))
    return out


def _changes(option: str) -> dict[str, Value]:
    given, _, without = option.partition(" without ")
    found: dict[str, Value] = {}
    for words_of_flag in re.split(r"(?:^| )--(?=[a-z])", given)[1:]:
        name, *values = shlex.split(words_of_flag)
        found[name.replace("-", "_")] = " ".join(values) if values else True
    removed = {flag.removeprefix("--").replace("-", "_"): None for flag in without.split()}
    return found | removed | ({"fp16": None} if "bf16" in found else {})


def test_ways_out_are_read_as_they_are_meant() -> None:
    fix = "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 1, or --num-layers 4, or start 6 ranks"
    two = {"tensor_model_parallel_size": "2", "pipeline_model_parallel_size": "1"}
    assert ways_out(fix, 8) == [(two, 8), ({"num_layers": "4"}, 8), ({}, 6)]
    assert ways_out("leave --save out", 1) == []
    assert ways_out("--rampup-batch-size 4 4 9 without --sequence-parallel, or --zero-stage 1, or leave it out", 1) == [
        ({"rampup_batch_size": "4 4 9", "sequence_parallel": None}, 1),
        ({"zero_stage": "1"}, 1),
    ]
    assert ways_out("--step-batch-size-schedule '0:4 1M:8'", 1) == [({"step_batch_size_schedule": "0:4 1M:8"}, 1)]


def test_most_rules_offer_something_to_type() -> None:
    typed = 0
    for world_size, broken, _, _ in RULES.values():
        with pytest.raises(ConfigErrors) as caught:
            plan(world_size, **broken)
        typed += bool(ways_out(caught.value.errors[0].fix, world_size))
    assert typed >= len(RULES) * 2 // 3


def test_what_is_missing_is_told_before_what_does_not_fit_together() -> None:
    with pytest.raises(ConfigErrors) as caught:
        plan(3, lr=None, num_layers=None, tensor_model_parallel_size=2, seed=-1)
    assert [error.subject for error in caught.value.errors] == ["--num-layers --lr", "--seed"]


def test_a_recipe_of_fp8_needs_a_format() -> None:
    flags = ["--bf16", "--fp8-recipe", "rowwise"]
    (error,) = check_kernels(parse(flags))
    assert error.subject == "--fp8-recipe"
    assert not list(check_kernels(parse([*flags, "--fp8-format", "hybrid"])))
