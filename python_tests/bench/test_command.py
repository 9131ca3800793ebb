"""`powerkernels bench` from its command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")  # of the plots

from bench import suite
from bench.harness import plots, readme, report, results, runner
from bench.harness.cases import SIZES
from powerkernels import cli

# Of a file under bench/results: a row is a line of two kilobytes, and a run has some hundreds.
MOST_BYTES, MOST_LINES = 1_000_000, 2_000
QUICK = ["--quick", "--peers", "eager", "--threads", "1"]


@pytest.fixture(autouse=True)
def _threads(restore_threads: None) -> None:
    pass


def refused(argv: list[str], names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *argv]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("powerkernels: error: ")
    assert names in line


def test_unknown_names(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    refused(["score_token"], "unknown 'score_token' (did you mean score_tokens?)", capsys)
    refused(["--part", "logits"], "--part: unknown 'logits'", capsys)
    refused(["--peers", "ligre"], "--peers: unknown ligre", capsys)
    refused(["--device", "tpu3"], "--device", capsys)
    refused(["--resume"], "--resume needs --out", capsys)
    refused(["--out", str(tmp_path / "no" / "a.json")], "--out: cannot write", capsys)
    refused(["compare", "a.json"], "needs two files", capsys)
    refused(["compare", "a.json", "b.json"], "a.json: No such file", capsys)
    refused(["report", "a.json"], "takes no files", capsys)


def test_quick_run_resume_compare_plot(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "a.json")
    assert cli.main(["bench", "sample_tokens", *QUICK, "--out", out]) == 0
    printed = capsys.readouterr().out
    assert "powerkernels" in printed
    assert "ceiling: read of" in printed
    data = results.load(Path(out))
    assert data["suite"]["environment"]["threads"] == 1
    assert {row.kernel for row in results.rows_of(data)} == {"sample_tokens"}

    assert cli.main(["bench", "sample_tokens", *QUICK, "--out", out, "--resume"]) == 0
    assert "in the file already" in capsys.readouterr().out
    assert cli.main(["bench", "compare", out, out]) == 0
    assert "no regression" in capsys.readouterr().out
    folder = tmp_path / "plots"
    assert cli.main(["bench", "plot", out, "--out", str(folder)]) == 0
    (picture,) = folder.iterdir()
    assert picture.name == "a-sample_tokens.svg"
    before = picture.read_bytes()
    assert cli.main(["bench", "plot", out, "--out", str(folder)]) == 0
    assert picture.read_bytes() == before, "a plot of the same file has other bytes"

    page = report.section(Path(out))
    assert data["suite"]["command"] in page
    assert "### sample_tokens" in page


def test_an_interrupted_run_says_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupt)
    out = str(tmp_path / "a.json")
    assert cli.main(["bench", "sample_tokens", *QUICK, "--out", out]) == 130
    assert f"0 cases are measured and kept in {out}; --resume goes on" in capsys.readouterr().err


def test_the_status_of_a_regression(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path, slower = tmp_path / "a.json", tmp_path / "b.json"
    assert cli.main(["bench", "sample_tokens", *QUICK, "--out", str(path)]) == 0
    data = json.loads(path.read_text())
    for entry in data["benchmarks"]:
        # Many samples close to one another.
        times = [entry["stats"]["median"] * (1 + 0.001 * n) for n in range(30)]
        entry["stats"] = results.summary(times)
    path.write_text(json.dumps(data))
    for entry in data["benchmarks"]:
        if entry["extra_info"]["ours"]:
            entry["stats"] = results.summary([2 * time for time in entry["stats"]["quantiles"]])
    slower.write_text(json.dumps(data))
    assert cli.main(["bench", "compare", str(path), str(slower)]) == 1
    assert cli.main(["bench", "compare", str(slower), str(path)]) == 0


def test_help_needs_no_torch() -> None:
    code = (
        "import sys\nfrom powerkernels.cli import main\n"
        "try:\n    main(['bench', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_without_a_checkout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(
        cli, "__file__", str(tmp_path / "site-packages" / "powerkernels" / "cli.py")
    )
    refused(["sample_tokens"], "not part of the installed package", capsys)


@pytest.mark.parametrize("size", SIZES)
def test_cases_have_names_of_their_own(size: str) -> None:
    for kernel in suite.KERNELS.values():
        titles = [case.title for case in kernel.cases(size)]  # type: ignore[arg-type]
        assert titles, kernel.name
        assert len(set(titles)) == len(titles), kernel.name
        for case in kernel.cases(size):  # type: ignore[arg-type]
            assert set(case.sweep) <= set(case.shape), case.title
        names = [variant.name for variant in kernel.variants]
        assert len(set(names)) == len(names), kernel.name
        assert kernel.variants[0].ours, kernel.name


def test_every_op_of_the_package_has_a_bench() -> None:
    assert {kernel.part for kernel in suite.KERNELS.values()} == set(suite.PARTS)
    for name in ("score_tokens", "linear_score_tokens", "sample_tokens", "clip_cov_loss"):
        assert name in suite.KERNELS


# ---- the page


def test_results_page_is_what_the_json_gives() -> None:
    assert report.TARGET.read_text() == report.markdown(), "run: powerkernels bench report"


def test_readme_tables_are_what_the_json_gives() -> None:
    text = readme.TARGET.read_text()
    assert set(readme.BLOCKS) == {found["name"] for found in readme.BLOCK.finditer(text)}
    assert text == readme.rewritten(text), "run: powerkernels bench report"


def test_a_changed_figure_is_put_right() -> None:
    text = readme.TARGET.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| powerkernels, in place |"))
    changed = text.replace(row, row.replace(" ms", "0 ms"))
    assert changed != text
    assert readme.rewritten(changed) == text


def test_blocks_of_no_name_or_no_end() -> None:
    with pytest.raises(ValueError, match=r"no block 'speed' in `bench report`; known: files,"):
        readme.rewritten("<!-- bench: speed -->\n<!-- /bench -->\n")
    for text in ("<!-- bench: losses -->\n", "<!-- bench: losses -->\n" * 2 + "<!-- /bench -->\n"):
        with pytest.raises(ValueError, match="does not end"):
            readme.rewritten(text)


def test_results_of_no_known_bench(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"seconds": 3}')
    with pytest.raises(ValueError, match=r"a\.json is the result of no known bench"):
        report.markdown(tmp_path)


def test_result_files_are_small() -> None:
    for path in sorted(plots.RESULTS.iterdir()):
        assert path.suffix == ".json", f"{path} is no result"
        assert path.stat().st_size <= MOST_BYTES, path
        assert len(path.read_text().splitlines()) <= MOST_LINES, path


def test_plots_are_of_the_results_and_of_one_format() -> None:
    for path in sorted(plots.FOLDER.iterdir()):
        assert path.suffix == ".svg", path
        name, _, kernel = path.stem.rpartition("-")
        rows = results.rows_of(results.load(plots.RESULTS / f"{name}.json"))
        assert kernel in {row.kernel for row in rows}, f"{path} is of no row"


def test_no_plots_without_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no result"):
        plots.draw([], tmp_path)
