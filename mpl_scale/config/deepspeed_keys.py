"""The keys DeepSpeed 0.19.8 reads from a ds_config, as static tables: checking a file must not import DeepSpeed.

DeepSpeed ignores unknown top-level keys in silence, so a misspelt `gradient_cliping` trains unclipped: the loader
compares with these tables. tests/test_deepspeed_config.py compares the tables with the installed DeepSpeed.
"""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


TOP_LEVEL_KEYS: frozenset[str] = _names("""
    activation_checkpointing aio autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile
    csv_monitor data_efficiency data_parallel_size data_types dataloader_drop_last datastates_ckpt disable_allgather
    disable_python_gc dump_state expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op
    gradient_clipping gradient_predivide_factor hybrid_engine log_level managed_gradient_accumulation memory_breakdown
    optimizer pipeline prescale_gradients scheduler seq_parallel_communication_data_type sequence_parallel_size
    steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size train_micro_batch_size_per_gpu
    use_data_before_expert_parallelism vocabulary_size wall_clock_breakdown wandb weight_quantization
    zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization
""")
"""Every key that DeepSpeedConfig or deepspeed.initialize looks up."""

REMOVED_KEYS: frozenset[str] = _names("""
    amp compression_training curriculum_learning eigenvalue elasticity graph_harvesting nebula progressive_layer_drop
    quantize_training sparse_attention sparse_gradients
""")
"""Keys of older releases, which DeepSpeed 0.19.8 refuses."""

_LANGUAGE_MODELS = "it belongs to language models; remove it"
_MESH = "the mesh is set in mpl_scale.parallel; remove it"

REFUSED_KEYS: dict[str, str] = {
    **dict.fromkeys(REMOVED_KEYS, "DeepSpeed 0.19.8 has removed it; remove it"),
    "amp": "DeepSpeed 0.19.8 has removed it; use bf16",
    "optimizer": "teacher and student have one each; use mpl_scale.optim.teacher and mpl_scale.optim.student",
    "scheduler": "teacher and student have one each; use mpl_scale.optim.teacher.schedule and .student.schedule",
    "fp16": "loss scaling skips steps, and teacher and student must step together; use bf16",
    "bfloat16": "it is the old name of bf16; use bf16",
    "torch_autocast": "DeepSpeed keeps it in a global that both networks share; use bf16 (master weights are fp32)",
    "pipeline": "networks are not cut into pipeline stages; remove it",
    "managed_gradient_accumulation": "the trainer decides when a gradient is applied or discarded; remove it",
    "gradient_allreduce_op": "gradients are averaged over ranks, never summed; remove it",
    "hybrid_engine": _LANGUAGE_MODELS,
    "data_efficiency": "the data pipeline is mpl_scale.data; remove it",
    "weight_quantization": "weights are bf16 or fp32; remove it",
    "tensor_parallel": _MESH,
    "expert_parallel": _LANGUAGE_MODELS,
    "use_data_before_expert_parallelism": _LANGUAGE_MODELS,
    "sequence_parallel_size": _MESH,
    "data_parallel_size": _MESH,
    "seq_parallel_communication_data_type": _LANGUAGE_MODELS,
    "vocabulary_size": _LANGUAGE_MODELS,
    "autotuning": "it restarts the script with its own configs; use `mpl_scale plan`",
    "checkpoint": "checkpoints are written by mpl_scale.checkpoint; use that section",
    "datastates_ckpt": "checkpoints are written by mpl_scale.checkpoint; use that section",
    "dataloader_drop_last": "the data pipeline is mpl_scale.data; remove it",
}
"""Keys that make no sense here: the reason and the fix. A block whose `enabled` is false is harmless: let it pass."""

BLOCK_KEYS: dict[str, frozenset[str]] = {
    name: _names(keys)
    for name, keys in {
        "zero_optimization": """
            allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm contiguous_gradients
            cpu_offload cpu_offload_param cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
            gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1
            load_from_fp32_weights log_trace_cache_warnings max_live_parameters max_reuse_distance
            memory_efficient_linear model_persistence_threshold module_granularity_threshold offload_optimizer
            offload_param overlap_comm override_module_apply param_persistence_threshold parameter_alignment
            pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients
            save_muon_momentum_buffer_in_memory stage stage3_allgather_sequential
            stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
            stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
            stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
            stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params
            use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients
            zero_quantized_nontrainable_weights zero_quantized_weights""",
        "zero_optimization.offload_optimizer": """
            buffer_count cpuadam_cores_perc device fast_init nvme_path pin_memory pipeline_read pipeline_write ratio
            super_offload""",
        "zero_optimization.offload_param": "buffer_count buffer_size device max_in_cpu nvme_path pin_memory",
        "bf16": """
            bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled immediate_grad_update""",
        "tensorboard": "enabled job_name output_path",
        "csv_monitor": "enabled job_name output_path",
        "wandb": "enabled group project team",
        "comet": """
            api_key enabled experiment_key experiment_name mode online project samples_log_interval workspace""",
        "comms_logger": "debug enabled prof_all prof_ops verbose",
        "compile": """
            autoep_non_moe debug_log deepcompile double_buffer free_activation free_activation_threshold
            keep_all_input_tensors keep_int_input_tensors offload_activation offload_activation_pin_memory
            offload_opt_states offload_parameters passes symmetric_memory sync_after_allgather sync_after_reduce
            sync_before_allgather sync_before_reduce""",
        "timers": "throughput",
        "timers.throughput": "enabled synchronized",
        "activation_checkpointing": """
            contiguous_memory_optimization cpu_checkpointing number_checkpoints partition_activations profile
            synchronize_checkpoint_boundary""",
        "flops_profiler": "detailed enabled module_depth output_file profile_step recompute_fwd_factor top_modules",
        "data_types": "buffer_dtype grad_accum_dtype keep_in_fp32_modules param_dtype",
        "aio": "block_size intra_op_parallelism overlap_events queue_depth single_submit use_gds",
    }.items()
}
"""Keys of the typed blocks; a dotted name is a block inside a block."""
