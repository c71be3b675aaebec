"""What is made of the benchmark's result files: gates, tables, drift, figures; and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from dam_bench.tables import figures
from dam_bench.tables.aggregate import suites
from dam_bench.tables.gates import Gate, check_gates, gate_table, require
from dam_bench.tables.results import GROUPS, read_runs
from dam_bench.tables.sections import summary_table
from dam_bench.tables.tables import BEGIN, END, main, readme_table, with_table, write_results
from dam_bench.tables.windows import window_section

from mergekit_dam.errors import DamError
from tests.helpers.bench_runs import ATTACK, METHODS, POISONS, TOTAL, change, fill, new_run, only, place, put, row


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return fill(tmp_path / "results")


def gate(root: Path, part: str) -> Gate:
    (found,) = [gate for gate in check_gates(only(root)) if part in gate.name]
    return found


def test_gates_hold_and_print(root: Path) -> None:
    gates = check_gates(only(root))
    assert len(gates) == 4 and all(gate.passed for gate in gates), gates
    require(gates)
    assert gate_table(gates).count("| yes |") == 4
    assert len(check_gates(only(root), strong=())) == 3


def rates(value: int) -> dict[str, Any]:
    """`value` percent on the attacked task, by attack and task."""
    return {ATTACK: {"cifar10": [2 * value, TOTAL], "letters": [0, TOTAL]}}


def set_accuracy(value: int) -> Any:
    return lambda run: run["accuracy"].update({task: [value, TOTAL] for task in run["accuracy"]})


def set_success(value: int) -> Any:
    return lambda run: run["attack_success"][ATTACK].update(cifar10=[value, TOTAL])


@pytest.mark.parametrize(
    ("scenario", "method", "edit", "part"),
    [
        ("clean", "fine-tuned", set_accuracy(121), "fine-tunes above theta_0"),  # 60.5 - 51 = 9.5 points
        ("clean", "base", set_accuracy(159), "best undefended merge"),  # fine-tunes +11.5, merge +1.5
        ("merge-aware", "fine-tuned", set_success(189), "victim alone"),  # 94.5 %
        ("merge-aware", "task_arithmetic-0.3", set_success(119), "undefended merge (task_arithmetic-0.3), ASR"),
    ],
)
def test_a_gate_that_fails_stops_with_its_figures(root: Path, scenario: str, method: str, edit: Any, part: str) -> None:
    assert gate(root, part).passed
    change(root, scenario, method, edit)
    failed = gate(root, part)
    assert [one for one in check_gates(only(root)) if not one.passed] == [failed]
    with pytest.raises(DamError) as error:
        require(check_gates(only(root)))
    assert failed.name in str(error.value) and failed.measured in str(error.value)
    assert "| **no** |" in gate_table([failed])


def test_a_gate_without_its_runs_does_not_pass(root: Path) -> None:
    for method in METHODS:
        for seed in range(3):
            place(root, "clean", method, seed).unlink()
    for seed in range(3):
        place(root, "merge-aware", "fine-tuned", seed).unlink()
    gates = check_gates(only(root))
    assert [gate.passed for gate in gates] == [False, False, False, True]
    assert [gate.measured for gate in gates[:3]] == ["missing"] * 3
    assert gates[1].wanted == "half the fine-tunes' gain"


def test_tables_have_the_rows_in_order_the_counts_and_the_missing_seeds(root: Path, tmp_path: Path) -> None:
    place(root, "merge-aware", "ties-0.3", 1).unlink()
    change(root, "merge-aware", "dam", lambda run: run.update(without_trigger=rates(5 + run["seed"])))
    text = write_results(root, tmp_path / "RESULTS.md")
    assert (tmp_path / "RESULTS.md").read_text() == text
    main_table = text[text.index("### Scenario merge-aware") : text.index("Hardest baseline: **")]
    assert [line.split(" | ")[1] for line in main_table.splitlines()[4:] if line.startswith("|")] == list(METHODS)
    dam = row(text, "### Scenario merge-aware", "dam")
    assert dam[2:4] == ["79.0 (78.0 to 80.0)", "9.0 (8.0 to 10.0)"] and dam[5:7] == [
        "4.0 (3.0 to 5.0)",
        "5.0 (5.0 to 5.0)",
    ]
    assert dam[7] == "6.0 (5.0 to 7.0)"
    assert dam[8] == "22.9 (22.9 to 22.9), no seed 1; 2/2"  # the front has a hole there
    ties = row(text, "### Scenario merge-aware", "ties-0.3")
    assert ties[-1] == "2/3" and ties[2] == "75.0 (74.0 to 76.0), no seed 1" and ties[6].endswith(", no seed 1")
    assert ties[7] == "-"  # a run from before that was counted
    assert row(text, "Transfer matrix", "dam")[1:] == [ATTACK, "**9.0 (54/600)**", "3.0 (18/600)", "3/3"]
    assert row(text, "Clean accuracy of", "ties-0.3")[1:] == ["75.0 (300/400)", "75.0 (300/400)", "2/3"]
    floors = row(text, "### All-clean merges", "dam")
    assert floors[1:] == ["80.0 (79.0 to 81.0)", "-1.0 (-1.0 to -1.0)", "4.0 (3.0 to 5.0)", "3/3"]
    assert "ACC against task_arithmetic-0.3" in text
    assert row(text, "### Time and memory", "dam")[1:] == ["3.0 (2.0 to 4.0)", "3 (3 to 3)", "64", "6", "2 cores"]


def test_rival_defences_have_their_own_group_before_ours(root: Path, tmp_path: Path) -> None:
    for method, name in (("wag", "wag"), ("crow(alpha=11)", "crow"), ("outside", "outside")):
        for scenario in ("clean", "merge-aware"):
            for seed in range(3):
                put(root, new_run("dam", scenario, seed, method=method, defence=name, density={}))
    text = write_results(root, tmp_path / "RESULTS.md")
    table = text[text.index("### Scenario merge-aware") : text.index("Hardest baseline: **")]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[4:] if line.startswith("|")]
    groups = [(row[0], row[1]) for row in rows]
    rivals = [("defence", "wag"), ("defence", "crow(alpha=11)"), ("defence", "outside")]
    assert groups == [*groups[:6], *rivals, ("ours", "paper-dual"), ("ours", "dam")]
    assert row(text, "### Scenario merge-aware", "wag")[8].endswith("3/3"), "compared with the undefended front"


def test_the_victim_alone_may_be_measured_on_its_task_only(root: Path, tmp_path: Path) -> None:
    def keep_one(run: dict[str, Any]) -> None:
        del run["accuracy"]["letters"], run["attack_success"][ATTACK]["letters"]

    change(root, "merge-aware", "fine-tuned", keep_one)
    cells = row(write_results(root, tmp_path / "R.md"), "### Scenario merge-aware", "fine-tuned")
    assert cells[2:5] == ["91.0 (90.0 to 92.0) on cifar10 alone", "99.7 (99.0 to 100.0)", "-"]
    assert not only(root).accuracy("merge-aware", "fine-tuned").values


def test_several_attacks_are_a_mean_and_each_has_its_own_line_and_gate(root: Path, tmp_path: Path) -> None:
    second = "letters=patch"
    for seed in range(2):
        run = new_run("dam", "merge-aware", seed, scenario="two", poisons={**POISONS, "letters": "patch"})
        run["attack_success"][second] = {"cifar10": [1, TOTAL], "letters": [60, TOTAL]}
        put(root, run)
    results = only(root)
    assert results.attacks_of("two") == (ATTACK, second)
    assert results.success("two", "dam").values == pytest.approx({0: (8 + 30) / 2, 1: (9 + 30) / 2})
    assert not results.excess("two", "dam").values  # the all-clean runs do not have the second attack
    text = write_results(root, tmp_path / "R.md")
    assert row(text, "Transfer matrix of two", "dam", second)[2:4] == ["0.5 (2/400)", "**30.0 (120/400)**"]
    assert [gate.name for gate in check_gates(results) if gate.name.startswith("two: victim")] == [
        f"two: victim alone, ASR of {ATTACK}",
        f"two: victim alone, ASR of {second}",
    ]


def test_a_scenario_with_fewer_seeds_says_so_and_still_has_its_hardest_baseline(root: Path, tmp_path: Path) -> None:
    for method in METHODS:
        run = new_run(method, "merge-aware", 1, scenario="adaptive", poisons={"cifar10": "adaptive"})
        run["attack_success"] = {"cifar10=adaptive": run["attack_success"][ATTACK]}
        put(root, run)
        change(
            root,
            "clean",
            method,
            lambda r: r["attack_success"].update({"cifar10=adaptive": r["attack_success"][ATTACK]}),
        )
    text = write_results(root, tmp_path / "R.md")
    assert "Seeds 1 only; other scenarios have 0, 1, 2." in text and text.count(" only; other scenarios") == 1
    dam = row(text, "### Scenario adaptive", "dam")
    assert dam[2:4] == ["79.0", "9.0"] and dam[5:7] == ["4.0", "5.0"] and dam[-1] == "1/3"
    assert only(root).hardest(["adaptive", "merge-aware"]) == "ties-0.3"
    summary = summary_table([only(root)])
    assert row(summary, "suite", "dam")[2:] == ["79.0 (79.0 to 79.0)", "5.0 (5.0 to 5.0)", "2/2", "1-3/3"]


def test_settings_that_differ_between_runs_are_reported(root: Path, tmp_path: Path) -> None:
    assert "Not the same setting" not in write_results(root, tmp_path / "R.md")
    put(root, new_run("dam", "clean", 2, settings={"seed": 2, "steps": 6}))
    assert "**Not the same setting in all runs** of dam: `steps` is 5, 6." in write_results(root, tmp_path / "R.md")


def test_presets_are_never_mixed_and_suites_are_sorted(root: Path) -> None:
    large = new_run("dam", "clean", 0, preset="large")
    path = root / "vision-large" / "clean" / "dam-seed0.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(large))
    assert [(one.suite, one.preset) for one in suites(read_runs(root))] == [("vision", "large"), ("vision", "small")]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"schema": 2}, "schema"),
        ({"accuracy": {"cifar10": [201, 200]}}, "accuracy.cifar10"),
        ({"accuracy": {"cifar10": [0, 0]}}, "accuracy.cifar10"),
        ({"accuracy": {}}, "accuracy"),
        ({"family": "victim"}, "family"),
        ({"seed": 7}, "the path"),
        ({"poisons": {"letters": "patch"}}, "poisons"),
        ({"poisons": {}}, "poisons"),
    ],
)
def test_files_that_are_no_results_are_refused(root: Path, changes: dict[str, Any], named: str) -> None:
    path = place(root, "merge-aware", "dam", 0)
    path.write_text(json.dumps(new_run("dam", "merge-aware", 0, **changes)))
    with pytest.raises(DamError, match=named):
        suites(read_runs(root))


def test_broken_and_absent_files_are_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DamError, match="no such file"):
        read_runs(tmp_path / "nowhere")
    path = place(root, "merge-aware", "dam", 0)
    path.write_text(path.read_text()[:-5])
    with pytest.raises(DamError, match=r"dam-seed0\.json: expected JSON"):
        read_runs(root)


def test_the_readme_table_goes_between_its_markers(root: Path) -> None:
    summary = summary_table([only(root)])
    assert [line.split(" | ")[1] for line in summary.splitlines()[2:]] == [
        "ties-0.3 (hardest baseline)",
        "paper-dual",
        "dam",
    ]
    assert row(summary, "suite", "dam")[2:] == ["79.0", "5.0", "1/1", "3/3"]
    results, table = only(root), readme_table(root)
    best = results.most_accurate("merge-aware")
    assert best is not None and results.any_run(best).group == "undefended"
    wanted = [results.accuracy("merge-aware", best), results.success("merge-aware", best)]
    wanted += [results.accuracy("merge-aware", "dam"), results.success("merge-aware", "dam")]
    figures = [f"{one.mean:.1f}" for one in [*wanted, results.floor("merge-aware", "dam")]]
    assert row(table, "suite", "vision")[1:] == [*figures, "1 attack, 3 seeds"]
    for method in results.methods("merge-aware"):
        if results.any_run(method).group == "undefended" and not results.accuracy("merge-aware", method).missing:
            assert results.accuracy("merge-aware", method).mean <= wanted[0].mean
    page = f"a\n{BEGIN}\nold\n{END}\nb\n"
    assert with_table(page, table) == f"a\n{BEGIN}\n{table}\n{END}\nb\n"
    for wrong in ("a\n", f"{END}\n{BEGIN}\n", page + page):
        with pytest.raises(DamError, match=r"README\.md"):
            with_table(wrong, table)


def test_write_then_check_and_drift_is_shown(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the extra `report`")
    from PIL import Image

    out, readme = tmp_path / "bench" / "RESULTS.md", tmp_path / "README.md"
    readme.write_text(f"# x\n{BEGIN}\n{END}\n")
    options = ["--root", str(root), "--out", str(out), "--readme", str(readme)]

    def call(verb: str) -> Any:
        return CliRunner().invoke(main, [verb, *options])

    assert call("--check").exit_code == 1
    assert call("--write").exit_code == 0, call("--write").output
    figures = sorted((tmp_path / "bench" / "figures").iterdir())
    assert [path.name for path in figures] == [
        "vision-small-acc-asr.png",
        "vision-small-asr-coefficient.png",
        "vision-small-density.png",
    ]
    for path in figures:  # something is drawn, in more than one colour
        image = Image.open(path).convert("RGB")
        assert min(image.size) > 300 and len(image.getcolors(1 << 24) or []) > 20
    before = {path: path.read_bytes() for path in [out, readme, *figures]}
    assert call("--check").exit_code == 0 and call("--write").exit_code == 0
    assert {path: path.read_bytes() for path in before} == before
    assert f"--write --root {root.as_posix()} " in out.read_text()

    figures[0].unlink()
    assert call("--check").exit_code == 1 and "no such figure" in call("--check").output
    assert call("--write").exit_code == 0
    change(root, "merge-aware", "dam", set_success(60))
    drift = call("--check")
    assert drift.exit_code == 1
    assert "-| vision (small) | dam | 79.0 | 5.0 | 1/1 | 3/3 |" in drift.output
    assert "+| vision (small) | dam | 79.0 | 26.0 | 1/1 | 3/3 |" in drift.output


def test_windows_are_told_from_the_whole_model_down(tmp_path: Path) -> None:
    for method in ("dam", "dam(window=1)", "dam(window=2)", "dam(window=2,steps=5)"):
        for scenario in ("clean", "merge-aware"):
            put(tmp_path, new_run("dam", scenario, 0, method=method))
    put(tmp_path, new_run("dam", "merge-aware", 1, wall_s=10.0))
    lines = window_section(suites(read_runs(tmp_path))).splitlines()[4:]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    assert [line[1:3] for line in cells] == [[s, w] for s in ("clean", "merge-aware") for w in ("all", "2", "1")]
    assert cells[0][3:] == ["79.0", "-", "-", "2", "0"]
    assert cells[3][3:] == ["78.5 (78.0 to 79.0)", "8.5 (8.0 to 9.0)", "3.0, no seed 1", "6", "0, 1"]


def test_every_group_of_methods_has_a_look() -> None:
    assert figures._LOOKS.keys() == GROUPS.keys()
