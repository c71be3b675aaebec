"""Hostile inputs and numerics of the table, and the tests of the suite that show what becomes of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Named:
    """An input or a numerical fault.

    Attributes:
        fault: what comes in.
        outcome: what a user sees.
        tests: `file::function` below tests/.
    """

    fault: str
    outcome: str
    tests: tuple[str, ...]


HOSTILE = {
    "pickle": Named(
        "pickled weights: .bin, of an adapter, named by an index, of a CLIP that gives heads",
        "refused with the cure; nothing is loaded",
        (
            "hostile/test_bad_input::test_pickle_is_never_loaded",
            "hostile/test_text::test_pickled_adapters_are_refused_before_anything_loads_them",
            "hostile/test_files::test_an_index_names_only_safetensors_beside_it",
            "hostile/test_text::test_a_pickled_clip_gives_no_heads",
            "learn/test_resume::test_snapshots_are_safetensors_and_json",
            "publish/test_push_refusals::test_pickles_hidden_files_and_links_out_stay_here",
        ),
    ),
    "remote_code": Named(
        "code beside a config, a tokenizer, a kept head, a base of a merge that is published",
        "not run; an error that names --trust-remote-code",
        (
            "hostile/test_text::test_code_beside_a_model_is_not_run",
            "hostile/test_reports::test_code_beside_a_published_base_is_not_run",
        ),
    ),
    "yaml_bombs": Named(
        "YAML bombs, tags that make objects, depth",
        "one line within 5 s",
        (
            "hostile/test_text::test_yaml_bombs_are_refused_at_once",
            "hostile/test_text::test_plain_yaml_is_read_as_pyyaml_reads_it",
        ),
    ),
    "json_and_configs": Named(
        "JSON of great depth or size, configs of models that would fill the memory",
        "one line before a weight is read",
        (
            "hostile/test_text::test_json_that_is_none",
            "hostile/test_text::test_configs_that_would_fill_the_memory",
            "hostile/test_files::test_a_broken_index_is_refused",
            "artifact/test_hostile_masks::test_metadata_nested_beyond_the_stack",
            "hostile/test_reports::test_json_of_any_depth_beside_a_merge",
            "hostile/test_images::test_preprocessing_that_would_fill_the_memory_or_make_nan",
        ),
    ),
    "path_traversal": Named(
        "names that lead to another folder: tasks, heads, shards, paths in data",
        "refused; nothing there is touched",
        (
            "hostile/test_text::test_a_task_cannot_name_another_folder",
            "hostile/test_text::test_task_names_are_unique_plain_files",
            "hostile/test_text::test_file_safe_names_stay_in_their_folder",
            "hostile/test_files::test_an_index_names_only_safetensors_beside_it",
            "hostile/test_data::test_paths_inside_a_data_file_are_not_followed",
        ),
    ),
    "links_out": Named(
        "symbolic links in outputs, also where temporary files, reports and counts are written",
        "refused or replaced, never followed",
        (
            "hostile/test_text::test_links_that_lead_out_of_the_output",
            "hostile/test_text::test_kept_files_replace_a_link_and_never_follow_it",
            "hostile/test_reports::test_a_report_follows_no_link",
            "hostile/test_reports::test_counts_follow_no_link",
            "hostile/test_reports::test_files_replace_links_and_survive_failure",
            "publish/test_push_refusals::test_pickles_hidden_files_and_links_out_stay_here",
        ),
    ),
    "foreign_cache": Named(
        "a cache entry that belongs to another user, is a link, or that all may write to",
        "refused; no masks of others",
        ("hostile/test_reports::test_a_cache_entry_of_somebody_else_is_not_believed",),
    ),
    "card_injection": Named(
        "Markdown, HTML and YAML in ids, names and metadata of a model card",
        "shown as text",
        (
            "publish/test_card::test_a_code_span_is_one_code_span",
            "publish/test_card::test_a_table_keeps_its_cells",
            "publish/test_card::test_a_block_is_one_block",
            "publish/test_card::test_a_hostile_name_changes_neither_front_matter_nor_text",
        ),
    ),
    "report_injection": Named(
        "HTML and formulas in names and token texts of a report, control codes in messages",
        "shown as text",
        (
            "publish/test_report::test_text_triggers_are_words_and_names_are_never_markup",
            "hostile/test_reports::test_no_text_becomes_markup",
            "hostile/test_reports::test_figures_show_names_as_text",
            "hostile/test_reports::test_a_report_of_many_models_stays_small",
            "hostile/test_text::test_errors_are_one_printable_line",
        ),
    ),
    "bombs_in_data": Named(
        "image bombs, packed files under plain names, parquet that expands to gigabytes, programs in images",
        "refused before they are decoded, in calibration and in evaluation data",
        (
            "hostile/test_images::test_an_image_bomb_is_refused_before_it_is_decoded",
            "hostile/test_images::test_programs_in_images_are_not_called",
            "hostile/test_data::test_a_small_parquet_that_would_expand_to_gigabytes",
            "hostile/test_data::test_packed_data_under_a_plain_name",
            "hostile/test_data::test_evaluation_data_are_read_with_the_same_bounds",
            "hostile/test_images::test_a_needle_of_an_image_is_not_stretched_without_bound",
        ),
    ),
    "labels": Named(
        "columns of labels, by type, by name, and hidden as text",
        "refused, or reported",
        (
            "hostile/test_data::test_labels_do_not_reach_the_search",
            "hostile/test_data::test_class_labels_and_hidden_ones",
        ),
    ),
    "network": Named(
        "a connection at import or while masks are learned and merged; telemetry",
        "none is opened",
        (
            "integration/test_supply_chain::test_importing_and_merging_open_no_connection",
            "integration/test_supply_chain::test_a_test_cannot_reach_the_network",
        ),
    ),
}
NUMERICS = {
    "not_finite": Named(
        "NaN or infinity in weights, heads, preprocessing, gradients, and in what is written",
        "named at the step where it arises; the last good snapshot stays",
        (
            "hostile/test_bad_input::test_weights_that_are_not_finite",
            "merging/test_checks::test_a_head_that_only_one_model_has_is_checked",
            "merging/test_checks::test_a_tensor_is_refused_exactly_if_it_is_not_finite",
            "merging/test_checks::test_a_gradient_that_is_not_finite_stops_at_its_step",
            "merging/test_checks::test_the_last_good_snapshot_stays_after_a_bad_step",
            "merging/test_checks::test_a_result_beyond_the_type_is_named_not_written",
            "hostile/test_images::test_preprocessing_that_would_fill_the_memory_or_make_nan",
        ),
    ),
    "types": Named(
        "fp16, bf16, fp32 and mixed inputs",
        "the merge equation in float32, rounded once",
        ("merging/test_checks::test_all_types_of_weights_and_their_mixtures",),
    ),
    "degenerate": Named(
        "task vectors: models equal to the base, one zero, one a thousand times as long",
        "refused, or reported",
        (
            "hostile/test_bad_input::test_models_equal_to_the_base",
            "merging/test_checks::test_one_model_equal_to_the_base_and_one_far_away",
            "merging/test_checks::test_an_outlier_is_one_against_the_median",
        ),
    ),
    "collapsed": Named(
        "masks that are all 0 or all 1: learned, from the cache, from a file",
        "reported every time",
        (
            "merging/test_checks::test_masks_that_collapse_are_reported",
            "merging/test_checks::test_what_is_said_about_masks_follows_from_their_means",
        ),
    ),
    "same_seed": Named(
        "the same seed again, in one go and cut short at any step",
        "the same bytes",
        (
            "merging/test_checks::test_the_same_seed_gives_the_same_bytes",
            "learn/test_resume::test_stopped_after_units_of_every_phase",
        ),
    ),
}
ALL = HOSTILE | NUMERICS
