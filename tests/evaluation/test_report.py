"""A report is complete and valid for full and partial runs. It claims no more than the data show."""

import dataclasses
import itertools
import json
import math
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from matplotlib.image import imread

from thinkpo_jax.evaluation import report
from thinkpo_jax.evaluation.analysis import analyze
from thinkpo_jax.evaluation.benchmarks import Question
from thinkpo_jax.evaluation.grading import Reference
from thinkpo_jax.evaluation.results import GradedSample, QuestionResult, ReportContents, StageSummary
from thinkpo_jax.evaluation.statistics import compare_paired, score_benchmark

NAN = math.nan
SFT = StageSummary("sft", "sft", "base", 40, 61.0, ("16 rows",))
THINKPO = StageSummary("thinkpo", "thinkpo", "sft", 3, 7322.0)
FAILED = GradedSample("", 0, False, False, error="too long")
PROMPT = "<|user|>\nIs ```a | b``` right?\n<|assistant|>\n"
PLOTS = ("accuracy", "accuracy_by_length", "accuracy_by_budget", "response_length")
THINKPO_KEYS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def write_report(run_dir: Path, contents: ReportContents) -> None:
    report.write_report(run_dir, contents, analyze(contents))


def terminal_summary(contents: ReportContents) -> str:
    return report.terminal_summary(contents.title, analyze(contents))


def make_results(wins, questions=40, tokens=100, truncated=False):
    return [QuestionResult(str(i), (GradedSample("", tokens + i, i < wins, truncated),)) for i in range(questions)]


def contents(stages=(SFT, THINKPO), after=30, **changes):
    results = {
        "base": {"a|b": make_results(10)},
        "sft": {"a|b": make_results(after, tokens=5000, truncated=True), "extra": make_results(3)},
    }
    values = {"results": results, "comparisons": (("base", "sft"),), "settings": {"seed": "0"}, "prompts": {}} | changes
    ids = {name: {q.question_id for q in of} for by in values["results"].values() for name, of in by.items()}
    asked = {name: [Question(i, ({"role": "user", "content": i},), Reference((i,))) for i in ids[name]] for name in ids}
    return ReportContents(title="A run", stages=stages, questions=asked, **values)


def write_metrics(run_dir, stage, losses, rewards=()):
    (run_dir / stage.name).mkdir(parents=True, exist_ok=True)
    with (run_dir / stage.name / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, start=1):
            extra = dict.fromkeys(THINKPO_KEYS, rewards[step - 1]) if rewards else {}
            file.write(json.dumps({"step": step, "loss": loss, "learning_rate": 1e-5} | extra) + "\n")


def report_files(run_dir):
    return {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()} - {
        f"{stage}/metrics.jsonl" for stage in ("sft", "thinkpo")
    }


def plots(*names):
    return {f"plots/{name}.png" for name in names}


def strict_json(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("full")
    write_metrics(run_dir, SFT, np.linspace(2, 1, 40))
    write_metrics(run_dir, THINKPO, [0.693, 0.6, 0.5], rewards=[0.0, 0.1, 0.2])
    write_report(run_dir, contents(prompts={"a|b": PROMPT}))
    return run_dir


def test_the_report_of_a_full_run_has_every_file_and_nothing_else(full):
    expected_plots = plots("loss", "rewards", *PLOTS)
    assert report_files(full) == {"report.json", "report.md", "comparisons/a|b/base+sft.md"} | expected_plots
    for name in expected_plots:
        height, width, _ = imread(full / name).shape
        assert (full / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert height > 300
        assert width > 500
        assert f"]({name})" in (full / "report.md").read_text()


def test_the_json_holds_the_scores_and_comparisons(full):
    report, score = strict_json(full / "report.json"), score_benchmark(make_results(30, tokens=5000, truncated=True))
    assert report["models"]["sft"]["a|b"] == {
        "accuracy": score.accuracy,
        "ci95": list(score.ci95),
        "mean_response_tokens": score.mean_response_tokens,
        "truncation_rate": 1.0,
        "num_questions": 40,
        "num_samples": 40,
    }
    (row,) = report["comparisons"]  # only one model was evaluated on `extra`
    change = compare_paired(make_results(10), make_results(30, tokens=5000))
    assert (row["from"], row["to"], row["benchmark"]) == ("base", "sft", "a|b")
    assert (row["accuracy_difference"], row["p_value"]) == (change.accuracy_difference, change.p_value)
    assert (row["ci95"], row["response_tokens_difference"]) == (list(change.ci95), 4900)
    assert row["questions_needed"] == {str(points): count for points, count in change.questions_needed.items()}
    assert (full / row["changed_questions"]).read_text().startswith("# a|b: base -> sft\n")
    measures = report["measures"]["sft"]["a|b"]
    assert measures["accuracy_within_budget"].keys() == {"1024", "2048", "4096"}
    assert (measures["accuracy_finished"]["mean"], measures["median_finished_tokens"]) == (0, None)
    assert [stage["name"] for stage in report["stages"]] == ["sft", "thinkpo"]
    assert report["prompts"] == {"a|b": PROMPT}
    assert (report["title"], report["settings"]) == ("A run", {"seed": "0"})


def test_a_difference_is_claimed_if_and_only_if_the_interval_excludes_zero(tmp_path):
    verdicts = {4: "lower", 5: "none", 10: "none", 15: "none", 16: "higher"}  # by correct answers of 40. `base` has 10
    results = {"base": {"a": make_results(10)}} | {f"m{wins}": {"a": make_results(wins)} for wins in verdicts}
    run = contents((), results=results, comparisons=tuple(("base", f"m{wins}") for wins in verdicts))
    write_report(tmp_path, run)
    intervals = [row["ci95"] for row in strict_json(tmp_path / "report.json")["comparisons"]]
    expected = ["higher" if low > 0 else "lower" if high < 0 else "none" for low, high in intervals]
    assert expected == list(verdicts.values())
    assert 0 in intervals[1] + intervals[3]  # an interval that ends at zero does not exclude it
    for text in ((tmp_path / "report.md").read_text(), terminal_summary(run)):
        for wins, verdict in verdicts.items():
            assert (f"a: no significant difference between base and m{wins} (" in text) == (verdict == "none")
            assert (f"a: m{wins} scores higher than base" in text) == (verdict == "higher")
            assert (f"a: m{wins} scores lower than base" in text) == (verdict == "lower")


def test_the_tables_are_rectangular_and_contain_the_numbers(full):
    markdown = (full / "report.md").read_text()
    blocks = [block.replace("\\|", "").split("\n") for block in markdown.split("\n\n") if block.startswith("|")]
    assert len(blocks) == 9
    assert all(len({line.count("|") for line in block}) == 1 for block in blocks)
    assert "| a\\|b | sft | 75.0 (59.8 to 85.8) | 5,019.5 | 100.0 | 40 x 1 |" in markdown
    assert "| base -> sft | a\\|b | +50.0 (" in markdown
    assert "| base -> sft | a\\|b | 40 | 20 | 0 | [side by side](comparisons/a%7Cb/base%2Bsft.md) | " in markdown
    assert "| thinkpo | thinkpo | sft | 3 | 2:02:02 |" in markdown


def test_the_accuracies_and_verdicts_come_first(full):
    blocks = (full / "report.md").read_text().split("\n\n")
    assert [block.splitlines()[0][:20] for block in blocks[:6:2]] == [
        "# A run",
        "| benchmark | model ",
        "## Comparisons",
    ]
    assert blocks[5].startswith("- a|b: sft scores higher than base (+50.0 points")


def test_links_lead_to_files_and_the_prompt_is_shown_as_it_is(full):
    markdown = (full / "report.md").read_text()
    links = re.findall(r"\]\((.+?)\)", markdown)
    assert len(links) == 7
    assert {unquote(link) for link in links} == report_files(full) - {"report.md", "report.json"}
    assert f"### a|b\n\n````text\n{PROMPT}\n````\n" in markdown


def test_groups_samples_and_lenient_grades_have_their_own_tables(tmp_path, full):
    results = {}
    for model, wins in (("base", 10), ("sft", 40)):
        drawn = make_results(wins, questions=60)
        results[model] = {
            "a": [
                dataclasses.replace(r, samples=r.samples * 2, group=f"{8 + i % 3} steps" if i % 4 else "")
                for i, r in enumerate(drawn)
            ],
            "b": [
                dataclasses.replace(r, samples=(dataclasses.replace(r.samples[0], lenient_correct=True),))
                for r in drawn
            ],
        }
    write_report(tmp_path, contents((), results=results))
    markdown, report = (tmp_path / "report.md").read_text(), strict_json(tmp_path / "report.json")
    assert markdown.count("by group") == 1
    expected = score_benchmark([r for r in results["sft"]["a"] if r.group == "10 steps"])
    assert report["groups"]["sft"]["a"]["10 steps"]["accuracy"] == expected.accuracy
    assert list(report["comparisons"][0]["groups"]) == ["8 steps", "9 steps", "10 steps"]
    assert [line.split(" |")[0] for line in markdown.splitlines() if " steps |" in line] == [
        "| 8 steps", "| 9 steps", "| 10 steps",
    ] * 2  # fmt: skip
    assert "| benchmark | model | pass@1 % | pass@2 % |" in markdown
    lenient = markdown.split("## Lenient grading")[1].split("##")[0]
    assert "| b | sft | 66.7 (54.1 to 77.3) | 100.0 (" in lenient
    assert "| a |" not in lenient
    for title in ("by group", "pass@", "Lenient"):
        assert title not in (full / "report.md").read_text()


@pytest.mark.parametrize("num_questions", [1, 3])
def test_extreme_answers_can_be_reported(num_questions, tmp_path):
    right = GradedSample("1", 40_000, True, False)
    kinds = {
        "right": (right,),
        "wrong": (dataclasses.replace(right, correct=False, truncated=True),),
        "failed": (FAILED,),
        "partly failed": (FAILED, right),
        "without tokens": (GradedSample("", 0, False, True),),
    }
    answers = {k: [QuestionResult(str(i), kinds[k]) for i in range(num_questions)] for k in kinds}
    run = contents((), results={"base": answers, "sft": answers})
    write_report(tmp_path, run)
    assert report_files(tmp_path) >= {"report.md", "report.json"} | plots(*PLOTS)
    markdown = (tmp_path / "report.md").read_text() + terminal_summary(run)
    assert all(f"{kind}: no significant difference between base and sft" in markdown for kind in kinds)
    assert not re.search(r"\bnan\b|\binf\b", markdown)
    strict_json(tmp_path / "report.json")


def test_many_models_can_be_compared(tmp_path):
    results = {f"model{wins}": {"a": make_results(wins, tokens=50 + 9 * wins)} for wins in range(10, 19)}
    write_report(tmp_path, contents((), results=results, comparisons=tuple(itertools.pairwise(results))))
    assert report_files(tmp_path) >= plots(*PLOTS)
    assert len(strict_json(tmp_path / "report.json")["comparisons"]) == 8


def test_texts_that_are_no_utf_8_can_be_reported(tmp_path):
    half = GradedSample("\ud83d", 1, correct=False, truncated=False, extracted="\ud83d")
    results = {"base": {"a": make_results(1, 1)}, "sft": {"a": [QuestionResult("0", (half,))]}}
    write_report(tmp_path, contents((), results=results))
    assert "\\ud83d" in (tmp_path / "comparisons" / "a" / "base+sft.md").read_text(encoding="utf-8")


def test_answers_that_failed_were_cut_or_are_empty_are_counted(tmp_path):
    failed = [GradedSample("", 0, False, False, error=f"too long: {n} tokens") for n in (7, 8)]
    cut, empty = GradedSample("1", 9, False, True, cut_by_context=True), GradedSample(" ", 1, False, False)
    samples = [*failed, cut, empty, GradedSample("1", 40, False, True)]
    results = {"base": {"gsm8k": [QuestionResult(str(i), (sample,)) for i, sample in enumerate(samples)]}}
    write_report(tmp_path, contents((), results=results, comparisons=()))
    markdown = (tmp_path / "report.md").read_text()
    header = "| benchmark | model | answers | truncated | cut by the context | unfinished thought | empty | "
    assert f"{header}without a result % | failed |" in markdown
    assert "| gsm8k | base | 5 | 2 | 1 | 0 | 1 | 100.0 | 2 |" in markdown
    assert "\n- gsm8k, base: 2 failed and count as wrong: too long: 7 tokens\n" in markdown
    counts = {"answers": 5, "truncated": 2, "cut_by_context": 1, "empty": 1, "errors": {"too long: 7 tokens": 2}}
    assert strict_json(tmp_path / "report.json")["answers"] == {"base": {"gsm8k": counts}}


def test_the_terminal_shows_aligned_columns():
    lines = terminal_summary(contents()).splitlines()
    header = next(line for line in lines if line.startswith("benchmark"))
    rows = [line for line in lines[lines.index(header) + 2 :] if line.startswith(("a|b   ", "extra   "))]
    assert len(rows) == 3
    assert {line[header.index("model") - 1] for line in rows} == {" "}
    assert {line[header.index("model") :].split()[0] for line in rows} == {"base", "sft"}


def test_a_model_has_the_same_color_in_all_plots(full):
    blue = np.array([0x00, 0x72, 0xB2])
    for name in plots("loss", *PLOTS):
        pixels = (imread(full / name)[..., :3] * 255).round()
        assert (pixels == blue).all(axis=-1).sum() > 50, name


def test_a_run_without_evaluation_has_training_curves(tmp_path):
    write_metrics(tmp_path, SFT, [2.5])
    run = contents((SFT, THINKPO), results={}, comparisons=())  # thinkpo left no metrics file
    write_report(tmp_path, run)
    assert report_files(tmp_path) == {"report.json", "report.md"} | plots("loss")
    assert strict_json(tmp_path / "report.json")["models"] == {}
    assert terminal_summary(run) == "A run\n"


def test_plots_and_json_leave_out_numbers_that_are_not_finite(tmp_path):
    values = [NAN, math.inf, None, 0.5] * 20
    write_metrics(tmp_path, SFT, [NAN, NAN])
    write_metrics(tmp_path, THINKPO, values, rewards=[None, -math.inf, NAN, 0.1] * 20)
    results = {name: {"a": make_results(wins, questions=1)} for name, wins in (("base", 0), ("sft", 1))}
    write_report(tmp_path, contents((SFT, StageSummary("thinkpo", "thinkpo", "sft", 80, 1.0)), results=results))
    assert report_files(tmp_path) >= plots("loss", "rewards")
    assert strict_json(tmp_path / "report.json")["comparisons"][0]["response_tokens_ci95"] == [None, None]


def test_a_failed_write_keeps_the_old_report_and_leaves_no_other_files(full, tmp_path, monkeypatch):
    run_dir = shutil.copytree(full, tmp_path / "copy")
    before = {name: (run_dir / name).read_bytes() for name in report_files(run_dir)}
    write = Path.write_bytes

    def fill_the_disk(path, data):
        write(path, data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill_the_disk)
    with pytest.raises(OSError, match="no space left"):
        write_report(run_dir, contents(after=12))
    assert {name: (run_dir / name).read_bytes() for name in report_files(run_dir)} == before


@pytest.mark.parametrize("pair", [("base", "sfd"), ("base", "other")])
def test_models_without_a_common_benchmark_are_an_error(pair, tmp_path):
    results = {"base": {"a": make_results(1)}, "other": {"b": make_results(1)}}
    with pytest.raises(ValueError, match=rf"cannot compare 'base' with '{pair[1]}'.*'other': \['b'\]"):
        write_report(tmp_path, contents(results=results, comparisons=(pair,)))
    assert report_files(tmp_path) == set()
